"""The settings of a comparison: what is compared, read from a file and checked before anything is run."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configuration import METHODS, EditorConfig
from .settings import (
    DTYPES,
    field_names,
    read_settings,
    refuse_what_is_ignored,
    require_known,
    require_text,
)

EXAMPLE = "recipes/compare-geography.yaml"
# Of every prompt alike, so that one set of answers before the edit serves all methods.
SHARED_FIELDS = ("prompt_template", "use_chat_template", "task_type", "base_model_revision")
# Fields of `EditorConfig` whose values are whole numbers, also where a range of them is searched.
WHOLE_FIELDS = frozenset(entry.name for entry in dataclasses.fields(EditorConfig) if entry.type is int)
_NUMBER_FIELDS = WHOLE_FIELDS | {entry.name for entry in dataclasses.fields(EditorConfig) if entry.type is float}
SPLITS = ("train", "validation", "test")
_TEXTS = ("base_model", "output_dir", "facts", *(f"{name}_facts" for name in SPLITS), "texts", "covariance_texts")


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of each cell is measured. Subsets are drawn with the comparison's seed, the same for all methods.

    Attributes:
        max_facts: edited facts that are scored teacher-forced, at most.
        max_generated: of these, facts that are scored by free generation too, at most; 0: none.
        rephrases_per_fact: rephrases of each fact that are asked, at most.
        batch_size: sequences a pass, of edits too. Changes the result by rounding only: see `EditorModel.make_edit`.
    """

    max_facts: int = 1024
    max_generated: int = 256
    rephrases_per_fact: int = 1
    batch_size: int = 64


@dataclass(frozen=True)
class TuningSettings:
    """How the settings of a method without training are chosen, on validation facts.

    Attributes:
        n_trials: settings that are tried, the same number for every method that has a `search`.
        sizes: numbers of validation facts that each trial edits at once. A trial's score is the harmonic mean of edit
            success, generalization and locality, averaged over these.
    """

    n_trials: int = 12
    sizes: list[int] = field(default_factory=lambda: [256])


@dataclass(frozen=True)
class MethodSettings:
    """What one method has besides the settings of all.

    Attributes:
        editor: fields of `EditorConfig`.
        training: fields of `EditorTrainingArguments`, of a method that is trained.
        search: `{field of EditorConfig: [low, high]}`, of a method that is not: the range that is searched,
            logarithmically, in whole numbers where the field takes no others; or `{field: {choices: [...]}}`. Empty:
            nothing is tuned.
        warm_up_facts: training facts whose statistics the editor of a method that is not trained starts with.
        editor_folder: folder or Hub id of an editor that is there already, instead of making one with the four above.
            That it was not trained on the test facts is for you to know.
        accumulate: edits in turns as `EditorModel.apply(accumulate=True)`, which solves for all facts in force at every
            turn; False: turn by turn.
    """

    editor: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    warm_up_facts: int = 0
    editor_folder: str | None = None
    accumulate: bool = False


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        base_model: folder or Hub id of the base model.
        output_dir: folder for everything that is made.
        facts: one source of facts, as `load_facts` takes it by name, to be shuffled and split; or
        train_facts, validation_facts, test_facts: three. The facts that cells edit are test facts, which neither
            training nor tuning has seen: no text of one split may stand in another.
        n_test_facts, n_validation_facts: how many of `facts` are for testing and tuning; the rest is for training.
        texts: text that the facts have nothing to do with, as `load_texts` takes it by name, for perplexity before and
            after; None measures none.
        covariance_texts: ordinary text, as `load_texts` takes it by name, for methods that weigh an edit against its
            keys; None: prompts of training facts with their true answers.
        n_covariance_tokens: how much of it is read.
        dtype: precision of the base model.
        sizes: numbers of facts to edit at once.
        turns, facts_per_turn: one more cell for each method, that edits `facts_per_turn` facts `turns` times; 0: none.
        seed: of the splits, subsets, training and tuning.
        editor, training: as in `MethodSettings`, for all methods; where a method has a value of its own, that one
            counts. What not every method can have stands with the methods that can.
        evaluation, tuning: see there.
        methods: the methods with their own settings. Empty: all there are.
    """

    base_model: str
    output_dir: str
    facts: str | None = None
    train_facts: str | None = None
    validation_facts: str | None = None
    test_facts: str | None = None
    n_test_facts: int = 4096
    n_validation_facts: int = 512
    texts: str | None = None
    covariance_texts: str | None = None
    n_covariance_tokens: int = 50_000
    dtype: str = "auto"
    sizes: list[int] = field(default_factory=lambda: [64, 256, 1024, 4096])
    turns: int = 20
    facts_per_turn: int = 100
    seed: int = 0
    editor: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    methods: dict[str, MethodSettings] = field(default_factory=dict)

    @property
    def amounts(self) -> list["Amount"]:
        """The columns of the plan: numbers of facts at once, and the turns."""
        at_once = [Amount(size) for size in self.sizes]
        return at_once + ([Amount(self.turns * self.facts_per_turn, self.facts_per_turn)] if self.turns else [])

    @property
    def prompt_format(self) -> EditorConfig:
        """What all methods share, for what no method's editor does: some fields of `editor` only some methods take."""
        return EditorConfig(**{name: self.editor[name] for name in SHARED_FIELDS if name in self.editor})

    def editor_settings(self, method: str) -> dict[str, Any]:
        """Fields of `EditorConfig`: those of all methods, and those of `method`."""
        return {"method": method, **self.editor, **self.methods[method].editor}


