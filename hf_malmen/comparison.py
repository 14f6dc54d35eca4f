"""Several methods on the same model and facts: what is compared, the jobs that it takes, and running them.

A job is the answers of the unedited model, the making of one method's editor, or one cell of the table (a method, and a
number of facts). Each runs in a process of its own, so that its peak memory is its own and its crash ends nothing else,
and leaves one JSON file, written whole or not at all. A job whose file is there, made with the same settings, is not
run again.
"""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configuration import METHODS, EditorConfig
from .facts import Fact, load_facts, read_facts
from .hub import cached_commit
from .settings import field_names, read_settings, require_known
from .version import __version__

EXAMPLE = "recipes/compare-geography.yaml"
FACTS_FOLDER, LOGS_FOLDER = "facts", "logs"
# Of every prompt alike, so that one set of answers before the edit serves all methods.
_SHARED_FIELDS = ("prompt_template", "use_chat_template", "task_type", "base_model_revision")
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of each cell is measured. Subsets are drawn with the comparison's seed, the same for all methods.

    Attributes:
        max_facts: edited facts that are scored teacher-forced, at most.
        max_generated: of these, facts that are scored by free generation too, at most; 0: none.
        rephrases_per_fact: rephrases of each fact that are asked, at most.
        batch_size: sequences a pass. Does not change the result.
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
            logarithmically; or `{field: {choices: [...]}}`. Empty: nothing is tuned.
        warm_up_facts: training facts whose statistics the editor of a method that is not trained starts with.
        editor_folder: folder or Hub id of an editor that is there already, instead of making one. That it was not
            trained on the test facts is for you to know.
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
        editor, training: as of each method, for all of them; what a method says itself comes first. Settings that a
            method cannot have are for `methods`.
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


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        kind: `"before"`, `"editor"` or `"cell"`.
        name: of its file, without the suffix.
        folder: the comparison's.
        settings: all that its result depends on, as JSON has it.
        needs: names of jobs that must be done before.
    """

    kind: str
    name: str
    folder: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return _digest([json.dumps(self.settings, sort_keys=True)])

    @property
    def path(self) -> Path:
        """The file that holds the result."""
        return Path(self.folder) / f"{self.name}.json"

    def read(self) -> dict[str, Any] | None:
        """The result if the job is done with these settings, or failed with them: then it is `{"error": ...}`."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):  # the second: a disk that lost what it was given
            return None
        return content["result"] if content.get("fingerprint") == self.fingerprint else None

    def write(self, result: Mapping[str, Any]) -> None:
        """Save the result. A reader, or a crash, finds the whole file or none."""
        content = {"fingerprint": self.fingerprint, "settings": self.settings, "result": result}
        write_json(self.path, content)


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
        name: _nested(MethodSettings, methods.get(name), f"{where}, methods.{name}") for name in chosen
    }
    content["evaluation"] = _nested(EvaluationSettings, content.get("evaluation"), f"{where}, evaluation")
    content["tuning"] = _nested(TuningSettings, content.get("tuning"), f"{where}, tuning")
    if max_steps is not None:
        content["training"] = {**(content.get("training") or {}), "max_steps": max_steps}
        for name, method in content["methods"].items():
            training = {key: value for key, value in method.training.items() if key != "max_steps"}
            content["methods"][name] = dataclasses.replace(method, training=training)
    if n_trials is not None:
        content["tuning"] = dataclasses.replace(content["tuning"], n_trials=n_trials)
    for name in ("base_model", "output_dir"):
        if not content.get(name):
            raise ValueError(f"{where} has no {name}. Add it, or give it on the command line.")
    comparison = Comparison(**content)
    _check_numbers(comparison, where)
    _check_sources(comparison, where)
    _check_methods(comparison, where)
    return comparison


