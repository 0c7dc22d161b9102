"""Single operators, aimed at what upgrades of torch_npu and CANN really broke; the effective bits of each tell which
arithmetic ran.

An upgrade that breaks a model shows here by name: a product whose bits fall from 23 to 12.7 has become HF32, whatever
its switch says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Case
from harness.plugin import dtype_id

HALF = ("float16", "bfloat16")
DTYPES = ("float32", *HALF)
SEED = 42
DRAWS = 20_000  # random numbers of one probe


class Operator(nn.Module):
    """A function of tensors as a model without weights."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One operator in one use, the shapes of its normal inputs and the dtypes it runs in."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = DTYPES
    fallbacks: tuple[str, ...] = ()  # that torch_npu is known to make
    own_random: bool = False  # a probe of the device's own generator

    def cases(self) -> list[Case]:
        model = partial(Operator, self.function)  # one object, so that the dtypes share it
        more = dict(
            model=model, inputs=self.draw, fallbacks=self.fallbacks, own_random=self.own_random, companion=False
        )
        return [Case(name=self.name, dtype=dtype, **more) for dtype in self.dtypes]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


PROBES: list[Probe] = []


def probe(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], **more: Any) -> None:
    PROBES.append(Probe(name=name, function=function, shapes=shapes, **more))


# -------- what probes are made of


def cotangent(y: Tensor) -> Tensor:
    """What is sent backward into y: quarters from -3/4 to 3/4, exact in every dtype."""
    steps = torch.arange(y.numel(), device=y.device) % 7 - 3
    return (steps.to(y.dtype) / 4).reshape(y.shape)


