"""Decompositions, inverses, determinants and one-dimensional Fourier transforms."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import upcast
from harness.emulator.table import operator


@operator("aclnnSvd", "self full:bool vectors:bool >values >left >right")
def svd(self, full, vectors, out):
    """The right vectors are columns, as the left ones are; without vectors there is no room for them."""
    if not vectors:
        return torch.linalg.svdvals(self), *[torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in out[1:]]
    left, values, right = torch.linalg.svd(self, full_matrices=full)
    return values, left, right.mH


@operator("aclnnLinalgQr", "self mode:int >q >r")
def qr(self, mode, out):
    q, r = torch.linalg.qr(upcast(self), mode=("reduced", "complete", "r")[mode])
    return q.to(out[0].dtype).reshape(out[0].shape), r.to(out[1].dtype)


@operator("aclnnLinalgCholesky", "self upper:bool >out")
def cholesky(self, upper):
    return torch.linalg.cholesky(self, upper=upper)


@operator("aclnnInverse", "self >out")
def inverse(self, out):
    return torch.linalg.inv(upcast(self)).to(out.dtype)


@operator("aclnnSlogdet", "self >sign >log")
def slogdet(self, out):
    return [tensor.to(spec.dtype).reshape(spec.shape) for tensor, spec in zip(torch.linalg.slogdet(upcast(self)), out)]


@operator("aclnnTriangularSolve", "self coefficients upper:bool transpose:bool unit:bool >out >copied")
def triangular_solve(self, coefficients, upper, transpose, unit):
    return torch.triangular_solve(self, coefficients, upper, transpose, unit)


@operator("aclnnLinalgCross", "self other dim:int >out")
def cross(self, other, dim, out):
    return torch.linalg.cross(upcast(self), upcast(other), dim=dim).to(out.dtype)


@operator("aclRfft1D", "self size:int dim:int norm:int >out")
def rfft(self, size, dim, norm, out):
    result = torch.fft.rfft(upcast(self), size, dim, ("backward", "forward", "ortho")[norm - 1])
    return torch.view_as_real(result).to(out.dtype)
