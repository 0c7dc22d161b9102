"""The ten measurements that show how a device rounds, sums and overflows: numbers as they come, without a verdict.

Needs torch, and torch_npu for an NPU; nothing else of the harness, so that this file alone runs on any machine with an
NPU:

    python measurements.py npu:0 > probe.json        # "cpu" shows what exact float32 answers

What an operator raises is what was measured of it: {"raised": "RuntimeError: …"}. `python -m harness doctor
--read-probe probe.json` says what the numbers mean.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PROBE_SCHEMA = "npu-probe/1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INNER = (64, 1024, 8192)  # lengths K of the sums of products
_KEYS = (64, 513, 2048)  # of attention
ELEMENTS = 1 << 17  # of the vector unit's functions
REPEATS = 20
BITS = range(1, 24)  # mantissa bits of float32
LENGTH = 64  # of the sum whose order is looked at


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One of them: what it is called, how it is taken on a device, and the switch that it sets while it runs."""

    name: str
    take: Callable[[torch.device], Any]
    switch: tuple[str, bool] | None = None  # ("conv", False): torch.npu.conv.allow_hf32 = False


def measure(
    device: torch.device, wanted: tuple[str, ...] | None = None, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Take the measurements, or those of `wanted` by name, in order: {"measured": {name: numbers}, "seconds": {name:
    seconds}}.

    An operator that raises ends its own measurement. Where the device computes nothing any more after it, the others
    are left out and "stopped" says where: what such a device answers is old memory.
    """
    measured, seconds, stopped = {}, {}, None
    for measurement in MEASUREMENTS:
        if wanted is not None and measurement.name not in wanted:
            continue
        say(measurement.name)
        began = time.perf_counter()
        measured[measurement.name] = plain(_switched(measurement, device))
        seconds[measurement.name] = round(time.perf_counter() - began, 3)
        if _raised(measured[measurement.name]) and not computes(device):
            stopped = measurement.name
            break
    return {"measured": measured, "seconds": seconds, "stopped": stopped}


def computes(device: torch.device) -> bool:
    """Whether the device still computes: numbers that it never saw before, plus one."""
    numbers = [random.SystemRandom().randrange(1 << 20) for _ in range(8)]
    with contextlib.suppress(Exception):
        return (torch.tensor(numbers, dtype=torch.float32).to(device) + 1).cpu().tolist() == [
            number + 1 for number in numbers
        ]
    return False


def _raised(numbers: Any) -> bool:
    """Whether something in a measurement was raised."""
    return isinstance(numbers, dict) and ("raised" in numbers or any(_raised(number) for number in numbers.values()))


def tried(take: Callable[[], Any]) -> Any:
    """What `take` gives, or what it raises as {"raised": text}: an operator that a device refuses is a result."""
    try:
        return take()
    except Exception as error:  # noqa: BLE001  the exception is what was measured
        text = " ".join(str(error).split())
        # torch_npu names the operator at the beginning, CANN its reason at the end.
        text = text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"
        return {"raised": f"{type(error).__name__}: {text}"}


def _switched(measurement: Measurement, device: torch.device) -> Any:
    if measurement.switch is None:
        return tried(lambda: measurement.take(device))
    if device.type != "npu":
        return {"absent": f"{device.type} has no allow_hf32"}

    def take() -> Any:
        with switch(*measurement.switch):
            return measurement.take(device)

    return tried(take)


@contextlib.contextmanager
def switch(what: str, value: bool) -> Iterator[None]:
    """While the block runs, torch.npu.conv.allow_hf32 or torch.npu.matmul.allow_hf32 has this value."""
    owner = getattr(torch.npu, what)
    before = owner.allow_hf32
    owner.allow_hf32 = value
    try:
        yield
    finally:
        owner.allow_hf32 = before


def plain(value: Any) -> Any:
    """`value` for JSON: what is not finite becomes "nan", "inf" or "-inf"."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _effective_bits(result: Tensor, exact: Tensor) -> float:
    """-log2 of the relative L2 error; 53 where nothing differs, NaN where something is not finite."""
    error = float((result.double() - exact).norm() / exact.norm())
    return min(-math.log2(error), 53.0) if error else 53.0


def by_dtype(take: Callable[[torch.dtype], Any]) -> dict[str, Any]:
    return {short(dtype): tried(lambda dtype=dtype: take(dtype)) for dtype in _DTYPES}


# -------- 1 and 2: what an operand is
# rounded to


def ties_of(bits: int) -> list[float]:
    """Numbers that show how `bits` mantissa bits are rounded: below an even one a tie, below an odd one a tie, and
    beside the first.
    """
    step = 2.0**-bits
    low = 1 + step / 2
    return [low, 1 + step + step / 2, low + step / 8, low - step / 8]


@functools.cache
def cube_operands() -> tuple[float, ...]:
    """The float32 numbers that go through the cube: one bit each, ties of 7 to 13 bits with both signs, large and
    small ones.
    """
    result = [1 + 2.0**-bit for bit in BITS]
    for bits in range(7, 14):
        result += [sign * tie for sign in (1, -1) for tie in ties_of(bits)]
    return (*result, 70000.0, 3e38, 2.0**-20, 2.0**-30, 2.0**-120, 2.0**-130, 2.0**-134)


def _pairs(returned: Tensor) -> dict[str, list[str]]:
    """Operand and result, both as hexadecimal floats, which keep every bit."""
    given = torch.tensor(cube_operands(), dtype=torch.float32).double().tolist()
    return {
        "given": [argument.hex() for argument in given],
        "returned": [number.hex() for number in returned.double().flatten().tolist()],
    }


def _operands() -> Tensor:
    return torch.tensor(cube_operands(), dtype=torch.float32)


def conv_operand(device: torch.device) -> dict[str, list[str]]:
    """A convolution with one weight of 1: each picture holds one number, and gives it back as the cube took it."""
    x = torch.zeros(len(cube_operands()), 16, 4, 4)
    x[:, 0, 1, 1] = _operands()
    weight = torch.zeros(16, 16, 2, 2)
    weight[0, 0, 0, 0] = 1
    return _pairs(F.conv2d(x.to(device), weight.to(device)).cpu()[:, 0, 1, 1])


def conv_weight(device: torch.device) -> dict[str, list[str]]:
    """The same with the numbers as weights and a picture of one 1."""
    weight = torch.zeros(len(cube_operands()), 16, 2, 2)
    weight[:, 0, 0, 0] = _operands()
    x = torch.zeros(1, 16, 4, 4)
    x[0, 0, 1, 1] = 1
    return _pairs(F.conv2d(x.to(device), weight.to(device)).cpu()[0, :, 1, 1])


def conv_bias(device: torch.device) -> dict[str, list[str]]:
    """The same with the numbers as bias of a convolution of zeros."""
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(len(cube_operands()), 16, 2, 2)
    return _pairs(F.conv2d(x.to(device), weight.to(device), _operands().to(device)).cpu()[0, :, 1, 1])


def product_operand(device: torch.device) -> dict[str, list[str]]:
    """A product with the identity, the numbers on its left."""
    left = torch.zeros(len(cube_operands()), 64)
    left[:, 0] = _operands()
    return _pairs((left.to(device) @ torch.eye(64).to(device)).cpu()[:, 0])


def product_weight(device: torch.device) -> dict[str, list[str]]:
    """A product with the identity, the numbers on its right."""
    right = torch.zeros(64, len(cube_operands()))
    right[0] = _operands()
    return _pairs((torch.eye(64).to(device) @ right.to(device)).cpu()[0])


# -------- 3: the order of the
# sums


def sums(device: torch.device) -> dict[str, Any]:
    """Sums of 64 products: 2^24, ones, and -2^24 at place p, for each p: a one that is added to 2^24 alone is lost.

    Large terms are products of 4096, so that every dtype holds them. Beside it what the accumulator makes of 2^24 + v.
    """

    def of(dtype: torch.dtype) -> list[float]:
        left, right = torch.ones(LENGTH, LENGTH), torch.ones(LENGTH, LENGTH)
        left[1:, 0], right[0, 1:] = 4096, 4096
        for index in range(1, LENGTH):
            left[index, index], right[index, index] = -4096, 4096
        return (left.to(dtype).to(device) @ right.to(dtype).to(device)).float().cpu().diagonal().tolist()

    return {**by_dtype(of), "rounded": tried(lambda: _accumulated(device))}


ADDED = (0.5, 1.0, 1.5, 2.5, 3.0, 3.5)  # to 2^24, where a last place is 2


def _accumulated(device: torch.device) -> dict[str, float]:
    """2^24 + v and -2^24 - v, less 2^24: how the accumulator rounds."""
    left, right = torch.zeros(2 * len(ADDED), LENGTH), torch.zeros(LENGTH, 16)
    for row, value in enumerate((*ADDED, *(-item for item in ADDED))):
        left[row, 0], left[row, LENGTH - 1] = math.copysign(2.0**24, value), value
    right[0], right[LENGTH - 1] = 1, 1
    result = (left.to(device) @ right.to(device)).cpu()[:, 0].double()
    given = (*ADDED, *(-item for item in ADDED))
    return {str(value): float(item) - math.copysign(2.0**24, value) for value, item in zip(given, result)}


# -------- 4, 6 and 10: effective bits against
# float64


@functools.cache
def _factors(dtype: torch.dtype, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    left, right = drawn(64, inner, seed=inner).to(dtype), drawn(inner, 64, seed=inner + 1).to(dtype)
    return left, right, left.double() @ right.double()


def products(device: torch.device) -> dict[str, Any]:
    """Effective bits of (64, K) by (K, 64), by dtype and K."""

    def of(dtype: torch.dtype, inner: int) -> float:
        left, right, exact = _factors(dtype, inner)
        return _effective_bits((left.to(device) @ right.to(device)).cpu(), exact)

    return by_dtype(lambda dtype: {str(inner): tried(lambda: of(dtype, inner)) for inner in INNER})


MASKS = ("none", "bool", "causal")


@functools.cache
def _attended(dtype: torch.dtype, keys: int, mask: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], Tensor]:
    heads = tuple(drawn(1, 1, keys, 64, seed=3 * keys + part).to(dtype) for part in range(3))
    seen = (torch.rand(keys, keys, generator=torch.Generator().manual_seed(keys)) > 0.3).fill_diagonal_(True)
    options = {"none": {}, "bool": {"attn_mask": seen}, "causal": {"is_causal": True}}[mask]
    return heads, options, F.scaled_dot_product_attention(*(head.double() for head in heads), **options)


def measured_attention(device: torch.device) -> dict[str, Any]:
    """Effective bits of attention, one head of 64, by dtype, number of keys and mask."""

    def of(dtype: torch.dtype, keys: int, mask: str) -> float:
        heads, options, exact = _attended(dtype, keys, mask)
        there = {name: option.to(device) if isinstance(option, Tensor) else option for name, option in options.items()}
        return _effective_bits(
            F.scaled_dot_product_attention(*(head.to(device) for head in heads), **there).cpu(), exact
        )

    names = [(keys, mask) for keys in _KEYS for mask in MASKS]
    return by_dtype(lambda dtype: {f"{keys} {mask}": tried(lambda: of(dtype, keys, mask)) for keys, mask in names})


@functools.cache
def _patches(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    picture, weight = drawn(1, 3, 224, 224, seed=7).to(dtype), (drawn(512, 3, 14, 14, seed=8) / 24).to(dtype)
    return picture, weight, F.conv2d(picture.double(), weight.double(), stride=14)


def patches(device: torch.device) -> dict[str, Any]:
    """Effective bits of a patch convolution, 14 by 14 of a picture of 224 by 224, by dtype."""

    def of(dtype: torch.dtype) -> float:
        picture, weight, exact = _patches(dtype)
        return _effective_bits(F.conv2d(picture.to(device), weight.to(device), stride=14).cpu(), exact)

    return by_dtype(of)


# -------- 5 and 7: GELU and the
# vector unit


def _gelu(device: torch.device) -> dict[str, Any]:
    """Largest distance of F.gelu in [-6, 6] to the erf formula and to the tanh formula, for both of its arguments."""
    x = torch.linspace(-6, 6, 4801)
    exact = {name: F.gelu(x.double(), approximate=how) for name, how in (("erf", "none"), ("tanh", "tanh"))}

    def of(approximate: str) -> dict[str, float]:
        result = F.gelu(x.to(device), approximate=approximate).cpu().double()
        return {f"to {name}": float((result - item).abs().max()) for name, item in exact.items()}

    return {approximate: tried(lambda: of(approximate)) for approximate in ("none", "tanh")}


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "erf": torch.erf, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "log": torch.log,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "sin": torch.sin, "silu": F.silu,
}  # fmt: skip
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal")
_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1), "layer_norm": lambda x: F.layer_norm(x, (1024,)),
    "sum": lambda x: x.sum(-1), "mean_square": lambda x: x.square().mean(-1),
}  # fmt: skip