def split_facts(comparison: Comparison) -> tuple[dict[str, list[Fact]], int]:
    """The facts of a comparison, each split in an order that the seed decides.

    Returns:
        `{"train": ..., "validation": ..., "test": ...}`, and how many facts of a single source were left out, since one
        of their texts stood in a fact before.

    Raises:
        FactError: a bad fact.
        ValueError: too few facts; or a text that two splits share.
    """
    left_out = 0
    if comparison.facts is not None:
        found: list[Fact] = []
        seen: set[str] = set()
        for fact in read_facts(comparison.facts):
            texts = _texts(fact)
            if seen.isdisjoint(texts):
                found.append(fact)
            else:
                left_out += 1
            seen |= texts
        random.Random(comparison.seed).shuffle(found)
        n_test, n_both = comparison.n_test_facts, comparison.n_test_facts + comparison.n_validation_facts
        if len(found) <= n_both:
            raise ValueError(
                f"{comparison.facts} has {len(found)} facts that share no text, and {n_test} are wanted for testing "
                f"and {comparison.n_validation_facts} for validation, which leaves none for training. Lower "
                "n_test_facts and sizes, or give more facts."
            )
        splits = {"train": found[n_both:], "validation": found[n_test:n_both], "test": found[:n_test]}
    else:
        splits = {name: load_facts(getattr(comparison, f"{name}_facts")) for name in _SPLITS}
        for name, facts in splits.items():
            random.Random(f"{comparison.seed} {name}").shuffle(facts)
    is_tuned = any(method.search for method in comparison.methods.values())
    wanted = {
        "validation": (max(comparison.tuning.sizes) if is_tuned else 0, "tuning.sizes"),
        "test": (max(amount.n_facts for amount in comparison.amounts), "sizes or turns"),
        "train": (max(method.warm_up_facts for method in comparison.methods.values()), "warm_up_facts"),
    }
    for name, (number, setting) in wanted.items():
        if number > len(splits[name]):
            raise ValueError(
                f"There are {len(splits[name])} {name} facts, and {number} are wanted. Lower {setting}, or give more "
                f"{name} facts."
            )
    check_disjoint(splits)
    return splits, left_out


def check_disjoint(splits: Mapping[str, Sequence[Fact]]) -> None:
    """Check that no prompt or rephrase of one split stands in another.

    Raises:
        ValueError: one that does.
    """
    owners: dict[str, str] = {}
    for name, facts in splits.items():
        for text in {text for fact in facts for text in _texts(fact)}:
            if text in owners:
                raise ValueError(
                    f"The {owners[text]} facts and the {name} facts both have {text!r}. What is tested must not have "
                    "been trained or tuned on: remove it from one of them, or give all facts as one source, `facts`, "
                    "to be split."
                )
            owners[text] = name


def evaluated(comparison: Comparison, amount: Amount) -> list[int]:
    """Numbers of the test facts that a cell is scored on, in a drawn order; the first of them freely generated too."""
    # One order for all sizes, so that they share facts, and so the answers before the edit.
    keys = {number: random.Random(f"{comparison.seed} {number}").random() for number in range(amount.n_facts)}
    return sorted(keys, key=keys.__getitem__)[: comparison.evaluation.max_facts]


def asked(comparison: Comparison, fact: Fact, number: int) -> Fact:
    """Test fact `number` with the rephrases that are asked of it."""
    n = min(comparison.evaluation.rephrases_per_fact, len(fact.rephrases))
    chosen = random.Random(f"{comparison.seed} rephrases {number}").sample(fact.rephrases, n)
    return dataclasses.replace(fact, rephrases=tuple(chosen))


