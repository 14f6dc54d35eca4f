"""A YAML file -> a trained editor: what `hf-malmen train --config` runs."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .base_model import check_base_model, load_tokenizer
from .configuration import DEFAULT_METHODS, METHODS, EditorConfig
from .covariance import DEFAULT_N_TOKENS
from .evaluation import n_measured
from .facts import Fact, load_facts, ordinary_sentences
from .hub import cached_commit
from .model_card import EditorRun, Measurement, write_editor_card
from .modeling import DEFAULT_BATCH_SIZE, EditorModel
from .paths import lies_below_a_file
from .settings import (
    DTYPES,
    field_names,
    read_settings,
    refuse_what_is_ignored,
    require_known,
    require_text,
)
from .sharding import place
from .side_effects import load_texts
from .tables import METRIC_TITLES
from .tasks import load_base
from .training import EditorTrainer
from .training_arguments import EditorTrainingArguments


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        base_model: folder or Hub id of the base model.
        train_facts: anything `load_facts` takes by name: a file or a Hub data set. A method without training takes its
            statistics from them (`EditorModel.warm_up`), or starts without any where there are none.
        texts: anything `load_texts` takes by name, for methods that read ordinary text
            (`EditorModel.collect_covariance`). None takes the training facts, prompt and answer, for texts.
        n_tokens: how many tokens of them to read at most; None takes `collect_covariance`'s own number.
        eval_facts: held-out facts, measured during training and for the card.
        max_eval_facts: use only the first of them, this many; None uses all.
        eval_sizes: numbers of held-out facts to edit at once for the card, each at most as many as there are. None
            takes `per_device_eval_batch_size`, or all held-out facts if they are fewer.
        dtype: precision of the base model: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        license: licence of the editor for its card, as the Hub names it, such as `"apache-2.0"`; None names none.
        editor: fields of `EditorConfig`. Its `task_type` says what the base model is loaded as; None: `"CAUSAL_LM"`.
        training: fields of `EditorTrainingArguments`; needs `output_dir`.
    """

    base_model: str
    train_facts: str | None = None
    texts: str | None = None
    n_tokens: int | None = None
    eval_facts: str | None = None
    max_eval_facts: int | None = None
    eval_sizes: list[int] | None = None
    dtype: str = "auto"
    license: str | None = None
    editor: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and check its names.

    Args:
        path: the YAML file. Relative paths in it are relative to the current folder.
        overrides: values that replace those under `training`.

    Raises:
        ValueError: not YAML, a name that is not known, one that is missing, or a value that is not allowed.
    """
    content = read_settings(path, field_names(Recipe), "recipes/geography.yaml")
    if not content.get("base_model"):
        raise ValueError(f"{path} has no base_model.")
    for name in ("editor", "training"):
        if not isinstance(content.setdefault(name, {}), dict):
            raise ValueError(f"{path}: {name} is {content[name]!r}; expected settings with their values, or no {name}.")
    require_text(content, ("base_model", "train_facts", "texts", "eval_facts", "license"), f"{path}")
    require_text(content["training"], ["output_dir"], f"{path}, training")
    for name in ("n_tokens", "max_eval_facts"):
        value = content.get(name)
        if value is not None and not (type(value) is int and value >= 1):
            raise ValueError(f"{path}: {name} is {value!r}; expected a whole number of at least 1, or nothing.")
    recipe = Recipe(**content)
    task_type = str(recipe.editor.get("task_type", EditorConfig.task_type))
    method = METHODS.get(str(recipe.editor.get("method") or DEFAULT_METHODS.get(task_type)))
    if not recipe.train_facts and (method is None or method.is_trained):  # one that is unknown is refused later
        raise ValueError(f"{path} has no train_facts.")
    if method is not None and method.key_covariance == "required" and not (recipe.texts or recipe.train_facts):
        raise ValueError(f"{path} has no texts, nor train_facts to read in their place, which this method needs.")
    reads_text = method is not None and method.key_covariance is not None
    if (recipe.texts or recipe.n_tokens) and not reads_text:
        raise ValueError(f"{path} has texts or n_tokens, and its method reads no text. Remove them.")
    if recipe.dtype not in DTYPES:
        raise ValueError(f"{path}: dtype is {recipe.dtype!r}; allowed: {', '.join(DTYPES)}.")
    if recipe.eval_sizes is not None:
        _check_sizes(recipe.eval_sizes, f"{path}")
        if not recipe.eval_facts:
            raise ValueError(
                f"{path} has eval_sizes and no eval_facts to measure them on. Add some, or remove eval_sizes."
            )
    # PreTrainedConfig takes any keyword, so the names are compared here, where a typo would otherwise pass unseen.
    require_known(recipe.editor, field_names(EditorConfig), f"{path}, editor")
    training = {**recipe.training, **(overrides or {})}
    require_known(training, set(inspect.signature(EditorTrainingArguments).parameters), f"{path}, training")
    refuse_what_is_ignored(training, f"{path}, training", "--resume goes on from the last checkpoint in output_dir.")
    if not training.get("output_dir"):
        raise ValueError(f"{path} has no training.output_dir. Add it, or pass --output-dir.")
    return dataclasses.replace(recipe, training=training)


def run_recipe(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train an editor, or warm up one that needs no training; save it with its card, evaluated on the held-out facts.

    Args:
        recipe: the run.
        resume: go on from the last checkpoint in `output_dir`.

    Returns:
        The folder of the editor.

    Raises:
        ValueError: `resume` without a checkpoint, which a method without training never has; checkpoints of an earlier
            run without `resume`; or anything that the training, the editor, the facts or the model do not allow.
        ModelMismatchError: the checkpoint is of another editor.
    """
    folder = Path(recipe.training["output_dir"])
    if folder.is_file() or lies_below_a_file(folder):
        raise ValueError(f"training: output_dir is {folder}, which is a file or lies below one. Give a folder.")
    try:
        args = EditorTrainingArguments(**recipe.training)
    except (TypeError, ValueError) as error:  # of another type than expected, or not allowed
        raise ValueError(f"training: {error}") from None
    config = EditorConfig(**recipe.editor)
    checkpoint = _checkpoint_of(folder, resume, config)
    train_facts = load_facts(recipe.train_facts) if recipe.train_facts else []
    eval_facts = load_facts(recipe.eval_facts)[: recipe.max_eval_facts] if recipe.eval_facts else []
    sizes = recipe.eval_sizes or [min(args.per_device_eval_batch_size, len(eval_facts))]
    if recipe.eval_sizes and max(sizes) > len(eval_facts):
        raise ValueError(
            f"eval_sizes asks for {max(sizes)} held-out facts at once, and there are {len(eval_facts)}. Give more "
            "eval_facts, raise max_eval_facts, or lower the size."
        )
    hub = {"revision": config.base_model_revision or "main"}
    check_base_model(recipe.base_model, **hub)
    model = load_base(recipe.base_model, config.task_type or "CAUSAL_LM", dtype=recipe.dtype, **hub)
    tokenizer = load_tokenizer(recipe.base_model, **hub)
    config.base_model_revision = cached_commit(recipe.base_model, **hub) or config.base_model_revision
    set_seed(args.seed)
    editor = EditorModel.from_base(model, config)
    config = editor.config
    if config.key_covariance is not None or not config.needs_training:
        place(model, args.device)
    if config.key_covariance is not None:
        texts = load_texts(recipe.texts) if recipe.texts else ordinary_sentences(train_facts)
        if texts and checkpoint is None:  # which has it
            n_tokens = recipe.n_tokens or DEFAULT_N_TOKENS
            editor.collect_covariance(model, texts, tokenizer, n_tokens=n_tokens, batch_size=args.lm_batch_size)
    trainer = None
    if config.needs_training:
        trainer = EditorTrainer(editor, model, args, train_facts, eval_facts or None, tokenizer)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    else:
        if config.key_covariance is None and train_facts:
            editor.warm_up(model, train_facts, tokenizer, batch_size=args.lm_batch_size)
        if args.should_save:
            editor.save_pretrained(folder)
    measurements = []
    if eval_facts:
        measurements = measure(editor, model, eval_facts, sizes, tokenizer, batch_size=args.lm_batch_size)
    if trainer is not None:
        for measurement in measurements:  # for the trackers
            n = measurement.n_at_once
            trainer.log({f"eval_{name}_at_{n}": measurement.scores[name] for name in measurement.n_facts})
    if args.process_index > 0:
        return folder
    settings = {name: value for name, value in recipe.training.items() if name != "output_dir"}
    run = EditorRun(
        train_facts=recipe.train_facts,
        n_train_facts=len(train_facts) or None,
        settings={"dtype": recipe.dtype, **recipe.editor, **settings}
        | ({"texts": recipe.texts} if recipe.texts else {}),
        eval_facts=recipe.eval_facts,
        measurements=measurements,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        license=recipe.license,
    )
    write_editor_card(folder, editor, run)
    if trainer is not None:
        trainer.run = run
        if args.push_to_hub:
            trainer.push_to_hub("Card with results")
    elif args.push_to_hub:
        editor = EditorModel.from_pretrained(folder)  # which knows where its card is
        editor.push_to_hub(
            args.hub_model_id or folder.name,
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision,
        )
    return folder


