"""What was done to a checkpoint on disk, and the journal that makes doing and undoing it crash-safe.

```
edits/0001/                one record an edit in force, oldest first
    record.json            which tensors it replaced, when, by what, and what was measured
    originals.safetensors  the bytes that it replaced
    README.before.md       the checkpoint's card before it, if there was one
    config.json, edit.safetensors   the edit itself; `Edit.from_pretrained` reads the folder
    state.safetensors      what follows the edits, where something does: see `state.py`
edits/.journal/            a change that has begun and not ended
```

A record is a journal that was closed. To write an edit, its record is prepared aside, synced, and renamed to
`.journal`; then the weights are overwritten; and a second rename, to `0001`, closes it. To undo the last edit is to
open its journal again and take it back. So whenever a process dies, there is no journal, and the checkpoint is in its
old or its new state; or there is one, and `recover` takes it back (or finishes the removal of an earlier edit) before
anything else.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import CheckpointError, CheckpointWriteError
from .facts import Fact
from .ledger import Ledger, build_ledger, read_facts
from .mapping import TensorShift, map_shifts
from .model_card import EditSummary, render_checkpoint_card, strip_checkpoint_card
from .shards import TensorEntry, copy_bytes, in_hub_cache, parse_json, raw, read_header, write_entries
from .shifts import add_rows, load_shifts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

EDITS_FOLDER = "edits"
SHIFTS_FILE = "edit.safetensors"
CARD_FILE = "README.md"
_RECORD_FILE, _ORIGINALS_FILE, _CARD_BEFORE = "record.json", "originals.safetensors", "README.before.md"
_JOURNAL, _PREPARING, _CLOSED, _DROPPED = ".journal", ".preparing", ".closed", ".dropped"
_REMOVAL_FILE, _WEIGHTS_FILE, _REPLACING = "removal.json", "weights.safetensors", "replacing"
_CARD_FOLDER = "card"
_ID = r"\d{4,}"
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Record:
    """One edit in force on a checkpoint.

    Attributes:
        summary: what people read of it: id, date, facts, editor, scores.
        folder: the record's.
        modules: {module name: keys of the tensors that hold its weight}.
        fan_in_fan_out: the modules that store their weight as (key_size, value_size).
        tensors: the tensors it replaced, by key, where they lie in the checkpoint.
        checksums: {key: CRC-32 of the bytes it wrote}.
        rounding: {module name: ‖written − (W + S)‖ / ‖S‖}, what the weights' dtype cost.
        had_card: whether the checkpoint had a card before it.
        card_sha256: of the card that it wrote; None if it wrote none.
    """

    summary: EditSummary
    folder: Path
    modules: dict[str, list[str]]
    fan_in_fan_out: list[str]
    tensors: dict[str, TensorEntry]
    checksums: dict[str, int] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    had_card: bool = False
    card_sha256: str | None = None

    @property
    def id(self) -> str:
        """Its number, as `hf-malmen log` shows it."""
        return self.summary.id

    def originals(self) -> dict[str, TensorEntry]:
        """The tensors as they were before, by key.

        Raises:
            CheckpointError: they are not what the record says.
        """
        return _read_copies(self.folder / _ORIGINALS_FILE, self.tensors)


@dataclass(frozen=True)
class UndoReport:
    """What `undo_edit` did.

    Attributes:
        summary: of the edit that was removed.
        remaining: ids of the edits still in force.
        exact: whether every byte is as if the edit had never been; else the tensors that a later edit shares with it
            were added up anew, exact to the rounding of one addition an edit.
    """

    summary: EditSummary
    remaining: list[str]
    exact: bool


# What users call


def read_history(checkpoint: str | Path) -> list[Record]:
    """The edits in force on a checkpoint, oldest first.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: no such folder, or a damaged record.
    """
    folder = _require_folder(checkpoint)
    names = [path.name for path in (folder / EDITS_FOLDER).glob("*") if re.fullmatch(_ID, path.name)]
    records = [_read_record(folder, folder / EDITS_FOLDER / name) for name in sorted(names, key=int)]
    for record in records:
        if record.id != record.folder.name:
            raise CheckpointError(f"{record.folder} holds the record of edit {record.id}. The history is damaged.")
    return records


def read_ledger(checkpoint: str | Path) -> Ledger:
    """The facts that the edits in force on a checkpoint wrote, and which of them later ones replaced.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: no such folder, or a damaged record.
    """
    return build_ledger(_written(read_history(checkpoint)))


def undo_edit(checkpoint: str | Path, edit_id: str | None = None) -> UndoReport:
    """Take an edit back from a checkpoint on disk, crash-safe.

    The last edit's tensors are restored byte for byte. For an earlier one the tensors are computed anew from the saved
    originals and the shifts of the edits that stay.

    Args:
        checkpoint: its folder.
        edit_id: which, as `hf-malmen log` shows it; None takes the last.

    Raises:
        CheckpointError: no such edit; a record or weight file that is not as the edit left it; files that cannot be
            written. Nothing was changed.
    """
    folder = _require_folder(checkpoint)
    with locked(folder):
        recover_locked(folder)
        records = read_history(folder)
        if not records:
            raise CheckpointError(f"{folder} has no edits in force, so there is nothing to undo.")
        found = [record for record in records if edit_id is None or record.id == edit_id.zfill(4)]
        if not found:
            ids = ", ".join(record.id for record in records)
            raise CheckpointError(f"{folder} has no edit {edit_id} in force. Its edits: {ids}.")
        record = found[-1]
        later = [other for other in records if int(other.id) > int(record.id)]
        _check_untouched(records, record)
        with _clean_after_failure(folder):
            if later:
                _prepare_removal(folder, record, records)
                _make_writable(folder, record.tensors)
                _rename(_inside(folder, _PREPARING), _inside(folder, _JOURNAL))
            else:
                record.originals()
                _make_writable(folder, record.tensors)
                _rename(record.folder, _inside(folder, _JOURNAL))
        try:
            _replay(folder)
        except OSError as error:
            raise _unfinished(folder, f"undoing edit {record.id} of", error) from error
        shared = any(key in other.tensors for other in later for key in record.tensors)
        return UndoReport(record.summary, [other.id for other in records if other is not record], not shared)


def recover_checkpoint(checkpoint: str | Path) -> bool:
    """Finish or take back what a process that died was doing to a checkpoint.

    Every function of this package that opens a checkpoint to edit it does this first.

    Returns:
        Whether there was anything to do.

    Raises:
        CheckpointError: no such folder, another process is writing to it, a damaged journal, or a folder of the Hub's
            shared cache.
    """
    folder = _require_folder(checkpoint)
    if not _leftovers(folder):
        return False
    with locked(folder):
        return recover_locked(folder)


def require_settled(folder: Path) -> None:
    """Recover a checkpoint before it is read, if a process died while it wrote to it.

    Raises:
        CheckpointError: see `recover_checkpoint`.
    """
    if _inside(folder, _JOURNAL).exists():
        recover_checkpoint(folder)


# What the writer uses


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers out. The lock is on the folder itself, leaves no file behind, and ends with its process.

    Raises:
        CheckpointWriteError: another process holds it.
    """
    if fcntl is None:
        raise CheckpointWriteError("Editing in place needs file locks that this system does not have. Use output_dir.")
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointWriteError(
                f"Another process is writing to {folder}. Wait until it is done, or stop it."
            ) from None
        yield
    finally:
        os.close(handle)


