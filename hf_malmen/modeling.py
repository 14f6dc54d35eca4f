"""`EditorModel`: the pipeline behind one call."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral
from os import PathLike
from pathlib import Path, PurePosixPath
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import distributed
from .base_model import base_of, check_base_model, check_layers, config_for, load_tokenizer, tokenizer_for
from .batches import Tokenizer
from .checkpoint import check_checkpoint, copy_checkpoint
from .configuration import METHODS, EditorConfig
from .covariance import DEFAULT_N_TOKENS, DEFAULT_TEXT_BATCH_SIZE, KeyCovariance, ordinary_keys
from .edit import Edit, check_fingerprint
from .errors import CheckpointError, ModelMismatchError, UntrainedEditorWarning
from .evaluation import Evaluation, measure_edit
from .facts import Fact, FactStream, load_facts
from .hub import HUB_ERRORS, cached_checkpoint, cached_commit, ensure_repo, push_folder
from .in_force import base_fingerprint_as_stored, fingerprint_before_edits, unedited
from .makers import MAKERS, EditRequest
from .memory import parse_memory
from .model_card import HUB_RESULTS_FILE, N_FACTS_SHOWN, PLOT_FILE, RESULTS_FILE, EditorRun, write_editor_card
from .networks import DEFAULT_EDITOR_BATCH_SIZE, EditorNetworks
from .records import CARD_FILE
from .sequential import Standing, make_next_edit, standing_of, statistics_kind
from .sharding import place
from .shifts import Shift
from .side_effects import load_texts
from .state import EditState
from .streaming import FactReader
from .targets import plain_model
from .tasks import load_base
from .tracing import Trace, frozen, input_device

logger = logging.get_logger(__name__)

DEFAULT_BATCH_SIZE = 32

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class EditorModel(EditorNetworks):
    """A trained editor: hyper-networks that turn facts into weight shifts for one base model.

    ```python
    editor = EditorModel.from_pretrained("org/malmen-gptj")
    edit = editor.apply(model, [{"prompt": "The capital of Australia is", "target": "Canberra"}])
    edit.undo()
    ```

    Args:
        config: with `target_modules` and `module_shapes` filled in, as `EditorModel.from_base` does.
    """

    @classmethod
    def from_base(cls, model: nn.Module, config: EditorConfig | None = None) -> "EditorModel":
        """A new, untrained editor for `model`: task, names, shapes and fingerprint are read off it.

        Args:
            model: the base model, left as it is. Compiled, or with PEFT adapters, it is edited below them, and the
                names are those of the base model.
            config: copied, not changed. Defaults to `EditorConfig()`.

        Raises:
            ModelMismatchError: no target module found, or one that cannot be edited; or a model for another task than
                `config` names, or an encoder that was loaded as a causal model.
            TypeError: something else than a live model and an `EditorConfig`.
        """
        return cls(config_for(model, config or EditorConfig()))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "EditorModel":
        """Load an editor from a folder or the Hub; arguments as in `PreTrainedModel.from_pretrained`.

        Weights are read from safetensors, never from a pickle.

        Raises:
            ModelMismatchError: the folder or repo holds something else, or an editor of a newer format.
            OSError: there is no such repo or revision, the token may not read it, or `local_files_only` finds it in no
                cache.
            TypeError: something else than a path or name.
        """
        if not isinstance(pretrained_model_name_or_path, str | PathLike):
            raise TypeError(
                f"Expected an editor's folder or Hub id, and got {type(pretrained_model_name_or_path).__name__}. "
                "EditorModel.from_base(model) makes a new editor for a model that is loaded."
            )
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
            repo_id = ensure_repo(repo_id, private=private, token=token, revision=revision)
            if self.name_or_path and (source / CARD_FILE).is_file():
                for name in (CARD_FILE, PLOT_FILE, RESULTS_FILE, HUB_RESULTS_FILE):
                    if (source / name).is_file():
                        (Path(folder) / name).parent.mkdir(exist_ok=True)
                        copyfile(source / name, Path(folder) / name)
            elif not HfApi(token=token).file_exists(repo_id, CARD_FILE, revision=revision):
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
        standing: Standing | None = None,
    ) -> Edit:
        """Compute the edit that writes `facts` into `model`, without applying it.

        Several processes call it together, with the same facts: each traces its share, and all get the same edit.

        Args:
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards.
            facts: anything `load_facts` takes, or a `FactStream`, which is never held; the edit then knows its first
                facts only. A file is read through before the language model runs, which finds a bad fact early.
            tokenizer: the base model's; loaded from `model.name_or_path` if None.
            batch_size: facts a forward and backward pass of the language model. Changes the result by the rounding of
                these passes only: S by some percent in bfloat16, by up to 1e-4 of it in float32.
            editor_batch_size: tokens a pass of the hyper-network. Does not change the result.
            statistics: where they follow the edits, those to go on from; None: what the edits in force on `model` have
                left (`EditState.statistics`), or before any the editor's own. Before the first row of an edit is
                standardised, all of its rows are known, so that memory grows with the number of facts;
                `facts_per_turn` of `apply` bounds it.
            max_memory: the most that the rows, or UᵀU and UᵀD, of the layers that are solved together may take, in
                bytes or as a text such as `"8GiB"`. Where all layers take more, groups of them are solved one after
                the other; see `memory.traces_by_group` for what that costs. Models, their passes and the shifts come
                on top. Does not change the result. Not of `"malmit"`, `"memit"` and `"ft"`, which hold all facts.
            standing: what edits before it have left, as turns pass it on; None: it is read off `model`.

        Raises:
            FactError: a fact is bad, or too long for the model.
            ModelMismatchError: the editor does not fit the model.
            NumericalError: a key, a gradient or a solve is not finite; names the module.
            TypeError: something else than a live model, or than a tokenizer.
            ValueError: a size is no whole number of at least 1; `max_memory` is none, or less than one layer takes, or
                the method cannot keep it.
        """
        _check_sizes(batch_size=batch_size, editor_batch_size=editor_batch_size)
        limit = parse_memory(max_memory)
        source = _facts(facts)
        model = base_of(model)
        standing = standing_of(model, self) if standing is None else standing
        statistics = standing.statistics if statistics is None else statistics
        reader = FactReader(source, self.tokenizer_for(model, tokenizer), N_FACTS_SHOWN)
        request = EditRequest(model, reader, batch_size, editor_batch_size, statistics, standing.written, limit)
        with frozen(model), self.beside(input_device(model)):
            made = MAKERS[self.config.maker].make(self, request)
        edit = self.wrap(made.shifts, model, reader.kept, reader.n_facts or 0, fingerprint=standing.fingerprint)
        kind = statistics_kind(self) if made.statistics else None
        edit.state = EditState(kind, dict(made.statistics), written=dict(made.written))
        return edit

    def wrap(
        self,
        shifts: Mapping[str, Shift],
        model: nn.Module,
        facts: Sequence[Fact],
        n_facts: int,
        *,
        fingerprint: str | None = None,
    ) -> Edit:
        """Shifts for `model` as an edit that says where it comes from.

        Args:
            shifts: {module name: its shift}.
            model: the base model.
            facts: those that the edit keeps.
            n_facts: how many it writes.
            fingerprint: of the model's target weights before any edit; None: not known, so that they are read for it.
        """
        return Edit(
            shifts,
            fan_in_fan_out=self.config.fan_in_fan_out or (),
            facts=facts,
            n_facts=n_facts,
            base_model_name_or_path=self.config.base_model_name_or_path,
            base_model_revision=self.config.base_model_revision,
            base_model_fingerprint=fingerprint or base_fingerprint_as_stored(model, self.module_names),
            base_model_type=getattr(getattr(model, "config", None), "model_type", None),
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
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards. Edits in force
                on it are lifted meanwhile: the keys are those of the base model.
            texts: anything `side_effects.load_texts` takes: a list, a `datasets.Dataset`, a file, a data set's id on
                the Hub. Ordinary text of many kinds; read until `n_tokens` are reached.
            tokenizer: as in `make_edit`.
            n_tokens: how many tokens to read at most.
            batch_size: windows of text a pass. Changes the result by rounding only.
            **load_options: `column`, and those of a data set on the Hub, as for `load_texts`.

        Returns:
            How many tokens were read.

        Raises:
            ModelMismatchError: a method that keeps no covariance, or an editor that does not fit the model.
            ValueError, FileNotFoundError: no texts, or a size that is no whole number of at least 1.
            NumericalError: a key is not finite; names the module.
        """
        if self.config.key_covariance is None:
            keeping = [name for name, method in METHODS.items() if method.key_covariance is not None]
            raise ModelMismatchError(
                f"Method {self.config.method!r} keeps no covariance of keys. Those that do: {', '.join(keeping)}."
            )
        _check_sizes(n_tokens=n_tokens, batch_size=batch_size)
        loaded = load_texts(texts, **load_options)
        model = base_of(model)
        self.check_base(model)
        tokenize = self.tokenizer_for(model, tokenizer)
        settings = {"n_tokens": n_tokens, "batch_size": batch_size}
        n_read = 0
        with unedited(model, self.module_names), frozen(model):
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
        edits, the first ones are standardised better. `n_preserved_keys` are filled too, from the facts read last.

        Args:
            model: the live base model. Its weights, gradients, modes and hooks are as found afterwards. Edits in force
                on it are lifted meanwhile.
            facts: anything `load_facts` takes, or a `FactStream`. Not those that are to be edited later: ordinary
                questions and answers of their kind.
            tokenizer: as in `make_edit`.
            batch_size: facts a pass of the language model. Changes the statistics by rounding only, as in `make_edit`.

        Raises:
            FactError, ModelMismatchError, NumericalError, ValueError: as in `make_edit`.
        """
        _check_sizes(batch_size=batch_size)
        source = _facts(facts)
        model = base_of(model)
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

        with unedited(model, self.module_names), frozen(model), self.beside(input_device(model)):
            self.update_statistics(traces())
            self.preserve(newest)

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
            batch_size: facts a pass of the language model. Changes the result by rounding only, as in `make_edit`.
            facts_per_turn: edit sequentially, this many facts at a time, each turn on the model as edited so far;
                None edits all at once.
            max_memory: as for `make_edit`. With `accumulate` layers are solved one at a time anyway, beside the rows of
                all edits in force: it is an error if one takes more.
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
          first are dense. The edits in force must all have been accumulated by this editor. An edit that was solved
          together with earlier ones is for a model that has those: elsewhere a warning says so.

        Returns:
            The edit, in force on a live model (`edit.undo()` lifts it). Without facts and shifts, `n_facts == 0`, if
            all are in force already: then nothing was written, and an `output_dir` gets a plain copy. There is nothing
            to undo, save or export of it; `live_edits(model)` has the edits that wrote the facts. With `accumulate`,
            and where an edit below later ones was undone, it has shifts all the same: to what the facts in force give.

        Raises:
            ValueError: `accumulate` with statistics that follow the edits, or with `"malmit"`, `"memit"`, `"ft"`.
            EditStateError: `accumulate` on top of an edit that was not accumulated by this editor; or to replace a
                fact that an edit from a `FactStream` wrote, of which neither rows nor texts are left.
            FactError, ModelMismatchError, CheckpointError, NumericalError, TypeError: see `make_edit` and `Edit.write`.
                All of them come before the first write.
            OSError: there is no such folder, repo or revision.
        """
        if facts is None and not isinstance(model, nn.Module | str | Path):
            return super().apply(model)  # `nn.Module.apply(function)`, which libraries call on any module
        facts = _facts(facts)
        _check_sizes(batch_size=batch_size, facts_per_turn=1 if facts_per_turn is None else facts_per_turn)
        if measure and isinstance(facts, FactStream):
            raise ValueError(
                "Measuring keeps all facts and their answers, and a stream of facts (FactStream, --stream) is there to "
                "hold few. Leave out measure (--measure), or give the facts as a list or file."
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
            check_base_model(str(model), revision, token)
            loading = {"revision": revision or "main", "token": token}
            tokenizer = tokenizer or load_tokenizer(model, **loading)
            base = load_base(model, self.config.task_type, **loading)
            if commit := cached_commit(str(model), revision):
                base.config._commit_hash = commit  # by which its edits are found
                with suppress(*HUB_ERRORS):  # asked here, with the token; what is wrong is said later
                    cached_checkpoint(str(model), commit, token)
            place(base)
            edit = make_next_edit(self, base, facts, tokenizer, **options)
            edit.base_model_revision = commit or edit.base_model_revision
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
        if edit.n_skipped:
            n_given = edit.n_skipped + edit.n_facts
            logger.warning(
                f"{edit.n_skipped} of {n_given} facts are in force already, or come twice, and were skipped."
            )
        # The fit was checked when the edit was made.
        return edit.apply_to(model, on_fingerprint_mismatch="ignore") if edit.layers else edit

    @contextmanager
    def applied(
        self,
        model: PreTrainedModel,
        facts: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Iterator[Edit]:
        """`model` holds `facts` within the context, and is as before when it ends, also by an error.

        Args:
            model: a live model.
            facts, tokenizer, **kwargs: as for `apply`.

        Raises:
            ValueError: `model` is no live model.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"applied() got {model!r}; expected a live model, whose weights it restores at the end. For a "
                "checkpoint call apply(checkpoint, facts, output_dir=...), and take it back with: hf-malmen undo DIR"
            )
        edit = self.apply(model, facts, tokenizer, **kwargs)
        try:
            yield edit
        finally:
            if edit.in_force:  # else nothing was left to write, or it was undone within
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
            batch_size: sequences a pass of the language model. Changes the scores by rounding only, as in `make_edit`.
            generate: measure by free generation too.
            probabilities: compare the probabilities of answers too.

        Returns:
            `edit_success`, `generalization`, `locality`, `unrelated_accuracy`, `portability`, each in [0, 1],
            teacher-forced; with `generate` the same names with `_generated` appended; with `_before` appended, the
            value before the edit. `evaluation.measure_edit` has them all.
        """
        settings = {"generate": generate, "probabilities": probabilities}
        return self.measure(model, facts, tokenizer, batch_size=batch_size, n_resamples=0, **settings).scores

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
        _check_sizes(batch_size=batch_size)
        facts = load_facts(facts)
        model = base_of(model)
        tokenize = self.tokenizer_for(model, tokenizer)
        edit = self.make_edit(model, facts, tokenizer, batch_size=batch_size)
        return measure_edit(model, edit, facts, tokenize, batch_size=batch_size, **settings)

    def check_base(self, model: nn.Module) -> str | None:
        """Check that this editor fits `model`.

        The weights compared are those before any edit: those in force on the live model, and those of the edited
        checkpoint it was loaded from, do not count.

        Args:
            model: the base model.

        Returns:
            The fingerprint of these weights, where it had to be found.

        Raises:
            ModelMismatchError: the model has another task; a target is missing, cannot be edited, or has another shape
                or orientation; or its weights differ and `fingerprint_policy` is `"error"`.
        """
        model = plain_model(model)
        check_layers(model, self.config)
        fingerprint = self.config.base_model_fingerprint
        return check_fingerprint(
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

    def check_ready(self, model: nn.Module) -> str | None:
        """`check_base`, and a warning where this editor has seen nothing yet.

        Returns:
            As `check_base`.

        Raises:
            ModelMismatchError: as `check_base`.
        """
        found = self.check_base(model)
        # Where a covariance is required there is no edit at all without one.
        reads_nothing = self.moves is not None and self.n_covariance_tokens == 0
        if reads_nothing or (self.config.key_covariance is None and not self.is_trained):
            _warn_untrained(self.config)
        return found

    def tokenizer_for(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Tokenizer:
        """The base model's tokenizer, in this editor's prompt format and with the model's length limit.

        Raises:
            ModelMismatchError: a classifier whose classes no target can name.
        """
        return tokenizer_for(model, self.config, tokenizer)


def _n_rows(traces: Iterable[Mapping[str, Trace]]) -> int:
    """Traced tokens of the module that has the fewest."""
    return sum(min(len(entry.keys) for entry in traced.values()) for traced in traces)


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}; expected a whole number of at least 1.")


def _facts(facts: Any) -> Sequence[Fact] | FactStream:
    return facts if isinstance(facts, FactStream) else load_facts(facts)


def _warn_untrained(config: EditorConfig) -> None:
    text = (
        "This editor is not trained and has read no text, so that its edits will change what the model says of other "
        "subjects too. Train it with EditorTrainer, load a trained one, or at least let it read what its edits should "
        "leave alone: editor.collect_covariance(model, texts)."
        if config.value_differences == "moves"
        else "This editor has seen no training data: its inputs are not standardised and its hyper-network is at its "
        "initial state, so edits will hardly take. Train it with EditorTrainer, or load a trained one."
        if config.needs_training
        else "This editor's statistics are frozen and have seen no data, so its inputs are not standardised. Call "
        "editor.warm_up(model, facts), or let them follow the edits: EditorConfig(statistics='following')."
    )
    warnings.warn(text, UntrainedEditorWarning, stacklevel=5)


AutoConfig.register(EditorConfig.model_type, EditorConfig, exist_ok=True)
AutoModel.register(EditorConfig, EditorModel, exist_ok=True)
