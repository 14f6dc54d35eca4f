"""python benchmarks/gpu.py --json gpu.json

Models of Llama-3-8B's, Mistral-7B's and GPT-J-6B's shape with random weights, in bfloat16 on a GPU, without network. Of
each: `make_edit` for 1,000 and 20,000 facts of 20 tokens, and a training step of 1,024 facts. Each beside its floor
(see floor.py), with its share of the card's peak FLOP/s and its peak memory. Every model has a process of its own. Then
the least squares of one layer of GPT-J's width by itself, in float64: folding the rows of 20,000 facts, and the solve.

The aims: 20,000 facts on a 7B model within 60 s and 24 GB; a training step of 1,024 facts on a GPT-J within 20 s and
40 GB. `--device cpu --tiny` runs all of it in a minute, on tiny models and few facts, to see that it works. Whether a
GPU computes what a CPU does is what gpu_check.py tells.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import environment, in_new_process, peak_gib, plot_bars, seconds, write_json
from floor import Floor
from synthetic import build_model, build_tokenizer, config_of, facts
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, load_facts
from hf_malmen.least_squares import RidgeLeastSquares
from hf_malmen.tables import table

MODELS = ("llama-3-8b", "mistral-7b", "gptj-6b")
N_TOKENS = 20
# Dense bfloat16 TFLOP/s, as the makers state them.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0}
AIMS = [
    ("mistral-7b", "apply 20000", 60.0, 24e9),
    ("llama-3-8b", "apply 20000", 60.0, 24e9),
    ("gptj-6b", "step 1024", 20.0, 40e9),
]


def pass_flops(model: Any, first: str, n_forward: int, n_backward: int) -> float:
    """FLOPs of plain passes: 2 a weight and token forward, and 2 backward in the blocks above the first edited one.

    Weights themselves get no gradient; attention and the vocabulary add a few percent for short prompts.

    Args:
        model: the base model.
        first: its first edited module.
        n_forward, n_backward: tokens that pass forward, and those of them that pass backward too.
    """
    around = [module for name, module in model.named_modules() if name and first.startswith(f"{name}.")]
    layers = next(module for module in around if isinstance(module, torch.nn.ModuleList))
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in layers]
    edited = model.get_submodule(first)
    above = next(number for number, block in enumerate(layers, 1) if any(edited is part for part in block.modules()))
    return 2.0 * (sum(sizes) * n_forward + sum(sizes[above:]) * n_backward)


class Measured:
    """Seconds and peak memory of a call on this device."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device.startswith("cuda")

    def __call__(self, function: Any) -> dict[str, float]:
        """Run it once."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        took = seconds(function)
        return {"seconds": took, "peak bytes": torch.cuda.max_memory_allocated() if self.is_gpu else peak_gib() * 2**30}


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """All measurements of one model."""
    dtype = torch.bfloat16
    model = build_model(config_of(name, tiny=options.tiny), dtype, options.device)
    tokenizer = build_tokenizer()
    rank = 8 if options.tiny else 1920
    config = EditorConfig(method="malmen", rank=rank, edit_lr=1e-3, n_preserved_keys=16 if options.tiny else 1024)
    editor = EditorModel.from_base(model, config).to(options.device)
    first = editor.module_names[0]
    floor = Floor(model, editor.tokenizer_for(model, tokenizer), first, options.batch_size)
    measured = Measured(options.device)
    results: dict[str, Any] = {}
    apply_options = {"batch_size": options.batch_size, "max_memory": options.max_memory}
    for n in [min(64, min(options.facts)), *options.facts]:  # the first warms up
        chosen = load_facts(list(facts(n, N_TOKENS)))
        found = measured(lambda chosen=chosen: editor.make_edit(model, chosen, tokenizer, **apply_options))
        sequences = [floor.tokenize(fact.prompt, fact.target) for fact in chosen]
        found["floor"] = seconds(lambda sequences=sequences: floor.passes(sequences))
        found["flops"] = pass_flops(model, first, n * N_TOKENS, n * N_TOKENS)
        results[f"apply {n}"] = found
    if options.facts[0] > 64:
        del results["apply 64"]
    results[f"step {options.step_facts}"] = measure_step(options, model, tokenizer, editor, floor, measured)
    return results


def measure_step(
    options: argparse.Namespace, model: Any, tokenizer: Any, editor: EditorModel, floor: Floor, measured: Measured
) -> dict[str, float]:
    """A training step on facts not seen before, after one that warms up."""
    n = options.step_facts
    chosen = load_facts(list(facts(2 * n, N_TOKENS)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = EditorTrainingArguments(
            output_dir=folder,
            lm_batch_size=options.batch_size,
            per_device_train_batch_size=n,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not measured.is_gpu,
        )
        trainer = EditorTrainer(editor, model, arguments, chosen, None, tokenizer)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1

        def step(part: list[Any]) -> None:
            trainer.training_step(editor, {"facts": part})
            torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        step(chosen[:n])
        found = measured(lambda: step(chosen[n:]))
    edits = [floor.tokenize(fact.prompt, fact.target) for fact in chosen[n:]]
    rephrases = [floor.tokenize(fact.rephrases[0], fact.target) for fact in chosen[n:]]
    unrelated = [floor.tokenize(str(fact.unrelated_prompt), str(fact.unrelated_answer)) for fact in chosen[n:]]

    def passes() -> None:
        for sequences in (edits, rephrases, unrelated):
            floor.passes(sequences)
        floor.passes(unrelated, backward=False)

    tokens = n * N_TOKENS
    return found | {
        "floor": seconds(passes),
        "flops": pass_flops(model, editor.module_names[0], 4 * tokens, 3 * tokens),
    }


def measure_solve(options: argparse.Namespace) -> dict[str, Any]:
    """The least squares of one layer of GPT-J's width: the rows of the most facts folded, then solved."""
    key_size, value_size = (160, 64) if options.tiny else (16384, 4096)
    batch = [
        torch.randn(min(1024, 3 * max(options.facts)), size, device=options.device) for size in (key_size, value_size)
    ]
    n_batches = -(-3 * max(options.facts) // len(batch[0]))  # three answer tokens a fact
    n_rows = n_batches * len(batch[0])
    measured = Measured(options.device)

    def folded(n: int) -> RidgeLeastSquares:
        rows = RidgeLeastSquares("layer", n_rows + key_size)
        for _ in range(n):
            rows.add(*batch)
        return rows

    folded(2).solve(1.0, in_place=True)  # warms up
    found: list[RidgeLeastSquares] = []
    fold = measured(lambda: found.append(folded(n_batches)))
    solve = measured(lambda: found.pop().solve(1.0, in_place=True))
    # Of UᵀU strips of an eighth of its rows, each from the diagonal on; a multiplication and an addition each.
    n_strips = -(-key_size // max(512, key_size // 8))
    fold["flops"] = n_rows * (key_size**2 * (1 + 1 / n_strips) + 2 * key_size * value_size)
    solve["flops"] = key_size**3 / 3 + 2 * key_size**2 * value_size
    return {f"fold {n_rows} rows of {key_size} x {value_size}": fold, "solve": solve}


def check_aims(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim of which the measurement is there, and whether it was met."""
    found = []
    for model, what, limit, limit_bytes in AIMS:
        if what in results.get(model, {}):
            one = results[model][what]
            met = one["seconds"] <= limit and one["peak bytes"] <= limit_bytes
            found.append({"model": model, "what": what, "seconds": limit, "bytes": limit_bytes, "met": met})
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of facts a second, measured and of the floor, over each model and number of facts."""
    cells = [(name, what, one) for name, found in results["models"].items() for what, one in found.items()]
    counts = [int(what.split()[-1]) for _, what, _ in cells]
    bars = {
        kind: [n / one[kind] for n, (_, _, one) in zip(counts, cells, strict=True)] for kind in ("seconds", "floor")
    }
    labels = [f"{name}\n{what}" for name, what, _ in cells]
    plot_bars(path, labels, {"measured": bars["seconds"], "floor": bars["floor"]}, "facts a second")


def report(results: dict[str, Any], peak_tflops: float | None) -> str:
    """The tables."""
    rows = []
    for model, found in results["models"].items():
        for what, one in found.items():
            tflops = one["flops"] / one["seconds"] / 1e12
            share = f"{tflops / peak_tflops:.2f}" if peak_tflops else "?"
            numbers = [f"{one['seconds']:.2f}", f"{one['floor']:.2f}", f"{one['floor'] / one['seconds']:.2f}"]
            rows.append([model, what, *numbers, f"{tflops:.1f}", share, f"{one['peak bytes'] / 1e9:.1f}"])
    header = ["model", "facts", "seconds", "floor", "of the floor", "TFLOP/s", "of the peak", "peak GB"]
    solve = [
        [what, f"{one['seconds']:.2f}", f"{one['flops'] / one['seconds'] / 1e12:.1f}", f"{one['peak bytes'] / 1e9:.1f}"]
        for what, one in results["solve"].items()
    ]
    lines = [
        f"{aim['model']}, {aim['what']}: within {aim['seconds']:.0f} s and {aim['bytes'] / 1e9:.0f} GB: "
        f"{'met' if aim['met'] else 'missed'}"
        for aim in results["aims"]
    ]
    tables = [table(header, rows), "", table(["least squares", "seconds", "float64 TFLOP/s", "peak GB"], solve)]
    return "\n".join([*tables, "", *lines, *(f"{name}: failed, see above" for name in results["failed"])])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to run")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a look at whether it works")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="shapes to measure")
    parser.add_argument("--facts", type=int, nargs="+", help="facts to apply at once; default: 1000 20000")
    parser.add_argument("--step-facts", type=int, help="facts of a training step; default: 1024")
    parser.add_argument("--batch-size", type=int, default=128, help="facts a pass of the language model")
    parser.add_argument("--max-memory", default="3GiB", help="for the least squares of the layers solved together")
    parser.add_argument("--peak-tflops", type=float, help="the card's, in bfloat16; known for some cards")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also draw facts a second beside the floor's, to this image")
    parser.add_argument("--one", choices=(*MODELS, "solve"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.facts = options.facts or ([48, 96] if options.tiny else [1000, 20000])
    options.step_facts = options.step_facts or (16 if options.tiny else 1024)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here. To see that this program works: --device cpu --tiny.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one:
        print(json.dumps(measure_solve(options) if options.one == "solve" else measure(options, options.one)))
        return
    common = ["--device", options.device, "--batch-size", options.batch_size, "--max-memory", options.max_memory]
    common += ["--facts", *options.facts, "--step-facts", options.step_facts] + ["--tiny"] * options.tiny
    results: dict[str, Any] = {"environment": environment(), "tiny": options.tiny, "models": {}, "solve": {}}
    results |= {"aims": [], "failed": []}
    card = results["environment"]["gpu"] or ""
    peak = options.peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in card), None)
    results["peak_tflops"] = peak
    for name in ("solve", *options.models):
        try:
            found = in_new_process(__file__, "--one", name, *map(str, common))
        except subprocess.CalledProcessError:  # it has said why; the others may work
            results["failed"].append(name)
        else:
            (results if name == "solve" else results["models"])[name] = found
            results["aims"] = [] if options.tiny else check_aims(results["models"])
            print(f"{name}: done", file=sys.stderr)
        if options.json:  # each time, as these take a while
            write_json(options.json, results)
    print(f"{results['environment']}\n\n{report(results, peak)}")
    if options.plot and results["models"]:
        plot(results, options.plot)
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
