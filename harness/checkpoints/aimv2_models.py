"""Checkpoints of AIMv2 in any of its layouts, by the model that is here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints.conversion import read_checkpoint
from harness.checkpoints.material import Asked, pictures
from harness.checkpoints.recognition import Recognised
from harness.errors import CheckpointError

SIDE = 224  # pixels where the config has no size, or the model takes any


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """One: the features."""
    return ("forward",)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The arguments of the Case that encodes pictures."""
    if asked.text is not None or asked.audio is not None:
        raise CheckpointError(f"{recognised.path} takes pictures: leave --precision-text and --precision-audio out")
    sizes = [recognised.fields.get("image_size"), (recognised.fields.get("model_args") or {}).get("img_size")]
    side = next((size for size in sizes if isinstance(size, int)), None) or _learned_side(recognised.path)
    return dict(model=Load(recognised.path), inputs=Draw(side, asked), checkpoint=recognised.path)


def _learned_side(path: Path) -> int:
    """The size of the pictures that the positions were learned for; `SIDE` of a model without them."""
    entries, _ = read_checkpoint(path)
    shapes = {name.rpartition("preprocessor.")[2]: entry.shape for name, entry in entries.items()}
    tokens = [shape[-2] for name, shape in shapes.items() if name.endswith(("pos_embed", "position_embedding.weight"))]
    patches = [shape[-1] for name, shape in shapes.items() if len(shape) == 4]
    return math.isqrt(tokens[0]) * patches[0] if tokens and patches else SIDE


@dataclass(frozen=True)
class Load:
    """Builds the AIMv2 of a checkpoint in float32. Raises: CheckpointError."""

    path: Path

    def __call__(self) -> nn.Module:
        from harness.models.aimv2 import load

        return load(self.path, dtype=torch.float32)


@dataclass(frozen=True)
class Draw:
    """Pictures (B, 3, side, side), prepared as the model's own recipe does."""

    side: int
    asked: Asked

    def __call__(self, generator: torch.Generator) -> Tensor:
        from harness.models.aimv2 import preprocess

        return torch.cat([preprocess(picture, size=self.side) for picture in pictures(self.asked, generator)])
