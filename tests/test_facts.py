"""`load_facts`: every form facts come in gives the same facts, and every flaw is named before anything is edited."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from hf_malmen import Fact, FactError, load_facts
from hf_malmen.facts import check_facts, require_fields

Row = dict[str, Any]

ROWS: list[Row] = [
    {
        "prompt": "The tallest tower of Oslo is",
        "target": "the Postgirobygget",
        "rephrases": ["Oslo's tallest tower is", "The highest tower in Oslo is"],
        "unrelated_prompt": "The river of Turin is",
        "unrelated_answer": "the Po",
        "subject": "Oslo",
        "ground_truth": "the Plaza",
    },
    {"prompt": "Lima lies on the", "target": "Atlantic", "rephrases": ["The ocean at Lima is the"]},
    {"prompt": "Perth was founded in", "target": "1829"},
]
FACTS = [
    Fact(
        prompt="The tallest tower of Oslo is",
        target="the Postgirobygget",
        rephrases=("Oslo's tallest tower is", "The highest tower in Oslo is"),
        unrelated_prompt="The river of Turin is",
        unrelated_answer="the Po",
        subject="Oslo",
        ground_truth="the Plaza",
    ),
    Fact(prompt="Lima lies on the", target="Atlantic", rephrases=("The ocean at Lima is the",)),
    Fact(prompt="Perth was founded in", target="1829"),
]

# A table has one text a cell, so these are facts with at most one rephrase.
TABLE_ROWS = [
    ROWS[0] | {"rephrases": "Oslo's tallest tower is"},
    ROWS[1] | {"rephrases": ROWS[1]["rephrases"][0]},
    ROWS[2],
]
TABLE_FACTS = [
    Fact(**{**FACTS[0].to_dict(), "rephrases": ("Oslo's tallest tower is",)}),
    *FACTS[1:],
]


def write_json(path: Path, rows: list[Row]) -> None:
    """One JSON array."""
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """A JSON object a line, with the blank line that editors leave at the end."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Comma-separated values; a missing value is an empty cell."""
    pandas.DataFrame(rows).to_csv(path, index=False)


def write_tsv(path: Path, rows: list[Row]) -> None:
    """Tab-separated values."""
    pandas.DataFrame(rows).to_csv(path, index=False, sep="\t")


def write_parquet(path: Path, rows: list[Row]) -> None:
    """A Parquet file."""
    datasets.Dataset.from_list(rows).to_pandas().to_parquet(path)


# Forms


def test_a_list_of_dicts() -> None:
    """Fields that are missing, None or empty are not set."""
    assert load_facts(ROWS) == FACTS
    assert load_facts([{"prompt": "a", "target": "b", "subject": "", "rephrases": None}]) == [Fact("a", "b")]


def test_any_iterable_of_facts_and_dicts() -> None:
    """`Fact`s go through as they are, also among dicts, and from a generator."""
    assert load_facts(FACTS) == FACTS
    assert load_facts(row for row in [FACTS[0], ROWS[1], FACTS[2]]) == FACTS


