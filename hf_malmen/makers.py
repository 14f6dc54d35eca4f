"""Facts -> weight shifts, by the ways that methods have: one function a way, of an editor and a request."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import distributed
from .batches import Tokenizer
from .configuration import EditorConfig
from .errors import EditStateError
from .facts import Fact
from .finetuning import fine_tune
from .least_squares import fitting_state
from .memit import tokenize_facts
from .memory import plan_groups, traces_by_group
from .networks import DEFAULT_EDITOR_BATCH_SIZE, EditorNetworks, pack_statistics
from .shifts import Shift
from .streaming import FactReader
from .tracing import Trace, input_device
from .writing import write_targets

Made = TypeVar("Made")


@dataclass(frozen=True)
class EditRequest:
    """What a maker of shifts is asked for.

    Attributes:
        model: the base model, inside `frozen`.
        reader: what to write, as facts and as token sequences.
        batch_size: facts a pass of the language model.
        editor_batch_size: tokens a pass of the hyper-network.
        statistics: that earlier edits of the model left, as `pack_statistics` makes them; None: there are none.
        written: keys that the facts of edits in force were written at, as in `EditState`.
        max_memory: the most bytes that the rows, or UᵀU and UᵀD, of layers solved together may take; None: no limit, so
            that all are solved together.
    """

    model: PreTrainedModel
    reader: FactReader
    batch_size: int
    editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE
    statistics: Mapping[str, Tensor] | None = None
    written: Mapping[str, Tensor] = field(default_factory=dict)
    max_memory: int | None = None

    def traces(self, editor: EditorNetworks, names: Sequence[str] | None = None) -> Iterator[dict[str, Trace]]:
        """Traces of all facts, in a pass of its own that shows its progress; of some modules, or of all."""
        title = f"Tracing {len(names or editor.module_names)} layers"
        batches = self.reader.batches(self.batch_size, input_device(self.model), title)
        return editor.trace(self.model, batches, names=names)


@dataclass(frozen=True)
class MadeShifts:
    """What a maker of shifts answers.

    Attributes:
        shifts: {module name: its shift}.
        statistics: that have followed the edit, as `pack_statistics` makes them; empty where there are none.
        written: keys that the facts were written at, where later edits are to leave them where they are.
    """

    shifts: dict[str, Shift]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)


def _from_rows(editor: EditorNetworks, request: EditRequest) -> MadeShifts:
    """The way of most methods: trace all facts, turn each traced token into a row, solve each layer's least squares."""
    plan = _planned(editor, request)
    statistics, held = None, None
    if editor.config.follows_edits:  # all rows are needed before the first is standardised: held, or traced twice
        traces: Iterable[Mapping[str, Trace]] = request.traces(editor)
        if request.max_memory is None:
            with distributed.together():
                traces = held = list(traces)
        statistics = editor.statistics_after(traces, request.statistics)
    shifts: dict[str, Shift] = {}
    first = (lambda _: iter(held)) if held is not None else (lambda names: request.traces(editor, names))
    parts = traces_by_group(plan.groups, first, plan.n_bytes, editor.device)
    with closing(parts):
        for names, traced in parts:
            solutions = editor.solutions(traced, request.editor_batch_size, statistics, names, plan.n_rows, plan.folded)
            for name, solution in solutions:
                shifts[name] = solution.to_shift()
                del solution  # before the next one is made
    return MadeShifts(shifts, pack_statistics(statistics or {}))


@dataclass(frozen=True)
class _Plan:
    """How the layers' least squares are kept within the memory given.

    Attributes:
        groups: of modules that are solved together.
        n_rows: that each is about to get, at least.
        folded: modules whose rows are folded from the first on; see `fitting_state`.
        n_bytes: the most that the traces of all groups but the first take.
    """

    groups: list[list[str]]
    n_rows: int
    folded: frozenset[str] = frozenset()
    n_bytes: int = 0


