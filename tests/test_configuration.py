"""`EditorConfig`: what it fills in, what it refuses and in which words, and how it is stored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hf_malmen import EditorConfig, __version__
from hf_malmen.configuration import FORMAT_VERSION, METHODS


def test_defaults_are_the_documented_ones() -> None:
    """A config made with a method and nothing else is a complete one."""
    config = EditorConfig(method="malmen")
    assert (config.method, config.traced_tokens, config.aggregation) == ("malmen", "answer", "least_squares")
    assert (config.rank, config.n_blocks, config.edit_lr, config.ridge) == (512, 2, 1e-6, 1.0)
    assert (config.task_type, config.fingerprint_policy, config.use_chat_template) == ("CAUSAL_LM", "warn", False)
    for name in ("base_model_name_or_path", "base_model_revision", "base_model_fingerprint", "target_modules",
                 "layers_to_transform", "module_shapes", "fan_in_fan_out", "prompt_template"):  # fmt: skip
        assert getattr(config, name) is None, name
    assert config.format_version == FORMAT_VERSION


@pytest.mark.parametrize(
    ("task_type", "method", "rank"),
    [("CAUSAL_LM", "malmit", 1024), ("SEQ_2_SEQ_LM", "malmen", 512), ("SEQ_CLS", "malmen", 512)],
)
def test_without_a_method_the_task_decides(task_type: str, method: str, rank: int) -> None:
    """What the method has stays open with it; what is given goes along."""
    config = EditorConfig(prompt_template="{prompt}?")
    assert (config.method, config.rank) == (None, None)
    resolved = config.resolved(task_type)
    assert (resolved.method, resolved.rank, resolved.prompt_template) == (method, rank, "{prompt}?")
    assert EditorConfig(rank=7).resolved(task_type).rank == 7
    assert EditorConfig(method="memit", layers_to_transform=[1]).resolved("CAUSAL_LM").method == "memit"


@pytest.mark.parametrize("method", ["malmit", "memit"])
def test_settings_of_rows_are_no_settings_of_a_search(method: str) -> None:
    """An η of the other methods would be a step that leads nowhere, and traced tokens would change nothing."""
    with pytest.raises(ValueError, match=r"edit_lr is 0.001; .* 12 go no further than 0.012 times .* default is 0.5"):
        EditorConfig(method=method, edit_lr=1e-3)
    with pytest.raises(ValueError, match=r"token_selection is 'answer'; allowed .*: nothing"):
        EditorConfig(method=method, token_selection="answer")
    assert EditorConfig(token_selection="answer", edit_lr=1e-3).resolved("SEQ_CLS").traced_tokens == "answer"


def test_what_one_task_takes_waits_for_the_model() -> None:
    """A field that only the default method of other tasks has is refused once the task is known, with the way out."""
    config = EditorConfig(n_preserved_keys=4)
    assert config.resolved("SEQ_CLS").n_preserved_keys == 4
    with pytest.raises(
        ValueError, match=r"allowed with method 'malmit': 0\..*EditorConfig\(method='malmen'\) is the pap"
    ):
        config.resolved("CAUSAL_LM")


def test_a_method_decides_tokens_and_aggregation_unless_told() -> None:
    """MEND traces all tokens and sums; an explicit token selection wins over the method's."""
    assert {"malmen", "mend", "ultraedit", "stableedit"} <= set(METHODS)
    mend = EditorConfig(method="mend")
    assert (mend.traced_tokens, mend.aggregation) == ("all", "sum")
    assert EditorConfig(method="mend", token_selection="answer").traced_tokens == "answer"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("method", "magic", "None, 'malmen', 'mend'"),
        ("method", ["malmen"], "'malmen', 'mend'"),
        ("task_type", "TOKEN_CLS", "'CAUSAL_LM', 'SEQ_2_SEQ_LM', 'SEQ_CLS'"),
        ("token_selection", "last", "None, 'answer', 'all'"),
        ("statistics", "moving", "None, 'frozen', 'following'"),
        ("fingerprint_policy", "strict", "'warn', 'error', 'ignore'"),
        ("rank", 0, "a whole number of at least 1"),
        ("rank", 1.5, "a whole number of at least 1"),
        ("rank", "64", "a whole number of at least 1"),
        ("rank", True, "a whole number of at least 1"),
        ("n_blocks", -1, "a whole number of at least 1"),
        ("n_preserved_keys", -1, "a whole number of at least 0"),
        ("preservation", 0, "a finite number above 0"),
        ("edit_lr", 0, "a finite number above 0"),
        ("edit_lr", "1e-6", "a finite number above 0"),
        ("edit_lr", float("nan"), "a finite number above 0"),
        ("ridge", float("inf"), "a finite number above 0"),
        ("ridge", -0.5, "a finite number above 0"),
        ("ridge", True, "a finite number above 0"),
        ("target_modules", [], "a list of module names or suffixes"),
        ("target_modules", [""], "a list of module names or suffixes"),
        ("target_modules", [3], "a list of module names or suffixes"),
        ("target_modules", 5, "a list of module names or suffixes"),
        ("target_modules", "", "a regular expression"),
        ("target_modules", "mlp.(down_proj", "a regular expression"),
        ("layers_to_transform", "3", "a list of whole numbers of at least 0"),
        ("layers_to_transform", [1.5], "a list of whole numbers of at least 0"),
        ("layers_to_transform", -1, "a list of whole numbers of at least 0"),
        ("layers_to_transform", [], "a list of whole numbers of at least 0"),
        ("fan_in_fan_out", True, "a list of module names"),
        ("prompt_template", "Question:", "a text that contains '{prompt}'"),
        ("prompt_template", 5, "a text that contains '{prompt}'"),
        ("use_chat_template", "yes", "True, False"),
        ("format_version", "1", "a whole number of at least 1"),
    ],
)
def test_a_bad_value_names_field_value_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    """One sentence tells a user all there is to know."""
    with pytest.raises(ValueError, match=re.escape(f"EditorConfig.{field} is {value!r}")) as caught:
        EditorConfig(**{field: value})
    assert allowed in str(caught.value)


