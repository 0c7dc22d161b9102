"""Activations and their gradients."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.common import alike
from harness.emulator.table import operator

aten = torch.ops.aten
GELU = {0: "none", 1: "tanh"}


def _rrelu_slopes(self, lower, upper, seed, offset):
    # a stream of its own: an NPU's is not public
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + offset) & (2**63 - 1))
    return torch.empty(self.shape, dtype=alike(self)[0].dtype).uniform_(lower, upper, generator=generator)


def _log_sigmoid_backward(grad, self, buffer):
    return grad * torch.sigmoid(-self)  # the NPU keeps nothing in the buffer


def _prelu(self, weight):
    return torch.where(self > 0, self, self * _by_channel(weight, self))


def _by_channel(weight, self):
    return weight.reshape(()) if weight.numel() == 1 else weight.reshape([1, -1, *[1] * (self.dim() - 2)])


def _hardswish_backward_v2(grad, self):
    # at -3 and 3 the gradient is the outer one
    return torch.where(self <= -3, 0.0, torch.where(self < 3, grad * (self / 3 + 0.5), grad))


def _swiglu_backward(grad, self, dim):
    gate, value = self.chunk(2, dim)
    return torch.cat([aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim)


def _gelu_mul(self, approximate):
    left, right = self.chunk(2, -1)
    return F.gelu(left, approximate=approximate) * right


WITH_INPLACE = {  # name: (inputs, meaning)
    "AddRelu": ("self other alpha:scalar", lambda self, other, alpha: torch.add(self, other, alpha=alpha).clamp_min(0)),
    "Celu": ("self alpha:scalar", F.celu),
    "Elu": ("self alpha:scalar scale:scalar input_scale:scalar", aten.elu),
    "Erfinv": ("self", torch.erfinv),
    "Hardtanh": ("self min:scalar max:scalar", aten.hardtanh),
    "LeakyRelu": ("self slope:scalar", aten.leaky_relu),
    "Threshold": ("self threshold:scalar value:scalar", aten.threshold),
}
ONE_OUTPUT = {
    "EluBackward": (
        "grad alpha:scalar scale:scalar input_scale:scalar is_result:bool self",
        lambda grad, alpha, scale, input_scale, is_result, self: aten.elu_backward(
            grad, alpha, scale, input_scale, is_result, self
        ),
    ),
    "FastGelu": ("self", lambda self: self * torch.sigmoid(1.702 * self)),
    "FastGeluBackward": (
        "grad self",
        lambda grad, self: aten.silu_backward(grad, 1.702 * self),
    ),  # x·σ(ax) is silu(ax)/a
    "GeluBackward": ("grad self", lambda grad, self: aten.gelu_backward(grad, self, approximate="tanh")),
    "GeluBackwardV2": (
        "grad self approximate:str",
        lambda grad, self, approximate: aten.gelu_backward(grad, self, approximate=approximate),
    ),
    "GeluMul": ("self approximate:str", _gelu_mul),
    "Glu": ("self dim:int", aten.glu),
    "GluBackward": ("grad self dim:int", aten.glu_backward),
    "Hardshrink": ("self lambd:scalar", aten.hardshrink),
    "HardshrinkBackward": ("grad self lambd:scalar", aten.hardshrink_backward),
    "HardsigmoidBackward": ("grad self", aten.hardsigmoid_backward),
    "HardswishBackward": ("grad self", aten.hardswish_backward),
    "HardswishBackwardV2": ("grad self", _hardswish_backward_v2),
    "HardtanhBackward": ("grad self min:scalar max:scalar", aten.hardtanh_backward),
    "LeakyReluBackward": ("grad self slope:scalar is_result:bool", aten.leaky_relu_backward),
    "LogSigmoidBackward": ("grad self buffer", _log_sigmoid_backward),
    "Logit": ("self eps:double", lambda self, eps: aten.logit(self, None if eps < 0 else eps)),
    "LogitGrad": (
        "self grad eps:double",
        lambda self, grad, eps: aten.logit_backward(grad, self, None if eps < 0 else eps),
    ),
    "LogSoftmaxBackward": (
        "grad result dim:int",
        lambda grad, result, dim: aten._log_softmax_backward_data(grad, result, dim, grad.dtype),
    ),
    "MishBackward": ("grad self", aten.mish_backward),
    "Prelu": ("self weight", _prelu),
    "SigmoidBackward": ("grad result", aten.sigmoid_backward),
    "SiluBackward": ("grad self", aten.silu_backward),
    "SoftmaxBackward": (
        "grad result dim:int",
        lambda grad, result, dim: aten._softmax_backward_data(grad, result, dim, grad.dtype),
    ),
    "Softplus": ("self beta:scalar threshold:scalar", aten.softplus),
    "SoftplusBackward": ("grad self beta:scalar threshold:scalar", aten.softplus_backward),
    "Softshrink": ("self lambd:scalar", aten.softshrink),
    "SoftshrinkBackward": ("grad self lambd:scalar", aten.softshrink_backward),
    "SwiGlu": ("self dim:int", lambda self, dim: F.silu(self.chunk(2, dim)[0]) * self.chunk(2, dim)[1]),
    "SwiGluGrad": ("grad self dim:int", _swiglu_backward),
    "TanhBackward": ("grad result", aten.tanh_backward),
    "ThresholdBackward": ("grad self threshold:scalar", aten.threshold_backward),
}


def _wide(meaning):
    def compute(*inputs, out):
        return meaning(*alike(*inputs)).to(out.dtype)

    return compute


for _name, (_inputs, _meaning) in WITH_INPLACE.items():
    operator(f"aclnn{_name}", f"{_inputs} >out")(_wide(_meaning))
    operator(f"aclnnInplace{_name}", _inputs.replace("self", "self!", 1))(_wide(_meaning))
for _name, (_inputs, _meaning) in ONE_OUTPUT.items():
    operator(f"aclnn{_name}", f"{_inputs} >out")(_wide(_meaning))


@operator("aclnnSilu", "self >out")
def silu(self):
    return numerics.silu(self)


@operator("aclnnGelu", "self >out")
def _gelu(self):
    return numerics.gelu(self)


@operator("aclnnGeluV2", "self approximate:int >out")
def gelu_v2(self, approximate):
    return numerics.gelu(self, GELU[approximate])


@operator("aclnnLogSigmoidForward", "self >out >buffer")
def log_sigmoid(self, out):
    return F.logsigmoid(*alike(self)).to(out[0].dtype), torch.zeros(out[1].shape, dtype=out[1].dtype)


@operator("aclnnPreluBackward", "grad self weight >grad_self >grad_weight")
def prelu_backward(grad, self, weight, out):
    grad, self, weight = alike(grad, self, weight)
    below = torch.where(self > 0, 0.0, grad * self)
    channels = weight.numel()
    summed = below.sum() if channels == 1 else below.transpose(0, 1).reshape(channels, -1).sum(1)
    grad_self = torch.where(self > 0, grad, grad * _by_channel(weight, self))
    return grad_self.to(out[0].dtype), summed.reshape(out[1].shape).to(out[1].dtype)


def _rrelu(self, noise, lower, upper, training, seed, offset):
    if not training:
        return F.leaky_relu(*alike(self), (lower + upper) / 2).to(self.dtype), noise
    slopes = torch.where(self > 0, 1.0, _rrelu_slopes(self, lower, upper, seed, offset))
    return (self * slopes).to(self.dtype), slopes.to(noise.dtype)


@operator("aclnnRReluWithNoise", "self noise! lower:scalar upper:scalar training:bool seed:int offset:int >out")
def rrelu(self, noise, lower, upper, training, seed, offset):
    result, noise = _rrelu(self, noise, lower, upper, training, seed, offset)
    return noise, result


operator("aclnnInplaceRReluWithNoise", "self! noise! lower:scalar upper:scalar training:bool seed:int offset:int")(
    _rrelu
)


@operator("aclnnGeGluV3", "self dim:int approximate:int activate_left:bool >out >gelu")
def geglu(self, dim, approximate, activate_left, out):
    left, right = alike(self)[0].chunk(2, dim)
    active, value = (left, right) if activate_left else (right, left)
    active = F.gelu(active, approximate=GELU[approximate])
    return (active * value).to(self.dtype), active.to(self.dtype)


@operator("aclnnGeGluV3Backward", "grad self gelu dim:int approximate:int activate_left:bool >out")
def geglu_backward(grad, self, gelu, dim, approximate, activate_left, out):
    grad, self, gelu = alike(grad, self, gelu)
    left, right = self.chunk(2, dim)
    active, value = (left, right) if activate_left else (right, left)
    halves = [aten.gelu_backward(grad * value, active, approximate=GELU[approximate]), grad * gelu]
    return torch.cat(halves if activate_left else halves[::-1], dim).to(out.dtype)


@operator("aclnnClippedSwiglu", "self group_index dim:int alpha:double limit:double bias:double interleaved:bool >out")
def clipped_swiglu(self, group_index, dim, alpha, limit, bias, interleaved, out):
    dim = dim % self.dim()
    rows = alike(self)[0].reshape(
        self.shape[:dim].numel(), -1
    )  # split over everything from dim on, as if it were one axis
    gate, value = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, -1)
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    result = gate * torch.sigmoid(alpha * gate) * (value + bias)
    if group_index is not None:
        result[int(group_index.sum()) :] = 0.0  # rows of no group
    return result.reshape(out.shape).to(out.dtype)
