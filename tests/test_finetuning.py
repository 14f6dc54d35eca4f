"""Fine-tuning through shifts, against plain autograd and Adam on the weights of a copied model."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, Fact, NumericalError

from .zoo import KINDS

TEXTS = ["Lyon is a city in France. The country of Turin is Italy.", "Osaka, Quito and Perth are cities"]


def build(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, covariance: bool = True, **config: Any
) -> EditorModel:
    """An editor of the upper two blocks."""
    settings = {"layers_to_transform": [2, 3], "n_steps": 3, "facts_per_step": 3} | config
    editor = EditorModel.from_base(model, EditorConfig(method="ft", **settings))
    if covariance:
        editor.collect_covariance(model, TEXTS, tokenizer)
    return editor


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, fact: Fact) -> Tensor:
    """−log p(target | prompt) of one unpadded fact, summed over the target's tokens."""
    prompt = tokenizer(fact.prompt)["input_ids"]
    ids = tokenizer(f"{fact.prompt} {fact.target}")["input_ids"]
    logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum")


def reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], editor: EditorModel
) -> dict[str, Tensor]:
    """W after fine-tuning less W before, with the penalty written out and differentiated by autograd."""
    config, base = editor.config, model
    model = deepcopy(model).requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in editor.module_names}
    flipped = config.fan_in_fan_out or ()

    def shift(name: str) -> Tensor:
        difference = weights[name] - base.get_submodule(name).weight.detach()
        return difference if name in flipped else difference.T

    optimizer = torch.optim.Adam(weights.values(), lr=config.edit_lr)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.n_steps):
        order = torch.randperm(len(facts), generator=generator).tolist()
        for start in range(0, len(facts), config.facts_per_step):
            chosen = [facts[i] for i in order[start : start + config.facts_per_step]]
            loss = torch.stack([loss_of(model, tokenizer, fact) for fact in chosen]).mean()
            for name in weights:
                own = shift(name)
                loss = loss + config.ridge * own.square().sum() / len(facts)
                if (penalty := editor.key_penalty(name)) is not None:
                    loss = loss + (own.T @ penalty @ own).trace() / len(facts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: shift(name).detach() for name in weights}


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shifts_equal_plain_fine_tuning(
    kind: str,
    covariance: bool,
    make_llama: Callable[..., PreTrainedModel],
    make_gpt2: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
) -> None:
    """Steps of Adam on S through hooks are steps of Adam on W, penalty and short last steps included."""
    model = {"llama": make_llama, "gpt2": make_gpt2}[kind](torch.float64)
    facts = make_long_facts(7)
    editor = build(model, tokenizer, covariance=covariance, ridge=0.5, preservation=20.0, edit_lr=0.01)
    expected = reference(model, tokenizer, facts, editor)
    shifts = editor.make_edit(model, facts, tokenizer, batch_size=2).shifts
    assert list(shifts) == list(expected)
    for name, shift in expected.items():
        assert float((shifts[name] - shift).norm()) <= 1e-6 * float(shift.norm())  # kept in float32


