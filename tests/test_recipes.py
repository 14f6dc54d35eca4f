"""The recipes run: the demo end to end on the real model with very little training, and the YAML runs load."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_malmen import EditorConfig, EditorTrainingArguments
from hf_malmen.recipe import load_recipe

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
    assert "Learned step size" in (tmp_path / "editor" / "README.md").read_text(encoding="utf-8")
