"""What can be told of a path before anything is written to it. Imports nothing heavy: the command line asks."""

from pathlib import Path


def lies_below_a_file(path: Path) -> bool:
    """Whether nothing can be made at a path, as something above it is a file."""
    return any(parent.is_file() for parent in path.parents)
