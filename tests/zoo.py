"""One tiny model of every kind that is edited, built from its configuration, with what must be found in it.

And one fact at a time, unpadded, through plain transformers: what a model is given for it, the probabilities of its
answer, and the keys and value gradients. Shares no code with the package.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_malmen import Fact
from hf_malmen.tasks import AUTO_CLASSES

N_LAYERS = 7  # one more than are edited by default
N_SIDE = 4  # of each side of an encoder-decoder; three are edited
LABELS = ("REFUTES", "SUPPORTS", "NOT ENOUGH INFO")
SIZES = {
    "vocab_size": 360,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Head sizes that make attention's output projection narrow as feed-forward layers do.
WIDE_HEADS = {"head_dim": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": N_SIDE, "num_decoder_layers": N_SIDE, "num_heads": 4,
    "decoder_start_token_id": 0, "initializer_factor": 1.0, "dropout_rate": 0.0, "max_position_embeddings": None,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": N_SIDE, "decoder_layers": N_SIDE,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2, "init_std": 0.2,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "experts_implementation": "eager",
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What a model is given for one fact.

    Attributes:
        inputs: keyword arguments of its forward pass.
        positions: of the logits that answer; none of a classifier, whose logits are one row.
        answers: the tokens, or the class.
        traced: rows of the modules that are traced; None for all.
    """

    inputs: dict[str, Tensor]
    positions: list[int]
    answers: list[int]
    traced: list[int] | None

    def logs(self, logits: Tensor) -> Tensor:  # (n_answers, vocabulary or n_classes)
        """Log-probabilities of all answers, in the model's own precision."""
        if not self.positions:
            if logits.shape[1] == 1:
                return torch.cat((F.logsigmoid(-logits), F.logsigmoid(logits)), dim=1)
            return logits.log_softmax(-1)
        return logits[0, self.positions].log_softmax(-1)

    def likelihoods(self, logits: Tensor) -> Tensor:  # (n_answers,)
        """Log-probability of each answer."""
        return self.logs(logits).gather(1, torch.tensor(self.answers)[:, None]).flatten()


