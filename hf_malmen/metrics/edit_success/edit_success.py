"""Edit success (ES): share of target tokens predicted at the edited prompts."""

from hf_malmen.metrics.base import AnswerMetric


class EditSuccess(AnswerMetric):
    """Edit success (ES): share of target tokens predicted at the edited prompts."""

    result_name = "edit_success"
    description = __doc__ or ""
