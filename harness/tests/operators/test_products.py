"""Products and convolutions against the CPU's, forward and backward; small networks that train."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import numerics
from harness.tests.operators.conftest import agrees, seeded

HALVES = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


@pytest.fixture(autouse=True)
def without_hf32(npu):
    """Float32 as float32, so that the CPU's results can be held against it closely; what HF32 does has a test of its
    own.
    """
    before = torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32
    torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False
    yield
    torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = before


def leaf(*shape, seed=0, dtype=torch.float32):
    return seeded(*shape, seed=seed, dtype=dtype).requires_grad_()


CONVOLUTIONS = {
    "one axis": (F.conv1d, dict(padding=1), (2, 4, 9), (6, 4, 3), 6),
    "two axes": (F.conv2d, dict(stride=2, padding=(1, 0)), (2, 4, 7, 6), (6, 4, 3, 2), 6),
    "three axes": (F.conv3d, dict(stride=(1, 2, 1), padding=1), (2, 4, 4, 5, 3), (6, 4, 3, 2, 3), 6),
    "dilated": (F.conv2d, dict(dilation=2), (2, 4, 7, 8), (6, 4, 3, 2), 6),
    "grouped": (F.conv2d, dict(groups=2), (2, 4, 7, 6), (6, 2, 3, 2), 6),
    "by channel": (F.conv2d, dict(groups=4, padding=1), (2, 4, 7, 6), (8, 1, 3, 3), 8),
    "same": (F.conv2d, dict(padding="same"), (2, 4, 7, 6), (6, 4, 4, 2), 6),
    "one image": (F.conv2d, dict(), (4, 7, 6), (6, 4, 3, 2), 6),
    "transposed, one axis": (F.conv_transpose1d, dict(stride=2, output_padding=1), (2, 4, 6), (4, 3, 3), 3),
    "transposed, two axes": (F.conv_transpose2d, dict(stride=2, padding=1, groups=2), (2, 4, 5, 6), (4, 3, 3, 3), 6),
    "transposed, three axes": (F.conv_transpose3d, dict(dilation=(1, 1, 2)), (2, 4, 2, 3, 4), (4, 3, 2, 2, 2), 3),
    "no images": (F.conv2d, dict(padding=1), (0, 4, 7, 6), (6, 4, 3, 3), 6),
}


@DTYPES
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(npu, kind, with_bias, dtype):
    function, options, shape, weight, channels = CONVOLUTIONS[kind]
    inputs = [leaf(*shape, dtype=dtype), leaf(*weight, seed=1, dtype=dtype)] + (
        [leaf(channels, seed=2, dtype=dtype)] if with_bias else []
    )
    with torch.no_grad():
        for input_ in inputs[:2]:
            input_.mul_(0.25)  # sums of some ten products stay near one, where the tolerance of half dtypes is meant
    agrees(npu, lambda x, w, b=None: function(x, w, b, **options), *inputs, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_what_is_not_contiguous(npu):
    agrees(
        npu,
        lambda x, w: F.conv2d(x.transpose(2, 3)[:, ::2], w.transpose(0, 1)),
        leaf(2, 6, 7, 5),
        leaf(3, 4, 2, 2, seed=1),
        rtol=1e-4,
    )


def test_a_convolution_over_time(npu):
    agrees(
        npu,
        lambda x, w, b: torch.conv_tbc(x, w, b, 1),
        leaf(7, 2, 4),
        leaf(3, 4, 5, seed=1),
        leaf(5, seed=2),
        rtol=1e-4,
        atol=1e-4,
    )


def test_gradients_in_hf32_are_those_of_rounded_operands(npu):
    """The gradient of the bias is not of the cube and stays float32."""
    x, weight, grad = seeded(2, 8, 6, 6), seeded(4, 8, 3, 3, seed=1), seeded(2, 4, 4, 4, seed=2)
    torch.npu.conv.allow_hf32 = True
    there = [tensor.to(npu).requires_grad_() for tensor in (x, weight, torch.zeros(4))]
    F.conv2d(*there).backward(grad.to(npu))
    here = [numerics.round_hf32(tensor).requires_grad_() for tensor in (x, weight)]
    F.conv2d(*here).backward(numerics.round_hf32(grad))
    for one, other in zip(there, here):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-5, atol=1e-5)
    exact = weight.clone().requires_grad_()
    F.conv2d(x, exact).backward(grad)
    assert 11 < numerics.effective_bits(there[1].grad.cpu(), exact.grad) < 15
    torch.testing.assert_close(there[2].grad.cpu(), grad.sum((0, 2, 3)), rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize(
    "function, shapes",
    [
        (torch.matmul, [(3, 4, 5), (5, 6)]),
        (torch.matmul, [(2, 1, 4, 5), (3, 5, 6)]),
        (torch.mm, [(4, 5), (5, 6)]),
        (torch.mv, [(4, 5), (5,)]),
        (torch.dot, [(5,), (5,)]),
        (torch.bmm, [(3, 4, 5), (3, 5, 6)]),
        (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), [(6,), (4, 5), (5, 6)]),
        (lambda c, a, b: torch.addbmm(c, a, b, beta=0.5, alpha=2), [(4, 6), (3, 4, 5), (3, 5, 6)]),
        (lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2), [(3, 4, 6), (3, 4, 5), (3, 5, 6)]),
        (lambda c, a, b: torch.addmv(c, a, b, beta=0.5, alpha=2), [(4,), (4, 5), (5,)]),
        (lambda c, a, b: torch.addr(c, a, b, beta=0.5, alpha=2), [(4, 5), (4,), (5,)]),
        (torch.outer, [(4,), (5,)]),
        (F.linear, [(3, 4, 5), (6, 5), (6,)]),
        (lambda a, b: torch.mm(a.t(), b.t()), [(5, 4), (6, 5)]),
        (torch.mm, [(4, 0), (0, 6)]),
        (torch.bmm, [(0, 4, 5), (0, 5, 6)]),
        (lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 3, 4), (5, 4)]),
    ],
)
def test_a_product_and_its_gradients(npu, function, shapes, dtype):
    scale = 1 if dtype == torch.float32 else 0.5
    inputs = [(seeded(*shape, seed=seed, dtype=dtype) * scale).requires_grad_() for seed, shape in enumerate(shapes)]
    agrees(npu, function, *inputs, rtol=1e-4, atol=1e-4)


def test_products_in_place(npu):
    a, b, c = seeded(4, 5), seeded(5, seed=1), seeded(4, seed=2)
    there = a.to(npu)
    torch.testing.assert_close(
        there.addr_(c.to(npu), b.to(npu), beta=2, alpha=3).cpu(), a.clone().addr_(c, b, beta=2, alpha=3)
    )
    agrees(
        npu,
        lambda x, y: torch.addr(torch.ones(2, 2, dtype=torch.int32, device=x.device), x, y),
        torch.arange(2).int(),
        torch.arange(2).int() + 1,
    )


@pytest.mark.parametrize(
    "kind, theirs", [("", lambda x, y: x), ("add", torch.add), ("mul", torch.mul), ("relu", lambda x, y: x.relu())]
)
def test_a_product_with_what_follows_it(npu, kind, theirs):
    import torch_npu

    a, b, c = (
        seeded(4, 6, dtype=torch.float16),
        seeded(6, 5, seed=1, dtype=torch.float16),
        seeded(4, 5, seed=2, dtype=torch.float16),
    )
    result = torch_npu.npu_fused_matmul(
        a.to(npu), b.to(npu), x3=c.to(npu) if kind in ("add", "mul") else None, fused_op_type=kind
    )
    torch.testing.assert_close(result.cpu().float(), theirs(a.float() @ b.float(), c.float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_batch_of_transposed_products(npu, dtype):
    import torch_npu

    a, b = seeded(4, 3, 16, dtype=dtype), seeded(3, 16, 8, seed=1, dtype=dtype)  # (M, B, K) and (B, K, N)
    wanted = torch.einsum("mbk,bkn->mbn", a.float(), b.float())
    options = dict(perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    result = torch_npu.npu_transpose_batchmatmul(a.to(npu), b.to(npu), **options)
    torch.testing.assert_close(result.cpu().float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_of_groups_of_rows(npu, dtype):
    import torch_npu

    x, weights, bias = seeded(9, 6, dtype=dtype), seeded(3, 6, 4, seed=1, dtype=dtype), seeded(3, 4, seed=2)
    bias = bias if dtype == torch.float32 else bias.half()
    sizes = [2, 0, 7]
    wanted = torch.cat([part.float() @ one.float() + b.float() for part, one, b in zip(x.split(sizes), weights, bias)])
    for kind, numbers in ((0, [2, 2, 9]), (1, sizes)):
        options = dict(split_item=3, group_type=0, group_list_type=kind, group_list=torch.tensor(numbers).to(npu))
        for share in ([weights.to(npu)], [tensor.to(npu) for tensor in weights]):
            shifts = [bias.to(npu)] if len(share) == 1 else [tensor.to(npu) for tensor in bias]
            (result,) = torch_npu.npu_grouped_matmul([x.to(npu)], share, bias=shifts, **options)
            torch.testing.assert_close(result.cpu().float(), wanted, rtol=2e-3, atol=2e-3)
    rows = [tensor.to(npu) for tensor in x.split([4, 5])]
    result = torch_npu.npu_grouped_matmul(rows, [tensor.to(npu) for tensor in weights[:2]], split_item=0, group_type=-1)
    for one, part, weight in zip(result, x.split([4, 5]), weights):
        torch.testing.assert_close(one.cpu().float(), part.float() @ weight.float(), rtol=2e-3, atol=2e-3)


def test_gradients_of_grouped_weights_are_added_up(npu):
    import torch_npu

    x, grad, total = (
        seeded(7, 4, dtype=torch.float16),
        seeded(7, 3, seed=1, dtype=torch.float16),
        seeded(2, 4, 3, seed=2),
    )
    there = total.to(npu)
    options = dict(transpose_x=True, transpose_weight=False, group_type=2)
    torch_npu.npu_grouped_matmul_add_(there, x.to(npu), grad.to(npu), torch.tensor([3, 7]).to(npu), **options)
    wanted = total + torch.stack(
        [left.float().t() @ right.float() for left, right in zip(x.split([3, 4]), grad.split([3, 4]))]
    )
    torch.testing.assert_close(there.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_a_channel_cut_into_long_pieces_stays_float32(npu):
    x, weight = seeded(2, 1, 256), seeded(3, 1, 64, seed=1)
    torch.npu.conv.allow_hf32 = True
    agrees(npu, lambda x, w: F.conv1d(x, w, stride=64), x, weight)


def trained(net, batches, device, steps=3):
    """The losses and weights of a few steps."""
    net = copy.deepcopy(net).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, foreach=False)
    losses = []
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        loss = (net(x.to(device)) - y.to(device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach().cpu() for name, value in net.state_dict().items()}


class Encoder(nn.Module):
    """Two layers of attention and of a feed-forward network, with residuals and norms, as BERT has them."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.joint = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.wide = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width)) for _ in range(2)
        )

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], device=x.device).tril().bool()
        for index in range(2):
            q, k, v = self.joint[index](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden if index else None, is_causal=not index)
            x = self.norms[2 * index](x + self.out[index](mixed.transpose(1, 2).flatten(2)))
            x = self.norms[2 * index + 1](x + self.wide[index](x))
        return x


