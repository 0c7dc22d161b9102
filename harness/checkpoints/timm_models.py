"""Checkpoints of timm: image classifiers and features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints.libraries import library, loading
from harness.checkpoints.material import Asked, pictures
from harness.checkpoints.recognition import Recognised
from harness.checkpoints.weights import require_weights
from harness.errors import CheckpointError

_KIND = "timm"


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """One: the logits, or the features of a model without classes."""
    return ("forward",)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The arguments of the Case that runs one forward."""
    if asked.text is not None or asked.audio is not None:
        raise CheckpointError(f"{recognised.path} takes pictures: leave --precision-text and --precision-audio out")
    pretrained = recognised.fields.get("pretrained_cfg") or recognised.fields
    classes = recognised.fields.get("num_classes", pretrained.get("num_classes", 0))
    given: dict[str, Any] = dict(model=Load(recognised.path), inputs=Draw(recognised, asked))
    return given | (dict(decisions="output") if classes and classes > 1 else {})


@dataclass(frozen=True)
class Load:
    """Builds the model of a directory in float32. Raises: CheckpointError."""

    path: Path

    def __call__(self) -> nn.Module:
        timm = library("timm", _KIND)
        require_weights(self.path)
        with loading(f"the timm model of {self.path}"):
            return timm.create_model(f"local-dir:{self.path}", pretrained=True).eval()


@dataclass(frozen=True)
class Draw:
    """Pictures (B, C, H, W) through timm's own transform for this checkpoint. Raises: CheckpointError."""

    found: Recognised
    asked: Asked

    def __call__(self, generator: torch.Generator) -> Tensor:
        data = library("timm", _KIND).data
        with loading(f"the transform of {self.found.path}"):
            settings = data.resolve_data_config(pretrained_cfg=dict(self.found.fields.get("pretrained_cfg") or {}))
            transform = data.create_transform(**settings, is_training=False)
            return torch.stack([transform(picture) for picture in pictures(self.asked, generator)])
