"""Each rule of the forecast against float64 and roundings that are written again here: on the CPU alone.

`test_forecast.py` holds the forecast against the emulated device. Both compute by `numerics`, so what they share is
held here.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import numerics
from harness.devices import Stack
from harness.numerics.expected_error import (
    DROPPED,
    Rules,
    _dropped,
    _fits_fused,
    _fits_split,
    _is_ours,
    alternatives,
    overflow_of,
    rounding,
    rules_of,
)
from harness.tests.test_restated import BIG, entering, tanh_gelu

HALVES = (torch.float16, torch.bfloat16)
KINDS = ("float32", "HF32", "HF32 of 10 bits", "TF32", "float16")
aten = torch.ops.aten


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forecast(rules, function, *tensors, **more):
    with torch.no_grad(), rounding(rules):
        return function(*tensors, **more)


def entered(tensor, kind, ties="away"):
    """A float32 tensor as a cube reads it, in float64."""
    if tensor.dtype != torch.float32 or kind == "float32":
        return tensor.double()
    return torch.tensor(
        [entering(number, kind, ties, False) for number in tensor.flatten().tolist()], dtype=torch.float64
    ).view(tensor.shape)


def bits(result, exact):
    error = float((result.double() - exact).norm() / exact.norm())
    return math.inf if error == 0 else -math.log2(error)


def is_once(result, exact):
    """Whether a half result is the exact one rounded once, but for values beside a tie."""
    return result.dtype in HALVES and float((result != exact.to(result.dtype)).double().mean()) < 0.02


# -------- rules of a stack

CARD = dict(device="Ascend910B4", backend="npu")


def test_rules_have_defaults():
    assert Rules() == Rules(
        family="Ascend A2",
        conv="float32",
        matmul="float32",
        ties="away",
        groups=4,
        gelu_tanh=True,
        fused_attention=True,
        narrow_attention=False,
        saturates=False,
        half_results=False,
        overflow_alone=False,
    )
    assert Rules(groups=1).groups == 1
    for wrong in (dict(conv="HF33"), dict(matmul="x"), dict(ties="up"), dict(groups=0)):
        with pytest.raises(ValueError):
            Rules(**wrong)


@pytest.mark.parametrize(
    ("conv", "matmul", "modes"),
    [
        ("float32", "float32", ()),
        ("HF32", "float32", ("HF32",)),
        ("float32", "TF32", ("TF32",)),
        ("HF32 of 10 bits", "HF32", ("HF32",)),
        ("float16", "HF32", ("HF32", "float16")),
    ],
)
def test_modes_are_what_float32_is_computed_in_besides_itself(conv, matmul, modes):
    assert Rules(conv=conv, matmul=matmul).modes == modes


def test_rules_say_themselves_in_one_line():
    assert str(Rules()) == "Ascend A2: convolutions float32, products float32, GELU by its tanh formula"
    said = str(Rules(family="X", conv="HF32", matmul="TF32", gelu_tanh=False, saturates=True))
    assert said == "X: convolutions in HF32, products in TF32, GELU as it is asked for, float16 saturates"
    assert str(Rules(overflow_alone=True)) == "float16 saturates"


def test_operands_are_those_of_the_rules():
    rules = Rules(ties="even", saturates=True, half_results=True)
    assert rules.operands("HF32") == numerics.Operands(kind="HF32", ties="even", saturates=True, half_results=True)
    assert Rules().operands("TF32") == numerics.Operands(kind="TF32", ties="away", saturates=False, half_results=False)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, dict(conv="HF32")),
        (dict(conv_allow_hf32=True), dict(conv="HF32")),
        (dict(conv_allow_hf32=False), {}),
        (dict(matmul_allow_hf32=True), dict(conv="HF32", matmul="HF32")),
        (dict(matmul_allow_hf32=False), dict(conv="HF32")),
        (dict(precision_mode="allow_fp32_to_fp16"), dict(conv="HF32", matmul="float16")),
        (dict(precision_mode="allow_fp32_to_fp16", conv_allow_hf32=False), dict(conv="float16", matmul="float16")),
        (dict(precision_mode="must_keep_origin_dtype"), dict(conv="HF32")),
        (dict(precision_mode="other"), dict(conv="HF32")),
        (dict(compatible_impl=True), dict(conv="HF32", gelu_tanh=False, narrow_attention=True)),
        (dict(inf_nan_mode=False), dict(conv="HF32", saturates=True)),
        (dict(inf_nan_mode=True), dict(conv="HF32")),
        *[
            (dict(cube_math_type=cube), dict(conv="HF32", matmul=kind))
            for cube, kind in enumerate(("float32", "HF32", "float16", "HF32", "float32"))
        ],
        (dict(cube_math_type=5, matmul_allow_hf32=True), dict(conv="HF32", matmul="HF32")),
        (dict(cube_math_type=-1), dict(conv="HF32")),
    ],
)
def test_the_rules_of_an_a2_follow_its_switches(switches, expected):
    assert rules_of(Stack(**CARD, **switches)) == Rules(half_results=True, **expected)
    assert rules_of(Stack(**CARD | {"backend": "emulated"}, **switches)) == Rules(half_results=True, **expected)


def test_the_rules_of_other_families_and_backends():
    half = dict(family="Ascend 310P", conv="float16", matmul="float16", fused_attention=False, half_results=False)
    assert rules_of(Stack(device="Ascend310P3", backend="npu")) == Rules(**half, saturates=True)
    assert rules_of(Stack(device="Ascend310P3", backend="npu", inf_nan_mode=True)) == Rules(**half)
    refused = rules_of(Stack(device="Ascend310P3", backend="npu", precision_mode="must_keep_origin_dtype"))
    assert (refused.conv, refused.matmul) == ("float32", "float32"), "the card refuses, and no number comes out"
    assert rules_of(Stack(device="Ascend950", backend="npu")) == Rules(
        family="Ascend 950", conv="HF32 of 10 bits", gelu_tanh=False, half_results=True
    )
    cuda = dict(family="CUDA", gelu_tanh=False, fused_attention=False, split_attention=True, half_sums=True)
    assert rules_of(Stack(device="H100", backend="cuda")) == Rules(**cuda)
    assert rules_of(Stack(device="H100", backend="cuda", conv_allow_tf32=True)) == Rules(**cuda, conv="TF32")
    assert rules_of(Stack(device="H100", backend="cuda", matmul_allow_tf32=True)) == Rules(**cuda, matmul="TF32")
    assert rules_of(Stack(device="", backend="cpu")) is rules_of(Stack(device="Ascend310B1", backend="npu")) is None


@pytest.mark.parametrize(
    ("device", "backend", "mode", "saturates"),
    [
        ("Ascend310P3", "npu", None, True),
        ("Ascend310P3", "emulated", None, True),
        ("Ascend310P3", "npu", True, False),
        ("Ascend910B4", "npu", None, False),
        ("Ascend910B4", "npu", False, True),
        ("Ascend310P3", "cuda", None, False),
        ("Ascend310P3", "cpu", False, False),
        ("Ascend310B4", "npu", None, True),
    ],
)
def test_half_alone_overflows_as_the_device_does(device, backend, mode, saturates):
    stack = Stack(device=device, backend=backend, inf_nan_mode=mode)
    assert overflow_of(stack, torch.float16) == (Rules(saturates=True, overflow_alone=True) if saturates else None)
    assert overflow_of(stack, torch.bfloat16) is overflow_of(stack, torch.float32) is None


# -------- products


def times(tensors):
    return tensors[-2] @ tensors[-1]


PRODUCTS = {  # function, shapes, the same in float64
    "mm": (torch.mm, [(6, 64), (64, 8)], times),
    "bmm": (torch.bmm, [(2, 6, 64), (2, 64, 8)], times),
    "mv": (torch.mv, [(6, 64), (64,)], times),
    "addmm": (torch.addmm, [(6, 8), (6, 64), (64, 8)], lambda t: t[0] + times(t)),
    "addmm with factors": (
        lambda *t: torch.addmm(*t, beta=0.5, alpha=-2),
        [(6, 8), (6, 64), (64, 8)],
        lambda t: 0.5 * t[0] - 2 * times(t),
    ),
    "addmm in place": (
        lambda c, a, b: c.clone().addmm_(a, b, beta=0.5, alpha=-2),
        [(6, 8), (6, 64), (64, 8)],
        lambda t: 0.5 * t[0] - 2 * times(t),
    ),
    "addmv": (
        lambda *t: torch.addmv(*t, beta=3, alpha=0.5),
        [(6,), (6, 64), (64,)],
        lambda t: 3 * t[0] + 0.5 * times(t),
    ),
    "baddbmm": (
        lambda *t: torch.baddbmm(*t, beta=0, alpha=2),
        [(2, 6, 8), (2, 6, 64), (2, 64, 8)],
        lambda t: 2 * times(t),
    ),
    "addbmm": (
        lambda *t: torch.addbmm(*t, beta=0.5, alpha=-2),
        [(6, 8), (2, 6, 64), (2, 64, 8)],
        lambda t: 0.5 * t[0] - 2 * times(t).sum(0),
    ),
    "linear": (F.linear, [(3, 64), (8, 64), (8,)], lambda t: t[0] @ t[1].t() + t[2]),
    "mm into a place": (lambda a, b: torch.mm(a, b, out=a.new_zeros(6, 8)), [(6, 64), (64, 8)], times),
    "mm into an empty place": (lambda a, b: torch.mm(a, b, out=a.new_empty(0)), [(6, 64), (64, 8)], times),
}
ADDED = {
    "linear": 2,
    **{name: 0 for name in PRODUCTS if name.startswith(("add", "badd"))},
}  # which operand is added, and not rounded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_rounds_its_operands_and_its_result_once(name, kind):
    function, shapes, exact = PRODUCTS[name]
    tensors = [seeded(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    result = forecast(Rules(matmul=kind), function, *tensors)
    expected = exact(
        [tensor.double() if place == ADDED.get(name) else entered(tensor, kind) for place, tensor in enumerate(tensors)]
    )
    assert result.dtype == torch.float32 and result.shape == expected.shape and bits(result, expected) > 21.5
    assert kind == "float32" or bits(result, exact([tensor.double() for tensor in tensors])) < 14
    other = forecast(Rules(conv=kind), function, *tensors)  # which is of convolutions
    assert bits(other, exact([tensor.double() for tensor in tensors])) > 21.5
    for dtype in HALVES:
        half = [tensor.to(dtype) for tensor in tensors]
        assert is_once(forecast(Rules(matmul=kind), function, *half), exact([tensor.double() for tensor in half]))


def test_a_product_in_place_writes_there_and_into_a_place_returns_it():
    a, b, c = seeded(6, 64), seeded(64, 8, seed=1), seeded(6, 8, seed=2)
    before = c.clone()
    with torch.no_grad(), rounding(Rules(matmul="TF32")):
        assert c.addmm_(a, b) is c
        place = torch.empty(6, 8)
        assert torch.mm(a, b, out=place) is place
    assert bits(place, entered(a, "TF32") @ entered(b, "TF32")) > 21.5
    assert bits(c, before.double() + entered(a, "TF32") @ entered(b, "TF32")) > 21.5


def test_ties_half_results_and_parts_are_those_of_the_rules():
    tie, one = torch.full((1, 1), 1 + 2.0**-12), torch.ones(1, 1)
    for ties, expected in (("away", 1 + 2.0**-11), ("even", 1.0)):
        assert forecast(Rules(matmul="HF32", ties=ties), torch.mm, tie, one).item() == expected
        options = dict(matmul="float32", conv="HF32", ties=ties)
        assert forecast(Rules(**options), F.conv1d, tie[None], one[None]).item() == expected
    pair = torch.tensor([[1 + 2.0**-10, 2.0**-11]])
    for half, expected in ((False, 1 + 2.0**-10 + 2.0**-11), (True, 1 + 2.0**-9)):  # a tie, which goes to even
        assert forecast(Rules(matmul="float16", half_results=half), torch.mm, pair, torch.ones(2, 1)).item() == expected
    large = torch.full((1, 1), 1e5)
    for saturates, expected in ((True, 65504.0), (False, math.inf)):
        assert forecast(Rules(matmul="float16", saturates=saturates), torch.mm, large, one).item() == expected
    left = torch.zeros(1, 64)
    left[0, [0, 16, 32, 48]] = torch.tensor([BIG, 1.0, 1.0, -BIG])
    assert forecast(Rules(), torch.mm, left, torch.ones(64, 1)).item() == 0
    a, b = seeded(40, 300), seeded(300, 50, seed=1)
    assert torch.equal(forecast(Rules(groups=1), torch.mm, a, b), torch.mm(a, b))
    assert not torch.equal(forecast(Rules(groups=16), torch.mm, a, b), torch.mm(a, b))


# -------- convolutions

CONVOLUTIONS = {  # function, shapes, options
    "one axis": (F.conv1d, [(2, 4, 12), (6, 4, 3), (6,)], dict(stride=2, padding=1)),
    "dilated": (F.conv1d, [(2, 4, 12), (6, 4, 3), (6,)], dict(dilation=3, padding=2)),
    "by groups": (F.conv2d, [(2, 4, 7, 8), (8, 2, 3, 2), (8,)], dict(groups=2, stride=(2, 1), padding=(0, 1))),
    "without a bias": (F.conv2d, [(2, 4, 7, 8), (8, 4, 3, 2)], {}),
    "three axes": (F.conv3d, [(1, 2, 4, 5, 6), (3, 2, 2, 3, 2), (3,)], dict(dilation=(1, 1, 2))),
    "transposed": (F.conv_transpose2d, [(2, 4, 5, 6), (4, 6, 3, 3), (6,)], dict(stride=2, padding=1, output_padding=1)),
    "transposed by groups": (F.conv_transpose1d, [(2, 4, 9), (4, 3, 3), (6,)], dict(stride=3, groups=2, dilation=2)),
    "over time": (lambda x, w, b, pad: torch.conv_tbc(x, w, b, pad), [(9, 2, 4), (3, 4, 6), (6,)], dict(pad=2)),
}


def convolved(function, tensors, kind, **options):
    """In float64, of rounded operands; with operands in float16 the bias and the result are rounded to it too."""
    x, w, *bias = tensors
    if kind == "float16":
        bias = [tensor.half() for tensor in bias]
    return function(entered(x, kind), entered(w, kind), *[tensor.double() for tensor in bias], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_rounds_its_operands_and_its_result_once(name, kind):
    function, shapes, options = CONVOLUTIONS[name]
    tensors = [seeded(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    exact = function(*[tensor.double() for tensor in tensors], **options)
    result = forecast(Rules(conv=kind), function, *tensors, **options)
    expected = convolved(function, tensors, kind, **options)
    assert (
        result.dtype == torch.float32
        and result.shape == expected.shape
        and (result.is_contiguous() or name == "over time")
    )
    assert bits(result, expected) > (11.5 if kind == "float16" else 21.5) and (
        kind == "float32" or bits(result, exact) < 14
    )
    if kind == "float16":
        assert (
            torch.equal(result, result.half().float())
            and float((result != expected.half().float()).double().mean()) < 0.02
        )
    assert bits(forecast(Rules(matmul=kind), function, *tensors, **options), exact) > 21.5, "which is of other products"
    for dtype in HALVES:
        half = [tensor.to(dtype) for tensor in tensors]
        assert is_once(
            forecast(Rules(conv=kind), function, *half, **options),
            function(*[tensor.double() for tensor in half], **options),
        )


@pytest.mark.parametrize("kind", ["float32", "HF32", "TF32"])
@pytest.mark.parametrize("name", [convolution for convolution in CONVOLUTIONS if convolution != "over time"])
def test_the_gradients_of_a_convolution_round_likewise(name, kind):
    function, shapes, options = CONVOLUTIONS[name]
    tensors = [seeded(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def gradients(rules, x, w, bias, weight):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, *bias)]
        with rounding(rules):
            result = function(*leaves, **options)
            return torch.autograd.grad((result * weight).sum(), leaves)

    shape = function(*tensors, **options).shape
    weight = seeded(*shape, seed=9)
    result = gradients(Rules(conv=kind), *tensors[:2], tensors[2:], weight)
    wide = [entered(item, kind) for item in (*tensors[:2], weight)]
    expected = gradients(None, wide[0], wide[1], [tensor.double() for tensor in tensors[2:]], wide[2])
    for tensor, right in zip(result[:2], expected):
        assert tensor.dtype == torch.float32 and bits(tensor, right) > 20.5
    if len(result) > 2:
        axes = [axis for axis in range(weight.dim()) if axis != 1]
        assert bits(result[2], weight.double().sum(axes)) > 20.5, "a sum of the gradient as it came"
    if kind != "float32":
        plain = gradients(
            None,
            *[tensor.double() for tensor in tensors[:2]],
            [tensor.double() for tensor in tensors[2:]],
            weight.double(),
        )
        assert max(bits(item, right) for item, right in zip(result[:2], plain)) < 14
    half = [tensor.bfloat16() for tensor in tensors]
    for gradient in gradients(Rules(conv=kind), *half[:2], half[2:], weight.bfloat16()):
        assert gradient.dtype == torch.bfloat16


def test_a_convolution_that_cuts_long_pieces_keeps_float32_under_hf32_alone():
    x, w = seeded(2, 1, 640), seeded(4, 1, 64, seed=1)
    exact = F.conv1d(x.double(), w.double(), stride=64)
    for kind, keeps in (("HF32", True), ("HF32 of 10 bits", True), ("TF32", False), ("float16", False)):
        assert (bits(forecast(Rules(conv=kind), F.conv1d, x, w, stride=64), exact) > 21) is keeps
    for options in (dict(stride=63), dict(stride=64, padding=1), dict(stride=64, dilation=2)):
        exact = F.conv1d(x.double(), w.double(), **options)
        assert bits(forecast(Rules(conv="HF32"), F.conv1d, x, w, **options), exact) < 14


# -------- other operators


def test_gelu_and_its_gradient_take_the_tanh_formula_whatever_is_asked_for():
    x = torch.linspace(-3, 3, 61)
    by_tanh = torch.tensor([tanh_gelu(number) for number in x.tolist()], dtype=torch.float64)
    exact = F.gelu(x.double())

    def gradient(rules, approximate):
        leaf = x.clone().requires_grad_()
        with rounding(rules):
            return torch.autograd.grad(F.gelu(leaf, approximate=approximate).sum(), leaf)[0]

    def derivative(approximate):
        leaf = x.double().requires_grad_()
        return torch.autograd.grad(F.gelu(leaf, approximate=approximate).sum(), leaf)[0]

    for asked in ("none", "tanh"):
        assert bits(forecast(Rules(), F.gelu, x, approximate=asked), by_tanh) > 19
        assert (
            bits(forecast(Rules(gelu_tanh=False), F.gelu, x, approximate=asked), by_tanh if asked == "tanh" else exact)
            > 19
        )
        assert (
            bits(gradient(Rules(), asked), derivative("tanh")) > 19
            and bits(gradient(Rules(gelu_tanh=False), asked), derivative(asked)) > 19
        )
    assert bits(by_tanh, exact) < 13 and bits(derivative("tanh"), derivative("none")) < 13, "the two can be told apart"
    half = seeded(2000, dtype=torch.bfloat16)
    leaf = half.clone().requires_grad_()
    with rounding(Rules()):
        (result,) = torch.autograd.grad(F.gelu(leaf), leaf, torch.ones_like(leaf))
        direct = aten.gelu_backward(torch.ones_like(half), half)  # the default of `approximate` is "none"
    with rounding(Rules(gelu_tanh=False)):
        assert (
            bits(aten.gelu_backward(torch.ones_like(x), x), derivative("none")) > 19 and bits(aten.gelu(x), exact) > 19
        )
    assert result.dtype == torch.bfloat16 and torch.equal(result, direct)


@pytest.mark.parametrize("tanh", [True, False])
def test_a_vector_unit_that_computes_otherwise_takes_the_formula_of_gelu_by_the_rules(tanh):
    x, rules = seeded(2000), Rules(gelu_tanh=tanh, vector=numerics.Vector(places=1))
    by_tanh, exact = (F.gelu(x.double(), approximate=kind) for kind in ("tanh", "none"))
    right, wrong = (by_tanh, exact) if tanh else (exact, by_tanh)
    assert bits(forecast(rules, F.gelu, x), right) > 19 > 13 > bits(forecast(rules, F.gelu, x), wrong)
    assert bits(forecast(rules, F.gelu, x, approximate="tanh"), by_tanh) > 19
    for function in (F.silu, torch.exp, torch.tanh, lambda x: x.softmax(-1), lambda x: F.layer_norm(x, (2000,))):
        result = forecast(rules, function, x)
        assert bits(result, function(x.double())) > 19 and not torch.equal(result, forecast(Rules(), function, x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_elementwise_functions_norms_and_resampling_round_half_results_once(dtype):
    x = seeded(8, 96, dtype=dtype)
    weight, bias = seeded(96, seed=1, dtype=dtype), seeded(96, seed=2, dtype=dtype)
    image = seeded(2, 3, 7, 6, dtype=dtype)
    functions = [
        (F.silu, x),
        (torch.rsqrt, x.abs() + 1),
        (lambda x: F.log_softmax(x, -1), x),
        (lambda x: F.log_softmax(x, 0), x),
        (lambda x: torch.pow(x.abs(), 3), x),
        (lambda x: torch.pow(x, 2.5), x.abs() + 1),
        (lambda x: F.interpolate(x, size=(9, 11), mode="bicubic", align_corners=True), image),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), image),
        (lambda x: F.interpolate(x, size=(4, 3), mode="bicubic", antialias=True), image),
        (lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True), image),
        (lambda x: F.layer_norm(x, (96,), weight.to(x.dtype), bias.to(x.dtype), 0.25), x),
        (lambda x: F.layer_norm(x, (8, 96), eps=0.25), x),
    ]
    for number, (function, tensor) in enumerate(functions):
        result, exact = forecast(Rules(), function, tensor), function(tensor.double())
        wrong = float((result != exact.to(dtype)).double().mean())
        assert result.dtype == dtype and wrong < 0.02, number
    assert bits(forecast(Rules(), F.silu, x.float()), F.silu(x.double())) > 22
    dots = [forecast(Rules(), torch.dot, x[0], weight), forecast(Rules(), torch.mm, x[:1], weight[:, None])[0, 0]]
    exact = torch.dot(x[0].double(), weight.double())
    assert all(abs(dot.double() - exact) <= abs(exact) * 2.0 ** (-10 if dtype == torch.float16 else -7) for dot in dots)


def test_norms_keep_their_statistics_in_the_dtype_of_their_weights():
    x, weight = seeded(4, 32, dtype=torch.bfloat16), seeded(32, seed=1)
    for held, expected in ((None, torch.bfloat16), (weight, torch.float32), (weight.bfloat16(), torch.bfloat16)):
        y, mean, rstd = forecast(Rules(), aten.native_layer_norm, x, (32,), held, None, 1e-5)
        assert (y.dtype, mean.dtype, rstd.dtype) == (torch.bfloat16, expected, expected) and y.is_contiguous()
        assert bits(mean, x.double().mean(-1, keepdim=True)) > 7
    assert forecast(Rules(), aten._log_softmax, x.half(), 1, False).dtype == torch.float16
    assert forecast(Rules(), aten._log_softmax, x.half(), 1, True).dtype == torch.float32, (
        "half_to_float, as a card computes it"
    )
    powers = [(torch.tensor([2, 3]), 2), (torch.tensor([2.0]).half(), torch.tensor([3.0])), (torch.tensor([1.5]), 2)]
    for base, exponent in powers:
        assert forecast(Rules(), torch.pow, base, exponent).dtype == torch.pow(base, exponent).dtype


# -------- running sums, spreads, batch norm


def stepped(x, axis, step, half_sums=False):
    """A running sum or product along an axis, one number at a time in float32 or, with `half_sums`, in x's dtype."""
    kind = x.dtype if half_sums else torch.float32
    total, result = None, []
    for item in x.unbind(axis):
        total = item.to(kind) if total is None else step(total, item.to(kind))
        result.append(total)
    return torch.stack(result, axis).to(x.dtype)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    ("name", "step"), [("cumsum", torch.add), ("cumprod", torch.mul)], ids=["running sum", "running product"]
)
def test_a_running_sum_or_product_is_rounded_at_each_step_in_float32(name, step, axis):
    function = getattr(torch, name)
    for dtype in (torch.float32, *HALVES):
        x = seeded(40, 3, dtype=dtype)
        assert torch.equal(forecast(Rules(), function, x, axis), stepped(x, axis, step))
        in_place = forecast(Rules(), lambda x, axis: getattr(x.clone(), name + "_")(axis), x, axis)
        assert torch.equal(in_place, stepped(x, axis, step))
        for asked in (torch.float32, *HALVES):
            result = forecast(Rules(), function, x, axis, dtype=asked)
            assert result.dtype == asked and torch.equal(result, stepped(x.to(asked), axis, step))
        wide = forecast(Rules(), function, x, axis, dtype=torch.float64)
        assert wide.dtype == torch.float64 and torch.equal(wide, function(x.double(), axis))
        whole = forecast(Rules(), function, x, axis, dtype=torch.int64)
        assert whole.dtype == torch.int64 and torch.equal(whole, function(x.long(), axis))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_running_sum_is_kept_in_half_where_the_rules_say_so_and_half_is_returned(dtype):
    """Of two numbers there is one order of a sum."""
    rules, x = Rules(half_sums=True), seeded(60, 2, dtype=dtype)
    rounded = stepped(x, 1, torch.add, half_sums=True)
    for asked in (None, dtype):
        assert torch.equal(forecast(rules, torch.cumsum, x, 1, dtype=asked), rounded)
    wide = forecast(rules, torch.cumsum, x, 1, dtype=torch.float32)
    assert torch.equal(wide, stepped(x.float(), 1, torch.add)) and not torch.equal(wide, rounded.float())
    assert torch.equal(forecast(rules, torch.cumsum, x.float(), 1, dtype=dtype), rounded)
    long = seeded(3, 40, dtype=dtype)
    assert not torch.equal(forecast(rules, torch.cumsum, long, 1), forecast(Rules(), torch.cumsum, long, 1))
    assert torch.equal(forecast(rules, torch.cumprod, long, 1), stepped(long, 1, torch.mul))
    assert (
        forecast(rules, torch.cumsum, x[:0], 0).shape == (0, 2) and forecast(rules, torch.cumsum, x[0, 0], 0) == x[0, 0]
    )


