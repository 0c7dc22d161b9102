"""A report as blocks of text and tables, in English or Chinese: what it comes to, what failed, the tables of a model
card, and folded what else is known.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from harness.judging.criteria import AT_LEAST
from harness.judging.status import GRAVEST, STATUSES, Mark, Status
from harness.report.cards import card_blocks, cards_line
from harness.report.document import Block, Bullets, Folded, Heading, Picture, Table, Text, shortened
from harness.report.format import NO_VALUE, cosine, difference_text, number, share, tally, times
from harness.report.located import found_blocks
from harness.report.rows import Located, Row
from harness.report.switches import switch_blocks
from harness.report.words import LANGUAGES, told

if TYPE_CHECKING:
    from harness.report.content import Report


_MANY = 8  # cases of one row each, from which a test's cases are the probes of one table
FAILED_SHOWN = 40  # rows that did not pass with a line each; of more than these the rest is counted
LOCATED_SHOWN = 10  # rows whose location is shown in full
_FIRST = 240  # characters of a reason and of a location in the line of a row


def document(report: Report, lang: str = "en") -> list[Block]:
    """The whole report in one language."""
    words = LANGUAGES[lang]
    return [
        *_headline(report, words),
        *_not_passed(report, words),
        *_known(report, words),
        *_accuracy(report, words),
        *card_blocks(report, words),
        *switch_blocks(rows_of_models(report.rows), words),
        *performance_blocks(report, words),
        *_in_full(report, words),
        *_environment(report, words),
    ]


def _device(report: Report) -> str:
    return report.stack.get("device") or NO_VALUE


# -------- what it comes to


def title_of(report: Report, words: Mapping[str, str]) -> str:
    """The title: what the rows came to, the grave ones first."""
    if report.performance and not report.rows:
        return words["performance"]
    return words["title"].format(counts=tally(report.rows, GRAVEST) or words["none"])


def warnings_of(report: Report, words: Mapping[str, str]) -> list[str]:
    """What a reader must know before any number: that the device is emulated, that it is broken on purpose."""
    if report.backend != "emulated":
        return []
    warnings = [words["emulated"].format(device=_device(report))]
    if report.stack.get("faults"):
        warnings.append(words["faults"].format(faults=told("; ".join(report.stack["faults"]), words)))
    return warnings


def stack_line(report: Report) -> str:
    """The stack on one line, and when it was measured: "Ascend910B4 (npu), cann 8.5.1, torch 2.9.0, …"."""
    return ", ".join([*_stack_parts(report), report.created])


def _stack_parts(report: Report) -> list[str]:
    named = [f"{name} {report.stack[name]}" for name in ("cann", "torch", "torch_npu") if report.stack.get(name)]
    return [f"{_device(report)} ({report.backend})", *named]


def stacks_title(before: Report, after: Report) -> str:
    """Two stacks by what differs of them, or by their days where nothing does.

    >>> from harness.report import build
    >>> old, new = ({"device": "Ascend910B4", "cann": version, "torch": "2.9"} for version in ("8.2", "8.5"))
    >>> stacks_title(*(build([], stack=each, backend="npu") for each in (old, new)))
    'Ascend910B4 (npu), cann 8.2, torch 2.9 → cann 8.5'
    """
    old, new = _stack_parts(before), _stack_parts(after)
    if old == new:
        return f"{', '.join(old)}, {before.created} → {after.created}"
    return f"{', '.join(old)} → {', '.join(item for item in new if item not in old)}"


def _headline(report: Report, words: Mapping[str, str]) -> list[Block]:
    blocks: list[Block] = [Text(text=warning, strong=True) for warning in warnings_of(report, words)]
    blocks.append(Heading(level=1, text=title_of(report, words)))
    if report.stack.get("device"):
        blocks.append(Text(text=stack_line(report)))
    conclusion = conclusion_of(report, words)
    return [*blocks, Text(text=conclusion)] if conclusion else blocks


def conclusion_of(report: Report, words: Mapping[str, str]) -> str:
    """What the rows come to in sentences; "" for a performance table alone."""
    rows = report.rows
    if report.performance and not rows:
        return ""
    bad = [row for row in rows if row.is_bad]
    excused = [row for row in rows if Mark.KNOWN in row.marks]
    measured = [
        row for row in rows if row.rel_l2 is not None and math.isfinite(row.rel_l2) and Mark.KNOWN not in row.marks
    ]
    if report.idle_faults and not bad:
        text = words["fault_idle"].format(faults=told("; ".join(report.idle_faults), words))
    elif bad:
        text = words["some_fail"].format(bad=len(bad), total=len(rows), device=_device(report))
    elif measured:
        text = words["all_pass"].format(
            total=len(measured),
            device=_device(report),
            rel_l2=difference_text(max(row.rel_l2 for row in measured if row.rel_l2 is not None)),
            cos_sim=cosine(min((row.cos_sim for row in measured if row.cos_sim is not None), default=None)),
        )
    else:
        text = "" if any(row.rel_l2 is not None for row in excused) else words["nothing"]
    sentences = [text] if text else []
    sentences += [words["known_too"].format(count=len(excused))] if excused else []
    sentences += [f"{cards_line(report.cards, words)}{words['full_stop']}"] if report.cards else []
    sentences += [words["emulated_again"]] if report.backend == "emulated" else []
    return words["between"].join(sentences)


# -------- what failed


def failed_first(rows: Iterable[Row]) -> list[Row]:
    """The rows that did not pass, the graver ones first: FAIL, ERROR, REGRESSED, SKIPPED; in their order otherwise."""
    order = {Status.FAIL: 0, Status.ERROR: 1, Status.REGRESSED: 2, Status.SKIPPED: 3}
    told = [row for row in rows if row.status in order and Mark.KNOWN not in row.marks]
    return sorted(told, key=lambda row: order[row.status])


def line_of(row: Row, words: Mapping[str, str]) -> str:
    """A row that did not pass in one line: its status, its name, its first reason, and where its error comes from."""
    reason = told(_without_name(row.reasons[0], row), words) if row.reasons else NO_VALUE
    line = f"{row.status} {row.name}: {_first(reason)}"
    more = len(row.reasons) - 1
    if more > 0:
        line += words["one_more_reason" if more == 1 else "more_reasons"].format(count=more)
    return f"{line} → {_first(told(row.located.said, words))}" if row.located else line


def _without_name(text: str, row: Row) -> str:
    """A sentence of a row without the row's name, where the name stands before the sentence already."""
    return text.replace(f"{row.name}: ", "", 1)


