"""`Edit`: weight shifts with their provenance, and the only writes to live weights."""

import json
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import save_lora
from .checkpoint import WriteReport, write_shifts
from .configuration import FINGERPRINT_POLICIES
from .errors import EditStateError, FingerprintWarning, ModelMismatchError
from .facts import Fact
from .targets import check_targets, fingerprint, is_fan_in_fan_out, weight_of
from .version import __version__
from .weights import add_shift

# The layout of what `Edit.save_pretrained` writes.
EDIT_FORMAT_VERSION = 1
_SHIFTS_FILE = "edit.safetensors"
_CONFIG_FILE = "config.json"


@dataclass
class _Application:
    """One edit in force on a model, and the weights it replaced."""

    edit: "Edit"
    originals: dict[str, Tensor] = field(default_factory=dict)


# The edits in force on each live model, oldest first.
_in_force: "weakref.WeakKeyDictionary[nn.Module, list[_Application]]" = weakref.WeakKeyDictionary()


class Edit:
    """Weight shifts that write a set of facts into a base model, and where they came from.

    Attributes:
        shifts: {module name: S of shape (key_size, value_size), float32 on the CPU}.
        fan_in_fan_out: the modules that store their weight as (key_size, value_size).
        facts: the facts written.
        base_model_name_or_path, base_model_revision, base_model_fingerprint: the model they are for.
        editor: what made the shifts: method, name, version, and the learned λ and η of each layer.
        created_at: ISO 8601, UTC.
    """

    def __init__(
        self,
        shifts: Mapping[str, Tensor],
        *,
        fan_in_fan_out: Iterable[str] = (),
        facts: Iterable[Fact] = (),
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_fingerprint: str | None = None,
        editor: Mapping[str, Any] | None = None,
        created_at: str | None = None,
    ) -> None:
        self.shifts = {name: shift.detach().to("cpu", torch.float32).contiguous() for name, shift in shifts.items()}
        self.fan_in_fan_out = sorted(fan_in_fan_out)
        self.facts = list(facts)
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_fingerprint = base_model_fingerprint
        self.editor = dict(editor or {})
        self.created_at = created_at or datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._model: weakref.ref[nn.Module] | None = None

    def __repr__(self) -> str:
        return f"Edit({len(self.facts)} facts, {len(self.shifts)} layers of {self.base_model_name_or_path})"

    # Live models

    @property
    def in_force(self) -> bool:
        """Whether this edit is applied to a live model."""
        return self._application() is not None

    @torch.no_grad()
    def apply_to(self, model: nn.Module, *, on_fingerprint_mismatch: str = "warn") -> "Edit":
        """Add the shifts to the weights of a live model, in place.

        Edits stack. All of them, or none, are written: after an error the weights are as they were.

        Args:
            model: a model with these modules.
            on_fingerprint_mismatch: `"warn"`, `"error"` or `"ignore"` when its target weights are not those the edit
                was made for. Weights replaced by edits in force count as they were before those.

        Returns:
            This edit.

        Raises:
            ModelMismatchError: a module is missing, cannot be edited, or has another shape or orientation.
            NumericalError: an edited weight would not be finite in its dtype.
            EditStateError: this edit is in force already.
        """
        if self.in_force:
            raise EditStateError("This edit is in force already. Call undo() first, or load the edit a second time.")
        self._check_fits(model)
        check_fingerprint(model, self.base_model_fingerprint, self.shifts, on_fingerprint_mismatch, "The edit")
        self._write(model)
        self._model = weakref.ref(model)
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights this edit replaced, bit for bit.

        Edits applied after this one stay in force: they are lifted, this one is undone, and they are applied again.

        Raises:
            EditStateError: this edit is not in force on any model.
        """
        application, model = self._application(), self._model() if self._model is not None else None
        if application is None or model is None:
            raise EditStateError("This edit is not in force on any live model, so there is nothing to undo.")
        stack = _in_force[model]
        later = stack[stack.index(application) + 1 :]
        for lifted in [*reversed(later), application]:
            _restore(model, lifted)
        del stack[stack.index(application) :]
        self._model = None
        for lifted in later:
            lifted.edit._write(model)

    @contextmanager
    def applied_to(self, model: nn.Module, **kwargs: Any) -> Iterator["Edit"]:
        """`model` is edited within the context, and restored when it ends, also by an error."""
        self.apply_to(model, **kwargs)
        try:
            yield self
        finally:
            self.undo()

    def _write(self, model: nn.Module) -> None:
        application = _Application(self)
        try:
            for name, shift in self.shifts.items():
                weight = weight_of(model, name)
                edited = add_shift(weight, shift, fan_in_fan_out=name in self.fan_in_fan_out, name=name)
                application.originals[name] = weight.detach().clone()
                weight.copy_(edited)
        except BaseException:  # Ctrl-C too must leave the model as it was
            _restore(model, application)
            raise
        _in_force.setdefault(model, []).append(application)

    def _application(self) -> _Application | None:
        model = self._model() if self._model is not None else None
        stack = _in_force.get(model, []) if model is not None else []
        return next((application for application in stack if application.edit is self), None)

    def _check_fits(self, model: nn.Module) -> None:
        check_targets(model, self.shifts)
        for name in self.shifts:
            if is_fan_in_fan_out(model.get_submodule(name)) != (name in self.fan_in_fan_out):
                raise ModelMismatchError(
                    f"{name} is a {type(model.get_submodule(name)).__name__}, stored the other way round than in the "
                    "model the edit was made for. Load the edit's own base model."
                )

    # Checkpoints and adapters

    def write(
        self, checkpoint: str | Path, output_dir: str | Path | None = None, *, in_place: bool = False
    ) -> WriteReport:
        """Write the shifts into a safetensors checkpoint without loading the model.

        Args:
            checkpoint: a folder with one `.safetensors` file, or shards and their index; or a Hub id.
            output_dir: folder for the edited checkpoint; must not exist, or be empty.
            in_place: overwrite `checkpoint` itself instead.

        Returns:
            What was written: folder, files, and for each module the largest rounding error of the addition.

        Raises:
            CheckpointError, ModelMismatchError, NumericalError: see `checkpoint.write_shifts`. Nothing was changed.
        """
        return write_shifts(
            checkpoint, self.shifts, fan_in_fan_out=self.fan_in_fan_out, output_dir=output_dir, in_place=in_place
        )

    def to_lora(self, save_directory: str | Path, rank: int | None = None) -> Path:
        """Save the edit as a PEFT LoRA adapter folder.

        Args:
            save_directory: where to.
            rank: at most this rank; None keeps each layer's own. A layer of a higher rank is truncated, and its
                relative error stored in the adapter's metadata and warned about.

        Returns:
            The folder, for `PeftModel.from_pretrained` or `model.load_adapter`.
        """
        return save_lora(
            save_directory,
            self.shifts,
            fan_in_fan_out=self.fan_in_fan_out,
            base_model_name_or_path=self.base_model_name_or_path,
            rank=rank,
        )

    def merge(self, other: "Edit") -> "Edit":
        """One edit with the shifts of both added up, and the facts of both.

        Raises:
            ModelMismatchError: the two are for different base models.
        """
        if self.base_model_fingerprint != other.base_model_fingerprint:
            raise ModelMismatchError(
                "The two edits are for base models with different weights "
                f"({self.base_model_name_or_path}, {other.base_model_name_or_path}); they cannot be merged."
            )
        shifts = dict(self.shifts)
        for name, shift in other.shifts.items():
            shifts[name] = shifts[name] + shift if name in shifts else shift
        # Flat and without repetition: an edit made in a thousand turns by one editor has that one maker.
        makers: list[dict[str, Any]] = []
        for edit in (self, other):
            makers += [maker for maker in edit.editor.get("merged", [edit.editor]) if maker not in makers]
        return Edit(
            shifts,
            fan_in_fan_out={*self.fan_in_fan_out, *other.fan_in_fan_out},
            facts=[*self.facts, *other.facts],
            base_model_name_or_path=self.base_model_name_or_path,
            base_model_revision=self.base_model_revision,
            base_model_fingerprint=self.base_model_fingerprint,
            editor=makers[0] if len(makers) == 1 else {"merged": makers},
        )

    # Folders and the Hub

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `edit.safetensors` (shifts) and `config.json` (provenance, sorted) into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.shifts, folder / _SHIFTS_FILE, metadata={"format": "pt"})
        config = {
            "base_model_fingerprint": self.base_model_fingerprint,
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_model_revision": self.base_model_revision,
            "created_at": self.created_at,
            "edit_format_version": EDIT_FORMAT_VERSION,
            "editor": self.editor,
            "facts": [fact.to_dict() for fact in self.facts],
            "fan_in_fan_out": self.fan_in_fan_out,
            "hf_malmen_version": __version__,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / _CONFIG_FILE).write_text(text, encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> "Edit":
        """Load an edit from a folder or the Hub.

        Args:
            name_or_path: folder, or Hub id.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only` … for `huggingface_hub.snapshot_download`.

        Raises:
            ModelMismatchError: the folder holds no edit, or one of a newer format.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            patterns = [_SHIFTS_FILE, _CONFIG_FILE]
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **kwargs))
        config_file, shifts_file = folder / _CONFIG_FILE, folder / _SHIFTS_FILE
        if not config_file.is_file() or not shifts_file.is_file():
            raise ModelMismatchError(
                f"{name_or_path} holds no edit: expected {_CONFIG_FILE} and {_SHIFTS_FILE}, as `Edit.save_pretrained` "
                "writes them. Use EditorModel.from_pretrained for an editor."
            )
        config = json.loads(config_file.read_text(encoding="utf-8"))
        version = config.pop("edit_format_version", None)
        if version != EDIT_FORMAT_VERSION:
            raise ModelMismatchError(
                f"{name_or_path} has edit format {version} (written by hf_malmen {config.get('hf_malmen_version')}), "
                f"and hf_malmen {__version__} reads {EDIT_FORMAT_VERSION}. Upgrade: pip install -U hf_malmen."
            )
        config.pop("hf_malmen_version", None)
        facts = [Fact(**{**fact, "rephrases": tuple(fact.get("rephrases", ()))}) for fact in config.pop("facts")]
        return cls(load_file(shifts_file), facts=facts, **config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload edit",
        create_pr: bool = False,
    ) -> str:
        """Upload the edit's folder to a Hub repo, made if it does not exist.

        Returns:
            The URL of the commit.
        """
        api = HfApi(token=token, library_name="hf_malmen", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )


def check_fingerprint(model: nn.Module, expected: str | None, names: Iterable[str], policy: str, subject: str) -> None:
    """Compare the model's target weights with those `subject` was made for.

    Edits in force on the model do not count: the weights they replaced are compared.

    Args:
        model: the model.
        expected: the fingerprint, or None where there is none to compare.
        names: the target modules.
        policy: `"warn"`, `"error"` or `"ignore"`.
        subject: who asks, for the message.

    Raises:
        ModelMismatchError: they differ and the policy is `"error"`.
    """
    if policy not in FINGERPRINT_POLICIES:
        raise ValueError(f"The fingerprint policy is {policy!r}; allowed: {', '.join(FINGERPRINT_POLICIES)}.")
    if expected is None or policy == "ignore" or base_fingerprint(model, names) == expected:
        return
    message = (
        f"{subject} was made for a base model whose target weights differ from this one's (fingerprint "
        f"{expected[:12]}...). Its facts may not be written well. Load the base model and revision named in its config."
    )
    if policy == "error":
        raise ModelMismatchError(message)
    warnings.warn(message, FingerprintWarning, stacklevel=3)


def base_fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Fingerprint of the target weights as they were before any edit in force."""
    originals: dict[str, Tensor] = {}
    for application in reversed(_in_force.get(model, [])):
        originals |= application.originals
    return fingerprint((name, originals.get(name, weight_of(model, name))) for name in sorted(names))


def _restore(model: nn.Module, application: _Application) -> None:
    for name, original in application.originals.items():
        weight_of(model, name).copy_(original)
