"""Safetensors checkpoints as files: which tensor lies where. Nothing here writes, but into new files.

Everything in a checkpoint is input: headers and indexes are believed only as far as they agree with the files.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DAMAGED, CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# Bits a value of each dtype that a safetensors header can name.
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 64  # the limit of torch
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file.

    Attributes:
        file: the safetensors file.
        dtype: as the header names it, such as `"BF16"`.
        shape: the tensor's.
        begin, end: byte range in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def rows(self, stream: FileIO, start: int, stop: int) -> Tensor:
        """Rows of a matrix.

        Args:
            stream: the file, open without a buffer.
            start, stop: the first row, and the one after the last.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        width = (self.end - self.begin) // max(1, self.shape[0])
        data = bytearray((stop - start) * width)
        _read_into(stream, memoryview(data), self.begin + start * width)
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])

    def write_rows(self, stream: FileIO, start: int, data: memoryview) -> None:
        """Overwrite rows, from the `start`-th on, with these bytes."""
        stream.seek(self.begin + start * ((self.end - self.begin) // max(1, self.shape[0])))
        while data:
            data = data[stream.write(data) :]

    def read(self) -> Tensor:
        """The whole tensor."""
        with open(self.file, "rb", buffering=0) as stream:
            return self.rows(stream, 0, self.shape[0])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    values: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()  # a buffer, if not by its stubs
    return memoryview(values)


def check_editable(key: str, entry: TensorEntry, tensors: Mapping[str, Any]) -> None:
    """Refuse a tensor that cannot take a weight shift.

    Raises:
        CheckpointError: it is quantised: of another dtype, or with scales beside it.
    """
    stem = key.removesuffix(".weight")
    scales = [
        other for other in tensors if other.startswith((f"{stem}.", f"{stem}_")) and "scale" in other[len(stem) :]
    ]
    if entry.dtype not in DTYPES or len(entry.shape) != 2 or scales:
        raise CheckpointError(
            f"{entry.file.name} holds {key} in {entry.dtype} of shape {entry.shape}"
            f"{', with ' + scales[0] if scales else ''}, which cannot take a weight shift; expected a matrix in one of "
            f"{', '.join(DTYPES)}. Edit the unquantised checkpoint, or serve the edit as an adapter: edit.to_lora(...)."
        )


def copy_bytes(source: FileIO, target: FileIO, begin: int, end: int, at: int) -> None:
    """Copy the bytes from `begin` to `end` of one file to `at` in another, in the kernel where it can.

    Raises:
        CheckpointError: the source ends too early.
    """
    while begin < end:
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), end - begin, begin, at)
        except (AttributeError, OSError):  # another system, or a file system that cannot
            data = bytearray(min(end - begin, _CHUNK_BYTES))
            _read_into(source, memoryview(data), begin)
            target.seek(at)
            copied = target.write(data)
        if not copied:
            raise CheckpointError(f"{source.name!s} became shorter while it was read. Try again.")
        begin, at = begin + copied, at + copied


def write_entries(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Copy tensors, byte for byte, into a new safetensors file.

    Returns:
        Where they lie in it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, entry in entries.items():
        size = entry.end - entry.begin
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, position + size]}
        position += size
    raw_header = json.dumps(header).encode()
    raw_header += b" " * (-len(raw_header) % 8)
    start = 8 + len(raw_header)
    copies = {
        key: TensorEntry(path, entry.dtype, entry.shape, *(start + offset for offset in header[key]["data_offsets"]))
        for key, entry in entries.items()
    }
    with open(path, "xb", buffering=0) as target:
        target.write(len(raw_header).to_bytes(8, "little") + raw_header)
        for key, entry in entries.items():
            with open(entry.file, "rb", buffering=0) as source:
                copy_bytes(source, target, entry.begin, entry.end, copies[key].begin)
        os.fsync(target.fileno())
    return copies


def read_tensor_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder, by key.

    Raises:
        CheckpointError: no safetensors weights, or a damaged index or header.
    """
    index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.is_file():  # before shards, as transformers reads a folder that has both
        return read_header(single)
    if index_path.is_file():
        return _read_shards(index_path)
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has its weights in .bin files only, which are pickles and not read here. Convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}; expected a transformers checkpoint.")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header.

    Raises:
        CheckpointError: no such file, or a header that does not describe exactly what the file holds.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise CheckpointError(f"There is no file {path}. Download the checkpoint again.")
    if path.is_symlink() and not in_hub_cache(path):
        raise CheckpointError(
            f"{path} is a symbolic link to {os.readlink(path)}; a checkpoint's files lie in its own folder. Copy it "
            "with its contents first: cp -rL."
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is {size} bytes long and announces a header of {length}. It is truncated or no safetensors "
                "file; download it again."
            )
        header = parse_json(stream.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: its __metadata__ is no object of texts. {DAMAGED}")
    start = 8 + length
    entries: dict[str, TensorEntry] = {}
    for key, value in header.items():
        entries[key] = _parse_entry(path, key, value, start)
    position = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise CheckpointError(f"{path}: {key!r} begins at byte {entry.begin}, expected {position}. {DAMAGED}")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path} is {size} bytes long, and its header describes {position}. {DAMAGED}")
    return entries


def in_hub_cache(path: Path) -> bool:
    """Whether a file is one of the Hub's shared cache: below `snapshots/REVISION`, a link to a file in `blobs`."""
    return path.is_symlink() and any(
        folder.name == "snapshots" and path.resolve().is_relative_to((folder.parent / "blobs").resolve())
        for folder in path.absolute().parents
    )


def _read_shards(index_path: Path) -> dict[str, TensorEntry]:
    weight_map = parse_json(index_path.read_bytes(), index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map. Download the checkpoint again.")
    tensors: dict[str, TensorEntry] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        # The index is input: a shard name must stay a name, and never lead out of its folder.
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} names the shard {file_name!r}; expected a file of its own folder.")
        for key, entry in read_header(index_path.parent / file_name).items():
            if key in tensors:
                raise CheckpointError(
                    f"{index_path.parent} holds {key!r} twice, in {tensors[key].file.name} and {file_name}. "
                    "Download the checkpoint again."
                )
            tensors[key] = entry
    for key, file_name in weight_map.items():
        if key not in tensors:
            raise CheckpointError(f"{index_path} lists {key!r}, which no shard holds. Download it again.")
        if tensors[key].file.name != file_name:
            raise CheckpointError(
                f"{index_path} lists {key!r} in {file_name}, and it is in {tensors[key].file.name}. Download it again."
            )
    return tensors


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `path`.

    Raises:
        CheckpointError: no UTF-8, no JSON, no object, or a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path} names a key twice. It is damaged; download it again.")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number without end, or nested without end
        raise CheckpointError(f"{path} does not hold valid JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object. Download it again.")
    return value


def _parse_entry(path: Path, key: str, value: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
            raise TypeError(f"its shape is no list of up to {_MAX_DIMENSIONS} sizes")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise TypeError("negative, too large or not whole")
        bits = math.prod(shape) * _ITEM_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {key!r} is wrong ({error!r}). {DAMAGED}") from None
    if (end - begin) * 8 != bits:
        raise CheckpointError(f"{path}: {key!r} takes {end - begin} bytes, expected {bits // 8}. {DAMAGED}")
    return TensorEntry(path, dtype, tuple(shape), start + begin, start + end)


def _read_into(stream: FileIO, data: memoryview, position: int) -> None:
    stream.seek(position)
    while data:
        read = stream.readinto(data)
        if not read:
            raise CheckpointError(f"{stream.name!s} became shorter while it was read. Try again.")
        data = data[read:]
