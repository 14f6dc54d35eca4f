"""python benchmarks/checkpoint.py

Editing a checkpoint on disk: 4 GiB of bfloat16 in five shards, six layers of 16384 x 4096 edited, each solved from
`--tokens` tokens. Seconds of the in-place write and of its undo beside `cp` of the same bytes, and beside
`from_pretrained` and `save_pretrained`; and the memory they take above a Python that has imported torch.

The same bytes: a write saves the originals, the edit, and the new weights, and all of it is on the disk when it
returns, so `cp` copies files of these sizes, followed by `sync`. An undo writes the originals back. What was loaded and
saved is synced, too. Each measurement runs in a process of its own, and those to be compared take turns. Machines are
noisy: read the ratios.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import hf_malmen
from hf_malmen import Edit, undo_edit
from hf_malmen.shifts import FactoredShift
from hf_malmen.stored_weights import fingerprints_of
from hf_malmen.tables import table

KEY_SIZE, VALUE_SIZE, N_LAYERS, N_EDITED, N_SHARDS = 16384, 4096, 8, 6, 5
TENSOR_MIB = KEY_SIZE * VALUE_SIZE * 2 / 2**20


def write_checkpoint(folder: Path) -> None:
    """A Llama of eight layers, 4 GiB, with weights drawn from one pool of random numbers."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=VALUE_SIZE,
        intermediate_size=KEY_SIZE,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (512, VALUE_SIZE), "model.norm.weight": (VALUE_SIZE,)}
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (VALUE_SIZE, VALUE_SIZE) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (KEY_SIZE, VALUE_SIZE) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (VALUE_SIZE, KEY_SIZE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (VALUE_SIZE,) for name in ("input", "post_attention")}
    pool = (0.02 * torch.randn(KEY_SIZE * VALUE_SIZE + 2**16)).bfloat16()
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    size = 0
    for number, (key, shape) in enumerate(shapes.items()):
        if size > total / N_SHARDS * len(shards):
            save_file(shards[-1], folder / f"model-{len(shards):05}-of-{N_SHARDS:05}.safetensors", {"format": "pt"})
            shards[-1] = {}  # written
            shards.append({})
        values = torch.Size(shape).numel()
        shards[-1][key] = pool[number : number + values].reshape(shape).clone()
        weight_map[key] = len(shards)
        size += 2 * values
    save_file(shards[-1], folder / f"model-{len(shards):05}-of-{N_SHARDS:05}.safetensors", {"format": "pt"})
    assert len(shards) == N_SHARDS
    files = {key: f"model-{shard:05}-of-{N_SHARDS:05}.safetensors" for key, shard in weight_map.items()}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_edit(folder: Path, checkpoint: Path, n_tokens: int) -> None:
    """An edit of the last six layers, as one of that many tokens has it: two factors a layer, and a fingerprint."""
    sizes = (KEY_SIZE, VALUE_SIZE)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(N_LAYERS - N_EDITED, N_LAYERS)]
    shifts = {name: FactoredShift(*(0.01 * torch.randn(n_tokens, size) for size in sizes)) for name in names}
    fingerprint = next(fingerprints_of(checkpoint, dict.fromkeys(names, sizes), ()))
    Edit(shifts, base_model_fingerprint=fingerprint, editor={"method": "malmen"}).save_pretrained(folder)


