"""Rows of all facts -> one weight shift per layer, and the adjoint of that solve (paper sections 4.1 and 4.3).

Both aggregations answer to the same calls: `add` rows as they stream in, `pool` those of all processes, `solve`, and on
the result `adjoint`.
With ∇ = ∂L/∂S they share one rule: the gradient of the rows is that of ⟨P M, D⟩ differentiated through P and D, where
M = ∇ for the sum and M = (UᵀU + λI)⁻¹ ∇ for least squares (whose P, the keys, is constant).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from . import distributed
from .errors import NumericalError
from .shifts import Shift, dense, factored, is_small

# Keys have outliers, so UᵀU is ill-conditioned: float32 is off by up to 0.7 % in the last layer of a 135M model, and
# the gradient of λ by a factor of two. Float64 costs little next to the language model's passes.
SOLVE_DTYPE = torch.float64
# Rows folded into UᵀU at a time: enough for matrix products at full speed, few beside k × k numbers.
_FOLD_ROWS = 1024


def solve_device(device: torch.device) -> torch.device:
    """Where float64 lives: `device` itself, or the CPU beside a device that has none."""
    return torch.device("cpu") if device.type == "mps" else device


def state_bytes(
    aggregation: str,
    shape: tuple[int, int],  # (key_size, value_size)
    n_rows: int,
    *,
    folded: bool = False,
) -> int:
    """The most memory that the aggregation of `n_rows` float32 rows of one layer holds until S is found in place.

    Args:
        aggregation: its name.
        shape: of S.
        n_rows: how many.
        folded: whether they are multiplied from the first on, however few: the slower way for up to k rows.
    """
    key_size, value_size = shape
    rows = 4 * (key_size + value_size)
    if folded or n_rows > key_size:
        products = key_size * value_size + (0 if aggregation == "sum" else key_size**2)
        return 8 * products + 5 * rows * min(_FOLD_ROWS, key_size)  # as they come, as kept, stacked, and in float64
    # The rows in float64, UUᵀ and as many numbers to select rows by; then P and both factors of S, or S and C.
    kept = is_small(n_rows, key_size, value_size)
    answer = (8 * key_size + rows) * n_rows if kept else 8 * value_size * (key_size + n_rows)
    return 2 * rows * n_rows + 16 * n_rows**2 + answer


def fitting_state(
    aggregation: str,
    shape: tuple[int, int],  # (key_size, value_size)
    n_rows: int,
    max_memory: int | None,
) -> tuple[int, bool]:
    """`state_bytes`, and whether rows are to be folded, as they are where that alone fits.

    Nearly k rows of a wide layer take twice the memory of their products.

    Args:
        aggregation, shape, n_rows: as for `state_bytes`.
        max_memory: bytes; None for no limit.
    """
    kept, folded = (state_bytes(aggregation, shape, n_rows, folded=way) for way in (False, True))
    is_folded = max_memory is not None and kept > max_memory and folded < kept
    return (folded if is_folded else kept), is_folded


@dataclass(frozen=True)
class Adjoint:
    """How ∂L/∂S reaches what S was made of.

    Attributes:
        ridge_gradient: ∂L/∂λ; None where there is no λ.
        multiplier: M, (key_size, value_size); or
        row_gradients: P M, (n_rows, value_size), for this process's rows in the order they were added.
    """

    ridge_gradient: Tensor | None
    multiplier: Tensor | None = None
    row_gradients: Tensor | None = None

    def inner(
        self,
        left: Tensor,  # (n, key_size)
        differences: Tensor,  # (n, value_size)
        start: int,
    ) -> Tensor:  # ()
        """⟨P M, D⟩ over the rows added from the `start`-th on: what to differentiate for the gradient of these rows."""
        if self.row_gradients is not None:
            pulled = self.row_gradients[start : start + len(left)].to(differences)
        else:
            assert self.multiplier is not None  # for the type checker: one of the two is given
            pulled = left @ self.multiplier.to(left)
        return (pulled * differences).sum()


class Solution(Protocol):
    """A weight shift that can be differentiated."""

    @property
    def shift(self) -> Tensor:  # (key_size, value_size)
        """S."""

    def to_shift(self) -> Shift:
        """S as an edit keeps it: float32 on the CPU, as factors where these are small."""

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:  # (n, key_size), (n, value_size)
        """P and D of S = PᵀD with a P that D has no part in, where these are smaller than S; else None."""

    def adjoint(
        self,
        gradient: Tensor,  # (key_size, value_size), ∂L/∂S; or (n, value_size), ∂L/∂D of `factors`
    ) -> Adjoint:
        """What ∂L/∂S comes to for the rows and for λ. Told by its shape from ∂L/∂D, which has fewer rows."""


@dataclass
class SumSolution:
    """S = Pᵀ D, from its rows while there are few, or their product."""

    rows: tuple[Tensor, Tensor] | None  # P (n, key_size), D (n, value_size)
    product: Tensor | None  # (key_size, value_size)

    factors = None  # P comes from the network, as D does

    @cached_property
    def shift(self) -> Tensor:  # (key_size, value_size)
        if self.rows is None:
            assert self.product is not None  # for the type checker: one of the two is given
            return self.product
        return self.rows[0].T @ self.rows[1]

    def adjoint(self, gradient: Tensor) -> Adjoint:
        return Adjoint(None, multiplier=gradient.to(self.shift))

    def to_shift(self) -> Shift:
        return dense(self.shift) if self.rows is None else factored(*self.rows)


@dataclass
class PrimalSolution:
    """S = (UᵀU + λI)⁻¹ UᵀD from its k × k factor."""

    shift: Tensor  # (key_size, value_size)
    factor: Tensor  # (key_size, key_size), lower Cholesky factor of UᵀU + λI
    factors = None  # there are more rows than the shift has

    def adjoint(self, gradient: Tensor) -> Adjoint:
        multiplier = _solved_in_place(self.factor, gradient.to(self.shift, copy=True))
        return Adjoint(-torch.tensordot(multiplier, self.shift), multiplier=multiplier)

    def to_shift(self) -> Shift:
        return dense(self.shift)


@dataclass
class DualSolution:
    """S = Uᵀ C with C = (UUᵀ + λI)⁻¹ D, from its n × n factor: cheap for few rows, and of rank n at most."""

    keys: Tensor  # (n, key_size)
    differences: Tensor  # (n, value_size)
    factor: Tensor  # (n, n), lower Cholesky factor of UUᵀ + λI
    own: slice = field(default_factory=lambda: slice(None))  # the rows that this process added

    @cached_property
    def coefficients(self) -> Tensor:  # (n, value_size)
        """C."""
        return _solved_in_place(self.factor, self.differences.clone())

    @property
    def shift_shape(self) -> tuple[int, int]:
        """(key_size, value_size)."""
        return self.keys.shape[1], self.differences.shape[1]

    @cached_property
    def shift(self) -> Tensor:  # (key_size, value_size)
        return self.keys.T @ self.coefficients

    @cached_property
    def left(self) -> Tensor:  # (n, key_size)
        """P = (UUᵀ + λI)⁻¹ U, of which S = PᵀD."""
        return _solved_in_place(self.factor, self.keys.clone())

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:  # (n, key_size), (n, value_size)
        # Unlike U and C, safe to round: see `to_shift`.
        n_rows, (key_size, value_size) = len(self.keys), self.shift_shape
        is_worth_it = n_rows * (key_size + value_size) < key_size * value_size
        return (self.left, self.differences) if is_worth_it else None

    def adjoint(self, gradient: Tensor) -> Adjoint:
        # U (UᵀU + λI)⁻¹ = (UUᵀ + λI)⁻¹ U, so the rows U M need no k × k matrix, and ⟨M, S⟩ = ⟨U M, C⟩ neither.
        if self.factors is not None and gradient.shape == self.differences.shape:
            row_gradients = gradient.to(self.keys)  # U M = P ∂L/∂S = ∂L/∂D
        else:
            row_gradients = _solved_in_place(self.factor, self.keys @ gradient.to(self.keys))
        return Adjoint(-(row_gradients * self.coefficients).sum(), row_gradients=row_gradients[self.own])

    def to_shift(self) -> Shift:
        """S = Pᵀ D over the rows whose D is not zero (preserved keys have none), with P = (UUᵀ + λI)⁻¹ U.

        Unlike the pair U, C this one is safe to round: no entry of P is larger than 1 / (2√λ), so nothing cancels.
        """
        moved = self.differences.any(dim=1)
        if not is_small(int(moved.sum()), *self.shift_shape):
            return dense(self.shift)
        if not moved.all():
            selection = torch.eye(len(self.keys), dtype=self.keys.dtype, device=self.keys.device)[:, moved]
            left = _solved_in_place(self.factor, selection).T @ self.keys
        else:
            left = self.left
        return factored(left, self.differences[moved])


class RowSum:
    """Aggregation `"sum"`: S = Σ p_j d_jᵀ (MEND). Up to k rows are kept; beyond that, only their product.

    Args:
        name: the layer, for error messages.
        n_expected: how many rows will come, if that is known: more than k are multiplied from the first on.
    """

    def __init__(self, name: str, n_expected: int = 0) -> None:
        self.name = name
        self._n_expected = n_expected
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._n_kept = 0
        self._product: Tensor | None = None  # (key_size, value_size)

    def add(
        self,
        left: Tensor,  # (n, key_size)
        value_differences: Tensor,  # (n, value_size)
    ) -> None:
        """Take in rows, in any order and grouping."""
        device = solve_device(left.device)
        self._kept.append((left.to(device), value_differences.to(device)))
        self._n_kept += len(left)
        if self._product is not None or max(self._n_kept, self._n_expected) > left.shape[1]:
            self._fold()

    def pool(self) -> None:
        """Put the rows of all processes together. Each has added some, if only (0, ...) ones."""
        self._n_kept = sum(distributed.counts(self._n_kept))
        if not any(distributed.counts(self._product is not None)) and self._n_kept <= self._kept[0][0].shape[1]:
            self._kept = [_gathered(*_stacked(self._kept))]
        else:
            self._fold()
            assert self._product is not None  # for the type checker: set in _fold
            self._product = distributed.add_up(self._product)

    def add_products(
        self,
        gram: Tensor | None,
        moment: Tensor,  # (key_size, value_size)
        n_rows: int,
    ) -> None:
        """Take in rows by what they come to: PᵀD. A sum needs no `gram`."""
        device = solve_device(moment.device)
        product = moment.to(device, SOLVE_DTYPE, copy=True)
        self._fold()
        self._n_kept += n_rows
        self._product = product if self._product is None else self._product.add_(product)

    def solve(self, ridge: float, *, in_place: bool = False) -> SumSolution:
        """The shift so far. `ridge` has no part in a sum, and there is nothing to save by `in_place`.

        Raises:
            NumericalError: the shift is not finite.
        """
        if not self._n_kept:
            raise NumericalError(f"{self.name}: no rows to aggregate.")
        solution = SumSolution(_stacked(self._kept) if self._product is None else None, self._product)
        _require_finite(solution.shift, self.name, "the sum of updates")
        return solution

    def _fold(self) -> None:
        if self._kept:
            rows, differences = _stacked(self._kept)
            product = rows.T @ differences
            self._product = product if self._product is None else self._product.add_(product)
            self._kept = []


class RidgeLeastSquares:
    """Aggregation `"least_squares"`: S = argmin ‖U S − D‖² + λ ‖S‖² over all rows added.

    Up to k rows are kept and solved in the dual (n × n). Beyond that, rows are folded into UᵀU and UᵀD, so memory does
    not grow with the number of facts. UᵀU is symmetric: only its upper triangle is computed, in half of the time.

    Args:
        name: the layer, for error messages.
        n_expected: how many rows will come, if that is known: more than k are folded from the first on.
    """

    def __init__(self, name: str, n_expected: int = 0) -> None:
        self.name = name
        self.n_rows = 0
        self._n_expected = n_expected
        self._n_kept = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._gram: Tensor | None = None  # (key_size, key_size), what is below the diagonal does not count
        self._moment: Tensor | None = None  # (key_size, value_size)
        self._own = slice(None)  # this process's rows among those kept

    def add(
        self,
        keys: Tensor,  # (n, key_size)
        value_differences: Tensor,  # (n, value_size)
    ) -> None:
        """Take in rows, in any order and grouping."""
        device = solve_device(keys.device)
        # In their own precision, which is exact, and half as large as what they are solved in.
        self._kept.append((keys.to(device), value_differences.to(device)))
        self.n_rows += len(keys)
        self._n_kept += len(keys)
        if self._n_kept > (min(keys.shape[1], _FOLD_ROWS) if self._is_folding() else keys.shape[1]):
            self._fold()

    def pool(self) -> None:
        """Put the rows of all processes together. Each has added some last, if only (0, ...) ones.

        The rows themselves while there are up to k, in the order of the processes; else UᵀU and UᵀD.
        """
        counts = distributed.counts(self.n_rows)
        first = sum(counts[: distributed.process_index()])
        self._own = slice(first, first + self.n_rows)
        self.n_rows = sum(counts)
        if not any(distributed.counts(self._is_folding())) and self.n_rows <= self._kept[0][0].shape[1]:
            self._kept = [_gathered(*_stacked(self._kept))]
        else:
            self._fold()
            assert self._gram is not None  # for the type checker: both are set in _fold
            assert self._moment is not None
            self._gram, self._moment = distributed.add_up(self._gram), distributed.add_up(self._moment)

    def add_products(
        self,
        gram: Tensor | None,  # (key_size, key_size)
        moment: Tensor,  # (key_size, value_size)
        n_rows: int,
    ) -> None:
        """Take in rows by what they come to: UᵀU and UᵀD."""
        assert gram is not None  # for the type checker: only a sum has none
        device = solve_device(moment.device)
        gram, moment = (product.to(device, SOLVE_DTYPE, copy=True) for product in (gram, moment))
        self._gram = gram if self._gram is None else self._gram.add_(gram)
        self._moment = moment if self._moment is None else self._moment.add_(moment)
        self.n_rows += n_rows

    def solve(self, ridge: float, *, in_place: bool = False) -> PrimalSolution | DualSolution:
        """The minimiser at λ = `ridge`.

        Args:
            ridge: λ.
            in_place: give the memory of UᵀU and UᵀD, or of the rows, to the solution; the aggregation is empty then.

        Raises:
            NumericalError: no rows, a key or value difference that is not finite, or a matrix that is not positive
                definite.
        """
        if not self.n_rows:
            raise NumericalError(f"{self.name}: no rows to solve for.")
        if self._kept and self._is_folding():
            self._fold()
        gram, moment, n_rows = self._gram, self._moment, self.n_rows
        keys, differences = _stacked(self._kept) if gram is None else (None, None)
        if in_place:
            self._kept, self._n_kept, self.n_rows, self._gram, self._moment = [], 0, 0, None, None
        if keys is not None and differences is not None:
            _require_finite(keys, self.name, "its keys")
            _require_finite(differences, self.name, "its value differences")
            return DualSolution(keys, differences, self._factor(keys @ keys.T, ridge, n_rows), self._own)
        assert gram is not None  # for the type checker: both are set in _fold
        assert moment is not None
        # Where a key is not finite, neither is its square.
        _require_finite(gram.diagonal(), self.name, "the product of its keys")
        _require_finite(moment, self.name, "the product of keys and value differences")
        if not in_place:
            gram, moment = gram.clone(), moment.clone()
        factor = self._factor(gram, ridge, n_rows)
        return PrimalSolution(_solved_in_place(factor, moment), factor)

    def _is_folding(self) -> bool:
        """Whether rows are folded as they come, and not only once there are more than k."""
        return self._gram is not None or (bool(self._kept) and self._n_expected > self._kept[0][0].shape[1])

    def _fold(self) -> None:
        for keys, differences in self._folds():
            if self._gram is None or self._moment is None:
                self._gram = keys.new_zeros(keys.shape[1], keys.shape[1])
                self._moment = keys.new_zeros(keys.shape[1], differences.shape[1])
            self._moment.addmm_(keys.T, differences)
            step = max(512, len(self._gram) // 8)
            for start in range(0, len(self._gram), step):
                self._gram[start : start + step, start:].addmm_(keys[:, start : start + step].T, keys[:, start:])

    def _folds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The kept rows in float64, some at a time; those that were handed out are kept no more."""
        waiting, self._kept, self._n_kept = self._kept[::-1], [], 0
        while waiting:
            chosen = [waiting.pop()]
            n_chosen = len(chosen[0][0])
            while waiting and n_chosen + len(waiting[-1][0]) <= _FOLD_ROWS:
                chosen.append(waiting.pop())
                n_chosen += len(chosen[-1][0])
            yield _stacked(chosen)

    def _factor(
        self,
        gram: Tensor,  # (n, n), symmetric; only its upper triangle is read
        ridge: float,
        n_rows: int,
    ) -> Tensor:
        """The lower Cholesky factor of the matrix + λI, in its memory."""
        gram.diagonal().add_(ridge)
        lower = gram.mT  # columns are contiguous, as LAPACK has them, so that it needs no copy
        factor, info = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32).to(gram.device)))
        if info.item() != 0 or not torch.isfinite(factor.diagonal()).all():
            raise NumericalError(
                f"{self.name}: the least-squares matrix ({n_rows} rows, ridge λ = {ridge:.3g}) is not positive "
                "definite. Its keys are too large next to λ for float64; raise EditorConfig.ridge, or leave this layer "
                "out of target_modules."
            )
        return factor


