"""The forecast: each operator as the device computes it, each switch, what passes untouched, and a lie that shows."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.devices import Stack
from harness.models.aimv2 import AIMv2Config
from harness.models.aimv2 import build as build_aimv2
from harness.numerics import effective_bits, round_tf32
from harness.numerics.expected_error import Rules, rounding, rules_of
from harness.reference import copy_module
from harness.tests.needs import emulated_device

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
QKV = ((2, 4, 6, 32), (2, 4, 7, 32), (2, 4, 7, 32))
OPERATORS = {  # name: (function, shapes of its tensors)
    "linear": (F.linear, (2, 6, 64), (8, 64), (8,)),
    "linear without a bias": (F.linear, (2, 6, 64), (8, 64)),
    "linear of a turned input without a bias": (lambda x, w: F.linear(x.transpose(1, 2), w), (2, 64, 6), (8, 64)),
    "linear of a turned input": (lambda x, w, b: F.linear(x.transpose(0, 1), w, b), (2, 6, 64), (8, 64), (8,)),
    "matmul of two batches": (torch.matmul, (2, 3, 6, 64), (3, 64, 8)),
    "matmul with a vector": (torch.matmul, (6, 64), (64,)),
    "matmul of a batch with a vector": (torch.matmul, (2, 6, 64), (64,)),
    "matmul of a turned batch with a vector": (lambda a, b: a.transpose(1, 2) @ b, (2, 64, 6), (64,)),
    "matmul of a turned batch with a matrix": (lambda a, b: a.transpose(1, 2) @ b, (2, 64, 6), (64, 8)),
    "matmul of a matrix with a batch": (torch.matmul, (6, 64), (2, 64, 8)),
    "matmul of a slice": (lambda a, b: a[..., 7:71] @ b, (2, 6, 100), (64, 8)),
    "dot": (torch.dot, (64,), (64,)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (6, 8), (6, 64), (64, 8)),
    "addmm in place": (lambda c, a, b: c.clone().addmm_(a, b), (6, 8), (6, 64), (64, 8)),
    "mm into a place": (lambda a, b: torch.mm(a, b, out=a.new_empty(0)), (6, 64), (64, 8)),
    "matmul into a place": (lambda a, b: torch.matmul(a, b, out=a.new_empty(2, 6, 8)), (2, 6, 64), (64, 8)),
    "baddbmm": (torch.baddbmm, (2, 6, 8), (2, 6, 64), (2, 64, 8)),
    "addbmm": (torch.addbmm, (6, 8), (2, 6, 64), (2, 64, 8)),
    "addmv": (torch.addmv, (6,), (6, 64), (64,)),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), (2, 6, 64), (2, 8, 64)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (2, 4, 20), (6, 4, 3), (6,)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), (2, 4, 8, 8), (6, 4, 2, 3), (6,)),
    "conv2d by channels": (lambda x, w, b: F.conv2d(x, w, b, groups=4), (2, 4, 8, 8), (4, 1, 3, 3), (4,)),
    "conv2d, channels last": (
        lambda x, w: F.conv2d(x.permute(0, 3, 1, 2), w, groups=32),
        (2, 14, 14, 32),
        (32, 1, 7, 7),
    ),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, stride=2, dilation=2), (2, 3, 4, 8, 8), (6, 3, 2, 3, 3), (6,)),
    "conv without a batch": (F.conv2d, (4, 8, 8), (6, 4, 3, 3), (6,)),
    "conv into long pieces": (lambda x, w: F.conv1d(x, w, stride=400), (2, 1, 4000), (16, 1, 400)),
    "transposed conv": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, output_padding=1),
        (2, 4, 8, 8),
        (4, 6, 3, 3),
        (6,),
    ),
    "gelu": (F.gelu, (6, 64)),
    "gelu in place": (lambda x: torch.ops.aten.gelu_(x.clone()), (6, 64)),
    "silu": (F.silu, (6, 64)),
    "silu in place": (lambda x: F.silu(x.clone(), inplace=True), (6, 64)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), (6, 64), (64,), (64,)),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (4, 16)), (6, 4, 16)),
    "layer_norm of a turned input": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)), (2, 4, 8, 8)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (64,), w, 1e-5), (6, 64), (64,)),
    "rms_norm without weights": (lambda x: F.rms_norm(x, (192,), eps=1e-5), (6, 192)),
    "rms_norm of a turned input": (lambda x, w: F.rms_norm(x.transpose(1, 2), (192,), w, 1e-5), (2, 192, 16), (192,)),
    "mean of a turned square": (lambda x: x.transpose(1, 2).square().mean(-1), (2, 192, 16)),
    "sum of a product in channels last": (lambda x: (x.permute(0, 3, 1, 2) * 3).sum((1, 2)), (2, 9, 32, 8)),
    "reciprocal root": (lambda x: (x.abs() + 1).rsqrt(), (6, 64)),
    "softmax": (lambda x: F.softmax(x, -1), (6, 64)),
    "log_softmax": (lambda x: F.log_softmax(x, -1), (6, 64)),
    "third power": (lambda x: x.pow(3.0), (6, 64)),
    "bicubic": (lambda x: F.interpolate(x, size=(12, 12), mode="bicubic"), (2, 4, 8, 8)),
    "attention": (F.scaled_dot_product_attention, *QKV),
    "attention, causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *QKV),
    "attention, scaled": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), *QKV),
    "attention, mask of bools": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m > 0), *QKV, (2, 1, 6, 7)),
    "attention, mask of keys": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > 0),
        *QKV,
        (2, 1, 1, 7),
    ),
    "attention, mask of floats": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *QKV, (6, 7)),
    "attention, shared heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
        *QKV,
    ),
    "attention of three axes": (F.scaled_dot_product_attention, (3, 6, 32), (3, 7, 32), (3, 7, 32)),
    "attention, narrow values": (F.scaled_dot_product_attention, *QKV[:2], (2, 4, 7, 16)),
}


@pytest.fixture(scope="module")
def device():
    return emulated_device()


@pytest.fixture(scope="module")
def rules(device):
    """Those of the switches as a card comes."""
    return rules_of(device.stack)


@pytest.fixture
def switches(device):
    yield torch.npu
    torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = True, False


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forecast(rules, function, *tensors):
    with torch.no_grad(), rounding(rules):
        return function(*tensors)


def error(result, golden):
    return float((result.double() - golden).norm() / golden.norm())


def on_device(device, function, *tensors):
    with torch.no_grad():
        return function(*[tensor.to(device.torch_device) for tensor in tensors]).cpu()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_an_operator_is_the_devices_bit_for_bit(device, rules, name, dtype):
    function, *shapes = OPERATORS[name]
    tensors = [seeded(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    expected = on_device(device, function, *tensors)
    result = forecast(rules, function, *tensors)
    assert result.dtype == expected.dtype and torch.equal(result, expected)
    assert result.is_contiguous(), "what torch_npu computes is contiguous, and what follows may go by strides"
    with torch.inference_mode(), rounding(rules):  # where composites come undivided
        assert torch.equal(function(*tensors), expected)


def test_each_switch_changes_the_forecast_as_it_changes_the_device(device, switches):
    x, w = seeded(2, 4, 8, 8), seeded(6, 4, 3, 3, seed=1)
    a, b = seeded(64, 64), seeded(64, 64, seed=1)
    probes = [(F.conv2d, x, w), (torch.mm, a, b)]

    def both():
        rules = rules_of(device.stack)
        pairs = [(forecast(rules, *probe), on_device(device, *probe)) for probe in probes]
        assert all(torch.equal(*pair) for pair in pairs), rules
        return [found for found, _ in pairs], str(rules)

    first, words = both()
    assert words == "Ascend A2: convolutions in HF32, products float32, GELU by its tanh formula"
    switches.conv.allow_hf32, switches.matmul.allow_hf32 = False, True
    second, words = both()
    assert words == "Ascend A2: convolutions float32, products in HF32, GELU by its tanh formula"
    assert not any(torch.equal(*pair) for pair in zip(first, second))
    asked = forecast(Rules(gelu_tanh=False), F.gelu, a)  # torch_npu reads its own switch of GELU once in a process
    assert torch.equal(asked, F.gelu(a)) and 1e-4 < (asked - forecast(Rules(), F.gelu, a)).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "low", "high"), [("float32", 22.5, 24.6), ("HF32", 12.4, 13.0), ("TF32", 11.4, 12.0)])
def test_products_and_convolutions_keep_the_bits_of_their_operands(kind, low, high):
    a, b = seeded(256, 64), seeded(64, 256, seed=1)
    result = forecast(Rules(matmul=kind), torch.mm, a, b)
    assert low < effective_bits(result, a.double() @ b.double()) < high
    x, w = seeded(2, 7, 16, 16), seeded(32, 7, 3, 3, seed=1)
    result = forecast(Rules(conv=kind), F.conv2d, x, w)
    assert low < effective_bits(result, F.conv2d(x.double(), w.double())) < high


def test_tf32_keeps_ten_bits_ties_away_from_zero():
    tie = torch.tensor([0x3F801000, 0x3F803000], dtype=torch.int32).view(torch.float32)
    assert [hex(number) for number in round_tf32(tie).view(torch.int32).tolist()] == ["0x3f802000", "0x3f804000"]
    odd = torch.tensor([float("inf"), float("nan")])
    assert (
        round_tf32(odd)[0] == odd[0] and round_tf32(odd)[1].isnan() and torch.equal(round_tf32(-tie), -round_tf32(tie))
    )
    assert 2.9e38 < round_tf32(torch.full((4,), 3e38)).min() < 3.1e38  # finite, and their sum is not
    with pytest.raises(ValueError, match="rounds float32"):
        round_tf32(odd.half())


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_half_results_are_rounded_once_and_ties_of_hf32_are_a_rule(dtype):
    a, b, c = [seeded(64, 64, seed=seed, dtype=dtype) for seed in range(3)]
    once = (c.double() + a.double() @ b.double()).to(dtype)
    assert (forecast(Rules(), torch.addmm, c, a, b) == once).float().mean() > 0.99
    tie = torch.tensor([[0x3F800800]], dtype=torch.int32).view(torch.float32)  # halfway above an even number
    one = torch.ones(1, 1)
    assert (
        forecast(Rules(matmul="HF32"), torch.mm, tie, one)
        > tie
        > forecast(Rules(matmul="HF32", ties="even"), torch.mm, tie, one)
    )


def refuses(function, *arguments):
    """Whether this torch's CPU takes no such arguments."""
    try:
        function(*arguments)
    except RuntimeError:
        return True
    return False


