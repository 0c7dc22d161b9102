"""What a comparison must hold to pass: presets, limits, reasons, verdicts. Pure: numbers in, reasons out.

A `Verdict` stores reasons and derives everything else from them: status, failure text, table cell. So they cannot disagree.
Every check is written as what must hold (`found <= limit`), so a NaN fails by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum

from harness.measure import CLOSE, DYNAMO, Comparison, Count, Scatter, Share, Size, Slice

class _Word(str, Enum):
    """A word of the report: a member is the text that JSON holds."""

    def __str__(self) -> str:
        return self.value


class Status(_Word):
    """What became of a row, from its reasons: see `status_of`."""

    PASS = "PASS"
    FAIL = "FAIL"  # a criterion is broken
    REGRESSED = "REGRESSED"  # within the tolerance, and worse than what was accepted
    ERROR = "ERROR"  # nothing could be compared
    SKIPPED = "SKIPPED"  # not run, by intent

    @property
    def is_fine(self) -> bool:
        """Whether a row may end so without being a failure."""
        return self in (Status.PASS, Status.SKIPPED)

    @property
    def sign(self) -> str:
        """The sign before it in a table."""
        return {Status.PASS: "✅", Status.SKIPPED: "⏭"}.get(self, "❌")


class Mark(_Word):
    """What a reader of a row must know besides its status."""

    NONDETERMINISTIC = "NONDETERMINISTIC"  # device reruns differ
    NEAR_TIE = "NEAR TIE"  # a token, class or index differs where two numbers lie closer than they are known
    UNFELT = "SWITCH NOT FELT"  # the device is as exact as if HF32 or TF32, which its switches allow, were off
    FELL_BACK = "FELL BACK"  # an operator of the device's run was computed by the CPU
    ON_HOST = "ON HOST"  # the model's own code brings values from the device and computes with them on the CPU
    UNDECIDABLE = "UNDECIDABLE"  # healthy runs differ by too much to decide
    COMPANION = "COMPANION"  # the float32 row that the harness adds to a case in half dtypes alone
    CRASHED = "CRASHED"  # its process died
    HUNG = "HUNG"  # it did not end in its time
    RERUN = "RERUN"  # the test ran more than once; the row is of its last attempt
    KNOWN = "KNOWN FAILURE"  # it fails by a reviewed entry of the known failures
    NEW = "NEW"  # no accepted baseline; from here on, what became of the row since its baseline
    IDENTICAL = "IDENTICAL"  # every bit as accepted
    DRIFT = "DRIFT"  # other bits, no worse than chance would make it
    REGRESSED = "REGRESSED"  # worse than accepted
    IMPROVED = "IMPROVED"  # better than accepted
    INCOMPARABLE = "NOT COMPARABLE"  # other weights or inputs, or no numbers on one side

    @property
    def is_change(self) -> bool:
        """Whether it says what became of the row since its baseline."""
        return self in CHANGES


CHANGES = (Mark.IDENTICAL, Mark.DRIFT, Mark.REGRESSED, Mark.IMPROVED, Mark.NEW, Mark.INCOMPARABLE)
STATUSES = tuple(Status)
NEW, NONDETERMINISTIC, NEAR_TIE, UNFELT, FELL_BACK = Mark.NEW, Mark.NONDETERMINISTIC, Mark.NEAR_TIE, Mark.UNFELT, Mark.FELL_BACK
# The status that a reason leads to, by its criterion; every criterion that is not here leads to FAIL.
LEADS_TO = {"run": Status.ERROR, "skip": Status.SKIPPED, "baseline": Status.REGRESSED}


def leads_to(criterion: str) -> Status:
    """The status that a reason with this criterion leads to, where none is graver."""
    return LEADS_TO.get(criterion, Status.FAIL)


def status_of(kinds: Collection[Status], *, compared: bool) -> Status:
    """The status of a row whose reasons lead to `kinds`; `compared` says whether it brought numbers. The one place that decides it.

    An error is graver than a skip, a skip than a failure, a failure than a regression. To have compared nothing is an ERROR.
    """
    for each in (Status.ERROR, Status.SKIPPED, Status.FAIL):
        if each in kinds:
            return each
    if not compared:
        return Status.ERROR
    return Status.REGRESSED if Status.REGRESSED in kinds else Status.PASS


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A preset, or limits of one's own, or a preset with some of its limits replaced; None is not judged.

    Shape, dtype and non-finite elements are judged always. The last five limits are in units of the floor, what a healthy device is
    expected to lose: they need the references that `validate` measures.

    Raises: ValueError when nothing is judged, the preset is unknown or a limit of it is replaced without a reason, or a limit is
    negative or NaN, or a cosine or a share is above 1.
    """

    max_diff: float | None = None  # at most; absolute difference, in output units
    mean_diff: float | None = None  # at most; absolute difference, in output units
    cos_sim: float | None = None  # at least
    rel_l2: float | None = None  # at most; ‖actual - expected‖ / ‖expected‖
    max_diff_rms: float | None = None  # at most; in units of the root mean square of expected
    token_cos_sim: float | None = None  # at least, of the worst token
    token_rel_l2: float | None = None  # at most; of the worst token, in units of the tokens' root mean square
    max_scaled: float | None = None  # at most; of one element, in units of its size and its row's
    max_rel: float | None = None  # at most; |difference| / (|expected| + 1e-7), CANN's MARE
    mean_rel: float | None = None  # at most; CANN's MERE
    gain: float | None = None  # at most, either way; a factor that all of the output shares, less 1
    shift: float | None = None  # at most, either way; in units of the root mean square of expected
    matched: float | None = None  # at least; share of elements within torch.testing's tolerances
    close_atol: float | None = None  # at most; absolute tolerance that is needed beside torch.testing's relative one
    ulp_mean: float | None = None  # at most; in units of the last place
    flip_margin: float | None = None  # at most; how far a row's choice lies below its largest element, in output units
    top1: float | None = None  # at least; share of equal top-1 decisions, where the case compares decisions
    forecast_ratio: float | None = None  # at most; rel_l2 to float64, over the floor
    token_ratio: float | None = None  # at most; the worst token, likewise
    outlier_ratio: float | None = None  # at most; the worst element in units of its size, likewise
    gain_ratio: float | None = None  # at most; the share of the error that is one factor for all, over what is allowed
    shift_ratio: float | None = None  # at most; likewise for what is added to all
    slice_ratio: float | None = None  # at most; the relative error of the worst part over that of any part in healthy runs
    unexplained_ratio: float | None = None  # at most; what the forecast leaves unexplained, over the scatter of sums
    undecided: float | None = None  # at most; the error that the floor lets pass, as a share of the output: see `UNDECIDED`
    preset: str = ""  # "floor", "sharp", "card", "cann", "dynamo", "close" or "pair"
    reason: str = ""  # where the limits come from; the report prints it

    def __post_init__(self):
        limits = self.limits()
        judging = [name for name, limit in limits.items() if name != "undecided" and limit != (0 if name in AT_LEAST else math.inf)]
        if not judging and not self.preset:
            raise ValueError(f"a Tolerance without limits would pass anything; name a preset or set one of {', '.join(LIMITS)}")
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"no preset is called {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.preset and limits and not self.reason:
            raise ValueError(f"preset {self.preset!r} with another {', '.join(limits)} needs a reason=, which the report prints")
        for name, limit in limits.items():
            if not 0 <= limit <= (1 if name in AT_LEAST else math.inf):
                most = "between 0 and 1" if name in AT_LEAST else "zero or more"
                raise ValueError(f"the limit {name}={limit!r} must be {most}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by the name of what they limit."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}


