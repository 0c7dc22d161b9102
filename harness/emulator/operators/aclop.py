"""Types of CANN's older path that move and choose: a type, inputs in order, attributes by name."""

from __future__ import annotations

import ctypes
import math

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator import overflow, soc
from harness.emulator.operators import products
from harness.emulator.operators.common import ints, upcast
from harness.emulator.table import aclop, operator
from harness.numerics.families import KEEP, USE_FLOAT16, USE_HF32


def of_convolutions(*tensors: torch.Tensor | None) -> numerics.Operands:
    """What a convolution of the older path makes of its float32 operands."""
    return _allowed(0, tensors)


def of_products(*tensors: torch.Tensor | None) -> numerics.Operands:
    """And what another product does."""
    return _allowed(1, tensors)


def _allowed(index: int, tensors) -> numerics.Operands:
    """Whether HF32 may be taken is a compile option of the older path, a digit for convolutions and one for
    products.
    """
    if soc.without_float32():
        return soc.operands(KEEP if _compile_option(0) == "must_keep_origin_dtype" else USE_FLOAT16, *tensors)
    digits = _compile_option(14) or "10"
    return soc.operands(USE_HF32, *tensors) if digits[index : index + 1] == "1" else soc.default_operands(*tensors)


def _compile_option(number: int) -> str:
    """What torch_npu set by aclSetCompileopt: 0 is the precision mode, 14 where HF32 is allowed."""
    text = ctypes.create_string_buffer(128)
    ctypes.CDLL(None).aclGetCompileopt(number, text, ctypes.c_size_t(128))
    return text.value.decode()


# -------- layouts, copies, slices


@aclop("Identity")
def identity(x, src_format="", dst_format="", groups=1):
    return x  # the layouts are changed where it is read and where it is written


@operator("aclnnNpuFormatCast", "source >out")
def format_cast(source):
    return source


operator("aclnnMatmulWeightNz aclnnBatchMatMulWeightNz", "self other >out cube:int8")(products.matmul)
operator("aclnnAddmmWeightNz", "self mat1 mat2 beta:scalar alpha:scalar >out cube:int8")(products.addmm)


@aclop("ViewCopy")
def copy_view(to, to_size, to_stride, to_start, source, size, stride, start):
    return source.clone()  # the two may overlap


@aclop("Cast")
def cast(x, out, dst_type=None):
    return x.to(out.dtype)


@aclop("Fill")
def fill(dims, value, out):
    return value.reshape(()).to(out.dtype).expand(out.shape)


@aclop("OnesLike")
def ones_like(x):
    return torch.ones_like(x)


@aclop("ZerosLike")
def zeros_like(x):
    return torch.zeros_like(x)


@aclop("Eye")
def eye(out, num_rows, num_columns=0, batch_shape=(), dtype=None):
    return torch.eye(num_rows, num_columns or num_rows, dtype=out.dtype)


@aclop("Range")
def arange(start, end, step, out):
    return (start.double() + step.double() * torch.arange(out.shape[0])).to(out.dtype)


@aclop("RangeD")
def arange_d(x, out, start, limit, delta=1.0):
    return (start + delta * torch.arange(out.shape[0]).double()).to(out.dtype)


@aclop("LinSpace")
def linspace(start, end, count, out):
    return torch.linspace(start.item(), end.item(), ints(count)[0]).to(out.dtype)


@aclop("Slice")
def slice_(x, offsets, sizes):
    for axis, (offset, size) in enumerate(zip(ints(offsets), ints(sizes))):
        x = x.narrow(axis, offset, x.shape[axis] - offset if size < 0 else size)
    return x


@aclop("StridedSlice")
def strided_slice(
    x, begin, end, strides=None, begin_mask=0, end_mask=0, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0
):
    begin, end = ints(begin), ints(end)
    strides = ints(strides) if strides is not None else [1] * len(begin)

    def marked(mask, position):
        return bool(mask >> position & 1)

    index = []
    for position in range(len(begin)):
        if marked(ellipsis_mask, position):
            index.append(Ellipsis)
        elif marked(new_axis_mask, position):
            index.append(None)
        elif marked(shrink_axis_mask, position):
            index.append(begin[position])
        else:
            first = None if marked(begin_mask, position) else begin[position]
            last = None if marked(end_mask, position) else end[position]
            index.append(slice(first, last, strides[position]))
    return torch.from_numpy(x.view(_BITS.get(x.dtype, x.dtype)).numpy()[tuple(index)].copy()).view(
        x.dtype
    )  # numpy steps backwards too


_BITS = {torch.bfloat16: torch.int16}  # a dtype that numpy lacks, as one of its width


@aclop("Transpose")
def transpose(x, perm):
    return x.permute(ints(perm))


@aclop("ConfusionTransposeD")
def confusion_transpose(x, perm, shape, transpose_first):
    return x.permute(perm).reshape(shape) if transpose_first else x.reshape(shape).permute(perm)


@aclop("BroadcastTo")
def broadcast_to(x, shape):
    return x.expand(ints(shape))


@aclop("Tile")
def tile(x, repeats):
    return x.repeat(ints(repeats))


