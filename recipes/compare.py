"""python recipes/compare.py

All methods on the same model and the same facts: edit success, generalization, locality, free generation and perplexity
with intervals, seconds and memory, as tables, plots and a report (hf_malmen/comparison.py). As it stands, SmolLM2-135M
and geography facts, offline. Killed or stopped, the same command goes on where it was.

    python recipes/compare.py --sizes 64 256 --turns 0 --methods malmen ultraedit    # a part of it
    python recipes/compare.py --facts FACTS.jsonl --output-dir DIR                   # other facts, split by the seed
    python recipes/compare.py --facts FACTS.jsonl --model MODEL --output-dir DIR     # and another model
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from hf_malmen.cli import plain_errors
from hf_malmen.comparison import run_comparison
from hf_malmen.comparison_report import Results, write_report
from hf_malmen.comparison_settings import load_comparison
from hf_malmen.configuration import METHODS

RECIPE = Path(__file__).with_name("compare-geography.yaml")
# Of the edited subjects. More test facts than the other recipes have, for the cell of 4,096.
SHARES = {"train": 0.62, "validation": 0.05, "test": 0.33}


def make_inputs(model: str | None, facts: str | None) -> None:
    """The base model and the geography facts that the recipe names, as far as they are used and not there."""
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    if model is None:
        import smollm2  # what these two need is asked for only where they are used

        smollm2.save(Path(settings["base_model"]))
    if facts is None:
        import geography

        folder = Path(settings["test_facts"]).parent
        if not all((folder / f"{split}.jsonl").is_file() for split in SHARES):
            geography.write(geography.build(shares=SHARES), folder)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code: 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPE, help="settings (default: compare-geography.yaml)")
    parser.add_argument("--model", help="folder or Hub id of the base model (default: SmolLM2-135M, from a wheel)")
    parser.add_argument("--facts", help="one file of facts, to be split (default: geography)")
    parser.add_argument("--texts", help="other text, for perplexity (default: everyday-texts.jsonl)")
    parser.add_argument("--output-dir", help="folder for results; the same one goes on (default: the settings')")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="methods (default: all)")
    parser.add_argument("--sizes", type=int, nargs="*", help="facts edited at once")
    parser.add_argument("--turns", type=int, help="turns of one more cell; 0: none")
    parser.add_argument("--facts-per-turn", type=int, help="facts in each turn")
    parser.add_argument("--n-test-facts", type=int, help="of --facts, those to test on")
    parser.add_argument("--n-validation-facts", type=int, help="of --facts, those to tune on")
    parser.add_argument("--max-steps", type=int, help="training steps of the methods that train")
    parser.add_argument("--n-trials", type=int, help="trials of the methods that are tuned")
    parser.add_argument("--seed", type=int, help="of splits, subsets, training and tuning")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    with plain_errors(parser.prog):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """The comparison that the options ask for. Returns the exit code."""
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if value is not None}
    config, max_steps, n_trials = (given.pop(name, None) for name in ("config", "max_steps", "n_trials"))
    if options.model is not None:
        given["base_model"] = given.pop("model")
    if options.facts is not None:
        given |= {"train_facts": None, "validation_facts": None, "test_facts": None}
    comparison = load_comparison(config, given, max_steps=max_steps, n_trials=n_trials)
    if config == RECIPE:
        make_inputs(options.model, options.facts)
    results = Results.of(comparison, run_comparison(comparison, lambda text: print(text, flush=True)))
    print(f"\n{write_report(results)}\n\nReport and plots: {Path(comparison.output_dir) / 'report.md'}")
    return int(bool(results.failures))


if __name__ == "__main__":
    sys.exit(main())
