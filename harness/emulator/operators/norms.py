"""Normalizations and softmax."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.common import tall
from harness.emulator.table import operator


@operator("aclnnRmsNorm", "self gamma eps:double >y >rstd")
def rms_norm(self, gamma, eps, out):
    y, rstd = numerics.rms_norm(self, gamma, eps)
    return y, rstd.reshape(out[1].shape).to(out[1].dtype)


@operator("aclnnLayerNorm", "self shape:ints weight bias eps:double >y >mean >rstd")
def layer_norm(self, shape, weight, bias, eps, out):
    axes = tuple(range(-len(shape), 0))
    x = tall(self)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = 1.0 / torch.sqrt(centred.square().mean(axes, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * tall(weight)
    y = y if bias is None else y + tall(bias)
    stored = [None if spec is None else part.reshape(spec.shape).to(spec.dtype) for part, spec in zip((mean, rstd), out[1:])]
    return y.to(self.dtype), *stored


@operator("aclnnSoftmax", "self dim:int >out")
def softmax(self, dim, out):
    return F.softmax(tall(self), dim).to(out.dtype)


@operator("aclnnLogSoftmax", "self dim:int >out")
def log_softmax(self, dim, out):
    return F.log_softmax(tall(self), dim).to(out.dtype)