@functools.cache
def _wave(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = drawn(ELEMENTS, seed=9) * 4
    x = (x.abs() + 1e-3 if name in POSITIVE else x).to(dtype)
    return x, _FUNCTIONS[name](x.double())


def vector(device: torch.device) -> dict[str, Any]:
    """Ten functions: largest and mean distance to float64 in last places, for results of 1e-3 to 6e4. Rows of 1024:
    effective bits.
    """

    def of(name: str, dtype: torch.dtype) -> dict[str, float]:
        x, exact = _wave(name, dtype)
        result = _FUNCTIONS[name](x.to(device)).cpu().double()
        normal = (exact.abs() > 1e-3) & (exact.abs() < 6e4)
        ulp = 2.0 ** (exact[normal].abs().log2().floor() - (23 if dtype == torch.float32 else 10))
        ulps = (result[normal] - exact[normal]).abs() / ulp
        return {"max": round(float(ulps.max()), 3), "mean": round(float(ulps.mean()), 4)}

    def row(name: str) -> float:
        x = drawn(512, 1024, seed=10)
        return _effective_bits(_ROWS[name](x.to(device)).cpu(), _ROWS[name](x.double()))

    dtypes = (torch.float32, torch.float16)
    result: dict[str, Any] = {
        short(dtype): {name: tried(lambda: of(name, dtype)) for name in _FUNCTIONS} for dtype in dtypes
    }
    return result | {"rows": {name: tried(lambda: row(name)) for name in _ROWS}}


# -------- 8 and 9: overflow, subnormals, NaN;
# repeats


def edges(device: torch.device) -> dict[str, Any]:
    """What overflows, what is below the normal range, and NaN; every number as text."""
    half, nan, inf = torch.float16, math.nan, math.inf

    def item(take: Callable[[], Tensor]) -> Any:
        return tried(lambda: take().cpu().double().flatten()[0].item().hex())

    def on(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value], dtype=dtype).to(device)

    def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=dtype).to(device)

    return {
        "half times 2 above the range": item(lambda: on(65504.0, half) * 2),
        "half product above the range": item(lambda: full(60000.0, half, 16, 16) @ full(1.0, half, 16, 16)),
        "half convolution above the range": item(
            lambda: F.conv2d(full(60000.0, half, 1, 16, 4, 4), full(1.0, half, 16, 16, 2, 2))
        ),
        "float32 to half above the range": item(lambda: on(70000.0).to(half)),
        "float32 times 2 above the range": item(lambda: on(3e38) * 2),
        "half subnormal times 1": item(lambda: on(2.0**-20, half) * on(1.0, half)),
        "float32 subnormal times 1": item(lambda: on(1e-39) * on(1.0)),
        "half inf less inf": item(lambda: on(inf, half) - on(inf, half)),
        "half nan times 1": item(lambda: on(nan, half) * 1),
        "float32 nan times 1": item(lambda: on(nan) * 1),
        "half square root of -1": item(lambda: on(-1.0, half).sqrt()),
        "nan in a product": item(lambda: full(nan, torch.float32, 16, 16) @ full(1.0, torch.float32, 16, 16)),
    }


