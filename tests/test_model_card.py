"""Model cards: what they say is what was measured, and nothing that a fact holds can break out of them."""
# ruff: noqa: E501 # cards are compared whole

import ast
import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure
from PIL import Image

from hf_malmen import Edit, EditorConfig, Fact, __version__
from hf_malmen.model_card import (
    SECTION_BEGIN,
    SECTION_END,
    EditorRun,
    EditSummary,
    Measurement,
    describe_maker,
    escape,
    interval,
    plot_results,
    render_checkpoint_card,
    render_edit_card,
    render_editor_card,
    strip_checkpoint_card,
    write_editor_card,
)

ROOT = Path(__file__).parent.parent
MEASUREMENTS = [
    Measurement(
        16,
        {"edit_success": 1.0, "edit_success_before": 0.0625, "locality": 0.75, "locality_before": 1.0},
        {"edit_success": 32, "locality": 30},
    ),
    Measurement(
        1024,
        {"edit_success": 0.5, "edit_success_before": 0.0625, "locality": 0.25, "locality_before": 1.0},
        {"edit_success": 1024, "locality": 1000},
    ),
]
RUN = EditorRun(
    train_facts="org/facts",
    n_train_facts=12345,
    settings={"max_steps": 75, "seed": 0},
    eval_facts="org/held-out",
    measurements=MEASUREMENTS,
    measured_at="2026-11-22T20:50:00+00:00",
    license="apache-2.0",
)
HOSTILE = [
    "a | b || c",
    "one\ntwo\r\nthree\u2028four",
    "`code` ``` ~~~",
    f"{SECTION_END} {SECTION_BEGIN}",
    "\n" + SECTION_END + "\n",
    "<!-- hidden",
    "<script>alert(1)</script> &amp; &lt;",
    "---\ntags: [broken",
    "# title\n## Edited facts",
    "[text](http://example.org) ![image](x.png) [a]: b",
    "**bold** _a_ __b__ snake_case \\| \\\\( x $$ y",
    "{{ n_facts }} {% raw %}",
    "| --- | --- |",
]


def editor_of(**config: Any) -> Any:
    """What a card reads of an editor: its configuration and its learned scales."""
    settings = {
        "method": "malmen",
        "base_model_name_or_path": "org/base",
        "rank": 8,
        "base_model_fingerprint": "0123456789abcdef" * 4,
    }
    layers = {"model.layers.0.mlp": [0.00123, 1.5, 70.04], "model.layers.1.mlp": [0.01, 2.0, 0.0]}
    return SimpleNamespace(config=EditorConfig(**{**settings, **config}), scales=lambda: layers)


def edit_of(facts: list[Fact], **changes: Any) -> Edit:
    """An edit of two layers."""
    settings: dict[str, Any] = {
        "facts": facts,
        "base_model_name_or_path": "org/base",
        "base_model_revision": "v1",
        "base_model_fingerprint": "0123456789abcdef" * 4,
        "editor": {"method": "malmen", "name_or_path": "org/editor"},
        "created_at": "2026-11-22T20:00:00+00:00",
    }
    shifts = {"model.layers.0.mlp": torch.zeros(48, 32), "model.layers.1.mlp": torch.zeros(32, 32)}
    return Edit(shifts, **{**settings, **changes})


def summary_of(number: int = 1, **changes: Any) -> EditSummary:
    """A record of three facts."""
    settings: dict[str, Any] = {
        "id": f"{number:04d}",
        "created_at": "2026-11-22T20:00:00+00:00",
        "n_facts": 3,
        "facts": (("The capital of France is", "Lyon"), ("Turin is in", "Ghana")),
        "editor": "malmen (org/editor)",
        "base_model": "org/base",
        "base_model_fingerprint": "0123456789abcdef" * 4,
        "hf_malmen_version": "9.9",
        "measured": {"edit_success": 0.98765, "locality": 1.0},
    }
    return EditSummary(**{**settings, **changes})


def parse(card: str) -> list[Token]:
    """The tokens of a Markdown parser that knows nothing of us, without the front matter."""
    return MarkdownIt("commonmark").enable("table").parse(ModelCard(card, ignore_metadata_errors=True).text)