@dataclass(frozen=True)
class Amount:
    """How many facts a cell edits: at once, or this many a turn."""

    n_facts: int
    facts_per_turn: int | None = None

    @property
    def name(self) -> str:
        """As files call it: `64`, `20x100`."""
        return str(self.n_facts) if self.facts_per_turn is None else f"{self.n_turns}x{self.facts_per_turn}"

    @property
    def title(self) -> str:
        """As people call it."""
        if self.facts_per_turn is None:
            return f"{self.n_facts:,} facts at once"
        return f"{self.n_turns} turns of {self.facts_per_turn} facts"

    @property
    def n_turns(self) -> int:
        """1 where all are edited at once."""
        return 1 if self.facts_per_turn is None else self.n_facts // self.facts_per_turn


def load_comparison(
    path: str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    max_steps: int | None = None,
    n_trials: int | None = None,
) -> Comparison:
    """Read the settings of a comparison, and check them.

    Args:
        path: a YAML file of `Comparison`'s fields; None: `overrides` are all there is. Relative paths in it are
            relative to the current folder.
        overrides: fields that replace the file's. `methods` may be a list of names, which keeps the file's settings of
            these.
        max_steps: of the training of every method, also of one that has its own.
        n_trials: of `tuning`.

    Raises:
        ValueError: no such file, a name that is not known, a setting that is missing or not allowed.
    """
    content = read_settings(path, field_names(Comparison), EXAMPLE) if path is not None else {}
    where = str(path) if path is not None else "The comparison"
    overrides = dict(overrides or {})
    if not isinstance(methods := content.get("methods") or {}, dict):
        raise ValueError(f"{where}: methods is {methods!r}; expected names of methods with their settings.")
    chosen = list(dict.fromkeys(overrides.pop("methods", None) or methods or METHODS))
    for name in (*chosen, *methods):
        if name not in METHODS:
            raise ValueError(f"{where}: there is no method {name!r}. Methods: {', '.join(METHODS)}.")
    content = {**content, **overrides}
    content["methods"] = {
        name: _nested(MethodSettings, methods.get(name), f"{where}, methods.{name}", ("editor", "training", "search"))
        for name in chosen
    }
    for name in ("editor", "training"):
        content[name] = _section(content.get(name), f"{where}: {name}")
    content["evaluation"] = _nested(EvaluationSettings, content.get("evaluation"), f"{where}, evaluation")
    content["tuning"] = _nested(TuningSettings, content.get("tuning"), f"{where}, tuning")
    if max_steps is not None:
        content["training"] = {**content["training"], "max_steps": max_steps}
        for name, method in content["methods"].items():
            training = {key: value for key, value in method.training.items() if key != "max_steps"}
            content["methods"][name] = dataclasses.replace(method, training=training)
    if n_trials is not None:
        content["tuning"] = dataclasses.replace(content["tuning"], n_trials=n_trials)
    for name in ("base_model", "output_dir"):
        if not content.get(name):
            raise ValueError(f"{where} has no {name}. Add it, or give it on the command line.")
    require_text(content, _TEXTS, where)
    comparison = Comparison(**content)
    if comparison.dtype not in DTYPES:
        raise ValueError(f"{where}: dtype is {comparison.dtype!r}; allowed: {', '.join(DTYPES)}.")
    _check_numbers(comparison, where)
    _check_sources(comparison, where)
    _check_methods(comparison, where)
    return comparison


