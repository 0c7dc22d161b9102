"""What the calls of one run are given and return: where tensors come from, who wrote into them, their content.

A sketch is small enough to be kept of every call, and two of them tell how far apart two tensors are, relative L2, to
about a tenth: sums of the elements with random signs (the count sketch of Charikar, Chen and Farach-Colton, 2002).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.locate.calls import Call, call_of, calling_line
from harness.locate.replay import FAILS, name_of, running_statistics, tensors_in, trains
from harness.reference import version
from harness.torch_private import WeakTensorKeyDictionary, custom_function, in_transform

READS = ("item", "tolist", "float", "int", "bool", "index", "complex")  # calls that give Python's numbers
_LANES, PERIOD = 256, 1 << 20  # sums of a sketch; elements after which the signs repeat, in another order of the sums
_ROWS = 2048  # sketches whose sums lie in one table


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The content of a tensor, in short."""

    sums: Tensor  # (LANES,) float64
    norm: float
    odd: int  # elements that are NaN or infinite
    shape: tuple[int, ...]


def sketch_of(tensor: Tensor) -> Sketch | None:
    """A sketch of a tensor on any device; None of one whose content cannot be read.

    Example: `apart(sketch_of(x), sketch_of(x * 1.01))` is about 0.01.
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta" or in_transform():
        return None
    try:
        return _sketch(tensor.detach().to("cpu").reshape(-1), tuple(tensor.shape))
    except FAILS:
        return None


def _sketch(flat: Tensor, shape: tuple[int, ...]) -> Sketch:
    flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    wide = torch.float64 if flat.dtype == torch.float64 or not flat.is_floating_point() else torch.float32
    sums, square, odd = torch.zeros(_LANES, dtype=torch.float64), 0.0, 0
    for number, part in enumerate(flat.split(PERIOD)):
        part = part.to(wide)
        norm = float(torch.linalg.vector_norm(part, dtype=torch.float64))
        if not math.isfinite(norm):
            finite = part.isfinite()
            odd += part.numel() - int(finite.sum())
            part = torch.where(finite, part, 0.0)
            norm = float(torch.linalg.vector_norm(part, dtype=torch.float64))
        square += norm**2
        signed = _room(wide, threading.get_ident())[: len(part) + -len(part) % _LANES]
        signed[len(part) :] = 0.0
        torch.mul(part, _signs(wide)[: len(part)], out=signed[: len(part)])
        sums += signed.view(-1, _LANES).sum(0, dtype=torch.float64).roll(number)
    return Sketch(sums=_stored(sums), norm=math.sqrt(square), odd=odd, shape=shape)


def _stored(sums: Tensor) -> Tensor:
    """Sums in a row of a table: many small tensors that stay would leave the memory between them in pieces."""
    if not _rows:
        _rows.extend(torch.empty(_ROWS, _LANES, dtype=torch.float64).unbind())
    return _rows.pop().copy_(sums)


_rows: list[Tensor] = []  # free ones, of the last table


@functools.cache
def _room(dtype: torch.dtype, thread: int) -> Tensor:
    """`PERIOD` elements to compute in: memory that came and went between the sketches that are kept would be in
    pieces.
    """
    return torch.empty(PERIOD, dtype=dtype)


@functools.cache
def _signs(dtype: torch.dtype) -> Tensor:
    """`PERIOD` random signs, the same in every process."""
    generator = torch.Generator().manual_seed(20261126)
    return torch.randint(0, 2, (PERIOD,), generator=generator).to(dtype) * 2 - 1


def sketch_difference(actual: Sketch | None, expected: Sketch | None) -> float:
    """How far two tensors lie apart by their sketches, relative L2; NaN where a sketch is missing.

    Infinite where shapes or the counts of NaN and Inf differ.
    """
    if actual is None or expected is None:
        return math.nan
    if actual.shape != expected.shape or actual.odd != expected.odd:
        return math.inf
    away = float(torch.linalg.vector_norm(actual.sums - expected.sums))
    if not away:
        return 0.0
    return away / expected.norm if expected.norm else math.inf


TensorKey = tuple[int, int] | str  # of a tensor: the call that returned it and the number of the result, or its name


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A call through which no gradient flows back."""

    call: Call
    kind: str  # the operator
    number: int | None  # of the call, None of one that is not recorded, as detach


