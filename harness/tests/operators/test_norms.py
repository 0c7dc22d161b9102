"""Normalizations against the CPU's, forward and backward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.tests.operators.conftest import RTOL, agrees, seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def leaf(*shape, seed=0, dtype=torch.float32):
    return seeded(*shape, seed=seed, dtype=dtype).requires_grad_()


@DTYPES
@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(3, 4, 6), (6,), (6,)]),
        (lambda x, w, b: F.layer_norm(x, (4, 6), w, b), [(3, 4, 6), (4, 6), (4, 6)]),
        (lambda x: F.layer_norm(x, (6,)), [(3, 4, 6)]),
        (lambda x: F.layer_norm(x.transpose(0, 1), (6,)), [(3, 4, 6)]),
        (lambda x, w, b: F.group_norm(x, 2, w, b), [(3, 4, 5), (4,), (4,)]),
        (lambda x: F.group_norm(x.transpose(-1, -2), 4), [(3, 4, 5, 8)]),
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(3, 4, 5, 2), (4,), (4,)]),
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(6, 4), (4,), (4,)]),
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(2, 4, 3, 2, 2), (4,), (4,)]),
        (lambda x: F.instance_norm(x), [(2, 3, 5, 4)]),
        (lambda x: F.softmax(x, -1).log(), [(3, 5)]),
        (lambda x: F.normalize(x, dim=1), [(3, 5)]),
        (lambda x: torch.renorm(x, 2, 0, 1.0), [(3, 5)]),
    ],
)
def test_a_normalization_and_its_gradients(npu, function, shapes, dtype):
    inputs = [leaf(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        inputs[0].mul_(
            2
        )  # the gradient towards x is a difference of larger numbers; this brings its error below the tolerance
    agrees(npu, function, *inputs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kind, shape", [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (2, 4, 3, 5)), (nn.BatchNorm3d, (2, 4, 2, 3, 2))]
)
def test_batch_norm_keeps_running_statistics(npu, kind, shape, dtype):
    here, there = kind(4), kind(4).to(npu)
    for step in range(2):
        x = seeded(*shape, seed=step, dtype=dtype)
        one, other = here(x.float()), there(x.to(npu))
        torch.testing.assert_close(
            other.detach().cpu().float(), one.detach(), rtol=RTOL.get(dtype, 1e-5), atol=RTOL.get(dtype, 1e-5)
        )
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-4, atol=1e-4)
    here.eval(), there.eval()
    x = leaf(*shape, seed=9)
    y = x.detach().to(npu).requires_grad_()
    here(x).square().sum().backward(), there(y).square().sum().backward()
    torch.testing.assert_close(y.grad.cpu(), x.grad, rtol=1e-3, atol=1e-3)
    assert int(there.num_batches_tracked) == 2


def test_nothing_to_normalize(npu):
    agrees(npu, lambda x: F.layer_norm(x, (6,)), leaf(0, 6))
    agrees(npu, lambda x, w, b: F.group_norm(x, 2, w, b), leaf(0, 4, 5), leaf(4), leaf(4))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 0.5, float("inf"), -float("inf")])
@pytest.mark.parametrize("dims, keep", [(None, False), ([0], True), ([0, 2], False)])
def test_norms_of_all_orders(npu, order, dims, keep):
    x = seeded(3, 4, 5)
    agrees(npu, lambda x: torch.norm(x, order, dims, keep) if dims else torch.norm(x, order), x)
    agrees(npu, lambda x: torch.norm(x.transpose(0, 1), order, dims, keep) if dims else torch.norm(x, order), x.half())
    agrees(npu, lambda x: torch.linalg.vector_norm(x, order, dims, keep), x)


def test_embeddings_are_renormalized_where_they_are_used(npu):
    weight, places = seeded(6, 4) * 3, torch.tensor([[1, 4], [1, 5]])
    here, there = weight.clone(), weight.to(npu)
    torch.embedding_renorm_(here, places, 1.5, 2.0), torch.embedding_renorm_(there, places.to(npu), 1.5, 2.0)
    torch.testing.assert_close(there.cpu(), here)
    x = seeded(3, 5).to(npu).renorm_(2, 1, 0.5)
    torch.testing.assert_close(x.cpu(), seeded(3, 5).renorm_(2, 1, 0.5))


def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def onto(npu, ours, theirs):
    """The device's function there, the formula on the CPU."""
    return lambda *tensors: ours(*tensors) if tensors[0].device.type == "npu" else theirs(*tensors)


