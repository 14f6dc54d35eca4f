"""The networks of an editor, and the steps from what was traced of facts to weight shifts, and back to gradients."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from . import distributed
from .batches import TokenBatch
from .configuration import EditorConfig
from .covariance import KeyCovariance
from .errors import ModelMismatchError
from .hypernetwork import (
    DoubleBuffers,
    HyperBlock,
    HyperNetwork,
    MoveBlock,
    MoveNetwork,
    Normaliser,
    RunningStatistics,
)
from .least_squares import Adjoint, RidgeLeastSquares, RowSum, Solution, aggregator, solve_device
from .tracing import Trace, trace

DEFAULT_EDITOR_BATCH_SIZE = 1024
# Names of m layers that share a network, which of their rows comes first, and what they aggregate for n rows of each:
# (m, n, key_size), (m, n, value_size).
RowPass = tuple[list[str], int, tuple[Tensor, Tensor]]
# Seconds of solving after which a bar says how far it is.
_BAR_DELAY = 2.0


def pack_statistics(statistics: Mapping[str, RunningStatistics]) -> dict[str, Tensor]:
    """Statistics by shape as one flat mapping, `{"48x32.count": ...}`, float64 on the CPU, that a file can hold."""
    return {
        f"{shape}.{name}": buffer.detach().cpu().clone()
        for shape, own in statistics.items()
        for name, buffer in own.named_buffers()
    }


@contextmanager
def _products_like(dtype: torch.dtype) -> Iterator[None]:
    """Where nothing is differentiated: float32 products on a GPU as precise as values traced in `dtype` need.

    Of half precision that is TF32, which keeps at least as many bits of both factors, and is several times as fast.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    if torch.is_grad_enabled() or before == "tf32" or dtype not in (torch.float16, torch.bfloat16):
        yield
        return
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


