"""Model + token batch -> keys and value gradients of each target module, and passes through a shifted model.

All hooks are removed, and the model's own settings restored, when their context ends, also by an error.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from .batches import IGNORED, TokenBatch
from .errors import ModelMismatchError, NumericalError
from .losses import cross_entropy
from .targets import target_module
from .tasks import infer_task_type

logger = logging.get_logger(__name__)

# Up to how many tokens the fused attention of a CPU is slower, backward, in half precision; measured at 16 to 512.
_UNFUSED_LENGTH = 128


@dataclass(frozen=True)
class Trace:
    """What one module saw of a batch.

    Attributes:
        keys: (n_tokens, key_size), the module's inputs at the traced tokens.
        value_gradients: (n_tokens, value_size), gradient of the edit loss with respect to its outputs there.
        n_rows: how many rows the module saw, traced or not, of which `TokenBatch.traced_counts` tells whose they are.
    """

    keys: Tensor
    value_gradients: Tensor
    n_rows: int = 0


@dataclass(frozen=True)
class Factors:
    """A shift S = PᵀD of few rows, for passes that are faster with its factors than with their product.

    Attributes:
        left: P, (n, key_size).
        right: D, (n, value_size).
    """

    left: Tensor
    right: Tensor

    def to(self, *args: Any) -> "Factors":
        """As `Tensor.to`."""
        return Factors(self.left.to(*args), self.right.to(*args))


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
    """`model` in evaluation mode with no parameter requiring a gradient; afterwards everything as it was.

    What is compiled of it runs eagerly meanwhile: a compiled graph knows nothing of hooks that come later. Inference
    mode is left, as nothing that is made in it can be differentiated; whether gradients are on stays as it is.

    Raises:
        ModelMismatchError: the model was made in inference mode.
    """
    # Not buffers: that of a rotary embedding is made anew in whatever mode a longer text comes in.
    unusable = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if unusable is not None:
        raise ModelMismatchError(
            f"{unusable} of {type(model).__name__} was made inside torch.inference_mode(), so that nothing it takes "
            "part in can be differentiated. Load the model outside of inference mode."
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with_gradients = torch.is_grad_enabled()  # asked before inference mode is left, which turns them on
    with (
        in_eval_mode(model),
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(False),
        torch.set_grad_enabled(with_gradients),
    ):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def input_device(model: nn.Module) -> torch.device:
    """Where `model` takes its inputs: beside its first weights; the CPU if all are offloaded, and hooks move them."""
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(devices, torch.device("cpu"))


def pass_cost(model: nn.Module) -> int:
    """About how many tokens one more pass of `model` takes as long as; for `Tokenizer.batches`.

    On a CPU that is reading the weights, which takes as long as fewer products the slower these are; on a GPU it is the
    launches.
    """
    if input_device(model).type != "cpu":
        return 1024
    return 256 if _is_half(model) and torch.cpu.get_capabilities().get("amx_bf16") else 64


def kept_logits(model: nn.Module, positions: Tensor) -> Tensor | list[int]:
    """Positions as the argument `logits_to_keep`.

    As numbers where accelerate has spread `model` over several devices: it takes every tensor to the first of them, and
    the hidden states may come out on another, where they cannot be indexed by it.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return positions.tolist() if len(devices) > 1 else positions


