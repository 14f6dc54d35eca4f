"""Keeping the solve within a given memory: layers in groups, and what the later groups need on disk meanwhile."""

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from accelerate.utils import convert_file_size_to_int
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .tracing import Trace

logger = logging.get_logger(__name__)

_KEYS, _GRADIENTS = ":keys", ":value_gradients"
# Of the free space of the temporary folder, how much may be taken: others write there too.
_SHARE_OF_DISK = 0.8

Traces = Iterator[Mapping[str, Trace]]  # one mapping a batch


def parse_memory(max_memory: int | str | None) -> int | None:
    """A number of bytes, or a text such as `"8GiB"` or `"500MB"`, as bytes.

    Raises:
        ValueError: it is neither, or not above 0.
    """
    if max_memory is None:
        return None
    size = 0
    if isinstance(max_memory, int) and not isinstance(max_memory, bool):
        size = max_memory
    elif isinstance(max_memory, str):
        with suppress(ValueError):
            size = int(max_memory) if max_memory.strip().isdecimal() else convert_file_size_to_int(max_memory)
    if size <= 0:
        raise ValueError(
            f"max_memory is {max_memory!r}; expected a number of bytes above 0, or a text such as '8GiB' or '500MB'."
        )
    return size


def plan_groups(sizes: Mapping[str, int], max_memory: int | None) -> list[list[str]]:
    """The layers in their order, in as few groups as hold no more than `max_memory` each.

    Args:
        sizes: {module name: bytes that its solve takes}.
        max_memory: bytes; None for no limit.

    Raises:
        ValueError: one layer takes more by itself.
    """
    if max_memory is None:
        return [list(sizes)]
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > max_memory:
            raise ValueError(
                f"The least squares of {name} takes {size / 2**30:.3g} GiB, and max_memory is "
                f"{max_memory / 2**30:.3g} GiB. Layers are solved one at a time if they must be, but not in parts: "
                f"give max_memory={size} or more, or edit fewer facts at once."
            )
        if not groups or size > room:
            groups.append([])
            room = max_memory
        groups[-1].append(name)
        room -= size
    return groups


def traces_by_group(
    groups: Sequence[Sequence[str]], trace: Callable[[Sequence[str]], Traces], n_bytes: int
) -> Generator[tuple[list[str], Traces], None, None]:
    """Each group of layers with the traces of all facts, one group after the other.

    With several groups, the language model runs once, and keys and value gradients of the later groups wait on disk as
    safetensors in a temporary folder: a fact's rows are some hundred kB for a 7B model, a millisecond of a disk's time,
    and its passes are some 10¹¹ operations, at least as much of a GPU's time and seconds of a CPU's. Where the folder
    has no room (`TMPDIR` sets it), the language model runs again for each group. The traces are the same either way.

    Args:
        groups: of module names. Each group's traces are consumed before the next group is asked for.
        trace: a pass over all facts that traces these modules.
        n_bytes: the most that the traces of all groups but the first take.
    """
    if len(groups) == 1:
        yield list(groups[0]), trace(groups[0])
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if n_bytes > _SHARE_OF_DISK * free:
        logger.warning(
            f"Tracing again for each of {len(groups)} groups of layers: keeping what was traced takes up to "
            f"{n_bytes / 2**30:.3g} GiB, and {tempfile.gettempdir()} has {free / 2**30:.3g} GiB left. Set TMPDIR to a "
            "folder with more room to trace once."
        )
        for names in groups:
            yield list(names), trace(names)
        return
    with tempfile.TemporaryDirectory(prefix="hf_malmen-") as folder:
        spill = _Spill(Path(folder), [name for names in groups[1:] for name in names])
        yield list(groups[0]), spill.written(trace([name for names in groups for name in names]))
        for names in groups[1:]:
            yield list(names), spill.read(names)


class _Spill:
    """Traces of some layers on disk, one file a batch."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.n_batches = 0

    def written(self, traces: Traces) -> Traces:
        """The traces of the other layers, while those of these layers are written."""
        for traced in traces:
            tensors = {}
            for name in self.names:
                tensors[name + _KEYS] = traced[name].keys.cpu().contiguous()
                tensors[name + _GRADIENTS] = traced[name].value_gradients.cpu().contiguous()
            save_file(tensors, self._file(self.n_batches))
            self.n_batches += 1
            yield {name: entry for name, entry in traced.items() if name not in self.names}

    def read(self, names: Sequence[str]) -> Traces:
        """The traces of some of these layers, batch by batch."""
        for number in range(self.n_batches):
            with safe_open(self._file(number), framework="pt") as file:
                yield {name: Trace(file.get_tensor(name + _KEYS), file.get_tensor(name + _GRADIENTS)) for name in names}

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08}.safetensors"
