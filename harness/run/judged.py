"""The verdict on one run of the device: comparisons, decisions, generations, and outputs that show nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.errors import CaseError
from harness.judging.checks import judge
from harness.judging.presets import UNDECIDED
from harness.judging.status import NEAR_TIE, UNFELT, Mark
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Decisions, Reason, Verdict
from harness.measure import compare
from harness.measure.generation import first_divergence, shared_length, until
from harness.reference import as_golden_has, named_tensors
from harness.run.comparisons import cut_as_float16, measured_outputs, near_tied

TOP = 5  # largest logits whose agreement is counted beside the largest


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """What the device's outputs are held against, by name."""

    expected: dict[str, Tensor]
    golden: dict[str, Tensor] | None
    forecast: dict[str, Tensor] | None
    other: dict[str, Tensor] | None
    wide: (
        dict[str, Tensor] | None
    )  # golden as it was computed: with the largest number of float64 where a mask filled it
    modes: tuple[str, ...]
    random: Sequence[dict[str, Tensor]] = ()  # of runs with random roundings, the one without them first


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges runs of the device by one tolerance and the same healthy runs."""

    case: Case
    healthy: Healthy
    tolerance: Tolerance
    saturates: str  # the device on which float16 saturates, or ""
    targets: Tensor | None = None  # the tokens that come next, -100 where none does: see `next_tokens`

    def with_healthy(self, **changes: Any) -> Judge:
        """A judge with other healthy runs: fields of `Healthy`."""
        return replace(self, healthy=replace(self.healthy, **changes))

    def __call__(self, outputs: dict[str, Tensor]) -> tuple[Verdict, str]:
        """The verdict on one run of the device, and where generations part."""
        case, healthy, tolerance, saturates = self.case, self.healthy, self.tolerance, self.saturates
        golden, given = healthy.golden, outputs
        outputs, expected, forecast = (
            item if item is None or healthy.wide is None else as_golden_has(healthy.wide, item)
            for item in (outputs, healthy.expected, healthy.forecast)
        )
        actual = outputs
        golden, cut = cut_as_float16(golden, expected, outputs, saturates) if saturates else (golden, [])
        parted, parting = None, ""
        random = healthy.random
        if case.generates is not None:
            actual, expected, golden, forecast, parted, parting = _until_they_part(
                case.generates, actual, expected, golden, forecast, random[1:]
            )
            random = ()  # of other lengths
        comparisons, references = measured_outputs(
            actual, expected, golden, forecast, healthy.modes, healthy.other, random
        )
        decisions = _decide(case, outputs, expected, self.targets) if case.decisions is not None else None
        verdict = judge(comparisons, tolerance, decisions=decisions, references=references)
        result = [_lacking(name, "the device did not return it") for name in expected if name not in outputs]
        result += [_lacking(name, "the CPU did not return it") for name in outputs if name not in expected]
        plainer = cut + (_unseen(given, healthy.expected, golden) or _zeroed(given, healthy.expected, golden))
        if plainer:  # they say why nothing can be decided
            verdict = _without_undecided(verdict)
        result += plainer
        result += [Reason(criterion="token", text=parted.text)] if parted is not None and not parted.near_tie else []
        marks = (NEAR_TIE,) if parted is not None and parted.near_tie else ()
        marks += (UNFELT,) if any(reference.unfelt for reference in references.values()) else ()
        marks += (NEAR_TIE,) if near_tied(comparisons) and NEAR_TIE not in marks else ()
        return replace(verdict, failures=(*result, *verdict.failures), marks=(*verdict.marks, *marks)), parting


def _without_undecided(verdict: Verdict) -> Verdict:
    failures = tuple(failure for failure in verdict.failures if failure.criterion != "undecided")
    return replace(
        verdict, failures=failures, marks=tuple(mark for mark in verdict.marks if mark is not Mark.UNDECIDABLE)
    )


def _until_they_part(names: tuple[str, str], actual, expected, golden, forecast, random):
    """The outputs up to the first token that any run chose otherwise, the device's first, or None, and where that is in
    words. `random` are runs with random roundings, which say better how well the logits are known.
    """
    healthy = [item for item in (golden, forecast) if item is not None]
    parted = first_divergence(actual, expected, [*healthy, *random] if golden is not None else [], names)
    shared = shared_length([actual, *healthy], expected, names)
    if shared is None:
        return actual, expected, golden, forecast, None, ""
    note = parted.text if parted is not None else f"healthy runs part at token {shared}: compared up to there"
    cut = [None if item is None else until(item, shared, names) for item in (actual, expected, golden, forecast)]
    return (*cut, parted, note)


def _lacking(name: str, text: str) -> Reason:
    return Reason(criterion="output", text=f"output {name!r}: {text}")


def _decide(
    case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor], targets: Tensor | None = None
) -> Decisions | None:
    """Top-1 decisions along the last axis of the output that the case names; None where the shapes differ.

    Where the CPU's largest values are equal, as rounded logits can be, each of them is its decision. Rows that are zero
    on both sides, as those of padding are, decide nothing and are not counted.
    """
    if case.decisions not in expected:
        raise CaseError(f"{case.name}: decisions={case.decisions!r}, but the outputs are {', '.join(expected)}")
    left, right = actual.get(case.decisions), expected[case.decisions]
    if left is None or left.shape != right.shape:
        return None  # a failure of its own
    perplexities, places = _perplexities(left, right, targets), None
    if case.labels is None:
        there = (left != 0).any(-1) | (right != 0).any(-1)
        if bool(there.any()):
            left, right, places = left[there], right[there], there.reshape(-1).nonzero().reshape(-1)
    scores = right.double()
    overlap, pair = _overlap(left.double(), scores), (left, right)
    left, right = left.double().argmax(-1, keepdim=True), scores.argmax(-1, keepdim=True)
    same = ((left == right) | (scores.gather(-1, left) == scores.gather(-1, right))).reshape(-1)
    left, right = left.reshape(-1), right.reshape(-1)
    if case.labels is not None and case.labels.numel() != right.numel():
        raise CaseError(f"{case.name}: {case.labels.numel()} labels for {right.numel()} decisions")
    differing = (~same).nonzero().reshape(-1)
    first = int(differing[0]) if differing.numel() else None
    labels = None if case.labels is None else case.labels.reshape(-1)
    return Decisions(
        count=right.numel(),
        agree=int(same.sum()),
        **overlap,
        **_divergence(*pair),
        **perplexities,
        correct_actual=None if labels is None else int((left == labels).sum()),
        correct_expected=None if labels is None else int((right == labels).sum()),
        first=None if first is None else (_place(places, first), int(left[first]), int(right[first])),
    )


def _place(places: Tensor | None, row: int) -> int:
    """Where a counted row stands among all rows."""
    return row if places is None else int(places[row])


def _overlap(left: Tensor, right: Tensor) -> dict[str, Any]:
    """How much the k largest elements of each row are the same ones: 5, or half of a short row."""
    k = min(TOP, right.shape[-1] // 2) if right.dim() else 0
    if not k or not right.numel():
        return {}
    first, second = left.topk(k).indices, right.topk(k).indices
    shared = (first[..., :, None] == second[..., None, :]).any(-1)
    return {"k": k, "topk": float(shared.double().mean())}


_ROWS = 1 << 20  # numbers of the rows that are taken at a time


def _divergence(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """KL(softmax(expected) || softmax(actual)) of each row of logits in nats, in float64: the mean, and the largest.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951. Rounding leaves numbers just below zero.
    """
    if not expected.dim() or expected.shape[-1] < 2 or not expected.numel() or not expected.is_floating_point():
        return {}
    width = expected.shape[-1]
    rows, total, largest = expected.numel() // width, 0.0, 0.0
    step = max(_ROWS // width, 1)
    for start in range(0, rows, step):
        left, right = (
            tensor.reshape(rows, width)[start : start + step].double().log_softmax(-1) for tensor in (actual, expected)
        )
        lost = torch.where(right.isneginf(), 0.0, right.exp() * (right - left)).sum(-1)
        lost = lost.clamp_(min=0.0)  # NaN stays
        total += float(lost.sum())
        largest = max(largest, float(lost.max())) if not bool(lost.isnan().any()) else math.nan
    return {"kl": total / rows, "kl_max": math.nan if math.isnan(total) else largest}


NO_TOKEN = -100  # as torch and transformers mark a position without a target


def next_tokens(case: Case, inputs: Any) -> Tensor | None:
    """The tokens (B, T) that come after each of a case's, `NO_TOKEN` after the last and where the mask hides them.

    Raises: CaseError where the inputs have no such ids.
    """
    if case.next_tokens is None:
        return None
    ids = inputs.get(case.next_tokens) if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise CaseError(f"{case.name}: next_tokens={case.next_tokens!r} names no input of token ids (B, T)")
    result = torch.full_like(ids, NO_TOKEN)
    result[:, :-1] = ids[:, 1:]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        hidden = ~(mask.bool() & torch.nn.functional.pad(mask[:, 1:].bool(), (0, 1)))
        result[hidden] = NO_TOKEN
    return result


def _perplexities(actual: Tensor, expected: Tensor, targets: Tensor | None) -> dict[str, float]:
    """exp of the mean negative log-likelihood of the targets, in float64; nothing where there are none."""
    if targets is None or targets.shape != expected.shape[:-1] or not bool((targets != NO_TOKEN).any()):
        return {}
    there = targets != NO_TOKEN
    losses = [
        float(torch.nn.functional.cross_entropy(logits[there].double(), targets[there]))
        for logits in (actual, expected)
    ]
    return dict(zip(("perplexity", "expected_perplexity"), map(_exp, losses)))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _unseen(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], golden: Mapping[str, Tensor] | None
) -> list[Reason]:
    """A reason where every output is zero, not finite, or one constant without an error: a PASS would show nothing."""
    own = [name for name in expected if name in outputs and name not in named_tensors(expected)]
    pairs = [
        (outputs[name], expected[name]) for name in own if expected[name].is_floating_point() and expected[name].numel()
    ]
    if not pairs:
        return []
    what = ""
    if not any(bool(item.any()) for pair in pairs for item in pair):
        what = "zero"
    elif not any(bool(tensor.isfinite().any()) for pair in pairs for tensor in pair):
        what = "Inf or NaN"
    elif all(_is_constant(*pair) for pair in pairs) and all(
        golden is not None and name in golden and torch.equal(golden[name].double(), tensor.double())
        for name, tensor in expected.items()
        if tensor.is_floating_point()
    ):
        what = "the same number"
    if not what:
        return []
    text = (
        f"every element of every output is {what} on both sides: nothing shows what computes it; give weights and "
        "inputs that do (a last layer of zeros hides all before it)"
    )
    return [Reason(criterion="empty", text=text)]


def _zeroed(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], golden: Mapping[str, Tensor] | None
) -> list[Reason]:
    """A reason for each output of which the device returned nothing but zeros where the CPU did not, whatever the
    limits allow.

    What the CPU has must be more than its own error to float64: a difference of equal numbers may be zero on one side
    alone.
    """
    result = []
    for name, tensor in expected.items():
        if name not in outputs or not tensor.is_floating_point() or not tensor.numel() or bool(outputs[name].any()):
            continue
        largest = float(tensor.abs().max())
        wide = tensor if golden is None else golden.get(name, tensor)
        if wide.shape == tensor.shape and not compare(tensor, wide).rel_l2 < UNDECIDED:
            continue
        if largest >= torch.finfo(tensor.dtype).tiny:  # smaller numbers a device may flush to zero
            text = (
                f"every element that the device returned is zero, where the CPU's are up to {largest:.2e}: it "
                "computed nothing here"
            )
            result.append(Reason(criterion="empty", text=text, output=name if len(expected) > 1 else ""))
    return result


def _is_constant(actual: Tensor, expected: Tensor) -> bool:
    return expected.numel() > 1 and torch.equal(actual, expected) and bool(expected.min() == expected.max())
