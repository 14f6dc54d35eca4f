"""python benchmarks/cost.py

The formulas of docs/cost.md beside what is measured on SmolLM2-135M: operations of `make_edit` and of a training step
beside PyTorch's own count, seconds of the least squares at the speeds of a float64 product and of another solve, and
its memory. Then what the formulas say of a million facts on a 70B model. The aim is a ratio of predicted to measured
between 0.8 and 1.25.
"""

import argparse
import dataclasses
import math
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment, seconds, write_json
from real import load
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorModel, EditorTrainer, EditorTrainingArguments
from hf_malmen.hypernetwork import HyperNetwork
from hf_malmen.least_squares import RidgeLeastSquares, state_bytes
from hf_malmen.networks import DEFAULT_EDITOR_BATCH_SIZE
from hf_malmen.tables import table
from hf_malmen.tracing import pass_cost

BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """What the cost depends on, with the names of docs/cost.md.

    Attributes:
        weights: P, of all blocks.
        top: P_top, of the blocks above the one of the first edited layer.
        vocabulary: h · V.
        layers: L, how many layers are edited.
        key_size, value_size: k and v of each.
        rank, blocks: R and B of the hyper-network.
        facts: N.
        tokens: T, read a fact, padding included.
        rows: r, traced tokens a fact, which are its answer's.
        preserved: m.
    """

    weights: float
    top: float
    vocabulary: float
    layers: int
    key_size: int
    value_size: int
    rank: int
    blocks: int
    facts: int
    tokens: float
    rows: float
    preserved: int = 0

    @property
    def n_solved(self) -> float:
        """n, rows of the least squares of a layer."""
        return self.facts * self.rows + self.preserved


def apply_flops(s: Sizes) -> dict[str, float]:
    """Operations of `make_edit`, by the precision that they are in: the base model's, float32, and float64."""
    model = 2 * s.facts * (s.tokens * (s.weights + s.top) + 2 * s.rows * s.vocabulary)
    editor = 4 * s.layers * s.facts * s.rows * s.blocks * s.rank * (s.key_size + s.value_size)
    return {"model": model, "editor": editor, "fold": fold_flops(s), "solve": solve_flops(s)}


