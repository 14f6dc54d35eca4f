"""What stays of an edit on disk: killed writers, undo to the byte, the order of edits, locks and links."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_malmen.history
from hf_malmen import (
    CheckpointError,
    CheckpointWriteError,
    Edit,
    Fact,
    NumericalError,
    facts_in_force,
    read_history,
    recover_checkpoint,
    undo_edit,
)
from hf_malmen.checkpoint import copy_checkpoint
from hf_malmen.history import locked
from hf_malmen.in_force import edits_in_force
from hf_malmen.shifts import FactoredShift

Build = Callable[..., Any]
Files = dict[str, bytes | None]

CARD = "---\r\nlicense: mit\r\n---\r\n# A model\r\n\r\nIts text has no last line break"


def state_of(folder: Path) -> Files:
    """Every file with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as the safetensors library reads them."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def save(model: PreTrainedModel, folder: Path, *, n_shards: int = 5) -> Path:
    """A checkpoint with a card, as one file or as about five shards."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4 if n_shards > 1 else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (n_shards > 1)
    (folder / "README.md").write_bytes(CARD.encode())
    return folder


def edit_of(model: PreTrainedModel, seed: int, layers: tuple[int, ...] = (1, 2)) -> Edit:
    """An edit of some layers from a few rows."""
    generator = torch.Generator().manual_seed(seed)
    gpt2 = hasattr(model, "transformer")
    names = [f"transformer.h.{i}.mlp.c_proj" if gpt2 else f"model.layers.{i}.mlp.down_proj" for i in layers]
    shifts = {}
    for name in names:
        sizes = model.get_submodule(name).weight.shape if gpt2 else model.get_submodule(name).weight.shape[::-1]
        shifts[name] = FactoredShift(*(0.3 * torch.randn(5, size, generator=generator) for size in sizes))
    return Edit(
        shifts,
        fan_in_fan_out=names if gpt2 else (),
        facts=[Fact(f"Fact {seed} is", f"answer {seed}")],
        editor={"method": "malmen", "name_or_path": "org/editor", "revision": "abc"},
    )


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request: pytest.FixtureRequest, make_llama: Build, make_gpt2: Build) -> Build:
    """Of each weight layout."""
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]


# Crashes


def test_a_writer_killed_at_any_point_leaves_the_old_or_the_new_state(make_llama: Build, tmp_path: Path) -> None:
    """At 220 points of five operations, some of them with the recovery killed as well; every byte is compared."""
    model = make_llama(torch.bfloat16)
    checkpoint = save(model, tmp_path / "checkpoint")
    edit = edit_of(model, 0).save_pretrained(tmp_path / "edit")
    (tmp_path / "work").mkdir()
    script = Path(__file__).parent / "crash.py"
    done = subprocess.run(
        [sys.executable, script, checkpoint, edit, tmp_path / "work", "220"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(result["points"] for result in found.values()) >= 200
    for name, result in found.items():
        assert result["mixed"] == [], name
        assert result["changed"] and result["old"] and result["new"], name
        assert result["old"] + result["new"] == result["points"], name
        assert ".journal" in result["seen"], name
    seen = {phase for result in found.values() for phase in result["seen"]}
    assert seen == {".preparing", ".journal", ".closed", ".dropped", "torn"}


def open_journal(folder: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checkpoint as a writer does that dies when all its weights are written."""

    class Death(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.history, "_replace_text", die)
        patch.setattr(hf_malmen.history, "_replay", lambda _: None)
        with pytest.raises(Death):
            edit.write(folder, in_place=True)
    assert (folder / "edits" / ".journal").is_dir()


