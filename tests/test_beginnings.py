"""Passes behind beginnings that were read once, against passes over whole sequences."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_malmen import EditorConfig, Fact
from hf_malmen.batches import Tokenizer, TokenSequence
from hf_malmen.beginnings import Beginnings
from hf_malmen.tracing import answer_logits, frozen, run_until, steered
from hf_malmen.trunk import started_behind

from .zoo import KINDS

CUTS = [0, 2, 5, 3]  # tokens that are read beforehand


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "falcon", "qwen3", "olmo2", "phi3"])
def test_logits_are_those_of_whole_sequences(
    kind: str, tokenizer: PreTrainedTokenizerFast, make_long_facts: Callable[..., list[Fact]]
) -> None:
    """With a move of a hidden state behind the cut, started behind the block that it comes out of, and its gradient."""
    model = KINDS[kind].build(torch.float64)
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
    sequences = [tokenize(fact.prompt, fact.target) for fact in make_long_facts(4)]
    block = KINDS[kind].names[1].removesuffix(".mlp.down_proj").rsplit(".mlp", 1)[0].removesuffix(".fc2")
    module = model.get_submodule(block)
    moves = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.arange(4)
    with frozen(model):
        beginnings = Beginnings.read(
            model, tokenize, [s.input_ids[:cut] for s, cut in zip(sequences, CUTS, strict=True)]
        )
        assert beginnings is not None
        ends = [TokenSequence(s.input_ids[cut:], s.labels[cut:]) for s, cut in zip(sequences, CUTS, strict=True)]
        batch = tokenize.pad(ends)
        with torch.no_grad(), beginnings.before(model):
            reached = run_until(model, batch, module)
        results = []
        for whole in (True, False):
            leaf = moves.clone().requires_grad_()
            if whole:
                with steered(module, rows, torch.tensor(CUTS), leaf):
                    logits, answers = answer_logits(model, tokenize.pad(sequences))
            else:
                with (
                    beginnings.before(model),
                    started_behind(model, block, reached),
                    steered(module, rows, torch.zeros_like(rows), leaf),
                ):
                    logits, answers = answer_logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
            results.append((logits.detach(), torch.autograd.grad(loss, leaf)[0]))
    # GPT-J multiplies queries and keys in float32, whatever its dtype.
    rtol, atol = (1e-5, 1e-5) if kind == "gptj" else (1e-8, 1e-10)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    assert not model._forward_pre_hooks
    assert not module._forward_hooks
    assert all("forward" not in vars(entry) for entry in model.modules())


@pytest.mark.parametrize("kind", ["gemma2", "mpt"])
def test_what_keeps_more_than_all_tokens_reads_whole_sequences(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sliding windows, and positions that cannot be given."""
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
    assert Beginnings.read(KINDS[kind].build(), tokenize, [(7, 8, 9)]) is None


def test_nothing_to_read(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where every beginning is empty there is none."""
    assert (
        Beginnings.read(KINDS["llama"].build(), Tokenizer(tokenizer, EditorConfig(method="malmen")), [(), ()]) is None
    )
