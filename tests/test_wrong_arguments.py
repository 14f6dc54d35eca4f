"""Something else than what is expected: one clear error each, that says what came and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments, pipeline

from hf_malmen import (
    Edit,
    EditorModel,
    EditorTrainer,
    EditorTrainingArguments,
    Fact,
    ModelMismatchError,
    facts_in_force,
)

Build = Callable[..., Any]


@pytest.fixture
def model(make_llama: Build) -> PreTrainedModel:
    """A small model that does not say where it came from."""
    model: PreTrainedModel = make_llama()
    return model


@pytest.fixture
def editor(model: PreTrainedModel, make_editor: Build) -> EditorModel:
    """An editor for it."""
    editor: EditorModel = make_editor(model)
    return editor


def not_models(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What users have given for a model, by what the message says came."""
    return {
        "'org/base'": "org/base",
        "TextGenerationPipeline": pipeline("text-generation", model=model, tokenizer=tokenizer),
        "OrderedDict": model.state_dict(),
        type(tokenizer).__name__: tokenizer,
    }


def test_no_model(
    model: PreTrainedModel, editor: EditorModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], tmp_path: Path
) -> None:
    """Wherever a live model is asked for: the message names what came, and how to load one."""
    edit = editor.make_edit(model, facts, tokenizer)
    args = EditorTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for came, given in not_models(model, tokenizer).items():
        calls: list[Callable[[], object]] = [
            lambda given=given: EditorModel.from_base(given),
            lambda given=given: editor.make_edit(given, facts, tokenizer),
            lambda given=given: editor.evaluate(given, facts, tokenizer),
            lambda given=given: edit.apply_to(given),
            lambda given=given: EditorTrainer(editor, given, args, facts, processing_class=tokenizer),
        ]
        if not isinstance(given, str):  # of which these two read a folder
            calls.append(lambda given=given: editor.apply(given, facts, tokenizer))
            calls.append(lambda given=given: facts_in_force(given))
        for call in calls:
            with pytest.raises(TypeError, match=rf"^Expected a live model, and got {came}\. Load it first: Auto"):
                call()
    with pytest.raises(TypeError, match="got Edit"):
        facts_in_force(edit)  # type: ignore[arg-type]


def test_no_tokenizer(model: PreTrainedModel, editor: EditorModel, facts: list[Fact], tokenizer: Any) -> None:
    """A path, or the tokenizer inside of transformers'."""
    for given in ("org/base", tokenizer.backend_tokenizer):
        with pytest.raises(TypeError, match=r"^Expected the base model's tokenizer, and got .*AutoTokenizer\.from"):
            editor.apply(model, facts, given)


def test_no_tokenizer_beside_the_model(
    model: PreTrainedModel, editor: EditorModel, facts: list[Fact], tokenizer: Any, tmp_path: Path
) -> None:
    """The message names the folder and the argument, of a live model and of its checkpoint."""
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    words = r"No tokenizer could be loaded from .*base\. Pass the base model's, tokenizer=\.\.\."
    with pytest.raises(ModelMismatchError, match=words):
        editor.apply(model, facts)
    with pytest.raises(ModelMismatchError, match=words):
        editor.apply(tmp_path / "base", facts, output_dir=tmp_path / "edited")
    assert not (tmp_path / "edited").exists()
    editor.apply(tmp_path / "base", facts, tokenizer, output_dir=tmp_path / "edited")


def test_a_tokenizer_that_cannot_be_asked_for(
    model: PreTrainedModel, editor: EditorModel, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repo that is gated or out of reach nobody knows whether it has one."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr("hf_malmen.base_model.AutoTokenizer.from_pretrained", refuse)
    model.name_or_path = "org/gated"
    with pytest.raises(OSError, match="There is no folder org/gated, and no repo on the Hub that can be read: You are"):
        editor.make_edit(model, facts)


def test_no_config(model: PreTrainedModel) -> None:
    """The fields alone are no configuration."""
    with pytest.raises(TypeError, match=r"^Expected an EditorConfig, and got \{'rank': 3\}\. Make one"):
        EditorModel.from_base(model, {"rank": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["model", "nothing"])
def test_no_editors_folder(model: PreTrainedModel, given: str) -> None:
    """A loaded model is a base model, and no place to load from."""
    with pytest.raises(TypeError, match=r"^Expected an editor's folder or Hub id, and got .*EditorModel\.from_base"):
        EditorModel.from_pretrained(model if given == "model" else None)


@pytest.mark.parametrize("name", ["org/mistyped", "folder/of/nothing"])
def test_an_edits_folder_that_is_not_there(name: str) -> None:
    """It is said to be missing, and not only to be no repo."""
    with pytest.raises(OSError, match=f"There is no folder {name}"):
        Edit.from_pretrained(name, local_files_only=True)


def test_a_models_folder_that_is_not_there(
    editor: EditorModel, facts: list[Fact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is loaded; and so is an editor in place of the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="There is no folder org/mistyped, and no repo"):
        editor.apply("org/mistyped", facts, output_dir=tmp_path / "edited")
    editor.save_pretrained(tmp_path / "editor")
    with pytest.raises(ModelMismatchError, match="holds an editor; expected the language model to edit"):
        editor.apply(tmp_path / "editor", facts, output_dir=tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize("size", ["8", 0, -1, 8.0, True, None])
@pytest.mark.parametrize("call", ["apply", "make_edit", "evaluate", "warm_up", "editor"])
def test_no_size(
    model: PreTrainedModel, editor: EditorModel, tokenizer: Any, facts: list[Fact], call: str, size: Any
) -> None:
    """Sizes are checked before anything is read."""
    name, method = ("editor_batch_size", "make_edit") if call == "editor" else ("batch_size", call)
    with pytest.raises(ValueError, match=f"^{name} is {size!r}; expected a whole number of at least 1"):
        getattr(editor, method)(model, facts, tokenizer, **{name: size})


def test_sizes_of_numpy(model: PreTrainedModel, editor: EditorModel, tokenizer: Any, facts: list[Fact]) -> None:
    """Whole numbers of other kinds count."""
    assert editor.make_edit(model, facts, tokenizer, batch_size=np.int64(2)).n_facts == len(facts)


def test_no_arguments_of_ours(model: PreTrainedModel, editor: EditorModel, facts: list[Fact], tmp_path: Path) -> None:
    """A trainer takes the editor itself, and our arguments."""
    plain = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    ours = EditorTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    given: Any
    for given in ("org/editor", model):
        with pytest.raises(TypeError, match=r"^EditorTrainer expected an EditorModel, and got"):
            EditorTrainer(given, model, ours, facts)
    for given in (plain, {"max_steps": 3}, None):
        with pytest.raises(TypeError, match=r"^EditorTrainer expected an EditorTrainingArguments, and got"):
            EditorTrainer(editor, model, given, facts)