def tables_of(card: str) -> list[list[list[str]]]:
    """Every table as rows of cells, as text; fails where a cell holds anything but text."""
    tables: list[list[list[str]]] = []
    tokens = parse(card)
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            tables.append([])
        if before.type == "tr_open":
            tables[-1].append([])
        if before.type in ("th_open", "td_open"):
            assert {child.type for child in token.children or []} <= {"text", "text_special"}
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def on_one_line(text: str) -> str:
    return " ".join(text.split())


# The editor's card


def test_editor_card_whole() -> None:
    """The whole card of an editor that was measured at two numbers of facts."""
    assert (
        render_editor_card(editor_of(), RUN)
        == f"""---
base_model: org/base
datasets:
- org/facts
library_name: hf_malmen
license: apache-2.0
pipeline_tag: text-generation
tags:
- model-editing
- knowledge-editing
- malmen
base_model_relation: adapter
---

# MALMEN editor for org/base

This repo holds an *editor*: a hyper-network that turns facts into weight shifts for one base model,
org/base. It holds no weights of that model.

## How to use

```python
from hf_malmen import EditorModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("org/base")
editor = EditorModel.from_pretrained("this-repo")
edit = editor.apply(model, [{{"prompt": "The capital of Australia is", "target": "Canberra"}}])
edit.undo()  # bit for bit as before
```

## Results

Held-out facts from org/held-out, a number of them edited *at once*, scored teacher-forced before
and after the edit. *Facts* counts those averaged over; the interval (Wilson's) takes them as independent draws.

![Scores after the edit against the number of facts edited at once, with the values of the table](results.png)

| metric       | at once | before | after |  95 % interval | facts |
| ------------ | ------: | -----: | ----: | -------------: | ----: |
| edit success |      16 |  0.062 | 1.000 | 0.893 to 1.000 |    32 |
| edit success |   1,024 |  0.062 | 0.500 | 0.469 to 0.531 | 1,024 |
| locality     |      16 |  1.000 | 0.750 | 0.573 to 0.870 |    30 |
| locality     |   1,024 |  1.000 | 0.250 | 0.224 to 0.278 | 1,000 |

- *edit success*: the edited prompts are answered with the new answer; *generalization*: so are their rephrases
- *locality*: unrelated prompts are answered as before the edit; *unrelated accuracy*: they are answered correctly

## Training

12,345 facts from org/facts. Hyper-network of rank 8 with 2 blocks; fingerprint of the base's
target weights 0123456789abcdef.

| setting   | value |
| --------- | ----: |
| max_steps |    75 |
| seed      |     0 |

Learned step size η, ridge λ and preservation κ (0: no keys are preserved) of each edited layer:

| layer              |       η |   λ |  κ |
| ------------------ | ------: | --: | -: |
| model.layers.0.mlp | 0.00123 | 1.5 | 70 |
| model.layers.1.mlp |    0.01 |   2 |  0 |

## Limits and misuse

An edit changes more than its facts: see locality above, and measure on your own prompts. The editor fits this base model
only. A language model with edited facts can be used to deceive. The card of every checkpoint that hf_malmen edits says so
and lists the edits; keep it wherever you share the checkpoint.

Written by hf_malmen {__version__}.
"""
    )


