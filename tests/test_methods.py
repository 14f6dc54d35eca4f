"""Every row of the table of methods whose shifts are made of traced rows: against a dense computation, and in use.

The computation shares no code with the package: it runs one unpadded sequence at a time, keeps every row there ever
was, and asks `torch.cov`, an SVD and `torch.linalg.solve` for what the package streams, merges and factorises.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import (
    Edit,
    EditorConfig,
    EditorModel,
    EditorTrainer,
    Fact,
    FactStream,
    ModelMismatchError,
    UntrainedEditorWarning,
)
from hf_malmen.configuration import METHODS
from hf_malmen.networks import pack_statistics

from .zoo import KINDS

FROM_ROWS = [name for name, method in METHODS.items() if method.maker == "rows"]
UNTRAINED = [name for name in FROM_ROWS if not METHODS[name].is_trained]
SHAPES = {"llama": ["down_proj", "o_proj"], "gpt2": ["c_proj"]}
CAUSAL = KINDS["llama"]  # of any causal language model
Build = Callable[..., Any]
Rows = dict[str, tuple[Tensor, Tensor]]


def make(model: PreTrainedModel, method: str, **config: Any) -> EditorModel:
    """An editor for the upper half of a tiny model; where there are parameters, as if trained."""
    architecture = model.config.model_type
    size = {"rank": 8, "n_blocks": 2} if METHODS[method].is_trained else {}
    settings = {"target_modules": SHAPES[architecture], "layers_to_transform": [2, 3], "edit_lr": 1e-2} | size | config
    editor = EditorModel.from_base(model, EditorConfig(method=method, **settings)).to(model.dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in editor.named_parameters():
            spread = 0.2 if "log_" in name else 0.1
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if METHODS[method].is_trained:
            for statistics in editor.statistics.values():
                rows = torch.randn(200, len(statistics.mean), generator=generator, dtype=torch.float64)
                statistics.update(0.5 + rows)
    return editor


class Dense:
    """What an editor's edits must come to, turn by turn."""

    def __init__(self, editor: EditorModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.editor, self.tokenizer = editor, tokenizer
        self.model = deepcopy(model)
        self.names = list(editor.config.target_modules or ())
        self.seen: dict[tuple[int, ...], list[Tensor]] = {}  # rows of keys and gradients side by side, by their sizes
        self.values = {name: value.detach().clone().double() for name, value in editor.state_dict().items()}

    def read(self, facts: Sequence[Fact]) -> Rows:
        """Keys and value gradients of the model as it is; the statistics have seen them then."""
        selection = self.editor.config.token_selection or METHODS[self.editor.config.method].token_selection
        found = [CAUSAL.rows(self.model, self.tokenizer, self.names, fact, selection) for fact in facts]
        rows: Rows = {}
        for name in self.names:
            keys, gradients = zip(*(part[name] for part in found), strict=True)
            rows[name] = torch.cat(keys).double(), torch.cat(gradients).double()
            shape = rows[name][0].shape[1], rows[name][1].shape[1]
            self.seen.setdefault(shape, []).append(torch.cat(rows[name], dim=1))
        return rows

    def turn(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        """The shifts that write `facts` into the model as it is, which holds them then."""
        rows = self.read(facts)
        shifts = {name: self.shift(name, *rows[name]) for name in self.names}
        with torch.no_grad():
            for name, shift in shifts.items():
                module = self.model.get_submodule(name)
                module.weight += shift.T if isinstance(module, nn.Linear) else shift
        return shifts

    def shift(self, name: str, keys: Tensor, gradients: Tensor) -> Tensor:
        """S of one layer, from its rows."""
        config, (k, v) = self.editor.config, (keys.shape[1], gradients.shape[1])
        members = [other for other in self.names if self.editor.config.shape_of(other) == (k, v)]
        index, prefix = members.index(name), f"networks.{k}x{v}"
        rows = torch.cat((keys, gradients), dim=1)
        edit_lr, ridge = self.editor.edit_lr(name), self.editor.ridge(name)
        if config.method in ("ultraedit", "stableedit"):
            seen = torch.cat(self.seen[k, v])
            z = (rows - seen.mean(0)) / seen.std(0)
            if config.method == "stableedit":
                covariance, diagonal = torch.cov(seen[:, k:].T), torch.diag(seen[:, k:].var(0))
                off = (len(seen) - 1) / (len(seen) - 1 + v)
                left, values, right = torch.linalg.svd(off * covariance + (1 - off) * diagonal)
                z[:, k:] = (gradients - seen[:, k:].mean(0)) @ left @ torch.diag(values**-0.5) @ right
            differences = -edit_lr * torch.einsum("nk,nk,nv->nv", z[:, :k], z[:, :k], z[:, k:])
        else:
            count = self.values[f"{prefix}.statistics.count"]
            deviation = (self.values[f"{prefix}.statistics.squared_deviation"] / (count - 1)).sqrt()
            z = (rows - self.values[f"{prefix}.statistics.mean"]) / deviation
            for block in range(config.n_blocks):
                down, up, bias, scale, shift = (
                    self.values[f"{prefix}.blocks.{block}.{part}"] for part in ("down", "up", "bias", "scale", "shift")
                )
                z = z + scale[index] * torch.relu(z @ down @ up + bias) + shift[index]
            if config.method == "mend":
                return -edit_lr * z[:, :k].T @ z[:, k:]
            differences = -edit_lr * torch.einsum("nk,nk,nv->nv", keys, z[:, :k], z[:, k:])
        return torch.linalg.solve(keys.T @ keys + ridge * torch.eye(k).double(), keys.T @ differences)


def assert_same(found: Any, expected: dict[str, Tensor], tolerance: float) -> None:
    """Every layer's shift is the expected one, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, shift in expected.items():
        assert float(shift.norm()) > 0
        assert float((found[name].double() - shift).norm() / shift.norm()) < tolerance, name


@pytest.fixture
def builders(make_llama: Build, make_gpt2: Build) -> dict[str, Build]:
    """Tiny models by name."""
    return {"llama": make_llama, "gpt2": make_gpt2}


@pytest.mark.parametrize("n_facts", [1, 5, 24])
@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("method", FROM_ROWS)
def test_shift_equals_the_dense_computation(
    method: str,
    architecture: str,
    n_facts: int,
    builders: dict[str, Build],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Build,
) -> None:
    """In float64, from fewer rows than key features and from more; shifts are kept in float32, and GPT-2's attention
    rounds to it on the way."""
    model, facts = builders[architecture](torch.float64), make_long_facts(30)
    editor = make(model, method)
    dense = Dense(editor, model, tokenizer)
    if method in UNTRAINED:
        editor.warm_up(model, facts[24:], tokenizer, batch_size=4)
        dense.read(facts[24:])
    expected = dense.turn(facts[:n_facts])
    found = editor.make_edit(model, facts[:n_facts], tokenizer, batch_size=3, editor_batch_size=7)
    assert_same(found.shifts, expected, 1e-6)


@pytest.mark.parametrize("method", FROM_ROWS)
def test_turns_equal_the_dense_computation(
    method: str, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_long_facts: Build
) -> None:
    """Each turn starts from the model, and the statistics where they follow, that the turns before it left."""
    model, facts = builders["llama"](torch.float64), make_long_facts(11)
    editor = make(model, method)
    dense = Dense(editor, model, tokenizer)
    total: dict[str, Tensor] = {}
    for begin in range(0, len(facts), 4):
        for name, shift in dense.turn(facts[begin : begin + 4]).items():
            total[name] = total.get(name, torch.zeros_like(shift)) + shift
    edit = editor.apply(model, facts, tokenizer, facts_per_turn=4, batch_size=3)
    assert_same(edit.shifts, total, 1e-6)


@pytest.mark.parametrize("method", FROM_ROWS)
def test_shifts_depend_on_the_facts_alone(
    method: str, builders: dict[str, Build], make_tokenizer: Build, make_long_facts: Build
) -> None:
    """Neither on batch sizes, nor on the order of the facts, the padding side, or whether they are streamed."""
    model, facts = builders["llama"](), make_long_facts(9)
    editor = make(model, method)
    expected = editor.make_edit(model, facts, make_tokenizer()).shifts
    for batch_size, editor_batch_size, order, side in ((1, 1, 1, "left"), (4, 5, -1, "left"), (64, 3, -1, "right")):
        tokenizer = make_tokenizer(padding_side=side)
        found = editor.make_edit(
            model, facts[::order], tokenizer, batch_size=batch_size, editor_batch_size=editor_batch_size
        )
        assert_same(found.shifts, dict(expected), 1e-5)
    streamed = editor.make_edit(model, FactStream(facts), make_tokenizer(), batch_size=2)
    assert_same(streamed.shifts, dict(expected), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", FROM_ROWS)
def test_undo_is_exact_and_reading_never_trains(
    method: str,
    dtype: torch.dtype,
    builders: dict[str, Build],
    tokenizer: PreTrainedTokenizerFast,
    make_facts: Build,
) -> None:
    """Bit for bit, after an edit at once and one in turns; and the editor is as it was."""
    model, facts = builders["llama"](dtype), make_facts(6)
    editor = make(model, method).float()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    learned = {name: value.clone() for name, value in editor.state_dict().items()}
    for facts_per_turn in (None, 2):
        edit = editor.apply(model, facts, tokenizer, facts_per_turn=facts_per_turn)
        assert not torch.equal(
            model.state_dict()[f"{editor.module_names[0]}.weight"], weights[f"{editor.module_names[0]}.weight"]
        )
        edit.undo()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    editor.evaluate(model, facts, tokenizer)
    assert all(torch.equal(value, learned[name]) for name, value in editor.state_dict().items())


@pytest.mark.parametrize("method", FROM_ROWS)
def test_folders(
    method: str, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_facts: Build, tmp_path: Path
) -> None:
    """Editor and edit come back from their folders; a checkpoint and an adapter hold what the live model does."""
    model, facts = builders["llama"](), make_facts(6)
    editor = make(model, method)
    if method in UNTRAINED:
        editor.warm_up(model, make_facts(12)[6:], tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor.save_pretrained(tmp_path / "editor")
    loaded = EditorModel.from_pretrained(tmp_path / "editor")
    assert loaded.state_dict().keys() == editor.state_dict().keys()
    assert loaded.scales() == editor.scales()

    edit = editor.make_edit(model, facts, tokenizer)
    same = loaded.apply(tmp_path / "base", facts, output_dir=tmp_path / "edited")
    for name, shift in edit.shifts.items():
        assert torch.equal(same.shifts[name], shift), name
    edit.save_pretrained(tmp_path / "edit")
    kept = Edit.from_pretrained(tmp_path / "edit")
    assert kept.editor["method"] == method
    edit.to_lora(tmp_path / "adapter")

    ids = torch.tensor([tokenizer(facts[0].prompt)["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        kept.apply_to(model)
        after = model(input_ids=ids).logits
        assert not torch.allclose(before, after, atol=1e-2)
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        assert torch.equal(written(input_ids=ids).logits, after)
        kept.undo()
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
        torch.testing.assert_close(adapted(input_ids=ids).logits, after, rtol=1e-3, atol=1e-3)


# Methods without training


@pytest.mark.parametrize("method", UNTRAINED)
def test_an_editor_without_parameters(
    method: str, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """It is ready as it is made, in silence (warnings are errors here), and η and λ are the configuration's."""
    model = builders["llama"]()
    editor = make(model, method, edit_lr=0.125, ridge=4.0)
    assert editor.num_parameters() == 0
    assert editor.is_trained
    assert (editor.device, editor.dtype) == (torch.device("cpu"), torch.float32)
    for scales in editor.scales().values():
        assert scales == pytest.approx([0.125, 4.0, 0.0], rel=1e-6)
    edit = editor.make_edit(model, make_facts(4), tokenizer)
    doubled = make(model, method, edit_lr=0.25, ridge=4.0).make_edit(model, make_facts(4), tokenizer)
    assert_same(doubled.shifts, {name: 2 * shift.double() for name, shift in edit.shifts.items()}, 1e-5)


@pytest.mark.parametrize("method", UNTRAINED)
def test_frozen_statistics_need_a_warm_up(
    method: str, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """Without one the editor says so; with one every edit is standardised alike, whatever was edited before."""
    model, facts = builders["llama"](), make_facts(12)
    editor = make(model, method, statistics="frozen")
    assert not editor.is_trained
    with pytest.warns(UntrainedEditorWarning, match=r"frozen and have seen no data.*Call editor\.warm_up"):
        editor.make_edit(model, facts[:4], tokenizer)
    editor.warm_up(model, facts[6:], tokenizer)
    assert editor.is_trained
    edit = editor.make_edit(model, facts[:4], tokenizer)
    assert edit.statistics == {}
    following = make(model, method)
    following.warm_up(model, facts[6:], tokenizer)
    other = following.make_edit(model, facts[:4], tokenizer)
    for name, shift in edit.shifts.items():
        assert not torch.allclose(other.shifts[name], shift, rtol=1e-2)


@pytest.mark.parametrize("method", ["malmen", *UNTRAINED])
def test_statistics_that_follow(
    method: str, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_long_facts: Build
) -> None:
    """An edit hands on the statistics of all rows so far, and a later one starts from them: two turns in two calls."""
    model, facts = builders["llama"](torch.float64), make_long_facts(10)
    editor = make(model, method, statistics="following")
    dense = Dense(editor, model, tokenizer)
    first = editor.apply(model, facts[:4], tokenizer)
    anew = editor.make_edit(model, facts[4:8], tokenizer, statistics=pack_statistics(editor.statistics))
    second = editor.make_edit(model, facts[4:8], tokenizer)  # finds them by the edit in force
    given = editor.make_edit(model, facts[4:8], tokenizer, statistics=first.statistics)
    assert all(torch.equal(given.shifts[name], shift) for name, shift in second.shifts.items())
    if method in UNTRAINED:  # the other's have seen training data too
        dense.turn(facts[:4])
        assert_same(second.shifts, dense.turn(facts[4:8]), 1e-6)
        for (key_size, value_size), rows in dense.seen.items():
            seen, prefix = torch.cat(rows), f"{key_size}x{value_size}"
            assert second.statistics[f"{prefix}.count"] == len(seen)
            torch.testing.assert_close(second.statistics[f"{prefix}.mean"], seen.mean(0), rtol=1e-6, atol=1e-7)
    assert not any(torch.allclose(anew.shifts[name], shift, rtol=1e-3) for name, shift in second.shifts.items())
    first.undo()
    in_turns = editor.apply(model, facts[:8], tokenizer, facts_per_turn=4)
    for name, tensor in second.statistics.items():
        torch.testing.assert_close(in_turns.statistics[name], tensor, rtol=1e-9, atol=1e-12)
    total = {name: shift.double() + second.shifts[name].double() for name, shift in first.shifts.items()}
    assert_same(in_turns.shifts, total, 1e-6)


def test_statistics_of_another_editor_are_refused(
    builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_facts: Build
) -> None:
    """With what they are and what was expected."""
    model, facts = builders["llama"](), make_facts(4)
    statistics = make(model, "ultraedit").make_edit(model, facts, tokenizer).statistics
    with pytest.raises(ModelMismatchError, match=r"48x32\.co_deviation \[32, 32\].*of another editor"):
        make(model, "stableedit").make_edit(model, facts, tokenizer, statistics=statistics)


@pytest.mark.parametrize("n_preserved_keys", [3, 9, 500])
def test_a_warm_up_fills_preserved_keys(
    n_preserved_keys: int, builders: dict[str, Build], tokenizer: PreTrainedTokenizerFast, make_long_facts: Build
) -> None:
    """With keys of the facts read, in batches of any size, and they move less than without."""
    model, facts = builders["llama"](torch.float64), make_long_facts(16)
    editor = make(model, "ultraedit", n_preserved_keys=n_preserved_keys, preservation=1e4)
    editor.warm_up(model, facts[8:], tokenizer, batch_size=2)
    rows = Dense(editor, model, tokenizer).read(facts[8:])
    plain = make(model, "ultraedit")
    plain.warm_up(model, facts[8:], tokenizer)
    edits = [one.make_edit(model, facts[:8], tokenizer) for one in (editor, plain)]
    for name in editor.module_names:
        network, index = editor.network(name)
        kept = network.preserved_keys[index].double()
        kept = kept[kept.any(dim=1)]
        assert len(kept) == min(n_preserved_keys, len(rows[name][0]))
        assert (torch.cdist(kept, rows[name][0]).min(dim=1).values < 1e-6).all()
        moves = [float((kept @ edit.shifts[name].double()).norm()) for edit in edits]
        assert moves[0] < 0.2 * moves[1]


@pytest.mark.parametrize("method", UNTRAINED)
def test_nothing_to_train(
    method: str, builders: dict[str, Build], make_facts: Build, make_trainer: Callable[..., EditorTrainer]
) -> None:
    """The trainer says what to do instead."""
    model = builders["llama"]()
    with pytest.raises(ValueError, match=rf"Method '{method}' has nothing to train.*editor\.warm_up\(model, facts\)"):
        make_trainer(make(model, method), model, make_facts(4))