@pytest.mark.parametrize("shape", [[3], [3, 0], [3, 4, 5], 7, ["3", "4"]])
def test_a_bad_module_shape_names_the_module(shape: Any) -> None:
    """A shape is two sizes above 0."""
    with pytest.raises(ValueError, match=re.escape(f"EditorConfig.module_shapes['mlp'] is {shape!r}")) as caught:
        EditorConfig(module_shapes={"mlp": shape})
    assert "[key_size, value_size], both above 0" in str(caught.value)


def test_preserved_keys_need_the_least_squares() -> None:
    """MEND sums its rows and solves nothing."""
    assert EditorConfig(method="malmen", n_preserved_keys=16).n_preserved_keys == 16
    with pytest.raises(ValueError, match=r"EditorConfig\.n_preserved_keys is 16; allowed with method 'mend': 0"):
        EditorConfig(method="mend", n_preserved_keys=16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fills_in_what_is_none(method: str) -> None:
    """A row of the table is complete, and a value that is given wins over it."""
    config, row = EditorConfig(method=method), METHODS[method]
    for name in ("rank", "n_blocks", "edit_lr", "ridge"):
        assert getattr(config, name) == row.defaults.get(name, getattr(EditorConfig(method="malmen"), name))
    assert EditorConfig(method=method, edit_lr=0.5, ridge=7).edit_lr == 0.5
    assert (config.traced_tokens, config.aggregation) == (row.token_selection, row.aggregation)
    assert (config.value_differences, config.needs_training) == (row.value_differences, row.is_trained)
    assert config.follows_edits == (row.statistics == "following")
    assert "arXiv" in row.reference


@pytest.mark.parametrize("statistics", ["frozen", "following"])
@pytest.mark.parametrize("method", ["malmen", "ultraedit"])
def test_statistics_may_be_chosen(method: str, statistics: str) -> None:
    """What is configured wins over the method's own."""
    assert EditorConfig(method=method, statistics=statistics).follows_edits == (statistics == "following")


@pytest.mark.parametrize("name", ["rank", "n_blocks"])
def test_no_size_for_a_network_that_is_not_there(name: str) -> None:
    """It would change nothing, silently."""
    assert getattr(EditorConfig(method="ultraedit", **{name: 0}), name) == 0
    with pytest.raises(ValueError, match=rf"EditorConfig\.{name} is 64; allowed with method 'ultraedit', which has no"):
        EditorConfig(method="ultraedit", **{name: 64})


def test_a_module_named_twice_is_refused() -> None:
    """Twice the same layer would be edited twice."""
    with pytest.raises(ValueError, match=r"EditorConfig\.target_modules names a module twice: \['a', 'a'\]"):
        EditorConfig(target_modules=["a", "a"])


def test_template_and_chat_template_exclude_each_other() -> None:
    """There is one prompt format."""
    with pytest.raises(ValueError, match="prompt_template or use_chat_template, not both"):
        EditorConfig(prompt_template="Q: {prompt}\nA:", use_chat_template=True)


@pytest.mark.parametrize("template", ["Q: {prompt}\nA:", '{"question": "{prompt}"} ->', "{prompt} {here}", "{{prompt}"])
def test_a_template_may_hold_other_braces(template: str) -> None:
    """Only `{prompt}` is special, so that a JSON prompt can be written as it is."""
    assert EditorConfig(prompt_template=template).prompt_template == template


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("rnak", "rank"),
        ("ridges", "ridge"),
        ("edit_LR", "edit_lr"),
        ("target_module", "target_modules"),
        ("n_block", "n_blocks"),
        ("prompt_templates", "prompt_template"),
        ("base_model_name", "base_model_name_or_path"),
        ("base_model", "base_model_name_or_path"),
        ("lr", "edit_lr"),
        ("layers", "layers_to_transform"),
        ("modules", "target_modules"),
        ("template", "prompt_template"),
    ],
)
def test_a_misspelt_field_is_not_swallowed(typo: str, meant: str) -> None:
    """transformers keeps unknown keywords as attributes, so a typo would change nothing, silently."""
    with pytest.raises(ValueError, match=re.escape(f"EditorConfig has no field {typo!r}. Did you mean {meant!r}?")):
        EditorConfig(**{typo: 64})


