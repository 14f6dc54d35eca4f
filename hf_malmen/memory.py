"""Keeping the solve within a given memory: layers in groups, and what the later groups need elsewhere meanwhile."""

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from . import distributed
from .host import free_memory, on_host
from .tracing import Trace

logger = logging.get_logger(__name__)

_KEYS, _GRADIENTS = ":keys", ":value_gradients"
# Of the free space of the temporary folder and of the host's free memory, how much may be taken: others want some too.
_SHARE_OF_DISK = 0.8
_SHARE_OF_HOST = 0.5
# Batches that are under way to where they wait, or back.
_UNDER_WAY = 2

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
    groups: Sequence[Sequence[str]], trace: Callable[[Sequence[str]], Traces], n_bytes: int, device: torch.device
) -> Generator[tuple[list[str], Traces], None, None]:
    """Each group of layers with the traces of all facts, one group after the other.

    With several groups, the language model runs once, and keys and value gradients of the later groups wait, beside a
    GPU in the host's memory if it has room, else on disk, as safetensors in a temporary folder. A fact's rows are some
    hundred kB for a 7B model, a millisecond of a disk's time, and its passes are some 10¹¹ operations: a millisecond of
    a GPU's time, during which the rows of the batch before are copied, and seconds of a CPU's. Where the folder has no
    room either (`TMPDIR` sets it), the language model runs again for each group. The traces are the same in each way.

    Args:
        groups: of module names. Each group's traces are consumed before the next group is asked for.
        trace: a pass over all facts that traces these modules.
        n_bytes: the most that the traces of all groups but the first take.
        device: where the traces are made, and the solve takes place whose memory is limited.
    """
    if len(groups) == 1:
        yield list(groups[0]), trace(groups[0])
        return
    free = shutil.disk_usage(tempfile.gettempdir()).free
    # Processes that act as one each keep all traces: of the host's memory they might take several times that.
    in_memory = device.type != "cpu" and not distributed.in_unison() and n_bytes <= _SHARE_OF_HOST * free_memory()
    if not distributed.agreed(in_memory or n_bytes <= _SHARE_OF_DISK * free):
        logger.warning(
            f"Tracing again for each of {len(groups)} groups of layers: keeping what was traced takes up to "
            f"{n_bytes / 2**30:.3g} GiB, and {tempfile.gettempdir()} has {free / 2**30:.3g} GiB left. Set TMPDIR to a "
            "folder with more room to trace once."
        )
        for names in groups:
            yield list(names), trace(names)
        return
    with tempfile.TemporaryDirectory(prefix="hf_malmen-") as folder:
        later = [name for names in groups[1:] for name in names]
        waiting = _Waiting(later, None if in_memory else Path(folder))
        # Closed before the folder goes: their thread may be writing there.
        with closing(waiting.filled(trace([name for names in groups for name in names]))) as traced:
            yield list(groups[0]), traced
        for names in groups[1:]:
            with closing(waiting.read(names)) as traced:
                yield list(names), traced


class _Waiting:
    """Traces of some layers in the host's memory, or on disk, one file a batch.

    A thread of its own copies, writes and reads them, while the language model runs over the next batches and the rows
    of those before are solved for.

    Args:
        names: of the layers.
        folder: on disk; None: in memory.
    """

    def __init__(self, names: Sequence[str], folder: Path | None) -> None:
        self.names, self.folder = names, folder
        self.n_batches = 0
        self._held: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def filled(self, traces: Traces) -> Generator[Mapping[str, Trace], None, None]:
        """The traces of the other layers, while those of these layers are put to where they wait."""
        under_way: deque[Future[None]] = deque()
        with ThreadPoolExecutor(max_workers=1) as worker:
            for traced in traces:
                tensors = {}
                for name in self.names:
                    for key, rows in ((_KEYS, traced[name].keys), (_GRADIENTS, traced[name].value_gradients)):
                        tensors[name + key] = rows if rows.is_cuda else on_host(rows)
                under_way.append(worker.submit(self._put, self.n_batches, tensors, _done_so_far(tensors)))
                self.n_batches += 1
                if len(under_way) > _UNDER_WAY:
                    under_way.popleft().result()
                yield {name: entry for name, entry in traced.items() if name not in self.names}
            for put in under_way:
                put.result()

    def read(self, names: Sequence[str]) -> Generator[Mapping[str, Trace], None, None]:
        """The traces of some of these layers, batch by batch; in memory they are held no longer."""
        under_way: deque[Future[dict[str, Trace]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as worker:
            for number in range(self.n_batches):
                under_way.append(worker.submit(self._get, number, names))
                if len(under_way) > _UNDER_WAY:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _put(self, number: int, tensors: dict[str, Tensor], done: dict[torch.device, torch.cuda.Event]) -> None:
        """Copy a batch's tensors, apart from what their devices go on with once they are `done`."""
        copies = {}
        for key, tensor in tensors.items():
            with self._apart(tensor.device, done.get(tensor.device)):
                copies[key] = on_host(tensor)
        if self.folder is None:
            self._held |= {f"{number} {key}": copy for key, copy in copies.items()}
        else:
            save_file(copies, self._file(number))

    def _get(self, number: int, names: Sequence[str]) -> dict[str, Trace]:
        if self.folder is None:
            pop = self._held.pop
            return {name: Trace(pop(f"{number} {name}{_KEYS}"), pop(f"{number} {name}{_GRADIENTS}")) for name in names}
        with safe_open(self._file(number), framework="pt") as file:
            return {name: Trace(file.get_tensor(name + _KEYS), file.get_tensor(name + _GRADIENTS)) for name in names}

    def _apart(self, device: torch.device, done: torch.cuda.Event | None) -> AbstractContextManager[object]:
        """A context whose copies wait for `done` and for nothing that came after it."""
        if done is None:
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_event(done)
        return torch.cuda.stream(self._streams[device])

    def _file(self, number: int) -> Path:
        assert self.folder is not None  # for the type checker: asked of traces on disk
        return self.folder / f"{number:08}.safetensors"


def _done_so_far(tensors: Mapping[str, Tensor]) -> dict[torch.device, torch.cuda.Event]:
    """By GPU of these tensors, when all that it was asked to do is done, their values with it."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}
