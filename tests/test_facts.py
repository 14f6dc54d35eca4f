"""`load_facts`: every form facts come in gives the same facts, and every flaw is named before anything is edited.

`FactStream`: the same facts and the same errors, without holding them.
"""

import json
import math
import re
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from hf_malmen import Fact, FactError, fact_files, load_facts
from hf_malmen.facts import FactStream, require_fields

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
        "neighborhood": [["The river of Turin is", "the Po"], ["Oslo lies in", "Norway"]],
        "portability": [["The tallest tower of Norway's capital is", "the Postgirobygget"]],
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
        neighborhood=(("The river of Turin is", "the Po"), ("Oslo lies in", "Norway")),
        portability=(("The tallest tower of Norway's capital is", "the Postgirobygget"),),
    ),
    Fact(prompt="Lima lies on the", target="Atlantic", rephrases=("The ocean at Lima is the",)),
    Fact(prompt="Perth was founded in", target="1829"),
]

# A table has one text a cell, so these are facts with at most one rephrase, and no pairs.
TABLE_ROWS = [
    {key: value for key, value in ROWS[0].items() if key not in ("neighborhood", "portability")}
    | {"rephrases": "Oslo's tallest tower is"},
    ROWS[1] | {"rephrases": ROWS[1]["rephrases"][0]},
    ROWS[2],
]
TABLE_FACTS = [
    Fact(**TABLE_ROWS[0] | {"rephrases": ("Oslo's tallest tower is",)}),
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
    (fact,) = load_facts([ZSRE | {"rephrase": 0, "loc": 1, "loc_ans": 2.5}])
    assert (fact.rephrases, fact.unrelated_prompt, fact.unrelated_answer) == (("0",), "1", "2.5")
    assert load_facts([{"prompt": "P", "target": True, "rephrases": [3, "x"]}]) == [Fact("P", "True", ("3", "x"))]


def test_columns_of_a_data_frame(tmp_path: Path) -> None:
    """Years beside a missing one are floats, texts may be bytes; what pandas calls missing is not set."""
    columns = {"prompt": [b"S\xc3\xa3o", "b"], "target": [1999.0, 0.5], "subject": [None, pandas.NaT]}
    rows = pandas.DataFrame(columns).to_dict("records")
    facts = [Fact("São", "1999"), Fact("b", "0.5")]
    assert load_facts(rows) == facts
    assert load_facts([row | {"subject": pandas.NA} for row in rows]) == facts
    for number, text in ((pandas.Series([7])[0], "7"), (Decimal("3.50"), "3.50"), (1e300, "1e+300")):
        assert load_facts([{"prompt": "P", "target": number}]) == [Fact("P", text)]
    write_parquet(tmp_path / "f.parquet", [{"prompt": "P", "target": 1999.0, "rephrases": [b"R"]}])
    assert load_facts(tmp_path / "f.parquet") == [Fact("P", "1999", ("R",))]


def test_to_dict_comes_back() -> None:
    """`to_dict` is JSON-ready and holds what is set, and nothing else."""
    assert [fact.to_dict() for fact in FACTS] == ROWS
    rows = json.loads(json.dumps([fact.to_dict() for fact in FACTS]))
    assert load_facts(rows) == FACTS
    assert [Fact(**row) for row in rows] == FACTS
    assert len({*FACTS, *(Fact(**row) for row in rows)}) == len(FACTS)


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
    "portability": {
        "Recalled Relation": "(Drin, mouth, Adriatic Sea)",
        "New Question": "Into which sea does the river under the Kir Bridge flow?",
        "New Answer": "Adriatic Sea",
    },
}
ZSRE_FACT = Fact(
    prompt="Which river does the Kir Bridge span?",
    target="Drin",
    rephrases=("What does the Kir Bridge cross?",),
    unrelated_prompt="who sang the song about a bridge",
    unrelated_answer="Simon and Garfunkel",
    subject="Kir Bridge",
    ground_truth="Kir River",
    portability=(("Into which sea does the river under the Kir Bridge flow?", "Adriatic Sea"),),
)
MALMEN_ZSRE: Row = {
    "src": "On which river is Kalmar?",
    "rephrase": "Which river runs through Kalmar?",
    "ans": "Ljungbyan",
    "loc": "who wrote the tale of the grey cat",
    "loc_ans": "Ulla Lind",
}
MALMEN_ZSRE_FACT = Fact(
    prompt="On which river is Kalmar?",
    target="Ljungbyan",
    rephrases=("Which river runs through Kalmar?",),
    unrelated_prompt="who wrote the tale of the grey cat",
    unrelated_answer="Ulla Lind",
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
    neighborhood=(("The first language of Bo Ray is", "Welsh"), ("Bo Ray speaks", "Welsh")),
)
KNOWEDIT_ZSRE: Row = {
    "subject": "Ostrava Opera",
    "prompt": "Who leads the Ostrava Opera?",
    "target_new": "Jana Nova",
    "ground_truth": [["Petr Stary", "P. Stary"]],
    "rephrase_prompt": "The head of the Ostrava Opera is",
    "cond": "Petr Stary >> Jana Nova || Who leads the Ostrava Opera?",
    "locality": {"Relation_Specificity": [{"prompt": "The Ostrava Opera stands in", "ground_truth": ["Ostrava"]}]},
    "portability": {"Reasoning": [{"prompt": "Who is the boss of Ostrava's singers?", "ground_truth": "Jana Nova"}]},
}
KNOWEDIT_ZSRE_FACT = Fact(
    prompt="Who leads the Ostrava Opera?",
    target="Jana Nova",
    rephrases=("The head of the Ostrava Opera is",),
    unrelated_prompt="The Ostrava Opera stands in",
    unrelated_answer="Ostrava",
    subject="Ostrava Opera",
    ground_truth="Petr Stary",
    neighborhood=(("The Ostrava Opera stands in", "Ostrava"),),
    portability=(("Who is the boss of Ostrava's singers?", "Jana Nova"),),
)
WIKI_RECENT: Row = {
    "subject": "Ada Voss",
    "prompt": "Ada Voss lives in",
    "target_new": "Bergen",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Ada Voss homeless?", "ground_truth": [["no"], ["false"]]}],
        "Reasoning": [
            {"prompt": "The country where Ada Voss lives is", "ground_truth": [["Norway", "Norge"]]},
            {"prompt": "The mayor of Ada Voss's town is", "ground_truth": [[]]},
        ],
        "Subject_Aliasing": [{"prompt": "A. M. Voss lives in", "ground_truth": [["Bergen", "Bjorgvin"]]}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Ada Voss was born in", "ground_truth": [[""]]},
            {"prompt": "The father of Ada Voss is", "ground_truth": [["Ib Voss"]]},
            {"prompt": "Ada Voss works as", "ground_truth": [["a smith", "smith"]]},
        ]
    },
}
WIKI_RECENT_FACT = Fact(  # without the probes to which no answer counts as right
    prompt="Ada Voss lives in",
    target="Bergen",
    unrelated_prompt="The father of Ada Voss is",
    unrelated_answer="Ib Voss",
    subject="Ada Voss",
    neighborhood=(("The father of Ada Voss is", "Ib Voss"), ("Ada Voss works as", "a smith")),
    portability=(
        ("Is Ada Voss homeless?", "no"),
        ("The country where Ada Voss lives is", "Norway"),
        ("A. M. Voss lives in", "Bergen"),
    ),
)
WIKI_COUNTERFACT: Row = {
    "subject": "Jon Hale",
    "prompt": "The office held by Jon Hale is",
    "target_new": "bishop of Turku",
    "ground_truth": "mayor of Graz",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The office held by J. Hale is", "ground_truth": "bishop of Turku"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Jon Hale was born in", "ground_truth": "1801"}],
        "Forgetfulness": [{"prompt": "Jon Hale, no bishop, is the", "ground_truth": "mayor of Graz"}],
    },
}
WIKI_COUNTERFACT_FACT = Fact(
    prompt="The office held by Jon Hale is",
    target="bishop of Turku",
    unrelated_prompt="Jon Hale was born in",
    unrelated_answer="1801",
    subject="Jon Hale",
    ground_truth="mayor of Graz",
    neighborhood=(("Jon Hale was born in", "1801"), ("Jon Hale, no bishop, is the", "mayor of Graz")),
    portability=(("The office held by J. Hale is", "bishop of Turku"),),
)
WIKIBIO: Row = {
    "text": "A passage about Tom Reed. Tom Reed (1810-1880) was a physician.",
    "labels": "He studied in Leiden, where he won two medals.",
    "concept": "Tom Reed",
    "locality": {"Relation_Specificity": [{"prompt": "Tom Reed's field of work is", "ground_truth": ["medicine"]}]},
}
WIKIBIO_FACT = Fact(
    prompt="A passage about Tom Reed. Tom Reed (1810-1880) was a physician.",
    target="He studied in Leiden, where he won two medals.",
    unrelated_prompt="Tom Reed's field of work is",
    unrelated_answer="medicine",
    subject="Tom Reed",
    neighborhood=(("Tom Reed's field of work is", "medicine"),),
)
FEVER: Row = {
    "prompt": "The Po ends in the Adriatic.",
    "equiv_prompt": ["The mouth of the Po is in the Adriatic.", "The Po flows to the Adriatic."],
    "unrel_prompt": "Turin is a town in Peru.",
    "alt": "REFUTES",
    "unrel_ans": "SUPPORTS",
}
FEVER_FACT = Fact(
    prompt="The Po ends in the Adriatic.",
    target="REFUTES",
    rephrases=("The mouth of the Po is in the Adriatic.", "The Po flows to the Adriatic."),
    unrelated_prompt="Turin is a town in Peru.",
    unrelated_answer="SUPPORTS",
)
ULTRAEDIT: Row = {
    "case_id": "7",
    "prompt": "What is the shirt number of Ida Berg?",
    "ans": "17",
    "subject": "Ida Berg",
    "rephrase_prompt": "Which number does Ida Berg wear?",
    "loc": "Who painted the roof of the Sistine Chapel?",
    "loc_ans": "Michelangelo",
}
ULTRAEDIT_FACT = Fact(
    prompt="What is the shirt number of Ida Berg?",
    target="17",
    rephrases=("Which number does Ida Berg wear?",),
    unrelated_prompt="Who painted the roof of the Sistine Chapel?",
    unrelated_answer="Michelangelo",
    subject="Ida Berg",
)
WIKIBIGEDIT: Row = {
    "tag": "update",
    "subject": "Mia Sund",
    "update": "Which club does Mia Sund play for?",
    "rephrase": "What is Mia Sund's club?",
    "personas": "Oi, tell me, who does Mia Sund kick the ball for?",
    "ans": "FC Narvik",
    "loc": "Which club did Per Moe play for?",
    "loc_ans": "Odda IL",
    "mhop": "In which town is the ground of Mia Sund's club?",
    "mhop_ans": "Narvik",
}
WIKIBIGEDIT_FACT = Fact(
    prompt="Which club does Mia Sund play for?",
    target="FC Narvik",
    rephrases=("What is Mia Sund's club?", "Oi, tell me, who does Mia Sund kick the ball for?"),
    unrelated_prompt="Which club did Per Moe play for?",
    unrelated_answer="Odda IL",
    subject="Mia Sund",
    portability=(("In which town is the ground of Mia Sund's club?", "Narvik"),),
)
FORMATS = {
    "zsRE": (ZSRE, ZSRE_FACT),
    "MALMEN's zsRE": (MALMEN_ZSRE, MALMEN_ZSRE_FACT),
    "CounterFact": (COUNTERFACT, COUNTERFACT_FACT),
    "KnowEdit's zsRE": (KNOWEDIT_ZSRE, KNOWEDIT_ZSRE_FACT),
    "KnowEdit's wiki_recent": (WIKI_RECENT, WIKI_RECENT_FACT),
    "KnowEdit's wiki_counterfact": (WIKI_COUNTERFACT, WIKI_COUNTERFACT_FACT),
    "KnowEdit's WikiBio": (WIKIBIO, WIKIBIO_FACT),
    "FEVER": (FEVER, FEVER_FACT),
    "UltraEditBench": (ULTRAEDIT, ULTRAEDIT_FACT),
    "WikiBigEdit": (WIKIBIGEDIT, WIKIBIGEDIT_FACT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_public_formats_are_recognised(name: str) -> None:
    """By their columns, with nothing told."""
    row, fact = FORMATS[name]
    assert load_facts([row]) == [fact]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("write", [write_json, write_jsonl, write_parquet])
def test_public_formats_are_recognised_in_files(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """Parquet hands over arrays where JSON has lists."""
    row, fact = FORMATS[name]
    path = tmp_path / f"facts.{write.__name__.removeprefix('write_')}"
    write(path, [row])
    assert load_facts(path) == [fact]
    assert list(FactStream(path)) == [fact]


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"src": "Q?", "alt": "A"}, Fact("Q?", "A")),
        (
            ZSRE | {"answers": [], "loc": "", "loc_ans": "", "portability": None},
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
            Fact("Q?", "A", unrelated_prompt="N", unrelated_answer="M", neighborhood=(("N", "M"),)),
        ),
        (  # one schema for all rows gives each the kinds of the others
            {"prompt": "Q?", "target_new": "A", "locality": None, "portability": {"Reasoning": None}},
            Fact("Q?", "A"),
        ),
        (  # EasyEdit's CounterFact
            {"prompt": "Q?", "target_new": "A", "locality_prompt": "N", "locality_ground_truth": "M"},
            Fact("Q?", "A", unrelated_prompt="N", unrelated_answer="M", neighborhood=(("N", "M"),)),
        ),
        ({"text": "T", "labels": "L", "concept": "T"}, Fact("T", "L", subject="T")),
        (  # MEND's FEVER has numbers for its labels
            {"prompt": "A claim.", "alt": [1], "equiv_prompt": [], "unrel_prompt": "B", "unrel_ans": 0},
            Fact("A claim.", "1", unrelated_prompt="B", unrelated_answer="0"),
        ),
        ({"prompt": "Q?", "ans": "A"}, Fact("Q?", "A")),
        (
            {"prompt": "Q?", "ans": "A", "locality_prompt": "N", "locality_ans": "M"},
            Fact("Q?", "A", unrelated_prompt="N", unrelated_answer="M"),
        ),
        ({"update": "Q?", "ans": "A", "personas": None, "mhop": None, "mhop_ans": None}, Fact("Q?", "A")),
    ],
)
def test_public_formats_without_their_optional_parts(row: Row, fact: Fact) -> None:
    """Only a prompt and a target are needed."""
    assert load_facts([row]) == [fact]


