"""The operators: name, C signature, meaning. Order of arguments: the EXEC_NPU_CMD lines of Ascend/op-plugin, op_plugin/ops/opapi.

Products, convolutions, attention, norms and activations follow harness/numerics.py; everything else is torch's own, computed in
float32 for half dtypes and rounded once.
"""

from __future__ import annotations


import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.table import OPERATORS, operator
from harness.numerics import HALF

__all__ = ["OPERATORS"]


def hf32(cube: int) -> bool:
    """Whether a cube math type asks for HF32: 1 allows a lower precision, 3 names it."""
    return cube in (1, 3)


def tall(value):
    """Half tensors as float32, anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


# ------------------------------------------------------------------------------------------------ products, convolutions


@operator("aclnnMatmul aclnnMm aclnnBatchMatMul aclnnMv", "self other >out cube:int8")
def matmul(self, other, cube, out):
    return numerics.matmul(self, other, hf32=hf32(cube), out=out.dtype)


@operator("aclnnDot", "self other >out")
def dot(self, other):
    return (tall(self) * tall(other)).sum().to(self.dtype)


def scaled_product(self, product, beta, alpha, dtype):
    total = product if alpha == 1 else product * alpha
    return (total if beta == 0 else total + (tall(self) if beta == 1 else tall(self) * beta)).to(dtype)


def wide_product(left, right, cube):
    return numerics.matmul(left, right, hf32=hf32(cube), out=torch.float32 if left.dtype in HALF else left.dtype)


@operator("aclnnAddmm", "self mat1 mat2 beta:scalar alpha:scalar >out cube:int8")
def addmm(self, mat1, mat2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(mat1, mat2, cube), beta, alpha, out.dtype)


@operator("aclnnInplaceAddmm", "self! mat1 mat2 beta:scalar alpha:scalar cube:int8")
def inplace_addmm(self, mat1, mat2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(mat1, mat2, cube), beta, alpha, out.dtype)


@operator("aclnnBaddbmm", "self batch1 batch2 beta:scalar alpha:scalar >out cube:int8")
def baddbmm(self, batch1, batch2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(batch1, batch2, cube), beta, alpha, out.dtype)


@operator(
    "aclnnConvolution",
    "input weight bias stride:ints padding:ints dilation:ints transposed:bool output_padding:ints groups:int >out cube:int8",
)
def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, cube):
    return numerics.convolution(
        input, weight, bias, stride=stride, padding=padding, dilation=dilation, transposed=transposed,
        output_padding=output_padding, groups=groups, hf32=hf32(cube),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- attention


@operator(
    "aclnnFlashAttentionScore",
    "q k v pse drop_mask padding_mask hidden prefix:ints scale:double keep:double before:int after:int heads:int layout:str "
    "inner_precise:int sparse_mode:int >max >sum >softmax >result",
)
def flash_attention(q, k, v, pse, drop_mask, padding_mask, hidden, prefix, scale, keep, before, after, heads, layout, inner, sparse, out):
    if drop_mask is not None and drop_mask.numel() or keep != 1.0:
        raise NotImplementedError("fused attention with dropout")
    if prefix or padding_mask is not None and padding_mask.numel():
        raise NotImplementedError("fused attention with a prefix or a padding mask")
    split = {
        "BNSD": lambda x, n: x,
        "BSND": lambda x, n: x.transpose(1, 2),
        "BSH": lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2),
        "SBH": lambda x, n: x.unflatten(-1, (n, -1)).permute(1, 2, 0, 3),
    }
    if layout not in split:
        raise NotImplementedError(f"fused attention with layout {layout}")
    width = q.shape[-1] // heads if layout in ("BSH", "SBH") else q.shape[-1]
    few = k.shape[-1] // width if layout in ("BSH", "SBH") else heads
    queries, keys, values = split[layout](q, heads), split[layout](k, few), split[layout](v, few)
    hidden = _hidden(hidden, queries.shape[2], keys.shape[2], before, after, sparse)
    found, top, total = numerics.attention(queries, keys, values, scale=scale, hidden=hidden, bias=pse)
    join = {
        "BNSD": lambda x: x,
        "BSND": lambda x: x.transpose(1, 2),
        "BSH": lambda x: x.transpose(1, 2).flatten(2),
        "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    }
    rows = out[0].shape  # (B, H, N, 8): the same number eight times, as the kernel stores it
    return top.expand(rows), total.expand(rows), torch.empty(out[2].shape, dtype=out[2].dtype), join[layout](found)


def _hidden(mask, queries: int, keys: int, before: int, after: int, sparse: int):
    """Which keys are hidden, by the kernel's sparse mode: 0 mask and band, 1 the mask alone, 2 and 3 causal, 4 band."""
    if sparse == 1:
        return None if mask is None else mask.bool()
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    if sparse == 0:
        outside = (j - i > after) | (i - j > before)
        if mask is None:
            return outside if bool(outside.any()) else None
        return mask.bool() | outside
    if sparse == 2:
        return j > i
    if sparse == 3:
        return j - i > keys - queries
    raise NotImplementedError(f"fused attention with sparse mode {sparse}")


