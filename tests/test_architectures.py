"""Every architecture and task of the zoo, from the default targets to the checkpoint that plain transformers loads."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from hf_malmen import Edit, EditorConfig, EditorModel, Fact, FactError, ModelMismatchError, UntrainedEditorWarning
from hf_malmen.batches import Tokenizer
from hf_malmen.tasks import AUTO_CLASSES
from hf_malmen.tracing import answer_logits, frozen

from .zoo import KINDS, Kind

Build = Callable[..., Any]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every row of the zoo."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Build) -> PreTrainedTokenizerFast:
    """With a first token, as those of encoders have."""
    return make_tokenizer(add_bos=True)


@pytest.fixture
def facts(kind: Kind, make_long_facts: Build) -> list[Fact]:
    """Facts whose targets the kind can give."""
    return kind.facts(make_long_facts(6))


def editor_for(kind: Kind, model: PreTrainedModel, make_editor: Build, **config: Any) -> EditorModel:
    """An editor as if trained, of the kind's targets."""
    return make_editor(model, **({"edit_lr": 0.05} | kind.config | config))


def expected_shifts(
    kind: Kind, editor: EditorModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact]
) -> dict[str, Tensor]:
    """argmin ‖U S − D‖² + λ ‖S‖², as an ordinary least squares with √λ I below U and zeros below D."""
    names = editor.module_names
    traced = [kind.rows(model, tokenizer, names, fact) for fact in facts]
    shifts = {}
    for name in names:
        keys, gradients = (torch.cat([rows[name][i] for rows in traced]) for i in (0, 1))
        with torch.no_grad():
            _, differences = editor(keys, gradients, name)
        root = editor.ridge(name) ** 0.5 * torch.eye(keys.shape[1], dtype=keys.dtype)
        padded = torch.cat((differences, differences.new_zeros(len(root), differences.shape[1])))
        shifts[name] = torch.linalg.lstsq(torch.cat((keys, root)), padded).solution
    return shifts


# The matrix


def test_default_targets(kind: Kind) -> None:
    """The second feed-forward linear of the last blocks, of both sides where there are two; the task is read off."""
    model = kind.build()
    editor = EditorModel.from_base(model, EditorConfig(**{"method": "malmen", "rank": 8} | kind.config))
    assert editor.module_names == kind.names
    assert editor.config.task_type == kind.task
    is_conv = isinstance(model.get_submodule(kind.names[0]), Conv1D)
    assert editor.config.fan_in_fan_out == (kind.names if is_conv else [])
    for name, (key_size, value_size) in (editor.config.module_shapes or {}).items():
        module: Any = model.get_submodule(name)
        assert value_size == 32
        assert module(torch.zeros(1, key_size)).shape == (1, value_size)


@pytest.mark.parametrize(("attention", "side"), [("eager", "right"), (None, "left")])
def test_shift_is_the_least_squares_of_the_rows(
    kind: Kind, attention: str | None, side: str, make_editor: Build, make_tokenizer: Build, facts: list[Fact]
) -> None:
    """For facts of unequal lengths in batches, whatever attention computes and whatever side the tokenizer pads."""
    model = kind.build(torch.float64, attn_implementation=attention)
    tokenizer = make_tokenizer(add_bos=True, padding_side=side)
    editor = editor_for(kind, model, make_editor)
    expected = expected_shifts(kind, editor, model, tokenizer, facts)
    tokenize = editor.tokenizer_for(model, tokenizer)
    sequences = [tokenize(fact.prompt, fact.target) for fact in facts]
    with frozen(model):
        found = editor.solve(editor.trace(model, (batch for _, batch in tokenize.batches(sequences, 4))))
    assert list(found) == kind.names
    for name, shift in expected.items():
        assert float(shift.norm()) > 1e-6, name
        # Several attentions compute their softmax in float32 even of a float64 model.
        assert float((found[name].shift - shift).norm() / shift.norm()) < 1e-5, name


