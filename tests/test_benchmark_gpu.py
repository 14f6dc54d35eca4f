"""The GPU's benchmark runs without one, on tiny models, and counts operations as PyTorch does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu() -> Iterator[Any]:
    """benchmarks/gpu.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu

        yield gpu


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """One model, from the command line to the file of results."""
    file = tmp_path / "results.json"
    sizes = ["--facts", "8", "72", "--step-facts", "4", "--batch-size", "8"]
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--models", "gptj-6b", *sizes]
    image = tmp_path / "facts.png"
    output = subprocess.run(
        [*command, "--json", file, "--plot", image], check=True, capture_output=True, text=True
    ).stdout
    results = json.loads(file.read_text(encoding="utf-8"))
    assert list(results["models"]["gptj-6b"]) == ["apply 8", "apply 72", "step 4"]
    for found in results["models"]["gptj-6b"].values():
        assert set(found) == {"seconds", "peak bytes", "floor", "flops"}
        assert all(value > 0 for value in found.values())
    assert results["models"]["gptj-6b"]["apply 72"]["flops"] == 9 * results["models"]["gptj-6b"]["apply 8"]["flops"]
    assert len(results["solve"]) == 2
    assert all(value > 0 for found in results["solve"].values() for value in found.values())
    assert not results["failed"]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["torch"] == torch.__version__
    assert "| gptj-6b" in output


@pytest.mark.parametrize("name", ["llama-3-8b", "mistral-7b", "gptj-6b"])
def test_operations_are_counted_as_pytorch_counts_them(gpu: Any, name: str) -> None:
    """Of forward and backward passes, without attention, the vocabulary and the floor's one gradient of a weight."""
    from hf_malmen import EditorConfig, EditorModel

    config = gpu.config_of(name, tiny=True)
    model = gpu.build_model(config, torch.float32, "cpu")
    editor = EditorModel.from_base(model, EditorConfig(method="malmen", rank=4))
    floor = gpu.Floor(model, editor.tokenizer_for(model, gpu.build_tokenizer()), editor.module_names[0], 4)
    chosen = gpu.load_facts(list(gpu.facts(8, gpu.N_TOKENS)))
    sequences = [floor.tokenize(fact.prompt, fact.target) for fact in chosen]
    assert {len(sequence) for sequence in sequences} == {gpu.N_TOKENS}
    with FlopCounterMode(display=False) as counter:
        floor.passes(sequences)
    counts = {kind.__name__: count for kind, count in counter.get_flop_counts()["Global"].items()}
    n_read = 8 * gpu.N_TOKENS
    # Besides: what the vocabulary takes in both directions at the three answers, and the gradient of one weight.
    head = 2 * 2 * 8 * 3 * model.lm_head.weight.numel()
    weight = 2 * n_read * floor.weight.numel()
    # Attention is an operation of its own, or, where a model spells it out, the only product of batches of matrices.
    products = sum(count for kind, count in counts.items() if "attention" not in kind and kind != "bmm")
    expected = gpu.pass_flops(model, editor.module_names[0], n_read, n_read)
    assert expected == pytest.approx(products - head - weight, rel=0.02)


def test_aims_are_checked(gpu: Any) -> None:
    """Both the time and the memory; what was not measured is not claimed."""
    fast, slow = {"seconds": 59.0, "peak bytes": 23e9}, {"seconds": 10.0, "peak bytes": 41e9}
    aims = gpu.check_aims({"mistral-7b": {"apply 20000": fast}, "gptj-6b": {"step 1024": slow, "apply 1000": fast}})
    assert [(aim["model"], aim["met"]) for aim in aims] == [("mistral-7b", True), ("gptj-6b", False)]


def test_devices_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """The CPU with itself, by which nothing differs; and what does differ is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_check

        patch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--methods", "malmen", "malmit", "memit"])
        gpu_check.main()
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| malm", "| memit"))]
        assert len(rows) == 12
        assert all("0.0e+00" in row and "yes" in row for row in rows)
        patch.setattr(gpu_check, "differ", lambda *_: 1.0)
        with pytest.raises(SystemExit, match="devices differ"):
            gpu_check.main()
