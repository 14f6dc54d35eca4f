"""`EditorModel`: the pipeline behind one call."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path, PurePosixPath
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from . import distributed
from .batches import TokenBatch, Tokenizer
from .checkpoint import check_checkpoint, copy_checkpoint
from .configuration import METHODS, EditorConfig
from .covariance import DEFAULT_N_TOKENS, DEFAULT_TEXT_BATCH_SIZE, KeyCovariance, ordinary_keys
from .edit import Edit, base_fingerprint, check_fingerprint
from .errors import CheckpointError, ModelMismatchError, UntrainedEditorWarning
from .evaluation import Evaluation, measure_edit
from .facts import Fact, FactStream, load_facts
from .history import CARD_FILE
from .hub import cached_commit, push_folder
from .hypernetwork import DoubleBuffers, HyperBlock, HyperNetwork, Normaliser, RunningStatistics
from .least_squares import Adjoint, RidgeLeastSquares, RowSum, Solution, aggregator, solve_device
from .makers import DEFAULT_EDITOR_BATCH_SIZE, MAKERS, EditRequest, pack_statistics
from .memory import parse_memory
from .model_card import HUB_RESULTS_FILE, N_FACTS_SHOWN, PLOT_FILE, RESULTS_FILE, EditorRun, write_editor_card
from .sequential import (
    fingerprint_before_edits,
    make_next_edit,
    statistics_in_force,
)
from .sharding import place
from .shifts import Shift
from .side_effects import load_texts
from .state import EditState
from .streaming import FactReader
from .targets import check_targets, find_targets, is_fan_in_fan_out, module_shape, plain_model, target_module
from .tasks import AUTO_CLASSES, Classes, infer_task_type
from .tracing import Trace, frozen, input_device, trace

DEFAULT_BATCH_SIZE = 32

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class EditorModel(PreTrainedModel):
    """A trained editor: hyper-networks that turn facts into weight shifts for one base model.

    ```python
    editor = EditorModel.from_pretrained("org/malmen-gptj")
    edit = editor.apply(model, [{"prompt": "The capital of Australia is", "target": "Canberra"}])
    edit.undo()
    ```

    Args:
        config: with `target_modules` and `module_shapes` filled in, as `EditorModel.from_base` does.
    """

    config_class = EditorConfig
    config: EditorConfig
    base_model_prefix = ""
    main_input_name = "keys"

    def __init__(self, config: EditorConfig) -> None:
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
        self.networks = nn.ModuleDict(
            {
                shape: HyperNetwork(
                    *(*config.shape_of(names[0]), len(names)),
                    rank=config.rank,
                    n_blocks=config.n_blocks,
                    edit_lr=config.edit_lr,
                    ridge=config.ridge,
                    n_preserved_keys=config.n_preserved_keys,
                    preservation=config.preservation,
                    value_differences=config.value_differences,
                )
                for shape, names in members.items()
            }
        )
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
        if isinstance(module, HyperBlock | HyperNetwork):
            module.reset_parameters()
        elif isinstance(module, DoubleBuffers):
            for buffer in module.buffers():
                nn.init.zeros_(buffer)

    @classmethod
    def from_base(cls, model: nn.Module, config: EditorConfig | None = None) -> "EditorModel":
        """A new, untrained editor for `model`: task, names, shapes and fingerprint are read off it.

        Args:
            model: the base model, left as it is. Compiled, or with PEFT adapters, it is edited below them, and the
                names are those of the base model.
            config: copied, not changed. Defaults to `EditorConfig()`.

        Raises:
            ModelMismatchError: no target module found, or one that cannot be edited; or a model for another task than
                `config` names.
        """
        config = EditorConfig.from_dict((config or EditorConfig()).to_dict())
        model = plain_model(model)
        task_type = infer_task_type(model) or config.task_type
        if config.task_type not in ("CAUSAL_LM", task_type):  # the default says nothing
            raise ModelMismatchError(
                f"EditorConfig.task_type is {config.task_type!r}, and {type(model).__name__} is for {task_type!r}. "
                f"Leave task_type out, or load the base model with {AUTO_CLASSES[config.task_type].__name__}."
            )
        if task_type not in config.task_types:
            raise ModelMismatchError(
                f"Method {config.method!r} edits {', '.join(config.task_types)}, and {type(model).__name__} is for "
                f"{task_type}. Choose another method, such as 'malmen', or another model."
            )
        config.task_type = task_type
        names = find_targets(model, config)
        config.target_modules = names
        config.layers_to_transform = None
        modules = {name: target_module(model, name) for name in names}
        config.module_shapes = {name: module_shape(module) for name, module in modules.items()}
        config.fan_in_fan_out = [name for name, module in modules.items() if is_fan_in_fan_out(module)]
        config.base_model_fingerprint = base_fingerprint(model, names)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        return cls(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "EditorModel":
        """Load an editor from a folder or the Hub; arguments as in `PreTrainedModel.from_pretrained`.

        Weights are read from safetensors, never from a pickle.

        Raises:
            ModelMismatchError: the folder or repo holds something else, or an editor of a newer format.
            OSError: there is no such repo or revision, the token may not read it, or `local_files_only` finds it in no
                cache.
        """
        name = folder = str(pretrained_model_name_or_path)
        hub = {argument: kwargs.pop(argument) for argument in _HUB_ARGUMENTS if argument in kwargs}
        subfolder = kwargs.get("subfolder") or ""
        # Looked at before anything else is read: a language model's weights are large, and transformers would follow
        # an adapter to its base model.
        EditorConfig.get_config_dict(name, subfolder=subfolder, **hub)
        if not Path(name).is_dir():
            patterns = [str(PurePosixPath(subfolder, pattern)) for pattern in ("config.json", "model*.safetensors*")]
            folder = snapshot_download(name, allow_patterns=patterns, **hub)
        editor: Any = super().from_pretrained(folder, *args, **kwargs | {"use_safetensors": True})
        loaded = editor[0] if kwargs.get("output_loading_info") else editor
        if folder != name:  # edits name the repo and the commit, not the folder in the cache
            loaded.name_or_path = loaded.config.name_or_path = name
            loaded.config._commit_hash = Path(folder).name
        return editor

    def push_to_hub(  # type: ignore[override] # keyword arguments of an editor's repo, which is one small file
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload editor",
        create_pr: bool = False,
        revision: str | None = None,
    ) -> str:
        """Upload the editor to a Hub repo, made if it does not exist, with its card.

        The card and results that lie beside the editor in the folder it was loaded from come along. Without any, the
        repo keeps the card that it has, or gets one that says what is known.

        Args:
            repo_id: `owner/name`.
            private: whether a new repo is private; None takes the owner's default.
            token: access token; None takes the one that is logged in.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.
            revision: branch to commit to.

        Returns:
            The URL of the commit, or of the pull request.
        """
        source = Path(self.name_or_path or "")
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if self.name_or_path and (source / CARD_FILE).is_file():
                for name in (CARD_FILE, PLOT_FILE, RESULTS_FILE, HUB_RESULTS_FILE):
                    if (source / name).is_file():
                        (Path(folder) / name).parent.mkdir(exist_ok=True)
                        copyfile(source / name, Path(folder) / name)
            elif not HfApi(token=token).file_exists(repo_id, CARD_FILE):
                write_editor_card(folder, self, EditorRun())
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                revision=revision,
            )

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
        keys, value_gradients = (rows.to(self.device, self.dtype) for rows in (keys, value_gradients))
        return network.rows(keys, value_gradients, index, self.config.aggregation, normaliser)

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

    def solve(
        self,
        traces: Iterable[Mapping[str, Trace]],
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        statistics: Mapping[str, RunningStatistics] | None = None,
    ) -> dict[str, Solution]:
        """Weight shifts of all target modules from the traces of all facts (paper section 4.1).

        Several processes call it together, each with the traces of its own facts, and all get the shifts of all facts.

        Args:
            traces: one mapping a language-model batch; consumed one at a time. A process may have none.
            editor_batch_size: tokens a pass of the hyper-network. Does not change the result.
            statistics: by the shape of their layers, in place of the editor's own; see `statistics_after`.

        Raises:
            NumericalError: a solve fails or is not finite; names the module.
        """
        return dict(self.solutions(traces, editor_batch_size, statistics))

    @torch.no_grad()
    def solutions(
        self,
        traces: Iterable[Mapping[str, Trace]],
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        statistics: Mapping[str, RunningStatistics] | None = None,
        names: Sequence[str] | None = None,
        n_rows: int = 0,
    ) -> Iterator[tuple[str, Solution]]:
        """`solve`, one module after the other: what a solution holds is free again when the next one is asked for.

        Args:
            traces, editor_batch_size, statistics: as for `solve`.
            names: which modules; None: all.
            n_rows: how many rows of facts a module is about to get, if that is known. Memory depends on it, not the
                result.

        Yields:
            The module's name and its solution.
        """
        names = list(names or self.module_names)
        aggregators = self.aggregators(names, n_rows, pooled=True)
        # Once for all rows: whitening has a matrix to factorise.
        normalisers = {shape: own.normaliser() for shape, own in (statistics or self.statistics).items()}
        with distributed.together():
            for traced in traces:
                for name, entry in traced.items():
                    for keys, gradients in _split(entry, editor_batch_size):
                        aggregators[name].add(*self(keys, gradients, name, normalisers[self._places[name][0]]))
        for name in logging.tqdm(names, desc="Solving", unit=" layers", leave=False):
            rows = aggregators.pop(name)
            if distributed.n_processes() > 1:
                rows.add(*self._no_rows(name))
                rows.pool()
            yield name, rows.solve(self.ridge(name), in_place=True)

    def aggregators(
        self, names: Sequence[str] | None = None, n_rows: int = 0, *, pooled: bool = False
    ) -> dict[str, RowSum | RidgeLeastSquares]:
        """What takes in the rows of target modules, with the rows that ask for preserved keys in it already.

        Args:
            names, n_rows: as for `solutions`.
            pooled: whether the rows of several processes will be put together, where those keys must count once.
        """
        aggregators = {}
        for name in names or self.module_names:
            network, index = self.network(name)
            aggregators[name] = aggregator(self.config.aggregation, name, n_rows + network.n_preserved_keys)
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
        """Keep the keys of one training step in place of the oldest preserved ones.

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
                    own = torch.cat([self._no_rows(name)[0], *(traced[name].keys.to(self.device) for traced in traces)])
                    rows.append(torch.cat(distributed.gather_rows(own.to(network.preserved_keys))))
                # The two sides of an encoder-decoder have different tokens: each keeps as many of its own, evenly.
                fewest = min(map(len, rows))
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
    ) -> None:
        """Turn ∂L/∂S of every module into gradients of the editor's parameters, added to those that are there.

        The hyper-network runs again, `editor_batch_size` tokens at a time, with the adjoint of the solve as the
        gradient of its rows (paper section 4.3). Several processes call it together: each replays its own rows, and all
        get the gradients of the sum of their losses.

        Args:
            traces: what `solve` was given.
            solutions: what `solve` returned.
            shift_gradients: {module name: ∂L/∂S of shape (key_size, value_size)}, the same modules on every process;
                of several processes, that of each one's own part of the loss.
        """
        with distributed.gradients_added_up(self.parameters()):
            for name, gradient in shift_gradients.items():
                adjoint = solutions[name].adjoint(distributed.add_up(gradient))
                start = 0
                if distributed.is_main():  # what is not of rows of facts counts once
                    start = self._backward_scales(name, adjoint, solutions[name])
                if not traces:
                    continue
                keys = torch.cat([traced[name].keys for traced in traces])
                gradients = torch.cat([traced[name].value_gradients for traced in traces])
                for part in _split(Trace(keys, gradients), editor_batch_size):
                    left, differences = self(*part, name)
                    adjoint.inner(left, differences, start).backward()
                    start += len(left)

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

    def _no_rows(self, name: str) -> tuple[Tensor, Tensor]:  # (0, key_size), (0, value_size)
        """What the facts of a process come to that has none."""
        key_size, value_size = self.config.shape_of(name)
        empty = torch.zeros(0, key_size + value_size, device=self.device)
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

    # What users call

    def make_edit(
        self,
        model: PreTrainedModel,
        facts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        editor_batch_size: int = DEFAULT_EDITOR_BATCH_SIZE,
        statistics: Mapping[str, Tensor] | None = None,
        max_memory: int | str | None = None,
    ) -> Edit:
        """Compute the edit that writes `facts` into `model`, without applying it.

        Several processes call it together, with the same facts: each traces its share, and all get the same edit.

        Args:
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards.
            facts: anything `load_facts` takes, or a `FactStream`, which is never held; the edit then knows its first
                facts only. A file is read through before the language model runs, which finds a bad fact early.
            tokenizer: the base model's; loaded from `model.name_or_path` if None.
            batch_size: facts a forward and backward pass of the language model. Does not change the result.
            editor_batch_size: tokens a pass of the hyper-network. Does not change the result.
            statistics: where they follow the edits, those to go on from; None: what the edits in force on `model` have
                left (`EditState.statistics`), or before any the editor's own. Before the first row of an edit is
                standardised, all of its rows are known, so that memory grows with the number of facts;
                `facts_per_turn` of `apply` bounds it.
            max_memory: the most that the rows, or UᵀU and UᵀD, of the layers that are solved together may take, in
                bytes or as a text such as `"8GiB"`. Where all layers take more, groups of them are solved one after
                the other; see `memory.traces_by_group` for what that costs. Models, their passes and the shifts come
                on top. Does not change the result.

        Raises:
            FactError: a fact is bad, or too long for the model.
            ModelMismatchError: the editor does not fit the model.
            NumericalError: a key, a gradient or a solve is not finite; names the module.
            ValueError: `max_memory` is none, or less than one layer takes.
        """
        limit = parse_memory(max_memory)
        source = _facts(facts)
        model = _base(model)
        self.check_ready(model)
        if statistics is None and self.config.follows_edits:
            statistics = statistics_in_force(model, pack_statistics(self.statistics))
        reader = FactReader(source, self.tokenizer_for(model, tokenizer), N_FACTS_SHOWN)
        request = EditRequest(model, reader, batch_size, editor_batch_size, statistics, limit)
        with frozen(model), self.beside(input_device(model)):
            made = MAKERS[self.config.maker](self, request)
        edit = self.wrap(made.shifts, model, reader.kept, reader.n_facts or 0)
        edit.state = EditState(statistics=dict(made.statistics))
        return edit

    def wrap(self, shifts: Mapping[str, Shift], model: nn.Module, facts: Sequence[Fact], n_facts: int) -> Edit:
        """Shifts for `model` as an edit that says where it comes from.

        Args:
            shifts: {module name: its shift}.
            model: the base model.
            facts: those that the edit keeps.
            n_facts: how many it writes.
        """
        return Edit(
            shifts,
            fan_in_fan_out=self.config.fan_in_fan_out or (),
            facts=facts,
            n_facts=n_facts,
            base_model_name_or_path=self.config.base_model_name_or_path,
            base_model_revision=self.config.base_model_revision,
            base_model_fingerprint=base_fingerprint(model, self.module_names),
            task_type=self.config.task_type,
            editor={
                "method": self.config.method,
                "name_or_path": self.name_or_path or None,
                "revision": getattr(self.config, "_commit_hash", None),
                "hf_malmen_version": self.config.hf_malmen_version,
                "edit_lr": {name: self.edit_lr(name) for name in self.module_names},
                "ridge": {name: self.ridge(name) for name in self.module_names},
            },
        )

    @torch.no_grad()
    def collect_covariance(
        self,
        model: PreTrainedModel,
        texts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        n_tokens: int = DEFAULT_N_TOKENS,
        batch_size: int = DEFAULT_TEXT_BATCH_SIZE,
        **load_options: Any,
    ) -> int:
        """Take the second moment of ordinary keys into the editor: what its edits should leave where it is.

        Saved and pushed with the editor, so that it is collected once for a base model. Called again, it goes on with
        more texts.

        Args:
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards.
            texts: anything `side_effects.load_texts` takes: a list, a `datasets.Dataset`, a file, a data set's id on
                the Hub. Ordinary text of many kinds; read until `n_tokens` are reached.
            tokenizer: as in `make_edit`.
            n_tokens: how many tokens to read at most.
            batch_size: windows of text a pass. Does not change the result.
            **load_options: `column`, and those of a data set on the Hub, as for `load_texts`.

        Returns:
            How many tokens were read.

        Raises:
            ModelMismatchError: a method that keeps no covariance, or an editor that does not fit the model.
            ValueError, FileNotFoundError: no texts, or no positive number of tokens.
            NumericalError: a key is not finite; names the module.
        """
        if self.config.key_covariance is None:
            keeping = [name for name, method in METHODS.items() if method.key_covariance is not None]
            raise ModelMismatchError(
                f"Method {self.config.method!r} keeps no covariance of keys. Those that do: {', '.join(keeping)}."
            )
        if n_tokens < 1:
            raise ValueError(f"n_tokens is {n_tokens}; expected a whole number of at least 1.")
        loaded = load_texts(texts, **load_options)
        model = _base(model)
        self.check_base(model)
        tokenize = self.tokenizer_for(model, tokenizer)
        settings = {"n_tokens": n_tokens, "batch_size": batch_size}
        n_read = 0
        with frozen(model):
            for keys in ordinary_keys(model, tokenize, loaded, self.module_names, **settings):
                for shape, covariance in self.covariances.items():
                    assert isinstance(covariance, KeyCovariance)  # for the type checker
                    covariance.update([keys[name] for name in self.module_names if self._places[name][0] == shape])
                n_read += len(keys[self.module_names[0]])
        return n_read

    @torch.no_grad()
    def warm_up(
        self,
        model: PreTrainedModel,
        facts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Take the statistics of `facts` into the editor, without editing anything.

        A method without training starts from them: with `statistics="frozen"` it needs them, and where they follow the
        edits, the first ones are standardised better. `n_preserved_keys` are filled too, with the last keys read.

        Args:
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards.
            facts: anything `load_facts` takes, or a `FactStream`. Not those that are to be edited later: ordinary
                questions and answers of their kind.
            tokenizer: as in `make_edit`.
            batch_size: facts a pass of the language model. Does not change the statistics.

        Raises:
            FactError, ModelMismatchError, NumericalError: as in `make_edit`.
        """
        source = _facts(facts)
        model = _base(model)
        self.check_base(model)
        reader = FactReader(source, self.tokenizer_for(model, tokenizer), N_FACTS_SHOWN)
        request = EditRequest(model, reader, batch_size)
        newest: deque[dict[str, Trace]] = deque()  # whose keys are preserved

        def traces() -> Iterator[dict[str, Trace]]:
            for traced in request.traces(self):
                newest.append(traced)
                while len(newest) > 1 and _n_rows(newest) - _n_rows([newest[0]]) >= self.config.n_preserved_keys:
                    newest.popleft()
                yield traced

        with frozen(model), self.beside(input_device(model)):
            self.update_statistics(traces())
            self.preserve(newest)

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

    def apply(  # type: ignore[override] # the name is the contract; `nn.Module.apply` still answers to a function
        self,
        model: PreTrainedModel | str | Path,
        facts: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        output_dir: str | Path | None = None,
        in_place: bool = False,
        batch_size: int = DEFAULT_BATCH_SIZE,
        facts_per_turn: int | None = None,
        max_memory: int | str | None = None,
        accumulate: bool = False,
        measure: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Edit:
        """Write `facts` into a model.

        Several processes call it together, with the same facts, each with its own copy of a live model. To disk, one of
        them writes.

        Args:
            model: a live model, edited in place; or the folder or Hub id of a checkpoint, edited on disk (see
                `Edit.write`: crash-safe, recorded in the checkpoint's history, and undone by `hf-malmen undo`).
            facts: anything `load_facts` takes, or a `FactStream`.
            tokenizer: the base model's; loaded from beside the model if None.
            output_dir: for a checkpoint: folder for the edited copy.
            in_place: for a checkpoint: overwrite it instead.
            batch_size: facts a pass of the language model. Does not change the result.
            facts_per_turn: edit sequentially, this many facts at a time, each turn on the model as edited so far;
                None edits all at once.
            max_memory: as for `make_edit`.
            accumulate: solve anew over the facts of all edits in force and these. Keys and value gradients come from
                the unedited model, so that any split into turns and calls gives the weights of one shot, and
                `facts_per_turn` changes nothing. See below for what it costs.
            measure: measure the edit before it is written, and keep the scores in `edit.measured` and, on disk, in the
                checkpoint's history and card.
            revision, token: for a checkpoint on the Hub.

        Facts that are in force on the model already (see `facts_in_force`), or come twice, are skipped. A fact whose
        prompt is in force with another target replaces that one. Repeated calls go on from each other, also on a model
        loaded from an edited checkpoint, and edit sequentially in one of two ways:

        - Turn by turn, the default. Each turn reads the model as edited so far, and shifts add up. It costs what the
          new facts cost, whatever came before; later turns disturb earlier facts, and each call rounds the weights.
        - Accumulated. A turn solves for all facts in force at once, so that none is disturbed that one shot would not
          disturb, and a replaced fact is taken out of the solve. Each edit keeps its rows of the least squares, as
          large as n·(k + v) numbers a layer, or UᵀU and UᵀD where these are smaller (to replace a fact among those
          traces its edit's other facts again). A call needs the target weights a second time, and edits after the
          first are dense. The edits in force must all have been accumulated by this editor.

        Returns:
            The edit, in force on a live model (`edit.undo()` lifts it). Without facts and shifts, `n_facts == 0`, if
            all are in force already: then nothing was written, and an `output_dir` gets a plain copy.

        Raises:
            EditStateError: `accumulate` on top of an edit that was not accumulated by this editor; or to replace a
                fact that an edit from a `FactStream` wrote, of which neither rows nor texts are left.
            FactError, ModelMismatchError, CheckpointError, NumericalError: see `make_edit` and `Edit.write`. All of
                them come before the first write.
        """
        if facts is None and not isinstance(model, nn.Module | str | Path):
            return super().apply(model)  # `nn.Module.apply(function)`, which libraries call on any module
        facts = _facts(facts)
        if facts_per_turn is not None and facts_per_turn < 1:
            raise ValueError(f"facts_per_turn is {facts_per_turn}; expected a whole number of at least 1, or None.")
        if measure and isinstance(facts, FactStream):
            raise ValueError(
                "measure=True puts every fact to the model twice, and a FactStream is read once. Use a list."
            )
        options: dict[str, Any] = {"batch_size": batch_size, "facts_per_turn": facts_per_turn, "measure": measure}
        options |= {"accumulate": accumulate, "max_memory": max_memory}
        if isinstance(model, str | Path):
            if Path(model).is_file():
                raise CheckpointError(
                    f"{model} is a file, and making an edit needs the whole model. Give its folder; or write an edit "
                    "that is made already: edit.write(file, output_dir)."
                )
            check_checkpoint(model, output_dir, in_place)
            loading = {"revision": revision or "main", "token": token}
            base = AUTO_CLASSES[self.config.task_type].from_pretrained(model, **loading)
            place(base)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **loading)
            edit = make_next_edit(self, base, facts, tokenizer, **options)
            edit.base_model_revision = cached_commit(str(model), revision) or edit.base_model_revision
            # The weights that the edit was made from are the ones to be overwritten, or somebody changed them since.
            exact = {"on_fingerprint_mismatch": "error", "before_edits": False}
            with distributed.together():
                if distributed.writes():
                    hub: dict[str, Any] = {"revision": revision, "token": token}
                    if edit.layers:
                        edit.write_with(model, output_dir=output_dir, in_place=in_place, **hub, **exact)
                    elif output_dir is not None:
                        copy_checkpoint(model, output_dir, **hub)
            return edit
        if output_dir is not None or in_place:
            raise ValueError(
                "output_dir and in_place are for a checkpoint; a live model is edited in memory. "
                "Pass the checkpoint's folder or Hub id, or call edit.write(checkpoint, output_dir) afterwards."
            )
        edit = make_next_edit(self, model, facts, tokenizer, **options)
        # The fit was checked when the edit was made.
        return edit.apply_to(model, on_fingerprint_mismatch="ignore") if edit.layers else edit

    @contextmanager
    def applied(self, model: PreTrainedModel, facts: Any, **kwargs: Any) -> Iterator[Edit]:
        """`model` holds `facts` within the context, and is as before when it ends, also by an error."""
        edit = self.apply(model, facts, **kwargs)
        try:
            yield edit
        finally:
            if edit.layers:
                edit.undo()

    def evaluate(
        self,
        model: PreTrainedModel,
        facts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        generate: bool = False,
        probabilities: bool = False,
    ) -> dict[str, float]:
        """Apply `facts` at once, measure, and undo. Several processes call it together, and all get the scores.

        Args:
            model: the live base model, as before afterwards.
            facts: anything `load_facts` takes; rephrases, unrelated prompts and the rest are measured where facts have
                them.
            tokenizer: as in `apply`.
            batch_size: sequences a pass of the language model.
            generate: measure by free generation too.
            probabilities: compare the probabilities of answers too.

        Returns:
            `edit_success`, `generalization`, `locality`, `unrelated_accuracy`, `portability`, each in [0, 1],
            teacher-forced; with `generate` the same names with `_generated` appended; with `_before` appended, the
            value before the edit. `evaluation.measure_edit` has them all.
        """
        settings = {"generate": generate, "probabilities": probabilities}
        return self.measure(model, facts, tokenizer, batch_size=batch_size, n_resamples=1, **settings).scores

    def measure(
        self,
        model: PreTrainedModel,
        facts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        **settings: Any,
    ) -> Evaluation:
        """`evaluate`, with confidence intervals and results fact by fact.

        Args:
            model, facts, tokenizer, batch_size: as in `evaluate`.
            **settings: `generate`, `probabilities`, `n_resamples`, ... of `evaluation.measure_edit`.

        Returns:
            `scores`, as of `evaluate`; `intervals`, 95 %, by bootstrap; and `per_fact`, a `datasets.Dataset`.
        """
        facts = load_facts(facts)
        model = _base(model)
        tokenize = self.tokenizer_for(model, tokenizer)
        edit = self.make_edit(model, facts, tokenizer, batch_size=batch_size)
        return measure_edit(model, edit, facts, tokenize, batch_size=batch_size, **settings)

    def check_base(self, model: nn.Module) -> None:
        """Check that this editor fits `model`.

        The weights compared are those before any edit: those in force on the live model, and those of the edited
        checkpoint it was loaded from, do not count.

        Args:
            model: the base model.

        Raises:
            ModelMismatchError: the model has another task; a target is missing, cannot be edited, or has another shape
                or orientation; or its weights differ and `fingerprint_policy` is `"error"`.
        """
        model = plain_model(model)
        wanted, found = self.config.task_type, infer_task_type(model)
        if found not in (None, wanted):
            raise ModelMismatchError(
                f"{type(model).__name__} is for the task {found}, and this editor was made for {wanted}. "
                f"Load the base model with {AUTO_CLASSES[wanted].__name__}, or make an editor for this one."
            )
        check_targets(model, self.module_names)
        for name in self.module_names:
            module = target_module(model, name)
            expected = list(self.config.shape_of(name))
            flipped = name in (self.config.fan_in_fan_out or ())
            if module_shape(module) != expected or is_fan_in_fan_out(module) != flipped:
                raise ModelMismatchError(
                    f"{name} maps {module_shape(module)[0]} features to {module_shape(module)[1]} in a "
                    f"{type(module).__name__}; this editor was made for {expected[0]} to {expected[1]} in a "
                    f"{'Conv1D' if flipped else 'Linear'}. Its base model is {self.config.base_model_name_or_path}."
                )
        fingerprint = self.config.base_model_fingerprint
        check_fingerprint(
            model,
            None
            if fingerprint is None or fingerprint == fingerprint_before_edits(model, self.module_names)
            else fingerprint,
            self.module_names,
            self.config.fingerprint_policy,
            "This editor",
            f"{self.config.base_model_name_or_path or 'its base model'} at revision "
            f"{self.config.base_model_revision or 'unknown'}",
        )

    def check_ready(self, model: nn.Module) -> None:
        """`check_base`, and a warning where this editor has seen nothing yet.

        Raises:
            ModelMismatchError: as `check_base`.
        """
        self.check_base(model)
        if self.config.key_covariance is None and not self.is_trained:  # without a covariance there is no edit at all
            _warn_untrained(self.config)

    def tokenizer_for(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Tokenizer:
        """The base model's tokenizer, in this editor's prompt format and with the model's length limit.

        Raises:
            ModelMismatchError: a classifier whose classes no target can name.
        """
        model = _base(model)
        if tokenizer is None:
            if not model.name_or_path:
                raise ValueError("This model does not say where it came from. Pass its tokenizer: tokenizer=...")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        return Tokenizer(
            tokenizer,
            self.config,
            _max_length(model),
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            classes=Classes.of(model) if self.config.task_type == "SEQ_CLS" else None,
        )


def _base(model: nn.Module) -> PreTrainedModel:
    plain: Any = plain_model(model)
    return plain


def _max_length(model: PreTrainedModel) -> int | None:
    """The most tokens that `model` has positions for, or None where it has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == limit:
            # RoBERTa's kind counts positions from the padding token's on.
            return limit - (0 if module.padding_idx is None else int(module.padding_idx) + 1)
    return limit


def _split(entry: Trace, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(entry.keys.split(size), entry.value_gradients.split(size), strict=True)


def _n_rows(traces: Iterable[Mapping[str, Trace]]) -> int:
    """Traced tokens of the module that has the fewest."""
    return sum(min(len(entry.keys) for entry in traced.values()) for traced in traces)


def _shapes(tensors: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items())) or "none"


def _facts(facts: Any) -> Sequence[Fact] | FactStream:
    return facts if isinstance(facts, FactStream) else load_facts(facts)


def _warn_untrained(config: EditorConfig) -> None:
    text = (
        "This editor has seen no training data: its inputs are not standardised and its hyper-network is at its "
        "initial state, so edits will hardly take. Train it with EditorTrainer, or load a trained one."
        if config.needs_training
        else "This editor's statistics are frozen and have seen no data, so its inputs are not standardised. Call "
        "editor.warm_up(model, facts), or let them follow the edits: EditorConfig(statistics='following')."
    )
    warnings.warn(text, UntrainedEditorWarning, stacklevel=4)


AutoConfig.register(EditorConfig.model_type, EditorConfig, exist_ok=True)
AutoModel.register(EditorConfig, EditorModel, exist_ok=True)
