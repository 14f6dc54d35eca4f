"""What every benchmark needs: the environment stamp, a process of its own for each measurement, medians and plots."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

import hf_malmen
from hf_malmen.facts import Fact, read_facts


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hf_malmen": hf_malmen.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        # Near 0 on a machine that does nothing else; a benchmark's own threads raise it while it runs.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def distinct_facts(path: Path, seed: int) -> tuple[list[Fact], int]:
    """The facts of a file, shuffled, and how many were left out, as a fact before them has the same prompt."""
    first: dict[str, Fact] = {}
    n_read = 0
    for fact in read_facts(path):
        first.setdefault(fact.prompt, fact)
        n_read += 1
    facts = [first[prompt] for prompt in sorted(first)]
    random.Random(seed).shuffle(facts)
    return facts, n_read - len(facts)


def in_new_process(file: str, *arguments: str) -> Any:
    """Run the Python file with these arguments; what its last line of output says, as JSON."""
    output = subprocess.run([sys.executable, file, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gib() -> float:
    """The most memory this process has held, in GiB."""
    import resource  # not on Windows

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the power law y ~ xᵖ that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot_lines(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = True,
) -> None:
    """Write lines as an image of the format that the file's name says; on log-log axes the slope of each is fitted.

    Args:
        path: the image.
        series: {name: (x, y)}.
        x_label, y_label: with their units.
        logarithmic: both axes.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in series.items():
        fitted = f", slope {slope(x, y):.2f}" if logarithmic and len(x) > 1 else ""
        axes.plot(x, y, marker="o", label=name + fitted)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def plot_bars(path: Path, labels: Sequence[str], groups: Mapping[str, Sequence[float]], y_label: str) -> None:
    """Write groups of bars as an image, one bar of each group over every label.

    Args:
        path: the image.
        labels: below the bars.
        groups: {name: one height a label}.
        y_label: with its unit.
    """
    figure = Figure(figsize=(max(6.0, 1.1 * len(labels)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for i, (name, heights) in enumerate(groups.items()):
        axes.bar([x + i * width for x in range(len(labels))], heights, width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(labels))], labels)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside upper right", ncols=len(groups))
    figure.savefig(path)


def write_json(path: Path, results: Any) -> None:
    """Write the numbers of a run."""
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
