"""Whether an accelerator card answers, asked in a process of its own: one that is lost may hang whoever opens it.

python -m harness.devices.asking DEVICE opens the device and has it compute sums that it never saw.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from harness.devices.kinds import KINDS

ANSWER_LIMIT = 120.0  # seconds in which a card opens and answers; a healthy one takes some ten
_PRINTED = "harness.devices.asking: "  # how the line begins that says what is wrong


def problem_of(
    name: str,
    card: str,
    *,
    devices: int | None = None,
    soc: str | None = None,
    limit: float = ANSWER_LIMIT,
    environment: Mapping[str, str] = os.environ,
    command: Sequence[str] = (sys.executable, "-m", "harness.devices.asking"),
) -> str:
    """What is wrong with a card of a kind, "npu", "emulated" or "cuda", as another process sees it; "" where it
    answers.

    `card`: its number as the variable of its kind takes it; `devices` and `soc` as in `open_device`; `environment`: the
    variables of that process, but for the card. One that does not end within `limit` seconds is killed and not waited
    for.
    """
    played = [("--devices", devices), ("--soc", soc)]
    words = [name, *(word for option, value in played if value is not None for word in (option, str(value)))]
    variables = {**environment, KINDS[name].cards_variable or "": card}
    asked = subprocess.Popen(
        [*command, *words], env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        said, _ = asked.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        asked.kill()
        return f"it did not open and compute within {limit:g} s"
    lines = [line.removeprefix(_PRINTED) for line in said.splitlines() if line.startswith(_PRINTED)]
    if asked.returncode < 0:
        return f"the process that asked it died by {signal.Signals(-asked.returncode).name}"
    return "" if asked.returncode == 0 else (lines or [f"the process that asked it ended with {asked.returncode}"])[-1]


def main(arguments: Sequence[str]) -> int:
    """Ask one device; prints what is wrong. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.devices.asking")
    parser.add_argument("device")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--soc")
    options = parser.parse_args(arguments)
    from harness.devices import open_device
    from harness.errors import DeviceError

    try:
        open_device(options.device, soc=options.soc, devices=options.devices).check("a question")
    except DeviceError as error:
        print(_PRINTED + " ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
