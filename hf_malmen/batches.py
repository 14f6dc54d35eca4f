"""Facts -> token batches.

Where a prompt ends and its target begins is read off the tokenizer's character offsets in the joined text, so special
tokens, merged spaces and chat templates need no special case.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .configuration import EditorConfig
from .errors import FactError
from .facts import Fact
from .tasks import Classes

# Label of a position that answers nothing: what PyTorch's cross-entropy ignores.
IGNORED = -100


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with its target, as the model reads it.

    Attributes:
        input_ids: what the model, or its encoder, reads. A causal language model reads the target too, all but its last
            token, which nothing has to follow.
        labels: what each position must answer with, or `IGNORED`: of the decoder's positions where there is a decoder
            of its own, else of those of `input_ids`. A target token; or the class, at the token that its head reads.
        decoder_input_ids: what the decoder of an encoder-decoder reads; else empty.
        subject: position in `input_ids` of the last token of the fact's subject, where that was asked for.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    decoder_input_ids: tuple[int, ...] = ()
    subject: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens up to and including the one that predicts the first target token; of an encoder, all it reads."""
        if self.decoder_input_ids:
            return self.input_ids
        first = next(position for position, label in enumerate(self.labels) if label != IGNORED)
        return self.input_ids[: first + 1]

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens; of a classifier, the class."""
        return tuple(label for label in self.labels if label != IGNORED)


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded to one length.

    Attributes:
        input_ids, attention_mask: (n_sequences, length).
        labels: (n_sequences, length), or of the decoder's length where there is one.
        decoder_input_ids, decoder_attention_mask: (n_sequences, decoder length) of an encoder-decoder, else None. The
            two lengths differ.
        subject: (n_sequences, length), bool: the last token of each subject; None where it was not asked for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None
    subject: Tensor | None = None

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on `device`; as it is for "meta", where a model says it is whose weights are offloaded."""
        if torch.device(device).type == "meta":
            return self
        tensors = (
            self.input_ids,
            self.attention_mask,
            self.labels,
            self.decoder_input_ids,
            self.decoder_attention_mask,
            self.subject,
        )
        moved: list[Any] = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return TokenBatch(*moved)

    def selected(self, token_selection: str) -> Tensor:  # (n_sequences, length), bool
        """The traced tokens of `input_ids`.

        `"answer"`: those that predict a target token, or that the class is read off; of an encoder, every unmasked one.
        `"all"`: every unmasked one. `"subject"`: the last one of each subject.
        """
        if token_selection == "subject":
            assert self.subject is not None  # for the type checker: `Tokenizer.edit` marks it
            return self.subject
        if token_selection == "answer" and self.decoder_input_ids is None:
            return self.labels != IGNORED
        return self.attention_mask.bool()

    def has_side(self, shape: Sequence[int]) -> bool:
        """Whether what a module saw, in this shape but for features, can be all tokens of a side of this batch.

        Of an encoder-decoder rows alone do not tell: an expert may be sent as many tokens as the other side has.
        """
        if self.decoder_input_ids is None:
            return True
        return tuple(shape) in (tuple(self.input_ids.shape), tuple(self.decoder_input_ids.shape))

    def traced_rows(self, token_selection: str, n_rows: int) -> Tensor | None:  # (n_rows,), bool
        """Which of the `n_rows` rows that a module saw of this batch are traced tokens; None if it saw something else.

        How many there are says what they are, since the two sides of an encoder-decoder never have one length: every
        token of a side, padding included; one a sequence, as heads see that pool; or the unmasked tokens, as where
        attention runs without padding.
        """
        mask, selected = self.attention_mask.bool(), self.selected(token_selection)
        if n_rows == mask.numel():
            return selected.flatten()
        if self.decoder_attention_mask is not None:
            decoder_mask = self.decoder_attention_mask.bool()
            return decoder_mask.flatten() if n_rows == decoder_mask.numel() else None
        if n_rows == len(mask):
            return mask.any(dim=1)
        return selected[mask] if n_rows == int(mask.sum()) else None

    def traced_counts(self, token_selection: str, n_rows: int) -> list[int]:
        """How many of the traced rows, as `traced_rows` gives them, belong to each sequence."""
        mask, traced = self.attention_mask.bool(), self.traced_rows(token_selection, n_rows)
        assert traced is not None  # for the type checker: `trace` has refused such a module
        owners = torch.arange(len(mask), device=mask.device)
        if n_rows != len(owners):
            if n_rows == mask.numel():
                owners = owners.repeat_interleave(mask.shape[1])
            elif self.decoder_attention_mask is not None:
                owners = owners.repeat_interleave(self.decoder_attention_mask.shape[1])
            else:
                owners = owners.repeat_interleave(mask.sum(1))
        return torch.bincount(owners[traced], minlength=len(mask)).tolist()


