"""Accuracy of AIMv2: the full-size large model on random input and on a photograph, and the small trained one on
digits.

MODEL_DIR names a checkpoint of aimv2-large-patch14-224-distilled, or of another AIMv2 for 224-pixel pictures; without
it the weights are random, seeded, and the report says so.
"""

import os
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from harness import Case, Tolerance
from harness.models import digits
from harness.models.aimv2 import PHOTO, build, load, preprocess
from harness.plugin import dtype_id
from harness.plugin.checkpoints import is_asked

NAME = "aimv2-large-patch14-224-distilled"
SEEDS = (42, 123, 256, 789, 1024)
DTYPES = ("float32", "float16", "bfloat16")
CHECKPOINT = Path(os.environ["MODEL_DIR"]) if os.environ.get("MODEL_DIR") else None
MODEL = partial(build, NAME, seed=0) if CHECKPOINT is None else partial(load, CHECKPOINT, dtype=torch.float32)


def large(**more) -> Case:
    """A case of the full-size model; those of one name share one build of the weights."""
    return Case(model=MODEL, checkpoint=CHECKPOINT, **more)


def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=generator)


def photograph(generator: torch.Generator) -> torch.Tensor:
    return preprocess(PHOTO)


def digit_pictures(generator: torch.Generator) -> torch.Tensor:
    return digits.held_out()[0]


TURNED = (
    "In bfloat16, with a unit roundoff of 2^-8, the two largest logits of a picture can be so close that either may be "
    "the larger one: one of 200 decisions may differ."
)
DECISIONS = {  # bfloat16 may turn a near-tie in 200; the others none
    dtype: Tolerance(
        preset="floor",
        top1=0.995 if dtype == "bfloat16" else 1.0,
        reason=TURNED if dtype == "bfloat16" else "Each of the 200 decisions must be that of the CPU.",
    )
    for dtype in DTYPES
}

RUNS = [  # none of the large model in a run of other checkpoints
    (large(name=NAME, inputs=noise, dtype=dtype), seed, f"{dtype_id(dtype)}-seed{seed}")
    for dtype, seed in product(DTYPES, SEEDS)
    if not is_asked()
]
RUNS += [
    (large(name=f"{NAME}-photo", inputs=photograph, dtype=dtype), None, f"{dtype_id(dtype)}-photo")
    for dtype in DTYPES
    if not is_asked()
]
RUNS += [
    (
        Case(
            name="aimv2-digits",
            model=digits.model,
            checkpoint=digits.DIGITS_FOLDER,
            inputs=digit_pictures,
            tolerance=DECISIONS,
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
