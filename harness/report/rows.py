"""One verdict as one row of the report: flat, JSON-able, floats at full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from harness.errors import HarnessError
from harness.gate import AT_LEAST, FLOORED, Comparison, Evidence, References, Verdict, bits, checks_of

NUMBERS = (  # of a Comparison, in the order of the row
    "max_diff", "mean_diff", "cos_sim", "cos_distance", "rel_l2", "rms", "max_diff_rms", "token_cos_sim",
    "worst_index", "worst_actual", "worst_expected", "worst_token",
    "nan_actual", "nan_expected", "inf_actual", "inf_expected", "nonfinite_differ", "unequal",
    "rmse", "snr", "shift", "gain", "balance", "max_rel", "mean_rel", "max_scaled", "token_rel_l2", "ulp_max", "ulp_mean", "matched", "flips",
)  # fmt: skip
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}  # of |actual - expected|


def row(*, test: str, case: str, dtype: str | None, seed: int | None, verdict: Verdict, known: Any = None) -> dict[str, Any]:
    """The row of one test: what ran, its verdict, the numbers of the output that stands for it, the digests."""
    found = verdict.comparison
    several = {name: numbers(each) for name, each in verdict.comparisons.items()} if len(verdict.comparisons) > 1 else {}
    return jsonable(
        {
            "test": test,
            "case": case,
            "dtype": dtype,
            "seed": seed,
            "output": verdict.output or None,
            "status": verdict.status,
            "marks": list(verdict.marks),
            "reasons": [str(reason) for reason in verdict.reasons],
            "criteria": [reason.criterion for reason in verdict.reasons],
            **(numbers(found) if found is not None else dict.fromkeys(("shape", "actual_dtype", *NUMBERS))),
            "outputs": several,
            **_ratios(verdict),
            "measured": {name: _measured(found, verdict.references.get(name)) for name, found in verdict.comparisons.items()},
            "preset": verdict.tolerance.preset if verdict.tolerance else "",
            "known": None if known is None else known.to_dict(),  # the entry of the known failures that speaks of it
            "located": None,  # the operator that it comes from, when it was looked for
            "baseline": None,  # kind, text and ratio, when all seeds are in
            "limits": verdict.tolerance.limits() if verdict.tolerance else {},
            "allowed": _allowed(verdict),
            "limits_reason": verdict.tolerance.reason if verdict.tolerance else "",
            "decisions": _decisions(verdict),
            **(asdict(verdict.evidence) if verdict.evidence else dict.fromkeys(EVIDENCE)),
        }
    )


EVIDENCE = tuple(each.name for each in fields(Evidence))
RATIOS = ("golden_rel_l2", "cpu_golden_rel_l2", "forecast_golden_rel_l2", "golden_ratio", "effective_bits", "forecast_bits", "unexplained", *FLOORED)


def numbers(found: Comparison) -> dict[str, Any]:
    """What a Comparison measured, as the row holds it."""
    named = {name: getattr(found, name) for name in NUMBERS} | {name: found.quantile(share) for name, share in QUANTILES.items()}
    return {"shape": found.shape, "actual_dtype": found.dtype, **named}


def _ratios(verdict: Verdict) -> dict[str, Any]:
    """The row's output against float64: the device, the CPU and the forecast, the device over the CPU, and over the floor."""
    held = verdict.references.get(verdict.output)
    if held is None:
        return dict.fromkeys(RATIOS)
    return {
        "golden_rel_l2": held.golden.rel_l2,
        "cpu_golden_rel_l2": held.cpu.rel_l2,
        "forecast_golden_rel_l2": held.forecast.rel_l2 if held.forecast is not None else None,
        "golden_ratio": held.golden.rel_l2 / held.cpu.rel_l2 if held.cpu.rel_l2 else None,
        "effective_bits": bits(held.golden.rel_l2),
        "forecast_bits": bits(held.floor("rel_l2")),
        "unexplained": held.unexplained,
        **held.ratios(),
    }


def _allowed(verdict: Verdict) -> dict[str, float]:
    """Every limit that was judged by, its preset's included: the loosest of all outputs. What hangs on the numbers of the run is left out."""
    found: dict[str, float] = {}
    for check in checks_of(verdict):
        if check.name != "flip_margin":
            loosest = min if check.name in AT_LEAST else max
            found[check.name] = loosest(check.limit, found.get(check.name, check.limit))
    return found


def _measured(found: Comparison, held: References | None) -> dict[str, Any]:
    """Everything that was measured of one output, so that it can be judged again."""
    kept: dict[str, Any] = {"comparison": _whole(found)}
    if held is not None:
        kept |= {name: _whole(each) for name in ("golden", "cpu", "forecast") if (each := getattr(held, name)) is not None}
        kept |= {"unexplained": held.unexplained, "ties": held.ties, "modes": held.modes}
    return kept


def _whole(found: Comparison) -> dict[str, Any]:
    return asdict(found) | {"histogram": " ".join(f"{number}:{count}" for number, count in found.histogram)}


def comparison_of(kept: Mapping[str, Any]) -> Comparison:
    """The Comparison that a row holds.

    Raises: HarnessError when it is not one, or one of another version.
    """
    try:
        read = {each.name: _number(kept[each.name]) for each in fields(Comparison) if each.name != "histogram"}
        read = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
        pairs = (each.split(":") for each in kept["histogram"].split())
        return Comparison(**read, histogram=tuple((int(number), int(count)) for number, count in pairs))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HarnessError(f"a row holds no comparison that this version reads ({error}); write the report again with `pytest -k precision`") from None


def references_of(kept: Mapping[str, Any]) -> References | None:
    """The References that a row holds for one output, or None."""
    if "golden" not in kept:
        return None
    read = {name: comparison_of(kept[name]) for name in ("golden", "cpu", "forecast") if name in kept}
    return References(**read, unexplained=_number(kept["unexplained"]), ties=_number(kept.get("ties")), modes=tuple(kept["modes"]))


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _decisions(verdict: Verdict) -> dict[str, Any] | None:
    made = verdict.decisions
    if made is None:
        return None
    return asdict(made) | {"top1": made.top1, "accuracy": made.accuracy, "expected_accuracy": made.expected_accuracy}


def jsonable(value: Any) -> Any:
    """`value` for JSON: tuples become lists, a number that is not finite becomes "nan", "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
