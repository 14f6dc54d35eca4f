"""Facts in any shape -> a list of checked `Fact`s."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import FactError

_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Fact:
    """One fact to write into a model: after the edit, `prompt` is to be completed by `target`.

    Attributes:
        prompt: text that the model completes, without trailing space.
        target: the new answer.
        rephrases: other wordings of the prompt, for generalization.
        unrelated_prompt, unrelated_answer: a prompt that the edit must leave alone, and its answer, for locality.
        subject: what the fact is about, a substring of the prompt.
        ground_truth: the answer before the edit.
    """

    prompt: str
    target: str
    rephrases: tuple[str, ...] = ()
    unrelated_prompt: str | None = None
    unrelated_answer: str | None = None
    subject: str | None = None
    ground_truth: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict without the fields that are not set."""
        return {key: list(value) if key == "rephrases" else value for key, value in asdict(self).items() if value}


_FIELDS = tuple(field.name for field in fields(Fact))


def _plain(value: Any) -> Any:
    """`value` in plain Python: data frames hold arrays for lists, and NaN for what is missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _first(value: Any) -> Any:
    """The first entry of a list, or the value itself: published files wrap a single answer in a list, or do not."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return value


def _from_own(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in _FIELDS}


def _from_zsre(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["src"],
        "target": row["alt"],
        "rephrases": row.get("rephrase"),
        "unrelated_prompt": (row.get("loc") or "").removeprefix("nq question: ") or None,
        "unrelated_answer": _first(row.get("loc_ans")),
        "subject": row.get("subject"),
        "ground_truth": _first(row.get("answers")),
    }


def _from_counterfact(row: Mapping[str, Any]) -> dict[str, Any]:
    request = row["requested_rewrite"]
    neighbour = _first(row.get("neighborhood_prompts"))
    return {
        "prompt": request["prompt"].replace("{}", request["subject"]),
        "target": request["target_new"]["str"],
        "rephrases": row.get("paraphrase_prompts"),
        "unrelated_prompt": neighbour,
        "unrelated_answer": request["target_true"]["str"] if neighbour else None,
        "subject": request["subject"],
        "ground_truth": request["target_true"]["str"],
    }


def _from_knowedit(row: Mapping[str, Any]) -> dict[str, Any]:
    locality = next(iter((row.get("locality") or {}).values()), None) or [{}]
    probe = locality[0] if isinstance(locality, list) else locality
    return {
        "prompt": row["prompt"],
        "target": row["target_new"],
        "rephrases": row.get("rephrase_prompt") or row.get("rephrase"),
        "unrelated_prompt": probe.get("prompt"),
        "unrelated_answer": _first(probe.get("ground_truth")),
        "subject": row.get("subject"),
        "ground_truth": _first(row.get("ground_truth")),
    }


def _from_fever(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "target": _first(row["alt"]),
        "rephrases": row.get("equiv_prompt"),
        "unrelated_prompt": _first(row.get("unrel_prompt")),
        "unrelated_answer": _first(row.get("unrel_ans")),
    }


def _from_ultraeditbench(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "target": row["ans"],
        "rephrases": row.get("rephrase_prompt"),
        "unrelated_prompt": row.get("locality_prompt"),
        "unrelated_answer": row.get("locality_ans"),
        "subject": row.get("subject"),
    }


# Format: the columns that give it away, and its reader. The first whose columns are all there is taken.
_FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "hf_malmen": (frozenset({"prompt", "target"}), _from_own),
    "CounterFact": (frozenset({"requested_rewrite"}), _from_counterfact),
    "zsRE": (frozenset({"src", "alt"}), _from_zsre),
    "KnowEdit": (frozenset({"prompt", "target_new"}), _from_knowedit),
    "FEVER": (frozenset({"prompt", "alt"}), _from_fever),
    "UltraEditBench": (frozenset({"prompt", "ans"}), _from_ultraeditbench),
}


def load_facts(
    source: Any,
    *,
    column_mapping: Mapping[str, str] | None = None,
    split: str | None = None,
) -> list[Fact]:
    """Read facts from wherever they are, and check them.

    Args:
        source: a list of dicts or `Fact`s, a `datasets.Dataset`, the path of a JSON, JSONL, CSV, TSV or Parquet file,
            or the id of a data set on the Hub. The columns of zsRE, CounterFact, KnowEdit, FEVER and UltraEditBench
            are recognised.
        column_mapping: `{fact field: column}` for any other layout, such as `{"prompt": "question"}`.
        split: split of a Hub data set. Defaults to `"train"`.

    Returns:
        The facts, in their order.

    Raises:
        FactError: nothing there; a column or field missing; an empty prompt or target; one prompt with two targets.
    """
    rows = list(_read(source, split))
    if not rows:
        raise FactError(f"No facts in {_describe(source)}. Expected at least one, with a prompt and a target.")
    facts = [row if isinstance(row, Fact) else _parse(row, number, column_mapping) for number, row in enumerate(rows)]
    check_facts(facts)
    return facts


