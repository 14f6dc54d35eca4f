"""The records of the edits in force on a checkpoint: what they say, how they are read, and what of them is believed.

```
edits/0001/                one record an edit in force, oldest first
    record.json            which tensors it replaced, when, by what, and what was measured
    originals.safetensors  the bytes that it replaced
    README.before.md       the checkpoint's card before it, if there was one
    config.json, edit.safetensors   the edit itself; `Edit.from_pretrained` reads the folder
    state.safetensors      what follows the edits, where something does: see `state.py`
```

Nothing here writes; `history.py` does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .ledger import Ledger, build_ledger, read_facts
from .model_card import EditSummary
from .shards import INDEX_FILE, SINGLE_FILE, TensorEntry, parse_json, read_header

EDITS_FOLDER = "edits"
SHIFTS_FILE = "edit.safetensors"
CARD_FILE = "README.md"
RECORD_FILE, ORIGINALS_FILE, CARD_BEFORE = "record.json", "originals.safetensors", "README.before.md"
JOURNAL, PREPARING = ".journal", ".preparing"
ID_PATTERN = r"\d{4,}"
_DAMAGED = "The history is damaged: restore the folder edits/ from a copy of the checkpoint."


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

    def tensors_in(self, tensors: Mapping[str, TensorEntry]) -> list[str]:
        """Keys of its tensors that are among `tensors`, in the same file: lone weight files have keys in common."""
        return [key for key, entry in self.tensors.items() if key in tensors and tensors[key].file == entry.file]

    def originals(self) -> dict[str, TensorEntry]:
        """The tensors as they were before, by key.

        Raises:
            CheckpointError: they are not what the record says.
        """
        return read_copies(self.folder / ORIGINALS_FILE, self.tensors)


def read_history(checkpoint: str | Path) -> list[Record]:
    """The edits in force on a checkpoint, oldest first.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: no such folder, or a damaged record.
    """
    folder = require_folder(checkpoint)
    names = [path.name for path in (folder / EDITS_FOLDER).glob("*") if re.fullmatch(ID_PATTERN, path.name)]
    records = [read_record(folder, folder / EDITS_FOLDER / name) for name in sorted(names, key=int)]
    for record in records:
        if record.id != record.folder.name:
            raise CheckpointError(f"{record.folder} holds the record of edit {record.id}. {_DAMAGED}")
    return records


def read_ledger(checkpoint: str | Path) -> Ledger:
    """The facts that the edits in force on a checkpoint wrote, and which of them later ones replaced.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: no such folder, or a damaged record.
    """
    return ledger_of_records(read_history(checkpoint))


def ledger_of_records(records: Sequence[Record]) -> Ledger:
    """The ledger of the edits of one folder, oldest first. Each lone weight file in it is a model of its own.

    Raises:
        CheckpointError: a damaged index of the checkpoint, or the facts of a record are.
    """
    edits = [(record.id, read_facts(record.folder), record.summary.n_facts) for record in records]
    return build_ledger(edits, {record.id: _model_of(record) for record in records})


def _model_of(record: Record) -> str:
    """The lone weight file that an edit is of; "": it is of the folder's checkpoint, in one file or in shards."""
    file = next(iter(record.tensors.values())).file
    index = file.with_name(INDEX_FILE)
    shards = parse_json(index.read_bytes(), index).get("weight_map") if index.is_file() else None
    is_own = file.name == SINGLE_FILE or file.name in (shards or {}).values()
    return "" if is_own else file.name


def record_text(record: Record) -> str:
    """What `record.json` holds."""
    content = {
        "summary": asdict(record.summary),
        "modules": record.modules,
        "fan_in_fan_out": record.fan_in_fan_out,
        "tensors": tensors_json(record.tensors),
        "checksums": record.checksums,
        "rounding": record.rounding,
        "had_card": record.had_card,
        "card_sha256": record.card_sha256,
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def tensors_json(tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """Where tensors lie, by key, as records and journals say it; `parse_tensors` reads it."""
    return {key: {**asdict(entry), "file": entry.file.name} for key, entry in tensors.items()}


def read_copies(path: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a record's or journal's file, which must be of the same kinds as those of the checkpoint.

    Raises:
        CheckpointError: it does not hold them.
    """
    found = read_header(path)
    shapes = {key: (entry.dtype, entry.shape) for key, entry in found.items()}
    if shapes != {key: (entry.dtype, entry.shape) for key, entry in tensors.items()}:
        raise CheckpointError(f"{path} does not hold the tensors its record names.")
    return found


def read_record(folder: Path, place: Path) -> Record:
    """The record in a folder of its own, checked.

    Args:
        folder: the checkpoint's.
        place: the record's, in `edits/` or in a journal.

    Raises:
        CheckpointError: it is missing or damaged, or names tensors that the checkpoint does not have.
    """
    path = place / RECORD_FILE
    if not path.is_file():
        raise CheckpointError(f"{place} has no {RECORD_FILE}. {_DAMAGED}")
    content = parse_json(path.read_bytes(), path)
    tensors = parse_tensors(folder, content.pop("tensors", None), path)
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
    if not re.fullmatch(ID_PATTERN, summary.id):
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


def parse_tensors(folder: Path, content: Any, path: Path) -> dict[str, TensorEntry]:
    """Places of tensors, believed only where they are what the headers of the checkpoint's files say.

    Args:
        folder: the checkpoint's.
        content: what `tensors_json` made, or what is said to be that.
        path: the file that says so, for the message.

    Raises:
        CheckpointError: they lie elsewhere, or there are none.
    """
    headers: dict[str, dict[str, TensorEntry]] = {}
    tensors = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = value.get("file") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the file {name!r}; expected a weight file of {folder}.")
        if name not in headers:
            headers[name] = read_header(folder / name)
        found = headers[name].get(key)
        if found is None or json.loads(json.dumps(tensors_json({key: found})))[key] != value:
            raise CheckpointError(
                f"{path} says that {key} lies in {name} in a place where it does not. The file was replaced since, or "
                "the record is damaged; nothing was written."
            )
        tensors[key] = found
    if not tensors:
        raise CheckpointError(f"{path} names no tensors. {_DAMAGED}")
    return tensors


def inside(folder: Path, name: str) -> Path:
    """A path in the folder of edits of a checkpoint."""
    return folder / EDITS_FOLDER / name


def require_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint.

    Raises:
        CheckpointError: there is none, or its history lies elsewhere.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {checkpoint}. Expected the folder of an edited checkpoint.")
    for path in (folder / EDITS_FOLDER, inside(folder, JOURNAL), inside(folder, PREPARING)):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; the history of a checkpoint lies in its own folder.")
    return folder
