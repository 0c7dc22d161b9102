"""The presets: named sets of checks, each with its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.judging.criteria import AT_LEAST
from harness.judging.references import PART, ROUNDOFF, References, bits, slack
from harness.measure import CLOSE, DYNAMO, WORST, Comparison


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
                f"UNDECIDABLE: healthy runs differ so much from float64 that an error of {self.found:.3g} "
                "times the output would "
                f"pass (up to {self.limit:.3g} allowed): run the case in a wider dtype, return what comes "
                "before the values that "
                "tip over, or accept it with Tolerance(preset=…, "
                f"undecided={math.ceil(self.found * 100) / 100 if math.isfinite(self.found) else math.inf:g}, "
                "reason=…)"
            )
        where = f" {self.where}" if self.where else ""
        if self.name in AT_LEAST:
            return (
                f"{self.name} {self.found:.9f}{where} (at least {self.limit:.9g} "
                f"required){_enough(self.found, down=True)}"
            )
        return f"{self.name} {self.found:.2e}{where} (up to {self.limit:.2e} allowed){_enough(self.found)}"


def _enough(result: float, down: bool = False) -> str:
    """The smallest limit that would have passed, to three digits on the passing side."""
    if not math.isfinite(result) or (down and result < 0):
        return "; no limit would pass"
    if down:
        return f"; a limit of {math.floor(result * 1e9) / 1e9:.9f} would pass"
    if result < 1e-300:
        return ""
    step = 10.0 ** (math.floor(math.log10(result)) - 2)
    return f"; a limit of {math.ceil(result / step) * step:.2e} would pass"


# Criteria that are no metric: the metric whose worst element or token they name.
_WORST_OF = {"max_diff_rms": "max_diff", "outlier_ratio": "max_diff", "token_ratio": "token_rel_l2"}


def check_of(comparison: Comparison, name: str, limit: float, measured: float | None = None) -> Check:
    if measured is None:
        measured = getattr(comparison, name)
        measured = abs(measured) if name in ("gain", "shift") else measured
        measured = measured / (comparison.rms or 1.0) if name == "shift" else measured
    place, kind = WORST.get(_WORST_OF.get(name, name), ("", ""))
    index = getattr(comparison, place) if place else None
    where = "" if index is None else " ".join(filter(None, ("at", kind, str(index))))
    return Check(name=name, found=measured, limit=limit, where=where)


def _floor(comparison: Comparison, references: References | None) -> list[Check]:
    """Against what this model in this dtype with these switches is expected to lose.

    The floor is the larger error of two healthy runs against float64: the CPU in the same dtype, and the CPU under the
    device's rounding rules. The whole error may be `slack` times it, and so may the worst token; the worst element
    twice that, since a maximum scatters more than a norm; a factor or a shift that all elements share, which roundings
    hardly do, a sixteenth (`SHARED`) and a half last place of float32 (`CONSTANT`); a row's largest element may become
    another one where the gap is smaller than two of the largest errors.
    """
    assert references is not None  # without them `judge` does not come here
    times, ratios = references.slack, references.ratios()
    limits = {
        "forecast_ratio": times,
        "token_ratio": PART * times,
        "outlier_ratio": 2 * times,
        "gain_ratio": times,
        "shift_ratio": times,
    }
    if comparison.worst_token is None:
        del limits["token_ratio"]
    checks = [check_of(references.golden, name, limit, ratios[name]) for name, limit in limits.items()]
    checks[0] = replace(checks[0], where=_bits_text(references))
    checks += _slice_checks(references)
    largest = max(
        references.floor("max_diff"),
        ROUNDOFF.get(comparison.dtype, 0.0) * max(comparison.rms, abs(references.golden.flip_value)),
    )
    return [
        *checks,
        check_of(references.golden, "flip_margin", 2 * times * largest),
        *undecided_checks(comparison, references),
    ]


def _slice_checks(references: References) -> list[Check]:
    """The worst part of the output, by its own size."""
    part = references.worst_slice
    if part is None:
        return []
    ratio, limit = references.slice_ratio(part), PART * slack(part.count)
    return [
        Check(
            name="slice_ratio",
            found=ratio,
            limit=limit,
            where=f"at {part.where}, off by {part.error:.2g} of its own norm",
        )
    ]


# The largest error, as a share of the output, that a limit in floors may let pass. With it a floor is at most a quarter
# of an output of 1,000 elements and more, a tenth of one of 11 to 500 and a twentieth of a smaller one. A device that
# returned zeros has 1, one that returned something else of that size 1.4.
UNDECIDED = 0.5


def undecided_checks(comparison: Comparison, references: References, limit: float = UNDECIDED) -> list[Check]:
    """Whether the floor is small enough to decide anything: what it lets pass must be a part of the output."""
    if references.golden.rms == 0:  # there is nothing to take a share of
        return []
    return [Check(name="undecided", found=references.slack * references.floor("rel_l2"), limit=limit)]


def _bits_text(references: References) -> str:
    """The whole error in bits: of one operator it says which arithmetic ran."""
    errors = references.golden.rel_l2, references.floor("rel_l2")
    if not all(math.isfinite(item) for item in errors):
        return ""
    measured, healthy = ("all" if error == 0 else f"{bits(error):.1f}" for error in errors)
    return f"with {measured} effective bits where a healthy device keeps {healthy}"


def _sharp(comparison: Comparison, references: References | None) -> list[Check]:
    """`floor`, and the device must round as the forecast does: what the rules do not explain may be twice the scatter
    of two orders of sums.

    HF32 rounds each operand in one way, so the error that it makes is known element by element and hides nothing
    smaller; how ties go is not public, so what hangs on them is measured and allowed. In float16 and bfloat16, where
    each order of sums takes another path, and behind many HF32 layers it adds little. It believes the vendor's words on
    rounding; no NPU has confirmed them.
    """
    assert references is not None  # without them `judge` does not come here
    unexplained = references.ratios()["unexplained_ratio"]
    more = (
        []
        if math.isnan(unexplained) and references.forecast is None
        else [check_of(references.golden, "unexplained_ratio", references.slack, unexplained)]
    )
    return [*_floor(comparison, references), *more]


def _card(comparison: Comparison, references: References | None) -> list[Check]:
    """The model card's: an error below 1 %, taken as the largest difference, and a cosine of 0.99."""
    return [check_of(comparison, "max_diff", 1e-2), check_of(comparison, "cos_sim", 0.99)]