AT_LEAST = ("cos_sim", "token_cos_sim", "matched", "top1")
FLOORED = ("forecast_ratio", "token_ratio", "outlier_ratio", "gain_ratio", "shift_ratio", "slice_ratio", "unexplained_ratio")  # what needs the references
NEEDS_FLOOR = (*FLOORED, "undecided")
LIMITS = tuple(each.name for each in fields(Tolerance) if each.name not in ("preset", "reason"))
NUMERIC = frozenset((*LIMITS, "rmse"))  # criteria that are a number beyond its limit; every other one is a way of its own to fail


def without_forecast(tolerance: Tolerance, why: str, dtype: str) -> Tolerance:
    """What judges where there is no expected error: in place of "floor" and "sharp" the preset "pair"; limits in units of the floor go.

    "pair" allows a norm of the difference that depends on the dtype alone: "cann" would fail elements near zero, "card" goes by the output's
    scale. In float32 its budget is that of HF32, CANN's T = 2^-11, since nobody says that HF32 is off there. A tolerance that needs no
    expected error is left as it is. `why` becomes the reason, which the report prints.
    """
    floored = {name: None for name in tolerance.limits() if name in NEEDS_FLOOR}
    needs = tolerance.preset in ("floor", "sharp")
    if not needs and not floored:
        return tolerance
    own = {name: limit for name, limit in tolerance.limits().items() if name not in floored}
    preset = tolerance.preset if not needs and (tolerance.preset or own) else "pair"
    budget = pair_limits(MERE["HF32"]) if preset == "pair" and dtype == "float32" else {}
    said = f"{why}; judged by {f'preset {preset}' if preset else 'the limits that need none'}"
    said += " with the budget of HF32, which may be on" if budget else ""
    return replace(tolerance, **floored | budget | own, preset=preset, reason="; ".join(filter(None, (tolerance.reason, said))))


