"""`malmit`: moves changed by a trained network, against autograd through dense solves and written weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_malmen.training_steps
from hf_malmen import (
    EditorConfig,
    EditorModel,
    EditorTrainer,
    Fact,
    FactError,
    ModelMismatchError,
    UntrainedEditorWarning,
)
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
    torch.manual_seed(0)
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


def test_gradient_is_that_of_where_the_solves_lead(
    tokenizer: PreTrainedTokenizerFast,
    make_llama: Callable[..., PreTrainedModel],
    make_long_facts: Callable[..., list[Fact]],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """The keys of one edited layer do not change: many short steps come to one that goes all the way."""
    model, facts = make_llama(torch.float64), make_long_facts(5)
    editor = build(model, tokenizer, layers_to_transform=[1], n_solves=80, relaxation=0.4, preservation=30.0)
    loss, expected = dense_loss_and_gradients(editor, model, tokenizer, facts)
    trainer = make_trainer(editor, model, facts, rephrases_per_fact=2, locality_weight=LOCALITY_WEIGHT)
    assert step(trainer, facts) == pytest.approx(loss, rel=1e-6)
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None, name
        assert float((parameter.grad - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


def test_untrained_it_is_memit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> None:
    """The network starts as the identity, so that what `memit` does is what comes out, bit for bit."""
    editor = build(model, tokenizer, seed=None)
    assert not editor.is_trained
    settings = {name: value for name, value in SETTINGS.items() if name != "rank"}
    memit = EditorModel.from_base(model, EditorConfig(method="memit", **settings))
    memit.collect_covariance(model, TEXTS, tokenizer)
    expected = memit.make_edit(model, facts, tokenizer).shifts
    for name, shift in editor.make_edit(model, facts, tokenizer).shifts.items():
        assert torch.equal(shift, expected[name])


def test_training_lowers_the_loss_and_moves_every_parameter(
    tokenizer: PreTrainedTokenizerFast,
    make_llama: Callable[..., PreTrainedModel],
    make_facts: Callable[..., list[Fact]],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Of a new editor, which reads its covariance off the training facts; all solves but the last have no graph."""
    model, facts = make_llama(), make_facts(8)
    editor = EditorModel.from_base(model, EditorConfig(**SETTINGS))
    assert editor.config.method == "malmit"
    before = {name: parameter.clone() for name, parameter in editor.named_parameters()}
    trainer = make_trainer(
        editor, model, facts, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1
    )
    trainer.train()
    losses = [entry["generalization_loss"] for entry in trainer.state.log_history if "generalization_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert editor.is_trained
    assert editor.n_covariance_tokens > 50
    for name, parameter in editor.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_moves_are_sought_once_a_fact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also in a step of fewer facts, and in a run that comes later, where the first has left them on disk; not those of
    other settings."""
    sought: list[int] = []
    plain = hf_malmen.training_steps.find_moves

    def counted(model: Any, tokenize: Any, requests: Sequence[Any], *rest: Any, **named: Any) -> Tensor:
        sought.append(len(requests))
        return plain(model, tokenize, requests, *rest, **named)

    monkeypatch.setattr("hf_malmen.training_steps.find_moves", counted)

    def train(max_steps: int = 6, **config: Any) -> EditorModel:
        editor = build(model, tokenizer, seed=None, crowding=0.5, **config)
        settings = {
            "max_steps": max_steps,
            "per_device_train_batch_size": 3,
            "trunk_cache_dir": str(tmp_path / "cache"),
        }
        make_trainer(editor, model, facts, **settings).train()
        return editor

    train(max_steps=1)
    assert sum(sought) == 3
    first = train()
    assert sum(sought) == len(facts)
    again = train()
    assert sum(sought) == len(facts)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    train(n_steps=2)
    assert sum(sought) == 2 * len(facts)


def test_trained_it_is_saved_applied_and_undone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """A loaded editor makes the edit that the saved one makes, and undo brings every bit back."""
    editor = build(model, tokenizer)
    expected = editor.make_edit(model, facts, tokenizer).shifts
    editor.save_pretrained(tmp_path)
    loaded = EditorModel.from_pretrained(tmp_path)
    assert loaded.is_trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit = loaded.apply(model, facts, tokenizer)
    for name, shift in edit.shifts.items():
        assert torch.equal(shift, expected[name])
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    edit.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_fact_without_a_subject_is_written_where_its_prompt_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """As if all of the prompt were its subject. Where the divergence of "{subject} is a" counts, it is refused."""
    editor = build(model, tokenizer)
    bare = [replace(fact, subject=None) for fact in facts]
    expected = editor.make_edit(model, [replace(fact, subject=fact.prompt) for fact in facts], tokenizer).shifts
    for name, shift in editor.make_edit(model, bare, tokenizer).shifts.items():
        assert torch.equal(shift, expected[name])
    with pytest.raises(FactError, match="Method 'malmit', which writes a fact where its subject has been read, needs"):
        build(model, tokenizer, kl_weight=0.5).make_edit(model, bare, tokenizer)


def test_what_has_read_nothing_says_so(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """It edits all the same: a user's first try with no more than a model and facts."""
    editor = EditorModel.from_base(model)
    with pytest.warns(UntrainedEditorWarning, match="has read no text"):
        edit = editor.apply(model, facts, tokenizer)
    edit.undo()
    with pytest.raises(ModelMismatchError, match=r"for 'CAUSAL_LM'\. Leave task_type out"):
        EditorModel.from_base(model, EditorConfig(task_type="SEQ_CLS"))
    made = EditorModel(EditorConfig(target_modules=["a"], module_shapes={"a": [4, 2]}))
    assert made.config.method == "malmit"


def test_sequences_are_refused(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Targets are of the unedited model."""
    with pytest.raises(ValueError, match=r"is_sequential is True; expected False with method 'malmit'"):
        make_trainer(build(model, tokenizer), model, facts, is_sequential=True)


def test_resumed_it_ends_with_the_bits_of_a_run_that_went_on(
    model: PreTrainedModel,
    facts: list[Fact],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
) -> None:
    """Its covariance comes with the checkpoint; moves that were found before it are sought again by both."""

    def trainer_for(folder: str) -> EditorTrainer:
        torch.manual_seed(0)
        settings = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 1e-3}
        return make_trainer(
            EditorModel.from_base(model, EditorConfig(**SETTINGS)),
            model,
            facts,
            output_dir=tmp_path / folder,
            **settings,
        )

    whole = trainer_for("whole")
    whole.train()
    resumed = trainer_for("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    state = whole.editor.state_dict()
    assert any(name.startswith("covariances") for name in state)
    for name, value in resumed.editor.state_dict().items():
        assert torch.equal(value, state[name]), name
