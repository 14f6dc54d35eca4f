"""python benchmarks/gpu_check.py

Whether a GPU does what the CPU does: a tiny model with random weights is edited by every method on both, in float32,
and the weight shifts are compared. Trained methods train three steps on either first. On the GPU also: a solve in
groups of layers, whose traces wait in the host's memory; facts traced in bfloat16, whose rows the editor's networks
make in TF32, beside the same in float32; an edit that is applied, measured and undone. Ends with an error where
something differs by more than rounding. No network.
"""

import argparse
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from synthetic import build_model, build_tokenizer, config_of, facts
from torch import Tensor
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import hf_malmen.networks
from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, load_facts
from hf_malmen.configuration import METHODS
from hf_malmen.least_squares import state_bytes
from hf_malmen.tables import table

N_FACTS, N_TOKENS, N_STEPS = 64, 12, 3
# Of ‖S‖. What is sought by many steps of descent, a target or the editor itself, grows what rounding leaves.
TOLERANCE, TOLERANCE_OF_STEPS = 1e-4, 2e-2
TOLERANCE_OF_TF32 = 5e-3  # 10 bits of each factor


def differ(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ‖S − S'‖ / ‖S'‖ of all layers."""
    return max(((found[name] - shift).norm() / shift.norm()).item() for name, shift in expected.items())


def trained(editor: EditorModel, model: Any, tokenizer: Any, device: str) -> list[float]:
    """Train an editor in place; the losses of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = EditorTrainingArguments(
            output_dir=folder,
            max_steps=N_STEPS,
            per_device_train_batch_size=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        trainer = EditorTrainer(editor, model, arguments, load_facts(list(facts(64, N_TOKENS))), None, tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check(method: str, device: str) -> list[list[str]]:
    """Rows of the report: what was compared, by how much it differs, and what is allowed."""
    tokenizer = build_tokenizer()
    models = {place: build_model(config_of("llama-3-8b", tiny=True), torch.float32, "cpu") for place in ("cpu", device)}
    models[device].to(device)
    rows: list[list[str]] = []

    def add(what: str, difference: float, allowed: float) -> None:
        rows.append([method, what, f"{difference:.1e}", f"{allowed:.0e}", "yes" if difference <= allowed else "NO"])

    settings: dict[str, Any] = {"edit_lr": 1e-2} if METHODS[method].maker == "rows" else {}
    if METHODS[method].is_trained:
        settings |= {"rank": 16, "n_blocks": 2}
        keeps_keys = METHODS[method].maker == "rows" and METHODS[method].aggregation == "least_squares"
        settings |= {"n_preserved_keys": 8} if keeps_keys else {}
    editor = EditorModel.from_base(models["cpu"], EditorConfig(method=method, **settings))
    if METHODS[method].maker == "memit":
        editor.collect_covariance(models["cpu"], [fact["prompt"] for fact in facts(200, 32)], tokenizer)
    chosen = load_facts(list(facts(N_FACTS, N_TOKENS)))
    if METHODS[method].is_trained:
        other = deepcopy(editor)
        losses = trained(editor, models["cpu"], tokenizer, "cpu")
        on_gpu = trained(other.to(device), models[device], tokenizer, device)
        add("losses of training", max(abs(a - b) / abs(b) for a, b in zip(on_gpu, losses, strict=True)), 1e-3)
        shifts = [one.make_edit(models["cpu"], chosen, tokenizer).shifts for one in (other.to("cpu"), editor)]
        add("edits after training", differ(*shifts), TOLERANCE_OF_STEPS)
    expected = editor.make_edit(models["cpu"], chosen, tokenizer)
    editor.to(device)
    edit = editor.make_edit(models[device], chosen, tokenizer)
    add(
        "edit",
        differ(edit.shifts, expected.shifts),
        TOLERANCE if METHODS[method].maker == "rows" else TOLERANCE_OF_STEPS,
    )
    if METHODS[method].maker == "rows":
        sizes = [editor.config.shape_of(name) for name in editor.module_names]
        n_rows = N_FACTS * N_TOKENS + (editor.config.n_preserved_keys or 0)
        limit = max(state_bytes(editor.config.aggregation, size, n_rows) for size in sizes)
        in_groups = editor.make_edit(models[device], chosen, tokenizer, max_memory=2 * limit)
        add("solved in groups", differ(in_groups.shifts, edit.shifts), 1e-5)
        half = deepcopy(models[device]).to(torch.bfloat16)
        coarse = editor.make_edit(half, chosen, tokenizer).shifts
        with patch.object(hf_malmen.networks, "_products_like", lambda _: nullcontext()):
            exact = editor.make_edit(half, chosen, tokenizer).shifts
        add("TF32", differ(coarse, exact), TOLERANCE_OF_TF32)
    before = {name: weight.clone() for name, weight in models[device].state_dict().items()}
    in_turns = editor.apply(models[device], chosen[:32], tokenizer, facts_per_turn=16)
    scores = editor.evaluate(models[device], chosen[32:48], tokenizer)
    assert all(0 <= value <= 1 for value in scores.values()), scores
    in_turns.undo()
    after = models[device].state_dict()
    add("undone", float(not all(torch.equal(after[name], weight) for name, weight in before.items())), 0.0)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="what to compare with the CPU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to check")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)
    rows = [row for method in options.methods for row in check(method, options.device)]
    print(table(["method", "what", "differs by", "allowed", "within"], rows))
    if any(row[-1] == "NO" for row in rows):
        raise SystemExit("The two devices differ.")


if __name__ == "__main__":
    main()
