"""Types of CANN's older path, each called through torch in a program that compiles its operators, and held against the
CPU.
"""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from harness import emulator
from harness.tests.operators.conftest import agrees, seeded


def reached(types, npu, function, *arguments, **settings):
    """Assert that function agrees with the CPU and that each of the types ran, by a fault that changes nothing."""
    with ExitStack() as stack:
        result = {type: stack.enter_context(emulator.fault(type, kind="hang", seconds=0)) for type in types.split()}
        agrees(npu, function, *arguments, **settings)
    assert not [type for type, fault in result.items() if not fault.hits]


def drawn(*shape, seed=0, dtype=torch.float32):
    """Normal numbers of which a gradient is wanted."""
    return seeded(*shape, seed=seed, dtype=dtype).requires_grad_()


X, Y = seeded(3, 4), seeded(3, 4, seed=1)
UNIT = X.tanh()
POSITIVE = X.abs() + 0.1
WHOLE = torch.tensor([[3, -4, 7], [0, 5, -6]])
OTHER = torch.tensor([[2, 3, -2], [1, -5, 4]])
HOLES = X > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("types", "function", "x"),
    [
        ("Acos", torch.acos, UNIT),
        ("Acosh", torch.acosh, POSITIVE + 1),
        ("Asin", torch.asin, UNIT),
        ("Asinh", torch.asinh, X),
        ("Atan", torch.atan, X),
        ("Atanh", torch.atanh, UNIT),
        ("Ceil", torch.ceil, X),
        ("Cos", torch.cos, X),
        ("Cosh", torch.cosh, X),
        ("Erf", torch.erf, X),
        ("Erfc", torch.erfc, X),
        ("Erfinv", torch.erfinv, UNIT),
        ("Expm1", torch.expm1, X),
        ("Floor", torch.floor, X),
        ("Log", torch.log, POSITIVE),
        ("Log", torch.log2, POSITIVE),
        ("Log", torch.log10, POSITIVE),
        ("Log1p", torch.log1p, POSITIVE),
        ("Neg", torch.neg, X),
        ("Reciprocal", torch.reciprocal, POSITIVE),
        ("Round", torch.round, X),
        ("Rsqrt", torch.rsqrt, POSITIVE),
        ("Sign", torch.sign, X),
        ("Sin", torch.sin, X),
        ("Sinh", torch.sinh, X),
        ("Sqrt", torch.sqrt, POSITIVE),
        ("Square", torch.square, X),
        ("Tan", torch.tan, UNIT),
        ("Tanh", torch.tanh, X),
        ("Trunc", torch.trunc, X),
        ("IsFinite", torch.isfinite, X),
        ("Pow", lambda x: x.pow(2.5), POSITIVE),
        ("NanToNum", lambda x: torch.nan_to_num(x, 2.0), X.masked_fill(HOLES, float("nan"))),
        ("ClipByValueV2", lambda x: x.clamp(-0.5, 0.5), X),
        ("Renorm", lambda x: x.renorm(2, 0, 1.0), X),
        ("Trace", torch.trace, X),
        ("Tril", lambda x: x.tril(1), X),
        ("Triu", lambda x: x.triu(-1), X),
        ("GLU", F.glu, X),
    ],
)
def test_one_input(compiling, types, function, x, dtype):
    reached(types, compiling, function, x.to(dtype), backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("types", "function"),
    [
        ("Relu ReluGrad", F.relu),
        ("HardSwish HardSwishGrad", F.hardswish),
        ("HardSigmoid HardSigmoidGrad", F.hardsigmoid),
        ("LogSigmoid LogSigmoidGrad", F.logsigmoid),
        ("Swish", F.silu),
        ("CeluV2 EluGradV2", lambda x: F.celu(x, 1.3)),
        ("Elu EluGradV2", lambda x: F.elu(x, 0.7)),
        ("LeakyRelu LeakyReluGrad", lambda x: F.leaky_relu(x, 0.2)),
        ("HardShrink HardShrinkGrad", lambda x: F.hardshrink(x, 0.3)),
        ("SoftShrink SoftShrinkGrad", lambda x: F.softshrink(x, 0.3)),
        ("ThresholdV2D ThresholdGradV2D", lambda x: F.threshold(x, 0.2, -1.0)),
        ("ClipByValue HardtanhGrad", lambda x: F.hardtanh(x, -0.5, 0.5)),
        ("GLU GLUGrad", lambda x: F.glu(x, 1)),
        ("Mish MishGrad", F.mish),
        ("SigmoidGrad", torch.sigmoid),
        ("TanhGrad", torch.tanh),
        ("SoftmaxV2 SoftmaxGrad", lambda x: F.softmax(x, 1)),
        ("LogSoftmaxV2 LogSoftmaxGrad", lambda x: F.log_softmax(x, 0)),
        ("Gelu GeluGrad", lambda x: F.gelu(x, approximate="tanh")),
        ("SoftplusV2 SoftplusV2Grad", lambda x: F.softplus(x, 2.0, 1.0)),
    ],
)
def test_activations_and_their_gradients(compiling, types, function, dtype):
    reached(types, compiling, function, drawn(4, 6, dtype=dtype))


