"""Unrelated accuracy (the paper's LS): share of true answer tokens predicted at unrelated prompts."""

from hf_malmen.metrics import base  # the module: `evaluate.load` takes the first metric class it finds here


class UnrelatedAccuracy(base.AnswerMetric):
    """Unrelated accuracy (the paper's LS): share of true answer tokens predicted at unrelated prompts."""

    result_name = "unrelated_accuracy"
    description = __doc__ or ""
