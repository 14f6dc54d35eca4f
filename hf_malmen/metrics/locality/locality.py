"""Locality: share of unrelated answer tokens predicted as before the edit. References: predictions before it."""

from hf_malmen.metrics import base  # the module: `evaluate.load` takes the first metric class it finds here


class Locality(base.AnswerMetric):
    """Locality: share of unrelated answer tokens predicted as before the edit. References: predictions before it."""

    result_name = "locality"
    description = __doc__ or ""
