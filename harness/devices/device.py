"""A device that answered: its stack, its synchronisation, its check, and the watch on what falls back to the CPU."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.devices.device_errors import AGAIN, comes_late, error_summary, fault_in
from harness.devices.fallback import AsUnwatched, Watch, Watched
from harness.devices.kind import Kind
from harness.devices.kinds import KINDS
from harness.devices.stack import Stack, read_stack
from harness.errors import DeviceError, HarnessError, RunError
from harness.torch_private import in_threads

_SIZES = (4, 1000, 100_000)  # elements of the float32 tensors of a check, which lie in blocks of different sizes
_EXACT = 1 << 22  # the sum of two whole numbers below it is exact in float32


@dataclass
class Health:
    """What became of a device in this process."""

    stopped: str = ""  # where it stopped computing, what it said and what to do; "" while it computes


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that answered, or the CPU."""

    name: str  # "Ascend910B4", …
    backend: str
    torch_device: torch.device
    reason: str  # why it is this one, in a sentence
    health: Health = field(default_factory=Health, compare=False, repr=False)

    @property
    def kind(self) -> Kind:
        """What the harness asks of such a device."""
        return KINDS[self.backend]

    @property
    def where(self) -> str:
        """As errors name it: "on npu:0 (Ascend910B4)"."""
        return f"on {self.torch_device} ({self.name})"

    @property
    def stopped(self) -> str:
        """Where in this process it stopped computing, what it said and what to do; "" while it computes."""
        return self.health.stopped

    @property
    def lost(self) -> bool:
        """Whether it stopped by a fault that stays with the card, so that another process may meet it again."""
        fault = self.kind.fault_in(self.stopped)
        return fault is not None and fault.lasts

    @property
    def stack(self) -> Stack:
        """The stack as it is now: switches may change between two runs."""
        return read_stack(self)

    @property
    def generator(self) -> torch.Generator | None:
        """torch's own generator of random numbers on the device; None for the CPU."""
        return self.kind.generator(self.torch_device.index or 0)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given. Raises: what an operator raised that ran meanwhile."""
        with self.interruptible():
            self.kind.synchronize(self.torch_device)

    def check(self, at: str = "") -> None:
        """Have the device compute sums of numbers that it never saw, and compare them bit by bit.

        After one operator failed in torch_npu's queue, the queue takes work and drops it without a word (NPUQueue.cpp,
        CAN_EXIT): memory then shows old answers, so a check must not ask an old question. `at` names what runs, such as
        a row, for the message. A device that failed once stays failed: the next check raises at once.

        Raises: DeviceError when the device does not compute.
        """
        if self.torch_device.type == "cpu":
            return
        self.require_running()
        problem = self._probe()
        if problem:
            self._stop(at, problem)
            raise DeviceError(self.stopped)

    def require_running(self) -> None:
        """Ask nothing of the device. Raises: DeviceError when it is known to compute no more."""
        if self.stopped:
            raise DeviceError(self.stopped)

    def _stop(self, at: str, problem: str) -> None:
        """Remember that the device computes no more, once."""
        if not self.stopped:
            fault = fault_in(problem)
            advice = fault.sentence if fault else AGAIN
            self.health.stopped = f"the device stopped computing at {at or 'this call'}: {problem}; {advice}"

    def _probe(self) -> str:
        """What is wrong with the answers of the device; "" where they are right."""
        from harness.emulator import faults

        with faults.suspended():
            try:
                generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
                wrong = [problem for size in _SIZES if (problem := self._sum(size, generator))]
            except Exception as error:  # noqa: BLE001  whatever the device raises is the answer
                self._raise_interrupt()
                return error_summary(error)
        return wrong[0] if wrong else ""

    def _sum(self, size: int, generator: torch.Generator) -> str:
        """Add a random number to `size` random ones on the device: what is wrong with the answer, or ""."""
        drawn = torch.randint(_EXACT, (size + 1,), generator=generator, dtype=torch.int32)
        numbers, summand = drawn[:-1].float(), float(drawn[-1])
        answer, expected = (numbers.to(self.torch_device) + summand).cpu(), numbers + summand
        if torch.equal(answer, expected):
            return ""
        return f"asked for {size} sums it answered {_first(answer)} where {_first(expected)} is right"

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """An interrupt that came while an emulated operator ran ends the block, in place of that operator's error."""
        try:
            yield
        except Exception:
            self._raise_interrupt()
            raise
        self._raise_interrupt()

    def _raise_interrupt(self) -> None:
        if self.backend == "emulated":
            from harness import emulator

            emulator.raise_interrupt()

    @contextlib.contextmanager
    def telling(self, at: str = "") -> Iterator[None]:
        """Whatever the device raises in the block becomes a RunError: where, what CANN said, its meaning, what to do.

        The device is then asked whether it still computes; where it does not, every later `check` raises. `at` names
        what runs.
        Raises: RunError; the harness's other errors as they are.
        """
        try:
            with self.interruptible():
                yield
        except RunError as error:
            cause = error.__cause__
            text = str(error) if cause is None else f"{self.where}: {error_summary(cause)}"
            raise self._told(text, cause or error, at, error.location) from cause
        except HarnessError:
            raise
        except Exception as error:
            raise self._told(f"{self.where}: {error_summary(error)}", error, at) from error

    def _told(self, text: str, cause: BaseException, at: str, location: str = "") -> RunError:
        """The error of a device as rows show it; `location` is where in the model it was raised."""
        fault = self.kind.fault_in(str(cause))
        told = f"{text}{_raised_in(location, cause)}"
        told = f"{told}; {fault.sentence}" if fault else told
        if self.ends(text, cause, at):
            told += "; nothing more is run on the device in this process"
        return RunError(told, location=location)

    def ends(self, problem: str, cause: BaseException, at: str) -> bool:
        """Whether an error of the device, raised while `at` ran, is its end in this process.

        It is where the device computes no more, and where nothing that it computes counts (`DeviceFault.lasts`).
        """
        if self.torch_device.type == "cpu":
            return False
        fault = self.kind.fault_in(str(cause))
        if not self.stopped and ((fault is not None and fault.lasts) or self._probe()):
            self._stop(at, problem)
        return bool(self.stopped)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watched]:
        """See what the CPU computes in place of the device while the block runs, in the threads that it starts too."""
        seen, kind = Watched(), self.torch_device.type
        if kind == "cpu":
            yield seen
            return
        seen.computed, to_host = 0, self.kind.count_copies()
        with in_threads(lambda: Watch(seen, to_host, kind)), AsUnwatched(seen):
            yield seen

    @contextlib.contextmanager
    def in_float32(self, what: str) -> Iterator[str]:
        """While the block runs the device's float32 convolutions ("conv") or other products ("matmul") keep their
        operands; gives the switch's name.

        Raises: KeyError for a device without such a switch.
        """
        switch = self.kind.switches[what]
        owner = functools.reduce(getattr, switch.owner.split(".")[1:], torch)
        before = getattr(owner, switch.name)
        setattr(owner, switch.name, False)
        try:
            yield f"{switch.owner}.{switch.name}"
        finally:
            setattr(owner, switch.name, before)


def _raised_in(location: str, cause: BaseException) -> str:
    """The place of an error in words: what a kernel does wrong may show at a later operator."""
    if not location:
        return ""
    if comes_late(str(cause)):
        return f"; noticed in {location}, which may come after the operator that failed"
    return f"; raised in {location}"


def _first(tensor: Tensor) -> str:
    """The first numbers of a tensor, for a message."""
    return f"[{', '.join(f'{number:.0f}' for number in tensor[:4].tolist())}{', …' if tensor.numel() > 4 else ''}]"