def gradients(function: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """The gradients of a function towards each of its inputs."""

    def backward(*inputs: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaves = [input_.detach().requires_grad_() for input_ in inputs]
            y = function(*leaves)
            result = torch.autograd.grad(y, leaves, cotangent(y))
        return {f"gradient {index}": item for index, item in enumerate(result)}

    return backward


def strided(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A function on views of its first input (N, N): what an operator that takes strides for granted gets wrong."""
    return {
        "transposed": lambda x, *more: function(x.t(), *more),
        "every other": lambda x, *more: function(x[::2, 1::2], *more),
        "expanded": lambda x, *more: function(x[:, :1].expand(-1, x.shape[1]), *more),
        "offset": lambda x, *more: function(x[3:, 5:], *more),
    }


def whole(x: Tensor) -> Tensor:
    """Integers out of normal numbers, the same in every dtype."""
    return (x * 8).round().to(torch.int32)


def apart(y: Tensor) -> dict[str, Tensor]:
    """A result with its NaNs set apart, so that they are compared as positions."""
    return {"value": torch.where(y.isnan(), torch.zeros_like(y), y), "nan": y.isnan()}


def narrow(x: Tensor) -> torch.dtype:
    """The dtype of the case, also in float64's run of it."""
    if x.dtype != torch.float64:
        return x.dtype
    if torch.equal(x.bfloat16().double(), x):
        return torch.bfloat16
    return torch.float16 if torch.equal(x.half().double(), x) else torch.float32


def edges(x: Tensor) -> Tensor:
    """x with NaN, both infinities, both zeros and the dtype's ends in its first row."""
    ends = torch.finfo(narrow(x))
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, float(ends.tiny), 1e4, -1e4]
    return torch.cat([torch.tensor(special, dtype=x.dtype, device=x.device), x.flatten()[len(special) :]]).reshape(
        x.shape
    )


def distribution(
    draw: Callable[[Tensor], Tensor], cumulative: Callable[[Tensor], Tensor], low: float, high: float
) -> Callable[[Tensor], Tensor]:
    """The share of draws below 64 points; where it is within five standard deviations of the true share, the true
    share.

    Two devices draw other numbers from one seed; what they must share is the distribution.
    """

    def shares(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        drawn = draw(torch.empty_like(x)).double().cpu()
        points = torch.linspace(low, high, 64, dtype=torch.float64)
        true = cumulative(points)
        result = (drawn[:, None] <= points).double().mean(0)
        near = (result - true).abs() <= 5 * (true * (1 - true) / len(drawn)).sqrt() + 1 / len(drawn)
        return torch.where(near, true, result).to(x.dtype)

    return shares


# -------- products

for depth in (1, 16, 64, 257, 1024, 4096):
    probe(f"matmul, depth {depth}", torch.matmul, (48, depth), (depth, 40))
probe("matmul, batches broadcast", torch.matmul, (3, 1, 16, 64), (5, 64, 24))
probe("matmul, vector", torch.matmul, (40, 64), (64,))
probe("matmul, both transposed", lambda a, b: a.t() @ b.t(), (64, 48), (40, 64))
probe("matmul, slices", lambda a, b: a[:, ::2] @ b[1::2], (48, 128), (128, 40))
probe("matmul, gradients", gradients(torch.matmul), (48, 64), (64, 40))
probe("bmm", torch.bmm, (4, 24, 64), (4, 64, 20))
probe("bmm, gradients", gradients(torch.bmm), (4, 24, 64), (4, 64, 20))
probe("linear", F.linear, (4, 33, 64), (48, 64), (48,))
probe("linear, no bias", F.linear, (4, 33, 64), (48, 64))
probe("linear, gradients", gradients(F.linear), (4, 33, 64), (48, 64), (48,))
for alpha, beta in ((1, 1), (0.5, 2), (-1.25, 0.75), (3, 0)):
    probe(
        f"addmm, alpha {alpha} beta {beta}", partial(torch.addmm, alpha=alpha, beta=beta), (48, 40), (48, 64), (64, 40)
    )
    probe(
        f"baddbmm, alpha {alpha} beta {beta}",
        partial(torch.baddbmm, alpha=alpha, beta=beta),
        (4, 24, 20),
        (4, 24, 64),
        (4, 64, 20),
    )
probe("addmm, vector as bias", torch.addmm, (40,), (48, 64), (64, 40))
probe("addmm, gradients", gradients(partial(torch.addmm, alpha=0.5, beta=2)), (48, 40), (48, 64), (64, 40))
probe("addbmm", partial(torch.addbmm, alpha=0.5, beta=2), (24, 20), (4, 24, 64), (4, 64, 20))
probe("addmv", partial(torch.addmv, alpha=0.5, beta=2), (48,), (48, 64), (64,), dtypes=("float32",))
probe("einsum", lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (2, 3, 17, 32), (2, 3, 19, 32))
probe("outer", torch.outer, (48,), (40,))

# -------- convolutions

probe("conv2d", partial(F.conv2d, padding=1), (2, 16, 14, 14), (24, 16, 3, 3), (24,))
probe("conv2d, no bias, stride 2", partial(F.conv2d, stride=2), (2, 16, 15, 15), (24, 16, 3, 3))
probe("conv2d, patches of 14", partial(F.conv2d, stride=14), (1, 3, 56, 56), (96, 3, 14, 14), (96,))
probe("conv2d, dilated", partial(F.conv2d, dilation=2), (2, 16, 14, 14), (24, 16, 3, 3))
probe("conv2d, groups", partial(F.conv2d, groups=4), (2, 16, 14, 14), (24, 4, 3, 3))
probe("conv2d, depthwise", partial(F.conv2d, groups=16, padding=2), (2, 16, 14, 14), (16, 1, 5, 5), (16,))
probe("conv2d, 1 x 1", F.conv2d, (2, 64, 9, 9), (32, 64, 1, 1))
probe("conv2d, channels last", lambda x, w: F.conv2d(x.permute(0, 3, 1, 2), w), (2, 14, 14, 16), (24, 16, 3, 3))
probe("conv2d, gradients", gradients(partial(F.conv2d, padding=1)), (2, 16, 14, 14), (24, 16, 3, 3), (24,))
probe("conv1d", partial(F.conv1d, padding=2), (2, 32, 50), (24, 32, 5), (24,))
probe("conv3d", F.conv3d, (1, 8, 6, 7, 8), (12, 8, 3, 3, 3))
probe("conv_transpose2d", partial(F.conv_transpose2d, stride=2, padding=1), (2, 16, 9, 9), (16, 12, 4, 4), (12,))

# -------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, *mask, **options)


def masked(kind: str) -> Callable[..., Tensor]:
    """Attention under a mask that is made where it runs, since masks are what conversions between devices break."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = q.shape[-2], k.shape[-2]
        distance = (
            torch.arange(columns, device=q.device) - torch.arange(rows, device=q.device)[:, None] - (columns - rows)
        )
        if kind == "bool":
            return attend(q, k, v, attn_mask=distance <= 2)
        if kind == "padding":
            visible = torch.arange(columns, device=q.device) < columns - 5
            return attend(q, k, v, attn_mask=visible.expand(q.shape[0], 1, rows, columns))
        if kind == "additive -inf":
            return attend(
                q,
                k,
                v,
                attn_mask=torch.zeros(rows, columns, dtype=q.dtype, device=q.device).masked_fill(
                    distance > 2, -math.inf
                ),
            )
        if kind == "additive lowest":
            lowest = torch.finfo(torch.float32 if q.dtype == torch.float64 else q.dtype).min
            return attend(
                q,
                k,
                v,
                attn_mask=torch.zeros(rows, columns, dtype=q.dtype, device=q.device).masked_fill(distance > 2, lowest),
            )
        slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, device=q.device, dtype=q.dtype)
        return attend(q, k, v, attn_mask=(-distance.abs().to(q.dtype) / 8 * slopes[:, None, None])[None])

    return run


for kind in ("bool", "padding", "additive -inf", "additive lowest", "additive finite"):
    probe(f"attention, mask {kind}", masked(kind), *[(2, 3, 37, 32)] * 3)
probe("attention", attend, *[(2, 3, 37, 32)] * 3)
probe("attention, causal", partial(attend, is_causal=True), *[(2, 3, 37, 32)] * 3)
probe("attention, scale", partial(attend, scale=0.3), *[(2, 3, 37, 32)] * 3)
probe("attention, one query", attend, (2, 3, 1, 64), (2, 3, 77, 64), (2, 3, 77, 64))
probe("attention, one query, mask bool", masked("bool"), (2, 3, 1, 64), (2, 3, 77, 64), (2, 3, 77, 64))
probe("attention, shared heads", partial(attend, enable_gqa=True), (2, 6, 37, 32), (2, 2, 37, 32), (2, 2, 37, 32))
probe(
    "attention, heads last",
    lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
    *[(2, 37, 3, 32)] * 3,
)
probe("attention, gradients", gradients(attend), *[(1, 2, 33, 32)] * 3)
probe("attention, gradients, causal", gradients(partial(attend, is_causal=True)), *[(1, 2, 33, 32)] * 3)
for size in (13, 72, 80, 200, 256):
    probe(f"attention, heads of {size}", attend, *[(1, 2, 33, size)] * 3)
for length in (511, 513, 1025, 2049):
    probe(
        f"attention, mask bool, {length} keys", masked("bool"), (1, 1, 65, 32), (1, 1, length, 32), (1, 1, length, 32)
    )
    probe(
        f"attention, mask additive finite, {length} keys",
        masked("additive finite"),
        (1, 1, 65, 32),
        (1, 1, length, 32),
        (1, 1, length, 32),
        dtypes=HALF,
    )

# -------- softmax and norms

for axis in (-1, 0, 1):
    probe(f"softmax, axis {axis}", partial(torch.softmax, dim=axis), (5, 33, 65))
probe("softmax, large values", lambda x: torch.softmax(x * 64, -1), (33, 65))
probe("softmax, gradients", gradients(partial(torch.softmax, dim=-1)), (33, 65))
probe("log_softmax", partial(F.log_softmax, dim=-1), (33, 65))
probe("logsumexp", partial(torch.logsumexp, dim=-1), (1024, 65))
probe("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), (33, 197), (197,), (197,))
probe("layer_norm, far from zero", lambda x: F.layer_norm(x + 30, x.shape[-1:]), (33, 197))
probe("layer_norm, gradients", gradients(lambda x, w, b: F.layer_norm(x, w.shape, w, b)), (33, 197), (197,), (197,))
probe("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), (33, 197), (197,))
probe("group_norm", lambda x, w, b: F.group_norm(x, 4, w, b), (2, 16, 9, 9), (16,), (16,))
probe("batch_norm", lambda x, m, v: F.batch_norm(x, m, v.abs() + 0.5), (4, 16, 9, 9), (16,), (16,))
probe("batch_norm, training", lambda x: F.batch_norm(x, None, None, training=True), (4, 16, 9, 9), dtypes=("float32",))
probe("instance_norm", F.instance_norm, (2, 16, 9, 9), dtypes=("float32",))
probe("normalize", partial(F.normalize, dim=-1), (33, 65))

# -------- elementwise

ELEMENTWISE = {
    "gelu, none": F.gelu,
    "gelu, tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.1),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": lambda x: torch.log(x.abs() + 0.25),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.25).rsqrt(),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.25),
    "erf": torch.erf,
    "sin, large arguments": lambda x: torch.sin(x * 256),
    "cos": torch.cos,
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "pow": lambda x: (x.abs() + 0.25) ** 1.7,
    "fmod": lambda x: torch.fmod(x * 8, 3.0),
    "round": lambda x: torch.round(x * 4) / 4,
    "floor division": lambda x: (x * 8) // 3,
    "remainder": lambda x: (x * 8) % 3,
    "clamp": lambda x: x.clamp(-0.5, 0.75),
}
for name, function in ELEMENTWISE.items():
    probe(name, function, (48, 40))
for name in ("gelu, none", "gelu, tanh", "silu", "sigmoid"):
    probe(f"{name}, gradients", gradients(ELEMENTWISE[name]), (48, 40))
probe("add, alpha", partial(torch.add, alpha=-1.5), (48, 40), (40,))
probe("addcmul", partial(torch.addcmul, value=0.3), (48, 40), (48, 40), (40,))
probe("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z.abs() + 0.5, value=0.3), (48, 40), (48, 40), (40,))
probe("lerp", lambda x, y: torch.lerp(x, y, 0.3), (48, 40), (48, 40))
probe("where", lambda x, y: torch.where(x > y, x, y), (48, 40), (40,))

# -------- reductions

for correction in (0, 1, 0.5, 2, 7.25):  # aclnnStd takes whole ones, so torch_npu leaves the others to the CPU
    left = {} if correction == int(correction) else {"fallbacks": ("aten::std.correction", "aten::var.correction")}
    probe(f"std, correction {correction}", lambda x, c=correction: x.std(-1, correction=c), (1024, 33), **left)
    probe(f"var, correction {correction}", lambda x, c=correction: x.var((0, 2), correction=c), (3, 1024, 11), **left)
probe("std, far from zero", lambda x: (x + 8).std(-1), (1024, 33))
probe("var_mean", lambda x: dict(zip(("var", "mean"), torch.var_mean(x + 1, -1))), (1024, 33))
probe("sum, last axis", lambda x: x.sum(-1), (1024, 33))
probe("sum, first axis", lambda x: x.sum(0), (33, 1024))
probe("sum, long", lambda x: (x.abs() + 1).sum(-1), (1000, 4097), dtypes=("float32",))
probe("mean", lambda x: (x + 1).mean((0, 2)), (3, 1024, 11))
probe("prod", lambda x: (1 + x / 16).prod(-1), (1024, 33))
probe("cumsum", lambda x: x.cumsum(-1), (33, 129))
for order in (1, 2, 3, math.inf):
    probe(f"norm of order {order}", lambda x, p=order: torch.linalg.vector_norm(x, p, -1), (1024, 33))
probe("max and where", lambda x: dict(zip(("value", "index"), x.max(-1))), (1024, 33))
probe("argmax and amin", lambda x: {"index": x.argmax(0), "least": x.amin(0)}, (33, 1024))
probe("topk", lambda x: x.topk(5, -1).values, (256, 33))
probe("sort", lambda x: x.sort(-1, descending=True).values, (64, 65))

# -------- layouts and views

MOVED: dict[str, Callable[..., Any]] = {
    "exp": torch.exp,
    "softmax": partial(torch.softmax, dim=-1),
    "sum": lambda x: x.sum(0),
    "add": lambda x: x + x.flip(0),
    "gelu": F.gelu,
    "cumsum": lambda x: x.cumsum(0),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "matmul": lambda x: x @ x.t(),
}
for operator, function in MOVED.items():
    for view, on_view in strided(function).items():
        probe(f"{operator}, {view}", on_view, (48, 48), dtypes=("float32",))


def written(fill: Callable[[Tensor], Any], shape: tuple[int, int] = (32, 40)) -> Callable[[Tensor], Tensor]:
    """What an out= or in-place operator leaves in a column of a larger tensor, and beside it."""

    def run(x: Tensor) -> Tensor:
        target = x.clone()
        fill(target[:, 3])
        return target

    return run


probe(
    "logspace into a column",
    written(lambda column: torch.logspace(-2, 2, len(column), dtype=column.dtype, device=column.device, out=column)),
    (32, 40),
    dtypes=("float32",),
)
probe(
    "linspace into a column",
    written(lambda column: torch.linspace(-3, 5, len(column), dtype=column.dtype, device=column.device, out=column)),
    (32, 40),
    dtypes=("float32",),
)
probe("exp into a column", written(lambda column: torch.exp(column.clone(), out=column)), (32, 40))
probe("add_ to a column", written(lambda column: column.add_(1.5)), (32, 40))
probe("copy_ to a column", written(lambda column: column.copy_(column.flip(0))), (32, 40))
probe("fill_ of a column", written(lambda column: column.fill_(0.75)), (32, 40))
probe(
    "index and gather",
    lambda x: {"index": x[whole(x[:, 0]).long().abs() % 32], "gather": x.gather(1, whole(x).long().abs() % 40)},
    (32, 40),
)
probe("index_add", lambda x: x.index_add(0, (whole(x[:, 0]).abs() % 32).long(), x.flip(0), alpha=0.5), (32, 40))
probe("scatter_add", lambda x: x.scatter_add(1, (whole(x).abs() % 40).long(), x.flip(0)), (32, 40))
probe("index_put", lambda x: x.index_put((torch.arange(16, device=x.device) * 2,), x[:16] * 2), (32, 40))
probe("masked_fill", lambda x: x.masked_fill(x > 0.5, -2.0), (32, 40))
probe("tril", lambda x: {"tril": x.tril(-1), "triu": x.triu(2)}, (32, 40))
probe("roll, flip, permute", lambda x: x.permute(2, 0, 1).roll(3, 0).flip(1).contiguous(), (6, 10, 18))
probe("cat of views", lambda x: torch.cat([x.t()[:, ::2], x[:40, :16]], 1), (40, 40))
probe("pad, reflect", lambda x: F.pad(x, (2, 3, 1, 2), mode="reflect"), (2, 3, 9, 9))
probe("unfold", lambda x: F.unfold(x, 3, padding=1), (2, 3, 9, 9))
probe("embedding", lambda w: F.embedding((torch.arange(60, device=w.device) * 7 % 50).reshape(4, 15), w), (50, 32))
probe(
    "embedding, gradients",
    gradients(lambda w: F.embedding((torch.arange(60, device=w.device) * 7 % 50).reshape(4, 15), w)),
    (50, 32),
)
probe(
    "interpolate, bicubic", partial(F.interpolate, size=(21, 17), mode="bicubic", align_corners=False), (1, 6, 16, 16)
)
probe(
    "interpolate, bilinear",
    partial(F.interpolate, scale_factor=2, mode="bilinear", align_corners=False),
    (1, 6, 11, 13),
)
probe("interpolate, nearest", partial(F.interpolate, size=(21, 17), mode="nearest"), (1, 6, 16, 16))
probe("max_pool2d", partial(F.max_pool2d, kernel_size=3, stride=2, padding=1), (2, 8, 15, 15))
probe("avg_pool2d", partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1), (2, 8, 15, 15))
probe("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (5, 7)), (2, 8, 20, 21))

# -------- losses and recurrences

probe(
    "cross_entropy",
    lambda x: F.cross_entropy(x, torch.arange(1024, device=x.device) % 10, reduction="none"),
    (1024, 10),
)
probe(
    "cross_entropy, gradients",
    gradients(lambda x: F.cross_entropy(x, torch.arange(256, device=x.device) % 10, label_smoothing=0.1)),
    (256, 10),
)
probe("mse_loss", partial(F.mse_loss, reduction="none"), (48, 40), (48, 40))
probe("smooth_l1_loss", partial(F.smooth_l1_loss, reduction="none", beta=0.5), (48, 40), (48, 40))
probe(
    "binary_cross_entropy_with_logits",
    lambda x, y: F.binary_cross_entropy_with_logits(x, (y > 0).to(x.dtype), reduction="none"),
    (48, 40),
    (48, 40),
)
probe("kl_div", lambda x, y: F.kl_div(F.log_softmax(x, -1), torch.softmax(y, -1), reduction="none"), (48, 40), (48, 40))

# -------- Python numbers and result dtypes

SCALARS: dict[str, Callable[[Tensor], Any]] = {
    "tensor and number": lambda x: {
        "add": x + 2,
        "multiply": x * 0.3,
        "from": 1 - x,
        "over": 2 / (x.abs() + 1),
        "power": x**2,
    },
    "integers and number": lambda x: {
        "add": whole(x) + 1.5,
        "divide": whole(x) / 3,
        "multiply": whole(x) * 3,
        "floor": whole(x) // 3,
        "rest": whole(x) % 3,
    },
    "bools and number": lambda x: {
        "add": (x > 0) + 1,
        "scaled": (x > 0) * 0.5,
        "sum": (x > 0).sum(),
        "mean": (x > 0).double().float().mean(-1),
    },
    "number of another dtype": lambda x: {
        "zero axes": x + torch.tensor(0.3, dtype=torch.float32),
        "integer": x * torch.tensor(3),
    },
    "comparisons": lambda x: {
        "above": x > 0.5,
        "equal": whole(x) == 3,
        "between": (x >= -0.25) & (x < 0.25),
        "kept": x,
    },
    "where with numbers": lambda x: {"both": torch.where(x > 0, 1.0, -1.0), "one": torch.where(x > 0, x, 0.5)},
    "sums of integers": lambda x: {
        "sum": whole(x).sum(-1),
        "cumsum": whole(x).cumsum(-1),
        "mean": whole(x).float().mean(-1),
    },
    "casts": lambda x: {
        "int32": (x * 8).to(torch.int32),
        "int8": (x * 8).to(torch.int8),
        "half": x.to(torch.float16),
        "wide": x.to(torch.float32),
    },
    "arange and full": lambda x: {
        "arange": torch.arange(0, 3, 0.25, dtype=x.dtype, device=x.device),
        "full": torch.full((7,), 0.3, dtype=x.dtype, device=x.device),
        "kept": x,
    },
    "linspace and logspace": lambda x: {
        "lin": torch.linspace(-3, 5, 1001, dtype=x.dtype, device=x.device),
        "log": torch.logspace(-1, 1, 1001, dtype=x.dtype, device=x.device),
    },
}
for name, function in SCALARS.items():
    probe(name, function, (48, 40))

# -------- Inf and NaN

EDGES: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic at the edges": lambda x: apart(edges(x) * 2 - edges(x).flip(0)),
    "exp at the edges": lambda x: apart(torch.exp(edges(x))),
    "log and sqrt at the edges": lambda x: {
        **apart(torch.log(edges(x))),
        **{f"root {name}": item for name, item in apart(torch.sqrt(edges(x))).items()},
    },
    "division by zero": lambda x: apart(edges(x) / torch.zeros_like(x)),
    "activations at the edges": lambda x: {
        **apart(F.silu(edges(x))),
        **{f"gelu {name}": item for name, item in apart(F.gelu(edges(x), approximate="tanh")).items()},
    },
    "max and min at the edges": lambda x: {
        **apart(edges(x).amax(-1)),
        **{f"least {name}": item for name, item in apart(edges(x).amin(-1)).items()},
    },
    "clamp at the edges": lambda x: apart(edges(x).clamp(-1, 1)),
    "softmax with -inf": lambda x: torch.softmax(x.masked_fill(x > 1, -math.inf), -1),
    "nan_to_num": lambda x: torch.nan_to_num(edges(x), nan=0.5, posinf=3.0, neginf=-3.0),
    "comparisons with NaN": lambda x: {
        "equal": edges(x) == edges(x),
        "less": edges(x) < 1,
        "nan": edges(x).isnan(),
        "inf": edges(x).isinf(),
        "kept": x,
    },
}
for name, function in EDGES.items():
    probe(name, function, (40, 48))
probe(
    "float16 overflows",  # as Inf, which float64 would not show: where, not what
    lambda x: {
        "multiply": ((x * 300) * 400).isinf(),
        "matmul": ((x * 40) @ (x * 40).t()).isinf(),
        "cast": (x.float() * 1e5).to(x.dtype).isinf(),
        "kept": x,
    },
    (40, 48),
    dtypes=("float16",),
)

# -------- long axes
# Kernels cut an axis into tiles, and another tiling begins where it fits no more: one past 4,096, and two vocabularies.

LONG = (4097, 32_000, 151_936)


def targets(x: Tensor) -> Tensor:
    """A class for each row, from all over the axis."""
    return (torch.arange(len(x), device=x.device) * 40_503 + 7) % x.shape[-1]


def largest_of(x: Tensor) -> dict[str, Tensor]:
    """The largest values, and what lies at their indices: of equal numbers, of which a long half axis has many, torch
    promises no order.
    """
    values, indices = x.topk(50, -1)
    return {"values": values, "at the indices": x.gather(-1, indices), "distinct": indices.sort(-1).values.diff() > 0}


ALONG: dict[str, Callable[..., Any]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "log_softmax": partial(F.log_softmax, dim=-1),
    "cross_entropy": lambda x: F.cross_entropy(x * 4, targets(x), reduction="none"),
    "argmax": lambda x: {"index": x.argmax(-1), "largest": x.amax(-1), "least": x.argmin(-1)},
    "topk": largest_of,
    "cumsum": lambda x: x.cumsum(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-5),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
}
for size in LONG:
    for name, function in ALONG.items():
        probe(f"{name}, axis of {size}", function, (12, size) if size < 10_000 else (2, size))

# -------- random numbers

RANDOM = {
    "normal_": (lambda x: x.normal_(2, 3), lambda p: 0.5 * (1 + torch.erf((p - 2) / 3 / math.sqrt(2))), -8, 12),
    "randn": (
        lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device),
        lambda p: 0.5 * (1 + torch.erf(p / math.sqrt(2))),
        -4,
        4,
    ),
    "uniform_": (lambda x: x.uniform_(-1, 3), lambda p: ((p + 1) / 4).clamp(0, 1), -0.99, 2.99),
    "exponential_": (lambda x: x.exponential_(2), lambda p: 1 - torch.exp(-2 * p), 0.01, 4),
    "bernoulli_": (lambda x: x.bernoulli_(0.3), lambda p: torch.where(p < 1, 0.7, 1.0).double(), 0.1, 1.9),
    "dropout": (
        lambda x: F.dropout(torch.ones_like(x), 0.25),
        lambda p: torch.where(p < 4 / 3, 0.25, 1.0).double(),
        0.1,
        1.9,
    ),
    "multinomial": (
        lambda x: torch.multinomial(torch.tensor([0.1, 0.2, 0.3, 0.4], device=x.device), len(x), replacement=True),
        lambda p: torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)[p.long()],
        0.1,
        3.9,
    ),
    "randperm": (lambda x: torch.randperm(len(x), device=x.device) / len(x), lambda p: p, 0.01, 0.99),
}
for name, (draw, cumulative, low, high) in RANDOM.items():
    probe(
        f"distribution of {name}",
        distribution(draw, cumulative, low, high),
        (DRAWS,),
        dtypes=("float32",),
        own_random=True,
    )

# -------- cases

CASES = [case for item in PROBES for case in item.cases()]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}, {dtype_id(case.dtype)}" for case in CASES])
def test_precision(precision, case):
    precision(case, SEED)
