"""Reports of 20,000 rows: what a row takes in the file, and the seconds to write the report, to gate it against
another, and to make a page of it; each grows as the number of rows does.

The rows are a few real ones under new names, a tenth of which fail. Written are the journal, row by row, then the JSON
and the markdown; `gate` and `report` are run as commands, with the start of Python. Seconds are of processor time,
all of it on one core; ratios are to what Python's json needs to read the same files.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

from harness.benchmarks import Figure

_ROWS, FEWER = 20_000, 5_000
_SEEDS = range(9)


def measure() -> list[Figure]:
    rows, stack = _real_rows()
    with TemporaryDirectory() as folder:
        few, many = (_measured(rows, stack, count, Path(folder, str(count))) for count in (FEWER, _ROWS))
    figures = [
        Figure(name="bytes a row in precision.json", value=many.json_bytes / _ROWS, promise=11_000, unit="B"),
        Figure(name=f"size of the HTML of {_ROWS:,} rows", value=many.html_bytes / 2**20, promise=16, unit="MiB"),
        Figure(name=f"gate two reports of {_ROWS:,} rows", value=many.gate, promise=5.0, unit="s"),
        Figure(name="gate / json reads both", value=many.gate / (2 * many.json), promise=1.25),
        Figure(name="HTML of a report / json reads it", value=many.html / many.json, promise=2.5),
        Figure(name="journal, JSON and markdown / json reads it", value=many.write / many.json, promise=10.0),
    ]
    for name in ("write", "gate", "html"):
        ratio = getattr(many, name) / (getattr(few, name) * _ROWS / FEWER)
        figures.append(Figure(name=f"{name}: a row of {_ROWS:,} / a row of {FEWER:,}", value=ratio, promise=1.25))
    return figures


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Seconds and bytes for one number of rows."""

    write: float
    gate: float
    html: float
    json: float  # that Python's json takes to read the file
    json_bytes: int
    html_bytes: int


def _real_rows() -> tuple[list, dict]:
    """Ten rows of a small model on the emulated device, of which the last fails; and its stack."""
    from torch import nn, randn

    from harness import Case, Tolerance, open_device, validate
    from harness.report import Row

    device, rows = open_device("emulated"), []
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    strict = Tolerance(rel_l2=1e-12, reason="so that it fails")
    for name, tolerance, seeds in (("small", None, _SEEDS), ("strict", strict, [0])):
        more = {} if tolerance is None else {"tolerance": tolerance}
        case = Case(name=name, model=lambda: model, inputs=lambda draw: randn(8, 32, 64, generator=draw), **more)
        rows += [
            Row.of(validate(case, seed, device), test=f"cases/test_{name}.py::test_precision[float32-seed{seed}]",
                   case=name, dtype="float32", seed=seed)
            for seed in seeds
        ]  # fmt: skip
    return rows, device.stack.to_dict()


def _measured(rows: list, stack: dict, count: int, folder: Path) -> _Measured:
    from harness.report import Writer, build
    from harness.report.journal import Journal

    repeated = [
        replace(row, case=f"{row.case} {number // len(rows)}", test=f"{row.test[:-1]}-{number // len(rows)}]")
        for number, row in zip(range(count), rows * (count // len(rows)))
    ]
    for side in ("before", "after"):
        (folder / side).mkdir(parents=True)
        report = build(repeated, stack=stack, backend="emulated")
        begin = process_time()
        journal = Journal(folder / side)
        journal.start()
        for row in repeated:
            journal.row(row)
        paths = Writer(folder / side).write(report)
        journal.close(remove=True)
        write = process_time() - begin
    page = folder / "page.html"
    begin = process_time()
    json.loads(paths[0].read_bytes())
    read = process_time() - begin
    return _Measured(
        write=write,
        gate=_seconds("gate", str(folder / "before"), str(folder / "after")),
        html=_seconds("report", str(folder / "after"), "--output", str(page)),
        json=read,
        json_bytes=paths[0].stat().st_size,
        html_bytes=page.stat().st_size,
    )


def _seconds(*arguments: str) -> float:
    begin = _spent_by_children()
    done = subprocess.run([sys.executable, "-m", "harness", *arguments], capture_output=True, text=True)
    seconds = _spent_by_children() - begin
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {done.stderr or done.stdout[-500:]}")
    return seconds


def _spent_by_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
