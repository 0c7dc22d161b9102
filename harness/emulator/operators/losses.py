"""Losses and their gradients."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from harness.emulator.operators.common import alike
from harness.emulator.operators.products import wide_product
from harness.emulator.table import operator

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
HIDDEN = -10000.0  # a hidden score, so a row that is hidden whole is uniform; stated: scaled_masked_softmax_v2.h


def _reduced(loss, reduction):
    if reduction == MEAN:
        return loss.mean()
    return loss.sum() if reduction == SUM else loss


def _shared(grad, reduction, count):
    """The gradient of one element's loss, of `count`."""
    return grad / max(count, 1) if reduction == MEAN else grad


def _times(value, weight):
    return value if weight is None else value * weight


def _cross_entropy(self, target, weight, reduction):
    logs = [
        torch.log(self).clamp_min(-100),
        torch.log1p(-self).clamp_min(-100),
    ]  # torch's own refuses what is outside 0 … 1
    return _reduced(_times((target - 1) * logs[1] - target * logs[0], weight), reduction)


def _cross_entropy_with_logits_backward(grad, self, target, weight, pos_weight, reduction):
    positive = _times(target, pos_weight)
    slope = (positive + 1 - target) * torch.sigmoid(self) - positive
    return _times(_shared(grad, reduction, self.numel()) * slope, weight)


def _l1_backward(grad, self, target, reduction):
    sign = torch.sign(self - target)
    return _shared(grad, reduction, sign.numel()) * sign


def _smooth_l1_backward(grad, self, target, reduction, beta):
    if beta == 0:
        return _l1_backward(grad, self, target, reduction)
    return aten.smooth_l1_loss_backward(grad, self, target, reduction, beta)


def _kl_div_backward(grad, self, target, reduction, log_target):
    slope = -target.exp() if log_target else -target.clamp_min(0)
    return _shared(grad, reduction, torch.broadcast_shapes(self.shape, target.shape).numel()) * slope


def _kl_div_target_backward(grad, self, target, reduction, log_target):
    slope = (target + 1 - self) * target.exp() if log_target else torch.where(target == 0, 0.0, target.log() + 1 - self)
    return _shared(grad, reduction, slope.numel()) * slope


def _softmax_with_bias(self, mask, bias, scale, precision):
    scores = (self * scale).reshape(-1, *self.shape[-3:])  # (B·W, N, S1, S2)
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])  # (W, 1, S1, S2)
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask).flatten(0, 1)
    return F.softmax(scores + bias.reshape(-1, *bias.shape[-2:]), -1).reshape(self.shape)


ONE_OUTPUT = {  # name: (inputs, meaning)
    "BinaryCrossEntropy": ("self target weight reduction:int", _cross_entropy),
    "BinaryCrossEntropyBackward": ("grad self target weight reduction:int", aten.binary_cross_entropy_backward),
    "BinaryCrossEntropyWithLogits": (
        "self target weight pos_weight reduction:int",
        aten.binary_cross_entropy_with_logits,
    ),
    "BinaryCrossEntropyWithLogitsBackward": (
        "grad self target weight pos_weight reduction:int",
        _cross_entropy_with_logits_backward,
    ),
    "KlDiv": (
        "self target reduction:int log_target:bool",
        lambda self, target, reduction, log: aten.kl_div(self, target, reduction, log_target=log),
    ),
    "KlDivBackward": ("grad self target reduction:int log_target:bool", _kl_div_backward),
    "KlDivTargetBackward": ("grad self target reduction:int log_target:bool", _kl_div_target_backward),
    "L1Loss": ("self target reduction:int", lambda self, target, reduction: _reduced((self - target).abs(), reduction)),
    "L1LossBackward": ("grad self target reduction:int", _l1_backward),
    "MaskedSoftmaxWithRelPosBias": ("self mask bias scale:double precision:int", _softmax_with_bias),
    "MseLoss": (
        "self target reduction:int",
        lambda self, target, reduction: _reduced((self - target).square(), reduction),
    ),
    "MseLossBackward": ("grad self target reduction:int", aten.mse_loss_backward),
    "SmoothL1Loss": ("self target reduction:int beta:float", aten.smooth_l1_loss),
    "SmoothL1LossBackward": ("grad self target reduction:int beta:float", _smooth_l1_backward),
    "SoftMarginLoss": ("self target reduction:int", aten.soft_margin_loss),
    "SoftMarginLossBackward": ("grad self target reduction:int", aten.soft_margin_loss_backward),
}


