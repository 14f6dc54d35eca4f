"""What one process of a comparison does: python -m hf_malmen.comparison_job REQUEST

Started by `comparison.run_alone`, which keeps a pipe open for as long as somebody waits for the result.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .base_model import load_tokenizer, tokenizer_for
from .batches import Tokenizer
from .comparison import FACTS_FOLDER, Job, asked, digest_of, evaluated, write_json
from .comparison_settings import WHOLE_FIELDS, Amount, Comparison, comparison_from, require_shared_format
from .configuration import METHODS, EditorConfig
from .edit import Edit
from .errors import NumericalError
from .evaluation import Answer, Evaluation, Pair, answer_facts, measure_edit
from .facts import Fact, load_facts
from .modeling import EditorModel
from .scoring import bootstrap_intervals
from .side_effects import load_texts, text_losses
from .tasks import load_base

TUNED_ON = ("edit_success", "generalization", "locality")


def main(request: Path) -> None:
    """Do the job of a request file."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    content = json.loads(request.read_text(encoding="utf-8"))
    perform(Job(**content["job"]), comparison_from(content["comparison"]))


def perform(job: Job, comparison: Comparison) -> None:
    """Do a job in this process, and write its result.

    Raises:
        ValueError: the facts in the folder are not those that it was planned with.
    """
    for split, digest in job.facts.items():
        if digest_of(_facts(comparison, split)) != digest:
            raise ValueError(
                f"{Path(job.folder) / FACTS_FOLDER / split}.jsonl does not hold the facts that this comparison wrote "
                "there. Start it again, in a folder that nothing else writes to."
            )
    set_seed(comparison.seed)
    base = Base(comparison)
    do = {"before": ask_before, "editor": make_editor, "cell": run_cell}[job.kind]
    job.write(do(base, comparison, job))


class Base:
    """The base model as a job uses it.

    Attributes:
        model: the live model, on the accelerator if there is one.
        tokenizer: its tokenizer.
        device: where the model is.
    """

    def __init__(self, comparison: Comparison) -> None:
        settings = comparison.prompt_format
        hub = {"revision": settings.base_model_revision or "main"}
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        loaded: Any = load_base(comparison.base_model, settings.task_type, dtype=comparison.dtype, **hub)
        self.model: PreTrainedModel = loaded.to(self.device)
        self.tokenizer = load_tokenizer(comparison.base_model, **hub)

    def peak_memory(self) -> dict[str, int]:
        """Most bytes that this process has held so far: in memory, and on the accelerator if there is one."""
        found = {"memory": _peak_of_process()}
        if self.device.type == "cuda":
            found["accelerator"] = torch.cuda.max_memory_allocated(self.device)
        return found


def ask_before(base: Base, comparison: Comparison, job: Job) -> dict[str, Any]:
    """What the unedited model answers to all that any cell asks, and its losses on the unrelated texts."""
    began = time.perf_counter()
    tokenize = tokenizer_for(base.model, comparison.prompt_format, base.tokenizer)
    forced: dict[int, Fact] = {}
    freely: dict[int, Fact] = {}
    test = _facts(comparison, "test")
    for amount in comparison.amounts:
        numbers = evaluated(comparison, amount)
        chosen = {number: asked(comparison, test[number], number) for number in numbers}
        forced |= chosen
        freely |= {number: chosen[number] for number in numbers[: comparison.evaluation.max_generated]}
    size = comparison.evaluation.batch_size
    answers = answer_facts(base.model, list(forced.values()), tokenize, batch_size=size)
    answers |= answer_facts(base.model, list(freely.values()), tokenize, batch_size=size, generate=True)
    return {
        "answers": [[*pair, *vars(answer).values()] for pair, answer in answers.items()],
        "losses": _losses(base, comparison),
        "environment": {
            "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "parameters": base.model.num_parameters(),
        },
        "summary": f"{len(answers)} answers",
        "seconds": time.perf_counter() - began,
    }


