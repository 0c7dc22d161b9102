"""The error that a healthy device would show: the CPU runs once more, with the rounding rules of the switches in force.

    with rounding(rules_of(device.stack)):
        outputs = model(inputs)

Every ATen operator is computed by the CPU. Those whose rounding `numerics` states, products, convolutions, fused
attention, GELU, SiLU and layer norm, are computed by those rules instead; composite operators end at the same rounding
because they are made of them. What is not float32, float16 or bfloat16, and what is not on the CPU, passes untouched.
Gradients of products, convolutions and GELU are rounded likewise; those of the other operators are the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from harness import numerics
from harness.torch_private import (
    Together,
    TorchDispatchMode,
    added_mask,
    aten_operator,
    attention_by_products,
    has_kernel,
    returns_new,
    tree_leaves,
    tree_map,
)

if TYPE_CHECKING:
    from harness.devices import Stack

aten = torch.ops.aten
_DTYPES = (torch.float32, *numerics.HALF)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a family of chips rounds under its switches. `str()` says it in one line.

    Raises: ValueError for operands that are not in `numerics.OPERANDS`, other ties than "away" and "even", groups below
    one.
    """

    family: str = "Ascend A2"  # of chips; "CUDA" of NVIDIA's
    conv: str = "float32"  # what float32 operands of convolutions are rounded to
    matmul: str = "float32"  # and those of other products
    ties: str = "away"  # of HF32; those of TF32 go away from zero, those of float16 to even
    groups: int = numerics.GROUPS  # parts that the sum of a product is made of
    gelu_tanh: bool = True  # GELU takes its tanh formula, whatever is asked for
    # Attention is one operator unless its mask is of floats; otherwise it is made of its products.
    fused_attention: bool = True
    narrow_attention: bool = False  # and unless a head is wider than 256: compatible_impl
    saturates: bool = False  # float16 results that overflow are cut to the largest number, NaN is 0
    half_results: bool = False  # float32 products that are computed in float16 are rounded to it, too
    # How the vector unit computes, where that is not as `numerics` says.
    vector: numerics.Vector = numerics.Vector()  # noqa: RUF009  frozen
    split_attention: bool = False  # attention of float32 in three products of TF32, as CUDA's
    half_sums: bool = False  # running sums and the statistics of group norm are kept in a half dtype, as CUDA's
    overflow_alone: bool = False  # all is computed as the CPU does, and of these rules `saturates` alone holds
    random: int | None = None  # a seed: results are moved by a last place at random (`numerics.random_rounding`)

    def __post_init__(self):
        for name in ("conv", "matmul"):
            if getattr(self, name) not in numerics.OPERANDS:
                raise ValueError(f"{name} takes {', '.join(numerics.OPERANDS)}, not {getattr(self, name)!r}")
        if self.ties not in ("away", "even"):
            raise ValueError(f"ties go 'away' or to 'even', not {self.ties!r}")
        if self.groups < 1:
            raise ValueError(f"a sum has at least one part, not {self.groups}")

    @property
    def modes(self) -> tuple[str, ...]:
        """What float32 is computed in besides float32: "HF32" of whatever width, "TF32", "float16"."""
        return tuple(sorted({text.partition(" ")[0] for text in (self.conv, self.matmul)} - {"float32"}))

    def operands(self, kind: str) -> numerics.Operands:
        """What a product makes of its float32 operands; `kind` is `conv` or `matmul` of these rules."""
        return numerics.Operands(kind=kind, ties=self.ties, saturates=self.saturates, half_results=self.half_results)

    def __str__(self) -> str:
        if self.overflow_alone:
            return "float16 saturates"
        products = self.matmul if self.matmul == "float32" else f"in {self.matmul}"
        convolutions = self.conv if self.conv == "float32" else f"in {self.conv}"
        gelu = "GELU by its tanh formula" if self.gelu_tanh else "GELU as it is asked for"
        overflow = ", float16 saturates" if self.saturates else ""
        return f"{self.family}: convolutions {convolutions}, products {products}, {gelu}{overflow}"


