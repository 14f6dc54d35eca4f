"""Facts -> token batches, a window at a time, as often as they are needed."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from transformers.utils import logging

from . import distributed
from .batches import TokenBatch, Tokenizer, TokenSequence
from .facts import Fact, FactStream

# Batches that are read ahead, so that those of a batch are of similar length: some MB, whatever the number of facts.
_WINDOW_BATCHES = 64


class FactReader:
    """Reads facts from a list or a stream into batches. Of a stream, no more than a window is held.

    Args:
        facts: checked facts.
        tokenize: the base model's tokenizer.
        n_kept: how many facts of a stream to remember; those of a list are there anyway.

    Attributes:
        n_facts: how many there are; None until a stream that cannot say so has been read.
    """

    def __init__(self, facts: Sequence[Fact] | FactStream, tokenize: Tokenizer, n_kept: int) -> None:
        self.tokenize = tokenize
        self._facts = facts
        self._n_kept = n_kept
        self._first: list[Fact] = []
        self._sequences: list[TokenSequence] | None = None  # of a list, once they were all asked for
        self.n_facts = facts.count() if isinstance(facts, FactStream) else len(facts)

    @property
    def kept(self) -> list[Fact]:
        """All facts of a list; the first ones of a stream that was read."""
        return self._first if isinstance(self._facts, FactStream) else list(self._facts)

    def facts(self) -> Iterator[Fact]:
        """The facts in their order, in a pass of its own."""
        self._first = []
        number = 0
        for number, fact in enumerate(self._facts, 1):
            if number <= self._n_kept:
                self._first.append(fact)
            yield fact
        self.n_facts = number

    def sequences(self) -> Iterator[TokenSequence]:
        """The facts as token sequences, in their order, in a pass of its own."""
        return (self.tokenize.edit(fact) for fact in self.facts())

    def count_rows(self, token_selection: str) -> int:
        """The most rows that tracing all facts gives a layer, in a pass of its own that runs no model.

        The token sequences of a list, whose facts are held anyway, are held from here on.
        """
        if isinstance(self._facts, FactStream):
            return sum(_n_rows(sequence, token_selection) for sequence in self.sequences())
        self._sequences = list(self.sequences())
        return sum(_n_rows(sequence, token_selection) for sequence in self._sequences)

    def batches(self, batch_size: int, device: torch.device, title: str) -> Iterator[TokenBatch]:
        """Batches on `device`, longest first within a window, under a bar with facts a second and the time left.

        Of several processes, each reads all facts, and gets the batches of its share.

        Raises:
            FactError: when it reaches a bad fact.
            ValueError: a batch size below 1.
        """
        if self._sequences is not None:
            sequences = iter(distributed.own(self._sequences))
        else:
            sequences = (self.tokenize.edit(fact) for fact in distributed.own(self.facts()))
        total = None if self.n_facts is None else len(list(distributed.own(range(self.n_facts))))
        with logging.tqdm(total=total, desc=title, unit=" facts", leave=False) as bar:
            while read := list(islice(sequences, max(1, _WINDOW_BATCHES * batch_size))):
                for chosen, batch in self.tokenize.batches(read, batch_size):
                    yield batch.to(device)
                    bar.update(len(chosen))


def _n_rows(sequence: TokenSequence, token_selection: str) -> int:
    if token_selection == "subject":
        return 1
    if sequence.decoder_input_ids:
        return max(len(sequence.input_ids), len(sequence.decoder_input_ids))
    return len(sequence.target_ids) if token_selection == "answer" else len(sequence.input_ids)
