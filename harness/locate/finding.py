"""What locating found: every operator that was looked at, the first that is wrong, and the sentences that say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.devices import Device
from harness.devices.device_errors import fault_in, summary
from harness.errors import DeviceError

FALLS_BACK = "the CPU computes it in place of the device"
RANDOM = "random: the device goes on with the CPU's numbers"
GRADIENT = "a gradient: looked at with backward"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator, as the model called it."""

    number: int
    operator: str
    module: str  # the path of the module that called it, "" for the model itself
    place: str  # the line, "aimv2.py:212"
    dtype: str
    shape: tuple[int, ...]
    own: float  # relative L2 difference to the CPU with the CPU's inputs
    ratio: float | None  # own error to float64 over the floor; None where it is below what is measured
    inherited: float  # relative L2 difference to the CPU with the device's own inputs
    reasons: tuple[str, ...] = ()  # why it is not as a healthy device computes it
    cause: str = ""  # what the evidence names
    note: str = ""  # "random", "on the CPU alone", …

    @property
    def bad(self) -> bool:
        return bool(self.reasons)

    @property
    def name(self) -> str:
        """Where it is: "trunk.blocks.3.mlp.fc2: linear (aimv2.py:212)"."""
        return f"{self.module or 'the model'}: {self.operator}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Every operator of a forward, and the first that is wrong."""

    case: str
    dtype: str
    seed: int | None
    steps: tuple[Step, ...]
    level: str = "operators"
    unseen: int = 0  # operators that were not looked at, because the time was over
    gone: str = ""  # where the device stopped computing while it was looked at, and what it said; "" where it did not
    compiling: float = 0.0  # seconds that first calls of operators took longer than the next, which no limit counts
    otherwise: float = 0.0  # relative L2 difference of the CPU's output in this process to that in one without torch_npu
    trial: Any = field(default=None, repr=False)  # of the first, to make a repro of

    @property
    def first(self) -> Step | None:
        """The first operator whose own error is above its floor; of modules the innermost."""
        bad = [each for each in self.steps if each.bad]
        if not bad or self.level == "operators":
            return bad[0] if bad else None
        return next((each for each in bad if f"{each.module}.".startswith(f"{bad[0].module}.") and not any(other.module.startswith(each.module + ".") for other in bad)), bad[0])

    @property
    def has_gradients(self) -> bool:
        """Whether the model takes gradients itself, which only `backward` looks into."""
        return any(each.note == GRADIENT for each in self.steps)

    @property
    def fallen(self) -> list[Step]:
        """The operators that the CPU computes in place of the device."""
        return [each for each in self.steps if each.note.startswith(FALLS_BACK)]

    def ranking(self, count: int = 10) -> list[Step]:
        """The operators with the largest own errors; those that are wrong first, in their order, then those that fall back to the CPU."""
        marked = [each for each in self.steps if each.bad] + [each for each in self.fallen if not each.bad]
        return (marked + sorted((each for each in self.steps if each not in marked and each.own == each.own), key=lambda each: -each.own))[:count]

    def sentences(self) -> str:
        """The finding in three sentences at most."""
        arithmetic = [each for each in self.steps if each.own == each.own]
        what = self.level.removesuffix("s")
        why = "the device does not compute any more" if self.gone else "the time was over"
        over = f" {self.unseen} more were not looked at: {why}." if self.unseen else ""
        if self.gone and self.first is None:
            looked = f"while {len(self.steps)} {self.level} were looked at and none of them raised, so none is named"
            return f"The device stopped computing {looked}: {self.gone}."
        if not self.steps:
            return f"Nothing was looked at.{over}" if self.unseen else f"Nothing was looked at: the model calls no {what} of its own."
        if self.first is None:
            largest = max(arithmetic, key=lambda each: each.own, default=None)
            said = f"No {what} is wrong: each of {len(self.steps)} is within its floor with the CPU's inputs.{over}"
            if self.otherwise:
                return (
                    f"{said} But the model is another where torch_npu is: what it gives on the CPU of this process is {self.otherwise:.2e} away from what it gives in one without, "
                    "which the row is held against (transformers turns masks that are not boolean around)."
                )
            if self.fallen:
                said += f" {len(self.fallen)} fell back to the CPU, the first is {self.fallen[0].name} ({self.fallen[0].note.removeprefix(FALLS_BACK + ': ')})."
            if largest is None or not largest.own:
                return said
            return f"{said} The largest own difference is {largest.own:.2e}, {largest.name}{f': {largest.cause}' if largest.cause else ''}."
        others = sum(each.bad for each in self.steps) - 1 if self.level == "operators" else 0
        said = f"{self.first.name} is the first wrong {what}: {self.first.reasons[0]}."
        said += f" {self.first.cause[0].upper()}{self.first.cause[1:]}." if self.first.cause else ""
        if self.level == "modules":
            return said + over
        if self.gone:
            return said + over
        return said + (f" {others} more are wrong by themselves." if others else " No other operator is wrong by itself: what comes after inherits.") + over


def ended(device: Device, at: str) -> str:
    """What `device.check` says of a device that computes no more; "" of one that does."""
    try:
        device.check(at)
    except DeviceError as error:
        return str(error)
    return ""


def raised(error: Exception) -> str:
    """What the device raised, as a reason of the operator that ran."""
    fault = fault_in(str(error))
    return f"the device raised {summary(error)}" + (f" ({fault.sentence})" if fault else "")


def kind_of(results: list[Tensor]) -> dict[str, Any]:
    """The dtype and the shape of the largest result, as a step says them."""
    largest = max(results, key=lambda each: each.numel())
    return {"dtype": str(largest.dtype).removeprefix("torch."), "shape": tuple(largest.shape)}
