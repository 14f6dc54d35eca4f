"""The target weights of a checkpoint as they lie on disk, with its edits in force or before them; and fingerprints."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .mapping import TensorShift, map_shifts
from .records import read_history
from .shards import DTYPES, TensorEntry, raw, read_tensor_index
from .shifts import FactoredShift, Shift


def base_tensors(folder: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint as they were before its edits in force, where they are saved.

    Raises:
        CheckpointError: a damaged record.
    """
    *_, found = _states(folder, tensors)
    return found


def _states(folder: Path, tensors: Mapping[str, TensorEntry]) -> Iterator[dict[str, TensorEntry]]:
    """The tensors of a checkpoint with all edits in force, then with one less each time, down to none."""
    found = dict(tensors)
    yield dict(found)
    for record in reversed(read_history(folder)):
        own = record.tensors_in(tensors)
        originals = record.originals() if own else {}
        found |= {key: originals[key] for key in own}
        yield dict(found)


def fingerprints_of(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    fan_in_fan_out: Iterable[str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[str]:
    """The fingerprints of target weights on disk: with all edits in force, then with one less each time, down to none.

    Args:
        folder: the checkpoint's.
        shapes: {module name: (key_size, value_size)}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        dtypes: {module name: dtype} of a model that is to hold these weights; None: as they are stored.

    Raises:
        CheckpointError, ModelMismatchError: see `checkpoint.write_shifts`.
    """
    tensors = read_tensor_index(folder)
    plan = _places(folder, shapes, fan_in_fan_out, tensors)
    for state in _states(folder, tensors):
        yield stored_fingerprint(plan, state, dtypes)


def fingerprint_before_edits(folder: Path, shapes: Mapping[str, tuple[int, int]], fan_in_fan_out: Iterable[str]) -> str:
    """The last one of `fingerprints_of`, as stored: of the weights before all edits in force."""
    tensors = read_tensor_index(folder)
    return stored_fingerprint(_places(folder, shapes, fan_in_fan_out, tensors), base_tensors(folder, tensors))


def weights_before_edits(
    folder: Path, shapes: Mapping[str, tuple[int, int]], fan_in_fan_out: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The target weights of a checkpoint as they were before its edits in force, one at a time, as they are stored.

    Args:
        folder, shapes, fan_in_fan_out: as in `fingerprints_of`.

    Raises:
        CheckpointError, ModelMismatchError: see `checkpoint.write_shifts`.
    """
    tensors = read_tensor_index(folder)
    flipped = set(fan_in_fan_out)
    plan = _places(folder, shapes, flipped, tensors)
    before = base_tensors(folder, tensors)
    for name, shape in shapes.items():
        keys = [key for key, shift in plan.items() if shift.module == name]
        weight = torch.cat(list(_weight_rows(keys, plan, before)))
        yield name, weight.reshape(shape if name in flipped else shape[::-1])


def _places(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    fan_in_fan_out: Iterable[str],
    tensors: Mapping[str, TensorEntry],
) -> dict[str, TensorShift]:
    """Which tensors hold the target weights: nothing is added by these shifts."""
    nothing: dict[str, Shift] = {
        name: FactoredShift(*(torch.empty(0, size) for size in shape)) for name, shape in shapes.items()
    }
    return map_shifts(folder, nothing, fan_in_fan_out, tensors)


def stored_fingerprint(
    plan: Mapping[str, TensorShift],
    tensors: Mapping[str, TensorEntry],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """The fingerprint of target weights on disk: what `targets.fingerprint` gives for the loaded model.

    Weights that a model holds in float16 are not always the same, rounded to bfloat16, as those they were loaded from;
    `dtypes` rounds as loading did.
    """
    digest = hashlib.sha256()
    pieces: dict[str, list[str]] = {}
    for key, shift in plan.items():
        pieces.setdefault(shift.module, []).append(key)
    for name in sorted(pieces):
        digest.update(name.encode())
        for rows in _weight_rows(pieces[name], plan, tensors):
            digest.update(raw((rows.to(dtypes[name]) if dtypes else rows).to(torch.bfloat16)))
    return digest.hexdigest()


def _weight_rows(
    keys: list[str], plan: Mapping[str, TensorShift], tensors: Mapping[str, TensorEntry]
) -> Iterator[Tensor]:
    if plan[keys[0]].places is not None:
        shape = plan[keys[0]].shift.shape
        whole = torch.empty(shape[0] * shape[1], dtype=DTYPES[tensors[keys[0]].dtype])
        for key in keys:
            places = plan[key].places
            assert places is not None  # for the type checker: all pieces of a weight have places, or none
            whole[places[places >= 0]] = tensors[key].read()[places >= 0].to(whole.dtype)
        yield whole
        return
    entry = tensors[keys[0]]
    step = max(1, 2**21 // max(1, entry.shape[1]))
    with open(entry.file, "rb", buffering=0) as stream:
        for start in range(0, entry.shape[0], step):
            yield entry.rows(stream, start, min(start + step, entry.shape[0]))


def matches(
    folder: Path,
    plan: Mapping[str, TensorShift],
    tensors: Mapping[str, TensorEntry],
    expected: str,
    before_edits: bool,
) -> bool:
    """Whether target weights on disk have a fingerprint.

    Args:
        folder: the checkpoint's.
        plan: which tensors hold the weights.
        tensors: every tensor of the checkpoint.
        expected: the fingerprint.
        before_edits: whether those before some or all of its edits in force may have it instead.

    Raises:
        CheckpointError: a damaged record.
    """
    states = _states(folder, tensors) if before_edits else [tensors]
    return any(stored_fingerprint(plan, state) == expected for state in states)