def repeats(device: torch.device) -> dict[str, Any]:
    """How many different answers the same operator gives in 20 runs, and whether a row alone has the bits that it has
    in a batch.
    """
    x, weight = drawn(4, 64, 28, 28, seed=11).to(device), drawn(64, 64, 3, 3, seed=12).to(device)

    def answers(take: Callable[[], Tensor]) -> int:
        return len({take().cpu().float().numpy().tobytes() for _ in range(REPEATS)})

    def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return drawn(8, 16384, seed=13).to(dtype).to(device), drawn(16384, 256, seed=14).to(dtype).to(device)

    def product(dtype: torch.dtype) -> dict[str, Any]:
        left, right = factors(dtype)
        alone = torch.equal((left[:1] @ right).cpu(), (left @ right)[:1].cpu())
        return {"answers": answers(lambda: left @ right), "row alone": bool(alone)}

    convolution = {
        "answers": tried(lambda: answers(lambda: F.conv2d(x, weight, padding=1))),
        "row alone": tried(
            lambda: torch.equal(F.conv2d(x[:1], weight, padding=1).cpu(), F.conv2d(x, weight, padding=1)[:1].cpu())
        ),
    }
    return {"product": by_dtype(product), "convolution": convolution}


MEASUREMENTS = (
    Measurement(name="1 conv operand", take=conv_operand),
    Measurement(name="1 conv weight", take=conv_weight),
    Measurement(name="1 conv bias", take=conv_bias),
    Measurement(name="1 conv operand, allow_hf32 off", take=conv_operand, switch=("conv", False)),
    Measurement(name="2 product operand", take=product_operand),
    Measurement(name="2 product weight", take=product_weight),
    Measurement(name="2 product operand, allow_hf32 on", take=product_operand, switch=("matmul", True)),
    Measurement(name="3 sums", take=sums),
    Measurement(name="4 products", take=products),
    Measurement(name="5 gelu", take=_gelu),
    Measurement(name="6 attention", take=measured_attention),
    Measurement(name="7 vector", take=vector),
    Measurement(name="8 edges", take=edges),
    Measurement(name="9 repeats", take=repeats),
    Measurement(name="10 patches", take=patches),
)


