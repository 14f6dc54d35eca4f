"""Editing for life: turns, repeated calls and restarts; what is in force; what follows the edits."""

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import hf_malmen.live
from hf_malmen import (
    Edit,
    EditorConfig,
    EditorModel,
    EditStateError,
    Fact,
    FactError,
    FactStream,
    ModelMismatchError,
    facts_in_force,
    live_edits,
    read_history,
    stored_weights,
    undo_edit,
)
from hf_malmen.in_force import edits_in_force, logger
from hf_malmen.sequential import standing_of
from hf_malmen.state import STATE_FILE, EditState, Products, Rows
from hf_malmen.targets import weight_of
from hf_malmen.tracing import frozen

Build = Callable[..., Any]


@pytest.fixture(params=["malmen", "mend"])
def editor(request: pytest.FixtureRequest, model: PreTrainedModel, make_editor: Build) -> EditorModel:
    """One whose rows are solved for, with preserved keys; and one whose rows are added up."""
    if request.param == "mend":
        edit: EditorModel = make_editor(model, method="mend")
        return edit
    return make_editor(model, n_preserved_keys=5)  # type: ignore[no-any-return]


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """`model`, saved."""
    model.save_pretrained(tmp_path / "base", max_shard_size="90KB")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def weights(model: PreTrainedModel, editor: EditorModel) -> dict[str, Tensor]:
    return {name: weight_of(model, name).detach().clone() for name in editor.module_names}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor], limit: float) -> None:
    """The shifts from `base` differ by no more than this, relative to their norm."""
    for name, weight in wanted.items():
        shift = (weight.double() - base[name].double()).norm()
        assert shift > 0
        assert (found[name].double() - weight.double()).norm() <= limit * shift, name


