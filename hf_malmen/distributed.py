"""What processes tell each other: the only collective calls, all of them accelerate's.

`accelerate launch` starts the processes, and the first `PartialState` (a trainer's, or the command line's) joins them.
What joins processes here is called by all of them, in the same order; on one process it hands back what it is given.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes, parse_flag_from_env, reduce
from torch import Tensor, nn

from .errors import OtherProcessError

Item = TypeVar("Item")


def join() -> None:
    """Join the processes that a launcher started with this one. Nothing happens without a launcher, or a second time.

    A trainer's arguments do it themselves.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others wait, without a limit of minutes, while the main process writes.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=1))


def in_unison() -> bool:
    """Whether the processes hold the base model together, so that all of them do all of the work: they act as one."""
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return _joined() and any(map(parse_flag_from_env, flags))


def n_processes() -> int:
    """How many processes share the work."""
    # Not `PartialState()` in any case: the first one chooses the device of the whole program, and reading must not.
    return PartialState().num_processes if _joined() and not in_unison() else 1


def process_index() -> int:
    """Which of them this one is."""
    return PartialState().process_index if n_processes() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that counts what must count once."""
    return process_index() == 0


def writes() -> bool:
    """Whether this is the process that writes to disk and to the screen."""
    return not _joined() or PartialState().is_main_process


@contextmanager
def together() -> Iterator[None]:
    """What fails within the context on one process fails on all when it ends, so that none waits for it in vain.

    What joins processes has no place within it.

    Raises:
        OtherProcessError: it failed on another process only.
    """
    if n_processes() == 1:
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        error = sys.exc_info()[1]
        said = gather_object([f"{type(error).__name__}: {error}" if failed else None])
    broken = {index: text for index, text in enumerate(said) if text is not None}
    for index, text in broken.items():
        raise OtherProcessError(f"Process {index} of {n_processes()} failed. {text}")


def agreed(flag: bool) -> bool:
    """What to do, where processes that hold the base model together must all do the same: `flag` if all have it set.

    Of other processes each may choose for itself: its own `flag`.
    """
    return all(gather_object([flag])) if in_unison() else flag


def require_same(value: object, what: str) -> None:
    """Fail on all processes alike where they do not see the same.

    Raises:
        OtherProcessError: they do not.
    """
    values = gather_object([value]) if _joined() else [value]
    if any(other != values[0] for other in values):
        seen = "; ".join(f"{index}: {other}" for index, other in enumerate(values))
        raise OtherProcessError(f"The processes see different {what}, and so cannot work together. {seen}.")


def own(items: Iterable[Item]) -> Iterator[Item]:
    """This process's share of `items`, which all read: one in as many as there are processes."""
    return islice(items, process_index(), None, n_processes())


def gather_items(items: list[Item]) -> list[Item]:
    """The lists of all processes as one, in the order of the processes."""
    gathered: list[Item] = items if n_processes() == 1 else gather_object(items)
    return gathered


def stretch(items: Sequence[Item], weights: Sequence[int]) -> list[Item]:
    """This process's part of `items`, which all hold: neighbours, of about the same weight as every other process's.

    The parts of all processes, one after another, are `items`. A part may be empty.

    Args:
        items: the same on every process.
        weights: what each costs, above 0.
    """
    total, begun = sum(weights), 0
    chosen = []
    for item, weight in zip(items, weights, strict=True):
        # An item is where its middle lies.
        if (2 * begun + weight) * n_processes() // (2 * total) == process_index():
            chosen.append(item)
        begun += weight
    return chosen


def counts(number: int) -> list[int]:
    """The numbers of all processes, in their order."""
    if n_processes() == 1:
        return [number]
    found: list[int] = gather(torch.tensor([number], device=PartialState().device)).tolist()
    return found


def add_up(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes."""
    if n_processes() == 1:
        return tensor
    return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)


def gather_rows(tensor: Tensor) -> list[Tensor]:
    """The (n, ...) tensors of all processes, in their order; n may differ, and be 0."""
    if n_processes() == 1:
        return [tensor]
    lengths = counts(len(tensor))
    if not (longest := max(lengths)):
        return [tensor] * len(lengths)
    padded = gather(pad_across_processes(tensor.to(PartialState().device))).to(tensor.device)
    return [rows[:length] for rows, length in zip(padded.split(longest), lengths, strict=True)]


@contextmanager
def gradients_added_up(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The gradients left within the context are added up over the processes, and then to those that were there."""
    if n_processes() == 1:
        yield
        return
    parameters = list(parameters)
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, earlier in zip(parameters, before, strict=True):
        total = add_up(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = total if earlier is None else earlier.add_(total)


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
