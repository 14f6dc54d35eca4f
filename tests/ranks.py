"""What the tests of several processes run on each of them, and here on one: `python ranks.py NAME FOLDER` a process."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

if __name__ == "__main__":  # a process of its own; among the tests, the package is known
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_malmen.memory
from hf_malmen import (
    EditorModel,
    EditorTrainer,
    EditorTrainingArguments,
    Fact,
    FactError,
    FactStream,
    NumericalError,
    OtherProcessError,
)
from hf_malmen.distributed import join, n_processes, process_index
from hf_malmen.least_squares import state_bytes
from hf_malmen.sharding import whole
from tests.conftest import build_editor, build_llama, build_long_facts, build_tokenizer

# Accelerate leaves DeepSpeed out where it is told to use the CPU. Where it is not, it must be told to use gloo.
ZERO3 = "ACCELERATE_USE_DEEPSPEED" in os.environ
TARGETS = {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [2, 3]}
LOGGED = ("loss", "generalization_loss", "locality_loss", "grad_norm")
# Name: configuration of the editor, and the numbers of facts in the sets that are edited one after another. With three
# processes a set of two or one leaves processes without facts; a set of fourteen has more tokens than features.
STEPS: dict[str, tuple[torch.dtype, dict[str, Any], list[int]]] = {
    "malmen": (torch.float32, {}, [8, 2, 14, 1]),
    "malmen in float64": (torch.float64, {}, [14, 3]),
    "preserve": (torch.float32, {"n_preserved_keys": 12}, [5, 14, 2, 1]),
    "preserve in float64": (torch.float64, {"n_preserved_keys": 12}, [2, 14, 3]),
    "mend": (torch.float32, {"method": "mend"}, [1, 2, 7]),
    "rledit": (torch.float64, {"method": "rledit"}, [4, 1]),
    "malmit": (torch.float32, {"method": "malmit", "n_steps": 2, "edit_lr": 0.5, "ridge": 1.0}, [7, 1, 4]),
}


def trainer_for(editor: EditorModel, model: Any, folder: str | Path, **arguments: Any) -> EditorTrainer:
    """A trainer on the CPU that reports nowhere."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not ZERO3,
        "ddp_backend": "gloo" if ZERO3 else None,
        "report_to": [],
        "disable_tqdm": True,
    }
    settings |= {"rephrases_per_fact": 2, "locality_weight": 0.7, "lm_batch_size": 3, "editor_batch_size": 11}
    facts: list[Fact] = arguments.pop("facts", None) or build_long_facts(7)
    return EditorTrainer(
        editor,
        model,
        EditorTrainingArguments(**settings | arguments),
        train_dataset=facts,
        processing_class=build_tokenizer(),
    )


def steps(folder: str | Path) -> dict[str, Any]:
    """Training steps over sets of facts, two accumulated into every gradient: losses, gradients, what editors keep."""
    found: dict[str, Any] = {}
    for name, (dtype, config, sizes) in STEPS.items():
        model = build_llama(dtype)
        editor = build_editor(model, **TARGETS, **config)
        trainer = trainer_for(editor, model, folder)
        trainer.current_gradient_accumulation_steps = 2
        facts = build_long_facts(sum(sizes))
        for i, size in enumerate(sizes):
            chosen, facts = facts[:size], facts[size:]
            loss = trainer.training_step(trainer.model, {"facts": chosen})
            found[f"{name} {i}"] = {
                "loss": loss.item(),
                "parts": torch.tensor(trainer._losses[-1]),
                "gradients": {
                    key: value.grad.clone() for key, value in editor.named_parameters() if value.grad is not None
                },
                "buffers": {key: value.clone() for key, value in editor.named_buffers()},
            }
            if i % 2:
                editor.zero_grad()
    found["failure"] = failed_step(folder)
    return found