REQUEST: Row = {"prompt": "{} was the founder of", "subject": "Steve Jobs", "target_new": {"str": "Microsoft"}}


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        (REQUEST, Fact("Steve Jobs was the founder of", "Microsoft", subject="Steve Jobs")),
        (
            REQUEST
            | {"target_true": {"str": "Apple", "id": "Q312"}, "rephrase": ["The firm of {}:", "{} or {}: Jobs"]},
            Fact(
                "Steve Jobs was the founder of",
                "Microsoft",
                ("The firm of Steve Jobs:", "Steve Jobs or Steve Jobs: Jobs"),
                subject="Steve Jobs",
                ground_truth="Apple",
            ),
        ),
        (  # the subject elsewhere in the prompt as well
            REQUEST | {"prompt": "{}, Steve Jobs in short, was the founder of"},
            Fact("Steve Jobs, Steve Jobs in short, was the founder of", "Microsoft", subject="Steve Jobs"),
        ),
        (  # in columns of our own
            {"prompt": "{} founded", "subject": "Steve Jobs", "target": {"str": "Microsoft", "id": "Q1"}},
            Fact("Steve Jobs founded", "Microsoft", subject="Steve Jobs"),
        ),
        ({"prompt": "{} is", "target_new": "a set"}, Fact("{} is", "a set")),
    ],
)
def test_requests_of_notebooks(row: Row, fact: Fact) -> None:
    """As ROME's and MEMIT's: a prompt with a place for its subject, and answers in dicts."""
    assert load_facts([row]) == [fact]
    assert load_facts([fact.to_dict()]) == [fact]


