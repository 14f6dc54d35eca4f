"""Weight shifts -> an edited safetensors checkpoint, without loading the model.

Only the bytes of the edited tensors change: headers, other tensors and other files stay as they are.
"""

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from .errors import CheckpointError, ModelMismatchError
from .weights import add_shift

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# What a checkpoint is made of on the Hub; its other files (original weights in other formats, say) are not fetched.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes a value of each dtype that a safetensors header can name.
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


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

    def read(self, key: str) -> Tensor:
        """The tensor itself.

        Raises:
            CheckpointError: its dtype cannot take a shift.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.file.name} holds {key} in {self.dtype}, which cannot take a weight shift; expected one of "
                f"{', '.join(_DTYPES)}. Edit the unquantised checkpoint."
            )
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            data = bytearray(stream.read(self.end - self.begin))
        return torch.frombuffer(data, dtype=_DTYPES[self.dtype]).reshape(self.shape)

    def write(self, tensor: Tensor) -> None:
        """Overwrite the tensor's bytes with those of one of the same shape and dtype."""
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        with self.file.open("r+b") as stream:
            stream.seek(self.begin)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


@dataclass
class WriteReport:
    """What `write_shifts` did.

    Attributes:
        output_dir: the edited checkpoint.
        keys: {module name: key of its weight in the checkpoint}.
        rounding: {module name: ‖written − (W + S)‖ / ‖S‖}, what the weight's dtype cost.
    """

    output_dir: Path
    keys: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)


def write_shifts(
    checkpoint: str | Path,
    shifts: Mapping[str, Tensor],
    *,
    fan_in_fan_out: Iterable[str] = (),
    output_dir: str | Path | None = None,
    in_place: bool = False,
) -> WriteReport:
    """Add weight shifts to the tensors of a checkpoint.

    A copy appears in `output_dir` complete or not at all. In place, each file is replaced atomically by an edited copy,
    so a crash leaves every file whole.

    Args:
        checkpoint: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`; or a Hub id.
        shifts: {module name: S of shape (key_size, value_size)}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        output_dir: folder for the edited copy; must not exist, or be empty.
        in_place: edit `checkpoint` itself. Give exactly one of `output_dir` and `in_place`.

    Raises:
        ValueError: not exactly one of `output_dir` and `in_place`.
        CheckpointError: the checkpoint is not there, has no safetensors weights, is damaged, or lies in the Hub's
            shared cache while `in_place` is set; or `output_dir` is in use.
        ModelMismatchError: a module has no tensor of its shape in the checkpoint.
        NumericalError: an edited weight would not be finite in its dtype.
    """
    _check_destination(checkpoint, output_dir, in_place)
    source = _resolve(checkpoint, in_place)
    tensors = read_tensor_index(source)
    keys = {name: find_key(name, tensors) for name in shifts}
    flipped = set(fan_in_fan_out)
    for name, shift in shifts.items():
        entry, expected = tensors[keys[name]], tuple(shift.shape if name in flipped else shift.T.shape)
        if entry.shape != expected:
            raise ModelMismatchError(
                f"{keys[name]} has the shape {entry.shape} in {source}, and the edit needs {expected}. "
                "The edit was made for another model."
            )
    target = source if in_place else Path(output_dir or "")
    report = WriteReport(target, keys)
    affected = {tensors[key].file for key in keys.values()}
    with _staged_copy(source, target, affected, in_place) as copies:
        for name, shift in shifts.items():
            entry = tensors[keys[name]]
            weight = entry.read(keys[name])
            edited = add_shift(weight, shift, fan_in_fan_out=name in flipped, name=name)
            copy = TensorEntry(copies[entry.file], entry.dtype, entry.shape, entry.begin, entry.end)
            copy.write(edited)
            report.rounding[name] = _rounding(weight, shift if name in flipped else shift.T, edited)
    return report