def _wide(meaning):
    def compute(*inputs, out):
        result = meaning(*alike(*inputs))
        result = (
            result.sum_to_size(out.shape) if result.numel() > out.numel else result.expand(out.shape)
        )  # the operands broadcast
        return result.to(out.dtype)

    return compute


for _name, (_inputs, _meaning) in ONE_OUTPUT.items():
    operator(f"aclnn{_name}", f"{_inputs} >out")(_wide(_meaning))


def _stored(results, out):
    return [result.reshape(spec.shape).to(spec.dtype) for result, spec in zip(results, out)]


def _nll_loss(forward):
    def compute(self, target, weight, reduction, ignore, out):
        self, weight = alike(self, weight)
        return _stored(forward(self, target.long(), weight, reduction, ignore), out)

    return compute


def _nll_loss_backward(backward):
    def compute(grad, self, target, weight, reduction, ignore, total, out):
        grad, self, weight, total = alike(grad, self, weight, total)
        return backward(grad, self, target.long(), weight, reduction, ignore, total).to(out.dtype)

    return compute


NLL_FORWARD = "self target weight reduction:int ignore:int >out >total"
NLL_BACKWARD = "grad self target weight reduction:int ignore:int total >out"
operator("aclnnNLLLoss", NLL_FORWARD)(_nll_loss(aten.nll_loss_forward))
operator("aclnnNLLLossBackward", NLL_BACKWARD)(_nll_loss_backward(aten.nll_loss_backward))
operator("aclnnNLLLoss2d", NLL_FORWARD)(_nll_loss(aten.nll_loss2d_forward))
operator("aclnnNLLLoss2dBackward", NLL_BACKWARD)(_nll_loss_backward(aten.nll_loss2d_backward))


@operator("aclnnMultilabelMarginLoss", "self target reduction:int >out >is_target")
def multilabel_margin_loss(self, target, reduction, out):
    if not self.numel():  # an empty batch
        return [torch.zeros(spec.shape, dtype=spec.dtype) for spec in out]
    return _stored(aten.multilabel_margin_loss_forward(*alike(self), target.long(), reduction), out)


@operator(
    "aclnnCtcLoss", "self targets input_lengths:ints target_lengths:ints blank:int zero_infinity:bool >out >log_alpha"
)
def ctc_loss(self, targets, input_lengths, target_lengths, blank, zero_infinity, out):
    self = alike(self)[0]
    self = self if self.dim() == 3 else self.unsqueeze(1)
    loss, log_alpha = aten._ctc_loss(self, targets.long(), input_lengths, target_lengths, blank, zero_infinity)
    times, states = torch.arange(log_alpha.shape[1])[:, None], torch.arange(log_alpha.shape[2])
    for row, length, labels in zip(log_alpha, input_lengths, target_lengths):
        row.masked_fill_((times >= length) | (states > 2 * labels), -math.inf)  # torch leaves these unwritten
    padding = out[1].shape[-1] - log_alpha.shape[-1]  # the caller aligns the rows
    return _stored((loss, F.pad(log_alpha, (0, padding), value=-math.inf)), out)


@operator(
    "aclnnCtcLossBackward",
    "grad self targets input_lengths:ints target_lengths:ints loss log_alpha blank:int zero_infinity:bool >out",
)
def ctc_loss_backward(grad, self, targets, input_lengths, target_lengths, loss, log_alpha, blank, zero_infinity, out):
    grad, self, loss, log_alpha = alike(grad, self, loss, log_alpha)
    self = self if self.dim() == 3 else self.unsqueeze(1)
    log_alpha = log_alpha[..., : 2 * max(target_lengths) + 1].contiguous()
    lengths = (input_lengths, target_lengths)
    result = aten._ctc_loss_backward(
        grad.reshape(-1), self, targets.long(), *lengths, loss.reshape(-1), log_alpha, blank, zero_infinity
    )
    return result.reshape(out.shape).to(out.dtype)


REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


@operator(
    "aclnnCrossEntropyLoss",
    "self target weight reduction:str ignore:int smoothing:double z_scale:double return_z:bool >loss >log_prob "
    ">z_loss >log_sum",
)
def cross_entropy(self, target, weight, reduction, ignore, smoothing, z_scale, return_z, out):
    _no_z_loss(z_scale or return_z)
    self, weight = alike(self, weight)
    loss = F.cross_entropy(
        self, target.long(), weight, ignore_index=ignore, reduction=reduction, label_smoothing=smoothing
    )
    empty = torch.empty(0)
    return _stored((loss, F.log_softmax(self, -1), empty, empty), out)


