"""Which layers are edited: defaults and overrides by the module tree, and what is refused, in which words."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CanineConfig,
    CanineForSequenceClassification,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from hf_malmen import EditorConfig, EditorModel, ModelMismatchError
from hf_malmen.targets import DEFAULT_N_BLOCKS, check_targets, find_targets, named_modules, plain_model
from hf_malmen.tasks import infer_task_type
from hf_malmen.tracing import frozen, trace

from .zoo import KINDS, N_LAYERS, SIZES

Build = Callable[..., Any]


def targets(name: str, **config: Any) -> list[str]:
    """The targets that a kind of the zoo has with this configuration."""
    return find_targets(KINDS[name].build(), EditorConfig(**{"method": "malmen"} | config))


class Block(nn.Module):
    """A block of linear layers of these shapes, by name; a dot makes a module of its own."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (key_size, value_size) in shapes.items():
            parent: nn.Module = self
            *parts, last = name.split("__")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(key_size, value_size))


class Model(nn.Module):
    """Blocks in a list, and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 100)


ATTENTION = {"attn__q": (8, 8), "attn__o": (8, 8)}
# Layers of a block in the order they are registered, and the one to edit.
BLOCKS: dict[str, tuple[dict[str, tuple[int, int]], str]] = {
    "plain": ({**ATTENTION, "up": (8, 12), "down": (12, 8)}, "down"),
    "square": ({**ATTENTION, "up": (8, 8), "down": (8, 8)}, "down"),
    "gated and square": ({**ATTENTION, "mlp__gate": (8, 8), "mlp__up": (8, 8), "mlp__down": (8, 8)}, "mlp.down"),
    "gate and up fused": ({**ATTENTION, "gate_up": (8, 24), "down": (12, 8)}, "down"),
    "third to be registered": ({**ATTENTION, "w1": (8, 12), "w2": (12, 8), "w3": (8, 12)}, "w2"),
    "narrowing first": ({**ATTENTION, "up": (8, 4), "down": (4, 8)}, "down"),
    "attention wider than the feed-forward layer": (
        {"attn__q": (8, 32), "attn__o": (32, 8), "up": (8, 12), "down": (12, 8)}, "down"
    ),
    "feed-forward layer before attention": ({"up": (8, 12), "down": (12, 8), "self_attention__o": (8, 8)}, "down"),
    "with a router and a gate": (
        {**ATTENTION, "router": (8, 4), "shared__up": (8, 6), "shared__down": (6, 8), "shared_gate": (8, 1)},
        "shared.down",
    ),
    "with a low-rank branch after it": (
        {**ATTENTION, "up": (8, 12), "down": (12, 8), "branch__a": (8, 2), "branch__b": (2, 8)}, "down"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS)
def test_second_feed_forward_linear_of_a_block(case: str) -> None:
    """Whatever the shapes, the order and the neighbours."""
    shapes, wanted = BLOCKS[case]
    model = Model(*[Block(**shapes) for _ in range(8)])
    assert find_targets(model, EditorConfig(method="malmen")) == [
        f"blocks.{i}.{wanted}" for i in range(8 - DEFAULT_N_BLOCKS, 8)
    ]


@pytest.mark.parametrize("named", [False, True])
def test_experts_in_a_list_are_left_out(named: bool) -> None:
    """Each sees only some tokens. A longer list than that of the blocks does not pass for blocks. NLLB names them."""
    blocks = [Block(shared__up=(8, 6), shared__down=(6, 8)) for _ in range(3)]
    for block in blocks:
        experts = [Block(up=(8, 20), down=(20, 8)) for _ in range(5)]
        named_experts = {f"expert_{i}": expert for i, expert in enumerate(experts)} | {"dropout": nn.Dropout()}
        block.experts = nn.ModuleDict(named_experts) if named else nn.ModuleList(experts)
    assert find_targets(Model(*blocks), EditorConfig(method="malmen")) == [f"blocks.{i}.shared.down" for i in range(3)]


def test_a_longer_list_of_something_else() -> None:
    """MarkupLM's fifty embeddings are no blocks."""
    model = Model(*[Block(up=(8, 12), down=(12, 8)) for _ in range(3)])
    model.embeddings = nn.ModuleList(nn.Embedding(4, 8) for _ in range(50))
    assert find_targets(model, EditorConfig(method="malmen")) == [f"blocks.{i}.down" for i in range(3)]


