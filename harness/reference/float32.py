"""How much the CPU's own float32 products lose: a CPU that loses more than float32 does would hide a device's errors.

oneDNN with Arm's library may multiply float32 in bfloat16 (DNNL_DEFAULT_FPMATH_MODE=BF16), and so may torch on CPUs
with the instructions (`torch.set_float32_matmul_precision("medium")`). Whether a CPU does so is measured, not read from
its settings.
"""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from harness.errors import LossyReferenceError
from harness.torch_private import mkldnn_enabled

# Relative L2 to float64. 256 float32 products summed in order lose 2^-20.5 at the most, operands in TF32 some 2^-12,
# operands in bfloat16 some 2^-9.
_MOST = 2.0**-18
_VARIABLES = ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


def require_float32() -> None:
    """Refuse a CPU whose float32 matrix products or convolutions lose more than 2^-18, relative L2 to float64.

    One product of 256 by 256 and one convolution, measured once in a process and again where a switch has changed.

    Raises: LossyReferenceError with what was measured, what was expected and the settings to look at.

    Example: `require_float32()` before the CPU's outputs are taken for right.
    """
    for what, lost in _losses(_settings()).items():
        if not lost <= _MOST:
            power = f"2^{math.log2(lost):.1f}" if 0 < lost < math.inf else f"{lost}"
            raise LossyReferenceError(
                f"the CPU is refused as a reference: its float32 {what} lose {power} (relative L2 to float64), and at "
                f"most 2^-18 was expected; {_settings_text()}: unset the variable and take "
                f"torch.set_float32_matmul_precision('highest'), then run again"
            )


@functools.lru_cache(maxsize=8)
def _losses(settings: tuple) -> dict[str, float]:
    """What products and convolutions lose under the switches that `settings` names: a change is measured again."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    x, weight = torch.randn(1, 16, 16, 16, generator=generator), torch.randn(16, 16, 3, 3, generator=generator)
    with torch.no_grad():
        return {
            "matrix products": _lost(torch.matmul(left, right), torch.matmul(left.double(), right.double())),
            "convolutions": _lost(torch.conv2d(x, weight), torch.conv2d(x.double(), weight.double())),
        }


def _lost(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def _settings() -> tuple:
    """What changes how float32 is multiplied; oneDNN reads its variable once, at the first product."""
    return (_precision(), mkldnn_enabled(), torch.get_num_threads(), *(os.environ.get(name) for name in _VARIABLES))


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9 and later, where its older and its newer switches were mixed
        return "mixed"


def _settings_text() -> str:
    result = [f"{name} is {os.environ[name]}" if name in os.environ else f"{name} is not set" for name in _VARIABLES]
    return ", ".join([*result, f"torch's float32 matmul precision is {_precision()!r}"])
