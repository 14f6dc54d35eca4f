"""`Edit.write`: an edited safetensors checkpoint, compared byte by byte with the original and with a plain reload."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import hf_malmen.checkpoint
from hf_malmen import CheckpointError, Edit, Fact, ModelMismatchError, NumericalError
from hf_malmen.mapping import find_key
from hf_malmen.shards import read_header, read_tensor_index

Build = Callable[..., Any]
Header = dict[str, Any]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHARD_SIZE = {torch.float64: "90KB", torch.float32: "45KB", torch.bfloat16: "25KB", torch.float16: "25KB"}
INPUT_IDS = torch.tensor([[5, 40, 7, 300, 22, 22, 9]])


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request: pytest.FixtureRequest, make_llama: Build, make_gpt2: Build) -> Build:
    """A builder of tiny models, for each weight layout."""
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]


def save(model: PreTrainedModel, folder: Path, *, sharded: bool = False) -> Path:
    """A checkpoint with the other files that real ones have."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE[model.dtype] if sharded else "5GB")
    (folder / "README.md").write_text("A model.\n", encoding="utf-8")
    (folder / "original").mkdir()
    (folder / "original" / "weights.pth").write_bytes(b"\x00\x01weights")
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
    """Headers, other tensors and other files are the same bytes; edited tensors are W + S, rounded once."""
    model = make_model(dtype)
    source, target = save(model, tmp_path / "source", sharded=sharded), tmp_path / "new" / "target"
    before = files_of(source)
    assert (len([name for name in before if name.endswith(".safetensors")]) > 2) == sharded
    edit = edit_for(model)

    report = edit.write(source, target)

    assert files_of(source) == before
    after = files_of(target)
    assert after.keys() == before.keys()
    changed = set()
    for name, data in after.items():
        if not name.endswith(".safetensors"):
            assert data == before[name], name
            continue
        header, tensors = split_file(data)
        old_header, old_tensors = split_file(before[name])
        assert header == old_header
        changed |= {key for key in tensors if tensors[key] != old_tensors[key]}
        for key in changed & tensors.keys():
            weight = load_file(source / name)[key]
            shift = edit.shifts[key.removesuffix(".weight")]
            oriented = shift if edit.fan_in_fan_out else shift.T
            wide = torch.promote_types(dtype, torch.float32)
            edited = (weight.to(wide) + oriented.to(wide)).to(dtype)
            assert tensors[key] == bits(edited)
            rounding = (edited.double() - weight.double() - oriented.double()).norm() / oriented.double().norm()
            assert report.rounding[key.removesuffix(".weight")] == pytest.approx(float(rounding), rel=1e-9)
    assert changed == {f"{name}.weight" for name in edit.shifts}
    assert report.output_dir == target
    assert report.keys == {name: f"{name}.weight" for name in edit.shifts}
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
    assert files_of(source) == files_of(tmp_path / "target")


@pytest.mark.parametrize("bare_checkpoint", [True, False])
def test_a_bare_model_and_a_head_model_fit_each_other(make_model: Build, bare_checkpoint: bool, tmp_path: Path) -> None:
    """A checkpoint of the model without its head names its tensors without a prefix; either way they are found."""
    model = make_model()
    edit = edit_for(model)
    prefix = model.base_model_prefix + "."
    if not bare_checkpoint:
        edit.shifts = {name.removeprefix(prefix): shift for name, shift in edit.shifts.items()}
        edit.fan_in_fan_out = [name.removeprefix(prefix) for name in edit.fan_in_fan_out]
    saved = model.base_model if bare_checkpoint else model
    source = save(saved, tmp_path / "source")
    report = edit.write(source, tmp_path / "target")
    for name, key in report.keys.items():
        assert key == (f"{name}.weight".removeprefix(prefix) if bare_checkpoint else f"{prefix}{name}.weight")
    reloaded = AutoModel.from_pretrained(tmp_path / "target")
    edit.apply_to(model if bare_checkpoint else model.base_model)
    with torch.no_grad():
        expected = model.base_model(input_ids=INPUT_IDS).last_hidden_state
        assert torch.equal(reloaded(input_ids=INPUT_IDS).last_hidden_state, expected)


