"""What a command is, and the arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")


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
        help="auto (default), npu[:n], emulated, cuda[:n] or cpu; a named one that cannot run is an error",
    )


def add_preset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"floor, sharp, card, cann, dynamo, close or pair ({default})")


def add_model_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="the checkpoint; default: the environment variable MODEL_DIR, else seeded weights",
    )
