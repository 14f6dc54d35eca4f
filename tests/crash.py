"""Kills writers: run by `test_history.py` in a process of its own, which forks one writer a point.

    python crash.py CHECKPOINT EDIT WORK N_POINTS

A writer is killed (SIGKILL) when it is about to run its k-th line of the code that writes; tensors are written and
copied a few bytes a call, so that lines fall between, before and after all of them. Prints one JSON object: what was
found after recovery.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

import hf_malmen.shifts
from hf_malmen import Edit, Fact, recover_checkpoint, undo_edit
from hf_malmen.shards import TensorEntry

State = dict[str, bytes | None]
TRACED = ("history.py", "records.py", "checkpoint.py", "copies.py", "stored_weights.py", "shards.py", "crash.py")

hf_malmen.shifts._BLOCK_VALUES = 256
real_copy = os.copy_file_range


def copy_a_little(source: int, target: int, count: int, begin: int, at: int) -> int:
    """`os.copy_file_range` that takes many calls."""
    return real_copy(source, target, min(count, 700), begin, at)


def write_in_halves(self: TensorEntry, stream: FileIO, start: int, data: memoryview) -> None:
    """`TensorEntry.write_rows` with a line between two halves."""
    stream.seek(self.begin + start * ((self.end - self.begin) // self.shape[0]))
    half = len(data) // 2
    stream.write(data[:half])
    stream.write(data[half:])


os.copy_file_range = copy_a_little
TensorEntry.write_rows = write_in_halves  # type: ignore[method-assign]


def state_of(folder: Path) -> State:
    """Every file with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


class LineCounter:
    """Counts the lines run of the code that writes, and kills its own process before the `last`."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last
        self.firsts: dict[tuple[str, int], int] = {}  # when each line of the code is run for the first time

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            self.count += 1
            self.firsts.setdefault((frame.f_code.co_filename, frame.f_lineno), self.count)
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def forked(action: Callable[[], object], last: int | None = None) -> list[int] | None:
    """Run `action` in a child. Returns when it ran each line for the first time, and the last one; None if killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            counter = LineCounter(last)
            sys.settrace(counter)
            action()
            sys.settrace(None)
            with os.fdopen(writer, "w") as stream:
                json.dump(sorted({*counter.firsts.values(), counter.count}), stream)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(3)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as stream:
        text = stream.read()
    if status == -signal.SIGKILL:
        return None
    if status != 0:
        raise RuntimeError(f"the writer ended with {status}")
    moments: list[int] = json.loads(text)
    return moments


def spread(moments: list[int], n_points: int) -> list[int]:
    """Points in time. A third is evenly spread, mostly over the loops that copy and write; a third over the lines of
    the code, when each is run for the first time; and a third are the last new lines, which close the journal."""
    n_each = n_points // 3
    points = {1 + round(i * (moments[-1] - 1) / (n_each - 1)) for i in range(n_each)} | set(moments[-n_each:])
    others = [moment for moment in moments if moment not in points]
    n_others = n_points - len(points)
    return sorted(points | {others[i * len(others) // n_others] for i in range(n_others)})


def kill_at_points(action: Callable[[Path], object], start: Path, work: Path, n_points: int) -> dict[str, Any]:
    """Kill `action` on copies of the checkpoint `start`, recover each, and compare with the old and the new state."""
    folder = work / "checkpoint"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        return folder

    old = state_of(fresh())
    moments = forked(lambda: action(folder))
    assert moments is not None
    new = state_of(folder)
    found: dict[str, Any] = {"points": 0, "old": 0, "new": 0, "mixed": [], "seen": [], "changed": old != new}
    seen = set()
    for number, point in enumerate(spread(moments, n_points)):
        fresh()
        assert forked(lambda: action(folder), point) is None
        between = state_of(folder)
        seen |= {name for name in (".preparing", ".journal", ".closed", ".dropped") if f"edits/{name}" in between}
        seen |= {"torn"} if any(between.get(name) not in (data, new.get(name)) for name, data in old.items()) else set()
        if number % 4 == 0:  # recovery can die, too
            recovery = forked(lambda: recover_checkpoint(folder))
            fresh()
            assert forked(lambda: action(folder), point) is None
            assert recovery is not None
            forked(lambda: recover_checkpoint(folder), recovery[(7 * number) % len(recovery)])
        forked(lambda: recover_checkpoint(folder))
        after = state_of(folder)
        found["points"] += 1
        found["old"] += after == old
        found["new"] += after == new
        if after not in (old, new):
            names = sorted(name for name in {*after, *old, *new} if after.get(name, 0) != old.get(name, 0))
            found["mixed"].append([point, names])
    found["seen"] = sorted(seen)
    return found


def main() -> None:
    """A first edit, a second one on top, the undo of each."""
    checkpoint, edit, work, n_points = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    loaded, second = (Edit.from_pretrained(edit) for _ in range(2))
    second.facts = [Fact("Another prompt", "another")]  # the same edit is not written twice
    edited = work / "edited"
    shutil.copytree(checkpoint, edited)
    loaded.write(edited, in_place=True)
    twice = work / "twice"
    shutil.copytree(edited, twice)
    second.write(twice, in_place=True)
    operations: dict[str, tuple[Callable[[Path], object], Path]] = {
        "first edit": (lambda folder: loaded.write(folder, in_place=True), checkpoint),
        "second edit": (lambda folder: second.write(folder, in_place=True), edited),
        "undo of the last": (undo_edit, twice),
        "undo of the only one": (undo_edit, edited),
        "undo of the first": (lambda folder: undo_edit(folder, "1"), twice),
    }
    share = -(-n_points // len(operations))  # rounded up
    print(json.dumps({name: kill_at_points(*operation, work, share) for name, operation in operations.items()}))


if __name__ == "__main__":
    main()
