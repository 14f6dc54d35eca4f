"""`Edit.to_lora`: the adapter that PEFT opens gives the edited model's logits."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import Edit, Fact, TruncationWarning
from hf_malmen.adapter import factorise

Build = Callable[..., Any]

INPUT_IDS = torch.tensor([[5, 40, 7, 300, 22, 22, 9], [9, 8, 7, 6, 5, 4, 3]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """What a model makes of a fixed input."""
    found: Tensor = model(input_ids=INPUT_IDS).logits
    return found


@pytest.fixture
def edit(model: PreTrainedModel, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> Edit:
    """An edit that changes the logits clearly."""
    made: Edit = make_editor(model, edit_lr=0.05).make_edit(model, facts, tokenizer)
    return made


def edited_logits(model: PreTrainedModel, edit: Edit) -> Tensor:
    """Of the live edited model, which is as before afterwards."""
    base = logits(model)
    with edit.applied_to(model):
        found = logits(model)
    assert (found - base).abs().max() > 0.05
    assert torch.equal(logits(model), base)
    return found


def test_peft_model_equals_the_live_edited_model(model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """As `PeftModel.from_pretrained`, and merged into the weights."""
    expected = edited_logits(model, edit)
    folder = edit.to_lora(tmp_path / "new" / "adapter")
    assert folder == tmp_path / "new" / "adapter"
    adapted = PeftModel.from_pretrained(model, folder)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_load_adapter_equals_the_live_edited_model(model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """As transformers' own `model.load_adapter`."""
    expected = edited_logits(model, edit)
    model.load_adapter(str(edit.to_lora(tmp_path)))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_the_adapter_of_a_saved_model(model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """A folder names its base model, so that one name loads both."""
    model.save_pretrained(tmp_path / "base")
    edit.base_model_name_or_path = str(tmp_path / "base")
    edit.to_lora(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), edited_logits(model, edit), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_the_factors_are_the_shift(scale: float, model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """B A = Sᵀ for every edited layer, at scale 1, whatever the size of the shift; and no other tensor."""
    edit = Edit({name: scale * shift for name, shift in edit.shifts.items()}, fan_in_fan_out=edit.fan_in_fan_out)
    edit.to_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert sorted(config["target_modules"]) == sorted(edit.shifts)
    assert config["fan_in_fan_out"] == bool(edit.fan_in_fan_out)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(edit.shifts)
    for name, shift in edit.shifts.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a.shape == (config["r"], len(shift))
        assert (b.double() @ a.double() - shift.T.double()).norm() <= 1e-5 * shift.double().norm()
        assert 0.1 < a.norm() / b.norm() < 10  # both carry the scale, so that neither underflows in half precision


def test_the_rank_of_the_facts_is_enough(
    make_gpt2: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """A shift solved from n answer tokens has rank n: an adapter of that rank is exact, and no warning is given."""
    model = make_gpt2()
    edit = make_editor(model, edit_lr=0.05).make_edit(model, facts[:3], tokenizer)
    rank = max(int(torch.linalg.matrix_rank(shift.double(), rtol=1e-6)) for shift in edit.shifts.values())
    assert rank < 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.to_lora(tmp_path, rank=rank)
    errors = json.loads((tmp_path / "lora_errors.json").read_text(encoding="utf-8"))
    assert set(errors) == set(edit.shifts)
    assert max(errors.values()) < 1e-5
    expected = edited_logits(model, edit)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_a_truncated_rank_warns_and_records_the_error(model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """The best approximation of that rank, and its true relative error, layer by layer."""
    with pytest.warns(
        TruncationWarning, match=r"A LoRA of rank 2 holds the edit with a relative error of up to"
    ) as caught:
        edit.to_lora(tmp_path, rank=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    errors = json.loads((tmp_path / "lora_errors.json").read_text(encoding="utf-8"))
    assert list(errors) == sorted(edit.shifts)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    worst = max(errors, key=lambda name: errors[name])
    assert re.search(rf"\({re.escape(worst)}\)", str(caught[0].message))
    for name, shift in edit.shifts.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        assert a.shape[0] == 2
        error = (b @ a - shift.T.double()).norm() / shift.double().norm()
        best = torch.linalg.svdvals(shift.double())[2:].norm() / shift.double().norm()
        assert errors[name] == pytest.approx(float(error), rel=1e-4)
        assert float(error) == pytest.approx(float(best), rel=1e-3)
        assert error > 1e-3


@pytest.mark.parametrize("rank", [0, -1])
def test_an_impossible_rank(edit: Edit, rank: int, tmp_path: Path) -> None:
    """The message names the value; nothing is written."""
    with pytest.raises(ValueError, match=f"rank is {rank}; expected a whole number of at least 1, or None"):
        edit.to_lora(tmp_path / "adapter", rank=rank)
    assert list(tmp_path.iterdir()) == []


def test_a_shift_of_zeros(edit: Edit, tmp_path: Path) -> None:
    """No division by its norm."""
    name = next(iter(edit.shifts))
    edit.shifts[name].zero_()
    edit.to_lora(tmp_path)
    assert json.loads((tmp_path / "lora_errors.json").read_text(encoding="utf-8"))[name] == 0
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


def test_the_factorisation_repeats_and_leaves_the_random_state_alone() -> None:
    """It draws random directions, but not from the caller's generator."""
    shift = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    first = factorise(shift, 4)
    drawn = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3), drawn)
    second = factorise(shift, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
