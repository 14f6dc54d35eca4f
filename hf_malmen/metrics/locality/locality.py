"""Locality: share of unrelated answer tokens predicted as before the edit. References: predictions before it."""

from hf_malmen.metrics.base import AnswerMetric


class Locality(AnswerMetric):
    """Locality: share of unrelated answer tokens predicted as before the edit. References: predictions before it."""

    result_name = "locality"
    description = __doc__ or ""