@aclop("ReverseV2")
def reverse(x, axes):
    return x.flip(ints(axes))


@aclop("Roll")
def roll(x, shifts, dims=()):
    return x.roll(shifts, dims or None)


@aclop("ConcatD")
def concat(*tensors, concat_dim, N=None):
    return torch.cat(tensors, concat_dim)


@aclop("Pack")
def stack(*tensors, axis=0, N=None):
    return torch.stack(tensors, axis)


@aclop("Pad")
def pad(x, paddings):
    return _padded(x, ints(paddings), "constant", 0)


@aclop("PadV3")
def pad_v3(x, paddings, value=None, mode="constant", paddings_contiguous=True):
    return _padded(x, ints(paddings), {"edge": "replicate"}.get(mode, mode), 0 if value is None else value.item())


@aclop("MirrorPad")
def mirror_pad(x, paddings, mode="REFLECT"):
    return _padded(x, ints(paddings), mode.lower(), 0)


def _padded(x, paddings, mode, value):
    """Paddings are (before, after) from the first axis; torch counts from the last."""
    pairs = [(paddings[at], paddings[at + 1]) for at in range(0, len(paddings), 2)]
    while mode != "constant" and len(pairs) > 1 and pairs[0] == (0, 0) and len(pairs) > x.dim() - 2:
        pairs = pairs[1:]
    return F.pad(
        x, [size for pair in reversed(pairs) for size in pair], mode, *((value,) if mode == "constant" else ())
    )


@aclop("AsStrided")
def as_strided(x, shape, strides, offset):
    return x.contiguous().as_strided(ints(shape), ints(strides), int(offset))


@aclop("GatherV2")
def gather_v2(x, index, axis, batch_dims=0):
    return x.index_select(int(axis), index.reshape(-1).long()).reshape(
        [*x.shape[: int(axis)], *index.shape, *x.shape[int(axis) + 1 :]]
    )


@aclop("GatherV2D")
def gather_v2d(x, index, out, axis=0):
    return gather_v2(x, index, axis).reshape(out.shape)


@aclop("GatherElements")
def gather_elements(x, index, dim=0):
    return x.gather(dim, index.long())


@aclop("ScatterElements")
def scatter_elements(x, index, source, axis=0, reduction="none"):
    if reduction == "add":
        return upcast(x).scatter_add(axis, index.long(), upcast(source)).to(x.dtype)
    return x.scatter(axis, index.long(), source)


@aclop("ScatterUpdate")
def scatter_update(x, index, source, use_locking=False):
    return x.index_copy(0, index.reshape(-1).long(), source.reshape(-1, *x.shape[1:]))


@aclop("Gather")
def take(x, index, validate_indices=True, batch_dims=0):
    return x.reshape(-1)[index.long()] if x.dim() <= 1 else x[index.long()]


@aclop("InplaceIndexAdd")
def index_add(x, index, source, alpha=None, axis=0):
    return (
        upcast(x).index_add(axis, index.long(), upcast(source), alpha=1 if alpha is None else alpha.item()).to(x.dtype)
    )


@aclop("EmbeddingDenseGrad")
def embedding_grad(grad, index, out, num_weights, padding_idx=-1, scale_grad_by_freq=False):
    result = torch.ops.aten.embedding_dense_backward(
        upcast(grad), index.long(), num_weights, padding_idx, scale_grad_by_freq
    )
    return result.to(out.dtype)


@aclop("OneHot")
def one_hot(x, depth, on, off, axis=-1):
    return _one_hot(x, int(depth), on, off, axis)


@aclop("OneHotD")
def one_hot_d(x, on, off, depth, axis=-1):
    return _one_hot(x, depth, on, off, axis)


def _one_hot(x, depth, on, off, axis):
    axis = axis if axis >= 0 else x.dim()
    shape = [1] * (x.dim() + 1)
    shape[axis] = depth
    return torch.where(x.long().unsqueeze(axis) == torch.arange(depth).view(shape), on.reshape(()), off.reshape(()))


@aclop("MaskedFill")
def masked_fill(x, mask, value):
    return torch.where(mask.bool(), value.reshape(()).to(x.dtype), x)


@aclop("MaskedSelect", free=(0,))
def masked_select(x, mask):
    return x.masked_select(mask.bool())


@aclop("NonZero", free=(0,))
def nonzero(x, out, transpose=False):
    result = x.nonzero().to(out.dtype)
    return result.t() if transpose else result


@aclop("Select")
def select(condition, x, y):
    return torch.where(condition.bool(), x, y)


@aclop("MaskedFillRange")
def masked_fill_range(x, start, end, value, axis=-1):
    """Fills x[j, …, start[i, j]:end[i, j]] along an axis with value[i], or the whole range where the axis is the
    first.
    """
    changed, axis = x.clone(), axis % x.dim()
    for i in range(start.shape[0]):
        for j in range(start.shape[1]):
            first, last = int(start[i, j]), int(end[i, j])
            rows = changed if axis == 0 or (start.shape[1] == 1 and x.shape[0] != 1) else changed[j]
            rows.narrow(axis - (rows.dim() < x.dim()), first, last - first).fill_(value[i])
    return changed


