"""What is wrong with an operator, where the evidence names one cause: each is tried, and named when it explains what
the device returned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness import numerics
from harness.locate.replay import FAILS, Replay, copies, largest_difference, name_of, relative_difference

_EXPLAINED = 0.1  # of the difference may be left by a cause that is named
SENTINEL = 12345.0  # what memory is filled with to see whether an operator writes it


def cause_of(replay: Replay, result: list[Tensor], results: list[Tensor]) -> str:
    """One clause that names the cause, or "" where none explains it. `result` is the device's, `results` the CPU's."""
    for number, (actual, expected) in enumerate(zip(result, results)):
        if relative_difference(actual, expected) == 0 or actual.shape != expected.shape:
            continue
        for clue in CLUES:
            try:
                sentence = next(clue(replay, number, actual, expected), None)
            except FAILS:
                continue
            if sentence:
                return sentence
    return ""


def rule_of(replay: Replay, result: list[Tensor], results: list[Tensor]) -> str:
    """One clause that names the rounding rule by which a sound device differs as it does, and what is left without it;
    "" where none explains it.
    """
    rules, own = replay.rules, largest_difference(result, results)
    if rules is None or not 0 < own < math.inf or largest_difference(result, replay.on_cpu(rules)) > _EXPLAINED * own:
        return ""
    for name in ("conv", "matmul"):
        operands = getattr(rules, name)
        if (
            operands != "float32"
            and largest_difference(result, replay.on_cpu(replace(rules, **{name: "float32"}))) > own / 2
        ):
            if operands == "float16":
                return (
                    f"{rules.family} computes float32 {'convolutions' if name == 'conv' else 'products'} in float16 "
                    "under its switches"
                )
            with replay.device.in_float32(name) as switch:
                left = largest_difference(replay.on_device(), results)
            return f"{operands} is on: with {switch} = False it is {left:.2e}"
    if rules.gelu_tanh and largest_difference(result, replay.on_cpu(replace(rules, gelu_tanh=False))) > own / 2:
        unless = (
            ""
            if replay.device.stack.compatible_impl is None
            else ", unless torch.npu.use_compatible_impl(True) comes before the first GELU"
        )
        return f"GELU takes its tanh formula here whatever is asked for{unless}"
    return ""


def _differs_from_run_to_run(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    runs = [replay.on_device()[number] for _ in range(3)]
    differs = max(relative_difference(run, actual) for run in runs)
    if differs > 0 and not _is_filled(replay, number):
        yield f"it differs from run to run, by {differs:.1e}"


def _never_written(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if _is_filled(replay, number):
        yield "its output is not written, or not all of it: it shows what the memory held before"


def _is_filled(replay: Replay, number: int) -> bool:
    """Whether what memory was filled with shows in the results of a run that got that memory."""
    if replay.writes:
        return False
    like = replay.on_cpu()[number]
    if not like.is_floating_point():
        return False
    filled = [torch.full(like.shape, SENTINEL, dtype=like.dtype, device=replay.device.torch_device) for _ in range(4)]
    sentinel = torch.tensor(SENTINEL, dtype=like.dtype)
    args, kwargs = copies((replay.args, replay.kwargs), replay.device.torch_device)
    replay.device.synchronize()
    del filled
    again = replace(replay, args=args, kwargs=kwargs).on_device(lambda value: value)[number]
    return bool((again == sentinel).any()) and not bool((like == sentinel).any())


def _not_finite(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if not actual.is_floating_point():
        return
    bad = ~actual.isfinite() & expected.isfinite()
    if not bad.any():
        return
    where = tuple(bad.nonzero()[0].tolist())
    kind = "NaN" if bool(actual[where].isnan()) else "Inf"
    inputs = all(bool(tensor.isfinite().all()) for tensor in replay.tensors if tensor.is_floating_point())
    golden = replay.golden()
    limit = torch.finfo(actual.dtype).max
    large = golden is not None and bool((golden[number].abs() > limit / 8).any())
    over = (
        f"; in float64 it reaches {float(golden[number].abs().max()):.3g} where {actual.dtype} ends at {limit:.3g}"
        if large
        else ""
    )
    yield (
        f"{int(bad.sum())} of {actual.numel()} elements are {kind}, the first at {where}"
        + (", from finite inputs" if inputs else "")
        + over
    )


def _only_as_a_view(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if all(tensor.is_contiguous() for tensor in replay.tensors):
        return
    there = replay.device.torch_device
    again = replay.on_device(lambda tensor: tensor.contiguous().to(there))
    if not replay.judged(again)[1]:
        yield "an input is a view that is not contiguous; made contiguous, it passes"


def _by_tanh(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if name_of(replay.func) == "gelu":
        again = replace(replay, kwargs=replay.kwargs | {"approximate": "tanh"}).on_cpu()[number]
        if relative_difference(actual, again) <= _EXPLAINED * relative_difference(actual, expected):
            yield "it computes GELU by its tanh formula"


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "HF32": lambda x: numerics.round_hf32(x) if x.dtype == torch.float32 else x,
    "float16": lambda x: x.half().to(x.dtype) if x.dtype == torch.float32 else x,
    "bfloat16": lambda x: x.bfloat16().to(x.dtype) if x.dtype in (torch.float32, torch.float16) else x,
}


def _of_lower_precision(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if not relative_difference(actual, expected) < math.inf:
        return
    if replay.writes:
        return
    away = relative_difference(actual, expected)
    for name, rounded in _ROUNDINGS.items():
        again = replay.call(
            lambda tensor: rounded(tensor) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor
        )[number]
        if relative_difference(actual, again.to(expected.dtype)) <= _EXPLAINED * away:
            yield f"it computes as if its operands were rounded to {name}"
        if relative_difference(actual, rounded(again.to(expected.dtype))) <= _EXPLAINED * away:
            yield f"it computes as if its operands and its result were rounded to {name}"
        if relative_difference(actual, rounded(expected)) <= _EXPLAINED * away:
            yield f"its result is rounded to {name}"


# Arguments that change what an operator computes: where they stand among the positional ones, and what they may be.
SETTINGS: dict[str, dict[str, tuple[int | None, tuple]]] = {
    "interpolate": {"align_corners": (4, (False, True))},
    "upsample": {"align_corners": (4, (False, True))},
    "grid_sample": {"align_corners": (4, (False, True))},
    "affine_grid": {"align_corners": (2, (False, True))},
    "avg_pool1d": {"count_include_pad": (5, (False, True)), "ceil_mode": (4, (False, True))},
    "avg_pool2d": {"count_include_pad": (5, (False, True)), "ceil_mode": (4, (False, True))},
    "avg_pool3d": {"count_include_pad": (5, (False, True)), "ceil_mode": (4, (False, True))},
    "scaled_dot_product_attention": {"is_causal": (5, (False, True))},
    "layer_norm": {"eps": (4, (1e-3, 1e-5, 1e-6, 1e-12))},
    "rms_norm": {"eps": (3, (1e-3, 1e-5, 1e-6, 1e-12))},
    "group_norm": {"eps": (4, (1e-3, 1e-5, 1e-6, 1e-12))},
    "batch_norm": {"eps": (7, (1e-3, 1e-5, 1e-6, 1e-12))},
    "var": {"correction": (None, (0, 1))},
    "std": {"correction": (None, (0, 1))},
}
BIASES = {  # where the bias stands
    "linear": 2, "bilinear": 3, "conv1d": 2, "conv2d": 2, "conv3d": 2, "conv_transpose1d": 2, "conv_transpose2d": 2,
    "conv_transpose3d": 2, "layer_norm": 3, "group_norm": 3, "batch_norm": 4, "addmm": 0, "baddbmm": 0, "addbmm": 0,
}  # fmt: skip


def _argument(replay: Replay, name: str, position: int) -> Any:
    """An argument of the call, by position where it was given so; None where it was not given."""
    return replay.args[position] if position < len(replay.args) else replay.kwargs.get(name)


def _with(replay: Replay, name: str, position: int | None, value: Any) -> Replay:
    """The call with one argument replaced, by position where it was given so."""
    if position is not None and position < len(replay.args):
        return replace(replay, args=(*replay.args[:position], value, *replay.args[position + 1 :]))
    return replace(replay, kwargs=replay.kwargs | {name: value})


def _of_a_setting(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Another value of an argument, such as align_corners, by which the result is the device's."""
    if replay.writes or not relative_difference(actual, expected) < math.inf:
        return
    for name, (position, values) in SETTINGS.get(name_of(replay.func), {}).items():
        for value in values:
            try:
                again = _with(replay, name, position, value).on_cpu()[number]
            except FAILS:
                continue
            if relative_difference(actual, again) <= _EXPLAINED * relative_difference(actual, expected):
                yield f"it computes as with {name}={value}"