@pytest.mark.parametrize(
    ("types", "function", "inputs"),
    [
        ("Sub", torch.sub, (X, Y)),
        ("RealDiv", torch.div, (X, Y)),
        ("Maximum", torch.maximum, (X, Y)),
        ("Minimum", torch.minimum, (X, Y)),
        ("AxpyV2", lambda x, y: torch.add(x, y, alpha=2.5), (X, Y)),
        ("Atan2", torch.atan2, (X, Y)),
        ("LogAddExp", torch.logaddexp, (X, Y)),
        ("LogAddExp", torch.logaddexp2, (X, Y)),
        ("FloorDiv", torch.floor_divide, (X, Y)),
        ("FloorDiv", torch.floor_divide, (WHOLE, OTHER)),
        ("FloorMod", torch.remainder, (X, Y)),
        ("Mod", torch.fmod, (X, Y)),
        ("Pow", torch.pow, (POSITIVE, Y)),
        ("Equal", torch.eq, (X, X.clone())),
        ("NotEqual", torch.ne, (X, Y)),
        ("Less", torch.lt, (X, Y)),
        ("LessEqual", torch.le, (X, Y)),
        ("Greater", torch.gt, (X, Y)),
        ("GreaterEqual", torch.ge, (X, Y)),
        ("LogicalAnd", torch.logical_and, (HOLES, Y > 0)),
        ("LogicalOr", torch.logical_or, (HOLES, Y > 0)),
        ("LogicalNot", torch.logical_not, (HOLES,)),
        ("Invert", torch.bitwise_not, (WHOLE,)),
        ("BitwiseAnd", torch.bitwise_and, (WHOLE, OTHER)),
        ("BitwiseOr", torch.bitwise_or, (WHOLE, OTHER)),
        ("LeftShift", lambda x, y: x << y.abs(), (WHOLE, OTHER)),
        ("RightShift", lambda x: x >> 1, (WHOLE,)),
        ("Xlogy", torch.xlogy, (X, POSITIVE)),
        ("BitwiseXor", torch.bitwise_xor, (WHOLE, OTHER)),
        ("IsClose", torch.isclose, (X, X + 1e-7)),
        ("Dot", torch.dot, (X[0], Y[0])),
        ("Cross", lambda x, y: torch.linalg.cross(x, y, dim=0), (X, Y)),
        ("Addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.5), (X, Y)),
        ("Addcdiv", lambda x, y: torch.addcdiv(x, x, y, value=0.5), (X, POSITIVE)),
        ("Lerp", lambda x, y: torch.lerp(x, y, y), (X, Y)),
        ("Select", lambda x, y: torch.where(x > 0, x, y), (X, Y)),
    ],
)
def test_several_inputs(compiling, types, function, inputs):
    reached(types, compiling, function, *inputs, backward=False)


INDEX = torch.tensor([2, 0, 1])
ROWS = torch.tensor([[1, 0, 2, 2], [0, 0, 1, 2]])
MARKED = torch.tensor([[True, False, True, False]] * 3)


@pytest.mark.parametrize(
    ("types", "function", "inputs"),
    [
        ("Fill", lambda x: x.clone().fill_(2.5), (X,)),
        ("OnesLike", lambda x: torch.ones(3, device=x.device), (X,)),
        ("ZerosLike", torch.zeros_like, (X,)),
        ("Eye", lambda x: x.new_empty(3, 5).copy_(torch.eye(3, 5, device=x.device)), (X,)),
        ("Range", lambda x: torch.arange(2, 11, 3, device=x.device), (X,)),
        ("LinSpace", lambda x: torch.linspace(-1, 2, 7, device=x.device), (X,)),
        ("BroadcastTo", lambda x: x.expand(2, 3, 4).clone(), (X,)),
        ("Tile", lambda x: x.repeat(2, 1, 3), (X,)),
        ("ReverseV2", lambda x: x.flip(0, 1), (X,)),
        ("Roll", lambda x: x.roll((1, 2), (0, 1)), (X,)),
        ("Pack", lambda x, y: torch.stack([x, y], 1), (X, Y)),
        ("PadV3", lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), (X,)),
        ("PadV3", lambda x: F.pad(x[None, None], (1, 2, 0, 1), "replicate"), (X,)),
        ("MirrorPad", lambda x: F.pad(x[None, None], (1, 2, 0, 1), "reflect"), (X,)),
        ("AsStrided", lambda x: x[:, ::2].contiguous(), (X,)),
        ("GatherV2", lambda x, i: x.index_select(0, i), (X, INDEX)),
        ("GatherElements", lambda x, i: x.gather(0, i), (X, ROWS)),
        ("ScatterElements", lambda x, i, y: x.scatter_add(0, i, y), (X, ROWS, Y)),
        ("ScatterElements", lambda x, i, y: x.scatter(0, i[:1], y), (X, ROWS, Y)),
        ("Gather", torch.take, (X, ROWS)),
        ("InplaceIndexAdd", lambda x, i, y: x.index_add(0, i, y, alpha=1.5), (X, INDEX, Y)),
        ("OneHot", lambda i: F.one_hot(i, 4), (INDEX,)),
        ("MaskedFill", lambda x, m: x.masked_fill(m, 1.5), (X, MARKED)),
        ("MaskedSelect", torch.masked_select, (X, MARKED)),
        ("NonZero", torch.nonzero, (MARKED,)),
        ("FillDiagonal", lambda x: x.clone().fill_diagonal_(2.0), (X,)),
        ("ReduceAll", lambda x: torch.all(x, 1), (MARKED,)),
        ("ReduceAny", lambda x: torch.any(x, 1), (MARKED,)),
        ("ReduceLogSumExp", lambda x: torch.logsumexp(x, 1), (X,)),
        ("ReduceMax", torch.max, (X,)),
        ("ReduceMin", torch.min, (X,)),
        ("ReduceMax", lambda x: torch.amax(x, 1), (X,)),
        ("ReduceMin", lambda x: torch.amin(x, 0, keepdim=True), (X,)),
        ("ReduceMean", lambda x: x.mean(1), (X,)),
        ("ReduceProd", lambda x: x.prod(1), (X,)),
        ("ReduceMeanD ReduceStdWithMean", lambda x: x.std(1), (X,)),
        ("ReduceStdV2Update", lambda x: x.var(1), (X,)),
        ("ArgMaxV2", lambda x: x.argmax(1), (X,)),
        ("ArgMin", lambda x: x.argmin(0), (X,)),
        ("ArgMaxWithValue", lambda x: tuple(x.max(1)), (X,)),
        ("ArgMinWithValue", lambda x: tuple(x.min(0)), (X,)),
        ("Sort", lambda x: tuple(x.sort(1)), (X,)),
        ("Sort", lambda x: x.argsort(1, descending=True), (X,)),
        ("Cumsum", lambda x: x.cumsum(1), (X,)),
        ("Cumprod", lambda x: x.cumprod(1), (X,)),
        ("Cummax", lambda x: tuple(x.cummax(1)), (X,)),
        ("Cummin", lambda x: tuple(x.cummin(0)), (X,)),
        ("MatrixInverse", torch.inverse, (X[:, :3],)),
        ("BatchMatMul", torch.bmm, (X[None], Y.t().contiguous()[None])),
        ("AdaptiveAvgPool2d", lambda x: F.adaptive_avg_pool2d(x[None, None], (2, 2)), (X,)),
        ("UpsampleNearest3d", lambda x: F.interpolate(x[None, None, None], (2, 6, 8)), (X,)),
    ],
)
def test_copies_choices_and_reductions(compiling, types, function, inputs):
    reached(types, compiling, function, *inputs, backward=False)


