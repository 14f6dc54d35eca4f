"""Weight shifts -> a PEFT LoRA adapter."""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import HfMalmenWarning, TruncationWarning
from .shifts import DenseShift, FactoredShift, Shift, blocks

# Ranks that vLLM serves. An adapter's rank is the smallest of them that holds what it must.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Extra directions and power iterations of the randomised factorisation: its error is that of the best one within 1 %,
# also where the singular values hardly decay.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
# Relative errors: one that the rounding of S to float32 may make, and one that is worth a warning.
_NEGLIGIBLE = 1e-6
_EXACT = 1e-5


def save_lora(
    save_directory: str | Path,
    shifts: Mapping[str, Shift],
    *,
    fan_in_fan_out: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    base_model_type: str | None = None,
    task_type: str = "CAUSAL_LM",
    rank: int | None = None,
) -> Path:
    """Factor each shift as Sᵀ = B A and save A and B as a LoRA adapter of scale 1.

    A shift that was solved from n tokens has its two factors already, and they are an exact LoRA of rank n. Where n is
    above the wanted rank, and for a shift without factors, the best approximation of that rank is computed; its
    relative error is warned about. `lora_errors.json` in the folder has the error of every layer.

    Each layer takes the smallest of `SERVED_RANKS` that holds its directions, or the smaller side of the layer where
    that is less; in an adapter that names weights, all take the largest of these. The adapter's `r` is the largest;
    `rank_pattern` and `alpha_pattern` name the layers of another rank. Rows beyond a layer's directions are zeros.

    Args:
        save_directory: folder to write.
        shifts: {module name: its shift}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        base_model_name_or_path, revision: the base model, for the adapter's configuration.
        base_model_type: transformers' `model_type` of the base, or None. Some mixtures of experts need it: PEFT takes
            the names of their shared experts for those of the fused ones, so that their adapter names weights instead
            of modules (`target_parameters`). And PEFT refuses some modules of Mamba's kind, which is warned about.
        task_type: PEFT's. An adapter for `"SEQ_CLS"` names none: PEFT would want a trained head in it, and an edit
            leaves the head as it is.
        rank: at most this rank; None takes 512.

    Returns:
        The folder.

    Raises:
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; expected a whole number of at least 1, or None.")
    # Takes seconds, and brings every quantisation library that is installed with it: only those who export pay.
    from peft import LoraConfig

    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, shift in shifts.items():
        left, right, errors[name] = factorise(shift, min(rank or SERVED_RANKS[-1], *shift.shape))
        factors[name] = left, right
        ranks[name] = _served(len(left), rank, min(shift.shape))
    inexact = [f"{name} {error:.2g}" for name, error in errors.items() if error > _EXACT]
    if inexact:
        warnings.warn(
            f"A LoRA of rank {rank or SERVED_RANKS[-1]} cannot hold the whole edit. Relative error of each layer that "
            f"was truncated: {', '.join(inexact)}. Raise the rank, or edit fewer facts at once, for an exact adapter.",
            TruncationWarning,
            stacklevel=3,
        )
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(shifts),
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        fan_in_fan_out=bool(set(fan_in_fan_out)),
        task_type=None if task_type == "SEQ_CLS" else task_type,
        inference_mode=True,
    )
    if _is_taken_for_experts(config, base_model_type):
        config.target_modules, config.target_parameters = [], [f"{name}.weight" for name in sorted(shifts)]
        ranks = dict.fromkeys(ranks, largest)  # PEFT warns of a weight's own rank that it is ignored
    refusal = _refusal(config, base_model_type, shifts)
    if refusal is not None:
        warnings.warn(
            f"PEFT will not load this adapter: {refusal} Serve it with something else, or write the edit into a "
            "checkpoint: edit.write(...).",
            HfMalmenWarning,
            stacklevel=3,
        )
    # PEFT takes these keys for regular expressions that match the end of a name: each must match its layer alone.
    own_ranks = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != largest}
    config.rank_pattern, config.alpha_pattern = own_ranks, dict(own_ranks)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _padded(left, ranks[name])
        tensors[f"base_model.model.{name}.lora_B.weight"] = _padded(right, ranks[name]).T.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "lora_errors.json").write_text(json.dumps(errors, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _is_taken_for_experts(config: Any, model_type: str | None) -> bool:
    """Whether PEFT would look for the target modules of an adapter among the fused experts of the base.

    That is how it goes on with adapters of transformers 4, where each expert was a module of its own. It tells them by
    the last part of their names, which the modules that we edit have too.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT that does no such thing
        return False
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, _stand_in(model_type), conversions=None)
    except ValueError:  # of weights that were fused together, not all are named
        return True
    except (AttributeError, TypeError):  # a PEFT that asks for more
        return False
    return bool(converted.target_modules != config.target_modules)


