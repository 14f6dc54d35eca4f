"""`Edit.write`: an edited safetensors checkpoint, compared byte by byte with the original and with a plain reload."""

import fcntl
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import hf_malmen.history
from hf_malmen import CheckpointError, Edit, Fact, ModelMismatchError, NumericalError, read_history, undo_edit
from hf_malmen.checkpoint import copy_checkpoint
from hf_malmen.errors import CheckpointWriteError
from hf_malmen.shards import TensorEntry, read_tensor_index

Build = Callable[..., Any]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHARD_SIZE = {torch.float64: "90KB", torch.float32: "45KB", torch.bfloat16: "25KB", torch.float16: "25KB"}
INPUT_IDS = torch.tensor([[5, 40, 7, 300, 22, 22, 9]])
RECORD = {f"edits/0001/{name}" for name in ("record.json", "originals.safetensors", "README.before.md",
                                            "config.json", "edit.safetensors")}  # fmt: skip


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request: pytest.FixtureRequest, make_llama: Build, make_gpt2: Build) -> Build:
    """A builder of tiny models, for each weight layout."""
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]


def save(model: PreTrainedModel, folder: Path, *, sharded: bool = False) -> Path:
    """A checkpoint with the other files that real ones have."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE[model.dtype] if sharded else "5GB")
    (folder / "README.md").write_text("A model.\n", encoding="utf-8")
    (folder / "assets").mkdir()
    (folder / "assets" / "voice.npz").write_bytes(b"\x00\x01numbers")
    return folder


def random_edit(names: list[str], shape: tuple[int, int], *, flipped: bool, scale: float = 0.1) -> Edit:
    """Random shifts of shape (key_size, value_size)."""
    generator = torch.Generator().manual_seed(3)
    shifts = {name: scale * torch.randn(shape, generator=generator) for name in names}
    return Edit(shifts, fan_in_fan_out=names if flipped else (), facts=[Fact("One and one is", "three")])


def edit_for(model: PreTrainedModel, layers: tuple[int, ...] = (1, 3), scale: float = 0.1) -> Edit:
    """Random shifts for some feed-forward outputs of a tiny model."""
    if model.config.model_type == "gpt2":
        names = [f"transformer.h.{i}.mlp.c_proj" for i in layers]
        return random_edit(names, (128, 32), flipped=True, scale=scale)
    return random_edit([f"model.layers.{i}.mlp.down_proj" for i in layers], (48, 32), flipped=False, scale=scale)


def files_of(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """`files_of`, with folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def split_file(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The raw header of a safetensors file, and the raw bytes of every tensor."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    offsets = {key: entry["data_offsets"] for key, entry in header.items()}
    return data[:start], {key: data[start + begin : start + end] for key, (begin, end) in offsets.items()}


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


# What is written


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_edited_tensors_change(make_model: Build, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    """Headers, other tensors and other files are the same bytes; edited tensors are W + S, rounded once.

    Added are the record of the edit, with the bytes that it replaced, and its section in the card.
    """
    model = make_model(dtype)
    source, target = save(model, tmp_path / "source", sharded=sharded), tmp_path / "new" / "target"
    before = files_of(source)
    assert (len([name for name in before if name.endswith(".safetensors")]) > 2) == sharded
    edit = edit_for(model)
    precision = 1e-9 if dtype.itemsize >= 4 else 1e-5  # of the reported rounding

    report = edit.write(source, target)

    assert files_of(source) == before
    after = files_of(target)
    assert after.keys() == before.keys() | RECORD
    assert after["edits/0001/README.before.md"] == before["README.md"]
    assert after["README.md"].startswith(b"A model.\n")
    assert after["README.md"] != before["README.md"]
    replaced = split_file(after["edits/0001/originals.safetensors"])[1]
    changed = set()
    for name in before.keys() - {"README.md"}:
        data = after[name]
        if not name.endswith(".safetensors"):
            assert data == before[name], name
            continue
        header, tensors = split_file(data)
        old_header, old_tensors = split_file(before[name])
        assert header == old_header
        changed |= {key for key in tensors if tensors[key] != old_tensors[key]}
        assert all(replaced[key] == old_tensors[key] for key in changed & tensors.keys())
        for key in changed & tensors.keys():
            weight = load_file(source / name)[key]
            shift = edit.shifts[key.removesuffix(".weight")]
            oriented = shift if edit.fan_in_fan_out else shift.T
            wide = torch.promote_types(dtype, torch.float32)
            edited = (weight.to(wide) + oriented.to(wide)).to(dtype)
            assert tensors[key] == bits(edited)
            rounding = (edited.double() - weight.double() - oriented.double()).norm() / oriented.double().norm()
            assert report.rounding[key.removesuffix(".weight")] == pytest.approx(float(rounding), rel=precision)
    assert changed == {f"{name}.weight" for name in edit.shifts} == replaced.keys()
    assert report.output_dir == target
    assert report.edit_id == "0001"
    assert report.keys == {name: [f"{name}.weight"] for name in edit.shifts}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_plain_reload_equals_the_live_edited_model(
    make_model: Build, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    """To the last bit of the logits; nothing of hf_malmen is needed to load it."""
    source = save(make_model(dtype), tmp_path / "source", sharded=sharded)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    edit = edit_for(model)
    edit.write(source, tmp_path / "target")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=dtype)
    with torch.no_grad():
        base = model(input_ids=INPUT_IDS).logits
        edit.apply_to(model)
        live = model(input_ids=INPUT_IDS).logits
        found = reloaded(input_ids=INPUT_IDS).logits
    assert torch.equal(found, live)
    assert not torch.equal(found, base)
    for (name, tensor), (_, expected) in zip(reloaded.named_parameters(), model.named_parameters(), strict=True):
        assert bits(tensor) == bits(expected), name


@pytest.mark.parametrize("facts_per_turn", [None, 3])
def test_apply_to_a_checkpoint_equals_apply_to_a_model(
    make_model: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    facts_per_turn: int | None,
    tmp_path: Path,
) -> None:
    """`editor.apply(folder, ...)` writes what `editor.apply(model, ...)` does, in the checkpoint's own dtype."""
    source = save(make_model(torch.bfloat16), tmp_path / "source")
    tokenizer.save_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = files_of(source)
    editor = make_editor(base)
    edit = editor.apply(str(source), facts, output_dir=tmp_path / "target", facts_per_turn=facts_per_turn)
    live = editor.apply(base, facts, tokenizer, facts_per_turn=facts_per_turn)
    assert not edit.in_force
    assert edit.facts == facts
    assert {name: bits(shift) for name, shift in edit.shifts.items()} == {
        name: bits(shift) for name, shift in live.shifts.items()
    }
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(reloaded(input_ids=INPUT_IDS).logits, base(input_ids=INPUT_IDS).logits)
    assert files_of(source) == before
    live.undo()
    editor.apply(source, facts, in_place=True, facts_per_turn=facts_per_turn)
    date = re.compile(rb'\d{4}-\d\d-\d\d(T[\d:+]+)?|"card_sha256": "\w+"')  # two edits, made at different times
    assert {name: date.sub(b"", data) for name, data in files_of(source).items()} == {
        name: date.sub(b"", data) for name, data in files_of(tmp_path / "target").items()
    }


# In place


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_in_place_equals_the_copy(make_model: Build, sharded: bool, tmp_path: Path) -> None:
    """The same bytes as in a copy, no folder beside them, and only the weights that change are written to."""
    model = make_model()
    source = save(model, tmp_path / "source", sharded=sharded)
    edit = edit_for(model, layers=(3,))
    edit.write(source, tmp_path / "target")
    shutil.copytree(source, tmp_path / "apart")  # the copy may share the files without edited tensors
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "apart").iterdir()}
    report = edit.write(tmp_path / "apart", in_place=True)
    assert report.output_dir == tmp_path / "apart"
    assert everything_below(tmp_path / "apart") == everything_below(tmp_path / "target")
    shutil.rmtree(tmp_path / "apart" / "edits")
    written = {path.name for path in (tmp_path / "apart").iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert len([name for name in written if name.endswith(".safetensors")]) == 1
    assert written - {"README.md"} == {name for name in written if name.endswith(".safetensors")}
    shutil.rmtree(tmp_path / "apart")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(("mode", "in_place"), [(0o600, False), (0o640, False), (0o444, False), (0o600, True),
                                                (0o640, True)])  # fmt: skip
def test_file_permissions_stay(make_llama: Build, mode: int, in_place: bool, tmp_path: Path) -> None:
    """A private checkpoint does not become readable to others; a read-only one gives a copy its owner can write."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    (source / "model.safetensors").chmod(mode)
    source.chmod(0o700)
    target = source if in_place else tmp_path / "target"
    edit_for(model).write(source, None if in_place else target, in_place=in_place)
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) == mode | 0o200
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_a_read_only_checkpoint_is_not_edited_in_place(make_llama: Build, tmp_path: Path) -> None:
    """Also not by root, whom the system lets write."""
    model = make_llama()
    source = save(model, tmp_path / "source", sharded=True)
    file = read_tensor_index(source)["model.layers.3.mlp.down_proj.weight"].file
    file.chmod(0o444)
    refused(edit_for(model), source, CheckpointError, rf"{file.name} is read-only\. Use output_dir, or allow",
            folder=tmp_path, modes=(True,))  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True])
def test_a_hard_linked_file_is_never_written_through(make_llama: Build, in_place: bool, tmp_path: Path) -> None:
    """Another folder holds the same file; what is written gets bytes of its own first, and the other keeps its."""
    model = make_llama()
    source = save(model, tmp_path / "source", sharded=True)
    other = tmp_path / "other"
    shutil.copytree(source, other, copy_function=os.link)
    before = files_of(other)
    target = source if in_place else tmp_path / "target"
    edit_for(model).write(source, None if in_place else target, in_place=in_place)
    assert files_of(other) == before
    changed = {name for name, data in before.items() if (target / name).read_bytes() != data}
    assert len([name for name in changed if name.endswith(".safetensors")]) >= 1
    for name in changed:
        assert (target / name).stat().st_ino != (other / name).stat().st_ino


def test_a_copy_shares_what_it_does_not_change(make_llama: Build, tmp_path: Path) -> None:
    """Where the file system cannot clone, weights without edited tensors are hard links, all other files copies."""
    model = make_llama()
    source = save(model, tmp_path / "source", sharded=True)
    edited = read_tensor_index(source)["model.layers.3.mlp.down_proj.weight"].file.name
    edit_for(model, layers=(3,)).write(source, tmp_path / "target")
    for path in source.iterdir():
        if path.is_file():
            linked = path.samefile(tmp_path / "target" / path.name)
            assert not linked or (path.suffix == ".safetensors" and path.name != edited), path.name
    # A second edit of the copy, in place, leaves the source alone.
    before = files_of(source)
    edit_for(model, layers=(0, 1, 2)).write(tmp_path / "target", in_place=True)
    assert files_of(source) == before


# Where to


def test_exactly_one_destination(make_llama: Build, tmp_path: Path) -> None:
    """Neither is an accident, both is a contradiction."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    before = everything_below(tmp_path)
    for arguments in ({}, {"output_dir": tmp_path / "target", "in_place": True}):
        with pytest.raises(ValueError, match=r"output_dir=\.\.\. for a copy, or in_place=True; give exactly one"):
            edit_for(model).write(source, **arguments)
    assert everything_below(tmp_path) == before


def test_an_output_folder_in_use(make_llama: Build, tmp_path: Path) -> None:
    """Never overwritten: a folder with anything in it, the source itself, or a file."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / ".hidden").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    before = everything_below(tmp_path)
    for name in ("used", "source", "file"):
        with pytest.raises(CheckpointError, match=rf"{name} exists and is not empty\. Choose another output_dir"):
            edit_for(model).write(source, tmp_path / name)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("kind", ["plain", "the current one", "a link", "a new file system"])
def test_an_empty_output_folder_is_used(
    make_llama: Build, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mkdir` leaves it. It stays the folder that it is: a mount point can be neither removed nor renamed to."""
    model = make_llama()
    source, target = save(model, tmp_path / "source"), tmp_path / "target"
    target.mkdir(0o750)
    before = target.stat()
    given = target
    if kind == "the current one":
        monkeypatch.chdir(target)
        given = Path()
    elif kind == "a link":
        given = tmp_path / "link"
        given.symlink_to("target")
    elif kind == "a new file system":
        (target / "lost+found").mkdir()
    edit_for(model).write(source, given)
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
    edit_for(model).write(source, tmp_path / "new")
    assert everything_below(target).keys() - {"lost+found"} == everything_below(tmp_path / "new").keys()
    edit_for(model, scale=0.2).write(target, tmp_path / "next")
    assert not (tmp_path / "next" / "lost+found").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_copy_left_goes_with_the_next_one(make_llama: Build, exists: bool, tmp_path: Path) -> None:
    """Not that of a process that still runs."""
    model = make_llama()
    source, target = save(model, tmp_path / "source"), tmp_path / "target"
    if exists:
        target.mkdir()
    child = os.fork()
    if child == 0:
        hf_malmen.checkpoint.add_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        edit_for(model).write(source, target)
    os.waitpid(child, 0)
    (left,) = (target if exists else tmp_path).glob(".*")
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    if exists:
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            edit_for(model).write(source, target)
    else:
        edit_for(model).write(source, target)
        shutil.rmtree(target)
    assert left.exists()
    os.close(handle)
    edit_for(model).write(source, target)
    assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    assert files_of(target).keys() == files_of(source).keys() | RECORD


@pytest.mark.parametrize("inside", ["edited", "assets/edited"])
def test_an_output_folder_inside_the_checkpoint(make_llama: Build, inside: str, tmp_path: Path) -> None:
    """The copy would contain itself."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"lies inside of .*source.*Choose another output_dir"):
        edit_for(model).write(source, source / inside)
    assert everything_below(tmp_path) == before


def hub_cache(model: PreTrainedModel, repo: Path) -> Path:
    """A snapshot as the Hub's cache holds it: links to files in `blobs`, named by their hash."""
    snapshot = repo / "snapshots" / "0123abc"
    save(model, snapshot)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        if path.is_file():
            blob = path.rename(repo / "blobs" / f"{number:040x}")
            path.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def test_the_hubs_cache_is_never_edited_in_place(make_llama: Build, tmp_path: Path) -> None:
    """Other models read the same files. A copy has files of its own."""
    model = make_llama()
    snapshot = hub_cache(model, tmp_path / "models--org--name")
    assert (snapshot / "model.safetensors").is_symlink()
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"symbolic links, as the Hub's shared cache does.*Use output_dir"):
        edit_for(model).write(snapshot, in_place=True)
    assert everything_below(tmp_path) == before

    edit = edit_for(model)
    edit.write(snapshot, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))
    edit.write(save(model, tmp_path / "plain"), tmp_path / "direct")
    assert files_of(tmp_path / "target") == files_of(tmp_path / "direct")
    cached = everything_below(tmp_path / "models--org--name")
    assert {f"models--org--name/{name}": data for name, data in cached.items()} | {"models--org--name": None} == before


