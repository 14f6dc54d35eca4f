"""`EditState`: what follows the edits, kept with each edit so that editing goes on where it was.

Three things do. Running statistics of methods that let them follow the edits: those after this edit. Of an accumulated
edit, its own rows of the least squares: of all edits in force together they give the solve over all facts. And of an
edit by MEMIT the keys of its facts, which later edits leave where they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import distributed
from .errors import DAMAGED, ModelMismatchError
from .shards import read_header

STATE_FILE = "state.safetensors"
# What an edit that is undone leaves behind, if later ones were solved together with it.
SOLVED_TOGETHER = (
    "Later edits were solved together with the facts of this one (accumulate=True). What is left is the sum of their "
    "shifts, which is not yet what the facts left would give: the next apply(..., accumulate=True) solves for these."
)
# What an edit says that is used where the facts it was solved together with are not in force.
SOLVED_ALONE = (
    "This edit was solved together with {expected} facts of earlier edits (accumulate=True), and earlier edits here "
    "have written {found}: its shift without theirs is not what its facts would give. Put those edits in force first, "
    "or apply its facts anew with the editor."
)
# And if the running statistics of later ones went on from its own.
IN_STATISTICS = (
    "Later edits went on from running statistics that had taken in the facts of this one. The next edit goes on from "
    "the last one's, which still hold them: undo the later edits too, and apply their facts again, to be rid of them."
)
_VERSION = "1"
_ROLES = ({"left", "differences", "facts"}, {"gram", "moment", "n_rows"}, {"moment", "n_rows"})


@dataclass(frozen=True)
class Rows:
    """The rows of one layer's least squares that an edit's facts gave, in their own precision, on the CPU.

    Attributes:
        left: (n, key_size), what the aggregation takes as its left factor: the keys.
        differences: (n, value_size), the value differences.
        facts: (n,), int64: which of the facts that the edit keeps each row is of; -1: one that was streamed.
    """

    left: Tensor
    differences: Tensor
    facts: Tensor


@dataclass(frozen=True)
class Products:
    """What many rows come to, in float64, where that is smaller than the rows: UᵀU and UᵀD.

    Attributes:
        gram: (key_size, key_size); None where the aggregation is a sum, which needs none.
        moment: (key_size, value_size).
        n_rows: how many rows.
    """

    gram: Tensor | None
    moment: Tensor
    n_rows: int


@dataclass
class EditState:
    """What follows the edits.

    Attributes:
        editor: of whom `rows` are (`sequential.editor_fingerprint`), or `statistics` (`sequential.statistics_kind`);
            None: there are neither.
        statistics: running statistics after the edit, by names that their editor chooses. Empty where they are frozen.
        rows: {module name: this edit's own rows}, of an accumulated edit; else empty.
        written: {module name: (n, key_size)}, the keys that this edit's own facts were written at; empty where later
            edits need not know them.
        solved_with: how many facts earlier edits had written whose rows were solved together with these.
    """

    editor: str | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows | Products] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    solved_with: int = 0

    def __bool__(self) -> bool:
        return bool(self.statistics or self.rows or self.written)

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` into an edit's folder; without any state, remove what another edit has left."""
        if not self:
            (folder / STATE_FILE).unlink(missing_ok=True)
            return
        tensors = {f"statistics/{name}": tensor for name, tensor in self.statistics.items()}
        tensors |= {f"written/{name}": keys for name, keys in self.written.items()}
        for name, rows in self.rows.items():
            for role, value in vars(rows).items():
                if value is not None:
                    tensors[f"rows/{name}/{role}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        packed = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": "pt", "version": _VERSION, "editor": self.editor or ""}
        metadata |= {"solved_with": str(self.solved_with)} if self.solved_with else {}
        save_file(packed, folder / STATE_FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path) -> "EditState":
        """The state in an edit's folder; an empty one where there is none.

        Raises:
            ModelMismatchError: the file holds something else, or a state of a newer version.
            CheckpointError: it is no sound safetensors file.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            return cls()
        read_header(path)  # names the file and what is wrong with it, as the library would not
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
        if metadata.get("version") != _VERSION:
            raise ModelMismatchError(
                f"{path} has version {metadata.get('version')}, and this version of hf_malmen reads {_VERSION}. "
                "Upgrade: pip install -U hf_malmen."
            )
        statistics: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            module, _, role = rest.rpartition("/")
            if kind == "statistics":
                statistics[rest] = tensor
            elif kind == "written":
                written[rest] = tensor
            elif kind == "rows":
                parts.setdefault(module, {})[role] = tensor
            else:
                raise ModelMismatchError(f"{path} holds {name}, which belongs to no state of an edit. {DAMAGED}")
        rows = {module: _parse(roles, module, path) for module, roles in sorted(parts.items())}
        solved_with = metadata.get("solved_with", "0")
        if not solved_with.isdecimal():
            raise ModelMismatchError(f"{path} says that its rows were solved with {solved_with!r} facts. {DAMAGED}")
        return cls(metadata.get("editor") or None, statistics, rows, written, int(solved_with))

    def then(self, other: "EditState", n_facts: int) -> "EditState":
        """The state of one edit that does what this one's and, after it, `other`'s do.

        Args:
            n_facts: how many facts the first edit keeps; the second one's are numbered from there on.
        """
        rows: dict[str, Rows | Products] = {}
        if self.rows.keys() == other.rows.keys() and self.editor == other.editor:  # else it is not accumulated
            rows = {name: _joined(own, other.rows[name], n_facts) for name, own in self.rows.items()}
        statistics = dict(other.statistics or self.statistics)
        first = bool(rows) or not other.statistics  # whose `editor` it is
        editor = (self if first else other).editor if rows or statistics else None
        # Of the second one's, the first one's facts are now its own.
        solved_with = max(self.solved_with, other.solved_with - n_facts) if rows else 0
        return EditState(editor, statistics, rows, all_written([self, other]), solved_with)


def state_has(folder: Path, part: str) -> bool:
    """Whether the state of the edit in a folder has `"rows"`, as accumulated ones have, or `"statistics"`; unread.

    Raises:
        CheckpointError: its state is no sound safetensors file.
    """
    path = folder / STATE_FILE
    return path.is_file() and any(name.startswith(f"{part}/") for name in read_header(path))


def all_written(states: Iterable[EditState]) -> dict[str, Tensor]:
    """The keys of the facts of several edits, the first one's first: {module name: (n, key_size)}."""
    parts: dict[str, list[Tensor]] = {}
    for state in states:
        for name, keys in state.written.items():
            parts.setdefault(name, []).append(keys)
    return {name: torch.cat(keys) for name, keys in parts.items()}


class RowCollector:
    """Collects the rows of one layer, and keeps the smaller of the two: themselves, or what they come to.

    Args:
        aggregation: `"least_squares"` or `"sum"`.
    """

    def __init__(self, aggregation: str) -> None:
        self._with_gram = aggregation != "sum"
        self._kept: list[Rows] = []
        self._n_kept = 0
        self._products: Products | None = None

    def add(
        self,
        left: Tensor,  # (n, key_size)
        differences: Tensor,  # (n, value_size)
        facts: Tensor,  # (n,), int64
    ) -> None:
        """Take in rows; see `Rows`."""
        self._kept.append(Rows(left.detach().cpu(), differences.detach().cpu(), facts.cpu()))
        self._n_kept += len(left)
        if self._is_better_folded():
            self._fold()

    def pool(self) -> None:
        """Put the rows of all processes together. Each has added some last, if only (0, ...) ones."""
        if distributed.n_processes() == 1:
            return
        self._n_kept = sum(distributed.counts(self._n_kept))
        if any(distributed.counts(self._products is not None)) or self._is_better_folded():
            self._fold()
            own = self._products
            assert own is not None  # for the type checker: set in _fold
            gram = None if own.gram is None else distributed.add_up(own.gram)
            self._products = Products(gram, distributed.add_up(own.moment), sum(distributed.counts(own.n_rows)))
        else:
            mine = vars(_stacked(self._kept)).values()
            self._kept = [Rows(*(torch.cat(distributed.gather_rows(tensor)) for tensor in mine))]

    def collected(self) -> Rows | Products:
        """All of them. There must be some."""
        if self._products is None:
            return _stacked(self._kept)
        if self._kept:
            self._fold()
        return self._products

    def _is_better_folded(self) -> bool:
        """Whether what the rows come to is smaller than they are."""
        left, differences = self._kept[-1].left, self._kept[-1].differences
        n_values = left.shape[1] * (left.shape[1] * self._with_gram + differences.shape[1])
        return self._n_kept * (left.shape[1] + differences.shape[1]) * left.element_size() > n_values * 8

    def _fold(self) -> None:
        products = _multiplied(_stacked(self._kept), self._with_gram)
        self._products = products if self._products is None else _added(self._products, products)
        self._kept, self._n_kept = [], 0


def _stacked(parts: list[Rows]) -> Rows:
    return Rows(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


def _multiplied(rows: Rows, with_gram: bool) -> Products:
    left, differences = rows.left.double(), rows.differences.double()
    return Products(left.T @ left if with_gram else None, left.T @ differences, len(left))


def _joined(first: Rows | Products, second: Rows | Products, n_facts: int) -> Rows | Products:
    if isinstance(first, Rows) and isinstance(second, Rows):
        facts = torch.cat((first.facts, torch.where(second.facts < 0, -1, second.facts + n_facts)))
        return Rows(torch.cat((first.left, second.left)), torch.cat((first.differences, second.differences)), facts)
    with_gram = any(isinstance(part, Products) and part.gram is not None for part in (first, second))
    one, two = (_multiplied(part, with_gram) if isinstance(part, Rows) else part for part in (first, second))
    return _added(one, two)


def _added(first: Products, second: Products) -> Products:
    gram = None if first.gram is None or second.gram is None else first.gram + second.gram
    return Products(gram, first.moment + second.moment, first.n_rows + second.n_rows)


def _parse(roles: Mapping[str, Tensor], module: str, path: Path) -> Rows | Products:
    """The rows of one module from what its file holds.

    Raises:
        ModelMismatchError: that is something else.
    """
    shapes = {role: tuple(tensor.shape) for role, tensor in roles.items()}
    dims = {role: tensor.dim() for role, tensor in roles.items()}
    expected = {"left": 2, "differences": 2, "facts": 1, "gram": 2, "moment": 2, "n_rows": 0}
    sound = set(roles) in _ROLES and all(dims[role] == expected[role] for role in roles)
    if sound and "left" in roles:
        sound = len({len(tensor) for tensor in roles.values()}) == 1 and roles["facts"].dtype == torch.int64
        sound = sound and roles["left"].is_floating_point() and roles["differences"].dtype == roles["left"].dtype
        if sound:
            return Rows(roles["left"], roles["differences"], roles["facts"])
    elif sound:
        gram, moment = roles.get("gram"), roles["moment"]
        sound = moment.dtype == torch.float64 and roles["n_rows"].dtype == torch.int64
        sound = sound and (gram is None or (gram.dtype == torch.float64 and gram.shape == (len(moment), len(moment))))
        if sound:
            return Products(gram, moment, int(roles["n_rows"]))
    raise ModelMismatchError(f"{path} holds {shapes} for {module}, which are no rows of an edit. {DAMAGED}")