SPREADS = {  # arguments of torch.var and its like
    "all": ((), {}),
    "all, biased": ((False,), {}),
    "an axis": ((1,), {}),
    "axes": (([0, 2],), {}),
    "kept": ((-1,), dict(keepdim=True)),
    "axes, biased": (([1], False), {}),
    "biased and kept": ((0, False, True), {}),
    "correction": ((1,), dict(correction=0)),
    "all, correction": ((), dict(correction=2)),
    "correction and kept": (([0, 1],), dict(correction=3, keepdim=True)),
}


@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
@pytest.mark.parametrize("given", SPREADS)
def test_spreads_are_two_passes_of_float32_sums_rounded_once(given, name):
    args, options = SPREADS[given]
    function = getattr(torch, name)
    for dtype in (torch.float32, *HALVES):
        x = seeded(5, 6, 7, dtype=dtype) + 3
        results, exacts = forecast(Rules(), function, x, *args, **options), function(x.double(), *args, **options)
        results, exacts = (item if isinstance(item, tuple) else (item,) for item in (results, exacts))
        assert len(results) == len(exacts) == 1 + name.endswith("mean")
        for result, exact in zip(results, exacts):
            assert result.dtype == dtype and result.shape == exact.shape
            assert is_once(result, exact) if dtype in HALVES else bits(result, exact) > 21


