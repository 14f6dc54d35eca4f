"""What the frozen base model computes for a sequence, kept in memory and, if a folder is given, on disk.

The base model never changes in training, so what it computes from a sequence alone is computed once.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Collection, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from .batches import TokenSequence

logger = logging.get_logger(__name__)

_FORMAT = "hf_malmen features 1"
_STALE = 24 * 60 * 60  # seconds after which nobody is still writing a file

Key = tuple[str, Hashable]  # what was computed, and of which sequence


class FeatureCache:
    """Tensors by what they are and the sequence they belong to.

    Args:
        max_bytes: how much memory to keep from step to step; the oldest entries go first.
        disk: where they are kept from run to run, or None.
    """

    def __init__(self, max_bytes: int, disk: "FeatureFolder | None" = None) -> None:
        self.max_bytes = max_bytes
        self.disk = disk
        self._entries: dict[Key, tuple[Tensor, ...]] = {}
        self._n_bytes = 0

    def get(self, key: Key, device: torch.device) -> tuple[Tensor, ...] | None:
        """The tensors of `key`, on `device` where the disk has them; None if nothing has."""
        found = self._entries.get(key)
        if found is None and self.disk is not None:
            read = self.disk.get(key)
            if read is not None:
                found = tuple(tensor.to(device) for tensor in read)
                self._keep(key, found)
        return found

    def put(self, key: Key, tensors: tuple[Tensor, ...]) -> None:
        """Keep tensors, which share no memory with anything larger."""
        self._keep(key, tensors)
        if self.disk is not None:
            self.disk.put(key, tensors)

    def make_room(self, protect: Collection[Key]) -> None:
        """Forget the oldest entries until the rest fits the memory, all but those of `protect`; write to disk."""
        self.flush()
        for key in list(self._entries):
            if self._n_bytes <= self.max_bytes:
                return
            if key not in protect:
                self._n_bytes -= _n_bytes(self._entries.pop(key))

    def flush(self) -> None:
        """Write what came in to disk, where there is one."""
        if self.disk is not None:
            self.disk.flush()

    def clear(self) -> None:
        """Forget what is in memory. What is on disk comes back from there, bit for bit."""
        self.flush()
        self._entries.clear()
        self._n_bytes = 0

    def _keep(self, key: Key, tensors: tuple[Tensor, ...]) -> None:
        self._n_bytes += _n_bytes(tensors) - _n_bytes(self._entries.get(key, ()))
        self._entries[key] = tensors


class FeatureFolder:
    """A folder of safetensors files that later runs, and other processes, share.

    Files are only ever added, under names of their own, so that no process waits for another. What is damaged is
    reported and not used; what belongs to another model stays as it is. An entry on disk is never computed again, so
    that a run that is resumed reads the same bits as one that went on.

    Args:
        folder: made if it does not exist.
        max_bytes: of all files in the folder, whoever writes them; beyond it nothing is added.
        fingerprint: what the entries depend on besides their sequences, as `features_fingerprint` gives it.

    Raises:
        ValueError: there is a file in the place of the folder.
    """

    def __init__(self, folder: str | Path, max_bytes: int, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.fingerprint = fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"trunk_cache_dir is {str(self.folder)!r}, which is a file or lies in one; expected a folder. Name "
                "another one, which is made if it does not exist."
            ) from None
        # Entry -> the files that hold it, with the checksum of each tensor. Several, where one of them is damaged.
        self._files: dict[str, list[tuple[Path, list[int]]]] = {}
        self._pending: dict[str, tuple[Tensor, ...]] = {}
        self._is_closed = False  # to new entries
        for path in self.folder.glob("*.unfinished"):
            with suppress(OSError):  # gone by now, or another user's
                if time.time() - path.stat().st_mtime > _STALE:  # left by a process that was killed
                    path.unlink()
        foreign = sum(not self._index(path) for path in sorted(self.folder.glob("*.safetensors")))
        if foreign:
            logger.info(f"{self.folder}: {foreign} files belong to another model or other layers, and are not used.")

    def get(self, key: Key) -> tuple[Tensor, ...] | None:
        """The tensors of `key`, on the CPU; None if the folder does not have them, or they are damaged."""
        name = _name(key)
        if name in self._pending:
            return self._pending[name]
        for path, checksums in list(self._files.get(name, ())):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = tuple(file.get_tensor(f"{name}.{i}") for i in range(len(checksums)))
            except (SafetensorError, OSError) as error:
                self._distrust(path, str(error))
                continue
            if [_checksum(tensor) for tensor in tensors] == checksums:
                return tensors
            self._distrust(path, "its bytes are not those that were written")
        return None

    def put(self, key: Key, tensors: tuple[Tensor, ...]) -> None:
        """Take in tensors, to be written by the next `flush`."""
        name = _name(key)
        if name not in self._files and not self._is_closed:
            self._pending[name] = tuple(tensor.detach().to("cpu").contiguous() for tensor in tensors)

    def flush(self) -> None:
        """Write what came in since the last time, as one file."""
        if not self._pending:
            return
        checksums = {name: [_checksum(tensor) for tensor in tensors] for name, tensors in self._pending.items()}
        flat = {f"{name}.{i}": tensor for name, tensors in self._pending.items() for i, tensor in enumerate(tensors)}
        self._pending.clear()
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "checksums": json.dumps(checksums)}
        path = self.folder / f"{self.fingerprint[:16]}-{uuid.uuid4().hex}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        try:
            save_file(flat, unfinished, metadata=metadata)
            # With the new file in it, so that of two processes that write at once neither overlooks the other's.
            if self._size() <= self.max_bytes:
                os.replace(unfinished, path)
                self._note(path, checksums)
                return
            logger.info(f"{self.folder} has reached its limit of {self.max_bytes / 2**30:.3g} GiB; nothing is added.")
        except (SafetensorError, OSError) as error:  # a full disk, say
            logger.warning(f"{self.folder} cannot be written to ({error}). Nothing more is added; training goes on.")
        self._is_closed = True
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)

    def _size(self) -> int:
        """Bytes of all files of features, those that are being written too."""
        n_bytes = 0
        for path in self.folder.iterdir():
            if path.suffix in (".safetensors", ".unfinished"):
                with suppress(FileNotFoundError):  # another process has renamed or removed it
                    n_bytes += path.stat().st_size
        return n_bytes

    def _index(self, path: Path) -> bool:
        """Note what a file holds. Whether it is one of this fingerprint; true of a damaged one, which is reported."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            self._distrust(path, str(error))
            return True
        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != self.fingerprint:
            return False
        try:
            self._note(path, json.loads(metadata["checksums"]))
        except (KeyError, ValueError, AttributeError):
            self._distrust(path, "it does not say what it holds")
        return True

    def _note(self, path: Path, checksums: dict[str, list[int]]) -> None:
        for name, sums in checksums.items():
            self._files.setdefault(name, []).append((path, sums))

    def _distrust(self, path: Path, reason: str) -> None:
        sound = {name: [entry for entry in entries if entry[0] != path] for name, entries in self._files.items()}
        self._files = {name: entries for name, entries in sound.items() if entries}
        logger.warning(
            f"{path} is damaged ({reason}), and what it held is computed again. Delete it to free its space."
        )


