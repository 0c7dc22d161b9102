"""Types of CANN's older path of which networks consist: products, convolutions, norms, losses, optimizers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.aclop import of_convolutions, of_products
from harness.emulator.operators.chance import masked
from harness.emulator.operators.common import all_but_channels, upcast
from harness.emulator.table import aclop

# -------- products, convolutions


@aclop("MatMul MatMulV2")
def matmul(x, y, bias=None, offset=None, *, out, transpose_x1=False, transpose_x2=False, offset_x=0):
    left, right = (tensor.t() if turned else tensor for tensor, turned in ((x, transpose_x1), (y, transpose_x2)))
    return numerics.matmul(left, right, bias=bias, operands=of_products(left, right), out=out.dtype).reshape(out.shape)


@aclop("BatchMatMul")
def batch_matmul(x, y, third=None, *, out, adj_x1=False, adj_x2=False, bias=0):
    left, right = (item.mT if turned else item for item, turned in ((x, adj_x1), (y, adj_x2)))
    return numerics.matmul(left, right, bias=third, operands=of_products(left, right), out=out.dtype)


def _spatial(values, data_format):
    """Strides or dilations of the spatial axes, out of one number for each axis."""
    return list(values[1:-1] if str(data_format).endswith("C") else values[2:])  # a caller passes its text as a bool


def _before(pads):
    """The padding before each spatial axis; pads are (before, after) for each."""
    return [pads[at] for at in range(0, len(pads), 2)]


def _geometry(strides, padding, dilations, groups, data_format, output_padding=None):
    """What `numerics.convolution` takes besides its tensors; transposed with an `output_padding`."""
    return dict(
        stride=_spatial(strides, data_format),
        padding=padding,
        dilation=_spatial(dilations, data_format),
        transposed=output_padding is not None,
        output_padding=[0] * len(padding) if output_padding is None else output_padding,
        groups=groups,
    )


def _padding(x, pads):
    """An input and the symmetric padding that is left to do: pads are (before, after) for each spatial axis."""
    pairs = [(pads[at], pads[at + 1]) for at in range(0, len(pads), 2)]
    if all(before == after for before, after in pairs):
        return x, [before for before, _ in pairs]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair]), [0] * len(pairs)


@aclop("Conv2D Conv3D")
def convolution(
    x, filter, bias=None, offset=None, *, strides, pads, dilations, groups=1, data_format="NCHW", offset_x=0
):
    x, padding = _padding(x, pads)
    geometry = _geometry(strides, padding, dilations, groups, data_format)
    return numerics.convolution(x, filter, bias, operands=of_convolutions(x, filter), **geometry)


@aclop("Conv2DTranspose Conv3DTranspose")
def convolution_transpose(
    size,
    x,
    filter,
    bias=None,
    offset=None,
    *,
    out,
    strides,
    pads,
    dilations,
    groups=1,
    data_format="NCHW",
    output_padding=(),
    offset_x=0,
):
    stride, dilation, padding = (
        _spatial(strides, data_format),
        _spatial(dilations, data_format),
        _before(pads),
    )
    lacking = [
        wanted - ((size - 1) * step - 2 * pad + spread * (kernel - 1) + 1)
        for wanted, size, step, pad, spread, kernel in zip(
            out.shape[2:], x.shape[2:], stride, padding, dilation, filter.shape[2:]
        )
    ]
    geometry = _geometry(strides, padding, dilations, groups, data_format, lacking)
    return numerics.convolution(x, filter, bias, operands=of_convolutions(x, filter), **geometry)


def _backward(grad, x, filter, wanted, strides, pads, dilations, groups, data_format):
    geometry = _geometry(strides, _before(pads), dilations, groups, data_format)
    operands = of_convolutions(grad, x, filter)
    return numerics.convolution_backward(grad, x, filter, wanted=wanted, operands=operands, **geometry)


@aclop("Conv2DBackpropInput Conv3DBackpropInput")
def convolution_input(size, filter, grad, out, *, strides, pads, dilations, groups=1, data_format="NCHW"):
    x = torch.zeros(out.shape, dtype=grad.dtype)
    return _backward(grad, x, filter, (True, False, False), strides, pads, dilations, groups, data_format)[0].to(
        out.dtype
    )


@aclop("Conv2DBackpropFilter Conv3DBackpropFilter")
def convolution_filter(x, size, grad, out, *, strides, pads, dilations, groups=1, data_format="NCHW"):
    filter = torch.zeros(out.shape, dtype=torch.float32)
    return _backward(grad, x, filter, (False, True, False), strides, pads, dilations, groups, data_format)[1].to(
        out.dtype
    )


# -------- norms, losses


def _channels(value, x):
    """One number for each channel against x of (N, C, …)."""
    return value.float().reshape(1, -1, *(1,) * (x.dim() - 2))


def _normalized(x, mean, variance, epsilon):
    """x of (N, C, …) less its channel's mean, over the root of its channel's variance."""
    return (x.float() - _channels(mean, x)) * (_channels(variance, x) + epsilon).rsqrt()


@aclop("BNTrainingReduce BN3DTrainingReduce")
def batch_norm_sums(x, out, epsilon=1e-4):
    wide = x.float()
    return [
        found.reshape(spec.shape)
        for found, spec in zip((wide.sum(all_but_channels(x)), (wide * wide).sum(all_but_channels(x))), out)
    ]


@aclop("BNTrainingUpdate BN3DTrainingUpdate")
def batch_norm_update(x, total, squares, scale, offset, mean, variance, out, factor, epsilon, isRef=True):
    batch = numerics.batch_moments(total, squares, x.numel() // x.shape[1])
    y = _normalized(x, batch.mean, batch.variance, epsilon) * _channels(scale, x) + _channels(offset, x)
    results = (
        y,
        mean * (1 - factor) + batch.mean * factor,
        variance * (1 - factor) + batch.unbiased * factor,
        batch.mean,
        batch.variance,
    )
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip(results, out)]


@aclop("BNInfer")
def batch_norm_infer(x, scale, offset, mean, variance, out, epsilon=1e-4):
    normal = _normalized(x, mean, variance, epsilon)
    return (normal * _channels(scale, x) + _channels(offset, x)).to(out.dtype)


@aclop("BNTrainingUpdateGrad BN3DTrainingUpdateGrad")
def batch_norm_update_grad(grad, x, mean, variance, out, epsilon=1e-4):
    normal = _normalized(x, mean, variance, epsilon)
    results = ((grad.float() * normal).sum(all_but_channels(x)), grad.float().sum(all_but_channels(x)))
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip(results, out)]


@aclop("BNTrainingReduceGrad BN3DTrainingReduceGrad")
def batch_norm_reduce_grad(grad, x, diff_scale, diff_offset, scale, mean, variance, out, epsilon=1e-4):
    count, inverse = x.numel() // x.shape[1], (_channels(variance, x) + epsilon).rsqrt()
    normal = (x.float() - _channels(mean, x)) * inverse
    centred = grad.float() - (_channels(diff_offset, x) + normal * _channels(diff_scale, x)) / count
    return (_channels(scale, x) * inverse * centred).to(out.dtype)


@aclop("BNInferGrad")
def batch_norm_infer_grad(grad, scale, variance, out, epsilon=1e-4):
    return (grad.float() * _channels(scale, grad) * (_channels(variance, grad) + epsilon).rsqrt()).to(out.dtype)


@aclop("LayerNorm")
def layer_norm(x, weight, bias, out, begin_norm_axis=0, begin_params_axis=0, epsilon=1e-5):
    axes, wide = list(range(begin_norm_axis, x.dim())), upcast(x)
    mean, variance = wide.mean(axes, keepdim=True), wide.var(axes, correction=0, keepdim=True)
    y = (wide - mean) * (variance + epsilon).rsqrt() * upcast(weight) + upcast(bias)
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip((y, mean, variance), out)]


@aclop("RmsNorm")
def rms_norm(x, gamma, out, epsilon=1e-6):
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    scale = (x.float().square().mean(axes, keepdim=True) + epsilon).rsqrt()
    return (x.float() * scale * gamma.float()).to(out[0].dtype), scale.reshape(out[1].shape)


@aclop("LayerNormGrad")
def layer_norm_grad(grad, x, variance, mean, gamma, out):
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    inverse = (variance.float() + 1e-5).rsqrt()  # the call does not say its epsilon
    normal, scaled = (upcast(x) - mean.float()) * inverse, upcast(grad) * upcast(gamma)
    dx = inverse * (scaled - scaled.mean(axes, keepdim=True) - normal * (scaled * normal).mean(axes, keepdim=True))
    before = list(range(x.dim() - gamma.dim()))
    return [
        found.reshape(spec.shape).to(spec.dtype)
        for found, spec in zip((dx, (upcast(grad) * normal).sum(before), upcast(grad).sum(before)), out)
    ]


@aclop("RmsNormGrad")
def rms_norm_grad(grad, x, rstd, gamma, out):
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    inverse = rstd.float().reshape(*x.shape[: axes[0]], *(1,) * gamma.dim())
    normal, scaled = upcast(x) * inverse, upcast(grad) * upcast(gamma)
    dx = inverse * (scaled - normal * (scaled * normal).mean(axes, keepdim=True))
    return dx.to(out[0].dtype), (upcast(grad) * normal).sum(list(range(axes[0]))).reshape(out[1].shape).to(out[1].dtype)


@aclop("GroupNormSwish")
def group_norm(x, gamma, beta, out, num_groups, eps=1e-5, activate_swish=False):
    y, mean, rstd = torch.native_group_norm(
        upcast(x), upcast(gamma), upcast(beta), x.shape[0], x.shape[1], x[0, 0].numel(), num_groups, eps
    )
    y = F.silu(y) if activate_swish else y
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip((y, mean, rstd), out)]


@aclop("PRelu")
def prelu(x, weight):
    return F.prelu(upcast(x), upcast(weight).reshape(-1)).to(x.dtype)


@aclop("PReluGrad")
def prelu_grad(grad, x, weight, out):
    negative = torch.where(x > 0, torch.zeros(()), upcast(grad) * upcast(x))
    dx = torch.where(
        x > 0,
        upcast(grad),
        upcast(grad) * (upcast(weight).reshape(()) if weight.numel() == 1 else _channels(weight, x)),
    )
    dweight = negative.sum() if weight.numel() == 1 else negative.sum(all_but_channels(x))
    return dx.to(out[0].dtype), dweight.reshape(out[1].shape).to(out[1].dtype)


@aclop("AdaptiveAvgPool2dGrad")
def adaptive_average_grad(grad, out, orig_input_shape):
    return torch.ops.aten._adaptive_avg_pool2d_backward(upcast(grad), torch.zeros(orig_input_shape)).to(out.dtype)


@aclop("UpsampleNearest3dGrad")
def nearest_3d_grad(grad, out, input_size, output_size):
    return torch.ops.aten.upsample_nearest3d_backward(upcast(grad), output_size, input_size).to(out.dtype)


def _average(attributes):
    """torch's settings of an average over windows: its own kind of padding, and whether the padding counts."""
    (before, _, left, _), axes = attributes["pads"], slice(2, 4) if attributes["data_format"] == "NCHW" else slice(1, 3)
    return dict(
        kernel_size=attributes["ksize"][axes],
        stride=attributes["strides"][axes],
        padding=(before, left),
        ceil_mode=attributes["ceil_mode"],
        count_include_pad=not attributes["exclusive"],
    )


