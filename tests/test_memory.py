"""A solve within a given memory gives the same edit, and an interrupted one leaves everything as it was."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_malmen.edit
import hf_malmen.host
import hf_malmen.makers
import hf_malmen.memory
from hf_malmen import EditorConfig, EditorModel, Fact
from hf_malmen.least_squares import PrimalSolution, RidgeLeastSquares, aggregator, state_bytes
from hf_malmen.memory import parse_memory, plan_groups, traces_by_group
from hf_malmen.tracing import Trace

Build = Callable[..., Any]
GIB = 2**30


@pytest.mark.parametrize(
    ("given", "expected"), [("8GiB", 8 * GIB), ("500MB", 500 * 10**6), (123, 123), ("123", 123), (None, None)]
)
def test_memory_is_a_number_or_a_text(given: int | str | None, expected: int | None) -> None:
    """As accelerate reads it, and plain numbers from a command line."""
    assert parse_memory(given) == expected


@pytest.mark.parametrize("given", ["8 elephants", "", 0, -5, "0GiB", 2.5, True])
def test_other_memory_is_refused(given: Any) -> None:
    """With what is expected."""
    with pytest.raises(ValueError, match=r"max_memory is .*expected a number of bytes above 0, or a text such as"):
        parse_memory(given)


def test_groups_are_filled_in_order() -> None:
    """Each holds as much as it may; without a limit there is one."""
    sizes = {"a": 3, "b": 4, "c": 2, "d": 6, "e": 1}
    assert plan_groups(sizes, None) == [["a", "b", "c", "d", "e"]]
    assert plan_groups(sizes, 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_groups(sizes, 16) == [["a", "b", "c", "d", "e"]]
    assert plan_groups(sizes, 6) == [["a"], ["b", "c"], ["d"], ["e"]]
    with pytest.raises(ValueError, match=r"least squares of d takes .* give max_memory=6 or more"):
        plan_groups(sizes, 5)


@pytest.mark.parametrize("aggregation", ["least_squares", "sum"])
@pytest.mark.parametrize("n", [300, 1000, 3000])
def test_the_state_is_not_larger_than_planned(aggregation: str, n: int) -> None:
    """Bytes of all tensors that the aggregation creates, counted by the allocator, beside the planned ones."""
    shape = (700, 200)
    batches = [[torch.randn(100, size) for size in shape] for _ in range(n // 100)]
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        rows = aggregator(aggregation, "layer", n)
        for keys, differences in batches:
            rows.add(keys.clone(), differences.clone())
        rows.solve(1.0, in_place=True).to_shift()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr] # it has run
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    planned = state_bytes(aggregation, shape, n)
    assert 0.2 * planned < peak < 1.15 * planned + 4 * shape[0] * shape[1]  # S itself, in float32, comes on top


class Parts(NamedTuple):
    """What edits are made of."""

    model: PreTrainedModel
    editor: EditorModel
    facts: list[Fact]
    tokenizer: PreTrainedTokenizerFast
    bytes_of_a_layer: int


@pytest.fixture(params=["malmen", "mend", "ultraedit"])
def parts(
    request: pytest.FixtureRequest,
    make_llama: Build,
    make_editor: Build,
    make_facts: Build,
    tokenizer: PreTrainedTokenizerFast,
) -> Parts:
    """Enough facts that their rows are more than the features of a key."""
    model = make_llama()
    editor = make_editor(model, method=request.param, **({"rank": None} if request.param == "ultraedit" else {}))
    facts = make_facts(60)
    tokenize = editor.tokenizer_for(model, tokenizer)
    sequences = [tokenize(fact.prompt, fact.target) for fact in facts]
    n_rows = sum(len(s.target_ids if request.param != "mend" else s.input_ids) for s in sequences)
    size = state_bytes(editor.config.aggregation, editor.config.shape_of(editor.module_names[0]), n_rows)
    return Parts(model, editor, facts, tokenizer, size)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("where", ["disk", "host", "nowhere"])
def test_groups_of_layers_give_the_same_edit(
    parts: Parts, layers: int, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether traces wait or facts are traced again, which the number of passes tells; no file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if where != "disk":
        monkeypatch.setattr(hf_malmen.memory, "_SHARE_OF_DISK", 0.0)
    if where == "host":  # as beside a GPU

        def beside_a_gpu(groups: Any, trace: Any, n_bytes: int, _: torch.device) -> Any:
            return traces_by_group(groups, trace, n_bytes, torch.device("cuda"))

        monkeypatch.setattr(hf_malmen.makers, "traces_by_group", beside_a_gpu)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    parts.model.register_forward_pre_hook(count)
    expected = parts.editor.make_edit(parts.model, parts.facts, parts.tokenizer, batch_size=8)
    once = passes
    edit = parts.editor.make_edit(
        parts.model, parts.facts, parts.tokenizer, batch_size=8, max_memory=layers * parts.bytes_of_a_layer
    )
    assert list(edit.shifts) == list(expected.shifts)
    for name, shift in expected.shifts.items():
        assert (edit.shifts[name] - shift).norm() < 1e-6 * shift.norm()
    n_groups = -(-len(expected.shifts) // layers)
    for_statistics = once if parts.editor.config.follows_edits else 0
    assert passes - once == for_statistics + (n_groups * once if where == "nowhere" else once)
    assert not list(tmp_path.iterdir())


def test_rows_are_multiplied_where_they_take_more_memory_than_their_products(
    make_llama: Build,
    make_editor: Build,
    make_facts: Build,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly as many rows as a key has features: they do not fit, and their products do. The edit is the same."""
    model = make_llama(intermediate_size=2500)
    editor = make_editor(model, token_selection="all")
    tokenize = editor.tokenizer_for(model, tokenizer)
    used = make_facts(160)
    n_rows = sum(len(tokenize(fact.prompt, fact.target)) for fact in used)
    assert 2400 < n_rows < 2500
    expected = editor.make_edit(model, used, tokenizer)
    shape = editor.config.shape_of(editor.module_names[0])
    kept, multiplied = (state_bytes("least_squares", shape, n_rows, folded=folded) for folded in (False, True))
    assert multiplied < 0.8 * kept
    solutions = []
    with monkeypatch.context() as patch:
        solve = RidgeLeastSquares.solve
        patch.setattr(
            RidgeLeastSquares, "solve", lambda *args, **kw: solutions.append(solve(*args, **kw)) or solutions[-1]
        )
        edit = editor.make_edit(model, used, tokenizer, max_memory=multiplied)
    assert {type(solution) for solution in solutions} == {PrimalSolution}
    for name, shift in expected.shifts.items():
        assert (edit.shifts[name] - shift).norm() < 1e-6 * shift.norm()
    with pytest.raises(ValueError, match=rf"give max_memory={multiplied} or more"):
        editor.make_edit(model, used, tokenizer, max_memory=multiplied - 1)


