"""Making tensors, moving, joining and indexing them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness.emulator.table import operator


@operator("aclnnArange aclnnRange", "start:scalar end:scalar step:scalar >out")
def arange(start, end, step, out):
    count = out.numel
    return (torch.arange(count, dtype=torch.float64) * step + start).to(out.dtype) if out.dtype.is_floating_point else (
        torch.arange(count) * int(step) + int(start)
    ).to(out.dtype)


@operator("aclnnEye", "rows:int columns:int >out")
def eye(rows, columns, out):
    return torch.eye(rows, columns, dtype=out.dtype)


@operator("aclnnCat", "tensors:tensors dim:int >out")
def cat(tensors, dim, out):
    filled = [each for each in tensors if each.shape != (0,)]
    return torch.cat([each.to(out.dtype) for each in filled], dim)


@operator("aclnnStack", "tensors:tensors dim:int >out")
def stack(tensors, dim, out):
    return torch.stack([each.to(out.dtype) for each in tensors], dim)


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
    places = [slice(None) if each.numel() == 0 and each.dim() == 1 and out.numel else each for each in indices]
    return self[tuple(each if isinstance(each, slice) or each.dtype == torch.bool else each.long() for each in places)]


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