@aclop("AvgPoolV2")
def average_pool(x, out, **attributes):
    if attributes.get("global_pooling"):
        return upcast(x).mean((2, 3), keepdim=True).to(out.dtype)
    return F.avg_pool2d(upcast(x), **_average(attributes)).to(out.dtype)


@aclop("AvgPoolV2Grad")
def average_pool_grad(size, grad, out, **attributes):
    if attributes.get("global_pooling"):
        return (upcast(grad) / (out.shape[2] * out.shape[3])).expand(out.shape).to(out.dtype)
    settings = _average(attributes)
    return torch.ops.aten.avg_pool2d_backward(upcast(grad), torch.zeros(out.shape), *settings.values(), None).to(
        out.dtype
    )


def _loss(compute):
    def run(x, target, *weights, out, reduction="mean", **attributes):
        result = compute(
            upcast(x), upcast(target), *(upcast(weight) for weight in weights), reduction=reduction, **attributes
        )
        return result.to(out.dtype).reshape(out.shape)

    return run


def _loss_gradient(compute):
    """What goes back through a loss of elements; the gradient of a mean or a sum comes as one number or in the shape of
    x.
    """

    def run(x, target, grad, *weights, out, reduction="mean", **attributes):
        with torch.inference_mode(False), torch.enable_grad():
            wide = upcast(x).clone().requires_grad_()
            weights = [weight if weight is None else upcast(weight).clone() for weight in weights]
            loss = compute(wide, upcast(target).clone(), *weights, reduction="none", **attributes)
            count = {"mean": x.numel(), "batchmean": x.shape[0] if x.dim() else 1}.get(reduction, 1)
            share = upcast(grad).reshape(x.shape if grad.numel() == x.numel() else ()).expand(x.shape) / count
            return torch.autograd.grad(loss, wide, share.clone())[0].to(out.dtype)

    return run


