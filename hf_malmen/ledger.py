"""Which facts are in force: what the edits of a model wrote, and what later ones replaced.

A ledger is read off the edits themselves, oldest first, and kept nowhere else: whatever makes or takes back an edit
leaves it right.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .errors import DAMAGED, CheckpointError
from .facts import Fact
from .shards import parse_json

# What describes an edit in its folder.
EDIT_CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class LedgerEntry:
    """One fact that was written into a model.

    Attributes:
        fact: what was written.
        edit: id of the edit that wrote it: its number on a checkpoint; `"live 1"` and so on for those of a live model.
        index: which of the edit's facts it is.
        replaced_by: id of the edit that wrote its prompt again, with another target or the same; None: it is in force.
    """

    fact: Fact
    edit: str
    index: int
    replaced_by: str | None = None


@dataclass(frozen=True)
class Ledger:
    """What the edits in force on a model wrote.

    Attributes:
        entries: every fact, in the order it was written.
        n_unlisted: facts that were streamed, of which their edits keep no texts. They count as in force, and nothing is
            known to repeat or replace them.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    n_unlisted: int = 0

    @property
    def in_force(self) -> list[LedgerEntry]:
        """The facts that no later one replaced."""
        return [entry for entry in self.entries if entry.replaced_by is None]

    @property
    def replaced(self) -> list[LedgerEntry]:
        """The facts that a later one replaced."""
        return [entry for entry in self.entries if entry.replaced_by is not None]

    def n_replaced_by(self, edit: str) -> int:
        """How many facts that edit replaced, its own repetitions included."""
        return sum(entry.replaced_by == edit for entry in self.entries)

    @property
    def n_in_force(self) -> int:
        """How many facts are in force, those without texts included."""
        return len(self.in_force) + self.n_unlisted

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of all facts."""
        entries = [{**vars(entry), "fact": entry.fact.to_dict()} for entry in self.entries]
        return {"facts": entries, "n_in_force": self.n_in_force, "n_unlisted": self.n_unlisted}


def build_ledger(edits: Iterable[tuple[str, Sequence[Fact], int]], models: Mapping[str, str] | None = None) -> Ledger:
    """The ledger of edits.

    Args:
        edits: (id, facts that it keeps, number of facts that it wrote) of each, oldest first.
        models: {id: which model it is of}, where they are of several, whose facts replace none of each other's.
    """
    entries: list[LedgerEntry] = []
    last: dict[tuple[str, str], int] = {}  # {(model, prompt): where its newest entry is}
    n_unlisted = 0
    for edit, facts, n_facts in edits:
        n_unlisted += max(0, n_facts - len(facts))
        model = (models or {}).get(edit, "")
        for index, fact in enumerate(facts):
            earlier = last.get((model, fact.prompt.strip()))
            if earlier is not None:
                entries[earlier] = replace(entries[earlier], replaced_by=edit)
            last[model, fact.prompt.strip()] = len(entries)
            entries.append(LedgerEntry(fact, edit, index))
    return Ledger(entries, n_unlisted)


class NewFacts:
    """Those of some facts that are not in force already, each once. Iterates anew each time, as the facts do.

    Two facts are the same where prompt and target are, but for white space around them.

    Args:
        facts: checked ones.
        ledger: of the model.
        n_kept: keep so many; beyond them, those that replace a fact in force, which the ledger has to know. None keeps
            all.

    Attributes:
        kept: what the last iteration kept so far.
        n_skipped: facts that it left out so far.
    """

    def __init__(self, facts: Iterable[Fact], ledger: Ledger, n_kept: int | None = None) -> None:
        self._facts = facts
        self._in_force = {_digest(entry.fact) for entry in ledger.in_force}
        self._prompts = {entry.fact.prompt.strip() for entry in ledger.in_force}
        self._n_kept = n_kept
        self.kept: list[Fact] = []
        self.n_skipped = 0

    def __iter__(self) -> Iterator[Fact]:
        self.kept, self.n_skipped = [], 0
        seen = set(self._in_force)
        for fact in self._facts:
            digest = _digest(fact)
            if digest in seen:
                self.n_skipped += 1
                continue
            seen.add(digest)
            if self._n_kept is None or len(self.kept) < self._n_kept or fact.prompt.strip() in self._prompts:
                self.kept.append(fact)
            yield fact


def read_facts(folder: Path) -> list[Fact]:
    """The facts that the edit in a folder keeps; none if the folder describes no edit.

    Raises:
        CheckpointError: its description is damaged.
    """
    path = folder / EDIT_CONFIG_FILE
    if not path.is_file():
        return []
    try:
        return [Fact(**fact) for fact in parse_json(path.read_bytes(), path).get("facts", ())]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe the facts of an edit ({error}). {DAMAGED}") from None


def _digest(fact: Fact) -> bytes:
    """Sixteen bytes for a fact's two texts, so that a stream's need not be held."""
    texts = (text.strip().encode(errors="surrogatepass") for text in (fact.prompt, fact.target))
    return b"".join(blake2b(text, digest_size=8).digest() for text in texts)