def features_fingerprint(model: nn.Module, *settings: Any) -> str:
    """SHA-256 of all weights of `model`, their dtypes, its configuration, and what else features depend on.

    Of PEFT's adapters too which are active, merged into the weights, or disabled, and how they are scaled.

    Args:
        model: the base model, all of it in memory.
        settings: anything with a telling `repr`, such as the names of the traced modules.

    Raises:
        ValueError: some weights are offloaded.
    """
    digest = hashlib.sha256(repr(settings).encode())
    config = getattr(model, "config", None)
    if config is not None:
        told = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} is offloaded, so that the base model cannot be told from others, and its features cannot be "
                "kept on disk. Leave trunk_cache_dir unset, or load the base model into memory."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for name, module in model.named_modules():
        # A model has a method of this name, an adapted layer a flag.
        if isinstance(getattr(module, "disable_adapters", None), bool):
            told_of_adapters = {state: getattr(module, state, None) for state in _ADAPTER_STATES}
            digest.update(f"{name} {told_of_adapters!r}".encode())
    return digest.hexdigest()


def sequence_key(kind: str, sequence: TokenSequence) -> Key:
    """The key of what depends on all of a sequence, its answer too."""
    return kind, (sequence.input_ids, sequence.labels, sequence.decoder_input_ids, sequence.subject)


# Of a configuration: where the model came from, and what wrote it.
_NOT_OF_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")

# Of a layer that PEFT has adapted: what its weights do not say about what it computes.
_ADAPTER_STATES = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")


def _name(key: Key) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:40]


def _n_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))
