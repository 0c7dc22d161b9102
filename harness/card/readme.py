"""README.md from what a model card holds: the words of a language, the filters of the templates, the front matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.card.facts import required
from harness.card.percent import is_one_number
from harness.card.rendering import rendered, template_of
from harness.errors import HarnessError
from harness.judging.status import Status
from harness.languages import words_of
from harness.report import Row
from harness.report.document import escaped
from harness.report.format import NO_VALUE, cosine, difference_text, share, times
from harness.report.printable import visible
from harness.report.switches import switch_table
from harness.report.text import result_of
from harness.report.words import LANGUAGES, told
from harness.run.notes import BATCH_INVARIANCE
from harness.run.switches import PRICED_FROM

TAGS = ("NPU", "Ascend", "ascend-npu")
_ENVIRONMENT = (  # of the stack, in this order, under the names that cards use
    ("NPU", "device"), ("card", "card"), ("CANN", "cann"), ("driver", "driver"), ("firmware", "firmware"),
    ("torch", "torch"), ("torch_npu", "torch_npu"), ("Python", "python"), ("numpy", "numpy"), ("OS", "platform"),
    ("CPU", "cpu"), ("threads", "threads"), ("harness", "harness"),
)  # fmt: skip
FORECAST_ALLOWED = "forecast_ratio"  # of a row's limits


def readme(card: Mapping[str, Any], rows: Sequence[Row], lang: str, style: str) -> str:
    """The README of a card as results/card.json holds it and of its rows, which results/precision.json holds.

    Raises: HarnessError for an unknown language or template.
    """
    languages = words_of("card")
    if lang not in languages:
        raise HarnessError(f"no card is written in {lang!r}; there are {', '.join(languages)}")
    words = languages[lang]
    name, folder = template_of(style)
    values = dict(
        card={**card, "accuracy": {**card["accuracy"], "rows": [row.to_dict() for row in rows]}},
        w=words,
        front_matter=front_matter(card, rows, lang),
        warning=_warning(card, words),
        environment=_environment(card),
        groups=_groups(card, rows, words),
        conclusion=_conclusion(rows, words),
        bad=[row for row in rows if row.is_bad],
        reasons=[
            f"{row.status} {row.name}: {told(reason, _report(lang))}"
            for row in rows
            if row.status is not Status.PASS
            for reason in row.reasons
        ],
        shown=lambda fact: shown_fact(fact, words),
        size=_size,
        ms=lambda value: NO_VALUE if value is None else f"{value:.1f}",
        number=lambda value: NO_VALUE if value is None else f"{value:.6g}",
        percent=_percent,
        told=lambda text: told(text, _report(lang)),
        unit=words[_unit(card)],
        cell=escaped,
        limit=_percent(card["accuracy"]["limit"]),
        random_weights=any(
            (row.weights or "").startswith("seeded:") and (row.weights_from or "") in ("", "partly") for row in rows
        ),
        limits=[told(item, _report(lang)) for item in card["limits"]],
        files=[(file, words.get(f"file_{file}", "")) for file in card["files"]],
        switches=[f"{key}={value}" for key, value in card["notes"]["switches"].items()],
    )
    return rendered(name, values, folder)


def _report(lang: str) -> Mapping[str, str]:
    return LANGUAGES[lang]


def shown_fact(fact: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """A fact's value as text, or why there is none: never a blank."""
    if fact["why"]:
        return words["unknown"].format(why=words[fact["why"]])
    value = fact["value"]
    return escaped(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def front_matter(card: Mapping[str, Any], rows: Sequence[Row], lang: str) -> str:
    """The metadata of a model hub, as YAML between two lines of dashes."""
    yaml = required("yaml")
    known = {
        name: card[name]["value"] for name in ("task", "licence", "base_model", "languages") if not card[name]["why"]
    }
    fields: dict[str, Any] = {"library_name": card["library"]}
    fields |= {"pipeline_tag": known["task"]} if "task" in known else {}
    fields |= {"license": known["licence"]} if "licence" in known else {}
    fields |= {"base_model": known["base_model"]} if "base_model" in known else {}
    fields |= {"language": known["languages"]} if "languages" in known else {}
    fields["hardware"] = "NPU"
    fields["tags"] = [*TAGS, *(["emulated"] if card["emulated"] else [])]
    measured = [row for row in rows if row.rel_l2 is not None]
    if measured:
        worst = max(measured, key=lambda row: row.rel_l2 or 0.0)
        passed = sum(row.status is Status.PASS for row in rows)
        fields["model-index"] = [
            {
                "name": card["name"],
                "results": [
                    {
                        "task": {"type": known.get("task", "other")},
                        "dataset": {"name": "seeded inputs", "type": "seeded"},
                        "metrics": [
                            {"type": "rel_l2", "name": "relative L2 to the CPU, worst row", "value": worst.rel_l2},
                            {"type": "rows_passed", "value": f"{passed}/{len(rows)}"},
                        ],
                    }
                ],
            }
        ]
    text: str = yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)
    return f"---\n{text}---"


