"""Losses at answer tokens, from logits in the model's own precision.

The softmax is taken in float32 or wider, as half precision is too coarse over a vocabulary. It is taken of a few tokens
at a time, and the gradient with it, so that nothing of the size of all logits is held in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time: on a CPU a few rows of a vocabulary, which stay in its caches; on a GPU enough to fill it.
_CHUNK = {"cpu": 2**19}
_CHUNK_ELSEWHERE = 2**27


def cross_entropy(
    logits: Tensor,  # (n_answers, n_choices)
    targets: Tensor,  # (n_answers,)
) -> Tensor:  # ()
    """−log p of the targets, summed, in float32 or wider. Differentiable once."""
    loss: Tensor = _SummedLoss.apply(logits, targets, None)
    return loss


def kl_divergence(
    logits: Tensor,  # (n_answers, n_choices)
    before: Tensor,  # (n_answers, n_choices)
) -> Tensor:  # ()
    """KL(before ‖ now) of two sets of logits, summed over answers, in float32 or wider.

    Differentiable once, with respect to the first.
    """
    loss: Tensor = _SummedLoss.apply(logits, None, before)
    return loss


class _SummedLoss(torch.autograd.Function):
    """Both losses: the gradient of each is the softmax less the distribution that is wanted."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor | None, before: Tensor | None) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        n_rows = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // logits.shape[-1])
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = logits.new_zeros((), dtype=wide)
        for start in range(0, len(logits), n_rows):
            rows = slice(start, start + n_rows)
            found = logits[rows].to(wide).log_softmax(-1)
            if targets is not None:
                chosen = targets[rows, None]
                loss -= found.gather(-1, chosen).sum()
                rest = found.exp_().scatter_add_(-1, chosen, found.new_full(chosen.shape, -1.0))
            else:
                assert before is not None  # for the type checker: one of the two is there
                wanted = before[rows].to(wide).log_softmax(-1)
                # The differences first: the two entropies are nearly the same.
                apart = wanted - found
                wanted.exp_()
                loss += torch.dot(wanted.flatten(), apart.flatten())
                rest = found.exp_().sub_(wanted)
            if gradient is not None:
                gradient[rows] = rest
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: the pages of a new tensor cost more than the product. PyTorch refuses a second pass afterwards.
        return gradient.mul_(outer), None, None