def test_two_results_are_written_into_two_places():
    x, places = seeded(5, 6), (torch.empty(0), torch.empty(5))
    result = forecast(Rules(), lambda x: aten.var_mean.correction_out(x, [1], out0=places[0], out1=places[1]), x)
    assert result[0] is places[0] and result[1] is places[1] and len(result) == 2
    exacts = torch.var_mean(x.double(), 1)
    assert all(place.shape == (5,) and bits(place, exact) > 21 for place, exact in zip(places, exacts))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_batch_norm_learns_from_the_batch_and_else_goes_by_what_it_learnt(dtype):
    x = seeded(6, 3, 5, dtype=dtype)
    weight, bias = seeded(3, seed=1, dtype=dtype), seeded(3, seed=2, dtype=dtype)
    means = [torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)]
    wide, kept = [item.double() for item in means], [item.clone() for item in means]
    options = dict(momentum=0.25, eps=0.5)
    result = forecast(Rules(), F.batch_norm, x, *means, weight, bias, True, **options)
    exact = F.batch_norm(x.double(), *wide, weight.double(), bias.double(), True, **options)
    least = {torch.float32: 20.0, torch.float16: 9.5, torch.bfloat16: 6.5}[dtype]
    assert result.dtype == dtype and bits(result, exact) > least
    assert all(bits(mean, right) > least for mean, right in zip(means, wide))
    result = forecast(Rules(), F.batch_norm, x, *kept, weight, bias, False, **options)
    assert torch.equal(result, F.batch_norm(x, *kept, weight, bias, False, **options))
    assert kept[0].eq(0).all() and kept[1].eq(1).all()