def rules_of(stack: Stack) -> Rules | None:
    """The rules that the SoC and the switches of a stack put in force; None for the CPU, whose own arithmetic is the
    forecast, and for a SoC of which nobody says how it rounds.

    A switch that torch_npu does not tell is taken as its default. torch_npu reads compatible_impl at its first GELU and
    keeps it for the process; what is set later the stack tells and the device does not follow.
    """
    if stack.backend in ("npu", "emulated"):
        family = numerics.family_of(stack.device)
        return _ascend(family, stack) if family.known else None
    if stack.backend == "cuda":
        return Rules(
            family="CUDA",
            conv="TF32" if stack.conv_allow_tf32 else "float32",
            matmul="TF32" if stack.matmul_allow_tf32 else "float32",
            gelu_tanh=False,
            fused_attention=False,
            split_attention=True,
            half_sums=True,
        )
    return None


def overflow_of(stack: Stack, dtype: torch.dtype) -> Rules | None:
    """Rules under which the CPU computes as it does and overflows as the device; None where that is what the CPU does
    by itself.

    Where half saturates, what a float16 operator cannot hold is 65504 on the device, and what follows goes on with
    that.
    """
    return Rules(saturates=True, overflow_alone=True) if dtype == torch.float16 and _saturates(stack) else None


def _saturates(stack: Stack) -> bool:
    if stack.backend not in ("npu", "emulated"):
        return False
    return bool(numerics.family_of(stack.device).saturates) if stack.inf_nan_mode is None else not stack.inf_nan_mode


PRECISION_MODES = {
    "must_keep_origin_dtype": False,
    "allow_fp32_to_fp16": True,
}  # whether float32 products may run in float16


def _ascend(family: numerics.Family, stack: Stack) -> Rules:
    """The rules of a family under the switches. Stated: Ascend/pytorch, EnvVariables.cpp and CalcuOpUtil.cpp;
    op-plugin, OpUtils.cpp.
    """
    half = PRECISION_MODES.get(stack.precision_mode or "", family.allows_float16)
    conv = numerics.cube_type(allow_hf32=stack.conv_allow_hf32 is not False, allow_float16=half)
    matmul = numerics.cube_type(allow_hf32=bool(stack.matmul_allow_hf32), allow_float16=half)
    if stack.cube_math_type in range(5):  # torch.npu.matmul.cube_math_type is for products alone
        matmul = stack.cube_math_type
    return Rules(
        family=f"Ascend {family.name}",
        conv=_kind(family, conv),
        matmul=_kind(family, matmul),
        gelu_tanh=family.gelu_tanh and not stack.compatible_impl,
        fused_attention=family.fused_attention,
        narrow_attention=bool(stack.compatible_impl),
        saturates=_saturates(stack),
        half_results=family.float32,
    )


def _kind(family: numerics.Family, cube: int) -> str:
    """What float32 operands are rounded to; float32 where the chip refuses what it is asked for, since no number comes
    out then.
    """
    try:
        return family.operands(cube)
    except numerics.NoFloat32:
        return "float32"


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """Something that the rules take as given and no measurement of an NPU supports, made otherwise."""

    what: str  # what an NPU would do then, to be read after "if"
    changes: Mapping[str, Any]  # fields of `Rules`
    half_alone: bool = False  # nothing changes for float32
    float16_alone: bool = False

    def applies(self, rules: Rules, dtype: str) -> bool:
        """Whether a model in a dtype is computed otherwise then."""
        if (self.float16_alone and dtype != "float16") or (self.half_alone and dtype == "float32"):
            return False
        return replace(rules, **self.changes) != rules


# What an NPU may do otherwise and moves sound rows beyond their limits, or to three quarters of them (float16).
# `python -m harness.conformance detection` tries these, and others that move none: other parts and orders of sums, one
# pass, tiles, errors of either sign.
ASSUMPTIONS = (
    Assumption(
        what="exp, tanh, sqrt and their like were always two last places of float32 too large",
        changes={"vector": numerics.Vector(places=2, upwards=True)},
    ),
    Assumption(
        what="exp, tanh, sqrt and their like were computed in float16 and up to a last place off",
        changes={"vector": numerics.Vector(half=True, half_places=1)},
        float16_alone=True,
    ),
    Assumption(
        what="half results of elementwise operators were rounded with ties away from zero",
        changes={"vector": numerics.Vector(ties_away=True)},
        half_alone=True,
    ),
)