def test_shift_does_not_depend_on_batches(
    kind: Kind, make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Nor on the order of the facts."""
    model = kind.build(torch.float64)
    editor = editor_for(kind, model, make_editor)
    alone = editor.make_edit(model, facts, tokenizer, batch_size=1).shifts
    together = editor.make_edit(model, facts[::-1], tokenizer, batch_size=8, editor_batch_size=5).shifts
    for name, shift in alone.items():
        assert float((together[name] - shift).norm() / shift.norm()) < 1e-5, name


@torch.no_grad()
def logits_of(kind: Kind, model: nn.Module) -> Tensor:
    """What a model makes of a fixed input."""
    ids = torch.tensor([[5, 40, 7, 300, 22, 22, 9], [9, 8, 7, 6, 5, 4, 3]])
    found: Tensor = model(
        input_ids=ids, **({"decoder_input_ids": ids[:, :4]} if kind.task == "SEQ_2_SEQ_LM" else {})
    ).logits
    return found


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Every weight, byte for byte."""
    return {name: value.detach().view(torch.uint8).numpy().tobytes() for name, value in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_edit_write_export_and_undo(
    kind: Kind,
    dtype: torch.dtype,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path: Path,
) -> None:
    """Live, reloaded and exported models give the same logits, and undo the first ones, bit for bit."""
    source = tmp_path / "source"
    kind.build(dtype).save_pretrained(source)
    load = AUTO_CLASSES[kind.task].from_pretrained
    model = load(source, dtype=dtype)
    before, base = bits_of(model), logits_of(kind, model)
    editor = editor_for(kind, load(source, dtype=torch.float32), make_editor, edit_lr=5e-3)
    edit = editor.apply(model, facts, tokenizer)
    live = logits_of(kind, model)
    changed = {name for name, bits in bits_of(model).items() if bits != before[name]}
    assert changed == {f"{name}.weight" for name in kind.names}
    assert torch.isfinite(live).all() and not torch.equal(live, base)

    edit.write(source, tmp_path / "edited")
    reloaded = load(tmp_path / "edited", dtype=dtype)
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        assert bits_of(reloaded) == bits_of(model)
        assert torch.equal(logits_of(kind, reloaded), live)
    else:  # transformers runs some of T5 in float32 whatever the file holds, and the file rounds
        assert dtype == torch.float16 and kind.model_type in ("t5", "mt5")
        torch.testing.assert_close(logits_of(kind, reloaded), live, atol=0.1, rtol=0.1)

    edit.undo()
    assert bits_of(model) == before
    assert torch.equal(logits_of(kind, model), base)
    if dtype == torch.float32:
        config = PeftConfig.from_pretrained(edit.to_lora(tmp_path / "lora"))
        assert config.task_type == (None if kind.task == "SEQ_CLS" else kind.task)  # no head, which PEFT would want
        adapted = PeftModel.from_pretrained(load(source, dtype=dtype), tmp_path / "lora").eval()
        torch.testing.assert_close(logits_of(kind, adapted), live, atol=1e-4, rtol=1e-4)


def test_answers_are_those_of_single_facts(kind: Kind, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> None:
    """Logits of a batch, whose cross-entropy is the sum over the facts."""
    model = kind.build(torch.float64)
    tokenize = EditorModel.from_base(
        model, EditorConfig(**{"method": "malmen", "rank": 8} | kind.config)
    ).tokenizer_for(model, tokenizer)
    given = [kind.given(tokenizer, fact.prompt, fact.target) for fact in facts]
    with frozen(model), torch.no_grad():
        logits, answers = answer_logits(model, tokenize.pad([tokenize(fact.prompt, fact.target) for fact in facts]))
        expected = torch.cat([entry.logs(model(**entry.inputs).logits) for entry in given])
    assert answers.tolist() == [token for entry in given for token in entry.answers]
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama, classes", "t5", "bart"])
def test_the_loss_is_that_of_transformers(
    name: str, tokenizer: PreTrainedTokenizerFast, make_long_facts: Build
) -> None:
    """Given a fact with `labels`, transformers shifts, masks and averages as we do."""
    kind, fact = KINDS[name], KINDS[name].facts(make_long_facts(6))[5]
    model = kind.build()
    tokenize = EditorModel.from_base(model, EditorConfig(method="malmen", rank=8)).tokenizer_for(model, tokenizer)
    given = kind.given(tokenizer, fact.prompt, fact.target)
    inputs, labels = {"input_ids": given.inputs["input_ids"]}, torch.tensor([given.answers])
    if kind.task == "CAUSAL_LM":
        inputs["input_ids"] = torch.cat((inputs["input_ids"], labels[:, -1:]), dim=1)
        prompt = torch.full((1, inputs["input_ids"].shape[1] - labels.shape[1]), -100)
        labels = torch.cat((prompt, labels), dim=1)
    elif kind.task == "SEQ_2_SEQ_LM":  # the tokenizer's first token counts for them: the decoder's own starts it here
        tokenize.tokenizer = deepcopy(tokenizer)
        tokenize.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
        inputs["input_ids"] = inputs["input_ids"][:, 1:]
    with torch.no_grad():
        logits, answers = answer_logits(model, tokenize.pad([tokenize(fact.prompt, fact.target)]))
        expected = model(**inputs, labels=labels[0] if kind.task == "SEQ_CLS" else labels).loss
    torch.testing.assert_close(F.cross_entropy(logits, answers), expected)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.task == "SEQ_CLS"])
def test_the_traced_token_is_the_one_that_the_head_reads(
    name: str, make_tokenizer: Build, make_long_facts: Build
) -> None:
    """The class depends on the last block at that token, or at all where it reads their mean, and at no other."""
    kind, tokenizer = KINDS[name], make_tokenizer(add_bos=True)
    model = kind.build(torch.float64)
    editor = EditorModel.from_base(model, EditorConfig(method="malmen", rank=8))
    tokenize = editor.tokenizer_for(model, tokenizer)
    batch = tokenize.pad([tokenize(fact.prompt, fact.target) for fact in kind.facts(make_long_facts(4))])
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[0]

    model.get_submodule(editor.module_names[-1]).register_forward_hook(keep)
    logits, answers = answer_logits(model, batch)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, answers, reduction="sum"), outputs)
    assert torch.equal(gradient.abs().sum(-1) > 0, batch.selected(editor.config.traced_tokens))
    assert batch.selected("answer").sum(1).tolist() == [1] * 4