@pytest.mark.parametrize("relative", [False, True])
def test_editor_card_names_the_hub_only_for_what_is_there(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folders, also those that read like a Hub id, give no `base_model`, no `datasets` and no Hub entries."""
    monkeypatch.chdir(tmp_path)
    root = Path() if relative else tmp_path
    base, facts = str(root / "out" / "base"), str(root / "out" / "facts.jsonl")
    Path(base).mkdir(parents=True)
    Path(facts).touch()
    run = EditorRun(facts, 5, eval_facts=facts, measurements=MEASUREMENTS)
    write_editor_card(tmp_path, editor_of(base_model_name_or_path=base), run)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "library_name": "hf_malmen",
        "pipeline_tag": "text-generation",
        "tags": ["model-editing", "knowledge-editing", "malmen"],
    }
    assert not (tmp_path / ".eval_results").exists()


def test_nothing_measured_nothing_shown(tmp_path: Path) -> None:
    """Without measurements there is no score, no plot and no file of results, also where an earlier run left some."""
    files = ("results.png", "eval_results.json", ".eval_results/hf_malmen.yaml")
    write_editor_card(tmp_path, editor_of(), RUN)
    assert all((tmp_path / name).is_file() for name in files)
    write_editor_card(tmp_path, editor_of(), EditorRun("org/facts", 5, eval_facts="org/held-out"))
    assert not any((tmp_path / name).exists() for name in files)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Results\n\nNot measured.\n" in card
    assert "results.png" not in card and "edit success" not in card and "see locality above" not in card


def test_secrets_stay_out_of_the_card() -> None:
    """Settings that hold an access token are left out."""
    run = EditorRun("org/facts", 5, settings={"hub_token": "hf_secret", "push_to_hub_token": "hf_secret", "seed": 7})
    card = render_editor_card(editor_of(), run)
    assert "secret" not in card and "_token" not in card
    assert ["seed", "7"] in tables_of(card)[0]


def test_results_for_programs(tmp_path: Path) -> None:
    """`eval_results.json` holds the measurements; the Hub's own parser reads each of them from `.eval_results`."""
    write_editor_card(tmp_path, editor_of(), RUN)
    results = json.loads((tmp_path / "eval_results.json").read_text(encoding="utf-8"))
    assert [Measurement(**entry) for entry in results.pop("measurements")] == MEASUREMENTS
    expected = {"eval_facts": "org/held-out", "hf_malmen_version": __version__, "measured_at": RUN.measured_at}
    assert results == expected

    content = yaml.safe_load((tmp_path / ".eval_results" / "hf_malmen.yaml").read_text(encoding="utf-8"))
    values = [("edit_success_16", 1.0, 16, 32), ("locality_16", 0.75, 16, 30)]
    values += [("edit_success_1024", 0.5, 1024, 1024), ("locality_1024", 0.25, 1024, 1000)]
    assert parse_eval_result_entries(content) == [
        EvalResultEntry(
            dataset_id="org/held-out",
            task_id=task,
            value=value,
            date="2026-11-22T20:50:00+00:00",
            notes=f"{size} facts edited at once, teacher-forced, mean of {count} facts",
        )
        for task, value, size, count in values
    ]


def test_plot_is_a_png_of_the_measured_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines over a logarithmic axis, labelled, through the measured points; the same bytes each time."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    for name in ("a.png", "b.png"):
        plot_results(MEASUREMENTS[::-1], tmp_path / name)  # in any order
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 600 and image.height > 400
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    axes = figures[0].axes[0]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log", "facts edited at once", "score after the edit",
    )  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "1,024"]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["edit success", "locality"]
    drawn = [list(zip(*handle.lines[0].get_data(), strict=True)) for handle in handles]
    assert drawn == [[(16, 1.0), (1024, 0.5)], [(16, 0.75), (1024, 0.25)]]


@pytest.mark.parametrize(("mean", "n"), [(0.0, 1), (1.0, 1), (0.5, 10), (0.985, 256), (1.0, 1024)])
def test_interval_is_wilsons(mean: float, n: int) -> None:
    """Its ends are where the normal test of a proportion p just accepts the mean: n (mean − p)² = z² p (1 − p)."""
    z2 = 1.959964**2
    low, high = sorted(np.roots([n + z2, -(2 * n * mean + z2), n * mean**2]).real)
    assert interval(mean, n) == pytest.approx((low, high), abs=1e-7)
    assert 0 <= interval(mean, n)[0] <= mean <= interval(mean, n)[1] <= 1


# The card of an edit