@dataclass(frozen=True, kw_only=True)
class References:
    """What one output was held against besides the CPU in its dtype: float64 with the same weights, and a forecast."""

    golden: Comparison  # the device to float64
    cpu: Comparison  # the CPU in the same dtype to float64
    forecast: Comparison | None = None  # the CPU under the device's rounding rules to float64; None where there are no such rules
    unexplained: Size | None = None  # ‖device - forecast‖ / ‖forecast‖
    ties: Size | None = None  # the same of a forecast whose HF32 ties go the other way; measured for the preset "sharp" alone
    modes: tuple[str, ...] = ()  # what float32 was computed in besides float32: "HF32", "TF32"
    slices: tuple[Slice, ...] = ()  # the worst part of each kind: row, slice of an axis, block, magnitude
    scatter: Scatter | None = None  # of runs with random roundings; measured where the verdict on few elements hangs on it

    def floor(self, name: str) -> float:
        """The largest of a number of the healthy runs' errors: what there is no reason to fall below."""
        return max(abs(getattr(each, name)) for each in (self.cpu, self.forecast, self.scatter) if each is not None)

    @property
    def slack(self) -> float:
        """How many times the floor a healthy device may lose: by the scatter where it was measured, at most `slack`."""
        steps = slack(self.golden.numel)
        return steps if self.scatter is None else min(steps, self.scatter.slack)

    def slice_ratio(self, part: Slice) -> float:
        """A part's relative error over the largest that healthy runs have in any part of its kind."""
        return _ratio(part.error, max(part.healthy, ROUNDOFF.get(self.cpu.dtype, 0.0) / 2))

    @property
    def worst_slice(self) -> Slice | None:
        """The part that is worst beside what `slack` allows it, one with a place where such a one is beyond; None without parts."""
        beyond = [part for part in self.slices if not part.magnitude and self._share(part) > PART]
        return max(beyond or self.slices, key=self._share, default=None)

    def _share(self, part: Slice) -> float:
        return self.slice_ratio(part) / slack(part.count)

    @property
    def unfelt(self) -> bool:
        """Whether the device lost far less than the modes that its switches allow would cost here: they are not in force."""
        if not self.modes or self.forecast is None or self.forecast.rel_l2 < FELT * self.cpu.rel_l2:
            return False
        return self.golden.rel_l2 * FELT < self.forecast.rel_l2

    def ratios(self) -> dict[str, float]:
        """The device's error to float64 over the floor, by limit. At or below 1 it is as good as a healthy device is expected to be."""
        least = ROUNDOFF.get(self.cpu.dtype, 0.0) / 2  # a floor of zero would judge a last place
        if self.golden.rms == 0:  # nothing was expected: there is no relative error
            whole, element = _ratio(self.golden.rmse, self.floor("rmse")), _ratio(self.golden.max_diff, self.floor("max_diff"))
            return dict.fromkeys(FLOORED, 0.0) | {"forecast_ratio": whole, "token_ratio": element, "outlier_ratio": element}
        worst = {name: max(self.floor(name), least) for name in ("rel_l2", "token_rel_l2", "max_scaled")}
        share = worst["rel_l2"] * (SHARED if self.golden.numel >= MANY else 1)
        known = math.sqrt(2) * self.cpu.rel_l2 + (self.ties or 0.0)
        return {
            "forecast_ratio": _ratio(self.golden.rel_l2, worst["rel_l2"]),
            "token_ratio": _ratio(self.golden.token_rel_l2, worst["token_rel_l2"]),
            "outlier_ratio": _ratio(self.golden.max_scaled, worst["max_scaled"]),
            "gain_ratio": _ratio(abs(self.golden.gain), self.floor("gain") + share),
            "shift_ratio": _ratio(abs(self.golden.shift), self.floor("shift") + share * self.golden.rms),
            "slice_ratio": 0.0 if self.worst_slice is None else self.slice_ratio(self.worst_slice),
            "unexplained_ratio": math.nan if self.unexplained is None else _ratio(self.unexplained, max(known, least)),
        }


