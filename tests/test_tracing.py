"""Keys, value gradients and shifted passes, against runs of one unpadded fact at a time on a copy of the model."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, Fact, ModelMismatchError, NumericalError
from hf_malmen.batches import TokenBatch, Tokenizer, TokenSequence
from hf_malmen.tracing import Trace, answer_logits, frozen, read_keys, shifted, trace

# Two layers of one shape, one of another, and one whose block the graph starts in.
TARGETS = {
    "llama": [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
    ],
    "gpt2": [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.3.mlp.c_fc",
        "transformer.h.3.mlp.c_proj",
    ],
}


@pytest.fixture(params=["llama", "gpt2"])
def case(
    request: pytest.FixtureRequest,
    make_llama: Callable[..., PreTrainedModel],
    make_gpt2: Callable[..., PreTrainedModel],
) -> tuple[PreTrainedModel, list[str]]:
    """A float64 model of each weight layout, and modules of it to trace."""
    build = {"llama": make_llama, "gpt2": make_gpt2}[request.param]
    return build(torch.float64), TARGETS[request.param]


@pytest.fixture
def tokenize(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tiny tokenizer in the plain prompt format."""
    return Tokenizer(tokenizer, EditorConfig(method="malmen"))


@pytest.fixture
def sequences(tokenize: Tokenizer, make_long_facts: Callable[..., list[Fact]]) -> list[TokenSequence]:
    """Five facts of different lengths, with answers of one to nine tokens."""
    return [tokenize(fact.prompt, fact.target) for fact in make_long_facts(5)]


