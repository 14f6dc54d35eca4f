"""Classes in columns of `datasets` -> their names, where the rows hold numbers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def named(rows: Iterable[Any], features: Any) -> Iterator[Any]:
    """`rows` with the names of classes for their numbers; and None for −1, which stands for none given.

    Args:
        rows: of a data set; what is no mapping goes through as it is.
        features: the data set's `datasets.Features`; None or anything else changes nothing.
    """
    for row in rows:
        yield _named(row, features)


def _named(value: Any, feature: Any) -> Any:
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _named(entry, feature.get(key)) for key, entry in value.items()}
    if feature is not None and hasattr(value, "tolist"):
        value = value.tolist()  # of a data set whose format is NumPy's or PyTorch's
    if isinstance(value, list) and (of_entries := getattr(feature, "feature", None)) is not None:
        return [_named(entry, of_entries) for entry in value]
    if type(feature).__name__ != "ClassLabel" or value is None:  # by name, so that it need not be imported
        return value
    return feature.int2str(int(value)) if int(value) >= 0 else None
