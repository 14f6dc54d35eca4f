"""Which edits are in force on a model or a checkpoint, and what its weights were before them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, nn
from transformers.utils import logging

from . import stored_weights
from .errors import CheckpointError, EditStateError, ModelMismatchError
from .facts import Fact
from .history import require_settled
from .hub import HUB_ERRORS, cached_checkpoint, cached_commit
from .ledger import Ledger, build_ledger, read_facts
from .live import base_fingerprint, live_edits, n_forgotten, weights_before_live_edits
from .model_card import hub_id
from .records import EDITS_FOLDER, Record, read_history, read_ledger
from .sharding import copy_of, overwrite
from .shards import INDEX_FILE, SINGLE_FILE, read_tensor_index
from .state import EditState
from .stored_weights import fingerprints_of, weights_before_edits
from .targets import is_fan_in_fan_out, module_shape, named_modules, plain_model, target_module, weight_of

if TYPE_CHECKING:
    from .edit import Edit

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EditInForce:
    """One edit in force on a model.

    Attributes:
        id: as in `LedgerEntry.edit`.
        facts: the facts that it keeps.
        n_facts: how many it wrote.
        source: the edit, of a live model; its folder, of the checkpoint that the model was loaded from.
    """

    id: str
    facts: Sequence[Fact]
    n_facts: int
    source: Union["Edit", Path]

    @cached_property
    def state(self) -> EditState:
        """What follows the edits, as it was after this one."""
        return EditState.load(self.source) if isinstance(self.source, Path) else self.source.state


def edits_in_force(model: nn.Module, *, strict: bool = False) -> list[EditInForce]:
    """The edits in force on a model, oldest first: those of the checkpoint that it was loaded from, then live ones.

    Args:
        model: the live model.
        strict: whether it is an error if the checkpoint's cannot be told, or those of the live model that this one is a
            copy of; else, and where the model may have been made here and named at will, a warning, and they do not
            count.

    Raises:
        CheckpointError: the checkpoint has a damaged record.
        EditStateError: with `strict`: edits cannot be told.
    """
    found = []
    if n_edits := n_forgotten(plain_model(model)):
        _doubt(
            f"This model is a copy of one with edits in force, {n_edits} of which it holds without knowing them. Load "
            "the model again with from_pretrained and apply their facts to that, or undo them before it is copied.",
            strict,
        )
    for record in _loaded_records(model, strict):
        found.append(EditInForce(record.id, read_facts(record.folder), record.summary.n_facts, record.folder))
    for number, edit in enumerate(live_edits(model), 1):
        found.append(EditInForce(f"live {number}", edit.facts, edit.n_facts, edit))
    return found


def facts_in_force(model: nn.Module | str | Path) -> Ledger:
    """Which facts the edits in force on a model wrote, by which edit, and which of them were replaced.

    A fact is replaced by a later one with the same prompt, but for white space around it.

    Args:
        model: a live model, or the folder of a checkpoint. Of a live model that was loaded from an edited checkpoint,
            the edits of both count.

    Raises:
        CheckpointError: no such folder, or a damaged record.
        TypeError: neither a live model nor a folder.
    """
    if isinstance(model, str | Path):
        return read_ledger(model)
    return ledger_of(edits_in_force(model))


def fingerprint_before_edits(model: nn.Module, names: Iterable[str]) -> str | None:
    """Of target weights before the edits of the checkpoint that `model` was loaded from, as they are stored there.

    None where the weights, but for live edits, are none that the checkpoint has or had; and where `base_fingerprint`
    says as much: of a checkpoint without edits, in other dtypes than float16.
    """
    model = plain_model(model)
    names = list(names)
    folder = _edited_folder(model)
    if folder is None:
        return fingerprint_as_stored(model, names)
    if _n_loaded(model, folder, names) is None:
        return None
    return stored_weights.fingerprint_before_edits(folder, *_layout(model, names))


def fingerprint_as_stored(model: nn.Module, names: Iterable[str]) -> str | None:
    """Of target weights that float16 has rounded, but for live edits: as the checkpoint stores them.

    None where `base_fingerprint` says as much, and where the checkpoint has others.
    """
    model = plain_model(model)
    names = list(names)
    folder = _source(model) if _is_rounded(model, names) else None
    if folder is None:
        return None
    with suppress(CheckpointError, ModelMismatchError):  # as where its weights are no safetensors files
        n_loaded = _n_loaded(model, folder, names)
        if n_loaded is not None:
            n_lifted = len(read_history(folder)) - n_loaded
            return next(islice(fingerprints_of(folder, *_layout(model, names)), n_lifted, None))
    return None


def base_fingerprint_as_stored(model: nn.Module, names: Iterable[str]) -> str:
    """What an edit or an editor says of the weights it is made for: `fingerprint_as_stored`, else `base_fingerprint`.

    So an edit made on a model that was loaded in float16 is for the checkpoint, and for the model in any dtype.
    """
    names = list(names)
    return fingerprint_as_stored(model, names) or base_fingerprint(model, names)


@contextmanager
def unedited(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context the target weights are those before any edit in force; afterwards, also by an error, as found.

    Args:
        model: the live model.
        names: the target modules.

    Yields:
        {module name: its weight as found}.
    """
    model = plain_model(model)
    before = weights_before_live_edits(model)
    if _loaded_records(model):
        folder = _edited_folder(model)
        assert folder is not None  # for the type checker: there are records
        before |= dict(weights_before_edits(folder, *_layout(model, names)))
    weights = {name: weight_of(model, name, to_write=name in before) for name in sorted({*names, *before})}
    found = {name: copy_of(weight) if name in before else weight for name, weight in weights.items()}
    try:
        for name, weight in before.items():
            overwrite(weights[name], weight)
        yield found
    finally:
        for name in before:
            overwrite(weights[name], found[name])


