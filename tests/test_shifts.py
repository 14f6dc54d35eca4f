"""Weight shifts, dense and factored: against products by hand, on disk, and added to weights of every dtype."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_malmen.shifts
from hf_malmen import CheckpointError, ModelMismatchError, NumericalError
from hf_malmen.shifts import (
    DenseShift,
    FactoredShift,
    Shift,
    add,
    add_rows,
    blocks,
    check_shape,
    dense,
    factored,
    load_shifts,
    materialise,
    save_shifts,
)

KEY_SIZE, VALUE_SIZE = 13, 7


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, so that a small matrix has several."""
    monkeypatch.setattr(hf_malmen.shifts, "_BLOCK_VALUES", 40)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_kinds(n: int = 5) -> list[tuple[Shift, Tensor]]:
    """A shift of each kind, and its S in float64."""
    left, right, whole = random(n, KEY_SIZE), random(n, VALUE_SIZE, seed=1), random(KEY_SIZE, VALUE_SIZE, seed=2)
    return [(FactoredShift(left, right), left.double().T @ right.double()), (DenseShift(whole), whole.double())]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_both_kinds_are_the_same_matrix(fan_in_fan_out: bool) -> None:
    """S of shape (key_size, value_size), whatever the layout of the weight that it is for."""
    for shift, expected in both_kinds():
        assert shift.shape == (KEY_SIZE, VALUE_SIZE)
        torch.testing.assert_close(materialise(shift, fan_in_fan_out).double(), expected, rtol=1e-5, atol=1e-6)
        moved = shift.to(torch.device("cpu"))
        assert torch.equal(materialise(moved, fan_in_fan_out), materialise(shift, fan_in_fan_out))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_blocks_partition_the_rows_of_the_weight(fan_in_fan_out: bool) -> None:
    """In order, without gap or overlap, small, and with the bits of the whole."""
    for shift, _ in both_kinds():
        whole = materialise(shift, fan_in_fan_out)
        stored = whole if fan_in_fan_out else whole.T
        found = list(blocks(shift, fan_in_fan_out))
        assert len(found) > 2
        position = 0
        for start, stop, rows in found:
            assert start == position < stop
            assert rows.shape == (stop - start, stored.shape[1])
            assert rows.numel() <= 40
            assert torch.equal(rows, stored[start:stop])
            position = stop
        assert position == len(stored)


def test_a_row_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes alone."""
    monkeypatch.setattr(hf_malmen.shifts, "_BLOCK_VALUES", 3)
    for shift, expected in both_kinds():
        found = list(blocks(shift, True))
        assert [(start, stop) for start, stop, _ in found] == [(i, i + 1) for i in range(KEY_SIZE)]
        torch.testing.assert_close(torch.cat([rows for _, _, rows in found]).double(), expected, rtol=1e-5, atol=1e-6)


def test_factors_are_kept_where_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a LoRA's rank always; above it, where they hold fewer numbers than S."""
    monkeypatch.setattr(hf_malmen.shifts, "_ALWAYS_FACTORED", 6)
    for n, kind in ((1, FactoredShift), (6, FactoredShift), (7, DenseShift)):
        left, right = random(n, 4).double(), random(n, 5, seed=1).double()
        shift = factored(left, right)
        assert isinstance(shift, kind)
        assert {tensor.dtype for tensor in shift.tensors().values()} == {torch.float32}
        torch.testing.assert_close(materialise(shift, True), (left.T @ right).float(), rtol=1e-5, atol=1e-6)
    wide = factored(random(7, 40), random(7, 50))  # 630 numbers instead of 2,000
    assert isinstance(wide, FactoredShift)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_sums(fan_in_fan_out: bool) -> None:
    """Of every pair of kinds; two factored ones stay factored, with the rows of both."""
    for first, one in both_kinds(5):
        for second, two in both_kinds(3):
            total = add(first, second)
            torch.testing.assert_close(materialise(total, fan_in_fan_out).double(), one + two, rtol=1e-5, atol=2e-6)
            if isinstance(first, FactoredShift) and isinstance(second, FactoredShift):
                assert isinstance(total, FactoredShift)
                assert len(total.left) == len(total.right) == 8


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_addition_rounded_once(dtype: torch.dtype) -> None:
    """W + S in float32, or in float64 for such a weight, with what rounding cost; W stays as it is."""
    weight, shift = random(4, 6).to(dtype), random(4, 6, seed=1)
    before = weight.clone()
    found, error = add_rows(weight, shift, "layer")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (before.to(wide) + shift.to(wide)).to(dtype)
    rest = expected.double() - before.double() - shift.double()
    assert error == pytest.approx(float(rest.square().sum()), rel=1e-3, abs=1e-12)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 7e4), (torch.bfloat16, 3.4e38), (torch.float8_e5m2, 1e5), (torch.float32, float("nan"))],
    ids=str,
)
def test_an_overflow_is_refused(dtype: torch.dtype, value: float) -> None:
    """One value is enough; the message names the layer and the dtype."""
    weight, shift = torch.ones(4, 6).to(dtype), torch.zeros(4, 6)
    add_rows(weight, shift, "layer")
    shift[2, 3] = value
    with pytest.raises(NumericalError, match=rf"layer: the edited weight is not finite in {dtype}"):
        add_rows(weight + weight if dtype == torch.bfloat16 else weight, shift, "layer")