def _refusal(config: Any, model_type: str | None, names: Iterable[str]) -> str | None:
    """What PEFT says of adapters of these modules that it refuses to load, as of Mamba's; None if it loads them."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    except ImportError:  # a PEFT that refuses none
        return None
    for name in names:
        try:
            _check_lora_target_modules_mamba(config, _stand_in(model_type), name.rpartition(".")[2])
        except ValueError as error:
            return str(error)
    return None


def _stand_in(model_type: str | None) -> Any:
    """All that PEFT asks a model for to tell its kind, where modules are named one by one."""
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


def factorise(
    shift: Shift,
    rank: int,
) -> tuple[Tensor, Tensor, float]:  # (r, key_size), (r, value_size), relative error
    """S ≈ LᵀR with r ≤ `rank`: the shift's own factors if they are few enough, else the best of that rank.

    The best is found by a randomised singular value decomposition (Halko, Martinsson and Tropp 2011, algorithm 4.4), so
    that S is only ever multiplied by a few columns, through its factors where it has them. No more directions are taken
    than S has, and the same call gives the same bits.
    """
    if isinstance(shift, FactoredShift) and len(shift.left) <= rank:
        return *_balanced(shift.left, shift.right), 0.0
    left, right = (factor.float() for factor in _balanced(*_best_factors(shift, rank)))
    return left, right, _relative_error(shift, left, right)


def _best_factors(shift: Shift, rank: int) -> tuple[Tensor, Tensor]:  # (r, key_size), (r, value_size)
    """The randomised singular value decomposition: S ≈ LᵀR with orthogonal rows of L and of R.

    Float32 is enough to find the directions, and twice as fast; what is kept of S along them is computed in float64.
    """
    key_size, value_size = shift.shape
    generator = torch.Generator().manual_seed(0)  # of its own: the caller's random state is left alone
    n_samples = min(rank + _OVERSAMPLING, key_size, value_size)
    samples = torch.randn(value_size, n_samples, generator=generator)
    for _ in range(_POWER_ITERATIONS):
        samples = _orthonormal(_times(_transposed(shift), _orthonormal(_times(shift, samples))))
    wide = _double(shift)
    basis = _orthonormal(_times(wide, samples.double()))  # (key_size, n_samples)
    right, values, left = torch.linalg.svd(_times(_transposed(wide), basis), full_matrices=False)
    # What is left out when only the first i directions are kept, for each i.
    rests = values.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = min(rank, int((rests > _NEGLIGIBLE * rests[0]).sum()))
    return left[:kept] @ basis.T, (right[:, :kept] * values[:kept]).T


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _double(shift: Shift) -> Shift:
    if isinstance(shift, FactoredShift):
        return FactoredShift(shift.left.double(), shift.right.double())
    return DenseShift(shift.tensor.double())


def _transposed(shift: Shift) -> Shift:
    return FactoredShift(shift.right, shift.left) if isinstance(shift, FactoredShift) else DenseShift(shift.tensor.T)


def _times(
    shift: Shift,
    columns: Tensor,  # (value_size, n)
) -> Tensor:  # (key_size, n)
    """S X."""
    if isinstance(shift, FactoredShift):
        return shift.left.T @ (shift.right @ columns)
    return shift.tensor @ columns


def _relative_error(shift: Shift, left: Tensor, right: Tensor) -> float:
    """‖S − LᵀR‖ / ‖S‖, summed block by block: it needs no second S, and unlike ‖S‖² − ‖LᵀR‖² does not cancel."""
    lost = total = 0.0
    for start, stop, rows in blocks(shift, True):
        lost += float((rows - left[:, start:stop].T @ right).square().sum(dtype=torch.float64))
        total += float(rows.square().sum(dtype=torch.float64))
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with the two rows of each direction of the same norm, as half precision wants them."""
    sizes = left.norm(dim=1, keepdim=True), right.norm(dim=1, keepdim=True)
    scale = (sizes[1] / sizes[0]).sqrt()
    moved = (sizes[0] > 0) & (sizes[1] > 0)
    return torch.where(moved, left * scale, 0), torch.where(moved, right / scale, 0)


def _served(needed: int, wanted: int | None, limit: int) -> int:
    """The smallest served rank that holds `needed` directions, but no more than was asked for or than the layer has."""
    served = next((rank for rank in SERVED_RANKS if rank >= needed), needed)
    return max(needed, min(served, wanted or served, limit))


def _padded(rows: Tensor, rank: int) -> Tensor:
    """Rows of zeros up to `rank`."""
    return torch.cat((rows, rows.new_zeros(rank - len(rows), rows.shape[1])))