def _first(text: str) -> str:
    """The first clause of a text, or what of it fits."""
    return shortened(re.split(r"\. |; |[。；]", text, maxsplit=1)[0], _FIRST)


def unlocated_count(rows: Sequence[Row]) -> int:
    """Of rows that did not pass, how many were compared, not located, and are of no case that was located in another
    row; 0 where none was located, as with --precision-locate=off.
    """
    located = {(row.case, row.dtype) for row in rows if row.located}
    compared = [row for row in rows if row.is_bad and row.comparisons]
    return sum((row.case, row.dtype) not in located for row in compared) if located else 0


def _not_passed(report: Report, words: Mapping[str, str]) -> list[Block]:
    rows = failed_first(report.rows)
    if not rows:
        return []
    items = [line_of(row, words) for row in rows[:FAILED_SHOWN]]
    if len(rows) > FAILED_SHOWN:
        rest = Counter(row.status for row in rows[FAILED_SHOWN:])
        items.append(words["more_rows"].format(counts=", ".join(f"{n} {status}" for status, n in rest.items())))
    blocks: list[Block] = [Heading(text=words["not_passed"]), Bullets(items=tuple(items))]
    left = unlocated_count(rows)
    blocks += [Text(text=words["unlocated"].format(count=left))] if left else []
    several = [row for row in rows[:FAILED_SHOWN] if len(row.reasons) > 1 or _first(row.reasons[0]) != row.reasons[0]]
    if several:
        reasons = tuple(f"{row.status} {row.test}: {told(reason, words)}" for row in several for reason in row.reasons)
        blocks.append(Folded(summary=words["all_reasons"], blocks=(Bullets(items=reasons),)))
    located = [row for row in report.rows if row.located][:LOCATED_SHOWN]
    return blocks + [
        Folded(summary=words["located"].format(test=row.name), blocks=tuple(_located(row.located, words)))
        for row in located
        if row.located
    ]


def _located(located: Located, words: Mapping[str, str]) -> list[Block]:
    picture = located.picture
    pictures = [Picture(text=words["depth"], path=picture)] if picture else []
    return [*found_blocks(located, words), *pictures]


