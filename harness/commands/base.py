"""What a command is, and the arguments that several commands take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.devices.names import SPECS_LISTED
from harness.judging.preset_names import PRESETS_LISTED

DTYPES = ("float32", "float16", "bfloat16")
_ASKED = ("text", "image", "audio", "length", "base", "trust_remote_code")  # of what a checkpoint is given


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `python -m harness`: `add` declares its arguments, `run` returns its exit status."""

    name: str
    summary: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    usage: str | None = None


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help=f"{SPECS_LISTED}; a named one that cannot run is an error",
    )


def add_preset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"{PRESETS_LISTED} ({default})")


def add_checkpoint(parser: argparse.ArgumentParser, *, parts: bool = True) -> None:
    """The checkpoint that a command runs, and what it is given; with `parts` one part of it may be named."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="DIR",
        help="a directory of transformers, sentence-transformers, diffusers, timm, PEFT or AIMv2, a .pt2 or "
        "TorchScript file, or module:function",
    )
    if parts:
        parser.add_argument("--part", help="of it: forward (default), decode, generate, or a component of a pipeline")
    parser.add_argument("--text", metavar="FILE", help="a file with one text a line, or a text")
    parser.add_argument("--image", metavar="FILE", help="a picture that Pillow opens")
    parser.add_argument("--audio", metavar="FILE", help="a WAV recording")
    parser.add_argument("--length", type=int, default=32, metavar="N", help="tokens of a sequence at most (default 32)")
    parser.add_argument("--base", metavar="DIR", help="the base model of an adapter")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def asked_of(arguments: argparse.Namespace) -> dict:
    """What `Case.from_checkpoint` takes of these arguments."""
    return {name: getattr(arguments, name) for name in _ASKED}


def without_prefix(text: str, arguments: argparse.Namespace) -> str:
    """A message about a checkpoint with a command's own options, where it names those of pytest.

    >>> without_prefix("leave --precision-text out", argparse.Namespace(text="a text"))
    'leave --text out'
    """
    names = "|".join(name.replace("_", "-") for name in _ASKED if hasattr(arguments, name))
    return re.sub(rf"--precision-(?=(?:{names})\b)", "--", text) if names else text


def add_model_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="the checkpoint; default: the environment variable MODEL_DIR, else seeded weights",
    )
