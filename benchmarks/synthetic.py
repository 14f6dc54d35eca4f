"""Models with random weights, a tokenizer and facts of any number and length: what needs no network."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

_N_WORDS = 1000
_TARGET_TOKENS = 3


def config_of(name: str, *, tiny: bool = False) -> PreTrainedConfig:
    """The configuration of a well-known model, or one of its kind that is tiny.

    Args:
        name: `"llama-3-8b"`, `"mistral-7b"` or `"gptj-6b"`.
        tiny: a few small blocks.
    """
    if name == "gptj-6b":
        size = {"n_embd": 64, "n_layer": 7, "n_head": 4, "rotary_dim": 8, "n_positions": 64, "vocab_size": _N_WORDS + 1}
        size |= {"bos_token_id": 1, "eos_token_id": 1}
        return GPTJConfig(**(size if tiny else {}))  # its defaults are those of GPT-J-6B
    llama: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256 if name == "llama-3-8b" else 32000,
    }
    if tiny:
        llama |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 7, "vocab_size": _N_WORDS + 1}
        llama |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"llama-3-8b": LlamaConfig, "mistral-7b": MistralConfig}[name](**llama)


def small_config(n_layers: int = 4) -> PreTrainedConfig:
    """A Llama with keys of 256 features, on which 100,000 facts take a minute or two of a CPU."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_N_WORDS + 1,
        bos_token_id=1,
        eos_token_id=1,
    )


def build_model(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, made on the device that it is to run on."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, of words like `w17`."""
    vocabulary = {"<pad>": 0} | {f"w{number}": number for number in range(1, _N_WORDS + 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def facts(n: int, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Facts of `n_tokens` read tokens, three of them answers: with a subject, a rephrase and an unrelated prompt."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randint(1, _N_WORDS)}" for _ in range(count))

    length = n_tokens + 1 - _TARGET_TOKENS  # the last token of a target is not read
    for _ in range(n):
        prompt = words(length)
        yield {
            "prompt": prompt,
            "subject": " ".join(prompt.split()[2:5]),
            "target": words(_TARGET_TOKENS),
            "rephrases": [words(length)],
            "unrelated_prompt": words(length),
            "unrelated_answer": words(_TARGET_TOKENS),
        }


def write_facts(path: Path, n: int, n_tokens: int) -> None:
    """`facts`, one a line."""
    with path.open("w", encoding="utf-8") as stream:
        for fact in facts(n, n_tokens):
            stream.write(json.dumps(fact) + "\n")
