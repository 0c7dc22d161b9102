"""python -m harness.conformance architectures | checkpoints | vendor | bits | symbols | detection | floor | upgrades |
locating | dtypes | published.
"""

import importlib
import sys

from harness.errors import HarnessError

_COMMANDS = (
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


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        print(f"usage: python -m harness.conformance {' | '.join(_COMMANDS)} [-h] …", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"harness.conformance.{sys.argv[1]}").main(sys.argv[2:])
    except (HarnessError, ValueError, OSError) as error:
        print(f"conformance {sys.argv[1]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
