"""python benchmarks/smollm2.py          (or: make bench)

SmolLM2-135M on this machine: seconds a training step and facts a second of `apply`, each beside its floor measured in
the same run, and peak memory against the number of facts. The floor is what no implementation of the method avoids: a
plain forward pass over each sequence, and a backward pass down to the first edited layer, in the same batches.

Every measurement runs in a process of its own. Machines are noisy: read the ratios.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, Fact, load_facts
from hf_malmen.batches import IGNORED, TokenSequence
from hf_malmen.tables import table

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import geography
import smollm2

BATCH = 64
STEP_FACTS = 64
RANK = 512


def load(folder: Path, n_facts: int, dtype: str) -> tuple[Any, Any, list[Fact], EditorModel]:
    """The base model, its tokenizer, geography facts, and an untrained editor for its last six blocks."""
    facts_file = folder / "facts" / "train.jsonl"
    if not facts_file.is_file():
        geography.write(geography.build(), folder / "facts")
    base = smollm2.save(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    editor = EditorModel.from_base(model, EditorConfig(rank=RANK, edit_lr=1e-3, n_preserved_keys=1024))
    return model, tokenizer, load_facts(facts_file)[:n_facts], editor


class Floor:
    """Plain passes over token sequences, with nothing of this package in them but the batches."""

    def __init__(self, editor: EditorModel, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenize = model, editor.tokenizer_for(model, tokenizer)
        self.weight = model.get_submodule(editor.module_names[0]).weight

    def passes(self, sequences: Sequence[TokenSequence], backward: bool) -> None:
        """Forward over each sequence and, with `backward`, backward down to the first edited layer."""
        self.model.requires_grad_(False)
        self.weight.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            for _, batch in self.tokenize.batches(sequences, BATCH):
                kept = (batch.labels != IGNORED).any(0).nonzero().squeeze(-1)
                logits = self.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
                    logits_to_keep=kept,
                    use_cache=False,
                ).logits.float()
                loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, kept].flatten(), reduction="sum")
                if backward:
                    loss.backward()
        self.weight.grad = None


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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

    floor = Floor(editor, model, tokenizer)
    chosen = facts[STEP_FACTS : 2 * STEP_FACTS]
    edits = [floor.tokenize(fact.prompt, fact.target) for fact in chosen]
    rephrases = [floor.tokenize(fact.rephrases[0], fact.target) for fact in chosen]
    unrelated = [floor.tokenize(str(fact.unrelated_prompt), str(fact.unrelated_answer)) for fact in chosen]

    def passes() -> None:
        floor.passes(edits, backward=True)
        floor.passes(rephrases, backward=True)
        floor.passes(unrelated, backward=False)
        floor.passes(unrelated, backward=True)

    return {"step, new facts": first, "step, facts seen before": again, "floor": seconds(passes, repeats)}


def measure_apply(folder: Path, dtype: str, n_facts: int, repeats: int) -> dict[str, float]:
    """`make_edit` for `n_facts`, its floor, and the most memory the process has held."""
    model, tokenizer, facts, editor = load(folder, n_facts, dtype)
    editor.make_edit(model, facts[:BATCH], tokenizer)  # warm-up
    result = {"apply": seconds(lambda: editor.make_edit(model, facts, tokenizer, batch_size=BATCH), repeats)}
    result["peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    floor = Floor(editor, model, tokenizer)
    sequences = [floor.tokenize(fact.prompt, fact.target) for fact in facts]
    result["floor"] = seconds(lambda: floor.passes(sequences, backward=True), repeats)
    return result


def in_new_process(*arguments: str) -> dict[str, float]:
    """Run this file for one measurement, and read its result."""
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_all(folder: Path, dtypes: Sequence[str], sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure everything, print the tables, and return the numbers."""
    results: dict[str, Any] = {"environment": environment()}
    common = ["--output-dir", str(folder), "--repeats", str(repeats)]
    print(f"{results['environment']}\n")
    for dtype in dtypes:
        step = in_new_process("--one", "step", "--dtypes", dtype, *common)
        rows = [[name, f"{value:.2f}", f"{value / step['floor']:.2f}"] for name, value in step.items()]
        print(f"{table([f'training, {STEP_FACTS} facts, {dtype}', 'seconds', 'of the floor'], rows)}\n", flush=True)
        applies = {}
        for size in sizes:
            applies[size] = in_new_process("--one", "apply", "--dtypes", dtype, "--sizes", str(size), *common)
        rows = []
        for n, a in applies.items():
            speeds = [f"{n / a['apply']:.0f}", f"{n / a['floor']:.0f}", f"{a['floor'] / a['apply']:.2f}"]
            rows.append([str(n), f"{a['apply']:.2f}", *speeds, f"{a['peak GiB']:.2f}"])
        header = [f"apply, facts, {dtype}", "seconds", "facts/s", "floor's facts/s", "share of the floor", "peak GiB"]
        print(f"{table(header, rows)}\n", flush=True)
        results[dtype] = {"step": step, "apply": applies}
    return results


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "hf_malmen": hf_malmen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the model and facts are")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="precisions of the base model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="facts to apply at once")
    parser.add_argument("--repeats", type=int, default=3, help="the median of this many is taken")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--one", choices=["step", "apply"], help="measure one thing in this process, print it as JSON")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one == "step":
        print(json.dumps(measure_step(options.output_dir, options.dtypes[0], options.repeats)))
    elif options.one == "apply":
        print(json.dumps(measure_apply(options.output_dir, options.dtypes[0], options.sizes[0], options.repeats)))
    else:
        results = run_all(options.output_dir, options.dtypes, options.sizes, options.repeats)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