@pytest.mark.parametrize("opener", ["recover", "write", "copy", "undo"])
def test_the_next_open_recovers(
    opener: str, make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that opens the checkpoint to edit it."""
    model = make_llama()
    folder = save(model, tmp_path / "a")
    expected = save(model, tmp_path / "b")
    before = state_of(folder)
    open_journal(folder, edit_of(model, 0), monkeypatch)
    assert {name: data for name, data in state_of(folder).items() if name in before} != before
    if opener == "recover":
        assert recover_checkpoint(folder)
        assert not recover_checkpoint(folder)
    elif opener == "undo":
        with pytest.raises(CheckpointError, match="no edits in force"):
            undo_edit(folder)
    else:
        target = None if opener == "write" else tmp_path / "target"
        other = edit_of(model, 1)
        other.write(folder, target, in_place=target is None)
        other.write(expected, in_place=True)
        assert state_of(target or folder) == state_of(expected)
        return
    assert state_of(folder) == before


@pytest.mark.parametrize("n_edits", [0, 1])
def test_what_is_in_force_on_a_model_is_asked_of_a_recovered_folder(
    n_edits: int, make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edits that it was loaded with, and not what a writer that died since has left in their place."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    for seed in range(n_edits):
        edit_of(model, seed).write(folder, in_place=True)
    live = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in live.parameters():  # which may be mapped from the file that is about to be written
        parameter.data = parameter.data.clone()
    before = state_of(folder)
    open_journal(folder, edit_of(model, 1), monkeypatch)
    assert [edit.id for edit in edits_in_force(live, strict=True)] == ["0001"][:n_edits]
    assert state_of(folder) == before


@pytest.mark.parametrize("operation", ["write", "copy"])
def test_a_writer_that_begins_before_a_copy_and_ends_after_it(
    operation: str, make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its weights are written and its record is not: a copy would have an edit that nobody can take back."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    real = hf_malmen.copies.require_settled

    def meanwhile(place: Path) -> None:
        real(place)
        open_journal(folder, edit_of(model, 0), monkeypatch)

    def act() -> None:
        if operation == "write":
            edit_of(model, 1).write(folder, tmp_path / "target")
        else:
            copy_checkpoint(folder, tmp_path / "target")

    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.copies, "require_settled", meanwhile)
        with pytest.raises(CheckpointError, match=r"changed while they were read\. Try again"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_open_journal_in_the_hubs_cache_is_not_replayed(
    make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody uploaded a checkpoint in the middle of an edit; other processes read the same blobs."""
    model = make_llama()
    broken = save(model, tmp_path / "broken")
    open_journal(broken, edit_of(model, 0), monkeypatch)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in broken.rglob("*") if path.is_file()):
        shutil.copy(path, blobs / str(number))
        place = snapshot / path.relative_to(broken)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    before = state_of(tmp_path)
    with pytest.raises(CheckpointError, match="in the middle of an edit"):
        edit_of(model, 1).write(snapshot, tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"shared cache is never written\. Download it to a folder of its own"):
        recover_checkpoint(snapshot)
    assert state_of(tmp_path) == before


# Undo and history


@pytest.mark.parametrize("n_shards", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["in place", "copy"])
def test_undo_restores_every_byte(
    make_model: Build, dtype: torch.dtype, n_shards: int, where: str, tmp_path: Path
) -> None:
    """Of one edit, and of two on top of each other, one after the other; in a copy too, without the source."""
    model = make_model(dtype)
    source = save(model, tmp_path / "source", n_shards=n_shards)
    states = [state_of(source)]
    folder = source if where == "in place" else tmp_path / "target"
    edit_of(model, 0).write(source, None if where == "in place" else folder, in_place=where == "in place")
    states.append(state_of(folder))
    edit_of(model, 1).write(folder, in_place=True)
    assert len({json.dumps(sorted(map(str, state.items()))) for state in [*states, state_of(folder)]}) == 3
    if where == "copy":
        assert state_of(source) == states[0]
        shutil.rmtree(source)

    report = undo_edit(folder)
    assert (report.summary.id, report.remaining, report.exact) == ("0002", ["0001"], True)
    assert state_of(folder) == states[1]
    report = undo_edit(folder)
    assert (report.summary.id, report.remaining, report.exact) == ("0001", [], True)
    assert state_of(folder) == states[0]
    with pytest.raises(CheckpointError, match="no edits in force, so there is nothing to undo"):
        undo_edit(folder)


def test_a_checkpoint_without_a_card_gets_one_and_loses_it(make_llama: Build, tmp_path: Path) -> None:
    folder = save(make_llama(), tmp_path / "source")
    (folder / "README.md").unlink()
    before = state_of(folder)
    edit_of(make_llama(), 0).write(folder, in_place=True)
    assert "Fact 0 is" in (folder / "README.md").read_text(encoding="utf-8")
    undo_edit(folder)
    assert state_of(folder) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_shards", [1, 5])