def check_checkpoint(checkpoint: str | Path, output_dir: str | Path | None, in_place: bool) -> None:
    """Refuse, before anything is computed, what `write_shifts` would refuse after it.

    Nothing is downloaded: of a checkpoint on the Hub only the destination is checked.

    Args:
        checkpoint, output_dir, in_place: as in `write_shifts`.

    Raises:
        ValueError, CheckpointError: as `write_shifts`.
    """
    _check_destination(checkpoint, output_dir, in_place)
    if in_place or Path(checkpoint).exists():
        read_tensor_index(_resolve(checkpoint, in_place))


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
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Download the checkpoint again.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is {size} bytes long and announces a header of {length}. It is truncated or no safetensors "
                "file; download it again."
            )
        header = parse_json(stream.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    entries: dict[str, TensorEntry] = {}
    for key, value in header.items():
        entries[key] = _parse_entry(path, key, value, start)
    position = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise CheckpointError(f"{path}: {key!r} begins at byte {entry.begin}, expected {position}. It is damaged.")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path} is {size} bytes long, and its header describes {position}. It is damaged.")
    return entries


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


def find_key(name: str, tensors: Mapping[str, Any]) -> str:
    """The checkpoint's key for the weight of a module.

    A checkpoint of the bare model leaves out the head model's prefix (`transformer.h.0` is `h.0` in it), and one of a
    larger model adds one; both are recognised when the rest of the name is unique.

    Raises:
        ModelMismatchError: no key, or several, for that module.
    """
    wanted = f"{name}.weight"
    if wanted in tensors:
        return wanted
    found = [key for key in tensors if wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
    if len(found) == 1:
        return found[0]
    raise ModelMismatchError(
        f"The checkpoint has {'no' if not found else 'more than one'} tensor for {wanted}"
        f"{': ' + ', '.join(found) if found else ''}. The edit was made for another model."
    )


def _resolve(checkpoint: str | Path, in_place: bool) -> Path:
    folder = Path(checkpoint)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the folder of a checkpoint.")
    if not folder.is_dir():
        if in_place:
            raise CheckpointError(
                f"There is no folder {checkpoint}. A checkpoint from the Hub is never edited in place; use output_dir."
            )
        return Path(snapshot_download(str(checkpoint), allow_patterns=_HUB_PATTERNS))
    if in_place and any(path.is_symlink() for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds symbolic links, as the Hub's shared cache does; editing in place would change what other "
            "models read. Use output_dir."
        )
    return folder


def _check_destination(checkpoint: str | Path, output_dir: str | Path | None, in_place: bool) -> None:
    if (output_dir is None) == (not in_place):
        raise ValueError("An edit on disk needs output_dir=... for a copy, or in_place=True; give exactly one.")
    if output_dir is None:
        return
    folder, source = Path(output_dir), Path(checkpoint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty. Choose another output_dir, or remove it.")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{folder} lies inside of {source}, and its copy cannot. Choose another output_dir.")


@contextmanager
def _staged_copy(source: Path, target: Path, affected: Iterable[Path], in_place: bool) -> Iterator[dict[Path, Path]]:
    """Copies of the affected files to write into; they take their place when the context ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that taking its place is a rename within one file system.
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if in_place else target.parent))
    try:
        if in_place:
            copies = {file: stage / file.name for file in affected}
            for file, copy in copies.items():
                shutil.copy2(file, copy)
        else:
            shutil.copytree(source, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".cache"))
            copies = {file: stage / file.name for file in affected}
        for copy in copies.values():
            copy.chmod(copy.stat().st_mode | stat.S_IWUSR)  # a read-only source does not make a read-only copy
        yield copies
        if in_place:
            for file, copy in copies.items():
                os.replace(copy, file)
        else:
            stage.chmod(source.stat().st_mode | stat.S_IRWXU)
            if target.exists():
                target.rmdir()
            os.replace(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, begin, end]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise TypeError("negative or not whole")
        bits = math.prod(shape) * _ITEM_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {key!r} is damaged ({error!r}).") from None
    if (end - begin) * 8 != bits:
        raise CheckpointError(f"{path}: {key!r} takes {end - begin} bytes, expected {bits // 8}. It is damaged.")
    return TensorEntry(path, dtype, shape, start + begin, start + end)


def _rounding(weight: Tensor, oriented: Tensor, edited: Tensor) -> float:
    exact = weight.double() + oriented.double()
    norm = oriented.double().norm().item()
    return ((edited.double() - exact).norm().item() / norm) if norm else 0.0
