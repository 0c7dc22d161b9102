"""What checkpoints are given: sentences, pictures and sounds, drawn by a seed, or a user's own files."""

from __future__ import annotations

import functools
import math
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.errors import CheckpointError

if TYPE_CHECKING:
    from PIL import Image

_FOLDER = Path(__file__).parent / "data"
TEXT_LANGUAGES = ("english", "chinese", "code")
_SECONDS = 1.0  # of a synthesised sound


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user may say of the inputs and of the loading of a checkpoint.

    batch: sequences, pictures or sounds at a time. length: tokens of a sequence, with its padding. text: a file with
    one text a line, or a text. image, audio: files. base: the base model of an adapter.
    """

    batch: int = 2
    length: int = 32
    text: str | None = None
    image: str | None = None
    audio: str | None = None
    base: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 was expected")

    @property
    def own_files(self) -> bool:
        """Whether the user gives the inputs, so that no seed draws them."""
        return any((self.text, self.image, self.audio))


@functools.cache
def sentences(language: str) -> tuple[str, ...]:
    """The sentences of a language: "english", "chinese" or "code"."""
    return tuple((_FOLDER / f"{language}.txt").read_text(encoding="utf-8").splitlines())


def texts(asked: Asked, generator: torch.Generator) -> list[str]:
    """`asked.batch` texts, in English, Chinese and code in turn, or the user's own; each is one to three sentences.

    Raises: CheckpointError where the user's file holds none.
    """
    if asked.text is not None:
        return own_texts(asked.text)
    return [_text(TEXT_LANGUAGES[place % len(TEXT_LANGUAGES)], generator) for place in range(asked.batch)]


def own_texts(given: str) -> list[str]:
    """The texts of a file, one a line without empty ones, or the text itself where there is no such file.

    Raises: CheckpointError for a file without text.
    """
    path = Path(given)
    try:
        if not path.is_file():
            return [given]
        result = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):  # a long text is no name of a file
            return [given]
        raise CheckpointError(f"--precision-text {given} is not text in UTF-8; one text a line was expected") from None
    if not result:
        raise CheckpointError(f"--precision-text {given} holds no text; one text a line was expected")
    return result


def _text(language: str, generator: torch.Generator) -> str:
    known = sentences(language)
    count = int(torch.randint(1, 4, (1,), generator=generator))
    chosen = torch.randint(0, len(known), (count,), generator=generator).tolist()
    return ("" if language == "chinese" else " ").join(known[item] for item in chosen)


def pictures(asked: Asked, generator: torch.Generator) -> list[Image.Image]:
    """`asked.batch` pictures in RGB: a part of the photograph, then noise, in turn; or the user's own.

    Raises: HarnessError for a file without a picture.
    """
    from PIL import Image

    from harness.models.aimv2 import PHOTO, open_picture

    if asked.image is not None:
        return [open_picture(asked.image)]
    photograph, result = open_picture(PHOTO), []
    for place in range(asked.batch):
        if place % 2:
            noise = torch.randint(0, 256, (224, 224, 3), generator=generator, dtype=torch.uint8)
            result.append(Image.fromarray(noise.numpy()))
        else:
            result.append(_part(photograph, generator))
    return result


def _part(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """A part of a picture of at least three quarters of its edges, at a place that the seed draws."""
    share = 0.75 + 0.25 * float(torch.rand((), generator=generator))
    width, height = int(picture.width * share), int(picture.height * share)
    left = int(torch.randint(0, picture.width - width + 1, (), generator=generator))
    top = int(torch.randint(0, picture.height - height + 1, (), generator=generator))
    return picture.crop((left, top, left + width, top + height))


def frames(asked: Asked, generator: torch.Generator, count: int) -> list[list[Image.Image]]:
    """`asked.batch` clips of `count` frames: a window that moves over the photograph or over noise."""
    clips = []
    for picture in pictures(asked, generator):
        width, height = picture.width * 3 // 4, picture.height * 3 // 4
        steps = [place / max(count - 1, 1) for place in range(count)]
        corners = [(int((picture.width - width) * step), int((picture.height - height) * step)) for step in steps]
        clips.append([picture.crop((left, top, left + width, top + height)) for left, top in corners])
    return clips


def sounds(asked: Asked, generator: torch.Generator, rate: int) -> list[Tensor]:
    """`asked.batch` sounds (samples,) in [-1, 1] at `rate` Hz: a synthesised voice, or the user's own recording.

    Raises: CheckpointError for a file that is no WAV, or of another rate.
    """
    if asked.audio is not None:
        return [_recording(asked.audio, rate)]
    return [_voice(generator, rate) for _ in range(asked.batch)]


def _voice(generator: torch.Generator, rate: int) -> Tensor:
    """Harmonics of a gliding pitch under a syllable's envelope, and some noise: (samples,)."""
    time = torch.arange(int(_SECONDS * rate), dtype=torch.float64) / rate
    low, high, pace = (float(item) for item in torch.rand(3, generator=generator, dtype=torch.float64))
    pitch = 90 + 80 * low + 60 * high * time / _SECONDS  # Hz
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / rate
    voice = sum(torch.sin(phase * harmonic) / harmonic for harmonic in range(1, 9))
    envelope = torch.sin(math.pi * (3 + 2 * pace) * time).abs()
    noise = torch.randn(time.shape, generator=generator, dtype=torch.float64)
    sound = voice * envelope + 0.02 * noise
    return (0.5 * sound / sound.abs().max()).float()


def _recording(given: str, rate: int) -> Tensor:
    try:
        with wave.open(given) as opened:
            channels, width, result = opened.getnchannels(), opened.getsampwidth(), opened.getframerate()
            raw = opened.readframes(opened.getnframes())
    except FileNotFoundError:
        raise CheckpointError(f"no recording at {given}") from None
    except (wave.Error, EOFError, OSError) as error:
        raise CheckpointError(f"--precision-audio {given} is not a WAV file with PCM samples ({error})") from None
    if width != 2 or result != rate:
        raise CheckpointError(
            f"--precision-audio {given} has {8 * width} bits at {result} Hz; 16 bits at {rate} Hz were "
            "expected: convert it first"
        )
    samples = torch.frombuffer(bytearray(raw), dtype=torch.int16).float() / 32768
    return samples.reshape(-1, channels).mean(1)


def ids(asked: Asked, generator: torch.Generator, vocabulary: int, length: int, avoided: set[Any]) -> Tensor:
    """Token ids (batch, length) below `vocabulary`, without those in `avoided`, which have a meaning of their own."""
    allowed = [index for index in range(vocabulary) if index not in avoided] if vocabulary < 4096 else []
    drawn = torch.randint(0, vocabulary, (asked.batch, length), generator=generator)
    if allowed:
        return torch.tensor(allowed)[drawn % len(allowed)]
    ordinary = next(index for index in range(vocabulary // 2, vocabulary) if index not in avoided)
    special = torch.isin(drawn, torch.tensor(sorted(avoided), dtype=torch.long))
    return torch.where(special, ordinary, drawn)


def ragged_mask(batch: int, length: int, *, left: bool) -> Tensor:
    """A mask (batch, length) of ones whose first row has a quarter of padding, at its left or its right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    padding = length // 4
    if padding:
        mask[0, slice(None, padding) if left else slice(-padding, None)] = 0
    return mask