def recover_locked(folder: Path) -> bool:
    """`recover_checkpoint` by who holds the lock."""
    try:
        return _recover(folder)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _unfinished(folder, "recovering", error) from error


def _recover(folder: Path) -> bool:
    found = _leftovers(folder)
    if found and any(in_hub_cache(path) for path in (folder / EDITS_FOLDER).rglob("*")):
        raise CheckpointError(
            f"{folder} was uploaded in the middle of an edit, and the Hub's shared cache is never written. Download it "
            "to a folder of its own (hf download --local-dir) and run hf-malmen recover on it."
        )
    if _inside(folder, _JOURNAL).is_dir():
        _replay(folder)
    _sweep(folder)
    return found


@dataclass(frozen=True)
class Change:
    """What `add_in_place` did to one tensor.

    Attributes:
        checksum: CRC-32 of the bytes written.
        error: ‖written − (W + S)‖².
        norm: ‖S‖².
    """

    checksum: int
    error: float
    norm: float


def add_in_place(entry: TensorEntry, shift: TensorShift) -> Change:
    """Add a shift to a tensor on disk, some rows at a time.

    Raises:
        NumericalError: an edited weight would not be finite; rows before it are written.
    """
    error = norm = 0.0
    with (
        open(entry.file, "rb", buffering=0) as source,
        open(entry.file, "r+b", buffering=0) as target,
        ThreadPoolExecutor(1) as writer,  # which stores one block while the next one is computed
    ):

        def store(start: int, data: memoryview, checksum: int) -> int:
            entry.write_rows(target, start, data)
            return zlib.crc32(data, checksum)

        checksum = writer.submit(int)
        for start, stop, rows in shift.blocks():
            edited, lost = add_rows(entry.rows(source, start, stop), rows, shift.module)
            error += lost
            norm += torch.linalg.vector_norm(rows).item() ** 2
            checksum = writer.submit(store, start, raw(edited), checksum.result())
        return Change(checksum.result(), error, norm)