def dense_answer(
    editor: EditorModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> dict[str, Tensor]:
    """W + S with S by `torch.linalg.lstsq` in float64, or the plain sum, from the rows of each fact by itself."""
    tokenize = editor.tokenizer_for(model, tokenizer)
    found = {}
    with frozen(model), torch.no_grad():
        traces = [next(editor.trace(model, [tokenize.pad([tokenize(fact.prompt, fact.target)])])) for fact in facts]
        for name in editor.module_names:
            rows = [editor(traced[name].keys, traced[name].value_gradients, name) for traced in traces]
            left, right = (torch.cat(parts).double() for parts in zip(*rows, strict=True))
            shift = left.T @ right
            if editor.config.aggregation == "least_squares":
                network, index = editor.network(name)
                still = network.preserved_rows(index) if network.n_preserved_keys else left[:0]
                ridge = editor.ridge(name) ** 0.5 * torch.eye(left.shape[1], dtype=torch.float64)
                zeros = right.new_zeros(len(still) + len(ridge), right.shape[1])
                shift = torch.linalg.lstsq(torch.cat((left, still, ridge)), torch.cat((right, zeros))).solution
            weight = weight_of(model, name)
            flipped = name in (editor.config.fan_in_fan_out or ())
            found[name] = weight.double() + (shift if flipped else shift.T)
    return found


# Accumulated turns


def test_any_split_gives_one_shot(
    model: PreTrainedModel,
    folder: Path,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Build,
    tmp_path: Path,
) -> None:
    """One call in turns, repeated calls, and a restart in between, live and on disk: the least squares over all."""
    facts = make_long_facts(12)
    base = weights(model, editor)
    wanted = dense_answer(editor, model, tokenizer, facts)

    edit = editor.apply(model, facts, tokenizer, facts_per_turn=5, accumulate=True)
    assert_near(weights(model, editor), wanted, base, 1e-5)
    edit.undo()

    edits = [editor.apply(model, facts[i : i + 4], tokenizer, accumulate=True) for i in (0, 4, 8)]
    assert_near(weights(model, editor), wanted, base, 1e-5)
    for edit in edits:
        edit.undo()
    assert all(torch.equal(weight, base[name]) for name, weight in weights(model, editor).items())

    editor.save_pretrained(tmp_path / "editor")
    editor.apply(folder, facts[:4], output_dir=tmp_path / "edited", accumulate=True, batch_size=3)
    again = EditorModel.from_pretrained(tmp_path / "editor")
    again.apply(tmp_path / "edited", facts[4:8], in_place=True, accumulate=True)
    reloaded = load(tmp_path / "edited")
    edit = again.apply(reloaded, facts[8:], accumulate=True)
    assert_near(weights(reloaded, editor), wanted, base, 1e-5)
    edit.write(tmp_path / "edited", in_place=True)
    on_disk = weights(load(tmp_path / "edited"), editor)
    assert all(torch.equal(on_disk[name], weight) for name, weight in weights(reloaded, editor).items())


def test_in_half_precision_roundings_do_not_add_up(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """The bfloat16 weights after five calls are those after one, all but where a sum lies between two of them."""
    model, facts = make_llama(torch.bfloat16), make_facts(10)
    editor = make_editor(model, edit_lr=1e-2).float()
    one_shot = editor.apply(model, facts, tokenizer, accumulate=True)
    wanted = weights(model, editor)
    one_shot.undo()
    for i in range(0, 10, 2):
        editor.apply(model, facts[i : i + 2], tokenizer, accumulate=True)
    found = weights(model, editor)
    for name, weight in wanted.items():
        assert (found[name] == weight).float().mean() > 0.95


@pytest.mark.parametrize("n_facts", [8, 130])
def test_a_fact_edited_again_is_replaced(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build, n_facts: int
) -> None:
    """The solve is that over the facts in force, whether its edit kept rows or, of many facts, what they come to."""
    model, facts = make_llama(), make_facts(n_facts)
    editor = make_editor(model)
    base = weights(model, editor)
    changed = [replace(facts[2], prompt=f"{facts[2].prompt} ", target="Peru"), replace(facts[5], target="Chile")]
    wanted = dense_answer(editor, model, tokenizer, [fact for i, fact in enumerate(facts) if i not in (2, 5)] + changed)
    first = editor.apply(model, facts, tokenizer, accumulate=True)
    kinds = {type(rows) for rows in first.state.rows.values()}
    assert kinds == {Rows if n_facts == 8 else Products}
    second = editor.apply(model, [*changed, facts[0]], tokenizer, accumulate=True)
    assert (second.n_facts, second.n_skipped) == (2, 1)
    assert_near(weights(model, editor), wanted, base, 1e-5)
    ledger = facts_in_force(model)
    assert ledger.n_in_force == n_facts
    assert [(entry.index, entry.edit, entry.replaced_by) for entry in ledger.replaced] == [
        (2, "live 1", "live 2"),
        (5, "live 1", "live 2"),
    ]
    # Back to what it was: the rows of the first edit are no longer those in force, and its own are.
    editor.apply(model, [facts[2]], tokenizer, accumulate=True)
    unedited_model = make_llama()
    wanted = dense_answer(editor, unedited_model, tokenizer, [*facts[:5], *facts[6:], changed[1]])
    assert_near(weights(model, editor), wanted, base, 1e-5)


def test_after_an_earlier_edit_is_undone_the_next_turn_is_right(
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is solved for are the edits in force, whatever was; until then a warning says that it was not solved for."""
    model, facts = make_llama(), make_facts(12)
    editor = make_editor(model)
    base = weights(model, editor)
    wanted = dense_answer(editor, model, tokenizer, facts[4:])
    first = editor.apply(model, facts[:4], tokenizer, accumulate=True)
    editor.apply(model, facts[4:8], tokenizer, accumulate=True)
    first.undo()
    assert caplog.text.count("Later edits were solved together with the facts of this one") == 1
    editor.apply(model, facts[8:], tokenizer, accumulate=True)
    assert_near(weights(model, editor), wanted, base, 1e-5)
    edits_in_force(model)[-1].source.undo()
    assert "Later edits" not in caplog.text.partition("this one")[2], "the last one leaves what was before it"


def test_accumulation_is_refused_where_it_cannot_be(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """On top of an edit without rows, or of another editor's; and where the turn changes the value differences."""
    model, facts = make_llama(), make_facts(6)
    editor, other = make_editor(model), make_editor(model, seed=1)
    for maker, accumulate, how in ((editor, False, "without accumulate=True"), (other, True, "by another editor")):
        edit = maker.apply(model, facts[:3], tokenizer, accumulate=accumulate)
        with pytest.raises(EditStateError, match=f"edit live 1 was made {how}"):
            editor.apply(model, facts[3:], tokenizer, accumulate=True)
        edit.undo()
    for setting in ({"edit_lr": 5e-4}, {"ridge": 10.0}, {"prompt_template": "Q: {prompt}"}):
        first, changed = (
            EditorModel.from_base(model, EditorConfig(**{"method": "ultraedit", "statistics": "frozen", **settings}))
            for settings in ({}, setting)
        )
        for one in (first, changed):
            one.warm_up(model, facts, tokenizer)
        edit = first.apply(model, facts[:3], tokenizer, accumulate=True)
        with pytest.raises(EditStateError, match="edit live 1 was made by another editor"):
            changed.apply(model, facts[3:], tokenizer, accumulate=True)
        edit.undo()
    following = EditorModel.from_base(model, EditorConfig(method="ultraedit"))
    with pytest.raises(ValueError, match=r"'ultraedit', whose statistics follow the edits.*statistics='frozen'"):
        following.apply(model, facts, tokenizer, accumulate=True)
    editor.apply(model, facts, tokenizer, accumulate=True, max_memory="1MiB").undo()
    with pytest.raises(ValueError, match=r"The least squares of .* takes .* GiB, and max_memory is"):
        editor.apply(model, facts, tokenizer, accumulate=True, max_memory=1000)
    assert edits_in_force(model) == []


def test_an_error_while_the_edits_are_lifted_puts_them_back(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """To the bit."""
    editor.apply(model, facts[:4], tokenizer, accumulate=True)
    before = weights(model, editor)
    long = Fact(prompt="Lyon " * 80, target="France")
    with pytest.raises(FactError, match="the model reads at most 64"):
        editor.apply(model, [*facts[4:], long], tokenizer, accumulate=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model, editor).items())
    assert facts_in_force(model).n_in_force == 4


# Turn by turn


def test_statistics_of_other_layers_are_left_alone(
    make_llama: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Two editors of layers of one shape: each goes on from its own statistics, and the second as if it were alone."""
    model, facts = make_llama(), make_facts(8)
    first, second, elsewhere = (
        EditorModel.from_base(model, EditorConfig(method="ultraedit", edit_lr=1e-3, **settings))
        for settings in (
            {"layers_to_transform": [1]},
            {"layers_to_transform": [2]},
            {"layers_to_transform": [1], "token_selection": "all"},
        )
    )
    one = first.apply(model, facts[:4], tokenizer)
    for other in (second, elsewhere):
        assert standing_of(model, other).statistics == {}
    second.apply(model, facts[4:], tokenizer)
    found = standing_of(model, first).statistics
    assert found.keys() == one.state.statistics.keys() and found
    assert all(torch.equal(found[name], tensor) for name, tensor in one.state.statistics.items())


@pytest.mark.parametrize("method", ["ultraedit", "memit"])
def test_editor_learns_from_the_base_model_below_its_edits(
    method: str, make_llama: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Statistics and covariance are those of the unedited model, and the edited one is as it was, to the bit."""
    model = make_llama()
    settings = {"ultraedit": {"edit_lr": 1.0}, "memit": {"n_steps": 2}}[method]
    one, two = (
        EditorModel.from_base(model, EditorConfig(method=method, layers_to_transform=[1, 2], **settings))
        for _ in range(2)
    )

    def learn(editor: EditorModel) -> None:
        if method == "memit":
            editor.collect_covariance(model, [fact.prompt for fact in facts], tokenizer)
        else:
            editor.warm_up(model, facts, tokenizer)

    learn(one)
    one.apply(model, facts[:4], tokenizer)
    before = weights(model, one)
    learn(two)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model, one).items())
    for (name, expected), found in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("statistics", "n_later", "expected"), [("following", 1, 1), ("following", 0, 0), ("frozen", 1, 0)]
)
def test_undo_says_whose_rows_stay_in_the_statistics(
    statistics: str,
    n_later: int,
    expected: int,
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of an edit below later ones, of a live model and on disk."""
    editor = EditorModel.from_base(model, EditorConfig(method="ultraedit", edit_lr=1e-3, statistics=statistics))
    editor.warm_up(model, facts, tokenizer)
    parts = [facts[:2], facts[2:4]][: 1 + n_later]
    first, *_ = [editor.apply(model, part, tokenizer) for part in parts]
    first.undo()
    assert caplog.text.count("running statistics that had taken in the facts of this one") == expected
    for part in parts:
        editor.apply(folder, part, in_place=True)
    assert undo_edit(folder, "1").in_statistics is bool(expected)


def test_more_turns_read_the_weights_no_more_often(
    folder: Path, tokenizer: PreTrainedTokenizerFast, make_facts: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model from an edited checkpoint, whose weights are compared with those on disk: hashing takes its time."""
    facts = make_facts(12)
    editor = EditorModel.from_base(load(folder), EditorConfig(method="ultraedit", edit_lr=1e-3))
    editor.apply(folder, facts[:4], in_place=True)
    counts = []
    for facts_per_turn in (8, 2):
        live = load(folder)
        on_model, on_disk = Mock(wraps=hf_malmen.live.fingerprint), Mock(wraps=stored_weights.stored_fingerprint)
        with monkeypatch.context() as patch:
            patch.setattr(hf_malmen.live, "fingerprint", on_model)
            patch.setattr(stored_weights, "stored_fingerprint", on_disk)
            assert editor.apply(live, facts, tokenizer, facts_per_turn=facts_per_turn).n_facts == 8
        counts.append((on_model.call_count, on_disk.call_count))
    assert counts[0] == counts[1] and min(counts[0]) > 0


@pytest.mark.parametrize("method", ["malmen", "memit"])
def test_what_the_last_turn_is_refused_for_is_found_before_the_first(
    method: str, make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """The model does not run."""
    model, facts = make_llama(), make_facts(6)
    editor = make_editor(model)
    bad = Fact(prompt="Lyon " * 80, target="France")
    if method == "memit":
        facts = [replace(fact, subject=fact.prompt.split()[-1]) for fact in facts]
        editor = EditorModel.from_base(model, EditorConfig(method="memit"))
        editor.collect_covariance(model, ["Lyon is a city in France."], tokenizer)
        bad = replace(facts[0], prompt="Another question", subject="Nowhere")
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(FactError):
        editor.apply(model, [*facts, bad], tokenizer, facts_per_turn=2)
    assert not calls


def test_a_bad_line_of_a_stream_is_found_before_the_model_runs(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The last line of a file."""
    model = make_llama()
    editor = make_editor(model)
    lines = [f'{{"prompt": "The country of Lyon {number} is", "target": "France"}}' for number in range(3)]
    (tmp_path / "facts.jsonl").write_text("\n".join([*lines, '{"prompt": "", "target": "x"}']), encoding="utf-8")
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for options in ({}, {"accumulate": True}, {"facts_per_turn": 1}):
        with pytest.raises(FactError, match="Fact 3 has an empty prompt"):
            editor.apply(model, FactStream(tmp_path / "facts.jsonl"), tokenizer, **options)
    assert not calls


@pytest.mark.parametrize("method", ["malmen", "ultraedit", "stableedit"])
def test_turns_go_on_after_a_restart(
    method: str,
    model: PreTrainedModel,
    folder: Path,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
) -> None:
    """Four turns are two turns, a restart, and two more; live, on disk, and the statistics that follow too."""
    facts = make_facts(12)
    untrained = {"rank": None, "edit_lr": 1e-1, "seed": None}
    editor = make_editor(model) if method == "malmen" else make_editor(model, method=method, **untrained)
    base = weights(model, editor)
    whole = editor.apply(model, facts, tokenizer, facts_per_turn=3)
    wanted = weights(model, editor)
    whole.undo()

    editor.apply(model, facts[:6], tokenizer, facts_per_turn=3)
    live = editor.apply(model, facts[6:], tokenizer, facts_per_turn=3)
    assert_near(weights(model, editor), wanted, base, 1e-4)

    editor.save_pretrained(tmp_path / "editor")
    editor.apply(folder, facts[:6], output_dir=tmp_path / "edited", facts_per_turn=3)
    again = EditorModel.from_pretrained(tmp_path / "editor")
    reloaded = load(tmp_path / "edited")
    edit = again.apply(reloaded, facts[6:], facts_per_turn=3)
    found = weights(reloaded, editor)
    assert all(torch.equal(weight, found[name]) for name, weight in weights(model, editor).items())
    again.apply(tmp_path / "edited", facts[6:], in_place=True, facts_per_turn=3)
    on_disk = weights(load(tmp_path / "edited"), editor)
    assert all(torch.equal(weight, on_disk[name]) for name, weight in found.items())
    assert bool(edit.statistics) == (method != "malmen")
    for name, tensor in whole.statistics.items():
        torch.testing.assert_close(edit.statistics[name], tensor, rtol=1e-4, atol=1e-6)
        assert torch.equal(edit.statistics[name], live.statistics[name])
        saved = Edit.from_pretrained(tmp_path / "edited" / "edits" / "0002").statistics
        assert torch.equal(saved[name], live.statistics[name])


# What is in force


def test_the_same_fact_twice_changes_nothing_more(
    model: PreTrainedModel,
    folder: Path,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """In later calls, live and on disk, and within one; what is left over is written."""
    wanted = editor.apply(model, facts[:4], tokenizer)
    before = weights(model, editor)
    again = editor.apply(model, facts[:4], tokenizer)
    assert (again.n_facts, again.n_skipped, dict(again.layers), again.in_force) == (0, 4, {}, False)
    with editor.applied(model, facts[:4], tokenizer=tokenizer) as nothing:
        assert not nothing.layers
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model, editor).items())
    more = editor.apply(model, facts[:6], tokenizer)
    assert (more.facts, more.n_skipped) == (facts[4:6], 4)
    more.undo()
    wanted.undo()
    twice = editor.apply(model, [*facts[:4], facts[1]], tokenizer)
    assert (twice.n_facts, twice.n_skipped) == (4, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model, editor).items())

    editor.apply(folder, facts[:4], in_place=True)
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert editor.apply(folder, facts[:4], in_place=True).n_facts == 0
    editor.apply(folder, facts[:4], output_dir=tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == written
        assert [record.id for record in read_history(place)] == ["0001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_facts_left_are_solved_for_without_a_new_one(
    dtype: torch.dtype,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
) -> None:
    """Live and on disk, where an edit below later ones was undone; and nothing is written where none was."""
    model, facts = make_llama(dtype), make_facts(12)
    editor = make_editor(model)
    limit = 1e-5 if dtype == torch.float32 else 0.1  # rows of other batches are rounded in other ways
    base = weights(model, editor)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with editor.applied(make_llama(dtype), facts[4:], tokenizer, accumulate=True) as edit:
        assert edit.state.solved_with == 0
    one_shot = make_llama(dtype)
    edit.apply_to(one_shot)
    wanted = weights(one_shot, editor)

    first, *_ = [editor.apply(model, facts[i : i + 4], tokenizer, accumulate=True) for i in (0, 4, 8)]
    nothing = editor.apply(model, facts, tokenizer, accumulate=True)
    assert (nothing.layers, nothing.apply_to(model).in_force) == ({}, False)  # later ones do not stand upon it
    first.undo()
    again = editor.apply(model, facts[4:], tokenizer, accumulate=True)
    assert (again.n_facts, again.n_skipped, again.in_force) == (0, 8, True)
    assert_near(weights(model, editor), wanted, base, limit)
    assert editor.apply(model, facts[4:], tokenizer, accumulate=True).layers == {}
    assert facts_in_force(model).n_in_force == 8
    again.undo()

    for i in (0, 4, 8):
        editor.apply(tmp_path / "model", facts[i : i + 4], in_place=True, accumulate=True)
    undo_edit(tmp_path / "model", 1)
    for _ in range(2):
        editor.apply(tmp_path / "model", facts[4:], in_place=True, accumulate=True)
    assert [record.summary.n_facts for record in read_history(tmp_path / "model")] == [4, 4, 0]
    assert_near(weights(load(tmp_path / "model"), editor), wanted, base, limit)


def test_an_accumulated_edit_without_those_before_it(
    model: PreTrainedModel,
    folder: Path,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning says that its shift was solved together with them, where they are not in force."""
    editor, told = make_editor(model), "solved together with 3 facts of earlier edits"
    first, second = (editor.apply(model, part, tokenizer, accumulate=True) for part in (facts[:3], facts[3:]))
    second.undo()
    second = Edit.from_pretrained(second.save_pretrained(tmp_path / "second"))
    with second.applied_to(model):
        pass
    first.write(folder, tmp_path / "both")
    second.write(tmp_path / "both", in_place=True)
    first.undo()
    with first.merge(second).applied_to(model):
        pass
    assert told not in caplog.text
    with second.applied_to(model):
        assert caplog.text.count(told) == 1
    second.write(folder, tmp_path / "alone")
    assert caplog.text.count(told) == 2


def test_a_copy_of_a_model_with_edits(
    model: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its weights are not the unedited ones, and nothing says what they were: nothing is accumulated on them."""
    editor = make_editor(model, fingerprint_policy="ignore")
    edits = [editor.apply(model, facts[i : i + 2], tokenizer, accumulate=True) for i in (0, 2)]
    copied = copy.deepcopy(model)
    with pytest.raises(EditStateError, match=r"copy of one with edits in force, 2 of which .* again with from_pr"):
        editor.apply(copied, facts[:4], tokenizer, accumulate=True)
    type(logger).warning_once.cache_clear()
    editor.apply(copied, facts[4:6], tokenizer)  # turn by turn each turn reads the weights as they are
    assert "2 of which" in caplog.text
    assert facts_in_force(copied).n_in_force == 2
    assert facts_in_force(model).n_in_force == 4
    for edit in edits:
        edit.undo()
    editor.apply(copy.deepcopy(model), facts[:4], tokenizer, accumulate=True)


def test_where_all_facts_are_in_force_already(
    model: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The edit that comes back changes nothing, and says so where it is asked for more."""
    editor = make_editor(model)
    first = editor.apply(model, facts[:4], tokenizer, accumulate=True)
    assert "skipped" not in caplog.text
    caplog.set_level("INFO", logger="hf_malmen")
    nothing = editor.apply(model, facts[:4], tokenizer, accumulate=True)
    assert "4 of 4 facts are in force already, or come twice, and were skipped" in caplog.text
    assert caplog.text.count("come twice") == 1
    for what, act in {
        "undo": nothing.undo,
        "save": lambda: nothing.save_pretrained(tmp_path / "edit"),
        "export": lambda: nothing.to_lora(tmp_path / "lora"),
    }.items():
        with pytest.raises(EditStateError, match=rf"no shifts, so there is nothing to {what}.*live_edits\(model\)"):
            act()
    assert not (tmp_path / "edit").exists() and not (tmp_path / "lora").exists()
    edited = weights(model, editor)
    with nothing.applied_to(model, on_fingerprint_mismatch="error"):  # its layers are none, and have no weights
        assert all(torch.equal(weight, edited[name]) for name, weight in weights(model, editor).items())
    for merged in (first.merge(nothing), nothing.merge(first)):
        assert (merged.facts, merged.state.rows.keys()) == (first.facts, first.state.rows.keys())
        assert merged.state.editor == first.state.editor
    (handle,) = live_edits(model)
    assert handle is first
    handle.undo()
    assert facts_in_force(model).entries == []


@pytest.mark.parametrize(
    ("accumulate", "edit_id", "expected"), [(True, "1", True), (True, "2", False), (False, "1", False)]
)
def test_undo_on_disk_says_what_was_solved_together(
    accumulate: bool,
    edit_id: str,
    expected: bool,
    model: PreTrainedModel,
    folder: Path,
    make_editor: Build,
    facts: list[Fact],
) -> None:
    """An earlier accumulated edit, under a later one."""
    editor = make_editor(model)
    for part in (facts[:4], facts[4:]):
        editor.apply(folder, part, in_place=True, accumulate=accumulate)
    assert undo_edit(folder, edit_id).solved_together is expected


def test_the_ledger_follows_undo(
    model: PreTrainedModel, folder: Path, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """After it, facts, replacements and the state are those before; on disk the card says how many are in force."""
    editor = make_editor(model)
    changed = [replace(fact, target="Peru") for fact in facts[1:3]]
    editor.apply(model, facts[:4], tokenizer, accumulate=True)
    ledger = facts_in_force(model)
    second = editor.apply(model, changed, tokenizer, accumulate=True)
    assert [entry.fact for entry in facts_in_force(model).in_force] == [facts[0], facts[3], *changed]
    second.undo()
    assert facts_in_force(model) == ledger
    assert [edit.state.rows.keys() for edit in edits_in_force(model)] == [set(editor.module_names)]

    for batch in (facts[:4], changed, [facts[1]]):
        editor.apply(folder, batch, in_place=True)
    ledger = facts_in_force(folder)
    assert [(entry.edit, entry.replaced_by) for entry in ledger.entries] == [
        ("0001", None),
        ("0001", "0002"),
        ("0001", "0002"),
        ("0001", None),
        ("0002", "0003"),
        ("0002", None),
        ("0003", None),
    ]
    assert "7 facts" in (folder / "README.md").read_text() and "4 are in force" in (folder / "README.md").read_text()
    assert facts_in_force(load(folder)) == ledger
    undo_edit(folder, "2")
    ledger = facts_in_force(folder)
    assert [entry.fact for entry in ledger.in_force] == [facts[0], facts[2], facts[3], facts[1]]
    assert [record.summary.n_replaced for record in read_history(folder)] == [0, 1]
    assert "4 are in force" in (folder / "README.md").read_text()
    undo_edit(folder)
    assert "in force" not in (folder / "README.md").read_text()
    assert [entry.fact for entry in facts_in_force(folder).in_force] == facts[:4]


def test_a_model_that_is_not_what_its_folder_holds(
    model: PreTrainedModel, folder: Path, make_editor: Build, facts: list[Fact]
) -> None:
    """Edits that came to the folder after the model was loaded from it are not in force on the model."""
    live = load(folder)
    for parameter in live.parameters():  # which may be mapped from the file that is about to be written
        parameter.data = parameter.data.clone()
    editor = make_editor(model)
    editor.apply(folder, facts[:4], in_place=True)
    assert facts_in_force(live).entries == []
    assert facts_in_force(load(folder)).n_in_force == 4


def load_apart(folder: Path, **options: Any) -> PreTrainedModel:
    """With weights that are not mapped from the files, which are about to be written."""
    live = AutoModelForCausalLM.from_pretrained(folder, **options)
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    return live


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_live_edit_written_into_the_models_own_folder(
    accumulate: bool, folder: Path, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """The earlier edits of the folder stay in force on the model, and what comes next goes on from all."""
    base, facts = load_apart(folder), make_facts(12)
    editor = make_editor(base)
    editor.apply(folder, facts[:4], in_place=True, accumulate=accumulate)
    live = load_apart(folder)
    second = editor.apply(live, facts[4:8], tokenizer, accumulate=accumulate)
    second.write(folder, in_place=True)
    assert [edit.id for edit in edits_in_force(live)] == ["0001", "live 1"]
    assert facts_in_force(live).n_in_force == 8
    third = editor.apply(live, [facts[0], *facts[8:]], tokenizer, accumulate=accumulate)
    assert (third.n_skipped, third.n_facts) == (1, 4)
    if accumulate:
        wanted = dense_answer(editor, base, tokenizer, facts)
        assert_near(weights(live, editor), wanted, weights(base, editor), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # made for weights that the folder once had: those before the second edit
        third.write(folder, in_place=True)
    assert facts_in_force(load(folder)).n_in_force == 12


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_float16(
    stored: torch.dtype,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
) -> None:
    """Loading rounds the weights; their edits are found, and an edit made in float16 goes into the file it is of."""
    facts, base = make_facts(8), make_llama().to(stored)
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0] = 1 + 2.0**-8 + 2.0**-12  # which float16 rounds to a tie
        base.model.layers[2].mlp.down_proj.weight[0] = 3e-8  # less than half of what it has left down there
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = make_editor(base)
    editor.apply(tmp_path / "base", facts[:4], in_place=True)
    live = load_apart(tmp_path / "base", dtype=torch.float16)
    assert facts_in_force(live).n_in_force == 4
    assert editor.apply(live, facts[:4], tokenizer).n_skipped == 4
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace(f'"{str(stored).partition(".")[2]}"', '"float16"'))
    assert load(tmp_path / "base").dtype == torch.float16
    editor.apply(tmp_path / "base", facts[4:], in_place=True)
    assert [record.summary.n_facts for record in read_history(tmp_path / "base")] == [4, 4]
    editor.config.fingerprint_policy = "error"  # the editor is for these weights, before edits and rounding
    editor.check_base(load_apart(tmp_path / "base"))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("n_before", [0, 2], ids=["base", "edited"])
def test_an_edit_made_on_a_model_in_float16(
    n_before: int,
    accumulate: bool,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
) -> None:
    """It is for the checkpoint in float32, and for models loaded from that in any dtype, as one made on disk is."""
    facts, base, folder = make_facts(8), make_llama(), tmp_path / "base"
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0] = 1 + 2.0**-8 + 2.0**-12  # which float16 rounds to a tie
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    editor = make_editor(base)
    if n_before:
        editor.apply(folder, facts[:n_before], in_place=True, accumulate=accumulate)
    on_disk = editor.apply(folder, facts[2:4], output_dir=tmp_path / "other", accumulate=accumulate)
    half = load_apart(folder, dtype=torch.float16)
    made = editor.apply(half, facts[4:6], tokenizer, accumulate=accumulate)
    nothing = editor.apply(half, facts[4:6], tokenizer)
    assert made.base_model_fingerprint == on_disk.base_model_fingerprint == nothing.base_model_fingerprint
    made.undo()
    assert EditorModel.from_base(half).config.base_model_fingerprint == made.base_model_fingerprint
    made.write(folder, tmp_path / "edited", on_fingerprint_mismatch="error")
    assert made.merge(on_disk).n_facts == 4
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        again = load_apart(folder, dtype=dtype)
        for edit in (made, on_disk):
            edit.apply_to(again, on_fingerprint_mismatch="error")  # the second one on top of the first
        for edit in (made, on_disk):
            edit.undo()
    with torch.no_grad():
        again.model.layers[1].mlp.down_proj.weight[1] += 1
    with pytest.raises(ModelMismatchError, match="target weights differ"):
        made.apply_to(again.half(), on_fingerprint_mismatch="error")


@pytest.mark.parametrize("pickled", ["loaded", "named"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an edited file"])
def test_in_float16_from_a_folder_of_bin_files(
    beside: bool,
    pickled: str,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
) -> None:
    """Edits are never written into these: the model is edited as one without a name."""
    base, facts, folder = make_llama(torch.float16), make_facts(6), tmp_path / "base"
    base.config.save_pretrained(folder)
    torch.save(base.state_dict(), folder / "pytorch_model.bin")
    live = make_llama(torch.float16)
    if pickled == "loaded":
        base, live = (load_apart(folder, dtype=torch.float16) for _ in range(2))
    base.name_or_path, live.name_or_path = "", str(folder)
    editor = make_editor(base).float()
    if beside:
        save_file(base.state_dict(), folder / "ema.safetensors")
        editor.make_edit(base, facts, tokenizer).write(folder / "ema.safetensors", in_place=True)
    for accumulate in (True, False):
        assert facts_in_force(live).entries == []
        with (
            editor.applied(base, facts, tokenizer=tokenizer, accumulate=accumulate),
            editor.applied(live, facts, tokenizer=tokenizer, accumulate=accumulate) as edit,
        ):
            assert edit.n_facts == 6
            wanted = weights(base, editor)
            assert all(torch.equal(weight, wanted[name]) for name, weight in weights(live, editor).items())


@pytest.mark.parametrize("where", ["absolute", "relative", "with a configuration from the Hub"])
def test_a_model_whose_folder_is_gone(
    where: str,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Removed, or looked for from elsewhere: whether it had edits cannot be told. Else it is one without a name."""
    facts, base, folder = make_facts(6), make_llama(), tmp_path / "runs" / "first" / "base"
    base.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    live = load_apart(Path("runs/first/base") if where == "relative" else folder)
    if where == "with a configuration from the Hub":
        live.config._commit_hash = "0123456789" * 4
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if where != "relative":
        shutil.rmtree(folder)
    editor = make_editor(base)
    assert facts_in_force(live).entries == []
    assert "base, which this model was loaded from, is not there" in caplog.text
    for accumulate in (False, True):
        if accumulate:
            with pytest.raises(EditStateError, match=r"may have edits in force\. .*set model\.name_or_path"):
                editor.apply(live, facts, tokenizer, accumulate=True)
            live.name_or_path = ""
        edit = editor.apply(base, facts, tokenizer, accumulate=accumulate)
        wanted = weights(base, editor)
        edit.undo()
        edits = [editor.apply(live, part, tokenizer, accumulate=accumulate) for part in (facts, facts[:2])]
        assert [edit.n_facts for edit in edits] == [6, 0]
        assert all(torch.equal(weight, wanted[name]) for name, weight in weights(live, editor).items())
        edits[0].undo()


def test_a_lone_file_beside_the_models_own(
    model: PreTrainedModel, folder: Path, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Its edits are not in force on the model; those of the model's own files are, whichever came first."""
    editor, facts = make_editor(model), make_facts(12)
    base, wanted = weights(model, editor), dense_answer(editor, model, tokenizer, facts)
    ema = folder / "ema.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, ema)
    editor.make_edit(model, facts[2:6], tokenizer).write(ema, in_place=True)
    live = load_apart(folder)
    assert facts_in_force(live).entries == []
    assert [editor.apply(live, part, tokenizer, accumulate=True).n_skipped for part in (facts[:4], facts[4:])] == [0, 0]
    assert_near(weights(live, editor), wanted, base, 1e-5)

    editor.apply(folder, facts[:4], in_place=True, accumulate=True)
    editor.make_edit(model, facts[6:], tokenizer).write(ema, in_place=True)
    live = load_apart(folder)
    assert [edit.id for edit in edits_in_force(live, strict=True)] == ["0002"]
    editor.apply(live, facts[4:], tokenizer, accumulate=True)
    assert_near(weights(live, editor), wanted, base, 1e-5)
    editor.apply(folder, facts[4:], in_place=True, accumulate=True)
    assert_near(weights(load(folder), editor), wanted, base, 1e-5)


def test_a_model_with_compiled_blocks(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build, tmp_path: Path
) -> None:
    """Its modules have other names, and the edits of its folder are in force on it."""
    facts, base = make_facts(8), make_llama()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = make_editor(base)
    editor.apply(tmp_path / "base", facts[:4], in_place=True, accumulate=True)
    live = load_apart(tmp_path / "base")
    for index, block in enumerate(live.model.layers):
        live.model.layers[index] = torch.compile(block, backend="eager")
    assert [edit.id for edit in edits_in_force(live, strict=True)] == ["0001"]
    edit = editor.apply(live, facts, tokenizer, accumulate=True)
    assert (edit.n_facts, edit.n_skipped) == (4, 4)
    wanted = dense_answer(editor, base, tokenizer, facts)
    assert_near(weights(live, editor), wanted, weights(base, editor), 1e-5)


def test_a_model_that_was_changed_by_other_means(
    model: PreTrainedModel,
    folder: Path,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody knows what to solve for, so accumulate=True is refused; without it the folder's edits do not count."""
    editor = make_editor(model)
    editor.config.fingerprint_policy = "ignore"
    editor.apply(folder, facts[:4], in_place=True, accumulate=True)
    live = load_apart(folder)
    with torch.no_grad():
        weight_of(live, editor.module_names[0])[0, 0] += 1
    before = weights(live, editor)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(EditStateError, match=r"edits in force that the model does not hold.*Load the model again"):
        editor.apply(live, facts[4:], tokenizer, accumulate=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(live, editor).items())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert "do not count" not in caplog.text
    edit = editor.apply(live, facts, tokenizer)
    assert (edit.n_facts, edit.n_skipped) == (8, 0)
    assert caplog.text.count("Until then they do not count") == 1


def test_a_model_without_a_name(tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not loaded from the folder that the program happens to run in."""
    (tmp_path / "edits" / "0001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert edits_in_force(model) == []


def test_streamed_facts(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Those that replace a fact are remembered, and the others counted; accumulated, the solve is that of a list."""
    facts = make_facts(12)
    base = weights(model, editor)
    changed = replace(facts[3], target="Peru")
    wanted = dense_answer(editor, model, tokenizer, [*facts[:3], *facts[4:], changed])
    editor.apply(model, facts[:4], tokenizer, accumulate=True)
    stream = FactStream([*facts[4:], facts[0], changed])
    edit = editor.apply(model, stream, tokenizer, accumulate=True)
    assert (edit.n_facts, edit.n_skipped) == (9, 1)
    assert_near(weights(model, editor), wanted, base, 1e-5)
    ledger = facts_in_force(model)
    assert [entry.fact for entry in ledger.replaced] == [facts[3]]
    assert (ledger.n_in_force, ledger.n_unlisted) == (12, 9 - len(edit.facts))
    edit.undo()
    turn = editor.apply(model, FactStream([*facts[4:], changed]), tokenizer, facts_per_turn=4)
    assert turn.facts[-1] == changed
    assert [entry.fact for entry in facts_in_force(model).replaced] == [facts[3]]


def test_merged_edits(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """The later fact is in force, and the rows go on being those of all: the next turn finds the same solve."""
    base = weights(model, editor)
    changed = replace(facts[1], target="Peru")
    wanted = dense_answer(editor, model, tokenizer, [facts[0], *facts[2:], changed])
    first = editor.apply(model, facts[:4], tokenizer, accumulate=True)
    second = editor.apply(model, [changed], tokenizer, accumulate=True)
    second.undo()
    first.undo()
    merged = first.merge(second).apply_to(model)
    ledger = facts_in_force(model)
    assert [entry.fact for entry in ledger.in_force] == [facts[0], facts[2], facts[3], changed]
    editor.apply(model, facts[4:], tokenizer, accumulate=True)
    assert_near(weights(model, editor), wanted, base, 1e-5)
    assert merged.merge(editor.make_edit(model, facts, tokenizer)).state.rows == {}, "a turn has no rows to go on from"


# State files


def test_state_files(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """Come back to the bit; there is none where nothing follows the edits; damaged and newer ones are refused."""
    with editor.applied(model, facts, tokenizer=tokenizer, accumulate=True) as edit:
        edit.save_pretrained(tmp_path)
    loaded = Edit.from_pretrained(tmp_path).state
    assert loaded.editor == edit.state.editor
    for name, rows in edit.state.rows.items():
        found = loaded.rows[name]
        assert type(found) is type(rows)
        for role, value in vars(rows).items():
            kept = getattr(found, role)
            assert torch.equal(kept, value) if isinstance(value, Tensor) else kept == value
    products = Products(torch.eye(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64), 7)
    (tmp_path / "other").mkdir()
    EditState("x", {"count": torch.tensor(3.0)}, {"layer.0": products}).save(tmp_path / "other")
    back = EditState.load(tmp_path / "other")
    other = back.rows["layer.0"]
    assert isinstance(other, Products) and other.n_rows == 7 and other.gram is not None
    assert torch.equal(other.gram, torch.eye(3)) and torch.equal(back.statistics["count"], torch.tensor(3.0))

    path = tmp_path / STATE_FILE
    tensors = load_file(path)
    save_file(tensors, path, metadata={"version": "2"})
    with pytest.raises(ModelMismatchError, match=r"version 2.*reads 1\. Upgrade"):
        Edit.from_pretrained(tmp_path)
    name = next(name for name in tensors if name.endswith(("/left", "/moment")))
    save_file(tensors | {name: tensors[name][0]}, path, metadata={"version": "1"})
    with pytest.raises(ModelMismatchError, match=r"are no rows of an edit\. It is damaged"):
        Edit.from_pretrained(tmp_path)
    save_file({"weights": torch.ones(1)}, path, metadata={"version": "1"})
    with pytest.raises(ModelMismatchError, match=r"belongs to no state of an edit"):
        Edit.from_pretrained(tmp_path)
    for folder in (tmp_path / "plain", tmp_path):  # one that has none, and one that has another edit's
        editor.make_edit(model, facts, tokenizer).save_pretrained(folder)
        assert not (folder / STATE_FILE).exists()
