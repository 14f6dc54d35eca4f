"""The passes that no edit changes: what training needs of the unedited model, each once a sequence."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import IGNORED, TokenBatch, Tokenizer, TokenSequence
from .features import FeatureCache, Key, sequence_key
from .sharding import is_sharded
from .targets import blocks_of, target_module
from .tracing import Trace, answer_states, at_answers, input_device, logits_of_states, own_answer_logits, pass_cost
from .trunk import DEFAULT_TOLERANCE, TOLERANCE, Trunk

logger = logging.get_logger(__name__)


class FrozenPasses:
    """Traces of facts, the trunk's outputs, and what the model answers before any edit, kept by sequence.

    Args:
        model: the base model, inside `frozen` whenever a method is called.
        module_names: the target modules.
        trace: keys and value gradients of a batch, by module; see `tracing.trace`.
        token_selection: of the traced tokens.
        tokenize: makes batches.
        batch_size: sequences a pass.
        features: where results are kept.

    Attributes:
        moves: of hidden states, which searches have found (`training_steps.StepOfMoves`): the dearest to compute and
            the smallest to keep, so that no limit makes room of them.
    """

    def __init__(
        self,
        model: nn.Module,
        module_names: Sequence[str],
        trace: Callable[[TokenBatch], dict[str, Trace]],
        token_selection: str,
        tokenize: Tokenizer,
        batch_size: int,
        features: FeatureCache,
    ) -> None:
        self.model = model
        self.module_names = list(module_names)
        self.trace = trace
        self.token_selection = token_selection
        self.tokenize = tokenize
        self.batch_size = batch_size
        self.features = features
        self.moves = FeatureCache(sys.maxsize, features.disk)
        self.trunk = Trunk(model, module_names, features)
        # Whether what the vocabulary projection reads is kept, which is smaller, or the logits; None: not tried yet.
        # Where processes hold the model together, the logits: the projection then runs inside of a whole pass only.
        self._keeps_states: bool | None = False if is_sharded(model) else None
        # What `_find_shortened` finds; None: not looked for yet. Nothing where processes hold the model together.
        self._shortened: list[nn.Module] | None = [] if is_sharded(model) else None

    @contextmanager
    def answering(self, batch: TokenBatch) -> Iterator[None]:
        """For a pass over `batch`, edited or not, that starts above the trunk and of which only answers are read."""
        with self.trunk.replayed(batch):
            if self._shortened is None:
                self._shortened = self._find_shortened(batch)
            with at_answers(self._shortened, batch):
                yield

    def begin_step(
        self, edits: Sequence[TokenSequence], rephrases: Sequence[TokenSequence], unrelated: Sequence[TokenSequence]
    ) -> None:
        """Make room for what a step needs, and run the trunk over the prompts that several of its passes read."""
        prompts = [*rephrases, *unrelated]
        keys = [_trace_key(sequence) for sequence in edits] + [self._answer_key(sequence) for sequence in unrelated]
        self.features.make_room({*keys, *self.trunk.keys(prompts)})
        self.trunk.fill(prompts, self.tokenize, self.batch_size)

    def clear(self) -> None:
        """Forget what is in memory. What is on disk comes back from there, bit for bit."""
        self.features.clear()
        self.moves.clear()

    def traces(self, sequences: Sequence[TokenSequence]) -> dict[str, Trace]:
        """Keys and value gradients of facts, in the order of `sequences`."""
        self._fill_traces(sequences)
        rows: list[list[Tensor]] = [[] for _ in range(2 * len(self.module_names))]
        for sequence in sequences:
            for part, tensor in zip(rows, self._get(_trace_key(sequence)), strict=True):
                part.append(tensor)
        joined = [torch.cat(part) for part in rows]
        pairs = zip(joined[::2], joined[1::2], strict=True)
        return {name: Trace(*pair) for name, pair in zip(self.module_names, pairs, strict=True)}

    @torch.no_grad()
    def logits(self, sequences: Sequence[TokenSequence]) -> Tensor:  # (n_answers, vocabulary or n_classes)
        """Of the unedited model, at every answer token of `sequences`, one after the other, in its own precision."""
        if self._keeps_states is None:
            self._keeps_states = self._states_suffice(min(sequences, key=len))
        self._fill_answers(sequences)
        kept = torch.cat([self._get(self._answer_key(sequence))[0] for sequence in sequences])
        logits = self._logits(kept, sequences) if self._keeps_states else kept
        assert logits is not None  # for the type checker: tried with the first sequence
        return logits

    def _fill_traces(self, sequences: Sequence[TokenSequence]) -> None:
        for missing, batch in self._missing(sequences, _trace_key):
            with self.trunk.replayed(batch):
                traced = self.trace(batch)
            parts = []
            for name in self.module_names:
                entry = traced[name]
                counts = batch.traced_counts(self.token_selection, entry.n_rows)
                parts += [entry.keys.split(counts), entry.value_gradients.split(counts)]
            for sequence, *tensors in zip(missing, *parts, strict=True):
                self.features.put(_trace_key(sequence), tuple(map(self._copy, tensors)))

    def _fill_answers(self, sequences: Sequence[TokenSequence]) -> None:
        for missing, batch in self._missing(sequences, self._answer_key):
            with self.answering(batch):
                kept = answer_states(self.model, batch) if self._keeps_states else self._answer_logits(batch)
            assert kept is not None  # for the type checker: tried with the first sequence
            counts = [len(sequence.target_ids) for sequence in missing]
            for sequence, rows in zip(missing, kept.split(counts), strict=True):
                self.features.put(self._answer_key(sequence), (self._copy(rows),))

    def _states_suffice(self, sequence: TokenSequence) -> bool:
        """Whether the logits follow from what the vocabulary projection reads, as all but classes should."""
        batch = self.tokenize.pad([sequence]).to(input_device(self.model))
        with self.trunk.replayed(batch):
            states, logits = answer_states(self.model, batch), self._answer_logits(batch)
        found = None if states is None else self._logits(states, [sequence])
        if found is not None and _is_close(found, logits, self.model):
            return True
        logger.info(
            "No vocabulary projection can be run apart from the model; keeping logits instead of what it reads."
        )
        return False

    @torch.no_grad()
    def _find_shortened(self, batch: TokenBatch) -> list[nn.Module]:
        """Modules of the last block that need run on answer tokens alone, such as its feed-forward layers.

        Not told by name, but tried: with the modules shortened they must put out the same for answer tokens, and the
        answers must be the same, whatever they put out for other tokens.
        """
        found = blocks_of(self.model, self.module_names)
        if found is None:
            return []
        *_, last = target_module(self.model, found[0]).children()
        candidates = [child for child in last.children() if any(p.dim() > 1 for p in child.parameters())]
        fitting: dict[nn.Module, Tensor] = {}
        found_rows: dict[nn.Module, Tensor] = {}
        is_answer = batch.labels != IGNORED

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shapes = [x.shape[:-1] for x in (*args, output) if isinstance(x, Tensor)]
            if len(args) == 1 and not kwargs and shapes == [batch.labels.shape] * 2:
                fitting[module] = output[is_answer.to(output.device)]

        def spoil(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows = is_answer.to(output.device)
            found_rows[module] = output[rows]
            # Any answer that reads another token is not a number either. How far zeros would move it says little: in
            # a mean over all tokens, beside the large bias of a class, no further than rounding.
            return output.masked_fill(~rows[..., None], torch.nan)

        with _hooked(candidates, look, with_kwargs=True):
            logits = self._answer_logits(batch)
        # Hooks run in turn: after that of `at_answers`, which puts the tokens back in their places.
        with at_answers(list(fitting), batch), _hooked(fitting, spoil):
            is_same = _is_close(self._answer_logits(batch), logits, self.model) if fitting else False
        if is_same and all(_are_close(found_rows[module], rows, self.model) for module, rows in fitting.items()):
            return list(fitting)
        logger.info("The last block can only run as a whole; running it at every token.")
        return []

    def _answer_logits(self, batch: TokenBatch) -> Tensor:
        return own_answer_logits(self.model, batch)[0]

    def _logits(self, states: Tensor, sequences: Sequence[TokenSequence]) -> Tensor | None:
        shortest = self.tokenize.pad([min(sequences, key=len)]).to(input_device(self.model))
        with self.trunk.replayed(shortest):
            return logits_of_states(self.model, states, shortest)

    def _missing(
        self, sequences: Sequence[TokenSequence], key: Callable[[TokenSequence], Key]
    ) -> list[tuple[list[TokenSequence], TokenBatch]]:
        """Batches of those sequences that nothing is kept of."""
        device = input_device(self.model)
        wanted = {key(sequence): sequence for sequence in sequences}
        missing = [sequence for k, sequence in wanted.items() if self.features.get(k, device) is None]
        batches = self.tokenize.batches(missing, self.batch_size, pass_cost(self.model))
        return [([missing[i] for i in chosen], batch.to(device)) for chosen, batch in batches]

    def _get(self, key: Key) -> tuple[Tensor, ...]:
        found = self.features.get(key, input_device(self.model))
        assert found is not None  # for the type checker: just filled, and what a step needs stays through the step
        return found

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(input_device(self.model), copy=True)

    def _answer_key(self, sequence: TokenSequence) -> Key:
        return sequence_key("answer states" if self._keeps_states else "answer logits", sequence)


def _is_close(found: Tensor, expected: Tensor, model: nn.Module) -> bool:
    """Whether two ways to the same logits differ by no more than rounding."""
    found, expected = found.float(), expected.float()
    tolerance = _tolerance(model) * expected.std(correction=0)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)


def _are_close(found: Tensor, expected: Tensor, model: nn.Module) -> bool:
    """Whether two ways to the same rows, (n, size), differ by no more than rounding, row by row."""
    found, expected = found.float(), expected.float()
    distance, size = torch.linalg.vector_norm(found - expected, dim=-1), torch.linalg.vector_norm(expected, dim=-1)
    return bool((distance <= _tolerance(model) * size).all())


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, DEFAULT_TOLERANCE)


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Any], **settings: bool) -> Iterator[None]:
    """`hook` runs after each of the modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(hook, **settings))
        yield


def _trace_key(sequence: TokenSequence) -> Key:
    return sequence_key("trace", sequence)