def alternatives(rules: Rules, dtype: str) -> Iterator[tuple[str, Rules]]:
    """The rules with one assumption made otherwise, for each that matters in a dtype, and what an NPU would do then."""
    for assumption in ASSUMPTIONS:
        if assumption.applies(rules, dtype):
            yield assumption.what, replace(rules, **assumption.changes)


@contextlib.contextmanager
def rounding(rules: Rules | None) -> Iterator[None]:
    """While the block runs, CPU models compute by `rules`; with None nothing changes."""
    with Together(modes_of(rules)):
        yield


def modes_of(rules: Rules | None) -> list[AbstractContextManager]:
    """The modes of torch by which `rounding` works, to be entered in this order in each thread that runs the model."""
    if rules is None:
        return []
    mode = _Rounding(rules)
    randomly = [] if rules.random is None else [numerics.RandomRoundings(rules.random, _dropped(rules))]
    return [mode, _Attention(mode), *randomly]


DROPPED = {"HF32": 12, "HF32 of 10 bits": 13, "TF32": 13, "float16": 13}  # mantissa bits of float32 that operands lose


def _dropped(rules: Rules) -> dict[Any, int]:
    """How many mantissa bits of float32 operands an operator drops under these rules; those that drop none are left
    out.
    """
    if rules.overflow_alone:
        return {}
    kinds = {_convolution: rules.conv, _convolution_backward: rules.conv, _time_convolution: rules.conv}
    kinds |= {_product: rules.matmul, _added_product: rules.matmul, _added_sum_of_products: rules.matmul}
    return {name: DROPPED[kinds[rule]] for name, rule in RULES.items() if kinds.get(rule, "float32") != "float32"}