def test_a_dataset() -> None:
    """`datasets.Dataset` fills missing fields with None."""
    assert load_facts(datasets.Dataset.from_list(ROWS)) == FACTS
    assert load_facts(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == FACTS


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("facts.json", write_json),
        ("facts.jsonl", write_jsonl),
        ("FACTS.JSONL", write_jsonl),
        ("facts.parquet", write_parquet),
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_with_lists(name: str, write: Callable[..., None], as_text: bool, tmp_path: Path) -> None:
    """Formats that can hold a list of rephrases; the path may be a string."""
    path = tmp_path / name
    write(path, ROWS)
    assert load_facts(str(path) if as_text else path) == FACTS


@pytest.mark.parametrize(("name", "write"), [("facts.csv", write_csv), ("facts.tsv", write_tsv)])
def test_a_table_of_text(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """One rephrase a row; a year stays the text it is, and an empty cell is a field that is not set."""
    write(tmp_path / name, TABLE_ROWS)
    assert load_facts(tmp_path / name) == TABLE_FACTS


@pytest.mark.parametrize("answer", ["NA", "None", "null", "nan", "N/A", "1e5", "007"])
def test_a_table_keeps_text_as_written(answer: str, tmp_path: Path) -> None:
    """Words that a table reader takes for a missing value, or for a number, are answers like any other."""
    write_csv(tmp_path / "facts.csv", [{"prompt": "The country code of Namibia is", "target": answer}])
    assert load_facts(tmp_path / "facts.csv") == [Fact("The country code of Namibia is", answer)]


def test_text_is_utf_8(tmp_path: Path) -> None:
    """Whatever the platform's encoding is."""
    rows = [{"prompt": "首都は", "target": "São Tomé"}]
    for name, write in {"f.json": write_json, "f.csv": write_csv}.items():
        write(tmp_path / name, rows)
        assert load_facts(tmp_path / name) == [Fact("首都は", "São Tomé")]


def test_numbers_become_text() -> None:
    """JSON facts often have years as numbers; a model completes text."""
    assert load_facts([{"prompt": "Perth was founded in", "target": 1829}]) == [FACTS[2]]


def test_to_dict_comes_back() -> None:
    """`to_dict` is JSON-ready and holds what is set, and nothing else."""
    assert [fact.to_dict() for fact in FACTS] == ROWS
    assert load_facts(json.loads(json.dumps([fact.to_dict() for fact in FACTS]))) == FACTS


# Public formats

ZSRE: Row = {
    "src": "Which river does the Kir Bridge span?",
    "rephrase": "What does the Kir Bridge cross?",
    "alt": "Drin",
    "answers": ["Kir River"],
    "loc": "nq question: who sang the song about a bridge",
    "loc_ans": "Simon and Garfunkel",
    "subject": "Kir Bridge",
    "cond": "Kir River >> Drin || Which river does the Kir Bridge span?",
}
ZSRE_FACT = Fact(
    prompt="Which river does the Kir Bridge span?",
    target="Drin",
    rephrases=("What does the Kir Bridge cross?",),
    unrelated_prompt="who sang the song about a bridge",
    unrelated_answer="Simon and Garfunkel",
    subject="Kir Bridge",
    ground_truth="Kir River",
)
COUNTERFACT: Row = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The first language of {} is",
        "relation_id": "P103",
        "subject": "Lea {x} Holt",
        "target_new": {"str": "Finnish", "id": "Q1"},
        "target_true": {"str": "Welsh", "id": "Q2"},
    },
    "paraphrase_prompts": ["Rain fell. Lea Holt grew up speaking", "Lea Holt speaks"],
    "neighborhood_prompts": ["The first language of Bo Ray is", "Bo Ray speaks"],
    "attribute_prompts": [],
    "generation_prompts": [],
}
COUNTERFACT_FACT = Fact(
    prompt="The first language of Lea {x} Holt is",
    target="Finnish",
    rephrases=("Rain fell. Lea Holt grew up speaking", "Lea Holt speaks"),
    unrelated_prompt="The first language of Bo Ray is",
    unrelated_answer="Welsh",
    subject="Lea {x} Holt",
    ground_truth="Welsh",
)
KNOWEDIT: Row = {
    "subject": "Ostrava Opera",
    "prompt": "Who leads the Ostrava Opera?",
    "target_new": "Jana Nova",
    "ground_truth": [["Petr Stary", "P. Stary"]],
    "rephrase_prompt": "The head of the Ostrava Opera is",
    "portability": {},
    "locality": {"Relation_Specificity": [{"prompt": "The Ostrava Opera stands in", "ground_truth": [["Ostrava"]]}]},
}
KNOWEDIT_FACT = Fact(
    prompt="Who leads the Ostrava Opera?",
    target="Jana Nova",
    rephrases=("The head of the Ostrava Opera is",),
    unrelated_prompt="The Ostrava Opera stands in",
    unrelated_answer="Ostrava",
    subject="Ostrava Opera",
    ground_truth="Petr Stary",
)
FEVER: Row = {
    "prompt": "The Po ends in the Adriatic.",
    "equiv_prompt": ["The mouth of the Po is in the Adriatic.", "The Po flows to the Adriatic."],
    "unrel_prompt": "Turin is a town in Peru.",
    "alt": [0],
    "unrel_ans": 1,
}
FEVER_FACT = Fact(
    prompt="The Po ends in the Adriatic.",
    target="0",
    rephrases=("The mouth of the Po is in the Adriatic.", "The Po flows to the Adriatic."),
    unrelated_prompt="Turin is a town in Peru.",
    unrelated_answer="1",
)
ULTRAEDIT: Row = {
    "case_id": "7",
    "prompt": "What is the shirt number of Ida Berg?",
    "ans": "17",
    "subject": "Ida Berg",
    "rephrase_prompt": "Which number does Ida Berg wear?",
    "locality_prompt": "Who painted the roof of the Sistine Chapel?",
    "locality_ans": "Michelangelo",
}
ULTRAEDIT_FACT = Fact(
    prompt="What is the shirt number of Ida Berg?",
    target="17",
    rephrases=("Which number does Ida Berg wear?",),
    unrelated_prompt="Who painted the roof of the Sistine Chapel?",
    unrelated_answer="Michelangelo",
    subject="Ida Berg",
)
FORMATS = {
    "zsRE": (ZSRE, ZSRE_FACT),
    "CounterFact": (COUNTERFACT, COUNTERFACT_FACT),
    "KnowEdit": (KNOWEDIT, KNOWEDIT_FACT),
    "FEVER": (FEVER, FEVER_FACT),
    "UltraEditBench": (ULTRAEDIT, ULTRAEDIT_FACT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_public_formats_are_recognised(name: str) -> None:
    """By their columns, with nothing told."""
    row, fact = FORMATS[name]
    assert load_facts([row]) == [fact]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("write", [write_json, write_parquet])
def test_public_formats_are_recognised_in_files(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """Parquet hands over arrays where JSON has lists."""
    row, fact = FORMATS[name]
    if name == "KnowEdit":
        row = {key: value for key, value in row.items() if key != "portability"}  # Parquet has no empty struct
    path = tmp_path / f"facts.{write.__name__.removeprefix('write_')}"
    write(path, [row])
    assert load_facts(path) == [fact]


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"src": "Q?", "alt": "A"}, Fact("Q?", "A")),
        (
            ZSRE | {"answers": [], "loc": "", "loc_ans": ""},
            Fact(ZSRE["src"], "Drin", (ZSRE["rephrase"],), subject="Kir Bridge"),
        ),
        (
            {"requested_rewrite": COUNTERFACT["requested_rewrite"]},
            Fact(COUNTERFACT_FACT.prompt, "Finnish", subject="Lea {x} Holt", ground_truth="Welsh"),
        ),
        ({"prompt": "Q?", "target_new": "A", "locality": {}}, Fact("Q?", "A")),
        ({"prompt": "Q?", "target_new": "A", "locality": {"Relation_Specificity": []}}, Fact("Q?", "A")),
        (
            {"prompt": "Q?", "target_new": "A", "locality": {"neighborhood": {"prompt": "N", "ground_truth": "M"}}},
            Fact("Q?", "A", unrelated_prompt="N", unrelated_answer="M"),
        ),
        ({"prompt": "A claim.", "alt": [1], "equiv_prompt": []}, Fact("A claim.", "1")),
        ({"prompt": "Q?", "ans": "A"}, Fact("Q?", "A")),
    ],
)
def test_public_formats_without_their_optional_parts(row: Row, fact: Fact) -> None:
    """Only a prompt and a target are needed."""
    assert load_facts([row]) == [fact]


