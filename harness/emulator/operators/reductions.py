"""Reductions, sorting, scans."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import axes, tall
from harness.emulator.table import operator


@operator("aclnnMean", "self dims:ints keep:bool dtype:int32 >out")
def mean(self, dims, keep, dtype, out):
    return tall(self).to(torch.promote_types(tall(self).dtype, torch.float32)).mean(axes(dims, self), keep).to(out.dtype)


@operator("aclnnReduceSum", "self dims:ints keep:bool dtype:int32 >out")
def reduce_sum(self, dims, keep, dtype, out):
    return tall(self).sum(axes(dims, self), keep).to(out.dtype)


@operator("aclnnAmax", "self dims:ints keep:bool >out")
def amax(self, dims, keep):
    return self.amax(axes(dims, self), keep)


@operator("aclnnAmin", "self dims:ints keep:bool >out")
def amin(self, dims, keep):
    return self.amin(axes(dims, self), keep)


@operator("aclnnAll", "self dims:ints keep:bool >out")
def all_of(self, dims, keep, out):
    return self.bool().all(axes(dims, self), keep).to(out.dtype) if self.dim() else self.bool().to(out.dtype)


@operator("aclnnAny", "self dims:ints keep:bool >out")
def any_of(self, dims, keep, out):
    return self.bool().any(axes(dims, self), keep).to(out.dtype) if self.dim() else self.bool().to(out.dtype)


@operator("aclnnMax", "self >out")
def largest(self):
    return self.max()


@operator("aclnnMin", "self >out")
def least(self):
    return self.min()


@operator("aclnnMaxDim", "self dim:int keep:bool >values >indices")
def max_dim(self, dim, keep, out):
    values, indices = self.max(dim, keep)
    return values, indices.to(out[1].dtype)


@operator("aclnnMinDim", "self dim:int keep:bool >values >indices")
def min_dim(self, dim, keep, out):
    values, indices = self.min(dim, keep)
    return values, indices.to(out[1].dtype)


@operator("aclnnArgMax", "self dim:int keep:bool >out")
def argmax(self, dim, keep, out):
    return self.argmax(dim, keep).to(out.dtype)


@operator("aclnnArgMin", "self dim:int keep:bool >out")
def argmin(self, dim, keep, out):
    return self.argmin(dim, keep).to(out.dtype)


@operator("aclnnTopk", "self k:int dim:int largest:bool sorted:bool >values >indices")
def topk(self, k, dim, largest, sorted, out):
    values, indices = self.topk(k, dim, largest, sorted)
    return values, indices.to(out[1].dtype)


@operator("aclnnTopkV2", "self k:int dim:int largest:bool sorted:bool policy:int32 >values >indices")
def topk_v2(self, k, dim, largest, sorted, policy, out):
    return topk(self, k, dim, largest, sorted, out)


@operator("aclnnSort", "self stable:bool dim:int descending:bool >values >indices")
def sort(self, stable, dim, descending, out):
    values, indices = self.sort(stable=stable, dim=dim, descending=descending)
    return values, indices.to(out[1].dtype)


@operator("aclnnCumsum", "self dim:int dtype:int32 >out")
def cumsum(self, dim, dtype, out):
    return tall(self).cumsum(dim).to(out.dtype)


@operator("aclnnProd", "self dtype:int32 >out")
def prod(self, dtype, out):
    return tall(self).prod().to(out.dtype)


@operator("aclnnLinalgVectorNorm", "self order:scalar dims:ints keep:bool dtype:int32 >out")
def vector_norm(self, order, dims, keep, dtype, out):
    return torch.linalg.vector_norm(tall(self), order, tuple(dims) or None, keep).to(out.dtype)


def _variance(function):
    def compute(self, dims, correction, keep, out):
        return function(tall(self), axes(dims, self), correction=correction, keepdim=keep).to(out.dtype)

    return compute


operator("aclnnStd", "self dims:ints correction:int keep:bool >out")(_variance(torch.std))
