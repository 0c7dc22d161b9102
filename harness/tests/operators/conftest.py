"""What the tests of the emulated operators share: the device, and the comparison of a function there and on the CPU."""

import pytest
import torch

from harness.tests.needs import emulated_device

RTOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="session")
def npu():
    return emulated_device().torch_device


@pytest.fixture
def compiling(npu):
    """Operators take the older path where there is one. A thread keeps the mode that it met first, so backward stays in
    this one.
    """
    torch.npu.set_compile_mode(jit_compile=True)
    with torch.autograd.set_multithreading_enabled(False):
        yield npu
    torch.npu.set_compile_mode(jit_compile=False)


def seeded(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers from a seed, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _moved(value, device, dtype=None):
    if isinstance(value, torch.Tensor):
        moved = value.to(device)
        moved = moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved
        return moved.requires_grad_() if value.requires_grad and moved.is_leaf else moved
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, device, dtype) for each in value)
    return value


def _leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, (list, tuple)) else []


def _weights(like):
    """Different for each element, so that a gradient that goes to the wrong place shows."""
    return torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape).to(like.dtype).to(like.device)


def _run(function, arguments, backward):
    found = _leaves(function(*arguments))
    inputs = [leaf for leaf in _leaves(arguments) if leaf.requires_grad]
    if not backward or not inputs:
        return found
    total = sum((each * _weights(each)).float().sum() for each in found if each.requires_grad)
    return found + list(torch.autograd.grad(total, inputs, allow_unused=True))


def agrees(npu, function, *arguments, rtol=1e-5, atol=1e-5, backward=True):
    """Assert that function(*arguments) and its gradients are the same on the emulated device as on the CPU.

    Arguments are CPU tensors (or lists of them, or plain values); those that require a gradient get one compared. Half
    dtypes are held against the CPU's float32 result of the same half inputs, with the dtype's own tolerance.
    """
    half = next((leaf.dtype for leaf in _leaves(arguments) if leaf.dtype in RTOL), None)
    plain = [
        _moved(each.detach().requires_grad_(each.requires_grad) if isinstance(each, torch.Tensor) else each, "cpu")
        for each in arguments
    ]
    expected = _run(function, [_moved(each, "cpu", torch.float32) for each in plain] if half else plain, backward)
    actual = _run(function, [_moved(each, npu) for each in plain], backward)
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected):
        assert (found is None) == (wanted is None)
        if found is None:
            continue
        assert found.device.type == "npu" and found.shape == wanted.shape
        if half is None:
            assert found.dtype == wanted.dtype
        near = dict(rtol=RTOL[half], atol=RTOL[half]) if half else dict(rtol=rtol, atol=atol)
        torch.testing.assert_close(found.cpu().to(wanted.dtype), wanted, equal_nan=True, **near)


@pytest.fixture(autouse=True)
def switches(npu):
    """As they were before the test: the tests that follow count on it."""
    kept = torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32
    yield
    torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = kept