def ledger_of(edits: Iterable[EditInForce]) -> Ledger:
    """Which facts they wrote, and which of them were replaced."""
    return build_ledger((edit.id, edit.facts, edit.n_facts) for edit in edits)


def _source(model: nn.Module, strict: bool = False) -> Path | None:
    """The folder of the checkpoint that a model was loaded from; of one on the Hub, its copy in the cache.

    Where transformers does not say which commit was loaded, that of the main branch. None where there is none, or it
    cannot be told.
    """
    model = plain_model(model)
    name = getattr(model, "name_or_path", None)
    if not name:
        return None
    if Path(name).exists():
        return Path(name) if Path(name).is_dir() else None
    elsewhere = "If it is a folder, set model.name_or_path to where that lies"
    if hub_id(name) is None:
        _doubt(
            f"{name}, which this model was loaded from, is not there, and may have edits in force. {elsewhere}; "
            "if it has none, to ''.",
            strict,
        )
        return None
    commit = getattr(getattr(model, "config", None), "_commit_hash", None) or cached_commit(name)
    try:
        return cached_checkpoint(name, commit)
    except HUB_ERRORS as error:
        _doubt(
            f"Cannot ask the Hub whether {name}, which this model was loaded from, has edits in force "
            f"({type(error).__name__}). Try again later, or load the model from a download of the repo. {elsewhere}.",
            strict and commit is not None,  # else it may be any name, of a model that was never saved
        )
        return None


def _edited_folder(model: nn.Module, strict: bool = False) -> Path | None:
    """The folder of the checkpoint that a model was loaded from, if there are edits in it."""
    folder = _source(model, strict)
    if folder is None or not (folder / EDITS_FOLDER).is_dir():
        return None
    require_settled(folder)
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return None  # the edits are those of a lone file of weights, beside others that are no safetensors files
    return folder if read_history(folder) else None


def _doubt(message: str, strict: bool) -> None:
    if strict:
        raise EditStateError(message)
    logger.warning_once(f"{message} Until then they do not count.")


def _n_loaded(model: nn.Module, folder: Path, names: Sequence[str]) -> int | None:
    """How many edits of a checkpoint the weights of `names` hold, beside live ones: the first ones, as far as they go.

    The checkpoint may have been edited since the model was loaded, as by writing a live edit into it. None: the weights
    are none that it has or had.
    """
    found = base_fingerprint(model, names)
    dtypes = {name: weight_of(model, name).dtype for name in names}
    n_records = len(read_history(folder))
    for n_lifted, fingerprint in enumerate(fingerprints_of(folder, *_layout(model, names), dtypes)):
        if fingerprint == found:
            return n_records - n_lifted
    return None


def _is_rounded(model: nn.Module, names: Iterable[str]) -> bool:
    return any(weight_of(model, name).dtype == torch.float16 for name in names)


def _loaded_records(model: nn.Module, strict: bool = False) -> list[Record]:
    """The edits of the checkpoint that `model` was loaded from, as far as it holds them; none if it was changed."""
    model = plain_model(model)
    folder = _edited_folder(model, strict)
    if folder is None:
        return []
    tensors = read_tensor_index(folder)
    records = read_history(folder)
    # Not those of a lone file of weights that lies beside the checkpoint's.
    own = {record.id for record in records if len(record.tensors_in(tensors)) == len(record.tensors)}
    names = sorted({name for record in records if record.id in own for name in record.modules})
    if not names:
        return []
    n_loaded = _n_loaded(model, folder, names) if {*names} <= {name for name, _ in named_modules(model)} else None
    if n_loaded is None:
        _doubt(
            f"{folder}, which this model was loaded from, has edits in force that the model does not hold: one of the "
            "two was changed since, by other means than edits. Load the model again to edit it as the folder has it.",
            strict,
        )
        return []
    return [record for record in records[:n_loaded] if record.id in own]


def _layout(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{module name: (key_size, value_size)}, and the names of those that store their weight in that order."""
    modules = {name: target_module(model, name) for name in names}
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        key_size, value_size = module_shape(module)
        shapes[name] = key_size, value_size
    return shapes, [name for name, module in modules.items() if is_fan_in_fan_out(module)]
