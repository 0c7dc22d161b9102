"""Weights that are a file's pages: where a tensor's memory is mapped from a file, and mapping it again elsewhere.

`safetensors` maps a file into memory and hands out tensors that lie in it, so that a checkpoint which is loaded in the
dtype in which it is stored takes no memory that the kernel cannot take back. A copy of such weights in another process
need not be sent: the other process maps the same file.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import RunError

LEAST_BYTES = 1 << 20  # bytes of a storage from which on it is looked for among the mapped files
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)")
_OWN = ("Anonymous:", "Swap:")  # fields of /proc/PID/smaps that count pages which are no more the file's


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """`size` bytes of a file from byte `offset` on, and what tells the file from another one of its name."""

    path: str
    offset: int
    size: int
    device: int
    inode: int


@dataclass(frozen=True, kw_only=True)
class _Mapping:
    begin: int
    end: int
    offset: int
    path: str
    inode: int


def _mappings(root: Path = Path("/")) -> list[_Mapping]:
    """The files that are mapped into this process, by address; none where the system does not say (Linux does)."""
    try:
        lines = (root / "proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    entries = [_mapping(head) for line in lines if (head := _HEAD.fullmatch(line)) is not None]
    return sorted(entries, key=lambda entry: entry.begin)


def _written(root: Path = Path("/")) -> set[int]:
    """Where the mappings begin of which a page was written into, and is this process's own since; proc(5), smaps."""
    written: set[int] = set()
    begin = 0
    for line in (root / "proc/self/smaps").read_text(errors="replace").splitlines():
        if not line[:1].isupper():
            begin = int(line.partition("-")[0], 16)
        elif line.startswith(_OWN) and int(line.split()[1]):
            written.add(begin)
    return written


def _at(entries: list[_Mapping], address: int, size: int) -> _Mapping | None:
    """The mapping that holds these addresses."""
    index = bisect.bisect_right(entries, address, key=lambda entry: entry.begin) - 1
    return entries[index] if index >= 0 and address + size <= entries[index].end else None


def _mapping(head: re.Match) -> _Mapping:
    """What a line that begins a mapping says."""
    begin, end, _, offset, _, _, inode, path = head.groups()
    where = dict(begin=int(begin, 16), end=int(end, 16), offset=int(offset, 16))
    return _Mapping(path=path, inode=int(inode), **where)


def file_parts(storages: Iterable[torch.UntypedStorage]) -> list[FilePart | None]:
    """The part of a file that each storage is; None for memory of the process's own, and for what is small.

    A storage in a mapping of which some page was written into is the process's own as a whole.
    """
    storages = list(storages)
    entries = _mappings() if any(_is_large(storage) for storage in storages) else []
    at = [_at(entries, item.data_ptr(), item.nbytes()) if _is_large(item) else None for item in storages]
    written = _written() if any(at) else set()  # the kernel looks at every page for it
    return [
        None if entry is None or entry.begin in written else _part(entry, storage)
        for entry, storage in zip(at, storages)
    ]


def _is_large(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.nbytes() >= LEAST_BYTES


def _part(entry: _Mapping, storage: torch.UntypedStorage) -> FilePart | None:
    """The part of the file that a storage in its mapping is; None where the file is no more under its name."""
    try:
        status = os.stat(entry.path)
    except OSError:
        return None
    if status.st_ino != entry.inode:
        return None
    offset = entry.offset + storage.data_ptr() - entry.begin
    where = dict(path=entry.path, device=status.st_dev, inode=status.st_ino)
    return FilePart(offset=offset, size=storage.nbytes(), **where)


def mapped_elements(tensors: Iterable[Tensor]) -> int:
    """How many elements of these tensors lie in mapped files, and take no memory that the kernel cannot take back."""
    tensors = list(tensors)
    parts = file_parts(tensor.untyped_storage() for tensor in tensors)
    return sum(tensor.numel() for tensor, part in zip(tensors, parts) if part is not None)


def mapped(part: FilePart, files: dict[str, torch.UntypedStorage]) -> torch.UntypedStorage:
    """A storage that is this part of a file; what is written into it is this process's own. `files` keeps each file's
    storage, so that it is mapped once.

    Raises: RunError where the file is no more what it was.
    """
    try:
        status = os.stat(part.path)
    except OSError as error:
        raise RunError(f"weights are read from {part.path}, which is there no more: {error}") from error
    if (status.st_dev, status.st_ino) != (part.device, part.inode) or status.st_size < part.offset + part.size:
        raise RunError(
            f"weights are read from {part.path}, which was replaced while the model was in use; run it again"
        )
    if part.path not in files:
        files[part.path] = torch.UntypedStorage.from_file(part.path, False, status.st_size)
    return files[part.path][part.offset : part.offset + part.size]
