"""How one answer is scored: the two rules that all metrics share."""

import re
import string
from collections.abc import Sequence


def token_accuracy(
    predicted: Sequence[int],
    expected: Sequence[int],
) -> float:
    """Share of the expected tokens that were predicted, each given the true tokens before it (teacher forcing).

    Raises:
        ValueError: lengths differ, or are 0.
    """
    if len(predicted) != len(expected) or not expected:
        raise ValueError(f"Got {len(predicted)} predicted tokens for {len(expected)} expected; they must be as many.")
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def normalize(text: str) -> list[str]:
    """Words of a text as SQuAD compares them: lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answers(generated: str, expected: str) -> float:
    """1.0 if freely generated text opens with the expected answer, word for word, else 0.0.

    A completion goes on after its answer ("Paris. The ..."), so only its first words are compared, as many as the
    expected answer has; "Parisian" does not match "Paris".
    """
    wanted, given = normalize(expected), normalize(generated)
    return float(given[: len(wanted)] == wanted if wanted else not given)
