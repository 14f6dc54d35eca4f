"""`hf-malmen`: the command line. Exit code 0: done; 1: failed; 2: bad input."""

import enum
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from .errors import CheckpointWriteError, HfMalmenError, NumericalError
from .paths import lies_below_a_file
from .tables import finite_or_none
from .version import __version__

# The disk's fault.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

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


OutputDir = Annotated[Path | None, typer.Option(help="Folder for the edited copy of the checkpoint.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Edit the checkpoint folder itself, crash-safe.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of an edited checkpoint.")]
Dtype = Annotated[Precision, typer.Option(help="Precision to load the base model in; auto: as saved.")]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Sequences a pass of the language model. Changes memory and speed, and results by the rounding of these "
        "passes only: in bfloat16 a weight shift by some percent.",
    ),
]


def main() -> None:
    """Run the command line, with one clear line for whatever is wrong with the input."""
    if not sys.stderr.isatty():  # a log file has no use for progress bars; transformers reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with plain_errors("hf-malmen"):
        app()


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Within this context an error is one line that begins with the program's name, and the exit code that it has."""
    try:
        yield
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        line = " ".join(str(error).split())
        print(f"{program}: {line or type(error).__name__}", file=sys.stderr)
        raise SystemExit(code) from None


def _exit_code(error: Exception) -> int | None:
    """1: failed; 2: bad input; None: a fault of this program, which shows its traceback."""
    if isinstance(error, NumericalError | CheckpointWriteError | ConnectionError | TimeoutError):
        return 1
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return 1
    if isinstance(error, HfMalmenError | ValueError | OSError):
        return 2
    if isinstance(error, SafetensorError):  # a full disk, or a damaged file
        return 1 if "while serializing" in str(error) else 2
    # A connection that fails, where the HTTP client of huggingface_hub does not say it with an OSError.
    return 1 if type(error).__module__.startswith("httpx") else None


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
    max_steps: Annotated[int | None, typer.Option(min=1, help="Overrides the file's training.max_steps.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
) -> None:
    """Train an editor for a base model, and save it with its card. One of a method without training is made ready."""
    from .recipe import load_recipe, run_recipe

    overrides: dict[str, Any] = {}
    if output_dir is not None:
        overrides["output_dir"] = str(output_dir)
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    folder = run_recipe(load_recipe(config, overrides), resume=resume)
    if int(os.environ.get("RANK", "0")) > 0:  # one of several processes is enough to say it
        return
    print(f"Saved the editor to {folder}. Try it: hf-malmen evaluate {folder} MODEL FACTS")


@app.command()
def apply(
    editor: Editor,
    model: Model,
    facts: Facts,
    output_dir: OutputDir = None,
    in_place: InPlace = False,
    facts_per_turn: Annotated[
        int | None, typer.Option(min=1, help="Edit sequentially, this many facts a turn; default: all at once.")
    ] = None,
    accumulate: Annotated[
        bool,
        typer.Option(
            "--accumulate",
            help="Solve anew over the facts of all edits in force, read by the unedited model: any number of calls "
            "gives what one would.",
        ),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the facts as they are needed, for more than memory should hold.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for the least squares of the layers that are solved together, such as 8GiB; models come on "
            "top. With less than all layers take, groups of them are solved one after the other."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the edit first, and keep the scores in the checkpoint's history.")
    ] = False,
    save_edit: Annotated[Path | None, typer.Option(help="Also save the edit alone (shifts and facts) here.")] = None,
    revision: Revision = None,
    batch_size: BatchSize = 32,
) -> None:
    """Write facts into a checkpoint. The result loads with plain transformers, and can be undone."""
    from .checkpoint import check_checkpoint
    from .facts import FactStream, load_facts

    check_checkpoint(model, output_dir, in_place)
    _require_no_revision(model, revision)
    _require_unused(save_edit)
    if save_edit is not None and output_dir is not None and save_edit.resolve() == output_dir.resolve():
        raise ValueError(f"{save_edit} cannot hold both the checkpoint and the edit. Choose another folder for one.")
    checked = FactStream(facts) if stream else load_facts(facts)
    from . import distributed  # seconds, so after the checks
    from .modeling import EditorModel

    distributed.join()
    edit = EditorModel.from_pretrained(editor).apply(
        model,
        checked,
        output_dir=output_dir,
        in_place=in_place,
        batch_size=batch_size,
        facts_per_turn=facts_per_turn,
        max_memory=max_memory,
        accumulate=accumulate,
        measure=measure,
        revision=revision,
    )
    if not distributed.writes():
        return
    folder = model if in_place else output_dir
    skipped = f"Skipped {edit.n_skipped} facts that are in force already, or come twice. " if edit.n_skipped else ""
    if not edit.layers:
        print(f"{skipped}Nothing was left to write; {folder} holds what {model} does.")
        return
    into = f"{len(edit.layers)} layers of {folder}. Undo: hf-malmen undo {folder}"
    if edit.n_facts:
        print(f"{skipped}Wrote {edit.n_facts} facts into {into}")
    else:
        print(f"{skipped}Earlier edits had been undone: solved again for the facts in force, in {into}")
    if save_edit is not None:  # when it is known that the facts are written, should this fail
        edit.save_pretrained(save_edit)


@app.command()
def write(
    edit: Annotated[str, typer.Argument(help="Folder or Hub id of a saved edit.")],
    model: Annotated[str, typer.Argument(help="Folder, safetensors file or Hub id of the checkpoint to write into.")],
    output_dir: OutputDir = None,
    in_place: InPlace = False,
    revision: Revision = None,
) -> None:
    """Write a saved edit into a checkpoint, without loading the model."""
    from .checkpoint import check_checkpoint

    check_checkpoint(model, output_dir, in_place)
    _require_no_revision(model, revision)
    from .edit import Edit

    loaded = Edit.from_pretrained(edit)
    report = loaded.write(model, output_dir, in_place=in_place, revision=revision)
    worst = max(report.rounding.values(), default=0.0)
    print(
        f"Wrote edit {report.edit_id} ({loaded.n_facts} facts, {len(report.keys)} layers) into {report.output_dir}; "
        f"rounding cost up to {worst:.2g} of a layer's shift. Undo: hf-malmen undo {report.output_dir}"
    )


@app.command()
def log(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    facts: Annotated[
        bool, typer.Option("--facts", help="Show every fact instead: which edit wrote it, and what replaced it.")
    ] = False,
) -> None:
    """Show the edits in force on a checkpoint, oldest first. For one edit's facts: hf-malmen inspect DIR/edits/0001."""
    from dataclasses import asdict

    from .history import recover_checkpoint
    from .records import read_history, read_ledger
    from .report import describe_history, describe_ledger

    if recover_checkpoint(checkpoint):
        print("A change that had not ended was finished or taken back first.", file=sys.stderr)
    if facts:
        ledger = read_ledger(checkpoint)
        print(json.dumps(ledger.to_dict(), indent=2, ensure_ascii=False) if as_json else describe_ledger(ledger))
    elif as_json:
        summaries = [asdict(record.summary) for record in read_history(checkpoint)]
        print(json.dumps(summaries, indent=2, ensure_ascii=False))
    else:
        print(describe_history(checkpoint))


@app.command()
def undo(
    checkpoint: Checkpoint,
    edit: Annotated[
        str | None, typer.Option(help="Number of the edit, as the log shows it; default: the last.")
    ] = None,
) -> None:
    """Take an edit back from a checkpoint. The last one's bytes are restored; an earlier one is computed out."""
    from .history import undo_edit
    from .state import IN_STATISTICS, SOLVED_TOGETHER

    report = undo_edit(checkpoint, edit)
    how = (
        "every byte is as before it"
        if report.exact
        else "layers that it shares with later edits were added up anew, exact to the rounding of one addition an edit"
    )
    left = ", ".join(report.remaining) or "none"
    print(f"Undid edit {report.summary.id} ({report.summary.n_facts} facts): {how}. Edits in force: {left}.")
    if report.solved_together:
        print(SOLVED_TOGETHER)
    if report.in_statistics:
        print(IN_STATISTICS)


@app.command()
def recover(checkpoint: Checkpoint) -> None:
    """Bring a checkpoint back to the state before or after a change during which the process died."""
    from .history import recover_checkpoint
    from .records import read_history

    done = recover_checkpoint(checkpoint)
    ids = ", ".join(record.id for record in read_history(checkpoint)) or "none"
    print(f"{'Recovered' if done else 'Nothing to recover'}: {checkpoint}. Edits in force: {ids}.")


@app.command()
def evaluate(
    editor: Editor,
    model: Model,
    facts: Facts,
    n_facts: Annotated[int | None, typer.Option(min=1, help="Use only the first facts, this many.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Score by free generation too (slower).")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Compare the probabilities of answers too, as for CounterFact.")
    ] = False,
    dtype: Dtype = Precision.auto,
    batch_size: BatchSize = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
    per_fact: Annotated[Path | None, typer.Option(help="Also write results fact by fact to this Parquet file.")] = None,
    texts: Annotated[
        str | None, typer.Option(help="Text of other things, for perplexity before and after: a file or Hub data set.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks of lm-eval, before and after, separated by commas (extra: harness).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many examples of each benchmark.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with benchmarks of your own for lm-eval.")] = None,
) -> None:
    """Apply facts at once, measure, and undo: edit success, generalization, locality, and side effects if asked for."""
    from .facts import load_facts
    from .history import require_settled

    require_settled(Path(model))
    for option, value in (("--limit", limit), ("--include-path", include_path)):
        if value is not None and not tasks:
            raise ValueError(f"{option} is for benchmarks, and none are asked for. Name some with --tasks.")
    for path in (output, per_fact):
        _require_file(path)
    if output is not None and per_fact is not None and output.resolve() == per_fact.resolve():
        raise ValueError(f"{output} cannot hold both the scores and the results by fact. Name another file for one.")
    checked = load_facts(facts)[:n_facts]
    from . import distributed
    from .base_model import check_base_model
    from .modeling import EditorModel
    from .sharding import place
    from .side_effects import known_tasks, load_texts, measure_side_effects
    from .tables import scores_table, table
    from .tasks import load_base

    benchmarks = _listed(tasks)
    if benchmarks:
        known_tasks(benchmarks, include_path)  # raises what is wrong with them
    distributed.join()
    trained = EditorModel.from_pretrained(editor)
    other_texts = load_texts(texts) if texts else None
    check_base_model(model)
    base = load_base(model, trained.config.task_type, dtype=dtype.value)
    place(base)
    found = trained.measure(base, checked, batch_size=batch_size, generate=generate, probabilities=probabilities)
    edit = trained.make_edit(base, checked, batch_size=batch_size) if other_texts or benchmarks else None
    is_writer = distributed.writes()
    if is_writer:  # also before side effects are measured, which takes long and may fail
        print(scores_table({len(checked): found.scores}, found.intervals), flush=True)
        _write_scores(found.scores, output)
        if per_fact is not None:
            per_fact.parent.mkdir(parents=True, exist_ok=True)
            found.per_fact.to_parquet(str(per_fact))
    # Processes that hold the base model together run it together; of others, one is enough.
    if edit is None or not (is_writer or distributed.in_unison()):
        return
    effects = measure_side_effects(
        base,
        edit,
        trained.tokenizer_for(base).tokenizer,
        texts=other_texts,
        tasks=benchmarks,
        limit=limit,
        include_path=include_path,
    )
    if is_writer:
        names = [name for name in effects if not name.endswith(("_before", "_change"))]
        rows = [[name, f"{effects[f'{name}_before']:.4g}", f"{effects[name]:.4g}"] for name in names]
        print(f"\n{table(['side effect', 'before', 'after'], rows)}")
        _write_scores(found.scores | effects, output)


@app.command()
def compare(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the comparison; recipes/compare-geography.yaml is documented.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model: folder or Hub id. Overrides the file's.")] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="One file or Hub data set of facts, to be split into training, validation and test facts. Overrides "
            "the file's. Facts need a rephrase for generalization, and unrelated prompt and answer for locality."
        ),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="Text of other things, for perplexity before and after: a file or Hub data set.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for results. Started again with the same one, a comparison goes on.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by commas, such as malmen,ultraedit. Default: the file's.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Numbers of facts to edit at once, separated by commas, such as 64,256.")
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=0, help="Turns of the cell that is edited in turns; 0: none.")
    ] = None,
    facts_per_turn: Annotated[int | None, typer.Option(min=1, help="Facts in each of these turns.")] = None,
    n_test_facts: Annotated[int | None, typer.Option(min=1, help="Of --facts, those to test on.")] = None,
    n_validation_facts: Annotated[int | None, typer.Option(min=1, help="Of --facts, those to tune on.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the methods that train.")] = None,
    n_trials: Annotated[int | None, typer.Option(min=1, help="Trials of the methods that are tuned.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of splits, subsets, training and tuning.")] = None,
) -> None:
    """Compare methods on the same model and the same facts: a table, plots and a report.

    Each method's editor is made once: trained on the training facts, or, where a method has no training, tuned on the
    validation facts with the same number of trials for each. Then each edits the same test facts, several numbers at
    once and in turns, in a process of its own: edit success, generalization, locality, free generation and perplexity
    with 95 % intervals, seconds, peak memory.

    Killed or stopped, the same command goes on where it was. A method that fails is reported, the others are not held
    up, and the exit code is 1.

    hf-malmen compare --config recipes/compare-geography.yaml --facts FACTS.jsonl --model MODEL --output-dir comparison
    """
    from .comparison import run_comparison
    from .comparison_report import Results, write_report
    from .comparison_settings import load_comparison

    given = {
        "base_model": model,
        "texts": texts,
        "output_dir": None if output_dir is None else str(output_dir),
        "methods": _listed(methods),
        "sizes": None if sizes is None else _numbers(sizes),
        "turns": turns,
        "facts_per_turn": facts_per_turn,
        "n_test_facts": n_test_facts,
        "n_validation_facts": n_validation_facts,
        "seed": seed,
    }
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if facts is not None:
        overrides |= {"facts": facts, "train_facts": None, "validation_facts": None, "test_facts": None}
    comparison = load_comparison(config, overrides, max_steps=max_steps, n_trials=n_trials)
    results = Results.of(comparison, run_comparison(comparison, lambda text: print(text, flush=True)))
    print(f"\n{write_report(results)}\n\nReport and plots: {Path(comparison.output_dir) / 'report.md'}")
    if results.failures:
        print(f"hf-malmen: {len(results.failures)} cells failed; see above.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="Folder of an editor, a saved edit or a checkpoint, or Hub id of an editor.")
    ],
) -> None:
    """Show what an editor, an edit or a checkpoint holds."""
    from .report import describe

    print(describe(path))