@operator(
    "aclnnCrossEntropyLossGrad",
    "grad log_prob target weight grad_z log_sum reduction:str ignore:int smoothing:double z_scale:double >out",
)
def cross_entropy_backward(grad, log_prob, target, weight, grad_z, log_sum, reduction, ignore, smoothing, z_scale, out):
    _no_z_loss(z_scale)
    grad, log_prob, weight = alike(grad, log_prob, weight)
    classes = log_prob.shape[-1]
    weight = torch.ones(classes, dtype=log_prob.dtype) if weight is None else weight
    target = target.long()
    not_ignored = target != ignore
    target = torch.where(not_ignored, target, 0)
    seen = weight[target] * not_ignored
    row = (grad / seen.sum() if reduction == "mean" else grad).expand(target.shape)
    wanted = (
        F.one_hot(target, classes) * ((1 - smoothing) * seen)[:, None]
        + weight * (smoothing / classes) * not_ignored[:, None]
    )
    return ((log_prob.exp() * wanted.sum(-1, keepdim=True) - wanted) * row[:, None]).to(out.dtype)


def _no_z_loss(asked):
    if asked:
        raise ValueError("z-loss is not computed by an NPU either")


def _bits(packed, count):
    return (packed[:, None] >> torch.arange(8) & 1).reshape(-1)[:count].bool()  # the first in the lowest bit


@operator(
    "aclnnFusedLinearOnlineMaxSum",
    "self weight target start:int end:int >top >total >predicted >mask >masked_target >logits",
)
def fused_linear_online_max_sum(self, weight, target, start, end, out):
    logits = wide_product(self, weight.t())
    top = logits.amax(-1)
    shifted = logits - top[:, None]
    elsewhere = (target < start) | (target >= end)  # as the kernel does it; the document includes the end
    local = torch.where(elsewhere, 0, target - start)
    predicted = torch.where(elsewhere, 0.0, shifted.gather(1, local.long()[:, None])[:, 0])
    packed = F.pad(elsewhere, (0, 8 * out[3].numel - len(elsewhere)), value=True).reshape(-1, 8)
    mask = (packed << torch.arange(8)).sum(-1).to(torch.uint8)
    return top, shifted.exp().sum(-1), predicted, mask, local.to(target.dtype), logits.to(self.dtype)


@operator(
    "aclnnFusedCrossEntropyLossWithMaxSum",
    "top total predicted smoothing:float input weight logits >loss >softmax",
)
def fused_cross_entropy(top, total, predicted, smoothing, input, weight, logits):
    _no_smoothing(smoothing)
    softmax = None if logits is None else (logits.float() - top[:, None]).exp() / total[:, None]
    return total.log() - predicted, softmax


@operator(
    "aclnnFusedLinearCrossEntropyLossGrad",
    "grad self weight mask masked_target smoothing:float top total softmax >grad_self >grad_weight",
)
def fused_linear_cross_entropy_backward(grad, self, weight, mask, masked_target, smoothing, top, total, softmax):
    _no_smoothing(smoothing)
    if softmax is None:
        softmax = (wide_product(self, weight.t()) - top[:, None]).exp() / total[:, None]
    here = (~_bits(mask, len(grad))).to(softmax.dtype)
    slope = softmax.scatter_add(1, masked_target.long()[:, None], -here[:, None]) * grad[:, None]
    slope = slope.to(self.dtype)  # the cube takes it in half
    return wide_product(slope, weight).to(self.dtype), wide_product(slope.t(), self).to(self.dtype)


def _no_smoothing(smoothing):
    if smoothing:
        raise ValueError(f"an NPU takes no label smoothing here, and this is {smoothing}")


def _hidden(mask, triangle, like):
    return torch.ones(like.shape[-2:], dtype=torch.bool).triu(1) if triangle else mask.bool()


@operator("aclnnScaledMaskedSoftmax", "self mask scale:double triangle:bool >out")
def scaled_masked_softmax(self, mask, scale, triangle, out):
    scores = (alike(self)[0] * scale).masked_fill(_hidden(mask, triangle, self), HIDDEN)
    return F.softmax(scores, -1).to(out.dtype)


@operator("aclnnScaledMaskedSoftmaxBackward", "grad result mask scale:double triangle:bool >out")
def scaled_masked_softmax_backward(grad, result, mask, scale, triangle, out):
    grad, result = alike(grad, result)
    outcome = aten._softmax_backward_data(grad, result, -1, grad.dtype) * scale
    return outcome.masked_fill(_hidden(mask, triangle, grad), 0.0).to(out.dtype)
