"""Edit success (ES): share of target tokens predicted at the edited prompts."""

from hf_malmen.metrics import base  # the module: `evaluate.load` takes the first metric class it finds here


class EditSuccess(base.AnswerMetric):
    """Edit success (ES): share of target tokens predicted at the edited prompts."""

    result_name = "edit_success"
    description = __doc__ or ""
