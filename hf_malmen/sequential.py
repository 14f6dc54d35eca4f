"""Editing for life: edits made on top of those that are in force on a model, turn by turn or accumulated."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import distributed
from .base_model import base_of
from .batches import Tokenizer
from .edit import Edit
from .errors import EditStateError
from .evaluation import measure_edit
from .facts import Fact, FactStream
from .in_force import EditInForce, base_fingerprint_as_stored, edits_in_force, ledger_of, unedited
from .least_squares import RidgeLeastSquares, RowSum, fitting_state, solve_device
from .ledger import Ledger, NewFacts, build_ledger
from .makers import check_readable
from .memory import parse_memory, plan_groups
from .model_card import N_FACTS_SHOWN
from .sharding import whole
from .shards import raw
from .shifts import Shift, dense
from .state import EditState, Products, RowCollector, Rows, all_written
from .targets import is_fan_in_fan_out, target_module, weight_of
from .tracing import frozen, input_device

if TYPE_CHECKING:
    from .modeling import EditorModel

# Tokens a pass of the hyper-network.
EDITOR_BATCH_SIZE = 1024
# Batches of streamed facts that are read ahead, so that those of a batch are of similar length.
WINDOW_BATCHES = 32


@dataclass(frozen=True)
class Standing:
    """What the edits in force on a model have left for the next edit of one editor.

    Attributes:
        fingerprint: of the target weights before any live edit; see `base_fingerprint_as_stored`.
        statistics: running statistics after the last edit whose statistics are of the same kind as the editor's: those
            of one method, of the same layers, tokens and template of prompts. Empty before any, or where they are not
            to follow.
        written: keys that the facts of these edits were written at, {module name: (n, key_size)}, but for facts that
            are known to be replaced; see `EditState.written`. Empty as before.
    """

    fingerprint: str
    statistics: Mapping[str, Tensor]
    written: Mapping[str, Tensor]

    def after(self, edit: Edit) -> "Standing":
        """The same when `edit`, by that editor, has come on top."""
        written = all_written([EditState(written=dict(self.written)), edit.state])
        return Standing(self.fingerprint, edit.statistics or self.statistics, written)


def standing_of(model: nn.Module, editor: "EditorModel", edits: Sequence[EditInForce] | None = None) -> Standing:
    """Where a model stands for the next edit by `editor`, once it is checked that the two fit.

    Args:
        model: the live model.
        editor: the editor.
        edits: those in force on the model, where they are known.

    Raises:
        ModelMismatchError: see `EditorModel.check_base`.
    """
    fingerprint = editor.check_ready(model) or base_fingerprint_as_stored(model, editor.module_names)
    if not editor.config.follows_edits:
        return Standing(fingerprint, {}, {})
    edits = edits_in_force(model) if edits is None else edits
    return Standing(fingerprint, _last_statistics(edits, editor), all_written(_states_in_force(edits)))


def _states_in_force(edits: Sequence[EditInForce]) -> Iterator[EditState]:
    """The states of edits without the keys of facts that are replaced, where an edit knows whose its keys are."""
    gone = _replaced(ledger_of(edits))
    for edit in edits:
        stay = [index not in gone.get(edit.id, ()) for index in range(len(edit.facts))]
        written = {
            # Of a stream the first facts alone are known; of merged edits a layer may have keys of some.
            name: keys[torch.tensor(stay)] if len(keys) == len(stay) == edit.n_facts else keys
            for name, keys in edit.state.written.items()
        }
        yield replace(edit.state, written=written)


def _replaced(ledger: Ledger) -> dict[str, set[int]]:
    """{edit: which of its facts are replaced}."""
    gone: dict[str, set[int]] = {}
    for entry in ledger.replaced:
        gone.setdefault(entry.edit, set()).add(entry.index)
    return gone


def _last_statistics(edits: Sequence[EditInForce], editor: "EditorModel") -> dict[str, Tensor]:
    kind = statistics_kind(editor)
    for edit in reversed(edits):
        if edit.state.statistics and edit.state.editor == kind:
            return edit.state.statistics
    return {}


def editor_fingerprint(editor: "EditorModel") -> str:
    """SHA-256 of all that an editor's rows depend on, by which a state tells whose they are."""
    digest = hashlib.sha256(statistics_kind(editor).encode())
    for name, tensor in sorted(editor.state_dict().items()):
        digest.update(name.encode())
        digest.update(raw(tensor.detach().cpu()))
    for name in editor.module_names:  # of a method without training they are settings, and no part of its state
        network, index = editor.network(name)
        for scale in network.initial:
            digest.update(raw(getattr(network, scale)[index].detach().cpu()))
    return digest.hexdigest()


