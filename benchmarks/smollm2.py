"""python benchmarks/smollm2.py

Seconds of a training step of 64 facts on SmolLM2-135M beside the floor (see floor.py) measured in the same run: on
facts never seen before, and on the same facts again. Machines are noisy: read the ratios.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from common import environment, in_new_process, seconds, write_json
from floor import Floor
from real import load
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorTrainer, EditorTrainingArguments
from hf_malmen.tables import table

BATCH = 64
STEP_FACTS = 64


def measure_step(folder: Path, dtype: str, repeats: int) -> dict[str, float]:
    """A training step of 64 facts never seen before, the same facts again, and the floor of both."""
    model, tokenizer, facts, editor = load(folder, STEP_FACTS * (repeats + 1), dtype)
    arguments = EditorTrainingArguments(
        output_dir=str(folder / "bench"), lm_batch_size=BATCH, report_to="none", disable_tqdm=True
    )
    trainer = EditorTrainer(editor, model, arguments, facts, None, tokenizer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(number: int) -> None:
        chosen = facts[number * STEP_FACTS : (number + 1) * STEP_FACTS]
        trainer.training_step(editor, {"facts": chosen})
        torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step(0)  # warm-up
    numbers = iter(range(1, repeats + 1))
    first = seconds(lambda: step(next(numbers)), repeats)
    numbers = iter(range(1, repeats + 1))
    again = seconds(lambda: step(next(numbers)), repeats)

    floor = Floor(model, editor.tokenizer_for(model, tokenizer), editor.module_names[0], BATCH)
    chosen = facts[STEP_FACTS : 2 * STEP_FACTS]
    edits = [floor.tokenize(fact.prompt, fact.target) for fact in chosen]
    rephrases = [floor.tokenize(fact.rephrases[0], fact.target) for fact in chosen]
    unrelated = [floor.tokenize(str(fact.unrelated_prompt), str(fact.unrelated_answer)) for fact in chosen]

    def passes() -> None:
        for sequences in (edits, rephrases, unrelated):
            floor.passes(sequences)
        floor.passes(unrelated, backward=False)

    return {"step, new facts": first, "step, facts seen before": again, "floor": seconds(passes, repeats)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the model and facts are")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="precisions of the base model")
    parser.add_argument("--repeats", type=int, default=3, help="the median of this many is taken")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one:
        print(json.dumps(measure_step(options.output_dir, options.dtypes[0], options.repeats)))
        return
    results: dict[str, Any] = {"environment": environment()}
    print(f"{results['environment']}\n")
    for dtype in options.dtypes:
        common = ["--output-dir", str(options.output_dir), "--repeats", str(options.repeats)]
        results[dtype] = step = in_new_process(__file__, "--one", "--dtypes", dtype, *common)
        rows = [[name, f"{value:.2f}", f"{value / step['floor']:.2f}"] for name, value in step.items()]
        print(f"{table([f'training, {STEP_FACTS} facts, {dtype}', 'seconds', 'of the floor'], rows)}\n", flush=True)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