@app.command("export-lora")
def export_lora(
    edit: Annotated[str, typer.Argument(help="Folder or Hub id of a saved edit.")],
    directory: Annotated[Path, typer.Argument(help="Folder for the LoRA adapter; must not exist, or be empty.")],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most this rank. Default: the smallest of 8 ... 512 that is exact, as servers such as vLLM take.",
        ),
    ] = None,
) -> None:
    """Turn a saved edit into a PEFT LoRA adapter."""
    _require_unused(directory)
    from .edit import Edit

    print(f"Saved the adapter to {Edit.from_pretrained(edit).to_lora(directory, rank)}.")


@app.command()
def push(
    path: Annotated[
        Path, typer.Argument(help="Folder of an editor, a saved edit, an adapter or an edited checkpoint.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Hub repo, owner/name; made if it does not exist.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Whether a new repo is private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload with hf_malmen",
) -> None:
    """Upload a folder to the Hub, with its card and history."""
    from .hub import push_folder

    print(push_folder(path, repo_id, private=private, create_pr=create_pr, commit_message=message))


def _listed(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _listed(text)]
    except ValueError:
        raise ValueError(f"--sizes is {text!r}; expected whole numbers separated by commas, such as 64,256.") from None


def _write_scores(scores: dict[str, float], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {name: finite_or_none(score) for name, score in scores.items()}
        output.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _require_file(path: Path | None) -> None:
    """Refuse a path at which no file can be written, before what is to be written there is computed."""
    if path is not None and (path.is_dir() or lies_below_a_file(path)):
        raise ValueError(f"{path} is a folder, or lies below a file. Give the path of a file to write.")


def _require_no_revision(model: str, revision: str | None) -> None:
    if revision is not None and Path(model).exists():
        raise ValueError(f"--revision is of a repo on the Hub, and {model} is on this machine. Leave it out.")


def _require_unused(folder: Path | None) -> None:
    """Refuse a folder that cannot be made, or holds something, before what is to be saved there is computed."""
    if folder is None:
        return
    if lies_below_a_file(folder):
        raise ValueError(f"{folder} lies below a file. Choose another folder.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty. Choose another folder, or remove it.")


if __name__ == "__main__":
    main()
