"""`EditorTrainer` on a tiny model: what moves, what must not, logs, checkpoints, resuming."""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from hf_malmen import (
    EditorModel,
    EditorTrainer,
    EditorTrainingArguments,
    Fact,
    FactError,
    FingerprintWarning,
    ModelMismatchError,
    NumericalError,
)
from hf_malmen.tracing import Trace

TARGETS = {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [2, 3]}
METRICS = ("edit_success", "generalization", "locality", "unrelated_accuracy")

State = dict[str, Tensor]


@pytest.fixture
def llama(make_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A tiny model in float32."""
    return make_llama()


@pytest.fixture
def many(make_long_facts: Callable[..., list[Fact]]) -> list[Fact]:
    """Eight facts of different lengths."""
    return make_long_facts(8)


def copy_of(module: nn.Module) -> State:
    """Every parameter and buffer."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_identical(found: State, expected: State) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def logged(trainer: EditorTrainer, key: str) -> list[float]:
    """The values of `key` in the order they were logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# What moves


@pytest.mark.parametrize(
    "config",
    [{}, {"method": "mend"}, {"method": "rledit"}, {"n_preserved_keys": 6}],
    ids=["malmen", "mend", "rledit", "preserve"],
)
def test_every_parameter_moves(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    config: dict[str, Any],
) -> None:
    """From the initial state a few steps move every parameter, and every layer's own row of those that have one."""
    editor = make_editor(llama, seed=None, **TARGETS, **config)
    before = copy_of(editor)
    trainer = make_trainer(
        editor, llama, many, per_device_train_batch_size=4, max_steps=4, rephrases_per_fact=2, logging_steps=1
    )
    trainer.train()
    for name, parameter in editor.named_parameters():
        moved = (parameter.detach() != before[name]).reshape(len(parameter), -1)
        if name.endswith("log_ridge") and editor.config.method == "mend":
            assert not moved.any()  # a sum has no λ
        elif name.endswith(("scale", "shift")) or "log_" in name:
            assert moved.any(dim=1).all(), name
        else:
            assert moved.any(), name
        assert torch.isfinite(parameter).all()
    for network in editor.networks.values():
        assert network.get_buffer("statistics.count").item() > before["networks.32x32.statistics.count"].item()


@pytest.mark.parametrize("sizes", [[10], [3, 7]])
def test_keys_of_all_lengths_are_preserved(
    llama: PreTrainedModel, make_editor: Callable[..., EditorModel], sizes: list[int]
) -> None:
    """Of more rows, longest texts first, than are kept an even spread, in batches of any size."""
    editor = make_editor(llama, n_preserved_keys=4, **TARGETS)
    keys = {
        name: torch.arange(10.0)[:, None].expand(10, editor.config.shape_of(name)[0]) for name in editor.module_names
    }
    parts = {name: [Trace(part, part) for part in rows.split(sizes)] for name, rows in keys.items()}
    editor.preserve([{name: of_name[i] for name, of_name in parts.items()} for i in range(len(sizes))])
    for name in keys:
        network, index = editor.network(name)
        assert network.preserved_keys[index, :, 0].tolist() == [0, 2, 5, 7]


def test_training_lowers_the_loss(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Forty steps over the same facts teach the editor to write them."""
    editor = make_editor(llama, seed=None, edit_lr=1e-2, **TARGETS)
    trainer = make_trainer(
        editor, llama, many, per_device_train_batch_size=8, max_steps=40, rephrases_per_fact=2, logging_steps=1,
        learning_rate=3e-3, scale_learning_rate=5e-2, locality_weight=0.1,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "generalization_loss")
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_losses_and_scales_are_logged(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Each log has both parts of the loss, their sum, the gradient's norm, and η and λ of every layer."""
    editor = make_editor(llama, seed=None, **TARGETS)
    trainer = make_trainer(
        editor, llama, many, per_device_train_batch_size=2, max_steps=6, logging_steps=2, locality_weight=0.5
    )
    trainer.train()
    generalization, locality = logged(trainer, "generalization_loss"), logged(trainer, "locality_loss")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(generalization) == len(locality) == len(logged(trainer, "grad_norm")) == 3
    expected = [g + 0.5 * k for g, k in zip(generalization, locality, strict=True)]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert all(value > 0 for value in [*generalization, *locality, *logged(trainer, "grad_norm")])
    for name in editor.module_names:
        for kind, value in (("edit_lr", editor.edit_lr(name)), ("ridge", editor.ridge(name))):
            series = logged(trainer, f"{kind}/{name}")
            assert len(set(series)) == 3
            assert series[-1] == pytest.approx(value, rel=1e-6)


def test_losses_of_a_log_are_means_of_its_steps(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Logging every third step gives the mean of what logging every step gives."""
    histories = []
    for every in (1, 3):
        trainer = make_trainer(
            make_editor(llama, seed=None, **TARGETS), llama, many, per_device_train_batch_size=2, max_steps=6,
            logging_steps=every,
        )  # fmt: skip
        trainer.train()
        histories.append({key: logged(trainer, key) for key in ("generalization_loss", "locality_loss")})
    for key, values in histories[0].items():
        means = [sum(values[:3]) / 3, sum(values[3:]) / 3]
        assert histories[1][key] == pytest.approx(means, rel=1e-9)


def test_accumulated_steps_are_averaged(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An optimiser step over three accumulated sets of facts moves along the mean of their three gradients."""
    seen: list[list[Fact]] = []
    plain = EditorTrainer.training_step

    def record(self: EditorTrainer, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        seen.append(inputs["facts"])
        return plain(self, model, inputs, *rest)

    editor = make_editor(llama, **TARGETS)
    twin, before = deepcopy(editor), copy_of(editor)
    settings = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 1.0, "scale_learning_rate": 2.0}
    settings |= {"max_grad_norm": 0.0, "rephrases_per_fact": 2}
    monkeypatch.setattr(EditorTrainer, "training_step", record)
    trainer = make_trainer(editor, llama, many, gradient_accumulation_steps=3, max_steps=1, logging_steps=1, **settings)
    trainer.train()
    monkeypatch.undo()
    assert [len(facts) for facts in seen] == [2, 2, 2]
    assert trainer.state.global_step == 1

    single = make_trainer(twin, llama, many, **settings)
    single.current_gradient_accumulation_steps = 1
    losses = [single.training_step(twin, {"facts": facts}).item() for facts in seen]
    assert logged(trainer, "loss") == pytest.approx([sum(losses) / 3], rel=1e-4)
    for name, parameter in editor.named_parameters():
        gradient = twin.get_parameter(name).grad
        assert gradient is not None
        rate = 2.0 if "log_" in name else 1.0
        torch.testing.assert_close(before[name] - parameter.detach(), rate * gradient / 3, rtol=1e-4, atol=2e-6)


# What does not move


class Watch(TrainerCallback):
    """Compares the base model with how it was found, at the end of every step."""

    def __init__(self, compare: Callable[[], None]) -> None:
        self.compare = compare
        self.n_steps = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare."""
        self.compare()
        self.n_steps += 1


def state_of(model: nn.Module) -> list[Any]:
    """Everything of a model that training could leave changed, but its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
        [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, hook, list(getattr(module, hook))) for name, module in model.named_modules() for hook in hooks],
    ]


def test_base_model_is_never_trained(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """After every step and evaluation its weights, flags, modes, hooks and gradients are as they were found."""
    llama.train()
    for index, (module, parameter) in enumerate(zip(llama.modules(), llama.parameters(), strict=False)):
        module.training = index % 3 != 0
        parameter.requires_grad_(index % 2 == 0)
    first = next(llama.parameters())
    first.grad = torch.ones_like(first)
    flags, weights = state_of(llama), copy_of(llama)

    def compare() -> None:
        assert state_of(llama) == flags
        assert_identical(llama.state_dict(), weights)
        assert torch.equal(next(llama.parameters()).grad, torch.ones_like(first))  # type: ignore[arg-type]

    watch = Watch(compare)
    trainer = make_trainer(
        make_editor(llama, seed=None, **TARGETS), llama, many[:6], eval_dataset=many[6:], callbacks=[watch],
        per_device_train_batch_size=3, max_steps=3, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    compare()
    trainer.train()
    compare()
    assert watch.n_steps == 3


def test_base_model_is_as_found_after_an_error(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that fails in the middle of a shifted pass leaves no hook and no flag behind."""
    trainer = make_trainer(make_editor(llama, **TARGETS), llama, many, max_steps=1)
    flags, weights = state_of(llama), copy_of(llama)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_malmen.training.kl_divergence", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert state_of(llama) == flags
    assert_identical(llama.state_dict(), weights)


def test_evaluation_does_not_change_the_editor(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Reading never trains: no bit of parameters or statistics differs after an evaluation."""
    editor = make_editor(llama, **TARGETS)
    before = copy_of(editor)
    trainer = make_trainer(editor, llama, many, eval_dataset=many, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert_identical(editor.state_dict(), before)
    assert all(parameter.grad is None for parameter in editor.parameters())
    again = trainer.evaluate()
    for name in METRICS:
        assert 0 <= metrics[f"eval_{name}"] <= 1
        assert metrics[f"eval_{name}"] == again[f"eval_{name}"]


@pytest.mark.parametrize("method", ["malmen", "rledit"])
def test_a_step_that_overflows_leaves_the_editor_as_it_was(
    many: list[Fact],
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
    method: str,
) -> None:
    """An edit too large for float16 ends training where it happens: no bit of the editor moves, nothing is saved."""
    model = make_llama(torch.float16)
    editor = make_editor(model, method=method, edit_lr=1e4, n_preserved_keys=4, **TARGETS).float()
    before = copy_of(editor)
    trainer = make_trainer(editor, model, many, per_device_train_batch_size=4, max_steps=2, save_steps=1)
    with pytest.raises(NumericalError, match=r"^Step 1: .*model\.layers\.\d.*torch\.float16: load it in bfloat16"):
        trainer.train()
    assert_identical(editor.state_dict(), before)
    assert not list(tmp_path.glob("run/checkpoint-*"))


# Evaluation


def test_evaluation_in_training_is_logged(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """With `eval_strategy="steps"` all metrics come at their steps, those of the last step from the trained editor."""
    editor = make_editor(llama, seed=None, **TARGETS)
    trainer = make_trainer(
        editor, llama, many, eval_dataset=many[:5], per_device_train_batch_size=4, per_device_eval_batch_size=5,
        max_steps=4, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_edit_success" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    expected = editor.evaluate(llama, many[:5], trainer.tokenize.tokenizer)
    for name in (*METRICS, *(f"{metric}_before" for metric in METRICS)):
        assert all(f"eval_{name}" in entry for entry in entries)
        assert entries[-1][f"eval_{name}"] == pytest.approx(expected[name], abs=1e-9)


def test_evaluation_averages_over_the_facts_that_are_measured(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """A fact without rephrases or unrelated prompt counts neither for nor against what it cannot show."""
    editor = make_editor(llama, **TARGETS)
    bare = [replace(fact, rephrases=(), unrelated_prompt=None, unrelated_answer=None) for fact in many[:4]]
    trainer = make_trainer(editor, llama, many, per_device_eval_batch_size=1)
    tokenizer = trainer.tokenize.tokenizer
    mixed = [bare[0], many[4], bare[1], bare[2], many[5], many[6], bare[3]]
    metrics = trainer.evaluate(mixed)
    for name in METRICS:
        scores = [editor.evaluate(llama, [fact], tokenizer) for fact in mixed]
        shown = [score[name] for score in scores if name in score]
        assert len(shown) == (7 if name == "edit_success" else 3)
        assert metrics[f"eval_{name}"] == pytest.approx(sum(shown) / len(shown), abs=1e-9)


def test_evaluation_of_several_data_sets(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Each by its name, in training and by hand, with the scores it has alone."""
    rows = datasets.Dataset.from_list([fact.to_dict() for fact in many])
    sets = datasets.DatasetDict(old=rows.select(range(3)), new=rows.select(range(3, 8)))
    trainer = make_trainer(
        make_editor(llama, **TARGETS), llama, many, eval_dataset=sets, per_device_train_batch_size=4, max_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_steps=1,
        metric_for_best_model="new_locality",
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate({"old": many[:3]}, metric_key_prefix="test")
    for name in METRICS:
        (old,), (new,) = logged(trainer, f"eval_old_{name}"), logged(trainer, f"eval_new_{name}")
        assert found[f"test_old_{name}"] == trainer.evaluate(many[:3])[f"eval_{name}"] == old
        assert trainer.evaluate(many[3:])[f"eval_{name}"] == new
    assert trainer.state.best_metric == logged(trainer, "eval_new_locality")[0]


@pytest.mark.parametrize("settings", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_metric_that_says_which_is_best(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    settings: dict[str, Any],
) -> None:
    """Generalization where none is named; one that the facts do not give is refused before training."""
    editor = make_editor(llama, **TARGETS)
    settings = settings | {"per_device_train_batch_size": 4, "max_steps": 1, "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(editor, llama, many, eval_dataset=many, **settings)
    trainer.train()
    assert trainer.args.greater_is_better
    assert trainer.state.best_metric == logged(trainer, "eval_generalization")[0]
    bare = [replace(fact, rephrases=()) for fact in many]
    with pytest.raises(ValueError, match=r"is 'generalization'; .* gives edit_success, locality, unrelated_accuracy\."):
        make_trainer(editor, llama, many, eval_dataset=bare, **settings)
    for name in ("loss", "eval_generalisation", "a_locality"):
        with pytest.raises(ValueError, match=rf"is '{name}'; .*edit_success"):
            make_trainer(editor, llama, many, eval_dataset=many, metric_for_best_model=name, **settings)


def test_evaluation_without_facts_is_an_error(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """`evaluate` says what it is missing."""
    trainer = make_trainer(make_editor(llama, **TARGETS), llama, many)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


# Saving and resuming


def test_saved_editor_comes_back_bit_for_bit(
    many: list[Fact],
    tokenizer: PreTrainedTokenizerFast,
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
) -> None:
    """`save_model` -> `from_pretrained` keeps every bit, the float64 statistics too, and every layer its own row.

    Twelve blocks, so that the order in which the model runs its layers is not that of their sorted names.
    """
    model = make_llama(n_layers=12)
    editor = make_editor(model, target_modules=["down_proj"], layers_to_transform=[2, 9, 10, 11], n_preserved_keys=3)
    trainer = make_trainer(editor, model, many, per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "editor"))
    expected = editor.make_edit(model, many, tokenizer).shifts
    for load in (EditorModel.from_pretrained, AutoModel.from_pretrained):
        loaded = load(tmp_path / "editor")
        assert isinstance(loaded, EditorModel)
        assert_identical(loaded.state_dict(), editor.state_dict())
        assert loaded.module_names == editor.module_names
        assert loaded.networks["48x32"].get_buffer("statistics.mean").dtype == torch.float64
        shifts = loaded.make_edit(model, many, tokenizer).shifts
        assert_identical(shifts, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_editor_loaded_in_half_precision_keeps_its_statistics(
    llama: PreTrainedModel, make_editor: Callable[..., EditorModel], tmp_path: Path, dtype: torch.dtype
) -> None:
    """`from_pretrained(dtype=...)` casts the parameters; the statistics stay as they were saved."""
    editor = make_editor(llama, **TARGETS)
    editor.save_pretrained(tmp_path)
    loaded = EditorModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for shape, network in editor.networks.items():
        for name, buffer in network.get_submodule("statistics").named_buffers():
            found = loaded.networks[shape].get_submodule("statistics").get_buffer(name)
            assert found.dtype == torch.float64
            assert torch.equal(found, buffer)


@pytest.mark.parametrize("lost", ["preserved_keys", "log_ridge", "statistics.mean", "blocks.0.bias"])
def test_incomplete_checkpoint_resets_nothing_that_it_holds(
    llama: PreTrainedModel, make_editor: Callable[..., EditorModel], tmp_path: Path, lost: str
) -> None:
    """A tensor that a checkpoint lacks, as one of an older release may, is initial; all others are as saved."""
    editor = make_editor(llama, **TARGETS)
    editor.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(path).items() if lost not in key}, path, metadata={"format": "pt"}
    )
    found = EditorModel.from_pretrained(tmp_path).state_dict()
    kept = {name: value for name, value in editor.state_dict().items() if lost not in name}
    assert len(kept) == len(found) - 2
    assert_identical({name: found[name] for name in kept}, kept)
    initial = make_editor(llama, seed=None, **TARGETS).state_dict()
    for name in found.keys() - kept.keys():
        torch.testing.assert_close(found[name], initial[name])


class StopAt(TrainerCallback):
    """Ends training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop when the step is reached."""
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("half", [3, 4])
def test_resumed_run_ends_where_an_uninterrupted_one_does(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
    half: int,
    on_disk: bool,
) -> None:
    """Stopped within an epoch or at its end, and resumed in a new trainer: the same weights, bit for bit.

    Also where what the frozen model computed is kept on disk, and nothing of it in memory.
    """

    def trainer_for(folder: str, **arguments: Any) -> EditorTrainer:
        if on_disk:
            arguments |= {"trunk_cache_dir": str(tmp_path / f"features of {folder}"), "trunk_cache_gib": 0.0}
        return make_trainer(
            make_editor(llama, seed=None, n_preserved_keys=4, **TARGETS), llama, many, output_dir=tmp_path / folder,
            per_device_train_batch_size=2, num_train_epochs=2, save_strategy="steps", save_steps=half, logging_steps=1,
            lr_scheduler_type="linear", **arguments,
        )  # fmt: skip

    whole = trainer_for("whole")
    whole.train()
    assert whole.state.global_step == 8

    stopped = trainer_for("stopped", callbacks=[StopAt(half)])
    stopped.train()
    assert stopped.state.global_step == half
    assert any(
        not torch.equal(a, b) for a, b in zip(stopped.editor.parameters(), whole.editor.parameters(), strict=True)
    )
    resumed = trainer_for("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert_identical(resumed.editor.state_dict(), whole.editor.state_dict())
    for key in ("loss", "generalization_loss", "locality_loss", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)


def test_a_run_that_has_ended_is_not_gone_on_with(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
) -> None:
    """Resumed within an epoch with all its steps taken, it is loaded as it was saved."""

    def trainer() -> EditorTrainer:
        return make_trainer(
            make_editor(llama, seed=None, **TARGETS), llama, many, output_dir=tmp_path,
            per_device_train_batch_size=2, max_steps=1, save_strategy="steps", save_steps=1,
        )  # fmt: skip

    ended, resumed = trainer(), trainer()
    ended.train()
    assert resumed.train(resume_from_checkpoint=True).global_step == 1
    assert_identical(resumed.editor.state_dict(), ended.editor.state_dict())


@pytest.mark.parametrize(
    ("field", "there", "here"),
    [
        ("method", "malmen", "mend"),
        ("target_modules", ["down_proj"], ["up_proj"]),
        ("layers_to_transform", [2, 3], [0, 1]),
        ("rank", 4, 8),
        ("n_blocks", 2, 1),
        ("n_preserved_keys", 0, 3),
        ("token_selection", None, "all"),
        ("prompt_template", None, "Q: {prompt}"),
    ],
)
def test_a_checkpoint_of_another_editor_is_not_gone_on_from(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    field: str,
    there: Any,
    here: Any,
) -> None:
    """Parameters of the same names and shapes may mean another thing. Nothing is trained or changed."""
    run: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
    settings = {"target_modules": ["down_proj"], "layers_to_transform": [2, 3]}
    make_trainer(make_editor(llama, seed=None, **settings | {field: there}), llama, many, **run).train()
    editor = make_editor(llama, seed=None, **settings | {field: here})
    before = copy_of(editor)
    trainer = make_trainer(editor, llama, many, **run | {"max_steps": 2})
    name = "target_modules" if field == "layers_to_transform" else field
    with pytest.raises(
        ModelMismatchError, match=rf"checkpoint-1 was trained with {name} .*, and this .*expected the same"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0
    assert_identical(editor.state_dict(), before)


@pytest.mark.parametrize("policy", ["warn", "error", "ignore"])
def test_a_run_goes_on_with_the_base_model_it_began_with(
    make_llama: Callable[..., PreTrainedModel],
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    policy: str,
) -> None:
    """Where the weights of the base model differ, the editor's policy says what is done."""
    run: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
    model = make_llama()
    make_trainer(make_editor(model, seed=None, **TARGETS), model, many, **run).train()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    editor = make_editor(model, seed=None, fingerprint_policy=policy, **TARGETS)
    trainer = make_trainer(editor, model, many, **run | {"max_steps": 2})
    message = "checkpoint-1 was made for a base model whose target weights differ .* that the run began with, or start"
    if policy == "error":
        with pytest.raises(ModelMismatchError, match=message):
            trainer.train(resume_from_checkpoint=True)
        return
    with pytest.warns(FingerprintWarning, match=message) if policy == "warn" else nullcontext():
        assert trainer.train(resume_from_checkpoint=True).global_step == 2


def test_a_run_in_half_precision_goes_on_where_the_base_models_folder_is_not_found(
    make_llama: Callable[..., PreTrainedModel],
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
) -> None:
    """Of a float16 model the checkpoint names the weights as stored; without the folder, those as rounded are known."""
    run: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
    make_llama().save_pretrained(tmp_path / "base")
    moved, found = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16) for _ in range(2))
    moved.name_or_path = ""
    rounded = make_editor(moved, seed=None, fingerprint_policy="error", **TARGETS)
    make_trainer(rounded, moved, many, **run).train()
    editor = make_editor(found, seed=None, fingerprint_policy="error", **TARGETS)
    assert editor.config.base_model_fingerprint != rounded.config.base_model_fingerprint
    trainer = make_trainer(editor, found, many, **run | {"max_steps": 2})
    assert trainer.train(resume_from_checkpoint=True).global_step == 2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_sequence_is_an_optimizer_step(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stop: int,
) -> None:
    """RLEdit's sets follow on each other within a step, a short last one of an epoch too, and never beyond it.

    A run that is stopped after a step, within an epoch or at its end, resumes to the same bits.
    """
    measured: list[tuple[bool, float]] = []
    measure = EditorTrainer._meta_loss

    def record(self: EditorTrainer, before: Any, after: Any, *rest: Any) -> tuple[float, float]:
        measured.append((bool(before), rest[-1]))
        return measure(self, before, after, *rest)

    monkeypatch.setattr(EditorTrainer, "_meta_loss", record)

    def trainer_for(folder: str, **arguments: Any) -> EditorTrainer:
        editor = make_editor(llama, seed=None, method="rledit", **TARGETS)
        return make_trainer(
            editor, llama, many, output_dir=tmp_path / folder, per_device_train_batch_size=2, num_train_epochs=2,
            gradient_accumulation_steps=3, look_back=2, save_strategy="steps", save_steps=stop, logging_steps=1,
            **arguments,
        )  # fmt: skip

    whole = trainer_for("whole")
    assert (whole.args.shift_penalty, whole.args.locality_weight) == (1e-4, 0.6)
    whole.train()
    assert whole.state.global_step == 4
    later = [(True, 1.0), (True, 0.95)]
    assert measured == [(False, 1.0), *later, *later, (False, 1.0)] * 2  # three sets, one set
    trainer_for("stopped", callbacks=[StopAt(stop)]).train()
    resumed = trainer_for("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_identical(resumed.editor.state_dict(), whole.editor.state_dict())
    for key in ("loss", "generalization_loss", "locality_loss", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_step_leaves_nothing_to_the_next(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
    again: bool,
) -> None:
    """Ctrl-C between the sets of a sequence, or a lack of memory there: the next run or try begins with its first set.

    So do the losses of its logs.
    """
    befores: list[bool] = []
    edit = EditorTrainer._edit

    def fail_once(self: EditorTrainer, facts: Any, before: Any, *questions: Any) -> Any:
        befores.append(bool(before))
        if len(befores) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.") if again else KeyboardInterrupt
        return edit(self, facts, before, *questions)

    monkeypatch.setattr(EditorTrainer, "_edit", fail_once)
    trainer = make_trainer(
        make_editor(llama, seed=None, method="rledit", **TARGETS), llama, many, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=2, auto_find_batch_size=again, logging_steps=1,
    )  # fmt: skip
    n_averaged: list[int] = []
    log = EditorTrainer.log

    def count(self: EditorTrainer, logs: dict[str, float], *rest: Any) -> None:
        if "loss" in logs:
            n_averaged.append(len(self._losses))
        log(self, logs, *rest)

    monkeypatch.setattr(EditorTrainer, "log", count)
    if again:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
    assert befores == [False, True] + [False, True] * 2
    assert n_averaged == [2, 2]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_base_that_was_edited_between_two_runs_is_read_anew(
    llama: PreTrainedModel,
    many: list[Fact],
    tokenizer: PreTrainedTokenizerFast,
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
    on_disk: bool,
) -> None:
    """What was computed of it before, in memory or on disk, is not taken for that of the model as it is now."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "optim": "sgd", "logging_steps": 1}
    settings |= {"save_strategy": "no"}  # which would empty the memory
    kept = {"trunk_cache_dir": str(tmp_path / "features")} if on_disk else {}
    editor = make_editor(llama, seed=None, **TARGETS)
    trainer = make_trainer(editor, llama, many, **settings, **kept)
    trainer.train()
    make_editor(llama, seed=3, edit_lr=1.0, **TARGETS).apply(llama, many, tokenizer)
    fresh = make_trainer(deepcopy(editor), llama, many, **settings)
    fresh.train()
    trainer.train()
    assert logged(trainer, "loss") == logged(fresh, "loss")
    assert_identical(editor.state_dict(), fresh.editor.state_dict())


def test_workers_are_as_the_arguments_say(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Spawned ones too, which everything that they need is pickled for."""
    trainer = make_trainer(
        make_editor(llama, **TARGETS), llama, many, dataloader_num_workers=2, dataloader_persistent_workers=True,
        dataloader_prefetch_factor=3, dataloader_multiprocessing_context="spawn",
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (2, True, 3)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    collate = pickle.loads(pickle.dumps(loader.collate_fn))
    assert collate(pickle.loads(pickle.dumps(many))) == {"facts": many}


def test_an_optimizer_of_ones_own(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """`Trainer`'s argument for one counts, and the scales keep their own learning rate."""
    arguments = EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[], scale_learning_rate=0.5)
    trainer = EditorTrainer(
        make_editor(llama, seed=None, **TARGETS), llama, arguments, many, processing_class=tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.25, "momentum": 0.5}),
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.25, 0.5), (0.5, 0.5)]


def test_an_optimizer_with_modes(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """A schedule-free one steps in training mode, and is evaluated in the other, as in `Trainer`."""
    modes: list[str] = []

    class WithModes(torch.optim.SGD):
        def train(self) -> None:
            modes.append("train")

        def eval(self) -> None:
            modes.append("eval")

    arguments = EditorTrainingArguments(
        output_dir=tmp_path, use_cpu=True, report_to=[], max_steps=2, eval_strategy="steps", eval_steps=1,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    trainer = EditorTrainer(
        make_editor(llama, seed=None, **TARGETS), llama, arguments, many, many[:2], tokenizer,
        optimizer_cls_and_kwargs=(WithModes, {"lr": 1e-3}),
    )  # fmt: skip
    trainer.train()
    assert modes == ["train", "eval"] * 2


def test_checkpoint_is_an_editor(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
) -> None:
    """What `Trainer` saves on the way loads like any other editor."""
    editor = make_editor(llama, seed=None, **TARGETS)
    trainer = make_trainer(editor, llama, many, per_device_train_batch_size=4, max_steps=2, save_steps=2)
    trainer.train()
    loaded = EditorModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_identical(loaded.state_dict(), editor.state_dict())
    assert loaded.is_trained


def test_tensorboard_gets_the_curves(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`report_to=["tensorboard"]` writes event files that hold what was logged."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(
        make_editor(llama, seed=None, **TARGETS), llama, many, report_to=["tensorboard"],
        per_device_train_batch_size=4, max_steps=2, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert files
    curves = EventAccumulator(str(files[0].parent)).Reload()
    for key in ("loss", "generalization_loss", "locality_loss", f"edit_lr/{trainer.editor.module_names[0]}"):
        values = [event.value for event in curves.Scalars(f"train/{key}")]
        assert values == pytest.approx(logged(trainer, key), rel=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("missing", "field"),
    [
        ({"rephrases": ()}, "rephrases"),
        ({"unrelated_prompt": None, "unrelated_answer": None}, "unrelated_prompt"),
        ({"unrelated_answer": None}, "unrelated"),
    ],
)
def test_training_facts_without_a_field(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    missing: dict[str, Any],
    field: str,
) -> None:
    """A training fact without what the meta loss needs is named before training starts."""
    facts = [*many[:3], replace(many[3], **missing), *many[4:]]
    with pytest.raises(FactError, match=rf"(?s)(?=.*{field})(?=.*[Ff]act 3)"):
        make_trainer(make_editor(llama, **TARGETS), llama, facts)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"prompt": "Lyon " * 80}, r"fact 7: .*takes \d+ tokens.*at most"),
        ({"rephrases": ("Lyon", "Lyon " * 80)}, r"fact 7: .*takes \d+ tokens.*at most"),
        ({"unrelated_answer": "Lyon " * 80}, r"fact 7: .*takes \d+ tokens.*at most"),
        ({"subject": None}, r"fact 7: .*has no subject"),
    ],
)
def test_a_fact_that_cannot_be_read_is_found_before_training(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    spoilt: dict[str, Any],
    message: str,
    held_out: bool,
) -> None:
    """All of its texts are looked at, not only when they are drawn."""
    facts = [*many[:7], replace(many[7], **spoilt)]
    editor = make_editor(llama, token_selection="subject", **TARGETS)
    with pytest.raises(FactError, match=message):
        make_trainer(editor, llama, many if held_out else facts, eval_dataset=facts if held_out else None)


def test_without_locality_no_unrelated_prompt_is_needed(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """`locality_weight=0` trains on rephrases alone, and takes facts as plain dicts."""
    rows = [{"prompt": fact.prompt, "target": fact.target, "rephrases": list(fact.rephrases)} for fact in many]
    editor = make_editor(llama, seed=None, **TARGETS)
    before = copy_of(editor)
    trainer = make_trainer(
        editor, llama, rows, locality_weight=0.0, per_device_train_batch_size=4, max_steps=2, logging_steps=1
    )
    trainer.train()
    assert logged(trainer, "locality_loss") == [0.0, 0.0]
    assert logged(trainer, "generalization_loss") == pytest.approx(logged(trainer, "loss"), rel=1e-3)
    assert any(not torch.equal(value, before[name]) for name, value in editor.named_parameters())


def test_editor_of_another_model_is_refused(
    llama: PreTrainedModel,
    many: list[Fact],
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Shapes that do not fit are found when the trainer is made."""
    editor = make_editor(make_llama(intermediate_size=40), **TARGETS)
    with pytest.raises(ModelMismatchError, match="down_proj"):
        make_trainer(editor, llama, many)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lm_batch_size", 0),
        ("editor_batch_size", -1),
        ("rephrases_per_fact", 0),
        ("locality_weight", -0.1),
        ("look_back", 0),
        ("look_back_decay", 1.5),
        ("shift_penalty", -1.0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("look_back", 1.5),
        ("lm_batch_size", "4"),
        ("lm_batch_size", True),
        ("locality_weight", "much"),
        ("locality_weight", float("nan")),
        ("trunk_cache_gib", float("inf")),
        ("learning_rate", "fast"),
        ("learning_rate", None),
        ("seed", "x"),
        ("seed", -1),
        ("max_steps", "x"),
        ("num_train_epochs", "1"),
        ("save_total_limit", 1.5),
        ("eval_steps", "often"),
        ("is_sequential", "no"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, name: str, value: Any) -> None:
    """A setting that cannot be is named with its value and what is expected."""
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; expected "):
        EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, **{name: value})


def test_numbers_of_all_kinds_are_taken(tmp_path: Path) -> None:
    """Also NumPy's, and None where a setting has a value of its own for it; a number in quotes is told from a text."""
    settings: dict[str, Any] = {"seed": np.int64(3), "learning_rate": np.float32(0.5), "locality_weight": 1}
    settings |= {"look_back": None, "data_seed": None, "eval_steps": None, "max_steps": -1, "max_grad_norm": np.inf}
    found = EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, **settings)
    assert {name: getattr(found, name) for name in settings} == settings
    with pytest.raises(
        ValueError, match=r"'2e-4'; expected a finite number of at least 0\. Remove the quotes around it\."
    ):
        EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, learning_rate="2e-4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("label_smoothing_factor", 0.1, "targets as they are"),
        ("neftune_noise_alpha", 5.0, "not trained"),
        ("gradient_checkpointing", True, "lower lm_batch_size"),
        ("deepspeed", "nothere.json", r"fsdp\.yaml"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path: Path, name: str, value: Any, remedy: str) -> None:
    """They are of a model that answers by itself."""
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; expected none: .*{remedy}.* Leave it out\."):
        EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, **{name: value})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("by_accelerate", [False, True])
def test_mixed_precision_is_refused(
    tmp_path: Path, precision: str, by_accelerate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's dtype is the precision, whichever way another one is asked for."""
    if by_accelerate:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    asked = {} if by_accelerate else {precision: True}
    named = f"ACCELERATE_MIXED_PRECISION.*{precision}" if by_accelerate else f"{precision} is True"
    with pytest.raises(ValueError, match=rf"{named}.*dtype.*float32.*Leave the setting out"):
        EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, **asked)


def test_what_an_editor_has_no_use_for_is_refused(
    llama: PreTrainedModel,
    many: list[Fact],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Rather than taken and ignored, or left to fail somewhere in `Trainer`."""
    editor = make_editor(llama, **TARGETS)
    arguments = EditorTrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    for name, reason in {
        "compute_metrics": "would be ignored",
        "compute_loss_func": "would be ignored",
        "preprocess_logits_for_metrics": "would be ignored",
        "data_collator": "by the trainer itself",
        "model_init": "Make an editor and a trainer for each run",
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: .*{reason}"):
            EditorTrainer(editor, llama, arguments, many, processing_class=tokenizer, **{name: print})
        EditorTrainer(editor, llama, arguments, many, processing_class=tokenizer, **{name: None})
    with pytest.raises(ValueError, match=r"train_sampling_strategy is 'group_by_length'; allowed: 'random'"):
        make_trainer(editor, llama, many, train_sampling_strategy="group_by_length")
    trainer = make_trainer(editor, llama, None)
    with pytest.raises(ValueError, match="pass train_dataset"):
        trainer.train()
    with pytest.raises(NotImplementedError, match=r"EditorTrainer\.evaluate"):
        trainer.predict(many)
    with pytest.raises(NotImplementedError, match="Make an editor and a trainer for each trial"):
        trainer.hyperparameter_search()


def test_sharding_the_editor_is_refused(
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    facts: list[Fact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parameters are read outside of a forward pass, where a shard is all there would be."""
    model = make_llama()
    real = EditorTrainer.create_accelerator_and_postprocess

    def sharded(self: EditorTrainer) -> None:
        real(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(EditorTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=r"DeepSpeed would shard it.*fsdp\.yaml"):
        make_trainer(make_editor(model, seed=None), model, facts)
