"""Making tensors, moving, joining and indexing them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness.emulator.operators.common import upcast
from harness.emulator.table import operator

REDUCTIONS = {1: "sum", 2: "prod", 3: "amax", 4: "amin", 5: "mean"}  # 0 replaces
NO_DIM = 1000  # how torch_npu says that a dim was not given


@operator("aclnnArange aclnnRange", "start:scalar end:scalar step:scalar >out")
def arange(start, end, step, out):
    count = out.numel
    return (
        (torch.arange(count, dtype=torch.float64) * step + start).to(out.dtype)
        if out.dtype.is_floating_point
        else (torch.arange(count) * int(step) + int(start)).to(out.dtype)
    )


@operator("aclnnEye", "rows:int columns:int >out")
def eye(rows, columns, out):
    return torch.eye(rows, columns, dtype=out.dtype)


@operator("aclnnCat", "tensors:tensors dim:int >out")
def cat(tensors, dim, out):
    filled = [tensor for tensor in tensors if tensor.shape != (0,)]
    return torch.cat([tensor.to(out.dtype) for tensor in filled], dim)


@operator("aclnnStack", "tensors:tensors dim:int >out")
def stack(tensors, dim, out):
    return torch.stack([tensor.to(out.dtype) for tensor in tensors], dim)


@operator("aclnnEmbedding", "weight indices >out")
def embedding(weight, indices):
    return F.embedding(indices.long(), weight)


@operator("aclnnIndexSelect", "self dim:int index >out")
def index_select(self, dim, index):
    return self.index_select(dim, index.long())


@operator("aclnnGather", "self dim:int index >out")
def gather(self, dim, index):
    return self.gather(dim, index.long())


@operator("aclnnIndex", "self indices:tensors >out")
def index(self, indices, out):
    if not out.numel:
        return torch.empty(out.shape, dtype=out.dtype)
    return self[_torch_indices(indices)]


def _torch_indices(indices):
    """Indices as torch takes them; a slice over everything comes as an empty tensor with one axis."""

    def torch_index(index):
        if index.shape == (0,):
            return slice(None)
        return index if index.dtype == torch.bool else index.long()

    return tuple(torch_index(item) for item in indices)


@operator("aclnnIndexPutImpl", "self! indices:tensors values accumulate:bool unsafe:bool")
def index_put(self, indices, values, accumulate, unsafe):
    if not any(tensor.numel() for tensor in indices):  # at least one of them is an index, and it names no place
        return self.clone()
    if not accumulate or self.dtype == torch.bool:
        changed = self.clone()
        changed[_torch_indices(indices)] = values.to(self.dtype)
        return changed
    positions = torch.arange(self.numel()).reshape(self.shape)[_torch_indices(indices)]
    source = upcast(values).expand(positions.shape).reshape(-1)
    return upcast(self).reshape(-1).index_add(0, positions.reshape(-1), source).reshape(self.shape).to(self.dtype)


@operator("aclnnEmbeddingDenseBackward", "grad indices count:uint64 padding:uint64 by_frequency:bool >out")
def embedding_dense_backward(grad, indices, count, padding, by_frequency, out):
    padding = -1 if padding >= 1 << 63 else padding
    return torch.ops.aten.embedding_dense_backward(upcast(grad), indices.long(), count, padding, by_frequency).to(
        out.dtype
    )


@operator(
    "aclnnEmbeddingBag",
    "weight indices offsets by_frequency:bool mode:int sparse:bool weights last:bool padding:int >out >bags "
    ">sizes >maxima",
)
def embedding_bag(weight, indices, offsets, by_frequency, mode, sparse, weights, last, padding, out):
    identifiers, starts = indices.long(), offsets.long()
    wide = (upcast(weight), identifiers, starts, by_frequency, min(mode, 2), False, upcast(weights), last, padding)
    result, _, _, maxima = torch.ops.aten._embedding_bag(*wide)
    bags = (
        torch.searchsorted(starts, torch.arange(len(identifiers)), right=True) - 1
    )  # of every index, also of one that is padding
    count = result.shape[0]
    counted = bags[(bags >= 0) & (identifiers != padding)]
    sizes = torch.bincount(counted, minlength=count)[:count]
    if mode >= 2:
        maxima = maxima.reshape(out[3].shape)
    else:
        maxima = sizes.clone() if mode else torch.zeros(out[3].shape, dtype=torch.long)
    bags = bags if out[1].numel else bags[:0]
    return result.to(out[0].dtype), bags.to(out[1].dtype), sizes.to(out[2].dtype), maxima.to(out[3].dtype)


@operator("aclnnIndexAdd", "self dim:int index source alpha:scalar >out")
def index_add(self, dim, index, source, alpha, out):
    if self.dtype == torch.bool:
        return self.index_add(dim, index.long(), source, alpha=bool(alpha))
    return upcast(self).index_add(dim, index.long(), upcast(source).to(upcast(self).dtype), alpha=alpha).to(out.dtype)


@operator("aclnnIndexAddV2", "self dim:int index source alpha:scalar mode:int >out")
def index_add_sorted(self, dim, index, source, alpha, mode, out):
    return index_add(self, dim, index, source, alpha, out)


@operator("aclnnIndexCopy", "self dim:int index source >out")
def index_copy(self, dim, index, source):
    return self.index_copy(dim, index.long(), source)


@operator("aclnnInplaceIndexCopy", "self! dim:int index source")
def inplace_index_copy(self, dim, index, source):
    return self.index_copy(dim, index.long(), source)


@operator("aclnnIndexFill", "self dim:int index value:scalar >out")
def index_fill(self, dim, index, value):
    return self.index_fill(dim, index.long(), value)


@operator("aclnnInplaceIndexFill", "self! dim:int index value:scalar")
def inplace_index_fill(self, dim, index, value):
    return self.index_fill(dim, index.long(), value)


@operator("aclnnIndexFillTensor", "self dim:int index:ints value:scalar >out")
def index_fill_listed(self, dim, index, value):
    return self.index_fill(dim, torch.tensor(index, dtype=torch.long), value)


@operator("aclnnInplaceIndexFillTensor", "self! dim:int index:ints value:scalar")
def inplace_index_fill_listed(self, dim, index, value):
    return self.index_fill(dim, torch.tensor(index, dtype=torch.long), value)


@operator("aclnnTake", "self index >out")
def take(self, index):
    return self.take(index.long())


@operator("aclnnInplacePut", "self! index source accumulate:bool")
def put(self, index, source, accumulate):
    return upcast(self).put(index.long(), upcast(source), accumulate).to(self.dtype)


def _scatter(self, dim, index, source, reduction, include_self=True):
    if reduction == 0:
        return self.scatter(dim, index.long(), source)
    return (
        upcast(self)
        .scatter_reduce(dim, index.long(), upcast(source), REDUCTIONS[reduction], include_self=include_self)
        .to(self.dtype)
    )


def _filled(self, index, value):
    return torch.full(index.shape, value, dtype=self.dtype)


@operator("aclnnScatter", "self dim:int index source reduction:int >out")
def scatter(self, dim, index, source, reduction):
    return _scatter(self, dim, index, source, reduction)


@operator("aclnnInplaceScatter", "self! dim:int index source reduction:int")
def inplace_scatter(self, dim, index, source, reduction):
    return _scatter(self, dim, index, source, reduction)


@operator("aclnnScatterValue", "self dim:int index value:scalar reduction:int >out")
def scatter_value(self, dim, index, value, reduction):
    return _scatter(self, dim, index, _filled(self, index, value), reduction)


@operator("aclnnInplaceScatterValue", "self! dim:int index value:scalar reduction:int")
def inplace_scatter_value(self, dim, index, value, reduction):
    return _scatter(self, dim, index, _filled(self, index, value), reduction)


@operator("aclnnScatterAdd", "self dim:int index source >out")
def scatter_add(self, dim, index, source):
    return upcast(self).scatter_add(dim, index.long(), upcast(source)).to(self.dtype)


@operator("aclnnScatterReduce", "self dim:int index source reduction:int include_self:bool >out")
def scatter_reduce(self, dim, index, source, reduction, include_self):
    return _scatter(self, dim, index, source, reduction, include_self)


@operator("aclnnInplaceScatterReduce", "self! dim:int index source reduction:int include_self:bool")
def inplace_scatter_reduce(self, dim, index, source, reduction, include_self):
    return _scatter(self, dim, index, source, reduction, include_self)


@operator("aclnnInplaceScatterUpdate", "data! indices updates axis:int")
def scatter_update(data, indices, updates, axis):
    """Row i of updates goes into batch i of data from indices[i] on; pairs in indices name the batch, too."""
    changed, axis = data.clone(), axis % data.dim() - 1
    starts = indices.tolist() if indices.dim() == 2 else list(enumerate(indices.reshape(-1).tolist()))
    for (batch, start), update in zip(starts, updates):
        changed[batch].narrow(axis, start, update.shape[axis]).copy_(update)
    return changed


@operator("aclnnScatterNdUpdate", "self! indices updates")
def scatter_nd_update(self, indices, updates):
    changed = self.clone()
    changed[tuple(indices.long().unbind(-1))] = updates
    return changed


@operator("aclnnScatterList", "selfs!:tensors indices updates mask reduce:str axis:int")
def scatter_list(selfs, indices, updates, mask, reduce, axis):
    """Row i of updates goes into tensor i from indices[i] on, where the mask allows; pairs in indices are start and
    length.
    """
    axis = axis % updates.dim() - 1
    changed = [tensor.clone() for tensor in selfs]
    for position, (target, update) in enumerate(zip(changed, updates)):
        if mask is not None and not mask.reshape(-1)[position]:
            continue
        span = indices[position].reshape(-1).tolist()
        length = span[1] if len(span) > 1 else update.shape[axis]
        target.narrow(axis, span[0], length).copy_(update.narrow(axis, 0, length))
    return changed


@operator("aclnnInplaceMaskedScatter", "self! mask source")
def masked_scatter(self, mask, source):
    return self.masked_scatter(mask.bool(), source)


@operator("aclnnGatherV3", "self dim:int index batch_dims:int mode:int >out")
def gather_slices(self, dim, index, batch_dims, mode, out):
    """Slices of self along dim, for each place in index; the first batch_dims axes are shared by both."""
    if batch_dims:
        return torch.stack(
            [gather_slices(item, dim - 1, part, batch_dims - 1, mode, None) for item, part in zip(self, index)]
        )
    return (
        self.index_select(dim, index.long().reshape(-1)).unflatten(dim, index.shape)
        if index.dim()
        else self.select(dim, int(index))
    )


@operator("aclnnRepeatInterleave", "self repeats size:int >out")
def repeat_interleave(self, repeats, size):
    return self.repeat_interleave(repeats)


@operator("aclnnRepeatInterleaveInt", "self repeats:int size:int >out")
def repeat_interleave_evenly(self, repeats, size):
    return self.repeat_interleave(repeats)


@operator("aclnnRepeatInterleaveWithDim", "self repeats dim:int size:int >out")
def repeat_interleave_along(self, repeats, dim, size):
    return self.repeat_interleave(repeats, dim)


@operator("aclnnRepeatInterleaveIntWithDim", "self repeats:int dim:int size:int >out")
def repeat_interleave_evenly_along(self, repeats, dim, size):
    return self.repeat_interleave(repeats, dim)


@operator("aclnnRepeatInterleaveTensor", "repeats size:int >out")
def repeat_indices(repeats, size, out):
    return torch.repeat_interleave(repeats.long()).to(out.dtype)


@operator("aclnnRepeatInterleaveGrad", "grad repeats axis:int >out")
def repeat_interleave_grad(grad, repeats, axis, out):
    counts = repeats.reshape(-1).long()
    counts = counts.expand(out.shape[axis]) if counts.numel() == 1 else counts
    indices = torch.repeat_interleave(counts)
    return torch.zeros(out.shape, dtype=upcast(grad).dtype).index_add(axis, indices, upcast(grad)).to(out.dtype)


@operator("aclnnRoll", "self shifts:ints dims:ints >out")
def roll(self, shifts, dims):
    return self.roll(shifts, dims or ())


@operator("aclnnSplitWithSize", "self sizes:ints dim:int >out:tensors")
def split_with_sizes(self, sizes, dim):
    return self.split(sizes, dim)


@operator(
    "aclnnStridedSlice",
    "self begin:ints end:ints strides:ints begin_mask:int end_mask:int ellipsis_mask:int new_axis_mask:int "
    "shrink_axis_mask:int >out",
)
def strided_slice(self, begin, end, strides, begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_axis_mask):
    """Bit i of a mask says how entry i is meant: from the beginning, to the end, as `...`, as None, as one number."""
    index, flipped, axis = [], [], 0
    named = sum(not (new_axis_mask | ellipsis_mask) >> item & 1 for item in range(len(begin)))
    for item, (first, last, step) in enumerate(zip(begin, end, strides)):
        if ellipsis_mask >> item & 1:
            index.append(...)
            axis += self.dim() - named
            continue
        if new_axis_mask >> item & 1:
            index.append(None)
            continue
        if shrink_axis_mask >> item & 1:
            index.append(first)
        else:
            span = slice(None if begin_mask >> item & 1 else first, None if end_mask >> item & 1 else last, step)
            numbers = range(*span.indices(self.shape[axis]))
            if step < 0:  # torch has no negative steps: the same elements upwards, turned round afterwards
                before = sum(entry is not Ellipsis and not isinstance(entry, int) for entry in index)
                flipped.append(before + (self.dim() - named if ... in index else 0))
                numbers = numbers[::-1]
            index.append(slice(numbers.start, numbers.stop, numbers.step) if len(numbers) else slice(0, 0))
        axis += 1
    return self[tuple(index)].flip(flipped)


@operator("aclnnUnfoldGrad", "grad sizes:ints dim:int size:int step:int >out")
def unfold_grad(grad, sizes, dim, size, step, out):
    return torch.ops.aten.unfold_backward(upcast(grad), sizes, dim, size, step).to(out.dtype)


@operator("aclnnChunkCat", "tensors:tensors dim:int chunks:int >out")
def chunk_cat(tensors, dim, chunks, out):
    return torch._chunk_cat(tensors, dim, chunks).to(out.dtype)


@operator("aclnnChannelShuffle", "self groups:int >out")
def channel_shuffle(self, groups):
    return torch.channel_shuffle(self, groups)


@operator("aclnnConfusionTranspose", "self order:ints shape:ints transpose_first:bool >out")
def confusion_transpose(self, order, shape, transpose_first):
    return self.permute(order).reshape(shape) if transpose_first else self.reshape(shape).permute(order)


@operator("aclnnInplaceFillDiagonal", "self! value:scalar wrap:bool")
def fill_diagonal(self, value, wrap):
    return self.clone().fill_diagonal_(value, wrap)


def _asked(value, out):
    """A result where the caller asked for it; where not, there is no room for it."""
    return value if out.numel == value.numel() or not out.shape == (0,) else torch.empty(0, dtype=out.dtype)


@operator("aclnnUnique", "self sorted:bool inverse:bool >out~ >places")
def unique(self, sorted, inverse, out):
    values, positions = torch.unique(self, return_inverse=True)
    return values, _asked(positions, out[1])


@operator("aclnnUnique2", "self sorted:bool inverse:bool counts:bool >out~ >places >counts~")
def unique_counted(self, sorted, inverse, counts, out):
    values, positions, numbers = torch.unique(self, return_inverse=True, return_counts=True)
    return values, _asked(positions, out[1]), _asked(numbers, out[2])


@operator("aclnnUniqueDim", "self sorted:bool inverse:bool dim:int >out~ >places >counts~")
def unique_along(self, sorted, inverse, dim):
    return torch.unique(self, return_inverse=True, return_counts=True, dim=dim)


@operator("aclnnUniqueConsecutive", "self inverse:bool counts:bool dim:int >out~ >places >counts~")
def unique_consecutive(self, inverse, counts, dim, out):
    dim = None if dim == NO_DIM else dim
    values, positions, numbers = torch.unique_consecutive(self, return_inverse=True, return_counts=True, dim=dim)
    return values, _asked(positions, out[1]), _asked(numbers, out[2])


@operator("aclnnTril", "self diagonal:int >out")
def tril(self, diagonal):
    return self.tril(diagonal)


@operator("aclnnTriu", "self diagonal:int >out")
def triu(self, diagonal):
    return self.triu(diagonal)


@operator("aclnnInplaceTril", "self! diagonal:int")
def inplace_tril(self, diagonal):
    return self.tril(diagonal)


@operator("aclnnInplaceTriu", "self! diagonal:int")
def inplace_triu(self, diagonal):
    return self.triu(diagonal)


@operator("aclnnFlip", "self dims:ints >out")
def flip(self, dims):
    return self.flip(dims)


@operator("aclnnRepeat", "self repeats:ints >out")
def repeat(self, repeats):
    return self.repeat(repeats)


@operator("aclnnConstantPadNd", "self pad:ints value:scalar >out")
def pad(self, pad, value):
    return F.pad(self, pad, value=value)


@operator("aclnnOneHot", "self depth:int on off axis:int >out")
def one_hot(self, depth, on, off, axis, out):
    return torch.where(F.one_hot(self.long(), depth).bool(), on.reshape(()), off.reshape(())).to(out.dtype)


@operator("aclnnNonzero", "self >out~")
def nonzero(self):
    return self.nonzero()


@operator("aclnnNonzeroV2", "self >out~")
def nonzero_columns(self):
    return self.nonzero().t().contiguous()


@operator("aclnnMaskedSelect", "self mask >out~")
def masked_select(self, mask):
    return self.masked_select(mask.bool())
