"""A comparison: cells measure what the editor does, and one that was stopped or killed goes on where it was."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, Fact, cli, comparison, load_facts
from hf_malmen.comparison import (
    Job,
    asked,
    check_disjoint,
    evaluated,
    plan,
    run_alone,
    run_comparison,
    split_facts,
)
from hf_malmen.comparison_job import Base, Untrained, _perplexity, drawn, harmonic_mean, perform
from hf_malmen.comparison_report import (
    MAIN_METRICS,
    Results,
    _plot_scores,
    _plot_tradeoff,
    best,
    score_tables,
    unbeaten,
    write_report,
)
from hf_malmen.comparison_settings import Amount, Comparison, MethodSettings, load_comparison
from hf_malmen.errors import CheckpointWriteError, FactError
from hf_malmen.evaluation import measure_edit
from hf_malmen.side_effects import perplexity

Build = Callable[..., Any]
ROOT = Path(__file__).parent.parent
TEXTS = ["Lyon is a city in France.", "Osaka, a city of Japan, is large.", "Perth is in Australia."]
SHARED = {"target_modules": ["mlp.down_proj"], "edit_lr": 1e-3}
METHODS = {
    "malmen": {"editor": {"rank": 4}, "training": {"max_steps": 2}, "accumulate": True},
    "ultraedit": {
        "warm_up_facts": 6,
        "search": {"edit_lr": [1e-4, 1.0], "statistics": {"choices": ["following", "frozen"]}},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_llama: Build, make_facts: Build, make_tokenizer: Build) -> Path:
    """A folder with a model, facts, texts, and the settings of a comparison. No test writes to it."""
    folder = tmp_path_factory.mktemp("comparison")
    make_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    facts = make_facts(72)[12:]  # the first twelve have prompts that rephrases of others begin with
    save_facts(folder / "facts.jsonl", facts)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    content = {
        "base_model": str(folder / "base"),
        "facts": str(folder / "facts.jsonl"),
        "texts": str(folder / "texts.jsonl"),
        "n_test_facts": 12,
        "n_validation_facts": 8,
        "sizes": [4, 10],
        "turns": 3,
        "facts_per_turn": 4,
        "editor": SHARED,
        "training": {"per_device_train_batch_size": 4, "use_cpu": True},
        "evaluation": {"max_facts": 9, "max_generated": 5, "rephrases_per_fact": 1},
        "tuning": {"n_trials": 2, "sizes": [8]},
        "methods": METHODS,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def save_facts(path: Path, facts: list[Fact]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in facts), encoding="utf-8")


def settings(home: Path, output_dir: Path, **overrides: Any) -> Comparison:
    """The settings of `home`, with some replaced."""
    return load_comparison(home / "compare.yaml", {"output_dir": str(output_dir), **overrides})


class StoppedError(Exception):
    """Stands for whatever ends a comparison."""


class Runner:
    """Runs jobs in this process, and remembers which; before the job that `stop_at` names, it is stopped."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.ran: list[str] = []
        self.stop_at = stop_at

    def __call__(self, job: Job, settings: Comparison) -> None:
        if job.name == self.stop_at:
            raise StoppedError
        self.ran.append(job.name)
        perform(job, settings)


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, dict[str, Any], list[str]]:
    """A whole comparison, its results and the names of its jobs. No test writes to its folder."""
    found = settings(home, tmp_path_factory.mktemp("done"))
    runner = Runner()
    results = run_comparison(found, lambda _: None, runner)
    return found, results, runner.ran


def without_costs(results: dict[str, Any], found: Comparison) -> list[list[str]]:
    """The tables of scores and perplexity, without seconds and memory, which no two runs share."""
    parts = score_tables(Results.of(found, results)).split("\n\n")
    assert any("peak GiB" in part for part in parts)
    cells = [[line.split("|") for line in part.splitlines()] for part in parts]
    return [[*row[:4]] if "peak GiB" in part else row for part, rows in zip(parts, cells, strict=True) for row in rows]


def test_order_of_jobs(done: tuple[Comparison, dict[str, Any], list[str]]) -> None:
    """The answers before and the editors come first, then small cells of all methods."""
    amounts = ("4", "10", "3x4")
    cells = [f"cells/{method}-{amount}" for amount in amounts for method in METHODS]
    assert done[2] == ["before", "editors/malmen", "editors/ultraedit", *cells]


@pytest.mark.parametrize("amount", [Amount(10), Amount(12, 4)], ids=lambda amount: amount.name)
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_what_the_editor_does(
    home: Path,
    done: tuple[Comparison, dict[str, Any], list[str]],
    make_llama: Build,
    tokenizer: PreTrainedTokenizerFast,
    method: str,
    amount: Amount,
) -> None:
    """Scores and intervals are those of the saved editor on these facts, with the answers before asked anew."""
    found, results, _ = done
    cell = results[f"cells/{method}-{amount.name}"]
    model = make_llama()
    editor = EditorModel.from_pretrained(Path(found.output_dir) / "editors" / method)
    test = load_facts(str(Path(found.output_dir) / "facts" / "test.jsonl"))
    assert len(test) == 12
    numbers = evaluated(found, amount)
    assert len(set(numbers)) == 9 == cell["n_scored"] and set(numbers) <= set(range(amount.n_facts))
    facts = [asked(found, test[number], number) for number in numbers]
    assert all(
        len(f.rephrases) == 1 and f.rephrases[0] in test[n].rephrases for f, n in zip(facts, numbers, strict=True)
    )

    # Accumulated turns give what one shot gives, of the same facts.
    per_turn = None if method == "malmen" else amount.facts_per_turn
    edit = editor.apply(model, test[: amount.n_facts], tokenizer, facts_per_turn=per_turn)
    after = perplexity(model, tokenizer, TEXTS)
    edit.undo()
    tokenize = editor.tokenizer_for(model, tokenizer)
    forced = measure_edit(model, edit, facts, tokenize, batch_size=4)
    freely = measure_edit(model, edit, facts[:5], tokenize, batch_size=4, generate=True)
    generated = {name: score for name, score in freely.scores.items() if name not in forced.scores}
    assert any("_generated" in name for name in generated)
    assert cell["scores"] == pytest.approx(forced.scores | generated, abs=1e-6)
    for name, ends in cell["intervals"].items():
        assert ends == pytest.approx((forced.intervals | freely.intervals | forced.intervals)[name], abs=1e-6)
    assert cell["perplexity"]["before"][0] == pytest.approx(perplexity(model, tokenizer, TEXTS), rel=1e-5)
    assert cell["perplexity"]["after"][0] == pytest.approx(after, rel=1e-5)
    low, high = cell["perplexity"]["after"][1:]
    assert low < after < high
    # The kernel counts pages of several threads in batches.
    assert cell["peak_memory"]["memory"] + 2**20 > cell["memory_before_edit"]["memory"] > 50 * 2**20


