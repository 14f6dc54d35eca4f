"""python benchmarks/apply.py

Facts a second of `make_edit` on SmolLM2-135M, for several numbers of facts at once, beside the floor (see floor.py)
measured in the same process, and peak memory. The two take turns, since machines are noisy: read the ratios. Each
number of facts has a process of its own. The aim is 0.8 of the floor from 1,000 facts on.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from common import environment, in_new_process, peak_gib, plot_lines, seconds, write_json
from floor import Floor
from real import load
from transformers.utils import logging

import hf_malmen
from hf_malmen.tables import table

AIM = 0.8


def measure(folder: Path, dtype: str, n_facts: int, batch_size: int, repeats: int) -> dict[str, float]:
    """`make_edit` for `n_facts`, its floor, and the most memory the process has held before the floor ran."""
    model, tokenizer, facts, editor = load(folder, n_facts, dtype)
    floor = Floor(model, editor.tokenizer_for(model, tokenizer), editor.module_names[0], batch_size)
    sequences = [floor.tokenize(fact.prompt, fact.target) for fact in facts]
    editor.make_edit(model, facts[:batch_size], tokenizer, batch_size=batch_size)  # warm-up
    applies, floors, peak = [], [], 0.0
    for _ in range(repeats):
        applies.append(seconds(lambda: editor.make_edit(model, facts, tokenizer, batch_size=batch_size)))
        peak = peak or peak_gib()
        floors.append(seconds(lambda: floor.passes(sequences)))
    shares = sorted(f / a for a, f in zip(applies, floors, strict=True))
    return {
        "apply": sorted(applies)[repeats // 2],
        "floor": sorted(floors)[repeats // 2],
        "share": shares[repeats // 2],
        "peak GiB": peak,
    }


def report(results: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for n, found in results["facts"].items():
        speeds = [f"{int(n) / found['apply']:.0f}", f"{int(n) / found['floor']:.0f}", f"{found['share']:.2f}"]
        rows.append([n, f"{found['apply']:.2f}", *speeds, f"{found['peak GiB']:.2f}"])
    header = ["facts at once", "seconds", "facts/s", "floor's facts/s", "share of the floor", "peak GiB"]
    missed = [n for n, found in results["facts"].items() if int(n) >= 1000 and found["share"] < AIM]
    verdict = f"missed at {', '.join(missed)} facts" if missed else "met"
    return f"{table(header, rows)}\n\nAt least {AIM} of the floor from 1,000 facts on: {verdict}."


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the model and facts are")
    parser.add_argument("--dtype", default="bfloat16", help="precision of the base model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="facts to apply at once")
    parser.add_argument("--batch-size", type=int, default=64, help="facts a pass of the language model")
    parser.add_argument("--repeats", type=int, default=3, help="the median of this many is taken")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also write a plot to this image")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one:
        found = measure(options.output_dir, options.dtype, options.one, options.batch_size, options.repeats)
        print(json.dumps(found))
        return
    common = ["--output-dir", options.output_dir, "--dtype", options.dtype, "--batch-size", options.batch_size]
    results: dict[str, Any] = {"environment": environment(), "dtype": options.dtype, "facts": {}}
    for size in options.sizes:
        arguments = ["--one", size, "--repeats", options.repeats, *common]
        results["facts"][str(size)] = in_new_process(__file__, *map(str, arguments))
        print(f"{size} facts: {results['facts'][str(size)]}", flush=True)
    print(f"{results['environment']}\n\n{report(results)}")
    if options.json:
        write_json(options.json, results)
    if options.plot:
        found = results["facts"].values()
        lines = {name: (options.sizes, [each[name] for each in found]) for name in ("apply", "floor")}
        plot_lines(options.plot, lines, "facts at once", "seconds")


if __name__ == "__main__":
    main()
