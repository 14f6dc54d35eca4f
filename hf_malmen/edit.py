"""`Edit`: weight shifts with their provenance, and the only writes to live weights."""

import json
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers.utils import logging

from .adapter import save_lora
from .checkpoint import WriteReport, write_shifts
from .configuration import FINGERPRINT_POLICIES, EditorConfig, repo_named
from .errors import DAMAGED, EditStateError, FingerprintWarning, ModelMismatchError, NumericalError
from .facts import Fact
from .hub import push_folder
from .in_force import base_fingerprint_as_stored, edits_in_force
from .ledger import EDIT_CONFIG_FILE
from .live import Application, applications, base_fingerprint, set_applications
from .model_card import N_FACTS_SHOWN, EditSummary, describe_maker, hub_id, render_edit_card
from .records import CARD_FILE, SHIFTS_FILE, read_history
from .sharding import copy_of, overwrite, shape_of, whole
from .shards import parse_json
from .shifts import Shift, add, add_rows, blocks, check_shape, dense, load_shifts, materialise, save_shifts
from .state import IN_STATISTICS, SOLVED_ALONE, SOLVED_TOGETHER, STATE_FILE, EditState
from .targets import check_parted, check_targets, is_fan_in_fan_out, plain_model, target_module, weight_of
from .version import __version__

logger = logging.get_logger(__name__)

# The layout of what `Edit.save_pretrained` writes.
EDIT_FORMAT_VERSION = 1


