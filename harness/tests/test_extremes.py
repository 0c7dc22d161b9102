"""Masks that fill with the smallest number of a dtype, which is another number in each: torch.finfo(x.dtype).min."""

import math

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.reference import as_golden_has, as_infinite
from harness.tests.needs import emulated_device

DTYPES = ("float32", "float16", "bfloat16")


def most(dtype):
    return torch.finfo(dtype).max


def test_float64s_largest_numbers_become_infinite_and_no_others():
    wide = torch.tensor(
        [most(torch.float64), -most(torch.float64), 1e308, math.inf, math.nan, 0.0], dtype=torch.float64
    )
    result = as_infinite({"x": wide, "n": torch.tensor([2**31 - 1])})
    assert result["x"][:4].tolist() == [math.inf, -math.inf, 1e308, math.inf] and result["x"][4].isnan()
    assert result["n"].tolist() == [2**31 - 1]
    assert as_infinite({"x": wide[2:3]})["x"] is not None and wide[0] == most(torch.float64)  # nothing is written into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_number_follows_only_where_golden_has_float64s_with_its_sign(dtype):
    wide = most(torch.float64)
    narrow = torch.tensor([most(dtype), -most(dtype), most(dtype), most(dtype), 5.0, most(dtype)], dtype=dtype)
    golden = torch.tensor([wide, -wide, -wide, 7.0, wide, math.inf], dtype=torch.float64)  # the last one is an overflow
    result = as_golden_has({"x": golden}, {"x": narrow, "y": narrow})
    assert result["x"].tolist() == [math.inf, -math.inf, most(dtype), most(dtype), 5.0, most(dtype)]
    assert result["y"] is narrow
    assert as_golden_has({"x": golden[:2]}, {"x": narrow})["x"] is narrow  # another shape is told elsewhere


class Masked(nn.Module):
    """(16, 64) to logits (16, 64), every fifth of them forbidden; `fault` on a device that is not the CPU."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault, self.head = fault, nn.Linear(64, 64)

    def forward(self, x):
        fault = self.fault if x.device.type != "cpu" else ""
        logits = self.head(x)
        forbidden = torch.arange(64, device=x.device) % 5 == (1 if fault == "mask" else 0)
        logits = logits * 1.2 if fault == "logits" else logits
        return logits.masked_fill(forbidden, torch.finfo(x.dtype).max * (1 if fault == "sign" else -1))


def row(device, dtype, fault=""):
    inputs = lambda generator: torch.randn(16, 64, generator=generator)
    return validate(Case(name="masked", model=lambda: Masked(fault), inputs=inputs, dtype=dtype), 1, device)


@pytest.fixture(scope="module")
def device():
    return emulated_device()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits_pass_and_their_numbers_are_those_of_the_others(device, dtype):
    verdict = row(device, dtype)
    assert verdict.passed, verdict.reasons
    result = verdict.comparison
    assert result.rms < 10 and 0 <= verdict.references["output"].golden.rel_l2 < 0.02
    assert verdict.evidence.conditioning > 0


@pytest.mark.parametrize("fault", ["mask", "sign", "logits"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_mask_and_wrong_logits_fail(device, dtype, fault):
    verdict = row(device, dtype, fault)
    assert {failure.criterion for failure in verdict.failures} >= {"forecast_ratio" if fault == "logits" else "finite"}
