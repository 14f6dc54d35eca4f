"""Changes of a checkpoint on disk, and the journal that makes doing and undoing them crash-safe.

```
edits/0001/                one record an edit in force, oldest first: see `records.py`
edits/.journal/            a change that has begun and not ended
```

A record is a journal that was closed. To write an edit, its record is prepared aside, synced, and renamed to
`.journal`; then the weights are overwritten; and a second rename, to `0001`, closes it. To undo the last edit is to
open its journal again and take it back. So whenever a process dies, there is no journal, and the checkpoint is in its
old or its new state; or there is one, and `recover` takes it back (or finishes the removal of an earlier edit) before
anything else.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import CheckpointError, CheckpointWriteError
from .ledger import read_facts
from .mapping import TensorShift, map_shifts
from .model_card import EditSummary, render_checkpoint_card, strip_checkpoint_card
from .records import (
    CARD_BEFORE,
    CARD_FILE,
    EDITS_FOLDER,
    ID_PATTERN,
    JOURNAL,
    ORIGINALS_FILE,
    PREPARING,
    RECORD_FILE,
    SHIFTS_FILE,
    Record,
    inside,
    ledger_of_records,
    parse_tensors,
    read_copies,
    read_history,
    read_record,
    record_text,
    require_folder,
    tensors_json,
)
from .shards import TensorEntry, copy_bytes, in_hub_cache, parse_json, raw, write_entries
from .shifts import add_rows, load_shifts
from .state import state_has

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CLOSED, _DROPPED = ".closed", ".dropped"
_REMOVAL_FILE, _WEIGHTS_FILE, _REPLACING = "removal.json", "weights.safetensors", "replacing"
_UNLINKED = "unlinked"
_CARD_FOLDER = "card"
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class UndoReport:
    """What `undo_edit` did.

    Attributes:
        summary: of the edit that was removed.
        remaining: ids of the edits still in force.
        exact: whether every byte is as if the edit had never been; else the tensors that a later edit shares with it
            were added up anew, exact to the rounding of one addition an edit.
        solved_together: whether later edits were solved together with its facts (`accumulate=True`), so that what is
            left is not what the facts left would give, until the next such call solves for those anew.
        in_statistics: whether later edits went on from running statistics that had taken in its facts, which those that
            the next edit goes on from still hold.
    """

    summary: EditSummary
    remaining: list[str]
    exact: bool
    solved_together: bool = False
    in_statistics: bool = False


# What users call


def undo_edit(checkpoint: str | Path, edit_id: str | int | None = None) -> UndoReport:
    """Take an edit back from a checkpoint on disk, crash-safe.

    The last edit's tensors are restored byte for byte. For an earlier one the tensors are computed anew from the saved
    originals and the shifts of the edits that stay.

    Args:
        checkpoint: its folder.
        edit_id: its number, as `hf-malmen log` shows it; None takes the last.

    Raises:
        CheckpointError: no such edit; a record or weight file that is not as the edit left it; files that cannot be
            written. Nothing was changed.
    """
    folder = require_folder(checkpoint)
    with locked(folder):
        recover_locked(folder)
        records = read_history(folder)
        if not records:
            raise CheckpointError(f"{folder} has no edits in force, so there is nothing to undo.")
        found = [record for record in records if edit_id is None or record.id == str(edit_id).zfill(4)]
        if not found:
            ids = ", ".join(record.id for record in records)
            raise CheckpointError(f"{folder} has no edit {edit_id} in force. Its edits: {ids}.")
        record = found[-1]
        later = [other for other in records if int(other.id) > int(record.id)]
        solved_together, in_statistics = (
            state_has(record.folder, part) and any(state_has(other.folder, part) for other in later)
            for part in ("rows", "statistics")
        )
        _check_untouched(records, record)
        with _clean_after_failure(folder):
            if later:
                _prepare_removal(folder, record, records)
                _make_writable(folder, record.tensors)
                _rename(inside(folder, PREPARING), inside(folder, JOURNAL))
            else:
                record.originals()
                _make_writable(folder, record.tensors)
                _rename(record.folder, inside(folder, JOURNAL))
        try:
            _replay(folder)
        except OSError as error:
            raise _unfinished(folder, f"undoing edit {record.id} of", error) from error
        shared = any(record.tensors_in(other.tensors) for other in later)
        remaining = [other.id for other in records if other is not record]
        return UndoReport(record.summary, remaining, not shared, solved_together, in_statistics)


def recover_checkpoint(checkpoint: str | Path) -> bool:
    """Finish or take back what a process that died was doing to a checkpoint.

    Every function of this package that opens a checkpoint to edit it does this first.

    Returns:
        Whether there was anything to do.

    Raises:
        CheckpointError: no such folder, another process is writing to it, a damaged journal, or a folder of the Hub's
            shared cache.
    """
    folder = require_folder(checkpoint)
    if not _leftovers(folder):
        return False
    with locked(folder):
        return recover_locked(folder)


def require_settled(folder: Path) -> None:
    """Recover a checkpoint before it is read, if a process died while it wrote to it.

    Raises:
        CheckpointError: see `recover_checkpoint`.
    """
    if inside(folder, JOURNAL).exists():
        recover_checkpoint(folder)


# What the writer uses


@contextmanager
def locked(folder: Path, *, is_optional: bool = False) -> Iterator[None]:
    """Keep other writers out. The lock is on the folder itself, leaves no file behind, and ends with its process.

    Args:
        folder: the folder.
        is_optional: go on without a lock where the system or the disk has none.

    Raises:
        CheckpointWriteError: another process holds it, or there is none to have.
    """
    if fcntl is None:
        if not is_optional:
            raise CheckpointWriteError(
                "Editing in place needs file locks that this system does not have. Use output_dir."
            )
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointWriteError(
                f"Another process is writing to {folder}. Wait until it is done, or stop it."
            ) from None
        except OSError as error:  # as of some network file systems
            if not is_optional:
                raise CheckpointWriteError(
                    f"{folder} cannot be locked: {error}. Use output_dir on another disk."
                ) from error
        yield
    finally:
        os.close(handle)


def recover_locked(folder: Path) -> bool:
    """`recover_checkpoint` by who holds the lock."""
    try:
        found = _leftovers(folder)
        if found and any(in_hub_cache(path) for path in (folder / EDITS_FOLDER).rglob("*")):
            raise CheckpointError(
                f"{folder} was uploaded in the middle of an edit, and the Hub's shared cache is never written. "
                "Download it to a folder of its own (hf download --local-dir) and run hf-malmen recover on it."
            )
        if inside(folder, JOURNAL).is_dir():
            _replay(folder)
        _sweep(folder)
        return found
    except CheckpointError:
        raise
    except OSError as error:
        raise _unfinished(folder, "recovering", error) from error


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

    Raises:
        CheckpointError: the same edit is in force on these tensors already.
    """
    records = read_history(folder)
    edit_id = f"{max([int(record.id) for record in records], default=0) + 1:04d}"
    preparing = inside(folder, PREPARING)
    summary = summarise(edit_id)
    with _clean_after_failure(folder):
        _require_space(folder, sum(entry.end - entry.begin for entry in tensors.values()))
        preparing.mkdir(parents=True)
        save_edit(preparing)
        _require_new(folder, preparing, tensors, records)
        ledger = ledger_of_records([*records, Record(summary, preparing, {}, [], dict(tensors))])
        summary = replace(summary, n_replaced=ledger.n_replaced_by(edit_id))
        write_entries(preparing / ORIGINALS_FILE, tensors)
        card, before = None, _read_card(folder)
        if not (folder / CARD_FILE).is_file() or before is not None:  # a card that is no text is left alone
            card = render_checkpoint_card(before, [*(record.summary for record in records), summary])
            (preparing / CARD_FILE).write_bytes(card.encode())
            if before is not None:
                (preparing / CARD_BEFORE).write_bytes(before.encode())
        record = Record(
            summary,
            preparing,
            {name: list(keys) for name, keys in modules.items()},
            sorted(fan_in_fan_out),
            dict(tensors),
            had_card=before is not None,
            card_sha256=None if card is None else _sha256(card),
        )
        (preparing / RECORD_FILE).write_text(record_text(record), encoding="utf-8")
        _make_writable(folder, tensors)
        check()
        _sync_tree(preparing)
        _rename(preparing, inside(folder, JOURNAL))
    journal = inside(folder, JOURNAL)
    try:
        yield record
        for file in {entry.file for entry in tensors.values()}:
            sync_file(file)
        # Written beside and renamed: the file that is there tells `recover` what to take back.
        _replace_text(journal / RECORD_FILE, record_text(record))
        if card is not None:
            os.replace(journal / CARD_FILE, folder / CARD_FILE)
            sync_file(folder)
        _rename(journal, inside(folder, edit_id))
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


