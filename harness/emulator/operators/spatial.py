"""Pooling, resampling, padding, grids and columns of images."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness.emulator.operators.common import upcast
from harness.emulator.table import operator

aten = torch.ops.aten
WINDOW = "kernel:ints stride:ints padding:ints"
POOL = f"{WINDOW} dilation:ints ceil:bool"
AVERAGE = f"{WINDOW} ceil:bool padded:bool divisor:int"


def _enter(name, signature, function):
    """A function of tensors taken wide, rounded once; of several outputs each in the dtype asked for."""

    def compute(*values, out):
        result = function(*[upcast(value) for value in values])
        return (
            result.to(out.dtype)
            if isinstance(result, torch.Tensor)
            else [tensor.to(spec.dtype) for tensor, spec in zip(result, out)]
        )

    operator(name, signature)(compute)


for axes in (2, 3):
    _enter(f"aclnnAdaptiveAvgPool{axes}d", "self size:ints >out", getattr(aten, f"_adaptive_avg_pool{axes}d"))
    _enter(
        f"aclnnAdaptiveAvgPool{axes}dBackward", "grad self >out", getattr(aten, f"_adaptive_avg_pool{axes}d_backward")
    )
    _enter(f"aclnnAdaptiveMaxPool{axes}d", "self size:ints >out >indices", getattr(aten, f"adaptive_max_pool{axes}d"))
    _enter(
        f"aclnnAdaptiveMaxPool{axes}dBackward",
        "grad self indices >out",
        lambda grad, self, indices, back=getattr(aten, f"adaptive_max_pool{axes}d_backward"): back(
            grad, self, indices.long()
        ),
    )
    cube = " cube:int8" if axes == 2 else ""  # torch_npu never allows HF32 here
    _enter(
        f"aclnnAvgPool{axes}d",
        f"self {AVERAGE}{cube} >out",
        lambda *values, pool=getattr(aten, f"avg_pool{axes}d"): pool(*values[:6], values[6] or None),
    )
    _enter(
        f"aclnnAvgPool{axes}dBackward",
        f"grad self {AVERAGE}{cube} >out",
        lambda *values, back=getattr(aten, f"avg_pool{axes}d_backward"): back(*values[:7], values[7] or None),
    )
    _enter(
        f"aclnnGridSampler{axes}D",
        "self grid mode:int padding:int align:bool >out",
        getattr(aten, f"grid_sampler_{axes}d"),
    )
    _enter(
        f"aclnnGridSampler{axes}DBackward",
        "grad self grid mode:int padding:int align:bool mask:bools >out >out_grid",
        lambda *values, back=getattr(aten, f"grid_sampler_{axes}d_backward"): back(*values[:6], [True, True]),
    )


def _max_pool_backward(pool):
    return lambda grad, self, indices, *window: pool(grad, self, *window, indices.long())


for name, axes in (("aclnnMaxPool2dWithIndices", 2), ("aclnnMaxPool3dWithArgmax", 3)):
    _enter(name, f"self {POOL} >out >indices", getattr(aten, f"max_pool{axes}d_with_indices"))
    _enter(
        f"{name}Backward",
        f"grad self indices {POOL} >out",
        _max_pool_backward(getattr(aten, f"max_pool{axes}d_with_indices_backward")),
    )


def _unpool(axes):
    def unpool(self, indices, size, *window, out):
        planes = torch.zeros(out.shape, dtype=out.dtype).flatten(-axes)
        return planes.scatter(-1, indices.long().flatten(-axes), self.to(out.dtype).flatten(-axes)).reshape(out.shape)

    return unpool


operator("aclnnMaxUnpool2d", "self indices size:ints >out")(_unpool(2))
operator("aclnnMaxUnpool3d", "self indices size:ints stride:ints padding:ints >out")(_unpool(3))


def _two(values, default=None):
    values = values or default
    return tuple(values) * 2 if len(values) == 1 else tuple(values)


def _corners(shape, window, stride, padding):
    """Row and column of the upper left corner of each window, broadcast over an output of this shape."""
    rows = torch.arange(shape[-2])[:, None] * stride[0] - padding[0]
    columns = torch.arange(shape[-1])[None] * stride[1] - padding[1]
    return rows, columns


@operator("aclnnMaxPool2dWithMask", f"self {POOL} >out >mask")
def max_pool_masked(self, kernel, stride, padding, dilation, ceil, out):
    """The maxima, and where they lie. CANN's mask is opaque and larger than that: here each plane begins with the place
    of every maximum in its window as an int16, zeros follow; the backward operator reads them."""
    result, indices = aten.max_pool2d_with_indices(upcast(self), kernel, stride, padding, dilation, ceil)
    kernel, stride, padding, dilation = _two(kernel), _two(stride, kernel), _two(padding), _two(dilation)
    rows, columns = _corners(result.shape, kernel, stride, padding)
    width = self.shape[-1]
    row = torch.div(indices // width - rows, dilation[0], rounding_mode="floor")
    column = torch.div(indices % width - columns, dilation[1], rounding_mode="floor")
    offsets = (row * kernel[1] + column).to(torch.int16).flatten(-2).contiguous().view(torch.int8)
    mask = torch.zeros(out[1].shape, dtype=torch.int8).flatten(-2)
    mask[..., : offsets.shape[-1]] = offsets
    return result.to(out[0].dtype), mask.reshape(out[1].shape).to(out[1].dtype)


@operator("aclnnMaxPool2dWithMaskBackward", f"grad self mask {POOL} >out")
def max_pool_masked_backward(grad, self, mask, kernel, stride, padding, dilation, ceil, out):
    kernel, stride, padding, dilation = _two(kernel), _two(stride, kernel), _two(padding), _two(dilation)
    count = grad.shape[-2] * grad.shape[-1]
    offsets = (
        mask.contiguous()
        .flatten(-2)[..., : 2 * count]
        .contiguous()
        .view(torch.int16)
        .long()
        .unflatten(-1, grad.shape[-2:])
    )
    rows, columns = _corners(grad.shape, kernel, stride, padding)
    indices = (rows + offsets // kernel[1] * dilation[0]) * self.shape[-1] + columns + offsets % kernel[1] * dilation[1]
    return aten.max_pool2d_with_indices_backward(
        upcast(grad), upcast(self), kernel, stride, padding, dilation, ceil, indices
    ).to(out.dtype)


def _resample(name, function, axes, align=False, backward=False, scales="double"):
    """A scale of 0 or less is one that was not given."""
    sizes = "size:ints input:ints" if backward else "size:ints"
    factors = " ".join(f"scale{axis}:{scales}" for axis in range(axes)) if scales else ""
    first = 1 + (2 if backward else 1) + align

    def resample(*values):
        given = [value if value > 0 else None for value in values[first:]]
        return function(*values[:first], *(given or [None] * axes))

    _enter(name, f"self {sizes} {'align:bool' if align else ''} {factors} >out", resample)


for axes, kind, align in (
    (1, "Linear", True),
    (2, "Bilinear", True),
    (3, "Trilinear", True),
    (2, "Bicubic", True),
    (1, "Nearest", False),
    (2, "Nearest", False),
    (3, "Nearest", False),
    (1, "NearestExact", False),
    (2, "NearestExact", False),
    (3, "NearestExact", False),
):
    aten_name = ("_upsample_nearest_exact" if kind == "NearestExact" else f"upsample_{kind.lower()}") + f"{axes}d"
    plain = kind == "Nearest" and axes < 3
    _resample(f"aclnnUpsample{kind}{axes}d", getattr(aten, aten_name), axes, align, scales="" if plain else "double")
    _resample(f"aclnnUpsample{kind}{axes}dBackward", getattr(aten, f"{aten_name}_backward"), axes, align, backward=True)
    if plain:
        _resample(f"aclnnUpsample{kind}{axes}dV2", getattr(aten, aten_name), axes, align, scales="float")
_resample("aclnnUpsampleBilinear2dBackwardV2", aten.upsample_bilinear2d_backward, 2, True, backward=True)
_resample("aclnnUpsampleBilinear2dAA", aten._upsample_bilinear2d_aa, 2, True)
_resample("aclnnUpsampleBilinear2dAABackward", aten._upsample_bilinear2d_aa_backward, 2, True, backward=True)
_resample("aclnnUpsampleBicubic2dAA", aten._upsample_bicubic2d_aa, 2, True)
_resample("aclnnUpsampleBicubic2dAAGrad", aten._upsample_bicubic2d_aa_backward, 2, True, backward=True)

for axes in (1, 2, 3):
    for kind in ("reflection", "replication"):
        name = f"aclnn{kind.title()}Pad{axes}d"
        _enter(name, "self padding:ints >out", getattr(aten, f"{kind}_pad{axes}d"))
        _enter(f"{name}Backward", "grad self padding:ints >out", getattr(aten, f"{kind}_pad{axes}d_backward"))

_enter("aclnnAffineGrid", "theta size:ints align:bool >out", F.affine_grid)
_enter("aclnnIm2col", "self kernel:ints dilation:ints padding:ints stride:ints >out", aten.im2col)
_enter("aclnnIm2colBackward", "grad size:ints kernel:ints dilation:ints padding:ints stride:ints >out", aten.col2im)