def statistics_kind(editor: "EditorModel") -> str:
    """SHA-256 of what an editor's running statistics are of."""
    config = editor.config
    what = [config.method, editor.module_names, config.traced_tokens, config.prompt_template, config.use_chat_template]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def make_next_edit(
    editor: "EditorModel",
    model: PreTrainedModel,
    facts: Sequence[Fact] | FactStream,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int,
    facts_per_turn: int | None = None,
    max_memory: int | str | None = None,
    accumulate: bool = False,
    measure: bool = False,
) -> Edit:
    """The edit that writes those of `facts` into a model that are not in force yet. It is left unapplied.

    Args:
        editor, model, facts, tokenizer, batch_size, facts_per_turn, max_memory, accumulate, measure: as in
            `EditorModel.apply`.

    Returns:
        The edit; without shifts if all facts are in force already, and, with `accumulate`, the weights are what these
        give.

    Raises:
        EditStateError: see `EditorModel.apply`.
        FactError, ModelMismatchError, NumericalError: see `EditorModel.make_edit`.
    """
    stream = isinstance(facts, FactStream)
    edits = edits_in_force(model, strict=accumulate)
    distributed.require_same([(edit.id, edit.n_facts) for edit in edits], "edits in force")
    if isinstance(facts, FactStream):
        facts.count()  # finds a bad fact in a file before the model runs
    new = NewFacts(facts, ledger_of(edits), N_FACTS_SHOWN if stream else None)
    is_empty = next(iter(new), None) is None
    if is_empty and not (accumulate and edits and _is_accumulable(editor, edits)):
        editor.check_base(model)
        edit = editor.wrap({}, model, [], 0)
    elif accumulate:
        edit = _make_accumulated(editor, model, new, edits, tokenizer, batch_size, max_memory)
    else:
        edit = _make_in_turns(editor, model, new, edits, stream, tokenizer, batch_size, facts_per_turn, max_memory)
    edit.n_skipped = new.n_skipped
    if measure and edit.n_facts:
        tokenize = editor.tokenizer_for(model, tokenizer)
        found = measure_edit(base_of(model), edit, edit.facts, tokenize, batch_size=batch_size, n_resamples=0)
        edit.measured = {name: score for name, score in found.scores.items() if not name.endswith("_before")}
    return edit


def _make_in_turns(
    editor: "EditorModel",
    model: PreTrainedModel,
    facts: NewFacts,
    edits: Sequence[EditInForce],
    stream: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    facts_per_turn: int | None,
    max_memory: int | str | None,
) -> Edit:
    """Turn by turn, each on the model as edited so far."""
    if facts_per_turn is not None:  # what the last turn would be refused for must not cost the turns before it
        check_readable(editor, facts, editor.tokenizer_for(model, tokenizer))
    edit: Edit | None = None
    at_once: Sequence[Fact] | FactStream = FactStream(facts) if stream else list(facts)
    standing = standing_of(base_of(model), editor, edits)  # once: it reads all target weights
    try:
        for turn_facts in [at_once] if facts_per_turn is None else _turns(facts, facts_per_turn):
            options: dict[str, Any] = {"batch_size": batch_size, "max_memory": max_memory}
            turn = editor.make_edit(model, turn_facts, tokenizer, standing=standing, **options)
            standing = standing.after(turn)
            turn.facts = []  # kept once, for all turns
            if edit is not None:  # one merged edit in force, so that memory does not grow with the turns
                edit.undo()
                turn = edit.merge(turn)
            edit = turn.apply_to(model, on_fingerprint_mismatch="ignore")
    finally:
        if edit is not None and edit.in_force:
            edit.undo()
    assert edit is not None  # for the type checker: there are facts
    edit.facts = list(facts.kept)
    return edit