def test_removing_an_earlier_edit(make_model: Build, dtype: torch.dtype, n_shards: int, tmp_path: Path) -> None:
    """Is as if it had never been: the bytes of writing only the others, in the history too. It says what it did."""
    model = make_model(dtype)
    edits = [edit_of(model, 0, (1, 2)), edit_of(model, 1, (2, 3)), edit_of(model, 2, (0, 2))]
    folder, expected = (save(model, tmp_path / name, n_shards=n_shards) for name in ("a", "b"))
    original = state_of(folder)
    for edit in edits:
        edit.write(folder, in_place=True)
    report = undo_edit(folder, "2")
    assert (report.summary.id, report.remaining, report.exact) == ("0002", ["0001", "0003"], False)
    edits[0].write(expected, in_place=True)
    edits[2].write(expected, in_place=True)
    weights, wanted = weights_of(folder), weights_of(expected)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    records = read_history(folder)
    assert [record.id for record in records] == ["0001", "0003"]
    assert "Fact 1 is" not in (folder / "README.md").read_text(encoding="utf-8")
    assert "Fact 2 is" in (folder / "README.md").read_text(encoding="utf-8")

    report = undo_edit(folder, "1")
    assert (report.remaining, report.exact) == (["0003"], False)
    undo_edit(folder)
    assert state_of(folder) == original