# -------- attention

WAYS = {  # of computing attention
    "fused": Rules(),
    "by its products": Rules(fused_attention=False),
    "split": Rules(fused_attention=False, split_attention=True),
    "as the CPU does": Rules(saturates=True, overflow_alone=True),
    "in tiles": Rules(vector=numerics.Vector(tile=4)),
}
MASK = (torch.arange(42) % 5 != 1).view(6, 7)
CALLS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "scaled": dict(scale=0.3),
    "causal and scaled": dict(is_causal=True, scale=0.3),
    "heads that are shared": dict(enable_gqa=True),
    "shared, causal and scaled": dict(enable_gqa=True, is_causal=True, scale=0.3),
    "mask of bools": dict(attn_mask=MASK),
    "mask of floats": dict(attn_mask=torch.linspace(-2, 2, 42).view(6, 7)),
    "shared, mask of floats": dict(enable_gqa=True, attn_mask=torch.linspace(-2, 2, 42).view(6, 7), scale=0.3),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WAYS)
def test_attention_is_what_is_asked_for_in_every_way_of_computing_it(way, call):
    options = CALLS[call]
    tensors = qkv(2, 4, 6, 32, heads=2 if "enable_gqa" in options else 4)
    wide = {name: item.double() if name == "attn_mask" and item.dtype != torch.bool else item
            for name, item in options.items()}  # fmt: skip
    exact = F.scaled_dot_product_attention(*[tensor.double() for tensor in tensors], **wide)
    result = forecast(WAYS[way], F.scaled_dot_product_attention, *tensors, **options)
    assert result.dtype == torch.float32 and bits(result, exact) > 19
    with torch.inference_mode(), rounding(WAYS[way]):
        assert bits(F.scaled_dot_product_attention(*tensors, **options), exact) > 19


