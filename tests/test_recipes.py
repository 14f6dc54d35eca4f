"""The recipes run: the demo end to end on the real model with very little training, and the YAML runs load."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_malmen import EditorConfig, EditorModel, EditorTrainingArguments, Fact
from hf_malmen.recipe import load_recipe, measure, run_recipe

ROOT = Path(__file__).parent.parent
YAML_RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", YAML_RECIPES, ids=lambda path: path.stem)
def test_yaml_recipe_builds_its_configuration(path: Path, tmp_path: Path) -> None:
    """Every field of a recipe is known, and its values are allowed."""
    recipe = load_recipe(path, {"output_dir": str(tmp_path)})
    config = EditorConfig(**recipe.editor)
    arguments = EditorTrainingArguments(**recipe.training)
    assert config.rank == recipe.editor["rank"]
    assert arguments.max_steps == recipe.training["max_steps"]
    assert path.read_text(encoding="utf-8").startswith("# hf-malmen train --config")


def test_unknown_names_in_a_recipe_are_refused(tmp_path: Path) -> None:
    """A typo at any level is an error that lists what is known."""
    good = {"base_model": "b", "train_facts": "f", "training": {"output_dir": "o"}}
    cases = {
        "base_modle": {**good, "base_modle": "b"},
        "rnak": {**good, "editor": {"rnak": 3}},
        "max_setps": {**good, "training": {"output_dir": "o", "max_setps": 3}},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(ValueError, match=f"unknown '{name}'. Known: "):
            load_recipe(path)


def save_inputs(folder: Path, model: Any, tokenizer: Any, facts: list[Fact]) -> dict[str, Any]:
    """A recipe of one quick step, with its inputs in `folder`."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(fact.to_dict()) for fact in facts]
    (folder / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return {
        "base_model": str(folder / "base"),
        "train_facts": str(folder / "facts.jsonl"),
        "eval_facts": str(folder / "facts.jsonl"),
        "editor": {"rank": 4, "edit_lr": 1e-3, "target_modules": ["mlp.down_proj"]},
        "training": {**training, "output_dir": str(folder / "editor"), "save_strategy": "no", "report_to": "none"},
    }


def test_card_says_what_the_saved_editor_does(
    tmp_path: Path, make_llama: Callable[..., Any], tokenizer: Any, make_facts: Callable[..., list[Fact]]
) -> None:
    """The results beside the editor are those of `evaluate` on the held-out facts, at each of `eval_sizes`."""
    model, facts = make_llama(), make_facts(8)
    content = save_inputs(tmp_path, model, tokenizer, facts)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [8, 3], "license": "mit"}), encoding="utf-8")
    folder = run_recipe(load_recipe(path))
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["measurements"]
    assert [entry["n_at_once"] for entry in results] == [8, 3]
    assert [set(entry["n_facts"].values()) for entry in results] == [{8}, {6}]  # two full sets of three
    editor = EditorModel.from_pretrained(folder)
    for entry, sets in zip(results, ([facts], [facts[:3], facts[3:6]]), strict=True):
        scores = [editor.evaluate(model, chosen, tokenizer) for chosen in sets]
        mean = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
        assert entry["scores"] == pytest.approx(mean, abs=1e-6)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.datasets is None
    assert (folder / "results.png").is_file()
    assert f"| edit success       |       3 |  {results[1]['scores']['edit_success_before']:.3f} |" in card.text

    del content["eval_facts"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert "Not measured." in (run_recipe(load_recipe(path)) / "README.md").read_text(encoding="utf-8")


def test_measure_averages_over_facts_that_have_what_is_measured() -> None:
    """Sets in which fewer facts have rephrases weigh less in generalization, and only there."""

    class FakeEditor:
        def evaluate(self, model: Any, facts: list[Fact], *_: Any, **__: Any) -> dict[str, float]:
            rephrased = sum(bool(fact.rephrases) for fact in facts)
            scores = {"edit_success": len(facts[0].prompt) / 10, "edit_success_before": 0.0}
            return scores | ({"generalization": rephrased / 2, "generalization_before": 0.0} if rephrased else {})

    facts = [Fact("p" * i, "t", rephrases=("r",) * (i in (1, 2, 3))) for i in range(1, 8)]
    pairs, one = measure(FakeEditor(), None, facts, [2, 1])  # type: ignore[arg-type]
    # Pairs (1, 2), (3, 4), (5, 6) with 2, 1 and no rephrased facts; the seventh fact is left over.
    assert pairs.scores["edit_success"] == pytest.approx((0.1 + 0.3 + 0.5) / 3)
    assert pairs.scores["generalization"] == pytest.approx((2 * 1.0 + 1 * 0.5) / 3)
    assert pairs.n_facts == {"edit_success": 6, "generalization": 3}
    assert one.scores["edit_success"] == pytest.approx(sum(range(1, 8)) / 10 / 7)
    assert one.n_facts == {"edit_success": 7, "generalization": 3}


@pytest.mark.parametrize(
    "sizes", [[], 16, [0], [-1, 4], ["16"], [1.5], [True], [4, 4]], ids=lambda sizes: json.dumps(sizes)
)
def test_bad_eval_sizes_are_refused(sizes: Any, tmp_path: Path) -> None:
    """Sizes are different whole numbers of at least 1."""
    path = tmp_path / "recipe.yaml"
    content = {"base_model": "b", "train_facts": "f", "eval_facts": "f", "training": {"output_dir": "o"}}
    path.write_text(yaml.safe_dump({**content, "eval_sizes": sizes}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"eval_sizes is {sizes!r}; expected different whole numbers")):
        load_recipe(path)


def test_eval_sizes_need_that_many_facts(
    tmp_path: Path, make_llama: Callable[..., Any], tokenizer: Any, make_facts: Callable[..., list[Fact]]
) -> None:
    """Too few held-out facts, or none, are found before anything is trained or written."""
    content = save_inputs(tmp_path, make_llama(), tokenizer, make_facts(8))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [2, 6], "max_eval_facts": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match="asks for 6 held-out facts at once, and there are 5"):
        run_recipe(load_recipe(path))
    assert not (tmp_path / "editor").exists()
    del content["eval_facts"]
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [2]}), encoding="utf-8")
    with pytest.raises(ValueError, match="has eval_sizes and no eval_facts"):
        load_recipe(path)


def test_demo_edits_smollm2_and_the_written_checkpoint_answers_alike(tmp_path: Path) -> None:
    """`recipes/demo.py` with two training steps: table, three examples, undo, checkpoint, reload in a new process."""
    command = [sys.executable, str(ROOT / "recipes" / "demo.py"), "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, "--max-steps", "2", "--sizes", "4", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for metric in ("edit success", "generalization", "locality", "unrelated accuracy"):
        for way in ("teacher-forced", "generated"):
            assert sum(line.startswith(f"| {metric}, {way} ") for line in lines) == 2
    header = next(i for i, line in enumerate(lines) if line.startswith("| prompt"))
    examples = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[header + 2 : header + 5]
    ]
    assert len(examples) == 3
    assert all(before == undone for _, _, before, _, undone in examples)
    assert "the same answers from it as from the live edited model" in lines[-1]
    assert (tmp_path / "edited-8" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "editor" / "config.json").read_text())["model_type"] == "hf_malmen"
    card = (tmp_path / "editor" / "README.md").read_text(encoding="utf-8")
    assert "Learned step size" in card and "| edit success       |       8 |" in card
    assert (tmp_path / "editor" / "results.png").is_file()