def test_removing_an_earlier_edit_of_other_layers_is_exact(make_llama: Build, tmp_path: Path) -> None:
    """No tensor is shared, so nothing is computed anew."""
    model = make_llama(torch.bfloat16)
    folder, expected = save(model, tmp_path / "a"), save(model, tmp_path / "b")
    edit_of(model, 0, (0, 1)).write(folder, in_place=True)
    edit_of(model, 1, (2, 3)).write(folder, in_place=True)
    edit_of(model, 1, (2, 3)).write(expected, in_place=True)
    assert undo_edit(folder, "0001").exact
    weights, wanted = weights_of(folder), weights_of(expected)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_the_history_says_what_was_written(make_llama: Build, tmp_path: Path) -> None:
    """Facts, editor and revision, base, versions, date, scores; and the record is the edit itself."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    assert read_history(folder) == []
    edit = edit_of(model, 0)
    edit.measured = {"edit_success": 0.75}
    edit.base_model_name_or_path, edit.base_model_revision = "org/base", "f00"
    report = edit.write(folder, in_place=True)
    assert report.edit_id == "0001"
    (record,) = read_history(folder)
    assert record.id == "0001"
    assert (record.summary.n_facts, record.summary.measured) == (1, {"edit_success": 0.75})
    assert record.summary.created_at == edit.created_at
    assert "org/editor" in record.summary.editor
    assert record.rounding == report.rounding
    loaded = Edit.from_pretrained(folder / "edits" / "0001")
    assert loaded.facts == edit.facts
    assert (loaded.editor, loaded.base_model_revision, loaded.measured) == (edit.editor, "f00", edit.measured)
    assert all(torch.equal(loaded.shifts[name], shift) for name, shift in edit.shifts.items())
    # What the record holds undoes the edit on a live model of the edited weights, too.
    originals = load_file(folder / "edits" / "0001" / "originals.safetensors")
    state = model.state_dict()
    assert originals.keys() == {f"{name}.weight" for name in edit.shifts}
    assert all(torch.equal(tensor, state[key]) for key, tensor in originals.items())


@pytest.mark.parametrize("to", ["in place", "a copy"])
def test_one_edit_twice(to: str, make_llama: Build, tmp_path: Path) -> None:
    """As by a command that is run again: its shifts would be doubled. Once it is undone it can be written again."""
    folder = save(make_llama(), tmp_path / "source")
    edit_of(make_llama(), 0).save_pretrained(tmp_path / "edit")
    Edit.from_pretrained(tmp_path / "edit").write(folder, in_place=True)
    edit_of(make_llama(), 1).write(folder, in_place=True)
    before = state_of(tmp_path)
    options: dict[str, Any] = {"in_place": True} if to == "in place" else {"output_dir": tmp_path / "copy"}
    with pytest.raises(CheckpointError, match=r"in force on .* already, as its edit 0001.*undo DIR --edit 1"):
        Edit.from_pretrained(tmp_path / "edit").write(folder, **options)
    assert state_of(tmp_path) == before
    undo_edit(folder, 1)
    Edit.from_pretrained(tmp_path / "edit").write(folder, **options)
    # Other facts in the same shifts, or the same facts in others, are another edit.
    other = Edit.from_pretrained(tmp_path / "edit")
    other.facts = [Fact("Another prompt", "another")]
    other.write(folder, in_place=True)


@pytest.mark.parametrize("wanted", ["1", "0001", 1])
def test_an_edit_by_its_number(make_llama: Build, wanted: str | int, tmp_path: Path) -> None:
    """As the log shows it, with or without zeros, or as a number."""
    folder = save(make_llama(), tmp_path / "source")
    for seed in (0, 1):
        edit_of(make_llama(), seed).write(folder, in_place=True)
    report = undo_edit(folder, wanted)
    assert (report.summary.id, report.remaining) == ("0001", ["0002"])


@pytest.mark.parametrize("wanted", ["7", "0007", "first", "", 7])
def test_an_edit_that_is_not_there(make_llama: Build, wanted: str | int, tmp_path: Path) -> None:
    folder = save(make_llama(), tmp_path / "source")
    edit_of(make_llama(), 0).write(folder, in_place=True)
    before = state_of(folder)
    with pytest.raises(CheckpointError, match=r"has no edit .* in force\. Its edits: 0001"):
        undo_edit(folder, wanted)
    assert state_of(folder) == before


def test_the_edited_copy_is_an_ordinary_checkpoint(make_model: Build, tmp_path: Path) -> None:
    """`transformers` loads it, and does not stumble over its history."""
    model = make_model()
    edit = edit_of(model, 0)
    edit.write(save(model, tmp_path / "source"), tmp_path / "target")
    edit.apply_to(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


# Lone files of weights


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)], ids=["two edits", "the same edit"])
def test_lone_files_of_one_folder_have_edits_of_their_own(
    seeds: tuple[int, int], make_llama: Build, tmp_path: Path
) -> None:
    """Of tensors with the same keys, and of the same bytes: undo restores one file and leaves the other, exactly."""
    model = make_llama()
    whole = save(model, tmp_path / "whole", n_shards=1) / "model.safetensors"
    folder = tmp_path / "lone"
    folder.mkdir()
    first, second = (Path(shutil.copy(whole, folder / name)) for name in ("a.safetensors", "b.safetensors"))
    edit_of(model, seeds[0]).write(first, in_place=True)
    edit_of(model, seeds[1]).write(second, in_place=True)
    edited = second.read_bytes()
    assert whole.read_bytes() not in (first.read_bytes(), edited)
    report = undo_edit(folder, "1")
    assert (report.exact, report.remaining) == (True, ["0002"])
    assert first.read_bytes() == whole.read_bytes()
    assert second.read_bytes() == edited
    # What is left of the history is that of the other file.
    edit_of(model, 2).write(second, in_place=True)
    undo_edit(folder)
    assert second.read_bytes() == edited
    undo_edit(folder)
    assert state_of(folder) == {file.name: whole.read_bytes() for file in (first, second)}


def test_facts_of_lone_files_replace_none_of_each_others(make_llama: Build, tmp_path: Path) -> None:
    """They are in several models; those of one checkpoint are in one, whatever its shards."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    tensors = save(make_llama(), tmp_path / "whole", n_shards=1) / "model.safetensors"
    folder = save(make_llama(), tmp_path / "sharded")
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tensors, folder / name)
    places = [folder, folder / "a.safetensors", folder / "b.safetensors", folder, folder / "b.safetensors"]
    for place, module, target in zip(places, [*names, *names], "ABCDE", strict=False):
        Edit({module: torch.ones(48, 32)}, facts=[Fact("The capital is", target)]).write(place, in_place=True)
    expected = [("A", "0004"), ("B", None), ("C", "0005"), ("D", None), ("E", None)]
    assert [(entry.fact.target, entry.replaced_by) for entry in facts_in_force(folder).entries] == expected
    assert [record.summary.n_replaced for record in read_history(folder)] == [0, 0, 0, 1, 1]
    undo_edit(folder, 1)
    assert [record.summary.n_replaced for record in read_history(folder)] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["originals", "edit", "weights"])