def _known(report: Report, words: Mapping[str, str]) -> list[Block]:
    items = []
    for row in report.rows:
        if Mark.KNOWN in row.marks and row.known is not None:
            entry = row.known
            items.append(
                f"{row.status} {row.test}: {entry.reason} ({entry.link}), "
                f"{words['until'].format(day=entry.expires)}; {told('; '.join(row.reasons), words)}"
            )
    return [Heading(text=words["known"]), Bullets(items=tuple(items))] if items else []


# -------- the tables of a model card


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The rows of one table: those of a case, or of a test that probes many cases with one row each."""

    title: str
    rows: tuple[Row, ...]
    probes: bool


def _groups(rows: Sequence[Row]) -> list[_Group]:
    result = []
    for test, group in groupby(rows, key=lambda row: row.test.partition("[")[0]):
        of_test = list(group)
        per_case = [list(item) for _, item in groupby(of_test, key=lambda row: (row.case, row.dtype))]
        if len(per_case) >= _MANY and all(len(item) == 1 for item in per_case):
            result.append(_Group(title=test, rows=tuple(of_test), probes=True))
            continue
        cases = groupby(of_test, key=lambda row: row.case)
        result += [_Group(title=case, rows=tuple(item), probes=False) for case, item in cases]
    return result


def rows_of_models(rows: Sequence[Row]) -> list[Row]:
    """All rows but the probes of single operators."""
    return [row for group in _groups(rows) if not group.probes for row in group.rows]


def _accuracy(report: Report, words: Mapping[str, str]) -> list[Block]:
    if not report.rows:
        return []
    intro = words["accuracy_intro"].format(device=_device(report), backend=report.backend)
    blocks: list[Block] = [Heading(text=words["accuracy"]), Text(text=intro)]
    for group in _groups(report.rows):
        blocks.append(Heading(level=3, text=group.title))
        blocks += _probes(group.rows, words) if group.probes else [_card_table(group.rows, words)]
    if any(Mark.NEW in row.marks for row in report.rows):
        blocks.append(Text(text=words["marks"]))
    return blocks


def _card_table(rows: Sequence[Row], words: Mapping[str, str]) -> Table:
    """The rows of a case in the columns of a model card."""
    decided = any(row.decisions for row in rows)
    columns = [words["case"], "dtype", words["seed"], "max_diff", "mean_diff", "cos_sim", words["forecast_ratio"]]
    columns += [words["top1"]] if decided else []
    body = []
    for row in rows:
        cells = [row.case, row.dtype or NO_VALUE, NO_VALUE if row.seed is None else str(row.seed)]
        cells += [
            difference_text(row.max_diff),
            difference_text(row.mean_diff),
            cosine(row.cos_sim),
            times(row.forecast_ratio),
        ]
        cells += [share(getattr(row.decisions, "top1", None))] if decided else []
        body.append((*cells, result_of(row)))
    return Table(columns=(*columns, words["result"]), rows=tuple(body), numbers_from=2)


def _probes(rows: Sequence[Row], words: Mapping[str, str]) -> list[Block]:
    """Probes of single operators by operator and dtype, and in full those that did not pass."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row.case.partition(",")[0], row.dtype or NO_VALUE), []).append(row)
    columns = (words["probe"], "dtype", words["rows"], words["worst_ratio"], words["fewest_bits"], words["result"])
    body = []
    for (family, dtype), item in families.items():
        ratio = _extreme(max, (row.forecast_ratio for row in item))
        bits = _extreme(min, (row.effective_bits for row in item))
        result = ", ".join(f"{count} {status}" for status, count in _statuses(item).items())
        body.append((family, dtype, str(len(item)), times(ratio), number(bits, "{:.1f}"), result))
    summary = Table(columns=columns, rows=tuple(body), numbers_from=2)
    failed = [row for row in rows if row.is_bad]
    blocks: list[Block] = [_probes_table(failed, words)] if failed else []
    return [*blocks, Text(text=words["probes_intro"]), summary]


