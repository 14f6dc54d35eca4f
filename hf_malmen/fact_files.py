"""A file of facts -> its rows, as they stand there, one at a time."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .class_labels import named
from .errors import FactError

_CHUNK = 1 << 16  # characters of a JSON list read at a time
_ROWS = 1 << 10  # rows of a Parquet file read at a time
_skip_space = re.compile(r"[ \t\r\n]*").match


def read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    """The rows of a file, by its ending.

    Raises:
        FactError: there is no such file, or its ending is none of these; and, while its rows are read, if it is broken.
    """
    if path.suffix.lower() not in FILE_READERS:
        raise FactError(
            f"{path} is not a file of facts. Expected one ending in {', '.join(FILE_READERS)}, "
            "or the id of a data set on the Hub."
        )
    if not path.is_file():
        raise FactError(f"There is no file {path}. Give the path of an existing file of facts.")
    return FILE_READERS[path.suffix.lower()](path)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    for rows, features in _parquet_rows(path):
        yield from named(rows, features)


def _parquet_rows(path: Path) -> Iterator[tuple[list[Mapping[str, Any]], Any]]:
    """Some rows at a time, and what `datasets` wrote of their columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            features = _features(file.schema_arrow)
            for rows in file.iter_batches(_ROWS):
                yield rows.to_pylist(), features
    except (pyarrow.ArrowException, ValueError) as error:
        raise FactError(f"{path} is not a Parquet file that can be read: {error}.") from None


def _features(schema: Any) -> Any:
    """What `datasets` wrote of a Parquet file's columns, such as which are classes; None where that cannot be read."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError):  # of a newer release, or another writer's
        return None


def _read_table(path: Path) -> Iterator[Mapping[str, Any]]:
    # Not pandas, which takes "NA" and "None" for missing values: here they may be answers.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = reader.fieldnames or ()
            # Spreadsheets add columns without a name or a cell.
            if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
                raise FactError(f"{path} has several columns {', '.join(map(repr, twice))}. Rename all but one.")
            for number, row in enumerate(reader):
                if None in row:
                    raise FactError(
                        f"Fact {number} in {path} has more cells than there are columns. Quote texts with commas."
                    )
                yield {column: cell or None for column, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        # The limit is one of the whole process, which is not ours to raise.
        raise FactError(
            f"{path} cannot be read as {path.suffix[1:].upper()} in UTF-8: {error}. Expected closed quotes, and cells "
            f"of {csv.field_size_limit():,} characters at most; JSONL takes longer ones."
        ) from None


def _read_json(path: Path) -> Iterator[Any]:
    """A list, or an object a line: either is published under either ending."""
    try:
        # `newline` keeps lines from ending at other separators, which a JSON string may hold.
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            line = 1
            while (mark := stream.read(1)).isspace():
                line += mark == "\n"
            if mark == "[":
                yield from _json_list(stream, line)
            else:
                stream.seek(0)
                yield from _json_lines(stream)
    except ValueError as error:  # broken JSON, or not UTF-8
        raise FactError(
            f"{path} is not valid {path.suffix[1:].upper()}: {error}. Expected a list of facts, or one object a line."
        ) from None


def _json_lines(stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg}: line {number} column {error.colno}") from None
            except RecursionError:
                raise ValueError(f"Nested too deeply: line {number}") from None
            yield entry


def _json_list(stream: TextIO, line: int) -> Iterator[Any]:
    """The entries of a JSON list, decoded one at a time, as `json.load` would return them all.

    Args:
        stream: right behind the opening bracket.
        line: its number there.

    Raises:
        ValueError: not a JSON list; names the line.
    """
    decode = json.JSONDecoder().raw_decode
    text, at, mark = "", 0, "["  # `at`: where the next entry is looked for; `mark`: what stands before it
    while mark != "]":
        try:
            at = _skip_space(text, at).end()  # type: ignore[union-attr] # it matches anything
            if mark == "[" and text[at : at + 1] == "]":
                at, mark = at + 1, "]"
                continue
            entry, end = decode(text, at)
            end = _skip_space(text, end).end()  # type: ignore[union-attr]
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:  # the entry is broken, or goes on behind `text`
            more = stream.read(max(_CHUNK, len(text) - at))  # doubled each time: linear in the length of an entry
            if not more:
                raise ValueError(f"{error.msg}: line {line + text.count(chr(10), 0, error.pos)}") from None
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        except RecursionError:
            raise ValueError(f"Nested too deeply: line {line + text.count(chr(10), 0, at)}") from None
        else:
            yield entry
            at, mark = end + 1, text[end]
    if text[at:].strip() or stream.read().strip():
        raise ValueError(f"Extra data behind the list: line {line + text.count(chr(10), 0, at)}")


# By the ending of a file, in small letters.
FILE_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
