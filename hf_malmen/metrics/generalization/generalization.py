"""Generalization (GS): share of target tokens predicted at rephrases of the edited prompts."""

from hf_malmen.metrics.base import AnswerMetric


class Generalization(AnswerMetric):
    """Generalization (GS): share of target tokens predicted at rephrases of the edited prompts."""

    result_name = "generalization"
    description = __doc__ or ""
