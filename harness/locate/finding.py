"""What locating found: every operator that was looked at, the first that is wrong, and the sentences that say so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.devices import Device
from harness.devices.device_errors import error_summary, fault_in
from harness.errors import DeviceError
from harness.reference import roundoff

FALLS_BACK = "the CPU computes it in place of the device"
RANDOM = "random: the device goes on with the CPU's numbers"
GRADIENT = "a gradient: looked at with backward"
TRANSFORMED = "inside of a transform of torch.func (vmap, grad): not looked at by itself"


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
    kind: str = "operator"  # or "module"; "path": the device runs others; "memory": it wrote what it must not; "raise";
    # "value": from it on values are others; "gradient": gradients are

    @property
    def bad(self) -> bool:
        return bool(self.reasons)

    @property
    def name(self) -> str:
        """Where it is: "trunk.blocks.3.mlp.fc2: linear (aimv2.py:212)"."""
        return f"{self.module or 'the model'}: {self.operator}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """What the row shows that is to be located."""

    fails: bool = True
    error: str = ""  # of a row that is an ERROR: its reason
    away: float = (
        math.nan
    )  # relative L2 difference of its outputs to the CPU's, the largest; infinite where NaN or Inf differ
    scatters: bool = False  # its two runs on the device differ


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
    # Relative L2 difference of the CPU's output in this process to that in one without torch_npu.
    otherwise: float = 0.0
    replay: Any = field(default=None, repr=False)  # of the first, to make a repro of
    row: Symptom | None = None  # None: nothing is known of a row
    followed: float = math.nan  # relative L2 difference of the outputs that the CPU's calls give on the device
    cut: str = ""  # the first call from which on the device had the CPU's numbers: nothing was followed to the end
    plain: float = math.nan  # the same of a run of the model on the device by itself; NaN where there was none
    sound_paths: int = 0  # modules in which the device takes another path and is within its floor
    shown: str = ""  # the first call of that run that is given what is wrong already and no call returned
    unwatched: int = 0  # calls of that run whose memory was not compared, because it is large or the time was over

    @property
    def first(self) -> Step | None:
        """The first operator whose own error is above its floor; of modules the innermost.

        Where no operator is: the first operator that writes what it must not, else the one from which on the device
        takes another path that is wrong, else the first wrong module.
        """
        bad = [step for step in self.steps if step.bad]
        if not bad:
            return None
        if bad[0].kind != "module":
            return bad[0]
        result = bad[0]
        while inner := [item for item in bad if _is_in(item.module, result.module)]:
            result = inner[0]
        return result

    @property
    def has_gradients(self) -> bool:
        """Whether the model takes gradients itself, which only `backward` looks into."""
        return any(step.note == GRADIENT for step in self.steps)

    @property
    def fallen(self) -> list[Step]:
        """The operators that the CPU computes in place of the device."""
        return [step for step in self.steps if step.note.startswith(FALLS_BACK)]

    @property
    def operators(self) -> int:
        """How many operators were looked at one by one."""
        return sum(step.kind == "operator" and step.note != TRANSFORMED for step in self.steps)

    @property
    def away(self) -> float:
        """What is to be explained, relative L2: the row's difference where it is known, else that of a run of its
        own.
        """
        return self.row.away if self.row is not None and self.row.away == self.row.away else self.plain

    @property
    def came_back(self) -> bool:
        """Whether the row's fault showed while it was looked for, as far as can be told."""
        if self.row is None or not self.row.fails:
            return True
        if self.row.error:
            return any(step.bad and math.isinf(step.own) for step in self.steps)
        return not self.plain < self.row.away * _SHARE

    @property
    def explained(self) -> bool:
        """Whether the operators that the CPU calls give the row's difference on the device too, as far as can be
        told.
        """
        if self.row is None and self.plain <= _ROUNDINGS * roundoff(getattr(torch, self.dtype)):
            return True  # roundings, as another path has other ones
        return not self.cut and not self.followed < self.away * _SHARE

    @property
    def comes_and_goes(self) -> bool:
        """Whether two runs of the row, or of its first wrong operator, differ: no two differences are of one fault."""
        scatters = self.row is not None and self.row.scatters
        return scatters or (self.first is not None and RUN_TO_RUN in self.first.cause)

    @property
    def transformed(self) -> int:
        """How many calls run inside of a transform, where no level can look at one call."""
        return sum(step.note == TRANSFORMED for step in self.steps)

    def ranking(self, count: int = 10) -> list[Step]:
        """The operators with the largest own errors; those that are wrong first, in their order, then those that fall
        back to the CPU.
        """
        marked = [step for step in self.steps if step.bad] + [item for item in self.fallen if not item.bad]
        return (
            marked
            + sorted(
                (step for step in self.steps if step not in marked and step.own == step.own),
                key=lambda value: -value.own,
            )
        )[:count]

    def sentences(self) -> str:
        """The finding in a few sentences."""
        what = self.level.removesuffix("s")
        why = "the device does not compute any more" if self.gone else "the time was over"
        over = f" {self.unseen} more were not looked at: {why}." if self.unseen else ""
        if self.gone and self.first is None:
            looked = f"while {len(self.steps)} {self.level} were looked at and none of them raised, so none is named"
            return f"The device stopped computing {looked}: {self.gone}."
        if not self.steps:
            none = (
                f"{why} before the first of {self.unseen}" if self.unseen else f"the model calls no {what} of its own"
            )
            return f"Nothing was looked at: {none}."
        if self.first is None:
            return self._of_nothing(what, over)
        text = self._of_first(what, over)
        error = self.row is not None and self.row.error and not self.came_back and self.first.kind != "operator"
        return f"{text} {self._gone_error()}" if error else text

    def _of_first(self, what: str, over: str) -> str:
        first = self.first
        more = [step for step in self.steps if step.bad and step.kind == first.kind]
        cause = f" {first.cause[0].upper()}{first.cause[1:]}." if first.cause else ""
        reason = first.reasons[0].rstrip(".")
        if first.kind == "path":
            others = f" So do {len(more) - 1} more modules." if len(more) > 1 else ""
            return (
                f"{first.name}: the model takes another path on the device, and a wrong one: {reason}.{others} "
                f"{self._sound()}{over}"
            )
        if first.kind in ("value", "gradient"):
            where = f"is where the device's {first.kind}s become others than the CPU's"
            return f"{first.name} {where}: {reason}. {self._sound()}{over}"
        if first.kind == "raise":
            return (
                f"{first.name} is what raises when the model runs on the device by itself: {reason}.{cause} "
                f"{self._sound()}{over}"
            )
        if first.kind == "module" and self.level != "modules":
            return f"{self._unexplained()} {first.name} is the first wrong module: {reason}.{over}"
        text = f"{first.name} is the first wrong {what}: {reason}.{cause}"
        if first.kind == "module" or self.gone:
            return text + over
        if first.kind == "memory":
            return f"{text} {self._sound()}{over}"
        return f"{text}{self._of_others(len(more) - 1)}{self._left()}{over}"

    def _of_others(self, others: int) -> str:
        if others:
            return f" {others} more are wrong by themselves."
        return "" if self._besides() else " No other operator is wrong by itself: what comes after inherits."

    def _besides(self) -> list[Step]:
        """What else is wrong than operators by themselves."""
        return [step for step in self.steps if step.bad and step.kind != "operator"]

    def _left(self) -> str:
        """What is said where the operators that are wrong by themselves do not explain the row."""
        besides = "".join(f" Besides, {beside.name}: {beside.reasons[0]}." for beside in self._besides()[:1])
        if not self.came_back and self.row is not None and self.row.error:
            return f" {self._gone_error()}"
        if self.explained or self.cut or self.comes_and_goes or math.isnan(self.away):
            return besides
        more = "" if besides else ": there is more that is wrong"
        return f" The operators that the CPU runs give {self._share()} on the device{more}.{besides}"

    def _share(self) -> str:
        of = "the row's" if self.row is not None and self.row.away == self.row.away else "a plain run's"
        return f"a difference of {self.followed:.2e} of {of} {self.away:.2e}"

    def _sound(self) -> str:
        text = f"None of the {self.operators} operators that the CPU runs is wrong with the CPU's inputs."
        text = text if self.operators else "No operator was looked at by itself."
        if not self.transformed:
            return text
        return f"{text} {self.transformed} calls were not looked at by themselves: {TRANSFORMED.partition(':')[0]}."

    def _unexplained(self) -> str:
        """The sentence of a row whose error no operator explains, or of which that was not measured."""
        shown = f" The first call that shows it is {self.shown}." if self.shown else ""
        if self.cut:
            goes_on = f"from {self.cut} on the device had the CPU's numbers"
            return f"{self._sound()} What they give together was not measured: {goes_on}.{shown}"
        return f"{self._sound()} Together they give {self._share()}: its error is elsewhere.{shown}"

    def _gone_error(self) -> str:
        places = re.search(r"; ((?:raised|noticed) in [^;]+)", self.row.error)
        where = f", {places.group(1)}," if places else ""
        return (
            f"The row's error{where} did not come back: nothing raised, neither operator by operator nor in a run of "
            "its own."
        )

    def _of_nothing(self, what: str, over: str) -> str:
        largest = max((step for step in self.steps if step.own == step.own), key=lambda value: value.own, default=None)
        text = f"No {what} is wrong: each of {len(self.steps)} is within its floor with the CPU's inputs.{over}"
        if self.otherwise:
            return (
                f"{text} But the model is another where torch_npu is: what it gives on the CPU of this process "
                f"is {self.otherwise:.2e} away from what it gives in one without, "
                "which the row is held against (transformers turns masks that are not boolean around)."
            )
        if not self.came_back:
            return (
                f"{self._not_again()} {self._sound()}{over}"
                if self.level != "modules"
                else f"{self._not_again()}{over}"
            )
        if not self.explained:
            paths = (
                f" {self.sound_paths} modules take another path on the device and are within their floors."
                if self.sound_paths
                else ""
            )
            look = INSIDE if self.transformed else LOOK
            return f"{self._unexplained()}{paths}{COMES_AND_GOES if self.comes_and_goes else look}{over}"
        if self.fallen:
            text += (
                f" {len(self.fallen)} fell back to the CPU, the first is {self.fallen[0].name} "
                f"({self.fallen[0].note.removeprefix(FALLS_BACK + ': ')})."
            )
        if largest is None or not largest.own:
            return text
        return (
            f"{text} The largest own difference is {largest.own:.2e}, "
            f"{largest.name}{f': {largest.cause}' if largest.cause else ''}."
        )

    def _not_again(self) -> str:
        """What is said of a fault that did not show again."""
        if self.row.error:
            return self._gone_error()
        scatter = " Its own two runs differ too." if self.row.scatters else ""
        return (
            f"The fault did not come back: the row differs from the CPU by {self.row.away:.2e}, the same run while "
            f"locating by {self.plain:.2e}.{scatter}"
        )


_ROUNDINGS = 16  # that a run by itself may differ by where nothing says that it is wrong
RUN_TO_RUN = "differs from run to run"  # the cause of an operator that gives other numbers each time
COMES_AND_GOES = " The row's own two runs differ: its fault comes and goes, and did not show in one operator here."
INSIDE = " Look at what is inside of the transform: let the case's forward make these calls one by one."
_SHARE = 0.5  # of the row's difference that must be found again for it to be explained
LOOK = (
    " Look at what the model does outside of torch's functions: code of its own that leaves the device, "
    "extensions in C++, "
    "paths that torch takes only without such a look (MultiheadAttention's fast path)."
)


def _is_in(path: str, other: str) -> bool:
    """Whether a module is part of another one."""
    return path != other and (not other or path.startswith(f"{other}."))


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
    return f"the device raised {error_summary(error)}" + (f" ({fault.sentence})" if fault else "")


def kind_of(results: list[Tensor]) -> dict[str, Any]:
    """The dtype and the shape of the largest result, as a step says them."""
    largest = max(results, key=lambda tensor: tensor.numel())
    return {"dtype": str(largest.dtype).removeprefix("torch."), "shape": tuple(largest.shape)}
