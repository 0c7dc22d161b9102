"""What a comparison must hold to pass: tolerances, reasons, verdicts. Pure: numbers in, reasons out.

A `Verdict` stores reasons and derives everything else from them: status, failure text, table cell. So they cannot disagree.
Every check is written as what must hold (`found <= limit`), so a NaN fails by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from harness.compare import Comparison

STATUSES = ("PASS", "FAIL", "REGRESSED", "ERROR", "SKIPPED")
NEW = "NEW"  # no accepted baseline
NONDETERMINISTIC = "NONDETERMINISTIC"  # device reruns differ
FELL_BACK = "FELL BACK"  # an operator of the device's run was computed by the CPU


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits on a `Comparison`; None is not judged. Shape, dtype and non-finite elements are judged always.

    Raises: ValueError when no limit is given, or one is negative or NaN, or a cosine or a share is above 1.
    """

    max_diff: float | None = None  # at most; absolute difference, in output units
    mean_diff: float | None = None  # at most; absolute difference, in output units
    cos_sim: float | None = None  # at least
    rel_l2: float | None = None  # at most; ‖actual - expected‖ / ‖expected‖
    max_diff_rms: float | None = None  # at most; in units of the root mean square of expected
    token_cos_sim: float | None = None  # at least, of the worst token
    top1: float | None = None  # at least; share of equal top-1 decisions, where the case compares decisions
    reason: str = ""  # where the limits come from; the report prints it

    def __post_init__(self):
        limits = self.limits()
        if not limits:
            raise ValueError(f"a Tolerance without limits would pass anything; set one of {', '.join(_LIMITS)}")
        for name, limit in limits.items():
            if not 0 <= limit <= (1 if name in _AT_LEAST else math.inf):
                most = "between 0 and 1" if name in _AT_LEAST else "zero or more"
                raise ValueError(f"the limit {name}={limit!r} must be {most}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by the name of what they limit."""
        return {name: getattr(self, name) for name in _LIMITS if getattr(self, name) is not None}


_AT_LEAST = ("cos_sim", "token_cos_sim", "top1")
_LIMITS = tuple(each.name for each in fields(Tolerance) if each.name != "reason")


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """The top-1 decisions of both sides on labelled inputs."""

    count: int
    agree: int  # decisions that are the same on both sides
    correct_actual: int | None = None  # decisions equal to the label; None without labels
    correct_expected: int | None = None
    first: tuple[int, int, int] | None = None  # of the first that differs: its index, actual's decision, expected's

    @property
    def top1(self) -> float:
        """Share of equal decisions."""
        return self.agree / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of right decisions on the device."""
        return None if self.correct_actual is None else self.correct_actual / self.count

    @property
    def expected_accuracy(self) -> float | None:
        """Share of right decisions on the CPU."""
        return None if self.correct_expected is None else self.correct_expected / self.count


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a row is not a PASS, in words that say what was found, where, and what was allowed."""

    criterion: str  # a limit's name, or "shape", "dtype", "finite", "output", "fallback", "run", "skip"
    text: str
    output: str = ""
    found: float | None = None
    allowed: float | None = None

    def __str__(self) -> str:
        return f"{self.output}: {self.text}" if self.output else self.text


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a verdict rests on: digests of what went in and came out, and the time that it took."""

    weights: str  # sha256 of the checkpoint, or "seeded:<n>"
    reference: str  # what the device was held against, in words
    inputs_sha256: str
    expected_sha256: str
    actual_sha256: str
    expected_ms: float  # the reference's forward
    actual_ms: float  # the device's forward, synchronised


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured on the outputs of one case with one seed, and every reason why it is not a PASS."""

    comparisons: Mapping[str, Comparison] = field(default_factory=dict)  # by name of the output
    failures: tuple[Reason, ...] = ()
    regressions: tuple[Reason, ...] = ()
    errors: tuple[Reason, ...] = ()
    skips: tuple[Reason, ...] = ()
    marks: tuple[str, ...] = ()
    tolerance: Tolerance | None = None
    decisions: Decisions | None = None
    evidence: Evidence | None = None

    @property
    def status(self) -> str:
        """PASS, FAIL, REGRESSED, ERROR or SKIPPED. To have compared nothing is an ERROR."""
        if self.errors:
            return "ERROR"
        if self.skips:
            return "SKIPPED"
        if self.failures:
            return "FAIL"
        if not self.comparisons:
            return "ERROR"
        return "REGRESSED" if self.regressions else "PASS"

    @property
    def passed(self) -> bool:
        return self.status == "PASS"

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it is not a PASS, the gravest first; empty for a PASS."""
        found = self.errors + self.skips + self.failures + self.regressions
        return found if found or self.comparisons else (NOTHING,)

    @property
    def output(self) -> str:
        """Name of the output whose numbers stand for the row: the first that failed, else the one furthest off."""
        for reason in self.failures:
            if reason.output in self.comparisons:
                return reason.output
        return max(self.comparisons, key=lambda name: _badness(self.comparisons[name]), default="")

    @property
    def comparison(self) -> Comparison | None:
        """The numbers that stand for the row."""
        return self.comparisons.get(self.output)


NOTHING = Reason(criterion="run", text="compared nothing: the test must hand its case to the `precision` fixture")


def error(text: str) -> Verdict:
    """The verdict on a case that could not be compared."""
    return Verdict(errors=(Reason(criterion="run", text=text),))


def skipped(text: str) -> Verdict:
    """The verdict on a case that was not run, by intent."""
    return Verdict(skips=(Reason(criterion="skip", text=text),))


def judge(comparisons: Comparison | Mapping[str, Comparison], tolerance: Tolerance, *, decisions: Decisions | None = None) -> Verdict:
    """Hold what was measured against the limits.

    Outputs that are not floating point must be equal; the limits are for floating-point ones.
    """
    named = {"output": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    only = len(named) == 1
    failures = [reason for name, found in named.items() for reason in _failures("" if only else name, found, tolerance)]
    if decisions is not None:
        failures += _decision_failures(decisions, tolerance)
    return Verdict(comparisons=named, failures=tuple(failures), tolerance=tolerance, decisions=decisions)


def _failures(output: str, found: Comparison, tolerance: Tolerance) -> list[Reason]:
    """Every check that does not hold for one output."""

    def reason(criterion: str, text: str, measured: float | None = None, allowed: float | None = None) -> Reason:
        return Reason(criterion=criterion, text=text, output=output, found=measured, allowed=allowed)

    if not found.comparable:
        return [reason("shape", f"shape {found.shape} where {found.expected_shape} was expected")]
    failures = []
    if found.dtype != found.expected_dtype:
        failures.append(reason("dtype", f"dtype {found.dtype} where {found.expected_dtype} was expected"))
    if found.nonfinite_differ:
        failures.append(reason("finite", _nonfinite_text(found), found.nonfinite_differ, 0))
    elif found.nan_expected:
        failures.append(reason("finite", f"{found.nan_expected} elements are NaN on both sides: nothing can be said of them"))
    if not is_floating(found.expected_dtype):
        if not found.unequal == 0:
            text = f"{found.unequal} of {found.numel} elements differ, {_values(found)} (all must be equal)"
            failures.append(reason("equal", text, found.unequal, 0))
        return failures
    for name, limit in tolerance.limits().items():
        if name == "top1":
            continue
        if name == "token_cos_sim" and found.worst_token is None and found.numel:
            continue  # a flat output has no tokens; its one vector is what cos_sim and rel_l2 judge
        measured = getattr(found, name)
        if not _holds(name, measured, limit):
            failures.append(reason(name, _limit_text(found, name, measured, limit), measured, limit))
    return failures


def _decision_failures(decisions: Decisions, tolerance: Tolerance) -> list[Reason]:
    limit = tolerance.top1
    if limit is None or _holds("top1", decisions.top1, limit):
        return []
    text = f"top-1 decisions agree on {decisions.agree} of {decisions.count} inputs (at least {limit:.1%} required)"
    if decisions.first is not None:
        text += "; the first that differs is input {}: {} where {} was expected".format(*decisions.first)
    return [Reason(criterion="top1", text=text, found=decisions.top1, allowed=limit)]


def _holds(name: str, measured: float, limit: float) -> bool:
    return measured >= limit if name in _AT_LEAST else measured <= limit


def _limit_text(found: Comparison, name: str, measured: float, limit: float) -> str:
    """One sentence: what was found, where, what was allowed."""
    if name in _AT_LEAST:
        where = f" at token {found.worst_token}" if name == "token_cos_sim" else ""
        return f"{name} {measured:.9f}{where} (at least {limit:.9g} required)"
    where = f" at {found.worst_index}" if name in ("max_diff", "max_diff_rms") else ""
    return f"{name} {measured:.2e}{where} (up to {limit:.2e} allowed)"


def _nonfinite_text(found: Comparison) -> str:
    return f"{found.nonfinite_differ} elements are NaN or infinite on one side only, {_values(found)}"


def _values(found: Comparison) -> str:
    return f"the first at {found.worst_index}: {found.worst_actual:g} where {found.worst_expected:g} was expected"


def is_floating(dtype: str) -> bool:
    """Whether a dtype, by its name, holds fractions."""
    return dtype.startswith(("float", "bfloat", "complex"))


def _badness(found: Comparison) -> float:
    if not found.comparable or math.isnan(found.rel_l2):
        return math.inf
    return found.rel_l2
