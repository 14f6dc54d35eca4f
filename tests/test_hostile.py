"""Hostile checkpoints: headers, indexes, records and journals that lie. Everything on disk is input.

Whatever it holds: an error of this package that says what is wrong, and nothing is written, anywhere.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file

import hf_malmen.history
from hf_malmen import CheckpointError, Edit, HfMalmenError
from hf_malmen.history import recover_checkpoint, undo_edit
from hf_malmen.records import read_history
from hf_malmen.shards import read_header, read_tensor_index

Header = dict[str, Any]
State = dict[str, bytes | None]

# The same examples in every run: a test that fails now and then is read by nobody.
FUZZ = settings(max_examples=200, derandomize=True, deadline=None, database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip


def state(folder: Path) -> State:
    """{relative path: its bytes, or where it links to, or None for a folder} of everything below a folder."""
    found: State = {}
    for path in folder.rglob("*"):
        content = str(path.readlink()).encode() if path.is_symlink() else None
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() and content is None else content
    return found


def refused(edit: Edit, source: Path, error: type[Exception], match: str, *, folder: Path) -> None:
    """Both ways of writing raise, and nothing below `folder` has changed."""
    before = state(folder)
    for in_place in (False, True):
        with pytest.raises(error, match=match):
            edit.write(source, None if in_place else folder / "target", in_place=in_place)
        assert state(folder) == before


# Headers


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
    "a shape that is an object": safetensors({"a.weight": entry(0, 4, {})}, DATA[:4]),
    "a shape of 65 dimensions": safetensors({"a.weight": entry(0, 4, [1] * 65)}, DATA[:4]),
    "a shape of huge numbers": safetensors({"a.weight": entry(0, 24, [10**4000] * 1000)}, DATA[:24]),
    "a shape of 2^63": safetensors({"a.weight": entry(0, 0, [2**63, 0])}, b""),
    "six bits that fill no byte": safetensors({"a.weight": entry(0, 1, (1, 1), "F6_E2M3")}, DATA[:1]),
    "a dtype that is a list": safetensors({"a.weight": entry(0, 24, dtype=["F32"])}, DATA[:24]),
    "no dtype": safetensors({"a.weight": {"shape": [2, 3], "data_offsets": [0, 24]}}, DATA[:24]),
    "metadata that is no object": safetensors(GOOD | {"__metadata__": ["pt"]}, DATA),
    "metadata that is no text": safetensors(GOOD | {"__metadata__": {"format": 1}}, DATA),
    "an entry that is no object": safetensors({"a.weight": [0, 24]}, DATA[:24]),
}


def small_edit(scale: float = 1.0) -> Edit:
    """For the tensors of the files above; of another scale it is another edit."""
    return Edit({"a": scale * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])})


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


# Indexes


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


@pytest.mark.parametrize(
    "outside",
    [
        "../outside.safetensors",
        "sub/one.safetensors",
        "/absolute",
        "..",
        "",
        "one.bin",
        "../source/one.safetensors",
        "./one.safetensors",
    ],
)
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
        ({"a.weight": "one.safetensors", "b.weight": "x" * 300 + ".safetensors"}, "There is no file .*xxx"),
        ({"a.weight": "one.safetensors", "b.weight": "\0.safetensors"}, "There is no file"),
        ({"a.weight": "one.safetensors", "b.weight": "\ud800.safetensors"}, "There is no file"),
        ({"a.weight": "one.safetensors", "b.weight": ["two.safetensors"]}, "names the shard"),
        ({"a.weight": "one.safetensors", "b.weight": None}, "names the shard"),
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


@pytest.mark.parametrize("link", ["../outside.safetensors", "absolute", "../../blobs/0123"])
def test_a_shard_that_is_a_link(link: str, tmp_path: Path) -> None:
    """Out of the folder; also one that looks like the Hub's cache, but lies in no snapshot."""
    for outside in (tmp_path / "outside.safetensors", tmp_path.parent / "blobs" / "0123"):
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes(B)
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    source = shards(tmp_path / "source", weight_map, one=A)
    (source / "two.safetensors").symlink_to(tmp_path / "outside.safetensors" if link == "absolute" else link)
    refused(small_edit(), source, CheckpointError, "symbolic link", folder=tmp_path)
    shutil.rmtree(tmp_path.parent / "blobs")


