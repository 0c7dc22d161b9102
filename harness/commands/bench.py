"""python -m harness bench"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import DTYPES, Command, add_checkpoint, add_device, add_model_dir, asked_of


def _add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 4], metavar="B")
    parser.add_argument("--iters", type=positive, default=20, help="timed forwards (default 20; p99 needs 100)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed forwards before them (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_device(parser)
    add_model_dir(parser)


def _run(arguments: argparse.Namespace) -> int:
    from harness.checkpoints.recognition import is_aimv2
    from harness.models.inference import bench_aimv2, model_directory

    named = arguments.checkpoint or arguments.model_dir  # MODEL_DIR counts where neither is given
    given, _ = model_directory(named)
    how = dict(device=arguments.device, dtype=arguments.dtype, batch_sizes=arguments.batch_size)
    how |= dict(iterations=arguments.iters, warmup=arguments.warmup)
    if given is None or is_aimv2(given):
        print(bench_aimv2(model_dir=None if named is None else Path(named), **how))
        return 0
    from harness.report import performance_text
    from harness.run.once import bench_checkpoint

    rows, device = bench_checkpoint(given, part=arguments.part, **how, **asked_of(arguments))
    print(performance_text(rows, backend=device.backend, stack=device.stack.to_dict()))
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


COMMAND = Command(
    name="bench",
    summary="Time a checkpoint, or AIMv2-large, on the device and on the CPU, each forward ended by a device "
    "synchronisation.",
    example="python -m harness bench ./bert-base-chinese --batch-size 1 4 --iters 100 --warmup 10",
    add=_add,
    run=_run,
)