def reference(model: nn.Module, names: list[str], sequence: TokenSequence) -> dict[str, Trace]:
    """Inputs of the modules over one sequence, and the gradient of its loss for a perturbation of their outputs.

    The loss is −Σ log p of the answer tokens; each module's output gets zeros added that are differentiated.
    """
    model = deepcopy(model).requires_grad_(False)
    seen: dict[str, Tensor] = {}
    perturbations: dict[str, Tensor] = {}

    def perturbed(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(module_input: Tensor) -> Tensor:
            output = forward(module_input)
            seen[name] = module_input.detach()[0]
            perturbations[name] = torch.zeros_like(output).requires_grad_()
            return output + perturbations[name]

        return run

    for name in names:
        module = model.get_submodule(name)
        module.forward = perturbed(name, module.forward)  # type: ignore[method-assign]
    logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
    loss = torch.zeros((), dtype=logits.dtype)
    for position, label in enumerate(sequence.labels):
        if label >= 0:
            loss = loss - (logits[position, label] - logits[position].logsumexp(-1))
    loss.backward()
    gradients = {name: perturbation.grad[0] for name, perturbation in perturbations.items()}  # type: ignore[index]
    return {name: Trace(seen[name], gradients[name]) for name in names}


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Equal up to `tolerance` of the norm."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-15


# Keys and value gradients


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("selection", ["answer", "all"])
def test_traces_equal_those_of_single_facts(
    case: tuple[PreTrainedModel, list[str]],
    tokenize: Tokenizer,
    sequences: list[TokenSequence],
    selection: str,
    side: str,
) -> None:
    """Rows of a padded batch are those of each fact alone, in the order of facts and tokens."""
    model, names = case
    batch = tokenize.pad(sequences, side)
    with frozen(model):
        found = trace(model, batch, names, selection)
    assert list(found) == names
    alone = [reference(model, names, sequence) for sequence in sequences]
    for name in names:
        keys, gradients = [], []
        for sequence, single in zip(sequences, alone, strict=True):
            chosen = [i for i, label in enumerate(sequence.labels) if selection == "all" or label >= 0]
            keys.append(single[name].keys[chosen])
            gradients.append(single[name].value_gradients[chosen])
        assert_close(found[name].keys, torch.cat(keys))
        assert_close(found[name].value_gradients, torch.cat(gradients))


def test_product_of_rows_is_the_gradient_of_the_weight(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """Over all tokens Uᵀ G is what autograd gives for the weight itself."""
    model, names = case
    with frozen(model):
        found = trace(model, tokenize.pad(sequences), names, "all")
    copy = deepcopy(model)
    for sequence in sequences:
        logits = copy(input_ids=torch.tensor([sequence.input_ids])).logits[0]
        F.cross_entropy(logits, torch.tensor(sequence.labels), reduction="sum", ignore_index=-100).backward()
    for name in names:
        module = copy.get_submodule(name)
        expected = module.weight.grad.T if isinstance(module, nn.Linear) else module.weight.grad
        assert_close(found[name].keys.T @ found[name].value_gradients, expected)


def test_gradients_of_a_fact_do_not_depend_on_the_facts_beside_it(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """The loss is a sum: alone, among others, or twice in a batch, a fact has the same rows."""
    model, names = case
    fact = sequences[1]
    count = len(fact.target_ids)
    with frozen(model):
        alone = trace(model, tokenize.pad([fact]), names, "answer")
        first = trace(model, tokenize.pad([fact, *sequences[2:]]), names, "answer")
        twice = trace(model, tokenize.pad([fact, sequences[2], fact]), names, "answer")
    for name in names:
        for part in (slice(0, count), slice(-count, None)):
            for what in ("keys", "value_gradients"):
                expected = getattr(alone[name], what)
                assert expected.shape[0] == count
                assert_close(getattr(twice[name], what)[part], expected)
                if part.start == 0:
                    assert_close(getattr(first[name], what)[part], expected)


def test_targets_given_in_any_order(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """The rows of a module do not depend on which other modules are traced, nor on the order of their names."""
    model, names = case
    batch = tokenize.pad(sequences)
    with frozen(model):
        together = trace(model, batch, names, "answer")
        turned = trace(model, batch, names[::-1], "answer")
        single = {name: trace(model, batch, [name], "answer")[name] for name in names}
    for name in names:
        for other in (turned[name], single[name]):
            assert_close(other.keys, together[name].keys, 1e-12)
            assert_close(other.value_gradients, together[name].value_gradients, 1e-12)


def test_token_selection(tokenize: Tokenizer, sequences: list[TokenSequence]) -> None:
    """`answer`: one token for each of the target's, from the prompt's last on; `all`: every token, no padding."""
    for side in ("right", "left"):
        batch = tokenize.pad(sequences, side)
        answer, every = batch.selected("answer"), batch.selected("all")
        assert every.sum(1).tolist() == [len(sequence.input_ids) for sequence in sequences]
        assert answer.sum(1).tolist() == [len(sequence.target_ids) for sequence in sequences]
        assert not (answer & ~every).any()
        for row, sequence in enumerate(sequences):
            read = batch.input_ids[row, answer[row]].tolist()
            assert read == [sequence.prompt_ids[-1], *sequence.target_ids[:-1]]
            assert batch.input_ids[row, every[row]].tolist() == list(sequence.input_ids)


def test_answer_logits_are_those_of_single_facts(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """Logits come sequence by sequence, and only where a target token is predicted."""
    model, _ = case
    with torch.no_grad():
        found, targets = answer_logits(model, tokenize.pad(sequences, "left"))
        expected = []
        for sequence in sequences:
            logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
            expected.append(logits[[i for i, label in enumerate(sequence.labels) if label >= 0]])
    assert targets.tolist() == [token for sequence in sequences for token in sequence.target_ids]
    assert_close(found, torch.cat(expected))


# The model is as found


def state_of(model: nn.Module) -> list[Any]:
    """Everything of a model that a pass could leave changed, but its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
        [(name, module.training) for name, module in model.named_modules()],
        [(name, hook, list(getattr(module, hook))) for name, module in model.named_modules() for hook in hooks],
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
    ]


@pytest.fixture
def used(case: tuple[PreTrainedModel, list[str]]) -> Iterator[tuple[PreTrainedModel, list[str]]]:
    """The model in the middle of somebody's use: mixed modes, frozen parameters, a gradient, a hook of their own."""
    model, names = case
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    handle = model.get_submodule(names[0]).register_forward_hook(lambda *_: None)
    yield model, names
    handle.remove()


def test_frozen_freezes_and_restores(used: tuple[PreTrainedModel, list[str]]) -> None:
    """Inside nothing trains; outside every flag of every module and parameter is as before, mixed as they were."""
    model, _ = used
    before = state_of(model)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state_of(model) == before
    with pytest.raises(KeyboardInterrupt), frozen(model):
        raise KeyboardInterrupt
    assert state_of(model) == before
    with frozen(model), frozen(model):
        pass
    assert state_of(model) == before


def test_tracing_leaves_the_model_as_found(
    used: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """No gradient, hook or flag is left, and no weight changed; a gradient that was there is not added to."""
    model, names = used
    before, weights = state_of(model), deepcopy(model.state_dict())
    batch = tokenize.pad(sequences)
    shift = torch.zeros(model.get_submodule(names[-1]).weight.shape, dtype=torch.float64)
    shift = shift.T if isinstance(model.get_submodule(names[-1]), nn.Linear) else shift
    with frozen(model):
        trace(model, batch, names, "answer")
        with shifted(model, {names[-1]: shift.requires_grad_()}):
            answer_logits(model, batch)[0].sum().backward()
    assert state_of(model) == before
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))  # type: ignore[arg-type]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_tracing_works_under_no_grad(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """A caller's `no_grad` neither stops the gradients nor is lifted by them."""
    model, names = case
    batch = tokenize.pad(sequences)
    with frozen(model):
        expected = trace(model, batch, names, "answer")
        with torch.no_grad():
            found = trace(model, batch, names, "answer")
            assert not torch.is_grad_enabled()
    for name in names:
        assert torch.equal(found[name].value_gradients, expected[name].value_gradients)
        assert not found[name].keys.requires_grad
        assert not found[name].value_gradients.requires_grad


def test_model_is_as_found_after_an_error(
    used: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """An error inside the forward pass, inside the trace, or inside the shifted pass leaves nothing behind."""
    model, names = used
    before = state_of(model)
    bad = tokenize.pad(sequences)
    bad = TokenBatch(bad.input_ids + 10_000, bad.attention_mask, bad.labels)  # no such tokens

    def trace_bad() -> None:
        trace(model, bad, names, "answer")

    def trace_missing() -> None:
        trace(model, tokenize.pad(sequences), [names[0], "no.such.module"], "answer")

    def shift_bad() -> None:
        with shifted(model, {names[0]: torch.zeros(3, 3, dtype=torch.float64)}):
            answer_logits(model, tokenize.pad(sequences))

    def shift_missing() -> None:
        with shifted(model, {names[0]: torch.zeros(3, 3), "no.such.module": torch.zeros(3, 3)}):
            pass

    for run, error in (
        (trace_bad, IndexError),
        (trace_missing, AttributeError),
        (shift_bad, RuntimeError),
        (shift_missing, AttributeError),
    ):
        with pytest.raises(error), frozen(model):
            run()
        assert state_of(model) == before


# Non-finite values


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_keys_name_the_module(
    make_llama: Callable[..., PreTrainedModel], tokenize: Tokenizer, sequences: list[TokenSequence], value: float
) -> None:
    """A layer whose inputs overflow is named, with what to do."""
    model, names = make_llama(), TARGETS["llama"][2:]
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight[3, 4] = value
    before = state_of(model)
    message = rf"{names[0]}: its keys are not finite.*float32"
    with pytest.raises(NumericalError, match=message), frozen(model):
        trace(model, tokenize.pad(sequences), names, "answer")
    assert state_of(model) == before


def test_non_finite_gradients_name_the_module(
    make_llama: Callable[..., PreTrainedModel], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """Finite keys below a loss that is not finite: the gradients are refused."""
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    message = r"model\.layers\.3\.mlp\.down_proj: its value gradients are not finite"
    with pytest.raises(NumericalError, match=message), frozen(model):
        trace(model, tokenize.pad(sequences), ["model.layers.3.mlp.down_proj"], "answer")


def test_module_that_never_runs_is_an_error(
    make_llama: Callable[..., PreTrainedModel], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """A linear layer outside of the forward pass has nothing to trace."""
    model = make_llama()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(NumericalError, match="never reached spare"), frozen(model):
        trace(model, tokenize.pad(sequences), ["model.layers.3.mlp.down_proj", "spare"], "answer")


def test_keys_of_a_module_that_runs_twice_are_an_error(
    make_llama: Callable[..., PreTrainedModel], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """Of two calls neither has all of the keys."""
    model, name = make_llama(), "model.layers.1.mlp.down_proj"
    mlp = model.model.layers[1].mlp
    once = mlp.forward
    mlp.forward = lambda hidden: once(hidden) + once(2 * hidden)
    with pytest.raises(ModelMismatchError, match="down_proj runs more than once in a pass"), frozen(model):
        read_keys(model, tokenize.pad(sequences), [name], "all", model.model.layers[2])


# Shifted passes


def shifts_for(model: nn.Module, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """A random shift of shape (key_size, value_size) for each module, a tenth of its weight's size."""
    generator = torch.Generator().manual_seed(seed)
    shifts = {}
    for name in names:
        weight = model.get_submodule(name).weight
        sizes = weight.T.shape if isinstance(model.get_submodule(name), nn.Linear) else weight.shape
        shifts[name] = 0.1 * weight.std().item() * torch.randn(sizes, generator=generator, dtype=torch.float64)
    return shifts


def edited_copy(model: PreTrainedModel, shifts: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of the model with the shifts added to its weights."""
    copy = deepcopy(model)
    with torch.no_grad():
        for name, shift in shifts.items():
            module = copy.get_submodule(name)
            module.weight += shift.T if isinstance(module, nn.Linear) else shift
    return copy


def test_shifted_model_is_the_edited_model(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """Logits equal those of a model whose weights really hold the shifts; afterwards those of the model as it was."""
    model, names = case
    shifts = shifts_for(model, names)
    batch = tokenize.pad(sequences)
    with torch.no_grad():
        before = answer_logits(model, batch)[0]
        with shifted(model, shifts):
            found = answer_logits(model, batch)[0]
        assert torch.equal(answer_logits(model, batch)[0], before)
        expected = answer_logits(edited_copy(model, shifts), batch)[0]
    assert_close(found, expected, 1e-9)
    assert float((expected - before).norm() / before.norm()) > 1e-2


def test_gradient_of_the_shift_is_that_of_the_edited_weight(
    case: tuple[PreTrainedModel, list[str]], tokenize: Tokenizer, sequences: list[TokenSequence]
) -> None:
    """∂L/∂S equals what autograd gives for the weight of the edited copy, batch after batch."""
    model, names = case
    shifts = {name: shift.requires_grad_() for name, shift in shifts_for(model, names).items()}
    copy = edited_copy(model, {name: shift.detach() for name, shift in shifts.items()})
    with frozen(model):
        for part in (sequences[:2], sequences[2:]):
            with shifted(model, shifts):
                logits, targets = answer_logits(model, tokenize.pad(part))
                F.cross_entropy(logits, targets, reduction="sum").backward()
    for sequence in sequences:
        logits = copy(input_ids=torch.tensor([sequence.input_ids])).logits[0]
        F.cross_entropy(logits, torch.tensor(sequence.labels), reduction="sum", ignore_index=-100).backward()
    for name in names:
        module = copy.get_submodule(name)
        expected = module.weight.grad.T if isinstance(module, nn.Linear) else module.weight.grad
        assert shifts[name].grad is not None
        assert_close(shifts[name].grad, expected)  # type: ignore[arg-type]