def find_subject(text: str, subject: str, begin: int = 0, end: int | None = None) -> int:
    """Where in the prompt text[begin:end] `subject` stands last.

    What is part of a longer word, as Niger is of Nigeria, is taken only where there is nothing else, and other letter
    case only where there is none of the same.

    Raises:
        FactError: the prompt does not contain the subject.
    """
    prompt = text[begin:end]
    pattern = f"(?={re.escape(subject)})"  # of two that overlap both count
    found = [[match.start() for match in re.finditer(pattern, prompt, flags)] for flags in (0, re.IGNORECASE)]
    whole = [[at for at in places if _is_whole(prompt, at, at + len(subject))] for places in found]
    places = next(filter(None, [*whole, *found]), None)
    if places is None:
        raise FactError(
            f"The subject {subject!r} does not occur in the prompt {prompt!r}. Give the subject as the prompt "
            "spells it, or the prompt with its subject."
        )
    return begin + places[-1]


def _is_whole(text: str, begin: int, end: int) -> bool:
    """Whether text[begin:end] is no part of a longer word.

    Words are told by letters that have case, and digits: other scripts write what follows a name, or all, in one.
    """

    def runs_on(at: int) -> bool:
        return 0 < at < len(text) and all(c.isdigit() or c.lower() != c.upper() for c in text[at - 1 : at + 1])

    return not runs_on(begin) and not runs_on(end)


