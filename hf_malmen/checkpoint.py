"""Weight shifts -> an edited safetensors checkpoint, without loading the model.

Only the bytes of the edited tensors change: headers, other tensors and other files stay as they are. A copy appears
complete or not at all; in place, the journal of `history.py` stands between a crash and the weights.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError
from transformers.utils import logging

from .configuration import FINGERPRINT_POLICIES
from .copies import Source, abandoned_stages, check_stamps, require_unused, settled_state, staged_copy, stamps_of
from .errors import CheckpointError, FingerprintWarning, ModelMismatchError
from .history import add_in_place, locked, recorded, recover_locked, require_settled, sync_file
from .hub import HUB_ERRORS
from .mapping import TensorShift, direct_shifts, map_shifts
from .model_card import EditSummary, hub_id
from .paths import lies_below_a_file
from .records import EDITS_FOLDER
from .shards import INDEX_FILE, SINGLE_FILE, TensorEntry, parse_json, read_tensor_index
from .shifts import Shift
from .stored_weights import matches

logger = logging.get_logger(__name__)

# Of a repo: weights in other formats, which are not edited, and which an edited copy would contradict.
_NOT_DOWNLOADED = [
    *("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite"),
    *("original/*", "consolidated*.safetensors"),
]


@dataclass
class WriteReport:
    """What `write_shifts` did.

    Attributes:
        output_dir: the edited checkpoint.
        edit_id: the edit's number in the checkpoint's history.
        keys: {module name: keys of the tensors that hold its weight}.
        rounding: {module name: ‖written − (W + S)‖ / ‖S‖}, what the weight's dtype cost.
    """

    output_dir: Path
    edit_id: str = ""
    keys: dict[str, list[str]] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)


def write_shifts(
    checkpoint: str | Path,
    shifts: Mapping[str, Shift],
    *,
    save_edit: Callable[[Path], object],
    summarise: Callable[[str], EditSummary],
    fan_in_fan_out: Iterable[str] = (),
    output_dir: str | Path | None = None,
    in_place: bool = False,
    fingerprint: str | None = None,
    on_fingerprint_mismatch: str = "warn",
    before_edits: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> WriteReport:
    """Add weight shifts to the tensors of a checkpoint, and record the edit in its `edits` folder.

    Untouched weight files of a copy share their bytes with the source where the file system allows (reflinks, else hard
    links); the edited ones and all small files are copies. The model's weights in other formats, which would contradict
    the edited ones, are left out.

    Args:
        checkpoint: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`; one
            safetensors file; or a Hub id.
        shifts: {module name: its shift}.
        save_edit: writes the edit itself into a folder, for the record.
        summarise: makes the record's summary from the edit's id.
        fan_in_fan_out: modules stored as (key_size, value_size).
        output_dir: folder for the edited copy; must not exist, or be empty. An empty one gets the files, and stays.
        in_place: edit `checkpoint` itself. Give exactly one of `output_dir` and `in_place`.
        fingerprint: of the target weights that the shifts were made for; the checkpoint's are compared with it.
        on_fingerprint_mismatch: `"warn"`, `"error"` or `"ignore"`.
        before_edits: whether it may also be that of the weights before some or all of the checkpoint's edits in force.
        revision, token: for a checkpoint on the Hub.

    Raises:
        ValueError: not exactly one of `output_dir` and `in_place`.
        CheckpointError: the checkpoint is not there, or a repo's cannot be had as a whole; it has no safetensors
            weights, or links out of its folder, is damaged, quantised, read-only or changed while it was read, has the
            same edit in force, or lies in the Hub's shared cache while `in_place` is set; or `output_dir` is in use.
        CheckpointWriteError: the disk is full or fails, or another process is writing.
        ModelMismatchError: a module has no tensor of its shape in the checkpoint, or its weights are not those the edit
            was made for and the policy is `"error"`.
        NumericalError: an edited weight would not be finite in its dtype.

        After any of them the checkpoint is as it was.
    """
    if on_fingerprint_mismatch not in FINGERPRINT_POLICIES:
        allowed = ", ".join(FINGERPRINT_POLICIES)
        raise ValueError(f"The fingerprint policy is {on_fingerprint_mismatch!r}; allowed: {allowed}.")
    _check_destination(checkpoint, output_dir, in_place)
    source = _resolve(checkpoint, in_place, revision, token)
    flipped = sorted(fan_in_fan_out)
    wanted = None if on_fingerprint_mismatch == "ignore" else fingerprint

    def find(place: Source, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorShift]:
        """Which tensors are meant, with their fingerprint compared."""
        plan = map_shifts(place.folder, shifts, flipped, tensors)
        if wanted is not None and not matches(place.folder, plan, tensors, wanted, before_edits):
            message = _mismatch(place.folder, wanted)
            if on_fingerprint_mismatch == "error":
                raise ModelMismatchError(message)
            warnings.warn(message, FingerprintWarning, stacklevel=5)
        return plan

    def write(
        place: Source, tensors: Mapping[str, TensorEntry], plan: Mapping[str, TensorShift], check: Callable[[], object]
    ) -> WriteReport:
        keys: dict[str, list[str]] = {}
        for key, change in plan.items():
            keys.setdefault(change.module, []).append(key)
        edited = {key: tensors[key] for key in plan}
        with (
            recorded(place.folder, keys, flipped, edited, summarise, save_edit, check) as record,
            ThreadPoolExecutor(1) as background,
        ):
            sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in keys}
            synced = []
            for key, shift in plan.items():
                done = add_in_place(tensors[key], shift)
                synced.append(background.submit(sync_file, tensors[key].file))  # while the next one is computed
                record.checksums[key] = done.checksum
                sums[shift.module] = [a + b for a, b in zip(sums[shift.module], (done.error, done.norm), strict=True)]
            for done_syncing in synced:
                done_syncing.result()  # the system tells of a failing disk once, and not again at the last sync
            record.rounding.update({name: (e / n) ** 0.5 if n else 0.0 for name, (e, n) in sums.items()})
        return WriteReport(place.folder, record.id, keys, record.rounding)

    if in_place:
        with locked(source.folder), ThreadPoolExecutor(1) as background:
            recover_locked(source.folder)
            stamps = stamps_of(source)
            tensors = source.tensors()
            plan = None if wanted is None else direct_shifts(shifts, flipped, tensors)
            if plan is not None and wanted is not None:
                # Compared while the originals are saved, and before anything is overwritten.
                match = background.submit(matches, source.folder, plan, tensors, wanted, before_edits)

                def check() -> None:
                    if not match.result():
                        raise _NoMatch
                    check_stamps(source, stamps)

                try:
                    return write(source, tensors, plan, check)
                except _NoMatch:
                    pass
            return write(source, tensors, find(source, tensors), lambda: check_stamps(source, stamps))
    found = settled_state(source)
    tensors = source.tensors()
    plan = find(source, tensors)  # before anything is copied
    with staged_copy(source, Path(output_dir or ""), {tensors[key].file for key in plan}, found) as stage:
        copy = Source(stage, None if source.file is None else stage / source.file.name)
        stamps = stamps_of(copy)
        report = write(copy, copy.tensors(), plan, lambda: check_stamps(copy, stamps))
    report.output_dir = Path(output_dir or "")
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
    if in_place or hub_id(str(checkpoint)) is None:
        source = _resolve(checkpoint, in_place, None, None)
        require_settled(source.folder)
        tensors = source.tensors()
        for file in {entry.file for entry in tensors.values()} if in_place else ():
            if not os.access(file, os.W_OK) or not file.stat().st_mode & stat.S_IWUSR:
                raise CheckpointError(f"{file} is read-only. Use output_dir, or allow writing: chmod u+w {file}.")


def copy_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Copy a checkpoint as `write_shifts` does, with nothing added.

    Args:
        checkpoint, output_dir, revision, token: as in `write_shifts`.

    Raises:
        CheckpointError: as `write_shifts`.
    """
    _check_destination(checkpoint, output_dir, in_place=False)
    source = _resolve(checkpoint, False, revision, token)
    with staged_copy(source, Path(output_dir), set(), settled_state(source)):
        pass


def _mismatch(folder: Path, expected: str) -> str:
    return (
        f"The edit was made for a base model whose target weights differ from those in {folder} (fingerprint "
        f"{expected[:12]}...). Its facts may not be written well. Use the base model and revision named in the edit's "
        "config, or make the edit anew."
    )


class _NoMatch(Exception):
    """The tensors of the modules' own names are not the modules' weights."""


def _resolve(checkpoint: str | Path, in_place: bool, revision: str | None, token: str | bool | None) -> Source:
    path = Path(checkpoint)
    if path.is_file():
        return _resolve_file(path)
    if not path.is_dir():
        if in_place:
            raise CheckpointError(
                f"There is no folder {checkpoint}. A checkpoint from the Hub is never edited in place; use output_dir."
            )
        if hub_id(str(checkpoint)) is None:
            raise CheckpointError(f"There is no folder or file {checkpoint}, and no repo can have that name.")
        return Source(_download(str(checkpoint), revision, token))
    if in_place and any(entry.is_symlink() for entry in path.iterdir()):
        raise CheckpointError(
            f"{path} holds symbolic links, as the Hub's shared cache does; editing in place would change what other "
            "models read. Use output_dir."
        )
    return Source(path)


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The cache's copy of a repo, all of it; without the Hub, all of the model.

    Without the Hub the client gives whatever the cache holds, unless it has kept the list of the repo's files.
    """
    options: dict[str, Any] = {"token": token, "ignore_patterns": _NOT_DOWNLOADED}
    try:
        try:
            folder = Path(snapshot_download(repo_id, revision=revision, **options))
            files: Any = snapshot_download(repo_id, revision=folder.name, dry_run=True, **options)
        except (LocalEntryNotFoundError, DryRunError):  # the Hub does not answer
            return _cached_model(repo_id, revision)
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"There is no folder {repo_id}, and no repo of that name that can be had as a whole, from the Hub or from "
            f"its cache. Asking the Hub: {type(error).__name__}: {error} Check the name, or try again later."
        ) from error
    missing = [file.filename for file in files if not file.is_cached]
    if missing:  # the Hub answers again
        raise CheckpointError(f"{folder} has no {', '.join(missing)}, which {repo_id} has. Try again.")
    return folder


def _cached_model(repo_id: str, revision: str | None) -> Path:
    """What the cache has of a repo, if it is all of a model, with the edits that the repo is known to have."""
    patterns = ["config.json", "model*.safetensors*", f"{EDITS_FOLDER}/*"]
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
    try:
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json.")
        read_tensor_index(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"The Hub cannot be asked for {repo_id}, and what its cache holds, {folder}, is no whole model: {error} "
            "Try again when the Hub answers."
        ) from error
    logger.warning(
        f"The Hub cannot be asked whether {repo_id} has more files than {folder}, which is taken as it is. Loading a "
        "model may cache neither its edits nor files it does not need: if the repo has any, the copy lacks them."
    )
    return folder


def _resolve_file(path: Path) -> Source:
    folder = path.absolute().parent
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is a file; expected a .safetensors file, or the folder of a checkpoint.")
    if path.name == SINGLE_FILE and (folder / "config.json").is_file():
        return Source(folder)  # the checkpoint that it is the weights of
    index = folder / INDEX_FILE
    if index.is_file() and path.name in (parse_json(index.read_bytes(), index).get("weight_map") or {}).values():
        raise CheckpointError(f"{path} is one shard of the checkpoint in {folder}. Give the folder.")
    return Source(folder, path.absolute())


def _check_destination(checkpoint: str | Path, output_dir: str | Path | None, in_place: bool) -> None:
    if (output_dir is None) == (not in_place):
        raise ValueError("An edit on disk needs output_dir=... for a copy, or in_place=True; give exactly one.")
    if output_dir is None:
        return
    folder, source = Path(output_dir), Path(checkpoint)
    if lies_below_a_file(folder):
        raise CheckpointError(f"{folder} lies below a file. Choose another output_dir.")
    if folder.exists():
        require_unused(folder, but=abandoned_stages(folder) if folder.is_dir() else ())
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{folder} lies inside of {source}, and its copy cannot. Choose another output_dir.")
