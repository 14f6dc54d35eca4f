"""Model + token batch -> keys and value gradients of each target module, and passes through a shifted model.

The only hooks of the package. All are removed, and the model's own settings restored, when their context ends, also by
an error.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import IGNORED, TokenBatch
from .errors import NumericalError


@dataclass(frozen=True)
class Trace:
    """What one module saw of a batch.

    Attributes:
        keys: (n_tokens, key_size), the module's inputs at the traced tokens.
        value_gradients: (n_tokens, value_size), gradient of the edit loss with respect to its outputs there.
    """

    keys: Tensor
    value_gradients: Tensor


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards each module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True  # not `.train()`, which would also switch the modules below it


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode with no parameter requiring a gradient; afterwards everything as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with in_eval_mode(model):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def lm_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    """Keyword arguments of a plain forward pass of `model` over `batch`."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "position_ids" in accepted:
        # Counted from the first real token, so that left padding does not shift a learned position embedding.
        inputs["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def answer_logits(
    model: nn.Module, batch: TokenBatch
) -> tuple[Tensor, Tensor]:  # (n_answer_tokens, vocabulary) in float32 or wider, (n_answer_tokens,)
    """Logits at the positions that predict a target token, and those target tokens.

    Rows run through the batch sequence by sequence. Where the model can, the vocabulary projection is computed only for
    the positions that some sequence of the batch answers at.
    """
    inputs = lm_inputs(model, batch)
    labels = batch.labels
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(-1)
        inputs["logits_to_keep"] = positions
        labels = labels[:, positions]
    logits = model(**inputs).logits
    answered = labels != IGNORED
    logits = logits[answered]
    # The softmax over a vocabulary in half precision is too coarse to differentiate.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[answered]


def trace(
    model: nn.Module,
    batch: TokenBatch,
    module_names: Sequence[str],
    token_selection: str,
) -> dict[str, Trace]:
    """Keys U and value gradients G of each module for a batch of facts (paper section 3.3).

    The edit loss is the sum over answer tokens of −log p, never a mean over the batch, so that a fact's gradients do
    not depend on the facts beside it. Nothing below the first module is differentiated, and no gradient is left on any
    parameter.

    Args:
        model: the base model, inside `frozen`.
        batch: facts, on the model's device.
        module_names: modules to trace.
        token_selection: `"answer"` or `"all"`.

    Raises:
        NumericalError: a key or gradient is not finite; names the module.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, module_input: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first target on the way: the graph starts here
            output = output.detach().requires_grad_(True)
        inputs[name], outputs[name] = module_input.detach(), output
        return output

    with ExitStack() as stack:
        for name in module_names:
            stack.enter_context(_hooked(model.get_submodule(name), name, record))
        stack.enter_context(torch.enable_grad())
        logits, targets = answer_logits(model, batch)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        missing = [name for name in module_names if name not in outputs]
        if missing:
            raise NumericalError(f"The forward pass never reached {', '.join(missing)}; it cannot be edited.")
        gradients = torch.autograd.grad(loss, [outputs[name] for name in module_names])

    selected = batch.selected(token_selection)
    by_module = zip(module_names, gradients, strict=True)
    traces = {name: Trace(inputs[name][selected], gradient[selected]) for name, gradient in by_module}
    # All keys first: a layer whose keys overflow makes the gradients of every layer below it overflow too.
    for what in ("keys", "value_gradients"):
        for name, entry in traces.items():
            values: Tensor = getattr(entry, what)
            if not torch.isfinite(values).all():
                raise NumericalError(
                    f"{name}: its {what.replace('_', ' ')} are not finite for these facts. The base model overflows in "
                    f"{values.dtype}; load it in bfloat16 or float32, or leave this layer out of target_modules."
                )
    return traces


@contextmanager
def shifted(model: nn.Module, shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with `x @ S` added to the outputs of each module: the edited model without touching a weight.

    Gradients flow to the shifts. Unlike a write into a half-precision weight, the addition does not round S away.

    Args:
        model: the base model.
        shifts: {module name: S of shape (key_size, value_size)}.
    """

    def add(name: str, module_input: Tensor, output: Tensor) -> Tensor:
        return output + module_input @ shifts[name].to(module_input.dtype)

    with ExitStack() as stack:
        for name in shifts:
            stack.enter_context(_hooked(model.get_submodule(name), name, add))
        yield


@contextmanager
def _hooked(module: nn.Module, name: str, function: Any) -> Iterator[None]:
    """`function(name, input, output)` runs after the module, and what it returns replaces the output."""
    handle = module.register_forward_hook(lambda _, args, output: function(name, args[0], output))
    try:
        yield
    finally:
        handle.remove()
