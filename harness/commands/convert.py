"""python -m harness convert"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    from harness.models.aimv2_layouts import layout_names

    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a .safetensors file, or a directory with one or with shards"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="a new directory")
    parser.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help=f"the layout to write: {layout_names()}",
    )


def _run(arguments: argparse.Namespace) -> int:
    from harness.models.aimv2 import convert_checkpoint

    print(convert_checkpoint(arguments.source, arguments.destination, to=arguments.to))
    return 0


COMMAND = Command(
    name="convert",
    summary="Convert an AIMv2 checkpoint and its config to another key layout.",
    example="python -m harness convert ./aimv2-large-patch14-224-distilled ./converted --to apple",
    add=_add,
    run=_run,
)
