"""The trained AIMv2: it knows its digits, and its training script is the one that made it."""

import pytest
import torch

from harness.models import digits, vision


def test_it_knows_digits_that_it_has_not_seen():
    pictures, labels = digits.held_out()
    assert pictures.shape == (360, 3, 8, 8) and labels.bincount(minlength=10).min() > 20
    with torch.no_grad():
        accuracy = float((digits.model()(pictures).argmax(-1) == labels).float().mean())
    assert accuracy >= 0.95


def test_the_vision_transformer_knows_them_too():
    pictures, labels = digits.held_out()
    model = vision.model()
    with torch.no_grad():
        accuracy = float((model(pictures).argmax(-1) == labels).float().mean())
    assert accuracy >= 0.9
    assert not torch.equal(model.head.weight, vision.build().head.weight)
    assert vision.VisionConfig().tokens == len(model.positions) == 16
    assert torch.equal(vision.build(3).head.weight, vision.build(3).head.weight)


def test_its_files_are_small():
    assert sum(path.stat().st_size for path in digits.DIGITS_FOLDER.iterdir()) < 1_000_000
    assert sum(path.stat().st_size for path in vision.VISION_FOLDER.iterdir()) < 100_000


def test_the_held_out_digits_are_those_that_training_leaves_out():
    pytest.importorskip("sklearn")
    from harness.models.train_digits import split

    kept, kept_labels, held, labels = split()
    pictures, stored = digits.held_out()
    assert torch.equal(digits.pixel_values(held), pictures) and torch.equal(labels.long(), stored)
    assert len(kept) + len(held) == 1797
    seen = {bytes(item.numpy().tobytes()) for item in kept}
    assert sum(item.numpy().tobytes() in seen for item in held) == 0


def test_training_lowers_the_loss(monkeypatch):
    pytest.importorskip("sklearn")
    from harness.models import train_digits

    monkeypatch.setattr(train_digits, "EPOCHS", 3)
    grey, labels, held, held_labels = train_digits.split()
    model = train_digits.train(grey, labels)
    accuracy = float((model(digits.pixel_values(held)).argmax(-1) == held_labels).float().mean())
    assert accuracy > 0.3  # chance is 0.1


def test_training_the_vision_transformer_writes_what_is_read(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    from harness.models import train_digits

    monkeypatch.setattr(train_digits, "EPOCHS", 6)
    assert train_digits.main_vision(tmp_path) > 0.2
    monkeypatch.setattr(vision, "VISION_FOLDER", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}
    assert not vision.model().training and not vision.model().head.weight.requires_grad
