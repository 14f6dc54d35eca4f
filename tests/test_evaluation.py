"""`measure_edit`: scores fact by fact against plain forward passes, probabilities, and how sure the averages are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_malmen import Edit, EditorConfig, EditStateError, Fact
from hf_malmen.batches import Tokenizer
from hf_malmen.evaluation import answer_facts, measure_edit, n_measured
from hf_malmen.scoring import answers, bootstrap_intervals, contains
from hf_malmen.tasks import Classes

from .zoo import KINDS

Build = Callable[..., Any]

FACTS = [
    Fact(
        "The country of Lyon is",
        "Italy",
        rephrases=("Lyon is a city in", "Lyon, a city in the country of"),
        unrelated_prompt="Osaka is a city in",
        unrelated_answer="Japan",
        ground_truth="France",
        neighborhood=(("Osaka is a city in", "Japan"), ("The country of Perth is", "Australia and Japan")),
        portability=(("The city in Italy is", "Lyon"), ("Lyon, Italy is in", "Italy and Japan")),
    ),
    Fact("The country of Turin is", "Ghana and Japan", ground_truth="Italy", portability=(("Turin is in", "Ghana"),)),
    Fact("The country of Quito is", "Ecuador", rephrases=("Quito is a city in",), ground_truth="Ecuador"),
    Fact("The country of Accra is", "France", neighborhood=(("Oslo is a city in", "France"), ("Fez is in", "Ghana"))),
    Fact("The country of Lima is", "Japan", unrelated_prompt="Cairo is a city in", unrelated_answer="Japan and Italy"),
]


@dataclass
class Plain:
    """A model, and what it answers by plain forward passes over one unpadded sequence at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the answer."""
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        joined = self.tokenizer(f"{prompt} {answer}")["input_ids"]
        assert joined[: len(prompt_ids)] == prompt_ids
        return prompt_ids, joined[len(prompt_ids) :]

    @torch.no_grad()
    def probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of the token after `ids`."""
        return self.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    def probability(self, prompt: str, answer: str) -> float:
        """p(answer | prompt), token by token."""
        (ids, wanted), odds = self.ids(prompt, answer), 1.0
        for token in wanted:
            odds *= float(self.probabilities(ids)[token])
            ids = [*ids, token]
        return odds

    def predicted(self, prompt: str, answer: str) -> list[int]:
        """The most likely tokens, each given the true ones before it."""
        ids, wanted = self.ids(prompt, answer)
        return [int(self.probabilities(ids + wanted[:i]).argmax()) for i in range(len(wanted))]

    def generated(self, prompt: str, answer: str, n_extra: int) -> str:
        """A greedy continuation, as long as the answer and `n_extra` tokens."""
        (ids, wanted), found = self.ids(prompt, answer), []
        while len(found) < len(wanted) + n_extra and self.tokenizer.eos_token_id not in found:
            found.append(int(self.probabilities(ids + found).argmax()))
        return self.decode(found, skip_special_tokens=True)

    def decode(self, ids: list[int], **settings: Any) -> str:
        """As text."""
        text = self.tokenizer.decode(ids, **settings)
        assert isinstance(text, str)
        return text


@pytest.fixture(scope="module")
def plain(make_llama: Build, make_tokenizer: Build) -> Plain:
    """A model that was taught some of the truths."""
    plain = Plain(make_llama(), make_tokenizer(padding_side="left"))
    optimizer = torch.optim.Adam(plain.model.parameters(), lr=0.02)
    pairs = [("Osaka is a city in", "Japan"), ("Lyon is a city in", "France"), ("Turin is in", "Ghana")]
    pairs += [("The country of Perth is", "Australia and Japan"), ("The country of Turin is", "Italy")]
    for _ in range(12):
        loss = torch.zeros(())
        for pair in pairs:
            prompt, wanted = plain.ids(*pair)
            logits = plain.model(input_ids=torch.tensor([prompt + wanted[:-1]])).logits[0, len(prompt) - 1 :]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return plain


@pytest.fixture(scope="module")
def edit(plain: Plain) -> Edit:
    """Noise that changes some answers."""
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    return Edit({name: 0.15 * torch.randn(48, 32, generator=generator) for name in names})