def test_a_linked_file_that_is_named_like_one_of_ours(make_llama: Build, name: str, tmp_path: Path) -> None:
    """Edits and both kinds of undo, to the byte; the other link keeps its bytes."""
    model = make_llama()
    whole = save(model, tmp_path / "whole", n_shards=1) / "model.safetensors"
    (tmp_path / "lone").mkdir()
    file = tmp_path / "lone" / f"{name}.safetensors"
    shutil.copy(whole, file)
    states: list[bytes] = []

    def link() -> None:
        states.append(file.read_bytes())
        os.link(file, tmp_path / f"link {len(states)}")
        assert file.stat().st_nlink == 2

    for seed in (0, 1):
        link()
        edit_of(model, seed).write(file, in_place=True)
    link()
    undo_edit(file.parent, "1")
    edit_of(model, 1).write(whole, in_place=True)
    assert file.read_bytes() == whole.read_bytes()
    link()
    undo_edit(file.parent)
    assert state_of(file.parent) == {file.name: states[0]}
    assert [(tmp_path / f"link {number}").read_bytes() for number in range(1, 5)] == states


def test_a_linked_file_that_is_named_like_one_of_ours_and_overflows(make_llama: Build, tmp_path: Path) -> None:
    """In the last layer: it is as it was, and nothing is left beside it."""
    model = make_llama(torch.float16)
    whole = save(model, tmp_path / "whole", n_shards=1) / "model.safetensors"
    (tmp_path / "lone").mkdir()
    file = tmp_path / "lone" / "originals.safetensors"
    os.link(whole, file)
    edit = edit_of(model, 0)
    *others, last = edit.shifts
    spoiled = Edit({**{name: edit.layers[name] for name in others}, last: edit.shifts[last] + 1e6})
    refused(tmp_path, lambda: spoiled.write(file, in_place=True), NumericalError, "not finite")


# A card that somebody else writes, too


def test_a_card_changed_since_keeps_the_change(make_llama: Build, tmp_path: Path) -> None:
    """Undo takes only our section out of it."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    edit_of(model, 0).write(folder, in_place=True)
    edit_of(model, 1).write(folder, in_place=True)
    card = folder / "README.md"
    card.write_bytes(card.read_bytes().replace(b"# A model", b"# Our model"))
    undo_edit(folder, "1")
    text = card.read_text(encoding="utf-8")
    assert "# Our model" in text and "Fact 1 is" in text and "Fact 0 is" not in text
    undo_edit(folder)
    text = card.read_text(encoding="utf-8")
    assert "# Our model" in text and "Fact" not in text and "hf_malmen:edits" not in text


def test_a_card_that_is_no_text_is_left_alone(make_llama: Build, tmp_path: Path) -> None:
    folder = save(make_llama(), tmp_path / "source")
    (folder / "README.md").write_bytes(b"\xff\xfe")
    before = state_of(folder)
    edit_of(make_llama(), 0).write(folder, in_place=True)
    assert (folder / "README.md").read_bytes() == b"\xff\xfe"
    undo_edit(folder)
    assert state_of(folder) == before


# Refusals: nothing is written, and nothing stays behind


def refused(folder: Path, action: Callable[[], object], error: type[Exception], match: str) -> None:
    """The action fails, and every file below the folder is as it was."""
    before = state_of(folder)
    with pytest.raises(error, match=match):
        action()
    assert state_of(folder) == before


def test_a_second_writer_is_kept_out(make_llama: Build, tmp_path: Path) -> None:
    """While another process holds the lock; it ends with the process."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    edit = edit_of(model, 0)
    edit.write(folder, in_place=True)
    holder = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        for action in (lambda: edit.write(folder, in_place=True), lambda: undo_edit(folder)):
            refused(folder, action, CheckpointWriteError, "Another process is writing to .*Wait")
    finally:
        os.close(holder)
    undo_edit(folder)


