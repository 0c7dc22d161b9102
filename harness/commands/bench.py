"""python -m harness bench"""

from __future__ import annotations

import argparse

from harness.commands.base import DTYPES, Command, add_device, add_model_dir


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 4], metavar="B")
    parser.add_argument("--iters", type=positive, default=20, help="timed forwards (default 20; p99 needs 100)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed forwards before them (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_device(parser)
    add_model_dir(parser)


def _run(arguments: argparse.Namespace) -> int:
    from harness.models.inference import bench_aimv2

    print(
        bench_aimv2(
            device=arguments.device,
            dtype=arguments.dtype,
            batch_sizes=arguments.batch_size,
            iterations=arguments.iters,
            warmup=arguments.warmup,
            model_dir=arguments.model_dir,
        )
    )
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


COMMAND = Command(
    name="bench",
    summary="Time AIMv2 on the device and on the CPU, each forward ended by a device synchronisation.",
    example="python -m harness bench --batch-size 1 4 --iters 100 --warmup 10",
    add=_add,
    run=_run,
)
