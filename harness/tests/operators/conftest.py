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
        return type(value)(_moved(item, device, dtype) for item in value)
    return value


def _leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else []


def _weights(like):
    """Different for each element, so that a gradient that goes to the wrong place shows."""
    return torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape).to(like.dtype).to(like.device)


def _run(function, arguments, backward):
    result = _leaves(function(*arguments))
    inputs = [leaf for leaf in _leaves(arguments) if leaf.requires_grad]
    if not backward or not inputs:
        return result
    total = sum((tensor * _weights(tensor)).float().sum() for tensor in result if tensor.requires_grad)
    return result + list(torch.autograd.grad(total, inputs, allow_unused=True))


def agrees(npu, function, *arguments, rtol=1e-5, atol=1e-5, backward=True):
    """Assert that function(*arguments) and its gradients are the same on the emulated device as on the CPU.

    Arguments are CPU tensors (or lists of them, or plain values); those that require a gradient get one compared. Half
    dtypes are held against the CPU's float32 result of the same half inputs, with the dtype's own tolerance.
    """
    half = next((leaf.dtype for leaf in _leaves(arguments) if leaf.dtype in RTOL), None)
    plain = [
        _moved(
            argument.detach().requires_grad_(argument.requires_grad)
            if isinstance(argument, torch.Tensor)
            else argument,
            "cpu",
        )
        for argument in arguments
    ]
    expected = _run(function, [_moved(item, "cpu", torch.float32) for item in plain] if half else plain, backward)
    actual = _run(function, [_moved(item, npu) for item in plain], backward)
    assert len(actual) == len(expected)
    for result, wanted in zip(actual, expected):
        assert (result is None) == (wanted is None)
        if result is None:
            continue
        assert result.device.type == "npu" and result.shape == wanted.shape
        if half is None:
            assert result.dtype == wanted.dtype
        near = dict(rtol=RTOL[half], atol=RTOL[half]) if half else dict(rtol=rtol, atol=atol)
        torch.testing.assert_close(result.cpu().to(wanted.dtype), wanted, equal_nan=True, **near)


@pytest.fixture(autouse=True)
def switches(npu):
    """As they were before the test: the tests that follow count on it."""
    kept = torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32
    yield
    torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = kept
