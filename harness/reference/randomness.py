"""Random numbers of a run: all generators are seeded alike, and what a model draws is drawn on the CPU for every side.

A model that samples is compared as well as any other that way: `mean + std * torch.randn_like(mean)` gets one noise on
the CPU, in float64, under the forecast's rules and on the device.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy.random  # here: a model that imports it first would draw unseeded numbers
import torch
from torch import Tensor

from harness.torch_private import TorchDispatchMode, aten_operator, in_threads, tree_map


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How a run draws its random numbers.

    `seed` is that of every generator. With `alike` the operators that draw run on the CPU, whatever the tensor's
    device; where `dtype` is a half one, or float32, they draw in float32, so that a float64 run gets those numbers
    too, rounded to `dtype`.
    """

    seed: int
    dtype: torch.dtype
    alike: bool


@dataclass(kw_only=True)
class Drawn:
    """What a run drew."""

    operators: list[str] = field(default_factory=list)  # that were drawn on the CPU for this side
    host: bool = False  # whether torch's generator of the CPU was used
    there: bool = False  # whether the device's own generator was used

    @property
    def any(self) -> bool:
        """Whether the model drew from a generator of torch."""
        return self.host or self.there or bool(self.operators)


@contextlib.contextmanager
def seeded(seed: int, *generators: torch.Generator) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, and `generators`; afterwards all are as they were."""
    ours = (torch.default_generator, *generators)  # torch.manual_seed would import the compiler, which takes seconds
    states, python = [item.get_state() for item in ours], random.getstate()
    legacy = numpy.random.get_state()
    try:
        random.seed(seed)
        for item in ours:
            item.manual_seed(seed)
        numpy.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(python)
        for item, state in zip(ours, states):
            item.set_state(state)
        numpy.random.set_state(legacy)


@contextlib.contextmanager
def drawing(draws: Draws, device: torch.Generator | None = None) -> Iterator[Drawn]:
    """Seed every generator for one run, hand over what is drawn, and note what was. `device`: the device's generator.

    Example: `with drawing(Draws(seed=42, dtype=torch.float32, alike=True)) as drawn: model(inputs)`.
    """
    drawn, generators = Drawn(), () if device is None else (device,)
    with seeded(draws.seed, *generators):
        before = [generator.get_state() for generator in (torch.default_generator, *generators)]
        with in_threads(lambda: _Alike(draws, drawn)) if draws.alike else contextlib.nullcontext():
            yield drawn
        moved = [
            not torch.equal(generator.get_state(), state)
            for generator, state in zip((torch.default_generator, *generators), before)
        ]
        drawn.host, drawn.there = moved[0], any(moved[1:])


class _Alike(TorchDispatchMode):
    """Draws on the CPU what an operator draws, in one dtype for every side, and hands it to the tensor's device.

    Operators that draw inside a kernel (fused attention with dropout, rrelu) are left to the device.
    """

    def __init__(self, draws: Draws, drawn: Drawn):
        super().__init__()
        self.dtype, self.drawn = draws.dtype, drawn
        self.twins: dict[int, tuple[torch.Generator, torch.Generator]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        draw = _DRAWS.get(getattr(func, "overloadpacket", None))
        if draw is None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if func.name() not in self.drawn.operators:
            self.drawn.operators.append(func.name())
        generator = self._twin(kwargs.pop("generator", None)) if "generator" in kwargs else None
        return draw(self, func, args, kwargs, generator)

    def _twin(self, generator: torch.Generator | None) -> torch.Generator | None:
        """A generator of the CPU that was seeded as the model's own one on a device."""
        if generator is None or generator.device.type == "cpu":
            return generator
        if id(generator) not in self.twins:
            self.twins[id(generator)] = generator, torch.Generator().manual_seed(generator.initial_seed())
        return self.twins[id(generator)][1]

    def drawn_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which numbers for a tensor of `dtype` are drawn."""
        wide = self.dtype == torch.float64
        if dtype.is_complex:
            return torch.complex128 if wide else torch.complex64
        if not dtype.is_floating_point:
            return dtype
        return torch.float64 if wide else torch.float32

    def narrow(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose numbers a tensor of `dtype` gets: float64 stands for the case's dtype."""
        return self.dtype if dtype == torch.float64 else dtype

    def fit(self, numbers: Tensor, dtype: torch.dtype, device: torch.device, below: float | None = None) -> Tensor:
        """Drawn numbers in a dtype on a device; uniform ones stay under `below`, to which a half dtype may round."""
        narrow = self.narrow(dtype)
        numbers = numbers.to(narrow)
        if below is not None and narrow.is_floating_point and numbers.numel():
            least = below - abs(below) * torch.finfo(narrow).eps / 2
            numbers = torch.where(numbers >= below, torch.tensor(least, dtype=narrow), numbers)
        return numbers.to(dtype).to(device)

    def uniform(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Numbers in [0, 1) of the shape of `like`, on its device, in the dtype they are drawn in."""
        drawn = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.rand(like.shape, dtype=drawn, generator=generator).to(like.device)


def _made(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """A new tensor of random numbers: rand, randn, randint, randperm, normal of two numbers."""
    device = torch.device(kwargs.pop("device", None) or "cpu")
    whole = func.overloadpacket in (aten_operator("randint"), aten_operator("randperm"))
    usual = torch.int64 if whole else torch.get_default_dtype()
    dtype, _ = kwargs.pop("dtype", None) or usual, kwargs.pop("pin_memory", None)
    how = (
        kwargs
        | dict(dtype=mode.drawn_as(dtype), device="cpu")
        | ({} if generator is None else {"generator": generator})
    )
    numbers = func.overloadpacket(*args, **how)
    return mode.fit(numbers, dtype, device, 1.0 if func.overloadpacket is aten_operator("rand") else None)


def _like(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """rand_like, randn_like, randint_like."""
    model, *rest = args
    made = torch.empty_like(model, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
    how = dict(dtype=mode.drawn_as(made.dtype), generator=generator)
    below = None
    if func.overloadpacket is aten_operator("randint_like"):
        numbers = torch.randint(*rest, tuple(made.shape), **how)
    elif func.overloadpacket is aten_operator("rand_like"):
        numbers, below = torch.rand(tuple(made.shape), **how), 1.0
    else:
        numbers = torch.randn(tuple(made.shape), **how)
    return made.copy_(mode.fit(numbers, made.dtype, made.device, below))


def _filled(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """A tensor that is filled in place: normal_, uniform_, exponential_, random_ and others."""
    target, *rest = args
    numbers = torch.empty(target.shape, dtype=mode.drawn_as(target.dtype))
    numbers = func(numbers, *rest, generator=generator, **kwargs)
    below = None
    if func.overloadpacket is aten_operator("uniform_"):
        below = float(rest[1] if len(rest) > 1 else kwargs.get("to", 1.0))
    return target.copy_(mode.fit(numbers, target.dtype, target.device, below))


def _chance(given: Any, like: Tensor) -> Any:
    return given.to(like.device) if isinstance(given, Tensor) else given


def _chosen(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """bernoulli of a tensor's own chances, or of one for all."""
    target = args[0]
    chance = args[1] if len(args) > 1 else kwargs.get("p", target)
    return (mode.uniform(target, generator) < _chance(chance, target)).to(target.dtype)


def _chosen_in_place(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    target = args[0]
    chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return target.copy_(mode.uniform(target, generator) < _chance(chance, target))


def _normal(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """torch.normal with a tensor among mean and deviation."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not tensors:
        return _made(mode, func, args, kwargs, generator)
    mean = args[0]
    deviation = args[1] if len(args) > 1 else kwargs.get("std", 1.0)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    like = tensors[0]
    numbers = mode.fit(
        torch.randn(shape, dtype=mode.drawn_as(like.dtype), generator=generator), like.dtype, like.device
    )
    return numbers * deviation + mean


def _dropped(
    mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """native_dropout: what torch's dropout on the CPU computes, and the mask."""
    x, chance, train = (*args, *[kwargs[name] for name in ("p", "train") if name in kwargs])
    if train is False:
        return func(x, chance, train)
    mask = mode.uniform(x, None) < 1 - chance
    return x * mask.to(x.dtype).div_(1 - chance if chance < 1 else 1.0), mask


def _sampled(mode: _Alike, func: Any, args: tuple, kwargs: dict, generator: torch.Generator | None) -> Tensor:
    """What hangs on chances or rates in a tensor and cannot be parted from them: multinomial, poisson, gamma."""
    first = next(arg for arg in args if isinstance(arg, Tensor))

    def here(value: Any) -> Any:
        return value.to(device="cpu", dtype=mode.drawn_as(value.dtype)) if isinstance(value, Tensor) else value

    numbers = func(*tree_map(here, args), **tree_map(here, kwargs), generator=generator)
    return mode.fit(numbers, first.dtype if numbers.is_floating_point() else numbers.dtype, first.device)


_KINDS: dict[Callable, str] = {
    _made: "rand randn randint randperm",
    _like: "rand_like randn_like randint_like",
    _filled: "normal_ uniform_ exponential_ cauchy_ log_normal_ geometric_ random_",
    _chosen: "bernoulli",
    _chosen_in_place: "bernoulli_",
    _normal: "normal",
    _dropped: "native_dropout",
    _sampled: "multinomial poisson binomial _standard_gamma _sample_dirichlet",
}
_DRAWS = {
    found: draw
    for draw, names in _KINDS.items()
    for name in names.split()
    if (found := aten_operator(name)) is not None
}
