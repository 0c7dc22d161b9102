"""The comparison that the tests of operators rest on sees what it must see."""

import pytest
import torch

from harness import emulator
from harness.tests.operators.conftest import agrees, seeded


def test_a_sound_operator_agrees_with_its_gradient(npu):
    agrees(npu, torch.nn.functional.silu, seeded(3, 4))
    agrees(npu, lambda x, y: (x * y).sum(), seeded(3, 4).requires_grad_(), seeded(3, 4, seed=1).requires_grad_())
    agrees(npu, torch.mul, seeded(3, 4, dtype=torch.float16), seeded(3, 4, seed=1, dtype=torch.float16))


def test_a_scaled_result_does_not_agree(npu):
    with emulator.fault("aclnnMul", kind="scale", by=1.01), pytest.raises(AssertionError, match="not close"):
        agrees(npu, torch.mul, seeded(3, 4), seeded(3, 4, seed=1))