def _smooth_l1(x, target, reduction, sigma=1.0):
    return (
        F.l1_loss(x, target, reduction=reduction)
        if sigma == 0
        else F.smooth_l1_loss(x, target, reduction=reduction, beta=sigma)
    )


_LOSSES = {  # the type, that of its gradient, the meaning
    ("MseLoss", "MseLossGrad"): F.mse_loss,
    ("SmoothL1LossV2", "SmoothL1LossGradV2"): _smooth_l1,
    ("SoftMarginLoss", "SoftMarginLossGrad"): F.soft_margin_loss,
    ("LpLoss", ""): lambda x, target, reduction, p=1: F.l1_loss(x, target, reduction=reduction),
    ("BinaryCrossEntropy", "BinaryCrossEntropyGrad"): lambda x, target, weight=None, reduction="mean": (
        F.binary_cross_entropy(x, target, weight, reduction=reduction)
    ),
    (
        "SigmoidCrossEntropyWithLogitsV2",
        "SigmoidCrossEntropyWithLogitsGradV2",
    ): lambda x, target, weight=None, positive=None, reduction="mean": F.binary_cross_entropy_with_logits(
        x, target, weight, reduction=reduction, pos_weight=positive
    ),
    ("KLDiv", ""): lambda x, target, reduction, log_target=False: F.kl_div(
        x, target, reduction=reduction, log_target=log_target
    ),
}
for (_name, _gradient_name), _compute in _LOSSES.items():
    aclop(_name)(_loss(_compute))
    if _gradient_name:
        aclop(_gradient_name)(_loss_gradient(_compute))