def _extreme(choose: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    wrong = [value for value in there if math.isnan(value)]
    return (wrong or [choose(there)])[0] if there else None


def _statuses(rows: Sequence[Row]) -> dict[str, int]:
    return {status.value: n for status in STATUSES if (n := sum(row.status is status for row in rows))}


def _probes_table(rows: Sequence[Row], words: Mapping[str, str]) -> Table:
    """One row a case and dtype: single operators, whose effective bits say in which arithmetic they ran."""
    columns = ["case", "dtype", "max_diff", "cos_sim", "to_golden", "cpu_to_golden", "bits", "forecast_bits"]
    columns = [words.get(column, column) for column in columns] + [words["forecast_ratio"]]
    body = []
    for row in rows:
        cells = [str(row.case), row.dtype or NO_VALUE, difference_text(row.max_diff), cosine(row.cos_sim)]
        cells += [difference_text(row.golden_rel_l2), difference_text(row.cpu_golden_rel_l2)]
        cells += [number(row.effective_bits, "{:.1f}"), number(row.forecast_bits, "{:.1f}"), times(row.forecast_ratio)]
        body.append((*cells, result_of(row)))
    return Table(columns=(*columns, words["result"]), rows=tuple(body), numbers_from=2)


def result_of(row: Row) -> str:
    """A row's status and marks with a sign before them: "✅ PASS · NEW"."""
    return " ".join([row.status.sign, row.status, *(f"· {mark}" for mark in row.marks)])


def performance_blocks(report: Report, words: Mapping[str, str]) -> list[Block]:
    """The performance table under its heading; nothing where nothing was timed."""
    if not report.performance:
        return []
    columns = ("case", "dtype", "device", "batch_size", "n", "warmup", "avg_ms", "p50_ms", "p99_ms")
    rows = tuple(tuple(_cell(getattr(row, name), name) for name in columns) for row in report.performance)
    titles = tuple(name.replace("_ms", " (ms)") for name in columns)
    heading = [Heading(text=words["performance"])] if report.rows else []
    blocks: list[Block] = [*heading, Text(text=words["performance_intro"])]
    if report.backend == "emulated":
        blocks.append(Text(text=words["performance_emulated"], strong=True))
    queues = sorted({row.task_queue for row in report.performance if row.task_queue is not None})
    if queues:
        blocks.append(Text(text=words["performance_queue"].format(modes=", ".join(map(str, queues)))))
    return [*blocks, Table(columns=titles, rows=rows, numbers_from=3)]


def _cell(value: Any, name: str) -> str:
    if value is None:
        return NO_VALUE
    return f"{value:.1f}" if name.endswith("_ms") else str(value)


# -------- what else is known


def _in_full(report: Report, words: Mapping[str, str]) -> list[Block]:
    """How the rows were measured and judged, each thing once, and the other numbers of every row."""
    groups = [group for group in _groups(report.rows) if not group.probes]
    sentences = measured_how(report.rows, words)
    blocks: list[Block] = [Folded(summary=words["how"], blocks=(Bullets(items=tuple(sentences)),))] if sentences else []
    full = tuple(block for group in groups for block in (Heading(level=3, text=group.title), _full_table(group, words)))
    return [*blocks, Folded(summary=words["in_full"], blocks=full)] if full else blocks


def _full_table(group: _Group, words: Mapping[str, str]) -> Table:
    rows = group.rows
    decided = any(row.decisions for row in rows)
    columns = ["dtype", words["seed"], "rel_l2", "token cos_sim", words["to_golden"], words["cpu_to_golden"]]
    columns += [words["golden_ratio"], words["bits"], words["forecast_bits"]]
    columns += [words["topk"], words["kl"], words["accuracy_device"], words["accuracy_cpu"]] if decided else []
    reads = any(row.decisions and row.decisions.perplexity is not None for row in rows)
    columns += [words["perplexity_device"], words["perplexity_cpu"]] if reads else []
    body = []
    for row in rows:
        cells = [row.dtype or NO_VALUE, NO_VALUE if row.seed is None else str(row.seed)]
        cells += [difference_text(row.rel_l2), cosine(row.token_cos_sim)]
        cells += [difference_text(row.golden_rel_l2), difference_text(row.cpu_golden_rel_l2), times(row.golden_ratio)]
        cells += [number(row.effective_bits, "{:.1f}"), number(row.forecast_bits, "{:.1f}")]
        if decided:
            made = row.decisions
            cells += [share(getattr(made, "topk", None)), difference_text(getattr(made, "kl", None))]
            cells += [share(getattr(made, name, None)) for name in ("accuracy", "expected_accuracy")]
        if reads:
            names = ("perplexity", "expected_perplexity")
            cells += [number(getattr(row.decisions, name, None), "{:.4g}") for name in names]
        body.append((*cells, result_of(row)))
    return Table(columns=(*columns, words["result"]), rows=tuple(body), numbers_from=1)


def measured_how(rows: Sequence[Row], words: Mapping[str, str]) -> list[str]:
    """What the rows were judged by and compared with, and what a reader must know of them; a sentence that does not
    hold for all rows names its cases.
    """
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        for sentence in _sentences(row, words):
            rows_of.setdefault(sentence, []).append(row)
    measured = [row for row in rows if row.reference or row.rel_l2 is not None]
    lines = [sentence if len(of) >= len(measured) else f"{_named(of)}: {sentence}" for sentence, of in rows_of.items()]
    stored = sum(len(row.stored or ()) for row in rows)
    if stored:
        lines.append(words["stored"].format(count=stored))
    conditioned = [row for row in rows if row.conditioning is not None]
    if conditioned:
        worst = max(conditioned, key=lambda row: row.conditioning or 0.0)
        lines.append(words["conditioning"].format(times=times(worst.conditioning), case=f"{worst.case} {worst.dtype}"))
    return lines + _weights(rows, words)


def _sentences(row: Row, words: Mapping[str, str]) -> list[str]:
    """What is said of one row, without its name."""
    sentences = []
    if row.limits or row.preset:
        kind = "limits_why" if row.limits_reason else "limits"
        sentences.append(words[kind].format(limits=_limits_text(row, words), reason=told(row.limits_reason, words)))
    sentences += [words["reference"].format(reference=told(row.reference, words))] if row.reference else []
    sentences += [words["forecast"].format(forecast=told(row.forecast, words))] if row.forecast else []
    sentences += [words["no_golden"].format(why=told(row.no_golden, words))] if row.no_golden else []
    if Mark.UNFELT in row.marks:
        modes = dict.fromkeys(mode for reference in row.references.values() for mode in reference.modes)
        sentences.append(words["unfelt"].format(modes=", ".join(modes)))
    if row.baseline and row.baseline.kind in (Mark.DRIFT, Mark.IMPROVED):
        sentences.append(told(_without_name(row.baseline.text, row), words))
    sentences += [told(item, words) for item in ((row.parted or ""), *(row.notes or ())) if item]
    if row.host:
        sentences.append(words["ran_on"].format(where=", ".join(filter(None, (row.host, row.card)))))
    if row.rerun:
        rerun = {name: difference_text(row.rerun.get(name)) for name in ("max_diff", "rel_l2")}
        sentences.append(words["rerun"].format(unequal=row.rerun.get("unequal", NO_VALUE), **rerun))
    return list(dict.fromkeys(sentences))


def _named(rows: Sequence[Row]) -> str:
    """The rows that a sentence holds for: a few by name, more by their cases, many by their number."""
    if len(rows) == 1:
        return rows[0].name
    cases = list(dict.fromkeys(f"{row.case} {row.dtype}" for row in rows))
    return ", ".join(cases) if len(cases) <= 4 else f"{', '.join(cases[:3])} … ({len(rows)})"


def _limits_text(row: Row, words: Mapping[str, str]) -> str:
    limits = [
        f"{name} ≥ {_plain(limit)}" if name in AT_LEAST else f"{name} ≤ {difference_text(limit)}"
        for name, limit in row.limits.items()
    ]
    return ", ".join(([words["preset"].format(preset=row.preset)] if row.preset else []) + limits)


def _plain(limit: float) -> str:
    return f"{limit:.9g}"


def _weights(rows: Sequence[Row], words: Mapping[str, str]) -> list[str]:
    """Which weights each case ran with, in words."""
    items = []
    known = [(row.case, row.weights, row.weights_from or "", row.weights_sha256) for row in rows if row.weights]
    for case, weights, source, content in dict.fromkeys(known):
        kind, _, path = source.partition(":")
        if kind == "none":
            continue
        kind = kind or ("seeded" if weights.startswith("seeded:") else "file")
        path = words["weights_path"].format(path=path) if path else ""
        values = {
            "case": case,
            "seed": weights.removeprefix("seeded:"),
            "sha": weights,
            "path": path,
            "content": content,
        }
        items.append(words[f"weights_{kind}"].format(**values))
    return items


def _environment(report: Report, words: Mapping[str, str]) -> list[Block]:
    table = stack_table(report, words)
    return [Folded(summary=words["environment"], blocks=(table,), left_out_last=True)]


def stack_table(report: Report, words: Mapping[str, str]) -> Table:
    """Versions and settings, one a row."""
    stack = {name: value for name, value in report.stack.items() if value not in (None, {}, []) and name != "faults"}
    rows = [(name, _value(value)) for name, value in stack.items()]
    return Table(columns=(words["component"], words["value"]), rows=(*rows, (words["created"], report.created)))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
