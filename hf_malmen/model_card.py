"""Measured values -> the model cards of an editor, an edit and an edited checkpoint.

Light to import (no torch, no matplotlib), and free of the model code, which writes these cards.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import CardData, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public, and not declared so

from .tables import METRIC_TITLES, table
from .version import __version__

if TYPE_CHECKING:
    from .edit import Edit
    from .modeling import EditorModel

PLOT_FILE = "results.png"
RESULTS_FILE = "eval_results.json"
HUB_RESULTS_FILE = ".eval_results/hf_malmen.yaml"
SECTION_BEGIN = "<!-- hf_malmen:edits:begin -->"
SECTION_END = "<!-- hf_malmen:edits:end -->"
# Facts of an edit that its card shows.
N_FACTS_SHOWN = 5

_TAGS = ["model-editing", "knowledge-editing"]
_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
    "SEQ_CLS": "text-classification",
}
_MAX_CELL = 100  # characters of a table cell
_Z95 = 1.959964  # 97.5 % quantile of the normal distribution
# What Markdown, with the Hub's formulas, reads as more than text. Underscores within a word are text.
_MARKDOWN = re.compile(r"[&<>|`*\[\]\\~$#]|(?<![^\W_])_|_(?![^\W_])")
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# Our section with the line break before it. From the last opening marker on, so that a stray one takes no text along.
_SECTION = re.compile(
    rf"(?:\r?\n)?^{re.escape(SECTION_BEGIN)}\r?\n(?:(?!^{re.escape(SECTION_BEGIN)}).)*?^{re.escape(SECTION_END)}(?:\r?\n|\Z)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Measurement:
    """Scores of held-out facts, edited a number at once.

    Attributes:
        n_at_once: facts edited at once.
        scores: as `EditorModel.evaluate` gives them, teacher-forced, averaged over facts.
        n_facts: {metric: the facts averaged over}.
    """

    n_at_once: int
    scores: Mapping[str, float]
    n_facts: Mapping[str, int]


@dataclass(frozen=True)
class EditorRun:
    """How an editor was trained, and what was measured.

    Attributes:
        train_facts: where the training facts came from: a file, or the id of a data set on the Hub; None where that is
            not known.
        n_train_facts: how many there were; None where that is not known.
        settings: hyper-parameters as given. Those named `*_token` are secrets, and not shown.
        eval_facts: where the held-out facts came from.
        measurements: empty where nothing was measured.
        measured_at: when, ISO 8601.
        license: the editor's licence, as the Hub names it; None says nothing.
    """

    train_facts: str | None = None
    n_train_facts: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    eval_facts: str | None = None
    measurements: Sequence[Measurement] = ()
    measured_at: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class EditSummary:
    """What the card of an edited checkpoint says about one edit.

    Attributes:
        id: what `hf-malmen log` calls it.
        created_at: ISO 8601.
        n_facts: how many facts it wrote.
        facts: the first of them as (prompt, target); the card shows at most `N_FACTS_SHOWN`.
        editor: what made it, such as `describe_maker` says it.
        base_model: the edited model's id on the Hub (see `hub_id`); None if it did not come from there.
        base_model_fingerprint: of the target weights that the edit was made for.
        hf_malmen_version: that wrote it.
        measured: {metric: score after the edit}; empty where nothing was measured.
        n_replaced: how many facts, of earlier edits in force or its own, are not in force any more because of it.
    """

    id: str
    created_at: str
    n_facts: int
    facts: Sequence[tuple[str, str]]
    editor: str
    base_model: str | None = None
    base_model_fingerprint: str | None = None
    hf_malmen_version: str = __version__
    measured: Mapping[str, float] = field(default_factory=dict)
    n_replaced: int = 0


# An editor's repo


def write_editor_card(folder: str | Path, editor: "EditorModel", run: EditorRun) -> Path:
    """Write `README.md`, and the results if there are any, beside a saved editor.

    The results go into the card, into `results.png`, and, for programs, into `eval_results.json`. They also go into
    `.eval_results/`, which the Hub shows on the editor's page and on the data set's leaderboard, if the held-out facts
    are a data set on the Hub: each entry there names one by its id, and a file on somebody's disk has none. Results of
    an earlier run in this folder are removed.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    for name in (PLOT_FILE, RESULTS_FILE, HUB_RESULTS_FILE):
        (folder / name).unlink(missing_ok=True)
    if run.measurements:
        plot_results(run.measurements, folder / PLOT_FILE)
        results = {
            "eval_facts": run.eval_facts,
            "hf_malmen_version": __version__,
            "measured_at": run.measured_at,
            "measurements": [vars(measurement) for measurement in run.measurements],
        }
        text = json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / RESULTS_FILE).write_text(text, encoding="utf-8")
    if entries := hub_results(run):
        path = folder / HUB_RESULTS_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    path = folder / "README.md"
    path.write_text(render_editor_card(editor, run), encoding="utf-8")
    return path