# ------------------------------------------------------------------------------------------------- norms and activations


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


@operator("aclnnSilu", "self >out")
def silu(self):
    return numerics.silu(self)


@operator("aclnnGelu", "self >out")
def gelu(self):
    return numerics.gelu(self)


@operator("aclnnGeluV2", "self approximate:int >out")
def gelu_v2(self, approximate):
    return numerics.gelu(self, "tanh" if approximate == 1 else "none")


# ------------------------------------------------------------------------------------------------------- elementwise, one

UNARY = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Erfc": torch.erfc, "Exp": torch.exp, "Exp2": torch.exp2, "Expm1": torch.expm1,
    "Floor": torch.floor, "Log": torch.log, "Log10": torch.log10, "Log1p": torch.log1p, "Log2": torch.log2, "Neg": torch.neg,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Rsqrt": lambda x: 1.0 / torch.sqrt(x),
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Tanh": torch.tanh, "Trunc": torch.trunc, "LogicalNot": torch.logical_not,
    "BitwiseNot": torch.bitwise_not, "IsFinite": torch.isfinite, "IsPosInf": torch.isposinf, "IsNegInf": torch.isneginf,
    "Hardsigmoid": F.hardsigmoid, "Hardswish": F.hardswish, "LogSigmoid": F.logsigmoid, "Mish": F.mish,
}  # fmt: skip
NO_INPLACE = {  # what the wheel asks for out of place alone
    "Abs", "Sign", "LogSigmoid", "BitwiseNot", "IsFinite", "IsPosInf", "IsNegInf", "Neg", "Round", "Trunc",
    "Maximum", "Minimum", "BitwiseOrTensor", "BitwiseOrScalar", "LogicalXor",
}  # fmt: skip


def _enter_unary(name: str, function) -> None:
    def compute(self, out):
        return function(tall(self)).to(out.dtype)

    operator(f"aclnn{name}", "self >out")(compute)
    if name not in NO_INPLACE:
        operator(f"aclnnInplace{name}", "self!")(compute)


for _name, _function in UNARY.items():
    _enter_unary(_name, _function)


@operator("aclnnCast", "self dtype:int32 >out")
def cast(self, dtype, out):
    return self.to(out.dtype)


@operator("aclnnInplaceCopy", "self! source")
def copy(self, source, out):
    return source.to(out.dtype).expand(out.shape)


@operator("aclnnInplaceFillScalar", "self! value:scalar")
def fill(self, value, out):
    return torch.full(out.shape, value, dtype=out.dtype)


@operator("aclnnInplaceFillTensor", "self! value")
def fill_tensor(self, value, out):
    return value.to(out.dtype).expand(out.shape)


@operator("aclnnInplaceZero", "self!")
def zero(self, out):
    return torch.zeros(out.shape, dtype=out.dtype)


@operator("aclnnInplaceOne", "self!")
def one(self, out):
    return torch.ones(out.shape, dtype=out.dtype)


@operator("aclnnClamp", "self low:scalar high:scalar >out")
def clamp(self, low, high, out):
    return torch.clamp(self, low, high).to(out.dtype)


@operator("aclnnClampMin", "self low:scalar >out")
def clamp_min(self, low, out):
    return torch.clamp(self, min=low).to(out.dtype)


@operator("aclnnClampMax", "self high:scalar >out")
def clamp_max(self, high, out):
    return torch.clamp(self, max=high).to(out.dtype)


@operator("aclnnNanToNum", "self nan:float posinf:float neginf:float >out")
def nan_to_num(self, nan, posinf, neginf):
    return torch.nan_to_num(self, nan, posinf, neginf)


# ------------------------------------------------------------------------------------------------------- elementwise, two


def common(self, other):
    """Both in the dtype that torch promotes them to, half ones as float32."""
    dtype = torch.result_type(self, other)
    dtype = torch.float32 if dtype in HALF else dtype
    convert = lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value  # noqa: E731
    return convert(self), convert(other)


def _power(self, other):
    return torch.pow(self, other)


BINARY = {  # name in the tensor form: function; the scalar form has its own name
    "Mul": (torch.mul, "Muls"), "Div": (torch.div, "Divs"), "Maximum": (torch.maximum, None), "Minimum": (torch.minimum, None),
    "PowTensorTensor": (_power, "PowTensorScalar"), "FloorDivide": (torch.floor_divide, "FloorDivides"),
    "RemainderTensorTensor": (torch.remainder, "RemainderTensorScalar"), "FmodTensor": (torch.fmod, "FmodScalar"),
    "Atan2": (torch.atan2, None), "BitwiseAndTensor": (torch.bitwise_and, "BitwiseAndScalar"),
    "BitwiseOrTensor": (torch.bitwise_or, "BitwiseOrScalar"), "BitwiseXorTensor": (torch.bitwise_xor, "BitwiseXorScalar"),
    "LogicalAnd": (torch.logical_and, None), "LogicalOr": (torch.logical_or, None), "LogicalXor": (torch.logical_xor, None),
    "EqTensor": (torch.eq, "EqScalar"), "NeTensor": (torch.ne, "NeScalar"), "LtTensor": (torch.lt, "LtScalar"),
    "LeTensor": (torch.le, "LeScalar"), "GtTensor": (torch.gt, "GtScalar"), "GeTensor": (torch.ge, "GeScalar"),
}  # fmt: skip


