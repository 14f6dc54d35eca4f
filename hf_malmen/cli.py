"""`hf-malmen`: the command line. Exit code 0: done; 1: failed; 2: bad input."""

import enum
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import HfMalmenError, NumericalError
from .version import __version__

app = typer.Typer(
    name="hf-malmen",
    help="Rewrite thousands of facts in a language model's weights at once.\n\n"
    "A trained editor reads how each fact pulls on a few layers of its base model, and one least-squares solve a layer "
    "finds the weight shift that writes all of them. Start with: hf-malmen train --config recipes/geography.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Editor = Annotated[str, typer.Argument(help="Folder or Hub id of a trained editor.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of the base model the editor was trained for.")]
Facts = Annotated[
    str,
    typer.Argument(
        help="Facts: a JSON, JSONL, CSV or Parquet file, or the id of a data set on the Hub. Each has at least a "
        "'prompt' and a 'target'."
    ),
]


class Precision(str, enum.Enum):
    """What `--dtype` takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[Precision, typer.Option(help="Precision to load the base model in; auto: as saved.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences a pass of the language model. Changes memory only.")]


def main() -> None:
    """Run the command line, with one clear line for whatever is wrong with the input."""
    if not sys.stderr.isatty():  # a log file has no use for progress bars; transformers reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except NumericalError as error:
        _fail(error, 1)
    except (HfMalmenError, ValueError, OSError) as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> None:
    line = " ".join(str(error).split())
    print(f"hf-malmen: {line or type(error).__name__}", file=sys.stderr)
    raise SystemExit(code) from None


def _show_version(value: bool) -> None:
    if value:
        print(f"hf_malmen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run; recipes/geography.yaml is a documented example.")],
    output_dir: Annotated[Path | None, typer.Option(help="Overrides the file's training.output_dir.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Overrides the file's training.max_steps.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
) -> None:
    """Train an editor for a base model, and save it with its card."""
    from .recipe import load_recipe, run_recipe

    overrides: dict[str, Any] = {}
    if output_dir is not None:
        overrides["output_dir"] = str(output_dir)
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    folder = run_recipe(load_recipe(config, overrides), resume=resume)
    print(f"Saved the editor to {folder}. Try it: hf-malmen evaluate {folder} MODEL FACTS")


@app.command()
def apply(
    editor: Editor,
    model: Model,
    facts: Facts,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the edited copy of the checkpoint.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Edit the checkpoint folder itself.")] = False,
    facts_per_turn: Annotated[
        int | None, typer.Option(min=1, help="Edit sequentially, this many facts a turn; default: all at once.")
    ] = None,
    save_edit: Annotated[Path | None, typer.Option(help="Also save the edit alone (shifts and facts) here.")] = None,
    batch_size: BatchSize = 32,
) -> None:
    """Write facts into a checkpoint. The result loads with plain transformers."""
    from .checkpoint import check_checkpoint
    from .facts import load_facts

    check_checkpoint(model, output_dir, in_place)
    checked = load_facts(facts)
    from .modeling import EditorModel  # seconds, so after the checks

    edit = EditorModel.from_pretrained(editor).apply(
        model,
        checked,
        output_dir=output_dir,
        in_place=in_place,
        batch_size=batch_size,
        facts_per_turn=facts_per_turn,
    )
    if save_edit is not None:
        edit.save_pretrained(save_edit)
    print(f"Wrote {len(checked)} facts into {len(edit.shifts)} layers of {model if in_place else output_dir}.")


@app.command()
def evaluate(
    editor: Editor,
    model: Model,
    facts: Facts,
    n_facts: Annotated[int | None, typer.Option(min=1, help="Use only the first facts, this many.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Score by free generation too (slower).")] = False,
    dtype: Dtype = Precision.auto,
    batch_size: BatchSize = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Apply facts at once, measure, and undo: edit success, generalization, locality, unrelated accuracy."""
    from .facts import load_facts

    checked = load_facts(facts)[:n_facts]
    from transformers import AutoModelForCausalLM

    from .modeling import EditorModel
    from .report import scores_table

    trained = EditorModel.from_pretrained(editor)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype.value)
    scores = trained.evaluate(base, checked, batch_size=batch_size, generate=generate)
    print(scores_table({len(checked): scores}))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of an editor, a saved edit, or a checkpoint folder.")],
) -> None:
    """Show what an editor, an edit or a checkpoint holds."""
    from .report import describe

    print(describe(path))


@app.command("export-lora")
def export_lora(
    edit: Annotated[str, typer.Argument(help="Folder or Hub id of a saved edit.")],
    directory: Annotated[Path, typer.Argument(help="Folder for the LoRA adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter; default: up to 512.")] = None,
) -> None:
    """Turn a saved edit into a PEFT LoRA adapter."""
    from .edit import Edit

    print(f"Saved the adapter to {Edit.from_pretrained(edit).to_lora(directory, rank)}.")


if __name__ == "__main__":
    main()