def render_editor_card(editor: "EditorModel", run: EditorRun) -> str:
    """The card of an editor's repo. It shows `results.png` if anything was measured."""
    config = editor.config
    train_set = hub_id(run.train_facts)
    card_data = _card_data(
        library_name="hf_malmen",
        base_model=hub_id(config.base_model_name_or_path),
        relation="adapter",
        license=run.license,
        datasets=[train_set] if train_set else None,
        pipeline_tag=_PIPELINE_TAGS.get(config.task_type or "CAUSAL_LM"),
        tags=[*_TAGS, config.method],
    )
    settings = {name: value for name, value in run.settings.items() if not name.endswith("_token")}
    return _render(
        "editor",
        card_data=card_data,
        config=config,
        fingerprint=_short(config.base_model_fingerprint),
        run=run,
        n_covariance_tokens=editor.n_covariance_tokens if config.key_covariance else 0,
        plot_file=PLOT_FILE,
        results=_results_table(run.measurements) if run.measurements else None,
        layers=table(
            ["layer", "η", "λ", "κ"],
            [[name, *(f"{scale:.3g}" for scale in scales)] for name, scales in editor.scales().items()],
        ),
        settings=table(["setting", "value"], [[name, escape(value)] for name, value in sorted(settings.items())])
        if settings
        else None,
    )


def hub_results(run: EditorRun) -> list[EvalResultEntry]:
    """The results as entries of the Hub's `.eval_results/*.yaml`; none unless the held-out facts are a data set there.

    A task of the data set is a metric at a number of facts, such as `edit_success_256`.
    """
    dataset = hub_id(run.eval_facts)
    if dataset is None:
        return []
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=f"{name}_{measurement.n_at_once}",
            value=measurement.scores[name],
            date=run.measured_at,
            notes=f"{measurement.n_at_once} facts edited at once, teacher-forced, mean of {count} facts",
        )
        for measurement in run.measurements
        for name, count in measurement.n_facts.items()
    ]