def test_attention_past_the_python_function_follows_its_rules_too():
    q = seeded(1, 2, 6, 32)
    mask = seeded(6, 6, seed=1) > -1
    mask[:, 0] = True
    both = mask & torch.ones(6, 6, dtype=torch.bool).tril()
    fused = forecast(Rules(), F.scaled_dot_product_attention, q, q, q, both)
    twice = functools.partial(
        F.scaled_dot_product_attention, is_causal=True
    )  # a card refuses both masks, and so does torch 2.15
    if refuses(twice, q, q, q, mask):
        with pytest.raises(RuntimeError, match="is_causal"):
            forecast(Rules(), twice, q, q, q, mask)
    else:
        assert torch.allclose(forecast(Rules(), twice, q, q, q, mask), fused, atol=1e-6)
    direct = torch.ops.aten.scaled_dot_product_attention
    with torch.inference_mode():
        assert torch.equal(forecast(Rules(), direct, q, q, q, both), fused)
    assert torch.equal(forecast(Rules(), direct, q, q, q), forecast(Rules(), F.scaled_dot_product_attention, q, q, q))
    parts = forecast(Rules(matmul="TF32", fused_attention=False), F.scaled_dot_product_attention, q, q, q)
    assert 8 < effective_bits(parts, F.scaled_dot_product_attention(*[q.double()] * 3)) < 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_is_not_fused_hides_what_a_mask_of_bools_hides(dtype):
    """On 910A, 310P and CUDA all attention is made of its products; elsewhere where none fits, and for gradients."""
    q, mask = seeded(1, 2, 6, 32).to(dtype), torch.ones(6, 6, dtype=torch.bool).tril()
    exact = F.scaled_dot_product_attention(*[q.double()] * 3, attn_mask=mask)
    seen = F.scaled_dot_product_attention(*[q.double()] * 3)
    masked = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    asked = q.clone().requires_grad_()
    with rounding(Rules()):
        gradients = masked(asked, asked, asked).detach()
    for result in (forecast(Rules(fused_attention=False), masked, q, q, q), gradients):
        assert (
            effective_bits(result, exact) > (20 if dtype == torch.float32 else 7) and effective_bits(result, seen) < 6
        )


