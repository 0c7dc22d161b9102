"""Random numbers."""

from __future__ import annotations

import torch

from harness.emulator.table import operator


def _generator(seed: int, offset: int) -> torch.Generator:
    """A stream of its own: a card's streams differ from the CPU's as well, and are not public."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + offset) & (2**63 - 1))


@operator("aclnnInplaceNormal", "self! mean:float std:float seed:int offset:int")
def normal(self, mean, std, seed, offset, out):
    return torch.empty(out.shape).normal_(mean, std, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnInplaceUniform", "self! low:double high:double seed:uint64 offset:uint64")
def uniform(self, low, high, seed, offset, out):
    return torch.empty(out.shape).uniform_(low, high, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnInplaceRandom", "self! low:int high:int seed:int offset:int")
def random(self, low, high, seed, offset, out):
    return torch.randint(low, high, out.shape, generator=_generator(seed, offset)).to(out.dtype)
