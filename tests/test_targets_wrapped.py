"""Bases as they come: half precision, offloaded, with adapters, compiled, with gradient checkpointing."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, Fact, ModelMismatchError
from hf_malmen.targets import plain_model, weight_of

from .zoo import KINDS, N_LAYERS

Build = Callable[..., Any]
INPUT_IDS = torch.tensor([[5, 40, 7, 300, 22, 22, 9], [9, 8, 7, 6, 5, 4, 3]])
NAMES = KINDS["llama"].names


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What a model makes of a fixed input."""
    found: Tensor = model(input_ids=INPUT_IDS).logits
    return found


@pytest.fixture
def plain() -> PreTrainedModel:
    """The model without anything around it."""
    return KINDS["llama"].build()


@pytest.fixture
def editor(plain: PreTrainedModel, make_editor: Build) -> EditorModel:
    """An editor for it, as if trained."""
    return make_editor(plain, edit_lr=0.01)


# Offloaded


def some_on_disk(folder: Path) -> PreTrainedModel:
    """Loaded as users do, the last three blocks on disk."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    blocks = {f"model.layers.{i}": "disk" if i > 3 else "cpu" for i in range(N_LAYERS)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=dict.fromkeys(parts, "cpu") | blocks, offload_folder=folder / "offload"
    )


def all_on_cpu(folder: Path) -> PreTrainedModel:
    """Each weight comes to the device of execution while its module runs."""
    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder / "base"), execution_device="cpu")


def all_on_disk(folder: Path) -> PreTrainedModel:
    """Every weight is read from a file each time."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    disk_offload(model, folder / "files", execution_device="cpu")
    return model


@pytest.mark.parametrize("load", [some_on_disk, all_on_cpu, all_on_disk])
def test_offloaded(
    load: Callable[[Path], PreTrainedModel],
    plain: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    make_trainer: Build,
    tmp_path: Path,
) -> None:
    """The edit is that of the whole model, lasts from pass to pass, and is undone; files stay as they were."""
    plain.save_pretrained(tmp_path / "base")
    model = load(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before, originals = logits(model), {name: weight_of(model, name).clone() for name in NAMES}
    assert torch.equal(before, logits(plain))
    assert (
        EditorModel.from_base(model, EditorConfig(method="malmen")).config.base_model_fingerprint
        == editor.config.base_model_fingerprint
    )
    expected, found = editor.apply(plain, facts, tokenizer), editor.apply(model, facts, tokenizer)
    for name, shift in expected.shifts.items():
        torch.testing.assert_close(found.shifts[name], shift)
        assert not torch.equal(weight_of(model, name), originals[name])
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(plain))
    assert not torch.allclose(logits(model), before, atol=1e-2)
    found.undo()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weight_of(model, name), originals[name]) for name in NAMES)

    assert editor.evaluate(model, facts, tokenizer).keys() >= {"edit_success", "locality"}
    make_trainer(editor, model, facts, max_steps=1, per_device_train_batch_size=2).train()
    assert torch.equal(logits(model), before)
    assert {path: path.read_bytes() for path in files} == files


# Adapters


@pytest.fixture
def adapted(plain: PreTrainedModel) -> PeftModel:
    """The model with a LoRA on some of the edited layers and on others, that changes what it computes."""
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 5], task_type="CAUSAL_LM"
    )
    model = get_peft_model(KINDS["llama"].build(), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_with_adapters(
    adapted: PeftModel,
    plain: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """The layers below the adapters are edited, under the names of the base, for the model as adapted."""
    plain.save_pretrained(tmp_path / "base")
    fresh = EditorModel.from_base(adapted, EditorConfig(method="malmen", rank=8))
    assert fresh.module_names == NAMES
    assert (
        fresh.config.base_model_fingerprint == EditorModel.from_base(plain, fresh.config).config.base_model_fingerprint
    )
    for wanted in (["down_proj"], r".*down_proj"):
        names = EditorModel.from_base(
            adapted, EditorConfig(method="malmen", rank=8, target_modules=wanted)
        ).module_names
        assert names == [f"model.layers.{i}.mlp.down_proj" for i in range(N_LAYERS)]

    editor = make_editor(plain, edit_lr=0.01)
    weights = {name: value.clone() for name, value in adapted.state_dict().items()}
    before = logits(adapted)
    edit = editor.apply(adapted, facts, tokenizer)
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, weights[name])}
    wrapped = {f"base_model.model.model.layers.{i}.mlp.down_proj.base_layer.weight" for i in (2, 5)}
    assert changed == wrapped | {f"base_model.model.{name}.weight" for name in NAMES if name[13] not in "25"}
    # The facts are those of the adapted model: merged into its weights, it gets the same edit.
    edit.undo()
    assert torch.equal(logits(adapted), before)
    merged = deepcopy(adapted).merge_and_unload()
    editor.config.fingerprint_policy = "ignore"
    for name, shift in editor.make_edit(merged, facts, tokenizer).shifts.items():
        torch.testing.assert_close(edit.shifts[name], shift, rtol=1e-3, atol=1e-4)
    # Where the base is on disk, its own layers are edited.
    edit.write(tmp_path / "base", tmp_path / "edited")
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    with edit.applied_to(plain):
        assert torch.equal(logits(edited), logits(plain))


