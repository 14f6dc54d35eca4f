"""A checkpoint's files -> a copy of them, which appears complete or not at all; and whether they changed meanwhile."""

import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import logging

from .errors import CheckpointError, CheckpointWriteError
from .history import require_settled, sync_file
from .records import EDITS_FOLDER, JOURNAL
from .shards import INDEX_FILE, SINGLE_FILE, TensorEntry, in_hub_cache, read_header, read_tensor_index

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Weights in other formats, which are not edited, and which an edited copy would contradict, by the names that a model's
# own have at the top of its folder. Any other file may be wanted.
_OTHER_WEIGHTS = [
    *("pytorch_model*.bin*", "tf_model*.h5*", "flax_model*.msgpack*", "rust_model.ot", "model*.onnx*", "*.gguf"),
    *("consolidated*.safetensors", "consolidated*.pth", "original", "onnx"),
]
_SYSTEM_FOLDER = "lost+found"  # at the root of a file system, where only the administrator may read or remove it
_STAGE = ".hf_malmen-"  # how the name of a folder begins, or goes on, in which a copy is made
_FICLONE = 0x40049409  # Linux: share the extents of another file until one of the two is written


@dataclass(frozen=True)
class Source:
    """A checkpoint to edit.

    Attributes:
        folder: where it lies.
        file: the weight file, where one file was given instead of a folder.
    """

    folder: Path
    file: Path | None = None

    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor, by key."""
        return read_tensor_index(self.folder) if self.file is None else read_header(self.file)


def require_unused(folder: Path, but: Iterable[Path]) -> None:
    """Check that a copy can go into a folder: that there is nothing in it, `but` for these.

    Raises:
        CheckpointError: there is.
    """
    if not folder.is_dir() or {*folder.iterdir()} - {folder / _SYSTEM_FOLDER, *but}:
        raise CheckpointError(f"{folder} exists and is not empty. Choose another output_dir, or remove it.")


def stamps_of(place: Source) -> dict[Path, tuple[int, int]]:
    """Of weight files, by which it shows that one was written."""
    files = place.folder.glob("*.safetensors") if place.file is None else [place.file]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}


def check_stamps(place: Source, stamps: Mapping[Path, tuple[int, int]]) -> None:
    """Check that no weight file was written since the stamps were taken.

    Raises:
        CheckpointError: one was.
    """
    if stamps_of(place) != stamps:
        raise _changed(place)


def _state(place: Source) -> tuple[dict[Path, tuple[int, int]], list[str]]:
    """By which a writer beside us is noticed: the weights' stamps, and the records, finished or not."""
    edits = place.folder / EDITS_FOLDER
    return stamps_of(place), sorted(path.name for path in edits.iterdir()) if edits.is_dir() else []


def settled_state(place: Source) -> tuple[dict[Path, tuple[int, int]], list[str]]:
    """By which a writer beside us is noticed, of a checkpoint that no change has begun to.

    Raises:
        CheckpointError: one has.
    """
    require_settled(place.folder)
    stamps, names = _state(place)
    if JOURNAL in names:  # of a writer that began since; its weights may be all there, and its record is not
        raise _changed(place)
    return stamps, names


def _changed(place: Source) -> CheckpointError:
    return CheckpointError(f"Weight files of {place.folder} changed while they were read. Try again.")


@contextmanager
def staged_copy(source: Source, target: Path, edited: set[Path], state: object) -> Iterator[Path]:
    """A copy of a checkpoint to write into; it takes its place when the context ends without an error.

    Args:
        source: the checkpoint.
        target: where the copy goes.
        edited: the files that are to be written, and so are copied.
        state: `settled_state` of the source when it was looked at, which must be that of what was copied.

    Raises:
        CheckpointError: the source was changed, or has what cannot be copied.
        CheckpointWriteError: the copy cannot be written.
    """
    target = target.resolve()
    try:
        with _new_stage(target) as stage:
            if source.file is not None:
                _copy(source.file, stage / source.file.name, may_link=source.file not in edited)
            else:
                try:
                    _copy_folder(source, stage, edited)
                except (CheckpointError, OSError) as error:
                    if _state(source) != state:  # as where an edit is undone, whose files are gone
                        raise _changed(source) from error
                    raise
            if _state(source) != state:
                raise _changed(source)
            for file in edited:
                copied = stage / file.name
                copied.chmod(copied.stat().st_mode | stat.S_IWUSR)  # a read-only source does not make a read-only copy
            yield stage
            for path in (*stage.rglob("*"), stage):
                sync_file(path)
            _take_place(stage, target, source.folder.stat().st_mode | stat.S_IRWXU)
    except shutil.Error as error:  # of a list of (file, copy, reason)
        file, _, reason = error.args[0][0]
        raise CheckpointWriteError(f"Could not copy {file} to {target}: {reason}. Nothing is left of it.") from error
    except OSError as error:
        reason = error.__cause__ if isinstance(error, CheckpointError) else error  # not one about the hidden folder
        raise CheckpointWriteError(f"Could not write {target}: {reason or error}. Nothing is left of it.") from error