for _name, _compute in {"L1LossGrad": F.l1_loss, "KlDivLossGrad": _LOSSES["KLDiv", ""]}.items():

    def _gradient_first(grad, x, target, out, _run=_loss_gradient(_compute), **attributes):
        return _run(x, target, grad, out=out, **attributes)

    aclop(_name)(_gradient_first)


@aclop("SoftmaxCrossEntropyWithLogits")
def softmax_cross_entropy(x, labels, out):
    wide = upcast(x)
    loss = -(upcast(labels) * F.log_softmax(wide, -1)).sum(-1)
    return [
        found.reshape(spec.shape).to(spec.dtype)
        for found, spec in zip((loss, F.softmax(wide, -1) - upcast(labels)), out)
    ]


@aclop("NLLLoss")
def nll_loss(x, target, weight, out, reduction="mean", ignore_index=-100):
    result, total = torch.ops.aten.nll_loss_forward(
        upcast(x), target.long(), upcast(weight), _REDUCTIONS[reduction], ignore_index
    )
    return result.reshape(out[0].shape).to(out[0].dtype), total.reshape(out[1].shape).to(out[1].dtype)


@aclop("NLLLossGrad")
def nll_loss_grad(x, grad, target, weight, total, out, reduction="mean", ignore_index=-100):
    settings = (_REDUCTIONS[reduction], ignore_index)
    grad = upcast(grad) if reduction == "none" else upcast(grad).reshape(())
    return torch.ops.aten.nll_loss_backward(
        grad, upcast(x), target.long(), upcast(weight), *settings, upcast(total).reshape(())
    ).to(out.dtype)


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


