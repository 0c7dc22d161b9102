"""The float64 reference is float64 where a model asks for float32 by name."""

import math

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.reference import Models, WideRequests, run_cpu

ASKED = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "a dtype": lambda x: x.softmax(-1, dtype=torch.float32),
    "a sum": lambda x: x.sum(-1, dtype=torch.float32),
    "type": lambda x: x.type(torch.FloatTensor),
    "arange": lambda x: torch.arange(4, dtype=torch.float32) / 3,
    "arange without one": lambda x: torch.arange(0.0, 1.0, 0.1),
    "linspace": lambda x: torch.linspace(0, 1, 7),
    "ones": lambda x: torch.ones(3) / 3,
    "full": lambda x: torch.full((3,), 0.1),
    "whole numbers": lambda x: torch.arange(4).float() / 3,
    "made elsewhere": lambda x: OUTSIDE * 2,
    "new": lambda x: x.new_zeros(3, dtype=torch.float32) + 0.1,
    "complex": lambda x: torch.polar(x.float(), x.float()),
    "complex by name": lambda x: x.to(torch.complex64),
}
OUTSIDE = torch.tensor([0.1, 0.2])


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
def test_what_asks_for_float32_gets_float64(name, inference):
    x = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    with torch.inference_mode(inference), torch.no_grad(), WideRequests():
        result = ASKED[name](x)
    assert result.dtype in (torch.float64, torch.complex128)


def test_the_numbers_are_those_of_float64():
    with WideRequests():
        steps = torch.arange(0.0, 1.0, 0.1)
        tables = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    assert torch.equal(steps, torch.arange(0.0, 1.0, 0.1, dtype=torch.float64))
    assert tables.tolist() == pytest.approx([10000.0 ** (-index / 32) for index in range(32)], rel=1e-15)


def test_half_dtypes_bits_and_random_draws_are_left():
    x = torch.linspace(1, 2, 12, dtype=torch.float64)
    with WideRequests():
        assert x.half().dtype == torch.float16 and x.bfloat16().dtype == torch.bfloat16
        assert torch.zeros(4, dtype=torch.int32).view(torch.float32).dtype == torch.float32
        torch.manual_seed(0)
        drawn = torch.rand(3, dtype=torch.float32), torch.bernoulli(torch.full((3,), 0.5))
        y = torch.ones(3)
        y.add_(x[:3])  # writes into what is there
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.rand(3)) and y.dtype == torch.float64


class Rotary(nn.Module):
    """(1, N, 64) turned by tables that forward makes in float32, as transformers does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        inverse = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32, device=x.device) / 64))
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32, device=x.device), inverse)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = self.head(x).chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


def turned(x, model):
    """The same in float64 throughout."""
    inverse = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), inverse)
    left, right = model(x).chunk(2, -1)
    return torch.cat([left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], -1)


def tokens(count):
    return lambda generator: torch.randn(1, count, 64, generator=generator)


@pytest.mark.parametrize("count", [128, 4096])
def test_what_the_cpu_loses_in_tables_that_forward_makes_counts(count):
    case = Case(name="rotary", model=Rotary, inputs=tokens(count))
    verdict = validate(case, 1, open_device("cpu"))
    torch.manual_seed(0)
    model, x = Rotary(), case.inputs(torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = turned(x.double(), model.double().head)
        error = float((model.float()(x).double() - expected).norm() / expected.norm())
    result = verdict.references["output"]
    assert verdict.passed and result.cpu.rel_l2 == pytest.approx(error, rel=0.05)
    if count == 4096:
        assert error > 3e-6  # twenty times what its products lose


class Strict(nn.Module):
    """Refuses anything but float32 inside."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        wide = self.head(x).float()
        if wide.dtype != torch.float32:
            raise TypeError("float32 is what I asked for")
        return wide.exp().to(x.dtype)


def test_a_model_that_insists_on_float32_gets_it_and_the_row_says_so():
    case = Case(
        name="strict", model=Strict, inputs=lambda generator: torch.randn(4, 16, generator=generator), dtype="bfloat16"
    )
    models = Models()
    verdict = validate(case, 1, open_device("cpu"), models=models)
    assert verdict.passed and verdict.references["output"].golden.rel_l2 < 0.01
    [note] = [item for item in verdict.evidence.notes if "float32" in item]
    assert "asks for it by name" in note and "float32 is what I asked for" in note
    assert list(models.pinned) == [case.subject]
    validate(case, 2, open_device("cpu"), models=models)  # known by now


def test_a_model_without_float64_says_why_there_is_none():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 16)

        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("no float64 here")
            return self.head(x)

    models = Models()
    case = Case(name="half", model=Half, inputs=lambda generator: torch.randn(4, 16, generator=generator))
    verdict = validate(case, 1, open_device("cpu"), models=models)
    assert "no float64 here" in verdict.evidence.no_golden and not models.pinned


def test_a_narrow_run_is_left_as_it_is():
    outputs, _, _ = run_cpu(Rotary(), torch.randn(1, 8, 64), forward=None, dtype=torch.float32)
    assert outputs.dtype == torch.float32
    assert math.isfinite(float(outputs.sum()))


def test_a_mask_of_float64s_lowest_number_is_made_without_a_dtype():
    """As transformers 4 makes it: with the number of the model's dtype and in torch's default dtype."""
    with WideRequests():
        mask = torch.full((2, 2), torch.finfo(torch.float64).min)
    assert mask.dtype == torch.float64 and mask[0, 0] == torch.finfo(torch.float64).min
    with WideRequests():
        assert [torch.full((2,), item).dtype for item in (1, True)] == [torch.int64, torch.bool]
