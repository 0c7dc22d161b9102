"""What is wrong with an operator, where the evidence names one cause: each is tried, and named when it explains what the device returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from harness import numerics
from harness.trial import FAILS, Trial, apart, copies, difference, name_of

EXPLAINED = 0.1  # of the difference may be left by a cause that is named
SENTINEL = 12345.0  # what memory is filled with to see whether an operator writes it


def cause_of(trial: Trial, found: list[Tensor], results: list[Tensor]) -> str:
    """One clause that names the cause, or "" where none explains it. `found` is the device's, `results` the CPU's."""
    for number, (actual, expected) in enumerate(zip(found, results)):
        if difference(actual, expected) == 0 or actual.shape != expected.shape:
            continue
        for clue in (_differs_from_run_to_run, _never_written, _not_finite, _only_as_a_view, _by_tanh, _of_lower_precision, _mask, _in_places, _of_all):
            try:
                said = next(clue(trial, number, actual, expected), None)
            except FAILS:
                continue
            if said:
                return said
    return ""


def rule_of(trial: Trial, found: list[Tensor], results: list[Tensor]) -> str:
    """One clause that names the rounding rule by which a sound device differs as it does, and what is left without it; "" where none explains it."""
    rules, own = trial.rules, apart(found, results)
    if rules is None or not 0 < own < math.inf or apart(found, trial.on_cpu(rules)) > EXPLAINED * own:
        return ""
    for name in ("conv", "matmul"):
        operands = getattr(rules, name)
        if operands != "float32" and apart(found, trial.on_cpu(replace(rules, **{name: "float32"}))) > own / 2:
            if operands == "float16":
                return f"{rules.card} computes float32 {'convolutions' if name == 'conv' else 'products'} in float16 under its switches"
            with trial.device.in_float32(name) as switch:
                left = apart(trial.on_device(), results)
            return f"{operands} is on: with {switch} = False it is {left:.2e}"
    if rules.gelu_tanh and apart(found, trial.on_cpu(replace(rules, gelu_tanh=False))) > own / 2:
        unless = "" if trial.device.stack.compatible_impl is None else ", unless torch.npu.use_compatible_impl(True) comes before the first GELU"
        return f"GELU takes its tanh formula here whatever is asked for{unless}"
    return ""


def _differs_from_run_to_run(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    runs = [trial.on_device()[number] for _ in range(3)]
    differs = max(difference(each, actual) for each in runs)
    if differs > 0 and not _is_filled(trial, number):
        yield f"it differs from run to run, by {differs:.1e}"


def _never_written(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if _is_filled(trial, number):
        yield "its output is not written, or not all of it: it shows what the memory held before"


def _is_filled(trial: Trial, number: int) -> bool:
    """Whether what memory was filled with shows in the results of a run that got that memory."""
    if trial.writes:
        return False
    like = trial.on_cpu()[number]
    if not like.is_floating_point():
        return False
    held = [torch.full(like.shape, SENTINEL, dtype=like.dtype, device=trial.device.torch_device) for _ in range(4)]
    sentinel = torch.tensor(SENTINEL, dtype=like.dtype)
    args, kwargs = copies((trial.args, trial.kwargs), trial.device.torch_device)
    trial.device.synchronize()
    del held
    again = replace(trial, args=args, kwargs=kwargs).on_device(lambda each: each)[number]
    return bool((again == sentinel).any()) and not bool((like == sentinel).any())


def _not_finite(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if not actual.is_floating_point():
        return
    bad = ~actual.isfinite() & expected.isfinite()
    if not bad.any():
        return
    where = tuple(bad.nonzero()[0].tolist())
    kind = "NaN" if bool(actual[where].isnan()) else "Inf"
    inputs = all(bool(each.isfinite().all()) for each in trial.tensors if each.is_floating_point())
    golden = trial.golden()
    limit = torch.finfo(actual.dtype).max
    large = golden is not None and bool((golden[number].abs() > limit / 8).any())
    over = f"; in float64 it reaches {float(golden[number].abs().max()):.3g} where {actual.dtype} ends at {limit:.3g}" if large else ""
    yield f"{int(bad.sum())} of {actual.numel()} elements are {kind}, the first at {where}" + (", from finite inputs" if inputs else "") + over


def _only_as_a_view(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if all(each.is_contiguous() for each in trial.tensors):
        return
    there = trial.device.torch_device
    again = trial.on_device(lambda each: each.contiguous().to(there))
    if not trial.judged(again)[1]:
        yield "an input is a view that is not contiguous; made contiguous, it passes"


def _by_tanh(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if name_of(trial.func) == "gelu":
        again = replace(trial, kwargs=trial.kwargs | {"approximate": "tanh"}).on_cpu()[number]
        if difference(actual, again) <= EXPLAINED * difference(actual, expected):
            yield "it computes GELU by its tanh formula"


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "HF32": lambda x: numerics.round_hf32(x) if x.dtype == torch.float32 else x,
    "float16": lambda x: x.half().to(x.dtype) if x.dtype == torch.float32 else x,
    "bfloat16": lambda x: x.bfloat16().to(x.dtype) if x.dtype in (torch.float32, torch.float16) else x,
}


def _of_lower_precision(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if not difference(actual, expected) < math.inf:
        return
    for name, rounded in ROUNDINGS.items():
        again = trial.call(lambda each: rounded(each) if isinstance(each, Tensor) and each.is_floating_point() else each)[number] if not trial.writes else expected
        if difference(actual, again.to(expected.dtype)) <= EXPLAINED * difference(actual, expected):
            yield f"it computes as if its operands were rounded to {name}"


def _mask(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if trial.writes or not difference(actual, expected) < math.inf:
        return
    for said, change in (("turned around", torch.logical_not), ("shown in full", torch.ones_like), ("hiding nothing", torch.zeros_like)):
        if not any(each.dtype == torch.bool and each.numel() > 1 for each in trial.tensors):
            return
        again = trial.call(lambda each: change(each) if isinstance(each, Tensor) and each.dtype == torch.bool else each)[number]
        if difference(actual, again) <= EXPLAINED * difference(actual, expected):
            yield f"it computes as with the mask {said}"


def _in_places(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Zeros, a limit, rows or heads that changed places, an index that is off: what differs lies in some places alone."""
    differs = actual != expected
    count = int(differs.sum())
    if not actual.is_floating_point():
        if bool(((actual - expected).abs() <= 1)[differs].all()) and actual.dtype != torch.bool:
            yield f"{count} of {actual.numel()} indices are off by one"
        return
    for axis, name in ((-2, "rows"), (1, "heads")) if actual.dim() == 4 else ((-2, "rows"),):
        said = _swapped(actual, expected, axis, name) if actual.dim() >= 2 else ""
        if said:
            yield said
    energy = (actual.double() - expected.double()).square()
    zero = (actual == 0) & (expected != 0)
    if bool(zero.any()) and float(energy[zero].sum()) >= (1 - EXPLAINED**2) * float(energy.sum()):
        where = zero.nonzero()
        yield f"{len(where)} of {actual.numel()} elements are zero, from {tuple(where[0].tolist())} to {tuple(where[-1].tolist())}"
    top = actual.abs().max()
    cut = (actual.abs() == top) & (expected.abs() > top)
    if int(cut.sum()) > 1 and float(energy[cut].sum()) >= (1 - EXPLAINED**2) * float(energy.sum()):
        yield f"{int(cut.sum())} elements are cut to {float(top):.6g}"
    if 0 < count <= max(actual.numel() // 1000, 4) and count < actual.numel():
        where = tuple(differs.nonzero()[0].tolist())
        yield f"{count} of {actual.numel()} elements differ, the first at {where}: {float(actual[where]):.6g} where {float(expected[where]):.6g} was expected"


def _swapped(actual: Tensor, expected: Tensor, axis: int, name: str) -> str:
    """Two slices along an axis that stand in each other's place."""
    slices = [each.double().movedim(axis, 0).flatten(1) if name == "heads" else each.double().reshape(-1, each.shape[-1]) for each in (actual, expected)]
    away = (slices[0] - slices[1]).norm(dim=1)
    moved = (away > EXPLAINED * away.max()).nonzero().flatten().tolist()
    if len(moved) != 2:
        return ""
    first, second = moved
    left = max(float((slices[0][one] - slices[1][other]).norm()) for one, other in ((first, second), (second, first)))
    fits = left <= EXPLAINED * float(away.max())
    return f"{name} {first} and {second} stand in each other's place" if fits else ""


def _of_all(trial: Trial, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """One factor, or one summand, that all elements share."""
    if not actual.is_floating_point():
        return
    here, there = expected.double().flatten(), actual.double().flatten()
    if not bool(there.isfinite().all()) or not float(here.norm()):
        return
    left = float((there - here).norm())
    gain = float(there @ here / (here @ here))
    if float((there - gain * here).norm()) <= EXPLAINED * 3 * left:
        yield f"all of it is multiplied by {gain:.6g}"
    shift = float((there - here).mean())
    if float((there - here - shift).norm()) <= EXPLAINED * 3 * left:
        yield f"{shift:+.6g} is added to all of it"
