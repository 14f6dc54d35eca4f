"""Classes in columns of `datasets` -> their names, where the rows hold numbers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import FactError


def named(rows: Iterable[Any], features: Any) -> Iterator[Any]:
    """`rows` with the names of classes for their numbers; and None for −1, which stands for none given.

    Args:
        rows: of a data set; what is no mapping goes through as it is.
        features: the data set's `datasets.Features`; None or anything else changes nothing.

    Raises:
        FactError: a number that is none of the classes; names the column.
    """
    for row in rows:
        yield _named(row, features, None)


def _named(value: Any, feature: Any, column: Any) -> Any:
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _named(entry, feature.get(key), key) for key, entry in value.items()}
    if feature is not None and hasattr(value, "tolist"):
        value = value.tolist()  # of a data set whose format is NumPy's or PyTorch's
    if isinstance(value, list) and (of_entries := getattr(feature, "feature", None)) is not None:
        return [_named(entry, of_entries, column) for entry in value]
    if type(feature).__name__ != "ClassLabel" or value is None:  # by name, so that it need not be imported
        return value
    try:
        return feature.int2str(int(value)) if int(value) >= 0 else None
    except ValueError:
        raise FactError(
            f"Column {column!r} has the class {value!r}, and there are {feature.num_classes}: "
            f"{', '.join(feature.names[:10])}{', ...' if feature.num_classes > 10 else ''}. Expected a number from 0 "
            f"to {feature.num_classes - 1}, or -1 for none."
        ) from None
