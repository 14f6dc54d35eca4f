"""Weight shifts -> a PEFT LoRA adapter."""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from .errors import TruncationWarning

# Extra directions of the randomised factorisation; they cost little and make its error that of the best one.
_OVERSAMPLING = 16
# A relative error that float32 factors have anyway.
_EXACT = 1e-5
_DEFAULT_RANK = 512  # the largest that vLLM serves


def save_lora(
    save_directory: str | Path,
    shifts: Mapping[str, Tensor],
    *,
    fan_in_fan_out: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    rank: int | None = None,
) -> Path:
    """Factor each shift as Sᵀ = B A and save A and B as a LoRA adapter of scale 1.

    A shift solved from n tokens has rank n at most, so its factors are exact from rank n on. Beyond that the best
    approximation of that rank is kept, its relative error warned about and stored in `lora_errors.json`.

    Args:
        save_directory: folder to write.
        shifts: {module name: S of shape (key_size, value_size)}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        base_model_name_or_path: the base model, for the adapter's configuration.
        rank: the adapter's rank; None takes 512, or the smallest side of the smallest layer.

    Returns:
        The folder.

    Raises:
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; expected a whole number of at least 1, or None.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    largest = min(min(shift.shape) for shift in shifts.values())
    rank = min(rank or _DEFAULT_RANK, largest)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, shift in shifts.items():
        left, right, errors[name] = factorise(shift, rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = right.T.contiguous()
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > _EXACT:
        warnings.warn(
            f"A LoRA of rank {rank} holds the edit with a relative error of up to {errors[worst]:.2g} ({worst}). "
            "Edit fewer facts at once or raise the rank for an exact one.",
            TruncationWarning,
            stacklevel=3,
        )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(shifts),
        base_model_name_or_path=base_model_name_or_path,
        fan_in_fan_out=bool(set(fan_in_fan_out)),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    (folder / "lora_errors.json").write_text(json.dumps(errors, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def factorise(
    shift: Tensor,  # (key_size, value_size)
    rank: int,
) -> tuple[Tensor, Tensor, float]:  # (key_size, rank), (rank, value_size), relative error
    """S ≈ L R by a randomised singular value decomposition, in float64, with its relative error."""
    wide = shift.double()
    samples = min(rank + _OVERSAMPLING, *shift.shape)
    # A generator of its own would be better than forking the global one, but svd_lowrank takes none.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(wide, q=samples, niter=4)
    # Each factor takes the square root of the singular values, so that neither has the whole scale.
    root = values[:rank].sqrt()
    left, right = left[:, :rank] * root, (right[:, :rank] * root).T
    norm = wide.norm()
    error = float((wide - left @ right).norm() / norm) if norm > 0 else 0.0
    return left.float(), right.float(), error