def _make_accumulated(
    editor: "EditorModel",
    model: PreTrainedModel,
    facts: NewFacts,
    edits: Sequence[EditInForce],
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    max_memory: int | str | None,
) -> Edit:
    """One solve over the rows of all facts in force, old and new, traced on the unedited model; layer by layer.

    Without new facts and where the weights are what the solve gives, as they are unless an edit below later ones was
    undone, the edit has no shifts.
    """
    limit = parse_memory(max_memory)
    maker = editor_fingerprint(editor)
    _require_accumulable(editor, maker, edits)
    plain = base_of(model)
    fingerprint = editor.check_ready(plain)
    tokenize = editor.tokenizer_for(plain, tokenizer)
    with editor.beside(input_device(plain)), unedited(plain, editor.module_names) as found:
        n_facts, own = _trace_rows(editor, plain, tokenize, facts, batch_size)
        kept = list(facts.kept)
        ledger = build_ledger([*((edit.id, edit.facts, edit.n_facts) for edit in edits), ("this edit", kept, n_facts)])
        gone = _replaced(ledger)
        parts = [
            _rows_left(editor, plain, tokenize, earlier, gone.get(earlier.id, set()), batch_size) for earlier in edits
        ]
        parts = [rows for rows in (*parts, own) if rows]
        folded = _require_room(editor, parts, limit)
        shifts: dict[str, Shift] = {}
        is_due = n_facts > 0
        for name in editor.module_names:
            aggregator = editor.aggregators([name], folded=folded)[name]
            for rows in parts:
                _add(aggregator, rows[name], editor.device)
            solution = aggregator.solve(editor.ridge(name), in_place=True)
            if edits:
                difference = _difference(plain, name, solution.shift, found[name])
                is_due = is_due or _is_more_than_rounding(plain, name, difference, solution.shift, found[name])
                shifts[name] = dense(difference)
            else:
                shifts[name] = solution.to_shift()
    edit = editor.wrap(shifts if is_due else {}, plain, kept, n_facts, fingerprint=fingerprint)
    if is_due:
        edit.state = EditState(maker, {}, own, solved_with=sum(earlier.n_facts for earlier in edits))
    return edit


def _is_accumulable(editor: "EditorModel", edits: Iterable[EditInForce]) -> bool:
    try:
        _require_accumulable(editor, editor_fingerprint(editor), edits)
    except (EditStateError, ValueError):
        return False
    return True


def _require_accumulable(editor: "EditorModel", maker: str, edits: Iterable[EditInForce]) -> None:
    """Refuse to accumulate where the solve over all facts is not what the edits in force come to.

    Raises:
        ValueError: the editor's value differences depend on the turn.
        EditStateError: an edit in force was made otherwise.
    """
    config = editor.config
    if config.maker != "rows" or config.follows_edits:
        way = (
            "whose statistics follow the edits. Leave it out; or freeze them with EditorConfig(statistics='frozen') "
            "and editor.warm_up(model, facts)"
        )
        if config.maker != "rows":
            way = "which has no rows to solve for. Leave it out, or use another method"
        raise ValueError(
            "accumulate=True needs value differences that do not depend on the turn, and this editor has the method "
            f"{config.method!r}, {way}."
        )
    for edit in edits:
        if not edit.state.rows or edit.state.editor != maker:
            how = "by another editor" if edit.state.rows else "without accumulate=True"
            raise EditStateError(
                f"accumulate=True solves over the facts of all edits in force, and edit {edit.id} was made {how}, so "
                "that its rows are not known. Apply these facts without it, or undo that edit and apply its facts "
                "again with it."
            )


def _require_room(
    editor: "EditorModel", parts: Iterable[Mapping[str, Rows | Products]], max_memory: int | None
) -> set[str]:
    """Check that the solve of each layer, which is done by itself, keeps within `max_memory` bytes.

    Returns:
        Modules whose rows are to be folded for that, see `fitting_state`.

    Raises:
        ValueError: it does not.
    """
    config = editor.config
    n_rows = dict.fromkeys(editor.module_names, config.n_preserved_keys)
    for rows in parts:
        for name, own in rows.items():
            n_rows[name] += len(own.left) if isinstance(own, Rows) else own.n_rows
    states = {
        name: fitting_state(config.aggregation, config.shape_of(name), n, max_memory) for name, n in n_rows.items()
    }
    plan_groups({name: size for name, (size, _) in states.items()}, max_memory)
    return {name for name, (_, is_folded) in states.items() if is_folded}


def _difference(
    model: nn.Module,
    name: str,
    shift: Tensor,  # (key_size, value_size)
    found: Tensor,
) -> Tensor:  # (key_size, value_size), float64
    """What brings a weight from where it was found to W + S, with W, the unedited one, in the model.

    So the edits in force and their roundings drop out: the model holds what one shot would have written.
    """
    before = whole(weight_of(model, name)).detach()
    moved = (before.double() - whole(found).detach().double()).to(shift.device)
    return shift.double() + (moved if is_fan_in_fan_out(target_module(model, name)) else moved.T)


