"""What workers tell the process that started them, which collects nothing: the case of each test, and the row that
runs. They are pytest-xdist's, or processes of a Ray cluster.

They share a temporary folder. A worker that is killed has no other way to say which case it ran.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.judging.status import Mark
from harness.plugin.watchdog import FRAMES
from harness.report.content import UNRUN

COLLECTED = "collected.json"


@dataclass(frozen=True, kw_only=True)
class Death:
    """How the process of a row died."""

    text: str
    mark: Mark
    named: Mapping[str, Any]  # case, dtype and seed of the row that ran
    rows: list[dict]  # of the same test, that were measured before
    worker: str = ""  # whose process it was
    acts: Mapping[str, Any] = field(default_factory=dict)  # of planted faults, as of `harness.plugin.planted.counts_of`


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What is known of a worker that ended with an error."""

    row: str  # the last row that it ran, "mine float32 seed 42"; "" where it ran none
    seen: str  # how it ended, or what its device did
    unopened: bool = False  # whether it could not open its device
    test: str = ""  # the test that it gave back, since its device computed no more; "" where it died in one


def exit_status_of(node: Any) -> int | None:
    """The exit status of the process of one of pytest-xdist's workers; None where it is not known."""
    process = getattr(getattr(node.gateway, "_io", None), "popen", None)
    try:
        status: int = process.wait(timeout=5)
    except Exception:  # noqa: BLE001  execnet's own matter; the row stands without it
        return None
    return status


def _signal_of(status: int | None) -> str:
    """ " by SIGSEGV", from the exit status of a process; "" where it is not known."""
    if status is None:
        return ""
    if status >= 0:
        return f" with exit status {status}"
    name = signal.Signals(-status).name
    return f" by {name}" + ("; the system may have run out of memory" if name == "SIGKILL" else "")


def _seed_text(seed: int | None) -> str | None:
    return None if seed is None else f"seed {seed}"


def _crash_location(text: str) -> str:
    """ " in forward (model.py:12) < …", from what `faulthandler` wrote at a crash; "" where it wrote nothing."""
    calls = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', text.partition("\n\n")[2].partition("\n\n")[0])
    if not calls:
        return ""
    return " in " + " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in calls[:FRAMES])


class Workers:
    """One end of it: `worker` is the worker's name, or None in the process that started the workers."""

    def __init__(self, worker: str | None):
        self.worker = worker
        self._folder: Path | None = None
        self.listener: Callable[[Mapping[str, Any]], None] | None = None  # in a worker: hears of each row that begins

    def join(self, config: Any) -> None:
        """In a worker: the folder that it was given."""
        given = getattr(config, "workerinput", {}).get("precision_folder")
        self._folder = Path(given) if given and Path(given).is_dir() else None

    def configure(self, node: Any) -> None:
        """Before a worker starts."""
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="accuracy-workers-"))
        node.workerinput["precision_folder"] = str(self._folder)

    def tell(self, collected: Mapping[str, Any]) -> None:
        """In a worker: the tests that it collected, by id, with case, dtype and seed."""
        self._write(COLLECTED, collected)

    def running(self, test: str, named: Mapping[str, Any]) -> None:
        """In a worker: the row that begins."""
        self._write(f"{self.worker}.json", {"test": test, **named})
        if self.listener is not None:
            self.listener(named)

    def measured(self, row: Any) -> None:
        """In a worker: a row of the test that runs; it is sent at the test's end."""
        path = self.path_of("rows")
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.to_dict()) + "\n")

    def begins(self) -> None:
        """In a worker: a test begins; the rows of the one before have arrived."""
        path = self.path_of("rows")
        if path is not None:
            path.unlink(missing_ok=True)

    def hung(self, text: str) -> None:
        """In a worker: the row that runs takes too long, and the process ends for it."""
        self._write(f"{self.worker}.hung.json", {"text": text})

    def fault_acts(self, counts: Mapping[str, Any]) -> None:
        """In a worker: a planted fault acts for the first time, which may end the process."""
        self._write(f"{self.worker}.acts.json", counts)

    def gives_back(self, test: str, seen: str, *, unopened: bool) -> None:
        """In a worker: its device computes no more, the process ends, and `test` is for another one."""
        self._write(f"{self.worker}.back.json", {"test": test, "seen": seen, "unopened": unopened})

    def ended(self, node: Any) -> Ended:
        """How the worker `node` ended, as far as it left word."""
        row = self._read(f"{node.gateway.id}.json")
        named = [] if not isinstance(row, dict) else [row.get("case"), row.get("dtype"), _seed_text(row.get("seed"))]
        name = " ".join(str(part) for part in named if part is not None)
        back = self._read(f"{node.gateway.id}.back.json")
        if isinstance(back, dict):
            return Ended(row=name, **back)
        return Ended(
            row=name,
            seen=self._how(node.gateway.id, exit_status_of(node)) if name else "its process ended before its first row",
        )

    def path_of(self, name: str) -> Path | None:
        """In a worker: a file of it for `name`; None where there is no folder."""
        return None if self.worker is None or self._folder is None else self._folder / f"{self.worker}.{name}"

    @property
    def references(self) -> Path | None:
        """In one of several workers: the folder in which they share what the CPU computed, until the run ends."""
        several = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
        return self._folder / "references" if self.worker is not None and self._folder is not None and several else None

    def death_of(self, worker: str, test: str, status: int | None) -> Death:
        """How a worker died while it ran `test`, as far as it left word; `status`: of its process, where known."""
        row = self._read(f"{worker}.json")
        row = row if isinstance(row, dict) and row.pop("test", None) == test else {}
        hung = self._read(f"{worker}.hung.json") or self._text(f"{worker}.stacks")
        from harness import last_operator

        last = "" if self._folder is None else last_operator.description_in(self._folder / f"{worker}.operator")
        lines = self._text(f"{worker}.rows").splitlines()
        back = self._read(f"{worker}.back.json")
        text = f"{UNRUN}{back['seen']}" if isinstance(back, dict) else self._how(worker, status) + last
        acts = self._read(f"{worker}.acts.json")
        return Death(
            text=text,
            mark=Mark.HUNG if hung else Mark.CRASHED,
            named=row,
            rows=[json.loads(line) for line in lines if line.endswith("}")],
            worker=worker,
            acts=acts if isinstance(acts, dict) else {},
        )

    def _how(self, worker: str, status: int | None) -> str:
        """How a worker died in its row, in words; `status`: of its process, where known."""
        from harness.report.journal import stacks_in

        hung, stacks = self._read(f"{worker}.hung.json"), self._text(f"{worker}.stacks")
        if isinstance(hung, dict):
            return str(hung.get("text"))
        if stacks:
            return f"it did not end within its limit (--precision-row-timeout); {stacks_in(stacks)}"
        return f"its process crashed{_signal_of(status)}{_crash_location(self._text(f'{worker}.crash'))}"

    def _text(self, name: str) -> str:
        try:
            return "" if self._folder is None else (self._folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def collected(self) -> dict[str, dict]:
        """The tests that the workers collected; empty where they could not tell, as on another machine."""
        result = self._read(COLLECTED)
        return result if isinstance(result, dict) else {}

    def close(self) -> None:
        """Remove the folder, in the process that made it."""
        if self.worker is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        if self.worker is None or self._folder is None:
            return
        partial = self._folder / f".{self.worker}.{name}"
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(self._folder / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads(self._text(name))
        except ValueError:
            return None