@dataclass(frozen=True)
class Kind:
    """One row of the zoo.

    Attributes:
        model_type: transformers'.
        task: PEFT's task type.
        targets: names of the default targets, with `{}` for the block's index.
        blocks: their indices.
        settings: fields of the configuration, over `SIZES`.
        config: fields of the `EditorConfig`, where the defaults find nothing.
        at_end: of a classifier, whether its head reads the last token.
        pooled: of a classifier, whether its head reads all tokens.
    """

    model_type: str
    task: str
    targets: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = tuple(range(1, N_LAYERS))
    at_end: bool = False
    pooled: bool = False

    @property
    def names(self) -> list[str]:
        """Full names of the targets, in order."""
        return [target.format(block) for target in self.targets for block in self.blocks]

    def build(self, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
        """The model, with random weights of a seed of its own, in evaluation mode."""
        logging.set_verbosity_error()
        settings = SIZES | self.settings | overrides
        if self.task == "SEQ_CLS" and "num_labels" not in settings:
            settings |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        implementation = settings.pop("attn_implementation", None)
        config = AutoConfig.for_model(self.model_type, **settings)
        torch.manual_seed(0)
        model = AUTO_CLASSES[self.task].from_config(config, attn_implementation=implementation)
        with torch.no_grad():  # biases and norms that are not at rest, so that nothing holds by chance
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.05 * torch.randn(parameter.shape)
        return model.to(dtype).eval()

    def facts(self, facts: Sequence[Fact]) -> list[Fact]:
        """`facts` with answers that this kind can give: those of a classifier by label, in another case, by index."""
        if self.task != "SEQ_CLS":
            return list(facts)
        names = ["0", "1"] if self.settings.get("num_labels") == 1 else [LABELS[0], LABELS[1].lower(), "2"]
        return [
            replace(fact, target=names[i % len(names)], unrelated_answer=names[i // 2 % len(names)])
            for i, fact in enumerate(facts)
        ]

    def given(self, tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> Given:
        """One fact for this model."""
        ids = tokenizer(prompt)["input_ids"]
        if self.task == "SEQ_CLS":
            names = {name.casefold(): i for i, name in enumerate(LABELS)}
            answer = int(target) if target.isdecimal() else names[target.casefold()]
            traced = None if self.pooled else [len(ids) - 1 if self.at_end else 0]
            return Given({"input_ids": torch.tensor([ids])}, [], [answer], traced)
        if self.task == "SEQ_2_SEQ_LM":
            answers = tokenizer(target)["input_ids"]
            read = [self.settings["decoder_start_token_id"], *answers[:-1]]
            # A first token of the tokenizer's own is read by the decoder, and not asked of it.
            positions = [i for i, token in enumerate(answers) if token != tokenizer.bos_token_id]
            inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([read])}
            return Given(inputs, positions, [answers[i] for i in positions], None)
        joined = tokenizer(f"{prompt} {target}")["input_ids"]
        positions = list(range(len(ids) - 1, len(joined) - 1))
        return Given({"input_ids": torch.tensor([joined[:-1]])}, positions, joined[len(ids) :], positions)

    def rows(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, names: Sequence[str], fact: Fact,
        selection: str = "answer",
    ) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
        """Keys and value gradients of one fact, by perturbing the outputs of the modules."""
        model = deepcopy(model).requires_grad_(False)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def perturb(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                seen[name] = args[0].detach(), torch.zeros_like(output, requires_grad=True)
                return output + seen[name][1]

            return hook

        for name in names:
            model.get_submodule(name).register_forward_hook(perturb(name))
        given = self.given(tokenizer, fact.prompt, fact.target)
        (-given.likelihoods(model(**given.inputs).logits).sum()).backward()
        rows = {}
        for name, (keys, zeros) in seen.items():
            assert zeros.grad is not None
            both = keys.reshape(-1, keys.shape[-1]), zeros.grad.reshape(-1, zeros.shape[-1])
            chosen = range(len(both[0])) if given.traced is None or selection == "all" else given.traced
            rows[name] = both[0][list(chosen)], both[1][list(chosen)]
        return rows


def causal(model_type: str, target: str, **settings: Any) -> Kind:
    """A causal language model."""
    return Kind(model_type, "CAUSAL_LM", (target,), settings)


def classifier(model_type: str, target: str, *, at_end: bool = False, pooled: bool = False, **settings: Any) -> Kind:
    """A sequence classifier."""
    return Kind(model_type, "SEQ_CLS", (target,), settings, at_end=at_end, pooled=pooled)


def two_sided(model_type: str, *targets: str, **settings: Any) -> Kind:
    """An encoder-decoder."""
    settings |= {"num_hidden_layers": N_SIDE}
    return Kind(model_type, "SEQ_2_SEQ_LM", targets, settings, blocks=tuple(range(1, N_SIDE)))


LLAMA = "model.layers.{}.mlp.down_proj"
KINDS: dict[str, Kind] = {
    # Decoders with nn.Linear
    "llama": causal("llama", LLAMA),
    "llama, square": causal("llama", LLAMA, intermediate_size=32),
    "mistral": causal("mistral", LLAMA, **WIDE_HEADS),
    "qwen2": causal("qwen2", LLAMA),
    "qwen3": causal("qwen3", LLAMA, **WIDE_HEADS),
    "gemma2": causal("gemma2", LLAMA, **WIDE_HEADS, query_pre_attn_scalar=16),
    "gemma3": causal("gemma3_text", LLAMA, **WIDE_HEADS, query_pre_attn_scalar=16),
    "phi3": causal("phi3", LLAMA),
    "olmo2": causal("olmo2", LLAMA),
    "stablelm": causal("stablelm", LLAMA, use_parallel_residual=True),
    "gpt_neox": causal("gpt_neox", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "gptj": causal(
        "gptj", "transformer.h.{}.mlp.fc_out", n_embd=32, n_inner=48, n_layer=N_LAYERS, n_head=4, rotary_dim=4
    ),
    "falcon": causal("falcon", "transformer.h.{}.mlp.dense_4h_to_h", ffn_hidden_size=48, parallel_attn=True),
    "falcon, new": causal(
        "falcon", "transformer.h.{}.mlp.dense_4h_to_h", ffn_hidden_size=48, new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "mpt": causal(
        "mpt", "transformer.blocks.{}.ffn.down_proj", d_model=32, n_heads=4, n_layers=N_LAYERS, max_seq_len=64
    ),
    "opt": causal("opt", "model.decoder.layers.{}.fc2", ffn_dim=48, word_embed_proj_dim=32),
    "opt, projected": causal(
        "opt", "model.decoder.layers.{}.fc2", ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    # Decoders with Conv1D
    "gpt2": causal("gpt2", "transformer.h.{}.mlp.c_proj", n_inner=48),
    "openai-gpt": causal("openai-gpt", "transformer.h.{}.mlp.c_proj", n_positions=64),
    "gpt2, square": causal("gpt2", "transformer.h.{}.mlp.c_proj", n_inner=32),
    # Mixtures of experts: what every token passes
    "mixtral": Kind(
        "mixtral", "CAUSAL_LM", ("model.layers.{}.self_attn.o_proj",), MOE,
        {"target_modules": ["self_attn.o_proj"], "layers_to_transform": [5, 6]}, blocks=(5, 6),
    ),
    "qwen3_moe": Kind(
        "qwen3_moe", "CAUSAL_LM", ("model.layers.{}.self_attn.o_proj",), MOE,
        {"target_modules": ["self_attn.o_proj"], "layers_to_transform": [5, 6]}, blocks=(5, 6),
    ),
    "qwen2_moe": causal(
        "qwen2_moe", "model.layers.{}.mlp.shared_expert.down_proj", **MOE, shared_expert_intermediate_size=24
    ),
    "deepseek_v3": causal(
        "deepseek_v3", "model.layers.{}.mlp.shared_experts.down_proj", **MOE, n_routed_experts=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
    # Encoders
    "bert": classifier("bert", "bert.encoder.layer.{}.output.dense", **NO_DROPOUT),
    "bert, square": classifier("bert", "bert.encoder.layer.{}.output.dense", **NO_DROPOUT, intermediate_size=32),
    "bert, one logit": classifier("bert", "bert.encoder.layer.{}.output.dense", **NO_DROPOUT, num_labels=1),
    "roberta": classifier("roberta", "roberta.encoder.layer.{}.output.dense", **NO_DROPOUT),
    "deberta-v2": classifier(
        "deberta-v2", "deberta.encoder.layer.{}.output.dense", **NO_DROPOUT, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=16, conv_kernel_size=3, type_vocab_size=0,
    ),
    "modernbert": classifier(
        "modernbert", "model.layers.{}.mlp.Wo", classifier_pooling="cls", global_attn_every_n_layers=3
    ),
    "modernbert, mean": classifier(
        "modernbert", "model.layers.{}.mlp.Wo", pooled=True, classifier_pooling="mean", global_attn_every_n_layers=3
    ),
    # Decoders that classify
    "llama, classes": classifier("llama", LLAMA, at_end=True),
    "biogpt, classes": classifier("biogpt", "biogpt.layers.{}.fc2", at_end=True, hidden_act="gelu"),
    "gpt2, classes": classifier("gpt2", "transformer.h.{}.mlp.c_proj", at_end=True, n_inner=48),
    # Encoder-decoders
    "t5": two_sided(
        "t5", "encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo", **T5
    ),
    "t5, square": two_sided(
        "t5", "encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo",
        **T5 | {"d_ff": 32, "feed_forward_proj": "gated-gelu"},
    ),
    "mt5": two_sided(
        "mt5", "encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo", **T5
    ),
    "bart": two_sided("bart", "model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2", **BART),
}  # fmt: skip