def test_find_key() -> None:
    """The name itself wins; otherwise a unique name with or without a prefix; otherwise an error."""
    assert find_key("h.1.mlp", dict.fromkeys(["h.1.mlp.weight", "a.h.1.mlp.weight"])) == "h.1.mlp.weight"
    assert find_key("a.h.1.mlp", dict.fromkeys(["h.1.mlp.weight", "h.11.mlp.weight"])) == "h.1.mlp.weight"
    assert find_key("h.1.mlp", dict.fromkeys(["a.h.1.mlp.weight", "a.h.11.mlp.weight"])) == "a.h.1.mlp.weight"
    with pytest.raises(ModelMismatchError, match=r"more than one tensor for h\.1\.mlp\.weight: a\.h\.1"):
        find_key("h.1.mlp", dict.fromkeys(["a.h.1.mlp.weight", "b.h.1.mlp.weight"]))
    for keys in ([], ["h.11.mlp.weight"], ["h.1.mlp.bias"], ["xh.1.mlp.weight"]):
        with pytest.raises(ModelMismatchError, match=r"has no tensor for h\.1\.mlp\.weight\. .*another model"):
            find_key("h.1.mlp", dict.fromkeys(keys))


# In place


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_in_place_equals_the_copy(make_model: Build, sharded: bool, tmp_path: Path) -> None:
    """The same bytes as in a copy, no folder beside them, and a file without edited tensors is not even rewritten."""
    model = make_model()
    source = save(model, tmp_path / "source", sharded=sharded)
    edit = edit_for(model, layers=(3,))
    edit.write(source, tmp_path / "target")
    inodes = {path.name: path.stat().st_ino for path in source.iterdir()}
    report = edit.write(source, in_place=True)
    assert report.output_dir == source
    assert everything_below(source) == everything_below(tmp_path / "target")
    rewritten = {name for name, inode in inodes.items() if (source / name).stat().st_ino != inode}
    assert len(rewritten) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
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


def test_an_empty_output_folder_is_used(make_llama: Build, tmp_path: Path) -> None:
    """As `mkdir` leaves it."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    (tmp_path / "target").mkdir()
    edit_for(model).write(source, tmp_path / "target")
    assert files_of(tmp_path / "target").keys() == files_of(source).keys()


@pytest.mark.parametrize("inside", ["edited", "original/edited"])
def test_an_output_folder_inside_the_checkpoint(make_llama: Build, inside: str, tmp_path: Path) -> None:
    """The copy would contain itself."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"lies inside of .*source.*Choose another output_dir"):
        edit_for(model).write(source, source / inside)
    assert everything_below(tmp_path) == before


def test_a_folder_of_links_is_never_edited_in_place(make_llama: Build, tmp_path: Path) -> None:
    """The Hub's shared cache looks like that: other models read the same files. A copy has files of its own."""
    model = make_llama()
    blobs, snapshot = save(model, tmp_path / "blobs"), tmp_path / "snapshot"
    shutil.copytree(blobs, snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "model.safetensors")
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"symbolic links, as the Hub's shared cache does.*Use output_dir"):
        edit_for(model).write(snapshot, in_place=True)
    assert everything_below(tmp_path) == before

    edit_for(model).write(snapshot, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))
    edit_for(model).write(blobs, tmp_path / "direct")
    assert files_of(tmp_path / "target") == files_of(tmp_path / "direct")
    assert files_of(blobs) == {
        name.removeprefix("blobs/"): data for name, data in before.items() if name.startswith("blobs/") and data
    }