def test_the_language_model_beside_a_deeper_vision_tower() -> None:
    """As in Qwen2-VL, of 28 and 32 blocks."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", **sizes, "num_hidden_layers": 2, "vocab_size": 90},
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "num_hidden_layers": 4,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    model = LlavaForConditionalGeneration(config)
    assert find_targets(model, EditorConfig(method="malmen")) == [
        f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)
    ]


def test_the_last_blocks_that_have_a_feed_forward_layer() -> None:
    """Blocks without one, such as those of experts only, do not count."""
    dense, empty = {"up": (8, 12), "down": (12, 8)}, {"attn__o": (8, 8)}
    model = Model(*[Block(**(empty if i % 2 else dense)) for i in range(16)])
    assert find_targets(model, EditorConfig(method="malmen")) == [f"blocks.{i}.down" for i in range(4, 16, 2)]


@pytest.mark.parametrize("kind", ["xlm", "flaubert"])
def test_model_with_a_list_of_each_kind_of_layer(kind: str) -> None:
    """Its lists are equally long; the feed-forward layers' is the one, not the attentions'."""
    config = AutoConfig.for_model(kind, n_words=50, emb_dim=8, n_layers=7, n_heads=2)
    names = find_targets(AutoModelForSequenceClassification.from_config(config), EditorConfig(method="malmen"))
    assert names == [f"transformer.ffns.{i}.lin2" for i in range(1, 7)]


def test_few_blocks_that_have_a_feed_forward_layer(caplog: pytest.LogCaptureFixture) -> None:
    """Those of mixtures are often the first one or three. Who names the layers, or the blocks, is told nothing."""
    dense, empty = {"up": (8, 12), "down": (12, 8)}, {"attn__q_proj": (8, 8), "attn__o_proj": (8, 8)}
    model = Model(Block(**dense), *[Block(**empty) for _ in range(7)])
    for config in (EditorConfig(method="malmen"), EditorConfig(method="memit")):
        caplog.clear()
        assert find_targets(model, config) == ["blocks.0.down"]
        assert "Only 1 of 8 blocks of Model" in caplog.text and "such as ['attn.o_proj']" in caplog.text
    caplog.clear()
    for config in (
        EditorConfig(method="malmen", layers_to_transform=0),
        EditorConfig(method="malmen", target_modules=["down"]),
    ):
        assert find_targets(model, config) == ["blocks.0.down"]
    assert caplog.text == ""


def test_convolutions_are_no_experts() -> None:
    """Their weights have three dimensions too. Nothing is proposed that the model does not have."""
    block = Block(attn__out=(8, 8))
    block.convolution = nn.Conv1d(8, 8, 1)
    message = r"no feed-forward linear layer in the blocks of Model\. .* such as \['attn\.out'\]\. Linear"
    with pytest.raises(ModelMismatchError, match=message):
        find_targets(Model(block), EditorConfig(method="malmen"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_name_what_can_be_edited_instead(name: str) -> None:
    """By default, and asked for by name."""
    message = r"experts, fused in model\.layers\.6\.mlp\.experts.*target_modules.*model\.layers\.6\.self_attn\.q_proj"
    with pytest.raises(ModelMismatchError, match=message):
        targets(name)
    with pytest.raises(ModelMismatchError, match=r"mlp\.experts is a \w+Experts; only nn\.Linear.*self_attn\.q_proj"):
        targets(name, target_modules=["mlp.experts"])


# Overrides


def test_overrides_as_in_peft() -> None:
    """Suffixes, a regular expression, and blocks; None picks from the blocks that are asked for, also early ones."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(N_LAYERS)]
    assert targets("llama", layers_to_transform=[0, 3]) == [names[0], names[3]]
    assert targets("llama", target_modules=["down_proj"]) == names
    assert targets("llama", target_modules=["mlp.down_proj"], layers_to_transform=2) == [names[2]]
    assert targets("llama", target_modules=r".*\.[45]\..*down_proj") == names[4:6]
    both = targets("bert", target_modules=["output.dense"], layers_to_transform=6)
    assert both == [f"bert.encoder.layer.6.{part}output.dense" for part in ("attention.", "")]
    sides = targets("t5", target_modules=["wi", "wo"], layers_to_transform=[3])
    assert sides == [
        f"{side}.block.3.layer.{i}.DenseReluDense.{name}"
        for side, i in (("encoder", 1), ("decoder", 2))
        for name in ("wi", "wo")
    ]
    assert targets("t5", layers_to_transform=0) == [
        "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module"),
    [("bert", "classifier"), ("bert", "bert.pooler.dense"), ("llama, classes", "score"), ("llama", "lm_head"),
     ("falcon", "transformer.h.3.self_attention.query_key_value"), ("phi3", "model.layers.2.mlp.gate_up_proj"),
     ("bart", "model.decoder.layers.1.encoder_attn.k_proj"), ("roberta", "classifier.out_proj")],
)  # fmt: skip
def test_any_linear_layer_can_be_named(
    name: str, module: str, make_editor: Build, make_tokenizer: Build, make_long_facts: Build
) -> None:
    """Heads, fused projections, and layers of the decoder that read the encoder: as rows of single facts say."""
    kind, tokenizer = KINDS[name], make_tokenizer(add_bos=True)
    model, facts = kind.build(torch.float64), kind.facts(make_long_facts(4))
    editor = make_editor(model, target_modules=[module])
    tokenize = editor.tokenizer_for(model, tokenizer)
    with frozen(model):
        batch = tokenize.pad([tokenize(fact.prompt, fact.target) for fact in facts])
        found = trace(model, batch, [module], "answer")[module]
    rows = []
    for fact in facts:
        given = kind.given(tokenizer, fact.prompt, fact.target)
        is_head = module in ("classifier", "classifier.out_proj", "bert.pooler.dense")
        rows.append(kind.rows(model, tokenizer, [module], fact, "all" if is_head else "answer")[module])
        assert len(rows[-1][0]) == (1 if is_head else len(given.traced or given.inputs["input_ids"][0]))
    for i, what in enumerate((found.keys, found.value_gradients)):
        torch.testing.assert_close(what, torch.cat([both[i] for both in rows]), rtol=1e-5, atol=1e-7)