class _Shifts(Mapping[str, Tensor]):
    """{module name: S of shape (key_size, value_size)}; S is multiplied out when it is asked for."""

    def __init__(self, layers: Mapping[str, Shift], fan_in_fan_out: Iterable[str]) -> None:
        self._layers, self._flipped = layers, set(fan_in_fan_out)

    def __getitem__(self, name: str) -> Tensor:
        return materialise(self._layers[name], name in self._flipped)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Edit:
    """Weight shifts that write a set of facts into a base model, and where they came from.

    Attributes:
        layers: {module name: its shift, float32 on the CPU: dense, or as the factors of a solve from few tokens}.
        fan_in_fan_out: the modules that store their weight as (key_size, value_size).
        facts: the facts written; of facts that were streamed, the first few.
        n_facts: how many were written.
        task_type: PEFT's task type of the model.
        base_model_name_or_path, base_model_revision, base_model_fingerprint: the model they are for.
        base_model_type: transformers' `model_type` of it, where it is known.
        editor: what made the shifts: method, name, revision, version, and the learned λ and η of each layer.
        created_at: ISO 8601, UTC.
        measured: {metric: score after the edit}, where it was measured.
        state: what follows the edits: running statistics, rows of an accumulated edit. Mostly empty.
        n_skipped: facts that `apply` was given and left out, because they are in force already. Not saved.
    """

    def __init__(
        self,
        shifts: Mapping[str, Tensor | Shift],
        *,
        fan_in_fan_out: Iterable[str] = (),
        facts: Iterable[Fact] = (),
        task_type: str = "CAUSAL_LM",
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_fingerprint: str | None = None,
        base_model_type: str | None = None,
        editor: Mapping[str, Any] | None = None,
        created_at: str | None = None,
        measured: Mapping[str, float] | None = None,
        n_facts: int | None = None,
        state: EditState | None = None,
    ) -> None:
        self.layers: dict[str, Shift] = {
            name: dense(shift) if isinstance(shift, Tensor) else shift for name, shift in shifts.items()
        }
        self.fan_in_fan_out = sorted(fan_in_fan_out)
        self.facts = list(facts)
        self.n_facts = len(self.facts) if n_facts is None else n_facts
        self.task_type = task_type
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_fingerprint = base_model_fingerprint
        self.base_model_type = base_model_type
        self.editor = dict(editor or {})
        self.created_at = created_at or datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.measured = dict(measured or {})
        self.state = state or EditState()
        self.n_skipped = 0
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def shifts(self) -> Mapping[str, Tensor]:
        """{module name: S of shape (key_size, value_size), float32 on the CPU}."""
        return _Shifts(self.layers, self.fan_in_fan_out)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Of a method whose statistics follow its edits, those after this edit."""
        return self.state.statistics

    def __repr__(self) -> str:
        return f"Edit({self.n_facts} facts, {len(self.layers)} layers of {self.base_model_name_or_path})"

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the edit, and not which model it is in force on."""
        return {**vars(self), "_model": None}

    # Live models

    def require_lifted(self) -> None:
        """Check that the edit is not in force, so that it can be applied.

        Raises:
            EditStateError: it is.
        """
        if self.in_force:
            raise EditStateError("This edit is in force already, and would count twice. Call undo() first.")

    def require_shifts(self, what: str) -> None:
        """Check that the edit has shifts.

        Args:
            what: is to be done with it, for the message.

        Raises:
            EditStateError: it has none, as one that `apply` gives where all facts are in force already.
        """
        if not self.layers:
            raise EditStateError(
                f"This edit has no shifts, so there is nothing to {what}: all facts were in force already when it was "
                "made. The edits that wrote them: hf_malmen.live_edits(model), or hf-malmen log DIR."
            )

    @property
    def in_force(self) -> bool:
        """Whether this edit is applied to a live model."""
        return self._application() is not None

    @torch.no_grad()
    def apply_to(self, model: nn.Module, *, on_fingerprint_mismatch: str = "warn") -> "Edit":
        """Add the shifts to the weights of a live model, in place.

        Edits stack. All of them, or none, are written: after an error the weights are as they were.

        Args:
            model: a model with these modules. Of a compiled one, or one with PEFT adapters, the base weights change.
            on_fingerprint_mismatch: `"warn"`, `"error"` or `"ignore"` when the model's target weights are not those the
                edit was made for. Where edits are in force on it, its weights as they were before them are compared.

        Returns:
            This edit.

        Raises:
            ModelMismatchError: a module is missing, cannot be edited, or has another shape or orientation.
            TypeError: something else than a live model.
            NumericalError: an edited weight would not be finite in its dtype.
            EditStateError: this edit is in force already.
        """
        self.require_lifted()
        model = plain_model(model)
        self._check_fits(model)
        wanted = self.base_model_fingerprint if self.layers else None  # without layers there is nothing to compare
        check_fingerprint(model, wanted, self.layers, on_fingerprint_mismatch, "The edit", self._base())
        if self.state.solved_with and on_fingerprint_mismatch != "ignore":
            self._warn_alone(sum(edit.n_facts for edit in edits_in_force(model)))
        if not self.layers:
            return self  # an edit that changes nothing is nothing that later ones stand upon
        self._write(model)
        self._model = weakref.ref(model)
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights this edit replaced, bit for bit.

        Edits applied after this one stay in force: where they share its layers they are lifted, this one is undone, and
        they are applied again. That takes a copy of those layers' weights and, for each such edit, another one. Either
        all of it is done or nothing: after an error, and after Ctrl-C, weights and edits in force are as they were. Of
        accumulated edits undo the last ones first: later ones were solved together with this one's facts; and of edits
        whose statistics follow them: those of later ones hold this one's facts. A warning says so.

        The weights that come back are those that were replaced: what else was done to them since, such as training, is
        gone.

        Raises:
            EditStateError: this edit is not in force on any model, or has no shifts.
            ModelMismatchError: a weight has an adapter merged into it.
            NumericalError: without this edit, a weight would not be finite in its dtype with a later one.
        """
        application, model = self._application(), self._model() if self._model is not None else None
        if application is None:
            self.require_shifts("undo")
        if application is None or model is None:
            raise EditStateError("This edit is not in force on any live model, so there is nothing to undo.")
        for name in application.originals:
            check_parted(model, name)
        stack = applications(model)
        place = stack.index(application)
        # What the stack has stays as it is until all is done, so that no failure, be it of the way back, loses an
        # original: undo() can be called again.
        later = [Application(other.edit, dict(other.originals)) for other in stack[place + 1 :]]
        shared = [name for name in application.originals if any(name in other.originals for other in later)]
        alone = [name for name in application.originals if name not in shared]
        found: dict[str, Tensor] = {}
        restored: list[str] = []
        try:
            # First what may fail. The weights of this edit alone need no copy: they can be computed again.
            for name in shared:
                weight = weight_of(model, name)
                found[name] = copy_of(weight)
                overwrite(weight, application.originals[name])
                for other in later:
                    if name in other.originals:
                        other.originals[name] = copy_of(weight)
                        other.edit._add_to(weight, name)
            for name in alone:
                restored.append(name)
                overwrite(weight_of(model, name), application.originals[name])
        except BaseException as error:
            for name, values in found.items():
                overwrite(weight_of(model, name), values)
            for name in restored:
                overwrite(weight_of(model, name), application.originals[name])
                self._add_to(weight_of(model, name), name)
            if isinstance(error, NumericalError):
                raise NumericalError(
                    f"{error} An edit that was applied after this one does not fit without it: undo the later ones "
                    "first, the last one before the others."
                ) from None
            raise
        set_applications(model, [*stack[:place], *later])
        self._model = None
        if self.state.rows and any(other.edit.state.rows for other in later):
            logger.warning(SOLVED_TOGETHER)
        if self.state.statistics and any(other.edit.state.statistics for other in later):
            logger.warning(IN_STATISTICS)

    @contextmanager
    def applied_to(self, model: nn.Module, **kwargs: Any) -> Iterator["Edit"]:
        """`model` is edited within the context, and restored when it ends, also by an error."""
        self.apply_to(model, **kwargs)
        try:
            yield self
        finally:
            if self.in_force:  # else it was undone within
                self.undo()

    def _write(self, model: nn.Module) -> None:
        application = Application(self)
        try:
            for name in self.layers:
                weight = weight_of(model, name, to_write=True)
                application.originals[name] = copy_of(weight)
                self._add_to(weight, name)
        except BaseException:  # Ctrl-C too must leave the model as it was
            for name, original in application.originals.items():
                overwrite(weight_of(model, name), original)
            raise
        set_applications(model, [*applications(model), application])

    def _add_to(self, weight: Tensor, name: str) -> None:
        """Add the shift of module `name` to its weight."""
        values = whole(weight)  # the weight itself, where this process has all of it
        for start, stop, rows in blocks(self.layers[name].to(weight.device), name in self.fan_in_fan_out):
            values[start:stop], _ = add_rows(values[start:stop], rows, name)
        if values is not weight:
            overwrite(weight, values)

    def _application(self) -> Application | None:
        model = self._model() if self._model is not None else None
        stack = applications(model) if model is not None else []
        return next((application for application in stack if application.edit is self), None)

    def _check_fits(self, model: nn.Module) -> None:
        check_targets(model, self.layers)
        for name, shift in self.layers.items():
            flipped = name in self.fan_in_fan_out
            module = target_module(model, name)
            if is_fan_in_fan_out(module) != flipped:
                raise ModelMismatchError(
                    f"{name} is a {type(module).__name__}, stored the other way round than in the "
                    "model the edit was made for. Load the edit's own base model."
                )
            check_shape(shift, flipped, tuple(shape_of(weight_of(model, name))), name)

    # Checkpoints and adapters

    def write(
        self,
        checkpoint: str | Path,
        output_dir: str | Path | None = None,
        *,
        in_place: bool = False,
        on_fingerprint_mismatch: str = "warn",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> WriteReport:
        """Write the shifts into a safetensors checkpoint without loading the model.

        The checkpoint keeps a record of the edit in its `edits` folder, with the bytes that were replaced, and its card
        lists it; `hf-malmen undo` takes it back.

        Args:
            checkpoint: a folder with one `.safetensors` file, or shards and their index; such a file; or a Hub id.
            output_dir: folder for the edited checkpoint; must not exist, or be empty. Weight files without edited
                tensors share their bytes with the source where the file system allows.
            in_place: overwrite `checkpoint` itself instead, crash-safe: see `recover_checkpoint`.
            on_fingerprint_mismatch: `"warn"`, `"error"` or `"ignore"` when the target weights, as they are or as they
                were before the checkpoint's edits in force, are not those the edit was made for.
            revision, token: for a checkpoint on the Hub.

        Returns:
            What was written: folder, the edit's number, keys, and each module's rounding error.

        Raises:
            CheckpointError, ModelMismatchError, NumericalError: see `checkpoint.write_shifts`. Nothing was changed.
        """
        return self.write_with(
            checkpoint,
            output_dir=output_dir,
            in_place=in_place,
            on_fingerprint_mismatch=on_fingerprint_mismatch,
            revision=revision,
            token=token,
        )

    def write_with(self, checkpoint: str | Path, **options: Any) -> WriteReport:
        """`write`, with any other option of `checkpoint.write_shifts`."""
        report = write_shifts(
            checkpoint,
            self.layers,
            save_edit=self._save,
            summarise=self.summary,
            fan_in_fan_out=self.fan_in_fan_out,
            fingerprint=self.base_model_fingerprint,
            **options,
        )
        if self.state.solved_with and options.get("on_fingerprint_mismatch") != "ignore":
            earlier = [record for record in read_history(report.output_dir) if record.id != report.edit_id]
            self._warn_alone(sum(record.summary.n_facts for record in earlier))
        return report

    def _warn_alone(self, n_found: int) -> None:
        """Say so where fewer facts are in force than an accumulated edit was solved together with."""
        if n_found < self.state.solved_with:
            logger.warning(SOLVED_ALONE.format(expected=self.state.solved_with, found=n_found))

    def summary(self, edit_id: str) -> EditSummary:
        """What cards and histories say about this edit."""
        return EditSummary(
            id=edit_id,
            created_at=self.created_at,
            n_facts=self.n_facts,
            facts=[(fact.prompt, fact.target) for fact in self.facts[:N_FACTS_SHOWN]],
            editor=describe_maker(self.editor),
            base_model=hub_id(self.base_model_name_or_path),
            base_model_fingerprint=self.base_model_fingerprint,
            hf_malmen_version=__version__,
            measured=self.measured,
        )

    def _base(self) -> str:
        """The base model and revision, for messages."""
        return f"{self.base_model_name_or_path or 'its base model'} at revision {self.base_model_revision or 'unknown'}"

    def to_lora(self, save_directory: str | Path, rank: int | None = None) -> Path:
        """Save the edit as a PEFT LoRA adapter folder, also for 4- and 8-bit models, which cannot be edited in place.

        It is for a model that the edit is not in force on: there it would count twice.

        The adapter is exact wherever a layer was solved from no more than `rank` traced tokens; see `save_lora`. Edits
        load side by side and switch with `set_adapter`, and swap with PEFT's `hotswap_adapter`, whatever their ranks.
        There, two adapters must agree on the layers that have a rank of their own (`alpha_pattern`), and for a compiled
        model `prepare_model_for_compiled_hotswap` comes first. transformers' `load_adapter(..., hotswap=True)` takes
        adapters of the same layers and ranks. PEFT refuses adapters of the `out_proj` of Mamba models, their default
        target; a warning says so.

        Args:
            save_directory: where to.
            rank: at most this rank; None takes 512, the largest that vLLM serves. Either way a layer gets the smallest
                served rank that is exact. A layer that needs more is truncated: see `TruncationWarning` and
                `lora_errors.json` in the folder, which has the relative error of every layer.

        Returns:
            The folder, for `PeftModel.from_pretrained` or `model.load_adapter`.

        Raises:
            ValueError: a rank below 1.
            EditStateError: the edit has no shifts.
        """
        self.require_shifts("export")
        return save_lora(
            save_directory,
            self.layers,
            fan_in_fan_out=self.fan_in_fan_out,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.base_model_revision,
            base_model_type=self.base_model_type,
            task_type=self.task_type,
            rank=rank,
        )

    def merge(self, other: "Edit") -> "Edit":
        """One edit with the shifts of both added up, and the facts of both.

        Where both have a fact of the same prompt, that of `other` is the one in force. The state is that after `other`.

        A fingerprint is of an edit's own modules. Of edits in the same modules the fingerprints are compared; else, or
        where one has none, the base models' names and revisions, as far as both are known. Where neither edit has all
        modules of the two, the merged one has no fingerprint, so that nothing compares its base's weights later.

        Raises:
            ModelMismatchError: the two are for different base models, or for other weights of one.
        """
        shifts: dict[str, Tensor | Shift] = {**self.layers, **other.layers}
        base = _common_base(self, other, shifts.keys())
        for name in self.layers.keys() & other.layers.keys():
            shifts[name] = add(self.layers[name], other.layers[name])
        state = self.state.then(other.state, len(self.facts))
        if not other.layers or not self.layers:  # of an edit that changes nothing, the other's is the state
            state = self.state if self.layers else other.state
        # Flat and without repetition: an edit made in a thousand turns by one editor has that one maker.
        makers: list[dict[str, Any]] = []
        for edit in (self, other):
            makers += [maker for maker in edit.editor.get("merged", [edit.editor]) if maker not in makers]
        return Edit(
            shifts,
            fan_in_fan_out={*self.fan_in_fan_out, *other.fan_in_fan_out},
            facts=[*self.facts, *other.facts],
            n_facts=self.n_facts + other.n_facts,
            task_type=self.task_type,
            base_model_type=other.base_model_type or self.base_model_type,
            editor=makers[0] if len(makers) == 1 else {"merged": makers},
            state=state,
            **base,
        )

    # Folders and the Hub

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `edit.safetensors` (shifts), `config.json` (provenance, sorted) and a card into a folder.

        What follows the edits goes into `state.safetensors`, if there is any.

        Raises:
            EditStateError: the edit has no shifts.
        """
        self.require_shifts("save")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        (folder / CARD_FILE).write_bytes(render_edit_card(self).encode())
        return folder

    def _save(self, folder: Path) -> None:
        save_shifts(self.layers, folder / SHIFTS_FILE)
        self.state.save(folder)
        config = {
            "base_model_fingerprint": self.base_model_fingerprint,
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_model_revision": self.base_model_revision,
            "base_model_type": self.base_model_type,
            "created_at": self.created_at,
            "edit_format_version": EDIT_FORMAT_VERSION,
            "editor": self.editor,
            "facts": [fact.to_dict() for fact in self.facts],
            "fan_in_fan_out": self.fan_in_fan_out,
            "hf_malmen_version": __version__,
            "measured": self.measured,
            "n_facts": self.n_facts,
            "task_type": self.task_type,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / EDIT_CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Edit":
        """Load an edit from a folder or the Hub.

        Args:
            name_or_path: folder, such as `edits/0001` of an edited checkpoint; or Hub id.
            revision, token, cache_dir, local_files_only: as for `huggingface_hub.snapshot_download`.

        Raises:
            ModelMismatchError: the folder holds no edit, or one of a newer format.
            OSError: there is no such folder, repo or revision.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            with repo_named(str(name_or_path)):
                found = snapshot_download(
                    str(name_or_path),
                    allow_patterns=[SHIFTS_FILE, STATE_FILE, EDIT_CONFIG_FILE],
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            folder = Path(found)
        config_file, shifts_file = folder / EDIT_CONFIG_FILE, folder / SHIFTS_FILE
        config = parse_json(config_file.read_bytes(), config_file) if config_file.is_file() else {}
        if "edit_format_version" not in config or not shifts_file.is_file():
            what = "an editor; use EditorModel.from_pretrained"
            if config.get("model_type") != EditorConfig.model_type:
                what = f"no edit: expected {EDIT_CONFIG_FILE} and {SHIFTS_FILE}, as Edit.save_pretrained writes them"
            raise ModelMismatchError(f"{name_or_path} holds {what}.")
        version = config.pop("edit_format_version", None)
        if version != EDIT_FORMAT_VERSION:
            raise ModelMismatchError(
                f"{name_or_path} has edit format {version} (written by hf_malmen {config.get('hf_malmen_version')}), "
                f"and hf_malmen {__version__} reads {EDIT_FORMAT_VERSION}. Upgrade: pip install -U hf_malmen."
            )
        config.pop("hf_malmen_version", None)
        shifts = load_shifts(shifts_file)
        try:
            facts = [Fact(**{**fact, "rephrases": tuple(fact.get("rephrases", ()))}) for fact in config.pop("facts")]
            edit = cls(shifts, facts=facts, state=EditState.load(folder), **config)
            _check_provenance(edit)
            return edit
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelMismatchError(f"{config_file} does not describe an edit ({error}). {DAMAGED}") from None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload edit",
        create_pr: bool = False,
        revision: str | None = None,
    ) -> str:
        """Upload the edit's folder to a Hub repo, made if it does not exist.

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
        with TemporaryDirectory() as folder:
            return push_folder(
                self.save_pretrained(folder),
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                revision=revision,
            )


def _common_base(first: Edit, second: Edit, modules: Set[str]) -> dict[str, Any]:
    """What the merge of two edits says about its base model: the arguments of `Edit` for it.

    Args:
        first, second: the edits.
        modules: those of the two together.

    Raises:
        ModelMismatchError: see `Edit.merge`.
    """
    edits = (first, second)
    for name in (name for name in first.layers if name in second.layers):
        layouts = [(edit.layers[name].shape, name in edit.fan_in_fan_out) for edit in edits]
        if layouts[0] != layouts[1]:
            found = " in one edit and ".join(f"{shape} with fan_in_fan_out={flipped}" for shape, flipped in layouts)
            raise ModelMismatchError(
                f"The shift of {name} has shape {found} in the other. They are for different base models, and cannot "
                "be merged."
            )
    # That of fewer modules would be compared with the weights of all of them, and never match.
    covering = [edit.base_model_fingerprint for edit in edits if edit.layers.keys() == modules]
    fingerprints = [fingerprint for fingerprint in covering if fingerprint is not None]
    names = [edit.base_model_name_or_path for edit in edits]
    revisions = [edit.base_model_revision for edit in edits]
    if len(fingerprints) == 2 and fingerprints[0] != fingerprints[1]:
        raise ModelMismatchError(
            "The two edits were made for base models with different weights in the same modules "
            f"({names[0]}, fingerprint {fingerprints[0][:12]}...; {names[1]}, fingerprint {fingerprints[1][:12]}...); "
            "they cannot be merged. One of them may have been made on top of other edits, from a checkpoint that has "
            "them in force. Make both from the same checkpoint; edits in force on a live model do not count."
        )
    if len(fingerprints) < 2 and any(len({*known} - {None}) > 1 for known in (names, revisions)):
        raise ModelMismatchError(
            f"The two edits name different base models ({first._base()}; {second._base()}), and have no fingerprints "
            "of the same modules, which could show that the weights are the same; they are not merged. If they are the "
            "same, set base_model_name_or_path and base_model_revision of one edit to those of the other."
        )
    base_model = names[0] or names[1]
    of_that_name = [revision for name, revision in zip(names, revisions, strict=True) if name == base_model]
    return {
        "base_model_name_or_path": base_model,
        "base_model_revision": next(filter(None, of_that_name), None),
        "base_model_fingerprint": fingerprints[0] if fingerprints else None,
    }


def _check_provenance(edit: Edit) -> None:
    """Refuse what a file says about an edit where it is of another type than `Edit` and `Fact` say.

    Raises:
        AttributeError, TypeError, ValueError: it is.
    """
    texts = [edit.created_at, edit.task_type, *edit.fan_in_fan_out]
    if isinstance(edit.n_facts, bool) or not isinstance(edit.n_facts, int) or edit.n_facts < len(edit.facts):
        raise ValueError(f"its n_facts is {edit.n_facts!r}")
    optional = [edit.base_model_name_or_path, edit.base_model_revision]
    optional += [edit.base_model_fingerprint, edit.base_model_type]
    for fact in edit.facts:
        texts += [fact.prompt, fact.target, *fact.rephrases]
        optional += [fact.unrelated_prompt, fact.unrelated_answer, fact.subject, fact.ground_truth]
    for maker in edit.editor.get("merged", [edit.editor]):
        texts.append(maker.get("method", ""))
        optional.append(maker.get("name_or_path"))
    if not all(isinstance(text, str) for text in (*texts, *(text for text in optional if text is not None))):
        raise TypeError("it has something else where text is expected")
    if not all(isinstance(score, int | float) for score in edit.measured.values()):
        raise TypeError("it has something else where a score is expected")
    json.dumps([texts, optional, edit.editor, edit.measured], ensure_ascii=False).encode()  # or no file can hold it


def check_fingerprint(
    model: nn.Module,
    expected: str | None,
    names: Iterable[str],
    policy: str,
    subject: str,
    base: str,
) -> str | None:
    """Compare the model's target weights with those `subject` was made for.

    Edits in force on the model do not count: the weights they replaced are compared; nor does the rounding of float16,
    where the checkpoint that the model was loaded from is there to be asked.

    Args:
        model: the model.
        expected: the fingerprint, or None where there is none to compare.
        names: the target modules.
        policy: `"warn"`, `"error"` or `"ignore"`.
        subject: who asks, for the message.
        base: the base model and revision that it wants, for the message.

    Returns:
        The fingerprint of the weights compared; None where nothing was.

    Raises:
        ModelMismatchError: they differ and the policy is `"error"`.
    """
    if policy not in FINGERPRINT_POLICIES:
        raise ValueError(f"The fingerprint policy is {policy!r}; allowed: {', '.join(FINGERPRINT_POLICIES)}.")
    if expected is None or policy == "ignore":
        return None
    names = list(names)
    found = base_fingerprint_as_stored(model, names)
    # The checkpoint may not have been there, or not been looked for, when `expected` was found.
    if expected in (found, base_fingerprint(model, names) if found != expected else None):
        return found
    message = (
        f"{subject} was made for a base model whose target weights differ from this one's (fingerprint "
        f"{expected[:12]}...). Its facts may not be written well. Load {base}."
    )
    if policy == "error":
        raise ModelMismatchError(message)
    warnings.warn(message, FingerprintWarning, stacklevel=3)
    return found