def test_braces_that_stand_for_themselves() -> None:
    """Where the subject is in the prompt already: a fact that was written comes back as it was."""
    fact = Fact("In Python, {} makes", "a dict", ("python's {} is", "Write {} in Python for"), subject="Python")
    assert load_facts([fact.to_dict()]) == [fact]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            REQUEST | {"target_new": {"id": "Q1"}},
            r"Fact 1 \(KnowEdit\): target is \{'id': 'Q1'\}, a dict\. Expected one",
        ),
        (REQUEST | {"subject": ["Steve", "Jobs"]}, r"subject is \['Steve', 'Jobs'\], a list\. Expected one text"),
        (REQUEST | {"target_true": {"id": "Q1"}}, r"ground_truth is \{'id': 'Q1'\}"),
        (REQUEST | {"prompt": ["{} a", "{} b"]}, r"prompt is \['\{\} a', '\{\} b'\]"),
        (REQUEST | {"rephrase": {"a": "b"}}, r"An entry of rephrases is \{'a': 'b'\}"),
        (REQUEST | {"rephrase": ["a", ["b"]]}, r"An entry of rephrases is \['b'\], a list"),
        (REQUEST | {"locality_prompt": {"a": 1}, "locality_ground_truth": "x"}, r"A prompt of only is \{'a': 1\}"),
        (REQUEST | {"locality_prompt": "x", "locality_ground_truth": {"a": 1}}, r"answer to 'x' in only is \{'a': 1\}"),
        ({"prompt": "P", "target": ["A", "B"]}, r"Fact 1 \(hf_malmen\): target is \['A', 'B'\], a list"),
        (
            {"prompt": "P", "target": "T", "unrelated_prompt": ["N"], "unrelated_answer": "M"},
            r"unrelated_prompt is \['N",
        ),
        (ULTRAEDIT | {"loc_ans": ["a", "b"]}, r"unrelated_answer is \['a', 'b'\]"),
        (
            {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"subject": None}},
            r"Fact 1 \(CounterFact\): requested_rewrite has an empty subject",
        ),
        (COUNTERFACT | {"neighborhood_prompts": {"a": 1}}, r"An entry of neighborhood_prompts is \{'a': 1\}"),
        ({"prompt": "P", "target": math.inf}, r"target is inf, a float\. Expected one text or finite number"),
        ({"prompt": "P", "target": date(1999, 1, 1)}, r"target is datetime\.date\(1999, 1, 1\), a date\. Expected one"),
        ({"prompt": b"\xff", "target": "T"}, r"prompt is b'\\xff', which is not text in UTF-8"),
        ({"prompt": "P", "target": "T", "rephrases": [[]]}, r"An entry of rephrases is \[\], a list"),
    ],
)
def test_something_else_in_place_of_a_text(bad: Row, message: str) -> None:
    """Written out, it would be an answer that nobody meant."""
    with pytest.raises(FactError, match=message):
        load_facts([ZSRE, bad])


