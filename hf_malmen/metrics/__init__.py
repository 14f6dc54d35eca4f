"""`evaluate` modules. Each folder loads by path: `evaluate.load(str(path_of("locality")))`."""

from pathlib import Path

NAMES = ("edit_success", "generalization", "locality", "unrelated_accuracy")


def path_of(name: str) -> Path:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(NAMES)}.")
    return Path(__file__).parent / name
