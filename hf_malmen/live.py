"""The edits in force on each live model, in the order they were applied, and the weights that they replaced."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .targets import fingerprint, plain_model, weight_of

if TYPE_CHECKING:
    from .edit import Edit


@dataclass
class Application:
    """One edit in force on a model, and the weights it replaced."""

    edit: "Edit"
    originals: dict[str, Tensor] = field(default_factory=dict)


# Attribute of a model: how many edits are in force on it. Copies of the model have it too.
_COUNT = "_hf_malmen_n_edits"
_applications: "weakref.WeakKeyDictionary[nn.Module, list[Application]]" = weakref.WeakKeyDictionary()


def applications(model: nn.Module) -> list[Application]:
    """The edits in force on a model, oldest first.

    Args:
        model: the base model itself, as `plain_model` gives it.
    """
    return list(_applications.get(model, ()))


def set_applications(model: nn.Module, stack: list[Application]) -> None:
    """From now on these are in force on a model, whose weights whoever calls this has written.

    Args:
        model: as of `applications`.
        stack: the edits, oldest first.
    """
    n_edits = n_forgotten(model) + len(stack)
    _applications[model] = list(stack)
    if n_edits:
        model.__dict__[_COUNT] = n_edits
    else:
        model.__dict__.pop(_COUNT, None)


def n_forgotten(model: nn.Module) -> int:
    """How many edits a model holds that nothing is known of: those in force on the model that it was copied from.

    Args:
        model: as of `applications`.
    """
    count: int = model.__dict__.get(_COUNT, 0)
    return count - len(_applications.get(model, ()))


def live_edits(model: nn.Module) -> list["Edit"]:
    """The edits in force on a live model, oldest first; not those of the checkpoint that it was loaded from.

    Each can be undone, also where what `apply` returned was not kept: `live_edits(model)[-1].undo()`.
    """
    return [application.edit for application in applications(plain_model(model))]


def weights_before_live_edits(model: nn.Module) -> dict[str, Tensor]:
    """{module name: its weight before any edit of `live_edits`}, of the modules that these changed."""
    originals: dict[str, Tensor] = {}
    for application in reversed(applications(plain_model(model))):
        originals |= application.originals
    return originals


def base_fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Fingerprint of the target weights as they were before any edit of `live_edits`."""
    model = plain_model(model)
    originals = weights_before_live_edits(model)
    return fingerprint((name, originals.get(name, weight_of(model, name))) for name in sorted(names))