MERE = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-13, "HF32": 2**-11}


def _cann(comparison: Comparison, references: References | None) -> list[Check]:
    """CANN's operator standard for open source: mean relative error below T, the largest below 10 T
    (cann/cannbot-skills).
    """
    modes = references.modes if references is not None and comparison.dtype == "float32" else ()
    limit = max(MERE.get(name, MERE["float32"]) for name in (comparison.dtype, *modes))
    below = math.nextafter  # the standard says below, not at most
    return [check_of(comparison, "mean_rel", below(limit, 0)), check_of(comparison, "max_rel", below(10 * limit, 0))]


DYNAMO_FEW = ((10, 10), (500, 8))  # up to so many elements: times the CPU's error


def _dynamo(comparison: Comparison, references: References | None) -> list[Check]:
    """PyTorch's compiler benchmarks: within the tolerance, else no further from float64 than k times the CPU
    (torch/_dynamo/utils.py, `same`).
    """
    tolerance = DYNAMO.get(comparison.dtype, 1e-3)
    if comparison.dynamo_atol <= tolerance:
        return []
    assert references is not None  # without them `judge` does not come here
    times = 3 if comparison.numel < 1000 or tolerance >= 1e-2 else 2
    times = next((factor for most, factor in DYNAMO_FEW if comparison.numel <= most), times)
    return [Check(name="rmse", found=references.golden.rmse, limit=times * references.cpu.rmse + tolerance / 10)]


def _close(comparison: Comparison, references: References | None) -> list[Check]:
    """torch.testing.assert_close with its own table of tolerances."""
    return [check_of(comparison, "close_atol", CLOSE.get(comparison.dtype, (0.0, 0.0))[1])]


def pair_limits(budget: float) -> dict[str, float]:
    """The limits of the preset "pair" for a budget, a relative norm."""
    return {
        "rel_l2": budget,
        "token_rel_l2": 4 * budget,
        "max_scaled": 16 * budget,
        "gain": budget / 4,
        "shift": budget / 4,
    }


def _pair(comparison: Comparison, references: References | None) -> list[Check]:
    """Two tensors and nothing else: a budget of 2^11 roundoffs of float32, 2 of the half types, judged as `floor` does.

    The budgets are the T of CANN's standard; here they limit norms, so that elements near zero do no harm.
    """
    limits = pair_limits(MERE.get(comparison.dtype, {"float64": 2**-32}.get(comparison.dtype, MERE["float32"])))
    if comparison.worst_token is None:
        del limits["token_rel_l2"]
    checks = [check_of(comparison, name, limit) for name, limit in limits.items()]
    return [
        *checks,
        check_of(
            comparison,
            "flip_margin",
            max(16 * comparison.rmse, 8 * ROUNDOFF.get(comparison.dtype, 0.0) * abs(comparison.flip_value)),
        ),
    ]


PRESETS: dict[str, Callable[[Comparison, References | None], list[Check]]] = {
    "floor": _floor,
    "sharp": _sharp,
    "card": _card,
    "cann": _cann,
    "dynamo": _dynamo,
    "close": _close,
    "pair": _pair,
}
