"""The limits that a row is judged by: a preset, limits of one's own, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from harness.judging.criteria import AT_LEAST, NEEDS_FLOOR
from harness.judging.preset_names import NEED_FORECAST
from harness.judging.presets import MERE, PRESETS, pair_limits


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A preset, or limits of one's own, or a preset with some of its limits replaced; None is not judged.

    Shape, dtype and non-finite elements are judged always. The last five limits are in units of the floor, what a
    healthy device is expected to lose: they need the references that `validate` measures.

    Raises: ValueError when nothing is judged, the preset is unknown or a limit of it is replaced without a reason, or a
    limit is negative or NaN, or a cosine or a share is above 1.
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
    # At most; the relative error of the worst part over that of any part in healthy runs.
    slice_ratio: float | None = None
    unexplained_ratio: float | None = None  # at most; what the forecast leaves unexplained, over the scatter of sums
    # At most; the error that the floor lets pass, as a share of the output: see `UNDECIDED`.
    undecided: float | None = None
    preset: str = ""  # one of `PRESET_NAMES`
    reason: str = ""  # where the limits come from; the report prints it

    def __post_init__(self) -> None:
        limits = self.limits()
        judging = [
            name
            for name, limit in limits.items()
            if name != "undecided" and limit != (0 if name in AT_LEAST else math.inf)
        ]
        if not judging and not self.preset:
            raise ValueError(
                f"a Tolerance without limits would pass anything; name a preset or set one of {', '.join(LIMITS)}"
            )
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"no preset is called {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.preset and limits and not self.reason:
            raise ValueError(
                f"preset {self.preset!r} with another {', '.join(limits)} needs a reason=, which the report prints"
            )
        for name, limit in limits.items():
            if not 0 <= limit <= (1 if name in AT_LEAST else math.inf):
                most = "between 0 and 1" if name in AT_LEAST else "zero or more"
                raise ValueError(f"the limit {name}={limit!r} must be {most}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by the name of what they limit."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}


LIMITS = tuple(field.name for field in fields(Tolerance) if field.name not in ("preset", "reason"))
NUMERIC = frozenset(
    (*LIMITS, "rmse")
)  # criteria that are a number beyond its limit; every other one is a way of its own to fail


def without_forecast(tolerance: Tolerance, why: str, dtype: str) -> Tolerance:
    """What judges where there is no expected error: in place of "floor" and "sharp" the preset "pair"; limits in units
    of the floor go.

    "pair" allows a norm of the difference that depends on the dtype alone: "cann" would fail elements near zero, "card"
    goes by the output's scale. In float32 its budget is that of HF32, CANN's T = 2^-11, since nobody says that HF32 is
    off there. A tolerance that needs no expected error is left as it is. `why` becomes the reason, which the report
    prints.
    """
    floored = {name: None for name in tolerance.limits() if name in NEEDS_FLOOR}
    needs = tolerance.preset in NEED_FORECAST
    if not needs and not floored:
        return tolerance
    own = {name: limit for name, limit in tolerance.limits().items() if name not in floored}
    preset = tolerance.preset if not needs and (tolerance.preset or own) else "pair"
    budget = pair_limits(MERE["HF32"]) if preset == "pair" and dtype == "float32" else {}
    text = f"{why}; judged by {f'preset {preset}' if preset else 'the limits that need none'}"
    text += " with the budget of HF32, which may be on" if budget else ""
    return replace(
        tolerance, **floored | budget | own, preset=preset, reason="; ".join(filter(None, (tolerance.reason, text)))
    )
