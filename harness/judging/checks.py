"""Judging: the checks of a tolerance on what was measured, and what a verdict depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from harness.judging.criteria import FLOORED, NEEDS_FLOOR
from harness.judging.preset_names import NEED_REFERENCES
from harness.judging.presets import PRESETS, Check, check_of, undecided_checks
from harness.judging.references import MANY, References, is_floating
from harness.judging.status import Mark
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Decisions, Reason, Verdict
from harness.measure import Comparison, Scatter

SCALE_BLIND = {"cos_sim", "token_cos_sim"}  # limits that no common factor of the output changes
SCALE = 2.0  # by these limits alone an output may be so many times too large or too small


def judge(
    comparisons: Comparison | Mapping[str, Comparison],
    tolerance: Tolerance,
    *,
    decisions: Decisions | None = None,
    references: Mapping[str, References] | None = None,
) -> Verdict:
    """Hold what was measured against the limits.

    Outputs that are not floating point must be equal; the limits are for floating-point ones. `references`, by name of
    the output, is what the presets "floor" and "dynamo" judge by: without it they fail.
    """
    named = {"output": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    known = references or {}
    only = len(named) == 1
    failures = [
        reason
        for name, found in named.items()
        for reason in _failures("" if only else name, found, known.get(name), tolerance)
    ]
    failures += _decision_failures(decisions, tolerance)
    if named and not any(found.numel for found in named.values() if found.comparable) and not failures:
        failures.append(
            Reason(
                criterion="empty",
                text="every output has zero elements: nothing was compared; give inputs that bring some",
            )
        )
    marks = (Mark.UNDECIDABLE,) if any(failure.criterion == "undecided" for failure in failures) else ()
    return Verdict(
        comparisons=named,
        failures=tuple(failures),
        marks=marks,
        tolerance=tolerance,
        decisions=decisions,
        references=known,
    )


CERTAIN = Scatter(  # as of a thousand elements and more, whose error says enough by itself
    runs=1, degrees=math.inf, rel_l2=0.0, token_rel_l2=0.0, max_scaled=0.0, gain=0.0, shift=0.0, max_diff=0.0, rmse=0.0
)  # fmt: skip
TIES = 3.0  # standard deviations of a count


def near_ties(unsettled: float) -> int:
    """How many whole numbers of a healthy device may differ from the CPU's where those of healthy runs do in
    `unsettled` on average.

    Indices and classes are chosen among numbers of which some lie closer than they are known. How many of these change
    is a Poisson
    count: its mean and `TIES` standard deviations. None where none was seen to change.

        near_ties(0.0), near_ties(0.5), near_ties(16.0)  # (0, 2, 28)
    """
    return int(unsettled + TIES * math.sqrt(unsettled))


def hangs_on_ties(verdict: Verdict) -> bool:
    """Whether a verdict fails only since whole numbers differ, in so few elements that near-ties may be why."""
    result = [
        verdict.comparisons[failure.output or next(iter(verdict.comparisons))]
        for failure in verdict.failures
        if failure.criterion == "equal"
    ]
    alone = 0 < len(result) == len(verdict.failures)
    return alone and all(
        not is_floating(item.expected_dtype) and item.unequal <= MOST_TIES * item.numel for item in result
    )


def hangs_on_choice(verdict: Verdict) -> bool:
    """Whether a verdict fails only since a generated token differs, while its logits are as a healthy device's."""
    return bool(verdict.failures) and all(failure.criterion == "token" for failure in verdict.failures)


MOST_TIES = 0.5  # share of an output: no near-ties if more differ


def hangs_on_slack(verdict: Verdict) -> bool:
    """Whether a verdict passes only since few elements have more slack than many."""
    few = [name for name, reference in verdict.references.items() if reference.golden.numel < MANY]
    if verdict.failures or not few or verdict.tolerance is None:
        return False
    strict = {
        name: replace(reference, scatter=CERTAIN) if name in few else reference
        for name, reference in verdict.references.items()
    }
    return not judge(verdict.comparisons, verdict.tolerance, decisions=verdict.decisions, references=strict).passed


def checks_of(verdict: Verdict) -> list[Check]:
    """Every limit that a verdict was judged by beside what was found, of all outputs; empty where it was judged by
    none.
    """
    tolerance = verdict.tolerance
    if tolerance is None:
        return []
    judged = {
        name: found
        for name, found in verdict.comparisons.items()
        if found.comparable and found.numel and is_floating(found.expected_dtype)
    }
    judged = {
        name: item for name, item in judged.items() if name in verdict.references or not _needs_references(tolerance)
    }
    result = [
        check for name, item in judged.items() for check in _checks(item, verdict.references.get(name), tolerance)
    ]
    if tolerance.top1 is not None and verdict.decisions is not None:
        result.append(Check(name="top1", found=verdict.decisions.top1, limit=tolerance.top1))
    return result


