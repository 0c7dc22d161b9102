"""Activations."""

from __future__ import annotations

from harness import numerics
from harness.emulator.table import operator


@operator("aclnnSilu", "self >out")
def silu(self):
    return numerics.silu(self)


@operator("aclnnGelu", "self >out")
def gelu(self):
    return numerics.gelu(self)


@operator("aclnnGeluV2", "self approximate:int >out")
def gelu_v2(self, approximate):
    return numerics.gelu(self, "tanh" if approximate == 1 else "none")