@DTYPES
def test_norms_that_only_the_device_has(npu, dtype):
    import torch_npu

    x, y, weight, bias = (
        leaf(3, 4, 8, dtype=dtype),
        leaf(3, 4, 8, seed=1, dtype=dtype),
        leaf(8, seed=2, dtype=dtype),
        leaf(8, seed=3, dtype=dtype),
    )
    agrees(npu, onto(npu, lambda x, w: torch_npu.npu_rms_norm(x, w)[0], rms), x, weight, rtol=1e-4, atol=1e-4)
    plain = [tensor.detach() for tensor in (x, y, weight, bias)]
    for ours, theirs in (
        (lambda x, y, w, b: torch_npu.npu_add_rms_norm(x, y, w)[::2], lambda x, y, w, b: (rms(x + y, w), x + y)),
        (lambda x, y, w, b: torch_npu.npu_gemma_rms_norm(x, w)[0], lambda x, y, w, b: rms(x, w + 1)),
        (
            lambda x, y, w, b: torch_npu.npu_add_layer_norm(x, y, w, b, 1e-5, True)[::3],
            lambda x, y, w, b: (F.layer_norm(x + y, (8,), w, b), x + y),
        ),
        (
            lambda x, y, w, b: torch_npu.npu_deep_norm(x, y, b, w, 0.3)[2],
            lambda x, y, w, b: F.layer_norm(0.3 * x + y, (8,), w, b, 1e-6),
        ),
    ):
        agrees(npu, onto(npu, ours, theirs), *plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_group_norm_with_its_activation(npu, dtype):
    import torch_npu

    x, weight, bias = leaf(2, 4, 3, 5, dtype=dtype), leaf(4, seed=1, dtype=dtype), leaf(4, seed=2, dtype=dtype)
    plain = [tensor.detach() for tensor in (x, weight, bias)]
    agrees(
        npu,
        onto(npu, lambda *t: torch_npu.npu_group_norm_silu(*t, 2)[0], lambda *t: F.silu(F.group_norm(t[0], 2, *t[1:]))),
        *plain,
        atol=1e-4,
    )

    def swish(x, weight, bias):
        y = F.group_norm(x, 2, weight, bias)
        return y * torch.sigmoid(1.5 * y)

    ours = onto(npu, lambda *t: torch_npu.npu_group_norm_swish(t[0], 2, *t[1:], swish_scale=1.5)[0], swish)
    agrees(npu, ours, *((x, weight, bias) if dtype == torch.float32 else plain), rtol=1e-4, atol=1e-4)


def test_the_gradients_of_fused_residual_norms(npu):
    import torch_npu

    x, y, weight, grad = seeded(3, 4, 8), seeded(3, 4, 8, seed=1), seeded(8, seed=2), seeded(3, 4, 8, seed=4)
    a, b, w = [tensor.clone().requires_grad_() for tensor in (x, y, weight)]
    F.layer_norm(0.3 * a + b, (8,), w, torch.zeros(8), 1e-6).backward(grad)
    there = [tensor.to(npu) for tensor in (x, y, torch.zeros(8), weight)]
    mean, rstd, _ = torch_npu.npu_deep_norm(*there, 0.3)
    result = torch_npu.npu_deep_norm_backward(grad.to(npu), there[0], there[1], there[3], mean, rstd, 0.3)
    for one, other in zip(result, (a.grad, b.grad, grad.sum((0, 1)), w.grad)):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    a, b, w = [tensor.clone().requires_grad_() for tensor in (x, y, weight)]
    F.layer_norm(a + b, (8,), w, torch.zeros(8)).backward(grad)
    _, mean, rstd, _ = torch_npu.npu_add_layer_norm(there[0], there[1], there[3], there[2], 1e-5, True)
    result = torch_npu.npu_add_layer_norm_backward(grad.to(npu), there[0], there[1], rstd, mean, there[3], grad.to(npu))
    for one, other in zip(result, (a.grad + grad, b.grad + grad, w.grad, grad.sum((0, 1)))):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


def test_batch_norm_over_several_devices(npu):
    """What one process does of SyncBatchNorm, from its pieces, is the plain batch norm."""
    x, weight, bias = seeded(6, 4, 3), seeded(4, seed=1), seeded(4, seed=2)
    there = x.to(npu)
    parts = [torch.batch_norm_stats(part.contiguous(), 1e-5) for part in there.split([2, 4])]
    mean, invstd = [torch.stack(item) for item in zip(*parts)]
    running = [torch.zeros(4).to(npu), torch.ones(4).to(npu)]
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        there, mean, invstd, *running, 0.1, 1e-5, torch.tensor([6.0, 12.0]).to(npu)
    )
    y = torch.batch_norm_elemt(there, weight.to(npu), bias.to(npu), mean, invstd, 1e-5)
    plain = [torch.zeros(4), torch.ones(4)]
    here, w, b = x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    wanted = F.batch_norm(here, *plain, w, b, True)
    torch.testing.assert_close(y.cpu(), wanted.detach(), rtol=1e-4, atol=1e-5)
    for one, other in zip(running, plain):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
    grad = seeded(6, 4, 3, seed=5)
    wanted.backward(grad)
    sums = torch.batch_norm_backward_reduce(grad.to(npu), there, mean, invstd, weight.to(npu), True, True, True)
    count = torch.tensor([6, 12], dtype=torch.int32).to(npu)
    towards = torch.batch_norm_backward_elemt(grad.to(npu), there, mean, invstd, weight.to(npu), *sums[:2], count)
    for one, other in zip((towards, *sums[2:]), (here.grad, w.grad, b.grad)):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layer_norm_of_an_evaluation(npu, dtype):
    import torch_npu

    x, weight, bias = [seeded(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(3, 4, 8), (8,), (8,)])]
    ours = lambda x, w, b: torch_npu.npu_layer_norm_eval(x, (8,), w, b, 1e-5)
    agrees(npu, onto(npu, ours, lambda x, w, b: F.layer_norm(x, (8,), w, b)), x, weight, bias, rtol=1e-4, atol=1e-5)
