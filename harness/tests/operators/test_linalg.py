"""Decompositions on the emulated device: those that are unique are torch's own, the others put their matrix together
again.
"""

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded

NEAR = dict(rtol=1e-4, atol=1e-4)


def _square(*shape):
    return seeded(*shape) + 3 * torch.eye(shape[-1])


@pytest.mark.parametrize(
    "function, tensors",
    [
        (torch.linalg.inv, (_square(2, 4, 4).requires_grad_(),)),
        (torch.slogdet, (_square(4, 4),)),
        (torch.slogdet, (_square(2, 4, 4),)),
        (torch.linalg.svdvals, (seeded(2, 5, 3),)),
        (torch.linalg.cross, (seeded(4, 3).requires_grad_(), seeded(4, 3, seed=1).requires_grad_())),
        (torch.linalg.cross, (seeded(4, 3, dtype=torch.float16), seeded(4, 3, seed=1, dtype=torch.float16))),
        (lambda x: torch.linalg.cholesky(x @ x.mT), (_square(2, 4, 4),)),
        (lambda a, b: torch.linalg.solve_triangular(a.triu(), b, upper=True), (_square(4, 4), seeded(4, 2, seed=1))),
        (
            lambda a, b: torch.triangular_solve(b, a, upper=False, unitriangular=True)[0],
            (_square(2, 4, 4), seeded(2, 4, 2, seed=1)),
        ),
    ],
)
def test_unique_results(npu, function, tensors):
    agrees(npu, function, *tensors, **NEAR)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 4)])
@pytest.mark.parametrize("full", [True, False])
def test_svd_puts_its_matrix_together(npu, shape, full):
    matrix, size = seeded(*shape), min(shape[-2:])
    left, values, right = (tensor.cpu() for tensor in torch.linalg.svd(matrix.to(npu), full_matrices=full))
    torch.testing.assert_close(left[..., :size] * values[..., None, :] @ right[..., :size, :], matrix, **NEAR)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 4)])
@pytest.mark.parametrize("mode", ["reduced", "complete"])
def test_qr_puts_its_matrix_together(npu, shape, mode):
    matrix = seeded(*shape)
    q, r = (tensor.cpu() for tensor in torch.linalg.qr(matrix.to(npu), mode=mode))
    torch.testing.assert_close(q @ r, matrix, **NEAR)
    assert torch.equal(r, r.triu())


@pytest.mark.parametrize("norm", ["backward", "forward", "ortho"])
def test_rfft(npu, norm):
    signal = seeded(3, 16)
    result = torch.fft.rfft(signal.to(npu), n=12, dim=1, norm=norm)
    torch.testing.assert_close(result.cpu(), torch.fft.rfft(signal, n=12, dim=1, norm=norm), **NEAR)
