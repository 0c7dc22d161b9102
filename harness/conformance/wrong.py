"""Wrong computations that no operator makes alone: what a model does otherwise on the device, planted in its calls.

    with planted(EVERY[0]) as acted:
        outputs = model(inputs)

A call is seen where the model makes it, F.linear or F.scaled_dot_product_attention, on whatever device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A wrong computation: the functions that it stands in for, and what it computes in their place."""

    what: str
    functions: tuple[str, ...]  # by their names
    compute: Callable  # (function, *arguments) -> what the function would return
    nth: int | None = None  # only this call, counted from 1; None: every one


@dataclass
class Acted:
    """How many calls there were, and on how many of them it acted."""

    calls: int = 0
    hits: int = 0


class _Planted(TorchFunctionMode):
    def __init__(self, wrong: Wrong, acted: Acted):
        super().__init__()
        self.wrong, self.acted = wrong, acted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in self.wrong.functions:
            return func(*args, **kwargs)
        self.acted.calls += 1
        if self.wrong.nth is not None and self.acted.calls != self.wrong.nth:
            return func(*args, **kwargs)
        self.acted.hits += 1
        return self.wrong.compute(func, *args, **kwargs)


@contextlib.contextmanager
def computing_wrongly(wrong: Wrong) -> Iterator[Acted]:
    """Compute wrongly while the block runs."""
    acted = Acted()
    with _Planted(wrong, acted):
        yield acted


# -------- products


def _int8(func, x, weight, bias=None):
    step = weight.abs().amax() / 127
    return func(x, (weight / step).round() * step, bias)


def _weights_in(dtype: torch.dtype) -> Callable:
    return lambda func, x, weight, bias=None: func(x, weight.to(dtype).to(weight.dtype), bias)


def _products_in_bfloat16(func, x, weight, bias=None):
    narrow = [None if tensor is None else tensor.bfloat16() for tensor in (x, weight, bias)]
    return func(*narrow).to(x.dtype)


def _without_bias(func, x, weight, bias=None):
    return func(x, weight, None)