def comparison_from(content: Mapping[str, Any]) -> Comparison:
    """What `dataclasses.asdict` made of a comparison, back again."""
    methods = {name: MethodSettings(**values) for name, values in content["methods"].items()}
    nested = {"evaluation": EvaluationSettings(**content["evaluation"]), "tuning": TuningSettings(**content["tuning"])}
    return Comparison(**{**content, **nested, "methods": methods})


def require_shared_format(config: EditorConfig, method: str, comparison: Comparison) -> None:
    """Check that a given editor is of its method, reads prompts as the answers before were asked, and can accumulate.

    Args:
        config: the editor's.
        method: that it is given for.
        comparison: the settings.

    Raises:
        ValueError: it is not, does not, or cannot where it is to.
    """
    source = comparison.methods[method].editor_folder
    if config.method != method:
        raise ValueError(
            f"{source} holds an editor of method {config.method!r}; expected {method!r}. Give it where that method is "
            "set up."
        )
    if comparison.methods[method].accumulate:
        _require_accumulable(config, f"{source}, the editor of {method!r}")
    shared = comparison.prompt_format
    for name in ("prompt_template", "use_chat_template", "task_type"):
        own, wanted = getattr(config, name), getattr(shared, name)
        if own != wanted:
            raise ValueError(
                f"{source}, the editor of {method!r}, has {name} {own!r}, and the comparison has {wanted!r}; expected "
                f"the same, since all methods are scored against the same answers. Put {name}: {own!r} under editor:, "
                "which is for all methods, or give another editor."
            )


def _nested(settings_type: Any, content: Any, where: str, sections: Sequence[str] = ()) -> Any:
    """Settings of a type; what is named in `sections` holds names with values again."""
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}; expected {', '.join(sorted(field_names(settings_type)))}.")
    require_known(content, field_names(settings_type), where)
    inner = {name: _section(content.get(name), f"{where}.{name}") for name in sections}
    return settings_type(**{**content, **inner})


def _section(content: Any, where: str) -> dict[str, Any]:
    """Names with values; {} for a section without any, which YAML reads as None."""
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}; expected settings with their values, or nothing.")
    return content or {}


def _check_numbers(comparison: Comparison, where: str) -> None:
    least = {
        "n_test_facts": 1,
        "n_validation_facts": 1,
        "n_covariance_tokens": 1,
        "turns": 0,
        "facts_per_turn": 1,
        "seed": 0,
    }
    numbers = [(name, getattr(comparison, name), low) for name, low in least.items()]
    numbers += [
        (f"evaluation.{name}", value, 0 if name in ("max_generated", "rephrases_per_fact") else 1)
        for name, value in vars(comparison.evaluation).items()
    ]
    numbers += [("tuning.n_trials", comparison.tuning.n_trials, 1)]
    numbers += [(f"methods.{name}.warm_up_facts", m.warm_up_facts, 0) for name, m in comparison.methods.items()]
    for name, value, low in numbers:
        if type(value) is not int or value < low:
            raise ValueError(f"{where}: {name} is {value!r}; expected a whole number of at least {low}.")
    for name, sizes in (("sizes", comparison.sizes), ("tuning.sizes", comparison.tuning.sizes)):
        valid = isinstance(sizes, list) and all(type(size) is int and size >= 1 for size in sizes)
        if not valid or len(set(sizes)) < len(sizes) or (not sizes and (name != "sizes" or not comparison.turns)):
            raise ValueError(
                f"{where}: {name} is {sizes!r}; expected different whole numbers of at least 1, such as [64, 256]."
            )


def _check_sources(comparison: Comparison, where: str) -> None:
    three = [getattr(comparison, f"{name}_facts") for name in SPLITS]
    if bool(comparison.facts) == any(three) or any(three) != all(three):
        raise ValueError(
            f"{where}: give facts, to be split, or all of train_facts, validation_facts and test_facts, and not both."
        )
    needed = max(amount.n_facts for amount in comparison.amounts)
    if comparison.facts and needed > comparison.n_test_facts:
        raise ValueError(
            f"{where}: n_test_facts is {comparison.n_test_facts}, and the largest cell edits {needed} facts. Raise it, "
            "or lower sizes or turns."
        )


def _check_methods(comparison: Comparison, where: str) -> None:
    _check_editor(comparison.editor, f"{where}, editor")
    _check_training_names(comparison.training, f"{where}, training")
    for name in comparison.methods:
        _check_method(comparison, name, f"{where}, methods.{name}")


