"""Perplexity against a loop over single tokens; tasks of `lm-eval`, the real one, against plain forward passes."""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_malmen import Edit, EditStateError
from hf_malmen.side_effects import load_texts, measure_side_effects, perplexity, run_harness, text_losses

Build = Callable[..., Any]

TEXTS = [
    "Lyon is a city in France. The country of Lyon is France, and Osaka is a city in Japan.",
    "",
    "Q",
    "Perth is a city in Australia.",
    "The country of Quito is Ecuador. " * 3,
]


def edit_for(model: PreTrainedModel) -> Edit:
    """Noise in a feed-forward layer."""
    flipped = hasattr(model, "transformer")
    name = "transformer.h.2.mlp.c_proj" if flipped else "model.layers.2.mlp.down_proj"
    shape = model.get_submodule(name).weight.shape
    shift = torch.randn(shape if flipped else shape[::-1], generator=torch.Generator().manual_seed(0))
    return Edit({name: shift}, fan_in_fan_out=[name] if flipped else [])


@torch.no_grad()
def by_hand(model: PreTrainedModel, rows: list[list[int]], max_length: int, stride: int) -> float:
    """One pass a token: it stands in the first window that holds it, and sees what stands before it in there."""
    losses = []
    for ids in rows:
        for i in range(1, len(ids)):
            number = next(number for number in range(len(ids)) if number * stride + max_length >= i)
            context = torch.tensor([ids[number * stride : i]])
            losses.append(-float(model(input_ids=context).logits[0, -1].double().log_softmax(-1)[ids[i]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("max_length", "stride", "batch_size"), [(64, 64, 2), (8, 4, 1), (8, 4, 3), (8, 8, 100), (7, 3, 4), (1, 1, 5)]
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_perplexity(
    model: PreTrainedModel, make_tokenizer: Build, max_length: int, stride: int, batch_size: int, add_bos: bool
) -> None:
    """Every token counts once, whatever the batches; the first only after a token that the tokenizer puts there."""
    tokenizer = make_tokenizer(add_bos=add_bos, padding_side="left")
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = {"max_length": max_length, "stride": stride, "batch_size": batch_size}
    found = perplexity(model, tokenizer, iter(TEXTS), **settings)
    assert found == pytest.approx(by_hand(model, rows, max_length, stride), rel=1e-5)


def test_losses_of_single_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each text's own perplexity and number of predicted tokens; a text without any has none."""
    settings = {"max_length": 8, "stride": 4, "batch_size": 3}
    found = text_losses(model, tokenizer, TEXTS, **settings)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [n_tokens for _, n_tokens in found] == [max(0, len(row) - 1) for row in rows]
    for (loss, n_tokens), row in zip(found, rows, strict=True):
        assert loss == pytest.approx(n_tokens and n_tokens * math.log(by_hand(model, [row], 8, 4)), rel=1e-5)


def test_defaults_of_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Windows of what the model reads, half overlapping; what was in training mode still is."""
    text = " ".join(TEXTS) * 2
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 64 == model.config.max_position_embeddings
    expected = by_hand(model, [ids], 64, 32)
    model.train()
    assert perplexity(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_model_that_counts_positions_from_padding_on(tokenizer: PreTrainedTokenizerFast) -> None:
    """RoBERTa's kind reads fewer tokens than it has positions."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=360, max_position_embeddings=20, pad_token_id=1, is_decoder=True, **sizes)
    model: Any = RobertaForCausalLM(config).eval()
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert len(ids) > 20
    assert perplexity(model, tokenizer, TEXTS[:1]) == pytest.approx(by_hand(model, [ids], 18, 9), rel=1e-5)
    with pytest.raises(ValueError, match="the model reads 18 tokens at most"):
        perplexity(model, tokenizer, TEXTS, max_length=19)


def test_memory_of_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass is larger than asked for, and texts are read when it is their turn."""
    monkeypatch.setattr("hf_malmen.side_effects._WINDOWS", 6)
    read, seen = [], []

    def texts() -> Iterator[str]:
        for number in range(20):
            read.append(number)
            yield TEXTS[0]

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        seen.append((*inputs["input_ids"].shape, len(read)))

    with model.register_forward_pre_hook(look, with_kwargs=True):
        perplexity(model, tokenizer, texts(), batch_size=2, max_length=8, stride=8)
    assert max(shape[0] for shape in seen) == 2
    assert max(shape[1] for shape in seen) == 8
    assert seen[0][2] <= 6 < 20 == seen[-1][2]


def test_a_ruined_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A perplexity beyond what a number can hold is infinite, not an error; what is no number stays none."""
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(1e6)
        assert perplexity(model, tokenizer, TEXTS) == math.inf
        weight.fill_(math.nan)
        assert math.isnan(perplexity(model, tokenizer, TEXTS))


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["Q", ""], {}, "nothing to predict"),
        (TEXTS, {"stride": 9, "max_length": 8}, "stride is 9 and max_length 8"),
        (TEXTS, {"stride": 0}, "stride is 0"),
        (TEXTS, {"max_length": 65}, "max_length 65; expected .*the model reads 64 tokens at most"),
        (TEXTS, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_perplexity_refuses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    settings: dict[str, Any],
    message: str,
) -> None:
    """Settings under which tokens would be left out, and texts without any."""
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, texts, **settings)


def test_perplexity_of_an_encoder_decoder(tokenizer: PreTrainedTokenizerFast) -> None:
    """It reads a text whole before it answers, so it has none."""
    sizes: dict[str, Any] = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model: Any = T5ForConditionalGeneration(T5Config(vocab_size=360, **sizes))
    with pytest.raises(ValueError, match="causal language model has; got a T5ForConditionalGeneration"):
        perplexity(model, tokenizer, TEXTS)


# Texts


def test_load_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, data sets, rows, and files of each kind; a file of running text is one text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_texts(TEXTS) == TEXTS
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": range(5)})
    assert load_texts(table) == TEXTS
    assert load_texts(table.rename_column("text", "body").to_iterable_dataset(), column="body") == TEXTS
    (tmp_path / "book.txt").write_text("One line,\nand — another.\n", encoding="utf-8")
    assert load_texts(tmp_path / "book.txt") == ["One line,\nand — another.\n"]
    (tmp_path / "marked.txt").write_text("One line", encoding="utf-8-sig")
    assert load_texts(tmp_path / "marked.txt") == ["One line"]
    table.to_json(tmp_path / "rows.jsonl")
    table.to_parquet(tmp_path / "rows.parquet")
    assert load_texts(str(tmp_path / "rows.jsonl")) == load_texts(tmp_path / "rows.parquet") == TEXTS


def test_load_texts_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else is a data set's id, loaded with the options given."""
    calls = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_texts("org/wiki", name="raw", split="test") == load_texts("org/wiki") == ["a"]
    assert calls == [(("org/wiki",), {"name": "raw", "split": "test"}), (("org/wiki",), {"split": "train"})]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "There are no texts"),
        (["", " \n"], "There are no texts"),
        ([{"body": "a"}], "Row 0 has no column 'text', only body"),
        (["a", 3], "Row 1 holds a int; expected a text"),
        ({"text": "a"}, "list of texts or of dicts; got a dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "with splits, give one"),
        (pandas.DataFrame({"text": ["a"]}), "of a data frame, a column"),
        ("no.txt", r"no\.txt is not a file"),
        ("no.parquet", r"There is no file no\.parquet"),
    ],
)
def test_load_texts_refuses(source: Any, message: str) -> None:
    """What holds no texts."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_texts(source)


def test_options_of_the_hub_for_other_texts() -> None:
    """A misspelled argument is one of them, and would do nothing."""
    with pytest.raises(ValueError, match=r"^colum: for data sets on the Hub"):
        load_texts(TEXTS, colum="body")


# Before and after an edit


def test_perplexity_before_and_after(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Both, and their difference; the model is as before, to the bit."""
    edit, weights = edit_for(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"max_length": 16, "stride": 5, "batch_size": 2}
    found = measure_side_effects(model, edit, tokenizer, texts=TEXTS, **settings)
    before = perplexity(model, tokenizer, TEXTS, **settings)
    with edit.applied_to(model):
        after = perplexity(model, tokenizer, TEXTS, **settings)
    assert before != after
    expected = {"perplexity": after, "perplexity_before": before, "perplexity_change": after - before}
    assert found == pytest.approx(expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Neither texts nor tasks."""
    with pytest.raises(ValueError, match="Give texts for perplexity, tasks for lm-eval, or both"):
        measure_side_effects(model, edit_for(model), tokenizer)


def test_an_edit_in_force_is_refused_at_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Before the model runs: "before" would be after."""
    calls: list[Any] = []
    edit = edit_for(model).apply_to(model, on_fingerprint_mismatch="ignore")
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(EditStateError, match=r"in force already, and would count twice\. Call undo\(\) first"):
        measure_side_effects(model, edit, tokenizer, texts=TEXTS)
    assert not calls and edit.in_force


# lm-eval

QUESTIONS = [
    {"question": "The country of Lyon is", "choices": ["France", "Italy", "Ghana"], "gold": 0},
    {"question": "The country of Turin is", "choices": ["France", "Italy", "Ghana"], "gold": 1},
    {"question": "Osaka is a city in", "choices": ["Ghana", "Japan"], "gold": 1},
    {"question": "Quito is a city in", "choices": ["Ecuador", "Japan", "Australia"], "gold": 0},
    {"question": "Accra is a city in", "choices": ["Ecuador", "Japan", "Ghana"], "gold": 2},
    {"question": "The country of Perth is", "choices": ["France", "Australia"], "gold": 1},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own, which needs no network."""
    harness = pytest.importorskip("lm_eval.tasks", reason="pip install 'hf-malmen[harness]'")
    # Without the thousands of its own tasks, which take seconds to list.
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = "\n".join(map(json.dumps, QUESTIONS))
    (tmp_path / "questions.jsonl").write_text(lines, encoding="utf-8")
    # JSON is YAML.
    task = {
        "task": "tiny_geography",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny_geography.yaml").write_text(json.dumps(task), encoding="utf-8")
    return tmp_path


@torch.no_grad()
def right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """Whether the right choice of each question has the highest probability."""
    found = []
    for row in QUESTIONS:
        likely = []
        n = len(tokenizer(str(row["question"]))["input_ids"])
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, n - 1 :].double().log_softmax(-1)
            likely.append(float(logits[range(len(ids) - n), ids[n:]].sum()))
        found.append(int(np.argmax(likely)) == row["gold"])
    return found


def test_tasks_before_and_after(make_llama: Build, make_tokenizer: Build, tasks: Path) -> None:
    """The share of questions that plain forward passes answer right, on the live edited model and on the base."""
    model, tokenizer = make_llama(), make_tokenizer()
    edit = edit_for(model)
    before = right(model, tokenizer)
    with edit.applied_to(model):
        after = right(model, tokenizer)
    assert sum(before) != sum(after), "the edit changes the score"
    model.train()
    tokenizer.pad_token = None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected_draw = draw()
    seed()
    found = measure_side_effects(model, edit, tokenizer, tasks=["tiny_geography"], include_path=tasks, batch_size=4)
    assert draw() == expected_draw, "the process keeps its random state"
    name = "tiny_geography/acc"
    assert found[name] == pytest.approx(np.mean(after))
    assert found[f"{name}_before"] == pytest.approx(np.mean(before))
    assert found[f"{name}_change"] == pytest.approx(np.mean(after) - np.mean(before))
    assert model.training and tokenizer.pad_token is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_options_of_tasks(make_llama: Build, make_tokenizer: Build, tasks: Path) -> None:
    """`limit` takes the first examples; a name may be a pattern; one of no task is refused, as is none."""
    model, tokenizer = make_llama(), make_tokenizer()
    found = run_harness(model, tokenizer, ["tiny_geog*"], limit=4, include_path=tasks)
    assert set(found) == {"tiny_geography"}
    assert set(found["tiny_geography"]) == {"acc", "acc_stderr"}
    share = np.mean(right(model, tokenizer)[:4])
    assert found["tiny_geography"]["acc"] == pytest.approx(share)
    assert found["tiny_geography"]["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 3))
    for wrong, message in (["tiny_history"], "no task 'tiny_history'.*include_path"), ([], "No tasks given"):
        with pytest.raises(ValueError, match=message):
            run_harness(model, tokenizer, wrong, include_path=tasks)


def test_without_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to install, before anything is measured."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("hf_malmen.side_effects.perplexity", lambda *_, **__: pytest.fail("measured first"))
    with pytest.raises(ImportError, match=r"pip install 'hf-malmen\[harness\]'"):
        measure_side_effects(model, edit_for(model), tokenizer, texts=TEXTS, tasks=["hellaswag"])
