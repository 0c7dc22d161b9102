"""A Ray cluster as a run needs it: its address, its cards, and a worker for each card."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ANSWER = 60.0  # seconds within which a cluster must answer
STOPPING = 5.0  # seconds that a worker may take to put its folder away
REACH = 10.0  # seconds within which a machine must take a connection
RESOURCES = {"npu": "NPU", "cuda": "GPU"}  # what Ray calls the cards of a kind of device
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # is set in what `ray job submit` starts
LEFT_OUT = (".git", ".venv", "venv", "__pycache__")  # of the code that is sent
_PROBE = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"


def is_spread(config: Any, known: Any, args: Sequence[str] = ()) -> bool:
    """Whether this process hands its rows to a Ray cluster; not in a worker of one. `args` may hold the short name."""
    given = known.precision_ray or any(word.partition("=")[0] == "--ray" for word in args)
    return bool(given) and not config.pluginmanager.has_plugin(PROCESS)


PROCESS = "precision-cluster-process"  # the plugin of pytest in a worker's process


@dataclass(frozen=True, kw_only=True)
class WorkerNeed:
    """What each worker takes of the cluster, and how many workers that makes."""

    resource: str  # "NPU", "GPU" or "CPU"
    amount: int
    workers: int

    @property
    def options(self) -> dict[str, Any]:
        """As Ray's actors are given it."""
        if self.resource == "CPU":
            return {"num_cpus": self.amount}
        cards = {"num_gpus": 1} if self.resource == "GPU" else {"resources": {self.resource: 1}}
        return {"num_cpus": 0, **cards}


