"""python -m harness.conformance PART …: the parts are those of `harness.conformance.options`."""

import importlib
import sys

from harness.conformance.options import PARTS, parser_of
from harness.errors import HarnessError

_USAGE = f"""usage: python -m harness.conformance {" | ".join(PARTS)} [-h] …

Measures how far the emulated CANN and the criteria carry.

example:
  python -m harness.conformance detection --models digits --dtypes float32
  python -m harness.conformance COMMAND --help"""


def main() -> int:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if {"-h", "--help"} & set(sys.argv[2:]) and sys.argv[1] in PARTS:
        parser_of(sys.argv[1]).parse_args(["--help"])
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
