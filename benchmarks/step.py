"""python benchmarks/step.py

Seconds of a training step of 64 facts on SmolLM2-135M, six layers, rank 512: on facts never seen before (the first
epoch), and on the same facts and prompts again (later epochs), beside the floor (see floor.py) measured in the same run
and the same batches. And where the time goes: a profile of one step of each kind. Machines are noisy: read the ratios.

With more rephrases a fact than are drawn, a second epoch is still new in part; the later epochs here have seen all.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, in_new_process, plot_bars, seconds, write_json
from floor import Floor
from real import load
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorTrainer, EditorTrainingArguments
from hf_malmen.tables import table

STEP_FACTS = 64
N_PROFILED = 8
KINDS = ("first epoch", "later epochs")


def measure(folder: Path, dtype: str, batch_size: int, preserved: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step by kind, the floor, and the profiles."""
    model, tokenizer, facts, editor = load(folder, STEP_FACTS * (repeats + 2), dtype, preserved)
    arguments = EditorTrainingArguments(
        output_dir=str(folder / "bench"), lm_batch_size=batch_size, report_to="none", disable_tqdm=True
    )
    trainer = EditorTrainer(editor, model, arguments, facts, None, tokenizer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(number: int) -> None:
        trainer.training_step(editor, {"facts": facts[number * STEP_FACTS : (number + 1) * STEP_FACTS]})
        torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step(0)  # warm-up
    found: dict[str, Any] = {"profile": {}}
    for kind in KINDS:
        numbers = iter(range(1, repeats + 1))
        found[kind] = seconds(lambda numbers=numbers: step(next(numbers)), repeats)
    for kind in KINDS:
        found["profile"][kind] = profiled(lambda: step(repeats + 1))

    floor = Floor(model, trainer.tokenize, editor.module_names[0], batch_size)
    chosen = facts[STEP_FACTS : 2 * STEP_FACTS]
    edits = [floor.tokenize(fact.prompt, fact.target) for fact in chosen]
    rephrases = [floor.tokenize(fact.rephrases[0], fact.target) for fact in chosen]
    unrelated = [floor.tokenize(str(fact.unrelated_prompt), str(fact.unrelated_answer)) for fact in chosen]

    def passes() -> None:
        for sequences in (edits, rephrases, unrelated):
            floor.passes(sequences)
        floor.passes(unrelated, backward=False)

    return found | {"floor": seconds(passes, repeats)}


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """{operation and its dtype: share of the step's processor time}, the largest ones."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        step()
    times: dict[str, float] = {}
    for event in run.events():
        name = event.name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
        if name == "mm" and event.input_shapes:
            # Told apart by what only one of them has: the vocabulary, and the hyper-network's features and rank.
            (rows, inner), (_, columns) = event.input_shapes[:2]
            name = f"mm {'vocabulary' if max(rows, inner, columns) > 16384 else f'{inner} x {columns}'}"
        times[name] = times.get(name, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])[:N_PROFILED]
    return {name: value / total for name, value in largest}


def report(found: dict[str, Any], title: str) -> str:
    """The tables."""
    names = [*KINDS, "floor"]
    rows = [[name, f"{found[name]:.2f}", f"{found[name] / found['floor']:.2f}"] for name in names]
    parts = [table([title, "seconds", "of the floor"], rows)]
    for kind, shares in found["profile"].items():
        parts.append(table([f"where a step of the {kind} goes", "share"], [[n, f"{s:.0%}"] for n, s in shares.items()]))
    return "\n\n".join(parts)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the model and facts are")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="precisions of the base model")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a pass of the language model")
    parser.add_argument("--preserved", type=int, default=0, help="keys to preserve; the paper has none")
    parser.add_argument("--repeats", type=int, default=3, help="the median of this many is taken")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also write a plot to this image")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one:
        settings = options.batch_size, options.preserved, options.repeats
        print(json.dumps(measure(options.output_dir, options.dtypes[0], *settings)))
        return
    results: dict[str, Any] = {"environment": environment()}
    print(f"{results['environment']}\n")
    same = ["--output-dir", options.output_dir, "--batch-size", options.batch_size, "--preserved", options.preserved]
    for dtype in options.dtypes:
        arguments = ["--one", "--dtypes", dtype, "--repeats", options.repeats, *same]
        results[dtype] = in_new_process(__file__, *map(str, arguments))
        print(f"{report(results[dtype], f'training, {STEP_FACTS} facts, {dtype}')}\n", flush=True)
    if options.json:
        write_json(options.json, results)
    if options.plot:
        bars = {dtype: [results[dtype][name] for name in (*KINDS, "floor")] for dtype in options.dtypes}
        plot_bars(options.plot, (*KINDS, "floor"), bars, "seconds a step of 64 facts")


if __name__ == "__main__":
    main()