ROUNDOFF = {  # half a last place, relative; of float64 128 times that, since there is no wider reference to measure its sums by
    "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "float64": 2**-46, "complex64": 2**-24, "complex128": 2**-46,
}  # fmt: skip
SCALE_BLIND = {"cos_sim", "token_cos_sim"}  # limits that no common factor of the output changes
SCALE = 2.0  # by these limits alone an output may be so many times too large or too small
FELT = 8  # times by which a mode's error must stand out to be missed
MANY = 1000  # elements from which a mean says more than one element
PART = 1.5  # times the slack that a token or another part may have: the worst of many scatters more than the whole
SHARED = 1 / 16  # of the floor may be a factor or a shift that all elements share: independent roundings share almost none


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """The top-1 decisions of both sides on labelled inputs."""

    count: Count
    agree: Count  # decisions that are the same on both sides
    correct_actual: Count | None = None  # decisions equal to the label; None without labels
    correct_expected: Count | None = None
    first: tuple[int, int, int] | None = None  # of the first that differs: its index, actual's decision, expected's
    k: Count | None = None  # largest logits that are looked at beside the largest
    topk: Share | None = None  # share of expected's k largest that are among actual's, over all decisions

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


# A first run that compiles takes at least so many times the faster one, and so many milliseconds more.
COMPILES, WORTH_SAYING = 3.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a verdict rests on: digests of what went in and came out, and the time that it took."""

    weights: str  # sha256 of the checkpoint, or "seeded:<n>"
    reference: str  # what the device was held against, in words
    inputs_sha256: str
    expected_sha256: str
    actual_sha256: str
    expected_ms: Size  # the reference's forward
    actual_ms: Size  # the faster of the device's two forwards, synchronised
    first_run_ms: Size | None = None  # the first of them, in which operators may be compiled
    forecast: str | None = None  # the rounding rules of the forecast, in words
    no_golden: str | None = None  # why there is no float64 reference
    conditioning: Size | None = None  # relative change of the output over that of the input, when it moves by one rounding
    rerun: Mapping[str, Size] = field(default_factory=dict)  # what the device's second run differed by; empty where it did not
    threads: Count = 0  # of the CPU's runs
    parted: str = ""  # where generations part, in words
    stored: tuple[str, ...] = ()  # those of the CPU's runs that were read from a reference store
    card: str | None = None  # the physical card that ran it; processes of one run may have a card of their own
    weights_sha256: str | None = None  # of what model() built, so that another checkpoint is known without its path
    weights_from: str = ""  # of weights without checkpoint=, as `harness.reference.origin.Origin` says; "" random ones
    notes: tuple[str, ...] = ()  # what else a reader must know of how it ran, in sentences

    @property
    def compiled(self) -> str:
        """In words, that the first run took so much longer that it must have compiled operators; "" where it did not."""
        first = self.first_run_ms
        if first is None or first < COMPILES * self.actual_ms or first - self.actual_ms < WORTH_SAYING:
            return ""
        seconds = f"the first run took {first / 1e3:.1f} s, the second {self.actual_ms / 1e3:.3g} s"
        return f"{seconds}: the first compiles operators and is not timed"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured on the outputs of one case with one seed, and every reason why it is not a PASS."""

    comparisons: Mapping[str, Comparison] = field(default_factory=dict)  # by name of the output
    failures: tuple[Reason, ...] = ()
    regressions: tuple[Reason, ...] = ()
    errors: tuple[Reason, ...] = ()
    skips: tuple[Reason, ...] = ()
    marks: tuple[Mark, ...] = ()
    tolerance: Tolerance | None = None
    decisions: Decisions | None = None
    references: Mapping[str, References] = field(default_factory=dict)  # by name of the output
    evidence: Evidence | None = None

    @property
    def status(self) -> Status:
        """PASS, FAIL, REGRESSED, ERROR or SKIPPED. To have compared nothing is an ERROR."""
        reasons = {Status.ERROR: self.errors, Status.SKIPPED: self.skips, Status.FAIL: self.failures, Status.REGRESSED: self.regressions}
        return status_of([kind for kind, found in reasons.items() if found], compared=bool(self.comparisons))

    @property
    def passed(self) -> bool:
        return self.status is Status.PASS

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


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold of one output: `found <= limit`, or `>=` for what is in `AT_LEAST`."""

    name: str
    found: float
    limit: float
    where: str = ""

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.name in AT_LEAST else self.found <= self.limit

    @property
    def text(self) -> str:
        """One sentence: what was found, where, what was allowed, what would have been enough."""
        if self.name == "undecided":
            return (
                f"UNDECIDABLE: healthy runs differ so much from float64 that an error of {self.found:.3g} times the output would "
                f"pass (up to {self.limit:.3g} allowed): run the case in a wider dtype, return what comes before the values that "
                f"tip over, or accept it with Tolerance(preset=…, undecided={math.ceil(self.found * 100) / 100 if math.isfinite(self.found) else math.inf:g}, reason=…)"
            )
        where = f" {self.where}" if self.where else ""
        if self.name in AT_LEAST:
            return f"{self.name} {self.found:.9f}{where} (at least {self.limit:.9g} required){_enough(self.found, down=True)}"
        return f"{self.name} {self.found:.2e}{where} (up to {self.limit:.2e} allowed){_enough(self.found)}"


def _enough(found: float, down: bool = False) -> str:
    """The smallest limit that would have passed, to three digits on the passing side."""
    if not math.isfinite(found) or down and found < 0:
        return "; no limit would pass"
    if down:
        return f"; a limit of {math.floor(found * 1e9) / 1e9:.9f} would pass"
    if found < 1e-300:
        return ""
    step = 10.0 ** (math.floor(math.log10(found)) - 2)
    return f"; a limit of {math.ceil(found / step) * step:.2e} would pass"


def judge(
    comparisons: Comparison | Mapping[str, Comparison],
    tolerance: Tolerance,
    *,
    decisions: Decisions | None = None,
    references: Mapping[str, References] | None = None,
) -> Verdict:
    """Hold what was measured against the limits.

    Outputs that are not floating point must be equal; the limits are for floating-point ones. `references`, by name of the output, is
    what the presets "floor" and "dynamo" judge by: without it they fail.
    """
    named = {"output": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    known = references or {}
    only = len(named) == 1
    failures = [reason for name, found in named.items() for reason in _failures("" if only else name, found, known.get(name), tolerance)]
    failures += _decision_failures(decisions, tolerance)
    if named and not any(found.numel for found in named.values() if found.comparable) and not failures:
        failures.append(Reason(criterion="empty", text="every output has zero elements: nothing was compared; give inputs that bring some"))
    marks = (Mark.UNDECIDABLE,) if any(each.criterion == "undecided" for each in failures) else ()
    how = dict(tolerance=tolerance, decisions=decisions, references=known)
    return Verdict(comparisons=named, failures=tuple(failures), marks=marks, **how)


CERTAIN = Scatter(  # as of a thousand elements and more, whose error says enough by itself
    runs=1, degrees=math.inf, rel_l2=0.0, token_rel_l2=0.0, max_scaled=0.0, gain=0.0, shift=0.0, max_diff=0.0, rmse=0.0
)  # fmt: skip


TIES = 3.0  # standard deviations of a count


def near_ties(unsettled: float) -> int:
    """How many whole numbers of a healthy device may differ from the CPU's where those of healthy runs do in `unsettled` on average.

    Indices and classes are chosen among numbers of which some lie closer than they are known. How many of these change is a Poisson
    count: its mean and `TIES` standard deviations. None where none was seen to change.

        near_ties(0.0), near_ties(0.5), near_ties(16.0)  # (0, 2, 28)
    """
    return int(unsettled + TIES * math.sqrt(unsettled))


def hangs_on_ties(verdict: Verdict) -> bool:
    """Whether a verdict fails only since whole numbers differ, in so few elements that near-ties may be why."""
    found = [verdict.comparisons[each.output or next(iter(verdict.comparisons))] for each in verdict.failures if each.criterion == "equal"]
    alone = 0 < len(found) == len(verdict.failures)
    return alone and all(not is_floating(each.expected_dtype) and each.unequal <= MOST_TIES * each.numel for each in found)


MOST_TIES = 0.5  # share of an output: no near-ties if more differ


def hangs_on_slack(verdict: Verdict) -> bool:
    """Whether a verdict passes only since few elements have more slack than many."""
    few = [name for name, each in verdict.references.items() if each.golden.numel < MANY]
    if verdict.failures or not few or verdict.tolerance is None:
        return False
    strict = {
        name: replace(each, scatter=CERTAIN) if name in few else each for name, each in verdict.references.items()
    }
    how = dict(decisions=verdict.decisions, references=strict)
    return not judge(verdict.comparisons, verdict.tolerance, **how).passed


def checks_of(verdict: Verdict) -> list[Check]:
    """Every limit that a verdict was judged by beside what was found, of all outputs; empty where it was judged by none."""
    tolerance = verdict.tolerance
    if tolerance is None:
        return []
    judged = {name: found for name, found in verdict.comparisons.items() if found.comparable and found.numel and is_floating(found.expected_dtype)}
    judged = {name: each for name, each in judged.items() if name in verdict.references or not _needs_references(tolerance)}
    found = [check for name, each in judged.items() for check in _checks(each, verdict.references.get(name), tolerance)]
    decided = tolerance.top1 is not None and verdict.decisions is not None
    return found + ([Check(name="top1", found=verdict.decisions.top1, limit=tolerance.top1)] if decided else [])


def _failures(output: str, found: Comparison, references: References | None, tolerance: Tolerance) -> list[Reason]:
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
    elif references is not None and references.cpu.nonfinite_differ and not found.nonfinite_differ:
        failures.append(reason("finite", _overflow_text(references), references.cpu.nonfinite_differ, 0))
    if not is_floating(found.expected_dtype):
        allowed = near_ties(found.unsettled)
        if not found.unequal <= allowed:
            healthy = f"healthy runs differ in {found.unsettled:.2g} on average: up to {allowed} allowed"
            must = healthy if found.unsettled else "all must be equal"
            text = f"{found.unequal} of {found.numel} elements differ, {_values(found)} ({must})"
            failures.append(reason("equal", text, found.unequal, allowed))
        return failures
    if not found.numel:
        return failures
    if references is None and _needs_references(tolerance):
        return [*failures, reason("golden", _no_golden_text(tolerance))]
    checks = _checks(found, references, tolerance)
    if not checks and not tolerance.preset and tolerance.top1 is None:
        names = ", ".join(tolerance.limits())
        failures.append(reason("limits", f"none of the limits ({names}) can judge an output of shape {found.shape}; set rel_l2 or cos_sim, or name a preset"))
    broken = [reason(check.name, check.text, check.found, check.limit) for check in checks if not check.holds]
    blind = not tolerance.preset and SCALE_BLIND & {*tolerance.limits()} and {*tolerance.limits()} <= {*SCALE_BLIND, "top1"}
    if blind and not broken and not 1 / SCALE <= 1 + found.gain <= SCALE:
        names = ", ".join(tolerance.limits())
        text = f"the output is {1 + found.gain:.3g} times what was expected, which {names} cannot see; set rel_l2 or gain as well"
        broken = [reason("scale", text, found.gain)]
    return failures + broken


def _needs_references(tolerance: Tolerance) -> bool:
    return tolerance.preset in ("floor", "sharp", "dynamo") or any(name in NEEDS_FLOOR for name in tolerance.limits())


def _checks(found: Comparison, references: References | None, tolerance: Tolerance) -> list[Check]:
    """The preset's checks, but for those that have a limit of their own, and the limits of one's own."""
    own = tolerance.limits()
    checks = PRESETS[tolerance.preset](found, references) if tolerance.preset else []
    if not any(each.name == "undecided" for each in checks) and any(name in FLOORED for name in own):
        checks = [*checks, *_undecided(found, references)]
    checks = [each for each in checks if each.name not in own]
    return checks + [check for name, limit in own.items() if (check := _own(found, references, name, limit)) is not None]


def _own(found: Comparison, references: References | None, name: str, limit: float) -> Check | None:
    if name == "top1":
        return None  # of the case as a whole
    if name in ("token_cos_sim", "token_rel_l2", "token_ratio") and found.worst_token is None:
        return None  # a flat output has no tokens; its one vector is what cos_sim and rel_l2 judge
    if name == "undecided":
        return next(iter(_undecided(found, references, limit)), None)
    if name in FLOORED:
        return _check(references.golden, name, limit, references.ratios()[name])
    return _check(found, name, limit)


def _check(found: Comparison, name: str, limit: float, measured: float | None = None) -> Check:
    if measured is None:
        measured = getattr(found, name)
        measured = abs(measured) / (found.rms or 1.0) if name == "shift" else abs(measured) if name == "gain" else measured
    places = {
        "max_diff": found.worst_index, "max_diff_rms": found.worst_index, "outlier_ratio": found.worst_index,
        "token_cos_sim": found.worst_token, "token_rel_l2": found.worst_token_diff, "token_ratio": found.worst_token_diff,
        "flip_margin": found.first_flip,
    }  # fmt: skip
    place = places.get(name)
    kind = "token " if name.startswith("token") else "row " if name == "flip_margin" else ""
    return Check(name=name, found=measured, limit=limit, where="" if place is None else f"at {kind}{place}")


# ------------------------------------------------------------------------------------------------------------ presets


def slack(count: int) -> float:
    """How many times the floor a healthy device may lose: 2 for a thousand elements and more, more where few make the error's norm.

    The root mean square of n independent errors scatters by 1/√(2n) of itself, and those of one output are far from independent.
    The steps are those of PyTorch's compiler benchmarks (torch/_dynamo/utils.py, `same`: 2 or 3, 8 up to 500 and 10 up to 10 elements).
    Where a verdict hangs on them (`hangs_on_slack`), runs with random roundings tell what is allowed instead: `Scatter.slack`.
    """
    return 2.0 if count >= MANY else 3.0 if count > 500 else 5.0 if count > 10 else 10.0


def _floor(found: Comparison, references: References) -> list[Check]:
    """Against what this model in this dtype with these switches is expected to lose.

    The floor is the larger error of two healthy runs against float64: the CPU in the same dtype, and the CPU under the device's rounding
    rules. The whole error may be `slack` times it, and so may the worst token; the worst element twice that, since a maximum scatters
    more than a norm; a factor or a shift that all elements share, which roundings hardly do, a sixteenth (`SHARED`); a row's
    largest element may become another one where the gap is smaller than two of the largest errors.
    """
    times, ratios = references.slack, references.ratios()
    limits = {"forecast_ratio": times, "token_ratio": PART * times, "outlier_ratio": 2 * times, "gain_ratio": times, "shift_ratio": times}
    if found.worst_token is None:
        del limits["token_ratio"]
    checks = [_check(references.golden, name, limit, ratios[name]) for name, limit in limits.items()]
    checks[0] = replace(checks[0], where=_bits_text(references))
    checks += _slice_checks(references)
    largest = max(references.floor("max_diff"), ROUNDOFF.get(found.dtype, 0.0) * max(found.rms, abs(references.golden.flip_value)))
    return [*checks, _check(references.golden, "flip_margin", 2 * times * largest), *_undecided(found, references)]


def _slice_checks(references: References) -> list[Check]:
    """The worst part of the output, by its own size."""
    part = references.worst_slice
    if part is None:
        return []
    ratio, limit = references.slice_ratio(part), PART * slack(part.count)
    return [Check(name="slice_ratio", found=ratio, limit=limit, where=f"at {part.where}, off by {part.error:.2g} of its own norm")]


# The largest error, as a share of the output, that a limit in floors may let pass. With it a floor is at most a quarter
# of an output of 1,000 elements and more, a tenth of one of 11 to 500 and a twentieth of a smaller one. A device that
# returned zeros has 1, one that returned something else of that size 1.4.
UNDECIDED = 0.5


def _undecided(found: Comparison, references: References, limit: float = UNDECIDED) -> list[Check]:
    """Whether the floor is small enough to decide anything: what it lets pass must be a part of the output."""
    if references.golden.rms == 0:  # there is nothing to take a share of
        return []
    return [Check(name="undecided", found=references.slack * references.floor("rel_l2"), limit=limit)]


def bits(error: float) -> float:
    """Effective bits: -log2 of the relative L2 error to float64. About 23 to 24 is float32, 12.7 HF32, 12.2 float16, 9.2 bfloat16."""
    return math.inf if error == 0 else -math.log2(error) if error > 0 else math.nan


def _bits_text(references: References) -> str:
    """The whole error in bits: of one operator it says which arithmetic ran."""
    errors = references.golden.rel_l2, references.floor("rel_l2")
    if not all(math.isfinite(each) for each in errors):
        return ""
    kept, healthy = ("all" if error == 0 else f"{bits(error):.1f}" for error in errors)
    return f"with {kept} effective bits where a healthy device keeps {healthy}"


def _sharp(found: Comparison, references: References) -> list[Check]:
    """`floor`, and the device must round as the forecast does: what the rules do not explain may be twice the scatter of two orders of sums.

    HF32 rounds each operand in one way, so the error that it makes is known element by element and hides nothing smaller; how ties go is not
    public, so what hangs on them is measured and allowed. In float16 and bfloat16, where each order of sums takes another path, and behind many
    HF32 layers it adds little. It believes the vendor's words on rounding; no card has confirmed them.
    """
    unexplained = references.ratios()["unexplained_ratio"]
    more = [] if math.isnan(unexplained) and references.forecast is None else [_check(references.golden, "unexplained_ratio", references.slack, unexplained)]
    return [*_floor(found, references), *more]


def _card(found: Comparison, references: References | None) -> list[Check]:
    """The model card's: an error below 1 %, taken as the largest difference, and a cosine of 0.99."""
    return [_check(found, "max_diff", 1e-2), _check(found, "cos_sim", 0.99)]