def plot_results(measurements: Sequence[Measurement], path: str | Path) -> None:
    """Edit success, generalization and locality against the number of facts edited at once, as a PNG."""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    # Colours of Okabe & Ito, which the colour-blind tell apart; markers and dashes for those who print in grey.
    styles = {
        "edit_success": ("#0072B2", "o", "-"),
        "generalization": ("#D55E00", "s", "--"),
        "locality": ("#009E73", "^", "-."),
    }
    sizes = sorted(measurement.n_at_once for measurement in measurements)
    for name, (color, marker, dashes) in styles.items():
        points = sorted(
            (m.n_at_once, m.scores[name], *interval(m.scores[name], m.n_facts[name]))
            for m in measurements
            if name in m.n_facts
        )
        if points:
            x, y, low, high = zip(*points, strict=True)
            errors = [[v - a for v, a in zip(y, low, strict=True)], [b - v for v, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, errors, label=METRIC_TITLES[name], color=color, marker=marker, ls=dashes, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="facts edited at once", ylabel="score after the edit", ylim=(0, 1.03))
    axes.set_title("Held-out facts, teacher-forced, with 95 % intervals", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=150, format="png")


def interval(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `n` independent scores in [0, 1].

    It takes their variance to be m (1 − m), which is the most that it can be: that of scores that are all 0 or 1.
    """
    centre = (mean + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n**2))
    return min(mean, centre - half), max(mean, centre + half)  # at 0 and 1 they are equal but for rounding


def _results_table(measurements: Sequence[Measurement]) -> str:
    rows = []
    for name, title in METRIC_TITLES.items():
        for measurement in measurements:
            if name in measurement.n_facts:
                after, count = measurement.scores[name], measurement.n_facts[name]
                low, high = interval(after, count)
                before = measurement.scores[f"{name}_before"]
                size = f"{measurement.n_at_once:,}"
                rows.append([title, size, f"{before:.3f}", f"{after:.3f}", f"{low:.3f} to {high:.3f}", f"{count:,}"])
    return table(["metric", "at once", "before", "after", "95 % interval", "facts"], rows)


# An edit's repo


def render_edit_card(edit: "Edit", *, license: str | None = None) -> str:
    """The card of an edit's repo.

    Args:
        edit: the edit. Its facts are anybody's texts, and shown as texts only.
        license: the edit's licence, as the Hub names it; None says nothing.
    """
    return _render(
        "edit",
        card_data=_card_data(
            library_name="hf_malmen",
            base_model=hub_id(edit.base_model_name_or_path),
            relation="adapter",
            license=license,
            pipeline_tag=_PIPELINE_TAGS["CAUSAL_LM"],
            tags=_TAGS,
        ),
        edit=edit,
        maker=describe_maker(edit.editor),
        fingerprint=_short(edit.base_model_fingerprint),
        facts=_facts_table([(fact.prompt, fact.target) for fact in edit.facts]),
        n_more=max(0, edit.n_facts - min(len(edit.facts), N_FACTS_SHOWN)),
        measured=_measured(edit.measured),
        layers=table(
            ["layer", "keys x values"],
            [[escape(name), "x".join(map(str, shift.shape))] for name, shift in edit.layers.items()],
        ),
    )


def describe_maker(editor: Mapping[str, Any]) -> str:
    """What made an edit, from `Edit.editor`: the method, and the editor's name where it has one."""
    makers = []
    for maker in editor.get("merged", [editor]):
        name = maker.get("name_or_path")
        makers.append(maker.get("method", "an unknown method") + (f" ({name})" if name else ""))
    return ", ".join(dict.fromkeys(makers))


# An edited checkpoint


def render_checkpoint_card(original: str | None, records: Sequence[EditSummary]) -> str:
    """The `README.md` of an edited checkpoint: its text, and a section that says which facts were edited.

    A pure function of its arguments. Outside of the section only front matter changes: it gets the tags
    `model-editing` and `knowledge-editing`, and, where the edited model is on the Hub, `base_model` and
    `base_model_relation: finetune`. Other lines of it stay as they are, comments included. A text without front
    matter, or with front matter that cannot be read, gets the section only.

    Args:
        original: the checkpoint's README, with or without the section of an earlier call, which is replaced; None if it
            has none, for a whole card.
        records: the edits in force, oldest first. With none, the text without the section.

    Returns:
        The new text. `strip_checkpoint_card` takes the section out again; what front matter got stays.
    """
    if not records:
        return strip_checkpoint_card(original or "")
    text = "---\nlibrary_name: transformers\n---\n\n# Edited model\n" if original is None else original
    text = _extend_front_matter(strip_checkpoint_card(text), records[0].base_model)
    rows = [
        [
            escape(record.id),
            escape(record.created_at),
            f"{record.n_facts:,}",
            escape(record.editor),
            escape(_short(record.base_model_fingerprint)),
            escape(record.hf_malmen_version),
            _measured(record.measured) or "not measured",
        ]
        for record in records
    ]
    section = _render(
        "checkpoint",
        begin=SECTION_BEGIN,
        end=SECTION_END,
        n_facts=sum(record.n_facts for record in records),
        n_replaced=sum(record.n_replaced for record in records),
        n_edits=len(records),
        base_model=escape(records[0].base_model) if records[0].base_model else None,
        edits=table(
            ["edit", "date", "facts", "editor", "base fingerprint", "hf_malmen", "measured after the edit"], rows
        ),
        facts=[
            (escape(record.id), _facts_table(record.facts), max(0, record.n_facts - len(record.facts[:N_FACTS_SHOWN])))
            for record in records
            if record.facts
        ],
    )
    # One line break before the section, of the text's own kind: `strip_checkpoint_card` takes exactly that away.
    line_break = "\r\n" if "\r\n" in text or text.endswith("\r") else "\n"
    return text + (f"\n{section}").replace("\n", line_break)


def strip_checkpoint_card(text: str) -> str:
    """`text` without the section of `render_checkpoint_card`; all else stays, character for character."""
    return _SECTION.sub("", text)


def _extend_front_matter(text: str, base_model: str | None) -> str:
    """`text` with our fields in its front matter, or as it is if it has none that can be read.

    Only the lines of these fields are written. To load and dump the whole would lose comments, and make `language: no`
    a `false`.
    """
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return text
    block, line_break = match.group(2), "\r\n" if "\r\n" in match.group(1) else "\n"
    try:
        before = yaml.safe_load(block) or {}
        if not isinstance(before, dict):
            return text
        if not before:  # the Hub's own template has an empty mapping under its comments
            block = block.rstrip().removesuffix("{}").rstrip()
        tags = before.get("tags") or []
        tags = tags if isinstance(tags, list) else [tags]
        fields: dict[str, Any] = {"tags": tags + [tag for tag in _TAGS if tag not in tags]}
        if base_model is not None and _is_repo_id(base_model):
            fields |= {"base_model": base_model, "base_model_relation": "finetune"}
        for name, value in fields.items():
            if before.get(name) != value:
                block = _set_field(block, name, value, line_break)
        if yaml.safe_load(block) != {**before, **fields}:  # by anchors, say: rather no field than a broken one
            return text
    except (yaml.YAMLError, ValueError):
        return text
    return text[: match.start(2)] + block + text[match.end(2) :]


def _set_field(block: str, name: str, value: Any, line_break: str) -> str:
    """The YAML mapping `block` with one field set; a list that grows keeps the lines it has.

    Raises:
        yaml.YAMLError: `block` is not YAML any more.
    """
    line = CardData(**{name: value}).to_yaml(line_break=line_break)
    tree = yaml.compose(block, Loader=yaml.SafeLoader)
    for key, old in tree.value if tree else ():
        if key.value != name:
            continue
        # The end mark of an indented list is where the next field begins; that of its last item is where it ends.
        items = old.value if isinstance(old, yaml.SequenceNode) else []
        if items and isinstance(value, list):
            at = items[-1].end_mark.index
            glue = ", " if old.flow_style else f"{line_break}{' ' * old.start_mark.column}- "
            return block[:at] + "".join(f"{glue}{item}" for item in value[len(items) :]) + block[at:]
        end = items[-1] if items and not old.flow_style else old
        return block[: key.start_mark.index] + line + block[end.end_mark.index :]
    return block + (line_break if block else "") + line


# What all cards share


def escape(text: object) -> str:
    """`text` as one line of plain Markdown text, for a table cell too: it shows as it is, and is no markup.

    Special characters become HTML entities, which no Markdown reads as markup, where a backslash before a backslash
    would start a formula on the Hub. Any white space becomes one space; control characters, single surrogates and
    direction overrides become U+FFFD; what is longer than a cell is cut with an ellipsis.
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= _MAX_CELL else line[: _MAX_CELL - 1] + "…"
    line = "".join("\ufffd" if _is_hidden(character) else character for character in line)
    return _MARKDOWN.sub(lambda match: f"&#{ord(match.group())};", line)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a repo on the Hub; None for a file or folder, which means nothing there."""
    return name if name is not None and _is_repo_id(name) and not Path(name).exists() else None


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDI_CONTROLS


def _short(fingerprint: str | None) -> str:
    return fingerprint[:16] if fingerprint else "none"


def _measured(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{escape(METRIC_TITLES.get(name, name))} {score:.3f}" for name, score in scores.items())


def _facts_table(facts: Sequence[tuple[str, str]]) -> str:
    return table(["prompt", "new answer"], [[escape(text) for text in fact] for fact in facts[:N_FACTS_SHOWN]])


def _card_data(*, base_model: str | None, relation: str, **fields: Any) -> str:
    """Front matter as YAML, without the fields that are None."""
    data = ModelCardData(base_model=base_model, base_model_relation=relation if base_model else None, **fields)
    return data.to_yaml()


def _render(name: str, **values: Any) -> str:
    template = files("hf_malmen.model_cards").joinpath(f"{name}.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"escape": escape, "python": lambda text: json.dumps(text, ensure_ascii=False)}
    return environment.from_string(template).render(version=__version__, **values)
