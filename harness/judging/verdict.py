"""The verdict on one row: what was measured, the reasons that fail it, and the evidence beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.judging.references import References, badness
from harness.judging.status import Mark, Status, status_of
from harness.judging.tolerance import Tolerance
from harness.measure import Comparison, Count, Share, Size


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
    # Kullback-Leibler divergence of actual's softmax from expected's, in nats: the mean, and of the worst row.
    kl: Size | None = None
    kl_max: Size | None = None
    perplexity: Size | None = None  # of the tokens that come next, on the device; of language models alone
    expected_perplexity: Size | None = None  # and on the CPU

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


ALL_SWITCHES = "all of them"
_FELT = 0.01  # of the error: a switch that changes less is not shown


@dataclass(frozen=True, kw_only=True)
class SwitchCost:
    """What a numeric switch of the device costs: errors are relative L2 errors to float64, times in milliseconds."""

    switch: str  # "exact GELU"; `ALL_SWITCHES`
    before: Size  # the forecast's error as the switches are
    after: Size  # and with this one set
    remedy: str = ""  # the line of code that sets it
    measured_before: Size | None = None  # the device's errors, where they were measured
    measured_after: Size | None = None
    before_ms: Size | None = None
    after_ms: Size | None = None

    @property
    def felt(self) -> bool:
        """Whether the switch changes the expected error by more than a hundredth."""
        return abs(self.after - self.before) > _FELT * self.before


@dataclass(frozen=True, kw_only=True)
class CardRuns:
    """One card's runs of a row that every card computes: how many are unlike those of most cards, and by how much."""

    card: str  # "card 3", with its serial number where that is known
    runs: Count
    differing: Count  # runs whose bits are not those of most cards; 0 of all cards where there are no such bits
    odd: bool = False  # whether the card is named as the one that is wrong
    output: str = ""  # the output that is furthest off, in the first run that differs
    elements: Count = 0  # of that output that differ
    size: Count = 0  # elements that it has
    max_diff: Size | None = None
    rel_l2: Size | None = None
    operator: str = ""  # the first operator whose bits differ; "" where none was seen
    error: str = ""  # what the card raised in place of a run


# A slow first run, as one that compiles, takes at least so many times the faster one, and so many milliseconds more.
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
    # Relative change of the output over that of the input, when it moves by one rounding.
    conditioning: Size | None = None
    rerun: Mapping[str, Size] = field(
        default_factory=dict
    )  # what the device's second run differed by; empty where it did not
    threads: Count = 0  # of the CPU's runs
    switches: tuple[SwitchCost, ...] = ()  # what they cost, in one row of a model and dtype
    parted: str = ""  # where generations part, in words
    stored: tuple[str, ...] = ()  # those of the CPU's runs that were read from a reference store
    card: str | None = None  # the physical card that ran it; processes of one run may have a card of their own
    weights_sha256: str | None = None  # of what model() built, so that another checkpoint is known without its path
    weights_from: str = ""  # of weights without checkpoint=, as `harness.reference.origin.Origin` says; "" random ones
    code_sha256: str | None = (
        None  # of the files of one's own in the run, the harness's among them; None outside of one
    )
    cards: tuple[CardRuns, ...] = ()  # of a row that every visible card computed
    notes: tuple[str, ...] = ()  # what else a reader must know of how it ran, in sentences

    @property
    def slow_start(self) -> str:
        """In words, that the first run took much longer than the second; "" where it did not."""
        first = self.first_run_ms
        if first is None or first < COMPILES * self.actual_ms or first - self.actual_ms < WORTH_SAYING:
            return ""
        seconds = f"the first run took {first / 1e3:.1f} s, the second {self.actual_ms / 1e3:.3g} s"
        return f"{seconds}; the first is not timed"


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
        reasons = {
            Status.ERROR: self.errors,
            Status.SKIPPED: self.skips,
            Status.FAIL: self.failures,
            Status.REGRESSED: self.regressions,
        }
        return status_of([kind for kind, found in reasons.items() if found], compared=bool(self.comparisons))

    @property
    def passed(self) -> bool:
        return self.status is Status.PASS

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it is not a PASS, the gravest first; empty for a PASS."""
        result = self.errors + self.skips + self.failures + self.regressions
        return result if result or self.comparisons else (NOTHING,)

    @property
    def output(self) -> str:
        """Name of the output whose numbers stand for the row: the first that failed, else the one furthest off."""
        for reason in self.failures:
            if reason.output in self.comparisons:
                return reason.output
        return max(self.comparisons, key=lambda name: badness(self.comparisons[name]), default="")

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