def test_what_has_no_rule_passes_untouched():
    x = seeded(64, 64)
    for tensor in (x.double(), x.to(torch.complex64), (x * 9).int()):
        assert torch.equal(forecast(Rules(matmul="HF32"), torch.mm, tensor, tensor), tensor @ tensor)
    assert forecast(Rules(), F.gelu, x.double()).equal(F.gelu(x.double()))
    q = seeded(1, 2, 6, 32).double()
    assert forecast(Rules(), F.scaled_dot_product_attention, q, q, q).equal(F.scaled_dot_product_attention(q, q, q))
    with rounding(Rules()):
        row = x[0]
        row.add_(1)  # a view writes through
    assert torch.equal(x[0], row)
    with rounding(None):
        assert torch.equal(F.gelu(x), torch.nn.GELU()(x))


def test_bad_calls_fail_as_they_do_without_rules():
    q, k = seeded(1, 4, 6, 32), seeded(1, 2, 6, 32)
    with pytest.raises(RuntimeError), rounding(Rules()):
        F.scaled_dot_product_attention(q, k, k)  # heads differ and nobody said that they are shared
    assert torch.equal(forecast(None, torch.mm, q[0, 0], q[0, 0].t()), q[0, 0] @ q[0, 0].t())  # and the mode is gone


