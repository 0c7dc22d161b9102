"""Small C sources of the harness: a compiler to build them with, and the user's cache to keep what was built in."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import util
from pathlib import Path

from harness.errors import CompilerError


def compiler() -> list[str]:
    """The command of a C compiler: $CC, cc, gcc, clang, else the one that the ziglang package brings.

    Raises: CompilerError when there is none.
    """
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return [name]
    if util.find_spec("ziglang"):  # without a target it asks the cc that is not there what this machine is
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{os.uname().machine}-linux-gnu.2.17"]
    raise CompilerError("no C compiler: looked for cc, gcc, clang and the ziglang package; pip install ziglang")


def run_compiler(command: list[str]) -> None:
    """Run a compiler.

    Raises: CompilerError with its first error.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line.lower()]
            or done.stderr.splitlines()
            or ["no message"]
        )
        raise CompilerError(f"{command[0]}: {lines[0].strip()}")


def built(name: str, marker: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, which `make` fills if that was not done yet; `marker` is a file that it writes.

    Several processes may build at once: each fills a folder aside, and the first to finish gives it the name.

    Raises: CompilerError when no folder can be written; what `make` raises.
    """
    ready = _cache() / name
    if (ready / marker).exists():
        return ready
    with tempfile.TemporaryDirectory(dir=ready.parent, prefix=".building-") as aside:
        made = Path(aside) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(ready)
        except OSError:
            if not (ready / marker).exists():  # nobody else was first
                raise
    return ready


def key(*parts: bytes) -> str:
    """A short name for what something is built from."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> str:
    """The model and the instructions of this machine's processor, which `-march=native` compiles for."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    named = ("model", "cpu family", "stepping", "flags", "Features", "CPU implementer", "CPU part", "isa")
    lines = {line.strip() for line in text.splitlines() if line.startswith(named)}
    return "\n".join([platform.machine(), *sorted(lines)])


def _cache() -> Path:
    """A directory of the user's that can be written; a temporary one where there is none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for candidate in (
        base / "npu-accuracy-harness",
        Path(tempfile.gettempdir()) / f"npu-accuracy-harness-{os.getuid()}",
    ):
        try:
            candidate.mkdir(parents=True, exist_ok=True, mode=0o700)
            if candidate.stat().st_uid == os.getuid() and os.access(candidate, os.W_OK):
                return candidate
        except OSError:
            continue
    raise CompilerError(f"no directory can be written: tried {base}; set XDG_CACHE_HOME to one that can")