@contextmanager
def recorded(
    folder: Path,
    modules: Mapping[str, Sequence[str]],
    fan_in_fan_out: Sequence[str],
    tensors: Mapping[str, TensorEntry],
    summarise: Callable[[str], EditSummary],
    save_edit: Callable[[Path], object],
    check: Callable[[], object],
) -> Iterator[Record]:
    """Within this context, the holder of the lock may overwrite the bytes of `tensors`, and of nothing else.

    When it ends, the edit is recorded; by an error, everything is as it was. The caller adds the checksums and the
    rounding to the record that it is given.

    Args:
        folder: the checkpoint's.
        modules, fan_in_fan_out, tensors: as in `Record`.
        summarise: makes the summary from the new id.
        save_edit: writes the edit into a folder.
        check: called when the originals are saved and before anything is overwritten; raises if it must not be.
    """
    records = read_history(folder)
    edit_id = f"{max([int(record.id) for record in records], default=0) + 1:04d}"
    preparing = _inside(folder, _PREPARING)
    summary = summarise(edit_id)
    with _clean_after_failure(folder):
        _require_space(folder, sum(entry.end - entry.begin for entry in tensors.values()))
        preparing.mkdir(parents=True)
        save_edit(preparing)
        ledger = build_ledger([*_written(records), (edit_id, read_facts(preparing), summary.n_facts)])
        summary = replace(summary, n_replaced=ledger.n_replaced_by(edit_id))
        write_entries(preparing / _ORIGINALS_FILE, tensors)
        card, before = None, _read_card(folder)
        if not (folder / CARD_FILE).is_file() or before is not None:  # a card that is no text is left alone
            card = render_checkpoint_card(before, [*(record.summary for record in records), summary])
            (preparing / CARD_FILE).write_bytes(card.encode())
            if before is not None:
                (preparing / _CARD_BEFORE).write_bytes(before.encode())
        record = Record(
            summary,
            preparing,
            {name: list(keys) for name, keys in modules.items()},
            sorted(fan_in_fan_out),
            dict(tensors),
            had_card=before is not None,
            card_sha256=None if card is None else _sha256(card),
        )
        (preparing / _RECORD_FILE).write_text(_record_text(record), encoding="utf-8")
        _make_writable(folder, tensors)
        check()
        _sync_tree(preparing)
        _rename(preparing, _inside(folder, _JOURNAL))
    journal = _inside(folder, _JOURNAL)
    try:
        yield record
        for file in {entry.file for entry in tensors.values()}:
            sync_file(file)
        # Written beside and renamed: the file that is there tells `recover` what to take back.
        _replace_text(journal / _RECORD_FILE, _record_text(record))
        if card is not None:
            os.replace(journal / CARD_FILE, folder / CARD_FILE)
            sync_file(folder)
        _rename(journal, _inside(folder, edit_id))
    except BaseException as error:  # Ctrl-C too must leave the checkpoint as it was
        if not journal.is_dir():
            raise CheckpointWriteError(f"The edit is written to {folder}, but its disk reports: {error}.") from error
        try:
            _replay(folder)
        except OSError as second:
            raise _unfinished(folder, "taking back a write to", second) from error
        if isinstance(error, OSError):
            raise _write_error(folder, error) from error
        raise


