"""Reductions, sorting, scans."""

from __future__ import annotations

import torch

from harness import numerics
from harness.emulator.operators.common import axes, common, upcast
from harness.emulator.table import operator
from harness.numerics import HALF


def _wide(dtype):
    """The dtype in which a sum that ends in this one is made."""
    return torch.float32 if dtype in HALF else dtype


@operator("aclnnMean", "self dims:ints keep:bool dtype:int32 >out")
def mean(self, dims, keep, dtype, out):
    return self.mean(axes(dims, self), keep, dtype=_wide(out.dtype)).to(out.dtype)


@operator("aclnnReduceSum", "self dims:ints keep:bool dtype:int32 >out")
def reduce_sum(self, dims, keep, dtype, out):
    return self.sum(axes(dims, self), keep, dtype=_wide(out.dtype)).to(out.dtype)


@operator("aclnnReduceNansum", "self dims:ints keep:bool dtype:int32 >out")
def reduce_nansum(self, dims, keep, dtype, out):
    return self.nansum(axes(dims, self), keep, dtype=_wide(out.dtype)).to(out.dtype)


@operator("aclnnLogSumExp", "self dims:ints keep:bool >out")
def logsumexp(self, dims, keep, out):
    return upcast(self).logsumexp(axes(dims, self), keep).to(out.dtype)


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
    return numerics.running_sum(self.to(_wide(out.dtype)), dim).to(out.dtype)


@operator("aclnnCumprod", "self dim:scalar dtype:int32 >out")
def cumprod(self, dim, dtype, out):
    return numerics.running_product(self.to(_wide(out.dtype)), int(dim)).to(out.dtype)


@operator("aclnnProd", "self dtype:int32 >out")
def prod(self, dtype, out):
    return self.prod(dtype=_wide(out.dtype)).to(out.dtype)


@operator("aclnnProdDim", "self dim:int keep:bool dtype:int32 >out")
def prod_dim(self, dim, keep, dtype, out):
    return self.prod(dim, keep, dtype=_wide(out.dtype)).to(out.dtype)


def _enter_picked(name, function, words, taken):
    @operator(f"aclnn{name}", f"self {words} >values >indices")
    def pick(self, *arguments, out):
        values, indices = function(self, *arguments[:taken])
        return values, indices.to(out[1].dtype)


for _name, _function in (("MedianDim", torch.median), ("NanMedianDim", torch.nanmedian)):
    _enter_picked(_name, _function, "dim:int keep:bool", 2)
for _name, _function in (("Cummax", torch.cummax), ("Cummin", torch.cummin)):
    _enter_picked(_name, _function, "dim:int", 1)
_enter_picked("Kthvalue", torch.kthvalue, "k:int dim:int keep:bool", 3)


@operator("aclnnMedian", "self >out")
def median(self):
    return self.median()


@operator("aclnnNanMedian", "self >out")
def nanmedian(self):
    return self.nanmedian()


@operator("aclnnAminmaxAll", "self >least >largest")
def aminmax_all(self):
    return torch.aminmax(self)


@operator("aclnnAminmaxDim", "self dim:int keep:bool >least >largest")
def aminmax_dim(self, dim, keep):
    return torch.aminmax(self, dim=dim, keepdim=keep)


@operator("aclnnAminmax", "self dims:ints keep:bool >least >largest")
def aminmax(self, dims, keep):
    return self.amin(axes(dims, self), keep), self.amax(axes(dims, self), keep)


@operator("aclnnTrace", "self >out")
def trace(self, out):
    return upcast(self).trace().to(out.dtype)


@operator("aclnnHistc", "self bins:int low:scalar high:scalar >out")
def histc(self, bins, low, high, out):
    values = self.flatten().float() if self.dtype != torch.float64 else self.flatten()
    return torch.histc(values, bins, low, high).to(out.dtype)


@operator("aclnnBincount", "self weights length:int >out")
def bincount(self, weights, length, out):
    return torch.bincount(self, upcast(weights), length).to(out.dtype)


def searchsorted(sequence, values, narrow, right, sorter, out):
    sequence, values = common(sequence, values)
    return torch.searchsorted(sequence, values, right=right, sorter=sorter).reshape(out.shape).to(out.dtype)


operator("aclnnSearchSorted", "sequence values narrow:bool right:bool sorter >out")(searchsorted)
operator("aclnnSearchSorteds", "sequence value:scalar narrow:bool right:bool sorter >out")(searchsorted)


@operator("aclnnBucketize", "self boundaries narrow:bool right:bool >out")
def bucketize(self, boundaries, narrow, right, out):
    self, boundaries = common(self, boundaries)
    return torch.bucketize(self, boundaries, right=right).to(out.dtype)


@operator("aclnnCdist", "left right p:float mode:int >out")
def cdist(left, right, p, mode, out):
    return torch.cdist(upcast(left), upcast(right), p, compute_mode="donot_use_mm_for_euclid_dist").to(out.dtype)


@operator("aclnnCdistBackward", "grad left right distances p:float >out")
def cdist_backward(grad, left, right, distances, p, out):
    result = torch.ops.aten._cdist_backward(
        *(upcast(tensor).contiguous() for tensor in (grad, left, right)), p, upcast(distances).contiguous()
    )
    return result.to(out.dtype)


@operator("aclnnPdist", "self p:float >out")
def pdist(self, p, out):
    return torch.pdist(upcast(self).contiguous(), p).to(out.dtype)


@operator("aclnnLinalgVectorNorm", "self order:scalar dims:ints keep:bool dtype:int32 >out")
def vector_norm(self, order, dims, keep, dtype, out):
    return torch.linalg.vector_norm(upcast(self), order, tuple(dims) or None, keep).to(out.dtype)


def _spread(*results):
    """The operator that returns these results of `numerics.variance`, a bare one where it is one."""

    def compute(self, dims, correction, keep, out):
        var, mean = numerics.variance(self, axes(dims, self), correction, keep)
        computed = {"var": var, "std": var.sqrt(), "mean": mean}
        dtype = out[0].dtype if len(results) > 1 else out.dtype
        returned = tuple(computed[name].to(dtype) for name in results)
        return returned if len(returned) > 1 else returned[0]

    return compute


operator("aclnnStd", "self dims:ints correction:int keep:bool >out")(_spread("std"))
operator("aclnnVarCorrection", "self dims:ints correction:int keep:bool >out")(_spread("var"))
operator("aclnnStdMeanCorrection", "self dims:ints correction:int keep:bool >std >mean")(_spread("std", "mean"))
operator("aclnnVarMean", "self dims:ints correction:int keep:bool >var >mean")(_spread("var", "mean"))
