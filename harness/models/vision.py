"""A small vision transformer with LayerNorm and GELU, trained on the digits that the AIMv2 of data/digits knows.

It was trained by `python -m harness.models.train_digits vision`; its weights lie in data/vision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

VISION_FOLDER = Path(__file__).parent / "data" / "vision"
_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of a vision transformer; the defaults are those of data/vision, 20,000 parameters."""

    width: int = 24  # D
    depth: int = 4  # blocks
    heads: int = 3  # H
    hidden: int = 48  # of the MLP
    image_size: int = 8  # pixels
    patch: int = 2  # pixels

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2  # N


class _Block(nn.Module):
    """(B, N, D) to the same: attention and a GELU MLP, each behind a LayerNorm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D / H)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Pictures (B, 3, 8, 8) to the logits of ten digits (B, 10), through the mean of the tokens."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patchify = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(config.tokens, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, _CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patchify(pixel_values).flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build(seed: int = 0) -> VisionTransformer:
    """The model with seeded random weights, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(VisionConfig())


def model() -> VisionTransformer:
    """The trained model, in float32 on the CPU."""
    made = build()
    made.load_state_dict(load_file(VISION_FOLDER / "model.safetensors"), strict=True)
    return made.eval().requires_grad_(False)
