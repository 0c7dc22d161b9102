"""One script per promise on speed and size; `python -m harness.benchmarks [NAME …]` runs them and prints figure,
promise, ratio.

A script has `measure() -> list[Figure]`. What it compares it runs interleaved in one process or one after the other in
children, and gives medians: a machine's absolute times say little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure and the most that it may be."""

    name: str
    value: float
    promise: float
    unit: str = ""

    @property
    def ratio(self) -> float:
        """Figure over promise: kept up to 1."""
        return self.value / self.promise

    @property
    def is_met(self) -> bool:
        return self.value <= self.promise


def interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each function, called in turn `rounds` times after one call to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for index in range(rounds + 1):
        for position, function in enumerate(functions):
            begin = perf_counter()
            function()
            if index:
                times[position].append(perf_counter() - begin)
    return [median(item) for item in times]


def in_child(code: str, *arguments: str, **environment: str) -> dict:
    """What a fresh Python prints as JSON on its last line, with these variables in its environment besides this
    process's own.
    """
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def high_water() -> int:
    """Bytes of memory that this process held at most, mapped files included. The kernel's own count of a child's
    (ru_maxrss) starts at its parent's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