def test_rules_follow_the_stack_and_refuse_other_words():
    card = dict(device="Ascend910B4", backend="npu")
    assert rules_of(Stack(device="", backend="cpu")) is None
    assert rules_of(Stack(**card)) == Rules(conv="HF32", half_results=True)
    assert rules_of(Stack(**card, conv_allow_hf32=False, matmul_allow_hf32=True, compatible_impl=True)) == Rules(
        matmul="HF32", gelu_tanh=False, narrow_attention=True, half_results=True
    )  # fmt: skip
    cuda = rules_of(Stack(device="", backend="cuda", conv_allow_tf32=True, matmul_allow_tf32=False))
    assert str(cuda) == "CUDA: convolutions in TF32, products float32, GELU as it is asked for"
    for wrong in (dict(conv="HF16"), dict(matmul="tf32"), dict(ties="up"), dict(groups=0)):
        with pytest.raises(ValueError):
            Rules(**wrong)


SMALL = AIMv2Config(image_size=56, width=64, depth=2, heads=4, hidden=176)


class Picture(nn.Module):
    """A convolution, GELU, a normalization and attention in one."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.norm, self.attention = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


def compared(device, model, image, rules):
    """The error of the device over the one that was forecast; both against float64."""
    cpu = torch.device("cpu")
    golden = copy_module(model, dtype=torch.float64, device=cpu)(image.double())
    there = copy_module(model, dtype=image.dtype, device=device.torch_device)
    return error(on_device(device, there, image), golden) / error(
        forecast(rules, copy_module(model, dtype=image.dtype, device=cpu), image), golden
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("which", ["AIMv2", "picture"])
def test_a_healthy_device_errs_as_forecast_and_a_lie_shows(device, rules, which, dtype, switches):
    generator = torch.default_generator.manual_seed(0)
    model = (build_aimv2(SMALL, 0) if which == "AIMv2" else Picture()).eval().requires_grad_(False)
    image = torch.randn(1, 3, 56, 56, generator=generator).to(dtype)
    model = copy_module(model, dtype=dtype, device=torch.device("cpu"))
    assert 0.7 < compared(device, model, image, rules) < 1.4
    if dtype == torch.float32:
        assert compared(device, model, image, Rules(conv="float32", gelu_tanh=rules.gelu_tanh)) > (
            20 if which == "AIMv2" else 1.2
        )
        switches.conv.allow_hf32 = False
        assert 0.7 < compared(device, model, image, rules_of(device.stack)) < 1.4
        assert compared(device, model, image, rules) < (0.05 if which == "AIMv2" else 0.9)