def _require_new(folder: Path, preparing: Path, tensors: Mapping[str, TensorEntry], records: Sequence[Record]) -> None:
    """Refuse the edit in `preparing` where its shifts and facts are in force on the same tensors already.

    Raises:
        CheckpointError: they are: its shifts would come to twice what they are.
    """
    facts = read_facts(preparing)
    for record in records:
        shifts = record.folder / SHIFTS_FILE
        if not record.tensors_in(tensors) or not shifts.is_file():
            continue
        if filecmp.cmp(shifts, preparing / SHIFTS_FILE, shallow=False) and read_facts(record.folder) == facts:
            raise CheckpointError(
                f"This edit is in force on the checkpoint already, as its edit {record.id}, and writing it again would "
                f"double its shifts. Nothing was written. To take it back: hf-malmen undo DIR --edit {int(record.id)}"
            )


# The journal


def _replay(folder: Path) -> None:
    """Take back the edit whose journal is open, or finish the removal. Stopped at any point, it can begin again."""
    journal = inside(folder, JOURNAL)
    if (journal / _REMOVAL_FILE).is_file():
        _finish_removal(folder, journal)
    else:
        _take_back(folder, journal)
    _rename(journal, inside(folder, _CLOSED))
    _sweep(folder)


def _take_back(folder: Path, journal: Path) -> None:
    record = read_record(folder, journal)
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
    tensors = parse_tensors(folder, removal.get("tensors"), journal / _REMOVAL_FILE)
    weights = read_copies(journal / _WEIGHTS_FILE, tensors)
    for staged in (journal / _REPLACING).glob("*"):  # what takes the place of a sound record is one
        if (staged / RECORD_FILE).is_file():
            record = read_record(folder, staged)
            if (staged / ORIGINALS_FILE).is_file():
                record.originals()
    _make_writable(folder, tensors)
    _restore(weights, tensors)
    for staged in sorted((journal / _REPLACING).glob("*/*")):
        name = staged.parent.name
        parent = folder if name == _CARD_FOLDER else inside(folder, name)
        allowed = (CARD_FILE,) if name == _CARD_FOLDER else (RECORD_FILE, ORIGINALS_FILE, CARD_BEFORE)
        if parent.is_dir() and staged.name in allowed:
            os.replace(staged, parent / staged.name)
            sync_file(parent)
    dropped = str(removal.get("drop"))
    if re.fullmatch(ID_PATTERN, dropped) and inside(folder, dropped).is_dir():
        _rename(inside(folder, dropped), inside(folder, _DROPPED))


