"""A dataset's score on the device against that of the reference: passes, fails, or says how many samples are missing.

One-sided: only a lower score is a failure. `alpha` is the chance to fail a device that is as good, `beta` the chance
not to fail one that is worse by `effect`. A normal test of the difference of two means, or of the mean of the
differences where the samples are paired; of paired right-or-wrong samples the exact sign test on those that differ
(McNemar). Sources: the power of a one-sided test, Cohen, "Statistical Power Analysis", chapter 2; McNemar,
Psychometrika 12 (1947).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from statistics import NormalDist

ALPHA, BETA, EFFECT = 0.05, 0.2, 0.03
_LEAST_VARIANCE = 1.0  # of a sum of n right-or-wrong differences: that of one sample that differs


class Decision(str, Enum):
    """What is said of a score."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNDECIDED = "UNDECIDED"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one side on one dataset, as a share. `samples`: by id, where they are known; else `error`, the
    standard error, or where that is not known either that of `count` right-or-wrong answers.

    Raises: ValueError for a score outside 0 to 1, or without samples.
    """

    value: float
    count: int
    error: float | None = None
    samples: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"a score of {self.value} is no share between 0 and 1")
        if self.count < 1:
            raise ValueError(f"a score of {self.count} samples says nothing")
        if self.error is not None and not 0 <= self.error < math.inf:
            raise ValueError(f"a standard error of {self.error} is none")

    @property
    def variance(self) -> float:
        """Of the score: the square of its standard error. Samples that are all alike have an error of zero, which says
        nothing of the next one: they count as right-or-wrong answers.
        """
        if self.error:
            return self.error**2
        share = min(max(self.value, 0.5 / self.count), 1 - 0.5 / self.count)  # none of ten is no certainty
        return share * (1 - share) / self.count


@dataclass(frozen=True, kw_only=True)
class ScoreVerdict:
    """A score of the device beside that of the reference."""

    decision: Decision
    drop: float  # of the score, as a share; below zero where the device is better
    threshold: float  # the largest drop that passes
    detectable: float  # the drop that is seen with the chance 1 - beta
    needed: int  # samples more, of each side, until `effect` is detectable; 0 where it is, or where none suffice
    paired: bool
    count: int  # samples that were compared

    @property
    def text(self) -> str:
        """One sentence."""
        numbers = f"the score is {self.drop * 100:.2f} points lower" if self.drop > 0 else "the score is no lower"
        kind = "paired" if self.paired else "unpaired"
        if self.decision is Decision.FAIL:
            return f"{numbers} on {self.count} {kind} samples, up to {self.threshold * 100:.2f} is chance"
        if self.decision is Decision.UNDECIDED and not self.needed:
            return (
                f"{numbers} on {self.count} {kind} samples, and the reference scores less than the effect that must be "
                "seen, so no device could be that much worse: name a smaller effect, or look why the score is so low"
            )
        if self.decision is Decision.UNDECIDED:
            return (
                f"{numbers} on {self.count} {kind} samples, which show a drop of {self.detectable * 100:.2f} points "
                f"and no smaller one: {self.needed} samples more are needed"
            )
        return (
            f"{numbers} on {self.count} {kind} samples, which would show a drop of {self.detectable * 100:.2f} points"
        )


def judge_score(
    device: Score, reference: Score, *, alpha: float = ALPHA, beta: float = BETA, effect: float = EFFECT
) -> ScoreVerdict:
    """Judge the device's score against the reference's.

    FAIL: the drop is more than chance explains at the level `alpha`. UNDECIDED: it is not, and too few samples were
    taken to see a drop of `effect` with the chance 1 - `beta`, or the reference scores less than `effect`, so that
    there is no such drop. PASS: neither.

    Raises: ValueError for a level or an effect that is no share, or for paired samples that are not the same ones.

    >>> judge_score(Score(value=0.70, count=1000), Score(value=0.78, count=1000)).decision.value
    'FAIL'
    >>> judge_score(Score(value=0.77, count=100), Score(value=0.78, count=100)).needed > 0
    True
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("effect", effect)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a share between 0 and 1, not {value}")
    sure, seen = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(1 - beta)
    pairs = _pairs(device, reference)
    drop, count = reference.value - device.value, min(device.count, reference.count)
    failed = None
    if pairs is None:
        error = math.sqrt(device.variance + reference.variance)
    else:
        differences = [before - after for before, after in pairs]
        drop, count = sum(differences) / len(differences), len(differences)
        error = _paired_error(differences)
        if all(item in (-1.0, 0.0, 1.0) for item in differences):
            failed = _sign_test(differences.count(1.0), differences.count(-1.0)) <= alpha
    threshold, detectable = sure * error, (sure + seen) * error
    if failed is None:
        failed = drop > threshold
    needed = max(math.ceil(count * ((detectable / effect) ** 2 - 1)), 0)
    needed = 0 if reference.value < effect else needed
    decision = Decision.UNDECIDED if needed or reference.value < effect else Decision.PASS
    decision = Decision.FAIL if failed else decision
    return ScoreVerdict(
        decision=decision,
        drop=drop,
        threshold=threshold,
        detectable=detectable,
        needed=0 if failed else needed,
        paired=pairs is not None,
        count=count,
    )


def _pairs(device: Score, reference: Score) -> list[tuple[float, float]] | None:
    """(reference, device) of each sample, where both sides have them. Raises: ValueError for samples of one side."""
    if device.samples is None or reference.samples is None:
        return None
    alone = device.samples.keys() ^ reference.samples.keys()
    if alone:
        shown = ", ".join(sorted(alone)[:3])
        raise ValueError(f"{len(alone)} samples are on one side only, such as {shown}; score the same samples")
    return [(reference.samples[name], device.samples[name]) for name in reference.samples]


def _paired_error(differences: list[float]) -> float:
    """The standard error of the mean difference. Samples none of which differs may differ in the next one."""
    count = len(differences)
    mean = sum(differences) / count
    spread = sum((item - mean) ** 2 for item in differences)
    return math.sqrt(max(spread, _LEAST_VARIANCE)) / count


def _sign_test(worse: int, better: int) -> float:
    """The chance that of samples which differ so many or more are worse, where both are as likely."""
    count = worse + better
    return float(Fraction(sum(math.comb(count, number) for number in range(worse, count + 1)), 2**count))
