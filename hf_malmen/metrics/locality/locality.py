"""Locality: share of unrelated answers whose prediction the edit did not change. References: predictions before it."""

from hf_malmen.metrics.base import AnswerMetric


class Locality(AnswerMetric):
    """Locality: share of unrelated answers whose prediction the edit did not change. References: predictions before it."""

    result_name = "locality"
    description = __doc__ or ""
