"""python -m harness doctor"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.commands.base import Command, add_device


def _add(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="take the ten measurements of a card (about a minute) and write them there as JSON",
    )
    parser.add_argument("--read-probe", type=Path, metavar="FILE", help="say what such a file of another machine means")
    parser.add_argument(
        "--model-size", metavar="N", help="what a case with N parameters (7B, 350M) needs of host and device"
    )
    parser.add_argument("--dtype", help="with --model-size: that dtype alone (default: float32, float16, bfloat16)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="with --model-size: workers of xdist (default 1)"
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.probe is not None or arguments.read_probe is not None:
        return _probe(arguments)
    if arguments.model_size is not None:
        from harness.commands.model_size import model_size

        emulated = arguments.device.startswith("emulated")
        text, fits = model_size(
            arguments.model_size, dtype=arguments.dtype, workers=arguments.workers, emulated=emulated
        )
        print(text)
        return 0 if fits else 1
    from harness.commands.health import doctor

    text, healthy = doctor(arguments.device)
    print(text)
    return 0 if healthy else 1


def _probe(arguments) -> int:
    from harness.commands.probe import probe, read_probe, text_of

    if arguments.read_probe is not None:
        print(text_of(read_probe(arguments.read_probe)))
        return 0
    document = probe(arguments.device, arguments.probe, say=lambda text: print(text, file=sys.stderr))
    print(text_of(document))
    print(f"\nwritten to {arguments.probe}")
    return 0 if document["stopped"] is None else 1


COMMAND = Command(
    name="doctor",
    summary="Print the stack, check that its versions fit, and that the device answers; or measure how it rounds, sums "
    "and overflows.",
    example="python -m harness doctor --device npu\n  python -m harness doctor --device npu --probe probe.json\n  "
    "python -m harness doctor --read-probe probe.json\n"
    "  python -m harness doctor --model-size 7B --dtype float16 --workers 2",
    add=_add,
    run=_run,
)