def test_merged_adapters_are_refused(
    adapted: PeftModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """What is edited into a merged weight would be lost with it."""
    adapted.merge_adapter()
    with pytest.raises(ModelMismatchError, match=r"layers\.2\.mlp\.down_proj has an adapter merged.*unmerge_adapter"):
        editor.apply(adapted, facts, tokenizer)
    adapted.unmerge_adapter()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    edit = editor.apply(adapted, facts, tokenizer)
    edited = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapted.merge_adapter()
    with pytest.raises(ModelMismatchError, match=r"has an adapter merged.*unmerge_adapter"):
        edit.undo()
    adapted.unmerge_adapter()
    assert edit.in_force
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, edited[name])  # what PEFT subtracts again it has rounded
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_learned_prompts_are_refused(plain: PreTrainedModel) -> None:
    """They stand before every prompt, outside of the base model."""
    model = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelMismatchError, match=r"learned tokens before every prompt.*get_base_model"):
        EditorModel.from_base(model)


# Compiled


def whole(model: PreTrainedModel) -> nn.Module:
    """The usual way, which wraps the model."""
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def in_place(model: PreTrainedModel) -> nn.Module:
    """The model stays what it is."""
    model.compile(backend="eager")
    return model


def by_block(model: PreTrainedModel) -> nn.Module:
    """Each block is compiled on its own, and wrapped."""
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    return model


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiled", [whole, in_place, by_block])
def test_compiled(
    compiled: Callable[[PreTrainedModel], nn.Module],
    plain: PreTrainedModel,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    make_trainer: Build,
) -> None:
    """Compiled and run before the edit, a model shows the edit after it, and what it was after undo."""
    model = compiled(KINDS["llama"].build())
    before = logits(model)
    assert EditorModel.from_base(model, EditorConfig(method="malmen", rank=8)).module_names == NAMES
    expected, found = editor.apply(plain, facts, tokenizer), editor.apply(model, facts, tokenizer)
    for name, shift in expected.shifts.items():
        assert torch.equal(found.shifts[name], shift)
    torch.testing.assert_close(logits(model), logits(plain))
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert editor.evaluate(model, facts, tokenizer).keys() >= {"edit_success", "locality"}
    make_trainer(editor, model, facts, max_steps=1, per_device_train_batch_size=2).train()
    found.undo()
    assert torch.equal(logits(model), before)
    assert plain_model(model) is plain_model(plain_model(model))


# Gradient checkpointing and attention


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(
    name: str, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Switched on, in training mode, by somebody who fine-tunes the model: the same edit, and still on."""
    kind = KINDS[name]
    model, facts = kind.build(), kind.facts(make_facts(4))
    editor = make_editor(model)
    expected = editor.make_edit(model, facts, tokenizer).shifts
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    found = editor.make_edit(model, facts, tokenizer).shifts
    assert model.is_gradient_checkpointing and model.training
    for module, shift in expected.items():
        assert torch.equal(found[module], shift)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "modernbert", "bart"])
def test_attention_implementations(
    name: str, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Eager and fused attention give one edit, up to rounding."""
    kind = KINDS[name]
    facts = kind.facts(make_facts(4))
    models = [kind.build(torch.float64, attn_implementation=attention) for attention in ("eager", "sdpa")]
    editor = make_editor(models[0])
    expected, found = (editor.make_edit(model, facts, tokenizer).shifts for model in models)
    for module, shift in expected.items():
        assert float((found[module] - shift).norm() / shift.norm()) < 1e-4
