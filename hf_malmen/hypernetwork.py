"""Keys and value gradients -> value differences (paper section 4.2).

One `HyperNetwork` serves all target layers of one shape: the matrices are shared, and each layer has its own scales,
shifts, step size η and ridge λ.
"""

import math

import torch
from torch import Tensor, nn


class RunningStatistics(nn.Module):
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
        self.merge(torch.tensor(float(len(rows))), mean, (rows - mean).square().sum(0))

    @torch.no_grad()
    def merge(
        self,
        count: Tensor,  # ()
        mean: Tensor,  # (size,)
        squared_deviation: Tensor,  # (size,)
    ) -> None:
        """Take in the statistics of other rows: their number, mean, and sum of squared deviations from that mean."""
        count = count.to(self.count)
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.squared_deviation += squared_deviation + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count.copy_(total)

    def forward(
        self,
        rows: Tensor,  # (n, size)
    ) -> Tensor:
        """`rows` standardised, in their own dtype; as they are while fewer than two rows were seen."""
        if self.count < 2:
            return rows
        std = (self.squared_deviation / (self.count - 1)).sqrt()
        # A feature that never varied, but for rounding, carries no information; dividing by 1 leaves it near 0 instead
        # of making noise as large as the others' signal.
        std = torch.where(std > 1e-12 * self.mean.abs(), std, torch.ones_like(std))
        return ((rows.double() - self.mean) / std).to(rows.dtype)

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
        hidden: Tensor,  # (n, size)
        index: int,
    ) -> Tensor:
        # `clamp`, not `relu`: every pre-activation is exactly 0 at the start, where relu's gradient is 0 and clamp's
        # is 1. With relu, A, B and b would never receive a gradient.
        update = (hidden @ self.down @ self.up + self.bias).clamp(min=0)
        return hidden + self.scale[index] * update + self.shift[index]


class HyperNetwork(nn.Module):
    """The hyper-network for the `n_modules` target layers of one shape.

    Args:
        key_size: input features of each layer, k.
        value_size: output features, v.
        n_modules: how many layers share this network.
        rank, n_blocks, edit_lr, ridge, n_preserved_keys, preservation: as in `EditorConfig`.
    """

    log_edit_lr: nn.Parameter
    log_ridge: nn.Parameter
    log_preservation: nn.Parameter
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
    ) -> None:
        super().__init__()
        self.key_size, self.value_size = key_size, value_size
        self.initial = {"log_edit_lr": edit_lr, "log_ridge": ridge}
        if n_preserved_keys:
            self.initial["log_preservation"] = preservation
        size = key_size + value_size
        self.statistics = RunningStatistics(size)
        self.blocks = nn.ModuleList(HyperBlock(size, rank, n_modules) for _ in range(n_blocks))
        # Logarithms: both are scales. A linear η of 1e-6 would have a gradient 10⁴ times all others'.
        for scale in self.initial:
            self.register_parameter(scale, nn.Parameter(torch.empty(n_modules)))
        # Rows of zeros until training fills them: they ask for nothing.
        self.register_buffer("preserved_keys", torch.zeros(n_modules, n_preserved_keys, key_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """η, λ and κ as configured, no preserved keys; the blocks reset themselves."""
        for name, value in self.initial.items():
            nn.init.constant_(self.get_parameter(name), math.log(value))
        nn.init.zeros_(self.preserved_keys)

    def forward(
        self,
        keys: Tensor,  # (n, key_size)
        value_gradients: Tensor,  # (n, value_size)
        index: int,
    ) -> tuple[Tensor, Tensor]:  # (n, key_size), (n, value_size)
        """Pseudo-keys û and pseudo-gradients ĝ for the layer at `index`."""
        hidden = self.statistics(torch.cat((keys, value_gradients), dim=-1))
        for block in self.blocks:
            hidden = block(hidden, index)
        pseudo_keys, pseudo_gradients = hidden.split([self.key_size, self.value_size], dim=-1)
        return pseudo_keys, pseudo_gradients

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
        keys: Tensor,  # (n, key_size)
        value_gradients: Tensor,  # (n, value_size)
        index: int,
        aggregation: str,
    ) -> tuple[Tensor, Tensor]:  # (n, key_size), (n, value_size)
        """What the aggregation takes in: a left factor P and the value differences D.

        `"least_squares"` (MALMEN, equation 5): P = U and d_j = −η (u_j · û_j) ĝ_j, the move that one gradient step on
        the pseudo-pair alone would make at u_j. `"sum"` (MEND): P = Û and D = −η Ĝ, so that Pᵀ D is the sum of all
        those steps.
        """
        pseudo_keys, pseudo_gradients = self(keys, value_gradients, index)
        edit_lr = self.log_edit_lr[index].exp()
        if aggregation == "sum":
            return pseudo_keys, -edit_lr * pseudo_gradients
        coefficients = -edit_lr * (keys * pseudo_keys).sum(-1, keepdim=True)
        return keys, coefficients * pseudo_gradients