def _planned(editor: EditorNetworks, request: EditRequest) -> _Plan:
    """All layers together, if nothing is said of memory; else as many as fit it.

    Raises:
        ValueError: one layer does not.
    """
    if request.max_memory is None:
        return _Plan([editor.module_names], request.reader.n_facts or 0)  # a fact has a traced token
    n_rows = request.reader.count_rows(editor.config.traced_tokens)
    shapes = {name: editor.config.shape_of(name) for name in editor.module_names}
    n_solved = n_rows + editor.config.n_preserved_keys
    states = {
        name: fitting_state(editor.config.aggregation, shape, n_solved, request.max_memory)
        for name, shape in shapes.items()
    }
    groups = plan_groups({name: size for name, (size, _) in states.items()}, request.max_memory)
    folded = frozenset(name for name, (_, is_folded) in states.items() if is_folded)
    n_values = n_rows * sum(sum(shapes[name]) for names in groups[1:] for name in names)
    return _Plan(groups, n_rows, folded, n_values * request.model.dtype.itemsize)


def _from_targets(editor: EditorNetworks, request: EditRequest) -> MadeShifts:
    """MEMIT's way. All facts are held: their targets are sought before the first layer is solved."""
    if editor.config.key_covariance == "required" and editor.n_covariance_tokens == 0:
        raise EditStateError(
            f"Method {editor.config.method!r} weighs an edit against the covariance of ordinary keys, and this editor "
            "has none yet. Call editor.collect_covariance(model, texts) first; save_pretrained keeps it."
        )
    make = _from_facts(write_targets, editor, request)
    with torch.no_grad():
        shifts, written = make(written=request.written, refine=editor.refine)
    return MadeShifts(shifts, written={name: keys.cpu() for name, keys in written.items()})


def _from_fine_tuning(editor: EditorNetworks, request: EditRequest) -> MadeShifts:
    """By descent on the edit loss itself. All facts are held, as they are read several times."""
    return MadeShifts(_from_facts(fine_tune, editor, request)())


def _from_facts(make: Callable[..., Made], editor: EditorNetworks, request: EditRequest) -> Callable[..., Made]:
    """What both ways that read the facts themselves are told, and how they weigh the edit.

    Raises:
        ValueError: a limit of memory, which they have no way to keep.
    """
    if request.max_memory is not None:
        raise ValueError(
            f"Method {editor.config.method!r} holds all facts of an edit, and all layers, at once, so that max_memory "
            "cannot be kept. Leave it out; facts_per_turn=... edits fewer facts at once."
        )
    return partial(
        make,
        request.model,
        request.reader.tokenize,
        list(request.reader.facts()),
        editor.module_names,
        editor.config,
        penalty=editor.key_penalty,
        ridge=editor.ridge,
        batch_size=request.batch_size,
    )


def check_readable(editor: EditorNetworks, facts: Iterable[Fact], tokenize: Tokenizer) -> None:
    """Check that the method can read all facts, without running the model.

    Raises:
        FactError: one is too long for the model, or lacks what the method looks for.
    """
    read = MAKERS[editor.config.maker].read
    for fact in facts:
        read(fact, tokenize, editor.config)


def _read_edit(fact: Fact, tokenize: Tokenizer, config: EditorConfig) -> None:
    tokenize.edit(fact)


def _read_request(fact: Fact, tokenize: Tokenizer, config: EditorConfig) -> None:
    tokenize_facts([fact], tokenize, config)


@dataclass(frozen=True)
class Maker:
    """One way from facts to shifts.

    Attributes:
        make: computes the shifts; called with the base model inside `frozen`.
        read: tokenises one fact as `make` does, without running the model. Raises a `FactError` where it cannot.
    """

    make: Callable[[EditorNetworks, EditRequest], MadeShifts]
    read: Callable[[Fact, Tokenizer, EditorConfig], None] = _read_edit


# By `Method.maker`.
MAKERS = {
    "rows": Maker(_from_rows),
    "memit": Maker(_from_targets, _read_request),
    "ft": Maker(_from_fine_tuning),
}