def test_too_little_memory_is_refused_before_the_model_runs(parts: Parts) -> None:
    """For one layer even; the message says how much there must be."""
    calls: list[Any] = []
    parts.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=rf"give max_memory={parts.bytes_of_a_layer} or more"):
        parts.editor.make_edit(parts.model, parts.facts, parts.tokenizer, max_memory=parts.bytes_of_a_layer - 1)
    assert not calls


@pytest.mark.parametrize("method", ["memit", "ft"])
def test_a_method_that_cannot_keep_a_limit_refuses_it(
    method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Instead of leaving it aside."""
    editor = EditorModel.from_base(model, EditorConfig(method=method))
    editor.collect_covariance(model, ["Lyon is a city in France."], tokenizer)
    with pytest.raises(ValueError, match=rf"Method '{method}' holds all facts .* max_memory cannot be kept"):
        editor.make_edit(model, facts, tokenizer, max_memory="8GiB")


def test_an_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder goes when the groups are no longer asked for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def trace(names: Any) -> Iterator[dict[str, Trace]]:
        yield {name: Trace(torch.ones(1, 2), torch.ones(1, 3)) for name in names}

    groups = traces_by_group([["a"], ["b"]], trace, 20, torch.device("cpu"))
    _, traced = next(groups)
    assert [list(entry) for entry in traced] == [["a"]]
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    groups.close()
    assert not list(tmp_path.iterdir())


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that an edit might leave changed: weights, flags, modes, hooks, attributes."""
    found: list[Any] = [
        (name, value.detach().clone(), value.requires_grad, value.grad) for name, value in model.named_parameters()
    ]
    for name, module in model.named_modules():
        hooks = [list(value) for key, value in vars(module).items() if key.endswith("hooks")]
        found.append((name, module.training, hooks, sorted(vars(module))))
    return found


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether two states are one, to the bit."""
    pairs = [pair for left, right in zip(first, second, strict=True) for pair in zip(left, right, strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("where", ["forward", "backward", "solve", "write"])
def test_ctrl_c_leaves_the_model_as_it_was(
    where: str,
    make_llama: Build,
    make_editor: Build,
    make_facts: Build,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In the middle of a pass, of the solve, and of writing weights: everything is as before, and editing works."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, facts = make_llama(), make_facts(30)
    editor = make_editor(model)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    expected = editor.apply(model, facts, tokenizer, batch_size=8)
    edited = [parameter.detach().clone() for parameter in model.parameters()]
    expected.undo()
    before, before_editor = state_of(model), state_of(editor)
    size = max(state_bytes("least_squares", editor.config.shape_of(name), 90) for name in editor.module_names)

    with monkeypatch.context() as patch:
        calls = 0

        def interrupt(*_: Any, **__: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt

        if where == "forward":
            layer = type(model.model.layers[-1].mlp)
            original: Any = layer.forward
            patch.setattr(layer, "forward", lambda *args: (interrupt(), original(*args))[1])
        elif where == "backward":
            original = torch.autograd.grad
            patch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (interrupt(), original(*args, **kwargs))[1])
        elif where == "solve":
            original = torch.linalg.cholesky_ex
            patch.setattr(torch.linalg, "cholesky_ex", lambda *a, **kwargs: (interrupt(), original(*a, **kwargs))[1])
        else:
            original = hf_malmen.edit.add_rows
            patch.setattr(hf_malmen.edit, "add_rows", lambda *args: (interrupt(), original(*args))[1])
        with pytest.raises(KeyboardInterrupt):
            editor.apply(model, facts, tokenizer, batch_size=8, max_memory=2 * size)
    assert calls == 3
    assert same(before, state_of(model))
    assert same(before_editor, state_of(editor))
    assert not list(tmp_path.iterdir())
    editor.apply(model, facts, tokenizer, batch_size=8)
    assert all(torch.equal(a, b) for a, b in zip(edited, model.parameters(), strict=True))


def test_a_consumer_that_fails_leaves_no_file_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is what is told, while batches before it are still being written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save = hf_malmen.memory.save_file

    def slowly(*args: Any) -> None:
        time.sleep(0.05)
        save(*args)

    monkeypatch.setattr(hf_malmen.memory, "save_file", slowly)

    def trace(names: Any) -> Iterator[dict[str, Trace]]:
        while True:
            yield {name: Trace(torch.ones(1, 2), torch.ones(1, 3)) for name in names}

    def consume() -> None:
        with closing(traces_by_group([["a"], ["b"]], trace, 20, torch.device("cpu"))) as groups:
            _, traced = next(groups)
            for number, _ in enumerate(traced):
                if number == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not list(tmp_path.iterdir())


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the host has left; where there is none, or it has another file, the host's counts."""
    files = [(str(tmp_path / "max"), str(tmp_path / "used")), (str(tmp_path / "nowhere"), str(tmp_path / "used"))]
    monkeypatch.setattr(hf_malmen.host, "_CGROUP_FILES", files)
    (tmp_path / "used").write_text("3000\n")
    (tmp_path / "max").write_text("10000\n")
    assert hf_malmen.host.free_memory() == 7000
    (tmp_path / "max").write_text("max\n")
    assert hf_malmen.host.free_memory() > 10**6


def test_what_fails_while_traces_are_put_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own: a disk that fails, say. Nothing is solved for, and no file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hf_malmen.memory, "save_file", fail)

    def trace(names: Any) -> Iterator[dict[str, Trace]]:
        yield {name: Trace(torch.ones(1, 2), torch.ones(1, 3)) for name in names}

    groups = traces_by_group([["a"], ["b"]], trace, 20, torch.device("cpu"))
    _, traced = next(groups)
    with pytest.raises(OSError, match="no space left"):
        list(traced)
    groups.close()
    assert not list(tmp_path.iterdir())
