"""YAML files of settings: read, and every name in them checked."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

# Precisions that a base model is loaded in.
DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number that YAML 1.2 says it is; PyYAML, of 1.1, wants 1.0e-4 and takes it for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]{1,2}$"),
    list("-+.0123456789"),
)


def read_settings(path: str | Path, known: Collection[str], example: str) -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        path: the file.
        known: names of the settings that there are.
        example: a file of this kind, for the error where there is none.

    Raises:
        ValueError: no file, not YAML, not a mapping, or a name that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give the path of a YAML recipe, such as {example}.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected {', '.join(sorted(known))}.")
    require_known(content, known, f"{path}")
    return content


def require_known(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse names that are not known: a typo would otherwise pass unseen.

    Raises:
        ValueError: such a name; says which there are.
    """
    unknown = sorted(set(map(str, given)) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}. Known: {', '.join(sorted(known))}.")


def require_text(given: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse what is no text where one is expected: a list of files, or a name that YAML reads as a number.

    Raises:
        ValueError: such a value.
    """
    for name in names:
        if (value := given.get(name)) is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {value!r}; expected one text, with quotes around a number.")


def refuse_what_is_ignored(training: Mapping[str, Any], where: str, how_to_resume: str) -> None:
    """Refuse fields of `TrainingArguments` that only scripts read, and that a file of settings has no use for.

    Args:
        training: fields with their values.
        where: they stand, for the error.
        how_to_resume: what is to be done instead of giving a checkpoint.

    Raises:
        ValueError: such a field has a value that asks for something.
    """
    if checkpoint := training.get("resume_from_checkpoint"):
        raise ValueError(f"{where}: resume_from_checkpoint is {checkpoint!r}; expected none. {how_to_resume}")
    if (trains := training.get("do_train")) not in (None, True):
        raise ValueError(f"{where}: do_train is {trains!r}; expected none, as training is what these settings are for.")


def field_names(dataclass_type: type) -> set[str]:
    """Names of the fields of a dataclass."""
    return {entry.name for entry in dataclasses.fields(dataclass_type)}