def make_editor(base: Base, comparison: Comparison, job: Job) -> dict[str, Any]:
    """One method's editor: given, trained, or tuned; saved beside the job's file."""
    method = Path(job.name).name
    folder = job.path.with_suffix("")
    settings = comparison.methods[method]
    began = time.perf_counter()
    trials: list[dict[str, Any]] = []
    if settings.editor_folder is not None:
        editor = EditorModel.from_pretrained(settings.editor_folder)
        require_shared_format(editor.config, method, comparison)  # the folder may be another than when it was planned
        editor.check_base(base.model)
        how = f"given: {settings.editor_folder}"
    elif METHODS[method].is_trained:
        editor = _trained(base, comparison, job, method)
        how = "trained"
    else:
        made = Untrained(base, comparison, method)
        trials = _trials(made, job)
        best = max(trials, key=lambda trial: trial["score"])
        editor = made.editor(best["values"])
        how = f"best of {len(trials)} trials" if settings.search else "not tuned"
    if folder.exists():
        shutil.rmtree(folder)
    editor.save_pretrained(folder)
    return {
        "how": how,
        "summary": how,
        "trials": trials,
        "config": {name: value for name, value in editor.config.to_diff_dict().items() if name != "module_shapes"},
        "n_parameters": editor.num_parameters(),
        "seconds": time.perf_counter() - began,
    }


def run_cell(base: Base, comparison: Comparison, job: Job) -> dict[str, Any]:
    """Edit, with the seconds and the memory that takes, and measure."""
    amount = Amount(job.settings["n_facts"], job.settings["facts_per_turn"])
    made, before = (json.loads((Path(job.folder) / f"{name}.json").read_text()) for name in (job.needs[1], "before"))
    editor = _placed(EditorModel.from_pretrained(Path(job.folder) / job.needs[1]), base)
    test = _facts(comparison, "test")[: amount.n_facts]
    loaded = base.peak_memory()
    began = time.perf_counter()
    turns = {"facts_per_turn": amount.facts_per_turn, "accumulate": job.settings.get("accumulate", False)}
    edit = editor.apply(base.model, test, base.tokenizer, batch_size=comparison.evaluation.batch_size, **turns)
    _wait(base.device)
    seconds, peak = time.perf_counter() - began, base.peak_memory()
    edit.undo()

    answers = {
        (prompt, expected): Answer(tuple(ids), predicted, log_probability, text)
        for prompt, expected, ids, predicted, log_probability, text in before["result"]["answers"]
    }
    numbers = evaluated(comparison, amount)
    facts = [asked(comparison, test[number], number) for number in numbers]
    tokenize = editor.tokenizer_for(base.model, base.tokenizer)
    result = _measured(base, comparison, edit, facts, tokenize, answers)
    result |= {"fact_numbers": numbers, "seconds": seconds, "peak_memory": peak, "memory_before_edit": loaded}
    if before["result"]["losses"] is not None:
        with edit.applied_to(base.model, on_fingerprint_mismatch="ignore"):
            after = _losses(base, comparison)
        result["perplexity"] = {"before": _perplexity(before["result"]["losses"]), "after": _perplexity(after)}
        result["losses"] = after
    return result | {"made": made["result"]["how"]}


def _measured(
    base: Base,
    comparison: Comparison,
    edit: Edit,
    facts: Sequence[Fact],
    tokenize: Tokenizer,
    answers: Mapping[Pair, Answer],
) -> dict[str, Any]:
    """Scores, intervals, and scores fact by fact: teacher-forced of all facts, generated of the first of them."""
    settings: dict[str, Any] = {
        "batch_size": comparison.evaluation.batch_size,
        "before": answers,
        "seed": comparison.seed,
    }
    # Answers before the edit that hold a text would be scored by it: these facts are scored teacher-forced.
    unspoken = {pair: dataclasses.replace(answer, text=None) for pair, answer in answers.items()}
    found = [measure_edit(base.model, edit, facts, tokenize, **settings | {"before": unspoken})]
    if n_generated := min(len(facts), comparison.evaluation.max_generated):
        found.append(measure_edit(base.model, edit, facts[:n_generated], tokenize, generate=True, **settings))
    result: dict[str, Any] = {"scores": {}, "intervals": {}, "per_fact": {}, "n_scored": len(facts)}
    for evaluation in found:
        for name in evaluation.scores:
            if name not in result["scores"]:  # the teacher-forced scores of all facts, not those of the first
                result["scores"][name] = evaluation.scores[name]
                result["intervals"][name] = evaluation.intervals[name]
                result["per_fact"][name] = list(evaluation.per_fact[name])
    return result | {"n_generated": n_generated}


