"""Unrelated accuracy (the paper's LS): share of true answer tokens predicted at unrelated prompts."""

from hf_malmen.metrics.base import AnswerMetric


class UnrelatedAccuracy(AnswerMetric):
    """Unrelated accuracy (the paper's LS): share of true answer tokens predicted at unrelated prompts."""

    result_name = "unrelated_accuracy"
    description = __doc__ or ""
