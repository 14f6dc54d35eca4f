"""The frozen trunk: the blocks below the first target, run once a sequence and replayed from memory.

Nothing below the first edited layer ever changes, so its output for a sequence is computed once, in batches of its
own, and every later pass over that sequence (before the edit, after it, in the next epoch) starts from there.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import TokenBatch, Tokenizer, TokenSequence
from .features import FeatureCache, Key
from .sharding import is_sharded
from .targets import blocks_of, target_module
from .tracing import input_device, pass_cost, run_until

logger = logging.get_logger(__name__)


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
        """Whether there are blocks to save, and their output is a plain hidden state."""
        return bool(self.blocks)

    def keys(self, sequences: Sequence[TokenSequence]) -> list[Key]:
        """Where `features` keeps the outputs for these sequences."""
        return [_key(sequence.input_ids) for sequence in sequences] if self.is_usable else []

    @torch.no_grad()
    def fill(self, sequences: Sequence[TokenSequence], tokenize: Tokenizer, batch_size: int) -> None:
        """Run the trunk over those sequences that it has no output for. `model` is inside `frozen`."""
        if not self.is_usable:
            return
        wanted = {sequence.input_ids: sequence for sequence in sequences}
        missing = [sequence for ids, sequence in wanted.items() if self._output(ids) is None]
        for chosen, batch in tokenize.batches(missing, batch_size, pass_cost(self.model) // 4):  # no vocabulary
            output = self._run(batch.to(input_device(self.model)))
            if output is None:
                logger.info("The blocks below the edited ones return more than a hidden state; running them in full.")
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
        if not found or len(found) < len(ids):
            yield
            return
        hidden = found[0].new_zeros((*batch.input_ids.shape, found[0].shape[-1]))
        hidden[batch.attention_mask.bool()] = torch.cat(found)
        result = (hidden,) if self._in_tuple else hidden
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_returning(block, result))
            yield

    def _run(self, batch: TokenBatch) -> Tensor | None:
        """The trunk's output for `batch`; None if it is more than one hidden state."""
        output = run_until(self.model, batch, self.blocks[-1])
        self._in_tuple = isinstance(output, tuple)
        if self._in_tuple:
            output = output[0] if len(output) == 1 else None
        return output if isinstance(output, Tensor) else None

    def _output(self, input_ids: tuple[int, ...]) -> Tensor | None:
        """What is kept for a sequence, (length, hidden_size)."""
        kept = self.features.get(_key(input_ids), input_device(self.model))
        if kept is None:
            return None
        self._in_tuple = bool(kept[1])
        return kept[0]


@contextmanager
def started_behind(model: nn.Module, block: str, output: Any) -> Iterator[None]:
    """Within the context a pass starts behind a block, whose output is known; not where it is more than a hidden state.

    Args:
        model: the base model.
        block: its name; an entry of a list of blocks that run one after the other.
        output: what it puts out for the batch of the pass.
    """
    name, _, place = block.rpartition(".")
    blocks = target_module(model, name)
    assert isinstance(blocks, nn.ModuleList)  # for the type checker: it is one of its blocks
    is_hidden_state = isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)
    with ExitStack() as stack:
        for entry in list(blocks)[: int(place) + 1] if is_hidden_state else ():
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