@pytest.mark.parametrize("kind", ["convolutions", "encoder"])
def test_a_network_trains_as_on_the_cpu(npu, kind):
    torch.manual_seed(0)
    if kind == "encoder":
        net, batches = Encoder(), [(seeded(2, 5, 16, seed=seed), seeded(2, 5, 16, seed=9 + seed)) for seed in range(3)]
    else:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=4),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.Flatten(),
            nn.Linear(4 * 6 * 6, 5),
        )
        batches = [(seeded(4, 3, 8, 8, seed=seed), seeded(4, 5, seed=9 + seed)) for seed in range(3)]
    actual, expected = trained(net, batches, npu), trained(net, batches, "cpu")
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(actual[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_deformable_convolution_that_shifts_by_whole_pixels(npu, groups):
    """With shifts of nothing and factors of one it is the plain convolution; with one pixel to the right, that of the
    shifted image.
    """
    import torch_npu

    x, weight = seeded(2, 4, 6, 7), seeded(3, 4, 3, 3, seed=1)
    offset = torch.cat((torch.zeros(2, 18 * groups, 6, 7), torch.ones(2, 9 * groups, 6, 7)), 1)
    options = dict(kernel_size=[3, 3], stride=[1] * 4, padding=[1] * 4, deformable_groups=groups)
    result, deformed = torch_npu.npu_deformable_conv2d(
        *[tensor.to(npu) for tensor in (x, weight, offset)], None, **options
    )
    torch.testing.assert_close(result.cpu(), F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
    grad = seeded(2, 3, 6, 7, seed=2)
    here = x.clone().requires_grad_(), weight.clone().requires_grad_()
    F.conv2d(*here, padding=1).backward(grad)
    gradients = torch_npu.npu_deformable_conv2dbk(
        *[tensor.to(npu) for tensor in (x, grad, deformed.cpu(), weight, offset)], **options
    )
    for one, other in zip(gradients, (here[0].grad, here[1].grad)):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    offset[:, : 9 * groups] = 1
    result, _ = torch_npu.npu_deformable_conv2d(*[tensor.to(npu) for tensor in (x, weight, offset)], None, **options)
    torch.testing.assert_close(
        result.cpu(), F.conv2d(F.pad(x, (0, 2, 1, 1))[..., :], weight)[..., :7], rtol=1e-4, atol=1e-4
    )
