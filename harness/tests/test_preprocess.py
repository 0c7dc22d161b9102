"""Pictures: the hub's recipe to the bit, and any file that Pillow opens."""

import numpy as np
import pytest
import torch
from PIL import Image

from harness.errors import HarnessError
from harness.models.aimv2 import PHOTO, open_picture, preprocess
from harness.tests.needs import import_transformers


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    import_transformers()
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil()


@pytest.mark.parametrize(
    "size", [(451, 300), (640, 427), (427, 640), (30, 20), (224, 224), (225, 224), (700, 701), (7, 300)], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1", "LA"])
def test_pixels_are_those_of_the_hub_to_the_bit(processor, size, mode):
    image = picture(*size).convert(mode)
    assert torch.equal(preprocess(image), processor(image, return_tensors="pt")["pixel_values"])


def test_another_size_too(processor):
    image = picture(500, 333)
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    assert torch.equal(preprocess(image, size=336), processor(image, return_tensors="pt", **sizes)["pixel_values"])


def test_native_resolution_keeps_every_pixel(processor):
    image = picture(100, 70)
    result = preprocess(image, size=None)
    assert result.shape == (1, 3, 70, 100)
    assert torch.equal(
        result, processor(image, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright(tmp_path, orientation):
    upright = picture(40, 30)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(preprocess(tmp_path / "turned.png"), preprocess(upright))


def test_sixteen_bits_of_grey_do_not_saturate(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    result = np.asarray(open_picture(tmp_path / "deep.png"))
    assert result.shape == (64, 64, 3) and result.max() == 255 and abs(int(result[32, 0, 0]) - 128) <= 1


def test_the_committed_photograph_is_one():
    result = preprocess(PHOTO)
    assert result.shape == (1, 3, 224, 224) and 0.2 < float(result.std()) < 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, I am text\n", "is not a picture that Pillow knows"),
        (b"", "is not a picture that Pillow knows"),
        (None, "no picture at"),
    ],
)
def test_what_is_no_picture_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "file.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HarnessError, match=words):
        preprocess(path)


def test_half_a_picture_is_refused(tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(PHOTO.read_bytes()[:9000])
    with pytest.raises(HarnessError, match="cannot be read"):
        preprocess(path)


def test_a_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(HarnessError, match="too elongated"):
        preprocess(Image.new("RGB", (1, 60000)))