def test_trials_are_scored_on_validation_facts(
    done: tuple[Comparison, dict[str, Any], list[str]], make_llama: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each trial's scores are those of an editor with its settings, and the best trial's editor is kept."""
    found, results, _ = done
    made = results["editors/ultraedit"]
    model = make_llama()
    train, facts = (load_facts(Path(found.output_dir) / "facts" / f"{n}.jsonl") for n in ("train", "validation"))
    facts = [dataclasses.replace(fact, rephrases=fact.rephrases[:1]) for fact in facts]
    assert len(made["trials"]) == 2 and len(facts) == 8
    for trial in made["trials"]:
        editor = EditorModel.from_base(model, EditorConfig(**{**SHARED, "method": "ultraedit", **trial["values"]}))
        editor.warm_up(model, train[:6], tokenizer)
        scores = editor.evaluate(model, facts, tokenizer)
        expected = {name: scores[name] for name in ("edit_success", "generalization", "locality")}
        assert trial["by_size"]["8"] == pytest.approx(expected, abs=1e-6)
        mean = 0.0 if 0 in expected.values() else 3 / sum(1 / score for score in expected.values())
        assert trial["score"] == pytest.approx(mean, abs=1e-6)
    won = max(made["trials"], key=lambda trial: trial["score"])["values"]
    saved = EditorConfig.from_pretrained(Path(found.output_dir) / "editors" / "ultraedit")
    assert (saved.edit_lr, saved.statistics) == (won["edit_lr"], won["statistics"])


@pytest.mark.parametrize("texts", [None, "texts.jsonl"])
@pytest.mark.parametrize("method", ["memit", "ft"])
def test_text_is_read_beforehand(
    home: Path, make_llama: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, method: str, texts: str | None
) -> None:
    """Once for all trials, each with its own η; what an editor has read of the same text, a file's or the facts'."""
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8"))
    content |= {"sizes": [4], "turns": 0, "output_dir": str(tmp_path / "out"), "n_covariance_tokens": 20}
    content["editor"] = {"target_modules": ["mlp.down_proj"]}
    content["methods"] = {method: {"editor": {"n_steps": 2}, "search": {"edit_lr": [0.03, 0.1]}}}
    content["covariance_texts"] = texts and str(home / texts)
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    results = run_comparison(load_comparison(tmp_path / "compare.yaml"), lambda _: None, Runner())
    assert len(results[f"editors/{method}"]["trials"]) == 2
    assert 0 <= results[f"cells/{method}-4"]["scores"]["edit_success"] <= 1
    saved = EditorModel.from_pretrained(tmp_path / "out" / "editors" / method)
    model = make_llama()
    won = max(results[f"editors/{method}"]["trials"], key=lambda trial: trial["score"])["values"]
    config = EditorConfig(method=method, target_modules=["mlp.down_proj"], n_steps=2, **won)
    by_hand = EditorModel.from_base(model, config)
    train = load_facts(tmp_path / "out" / "facts" / "train.jsonl")
    sentences = [f"{fact.unrelated_prompt} {fact.unrelated_answer}" for fact in train]
    assert by_hand.collect_covariance(model, TEXTS if texts else sentences, tokenizer, n_tokens=20) == 20
    buffers = dict(saved.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in by_hand.named_buffers())


def test_nothing_is_run_twice(home: Path, done: tuple[Comparison, dict[str, Any], list[str]], tmp_path: Path) -> None:
    """Run again, it reads; with other settings, it runs what depends on them."""
    found, results, _ = done
    again = Runner()
    assert run_comparison(found, lambda _: None, again) == results
    assert again.ran == []

    def would_run(**overrides: Any) -> set[str]:
        """Jobs that other settings would run in the same folder."""
        other = settings(home, Path(found.output_dir), **overrides)
        return {job.name for job in plan(other, split_facts(other)[0]) if job.read() is None}

    everything = set(done[2])
    assert would_run() == set()
    assert would_run(sizes=[4]) == {"before"}
    assert would_run(sizes=[4, 10, 11]) == {"before", "cells/malmen-11", "cells/ultraedit-11"}
    assert would_run(methods=["malmen"]) == set()
    assert would_run(training={"per_device_train_batch_size": 3, "use_cpu": True}) == {
        name for name in everything if "malmen" in name
    }
    assert would_run(tuning={"n_trials": 2, "sizes": [4]}) == {name for name in everything if "ultraedit" in name}
    assert would_run(seed=1) == would_run(dtype="float16") == everything
    measured = {name for name in everything if not name.startswith("editors")}
    assert would_run(evaluation={"max_facts": 8}) == would_run(texts=None) == measured
    facts = load_facts(str(home / "facts.jsonl"))
    trained = load_facts(Path(found.output_dir) / "facts" / "train.jsonl")[0]
    facts = [dataclasses.replace(fact, target="Chile") if fact == trained else fact for fact in facts]
    save_facts(tmp_path / "facts.jsonl", facts)
    assert would_run(facts=str(tmp_path / "facts.jsonl")) == everything - {"before"}


def test_trials_of_a_stopped_job_are_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it is tuned, a method goes on with the next trial, and ends as if never stopped."""
    only = {"methods": ["ultraedit"], "sizes": [4], "turns": 0}
    whole = run_comparison(settings(home, tmp_path / "whole", **only), lambda _: None, Runner())
    real, seen = EditorModel.apply, []

    def apply(self: EditorModel, *arguments: Any, **options: Any) -> Any:
        seen.append(self.config.edit_lr)
        if len(seen) == 2:
            raise StoppedError
        return real(self, *arguments, **options)

    monkeypatch.setattr(EditorModel, "apply", apply)
    with pytest.raises(StoppedError):
        run_comparison(settings(home, tmp_path / "stopped", **only), lambda _: None, Runner())
    resumed = run_comparison(settings(home, tmp_path / "stopped", **only), lambda _: None, Runner())
    first, second = (trial["values"]["edit_lr"] for trial in whole["editors/ultraedit"]["trials"])
    winner = EditorConfig.from_pretrained(tmp_path / "whole" / "editors" / "ultraedit").edit_lr
    assert seen == [first, second, second, winner]
    for name in ("editors/ultraedit", "cells/ultraedit-4"):
        kept = [{k: v for k, v in r[name].items() if k in ("scores", "config", "per_fact")} for r in (whole, resumed)]
        assert kept[0] == kept[1]


def test_a_killed_comparison_goes_on(
    home: Path, done: tuple[Comparison, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """Killed within a cell, it loses that cell, whose process ends too; run again, it finds the same scores."""
    found, results, _ = done
    some = {"methods": ["malmen"], "turns": 0}
    with pytest.raises(StoppedError):  # what comes before, quickly
        run_comparison(settings(home, tmp_path / "out", **some), lambda _: None, Runner("cells/malmen-10"))
    command = [sys.executable, "-m", "hf_malmen.cli", "compare", "--config", "compare.yaml", "--output-dir"]
    command += [str(tmp_path / "out"), "--methods", "malmen", "--turns", "0"]
    first, second = (tmp_path / "out" / "cells" / f"malmen-{size}.json" for size in (4, 10))
    kept = first.stat().st_mtime_ns
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive and not second.exists()

    runner, again = Runner(), settings(home, tmp_path / "out", **some)
    resumed = run_comparison(again, lambda _: None, runner)
    assert runner.ran == ["cells/malmen-10"] and first.stat().st_mtime_ns == kept
    whole = dataclasses.replace(found, methods=again.methods, turns=0)
    assert without_costs(resumed, again) == without_costs(results, whole)


def test_a_failed_method_is_reported(
    home: Path,
    make_llama: Build,
    make_editor: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The others are measured, the report gives the error, the exit code is 1; once mended, only it is run again."""
    make_editor(make_llama(intermediate_size=32), method="malmen", rank=4).save_pretrained(tmp_path / "editor")
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8"))
    content["methods"]["malmen"] = {"editor_folder": str(tmp_path / "editor")}
    content |= {"sizes": [4], "turns": 0, "output_dir": str(tmp_path / "out")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    real = run_alone

    def run(job: Job, found: Comparison) -> None:
        (real if job.name == "editors/malmen" else perform)(job, found)

    monkeypatch.setattr(comparison, "run_alone", run)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(sys, "argv", ["hf-malmen", "compare", "--config", str(tmp_path / "compare.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    output = capfd.readouterr()
    assert stop.value.code == 1 and "hf-malmen: 1 cells failed; see above." in output.err
    error = "editors/malmen failed: hf_malmen.errors.ModelMismatchError: model.layers.0.mlp.down_proj maps 48 features"
    assert error in output.out
    assert "cells/ultraedit-4: edit success" in output.out
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## Failed\n\n- malmen, 4: editors/malmen failed" in report
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows if "error" in row] == ["malmen"]
    assert {row["method"] for row in rows if row.get("metric") == "locality"} == {"ultraedit"}

    make_editor(make_llama(), method="malmen", rank=4).save_pretrained(tmp_path / "editor")
    runner = Runner()
    mended = run_comparison(load_comparison(tmp_path / "compare.yaml"), lambda _: None, runner)
    assert runner.ran == ["editors/malmen", "cells/malmen-4"]
    assert "error" not in mended["cells/malmen-4"]


def test_nothing_is_made_where_nothing_can_be_compared(home: Path, tmp_path: Path) -> None:
    """Without the answers of the unedited model no editor is trained or tuned; with them, later, all are."""
    ran = []

    def run(job: Job, _: Comparison) -> None:
        ran.append(job.name)
        job.write({"error": "no memory"})

    results = run_comparison(settings(home, tmp_path, sizes=[4], turns=0), lambda _: None, run)
    assert ran == ["before"]
    assert results["cells/malmen-4"]["error"] == "before failed: no memory"
    with pytest.raises(StoppedError):
        run_comparison(settings(home, tmp_path, sizes=[4], turns=0), lambda _: None, Runner("editors/malmen"))


def test_a_job_that_is_killed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result says by which signal, and where its log is."""
    found = settings(home, tmp_path)
    (tmp_path / "python").write_text('#!/bin/sh\necho "last words"\nkill -9 $$\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    job = Job("cell", "cells/malmen-4", str(tmp_path), {})
    run_alone(job, found)
    log = tmp_path / "logs" / "cells-malmen-4.log"
    assert job.read() == {"error": f"last words (killed by signal 9; {log})"}


def test_what_is_tested_was_not_trained_on(home: Path, tmp_path: Path) -> None:
    """A single source is split into parts that share no text; three sources that do are refused."""
    facts = load_facts(str(home / "facts.jsonl"))
    twin = dataclasses.replace(facts[0], prompt="Unheard of", rephrases=(facts[1].rephrases[0].upper(),))
    again = dataclasses.replace(facts[2], target="Peru")  # contradicts it
    save_facts(tmp_path / "facts.jsonl", [*facts, twin, again])
    splits, left_out = split_facts(settings(home, tmp_path, facts=str(tmp_path / "facts.jsonl")))
    assert left_out == 2
    assert {name: len(part) for name, part in splits.items()} == {"train": 40, "validation": 8, "test": 12}
    assert sorted(f.prompt for part in splits.values() for f in part) == sorted(f.prompt for f in facts)
    check_disjoint(splits)

    parts = {"train": facts[:30], "validation": facts[30:40], "test": [*facts[40:], twin]}
    for name, part in parts.items():
        save_facts(tmp_path / f"{name}.jsonl", part)
    three = {f"{name}_facts": str(tmp_path / f"{name}.jsonl") for name in parts} | {"facts": None}
    with pytest.raises(ValueError, match=r"The train facts and the test facts both have .* remove it from one of them"):
        run_comparison(settings(home, tmp_path / "out", **three))
    assert not (tmp_path / "out").exists()
    save_facts(tmp_path / "test.jsonl", facts[40:])
    splits, left_out = split_facts(settings(home, tmp_path, **three))
    assert left_out == 0 and [len(part) for part in splits.values()] == [30, 10, 20]


def test_a_folder_is_of_one_comparison(home: Path, tmp_path: Path) -> None:
    """A second one waits; facts that changed between two jobs, such as training facts now tested on, are not used."""
    found = settings(home, tmp_path, methods=["ultraedit"], sizes=[4], turns=0)

    def run(job: Job, used: Comparison) -> None:
        if job.kind == "before":
            job.write({"summary": ""})
            with pytest.raises(CheckpointWriteError, match="Another process is writing to"):
                run_comparison(settings(home, tmp_path, seed=1), lambda _: None, run)
            return
        (tmp_path / "facts" / "test.jsonl").replace(tmp_path / "facts" / "train.jsonl")
        perform(job, used)

    with pytest.raises(ValueError, match=r"train.jsonl does not hold the facts that this comparison wrote there"):
        run_comparison(found, lambda _: None, run)
    with pytest.raises(StoppedError):  # the lock has ended
        run_comparison(found, lambda _: None, Runner("editors/ultraedit"))


def test_training_facts_are_for_methods_that_read_some(home: Path, tmp_path: Path) -> None:
    """Without one, all facts may be for testing and validation."""
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8"))
    content |= {"output_dir": str(tmp_path), "sizes": [4], "turns": 0, "texts": None, "n_test_facts": 52}
    content["methods"] = {"ultraedit": {}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    results = run_comparison(load_comparison(tmp_path / "compare.yaml"), lambda _: None, Runner())
    assert "error" not in results["cells/ultraedit-4"]


@pytest.mark.parametrize(
    ("methods", "lacking", "training", "error"),
    [
        (["ultraedit", "malmen"], ["rephrases"], {}, "Training 'malmen' needs the field 'rephrases' in every fact"),
        (["malmen"], ["unrelated_prompt", "unrelated_answer"], {}, "Training 'malmen' needs .* 'unrelated_prompt'"),
        (["malmen"], ["unrelated_prompt", "unrelated_answer"], {"locality_weight": 0.0}, None),
        (["ultraedit"], ["rephrases"], {}, None),
    ],
)
def test_training_facts_are_checked_before_anything_is_run(
    home: Path, tmp_path: Path, methods: list[str], lacking: list[str], training: dict[str, Any], error: str | None
) -> None:
    """For the fields that the methods need, with their settings."""
    empty = {name: () if name == "rephrases" else None for name in lacking}
    facts = [dataclasses.replace(fact, **empty) for fact in load_facts(home / "facts.jsonl")]
    save_facts(tmp_path / "facts.jsonl", facts)
    common = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8"))["training"]
    change = {"facts": str(tmp_path / "facts.jsonl"), "methods": methods, "training": common | training}
    with pytest.raises(FactError if error else StoppedError, match=error):
        run_comparison(settings(home, tmp_path / "out", **change), lambda _: None, Runner("before"))
    assert (tmp_path / "out").exists() == (error is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["texts.jsonl"]}, r"texts is \['texts.jsonl'\]; expected one text"),
        ({"base_model": 5}, "base_model is 5; expected one text, with quotes around a number"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; allowed: auto, float32, bfloat16, float16"),
        ({"base_model": None}, "has no base_model. Add it, or give it on the command line"),
        ({"sizes": [4, 13]}, "n_test_facts is 12, and the largest cell edits 13 facts. Raise it"),
        ({"n_test_facts": 52}, "has 60 facts that share no text, and 52 are wanted for testing and 8 for validation"),
        ({"sizes": [4, 4]}, r"sizes is \[4, 4\]; expected different whole numbers"),
        ({"sizes": [], "turns": 0}, r"sizes is \[\]; expected"),
        ({"turns": -1}, "turns is -1; expected a whole number of at least 0"),
        ({"evaluation": {"max_fact": 3}}, "evaluation: unknown 'max_fact'. Known: batch_size, max_facts"),
        ({"evaluation": {"max_facts": 0}}, "evaluation.max_facts is 0; expected a whole number of at least 1"),
        ({"tuning": {"sizes": [9]}}, "There are 8 validation facts, and 9 are wanted. Lower tuning.sizes"),
        ({"base_model": "./no"}, "There is no folder ./no. Check the path"),
        ({"texts": "no.txt"}, "no.txt is not a file"),
        ({"covariance_texts": "no.jsonl", "methods": ["ft"], "editor": {}}, "There is no file no.jsonl"),
        ({"test_facts": "test.jsonl"}, "give facts, to be split, or all of train_facts"),
        ({"editor": {"rnak": 3}}, "editor: unknown 'rnak'. Known: "),
        ({"editor": {"edit_lr": 0}}, "EditorConfig.edit_lr is 0"),
        ({"editor": {"method": "mend"}}, "editor: method is 'mend'; expected none. What is compared stands in methods"),
        ({"editor": [1]}, r"editor is \[1\]; expected settings with their values, or nothing"),
        ({"training": {"max_step": 3}}, "training: unknown 'max_step'. Known: .*max_steps"),
        ({"methods": ["memot"]}, "there is no method 'memot'. Methods: malmen, "),
    ],
)
def test_settings_are_checked(home: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Whatever is wrong is said before anything is run."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_comparison(settings(home, tmp_path / "out", **change), lambda _: None, Runner("before"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("malmen", {"warm_up_facts": 3}, "search and warm_up_facts are for methods without training"),
        ("malmen", {"search": {"edit_lr": [1e-3, 1e-2]}}, "search and warm_up_facts are for methods without training"),
        ("ultraedit", {"training": {"max_steps": 3}}, "'ultraedit' is not trained. Tune it with search"),
        ("ultraedit", {"search": {"edit_lr": ["low", 1]}}, r"search.edit_lr is \['low', 1\]; expected \[low, high\]"),
        ("ultraedit", {"search": {"edit_lr": {"choices": []}}}, "expected"),
        ("ultraedit", {"search": {"edit_rl": [1, 2]}}, "search: unknown 'edit_rl'"),
        ("ultraedit", {"serach": {}}, "methods.ultraedit: unknown 'serach'"),
        ("malmen", {"editor": {"prompt_template": "Q: {prompt}"}}, "prompt_template is the same for all methods"),
        ("malmen", {"training": {"max_step": 3}}, "methods.malmen.training: unknown 'max_step'. Known: .*max_steps"),
        ("malmen", {"editor": {"method": "mend"}}, "methods.malmen.editor: method is 'mend'; expected none"),
        ("malmen", {"editor": 3}, "methods.malmen.editor is 3; expected settings with their values, or nothing"),
        ("ultraedit", {"search": {"method": {"choices": ["memit", "ft"]}}}, "search.method is .* expected none"),
        ("ultraedit", {"search": {"use_chat_template": {"choices": [True]}}}, "search: use_chat_template is the same"),
        ("ultraedit", {"search": {"n_steps": [1, 4]}}, "search.n_steps: EditorConfig.n_steps is 1; allowed: nothing"),
        (
            "memit",
            {"editor": {"edit_lr": 0.5}, "search": {"n_steps": [2, 4.5]}},
            "search.n_steps: EditorConfig.n_steps is 4.5; allowed: a whole",
        ),
        ("ultraedit", {"search": {"statistics": {"choices": ["frozen", "warm"]}}}, "statistics is 'warm'; allowed"),
        ("ft", {"search": {"layers_to_transform": [1, 3]}}, "layers_to_transform is no single number"),
        (
            "memit",
            {"editor": {"edit_lr": 0.5}, "accumulate": True},
            "accumulate is for editors whose rows do not depend .* 'memit' do; leave it out",
        ),
        ("ultraedit", {"accumulate": True}, "'ultraedit' do; give it statistics: frozen, or leave it out"),
        (
            "ultraedit",
            {"accumulate": True, "search": {"statistics": {"choices": ["frozen", "following"]}}},
            "give it statistics: frozen",
        ),
        ("malmen", {"training": {"lr_scheduler_type": "cosin"}}, "malmen, with training: cosin is not a valid"),
        ("malmen", {"training": {"look_back": "a"}}, "with training: .*look_back is 'a'; expected a whole number"),
        (
            "malmen",
            {"training": {"resume_from_checkpoint": "c"}},
            "expected none. A comparison that is started",
        ),
        ("malmen", {"training": {"do_train": False}}, "training: do_train is False; expected none"),
        ("malmen", {"training": {"output_dir": "a"}}, "training: output_dir is 'a'; expected none"),
        ("ultraedit", {"editor_folder": "e", "search": {"edit_lr": [1, 2]}}, "search is for an editor that is made"),
        ("ultraedit", {"editor_folder": "e", "warm_up_facts": 1}, "warm_up_facts is for an editor that is made"),
        ("malmen", {"editor_folder": 5}, "methods.malmen: editor_folder is 5; expected one text"),
        ("malmen", {"editor_folder": "e", "editor": {"rank": 9}}, "editor is for an editor that is made"),
        ("malmen", {"editor_folder": "e", "training": {"max_steps": 9}}, "training is for an editor that is made"),
        ("ultraedit", 3, "methods.ultraedit is 3; expected accumulate, editor"),
    ],
)
def test_settings_of_a_method_are_checked(home: Path, tmp_path: Path, method: str, own: Any, message: str) -> None:
    """What a method cannot have is an error that says where."""
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8")) | {"output_dir": "out"}
    content["methods"][method] = own
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_comparison(tmp_path / "compare.yaml")


def test_drawn_settings_cover_their_ranges() -> None:
    """Each of n equal parts of a range, on a logarithmic scale, is tried once; choices as often as each other."""
    search = {"edit_lr": [1e-6, 1e-2], "ridge": [0.1, 1000], "statistics": {"choices": ["frozen", "following"]}}
    trials = drawn(search, 8, seed=3)
    for name, (low, high) in {"edit_lr": (1e-6, 1e-2), "ridge": (0.1, 1000)}.items():
        places = np.log(np.array([trial[name] for trial in trials]) / low) / np.log(high / low) * 8
        assert sorted(np.floor(places)) == list(range(8))
    assert sorted(trial["statistics"] for trial in trials) == ["following"] * 4 + ["frozen"] * 4
    assert drawn(search, 8, seed=3) == trials != drawn(search, 8, seed=4)
    assert len({(np.argsort([trial[name] for trial in trials]).tobytes()) for name in ("edit_lr", "ridge")}) == 2


def test_whole_numbers_are_drawn_whole() -> None:
    """A setting that is a number of something is one, within the range."""
    found = [trial["n_steps"] for trial in drawn({"n_steps": [2, 9]}, 12, seed=1)]
    assert all(type(value) is int and 2 <= value <= 9 for value in found) and len(set(found)) > 4


def test_empty_sections_are_none(home: Path, tmp_path: Path) -> None:
    """YAML reads a heading with nothing below it as null."""
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8")) | {"output_dir": "out"}
    content |= {"editor": None, "training": None, "methods": {"malmen": {"editor": None, "training": None}}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    found = load_comparison(tmp_path / "compare.yaml")
    assert found.editor == found.training == found.methods["malmen"].editor == found.methods["malmen"].training == {}
    assert load_comparison(tmp_path / "compare.yaml", max_steps=3).training == {"max_steps": 3}


def test_settings_of_some_methods(home: Path, tmp_path: Path) -> None:
    """What is set for all may be what only the compared methods have; the answers before the edit need none of it."""
    only = {"methods": ["ft"], "sizes": [4], "turns": 0, "editor": {"n_steps": 2, "target_modules": ["mlp.down_proj"]}}
    results = run_comparison(settings(home, tmp_path, **only), lambda _: None, Runner())
    assert EditorConfig.from_pretrained(tmp_path / "editors" / "ft").n_steps == 2
    assert "error" not in results["cells/ft-4"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"prompt_template": "Q: {prompt} A:"}, "has prompt_template 'Q: {prompt} A:', and the comparison has None.*"),
        (
            {"method": "mend"},
            "holds an editor of method 'mend'; expected 'malmen'. Give it where that method is set up",
        ),
    ],
)
def test_a_given_editor_is_checked(
    home: Path, tmp_path: Path, make_llama: Build, make_editor: Build, own: dict[str, Any], message: str
) -> None:
    """One that would be scored against answers to other prompts is refused before anything is run."""
    make_editor(make_llama(), **{"method": "malmen", "rank": 4, **own}).save_pretrained(tmp_path / "editor")
    content = yaml.safe_load((home / "compare.yaml").read_text(encoding="utf-8"))
    content |= {"output_dir": str(tmp_path / "out"), "sizes": [4], "turns": 0}
    content["methods"] = {"malmen": {"editor_folder": str(tmp_path / "editor")}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run_comparison(load_comparison(tmp_path / "compare.yaml"), lambda _: None, Runner("before"))
    assert not (tmp_path / "out").exists()
    if "prompt_template" in own:
        shared = load_comparison(tmp_path / "compare.yaml", {"editor": SHARED | own})
        assert "error" not in run_comparison(shared, lambda _: None, Runner())["cells/malmen-4"]


def test_statistics_of_other_tokens(home: Path, tmp_path: Path, make_llama: Build) -> None:
    """Editors that trace other tokens do not share what was read beforehand, those with another step do."""
    found = settings(home, tmp_path, methods=["ultraedit"])
    with pytest.raises(StoppedError):
        run_comparison(found, lambda _: None, Runner("before"))  # writes the facts
    made = Untrained(Base(found), found, "ultraedit")
    answer, other, everything = (made.editor(v) for v in ({}, {"edit_lr": 0.5}, {"token_selection": "all"}))
    by_hand = EditorModel.from_base(
        make_llama(), EditorConfig(method="ultraedit", token_selection="all", target_modules=["mlp.down_proj"])
    )
    by_hand.warm_up(made.base.model, load_facts(tmp_path / "facts" / "train.jsonl")[:6], made.base.tokenizer)
    states = [
        {n: b.cpu() for n, b in e.named_buffers() if "statistics" in n} for e in (answer, other, everything, by_hand)
    ]
    same = [[all(torch.equal(b, two[n]) for n, b in one.items()) for two in states] for one in states]
    assert states[0] and same[0] == [True, True, False, False] and same[2] == [False, False, True, True]


def test_a_base_on_the_hub_is_the_same_before_and_after(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nobody has loaded it when jobs are planned; the jobs load the commit that was planned with."""
    loaded: list[str] = []
    asked_for: list[tuple[str, str]] = []

    def cached_file(repo: str, name: str, revision: str) -> str:
        asked_for.append((repo, revision))
        return str(tmp_path / "snapshots" / "c0ffee" / name)

    monkeypatch.setattr(comparison, "cached_file", cached_file)
    monkeypatch.setattr(comparison, "check_base_model", lambda *_: None)
    found = settings(home, tmp_path / "out", base_model="me/base", editor={"base_model_revision": "v1"})
    runner = Runner("cells/malmen-4")

    def run(job: Job, used: Comparison) -> None:
        loaded.append(used.editor["base_model_revision"])
        job.write({"summary": ""}) if job.kind != "cell" else runner(job, used)

    with pytest.raises(StoppedError):
        run_comparison(found, lambda _: None, run)
    assert set(loaded) == {"c0ffee"} and set(asked_for) == {("me/base", "v1")}
    jobs = plan(found, split_facts(found)[0])
    assert [job.name for job in jobs if job.read() is not None] == ["before", "editors/malmen", "editors/ultraedit"]
    assert jobs[0].settings["base"] == "c0ffee"


def test_harmonic_mean() -> None:
    """By hand."""
    assert harmonic_mean([0.5, 1.0, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([0.5, float("nan")]) == 0
    assert harmonic_mean([0.5, 0.0]) == harmonic_mean([]) == 0


def results_of(scores: dict[str, dict[str, list[float]]], tmp_path: Path) -> Results:
    """Results with the given scores of single facts: {method: {metric: scores}}."""
    cells = {}
    for method, per_fact in scores.items():
        means = {name: float(np.mean(values)) for name, values in per_fact.items()}
        before = {f"{name}_before": 0.0 for name in means}
        cells[method, "4"] = {
            "scores": means | before,
            "intervals": {name: [mean, mean] for name, mean in means.items()},
            "per_fact": per_fact,
            "n_scored": 4,
            "seconds": 1.0,
            "peak_memory": {"memory": 2**30},
        }
    found = Comparison(
        "base", str(tmp_path), facts="f", sizes=[4], turns=0, methods=dict.fromkeys(scores, MethodSettings())
    )
    return Results(found, {}, {method: {"error": "none"} for method in scores}, cells)


def test_ties_are_ties(tmp_path: Path) -> None:
    """Paired over facts: a difference that every fact shares is a win, one that half of them turn round is none."""
    base = np.tile([0.2, 0.9, 0.4, 0.7], 20)
    noise = np.tile([0.3, -0.28], 40)
    results = results_of(
        {
            "malmen": {"edit_success": list(base), "generalization": list(base), "locality": list(base)},
            "mend": {
                "edit_success": list(base + 0.02),
                "generalization": list(base + noise),
                "locality": list(base - 0.1),
            },
            "ultraedit": {
                "edit_success": list(base - 0.1),
                "generalization": list(base - 0.2),
                "locality": list(base - 0.2),
            },
        },
        tmp_path,
    )
    amount = Amount(4)
    assert best(results, amount, "edit_success") == ["mend"]
    assert best(results, amount, "generalization") == ["mend", "malmen"]
    assert best(results, amount, "locality") == ["malmen"]
    assert best(results, amount, "perplexity") == []
    assert unbeaten(results, amount) == ["malmen", "mend"]


def test_what_is_not_finite_never_wins(tmp_path: Path) -> None:
    """The NaN of a model that overflows is last and called so; plots leave it out, and take means off by rounding."""
    nan, some = float("nan"), [0.2, 0.9, 0.4, 0.7]
    scores = {name: dict.fromkeys(MAIN_METRICS, some) for name in ("malmen", "mend", "ultraedit")}
    scores["malmen"] = {metric: [nan, *some[1:]] for metric in MAIN_METRICS}
    results = results_of(scores, tmp_path)
    losses = {"malmen": [(nan, 3), (2.0, 2)], "mend": [(6.0, 3), (5.0, 2)], "ultraedit": [(6.0, 3), (float("inf"), 2)]}
    written: Any = results.cells
    for (method, _), cell in written.items():
        cell["losses"] = losses[method]
        cell["perplexity"] = {"before": [2.0, 1.0, 3.0], "after": _perplexity(losses[method])}
        for name in MAIN_METRICS:
            cell["intervals"][name] = [np.nextafter(cell["scores"][name], 1), 0.9]
    amount = Amount(4)
    assert best(results, amount, "perplexity") == ["mend"]
    assert best(results, amount, "locality") == unbeaten(results, amount) == ["mend", "ultraedit"]
    tables = score_tables(results)
    assert "nan" not in tables and "inf" not in tables
    assert [row.count("not finite") for row in tables.splitlines() if "| malmen" in row] == [3, 1]
    assert [row.count("not finite") for row in tables.splitlines() if "| ultraedit" in row] == [0, 1]
    for turns in (0, 2):  # drawn with spreads, too
        turned = dataclasses.replace(results.comparison, sizes=[] if turns else [4], turns=turns, facts_per_turn=2)
        cells = {(method, turned.amounts[0].name): cell for (method, _), cell in results.cells.items()}
        for draw in (_plot_scores, _plot_tradeoff):
            draw(dataclasses.replace(results, comparison=turned, cells=cells), tmp_path / "plot.png")
    for cell in written.values():
        cell["scores"] |= dict.fromkeys(MAIN_METRICS, nan)
        cell["perplexity"]["after"] = [nan] * 3
    _plot_scores(results, tmp_path / "plot.png")
    _plot_tradeoff(results, tmp_path / "plot.png")
    assert best(results_of({"mend": {"locality": [nan]}}, tmp_path), amount, "locality") == []


def test_one_text_tells_no_difference(tmp_path: Path) -> None:
    """Resampled, it would give an interval of no width, and any difference a winner; a text without tokens is none."""
    results = results_of(
        {name: {"edit_success": [1.0, 1.0], "locality": [0.5]} for name in ("malmen", "mend")}, tmp_path
    )
    written: Any = results.cells
    for texts in ([(0.0, 0)], [(6.0, 3)]):
        for (method, _), cell in written.items():
            cell["losses"] = [(6.0 if method == "malmen" else 6.3, 3), *texts]
            cell["perplexity"] = {"before": _perplexity([(5.7, 3)]), "after": _perplexity(cell["losses"])}
            cell["per_fact"]["locality"] = [0.5 if method == "malmen" else 0.25, None]
        winners, tables = best(results, Amount(4), "perplexity"), score_tables(results)
        if texts == [(0.0, 0)]:
            assert winners == []
            assert re.search(r"\| +7\.39 \|", tables) and "nan" not in tables and "[7.39" not in tables
            write_report(results)
            rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
            found = [row for row in rows if row["metric"] == "perplexity"]
            assert [(row["low"], row["high"]) for row in found] == [(None, None)] * 2
        else:
            assert winners == ["malmen", "mend"] and "[7.39" in tables
    assert best(results, Amount(4), "locality") == []


def test_report_of_facts_without_rephrases(tmp_path: Path) -> None:
    """It names what was measured and has no plot without points; NaN is null for readers of JSON."""
    results = results_of(
        {"malmen": {"edit_success": [0.5, 1.0]}, "mend": {"edit_success": [float("nan"), 1.0]}}, tmp_path
    )
    write_report(results)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- not beaten on all of edit success, by means: malmen" in report
    assert "tradeoff.png" not in report and not (tmp_path / "tradeoff.png").exists()
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [row["score"] for row in rows if row["metric"] == "edit_success"] == [0.75, None]


def test_report(done: tuple[Comparison, dict[str, Any], list[str]], tmp_path: Path) -> None:
    """Everything that was searched, won and measured is in the report, and the plots are there."""
    found, results, _ = done
    elsewhere = dataclasses.replace(found, output_dir=str(tmp_path))
    tables = write_report(Results.of(elsewhere, results))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert tables in report
    score = results["cells/malmen-3x4"]["scores"]["locality"]
    low, high = results["cells/malmen-3x4"]["intervals"]["locality"]
    assert f"{score:.3f} [{low:.3f}, {high:.3f}]" in tables.split("## 3 turns of 4 facts")[1]
    won = max(results["editors/ultraedit"]["trials"], key=lambda trial: trial["score"])["values"]
    assert f"Won: edit_lr {won['edit_lr']}, statistics {won['statistics']}." in report
    assert "Searched: edit_lr in [0.0001, 1.0], statistics in {'choices': ['following', 'frozen']}; 2 trials" in report
    for name in ("scores.png", "tradeoff.png", "costs.png"):
        assert f"]({name})" in report
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (row,) = [row for row in rows if (row["method"], row["n_facts"], row.get("metric")) == ("malmen", 10, "locality")]
    assert row["score"] == results["cells/malmen-10"]["scores"]["locality"] and row["before"] == 1.0


def test_recipe(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script with its own settings, on another model and other facts; jobs are done in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    recipe = importlib.import_module("compare")
    monkeypatch.setattr(comparison, "run_alone", perform)
    arguments = ["--model", home / "base", "--facts", home / "facts.jsonl", "--output-dir", tmp_path, "--methods"]
    arguments += ["ultraedit", "--sizes", 6, "--turns", 0, "--n-test-facts", 20, "--n-validation-facts", 12]
    content = yaml.safe_load(recipe.RECIPE.read_text(encoding="utf-8"))
    content["tuning"]["sizes"] = [12]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr(recipe, "RECIPE", tmp_path / "recipe.yaml")
    arguments += ["--config", tmp_path / "recipe.yaml", "--n-trials", 1]
    assert recipe.main([str(argument) for argument in arguments]) == 0
    output = capsys.readouterr().out
    assert "| ultraedit " in output and str(tmp_path / "report.md") in output
    result = json.loads((tmp_path / "cells" / "ultraedit-6.json").read_text(encoding="utf-8"))["result"]
    assert result["n_scored"] == 6 and result["perplexity"]["after"][0] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "memot"], r"argument --methods: invalid choice: 'memot'"),
        (["--config", "no.yaml"], r"^\S+: There is no file no.yaml. Give the path of a YAML recipe, such as \S+\n$"),
    ],
)
def test_recipe_says_what_is_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a traceback, as the command does."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("compare").main(arguments)
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_shipped_settings(tmp_path: Path) -> None:
    """The geography comparison is valid as it ships, and has every method."""
    found = load_comparison(ROOT / "recipes" / "compare-geography.yaml")
    assert set(found.methods) == set(comparison.METHODS)
    assert [amount.name for amount in found.amounts] == ["64", "256", "1024", "4096", "20x100"]
    for name, method in found.methods.items():
        assert bool(method.search) != comparison.METHODS[name].is_trained
    assert (ROOT / str(found.texts)).is_file()


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it does, and a command to copy; a bad size is one line."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["hf-malmen", "compare", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "hf-malmen compare --config recipes/compare-geography.yaml" in text and "goes on where it was" in text
    monkeypatch.setattr(sys, "argv", ["hf-malmen", "compare", "--sizes", "64,many"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == (
        "hf-malmen: --sizes is '64,many'; expected whole numbers separated by commas, such as 64,256."
    )


def test_peak_memory_counts(home: Path) -> None:
    """What was held for a moment is in the peak."""
    base = Base(Comparison(str(home / "base"), ""))
    before = base.peak_memory()["memory"]
    held = torch.ones(before // 4 + 2**26)  # four bytes each: more than the process ever had
    assert held.sum() > 0
    del held
    assert base.peak_memory()["memory"] > before + 2**26
