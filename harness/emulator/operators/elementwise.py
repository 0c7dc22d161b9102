"""Elementwise operators of one and of two tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.common import alike, common, upcast
from harness.emulator.table import operator


def _hardsigmoid(x):
    return F.hardsigmoid(x if x.is_floating_point() else x.float())  # the NPU has it for int32


UNARY = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Exp": torch.exp,
    "Exp2": torch.exp2,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "Log": torch.log,
    "Log10": torch.log10,
    "Log1p": torch.log1p,
    "Log2": torch.log2,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Rsqrt": numerics.rsqrt,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sgn,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Trunc": torch.trunc,
    "LogicalNot": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "IsFinite": torch.isfinite,
    "IsPosInf": torch.isposinf,
    "IsNegInf": torch.isneginf,
    "Hardsigmoid": _hardsigmoid,
    "Hardswish": F.hardswish,
    "LogSigmoid": F.logsigmoid,
    "Mish": F.mish,
    "Acosh": torch.acosh,
    "Asinh": torch.asinh,
    "Atanh": torch.atanh,
    "Frac": torch.frac,
    "Sinc": torch.sinc,
    "AngleV2": torch.angle,
    "Signbit": torch.signbit,
}
NO_INPLACE = {  # what the wheel asks for out of place alone
    "Abs",
    "Sign",
    "LogSigmoid",
    "BitwiseNot",
    "IsFinite",
    "IsPosInf",
    "IsNegInf",
    "Neg",
    "Round",
    "Trunc",
    "AngleV2",
    "Signbit",
    "Gcd",
    "LeftShift",
    "LeftShifts",
    "RightShift",
    "LogAddExp",
    "LogAddExp2",
    "XLogYTensor",
    "Maximum",
    "Minimum",
    "BitwiseOrTensor",
    "BitwiseOrScalar",
    "LogicalXor",
}


def _enter_unary(name: str, function) -> None:
    def compute(self, out):
        return function(upcast(self)).to(out.dtype)

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


def clamp(self, low, high, out):
    return torch.clamp(*alike(self, low, high)).to(out.dtype)


def clamp_min(self, low, out):
    return clamp(self, low, None, out)


def clamp_max(self, high, out):
    return clamp(self, None, high, out)


operator("aclnnClamp", "self low:scalar high:scalar >out")(clamp)
operator("aclnnClampTensor", "self low high >out")(clamp)
for _name, _function in (("ClampMin", clamp_min), ("ClampMax", clamp_max)):
    operator(f"aclnn{_name}", "self bound:scalar >out")(_function)
    operator(f"aclnn{_name}Tensor", "self bound >out")(_function)
    operator(f"aclnnInplace{_name}Tensor", "self! bound")(_function)
operator("aclnnInplaceClampMax", "self! high:scalar")(clamp_max)


def nan_to_num(self, nan, posinf, neginf):
    return torch.nan_to_num(self, nan, posinf, neginf)


operator("aclnnNanToNum", "self nan:float posinf:float neginf:float >out")(nan_to_num)
operator("aclnnInplaceNanToNum", "self! nan:float posinf:float neginf:float")(nan_to_num)


BINARY = {  # name in the tensor form: function; the scalar form has its own name
    "Mul": (torch.mul, "Muls"),
    "Div": (torch.div, "Divs"),
    "Maximum": (torch.maximum, None),
    "Minimum": (torch.minimum, None),
    "PowTensorTensor": (torch.pow, "PowTensorScalar"),
    "FloorDivide": (torch.floor_divide, "FloorDivides"),
    "RemainderTensorTensor": (torch.remainder, "RemainderTensorScalar"),
    "FmodTensor": (torch.fmod, "FmodScalar"),
    "Atan2": (torch.atan2, None),
    "BitwiseAndTensor": (torch.bitwise_and, "BitwiseAndScalar"),
    "BitwiseOrTensor": (torch.bitwise_or, "BitwiseOrScalar"),
    "BitwiseXorTensor": (torch.bitwise_xor, "BitwiseXorScalar"),
    "LogicalAnd": (torch.logical_and, None),
    "LogicalOr": (torch.logical_or, None),
    "LogicalXor": (torch.logical_xor, None),
    "EqTensor": (torch.eq, "EqScalar"),
    "NeTensor": (torch.ne, "NeScalar"),
    "LtTensor": (torch.lt, "LtScalar"),
    "LeTensor": (torch.le, "LeScalar"),
    "GtTensor": (torch.gt, "GtScalar"),
    "GeTensor": (torch.ge, "GeScalar"),
    "Gcd": (torch.gcd, None),
    "LeftShift": (torch.bitwise_left_shift, "LeftShifts"),
    "RightShift": (torch.bitwise_right_shift, None),
    "LogAddExp": (torch.logaddexp, None),
    "LogAddExp2": (torch.logaddexp2, None),
    "XLogYTensor": (torch.xlogy, "XLogYScalarOther"),
}


def fitting(self, other, out):
    """Both in one dtype; in place, CANN refuses one that the output cannot take."""
    dtype = torch.result_type(self, other)
    if not torch.can_cast(dtype, out.dtype):
        raise TypeError(f"result type {dtype} can't be cast to the desired output type {out.dtype}")
    return common(self, other)


COMPARED = (
    torch.eq,
    torch.ne,
    torch.lt,
    torch.le,
    torch.gt,
    torch.ge,
)  # in the dtype of both: a scalar is rounded to it


def _enter_binary(name: str, function, scalar_name: str | None) -> None:
    def compute(self, other, out):
        if function in COMPARED:
            return function(self, other).to(out.dtype)
        return function(*(fitting(self, other, out) if function is torch.mul else common(self, other))).to(out.dtype)

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
    return torch.pow(self, upcast(exponent)).to(out.dtype)


def add(self, other, alpha, out):
    left, right = fitting(self, other, out)
    return torch.add(left, right, alpha=alpha).to(out.dtype)


def sub(self, other, alpha, out):
    left, right = fitting(self, other, out)
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


@operator("aclnnAddV3", "self:scalar other alpha:scalar >out")
def add_to_scalar(self, other, alpha, out):
    return torch.add(torch.mul(upcast(other), alpha), self).to(out.dtype)


def rsub(self, other, alpha, out):
    if not isinstance(other, torch.Tensor):
        other = torch.tensor(other, dtype=out.dtype)  # the scalar is rounded first
    return torch.rsub(*common(self, other), alpha=alpha).to(out.dtype)


operator("aclnnRsub", "self other alpha:scalar >out")(rsub)
operator("aclnnRsubs", "self other:scalar alpha:scalar >out")(rsub)


@operator("aclnnRemainderScalarTensor", "self:scalar other >out")
def remainder_of_scalar(self, other, out):
    return torch.remainder(self, upcast(other)).to(out.dtype)


@operator("aclnnXLogYScalarSelf", "self:scalar other >out")
def xlogy_of_scalar(self, other, out):
    return torch.xlogy(self, upcast(other)).to(out.dtype)


@operator("aclnnLessScalar", "self bound:scalar >out")
def at_most(self, bound, out):
    """What torch_npu asks for as `bound >= self`: no CANN has the name, and the path that an NPU falls back to includes
    equality.
    """
    return torch.le(self, bound).to(out.dtype)


@operator("aclnnIsClose", "self other rtol:double atol:double equal_nan:bool >out")
def is_close(self, other, rtol, atol, equal_nan):
    return torch.isclose(*common(self, other), rtol=rtol, atol=atol, equal_nan=equal_nan)


def is_in(element, tests, unique, invert):
    return torch.isin(upcast(element), upcast(tests), assume_unique=unique, invert=invert)


operator("aclnnIsInScalarTensor", "element:scalar tests unique:bool invert:bool >out")(is_in)
operator("aclnnIsInTensorScalar", "element test:scalar unique:bool invert:bool >out")(is_in)


def round_decimals(self, decimals, out):
    return (
        torch.round(upcast(self), decimals=decimals).to(out.dtype) if self.is_floating_point() else self.to(out.dtype)
    )


operator("aclnnRoundDecimals", "self decimals:int >out")(round_decimals)
operator("aclnnInplaceRoundDecimals", "self! decimals:int")(round_decimals)


@operator("aclnnComplex", "real imag >out")
def complex_of(real, imag, out):
    return torch.complex(*common(real, imag)).to(out.dtype)


@operator("aclnnPolar", "length angle >out")
def polar(length, angle, out):
    return torch.polar(*common(length, angle)).to(out.dtype)


def addcmul(self, left, right, value, out):
    return torch.addcmul(*alike(self, left, right), value=value).to(out.dtype)


def addcdiv(self, left, right, value, out):
    return torch.addcdiv(*alike(self, left, right), value=value).to(out.dtype)


for _name, _function in (("Addcmul", addcmul), ("Addcdiv", addcdiv)):
    operator(f"aclnn{_name}", "self left right value:scalar >out")(_function)
    operator(f"aclnnInplace{_name}", "self! left right value:scalar")(_function)


def lerp(self, end, weight, out):
    shape = torch.broadcast_shapes(self.shape, end.shape, getattr(weight, "shape", ()))
    if tuple(shape) != tuple(out.shape):
        raise ValueError(
            f"CheckShape failed: the inputs broadcast to {tuple(shape)} and the result has {tuple(out.shape)}"
        )
    return torch.lerp(*alike(self, end, weight)).to(out.dtype)


operator("aclnnLerp", "self end weight >out")(lerp)
operator("aclnnLerps", "self end weight:scalar >out")(lerp)
operator("aclnnInplaceLerp", "self! end weight")(lerp)
operator("aclnnInplaceLerps", "self! end weight:scalar")(lerp)


@operator("aclnnMaskedScale", "self mask scale:float >out")
def masked_scale(self, mask, scale, out):
    return (upcast(self) * upcast(mask) * scale).to(out.dtype)


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


@operator("aclnnQuantize", "self scales zero_points dtype:int32 axis:int32 >out")
def quantize(self, scales, zero_points, dtype, axis, out):
    """By one scale and zero point, or by one of each along an axis; what exceeds the dtype is cut to its ends."""
    shape = [1] * self.dim()
    if scales.numel() != 1:
        shape[axis] = -1
    result = self.float() / scales.float().reshape(shape)
    if zero_points is not None:
        result += zero_points.float().reshape(shape)
    ends = torch.iinfo(out.dtype)
    if ends.bits == 32:
        result = result.double()  # its ends are no float32
    return result.round_().nan_to_num_(0).clamp_(ends.min, ends.max).to(out.dtype)