class Tokenizer:
    """Turns prompts and targets into token sequences, in the editor's prompt format.

    Args:
        tokenizer: the base model's.
        config: supplies `task_type`, and `prompt_template` or `use_chat_template`.
        max_length: the most tokens the base model reads, or None for no limit.
        decoder_start_token_id: what the decoder of an encoder-decoder reads first.
        classes: those of a sequence classifier.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: EditorConfig,
        max_length: int | None = None,
        *,
        decoder_start_token_id: int | None = None,
        classes: Classes | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = max_length
        self.decoder_start_token_id = decoder_start_token_id
        self.classes = classes
        self._encode = lru_cache(maxsize=4)(
            self._encode_anew
        )  # as a fact's subject is looked for in the text just read
        if config.use_chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "EditorConfig.use_chat_template is set, but the tokenizer has no chat template. "
                "Use prompt_template, or a tokenizer that has one."
            )
        if config.traced_tokens == "subject" and config.task_type != "CAUSAL_LM":
            raise ValueError(
                f"EditorConfig.token_selection is 'subject', which is for causal language models, and task_type is "
                f"{config.task_type!r}. Use token_selection='answer' or 'all'."
            )

    def edit(self, fact: Fact) -> TokenSequence:
        """Tokenise what `fact` edits: its prompt and target, with its subject marked where subjects are traced.

        Raises:
            FactError: as of a call; or the subject is needed, and missing or not in the prompt.
        """
        sequence = self(fact.prompt, fact.target)
        if self.config.traced_tokens != "subject":
            return sequence
        if not fact.subject:
            raise FactError(
                f"The fact {fact.prompt!r} has no subject, and this editor traces subjects (token_selection='subject')"
                ". Add the subject, as it stands in the prompt."
            )
        return replace(sequence, subject=self.subject_position(fact.prompt, fact.target, fact.subject))

    def __call__(self, prompt: str, target: str) -> TokenSequence:
        """Tokenise a prompt and its target.

        Raises:
            FactError: longer than the model reads, a target that leaves no token of its own, or one that is no class.
        """
        if self.config.task_type == "SEQ_2_SEQ_LM":
            sequence = self._answered(prompt, target)
        elif self.config.task_type == "SEQ_CLS":
            sequence = self._classified(prompt, target)
        else:
            sequence = self._continued(prompt, target)
        length = max(len(sequence.input_ids), len(sequence.decoder_input_ids))
        if self.max_length is not None and length > self.max_length:
            raise FactError(
                f"The prompt {prompt[:60]!r}... takes {length} tokens with its target, and the model reads at "
                f"most {self.max_length}. Shorten it; nothing is truncated silently."
            )
        return sequence

    def _continued(self, prompt: str, target: str) -> TokenSequence:
        """For a causal language model: the prompt, followed by its target."""
        text, start = self._join(prompt, target)
        ids, is_target = self._tokenize(text, start)
        if not any(is_target) or is_target[0]:
            raise FactError(
                f"The prompt {prompt!r} with the target {target!r} gives the tokens {ids}, in which the target has no "
                "token that follows a prompt token. Check the tokenizer and the texts."
            )
        labels = [ids[i + 1] if is_target[i + 1] else IGNORED for i in range(len(ids) - 1)]
        return TokenSequence(tuple(ids[:-1]), tuple(labels))

    def _answered(self, prompt: str, target: str) -> TokenSequence:
        """For an encoder-decoder: the prompt for the encoder; for the decoder the target, shifted right by one.

        A special token that the tokenizer puts before the target is read by the decoder and not asked of it, and one
        after it, such as an end token, is neither.
        """
        if self.decoder_start_token_id is None:
            raise ValueError(
                "An encoder-decoder needs the token that its decoder starts with, and its configuration names none. "
                "Set model.config.decoder_start_token_id (for T5, to tokenizer.pad_token_id)."
            )
        ids, is_target = self._tokenize(target.strip(), -1)  # also a space that the tokenizer puts first
        if not any(is_target):
            raise FactError(f"The target {target!r} gives the tokens {ids}, none of them its own. Check the tokenizer.")
        labels = [token if flag else IGNORED for token, flag in zip(ids, is_target, strict=True)]
        return TokenSequence(self._prompt_ids(prompt), tuple(labels), (self.decoder_start_token_id, *ids[:-1]))

    def _classified(self, prompt: str, target: str) -> TokenSequence:
        """For a sequence classifier: the prompt, and the class at the token that the head reads."""
        if self.classes is None:
            raise ValueError("A classifier's facts need its classes. Use EditorModel.tokenizer_for(model, tokenizer).")
        ids = self._prompt_ids(prompt)
        position = self.classes.position(ids)
        labels = [IGNORED] * len(ids)
        labels[position] = self.classes.index(target)
        return TokenSequence(ids, tuple(labels))

    def subject_position(self, prompt: str, target: str, subject: str, end: int | None = None) -> int:
        """Which token of `self(prompt, target)`, a causal model's, is the last one of `subject`.

        The second token where the subject is nothing but the first: a first token sees no other, and many models make
        it a sink of attention that is the same for every text.

        Args:
            prompt, target: as for a call.
            subject: which of several occurrences, says `find_subject`.
            end: the character of `prompt` behind the subject, where that is known.

        Raises:
            FactError: the prompt does not contain the subject, or is nothing but a first token.
        """
        text, start = self._join(prompt, target)
        asked = prompt.strip()
        begin = text.rfind(asked, 0, start)
        if begin >= 0 and end is not None:
            stop = begin + end - (len(prompt) - len(prompt.lstrip()))
        else:
            wanted = (subject if end is None else prompt[:end]).strip()
            # All of it where a template changes the prompt.
            place = (0, start) if begin < 0 else (begin, min(begin + len(asked), start))
            stop = find_subject(text, wanted, *place) + len(wanted)
        # Tokens that hold the subject's last character and nothing behind it: several, where each has some of its
        # bytes. Or else the first that holds it.
        reached, passed = (self._tokenize(text, end)[1] for end in (stop - 1, stop))
        own = [i for i, (is_on, is_behind) in enumerate(zip(reached, passed, strict=False)) if is_on and not is_behind]
        position = own[-1] if own else reached.index(True)
        if position == 0:
            position = 1
            if self._tokenize(text, start)[1][position]:
                raise FactError(
                    f"The prompt {prompt!r} is one token, the first that the model reads, where nothing can be written "
                    "about its subject alone: many models make it the same for every text. Give a longer prompt, or "
                    "set EditorConfig.prompt_template."
                )
        return position

    @property
    def pad_token_id(self) -> int:
        """The padding token, or 0: masked positions are never read, so any valid id serves.

        A classifier's own, where its head finds the last token by what is not padding.
        """
        if self.classes is not None and self.classes.pad_token_id is not None:
            return self.classes.pad_token_id
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def pad(self, sequences: Sequence[TokenSequence], side: str = "right") -> TokenBatch:
        """Stack sequences, padding on `side`.

        On the right every model counts its positions as it does without padding, whatever its tokenizer prefers; the
        left is for generation.
        """
        length = max(map(len, sequences))

        def stack(rows: Sequence[Sequence[int]], fill: int, length: int = length) -> Tensor:
            padding = [[fill] * (length - len(row)) for row in rows]
            joined = [[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]
            return torch.tensor(joined, dtype=torch.long)

        ids, labels = [s.input_ids for s in sequences], [s.labels for s in sequences]
        mask = stack([[1] * len(s) for s in sequences], 0)
        if not sequences[0].decoder_input_ids:
            marked = [[int(i == s.subject) for i in range(len(s))] for s in sequences if s.subject is not None]
            subject = stack(marked, 0).bool() if marked else None
            return TokenBatch(stack(ids, self.pad_token_id), mask, stack(labels, IGNORED), subject=subject)
        decoder_ids = [s.decoder_input_ids for s in sequences]
        decoder_length = max(map(len, decoder_ids))
        decoder_length += decoder_length == length  # by which a module's rows tell its side
        return TokenBatch(
            stack(ids, self.pad_token_id),
            mask,
            stack(labels, IGNORED, decoder_length),
            stack(decoder_ids, self.pad_token_id, decoder_length),
            stack([[1] * len(row) for row in decoder_ids], 0, decoder_length),
        )

    def batches(
        self, sequences: Sequence[TokenSequence], batch_size: int, pass_cost: int | None = None
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """All sequences in batches of at most `batch_size`, longest first so that little is padding.

        Args:
            sequences: in any order.
            batch_size: the most of them a batch.
            pass_cost: how many tokens one more pass takes as long as. Batches are then cut where padding and passes
                together cost least; None fills them.

        Yields:
            The positions of the batch's sequences in `sequences`, and the batch.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a whole number of at least 1.")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        lengths = [len(sequences[i]) for i in order]
        for start, stop in _cuts(lengths, batch_size, pass_cost):
            chosen = order[start:stop]
            yield chosen, self.pad([sequences[i] for i in chosen])

    def _join(self, prompt: str, target: str) -> tuple[str, int]:
        """The full text, and the character at which what is not the prompt begins."""
        if self.config.use_chat_template:
            user = {"role": "user", "content": prompt}
            messages = [user, {"role": "assistant", "content": target.strip()}]
            text = self._render(messages, continue_final_message=True)
            return text, len(text) - len(target.strip())
        prompt = self._in_template(prompt)
        # The space belongs to the target: byte-level tokenizers merge it into the target's first token. Trailing
        # space in the prompt would split that token in two, which models have hardly seen.
        stripped = prompt.rstrip(" ")
        separator = "" if stripped.endswith(("\n", "\t")) else " "
        return stripped + separator + target.strip(), len(stripped)

    def _prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that no target follows, with the special tokens of a whole text."""
        if self.config.use_chat_template:
            text = self._render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        else:
            text = self._in_template(prompt)
        ids = tuple(self.tokenizer(text, add_special_tokens=not self.config.use_chat_template)["input_ids"])
        if not ids:
            raise FactError(f"The prompt {prompt!r} gives no tokens. Check the tokenizer and the text.")
        return ids

    def _in_template(self, prompt: str) -> str:
        # Not `format`: a template may hold other braces, such as those of JSON, and so may a prompt.
        template = self.config.prompt_template
        return prompt if template is None else template.replace("{prompt}", prompt)

    def _render(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        assert isinstance(text, str)  # for the type checker: tokenize=False returns text
        return text

    def _encode_anew(self, text: str) -> BatchEncoding:
        special = not self.config.use_chat_template  # a chat template writes its special tokens itself
        wanted = ("return_offsets_mapping", "return_special_tokens_mask") if self.tokenizer.is_fast else ()
        return self.tokenizer(text, add_special_tokens=special, **dict.fromkeys(wanted, True))

    def _tokenize(self, text: str, start: int) -> tuple[list[int], list[bool]]:
        """Token ids of `text`, and for each whether it reaches past character `start` (-1: all but special ones)."""
        encoded = self._encode(text)
        ids = list(encoded["input_ids"])
        if self.tokenizer.is_fast:
            # What the tokenizer adds is never part of the target, wherever it stands. An empty span does not tell: a
            # token that is a space has one too, behind the space, where offsets leave spaces out, as Llama 3's do.
            spans, added = encoded["offset_mapping"], encoded["special_tokens_mask"]
            is_target = [end > start and not flag for (_, end), flag in zip(spans, added, strict=True)]
        else:
            prompt = list(self._encode(text[: max(start, 0)])["input_ids"])
            shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
            is_target = [i >= shared and token not in self.tokenizer.all_special_ids for i, token in enumerate(ids)]
        last = max((i for i, flag in enumerate(is_target) if flag), default=len(ids) - 1)
        return ids[: last + 1], is_target[: last + 1]  # without what a tokenizer appends, such as an end token


def _cuts(lengths: Sequence[int], batch_size: int, pass_cost: int | None) -> list[tuple[int, int]]:
    """Start and end of every batch of sequences of these lengths, longest first."""
    n = len(lengths)
    if pass_cost is None:
        return [(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    # The cheapest way to have dealt with the first `stop` sequences ends with a batch from `starts[stop]` on.
    costs, starts = [0] * (n + 1), [0] * (n + 1)
    for stop in range(1, n + 1):
        options = ((costs[i] + lengths[i] * (stop - i), i) for i in range(max(0, stop - batch_size), stop))
        cheapest, starts[stop] = min(options)
        costs[stop] = cheapest + pass_cost
    cuts = []
    while n:
        cuts.append((starts[n], n))
        n = starts[n]
    return cuts[::-1]