# Anything at all


TEXTS = st.sampled_from(["a.weight", "b.weight", "F32", "BF16", "I8", "one.safetensors", "../outside.safetensors",
                         "/etc/hostname", "..", ".", "", "\0", "\ud800", "x" * 5000, "0001", "0002", "../0001",
                         "model.safetensors", "__metadata__"])  # fmt: skip
NUMBERS = st.one_of(st.integers(-2, 50), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e300]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.text(max_size=5))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
                    max_leaves=6)  # fmt: skip


def mutate(draw: st.DrawFn, value: Any) -> Any:
    """The value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 9))
        rest = {other: item for other, item in value.items() if other != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {draw(TEXTS): value[key]}
        if kind == 2:
            return value | {draw(TEXTS): copy.deepcopy(value[key])}
        return value | {key: mutate(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [mutate(draw, item) if i == place else item for i, item in enumerate(value)]
    return draw(JSON)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        value = mutate(draw, value)
    return value


@st.composite
def spliced(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to three pieces cut out, put in or overwritten."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 20)))
        data = data[:begin] + draw(st.binary(max_size=8)) + data[end:]
    return data


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file with a header that lies, or bytes that lie, or no such file at all."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.binary(max_size=100))
    if kind == 1:
        return draw(spliced(safetensors(GOOD, DATA)))
    header = draw(mutated(GOOD))
    length = draw(st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1), st.integers(0, 300)))
    return safetensors(
        json.dumps(header).encode(), draw(st.sampled_from([DATA, DATA, DATA, DATA[:24], DATA[:-1], b""])), length=length
    )


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder of its own for each example, beside a file that nobody may touch; no power fails within it."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):
        (Path(folder) / "outside.safetensors").write_bytes(A)
        (Path(folder) / "source").mkdir()
        yield Path(folder)


def harmless(call: Callable[[], object], folder: Path) -> bool:
    """Whether a call succeeds; if not, it was this package's error, and nothing below the folder changed."""
    before = state(folder)
    try:
        call()
        return True
    except HfMalmenError:
        after = state(folder)
    assert after == before
    return False


def assert_only_a_is_edited(found: dict[str, bytes], before: dict[str, bytes]) -> None:
    """Of the tensors of a checkpoint, by the library's own reader."""
    assert found.keys() == before.keys()
    assert {key for key in found if found[key] != before[key]} <= {"a.weight"}


def by_the_library(data: bytes) -> dict[str, bytes]:
    """{key: bytes} of a safetensors file."""
    return {key: bytes(value["data"]) for key, value in deserialize(data)}


@FUZZ
@given(data=files(), in_place=st.booleans())
def test_any_file(data: bytes, in_place: bool) -> None:
    """It is edited as it should be, or refused; what we read, the library reads too, and alike."""
    with workplace() as folder:
        path = folder / "source" / "model.safetensors"
        path.write_bytes(data)
        if harmless(lambda: read_header(path), folder):
            entries = read_header(path)
            found = deserialize(data)
            assert {
                key: (entry.dtype, list(entry.shape), data[entry.begin : entry.end]) for key, entry in entries.items()
            } == {key: (value["dtype"], value["shape"], bytes(value["data"])) for key, value in found}
        target = None if in_place else folder / "target"
        if harmless(lambda: small_edit().write(path.parent, target, in_place=in_place), folder):
            written = (target or path.parent) / "model.safetensors"
            assert_only_a_is_edited(by_the_library(written.read_bytes()), by_the_library(data))
        assert (folder / "outside.safetensors").read_bytes() == A


