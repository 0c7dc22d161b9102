"""The numeric switches of a device that cost accuracy: what each changes in its rounding rules, and how it is set.

The rules are those of `harness.numerics.expected_error.Rules`; a switch names the fields that setting it changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from harness.torch_private import attention_by_products

if TYPE_CHECKING:
    from harness.devices.device import Device
    from harness.devices.stack import Stack


@dataclass(frozen=True, kw_only=True)
class NumericSwitch:
    """A setting under which a device computes something more exactly than it does now."""

    name: str  # what is then computed, and how: "convolutions in float32"
    changes: Mapping[str, Any]  # fields of `Rules` that it sets
    operators: tuple[str, ...]  # parts of the names of the ATen operators that it changes
    remedy: Callable[[Stack], str]  # the line of code that sets it, on the stack at hand
    setting: Callable[[Device], AbstractContextManager]  # sets it on the device for a block

    def touches(self, operators: set[str]) -> bool:
        """Whether a model that calls these operators can be changed by it."""
        return any(part in name for name in operators for part in self.operators)


class _InPlaceOf(TorchFunctionMode):
    """Calls another function where a model calls one of `functions`."""

    def __init__(self, functions: set[Any], other: Callable):
        super().__init__()
        self.functions, self.other = functions, other

    def __torch_function__(self, func, types, args=(), kwargs=None):
        chosen = self.other if func in self.functions else func
        return chosen(*args, **(kwargs or {}))


def _exact_gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU as it was asked for, by the operator of torch_npu that heeds `approximate`."""
    import torch_npu

    return torch_npu.npu_gelu(x, approximate=approximate)


def _attention_by_products(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return attention_by_products(query, key, value, attn_mask, **options)


def _in_float32(what: str) -> Callable[[Device], AbstractContextManager]:
    return lambda device: device.in_float32(what)


def _product_remedy(what: str, module: str) -> Callable[[Stack], str]:
    def remedy(stack: Stack) -> str:
        if stack.backend == "cuda":
            return f"torch.backends.{module}.allow_tf32 = False"
        allowed = getattr(stack, f"{what}_allow_hf32")
        if allowed is not False and (what == "conv" or allowed):
            return f"torch.npu.{what}.allow_hf32 = False"
        return "torch.npu.set_option({'ACL_PRECISION_MODE': 'must_keep_origin_dtype'})"

    return remedy


def _gelu_remedy(stack: Stack) -> str:
    """torch_npu before 2.10 has no compatible_impl; `npu_gelu` heeds `approximate` in all of them."""
    if stack.compatible_impl is None:
        return "torch_npu.npu_gelu(x, approximate='none') in place of GELU"
    return (
        "torch.npu.use_compatible_impl(True) before the first GELU, "
        "or torch_npu.npu_gelu(x, approximate='none') in place of it"
    )


def _attention_remedy(stack: Stack) -> str:
    return "attn_implementation='eager' in transformers, or attention by matrix products"


NUMERIC_SWITCHES = (
    NumericSwitch(
        name="convolutions in float32",
        changes={"conv": "float32"},
        operators=("conv",),
        remedy=_product_remedy("conv", "cudnn"),
        setting=_in_float32("conv"),
    ),
    NumericSwitch(
        name="matrix products in float32",
        changes={"matmul": "float32"},
        operators=("mm", "matmul", "linear", "mv"),
        remedy=_product_remedy("matmul", "cuda.matmul"),
        setting=_in_float32("matmul"),
    ),
    NumericSwitch(
        name="exact GELU",
        changes={"gelu_tanh": False},
        operators=("gelu",),
        remedy=_gelu_remedy,
        setting=lambda device: _InPlaceOf({F.gelu}, _exact_gelu),
    ),
    NumericSwitch(
        name="attention by matrix products",
        changes={"fused_attention": False},
        operators=("attention",),
        remedy=_attention_remedy,
        setting=lambda device: _InPlaceOf({F.scaled_dot_product_attention}, _attention_by_products),
    ),
)


@contextlib.contextmanager
def all_set(switches: tuple[NumericSwitch, ...], device: Device):
    """Several switches set on a device for a block."""
    with contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch.setting(device))
        yield
