"""`Edit` and `EditorModel.apply` on live models: what is written, that it can be taken back, and what is refused."""

import copy
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import hf_malmen.edit
from hf_malmen import (
    Edit,
    EditorConfig,
    EditorModel,
    EditStateError,
    Fact,
    FactError,
    FingerprintWarning,
    ModelMismatchError,
    NumericalError,
    UntrainedEditorWarning,
    live_edits,
)
from hf_malmen.configuration import METHODS

Build = Callable[..., Any]
Tensors = dict[str, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request: pytest.FixtureRequest, make_llama: Build, make_gpt2: Build) -> Build:
    """A builder of tiny models, for each weight layout."""
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]


@pytest.fixture
def editor(model: PreTrainedModel, make_editor: Build) -> EditorModel:
    """An editor for `model`, as if trained."""
    trained: EditorModel = make_editor(model)
    return trained


def state(module: nn.Module) -> Tensors:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(found: Tensors, expected: Tensors) -> bool:
    """Bit for bit, so that -0.0 is not 0.0."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and bits(found[name]) == bits(expected[name])
        for name in expected
    )


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    return bytes(tensor.flatten().view(torch.uint8).numpy())


def random_edit(model: PreTrainedModel, *, seed: int = 0, scale: float = 0.1, modules: slice = slice(None)) -> Edit:
    """Random shifts for the feed-forward outputs of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in model.named_modules() if name.endswith(("mlp.down_proj", "mlp.c_proj"))][modules]
    flipped = [name for name in names if isinstance(model.get_submodule(name), Conv1D)]
    shifts = {}
    for name in names:
        shape = model.get_submodule(name).weight.shape
        shifts[name] = scale * torch.randn(shape if flipped else shape[::-1], generator=generator)
    return Edit(shifts, fan_in_fan_out=flipped, facts=[Fact(f"The number {seed} is", "even")])


def by_hand(model: PreTrainedModel, edit: Edit) -> Tensors:
    """W + Sᵀ for `nn.Linear`, W + S for `Conv1D`, added in float32 and rounded once."""
    expected = state(model)
    for name, shift in edit.shifts.items():
        weight = expected[f"{name}.weight"]
        oriented = shift if isinstance(model.get_submodule(name), Conv1D) else shift.T
        expected[f"{name}.weight"] = (weight.float() + oriented).to(weight.dtype)
    return expected


