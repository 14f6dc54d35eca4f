"""What a person reads on the command line about an editor, an edit or a checkpoint, its history and its facts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError
from .history import require_settled
from .ledger import Ledger
from .records import Record, read_history
from .shards import parse_json, read_tensor_index
from .tables import METRIC_TITLES, table

if TYPE_CHECKING:
    from .edit import Edit
    from .modeling import EditorModel


def describe(path: str) -> str:
    """A few lines about the editor, edit or checkpoint at `path`.

    Raises:
        CheckpointError: a folder that holds none of them.
    """
    from .configuration import EditorConfig  # transformers takes seconds to import, and a history needs none of it
    from .edit import Edit

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; expected an editor, a saved edit or a checkpoint.")
    if folder.is_dir():
        config = parse_json((folder / "config.json").read_bytes(), folder / "config.json")
        if "edit_format_version" in config:
            return _describe_edit(Edit.from_pretrained(folder))
        if config.get("model_type") != EditorConfig.model_type:
            return _describe_checkpoint(folder, config)
    return _describe_editor(path)


def _describe_edit(edit: "Edit") -> str:
    lines = [
        f"Edit of {edit.n_facts} facts for {_plain(edit.base_model_name_or_path or 'an unnamed model')}",
        f"made {_plain(edit.created_at)} by {_plain(edit.editor.get('method', 'an unknown method'))}",
        "",
        table(
            ["layer", "shape", "norm of S"],
            [[name, "x".join(map(str, s.shape)), f"{s.norm():.4g}"] for name, s in edit.shifts.items()],
        ),
        "",
        *[f"  {_plain(fact.prompt)} -> {_plain(fact.target)}" for fact in edit.facts[:5]],
    ]
    if edit.n_facts > len(edit.facts[:5]):
        lines.append(f"  ... and {edit.n_facts - len(edit.facts[:5])} more")
    return "\n".join(lines)


def _describe_editor(path: str) -> str:
    from .modeling import EditorModel  # transformers' model classes take seconds to import

    editor = EditorModel.from_pretrained(path)
    config = editor.config
    learned = "learned " if config.value_differences == "network" else ""
    rows = [
        [name, "{}x{}".format(*config.shape_of(name)), *(f"{scale:.3g}" for scale in scales)]
        for name, scales in editor.scales().items()
    ]
    return "\n".join(
        [
            f"{config.method} editor for {config.base_model_name_or_path or 'an unnamed model'}, "
            f"written by hf_malmen {config.hf_malmen_version}",
            _describe_state(editor),
            f"fingerprint of the base's target weights: {(config.base_model_fingerprint or 'none')[:16]}",
            "",
            table(["layer", "keys x values", *(f"{learned}{scale}" for scale in "ηλκ")], rows),
        ]
    )


def _describe_state(editor: "EditorModel") -> str:
    config = editor.config
    if config.needs_training:
        return (
            f"{editor.num_parameters():,} parameters: rank {config.rank}, {config.n_blocks} blocks; "
            f"{'trained' if editor.is_trained else 'not trained yet'}"
            + (f"; covariance of the keys of {editor.n_covariance_tokens:,} tokens" if config.key_covariance else "")
        )
    if config.key_covariance is not None:
        return f"nothing to train; covariance of the keys of {editor.n_covariance_tokens:,} tokens"
    n_rows = sum(int(own.count) for own in editor.statistics.values())
    follow = "follow the edits" if config.follows_edits else "are frozen"
    return f"nothing to train; statistics of {n_rows:,} rows, which {follow}"


def describe_history(folder: str | Path) -> str:
    """A table of the edits in force on a checkpoint, oldest first; or a line that there are none.

    Raises:
        CheckpointError: no such folder, or a damaged record.
    """
    records = read_history(folder)
    return _history_table(records) if records else f"{folder} has no edits in force."


def describe_ledger(ledger: Ledger) -> str:
    """A table of the facts that edits wrote, in their order, and what came of each."""
    rows = [
        [
            entry.edit,
            _plain(entry.fact.prompt),
            _plain(entry.fact.target),
            "in force" if entry.replaced_by is None else f"replaced by edit {entry.replaced_by}",
        ]
        for entry in ledger.entries
    ]
    lines = [f"Facts in force: {ledger.n_in_force}. Replaced: {len(ledger.replaced)}."]
    if ledger.n_unlisted:
        lines.append(f"Of those in force, {ledger.n_unlisted} were streamed: their edits keep no texts of them.")
    if rows:
        lines += ["", table(["edit", "prompt", "answer", "state"], rows)]
    return "\n".join(lines)


def _history_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        summary = record.summary
        scores = [f"{_plain(METRIC_TITLES.get(name, name))} {score:.3f}" for name, score in summary.measured.items()]
        rows.append(
            [
                summary.id,
                _plain(summary.created_at),
                str(summary.n_facts),
                _plain(summary.editor),
                str(len(record.modules)),
                f"{max(record.rounding.values(), default=0.0):.2g}",
                ", ".join(scores) or "not measured",
            ]
        )
    return table(["edit", "made", "facts", "editor", "layers", "rounding", "after the edit"], rows)


def _describe_checkpoint(folder: Path, config: Mapping[str, object]) -> str:
    require_settled(folder)
    tensors = read_tensor_index(folder)
    size = sum(entry.end - entry.begin for entry in tensors.values())
    files = len({entry.file for entry in tensors.values()})
    dtypes = ", ".join(sorted({entry.dtype for entry in tensors.values()}))
    text = (
        f"Checkpoint of a {config.get('model_type', 'unknown')} model: {len(tensors)} tensors ({dtypes}), "
        f"{size / 2**20:,.1f} MiB in {files} safetensors file{'s' if files > 1 else ''}"
    )
    records = read_history(folder)
    return f"{text}\n\n{_history_table(records)}" if records else text


def _plain(text: object) -> str:
    """Text from a file that may have been downloaded, without what would move a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in str(text))