def _prepare_removal(folder: Path, record: Record, records: Sequence[Record]) -> None:
    """Everything that the removal of an earlier edit changes, computed aside before the journal is opened."""
    preparing = inside(folder, PREPARING)
    later = records[records.index(record) + 1 :]
    originals = record.originals()
    sizes = {other.id: sum(entry.end - entry.begin for entry in other.tensors.values()) for other in later}
    _require_space(folder, sum(sizes.values()) + sum(entry.end - entry.begin for entry in originals.values()))
    (preparing / _REPLACING).mkdir(parents=True)
    weights = write_entries(preparing / _WEIGHTS_FILE, originals)
    card_before = _card_before(record)
    kept = [other.summary for other in records[: records.index(record)]]
    ledger = ledger_of_records([other for other in records if other is not record])
    for other in later:
        staged = preparing / _REPLACING / other.id
        staged.mkdir()
        shared = record.tensors_in(other.tensors)
        if shared:
            sources = {**other.originals(), **{key: weights[key] for key in shared}}
            write_entries(staged / ORIGINALS_FILE, sources)
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
            (staged / CARD_BEFORE).write_bytes(card_before.encode())
        summary = replace(other.summary, n_replaced=ledger.n_replaced_by(other.id))
        kept.append(summary)
        if other.card_sha256 is not None:
            card_before = render_checkpoint_card(card_before, kept)
        sha256 = _sha256(card_before) if other.card_sha256 is not None and card_before is not None else None
        changed = replace(other, summary=summary, had_card=had_card, card_sha256=sha256)
        (staged / RECORD_FILE).write_text(record_text(changed), encoding="utf-8")
    card = _read_card(folder)
    if card is not None:
        # As it would have been; or, where somebody changed it since, with our section brought up to date.
        untouched = card_before is not None and later[-1].card_sha256 == _sha256(card)
        (preparing / _REPLACING / _CARD_FOLDER).mkdir()
        text = card_before if untouched and card_before is not None else render_checkpoint_card(card, kept)
        (preparing / _REPLACING / _CARD_FOLDER / CARD_FILE).write_bytes(text.encode())
    removal = {"drop": record.id, "tensors": tensors_json(record.tensors)}
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
        last = [other for other in records if key in record.tensors_in(other.tensors)][-1]
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
            preparing = inside(folder, PREPARING)
            preparing.mkdir(parents=True, exist_ok=True)
            _require_space(folder, status.st_size)
            staged = preparing / _UNLINKED / file.name  # apart from what lies there, which may have this name
            staged.parent.mkdir(exist_ok=True)
            shutil.copy2(file, staged)
            sync_file(staged)
            os.replace(staged, file)
            staged.parent.rmdir()
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
    for name in (PREPARING, _CLOSED, _DROPPED):
        if inside(folder, name).exists():
            shutil.rmtree(inside(folder, name))
    edits = folder / EDITS_FOLDER
    if edits.is_dir() and not any(edits.iterdir()):
        edits.rmdir()
        sync_file(folder)


def _leftovers(folder: Path) -> bool:
    edits = folder / EDITS_FOLDER
    names = (JOURNAL, PREPARING, _CLOSED, _DROPPED)
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


def _card_before(record: Record) -> str | None:
    path = record.folder / CARD_BEFORE
    return path.read_bytes().decode(errors="replace") if record.had_card and path.is_file() else None


def _read_card(folder: Path) -> str | None:
    """The checkpoint's card; None if there is none, or it is no text."""
    try:
        return (folder / CARD_FILE).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
