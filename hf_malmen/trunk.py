"""The frozen trunk: the blocks below the first target, run once a sequence and replayed from memory.

Nothing below the first edited layer ever changes, so its output for a sequence is computed once, in batches of its
own, and every later pass over that sequence (before the edit, after it, in the next epoch) starts from there.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import IGNORED, TokenBatch, Tokenizer, TokenSequence
from .features import FeatureCache, Key
from .sharding import is_sharded
from .targets import blocks_of, target_module
from .tracing import input_device, model_inputs, pass_cost, run_until, wide

logger = logging.get_logger(__name__)

# Two ways to the same logits may differ by this share of their spread, for rounding.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
DEFAULT_TOLERANCE = 1e-4

_N_TRIED = 6  # tokens of a trial

# Last of some blocks -> whether passes may start behind it, where that has been tried.
_tried: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class Trunk:
    """Outputs of the last block below the first target, by sequence.

    Args:
        model: the base model.
        module_names: the target modules.
        features: where the outputs are kept.
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str], features: FeatureCache) -> None:
        self.model = model
        self.features = features
        # Blocks that processes hold together are put together where they run, and run there.
        self.blocks = [] if is_sharded(model) else _blocks_below(model, module_names)
        if not self.blocks:
            logger.info("No blocks below the first edited layer can be run apart from it; running all in full.")
        self._in_tuple = False  # whether the blocks wrap their output in a tuple

    @property
    def is_usable(self) -> bool:
        """Whether there are blocks that need not run again, and nothing tried so far has shown that they must."""
        return bool(self.blocks)

    def keys(self, sequences: Sequence[TokenSequence]) -> list[Key]:
        """Where `features` keeps the outputs for these sequences."""
        return [_key(sequence.input_ids) for sequence in sequences] if self.is_usable else []

    @torch.no_grad()
    def fill(self, sequences: Sequence[TokenSequence], tokenize: Tokenizer, batch_size: int) -> None:
        """Run the trunk over those sequences that it has no output for. `model` is inside `frozen`."""
        if not self._can_replay():
            return
        wanted = {sequence.input_ids: sequence for sequence in sequences}
        missing = [sequence for ids, sequence in wanted.items() if self._output(ids) is None]
        for chosen, batch in tokenize.batches(missing, batch_size, pass_cost(self.model) // 4):  # no vocabulary
            output = self._run(batch.to(input_device(self.model)))
            if output is None:
                _tell_fallback()
                self.blocks = []
                return
            read = output[batch.attention_mask.bool().to(output.device)].to(input_device(self.model))
            for i, part in zip(chosen, read.split([len(missing[i]) for i in chosen]), strict=True):
                kept = part.clone()  # of its own, or it would keep all of them
                # A number beside the tensor, so that what comes from disk says it too.
                tuples = torch.tensor(self._in_tuple)
                self.features.put(_key(missing[i].input_ids), (kept, tuples))

    @contextmanager
    def replayed(self, batch: TokenBatch) -> Iterator[None]:
        """Within the context a forward pass over `batch` starts above the trunk, where `fill` has run its sequences."""
        ids = _input_ids(batch) if self.is_usable else []
        found = [output for output in map(self._output, ids) if output is not None]
        # What is found may come from the disk, from where nothing of this model has been tried yet.
        if not found or len(found) < len(ids) or not self._can_replay():
            yield
            return
        hidden = found[0].new_zeros((*batch.input_ids.shape, found[0].shape[-1]))
        hidden[batch.attention_mask.bool()] = torch.cat(found)
        result = (hidden,) if self._in_tuple else hidden
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_returning(block, result))
            yield

    def _can_replay(self) -> bool:
        """Whether there are blocks to save, and what runs above them reads their last hidden state alone."""
        if self.blocks and not _is_replayable(self.model, self.blocks):
            self.blocks = []
        return self.is_usable

    def _run(self, batch: TokenBatch) -> Tensor | None:
        """The trunk's output for `batch`; None if it is not one hidden state of every token."""
        output = run_until(self.model, batch, self.blocks[-1])
        self._in_tuple = isinstance(output, tuple)
        hidden = _hidden_state(output)
        return hidden if hidden is not None and hidden.shape[:2] == batch.input_ids.shape else None

    def _output(self, input_ids: tuple[int, ...]) -> Tensor | None:
        """What is kept for a sequence, (length, hidden_size)."""
        kept = self.features.get(_key(input_ids), input_device(self.model))
        if kept is None:
            return None
        self._in_tuple = bool(kept[1])
        return kept[0]