# The journal


def _replay(folder: Path) -> None:
    """Take back the edit whose journal is open, or finish the removal. Stopped at any point, it can begin again."""
    journal = _inside(folder, _JOURNAL)
    if (journal / _REMOVAL_FILE).is_file():
        _finish_removal(folder, journal)
    else:
        _take_back(folder, journal)
    _rename(journal, _inside(folder, _CLOSED))
    _sweep(folder)


def _take_back(folder: Path, journal: Path) -> None:
    record = _read_record(folder, journal)
    originals = record.originals()
    _make_writable(folder, record.tensors)  # also where the folder was copied, or linked, since the process died
    _restore(originals, record.tensors)
    card = _read_card(folder)
    if record.card_sha256 is None or (card is None and (folder / CARD_FILE).exists()):
        return
    original = _card_before(record)
    if card is not None and card != original and _sha256(card) != record.card_sha256:
        # Somebody changed the card since: only our section is brought up to date.
        others = [other.summary for other in read_history(folder)]
        original = render_checkpoint_card(card, others) if others else strip_checkpoint_card(card)
    if original is None:
        (folder / CARD_FILE).unlink(missing_ok=True)
    elif original != card:
        staged = journal / CARD_FILE
        staged.write_bytes(original.encode())
        sync_file(staged)
        os.replace(staged, folder / CARD_FILE)
    sync_file(folder)


def _finish_removal(folder: Path, journal: Path) -> None:
    removal = parse_json((journal / _REMOVAL_FILE).read_bytes(), journal / _REMOVAL_FILE)
    tensors = _parse_tensors(folder, removal.get("tensors"), journal / _REMOVAL_FILE)
    weights = _read_copies(journal / _WEIGHTS_FILE, tensors)
    for staged in (journal / _REPLACING).glob("*"):  # what takes the place of a sound record is one
        if (staged / _RECORD_FILE).is_file():
            record = _read_record(folder, staged)
            if (staged / _ORIGINALS_FILE).is_file():
                record.originals()
    _make_writable(folder, tensors)
    _restore(weights, tensors)
    for staged in sorted((journal / _REPLACING).glob("*/*")):
        name = staged.parent.name
        parent = folder if name == _CARD_FOLDER else _inside(folder, name)
        allowed = (CARD_FILE,) if name == _CARD_FOLDER else (_RECORD_FILE, _ORIGINALS_FILE, _CARD_BEFORE)
        if parent.is_dir() and staged.name in allowed:
            os.replace(staged, parent / staged.name)
            sync_file(parent)
    dropped = str(removal.get("drop"))
    if re.fullmatch(_ID, dropped) and _inside(folder, dropped).is_dir():
        _rename(_inside(folder, dropped), _inside(folder, _DROPPED))


