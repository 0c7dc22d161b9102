"""Stored results, judged again without a run; pairs of tensors as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from harness.errors import HarnessError
from harness.judging.checks import judge
from harness.judging.status import Status
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Reason, Verdict, error, skipped
from harness.report.document import Block, Bullets, Table, Text, to_markdown, to_short_markdown
from harness.report.format import NO_VALUE, cosine, counts, difference_text, times
from harness.report.rows import Row
from harness.report.words import EN
from harness.typed_json import shown

if TYPE_CHECKING:
    from harness.report.content import Report

_NOT_BY_PRESET = ("fallback", "output", "reference")  # failures that no preset decides


def rejudged_rows(report: Report, preset: str | None) -> list[tuple[Row, Verdict]]:
    """Each row with its verdict under `preset`, or under the limits that it was judged by.

    Raises: HarnessError when a row holds no numbers that can be judged again.
    """
    if preset:
        Tolerance(preset=preset)  # says which there are
    return [(row, judged_again(row, preset)) for row in report.rows]


def judged_again(row: Row, preset: str | None = None) -> Verdict:
    """The verdict on a row's numbers under `preset`, or under the limits that it was judged by.

    Raises: HarnessError when it holds no numbers that can be judged again.
    """
    if row.status in (Status.ERROR, Status.SKIPPED):
        return (error if row.status is Status.ERROR else skipped)("; ".join(row.reasons))
    if not row.comparisons and row.rel_l2 is not None:
        raise HarnessError(
            f"row {shown(row.test)} was written before reports held what judging again needs; write the report "
            "again with `pytest -k precision`"
        )
    verdict = judge(row.comparisons, _tolerance(row, preset), decisions=row.decisions, references=row.references)
    reasons = [Reason(criterion=criterion, text=text) for criterion, text in zip(row.criteria, row.reasons)]
    retained = tuple(reason for reason in reasons if reason.criterion in _NOT_BY_PRESET)
    worse = tuple(reasons) if row.status is Status.REGRESSED else ()
    return replace(verdict, failures=(*retained, *verdict.failures), regressions=worse, marks=row.marks)


def _tolerance(row: Row, preset: str | None) -> Tolerance:
    if preset:
        return Tolerance(preset=preset)
    try:
        return Tolerance(preset=row.preset, reason=row.limits_reason or "as stored", **row.limits)
    except ValueError as error:
        raise HarnessError(
            f"row {shown(row.test)} holds limits that cannot be judged by ({error}); write the report again "
            "with `pytest -k precision`"
        ) from None


def verdicts_text(result: Iterable[tuple[Row, Verdict]], *, title: str) -> str:
    """Verdicts as a markdown table, with what was stored beside, and the reasons of those that do not pass."""
    result = list(result)
    columns = (
        "test",
        "dtype",
        "seed",
        "max_diff",
        "mean_diff",
        "cos_sim",
        "rel_l2",
        "measured / forecast",
        "stored",
        "result",
    )
    rows = []
    for row, verdict in result:
        numbers = verdict.comparison
        cells = (
            [difference_text(getattr(numbers, name)) for name in ("max_diff", "mean_diff")]
            if numbers
            else [NO_VALUE, NO_VALUE]
        )
        cells += [cosine(numbers.cos_sim), difference_text(numbers.rel_l2)] if numbers else [NO_VALUE, NO_VALUE]
        references = verdict.references.get(verdict.output)
        cells.append(NO_VALUE if references is None else times(references.ratios()["forecast_ratio"]))
        identity = (row.test, row.dtype or NO_VALUE, NO_VALUE if row.seed is None else str(row.seed))
        rows.append((*identity, *cells, row.status, _result(verdict)))
    return _text(title, columns, rows, 3, [(row.test, verdict) for row, verdict in result])


class NamedVerdict(Protocol):
    """A pair of tensors, as `harness.pairs.Pair` is one: its name and its verdict."""

    @property
    def name(self) -> str: ...

    @property
    def verdict(self) -> Verdict: ...


def pairs_text(result: Iterable[NamedVerdict], *, title: str, notes: Iterable[str] = ()) -> str:
    """Pairs of tensors as a markdown table, the reasons of those that do not pass, and notes.

    The first pair that does not pass is the last line.
    """
    result = list(result)
    columns = (
        "name",
        "dtype",
        "shape",
        "max_diff",
        "mean_diff",
        "cos_sim",
        "rel_l2",
        "gain",
        "ulp_mean",
        "p99",
        "result",
    )
    rows = []
    for pair in result:
        numbers = pair.verdict.comparison
        if numbers is None:
            rows.append((pair.name, *[NO_VALUE] * (len(columns) - 2), _result(pair.verdict)))
            continue
        cells = [
            difference_text(numbers.max_diff),
            difference_text(numbers.mean_diff),
            cosine(numbers.cos_sim),
            difference_text(numbers.rel_l2),
        ]
        cells += [f"{numbers.gain:+.1e}", times(numbers.ulp_mean), difference_text(numbers.quantile(0.99))]
        rows.append(
            (pair.name, numbers.dtype, "x".join(map(str, numbers.shape)) or "scalar", *cells, _result(pair.verdict))
        )
    text = _text(title, columns, rows, 3, [(pair.name, pair.verdict) for pair in result])
    blocks: list[Block] = [Bullets(items=tuple(notes))] if (notes := tuple(notes)) else []
    first = next((pair for pair in result if not pair.verdict.passed), None)
    if first is not None:
        blocks.append(Text(text=f"first that differs: {first.name}: {first.verdict.reasons[0]}"))
    return f"{text}\n\n{to_markdown(blocks)}".rstrip("\n") if blocks else text


def upgrade_text(result: Any, *, title: str, every: bool = False) -> str:
    """An upgrade as markdown for a pull request, never longer than a comment may be: counts, what changed in the stack,
    and each row that changed, the worst first; IDENTICAL ones when `every`.
    """
    counted = ", ".join(f"{count} {kind}" for kind, count in result.counts().items()) or "nothing to compare"
    blocks: list[Block] = [Text(text=f"{'✅' if result.passed else '❌'} {title}: {counted}", strong=True)]
    blocks += [Bullets(items=result.notes)] if result.notes else []
    if result.stack:
        changed = tuple((name, _shown(before), _shown(after)) for name, before, after in result.stack)
        blocks.append(Table(columns=("changed", "before", "after"), rows=changed))
        if result.effects:
            blocks += [Text(text="Of these, what changes numbers by itself:"), Bullets(items=result.effects)]
    else:
        blocks.append(Text(text="The two stacks are the same."))
    rows = tuple(
        _transition(transition) for transition in result.transitions if every or transition.kind != "IDENTICAL"
    )
    if rows:
        columns = (
            "transition",
            "case",
            "dtype",
            "seed",
            "before",
            "after",
            "error before",
            "error after",
            "ratio",
            "why",
        )
        blocks.append(Table(columns=columns, rows=rows, numbers_from=6, numbers_to=9))
    return to_short_markdown(blocks, left_out=EN["left_out"]).rstrip("\n")


def _transition(each: Any) -> tuple[str, ...]:
    """One transition as the cells of its row."""
    seed = NO_VALUE if each.seed is None else str(each.seed)
    ratio = each.error_after / each.error_before if each.error_before and each.error_after is not None else None
    numbers = (difference_text(each.error_before), difference_text(each.error_after), times(ratio))
    statuses = (each.before or NO_VALUE, each.after or NO_VALUE)
    return (str(each.kind), each.case, each.dtype or NO_VALUE, seed, *statuses, *numbers, each.text)


def _shown(value: Any) -> str:
    if value is None:
        return NO_VALUE
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _result(verdict: Verdict) -> str:
    return f"{verdict.status.sign} {verdict.status}"


def _text(
    title: str,
    columns: tuple[str, ...],
    rows: list[tuple[str, ...]],
    numbers_from: int,
    named: list[tuple[str, Verdict]],
) -> str:
    headline = {status.value: sum(verdict.status == status for _, verdict in named) for status in Status}
    blocks: list[Block] = [Table(columns=columns, rows=tuple(rows), numbers_from=numbers_from)]
    reasons = tuple(f"{verdict.status} {name}: {reason}" for name, verdict in named for reason in verdict.reasons)
    blocks += [Bullets(items=reasons)] if reasons else []
    return to_markdown([*blocks, Text(text=f"{title}: {counts(headline)}", strong=True)]).rstrip("\n")