def convolution(function, **settings):
    return lambda x, weight, bias: function(x, weight, bias, **settings)


@pytest.mark.parametrize(
    ("types", "function", "inputs"),
    [
        (
            "Conv2D Conv2DBackpropInput Conv2DBackpropFilter",
            convolution(F.conv2d, stride=(2, 1), padding=(1, 0)),
            ((2, 4, 6, 5), (3, 4, 3, 2), (3,)),
        ),
        (
            "Conv2D Conv2DBackpropInput Conv2DBackpropFilter",
            convolution(F.conv2d, dilation=2, groups=2),
            ((2, 4, 6, 5), (6, 2, 2, 2), (6,)),
        ),
        (
            "Conv3D Conv3DBackpropInput Conv3DBackpropFilter",
            convolution(F.conv3d, stride=2, padding=1),
            ((2, 4, 6, 5, 4), (3, 4, 3, 2, 2), (3,)),
        ),
        (
            "Conv2DTranspose",
            convolution(F.conv_transpose2d, stride=2, padding=1, output_padding=1),
            ((2, 4, 6, 5), (4, 3, 3, 2), (3,)),
        ),
        ("Conv3DTranspose", convolution(F.conv_transpose3d, stride=2), ((2, 4, 3, 5, 4), (4, 3, 3, 2, 2), (3,))),
    ],
)
def test_convolutions(compiling, types, function, inputs):
    torch.npu.conv.allow_hf32 = False
    reached(
        types, compiling, function, *(drawn(*shape, seed=n) for n, shape in enumerate(inputs)), rtol=1e-4, atol=1e-4
    )