@contextmanager
def started_behind(model: nn.Module, block: str, output: Any) -> Iterator[None]:
    """Within the context a pass starts behind a block, whose output is known.

    It runs in full where the block puts out more than a hidden state, or the blocks above it read more than that.

    Args:
        model: the base model.
        block: its name; an entry of a list of blocks that run one after the other.
        output: what it puts out for the batch of the pass.
    """
    name, _, place = block.rpartition(".")
    blocks = target_module(model, name)
    assert isinstance(blocks, nn.ModuleList)  # for the type checker: it is one of its blocks
    below = list(blocks)[: int(place) + 1]
    # Not tried where processes hold the blocks together: a trial runs past what puts them together.
    if _hidden_state(output) is None or not (is_sharded(model) or _is_replayable(model, below)):
        below = []
    with ExitStack() as stack:
        for entry in below:
            stack.enter_context(_returning(entry, output))
        yield


def _blocks_below(model: nn.Module, module_names: Sequence[str]) -> list[nn.Module]:
    """The blocks that run before any target: those above it in the one list of blocks that holds all targets."""
    found = blocks_of(model, module_names)
    if found is None:
        return []
    name, places = found
    blocks = target_module(model, name)
    assert isinstance(blocks, nn.ModuleList)  # for the type checker
    return list(blocks)[: min(places)]


def _hidden_state(output: Any) -> Tensor | None:  # (n_sequences, length, hidden_size)
    """What a block puts out, if that is one hidden state, as such or in a tuple. Some put out several streams."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) and output.dim() == 3 else None


def _is_replayable(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether what runs above the blocks reads nothing of them but what the last one puts out.

    Not told by name, but tried, once: Gemma 4's upper layers, for one, read keys and values of the lower ones.
    """
    last = blocks[-1]
    if last not in _tried:
        _tried[last] = _try_out(model, blocks)
        if not _tried[last]:
            _tell_fallback()
    return _tried[last]


@torch.no_grad()
def _try_out(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a pass over a few tokens that starts behind the blocks comes to the logits of a whole one."""
    reached: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _, __, output: reached.append(_copied(output)))
    try:
        batch, other = _tokens_to_try(model)
        expected = _logits(model, batch)
        # Other tokens in between, for what outlives a pass: what the blocks last left must not be taken for theirs.
        contrast = _logits(model, other)
        handle.remove()
        hidden = _hidden_state(reached[0])
        if hidden is None or hidden.shape[:2] != batch.input_ids.shape:
            return False
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_returning(block, reached[0]))
            found = _logits(model, batch)
    except torch.OutOfMemoryError:
        raise  # says nothing about the blocks
    except Exception as error:  # whatever a block says that misses what was not run
        logger.debug(f"A pass that starts behind {type(blocks[-1]).__name__} fails: {error!r}")
        return False
    finally:
        handle.remove()
    # Against what the tokens do to the logits: their spread may be that of the bias of a class, whatever is read.
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, DEFAULT_TOLERANCE)
    return bool((found - expected).abs().max() <= tolerance * (contrast - expected).abs().max())


def _tokens_to_try(model: nn.Module) -> tuple[TokenBatch, TokenBatch]:
    """A few tokens from the middle of the vocabulary, where none is special; and the same the other way round."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator] # of every transformers model
    n_tokens = embedding.weight.shape[0]
    ids = (n_tokens // 2 + torch.arange(_N_TRIED)).clamp(max=n_tokens - 1)[None]
    batch, other = (
        TokenBatch(tokens, torch.ones_like(tokens), torch.full_like(tokens, IGNORED)) for tokens in (ids, ids.flip(1))
    )
    return batch.to(input_device(model)), other.to(input_device(model))


def _logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    # Not by a call, whose hooks may be the caller's, who has put beginnings before the batch.
    logits: Tensor = model.forward(**model_inputs(model, batch)).logits
    return wide(logits)


def _copied(output: Any) -> Any:
    """What a block puts out, before another one adds to it in place."""
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def _tell_fallback() -> None:
    logger.info("The blocks below the edited ones hand on more than a hidden state; running them in full.")


def _key(input_ids: tuple[int, ...]) -> Key:
    return "trunk", input_ids


def _input_ids(batch: TokenBatch) -> list[tuple[int, ...]]:
    """The tokens of each sequence without padding; asks the batch's device twice, not for every sequence."""
    rows = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    return [tuple(token for token, is_read in zip(*row, strict=True) if is_read) for row in rows]


@contextmanager
def _returning(block: nn.Module, result: Any) -> Iterator[None]:
    """Within the context the block returns `result` without running."""
    # An attribute of the instance shadows the class's `forward`, and is gone again when deleted. Offloading libraries
    # put one there too, which is kept and put back.
    own = vars(block).get("forward")
    vars(block)["forward"] = lambda *args, **kwargs: result
    try:
        yield
    finally:
        if own is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = own
