"""Rows of all facts -> one weight shift per layer, and the adjoint of that solve (paper sections 4.1 and 4.3).

Both aggregations answer to the same three calls: `add` rows as they stream in, `solve`, and on the result `adjoint`.
With ∇ = ∂L/∂S they share one rule: the gradient of the rows is that of ⟨P M, D⟩ differentiated through P and D, where
M = ∇ for the sum and M = (UᵀU + λI)⁻¹ ∇ for least squares (whose P, the keys, is constant).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .errors import NumericalError
from .shifts import Shift, dense, factored

# Keys have outliers, so UᵀU is ill-conditioned: float32 is off by up to 0.7 % in the last layer of a 135M model, and
# the gradient of λ by a factor of two. Float64 costs little next to the language model's passes.
SOLVE_DTYPE = torch.float64


def solve_device(device: torch.device) -> torch.device:
    """Where float64 lives: `device` itself, or the CPU beside a device that has none."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Adjoint:
    """How ∂L/∂S reaches what S was made of.

    Attributes:
        ridge_gradient: ∂L/∂λ; None where there is no λ.
        multiplier: M, (key_size, value_size); or
        row_gradients: P M, (n_rows, value_size), for all rows in the order they were added.
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

    def adjoint(
        self,
        gradient: Tensor,  # (key_size, value_size), ∂L/∂S
    ) -> Adjoint:
        """What ∂L/∂S comes to for the rows and for λ."""


@dataclass
class SumSolution:
    """S = Pᵀ D, from its rows while there are few, or their product."""

    rows: tuple[Tensor, Tensor] | None  # P (n, key_size), D (n, value_size)
    product: Tensor | None  # (key_size, value_size)

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

    def adjoint(self, gradient: Tensor) -> Adjoint:
        multiplier = torch.cholesky_solve(gradient.to(self.shift), self.factor)
        return Adjoint(-(multiplier * self.shift).sum(), multiplier=multiplier)

    def to_shift(self) -> Shift:
        return dense(self.shift)


@dataclass
class DualSolution:
    """S = Uᵀ C with C = (UUᵀ + λI)⁻¹ D, from its n × n factor: cheap for few rows, and of rank n at most."""

    keys: Tensor  # (n, key_size)
    differences: Tensor  # (n, value_size)
    factor: Tensor  # (n, n), lower Cholesky factor of UUᵀ + λI

    @cached_property
    def coefficients(self) -> Tensor:  # (n, value_size)
        """C."""
        return torch.cholesky_solve(self.differences, self.factor)

    @cached_property
    def shift(self) -> Tensor:  # (key_size, value_size)
        return self.keys.T @ self.coefficients

    def adjoint(self, gradient: Tensor) -> Adjoint:
        # U (UᵀU + λI)⁻¹ = (UUᵀ + λI)⁻¹ U, so the rows U M need no k × k matrix, and ⟨M, S⟩ = ⟨U M, C⟩ neither.
        row_gradients = torch.cholesky_solve(self.keys @ gradient.to(self.keys), self.factor)
        return Adjoint(-(row_gradients * self.coefficients).sum(), row_gradients=row_gradients)

    def to_shift(self) -> Shift:
        """S = Pᵀ D over the rows whose D is not zero (preserved keys have none), with P = (UUᵀ + λI)⁻¹ U.

        Unlike the pair U, C this one is safe to round: no entry of P is larger than 1 / (2√λ), so nothing cancels.
        """
        moved = self.differences.any(dim=1)
        if not moved.all():
            selection = torch.eye(len(self.keys), dtype=self.keys.dtype, device=self.keys.device)[:, moved]
            left = torch.cholesky_solve(selection, self.factor).T @ self.keys
        else:
            left = torch.cholesky_solve(self.keys, self.factor)
        return factored(left, self.differences[moved])


class RowSum:
    """Aggregation `"sum"`: S = Σ p_j d_jᵀ (MEND). Up to k rows are kept; beyond that, only their product.

    Args:
        name: the layer, for error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
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
        self._kept.append((left.to(device, SOLVE_DTYPE), value_differences.to(device, SOLVE_DTYPE)))
        self._n_kept += len(left)
        if self._product is not None or self._n_kept > left.shape[1]:
            rows, differences = _stacked(self._kept)
            product = rows.T @ differences
            self._product = product if self._product is None else self._product.add_(product)
            self._kept = []

    def solve(self, ridge: float) -> SumSolution:
        """The shift so far. `ridge` has no part in a sum.

        Raises:
            NumericalError: the shift is not finite.
        """
        if not self._n_kept:
            raise NumericalError(f"{self.name}: no rows to aggregate.")
        solution = SumSolution(_stacked(self._kept) if self._product is None else None, self._product)
        _require_finite(solution.shift, self.name, "the sum of updates")
        return solution