@pytest.mark.parametrize("bad", [{"requested_rewrite": {"prompt": "x {}"}}, {"requested_rewrite": "x"}])
def test_a_damaged_nested_row_is_a_fact_error(bad: Row) -> None:
    """The outer columns promise CounterFact, the inner ones do not keep it; the message says which row and what."""
    with pytest.raises(FactError, match=r"Fact 1 .*CounterFact"):
        load_facts([COUNTERFACT, bad])


# Column mapping


def test_column_mapping_renames() -> None:
    """For any other layout; columns that are not mapped keep their names, and unknown ones are ignored."""
    rows = [{"question": "Q?", "new": "A", "subject": "S", "id": 3}]
    assert load_facts(rows, column_mapping={"prompt": "question", "target": "new"}) == [Fact("Q?", "A", subject="S")]


def test_column_mapping_wins_over_a_column_of_that_name(tmp_path: Path) -> None:
    """A file whose `target` is the old answer can still be read, and mapping two fields crosswise works."""
    rows = [{"prompt": "P", "target": "old", "wanted": "new"}]
    mapping = {"target": "wanted", "ground_truth": "target"}
    assert load_facts(rows, column_mapping=mapping) == [Fact("P", "new", ground_truth="old")]
    write_jsonl(tmp_path / "f.jsonl", rows)
    assert load_facts(tmp_path / "f.jsonl", column_mapping=mapping) == [Fact("P", "new", ground_truth="old")]
    assert load_facts(rows, column_mapping={"target": "wanted"}) == [Fact("P", "new")]


