"""What a sound vector unit may compute otherwise than the rules here say, in matters that no NPU has confirmed yet.

Functions that are off by some last places, functions of float16 computed in float16, other orders of the sums of norms,
a softmax in tiles, other ties of casts. Each is written from its formula. All of it is assumed: a forecast by them says
how far an NPU may be off that computes so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.numerics.rounding import HALF, round_half_away

LANES = 64  # float32 numbers that Ascend's vector unit takes at a time: 256 bytes
ORDERS = ("", "lanes", "one by one")


@dataclass(frozen=True, kw_only=True)
class Vector:
    """How a vector unit computes; by default as the rules of `numerics` say.

    Raises: ValueError for an order of sums that is not in `ORDERS`, or for less than no last places and no tile.
    """

    places: int = 0  # last places of float32 by which exp, tanh, erf, … may be off, as a hash of the result's bits says
    upwards: bool = False  # all of them are off by so many, away from zero
    half: bool = False  # elementwise functions of float16, and the scores of its softmax, are float16 after each step
    half_places: int = 0  # last places of float16 by which these may be off besides
    order: str = ""  # of the sums of norms, means and softmax: "" as the CPU's, "lanes", "one by one"
    one_pass: bool = False  # a variance is the mean square less the square of the mean
    tile: int = 0  # keys that softmax takes at a time; 0: all
    ties_away: bool = False  # half results of elementwise operators are rounded with ties away from zero
    attention_even: bool = False  # and those of attention with ties to even

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"sums go 'lanes' or 'one by one', not {self.order!r}")
        if min(self.places, self.half_places, self.tile) < 0:
            raise ValueError(f"last places and tiles are counted from 0, not {self}")

    def unit(self, dtype: torch.dtype) -> VectorUnit:
        """What computes operators on tensors of a dtype."""
        return VectorUnit(self, dtype)

    @property
    def operators(self) -> frozenset[str]:
        """What is computed otherwise: names of `VectorUnit`'s methods, in `FUNCTIONS` and in `ARITHMETIC`."""
        names: set[str] = set()
        functions = self.places or self.half
        if functions:
            names |= {*FUNCTIONS, "gelu", "silu", "power", "softmax", "log_softmax"}
        if self.order or self.one_pass or self.places:
            names |= {"layer_norm", "group_norm"}
        if self.order:
            names |= {"mean", "softmax"}
        if self.tile:
            names |= {"softmax"}
        if self.ties_away:
            names |= {*ARITHMETIC}
        if functions or self.tile or self.order or self.attention_even:
            names |= {"attention"}
        return frozenset(names)


FUNCTIONS = ("exp", "tanh", "erf", "log", "sigmoid", "sqrt", "rsqrt", "sin", "cos", "reciprocal")
ARITHMETIC = ("add", "sub", "mul", "div")