def _without_its_bias(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    position = BIASES.get(name_of(replay.func))
    if position is None or replay.writes:
        return
    name = "bias" if position else "input"
    bias = _argument(replay, name, position)
    if not isinstance(bias, Tensor) or not bool(bias.any()):
        return
    again = _with(replay, name, position, torch.zeros_like(bias)).on_cpu()[number]
    if relative_difference(actual, again) <= _EXPLAINED * relative_difference(actual, expected):
        yield "it computes as without its bias"


def _mask(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    if replay.writes or not relative_difference(actual, expected) < math.inf:
        return
    for what, change in (
        ("turned around", torch.logical_not),
        ("shown in full", torch.ones_like),
        ("hiding nothing", torch.zeros_like),
    ):
        if not any(tensor.dtype == torch.bool and tensor.numel() > 1 for tensor in replay.tensors):
            return
        again = replay.call(
            lambda tensor: change(tensor) if isinstance(tensor, Tensor) and tensor.dtype == torch.bool else tensor
        )[number]
        if relative_difference(actual, again) <= _EXPLAINED * relative_difference(actual, expected):
            yield f"it computes as with the mask {what}"


def _of_rows_without_keys(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Rows of attention whose mask hides every key, which no attention defines."""
    if name_of(replay.func) != "scaled_dot_product_attention":
        return
    mask = _argument(replay, "attn_mask", 3)
    if not isinstance(mask, Tensor):
        return
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    blind = ~seen.any(-1, keepdim=True).expand(*expected.shape[:-1], 1)
    if not bool(blind.any()) or bool(blind.all()):
        return
    differs = relative_difference(actual, expected)
    if relative_difference(actual.where(~blind, expected), expected) <= _EXPLAINED * min(differs, 1.0):
        rows = int(blind.sum())
        yield (
            f"it differs only in rows whose mask hides every key, {rows} of {blind.numel()}, such as padding: no "
            "attention defines these; leave them out of what the case returns"
        )


def _of_repeated_indices(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Elements that several indices name: torch leaves open which write stays."""
    written = _times_written(replay, expected)
    differs = actual != expected
    if written is None or not bool(differs.any()) or bool((differs & (written < 2)).any()):
        return
    count = int((written > 1).sum())
    behaviour = "keeps another of the writes than the CPU"
    for words, again in (("keeps the first write", _first_write), ("adds the writes up", _sum_of_writes)):
        with contextlib.suppress(*FAILS):
            result = again(replay)
            if result is not None and relative_difference(actual, result) <= _EXPLAINED * relative_difference(
                actual, expected
            ):
                behaviour = words
                break
    yield (
        f"{count} elements are written more than once, since indices repeat: torch leaves open which write stays, "
        f"and the device {behaviour}"
    )


SCATTERS = ("scatter", "scatter_", "scatter_reduce", "scatter_reduce_")
PUTS = ("index_put", "index_put_", "setitem")
_COPIES = ("index_copy", "index_copy_")


def _scattered(replay: Replay) -> tuple[Tensor, int, Tensor, Any] | None:
    """The target, axis, index and source of a scatter or index_copy; None of another call, or of one that reduces."""
    name = name_of(replay.func)
    given = dict(zip(("input", "dim", "index", "src"), replay.args)) | replay.kwargs
    if name not in (*SCATTERS, *_COPIES) or given.get("reduce") is not None:
        return None
    target, dim, index = (given.get(item) for item in ("input", "dim", "index"))
    source = next((given[item] for item in ("src", "source", "value") if item in given), None)
    if not isinstance(target, Tensor) or not isinstance(index, Tensor) or not isinstance(dim, int):
        return None
    if name in _COPIES:
        index = index.view([-1 if axis == dim % target.dim() else 1 for axis in range(target.dim())]).expand_as(source)
    return target, dim, index, source


def _put(replay: Replay) -> tuple[Tensor, tuple, Any] | None:
    """The target, indices and values of an index_put or x[i] = y by tensors of indices; None of another call."""
    name = name_of(replay.func)
    if name not in PUTS or len(replay.args) < 3 or (len(replay.args) > 3 and replay.args[3]):
        return None
    target, indices, values = replay.args[:3]
    indices = tuple(indices) if isinstance(indices, (tuple, list)) else (indices,)
    known = all(
        isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool for index in indices
    )
    return (target, indices, values) if known and indices else None


def _times_written(replay: Replay, expected: Tensor) -> Tensor | None:
    """How often each element is written; None for an operator without such indices."""
    count = torch.zeros(expected.shape, dtype=torch.int64)
    scattered, put = _scattered(replay), _put(replay)
    if scattered is not None:
        _, dim, index, _ = scattered
        return count.scatter_add_(dim, index.long(), torch.ones_like(index, dtype=torch.int64))
    if put is not None:
        _, indices, values = put
        like = torch.ones(count[indices].shape, dtype=torch.int64)
        return count.index_put_(indices, like, accumulate=True)
    return None


def _first_write(replay: Replay) -> Tensor | None:
    """The result of the writes in the opposite order."""
    scattered, put = _scattered(replay), _put(replay)
    if scattered is not None:
        target, dim, index, source = scattered
        source = source.flip(dim) if isinstance(source, Tensor) else source
        return target.clone().scatter_(dim, index.long().flip(dim), source)
    target, indices, values = put
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in indices))
    flat = tuple(item.expand(shape).flatten().flip(0) for item in indices)
    values = torch.as_tensor(values, dtype=target.dtype).expand(target[indices].shape)
    return target.clone().index_put_(flat, values.reshape(len(flat[0]), *target.shape[len(indices) :]).flip(0))


def _sum_of_writes(replay: Replay) -> Tensor | None:
    """The result where writes to one element add up."""
    scattered, put = _scattered(replay), _put(replay)
    if scattered is not None:
        target, dim, index, source = scattered
        source = source if isinstance(source, Tensor) else torch.full_like(index, source, dtype=target.dtype)
        zero = target.clone().scatter_(dim, index.long(), 0.0)
        return zero.scatter_add_(dim, index.long(), source.to(target.dtype)[tuple(map(slice, index.shape))])
    target, indices, values = put
    values = torch.as_tensor(values, dtype=target.dtype).expand(target[indices].shape)
    zero = target.clone().index_put_(indices, torch.zeros_like(values))
    return zero.index_put_(indices, values, accumulate=True)


def _of_slices(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Slices along an axis that hold what another slice should, or that one factor multiplies, while the others are
    right.
    """
    if not actual.is_floating_point() or not bool(actual.isfinite().all()) or not bool(expected.isfinite().all()):
        return
    for axis in range(actual.dim()):
        here, there = (tensor.double().movedim(axis, 0).flatten(1) for tensor in (actual, expected))
        away, size = (here - there).norm(dim=1), there.norm(dim=1)
        wrong = (away > _EXPLAINED * away.max()).nonzero().flatten().tolist()
        if not 0 < len(wrong) < len(size) or here.shape[1] < 2:
            continue
        name = _axis_name(actual, axis)
        if len(wrong) <= MANY_SLICES:
            sentence = _copied_slices(here, there, away, wrong, name)
            if sentence:
                yield sentence
        gains = (here * there).sum(1)[wrong] / size[wrong].square()
        gain = float(gains.median())
        left = (here[wrong] - gain * there[wrong]).norm()
        if (
            float(left) <= _EXPLAINED * float(away[wrong].norm())
            and abs(gain) > _EXPLAINED
            and wrong == list(range(wrong[0], wrong[-1] + 1))
        ):
            yield f"{name} {wrong[0]} to {wrong[-1]} of {len(size)} are multiplied by {gain:.6g}"


MANY_SLICES = 8  # wrong ones for which each other slice is tried


def _axis_name(tensor: Tensor, axis: int) -> str:
    """How the slices along an axis are called."""
    if axis == tensor.dim() - 1:
        return "columns"
    if axis == tensor.dim() - 2:
        return "rows"
    return "heads" if tensor.dim() == 4 and axis == 1 else f"slices along axis {axis},"


def _copied_slices(here: Tensor, there: Tensor, away: Tensor, wrong: list[int], name: str) -> str:
    """Which slices hold what another one should."""
    pairs = []
    for each in wrong:
        apart = (there - here[each]).norm(dim=1)
        other = int(apart.argmin())
        if other == each or float(apart[other]) > _EXPLAINED * float(away[each]):
            return ""
        pairs.append((each, other))
    each, other = pairs[0]
    more = f", and {len(pairs) - 1} more hold another's" if len(pairs) > 1 else ""
    one = name if name.startswith("slices") else name.removesuffix("s")
    return f"{one} {each} is a copy of {other}{more}"


def _of_some_elements(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """Zeros, a limit, rows or heads that changed places, an index that is off: what differs lies in some places
    alone.
    """
    differs = actual != expected
    count = int(differs.sum())
    if not actual.is_floating_point():
        if bool(((actual - expected).abs() <= 1)[differs].all()) and actual.dtype != torch.bool:
            yield f"{count} of {actual.numel()} indices are off by one"
        return
    for axis, name in ((-2, "rows"), (1, "heads")) if actual.dim() == 4 else ((-2, "rows"),):
        sentence = _swapped(actual, expected, axis, name) if actual.dim() >= 2 else ""
        if sentence:
            yield sentence
    energy = (actual.double() - expected.double()).square()
    zero = (actual == 0) & (expected != 0)
    if bool(zero.any()) and float(energy[zero].sum()) >= (1 - _EXPLAINED**2) * float(energy.sum()):
        where = zero.nonzero()
        yield (
            f"{len(where)} of {actual.numel()} elements are zero, from {tuple(where[0].tolist())} to "
            f"{tuple(where[-1].tolist())}"
        )
    top = actual.abs().max()
    cut = (actual.abs() == top) & (expected.abs() > top)
    if int(cut.sum()) > 1 and float(energy[cut].sum()) >= (1 - _EXPLAINED**2) * float(energy.sum()):
        yield f"{int(cut.sum())} elements are cut to {float(top):.6g}"
    if 0 < count <= max(actual.numel() // 1000, 4) and count < actual.numel():
        where = tuple(differs.nonzero()[0].tolist())
        yield (
            f"{count} of {actual.numel()} elements differ, the first at {where}: {float(actual[where]):.6g} where "
            f"{float(expected[where]):.6g} was expected"
        )


def _swapped(actual: Tensor, expected: Tensor, axis: int, name: str) -> str:
    """Two slices along an axis that stand in each other's place."""
    slices = [
        tensor.double().movedim(axis, 0).flatten(1)
        if name == "heads"
        else tensor.double().reshape(-1, tensor.shape[-1])
        for tensor in (actual, expected)
    ]
    away = (slices[0] - slices[1]).norm(dim=1)
    moved = (away > _EXPLAINED * away.max()).nonzero().flatten().tolist()
    if len(moved) != 2:
        return ""
    first, second = moved
    left = max(float((slices[0][one] - slices[1][other]).norm()) for one, other in ((first, second), (second, first)))
    fits = left <= _EXPLAINED * float(away.max())
    return f"{name} {first} and {second} stand in each other's place" if fits else ""


def _of_all(replay: Replay, number: int, actual: Tensor, expected: Tensor) -> Iterator[str]:
    """One factor, or one summand, that all elements share."""
    if not actual.is_floating_point():
        return
    here, there = expected.double().flatten(), actual.double().flatten()
    if not bool(there.isfinite().all()) or not float(here.norm()):
        return
    left = float((there - here).norm())
    gain = float(there @ here / (here @ here))
    if float((there - gain * here).norm()) <= _EXPLAINED * 3 * left:
        yield f"all of it is multiplied by {gain:.6g}"
    shift = float((there - here).mean())
    if float((there - here - shift).norm()) <= _EXPLAINED * 3 * left:
        yield f"{shift:+.6g} is added to all of it"


CLUES = (  # in the order in which they are tried
    _differs_from_run_to_run, _never_written, _of_rows_without_keys, _not_finite, _only_as_a_view, _by_tanh,
    _of_lower_precision, _mask, _without_its_bias, _of_a_setting, _of_repeated_indices, _of_some_elements, _of_all,
    _of_slices,
)  # fmt: skip