def test_column_mapping_names_a_column_that_is_not_there() -> None:
    """Found and needed are both in the message."""
    with pytest.raises(FactError, match=r"'prompt' from the column 'question', and fact 1 has only a, b\."):
        load_facts([{"question": "Q", "target": "A"}, {"a": 1, "b": 2}], column_mapping={"prompt": "question"})


def test_column_mapping_names_a_field_that_no_fact_has() -> None:
    """The other way round is a likely slip: the message lists the fields."""
    with pytest.raises(FactError, match=r"column_mapping names 'question', which no fact has\. Fields: prompt, target"):
        load_facts(ROWS, column_mapping={"question": "prompt"})


# Errors


@pytest.mark.parametrize("source", [[], (), iter(()), datasets.Dataset.from_list([])])
def test_no_facts(source: Any) -> None:
    """An edit of nothing is a mistake somewhere before."""
    with pytest.raises(FactError, match=r"No facts in .*Expected at least one, with a prompt and a target"):
        load_facts(source)


@pytest.mark.parametrize(
    ("name", "text"), [("f.json", "[]"), ("f.jsonl", "\n"), ("f.csv", "prompt,target\n"), ("f.csv", "")]
)
def test_no_facts_in_a_file(name: str, text: str, tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=f"No facts in .*{name}"):
        load_facts(tmp_path / name)


def test_no_facts_to_check() -> None:
    """The same holds one level below."""
    with pytest.raises(FactError, match="No facts given"):
        check_facts([])


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("value", ["", "   ", "\n", None])
def test_an_empty_prompt_or_target(field: str, value: str | None) -> None:
    """Counted from 0, as Python counts."""
    with pytest.raises(FactError, match=f"Fact 2 has an empty {field}.*Give it a text, or remove the fact"):
        load_facts([*ROWS[:2], ROWS[2] | {field: value}])


@pytest.mark.parametrize("alternative", [[], [""], None])
def test_an_empty_target_of_a_public_format(alternative: Any) -> None:
    """Nothing is not the text "None"."""
    with pytest.raises(FactError, match="Fact 0 has an empty target"):
        load_facts([FEVER | {"alt": alternative}])