def measure(
    editor: EditorModel,
    model: PreTrainedModel,
    facts: Sequence[Fact],
    sizes: Iterable[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> list[Measurement]:
    """Edit held-out facts, several numbers at once, and measure each with `EditorModel.evaluate`.

    A size takes as many full sets as the facts give, so that the sizes share facts and every edit is of that size; the
    facts left over are not measured, and the counts of the measurement say so.

    Args:
        editor: the editor, as before afterwards.
        model: the live base model, as before afterwards.
        facts: the held-out facts.
        sizes: numbers of facts, each at most `len(facts)`.
        tokenizer: the base model's; loaded from beside the model if None.
        batch_size: sequences a pass of the language model.

    Returns:
        One measurement a size, in the order of `sizes`; scores are means over facts.
    """
    measurements = []
    for size in sizes:
        sums: dict[str, float] = {}
        used = facts[: len(facts) // size * size]
        for begin in range(0, len(used), size):
            chosen = used[begin : begin + size]
            for name, score in editor.evaluate(model, chosen, tokenizer, batch_size=batch_size).items():
                sums[name] = sums.get(name, 0.0) + n_measured(chosen, name) * score
        scores = {name: total / n_measured(used, name) for name, total in sums.items()}
        counts = {name: n_measured(used, name) for name in METRIC_TITLES if name in scores}
        measurements.append(Measurement(size, scores, counts))
    return measurements


def _checkpoint_of(folder: Path, resume: bool, config: EditorConfig) -> str | None:
    """The checkpoint to go on from; None for a run from the start, whose checkpoints must not get among older ones.

    Raises:
        ValueError: there is none to go on from; or there are some, and they are not to be gone on from.
    """
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and found is None:
        raise ValueError(f"{folder} has no checkpoint to resume from. Start without --resume.")
    if found is not None and not (resume and config.needs_training):
        way_on = "--resume goes on with it; or" if config.needs_training else "This method is not trained:"
        raise ValueError(
            f"{folder} has checkpoints of an earlier run, the last of them {Path(found).name}. {way_on} choose another "
            "output_dir, or remove them."
        )
    return found


def _check_sizes(sizes: Any, where: str) -> None:
    valid = isinstance(sizes, list) and sizes and all(type(size) is int and size >= 1 for size in sizes)
    if not valid or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"{where}: eval_sizes is {sizes!r}; expected different whole numbers of at least 1, such as [16, 64, 256]."
        )