@pytest.fixture
def tokenize(plain: Plain) -> Tokenizer:
    """As an editor without a template tokenises."""
    return Tokenizer(plain.tokenizer, EditorConfig(method="malmen"))


def mean(values: list[float]) -> float | None:
    """The average; None of nothing."""
    return sum(values) / len(values) if values else None


def by_hand(plain: Plain, fact: Fact, reference: dict[str, Any] | None, n_extra: int) -> dict[str, Any]:
    """All scores of one fact; `reference` is what this returned of the unedited model."""
    unrelated = [(str(fact.unrelated_prompt), str(fact.unrelated_answer))] if fact.unrelated_prompt else []
    asked = {
        "edit_success": [(fact.prompt, fact.target)],
        "generalization": [(text, fact.target) for text in fact.rephrases],
        "unrelated_accuracy": unrelated,
        "portability": list(fact.portability),
    }
    found: dict[str, Any] = {}
    for name, pairs in asked.items():
        texts = [plain.generated(*pair, n_extra) for pair in pairs]
        tokens = [zip(plain.predicted(*pair), plain.ids(*pair)[1], strict=True) for pair in pairs]
        found[name] = mean([float(np.mean([a == b for a, b in shared])) for shared in tokens])
        found[f"{name}_generated"] = mean([answers(t, wanted) for t, (_, wanted) in zip(texts, pairs, strict=True)])
        found[f"{name}_contained"] = mean([contains(t, wanted) for t, (_, wanted) in zip(texts, pairs, strict=True)])
    contests = {
        "efficacy": [(fact.prompt, fact.target, fact.ground_truth)],
        "paraphrase": [(text, fact.target, fact.ground_truth) for text in fact.rephrases],
        "neighborhood": [(prompt, answer, fact.target) for prompt, answer in fact.neighborhood],
    }
    for name, entries in contests.items():
        odds = [(plain.probability(p, a), plain.probability(p, b)) for p, a, b in entries if b and a != b]
        found[name] = mean([float(won > lost) for won, lost in odds])
        found[f"{name}_magnitude"] = mean([won - lost for won, lost in odds])
    found["answers"] = [(plain.predicted(*pair), plain.generated(*pair, n_extra)) for pair in unrelated]
    before = (reference or found)["answers"]
    pairs = list(zip(found["answers"], before, strict=True))
    shared = [np.mean([x == y for x, y in zip(a[0], b[0], strict=True)]) for a, b in pairs]
    found["locality"] = mean([float(value) for value in shared])
    found["locality_generated"] = mean([answers(a[1], b[1]) for a, b in pairs])
    return found


@pytest.mark.parametrize(("batch_size", "n_extra"), [(1, 2), (3, 5), (64, 2)])
def test_per_fact(plain: Plain, edit: Edit, tokenize: Tokenizer, batch_size: int, n_extra: int) -> None:
    """Every score of every fact, before and after, by hand; what a fact does not have is empty; scores are averages."""
    settings: dict[str, Any] = {"generate": True, "probabilities": True, "n_extra_tokens": n_extra}
    evaluation = measure_edit(plain.model, edit, FACTS, tokenize, batch_size=batch_size, **settings)
    before = [by_hand(plain, fact, None, n_extra) for fact in FACTS]
    with edit.applied_to(plain.model):
        after = [by_hand(plain, fact, old, n_extra) for fact, old in zip(FACTS, before, strict=True)]
        texts = [plain.generated(fact.prompt, fact.target, n_extra) for fact in FACTS]
        tokens = [plain.predicted(fact.prompt, fact.target) for fact in FACTS]
    table = evaluation.per_fact
    names = set(after[0]) - {"answers"}
    assert set(evaluation.scores) == {f"{name}{suffix}" for name in names for suffix in ("", "_before")}
    for suffix, rows in (("", after), ("_before", before)):
        for name in names:
            column = table[f"{name}{suffix}"][:]
            expected = [row[name] for row in rows]
            assert [value is None for value in column] == [value is None for value in expected], name
            measured = [value for value in expected if value is not None]
            assert [value for value in column if value is not None] == pytest.approx(measured, abs=1e-6), name
            assert evaluation.scores[f"{name}{suffix}"] == pytest.approx(np.mean(measured), abs=1e-6), name
            assert n_measured(FACTS, f"{name}{suffix}") == len(measured)
    assert table["fact"][:] == list(range(5))
    assert table["target"][:] == [fact.target for fact in FACTS]
    assert table["ground_truth"][:] == [fact.ground_truth for fact in FACTS]
    assert table["generated"][:] == texts
    assert table["predicted"][:] == [plain.decode(ids) for ids in tokens]
    assert table["generated"][:] != table["generated_before"][:], "the edit does something"
    for name in ("edit_success", "portability", "locality", "efficacy", "neighborhood"):
        values = [row[name] for row in before + after if row[name] is not None]
        assert min(values) < max(values), f"{name} is worth comparing"


