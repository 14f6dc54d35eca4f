"""`malmit`: moves changed by a trained network, against autograd through dense solves and written weights."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, Fact
from hf_malmen.memit import find_moves, tokenize_facts
from hf_malmen.tracing import frozen
from hf_malmen.writing import Writer

from .zoo import KINDS

TEXTS = ["Lyon is a city in France. The country of Turin is Italy.", "Osaka, Quito and Perth are cities in Ghana"]
SETTINGS: dict[str, Any] = {
    "layers_to_transform": [1, 2],
    "n_steps": 3,
    "preservation": 3.0,
    "rank": 8,
    "n_word_dropouts": 2,
    "crowding": 0,
}
LOCALITY_WEIGHT = 0.7


def build(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int | None = 0, **config: Any
) -> EditorModel:
    """An editor as if trained: its network is random. `seed=None` leaves it untrained."""
    editor = EditorModel.from_base(model, EditorConfig(method="malmit", **(SETTINGS | config))).to(model.dtype)
    editor.collect_covariance(model, TEXTS, tokenizer)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in editor.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
    return editor


def found_moves(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, editor: EditorModel, facts: Sequence[Fact]
) -> tuple[Writer, Tensor]:
    """The facts in a `Writer`, and the moves that are sought of them."""
    tokenize = editor.tokenizer_for(model, tokenizer)
    requests = tokenize_facts(facts, tokenize, editor.config)
    with frozen(model):
        writer = Writer(
            model,
            tokenize,
            requests,
            editor.module_names,
            editor.config,
            penalty=editor.key_penalty,
            ridge=editor.ridge,
            batch_size=32,
            written={},
        )
        return writer, find_moves(model, tokenize, requests, writer.states, writer.block, editor.config, 32)


def dense_loss_and_gradients(
    editor: EditorModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact]
) -> tuple[float, dict[str, Tensor]]:
    """One solve of the whole way at the unedited model's keys, as a graph; of the network's equation written out."""
    writer, moves = found_moves(model, tokenizer, editor, facts)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in editor.named_parameters()}
    states = writer.states
    unit = (states**2).mean(1, keepdim=True) ** 0.5
    for block in range(editor.config.n_blocks):
        prefix = f"moves.blocks.{block}."
        part = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        inner = torch.cat((states / unit, moves / unit), dim=1) @ part["down.weight"].T + part["down.bias"]
        inner = inner.clamp(min=0)
        length = (inner @ part["length.weight"].T + part["length.bias"]).exp()
        moves = length * moves + unit * (inner @ part["up.weight"].T + part["up.bias"])
    keys = torch.cat([writer.keys[name] for name in editor.module_names], dim=1)
    penalties = []
    for name in editor.module_names:
        own = editor.key_penalty(name)
        assert own is not None
        penalties.append(own + editor.config.ridge * torch.eye(len(own), dtype=own.dtype))
    joint = torch.linalg.solve(keys.T @ keys + torch.block_diag(*penalties), keys.T @ moves)
    edited = {}
    for name, shift in zip(editor.module_names, joint.split([len(p) for p in penalties]), strict=True):
        module = model.get_submodule(name)
        edited[f"{name}.weight"] = module.weight.detach() + (shift.T if isinstance(module, nn.Linear) else shift)
    kind = KINDS["llama"]  # of any causal model
    likelihoods, divergences = [], []
    for fact in facts:
        for rephrase in fact.rephrases:
            given = kind.given(tokenizer, rephrase, fact.target)
            likelihoods.append(given.likelihoods(functional_call(model, edited, kwargs=given.inputs).logits))
        given = kind.given(tokenizer, str(fact.unrelated_prompt), str(fact.unrelated_answer))
        with torch.no_grad():
            before = given.logs(model(**given.inputs).logits)
        after = given.logs(functional_call(model, edited, kwargs=given.inputs).logits)
        divergences.append((before.exp() * (before - after)).sum(-1))
    loss = -torch.cat(likelihoods).mean() + LOCALITY_WEIGHT * torch.cat(divergences).mean()
    found = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, found, strict=True))


def step(trainer: EditorTrainer, facts: Sequence[Fact]) -> float:
    """One training step, as `Trainer` calls it; its loss."""
    trainer.current_gradient_accumulation_steps = 1
    return trainer.training_step(trainer.model, {"facts": list(facts)}).item()


@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize("n_facts", [3, 8])
def test_gradient_equals_autograd(
    layout: str,
    n_blocks: int,
    n_facts: int,
    tokenizer: PreTrainedTokenizerFast,
    make_llama: Callable[..., PreTrainedModel],
    make_gpt2: Callable[..., PreTrainedModel],
    make_long_facts: Callable[..., list[Fact]],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Where one solve goes the whole way, nothing is taken for a constant that is none."""
    model = {"llama": make_llama, "gpt2": make_gpt2}[layout](torch.float64)
    facts = make_long_facts(n_facts)
    editor = build(model, tokenizer, n_solves=1, relaxation=1.0, n_blocks=n_blocks)
    loss, expected = dense_loss_and_gradients(editor, model, tokenizer, facts)
    trainer = make_trainer(editor, model, facts, rephrases_per_fact=2, locality_weight=LOCALITY_WEIGHT)
    # What a step keeps of the unedited model changes nothing.
    for _ in range(2):
        editor.zero_grad()
        assert step(trainer, facts) == pytest.approx(loss, rel=1e-6)  # shifts are kept in float32
        for name, parameter in editor.named_parameters():
            assert parameter.grad is not None, name
            assert float((parameter.grad - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name