def _is_more_than_rounding(
    model: nn.Module,
    name: str,
    difference: Tensor,  # (key_size, value_size), float64
    shift: Tensor,  # (key_size, value_size)
    found: Tensor,
) -> bool:
    """Whether a weight, once the difference is added, is another one: by more than a thousandth of the shift in all."""
    weight = whole(found).detach()
    move = difference if is_fan_in_fan_out(target_module(model, name)) else difference.T
    written = (weight.double() + move.to(weight.device)).to(weight.dtype)
    return float((written.double() - weight.double()).norm()) > 1e-3 * float(shift.double().norm())


def _rows_left(
    editor: "EditorModel",
    model: PreTrainedModel,
    tokenize: Tokenizer,
    edit: EditInForce,
    gone: set[int],
    batch_size: int,
) -> Mapping[str, Rows | Products]:
    """The rows of an edit in force but for those of facts that are replaced.

    Where only their products were kept, its other facts are traced again: to subtract what the replaced ones come to
    when they are traced today would leave the difference in rounding, which in half precision is no small one.

    Raises:
        EditStateError: they cannot be, as the edit's facts were streamed.
    """
    if not gone:
        return edit.state.rows
    if all(isinstance(rows, Rows) for rows in edit.state.rows.values()):
        left = {}
        for name, rows in edit.state.rows.items():
            assert isinstance(rows, Rows)  # for the type checker
            stays = ~torch.isin(rows.facts, torch.tensor(sorted(gone)))
            left[name] = Rows(rows.left[stays], rows.differences[stays], rows.facts[stays])
        return left
    if edit.n_facts > len(edit.facts):
        prompt = edit.facts[min(gone)].prompt
        raise EditStateError(
            f"The fact {prompt!r} of edit {edit.id} is to be replaced, and that edit has kept neither its rows apart "
            f"nor all {edit.n_facts} facts to trace again, as they were streamed. Undo edit {edit.id} first, or apply "
            "without accumulate=True."
        )
    stay = [fact for index, fact in enumerate(edit.facts) if index not in gone]
    return _trace_rows(editor, model, tokenize, NewFacts(stay, Ledger()), batch_size)[1] if stay else {}


@torch.no_grad()
def _trace_rows(
    editor: "EditorModel", model: PreTrainedModel, tokenize: Tokenizer, facts: NewFacts, batch_size: int
) -> tuple[int, dict[str, Rows | Products]]:
    """The number of facts, and the rows that they give, each with the index of its fact among those kept.

    Of several processes each traces its share of the facts, and all get the rows of all.
    """
    collectors = {name: RowCollector(editor.config.aggregation) for name in editor.module_names}
    n_facts = 0
    with frozen(model), distributed.together(), logging.tqdm(desc="Tracing", unit=" facts", leave=False) as bar:
        remaining = iter(facts)
        while window := list(islice(remaining, WINDOW_BATCHES * batch_size)):
            n_facts += len(window)
            places = {id(fact): place for place, fact in enumerate(facts.kept)}
            own = list(distributed.own(window))
            numbers = torch.tensor([places.get(id(fact), -1) for fact in own])
            sequences = [tokenize.edit(fact) for fact in own]
            for chosen, batch in tokenize.batches(sequences, batch_size):
                (traced,) = editor.trace(model, [batch.to(input_device(model))])
                for name, entry in traced.items():
                    counts = batch.traced_counts(editor.config.traced_tokens, entry.n_rows)
                    owners = numbers[chosen].repeat_interleave(torch.tensor(counts))
                    for part in zip(
                        *(rows.split(EDITOR_BATCH_SIZE) for rows in (entry.keys, entry.value_gradients, owners)),
                        strict=True,
                    ):
                        left, differences = editor(*part[:2], name)
                        collectors[name].add(left, differences, part[2])
                bar.update(len(chosen))
    for name, collector in collectors.items():
        collector.add(*editor.no_rows(name), torch.zeros(0, dtype=torch.int64))  # as a process may have none
        collector.pool()
    return n_facts, {name: collector.collected() for name, collector in collectors.items()}


def _add(aggregator: RowSum | RidgeLeastSquares, rows: Rows | Products, device: torch.device) -> None:
    if isinstance(rows, Rows):
        aggregator.add(rows.left.to(device), rows.differences.to(device))
    else:
        gram = None if rows.gram is None else rows.gram.to(solve_device(device))
        aggregator.add_products(gram, rows.moment.to(solve_device(device)), rows.n_rows)


def _turns(facts: Iterable[Fact], size: int) -> Iterator[list[Fact]]:
    remaining = iter(facts)
    while turn := list(islice(remaining, size)):
        yield turn
