"""Two stored reports, before and after: what became of every row, and what else changed. python -m harness gate
OLD.json NEW.json
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from harness.errors import HarnessError
from harness.judging.status import Mark, Status
from harness.judging.tolerance import NUMERIC
from harness.report import Report, Row, device_key
from harness.report.rows import UNKNOWN_CRITERION, Change, by_key
from harness.typed_json import shown
from harness.upgrade import baseline


class TransitionKind(str, Enum):
    """What became of a row, the gravest first; the order is that of a report."""

    BROKEN = "NEW FAILURE"  # it fails and did not, or fails in a way in which it did not
    REGRESSED = "REGRESSED"  # its numbers are worse
    INCOMPARABLE = "NOT COMPARABLE"  # other weights or inputs, no digests, or numbers that contradict the digests
    MISSING = "MISSING"  # it was measured before and is not now
    STILL = "STILL FAILING"  # as before
    KNOWN = "KNOWN FAILURE"  # by a reviewed entry
    DRIFT = "DRIFT"  # other bits, no worse than chance would make it
    IMPROVED = "IMPROVED"  # its numbers are better
    FIXED = "FIXED"  # it failed and passes
    NEW = "NEW"  # it passes and was not there
    IDENTICAL = "IDENTICAL"  # every bit
    SKIPPED = "SKIPPED"  # not run on either side

    def __str__(self) -> str:
        return self.value

    @property
    def is_bad(self) -> bool:
        """Whether it fails the gate."""
        return self in (
            TransitionKind.BROKEN,
            TransitionKind.REGRESSED,
            TransitionKind.INCOMPARABLE,
            TransitionKind.MISSING,
        )

    @property
    def is_compared(self) -> bool:
        """Whether its numbers were compared with those of before."""
        return self in (
            TransitionKind.REGRESSED,
            TransitionKind.DRIFT,
            TransitionKind.IMPROVED,
            TransitionKind.FIXED,
            TransitionKind.IDENTICAL,
        )


BROKEN, MISSING, STILL, FIXED = (
    TransitionKind.BROKEN,
    TransitionKind.MISSING,
    TransitionKind.STILL,
    TransitionKind.FIXED,
)
ORDER = tuple(TransitionKind)
BAD = tuple(item for item in TransitionKind if item.is_bad)
TABLES = ("environment", "packages")  # what of a stack is a table of its own
_NOT_RECORDED = "not recorded"
EFFECTS = {  # names of a stack whose value changes numbers by itself, and what they change
    "conv_allow_hf32": "float32 operands of convolutions are rounded to HF32 or not",
    "matmul_allow_hf32": "float32 operands of products are rounded to HF32 or not",
    "conv_allow_tf32": "float32 operands of convolutions are rounded to TF32 or not",
    "matmul_allow_tf32": "float32 operands of products are rounded to TF32 or not",
    "cube_math_type": "what float32 products are computed in; it overrides matmul_allow_hf32",
    "precision_mode": "whether float32 products and convolutions run in float16",
    "inf_nan_mode": "half overflows to Inf, or saturates",
    "float32_matmul_precision": "what torch may compute float32 products in",
    "deterministic": "the order of sums",
    "deterministic_level": "the order of sums",
    "compatible_impl": "kernels that follow torch's formula, GELU's among them",
    "jit_compile": "which kernels run, compiled for the shape or ready made",
    "compile_cache": "which compiled kernels are taken from before",
    "cpu_capability": "the order of the CPU's sums",
    "threads": "the order of the CPU's sums",
    "card": "another piece of hardware",
    "faults": "the device was broken on purpose",
    "environment.PER_STREAM_QUEUE": "the order in which streams run",
    "environment.INF_NAN_MODE_ENABLE": "half overflows to Inf, or saturates",
    "environment.INF_NAN_MODE_FORCE_DISABLE": "half overflows to Inf, or saturates",
    "environment.TORCH_NPU_USE_COMPATIBLE_IMPL": "kernels that follow torch's formula, GELU's among them",
    "environment.TORCH_NPU_LEGACY_IMPL_LIST": "random numbers of the 950",
    "environment.HCCL_DETERMINISTIC": "the order of sums between cards",
    "environment.LCCL_DETERMINISTIC": "the order of sums between cards",
    "environment.CLOSE_MATMUL_K_SHIFT": "the order of sums in products",
    "environment.ATB_MATMUL_SHUFFLE_K_ENABLE": "the order of sums in products of ATB",
    "environment.ATB_LLM_LCOC_ENABLE": "whether products and communication are one kernel",
    "environment.DNNL_DEFAULT_FPMATH_MODE": "oneDNN may multiply float32 in bfloat16: the CPU's reference",
    "environment.ONEDNN_DEFAULT_FPMATH_MODE": "oneDNN may multiply float32 in bfloat16: the CPU's reference",
    "environment.ATEN_CPU_CAPABILITY": "the order of the CPU's sums",
    "environment.MKL_ENABLE_INSTRUCTIONS": "the order of the CPU's sums",
    "environment.MKL_CBWR": "the order of the CPU's sums",
    "environment.DNNL_MAX_CPU_ISA": "the order of the CPU's sums",
    "environment.ONEDNN_MAX_CPU_ISA": "the order of the CPU's sums",
    "environment.NVIDIA_TF32_OVERRIDE": "float32 operands are rounded to TF32 or not",
    "environment.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "float32 operands of products are rounded to TF32 or not",
    "environment.CUBLAS_WORKSPACE_CONFIG": "the order of sums in products",
}


Rows = dict[tuple[str, str | None, int | None], Row]  # by `Row.key`


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One row, before and after."""

    kind: TransitionKind
    case: str
    dtype: str | None
    seed: int | None
    before: Status | None  # None where it is on one side only
    after: Status | None
    error_before: float | None  # relative L2 to float64, else to the CPU
    error_after: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """Every transition, the gravest first, the difference of the two stacks (name, before, after), and what else fails
    or must be said.
    """

    transitions: tuple[Transition, ...]
    stack: tuple[tuple[str, Any, Any], ...]
    complaints: tuple[str, ...] = ()  # what fails the gate besides the rows
    remarks: tuple[str, ...] = ()  # what must be said and fails nothing
    left_out: int | None = None  # rows of before that a subset leaves out; None where all rows were to be there

    @property
    def effects(self) -> tuple[str, ...]:
        """What of the stack's difference changes numbers by itself, and how, in words."""
        return tuple(f"{name}: {EFFECTS[name]}" for name, _, _ in self.stack if name in EFFECTS)

    @property
    def passed(self) -> bool:
        """Nothing became worse, went missing or cannot be compared, and something was compared."""
        kinds = {transition.kind for transition in self.transitions}
        return (
            any(item.is_compared for item in kinds) and not any(item.is_bad for item in kinds) and not self.complaints
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of the whole: what fails besides the rows, that a subset was compared, that nothing was."""
        result = [*self.complaints, *self.remarks]
        if self.left_out is not None:
            rows = f"{self.left_out} rows of the older report did not run and were left out"
            result.append(
                "a subset was compared, as --subset asks: "
                f"{rows if self.left_out else 'it holds every row of the older report'}"
            )
        if not any(transition.kind.is_compared for transition in self.transitions):
            result.append("no row was compared with numbers of before: nothing shows that they are right")
        return tuple(result)

    def counts(self) -> dict[str, int]:
        result = {kind.value: sum(transition.kind is kind for transition in self.transitions) for kind in ORDER}
        return {kind: count for kind, count in result.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        transitions = [asdict(transition) | {"kind": transition.kind.value} for transition in self.transitions]
        head = {
            "schema": "precision-upgrade/1",
            "passed": self.passed,
            "counts": self.counts(),
            "notes": list(self.notes),
        }
        return head | {"stack": [list(item) for item in self.stack], "transitions": transitions}


def compare_reports(before: Report, after: Report, *, subset: bool = False) -> Upgrade:
    """Hold the rows of `after` against those of `before`, by case, dtype and seed, as against a baseline.

    Rows of `before` that did not run are MISSING; with `subset` they are left out, and counted.

    Raises: HarnessError where the reports were measured on other devices, such as an emulated one and an NPU, or where
    two rows of a report have one name.
    """
    keys = [device_key(item.stack, item.backend) for item in (before, after)]
    if keys[0] != keys[1]:
        raise HarnessError(
            f"the reports come from {shown(keys[0])} and {shown(keys[1])}; an upgrade is judged on one kind of device"
        )
    old, new = by_key(before.rows, "the older report: "), by_key(after.rows, "the newer report: ")
    left_out = len(old.keys() - new.keys()) if subset else None
    old = {name: row for name, row in old.items() if name in new or not subset}
    groups: dict[tuple[str, str | None], tuple[Rows, Rows]] = {}
    for side, rows in enumerate((old, new)):
        for name, row in rows.items():
            groups.setdefault(name[:2], ({}, {}))[side][name] = row
    result, complaints = [], [*_planted("older", before), *_planted("newer", after)]
    for rows_before, rows_after in groups.values():
        result += _group(rows_before, rows_after)
        complaints += _loosened(rows_before, rows_after)
    result.sort(key=lambda value: ORDER.index(value.kind))
    return Upgrade(
        transitions=tuple(result),
        stack=_changed(_with_cards(before), _with_cards(after)),
        complaints=tuple(complaints),
        remarks=_times(before, after),
        left_out=left_out,
    )


def _with_cards(report: Report) -> dict[str, Any]:
    """The stack with the cards of all rows in place of the one that its last row ran on: workers have a card each."""
    cards = sorted({row.card for row in report.rows if row.card})
    return dict(report.stack) | ({"card": ", ".join(cards)} if cards else {})


def _times(before: Report, after: Report) -> tuple[str, ...]:
    """That a report was compared with itself, or the older with the newer, in words."""
    if before == after:
        return ("both reports are the same run: that its numbers agree says nothing of another stack",)
    if after.created < before.created:  # both in UTC, as ISO 8601
        return (
            (
                f"the newer report, of {shown(after.created)}, was made before the older one, of "
                f"{shown(before.created)}: give the older first"
            ),
        )
    return ()


def _planted(which: str, report: Report) -> list[str]:
    """That a report is of a device that was broken on purpose, in words."""
    faults = "; ".join(shown(item) for item in report.stack.get("faults") or ())
    return (
        [
            (
                f"the {which} report was measured on a device with planted faults ({faults}), so it says nothing "
                "of a sound one"
            )
        ]
        if faults
        else []
    )


def _loosened(old: Rows, new: Rows) -> list[str]:
    """The limits of a case that are looser than before, in words."""
    loose = baseline.loosened(_entry(old), new.values())
    if not loose:
        return []
    row = next(iter(new.values()))
    return [
        (
            f"{shown(row.case)} {row.dtype} is judged more loosely than before: {', '.join(loose)}; judge both by "
            "the same limits"
        )
    ]


def _entry(rows: Rows) -> baseline.Entry:
    """Rows that brought numbers as what was accepted."""
    return baseline.Entry(rows={baseline.seed_of(row): row for row in rows.values() if row.rel_l2 is not None})


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """What the two stacks differ in: name, before, after. Variables and packages are named one by one.

    Older reports lack what later versions record. Where the other report has a value, the value before or after is
    `_NOT_RECORDED`.
    """
    old, new = _flat(before), _flat(after)
    lacking = [{name for name in TABLES if name not in item} for item in (before, after)]
    result = []
    for name in dict.fromkeys((*old, *new)):
        pair = [_recorded(item, name, lacks) for item, lacks in ((old, lacking[0]), (new, lacking[1]))]
        known = [item for item in pair if item not in (_NOT_RECORDED, None, (), [], "")]
        if pair[0] != pair[1] and (_NOT_RECORDED not in pair or known):
            result.append((name, *pair))
    return tuple(result)


def _recorded(stack: Mapping[str, Any], name: str, lacking: set[str]) -> Any:
    if name in stack:
        return stack[name]
    table = name.partition(".")[0]
    return None if table in TABLES and table not in lacking else _NOT_RECORDED


def _flat(stack: Mapping[str, Any]) -> dict[str, Any]:
    """A stack with the entries of its tables beside the rest: "environment.HCCL_DETERMINISTIC"."""
    result: dict[str, Any] = {}
    for name, value in stack.items():
        if name in TABLES:
            result |= {f"{name}.{element}": item for element, item in (value or {}).items()}
        else:
            result[name] = value
    return result


def _group(old: Rows, new: Rows) -> list[Transition]:
    """The transitions of one case in one dtype: those of all its seeds are judged together."""
    numbers = [row for row in new.values() if row.rel_l2 is not None]
    changes = {id(row): change for row, change in zip(numbers, baseline.verdicts(numbers, _entry(old)))}
    return [
        _transition(old.get(name), new.get(name), changes.get(id(new.get(name))))
        for name in dict.fromkeys((*old, *new))
    ]


def _transition(old: Row | None, new: Row | None, change: Change | None) -> Transition:
    row = new or old
    assert row is not None, "a transition is of a row"
    kind, text = _kind(old, new, change)
    return Transition(
        kind=kind,
        text=text,
        case=row.case,
        dtype=row.dtype,
        seed=row.seed,
        before=None if old is None else old.status,
        after=None if new is None else new.status,
        error_before=_error(old),
        error_after=_error(new),
    )


def _kind(old: Row | None, new: Row | None, change: Change | None) -> tuple[TransitionKind, str]:
    """What became of a row, and one sentence on it. `change` is that of its numbers, where it has some now."""
    if new is None:
        return (
            TransitionKind.MISSING,
            "it ran before and is not there now; run it, take it out on purpose, or compare a subset with --subset",
        )
    if old is None:
        return _kind_of_new(new)
    if new.status is Status.SKIPPED:
        if old.status is Status.SKIPPED:
            return TransitionKind.SKIPPED, f"it was skipped on both sides: {_why(new)}"
        return TransitionKind.MISSING, f"{old.status} before, and its numbers are gone: it was skipped ({_why(new)})"
    if not new.status.is_fine:
        return _kind_of_failing(old, new, change)
    assert change is not None, "a row that passes has numbers"
    if not old.status.is_fine and change.kind is not Mark.REGRESSED and not _is_another(old, new):
        return TransitionKind.FIXED, f"{old.status} before: {_why(old)}"
    if old.status is Status.SKIPPED:
        return TransitionKind.NEW, f"{new.status}, and it was skipped before"
    return TransitionKind(change.kind.value), change.text


def _kind_of_new(new: Row) -> tuple[TransitionKind, str]:
    """Of a row that was not there."""
    if new.status.is_fine:
        return TransitionKind.NEW, f"it is new, {new.status}"
    if Mark.KNOWN in new.marks:
        return TransitionKind.KNOWN, f"it is new; {_known(new)}"
    return TransitionKind.BROKEN, f"it is new, and {new.status}: {_why(new)}"


def _kind_of_failing(old: Row, new: Row, change: Change | None) -> tuple[TransitionKind, str]:
    """Of a row that fails now and was there before."""
    if old.status.is_fine:
        if Mark.KNOWN in new.marks:
            return TransitionKind.KNOWN, _known(new)
        return (TransitionKind.REGRESSED if new.status is Status.REGRESSED else TransitionKind.BROKEN), _why(new)
    worse = _worse(old, new)
    if worse:
        return TransitionKind.BROKEN, f"{old.status} before, and {worse}: {_why(new)}"
    if change is not None and _is_another(old, new):
        return TransitionKind.INCOMPARABLE, f"{old.status} before and now, of something else: {change.text}"
    if change is not None and change.kind is Mark.REGRESSED:
        return TransitionKind.REGRESSED, f"{old.status} before, and worse now: {change.text}"
    if Mark.KNOWN in new.marks:
        return TransitionKind.KNOWN, _known(new)
    return TransitionKind.STILL, f"{old.status} before: {_why(new)}"


def _worse(old: Row, new: Row) -> str:
    """In words, in what way a row fails now in which it did not before; "" where there is none."""
    if new.status is Status.ERROR:
        return "" if old.status is Status.ERROR else "now it cannot be compared"
    if old.status is Status.ERROR:
        return ""
    if _error(old) is not None and _error(new) is None:
        return "now its error is not finite"
    if UNKNOWN_CRITERION in old.criteria:
        return ""  # of an older version, which kept no criteria
    before, now = ({_way(item) for item in row.criteria} - {"baseline", "known"} for row in (old, new))
    others = sorted(now - before)
    return f"now it fails by {', '.join(others)} too" if others else ""


def _is_another(old: Row, new: Row) -> bool:
    """Whether two rows that brought numbers ran other weights or inputs."""
    return None not in (old.rel_l2, new.rel_l2) and not baseline.same_subject(old, new)


def _way(criterion: str) -> str:
    """The way to fail that a criterion is: all limits of numbers are one."""
    return "a limit" if criterion in NUMERIC else criterion


def _known(row: Row) -> str:
    assert row.known is not None, "the mark comes with the entry"
    return f"{row.known.reason} ({row.known.link}), until {row.known.expires}"


def _why(row: Row) -> str:
    return "; ".join(row.reasons)


def _error(row: Row | None) -> float | None:
    result = None if row is None else baseline.error_of(row)
    return result if result is not None and math.isfinite(result) else None
