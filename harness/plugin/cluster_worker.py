"""What runs on a node of a Ray cluster: an actor with a card, and the process of pytest that it starts and outlives.

The process has a connection to the actor and not to Ray: Ray's threads and torch_npu do not share it, and the actor is
there to say how it died.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.plugin.workers import Workers

PROCESS_ENDING = 30.0  # seconds that a process may take for its end
VISIBLE_CARDS = ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
LOG_LINES = 12  # of what a process printed that could not start


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a worker is told once: which tests to collect, and where."""

    name: str
    arguments: tuple[str, ...]  # of pytest, as this run was given them
    root: str | None  # pytest's root directory on every node; None: what Ray sent is the root
    local_root: str  # the same on the machine that asked
    below: str  # the folder of the run, below the root
    report: str  # the folder of the report on the machine that asked
    environment: Mapping[str, str]  # what changes numbers or says what runs, as on the machine that asked
    earlier: str | None  # the report that --precision-resume reads
    resource: str
    amount: int
    most: int  # workers of the run
    devices: int | None  # cards of an emulated machine
    soc: str | None  # and their family
    # Filled on the node:
    folder: str = ""  # of the process
    workerinput: Mapping[str, Any] | None = None


class Worker:
    """The actor. Its methods return events: tuples of a kind and values, see `harness.plugin.spread.Spread`."""

    def __init__(self, start: Start):
        self._workers = Workers(None)
        given = SimpleNamespace(workerinput={})
        self._workers.configure(given)
        self._test = ""
        self._backend = ""  # of its device, once that is open
        self._stopped = ""  # what its device did that computes no more
        root = Path(start.root or os.getcwd())
        directory = root / start.below
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not on {socket.gethostname()}: the nodes need the same code there")
        self._start = self._filled(start, root, given.workerinput)
        self._folder = Path(self._start.folder)
        self._log = self._folder / f"{start.name}.log"
        self._pipe, theirs = Pipe()
        with self._log.open("wb") as log:
            self._environment = _environment(self._start)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.plugin.cluster_process", str(theirs.fileno())],
                cwd=directory,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        self._pipe.send(self._start)

    def _filled(self, start: Start, root: Path, workerinput: dict[str, Any]) -> Start:
        """What the node knows: its folders, and how many workers of the run it may have."""
        folder = workerinput["precision_folder"]
        count = min(start.most, max(int(_resources_here().get(start.resource, 0)) // start.amount, 1))
        workerinput |= {"workerid": start.name, "workercount": count, "testrunuid": start.name, "mainargv": []}
        local = re.compile(rf"(^|=){re.escape(start.local_root)}(?=/|$)")
        arguments = [local.sub(lambda match: match[1] + str(root), word) for word in start.arguments]
        arguments += [f"--precision-report={folder}/report", f"--basetemp={folder}/tmp"]
        return replace(start, folder=folder, workerinput=workerinput, arguments=tuple(arguments))

    def where(self) -> dict[str, Any]:
        """The node by Ray's number, the cards that Ray gave to this worker ("" where it gave none), and its Python."""
        import ray

        context = ray.get_runtime_context()
        cards = context.get_accelerator_ids().get(self._start.resource, [])
        python = {"sysplatform": sys.platform, "version_info": tuple(sys.version_info), "executable": sys.executable}
        return {"node": context.get_node_id(), "cards": ",".join(map(str, cards)), "python": python}

    def run(self, test: str, following: str | None, facts: Mapping[Any, Any]) -> list[tuple]:
        """Begin a test, after which `following` is the next one here; `facts`: as of `Told`. The first events of it."""
        self._test = test
        self._pipe.send((test, following, facts))
        return self.events()

    def events(self) -> list[tuple]:
        """What happened since the last call: at least one event. Where its device stopped, the last one is what the
        card answers to another process.
        """
        result = []
        try:
            result.append(self._pipe.recv())
            while self._pipe.poll():
                result.append(self._pipe.recv())
        except (EOFError, OSError):
            result.append(self._death())
        for kind, *values in list(result):
            if kind == "ready":
                self._backend = values[-1].get("backend") or ""
            elif kind == "stopped":
                (self._stopped,) = values
            elif kind == "finished" and self._stopped:
                result.append(("answered", self._stopped, self._ask()))
        return result

    def _ask(self) -> str:
        """What is wrong with the card, once its process is gone; "" where it answers, or the device is no card."""
        from harness.devices.asking import problem_of
        from harness.devices.kinds import KINDS

        variable = KINDS[self._backend].cards_variable if self._backend in KINDS else None
        if variable is None:
            return ""
        self._process.kill()
        self._process.wait()
        played = dict(devices=self._start.devices, soc=self._start.soc) if self._backend == "emulated" else {}
        card = self._environment.get(variable) or "0"
        return problem_of(self._backend, card, environment=self._environment, **played)

    def end(self) -> list[tuple]:
        """End the process in order: its last events."""
        self._pipe.send(None)
        result: list[tuple] = []
        while not result or result[-1][0] not in ("finished", "answered", "died", "failed"):
            result += self.events()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PROCESS_ENDING)
        self._workers.close()
        return result

    def stop(self) -> None:
        """End the process at once; called while `events` waits."""
        self._process.kill()
        self._process.wait()
        self._workers.close()

    def _death(self) -> tuple:
        status = self._process.wait()
        if self._test:
            event: tuple = ("died", self._workers.death_of(self._start.name, self._test, status), self._ask())
        else:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
            event = "failed", " ".join(" ".join(lines).split()) or f"its process ended with status {status}"
        self._workers.close()
        return event


def _resources_here() -> Mapping[str, float]:
    """What Ray counts on this node."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == own), {})


def _environment(start: Start) -> dict[str, str]:
    """The process's variables: the node's, without what Ray sets for its own workers, and the run's."""
    from harness.emulator.runtime import LOST_FILE

    empty = {name for name in VISIBLE_CARDS if os.environ.get(name) == ""}  # older versions hide all other cards so
    left_out = {"OMP_NUM_THREADS", "PYTHONBREAKPOINT", *empty}
    ours = {name: value for name, value in os.environ.items() if name not in left_out}
    ours |= {LOST_FILE: f"{start.folder}/lost-cards"}  # of the machine that this worker plays, where it plays one
    given = start.workerinput or {}
    xdist = {"WORKER": start.name, "WORKER_COUNT": str(given.get("workercount", 1)), "TESTRUNUID": start.name}
    return ours | dict(start.environment) | {f"PYTEST_XDIST_{name}": value for name, value in xdist.items()}
