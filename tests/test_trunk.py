"""Models that a pass cannot start in the middle of, or whose last block has to run at every token: tried, not named."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, Fact
from hf_malmen.batches import Tokenizer
from hf_malmen.features import FeatureCache
from hf_malmen.tasks import AUTO_CLASSES
from hf_malmen.tracing import answer_logits, frozen, run_until
from hf_malmen.trunk import Trunk, started_behind

from .zoo import KINDS, SIZES

Build = Callable[..., Any]

TARGETS = [f"model.layers.{block}.mlp.down_proj" for block in (2, 3)]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the package says, at level info."""
    caplog.set_level("INFO", "hf_malmen")
    return caplog


def sharing(model: PreTrainedModel, *, outlives: bool) -> PreTrainedModel:
    """The lowest block leaves something in a dictionary that the uppermost adds, and takes out of it or not."""
    left: dict[str, Tensor] = {}
    lower, upper = model.get_submodule("model.layers.0"), model.get_submodule("model.layers.3")
    run_lower, run_upper = lower.forward, upper.forward

    def leave(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = run_lower(hidden, *args, **kwargs)
        left["output"] = output
        return output

    def add(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = run_upper(hidden, *args, **kwargs)
        return output + (left["output"] if outlives else left.pop("output")).tanh()

    lower.forward, upper.forward = MethodType(leave, lower), MethodType(add, upper)  # type: ignore[method-assign]
    return model


def streamed(model: PreTrainedModel, *, first: bool) -> PreTrainedModel:
    """Blocks hand on two streams, the first or the third dimension; as Gemma 3n and DeepSeek V4 do."""
    dim = 0 if first else 2
    blocks = list(model.get_submodule("model.layers"))  # type: ignore[call-overload] # a list of blocks
    for place, block in enumerate(blocks):

        def run(
            self: nn.Module, hidden: Tensor, *args: Any, own: Any = block.forward, at: int = place, **kwargs: Any
        ) -> Tensor:
            output: Tensor = own(hidden if at == 0 else hidden.mean(dim), *args, **kwargs)
            return output if at == len(blocks) - 1 else torch.stack((output, output * 0.5), dim)

        block.forward = MethodType(run, block)
    return model


CHANGES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "left for a pass": lambda model: sharing(model, outlives=False),
    "left for good": lambda model: sharing(model, outlives=True),
    "streams first": lambda model: streamed(model, first=True),
    "streams third": lambda model: streamed(model, first=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_hands_on_more_runs_in_full(
    change: str,
    make_llama: Build,
    make_long_facts: Build,
    tokenizer: PreTrainedTokenizerFast,
    told: pytest.LogCaptureFixture,
) -> None:
    """By the trunk and behind a block: the answers are those of plain passes, and it is said once."""
    model = CHANGES[change](make_llama())
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
    # As many as there are streams, so that the number of one cannot be taken for that of the other.
    sequences = [tokenize(fact.prompt, fact.target) for fact in make_long_facts(2)]
    batch, others = tokenize.pad(sequences), tokenize.pad(sequences[::-1])
    with frozen(model), torch.no_grad():
        expected = answer_logits(model, batch)[0]
        trunk = Trunk(model, TARGETS, FeatureCache(10**9))
        trunk.fill(sequences, tokenize, 2)
        answer_logits(model, others)
        with trunk.replayed(batch):
            torch.testing.assert_close(answer_logits(model, batch)[0], expected)
        reached = run_until(model, batch, model.get_submodule("model.layers.1"))
        answer_logits(model, others)
        for _ in range(2):
            with started_behind(model, "model.layers.1", reached):
                torch.testing.assert_close(answer_logits(model, batch)[0], expected)
    assert not trunk.is_usable
    assert told.text.count("hand on more than a hidden state; running them in full") == 1
    assert not model.get_submodule("model.layers.1")._forward_hooks


def test_plain_blocks_are_replayed(
    make_llama: Build, make_long_facts: Build, tokenizer: PreTrainedTokenizerFast, told: pytest.LogCaptureFixture
) -> None:
    """In half precision too, where a trial might take rounding for more."""
    model = make_llama(torch.bfloat16)
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
    sequences = [tokenize(fact.prompt, fact.target) for fact in make_long_facts(2)]
    trunk = Trunk(model, TARGETS, FeatureCache(10**9))
    with frozen(model):
        trunk.fill(sequences, tokenize, 2)
        ran: list[nn.Module] = []
        handle = model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *args: ran.append(args[0]))
        with trunk.replayed(tokenize.pad(sequences)), torch.no_grad():
            answer_logits(model, tokenize.pad(sequences))
        handle.remove()
    assert trunk.is_usable
    assert not ran
    assert not told.records


@pytest.mark.parametrize("method", ["malmen", "ft", "memit"])
def test_upper_layers_that_read_keys_of_lower_ones(
    method: str, make_facts: Build, make_trainer: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma 4 is trained on and edited, as any other."""
    config = AutoConfig.for_model(
        "gemma4_text", **SIZES | {"num_hidden_layers": 6}, num_kv_shared_layers=3, head_dim=16, global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, sliding_window=16,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=360, num_global_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AUTO_CLASSES["CAUSAL_LM"].from_config(config).eval()
    facts: list[Fact] = make_facts(4)
    settings: dict[str, Any] = {"rank": 8} if method == "malmen" else {"n_steps": 2}
    block = 3 if method != "malmen" else 4
    editor = EditorModel.from_base(
        model, EditorConfig(method=method, target_modules=["down_proj"], layers_to_transform=[block], **settings)
    )
    if method == "malmen":
        make_trainer(editor, model, facts, max_steps=1, per_device_train_batch_size=4).train()
        return
    if method == "memit":
        editor.collect_covariance(model, [fact.prompt for fact in facts], tokenizer=tokenizer)
    edit = editor.apply(model, facts, tokenizer=tokenizer)
    assert all(torch.isfinite(shift).all() for shift in edit.shifts.values())


def test_a_mean_over_all_tokens_reads_the_whole_last_block(
    make_long_facts: Build, make_editor: Build, make_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a class whose bias is so large that in half precision its logits hardly tell the other tokens."""
    kind = KINDS["modernbert"]
    model, facts = kind.build(torch.bfloat16, classifier_pooling="mean"), kind.facts(make_long_facts(4))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([8.0, -8.0, 0.0]))
    results: list[dict[str, Tensor]] = []
    for is_plain in (True, False):
        editor = make_editor(model, **kind.config).float()
        trainer: EditorTrainer = make_trainer(editor, model, facts)
        if is_plain:
            monkeypatch.setattr(trainer.passes, "_shortened", [])
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.editor, {"facts": facts})
        results.append({name: value.grad for name, value in editor.named_parameters() if value.grad is not None})
        assert trainer.passes._shortened == []
    for name, expected in results[0].items():
        distance = torch.linalg.vector_norm(results[1][name] - expected)
        assert distance <= 0.02 * torch.linalg.vector_norm(expected), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "bert", "modernbert", "llama, classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_that_read_their_own_token_shorten_the_last_block(
    name: str, dtype: torch.dtype, make_long_facts: Build, make_editor: Build, make_trainer: Build
) -> None:
    """What follows attention there runs on answer tokens alone, in half precision too."""
    kind = KINDS[name]
    model, facts = kind.build(dtype), kind.facts(make_long_facts(4))
    trainer: EditorTrainer = make_trainer(make_editor(model, **kind.config).float(), model, facts)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.editor, {"facts": facts})
    assert trainer.passes._shortened
