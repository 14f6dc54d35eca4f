"""An edit depends on its facts alone: not on batch sizes, order or padding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorModel, Fact
from hf_malmen.batches import IGNORED, TokenBatch, Tokenizer
from hf_malmen.hypernetwork import RunningStatistics
from hf_malmen.tracing import frozen

N_FACTS = 7
# What float32 passes over differently shaped batches may differ by, relative to the norm of the shift.
TOLERANCE = 1e-5
CASES = {
    "malmen, llama": ("llama", {"method": "malmen", "target_modules": ["down_proj", "o_proj"]}),
    "malmen, llama, all tokens": (
        "llama",
        {"method": "malmen", "target_modules": ["down_proj", "up_proj"], "token_selection": "all"},
    ),
    "malmen, gpt2": ("gpt2", {"method": "malmen", "target_modules": ["c_proj"]}),
    "mend, llama": ("llama", {"method": "mend", "target_modules": ["down_proj", "o_proj"]}),
    "mend, gpt2": ("gpt2", {"method": "mend", "target_modules": ["c_proj"]}),
}

Shifts = dict[str, Tensor]


@contextmanager
def extra_padding(n_columns: int) -> Iterator[None]:
    """Every batch is `n_columns` longer than it has to be, with any tokens in the columns that are masked."""
    plain = Tokenizer.pad

    def pad(self: Tokenizer, sequences: Sequence[Any], side: str | None = None) -> TokenBatch:
        batch = plain(self, sequences, side)
        left = (side or self.tokenizer.padding_side) == "left"

        def widen(tensor: Tensor, columns: Tensor) -> Tensor:
            return torch.cat((columns, tensor) if left else (tensor, columns), dim=1)

        shape = (len(sequences), n_columns)
        junk = torch.randint(6, 300, shape, generator=torch.Generator().manual_seed(n_columns))
        return TokenBatch(
            widen(batch.input_ids, junk),
            widen(batch.attention_mask, torch.zeros(shape, dtype=torch.long)),
            widen(batch.labels, torch.full(shape, IGNORED)),
        )

    with patch.object(Tokenizer, "pad", pad):
        yield


def assert_same(found: Shifts, expected: Shifts, tolerance: float = TOLERANCE) -> None:
    """Every layer's shift is the expected one."""
    assert found.keys() == expected.keys()
    for name, shift in expected.items():
        assert float(shift.norm()) > 0
        assert float((found[name] - shift).norm() / shift.norm()) <= tolerance, name


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest,
    make_llama: Callable[..., PreTrainedModel],
    make_gpt2: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
) -> tuple[PreTrainedModel, EditorModel]:
    """A model and an editor for the upper two of its blocks."""
    architecture, config = CASES[request.param]
    model = {"llama": make_llama, "gpt2": make_gpt2}[architecture]()
    return model, make_editor(model, layers_to_transform=[2, 3], **config)


@pytest.fixture(scope="module")
def many(make_long_facts: Callable[..., list[Fact]]) -> list[Fact]:
    """Facts of different lengths."""
    return make_long_facts(N_FACTS)


@pytest.fixture(scope="module")
def tokenizers(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> dict[str, PreTrainedTokenizerFast]:
    """The tiny tokenizer, padding on either side."""
    return {side: make_tokenizer(padding_side=side) for side in ("left", "right")}


@pytest.fixture(scope="module")
def expected(
    case: tuple[PreTrainedModel, EditorModel], many: list[Fact], tokenizers: dict[str, PreTrainedTokenizerFast]
) -> Shifts:
    """The shifts of all facts in one batch."""
    model, editor = case
    return editor.make_edit(model, many, tokenizers["right"], batch_size=64, editor_batch_size=4096).shifts


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors],
)
@given(
    batch_size=st.integers(1, N_FACTS + 1),
    editor_batch_size=st.integers(1, 80),
    order=st.permutations(range(N_FACTS)),
    side=st.sampled_from(["left", "right"]),
    n_columns=st.integers(0, 12),
)
def test_shifts_depend_on_the_facts_alone(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    expected: Shifts,
    batch_size: int,
    editor_batch_size: int,
    order: list[int],
    side: str,
    n_columns: int,
) -> None:
    """Any batch sizes, order of facts, padding side and amount of padding, all at once."""
    model, editor = case
    with extra_padding(n_columns):
        edit = editor.make_edit(
            model,
            [many[i] for i in order],
            tokenizers[side],
            batch_size=batch_size,
            editor_batch_size=editor_batch_size,
        )
    assert_same(edit.shifts, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, N_FACTS - 1, N_FACTS, 64])