def test_a_checkpoint_that_is_not_there(make_llama: Build, tmp_path: Path) -> None:
    """In place there has to be a folder; a file is not one."""
    edit = edit_for(make_llama())
    with pytest.raises(
        CheckpointError, match=r"There is no folder org/model\. A checkpoint from the Hub is never edited"
    ):
        edit.write("org/model", in_place=True)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file; expected the folder of a checkpoint"):
        edit.write(tmp_path / "model.safetensors", tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        edit.write(tmp_path / "empty", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model.safetensors"]


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
        edit.shifts[last] = torch.zeros(shape)
        refused(edit, source, ModelMismatchError, rf"{last}\.weight has the shape .*another model", folder=tmp_path)


def test_a_module_that_is_not_there(make_model: Build, tmp_path: Path) -> None:
    """A smaller model of the same family."""
    model = make_model()
    source = save(model, tmp_path / "source")
    edit = edit_for(model, layers=(1, 7))
    refused(edit, source, ModelMismatchError, r"no tensor for .*7\..*another model", folder=tmp_path)


def test_an_edited_weight_that_overflows(make_model: Build, tmp_path: Path) -> None:
    """Found when the second layer is computed; the first is not kept either."""
    model = make_model(torch.float16)
    source = save(model, tmp_path / "source")
    edit = edit_for(model)
    last = list(edit.shifts)[-1]
    edit.shifts[last][2, 5] = 1e6
    refused(
        edit, source, NumericalError, rf"{last}: the edited weight is not finite in torch\.float16", folder=tmp_path
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights(make_llama: Build, dtype: torch.dtype, tmp_path: Path) -> None:
    """Their numbers mean nothing without scales that lie elsewhere."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    edit = edit_for(model)
    key = list(edit.shifts)[-1] + ".weight"
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, source / "model.safetensors")
    refused(edit, source, CheckpointError, rf"holds {key} in [A-Z0-9_]+, which cannot take", folder=tmp_path)


# Failures half-way


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["read", "write"])
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
    entry = hf_malmen.checkpoint.TensorEntry
    real, calls = getattr(entry, step), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error("no space left")
        return real(*args)

    monkeypatch.setattr(entry, step, failing)
    with pytest.raises(error, match="no space left"):
        edit_for(model).write(source, None if in_place else tmp_path / "target", in_place=in_place)
    assert len(calls) == 2
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("in_place", [False, True])
def test_a_failure_of_the_last_step(
    make_llama: Build, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the finished copy cannot take its place."""
    model = make_llama()
    source = save(model, tmp_path / "source")
    before = everything_below(tmp_path)

    def failing(*_: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(PermissionError, match="not allowed"):
        edit_for(model).write(source, None if in_place else tmp_path / "target", in_place=in_place)
    assert everything_below(tmp_path) == before


# Hostile files: everything in a checkpoint is input


def safetensors(header: Header | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A file with this header and data, which may lie about its length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: Any, end: Any, shape: Any = (2, 3), dtype: Any = "F32") -> Header:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DATA = bytes(range(48))
GOOD: Header = {"a.weight": entry(0, 24), "b.weight": entry(24, 48)}
HOSTILE: dict[str, bytes] = {
    "an empty file": b"",
    "a few bytes": b"\x10\x00\x00",
    "a header cut off": safetensors(GOOD, DATA)[:40],
    "data cut off": safetensors(GOOD, DATA)[:-1],
    "data left over": safetensors(GOOD, DATA + b"x"),
    "a header longer than the file": safetensors(GOOD, DATA, length=10_000),
    "a header of 2^64 bytes": safetensors(GOOD, DATA, length=2**64 - 1),
    "a header of 0 bytes": safetensors(GOOD, DATA, length=0),
    "a header cut short by its length": safetensors(GOOD, DATA, length=20),
    "no JSON": safetensors(b"{oops}", DATA),
    "no UTF-8": safetensors(b'{"\xff": 1}', DATA),
    "a list": safetensors(b"[]", b""),
    "a number": safetensors(b"3", b""),
    "nested too deep": safetensors(b"[" * 200_000, DATA),
    "a number of 5000 digits": safetensors(b'{"a.weight": ' + b"9" * 5000 + b"}", DATA),
    "a key twice": safetensors(
        b'{"a.weight": %s, "a.weight": %s}' % tuple(json.dumps(value).encode() for value in GOOD.values()), DATA
    ),
    "a field of an entry twice": safetensors(
        b'{"a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], "shape": [3, 2]}}', DATA[:24]
    ),
    "overlapping tensors": safetensors({"a.weight": entry(0, 24), "b.weight": entry(12, 36)}, DATA[:36]),
    "the same bytes twice": safetensors({"a.weight": entry(0, 24), "b.weight": entry(0, 24)}, DATA[:24]),
    "a hole": safetensors({"a.weight": entry(0, 24), "b.weight": entry(28, 52)}, DATA + b"1234"),
    "a hole at the start": safetensors({"a.weight": entry(4, 28)}, DATA[:28]),
    "offsets past the end": safetensors({"a.weight": entry(0, 24), "b.weight": entry(24, 2**40)}, DATA),
    "offsets backwards": safetensors({"a.weight": entry(24, 0)}, DATA[:24]),
    "negative offsets": safetensors({"a.weight": entry(-24, 0)}, DATA[:24]),
    "offsets that are no integers": safetensors({"a.weight": entry(0.0, 24.0)}, DATA[:24]),
    "offsets that are truth values": safetensors({"a.weight": entry(False, True, (1,), "U8")}, DATA[:1]),
    "three offsets": safetensors({"a.weight": entry(0, 24) | {"data_offsets": [0, 24, 24]}}, DATA[:24]),
    "a shape larger than its bytes": safetensors({"a.weight": entry(0, 24, (2, 4))}, DATA[:24]),
    "a shape smaller than its bytes": safetensors({"a.weight": entry(0, 24, (2, 2))}, DATA[:24]),
    "a negative shape": safetensors({"a.weight": entry(0, 24, (-2, -3))}, DATA[:24]),
    "a shape that is no list": safetensors({"a.weight": entry(0, 24, 6)}, DATA[:24]),
    "an unknown dtype": safetensors({"a.weight": entry(0, 24, dtype="F99")}, DATA[:24]),
    "a dtype that is a list": safetensors({"a.weight": entry(0, 24, dtype=["F32"])}, DATA[:24]),
    "no dtype": safetensors({"a.weight": {"shape": [2, 3], "data_offsets": [0, 24]}}, DATA[:24]),
    "an entry that is no object": safetensors({"a.weight": [0, 24]}, DATA[:24]),
}


def small_edit() -> Edit:
    """For the tensors of the files above."""
    return random_edit(["a"], (3, 2), flipped=False)


def test_the_files_below_are_hostile_in_one_way_only(tmp_path: Path) -> None:
    """What they are made from is a sound checkpoint, by our reader and by the library's."""
    path = tmp_path / "source" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(safetensors(GOOD | {"__metadata__": {"format": "pt"}}, DATA))
    assert set(load_file(path)) == {"a.weight", "b.weight"} == set(read_header(path))
    small_edit().write(path.parent, tmp_path / "target")
    assert torch.equal(load_file(tmp_path / "target" / "model.safetensors")["b.weight"], load_file(path)["b.weight"])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header(name: str, tmp_path: Path) -> None:
    """A `CheckpointError` that names the file, and nothing is written anywhere."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(HOSTILE[name])
    refused(small_edit(), source, CheckpointError, r"model\.safetensors", folder=tmp_path)


def shards(folder: Path, weight_map: Any, **files: bytes) -> Path:
    """A sharded checkpoint."""
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    index = (
        weight_map if isinstance(weight_map, bytes) else json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    )
    (folder / "model.safetensors.index.json").write_bytes(index)
    return folder


A, B = safetensors({"a.weight": entry(0, 24)}, DATA[:24]), safetensors({"b.weight": entry(0, 24)}, DATA[24:])


@pytest.mark.parametrize("outside", ["../outside.safetensors", "sub/one.safetensors", "/absolute", "..", "", "one.bin"])
def test_an_index_that_points_elsewhere(outside: str, tmp_path: Path) -> None:
    """A shard is a file of its own folder; a path that leads out of it would be written to in place."""
    secret = tmp_path / "outside.safetensors"
    secret.write_bytes(A)
    outside = str(secret) if outside == "/absolute" else outside
    source = shards(tmp_path / "source", {"a.weight": outside, "b.weight": "two.safetensors"}, one=A, two=B)
    (source / "sub").mkdir()
    (source / "sub" / "one.safetensors").write_bytes(A)
    (source / "one.bin").write_bytes(A)
    refused(small_edit(), source, CheckpointError, "names the shard .*; expected a file of its own", folder=tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "one.safetensors", "b.weight": "three.safetensors"}, r"There is no file .*three\.safetensors"),
        ({"a.weight": "one.safetensors", "c.weight": "two.safetensors"}, r"lists 'c\.weight', which no shard holds"),
        ({"a.weight": "two.safetensors", "b.weight": "two.safetensors"}, r"'a\.weight'"),
        ({"a.weight": "one.safetensors", "b.weight": "one.safetensors"}, r"'b\.weight'"),
        ({}, "has no weight_map"),
        (["one.safetensors"], "has no weight_map"),
        (b"{}", "has no weight_map"),
        (b"[]", "holds a JSON list; expected an object"),
        (b"{", "does not hold valid JSON"),
        (
            b'{"weight_map": {"a.weight": "one.safetensors", "a.weight": "two.safetensors"}}',
            r"json names a key twice\.",
        ),
    ],
)
def test_a_damaged_index(weight_map: Any, message: str, tmp_path: Path) -> None:
    """Missing shards, tensors that no shard holds or another one than said, and broken JSON."""
    source = shards(tmp_path / "source", weight_map, one=A, two=B)
    refused(small_edit(), source, CheckpointError, message, folder=tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which of them is loaded depends on the reader, so none is edited."""
    both = safetensors(GOOD, DATA)
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    source = shards(tmp_path / "source", weight_map, one=A, two=both)
    refused(small_edit(), source, CheckpointError, r"'a\.weight' .*one\.safetensors.*two\.safetensors", folder=tmp_path)


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
        assert torch.equal(place.read(key), tensor)