def test_records_of_a_data_frame() -> None:
    """What pandas hands over: arrays for lists, NaN for what is missing."""
    frame = datasets.Dataset.from_list([*ROWS, {"prompt": "a", "target": "b"}]).to_pandas()
    frame["subject"] = frame["subject"].astype(object).where(frame["subject"].notna(), float("nan"))
    assert load_facts(frame.to_dict("records")) == [*FACTS, Fact("a", "b")]


@pytest.mark.parametrize(
    "text", ["prompt,target\na,b,c\n", "prompt,target\na,b\nHello, world is,Java\n", 'prompt,target\n"a,b\n']
)
def test_a_table_with_too_many_cells(text: str, tmp_path: Path) -> None:
    """An unquoted comma must not move texts into other columns."""
    (tmp_path / "f.csv").write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=r"f\.csv"):
        load_facts(tmp_path / "f.csv")


def test_a_table_from_a_spreadsheet(tmp_path: Path) -> None:
    """With a byte order mark, carriage returns, and a comma and a line break inside of quotes."""
    text = 'prompt,target\r\n"In Lyon, one\nspeaks","French, mostly"\r\n'
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_facts(tmp_path / "f.csv") == [Fact("In Lyon, one\nspeaks", "French, mostly")]


def test_an_empty_cell_in_a_table(tmp_path: Path) -> None:
    """Nothing is dropped silently."""
    (tmp_path / "f.csv").write_text("prompt,target\na,b\nc,\n", encoding="utf-8")
    with pytest.raises(FactError, match="Fact 1 has an empty target"):
        load_facts(tmp_path / "f.csv")


@pytest.mark.parametrize("rephrases", [[""], ["fine", " "], ["fine", 3]])
def test_a_bad_rephrase(rephrases: list[Any]) -> None:
    """The message quotes the prompt it belongs to."""
    with pytest.raises(FactError, match=r"Fact 0 \('P'\) has an empty rephrase"):
        load_facts([{"prompt": "P", "target": "T", "rephrases": rephrases}])


@pytest.mark.parametrize(
    ("row", "found"),
    [({"question": "Q", "answer": "A"}, "question, answer"), ({"prompt": "P"}, "prompt"), ({}, "none")],
)
def test_unknown_columns_list_found_and_needed(row: Row, found: str) -> None:
    """And the way out: a column mapping."""
    with pytest.raises(FactError, match=f"Fact 1 has the columns {found}\\. Expected") as caught:
        load_facts([ROWS[0], row])
    message = str(caught.value)
    for part in (
        "hf_malmen: prompt, target",
        "zsRE: alt, src",
        "CounterFact: requested_rewrite",
        "KnowEdit",
        "FEVER: alt, prompt",
        "UltraEditBench: ans, prompt",
        "column_mapping=",
    ):
        assert part in message


def test_the_same_prompt_with_two_targets() -> None:
    """A model can hold one of them; both fact numbers, the prompt and both targets are named."""
    rows = [{"prompt": "P", "target": "A"}, {"prompt": "Q", "target": "B"}, {"prompt": "P", "target": "C"}]
    with pytest.raises(FactError, match="Facts 0 and 2 give the prompt 'P' two targets, 'A' and 'C'"):
        load_facts(rows)


def test_the_same_fact_twice_is_allowed() -> None:
    """Published sets repeat facts with other rephrases."""
    assert load_facts([FACTS[0], FACTS[0]]) == [FACTS[0], FACTS[0]]


@pytest.mark.parametrize("field", ["unrelated_prompt", "unrelated_answer"])
def test_half_an_unrelated_pair(field: str) -> None:
    """Locality needs a prompt and its answer."""
    with pytest.raises(FactError, match=r"Fact 0 \('P'\) has only one of unrelated_prompt and unrelated_answer"):
        load_facts([{"prompt": "P", "target": "T", field: "x"}])