def need_of(kind: str, nodes: Sequence[Mapping[str, float]]) -> WorkerNeed:
    """What workers of a kind of device take, on nodes with these resources.

    A card each; devices without cards: as many CPUs as the smallest node that has some, so that nodes of one size have
    one worker each, which computes with all of its cores as a run on that machine alone would.

    >>> need_of("npu", [{"CPU": 64.0, "NPU": 8.0}, {"CPU": 4.0}]).workers
    8
    >>> need_of("cpu", [{"CPU": 64.0}, {"CPU": 32.0}, {}])
    WorkerNeed(resource='CPU', amount=32, workers=3)
    """
    resource = RESOURCES.get(kind, "CPU")
    there = [int(node.get(resource, 0)) for node in nodes]
    amount = 1 if kind in RESOURCES else min((count for count in there if count), default=1)
    return WorkerNeed(resource=resource, amount=amount, workers=sum(count // amount for count in there))


class Cluster:
    """The Ray cluster at an address, with the code of this run sent to it, or there already in a job of Ray's.

    `root` is the folder of the code, `report` that of the report.

    Raises: pytest.UsageError where ray is not installed, the cluster does not answer, or no node has what `device`
    needs.
    """

    def __init__(self, address: str, *, device: str, root: Path, report: Path):
        self._ray = _import_ray()
        self.address = address
        kind, _, number = device.partition(":")
        if number and kind in RESOURCES:
            raise _refusal(f"--precision-device={device} names one card; write {kind}, and each worker takes one")
        _await_answer(address)
        self.sends = IN_JOB not in os.environ
        code = {"working_dir": str(root), "excludes": _excluded(root, report)}
        try:
            how = dict(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
            self._ray.init(address, runtime_env=code if self.sends else None, **how)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise _refusal(f"{address}: {_one_line(error)}") from None
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        self.hosts = {node["NodeID"]: _host_of(node) for node in nodes}
        counted = [node["Resources"] for node in nodes]
        if kind == "auto" and any(node.get("NPU") for node in counted):
            kind = "npu"
        self.kind = kind
        self.need = need_of(kind, counted)
        self._with_room = sum(node.get(self.need.resource, 0) >= self.need.amount for node in counted)
        if not self.need.workers:
            self.close()
            raise _refusal(_without(self.need.resource, address, sorted(self.hosts.values())))

    def describe(self) -> str:
        """The cluster in words: "the Ray cluster at auto: 3 hosts, 24 workers with 1 NPU each"."""
        hosts = f"{self._with_room} host{'s' * (self._with_room != 1)}"
        workers = f"{self.need.workers} worker{'s' * (self.need.workers != 1)}"
        return (
            f"the Ray cluster at {self.address}: {hosts}, {workers} with {self.need.amount} {self.need.resource} each"
        )

    def start(self, given: Any) -> Any:
        """An actor of `harness.plugin.cluster_worker.Worker`, which Ray starts where its card is free."""
        from harness.plugin.cluster_worker import Worker

        # Two calls at a time: `stop` while another waits for events.
        return self._ray.remote(Worker).options(max_concurrency=2, **self.need.options).remote(given)

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        """Those of the answers that are there, after `seconds` at most."""
        if not references:
            time.sleep(seconds)
            return []
        done: list[Any] = self._ray.wait(list(references), timeout=seconds)[0]
        return done

    def answer(self, reference: Any, seconds: float | None = None) -> Any:
        """An answer of an actor. Raises: LostWorker."""
        try:
            return self._ray.get(reference, timeout=seconds)
        except self._ray.exceptions.RayError as error:
            raise _death(error) from None

    def kill(self, actor: Any, *, is_placed: bool) -> None:
        """End an actor, and with it its process of pytest; its card is free then. `is_placed`: Ray has started it."""
        if is_placed:
            with contextlib.suppress(LostWorker):
                self.answer(actor.stop.remote(), STOPPING)
        self._ray.kill(actor, no_restart=True)

    def host(self, node: str) -> str:
        """The name of a node's host."""
        if node not in self.hosts:  # it came later
            self.hosts |= {item["NodeID"]: _host_of(item) for item in self._ray.nodes()}
        return self.hosts.get(node, node[:8])

    def has_room(self, out: Mapping[str, int]) -> bool:
        """Whether a living node has what a worker takes; `out`: workers with quarantined cards, by node."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        need = self.need
        return any(
            node["Resources"].get(need.resource, 0) // need.amount > out.get(node["NodeID"], 0) for node in nodes
        )

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


class LostWorker(Exception):
    """A worker is no more; the message says how as far as Ray knows. `with_node`: its node is no more either."""

    def __init__(self, text: str, *, with_node: bool):
        super().__init__(text)
        self.with_node = with_node


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise _refusal(
            "the rows are to run on a Ray cluster, and ray is not installed here; pip install "
            "'npu-accuracy-harness[ray]'"
        ) from None
    return ray


def _await_answer(address: str) -> None:
    """Raises: pytest.UsageError where a cluster does not answer. `ray.init` would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
        except OSError as error:
            raise _refusal(f"{address} does not answer ({error}); {_ADDRESSES}") from None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=ANSWER, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refusal(f"no Ray cluster answers at {address} within {ANSWER:g} s; {_ADDRESSES}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise _refusal(f"no Ray cluster at {address}: {last}; {_ADDRESSES}")


_ADDRESSES = (
    "give auto on a machine of the cluster and in its jobs, HOST:PORT of the head (6379) on one of them, "
    "or ray://HOST:10001 from elsewhere; `ray status` shows whether it runs"
)


def _refusal(text: str) -> pytest.UsageError:
    return pytest.UsageError(f"--precision-ray: {text}")


def _without(resource: str, address: str, hosts: Sequence[str]) -> str:
    """The sentence for a cluster without cards."""
    named = ", ".join(hosts[:5]) + (" …" if len(hosts) > 5 else "")
    how = "" if resource == "CPU" else f" (or says it: --resources='{{\"{resource}\": 8}}')"
    how = " (or says it: --num-gpus=8)" if resource == "GPU" else how
    return (
        f"no node of the cluster at {address} has {resource} ({named or 'no node is alive'}); start a node with "
        f"`ray start` where Ray sees {resource}{how}; `ray status` lists what there is"
    )


def _excluded(root: Path, report: Path) -> list[str]:
    """What is not sent, as .gitignore writes it: environments, and what runs write into the folder `report`."""
    inside = root.resolve() in report.resolve().parents
    place = report.resolve().relative_to(root.resolve()).as_posix() if inside else ""
    return [*LEFT_OUT, *(f"/{place}/{name}" for name in ("precision*", "repro") if inside)]


def _host_of(node: Mapping[str, Any]) -> str:
    """The name that a node was started with, else that of its machine."""
    named = node.get("NodeName")
    return str(named if named and named != node["NodeManagerAddress"] else node["NodeManagerHostname"])


def _death(error: Exception) -> LostWorker:
    """How a worker died, as far as Ray knows."""
    text = _one_line(error)
    short = next((short for told, short in _NODE_DIED.items() if told in text), None)
    return LostWorker(short or text, with_node=short is not None)


_NODE_DIED = {  # what Ray's messages say of a node, in short
    "node has died": "its node died",
    "node was terminated": "its node died",
    "temporarily unavailable": "its node does not answer",
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__
