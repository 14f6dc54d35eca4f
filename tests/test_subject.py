"""Editing at the last token of each subject: what is traced, and what it needs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, EditorModel, Fact
from hf_malmen.batches import Tokenizer
from hf_malmen.errors import FactError
from hf_malmen.tracing import frozen

FACTS = [
    Fact("The capital of Ecuador is", "Lima", subject="Ecuador"),
    Fact("Fiji is in the continent of", "Europe", subject="Fiji"),
    Fact("In which city does Ecuador have its parliament? In", "Suva", subject="Ecuador"),
]


@pytest.fixture
def config() -> EditorConfig:
    """An editor of subjects."""
    return EditorConfig(method="malmen", token_selection="subject", rank=4, layers_to_transform=[0, 1], edit_lr=1.0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_token_of_each_subject_is_traced(
    tokenizer: PreTrainedTokenizerFast, config: EditorConfig, side: str
) -> None:
    tokenize = Tokenizer(tokenizer, config)
    batch = tokenize.pad([tokenize.edit(fact) for fact in FACTS], side)
    selected = batch.selected("subject")
    assert selected.sum(1).tolist() == [1] * len(FACTS)
    for row, fact in enumerate(FACTS):
        text = fact.prompt[: fact.prompt.index(str(fact.subject)) + len(str(fact.subject))]
        read = [
            i for i, real in zip(batch.input_ids[row].tolist(), batch.attention_mask[row].tolist(), strict=True) if real
        ]
        position = int(batch.attention_mask[row].cumsum(0)[selected[row]]) - 1
        assert read[: position + 1] == tokenizer(text)["input_ids"][: position + 1]
        assert len(tokenizer(text)["input_ids"]) == position + 1


@pytest.mark.parametrize("subject", ["東京", "Łódź", "กรุงเทพ", "😀"])
@pytest.mark.parametrize("prompt", ["The country of {} is", "{}", "{}'s country is"])
def test_a_character_of_several_tokens_is_read_to_its_end(
    tokenizer: PreTrainedTokenizerFast, config: EditorConfig, subject: str, prompt: str
) -> None:
    """As byte-level tokenizers cut most characters of most scripts, all bytes at the same offsets."""
    fact = Fact(prompt.format(subject), "Lima", subject=subject)
    sequence = Tokenizer(tokenizer, config).edit(fact)
    read = tokenizer.decode(sequence.input_ids[: sequence.subject + 1])
    assert read.endswith(subject)
    assert tokenizer.decode(sequence.input_ids[: sequence.subject]).endswith("\N{REPLACEMENT CHARACTER}")


def test_rows_are_the_inputs_at_the_subject(
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    config: EditorConfig,
) -> None:
    """Keys against a plain hook on a plain pass over each prompt alone."""
    model = make_llama().double()
    editor = EditorModel.from_base(model, config)
    tokenize = editor.tokenizer_for(model, tokenizer)
    sequences = [tokenize.edit(fact) for fact in FACTS]
    with frozen(model):
        (traced,) = editor.trace(model, [tokenize.pad(sequences)])
    for name in editor.module_names:
        for row, sequence in enumerate(sequences):
            seen: list[torch.Tensor] = []
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(input_ids=torch.tensor([sequence.input_ids]))
            handle.remove()
            assert_close(traced[name].keys[row], seen[0][0, sequence.subject])


def test_wordings_that_share_their_subject_share_their_key(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, config: EditorConfig
) -> None:
    """What follows a subject is not seen there: the reason to edit there."""
    model = make_llama()
    editor = EditorModel.from_base(model, config)
    tokenize = editor.tokenizer_for(model, tokenizer)
    wordings = [replace(FACTS[1], prompt=prompt) for prompt in ("Fiji is in the continent of", "Fiji lies in")]
    with frozen(model):
        (traced,) = editor.trace(model, [tokenize.pad([tokenize.edit(fact) for fact in wordings])])
    for entry in traced.values():
        assert_close(entry.keys[0], entry.keys[1])


@pytest.mark.filterwarnings("ignore::hf_malmen.UntrainedEditorWarning")
def test_batch_size_does_not_matter(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, config: EditorConfig
) -> None:
    model = make_llama()
    editor = EditorModel.from_base(model, config)
    whole = editor.make_edit(model, FACTS, tokenizer, batch_size=3)
    single = editor.make_edit(model, FACTS[::-1], tokenizer, batch_size=1)
    for name, shift in whole.shifts.items():
        assert shift.norm() > 0
        assert (shift - single.shifts[name]).norm() <= 1e-5 * shift.norm()


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        (Fact("The capital of Ecuador is", "Lima"), "has no subject"),
        (Fact("The capital of Ecuador is", "Lima", subject="Peru"), "does not occur in the prompt"),
    ],
)
def test_a_fact_whose_subject_cannot_be_found_is_refused(
    tokenizer: PreTrainedTokenizerFast, config: EditorConfig, fact: Fact, words: str
) -> None:
    with pytest.raises(FactError, match=words):
        Tokenizer(tokenizer, config).edit(fact)


def test_only_causal_models_have_it(tokenizer: PreTrainedTokenizerFast) -> None:
    config = EditorConfig(method="malmen", token_selection="subject", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="is for causal language models"):
        Tokenizer(tokenizer, config)


def test_early_blocks_are_edited_unless_others_are_named(make_llama: Callable[..., PreTrainedModel]) -> None:
    """At the last block nothing can be learned of a subject's token: no later token reads it."""
    model = make_llama()
    names = EditorModel.from_base(model, EditorConfig(method="malmen", token_selection="subject", rank=4)).module_names
    assert names == EditorModel.from_base(model, EditorConfig(method="memit")).module_names
    assert names[0] == "model.layers.0.mlp.down_proj"


def test_accumulated_edits_at_subjects_are_one_shot(
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_llama().double()
    editor = make_editor(model, token_selection="subject", layers_to_transform=[0, 1])
    expected = editor.make_edit(model, FACTS, tokenizer)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in editor.module_names}
    for part in (FACTS[:1], FACTS[1:]):
        editor.apply(model, part, tokenizer, accumulate=True)
    for name, shift in expected.shifts.items():
        moved = model.get_submodule(name).weight.detach() - before[name]
        assert float(moved.norm()) > 0
        assert_close(moved.T, shift.double(), rtol=1e-5, atol=1e-6 * float(shift.norm()))