class VectorUnit:
    """The operators of a vector unit, on CPU tensors of one dtype."""

    def __init__(self, vector: Vector, dtype: torch.dtype):
        self.vector = vector
        self.in_half = vector.half and dtype == torch.float16

    # what every operator is made of

    def step(self, x: Tensor) -> Tensor:
        """A float32 intermediate result, as it is kept."""
        return x.half().float() if self.in_half else x

    def function(self, compute: Callable, x: Tensor) -> Tensor:
        """A function of float32 numbers, off by as much as it may be, in float32."""
        result = compute(x)
        if self.vector.places:
            result = _off(result, self.vector.places, self.vector.upwards)
        if self.in_half:
            narrow = result.half()
            result = (_off(narrow, self.vector.half_places, False) if self.vector.half_places else narrow).float()
        return result

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return round_half_away(x, dtype) if self.vector.ties_away and dtype in HALF else x.to(dtype)

    def total(self, x: Tensor) -> Tensor:
        """The sum along the last axis, which stays as one of length one."""
        if self.vector.order == "one by one":
            total = x[..., :1].clone()
            for position in range(1, x.shape[-1]):
                total += x[..., position : position + 1]
            return total
        if self.vector.order == "lanes":
            padded = F.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
            lanes = padded[..., 0, :].clone()
            for position in range(1, padded.shape[-2]):
                lanes += padded[..., position, :]
            while lanes.shape[-1] > 1:
                lanes = lanes[..., : lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2 :]
            return lanes
        return x.sum(-1, keepdim=True)

    # elementwise

    def elementwise(self, name: str, x: Tensor) -> Tensor:
        """One of `FUNCTIONS`."""
        return self.cast(self.function(getattr(torch, name), x.float()), x.dtype)

    def arithmetic(self, name: str, left: Any, right: Any, **options) -> Tensor:
        """One of `ARITHMETIC`."""
        wide = [
            tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in HALF else tensor
            for tensor in (left, right)
        ]
        result = getattr(torch, name)(*wide, **options)
        return self.cast(result, torch.result_type(left, right)) if result.is_floating_point() else result

    def power(self, x: Any, exponent: Any) -> Tensor:
        wide = [tensor.float() if isinstance(tensor, Tensor) else tensor for tensor in (x, exponent)]
        dtype = torch.result_type(x, exponent)
        if not isinstance(exponent, Tensor) and exponent in (1, 2):  # a product, which is rounded rightly
            return torch.pow(*wide).to(dtype)
        return self.function(lambda base: torch.pow(base, wide[1]), torch.as_tensor(wide[0], dtype=torch.float32)).to(
            dtype
        )

    def gelu(self, x: Tensor, approximate: str = "none") -> Tensor:
        wide = x.float()
        if approximate == "tanh":
            cube = self.step(self.step(self.step(wide * wide) * wide) * 0.044715)
            inner = self.step(self.step(wide + cube) * math.sqrt(2 / math.pi))
            share = self.function(torch.tanh, inner)
        else:
            share = self.function(torch.erf, self.step(wide * math.sqrt(0.5)))
        return self.cast(self.step(wide * 0.5) * self.step(share + 1), x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.cast(wide / self.step(self.function(torch.exp, -wide) + 1), x.dtype)

    # along an axis

    def softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        scores = x.float().movedim(dim, -1)
        weights, total, _ = self._weights(scores)
        result = self.step(weights / total).movedim(-1, dim)
        return result if half_to_float else self.cast(result.contiguous(), x.dtype)

    def log_softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        scores = x.float().movedim(dim, -1)
        top = scores.amax(-1, keepdim=True)
        total = self.total(self.function(torch.exp, scores - top))
        result = ((scores - top) - self.function(torch.log, total)).movedim(-1, dim)
        return result if half_to_float else self.cast(result.contiguous(), x.dtype)

    def _weights(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(scores - their maximum) along the last axis, its sum, that maximum: a tile takes the one so far."""
        size = self.vector.tile or scores.shape[-1]
        top = torch.full_like(scores[..., :1], -math.inf)
        total = torch.zeros_like(top)
        parts = []
        for tile in scores.split(size, -1):
            higher = torch.maximum(top, tile.amax(-1, keepdim=True))
            finite = torch.where(higher.isfinite(), higher, 0.0)
            shrink = self.function(torch.exp, top - finite)
            weights = self.function(torch.exp, self.step(tile - finite))
            parts = [part * shrink for part in parts] + [weights]
            total, top = total * shrink + self.total(weights), higher
        return torch.cat(parts, -1), total, top

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, hidden: Tensor | None = None) -> Tensor:
        """Fused attention on (B, H, N, D), one tile of keys after the other; probabilities are cast to q's dtype."""
        group = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(group, 1) if group > 1 else tensor for tensor in (k, v))
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
        scores = self.step(scores if hidden is None else scores.masked_fill(hidden, -math.inf))
        size = self.vector.tile or scores.shape[-1]
        top = torch.full_like(scores[..., :1], -math.inf)
        total, result = torch.zeros_like(top), torch.zeros_like(v[..., :1, :], dtype=torch.float32)
        for tile, values in zip(scores.split(size, -1), v.float().split(size, -2)):
            higher = torch.maximum(top, tile.amax(-1, keepdim=True))
            finite = torch.where(higher.isfinite(), higher, 0.0)
            shrink = self.function(torch.exp, top - finite)
            weights = self.function(torch.exp, self.step(tile - finite))
            total, top = total * shrink + self.total(weights), higher
            result = result * shrink + torch.matmul(self._attended(weights, q.dtype).float(), values)
        return self._attended(result / torch.where(total == 0, 1.0, total), q.dtype)

    def _attended(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if self.vector.attention_even or dtype not in HALF else round_half_away(x, dtype)

    def mean(self, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        named = [dim] if isinstance(dim, int) else dim
        axes = list(range(x.dim())) if named is None or named == [] else list(named)
        axes = sorted(axis % x.dim() for axis in axes) if x.dim() else []
        last = tuple(range(x.dim() - len(axes), x.dim()))
        flat = x.float().movedim(axes, last).flatten(x.dim() - len(axes)) if axes else x.float()[..., None]
        result = (self.total(flat) / flat.shape[-1])[..., 0]
        for axis in axes if keepdim else ():
            result = result.unsqueeze(axis)
        return result.to(dtype or x.dtype)

    def _normalised(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """(x - mean) / sqrt(var + eps) along the last axis, mean and 1 / sqrt(var + eps), in float32."""
        count = x.shape[-1]
        mean = self.total(x) / count
        centred = x - mean
        if self.vector.one_pass:
            variance = (self.total(x * x) / count - mean * mean).clamp(min=0)
        else:
            variance = self.total(centred * centred) / count
        scale = self.function(torch.reciprocal, self.function(torch.sqrt, variance + eps))
        return centred * scale, mean, scale

    def layer_norm(self, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float):
        leading = x.dim() - len(shape)
        y, mean, scale = self._normalised(x.float().flatten(leading), eps)
        y = y.view(x.shape)
        y = y if weight is None else y * weight.float()
        y = y if bias is None else y + bias.float()
        statistics_dtype = x.dtype if weight is None else weight.dtype
        axes = (*x.shape[:leading], *(1 for _ in shape))
        return self.cast(y, x.dtype), mean.view(axes).to(statistics_dtype), scale.view(axes).to(statistics_dtype)

    def group_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: int,
        channels: int,
        area: int,
        groups: int,
        eps: float,
    ):
        y, mean, scale = self._normalised(x.float().reshape(batch, groups, -1), eps)
        y = y.view(batch, channels, -1)
        y = y if weight is None else y * weight.float()[:, None]
        y = y if bias is None else y + bias.float()[:, None]
        statistics_dtype = x.dtype if weight is None else weight.dtype
        return (
            self.cast(y, x.dtype).view(x.shape),
            mean[..., 0].to(statistics_dtype),
            scale[..., 0].to(statistics_dtype),
        )


def _off(x: Tensor, places: int, upwards: bool) -> Tensor:
    """Numbers moved by up to `places` last places, by a hash of their bits, or all away from zero; 0, Inf, NaN stay."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    if upwards:
        moved = bits + places
    else:
        mixed = (bits.long() * 2654435761) >> 13
        moved = bits + (mixed % (2 * places + 1) - places).to(bits.dtype)
    moved = moved.view(x.dtype)
    return torch.where((x != 0) & x.isfinite() & moved.isfinite(), moved, x)