def test_training_and_evaluation(
    kind: Kind, make_editor: Build, make_trainer: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A step of training moves every parameter and leaves the model; teacher-forced evaluation measures the edit."""
    model = kind.build()
    before = bits_of(model)
    editor = editor_for(kind, model, make_editor, n_preserved_keys=8)
    old = {name: value.detach().clone() for name, value in editor.named_parameters()}
    trainer = make_trainer(
        editor, model, facts, max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, lm_batch_size=2
    )
    trainer.tokenize = editor.tokenizer_for(model, tokenizer)
    trainer.train()
    assert [name for name, value in editor.named_parameters() if torch.equal(value, old[name])] == []
    assert all(network.preserved_keys.abs().sum(-1).gt(0).any() for network in editor.networks.values())
    scores = editor.evaluate(model, facts, tokenizer)
    assert {"edit_success", "generalization", "locality", "unrelated_accuracy"} <= scores.keys()
    assert all(0 <= score <= 1 for score in scores.values())
    assert bits_of(model) == before


# Whole runs of the new tasks


@pytest.mark.parametrize("name", ["bert", "llama, classes", "t5", "bart"])
def test_apply_to_a_checkpoint(
    name: str, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_long_facts: Build, tmp_path: Path
) -> None:
    """A saved editor edits a folder as it edits the live model; the edit knows its task when it is loaded again."""
    kind = KINDS[name]
    facts, source = kind.facts(make_long_facts(5)), tmp_path / "source"
    kind.build().save_pretrained(source)
    tokenizer.save_pretrained(source)
    model = AUTO_CLASSES[kind.task].from_pretrained(source)
    editor_for(kind, model, make_editor).save_pretrained(tmp_path / "editor")
    editor = EditorModel.from_pretrained(tmp_path / "editor")
    edit = editor.apply(source, facts, output_dir=tmp_path / "edited", measure=True)
    assert set(edit.measured) >= {"edit_success", "generalization", "locality", "unrelated_accuracy"}
    editor.apply(model, facts)
    reloaded = AUTO_CLASSES[kind.task].from_pretrained(tmp_path / "edited")
    assert torch.equal(logits_of(kind, reloaded), logits_of(kind, model))
    edit.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").task_type == edit.merge(edit).task_type == kind.task


@pytest.mark.parametrize("name", ["bert", "bert, one logit", "llama, classes", "t5"])
def test_a_strong_edit_gives_the_answers(
    name: str, make_editor: Build, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Steps along the gradient alone, applied as an edit, lower the loss of the facts, in every task."""
    kind = KINDS[name]
    model, facts = kind.build(), kind.facts(make_facts(4))
    editor = make_editor(model, seed=None, edit_lr=1e-3)
    tokenize = editor.tokenizer_for(model, tokenizer)
    batch = tokenize.pad([tokenize(fact.prompt, fact.target) for fact in facts])

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(*answer_logits(model, batch)))

    before = loss()
    with pytest.warns(UntrainedEditorWarning), editor.applied(model, facts, tokenizer=tokenizer):
        assert loss() < before
    assert loss() == before