def plan(comparison: Comparison, splits: Mapping[str, Sequence[Fact]]) -> list[Job]:
    """The jobs of a comparison, in the order in which they are run: small cells of all methods come first."""
    folder, settings = comparison.output_dir, dataclasses.asdict(comparison)
    common = {
        "release": __version__,
        "base_model": comparison.base_model,
        "base": _identity(comparison.base_model),
        **{name: settings[name] for name in ("dtype", "seed")},
        "format": {name: comparison.editor.get(name) for name in _SHARED_FIELDS},
    }
    measured = {"texts": comparison.texts, "texts_identity": _identity(comparison.texts)}
    measured |= {"evaluation": settings["evaluation"]}
    asked_facts = {
        amount.name: _digest(
            json.dumps(asked(comparison, splits["test"][i], i).to_dict()) for i in evaluated(comparison, amount)
        )
        for amount in comparison.amounts
    }
    jobs = [
        Job("before", "before", folder, {**common, **measured, "facts": asked_facts, "amounts": _amounts(comparison)})
    ]
    digests = {name: digest_of(facts) for name, facts in splits.items()}
    editors = {}
    for name, method in comparison.methods.items():
        own = {
            **common,
            "editor": comparison.editor_settings(name),
            "editor_folder": method.editor_folder,
            "editor_identity": _identity(method.editor_folder),
        }
        if METHODS[name].is_trained:
            own |= {"train_facts": digests["train"], "training": {**comparison.training, **method.training}}
        else:
            own |= {"search": method.search, "tuning": settings["tuning"], "validation_facts": digests["validation"]}
            own |= {"warm_up_facts": method.warm_up_facts, "train_facts": digests["train"]}
        if METHODS[name].key_covariance is not None:
            own |= {"covariance_texts": comparison.covariance_texts, "n_tokens": comparison.n_covariance_tokens}
            own |= {"covariance_identity": _identity(comparison.covariance_texts)}
        editors[name] = Job("editor", f"editors/{name}", folder, own)
    jobs += editors.values()
    for amount in comparison.amounts:
        for name, editor in editors.items():
            own = {
                **measured,
                "made_by": editor.fingerprint,
                "method": name,
                **dataclasses.asdict(amount),
                "facts": digest_of(splits["test"][: amount.n_facts]),
                "asked": asked_facts[amount.name],
                "comparison": common,
            }
            if amount.facts_per_turn is not None:
                own["accumulate"] = comparison.methods[name].accumulate
            jobs.append(Job("cell", f"cells/{name}-{amount.name}", folder, own, ("before", editor.name)))
    return jobs


