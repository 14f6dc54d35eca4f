"""What an edit does to ability that has nothing to do with its facts: perplexity on other text, and benchmarks."""

import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import base_model
from .batches import IGNORED, Tokenizer, TokenSequence
from .configuration import EditorConfig
from .edit import Edit
from .tracing import answer_logits, in_eval_mode, input_device

DEFAULT_BATCH_SIZE = 8
# Context enough for running text, and logits that fit: they take window x vocabulary numbers a sequence.
_MAX_LENGTH = 1024
# Windows read ahead, so that those of a batch are of similar length.
_WINDOWS = 512

_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_texts(source: Any, *, column: str = "text", **load_options: Any) -> list[str]:
    """Read texts from wherever they are.

    Args:
        source: a list of texts; a `datasets.Dataset`, or any rows with a column of texts; the path of a JSON, JSONL,
            CSV or Parquet file of rows; the path of any other file, which is one text; or the id of a data set on the
            Hub.
        column: the texts' column.
        load_options: of a Hub data set, for `datasets.load_dataset`: `name`, `split` (the default is `"train"`), ...

    Raises:
        ValueError: nothing there, no such column, or something other than text in it; options that do not apply.
        FileNotFoundError: no such file.
    """
    # Iterated over, these give names of splits or columns, which are texts too.
    if isinstance(source, Mapping) or hasattr(source, "iterrows"):
        raise ValueError(
            f"Texts come as a list of texts or of dicts; got a {type(source).__name__}. Of a data set with splits, "
            "give one; of a data frame, a column."
        )
    rows = source
    if isinstance(source, str | Path):
        path = Path(source)
        builder = _FILE_BUILDERS.get(path.suffix.lower())
        if path.is_file() and builder is None:
            rows = [path.read_text(encoding="utf-8-sig")]
        elif builder is not None and not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. Give the path of an existing file of texts.")
        elif path.is_dir() or path.suffix.lower() == ".txt":
            raise FileNotFoundError(f"{path} is not a file. Give the path of a file of texts, or a data set's id.")
        else:
            import datasets

            options: dict[str, Any] = {"data_files": str(path)} if builder else {}
            rows = datasets.load_dataset(builder or str(source), **{"split": "train"} | options | load_options)
            load_options = {}
    if load_options:
        raise ValueError(f"{', '.join(load_options)}: for data sets on the Hub, which this is not. Leave it out.")
    texts = []
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and column not in row:
            raise ValueError(f"Row {number} has no column {column!r}, only {', '.join(row)}. Pass column=...")
        text = row[column] if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise ValueError(f"Row {number} holds a {type(text).__name__}; expected a text.")
        texts.append(text)
    if not any(text.strip() for text in texts):
        raise ValueError("There are no texts to read. Give at least one that is not blank.")
    return texts


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_length: int | None = None,
    stride: int | None = None,
) -> float:
    """exp of the average of −log p over all tokens of all texts, each given what stands before it in its text.

    A text is read in windows of `max_length` tokens, `stride` apart. Each token is predicted once, in the first window
    that reaches it: with all its context in the first window, and with more than `max_length − stride` tokens of it in
    the others. The first token of a text is predicted only where the tokenizer puts one before it.
    Memory holds the logits of one batch, at the positions that are scored.

    Args:
        model: a causal language model, as before afterwards.
        tokenizer: the model's.
        texts: each on its own; no token sees another text.
        batch_size: windows a pass. Does not change the result.
        max_length: tokens a window. Defaults to what the model reads, and 1,024 at most.
        stride: tokens between the starts of two windows. Defaults to half of `max_length`; `max_length` itself is
            fastest and sees least context.

    Raises:
        ValueError: a model that is no causal language model; a window longer than the model reads; a stride that would
            leave tokens out; texts without a token to predict.
    """
    losses = text_losses(model, tokenizer, texts, batch_size=batch_size, max_length=max_length, stride=stride)
    mean = math.fsum(loss for loss, _ in losses) / sum(n_tokens for _, n_tokens in losses)
    return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_length: int | None = None,
    stride: int | None = None,
) -> list[tuple[float, int]]:
    """What `perplexity` averages: for each text, −log p summed over its predicted tokens, and how many those are.

    Arguments and errors as of `perplexity`.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"Perplexity of running text is what a causal language model has; got a {type(model).__name__}. Measure "
            "its edits on unrelated facts instead."
        )
    limit = base_model.max_length(model) or math.inf
    max_length = int(min(limit, _MAX_LENGTH)) if max_length is None else max_length
    stride = max(1, max_length // 2) if stride is None else stride
    if not 1 <= stride <= max_length <= limit:
        raise ValueError(
            f"stride is {stride} and max_length {max_length}; expected 1 <= stride <= max_length, of which the model "
            f"reads {limit} tokens at most."
        )
    tokenize = Tokenizer(tokenizer, EditorConfig())  # pads, and puts windows of a length together
    losses: list[list[float]] = []  # of each text, its windows' losses
    counts: list[int] = []

    def windows() -> Iterator[tuple[int, TokenSequence]]:
        for number, text in enumerate(texts):
            losses.append([])
            counts.append(0)
            for window in _windows(_token_ids(tokenizer, text), max_length, stride):
                yield number, window

    remaining = windows()
    with in_eval_mode(model), torch.no_grad(), logging.tqdm(unit=" tokens", leave=False) as bar:
        while ahead := list(islice(remaining, _WINDOWS)):
            for chosen, batch in tokenize.batches([window for _, window in ahead], batch_size):
                logits, targets = answer_logits(model, batch.to(input_device(model)))
                # Summed in double: a text of a million tokens is long for single precision.
                each = F.cross_entropy(logits, targets, reduction="none").double()
                sizes = [sum(label != IGNORED for label in ahead[i][1].labels) for i in chosen]
                for i, part in zip(chosen, each.split(sizes), strict=True):
                    number = ahead[i][0]
                    losses[number].append(float(part.sum()))
                    counts[number] += len(part)
                bar.update(len(targets))
    if not any(counts):
        raise ValueError("The texts have no token that another one stands before, so there is nothing to predict.")
    return [(math.fsum(of_text), n_tokens) for of_text, n_tokens in zip(losses, counts, strict=True)]


def known_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The `TaskManager` of `lm-eval`, which knows the tasks; arguments and errors as of `run_harness`."""
    if not tasks:
        raise ValueError("No tasks given. Name at least one that lm-eval knows, such as 'hellaswag'.")
    _, _, manager = _harness()
    known = manager(include_path=str(include_path) if include_path is not None else None)
    # Patterns, as on the command line of lm-eval: "mmlu_*".
    missing = [task for task in tasks if not known.match_tasks([task])]
    if missing:
        raise ValueError(
            f"lm-eval has no task {', '.join(map(repr, missing))}. `lm-eval ls tasks` lists those that there are; for "
            "your own, pass the folder of their files as include_path."
        )
    return known


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    include_path: str | Path | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Run tasks of EleutherAI's `lm-eval` on a live model, with the edits in force on it.

    Args:
        model: as before afterwards.
        tokenizer: the model's, as before afterwards.
        tasks: names that `lm-eval` knows, such as `["hellaswag", "arc_easy"]`, or of tasks in `include_path`.
        limit: use only the first examples of each task, this many, or this share of them if below 1.
        num_fewshot: examples in the prompt; None leaves it to the task.
        batch_size: sequences a pass.
        include_path: a folder with task files of your own.
        options: anything else that `lm_eval.simple_evaluate` takes, such as `apply_chat_template`.

    Returns:
        {task or group: {metric: value}}, standard errors included. A metric that a task measures behind a filter is
        named `metric,filter`, as `lm-eval` does.

    Raises:
        ImportError: `lm-eval` is not installed.
        ValueError: no task, or one that `lm-eval` does not know.
    """
    known = known_tasks(tasks, include_path)
    evaluate, wrapper, _ = _harness()
    with in_eval_mode(model), _random_state_kept():  # it seeds all generators of the process
        report = evaluate(
            # A copy of the tokenizer, which is given a padding token where it has none.
            model=wrapper(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size),
            tasks=known.match_tasks(list(tasks)),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=known,
            **{"log_samples": False} | options,
        )
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in results.items()
            if isinstance(value, int | float) and "," in name  # beside scores stand an alias and counts
        }
        for task, results in report["results"].items()
    }


def measure_side_effects(
    model: PreTrainedModel,
    edit: Edit,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Any = None,
    tasks: Sequence[str] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_length: int | None = None,
    stride: int | None = None,
    **harness_options: Any,
) -> dict[str, float]:
    """Perplexity on texts, and tasks of `lm-eval`, before and after `edit`. The model is as before afterwards.

    Args:
        model: the live base model.
        edit: not in force on it, such as `EditorModel.make_edit` returns.
        tokenizer: the model's.
        texts: anything `load_texts` takes, that the edit has nothing to do with; None measures no perplexity.
        tasks: as in `run_harness`; empty runs none.
        batch_size: sequences a pass.
        max_length, stride: as in `perplexity`.
        harness_options: `limit`, `num_fewshot`, `include_path`, ..., as in `run_harness`.

    Returns:
        `perplexity`, and `task/metric` for every task and metric, after the edit; with `_before` appended, the value
        before it; with `_change` appended, the difference between the two.

    Raises:
        ValueError: neither texts nor tasks; and as in `perplexity` and `run_harness`.
        ImportError: tasks without `lm-eval`, before anything is measured.
        EditStateError: the edit is in force.
    """
    if texts is None and not tasks:
        raise ValueError("Nothing to measure. Give texts for perplexity, tasks for lm-eval, or both.")
    edit.require_lifted()
    if tasks:
        _harness()
    loaded = None if texts is None else load_texts(texts)

    def measure() -> dict[str, float]:
        found = {}
        if loaded is not None:
            windows = {"max_length": max_length, "stride": stride}
            found["perplexity"] = perplexity(model, tokenizer, loaded, batch_size=batch_size, **windows)
        if tasks:
            report = run_harness(model, tokenizer, tasks, batch_size=batch_size, **harness_options)
            found |= {f"{task}/{name}": value for task, scores in report.items() for name, value in scores.items()}
        return found

    before = measure()
    with edit.applied_to(model, on_fingerprint_mismatch="ignore"):
        after = measure()
    changes = {f"{name}_change": value - before[name] for name, value in after.items()}
    return after | {f"{name}_before": value for name, value in before.items()} | changes


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Not verbose: it would warn of texts longer than the model reads, which are read in windows.
    return list(tokenizer(text, verbose=False)["input_ids"])


def _windows(token_ids: Sequence[int], max_length: int, stride: int) -> Iterator[TokenSequence]:
    """The windows of one text; each labels the tokens that none before it has predicted."""
    last = len(token_ids) - 1  # read nothing after the token before the last
    done = 0
    for start in range(0, last, stride):
        stop = min(start + max_length, last)
        labels = [*[IGNORED] * (done - start), *token_ids[done + 1 : stop + 1]]
        yield TokenSequence(tuple(token_ids[start:stop]), tuple(labels))
        done = stop
        if done == last:
            return


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """What is drawn within the context changes nothing of what is drawn after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _harness() -> tuple[Any, Any, Any]:
    """`simple_evaluate`, `HFLM` and `TaskManager` of `lm-eval`, which takes seconds to import and is optional."""
    try:
        harness, models, tasks = map(import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    except ImportError as error:
        raise ImportError(
            f"Tasks are run by lm-eval, which cannot be imported ({error}). Install it with "
            "pip install 'hf-malmen[harness]'."
        ) from error
    return harness.simple_evaluate, models.HFLM, tasks.TaskManager