# Apply and undo


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_writes_the_shift_and_undo_restores_every_bit(make_model: Build, dtype: torch.dtype) -> None:
    """`W += S; W -= S` does not come back, so undo is a restore."""
    model = make_model(dtype)
    before = state(model)
    edit = random_edit(model)
    expected = by_hand(model, edit)
    assert not edit.in_force

    assert edit.apply_to(model) is edit
    assert edit.in_force
    assert same(state(model), expected)
    assert not same(state(model), before)
    name, shift = next(iter(edit.shifts.items()))
    weight = model.get_submodule(name).weight.detach()
    oriented = (shift if name in edit.fan_in_fan_out else shift.T).to(dtype)
    assert not torch.equal(weight - oriented, before[f"{name}.weight"])  # what undo must not do

    edit.undo()
    assert not edit.in_force
    assert same(state(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_pipeline_leaves_no_trace(
    make_model: Build, make_editor: Build, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """`editor.apply` changes the target weights alone, and `undo` brings them back, in every dtype."""
    model = make_model(dtype)
    before = state(model)
    editor = make_editor(model)
    edit = editor.apply(model, facts, tokenizer)
    after = state(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{name}.weight" for name in editor.module_names
    }
    assert same(after, by_hand_from(before, edit))
    edit.undo()
    assert same(state(model), before)


def by_hand_from(before: Tensors, edit: Edit) -> Tensors:
    """`by_hand`, from a state."""
    expected = dict(before)
    for name, shift in edit.shifts.items():
        weight = before[f"{name}.weight"]
        oriented = shift if name in edit.fan_in_fan_out else shift.T
        expected[f"{name}.weight"] = (weight.float() + oriented).to(weight.dtype)
    return expected


def test_the_edit_changes_what_the_model_says(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """The returned edit is in force on the model that was passed, and its undo is too."""
    inputs = tokenizer(facts[0].prompt, return_tensors="pt")
    before = model(input_ids=inputs["input_ids"]).logits
    edit = editor.apply(model, facts, tokenizer)
    after = model(input_ids=inputs["input_ids"]).logits
    assert (after - before).abs().max() > 1e-3
    edit.undo()
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)


def test_square_layers(
    make_llama: Build, make_gpt2: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A square weight fits either way round; the layer's kind decides, never the shape."""
    llama, gpt2 = make_llama(intermediate_size=32), make_gpt2()
    for model, targets in ((llama, ["mlp.down_proj"]), (gpt2, ["attn.c_proj"])):
        editor = make_editor(model, target_modules=targets, edit_lr=0.1)
        name = editor.module_names[-1]
        assert editor.config.shape_of(name) == (32, 32)
        before = state(model)
        edit = editor.apply(model, facts, tokenizer)
        shift = edit.shifts[name]
        assert not torch.equal(shift, shift.T)
        oriented = shift if model is gpt2 else shift.T
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"] + oriented)
        # The forward pass agrees: the layer's output moves by x S.
        rows = torch.randn(3, 32)
        moved = model.get_submodule(name)(rows)
        edit.undo()
        torch.testing.assert_close(moved, model.get_submodule(name)(rows) + rows @ shift)
        assert same(state(model), before)


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_failure_half_way_restores_what_was_written(
    make_model: Build, dtype: torch.dtype, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle too: all layers, or none."""
    model = make_model(dtype)
    before = state(model)
    edit = random_edit(model)
    real, calls = hf_malmen.edit.add_rows, []

    def failing(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            assert not same(state(model), before), "the first layer is written by now"
            raise error("in the middle")
        return real(*args)

    monkeypatch.setattr(hf_malmen.edit, "add_rows", failing)
    with pytest.raises(error, match="in the middle"):
        edit.apply_to(model)
    assert same(state(model), before)
    assert not edit.in_force
    monkeypatch.undo()
    edit.apply_to(model)  # and nothing of the failure is left behind
    edit.undo()
    assert same(state(model), before)


def test_a_weight_that_would_overflow_is_refused(make_llama: Build) -> None:
    """float16 ends at 65504; a layer that would be infinite is named, and the layers before it are restored."""
    model = make_llama(torch.float16)
    before = state(model)
    shifts = dict(random_edit(model).shifts)
    name = list(shifts)[2]
    shifts[name][3, 4] = 1e5
    edit = Edit(shifts)
    with pytest.raises(NumericalError, match=rf"{re.escape(name)}: the edited weight is not finite in torch\.float16"):
        edit.apply_to(model)
    assert same(state(model), before)
    assert not edit.in_force


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """The model's settings are the same objects with the same values afterwards."""

    def settings() -> dict[str, Any]:
        return {
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "parameters": {name: id(p) for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "hooks": {
                name: (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
                for name, module in model.named_modules()
            },
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "generation": model.generation_config.to_dict(),
        }

    before = settings()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    yield
    assert settings() == before
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        if expected is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected), name


def unusual(model: PreTrainedModel) -> list[str]:
    """Settings that a careless restore would level: some frozen, some with gradients, mixed modes, a hook."""
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    for parameter in parameters[1::3]:
        parameter.grad = torch.full_like(parameter, 2.0)
    model.train()
    list(model.modules())[5].training = False
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("called"))
    return calls


def test_the_base_model_is_left_as_found(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """requires_grad, gradients, modes, hooks and attributes, through every call."""
    calls = unusual(model)
    before = state(model)
    with untouched(model):
        editor.make_edit(model, facts, tokenizer)
        editor.apply(model, facts, tokenizer).undo()
        editor.apply(model, facts, tokenizer, facts_per_turn=3).undo()
        editor.evaluate(model, facts, tokenizer)
        editor.evaluate(model, facts[:2], tokenizer, generate=True)
        with editor.applied(model, facts, tokenizer=tokenizer):
            pass
    assert calls
    assert same(state(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_base_model_is_left_as_found_after_an_error(
    model: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails in the middle of a forward pass."""
    unusual(model)
    before = state(model)
    last = model.get_submodule(editor.module_names[-1])
    real = last.forward
    with untouched(model):
        for call in (editor.make_edit, editor.apply, editor.evaluate):
            calls: list[int] = []

            def failing(*args: Any, seen: list[int] = calls) -> Tensor:
                seen.append(1)
                if len(seen) > 1:
                    raise error("out of memory")
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(last, "forward", failing)
                with pytest.raises(error, match="out of memory"):
                    call(model, facts, tokenizer, batch_size=3)
        vars(last).pop("forward", None)  # monkeypatch puts the class's method back as an attribute
    assert same(state(model), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_works_on_a_frozen_model_without_gradients(
    make_llama: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], method: str, mode: Build
) -> None:
    """How models for inference are often held. The shifts are the same, and the model can be differentiated later."""
    model = make_llama()
    settings = {"edit_lr": 1e-3} if METHODS[method].maker == "rows" else {"n_steps": 2}
    editor = EditorModel.from_base(model, EditorConfig(method=method, layers_to_transform=[0, 1], **settings))
    if METHODS[method].maker == "rows":
        editor.warm_up(model, facts, tokenizer)
    else:
        editor.collect_covariance(model, [fact.prompt for fact in facts], tokenizer)
    expected = editor.make_edit(model, facts[:3], tokenizer).shifts
    model.requires_grad_(False)
    with mode():
        edit = editor.apply(model, facts[:3], tokenizer)
    assert same(edit.shifts, expected)
    edit.undo()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model(input_ids=torch.arange(3)[None]).logits.sum().backward()


def test_a_buffer_made_in_inference_mode_does_no_harm(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A rotary embedding makes one when a longer text comes in, in whatever mode that is read."""
    model = make_llama()
    editor = make_editor(model)
    expected = editor.make_edit(model, facts, tokenizer).shifts
    rotary = model.get_submodule("model.rotary_emb")
    with torch.inference_mode():
        rotary.inv_freq = rotary.inv_freq.clone()
    assert same(editor.make_edit(model, facts, tokenizer).shifts, expected)


def test_model_made_in_inference_mode_is_refused(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Nothing that it takes part in can be differentiated."""
    with torch.inference_mode():
        model = make_llama()
    with pytest.raises(ModelMismatchError, match="Load the model outside of inference mode"):
        make_editor(make_llama()).make_edit(model, facts, tokenizer)


# Stacked edits


def test_edits_stack_and_undo_in_any_order(make_model: Build) -> None:
    """A, then B: undoing A leaves exactly what B alone writes; undoing B then leaves the base."""
    model = make_model(torch.bfloat16)
    base = state(model)
    a, b, c = (random_edit(model, seed=seed, scale=3.0**seed) for seed in range(3))
    alone = {}
    for edit in (a, b, c):
        with edit.applied_to(model):
            alone[edit] = state(model)
    a.apply_to(model)
    b.apply_to(model)
    both = state(model)
    c.apply_to(model)
    assert a.in_force
    assert b.in_force
    assert not same(both, alone[a])

    c.undo()
    assert same(state(model), both)
    a.undo()
    assert same(state(model), alone[b])
    assert (a.in_force, b.in_force) == (False, True)
    b.undo()
    assert same(state(model), base)


def test_undo_from_the_middle_of_a_stack(make_model: Build) -> None:
    """Edits of different layers too; later edits come back in their order."""
    model = make_model(torch.float16)
    base = state(model)
    edits = [
        random_edit(model, seed=0),
        random_edit(model, seed=1, modules=slice(1, 3)),
        random_edit(model, seed=2, modules=slice(2, 4)),
    ]
    first, second, third = edits
    with first.applied_to(model), third.applied_to(model):
        expected = state(model)
    for edit in edits:
        edit.apply_to(model)
    second.undo()
    assert same(state(model), expected)
    second.apply_to(model)  # now the last
    third.undo()
    first.undo()
    second.undo()
    assert same(state(model), base)


def undo_fails(model: PreTrainedModel, edit: Edit, error: type[BaseException], match: str) -> None:
    """Check that undoing `edit` raises, and changes neither a bit of the weights nor which edits are in force."""
    before, in_force = state(model), live_edits(model)
    with pytest.raises(error, match=match):
        edit.undo()
    assert same(state(model), before)
    assert live_edits(model) == in_force
    assert all(listed.in_force for listed in in_force)


def stacked(model: PreTrainedModel) -> list[Edit]:
    """Three edits in force: of four layers; of two of these; of one of the two and another of the four."""
    modules = [slice(0, 4), slice(1, 3), slice(2, 4)]
    return [random_edit(model, seed=seed, modules=chosen).apply_to(model) for seed, chosen in enumerate(modules)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["add_rows", "overwrite", "copy_of"])
def test_undo_below_other_edits_is_all_or_nothing(
    make_model: Build, step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails, and however far it has come; afterwards the edits can be undone in any order."""
    model = make_model(torch.float16)
    base = state(model)
    edits = stacked(model)
    real = getattr(hf_malmen.edit, step)
    n_steps = {"add_rows": 4, "overwrite": 4, "copy_of": 7}[step]
    for fails_at in range(n_steps):
        calls: list[int] = []

        def failing(*args: Any, calls: list[int] = calls, fails_at: int = fails_at) -> Any:
            calls.append(1)
            done = real(*args)
            if len(calls) == fails_at + 1:  # once, after it was done: on the way back nothing fails
                raise error("in the middle")
            return done

        with monkeypatch.context() as patch:
            patch.setattr(hf_malmen.edit, step, failing)
            undo_fails(model, edits[0], error, "in the middle")
    first, second, third = edits
    first.undo()
    third.undo()
    expected = state(model)
    second.undo()
    assert same(state(model), base)
    with second.applied_to(model):
        assert same(state(model), expected)


def test_undo_can_be_called_again_when_its_way_back_fails(make_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C: the weights are half-way then, and no original is lost."""
    model = make_model(torch.bfloat16)
    base = state(model)
    first, second, third = stacked(model)
    first.undo()
    expected = state(model)
    third.undo()
    second.undo()
    for edit in (first, second, third):
        edit.apply_to(model)
    calls: list[int] = []
    real = hf_malmen.edit.overwrite

    def failing(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.edit, "overwrite", failing)
        with pytest.raises(KeyboardInterrupt):
            first.undo()
    assert live_edits(model) == [first, second, third]
    first.undo()
    assert same(state(model), expected)
    third.undo()
    second.undo()
    assert same(state(model), base)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_undo_of_the_last_edit_is_all_or_nothing_without_a_copy(
    make_model: Build, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The common case. What was restored before the failure is edited again, to the same bits."""
    model = make_model(torch.bfloat16)
    base = state(model)
    edit = random_edit(model).apply_to(model)
    other = random_edit(model, seed=1).apply_to(model)
    real, calls = hf_malmen.edit.overwrite, []

    def failing(*args: Any) -> None:
        real(*args)
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle")

    copies: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.edit, "overwrite", failing)
        patch.setattr(hf_malmen.edit, "copy_of", copies.append)
        undo_fails(model, other, error, "in the middle")
        other.undo()
    assert copies == []
    edit.undo()
    assert same(state(model), base)


def test_undo_below_an_edit_that_would_overflow_alone(make_llama: Build) -> None:
    """float16 ends at 65504: the later edit fits on top of the first one only. It is named, and nothing changes."""
    model = make_llama(torch.float16)
    base = state(model)
    first, second = random_edit(model), random_edit(model, seed=1)
    name = list(first.shifts)[2]
    for edit, value in ((first, -5e4), (second, 9e4)):
        shifts = dict(edit.shifts)
        shifts[name][3, 4] = value
        edit.layers = Edit(shifts).layers
        edit.apply_to(model)
    message = rf"{re.escape(name)}: the edited weight is not finite in torch\.float16.*undo the later ones first"
    undo_fails(model, first, NumericalError, message)
    second.undo()
    first.undo()
    assert same(state(model), base)


def test_one_edit_on_two_models_needs_two_edits(make_model: Build) -> None:
    """An edit is in force once. A second copy of it is another edit."""
    one, two = make_model(), make_model()
    base = state(one)
    edit = random_edit(one).apply_to(one)
    with pytest.raises(EditStateError, match=r"in force already, and would count twice\. Call undo\(\) first"):
        edit.apply_to(one)
    with pytest.raises(EditStateError, match="in force already"):
        edit.apply_to(two)
    assert same(state(two), base)
    assert same(state(one), by_hand_from(base, edit))
    edit.undo()
    edit.apply_to(two)
    assert same(state(one), base)
    edit.undo()
    assert same(state(two), base)


def test_undo_without_apply(model: PreTrainedModel) -> None:
    """There is nothing to restore, also the second time, and when the model is gone."""
    edit = random_edit(model)
    with pytest.raises(EditStateError, match="not in force on any live model, so there is nothing to undo"):
        edit.undo()
    edit.apply_to(model)
    edit.undo()
    with pytest.raises(EditStateError, match="nothing to undo"):
        edit.undo()

    gone = copy.deepcopy(model)
    edit.apply_to(gone)
    del gone
    assert not edit.in_force
    with pytest.raises(EditStateError, match="nothing to undo"):
        edit.undo()


def test_the_contexts_restore_also_on_error(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """`editor.applied` and `edit.applied_to`; within, the edit is in force."""
    base = state(model)
    with editor.applied(model, facts, tokenizer=tokenizer, batch_size=4) as edit:
        assert edit.in_force
        assert same(state(model), by_hand_from(base, edit))
    assert same(state(model), base)
    for context in (editor.applied(model, facts, tokenizer=tokenizer), edit.applied_to(model)):
        with pytest.raises(KeyError, match="mine"), context as entered:
            fail_if_in_force(entered)
        assert same(state(model), base)


def test_undo_within_a_context(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Then there is nothing to do when it ends. The tokenizer is the third argument, as of `apply`."""
    base = state(model)
    with editor.applied(model, facts, tokenizer) as edit:
        edit.undo()
        assert same(state(model), base)
    with edit.applied_to(model):
        edit.undo()
    assert same(state(model), base)


def test_an_edit_in_force_can_be_copied_and_pickled(model: PreTrainedModel) -> None:
    """The copy has the shifts and the facts, and is in force nowhere."""
    edit = random_edit(model).apply_to(model)
    for again in (pickle.loads(pickle.dumps(edit)), copy.deepcopy(edit)):
        assert not again.in_force
        assert again.facts == edit.facts
        assert all(torch.equal(again.shifts[name], shift) for name, shift in edit.shifts.items())
    edit.undo()


@pytest.mark.parametrize("as_path", [True, False])
def test_applied_is_for_live_models(
    model: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
    as_path: bool,
) -> None:
    """A checkpoint is not restored at the end, so it is refused before it is written, and the body does not run."""
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    folder: Any = tmp_path if as_path else str(tmp_path)
    message = r"expected a live model.*apply\(checkpoint, facts, output_dir=\.\.\.\).*hf-malmen undo"
    with (
        pytest.raises(ValueError, match=message),
        editor.applied(folder, facts, tokenizer=tokenizer, in_place=True),
    ):
        pytest.fail("the body ran")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def fail_if_in_force(edit: Edit) -> None:
    """An error inside of a context."""
    raise KeyError("mine" if edit.in_force else "not in force")


def test_the_shifts_of_an_edit_do_not_change(model: PreTrainedModel) -> None:
    """They are multiplied out when asked for, so that assigning to one would be lost without a word."""
    edit = random_edit(model)
    with pytest.raises(TypeError, match="does not support item assignment"):
        edit.shifts[next(iter(edit.shifts))] = torch.zeros(2, 2)  # type: ignore[index]
    with pytest.raises(AttributeError, match=r"has no setter|can't set"):
        edit.shifts = {}  # type: ignore[misc]


def test_merge_adds_shifts_and_facts(model: PreTrainedModel) -> None:
    """One edit that writes both, also where only one of them has a layer; the two stay as they are."""
    a, b = random_edit(model, seed=0, modules=slice(0, 2)), random_edit(model, seed=1, modules=slice(1, 3))
    kept = copy.deepcopy(dict(a.shifts))
    merged = a.merge(b)
    first, middle, last = list({**a.shifts, **b.shifts})
    assert same(
        merged.shifts, {first: a.shifts[first], middle: a.shifts[middle] + b.shifts[middle], last: b.shifts[last]}
    )
    assert merged.facts == [*a.facts, *b.facts]
    assert set(merged.fan_in_fan_out) == {*a.fan_in_fan_out, *b.fan_in_fan_out}
    assert same(a.shifts, kept)
    base = state(model)
    with merged.applied_to(model):
        assert same(state(model), by_hand_from(base, merged))
    assert same(state(model), base)


def test_merge_of_edits_for_different_models(model: PreTrainedModel) -> None:
    """Shifts add up only on one base. Of the same modules the fingerprints tell, whatever the base is called."""
    a, b = random_edit(model), random_edit(model, seed=1)
    a.base_model_fingerprint, b.base_model_fingerprint = "a", "b"
    a.base_model_name_or_path, b.base_model_name_or_path = "org/one", "org/two"
    message = (
        r"different weights in the same modules \(org/one, fingerprint a\.\.\.; org/two, fingerprint b\.\.\.\); they "
        r"cannot be merged\. One of them may have been made on top of other edits.*from the same checkpoint"
    )
    with pytest.raises(ModelMismatchError, match=message):
        a.merge(b)
    b.base_model_fingerprint = "a"
    merged = a.merge(b)
    assert (merged.base_model_fingerprint, merged.base_model_name_or_path) == ("a", "org/one")


def test_merge_of_edits_in_different_layers(
    model: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """Early blocks by one editor, the last ones by another: neither fingerprint is of all layers of the two together.

    The merged edit has none, and is applied, saved, loaded and written without one, and without a warning.
    """
    early, late = (make_editor(model, layers_to_transform=blocks) for blocks in ([0, 1], [2, 3]))
    a, b = early.make_edit(model, facts[:4], tokenizer), late.make_edit(model, facts[4:], tokenizer)
    a.base_model_name_or_path, a.base_model_revision = None, "old"  # of a base whose name is not known
    b.base_model_name_or_path, b.base_model_revision = "org/one", None
    assert a.base_model_fingerprint != b.base_model_fingerprint
    model.save_pretrained(tmp_path / "base")
    base = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FingerprintWarning)
        merged = a.merge(b)
        assert merged.base_model_fingerprint is None
        assert (merged.base_model_name_or_path, merged.base_model_revision) == ("org/one", None)
        expected = by_hand_from(base, merged)
        loaded = Edit.from_pretrained(merged.save_pretrained(tmp_path / "edit"))
        assert loaded.base_model_fingerprint is None
        for edit in (merged, loaded):
            with edit.applied_to(model, on_fingerprint_mismatch="error"):
                assert same(state(model), expected)
        loaded.write(tmp_path / "base", tmp_path / "written", on_fingerprint_mismatch="error")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert same(state(written), expected)
    assert same(state(model), base)


def test_a_merged_edit_keeps_the_fingerprint_of_all_its_modules(model: PreTrainedModel) -> None:
    """That of an edit which has all modules of the two. Another one would be compared with weights it is not of."""
    whole, part = random_edit(model), random_edit(model, seed=1, modules=slice(1, 3))
    whole.base_model_fingerprint, part.base_model_fingerprint = "whole", "part"
    assert whole.merge(part).base_model_fingerprint == "whole"
    assert part.merge(whole).base_model_fingerprint == "whole"
    assert part.merge(part).base_model_fingerprint == "part"
    assert part.merge(random_edit(model, modules=slice(2, 4))).base_model_fingerprint is None


@pytest.mark.parametrize(
    ("name", "revision", "refused"),
    [
        ("org/one", "a", False),
        ("org/two", "a", True),
        ("org/one", "b", True),
        (None, "a", False),
        ("org/one", None, False),
    ],
)
def test_merge_goes_by_the_base_models_name_where_fingerprints_cannot_tell(
    model: PreTrainedModel, name: str | None, revision: str | None, refused: bool
) -> None:
    """Of different modules, or where one of the edits has no fingerprint; as far as name and revision are known."""
    whole, part = random_edit(model), random_edit(model, seed=1, modules=slice(1, 3))
    other = random_edit(model, seed=2)
    for edit in (part, other):
        edit.base_model_name_or_path, edit.base_model_revision = "org/one", "a"
    part.base_model_fingerprint, whole.base_model_fingerprint = "part", "whole"
    whole.base_model_name_or_path, whole.base_model_revision = name, revision
    for first, second in ((part, whole), (whole, part), (whole, other), (other, whole)):
        if refused:
            with pytest.raises(ModelMismatchError, match=r"org/one at revision a.*set base_model_name_or_path and"):
                first.merge(second)
        else:
            merged = first.merge(second)
            assert merged.base_model_name_or_path == "org/one"
            assert merged.base_model_revision == "a"
            assert merged.base_model_fingerprint == "whole"


@pytest.mark.parametrize("change", ["shape", "orientation"])
def test_merge_of_shifts_that_do_not_add_up(make_llama: Build, change: str) -> None:
    """The layer is named. A square one would be added the wrong way round."""
    a = random_edit(make_llama(intermediate_size=32))
    b = random_edit(make_llama(intermediate_size=48 if change == "shape" else 32))
    name = next(iter(a.layers))
    if change == "orientation":
        b.fan_in_fan_out = [name]
    found = r"\(48, 32\) with fan_in_fan_out=False" if change == "shape" else r"\(32, 32\) with fan_in_fan_out=True"
    message = rf"{re.escape(name)} has shape \(32, 32\) with fan_in_fan_out=False in one edit and {found} in the other"
    with pytest.raises(ModelMismatchError, match=message):
        a.merge(b)


def test_many_turns_can_be_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    """Provenance stays flat: an edit made in a thousand turns by one editor has that one editor."""
    edits = [random_edit(model, seed=i, modules=slice(0, 1)) for i in range(1100)]
    merged = edits[0]
    for number, edit in enumerate(edits):
        edit.editor = {"method": "malmen", "name_or_path": "org/one" if number < 1000 else "org/two"}
    for edit in edits[1:]:
        merged = merged.merge(edit)
    one = {"method": "malmen", "name_or_path": "org/one"}
    assert edits[0].merge(edits[1]).editor == one
    assert merged.editor == {"merged": [one, one | {"name_or_path": "org/two"}]}
    loaded = Edit.from_pretrained(merged.save_pretrained(tmp_path))
    assert loaded.editor == merged.editor
    assert len(loaded.facts) == 1100


# Folders


def test_save_and_load(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """Shifts bit for bit, facts, and where the edit came from; the file is sorted and UTF-8."""
    facts = [*facts, Fact("São Tomé は", "Lima", subject="São Tomé", ground_truth="x")]
    edit = editor.make_edit(model, facts, tokenizer)
    assert edit.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "config.json",
        "edit.safetensors",
    ]
    text = (tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert list(stored) == sorted(stored)
    assert "São Tomé は" in text

    loaded = Edit.from_pretrained(str(tmp_path / "new" / "folder"))
    assert same(loaded.shifts, edit.shifts)
    assert loaded.facts == facts
    for name in ("fan_in_fan_out", "base_model_name_or_path", "base_model_revision", "base_model_fingerprint", "editor",
                 "created_at"):  # fmt: skip
        assert getattr(loaded, name) == getattr(edit, name), name
    assert loaded.editor["method"] == "malmen"
    assert loaded.editor["edit_lr"] == {name: editor.edit_lr(name) for name in editor.module_names}

    base = state(model)
    with edit.applied_to(model):
        expected = state(model)
    with loaded.applied_to(model):
        assert same(state(model), expected)
    assert same(state(model), base)


def test_a_folder_without_an_edit(tmp_path: Path, editor: EditorModel) -> None:
    """An editor's folder is not an edit's, and the message says which class to use."""
    editor.save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError, match=r"holds an editor; use EditorModel\.from_pretrained"):
        Edit.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelMismatchError, match=r"holds no edit: expected config\.json and edit\.safetensors"):
        Edit.from_pretrained(tmp_path)


def test_an_edit_of_a_newer_format(model: PreTrainedModel, tmp_path: Path) -> None:
    """Refused, with the release that wrote it."""
    random_edit(model).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | {"edit_format_version": 2, "hf_malmen_version": "99.0"}), encoding="utf-8")
    with pytest.raises(ModelMismatchError, match=r"edit format 2 \(written by hf_malmen 99\.0\).*pip install -U"):
        Edit.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{}, {"n_preserved_keys": 3}, {"method": "mend"}])
def test_a_saved_editor_makes_the_same_edit(
    model: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    config: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Bit for bit, statistics included; and saved again, the same files."""
    editor = make_editor(model, **config)
    for network in editor.networks.values():
        if config.get("n_preserved_keys"):
            network.preserve(torch.randn(network.preserved_keys.shape, generator=torch.Generator().manual_seed(1)))
    expected = editor.make_edit(model, facts, tokenizer)
    editor.save_pretrained(tmp_path / "one")
    loaded = EditorModel.from_pretrained(tmp_path / "one")
    assert same(state(loaded), state(editor))
    assert same(loaded.make_edit(model, facts, tokenizer).shifts, expected.shifts)
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_saved_editor_knows_which_layer_is_which(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """Blocks 9 and 10 change places when names are sorted as text; what was learned must stay with its layer."""
    model = make_llama(n_layers=12)
    editor = make_editor(model)
    assert [name.split(".")[2] for name in editor.module_names] == ["6", "7", "8", "9", "10", "11"]
    editor.save_pretrained(tmp_path)
    loaded = EditorModel.from_pretrained(tmp_path)
    assert loaded.module_names == editor.module_names
    for name in editor.module_names:
        assert (loaded.edit_lr(name), loaded.ridge(name)) == (editor.edit_lr(name), editor.ridge(name)), name
    expected = editor.make_edit(model, facts, tokenizer).shifts
    assert same(loaded.make_edit(model, facts, tokenizer).shifts, expected)


def test_reading_never_trains(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Neither apply nor evaluate changes a parameter or a statistic of the editor, in training mode either."""
    before = state(editor)
    for mode in (editor.eval, editor.train):
        mode()
        editor.evaluate(model, facts, tokenizer)
        editor.apply(model, facts, tokenizer, facts_per_turn=2).undo()
        assert same(state(editor), before)
        assert all(parameter.grad is None for parameter in editor.parameters())


# Turns


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_turns_equal_doing_them_by_hand(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], size: int
) -> None:
    """Each turn is made on the model as edited so far; the result is one edit, undone at once.

    A merged edit keeps the factors of all turns, so that it equals the sum of their shifts to rounding.
    """
    base = state(model)
    turns = []
    total: Tensors = {}
    for start in range(0, len(facts), size):
        turn = editor.make_edit(model, facts[start : start + size], tokenizer)
        turns.append(turn.shifts)
        total = {name: total[name] + shift if total else shift for name, shift in turn.shifts.items()}
        model.load_state_dict(by_hand_from(base, Edit(total, fan_in_fan_out=turn.fan_in_fan_out)))
        editor.config.fingerprint_policy = "ignore"  # by hand, the editor cannot know that this is still its base
    model.load_state_dict(base)
    editor.config.fingerprint_policy = "error"

    edit = editor.apply(model, facts, tokenizer, facts_per_turn=size)
    assert edit.shifts.keys() == total.keys()
    for name, shift in total.items():
        torch.testing.assert_close(edit.shifts[name], shift, rtol=1e-4, atol=1e-5 * float(shift.abs().max()))
    assert edit.facts == facts
    assert same(state(model), by_hand_from(base, edit))
    edit.undo()
    assert same(state(model), base)
    if size == 3:  # sequential editing is another computation than editing at once
        once = editor.make_edit(model, facts, tokenizer).shifts
        assert any((once[name] - total[name]).abs().max() > 1e-4 for name in once)


def test_turns_restore_the_model_when_one_fails(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A fact too long for the model in the last turn: the turns before it are lifted."""
    base = state(model)
    long = Fact("The country of " + "Lyon and " * 60 + "Turin is", "France")
    with pytest.raises(FactError, match=r"and the model reads at most 64\. Shorten it"):
        editor.apply(model, [*facts, long], tokenizer, facts_per_turn=4)
    assert same(state(model), base)


@pytest.mark.parametrize("name", ["facts_per_turn", "batch_size"])
@pytest.mark.parametrize("size", [0, -3, 2.5, "100"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_turns_and_batches_of_an_impossible_size(
    model: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    name: str,
    size: Any,
    accumulate: bool,
) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=f"{name} is {size!r}; expected a whole number of at least 1"):
        editor.apply(model, facts, tokenizer, accumulate=accumulate, **{name: size})


# What apply refuses


@pytest.mark.parametrize("arguments", [{"output_dir": "x"}, {"in_place": True}])
def test_a_live_model_has_no_folder(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], arguments: Any
) -> None:
    """The returned edited model is never silently something else."""
    base = state(model)
    with pytest.raises(ValueError, match=r"for a checkpoint; a live model is edited in memory"):
        editor.apply(model, facts, tokenizer, **arguments)
    assert same(state(model), base)


def test_a_model_without_a_name_needs_a_tokenizer(
    model: PreTrainedModel, editor: EditorModel, facts: list[Fact]
) -> None:
    """It was never loaded from anywhere."""
    with pytest.raises(ValueError, match=r"Pass its tokenizer: tokenizer="):
        editor.apply(model, facts)


def test_the_tokenizer_beside_the_model_is_found(
    model: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """A model that was loaded from a folder brings its tokenizer."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(editor.make_edit(loaded, facts).shifts, editor.make_edit(model, facts, tokenizer).shifts)


class Quantised(nn.Linear):
    """A linear layer whose weight is packed into integers, as bitsandbytes' are."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)


def other_names(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.other_proj = model.model.layers[3].mlp.down_proj
    del model.model.layers[3].mlp.down_proj


def quantised(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj = Quantised(model.model.layers[3].mlp.down_proj)


def float_8(model: PreTrainedModel) -> None:
    layer = model.model.layers[3].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def not_linear(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj = nn.Embedding(32, 48)


def tied(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight


def shared(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj = model.model.layers[1].mlp.down_proj


def other_shape(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj = nn.Linear(40, 32, bias=False)


def other_orientation(model: PreTrainedModel) -> None:
    layer = Conv1D(32, 48)
    layer.weight = nn.Parameter(model.model.layers[3].mlp.down_proj.weight.detach().T.contiguous())
    model.model.layers[3].mlp.down_proj = layer


LAYER = r"model\.layers\.3\.mlp\.down_proj"
MISFITS: list[tuple[Callable[[PreTrainedModel], None], str, str]] = [
    # how the model differs; what the editor says; what the edit says
    (other_names, rf"has no module '{LAYER}'.*Linear layers it has: .*other_proj",
     rf"has no module '{LAYER}'.*Linear layers it has: .*other_proj"),
    (quantised, rf"{LAYER} holds its weight in torch\.uint8, quantised.*unquantised",
     rf"{LAYER} holds its weight in torch\.uint8, quantised.*unquantised"),
    (float_8, rf"{LAYER} holds its weight in torch\.float8_e4m3fn, quantised",
     rf"{LAYER} holds its weight in torch\.float8_e4m3fn, quantised"),
    (not_linear, rf"{LAYER} is a Embedding; only nn\.Linear and transformers' Conv1D",
     rf"{LAYER} is a Embedding; only nn\.Linear and transformers' Conv1D"),
    (tied, r"shares its weight with .*mlp\.down_proj\.weight; an edit would change both",
     r"shares its weight with .*mlp\.down_proj\.weight; an edit would change both"),
    (shared, r"shares its weight with .*mlp\.down_proj\.weight; an edit would change both",
     r"shares its weight with .*mlp\.down_proj\.weight; an edit would change both"),
    (other_shape, rf"{LAYER} maps 40 features to 32 in a Linear; this editor was made for 48 to 32 in a Linear",
     rf"{LAYER} holds a weight of shape \(32, 40\), and the edit needs \(32, 48\)"),
    (other_orientation, rf"{LAYER} maps 48 features to 32 in a Conv1D; this editor was made for 48 to 32 in a Linear",
     rf"{LAYER} is a Conv1D, stored the other way round than in the model the edit was made for"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "editor_says", "edit_says"), MISFITS, ids=[m[0].__name__ for m in MISFITS])
def test_a_model_that_does_not_fit(
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    change: Callable[[PreTrainedModel], None],
    editor_says: str,
    edit_says: str,
) -> None:
    """Each misfit has its own message, which names the layer; the model is not changed, by editor or edit."""
    model = make_llama()
    editor = make_editor(model)
    edit = editor.make_edit(model, facts, tokenizer)
    change(model)
    before = state(model)
    for call in (editor.apply, editor.make_edit, editor.evaluate):
        with pytest.raises(ModelMismatchError, match=editor_says):
            call(model, facts, tokenizer)
    with pytest.raises(ModelMismatchError, match=edit_says):
        edit.apply_to(model, on_fingerprint_mismatch="ignore")
    assert same(state(model), before)
    assert not edit.in_force


@pytest.mark.parametrize("change", [float_8, quantised, not_linear, tied, shared])
def test_an_editor_is_not_made_for_a_layer_that_cannot_be_edited(
    make_llama: Build, change: Callable[[PreTrainedModel], None]
) -> None:
    """The same checks come before the first training step."""
    model = make_llama()
    change(model)
    names = ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    with pytest.raises(ModelMismatchError):
        EditorModel.from_base(model, EditorConfig(method="malmen", target_modules=names))


def test_square_layers_of_the_other_kind(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A square weight has the right shape both ways; writing it transposed would be a silent disaster."""
    model = make_llama(intermediate_size=32)
    editor = make_editor(model, target_modules=["mlp.down_proj"])
    edit = editor.make_edit(model, facts, tokenizer)
    layer = Conv1D(32, 32)
    layer.weight = nn.Parameter(model.model.layers[3].mlp.down_proj.weight.detach().T.contiguous())
    model.model.layers[3].mlp.down_proj = layer
    before = state(model)
    with pytest.raises(ModelMismatchError, match=rf"{LAYER} maps 32 .* in a Conv1D; .*made for 32 to 32 in a Linear"):
        editor.apply(model, facts, tokenizer)
    with pytest.raises(ModelMismatchError, match=rf"{LAYER} is a Conv1D, stored the other way round"):
        edit.apply_to(model, on_fingerprint_mismatch="ignore")
    assert same(state(model), before)


def test_tied_word_embeddings_can_be_no_target(make_gpt2: Build) -> None:
    """GPT-2's output layer is its embedding."""
    with pytest.raises(ModelMismatchError, match=r"lm_head shares its weight with transformer\.wte\.weight"):
        EditorModel.from_base(make_gpt2(), EditorConfig(method="malmen", target_modules=["lm_head"]))


# Fingerprints


def other_weights(model: PreTrainedModel) -> None:
    """A base model of the same shape that was trained on."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def test_other_weights_warn_or_refuse(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """By the policy of the editor, and for an edit by that of the call."""
    edit = editor.make_edit(model, facts, tokenizer)
    other_weights(model)
    before = state(model)
    with pytest.warns(FingerprintWarning, match=r"This editor .* made for a base model whose target weights differ"):
        editor.make_edit(model, facts, tokenizer)
    with pytest.warns(FingerprintWarning, match=r"The edit was made for a base model whose target weights differ"):
        edit.apply_to(model)
    edit.undo()
    editor.config.fingerprint_policy = "error"
    with pytest.raises(ModelMismatchError, match="Load its base model at revision unknown"):
        editor.apply(model, facts, tokenizer)
    with pytest.raises(ModelMismatchError, match="target weights differ"):
        edit.apply_to(model, on_fingerprint_mismatch="error")
    with pytest.raises(ValueError, match="policy is 'maybe'; allowed: warn, error, ignore"):
        edit.apply_to(model, on_fingerprint_mismatch="maybe")
    assert same(state(model), before)
    editor.config.fingerprint_policy = "ignore"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.apply(model, facts, tokenizer).undo()


def test_weights_outside_of_the_targets_do_not_count(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Resized embeddings, say. The fingerprint is of the target weights."""
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    editor.config.fingerprint_policy = "error"
    editor.apply(model, facts, tokenizer).undo()


def test_edits_in_force_do_not_count_as_other_weights(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """One edits a model again and again; its base is still its base."""
    editor.config.fingerprint_policy = "error"
    first = editor.apply(model, facts[:4], tokenizer)
    second = editor.apply(model, facts[4:], tokenizer)
    assert second.base_model_fingerprint == first.base_model_fingerprint == editor.config.base_model_fingerprint
    assert (
        EditorModel.from_base(model, EditorConfig(method="malmen")).config.base_model_fingerprint
        == first.base_model_fingerprint
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_checkpoint_has_one_fingerprint(make_model: Build, stored: torch.dtype, tmp_path: Path) -> None:
    """Loaded in bfloat16 or in float32."""
    make_model(stored).save_pretrained(tmp_path)
    found = {
        EditorModel.from_base(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)).config.base_model_fingerprint
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(found) == 1
    other = make_model(stored)
    other_weights(other)
    assert EditorModel.from_base(other).config.base_model_fingerprint not in found


# Editors without training


def test_an_untrained_editor_says_so_once(
    model: PreTrainedModel, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """It runs, its shifts are finite, and each call warns once, whatever the number of facts and turns."""
    editor = make_editor(model, seed=None)
    assert not editor.is_trained
    for call, arguments in ((editor.make_edit, {}), (editor.apply, {}), (editor.evaluate, {})):
        with pytest.warns(UntrainedEditorWarning, match="has seen no training data.*EditorTrainer") as caught:
            result = call(model, facts, tokenizer, batch_size=3, **arguments)
        assert len([w for w in caught if w.category is UntrainedEditorWarning]) == 1
        if isinstance(result, Edit):
            assert all(torch.isfinite(shift).all() for shift in result.shifts.values())
            if result.in_force:
                result.undo()
    assert make_editor(model).is_trained


def test_the_warning_points_at_the_callers_line(
    model: PreTrainedModel, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Not at a line of this package."""
    editor = make_editor(model, seed=None)
    with pytest.warns(UntrainedEditorWarning) as caught:
        editor.make_edit(model, facts, tokenizer)
    assert caught[0].filename == __file__


def test_from_base_leaves_model_and_config_alone(model: PreTrainedModel) -> None:
    """The config is copied; the editor's own has names, shapes, layout and fingerprint."""
    config = EditorConfig(method="malmen", rank=4, layers_to_transform=[2, 3])
    stored = config.to_dict()
    before = state(model)
    with untouched(model):
        editor = EditorModel.from_base(model, config)
    assert config.to_dict() == stored
    assert same(state(model), before)
    assert len(editor.module_names) == 2
    for name in editor.module_names:
        module = model.get_submodule(name)
        flipped = isinstance(module, Conv1D)
        shape = tuple(module.weight.shape if flipped else module.weight.shape[::-1])
        assert editor.config.shape_of(name) == shape
        assert (name in editor.config.fan_in_fan_out) == flipped


def test_an_editor_needs_names_and_shapes() -> None:
    """A bare config cannot be built, and the message says how to get one."""
    for config in (
        EditorConfig(method="malmen"),
        EditorConfig(method="malmen", target_modules=["a"], module_shapes={"b": [2, 3]}),
    ):
        with pytest.raises(ValueError, match=r"Use EditorModel\.from_base\(model, config\)"):
            EditorModel(config)
