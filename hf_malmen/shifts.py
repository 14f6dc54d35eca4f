"""One layer's weight shift S, dense or as factors, and the one addition W + S that live models and checkpoints share.

A shift solved from n rows is S = PᵀD with P of shape (n, key_size) and D of shape (n, value_size). For few rows the
factors are far smaller than S, and they are a LoRA of rank n as they stand.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ModelMismatchError, NumericalError
from .host import on_host
from .shards import read_header

# Values a block of rows holds. A block is the unit of every product and addition, in memory as on disk, so that both
# give the same bits, and that neither needs a second copy of a whole weight.
_BLOCK_VALUES = 2**21
# Factors of up to this many rows are kept even where S is smaller: it is the largest LoRA rank that servers take.
_ALWAYS_FACTORED = 512


@dataclass(frozen=True)
class DenseShift:
    """S itself, float32 on the CPU."""

    tensor: Tensor  # (key_size, value_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(key_size, value_size)."""
        rows, columns = self.tensor.shape
        return rows, columns

    def to(self, device: torch.device) -> "DenseShift":
        """The same shift on another device."""
        return DenseShift(self.tensor.to(device))

    def rows(self, start: int, stop: int, fan_in_fan_out: bool) -> Tensor:
        """Some rows of S as the weight stores it."""
        return self.tensor[start:stop] if fan_in_fan_out else self.tensor[:, start:stop].T

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by its role."""
        return {"shift": self.tensor}


@dataclass(frozen=True)
class FactoredShift:
    """S = PᵀD, float32 on the CPU."""

    left: Tensor  # (n, key_size): P
    right: Tensor  # (n, value_size): D

    @property
    def shape(self) -> tuple[int, int]:
        """(key_size, value_size)."""
        return self.left.shape[1], self.right.shape[1]

    def to(self, device: torch.device) -> "FactoredShift":
        """The same shift on another device."""
        return FactoredShift(self.left.to(device), self.right.to(device))

    def rows(self, start: int, stop: int, fan_in_fan_out: bool) -> Tensor:
        """Some rows of S as the weight stores it."""
        outer, inner = (self.left, self.right) if fan_in_fan_out else (self.right, self.left)
        return outer[:, start:stop].T @ inner

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by its role."""
        return {"left": self.left, "right": self.right}


Shift = DenseShift | FactoredShift


def dense(tensor: Tensor) -> DenseShift:
    """A shift from S, of shape (key_size, value_size)."""
    return DenseShift(_kept(tensor))


def is_small(n: int, key_size: int, value_size: int) -> bool:
    """Whether a shift from `n` rows is kept as factors."""
    return n <= _ALWAYS_FACTORED or n * (key_size + value_size) <= key_size * value_size


def factored(
    left: Tensor,  # (n, key_size)
    right: Tensor,  # (n, value_size)
) -> Shift:
    """A shift S = PᵀD: as factors where they are small, else dense (multiplied in the factors' precision)."""
    if not is_small(len(left), left.shape[1], right.shape[1]):
        return dense(left.T @ right)
    return FactoredShift(_kept(left), _kept(right))


def add(first: Shift, second: Shift) -> Shift:
    """The sum of two shifts of one layer."""
    if isinstance(first, FactoredShift) and isinstance(second, FactoredShift):
        return factored(torch.cat((first.left, second.left)), torch.cat((first.right, second.right)))
    return dense(materialise(first, True) + materialise(second, True))


def materialise(shift: Shift, fan_in_fan_out: bool) -> Tensor:  # (key_size, value_size)
    """S as one tensor, with the same bits that are added to a weight of that layout."""
    if isinstance(shift, DenseShift):
        return shift.tensor
    rows = torch.cat([block for _, _, block in blocks(shift, fan_in_fan_out)])
    return rows if fan_in_fan_out else rows.T.contiguous()