def _without_a_quarter_of_the_bias(func, x, weight, bias=None):
    partial_bias = (
        None if bias is None else torch.cat([torch.zeros_like(bias[: len(bias) // 4]), bias[len(bias) // 4 :]])
    )
    return func(x, weight, partial_bias)


def _truncated(func, x, weight, bias=None):
    result = func(x, weight, bias)
    if result.dtype != torch.float32:
        return result
    return (result.cpu().contiguous().view(torch.int32) & -256).view(torch.float32).to(result.device)


def _pictures_mirrored(func, x, weight, *more, **options):
    return func(x.flip(1), weight, *more, **options)


def _last_channel_zero(func, x, weight, *more, **options):
    return func(x, torch.cat([weight[:-1], torch.zeros_like(weight[-1:])]), *more, **options)


def _weights_in_float16(func, x, weight, *more, **options):
    return func(x, weight.half().to(weight.dtype), *more, **options)


# -------- attention


def _attending(change: Callable) -> Callable:
    """`change(options)` edits the mask, the causality and the scale with which attention is called."""

    def compute(func, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        options = dict(
            attn_mask=attn_mask, is_causal=is_causal, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale
        )
        return func(q, k, v, dropout_p=dropout_p, **change(options), **more)

    return compute


def _without_mask(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "attn_mask": None, "is_causal": False}


def _a_token_ahead(options: dict[str, Any]) -> dict[str, Any]:
    mask = options["attn_mask"]
    if mask is None or mask.shape[-2] == 1:
        return options
    return {**options, "attn_mask": torch.cat([mask[..., 1:, :], mask[..., -1:, :]], -2)}


def _scaled(by: float) -> Callable:
    return _attending(lambda options: {**options, "scale": options["scale"] * by})


def _last_row_of_its_four_largest(func, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
    result = func(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **more)
    scores = (q[..., -1:, :] @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < 0
        scores = scores.masked_fill(hidden[..., -1:, :], torch.finfo(scores.dtype).min)
    largest = scores.softmax(-1).topk(min(4, scores.shape[-1]), -1)
    sparse = torch.zeros_like(scores).scatter(-1, largest.indices, largest.values)
    return torch.cat([result[..., :-1, :], sparse @ v], -2)


def _copied_head(func, *args, **options):
    result = func(*args, **options)
    return torch.cat([result[:, 1:2], result[:, 1:]], 1)


# -------- norms, activations, indices


def _layer_norm(func, x, shape, weight=None, bias=None, eps=1e-5):
    return func(x, shape, weight, bias, 10 * eps)


def _rms_norm(func, x, shape, weight=None, eps=None):
    return func(x, shape, weight, 10 * (torch.finfo(x.dtype).eps if eps is None else eps))


def _group_norm(func, x, groups, weight=None, bias=None, eps=1e-5):
    return func(x, groups, weight, bias, 10 * eps)


EPSILON = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}


def _epsilon(func, *args, **options):
    return EPSILON[func.__name__](func, *args, **options)


def _read_in_bfloat16(func, x, *more, **options):
    return func(x.bfloat16().to(x.dtype), *more, **options)


def _half_the_groups(func, x, groups, *more, **options):
    return func(x, groups // 2, *more, **options)


def _hard_swish(func, x, *more, **options):
    return F.hardswish(x)


def _identifiers_cut(func, ids, weight, *more, **options):
    return func(ids.clamp(max=weight.shape[0] * 9 // 10), weight, *more, **options)


def _each_index_once(func, target, dim, index, source, **options):
    """index_add in which of the rows for one place only the last arrives."""
    last = torch.zeros(target.shape[dim], dtype=torch.long).scatter(0, index.cpu(), torch.arange(len(index)))
    chosen = last[index.cpu().unique()].to(index.device)
    return func(target, dim, index[chosen], source[chosen], **options)


_NORMS = tuple(EPSILON)
EVERY = (  # in every call
    Wrong(what="attention scale 1 % off", functions=("scaled_dot_product_attention",), compute=_scaled(1.01)),
    Wrong(what="attention scale 0.1 % off", functions=("scaled_dot_product_attention",), compute=_scaled(1.001)),
    Wrong(what="masks left out", functions=("scaled_dot_product_attention",), compute=_attending(_without_mask)),
    Wrong(what="weights of linear layers in int8", functions=("linear",), compute=_int8),
    Wrong(what="weights of linear layers in float16", functions=("linear",), compute=_weights_in(torch.float16)),
    Wrong(what="linear layers computed in bfloat16", functions=("linear",), compute=_products_in_bfloat16),
    Wrong(what="linear layers truncate to 15 bits", functions=("linear",), compute=_truncated),
    Wrong(what="eps of norms times 10", functions=_NORMS, compute=_epsilon),
    Wrong(what="norms read bfloat16", functions=_NORMS, compute=_read_in_bfloat16),
    Wrong(what="half of the groups in group norms", functions=("group_norm",), compute=_half_the_groups),
    Wrong(what="identifiers above nine tenths cut", functions=("embedding",), compute=_identifiers_cut),
    Wrong(what="repeated indices count once", functions=("index_add",), compute=_each_index_once),
)
ONE = (  # in one call, the middle one
    Wrong(
        what="one attention's mask a token ahead",
        functions=("scaled_dot_product_attention",),
        compute=_attending(_a_token_ahead),
    ),
    Wrong(
        what="one attention's last row of its four largest",
        functions=("scaled_dot_product_attention",),
        compute=_last_row_of_its_four_largest,
    ),
    Wrong(
        what="one attention's first head a copy of the next",
        functions=("scaled_dot_product_attention",),
        compute=_copied_head,
    ),
    Wrong(what="one layer's weights in int8", functions=("linear",), compute=_int8),
    Wrong(what="one layer's weights in bfloat16", functions=("linear",), compute=_weights_in(torch.bfloat16)),
    Wrong(what="one layer computed in bfloat16", functions=("linear",), compute=_products_in_bfloat16),
    Wrong(what="one layer's bias left out", functions=("linear",), compute=_without_bias),
    Wrong(what="a quarter of one layer's bias left out", functions=("linear",), compute=_without_a_quarter_of_the_bias),
    Wrong(what="one activation as hard swish", functions=("gelu", "silu"), compute=_hard_swish),
    Wrong(what="one convolution's last channel zero", functions=("conv2d",), compute=_last_channel_zero),
    Wrong(what="one convolution's channels read backwards", functions=("conv2d",), compute=_pictures_mirrored),
    Wrong(what="one convolution's weights in float16", functions=("conv2d",), compute=_weights_in_float16),
)
