"""Matrix products and convolutions: what runs on the cube."""

from __future__ import annotations

import torch

from harness import numerics
from harness.emulator.operators.common import hf32, tall
from harness.emulator.table import operator
from harness.numerics import HALF


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
