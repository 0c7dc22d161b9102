"""Rows a minute with 1, 2, 4 and 8 cards: what a row costs besides its device's time, at most a quarter of it.

The cards are emulated and take their time by a planted fault that sleeps; the CPU's runs are read from a store.
So the figures show what the plugin, its workers and its reports cost, and not what two cores compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.benchmarks import Figure

CARD_COUNTS = (1, 2, 4, 8)
_EACH = 12  # rows for each card
_FORWARD = 1.0  # seconds that a forward takes on a card
_FORWARDS = 2  # of a row on its device
_PROMISE = 1.25

_TESTS = """
import os, time
import pytest, torch
from harness import Case

def tokens(generator):
    return torch.randn(2, 64, 64, generator=generator)

CASE = Case(name="small", inputs=tokens, isolated=False,
            model=lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)))

@pytest.mark.parametrize("seed", range(int(os.environ["ROWS"])))
def test_precision(precision, seed):
    began = time.time()
    precision(CASE, seed)
    with open(os.environ["TIMES"], "a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']} {began} {time.time()}\\n")
"""


def rows_a_minute(cards: int, folder: Path, rows: int, *, fault: str | None) -> float:
    """Run so many rows on so many cards, and say how many end in a minute once all workers run."""
    times = folder / "times"
    times.unlink(missing_ok=True)
    words = ["-k", "precision", "-q", "-p", "no:cacheprovider", "--precision-device=emulated", "--precision-locate=off"]
    words += [f"--precision-devices={cards}", f"--precision-reference-store={folder / 'store'}", "-n", str(cards)]
    words += [f"--precision-report={folder / 'reports'}", *([f"--precision-fault={fault}"] if fault else [])]
    environment = os.environ | {"ROWS": str(rows), "TIMES": str(times), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    lines = [line.split() for line in times.read_text().splitlines()]
    return throughput([(worker, float(began), float(ended)) for worker, began, ended in lines])


def throughput(rows: list[tuple[str, float, float]]) -> float:
    """Rows a minute of all workers together, of rows with their worker, beginning and end in seconds. The first row of
    a worker, which imports what rows need, does not count.

    >>> throughput([("a", 0.0, 9.0), ("a", 9.0, 11.0), ("a", 11.0, 13.0), ("b", 0.0, 8.0), ("b", 8.0, 10.0)])
    60.0
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for worker, began, ended in sorted(rows, key=lambda row: row[1]):
        spans.setdefault(worker, []).append((began, ended))
    return 60 * sum((len(span) - 1) / (span[-1][1] - span[1][0]) for span in spans.values() if len(span) > 1)


def measure() -> list[Figure]:
    result = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_rows.py").write_text(_TESTS)
        rows_a_minute(1, folder, _EACH * max(CARD_COUNTS), fault=None)  # the store is filled
        for cards in CARD_COUNTS:
            fault = f"aclnnSilu:hang:seconds={_FORWARD}"
            rate = rows_a_minute(cards, folder, _EACH * cards, fault=fault)
            most = 60 * cards / (_FORWARD * _FORWARDS)
            what = f"{cards} card{'s' if cards > 1 else ''}: {rate:.0f} rows a minute, time / the device's time"
            result.append(Figure(name=what, value=most / rate, promise=_PROMISE))
    return result