def test_which_attention_fits_in_one_operator():
    def fits(*shapes, rules=Rules(), mask=None, shared=False, dtype=torch.float32):
        tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        return _fits_fused(rules, *tensors, mask, shared)

    q, k = (2, 4, 6, 32), (2, 4, 7, 32)
    assert fits(q, k, k) is True and fits(q, k, k, mask=MASK) is True
    assert fits(q, k, k, mask=MASK.float()) is False and fits(q, k, k, rules=Rules(fused_attention=False)) is False
    assert fits(q, k, (2, 4, 7, 32, 1)) is fits(q, (2, 4, 7), k) is fits(q, (1, 4, 7, 32), (1, 4, 7, 32)) is False
    few = (2, 2, 7, 32)
    assert fits(q, few, few) is fits(q, k, few) is fits(q, few, k) is False and fits(q, few, few, shared=True) is True
    narrow = [(2, 4, 6, 30)] * 3
    assert fits(*narrow) is False and fits(*narrow, dtype=torch.float16) is True
    for width, fused in ((256, True), (260, False)):
        for place in range(3):
            shapes = [(1, 1, 1, width if place == part else 32) for part in range(3)]
            assert fits(*shapes, rules=Rules(narrow_attention=True)) is fused and fits(*shapes) is True
    for heads, width, fused in ((2048, 512, True), (2049, 512, False), (2048, 516, False)):
        assert fits(*[(1, heads, 1, width)] * 3) is fused
    one, many = (1, 1, 1, 32), (1, 2049, 1, 32)
    assert fits(one, many, one, shared=True) is fits(many, one, one, shared=True) is False
    for shape in ((2049, 1, 1, 32), (1, 1, 2049, 32)):  # batches and rows have no such limit
        assert fits(shape, shape, shape) is True


