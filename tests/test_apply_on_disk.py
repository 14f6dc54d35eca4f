"""`editor.apply` on a checkpoint: what it leaves on disk is what it makes of a live model, with a history."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import hf_malmen.history
from hf_malmen import (
    CheckpointError,
    CheckpointWriteError,
    Edit,
    EditorModel,
    Fact,
    FactError,
    ModelMismatchError,
    NumericalError,
    read_history,
    undo_edit,
)
from hf_malmen.batches import IGNORED, Tokenizer

Build = Callable[..., Any]


def state_of(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder: Path, action: Callable[[], object], error: type[Exception], match: str) -> None:
    """The action fails, and every file below the folder is as it was."""
    before = state_of(folder)
    with pytest.raises(error, match=match):
        action()
    assert state_of(folder) == before


def assert_holds(folder: Path, model: PreTrainedModel) -> None:
    """A plain `transformers` reload has the weights of `model`, to the bit."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The checkpoint of `model`, in several shards."""
    model.save_pretrained(tmp_path / "model", max_shard_size="90KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


@pytest.fixture
def editor(model: PreTrainedModel, make_editor: Build) -> EditorModel:
    """An editor for `model`, for which a base model with other weights is an error."""
    editor: EditorModel = make_editor(model, edit_lr=2e-3, fingerprint_policy="error")
    return editor


@pytest.mark.parametrize("facts_per_turn", [None, 3])
@pytest.mark.parametrize("where", ["in place", "a copy", "an empty folder"])
def test_the_weights_are_those_of_a_live_model(
    model: PreTrainedModel,
    folder: Path,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    where: str,
    facts_per_turn: int | None,
    tmp_path: Path,
) -> None:
    """Edited at once or in turns; the edit that comes back is in force nowhere, and is the one on record."""
    before, target = state_of(folder), folder if where == "in place" else tmp_path / "new"
    if where == "an empty folder":
        target.mkdir()
    destination: dict[str, Any] = {"in_place": True} if where == "in place" else {"output_dir": target}
    edit = editor.apply(folder, facts, facts_per_turn=facts_per_turn, **destination)
    expected = editor.apply(model, facts, tokenizer, facts_per_turn=facts_per_turn)
    assert_holds(target, model)
    assert expected.in_force and not edit.in_force
    (record,) = read_history(target)
    for found in (edit, Edit.from_pretrained(record.folder)):
        assert found.facts == facts
        assert all(torch.equal(found.shifts[name], shift) for name, shift in expected.shifts.items())
    assert record.summary.n_facts == len(facts)
    assert record.summary.measured == {}
    if where != "in place":
        assert state_of(folder) == before
    undo_edit(target)
    assert state_of(target) == before


def test_turns_are_not_one_edit(folder: Path, editor: EditorModel, facts: list[Fact], tmp_path: Path) -> None:
    """So that the test above can tell them apart."""
    edits = [editor.apply(folder, facts, output_dir=tmp_path / str(n), facts_per_turn=n) for n in (3, len(facts))]
    assert all(not torch.allclose(edits[0].shifts[name], shift) for name, shift in edits[1].shifts.items())


def test_edits_stack(
    model: PreTrainedModel,
    folder: Path,
    editor: EditorModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
) -> None:
    """The second edit is made on the edited weights, which an editor that wants its own base takes for it."""
    states = [state_of(folder)]
    for turn in (facts[:4], facts[4:]):
        editor.apply(folder, turn, in_place=True)
        states.append(state_of(folder))
    assert [(record.id, record.summary.n_facts) for record in read_history(folder)] == [("0001", 4), ("0002", 4)]
    for turn in (facts[:4], facts[4:]):
        editor.apply(model, turn, tokenizer)
    assert_holds(folder, model)
    for state in reversed(states[:-1]):
        undo_edit(folder)
        assert state_of(folder) == state


def test_an_edit_of_another_base_still_is_a_mismatch(
    model: PreTrainedModel, folder: Path, editor: EditorModel, facts: list[Fact]
) -> None:
    """What is saved as the base of an edited checkpoint is looked at, not believed."""
    name = editor.module_names[0]
    with torch.no_grad():
        model.get_submodule(name).weight[0] += 1.0
    model.save_pretrained(folder, max_shard_size="90KB")
    refused(folder, lambda: editor.apply(folder, facts, in_place=True), ModelMismatchError, "target weights differ")
    editor.config.fingerprint_policy = "ignore"
    editor.apply(folder, facts, in_place=True)
    editor.config.fingerprint_policy = "error"
    refused(folder, lambda: editor.apply(folder, facts, in_place=True), ModelMismatchError, "target weights differ")


def answers(model: PreTrainedModel, tokenize: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """What `model` predicts for each token of an answer, and the tokens."""
    tokens = tokenize(prompt, answer)
    with torch.no_grad():
        predicted = model(torch.tensor([tokens.input_ids])).logits[0].argmax(-1).tolist()
    pairs = [pair for pair in zip(predicted, tokens.labels, strict=True) if pair[1] != IGNORED]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def test_measured(model: PreTrainedModel, folder: Path, make_editor: Build, facts: list[Fact]) -> None:
    """The scores of the edited checkpoint, measured on a reload of it; in the edit, its record and the card."""
    editor = make_editor(model, edit_lr=5e-4 if model.config.model_type == "llama" else 5e-5)
    edit = editor.apply(folder, facts, in_place=True, measure=True, facts_per_turn=3)
    edited = AutoModelForCausalLM.from_pretrained(folder)
    tokenize = editor.tokenizer_for(edited)
    unrelated = [(fact.unrelated_prompt, fact.unrelated_answer) for fact in facts]
    kept = [answers(m, tokenize, *pair)[0] for m in (model, edited) for pair in unrelated]
    n_facts = len(facts)
    locality = sum(kept[i] == kept[n_facts + i] for i in range(n_facts)) / n_facts
    assert all(len(tokens) == 1 for tokens in kept)
    assert 0 < locality < 1, "some answers change, so that the number is worth comparing"
    hits = [answers(edited, tokenize, fact.prompt, fact.target) for fact in facts]
    assert edit.measured.keys() == {"edit_success", "generalization", "locality", "unrelated_accuracy"}
    assert edit.measured["locality"] == pytest.approx(locality)
    assert edit.measured["edit_success"] == pytest.approx(sum(a == b for a, b in hits) / n_facts)
    (record,) = read_history(folder)
    assert record.summary.measured == edit.measured
    assert Edit.from_pretrained(record.folder).measured == edit.measured
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name, score in edit.measured.items():
        assert f"{name.replace('_', ' ')} {score:.3f}" in card


def test_measuring_changes_no_weight(folder: Path, editor: EditorModel, facts: list[Fact], tmp_path: Path) -> None:
    """Nor what the edit is."""
    for name, measure in (("a", True), ("b", False)):
        editor.apply(folder, facts, output_dir=tmp_path / name, measure=measure)
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "a" / file.name).read_bytes() == (tmp_path / "b" / file.name).read_bytes()


# What stands in the way


def meanwhile(editor: EditorModel, happens: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens between the loading of the model and the writing of the edit."""
    make_edit = editor.make_edit

    def slow(*args: Any, **kwargs: Any) -> Edit:
        edit = make_edit(*args, **kwargs)
        happens()
        return edit

    monkeypatch.setattr(editor, "make_edit", slow)


@pytest.mark.parametrize("what", ["another model", "another edit", "an undo"])
@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_change_meanwhile(
    folder: Path,
    editor: EditorModel,
    facts: list[Fact],
    what: str,
    in_place: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The edit was not made for what is there now, and is not written."""
    other = editor.apply(folder, facts[:2], output_dir=tmp_path / "other")
    if what == "an undo":
        other.write(folder, in_place=True)
    after: list[dict[str, bytes | None]] = []

    def change() -> None:
        if what == "another model":
            file = next(file for file in folder.glob("*.safetensors") if load_file(file).keys() & set(keys))
            save_file({key: tensor + 0.5 for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        elif what == "another edit":
            other.write(folder, in_place=True)
        else:
            undo_edit(folder)
        after.append(state_of(folder))

    keys = [f"{name}.weight" for name in editor.module_names]
    meanwhile(editor, change, monkeypatch)
    destination: dict[str, Any] = {"in_place": True} if in_place else {"output_dir": tmp_path / "new"}
    with pytest.raises(ModelMismatchError, match="target weights differ"):
        editor.apply(folder, facts[2:], **destination)
    assert [state_of(folder)] == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


@pytest.mark.parametrize("in_place", [True, False])
def test_an_open_journal_is_taken_back_first(
    folder: Path,
    editor: EditorModel,
    facts: list[Fact],
    in_place: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The edit is made for the weights of before, not for those that a dead writer left."""
    editor.apply(folder, facts, output_dir=tmp_path / "expected")
    editor.apply(folder, facts[:3], output_dir=tmp_path / "other").save_pretrained(tmp_path / "edit")
    clean = state_of(folder)

    class Death(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(hf_malmen.history, "_replace_text", die)
        patch.setattr(hf_malmen.history, "_replay", lambda _: None)
        with pytest.raises(Death):
            Edit.from_pretrained(tmp_path / "edit").write(folder, in_place=True)
    assert (folder / "edits" / ".journal").is_dir()
    assert any(state_of(folder)[name] != data for name, data in clean.items())

    target = folder if in_place else tmp_path / "new"
    editor.apply(folder, facts, **({"in_place": True} if in_place else {"output_dir": target}))
    assert [record.id for record in read_history(target)] == ["0001"]
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert (target / file.name).read_bytes() == file.read_bytes()
    if not in_place:
        assert state_of(folder) == clean


def test_what_is_not_a_whole_model(folder: Path, editor: EditorModel, facts: list[Fact], tmp_path: Path) -> None:
    """A weight file alone can be written to, but not loaded; the error says what can be done with one."""
    file = tmp_path / "weights.safetensors"
    shutil.copy(next(folder.glob("*.safetensors")), file)
    for path in (file, next(folder.glob("*.safetensors"))):
        refused(
            tmp_path,
            lambda path=path: editor.apply(path, facts, output_dir=tmp_path / "new"),  # type: ignore[misc]
            CheckpointError,
            "folder",
        )
    refused(tmp_path, lambda: editor.apply(tmp_path / "none", facts, in_place=True), CheckpointError, "is no folder")


def test_a_model_of_text_and_images(
    make_editor: Build, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """Transformers lists it as no causal model. What is no language model at all is refused."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", **sizes, "vocab_size": 360}
    LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).save_pretrained(
        tmp_path / "llava"
    )
    tokenizer.save_pretrained(tmp_path / "llava")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    editor = make_editor(model)
    editor.apply(model, facts, tokenizer)
    editor.apply(tmp_path / "llava", facts, output_dir=tmp_path / "edited")
    edited = AutoModelForImageTextToText.from_pretrained(tmp_path / "edited").state_dict()
    assert all(torch.equal(edited[name], value) for name, value in model.state_dict().items())
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelMismatchError, match=r"type vit \(ViTForImageClassification\), which AutoModelForCausalLM"):
        editor.apply(tmp_path / "vit", facts, tokenizer, output_dir=tmp_path / "new")


@pytest.mark.parametrize("n_good", [0, 4])
def test_a_bad_fact_in_any_turn(
    folder: Path, editor: EditorModel, facts: list[Fact], n_good: int, tmp_path: Path
) -> None:
    """The last turn fails, and the first is not written."""
    long = [*facts[:n_good], Fact("Lyon " * 80, "France")]
    for destination in ({"in_place": True}, {"output_dir": tmp_path / "new"}):
        refused(
            tmp_path,
            lambda destination=destination: editor.apply(folder, long, facts_per_turn=2, **destination),  # type: ignore[misc]
            FactError,
            "at most 64",
        )


def test_numbers_that_overflow(
    model: PreTrainedModel, folder: Path, editor: EditorModel, facts: list[Fact], tmp_path: Path
) -> None:
    """The error comes before anything is written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    model.save_pretrained(folder, max_shard_size="90KB")
    editor.config.fingerprint_policy = "ignore"
    refused(tmp_path, lambda: editor.apply(folder, facts, in_place=True), NumericalError, "not finite")


def test_no_room(folder: Path, editor: EditorModel, facts: list[Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk fails the writing, not the checkpoint."""
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(folder, lambda: editor.apply(folder, facts, in_place=True), CheckpointWriteError, "MiB free")