def test_attributes_that_others_set_are_saved_and_loaded(tmp_path: Path) -> None:
    """Only who calls `EditorConfig` may have misspelt a field; other libraries write what they like into the file."""
    config = EditorConfig(rank=8)
    config.note_of_mine = "x"
    config.save_pretrained(tmp_path)
    for loaded in (EditorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert (loaded.note_of_mine, loaded.rank) == ("x", 8)
    assert EditorConfig.from_dict(config.to_dict(), return_unused_kwargs=True)[0].note_of_mine == "x"
    with pytest.raises(ValueError, match=r"no field 'rnak'\. Did you mean 'rank'\?"):
        EditorConfig.from_dict({"rnak": 64})


@pytest.mark.parametrize("name", ["learning_rate", "kappa", "batch_size", "note_of_mine", "to_dict"])
def test_a_keyword_unlike_any_field_is_refused_with_all_fields(name: str) -> None:
    """Nothing is dropped silently."""
    with pytest.raises(ValueError, match=f"EditorConfig has no field {name!r}. Its fields: method, ") as caught:
        EditorConfig(**{name: 64})
    assert "edit_lr" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architectures", ["EditorModel"]),
        ("attn_implementation", "eager"),
        ("dtype", "float32"),
        ("model_type", "hf_malmen"),
        ("name_or_path", "org/editor"),
        ("num_labels", 3),
        ("output_attentions", False),
        ("return_dict", True),
        ("torch_dtype", "float32"),
        ("transformers_version", "5.17.0"),
        ("use_cache", False),
        ("pad_token_id", 0),
        ("_commit_hash", "abc"),
        ("_name_or_path", "org/editor"),
    ],
)
def test_keywords_of_transformers_are_taken(name: str, value: Any) -> None:
    """What any configuration of transformers may have, now or from an older release, is none of a user's slips."""
    assert EditorConfig(method="malmen", **{name: value}).rank == 512


FULL: dict[str, Any] = {
    "method": "mend",
    "base_model_name_or_path": "org/base",
    "base_model_revision": "abc",
    "base_model_fingerprint": "0" * 64,
    "fingerprint_policy": "error",
    "target_modules": ["b.mlp", "a.mlp"],
    "layers_to_transform": [0, 2],
    "module_shapes": {"b.mlp": [4, 2], "a.mlp": [4, 2]},
    "fan_in_fan_out": ["b.mlp"],
    "rank": 7,
    "n_blocks": 3,
    "edit_lr": 3e-5,
    "ridge": 0.25,
    "token_selection": "answer",
    "prompt_template": "Frage: {prompt}\nAntwort:",
}


def test_the_json_file_is_sorted_and_round_trips(tmp_path: Path) -> None:
    """What is written is read back equal, by this class and by AutoConfig, and its keys are in order."""
    config = EditorConfig(**FULL)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert list(stored) == sorted(stored)
    assert stored["model_type"] == "hf_malmen"
    for name, value in FULL.items():
        assert stored[name] == value, name

    for read in (EditorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(read, EditorConfig)
        assert read.to_json_string() == config.to_json_string()
        for name, value in FULL.items():
            assert getattr(read, name) == value, name
    again = tmp_path / "again"
    EditorConfig.from_pretrained(tmp_path).save_pretrained(again)
    assert (again / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_the_writing_version_is_recorded_and_kept(tmp_path: Path) -> None:
    """The version that made the editor, not the one that reads it."""
    assert EditorConfig().hf_malmen_version == __version__
    EditorConfig(hf_malmen_version="0.0.1").save_pretrained(tmp_path)
    assert EditorConfig.from_pretrained(tmp_path).hf_malmen_version == "0.0.1"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """An older release does not misread a newer editor; it says which one to install."""
    EditorConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    newer = stored | {"format_version": FORMAT_VERSION + 1, "hf_malmen_version": "99.0"}
    path.write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"format {FORMAT_VERSION + 1} \(written by hf_malmen 99\.0\)") as caught:
        EditorConfig.from_pretrained(tmp_path)
    assert "pip install -U hf_malmen" in str(caught.value)