MERE = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-13, "HF32": 2**-11}


def _cann(found: Comparison, references: References | None) -> list[Check]:
    """CANN's operator standard for open source: mean relative error below T, the largest below 10 T (cann/cannbot-skills)."""
    modes = references.modes if references is not None and found.dtype == "float32" else ()
    limit = max(MERE.get(name, MERE["float32"]) for name in (found.dtype, *modes))
    below = math.nextafter  # the standard says below, not at most
    return [_check(found, "mean_rel", below(limit, 0)), _check(found, "max_rel", below(10 * limit, 0))]


def _dynamo(found: Comparison, references: References) -> list[Check]:
    """PyTorch's compiler benchmarks: within the tolerance, else no further from float64 than k times the CPU (torch/_dynamo/utils.py, `same`)."""
    tolerance = DYNAMO.get(found.dtype, 1e-3)
    if found.dynamo_atol <= tolerance:
        return []
    times = 10 if found.numel <= 10 else 8 if found.numel <= 500 else 3 if found.numel < 1000 or tolerance >= 1e-2 else 2
    return [Check(name="rmse", found=references.golden.rmse, limit=times * references.cpu.rmse + tolerance / 10)]


def _close(found: Comparison, references: References | None) -> list[Check]:
    """torch.testing.assert_close with its own table of tolerances."""
    return [_check(found, "close_atol", CLOSE.get(found.dtype, (0.0, 0.0))[1])]


