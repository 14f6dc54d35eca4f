"""One least squares for several layers that write into the same hidden state: what they put out adds up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import NumericalError
from .least_squares import SOLVE_DTYPE, DualSolution, PrimalSolution, RidgeLeastSquares, solve_device
from .shifts import Shift, dense, factored, is_small


class JointLeastSquares:
    """S₁ … S_m = argmin ‖Σ_l U_l S_l − D‖² + ρ Σ_l tr(S_lᵀ A_l S_l).

    With A = LLᵀ this is a ridge regression, at λ = ρ, on the whitened keys L⁻¹u of all layers side by side: n × n for
    up to as many rows as the layers have key features in all, and beyond that as large as all key features.

    Args:
        penalties: {module name: A, (key_size, key_size), symmetric and positive definite}, all on one device, where
            everything is computed. Left as they are.
            A = κ C, where C = KᵀK / m is the second moment of m other keys, costs κ times the mean squared move of what
            the layer puts out for them (MEMIT, arXiv 2210.07229, equation 14).

    Raises:
        NumericalError: a penalty is not positive definite; names the module.
    """

    def __init__(self, penalties: Mapping[str, Tensor]) -> None:
        self._factors: dict[str, Tensor] = {}
        for name, penalty in penalties.items():
            factor, info = torch.linalg.cholesky_ex(penalty.to(solve_device(penalty.device), SOLVE_DTYPE))
            if info.item() != 0 or not torch.isfinite(factor.diagonal()).all():
                raise NumericalError(
                    f"{name}: what an edit is weighed against is not positive definite. Raise EditorConfig.ridge, or "
                    "leave this layer out of target_modules."
                )
            self._factors[name] = factor

    def solve(
        self,
        keys: Mapping[str, Tensor],  # {module name: U, (n, key_size)}
        differences: Tensor,  # D, (n, value_size)
        weight: float = 1.0,
    ) -> dict[str, Shift]:
        """The minimiser at ρ = `weight`: {module name: S}, as factors over the n rows where these are small.

        Raises:
            NumericalError: a row that is not finite.
        """
        solution = self._solution(self._rows(keys), differences, weight)
        sizes = [len(factor) for factor in self._factors.values()]
        # P of S = PᵀD has rows, S has columns: either is split by layers, and put back from whitened to ordinary keys.
        if isinstance(solution, DualSolution) and is_small(len(differences), max(sizes), differences.shape[1]):
            parts = zip(self._factors.items(), solution.left.split(sizes, dim=1), strict=True)
            return {name: factored(_unwhitened(factor, p.T).T, solution.differences) for (name, factor), p in parts}
        parts = zip(self._factors.items(), solution.shift.split(sizes), strict=True)
        return {name: dense(_unwhitened(factor, s)) for (name, factor), s in parts}

    def difference_gradient(
        self,
        keys: Mapping[str, Tensor],  # {module name: U, (n, key_size)}
        shift_gradients: Mapping[str, Tensor],  # {module name: ∂L/∂S, (key_size, value_size)}
        weight: float = 1.0,
    ) -> Tensor:  # (n, value_size)
        """∂L/∂D of the minimiser at ρ = `weight`, which is linear in D; keys and penalties are constants."""
        rows = self._rows(keys)
        # S is L⁻ᵀ times the layer's part of the solution for whitened rows, whose gradient is L⁻¹∂L/∂S then.
        parts = [
            torch.linalg.solve_triangular(factor, shift_gradients[name].to(factor), upper=False)
            for name, factor in self._factors.items()
        ]
        gradients = torch.cat(parts)
        adjoint = self._solution(rows, rows.new_zeros(len(rows), gradients.shape[1]), weight).adjoint(gradients)
        if adjoint.row_gradients is not None:
            return adjoint.row_gradients
        assert adjoint.multiplier is not None  # for the type checker: one of the two is given
        return rows @ adjoint.multiplier

    def _rows(self, keys: Mapping[str, Tensor]) -> Tensor:  # (n, Σ key_size)
        """Whitened keys of all layers side by side."""
        whitened = [
            torch.linalg.solve_triangular(factor, keys[name].to(factor).T, upper=False).T
            for name, factor in self._factors.items()
        ]
        return torch.cat(whitened, dim=1)

    def _solution(self, rows: Tensor, differences: Tensor, weight: float) -> PrimalSolution | DualSolution:
        solver = RidgeLeastSquares(", ".join(self._factors))
        solver.add(rows, differences.to(rows))
        return solver.solve(weight, in_place=True)


def _unwhitened(
    factor: Tensor,  # L, (key_size, key_size), lower
    columns: Tensor,  # (key_size, m)
) -> Tensor:  # L⁻ᵀ columns, (key_size, m)
    return torch.linalg.solve_triangular(factor.T, columns, upper=True)
