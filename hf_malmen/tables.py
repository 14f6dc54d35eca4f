"""Values -> Markdown tables. Imports nothing heavy: the cards and the command line are made of these."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRIC_TITLES = {
    "edit_success": "edit success",
    "generalization": "generalization",
    "locality": "locality",
    "unrelated_accuracy": "unrelated accuracy",
}
# Measured where facts have what it takes, or where asked for.
_MORE_TITLES = {name: name for name in ("portability", "efficacy", "paraphrase", "neighborhood")}
# How a metric was taken -> how that is said.
_WAYS = {"": "teacher-forced", "_generated": "generated", "_contained": "contained", "_magnitude": "magnitude"}
_PROBABILITIES = ("efficacy", "paraphrase", "neighborhood")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal. Columns after the first align right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(2, *(len(line[i]) for line in lines)) for i in range(len(header))]
    aligned = [
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [aligned[0], rule, *aligned[1:]])


def scores_table(
    scores_by_size: Mapping[int, Mapping[str, float]], intervals: Mapping[str, tuple[float, float]] | None = None
) -> str:
    """Scores of `EditorModel.evaluate` for several numbers of facts, before and after the edit.

    Args:
        scores_by_size: {number of facts edited at once: scores}.
        intervals: {score: bounds of its 95 % interval}, for a column more.
    """
    rows = []
    for size, scores in scores_by_size.items():
        for name, title in (METRIC_TITLES | _MORE_TITLES).items():
            for suffix, way in _WAYS.items():
                key = name + suffix
                if key in scores:
                    way = "by probability" if name in _PROBABILITIES and not suffix else way
                    row = [f"{title}, {way}", str(size), f"{scores[key + '_before']:.3f}", f"{scores[key]:.3f}"]
                    if intervals is not None:
                        row.append("{:.3f} to {:.3f}".format(*intervals[key]))
                    rows.append(row)
    header = ["metric", "facts", "before", "after"]
    return table(header if intervals is None else [*header, "95 % interval"], rows)


def finite_or_none(value: Any) -> Any:
    """The value, or None for a number that is not finite: JSON has no NaN, and strict readers refuse it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
