"""What each part of `python -m harness.conformance` takes: declared apart from the parts, which import torch, so that
`--help` costs nothing.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.conformance import summary_of

_DTYPES = ("float32", "float16", "bfloat16")
_COMMAND = "python -m harness.conformance"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One part: what it is started by, an example, and the arguments that it adds to a parser."""

    example: str
    add: Callable[[argparse.ArgumentParser], None]
    command: str = _COMMAND


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a part, with the first paragraph of its module as what it does, and an example."""
    part = PARTS[name]
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(
        prog=f"{part.command} {name}",
        description=summary_of(ast.get_docstring(ast.parse(source)) or ""),
        epilog=f"example:\n  {part.command} {name} {part.example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    part.add(parser)
    return parser


def _output(parser: argparse.ArgumentParser, what: str = "write the table there; else it is printed") -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help=what)


def _models(parser: argparse.ArgumentParser, default: str, least: str = "+") -> None:
    what = f"their names; a name that there is not is answered with all of them; default: {default}"
    parser.add_argument("--models", nargs=least, metavar="MODEL", help=what)


def _architectures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; default: all")
    _output(parser, "write the table there, too")
    parser.add_argument("--compute", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)


def _bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="emulated", help="emulated (default), npu[:n], cuda[:n] or cpu")


def _checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the directories go")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the directories; default: all")


def _detection(parser: argparse.ArgumentParser) -> None:
    _models(parser, "all that can run here")
    parser.add_argument("--dtypes", nargs="+", default=list(_DTYPES), choices=_DTYPES)
    parser.add_argument("--seeds", type=int, default=2, help="sets of inputs for the benign changes (default 2)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    _output(parser, "write the report there; else it is printed")


def _dtypes(parser: argparse.ArgumentParser) -> None:
    what = "write the table anew from git checkouts of ops-math, ops-nn …"
    parser.add_argument("--read", nargs="+", type=Path, metavar="CHECKOUT", help=what)
    parser.add_argument("--names", action="store_true", help="list the operators without a known table as well")


def _floor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="emulated", help="emulated (default) or npu[:n]")
    _output(parser)


def _locating(parser: argparse.ArgumentParser) -> None:
    _models(parser, "all", least="*")  # none: the full-size model alone
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=_DTYPES)
    what = "of faults, planted in the full-size model; default: all"
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=what)
    what = "of each model and dtype, every kind of fault at each (default 8)"
    parser.add_argument("--places", type=int, default=8, help=what)
    what = "so many places of the full-size AIMv2-large for each kind (default 0)"
    parser.add_argument("--large", type=int, default=0, metavar="N", help=what)
    parser.add_argument("--jobs", type=int, default=2, help="kinds at a time in the full-size model (default 2)")
    _output(parser)


def _published(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=_named, nargs="+", default=[], metavar="NAME=DIR", help="checkpoints")
    _output(parser)


def _named(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not equals or not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{given!r} is no NAME=DIR of a checkpoint that is there")
    return name, Path(folder)


def _symbols(parser: argparse.ArgumentParser) -> None:
    what = "a wheel file or a directory; default: the installed torch_npu"
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL", help=what)
    parser.add_argument("--names", action="store_true", help="list the names as well")


def _upgrades(parser: argparse.ArgumentParser) -> None:
    what = "a file of accuracy cases, such as cases/test_operators.py"
    parser.add_argument("cases", type=Path, metavar="CASES", help=what)
    what = "their names; a name that there is not is answered with all of them; default: all"
    parser.add_argument("--only", nargs="*", metavar="RELEASE", help=what)
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time (default 2)")
    _output(parser)


def _vendor(parser: argparse.ArgumentParser) -> None:
    what = "test/test_base_ops of a checkout of Ascend/op-plugin, or one file of it"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=what)
    parser.add_argument("--jobs", type=int, default=2, help="files at a time (default 2)")
    _output(parser, "write the table there")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what each file printed there")


PARTS = {
    "architectures": _Part(example="llama vit", add=_architectures),
    "checkpoints": _Part(example="/tmp/checkpoints bert llama", add=_checkpoints),
    "vendor": _Part(
        example="op-plugin/test/test_base_ops",
        add=_vendor,
        command="python -m harness emulate -m harness.conformance",
    ),
    "bits": _Part(example="--device emulated", add=_bits),
    "symbols": _Part(example="--names", add=_symbols),
    "detection": _Part(example="--models digits --dtypes float32", add=_detection),
    "floor": _Part(example="--device emulated", add=_floor),
    "upgrades": _Part(example="cases/test_operators.py", add=_upgrades),
    "locating": _Part(example="--models digits --dtypes float32 --places 2", add=_locating),
    "dtypes": _Part(example="--names", add=_dtypes),
    "published": _Part(example="--output published.md", add=_published),
}