def blocks(shift: Shift, fan_in_fan_out: bool) -> Iterator[tuple[int, int, Tensor]]:
    """The rows of S as the weight stores them, in order: first row, row after the last, values.

    The partition depends on the shape only, so that products have the same bits wherever they are needed.
    """
    n_rows, n_columns = shift.shape if fan_in_fan_out else shift.shape[::-1]
    step = max(1, _BLOCK_VALUES // max(1, n_columns))
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        yield start, stop, shift.rows(start, stop, fan_in_fan_out)


def add_rows(
    weight: Tensor,
    shift: Tensor,
    name: str,
) -> tuple[Tensor, float]:
    """W + S, added in float32 (or the weight's wider dtype) and rounded once to the weight's dtype.

    Args:
        weight: rows of a weight, left as they are.
        shift: the same rows of the shift, of the same shape.
        name: the module, for error messages.

    Returns:
        The rounded sum, a new tensor, and what rounding cost: ‖rounded − (W + S)‖².

    Raises:
        NumericalError: the sum is not finite in the weight's dtype.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32  # float8 has no `promote_types`
    shift = shift.to(weight.device, wide)
    total = weight.detach().to(wide) + shift
    edited = total.to(weight.dtype)
    if weight.element_size() < 4:
        rest = total.sub_(edited.to(wide))
    else:  # next to this rounding that of the sum itself is everything
        rest = (edited.double() - weight.double()).sub_(shift.double())
    error = torch.linalg.vector_norm(rest).item() ** 2
    # What overflows leaves a rest that is not finite, so one number tells.
    if not math.isfinite(error) and not torch.isfinite(edited.to(wide)).all():
        raise NumericalError(f"{name}: the edited weight is not finite in {weight.dtype}. The weights are as before.")
    return edited, error


def check_shape(shift: Shift, fan_in_fan_out: bool, found: tuple[int, ...], name: str) -> None:
    """Compare the shape of a stored weight with the one that the shift needs.

    Raises:
        ModelMismatchError: they differ.
    """
    expected = shift.shape if fan_in_fan_out else shift.shape[::-1]
    if tuple(found) != expected:
        raise ModelMismatchError(
            f"{name} holds a weight of shape {tuple(found)}, and the edit needs {expected}. "
            "The edit was made for another model."
        )


def _kept(tensor: Tensor) -> Tensor:
    """Values as a shift keeps them. A GPU rounds them itself, so that half as much is copied."""
    return on_host(tensor.detach().to(torch.float32))


def save_shifts(shifts: Mapping[str, Shift], path: Path) -> None:
    """Write shifts into one safetensors file."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, shift in shifts.items():
        for role, tensor in shift.tensors().items():
            # The library refuses tensors that share their memory, as the layers of a hand-made edit may.
            tensors[f"{name}.{role}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    save_file(tensors, path, metadata={"format": "pt"})


def load_shifts(path: Path) -> dict[str, Shift]:
    """Read what `save_shifts` wrote, in the order of the modules' names.

    Raises:
        ModelMismatchError: the file holds something else.
        CheckpointError: it is missing, or no sound safetensors file.
    """
    read_header(path)  # names the file and what is wrong with it, as the library would not
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, role = key.rpartition(".")
        parts.setdefault(name, {})[role] = tensor
    shifts: dict[str, Shift] = {}
    for name, roles in sorted(parts.items()):
        matrices = all(tensor.dim() == 2 and tensor.dtype == torch.float32 for tensor in roles.values())
        if matrices and set(roles) == {"shift"}:
            shifts[name] = DenseShift(roles["shift"])
        elif matrices and set(roles) == {"left", "right"} and len(roles["left"]) == len(roles["right"]):
            shifts[name] = FactoredShift(roles["left"], roles["right"])
        else:
            found = ", ".join(
                f"{role} {tuple(tensor.shape)} in {tensor.dtype}" for role, tensor in sorted(roles.items())
            )
            raise ModelMismatchError(
                f"{path} holds {found} for {name}; expected a shift, or its left and right factors, in float32. "
                "It is no saved edit."
            )
    if not shifts:
        raise ModelMismatchError(f"{path} holds no shifts. It is no saved edit.")
    return shifts