def check_facts(facts: Iterable[Fact]) -> None:
    """Refuse facts that cannot be written as they stand.

    Raises:
        FactError: none at all; an empty prompt, target, rephrase or unrelated text; the same prompt with two targets.
    """
    targets: dict[str, tuple[int, str]] = {}
    number = -1
    for number, fact in enumerate(facts):
        for name in ("prompt", "target"):
            value = getattr(fact, name)
            if not isinstance(value, str) or not value.strip():
                raise FactError(f"Fact {number} has an empty {name} ({value!r}). Give it a text, or remove the fact.")
        if not all(isinstance(text, str) and text.strip() for text in fact.rephrases):
            raise FactError(f"Fact {number} ({fact.prompt!r}) has an empty rephrase. Give it a text, or remove it.")
        if (fact.unrelated_prompt is None) != (fact.unrelated_answer is None):
            raise FactError(
                f"Fact {number} ({fact.prompt!r}) has only one of unrelated_prompt and unrelated_answer. "
                "Locality needs both; give both or neither."
            )
        first, target = targets.setdefault(fact.prompt, (number, fact.target))
        if target != fact.target:
            raise FactError(
                f"Facts {first} and {number} give the prompt {fact.prompt!r} two targets, {target!r} and "
                f"{fact.target!r}. A model can hold one; remove the other."
            )
    if number < 0:
        raise FactError("No facts given. Expected at least one, with a prompt and a target.")


def require_fields(facts: Iterable[Fact], names: Iterable[str], purpose: str) -> None:
    """Check that every fact has what `purpose` needs.

    Raises:
        FactError: names the first fact without one of the fields.
    """
    names = tuple(names)
    for number, fact in enumerate(facts):
        for name in names:
            if not getattr(fact, name):
                raise FactError(
                    f"{purpose} needs the field {name!r} in every fact, and fact {number} ({fact.prompt!r}) has none. "
                    f"Found: {', '.join(fact.to_dict())}."
                )


def _read(source: Any, split: str | None) -> Iterable[Mapping[str, Any] | Fact]:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() in _FILE_BUILDERS:
            return _read_file(path)
        if path.exists():
            raise FactError(
                f"{path} is not a file of facts. Expected one ending in {', '.join(_FILE_BUILDERS)}, "
                "or the id of a data set on the Hub."
            )
        import datasets

        return datasets.load_dataset(str(source), split=split or "train")
    if isinstance(source, Mapping):
        raise FactError(f"Facts come as a list of dicts; got a single {type(source).__name__}. Put it in a list.")
    return source


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise FactError(f"There is no file {path}. Give the path of an existing file of facts.")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _read_json(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_table(path)
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise FactError(f"{path} is not a Parquet file that can be read: {error}.") from None
    return rows


def _read_table(path: Path) -> list[Mapping[str, Any]]:
    # Not pandas, which takes "NA" and "None" for missing values: here they may be answers.
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = list(csv.DictReader(stream, delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise FactError(f"{path} is not valid {path.suffix[1:].upper()} in UTF-8: {error}.") from None
    for number, row in enumerate(rows):
        if None in row:
            raise FactError(f"Fact {number} in {path} has more cells than there are columns. Quote texts with commas.")
    return [{column: cell or None for column, cell in row.items()} for row in rows]


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            # Not `splitlines`, which also splits at separators that a JSON string may hold.
            return [_parse_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = json.loads(text)
    except ValueError as error:  # broken JSON, or not UTF-8
        raise FactError(f"{path} is not valid {path.suffix[1:].upper()}: {error}. One JSON object a fact.") from None
    if not isinstance(rows, list):
        raise FactError(f"{path} holds a JSON {type(rows).__name__}; expected a list of facts.")
    return rows


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {number} column {error.colno}") from None


def _parse(row: Any, number: int, column_mapping: Mapping[str, str] | None) -> Fact:
    if not isinstance(row, Mapping):
        raise FactError(f"Fact {number} is a {type(row).__name__}; expected a dict with a prompt and a target.")
    if column_mapping:
        row = _rename(row, number, column_mapping)
    row = {column: _plain(value) for column, value in row.items()}
    for name, (columns, read) in _FORMATS.items():
        if columns <= row.keys():
            try:
                values = read(row)
            except (AttributeError, KeyError, TypeError) as error:
                raise FactError(
                    f"Fact {number} has the columns of {name}, and cannot be read as such: {error!r}."
                ) from None
            break
    else:
        known = "; ".join(f"{name}: {', '.join(sorted(columns))}" for name, (columns, _) in _FORMATS.items())
        raise FactError(
            f"Fact {number} has the columns {', '.join(map(str, row)) or 'none'}. Expected those of a known format "
            f"({known}), or pass column_mapping={{'prompt': ..., 'target': ...}}."
        )
    rephrases = values.pop("rephrases", None)
    if isinstance(rephrases, str):
        rephrases = [rephrases]
    known_values = {key: str(value) for key, value in values.items() if value is not None and value != ""}
    prompt, target = known_values.pop("prompt", ""), known_values.pop("target", "")
    return Fact(prompt, target, tuple(rephrases or ()), **known_values)


def _rename(row: Mapping[str, Any], number: int, column_mapping: Mapping[str, str]) -> dict[str, Any]:
    for field, column in column_mapping.items():
        if field not in _FIELDS:
            raise FactError(f"column_mapping names {field!r}, which no fact has. Fields: {', '.join(_FIELDS)}.")
        if column not in row:
            raise FactError(
                f"column_mapping takes {field!r} from the column {column!r}, and fact {number} has only "
                f"{', '.join(map(str, row))}."
            )
    taken = set(column_mapping.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {field: row[column] for field, column in column_mapping.items()}


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"