def model_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    """Keyword arguments of a plain forward pass of `model` over `batch`."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
        inputs["decoder_attention_mask"] = batch.decoder_attention_mask
    elif "position_ids" in accepted and not batch.attention_mask[:, 0].all():
        # Padded on the left: counted from the first real token, so that a learned position embedding is not shifted.
        inputs["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def answer_logits(
    model: nn.Module, batch: TokenBatch
) -> tuple[Tensor, Tensor]:  # (n_answers, vocabulary or n_classes) in float32 or wider, (n_answers,)
    """`own_answer_logits`, in float32 or wider: a softmax over a vocabulary in half precision is too coarse."""
    logits, targets = own_answer_logits(model, batch)
    return wide(logits), targets


def own_answer_logits(
    model: nn.Module, batch: TokenBatch, *, whole: bool = False
) -> tuple[Tensor, Tensor]:  # (n_answers, vocabulary or n_classes) in the model's own precision, (n_answers,)
    """Logits of every answer token and those tokens; of a classifier, of every class, and the class.

    Rows run through the batch sequence by sequence. The cross-entropy of the two is the loss of all three tasks: a
    head with one logit s gives the logits 0 and s, whose cross-entropy is the binary one of s. The vocabulary
    projection is computed for the answer tokens alone where it is a module that reads the hidden states of all tokens;
    else, where the model can, for the positions that some sequence of the batch answers at; with `whole`, for all.
    """
    inputs = model_inputs(model, batch)
    labels = batch.labels
    # A classifier that takes the argument looks for the last token among the logits that it keeps.
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters and infer_task_type(model) != "SEQ_CLS"
    if can_keep and not whole:
        positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(-1)
        inputs["logits_to_keep"] = kept_logits(model, positions)
        labels = labels[:, positions]
    answered = (labels != IGNORED).nonzero(as_tuple=True)  # once: a GPU waits each time it is asked
    with _head_at(None if whole else _head(model), labels.shape, answered) as states, _attention(model, batch):
        logits = model(**inputs).logits
    if logits.dim() == 2:  # one answer a sequence
        logits = torch.cat((torch.zeros_like(logits), logits), dim=1) if logits.shape[1] == 1 else logits
    elif not states:
        logits = logits[answered]
    elif logits.shape[:2] == states[0].shape[:2]:
        logits = logits.squeeze(0)  # of which the gradient is a view, while that of [0] is a copy
    else:
        logger.info("What follows the vocabulary projection needs the logits of all tokens; computing them in full.")
        return own_answer_logits(model, batch, whole=True)
    return logits, labels[answered]


@torch.no_grad()
def answer_states(model: nn.Module, batch: TokenBatch) -> Tensor | None:  # (n_answers, hidden_size)
    """What the vocabulary projection reads at every answer token, in the order of `answer_logits`.

    The pass ends there. None if there is no such module, or it does not read the hidden states of all tokens.
    """
    head = _head(model)
    if head is None:
        return None
    answered = (batch.labels != IGNORED).nonzero(as_tuple=True)
    with _head_at(head, batch.labels.shape, answered, stop=True) as states:
        try:
            model(**model_inputs(model, batch))
        except _EndOfPass:
            return states[0][0]
    return None


@torch.no_grad()
def logits_of_states(
    model: nn.Module,
    states: Tensor,  # (n, hidden_size)
    batch: TokenBatch,
) -> Tensor | None:  # (n, vocabulary), in the model's own precision
    """The logits that follow from what the vocabulary projection reads. None if they do not come token by token.

    Args:
        model: the model that the states come from.
        states: of answer tokens, from `answer_states`.
        batch: anything to run the model on, the less the better; only what follows the projection matters.
    """
    head = _head(model)
    assert head is not None  # for the type checker: states came from there
    with head.register_forward_pre_hook(lambda *_: (states[None],)):
        logits = model(**model_inputs(model, batch)).logits
    if logits.shape[:2] != (1, len(states)):
        return None
    return logits[0]


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in its own precision where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def trace(
    model: nn.Module,
    batch: TokenBatch,
    module_names: Sequence[str],
    token_selection: str,
) -> dict[str, Trace]:
    """Keys U and value gradients G of each module for a batch of facts (paper section 3.3).

    The edit loss is the sum over answer tokens (of a classifier: over facts) of −log p, never a mean over the batch, so
    that a fact's gradients do not depend on the facts beside it. Nothing below the first module is differentiated, and
    no gradient is left on any parameter.

    Args:
        model: the base model, inside `frozen`.
        batch: facts, on the model's device.
        module_names: modules to trace.
        token_selection: `"answer"`, `"all"` or `"subject"`.

    Raises:
        NumericalError: a key or gradient is not finite, or a module never runs; names the module.
        ModelMismatchError: a module runs twice in a pass, or does not see the tokens of the batch.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, module_input: Tensor, output: Tensor) -> Tensor:
        _require_first_run(name, outputs)
        if not output.requires_grad:  # the first target on the way: the graph starts here
            output = output.detach().requires_grad_(True)
        inputs[name], outputs[name] = module_input.detach(), output
        return output.clone()  # some blocks add to it in place

    with ExitStack() as stack:
        for name in module_names:
            stack.enter_context(_hooked(target_module(model, name), name, record))
        stack.enter_context(torch.enable_grad())
        head = _head(model)
        is_traced = any(target_module(model, name) is head for name in module_names)
        loss = cross_entropy(*own_answer_logits(model, batch, whole=is_traced))
        missing = [name for name in module_names if name not in outputs]
        if missing:
            raise NumericalError(
                f"The forward pass never reached {', '.join(missing)}, so it cannot be edited. Choose others."
            )
        gradients = torch.autograd.grad(loss, [outputs[name] for name in module_names])

    traces = {}
    # Where the traced tokens are: a GPU waits each time it is asked.
    rows: dict[tuple[torch.Size, torch.device], Tensor] = {}
    for name, gradient in zip(module_names, gradients, strict=True):
        shape = gradient.shape[:-1]
        keys, gradient = inputs[name].flatten(0, -2), gradient.flatten(0, -2)
        n_rows = len(gradient)
        place = shape, gradient.device
        if place not in rows:
            selected = batch.traced_rows(token_selection, n_rows) if batch.has_side(shape) else None
            if selected is None:
                raise ModelMismatchError(
                    f"{name} saw {n_rows} rows in a batch of {batch.input_ids.numel()} tokens, so that it "
                    "cannot be told which token is which, as in an expert that only some tokens are sent to. Choose "
                    "another target."
                )
            rows[place] = selected.nonzero().squeeze(-1).to(gradient.device)
        traces[name] = Trace(keys[rows[place].to(keys.device)], gradient[rows[place]], n_rows)
    # All keys first: a layer whose keys overflow makes the gradients of every layer below it overflow too.
    found = [(name, what) for what in ("keys", "value_gradients") for name in module_names]
    flags = [torch.isfinite(getattr(traces[name], what)).all() for name, what in found]
    # Asked all at once, for the same reason.
    for (name, what), is_finite in zip(
        found, torch.stack([flag.to(loss.device) for flag in flags]).tolist(), strict=True
    ):
        if not is_finite:
            values: Tensor = getattr(traces[name], what)
            raise NumericalError(
                f"{name}: its {what.replace('_', ' ')} are not finite for these facts. The base model overflows in "
                f"{values.dtype}; load it in bfloat16 or float32, or leave this layer out of target_modules."
            )
    return traces


