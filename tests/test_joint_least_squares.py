"""Layers that are solved for together, against one dense least squares over their keys side by side."""

import pytest
import torch
from torch import Tensor

from hf_malmen import NumericalError
from hf_malmen.joint_least_squares import JointLeastSquares
from hf_malmen.shifts import FactoredShift, materialise

SIZES = {"first": 12, "second": 12, "third": 7}


def case(n_rows: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Keys, differences and penalties."""
    draw = torch.Generator().manual_seed(n_rows)
    keys = {name: torch.randn(n_rows, size, generator=draw) for name, size in SIZES.items()}
    penalties = {}
    for name, size in SIZES.items():
        others = torch.randn(size + 3, size, generator=draw, dtype=torch.float64)
        penalties[name] = others.T @ others
    return keys, torch.randn(n_rows, 5, generator=draw), penalties


@pytest.mark.parametrize("n_rows", [1, 4, 40])  # 40 is more than all key features together
def test_equals_a_dense_least_squares(n_rows: int) -> None:
    """Rows of the penalty's root stand below the keys, with nothing asked of them."""
    keys, differences, penalties = case(n_rows)
    root = torch.block_diag(*(torch.linalg.cholesky(penalty).T for penalty in penalties.values()))
    rows = torch.cat((torch.cat(list(keys.values()), dim=1).double(), 0.3**0.5 * root))
    wanted = torch.cat((differences.double(), torch.zeros(len(root), 5, dtype=torch.float64)))
    expected = torch.linalg.lstsq(rows, wanted).solution.split(list(SIZES.values()))
    found = JointLeastSquares(penalties).solve(keys, differences, weight=0.3)
    assert list(found) == list(SIZES)
    for shift, solution in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(materialise(shift, True).double(), solution, rtol=1e-5, atol=1e-6)


def test_few_rows_are_kept_as_factors() -> None:
    """Of as many rows as there are."""
    keys, differences, penalties = case(3)
    for shift in JointLeastSquares(penalties).solve(keys, differences).values():
        assert isinstance(shift, FactoredShift)
        assert len(shift.left) == 3


def test_what_cannot_be_solved_names_the_layer() -> None:
    """A penalty that is not positive definite, and a row that is not finite."""
    keys, differences, penalties = case(3)
    with pytest.raises(NumericalError, match="second: what an edit is weighed against is not positive definite"):
        JointLeastSquares(penalties | {"second": torch.zeros(12, 12)})
    keys["third"][0, 0] = torch.nan
    with pytest.raises(NumericalError, match="third: its keys are not finite"):
        JointLeastSquares(penalties).solve(keys, differences)
