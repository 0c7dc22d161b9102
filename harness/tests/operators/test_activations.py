"""Activations on the emulated device, forward and backward, against the CPU."""

import pytest
import torch
from torch.nn import functional as F

from harness.tests.operators.conftest import agrees, seeded

aten = torch.ops.aten

ACTIVATIONS = {
    "celu": lambda x: F.celu(x, 0.7),
    "elu": lambda x: F.elu(x, 1.3),
    "erfinv": lambda x: torch.erfinv(torch.tanh(x) * 0.9),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "glu": lambda x: F.glu(x, 0),
    "hardshrink": lambda x: F.hardshrink(x, 0.4),
    "hardsigmoid": lambda x: F.hardsigmoid(x * 3),
    "hardswish": lambda x: F.hardswish(x * 3),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "logit with eps": lambda x: torch.logit(x, 0.2),
    "log_sigmoid": F.logsigmoid,
    "log_softmax": lambda x: F.log_softmax(x, 0),
    "mish": F.mish,
    "relu": torch.relu,
    "rrelu": lambda x: F.rrelu(x, 0.2, 0.4, training=False),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": lambda x: F.softmax(x, -1),
    "softplus": lambda x: F.softplus(x, 1.5, 2.0),
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "tanh": torch.tanh,
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
}
SPLITTING = ("glu", "log_softmax", "softmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_the_cpus(npu, name, dtype):
    x = (
        seeded(6, 5, dtype=dtype).t().requires_grad_()
        if name != "glu"
        else seeded(5, 6, dtype=dtype).t().requires_grad_()
    )
    agrees(npu, ACTIVATIONS[name], x)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in SPLITTING])
def test_an_activation_of_a_scalar_and_of_nothing(npu, name):
    agrees(npu, ACTIVATIONS[name], torch.tensor(0.37, requires_grad=True))
    agrees(npu, ACTIVATIONS[name], torch.empty(0, 3, requires_grad=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.celu_(x, 0.7),
        lambda x: F.elu_(x, 1.3),
        lambda x: x.div_(4).erfinv_(),
        lambda x: F.hardtanh_(x, -0.5, 0.8),
        lambda x: F.leaky_relu_(x, 0.1),
        lambda x: F.threshold_(x, 0.1, -2.0),
        lambda x: F.rrelu_(x, 0.2, 0.4),
        lambda x: torch.ops.aten._add_relu_(x, x * 2, alpha=-0.25),
    ],
)
def test_an_activation_in_place_writes_where_it_read(npu, function):
    x = seeded(4, 6)
    expected, actual = x.clone(), x.to(npu)
    assert function(actual.t()).data_ptr() == actual.data_ptr()
    function(expected.t())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_add_relu(npu):
    agrees(npu, lambda x, y: torch.ops.aten._add_relu(x, y, alpha=2), seeded(3, 4), seeded(3, 4, seed=1))


@pytest.mark.parametrize("weights", [1, 3])
def test_prelu_learns_a_slope_for_every_channel(npu, weights):
    for shape in ((2, 3), (2, 3, 4, 5)):
        agrees(
            npu,
            F.prelu,
            seeded(*shape).requires_grad_(),
            torch.full((weights,), 0.3).mul_(torch.arange(1, weights + 1)).requires_grad_(),
        )


def test_a_random_slope_is_kept_for_the_gradient(npu):
    x = seeded(64, 32).to(npu).requires_grad_()
    y = F.rrelu(x, 0.2, 0.4, training=True)
    y.sum().backward()
    slopes = x.grad.cpu()
    assert ((slopes == 1) == (x.cpu() > 0)).all()
    below = slopes[x.cpu() <= 0]
    assert below.min() >= 0.2 and below.max() <= 0.4 and below.std() > 0.04
    torch.testing.assert_close(y.cpu(), (x * x.grad).cpu())
    assert not torch.equal(F.rrelu(x, 0.2, 0.4, training=True).cpu(), y.cpu())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_vendors_gelu_takes_either_formula(npu, approximate):
    import torch_npu

    x = seeded(5, 8, seed=3)
    leaf = x.clone().requires_grad_()
    expected = F.gelu(leaf, approximate=approximate)
    expected.sum().backward()
    on_card = x.to(npu).requires_grad_()
    actual = torch_npu.npu_gelu(on_card, approximate=approximate)
    actual.sum().backward()
    torch.testing.assert_close(actual.detach().cpu(), expected.detach())
    torch.testing.assert_close(on_card.grad.cpu(), leaf.grad)
    torch.testing.assert_close(
        torch_npu.npu_gelu_mul(x.to(npu), approximate=approximate).cpu(),
        F.gelu(x[:, :4], approximate=approximate) * x[:, 4:],
    )


def _fast_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _swiglu(x, dim):
    left, right = x.chunk(2, dim)
    return F.silu(left) * right


def _geglu(x, left_is_active):
    halves = x.chunk(2, -1)
    active, value = halves if left_is_active else halves[::-1]
    return F.gelu(active, approximate="tanh") * value


@pytest.mark.parametrize(
    "vendor, meaning",
    [
        (lambda npu, x: npu.fast_gelu(x), _fast_gelu),
        (lambda npu, x: npu.npu_swiglu(x, dim=-1), lambda x: _swiglu(x, -1)),
        (lambda npu, x: npu.npu_swiglu(x, dim=0), lambda x: _swiglu(x, 0)),
        (lambda npu, x: npu.npu_geglu(x, -1, 1, True)[0], lambda x: _geglu(x, True)),
        (lambda npu, x: npu.npu_geglu(x, -1, 1, False)[0], lambda x: _geglu(x, False)),
    ],
    ids=["fast_gelu", "swiglu", "swiglu of rows", "geglu", "geglu of the right"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_vendors_activation_has_its_documented_meaning(npu, vendor, meaning, dtype):
    import torch_npu

    def either(x):
        return vendor(torch_npu, x) if x.device.type == "npu" else meaning(x)

    agrees(npu, either, seeded(4, 6, dtype=dtype).requires_grad_())


def _clipped(x, kept, interleaved):
    gate, value = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
    gate, value = gate.clamp(max=0.9), value.clamp(-0.9, 0.9)
    result = gate * torch.sigmoid(0.7 * gate) * (value + 1.2)
    result[kept:] = 0
    return result


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_clipped_swiglu_leaves_rows_of_no_group(npu, interleaved):
    import torch_npu

    x = seeded(5, 8)
    given = dict(dim=-1, alpha=0.7, limit=0.9, bias=1.2, interleaved=interleaved)
    actual = torch_npu.npu_clipped_swiglu(x.to(npu), group_index=torch.tensor([1, 2]).to(npu), **given)
    torch.testing.assert_close(actual.cpu(), _clipped(x, 3, interleaved))
    torch.testing.assert_close(torch_npu.npu_clipped_swiglu(x.to(npu), **given).cpu(), _clipped(x, 5, interleaved))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_numbers_stay_whole(npu, dtype):
    x = torch.tensor([-3, 0, 4], dtype=dtype)
    agrees(npu, lambda x: F.threshold(x, 1, 2), x)
    agrees(npu, lambda x: F.hardtanh(x, -1, 2), x)
    agrees(npu, torch.erfinv, x)


def test_the_gradient_of_a_hardswish_at_its_corners(npu):
    x = torch.tensor([-4.0, -3.0, -1.0, 0.0, 2.0, 3.0, 5.0])
    result = aten.hardswish_backward(torch.ones_like(x).to(npu), x.to(npu))
    torch.testing.assert_close(result.cpu(), torch.tensor([0, 0, 1 / 6, 0.5, 7 / 6, 1, 1]))
