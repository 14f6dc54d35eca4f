"""Facts -> token batches.

Where a prompt ends and its target begins is read off the tokenizer's character offsets in the joined text, so special
tokens, merged spaces and chat templates need no special case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .configuration import EditorConfig
from .errors import FactError

# Label of a position that predicts no target token: what PyTorch's cross-entropy ignores.
IGNORED = -100


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with its target, as the model reads it.

    Attributes:
        input_ids: all tokens but the last, which nothing has to follow.
        labels: for each position, the target token it must predict, or `IGNORED`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens up to and including the one that predicts the first target token."""
        first = next(position for position, label in enumerate(self.labels) if label != IGNORED)
        return self.input_ids[: first + 1]

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return tuple(label for label in self.labels if label != IGNORED)


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded to one length.

    Attributes:
        input_ids, attention_mask, labels: (n_sequences, length).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on `device`."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def selected(self, token_selection: str) -> Tensor:  # (n_sequences, length), bool
        """The traced tokens: `"answer"`, those that predict a target token; `"all"`, every unmasked one."""
        return self.labels != IGNORED if token_selection == "answer" else self.attention_mask.bool()


class Tokenizer:
    """Turns prompts and targets into token sequences, in the editor's prompt format.

    Args:
        tokenizer: the base model's.
        config: supplies `prompt_template` or `use_chat_template`.
        max_length: the most tokens the base model reads, or None for no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EditorConfig, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = max_length
        if config.use_chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "EditorConfig.use_chat_template is set, but the tokenizer has no chat template. "
                "Use prompt_template, or a tokenizer that has one."
            )

    def __call__(self, prompt: str, target: str) -> TokenSequence:
        """Tokenise `prompt` followed by `target`.

        Raises:
            FactError: longer than the model reads, or a target that leaves no token of its own.
        """
        text, start = self._join(prompt, target)
        ids, is_target = self._tokenize(text, start)
        if not any(is_target) or is_target[0]:
            raise FactError(
                f"The prompt {prompt!r} with the target {target!r} gives the tokens {ids}, in which the target has no "
                "token that follows a prompt token. Check the tokenizer and the texts."
            )
        labels = [ids[i + 1] if is_target[i + 1] else IGNORED for i in range(len(ids) - 1)]
        if self.max_length is not None and len(labels) > self.max_length:
            raise FactError(
                f"The prompt {prompt[:60]!r}... takes {len(labels)} tokens with its target, and the model reads at "
                f"most {self.max_length}. Shorten it; nothing is truncated silently."
            )
        return TokenSequence(tuple(ids[:-1]), tuple(labels))

    @property
    def pad_token_id(self) -> int:
        """The padding token, or 0: masked positions are never read, so any valid id serves."""
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def pad(self, sequences: Sequence[TokenSequence], side: str | None = None) -> TokenBatch:
        """Stack sequences, padding on `side`, the tokenizer's own by default."""
        length = max(map(len, sequences))
        left = (side or self.tokenizer.padding_side) == "left"

        def stack(rows: list[Sequence[int]], fill: int) -> Tensor:
            padding = [[fill] * (length - len(row)) for row in rows]
            joined = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]
            return torch.tensor(joined, dtype=torch.long)

        return TokenBatch(
            stack([s.input_ids for s in sequences], self.pad_token_id),
            stack([[1] * len(s) for s in sequences], 0),
            stack([s.labels for s in sequences], IGNORED),
        )

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> Iterator[tuple[list[int], TokenBatch]]:
        """All sequences in batches of at most `batch_size`, longest first so that little is padding.

        Yields:
            The positions of the batch's sequences in `sequences`, and the batch.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected a whole number of at least 1.")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, self.pad([sequences[i] for i in chosen])

    def _join(self, prompt: str, target: str) -> tuple[str, int]:
        """The full text, and the character at which what is not the prompt begins."""
        if self.config.use_chat_template:
            user = {"role": "user", "content": prompt}
            messages = [user, {"role": "assistant", "content": target.strip()}]
            text = self._render(messages, continue_final_message=True)
            return text, len(text) - len(target.strip())
        if self.config.prompt_template is not None:
            # Not `format`: a template may hold other braces, such as those of JSON, and so may a prompt.
            prompt = self.config.prompt_template.replace("{prompt}", prompt)
        # The space belongs to the target: byte-level tokenizers merge it into the target's first token. Trailing
        # space in the prompt would split that token in two, which models have hardly seen.
        stripped = prompt.rstrip(" ")
        separator = "" if stripped.endswith(("\n", "\t")) else " "
        return stripped + separator + target.strip(), len(stripped)

    def _render(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        assert isinstance(text, str)  # for the type checker: tokenize=False returns text
        return text

    def _tokenize(self, text: str, start: int) -> tuple[list[int], list[bool]]:
        """Token ids of `text`, and for each whether it reaches past character `start`."""
        special = not self.config.use_chat_template  # a chat template writes its special tokens itself
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            ids, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
            # Special tokens span nothing, so they are never part of the target, wherever they stand.
            is_target = [end > begin and end > start for begin, end in spans]
        else:
            ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            prompt = list(self.tokenizer(text[:start], add_special_tokens=special)["input_ids"])
            shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
            is_target = [i >= shared and token not in self.tokenizer.all_special_ids for i, token in enumerate(ids)]
        last = max((i for i, flag in enumerate(is_target) if flag), default=len(ids) - 1)
        return ids[: last + 1], is_target[: last + 1]  # without what a tokenizer appends, such as an end token
