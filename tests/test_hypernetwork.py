"""Running statistics against `torch.mean` and `torch.var`, and the hyper-network against its formula."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorModel, Fact
from hf_malmen.hypernetwork import HyperBlock, HyperNetwork, RunningStatistics, WhiteningStatistics

SIZE = 6
KEY_SIZE, VALUE_SIZE, N_MODULES = 5, 3, 2


def samples(n: int, seed: int = 0) -> Tensor:
    """Rows of float32 features with different scales and far-off means, as those of a language model."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, SIZE, generator=generator, dtype=torch.float64)
    return (rows * torch.logspace(-1, 3, SIZE, dtype=torch.float64) + torch.arange(-300, 300, 100)).float()


def statistics_of(rows: Tensor, sizes: list[int] | int) -> RunningStatistics:
    """Statistics that took in `rows` in batches of `sizes`."""
    statistics = RunningStatistics(rows.shape[1])
    for batch in rows.split(sizes):
        statistics.update(batch)
    return statistics


def assert_holds(statistics: RunningStatistics, rows: Tensor) -> None:
    """The statistics are those of all of `rows`, to ten digits and more."""
    rows = rows.double()
    assert statistics.count.item() == len(rows)
    torch.testing.assert_close(statistics.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    if len(rows) > 1:
        variance = statistics.squared_deviation / (statistics.count - 1)
        torch.testing.assert_close(variance, rows.var(0), rtol=1e-10, atol=0)


def network(seed: int | None = 0, *, n_blocks: int = 2, statistics: bool = True) -> HyperNetwork:
    """A float64 hyper-network with random parameters and statistics; `seed=None` leaves its parameters initial."""
    torch.manual_seed(0)
    built = HyperNetwork(KEY_SIZE, VALUE_SIZE, N_MODULES, rank=4, n_blocks=n_blocks, edit_lr=0.05, ridge=0.5).double()
    generator = torch.Generator().manual_seed(seed or 0)
    if seed is not None:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if statistics:
        built.statistics.update(3 * torch.randn(50, KEY_SIZE + VALUE_SIZE, generator=generator).double() + 1)
    return built


def pairs(n: int = 7, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Keys and value gradients."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, KEY_SIZE, generator=generator, dtype=torch.float64)
    return keys, torch.randn(n, VALUE_SIZE, generator=generator, dtype=torch.float64)


# Running statistics


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_statistics_do_not_depend_on_the_batches(sizes: list[int], seed: int) -> None:
    """Mean and variance are those of all rows, whatever batches they came in, single rows included."""
    rows = samples(sum(sizes), seed)
    assert_holds(statistics_of(rows, sizes), rows)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_statistics_from_single_rows(n: int) -> None:
    """A stream of one-row batches, the first included, has no division by zero in it."""
    rows = samples(n)
    assert_holds(statistics_of(rows, 1), rows)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=2, max_size=5), data=st.data())
def test_merge_in_any_order(sizes: list[int], data: st.DataObject) -> None:
    """Statistics of disjoint rows, those of no rows among them, merge to those of all rows in any order."""
    rows = samples(sum(sizes) + 1)
    sizes = [*sizes, 1]
    parts = [statistics_of(part, max(len(part), 1)) for part in rows.split(sizes)]
    merged = RunningStatistics(SIZE)
    for index in data.draw(st.permutations(range(len(parts)))):
        part = parts[index]
        merged.merge(part.count, part.mean, part.squared_deviation)
    assert_holds(merged, rows)