@dataclass(frozen=True, kw_only=True)
class TensorOrigin:
    """Where a tensor comes from: a call and the number of its result, or a name where no call returned it."""

    call: int | None = None
    number: int = 0
    name: str = ""  # "the weight fc.weight"; "" with no call: nobody knows
    since: int = 0  # the calls of the run before it was there
    before: tuple[int, ...] = ()  # calls that had written into what it is a copy of
    copied: str = ""  # the call that copied it, "clone (vit.py:3)"

    @property
    def key(self) -> TensorKey:
        return self.name if self.call is None else (self.call, self.number)


@dataclass(frozen=True, kw_only=True)
class Given:
    """A tensor that a call was given."""

    origin: TensorOrigin
    writers: tuple[int, ...]  # calls that wrote into it since it was returned
    content: Sketch | None  # where somebody wrote, or nobody knows where it comes from


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one call was given and returned."""

    given: tuple[Given, ...]
    results: tuple[Sketch | None, ...]


class Trace:
    """Records the calls of one run of `model`, with what they are given and return where it is `sketching`."""

    def __init__(self, model: nn.Module, inputs: Any, *, sketching: bool = True):
        self.calls: list[Call] = []
        self.seen: list[Seen] = []  # of each call
        self.outputs: tuple[Given, ...] = ()
        self.sketching, self.time = sketching, 0
        self.reads = False  # whether the model makes Python numbers of tensors
        self.origins = WeakTensorKeyDictionary()
        self.writes: dict[int, list[tuple[int, int]]] = {}  # by the address of a storage: when, and which call
        named = [*model.named_parameters(), *model.named_buffers()]
        self.constants = {f"the weight {name}": item for name, item in named}
        self.constants |= {f"input {number}": tensor for number, tensor in enumerate(tensors_in(inputs))}
        for name, constant in self.constants.items():
            self.origins[constant] = TensorOrigin(name=name)
        self.flows: dict[TensorKey, list[Sketch | None]] = {}  # the gradients that came to a tensor
        self.cuts: dict[TensorKey, list[Cut]] = {}  # what takes a tensor and lets no gradient through to it
        self.functions: dict[
            TensorKey, str
        ] = {}  # the torch.autograd.Function of the model's own that returned a tensor
        self.hooks = WeakTensorKeyDictionary()
        self.weights = WeakTensorKeyDictionary()
        for name, item in named:
            self.weights[item] = name

    def before(self, func: Callable, given: Iterable[Tensor]) -> list[tuple[Tensor, int, Given]]:
        """What is kept of a call before it is made."""
        if not self.sketching or in_transform():
            return []
        self.reads = self.reads or name_of(func) in READS
        reading = getattr(func, "__name__", "") != "__get__"  # a property reads no content
        return [(argument, version(argument), self._given(argument, reading)) for argument in given]

    def _given(self, tensor: Tensor, reading: bool) -> Given:
        origin = self.origins.get(tensor)
        if origin is None:
            origin = self.origins[tensor] = TensorOrigin(since=self.time)
        writers = self._writers(tensor, origin)
        unknown = origin.call is None and not origin.name
        self._follow_gradient(tensor, origin)
        content = sketch_of(tensor) if reading and (writers or unknown) else None
        return Given(origin=origin, writers=writers, content=content)

    def _writers(self, tensor: Tensor, origin: TensorOrigin) -> tuple[int, ...]:
        address = _address(tensor)
        since = [call for time, call in self.writes.get(address, ()) if time > origin.since] if address else []
        return (*origin.before, *dict.fromkeys(since))

    def after(self, before: list, func: Callable, args: tuple, kwargs: dict, results: list[Tensor], module: str,
              wrote: str = "") -> None:  # fmt: skip
        """Record a call that was made; `wrote`: what it changed and must not."""
        self.time += 1
        call = call_of(func, args, kwargs, results, module, wrote, self.weights)
        index = None if call is None else len(self.calls)
        if call is not None:
            self.calls.append(call)
        if not self.sketching:
            return
        updated = running_statistics(func, args, kwargs) if trains(func, args, kwargs) else []
        for tensor, then, _ in before:
            if index is not None and (version(tensor) != then or any(tensor is item for item in updated)):
                self.writes.setdefault(_address(tensor), []).append((self.time, index))
        given = tuple(item for _, _, item in before)
        if not in_transform():
            for number, result in enumerate(results):
                if not any(result is tensor for tensor, _, _ in before):
                    self.origins[result] = self._origin(func, index, number, given)
                    self._follow_gradient(result, self.origins[result])
            self._note_cut(func, args, kwargs, results, module, index)
        if index is not None:
            self.seen.append(Seen(given=given, results=tuple(sketch_of(result) for result in results)))

    def _origin(self, func: Callable, index: int | None, number: int, given: tuple[Given, ...]) -> TensorOrigin:
        """Where a result comes from; of a call that gives the numbers that it was given: where those come from."""
        if index is not None or not given:
            return TensorOrigin(call=index, number=number, since=self.time)
        first, where = given[0], calling_line()
        by = f"{name_of(func)} ({where})" if where else name_of(func)
        return TensorOrigin(
            call=first.origin.call, number=first.origin.number, name=first.origin.name, since=self.time,
            before=first.writers, copied=by,
        )  # fmt: skip

    def _follow_gradient(self, tensor: Tensor, origin: TensorOrigin) -> None:
        """Sketch the gradients that come to a tensor, of copies that keep its numbers those of the original alone."""
        if not (tensor.requires_grad and torch.is_grad_enabled()) or origin.copied or tensor in self.hooks:
            return
        key, name = origin.key, custom_function(tensor)
        if name:
            self.functions[key] = name

        def keep(gradient: Tensor) -> None:
            self.flows.setdefault(key, []).append(sketch_of(gradient))

        self.hooks[tensor] = tensor.register_hook(keep)

    def _note_cut(
        self, func: Callable, args: tuple, kwargs: dict, results: list[Tensor], module: str, index: int | None
    ) -> None:
        """Note a call of what asks for gradients whose result does not."""
        fractions = [result for result in results if result.is_floating_point()]
        name = name_of(func)
        if not fractions or any(fraction.requires_grad for fraction in fractions) or name == "grad":
            return
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and tensor in self.origins:
                call = Call(operator=name, module=module, line=calling_line(), given=())
                self.cuts.setdefault(self.origins[tensor].key, []).append(Cut(call=call, kind=name, number=index))

    def end(self, outputs: Iterable[Tensor]) -> None:
        """Record what the run returned."""
        self.outputs = tuple(self._given(output, True) for output in outputs) if self.sketching else ()

    def content(self, given: Given) -> Sketch | None:
        """What a call was given: as it was when a call returned it, where nobody has written into it since."""
        origin = given.origin
        if given.content is not None:
            return given.content
        if origin.call is None:
            return sketch_of(self.constants[origin.name]) if origin.name and not given.writers else None
        results = self.seen[origin.call].results
        return results[origin.number] if origin.number < len(results) else None

    def close(self) -> None:
        """Leave the tensors alone: the weights are those of other runs too."""
        for hook in self.hooks.values():
            hook.remove()


def _address(tensor: Tensor) -> int:
    """The address of a tensor's storage, 0 of one without memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except FAILS:
        return 0
