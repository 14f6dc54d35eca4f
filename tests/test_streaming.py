"""Facts that are read as they are needed give the edit that a list gives, and are never held."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import Edit, Fact, FactError, FactStream

Build = Callable[..., Any]


@pytest.fixture
def file(make_facts: Build, tmp_path: Path) -> Path:
    """Three hundred facts, one a line."""
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in make_facts(300)), encoding="utf-8")
    return path


@pytest.mark.parametrize("facts_per_turn", [None, 120])
def test_the_edit_of_a_stream_is_that_of_a_list(
    model: PreTrainedModel,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    file: Path,
    facts_per_turn: int | None,
    tmp_path: Path,
) -> None:
    """Up to rounding; it knows how many facts there were, and the first of them, also when it is loaded again."""
    editor = make_editor(model)
    expected = editor.apply(model, str(file), tokenizer, facts_per_turn=facts_per_turn)
    expected.undo()
    edit = editor.apply(model, FactStream(file), tokenizer, batch_size=4, facts_per_turn=facts_per_turn)
    edit.undo()
    for name, shift in expected.shifts.items():
        torch.testing.assert_close(edit.shifts[name], shift, rtol=1e-4, atol=1e-5 * shift.abs().max().item())
    assert edit.n_facts == expected.n_facts == 300
    assert edit.facts == expected.facts[:5]
    loaded = Edit.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    assert (loaded.n_facts, loaded.facts) == (300, edit.facts)
    assert "295 more" in (tmp_path / "edit" / "README.md").read_text(encoding="utf-8")


def test_facts_of_a_stream_are_not_held(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, file: Path
) -> None:
    """At any time only a few facts are alive; counted by the garbage collector while the stream is read."""
    model = make_llama()
    alive: list[int] = []

    class Counted(FactStream):
        def __iter__(self) -> Any:
            for number, fact in enumerate(super().__iter__()):
                if number % 50 == 0:
                    gc.collect()
                    alive.append(sum(isinstance(entry, Fact) for entry in gc.get_objects()))
                yield fact

    make_editor(model).make_edit(model, Counted(file), tokenizer, batch_size=4)
    assert len(alive) == 12  # two passes: one that counts and checks, one that traces
    assert max(alive) - alive[0] < 10


def test_a_stream_cannot_be_measured(
    make_llama: Build, make_editor: Build, tokenizer: PreTrainedTokenizerFast, file: Path
) -> None:
    """Which would read it again, and hold the answers to all of it."""
    model = make_llama()
    with pytest.raises(ValueError, match=r"Leave out measure \(--measure\), or give the facts as a list or file"):
        make_editor(model).apply(model, FactStream(file), tokenizer, measure=True)


def test_a_stream_counts_where_that_is_cheap(file: Path, make_facts: Build) -> None:
    """A file by reading it, which finds a bad fact; a sequence by its length; anything else not at all."""
    assert FactStream(file).count() == 300
    assert FactStream(make_facts(7)).count() == 7

    class Unknown:
        def __iter__(self) -> Any:
            return iter(make_facts(3))

    assert FactStream(Unknown()).count() is None
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"prompt": "", "target": "Rome"}\n')
    with pytest.raises(FactError, match=r"Fact 300 has an empty prompt"):
        FactStream(file).count()


@pytest.mark.parametrize("streamed", [True, False])
def test_progress_knows_how_much_is_left(
    streamed: bool,
    make_llama: Build,
    make_editor: Build,
    tokenizer: PreTrainedTokenizerFast,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of facts and of layers: bars are given their whole, and reach it."""
    bars: list[tuple[str, Any, list[int]]] = []

    class Bar:
        def __init__(self, iterable: Any = (), total: int | None = None, desc: str = "", **_: Any) -> None:
            self.iterable, self.steps = iterable, list[int]()
            bars.append((desc, len(iterable) if total is None else total, self.steps))

        def __iter__(self) -> Any:
            for entry in self.iterable:
                yield entry
                self.steps.append(1)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, n: int) -> None:
            self.steps.append(n)

    monkeypatch.setattr("transformers.utils.logging.tqdm", Bar)
    model = make_llama()
    editor = make_editor(model)
    editor.make_edit(model, FactStream(file) if streamed else str(file), tokenizer, batch_size=32)
    n_layers = len(editor.module_names)
    assert [(desc, total, sum(steps)) for desc, total, steps in bars] == [
        (f"Tracing {n_layers} layers", 300, 300),
        ("Solving", n_layers, n_layers),
    ]
