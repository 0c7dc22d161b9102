"""The errors to float64 that a device's is compared with: of the CPU, and of the forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.judging.criteria import FLOORED
from harness.measure import Comparison, Scatter, Size, Slice


@dataclass(frozen=True, kw_only=True)
class References:
    """What one output was compared with besides the CPU in its dtype: float64 with the same weights, and a forecast."""

    golden: Comparison  # the device to float64
    cpu: Comparison  # the CPU in the same dtype to float64
    # The CPU under the device's rounding rules to float64; None where there are no such rules.
    forecast: Comparison | None = None
    unexplained: Size | None = None  # ‖device - forecast‖ / ‖forecast‖
    # The same of a forecast whose HF32 ties go the other way; measured for the preset "sharp" alone.
    ties: Size | None = None
    modes: tuple[str, ...] = ()  # what float32 was computed in besides float32: "HF32", "TF32"
    slices: tuple[Slice, ...] = ()  # the worst part of each kind: row, slice of an axis, block, magnitude
    # Of runs with random roundings; measured where the verdict on few elements hangs on it.
    scatter: Scatter | None = None

    def floor(self, name: str) -> float:
        """The largest of a number of the healthy runs' errors: what there is no reason to fall below."""
        healthy = (self.cpu, self.forecast, self.scatter)
        errors: list[float] = [abs(getattr(run, name)) for run in healthy if run is not None]
        return max(errors)

    @property
    def slack(self) -> float:
        """How many times the floor a healthy device may lose: by the scatter where it was measured, at most `slack`."""
        steps = slack(self.golden.numel)
        return steps if self.scatter is None else min(steps, self.scatter.slack)

    def slice_ratio(self, part: Slice) -> float:
        """A part's relative error over the largest that healthy runs have in any part of its kind."""
        return ratio_of(part.error, max(part.healthy, ROUNDOFF.get(self.cpu.dtype, 0.0) / 2))

    @property
    def worst_slice(self) -> Slice | None:
        """The part that is worst beside what `slack` allows it, one with a place where such a one is beyond; None
        without parts.
        """
        beyond = [part for part in self.slices if not part.magnitude and self._share(part) > PART]
        return max(beyond or self.slices, key=self._share, default=None)

    def _share(self, part: Slice) -> float:
        return self.slice_ratio(part) / slack(part.count)

    @property
    def unfelt(self) -> bool:
        """Whether the device lost far less than the modes that its switches allow would cost here: they are not in
        force.
        """
        if not self.modes or self.forecast is None or self.forecast.rel_l2 < FELT * self.cpu.rel_l2:
            return False
        return self.golden.rel_l2 * FELT < self.forecast.rel_l2

    def ratios(self) -> dict[str, float]:
        """The device's error to float64 over the floor, by limit. At or below 1 it is as good as a healthy device is
        expected to be.
        """
        least = ROUNDOFF.get(self.cpu.dtype, 0.0) / 2  # a floor of zero would judge a last place
        if self.golden.rms == 0:  # nothing was expected: there is no relative error
            whole, element = (
                ratio_of(self.golden.rmse, self.floor("rmse")),
                ratio_of(self.golden.max_diff, self.floor("max_diff")),
            )
            return dict.fromkeys(FLOORED, 0.0) | {
                "forecast_ratio": whole,
                "token_ratio": element,
                "outlier_ratio": element,
            }
        worst = {name: max(self.floor(name), least) for name in ("rel_l2", "token_rel_l2", "max_scaled")}
        share = worst["rel_l2"] * (SHARED if self.golden.numel >= MANY else 1)
        share += min(CONSTANT, ROUNDOFF.get(self.cpu.dtype, CONSTANT))
        known = math.sqrt(2) * self.cpu.rel_l2 + (self.ties or 0.0)
        return {
            "forecast_ratio": ratio_of(self.golden.rel_l2, worst["rel_l2"]),
            "token_ratio": ratio_of(self.golden.token_rel_l2, worst["token_rel_l2"]),
            "outlier_ratio": ratio_of(self.golden.max_scaled, worst["max_scaled"]),
            "gain_ratio": ratio_of(abs(self.golden.gain), self.floor("gain") + share),
            "shift_ratio": ratio_of(abs(self.golden.shift), self.floor("shift") + share * self.golden.rms),
            "slice_ratio": 0.0 if self.worst_slice is None else self.slice_ratio(self.worst_slice),
            "unexplained_ratio": math.nan
            if self.unexplained is None
            else ratio_of(self.unexplained, max(known, least)),
        }


# half a last place, relative; of float64 128 times that, since there is no wider reference to measure its sums by
ROUNDOFF = {
    "float32": 2**-24,
    "float16": 2**-11,
    "bfloat16": 2**-8,
    "float64": 2**-46,
    "complex64": 2**-24,
    "complex128": 2**-46,
}
FELT = 8  # times by which a mode's error must stand out to be missed
MANY = 1000  # elements from which a mean says more than one element
PART = 1.5  # times the slack that a token or another part may have: the worst of many scatters more than the whole
SHARED = (
    1 / 16
)  # of the floor may be a factor or a shift that all elements share: independent roundings share almost none


# A factor or a shift may be this much more: a constant that all elements share, such as the 1/n of a mean or the
# log2(e) of an exponential, is a float32 number, off by half a last place, as an H200's are; of float64, its roundoff.
CONSTANT = 2**-24


SLACK = ((MANY, 2.0), (501, 3.0), (11, 5.0))  # elements, and times the floor from that many on
MOST_SLACK = 10.0  # of fewer elements


def slack(count: int) -> float:
    """How many times the floor a healthy device may lose: 2 for a thousand elements and more, more where few make the
    error's norm.

    The root mean square of n independent errors scatters by 1/√(2n) of itself, and those of one output are far from
    independent. The steps are those of PyTorch's compiler benchmarks (torch/_dynamo/utils.py, `same`: 2 or 3, 8 up to
    500 and 10 up to 10 elements). Where a verdict hangs on them (`hangs_on_slack`), runs with random roundings tell
    what is allowed instead: `Scatter.slack`.
    """
    return next((times for least, times in SLACK if count >= least), MOST_SLACK)


def bits(error: float) -> float:
    """Effective bits: -log2 of the relative L2 error to float64. About 23 to 24 is float32, 12.7 HF32, 12.2 float16,
    9.2 bfloat16.
    """
    if error > 0:
        return -math.log2(error)
    return math.inf if error == 0 else math.nan


def is_floating(dtype: str) -> bool:
    """Whether a dtype, by its name, holds fractions."""
    return dtype.startswith(("float", "bfloat", "complex"))


def badness(comparison: Comparison) -> float:
    if not comparison.comparable or math.isnan(comparison.rel_l2):
        return math.inf
    return comparison.rel_l2


def ratio_of(result: float, floor: float) -> float:
    """found / floor; with nothing found it is 0, with no floor infinite."""
    if result == 0:
        return 0.0
    return result / floor if floor else math.inf
