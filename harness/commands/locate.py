"""python -m harness locate"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command, add_device
from harness.errors import HarnessError

_ROWS = Path(__file__).parents[1] / "plugin" / "checkpoint_rows.py"  # the tests that run a checkpoint


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", metavar="CASE", help="a case's name, a part of test ids, or a checkpoint")
    parser.add_argument("--seed", type=int, help="only the row with this seed")
    parser.add_argument(
        "--level", choices=("auto", "operators", "modules"), default="auto", help="modules: a fast first look"
    )
    parser.add_argument("--backward", action="store_true", help="look at each operator's gradients too")
    parser.add_argument(
        "--cases", type=Path, default=Path("cases"), metavar="PATH", help="where the cases are (default cases/)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("reports/located"),
        metavar="DIR",
        help="where the report and the repro go (default reports/located/)",
    )
    parser.add_argument(
        "--fault", action="append", default=[], metavar="FAULT", help="break the emulated device on purpose"
    )
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    import pytest

    from harness.report import load

    named = arguments.case
    if _is_checkpoint(arguments.case):
        from harness.checkpoints.recognition import recognise

        named, arguments.cases = recognise(arguments.case).name, _ROWS
        arguments.seed = 42 if arguments.seed is None else arguments.seed
    if not arguments.cases.exists():
        raise HarnessError(f"no cases at {arguments.cases}; name their file or folder with --cases")
    command = [
        str(arguments.cases),
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "harness.plugin.entry",
        "--precision-baseline=off",
    ]
    command += [f"--precision-device={arguments.device}", f"--precision-report={arguments.report}"]
    command += [
        f"--precision-locate={arguments.level}",
        f"--precision-locate-case={named}",
        *([f"--precision-checkpoint={arguments.case}"] if named != arguments.case else []),
        *(f"--precision-fault={item}" for item in arguments.fault),
    ]
    command += ["--precision-locate-backward"] if arguments.backward else []
    command += [f"--precision-locate-seed={arguments.seed}"] if arguments.seed is not None else []
    status = pytest.main(command)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # it said why
        return 1
    rows = load(arguments.report / "precision.json").rows
    return 0 if rows and all(row.located is not None and row.located.operators for row in rows) else 1


def _is_checkpoint(case: str) -> bool:
    """Whether what is to be located is a checkpoint and no case's name."""
    return Path(case).exists() or ":" in case


COMMAND = Command(
    name="locate",
    summary="Find the operator that a case's error comes from, also of one that passes, and write a repro of one that "
    "is wrong.",
    example="python -m harness locate aimv2-digits --seed 42\n"
    "  python -m harness locate ./bert-base-chinese\n"
    "  python -m harness locate 'float16-photo' --fault 'aclnnSilu:scale:by=1.001'",
    add=_add,
    run=_run,
)