def _trained(base: Base, comparison: Comparison, job: Job, method: str) -> EditorModel:
    """A new editor after training; what a killed job's training has saved is gone on from."""
    from .training import EditorTrainer  # seconds to import, and only this job trains
    from .training_arguments import EditorTrainingArguments

    folder = job.path.with_name(f"training-{method}-{job.fingerprint[:12]}")
    settings: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": comparison.seed,
    }
    settings |= {**comparison.training, **comparison.methods[method].training}
    args = EditorTrainingArguments(**settings | {"output_dir": str(folder)})
    set_seed(args.seed)
    editor = EditorModel.from_base(base.model, EditorConfig(**comparison.editor_settings(method)))
    if METHODS[method].key_covariance is not None:
        _read_covariance(editor, base, comparison)
    trainer = EditorTrainer(editor, base.model, args, _facts(comparison, "train"), None, base.tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    if folder.is_dir():
        shutil.rmtree(folder)
    return editor


class Untrained:
    """Editors of a method without training: what they read beforehand is read once, and copied into each.

    Args:
        base, comparison, method: the job's.
    """

    def __init__(self, base: Base, comparison: Comparison, method: str) -> None:
        self.base, self.comparison, self.method = base, comparison, method
        self._read: dict[Any, dict[str, torch.Tensor]] = {}

    def editor(self, values: Mapping[str, Any]) -> EditorModel:
        """One with the method's settings, of which `values` replaces some; with statistics and covariance."""
        config = EditorConfig(**{**self.comparison.editor_settings(self.method), **values})
        editor = _placed(EditorModel.from_base(self.base.model, config), self.base)
        buffers = dict(editor.named_buffers())
        # Layers of one shape have buffers of one shape, so these alone do not tell whose they are, nor of which tokens.
        shapes = tuple((name, buffer.shape) for name, buffer in buffers.items())
        key = tuple(editor.module_names), editor.config.traced_tokens, shapes
        if key not in self._read:
            untouched = {name: buffer.clone() for name, buffer in buffers.items()}
            if n_facts := self.comparison.methods[self.method].warm_up_facts:
                editor.warm_up(self.base.model, _facts(self.comparison, "train")[:n_facts], self.base.tokenizer)
            if METHODS[self.method].key_covariance is not None:
                _read_covariance(editor, self.base, self.comparison)
            # Only what was read: η and λ of these methods, which trials differ in, are buffers too.
            read = dict(editor.named_buffers())
            self._read[key] = {n: b.clone() for n, b in read.items() if not torch.equal(b, untouched[n])}
        for name, buffer in self._read[key].items():
            buffers[name].copy_(buffer)
        return editor


def _trials(made: Untrained, job: Job) -> list[dict[str, Any]]:
    """Tries settings on validation facts; those that a killed job has tried are not tried again."""
    base, comparison, method = made.base, made.comparison, made.method
    search, tuning = comparison.methods[method].search, comparison.tuning
    if not search:
        return [{"values": {}, "score": math.nan}]
    path = job.path.with_name(f"{method}-trials.json")
    kept = json.loads(path.read_text()) if path.is_file() else {}
    trials: list[dict[str, Any]] = kept["trials"] if kept.get("fingerprint") == job.fingerprint else []
    facts = _facts(comparison, "validation")[: max(tuning.sizes)]
    # One rephrase a fact, as in the cells.
    facts = [dataclasses.replace(fact, rephrases=fact.rephrases[:1]) for fact in facts]
    answers: dict[Pair, Answer] = {}
    for values in drawn(search, tuning.n_trials, comparison.seed)[len(trials) :]:
        began = time.perf_counter()
        editor = made.editor(values)
        tokenize = editor.tokenizer_for(base.model, base.tokenizer)
        settings: dict[str, Any] = {"batch_size": comparison.evaluation.batch_size}
        answers = answers or answer_facts(base.model, facts, tokenize, **settings)
        by_size, error = {}, None
        for size in tuning.sizes:
            try:
                edit = editor.apply(base.model, facts[:size], base.tokenizer)
            except NumericalError as raised:  # too large a step, say: a setting that does not work is a result
                error = str(raised)
                continue
            edit.undo()
            found: Evaluation = measure_edit(base.model, edit, facts[:size], tokenize, before=answers, **settings)
            by_size[str(size)] = {name: found.scores[name] for name in TUNED_ON if name in found.scores}
        score = sum(harmonic_mean(list(scores.values())) for scores in by_size.values()) / len(tuning.sizes)
        seconds = time.perf_counter() - began
        trials.append({"values": values, "score": score, "by_size": by_size, "error": error, "seconds": seconds})
        write_json(path, {"fingerprint": job.fingerprint, "trials": trials})
    return trials


def drawn(search: Mapping[str, Any], n_trials: int, seed: int) -> list[dict[str, Any]]:
    """Settings to try: a Latin hypercube over the ranges, so that each range is covered evenly however few there are.

    Args:
        search: as of `MethodSettings`.
        n_trials: how many.
        seed: of the drawing.
    """
    columns: dict[str, list[Any]] = {}
    for name, values in search.items():
        generator = random.Random(f"{seed} {name}")
        if isinstance(values, Mapping):
            column = [values["choices"][i % len(values["choices"])] for i in range(n_trials)]
        else:
            low, high = map(math.log, values)
            column = [math.exp(low + (high - low) * (i + generator.random()) / n_trials) for i in range(n_trials)]
            column = [round(value) if name in WHOLE_FIELDS else float(f"{value:.3g}") for value in column]
        generator.shuffle(column)
        columns[name] = column
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def harmonic_mean(values: Sequence[float]) -> float:
    """0 where one of them is 0 or no number, or where there is none."""
    return len(values) / sum(1 / value for value in values) if values and all(v > 0 for v in values) else 0.0


def _placed(editor: EditorModel, base: Base) -> EditorModel:
    placed: Any = editor
    return placed.to(base.device)


def _facts(comparison: Comparison, split: str) -> list[Fact]:
    return load_facts(Path(comparison.output_dir) / FACTS_FOLDER / f"{split}.jsonl")


def _ordinary_texts(comparison: Comparison) -> list[str]:
    """The texts whose keys an edit should leave where they are; without any, true sentences of the training facts."""
    if comparison.covariance_texts is not None:
        return load_texts(comparison.covariance_texts)
    texts = []
    for fact in _facts(comparison, "train"):
        if fact.ground_truth:
            texts.append(f"{fact.prompt} {fact.ground_truth}")
        if fact.unrelated_prompt and fact.unrelated_answer:
            texts.append(f"{fact.unrelated_prompt} {fact.unrelated_answer}")
    if not texts:
        raise ValueError(
            "The training facts have no true answers (ground_truth, or unrelated_prompt with unrelated_answer), and "
            "this method reads ordinary text beforehand. Give some: covariance_texts."
        )
    return texts


def _read_covariance(editor: EditorModel, base: Base, comparison: Comparison) -> None:
    texts = _ordinary_texts(comparison)
    editor.collect_covariance(base.model, texts, base.tokenizer, n_tokens=comparison.n_covariance_tokens)


def _losses(base: Base, comparison: Comparison) -> list[tuple[float, int]] | None:
    if comparison.texts is None:
        return None
    return text_losses(base.model, base.tokenizer, load_texts(comparison.texts))


def _perplexity(losses: Sequence[tuple[float, int]] | None) -> list[float]:
    """Perplexity, and its 95 % interval by bootstrap over texts; NaN for its ends where fewer than two were read."""
    counts = np.array([[n_tokens] for _, n_tokens in losses or ()], dtype=np.float64)
    means = np.array([[loss / max(1, n_tokens)] for loss, n_tokens in losses or ()])
    mean = float((means * counts).sum() / counts.sum())
    # Of a model that overflows there is nothing to resample; one text does not say how far others lie.
    ends = [math.nan, math.nan]
    if math.isfinite(mean) and (counts > 0).sum() > 1:
        ends = bootstrap_intervals(means, counts)[0].tolist()
    with np.errstate(over="ignore"):  # infinite, then
        return [float(np.exp(value)) for value in (mean, *ends)]


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; `getrusage` also counts the one that started it
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # below Python's buffers, whose lock must be free when this process ends
    os._exit(1)  # at once: the main thread may be inside a long computation


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