class _Rounding(TorchDispatchMode):
    """Computes the operators in `RULES` by their rules, and all others as the CPU does."""

    def __init__(self, rules: Rules):
        super().__init__()
        self.rules, self.instead = rules, _otherwise(rules.vector)
        self.resting = False  # inside a rule that ran outside of a dispatch, where this mode sees its operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.resting:
            return func(*args, **kwargs)
        if func.overloadpacket is aten.scaled_dot_product_attention:
            with self:
                return self.attend(func, *args, **kwargs)
        rule = self.instead.get(func.overloadpacket) or RULES.get(func.overloadpacket)
        rule = None if self.rules.overflow_alone else rule
        if rule is not None and _is_ours(args):
            return self._saturated(_laid_out(func, _computed(rule, self.rules, func, args, kwargs)))
        if _is_composite(func):  # seen in inference mode, which does not take composites apart before
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        return self._saturated(result if self.rules.overflow_alone else _laid_out(func, result))

    def _saturated(self, result: Any) -> Any:
        """What an operator returned, cut in place where half results saturate."""
        if self.rules.saturates:
            for leaf in tree_leaves(result):
                if (
                    isinstance(leaf, Tensor)
                    and leaf.dtype == torch.float16
                    and _is_ours((leaf,))
                    and not bool(leaf.isfinite().all())
                ):
                    leaf.copy_(numerics.saturated(leaf))
        return result

    def attend(
        self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """F.scaled_dot_product_attention; `func` computes it where there is no rule."""
        options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        elsewhere = self.rules.overflow_alone or not _is_ours(
            (query, key, value)
        )  # what it is made of comes here again
        if elsewhere or dropout_p or (is_causal and attn_mask is not None):
            return getattr(func, "decompose", func)(query, key, value, attn_mask, **options)
        if self.rules.split_attention and _fits_split(query, key, value):
            return self._split(query, key, value, attn_mask, is_causal, scale)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        if wanted or not _fits_fused(self.rules, query, key, value, attn_mask, enable_gqa):
            return attention_by_products(query, key, value, attn_mask, **options)
        with self._at_rest():
            return self._saturated(_fused_attention(self.rules, query, key, value, attn_mask, is_causal, scale))

    def _split(self, query, key, value, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
        hidden = _causal(query, key) if is_causal else None
        bias = added_mask(mask, query.dtype)
        with self._at_rest():
            return numerics.split_attention(query, key, value, scale=_scale(query, scale), bias=bias, hidden=hidden)

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The operators of a rule pass untouched."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False


class _Attention(TorchFunctionMode):
    """Sees attention before the CPU makes a mask of floats out of one of bools, which an NPU treats otherwise."""

    def __init__(self, mode: _Rounding):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self.mode.attend(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_ours(args: tuple) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(tensors) and all(
        tensor.dtype in _DTYPES and tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors
    )


KEEP_STRIDES = (
    "clone",
    "_to_copy",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "empty_strided",
    "new_empty_strided",
)


def _laid_out(func, result: Any) -> Any:
    """What an operator computed, contiguous as torch_npu returns it; the CPU would keep the strides of the operands.

    Strides decide in which order what follows sums. Copies and tensors that are made like another keep their strides on
    both sides, and a view or what was written into is left as it is.
    """
    if func.overloadpacket.__name__ in KEEP_STRIDES or not returns_new(func):
        return result
    return tree_map(
        lambda tensor: tensor.contiguous() if isinstance(tensor, Tensor) and _is_ours((tensor,)) else tensor, result
    )


@functools.cache  # and no table of our own: what a table holds would count as code in a store's key
def _is_composite(func) -> bool:
    return has_kernel(func.name(), "CompositeImplicitAutograd")


def _computed(rule: Callable, rules: Rules, func, args: tuple, kwargs: dict) -> Any:
    """What a rule gives, put where an in-place or out= form wants it."""
    if not func._schema.is_mutable:
        return rule(rules, *args, **kwargs)
    written = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    kwargs = dict(kwargs)
    targets = [kwargs.pop(name) if name in kwargs else args[0] for name in written]
    result = rule(rules, *args, **kwargs)
    for target, value in zip(targets, result if isinstance(result, tuple) else (result,)):
        if target.shape != value.shape:
            target.resize_(value.shape)
        target.copy_(value)
    first, *others = targets
    return (first, *others) if others else first


# -------- the rules

RULES: dict[Any, Callable] = {}


def _rule(*names: str) -> Callable:
    """Enter the meaning of ATen operators, with their arguments in order; it answers for their in-place and out= forms
    too.

    An operator that this torch lacks is one that no model can call.
    """

    def enter(compute: Callable) -> Callable:
        RULES.update({known: compute for name in names if (known := aten_operator(name)) is not None})
        return compute

    return enter


@_rule("mm", "bmm", "mv")
def _product(rules: Rules, left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return numerics.matmul(left, right, operands=rules.operands(rules.matmul), out=out_dtype, groups=rules.groups)


@_rule("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_")
def _added_product(rules: Rules, self, left, right, out_dtype=None, *, beta=1, alpha=1):
    product = _product(rules, left, right, torch.float32)
    return numerics.scaled_product(self, product, beta, alpha, out_dtype or left.dtype)


@_rule("addbmm", "addbmm_")
def _added_sum_of_products(rules: Rules, self, left, right, *, beta=1, alpha=1):
    return _added_product(rules, self, left.transpose(0, 1).flatten(1), right.flatten(0, 1), beta=beta, alpha=alpha)


@_rule("convolution")
def _convolution(rules: Rules, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    options = dict(stride=stride, padding=padding, dilation=dilation, transposed=transposed, groups=groups)
    exact = "HF32" in rules.conv and numerics.cuts_in_pieces(x, weight, **options)
    operands = rules.operands("float32" if exact else rules.conv)
    result = numerics.convolution(x, weight, bias, output_padding=output_padding, operands=operands, **options)
    return result.contiguous()  # as torch_npu returns it: strides decide in which order what follows sums


@_rule("convolution_backward")
def _convolution_backward(
    rules: Rules, grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
):
    options = dict(
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=output_padding,
        groups=groups,
    )
    result = numerics.convolution_backward(
        grad, x, weight, wanted=wanted, operands=rules.operands(rules.conv), **options
    )
    return (*result[:2], None if result[2] is None else result[2].to(weight.dtype))


@_rule("gelu_backward")
def _gelu_backward(rules: Rules, grad, x, *, approximate="none"):
    return numerics.wide(aten.gelu_backward, grad, x, approximate="tanh" if rules.gelu_tanh else approximate).to(
        x.dtype
    )


@_rule("conv_tbc")
def _time_convolution(rules: Rules, x, weight, bias, pad=0):
    result = _convolution(rules, x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, (1,), (pad,), (1,), False, (0,), 1)
    return result.permute(2, 0, 1)


@_rule("gelu", "gelu_")
def _gelu(rules: Rules, x, *, approximate="none"):
    return numerics.gelu(x, "tanh" if rules.gelu_tanh else approximate)


@_rule("silu", "silu_")
def _silu(rules: Rules, x):
    return numerics.silu(x)


@_rule("rsqrt", "rsqrt_")
def _rsqrt(rules: Rules, x):
    return numerics.rsqrt(x)


@_rule("dot")
def _dot(rules: Rules, left, right):
    return numerics.dot(left, right)


@_rule("native_layer_norm")
def _layer_norm(rules: Rules, x, shape, weight, bias, eps):
    y, mean, rstd = numerics.layer_norm(x, tuple(range(-len(shape), 0)), weight, bias, eps)
    statistics_dtype = x.dtype if weight is None else weight.dtype
    return y.to(x.dtype).contiguous(), mean.to(statistics_dtype), rstd.to(statistics_dtype)


@_rule("cumsum", "cumsum_")
def _running_sum(rules: Rules, x, dim, *, dtype=None):
    if rules.half_sums and dtype in (None, x.dtype) and x.dtype in numerics.HALF and x.numel() and x.dim():
        return numerics.running_sum_in_half(x, dim)
    return _as_asked(numerics.running_sum, x, dim, dtype)


@_rule("cumprod", "cumprod_")
def _running_product(rules: Rules, x, dim, *, dtype=None):
    return _as_asked(numerics.running_product, x, dim, dtype)


def _as_asked(running: Callable, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """A running sum or product in the dtype that was asked for: of int32 numbers torch makes int64 ones by itself."""
    return running(x, dim) if dtype is None else running(x.to(dtype), dim).to(dtype)


def _spread(
    x: Tensor, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction=None
) -> tuple[Tensor, Tensor]:
    """The variance and the mean by any overload of aten.var: the axes may be left out before `unbiased`."""
    dim, unbiased = (None, dim) if isinstance(dim, bool) else (dim, unbiased)
    axes = [dim] if isinstance(dim, int) else dim
    return numerics.variance(x, axes, int(unbiased) if correction is None else correction, keepdim)


def _enter_spread(name: str, results: Callable) -> None:
    """`results` makes what the operator returns of the variance and the mean."""

    def compute(rules: Rules, x, *args, **options):
        computed = tuple(result.to(x.dtype) for result in results(*_spread(x, *args, **options)))
        return computed if len(computed) > 1 else computed[0]

    RULES[aten_operator(name)] = compute


_enter_spread("var", lambda var, mean: (var,))
_enter_spread("std", lambda var, mean: (var.sqrt(),))
_enter_spread("var_mean", lambda var, mean: (var, mean))
_enter_spread("std_mean", lambda var, mean: (var.sqrt(), mean))


@_rule("native_batch_norm")
def _batch_norm(rules: Rules, x, weight, bias, running_mean, running_var, training, momentum, eps):
    if not training:
        return aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return numerics.batch_norm(x, weight, bias, running_mean, running_var, momentum, eps)


@_rule("native_group_norm")
def _group_norm(rules: Rules, x, weight, bias, count, channels, size, groups, eps):
    if rules.half_sums and x.dtype in numerics.HALF and x.numel():
        return numerics.group_norm_of_half(x, weight, bias, count, channels, size, groups, eps)
    return aten.native_group_norm(x, weight, bias, count, channels, size, groups, eps)


@_rule("_log_softmax")
def _log_softmax(rules: Rules, x, dim, half_to_float):
    return F.log_softmax(x, dim, dtype=torch.float32).to(torch.float32 if half_to_float else x.dtype)


@_rule("pow", "pow_")
def _power(rules: Rules, x, exponent):
    wide = [tensor.float() if isinstance(tensor, Tensor) else tensor for tensor in (x, exponent)]
    return torch.pow(*wide).to(torch.result_type(x, exponent))


def _enter_wide(name: str) -> None:
    """Elementwise operators and resampling round half results once; the CPU rounds on the way in these."""
    resample = aten_operator(name)
    if resample is None:
        return

    def compute(rules: Rules, *args):
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return resample(*wide).to(args[0].dtype)

    RULES[resample] = compute


for _name in ("upsample_bicubic2d", "upsample_bilinear2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"):
    _enter_wide(_name)


@_rule("_scaled_dot_product_flash_attention_for_cpu")
def _flash_attention(rules: Rules, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """Reached where attention was called past `_Attention`, from C++; a mask of bools has become one of floats
    there.
    """
    mask = None if attn_mask is None else attn_mask.float()
    hidden = _causal(query, key) if is_causal else None
    result, top, total = numerics.attention(query, key, value, scale=_scale(query, scale), hidden=hidden, bias=mask)
    return result, (top + total.log()).squeeze(-1)


OTHERWISE = {  # operators of ATen: the method of `numerics.VectorUnit` that computes them
    "pow": "power",
    "gelu": "gelu",
    "silu": "silu",
    "mean": "mean",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
}


@functools.cache
def _otherwise(vector: numerics.Vector) -> dict[Any, Callable]:
    """The operators that a vector unit computes otherwise, by ATen's overload packet; none by default."""
    table = {name: _by_unit(vector, method) for name, method in OTHERWISE.items() if method in vector.operators}
    table |= {name: _by_unit(vector, "elementwise", name) for name in numerics.FUNCTIONS if name in vector.operators}
    table |= {name: _by_unit(vector, "arithmetic", name) for name in numerics.ARITHMETIC if name in vector.operators}
    return {known: rule for name, rule in table.items() if (known := aten_operator(name)) is not None}


def _by_unit(vector: numerics.Vector, method: str, *first: str) -> Callable:
    """A rule by which a method of a vector unit computes, from `first` and the operator's arguments."""

    def rule(rules: Rules, *args, **options) -> Any:
        dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
        if method == "gelu" and rules.gelu_tanh:
            options["approximate"] = "tanh"
        return getattr(vector.unit(dtype), method)(*first, *args, **options)

    return rule


HEADS, _WIDEST = 2048, 512  # N_LIMIT and D_LIMIT of ScaledDotProductAttentionKernelNpuOpApi.cpp
NARROW = 256  # the widest head where compatible_impl is on


def _fits_fused(
    rules: Rules, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared_heads: bool
) -> bool:
    """Whether torch_npu fuses attention (op-plugin, ScaledDotProductAttentionKernelNpuOpApi.cpp, branch 26.1.0 and
    later).

    From 910B1 on, four axes, no mask or one of bools, up to 2,048 heads of up to 512; in float32 the width of a head is
    a multiple of 4.
    """
    heads = (query, key, value)
    if not rules.fused_attention or any(head.dim() != 4 or head.shape[0] != query.shape[0] for head in heads):
        return False
    if any(tensor.shape[1] != query.shape[1] for tensor in (key, value)) and not shared_heads:
        return False
    widths = [head.shape[-1] for head in heads]
    if (query.dtype == torch.float32 and any(width % 4 for width in widths)) or (
        rules.narrow_attention and max(widths) > NARROW
    ):
        return False
    if query.shape[1] > HEADS or key.shape[1] > HEADS or query.shape[-1] > _WIDEST:
        return False
    return mask is None or mask.dtype == torch.bool


def _fits_split(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether CUDA computes attention in float32 by its memory-efficient kernel (torch, sdp_utils.cpp): four axes, as
    many heads of each, heads of a multiple of 4, and something to attend to.
    """
    heads = (query, key, value)
    if any(head.dim() != 4 or head.dtype != torch.float32 or not head.numel() for head in heads):
        return False
    return all(head.shape[1] == query.shape[1] and head.shape[-1] % 4 == 0 for head in heads)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)


def _fused_attention(
    rules: Rules, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    hidden = None if mask is None else ~mask
    hidden = _causal(query, key) if is_causal else hidden
    if "attention" in rules.vector.operators:
        return rules.vector.unit(query.dtype).attention(query, key, value, scale=_scale(query, scale), hidden=hidden)
    return numerics.attention(query, key, value, scale=_scale(query, scale), hidden=hidden)[0]


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale
