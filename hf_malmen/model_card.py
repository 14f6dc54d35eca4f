"""Measured values -> the model card of an editor's repo."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from .modeling import EditorModel
from .report import METRIC_TITLES, table
from .version import __version__


def write_editor_card(
    folder: str | Path,
    editor: EditorModel,
    *,
    metrics: Mapping[str, float],
    training: Mapping[str, Any],
    train_facts: str,
    n_train_facts: int,
    n_facts_at_once: int,
) -> Path:
    """Write `README.md` beside a saved editor.

    Args:
        folder: the editor's folder.
        editor: the editor.
        metrics: scores of `EditorModel.evaluate` on held-out facts; may be empty.
        training: hyper-parameters as given.
        train_facts: where the training facts came from.
        n_train_facts: how many there were.
        n_facts_at_once: held-out facts edited at once for `metrics`.

    Returns:
        The card's path.
    """
    text = render_editor_card(editor, metrics, training, train_facts, n_train_facts, n_facts_at_once)
    path = Path(folder) / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def render_editor_card(
    editor: EditorModel,
    metrics: Mapping[str, float],
    training: Mapping[str, Any],
    train_facts: str,
    n_train_facts: int,
    n_facts_at_once: int,
) -> str:
    """The card's text; arguments as in `write_editor_card`."""
    config = editor.config
    data = ModelCardData(
        library_name="hf_malmen",
        # A folder on somebody's disk means nothing on the Hub.
        base_model=config.base_model_name_or_path if _is_hub_id(config.base_model_name_or_path) else None,
        base_model_relation="adapter" if _is_hub_id(config.base_model_name_or_path) else None,
        license="apache-2.0",
        tags=["model-editing", "knowledge-editing", config.method],
    )
    scores = [
        [title, f"{metrics[f'{name}_before']:.3f}", f"{metrics[name]:.3f}"]
        for name, title in METRIC_TITLES.items()
        if name in metrics
    ]
    layers = [[name, *(f"{scale:.3g}" for scale in scales)] for name, scales in editor.scales().items()]
    template = files("hf_malmen.model_cards").joinpath("editor.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(
        card_data=data.to_yaml(),
        config=config,
        scores=table(["metric", "before", "after"], scores) if scores else None,
        layers=table(["layer", "η", "λ", "κ"], layers),
        training=table(["setting", "value"], [[name, str(value)] for name, value in sorted(training.items())]),
        train_facts=train_facts,
        n_train_facts=n_train_facts,
        n_facts_at_once=n_facts_at_once,
        version=__version__,
    )


def _is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") <= 1 and not Path(name).exists()
