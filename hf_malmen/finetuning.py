"""Fine-tuning of the edited layers, the baseline: the edit loss itself, minimised by Adam.

What the least squares of the other methods approximates by keys and value differences is minimised here directly,
with the same penalty that keeps the shift small and ordinary keys where they are.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import Tokenizer, TokenSequence
from .configuration import EditorConfig
from .errors import NumericalError
from .facts import Fact
from .features import FeatureCache
from .losses import cross_entropy
from .shifts import Shift, dense
from .tracing import input_device, own_answer_logits, shifted
from .trunk import Trunk

# Outputs of the blocks below the edited ones that are kept from pass to pass.
_TRUNK_BYTES = 2**30


@torch.enable_grad()
def fine_tune(
    model: nn.Module,
    tokenize: Tokenizer,
    facts: Sequence[Fact],
    module_names: Sequence[str],
    config: EditorConfig,
    *,
    penalty: Callable[[str], Tensor | None],
    ridge: Callable[[str], float],
    batch_size: int,
) -> dict[str, Shift]:
    """The shifts S that minimise, over n facts,

        Σ_i −log p(target_i | prompt_i, S) + Σ_l (λ_l ‖S_l‖² + κ tr(S_lᵀ C_l S_l)).

    The last term is κ times the mean squared move of what a layer puts out for ordinary keys, whose second moment C is:
    a locality penalty that knows nothing of the prompts that locality is measured on.

    Each step of Adam takes the loss of `facts_per_step` facts, drawn without replacement in each pass over all of them,
    divided by their number, and the penalty divided by n. S is kept in float32 (float64 beside a float64 model) and
    added by hooks: no weight is written, and no parameter of the model is trained. It ends after `n_steps` passes, or
    after the first one in which every answer token was already the most likely one when its step began.

    Args:
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        facts: the facts.
        module_names: the layers.
        config: `n_steps`, `edit_lr`, `facts_per_step`, `seed`.
        penalty: of a module: κ C, (key_size, key_size); None for 0.
        ridge: of a module: λ.
        batch_size: facts a pass of the language model. Does not change the result, but for rounding, which Adam makes
            more of where a gradient is next to nothing.

    Raises:
        FactError: a fact is too long for the model.
        NumericalError: a shift is not finite, or no fact reaches a module; names the module.
    """
    sequences = [tokenize(fact.prompt, fact.target) for fact in facts]
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    device = input_device(model)
    shifts = {
        name: torch.zeros(config.shape_of(name), dtype=dtype, device=device, requires_grad=True)
        for name in module_names
    }
    moments = {name: penalty(name) for name in module_names}
    penalties = {name: None if of is None else of.to(shifts[name]) for name, of in moments.items()}
    optimizer = torch.optim.Adam(shifts.values(), lr=config.edit_lr)
    features = FeatureCache(_TRUNK_BYTES)
    trunk = Trunk(model, module_names, features)
    generator = torch.Generator().manual_seed(config.seed)
    unreached = set(module_names)
    with logging.tqdm(total=config.n_steps * len(facts), desc="Fine-tuning", unit=" facts", leave=False) as bar:
        for _ in range(config.n_steps):
            n_missed = 0
            for chosen in torch.randperm(len(facts), generator=generator).split(config.facts_per_step):
                optimizer.zero_grad()
                step = [sequences[i] for i in chosen]
                features.make_room(trunk.keys(step))
                n_missed += _backward(model, tokenize, trunk, step, shifts, batch_size)
                for name, shift in shifts.items():
                    if shift.grad is None:  # as of an expert that no token of these facts is sent to
                        shift.grad = torch.zeros_like(shift)
                    else:
                        unreached.discard(name)
                    _add_penalty_gradient(shift, ridge(name), penalties[name], len(facts))
                    if not torch.isfinite(shift.grad).all():
                        raise NumericalError(
                            f"{name}: its gradient is not finite. Lower EditorConfig.edit_lr, or load the base "
                            "model in bfloat16 or float32 if it is in float16."
                        )
                optimizer.step()
                bar.update(len(chosen))
            if unreached:
                raise NumericalError(
                    f"The forward pass of no fact ever reached {', '.join(sorted(unreached))}, so it cannot be edited. "
                    "Choose others."
                )
            if n_missed == 0:
                break
    return {name: dense(shift) for name, shift in shifts.items()}


def _backward(
    model: nn.Module,
    tokenize: Tokenizer,
    trunk: Trunk,
    sequences: Sequence[TokenSequence],
    shifts: Mapping[str, Tensor],
    batch_size: int,
) -> int:
    """Add the gradient of the facts' mean loss to that of the shifts.

    Returns:
        How many answer tokens are not the most likely one.
    """
    n_missed = 0
    trunk.fill(sequences, tokenize, batch_size)
    for _, batch in tokenize.batches(sequences, batch_size):
        batch = batch.to(input_device(model))
        with trunk.replayed(batch), shifted(model, shifts):
            logits, targets = own_answer_logits(model, batch)
        loss = cross_entropy(logits, targets) / len(sequences)
        if loss.requires_grad:  # it does not where no shift was reached
            loss.backward()
        n_missed += int((logits.argmax(-1) != targets).sum())
    return n_missed


@torch.no_grad()
def _add_penalty_gradient(
    shift: Tensor,  # (key_size, value_size)
    ridge: float,
    penalty: Tensor | None,  # (key_size, key_size)
    n_facts: int,
) -> None:
    """Add the gradient of (λ ‖S‖² + tr(Sᵀ A S)) / n, where A is the penalty, to that of the shift."""
    assert shift.grad is not None  # for the type checker: it is set before
    pull = shift * ridge
    if penalty is not None:
        pull.addmm_(penalty, shift)
    shift.grad.add_(pull, alpha=2 / n_facts)
