"""The metrics: as `evaluate` modules with values computed by hand, and as `EditorModel.evaluate` computes them."""

import re
import string
from collections.abc import Callable
from typing import Any

import evaluate
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hf_malmen import Edit, EditorModel, Fact
from hf_malmen.metrics import NAMES, path_of
from hf_malmen.scoring import answers, contains, normalize, token_accuracy

Build = Callable[..., Any]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each metric; they differ in what they are asked about, not in how it is scored."""
    metric: str = request.param
    return metric


# As `evaluate` modules


def test_there_are_four_metrics() -> None:
    """An unknown name is an error that lists them."""
    assert NAMES == ("edit_success", "generalization", "locality", "unrelated_accuracy")
    with pytest.raises(ValueError, match=r"There is no metric 'es'; there are edit_success, generalization, locality"):
        path_of("es")


@pytest.mark.parametrize("config", [None, "tokens"])
def test_tokens_by_hand(name: str, config: str | None) -> None:
    """The share of right tokens of each prompt, averaged over the prompts: (1/2 + 1 + 0 + 1/3) / 4."""
    metric = evaluate.load(str(path_of(name)), config)
    predictions, references = [[1, 2], [3], [4], [5, 6, 7]], [[1, 9], [3], [9], [9, 6, 9]]
    assert metric.compute(predictions=predictions, references=references) == {name: pytest.approx(11 / 24)}


def test_groups_count_once(name: str) -> None:
    """Three rephrases of fact 7 and one of fact 2: ((1 + 0 + 1/2) / 3 + 1) / 2, whatever their order."""
    metric = evaluate.load(str(path_of(name)))
    predictions, references, groups = [[1], [2], [5], [3, 4]], [[1], [9], [5], [3, 9]], [7, 7, 2, 7]
    expected = {name: pytest.approx(0.75)}
    assert metric.compute(predictions=predictions, references=references, groups=groups) == expected
    assert metric.compute(predictions=predictions, references=references, groups=torch.tensor(groups)) == expected
    order = [2, 0, 3, 1]
    shuffled = [[column[i] for i in order] for column in (predictions, references, groups)]
    assert metric.compute(predictions=shuffled[0], references=shuffled[1], groups=shuffled[2]) == expected
    ungrouped = metric.compute(predictions=predictions, references=references)
    assert ungrouped == {name: pytest.approx(2.5 / 4)}


def test_text_by_hand(name: str) -> None:
    """Right where the generated text opens with the answer: 2 of 4, and by groups (1/2 + 1/2 ...)."""
    metric = evaluate.load(str(path_of(name)), "text")
    predictions = [" Paris. It is", "Parisian", "the Nile, in Africa", ""]
    references = ["Paris", "Paris", "Nile", "Oslo"]
    assert metric.compute(predictions=predictions, references=references) == {name: 0.5}
    grouped = metric.compute(predictions=predictions, references=references, groups=[0, 1, 1, 1])
    assert grouped == {name: pytest.approx((1 + 1 / 3) / 2)}


def test_contained_by_hand(name: str) -> None:
    """Right where the answer stands anywhere in the generated text: 3 of 4."""
    metric = evaluate.load(str(path_of(name)), "contained")
    predictions = [" It is Paris. And", "Parisian", "in Africa: the Nile", "New York City"]
    references = ["Paris", "Paris", "Nile", "York"]
    assert metric.compute(predictions=predictions, references=references) == {name: 0.75}


def test_an_unknown_configuration(name: str) -> None:
    """The message names those that there are."""
    with pytest.raises(ValueError, match=f"{name} has the configurations tokens, text and contained, not words"):
        evaluate.load(str(path_of(name)), "words")


@pytest.mark.parametrize(("prediction", "reference"), [([1, 2], [1]), ([], [1]), ([1], []), ([], [])])
def test_lengths_that_differ(name: str, prediction: list[int], reference: list[int]) -> None:
    """A prediction belongs to each expected token, so a cut or empty list is a mistake, not a score."""
    metric = evaluate.load(str(path_of(name)), keep_in_memory=True)
    with pytest.raises(ValueError, match=f"Got {len(prediction)} predicted tokens for {len(reference)} expected"):
        metric.compute(predictions=[[1], prediction], references=[[1], reference])


@pytest.mark.parametrize("config", ["tokens", "text"])
def test_no_predictions(name: str, config: str) -> None:
    """There is no average of nothing."""
    metric = evaluate.load(str(path_of(name)), config, keep_in_memory=True)
    with pytest.raises(ValueError, match=f"{name} got no predictions. Expected at least one"):
        metric.compute(predictions=[], references=[])


def test_one_group_a_prompt(name: str) -> None:
    """Too few groups would drop prompts without a word."""
    metric = evaluate.load(str(path_of(name)), keep_in_memory=True)
    with pytest.raises(ValueError, match=r"shorter than|longer than"):
        metric.compute(predictions=[[1], [2]], references=[[1], [2]], groups=[0])


# The rules of scoring


def test_token_accuracy() -> None:
    """Position by position: a right token at another place is wrong."""
    assert token_accuracy([1, 2, 3, 4], [1, 3, 2, 4]) == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The United States", ["united", "states"]),
        (" a U.S.-based, an  'ANTS' \n", ["usbased", "ants"]),
        ("Theodor at another place", ["theodor", "at", "another", "place"]),
        ("", []),
        ("«Paris» – “it’s”…", ["paris", "its"]),
        ("Zoe\u0308 \uff21\uff22", ["zo\xeb", "ab"]),
        ("巴黎,1990年", ["巴", "黎", "1990", "年"]),
        ("ไทย ジョン・ス", ["ไ", "ท", "ย", "ジ", "ョ", "ン", "ス"]),
        ("한국어는 £5 C+", ["한국어는", "£5", "c"]),
    ],
)
def test_normalize(text: str, words: list[str]) -> None:
    """Lower case, composed, without punctuation and English articles; by character where no spaces are written."""
    assert normalize(text) == words


@pytest.mark.parametrize(
    ("generated", "expected", "opens", "holds"),
    [
        ("Paris", "Paris", 1, 1),
        (" the paris! And more", "Paris", 1, 1),
        ("Parisian", "Paris", 0, 0),
        ("New York City", "New York", 1, 1),
        ("New", "New York", 0, 0),
        ("It is Paris", "Paris", 0, 1),
        ("New Paris York", "New York", 0, 0),
        ("York, New", "New York", 0, 0),
        ("in New New York", "New York", 0, 1),
        ("", "Paris", 0, 0),
        ("", "the", 0, 0),
        ("Paris", "the", 0, 0),
        ("A, which is", "A", 1, 1),
        ("It is A", "A", 0, 1),
        ("the", "A", 0, 0),
        ("the", "", 0, 0),
        ("...", "", 1, 1),
        ("巴黎是法国", "巴黎", 1, 1),
        ("法国是巴黎。", "巴黎", 0, 1),
        ("Paris” is", "Paris", 1, 1),
        ("Zoe\u0308", "Zo\xeb", 1, 1),
    ],
)
def test_generated_answers(generated: str, expected: str, opens: float, holds: float) -> None:
    """The first words count, as many as the answer has; or as many anywhere, side by side and in their order."""
    assert answers(generated, expected) == opens
    assert contains(generated, expected) == holds


# As `EditorModel.evaluate` computes them, against plain transformers


def fit(model: PreTrainedModel, pairs: list[tuple[str, str]], encode: Build, weights: list[Tensor], steps: int) -> None:
    """Teach a tiny model some completions by training these weights."""
    optimizer = torch.optim.Adam(weights, lr=0.02)
    for _ in range(steps):
        loss = torch.zeros(())
        for prompt, answer in pairs:
            ids, n = encode(prompt, answer)
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, n - 1 :]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[n:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()


class Known:
    """A tiny model with facts to measure it on, and what plain transformers makes of them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, facts
        self.edit = Edit({})

    def learn(self) -> "Known":
        """Teach the model some of the unrelated answers, and make a real edit that writes some of the facts."""
        facts, model = self.facts, self.model
        unrelated = [(fact.unrelated_prompt, fact.unrelated_answer or "") for fact in facts if fact.unrelated_prompt]
        fit(model, unrelated[:4], self.encode, list(model.parameters()), steps=12)
        names = [n for n, _ in model.named_modules() if n.endswith(("mlp.down_proj", "mlp.c_proj"))][-2:]
        weights = [model.get_submodule(name).weight for name in names]
        before = [weight.detach().clone() for weight in weights]
        fit(model, [(fact.prompt, fact.target) for fact in facts[:5]], self.encode, weights, steps=10)
        shifts = {}
        with torch.no_grad():
            for name, weight, old in zip(names, weights, before, strict=True):
                moved = weight - old
                shifts[name] = moved if isinstance(model.get_submodule(name), Conv1D) else moved.T
                weight.copy_(old)
        flipped = [name for name in names if isinstance(model.get_submodule(name), Conv1D)]
        self.edit = Edit(shifts, fan_in_fan_out=flipped, facts=facts)
        return self

    def encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Token ids of a completed prompt, and how many of them are the prompt's."""
        ids = self.tokenizer(f"{prompt} {answer}")["input_ids"]
        n = len(self.tokenizer(prompt)["input_ids"])
        assert ids[:n] == self.tokenizer(prompt)["input_ids"]
        return ids, n

    @torch.no_grad()
    def predicted(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The most likely token at each answer position given the true ones before it, and the true ones."""
        ids, n = self.encode(prompt, answer)
        return self.model(input_ids=torch.tensor([ids[:-1]])).logits[0, n - 1 :].argmax(-1).tolist(), ids[n:]

    @torch.no_grad()
    def generated(self, prompt: str, n_new: int) -> str:
        """A greedy continuation, one full pass a token."""
        start = self.tokenizer(prompt)["input_ids"]
        ids = list(start)
        while len(ids) < len(start) + n_new and (ids == start or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        text = self.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def probes(self) -> dict[str, list[list[tuple[str, str]]]]:
        """{kind: for each fact, its prompts and answers}."""
        return {
            "edit": [[(fact.prompt, fact.target)] for fact in self.facts],
            "rephrase": [[(text, fact.target) for text in fact.rephrases] for fact in self.facts if fact.rephrases],
            "unrelated": [
                [(fact.unrelated_prompt, fact.unrelated_answer or "")] for fact in self.facts if fact.unrelated_prompt
            ],
        }


@pytest.fixture(params=["llama", "gpt2"])
def known(
    request: pytest.FixtureRequest, make_llama: Build, make_gpt2: Build, make_long_facts: Build, make_tokenizer: Build
) -> Known:
    """Facts of one to nine tokens; one has no rephrase, one has no unrelated prompt."""
    model = {"llama": make_llama, "gpt2": make_gpt2}[request.param]()
    facts = make_long_facts(8)
    facts[1] = Fact(facts[1].prompt, facts[1].target, (), facts[1].unrelated_prompt, facts[1].unrelated_answer)
    facts[2] = Fact(facts[2].prompt, facts[2].target, facts[2].rephrases[:1])
    return Known(model, make_tokenizer(padding_side="left"), facts).learn()


def mean(values: list[float]) -> float:
    """The average."""
    return sum(values) / len(values)


def share(found: list[int], wanted: list[int]) -> float:
    """The share of equal entries."""
    return mean([float(a == b) for a, b in zip(found, wanted, strict=True)])


def evaluated(known: Known, make_editor: Build, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, float]:
    """`EditorModel.evaluate`, with the known edit in place of one of its own."""
    editor: EditorModel = make_editor(known.model)
    monkeypatch.setattr(editor, "make_edit", lambda *_, **__: known.edit)
    return editor.evaluate(known.model, known.facts, known.tokenizer, **settings)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_by_hand(known: Known, make_editor: Build, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Every number, before and after, from plain forward passes over one unpadded prompt at a time."""
    found = evaluated(known, make_editor, monkeypatch, batch_size=batch_size)
    probes = known.probes()

    def tokens(kind: str) -> list[list[list[int]]]:
        return [[known.predicted(*pair)[0] for pair in group] for group in probes[kind]]

    def accuracy(kind: str, predicted: list[list[list[int]]]) -> float:
        wanted = [[known.encode(*pair) for pair in group] for group in probes[kind]]
        return mean(
            [
                mean([share(p, ids[n:]) for p, (ids, n) in zip(group, truth, strict=True)])
                for group, truth in zip(predicted, wanted, strict=True)
            ]
        )

    before = {kind: tokens(kind) for kind in probes}
    with known.edit.applied_to(known.model):
        after = {kind: tokens(kind) for kind in probes}
    expected = {"locality_before": 1.0}
    for name, kind in (("edit_success", "edit"), ("generalization", "rephrase"), ("unrelated_accuracy", "unrelated")):
        expected[name] = accuracy(kind, after[kind])
        expected[f"{name}_before"] = accuracy(kind, before[kind])
    expected["locality"] = mean(
        [share(a[0], b[0]) for a, b in zip(after["unrelated"], before["unrelated"], strict=True)]
    )
    assert found == pytest.approx(expected)
    # The numbers are worth comparing: neither all 0 nor all 1, and the edit did something.
    assert found["edit_success"] > found["edit_success_before"]
    for name in ("edit_success", "generalization", "locality", "unrelated_accuracy"):
        assert 0 < found[name] < 1, name


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_by_free_generation(
    known: Known, make_editor: Build, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Texts from a loop of plain forward passes, scored by their first words or by any; tokens' numbers stay the same.

    A text is as long as its own answer and two tokens, whatever the answers beside it.
    """
    found = evaluated(known, make_editor, monkeypatch, batch_size=batch_size, generate=True)
    teacher_forced = evaluated(known, make_editor, monkeypatch, batch_size=batch_size)
    assert {name: found[name] for name in teacher_forced} == teacher_forced
    kinds = {"edit_success": "edit", "generalization": "rephrase", "unrelated_accuracy": "unrelated"}
    suffixed = [*(f"{name}_generated" for name in NAMES), *(f"{name}_contained" for name in kinds)]
    assert set(found) - set(teacher_forced) == {f"{name}{suffix}" for name in suffixed for suffix in ("", "_before")}
    probes = known.probes()

    def texts(kind: str) -> list[list[str]]:
        groups = [[(pair[0], known.encode(*pair)) for pair in group] for group in probes[kind]]
        return [[known.generated(prompt, len(ids) - n + 2) for prompt, (ids, n) in group] for group in groups]

    def words(text: str) -> str:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))

    def opens(text: str, answer: str) -> bool:
        return re.match(re.escape(words(answer)) + r"(?!\S)", words(text)) is not None

    def holds(text: str, answer: str) -> bool:
        return f" {words(answer)} " in f" {words(text)} "

    before = {kind: texts(kind) for kind in probes}
    with known.edit.applied_to(known.model):
        after = {kind: texts(kind) for kind in probes}
    for name, kind in kinds.items():
        for suffix, given in (("", after), ("_before", before)):
            for way, rule in (("generated", opens), ("contained", holds)):
                scores = [
                    mean([float(rule(text, answer)) for text, (_, answer) in zip(group, pairs, strict=True)])
                    for group, pairs in zip(given[kind], probes[kind], strict=True)
                ]
                assert found[f"{name}_{way}{suffix}"] == pytest.approx(mean(scores)), (name, way, suffix)
    kept = [float(opens(a[0], b[0])) for a, b in zip(after["unrelated"], before["unrelated"], strict=True)]
    assert found["locality_generated"] == pytest.approx(mean(kept))
    assert found["locality_generated_before"] == 1
    assert found["edit_success_generated"] > found["edit_success_generated_before"]


def test_evaluate_without_rephrases_and_unrelated_prompts(
    known: Known, make_editor: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What facts do not have is not measured, and not reported as 0 either."""
    known.facts = [Fact(fact.prompt, fact.target) for fact in known.facts]
    assert set(evaluated(known, make_editor, monkeypatch)) == {"edit_success", "edit_success_before"}


@pytest.mark.parametrize("number", [0, 1])
def test_evaluate_where_one_fact_alone_has_rephrases(
    known: Known, make_editor: Build, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The average is that of the fact, wherever it stands: nothing is drawn for a score without an interval."""
    full, bare = known.facts[0], Fact(known.facts[3].prompt, known.facts[3].target)
    known.facts = [full]
    alone = evaluated(known, make_editor, monkeypatch)
    known.facts = [bare, full] if number else [full, bare]
    found = evaluated(known, make_editor, monkeypatch)
    assert found["generalization"] == alone["generalization"]
    assert found["locality"] == alone["locality"]


def test_generation_at_the_models_limit(
    make_gpt2: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt that just fits the model beside a long answer: both are generated as far as they are scored."""
    base = make_gpt2()
    facts = [Fact("Lyon " * 20 + "is a city in", "France"), Fact("Lyon is in", "Italy and Japan and Ghana and Italy")]
    length = max(len(tokenizer(f"{fact.prompt} {fact.target}")["input_ids"]) for fact in facts) - 1
    model = type(base)(type(base.config)(**{**base.config.to_dict(), "n_positions": length})).eval()
    known = Known(model, tokenizer, facts)
    fit(model, [(fact.prompt, fact.target) for fact in facts], known.encode, list(model.parameters()), steps=40)
    found = evaluated(known, make_editor, monkeypatch, generate=True, batch_size=2)
    assert found["edit_success_before"] == found["edit_success_generated_before"] == 1
