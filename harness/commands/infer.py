"""python -m harness infer"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import DTYPES, Command, add_checkpoint, add_device, add_model_dir, asked_of


def _add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_device(parser)
    add_model_dir(parser)
    parser.add_argument("--seed", type=int, default=42, help="of the drawn input (default 42)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what came out there as safetensors")


def _run(arguments: argparse.Namespace) -> int:
    from harness.checkpoints.recognition import is_aimv2
    from harness.models.inference import check_writable, infer, model_directory, write_tensors

    named = arguments.checkpoint or arguments.model_dir  # MODEL_DIR counts where neither is given
    given, _ = model_directory(named)
    how = dict(dtype=arguments.dtype, device=arguments.device, seed=arguments.seed)
    if given is None or (is_aimv2(given) and not arguments.text and not arguments.audio):
        image = None if arguments.image is None else Path(arguments.image)
        directory = None if named is None else Path(named)
        print(infer(image=image, model_dir=directory, output=arguments.output, **how))
        return 0
    from harness.run.once import infer_checkpoint

    if arguments.output is not None:
        check_writable(arguments.output)
    text, outputs = infer_checkpoint(given, part=arguments.part, **how, **asked_of(arguments))
    if arguments.output is not None:
        write_tensors(arguments.output, outputs)
        text = f"{text}\nwritten   {arguments.output}"
    print(text)
    return 0


COMMAND = Command(
    name="infer",
    summary="Run a checkpoint on seeded input or on a file, and print what came out; without one, AIMv2-large.",
    example="python -m harness infer ./bert-base-chinese --text '今天天气很好' --dtype float16\n"
    "  python -m harness infer ./aimv2-large-patch14-224-distilled --image photo.jpg",
    add=_add,
    run=_run,
)