# Refused


def test_a_tied_head() -> None:
    """Both names are given."""
    message = r"lm_head shares its weight with model\.embed_tokens\.weight"
    with pytest.raises(ModelMismatchError, match=message):
        find_targets(
            KINDS["llama"].build(tie_word_embeddings=True), EditorConfig(method="malmen", target_modules=["lm_head"])
        )


def test_weights_that_are_divided_while_the_model_runs() -> None:
    """As RWKV's are, unless that is switched off."""
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
    with pytest.raises(ModelMismatchError, match=r"divides weights in place.* rescale_every=0"):
        find_targets(RwkvForCausalLM(RwkvConfig(**sizes)), EditorConfig(method="malmen"))
    assert find_targets(RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)), EditorConfig(method="malmen"))


def test_a_model_that_reads_characters() -> None:
    """CANINE has no vocabulary."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ModelMismatchError, match="CanineForSequenceClassification has no embedding of tokens"):
        EditorModel.from_base(CanineForSequenceClassification(CanineConfig(**sizes, num_hash_buckets=64)))


def test_no_values() -> None:
    """A model built on the meta device has nothing to edit."""
    with torch.device("meta"):
        model = KINDS["llama"].build()
    with pytest.raises(ModelMismatchError, match=r"down_proj is on the meta device, without values.*from_pretrained"):
        EditorModel.from_base(model)


def test_a_layer_that_runs_twice(make_tokenizer: Build, make_long_facts: Build, make_editor: Build) -> None:
    """ALBERT's kind: one block, run again and again, has several keys a token."""
    model = KINDS["llama"].build()
    for index in range(1, N_LAYERS):
        model.model.layers[index] = model.model.layers[0]
    with pytest.raises(ModelMismatchError, match=r"layers\.0\.mlp\.down_proj shares its weight"):
        EditorModel.from_base(model, EditorConfig(method="malmen", target_modules=["layers.0.mlp.down_proj"]))
    tokenize = make_editor(KINDS["llama"].build()).tokenizer_for(model, make_tokenizer())
    batch = tokenize.pad([tokenize(fact.prompt, fact.target) for fact in make_long_facts(2)])
    with pytest.raises(ModelMismatchError, match="runs more than once in a pass"), frozen(model):
        trace(model, batch, ["model.layers.0.mlp.down_proj"], "answer")