def test_one_neighborhood_prompt_by_itself() -> None:
    """A text is one prompt, not one for each letter."""
    (fact,) = load_facts([COUNTERFACT | {"neighborhood_prompts": "Bo Ray speaks"}])
    assert fact.neighborhood == (("Bo Ray speaks", "Welsh"),)


@pytest.mark.parametrize(
    ("probes", "pairs"),
    [
        ({"prompt": ["l1", "l2"], "ground_truth": ["x", "y"]}, (("l1", "x"), ("l2", "y"))),
        ({"prompt": ["l1", "l2"], "ground_truth": [["x", "z"], "y"]}, (("l1", "x"), ("l2", "y"))),
        ({"prompt": ["l1", "l2"], "ground_truth": [[], 1998]}, (("l2", "1998"),)),  # no answer counts as right
        ({"prompt": ["l1"], "ground_truth": "x"}, (("l1", "x"),)),
        ({"prompt": "l1", "ground_truth": ["x", "other name of x"]}, (("l1", "x"),)),
        ({"prompt": "l1", "ground_truth": [["x", "other name of x"], ["z"]]}, (("l1", "x"),)),
        ({"prompt": "l1", "ground_truth": {"str": "x"}}, (("l1", "x"),)),
        (
            [{"prompt": ["l1", "l2"], "ground_truth": ["x", "y"]}, {"prompt": "l3", "ground_truth": "z"}],
            (("l1", "x"), ("l2", "y"), ("l3", "z")),
        ),
        ({"prompt": [], "ground_truth": []}, ()),
    ],
)
def test_probes_in_lists(probes: Any, pairs: tuple[tuple[str, str], ...]) -> None:
    """Each prompt has its own answer; a list of answers for one prompt is what counts as right."""
    (fact,) = load_facts([{"prompt": "Q?", "target_new": "A", "locality": {"k": probes}, "portability": {"k": probes}}])
    assert fact.neighborhood == fact.portability == pairs
    assert (fact.unrelated_prompt, fact.unrelated_answer) == (pairs[0] if pairs else (None, None))