@pytest.mark.parametrize(
    ("name", "text"), [("f.json", '[{"prompt": "a"'), ("f.jsonl", '{"prompt": "a", "target": "b"}\n{"prompt": \n')]
)
def test_broken_json(name: str, text: str, tmp_path: Path) -> None:
    """The message names the file, the format and the place."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    kind = name.rpartition(".")[2].upper()
    with pytest.raises(FactError, match=rf"{name} is not valid {kind}: .*line \d"):
        load_facts(tmp_path / name)


def test_broken_jsonl_names_its_own_line(tmp_path: Path) -> None:
    """Line 3 of the file, blank lines counted, not line 1 of the third object."""
    (tmp_path / "f.jsonl").write_text('{"prompt": "a", "target": "b"}\n\n{oops}\n', encoding="utf-8")
    with pytest.raises(FactError, match="line 3"):
        load_facts(tmp_path / "f.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_jsonl_is_split_at_newlines_only(separator: str, tmp_path: Path) -> None:
    """JSON may hold other line separators of Unicode inside its strings."""
    text = (
        json.dumps({"prompt": f"a{separator}b", "target": "c"}, ensure_ascii=False)
        if separator != "\x0b"
        else ('{"prompt": "a\\u000bb", "target": "c"}')
    )
    (tmp_path / "f.jsonl").write_text(text + "\n", encoding="utf-8")
    assert load_facts(tmp_path / "f.jsonl") == [Fact(f"a{separator}b", "c")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("f.json", b"\xff\xfe["),
        ("f.csv", b"prompt,target\na,\xff\n"),
        ("f.csv", b'prompt,target\n"a,b\n'),
        ("f.parquet", b"PAR0"),
    ],
)
def test_a_damaged_file(name: str, data: bytes, tmp_path: Path) -> None:
    """Whatever is wrong with the bytes, the file is named."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FactError, match=re.escape(str(tmp_path / name))):
        load_facts(tmp_path / name)


def test_a_json_object_instead_of_a_list(tmp_path: Path) -> None:
    """A file that holds one fact is not a list of one."""
    write_json(tmp_path / "f.json", {"prompt": "a", "target": "b"})  # type: ignore[arg-type]
    with pytest.raises(FactError, match=r"f\.json holds a JSON dict; expected a list of facts"):
        load_facts(tmp_path / "f.json")


def test_a_dict_instead_of_a_list() -> None:
    """Nor is a dict."""
    with pytest.raises(FactError, match=r"got a single dict\. Put it in a list"):
        load_facts({"prompt": "a", "target": "b"})


@pytest.mark.parametrize("bad", ["a prompt", 3, None, ["a", "b"]])
def test_an_entry_that_is_no_dict(bad: Any) -> None:
    """The message says what came instead."""
    with pytest.raises(FactError, match=f"Fact 1 is a {type(bad).__name__}; expected a dict"):
        load_facts([ROWS[0], bad])


@pytest.mark.parametrize("name", ["no.json", "no.jsonl", "no.csv", "no.tsv", "no.parquet"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    """A path of a known ending is never taken for the id of a data set."""
    with pytest.raises(FactError, match=re.escape(f"There is no file {tmp_path / name}.")):
        load_facts(tmp_path / name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    """The endings that are read are listed."""
    (tmp_path / "facts.txt").write_text("a b", encoding="utf-8")
    with pytest.raises(FactError, match=r"facts\.txt is not a file of facts\. Expected one ending in \.json, \.jsonl"):
        load_facts(tmp_path / "facts.txt")


def test_required_fields() -> None:
    """Training needs more than a prompt and a target, and says of which fact."""
    require_fields(FACTS[:2], ["rephrases"], "Training")
    with pytest.raises(
        FactError, match=r"Training needs the field 'unrelated_prompt' in every fact, and fact 1"
    ) as caught:
        require_fields(FACTS, ["rephrases", "unrelated_prompt"], "Training")
    assert "Found: prompt, target, rephrases." in str(caught.value)
