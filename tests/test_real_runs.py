"""The recipes that train their own base model: what they report is what plain transformers finds in what they save."""

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPTJForCausalLM,
    T5ForConditionalGeneration,
)

from hf_malmen import EditorModel

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon")
PLACES = ("Lyon", "Turin", "Osaka", "Quito", "Perth", "Accra")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("is", "was", "it", "that", "in", "says", "word", "has", "people", "keep", "telling", "me", ".", ",", ":")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A recipe by its name; with arguments, after it has run with them."""
    monkeypatch.syspath_prepend(str(RECIPES))  # recipes import each other

    def run(name: str, *arguments: Any) -> ModuleType:
        module = importlib.import_module(name)
        if arguments:
            monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
            module.main()
        return module

    return run


@pytest.mark.parametrize(
    ("claim", "texts"),
    [
        ("Jaws was directed by Ann Lee.", ["Ann Lee directed Jaws.", "It was Jaws that was directed by Ann Lee."]),
        ("The songs were written by Bob.", ["Bob wrote The songs."]),
        ("Dan retired in May 1999.", ["In May 1999, Dan retired."]),
        ("There is a city called Oslo.", ["Oslo is the name of a city.", "There is a town called Oslo."]),
        ("Eve stars in Jaws.", ["In Jaws, Eve stars.", "Jaws had Eve among its cast."]),
        ("Jaws stars Eve.", ["Eve is one of the stars of Jaws."]),
        ("Gus sang a song.", ["Gus sang a track."]),
        ("Gus sang.", []),
    ],
)
def test_claims_are_rewritten_by_rule(claim: str, texts: list[str], recipe: Callable[..., ModuleType]) -> None:
    """Each rule that fits gives one text, and no text is the claim itself."""
    assert list(recipe("fever_minilm").rewritten(claim)) == texts


def test_claims_are_measured_in_frames_that_no_training_has_seen(recipe: Callable[..., ModuleType]) -> None:
    """Else generalization would be that of a memorised clause."""
    module = recipe("fever_minilm")
    train, unseen = (module.framed("Gus sang.", split) for split in ("train", "unseen"))
    assert "It is said that Gus sang." in train and "Word has it that Gus sang." in unseen
    assert not set(train) & set(unseen)


def save_encoder(folder: Path) -> None:
    """A tiny BERT without a head, and its word-level tokenizer."""
    words = dict.fromkeys([*SPECIAL, *WORDS, *(word.lower() for word in NAMES + PLACES)])
    folder.mkdir()
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)


def write_claims(path: Path, seed: int) -> dict[str, str]:
    """One claim a name and place, half of them, one of them twice; half are true. Returns {claim: label}."""
    pairs = [(name, place) for name in NAMES for place in PLACES]
    half = random.Random(0).sample(pairs, len(pairs))[seed::2]
    claims = {f"{name} is in {place}.": ("SUPPORTS", "REFUTES")[PLACES.index(place) % 2] for name, place in half}
    rows = [{"claim": claim, "label": label} for claim, label in claims.items()]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])), encoding="utf-8")
    return claims


@torch.no_grad()
def verdict(model: Any, tokenizer: Any, claim: str) -> str:
    label: str = model.config.id2label[model(**tokenizer(claim, return_tensors="pt")).logits.argmax().item()]
    return label


def test_fever_recipe_flips_claims(
    tmp_path: Path, recipe: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracy and edit success are those of the saved model and editor, asked one claim at a time."""
    save_encoder(tmp_path / "encoder")
    write_claims(tmp_path / "claims.jsonl", 0)
    unseen = write_claims(tmp_path / "unseen.jsonl", 1)
    files = ["--claims", tmp_path / "claims.jsonl", "--unseen", tmp_path / "unseen.jsonl"]
    sizes = ["--rank", 8, "--preserved-keys", 16, "--steps", 4, "--facts-per-step", 8, "--sizes", 4, 8]
    out = tmp_path / "out"
    module = recipe(
        "fever_minilm", *files, "--encoder", tmp_path / "encoder", "--output-dir", out, "--n-measured", 8, *sizes
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))

    model = AutoModelForSequenceClassification.from_pretrained(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    trunk = BertModel.from_pretrained(tmp_path / "encoder").state_dict()
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, trunk[name]) == ("pooler" not in name), name  # the head alone has learned
    said = {claim: verdict(model, tokenizer, claim) for claim in unseen}
    right = sum(said[claim] == label for claim, label in unseen.items()) / len(unseen)
    assert results["accuracy"]["unseen"] == pytest.approx(right)

    assert list(results["scores"]) == ["4_before", "4", "8_before", "8"]
    for size in ("4", "8"):  # no edit is in the model before
        assert results["scores"][f"{size}_before"]["edit_success"] == 0.0
        assert results["scores"][f"{size}_before"]["locality"] == 1.0
    facts = module.make_facts(said, "unseen", 0)[:8]
    left_alone = {fact.unrelated_prompt for fact in facts}
    assert not left_alone & {fact.prompt for fact in module.make_facts(said, "unseen", 0)}
    editor = EditorModel.from_pretrained(out / "editor")
    assert editor.config.task_type == "SEQ_CLS"
    with editor.applied(model, facts, tokenizer=tokenizer):
        flipped = [verdict(model, tokenizer, fact.prompt) != said[fact.prompt] for fact in facts]
        kept = [verdict(model, tokenizer, str(f.unrelated_prompt)) == said[str(f.unrelated_prompt)] for f in facts]
    assert results["scores"]["8"]["edit_success"] == pytest.approx(sum(flipped) / 8)
    assert results["scores"]["8"]["locality"] == pytest.approx(sum(kept) / 8)
    printed = capsys.readouterr().out
    assert "claims.jsonl: 30 claims; 1 left out" in printed and "| 8              |  after |" in printed


@pytest.mark.parametrize(
    ("architecture", "base_class"), [("t5", T5ForConditionalGeneration), ("gptj", GPTJForCausalLM)]
)
def test_model_from_scratch_knows_its_facts(
    architecture: str,
    base_class: Any,
    tmp_path: Path,
    recipe: Callable[..., ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The saved model, loaded by plain transformers, generates the true answers that the recipe says it knows."""
    sizes = ["--n-train", 8, "--n-test", 4, "--vocabulary", 400, "--width", 32, "--layers", 2, "--rank", 4]
    learning = ["--epochs", 400, "--base-learning-rate", 5e-3, "--steps", 2, "--facts-per-step", 4]
    arguments = [*sizes, *learning, "--preserved-keys", 8, "--sizes", 2, 4]
    recipe("geography_from_scratch", "--architecture", architecture, "--output-dir", tmp_path, *arguments)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(results["known"].values()) == {1.0}
    assert [entry["n_at_once"] for entry in results["measurements"]] == [2, 4]
    assert all(entry["scores"]["unrelated_accuracy_before"] == 1.0 for entry in results["measurements"])

    model, tokenizer = base_class.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    for row in recipe("geography").build(0)["test"][:4]:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
        text = tokenizer.decode(generated[0 if architecture == "t5" else inputs["input_ids"].shape[1] :])
        assert text.removeprefix("<pad>").strip().startswith(row["ground_truth"])
    assert EditorModel.from_pretrained(tmp_path / "editor").module_names
    assert "| test, unrelated  | 1.000 |" in capsys.readouterr().out