def test_which_attention_fits_the_kernel_of_split_products():
    def fits(*shapes, dtypes=(torch.float32,) * 3):
        return _fits_split(*[torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)])

    q, k = (2, 4, 6, 32), (2, 4, 7, 32)
    assert fits(q, k, k) is fits(q, (2, 4, 7, 4), (2, 4, 7, 4)) is True
    for other in ((4, 7, 32), (2, 4, 0, 32), (2, 2, 7, 32), (2, 4, 7, 30), (2, 4, 7, 31)):
        assert fits(other, k, k) is fits(q, other, k) is fits(q, k, other) is False
    for place in range(3):
        dtypes = [torch.float16 if part == place else torch.float32 for part in range(3)]
        assert fits(q, k, k, dtypes=dtypes) is False


def qkv(*shape, keys=None, values=None, heads=None, dtype=torch.float32):
    batch, count, rows, width = shape
    keys, heads = keys or rows + 1, heads or count
    shapes = ((batch, count, rows, width), (batch, heads, keys, width), (batch, heads, keys, values or width))
    return [seeded(*item, seed=seed, dtype=dtype) for seed, item in enumerate(shapes)]


def is_fused(tensors, mask=None, rules=None, **options):
    """Whether attention was one operator: its products then do not round their operands to TF32."""
    result = forecast(Rules(matmul="TF32", **(rules or {})), F.scaled_dot_product_attention, *tensors, mask, **options)
    exact = F.scaled_dot_product_attention(
        *[tensor.double() for tensor in tensors],
        mask if mask is None or mask.dtype == torch.bool else mask.double(),
        **options,
    )
    told = bits(result, exact)
    assert told > 19 or 8 < told < 15, "attention it is either way"
    return told > 19