def failed_step(folder: str | Path) -> str:
    """What is said of a step in which the gradient of one process's part of the loss is not finite."""
    model = build_llama()
    editor = build_editor(model, **TARGETS)
    trainer = trainer_for(editor, model, folder)
    trainer.current_gradient_accumulation_steps = 1
    plain = trainer._edit

    def broken(*arguments: Any) -> Any:
        edited = plain(*arguments)
        if process_index() == n_processes() - 1:
            edited.leaves[editor.module_names[0]].register_hook(lambda gradient: gradient * torch.inf)
        return edited

    trainer._edit = broken  # type: ignore[method-assign]
    before = {key: value.clone() for key, value in editor.state_dict().items()}
    with pytest.raises(NumericalError) as failure:
        trainer.training_step(trainer.model, {"facts": build_long_facts(6)})
    assert all(parameter.grad is None for parameter in editor.parameters())
    assert all(torch.equal(value, before[key]) for key, value in editor.state_dict().items())
    return str(failure.value)


# Name: configuration of the editor, and arguments of `make_edit`.
EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows": ({}, {}),
    "products": ({"token_selection": "all"}, {}),
    "in groups": ({"token_selection": "all", "n_preserved_keys": 5}, {"max_memory": 200_000}),
    "sum": ({"method": "mend"}, {}),
    "following": ({"method": "ultraedit", "rank": 0}, {}),
}


def edit_and_measure(folder: str | Path) -> dict[str, Any]:
    """Edits of facts in a list and in a stream, what they score, and an edit of a checkpoint on disk."""
    folder = Path(folder)
    model, tokenizer, facts = build_llama(), build_tokenizer(), build_long_facts(7)
    found: dict[str, Any] = {}
    for name, (config, arguments) in EDITS.items():
        editor = build_editor(model, **TARGETS, **config)
        for source in (facts, FactStream(str(folder / "facts.jsonl")), facts[:1]):
            edit = editor.make_edit(model, source, tokenizer, batch_size=2, **arguments)
            key = f"{name}, {type(source).__name__} of {edit.n_facts}"
            found[key] = {"shifts": dict(edit.shifts), "facts": [fact.prompt for fact in edit.facts]}
    for name in ("rows", "products", "sum"):  # in two calls, the second of which replaces a fact of the first
        editor = build_editor(model, edit_lr=0.1, **TARGETS, **EDITS[name][0])
        parts = (facts[:4], [*facts[4:], replace(facts[1], target=facts[2].target)])
        traced: list[int] = []

        def recording(
            model: Any, batches: Any, trace: Any = editor.trace, traced: list[int] = traced, **options: Any
        ) -> Any:
            batches = list(batches)
            traced += (len(batch.input_ids) for batch in batches)
            return trace(model, batches, **options)

        editor.trace = recording  # type: ignore[method-assign]
        edits = [editor.apply(model, part, tokenizer, batch_size=2, accumulate=True) for part in parts]
        found[f"traced {name}"] = sum(traced)
        weights = {module: model.get_submodule(module).weight.detach().clone() for module in editor.module_names}
        found[f"accumulated {name}"] = {"shifts": weights, "facts": [len(edit.facts) for edit in edits]}
        for edit in reversed(edits):
            edit.undo()
    editor = build_editor(model, **TARGETS, **EDITS["following"][0])
    measured = editor.measure(model, facts, tokenizer, batch_size=3, generate=True, probabilities=True)
    found["scores"], found["per_fact"] = measured.scores, measured.per_fact.to_list()
    editor = build_editor(model, edit_lr=0.1, **TARGETS)
    output = folder / f"edited-{n_processes()}"
    edit = editor.apply(str(folder / "base"), facts, output_dir=output, facts_per_turn=3, measure=True)
    found["measured"] = edit.measured
    with pytest.raises(FactError if process_index() == 1 or n_processes() == 1 else OtherProcessError) as failure:
        # The second fact, which is the second process's, is longer than the model reads.
        editor.make_edit(model, [facts[0], replace(facts[1], prompt="word " * 200), *facts[2:]], tokenizer)
    found["failure"] = str(failure.value)
    found["edit after a failure"] = dict(editor.make_edit(model, facts, tokenizer).shifts)
    return found