@pytest.mark.parametrize("layout", ["beside", "absolute", "no blob"])
def test_links_out_of_a_folder_are_not_followed(make_llama: Build, layout: str, tmp_path: Path) -> None:
    """Only the Hub's cache has links: a downloaded folder has no business with files elsewhere."""
    model = make_llama()
    outside = save(model, tmp_path / "outside")
    source = tmp_path / "repo" / "snapshots" / "0123abc"
    shutil.copytree(outside, source)
    target = {
        "beside": Path("../../../outside/model.safetensors"),
        "absolute": (outside / "model.safetensors").absolute(),
        "no blob": Path("../../blobs/missing"),
    }[layout]
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(target)
    message = (
        r"has no model\.safetensors" if layout == "no blob" else "is a symbolic link to .*Copy it with its contents"
    )
    refused(edit_for(model), source, CheckpointError, message, folder=tmp_path, modes=(False,))
    refused(edit_for(model), source, CheckpointError, "symbolic link", folder=tmp_path, modes=(True,))


def test_a_checkpoint_that_is_not_there(make_llama: Build, tmp_path: Path) -> None:
    """In place there has to be a folder; a file is not one; and what is no repo's name is not looked for on the Hub."""
    edit = edit_for(make_llama())
    with pytest.raises(
        CheckpointError, match=r"There is no folder org/model\. A checkpoint from the Hub is never edited"
    ):
        edit.write("org/model", in_place=True)
    for path in ("./org/model", tmp_path / "missing", "no such folder"):
        with pytest.raises(CheckpointError, match=r"There is no folder or file .*no repo can have that name"):
            edit.write(path, tmp_path / "target")
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"is a file; expected a \.safetensors file, or the folder of a checkpoint"
    ):
        edit.write(tmp_path / "model.gguf", tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        edit.write(tmp_path / "empty", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model.gguf"]


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_single_file(make_model: Build, name: str, tmp_path: Path) -> None:
    """A lone weight file is a checkpoint too; with a configuration beside it, it stands for its folder."""
    model = make_model()
    source = save(model, tmp_path / "source")
    (tmp_path / "lone").mkdir()
    shutil.copy(source / "model.safetensors", tmp_path / "lone" / name)
    edit = edit_for(model)
    edit.write(source, tmp_path / "whole")
    edit.write(tmp_path / "lone" / name, tmp_path / "target")
    assert files_of(tmp_path / "target").keys() == {name, "README.md"} | RECORD - {"edits/0001/README.before.md"}
    assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    edit.write(tmp_path / "lone" / name, in_place=True)
    assert files_of(tmp_path / "lone") == files_of(tmp_path / "target")
    edit.write(source / "model.safetensors", tmp_path / "by file")
    assert files_of(tmp_path / "by file") == files_of(tmp_path / "whole")


def test_one_shard_is_no_checkpoint(make_llama: Build, tmp_path: Path) -> None:
    """The message says to give the folder."""
    model = make_llama()
    source = save(model, tmp_path / "source", sharded=True)
    shard = next(source.glob("model-*.safetensors"))
    refused(edit_for(model), shard, CheckpointError, r"is one shard of the checkpoint in .*Give the folder",
            folder=tmp_path)  # fmt: skip


def test_pickled_weights_are_not_read(make_llama: Build, tmp_path: Path) -> None:
    """A .bin file can run code when it is loaded; the message says how to convert it."""
    (tmp_path / "source").mkdir()
    torch.save({"x": torch.zeros(2)}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"\.bin files only.*from_pretrained\(folder\)\.save_pretrained"):
        edit_for(make_llama()).write(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_of_two_sets_of_weights_the_one_that_is_loaded_is_edited(make_llama: Build, tmp_path: Path) -> None:
    """transformers prefers one file to shards; editing the others would write an edit that nobody loads."""
    model = make_llama()
    source = save(model, tmp_path / "source", sharded=True)
    save_file(load_file_shards(source), source / "model.safetensors", metadata={"format": "pt"})
    edit = edit_for(model)
    edit.write(source, tmp_path / "target")
    edit.apply_to(model)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(reloaded(input_ids=INPUT_IDS).logits, model(input_ids=INPUT_IDS).logits)


def load_file_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint."""
    shards = [load_file(path) for path in folder.glob("model-*.safetensors")]
    return {key: tensor for shard in shards for key, tensor in shard.items()}


# What is refused before the first write


def refused(
    edit: Edit,
    source: Path,
    error: type[Exception],
    match: str,
    *,
    folder: Path,
    modes: tuple[bool, ...] = (False, True),
) -> None:
    """Both ways of writing raise, and nothing below `folder` has changed."""
    before = everything_below(folder)
    for in_place in modes:
        with pytest.raises(error, match=match):
            edit.write(source, None if in_place else folder / "target", in_place=in_place)
        assert everything_below(folder) == before


def test_wrong_shapes(make_model: Build, tmp_path: Path) -> None:
    """Of the last module too; a transposed shift is a wrong shape as well."""
    model = make_model()
    source = save(model, tmp_path / "source")
    edit = edit_for(model)
    last = list(edit.shifts)[-1]
    for shape in ((7, 32), edit.shifts[last].T.shape):
        wrong = Edit({**edit.shifts, last: torch.zeros(shape)}, fan_in_fan_out=edit.fan_in_fan_out)
        refused(
            wrong, source, ModelMismatchError, rf"{last}\S* holds a weight of shape .*another model", folder=tmp_path
        )


def test_a_module_that_is_not_there(make_model: Build, tmp_path: Path) -> None:
    """A smaller model of the same family."""
    model = make_model()
    source = save(model, tmp_path / "source")
    edit = edit_for(model, layers=(1, 7))
    refused(edit, source, ModelMismatchError, r"no tensor for .*7\..*another model", folder=tmp_path)


def test_an_edit_without_shifts(make_llama: Build, tmp_path: Path) -> None:
    """Its record would name no tensors, and look damaged."""
    source = save(make_llama(), tmp_path / "source")
    refused(Edit({}), source, ModelMismatchError, "The edit has no shifts", folder=tmp_path)


def test_an_edited_weight_that_overflows(make_model: Build, tmp_path: Path) -> None:
    """Found when the second layer is computed; the first is not kept either."""
    model = make_model(torch.float16)
    source = save(model, tmp_path / "source")
    shifts = dict(edit_for(model).shifts)
    last = list(shifts)[-1]
    shifts[last][2, 5] = 1e6
    edit = Edit(shifts, fan_in_fan_out=edit_for(model).fan_in_fan_out)
    refused(
        edit, source, NumericalError, rf"{last}: the edited weight is not finite in torch\.float16", folder=tmp_path
    )


def with_tensors(source: Path, **tensors: Tensor) -> Path:
    """A checkpoint with other or additional tensors."""
    path = source / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_weights(make_llama: Build, dtype: torch.dtype, tmp_path: Path) -> None:
    """Their numbers mean nothing without scales that lie elsewhere."""
    model = make_llama()
    edit = edit_for(model)
    key = list(edit.shifts)[-1] + ".weight"
    source = with_tensors(save(model, tmp_path / "source"), **{key: model.state_dict()[key].to(dtype)})
    refused(
        edit, source, CheckpointError, rf"holds {key} in [A-Z0-9_]+ of shape .*, which cannot take", folder=tmp_path
    )


FLOAT_8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOAT_8)
def test_float8_without_scales(make_llama: Build, dtype: torch.dtype, tmp_path: Path) -> None:
    """A cast, not a quantisation: the sum is rounded once, and the report says what that costs."""
    model = make_llama()
    edit = edit_for(model)
    name = list(edit.shifts)[-1]
    weight = model.state_dict()[f"{name}.weight"].to(dtype)
    source = with_tensors(save(model, tmp_path / "source"), **{f"{name}.weight": weight})
    report = edit.write(source, tmp_path / "target")
    found = load_file(tmp_path / "target" / "model.safetensors")[f"{name}.weight"]
    expected = (weight.float() + edit.shifts[name].T).to(dtype)
    assert bits(found) == bits(expected)
    lost = (expected.double() - weight.double() - edit.shifts[name].T.double()).norm() / edit.shifts[
        name
    ].double().norm()
    assert report.rounding[name] == pytest.approx(float(lost), rel=1e-5)
    assert report.rounding[name] > 100 * report.rounding[next(iter(edit.shifts))]  # which is stored in float32


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "input_scale", "scales"])
def test_float8_with_scales(make_llama: Build, scale: str, tmp_path: Path) -> None:
    """The weight is the product of two tensors, and a shift for it is not one for its first factor."""
    model = make_llama()
    edit = edit_for(model)
    name = list(edit.shifts)[-1]
    weight = model.state_dict()[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors = {f"{name}.weight": weight, f"{name}.{scale}": torch.ones(())}
    source = with_tensors(save(model, tmp_path / "source"), **tensors)
    refused(edit, source, CheckpointError, rf"in F8_E4M3 .*, with {name}\.{scale}, which cannot take", folder=tmp_path)


def test_a_scale_of_another_layer_is_none(make_llama: Build, tmp_path: Path) -> None:
    """Such as the learned scale of a layer whose name begins alike."""
    model = make_llama()
    edit = edit_for(model)
    source = with_tensors(save(model, tmp_path / "source"), **{f"{next(iter(edit.shifts))}2.scale": torch.ones(3)})
    edit.write(source, tmp_path / "target")


# Failures half-way


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["rows", "write_rows"])
def test_a_failure_half_way_leaves_no_trace(
    make_model: Build,
    step: str,
    error: type[BaseException],
    in_place: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk or Ctrl-C at the second tensor: no output folder, no temporary one, the source as it was."""
    model = make_model()
    source = save(model, tmp_path / "source", sharded=True)
    before = everything_below(tmp_path)
    real, calls = getattr(TensorEntry, step), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error("no space left")
        return real(*args)

    monkeypatch.setattr(TensorEntry, step, failing)
    expected = CheckpointWriteError if error is OSError else error
    with pytest.raises(expected, match="no space left"):
        edit_for(model).write(source, None if in_place else tmp_path / "target", in_place=in_place)
    assert len(calls) == 2
    assert everything_below(tmp_path) == before


def test_a_disk_without_space(make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before anything is written, with what is needed and what there is."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    refused(edit_for(model), source, CheckpointWriteError, r"needs .* MiB .* has 0 MiB free.*free some space",
            folder=tmp_path)  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_changes_while_it_is_read(
    make_llama: Build, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that still runs, say. Its bytes stay, and no edit is written over them."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    real = hf_malmen.history.write_entries

    def meanwhile(path: Path, *args: Any) -> Any:
        file = (source if in_place else path.parents[2]) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
        return real(path, *args)

    monkeypatch.setattr(hf_malmen.history, "write_entries", meanwhile)
    names = sorted(path.name for path in tmp_path.iterdir())
    before = files_of(source)
    with pytest.raises(CheckpointError, match=r"changed while they were read\. Try again"):
        edit_for(model).write(source, None if in_place else tmp_path / "target", in_place=in_place)
    after = files_of(source)
    weights = before["model.safetensors"]
    expected = weights[:-1] + bytes([weights[-1] ^ 1]) if in_place else weights
    assert after == before | {"model.safetensors": expected}
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("moment", [1, 4, 7])
@pytest.mark.parametrize("other", ["write", "undo"])
@pytest.mark.parametrize("operation", ["write", "copy"])
def test_another_writer_in_the_middle_of_a_copy(
    operation: str, other: str, moment: int, make_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the copy would be of the weights before it: nothing is left, and the next try has all of it."""
    model = make_llama()
    source, target = save(model, tmp_path / "source", sharded=True), tmp_path / "target"
    if other == "undo":
        edit_for(model, layers=(0, 3)).write(source, in_place=True)
    real, calls, found = hf_malmen.copies._copy, [], {}

    def meanwhile(file: Path, place: Path, **options: Any) -> str:
        calls.append(file)
        if len(calls) == moment:
            if other == "write":
                edit_for(model, layers=(0, 3)).write(source, in_place=True)
            else:
                undo_edit(source)
            found.update(everything_below(source))
        return real(file, place, **options)

    def act() -> None:
        if operation == "write":
            edit_for(model, layers=(1,)).write(source, target)
        else:
            copy_checkpoint(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.copies, "_copy", meanwhile)
        with pytest.raises(CheckpointError, match=r"source changed while they were read\. Try again"):
            act()
    assert len(calls) >= moment
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert everything_below(source) == found
    act()
    assert everything_below(source) == found
    assert len(read_history(target)) == (other == "write") + (operation == "write")
    if operation == "copy":
        assert everything_below(target) == found


@pytest.mark.parametrize("n_edits", [0, 1])
@pytest.mark.parametrize("leftover", [".preparing", ".closed", ".dropped"])
def test_what_a_dead_writer_left_is_not_copied(leftover: str, n_edits: int, make_llama: Build, tmp_path: Path) -> None:
    """Of its preparations, or of what it was done with; the source keeps it."""
    model = make_llama()
    source, clean = save(model, tmp_path / "source"), save(model, tmp_path / "clean")
    for folder in (source, clean)[: 2 * n_edits]:
        edit_for(model, layers=(0,)).write(folder, in_place=True)
    place = source / "edits" / leftover / "replacing"
    place.mkdir(parents=True)
    (place / "originals.safetensors").write_bytes(b"half of")
    before = everything_below(source)
    edit_for(model).write(source, tmp_path / "target")
    edit_for(model).write(clean, tmp_path / "expected")
    assert everything_below(tmp_path / "target").keys() == everything_below(tmp_path / "expected").keys()
    assert len(read_history(tmp_path / "target")) == n_edits + 1
    copy_checkpoint(source, tmp_path / "copy")
    assert everything_below(tmp_path / "copy").keys() == everything_below(clean).keys()
    assert everything_below(source) == before


@pytest.mark.parametrize(
    ("where", "last"),
    [*(("new", n) for n in (1, 2, 3)), *(("empty", n) for n in (3, 5, 8)), ("in place", 1), ("in place", 2)],
)
def test_a_failure_of_the_last_step(
    make_llama: Build, where: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what is finished cannot take its place, in any of the renames that bring it there."""
    model = make_llama()
    source, in_place = save(model, tmp_path / "source"), where == "in place"
    if where == "empty":
        (tmp_path / "target").mkdir()
    before = everything_below(tmp_path)
    real, n_calls = os.replace, 0

    def failing(*args: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == last:
            raise PermissionError("not allowed")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(CheckpointWriteError, match=r"Could not write .*not allowed"):
            edit_for(model).write(source, None if in_place else tmp_path / "target", in_place=in_place)
    assert n_calls >= last
    assert everything_below(tmp_path) == before


def test_what_is_no_file_is_not_copied(make_llama: Build, tmp_path: Path) -> None:
    """A pipe would keep the copy waiting, and a link to nothing has nothing to copy."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    for make in (os.mkfifo, lambda path: path.symlink_to("missing")):
        make(source / "notes")
        with pytest.raises(CheckpointError, match=r"notes is no file, or a link to none, and cannot be copied"):
            edit_for(model).write(source, tmp_path / "target")
        (source / "notes").unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_elsewhere_is_not_copied(make_llama: Build, tmp_path: Path) -> None:
    """A link to one may lead to anybody's files."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (source / "notes").symlink_to("../elsewhere")
    refused(edit_for(model), source, CheckpointError, "notes is a symbolic link to .*cp -rL", folder=tmp_path,
            modes=(False,))  # fmt: skip


def test_weights_that_are_not_edited_are_not_copied(
    make_llama: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever loads them would not have the edit. Where they are the weights that are edited, they are."""
    model = make_llama()
    edit = edit_for(model)
    source = save(model, tmp_path / "source")
    edit.write(source, tmp_path / "expected")
    for name in ("pytorch_model.bin", "consolidated.00.safetensors", "original/model.pth"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / "model.safetensors", source / name)
    edit.write(source, tmp_path / "target")
    assert files_of(tmp_path / "target").keys() == files_of(tmp_path / "expected").keys()
    assert "consolidated.00.safetensors, original, pytorch_model.bin" in caplog.text
    edit.write(source / "consolidated.00.safetensors", tmp_path / "lone")
    index = {"weight_map": dict.fromkeys(model.state_dict(), "consolidated.00.safetensors")}
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    edit.write(source, tmp_path / "indexed")
    for folder in ("lone", "indexed"):
        found = (tmp_path / folder / "consolidated.00.safetensors").read_bytes()
        assert found == (tmp_path / "expected" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "sub/spiece.bin", "2_Dense/pytorch_model.bin", "notes/original/a.txt", "vad.onnx"]
)
def test_what_only_looks_like_other_weights_is_copied(make_llama: Build, name: str, tmp_path: Path) -> None:
    model = make_llama()
    source = save(model, tmp_path / "source")
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text("x", encoding="utf-8")
    edit_for(model).write(source, tmp_path / "target")
    assert (tmp_path / "target" / name).read_text(encoding="utf-8") == "x"


def test_the_tensor_index_of_a_folder(make_llama: Build, tmp_path: Path) -> None:
    """Every tensor with its file, dtype, shape and place, as the library reads them."""
    source = save(make_llama(torch.bfloat16), tmp_path / "source", sharded=True)
    found = read_tensor_index(source)
    expected = load_file_shards(source)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        place = found[key]
        assert (place.dtype, place.shape) == ("BF16", tuple(tensor.shape))
        assert place.file.read_bytes()[place.begin : place.end] == bits(tensor)
        assert torch.equal(place.read(), tensor)
