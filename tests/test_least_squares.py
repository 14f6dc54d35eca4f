"""Rows of all facts -> one weight shift, against `torch.linalg.lstsq` and autograd through the normal equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_malmen import NumericalError
from hf_malmen.least_squares import Adjoint, DualSolution, PrimalSolution, RidgeLeastSquares, RowSum, aggregator

KEY_SIZE, VALUE_SIZE = 12, 7
LAYER = "model.layers.3.mlp.down_proj"


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """`n` random keys and value differences."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, KEY_SIZE, generator=generator, dtype=torch.float64)
    return keys.to(dtype), torch.randn(n, VALUE_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def augmented(keys: Tensor, differences: Tensor, ridge: float) -> Tensor:
    """The minimiser of ‖U S − D‖² + λ‖S‖² as an ordinary least-squares problem over [U; √λ I]."""
    keys, differences = keys.double(), differences.double()
    left = torch.cat((keys, math.sqrt(ridge) * torch.eye(keys.shape[1], dtype=torch.float64)))
    right = torch.cat((differences, torch.zeros(keys.shape[1], differences.shape[1], dtype=torch.float64)))
    return torch.linalg.lstsq(left, right, driver="gelsd").solution


def solve(keys: Tensor, differences: Tensor, ridge: float, sizes: list[int] | None = None) -> RidgeLeastSquares:
    """An aggregation that took in the rows in groups of `sizes`."""
    aggregation = RidgeLeastSquares(LAYER)
    groups = sizes or [len(keys)]
    for left, right in zip(keys.split(groups), differences.split(groups), strict=True):
        aggregation.add(left, right)
    return aggregation


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def pulled_rows(adjoint: Adjoint, left: Tensor, start: int = 0) -> Tensor:  # (n, value_size)
    """P M, as the gradient that the rows' value differences get."""
    differences = torch.zeros(len(left), VALUE_SIZE, dtype=torch.float64, requires_grad=True)
    adjoint.inner(left, differences, start).backward()
    assert differences.grad is not None
    return differences.grad


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("n", [1, 2, KEY_SIZE - 1, KEY_SIZE, KEY_SIZE + 1, 5 * KEY_SIZE])
def test_shift_is_the_least_squares_solution(n: int, ridge: float) -> None:
    """S solves the augmented system, whether there are fewer rows than key features, as many, or more."""
    keys, differences = rows(n)
    solution = solve(keys, differences, ridge).solve(ridge)
    assert isinstance(solution, DualSolution if n <= KEY_SIZE else PrimalSolution)
    assert solution.shift.shape == (KEY_SIZE, VALUE_SIZE)
    assert relative_error(solution.shift, augmented(keys, differences, ridge)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solve_is_in_float64_for_low_precision_rows(dtype: torch.dtype) -> None:
    """Rows in a low precision are taken as they are: nothing more is rounded on the way to S."""
    for n in (5, 40):
        keys, differences = rows(n, dtype=dtype)
        solution = solve(keys, differences, 0.1).solve(0.1)
        assert solution.shift.dtype == torch.float64
        assert relative_error(solution.shift, augmented(keys, differences, 0.1)) < 1e-10


@pytest.mark.parametrize("n", [1, 5, KEY_SIZE])
def test_dual_and_primal_agree(n: int) -> None:
    """Rows of zeros change no solution but push the count over k, so the same problem is solved both ways."""
    keys, differences = rows(n)
    padding = KEY_SIZE + 1 - n
    long_keys = torch.cat((keys, torch.zeros(padding, KEY_SIZE, dtype=torch.float64)))
    long_differences = torch.cat((differences, torch.zeros(padding, VALUE_SIZE, dtype=torch.float64)))
    dual, primal = solve(keys, differences, 0.3).solve(0.3), solve(long_keys, long_differences, 0.3).solve(0.3)
    assert isinstance(dual, DualSolution)
    assert isinstance(primal, PrimalSolution)
    assert relative_error(dual.shift, primal.shift) < 1e-10
    gradient = torch.randn(KEY_SIZE, VALUE_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    from_dual, from_primal = dual.adjoint(gradient), primal.adjoint(gradient)
    assert relative_error(pulled_rows(from_dual, keys), pulled_rows(from_primal, keys)) < 1e-10
    assert from_dual.ridge_gradient is not None
    assert from_primal.ridge_gradient is not None
    assert float(from_dual.ridge_gradient) == pytest.approx(float(from_primal.ridge_gradient), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_factors_of_few_rows(n: int) -> None:
    """S = PᵀD while P and D are smaller than S, and ∂L/∂D = P ∂L/∂S is all that the adjoint asks for."""
    keys, differences = rows(n)
    solution = solve(keys, differences, 0.3).solve(0.3)
    if n * (KEY_SIZE + VALUE_SIZE) >= KEY_SIZE * VALUE_SIZE:
        assert solution.factors is None
        return
    assert solution.factors is not None
    left, right = solution.factors
    assert relative_error(left.T @ right, augmented(keys, differences, 0.3)) < 1e-10
    gradient = torch.randn(KEY_SIZE, VALUE_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_rows, of_shift = solution.adjoint(left @ gradient), solution.adjoint(gradient)
    assert relative_error(pulled_rows(of_rows, keys), pulled_rows(of_shift, keys)) < 1e-10
    assert of_rows.ridge_gradient is not None
    assert of_shift.ridge_gradient is not None
    assert float(of_rows.ridge_gradient) == pytest.approx(float(of_shift.ridge_gradient), rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.integers(1, 2 * KEY_SIZE), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_grouping_and_order_of_rows_do_not_matter(sizes: list[int], seed: int) -> None:
    """Any split of the rows into groups, in any order, gives the solution of all rows at once."""
    keys, differences = rows(sum(sizes), seed)
    expected = augmented(keys, differences, 0.5)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    for left, right in ((keys, differences), (keys[order], differences[order])):
        aggregation = solve(left, right, 0.5, sizes)
        assert aggregation.n_rows == len(keys)
        assert relative_error(aggregation.solve(0.5).shift, expected) < 1e-9


def test_rows_added_after_a_solve_count() -> None:
    """`solve` is the solution so far: it consumes nothing, and it follows rows that come later."""
    keys, differences = rows(3 * KEY_SIZE)
    aggregation = RidgeLeastSquares(LAYER)
    for end in (KEY_SIZE // 2, KEY_SIZE + 2, 3 * KEY_SIZE):
        aggregation.add(keys[aggregation.n_rows : end], differences[aggregation.n_rows : end])
        for ridge in (0.2, 0.2, 2.0):
            expected = augmented(keys[:end], differences[:end], ridge)
            assert relative_error(aggregation.solve(ridge).shift, expected) < 1e-10


def test_memory_of_the_stream_does_not_grow() -> None:
    """However many rows stream in, no more than k of them are held."""
    aggregation = RidgeLeastSquares(LAYER)
    held = []
    for seed in range(50):
        aggregation.add(*rows(5, seed))
        held.append(sum(len(kept) for kept, _ in aggregation._kept))
    assert aggregation.n_rows == 250
    assert max(held) <= KEY_SIZE


@pytest.mark.parametrize("n", [5, KEY_SIZE, 40])
def test_a_solve_in_place_is_the_same_and_leaves_nothing(n: int) -> None:
    """S and its adjoint as without; the rows are gone, and others can be added."""
    keys, differences = rows(n)
    aggregation = solve(keys, differences, 0.4, [3] * (n // 3) + [n % 3] * (n % 3 > 0))
    expected, gradient = aggregation.solve(0.4), torch.ones(KEY_SIZE, VALUE_SIZE, dtype=torch.float64)
    found = aggregation.solve(0.4, in_place=True)
    assert type(found) is type(expected)
    assert torch.equal(found.shift, expected.shift)
    assert torch.equal(pulled_rows(found.adjoint(gradient), keys), pulled_rows(expected.adjoint(gradient), keys))
    assert aggregation.n_rows == 0
    with pytest.raises(NumericalError, match=r"no rows"):
        aggregation.solve(0.4)
    aggregation.add(keys[:2], differences[:2])
    assert relative_error(aggregation.solve(0.4).shift, augmented(keys[:2], differences[:2], 0.4)) < 1e-10


@pytest.mark.parametrize("expected", [0, 5, 1000])
@pytest.mark.parametrize("name", ["least_squares", "sum"])
def test_a_wrong_guess_of_the_number_of_rows_changes_nothing(name: str, expected: int) -> None:
    """It says whether rows are kept first, and that alone."""
    for n in (4, 40):
        keys, differences = rows(n)
        aggregation = aggregator(name, LAYER, expected)
        for part in zip(keys.split(3), differences.split(3), strict=True):
            aggregation.add(*part)
        dense = keys.T @ differences if name == "sum" else augmented(keys, differences, 0.4)
        assert relative_error(aggregation.solve(0.4).shift, dense) < 1e-10


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("n", [3, KEY_SIZE])
def test_few_rows_are_folded_where_that_is_asked_for(n: int, pooled: bool) -> None:
    """However few, and the same solution: `n_expected` above k says so, whatever comes."""
    kept, folded = RidgeLeastSquares(LAYER), RidgeLeastSquares(LAYER, KEY_SIZE + 1)
    for aggregation in (kept, folded):
        aggregation.add(*rows(n))
        if pooled:
            aggregation.pool()
    expected, found = kept.solve(0.5), folded.solve(0.5)
    assert isinstance(expected, DualSolution)
    assert isinstance(found, PrimalSolution)
    assert relative_error(found.shift, expected.shift) < 1e-10


def test_rows_are_folded_in_blocks_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triangle of UᵀU that is computed is made of blocks; here 1,030 columns, so that there are three."""
    generator = torch.Generator().manual_seed(0)
    keys, differences = (torch.randn(1040, size, generator=generator, dtype=torch.float64) for size in (1030, 2))
    monkeypatch.setattr("hf_malmen.least_squares._FOLD_ROWS", 100)
    assert relative_error(solve(keys, differences, 1.0).solve(1.0).shift, augmented(keys, differences, 1.0)) < 1e-9


@pytest.mark.parametrize("n", [1, 4, KEY_SIZE, KEY_SIZE + 1, 40])
def test_adjoint_equals_autograd(n: int) -> None:
    """U M is ∂L/∂D, and the second value ∂L/∂λ, of any loss L of S (here L = ‖S‖³ + ⟨C, S⟩)."""
    keys, differences = rows(n, seed=3)
    weights = torch.randn(KEY_SIZE, VALUE_SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    leaf, ridge = differences.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    dense = torch.linalg.solve(keys.T @ keys + ridge * torch.eye(KEY_SIZE, dtype=torch.float64), keys.T @ leaf)
    dense.retain_grad()
    (dense.norm() ** 3 + (weights * dense).sum()).backward()
    assert leaf.grad is not None
    assert ridge.grad is not None
    assert dense.grad is not None

    adjoint = solve(keys, differences, 0.7).solve(0.7).adjoint(dense.grad)
    assert adjoint.ridge_gradient is not None
    inverse = torch.linalg.inv(keys.T @ keys + 0.7 * torch.eye(KEY_SIZE, dtype=torch.float64))
    assert relative_error(pulled_rows(adjoint, keys), keys @ inverse @ dense.grad) < 1e-10
    assert relative_error(pulled_rows(adjoint, keys), leaf.grad) < 1e-10
    assert float(adjoint.ridge_gradient) == pytest.approx(float(ridge.grad), rel=1e-9)
    half = n // 2  # rows from the middle on, as the replay of a later micro-batch asks for them
    assert relative_error(pulled_rows(adjoint, keys[half:], half), leaf.grad[half:]) < 1e-10


@pytest.mark.parametrize("n", [6, 200])
def test_outliers_keep_seven_digits(n: int) -> None:
    """Keys whose features differ by five orders of magnitude, as a language model's do, are still solved exactly."""
    keys, differences = rows(n)
    keys = (keys * torch.logspace(-2, 3, KEY_SIZE, dtype=torch.float64)).float()
    expected = augmented(keys, differences, 1.0)
    shift = solve(keys, differences, 1.0, [3] * (n // 3) + [n % 3] * (n % 3 > 0)).solve(1.0).shift
    assert relative_error(shift, expected) < 1e-7
    # The errors of a float32 solve: what this precision is for.
    gram = keys.T @ keys + torch.eye(KEY_SIZE)
    assert relative_error(torch.linalg.solve(gram, keys.T @ differences.float()), expected) > 1e-5


def test_repeated_keys_are_solved() -> None:
    """The same fact twice makes U Uᵀ singular; λ alone keeps the solve possible."""
    keys, differences = rows(4)
    keys, differences = keys[[0, 0, 1, 1, 0]], differences[[0, 1, 2, 3, 0]]
    assert relative_error(solve(keys, differences, 1e-2).solve(1e-2).shift, augmented(keys, differences, 1e-2)) < 1e-9


@pytest.mark.parametrize("n", [3, 40])
def test_sum_is_the_product_of_all_rows(n: int) -> None:
    """MEND's aggregation is Pᵀ D over all rows, in any grouping; its adjoint hands the gradient on, without a λ."""
    left, differences = rows(n)
    expected = torch.einsum("nk,nv->kv", left, differences)
    for size in (1, 2, n):
        total = RowSum(LAYER)
        for part, right in zip(left.split(size), differences.split(size), strict=True):
            total.add(part, right)
        solution = total.solve(ridge=123.0)
        assert relative_error(solution.shift, expected) < 1e-12
    gradient = torch.ones(KEY_SIZE, VALUE_SIZE, dtype=torch.float32)
    adjoint = solution.adjoint(gradient)
    assert relative_error(pulled_rows(adjoint, left), left @ gradient.double()) < 1e-12
    assert adjoint.ridge_gradient is None


@pytest.mark.parametrize("aggregation", ["least_squares", "sum"])
def test_no_rows_names_the_layer(aggregation: str) -> None:
    """Without a row there is nothing to solve."""
    with pytest.raises(NumericalError, match=rf"{LAYER}: no rows"):
        aggregator(aggregation, LAYER).solve(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("aggregation", ["least_squares", "sum"])
def test_non_finite_rows_name_the_layer(aggregation: str, side: int, n: int, value: float) -> None:
    """A row that is not finite is refused in both solvers, whichever side it is on."""
    pair = rows(n)
    pair[side][n // 2, 2] = value
    aggregation_of_layer = aggregator(aggregation, LAYER)
    aggregation_of_layer.add(*pair)
    with pytest.raises(NumericalError, match=rf"{LAYER}: .*not finite"):
        aggregation_of_layer.solve(1.0)


@pytest.mark.parametrize("n", [5, 40])
def test_failed_cholesky_names_the_layer_and_what_to_do(n: int) -> None:
    """A λ that vanishes beside the keys leaves a singular matrix: the error says so instead of returning noise."""
    keys, differences = rows(n)
    keys = keys[:1].expand(n, -1) * 1e10
    with pytest.raises(NumericalError, match=rf"{LAYER}: .*{n} rows.*not positive definite.*ridge"):
        solve(keys, differences, 1e-12).solve(1e-12)
