"""How one answer is scored: the rules that all metrics share; and how sure an average of scores is."""

import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Draws held at once while resampling: 32 MB of 8-byte integers.
_DRAWS = 2**22

_ARTICLES = {"a", "an", "the"}
# A character of a script without spaces: Thai and Lao, Tibetan, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff])"
)


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
    """Words of a text as SQuAD compares them: lower case, without punctuation and articles.

    As MLQA extends it beyond English: punctuation is that of Unicode too, and scripts without spaces are compared by
    character. Characters that are written in several ways (half and full width, composed and not) are one.
    """
    return [word for word in _words(text) if word not in _ARTICLES]


def _words(text: str) -> list[str]:
    """`normalize`, with articles."""
    text = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return _UNSPACED.sub(r" \1 ", kept).split()


def _compared(generated: str, expected: str) -> tuple[list[str], list[str]]:
    """Words of both texts; with articles where the expected answer has nothing else, such as the blood group A."""
    given, wanted = normalize(generated), normalize(expected)
    return (given, wanted) if wanted else (_words(generated), _words(expected))


def answers(generated: str, expected: str) -> float:
    """1.0 if freely generated text opens with the expected answer, word for word, else 0.0.

    A completion goes on after its answer ("Paris. The ..."), so only its first words are compared, as many as the
    expected answer has; "Parisian" does not match "Paris".
    """
    given, wanted = _compared(generated, expected)
    return float(given[: len(wanted)] == wanted if wanted else not given)


def contains(generated: str, expected: str) -> float:
    """1.0 if freely generated text holds the expected answer anywhere, its words side by side, else 0.0.

    Never less than `answers`: "It is Paris" contains "Paris" and does not open with it.
    """
    given, wanted = _compared(generated, expected)
    if not wanted:
        return float(not given)
    return float(any(given[i : i + len(wanted)] == wanted for i in range(len(given))))


def bootstrap_intervals(
    values: npt.NDArray[np.float64],  # (n_facts, n_metrics)
    measured: npt.NDArray[np.bool_ | np.float64],  # (n_facts, n_metrics)
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> npt.NDArray[np.float64]:  # (n_metrics, 2)
    """Percentile bootstrap intervals of the averages over facts.

    A resample draws `n_facts` facts with replacement, each with all its scores, and averages every metric over the
    drawn facts that have it; the interval runs between the two quantiles that leave (1 − level) / 2 of the resamples
    outside each. Only the draw of facts varies: an interval says how far other facts of the same kind may score, not
    what another editor or base model would. Where every fact scores alike it has no width, however few they are.
    Resamples in which no fact has a metric say nothing about it: its interval is of the others, or NaN without any.

    Args:
        values: a score a fact and metric, in any unit.
        measured: which of them there are; the others are ignored. Or how much each weighs in the average, from 0 on.
        n_resamples: resamples. Memory does not grow with them times facts.
        seed: of the draws. The same seed gives the same intervals.
        level: probability mass between the two ends.

    Raises:
        ValueError: no resample; a level that is not between 0 and 1; a metric that no fact has.
    """
    if n_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"n_resamples is {n_resamples} and level {level}; expected at least 1, and a number between 0 and 1."
        )
    weights = measured.astype(np.float64)
    if not weights.any(axis=0).all():
        raise ValueError("A metric was measured of no fact, so there is nothing to resample. Leave its column out.")
    n_facts, n_metrics = values.shape
    generator = np.random.default_rng(seed)
    filled = np.where(weights > 0, values * weights, 0.0)
    sums, counts = np.empty((n_resamples, n_metrics)), np.empty((n_resamples, n_metrics))
    block = max(1, _DRAWS // n_facts)
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        drawn = generator.integers(n_facts, size=(rows, n_facts)) + n_facts * np.arange(rows)[:, None]
        # How often each resample drew each fact turns all averages into one matrix product.
        times = np.bincount(drawn.ravel(), minlength=rows * n_facts).reshape(rows, n_facts).astype(np.float64)
        sums[start : start + rows], counts[start : start + rows] = times @ filled, times @ weights
    tail = (1 - level) / 2
    means = [s[c > 0] / c[c > 0] for s, c in zip(sums.T, counts.T, strict=True)]
    return np.array([np.quantile(m, (tail, 1 - tail)) if len(m) else (np.nan, np.nan) for m in means])
