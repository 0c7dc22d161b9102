"""The families of Ascend chips by the SoC's name, and what public sources say of how each computes. A name says its
family; the device is asked nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.numerics.cube import NotOnCube

KEEP, ALLOW_DOWN, USE_FLOAT16, USE_HF32, FLOAT32_ADD = range(
    5
)  # CANN's cubeMathType, which torch_npu sends with each product


class NoFloat32(NotOnCube):
    """A cube without float32 was asked to keep it: stated, CANN refuses it (hicann/ops-nn, matmul_util.cpp,
    DefaultMatMulRule).
    """

    def __init__(self, name: str):
        super().__init__(
            f"the cube of {name} does not compute in float32 (DT_FLOAT) where the cubeMathType is KEEP_DTYPE "
            "or USE_HF32; "
            "take float16, or leave ACL_PRECISION_MODE at allow_fp32_to_fp16"
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """Chips that compute alike. What no public source states is None; `known` says whether an expected error can be
    computed.

    >>> family_of("Ascend310P3").float32
    False
    """

    name: str
    members: str  # in words
    pattern: str  # of the whole name, as aclrtGetSocName gives it
    # Whether public sources say how it rounds float32 operands; without it there is no expected error.
    known: bool = True
    # Whether its cube takes float32 operands; without, products and convolutions of float32 run in float16.
    float32: bool | None = True
    hf32_bits: int | None = 11  # mantissa bits of HF32; None where there is none or nobody says
    bfloat16: bool | None = True
    # Half results that overflow are cut to the largest number, as the chip comes; else Inf and NaN.
    saturates: bool | None = False
    gelu_tanh: bool | None = True  # GELU takes its tanh formula whatever is asked for, unless compatible_impl is on
    # Torch_npu takes the fused kernel for attention that fits it; else it is made of its products.
    fused_attention: bool | None = True
    sources: tuple[str, ...] = ()  # repository and file, and what it states

    @property
    def allows_float16(self) -> bool | None:
        """Whether torch_npu lets float32 products run in float16 where ACL_PRECISION_MODE is not set: below 910B1 it
        does.
        """
        return None if self.float32 is None else not self.float32

    def operands(self, cube: int) -> str:
        """What float32 operands of a product are rounded to under a cubeMathType, a word of `OPERANDS`.

        Raises: NoFloat32 where the cube has no float32 and is asked to keep it. ValueError for a family without rules.
        """
        if not self.known:
            raise ValueError(f"how {self.members} rounds is not known")
        if not self.float32 and cube not in (ALLOW_DOWN, USE_FLOAT16):
            raise NoFloat32(self.members)
        if not self.float32 or cube == USE_FLOAT16:
            return "float16"
        if cube in (ALLOW_DOWN, USE_HF32):
            return "HF32" if self.hf32_bits == 11 else f"HF32 of {self.hf32_bits} bits"
        return "float32"

    @property
    def products(self) -> str | None:
        """What float32 operands of products are rounded to as the chip comes, under torch_npu's default switches; None
        where unknown.
        """
        return self.operands(cube_type(allow_hf32=False, allow_float16=self.allows_float16)) if self.known else None

    @property
    def convolutions(self) -> str | None:
        """And those of convolutions."""
        return self.operands(cube_type(allow_hf32=True, allow_float16=self.allows_float16)) if self.known else None


def cube_type(*, allow_hf32: bool, allow_float16: bool) -> int:
    """The cubeMathType that torch_npu sends. Stated: Ascend/pytorch, CalcuOpUtil.cpp, GetCubeMathType."""
    if allow_float16:
        return ALLOW_DOWN if allow_hf32 else USE_FLOAT16
    return USE_HF32 if allow_hf32 else KEEP


ENUM = (
    "Ascend/pytorch torch_npu/csrc/core/npu/NpuVariables.cpp: the names, IsBF16Supported, IsSupportInfNan, IsAclnnOnly"
)
MODE = (
    "Ascend/pytorch torch_npu/csrc/framework/interface/EnvVariables.cpp, IsAllowFP32ToFP16: must_keep_origin_dtype "
    "from 910B1 on"
)
CUBE = "hicann/ops-nn matmul/common/op_host/op_api/cube_util.h, IsCubeSupportFp32 and IsCubeSupportHf32"
GELU = (
    "Ascend/op-plugin op_plugin/ops/opapi/GeluOutKernelNpuOpApi.cpp: aclnnGelu, which is its tanh formula, unless "
    "compatible_impl is on"
)
ATTENTION = "Ascend/op-plugin op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp: fused from 910B1 on"
HALF_ONLY = (
    ENUM,
    MODE,
    (
        "hicann/ops-nn conv/convolution_forward/op_host/op_api/aclnn_convolution.cpp, UpdateOutputDtype: 910 and "
        "310P convolve in float16 alone, in and out"
    ),
    (
        "hicann/ops-nn matmul/common/op_host/op_api/matmul_util.cpp, DefaultMatMulRule: float32 operands become "
        "float16, the result stays float32"
    ),
    GELU,
    ATTENTION,
)
WITH_HF32 = (
    ENUM,
    MODE,
    CUBE,
    "hiascend envref_07_0038 (ENABLE_HF32_EXECUTION): HF32 keeps 11 mantissa bits",
    GELU,
    ATTENTION,
)

FAMILIES = (
    Family(name="A2", members="910B1 to 910B4, 910B2C, 910B4-1", pattern=r"Ascend910B\d(C|-\d)?", sources=WITH_HF32),
    Family(name="A3", members="910_93", pattern=r"Ascend910_93\d\d", sources=WITH_HF32),
    Family(
        name="910A",
        members='910A, 910ProA, 910ProB, 910PremiumA and "910B" without a digit',
        pattern=r"Ascend910(A|ProA|ProB|PremiumA|B)",
        float32=False,
        hf32_bits=None,
        bfloat16=False,
        saturates=True,
        fused_attention=False,
        sources=HALF_ONLY,
    ),
    Family(
        name="310P",
        members="310P1 to 310P7",
        pattern=r"Ascend310P\d",
        float32=False,
        hf32_bits=None,
        bfloat16=False,
        saturates=True,
        fused_attention=False,
        sources=HALF_ONLY,
    ),
    Family(
        name="310B",
        members="310B1 to 310B4",
        pattern=r"Ascend310B\d",
        known=False,
        float32=None,
        hf32_bits=None,
        bfloat16=None,
        saturates=True,
        sources=(
            ENUM + "; IsBF16Supported goes by the enum's order, in which 310B comes after 910B1",
            MODE,
            CUBE + ": float32 and HF32 there (DAV_3002); matmul_util.cpp, BuildRule, refuses float32 there: the "
            "sources do not agree",
            GELU,
            ATTENTION,
        ),
    ),
    Family(
        name="950",
        members="950",
        pattern=r"Ascend950\w*",
        hf32_bits=10,
        gelu_tanh=False,
        sources=(
            ENUM,
            MODE,
            CUBE,
            (
                "mirror-cann/asc-devkit docs/zh/api, Mmad, HF32.md, and hicann/ops-nn "
                "conv/convolution_forward/tests/assets/golden.py: HF32 keeps 10 mantissa "
                "bits; hicann/ops-nn matmul/common/tests/st/arch35/matmul_golden_util.py takes 11 for products"
            ),
            (
                "Ascend/op-plugin op_plugin/ops/opapi/GeluOutKernelNpuOpApi.cpp from branch 26.1.0 on: "
                "aclnnGeluV2, which follows `approximate`"
            ),
            ATTENTION,
        ),
    ),
)
UNKNOWN = Family(
    name="unknown", members="a SoC of another name", pattern="",
    known=False, float32=None, hf32_bits=None, bfloat16=None, saturates=None, gelu_tanh=None, fused_attention=None,
)  # fmt: skip


def family_of(soc_name: str) -> Family:
    """The family of a SoC by its name, such as "Ascend910B4"; `UNKNOWN` for a name that no family has."""
    return next((family for family in FAMILIES if re.fullmatch(family.pattern, soc_name)), UNKNOWN)


A2 = FAMILIES[0]