def train(folder: Path, resume_from: Path | None = None) -> dict[str, Any]:
    """Two epochs over seven facts, four of them edited together, whatever the number of processes."""
    model = build_llama(torch.float64)
    editor = build_editor(model, seed=None, n_preserved_keys=6, **TARGETS)
    trainer = trainer_for(
        editor, model, folder, facts=build_long_facts(7), per_device_train_batch_size=4 // n_processes(),
        num_train_epochs=2, save_steps=1, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="linear",
    )  # fmt: skip
    sets: list[list[str]] = []
    plain = trainer.training_step

    def record(model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        sets.append([fact.prompt for fact in inputs["facts"]])
        return plain(model, inputs, *rest)

    trainer.training_step = record  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    losses = [[entry[key] for key in LOGGED] for entry in trainer.state.log_history if "loss" in entry]
    return {"state": editor.state_dict(), "sets": sets, "losses": torch.tensor(losses, dtype=torch.float64)}


def train_and_resume(folder: str | Path) -> dict[str, Any]:
    """A run of this many processes, and one that goes on from the first step of the run of one process in `one`."""
    folder = Path(folder)
    return {
        "whole": train(folder / "several"),
        "resumed": train(folder / "resumed", resume_from=folder / "one" / "checkpoint-1"),
    }


def with_sharded_base(folder: str | Path) -> dict[str, Any]:
    """Training, scores, and edits of a live model and on disk; the base is sharded where it is asked for."""
    folder = Path(folder)
    tokenizer, facts = build_tokenizer(), build_long_facts(6)
    model = build_llama()
    editor = build_editor(model, n_preserved_keys=5, **TARGETS)
    trainer = trainer_for(editor, model, folder, max_steps=2, per_device_train_batch_size=6 // n_devices(), facts=facts)
    sharded = {name for name, value in model.named_parameters() if isinstance(value, DTensor) or is_cut_up(value)}
    trainer.train()
    found: dict[str, Any] = {"sharded": sharded, "trained": {k: v.clone() for k, v in editor.state_dict().items()}}
    found["scores"] = editor.evaluate(model, facts, tokenizer, batch_size=4, generate=True)
    weights = {name: whole(value).detach().clone() for name, value in model.named_parameters()}
    edit = editor.apply(model, facts, tokenizer)
    found["edited"] = {name: whole(value).detach().clone() for name, value in model.named_parameters()}
    edit.undo()
    assert all(torch.equal(whole(value).detach(), weights[name]) for name, value in model.named_parameters())
    # A layer at a time, by processes of which one has no room to keep traces.
    limit = max(state_bytes("least_squares", editor.config.shape_of(name), 100) for name in editor.module_names)
    share, hf_malmen.memory._SHARE_OF_DISK = hf_malmen.memory._SHARE_OF_DISK, float(os.environ.get("RANK") != "1")
    in_groups = editor.make_edit(model, facts, tokenizer, max_memory=limit)
    hf_malmen.memory._SHARE_OF_DISK = share
    for name, shift in edit.shifts.items():
        assert (in_groups.shifts[name] - shift).norm() < 1e-5 * shift.norm()
    edits = [editor.apply(model, part, tokenizer, accumulate=True) for part in (facts[:2], facts[2:])]
    found["accumulated"] = {name: whole(value).detach().clone() for name, value in model.named_parameters()}
    edits[0].undo()  # the weights are found again, and the second written anew
    found["without the first"] = {name: whole(value).detach().clone() for name, value in model.named_parameters()}
    edits[1].undo()
    assert all(torch.equal(whole(value).detach(), weights[name]) for name, value in model.named_parameters())
    editor.apply(str(folder / "base"), facts, output_dir=folder / f"sharded-{n_devices()}")
    return found


def is_cut_up(weight: Any) -> bool:
    """Whether this process has a part of a weight only, by ZeRO-3."""
    return hasattr(weight, "ds_tensor") and weight.ds_tensor.numel() < weight.ds_numel and not weight.numel()


def n_devices() -> int:
    """How many processes there are, whether they share the work or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


RUNS = {
    "steps": steps,
    "edit_and_measure": edit_and_measure,
    "train_and_resume": train_and_resume,
    "with_sharded_base": with_sharded_base,
}


def run(name: str, n: int, folder: Path, variables: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """What `RUNS[name]` returns on each of `n` processes that are joined over gloo; with variables of environment."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment |= variables or {}
        arguments = [sys.executable, __file__, name, str(folder)]
        processes.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(n)]


if __name__ == "__main__":
    if ZERO3:
        PartialState(backend="gloo")
    join()
    result = RUNS[sys.argv[1]](sys.argv[2]) | {"n_processes": n_processes()}
    torch.save(result, Path(sys.argv[2]) / f"{sys.argv[1]}-{os.environ['RANK']}.pt")