def _enter_binary(name: str, function, scalar_name: str | None) -> None:
    def compute(self, other, out):
        return function(*common(self, other)).to(out.dtype)

    operator(f"aclnn{name}", "self other >out")(compute)
    if name not in NO_INPLACE:
        operator(f"aclnnInplace{name}", "self! other")(compute)
    if scalar_name is not None:
        operator(f"aclnn{scalar_name}", "self other:scalar >out")(compute)
        if scalar_name not in NO_INPLACE:
            operator(f"aclnnInplace{scalar_name}", "self! other:scalar")(compute)


for _name, (_function, _scalar) in BINARY.items():
    _enter_binary(_name, _function, _scalar)


@operator("aclnnPowScalarTensor", "self:scalar exponent >out")
def pow_scalar(self, exponent, out):
    return torch.pow(self, tall(exponent)).to(out.dtype)


def add(self, other, alpha, out):
    left, right = common(self, other)
    return torch.add(left, right, alpha=alpha).to(out.dtype)


def sub(self, other, alpha, out):
    left, right = common(self, other)
    return torch.sub(left, right, alpha=alpha).to(out.dtype)


for _name, _function in (("Add", add), ("Sub", sub)):
    operator(f"aclnn{_name}", "self other alpha:scalar >out")(_function)
    operator(f"aclnnInplace{_name}", "self! other alpha:scalar")(_function)
    operator(f"aclnn{_name}s", "self other:scalar alpha:scalar >out")(_function)
    operator(f"aclnnInplace{_name}s", "self! other:scalar alpha:scalar")(_function)

ROUNDING = {0: None, 1: "trunc", 2: "floor"}


def div_mod(self, other, mode, out):
    left, right = common(self, other)
    return torch.div(left, right, rounding_mode=ROUNDING[mode]).to(out.dtype)


operator("aclnnDivMod", "self other mode:int32 >out")(div_mod)
operator("aclnnDivMods", "self other:scalar mode:int32 >out")(div_mod)
operator("aclnnInplaceDivMod", "self! other mode:int32")(div_mod)
operator("aclnnInplaceDivMods", "self! other:scalar mode:int32")(div_mod)


@operator("aclnnAddcmul", "self left right value:scalar >out")
def addcmul(self, left, right, value, out):
    return torch.addcmul(tall(self), tall(left), tall(right), value=value).to(out.dtype)


@operator("aclnnAddcdiv", "self left right value:scalar >out")
def addcdiv(self, left, right, value, out):
    return torch.addcdiv(tall(self), tall(left), tall(right), value=value).to(out.dtype)


@operator("aclnnLerps", "self end weight:scalar >out")
def lerps(self, end, weight, out):
    return torch.lerp(tall(self), tall(end), weight).to(out.dtype)


@operator("aclnnSWhere", "condition self other >out")
def where(condition, self, other, out):
    return torch.where(condition.bool(), self, other).to(out.dtype)


@operator("aclnnInplaceMaskedFillScalar", "self! mask value:scalar")
def masked_fill(self, mask, value):
    return torch.masked_fill(self, mask.bool(), value)


@operator("aclnnInplaceMaskedFillTensor", "self! mask value")
def masked_fill_tensor(self, mask, value):
    return torch.where(mask.bool(), value.to(self.dtype), self)


@operator("aclnnEqual", "self other >out")
def equal(self, other):
    return torch.tensor([torch.equal(self, other)])


# ---------------------------------------------------------------------------------------------------------- reductions


def axes(dims, self):
    return tuple(dims) if dims else tuple(range(self.dim()))


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


# ------------------------------------------------------------------------------------------------------ making, moving


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


# ------------------------------------------------------------------------------------------------------------- chance


def _generator(seed: int, offset: int) -> torch.Generator:
    """A stream of its own: a card's streams differ from the CPU's as well, and are not public."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + offset) & (2**63 - 1))


@operator("aclnnInplaceNormal", "self! mean:float std:float seed:int offset:int")
def normal(self, mean, std, seed, offset, out):
    return torch.empty(out.shape).normal_(mean, std, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnInplaceUniform", "self! low:double high:double seed:uint64 offset:uint64")
def uniform(self, low, high, seed, offset, out):
    return torch.empty(out.shape).uniform_(low, high, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnInplaceRandom", "self! low:int high:int seed:int offset:int")
def random(self, low, high, seed, offset, out):
    return torch.randint(low, high, out.shape, generator=_generator(seed, offset)).to(out.dtype)