@pytest.mark.parametrize(
    ("name", "length"), [("bert", 64), ("roberta", 63), ("llama", 64), ("gpt2", 64), ("bart", 64), ("t5", None)]
)
def test_the_longest_prompt_that_a_model_reads(
    name: str, length: int | None, tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """RoBERTa counts positions from its padding token on; T5 has no limit. What is accepted runs."""
    kind = KINDS[name]
    model, target = kind.build(), kind.facts(make_facts(1))[0].target
    tokenize = EditorModel.from_base(model, EditorConfig(method="malmen", rank=8)).tokenizer_for(model, tokenizer)
    assert tokenize.max_length == length
    word = len(tokenize(" Lyon" * 2, target)) - len(tokenize(" Lyon", target))
    free = (length or 100) - len(tokenize(" Lyon", target)) + word
    longest = tokenize(" Lyon" * (free // word), target)
    assert (length or 100) - word < len(longest) <= (length or 100)
    with torch.no_grad():
        assert torch.isfinite(answer_logits(model, tokenize.pad([longest]))[0]).all()
    if length is not None:
        with pytest.raises(FactError, match=f"at most {length}"):
            tokenize(" Lyon" * (free // word + 1), target)


def test_classes_that_no_target_can_name(tokenizer: PreTrainedTokenizerFast) -> None:
    """Several at once; and a decoder that could not find the last token of a padded text."""
    several = KINDS["bert"].build(problem_type="multi_label_classification")
    with pytest.raises(ModelMismatchError, match="multi_label_classification"):
        EditorModel.from_base(several).tokenizer_for(several, tokenizer)
    decoder = KINDS["llama, classes"].build(pad_token_id=None)
    with pytest.raises(ModelMismatchError, match=r"config\.pad_token_id = tokenizer\.pad_token_id"):
        EditorModel.from_base(decoder).tokenizer_for(decoder, tokenizer)


def test_xlnet_is_told_by_its_head(tokenizer: PreTrainedTokenizerFast) -> None:
    """One that reads the last position, padding or not, is refused; others read texts of any length."""
    sizes = {"vocab_size": 360, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}

    def prepared(summary: str) -> Tokenizer:
        config = AutoConfig.for_model("xlnet", **sizes, summary_type=summary)
        model = AUTO_CLASSES["SEQ_CLS"].from_config(config)
        return EditorModel.from_base(model, EditorConfig(method="malmen", rank=8)).tokenizer_for(model, tokenizer)

    with pytest.raises(ModelMismatchError, match=r"XLNetForSequenceClassification has summary_type='last'"):
        prepared("last")
    assert prepared("first").max_length is None
    assert len(prepared("first")("Lyon " * 100, "1")) > 100