def pair_limits(budget: float) -> dict[str, float]:
    """The limits of the preset "pair" for a budget, a relative norm."""
    return {"rel_l2": budget, "token_rel_l2": 4 * budget, "max_scaled": 16 * budget, "gain": budget / 4, "shift": budget / 4}


def _pair(found: Comparison, references: References | None) -> list[Check]:
    """Two tensors and nothing else: a budget of 2^11 roundoffs of float32, 2 of the half types, judged as `floor` does.

    The budgets are the T of CANN's standard; here they limit norms, so that elements near zero do no harm.
    """
    limits = pair_limits(MERE.get(found.dtype, {"float64": 2**-32}.get(found.dtype, MERE["float32"])))
    if found.worst_token is None:
        del limits["token_rel_l2"]
    checks = [_check(found, name, limit) for name, limit in limits.items()]
    return [*checks, _check(found, "flip_margin", max(16 * found.rmse, 8 * ROUNDOFF.get(found.dtype, 0.0) * abs(found.flip_value)))]


PRESETS = {"floor": _floor, "sharp": _sharp, "card": _card, "cann": _cann, "dynamo": _dynamo, "close": _close, "pair": _pair}


def _decision_failures(decisions: Decisions | None, tolerance: Tolerance) -> list[Reason]:
    limit = tolerance.top1
    if limit is not None and decisions is None:
        text = "top1 is a limit and no decisions were compared; name the output that holds the logits: Case(decisions=…)"
        return [Reason(criterion="top1", text=text)]
    if limit is None or Check(name="top1", found=decisions.top1, limit=limit).holds:
        return []
    text = f"top-1 decisions agree on {decisions.agree} of {decisions.count} inputs (at least {limit:.1%} required)"
    if decisions.first is not None:
        text += "; the first that differs is input {}: {} where {} was expected".format(*decisions.first)
    return [Reason(criterion="top1", text=text, found=decisions.top1, allowed=limit)]


def _no_golden_text(tolerance: Tolerance) -> str:
    what = f"preset {tolerance.preset!r}" if tolerance.preset else "a limit in units of the floor"
    return f"no float64 reference was measured, so {what} cannot judge; give limits of your own, such as Tolerance(rel_l2=…, reason=…), or compare with --golden"


def _overflow_text(references: References) -> str:
    count = references.cpu.nonfinite_differ
    if references.cpu.nan_expected + references.cpu.inf_expected > references.cpu.nan_actual + references.cpu.inf_actual:
        return f"{count} elements of the float64 result are not finite where the CPU's {references.cpu.dtype} is: nothing can be said of them"
    return f"{count} elements of the CPU's own result are not finite where float64 is: {references.cpu.dtype} cannot hold this model"


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


def _ratio(found: float, floor: float) -> float:
    """found / floor; with nothing found it is 0, with no floor infinite."""
    return 0.0 if found == 0 else found / floor if floor else math.inf