@contextmanager
def shifted(model: nn.Module, shifts: Mapping[str, Tensor | Factors]) -> Iterator[None]:
    """`model` with `x @ S` added to the outputs of each module: the edited model without touching a weight.

    Gradients flow to the shifts. Unlike a write into a half-precision weight, the addition does not round S away.

    Args:
        model: the base model.
        shifts: {module name: S of shape (key_size, value_size), or its factors}.
    """

    def add(name: str, module_input: Tensor, output: Tensor) -> Tensor:
        shift = shifts[name].to(output.device, module_input.dtype)
        keys = module_input.to(output.device)
        if isinstance(shift, Factors):
            return output + (keys @ shift.left.T) @ shift.right
        return output + keys @ shift

    with ExitStack() as stack:
        for name in shifts:
            stack.enter_context(_hooked(target_module(model, name), name, add))
        yield


def as_read(model: nn.Module, shifts: Mapping[str, Tensor | Factors]) -> dict[str, Tensor | Factors]:
    """Shifts where `shifted` wants them and in the precision that it wants, for several passes. Gradients flow."""
    found: dict[str, Tensor | Factors] = {}
    for name, shift in shifts.items():
        weight = getattr(target_module(model, name), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
            shift = shift.to(weight.device, weight.dtype)
        found[name] = shift
    return found


@contextmanager
def at_answers(modules: Sequence[nn.Module], batch: TokenBatch) -> Iterator[None]:
    """Within the context the modules run on the answer tokens of `batch` alone, and put out zeros elsewhere.

    For a pass of which nothing but `answer_logits` is read, and modules of its last block that do the same to every
    token, apart from the others.

    Args:
        modules: each takes the hidden states of all tokens as its one positional argument, and returns as many rows.
        batch: what the pass runs over.
    """
    answered = (batch.labels != IGNORED).nonzero(as_tuple=True)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_scattered(module, batch.labels.shape, answered))
        yield


@contextmanager
def _scattered(module: nn.Module, shape: Sequence[int], answered: tuple[Tensor, ...]) -> Iterator[None]:
    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][tuple(index.to(args[0].device) for index in answered)][None],)

    def scatter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        where = tuple(index.to(output.device) for index in answered)
        return output.new_zeros((*shape, output.shape[-1])).index_put(where, output[0])

    with module.register_forward_pre_hook(gather), module.register_forward_hook(scatter):
        yield


def _head(model: nn.Module) -> nn.Module | None:
    """The vocabulary projection, if `model` has one that is a module."""
    found: nn.Module | None = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return found


@contextmanager
def _head_at(
    head: nn.Module | None,
    shape: Sequence[int],
    answered: tuple[Tensor, ...],
    *,
    stop: bool = False,
) -> Iterator[list[Tensor]]:
    """Within the context `head` reads the hidden states of answer tokens only, as one sequence.

    Args:
        head: the vocabulary projection, or None.
        shape: of the batch, (n_sequences, length).
        answered: sequence and position of each answer token.
        stop: whether the pass ends there.

    Yields:
        A list that what it read is added to, (1, n_answers, hidden_size). It stays empty where the head does not run,
        or does not read the hidden states of all tokens.
    """
    states: list[Tensor] = []
    if head is None:
        yield states
        return

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        states.append(args[0][answered[0].to(args[0].device), answered[1].to(args[0].device)][None])
        if stop:
            raise _EndOfPass
        return (states[0], *args[1:])

    with head.register_forward_pre_hook(gather):
        yield states