def test_the_fuzzed_files_are_of_both_kinds() -> None:
    """Some are sound, most are not: else the test above would show little."""
    sound: list[bool] = []

    @FUZZ
    @given(data=files())
    def count(data: bytes) -> None:
        with workplace() as folder:
            (folder / "x.safetensors").write_bytes(data)
            sound.append(harmless(lambda: read_header(folder / "x.safetensors"), folder))
            try:
                deserialize(data)
            except SafetensorError:
                assert not sound[-1], "the library refuses it"

    count()
    assert 5 < sum(sound) < len(sound) / 2


INDEX = {"metadata": {"total_size": 48}, "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}


INDEXES = st.one_of(
    mutated(INDEX).map(lambda value: json.dumps(value).encode()),
    spliced(json.dumps(INDEX).encode()),
    st.binary(max_size=50),
)


@FUZZ
@given(index=INDEXES, in_place=st.booleans())
def test_any_index(index: bytes, in_place: bool) -> None:
    """It is believed only where the shards agree."""
    with workplace() as folder:
        shutil.rmtree(folder / "source")
        source = shards(folder / "source", index, one=A, two=B)
        target = None if in_place else folder / "target"
        if harmless(lambda: small_edit().write(source, target, in_place=in_place), folder):
            assert "a.weight" in read_tensor_index(target or source)
            assert ((target or source) / "two.safetensors").read_bytes() == B
        assert (folder / "outside.safetensors").read_bytes() == A


# Histories


def tree(folder: Path, content: State) -> None:
    """Write what `state` read."""
    for name, data in sorted(content.items()):
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


class Stopped(BaseException):
    """A process that dies."""


def died_in(step: str, call: Callable[[], object]) -> None:
    """Call, and die at a step of the journal's."""
    with mock.patch.object(hf_malmen.history, step, side_effect=Stopped), pytest.raises(Stopped):
        call()


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """Checkpoints with two edits in force: at rest, in the middle of a third, of an undo, and of a removal."""
    found: dict[str, State] = {}
    for name in ("at rest", "editing", "undoing", "removing"):
        folder = tmp_path_factory.mktemp("history")
        (folder / "model.safetensors").write_bytes(safetensors(GOOD, DATA[:24] + b"\0" * 24))
        (folder / "README.md").write_text("A model.\n", encoding="utf-8")
        for scale in (1.0, 2.0):
            small_edit(scale).write(folder, in_place=True)
        if name == "editing":
            with mock.patch.object(hf_malmen.history, "_replay", side_effect=Stopped):
                died_in("_replace_text", lambda folder=folder: small_edit(3.0).write(folder, in_place=True))
        elif name != "at rest":
            died_in("_replay", lambda folder=folder, name=name: undo_edit(folder, "1" if name == "removing" else None))
        found[name] = state(folder)
        assert ("edits/.journal" in found[name]) == (name != "at rest")
        assert ("edits/.journal/removal.json" in found[name]) == (name == "removing")
    return found


def load_and_write(record: Path) -> None:
    """An edit may come from anybody; what is wrong with it shows when it is loaded, or before it is written."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(safetensors(GOOD, DATA))
        Edit.from_pretrained(record).write(folder, in_place=True, on_fingerprint_mismatch="ignore")
        read_history(folder)


CALLS: dict[str, Callable[[Path], object]] = {
    "read": read_history,
    "recover": recover_checkpoint,
    "undo": undo_edit,
    "undo the first": lambda folder: undo_edit(folder, "1"),
    "edit": lambda folder: small_edit(4.0).write(folder, in_place=True),
    "copy": lambda folder: small_edit(4.0).write(folder, folder.parent / "target"),
    "load": lambda folder: [load_and_write(path) for path in (folder / "edits").glob("0*")],
}


@pytest.mark.parametrize("name", ["at rest", "editing", "undoing", "removing"])
def test_the_histories_are_sound(histories: dict[str, State], name: str, tmp_path: Path) -> None:
    """Before they are tampered with, every call succeeds, and undoing all of it gives back the first weights."""
    for call, function in CALLS.items():
        tree(tmp_path / "source", histories[name])
        if (name, call) != ("removing", "undo the first"):  # which is gone by then
            function(tmp_path / "source")
        shutil.rmtree(tmp_path / "source")
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
    tree(tmp_path / "source", histories[name])
    recover_checkpoint(tmp_path / "source")
    while read_history(tmp_path / "source"):
        undo_edit(tmp_path / "source")
    assert state(tmp_path / "source") == {
        "model.safetensors": safetensors(GOOD, DATA[:24] + b"\0" * 24), "README.md": b"A model.\n"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["at rest", "editing", "undoing", "removing"])
def test_any_history(histories: dict[str, State], name: str) -> None:
    """Records and journals that were tampered with: no call of ours crashes, or writes what it should not."""
    content = histories[name]
    ours = sorted(file for file, data in content.items() if file.startswith("edits") and data is not None)
    records = [file for file in ours if file.endswith(".json")]

    @FUZZ
    @given(data=st.data(), call=st.sampled_from(sorted(CALLS)))
    def check(data: st.DataObject, call: str) -> None:
        if data.draw(st.integers(0, 3)):
            file = data.draw(st.sampled_from(records))
            original = content[file]
            assert original is not None
            tampered = json.dumps(data.draw(mutated(json.loads(original)))).encode()
        else:
            file = data.draw(st.sampled_from(ours))
            tampered = data.draw(spliced(content[file] or b""))
        assume(tampered != content[file])
        with workplace() as folder:
            tree(folder / "source", content | {file: tampered})
            header = safetensors(GOOD, b"")
            if harmless(lambda: recover_checkpoint(folder / "source"), folder):  # which all of them would do first
                harmless(lambda: CALLS[call](folder / "source"), folder)
            after = (folder / "source" / "model.safetensors").read_bytes()
            assert len(after) == len(header) + 48
            assert after.startswith(header)
            assert after.endswith(b"\0" * 24), "a tensor that no edit names was written"
            assert (folder / "outside.safetensors").read_bytes() == A

    check()


@pytest.mark.parametrize("name", ["editing", "undoing", "removing"])
def test_recovery_writes_through_no_link(histories: dict[str, State], name: str, tmp_path: Path) -> None:
    """A folder that was linked after the process died: its twin keeps its bytes, and a symbolic link is refused."""
    tree(tmp_path / "source", histories[name])
    weights = tmp_path / "source" / "model.safetensors"
    os.link(weights, tmp_path / "twin")
    before = (tmp_path / "twin").read_bytes()
    recover_checkpoint(tmp_path / "source")
    assert (tmp_path / "twin").read_bytes() == before
    if name != "editing":  # which died before it had written anything
        assert weights.read_bytes() != before

    snapshot = tmp_path / "repo" / "snapshots" / "0123abc"
    tree(snapshot, histories[name])
    (tmp_path / "repo" / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "repo" / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert not harmless(lambda: recover_checkpoint(snapshot), tmp_path / "repo")


def test_the_history_of_a_checkpoint_in_the_hubs_cache(histories: dict[str, State], tmp_path: Path) -> None:
    """Every file of a snapshot is a link, also those of its folders; a copy of it keeps the history."""
    snapshot = tmp_path / "repo" / "snapshots" / "0123abc"
    tree(snapshot, histories["at rest"])
    (tmp_path / "repo" / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(tmp_path / "repo" / "blobs" / f"{number:040x}")
        path.symlink_to(os.path.relpath(tmp_path / "repo" / "blobs" / f"{number:040x}", path.parent))
    assert [record.originals().keys() for record in read_history(snapshot)] == [{"a.weight"}] * 2
    assert Edit.from_pretrained(snapshot / "edits" / "0002").shifts.keys() == {"a"}
    assert small_edit(3.0).write(snapshot, tmp_path / "target").edit_id == "0003"
    for _ in range(3):
        undo_edit(tmp_path / "target")
    assert state(tmp_path / "target") == {
        "model.safetensors": safetensors(GOOD, DATA[:24] + b"\0" * 24),
        "README.md": b"A model.\n",
    }
