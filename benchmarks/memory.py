"""python benchmarks/memory.py

Peak memory of `make_edit` against the number of facts, streamed from a file: of a small model with random weights, or
with `--smollm2` of SmolLM2-135M with geography facts, over again. Every number of facts has a process of its own. The
aim is a peak at 100,000 facts of at most 1.1 times that at 4,000.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import environment, in_new_process, peak_gib, plot_lines, seconds, write_json
from real import load
from synthetic import build_model, build_tokenizer, small_config, write_facts
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorConfig, EditorModel, FactStream
from hf_malmen.tables import table

AIM = 1.1
N_TOKENS = 12


def measure(n_facts: int, smollm2: Path | None, batch_size: int) -> dict[str, float]:
    """Peak memory of this process before the facts are read, and after they were edited; and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.jsonl"
        if smollm2 is None:
            model, tokenizer = build_model(small_config(), torch.float32, "cpu"), build_tokenizer()
            editor = EditorModel.from_base(model, EditorConfig(method="malmen", rank=64, n_preserved_keys=128))
            write_facts(file, n_facts, N_TOKENS)
        else:
            model, tokenizer, facts, editor = load(smollm2, n_facts, "bfloat16")
            with file.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(fact.to_dict()) + "\n" for fact in facts)
            del facts
        before = peak_gib()
        took = seconds(lambda: editor.make_edit(model, FactStream(file), tokenizer, batch_size=batch_size))
    return {"before GiB": before, "peak GiB": peak_gib(), "seconds": took}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 20000, 100000], help="numbers of facts")
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2 and facts, such as demo-output")
    parser.add_argument("--batch-size", type=int, default=64, help="facts a pass of the language model")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also write a plot to this image")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its memory is what is measured
    if options.one:
        print(json.dumps(measure(options.one, options.smollm2, options.batch_size)))
        return
    common = ["--batch-size", str(options.batch_size)]
    common += ["--smollm2", str(options.smollm2)] if options.smollm2 else []
    results: dict[str, Any] = {"environment": environment(), "facts": {}}
    for size in options.sizes:
        results["facts"][str(size)] = in_new_process(__file__, "--one", str(size), *common)
        print(f"{size} facts: {results['facts'][str(size)]}", flush=True)
    rows = []
    for n, found in results["facts"].items():
        memory = [f"{found[name]:.3f}" for name in ("before GiB", "peak GiB")]
        rows.append([n, f"{found['seconds']:.1f}", f"{int(n) / found['seconds']:.0f}", *memory])
    print(f"{results['environment']}\n\n{table(['facts', 'seconds', 'facts/s', 'GiB before', 'peak GiB'], rows)}\n")
    compared = [found["peak GiB"] for n, found in results["facts"].items() if int(n) >= 4000]
    if len(compared) > 1:
        ratio = results["ratio"] = compared[-1] / compared[0]
        print(f"The last peak is {ratio:.3f} of the first one from 4,000 facts on; at most {AIM}: {ratio <= AIM}.")
    if options.json:
        write_json(options.json, results)
    if options.plot:
        peaks = [found["peak GiB"] for found in results["facts"].values()]
        plot_lines(options.plot, {"peak": (options.sizes, peaks)}, "facts", "GiB")


if __name__ == "__main__":
    main()
