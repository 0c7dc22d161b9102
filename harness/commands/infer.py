"""python -m harness infer"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import DTYPES, Command, add_device, add_model_dir


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", type=Path, help="a picture that Pillow opens; without it the input is random, seeded"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_device(parser)
    add_model_dir(parser)
    parser.add_argument("--seed", type=int, default=42, help="of the random input (default 42)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the features there as safetensors")


def _run(arguments: argparse.Namespace) -> int:
    from harness.models.inference import infer

    print(
        infer(
            image=arguments.image,
            dtype=arguments.dtype,
            device=arguments.device,
            model_dir=arguments.model_dir,
            seed=arguments.seed,
            output=arguments.output,
        )
    )
    return 0


COMMAND = Command(
    name="infer",
    summary="Run AIMv2 on one picture, or on seeded random input, and print what came out.",
    example="python -m harness infer --image photo.jpg --dtype float16 --model-dir ./aimv2-large-patch14-224-distilled",
    add=_add,
    run=_run,
)