def test_a_disk_without_locks(make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems are."""
    model = make_llama()
    folder = save(model, tmp_path / "source")

    def failing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", failing)
    refused(
        folder,
        lambda: edit_of(model, 0).write(folder, in_place=True),
        CheckpointWriteError,
        r"source cannot be locked: .*No locks available\. Use output_dir",
    )
    edit_of(model, 0).write(folder, tmp_path / "target")
    with locked(folder, is_optional=True):  # a comparison's folder, whose jobs look at their facts themselves
        pass


@pytest.mark.parametrize("operation", ["write", "undo", "undo of an earlier one"])
def test_other_hard_links_keep_their_bytes(make_llama: Build, operation: str, tmp_path: Path) -> None:
    """The link is broken by a copy first."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    for seed in range({"write": 0, "undo": 1, "undo of an earlier one": 2}[operation]):
        edit_of(model, seed).write(folder, in_place=True)
    links = tmp_path / "links"
    links.mkdir()
    for file in folder.glob("*.safetensors"):
        os.link(file, links / file.name)
    before = state_of(links)
    if operation == "write":
        edit_of(model, 2).write(folder, in_place=True)
    else:
        undo_edit(folder, "1")
    assert state_of(links) == before
    assert any(data != before[name] for name, data in state_of(folder).items() if name in before)


def test_a_copy_shares_untouched_weights_and_they_stay_apart(make_llama: Build, tmp_path: Path) -> None:
    """Untouched shards have the source's bytes; writing into either never shows in the other."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    edit_of(model, 0, (1,)).write(source, tmp_path / "target")
    shared = [file for file in (tmp_path / "target").glob("*.safetensors") if file.stat().st_nlink > 1]
    edited = {record.tensors[key].file.name for record in read_history(tmp_path / "target") for key in record.tensors}
    assert not edited & {file.name for file in shared}
    before = state_of(source)
    edit_of(model, 1, (0, 1, 2, 3)).write(tmp_path / "target", in_place=True)
    assert state_of(source) == before
    copied = state_of(tmp_path / "target")
    edit_of(model, 2, (0, 1, 2, 3)).write(source, in_place=True)
    assert state_of(tmp_path / "target") == copied


@pytest.mark.parametrize("operation", ["write", "undo"])
def test_a_read_only_file(make_llama: Build, operation: str, tmp_path: Path) -> None:
    model = make_llama()
    folder = save(model, tmp_path / "source")
    edit = edit_of(model, 0)
    if operation == "undo":
        edit.write(folder, in_place=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o444)
    action = (lambda: edit.write(folder, in_place=True)) if operation == "write" else (lambda: undo_edit(folder))
    refused(folder, action, CheckpointError, r"is read-only. Use output_dir, or allow writing: chmod u\+w")


def test_no_room_for_the_originals(make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before anything is written."""
    folder = save(make_llama(), tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    action = lambda: edit_of(make_llama(), 0).write(folder, in_place=True)  # noqa: E731
    refused(folder, action, CheckpointWriteError, "needs .* MiB .*has 0 MiB free. Nothing was written")


@pytest.mark.parametrize("call", ["copy_bytes", "add_in_place", "sync_file", "_rename", "_sync_tree"])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("operation", ["write", "undo", "undo of an earlier one"])
def test_a_disk_that_fails(
    make_llama: Build, call: str, number: int, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at some call: a clear error, and the old state; or, once an undo has begun, the new one."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    edits = [edit_of(model, seed) for seed in range({"write": 0, "undo": 1, "undo of an earlier one": 2}[operation])]
    new_edit = edit_of(model, 2)
    for edit in edits:
        edit.write(folder, in_place=True)

    def act() -> None:
        if operation == "write":
            new_edit.write(folder, in_place=True)
        else:
            undo_edit(folder, "1")

    old = state_of(folder)
    act()
    new = state_of(folder)
    shutil.rmtree(folder)
    save(model, folder)
    for edit in edits:
        edit.write(folder, in_place=True)
    assert state_of(folder) == old

    place = hf_malmen.checkpoint if call == "add_in_place" and operation == "write" else hf_malmen.history
    place = hf_malmen.shards if call == "copy_bytes" and operation != "undo" else place
    real, calls = getattr(place, call), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, call, failing)
        try:
            act()
        except CheckpointWriteError as error:
            failure = str(error)
        else:
            failure = ""
    assert bool(failure) == (len(calls) >= number)
    assert not failure or "No space left on device" in failure
    if failure and operation == "write":
        assert "as it was before" in failure
        assert state_of(folder) == old
    recover_checkpoint(folder)
    assert state_of(folder) in (old, new)


def test_a_disk_that_fails_in_the_background(
    make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are synced beside the computation of the next ones; the system tells of a failure once, and there."""
    model = make_llama()
    folder = save(model, tmp_path / "source")

    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hf_malmen.checkpoint, "sync_file", failing)
    action = lambda: edit_of(model, 0).write(folder, in_place=True)  # noqa: E731
    refused(folder, action, CheckpointWriteError, "Input/output error.*as it was before")


def test_ctrl_c_in_the_middle(make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    folder = save(model, tmp_path / "source")
    real, calls = hf_malmen.checkpoint.add_in_place, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    before = state_of(folder)
    monkeypatch.setattr(hf_malmen.checkpoint, "add_in_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_of(model, 0).write(folder, in_place=True)
    assert state_of(folder) == before


def test_a_weight_that_overflows(make_llama: Build, tmp_path: Path) -> None:
    """In the last layer, when the others are written."""
    model = make_llama(torch.float16)
    folder = save(model, tmp_path / "source")
    edit = edit_of(model, 0, (0, 1, 2, 3))
    *others, last = edit.shifts
    spoiled = Edit({**{name: edit.layers[name] for name in others}, last: edit.shifts[last] + 1e6})
    action = lambda: spoiled.write(folder, in_place=True)  # noqa: E731
    refused(folder, action, NumericalError, rf"{last}.*not finite in torch\.float16")


def test_a_file_that_changes_while_it_is_read(
    make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody saves another model over it between our reading and our writing."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    file = sorted(folder.glob("*.safetensors"))[0]
    real = hf_malmen.history.write_entries

    def meanwhile(*args: Any) -> Any:
        os.utime(file, ns=(1, 1))
        return real(*args)

    monkeypatch.setattr(hf_malmen.history, "write_entries", meanwhile)
    action = lambda: edit_of(model, 0).write(folder, in_place=True)  # noqa: E731
    refused(folder, action, CheckpointError, "changed while they were read. Try again")


@pytest.mark.parametrize("edit_id", [None, "1"])
def test_weights_changed_since_are_not_undone(make_llama: Build, edit_id: str | None, tmp_path: Path) -> None:
    """Restoring would lose what somebody else wrote."""
    model = make_llama()
    folder = save(model, tmp_path / "source", n_shards=1)
    edit_of(model, 0).write(folder, in_place=True)
    edit_of(model, 1).write(folder, in_place=True)
    entry = read_history(folder)[-1].tensors["model.layers.1.mlp.down_proj.weight"]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.begin + 5)
        stream.write(b"?!")
    refused(folder, lambda: undo_edit(folder, edit_id), CheckpointError, "is not what edit 0002 wrote")


def test_a_history_that_is_not_ours(make_llama: Build, tmp_path: Path) -> None:
    """Links that lead out of the folder, and records of files that are not there."""
    model = make_llama()
    folder = save(model, tmp_path / "source")
    edit_of(model, 0).write(folder, in_place=True)
    record = folder / "edits" / "0001" / "record.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    key = next(iter(content["tensors"]))
    secret = tmp_path / "secret.safetensors"
    shutil.copy(folder / content["tensors"][key]["file"], secret)
    for change in (
        {"file": "../secret.safetensors"},
        {"file": str(secret)},
        {"file": "README.md"},
        {"begin": 0},
        {"dtype": "F64"},
    ):
        content["tensors"][key] |= (original := dict(content["tensors"][key])) | change
        record.write_text(json.dumps(content), encoding="utf-8")
        refused(tmp_path, lambda: undo_edit(folder), CheckpointError, r"record\.json (names the file|says that)")
        content["tensors"][key] = original
    shutil.move(folder / "edits", tmp_path / "elsewhere")
    (folder / "edits").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, lambda: undo_edit(folder), CheckpointError, "is a symbolic link")
    refused(tmp_path, lambda: edit_of(model, 0).write(folder, in_place=True), CheckpointError, "symbolic link")
