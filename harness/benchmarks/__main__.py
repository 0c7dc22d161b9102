"""python -m harness.benchmarks [NAME …]"""

import argparse
import ast
import sys
from importlib import import_module
from pathlib import Path

from tabulate import tabulate

_NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
_EXAMPLE = "example:\n  python -m harness.benchmarks compare reports"


def _sentence(name: str) -> str:
    """What a benchmark measures: the first sentence of its module."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition(".\n")[0].split()).rstrip(".")


def main(arguments: list[str]) -> int:
    """Run benchmarks by name, or all; 1 when a promise is not kept, 2 for a name that there is not."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure the promises on speed and size: those that are named, by default all.",
        epilog="\n".join([*(f"{name}: {_sentence(name)}" for name in _NAMES), "", _EXAMPLE]),
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    wanted = parser.parse_args(arguments).names
    unknown = sorted(set(wanted) - set(_NAMES))
    if unknown:
        print(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(_NAMES)}", file=sys.stderr)
        return 2
    figures = []
    for name in wanted or _NAMES:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures += import_module(f"harness.benchmarks.{name}").measure()
    rows = [
        (
            figure.name,
            f"{figure.value:.3g} {figure.unit}",
            f"{figure.promise:.3g} {figure.unit}",
            f"{figure.ratio:.2f}",
            "yes" if figure.is_met else "NO",
        )
        for figure in figures
    ]
    print(tabulate(rows, headers=("figure", "measured", "promise", "ratio", "kept"), disable_numparse=True))
    return 0 if all(figure.is_met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
