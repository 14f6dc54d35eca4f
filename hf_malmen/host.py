"""The memory of the machine that the devices are in: how much of it is free, and copies into it."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

# Where Linux says what a container may take and what it has taken, of either version of control groups.
_CGROUP_FILES = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def on_host(tensor: Tensor) -> Tensor:
    """The values in the host's memory, contiguous; as it is where it is there already.

    From a GPU they come into memory that all threads have touched first. The system gives new memory page by page,
    which for one thread, the copying one, takes several times as long as the copy itself.
    """
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def free_memory() -> int:
    """Bytes of the host's memory that this process may take: what is free, within the limit of its container."""
    free: int = psutil.virtual_memory().available
    for limit, used in _CGROUP_FILES:
        with suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free