class EditorNetworks(PreTrainedModel):
    """All that an editor holds: its networks, statistics and covariances, and what it computes with them alone.

    `EditorModel` is this with a base model, facts, edits and files around it.

    Args:
        config: with `target_modules` and `module_shapes` filled in, as `EditorModel.from_base` does.
    """

    config_class = EditorConfig
    config: EditorConfig
    base_model_prefix = ""
    main_input_name = "keys"

    def __init__(self, config: EditorConfig) -> None:
        config = config.resolved(config.task_type) if config.method is None else config
        super().__init__(config)
        if not config.module_shapes or set(config.target_modules or ()) != set(config.module_shapes):
            raise ValueError(
                "This EditorConfig does not name each target module with its shape, so there is nothing to build. Use "
                "EditorModel.from_base(model, config), which reads them off the base model."
            )
        # The list, not the mapping, says which row of a network is whose: the config file sorts a mapping by its keys.
        members: dict[str, list[str]] = {}
        for name in config.target_modules or ():
            key_size, value_size = config.shape_of(name)
            members.setdefault(f"{key_size}x{value_size}", []).append(name)
        moves_alone = config.value_differences == "moves"
        self.networks = nn.ModuleDict(
            {
                shape: HyperNetwork(
                    *(*config.shape_of(names[0]), len(names)),
                    rank=config.rank,
                    n_blocks=0 if moves_alone else config.n_blocks,
                    edit_lr=config.edit_lr,
                    ridge=config.ridge,
                    n_preserved_keys=config.n_preserved_keys,
                    preservation=config.preservation,
                    value_differences=config.value_differences,
                )
                for shape, names in members.items()
            }
        )
        # All targets put out a hidden state; where they do not, `Writer` says so.
        hidden_size = config.shape_of((config.target_modules or [])[0])[1]
        self.moves = MoveNetwork(hidden_size, config.rank, config.n_blocks) if moves_alone else None
        if config.key_covariance is not None:
            self.covariances = nn.ModuleDict(
                {shape: KeyCovariance(config.shape_of(names[0])[0], len(names)) for shape, names in members.items()}
            )
        # Where each target module finds its network, and its own row there.
        self._places: dict[str, tuple[str, int]] = {
            name: (shape, i) for shape, names in members.items() for i, name in enumerate(names)
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HyperBlock | HyperNetwork | MoveBlock):
            module.reset_parameters()
        elif isinstance(module, DoubleBuffers):
            for buffer in module.buffers():
                nn.init.zeros_(buffer)

    @property
    def module_names(self) -> list[str]:
        """Full names of the target modules."""
        return list(self._places)

    def network(self, name: str) -> tuple[HyperNetwork, int]:
        """The hyper-network of the module `name`, and the module's index in it."""
        shape, index = self._places[name]
        network = self.networks[shape]
        assert isinstance(network, HyperNetwork)  # for the type checker
        return network, index

    @property
    def device(self) -> torch.device:
        """Where the editor is. Not asked of its parameters, which some methods have none of."""
        return self.network(self.module_names[0])[0].log_edit_lr.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of everything but the statistics, which are in float64."""
        return self.network(self.module_names[0])[0].log_edit_lr.dtype

    @property
    def is_trained(self) -> bool:
        """Whether the editor has seen any training data, or its method needs none."""
        if self.moves is not None:
            return not self.moves.is_identity
        if self.config.key_covariance is not None:
            return self.config.key_covariance == "optional" or self.n_covariance_tokens > 0
        ready_from_the_start = not self.config.needs_training and self.config.follows_edits
        return ready_from_the_start or any(int(network.statistics.count) > 1 for network in self._networks().values())

    @property
    def n_covariance_tokens(self) -> int:
        """How many tokens `collect_covariance` has read."""
        return int(self._covariance(self.module_names[0])[0].count) if self.config.key_covariance else 0

    def key_penalty(self, name: str) -> Tensor | None:  # (key_size, key_size), float64
        """κ C of the module `name`, with C the second moment of ordinary keys; None where none was collected."""
        if self.n_covariance_tokens == 0:
            return None
        covariance, index = self._covariance(name)
        return self.config.preservation * covariance.moment(index)

    def forward(
        self,
        keys: Tensor,  # (n_tokens, key_size)
        value_gradients: Tensor,  # (n_tokens, value_size)
        module_name: str,
        normaliser: Normaliser | None = None,
    ) -> tuple[Tensor, Tensor]:  # (n_tokens, key_size), (n_tokens, value_size)
        """The rows that the aggregation of `module_name` takes in: its left factor and the value differences D.

        Args:
            keys, value_gradients: as traced.
            module_name: whose.
            normaliser: of statistics to use in place of the editor's own.
        """
        network, index = self.network(module_name)
        with _products_like(keys.dtype):
            keys, value_gradients = (rows.to(self.device, self.dtype) for rows in (keys, value_gradients))
            return network.rows(keys, value_gradients, index, self.config.aggregation, normaliser)

    def refine(
        self,
        states: Tensor,  # (n, hidden_size)
        moves: Tensor,  # (n, hidden_size)
    ) -> Tensor:  # (n, hidden_size)
        """The moves of hidden states that are written: what the network makes of those found; without one, these."""
        if self.moves is None:
            return moves
        refined: Tensor = self.moves(*(rows.to(self.device, self.dtype) for rows in (states, moves)))
        return refined.to(moves)

    def _rows(
        self,
        traced: Mapping[str, Trace],
        editor_batch_size: int,
        normalisers: Mapping[str, Normaliser] | None = None,
    ) -> Iterator[RowPass]:
        """`forward` of all rows of a trace, `editor_batch_size` of them at a time.

        Layers that share a network go through it together where their rows are few: its weights are read once for all.

        Args:
            traced: by module; not of more modules than the editor has.
            editor_batch_size: rows a pass, of all layers in it.
            normalisers: by the shape of their layers, in place of the editor's own.

        Yields:
            The passes; a layer's rows come one after the other.
        """
        for group in self._groups(traced, editor_batch_size):
            network, _ = self.network(group[0])
            index = torch.tensor([self._places[name][1] for name in group], device=self.device)
            normaliser = (normalisers or {}).get(self._places[group[0]][0])
            size = max(1, editor_batch_size // len(group))
            for start in range(0, len(traced[group[0]].keys), size):
                part = slice(start, start + size)
                keys, gradients = (
                    # Not in one call, which would convert first, and copy twice as much to a GPU.
                    torch.stack([rows[part].to(self.device).to(self.dtype) for rows in of_layers])
                    for of_layers in zip(*((traced[n].keys, traced[n].value_gradients) for n in group), strict=True)
                )
                with _products_like(traced[group[0]].keys.dtype):
                    rows_of_all = network.rows(keys, gradients, index, self.config.aggregation, normaliser)
                yield group, start, rows_of_all

    def _groups(self, traced: Mapping[str, Trace], editor_batch_size: int) -> Iterator[list[str]]:
        """Layers with one network and equally many rows, as many as fit one pass; a layer of more rows is alone."""
        alike: dict[tuple[str, int], list[str]] = {}
        for name, entry in traced.items():
            alike.setdefault((self._places[name][0], len(entry.keys)), []).append(name)
        for (_, n_rows), names in alike.items():
            n_layers = max(1, editor_batch_size // max(1, n_rows))
            yield from (names[i : i + n_layers] for i in range(0, len(names), n_layers))

    # Steps of the pipeline, shared by `apply` and the trainer

    def trace(
        self,
        model: nn.Module,
        batches: Iterable[TokenBatch],
        around: Callable[[TokenBatch], AbstractContextManager[None]] = lambda _: nullcontext(),
        names: Sequence[str] | None = None,
    ) -> Iterator[dict[str, Trace]]:
        """Keys and value gradients of every target module, batch by batch.

        Args:
            model: the base model, inside `frozen`.
            batches: facts, on the model's device.
            around: a context for the passes over each batch, such as `Trunk.replayed`.
            names: which modules; None: all.
        """
        for batch in batches:
            with around(batch):
                traced = trace(model, batch, names or self.module_names, self.config.traced_tokens)
            yield traced

    @torch.enable_grad()
    def row_passes(
        self, traces: Sequence[Mapping[str, Trace]], editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE
    ) -> list[RowPass] | None:
        """What `solve` and `backward` both need, with its graph, where all rows of all layers fit one pass; else None.

        Args:
            traces, editor_batch_size: as for both.
        """
        if len(traces) != 1 or sum(len(entry.keys) for entry in traces[0].values()) > editor_batch_size:
            return None
        return list(self._rows(traces[0], editor_batch_size))

    def solve(
        self,
        traces: Iterable[Mapping[str, Trace]],
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        statistics: Mapping[str, RunningStatistics] | None = None,
        passes: Sequence[RowPass] | None = None,
    ) -> dict[str, Solution]:
        """Weight shifts of all target modules from the traces of all facts (paper section 4.1).

        Several processes call it together, each with the traces of its own facts, and all get the shifts of all facts.

        Args:
            traces: one mapping a language-model batch; consumed one at a time. A process may have none.
            editor_batch_size: tokens a pass of the hyper-network. Does not change the result.
            statistics: by the shape of their layers, in place of the editor's own; see `statistics_after`.
            passes: of these traces, from `row_passes`, in place of running the hyper-network.

        Raises:
            NumericalError: a solve fails or is not finite; names the module.
        """
        return dict(self.solutions(traces, editor_batch_size, statistics, passes=passes))

    @torch.no_grad()
    def solutions(
        self,
        traces: Iterable[Mapping[str, Trace]],
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        statistics: Mapping[str, RunningStatistics] | None = None,
        names: Sequence[str] | None = None,
        n_rows: int = 0,
        folded: Collection[str] = (),
        passes: Sequence[RowPass] | None = None,
    ) -> Iterator[tuple[str, Solution]]:
        """`solve`, one module after the other: what a solution holds is free again when the next one is asked for.

        Args:
            traces, editor_batch_size, statistics, passes: as for `solve`.
            names: which modules; None: all.
            n_rows: how many rows of facts a module is about to get, if that is known. Memory depends on it, not the
                result.
            folded: modules whose rows are folded from the first on, however few; see `fitting_state`.

        Yields:
            The module's name and its solution.
        """
        names = list(names or self.module_names)
        aggregators = self.aggregators(names, n_rows, folded, pooled=True)
        # Once for all rows: whitening has a matrix to factorise.
        normalisers = {shape: own.normaliser() for shape, own in (statistics or self.statistics).items()}
        with distributed.together():
            for traced in traces:
                for group, _, rows in passes or self._rows(traced, editor_batch_size, normalisers):
                    for name, left, differences in zip(group, *rows, strict=True):
                        aggregators[name].add(left.detach(), differences.detach())
        # Shown only where it takes a while: each training step solves too.
        for name in logging.tqdm(names, desc="Solving", unit=" layers", leave=False, delay=_BAR_DELAY):
            own_rows = aggregators.pop(name)
            if distributed.n_processes() > 1:
                own_rows.add(*self.no_rows(name))
                own_rows.pool()
            yield name, own_rows.solve(self.ridge(name), in_place=True)

    def aggregators(
        self,
        names: Sequence[str] | None = None,
        n_rows: int = 0,
        folded: Collection[str] = (),
        *,
        pooled: bool = False,
    ) -> dict[str, RowSum | RidgeLeastSquares]:
        """What takes in the rows of target modules, with the rows that ask for preserved keys in it already.

        Args:
            names, n_rows, folded: as for `solutions`.
            pooled: whether the rows of several processes will be put together, where those keys must count once.
        """
        aggregators = {}
        for name in names or self.module_names:
            network, index = self.network(name)
            n_expected = network.key_size + 1 if name in folded else n_rows + network.n_preserved_keys
            aggregators[name] = aggregator(self.config.aggregation, name, n_expected)
            if network.n_preserved_keys and (distributed.is_main() or not pooled):
                still = network.preserved_rows(index)
                aggregators[name].add(still, still.new_zeros(len(still), network.value_size))
        return aggregators

    @property
    def statistics(self) -> dict[str, RunningStatistics]:
        """The editor's own running statistics, by the shape of the layers that share them."""
        return {shape: network.statistics for shape, network in self._networks().items()}

    @torch.no_grad()
    def update_statistics(
        self,
        traces: Iterable[Mapping[str, Trace]],
        statistics: Mapping[str, RunningStatistics] | None = None,
    ) -> None:
        """Take traces into the running statistics; of several processes, those of all.

        Args:
            traces: one mapping a language-model batch; consumed one at a time. Of several processes, each has its own,
                and all end with the same statistics.
            statistics: which to update; None: the editor's own.
        """
        statistics = self.statistics if statistics is None else statistics
        seen = {shape: network.new_statistics().to(self.device) for shape, network in self._networks().items()}
        with distributed.together():
            for traced in traces:
                for name, entry in traced.items():
                    rows = torch.cat((entry.keys, entry.value_gradients), dim=-1).to(self.device)
                    seen[self._places[name][0]].update(rows)
        for shape, own in statistics.items():
            for of_process in distributed.gather_rows(seen[shape].pack()[None]):
                own.merge_packed(of_process[0])

    @contextmanager
    def statistics_restored_on_error(self) -> Iterator[None]:
        """What fails within the context leaves the running statistics as they were before it."""
        before = deepcopy(self.statistics)
        try:
            yield
        except BaseException:
            for shape, own in self.statistics.items():
                own.load_state_dict(before[shape].state_dict())
            raise

    def statistics_after(
        self,
        traces: Iterable[Mapping[str, Trace]],
        earlier: Mapping[str, Tensor] | None = None,
    ) -> dict[str, RunningStatistics]:
        """Statistics that have followed an edit: copies, with the rows of the edit merged in.

        Args:
            traces: the edit's, as for `update_statistics`.
            earlier: the statistics that the edits so far have left, as `pack_statistics` makes them; None: the
                editor's own.

        Raises:
            ModelMismatchError: `earlier` is of another editor.
        """
        if earlier:
            statistics = self._unpack_statistics(earlier)
        else:
            statistics = {shape: deepcopy(own) for shape, own in self.statistics.items()}
        self.update_statistics(traces, statistics)
        return statistics

    def _unpack_statistics(self, packed: Mapping[str, Tensor]) -> dict[str, RunningStatistics]:
        statistics = {shape: network.new_statistics().to(self.device) for shape, network in self._networks().items()}
        expected = {name: buffer.shape for name, buffer in pack_statistics(statistics).items()}
        found = {name: tensor.shape for name, tensor in packed.items()}
        if found != expected:
            raise ModelMismatchError(
                f"The statistics that earlier edits left are {_shapes(found)}; this editor has {_shapes(expected)}. "
                "They are of another editor; go on with the one that made those edits."
            )
        for shape, own in statistics.items():
            own.merge(*(packed[f"{shape}.{name}"].to(buffer) for name, buffer in own.named_buffers()))
        return statistics

    @torch.no_grad()
    def preserve(self, traces: Sequence[Mapping[str, Trace]]) -> None:
        """Keep the keys of one training step, or as many as there is room for, in place of the oldest preserved ones.

        Called after the step's facts were edited, which must move their own keys.

        Args:
            traces: one mapping a language-model batch; of several processes, each has its own, and all keep the same.
        """
        for shape, network in self.networks.items():
            assert isinstance(network, HyperNetwork)  # for the type checker
            if network.n_preserved_keys:
                names = [name for name in self.module_names if self._places[name][0] == shape]
                rows = []
                for name in names:
                    own = torch.cat([self.no_rows(name)[0], *(traced[name].keys.to(self.device) for traced in traces)])
                    rows.append(torch.cat(distributed.gather_rows(own.to(network.preserved_keys))))
                # An even spread: rows come longest text first, so that the last ones are of the shortest only. The two
                # sides of an encoder-decoder have different tokens: each keeps as many of its own.
                fewest = min(network.n_preserved_keys, *map(len, rows))
                network.preserve(
                    torch.stack([own[torch.arange(fewest, device=own.device) * len(own) // fewest] for own in rows])
                )

    @torch.enable_grad()
    def backward(
        self,
        traces: Sequence[Mapping[str, Trace]],
        solutions: Mapping[str, Solution],
        shift_gradients: Mapping[str, Tensor],
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        passes: Sequence[RowPass] | None = None,
    ) -> None:
        """Turn ∂L/∂S of every module into gradients of the editor's parameters, added to those that are there.

        The hyper-network is replayed, `editor_batch_size` tokens at a time, with the adjoint of the solve as the
        gradient of its rows (paper section 4.3). Several processes call it together: each replays its own rows, and all
        get the gradients of the sum of their losses.

        Args:
            traces: what `solve` was given.
            solutions: what `solve` returned.
            shift_gradients: {module name: ∂L/∂S of shape (key_size, value_size), or ∂L/∂D of `Solution.factors`}, the
                same modules on every process; of several processes, that of each one's own part of the loss.
            editor_batch_size: tokens a pass of the hyper-network. Does not change the result.
            passes: what `solve` was given; used up. None: the hyper-network runs again.
        """
        with distributed.gradients_added_up(self.parameters()):
            pooled = {name: distributed.add_up(gradient) for name, gradient in shift_gradients.items()}
            adjoints: dict[str, Adjoint] = {}
            starts: dict[str, int] = {}

            def enter(name: str) -> None:
                adjoints[name] = solutions[name].adjoint(pooled[name])
                # What is not of rows of facts counts once.
                counted = distributed.is_main()
                starts[name] = self._backward_scales(name, adjoints[name], solutions[name]) if counted else 0

            joined = {
                name: Trace(
                    torch.cat([traced[name].keys for traced in traces]),
                    torch.cat([traced[name].value_gradients for traced in traces]),
                )
                for name in (pooled if traces else ())
            }
            for group, start, rows in passes or self._rows(joined, editor_batch_size):
                if start == 0:
                    adjoints.clear()  # those of the layers before
                    for name in group:
                        enter(name)
                torch.stack(
                    [
                        adjoints[name].inner(left, differences, starts[name] + start)
                        for name, left, differences in zip(group, *rows, strict=True)
                    ]
                ).sum().backward()
            for name in pooled:
                if name not in starts:  # no rows of its own
                    enter(name)

    def _backward_scales(self, name: str, adjoint: Adjoint, solution: Solution) -> int:
        """Gradients of log λ and log κ of the module `name`; returns how many rows its preserved keys take."""
        network, index = self.network(name)
        if adjoint.ridge_gradient is not None:
            (network.log_ridge[index].exp() * adjoint.ridge_gradient.to(network.log_ridge)).backward()
        if not network.n_preserved_keys:
            return 0
        # κ stands before K₀ᵀK₀ / m as λ stands before I, so ∂L/∂κ = −⟨M, K₀ᵀK₀ S⟩ / m = −⟨K₀ M, K₀ S⟩ / m.
        still = network.preserved_rows(index)  # scaled by √(κ / m), so this is κ ∂L/∂κ = ∂L/∂log κ
        slope = -adjoint.inner(still, still @ solution.shift, 0)
        (network.log_preservation[index] * slope.to(network.log_preservation)).backward()
        return len(still)

    def no_rows(self, name: str) -> tuple[Tensor, Tensor]:  # (0, key_size), (0, value_size)
        """What the facts of a process come to that has none."""
        key_size, value_size = self.config.shape_of(name)
        empty = torch.zeros(0, key_size + value_size, device=self.device, dtype=self.dtype)
        return empty[:, :key_size], empty[:, key_size:]

    def ridge(self, name: str) -> float:
        """λ of the module `name`."""
        network, index = self.network(name)
        return network.log_ridge[index].detach().double().exp().item()

    def edit_lr(self, name: str) -> float:
        """η of the module `name`."""
        network, index = self.network(name)
        return network.log_edit_lr[index].detach().double().exp().item()

    def preservation(self, name: str) -> float:
        """κ of the module `name`; 0 where no keys are preserved, one by one or by their covariance."""
        network, index = self.network(name)
        if network.n_preserved_keys:
            return network.log_preservation[index].detach().double().exp().item()
        return self.config.preservation if self.n_covariance_tokens else 0.0

    def scales(self) -> dict[str, list[float]]:
        """The learned η, λ and κ of every target module, in that order."""
        return {name: [self.edit_lr(name), self.ridge(name), self.preservation(name)] for name in self.module_names}

    def _covariance(self, name: str) -> tuple[KeyCovariance, int]:
        shape, index = self._places[name]
        covariance = self.covariances[shape]
        assert isinstance(covariance, KeyCovariance)  # for the type checker
        return covariance, index

    def _networks(self) -> dict[str, HyperNetwork]:
        return {self._places[name][0]: self.network(name)[0] for name in self.module_names}

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """This editor on the language model's device, so that nothing travels in between; then on the CPU again.

        An editor that somebody moved stays where it is, and so does one beside a device without float64.
        """
        if self.device.type != "cpu" or solve_device(device).type == "cpu":
            yield
            return
        try:
            nn.Module.to(self, device)
            yield
        finally:
            nn.Module.to(self, "cpu")


def _shapes(tensors: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items())) or "none"