def run_comparison(
    comparison: Comparison,
    say: Callable[[str], None] = print,
    run: Callable[[Job, Comparison], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the jobs that are not done. Killed at any time, it goes on where it was: at most one job is lost.

    Args:
        comparison: the settings.
        say: is told what happens.
        run: does a job, and has it write its result; None: `run_alone`.

    Returns:
        {name of the job: its result, or `{"error": ...}`}.

    Raises:
        FactError, ValueError: facts that cannot be compared on; before anything is run.
    """
    splits, left_out = split_facts(comparison)
    if left_out:
        say(f"{left_out} facts left out, of which a text stands in a fact before.")
    folder = Path(comparison.output_dir)
    for name, facts in splits.items():
        lines = "".join(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n" for fact in facts)
        write_text(folder / FACTS_FOLDER / f"{name}.jsonl", lines)
    counts = ", ".join(f"{len(facts):,} {name}" for name, facts in splits.items())
    write_json(folder / "settings.json", dataclasses.asdict(comparison) | {"n_facts": counts, "left_out": left_out})
    jobs = plan(comparison, splits)
    say(f"{len(jobs)} jobs in {folder}; facts: {counts}.")
    results: dict[str, dict[str, Any]] = {}
    for position, job in enumerate(jobs, 1):
        result, how = job.read(), "done before"
        if result is None or "error" in result:
            broken = [name for name in job.needs if "error" in results[name]]
            began = time.perf_counter()
            if broken:
                job.write({"error": f"{broken[0]} failed: {results[broken[0]]['error']}"})
            else:
                (run or run_alone)(job, comparison)
            result, how = job.read(), f"{time.perf_counter() - began:.0f} s"
            assert result is not None  # for the type checker: it was just written
        results[job.name] = result
        say(f"[{position}/{len(jobs)}] {job.name}: {_summary(result)} ({how})")
    return results


def run_alone(job: Job, comparison: Comparison) -> None:
    """Run a job in a new process, which ends when this one does. If it fails, its file says how."""
    log = Path(job.folder) / LOGS_FOLDER / f"{job.name.replace('/', '-')}.log"
    request = log.with_suffix(".json")
    write_json(request, {"job": dataclasses.asdict(job), "comparison": dataclasses.asdict(comparison)})
    command = [sys.executable, "-m", "hf_malmen.comparison_job", str(request)]
    # Nothing is written to the pipe. Its end tells the job that this process ended, and that nobody waits for it.
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT) as process,
    ):
        code = process.wait()
    if code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        job.write({"error": f"{lines[-1].strip() if lines else 'no output'} ({how}; {log})"})


def comparison_from(content: Mapping[str, Any]) -> Comparison:
    """What `dataclasses.asdict` made of a comparison, back again."""
    methods = {name: MethodSettings(**values) for name, values in content["methods"].items()}
    nested = {"evaluation": EvaluationSettings(**content["evaluation"]), "tuning": TuningSettings(**content["tuning"])}
    return Comparison(**{**content, **nested, "methods": methods})


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def digest_of(facts: Iterable[Fact]) -> str:
    """SHA-256 of facts in their order."""
    return _digest(json.dumps(fact.to_dict(), sort_keys=True) for fact in facts)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _identity(source: str | None) -> Any:
    """What tells one state of a file, folder or repo from another, without reading it."""
    if source is None:
        return None
    path = Path(source)
    if not path.exists():
        return cached_commit(source)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _amounts(comparison: Comparison) -> list[str]:
    return [amount.name for amount in comparison.amounts]


def _texts(fact: Fact) -> set[str]:
    return {" ".join(text.split()).lower() for text in (fact.prompt, *fact.rephrases)}


def _summary(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    if "scores" not in result:
        return str(result.get("summary", "done"))
    names = ("edit_success", "generalization", "locality")
    return ", ".join(
        f"{name.replace('_', ' ')} {result['scores'][name]:.3f}" for name in names if name in result["scores"]
    )


def _nested(settings_type: Any, content: Any, where: str) -> Any:
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}; expected {', '.join(sorted(field_names(settings_type)))}.")
    require_known(content, field_names(settings_type), where)
    return settings_type(**content)


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
    three = [getattr(comparison, f"{name}_facts") for name in _SPLITS]
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
    known = field_names(EditorConfig)
    require_known(comparison.editor, known, f"{where}, editor")
    for name, method in comparison.methods.items():
        place = f"{where}, methods.{name}"
        require_known(method.editor, known, f"{place}.editor")
        require_known(method.search, known, f"{place}.search")
        for shared in _SHARED_FIELDS:
            if shared in method.editor:
                raise ValueError(f"{place}.editor: {shared} is the same for all methods; give it in `editor`.")
        if type(method.accumulate) is not bool:
            raise ValueError(f"{place}: accumulate is {method.accumulate!r}; expected true or false.")
        if METHODS[name].is_trained and (method.search or method.warm_up_facts):
            raise ValueError(
                f"{place}: search and warm_up_facts are for methods without training, and {name!r} is trained."
            )
        if not METHODS[name].is_trained and method.training:
            raise ValueError(f"{place}.training: {name!r} is not trained. Tune it with search.")
        for setting, values in method.search.items():
            _check_range(values, f"{place}.search.{setting}")
        EditorConfig(**comparison.editor_settings(name))  # raises what is not allowed, before anything is run


def _check_range(values: Any, where: str) -> None:
    choices = values.get("choices") if isinstance(values, dict) and set(values) == {"choices"} else None
    pair = isinstance(values, list) and len(values) == 2 and all(type(value) in (int, float) for value in values)
    if not (isinstance(choices, list) and choices) and not (pair and 0 < values[0] < values[1]):
        raise ValueError(
            f"{where} is {values!r}; expected [low, high] with 0 < low < high, or {{choices: [...]}}. Write 1.0e-6 in "
            "YAML, for which 1e-6 is a text."
        )
