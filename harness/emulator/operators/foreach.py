"""Operators on lists of tensors."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import common, upcast
from harness.emulator.operators.elementwise import UNARY
from harness.emulator.table import operator

_NAMES = (
    "Abs Acos Asin Atan Cos Cosh Erf Erfc Exp Expm1 Log Log10 Log1p Log2 Neg Reciprocal Sigmoid Sign Sin Sinh "
        "Sqrt Tan Tanh"
).split()  # fmt: skip


def _each(function, *lists):
    """The function over the lists side by side, results in the dtype of the first list's tensors."""
    return [function(*members).to(members[0].dtype) for members in zip(*lists, strict=True)]


def _enter_unary(name: str, function) -> None:
    @operator(f"aclnnForeach{name}", "self:tensors >out:tensors")
    def compute(self):
        return _each(lambda value: function(upcast(value)), self)


for _name in _NAMES:
    _enter_unary(_name, UNARY[_name])


def _stepwise(value):
    """bfloat16 wide, float16 as it is: the kernels of lists round each step to it (hicann/ops-nn,
    foreach_sub_list.cpp).
    """
    return value.float() if value.dtype == torch.bfloat16 else value


def _plus(self, addend, factor):
    """A scaled sum is one step, rounded once."""
    return upcast(self) + upcast(addend) * factor


def _minus(self, subtrahend, factor):
    return _stepwise(self) - _stepwise(subtrahend) * factor


def _larger(self, other):
    return torch.maximum(self, torch.as_tensor(other, dtype=self.dtype))


def _smaller(self, other):
    return torch.minimum(self, torch.as_tensor(other, dtype=self.dtype))


BINARY = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Maximum": _larger,
    "Minimum": _smaller,
}
SCALED = {"Add": _plus, "Sub": _minus}


def _enter_binary(name: str, function) -> None:
    def each(self, others):
        return _each(lambda left, right: function(*common(left, right)), self, others)

    def with_one(self, other):
        return each(self, [other.item() if isinstance(other, torch.Tensor) else other] * len(self))

    operator(f"aclnnForeach{name}ScalarList", "self:tensors others:scalars >out:tensors")(each)
    operator(f"aclnnForeach{name}Scalar", "self:tensors other >out:tensors")(with_one)
    operator(f"aclnnForeach{name}ScalarV2", "self:tensors other:scalar >out:tensors")(with_one)
    if name not in SCALED:
        operator(f"aclnnForeach{name}List", "self:tensors others:tensors >out:tensors")(each)
        return

    def scaled(self, others, alpha):
        alpha = alpha.item() if isinstance(alpha, torch.Tensor) else alpha
        return _each(lambda left, right: SCALED[name](left, right, alpha), self, others)

    operator(f"aclnnForeach{name}List", "self:tensors others:tensors alpha >out:tensors")(scaled)
    operator(f"aclnnForeach{name}ListV2", "self:tensors others:tensors alpha:scalar >out:tensors")(scaled)


for _name, _function in BINARY.items():
    _enter_binary(_name, _function)


@operator("aclnnForeachPowScalarAndTensor", "base:scalar exponents:tensors >out:tensors")
def pow_of_scalar(base, exponents):
    return _each(lambda exponent: torch.pow(base, upcast(exponent)), exponents)


def _enter_pointwise(name: str, function) -> None:
    def each(self, left, right, factors):
        factors = factors.tolist() if isinstance(factors, torch.Tensor) else factors
        return _each(
            lambda one, two, three, by: _plus(one, function(_stepwise(two), _stepwise(three)), by),
            self,
            left,
            right,
            factors,
        )

    def with_one(self, left, right, factor):
        return each(self, left, right, [factor.item() if isinstance(factor, torch.Tensor) else factor] * len(self))

    lists = "self:tensors left:tensors right:tensors"
    operator(f"aclnnForeach{name}Scalar", f"{lists} factor >out:tensors")(with_one)
    operator(f"aclnnForeach{name}ScalarV2", f"{lists} factor:scalar >out:tensors")(with_one)
    operator(f"aclnnForeach{name}ScalarList", f"{lists} factors >out:tensors")(each)


_enter_pointwise("Addcdiv", torch.div)
_enter_pointwise("Addcmul", torch.mul)


@operator("aclnnForeachLerpList", "self:tensors ends:tensors weights:tensors >out:tensors")
def lerp(self, ends, weights):
    return _each(lambda start, end, weight: torch.lerp(upcast(start), upcast(end), upcast(weight)), self, ends, weights)


@operator("aclnnForeachLerpScalar", "self:tensors ends:tensors weight:scalar >out:tensors")
def lerp_by_one(self, ends, weight):
    return _each(lambda start, end: torch.lerp(upcast(start), upcast(end), weight), self, ends)


ROUNDING = {1: torch.round, 2: torch.floor, 3: torch.ceil, 5: torch.trunc, 7: torch.frac}


def round_off(self, mode):
    return _each(lambda value: ROUNDING[int(mode)](upcast(value)), self)


operator("aclnnForeachRoundOffNumber", "self:tensors mode >out:tensors")(round_off)
operator("aclnnForeachRoundOffNumberV2", "self:tensors mode:scalar >out:tensors")(round_off)


def _specs(out) -> list:
    return out if isinstance(out, list) else [out]


@operator("aclnnForeachNorm", "self:tensors order:scalar >out:tensors")
def norm(self, order, out):
    return [
        torch.linalg.vector_norm(upcast(value), order).to(spec.dtype).reshape(spec.shape)
        for value, spec in zip(self, _specs(out), strict=True)
    ]


@operator("aclnnForeachCopy", "self:tensors >out:tensors")
def copy(self, out):
    return [value.to(spec.dtype).expand(spec.shape) for value, spec in zip(self, _specs(out), strict=True)]


@operator("aclnnForeachZeroInplace", "self!:tensors")
def zero(self):
    return [torch.zeros_like(value) for value in self]
