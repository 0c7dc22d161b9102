"""python -m harness card"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import DTYPES, Command, add_checkpoint, add_device, asked_of
from harness.errors import HarnessError
from harness.languages import LANGUAGE_NAMES


def _add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, parts=False)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new directory, which is filled")
    parser.add_argument("--lang", choices=LANGUAGE_NAMES, default="en", help="of README.md (default en)")
    parser.add_argument(
        "--template",
        default="origin",
        metavar="STYLE",
        help="origin (default), hub or vllm-ascend, or the file of a jinja2 template of your own",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=(), help="default: float32 and that of the stored weights"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 42 123 256 789 1024")
    parser.add_argument(
        "--one-percent",
        choices=("rel_l2", "wape", "mape", "cosine", "max_rel", "score"),
        default="rel_l2",
        help="which relative error is marked as the one that was asked for; all are shown (default rel_l2)",
    )
    parser.add_argument("--within", type=float, default=0.01, metavar="SHARE", help="the limit on it (default 0.01)")
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="B", help="that are timed (default 1 4)")
    parser.add_argument("--iters", type=int, help="timed forwards (default 100, which p99 needs)")
    parser.add_argument("--warmup", type=int, help="untimed forwards before them (default 10)")
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    from harness.card.making import BATCHES, ITERATIONS, WARMUP, Order, make
    from harness.checkpoints.building import SEEDS

    if arguments.checkpoint is None:
        raise HarnessError("name a checkpoint: python -m harness card DIR --output OUT")
    order = Order(
        path=arguments.checkpoint,
        output=arguments.output,
        device=arguments.device,
        dtypes=tuple(dict.fromkeys(arguments.dtype)),
        seeds=tuple(dict.fromkeys(arguments.seeds or SEEDS)),
        lang=arguments.lang,
        template=arguments.template,
        meaning=arguments.one_percent,
        limit=arguments.within,
        batches=tuple(arguments.batch_size or BATCHES),
        iterations=ITERATIONS if arguments.iters is None else arguments.iters,
        warmup=WARMUP if arguments.warmup is None else arguments.warmup,
        asked=asked_of(arguments),
    )
    made = make(order)
    print(f"{made.folder / 'README.md'}: {made.passed} of {len(made.rows)} rows pass")
    for text in made.missing:
        print(f"left out  {text}")
    for row in made.bad:
        print(f"{row.status} {row.name}: {'; '.join(row.reasons)}")
    return 1 if made.bad or made.missing or not made.passed else 0


COMMAND = Command(
    name="card",
    summary="Measure a checkpoint and write the repository that is published for it: README, scripts, numbers, logs.",
    example="python -m harness card ./aimv2-large-patch14-224-distilled --device npu --lang zh --output card/\n"
    "  python -m harness card ./bert-base-chinese --template hub --dtype float32 float16 --output card/",
    add=_add,
    run=_run,
)
