"""python benchmarks/against_original.py --repo MALMEN --model FOLDER --facts FACTS.jsonl

Trains the original MALMEN code and ours on the same facts in the same order, each in a process of its own: seconds a
step in the first epoch and later, memory, and edit success, generalization and locality on held-out facts after equal
steps and after equal time. Needs `pip install -e '.[bench]'` and a checkout of the original, of which nothing is
changed or copied: what it needs to run on a decoder is put around it here.

Both edit `--n-facts` facts at once in the `down_proj` of the last `--n-layers` blocks, with two blocks of `--rank`.
The original runs in float32, as it was published, and ours in `--dtype`. Its learning rates are its own: η starts at
1e-6 and learns with 1e-5, unless `--original-edit-lr` and `--original-meta-lr` say otherwise. After every epoch both
run over the same facts again, each with a rephrase drawn anew from those of the fact.
"""

import argparse
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import distinct_facts, environment, in_new_process, peak_gib, plot_lines, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_malmen
from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, Fact
from hf_malmen.batches import Tokenizer, TokenSequence
from hf_malmen.tables import table

SCORES = ("edit_success", "generalization", "locality")
SIDES = ("original", "ours")


class Side:
    """One of the two programs, ready to train and to edit.

    Attributes:
        step: takes the facts of one step and trains on them.
        scores: {metric: value} of held-out facts edited at once.
    """

    step: Callable[[Sequence[Fact]], None]
    scores: Callable[[Sequence[Fact]], dict[str, float]]