def _failures(output: str, comparison: Comparison, references: References | None, tolerance: Tolerance) -> list[Reason]:
    """Every check that does not hold for one output."""

    def reason(criterion: str, text: str, measured: float | None = None, allowed: float | None = None) -> Reason:
        return Reason(criterion=criterion, text=text, output=output, found=measured, allowed=allowed)

    if not comparison.comparable:
        return [reason("shape", f"shape {comparison.shape} where {comparison.expected_shape} was expected")]
    failures = []
    if comparison.dtype != comparison.expected_dtype:
        failures.append(reason("dtype", f"dtype {comparison.dtype} where {comparison.expected_dtype} was expected"))
    if comparison.nonfinite_differ:
        failures.append(reason("finite", _nonfinite_text(comparison), comparison.nonfinite_differ, 0))
    elif comparison.nan_expected:
        failures.append(
            reason("finite", f"{comparison.nan_expected} elements are NaN on both sides: nothing can be said of them")
        )
    elif references is not None and references.cpu.nonfinite_differ and not comparison.nonfinite_differ:
        failures.append(reason("finite", _overflow_text(references), references.cpu.nonfinite_differ, 0))
    if not is_floating(comparison.expected_dtype):
        allowed = near_ties(comparison.unsettled)
        if not comparison.unequal <= allowed:
            healthy = f"healthy runs differ in {comparison.unsettled:.2g} on average: up to {allowed} allowed"
            must = healthy if comparison.unsettled else "all must be equal"
            text = f"{comparison.unequal} of {comparison.numel} elements differ, {_values(comparison)} ({must})"
            failures.append(reason("equal", text, comparison.unequal, allowed))
        return failures
    if not comparison.numel:
        return failures
    if references is None and _needs_references(tolerance):
        return [*failures, reason("golden", _no_golden_text(tolerance))]
    checks = _checks(comparison, references, tolerance)
    if not checks and not tolerance.preset and tolerance.top1 is None:
        names = ", ".join(tolerance.limits())
        failures.append(
            reason(
                "limits",
                f"none of the limits ({names}) can judge an output of shape {comparison.shape}; set rel_l2 or "
                "cos_sim, or name a preset",
            )
        )
    broken = [reason(check.name, check.text, check.found, check.limit) for check in checks if not check.holds]
    blind = (
        not tolerance.preset and SCALE_BLIND & {*tolerance.limits()} and {*tolerance.limits()} <= {*SCALE_BLIND, "top1"}
    )
    if blind and not broken and not 1 / SCALE <= 1 + comparison.gain <= SCALE:
        names = ", ".join(tolerance.limits())
        text = (
            f"the output is {1 + comparison.gain:.3g} times what was expected, which {names} cannot see; set rel_l2 or "
            "gain as well"
        )
        broken = [reason("scale", text, comparison.gain)]
    return failures + broken


def _needs_references(tolerance: Tolerance) -> bool:
    return tolerance.preset in NEED_REFERENCES or any(name in NEEDS_FLOOR for name in tolerance.limits())


def _checks(comparison: Comparison, references: References | None, tolerance: Tolerance) -> list[Check]:
    """The preset's checks, but for those that have a limit of their own, and the limits of one's own."""
    own = tolerance.limits()
    checks = PRESETS[tolerance.preset](comparison, references) if tolerance.preset else []
    if not any(item.name == "undecided" for item in checks) and any(name in FLOORED for name in own):
        assert references is not None  # see `_needs_references`
        checks = [*checks, *undecided_checks(comparison, references)]
    checks = [item for item in checks if item.name not in own]
    return checks + [
        check for name, limit in own.items() if (check := _own(comparison, references, name, limit)) is not None
    ]


def _own(comparison: Comparison, references: References | None, name: str, limit: float) -> Check | None:
    if name == "top1":
        return None  # of the case as a whole
    if name in ("token_cos_sim", "token_rel_l2", "token_ratio") and comparison.worst_token is None:
        return None  # a flat output has no tokens; its one vector is what cos_sim and rel_l2 judge
    if name not in NEEDS_FLOOR:
        return check_of(comparison, name, limit)
    assert references is not None  # see `_needs_references`
    if name == "undecided":
        return next(iter(undecided_checks(comparison, references, limit)), None)
    return check_of(references.golden, name, limit, references.ratios()[name])


def _decision_failures(decisions: Decisions | None, tolerance: Tolerance) -> list[Reason]:
    limit = tolerance.top1
    if limit is None:
        return []
    if decisions is None:
        text = (
            "top1 is a limit and no decisions were compared; name the output that holds the logits: Case(decisions=…)"
        )
        return [Reason(criterion="top1", text=text)]
    if Check(name="top1", found=decisions.top1, limit=limit).holds:
        return []
    text = f"top-1 decisions agree on {decisions.agree} of {decisions.count} inputs (at least {limit:.1%} required)"
    if decisions.first is not None:
        text += "; the first that differs is input {}: {} where {} was expected".format(*decisions.first)
    return [Reason(criterion="top1", text=text, found=decisions.top1, allowed=limit)]


def _no_golden_text(tolerance: Tolerance) -> str:
    what = f"preset {tolerance.preset!r}" if tolerance.preset else "a limit in units of the floor"
    return (
        f"no float64 reference was measured, so {what} cannot judge; give limits of your own, such as "
        "Tolerance(rel_l2=…, reason=…), or compare with --golden"
    )


def _overflow_text(references: References) -> str:
    count = references.cpu.nonfinite_differ
    if (
        references.cpu.nan_expected + references.cpu.inf_expected
        > references.cpu.nan_actual + references.cpu.inf_actual
    ):
        return (
            f"{count} elements of the float64 result are not finite where the CPU's {references.cpu.dtype} is: "
            "nothing can be said of them"
        )
    return (
        f"{count} elements of the CPU's own result are not finite where float64 is: {references.cpu.dtype} cannot "
        "hold this model"
    )


def _nonfinite_text(comparison: Comparison) -> str:
    return f"{comparison.nonfinite_differ} elements are NaN or infinite on one side only, {_values(comparison)}"


def _values(comparison: Comparison) -> str:
    values = f"{comparison.worst_actual:g} where {comparison.worst_expected:g} was expected"
    return f"the first at {comparison.worst_index}: {values}"
