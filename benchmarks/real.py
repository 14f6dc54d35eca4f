"""SmolLM2-135M with geography facts: what the benchmarks on a CPU measure."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_malmen import EditorConfig, EditorModel, Fact, load_facts

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import geography
import smollm2

RANK = 512


def load(folder: Path, n_facts: int, dtype: str, n_preserved: int = 1024) -> tuple[Any, Any, list[Fact], EditorModel]:
    """SmolLM2, its tokenizer, facts, over again where there are not enough, and an untrained editor for six blocks."""
    facts_file = folder / "facts" / "train.jsonl"
    if not facts_file.is_file():
        geography.write(geography.build(), folder / "facts")
    base = smollm2.save(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    editor = EditorModel.from_base(
        model, EditorConfig(method="malmen", rank=RANK, edit_lr=1e-3, n_preserved_keys=n_preserved)
    )
    facts = load_facts(facts_file)
    return model, tokenizer, (facts * -(-n_facts // len(facts)))[:n_facts], editor