def _check_method(comparison: Comparison, name: str, place: str) -> None:
    method = comparison.methods[name]
    _check_editor(method.editor, f"{place}.editor")
    require_known(method.search, field_names(EditorConfig), f"{place}.search")
    for section, fields in (("editor", method.editor), ("search", method.search)):
        for shared in SHARED_FIELDS:
            if shared in fields:
                raise ValueError(f"{place}.{section}: {shared} is the same for all methods; give it in `editor`.")
    if type(method.accumulate) is not bool:
        raise ValueError(f"{place}: accumulate is {method.accumulate!r}; expected true or false.")
    if METHODS[name].is_trained and (method.search or method.warm_up_facts):
        raise ValueError(
            f"{place}: search and warm_up_facts are for methods without training, and {name!r} is trained."
        )
    if not METHODS[name].is_trained and method.training:
        raise ValueError(f"{place}.training: {name!r} is not trained. Tune it with search.")
    require_text(vars(method), ["editor_folder"], place)
    if method.editor_folder is not None:
        for section in ("editor", "training", "search", "warm_up_facts"):
            if getattr(method, section):
                raise ValueError(f"{place}: {section} is for an editor that is made, and editor_folder gives one.")
        return
    settings = comparison.editor_settings(name)
    config = EditorConfig(**settings)  # raises what is not allowed, before anything is run
    for setting, values in method.search.items():
        _check_search(setting, values, settings, f"{place}.search.{setting}")
    if method.accumulate:
        for statistics in method.search.get("statistics", {"choices": [config.statistics]})["choices"]:
            _require_accumulable(EditorConfig(**{**settings, "statistics": statistics}), place)
    _check_training_names(method.training, f"{place}.training")
    if METHODS[name].is_trained:
        _check_training({**comparison.training, **method.training}, f"{place}, with training")


def _check_editor(editor: Mapping[str, Any], where: str) -> None:
    require_known(editor, field_names(EditorConfig), where)
    if "method" in editor:
        raise ValueError(f"{where}: method is {editor['method']!r}; expected none. What is compared stands in methods.")


def _require_accumulable(config: EditorConfig, where: str) -> None:
    if config.maker != "rows" or config.follows_edits:
        remedy = "give it statistics: frozen, or leave it out" if config.maker == "rows" else "leave it out"
        raise ValueError(
            f"{where}: accumulate is for editors whose rows do not depend on the turn, and those of {config.method!r} "
            f"do; {remedy}."
        )


def _check_training_names(training: Mapping[str, Any], where: str) -> None:
    if training:
        from .training_arguments import EditorTrainingArguments  # seconds to import

        require_known(training, set(inspect.signature(EditorTrainingArguments).parameters), where)
        refuse_what_is_ignored(training, where, "A comparison that is started again goes on by itself.")
        if "output_dir" in training:
            raise ValueError(f"{where}: output_dir is {training['output_dir']!r}; expected none, but the comparison's.")


def _check_training(training: Mapping[str, Any], where: str) -> None:
    if training:
        from .training_arguments import EditorTrainingArguments  # seconds to import

        try:  # without the accelerator, which this process leaves to its jobs
            EditorTrainingArguments(**{**training, "output_dir": "", "use_cpu": True})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def _check_search(setting: str, values: Any, settings: Mapping[str, Any], where: str) -> None:
    """Check the range of a setting, and that the method takes both of its ends, or all of its choices."""
    if setting == "method":
        raise ValueError(f"{where} is {values!r}; expected none. What is compared stands in methods.")
    _check_range(values, where)
    if isinstance(values, list) and setting not in _NUMBER_FIELDS:
        raise ValueError(f"{where} is {values!r}; {setting} is no single number. Write {{choices: [...]}}.")
    for value in values["choices"] if isinstance(values, dict) else values:
        try:
            EditorConfig(**{**settings, setting: value})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _check_range(values: Any, where: str) -> None:
    choices = values.get("choices") if isinstance(values, dict) and set(values) == {"choices"} else None
    pair = isinstance(values, list) and len(values) == 2 and all(type(value) in (int, float) for value in values)
    if not (isinstance(choices, list) and choices) and not (pair and 0 < values[0] < values[1]):
        raise ValueError(
            f"{where} is {values!r}; expected [low, high], numbers with 0 < low < high, or {{choices: [...]}}."
        )