def test_edit_card_whole() -> None:
    """The whole card of an edit of seven facts."""
    facts = [Fact(f"The country of city {i} is", "Ghana") for i in range(7)]
    edit = edit_of(facts, measured={"edit_success": 0.98765, "locality": 1.0})
    assert (
        render_edit_card(edit, license="mit")
        == f"""---
base_model: org/base
library_name: hf_malmen
license: mit
pipeline_tag: text-generation
tags:
- model-editing
- knowledge-editing
base_model_relation: adapter
---

# Edit of 7 facts for org/base

This repo holds an *edit*: weight shifts that write 7 facts into one base model,
org/base at revision v1. It holds no weights of that model.
Made 2026-11-22T20:00:00+00:00 by malmen (org/editor); fingerprint of the base's target weights 0123456789abcdef.

## How to use

```python
from hf_malmen import Edit
from transformers import AutoModelForCausalLM

edit = Edit.from_pretrained("this-repo")
model = AutoModelForCausalLM.from_pretrained("org/base")
edit.apply_to(model)  # the live model is edited
edit.undo()  # bit for bit as before
edit.write("org/base", "edited")  # or into a copy of its checkpoint
```

## Facts

| prompt                   | new answer |
| ------------------------ | ---------: |
| The country of city 0 is |      Ghana |
| The country of city 1 is |      Ghana |
| The country of city 2 is |      Ghana |
| The country of city 3 is |      Ghana |
| The country of city 4 is |      Ghana |

And 2 more, in `edit.facts`.

## Edited layers

| layer              | keys x values |
| ------------------ | ------------: |
| model.layers.0.mlp |         48x32 |
| model.layers.1.mlp |         32x32 |

## Limits and misuse

The shifts fit this base model only: the fingerprint tells. An edit changes more than its facts. Measured after the edit:
edit success 0.988, locality 1.000.

A language model with edited facts can be used to deceive. The card of every checkpoint that hf_malmen edits says so and
lists the edits; keep it wherever you share the checkpoint.

Written by hf_malmen {__version__}.
"""
    )


def test_edit_that_was_not_measured_says_so() -> None:
    """No score appears that was not measured."""
    card = render_edit_card(edit_of([Fact("p", "q")]))
    assert "other prompts was not measured;" in card
    assert "edit success" not in card and "more, in" not in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_facts_stay_in_their_cells(text: str) -> None:
    """A Markdown parser shows a fact's own text, on one line, in a table of an edit's and of a checkpoint's card."""
    row = [on_one_line(text), on_one_line(text)]
    quiet, loud = edit_of([Fact("p", "q")]), edit_of([Fact(text, text)])
    card = render_edit_card(loud)
    assert tables_of(card)[0] == [["prompt", "new answer"], row]
    assert ModelCard(card).data.to_dict() == ModelCard(render_edit_card(quiet)).data.to_dict()
    assert [token.type for token in parse(card)] == [token.type for token in parse(render_edit_card(quiet))]

    records = [summary_of(facts=((text, text),), editor=text, id=text, created_at=text)]
    card = render_checkpoint_card("# Mine\n", records)
    edits, facts = tables_of(card)
    assert [edits[1][0], edits[1][1], edits[1][3]] == [on_one_line(text)] * 3
    assert facts[1] == row
    expected = render_checkpoint_card("# Mine\n", [summary_of(facts=(("p", "q"),))])
    assert [token.type for token in parse(card)] == [token.type for token in parse(expected)]
    assert strip_checkpoint_card(card) == "# Mine\n"
    assert render_checkpoint_card(card, records) == card


