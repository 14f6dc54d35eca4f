"""The losses at answer tokens, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_malmen import losses
from hf_malmen.losses import cross_entropy, kl_divergence

N, CHOICES = 7, 50


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of a model that is sure of some answers and of others not."""
    made = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 1, N, dtype=torch.float64)[:, None]
    return (spread * torch.randn(N, CHOICES, generator=made, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 3 * CHOICES, 10**6])
def test_losses_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are taken at a time, and whatever the loss is multiplied with."""
    monkeypatch.setitem(losses._CHUNK, "cpu", chunk)
    targets = torch.arange(N) * 5 % CHOICES
    now, before = logits(0), logits(1).detach()
    pairs = (
        (cross_entropy(now, targets), F.cross_entropy(now, targets, reduction="sum")),
        (
            kl_divergence(now, before),
            F.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"),
        ),
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        (gradient,), (wanted,) = (torch.autograd.grad(0.3 * loss, now) for loss in (found, expected))
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_half_precision_is_summed_in_float32() -> None:
    """Of logits in bfloat16 the loss is that of the same numbers in float32, and its gradient rounds once."""
    now, before = logits(0, torch.bfloat16), logits(1).detach().to(torch.bfloat16)
    wide = now.detach().float().requires_grad_()
    found, expected = kl_divergence(now, before), kl_divergence(wide, before.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (gradient,), (wanted,) = torch.autograd.grad(found, now), torch.autograd.grad(expected, wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, wanted.to(torch.bfloat16), rtol=0, atol=0)


def test_nothing_moved_is_no_divergence() -> None:
    """Exactly 0, with a gradient of 0: the two entropies do not cancel by chance."""
    now = logits(0)
    loss = kl_divergence(now, now.detach())
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, now)[0].any()


def test_no_answers() -> None:
    """A process may have none."""
    empty = torch.zeros(0, CHOICES, requires_grad=True)
    loss = cross_entropy(empty, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0, CHOICES)


def test_a_second_backward_pass_is_refused() -> None:
    """The gradient is scaled in place: rather than scale it twice, PyTorch says so."""
    loss = cross_entropy(logits(0), torch.zeros(N, dtype=torch.long))
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()