# -------- run as a
# script


def stack_of(device: torch.device) -> dict[str, Any]:
    """Versions and switches, by the names that a report's stack has."""
    result: dict[str, Any] = {
        "device": platform.machine(),
        "backend": device.type,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if device.type != "npu":
        return result
    import torch_npu

    def option(name: str) -> str | None:
        value = torch_npu._C._npu_getOption(name)
        return value.decode() if value else None

    def quietly(read: Callable[[], Any]) -> Any:
        with contextlib.suppress(Exception):
            return read()
        return None

    emulator = sys.modules.get("harness.emulator")
    return result | {
        "device": torch.npu.get_device_name(device.index or 0),
        "backend": "emulated" if emulator is not None and emulator.installed() else "npu",
        "torch_npu": torch_npu.__version__,
        "torch_npu_git": quietly(lambda: torch_npu.version.git_version),
        "cann": quietly(lambda: torch_npu.npu.utils.get_cann_version()),
        "conv_allow_hf32": quietly(lambda: bool(torch.npu.conv.allow_hf32)),
        "matmul_allow_hf32": quietly(lambda: bool(torch.npu.matmul.allow_hf32)),
        "cube_math_type": quietly(lambda: int(option("CUBE_MATH_TYPE"))),
        "precision_mode": quietly(lambda: option("ACL_PRECISION_MODE")),
        "inf_nan_mode": quietly(lambda: bool(torch.npu.utils.is_support_inf_nan())),
        "compatible_impl": quietly(lambda: bool(torch.npu.are_compatible_impl_enabled())),
        "jit_compile": quietly(lambda: not torch.npu.is_jit_compile_false()),
        "deterministic_level": quietly(lambda: int(torch_npu._C._npu_get_deterministic_level())),
    }


def without_queue() -> None:
    """Switch torch_npu's queue off, before it is imported, unless the user set it: an operator that fails then raises
    where it is called.
    """
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")


def main(where: str) -> None:
    """Measure a device and print one JSON."""
    without_queue()
    device = torch.device(where)
    if device.type == "npu":
        import torch_npu  # noqa: F401

        torch.npu.set_device(device)
    with torch.no_grad():
        stack = stack_of(device)
        result = measure(device, say=lambda text: print(text, file=sys.stderr))
    emulated = {"emulated": stack["backend"] == "emulated"}
    print(json.dumps({"schema": PROBE_SCHEMA, **emulated, "stack": stack, **result}, indent=1, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "npu:0")