def _attention(model: nn.Module, batch: TokenBatch) -> AbstractContextManager[None]:
    """For a pass that is differentiated: short texts on a CPU attend by plain products.

    In half precision the backward pass of PyTorch's fused attention is up to five times slower there.
    """
    is_short = batch.input_ids.shape[1] <= _UNFUSED_LENGTH
    if is_short and torch.is_grad_enabled() and input_device(model).type == "cpu" and _is_half(model):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _is_half(model: nn.Module) -> bool:
    """Whether the first weights of `model` are in half precision."""
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16)


class _EndOfPass(Exception):
    """Raised by a hook to end a forward pass."""


@contextmanager
def steered(
    block: nn.Module,
    rows: Tensor,  # (n,), long
    positions: Tensor,  # (n,), long
    moves: Tensor,  # (n, hidden_size)
) -> Iterator[None]:
    """Within the context, `moves` are added to what a block puts out at some tokens. Gradients flow to the moves.

    Args:
        block: puts out a hidden state (n_sequences, length, hidden_size), alone or as the first of a tuple or list.
        rows, positions: the sequences of the batch and the tokens in them, one each for every move.
        moves: what is added.
    """

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        device = hidden.device
        where = (rows.to(device), positions.to(device))
        hidden = hidden.index_put(where, moves.to(device, hidden.dtype), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    with block.register_forward_hook(add):
        yield


def run_until(model: nn.Module, batch: TokenBatch, module: nn.Module) -> Any:
    """What `module` puts out in a pass of `model` over `batch`, which ends there."""
    reached: list[Any] = []

    def stop(*args: Any) -> None:
        reached.append(args[-1])
        raise _EndOfPass

    with module.register_forward_hook(stop), suppress(_EndOfPass):
        model(**model_inputs(model, batch))
    return reached[0]


@torch.no_grad()
def read_keys(
    model: nn.Module,
    batch: TokenBatch,
    module_names: Sequence[str],
    token_selection: str,
    until: nn.Module,
) -> tuple[dict[str, Tensor], Tensor]:  # {module name: (n_tokens, key_size)}, (n_tokens, hidden_size)
    """Keys of each module at the traced tokens, and the hidden state there that the block `until` puts out.

    Nothing above that block runs.

    Args:
        model: the base model, inside `frozen`.
        batch: sequences, on the model's device.
        module_names: modules that run in this block or below it.
        token_selection: `"answer"` or `"all"`.
        until: the block.

    Raises:
        NumericalError: a key or a hidden state is not finite; names the module.
        ModelMismatchError: a module runs twice in a pass, or does not see the tokens of the batch.
    """
    seen: dict[str, Tensor] = {}

    def record(name: str, module_input: Tensor, output: Tensor) -> Tensor:
        _require_first_run(name, seen)
        seen[name] = module_input
        return output

    with ExitStack() as stack:
        for name in module_names:
            stack.enter_context(_hooked(target_module(model, name), name, record))
        output = run_until(model, batch, until)
    hidden = "the hidden state"
    seen[hidden] = output[0] if isinstance(output, tuple | list) else output  # the first GPT's is a list
    for name, values in seen.items():
        rows = values.flatten(0, -2)
        selected = batch.traced_rows(token_selection, len(rows))
        if selected is None:
            raise ModelMismatchError(
                f"{name} has {len(rows)} rows in a batch of {batch.input_ids.numel()} tokens, so that it cannot be "
                "told which token is which. Choose another target."
            )
        seen[name] = rows[selected.to(rows.device)]
        if not torch.isfinite(seen[name]).all():
            raise NumericalError(
                f"{name}: its values are not finite for these texts. The base model overflows in {values.dtype}; load "
                "it in bfloat16 or float32, or leave this layer out of target_modules."
            )
    return seen, seen.pop(hidden)


def _require_first_run(name: str, seen: Mapping[str, Tensor]) -> None:
    if name in seen:
        raise ModelMismatchError(
            f"{name} runs more than once in a pass, as a layer does that several blocks share. Choose another target."
        )


def _hooked(module: nn.Module, name: str, function: Any) -> RemovableHandle:
    """A context: `function(name, input, output)` runs after the module, and what it returns replaces the output."""
    return module.register_forward_hook(lambda _, args, output: function(name, args[0], output))
