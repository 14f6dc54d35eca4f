"""A YAML file -> a trained editor: what `hf-malmen train --config` runs."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .configuration import EditorConfig
from .facts import load_facts
from .model_card import write_editor_card
from .modeling import EditorModel
from .training import EditorTrainer, EditorTrainingArguments

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        base_model: folder or Hub id of the language model.
        train_facts: anything `load_facts` takes by name: a file or a Hub data set.
        eval_facts: held-out facts, measured during training and for the card.
        max_eval_facts: use only the first of them, this many; None uses all.
        dtype: precision of the base model: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        editor: fields of `EditorConfig`.
        training: fields of `EditorTrainingArguments`; needs `output_dir`.
    """

    base_model: str
    train_facts: str
    eval_facts: str | None = None
    max_eval_facts: int | None = None
    dtype: str = "auto"
    editor: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and check its names.

    Args:
        path: the YAML file. Relative paths in it are relative to the current folder.
        overrides: values that replace those under `training`.

    Raises:
        ValueError: not YAML, a name that is not known, or one that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give the path of a YAML recipe, such as recipes/geography.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected {', '.join(sorted(_names(Recipe)))}.")
    _require_known(content, _names(Recipe), f"{path}")
    for name in ("base_model", "train_facts"):
        if not content.get(name):
            raise ValueError(f"{path} has no {name}.")
    for name in ("editor", "training"):
        if not isinstance(content.setdefault(name, {}), dict):
            raise ValueError(f"{path}: {name} is {content[name]!r}; expected settings with their values, or no {name}.")
    recipe = Recipe(**content)
    if recipe.dtype not in DTYPES:
        raise ValueError(f"{path}: dtype is {recipe.dtype!r}; allowed: {', '.join(DTYPES)}.")
    # PreTrainedConfig takes any keyword, so the names are compared here, where a typo would otherwise pass unseen.
    _require_known(recipe.editor, _names(EditorConfig), f"{path}, editor")
    training = {**recipe.training, **(overrides or {})}
    _require_known(training, set(inspect.signature(EditorTrainingArguments).parameters), f"{path}, training")
    if not training.get("output_dir"):
        raise ValueError(f"{path} has no training.output_dir. Add it, or pass --output-dir.")
    return dataclasses.replace(recipe, training=training)


def run_recipe(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train an editor, save it with its card, and evaluate it on the held-out facts.

    Args:
        recipe: the run.
        resume: go on from the last checkpoint in `output_dir`.

    Returns:
        The folder of the editor.

    Raises:
        ValueError: `resume` without a checkpoint; or anything that the editor, the facts or the model do not allow.
    """
    args = EditorTrainingArguments(**recipe.training)
    folder = Path(recipe.training["output_dir"])
    checkpoint = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint to resume from. Start without --resume.")
    train_facts = load_facts(recipe.train_facts)
    eval_facts = load_facts(recipe.eval_facts)[: recipe.max_eval_facts] if recipe.eval_facts else None
    config = EditorConfig(**recipe.editor)
    model = AutoModelForCausalLM.from_pretrained(recipe.base_model, dtype=recipe.dtype)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_model)
    set_seed(args.seed)
    editor = EditorModel.from_base(model, config)
    trainer = EditorTrainer(editor, model, args, train_facts, eval_facts, tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate() if eval_facts is not None else {}
    write_editor_card(
        folder,
        editor,
        metrics={name.removeprefix("eval_"): value for name, value in metrics.items()},
        training={name: value for name, value in recipe.training.items() if name != "output_dir"},
        train_facts=recipe.train_facts,
        n_train_facts=len(train_facts),
        n_facts_at_once=args.per_device_eval_batch_size,
    )
    return folder


def _names(dataclass_type: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(dataclass_type)}


def _require_known(given: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}. Known: {', '.join(sorted(known))}.")