def _warning(card: Mapping[str, Any], words: Mapping[str, str]) -> str:
    if card["emulated"]:
        return words["emulated"].format(device=card["device"])
    return words["cpu"] if card["backend"] == "cpu" else ""


def _environment(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    stack = card["environment"]
    rows = [(title, str(stack[name])) for title, name in _ENVIRONMENT if name in stack]
    packages = [(name, str(version)) for name, version in (stack.get("packages") or {}).items()]
    variables = [(name, str(value)) for name, value in (stack.get("environment") or {}).items()]
    return [(title, visible(value)) for title, value in [*rows, *packages, *variables]]


def _groups(card: Mapping[str, Any], rows: Sequence[Row], words: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of each case and dtype: their table, the floor, every meaning of one percent, the switches."""
    keys = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    meanings = {(item["case"], item["dtype"]): item["meanings"] for item in card["accuracy"]["percent"]}
    result = []
    for case, dtype in keys:
        own = [row for row in rows if (row.case, row.dtype) == (case, dtype)]
        table = switch_table(own, _report(words["lang"]), named=False)
        result.append(
            dict(
                title=_title(case, dtype, card["accuracy"]["parts"].get(case, ""), words),
                measured=_outputs(own, words) + _decided(card, own, words) + _invariance(own, words),
                lines=[_line(row, words) for row in own],
                floor=_floor(card, own, words),
                meanings=meanings.get((case, dtype), []),
                switches=None if table is None else (table.columns, [tuple(map(escaped, line)) for line in table.rows]),
                switch_intro=_switch_intro(card, own, words),
                no_switches="" if table is not None else _no_switches(own, words),
            )
        )
    return result


def _title(case: str, dtype: str | None, part: str, words: Mapping[str, str]) -> str:
    """What the rows of a case and dtype are of; a part that is not all of the checkpoint is explained."""
    title = words["case_dtype"].format(case=escaped(case), dtype=dtype)
    explained = words.get(f"part_{part}")
    return title if explained is None else words["case_part"].format(title=title, part=explained)


def _outputs(rows: Sequence[Row], words: Mapping[str, str]) -> list[str]:
    """Whose numbers stand for the rows, where there are several outputs."""
    several = [row for row in rows if len(row.outputs) > 1]
    if not several:
        return []
    names = ", ".join(dict.fromkeys(row.output or "" for row in several))
    return [words["of_outputs"].format(count=max(len(row.outputs) for row in several), names=names)]


def _decided(card: Mapping[str, Any], rows: Sequence[Row], words: Mapping[str, str]) -> list[str]:
    """What the decisions and the perplexity of the worst row come to; nothing where there are none."""
    made = [row.decisions for row in rows if row.decisions is not None and row.decisions.count]
    result = []
    if made:
        worst = max(made, key=lambda item: (1 - item.top1, item.kl or 0.0))
        numbers = dict(top1=share(worst.top1), topk=share(worst.topk), kl=difference_text(worst.kl))
        result.append(words["decided"].format(k=worst.k, **numbers))
    reads = [item for item in made if item.perplexity is not None and item.expected_perplexity is not None]
    if reads:
        worst = max(reads, key=lambda item: abs(item.perplexity - item.expected_perplexity))
        numbers = dict(actual=f"{worst.perplexity:.6g}", expected=f"{worst.expected_perplexity:.6g}")
        result.append(words["perplexity"].format(device=card["device"], **numbers))
    return result


def _invariance(rows: Sequence[Row], words: Mapping[str, str]) -> list[str]:
    """What the rows say of one sample alone and in its batch."""
    notes = [note for row in rows for note in row.notes or () if note.startswith(BATCH_INVARIANCE)]
    return [told(note, _report(words["lang"])) for note in dict.fromkeys(notes)]


def _switch_intro(card: Mapping[str, Any], rows: Sequence[Row], words: Mapping[str, str]) -> str:
    """What the table of switches is of: the one row of a case and dtype that prices them."""
    seed = next((row.seed for row in rows if row.switches), None)
    return words["switch_intro"].format(seed=NO_VALUE if seed is None else seed, device=card["device"])


def _no_switches(rows: Sequence[Row], words: Mapping[str, str]) -> str:
    """Why there is no table of switches; "" where the numbers do not tell."""
    if any(row.switches for row in rows):
        return words["nothing_felt"]
    errors = [
        (row.forecast_golden_rel_l2, row.cpu_golden_rel_l2)
        for row in rows
        if row.forecast_golden_rel_l2 is not None and row.cpu_golden_rel_l2 is not None
    ]
    cheap = bool(errors) and all(forecast <= PRICED_FROM * cpu for forecast, cpu in errors)
    return words["nothing_priced"] if cheap else ""


def _line(row: Row, words: Mapping[str, str]) -> tuple[str, ...]:
    similar = words["one_number"] if is_one_number(row) else cosine(row.cos_sim)
    seed = NO_VALUE if row.seed is None else str(row.seed)
    return seed, difference_text(row.max_diff), difference_text(row.mean_diff), similar, result_of(row)


def _floor(card: Mapping[str, Any], rows: list[Row], words: Mapping[str, str]) -> str:
    measured = [row for row in rows if row.golden_rel_l2 is not None]
    if not measured:
        return ""
    worst = max(measured, key=lambda row: row.golden_rel_l2 or 0.0)
    limit = worst.allowed.get(FORECAST_ALLOWED)
    return words["floor"].format(
        device=card["device"],
        golden=difference_text(worst.golden_rel_l2),
        cpu=difference_text(worst.cpu_golden_rel_l2),
        forecast=difference_text(worst.forecast_golden_rel_l2),
        ratio=times(worst.forecast_ratio),
        allowed=times(limit),
    )


def _conclusion(rows: Sequence[Row], words: Mapping[str, str]) -> str:
    """What the rows come to: a row that was not compared did not pass."""
    passed = sum(row.status is Status.PASS for row in rows)
    if passed == len(rows) > 0:
        return words["all_pass"].format(count=passed)
    skipped = sum(row.status is Status.SKIPPED for row in rows)
    text = words["some_pass"].format(passed=passed, count=len(rows))
    return text + (words["skipped"].format(count=skipped) if skipped else "")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _percent(share: float | str | None) -> str:
    if share is None or isinstance(share, str):
        return NO_VALUE if share is None else share
    value = share * 100
    return f"{value:,.0f} %" if value >= 1000 else f"{value:.3g} %"


def _unit(card: Mapping[str, Any]) -> str:
    takes = card["takes"]
    return next((f"unit_{name}" for name in ("image", "text", "audio") if takes[name]), "unit")