class Experts(nn.Module):
    """Three linear layers, of which one runs where texts are short, one where they are long, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(48, 32, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        """(n_sequences, length, 48) -> (n_sequences, length, 32)."""
        found: Tensor = self.experts[int(hidden.shape[1] > 12)](hidden)
        return found


def test_experts_that_not_every_step_reaches(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, make_long_facts: Any
) -> None:
    """Where a layer does not run its loss has no gradient, and the penalty has; where it never does is an error."""
    model = make_llama(torch.float64)
    model.model.layers[3].mlp.down_proj = Experts().double()
    facts = make_long_facts(4)
    settings = {"layers_to_transform": [3], "covariance": False, "facts_per_step": 1, "ridge": 0.5}
    editor = build(model, tokenizer, target_modules=["experts.0", "experts.1"], **settings)
    expected = reference(model, tokenizer, facts, editor)
    for name, shift in editor.make_edit(model, facts, tokenizer).shifts.items():
        assert float((shift - expected[name]).norm()) <= 1e-6 * float(expected[name].norm())
    for experts in (["experts.0", "experts.2"], ["experts.2"]):
        editor = build(model, tokenizer, target_modules=experts, **settings)
        with pytest.raises(NumericalError, match=r"ever reached model\.layers\.3\.mlp\.down_proj\.experts\.2, so"):
            editor.make_edit(model, facts, tokenizer)


def test_facts_are_learned_and_then_it_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """The edit loss falls until every answer token is the most likely one; more passes change nothing any more."""
    editor = build(model, tokenizer, n_steps=60, edit_lr=0.01, preservation=1e-3)
    edit = editor.make_edit(model, facts, tokenizer)
    before = sum(float(loss_of(model, tokenizer, fact)) for fact in facts)
    with edit.applied_to(model):
        after = sum(float(loss_of(model, tokenizer, fact)) for fact in facts)
    assert after < 0.5 * before
    assert editor.evaluate(model, facts, tokenizer)["edit_success"] == 1.0
    longer = build(model, tokenizer, n_steps=80, edit_lr=0.01, preservation=1e-3)
    for name, shift in longer.make_edit(model, facts, tokenizer).shifts.items():
        assert torch.equal(shift, edit.shifts[name])


def test_the_seed_decides_and_batches_do_not(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, make_long_facts: Callable[..., list[Fact]]
) -> None:
    """The same again to the bit with one seed, another shift with another; memory is all that `batch_size` changes."""
    facts = make_long_facts(7)
    one = build(model, tokenizer).make_edit(model, facts, tokenizer).shifts
    torch.manual_seed(123)
    again = build(model, tokenizer).make_edit(model, facts, tokenizer).shifts
    other = build(model, tokenizer, seed=1).make_edit(model, facts, tokenizer).shifts
    for name, shift in one.items():
        assert torch.equal(again[name], shift)
        assert not torch.equal(other[name], shift)
    # In float64: Adam's first steps take the sign of a gradient, of which rounding decides where it is next to nothing.
    model.double()
    editor = build(model, tokenizer)
    for name, shift in editor.make_edit(model, facts, tokenizer).shifts.items():
        small = editor.make_edit(model, facts, tokenizer, batch_size=1).shifts[name]
        assert float((small - shift).norm()) <= 1e-6 * float(shift.norm())


def test_the_penalty_keeps_ordinary_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """With more weight on it, tr(Sᵀ C S) is smaller."""
    moves = []
    for preservation in (1e-3, 1e3):
        editor = build(model, tokenizer, preservation=preservation, n_steps=10)
        shifts = editor.make_edit(model, facts, tokenizer).shifts
        moves.append(
            sum(
                float((shift.T.double() @ editor.key_penalty(name) @ shift.double()).trace())  # type: ignore[operator]
                / preservation
                for name, shift in shifts.items()
            )
        )
    assert moves[1] < 0.2 * moves[0]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_tasks(kind: str, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> None:
    """A classifier and an encoder-decoder are fine-tuned alike."""
    row = KINDS[kind]
    model = row.build()
    config = EditorConfig(method="ft", n_steps=40, edit_lr=0.01, task_type=row.task)
    editor = EditorModel.from_base(model, config)
    given = row.facts(facts)
    scores = editor.evaluate(model, given, tokenizer)
    assert scores["edit_success"] > 0.9 > scores["edit_success_before"]


def test_model_is_as_found(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight, gradient, flag, mode or hook is left, also after an error; `undo` restores every bit."""
    model.train()
    list(model.parameters())[2].requires_grad_(False)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def state() -> list[Any]:
        return [
            (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
            for name, module in model.named_modules()
        ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]

    before, weights = state(), deepcopy(model.state_dict())
    editor = build(model, tokenizer)
    editor.make_edit(model, facts, tokenizer)
    assert state() == before
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("hf_malmen.finetuning.cross_entropy", fail)
        with pytest.raises(KeyboardInterrupt):
            editor.make_edit(model, facts, tokenizer)
    assert state() == before
    editor.apply(model, facts, tokenizer).undo()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_step_that_is_not_finite_names_the_module(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Descent that runs away ends with an error, and no edit."""
    model = make_llama()
    editor = build(model, tokenizer, edit_lr=1e30, covariance=False)
    with pytest.raises(NumericalError, match=r"model\.layers\..*its gradient is not finite\. Lower EditorConfig\.edit"):
        editor.make_edit(model, facts, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts_per_step": 0}, "facts_per_step is 0; allowed: a whole number of at least 1"),
        ({"seed": -1}, "seed is -1; allowed: a whole number of at least 0"),
        ({"kl_weight": 0.1}, "kl_weight is 0.1; allowed: nothing, with method 'ft'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """Each by name, with what is allowed."""
    with pytest.raises(ValueError, match=message):
        EditorConfig(method="ft", **settings)
