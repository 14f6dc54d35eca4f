"""DeepSpeed ZeRO-3 on two processes of the CPU against one: run by hand, where the extra `deepspeed` is installed.

    python -m tests.zero3

The first run compiles an operation of DeepSpeed's for a minute. Not among the tests, which run without the extra.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from . import ranks
from .conftest import build_llama, build_tokenizer

CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "accelerate" / "deepspeed_zero3.yaml"


def main() -> None:
    """What `with_sharded_base` finds on both processes is what it finds on one, and the base is cut up on both."""
    asked = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["deepspeed_config"]
    # As `accelerate launch` hands them on; the device is the CPU by DeepSpeed's own setting.
    variables = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(asked["zero_stage"]),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(asked["zero3_init_flag"]).lower(),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": asked["offload_param_device"],
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": asked["offload_optimizer_device"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_llama().save_pretrained(folder / "base")
        build_tokenizer().save_pretrained(folder / "base")
        expected = ranks.with_sharded_base(folder)
        found = ranks.run("with_sharded_base", 2, folder, variables)
        written = [load_file(folder / f"sharded-{n}" / "model.safetensors") for n in (1, 2)]
    for of_process in found:
        assert not expected["sharded"]
        assert of_process["sharded"] == expected["edited"].keys()
        for name in ("trained", "edited", "accumulated", "without the first"):
            print(name, _difference(of_process[name], expected[name]))
            assert _difference(of_process[name], expected[name]) < 1e-5, name
        for name, score in expected["scores"].items():
            assert abs(of_process["scores"][name] - score) < 1e-6, name
    print("written", _difference(written[1], written[0]))
    assert _difference(written[1], written[0]) < 1e-5


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Relative to the norm of all tensors, the largest of a tensor's."""
    assert found.keys() == expected.keys()
    norm = torch.stack([value.double().norm() for value in expected.values()]).norm()
    differences = [(found[name].double() - value.double()).norm() / norm for name, value in expected.items()]
    return float(max(differences))


if __name__ == "__main__":
    main()