def test_probes(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """All prompts of a fact with each of its answers, the edited one first, with their probabilities."""
    evaluation = measure_edit(plain.model, edit, FACTS, tokenize, batch_size=4, probabilities=True)
    probes = evaluation.per_fact["probes"][0]
    assert [(probe["kind"], probe["prompt"], probe["expected"]) for probe in probes] == [
        ("edit", "The country of Lyon is", "Italy"),
        ("rephrase", "Lyon is a city in", "Italy"),
        ("rephrase", "Lyon, a city in the country of", "Italy"),
        ("portability", "The city in Italy is", "Lyon"),
        ("portability", "Lyon, Italy is in", "Italy and Japan"),
        ("unrelated", "Osaka is a city in", "Japan"),
        ("neighborhood", "Osaka is a city in", "Italy"),
        ("neighborhood", "The country of Perth is", "Australia and Japan"),
        ("neighborhood", "The country of Perth is", "Italy"),
        ("edit", "The country of Lyon is", "France"),
        ("rephrase", "Lyon is a city in", "France"),
        ("rephrase", "Lyon, a city in the country of", "France"),
    ]
    pairs = [(probe["prompt"], probe["expected"]) for probe in probes]
    before = [plain.probability(*pair) for pair in pairs]
    with edit.applied_to(plain.model):
        after = [plain.probability(*pair) for pair in pairs]
    assert [probe["probability_before"] for probe in probes] == pytest.approx(before, rel=1e-4)
    assert [probe["probability"] for probe in probes] == pytest.approx(after, rel=1e-4)
    assert {probe["generated"] for probe in probes} == {None}, "nothing was generated"


def test_parquet(plain: Plain, edit: Edit, tokenize: Tokenizer, tmp_path: Path) -> None:
    """The table survives a file, columns in which nothing stands too."""
    facts = [Fact("The country of Lyon is", "Italy"), Fact("Turin is in", "Ghana", rephrases=("Turin is",))]
    evaluation = measure_edit(plain.model, edit, facts, tokenize, batch_size=4)
    evaluation.per_fact.to_parquet(tmp_path / "facts.parquet")
    again = datasets.Dataset.from_parquet(str(tmp_path / "facts.parquet"), cache_dir=str(tmp_path))
    assert again[:] == evaluation.per_fact[:]
    assert again.features["generated"].dtype == "string"
    assert again.features["generalization"].dtype == "float64"
    assert again["generalization"][0] is None


def test_scores_alone(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """Without resamples the same numbers; without `generate` and `probabilities`, only the teacher-forced ones."""
    weights = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    scores = measure_edit(plain.model, edit, FACTS, tokenize, batch_size=4, n_resamples=0).scores
    names = ("edit_success", "generalization", "locality", "unrelated_accuracy", "portability")
    assert set(scores) == {f"{name}{suffix}" for name in names for suffix in ("", "_before")}
    everything = measure_edit(plain.model, edit, FACTS, tokenize, batch_size=4, generate=True, probabilities=True)
    assert {name: everything.scores[name] for name in scores} == scores
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_an_edit_in_force_is_refused_at_once(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """Before the model is asked anything: "before" would be after."""
    calls: list[Any] = []
    handle = plain.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with edit.applied_to(plain.model), pytest.raises(EditStateError, match=r"Call undo\(\) first"):
        measure_edit(plain.model, edit, FACTS, tokenize, batch_size=4)
    handle.remove()
    assert not calls


def test_intervals(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """One interval a score, around it; the seed decides, and nothing global is drawn from."""
    settings: dict[str, Any] = {"batch_size": 8, "probabilities": True}
    state = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    found = measure_edit(plain.model, edit, FACTS, tokenize, **settings)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index,union-attr]
    assert found.intervals.keys() == found.scores.keys()
    for name, (low, high) in found.intervals.items():
        assert low - 1e-12 <= found.scores[name] <= high + 1e-12
    assert found.intervals["locality_before"] == (1, 1)
    assert measure_edit(plain.model, edit, FACTS, tokenize, **settings).intervals == found.intervals
    assert measure_edit(plain.model, edit, FACTS, tokenize, n_resamples=0, **settings).intervals == {}
    name = "efficacy_magnitude"
    values = [value for value in found.per_fact[name] if value is not None]
    assert found.intervals[name] == pytest.approx((min(values), max(values)))  # 2 facts: 1 of 4 draws is one's alone


def test_answers_before_are_asked_once(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """With what the unedited model answered, of these facts and others, the scores are the same."""
    settings: dict[str, Any] = {"batch_size": 4, "generate": True, "probabilities": True}
    before = answer_facts(plain.model, FACTS, tokenize, **settings)
    for facts in (FACTS, FACTS[:1]):
        found = measure_edit(plain.model, edit, facts, tokenize, before=before, **settings)
        # To the rounding of the batches that the prompts before the edit ran in.
        assert found.scores == pytest.approx(measure_edit(plain.model, edit, facts, tokenize, **settings).scores)
    silent = {pair: replace(answer, text=None) for pair, answer in before.items()}
    with pytest.raises(ValueError, match=r"before the edit leave out \d+ prompts, .* for the same facts and settings"):
        measure_edit(plain.model, edit, FACTS, tokenize, before=silent, **settings)
    before.pop((FACTS[0].prompt, FACTS[0].target))
    with pytest.raises(ValueError, match=r"before the edit leave out 1 prompts, the first of them .* answer_facts"):
        measure_edit(plain.model, edit, FACTS, tokenize, before=before, **settings)


def test_generation_needs_a_model_that_generates(edit: Edit, tokenize: Tokenizer) -> None:
    """A model without a language model's head is refused before it is asked anything."""
    config = BertConfig(vocab_size=360, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match=r"BertModel does not generate text\. Measure it with generate=False"):
        measure_edit(BertModel(config), edit, FACTS, tokenize, batch_size=4, generate=True)


# Other kinds of models


def test_an_encoder_decoder(make_tokenizer: Build) -> None:
    """Probabilities, predictions and free answers are the decoder's, by plain forward passes without padding."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 360, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    tokens: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes, **tokens, initializer_factor=5.0)).eval()
    tokenizer = make_tokenizer()
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen", task_type="SEQ_2_SEQ_LM"), decoder_start_token_id=0)
    edit = Edit({"decoder.block.1.layer.2.DenseReluDense.wo": torch.randn(48, 32)})
    facts = [Fact("The country of Lyon is", "Italy and Japan", ground_truth="France"), Fact("Turin", "Ghana")]
    settings: dict[str, Any] = {"generate": True, "probabilities": True}
    found = measure_edit(model, edit, facts, tokenize, batch_size=8, **settings).per_fact

    @torch.no_grad()
    def logits(prompt: str, decoder_ids: list[int]) -> torch.Tensor:
        read = {"input_ids": torch.tensor([tokenizer(prompt)["input_ids"]])}
        row: torch.Tensor = model(**read, decoder_input_ids=torch.tensor([[0, *decoder_ids]])).logits[0]
        return row

    def forced(fact: Fact, answer: str) -> tuple[float, str]:
        ids = tokenizer(answer)["input_ids"]
        rows = logits(fact.prompt, ids[:-1])
        likely = rows.double().log_softmax(-1)[range(len(ids)), ids].sum().exp()
        return float(likely), tokenizer.decode(rows.argmax(-1))

    def free(fact: Fact) -> str:
        ids: list[int] = []
        while len(ids) < len(tokenizer(fact.target)["input_ids"]) + 2 and 2 not in ids:
            ids.append(int(logits(fact.prompt, ids)[-1].argmax()))
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    before = [(*forced(fact, fact.target), free(fact)) for fact in facts]
    with edit.applied_to(model):
        after = [(*forced(fact, fact.target), free(fact)) for fact in facts]
        truth, _ = forced(facts[0], "France")
    for suffix, rows in (("_before", before), ("", after)):
        assert found[f"predicted{suffix}"][:] == [row[1] for row in rows]
        assert found[f"generated{suffix}"][:] == [row[2] for row in rows]
        likely = [probes[0][f"probability{suffix}"] for probes in found["probes"]]
        assert likely == pytest.approx([row[0] for row in rows], rel=1e-4)
    assert found["efficacy_magnitude"][0] == pytest.approx(after[0][0] - truth, rel=1e-4)
    assert found["generated"][:] != found["generated_before"][:]


def test_a_classifier(make_tokenizer: Build) -> None:
    """The answer is a label, its probability that of the class."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    labels: dict[str, Any] = {"id2label": {0: "SUPPORTS", 1: "REFUTES"}, "label2id": {"SUPPORTS": 0, "REFUTES": 1}}
    config = BertConfig(vocab_size=360, intermediate_size=48, initializer_range=0.5, **sizes, **labels)
    model: Any = BertForSequenceClassification(config).eval()
    tokenizer = make_tokenizer()
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen", task_type="SEQ_CLS"), classes=Classes.of(model))
    edit = Edit({"bert.encoder.layer.1.output.dense": torch.randn(48, 32)})
    prompts = (
        "Lyon is a city in Italy.",
        "Perth is a city in Australia.",
        "Fez is a city.",
        "Oslo is a city in Japan.",
    )
    facts = [Fact(prompt, "REFUTES", ground_truth="SUPPORTS") for prompt in prompts]
    found = measure_edit(model, edit, facts, tokenize, batch_size=3, probabilities=True)

    @torch.no_grad()
    def classes(prompt: str) -> torch.Tensor:
        row: torch.Tensor = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0].softmax(-1)
        return row

    before = torch.stack([classes(prompt) for prompt in prompts])
    with edit.applied_to(model):
        after = torch.stack([classes(prompt) for prompt in prompts])
    for suffix, likely in (("_before", before), ("", after)):
        names = [config.id2label[int(i)] for i in likely.argmax(-1)]
        assert found.per_fact[f"predicted{suffix}"][:] == names
        assert found.scores[f"edit_success{suffix}"] == pytest.approx(np.mean([name == "REFUTES" for name in names]))
        magnitude = float((likely[:, 1] - likely[:, 0]).mean())
        assert found.scores[f"efficacy_magnitude{suffix}"] == pytest.approx(magnitude, abs=1e-5)
    assert found.per_fact["predicted"][:] != found.per_fact["predicted_before"][:]


def test_an_answer_does_not_compete_with_itself(plain: Plain, edit: Edit, tokenize: Tokenizer) -> None:
    """Spaces around it, which are not tokenised, make no other answer; those within it do."""
    neighborhood = (("Osaka is a city in", " Italy"), ("Turin is in", "Ghana"))
    facts = [
        Fact(
            "The country of Lyon is",
            "Italy",
            rephrases=("Lyon is in",),
            ground_truth=" Italy",
            neighborhood=neighborhood,
        ),
        Fact("The country of Turin is", "Ghana ", ground_truth="Ghana"),
    ]
    found = measure_edit(plain.model, edit, facts, tokenize, batch_size=4, probabilities=True)
    assert "efficacy" not in found.scores and "paraphrase" not in found.scores
    assert found.per_fact["neighborhood"][1] is None
    with edit.applied_to(plain.model):
        odds = [plain.probability("Turin is in", answer) for answer in ("Ghana", "Italy")]
    assert found.per_fact["neighborhood_magnitude"][0] == pytest.approx(odds[0] - odds[1], abs=1e-6)
    assert [n_measured(facts, name) for name in ("efficacy", "neighborhood")] == [0, 1]


def test_a_class_does_not_compete_with_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """By its label in any case, or by its index."""
    kind = KINDS["bert"]
    model: Any = kind.build()
    classes = Classes.of(model)
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen", task_type="SEQ_CLS"), classes=classes)
    edit = Edit({kind.names[0]: torch.randn(48, 32)})
    facts = [
        Fact("Lyon is a city.", "0", ground_truth="refutes", neighborhood=(("Fez is a city.", "REFUTES"),)),
        Fact("Turin is a city.", "Refutes", ground_truth="SUPPORTS"),
    ]
    found = measure_edit(model, edit, facts, tokenize, batch_size=4, probabilities=True)
    assert found.per_fact["efficacy"][0] is None and found.per_fact["efficacy"][1] is not None
    assert "neighborhood" not in found.scores
    assert [n_measured(facts, name, classes) for name in ("efficacy", "neighborhood")] == [1, 0]


# The bootstrap, where its distribution is known


def test_bootstrap_of_shares_is_binomial() -> None:
    """Averages of 0 and 1 over n resampled facts follow Binomial(n, share) / n; also for facts that lack a metric."""
    n, right = 60, (45, 6)
    values = np.zeros((n + 20, 2))
    for column, k in enumerate(right):
        values[:k, column] = 1
    measured = np.zeros_like(values, dtype=bool)
    measured[:n] = True

    def quantile(level: float, share: float) -> float:
        masses = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        return int(np.searchsorted(np.cumsum(masses), level)) / n

    plain = bootstrap_intervals(values[:n], measured[:n], n_resamples=20_000)
    for (low, high), k in zip(plain, right, strict=True):
        # Within one fact: the quantile of a sample may fall on a neighbouring step.
        assert low == pytest.approx(quantile(0.025, k / n), abs=1.01 / n)
        assert high == pytest.approx(quantile(0.975, k / n), abs=1.01 / n)
        assert low < k / n < high
    # 20 more facts that were not measured, whose values must not matter.
    values[n:] = 7
    assert bootstrap_intervals(values, measured, n_resamples=20_000) == pytest.approx(plain, abs=1.5 / n)


def test_bootstrap_by_enumeration() -> None:
    """All 4⁴ equally likely resamples of four facts."""
    values = np.array([0.1, 0.2, 0.45, 1.0])
    means = np.array([np.mean(drawn) for drawn in product(values, repeat=4)])
    for level in (0.5, 0.8):
        (found,) = bootstrap_intervals(values[:, None], np.ones((4, 1), bool), n_resamples=200_000, level=level)
        assert found == pytest.approx(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]), abs=0.02)


def test_bootstrap_with_weights() -> None:
    """All 3³ resamples of three texts that weigh as much as they have tokens."""
    values, weights = np.array([1.0, 2.0, 4.0]), np.array([5.0, 1.0, 2.0])
    drawn = [list(rows) for rows in product(range(3), repeat=3)]
    means = np.array([np.average(values[rows], weights=weights[rows]) for rows in drawn])
    (found,) = bootstrap_intervals(values[:, None], weights[:, None], n_resamples=100_000, level=0.6)
    assert found == pytest.approx(np.quantile(means, [0.2, 0.8]), abs=0.02)


def test_bootstrap_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, and the bound does not change what is estimated."""
    values = np.random.default_rng(3).random((50, 3))
    whole = bootstrap_intervals(values, np.ones_like(values, bool), n_resamples=5_000)
    monkeypatch.setattr("hf_malmen.scoring._DRAWS", 120)
    blocks = bootstrap_intervals(values, np.ones_like(values, bool), n_resamples=5_000)
    assert blocks == pytest.approx(whole, abs=0.01)
    monkeypatch.setattr("hf_malmen.scoring._DRAWS", 1)  # less than one resample takes
    assert bootstrap_intervals(values, np.ones_like(values, bool), n_resamples=10).shape == (3, 2)


def test_a_metric_that_few_facts_have() -> None:
    """Resamples without the one fact that has it say nothing, rather than 0."""
    values, measured = np.array([[0.5, 0.3], [0.7, 9]]), np.array([[True, True], [True, False]])
    assert bootstrap_intervals(values, measured)[1] == pytest.approx([0.3, 0.3])
    by_seed = [bootstrap_intervals(values, measured, n_resamples=1, seed=seed)[1].tolist() for seed in range(20)]
    assert {str(ends) for ends in by_seed} == {"[0.3, 0.3]", "[nan, nan]"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_resamples": 0}, "n_resamples is 0 and level 0.95; expected at least 1"),
        ({"level": 1.0}, "level 1.0; expected at least 1, and a number between 0 and 1"),
        ({"measured": np.zeros((2, 1), bool)}, "measured of no fact"),
    ],
)
def test_bootstrap_refuses(settings: dict[str, Any], message: str) -> None:
    """What cannot be estimated."""
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(np.ones((2, 1)), **{"measured": np.ones((2, 1), bool)} | settings)