class Ours(Side):
    """This package."""

    def __init__(self, options: argparse.Namespace) -> None:
        model, tokenizer, names = base(options, getattr(torch, options.dtype))
        torch.manual_seed(options.seed)
        config = EditorConfig(
            method="malmen",
            target_modules=names,
            rank=options.rank,
            edit_lr=options.edit_lr,
            n_preserved_keys=options.preserved,
        )
        self.editor = EditorModel.from_base(model, config)
        arguments = EditorTrainingArguments(
            output_dir=tempfile.mkdtemp(), lm_batch_size=options.batch_size, learning_rate=options.meta_lr,
            seed=options.seed, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        self.trainer = EditorTrainer(self.editor, model, arguments, None, None, tokenizer)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.model, self.tokenizer = model, tokenizer

    def step(self, facts: Sequence[Fact]) -> None:
        """One step as `Trainer` takes it, on a rephrase a fact drawn by step and fact."""
        self.trainer.training_step(self.editor, {"facts": facts})
        torch.nn.utils.clip_grad_norm_(self.editor.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer.state.global_step += 1

    def scores(self, facts: Sequence[Fact]) -> dict[str, float]:
        """Of `evaluate`."""
        found = self.editor.evaluate(self.model, facts, self.tokenizer)
        return {name: found[name] for name in SCORES}


class Original(Side):
    """The original code, from a checkout."""

    def __init__(self, options: argparse.Namespace) -> None:
        from omegaconf import OmegaConf  # of the extra `bench`, which only this side needs

        # It logs to Weights & Biases at every step; here it logs to nobody.
        sys.modules["wandb"] = types.ModuleType("wandb")
        vars(sys.modules["wandb"])["log"] = lambda *_, **__: None
        sys.path.insert(0, str(options.repo))
        model, tokenizer, names = base(options, torch.float32)
        model.requires_grad_(False)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)  # from which it reads ∂L/∂S
        settings = {
            "model": {"name_or_path": "base", "edit_modules": names},
            "data": {"n_edits": options.n_facts, "batch_size": options.original_batch_size},
            "model_device": "cpu",
            "editor_device": "cpu",
            "editor": {
                "name": "malmen", "rank": options.rank, "n_blocks": 2, "lr": options.original_edit_lr,
                "meta_lr": options.original_meta_lr, "loc_coef": 1.0, "max_grad_norm": 1.0, "batch_size": 1024,
                "token": "ans", "cache_dir": tempfile.mkdtemp(), "load_checkpoint": False,
            },
        }  # fmt: skip
        torch.manual_seed(options.seed)
        module = importlib.import_module("editor.malmen")
        vars(importlib.import_module("editor.base"))["tqdm"] = lambda loader, **_: loader
        self.editor = module.MALMEN(OmegaConf.create(settings), model)
        self.batch_size = options.original_batch_size
        self.tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
        self.draw = random.Random(options.seed)
        self.model = model
        # It hands its labels to the model, which would shift them and compute a loss that nobody reads.
        forward = model.forward
        vars(model)["forward"] = lambda *, labels, **inputs: forward(**inputs)

    def step(self, facts: Sequence[Fact]) -> None:
        """Its `train`, over one set of facts."""
        self.editor.train([self.batches(facts)])

    def scores(self, facts: Sequence[Fact]) -> dict[str, float]:
        """The edit is its own; what is scored is what `evaluate` scores. Weights and statistics are put back.

        Its evaluation takes what it measures into its running statistics, and its undo does not restore the last bits:
        both would put it at a disadvantage here.
        """
        weights = {name: self.model.get_submodule(name).weight for name in self.editor.name2idx}
        saved = {name: weight.detach().clone() for name, weight in weights.items()}
        statistics_before = {name: value.clone() for name, value in self.editor.net.state_dict().items()}
        parts = self.batches(facts, every_rephrase=True)
        before = self.predictions(parts["unrel_tuples"])
        self.editor.cache(parts["edit_tuples"])
        self.editor.edit_model(self.editor.predict_param_shifts(), False)
        self.model.zero_grad()
        edited = {kind: self.predictions(batches) for kind, batches in parts.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
        self.editor.net.load_state_dict(statistics_before)
        wanted = {kind: [row for b in batches for row in answers(b["labels"])] for kind, batches in parts.items()}
        of_rephrases = shares(edited["equiv_tuples"], wanted["equiv_tuples"])
        # Rephrases of a fact first, then facts, as `evaluate` does; batches are sorted by length, so by position.
        order = self.order_of_rephrases(facts)
        by_fact: dict[int, list[float]] = {}
        for position, share in zip(order, of_rephrases, strict=True):
            by_fact.setdefault(position, []).append(share)
        return {
            "edit_success": statistics.fmean(shares(edited["edit_tuples"], wanted["edit_tuples"])),
            "generalization": statistics.fmean(map(statistics.fmean, by_fact.values())),
            "locality": statistics.fmean(shares(edited["unrel_tuples"], before)),
        }

    def batches(self, facts: Sequence[Fact], every_rephrase: bool = False) -> dict[str, list[dict[str, Any]]]:
        """What it takes: padded batches by the names that it uses."""
        rephrases = (
            [self.tokenize(text, fact.target) for fact in facts for text in fact.rephrases]
            if every_rephrase
            else [self.tokenize(self.draw.choice(fact.rephrases), fact.target) for fact in facts]
        )
        parts = {
            "edit_tuples": [self.tokenize(fact.prompt, fact.target) for fact in facts],
            "equiv_tuples": rephrases,
            "unrel_tuples": [self.tokenize(str(f.unrelated_prompt), str(f.unrelated_answer)) for f in facts],
        }
        return {name: self.padded(sequences) for name, sequences in parts.items()}

    def padded(self, sequences: Sequence[TokenSequence]) -> list[dict[str, Any]]:
        """Longest first, as ours are."""
        batches = (batch for _, batch in self.tokenize.batches(sequences, self.batch_size))
        names = ("input_ids", "attention_mask", "labels")
        return [{name: getattr(batch, name) for name in names} for batch in batches]

    def order_of_rephrases(self, facts: Sequence[Fact]) -> list[int]:
        """The fact of each rephrase, in the order of its batches."""
        owners = [i for i, fact in enumerate(facts) for _ in fact.rephrases]
        sequences = [self.tokenize(text, fact.target) for fact in facts for text in fact.rephrases]
        return [owners[i] for chosen, _ in self.tokenize.batches(sequences, self.batch_size) for i in chosen]

    def predictions(self, batches: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The most likely token at every answer token of every sequence."""
        with torch.no_grad():
            found = [(self.model(**batch).logits.argmax(-1), batch["labels"]) for batch in batches]
        return [row[own != -100].tolist() for rows, labels in found for row, own in zip(rows, labels, strict=True)]


def answers(labels: torch.Tensor) -> list[list[int]]:
    """The answer tokens of every sequence."""
    return [row[row != -100].tolist() for row in labels]


def shares(predicted: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[float]:
    """Of each sequence, the share of its tokens that are as wanted."""
    return [sum(a == b for a, b in zip(p, w, strict=True)) / len(w) for p, w in zip(predicted, wanted, strict=True)]


def base(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """The base model, its tokenizer, and the layers that are edited."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="eager")
    n_blocks = model.config.num_hidden_layers
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(n_blocks - options.n_layers, n_blocks)]
    return model.eval(), AutoTokenizer.from_pretrained(options.model), names


def split(options: argparse.Namespace) -> tuple[list[list[Fact]], list[Fact]]:
    """The facts of every step of an epoch, and held-out facts; the same for both sides."""
    facts = [f for f in distinct_facts(options.facts, options.seed)[0] if f.rephrases and f.unrelated_answer]
    size, n_held_out = options.n_facts, options.n_facts * options.n_sets
    held_out, rest = facts[:n_held_out], facts[n_held_out:]
    n_sets = min(options.epoch_steps, len(rest) // size)
    return [rest[i * size : (i + 1) * size] for i in range(n_sets)], held_out


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train one side: seconds of every step, memory, and scores by step and by seconds of training."""
    sets, held_out = split(options)
    side = Original(options) if options.one == "original" else Ours(options)
    times: list[float] = []
    measured = []

    def measure() -> None:
        groups = [held_out[i : i + options.n_facts] for i in range(0, len(held_out), options.n_facts)]
        found = [side.scores(group) for group in groups]
        means = {name: statistics.fmean(scores[name] for scores in found) for name in SCORES}
        measured.append({"step": len(times), "seconds": sum(times), **means})

    peak = 0.0
    while len(times) < options.steps or (options.seconds and sum(times) < options.seconds):
        start = time.perf_counter()
        side.step(sets[len(times) % len(sets)])
        times.append(time.perf_counter() - start)
        peak = peak_gib() if len(times) <= options.steps else peak  # of equal steps, and before the first evaluation
        if len(times) == options.steps:
            measure()
    if len(times) > options.steps:
        measure()
    first, later = times[1 : len(sets)], times[len(sets) :]  # the first step of all warms up
    return {
        "first epoch": statistics.median(first or times),
        "later epochs": statistics.median(later) if later else None,
        "last epoch": statistics.median(times[-len(sets) :]) if len(later) >= len(sets) else None,
        "peak GiB": peak,
        "scores": measured,
        "steps": times,
    }


def report(results: dict[str, Any]) -> str:
    """The tables: ratios, and scores after equal steps and equal time."""
    theirs, ours = (results[side] for side in SIDES)
    rows = []
    for name in ("first epoch", "later epochs", "last epoch", "peak GiB"):
        pair = theirs[name], ours[name]
        if None not in pair:
            rows.append([name, f"{pair[0]:.2f}", f"{pair[1]:.2f}", f"{pair[0] / pair[1]:.2f}"])
    lines = []
    for side, index, label in (("original", 0, "original"), ("ours", 0, "ours"), ("ours", -1, "ours")):
        entry = results[side]["scores"][index]
        title = f"{label}, {entry['step']} steps, {entry['seconds']:.0f} s"
        lines.append([title, *(f"{entry[name]:.3f}" for name in SCORES)])
    header = ["seconds a step, median; memory", "original", "ours", "original / ours"]
    return f"{table(header, rows)}\n\n{table(['trained for', *SCORES], lines)}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of the original MALMEN code")
    parser.add_argument("--model", type=Path, required=True, help="a Llama-like base model")
    parser.add_argument("--facts", type=Path, required=True, help="facts with rephrases and unrelated prompts")
    parser.add_argument("--steps", type=int, default=24, help="steps of both sides")
    parser.add_argument("--epoch-steps", type=int, default=8, help="steps before the same facts come again")
    parser.add_argument("--n-facts", type=int, default=64, help="facts edited at once")
    parser.add_argument("--n-sets", type=int, default=2, help="sets of held-out facts, edited one set at a time")
    parser.add_argument("--n-layers", type=int, default=6, help="edited blocks, the last ones")
    parser.add_argument("--rank", type=int, default=512, help="of the hyper-network")
    parser.add_argument("--dtype", default="bfloat16", help="precision of the base model of ours")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a pass of ours")
    parser.add_argument("--edit-lr", type=float, default=1e-3, help="initial η of ours")
    parser.add_argument("--meta-lr", type=float, default=1e-4, help="learning rate of ours")
    parser.add_argument("--preserved", type=int, default=0, help="keys to preserve, in ours; the original has none")
    parser.add_argument("--original-batch-size", type=int, default=32, help="the original's sequences a pass")
    parser.add_argument("--original-edit-lr", type=float, default=1e-6, help="the original's initial η")
    parser.add_argument("--original-meta-lr", type=float, default=1e-5, help="the original's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of facts, their order and initial weights")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also write a plot to this image")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", hf_malmen.UntrainedEditorWarning)
    if options.one:
        print(json.dumps(run(options)))
        return
    if not (options.repo / "editor" / "malmen.py").is_file():
        parser.error(f"{options.repo} has no editor/malmen.py. Give a checkout of the original MALMEN code.")
    if options.n_facts % options.original_batch_size:
        parser.error("The original needs --n-facts to be a multiple of --original-batch-size: it reads whole batches.")
    passed = sys.argv[1:]
    results: dict[str, Any] = {"environment": environment(), "settings": {k: str(v) for k, v in vars(options).items()}}
    results["original"] = in_new_process(__file__, *passed, "--one", "original")
    spent = results["original"]["scores"][0]["seconds"]
    results["ours"] = in_new_process(__file__, *passed, "--one", "ours", "--seconds", str(spent))
    print(f"{results['environment']}\n\n{report(results)}")
    if options.json:
        write_json(options.json, results)
    if options.plot:
        lines = {side: (range(1, len(results[side]["steps"]) + 1), results[side]["steps"]) for side in SIDES}
        plot_lines(options.plot, lines, "step", "seconds", logarithmic=False)


if __name__ == "__main__":
    main()
