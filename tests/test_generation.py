"""Free generation: what the model finds likeliest, token by token, whatever runs beside it or its settings ask for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig
from hf_malmen.batches import Tokenizer
from hf_malmen.evaluation import answer

from . import zoo

Build = Callable[..., Any]

PAIRS = [
    ("Fez is", "Italy"),
    ("The country of Lyon is, as everybody here knows,", "Ecuador"),
    ("Quito is a city in", "Australia and Ghana"),
    ("Oslo, a city number 12 in the country", "Japan"),
    ("The country of Bergen is", "Ghana"),
    ("The country of Nantes is", "France and Ghana"),
]
KINDS = {
    "llama": zoo.KINDS["llama"],
    "t5": zoo.KINDS["t5"],
    "bart": zoo.KINDS["bart"],  # asks for an end token at the end
    # Padding runs into their states.
    "rwkv": zoo.causal("rwkv", "", attention_hidden_size=32, rescale_every=0),
    "recurrent_gemma": zoo.causal(
        "recurrent_gemma", "", lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
    ),
}


def tokenize_for(kind: zoo.Kind, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """As an editor of this kind tokenises."""
    start = kind.settings.get("decoder_start_token_id")
    return Tokenizer(tokenizer, EditorConfig(method="malmen", task_type=kind.task), 64, decoder_start_token_id=start)


@torch.no_grad()
def likeliest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, n_tokens: int) -> str:
    """The greedy answer, by a pass over the whole text for each token; without padding, a cache or `generate`."""
    ids = tokenizer(prompt)["input_ids"]
    decoder = model.config.is_encoder_decoder
    read = [model.config.decoder_start_token_id] if decoder else list(ids)
    found: list[int] = []
    while len(found) < n_tokens and tokenizer.eos_token_id not in found:
        rest = {"decoder_input_ids": torch.tensor([read + found])} if decoder else {}
        text = torch.tensor([ids if decoder else read + found])
        found.append(int(model(input_ids=text, use_cache=False, **rest).logits[0, -1].argmax()))
    return str(tokenizer.decode(found, skip_special_tokens=True))


@pytest.mark.parametrize("name", KINDS)
def test_answers_do_not_depend_on_those_beside(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompts and answers of several lengths, alone and all at once."""
    kind = KINDS[name]
    model = kind.build()
    if name == "bart":
        assert model.generation_config.forced_eos_token_id == 2
    expected = {
        (prompt, wanted): likeliest(model, tokenizer, prompt, len(kind.given(tokenizer, prompt, wanted).answers) + 1)
        for prompt, wanted in PAIRS
    }
    assert len(set(expected.values())) > 1
    for batch_size in (1, 8):
        found = answer(
            model, tokenize_for(kind, tokenizer), PAIRS, batch_size=batch_size, generate=PAIRS, n_extra_tokens=1
        )
        assert {pair: given.text for pair, given in found.items()} == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2, "num_beams": 4},
        {"stop_strings": ["\n"]},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_settings_for_other_ways_to_generate(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Answers are greedy, one a prompt, whatever the model's generation config says; which stays as it is."""
    kind = KINDS["llama"]
    model, tokenize = kind.build(), tokenize_for(kind, tokenizer)
    plain = answer(model, tokenize, PAIRS, batch_size=8, generate=PAIRS)
    model.generation_config.update(**settings)
    assert answer(model, tokenize, PAIRS, batch_size=8, generate=PAIRS) == plain
    assert settings.items() <= model.generation_config.to_dict().items()


@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_batches(name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are full, longest texts first; where padding would run into a state, each length fills its own."""
    kind = KINDS[name]
    model = kind.build()
    generate: Any = model.generate
    asked: list[Any] = []
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(given) or generate(**given))
    pairs = [(text + end, "Italy") for end in ("", ".", " in") for text in ("Lyon is", "Oslo is", "Fez is", "Perth is")]
    lengths = Counter(len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs)
    assert max(lengths.values()) > 2 and len(lengths) > 2
    answer(model, tokenize_for(kind, tokenizer), pairs, batch_size=2, generate=pairs)
    longest_first = sorted(lengths.elements(), reverse=True)
    if name == "llama":
        expected = [(2, longest) for longest in longest_first[::2]]
    else:
        expected = [(min(2, lengths[n] - i), n) for n in sorted(lengths, reverse=True) for i in range(0, lengths[n], 2)]
        assert all(given["attention_mask"].all() for given in asked)
    assert [tuple(given["input_ids"].shape) for given in asked] == expected
