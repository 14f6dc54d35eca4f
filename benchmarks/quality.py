"""python benchmarks/quality.py --model demo-output/base --facts FACTS.jsonl

What a training run is worth: trains an editor on a file of facts, holds some out, and measures held-out facts edited
64, 256 and 1,024 at once. Facts need rephrases and unrelated prompts. A prompt that comes twice is used once, and how
many were left out is printed.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import distinct_facts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, Fact
from hf_malmen.tables import METRIC_TITLES, table


def read(path: Path, seed: int, n_held_out: int) -> tuple[list[Fact], list[Fact]]:
    """Training and held-out facts, shuffled; of facts with the same prompt only the first."""
    facts, n_left_out = distinct_facts(path, seed)
    print(f"{len(facts)} facts; {n_left_out} left out, whose prompt came before")
    if len(facts) <= n_held_out:
        raise SystemExit(f"Holding out {n_held_out} leaves none to train on. Lower --held-out.")
    return facts[n_held_out:], facts[:n_held_out]


def mean_scores(
    editor: EditorModel, model: Any, tokenizer: Any, facts: list[Fact], size: int, sets: int
) -> dict[str, float]:
    """Scores of `sets` disjoint sets of `size` facts, each edited at once, averaged."""
    chosen = [facts[i * size : (i + 1) * size] for i in range(min(sets, len(facts) // size))]
    scores = [editor.evaluate(model, part, tokenizer, batch_size=64) for part in chosen]
    return {name: sum(score[name] for score in scores) / len(scores) for name in METRIC_TITLES}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="JSONL file of facts")
    parser.add_argument("--dtype", default="bfloat16", help="precision of the base model")
    parser.add_argument("--steps", type=int, default=450, help="training steps")
    parser.add_argument("--facts-per-step", type=int, default=128, help="facts edited together in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the hyper-network's matrices")
    parser.add_argument("--schedule", default="cosine", help="of the learning rates")
    parser.add_argument("--locality-weight", type=float, default=1.0, help="weight of the locality loss")
    parser.add_argument("--rephrases", type=int, default=1, help="rephrases a fact in the generalisation loss")
    parser.add_argument("--rank", type=int, default=512, help="of the hyper-network")
    parser.add_argument("--edit-lr", type=float, default=1e-3, help="initial η")
    parser.add_argument("--preserved-keys", type=int, default=1024, help="keys a layer to keep in place; 0: none")
    parser.add_argument("--preservation", type=float, default=100.0, help="initial κ")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], help="facts edited at once")
    parser.add_argument("--held-out", type=int, default=2048, help="facts not trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output/quality"), help="for the editor")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    train_facts, held_out = read(options.facts, options.seed, options.held_out)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = EditorConfig(
        method="malmen",
        rank=options.rank,
        edit_lr=options.edit_lr,
        n_preserved_keys=options.preserved_keys,
        preservation=options.preservation,
    )
    torch.manual_seed(options.seed)
    editor = EditorModel.from_base(model, config)
    arguments = EditorTrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=options.facts_per_step,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        locality_weight=options.locality_weight,
        rephrases_per_fact=options.rephrases,
        lm_batch_size=64,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    began = time.perf_counter()
    EditorTrainer(editor, model, arguments, train_facts, None, tokenizer).train()
    print(f"trained {options.steps} steps of {options.facts_per_step} facts in {time.perf_counter() - began:.0f} s")
    editor.save_pretrained(options.output_dir)

    rows = []
    for size in options.sizes:
        scores = mean_scores(editor, model, tokenizer, held_out, size, sets=max(1, 512 // size))
        rows.append([str(size), *(f"{scores[name]:.3f}" for name in METRIC_TITLES)])
        print(table(["facts at once", *METRIC_TITLES.values()], rows), flush=True)


if __name__ == "__main__":
    main()