def test_attention_is_fused_where_it_fits():
    assert (
        is_fused(qkv(2, 4, 6, 32))
        and is_fused(qkv(2, 4, 6, 32), is_causal=True)
        and is_fused(qkv(2, 4, 6, 32), scale=0.3)
    )
    assert not is_fused(qkv(2, 4, 6, 32), rules=dict(fused_attention=False))
    mask = seeded(2, 1, 6, 7) > -0.5
    mask[..., 0] = True
    assert is_fused(qkv(2, 4, 6, 32), mask) and not is_fused(qkv(2, 4, 6, 32), mask.float() * 2)
    assert is_fused(qkv(2, 4, 6, 32, heads=2), enable_gqa=True)
    assert (
        not is_fused(qkv(2, 4, 6, 30))
        and not is_fused(qkv(2, 4, 6, 32, values=30))
        and is_fused(qkv(2, 4, 6, 32, values=28))
    )
    q, k, v = qkv(2, 4, 6, 32)
    assert not is_fused((q[0], k[0], v[0])) and not is_fused((q, k[:1], v[:1]))
    assert (
        is_fused(qkv(1, 2, 3, 512))
        and not is_fused(qkv(1, 2, 3, 516))
        and is_fused(qkv(1, 2, 3, 512), rules=dict(narrow_attention=False))
    )
    narrow = dict(narrow_attention=True)
    assert (
        is_fused(qkv(1, 2, 3, 256), rules=narrow)
        and not is_fused(qkv(1, 2, 3, 260), rules=narrow)
        and not is_fused(qkv(1, 2, 3, 32, values=260), rules=narrow)
    )
    assert is_fused(qkv(1, 2048, 1, 4)) and not is_fused(qkv(1, 2049, 1, 4))


def test_attention_by_groups_of_heads_needs_to_be_asked_for():
    tensors = qkv(1, 4, 6, 32, heads=2)
    with pytest.raises(RuntimeError):
        forecast(Rules(), F.scaled_dot_product_attention, *tensors)


def test_half_attention_of_odd_widths_is_fused():
    q, k, v = (tensor.half() for tensor in qkv(1, 2, 5, 30))
    result = forecast(Rules(), F.scaled_dot_product_attention, q, k, v)
    assert torch.equal(result, numerics.attention(q, k, v, scale=30**-0.5)[0])


def test_attention_that_learns_or_drops_is_made_of_its_products():
    tensors = [item.requires_grad_() for item in qkv(1, 2, 5, 32)]
    exact = F.scaled_dot_product_attention(*[tensor.detach().double() for tensor in tensors])
    with rounding(Rules(matmul="TF32")):
        learning = F.scaled_dot_product_attention(*tensors)
    assert 8 < bits(learning.detach(), exact) < 15 and learning.requires_grad
    for place in range(3):  # one that learns is enough
        some = [item.detach().requires_grad_(part == place) for part, item in enumerate(tensors)]
        with rounding(Rules(matmul="TF32")):
            assert 8 < bits(F.scaled_dot_product_attention(*some).detach(), exact) < 15
    assert is_fused([tensor.detach() for tensor in tensors])
    with torch.no_grad(), rounding(Rules(matmul="TF32")):
        assert bits(F.scaled_dot_product_attention(*tensors), exact) > 19
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
        kept = F.scaled_dot_product_attention(*tensors, dropout_p=0.0)
    assert bits(dropped, exact) < 5 and bits(kept, exact) > 19


def test_attention_with_a_mask_that_is_causal_too_is_what_the_cpu_makes_of_both():
    tensors = qkv(1, 2, 5, 32, keys=5)
    mask = seeded(5, 5, seed=5) > -0.5
    mask[:, 0] = True
    try:
        exact = F.scaled_dot_product_attention(*[tensor.double() for tensor in tensors], mask, is_causal=True)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            forecast(Rules(), F.scaled_dot_product_attention, *tensors, mask, is_causal=True)
    else:
        assert bits(forecast(Rules(), F.scaled_dot_product_attention, *tensors, mask, is_causal=True), exact) > 19


def test_attention_past_python_takes_masks_of_floats_and_a_scale():
    q, k, v = qkv(1, 2, 5, 32, keys=5)
    bias = seeded(5, 5, seed=5)
    direct = aten._scaled_dot_product_flash_attention_for_cpu
    for options in (dict(), dict(attn_mask=bias), dict(is_causal=True), dict(scale=0.4)):
        result, logsumexp = forecast(Rules(matmul="TF32"), direct, q, k, v, **options)
        scores = q.double() @ k.double().transpose(2, 3) * options.get("scale", 32**-0.5)
        scores = scores + options["attn_mask"].double() if "attn_mask" in options else scores
        scores = (
            scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
            if "is_causal" in options
            else scores
        )
        assert bits(result, scores.softmax(-1) @ v.double()) > 20 and bits(logsumexp, scores.logsumexp(-1)) > 20
    causal = forecast(Rules(), F.scaled_dot_product_attention, q, k, v, is_causal=True)
    assert bits(causal, F.scaled_dot_product_attention(*[tensor.double() for tensor in (q, k, v)], is_causal=True)) > 20


# -------- what has no rule, and layout


def test_half_saturates_where_the_rules_say_so():
    x = torch.tensor([300.0, -300.0, math.nan, 1.0]).half()
    for rules in (Rules(saturates=True), Rules(saturates=True, overflow_alone=True)):
        assert forecast(rules, torch.mul, x, 300).tolist() == [65504.0, -65504.0, 0.0, 300.0]
        assert forecast(rules, torch.mm, x[:1, None], x[None, :2]).tolist() == [[65504.0, -65504.0]]
        for dtype in (torch.float32, torch.bfloat16):
            assert forecast(rules, torch.mul, torch.tensor([3e38], dtype=dtype), 10.0).item() == math.inf
        q = torch.full((1, 1, 1, 4), 6e4).half()
        assert forecast(rules, F.scaled_dot_product_attention, q, q, q).isfinite().all()
    assert (
        forecast(Rules(), torch.mul, x, 300)[0] == math.inf
        and forecast(Rules(), torch.mm, x[:1, None], x[None, :1]).item() == math.inf
    )


def test_overflow_alone_rounds_nothing():
    rules = Rules(matmul="TF32", conv="TF32", saturates=True, overflow_alone=True)
    a, b = seeded(9, 64), seeded(64, 7, seed=1)
    assert torch.equal(forecast(rules, torch.mm, a, b), torch.mm(a, b)) and torch.equal(
        forecast(rules, F.gelu, a), F.gelu(a)
    )
    q, k, v = qkv(1, 2, 5, 32)
    assert (
        bits(
            forecast(rules, F.scaled_dot_product_attention, q, k, v),
            F.scaled_dot_product_attention(*[tensor.double() for tensor in (q, k, v)]),
        )
        > 20
    )
    turned = seeded(6, 5, 4).transpose(0, 2)
    assert (
        forecast(rules, torch.sin, turned).stride()
        == torch.sin(turned).stride()
        != forecast(Rules(), torch.sin, turned).stride()
    )