def aggregator(aggregation: str, name: str, n_expected: int = 0) -> RowSum | RidgeLeastSquares:
    """The aggregation of that name for the layer `name`, to which about `n_expected` rows will come."""
    return RowSum(name, n_expected) if aggregation == "sum" else RidgeLeastSquares(name, n_expected)


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All rows together, in the precision that they are solved in."""
    left, right = zip(*rows, strict=True)
    return torch.cat(left).to(SOLVE_DTYPE), torch.cat(right).to(SOLVE_DTYPE)


def _solved_in_place(
    factor: Tensor,  # (n, n), lower
    right: Tensor,  # (n, m)
) -> Tensor:  # (n, m)
    """(L Lᵀ)⁻¹ times a matrix whose rows are contiguous, in its memory. `torch.cholesky_solve` copies both."""
    columns = right.mT  # X Lᵀ = Rᵀ, then Y L = X: rows of R are columns here, as BLAS has them
    torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False, out=columns)
    torch.linalg.solve_triangular(factor, columns, upper=False, left=False, out=columns)
    return right


def _gathered(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat(distributed.gather_rows(left)), torch.cat(distributed.gather_rows(right))


def _require_finite(tensor: Tensor, name: str, what: str) -> None:
    # The sum, since `isfinite` of a large matrix needs as much memory again: it is finite if all values are.
    if not torch.isfinite(tensor.sum()):
        raise NumericalError(
            f"{name}: {what} are not finite. What the editor asks of this layer may have grown too large in training "
            "(its η, say): train it with lower learning rates. Or the base model overflows in its dtype: load it in "
            "bfloat16 or float32."
        )