# -------- attention


def _apart(rows, heads, length, width):
    """Rows that hold all heads side by side as (batch, head, row, width), for sequences of one length."""
    return rows.reshape(-1, length, heads, width).transpose(1, 2)


def _side_by_side(parts):
    return parts.transpose(1, 2).flatten(0, 1).flatten(1)


@aclop("MultiHeadAttention")
def multi_head_attention(
    query,
    key,
    value,
    query_weight,
    key_weight,
    value_weight,
    attn_mask,
    out_weight,
    *others,
    out,
    attn_head_num,
    attn_dim_per_head,
    src_len,
    tgt_len,
    keep_prob,
    softmax_use_float,
):
    """Of the optional inputs those that are there, the biases and the bits of dropout; every step is rounded to the
    dtype.
    """
    biases = [other for other in others if other.dtype != torch.uint8]
    bits = [other for other in others if other.dtype == torch.uint8]
    if len(biases) not in (0, 4):
        raise NotImplementedError("attention with some of its biases: nothing says which they are")
    if keep_prob < 1 and not bits:
        raise NotImplementedError("attention that draws its own mask of dropout")
    dtype = query.dtype
    mask = bits[0] if bits else torch.full(out[1].shape, 255, dtype=torch.uint8)

    def product(left, right, bias=None):
        return numerics.matmul(left, right, bias=bias, operands=of_products(left, right), out=dtype)

    query_bias, key_bias, value_bias, out_bias = biases or [None] * 4
    q = (upcast(product(query, query_weight.t(), query_bias)) * attn_dim_per_head**-0.5).to(dtype)
    q = _apart(q, attn_head_num, tgt_len, attn_dim_per_head)
    k = _apart(product(key, key_weight.t(), key_bias), attn_head_num, src_len, attn_dim_per_head)
    v = _apart(product(value, value_weight.t(), value_bias), attn_head_num, src_len, attn_dim_per_head)
    soft = F.softmax(upcast((upcast(product(q, k.mT)) + upcast(attn_mask)).to(dtype)), -1)
    dropped = soft.to(dtype)
    if keep_prob < 1:
        dropped = masked(dropped, mask, 1 / keep_prob if keep_prob else 0.0, dtype)
    context = _side_by_side(product(dropped, v))
    return (
        product(context, out_weight.t(), out_bias),
        mask.reshape(out[1].shape),
        q,
        k,
        v,
        soft.to(out[5].dtype),
        dropped,
        context,
    )


