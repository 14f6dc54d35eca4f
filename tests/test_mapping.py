"""Module names -> checkpoint keys: architectures whose weights transformers renames, fuses or splits on load.

The answer to compare with is a plain `from_pretrained` of the written checkpoint: it must be the live edited model.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from hf_malmen import CheckpointError, Edit, ModelMismatchError
from hf_malmen.live import base_fingerprint
from hf_malmen.mapping import find_key, map_shifts
from hf_malmen.shards import read_tensor_index

Build = Callable[..., Any]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(architecture: str, config: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of any architecture that the installed transformers has."""
    if not hasattr(transformers, architecture):
        pytest.skip(f"this transformers has no {architecture}")
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, architecture)(getattr(transformers, config)(**settings))
    return model.eval()


def build_llava() -> PreTrainedModel:
    """A language model inside of a larger one, whose names were others once."""
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    return build("LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt_neox": lambda: build("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "hrm_text": lambda: build("HrmTextForCausalLM", "HrmTextConfig", **SIZES),
    "llava": build_llava,
    "mamba2": lambda: build(
        "Mamba2ForCausalLM", "Mamba2Config", **SIZES, num_heads=4, head_dim=16, state_size=8, n_groups=1
    ),
    "mixtral": lambda: build("MixtralForCausalLM", "MixtralConfig", **SIZES, num_local_experts=2),
    "molmo2": lambda: build("Molmo2TextModel", "Molmo2TextConfig", **SIZES),
    "nomic_bert": lambda: build("NomicBertForMaskedLM", "NomicBertConfig", **SIZES),
    "vit": lambda: build("ViTForImageClassification", "ViTConfig", **SIZES, image_size=8, patch_size=4),
}
# architecture, module, how its weight is stored, and how many weights share that tensor
WEIGHTS: list[tuple[str, str, str, int]] = [
    ("gpt_neox", "lm_head", "embed_out.weight", 1),
    ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight", 1),
    ("hrm_text", "model.H_module.layers.1.mlp.down_proj", "model.H_module.layers.1.mlp.down_proj.weight", 1),
    ("hrm_text", "model.H_module.layers.1.mlp.up_proj", "model.H_module.layers.1.mlp.gate_up_proj.weight", 2),
    ("hrm_text", "model.H_module.layers.0.self_attn.v_proj", "model.H_module.layers.0.attn.gqkv_proj.weight", 4),
    ("llava", "model.language_model.layers.1.mlp.down_proj", "language_model.model.layers.1.mlp.down_proj.weight", 1),
    # Whose settings are infinite.
    ("mamba2", "backbone.layers.1.mixer.out_proj", "backbone.layers.1.mixer.out_proj.weight", 1),
    ("mixtral", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj.weight", 1),
    ("molmo2", "layers.1.mlp.down_proj", "layers.1.mlp.ff_out.weight", 1),
    ("molmo2", "layers.1.mlp.gate_proj", "layers.1.mlp.ff_proj.weight", 2),
    ("molmo2", "layers.0.self_attn.k_proj", "layers.0.self_attn.att_proj.weight", 3),
    ("nomic_bert", "nomic_bert.layers.1.mlp.down_proj", "nomic_bert.encoder.layers.1.mlp.fc2.weight", 1),
    ("nomic_bert", "nomic_bert.layers.1.self_attn.q_proj", "nomic_bert.encoder.layers.1.attn.Wqkv.weight", 3),
    ("vit", "vit.layers.1.mlp.fc2", "vit.encoder.layer.1.output.dense.weight", 1),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, as transformers saves it; read only."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def path(architecture: str) -> Path:
        if not (folder / architecture).exists():
            MODELS[architecture]().save_pretrained(folder / architecture)
        return folder / architecture

    return path


def random_edit(model: nn.Module, names: Iterable[str], **settings: Any) -> Edit:
    """Random shifts for linear layers."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: model.get_submodule(name).weight.shape[::-1] for name in names}
    return Edit({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, **settings)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Every parameter and buffer, bit for bit."""
    one, two = found.state_dict(), expected.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert bits(tensor) == bits(two[name]), name


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def changed(source: Path, target: Path) -> set[str]:
    """The keys whose tensors differ."""
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    return {key for key, tensor in before.items() if bits(tensor) != bits(after[key])}


@pytest.mark.parametrize(("architecture", "name", "key", "n_sharing"), WEIGHTS)
def test_a_plain_reload_is_the_live_edited_model(
    saved: Callable[[str], Path], architecture: str, name: str, key: str, n_sharing: int, tmp_path: Path
) -> None:
    """Renamed, or one of several weights in a tensor of which the others keep their bits."""
    source = saved(architecture)
    model = type(MODELS[architecture]()).from_pretrained(source)
    edit = random_edit(model, [name])
    base = load_file(source / "model.safetensors")[key]
    assert base.numel() >= n_sharing / 2 * model.get_submodule(name).weight.numel()
    assert (base.numel() > model.get_submodule(name).weight.numel()) == (n_sharing > 1)

    report = edit.write(source, tmp_path / "target")

    assert report.keys == {name: [key]}
    assert changed(source, tmp_path / "target") == {key}
    edit.apply_to(model)
    assert_same(type(model).from_pretrained(tmp_path / "target"), model)
    written = load_file(tmp_path / "target" / "model.safetensors")[key]
    assert int((written != base).sum()) <= model.get_submodule(name).weight.numel()


@pytest.mark.parametrize(("architecture", "name", "key", "n_sharing"), [row for row in WEIGHTS if row[3] > 1])
def test_fused_weights_have_the_fingerprint_of_the_live_model(
    saved: Callable[[str], Path], architecture: str, name: str, key: str, n_sharing: int, tmp_path: Path
) -> None:
    """Only the values of the module count: neither the others in the tensor, nor where in it they lie."""
    model = type(MODELS[architecture]()).from_pretrained(saved(architecture))
    edit = random_edit(model, [name], base_model_fingerprint=base_fingerprint(model, [name]))
    edit.write(saved(architecture), tmp_path / "target", on_fingerprint_mismatch="error")
    with pytest.raises(ModelMismatchError, match="target weights differ"):
        random_edit(model, [name], base_model_fingerprint="0" * 64).write(
            saved(architecture), tmp_path / "other", on_fingerprint_mismatch="error"
        )


def test_negative_zeros_of_the_other_weights_stay(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """-0.0 + 0.0 is 0.0: what is not edited must not even be added to."""
    source = tmp_path / "source"
    source.mkdir()
    for path in saved("molmo2").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    key = "layers.1.mlp.ff_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[key] = torch.full_like(tensors[key], -0.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = MODELS["molmo2"]()
    random_edit(model, ["layers.1.mlp.gate_proj"]).write(source, tmp_path / "target")
    found = load_file(tmp_path / "target" / "model.safetensors")[key]
    up, gate = found.chunk(2)
    assert bits(up) == bits(torch.full_like(up, -0.0))
    assert (gate != 0).all()


def test_two_modules_in_one_tensor(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A tensor takes one shift; an adapter takes both."""
    model = MODELS["molmo2"]()
    edit = random_edit(model, ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"])
    with pytest.raises(ModelMismatchError, match=r"are both stored as layers\.1\.mlp\.ff_proj\.weight.*edit\.to_lora"):
        edit.write(saved("molmo2"), tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_one_module_in_two_tensors(tmp_path: Path) -> None:
    """Pieces of one weight, concatenated when they are loaded: each gets its part of the shift."""
    text = SIZES | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 48}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = build(
        "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLConfig", text_config=text, vision_config=vision
    )
    model.save_pretrained(tmp_path / "source")
    live = type(model).from_pretrained(tmp_path / "source")
    edit = random_edit(live, ["model.language_model.layers.1.mlp.shared_experts.gate_up_proj"])
    (keys,) = edit.write(tmp_path / "source", tmp_path / "target").keys.values()
    assert sorted(key.split(".")[-2] for key in keys) == ["gate_proj", "up_proj"]
    assert changed(tmp_path / "source", tmp_path / "target") == set(keys)
    edit.apply_to(live)
    assert_same(type(model).from_pretrained(tmp_path / "target"), live)


def test_names_that_a_checkpoint_has_already(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """`save_original_format=False` writes the names that modules have now."""
    model = type(MODELS["nomic_bert"]()).from_pretrained(saved("nomic_bert"))
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    for name in ("nomic_bert.layers.1.mlp.down_proj", "nomic_bert.layers.1.self_attn.q_proj"):
        edit = random_edit(model, [name])
        report = edit.write(tmp_path / "source", tmp_path / name)
        assert report.keys == {name: [f"{name}.weight"]}
        with edit.applied_to(model):
            assert_same(type(model).from_pretrained(tmp_path / name), model)


# Prefixes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "nomic_bert"])
@pytest.mark.parametrize("bare_checkpoint", [True, False])
def test_a_bare_model_and_a_head_model_fit_each_other(
    make_llama: Build, make_gpt2: Build, bare_checkpoint: bool, architecture: str, tmp_path: Path
) -> None:
    """A checkpoint of the model without its head names its tensors without a prefix; either way they are found."""
    model = {"llama": make_llama, "gpt2": make_gpt2, **MODELS}[architecture]()
    prefix = model.base_model_prefix + "."
    name = {
        "llama": "model.layers.1.mlp.down_proj",
        "gpt2": "transformer.h.1.mlp.c_proj",
        "mixtral": "model.layers.1.self_attn.o_proj",
        "nomic_bert": "nomic_bert.layers.1.self_attn.v_proj",
    }[architecture]
    saved_model, edited_model = (model.base_model, model) if bare_checkpoint else (model, model.base_model)
    saved_model.save_pretrained(tmp_path / "source")
    edited_name = name if bare_checkpoint else name.removeprefix(prefix)
    weight = edited_model.get_submodule(edited_name).weight
    flipped = architecture == "gpt2"
    shift = 0.1 * torch.randn(weight.shape if flipped else weight.shape[::-1])
    edit = Edit({edited_name: shift}, fan_in_fan_out=[edited_name] if flipped else ())
    report = edit.write(tmp_path / "source", tmp_path / "target")
    (key,) = report.keys[edited_name]
    assert key.startswith(prefix) != bare_checkpoint
    edit.apply_to(edited_model)
    assert_same(AutoModel.from_pretrained(tmp_path / "target"), model.base_model)


def test_find_key() -> None:
    """The name itself wins; otherwise a unique name with or without a prefix; otherwise an error."""
    wanted = "h.1.mlp.weight"
    assert find_key(wanted, ["h.1.mlp.weight", "a.h.1.mlp.weight"]) == "h.1.mlp.weight"
    assert find_key(f"a.{wanted}", ["h.1.mlp.weight", "h.11.mlp.weight"]) == "h.1.mlp.weight"
    assert find_key(wanted, ["a.h.1.mlp.weight", "a.h.11.mlp.weight"]) == "a.h.1.mlp.weight"
    with pytest.raises(ModelMismatchError, match=r"more than one tensor for h\.1\.mlp\.weight: a\.h\.1"):
        find_key(wanted, ["a.h.1.mlp.weight", "b.h.1.mlp.weight"])
    for keys in ([], ["h.11.mlp.weight"], ["h.1.mlp.bias"], ["xh.1.mlp.weight"]):
        with pytest.raises(ModelMismatchError, match=r"has no tensor for h\.1\.mlp\.weight\. .*another model"):
            find_key(wanted, keys)


def test_a_tied_weight_has_no_tensor_of_its_own(make_gpt2: Build, tmp_path: Path) -> None:
    """An output layer that is the embedding is not stored, and a shift for it would change the embedding too."""
    model = make_gpt2()
    model.save_pretrained(tmp_path / "source")
    edit = Edit({"lm_head": torch.zeros(32, 360)})
    with pytest.raises(ModelMismatchError, match=r"no tensor for lm_head\.weight\."):
        edit.write(tmp_path / "source", tmp_path / "target")
    with pytest.raises(ModelMismatchError, match=r"lm_head shares its weight"):
        edit.apply_to(model)


# Configurations


def with_settings(checkpoint: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """A copy of a checkpoint whose configuration says something else."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "two"},
        {"hidden_size": -1},
        {"hidden_act": "no such thing"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**30},
        {"hidden_size": 10**30},
        {"architectures": ["LlamaConfig"]},
        {"architectures": ["pipeline"]},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["../../../evil"]},
        {"architectures": {"a": 1}},
        {"architectures": [3]},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_describe_the_checkpoint(
    saved: Callable[[str], Path], change: dict[str, Any], tmp_path: Path
) -> None:
    """Refused with a message, in no time, and nothing is written; or not needed, and the names are not found."""
    source = with_settings(saved("nomic_bert"), tmp_path / "source", change)
    edit = random_edit(MODELS["nomic_bert"](), ["nomic_bert.layers.1.self_attn.q_proj"])
    with pytest.raises((CheckpointError, ModelMismatchError), match=r"config\.json|another model"):
        edit.write(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "setting",
    [
        {"vocab_size_per_layer_input": 262144},  # Gemma 3n and 4
        {"block_size": 1024},  # Bark
        {"audio_config": {"depthwise_separable_out_channel": 1024}},  # Phi-4-multimodal
    ],
    ids=str,
)
def test_a_large_setting_that_counts_no_layers(
    saved: Callable[[str], Path], setting: dict[str, Any], tmp_path: Path
) -> None:
    """Real models have these, and names that a count of layers could have, too."""
    source = with_settings(saved("nomic_bert"), tmp_path / "source", setting)
    random_edit(MODELS["nomic_bert"](), ["nomic_bert.layers.1.self_attn.q_proj"]).write(source, tmp_path / "target")


def test_a_configuration_runs_no_code(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a model's own code nor a kernel from the Hub is fetched, let alone run."""
    settings = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "experts_implementation": "evil/kernel",
    }
    source = with_settings(saved("nomic_bert"), tmp_path / "source", settings)
    (source / "evil.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    name = "nomic_bert.layers.1.self_attn.q_proj"
    report = random_edit(MODELS["nomic_bert"](), [name]).write(source, tmp_path / "target")
    assert report.keys == {name: ["nomic_bert.encoder.layers.1.attn.Wqkv.weight"]}


def test_a_model_is_never_loaded(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its empty shell says where weights lie; of the tensors only the edited one is read."""
    folder = saved("molmo2")
    tensors = read_tensor_index(folder)
    model = MODELS["molmo2"]()
    edit = random_edit(model, ["layers.1.mlp.gate_proj"])
    monkeypatch.setattr("hf_malmen.shards.TensorEntry.rows", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    (shift,) = map_shifts(folder, edit.layers, (), tensors).values()
    assert shift.places is not None
    assert shift.places.shape == tensors["layers.1.mlp.ff_proj.weight"].shape