def test_other_dtypes_devices_and_layouts_pass_untouched():
    a = seeded(8, 8)
    for tensor in (a.double(), (a * 9).long(), a.to(torch.complex64)):
        assert torch.equal(forecast(Rules(matmul="TF32"), torch.mm, tensor, tensor), tensor @ tensor)
    assert forecast(Rules(matmul="TF32"), torch.mm, a.to("meta"), a.to("meta")).device.type == "meta"
    sparse = a.to_sparse()
    assert bits(forecast(Rules(matmul="TF32"), torch.sparse.mm, sparse, a), a.double() @ a.double()) > 20
    turned = a.double().t()
    assert forecast(Rules(), torch.sin, turned).stride() == turned.stride()


def test_what_is_computed_is_contiguous_and_copies_keep_their_strides():
    turned = seeded(6, 5, 4).transpose(0, 2)
    for function in (torch.sin, lambda x: x + x, torch.nn.functional.silu, lambda x: x.to(torch.bfloat16).sin()):
        assert forecast(Rules(), function, turned).is_contiguous()
    for function in (torch.clone, torch.empty_like, torch.zeros_like, lambda x: x.to(torch.bfloat16)):
        assert forecast(Rules(), function, turned).stride() == turned.stride()
    assert forecast(Rules(), lambda x: x.transpose(0, 1), turned).stride() == turned.transpose(0, 1).stride()
    both = forecast(Rules(), lambda x: torch.max(x, 0), seeded(6, 5, 4).transpose(0, 2))
    assert both.values.is_contiguous()
    place = torch.zeros(4, 5, 6).transpose(0, 2)
    assert (
        forecast(Rules(), lambda x: x.add_(1), place) is place
        and not place.is_contiguous()
        and bool((place == 1).all())
    )


def test_rules_hold_in_inference_mode_and_end_with_the_block():
    a, b = seeded(9, 64), seeded(64, 7, seed=1)
    exact = a.double() @ b.double()
    with torch.inference_mode(), rounding(Rules(matmul="TF32")):
        assert bits(torch.matmul(a, b), exact) < 14 and bits(nn.functional.linear(a, b.t().contiguous()), exact) < 14
    assert torch.equal(torch.mm(a, b), a @ b) and bits(a @ b, exact) > 21
    with pytest.raises(RuntimeError), rounding(Rules(matmul="TF32")):
        torch.mm(a, a)
    assert bits(a @ b, exact) > 21
    with rounding(None):
        assert bits(a @ b, exact) > 21


# -------- what is assumed, what random roundings drop, which calls are the forecast's


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float32", ["two last places"]),
        ("bfloat16", ["two last places", "ties away"]),
        ("float16", ["two last places", "in float16", "ties away"]),
    ],
)
def test_the_assumptions_that_matter_in_a_dtype(dtype, said):
    rules = Rules()
    others = list(alternatives(rules, dtype))
    assert len(others) == len(said) and all(word in what for word, (what, _) in zip(said, others))
    assert all(other != rules and replace(other, vector=rules.vector) == rules for _, other in others)
    changed = [other for what, other in others if "two last places" not in what]
    assert all("two last places" in what or other in changed for what, other in others)
    vectors = {  # by a word of what a card would do
        "two last places": numerics.Vector(places=2, upwards=True),
        "in float16": numerics.Vector(half=True, half_places=1),
        "ties away": numerics.Vector(ties_away=True),
    }
    assert [other.vector for _, other in others] == [vectors[word] for word in said]
    again = Rules(vector=others[0][1].vector)  # a card that does so already is not made otherwise by it
    assert [what for what, _ in alternatives(again, dtype)] == [what for what, _ in others[1:]]


@pytest.mark.parametrize(("kind", "kept"), [("HF32", 11), ("HF32 of 10 bits", 10), ("TF32", 10), ("float16", 10)])
def test_what_a_kind_drops_is_what_it_does_not_keep_of_23_bits(kind, kept):
    assert DROPPED[kind] == 23 - kept and {*DROPPED, "float32"} == {*numerics.OPERANDS}
    least = 1 + 2.0**-kept
    assert numerics.Operands(kind=kind).entering(torch.tensor([least, 1 + 2.0 ** -(kept + 2)])).tolist() == [least, 1.0]


@pytest.mark.parametrize(
    ("kinds", "dropped"),
    [
        ({}, {}),
        ({"conv": "HF32"}, {"aten::convolution": 12}),
        ({"matmul": "TF32"}, {"aten::mm": 13, "aten::addmm": 13, "aten::bmm": 13}),
        ({"conv": "float16", "matmul": "HF32"}, {"aten::convolution": 13, "aten::mm": 12, "aten::addbmm": 12}),
        ({"conv": "HF32", "overflow_alone": True}, {}),
    ],
)
def test_operands_drop_the_bits_of_their_kind(kinds, dropped):
    result = {str(item).replace("aten.", "aten::"): number for item, number in _dropped(Rules(**kinds)).items()}
    assert {name: result.get(name) for name in dropped} == dropped and bool(result) is bool(dropped)
    products = {"aten::mm", "aten::addmm", "aten::bmm"}
    assert products <= result.keys() or kinds.get("matmul", "float32") == "float32" or not dropped
    assert not products & result.keys() or kinds.get("matmul", "float32") != "float32"


def test_a_call_is_the_forecasts_where_all_its_tensors_are_strided_fractions_of_the_cpu():
    x = torch.ones(2, 2)
    assert _is_ours((x, 1)) and _is_ours((x, x.half())) and not _is_ours((1, 2))
    for other in (x.double(), x.long(), x.to_sparse(), x.to("meta")):
        assert not _is_ours((x, other)) and not _is_ours((other, x))