@aclop("Tril")
def tril(x, diagonal=0):
    return x.tril(diagonal)


@aclop("Triu")
def triu(x, diagonal=0):
    return x.triu(diagonal)


@aclop("FillDiagonal")
def fill_diagonal(x, fill_value, wrap=False):
    return x.clone().fill_diagonal_(fill_value, wrap)


# -------- chance, bits, status


@aclop("DropOutGenMaskV3")
def dropout_byte_mask(shape, probability, out, seed=0, seed2=0):
    """One byte for each element, 1 where it is kept; `probability` is that of keeping."""
    generator = (
        torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + seed2) & (2**63 - 1)) if seed or seed2 else None
    )
    drawn = torch.rand(math.prod(out.shape), generator=generator)
    return (drawn < probability.reshape(()).float()).to(out.dtype).reshape(out.shape)


@aclop("DropOutDoMaskV3")
def dropout_with_byte_mask(x, mask, probability):
    retained = mask.reshape(-1)[: x.numel()].reshape(x.shape).bool()
    return torch.where(retained, upcast(x) / probability.reshape(()).float(), torch.zeros(())).to(x.dtype)


@aclop("AxpyWithSoftmaxAndDropOutDoMask")
def softmax_with_dropout(x, y, mask, out, alpha, input_keep_prob, axis=(-1,)):
    soft = F.softmax(upcast(x) + upcast(y) * alpha, axis[0])
    retained = mask.reshape(-1)[: x.numel()].reshape(x.shape).bool()
    return soft.to(out[0].dtype), torch.where(retained, soft / input_keep_prob, torch.zeros(())).to(out[1].dtype)


@aclop("DropoutWithMulsAndSoftmaxGrad")
def softmax_with_dropout_grad(grad, mask, soft, alpha, input_keep_prob, axes=(-1,)):
    retained = mask.reshape(-1)[: grad.numel()].reshape(grad.shape).bool()
    through = torch.where(retained, upcast(grad) / input_keep_prob, torch.zeros(()))
    wide = upcast(soft)
    return ((through - (through * wide).sum(axes, keepdim=True)) * wide * alpha).to(grad.dtype)


@aclop("RandomChoiceWithMask")
def random_choice(x, out, count, seed=0, seed2=0):
    """Up to `count` places of True, in a random order where there are more, and which of the rows hold one."""
    indices = x.nonzero()
    if len(indices) > count:
        indices = indices[torch.randperm(len(indices))[:count]]
    rows = torch.zeros(count, x.dim(), dtype=out[0].dtype)
    rows[: len(indices)] = indices.to(rows.dtype)
    return rows, torch.arange(count) < len(indices)


_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)  # of the bits of a byte, the first element in the lowest


@aclop("SignBitsPack")
def sign_bits_pack(x, size):
    """Eight elements a byte, the first in the lowest bit: 1 where not negative, 0 behind the end."""
    bits = F.pad((upcast(x) >= 0).int(), (0, -x.numel() % 8))
    return (bits.view(-1, 8) * torch.tensor(_WEIGHTS)).sum(-1).to(torch.uint8).reshape(size, -1)


@aclop("SignBitsUnpack")
def sign_bits_unpack(x, out, size, dtype=0):
    bits = (x.int().unsqueeze(-1) & torch.tensor(_WEIGHTS)) != 0
    return torch.where(bits, 1.0, -1.0).reshape(size, -1).to(out.dtype)


@aclop("StrideAdd")
def stride_add(x, y, out, x1_c1_offset, x2_c1_offset, c1_len):
    """Blocks of 16 channels of x and y from an offset in each, added; channels that a tensor lacks count as 0."""

    def blocks(tensor, first):
        wanted = F.pad(upcast(tensor), (0, 0) * (tensor.dim() - 2) + (0, (first + c1_len) * 16 - tensor.shape[1]))
        return wanted[:, first * 16 : (first + c1_len) * 16]

    return (blocks(x, x1_c1_offset) + blocks(y, x2_c1_offset)).reshape(out.shape).to(out.dtype)


@aclop("NPUAllocFloatStatus")
def no_float_status(out):
    return torch.zeros(out.shape, dtype=out.dtype)


@aclop("NPUGetFloatStatusV2 NPUGetFloatDebugStatus")
def float_status(out):
    """Eight numbers; the first is not 0 where an operator overflowed since the status was cleared."""
    result = torch.zeros(out.shape, dtype=out.dtype)
    result[0] = overflow.flagged()
    return result


@aclop("NPUGetFloatStatus")
def float_status_of(status, out):
    status[0] = float(
        overflow.flagged()
    )  # chips before the 910B write it into their input, which torch_npu then returns
    return torch.zeros(out.shape, dtype=out.dtype)


@aclop("NPUClearFloatStatus")
def clear_float_status_of(status, out):
    overflow.clear()
    return torch.zeros(out.shape, dtype=out.dtype)


@aclop("NPUClearFloatStatusV2 NPUClearFloatDebugStatus")
def clear_float_status():
    overflow.clear()
    return []