@pytest.mark.parametrize("editor_batch_size", [1, 7])
def test_each_batch_size(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    expected: Shifts,
    batch_size: int,
    editor_batch_size: int,
) -> None:
    """One fact or one token a pass, and last batches that are short, of one fact even."""
    model, editor = case
    edit = editor.make_edit(
        model, many, tokenizers["right"], batch_size=batch_size, editor_batch_size=editor_batch_size
    )
    assert_same(edit.shifts, expected)


@pytest.mark.parametrize("n_columns", [0, 1, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_row(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    side: str,
    n_columns: int,
) -> None:
    """A single fact with an answer of one token gives the same shift however it is padded."""
    model, editor = case
    fact = replace(many[0], target="Italy")
    expected = editor.make_edit(model, [fact], tokenizers["right"]).shifts
    with extra_padding(n_columns):
        assert_same(editor.make_edit(model, [fact], tokenizers[side], batch_size=1).shifts, expected)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 64])
def test_every_fact_counts(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    expected: Shifts,
    batch_size: int,
) -> None:
    """No fact is dropped from a last short batch: without any one of them the shift of every layer is another."""
    model, editor = case
    for left_out in range(N_FACTS):
        rest = [fact for i, fact in enumerate(many) if i != left_out]
        shifts = editor.make_edit(model, rest, tokenizers["right"], batch_size=batch_size).shifts
        for name, shift in shifts.items():
            assert float((shift - expected[name]).norm() / expected[name].norm()) > 1e-3, (name, left_out)


def test_sum_of_single_edits(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    expected: Shifts,
) -> None:
    """MEND's shift is the sum of those of each fact alone; the least squares' is not."""
    model, editor = case
    total: Shifts = {}
    for fact in many:
        for name, shift in editor.make_edit(model, [fact], tokenizers["right"]).shifts.items():
            total[name] = total.get(name, torch.zeros_like(shift)) + shift
    if editor.config.method == "mend":
        assert_same(total, expected)
    else:
        for name, shift in expected.items():
            assert float((total[name] - shift).norm() / shift.norm()) > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_depend_on_the_facts_alone(
    case: tuple[PreTrainedModel, EditorModel],
    many: list[Fact],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    batch_size: int,
) -> None:
    """What training learns of the distribution of keys and gradients is the same for any batches."""
    model, editor = case

    def statistics(facts: list[Fact], size: int, side: str) -> dict[str, RunningStatistics]:
        fresh = EditorModel(editor.config)
        tokenize = fresh.tokenizer_for(model, tokenizers[side])
        sequences = [tokenize(fact.prompt, fact.target) for fact in facts]
        with frozen(model):
            batches = [batch for _, batch in tokenize.batches(sequences, size)]
            fresh.update_statistics(list(fresh.trace(model, batches)))
        return {shape: network.get_submodule("statistics") for shape, network in fresh.networks.items()}  # type: ignore[misc]

    together, apart = statistics(many, 64, "right"), statistics(many[::-1], batch_size, "left")
    for shape, one in together.items():
        other = apart[shape]
        assert torch.equal(one.count, other.count)
        deviation = (one.squared_deviation / (one.count - 1)).sqrt()
        assert float(((one.mean - other.mean) / deviation).abs().max()) < TOLERANCE
        torch.testing.assert_close(other.squared_deviation, one.squared_deviation, rtol=10 * TOLERANCE, atol=0)
