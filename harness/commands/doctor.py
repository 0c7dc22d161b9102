"""python -m harness doctor"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command, add_device
from harness.commands.calibrate import read_measurements, take_measurements


def _add(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="as calibrate --output",
    )
    parser.add_argument("--read-probe", type=Path, metavar="FILE", help="as calibrate --read")
    parser.add_argument(
        "--model-size",
        metavar="N",
        help="what a case with N parameters (7B, 350M), or with the checkpoint at N, needs of host and device",
    )
    parser.add_argument("--dtype", help="with --model-size: that dtype alone (default: float32, float16, bfloat16)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="with --model-size: workers of xdist (default 1)"
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.read_probe is not None:
        return read_measurements(arguments.read_probe)
    if arguments.probe is not None:
        return take_measurements(arguments.device, arguments.probe)
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


COMMAND = Command(
    name="doctor",
    summary="Print the stack, check that its versions fit, and that the device answers, or whether a model fits.",
    example="python -m harness doctor --device npu\n"
    "  python -m harness doctor --model-size 7B --dtype float16 --workers 2",
    add=_add,
    run=_run,
)