def memory(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def timed_here(what: str, work: Path) -> dict[str, float]:
    """One measurement, in the process that was started for it."""
    checkpoint = work / "checkpoint"
    before = memory("VmRSS")
    start = time.perf_counter()
    if what == "write":
        Edit.from_pretrained(work / "edit").write(checkpoint, in_place=True)
    elif what == "undo":
        undo_edit(checkpoint)
    else:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(work / "saved", max_shard_size="860MB")
        subprocess.run(["sync", *(work / "saved").iterdir()], check=True)
    return {"seconds": time.perf_counter() - start, "memory": memory("VmHWM") - before}


def timed(what: str, work: Path) -> dict[str, float]:
    """`timed_here` in a process of its own."""
    command = [sys.executable, __file__, "--run", what, "--work", str(work)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def timed_cp(sources: list[Path], work: Path) -> float:
    """Seconds of `cp` and `sync` of some files."""
    target = work / "copied"
    target.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *sources, target], check=True)
    subprocess.run(["sync", *target.iterdir(), target], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    subprocess.run(["sync", target.parent], check=True)
    return seconds


def measure(work: Path, repeats: int, n_tokens: int) -> dict[str, Any]:
    """All of it. Those to be compared take turns."""
    write_checkpoint(work / "checkpoint")
    write_edit(work / "edit", work / "checkpoint", n_tokens)
    edited = [work / "bytes" / name for name in ("originals", "weights")]
    edited[0].parent.mkdir()
    for file in edited:
        with file.open("wb") as stream:
            for _ in range(N_EDITED):
                stream.write(bytes(int(TENSOR_MIB * 2**20)))
    shards = sorted((work / "checkpoint").glob("*.safetensors"))
    subprocess.run(["sync"], check=True)
    rows: dict[str, list[Any]] = {}
    for _ in range(repeats):
        rows.setdefault("cp of what a write writes", []).append(
            timed_cp([*edited, work / "edit" / "edit.safetensors"], work)
        )
        rows.setdefault("write", []).append(timed("write", work))
        rows.setdefault("cp of what an undo writes", []).append(timed_cp(edited[:1], work))
        rows.setdefault("undo", []).append(timed("undo", work))
        rows.setdefault("cp of the checkpoint", []).append(timed_cp(shards, work))
        rows.setdefault("load and save", []).append(timed("load and save", work))
        shutil.rmtree(work / "saved")
    result: dict[str, Any] = {"environment": environment()}
    for name, values in rows.items():
        seconds = [value["seconds"] if isinstance(value, dict) else value for value in values]
        result[name] = {"seconds": statistics.median(seconds), "all": seconds}
        if isinstance(values[0], dict):
            result[name]["mib"] = max(value["memory"] for value in values) / 2**20
    return result


def environment() -> dict[str, Any]:
    """What was measured, on what."""
    return {
        "hf_malmen": hf_malmen.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
    }


def report(result: dict[str, Any]) -> str:
    """The table."""
    seconds = {name: value["seconds"] for name, value in result.items() if name != "environment"}
    rows = []
    for name, baseline in (("write", "cp of what a write writes"), ("undo", "cp of what an undo writes")):
        rows.append(
            [
                f"in-place {name}",
                f"{seconds[name]:.2f}",
                f"{seconds[name] / seconds[baseline]:.2f}",
                f"{seconds[name] / seconds['cp of the checkpoint']:.2f}",
                f"{seconds['load and save'] / seconds[name]:.1f}",
                f"{result[name]['mib'] / TENSOR_MIB:.2f}",
            ]
        )
    total = seconds["write"] + seconds["undo"]
    copies = seconds["cp of what a write writes"] + seconds["cp of what an undo writes"]
    whole = seconds["cp of the checkpoint"]
    rows.append(["both", f"{total:.2f}", f"{total / copies:.2f}", f"{total / whole:.2f}", "", ""])
    header = ["", "seconds", "/ cp of its bytes", "/ cp of 4 GiB", "load and save / it", "memory / largest tensor"]
    baselines = [[name, f"{value:.2f}"] for name, value in seconds.items() if name not in ("write", "undo")]
    return f"{table(header, rows)}\n\n{table(['baseline', 'seconds'], baselines)}"


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder to work in, on the disk to be measured; needs 12 GiB")
    parser.add_argument("--repeats", type=int, default=3, help="times that each is measured; the median counts")
    parser.add_argument("--tokens", type=int, default=64, help="traced tokens of the edit, a layer")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--run", choices=["write", "undo", "load and save"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(timed_here(arguments.run, arguments.work)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        result = measure(Path(folder), arguments.repeats, arguments.tokens)
    print(report(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