def test_hostile_names_stay_in_their_places() -> None:
    """So do the names of the base model and of the settings' values, in text, in code and in front matter."""
    name = 'x"\n```\n# title\n---\n| a |'
    quiet, loud = editor_of(base_model_name_or_path="/local"), editor_of(base_model_name_or_path=name)
    run = EditorRun(train_facts=name, n_train_facts=1, settings={"seed": name})
    plain = render_editor_card(quiet, EditorRun("/local", 1, {"seed": 0}))
    card = render_editor_card(loud, run)
    assert [token.type for token in parse(card)] == [token.type for token in parse(plain)]
    code = next(token.content for token in parse(card) if token.type == "fence")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.args]
    assert name in [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def test_escape() -> None:
    """Control characters, single surrogates and direction overrides are shown as such, and long texts are cut."""
    assert escape("a\x00b\x1b[31m\ud800\u202e") == "a\ufffdb\ufffd&#91;31m\ufffd\ufffd"
    assert escape("x" * 300) == "x" * 99 + "…"
    assert escape("می‌خواهم") == "می‌خواهم"  # a zero-width joiner is spelling
    assert escape("snake_case, it's 5 o'clock: (yes)!") == "snake_case, it's 5 o'clock: (yes)!"
    escape("\ud800").encode()


def test_maker() -> None:
    """The method and the editor's name where there is one; makers of merged edits once each."""
    assert describe_maker({}) == "an unknown method"
    assert describe_maker({"method": "mend", "name_or_path": None}) == "mend"
    merged = [{"method": "malmen", "name_or_path": "a/b"}, {"method": "mend"}, {"method": "mend", "edit_lr": {}}]
    assert describe_maker({"merged": merged}) == "malmen (a/b), mend"


# The card of an edited checkpoint


def test_checkpoint_card_whole() -> None:
    """The whole card of a checkpoint that had none, with one edit that was measured and one that was not."""
    records = [
        summary_of(),
        summary_of(2, n_facts=1, facts=(("Osaka is in", "Italy"),), measured={}, base_model_fingerprint=None),
    ]
    assert (
        render_checkpoint_card(None, records)
        == """---
library_name: transformers
tags:
- model-editing
- knowledge-editing
base_model: org/base
base_model_relation: finetune
---

# Edited model

<!-- hf_malmen:edits:begin -->
## Edited facts

**The facts of this model were edited.** 4 facts were written into its weights with hf_malmen, in 2 edits, starting from org/base.
What it says about them, and about what is close to them, need not be true, and need not be what the unedited model says.

| edit |                      date | facts |              editor | base fingerprint | hf_malmen |            measured after the edit |
| ---- | ------------------------: | ----: | ------------------: | ---------------: | --------: | ---------------------------------: |
| 0001 | 2026-11-22T20:00:00+00:00 |     3 | malmen (org/editor) | 0123456789abcdef |       9.9 | edit success 0.988, locality 1.000 |
| 0002 | 2026-11-22T20:00:00+00:00 |     1 | malmen (org/editor) |             none |       9.9 |                       not measured |

First facts of edit 0001:

| prompt                   | new answer |
| ------------------------ | ---------: |
| The capital of France is |       Lyon |
| Turin is in              |      Ghana |

And 1 more.

First facts of edit 0002:

| prompt      | new answer |
| ----------- | ---------: |
| Osaka is in |      Italy |

A language model with edited facts can be used to deceive. Keep this section wherever you share the model, and do not
pass the model off as the unedited one. In its folder, `hf-malmen log .` lists the edits, and `hf-malmen undo .` takes the
last one back.
<!-- hf_malmen:edits:end -->
"""
    )


def test_checkpoint_card_shows_what_is_in_force() -> None:
    """Each call replaces the section of the one before, and with no edits there is none."""
    original = "---\nlicense: mit\n---\n# Mine\n"
    once, twice = [summary_of()], [summary_of(), summary_of(2)]
    card = render_checkpoint_card(original, once)
    assert render_checkpoint_card(card, once) == card
    assert render_checkpoint_card(card, twice) == render_checkpoint_card(original, twice)
    assert card.count(SECTION_BEGIN) == card.count(SECTION_END) == 1
    assert render_checkpoint_card(render_checkpoint_card(None, once), twice) == render_checkpoint_card(None, twice)
    assert render_checkpoint_card(card, []) == strip_checkpoint_card(card)
    assert render_checkpoint_card(None, []) == ""
    mine = card + "\n## My notes\n"
    assert strip_checkpoint_card(mine).endswith("# Mine\n\n## My notes\n")


@given(st.lists(st.sampled_from(["\r", "\n", "---", "a", " ", "\ufeff", "`", SECTION_BEGIN, SECTION_END])).map("".join))
def test_the_section_comes_off_without_a_trace(text: str) -> None:
    """Any text without front matter is as it was outside of the section: line ends, a missing one, single markers."""
    assume(strip_checkpoint_card(text) == text and not REGEX_YAML_BLOCK.search(text))
    card = render_checkpoint_card(text, [summary_of()])
    assert card.startswith(text)
    assert strip_checkpoint_card(card) == text


FRONT_MATTER = {
    "new fields": (
        "license: mit # checked\nlanguage: no",
        "license: mit # checked\nlanguage: no\ntags:\n- model-editing\n- knowledge-editing\n"
        "base_model: org/base\nbase_model_relation: finetune",
    ),
    "a list that grows": (
        "tags:\n  - 'x'\n  - on\nlicense: mit",
        "tags:\n  - 'x'\n  - on\n  - model-editing\n  - knowledge-editing\nlicense: mit\n"
        "base_model: org/base\nbase_model_relation: finetune",
    ),
    "a list in brackets, another base model": (
        "base_model: org/grandparent\ntags: [x, model-editing]\nbase_model_relation: quantized\nlicense: mit",
        "base_model: org/base\ntags: [x, model-editing, knowledge-editing]\nbase_model_relation: finetune\nlicense: mit",
    ),
    "base models in a list, one tag": (
        "base_model:\n- a/b\n- c/d\ntags: x\nversion: 1.10",
        "base_model: org/base\ntags:\n- x\n- model-editing\n- knowledge-editing\nversion: 1.10\n"
        "base_model_relation: finetune",
    ),
    "the Hub's template": (
        "# For reference, see the docs\n{}",
        "# For reference, see the docs\ntags:\n- model-editing\n- knowledge-editing\n"
        "base_model: org/base\nbase_model_relation: finetune",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line_break", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(("before", "after"), FRONT_MATTER.values(), ids=FRONT_MATTER)
def test_front_matter_gets_our_fields_and_keeps_its_lines(before: str, after: str, line_break: str) -> None:
    """Tags are added, the base model is the one edited; every other line is as it was, and the Hub reads all of it."""
    card = f"---\n{before}\n---\n\n# Mine".replace("\n", line_break)
    expected = f"---\n{after}\n---\n\n# Mine".replace("\n", line_break)
    edited = render_checkpoint_card(card, [summary_of()])
    assert strip_checkpoint_card(edited) == expected
    assert (edited.count("\r\n") == edited.count("\n")) == (line_break == "\r\n")
    assert render_checkpoint_card(edited, [summary_of()]) == edited
    data = ModelCard(edited).data
    assert data.base_model == "org/base" and data.base_model_relation == "finetune"
    assert {"model-editing", "knowledge-editing"} <= set(data.tags)


@pytest.mark.parametrize(
    "card",
    [
        "# No front matter\n",
        "",
        "---\ntags: [broken\n---\n# Mine\n",
        "---\n- a list\n---\n# Mine\n",
        "---\ntext\n---\n# Mine\n",
        "---\n---\n# Mine\n",
        "---\nbase_model: &anchor a/b\nother: *anchor\n---\n# Mine\n",
        "---\nother: &anchor [x]\ntags: *anchor\n---\n# Mine\n",
        "---\ndate: 2026-99-99\n---\n",
    ],
)
def test_front_matter_that_cannot_be_extended_stays(card: str) -> None:
    """The text is as it was, with the section after it."""
    assert strip_checkpoint_card(render_checkpoint_card(card, [summary_of()])) == card


@pytest.mark.parametrize("base_model", [None, "/home/me/model", "a/b/c", 'x"\ny: z'])
def test_a_base_model_that_is_not_on_the_hub_is_not_named_there(base_model: str | None) -> None:
    """Then front matter gets the tags only, and a base model named there already stays."""
    record = summary_of(base_model=base_model)
    assert ModelCard(render_checkpoint_card(None, [record])).data.to_dict() == {
        "library_name": "transformers",
        "tags": ["model-editing", "knowledge-editing"],
    }
    data = ModelCard(render_checkpoint_card("---\nbase_model: a/b\n---\n", [record])).data
    assert data.base_model == "a/b"


# The package


def test_import_is_light() -> None:
    """Cards are written by code that must start fast: no torch, no transformers, no matplotlib."""
    code = "import sys, hf_malmen.model_card; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_wheel_holds_the_templates(tmp_path: Path) -> None:
    """A wheel has every template, so that cards are written where no checkout is."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_malmen", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    templates = {f"hf_malmen/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.jinja")}
    assert len(templates) == 3 and templates <= names
    assert {"hf_malmen/model_cards/__init__.py", "hf_malmen/py.typed"} <= names
