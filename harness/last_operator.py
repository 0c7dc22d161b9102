"""The operator that a process handed to the device last, where it can be read after the process died.

A few bytes of a file that is mapped into memory: to note an operator costs less than a microsecond, and what was noted
stays when the process is killed.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_SIZE = 256  # bytes of a name
_memory: mmap.mmap | None = None


def record_into(path: Path) -> None:
    """Note operators in this file from here on. Raises: OSError."""
    global _memory
    path.write_bytes(bytes(_SIZE))
    with path.open("r+b") as file:
        _memory = mmap.mmap(file.fileno(), _SIZE)


def note(name: str) -> None:
    """The device is given this operator; "" says that none is running yet."""
    if _memory is not None:
        _memory[:] = name.encode(errors="replace")[:_SIZE].ljust(_SIZE, b"\0")


def _read(path: Path) -> str:
    """What a process noted last in this file; "" where it noted nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record_into(Path(folder) / "last")
    ...     note("aten::silu")
    ...     _read(Path(folder) / "last")
    'aten::silu'
    """
    try:
        return path.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def description_in(path: Path) -> str:
    """What a reason says of it: "; the last operator that the device was given: aten::silu", or ""."""
    name = _read(path)
    return f"; the last operator that the device was given: {name}" if name else ""
