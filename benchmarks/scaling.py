"""python benchmarks/scaling.py facts|layers|width

How the cost of an edit grows, with the exponent of the power law fitted:

- `facts`: seconds of `make_edit` for 256 to 100,000 facts streamed from a file, small model with random weights.
- `layers`: the same for 1 to 8 edited layers.
- `width`: of the least squares of one layer of k to k/4 features: seconds to fold 1,000 rows into UᵀU and UᵀD, seconds
  to solve, and the memory that both take; k from 1,024 to 16,384, each in a process of its own.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
from common import environment, in_new_process, peak_gib, plot_lines, seconds, slope, write_json
from synthetic import build_model, build_tokenizer, facts, small_config, write_facts
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorConfig, EditorModel, FactStream, load_facts
from hf_malmen.least_squares import RidgeLeastSquares, state_bytes
from hf_malmen.tables import table

SIZES = {"facts": [256, 1024, 4096, 16384, 100000], "layers": [1, 2, 4, 8], "width": [1024, 2048, 4096, 8192, 16384]}
N_TOKENS = 12
ROWS = 2048  # folded to measure how long it takes


def measure_facts(n: int) -> dict[str, float]:
    """Seconds of `n` facts."""
    model = build_model(small_config(), torch.float32, "cpu")
    editor, tokenizer = EditorModel.from_base(model, EditorConfig(method="malmen", rank=64)), build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.jsonl"
        write_facts(file, n, N_TOKENS)
        editor.make_edit(model, load_facts(list(facts(64, N_TOKENS))), tokenizer, batch_size=64)  # warm-up
        return {"seconds": seconds(lambda: editor.make_edit(model, FactStream(file), tokenizer, batch_size=64))}


def measure_layers(n: int) -> dict[str, float]:
    """Seconds of 1,024 facts and `n` edited layers of nine. The lowest always is, so that all passes are alike."""
    model, tokenizer = build_model(small_config(9), torch.float32, "cpu"), build_tokenizer()
    names = ["model.layers.0.mlp.down_proj"] + [f"model.layers.{9 - i}.mlp.down_proj" for i in range(1, n)]
    editor = EditorModel.from_base(model, EditorConfig(method="malmen", rank=64, target_modules=names))
    chosen = load_facts(list(facts(1024, N_TOKENS)))
    editor.make_edit(model, chosen[:64], tokenizer, batch_size=64)  # warm-up
    return {"seconds": seconds(lambda: editor.make_edit(model, chosen, tokenizer, batch_size=64))}


def measure_width(key_size: int) -> dict[str, float]:
    """The least squares of one layer."""
    shape = key_size, key_size // 4
    before = peak_gib()
    rows = RidgeLeastSquares("layer", n_expected=10**9)
    generator = torch.Generator().manual_seed(0)

    def fold() -> None:
        for _ in range(ROWS // 512):
            rows.add(*(torch.randn(512, size, generator=generator) for size in shape))

    folding = seconds(fold)
    solving = seconds(lambda: rows.solve(1.0, in_place=True))
    planned = state_bytes("least_squares", shape, 10**9) / 2**30
    found = {"seconds to fold 1,000 rows": folding / ROWS * 1000, "seconds to solve": solving}
    return found | {"GiB": peak_gib() - before, "planned GiB": planned}


MEASURES = {"facts": measure_facts, "layers": measure_layers, "width": measure_width}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of facts or layers, or widths")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also write a plot to this image")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)  # its speed is what is measured
    if options.one:
        print(json.dumps(MEASURES[options.what](options.one)))
        return
    sizes = options.sizes or SIZES[options.what]
    measured = {}
    for size in sizes:
        measured[size] = in_new_process(__file__, options.what, "--one", str(size))
        print(f"{size}: {measured[size]}", flush=True)
    names = list(measured[sizes[0]])
    lines = {name: (sizes, [found[name] for found in measured.values()]) for name in names}
    slopes = {name: slope(*line) for name, line in lines.items()} if len(sizes) > 1 else {}
    stamp = environment()
    rows = [[str(size), *(f"{found[name]:.3g}" for name in names)] for size, found in measured.items()]
    rows.append(["slope", *(f"{slopes[name]:.2f}" if slopes else "" for name in names)])
    print(f"{stamp}\n\n{table([options.what, *names], rows)}")
    if options.json:
        write_json(options.json, {"environment": stamp, "what": options.what, "measured": measured, "slopes": slopes})
    if options.plot:
        plot_lines(options.plot, lines, options.what, "seconds, GiB" if options.what == "width" else "seconds")


if __name__ == "__main__":
    main()