@aclop("MultiHeadAttentionGrad")
def multi_head_attention_grad(
    query,
    key,
    value,
    query_weight,
    key_weight,
    value_weight,
    out_weight,
    q,
    k,
    v,
    soft,
    dropped,
    context,
    grad,
    mask=None,
    *,
    out,
    attn_head_num,
    attn_dim_per_head,
    src_len,
    tgt_len,
    keep_prob,
    softmax_use_float,
    bias_grad_mask,
):
    dtype = query.dtype

    def product(left, right):
        return numerics.matmul(left, right, operands=of_products(left, right), out=dtype)

    through = _apart(product(grad, out_weight), attn_head_num, tgt_len, attn_dim_per_head)
    to_soft = product(through, v.mT)
    if mask is not None:
        to_soft = masked(to_soft, mask, 1 / keep_prob if keep_prob else 0.0, dtype)
    wide = upcast(soft)
    to_scores = ((upcast(to_soft) - (upcast(to_soft) * wide).sum(-1, keepdim=True)) * wide).to(dtype)
    to_q = (upcast(_side_by_side(product(to_scores, k))) * attn_dim_per_head**-0.5).to(dtype)
    to_k = _side_by_side(product(to_scores.mT, q))
    to_v = _side_by_side(product(dropped.mT, through))
    projected = [(to_q, query, query_weight), (to_k, key, key_weight), (to_v, value, value_weight)]
    weights = [product(to.t(), rows) for to, rows, _ in projected] + [product(grad.t(), context)]
    biases = [upcast(to).sum(0, keepdim=True).to(dtype) for to in (to_q, to_k, to_v, grad)]
    return *weights, *[product(to, weight) for to, _, weight in projected], *biases


# -------- optimizers


def _scalars(*values):
    return [value.reshape(()).float() for value in values]


@aclop("ApplyAdamD")
def adam(
    variable, m, v, beta1_power, beta2_power, rate, beta1, beta2, epsilon, grad, use_locking=False, use_nesterov=False
):
    beta1_power, beta2_power, rate, beta1, beta2, epsilon = _scalars(
        beta1_power, beta2_power, rate, beta1, beta2, epsilon
    )
    g = grad.float()
    m_new, v_new = beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * g * g
    step = rate * (1 - beta2_power).sqrt() / (1 - beta1_power)
    towards = beta1 * m_new + (1 - beta1) * g if use_nesterov else m_new
    return (
        (variable.float() - step * towards / (v_new.sqrt() + epsilon)).to(variable.dtype),
        m_new.to(m.dtype),
        v_new.to(v.dtype),
    )


@aclop("ApplyAdamW")
def adam_w(
    variable,
    m,
    v,
    beta1_power,
    beta2_power,
    rate,
    decay,
    beta1,
    beta2,
    epsilon,
    grad,
    most=None,
    amsgrad=False,
    maximize=False,
):
    beta1_power, beta2_power, rate, decay, beta1, beta2, epsilon = _scalars(
        beta1_power, beta2_power, rate, decay, beta1, beta2, epsilon
    )
    g = -grad.float() if maximize else grad.float()
    m_new, v_new = m.float() * beta1 + (1 - beta1) * g, v.float() * beta2 + (1 - beta2) * g * g
    spread = torch.maximum(most.float(), v_new) if amsgrad and most is not None else v_new
    below = (spread / (1 - beta2_power * beta2)).sqrt() + epsilon
    result = variable.float() * (1 - rate * decay) - rate * m_new / (1 - beta1_power * beta1) / below
    return result.to(variable.dtype), m_new.to(m.dtype), v_new.to(v.dtype)


@aclop("ApplyAdamV2")
def bert_adam(
    variable, m, v, rate, beta1, beta2, epsilon, grad, max_norm, norm, decay, step_size=None, adam_mode="adam"
):
    rate, beta1, beta2, epsilon, max_norm, norm, decay = _scalars(rate, beta1, beta2, epsilon, max_norm, norm, decay)
    g = grad.float()
    if max_norm > 0 and norm > max_norm:
        g = g / (norm / max_norm)
    m_new, v_new = m.float() * beta1 + (1 - beta1) * g, v.float() * beta2 + (1 - beta2) * g * g
    step = m_new / (v_new.sqrt() + epsilon) + decay * variable.float()
    result = (
        variable.float() - (rate if adam_mode == "adam" or step_size is None else step_size.reshape(()).float()) * step
    )
    return result.to(variable.dtype), m_new.to(m.dtype), v_new.to(v.dtype)