def test_statistics_of_a_long_stream_with_an_outlier() -> None:
    """A float32 sum of squares would lose the variance beside a mean 10⁶ times as large; these do not."""
    rows = torch.randn(5000, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    rows[17] += 1e5
    assert_holds(statistics_of(rows, 64), rows)


def test_no_rows_change_nothing() -> None:
    """An empty batch, such as that of a process without data, is no row."""
    statistics = statistics_of(samples(4), 2)
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    statistics.update(torch.zeros(0, SIZE))
    assert all(torch.equal(value, before[name]) for name, value in statistics.state_dict().items())


def test_standardised_rows() -> None:
    """Rows come out with mean 0 and variance 1 over the data seen, in their own dtype."""
    rows = samples(40)
    statistics = statistics_of(rows, 7)
    standardised = statistics(rows.double())
    torch.testing.assert_close(standardised, (rows.double() - rows.double().mean(0)) / rows.double().std(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert statistics(rows.to(dtype)).dtype == dtype
    torch.testing.assert_close(statistics(rows).double(), standardised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [0, 1])
def test_without_statistics_rows_pass_as_they_are(n: int) -> None:
    """A variance takes two rows: before that, standardisation is the identity."""
    rows = samples(5)
    statistics = RunningStatistics(SIZE)
    statistics.update(rows[:n])
    assert torch.equal(statistics(rows), rows)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-20, 1e20])
def test_constant_feature_stays_finite(value: float) -> None:
    """A feature that never varied comes out as 0 where it is as ever, and finite where it is not."""
    rows = samples(11)
    rows[:, 2] = value
    statistics = statistics_of(rows, [1, 4, 6])
    standardised = statistics(rows)
    assert torch.isfinite(standardised).all()
    assert torch.equal(standardised[:, 2], torch.zeros(11))
    assert torch.isfinite(statistics(rows + 1)).all()


CASTS: dict[str, Callable[[Any], Any]] = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(dtype=float16)": lambda module: module.to(dtype=torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "to(cpu, float32)": lambda module: module.to("cpu", torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_do_not_round_statistics(cast: str) -> None:
    """However the editor around them is cast, the statistics keep every bit; its parameters are cast."""
    built = network()
    before = {name: buffer.clone() for name, buffer in built.statistics.named_buffers()}
    CASTS[cast](built)
    for name, buffer in built.statistics.named_buffers():
        assert buffer.dtype == torch.float64
        assert torch.equal(buffer, before[name])
    assert all(parameter.dtype != torch.float64 for parameter in built.parameters())
    built.statistics.update(torch.ones(1, KEY_SIZE + VALUE_SIZE))
    assert built.statistics.count.item() == before["count"].item() + 1


# The hyper-network


def by_hand(built: HyperNetwork, keys: Tensor, gradients: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """û and ĝ, one row and one feature at a time: z ← z + a ⊙ relu(z A B + b) + c."""
    seen = built.statistics
    deviation = (seen.squared_deviation / (seen.count - 1)).sqrt()
    outputs = []
    for row in torch.cat((keys, gradients), dim=1):
        z = (row - seen.mean) / deviation
        for block in built.blocks:
            inner = torch.stack([torch.dot(z, column) for column in block.down.T])
            outer = torch.stack([torch.dot(inner, column) for column in block.up.T]) + block.bias
            live = torch.where(outer > 0, outer, torch.zeros_like(outer))
            z = z + block.scale[index] * live + block.shift[index]
        outputs.append(z)
    stacked = torch.stack(outputs)
    return stacked[:, :KEY_SIZE], stacked[:, KEY_SIZE:]


@pytest.mark.parametrize("index", range(N_MODULES))
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_network_is_the_formula(n_blocks: int, index: int) -> None:
    """Standardisation, the blocks, and the split into û and ĝ, with each layer's own scales and shifts."""
    built, (keys, gradients) = network(n_blocks=n_blocks), pairs()
    pseudo_keys, pseudo_gradients = built(keys, gradients, index)
    expected = by_hand(built, keys, gradients, index)
    torch.testing.assert_close(pseudo_keys, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pseudo_gradients, expected[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(pseudo_keys, built(keys, gradients, 1 - index)[0])


def test_rows_for_least_squares() -> None:
    """P = U and d_j = −η (u_j · û_j) ĝ_j."""
    built, (keys, gradients) = network(), pairs()
    for index in range(N_MODULES):
        pseudo_keys, pseudo_gradients = by_hand(built, keys, gradients, index)
        edit_lr = torch.exp(built.log_edit_lr[index])
        expected = [-edit_lr * torch.dot(u, p) * g for u, p, g in zip(keys, pseudo_keys, pseudo_gradients, strict=True)]
        left, differences = built.rows(keys, gradients, index, "least_squares")
        assert torch.equal(left, keys)
        torch.testing.assert_close(differences, torch.stack(expected), rtol=1e-11, atol=1e-12)


def test_rows_for_the_sum() -> None:
    """Pᵀ D = −η Σ û_j ĝ_jᵀ, MEND's update."""
    built, (keys, gradients) = network(), pairs()
    for index in range(N_MODULES):
        pseudo_keys, pseudo_gradients = by_hand(built, keys, gradients, index)
        outer = [torch.outer(p, g) for p, g in zip(pseudo_keys, pseudo_gradients, strict=True)]
        left, differences = built.rows(keys, gradients, index, "sum")
        expected = -torch.exp(built.log_edit_lr[index]) * torch.stack(outer).sum(0)
        torch.testing.assert_close(left.T @ differences, expected, rtol=1e-11, atol=1e-12)


def test_initial_scales_are_as_configured() -> None:
    """η and λ start at their values of the configuration, in every layer."""
    built = network(None)
    torch.testing.assert_close(built.log_edit_lr.exp(), torch.full((N_MODULES,), 0.05).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(built.log_ridge.exp(), torch.full((N_MODULES,), 0.5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregation", ["least_squares", "sum"])
def test_untrained_network_is_the_gradient_itself(aggregation: str) -> None:
    """With B = 0, b = 0 and no statistics, û = u and ĝ = g: the rows are those of plain gradient descent."""
    built, (keys, gradients) = network(None, statistics=False), pairs()
    pseudo_keys, pseudo_gradients = built(keys, gradients, 0)
    assert torch.equal(pseudo_keys, keys)
    assert torch.equal(pseudo_gradients, gradients)
    left, differences = built.rows(keys, gradients, 0, aggregation)
    factor = 1.0 if aggregation == "sum" else keys.square().sum(1, keepdim=True)
    assert torch.equal(left, keys)
    torch.testing.assert_close(differences, -built.log_edit_lr[0].exp() * factor * gradients, rtol=1e-12, atol=0)


def test_gradient_reaches_the_matrices_at_initialisation() -> None:
    """Every pre-activation is exactly 0 at the start, where relu would pass no gradient to B and b: they get one.

    A stands behind B = 0, so its gradient is 0 until B has moved, and must be there after one step.
    """
    torch.manual_seed(0)
    block = HyperBlock(SIZE, 4, 1).double()
    hidden = samples(9).double().requires_grad_()
    assert torch.equal(hidden @ block.down @ block.up + block.bias, torch.zeros(9, SIZE).double())
    target = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(1)).double()
    (block(hidden, 0) * target).sum().backward()
    # ∂/∂B = (z A)ᵀ (a ⊙ target), ∂/∂b = Σ a ⊙ target, with a = 1: what the derivative 1 at 0 gives.
    for gradient, expected in ((block.up.grad, (hidden @ block.down).T @ target), (block.bias.grad, target.sum(0))):
        assert gradient is not None
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-10)
        assert (gradient != 0).all()
    assert block.down.grad is not None
    assert torch.equal(block.down.grad, torch.zeros_like(block.down))


@pytest.mark.parametrize("aggregation", ["least_squares", "sum"])
def test_every_parameter_moves(aggregation: str) -> None:
    """After a few optimiser steps from the initial state no parameter, and no layer's row of one, is where it was.

    log λ is not in the rows: the solve is what trains it.
    """
    built, (keys, gradients) = network(None), pairs(30)
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-2)
    target = torch.randn(KEY_SIZE, VALUE_SIZE, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for index in range(N_MODULES):
            left, differences = built.rows(keys, gradients, index, aggregation)
            loss = loss + (left.T @ differences - target).square().sum()
        loss.backward()
        optimizer.step()
    for name, parameter in built.named_parameters():
        moved = parameter.detach() != before[name]
        if name == "log_ridge":
            assert not moved.any()
        elif name.endswith(("scale", "shift", "log_edit_lr")):
            assert moved.reshape(N_MODULES, -1).any(dim=1).all(), name
        else:
            assert moved.any(), name


def test_forward_does_not_learn() -> None:
    """Reading never trains: no pass changes statistics or parameters, in whichever mode the network is."""
    built, (keys, gradients) = network(), pairs()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    for mode in (True, False):
        built.train(mode)
        built(keys, gradients, 0)
        built.rows(keys, gradients, 1, "sum")
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


# Preserved keys


def test_the_latest_keys_are_preserved() -> None:
    """New keys of every layer replace the oldest, in batches of any size, also of more than are kept."""
    built = HyperNetwork(
        KEY_SIZE, VALUE_SIZE, N_MODULES, rank=4, n_blocks=1, edit_lr=0.05, ridge=0.5, n_preserved_keys=6
    )
    assert torch.equal(built.preserved_keys, torch.zeros(N_MODULES, 6, KEY_SIZE))
    seen = built.preserved_keys.clone()
    for seed, n in enumerate((2, 3, 9, 1, 6)):
        keys = torch.randn(N_MODULES, n, KEY_SIZE, generator=torch.Generator().manual_seed(seed))
        built.preserve(keys)
        seen = torch.cat((seen, keys), dim=1)
        assert torch.equal(built.preserved_keys, seen[:, -6:])


def test_preserved_rows_weigh_what_they_should() -> None:
    """Their product is κ / m · K₀ᵀK₀, what the least squares adds to UᵀU."""
    built = HyperNetwork(
        KEY_SIZE, VALUE_SIZE, N_MODULES, rank=4, n_blocks=1, edit_lr=0.05, ridge=0.5, n_preserved_keys=6,
        preservation=3.0,
    ).double()  # fmt: skip
    built.preserve(torch.randn(N_MODULES, 6, KEY_SIZE, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        built.log_preservation[1] += 1
    for index, weight in enumerate((3.0, 3.0 * math.e)):
        keys, rows = built.preserved_keys[index], built.preserved_rows(index)
        torch.testing.assert_close(rows.T @ rows, weight / 6 * keys.T @ keys, rtol=1e-6, atol=0)


def whitening_of(rows: Tensor, size: int) -> WhiteningStatistics:
    """Statistics that whiten the last four features and took in `rows`, `size` at a time."""
    statistics = WhiteningStatistics(SIZE, 4)
    for batch in rows.split(size):
        statistics.update(batch)
    return statistics


def correlated(n: int, seed: int = 0) -> Tensor:
    """`samples` of which each feature has something of the one before it."""
    rows = samples(n, seed).double()
    return rows + 0.9 * rows.std(0) / rows.std(0).roll(1) * rows.roll(1, dims=1)


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("n", [2, 5, 50])
def test_whitening_merges_exactly(n: int, size: int) -> None:
    """Mean, variance and covariance of all rows, in batches of any size; also by way of a vector."""
    rows = correlated(n)
    statistics = whitening_of(rows, size)
    assert_holds(statistics, rows)
    torch.testing.assert_close(statistics.co_deviation / (n - 1), torch.cov(rows[:, 2:].T), rtol=1e-9, atol=1e-9)
    packed = WhiteningStatistics(SIZE, 4)
    for part in rows.split(size):
        packed.merge_packed(whitening_of(part, 2).pack())
    for name, buffer in statistics.named_buffers():
        torch.testing.assert_close(packed.get_buffer(name), buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [2, 6, 40])
def test_whitening_is_the_root_of_the_shrunk_covariance(n: int) -> None:
    """Σ^(−1/2) is symmetric and its square inverts Σ; keys are standardised as ever; no row count is too small."""
    rows = correlated(n)
    found = whitening_of(rows, 7)(rows)
    plain = statistics_of(rows, 7)(rows)
    assert torch.equal(found[:, :2], plain[:, :2])
    weight = (n - 1) / (n - 1 + 4)
    covariance = weight * torch.cov(rows[:, 2:].T) + (1 - weight) * torch.diag(rows[:, 2:].var(0))
    centred = rows[:, 2:] - rows[:, 2:].mean(0)
    # ‖Σ^(−1/2) g‖² = gᵀ Σ⁻¹ g for every pair of rows, and gᵀ Σ^(−1/2) g' = g'ᵀ Σ^(−1/2) g, as no other root has it.
    torch.testing.assert_close(found[:, 2:] @ found[:, 2:].T, centred @ torch.linalg.solve(covariance, centred.T))
    torch.testing.assert_close(centred @ found[:, 2:].T, found[:, 2:] @ centred.T)


def test_whitening_of_many_rows_leaves_nothing_correlated() -> None:
    """Of few rows it is standardising; of many, the whitened features have the identity for a covariance."""
    many = correlated(20_000)
    assert float(torch.corrcoef(many[:, 2:].T)[0, 1]) > 0.4
    whitened = whitening_of(many, 1000)(many)
    torch.testing.assert_close(torch.cov(whitened[:, 2:].T), torch.eye(4).double(), rtol=0, atol=1e-3)
    one = WhiteningStatistics(SIZE, 4)
    assert torch.equal(one(many[:3]), many[:3])
    one.update(many[:1])
    assert torch.equal(one(many[:3]), many[:3])


def test_whitening_keeps_a_feature_that_never_varied_near_zero() -> None:
    """Its variance is 0, and nothing is divided by that."""
    rows = correlated(30)
    rows[:, 3] = 5.0
    assert torch.isfinite(found := whitening_of(rows, 30)(rows)).all()
    assert float(found[:, 3].abs().max()) < 1e-9


@pytest.mark.parametrize("scale", [1e-8, 1e-12])
def test_whitening_has_no_unit(scale: float) -> None:
    """Beside a feature that is always 0, small gradients are whitened as large ones are."""
    rows = correlated(300)
    rows[:, 3] = 0.0
    found = whitening_of(scale * rows, 300)(scale * rows)
    torch.testing.assert_close(found, whitening_of(rows, 300)(rows), rtol=1e-6, atol=1e-9)


def test_whitening_of_features_of_very_different_size_is_finite() -> None:
    """What is lost in the rounding of the largest is no variance below 0."""
    rows = correlated(300)
    rows[:, 2:] *= torch.logspace(-12, 0, 4, dtype=torch.float64)
    assert torch.isfinite(whitening_of(rows, 300)(rows)).all()


def test_without_a_network_the_step_is_taken_at_the_pseudo_key() -> None:
    """d = −η ‖û‖² ĝ, and there is nothing to train; η is not in the state, as the configuration has it."""
    built = HyperNetwork(
        KEY_SIZE, VALUE_SIZE, N_MODULES, rank=0, n_blocks=0, edit_lr=0.05, ridge=0.5, value_differences="standardised"
    ).double()
    assert not list(built.parameters())
    assert {name.split(".")[0] for name in built.state_dict()} == {"statistics", "preserved_keys"}
    keys, gradients = pairs()
    built.statistics.update(torch.cat((keys, gradients), dim=1).double())
    left, differences = built.rows(keys.double(), gradients.double(), 1, "least_squares")
    z = torch.cat((keys, gradients), dim=1).double()
    z = (z - z.mean(0)) / z.std(0)
    wanted = -0.05 * z[:, :KEY_SIZE].square().sum(1, keepdim=True) * z[:, KEY_SIZE:]
    assert torch.equal(left, keys.double())
    torch.testing.assert_close(differences, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_as_precise_as_what_was_traced(
    make_llama: Callable[..., PreTrainedModel],
    make_editor: Callable[..., EditorModel],
    make_facts: Callable[..., list[Fact]],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    """On a GPU: TF32 of what was traced in half precision, where nothing is differentiated. As before, afterwards."""
    model = make_llama(dtype)
    editor = make_editor(model).float()
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    seen: list[tuple[str, str]] = []
    rows, forward = HyperNetwork.rows, type(model).forward

    def watched_rows(*args: Any) -> Any:
        seen.append(("editor", products.fp32_precision))
        return rows(*args)

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(("model", products.fp32_precision))
        return forward(*args, **kwargs)

    monkeypatch.setattr(HyperNetwork, "rows", watched_rows)
    monkeypatch.setattr(type(model), "forward", watched_forward)
    editor.make_edit(model, make_facts(4), tokenizer)
    assert set(seen) == {("model", before), ("editor", "tf32" if dtype == torch.bfloat16 else before)}
    seen.clear()
    name = editor.module_names[0]
    key_size, value_size = editor.config.shape_of(name)
    editor(torch.randn(3, key_size, dtype=dtype), torch.randn(3, value_size, dtype=dtype), name)
    assert seen == [("editor", before)]  # with a graph
    with torch.no_grad(), pytest.raises(RuntimeError):
        editor(torch.randn(3, 1, dtype=torch.bfloat16), torch.randn(3, value_size), name)
    assert products.fp32_precision == before