@contextmanager
def _new_stage(target: Path) -> Iterator[Path]:
    """A locked hidden folder on the file system of a folder that is to be written; it is removed in the end.

    It lies in the folder, where that exists, which may be a mount point or in a place where nothing can be made; else
    beside it. Those that dead processes have left there are removed.
    """
    place, prefix = _stages_of(target)
    place.mkdir(parents=True, exist_ok=True)
    for abandoned in abandoned_stages(target):
        shutil.rmtree(abandoned, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    handle = _lock(stage)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _stages_of(target: Path) -> tuple[Path, str]:
    """The folder in which the stages of a folder lie, and how their names begin."""
    return (target, _STAGE) if target.is_dir() else (target.parent, f".{target.name}{_STAGE}")


def abandoned_stages(target: Path) -> Iterator[Path]:
    """The stages of a folder whose processes have died."""
    place, prefix = _stages_of(target)
    for stage in place.glob(f"{glob.escape(prefix)}*"):
        if (handle := _lock(stage)) is not None:
            os.close(handle)
            yield stage


def _lock(folder: Path) -> int | None:
    """Lock a folder until the handle is closed, or the process ends; None if it cannot be locked."""
    if fcntl is None:
        return None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the file system has no locks
            os.close(handle)
        else:
            return handle
    return None


def _take_place(stage: Path, target: Path, mode: int) -> None:
    """Rename a stage to the folder it is for; or what it holds, if the folder is there, whose own mode it keeps."""
    if stage.parent != target:
        stage.chmod(mode)
        os.replace(stage, target)
    else:
        require_unused(target, but=[stage])
        # What is no checkpoint yet has no configuration, nor weights.
        names = sorted(os.listdir(stage), key=lambda name: (name in (SINGLE_FILE, INDEX_FILE), name == "config.json"))
        try:
            for name in names:
                os.replace(stage / name, target / name)
        except BaseException:
            for name in names:
                if not (stage / name).exists():
                    os.replace(target / name, stage / name)
            raise
    with suppress(OSError):  # a folder that cannot be read; the copy is there
        sync_file(stage.parent)


def _copy_folder(source: Source, stage: Path, edited: set[Path]) -> None:
    """Copy a checkpoint's folder, but for what is no part of it: weights in other formats, and unfinished changes."""
    weights = {entry.file for entry in source.tensors().values()}
    left_out = []

    def copy(file: str, place: str) -> str:
        return _copy(Path(file), Path(place), may_link=Path(file) not in edited)

    def is_left_out(path: Path) -> bool:
        if path.name in (".git", ".cache", _SYSTEM_FOLDER) or path.name.startswith(_STAGE):
            return True
        if path.parent == source.folder / EDITS_FOLDER and path.name.startswith("."):
            return True  # what a writer that died has left among the records
        own = path.parent == source.folder and any(fnmatch(path.name, kind) for kind in _OTHER_WEIGHTS)
        if own and path not in weights:
            left_out.append(path.name)
            return True
        if path.is_symlink() and path.is_dir():
            raise _linked(path)
        return False

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if is_left_out(Path(folder, name))}

    shutil.copytree(source.folder, stage, dirs_exist_ok=True, ignore=ignored, copy_function=copy)
    if left_out:
        logger.warning(f"Not copied from {source.folder}, as no edit changes them: {', '.join(sorted(left_out))}.")
    if (edits := stage / EDITS_FOLDER).is_dir() and not any(edits.iterdir()):
        edits.rmdir()


def _copy(file: Path, place: Path, *, may_link: bool) -> str:
    """A copy that shares its bytes until one of the two is written; or a hard link, of weights that stay; or bytes."""
    if not file.is_file():  # to open a pipe would wait for ever
        raise CheckpointError(f"{file} is no file, or a link to none, and cannot be copied. Remove it first.")
    if file.is_symlink() and not in_hub_cache(file):
        raise _linked(file)
    if _reflink(file, place):
        shutil.copystat(file, place)
    elif may_link and file.suffix == ".safetensors" and not file.is_symlink() and _link(file, place):
        pass  # the Hub's cache, whose files are links, is not tied to what others may write
    else:
        shutil.copy2(file, place)
    return str(place)


def _linked(path: Path) -> CheckpointError:
    """Of a link out of a checkpoint: what it leads to may be anybody's."""
    return CheckpointError(
        f"{path} is a symbolic link to {os.readlink(path)}; a checkpoint's files lie in its own folder. Copy it "
        "with its contents first: cp -rL."
    )


def _reflink(file: Path, place: Path) -> bool:
    if fcntl is None:
        return False
    with open(file, "rb", buffering=0) as source, open(place, "wb", buffering=0) as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError:  # another file system, or one that cannot
            os.unlink(place)
            return False
    return True


def _link(file: Path, place: Path) -> bool:
    try:
        os.link(file, place)
    except OSError:
        return False
    return True
