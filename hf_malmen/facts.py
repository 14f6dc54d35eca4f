"""Facts in any shape -> checked `Fact`s, as a list or one at a time."""

import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .class_labels import named
from .errors import FactError
from .fact_files import FILE_READERS, read_file

_MISSING = ("NAType", "NaTType")  # what pandas writes for it beside NaN; by name, so that it need not be imported


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
        neighborhood: every (prompt, answer) that the edit must leave alone, where a data set has a list of them. Its
            first pair is `unrelated_prompt`, `unrelated_answer`. In CounterFact all answers are the `ground_truth`.
        portability: (prompt, answer) pairs that follow from the fact: its consequences, other names of its subject.
    """

    prompt: str
    target: str
    rephrases: tuple[str, ...] = ()
    unrelated_prompt: str | None = None
    unrelated_answer: str | None = None
    subject: str | None = None
    ground_truth: str | None = None
    neighborhood: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in _LISTS:  # so that `Fact(**fact.to_dict())` is the fact again, after JSON as well
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict without the fields that are not set. `Fact(**fact.to_dict())` is the fact again."""
        return {name: _plain(value) for name, value in vars(self).items() if value}


_FIELDS = tuple(field.name for field in fields(Fact))
_PAIRS = ("neighborhood", "portability")
_LISTS = ("rephrases", *_PAIRS)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """`value` in plain Python: data frames hold arrays for lists, and NaN for what is missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    missing = math.isnan(value) if isinstance(value, float) else type(value).__name__ in _MISSING
    return None if missing else value


def _bare(value: Any) -> Any:
    """The text of `{"str": text, "id": ...}`, as CounterFact writes its answers; any other value as it is."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


def _first(value: Any) -> Any:
    """The first entry of a list, or the value itself: published files wrap a single answer in a list, or do not."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return _bare(value)


def _text(name: str, value: Any) -> str:
    """`value` as text; a number too, since published answers often are years, and bytes, which are UTF-8.

    Raises:
        FactError: it is anything else, such as a list, which written out would be an answer that nobody meant.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise FactError(f"{name} is {value!r}, which is not text in UTF-8. Give it decoded.") from None
    # A column of years is read as such where one is missing.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, str | Integral) or (isinstance(value, Real | Decimal) and math.isfinite(value)):  # NumPy's too
        return str(value)
    raise FactError(
        f"{name} is {value!r}, a {type(value).__name__}. Expected one text or finite number; give the text itself, or "
        "name the column that holds it in column_mapping."
    )


def _texts(name: str, value: Any) -> list[str]:
    """One text or a list of them, as a list. That none is empty is checked with the fact that they become part of.

    Raises:
        FactError: as `_text`, of the value or of an entry.
    """
    entries = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [_text(f"An entry of {name}", entry) for entry in entries]


def _filled(prompt: Any, subject: Any) -> Any:
    """The prompt with its subject for "{}", as in CounterFact and in the requests of ROME, MEMIT and EasyEdit."""
    return prompt.replace("{}", _text("subject", subject)) if isinstance(prompt, str) and subject else prompt


def _pairs(groups: Any) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of `{kind: [{"prompt": ..., "ground_truth": ...}]}`, of all kinds.

    A kind may also hold one such dict: of one prompt, or of a list of prompts and an equally long list of what is right
    for each, which is what `datasets` makes of a list of dicts. The answer is the first of those that count as right.
    Published sets hold probes without any, which nothing can be compared with: they are left out.

    Raises:
        FactError: lists of different lengths, or something else where a text is expected.
    """
    pairs = []
    for kind, group in (groups or {}).items():
        for probe in [group] if isinstance(group, Mapping) else group or ():
            prompts, truths = probe["prompt"], probe["ground_truth"]
            if not isinstance(prompts, list):  # then a list of truths is what counts as right for this one prompt
                prompts, truths = [prompts], [truths]
            elif not isinstance(truths, list):
                truths = [truths]
            if len(prompts) != len(truths):
                raise FactError(
                    f"{kind} has {len(prompts)} prompts ({prompts!r}) and {len(truths)} answers ({truths!r}). Expected "
                    "an answer for each prompt, in its order; give as many of one as of the other."
                )
            for found, truth in zip(prompts, truths, strict=True):
                prompt = _text(f"A prompt of {kind}", found)
                answer = _text(f"The answer to {prompt!r} in {kind}", _first(truth))
                if _is_text(prompt) and _is_text(answer):
                    pairs.append((prompt, answer))
    return pairs


def _unrelated(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The fields of `pairs` that an edit must leave alone."""
    prompt, answer = pairs[0] if pairs else (None, None)
    return {"neighborhood": pairs, "unrelated_prompt": prompt, "unrelated_answer": answer}