def test_a_dilated_convolution(compiling):
    torch.npu.conv.allow_hf32 = False
    x, weight, bias = seeded(2, 4, 6, 5), seeded(3, 4, 3, 2, seed=1), seeded(3, seed=2)
    dilated = torch.ops.aten.slow_conv_dilated2d
    function = lambda x, w, b: dilated(x, w, [3, 2], b, [1, 1], [1, 1], [2, 2])
    reached("Conv2D", compiling, function, x, weight, bias, backward=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "name"), [((4, 3, 5, 2), "BN"), ((4, 3, 2, 3, 2), "BN3D")])
def test_batch_norm(compiling, shape, name, dtype):
    x, weight, bias = drawn(*shape, dtype=dtype), drawn(3, seed=1), drawn(3, seed=2)
    types = f"{name}TrainingReduce {name}TrainingUpdate {name}TrainingUpdateGrad {name}TrainingReduceGrad"
    norm = partial(F.batch_norm, training=True)
    reached(types, compiling, norm, x, torch.zeros(3), torch.ones(3), weight, bias, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_an_evaluation(compiling):
    x, mean, variance, weight, bias = (
        drawn(4, 3, 5, 2),
        seeded(3),
        seeded(3, seed=3).abs() + 0.5,
        drawn(3, seed=1),
        drawn(3, seed=2),
    )
    reached("BNInfer BNInferGrad", compiling, F.batch_norm, x, mean, variance, weight, bias)


TARGET = seeded(4, 6, seed=5)
CHANCES = torch.sigmoid(TARGET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("types", "loss", "target"),
    [
        ("MseLoss MseLossGrad", F.mse_loss, TARGET),
        (
            "SmoothL1LossV2 SmoothL1LossGradV2",
            lambda x, y, reduction: F.smooth_l1_loss(x, y, beta=0.5, reduction=reduction),
            TARGET,
        ),
        ("SoftMarginLoss SoftMarginLossGrad", F.soft_margin_loss, TARGET.sign()),
        ("LpLoss L1LossGrad", F.l1_loss, TARGET),
        (
            "BinaryCrossEntropy BinaryCrossEntropyGrad",
            lambda x, y, reduction: F.binary_cross_entropy(torch.sigmoid(x), y, reduction=reduction),
            CHANCES,
        ),
        (
            "SigmoidCrossEntropyWithLogitsV2 SigmoidCrossEntropyWithLogitsGradV2",
            F.binary_cross_entropy_with_logits,
            CHANCES,
        ),
        ("KLDiv KlDivLossGrad", lambda x, y, reduction: F.kl_div(x, y, reduction=reduction), CHANCES),
        (
            "NLLLoss NLLLossGrad",
            lambda x, y, reduction: F.nll_loss(x, y, reduction=reduction),
            torch.tensor([5, 0, 2, 1]),
        ),
    ],
)
def test_losses(compiling, types, loss, target, reduction, dtype):
    target = target.to(dtype) if target.is_floating_point() else target

    def lost(x):
        return loss(x, target.to(x.device, x.dtype if target.is_floating_point() else None), reduction=reduction)

    reached(types, compiling, lost, drawn(4, 6, dtype=dtype))


@pytest.mark.parametrize(
    ("types", "function", "inputs"),
    [
        (
            "LayerNorm LayerNormGrad",
            lambda x, weight, bias: F.layer_norm(x, (4, 6), weight, bias),
            ((3, 4, 6), (4, 6), (4, 6)),
        ),
        ("GroupNormSwish", lambda x, weight, bias: F.group_norm(x, 2, weight, bias), ((3, 4, 6), (4,), (4,))),
        ("PRelu PReluGrad", F.prelu, ((3, 4, 6), (4,))),
        ("AdaptiveAvgPool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), ((3, 4, 6),)),
        ("AvgPoolV2 AvgPoolV2Grad", lambda x: F.avg_pool2d(x, 3, 2, 1), ((2, 3, 7, 6),)),
        ("UpsampleNearest3d UpsampleNearest3dGrad", lambda x: F.interpolate(x, (2, 4, 6)), ((1, 2, 1, 2, 3),)),
    ],
)
def test_norms_and_pooling(compiling, types, function, inputs):
    torch.npu.matmul.allow_hf32 = False
    reached(
        types, compiling, function, *(drawn(*shape, seed=n) for n, shape in enumerate(inputs)), rtol=1e-4, atol=1e-4
    )


def computes(types, function, arguments, expected, npu, **near):
    """Assert that a function of torch_npu that the CPU lacks computes what is expected, by way of these types."""
    with ExitStack() as stack:
        met = {type: stack.enter_context(emulator.fault(type, kind="hang", seconds=0)) for type in types.split()}
        result = function(
            *(argument.to(npu) if isinstance(argument, torch.Tensor) else argument for argument in arguments)
        )
        result = result if isinstance(result, (tuple, list)) else (result,)
        result = [tensor.cpu() for tensor in result]
    assert not [type for type, fault in met.items() if not fault.hits]
    for actual, wanted in zip(result, expected if isinstance(expected, (tuple, list)) else (expected,), strict=True):
        torch.testing.assert_close(actual, wanted, **near)


def through(function, *inputs):
    """A function's result and its gradients, of the result weighted from 1 to 2."""
    inputs = [input_.clone().requires_grad_() for input_ in inputs]
    result = function(*inputs)
    return [
        result.detach(),
        *torch.autograd.grad(
            result, inputs, torch.linspace(1, 2, result.numel(), device=result.device).reshape(result.shape)
        ),
    ]


def _rms_norm(x, gamma):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gamma


def test_functions_that_the_cpu_lacks(compiling):
    import torch_npu

    x, y, gamma = seeded(3, 16), seeded(3, 16, seed=1), seeded(16, seed=2)
    labels = torch.softmax(y, -1)
    for types, function, arguments, expected in [
        ("Swish SwishGrad", lambda x: through(torch_npu.npu_silu, x), (x,), through(F.silu, x)),
        (
            "FastGelu FastGeluGrad",
            lambda x: through(torch_npu.npu_fast_gelu, x),
            (x,),
            through(lambda x: x * torch.sigmoid(1.702 * x), x),
        ),
        (
            "RmsNorm RmsNormGrad",
            lambda x, g: through(lambda x, g: torch_npu.npu_rms_norm(x, g)[0], x, g),
            (x, gamma),
            through(_rms_norm, x, gamma),
        ),
        ("MatMulV2", lambda x, w: through(torch_npu.npu_linear, x, w), (x, y), through(F.linear, x, y)),
        (
            "SoftmaxCrossEntropyWithLogits",
            lambda x, y: through(lambda x: torch_npu.npu_softmax_cross_entropy_with_logits(x, y), x),
            (x, labels),
            through(lambda x: F.cross_entropy(x, labels, reduction="none"), x),
        ),
        ("ConfusionTransposeD", torch_npu.npu_confusion_transpose, (x, (1, 0), (16, 3), True), x.t()),
        ("ConfusionTransposeD", torch_npu.npu_confusion_transpose, (x, (1, 0), (4, 12), False), x.reshape(4, 12).t()),
        (
            "OneHotD",
            torch_npu.npu_one_hot,
            (INDEX, -1, 4, 2.0, -1.0),
            torch.where(F.one_hot(INDEX, 4).bool(), 2.0, -1.0),
        ),
        ("Pad", torch_npu.npu_pad, (x, (1, 2, 0, 3)), F.pad(x, (0, 3, 1, 2))),
        ("SortV2", torch_npu.npu_sort_v2, (x, 0, True), x.sort(0, descending=True).values),
        (
            "StrideAdd",
            torch_npu.npu_stride_add,
            (seeded(2, 32, 3, 4), seeded(2, 32, 3, 4, seed=1), 0, 1, 1),
            seeded(2, 32, 3, 4)[:, :16] + seeded(2, 32, 3, 4, seed=1)[:, 16:],
        ),
        (
            "MaskedFillRange",
            torch_npu.npu_masked_fill_range,
            (x, torch.tensor([[1, 0, 3]]).int(), torch.tensor([[2, 4, 3]]).int(), gamma[:1], 1),
            torch.cat(
                [
                    torch.cat([x[:1, :1], gamma[:1, None], x[:1, 2:]], 1),
                    torch.cat([gamma[:1, None].expand(1, 4), x[1:2, 4:]], 1),
                    x[2:],
                ]
            ),
        ),
    ]:
        computes(types, function, arguments, expected, compiling, rtol=1e-4, atol=1e-5)


def test_embedding_rows_are_cut_to_a_norm(compiling):
    weight = seeded(5, 4) * 3
    expected = torch.embedding_renorm_(weight.clone(), torch.tensor([3, 0]), 2.0, 2.0)
    computes(
        "GatherV2D ScatterUpdate",
        lambda w, i: torch.embedding_renorm_(w, i, 2.0, 2.0),
        (weight, torch.tensor([3, 0])),
        expected,
        compiling,
    )


def test_embedding_and_its_gradient(compiling):
    rows = torch.tensor([[3, 0, 3], [1, 2, 0]])
    reached(
        "EmbeddingDenseGrad",
        compiling,
        lambda weight: F.embedding(rows.to(weight.device), weight, padding_idx=2),
        drawn(5, 4),
    )


def test_equality_of_tensors(compiling):
    with emulator.fault("TensorEqual", kind="hang", seconds=0) as met:
        assert torch.equal(X.to(compiling), X.to(compiling)) and not torch.equal(X.to(compiling), Y.to(compiling))
    assert met.hits == 2


def test_optimizers_of_one_step(compiling):
    import torch_npu

    variable, m, v, grad = (seeded(5, seed=n) for n in range(4))
    v = v.abs()
    m_new, v_new = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad * grad
    state = [tensor.to(compiling) for tensor in (variable, m, v)]
    bert = variable - 0.1 * (m_new / (v_new.sqrt() + 1e-6) + 0.05 * variable)
    computes(
        "ApplyAdamV2",
        lambda g: torch_npu.npu_bert_apply_adam(0.1, 0.9, 0.99, 1e-6, g, -1, 0, 0.05, out=tuple(state)),
        (grad,),
        (bert, m_new, v_new),
        compiling,
        rtol=1e-4,
        atol=1e-5,
    )
    state = [tensor.to(compiling) for tensor in (variable, m, v)]
    adam = variable * (1 - 0.1 * 0.05) - 0.1 * m_new / (1 - 0.9 * 0.9) / ((v_new / (1 - 0.99 * 0.99)).sqrt() + 1e-6)
    computes(
        "ApplyAdamW",
        lambda g: torch_npu.npu_apply_adam_w(
            0.9, 0.99, 0.1, 0.05, 0.9, 0.99, 1e-6, g, None, False, False, out=tuple(state)
        ),
        (grad,),
        (adam, m_new, v_new),
        compiling,
        rtol=1e-4,
        atol=1e-5,
    )


def test_dropouts_with_a_byte_mask(compiling):
    import torch_npu

    torch.npu.manual_seed(3)
    x = torch.ones(40, 50)
    with (
        emulator.fault("DropOutGenMaskV3", kind="hang", seconds=0) as drawn_mask,
        emulator.fault("DropOutDoMaskV3", kind="hang", seconds=0) as met,
    ):
        leaf = x.to(compiling).requires_grad_()
        result = torch_npu.dropout_with_byte_mask(leaf, 0.25, True)
        result.sum().backward()
    assert drawn_mask.hits == 1 and met.hits == 2
    assert torch.equal(leaf.grad, result.detach()) and 0.7 < (result != 0).float().mean().item() < 0.8
    torch.testing.assert_close(
        result.detach().cpu()[result.cpu() != 0], torch.tensor(4 / 3).expand(int((result != 0).sum()))
    )


def test_softmax_of_a_sum_with_dropout(compiling):
    import torch_npu

    x, y = seeded(2, 3, 16, 16), seeded(2, 3, 16, 16, seed=1)
    with ExitStack() as stack:
        met = [
            stack.enter_context(emulator.fault(type, kind="hang", seconds=0))
            for type in ("AxpyWithSoftmaxAndDropOutDoMask", "DropoutWithMulsAndSoftmaxGrad")
        ]
        leaves = [tensor.to(compiling).requires_grad_() for tensor in (x, y)]
        mask, soft, dropped = torch_npu.npu_dropout_with_add_softmax(*leaves, 0.5, 0.25, -1)
        dropped.square().sum().backward()
    assert all(fault.hits for fault in met)
    kept = mask.cpu().reshape(x.shape).bool()
    wanted = [tensor.clone().requires_grad_() for tensor in (x, y)]
    expected = torch.softmax(0.5 * wanted[0] + wanted[1], -1)
    through_mask = torch.where(kept, expected / 0.75, 0.0)
    through_mask.square().sum().backward()
    for actual, right in [(soft, expected), (dropped, through_mask), (leaves[0].grad, wanted[0].grad)]:
        torch.testing.assert_close(actual.detach().cpu(), right.detach())


def test_a_random_choice_of_marked_places(compiling):
    import torch_npu

    marked = torch.tensor([[True, False, True], [False, True, True]])
    places, present = (tensor.cpu() for tensor in torch_npu.npu_random_choice_with_mask(marked.to(compiling), 6))
    assert present.tolist() == [True] * 4 + [False] * 2
    assert sorted(places[:4].tolist()) == marked.nonzero().tolist() and not places[4:].any()


def test_no_overflow_is_flagged(compiling):
    import torch_npu

    status = torch_npu.npu_alloc_float_status(torch.zeros(8, device=compiling))
    for mode in (0, 1):
        torch_npu.npu_get_float_status(status, mode)
        torch_npu.npu_clear_float_status(status, mode)
    assert not status.cpu().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("chance", "biased"), [(0.0, True), (0.25, True), (0.5, False)])
def test_multi_head_attention(compiling, chance, biased, dtype):
    import torch_npu

    batch, heads, width, source, target = 2, 16, 16, 32, 16
    bits = seeded(batch, heads, target, source) > 0
    mask = (bits.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)
    exact = dtype == torch.float32
    size = 1 if exact else 0.1  # each step is rounded, and the rounding of alike rows adds up in the gradient of a bias
    counts = (target, source, source)
    rows = [
        (seeded(batch * count, heads * width, seed=count + at) * size).to(dtype).requires_grad_()
        for at, count in enumerate(counts)
    ]
    weights = [
        seeded(heads * width, heads * width, seed=seed).mul(0.05).to(dtype).requires_grad_() for seed in range(4)
    ]
    biases = [
        (seeded(heads * width, seed=seed) * size).to(dtype).requires_grad_(exact) if biased else None
        for seed in range(4)
    ]

    def attention(query, key, value, *others):
        weights, biases, seen = others[:4], others[4:8], others[8]
        if query.device.type == "npu":
            return torch_npu.npu_multi_head_attention(
                query,
                key,
                value,
                *weights[:3],
                seen,
                weights[3],
                *biases,
                mask.to(compiling) if chance else None,
                heads,
                width,
                source,
                target,
                chance,
                True,
            )[0]
        q, k, v = (
            F.linear(*item).reshape(batch, -1, heads, width).transpose(1, 2)
            for item in zip((query, key, value), weights, biases)
        )
        soft = torch.softmax(q @ k.mT / width**0.5 + seen, -1)
        soft = torch.where(bits, soft / (1 - chance), 0.0) if chance else soft
        return F.linear((soft @ v).transpose(1, 2).reshape(-1, heads * width), weights[3], biases[3])

    seen = seeded(batch, heads, target, source, seed=5, dtype=dtype)
    if biased:
        reached(
            "MultiHeadAttention MultiHeadAttentionGrad",
            compiling,
            attention,
            *rows,
            *weights,
            *biases,
            seen,
            rtol=1e-4,
            atol=1e-4,
        )
    else:  # torch_npu has no gradient without biases
        reached(
            "MultiHeadAttention",
            compiling,
            attention,
            *rows,
            *weights,
            *biases,
            seen,
            rtol=1e-4,
            atol=1e-4,
            backward=False,
        )
