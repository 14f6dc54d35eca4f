"""Generalization (GS): share of target tokens predicted at rephrases of the edited prompts."""

from hf_malmen.metrics import base  # the module: `evaluate.load` takes the first metric class it finds here


class Generalization(base.AnswerMetric):
    """Generalization (GS): share of target tokens predicted at rephrases of the edited prompts."""

    result_name = "generalization"
    description = __doc__ or ""
