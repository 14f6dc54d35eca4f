"""Tiny models and a tokenizer, built here: no test needs the network."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, Fact

torch.set_num_threads(1)
# The same examples on every machine, whatever its speed.
settings.register_profile("hf_malmen", derandomize=True, deadline=None, database=None)
settings.load_profile("hf_malmen")

CITIES = ("Lyon", "Turin", "Osaka", "Quito", "Perth", "Accra", "Lima", "Oslo", "Cairo", "Delhi", "Bergen", "Fez")
COUNTRIES = ("France", "Italy", "Japan", "Ecuador", "Australia", "Ghana")
CORPUS = [
    f"{city} is a city in {country}. The country of {city} is {country}." for city in CITIES for country in COUNTRIES
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(*, add_bos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
        chat_template=CHAT_TEMPLATE,
    )


def build_llama(
    dtype: torch.dtype = torch.float32, *, intermediate_size: int = 48, n_layers: int = 4
) -> PreTrainedModel:
    """A Llama of 32 features with random weights; `intermediate_size=32` makes its feed-forward layers square."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=360,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def build_gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A GPT-2 with `Conv1D` layers and learned position embeddings, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=360,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def build_facts(n: int = 8) -> list[Fact]:
    """Facts with rephrases and unrelated prompts; prompts and targets differ in length."""
    facts = []
    for i in range(n):
        city, other = CITIES[i % len(CITIES)], CITIES[(i + 5) % len(CITIES)]
        suffix = "" if i < len(CITIES) else f" number {i}"
        facts.append(
            Fact(
                prompt=f"The country of {city}{suffix} is",
                target=COUNTRIES[(i * 5 + 1) % len(COUNTRIES)],
                rephrases=(f"{city}{suffix} is a city in", f"{city}{suffix}, a city in the country of"),
                unrelated_prompt=f"{other} is a city in",
                unrelated_answer=COUNTRIES[i % len(COUNTRIES)],
                subject=city,
            )
        )
    return facts


def build_long_facts(n: int = 8) -> list[Fact]:
    """`build_facts`, with answers of one to nine tokens."""
    facts = []
    for i, fact in enumerate(build_facts(n)):
        others = [COUNTRIES[(i + j) % len(COUNTRIES)] for j in range(i % 3)]
        answer = " and ".join([COUNTRIES[i % len(COUNTRIES)], *others])
        facts.append(replace(fact, target=" and ".join([fact.target, *others]), unrelated_answer=answer))
    return facts


def build_editor(model: PreTrainedModel, *, seed: int | None = 0, **config: Any) -> EditorModel:
    """An editor for `model` as if trained: parameters and buffers are random. `seed=None` leaves it untrained.

    The editor has the dtype of `model`.
    """
    torch.manual_seed(seed or 0)
    editor = EditorModel.from_base(
        model, EditorConfig(**({"method": "malmen", "rank": 8, "edit_lr": 1e-3} | config))
    ).to(model.dtype)
    if seed is None:
        return editor
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in editor.named_parameters():
            spread = 0.2 if "log_" in name else 0.1
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        for network in editor.networks.values():
            size = network.key_size + network.value_size
            scale = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
            network.statistics.update(scale * torch.randn(200, size, generator=generator, dtype=torch.float64))
            network.preserved_keys.normal_(generator=generator)
    return editor


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, padding on the right."""
    return build_tokenizer()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny causal language model in float32, of each weight layout."""
    return {"llama": build_llama, "gpt2": build_gpt2}[request.param]()


@pytest.fixture
def facts() -> list[Fact]:
    """Eight facts."""
    return build_facts()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`build_tokenizer`: test modules cannot import from this file."""
    return build_tokenizer


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., PreTrainedModel]:
    """`build_llama`."""
    return build_llama


@pytest.fixture(scope="session")
def make_gpt2() -> Callable[..., PreTrainedModel]:
    """`build_gpt2`."""
    return build_gpt2


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., list[Fact]]:
    """`build_facts`."""
    return build_facts


@pytest.fixture(scope="session")
def make_long_facts() -> Callable[..., list[Fact]]:
    """`build_long_facts`."""
    return build_long_facts


@pytest.fixture(scope="session")
def make_editor() -> Callable[..., EditorModel]:
    """`build_editor`."""
    return build_editor


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., EditorTrainer]:
    """A builder of trainers on the CPU that report nowhere and write below the test's own folder."""

    def build(
        editor: EditorModel,
        base_model: PreTrainedModel,
        train_dataset: Any,
        *,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **arguments: Any,
    ) -> EditorTrainer:
        settings = {"output_dir": tmp_path / "run", "use_cpu": True, "report_to": [], "disable_tqdm": True} | arguments
        return EditorTrainer(
            editor=editor,
            base_model=base_model,
            args=EditorTrainingArguments(**settings),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return build


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """No progress bars in the captured output."""
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _caches_of_evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`evaluate` copies and caches metrics below the test run's own folder, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_METRICS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name.lower()))
        yield
