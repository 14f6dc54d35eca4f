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
from .shifts import DenseShift, FactoredShift, Shift

# Ranks that vLLM serves. An adapter's rank is the smallest of them that holds what it must.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Extra directions of the randomised factorisation; they cost little and make its error that of the best one.
_OVERSAMPLING = 16
# A relative error that float32 factors have anyway.
_EXACT = 1e-5


def save_lora(
    save_directory: str | Path,
    shifts: Mapping[str, Shift],
    *,
    fan_in_fan_out: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str = "CAUSAL_LM",
    rank: int | None = None,
) -> Path:
    """Factor each shift as Sᵀ = B A and save A and B as a LoRA adapter of scale 1.

    A shift that was solved from n tokens has its two factors already, and they are an exact LoRA of rank n. Where n is
    above the wanted rank, and for a shift without factors, the best approximation of that rank is computed by a
    randomised singular value decomposition; its relative error is warned about and stored in `lora_errors.json`.

    Layers may have different ranks: each takes the smallest of `SERVED_RANKS` that holds its factors, or a smaller side
    of the layer; `rank_pattern` and `alpha_pattern` say which, and the adapter's `r` is the largest.

    Args:
        save_directory: folder to write.
        shifts: {module name: its shift}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        base_model_name_or_path, revision: the base model, for the adapter's configuration.
        task_type: PEFT's.
        rank: at most this rank; None takes 512.

    Returns:
        The folder.

    Raises:
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; expected a whole number of at least 1, or None.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, shift in shifts.items():
        left, right, errors[name] = factorise(shift, min(rank or SERVED_RANKS[-1], *shift.shape))
        ranks[name] = _served(len(left), rank, min(shift.shape))
        tensors[f"base_model.model.{name}.lora_A.weight"] = _padded(left, ranks[name])
        tensors[f"base_model.model.{name}.lora_B.weight"] = _padded(right, ranks[name]).T.contiguous()
    largest = max(ranks.values())
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > _EXACT:
        warnings.warn(
            f"A LoRA of rank {ranks[worst]} holds the edit with a relative error of up to {errors[worst]:.2g} ({worst}). "
            "Edit fewer facts at once or raise the rank for an exact one.",
            TruncationWarning,
            stacklevel=3,
        )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    own_ranks = {name: rank for name, rank in ranks.items() if rank != largest}
    LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=own_ranks,
        alpha_pattern=dict(own_ranks),
        target_modules=sorted(shifts),
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        fan_in_fan_out=bool(set(fan_in_fan_out)),
        task_type=task_type,
        inference_mode=True,
    ).save_pretrained(str(folder))
    (folder / "lora_errors.json").write_text(json.dumps(errors, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def factorise(
    shift: Shift,
    rank: int,
) -> tuple[Tensor, Tensor, float]:  # (r, key_size), (r, value_size), relative error
    """S ≈ LᵀR with r ≤ `rank`: the shift's own factors if they are few enough, else the best of that rank.

    The decomposition is randomised (Halko, Martinsson and Tropp 2011, algorithm 4.4), so that S is only ever multiplied
    by a few columns; a shift with factors is never multiplied out.
    """
    if isinstance(shift, FactoredShift) and len(shift.left) <= rank:
        return *_balanced(shift.left, shift.right), 0.0
    if isinstance(shift, FactoredShift):
        # S = Pᵀ D = Qp (Rp Rdᵀ) Qdᵀ: the singular values of S are those of an n x n core.
        left_basis, left_core = torch.linalg.qr(shift.left.double().T)
        right_basis, right_core = torch.linalg.qr(shift.right.double().T)
        left, values, right = torch.linalg.svd(left_core @ right_core.T)
        error = float(values[rank:].norm() / values.norm()) if values[0] > 0 else 0.0
        left, right = left_basis @ left[:, :rank], right_basis @ right[:rank].T
    else:
        left, values, right, error = _randomised_svd(shift, rank)
    root = values[:rank].sqrt()
    return (left * root).T.float().contiguous(), (right * root).T.float().contiguous(), error


def _randomised_svd(shift: DenseShift, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    wide = shift.tensor.double()
    samples = min(rank + _OVERSAMPLING, *shift.shape)
    # A generator of its own would be better than forking the global one, but svd_lowrank takes none.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(wide, q=samples, niter=4)
    left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    # ‖S − L Lᵀ S‖² = ‖S‖² − ‖Lᵀ S‖² would cancel; the difference itself is one product more.
    norm = wide.norm()
    error = float((wide - (left * values) @ right.T).norm() / norm) if norm > 0 else 0.0
    return left, values, right, error


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of the same norm, as half precision wants them."""
    sizes = left.norm(), right.norm()
    if not all(sizes):
        return torch.zeros_like(left), torch.zeros_like(right)
    scale = (sizes[1] / sizes[0]).sqrt()
    return left * scale, right / scale


def _served(needed: int, wanted: int | None, limit: int) -> int:
    """The smallest served rank that holds `needed` directions, but no more than was asked for or than the layer has."""
    served = next((rank for rank in SERVED_RANKS if rank >= needed), needed)
    return max(needed, min(served, wanted or served, limit))


def _padded(rows: Tensor, rank: int) -> Tensor:
    """Rows of zeros up to `rank`."""
    return torch.cat((rows, rows.new_zeros(rank - len(rows), rows.shape[1]))).contiguous()