def test_finite_values_whose_sum_is_not() -> None:
    """What is added up to look for infinities may overflow itself."""
    weight = torch.full((2, 600), 65504.0, dtype=torch.float16)
    assert torch.equal(add_rows(weight, torch.zeros(2, 600), "layer")[0], weight)
    large = torch.full((2, 600), 3e38)
    assert torch.equal(add_rows(large, torch.zeros(2, 600), "layer")[0], large)


def test_a_weight_of_another_shape() -> None:
    """Which shape is right depends on the layout."""
    shift = dense(random(KEY_SIZE, VALUE_SIZE))
    check_shape(shift, True, (KEY_SIZE, VALUE_SIZE), "layer")
    check_shape(shift, False, (VALUE_SIZE, KEY_SIZE), "layer")
    with pytest.raises(
        ModelMismatchError, match=r"layer holds a weight of shape \(13, 7\), and the edit needs \(7, 13\)"
    ):
        check_shape(shift, False, (KEY_SIZE, VALUE_SIZE), "layer")


# Files


def test_save_and_load(tmp_path: Path) -> None:
    """Bit for bit and kind for kind; the file is plain safetensors."""
    (few, _), (whole, _) = both_kinds()
    path = tmp_path / "edit.safetensors"
    save_shifts({"model.b": few, "model.a": whole}, path)
    assert set(load_file(path)) == {"model.b.left", "model.b.right", "model.a.shift"}
    loaded = load_shifts(path)
    assert list(loaded) == ["model.a", "model.b"]
    for name, shift in (("model.a", whole), ("model.b", few)):
        assert type(loaded[name]) is type(shift)
        for role, tensor in shift.tensors().items():
            assert torch.equal(loaded[name].tensors()[role], tensor)


MALFORMED = {
    "half of a pair": {"a.left": random(2, 3)},
    "a whole and a half": {"a.shift": random(2, 3), "a.left": random(2, 3)},
    "other roles": {"a.lora_A": random(2, 3), "a.lora_B": random(2, 3)},
    "factors of different ranks": {"a.left": random(2, 3), "a.right": random(4, 5)},
    "a vector": {"a.shift": random(3)},
    "a vector as a factor": {"a.left": random(3), "a.right": random(3, 2)},
    "integers": {"a.shift": torch.ones(2, 3, dtype=torch.int64)},
    "nothing": {},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_files_that_hold_no_shifts(name: str, tmp_path: Path) -> None:
    """Each is refused when it is read, not when it is half applied; the message names the file."""
    path = tmp_path / "edit.safetensors"
    save_file(MALFORMED[name], path)
    with pytest.raises((ModelMismatchError, CheckpointError), match=r"edit\.safetensors"):
        load_shifts(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"\x05\x00\x00\x00\x00\x00\x00\x00{oops"])
def test_files_that_are_no_safetensors(data: bytes, tmp_path: Path) -> None:
    """A truncated download, or a pickle, which is never read."""
    path = tmp_path / "edit.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"edit\.safetensors"):
        load_shifts(path)
