"""Faults on demand: `with fault("aclnnSilu", kind="scale", by=1.001) as planted: …; planted.hits`.

A fault names operators by a pattern and says what goes wrong there: with what they read, with what they answer, or with
the call itself. KINDS says it for each kind. As text, for a command line: "aclnnMatmul:hf32",
"aclnnSilu:scale:by=1.001,nth=3". On a machine with several cards `card` names the one that is broken:
"aclnnSilu:scale:by=1.001,card=3,every=50".
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

KINDS = {
    # what the operator reads
    "hf32": "float32 inputs are rounded to HF32",
    "fp16": "floating inputs are rounded to float16",
    "bf16": "floating inputs are rounded to bfloat16",
    "int8": "the last floating input of several axes, a product's weight, is rounded to 8 bits of its largest element",
    "no_bias": "the last floating input of one axis, the bias of a product, is zero, where another has several axes",
    "mask": "the first bool or uint8 input with several elements is turned around",
    "index": "the first integer input is off by one, else the first integer result",
    # what it answers
    "scale": "the result times `by`",
    "offset": "the result plus `by`",
    "noise": "the result times 1 + `by` times normal noise that no seed repeats",
    "tile": "a block of `size` by `size` of the last two axes is zero, in the first matrix, at row and column `at`",
    "tail": "the last `size` elements are zero",
    "swap_rows": "rows `at` and `at` + 1 change places; a row lies along the last axis",
    "zero_rows": "row `at` is zero",
    "swap_heads": "heads `at` and `at` + 1 change places: axis 1 of four, or the last axis in `heads` parts",
    "zero_heads": "head `at` is zero",
    "copy_heads": "head `at` is that of `at` + 1",
    "half_rows": "the second half of the rows times `by`",
    "channel": "channel `at` times `by`: axis 1 of four, else the last axis",
    "nan": "the element `at` is NaN",
    "inf": "the element `at` is Inf",
    "saturate": "what exceeds `by` is cut to it, NaN is 0; by default the largest float16, Inf included",
    "stale": "nothing is written: the memory keeps what it held",
    # the call itself
    "unwritten": "the operator forgets an output, and the runner says so",
    "missing": "the operator is not there",
    "error": "it returns an error with the code `code`",
    "hang": "it takes `seconds` more; by default a day",
    "crash": "the process dies of a segmentation fault",
    "oom": "it asks for a workspace that no device has",
    "lost": "it returns an error as of a card that is lost, and from then on so does every operator on that card, in "
    "other processes that play this machine too",
}
ON_INPUTS = ("hf32", "fp16", "bf16", "int8", "no_bias", "mask", "index")
ROUNDED = ("hf32", "fp16", "bf16")  # kinds that round every floating input, those in a list too
LAST = ("int8", "no_bias")  # kinds that change the last fitting input alone
ON_CALL = ("unwritten", "missing", "error", "hang", "crash", "oom", "lost")
LOST = 507899  # ACL_ERROR_RT_DRV_INTERNAL_ERROR: the driver no longer reaches the card
WORKSPACE = 1 << 50  # bytes that no device has


@dataclass
class Fault:
    """One planted fault: the operators it acts on, what it does there, and how often it did.

    Raises: ValueError for a kind or a setting that there is not.
    """

    pattern: str
    kind: str
    by: float | None = None  # factor, summand, relative size of the noise, or limit, by kind; None: 1, 1, 1e-3, 65504
    at: int = 0  # flat index of an element; row, head or tile
    size: int = 16  # of a tile or a tail, in elements
    heads: int | None = None  # in the last axis of a result that is not (B, H, N, D)
    output: int | None = None  # which result; None: the largest floating one
    code: int = 507011
    seconds: float = 86400.0
    nth: int | None = None  # only the nth call that matches, counted from 1; None: every one
    every: int | None = None  # the calls that match whose number is a multiple of it; None: every one
    card: int | None = None  # only on this card of the machine, counted from 0; None: on every one
    probability: float = 1.0  # of each call that matches, drawn from `seed`
    seed: int = 0
    calls: int = 0  # that matched
    hits: int = 0  # on which it acted
    when_first: Callable[[], None] | None = field(default=None, repr=False)  # is called when it first acts
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"no kind of fault is called {self.kind!r}; there are {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of a fault lies between 0 and 1, not at {self.probability}")
        if self.nth is not None and self.nth < 1:
            raise ValueError(f"calls are counted from 1, so nth={self.nth} never comes")
        if self.every is not None and self.every < 1:
            raise ValueError(f"calls are counted from 1, so every={self.every} never comes")
        if self.card is not None and self.card < 0:
            raise ValueError(f"cards are counted from 0, so there is no card={self.card}")
        if self.size < 1 or self.at < 0:
            raise ValueError(f"a fault lies at 0 or later and is at least 1 wide, not at={self.at}, size={self.size}")
        self._chance = random.Random(self.seed)

    def __str__(self) -> str:
        default = {item.name: item.default for item in fields(self)}
        options = [f"{name}={getattr(self, name)}" for name in FAULT_OPTIONS if getattr(self, name) != default[name]]
        return ":".join([self.pattern, self.kind, *([",".join(options)] if options else [])])

    @property
    def effect(self) -> str:
        """The fault and how often it acted, for a report."""
        return effect_text(str(self), calls=self.calls, hits=self.hits)

    def matches(self, name: str, card: int = 0) -> bool:
        """Whether it acts on this call on a card of the machine; a call that it could act on is counted."""
        if not fnmatchcase(name, self.pattern) or self.card not in (None, card):
            return False
        with self._lock:
            self.calls += 1
            drawn = self._chance.random() < self.probability
            its_turn = self.nth in (None, self.calls) and (self.every is None or self.calls % self.every == 0)
            return drawn and its_turn

    def acted(self) -> None:
        """Count one call on which something is changed, before a crash or a hang ends the process."""
        with self._lock:
            self.hits += 1
            is_first = self.hits == 1
        if is_first and self.when_first is not None:
            self.when_first()


def effect_text(fault: str, *, calls: int, hits: int) -> str:
    """A fault and how often it acted, for a report.

    >>> effect_text("aclnnSilu:nan", calls=4, hits=2)
    'aclnnSilu:nan (acted on 2 of the 4 calls that it matches)'
    """
    return f"{fault} (acted on {hits} of the {calls} calls that it matches)"


def idle_text(planted: Fault) -> str:
    """What is said of a fault that never acted, with the operator of the nearest name where there is none of its
    own.
    """
    from harness.emulator.table import OLDER, OPERATORS  # filled where an emulated CANN is installed

    names = {*OPERATORS, *OLDER}
    if not names or any(fnmatchcase(name, planted.pattern) for name in names):
        return f"{planted} never acted: none of the operators that it names ran, or there was nothing to change"
    nearest = get_close_matches(planted.pattern, sorted(names), n=1, cutoff=0.0)[0]
    said = f"no operator of the emulated CANN is called {planted.pattern}; the nearest name is {nearest}"
    return f"{planted} never acted: {said}"


FAULT_OPTIONS = (
    "by",
    "at",
    "size",
    "heads",
    "output",
    "code",
    "seconds",
    "nth",
    "every",
    "card",
    "probability",
    "seed",
)
_TYPES = {"by": float, "seconds": float, "probability": float}


def parse(text: str) -> Fault:
    """A fault from "pattern:kind" or "pattern:kind:name=value,name=value".

    Raises: ValueError for a text that says no fault.
    """
    pattern, _, rest = text.partition(":")
    kind, _, options = rest.partition(":")
    if not pattern or not kind:
        raise ValueError(
            f"a fault is 'operator:kind' or 'operator:kind:name=value,…', such as 'aclnnMatmul:hf32', not {text!r}"
        )
    settings = {}
    for part in filter(None, options.split(",")):
        name, _, value = part.partition("=")
        if name not in FAULT_OPTIONS:
            raise ValueError(f"{text!r}: a fault has no setting {name!r}; there are {', '.join(FAULT_OPTIONS)}")
        try:
            settings[name] = _TYPES.get(name, int)(value)
        except ValueError:
            raise ValueError(f"{text!r}: {name}={value!r} is no number") from None
    return Fault(pattern, kind, **settings)


# -------- where the runner asks


class ActiveFaults:
    """The faults that act on one call; without any, every method gives back what it was given."""

    def __init__(self, faults: list[Fault]):
        self.faults = faults

    def refusal(self, name: str) -> str | None:
        """Why the operator is not there, if it is not."""
        for item in self.faults:
            if item.kind == "missing":
                item.acted()
                return f"{name} is not emulated (a planted fault)"
        return None

    def workspace(self) -> int:
        """Bytes of workspace that the call asks for."""
        for item in self.faults:
            if item.kind == "oom":
                item.acted()
                return WORKSPACE
        return 0

    def before(self) -> None:
        """What happens instead of the computation. Raises: RuntimeError for a planted error."""
        for item in self.faults:
            if item.kind in ("hang", "error", "crash", "lost"):
                item.acted()
                if item.kind == "lost":
                    raise LostCard
                if item.kind == "hang":
                    time.sleep(item.seconds)
                elif item.kind == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                else:
                    raise PlantedError(item.code)

    def read(self, inputs: list) -> list:
        """What the operator gets in place of its inputs."""
        for item in self.faults:
            if item.kind in ON_INPUTS:
                inputs = _on_inputs(item, inputs)
        return inputs

    def answer(self, results: list, outputs: list) -> list:
        """What is written in place of the results; `outputs` are their specifications."""
        for item in self.faults:
            if item.kind == "unwritten":
                item.acted()
                results = [None, *results[1:]]
            elif item.kind not in ON_INPUTS + ON_CALL or item.kind == "index":
                results = _on_results(item, results, outputs)
        return results


class PlantedError(RuntimeError):
    """The error code that a fault asked for."""

    def __init__(self, code: int):
        super().__init__(f"error code {code} (a planted fault)")
        self.code = code


class LostCard(PlantedError):
    """The card on which the operator ran is lost."""

    def __init__(self) -> None:
        super().__init__(LOST)


NONE = ActiveFaults([])
_planted: list[Fault] = []
_suspended: list[None] = []  # one for each block in which faults wait


def for_call(name: str, card: int = 0) -> ActiveFaults:
    """The faults that act on this call of an operator on a card of the machine."""
    if not _planted or _suspended:
        return NONE
    return ActiveFaults([item for item in _planted if item.matches(name, card)])


# -------- inputs


def _on_inputs(fault: Fault, inputs: list) -> list:
    import torch

    if fault.kind in LAST:
        return _on_last(fault, inputs)
    changed = list(inputs)
    for position, value in enumerate(inputs):
        new = None
        if isinstance(value, torch.Tensor):
            new = _INPUTS[fault.kind](value)
        elif fault.kind in ROUNDED and isinstance(value, list):
            new = [_INPUTS[fault.kind](item) if item is not None else None for item in value]
            touched = any(item is not None for item in new)
            both = [old if item is None else item for item, old in zip(new, value)]
            new = both if touched else None
        if new is None:
            continue
        changed[position] = new
        if fault.kind in ("mask", "index"):
            break
    if any(new is not old for new, old in zip(changed, inputs)):
        fault.acted()
    return changed


def _on_last(fault: Fault, inputs: list) -> list:
    """The inputs with the last of those that fit changed; as they are where none fits or there is nothing to change."""
    import torch

    tensors = {position: input_ for position, input_ in enumerate(inputs) if isinstance(input_, torch.Tensor)}
    floating = {position: tensor for position, tensor in tensors.items() if tensor.is_floating_point()}
    several = [position for position, tensor in floating.items() if tensor.dim() > 1 and tensor.numel()]
    fitting = (
        several if fault.kind == "int8" else [position for position, tensor in floating.items() if tensor.dim() == 1]
    )
    if not several or not fitting or not bool(floating[fitting[-1]].any()):
        return inputs
    value = floating[fitting[-1]]
    fault.acted()
    new = _int8(value) if fault.kind == "int8" else torch.zeros_like(value)
    return [*inputs[: fitting[-1]], new, *inputs[fitting[-1] + 1 :]]


def _int8(value):
    step = value.double().abs().amax() / 127
    return ((value.double() / step).round() * step).to(value.dtype)


def _hf32(value):
    import torch

    from harness.numerics import round_hf32

    return round_hf32(value) if value.dtype == torch.float32 else None


def _fp16(value):
    import torch

    return value.half().to(value.dtype) if value.is_floating_point() and value.dtype != torch.float16 else None


def _bf16(value):
    import torch

    return value.bfloat16().to(value.dtype) if value.is_floating_point() and value.dtype != torch.bfloat16 else None


def _mask(value):
    import torch

    return (
        value.logical_not().to(value.dtype) if value.dtype in (torch.bool, torch.uint8) and value.numel() > 1 else None
    )


def _index(value):
    import torch

    if (
        value.dtype not in (torch.int32, torch.int64)
        or not value.numel()
        or (int(value.max()) == 0 and value.numel() == 1)
    ):
        return None
    return torch.where(value < value.max(), value + 1, (value - 1).clamp(min=0))


_INPUTS = {"hf32": _hf32, "fp16": _fp16, "bf16": _bf16, "mask": _mask, "index": _index}


# -------- results


def _on_results(fault: Fault, results: list, outputs: list) -> list:
    import torch

    integer = fault.kind == "index"
    if integer and fault.hits and fault.hits >= fault.calls:
        return results  # an index that was read is off already
    fitting = [
        position
        for position, value in enumerate(results)
        if isinstance(value, torch.Tensor)
        and value.numel()
        and (value.dtype in (torch.int32, torch.int64) if integer else True)
    ]
    if not fitting or (fault.output is not None and fault.output not in fitting):
        return results
    floating = [position for position in fitting if results[position].is_floating_point()]
    chosen = (
        fault.output
        if fault.output is not None
        else max(floating or fitting, key=lambda position: results[position].numel())
    )
    new = _index(results[chosen]) if integer else _RESULTS[fault.kind](fault, results[chosen], outputs[chosen])
    if new is None:
        return results
    fault.acted()
    return [*results[:chosen], new, *results[chosen + 1 :]]


def _default(fault: Fault, value: float) -> float:
    return value if fault.by is None else fault.by


def _scale(fault, result, spec):
    return (result.double() * _default(fault, 1.0)).to(result.dtype)


def _offset(fault, result, spec):
    return (result.double() + _default(fault, 1.0)).to(result.dtype)


def _noise(fault, result, spec):
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
    factor = 1 + _default(fault, 1e-3) * torch.randn(result.shape, generator=generator, dtype=torch.float64)
    return (result.double() * factor).to(result.dtype)


def _element(number):
    def change(fault, result, spec):
        if fault.at >= result.numel() or not result.is_floating_point():
            return None
        changed = result.contiguous().clone()
        changed.view(-1)[fault.at] = number
        return changed

    return change


def _tile(fault, result, spec):
    changed = result.contiguous().clone()
    matrix = changed.view(-1, *(changed.shape[-2:] if changed.dim() > 1 else (1, changed.numel())))[0]
    block = slice(fault.at, fault.at + fault.size)
    if not matrix[block, block].numel():
        return None
    matrix[block, block] = 0
    return changed


def _tail(fault, result, spec):
    changed = result.contiguous().clone()
    changed.view(-1)[-fault.size :] = 0
    return changed


def _rows(result):
    return result.view(-1, result.shape[-1]) if result.dim() else result.view(1, 1)


def _heads(fault, result):
    """The heads of a result as a view with the head in front, None where it has none."""
    if result.dim() == 4:
        return result.transpose(0, 1)
    if fault.heads and result.dim() and result.shape[-1] % fault.heads == 0:
        return result.unflatten(-1, (fault.heads, -1)).movedim(-2, 0)
    return None


def _parts(of, swap: bool):
    def change(fault, result, spec):
        changed = result.contiguous().clone()
        parts = of(fault, changed)
        if parts is None or parts.shape[0] <= fault.at + swap:
            return None
        if swap:
            first = parts[fault.at].clone()
            parts[fault.at] = parts[fault.at + 1]
            parts[fault.at + 1] = first
        else:
            parts[fault.at] = 0
        return changed

    return change


def _copy_heads(fault, result, spec):
    changed = result.contiguous().clone()
    heads = _heads(fault, changed)
    if heads is None or heads.shape[0] <= fault.at + 1:
        return None
    heads[fault.at] = heads[fault.at + 1]
    return changed


def _half_rows(fault, result, spec):
    changed = result.contiguous().clone()
    rows = _rows(changed)
    if rows.shape[0] < 2:
        return None
    rows[rows.shape[0] // 2 :] = _scale(fault, rows[rows.shape[0] // 2 :], spec)
    return changed


def _channel(fault, result, spec):
    changed = result.contiguous().clone()
    axis = 1 if changed.dim() == 4 else changed.dim() - 1
    if axis < 0 or changed.shape[axis] <= fault.at:
        return None
    one = changed.select(axis, fault.at)
    one.copy_(_scale(fault, one, spec))
    return changed


def _saturate(fault, result, spec):
    limit = _default(fault, 65504.0)
    changed = (
        result.nan_to_num(0.0, math.inf, -math.inf).clamp(-limit, limit)
        if result.is_floating_point()
        else result.clamp(-limit, limit)
    )
    return changed.to(result.dtype) if not changed.equal(result) else None


def _stale(fault, result, spec):
    return spec.view().clone().reshape(result.shape) if spec is not None and spec.numel == result.numel() else None


_RESULTS = {
    "scale": _scale,
    "offset": _offset,
    "noise": _noise,
    "tile": _tile,
    "tail": _tail,
    "nan": _element(math.nan),
    "inf": _element(math.inf),
    "swap_rows": _parts(lambda fault, result: _rows(result), swap=True),
    "zero_rows": _parts(lambda fault, result: _rows(result), swap=False),
    "swap_heads": _parts(_heads, swap=True),
    "zero_heads": _parts(_heads, swap=False),
    "saturate": _saturate,
    "stale": _stale,
    "copy_heads": _copy_heads,
    "half_rows": _half_rows,
    "channel": _channel,
}


# -------- planting


def plant(planted: Fault) -> None:
    """Plant a fault until it is removed, or for the rest of the process."""
    _planted.append(planted)


def remove(planted: Fault) -> None:
    """Take a fault away again; what was launched before still meets it."""
    _drain()
    _planted.remove(planted)


@contextmanager
def suspended():
    """Let every fault wait while the block runs: for a look at whether the device answers at all."""
    _suspended.append(None)
    try:
        yield
    finally:
        _suspended.pop()


@contextmanager
def fault(pattern: str, kind: str, **options):
    """Plant a fault in the operators whose name matches (as file names do) while the block runs.

    Raises: ValueError for an unknown kind or setting.
    """
    planted = Fault(pattern, kind, **options)
    plant(planted)
    try:
        yield planted
    finally:
        remove(planted)


def planted() -> tuple[Fault, ...]:
    """The faults that are planted now."""
    return tuple(_planted)


def _drain() -> None:
    """Wait for the queue: an operator is captured when it is called or later, in the queue's thread."""
    import torch

    if hasattr(torch, "npu") and torch.npu.is_initialized():
        with suppress(RuntimeError):  # of an operator that failed: whoever waits for its result is told
            torch.npu.synchronize()
