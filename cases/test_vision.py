"""Accuracy of a small vision transformer with GELU, trained on digits, and of the same model with random weights.

Trained weights lose more than random ones do in the same arithmetic: compare `rel_l2` of the two cases. The cards:
`python -m harness card cases.test_vision:trained --output OUT` and `cases.test_vision:untrained`.
"""

import pytest
import torch

from harness import Case
from harness.models import digits, vision
from harness.plugin import dtype_id

DTYPES = ("float32", "float16", "bfloat16")


def pictures(generator: torch.Generator) -> torch.Tensor:
    """The digits that the model was not trained on, (360, 3, 8, 8)."""
    return digits.held_out()[0]


def trained(dtype: str = "float32") -> Case:
    """The trained model, which names nine of ten held-out digits rightly."""
    return Case(
        name="vision-trained",
        model=vision.model,
        checkpoint=vision.VISION_FOLDER,
        inputs=pictures,
        dtype=dtype,
        decisions="output",
        labels=digits.held_out()[1],
    )


def untrained(dtype: str = "float32") -> Case:
    """The same model with seeded random weights."""
    return Case(name="vision-random", model=vision.build, inputs=pictures, dtype=dtype)


CASES = [build(dtype) for build in (trained, untrained) for dtype in DTYPES]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{dtype_id(case.dtype)}" for case in CASES])
def test_precision(precision, case):
    precision(case)