def _prepare_removal(folder: Path, record: Record, records: Sequence[Record]) -> None:
    """Everything that the removal of an earlier edit changes, computed aside before the journal is opened."""
    preparing = _inside(folder, _PREPARING)
    later = records[records.index(record) + 1 :]
    originals = record.originals()
    sizes = {other.id: sum(entry.end - entry.begin for entry in other.tensors.values()) for other in later}
    _require_space(folder, sum(sizes.values()) + sum(entry.end - entry.begin for entry in originals.values()))
    (preparing / _REPLACING).mkdir(parents=True)
    weights = write_entries(preparing / _WEIGHTS_FILE, originals)
    card_before = _card_before(record)
    kept = [other.summary for other in records[: records.index(record)]]
    ledger = build_ledger(_written([other for other in records if other is not record]))
    for other in later:
        staged = preparing / _REPLACING / other.id
        staged.mkdir()
        shared = [key for key in other.tensors if key in weights]
        if shared:
            sources = {**other.originals(), **{key: weights[key] for key in shared}}
            write_entries(staged / _ORIGINALS_FILE, sources)
            shifts = map_shifts(
                folder,
                load_shifts(other.folder / SHIFTS_FILE),
                other.fan_in_fan_out,
                other.tensors,
            )
            if not shifts.keys() >= set(shared):
                raise CheckpointError(f"{other.folder / SHIFTS_FILE} is not the edit that its record describes.")
            for key in shared:
                change = add_in_place(weights[key], shifts[key])
                other.checksums[key] = change.checksum
        # The card as it would have been, had the removed edit never been there.
        had_card = card_before is not None
        if card_before is not None:
            (staged / _CARD_BEFORE).write_bytes(card_before.encode())
        summary = replace(other.summary, n_replaced=ledger.n_replaced_by(other.id))
        kept.append(summary)
        if other.card_sha256 is not None:
            card_before = render_checkpoint_card(card_before, kept)
        sha256 = _sha256(card_before) if other.card_sha256 is not None and card_before is not None else None
        changed = replace(other, summary=summary, had_card=had_card, card_sha256=sha256)
        (staged / _RECORD_FILE).write_text(_record_text(changed), encoding="utf-8")
    card = _read_card(folder)
    if card is not None:
        # As it would have been; or, where somebody changed it since, with our section brought up to date.
        untouched = card_before is not None and later[-1].card_sha256 == _sha256(card)
        (preparing / _REPLACING / _CARD_FOLDER).mkdir()
        text = card_before if untouched and card_before is not None else render_checkpoint_card(card, kept)
        (preparing / _REPLACING / _CARD_FOLDER / CARD_FILE).write_bytes(text.encode())
    removal = {"drop": record.id, "tensors": _tensors_json(record.tensors)}
    (preparing / _REMOVAL_FILE).write_text(json.dumps(removal, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync_tree(preparing)


def _restore(sources: Mapping[str, TensorEntry], tensors: Mapping[str, TensorEntry]) -> None:
    """Copy tensors from a journal's file over those of the checkpoint, and sync."""
    for file in sorted({entry.file for entry in tensors.values()}):
        with open(file, "r+b", buffering=0) as target:
            for key, entry in tensors.items():
                if entry.file == file:
                    with open(sources[key].file, "rb", buffering=0) as source:
                        copy_bytes(source, target, sources[key].begin, sources[key].end, entry.begin)
            os.fsync(target.fileno())


def _check_untouched(records: Sequence[Record], record: Record) -> None:
    """Refuse to restore over weights that something else wrote since."""
    for key, entry in record.tensors.items():
        last = [other for other in records if key in other.tensors][-1]
        if checksum(entry) != last.checksums.get(key):
            raise CheckpointError(
                f"{key} in {entry.file} is not what edit {last.id} wrote: something else changed it since. Undoing "
                "would lose that change. Restore the file from a copy, or remove the folder edits/ to keep it as it is."
            )


def checksum(entry: TensorEntry) -> int:
    """CRC-32 of a tensor's bytes."""
    value, position = 0, entry.begin
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(position)
        while position < entry.end and (data := stream.read(min(_CHUNK_BYTES, entry.end - position))):
            value, position = zlib.crc32(data, value), position + len(data)
    return value


def _make_writable(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse files that must not be written, and give those with other hard links bytes of their own."""
    for file in sorted({entry.file for entry in tensors.values()}):
        status = file.lstat()
        if file.is_symlink():
            raise CheckpointError(
                f"{file} is a symbolic link to {os.readlink(file)}, as in the Hub's shared cache; editing in place "
                "would change what other models read. Use output_dir."
            )
        if not status.st_mode & 0o222 or not os.access(file, os.W_OK):
            raise CheckpointError(f"{file} is read-only. Use output_dir, or allow writing: chmod u+w {file}.")
        if status.st_nlink > 1:
            preparing = _inside(folder, _PREPARING)
            preparing.mkdir(parents=True, exist_ok=True)
            _require_space(folder, status.st_size)
            shutil.copy2(file, preparing / file.name)
            sync_file(preparing / file.name)
            os.replace(preparing / file.name, file)
            sync_file(folder)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(
            f"{folder} needs {needed / 2**20:,.0f} MiB for the weights as they were before, and its disk has "
            f"{free / 2**20:,.0f} MiB free. Nothing was written; free some space, or use output_dir on another disk."
        )


def _write_error(folder: Path, error: Exception) -> CheckpointWriteError:
    return CheckpointWriteError(f"Could not write to {folder}: {error}. The checkpoint is as it was before.")


def _unfinished(folder: Path, what: str, error: OSError) -> CheckpointWriteError:
    return CheckpointWriteError(
        f"Could not finish {what} {folder}: {error}. Nothing is lost: solve that, and run hf-malmen recover {folder}."
    )


@contextmanager
def _clean_after_failure(folder: Path) -> Iterator[None]:
    """What is done before a journal is opened leaves no trace when it fails."""
    try:
        yield
    except BaseException as error:
        _sweep(folder)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, CheckpointError):
            raise _write_error(folder, error) from error
        raise


def _sweep(folder: Path) -> None:
    """Remove what was never begun, or is done with."""
    for name in (_PREPARING, _CLOSED, _DROPPED):
        if _inside(folder, name).exists():
            shutil.rmtree(_inside(folder, name))
    edits = folder / EDITS_FOLDER
    if edits.is_dir() and not any(edits.iterdir()):
        edits.rmdir()
        sync_file(folder)


def _leftovers(folder: Path) -> bool:
    edits = folder / EDITS_FOLDER
    names = (_JOURNAL, _PREPARING, _CLOSED, _DROPPED)
    return edits.is_dir() and (not any(edits.iterdir()) or any((edits / name).exists() for name in names))


# Files that outlive a crash


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)
    sync_file(target.parent)


def _replace_text(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".new")
    staged.write_text(text, encoding="utf-8")
    sync_file(staged)
    os.replace(staged, path)
    sync_file(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder, folder.parent, folder.parent.parent]:
        sync_file(path)


# Records as text


def _written(records: Iterable[Record]) -> Iterator[tuple[str, list[Fact], int]]:
    """What a ledger is built from."""
    for record in records:
        yield record.id, read_facts(record.folder), record.summary.n_facts


def _record_text(record: Record) -> str:
    content = {
        "summary": asdict(record.summary),
        "modules": record.modules,
        "fan_in_fan_out": record.fan_in_fan_out,
        "tensors": _tensors_json(record.tensors),
        "checksums": record.checksums,
        "rounding": record.rounding,
        "had_card": record.had_card,
        "card_sha256": record.card_sha256,
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _tensors_json(tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    return {key: {**asdict(entry), "file": entry.file.name} for key, entry in tensors.items()}


def _read_copies(path: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a record's or journal's file, which must be of the same kinds as those of the checkpoint."""
    found = read_header(path)
    shapes = {key: (entry.dtype, entry.shape) for key, entry in found.items()}
    if shapes != {key: (entry.dtype, entry.shape) for key, entry in tensors.items()}:
        raise CheckpointError(f"{path} does not hold the tensors its record names.")
    return found


def _read_record(folder: Path, place: Path) -> Record:
    path = place / _RECORD_FILE
    if not path.is_file():
        raise CheckpointError(f"{place} has no {_RECORD_FILE}; the history of {folder} is damaged.")
    content = parse_json(path.read_bytes(), path)
    tensors = _parse_tensors(folder, content.pop("tensors", None), path)
    try:
        summary = EditSummary(**content.pop("summary"))
        record = Record(summary=summary, folder=place, tensors=tensors, **content)
        _check_record(record)
        return record
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no record of an edit that this version can read ({error}).") from None


def _check_record(record: Record) -> None:
    """Refuse a record whose fields are not what `Record` and `EditSummary` say.

    Raises:
        ValueError, TypeError, AttributeError: they are not.
    """
    summary = record.summary
    if not re.fullmatch(_ID, summary.id):
        raise ValueError(f"its id is {summary.id!r}")
    names = [name for keys in record.modules.values() for name in keys]
    if sorted(names) != sorted(record.tensors):
        raise ValueError("its modules are not those of its tensors")
    if not isinstance(summary.facts, list):
        raise TypeError("its facts are no list")
    facts = [text for prompt, target in summary.facts for text in (prompt, target)]
    texts = [summary.created_at, summary.editor, summary.hf_malmen_version, *facts, *record.fan_in_fan_out]
    optional = (summary.base_model, summary.base_model_fingerprint, record.card_sha256)
    for text in (*texts, *(text for text in optional if text is not None)):
        text.encode()
    numbers = [
        summary.n_facts,
        summary.n_replaced,
        *summary.measured.values(),
        *record.checksums.values(),
        *record.rounding.values(),
    ]
    if not all(isinstance(number, int | float) for number in numbers) or not isinstance(record.had_card, bool):
        raise ValueError("a number is expected where it has something else")


def _parse_tensors(folder: Path, content: Any, path: Path) -> dict[str, TensorEntry]:
    """Places of tensors, believed only where they are what the headers of the checkpoint's files say."""
    headers: dict[str, dict[str, TensorEntry]] = {}
    tensors = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = value.get("file") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the file {name!r}; expected a weight file of {folder}.")
        if name not in headers:
            headers[name] = read_header(folder / name)
        found = headers[name].get(key)
        if found is None or json.loads(json.dumps(_tensors_json({key: found})))[key] != value:
            raise CheckpointError(
                f"{path} says that {key} lies in {name} in a place where it does not. The file was replaced since, or "
                "the record is damaged; nothing was written."
            )
        tensors[key] = found
    if not tensors:
        raise CheckpointError(f"{path} names no tensors; it is damaged.")
    return tensors


def _card_before(record: Record) -> str | None:
    path = record.folder / _CARD_BEFORE
    return path.read_bytes().decode(errors="replace") if record.had_card and path.is_file() else None


def _read_card(folder: Path) -> str | None:
    """The checkpoint's card; None if there is none, or it is no text."""
    try:
        return (folder / CARD_FILE).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _inside(folder: Path, name: str) -> Path:
    return folder / EDITS_FOLDER / name


def _require_folder(checkpoint: str | Path) -> Path:
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {checkpoint}. Expected the folder of an edited checkpoint.")
    for path in (folder / EDITS_FOLDER, _inside(folder, _JOURNAL), _inside(folder, _PREPARING)):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; the history of a checkpoint lies in its own folder.")
    return folder
