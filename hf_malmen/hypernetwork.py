"""Keys and value gradients -> value differences (paper section 4.2).

One `HyperNetwork` serves all target layers of one shape: the matrices are shared, and each layer has its own scales,
shifts, step size η and ridge λ.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Rows of keys and value gradients -> the same rows, standardised or whitened, in their own dtype.
Normaliser = Callable[[Tensor], Tensor]


class DoubleBuffers(nn.Module):
    """A module whose float64 buffers move between devices with it, and stay float64."""

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # `.to(bfloat16)`, `.half()` and the like move the buffers but must not round them.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None  # for the type checker: _apply maps tensors to tensors
            if moved.dtype != torch.float64 and not moved.is_meta:
                self._buffers[name] = buffer.to(moved.device)
        return self


class RunningStatistics(DoubleBuffers):
    """Mean and variance of all rows seen so far, merged in float64 by Chan's parallel formula.

    Float64 because a sum over millions of rows with outliers loses float32's seven digits. Merging is exact whatever
    the batch sizes, single rows included, so the order and grouping of the data do not matter.

    Args:
        size: number of features.
    """

    count: Tensor
    mean: Tensor
    squared_deviation: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squared_deviation", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,  # (n, size)
    ) -> None:
        """Take in `rows`."""
        if len(rows) == 0:
            return
        rows = rows.double()
        mean = rows.mean(0)
        self.merge(torch.tensor(float(len(rows))), mean, *self._deviations(rows - mean))

    def merge(
        self,
        count: Tensor,  # ()
        mean: Tensor,  # (size,)
        squared_deviation: Tensor,  # (size,)
        *others: Tensor,
    ) -> None:
        """Take in the statistics of other rows: the buffers of another of these, in their order.

        They are the number of rows, their mean, and the sum of squared deviations from that mean.
        """
        count = count.to(self.count)
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        weight = self.count * count / total
        for own, other, between in zip(
            self._sums(), (squared_deviation, *others), self._deviations(delta[None]), strict=True
        ):
            own += other + between * weight
        self.mean += delta * (count / total)
        self.count.copy_(total)

    def pack(self) -> Tensor:  # (n,)
        """All buffers in one vector, for `merge_packed`."""
        return torch.cat([buffer.flatten() for buffer in self.buffers()])

    def merge_packed(
        self,
        packed: Tensor,  # (n,)
    ) -> None:
        """Take in what another of these packed."""
        parts = packed.split([buffer.numel() for buffer in self.buffers()])
        self.merge(*(part.view_as(buffer) for part, buffer in zip(parts, self.buffers(), strict=True)))

    def standard_deviation(self) -> Tensor:  # (size,)
        """Of each feature; 1 where it never varied, but for rounding.

        Such a feature carries no information; dividing by 1 leaves it near 0 instead of making noise as large as the
        others' signal.
        """
        std = (self.squared_deviation / (self.count - 1)).sqrt()
        return torch.where(self._varies(), std, torch.ones_like(std))

    def _varies(self) -> Tensor:  # (size,), bool
        """Which features vary, but for rounding."""
        return (self.squared_deviation / (self.count - 1)).sqrt() > 1e-12 * self.mean.abs()

    def normaliser(self) -> Normaliser:
        """What standardises rows by the statistics as they are now; leaves rows while fewer than two were seen."""
        if self.count < 2:
            return lambda rows: rows
        mean, std = self.mean.clone(), self.standard_deviation()
        return lambda rows: ((rows.double() - mean) / std).to(rows.dtype)

    def forward(
        self,
        rows: Tensor,  # (n, size)
    ) -> Tensor:
        """`rows` normalised, in their own dtype."""
        return self.normaliser()(rows)

    def _sums(self) -> tuple[Tensor, ...]:
        return (self.squared_deviation,)

    def _deviations(
        self,
        rows: Tensor,  # (n, size), less their mean
    ) -> tuple[Tensor, ...]:
        """What `_sums` hold, of these rows."""
        return (rows.square().sum(0),)


class WhiteningStatistics(RunningStatistics):
    """Running statistics that whiten the last features, the value gradients, by their covariance too.

    The other features, the keys, are standardised. Whitening is zero-phase (ZCA): g ← Σ^(−1/2) (g − μ), which of all
    that make the features uncorrelated moves them least (StableEdit, arXiv 2605.11836). Σ is the covariance C with
    whatever lies off its diagonal shrunk,

        Σ = (n − 1) / (n − 1 + v) C + v / (n − 1 + v) diag(C),

    the posterior mean under an inverse Wishart prior that is worth v rows and says the features are uncorrelated. With
    few rows it standardises, with many it whitens, and Σ is never singular in between.

    Args:
        size: number of features.
        n_whitened: v, how many of them are whitened.
    """

    co_deviation: Tensor  # (n_whitened, n_whitened)

    def __init__(self, size: int, n_whitened: int) -> None:
        super().__init__(size)
        self.n_whitened = n_whitened
        self.register_buffer("co_deviation", torch.zeros(n_whitened, n_whitened, dtype=torch.float64))

    def normaliser(self) -> Normaliser:
        """What standardises and whitens rows by the statistics as they are now."""
        if self.count < 2:
            return super().normaliser()
        std = self.standard_deviation()
        weight = (self.count - 1) / (self.count - 1 + self.n_whitened)
        covariance = self.co_deviation / (self.count - 1) * weight
        own, varies = std[-self.n_whitened :].square(), self._varies()[-self.n_whitened :]
        # One that never varied is as large as the others on average: beside a 1 that is far from them, these would be
        # lost in the rounding of the eigenvalues.
        covariance.diagonal().copy_(own if varies.all() or not varies.any() else own.where(varies, own[varies].mean()))
        variances, axes = torch.linalg.eigh(covariance)
        lowest = torch.finfo(variances.dtype).eps * variances[-1]  # below it there is rounding only
        root = (axes * variances.clamp(min=lowest).rsqrt()) @ axes.T
        mean, n_others = self.mean.clone(), len(std) - self.n_whitened

        def normalise(rows: Tensor) -> Tensor:
            others, whitened = (rows.double() - mean).split([n_others, self.n_whitened], dim=-1)
            return torch.cat((others / std[:n_others], whitened @ root), dim=-1).to(rows.dtype)

        return normalise

    def _sums(self) -> tuple[Tensor, ...]:
        return self.squared_deviation, self.co_deviation

    def _deviations(self, rows: Tensor) -> tuple[Tensor, ...]:
        whitened = rows[:, -self.n_whitened :]
        return *super()._deviations(rows), whitened.T @ whitened


class HyperBlock(nn.Module):
    """z ← z + a_l ⊙ relu(z A B + b) + c_l.

    Args:
        size: features of z.
        rank: columns of A.
        n_modules: layers that share A, B and b.
    """

    def __init__(self, size: int, rank: int, n_modules: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, rank))
        self.up = nn.Parameter(torch.empty(rank, size))
        self.bias = nn.Parameter(torch.empty(size))
        self.scale = nn.Parameter(torch.empty(n_modules, size))
        self.shift = nn.Parameter(torch.empty(n_modules, size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """B = 0 and b = 0: the block starts as the identity."""
        # By `nn.init`, which transformers guards when it loads a checkpoint: what came with it is left as it is.
        nn.init.normal_(self.down)
        for parameter in (self.up, self.bias, self.shift):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale)

    def forward(
        self,
        hidden: Tensor,  # (n, size), or (m, n, size)
        index: int | Tensor,  # or (m,)
    ) -> Tensor:
        # `clamp`, not `relu`: every pre-activation is exactly 0 at the start, where relu's gradient is 0 and clamp's
        # is 1. With relu, A, B and b would never receive a gradient.
        update = (hidden @ self.down @ self.up + self.bias).clamp(min=0)
        scale, shift = (_of_rows(own[index]) for own in (self.scale, self.shift))
        return hidden + scale * update + shift


def _of_rows(features: Tensor) -> Tensor:
    """Features of one layer, or of several, (m, size), where they meet rows (n, size) or (m, n, size)."""
    return features if features.dim() == 1 else features[:, None]


class HyperNetwork(nn.Module):
    """The hyper-network for the `n_modules` target layers of one shape, or what stands in its place.

    Args:
        key_size: input features of each layer, k.
        value_size: output features, v.
        n_modules: how many layers share this network.
        value_differences: `"network"`; or `"standardised"` or `"whitened"`, which have no parameters: η, λ and κ are as
            configured, and the statistics are all that there is.
        rank, n_blocks, edit_lr, ridge, n_preserved_keys, preservation: as in `EditorConfig`.
    """

    statistics: RunningStatistics
    log_edit_lr: Tensor
    log_ridge: Tensor
    log_preservation: Tensor
    preserved_keys: Tensor

    def __init__(
        self,
        key_size: int,
        value_size: int,
        n_modules: int,
        *,
        rank: int,
        n_blocks: int,
        edit_lr: float,
        ridge: float,
        n_preserved_keys: int = 0,
        preservation: float = 1.0,
        value_differences: str = "network",
    ) -> None:
        super().__init__()
        self.is_learned = value_differences == "network"
        self.key_size, self.value_size = key_size, value_size
        self.initial = {"log_edit_lr": edit_lr, "log_ridge": ridge}
        if n_preserved_keys:
            self.initial["log_preservation"] = preservation
        size = key_size + value_size
        self.is_whitened = value_differences == "whitened"
        self.statistics = self.new_statistics()
        self.blocks = nn.ModuleList(HyperBlock(size, rank, n_modules) for _ in range(n_blocks))
        # Logarithms: both are scales. A linear η of 1e-6 would have a gradient 10⁴ times all others'.
        for scale in self.initial:
            if self.is_learned:
                self.register_parameter(scale, nn.Parameter(torch.empty(n_modules)))
            else:  # not saved: they are the configuration's
                self.register_buffer(scale, torch.empty(n_modules), persistent=False)
        # Rows of zeros until training fills them: they ask for nothing.
        self.register_buffer("preserved_keys", torch.zeros(n_modules, n_preserved_keys, key_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """η, λ and κ as configured, no preserved keys; the blocks reset themselves."""
        for name, value in self.initial.items():
            nn.init.constant_(getattr(self, name), math.log(value))
        nn.init.zeros_(self.preserved_keys)

    def forward(
        self,
        keys: Tensor,  # (n, key_size), or (m, n, key_size)
        value_gradients: Tensor,  # (n, value_size), or (m, n, value_size)
        index: int | Tensor,  # or (m,)
        normaliser: Normaliser | None = None,
    ) -> tuple[Tensor, Tensor]:  # as the arguments
        """Pseudo-keys û and pseudo-gradients ĝ for the layer at `index`, or for m layers at once.

        Args:
            keys, value_gradients: U and G.
            index: the layer's, or those of m layers.
            normaliser: of statistics to use in place of its own.
        """
        hidden = (normaliser or self.statistics)(torch.cat((keys, value_gradients), dim=-1))
        for block in self.blocks:
            hidden = block(hidden, index)
        pseudo_keys, pseudo_gradients = hidden.split([self.key_size, self.value_size], dim=-1)
        return pseudo_keys, pseudo_gradients

    def new_statistics(self) -> RunningStatistics:
        """Statistics of the kind that `value_differences` needs, which have seen nothing."""
        size = self.key_size + self.value_size
        return WhiteningStatistics(size, self.value_size) if self.is_whitened else RunningStatistics(size)

    @property
    def n_preserved_keys(self) -> int:
        """How many keys of each layer are asked to stay where they are."""
        return self.preserved_keys.shape[1]

    def preserved_rows(self, index: int) -> Tensor:  # (n_preserved_keys, key_size), float64
        """The preserved keys K₀ of the layer at `index`, scaled by √(κ / m).

        As rows of the least squares whose value differences are zero, they add (κ / m) ‖K₀ S‖² to what is minimised.
        """
        weight = self.log_preservation[index].detach().double().exp() / self.n_preserved_keys
        return self.preserved_keys[index].double() * weight.sqrt()

    @torch.no_grad()
    def preserve(
        self,
        keys: Tensor,  # (n_modules, n, key_size)
    ) -> None:
        """Take in new keys of every layer in place of the oldest."""
        kept = torch.cat((self.preserved_keys, keys.to(self.preserved_keys)), dim=1)
        self.preserved_keys.copy_(kept[:, -self.n_preserved_keys :])

    def rows(
        self,
        keys: Tensor,  # (n, key_size), or (m, n, key_size)
        value_gradients: Tensor,  # (n, value_size), or (m, n, value_size)
        index: int | Tensor,  # or (m,)
        aggregation: str,
        normaliser: Normaliser | None = None,
    ) -> tuple[Tensor, Tensor]:  # as the arguments
        """What the aggregation takes in: a left factor P and the value differences D; of m layers at once, m of each.

        `"least_squares"`: P = U, and d_j is the move that a gradient step of size η on a pseudo-pair alone would make,

        - with a network at u_j: d_j = −η (u_j · û_j) ĝ_j (MALMEN, arXiv 2311.04661, equation 5; RLEdit, 2502.05759);
        - without one at û_j itself: d_j = −η ‖û_j‖² ĝ_j, where û_j and ĝ_j are the key and the value gradient
          standardised (UltraEdit, 2505.14679), or the gradient whitened (StableEdit, 2605.11836).

        `"sum"` (MEND, arXiv 2110.11309): P = Û and D = −η Ĝ, so that Pᵀ D is the sum of all those steps.
        """
        pseudo_keys, pseudo_gradients = self(keys, value_gradients, index, normaliser)
        edit_lr = _of_rows(self.log_edit_lr[index].exp()[..., None])
        if aggregation == "sum":
            return pseudo_keys, -edit_lr * pseudo_gradients
        where = keys if self.is_learned else pseudo_keys
        coefficients = -edit_lr * (where * pseudo_keys).sum(-1, keepdim=True)
        return keys, coefficients * pseudo_gradients


class MoveBlock(nn.Module):
    """δ ← exp(cᵀz + c₀) δ + r (B z + b) with z = relu(A [h / r, δ / r] + a) and r the root mean square of the state h.

    The first factor makes moves longer or shorter, the second term turns them.

    Args:
        hidden_size: features of h and δ.
        rank: rows of A.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(2 * hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)
        self.length = nn.Linear(rank, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """B, b, c and c₀ = 0: the block starts as the identity."""
        # By `nn.init`, as in `HyperBlock`. A is not 0, and so B and c have gradients from the first step on.
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, *self.up.parameters(), *self.length.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        states: Tensor,  # (n, hidden_size)
        moves: Tensor,  # (n, hidden_size)
    ) -> Tensor:  # (n, hidden_size)
        unit = states.square().mean(dim=-1, keepdim=True).sqrt()
        inner = self.down(torch.cat((states / unit, moves / unit), dim=-1)).relu()
        return self.length(inner).exp() * moves + unit * self.up(inner)


class MoveNetwork(nn.Module):
    """What training makes of the moves that a search has found: MALMEN's hyper-network, of one state a fact.

    A search looks at one fact. What many facts, written together, do to each other's rephrases and to other subjects
    is what the network learns, through the least squares that writes the moves.

    Args:
        hidden_size: features of a hidden state and of its move.
        rank: width of a block.
        n_blocks: how many.
    """

    def __init__(self, hidden_size: int, rank: int, n_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MoveBlock(hidden_size, rank) for _ in range(n_blocks))

    @property
    def is_identity(self) -> bool:
        """Whether it leaves moves as they are, as before any training."""
        blocks = [block for block in self.blocks if isinstance(block, MoveBlock)]
        ends = [*(block.up for block in blocks), *(block.length for block in blocks)]
        return not any(bool(parameter.any()) for end in ends for parameter in end.parameters())

    def forward(
        self,
        states: Tensor,  # (n, hidden_size)
        moves: Tensor,  # (n, hidden_size)
    ) -> Tensor:  # (n, hidden_size)
        """The moves to write."""
        for block in self.blocks:
            moves = block(states, moves)
        return moves
