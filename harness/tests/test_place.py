"""Where one operator cannot be looked at by itself, or the CPU's numbers stand in: the wrong one is named, no innocent one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness import Case, emulator
from harness.locate import Symptom, locate
from harness.tests.test_locate import npu  # noqa: F401


def rows(generator):
    return torch.randn(40, 32, generator=generator)


def case(model, inputs=rows, **more):
    return Case(
        name="place", model=lambda: model().train(more.get("training", False)), inputs=inputs, isolated=False, **more
    )


def grads(model, x):
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return {name: each for (name, _), each in zip(model.named_parameters(), found)}


def training(model, **more):
    return case(model, forward=grads, training=True, gradients=True, **more)


# ------------------------------------------------------------------------------------- what was measured, and no more


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_wrong_gradient_is_said_without_a_share_that_nobody_measured(npu):
    with emulator.fault("aclnnTanhBackward", "scale", by=1.01):
        found = locate(training(Tanh), 1, npu, backward=True, row=Symptom(away=0.01))
    assert found.first.operator == "tanh" and found.cut == "the model: grad"
    assert found.sentences().endswith("No other operator is wrong by itself: what comes after inherits.")


def test_what_gradients_give_together_is_said_to_be_unmeasured(npu):
    found = locate(training(Tanh), 1, npu, backward=True, row=Symptom(away=1e-9))
    said = found.sentences()
    assert found.first is None and found.followed != found.followed and "0.00e+00" not in said
    assert "was not measured: from the model: grad on the device had the CPU's numbers" in said


def test_a_fault_that_comes_and_goes_is_held_against_no_other_run(npu):
    with emulator.fault("aclnnTanh", "noise", by=0.01):
        found = locate(case(Tanh), 1, npu, row=Symptom(away=1e3, scatters=True))
    assert found.first.operator == "tanh" and "differs from run to run" in found.first.cause
    assert "give a difference" not in found.sentences() and "C++" not in found.sentences()


# ------------------------------------------------------------------------------------------------ transforms, autocast


class Mapped(nn.Module):
    """A product under vmap, then a function outside of it."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(32, 32) / 6), nn.Linear(32, 32)

    def forward(self, x):
        return self.o(F.silu(torch.vmap(lambda row: row @ self.w)(x)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        inner = checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False)
        return F.silu(self.b(inner))


class Autocast(nn.Module):
    """Products in bfloat16, a norm that one device casts and the other does not."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.b(F.silu(self.n(self.a(x)))).float()


@pytest.mark.parametrize(
    "subject",
    [case(Mapped), training(Checkpointed), case(Autocast)],
    ids=["vmap", "checkpoint", "autocast"],
)
def test_a_wrong_operator_beside_what_cannot_be_looked_at_is_named(npu, subject):
    assert locate(subject, 1, npu).first is None
    with emulator.fault("aclnnSilu", "scale", by=1.1):
        found = locate(subject, 1, npu)
    assert found.first.name.startswith("the model: silu (test_place.py:"), found.sentences()
    assert "1 more are wrong" not in found.sentences() and "raised" not in found.sentences()


def test_a_product_under_autocast_is_named_with_its_module(npu):
    with emulator.fault("aclnnAddmm", "scale", by=1.1):
        found = locate(case(Autocast), 1, npu)
    assert found.first.module == "a" and "multiplied by 1.1" in found.first.cause


def test_calls_inside_of_a_transform_are_counted_as_not_looked_at(npu):
    with emulator.fault("aclnnMatmul", "scale", by=1.1), emulator.fault("aclnnMm", "scale", by=1.1):
        found = locate(case(Mapped), 1, npu, row=Symptom(away=0.1))
    assert "1 calls were not looked at by themselves: inside of a transform of torch.func" in found.sentences()
    assert not [each for each in found.steps if each.bad and each.operator in ("matmul", "silu")]