class RidgeLeastSquares:
    """Aggregation `"least_squares"`: S = argmin ‖U S − D‖² + λ ‖S‖² over all rows added.

    Up to k rows are kept and solved in the dual (n × n). Beyond that, every k rows are folded into UᵀU and UᵀD, so
    memory does not grow with the number of facts.

    Args:
        name: the layer, for error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.n_rows = 0
        self._n_kept = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._gram: Tensor | None = None  # (key_size, key_size)
        self._moment: Tensor | None = None  # (key_size, value_size)

    def add(
        self,
        keys: Tensor,  # (n, key_size)
        value_differences: Tensor,  # (n, value_size)
    ) -> None:
        """Take in rows, in any order and grouping."""
        device = solve_device(keys.device)
        self._kept.append((keys.to(device, SOLVE_DTYPE), value_differences.to(device, SOLVE_DTYPE)))
        self.n_rows += len(keys)
        self._n_kept += len(keys)
        if self._n_kept > keys.shape[1]:
            self._fold()

    def solve(self, ridge: float) -> PrimalSolution | DualSolution:
        """The minimiser at λ = `ridge`.

        Raises:
            NumericalError: no rows, a key or value difference that is not finite, or a matrix that is not positive
                definite.
        """
        if not self.n_rows:
            raise NumericalError(f"{self.name}: no rows to solve for.")
        if self._gram is not None:
            if self._kept:
                self._fold()
            return self._solve_primal(ridge)
        return self._solve_dual(ridge)

    def _fold(self) -> None:
        keys, differences = _stacked(self._kept)
        gram, moment = keys.T @ keys, keys.T @ differences
        self._gram = gram if self._gram is None else self._gram.add_(gram)
        self._moment = moment if self._moment is None else self._moment.add_(moment)
        self._kept, self._n_kept = [], 0

    def _solve_primal(self, ridge: float) -> PrimalSolution:
        assert self._gram is not None  # for the type checker: both are set in _fold
        assert self._moment is not None
        _require_finite(self._gram, self.name, "the product of its keys")
        _require_finite(self._moment, self.name, "the product of keys and value differences")
        factor = self._factor(self._gram, ridge)
        return PrimalSolution(torch.cholesky_solve(self._moment, factor), factor)

    def _solve_dual(self, ridge: float) -> DualSolution:
        keys, differences = _stacked(self._kept)
        _require_finite(keys, self.name, "its keys")
        _require_finite(differences, self.name, "its value differences")
        return DualSolution(keys, differences, self._factor(keys @ keys.T, ridge))

    def _factor(self, gram: Tensor, ridge: float) -> Tensor:
        regularised = gram.clone()
        regularised.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(regularised)
        if info.item() != 0 or not torch.isfinite(factor).all():
            raise NumericalError(
                f"{self.name}: the least-squares matrix ({self.n_rows} rows, ridge λ = {ridge:.3g}) is not positive "
                "definite. Its keys are too large next to λ for float64; raise EditorConfig.ridge, or leave this layer "
                "out of target_modules."
            )
        return factor


def aggregator(aggregation: str, name: str) -> RowSum | RidgeLeastSquares:
    """The aggregation of that name for the layer `name`."""
    return RowSum(name) if aggregation == "sum" else RidgeLeastSquares(name)


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    left, right = zip(*rows, strict=True)
    return torch.cat(left), torch.cat(right)


def _require_finite(tensor: Tensor, name: str, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NumericalError(
            f"{name}: {what} are not finite. The editor's η for this layer may have grown too large, or the base model "
            "overflows in its dtype; load it in bfloat16 or float32."
        )
