"""Accuracy of AIMv2: the full-size large model on random input and on a photograph, and the small trained one on digits.

MODEL_DIR names a checkpoint of aimv2-large-patch14-224-distilled, or of another AIMv2 for 224-pixel pictures; without it the
weights are random, seeded, and the report says so.
"""

import math
import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from harness import Case, Stack, Tolerance
from harness.models import digits
from harness.models.aimv2 import PHOTO, VARIANTS, build, load, preprocess
from harness.plugin import dtype_id

NAME = "aimv2-large-patch14-224-distilled"
SEEDS = (42, 123, 256, 789, 1024)
DTYPES = ("float32", "float16", "bfloat16")
CHECKPOINT = Path(os.environ["MODEL_DIR"]) if os.environ.get("MODEL_DIR") else None
MODEL = partial(build, NAME, seed=0) if CHECKPOINT is None else partial(load, CHECKPOINT, dtype=torch.float32)

UNIT_ROUNDOFF = {"float32": 2**-24, "HF32": 2**-12, "TF32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}
ROUNDINGS = 8  # intermediate results of a block that are rounded: 2 norms, qkv, attention, projection, gate, product, fc2


def rounding(depth: int, width: int, dtype: str, stack: Stack) -> Tolerance:
    """How far two healthy devices may be apart on AIMv2, from the unit roundoff u of what they compute in.

    A rounding is an error of u/√3 of the value, root mean square, at most; independent ones add up by their squares.

    - float16, bfloat16: each side rounds `ROUNDINGS` intermediate results in each of L blocks: √(2 · 8 · L / 3) · u.
    - float32 with the convolution in HF32, torch_npu's default: both operands of the patch embedding are rounded, √(2/3) · u,
      and each block may add as much again as came in: √(1 + L). Everything else is float32 and four decades smaller.
    - float32 throughout: as float16, times √(D/16), since a sum over D products is itself rounded, once every 16 products.
    - float32 with matrix products in HF32: as float16, with HF32's u.

    Relative to the output's norm, so that it holds for any checkpoint. One element may be off 16 times as much in units of
    the output's root mean square (of 262,144 normal deviates the largest is 4.6), one token 3 times.
    """
    each_block = math.sqrt(2 * ROUNDINGS * depth / 3)
    if dtype != "float32":
        relative = each_block * UNIT_ROUNDOFF[dtype]
        words = f"{dtype} rounds {ROUNDINGS} results in each of {depth} blocks on both sides"
    else:
        conv, matmul = _float32_modes(stack)
        relative = each_block * math.sqrt(width / 16) * UNIT_ROUNDOFF["float32"]
        words = "float32 throughout: rounding and the order of sums"
        if conv != "float32":
            relative = math.sqrt(2 / 3) * UNIT_ROUNDOFF[conv] * math.sqrt(1 + depth)
            words = f"the convolution runs in {conv}, carried through {depth} blocks"
        if matmul != "float32":
            relative, words = each_block * UNIT_ROUNDOFF[matmul], f"matrix products run in {matmul}"
    return Tolerance(
        rel_l2=relative,
        max_diff_rms=16 * relative,
        token_cos_sim=1 - (3 * relative) ** 2 / 2,
        cos_sim=1 - relative**2 / 2,
        reason=f"Derived from unit roundoffs: {words}; see rounding() in cases/test_aimv2.py.",
    )


def _float32_modes(stack: Stack) -> tuple[str, str]:
    """What float32 convolutions and matrix products really run in, by the stack's switches."""
    conv = "HF32" if stack.conv_allow_hf32 else "TF32" if stack.conv_allow_tf32 else "float32"
    matmul = "HF32" if stack.matmul_allow_hf32 else "TF32" if stack.matmul_allow_tf32 else "float32"
    return conv, matmul


def large(**more) -> Case:
    """A case of the full-size model; all of them share one build of the weights."""
    sizes = VARIANTS[NAME]
    return Case(model=MODEL, checkpoint=CHECKPOINT, tolerance=partial(rounding, sizes.depth, sizes.width), **more)


def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=generator)


def photograph(generator: torch.Generator) -> torch.Tensor:
    return preprocess(PHOTO)


def digit_pictures(generator: torch.Generator) -> torch.Tensor:
    return digits.held_out()[0]


def decisions_too(dtype: str, stack: Stack) -> Tolerance:
    """`rounding`, and the top-1 decisions: equal in float32 and float16; bfloat16 may turn a near-tie in 200 (u = 2^-8)."""
    limits = rounding(digits.CONFIG.depth, digits.CONFIG.width, dtype, stack)
    return replace(limits, top1=0.995 if dtype == "bfloat16" else 1.0)


RUNS = [(large(name=NAME, inputs=noise, dtype=dtype), seed, f"{dtype_id(dtype)}-seed{seed}") for dtype, seed in product(DTYPES, SEEDS)]
RUNS += [(large(name=f"{NAME}-photo", inputs=photograph, dtype=dtype), None, f"{dtype_id(dtype)}-photo") for dtype in DTYPES]
RUNS += [
    (
        Case(
            name="aimv2-digits",
            model=digits.model,
            checkpoint=digits.FOLDER,
            inputs=digit_pictures,
            tolerance=decisions_too,
            dtype=dtype,
            decisions="output",
            labels=digits.held_out()[1],
        ),
        None,
        f"{dtype_id(dtype)}-digits",
    )
    for dtype in DTYPES
]


@pytest.mark.parametrize(("case", "seed"), [run[:2] for run in RUNS], ids=[run[2] for run in RUNS])
def test_precision(precision, case, seed):
    precision(case, seed)
