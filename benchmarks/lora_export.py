"""python benchmarks/lora_export.py

Seconds to turn the edit of one layer into a LoRA adapter: a 16384 x 4096 weight (the second feed-forward layer of a 6B
model) whose shift was solved from 512 tokens. Beside it, the same shift truncated to rank 64, the same shift without
its factors, and what all of these avoid: a singular value decomposition of the dense shift, far slower.

Machines are noisy: read the ratios.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import hf_malmen
from hf_malmen import Edit, TruncationWarning
from hf_malmen.shifts import FactoredShift
from hf_malmen.tables import table

NAME = "model.layers.0.mlp.down_proj"


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(n_tokens: int, key_size: int, value_size: int, rank: int) -> dict[str, Any]:
    """Measure each way once, after a small export that loads what is loaded once; print the table."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(n_tokens, key_size, generator=generator)
    right = torch.randn(n_tokens, value_size, generator=generator)
    factored, dense = Edit({NAME: FactoredShift(left, right)}), Edit({NAME: left.T @ right})
    with TemporaryDirectory() as name:
        folder = Path(name)
        Edit({NAME: FactoredShift(left[:4, :64], right[:4, :64])}).to_lora(folder)
        times = {
            f"export, {n_tokens} tokens": seconds(lambda: factored.to_lora(folder)),
            f"export, truncated to rank {rank}": seconds(lambda: factored.to_lora(folder, rank)),
            "export of the dense shift": seconds(lambda: dense.to_lora(folder)),
        }
    matrix = dense.shifts[NAME]
    decomposition = seconds(lambda: torch.linalg.svd(matrix, full_matrices=False))
    times["torch.linalg.svd of the dense shift"] = decomposition
    rows = [[way, f"{value:.2f}", f"{decomposition / value:.1f}"] for way, value in times.items()]
    results = {"environment": environment(), "shape": [key_size, value_size], "n_tokens": n_tokens, "seconds": times}
    print(f"{results['environment']}\n")
    print(table([f"{key_size} x {value_size}", "seconds", "times faster than the decomposition"], rows))
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
    parser.add_argument("--tokens", type=int, default=512, help="traced tokens that the shift was solved from")
    parser.add_argument("--shape", type=int, nargs=2, default=[16384, 4096], help="inputs and outputs of the layer")
    parser.add_argument("--rank", type=int, default=64, help="to truncate to")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore", TruncationWarning)
    results = run(options.tokens, *options.shape, options.rank)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
