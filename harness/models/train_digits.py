"""Trains the small AIMv2 of data/digits and the vision transformer of data/vision on scikit-learn's digits.

    python -m harness.models.train_digits [DIRECTORY]
    python -m harness.models.train_digits vision [DIRECTORY]

Each takes a minute or less on two cores and gives the same accuracy, though not the same bits, on every machine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models import vision
from harness.models.aimv2 import build
from harness.models.digits import DIGITS_CONFIG, DIGITS_FOLDER, Classifier, pixel_values

SEED, EPOCHS, _BATCH, HELD_OUT = 0, 60, 64, 360


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grey levels and labels, of the digits to train on and of those to hold out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey, labels = torch.from_numpy(digits.images).to(torch.uint8), torch.from_numpy(digits.target).to(torch.uint8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    training, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return grey[training], labels[training], grey[held_out].contiguous(), labels[held_out].contiguous()


def train(grey: Tensor, labels: Tensor, model: nn.Module | None = None) -> nn.Module:
    """A classifier trained from seeded weights: the small AIMv2, or `model`."""
    torch.default_generator.manual_seed(SEED)
    model = (Classifier(build(DIGITS_CONFIG, SEED)) if model is None else model).train().requires_grad_(True)
    steps = EPOCHS * (len(labels) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for chosen in order[: len(order) // _BATCH * _BATCH].view(-1, _BATCH):
            shift = tuple(int(item) for item in torch.randint(-1, 2, (2,)))
            pictures = torch.roll(grey[chosen], shift, dims=(1, 2))  # a pixel aside: cheap augmentation
            loss = F.cross_entropy(model(pixel_values(pictures)), labels[chosen].long(), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def main(folder: Path = DIGITS_FOLDER) -> float:
    """Train, write weights and held-out digits into `folder`, and return the accuracy on the held-out ones."""
    grey, labels, held_out_grey, held_out_labels = split()
    model = train(grey, labels)
    accuracy = _accuracy(model, held_out_grey, held_out_labels)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.encoder.state_dict(), folder / "model.safetensors")
    save_file(model.classifier.state_dict(), folder / "classifier.safetensors")
    save_file({"grey": held_out_grey, "labels": held_out_labels}, folder / "held_out.safetensors")
    sizes = asdict(DIGITS_CONFIG)
    config = {
        "architectures": ["AIMv2Model"],
        "model_type": "aimv2",
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["hidden"],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch"],
        "num_channels": sizes["channels"],
        "rms_norm_eps": sizes["eps"],
        "qkv_bias": False,
        "use_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return accuracy


def main_vision(folder: Path = vision.VISION_FOLDER) -> float:
    """Train the vision transformer, write its weights into `folder`, and return the accuracy on the held-out digits."""
    grey, labels, held_out_grey, held_out_labels = split()
    model = train(grey, labels, vision.build(SEED))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return _accuracy(model, held_out_grey, held_out_labels)


def _accuracy(model: nn.Module, grey: Tensor, labels: Tensor) -> float:
    return float((model(pixel_values(grey)).argmax(-1) == labels).float().mean())


if __name__ == "__main__":
    given = sys.argv[1:]
    trains, folder = (main_vision, vision.VISION_FOLDER) if given[:1] == ["vision"] else (main, DIGITS_FOLDER)
    given = given[1:] if trains is main_vision else given
    print(f"accuracy on {HELD_OUT} held-out digits: {trains(Path(given[0]) if given else folder):.1%}")
