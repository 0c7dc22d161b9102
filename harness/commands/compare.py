"""python -m harness compare"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command, add_preset
from harness.typed_json import shown


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "actual",
        type=Path,
        metavar="A",
        help="what is judged: .safetensors, .npy, .npz, .pt (weights only), or a folder of these",
    )
    parser.add_argument("expected", type=Path, metavar="B", help="what it is held against")
    parser.add_argument("--golden", type=Path, metavar="G", help="the same in float64; the floor is then B's own error")
    add_preset(parser, "default: pair, with --golden floor")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a limit of your own, such as max_diff=1e-3; with --preset it replaces that one",
    )
    parser.add_argument(
        "--strip-prefix",
        action="append",
        default=[],
        metavar="PREFIX",
        help="take this off the names that begin with it, on either side; may be repeated",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="rename the tensors of A: a regular expression and what takes its place; may be repeated",
    )
    parser.add_argument(
        "--coarser-dtype",
        action="store_true",
        help="compare pairs of two dtypes in the one with fewer bits, in place of failing them",
    )
    parser.add_argument(
        "--max-inflated",
        default="512MiB",
        metavar="SIZE",
        help="memory that one tensor may take beyond its bytes in the file (default 512MiB)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")


def _run(arguments: argparse.Namespace) -> int:
    from harness.judging.tolerance import Tolerance
    from harness.pairs import Options, compare_paths
    from harness.pairs.names import Naming
    from harness.report import pairs_text, write_pairs

    limits = dict(_limit(item) for item in arguments.limit)
    default = "floor" if arguments.golden else "pair"
    preset = arguments.preset or ("" if limits else default)
    tolerance = Tolerance(preset=preset, reason="--limit" if limits else "", **limits)
    naming = Naming(prefixes=tuple(arguments.strip_prefix), renames=tuple(_rename(item) for item in arguments.map))
    options = Options(naming=naming, coarser=arguments.coarser_dtype, limit=_bytes(arguments.max_inflated))
    if arguments.golden and options.coarser:
        raise ValueError(
            "--coarser-dtype and --golden exclude one another: a golden tensor judges a pair of one dtype; give one"
        )
    result = compare_paths(arguments.actual, arguments.expected, tolerance, golden=arguments.golden, options=options)
    paths = f"{shown(str(arguments.actual), 400)} against {shown(str(arguments.expected), 400)}"
    title = f"{paths}, {preset or 'limits of your own'}"
    if arguments.json:
        write_pairs(result.pairs, arguments.json)
    print(pairs_text(result.pairs, title=title, notes=result.notes))
    return 0 if result.passed else 1


def _rename(text: str) -> tuple[str, str]:
    import re

    old, equals, new = text.partition("=")
    if not equals or not old:
        raise ValueError(f"--map {shown(text)}: OLD=NEW was expected, such as '^module\\.=model.'")
    try:
        re.compile(old)
    except re.error as error:
        raise ValueError(f"--map {shown(text)}: {shown(old)!r} is no regular expression: {error}") from None
    return old, new


def _bytes(text: str) -> int:
    import re

    units = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    result = re.fullmatch(r"([0-9]{1,12})([A-Z]*)", text.strip().upper())
    if result is None or result.group(2) not in units:
        raise ValueError(
            f"--max-inflated {shown(text)}: a number of bytes with a unit was expected, such as 512MiB or 4GiB"
        )
    return int(result.group(1)) * units[result.group(2)]


def _limit(text: str) -> tuple[str, float]:
    from harness.judging.tolerance import LIMITS

    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise ValueError(f"--limit {text}: there is no limit {name!r}; there are {', '.join(LIMITS)}")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--limit {text}: {value!r} is no number; write it as max_diff=1e-3") from None


COMMAND = Command(
    name="compare",
    summary="Compare two files or folders of tensors by name and judge every pair; exit status 0 only when all pass.",
    example="python -m harness compare npu_outputs/ cpu_outputs/ --preset pair\n"
    "  python -m harness compare npu.pt cpu.pt --golden float64.safetensors\n"
    "  python -m harness compare npu_dump/ gpu_dump/ --strip-prefix module. --map '^layer([0-9]+)=layers.\\1'\n\n"
    "folders that msprobe and SGLang's dumper wrote are read as they are; harness/docs/compare.md",
    add=_add,
    run=_run,
)
