"""A report as blocks of text and tables, in English or Chinese."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from harness.judging.criteria import AT_LEAST
from harness.judging.status import Mark, Status
from harness.report.document import Block, Bullets, Heading, Picture, Table, Text
from harness.report.format import MISSING, cosine, counts, difference, number, share, times
from harness.report.located import found_blocks
from harness.report.rows import Located, Row
from harness.report.words import EN, ZH

if TYPE_CHECKING:
    from harness.report.content import Report


LANGUAGES = {"en": EN, "zh": ZH}


def document(report: Report, lang: str = "en") -> list[Block]:
    """The whole report in one language: headline, stack, accuracy, reasons, performance, conclusion."""
    words = LANGUAGES[lang]
    return [
        *_headline(report, words),
        *_environment(report, words),
        *_accuracy(report, words),
        *_not_passed(report, words),
        *_known(report, words),
        *_performance(report, words),
        *_conclusion(report, words),
    ]


def _device(report: Report) -> str:
    return report.stack.get("device") or MISSING


def _headline(report: Report, words: Mapping[str, str]) -> list[Block]:
    if report.performance and not report.rows:
        title = Heading(level=1, text=words["performance"])
    else:
        title = Heading(level=1, text=words["title"].format(counts=counts(report.headline) or words["none"]))
    if report.backend != "emulated":
        return [title]
    said = [words["emulated"].format(device=_device(report))]
    if report.stack.get("faults"):
        said.append(words["faults"].format(faults="; ".join(report.stack["faults"])))
    return [*(Text(text=each, strong=True) for each in said), title]


def _environment(report: Report, words: Mapping[str, str]) -> list[Block]:
    stack = {name: value for name, value in report.stack.items() if value not in (None, {}, []) and name != "faults"}
    rows = [(name, _value(value)) for name, value in stack.items()]
    table = Table(columns=(words["component"], words["value"]), rows=(*rows, (words["created"], report.created)))
    return [Heading(text=words["environment"]), table]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _accuracy(report: Report, words: Mapping[str, str]) -> list[Block]:
    if not report.rows:
        return []
    blocks: list[Block] = [
        Heading(text=words["accuracy"]),
        Text(text=words["accuracy_intro"].format(device=_device(report), backend=report.backend)),
    ]
    for title, rows in _tables(report.rows):
        blocks += [Heading(level=3, text=title), _accuracy_table(rows, words)]
        blocks += _limits(rows, words)
    blocks += _weights(report.rows, words)
    if any(Mark.NEW in row.marks for row in report.rows):
        blocks.append(Text(text=words["marks"]))
    return blocks


MANY = 8  # cases of one row each, from which a test's cases share a table


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows in tables, each with its title: one for a case in a dtype, or one for a test that has many cases of one
    row.
    """
    found = []
    for test, group in groupby(rows, key=lambda row: row.test.partition("[")[0]):
        cases = [
            (f"{case}, {dtype}" if dtype else str(case), list(each))
            for (case, dtype), each in groupby(group, key=lambda row: (row.case, row.dtype))
        ]
        if len(cases) >= MANY and all(len(each) == 1 for _, each in cases):
            cases = [(test, [row for _, each in cases for row in each])]
        found += cases
    return found


def _accuracy_table(rows: Sequence[Row], words: Mapping[str, str]) -> Table:
    """One row a seed, in the columns of a model card and a few more."""
    if len({(row.case, row.dtype) for row in rows}) > 1:
        return _cases_table(rows, words)
    decided = any(row.decisions for row in rows)
    columns = [words["seed"], "max_diff", "mean_diff", "cos_sim", "rel_l2", "token cos_sim"]
    columns += [words["to_golden"], words["cpu_to_golden"], words["golden_ratio"], words["forecast_ratio"]]
    columns += [words["top1"], words["topk"], words["accuracy_device"], words["accuracy_cpu"]] if decided else []
    body = []
    for row in rows:
        cells = [MISSING if row.seed is None else str(row.seed)]
        cells += [difference(row.max_diff), difference(row.mean_diff), cosine(row.cos_sim)]
        cells += [difference(row.rel_l2), cosine(row.token_cos_sim)]
        cells += [difference(row.golden_rel_l2), difference(row.cpu_golden_rel_l2)]
        cells += [times(row.golden_ratio), times(row.forecast_ratio)]
        if decided:
            cells += [
                share(getattr(row.decisions, name, None)) for name in ("top1", "topk", "accuracy", "expected_accuracy")
            ]
        body.append((*cells, _result(row)))
    return Table(columns=(*columns, words["result"]), rows=tuple(body), numbers_from=0)


def _cases_table(rows: Sequence[Row], words: Mapping[str, str]) -> Table:
    """One row a case and dtype: single operators, whose effective bits say in which arithmetic they ran."""
    columns = (
        words["case"],
        "dtype",
        "max_diff",
        "cos_sim",
        words["to_golden"],
        words["cpu_to_golden"],
        words["bits"],
        words["forecast_bits"],
        words["forecast_ratio"],
    )
    body = []
    for row in rows:
        cells = [str(row.case), row.dtype or MISSING, difference(row.max_diff), cosine(row.cos_sim)]
        cells += [difference(row.golden_rel_l2), difference(row.cpu_golden_rel_l2)]
        cells += [number(row.effective_bits, "{:.1f}"), number(row.forecast_bits, "{:.1f}"), times(row.forecast_ratio)]
        body.append((*cells, _result(row)))
    return Table(columns=(*columns, words["result"]), rows=tuple(body), numbers_from=2)


