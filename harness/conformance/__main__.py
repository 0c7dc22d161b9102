"""python -m harness.conformance architectures | checkpoints | vendor | bits | symbols | detection | floor | upgrades |
locating | dtypes | published.
"""

import importlib
import sys

from harness.errors import HarnessError

PARTS = (
    "architectures",
    "checkpoints",
    "vendor",
    "bits",
    "symbols",
    "detection",
    "floor",
    "upgrades",
    "locating",
    "dtypes",
    "published",
)
_USAGE = f"""usage: python -m harness.conformance {" | ".join(PARTS)} [-h] …

Measures how far the emulated CANN and the criteria carry.

example:
  python -m harness.conformance detection --models digits --dtypes float32
  python -m harness.conformance COMMAND --help"""


def main() -> int:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        print(_USAGE.partition("\n")[0], file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"harness.conformance.{sys.argv[1]}").main(sys.argv[2:])
    except (HarnessError, ValueError, OSError) as error:
        print(f"conformance {sys.argv[1]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
