"""A small AIMv2 that is really trained, on handwritten digits: its decisions can be compared, not its features alone.

It was trained by `python -m harness.models.train_digits`; its weights and the held-out digits lie in data/digits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.models.aimv2 import AIMv2, AIMv2Config, load

DIGITS_FOLDER = Path(__file__).parent / "data" / "digits"
DIGITS_CONFIG = AIMv2Config(width=64, depth=4, heads=4, hidden=176, image_size=8, pool=True, patch=2)
_CLASSES = 10


class Classifier(nn.Module):
    """Pictures (B, 3, 8, 8) to the logits of ten digits (B, 10), through the encoder's attention pool."""

    def __init__(self, encoder: AIMv2):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.width, _CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.encoder.pool(self.encoder(pixel_values)))


def model() -> Classifier:
    """The trained classifier, in float32 on the CPU."""
    classifier = Classifier(load(DIGITS_FOLDER, dtype=torch.float32))
    classifier.classifier.load_state_dict(load_file(DIGITS_FOLDER / "classifier.safetensors"), strict=True)
    return classifier.eval().requires_grad_(False)


def pixel_values(grey: Tensor) -> Tensor:
    """Digits of 0 to 16 in grey, (B, 8, 8), as the encoder takes them: (B, 3, 8, 8) in float32, -1 to 1."""
    return (grey.float() / 8 - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def held_out() -> tuple[Tensor, Tensor]:
    """The digits that it was not trained on, (360, 3, 8, 8), and what they are, (360,)."""
    stored = load_file(DIGITS_FOLDER / "held_out.safetensors")
    return pixel_values(stored["grey"]), stored["labels"].long()
