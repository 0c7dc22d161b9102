"""python -m harness calibrate"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.commands.base import Command, add_device


def _add(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--output", type=Path, metavar="FILE", help="take the ten measurements and write them there as JSON"
    )
    way.add_argument("--read", type=Path, metavar="FILE", help="say what such a file of another machine means")


def _run(arguments: argparse.Namespace) -> int:
    return (
        read_measurements(arguments.read) if arguments.read else take_measurements(arguments.device, arguments.output)
    )


def take_measurements(device: str, output: Path) -> int:
    """Measure a device, write `output` and print what it means; 1 where the device stopped answering."""
    from harness.commands.probe import probe, text_of

    document = probe(device, output, say=lambda text: print(text, file=sys.stderr))
    print(text_of(document))
    print(f"\nwritten to {output}")
    return 0 if document["stopped"] is None else 1


def read_measurements(path: Path) -> int:
    """Print what a file of another machine means."""
    from harness.commands.probe import read_probe, text_of

    print(text_of(read_probe(path)))
    return 0


COMMAND = Command(
    name="calibrate",
    summary="Measure in about a minute how an NPU rounds, sums and overflows, beside the rules of the forecast.",
    example="python -m harness calibrate --device npu --output probe.json\n  "
    "python -m harness calibrate --read probe.json",
    add=_add,
    run=_run,
)