def _one_hop(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The question about a consequence that EasyEdit adds to zsRE and CounterFact."""
    hop = row.get("portability")
    return _pairs({"one_hop": {"prompt": hop["New Question"], "ground_truth": hop["New Answer"]}}) if hop else []


def _from_own(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in _FIELDS}


def _from_zsre(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["src"],
        "target": _first(row["alt"] if "alt" in row else row["ans"]),  # MEND's file, MALMEN's file
        "rephrases": row.get("rephrase"),
        "unrelated_prompt": _text("loc", row.get("loc")).removeprefix("nq question: ") or None,
        "unrelated_answer": _first(row.get("loc_ans")),
        "subject": row.get("subject"),
        "ground_truth": _first(row.get("answers")),
        "portability": _one_hop(row),
    }


def _from_counterfact(row: Mapping[str, Any]) -> dict[str, Any]:
    request = row["requested_rewrite"]
    truth = _first(request["target_true"])
    if not request["subject"]:
        raise FactError("requested_rewrite has an empty subject, which its prompt is about. Give it a text.")
    return {
        **_unrelated([(prompt, truth) for prompt in _texts("neighborhood_prompts", row.get("neighborhood_prompts"))]),
        "prompt": _filled(request["prompt"], request["subject"]),
        "target": _first(request["target_new"]),
        "rephrases": row.get("paraphrase_prompts"),
        "subject": request["subject"],
        "ground_truth": truth,
        "portability": _one_hop(row),
    }


def _from_knowedit(row: Mapping[str, Any]) -> dict[str, Any]:
    # EasyEdit's own CounterFact has these columns too, but for its one unrelated prompt, and the requests in ROME's and
    # MEMIT's notebooks, whose prompts have "{}" for the subject.
    only = {"prompt": row.get("locality_prompt"), "ground_truth": row.get("locality_ground_truth")}
    return {
        **_unrelated(_pairs(row.get("locality") or {"only": only})),
        "prompt": _filled(row["prompt"], row.get("subject")),
        "target": _first(row["target_new"]),
        "rephrases": row.get("rephrase_prompt") or row.get("rephrase"),
        "subject": row.get("subject"),
        "ground_truth": _first(row.get("ground_truth") or row.get("target_true")),
        "portability": _pairs(row.get("portability")),
    }


def _from_wikibio(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_unrelated(_pairs(row.get("locality"))),
        "prompt": row["text"],
        "target": _first(row["labels"]),
        "subject": row["concept"],
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
        "unrelated_prompt": row.get("loc", row.get("locality_prompt")),
        "unrelated_answer": row.get("loc_ans", row.get("locality_ans")),
        "subject": row.get("subject"),
    }


def _from_wikibigedit(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["update"],
        "target": row["ans"],
        "rephrases": [text for text in (row.get("rephrase"), row.get("personas")) if text],
        "unrelated_prompt": row.get("loc"),
        "unrelated_answer": row.get("loc_ans"),
        "subject": row.get("subject"),
        "portability": _pairs({"mhop": {"prompt": row.get("mhop"), "ground_truth": row.get("mhop_ans")}}),
    }


# Format: the columns that give it away, and its reader. The first whose columns are all there is taken.
_FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "hf_malmen": (frozenset({"prompt", "target"}), _from_own),
    "CounterFact": (frozenset({"requested_rewrite"}), _from_counterfact),
    "zsRE": (frozenset({"src", "alt"}), _from_zsre),
    "MALMEN's zsRE": (frozenset({"src", "ans"}), _from_zsre),
    "KnowEdit": (frozenset({"prompt", "target_new"}), _from_knowedit),
    "KnowEdit's WikiBio": (frozenset({"text", "labels", "concept"}), _from_wikibio),
    "FEVER": (frozenset({"prompt", "alt"}), _from_fever),
    "UltraEditBench": (frozenset({"prompt", "ans"}), _from_ultraeditbench),
    "WikiBigEdit": (frozenset({"update", "ans"}), _from_wikibigedit),
}


def load_facts(
    source: Any,
    *,
    column_mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    **load_options: Any,
) -> list[Fact]:
    """Read facts from wherever they are, and check them.

    Args:
        source: a list of dicts or `Fact`s, a `datasets.Dataset` or `IterableDataset`, a pandas `DataFrame`, a
            `FactStream`, the path of a JSON, JSONL, CSV, TSV or Parquet file, or the id of a data set on the Hub. The
            columns of zsRE, CounterFact, KnowEdit, FEVER, UltraEditBench and WikiBigEdit are recognised, and the
            requests in ROME's and MEMIT's notebooks. A cell that is missing (None, NaN) is not there. A class
            (`datasets.ClassLabel`) counts by its name. A "{}" in a prompt or rephrase that lacks the fact's subject
            stands for it.
        column_mapping: `{fact field: column}` for any other layout, such as `{"prompt": "question"}`. If it names both
            the prompt and the target, the other columns count by the names of fields. If not, and the layout is a
            recognised one, it wins for the fields that it names. A column that is named counts for nothing else.
        split: split of a Hub data set. Defaults to `"train"`.
        load_options: of a Hub data set, for `datasets.load_dataset`: `name`, `data_files`, `revision`, ...

    Returns:
        The facts, in their order.

    Raises:
        FactError: nothing there; a column or field missing; a list or dict in place of a text; an empty prompt or
            target; one prompt with two targets.
    """
    facts = list(_parse_all(_read(source, split, load_options), column_mapping))
    return list(_checked(facts, f"in {_describe(source)}", facts))


def read_facts(source: Any) -> Iterator[Fact]:
    """The facts of a source as `load_facts` takes it, each checked by itself, and not against the others.

    For sources that give a prompt twice, of which the caller chooses.

    Raises:
        FactError: while iterating: a column or field missing; an empty prompt or target.
    """
    for number, fact in enumerate(_parse_all(_read(source, None, {}), None)):
        _check(fact, number)
        yield fact


class FactStream:
    """Facts that are read as they are needed: each pass opens the source anew and yields one checked `Fact` at a time.

    For more facts than are to be held at once. What is held is one `Fact`, a window of the file, and about 120 bytes a
    fact to find contradictions: 64-bit hashes of its prompt and target, in place of the texts. Two of n prompts share a
    hash with probability n² / 2⁶⁵ (10⁻⁷ for two million), and would be refused as a contradiction.

    A bad fact raises when the pass reaches it, so a whole pass (`for _ in stream: pass`) is a check of all.

    Args:
        source: as for `load_facts`, but no iterator, which could be read only once. A data set on the Hub is streamed.
        column_mapping, split, load_options: as for `load_facts`.

    Raises:
        FactError: the source is an iterator; while iterating: as `load_facts`.
    """

    def __init__(
        self,
        source: Any,
        *,
        column_mapping: Mapping[str, str] | None = None,
        split: str | None = None,
        **load_options: Any,
    ) -> None:
        if isinstance(source, Iterator):
            raise FactError(
                f"A FactStream is read more than once, and {_describe(source)} can be read once. Give it a file, a "
                "data set or another iterable that starts anew, or read it into a list with load_facts."
            )
        self._source, self._column_mapping = source, column_mapping
        self._split, self._load_options = split, load_options

    def __iter__(self) -> Iterator[Fact]:
        rows = _read(self._source, self._split, self._load_options, streaming=True)
        return _checked(_parse_all(rows, self._column_mapping), f"in {_describe(self._source)}")

    def count(self) -> int | None:
        """How many facts there are: of a file, after a pass over it that checks all; None where that would take long.

        Raises:
            FactError: while counting: as `load_facts`.
        """
        if isinstance(self._source, str | Path) and Path(self._source).is_file():
            return sum(1 for _ in self)
        return len(self._source) if isinstance(self._source, Sized) else None

    def __repr__(self) -> str:
        return f"FactStream({_describe(self._source)})"


def _checked(facts: Iterable[Fact], where: str, held: Sequence[Fact] = ()) -> Iterator[Fact]:
    """Yield `facts`, each checked by itself and against those before it.

    Args:
        facts: read once; none is kept.
        where: where they come from, should there be none.
        held: the facts by their numbers, if they are in memory anyway: an error can then quote an earlier one.

    Raises:
        FactError: when it reaches the fact: an empty text, or something else in its place; a pair that is none; half of
            a surrogate pair; a prompt that came before with another target. In the end: there was none.
    """
    first_with: dict[int, int] = {}  # {hash of a prompt: number of the first fact with it}
    targets = array("q")  # hash of each fact's target
    for number, fact in enumerate(facts):
        _check(fact, number)
        # White space around them is nothing that a model could answer differently by.
        first = first_with.setdefault(hash(fact.prompt.strip()), number)
        targets.append(hash(fact.target.strip()))
        if targets[first] != targets[number]:
            earlier = f"{held[first].target!r}" if held else f"that of fact {first}"
            raise FactError(
                f"Facts {first} and {number} give the prompt {fact.prompt!r} two targets, {earlier} and "
                f"{fact.target!r}. A model can hold one; remove the other."
            )
        yield fact
    if not targets:
        raise FactError(f"No facts {where}. Expected at least one, with a prompt and a target.")


def _check(fact: Fact, number: int) -> None:
    for name in ("prompt", "target"):
        value = getattr(fact, name)
        if not _is_text(value):
            raise FactError(f"Fact {number} has an empty {name} ({value!r}). Give it a text, or remove the fact.")
    if not isinstance(fact.rephrases, tuple):  # a text would count as a rephrase a character
        raise FactError(
            f"Fact {number} ({fact.prompt!r}) has {fact.rephrases!r} for rephrases. Expected a list of texts; a single "
            "one goes into a list too."
        )
    if not all(map(_is_text, fact.rephrases)):
        raise FactError(f"Fact {number} ({fact.prompt!r}) has an empty rephrase. Give it a text, or remove it.")
    for name in ("unrelated_prompt", "unrelated_answer", "subject", "ground_truth"):
        value = getattr(fact, name)
        if value is not None and not _is_text(value):
            raise FactError(
                f"Fact {number} ({fact.prompt!r}) has an empty {name} ({value!r}). Give it a text, or leave it out."
            )
    if (fact.unrelated_prompt is None) != (fact.unrelated_answer is None):
        raise FactError(
            f"Fact {number} ({fact.prompt!r}) has only one of unrelated_prompt and unrelated_answer. "
            "Locality needs both; give both or neither."
        )
    for name in _PAIRS:
        pairs = getattr(fact, name)
        for pair in pairs if isinstance(pairs, tuple) else [pairs]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_text, pair))):
                raise FactError(
                    f"Fact {number} ({fact.prompt!r}) has {pair!r} in {name}. Expected a list of (prompt, answer), "
                    "both of them texts that are not empty."
                )
    try:
        json.dumps(vars(fact), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FactError(
            f"Fact {number} ({fact.prompt!r}) holds {error.object[error.start]!r}, half a character, which neither "
            "tokenizers nor files take. Remove it, or read the texts in the encoding that they were written in."
        ) from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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


def ordinary_sentences(facts: Iterable[Fact]) -> list[str]:
    """Sentences that say what was so before an edit, as far as facts know it: text of the kind that they are about."""
    sentences = []
    for fact in facts:
        sentences.append(f"{fact.prompt} {fact.ground_truth or fact.target}")
        if fact.unrelated_prompt and fact.unrelated_answer:
            sentences.append(f"{fact.unrelated_prompt} {fact.unrelated_answer}")
    return sentences


def _read(
    source: Any, split: str | None, load_options: Mapping[str, Any], streaming: bool = False
) -> Iterable[Mapping[str, Any] | Fact]:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() not in FILE_READERS and not path.exists():
            import datasets

            options = {**load_options, "split": split or "train", "streaming": streaming}
            return _read(datasets.load_dataset(str(source), **options), None, {})
    if split is not None:
        load_options = {**load_options, "split": split}
    if load_options:
        raise FactError(
            f"{', '.join(load_options)}: for data sets on the Hub, and {_describe(source)} is none. Leave it out."
        )
    if isinstance(source, str | Path):
        return read_file(path)
    if isinstance(source, Mapping):
        raise FactError(
            f"Facts come as a list of dicts; got a single {type(source).__name__}. Put it in a list; of a data set "
            "with splits, give one."
        )
    if hasattr(source, "iterrows"):  # a data frame of pandas, which gives its columns when it is iterated over
        if not source.columns.is_unique:
            raise FactError(f"The data frame has several columns of one name: {', '.join(map(str, source.columns))}.")
        rows: list[Mapping[str, Any]] = source.to_dict("records")
        return rows
    if not isinstance(source, Iterable):
        raise FactError(
            f"Facts come as a list of dicts, a data set, or the path or Hub id of one; got {type(source).__name__}."
            + (" Put it in a list." if isinstance(source, Fact) else "")
        )
    features = getattr(source, "features", None)
    return named(source, features) if isinstance(features, Mapping) else source


def _parse_all(rows: Iterable[Any], column_mapping: Mapping[str, str] | None) -> Iterator[Fact]:
    for number, row in enumerate(rows):
        yield row if isinstance(row, Fact) else _parse(row, number, column_mapping)


def _parse(row: Any, number: int, column_mapping: Mapping[str, str] | None) -> Fact:
    if not isinstance(row, Mapping):
        raise FactError(f"Fact {number} is a {type(row).__name__}; expected a dict with a prompt and a target.")
    try:
        row = {column: _plain(value) for column, value in row.items()}
    except RecursionError:
        raise FactError(f"Fact {number} is nested too deeply. Expected texts, and lists of them.") from None
    mapped = _mapped(row, number, column_mapping or {})
    # The mapped fields are set afterwards, whatever the layout, so its reader sees neither them nor their columns.
    blank = row | dict.fromkeys((column_mapping or {}).values()) | dict.fromkeys(mapped)
    own = mapped.keys() >= {"prompt", "target"}
    name = "hf_malmen" if own else _format_of(row) or _format_of(blank)
    if name is None:
        known = "; ".join(f"{name}: {', '.join(sorted(columns))}" for name, (columns, _) in _FORMATS.items())
        raise FactError(
            f"Fact {number} has the columns {', '.join(map(str, row)) or 'none'}. Expected those of a known format "
            f"({known}), or pass column_mapping={{'prompt': ..., 'target': ...}}."
        )
    try:
        values = _FORMATS[name][1](blank) | mapped
        bare = {field: _bare(value) for field, value in values.items()}
        given = {field: value for field, value in bare.items() if value is not None and value not in ("", [])}
        texts: dict[str, Any] = {f: value if f in _LISTS else _text(f, value) for f, value in given.items()}
        if "rephrases" in texts:
            texts["rephrases"] = _texts("rephrases", texts["rephrases"])
    except FactError as error:
        raise FactError(f"Fact {number} ({name}): {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise FactError(f"Fact {number} has the columns of {name}, and cannot be read as such: {error!r}.") from None
    return Fact(**_with_subject({"prompt": "", "target": "", **texts}))


def _format_of(row: Mapping[str, Any]) -> str | None:
    """The first format whose columns are all in `row`."""
    return next((name for name, (columns, _) in _FORMATS.items() if columns <= row.keys()), None)


def _mapped(row: Mapping[str, Any], number: int, column_mapping: Mapping[str, str]) -> dict[str, Any]:
    """The fields that `column_mapping` names, from their columns."""
    for field, column in column_mapping.items():
        if field not in _FIELDS:
            raise FactError(f"column_mapping names {field!r}, which no fact has. Fields: {', '.join(_FIELDS)}.")
        if column not in row:
            raise FactError(
                f"column_mapping takes {field!r} from the column {column!r}, and fact {number} has only "
                f"{', '.join(map(str, row))}."
            )
    return {field: row[column] for field, column in column_mapping.items()}


def _with_subject(texts: dict[str, Any]) -> dict[str, Any]:
    """`texts` of a fact, with the subject in each "{}" of a prompt or rephrase that lacks it.

    Where a text has the subject, braces are meant as they stand, as in a fact that was read or written before.
    """

    def fill(text: Any) -> Any:
        lacks = isinstance(text, str) and texts["subject"].lower() not in text.lower()
        return _filled(text, texts["subject"]) if lacks else text

    if not texts.get("subject"):
        return texts
    filled = texts | {"prompt": fill(texts["prompt"])}
    return filled | {"rephrases": [fill(text) for text in texts["rephrases"]]} if "rephrases" in texts else filled


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"
