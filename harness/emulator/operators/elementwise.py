"""Elementwise operators of one and of two tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness.emulator.operators.common import common, tall
from harness.emulator.table import operator

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


BINARY = {  # name in the tensor form: function; the scalar form has its own name
    "Mul": (torch.mul, "Muls"), "Div": (torch.div, "Divs"), "Maximum": (torch.maximum, None), "Minimum": (torch.minimum, None),
    "PowTensorTensor": (torch.pow, "PowTensorScalar"), "FloorDivide": (torch.floor_divide, "FloorDivides"),
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