def test_a_module_that_sees_other_rows(make_tokenizer: Build, make_long_facts: Build, make_editor: Build) -> None:
    """An expert gets some of the tokens, in an order of its own."""
    model = KINDS["llama"].build()
    mlp = model.model.layers[3].mlp
    mlp.expert = nn.Linear(32, 32)
    plain = mlp.forward
    mlp.forward = lambda hidden: plain(hidden) + mlp.expert(hidden.reshape(-1, 32)[:3]).sum()
    editor = make_editor(model, target_modules=["mlp.expert"])
    message = r"layers\.3\.mlp\.expert saw 3 rows in a batch of \d+ tokens"
    with pytest.raises(ModelMismatchError, match=message):
        editor.make_edit(model, make_long_facts(5), make_tokenizer())


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_expert_that_sees_as_many_tokens_as_a_side_has(
    side: str, make_tokenizer: Build, make_long_facts: Build, make_editor: Build
) -> None:
    """By chance, and of its own side or the other: what it sees has no sequences."""
    model, tokenizer = KINDS["t5"].build(), make_tokenizer()
    layer = model.get_submodule(f"{side}.block.3.layer.{1 + (side == 'decoder')}")
    layer.expert = nn.Linear(32, 32)
    editor = make_editor(model, target_modules=["expert"])
    tokenize = editor.tokenizer_for(model, tokenizer)
    batch = tokenize.pad([tokenize(fact.prompt, fact.target) for fact in make_long_facts(5)])
    plain = layer.forward
    for n_tokens in (batch.decoder_input_ids.numel(), batch.input_ids.numel()):
        layer.forward = lambda hidden, n=n_tokens: (
            plain(hidden) + layer.expert(hidden.reshape(-1, 32)[torch.arange(n) % 5]).sum()
        )
        with pytest.raises(ModelMismatchError, match=rf"expert saw {n_tokens} rows"), frozen(model):
            trace(model, batch, editor.module_names, "answer")


@pytest.mark.parametrize(("editor", "other"), [("llama", "llama, classes"), ("llama, classes", "llama")])
def test_an_editor_for_another_task(editor: str, other: str, make_editor: Build) -> None:
    """The layers fit, the task does not."""
    wanted, found = KINDS[editor].task, KINDS[other].task
    loader = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}[wanted]
    if wanted == "SEQ_CLS":
        with pytest.raises(ModelMismatchError, match=f"task_type is '{wanted}', and .* is for '{found}'.*{loader}"):
            EditorModel.from_base(KINDS[other].build(), EditorConfig(method="malmen", task_type=wanted))
    with pytest.raises(ModelMismatchError, match=rf"is for the task {found}, .* made for {wanted}.*{loader}"):
        make_editor(KINDS[editor].build()).check_base(KINDS[other].build())


def test_task_of_a_model() -> None:
    """By transformers' own lists, also of a subclass; None for what is in none of them."""
    for kind in KINDS.values():
        assert infer_task_type(kind.build()) == kind.task
    model = KINDS["bert"].build()
    model.__class__ = type("Mine", (type(model),), {})
    assert infer_task_type(model) == "SEQ_CLS"
    tiny = BertConfig(vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    decoder = BertConfig(**tiny.to_dict() | {"is_decoder": True, "add_cross_attention": True})
    assert infer_task_type(AutoModelForMaskedLM.from_config(tiny)) is None
    assert infer_task_type(nn.Linear(2, 2)) is None
    assert (
        infer_task_type(EncoderDecoderModel(encoder=BertModel(tiny), decoder=BertLMHeadModel(decoder)))
        == "SEQ_2_SEQ_LM"
    )
    assert EditorModel.from_base(Model(*[Block(up=(8, 9), down=(9, 8))])).config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("model_type", ["bert", "electra"])
def test_an_encoder_loaded_as_a_causal_model(model_type: str, make_editor: Build) -> None:
    """Unless it was made a decoder. GPT-NeoX has the same setting, unused."""
    encoder, decoder = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, is_decoder=is_decoder, **SIZES))
        for is_decoder in (False, True)
    )
    editor = make_editor(decoder)
    for check in (EditorModel.from_base, editor.check_base):
        with pytest.raises(ModelMismatchError, match=r"has is_decoder=False: .* is_decoder=True"):
            check(encoder)
    gpt_neox = KINDS["gpt_neox"].build()
    assert gpt_neox.config.is_decoder is False
    EditorModel.from_base(gpt_neox)


def test_names_are_those_of_the_model_itself() -> None:
    """The walk gives what `named_modules` gives, repetitions included."""
    model: PreTrainedModel = KINDS["llama"].build(tie_word_embeddings=True)
    model.model.layers[1] = model.model.layers[0]
    assert dict(named_modules(model)) == dict(model.named_modules(remove_duplicate=False))
    assert plain_model(model) is model
    with pytest.raises(ModelMismatchError, match=re.escape("no module 'lm_hed'")):
        check_targets(model, ["lm_hed"])