def _result(row: Row) -> str:
    return " ".join([row.status.sign, row.status, *(f"· {mark}" for mark in row.marks)])


def _limits(rows: Sequence[Row], words: Mapping[str, str]) -> list[Block]:
    """What the rows of a table were judged by and held against, each thing once."""
    said = []
    for limits, reason in dict.fromkeys(
        (_limits_text(row, words), row.limits_reason) for row in rows if row.limits or row.preset
    ):
        said.append(words["limits_why" if reason else "limits"].format(limits=limits, reason=reason))
    said += [
        words["reference"].format(reference=each) for each in sorted({row.reference for row in rows if row.reference})
    ]
    said += [words["forecast"].format(forecast=each) for each in sorted({row.forecast for row in rows if row.forecast})]
    said += [words["no_golden"].format(why=each) for each in sorted({row.no_golden for row in rows if row.no_golden})]
    if any(row.stored for row in rows):
        said.append(words["stored"].format(count=sum(len(row.stored or ()) for row in rows)))
    conditioned = [row.conditioning for row in rows if row.conditioning is not None]
    if conditioned:
        said.append(words["conditioning"].format(times=times(max(conditioned))))
    unfelt = [
        mode for row in rows if Mark.UNFELT in row.marks for each in row.references.values() for mode in each.modes
    ]
    said += [words["unfelt"].format(modes=", ".join(dict.fromkeys(unfelt)))] if unfelt else []
    said += [row.baseline.text for row in rows if row.baseline and row.baseline.kind in (Mark.DRIFT, Mark.IMPROVED)]
    said += [f"seed {MISSING if row.seed is None else row.seed}: {row.parted}" for row in rows if row.parted]
    notes = dict.fromkeys(note for row in rows for note in row.notes or ())
    for note in notes:
        seeds = [MISSING if row.seed is None else str(row.seed) for row in rows if note in (row.notes or ())]
        said.append(note if len(seeds) == len(rows) else f"seed {', '.join(seeds)}: {note}")
    for row in rows:
        if row.rerun:
            rerun = {name: difference(row.rerun.get(name)) for name in ("max_diff", "rel_l2")}
            unequal = row.rerun.get("unequal", MISSING)
            said.append(words["rerun"].format(seed=MISSING if row.seed is None else row.seed, unequal=unequal, **rerun))
    return [Text(text=each) for each in said]


def _limits_text(row: Row, words: Mapping[str, str]) -> str:
    limits = [
        f"{name} ≥ {_plain(limit)}" if name in AT_LEAST else f"{name} ≤ {difference(limit)}"
        for name, limit in row.limits.items()
    ]
    return ", ".join(([words["preset"].format(preset=row.preset)] if row.preset else []) + limits)


def _weights(rows: Sequence[Row], words: Mapping[str, str]) -> list[Block]:
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
    return [Bullets(items=tuple(items))] if items else []


def _not_passed(report: Report, words: Mapping[str, str]) -> list[Block]:
    items = []
    for row in report.rows:
        if row.status is not Status.PASS and Mark.KNOWN not in row.marks:
            items += [f"{row.status} {row.test}: {reason}" for reason in row.reasons]
    blocks: list[Block] = [Heading(text=words["not_passed"]), Bullets(items=tuple(items))] if items else []
    for row in report.rows:
        if row.located:
            blocks += _located(row.test, row.located, words)
    return blocks


def _located(test: str, located: Located, words: Mapping[str, str]) -> list[Block]:
    picture = located.picture
    pictures = [Picture(text=words["depth"], path=picture)] if picture else []
    return [Heading(level=3, text=words["located"].format(test=test)), *found_blocks(located), *pictures]


def _known(report: Report, words: Mapping[str, str]) -> list[Block]:
    items = []
    for row in report.rows:
        if Mark.KNOWN in row.marks and row.known is not None:
            entry = row.known
            items.append(
                f"{row.status} {row.test}: {entry.reason} ({entry.link}), "
                f"{words['until'].format(day=entry.expires)}; {'; '.join(row.reasons)}"
            )
    return [Heading(text=words["known"]), Bullets(items=tuple(items))] if items else []


def _performance(report: Report, words: Mapping[str, str]) -> list[Block]:
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


def _conclusion(report: Report, words: Mapping[str, str]) -> list[Block]:
    rows = report.rows
    if report.performance and not rows:
        return []
    bad = [row for row in rows if row.is_bad]
    known = sum(Mark.KNOWN in row.marks for row in rows)
    measured = [
        row for row in rows if row.rel_l2 is not None and math.isfinite(row.rel_l2) and Mark.KNOWN not in row.marks
    ]
    if bad:
        text = words["some_fail"].format(bad=len(bad), total=len(rows), device=_device(report))
    elif measured:
        text = words["all_pass"].format(
            total=len(measured),
            device=_device(report),
            rel_l2=difference(max(row.rel_l2 for row in measured if row.rel_l2 is not None)),
            cos_sim=cosine(min((row.cos_sim for row in measured if row.cos_sim is not None), default=None)),
        )
    else:
        text = words["nothing"]
    text += " " + words["known_too"].format(count=known) if known else ""
    blocks: list[Block] = [Heading(text=words["conclusion"]), Text(text=text)]
    return blocks + ([Text(text=words["emulated_again"])] if report.backend == "emulated" else [])


def _cell(value: Any, name: str) -> str:
    if value is None:
        return MISSING
    return f"{value:.1f}" if name.endswith("_ms") else str(value)


def _plain(limit: float) -> str:
    return f"{limit:.9g}"
