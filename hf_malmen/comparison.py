"""Several methods on the same model and facts: the jobs that a comparison takes, and running them.

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

from transformers.utils.hub import cached_file

from .base_model import check_base_model
from .comparison_settings import SHARED_FIELDS, SPLITS, Amount, Comparison, require_shared_format
from .configuration import METHODS, EditorConfig
from .facts import Fact, load_facts, read_facts, require_fields
from .history import locked
from .side_effects import load_texts
from .version import __version__

FACTS_FOLDER, LOGS_FOLDER = "facts", "logs"


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        kind: `"before"`, `"editor"` or `"cell"`.
        name: of its file, without the suffix.
        folder: the comparison's.
        settings: all that its result depends on, as JSON has it.
        needs: names of jobs that must be done before.
        facts: digests of the splits that it reads, which tell whether they are those it was planned with.
    """

    kind: str
    name: str
    folder: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

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
        if len(found) < n_both + _reads_training_facts(comparison):
            raise ValueError(
                f"{comparison.facts} has {len(found)} facts that share no text, and {n_test} are wanted for testing "
                f"and {comparison.n_validation_facts} for validation, which leaves too few. Lower n_test_facts and "
                "sizes, or n_validation_facts and tuning.sizes, or give more facts."
            )
        splits = {"train": found[n_both:], "validation": found[n_test:n_both], "test": found[:n_test]}
    else:
        splits = {name: load_facts(getattr(comparison, f"{name}_facts")) for name in SPLITS}
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


def _reads_training_facts(comparison: Comparison) -> bool:
    """Whether a method is trained on them, starts with their statistics, or reads them for ordinary text."""
    return any(
        METHODS[name].is_trained
        or method.warm_up_facts > 0
        or (METHODS[name].key_covariance is not None and comparison.covariance_texts is None)
        for name, method in comparison.methods.items()
        if method.editor_folder is None
    )


def _check_training_facts(comparison: Comparison, facts: Sequence[Fact]) -> None:
    """Check that facts have what the methods that train on them need.

    Raises:
        FactError: names the method, and the first fact without one of the fields.
    """
    from .training_arguments import TRAINING_DEFAULTS, needed_fields  # seconds to import

    for name, method in comparison.methods.items():
        if METHODS[name].is_trained and method.editor_folder is None:
            given = {**comparison.training, **method.training}.get("locality_weight")
            weight = {**TRAINING_DEFAULTS, **METHODS[name].training}["locality_weight"] if given is None else given
            require_fields(facts, needed_fields(weight), f"Training {name!r}")


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
        "base": _model_identity(comparison.base_model, comparison.prompt_format.base_model_revision),
        **{name: settings[name] for name in ("dtype", "seed")},
        "format": {name: comparison.editor.get(name) for name in SHARED_FIELDS},
    }
    measured = {"texts": comparison.texts, "texts_identity": _identity(comparison.texts)}
    measured |= {"evaluation": settings["evaluation"]}
    asked_facts = {
        amount.name: _digest(
            json.dumps(asked(comparison, splits["test"][i], i).to_dict()) for i in evaluated(comparison, amount)
        )
        for amount in comparison.amounts
    }
    digests = {name: digest_of(facts) for name, facts in splits.items()}
    tested = {"test": digests["test"]}
    made_from = {name: digests[name] for name in ("train", "validation") if splits[name]}
    own = {**common, **measured, "facts": asked_facts, "amounts": _amounts(comparison)}
    jobs = [Job("before", "before", folder, own, facts=tested)]
    editors = {}
    for name, method in comparison.methods.items():
        own = {
            **common,
            "editor": comparison.editor_settings(name),
            "editor_folder": method.editor_folder,
            "editor_identity": method.editor_folder and _model_identity(method.editor_folder),
        }
        if METHODS[name].is_trained:
            own |= {"train_facts": digests["train"], "training": {**comparison.training, **method.training}}
        else:
            own |= {"search": method.search, "tuning": settings["tuning"], "validation_facts": digests["validation"]}
            own |= {"warm_up_facts": method.warm_up_facts, "train_facts": digests["train"]}
        if METHODS[name].key_covariance is not None:
            own |= {"covariance_texts": comparison.covariance_texts, "n_tokens": comparison.n_covariance_tokens}
            own |= {"covariance_identity": _identity(comparison.covariance_texts)}
        editors[name] = Job("editor", f"editors/{name}", folder, own, ("before",), made_from)
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
            jobs.append(Job("cell", f"cells/{name}-{amount.name}", folder, own, ("before", editor.name), tested))
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
        FactError, ValueError: facts that cannot be compared on, a given editor of another method or prompt format, or
            texts that cannot be read; before anything is run.
        CheckpointWriteError: another comparison is running in the same folder.
        ModelMismatchError, OSError: no given editor where there should be one, no base model, or no texts; likewise.
    """
    splits, left_out = split_facts(comparison)
    _check_training_facts(comparison, splits["train"])
    for name, method in comparison.methods.items():
        if method.editor_folder is not None:
            require_shared_format(EditorConfig.from_pretrained(method.editor_folder), name, comparison)
    check_base_model(comparison.base_model, comparison.prompt_format.base_model_revision)
    jobs = plan(comparison, splits)
    reads_texts = any(METHODS[name].key_covariance is not None for name in comparison.methods)
    for source in (comparison.texts, comparison.covariance_texts if reads_texts else None):
        if source is not None:
            load_texts(source)  # raises what is wrong with them
    if left_out:
        say(f"{left_out} facts left out, of which a text stands in a fact before.")
    folder = Path(comparison.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, is_optional=True):  # jobs look at the facts themselves
        for name, facts in splits.items():
            lines = "".join(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n" for fact in facts)
            write_text(folder / FACTS_FOLDER / f"{name}.jsonl", lines)
        counts = ", ".join(f"{len(facts):,} {name}" for name, facts in splits.items())
        write_json(folder / "settings.json", dataclasses.asdict(comparison) | {"n_facts": counts, "left_out": left_out})
        say(f"{len(jobs)} jobs in {folder}; facts: {counts}.")
        if isinstance(commit := jobs[0].settings["base"], str):  # a branch may move on while jobs run
            comparison = dataclasses.replace(comparison, editor={**comparison.editor, "base_model_revision": commit})
        return _run_jobs(jobs, comparison, say, run or run_alone)


def _run_jobs(
    jobs: Sequence[Job], comparison: Comparison, say: Callable[[str], None], run: Callable[[Job, Comparison], None]
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for position, job in enumerate(jobs, 1):
        result, how = job.read(), "done before"
        if result is None or "error" in result:
            broken = [name for name in job.needs if "error" in results[name]]
            began = time.perf_counter()
            if broken:
                job.write({"error": f"{broken[0]} failed: {results[broken[0]]['error']}"})
            else:
                run(job, comparison)
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


def _model_identity(source: str, revision: str | None = None) -> Any:
    """Of a folder, as `_identity`; of a model's or editor's repo on the Hub, the commit that jobs will load.

    Its configuration is asked for, and so a repo that nobody has loaded yet has the identity that it has afterwards.
    Without a connection, the one that was loaded last counts, as it does for the jobs.

    Raises:
        OSError: there is no such folder, repo or revision; or no connection, and nothing in the cache.
    """
    if Path(source).exists():
        return _identity(source)
    found = cached_file(source, "config.json", revision=revision or "main")
    assert found is not None  # for the type checker: it raises where there is none
    return Path(found).parent.name


def _identity(source: str | None) -> Any:
    """What tells one state of a file or folder from another, without reading it; None of what is neither."""
    if source is None or not (path := Path(source)).exists():
        return None
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
