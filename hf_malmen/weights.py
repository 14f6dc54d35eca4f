"""Where a shift S meets a weight W: the one addition that live models and checkpoints share, so that both agree."""

import torch
from torch import Tensor

from .errors import ModelMismatchError, NumericalError


def add_shift(
    weight: Tensor,  # (value_size, key_size), or (key_size, value_size) if fan_in_fan_out
    shift: Tensor,  # (key_size, value_size)
    *,
    fan_in_fan_out: bool,
    name: str,
) -> Tensor:
    """W + S as a new tensor, added in float32 (or the weight's wider dtype) and rounded once to the weight's dtype.

    Args:
        weight: the weight, left as it is.
        shift: the shift.
        fan_in_fan_out: whether the weight is stored as (key_size, value_size).
        name: the module, for error messages.

    Raises:
        ModelMismatchError: shapes differ.
        NumericalError: the sum is not finite in the weight's dtype.
    """
    oriented = shift if fan_in_fan_out else shift.T
    if oriented.shape != weight.shape:
        raise ModelMismatchError(
            f"{name} holds a weight of shape {tuple(weight.shape)}, and the edit needs {tuple(oriented.shape)}. "
            "The edit was made for another model."
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    edited = (weight.detach().to(wide) + oriented.to(weight.device, wide)).to(weight.dtype)
    if not torch.isfinite(edited).all():
        raise NumericalError(f"{name}: the edited weight is not finite in {weight.dtype}. Nothing was written.")
    return edited