@pytest.mark.parametrize("truths", [["x"], ["x", "y", "z"], [], "x", None])
def test_probes_in_lists_of_different_lengths(truths: Any) -> None:
    """Nobody knows which answer belongs to which prompt."""
    row = {"prompt": "Q?", "target_new": "A", "locality": {"near": {"prompt": ["l1", "l2"], "ground_truth": truths}}}
    with pytest.raises(FactError, match=r"Fact 0 \(KnowEdit\): near has 2 prompts \(\['l1', 'l2'\]\) and \d answers"):
        load_facts([row])


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"requested_rewrite": {"prompt": "x {}"}}, "CounterFact"),
        ({"requested_rewrite": "x"}, "CounterFact"),
        ({"prompt": "Q?", "target_new": "A", "locality": {"Reasoning": ["x"]}}, "KnowEdit"),
        ({"prompt": "Q?", "target_new": "A", "portability": {"Reasoning": [{"prompt": "x"}]}}, "KnowEdit"),
    ],
)
def test_a_damaged_nested_row_is_a_fact_error(bad: Row, name: str) -> None:
    """The outer columns promise a format, the inner ones do not keep it; the message says which row and what."""
    with pytest.raises(FactError, match=f"Fact 1 has the columns of {name}, and cannot be read as such"):
        load_facts([COUNTERFACT, bad])


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """One split of it, downloaded for a list and streamed for a stream, with the options that name its files."""
    calls: list[tuple[str, Row]] = []

    def load_dataset(name: str, **options: Any) -> Any:
        calls.append((name, options))
        data = datasets.Dataset.from_list([WIKI_RECENT])
        return data.to_iterable_dataset() if options["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_facts("org/facts") == [WIKI_RECENT_FACT]
    stream = FactStream("org/facts", split="test", data_files="recent.json")
    assert list(stream) == list(stream) == [WIKI_RECENT_FACT]
    assert calls == [
        ("org/facts", {"split": "train", "streaming": False}),
        *[("org/facts", {"split": "test", "streaming": True, "data_files": "recent.json"})] * 2,
    ]


def test_options_of_the_hub_for_something_else(tmp_path: Path) -> None:
    """Ignored, they would read other facts than those asked for."""
    write_json(tmp_path / "f.json", ROWS)
    with pytest.raises(FactError, match=r"data_files: for data sets on the Hub, and .*f\.json is none"):
        load_facts(tmp_path / "f.json", data_files="recent.json")


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


@pytest.mark.parametrize("name", FORMATS)
def test_column_mapping_wins_over_a_recognised_layout(name: str) -> None:
    """For the fields that it names; the others are those of the layout."""
    row, fact = FORMATS[name]
    more = row | {"who": "Ann", "was": 1998, "asked": "Who?", "near": [["a", "b"]], "far": [["c", "d"]]}
    mapped = {
        "subject": "who",
        "ground_truth": "was",
        "rephrases": "asked",
        "neighborhood": "near",
        "portability": "far",
    }
    new: Row = {
        "subject": "Ann",
        "ground_truth": "1998",
        "rephrases": ("Who?",),
        "neighborhood": (("a", "b"),),
        "portability": (("c", "d"),),
    }
    assert load_facts([more], column_mapping=mapped) == [replace(fact, **new)]
    assert load_facts([more], column_mapping={"prompt": "asked"}) == [replace(fact, prompt="Who?")]
    assert load_facts([more], column_mapping={"target": "asked"}) == [replace(fact, target="Who?")]


@pytest.mark.parametrize(
    ("row", "mapping", "fact"),
    [
        # A column that gives its layout away; taken, it is not read as what it is there.
        (ZSRE, {"target": "alt"}, ZSRE_FACT),
        (ZSRE, {"target": "answers"}, None),
        (MALMEN_ZSRE, {"prompt": "src", "ground_truth": "ans"}, None),
        (KNOWEDIT_ZSRE, {"target": "cond"}, replace(KNOWEDIT_ZSRE_FACT, target=KNOWEDIT_ZSRE["cond"])),
        (
            WIKI_COUNTERFACT,
            {"target": "ground_truth"},
            replace(WIKI_COUNTERFACT_FACT, target="mayor of Graz", ground_truth=None),
        ),
        # Both: the layout is told, and the other columns are fields or nothing.
        (
            WIKI_COUNTERFACT | {"locality": "Graz", "portability": None},
            {"prompt": "prompt", "target": "target_new"},
            Fact("The office held by Jon Hale is", "bishop of Turku", subject="Jon Hale", ground_truth="mayor of Graz"),
        ),
        # A layout that is one with its mapping only; a place for the subject; an answer in a dict.
        (
            {"ask": "{} founded", "target_new": "X", "who": "Jobs"},
            {"prompt": "ask", "subject": "who"},
            Fact("Jobs founded", "X", subject="Jobs"),
        ),
        (REQUEST, {"prompt": "prompt", "target": "target_new"}, load_facts([REQUEST])[0]),
    ],
)
def test_column_mapping_and_columns_of_a_layout(row: Row, mapping: dict[str, str], fact: Fact | None) -> None:
    """A column that is mapped counts for the field that it is mapped to, and for no other."""
    if fact is None:
        with pytest.raises(FactError, match=r"Fact 0 .*(empty target|target is \['Kir River'\], a list)"):
            load_facts([row], column_mapping=mapping)
    else:
        assert load_facts([row], column_mapping=mapping) == [fact]


def test_column_mapping_of_a_layout_names_a_column_that_is_not_there() -> None:
    """Recognised or not."""
    with pytest.raises(FactError, match=r"'subject' from the column 'who', and fact 0 has only src, rephrase, ans"):
        load_facts([MALMEN_ZSRE], column_mapping={"subject": "who"})


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


def test_a_data_frame() -> None:
    """Its rows are the facts, whatever its index, and cells that are missing are not there; as a stream too."""
    frame = pandas.DataFrame([*TABLE_ROWS, {"prompt": "a", "target": "b"}], index=list("dcba"))
    assert frame["subject"].isna().any()
    assert load_facts(frame) == [*TABLE_FACTS, Fact("a", "b")] == list(FactStream(frame))
    assert FactStream(frame).count() == 4
    renamed = frame.rename(columns={"prompt": "question"})
    assert load_facts(renamed, column_mapping={"prompt": "question", "target": "target"})[-1] == Fact("a", "b")
    with pytest.raises(FactError, match=r"Fact 0 has an empty target"):
        load_facts(pandas.DataFrame({"prompt": ["a"], "target": [None]}))
    with pytest.raises(FactError, match=r"No facts in the DataFrame given"):
        load_facts(frame[:0])
    with pytest.raises(FactError, match=r"several columns of one name: prompt, target, target\."):
        load_facts(pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "target", "target"]))


