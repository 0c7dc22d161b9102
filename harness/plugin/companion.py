"""The float32 row of a case that is measured in half dtypes alone: it shows errors that half roundings hide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

_HALF = ("float16", "bfloat16")


class Companions:
    """Which cases of a run get a float32 row beside their first half row.

    A case gets one unless a collected test runs it in float32, be it deselected or not. Under pytest-xdist each worker
    runs one, and `superfluous` names those that the report leaves out.
    """

    def __init__(self) -> None:
        self.float32: set[str] = set()  # cases, or test functions that make their cases themselves, with a float32 test
        self.done: set[str] = set()

    def learn(self, subject: str, dtype: str | None) -> None:
        """Note a collected test: `subject` is its case, or its function where that makes the case."""
        if dtype == "float32":
            self.float32.add(subject)

    def wants(self, case, function: str) -> bool:
        """Whether to run `case`, of which a row was measured by a test of `function`, in float32 too."""
        self.learn(case.name, case.dtype)
        if (
            case.dtype not in _HALF
            or not case.companion
            or self.float32 & {case.name, function}
            or case.name in self.done
        ):
            return False
        self.done.add(case.name)
        return True


def companion_of(case):
    """The case in float32, by its own preset, or by `floor` where its limits are numbers for a half dtype."""
    from collections.abc import Mapping

    from harness.judging.tolerance import Tolerance

    tolerance = case.tolerance
    if isinstance(tolerance, Tolerance):
        tolerance = Tolerance(preset=tolerance.preset or "floor")
    elif isinstance(tolerance, Mapping) and "float32" not in tolerance:
        tolerance = Tolerance(preset="floor")
    return replace(case, dtype="float32", tolerance=tolerance)


def unseen(case, error: Exception) -> str:
    """What is said in place of the float32 row that cannot be measured."""
    return (
        f"no float32 row beside {case.dtype}: {type(error).__name__}: {' '.join(str(error).split())}; "
        f"a logic error that moves the output by less than two floors of {case.dtype} cannot be seen in this case"
    )


def superfluous(rows: Iterable) -> list:
    """The float32 rows that were added to a case which has another float32 row."""
    from harness.judging.status import Mark

    rows = [row for row in rows if row.dtype == "float32"]
    taken = {row.case for row in rows if Mark.COMPANION not in row.marks}
    dropped = []
    for row in rows:
        if Mark.COMPANION not in row.marks:
            continue
        if row.case in taken:
            dropped.append(row)
        taken.add(row.case)
    return dropped
