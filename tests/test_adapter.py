"""`Edit.to_lora`: the adapter that PEFT opens gives the edited model's logits."""

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_malmen import Edit, EditorConfig, EditorModel, Fact, ModelMismatchError, TruncationWarning
from hf_malmen.adapter import SERVED_RANKS, factorise
from hf_malmen.errors import HfMalmenWarning
from hf_malmen.shifts import DenseShift, FactoredShift, Shift, materialise
from hf_malmen.targets import check_targets

from .zoo import KINDS

Build = Callable[..., Any]

INPUT_IDS = torch.tensor([[5, 40, 7, 300, 22, 22, 9], [9, 8, 7, 6, 5, 4, 3]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """What a model makes of a fixed input."""
    found: Tensor = model(input_ids=INPUT_IDS).logits
    return found


def random_shift(
    n: int, key_size: int = 48, value_size: int = 32, *, size: float = 0.1, seed: int = 0
) -> FactoredShift:
    """A shift of n rows."""
    generator = torch.Generator().manual_seed(100 * seed + n)
    return FactoredShift(
        size * torch.randn(n, key_size, generator=generator), size * torch.randn(n, value_size, generator=generator)
    )


def llama_edit(*n_rows: int, seed: int = 0) -> Edit:
    """An edit of the tiny Llama's blocks 1, 2, ...: as many as there are counts of rows."""
    layers = enumerate(n_rows, 1)
    return Edit({f"model.layers.{i}.mlp.down_proj": random_shift(n, seed=10 * seed + i) for i, n in layers})


def decaying(rows: int, columns: int, power: float) -> Tensor:
    """A matrix whose i-th singular value is i to the power of `-power`."""
    generator = torch.Generator().manual_seed(0)
    n = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (left * torch.arange(1, n + 1).double() ** -power) @ right.T


def saved(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module name: (A, B)} of an adapter's folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(prefix).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    assert len(tensors) == 2 * len(names)
    return {name: (tensors[f"{prefix}{name}{suffix}"], tensors[f"{prefix}{name}.lora_B.weight"]) for name in names}


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter's configuration."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def errors_of(folder: Path) -> dict[str, float]:
    """The relative error of each layer, as it was stored."""
    found: dict[str, float] = json.loads((folder / "lora_errors.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The smaller side of every matrix that a singular value or eigenvalue decomposition is asked for."""
    sizes: list[int] = []

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def decompose(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(min(matrix.shape))
            return original(matrix, *args, **kwargs)

        return decompose

    for place, names in ((torch.linalg, ("svd", "svdvals", "eigh")), (torch, ("svd", "svd_lowrank", "pca_lowrank"))):
        for name in names:
            monkeypatch.setattr(place, name, recording(getattr(place, name)))
    return sizes


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
    edit.base_model_name_or_path, edit.base_model_revision = str(tmp_path / "base"), "0123abcd"
    edit.to_lora(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").revision == "0123abcd"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), edited_logits(model, edit), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_the_factors_are_the_shift(scale: float, model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """B A = Sᵀ for every edited layer, at scale 1, whatever the size of the shift; and no other tensor."""
    edit = Edit({name: scale * shift for name, shift in edit.shifts.items()}, fan_in_fan_out=edit.fan_in_fan_out)
    edit.to_lora(tmp_path)
    config = config_of(tmp_path)
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert sorted(config["target_modules"]) == sorted(edit.shifts)
    assert config["fan_in_fan_out"] == bool(edit.fan_in_fan_out)
    factors = saved(tmp_path)
    assert set(factors) == set(edit.shifts)
    for name, shift in edit.shifts.items():
        a, b = factors[name]
        assert a.shape == (config["r"], len(shift))
        assert (b.double() @ a.double() - shift.T.double()).norm() <= 2e-6 * shift.double().norm()
        # Each direction's two halves carry its scale, so that neither underflows in half precision.
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("config", [{}, {"n_preserved_keys": 20}, {"method": "mend"}], ids=str)
def test_few_tokens_need_no_decomposition(
    config: dict[str, Any],
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    decomposed: list[int],
    tmp_path: Path,
) -> None:
    """A shift from n tokens has its factors, preserved keys or not: they are taken as they are, and are exact."""
    model = make_llama()
    edit = make_editor(model, edit_lr=0.05, **config).make_edit(model, facts[:1], tokenizer)
    counts = {len(shift.left) for shift in edit.layers.values() if isinstance(shift, FactoredShift)}
    assert len(counts) == 1 and max(counts) < 32
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncationWarning)
        edit.to_lora(tmp_path)
    assert decomposed == []
    assert config_of(tmp_path)["r"] == min(rank for rank in SERVED_RANKS if rank >= max(counts))
    assert errors_of(tmp_path) == dict.fromkeys(edit.shifts, 0.0)
    for name, (a, b) in saved(tmp_path).items():
        shift = edit.shifts[name].double()
        assert shift.norm() > 0
        assert (b.double() @ a.double() - shift.T).norm() <= 1e-6 * shift.norm()
    expected = edited_logits(model, edit)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_a_rank_below_the_number_of_tokens_is_exact_where_the_shift_has_it(
    decomposed: list[int], tmp_path: Path
) -> None:
    """Thirty tokens that move in three directions: rank 3 holds them, and no warning is given."""
    few = random_shift(3)
    mixture = torch.randn(30, 3, generator=torch.Generator().manual_seed(9))
    edit = Edit({"a": FactoredShift(mixture @ few.left, mixture @ few.right)})
    edit.to_lora(tmp_path, rank=3)
    assert decomposed == [3 + 16]  # the matrix itself is 48 x 32
    assert errors_of(tmp_path)["a"] < 1e-5
    (a, b) = saved(tmp_path)["a"]
    assert len(a) == 3
    expected = edit.shifts["a"].T
    assert (b @ a - expected).norm() <= 2e-6 * expected.norm()


RANKS = [  # rows of the shift, rank asked for, rank of the adapter
    (1, None, 8), (8, None, 8), (9, None, 16), (33, None, 64), (257, None, 320), (512, None, 512),
    (5, 64, 8), (5, 6, 6), (20, 24, 24), (513, 520, 513),
]  # fmt: skip


@pytest.mark.parametrize(("n_rows", "rank", "expected"), RANKS)
def test_the_smallest_served_rank_that_is_exact(n_rows: int, rank: int | None, expected: int, tmp_path: Path) -> None:
    """None goes up to 512; a rank that was asked for is never exceeded."""
    shift = random_shift(n_rows, 600, 560)
    Edit({"a": shift}).to_lora(tmp_path, rank=rank)
    assert config_of(tmp_path)["r"] == expected
    a, b = saved(tmp_path)["a"]
    assert (len(a), b.shape[1]) == (expected, expected)
    whole = shift.right.double().T @ shift.left.double()
    assert (b.double() @ a.double() - whole).norm() <= 1e-6 * whole.norm()
    assert errors_of(tmp_path) == {"a": 0.0}


def test_no_rank_goes_beyond_what_is_served(tmp_path: Path) -> None:
    """None truncates a shift of 520 directions to 512."""
    shift = random_shift(520, 600, 560)
    with pytest.warns(TruncationWarning, match="A LoRA of rank 512 cannot hold the whole edit"):
        Edit({"a": shift}).to_lora(tmp_path)
    assert len(saved(tmp_path)["a"][0]) == 512


def test_a_dense_shift_of_few_directions(tmp_path: Path) -> None:
    """A shift whose factors are not known takes the rank that it has, not the rank of its sides."""
    few = random_shift(3, 300, 200)
    edit = Edit({"a": few.left.T @ few.right})
    edit.to_lora(tmp_path)
    assert config_of(tmp_path)["r"] == 8
    a, b = saved(tmp_path)["a"]
    assert not a[3:].any() and not b[:, 3:].any()
    assert (b @ a - edit.shifts["a"].T).norm() <= 2e-6 * edit.shifts["a"].norm()


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_truncation_is_the_best_one(kind: str, power: float, rank: int, decomposed: list[int]) -> None:
    """Within 1 % of the Eckart-Young error, also where singular values decay slowly; by small decompositions only."""
    whole = decaying(200, 150, power)
    left = torch.randn(160, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shift: Shift = DenseShift(whole.float())
    if kind == "factored":
        shift = FactoredShift(left.float(), (torch.linalg.pinv(left.T) @ whole).float())
        whole = shift.left.double().T @ shift.right.double()
    decomposed.clear()
    found_left, found_right, error = factorise(shift, rank)
    assert decomposed and max(decomposed) <= rank + 16
    assert (len(found_left), len(found_right)) == (rank, rank)
    best = torch.linalg.svdvals(whole)[rank:].norm() / whole.norm()
    actual = (found_left.double().T @ found_right.double() - whole).norm() / whole.norm()
    assert error == pytest.approx(float(actual), rel=1e-4)
    assert float(best) * (1 - 1e-6) <= error <= float(best) * 1.01


def test_a_truncated_rank_warns_and_records_the_error(model: PreTrainedModel, edit: Edit, tmp_path: Path) -> None:
    """One warning, with the true relative error of each layer, at the caller's line."""
    with pytest.warns(TruncationWarning, match="A LoRA of rank 2 cannot hold the whole edit") as caught:
        edit.to_lora(tmp_path, rank=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    errors = errors_of(tmp_path)
    assert list(errors) == sorted(edit.shifts)
    for name, (a, b) in saved(tmp_path).items():
        assert len(a) == 2
        shift = edit.shifts[name].double()
        error = float((b.double() @ a.double() - shift.T).norm() / shift.norm())
        best = float(torch.linalg.svdvals(shift)[2:].norm() / shift.norm())
        assert errors[name] == pytest.approx(error, rel=1e-4)
        assert error == pytest.approx(best, rel=1e-2)
        assert error > 1e-3
        assert f"{name} {error:.2g}" in str(caught[0].message)


def test_each_layer_has_its_own_rank(make_llama: Build, tmp_path: Path) -> None:
    """PEFT gives each layer its rank at scale 1: block 1 is not taken for block 11, nor the other way round."""
    model = make_llama(n_layers=12)
    counts = {1: 5, 10: 20, 11: 12, 3: 30}
    edit = Edit({f"model.layers.{i}.mlp.down_proj": random_shift(n, seed=i) for i, n in counts.items()})
    expected = edited_logits(model, edit)
    edit.to_lora(tmp_path)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    for i, rank in {1: 8, 10: 32, 11: 16, 3: 32}.items():
        layer = adapted.get_submodule(f"base_model.model.model.layers.{i}.mlp.down_proj")
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)
        assert layer.lora_A["default"].weight.shape == (rank, 48)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)


def test_a_name_that_ends_another(tmp_path: Path) -> None:
    """The rank of `fc` is not that of `outer.fc`: the keys of `rank_pattern` match whole names."""
    model = nn.ModuleDict({"fc": nn.Linear(48, 32), "outer": nn.ModuleDict({"fc": nn.Linear(48, 32)})})
    model["outer"]["other"] = nn.Linear(48, 32)
    Edit({"fc": random_shift(5), "outer.fc": random_shift(12), "outer.other": random_shift(20)}).to_lora(tmp_path)
    inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"fc": 8, "outer.fc": 16, "outer.other": 32}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


def test_what_every_token_passes_beside_fused_experts(tmp_path: Path) -> None:
    """PEFT takes a `down_proj` of a model of DeepSeek-V3's kind for the experts', unless its weight is named."""
    model = KINDS["deepseek_v3"].build()
    names = ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.shared_experts.down_proj"]
    sizes = [model.get_submodule(name).in_features for name in names]
    shifts = {name: random_shift(n, size) for name, n, size in zip(names, (5, 12), sizes, strict=True)}
    edit = Edit(shifts, base_model_type=model.config.model_type)
    expected = edited_logits(model, edit)
    edit.save_pretrained(tmp_path / "edit")
    folder = Edit.from_pretrained(tmp_path / "edit").to_lora(tmp_path / "lora")
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
    model.load_adapter(str(folder))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_peft_refuses(tmp_path: Path) -> None:
    """It is written, for other servers, and said at once."""
    edit = Edit({"backbone.layers.0.mixer.out_proj": random_shift(5)}, base_model_type="mamba2")
    with pytest.warns(HfMalmenWarning, match=r"PEFT will not load this adapter: .*'out_proj' is incompatible"):
        edit.to_lora(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_layers_of_both_orientations(tmp_path: Path) -> None:
    """`fan_in_fan_out` holds for a whole adapter, and PEFT corrects it layer by layer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 360, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    flipped = ["transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_proj"]
    shifts = {
        flipped[0]: random_shift(9, 128, 32),
        "lm_head": random_shift(4, 32, 360),
        flipped[1]: random_shift(3, 32),
    }
    edit = Edit(shifts, fan_in_fan_out=flipped)
    expected = edited_logits(model, edit)
    edit.to_lora(tmp_path)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", ["make_llama", "make_gpt2"])
def test_a_merged_adapter_is_the_edited_model(
    build: str,
    dtype: torch.dtype,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """`merge_and_unload` gives the weights of `Edit.apply_to`: to rounding, which bfloat16 has twice."""
    base = request.getfixturevalue(build)(dtype)
    edit = make_editor(base, edit_lr=0.05).make_edit(base, facts, tokenizer)
    edit.to_lora(tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    edit.apply_to(base)
    found = dict(merged.named_parameters())
    rounding = torch.finfo(dtype).eps
    assert set(found) == {name for name, _ in base.named_parameters()}
    for name, weight in base.named_parameters():
        module = name.removesuffix(".weight")
        if module not in edit.layers:
            assert torch.equal(found[name], weight)
            continue
        shift = materialise(edit.layers[module], module in edit.fan_in_fan_out)
        shift = shift if module in edit.fan_in_fan_out else shift.T
        allowed = rounding * (weight.float().abs() + shift.abs()) + 1e-6 * shift.abs().max()
        assert ((found[name].float() - weight.float()).abs() <= allowed).all()
        assert shift.abs().mean() > 10 * allowed.mean()


def test_two_edits_side_by_side(make_llama: Build, tmp_path: Path) -> None:
    """Of different ranks and layers, in one PEFT model: `set_adapter` switches, and both together are both edits."""
    model = make_llama()
    edits = {"first": llama_edit(5, 12), "second": llama_edit(20, 3, 6, seed=1)}
    expected = {name: edited_logits(model, edit) for name, edit in edits.items()}
    both = edited_logits(model, edits["first"].merge(edits["second"]))
    for name, edit in edits.items():
        edit.to_lora(tmp_path / name)
    adapted = PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    adapted.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        adapted.set_adapter(name)
        torch.testing.assert_close(logits(adapted), expected[name], atol=1e-4, rtol=1e-4)
    adapted.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(adapted), both, atol=1e-4, rtol=1e-4)


def test_two_edits_side_by_side_in_transformers(make_llama: Build, tmp_path: Path) -> None:
    """The same with a plain model's `load_adapter` and `set_adapter`."""
    model = make_llama()
    edits = {"first": llama_edit(5, 12), "second": llama_edit(20, 3, 6, seed=1)}
    expected = {name: edited_logits(model, edit) for name, edit in edits.items()}
    for name, edit in edits.items():
        model.load_adapter(str(edit.to_lora(tmp_path / name)), adapter_name=name)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], atol=1e-4, rtol=1e-4)


SWAPS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "same rank": ((5, 5), (6, 6)),
    "larger rank": ((5, 5), (12, 12)),
    "smaller rank": ((12, 12), (5, 5)),
    "own ranks": ((12, 5), (20, 8)),
    "fewer layers": ((5, 5), (6,)),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("first", "second"), SWAPS.values(), ids=SWAPS)
def test_hotswap(
    first: Sequence[int], second: Sequence[int], prepared: bool, make_llama: Build, tmp_path: Path
) -> None:
    """PEFT's `hotswap_adapter` puts the second edit into the place of the first, whatever the ranks."""
    model = make_llama()
    edit = llama_edit(*second, seed=1)
    expected = edited_logits(model, edit)
    adapted = PeftModel.from_pretrained(model, llama_edit(*first).to_lora(tmp_path / "first"))
    if prepared:
        prepare_model_for_compiled_hotswap(adapted, target_rank=32)
    assert (logits(adapted) - expected).abs().max() > 0.05
    hotswap_adapter(adapted, edit.to_lora(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)


def test_hotswap_in_transformers(make_llama: Build, tmp_path: Path) -> None:
    """A plain model's `load_adapter(hotswap=True)` does so for the same layers and ranks."""
    model = make_llama()
    edit = llama_edit(6, 14, seed=1)
    expected = edited_logits(model, edit)
    model.load_adapter(str(llama_edit(5, 12).to_lora(tmp_path / "first")))
    assert (logits(model) - expected).abs().max() > 0.05
    model.load_adapter(str(edit.to_lora(tmp_path / "second")), adapter_name="default", hotswap=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


QUANTISED: dict[str, tuple[dict[str, Any], str]] = {  # the configuration, and what a layer keeps its weight in
    "4-bit": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "torch.uint8"),
    "4-bit in bfloat16": ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "Params4bit"),
    "8-bit": ({"load_in_8bit": True}, "torch.int8"),
}


@pytest.mark.parametrize(("config", "held_in"), QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_base(
    config: dict[str, Any],
    held_in: str,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """It refuses the edit and names the adapter, which moves its logits as the edit moves the dequantised base's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=360, initializer_range=0.1, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    edit = make_editor(base, edit_lr=0.2).make_edit(base, facts[:3], tokenizer)

    def load() -> PreTrainedModel:
        quantisation = BitsAndBytesConfig(**config)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)

    quantised, dequantised, without = load(), load().dequantize(), logits(load())
    refused = rf"holds its weight in {held_in}, quantised.*edit\.to_lora\(folder\).*load_adapter"
    with pytest.raises(ModelMismatchError, match=refused):
        edit.apply_to(quantised)
    with pytest.raises(ModelMismatchError, match=refused):
        check_targets(quantised, edit.layers)
    for names in (None, ["mlp.down_proj"]):
        with pytest.raises(ModelMismatchError, match=refused):
            EditorModel.from_base(quantised, EditorConfig(method="malmen", target_modules=names))
    assert torch.equal(logits(quantised), without)

    # Into models that have not run yet: bitsandbytes repacks 4-bit weights in the first pass on a CPU.
    adapted = load()
    adapted.load_adapter(str(edit.to_lora(tmp_path / "adapter")))
    moved = logits(adapted) - without
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")) - without, moved)
    plain = logits(dequantised)
    with edit.applied_to(dequantised, on_fingerprint_mismatch="ignore"):
        expected = logits(dequantised) - plain
    assert expected.abs().max() > 1
    # 8-bit layers round their inputs too, and 4-bit ones may compute in half precision.
    assert (moved - expected).norm() <= 0.1 * expected.norm()


class PackedLinear(nn.Module):
    """A quantised layer that is no `nn.Linear`, as some libraries make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().to(torch.int8))


def test_quantised_layers_of_another_kind(make_llama: Build) -> None:
    """They get the message about adapters in a quantised model, and are just no linear layer in any other."""
    model = make_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PackedLinear(module))
    name = "model.layers.3.mlp.down_proj"
    with pytest.raises(ModelMismatchError, match=r"down_proj is a PackedLinear; only nn\.Linear"):
        check_targets(model, [name])
    model.hf_quantizer = object()
    for names in (None, ["layers.3.mlp.down_proj"]):
        with pytest.raises(ModelMismatchError, match=r"holds its weight in PackedLinear, quantised.*edit\.to_lora"):
            EditorModel.from_base(model, EditorConfig(method="malmen", target_modules=names))
    with pytest.raises(ModelMismatchError, match=r"norm is a LlamaRMSNorm; only nn\.Linear"):
        check_targets(model, ["model.norm"])


@pytest.mark.parametrize("rank", [0, -1])
def test_an_impossible_rank(edit: Edit, rank: int, tmp_path: Path) -> None:
    """The message names the value; nothing is written."""
    with pytest.raises(ValueError, match=f"rank is {rank}; expected a whole number of at least 1, or None"):
        edit.to_lora(tmp_path / "adapter", rank=rank)
    assert list(tmp_path.iterdir()) == []


NOTHING: dict[str, Shift] = {
    "dense": DenseShift(torch.zeros(48, 32)),
    "factors of zeros": FactoredShift(torch.zeros(3, 48), torch.ones(3, 32)),
    "no factors": FactoredShift(torch.zeros(0, 48), torch.zeros(0, 32)),
    "factors to truncate": FactoredShift(torch.ones(40, 48), torch.zeros(40, 32)),
}


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_a_shift_of_zeros(nothing: Shift, make_llama: Build, tmp_path: Path) -> None:
    """It is exact, without a division by its norm, and changes nothing beside a layer that is edited."""
    model = make_llama()
    something = llama_edit(5)
    edit = Edit({**something.layers, "model.layers.3.mlp.down_proj": nothing})
    edit.to_lora(tmp_path)
    assert set(errors_of(tmp_path).values()) == {0.0}
    assert config_of(tmp_path)["r"] == 8 and not config_of(tmp_path)["rank_pattern"]
    expected = edited_logits(model, something)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_the_factorisation_repeats_and_leaves_the_random_state_alone(kind: str) -> None:
    """It draws random directions, but not from the caller's generator."""
    factors = random_shift(25, 40, 30)
    shift = factors if kind == "factored" else DenseShift(factors.left.T @ factors.right)
    torch.manual_seed(5)
    first = factorise(shift, 4)
    drawn = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3), drawn)
    second = factorise(shift, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