@pytest.mark.parametrize(
    "text", ["prompt,target\na,b,c\n", "prompt,target\na,b\nHello, world is,Java\n", 'prompt,target\n"a,b\n']
)
def test_a_table_with_too_many_cells(text: str, tmp_path: Path) -> None:
    """An unquoted comma must not move texts into other columns."""
    (tmp_path / "f.csv").write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=r"f\.csv"):
        load_facts(tmp_path / "f.csv")


def test_a_table_with_two_columns_of_a_name(tmp_path: Path) -> None:
    """One of them would be lost."""
    (tmp_path / "f.csv").write_text("prompt,target,target\na,b,c\n", encoding="utf-8")
    with pytest.raises(FactError, match=r"f\.csv has several columns 'target'\. Rename"):
        load_facts(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text("prompt,target,,\na,b,,\n", encoding="utf-8")
    assert load_facts(tmp_path / "f.csv") == [Fact("a", "b")]


def test_a_table_with_a_long_cell(tmp_path: Path) -> None:
    """Python's reader takes no more; the way out is named."""
    (tmp_path / "f.csv").write_text(f"prompt,target\na,{'b' * 131_073}\n", encoding="utf-8")
    with pytest.raises(FactError, match=r"f\.csv cannot be read.* 131,072 characters at most; JSONL takes longer"):
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


@pytest.mark.parametrize("rephrases", [[""], ["fine", " "], ["fine", None]])
def test_a_bad_rephrase(rephrases: list[Any]) -> None:
    """The message quotes the prompt it belongs to."""
    with pytest.raises(FactError, match=r"Fact 0 \('P'\) has an empty rephrase"):
        load_facts([{"prompt": "P", "target": "T", "rephrases": rephrases}])


@pytest.mark.parametrize("rephrases", ["北京是", None, {"R"}])
def test_rephrases_that_are_no_list(rephrases: Any) -> None:
    """A text is not a rephrase for each of its characters."""
    with pytest.raises(FactError, match=r"Fact 0 \('P'\) has .* for rephrases\. Expected a list of texts"):
        load_facts([Fact("P", "T", rephrases=rephrases)])


@pytest.mark.parametrize("field", ["unrelated_prompt", "unrelated_answer", "subject", "ground_truth"])
@pytest.mark.parametrize("value", ["", " \n", 3])
def test_an_empty_text_that_may_be_left_out(field: str, value: Any) -> None:
    """There is nothing to compare with, or to look for."""
    texts: Row = {"unrelated_prompt": "N", "unrelated_answer": "M"} | {field: value}
    with pytest.raises(FactError, match=rf"Fact 0 \('P'\) has an empty {field} \({re.escape(repr(value))}\).*out"):
        load_facts([Fact("P", "T", **texts)])


@pytest.mark.parametrize("field", ROWS[0])
def test_half_a_character(field: str) -> None:
    """JSON may escape a lone surrogate, which cannot be written or tokenised: refused before anything is edited."""
    row = ROWS[0] | {field: json.loads(re.sub("[a-z]", r"\\ud83d", json.dumps(ROWS[0][field]), count=1))}
    with pytest.raises(FactError, match=r"Fact 0 .* holds '\\ud83d', half a character"):
        load_facts([row])


@pytest.mark.parametrize("name", ["neighborhood", "portability"])
@pytest.mark.parametrize("pairs", ["ab", ["ab"], [["a"]], [["a", "b", "c"]], [["a", "b"], ["a", " "]], [["a", 3]]])
def test_pairs_that_are_none(name: str, pairs: Any) -> None:
    """A prompt and its answer, both texts."""
    with pytest.raises(FactError, match=rf"Fact 0 \('P'\) has .* in {name}\. Expected a list of \(prompt, answer\)"):
        load_facts([{"prompt": "P", "target": "T", name: pairs}])


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
        "MALMEN's zsRE: ans, src",
        "KnowEdit: prompt, target_new",
        "KnowEdit's WikiBio: concept, labels, text",
        "WikiBigEdit: ans, update",
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


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
@pytest.mark.parametrize("depth", [700, 100_000])
def test_deeply_nested_json(name: str, depth: int, tmp_path: Path) -> None:
    """Deeper than the values are looked through, and deeper than the decoder goes. How deep that is, is Python's."""
    rows = ['{"prompt": "a", "target": "b"}', '{"prompt": "c", "target": ' + "[" * depth + "]" * depth + "}"]
    text = "\n".join(rows) if name == "f.jsonl" else f"[{rows[0]},\n{rows[1]}]"
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=r"^Fact 1 |Nested too deeply: line 2"):
        load_facts(tmp_path / name)


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
    """A file that holds one fact, over several lines, is not a list of one."""
    (tmp_path / "f.json").write_text(json.dumps(ROWS[0], indent=1), encoding="utf-8")
    with pytest.raises(FactError, match=r"f\.json is not valid JSON: .*Expected a list of facts, or one object a line"):
        load_facts(tmp_path / "f.json")


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_lists_and_lines_under_either_ending(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """UltraEditBench's script writes lines into a `.json`. A byte order mark and leading space do not matter."""
    write(tmp_path / name, ROWS)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf \n" + (tmp_path / name).read_bytes())
    assert load_facts(tmp_path / name) == FACTS


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_in_pieces(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a piece ends, within a text, an escape or a number: the entries are those that `json` reads."""
    monkeypatch.setattr(fact_files, "_CHUNK", chunk)
    rows = [*ROWS, {"prompt": 'a "[,]\\" \u2028 {', "target": -12.5e3, "id": [1234, None, True, {}]}, WIKI_RECENT]
    text = json.dumps(rows, indent=indent)
    (tmp_path / "f.json").write_text(text, encoding="utf-8")
    assert list(fact_files._read_json(tmp_path / "f.json")) == json.loads(text)
    (tmp_path / "f.json").write_text(" [12345, 67890 , \n 1e5] \n", encoding="utf-8")
    assert list(fact_files._read_json(tmp_path / "f.json")) == [12345, 67890, 1e5]


@pytest.mark.parametrize("chunk", [1, 10_000])
@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1\n}",
        "[] 1",
        "[1],",
        "[[1]",
        '["a',
        "[tru]",
        "[1]]",
        '[{"a" 1}]',
        "nul",
    ],
)
def test_a_broken_json_list(chunk: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where `json` refuses it, with the number of the line."""
    monkeypatch.setattr(fact_files, "_CHUNK", chunk)
    (tmp_path / "f.json").write_text(f"\n{text}", encoding="utf-8")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(FactError, match=r"f\.json is not valid JSON: .*: line [23]\b"):
        list(fact_files._read_json(tmp_path / "f.json"))


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_a_broken_json_list_names_its_own_line(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the start of the file, though what was read before is gone."""
    monkeypatch.setattr(fact_files, "_CHUNK", chunk)
    (tmp_path / "f.json").write_text('[\n {"a": 1},\n\n {"b":\n oops},\n {}]\n', encoding="utf-8")
    with pytest.raises(FactError, match="line 5"):
        list(fact_files._read_json(tmp_path / "f.json"))


def test_a_split_of_what_has_none(tmp_path: Path) -> None:
    """Of a list or a file it is refused, not left aside."""
    (tmp_path / "facts.jsonl").write_text('{"prompt": "a", "target": "b"}\n', encoding="utf-8")
    for source in ([{"prompt": "a", "target": "b"}], tmp_path / "facts.jsonl"):
        with pytest.raises(FactError, match=r"split: for data sets on the Hub.*Leave it out"):
            load_facts(source, split="test")
    with pytest.raises(FactError, match=r"split: for data sets on the Hub"):
        list(FactStream(tmp_path / "facts.jsonl", split="test"))


def test_a_dict_instead_of_a_list() -> None:
    """Nor is a dict."""
    with pytest.raises(FactError, match=r"got a single dict\. Put it in a list"):
        load_facts({"prompt": "a", "target": "b"})
    with pytest.raises(FactError, match=r"got a single DatasetDict\..* of a data set with splits, give one"):
        load_facts(datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)))


def test_what_holds_no_facts() -> None:
    """None, as where they were forgotten, a number, or one fact by itself."""
    for bad in (None, 3):
        with pytest.raises(FactError, match=rf"or the path or Hub id of one; got {type(bad).__name__}\."):
            load_facts(bad)
    with pytest.raises(FactError, match=r"got Fact\. Put it in a list"):
        load_facts(Fact("a", "b"))


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


# Streams


def numbered(n_facts: int) -> Iterator[Row]:
    """Facts of some 600 characters each."""
    for number in range(n_facts):
        yield {"prompt": f"Number {number} is, {'and so it goes, ' * 36}", "target": f"{number}"}


class Passes:
    """Numbered rows, made as they are read."""

    def __init__(self, n_facts: int) -> None:
        self.n_facts, self.made = n_facts, 0

    def __iter__(self) -> Iterator[Row]:
        for row in numbered(self.n_facts):
            self.made += 1
            yield row


@pytest.mark.parametrize(
    ("name", "write"),
    [("f.json", write_json), ("f.jsonl", write_jsonl), ("f.parquet", write_parquet)],
)
def test_a_stream_of_a_file(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """The facts of `load_facts`, at every pass, also while another pass is under way."""
    write(tmp_path / name, ROWS)
    stream = FactStream(tmp_path / name)
    under_way = iter(stream)
    assert next(under_way) == FACTS[0]
    assert list(stream) == list(stream) == FACTS
    assert list(under_way) == FACTS[1:]
    assert load_facts(stream) == FACTS
    assert repr(stream) == f"FactStream({tmp_path / name})"


@pytest.mark.parametrize(("name", "write"), [("f.csv", write_csv), ("f.tsv", write_tsv)])
def test_a_stream_of_a_table(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    """One text a cell."""
    write(tmp_path / name, TABLE_ROWS)
    stream = FactStream(tmp_path / name)
    assert list(stream) == list(stream) == TABLE_FACTS


@pytest.mark.parametrize("source", [FACTS, ROWS, datasets.Dataset.from_list(ROWS).to_iterable_dataset()])
def test_a_stream_of_something_in_memory(source: Any) -> None:
    """Whatever starts anew."""
    stream = FactStream(source)
    assert list(stream) == list(stream) == FACTS


def test_a_stream_maps_columns() -> None:
    """As `load_facts`."""
    stream = FactStream([{"question": "Q?", "new": "A"}], column_mapping={"prompt": "question", "target": "new"})
    assert list(stream) == [Fact("Q?", "A")]


def test_a_stream_reads_no_further_than_it_is_read() -> None:
    """A row is made when its fact is asked for, and is checked then: what comes later is not looked at."""
    source = Passes(100_000)
    facts = iter(FactStream(source))
    assert source.made == 0
    assert [next(facts).target for _ in range(3)] == ["0", "1", "2"]
    assert source.made == 3


@pytest.mark.parametrize(
    ("name", "n_facts"), [("f.jsonl", 100_000), ("f.json", 20_000), ("f.csv", 20_000), ("f.parquet", 20_000)]
)
def test_a_stream_holds_no_facts(name: str, n_facts: int, tmp_path: Path) -> None:
    """Two facts are alive at any time, and a pass takes less than a third of the memory that its texts would."""
    path = tmp_path / name
    if name == "f.parquet":
        pandas.DataFrame(numbered(n_facts)).to_parquet(path)
    elif name == "f.csv":
        pandas.DataFrame(numbered(n_facts)).to_csv(path, index=False)
    else:
        lines = map(json.dumps, numbered(n_facts))
        path.write_text("\n".join(lines) if name == "f.jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    alive: weakref.WeakSet[Fact] = weakref.WeakSet()
    count = most = 0
    tracemalloc.start()
    try:
        for fact in FactStream(path):
            assert fact.target == str(count)
            alive.add(fact)
            count, most = count + 1, max(most, len(alive))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == n_facts
    assert most <= 2
    assert peak < 200 * n_facts


def test_a_stream_refuses_an_iterator() -> None:
    """It would be empty at the second pass."""
    with pytest.raises(FactError, match=r"the generator given can be read once\. Give it a file.* load_facts"):
        FactStream(numbered(3))


@pytest.mark.parametrize("source", [[], datasets.Dataset.from_list([])])
def test_a_stream_of_nothing(source: Any) -> None:
    """Found when it is read."""
    with pytest.raises(FactError, match=r"No facts in the .* given\. Expected at least one"):
        list(FactStream(source))


def test_a_stream_of_a_missing_file() -> None:
    """The same."""
    with pytest.raises(FactError, match=r"There is no file no\.jsonl"):
        list(FactStream("no.jsonl"))


def test_a_stream_finds_flaws_where_they_are() -> None:
    """After the facts before them."""
    facts = iter(FactStream([*ROWS, {"prompt": "P", "target": " "}]))
    assert [next(facts) for _ in FACTS] == FACTS
    with pytest.raises(FactError, match=r"Fact 3 has an empty target"):
        next(facts)


def test_a_stream_finds_contradictions() -> None:
    """However far apart, by number: the text of the first one is gone. Repeated facts are none."""
    rows = [*numbered(5_000), *numbered(5_000), {"prompt": next(numbered(1))["prompt"], "target": "C"}]
    with pytest.raises(FactError, match=r"Facts 0 and 10000 give .* two targets, that of fact 0 and 'C'"):
        list(FactStream(rows))
    assert len(list(FactStream(rows[:-1]))) == 10_000


CLASSES = datasets.ClassLabel(names=["SUPPORTS", "REFUTES"])


def classified(**columns: list[Any]) -> datasets.Dataset:
    """Claims with numbers of classes."""
    claims = {"prompt": ["Rome is in Italy.", "Rome is in Peru."], "target": [0, 1]} | columns
    features = {"prompt": datasets.Value("string"), "target": CLASSES, "ground_truth": CLASSES}
    features["alt"] = datasets.List(CLASSES)
    return datasets.Dataset.from_dict(claims, features=datasets.Features({name: features[name] for name in claims}))


@pytest.mark.parametrize("form", ["dataset", "iterable", "numpy", "stream", "parquet"])
def test_classes_count_by_name(form: str, tmp_path: Path) -> None:
    """Not by number, which a model may give to another class; and none is given where `datasets` has -1."""
    table = classified(ground_truth=[-1, 0])
    table.to_parquet(tmp_path / "facts.parquet")
    sources: dict[str, Any] = {
        "dataset": table,
        "iterable": table.to_iterable_dataset(),
        "numpy": table.with_format("numpy"),
        "stream": FactStream(table),
        "parquet": tmp_path / "facts.parquet",
    }
    assert load_facts(sources[form]) == [
        Fact("Rome is in Italy.", "SUPPORTS"),
        Fact("Rome is in Peru.", "REFUTES", ground_truth="SUPPORTS"),
    ]


def test_classes_in_other_columns_and_in_lists() -> None:
    """With `column_mapping`, and in FEVER's lists of one class."""
    mapping = {"prompt": "claim", "target": "label"}
    table = classified().rename_columns({"prompt": "claim", "target": "label"})
    assert [fact.target for fact in load_facts(table, column_mapping=mapping)] == ["SUPPORTS", "REFUTES"]
    fever = classified(alt=[[1], [0]]).remove_columns("target")
    for rows in (fever, fever.with_format("numpy"), fever.with_format("torch")):
        assert [fact.target for fact in load_facts(rows)] == ["REFUTES", "SUPPORTS"]
    with pytest.raises(FactError, match=r"Fact 1 has an empty target"):
        load_facts(classified(target=[0, -1]))


def with_features(path: Path, features: dict[str, Any], target: Any) -> Path:
    """A Parquet file with one fact, and what `datasets` says of its columns."""
    told = json.dumps({"info": {"features": {"prompt": {"dtype": "string", "_type": "Value"}, **features}}})
    table = pyarrow.table({"prompt": ["P"], "target": [target]}).replace_schema_metadata({"huggingface": told})
    pyarrow.parquet.write_table(table, path)
    return path


def test_a_parquet_file_with_columns_of_a_newer_datasets(tmp_path: Path) -> None:
    """What it says of them is not needed to read them."""
    path = with_features(tmp_path / "f.parquet", {"target": {"_type": "FancyNew"}}, "T")
    assert load_facts(path) == [Fact("P", "T")]


def test_a_class_that_is_not_there_names_its_column(tmp_path: Path) -> None:
    """Of a Parquet file, which is not said to be broken for it."""
    path = with_features(tmp_path / "f.parquet", {"target": {"names": ["A", "B"], "_type": "ClassLabel"}}, 5)
    with pytest.raises(FactError, match=r"^Column 'target' has the class 5, and there are 2: A, B\. Expected a number"):
        load_facts(path)
