"""Two stored reports, before and after: what became of every row, and what else changed. python -m harness gate OLD.json NEW.json"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness import baseline
from harness.errors import HarnessError
from harness.gate import Mark
from harness.report import Report, Row
from harness.typed_json import shown

BROKEN, FIXED, MISSING = "NEW FAILURE", "FIXED", "MISSING"
STILL = "STILL FAILING"
BAD = (BROKEN, baseline.REGRESSED, baseline.INCOMPARABLE, MISSING)  # what fails the gate
ORDER = (*BAD, STILL, Mark.KNOWN, baseline.DRIFT, baseline.IMPROVED, FIXED, baseline.NEW, baseline.IDENTICAL)
TABLES = ("environment", "packages")  # what of a stack is a table of its own
UNRECORDED = "not recorded"
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
    "faults": "faults that were planted on purpose",
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


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One row, before and after."""

    kind: str
    case: str
    dtype: str | None
    seed: int | None
    before: str | None  # its status; None where it is on one side only
    after: str | None
    error_before: float | None  # relative L2 to float64, else to the CPU
    error_after: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """Every transition, the gravest first, and the difference of the two stacks: name, before, after."""

    transitions: tuple[Transition, ...]
    stack: tuple[tuple[str, Any, Any], ...]

    @property
    def effects(self) -> tuple[str, ...]:
        """What of the stack's difference changes numbers by itself, and how, in words."""
        return tuple(f"{name}: {EFFECTS[name]}" for name, _, _ in self.stack if name in EFFECTS)

    @property
    def passed(self) -> bool:
        """Nothing became worse, went missing or cannot be compared, and something was compared."""
        kinds = {each.kind for each in self.transitions}
        return bool(kinds - {baseline.NEW, STILL, Mark.KNOWN}) and not kinds & set(BAD)

    def counts(self) -> dict[str, int]:
        found = {kind: sum(each.kind == kind for each in self.transitions) for kind in ORDER}
        return {kind: count for kind, count in found.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"schema": "precision-upgrade/1", "passed": self.passed, "counts": self.counts(), "stack": [list(each) for each in self.stack], "transitions": [asdict(each) for each in self.transitions]}


def compare_reports(before: Report, after: Report) -> Upgrade:
    """Hold the rows of `after` against those of `before`, by case, dtype and seed, as against a baseline.

    Raises: HarnessError where they were measured on other devices, an emulated one and a card say.
    """
    keys = [baseline.key_of(each.stack, each.backend) for each in (before, after)]
    if keys[0] != keys[1]:
        raise HarnessError(f"the reports come from {shown(keys[0])} and {shown(keys[1])}; an upgrade is judged on one kind of device")
    old, new = _by_name(before.rows), _by_name(after.rows)
    found = []
    for group in dict.fromkeys(name[:2] for name in (*old, *new)):
        found += _group({name: row for name, row in old.items() if name[:2] == group}, {name: row for name, row in new.items() if name[:2] == group})
    found.sort(key=lambda each: ORDER.index(each.kind))
    return Upgrade(transitions=tuple(found), stack=_changed(before.stack, after.stack))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """What the two stacks differ in: name, before, after. Variables and packages are named one by one.

    Older reports lack what later versions record. Where the other report has a value, the value before or after is `UNRECORDED`.
    """
    old, new = _flat(before), _flat(after)
    lacking = [{name for name in TABLES if name not in each} for each in (before, after)]
    found = []
    for name in dict.fromkeys((*old, *new)):
        pair = [_recorded(each, name, lacks) for each, lacks in ((old, lacking[0]), (new, lacking[1]))]
        known = [each for each in pair if each not in (UNRECORDED, None, (), [], "")]
        if pair[0] != pair[1] and (UNRECORDED not in pair or known):
            found.append((name, *pair))
    return tuple(found)


def _recorded(stack: Mapping[str, Any], name: str, lacking: set[str]) -> Any:
    if name in stack:
        return stack[name]
    table = name.partition(".")[0]
    return None if table in TABLES and table not in lacking else UNRECORDED


def _flat(stack: Mapping[str, Any]) -> dict[str, Any]:
    """A stack with the entries of its tables beside the rest: "environment.HCCL_DETERMINISTIC"."""
    found: dict[str, Any] = {}
    for name, value in stack.items():
        if name in TABLES:
            found |= {f"{name}.{each}": item for each, item in (value or {}).items()}
        else:
            found[name] = value
    return found


def _by_name(rows: Sequence[Row]) -> dict[tuple, Row]:
    return {(row.case, row.dtype, row.seed): row for row in rows}


def _group(old: dict[tuple, Row], new: dict[tuple, Row]) -> list[Transition]:
    """The transitions of one case in one dtype: those of all its seeds are judged together."""
    numbers = [row for row in new.values() if row.rel_l2 is not None]
    entry = baseline.Entry(rows={baseline.seed_of(row): row for row in old.values() if row.rel_l2 is not None})
    changes = {id(row): change for row, change in zip(numbers, baseline.verdicts(numbers, entry))}
    return [_transition(old.get(name), new.get(name), changes.get(id(new.get(name)))) for name in dict.fromkeys((*old, *new))]


def _transition(old: Row | None, new: Row | None, change: baseline.Change | None) -> Transition:
    row = new or old
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


def _kind(old, new, change) -> tuple[str, str]:
    if new is None:
        return MISSING, "it ran before and is not there now; run it, or take it out on purpose"
    if old is None:
        return baseline.NEW, f"it is new, {new.status}"
    was, now = old.status.is_fine, new.status.is_fine
    why = "; ".join(new.reasons)
    if not now:
        if new.status == "REGRESSED" and was:
            return baseline.REGRESSED, why
        if not was and change is not None and change.kind == baseline.REGRESSED:
            return change.kind, f"{old.status} before, and worse now: {change.text}"
        if Mark.KNOWN in new.marks:
            return Mark.KNOWN, f"{new.known.reason} ({new.known.link}), until {new.known.expires}"
        return (BROKEN, why) if was else (STILL, f"{old.status} before: {why}")
    if not was:
        return FIXED, f"{old.status} before: {'; '.join(old.reasons)}"
    if change is None:
        return (baseline.IDENTICAL, "no numbers on either side") if _error(old) is None else (MISSING, "its numbers are gone: it was skipped")
    return change.kind, change.text


def _error(row: Row | None) -> float | None:
    found = None if row is None else baseline.error_of(row)
    return None if found is None or found != found else found