def fold_flops(s: Sizes) -> float:
    """UᵀU, in strips of which each begins at the diagonal, and UᵀD; or UUᵀ where rows are fewer than key features."""
    k, v, n = s.key_size, s.value_size, s.n_solved
    strips = math.ceil(k / max(512, k // 8))
    return s.layers * (n * (k**2 * (1 + 1 / strips) + 2 * k * v) if n > k else 2 * n**2 * k)


def solve_flops(s: Sizes) -> float:
    """Cholesky factor and S; or, where rows are fewer than key features, C and S."""
    k, v, n = s.key_size, s.value_size, s.n_solved
    return s.layers * (k**3 / 3 + 2 * k**2 * v if n > k else n**3 / 3 + 2 * n**2 * v + 2 * n * k * v)


def step_flops(s: Sizes) -> dict[str, float]:
    """Operations of a training step on facts not seen before, with a rephrase and an unrelated prompt a fact.

    Blocks below the edited ones run once a sequence, three in all. Those above run forward four times and backward
    three, the vocabulary likewise; the hyper-network runs forward twice, or once where all rows of all layers fit one
    pass, and backward once; weight shifts take part in two passes that are differentiated with respect to S, or, where
    its factors are smaller, to the second of them.
    """
    model = 2 * s.facts * (s.tokens * (3 * s.weights + 4 * s.top) + 7 * s.rows * s.vocabulary)
    k, v, n = s.key_size, s.value_size, s.n_solved
    each = 4 * n * (2 * k + 3 * v) if n * (k + v) < k * v else 12 * k * v
    shifts = each * s.layers * s.facts * s.tokens
    is_remembered = s.layers * s.facts * s.rows <= DEFAULT_EDITOR_BATCH_SIZE
    return {"model": model + shifts, "editor": (3 if is_remembered else 4) * apply_flops(s)["editor"]}


def sizes_of(model: Any, editor: EditorModel, facts: int, tokens: float, rows: float) -> Sizes:
    """Read off a Llama-like model."""
    blocks = list(model.model.layers)
    first = min(int(name.split(".")[2]) for name in editor.module_names)
    count = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    key_size, value_size = editor.config.shape_of(editor.module_names[0])
    return Sizes(
        weights=sum(count),
        top=sum(count[first + 1 :]),
        vocabulary=model.lm_head.weight.numel(),
        layers=len(editor.module_names),
        key_size=key_size,
        value_size=value_size,
        rank=editor.config.rank,
        blocks=editor.config.n_blocks,
        facts=facts,
        tokens=tokens,
        rows=rows,
        preserved=editor.config.n_preserved_keys,
    )


def counted(model: Any, function: Any) -> float:
    """GFLOP of a call in the base model and the hyper-networks, both ways, as PyTorch counts matrix products."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()
    return sum(sum(counts[kind.__name__].values()) for kind in (type(model), HyperNetwork)) / 1e9


def compare(folder: Path, n_facts: int) -> list[list[Any]]:
    """Rows of what, predicted, measured."""
    model, tokenizer, facts, editor = load(folder, n_facts, "bfloat16")
    tokenize = editor.tokenizer_for(model, tokenizer)
    edits = [tokenize(fact.prompt, fact.target) for fact in facts[:n_facts]]

    def tokens(cost: int | None) -> float:
        """Read a sequence, padding included, in batches cut for passes that cost as much as so many tokens."""
        return sum(batch.input_ids.numel() for _, batch in tokenize.batches(edits, BATCH, cost)) / n_facts

    s = sizes_of(model, editor, n_facts, tokens(None), sum(len(edit.target_ids) for edit in edits) / n_facts)
    options = {"batch_size": BATCH}
    measured = counted(model, lambda: editor.make_edit(model, facts[:n_facts], tokenizer, **options))
    predicted = apply_flops(s)
    found = [["apply: GFLOP of model and editor", (predicted["model"] + predicted["editor"]) / 1e9, measured]]
    with tempfile.TemporaryDirectory() as work:
        arguments = EditorTrainingArguments(
            output_dir=work, lm_batch_size=BATCH, report_to="none", disable_tqdm=True, use_cpu=True
        )
        trainer = EditorTrainer(editor, model, arguments, facts, None, tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        measured = counted(model, lambda: trainer.training_step(editor, {"facts": facts[:n_facts]}))
    predicted = step_flops(dataclasses.replace(s, tokens=tokens(pass_cost(model))))
    found.append(["step: GFLOP of model and editor", sum(predicted.values()) / 1e9, measured])
    return found + compare_solve(s.key_size, s.value_size)


def compare_solve(key_size: int, value_size: int) -> list[list[Any]]:
    """Seconds of the least squares at the speeds of a float64 product and of a solve of another size, and memory."""
    size, n_rows = 2048, 8192
    square = torch.randn(size, size, dtype=torch.float64)

    def sizes(key_size: int) -> Sizes:
        return Sizes(0, 0, 0, 1, key_size, value_size, 0, 0, n_rows, 0, 1)

    def fold_and_solve(key_size: int) -> tuple[float, float]:
        """Seconds of both, medians of some."""
        parts = [(torch.randn(1024, key_size), torch.randn(1024, value_size)) for _ in range(n_rows // 1024)]
        folding, solving = [], []
        for _ in range(5):
            rows = RidgeLeastSquares("layer", n_rows)
            folding.append(seconds(lambda rows=rows: [rows.add(*part) for part in parts]))
            solving.append(seconds(lambda rows=rows: rows.solve(1.0, in_place=True)))
        return statistics.median(folding), statistics.median(solving)

    def calibrate() -> tuple[float, float]:
        return seconds(lambda: square @ square, 5), fold_and_solve(size)[1]

    # Before and after, as the speed of these machines changes by the minute.
    before = calibrate()
    folding, solving = fold_and_solve(key_size)
    multiplying, calibrating = (sum(both) / 2 for both in zip(before, calibrate(), strict=True))
    s = sizes(key_size)
    found = [
        [
            f"fold {n_rows} rows into {key_size}²: seconds",
            fold_flops(s) / (2 * size**3) * multiplying,
            folding,
        ],
        [
            f"solve {key_size} x {value_size}: seconds",
            solve_flops(s) / solve_flops(sizes(size)) * calibrating,
            solving,
        ],
    ]
    parts = [(torch.randn(1024, key_size), torch.randn(1024, value_size)) for _ in range(n_rows // 1024)]
    rows = RidgeLeastSquares("layer", n_rows)
    with torch.profiler.profile(profile_memory=True) as profiler:
        for keys, differences in parts:
            rows.add(keys.clone(), differences.clone())
        rows.solve(1.0, in_place=True)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    planned = state_bytes("least_squares", (key_size, value_size), n_rows)
    return [*found, [f"memory of that: MiB of {n_rows} rows", planned / 2**20, peak / 2**20]]


def plan(gpus: int) -> str:
    """A million facts on a 70B model: operations and seconds."""
    block = 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672
    s = Sizes(80 * block, 5 * block, 8192 * 128256, 6, 28672, 8192, 512, 2, 10**6, 20, 3)
    # FLOP/s: those that gpu.py found on an H200, in bfloat16 and float64; half of its peak in float32 is assumed.
    speeds = {"model": 440e12, "editor": 67e12 * 0.5, "fold": 55e12, "solve": 30e12}
    rows = []
    total = 0.0
    for what, flops in apply_flops(s).items():
        took = flops / speeds[what] / (1 if what == "solve" else gpus)  # every process solves
        total += took
        rows.append([what, f"{flops:.2e}", f"{took:,.0f}"])
    rows.append(["all", "", f"{total:,.0f}"])
    state = state_bytes("least_squares", (s.key_size, s.value_size), int(s.n_solved)) / 2**30
    return f"{table([f'10⁶ facts, 70B, {gpus} GPUs', 'FLOP', 'seconds'], rows)}\n\nState of a layer: {state:.1f} GiB."


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the model and facts are")
    parser.add_argument("--facts", type=int, default=64, help="facts to count operations of")
    parser.add_argument("--gpus", type=int, default=64, help="of the plan")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its cost is what is measured
    stamp = environment()
    found = compare(options.output_dir, options.facts)
    rows = [[what, f"{p:.4g}", f"{m:.4g}", f"{p / m:.2f}"] for what, p, m in found]
    print(f"{stamp}\n\n{table(['', 'predicted', 'measured', 'ratio'], rows)}\n\n{plan(options.gpus)}")
    if options.json:
        write_json(options.json, {"environment": stamp, "compared": found})


if __name__ == "__main__":
    main()
