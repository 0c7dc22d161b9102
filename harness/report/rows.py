"""One row of a report as a value, from the verdict to the file and back.

`Row.of` makes it from a Verdict. `to_dict` is the last step before a file; `from_dict` is the one reader of rows that
were stored, in a report or in a baseline: it checks every type and bound, and fills what an older file lacks. What
happens to a row in between gives a new row.
"""

from __future__ import annotations

import datetime
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from harness.errors import HarnessError
from harness.judging.checks import checks_of
from harness.judging.criteria import AT_LEAST
from harness.judging.presets import PRESETS
from harness.judging.references import References, bits
from harness.judging.status import Mark, Status, leads_to, status_of
from harness.judging.tolerance import LIMITS
from harness.judging.verdict import CardRuns, Decisions, Evidence, SwitchCost, Verdict  # fmt: skip
from harness.measure import Comparison, Cosine, Count, Share, Size
from harness.typed_json import (
    FieldReader,
    Mismatch,
    fields_of,
    named,
    names_of,
    object_schema,
    parse_json,
    read_fields,
    reader_of,
    shown,
    to_json,
)

WEIGHTS_FROM = ("", "loaded", "partly", "built", "none")  # how `weights_from` begins: the values of reference's Origin
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}  # of |actual - expected|
UNKNOWN_CRITERION = "unrecorded"  # the criterion of a reason in a file of before criteria were kept


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a row says of one output: numbers of its Comparison, what follows from them, and quantiles."""

    shape: tuple[Count, ...] | None = None
    actual_dtype: str | None = None
    max_diff: Size | None = None
    mean_diff: Size | None = None
    cos_sim: Cosine | None = None
    cos_distance: Size | None = None
    rel_l2: Size | None = None
    rms: Size | None = None
    max_diff_rms: Size | None = None
    token_cos_sim: Cosine | None = None
    worst_index: tuple[Count, ...] | None = None
    worst_actual: float | None = None
    worst_expected: float | None = None
    worst_token: tuple[Count, ...] | None = None
    nan_actual: Count | None = None
    nan_expected: Count | None = None
    inf_actual: Count | None = None
    inf_expected: Count | None = None
    nonfinite_differ: Count | None = None
    unequal: Count | None = None
    rmse: Size | None = None
    snr: float | None = None
    shift: float | None = None
    gain: float | None = None
    balance: float | None = None
    max_rel: Size | None = None
    mean_rel: Size | None = None
    wape: Size | None = None
    max_scaled: Size | None = None
    token_rel_l2: Size | None = None
    ulp_max: Size | None = None
    ulp_mean: Size | None = None
    matched: Share | None = None
    flips: Count | None = None
    p50: Size | None = None
    p99: Size | None = None
    p999: Size | None = None


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """What the row's output lies from float64, and over what a healthy device would; the bits may be below zero."""

    golden_rel_l2: Size | None = None
    cpu_golden_rel_l2: Size | None = None
    forecast_golden_rel_l2: Size | None = None
    golden_ratio: Size | None = None
    effective_bits: float | None = None
    forecast_bits: float | None = None
    unexplained: Size | None = None
    forecast_ratio: Size | None = None  # from here on in units of the floor: `FLOORED`
    token_ratio: Size | None = None
    outlier_ratio: Size | None = None
    gain_ratio: Size | None = None
    shift_ratio: Size | None = None
    slice_ratio: Size | None = None
    unexplained_ratio: Size | None = None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the verdict rests on: the fields of `Evidence`, where something was compared."""

    weights: str | None = None
    reference: str | None = None
    inputs_sha256: str | None = None
    expected_sha256: str | None = None
    actual_sha256: str | None = None
    expected_ms: Size | None = None
    actual_ms: Size | None = None
    first_run_ms: Size | None = None
    forecast: str | None = None
    no_golden: str | None = None
    conditioning: Size | None = None
    rerun: Mapping[str, Size] | None = None
    threads: Count | None = None
    switches: tuple[SwitchCost, ...] | None = None
    parted: str | None = None
    stored: tuple[str, ...] | None = None
    card: str | None = None
    weights_sha256: str | None = None
    weights_from: str | None = None
    code_sha256: str | None = None
    cards: tuple[CardRuns, ...] | None = None
    notes: tuple[str, ...] | None = None


NUMBERS = tuple(
    item.name for item in fields(Numbers) if item.name not in ("shape", "actual_dtype", *QUANTILES)
)  # of a Comparison, in the order of the row
RATIOS = tuple(item.name for item in fields(Ratios))


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one row since its baseline."""

    kind: Mark
    text: str  # one sentence: what was found, what was accepted, what to do
    ratio: Size | None = None  # the error now over the error then; None where there is nothing to divide

    def __post_init__(self) -> None:
        if not self.kind.is_change:
            raise ValueError(f"{self.kind} says nothing of a baseline")


@dataclass(frozen=True, kw_only=True)
class Excuse:
    """The entry of the known failures that speaks of a row, as the row holds it."""

    reason: str
    link: str
    expires: datetime.date


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One operator of a located row."""

    number: Count
    operator: str
    module: str
    place: str
    dtype: str
    shape: tuple[Count, ...]
    own: Size  # relative L2 difference to the CPU with the CPU's inputs
    ratio: Size | None = None
    inherited: Size = math.nan
    reasons: tuple[str, ...] = ()
    cause: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the repro of a located row printed."""

    folder: str
    printed: str
    shows: bool
    elements: tuple[int, int]  # of the inputs, before and after they were made smaller
    command: str = ""  # what runs it; "" in reports of older versions


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a row's error comes from: sentences, and the operators with the largest own errors."""

    said: str
    first: Count | None = None  # number of the operator
    operators: Count = 0
    ranking: tuple[Ranked, ...] = ()
    repro: Shown | None = None
    picture: str | None = None  # a file beside the report


@dataclass(frozen=True, kw_only=True)
class Row(Numbers, Ratios, Proof):
    """What one test showed of one case with one seed: what ran, why it is not a PASS, the numbers of the output that
    stands for it, the digests.
    """

    test: str
    case: str
    dtype: str | None
    seed: int | None
    output: str | None = None
    marks: tuple[Mark, ...] = ()
    reasons: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()  # of the reasons, one each
    outputs: Mapping[str, Numbers] = field(default_factory=dict)  # where there are several
    comparisons: Mapping[str, Comparison] = field(
        default_factory=dict
    )  # by name of the output; with the next, `measured` in JSON
    references: Mapping[str, References] = field(default_factory=dict)
    preset: str = ""
    known: Excuse | None = None
    located: Located | None = None
    baseline: Change | None = None
    limits: Mapping[str, Size] = field(default_factory=dict)  # that the case sets itself
    allowed: Mapping[str, Size] = field(default_factory=dict)  # every limit that judged, the preset's included
    limits_reason: str = ""
    decisions: Decisions | None = None
    host: str | None = None  # that ran it, where the rows of a run are spread over several

    @classmethod
    def of(
        cls, verdict: Verdict, *, test: str, case: str, dtype: str | None, seed: int | None, known: Any = None
    ) -> Row:
        """The row of a verdict; `known` is the entry of the known failures that speaks of it."""
        result, tolerance = verdict.comparison, verdict.tolerance
        several = verdict.comparisons if len(verdict.comparisons) > 1 else {}
        numbers = {} if result is None else _numbers(result)
        evidence = (
            {}
            if verdict.evidence is None
            else {item.name: getattr(verdict.evidence, item.name) for item in fields(Evidence)}
        )
        return cls(
            test=test,
            case=case,
            dtype=dtype,
            seed=seed,
            output=verdict.output or None,
            marks=tuple(verdict.marks),
            reasons=tuple(map(str, verdict.reasons)),
            criteria=tuple(reason.criterion for reason in verdict.reasons),
            outputs={name: Numbers(**_numbers(item)) for name, item in several.items()},
            comparisons=verdict.comparisons,
            references=verdict.references,
            decisions=verdict.decisions,
            preset="" if tolerance is None else tolerance.preset,
            limits={} if tolerance is None else tolerance.limits(),
            limits_reason="" if tolerance is None else tolerance.reason,
            allowed=_allowed(verdict),
            known=None if known is None else Excuse(reason=known.reason, link=known.link, expires=known.expires),
            **numbers,
            **_ratios(verdict),
            **evidence,
        )

    @functools.cached_property
    def status(self) -> Status:
        """PASS, FAIL, REGRESSED, ERROR or SKIPPED, from the reasons."""
        return status_of([leads_to(item) for item in self.criteria], compared=self.rel_l2 is not None)

    @property
    def is_bad(self) -> bool:
        """Whether it is neither PASS nor SKIPPED nor a known failure."""
        return not self.status.is_fine and Mark.KNOWN not in self.marks

    @property
    def name(self) -> str:
        """What tells it from other rows: "mine float32 seed 42"; of a row whose case is not known, its test."""
        if self._is_of_unknown_case:
            return self.test
        parts = (self.case, self.dtype, None if self.seed is None else f"seed {self.seed}")
        return " ".join(str(part) for part in parts if part is not None)

    @property
    def key(self) -> tuple[str, str | None, int | None]:
        """Case, dtype and seed, by which rows are told apart; of a row whose case is not known, its test in place of
        the case.
        """
        return self.test if self._is_of_unknown_case else self.case, self.dtype, self.seed

    @property
    def _is_of_unknown_case(self) -> bool:
        """Whether an error came before the case was known: such a row is filed under the test's file."""
        return self.case == self.test.partition("::")[0]

    @property
    def error(self) -> float:
        """The error that is followed: relative L2 to float64, else to the CPU. NaN where the row holds no numbers."""
        result = self.rel_l2 if self.golden_rel_l2 is None else self.golden_rel_l2
        return math.nan if result is None else result

    def because(self, criterion: str, text: str, *, first: bool = False) -> Row:
        """The same row with one more reason, `first` or after the others."""
        if first:
            return replace(self, reasons=(text, *self.reasons), criteria=(criterion, *self.criteria))
        return replace(self, reasons=(*self.reasons, text), criteria=(*self.criteria, criterion))

    # -------- to and from JSON

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it: flat, JSON-able, every number at full precision."""
        values = {
            name: to_json(getattr(self, name)) for name in names_of(Row) if name not in ("comparisons", "references")
        }
        values |= {
            "status": self.status.value,
            "measured": {name: self._measured(name) for name in self.comparisons},
            "decisions": self._decided(),
        }
        return {name: values[name] for name in _ORDER}

    def _measured(self, output: str) -> dict[str, Any]:
        """Everything that was measured of one output, so that it can be judged again."""
        stored, references = {"comparison": _whole(self.comparisons[output])}, self.references.get(output)
        if references is None:
            return stored
        stored |= {name: _whole(each) for name in SIDES if (each := getattr(references, name)) is not None}
        beside = {name: getattr(references, name) for name in names_of(References) if name not in SIDES}
        rest: dict[str, Any] = to_json({name: item for name, item in beside.items() if name not in LATER or item})
        return stored | rest

    def _decided(self) -> dict[str, Any] | None:
        made = self.decisions
        if made is None:
            return None
        shares = {"top1": made.top1, "accuracy": made.accuracy, "expected_accuracy": made.expected_accuracy}
        decided: dict[str, Any] = to_json(asdict(made) | shares)
        return decided

    @classmethod
    def from_dict(cls, stored: Any, where: str = "", *, measured: Callable[[], str] | None = None) -> Row:
        """The row that a file holds; `where` names the file and the row's place in it. `measured`: gives the JSON text
        of that value, where it is to be read when `comparisons` or `references` are first used.

        Raises: HarnessError, in one sentence, for a value of another type or outside its bounds, a status or a mark
        that is not known, or a status that the reasons do not lead to; of that text at its first use.
        """
        test = stored.get("test") if isinstance(stored, dict) else None
        later = None if measured is None else _Unread(measured, where=where, test=test)
        try:
            row = cls.from_json(stored, later)
            if Mark.KNOWN in row.marks and (row.known is None or row.status.is_fine):
                raise Mismatch(f"the mark {Mark.KNOWN}", "a row that fails, with its entry in `known`,").within("marks")
            return row
        except Mismatch as error:
            raise _refused(where, test, error) from None

    @classmethod
    def from_json(cls, stored: Any, later: _Unread | None = None) -> Row:
        """As `from_dict`. Raises: Mismatch."""
        result = READ_ROW(stored)
        status = result.pop("status")
        measured = result.pop("measured", {})
        comparisons = _part_of(measured, "comparison") if later is None else _UnreadPart(later, "comparison")
        references = _part_of(measured, "references") if later is None else _UnreadPart(later, "references")
        result |= _reasons(result, status)
        row = cls(**result, comparisons=comparisons, references=references)
        origin = (row.weights_from or "").partition(":")[0]
        if origin not in WEIGHTS_FROM:
            known = ", ".join(filter(None, WEIGHTS_FROM))
            expected = f"one of {known}, and a path after a colon or none,"
            raise Mismatch(repr(shown(origin)), expected).within("weights_from")
        if row.status is not status:
            raise Mismatch(status.value, f"{row.status}, to which its reasons and numbers lead,").within("status")
        return row

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of a row."""
        return object_schema(_KINDS | {"status": Status, "measured": Mapping[str, Measured]}, NEEDED)


def by_key(rows: Iterable[Row], where: str = "") -> dict[tuple[str, str | None, int | None], Row]:
    """The rows by `Row.key`.

    Raises: HarnessError, naming both tests, where two rows have one: the second would hide the first.
    """
    result: dict[tuple[str, str | None, int | None], Row] = {}
    for item in rows:
        first = result.setdefault(item.key, item)
        if first is not item:
            raise HarnessError(f"{where}{twice(first, item)}")
    return result


def without_twins(rows: Iterable[Row]) -> dict[int, Row]:
    """What becomes of rows that share a name with another row, by the id of the row: an ERROR that names both tests."""
    groups: dict[tuple[str, str | None, int | None], list[Row]] = {}
    for item in rows:
        groups.setdefault(item.key, []).append(item)
    result = {}
    for several in groups.values():
        for item, other in zip(several, [*several[1:], several[0]] if len(several) > 1 else ()):
            result[id(item)] = _not_known(item).because("run", twice(item, other))
    return result


def without_repeats(rows: Iterable[Row]) -> dict[int, Row]:
    """What becomes of rows that measured what a row of another seed did, by the id of the row: an ERROR.

    Their case has the same inputs and the same output on the CPU with both seeds: `inputs` does not draw from its
    generator. Where the model itself draws, the outputs differ.
    """
    first: dict[tuple[str, str | None, str, str], Row] = {}
    result = {}
    for item in rows:
        if item.inputs_sha256 is None or item.expected_sha256 is None:
            continue
        other = first.setdefault((item.case, item.dtype, item.inputs_sha256, item.expected_sha256), item)
        if other.seed != item.seed:
            text = (
                f"it has the same inputs as {_seed_text(other.seed)}, so it measures nothing new: inputs() "
                "does not draw from its "
                "generator; let it, or run the case with one seed"
            )
            result[id(item)] = _not_known(item).because("run", text)
    return result


def _not_known(row: Row) -> Row:
    """The row without the mark of a known failure, which excuses no error."""
    return replace(row, marks=tuple(mark for mark in row.marks if mark is not Mark.KNOWN))


def _seed_text(seed: int | None) -> str:
    return "the row without a seed" if seed is None else f"seed {seed}"


def twice(first: Row, second: Row) -> str:
    """One sentence on two rows of one name."""
    tests = f"{shown(first.test, 200)} and {shown(second.test, 200)}"
    if first.test == second.test:
        tests = f"{shown(first.test, 200)}, which measures it twice"
    return (
        f"two rows are called {shown(first.name, 200)}, of {tests}; "
        "one would hide the other: give the cases names of their own, or each row a seed of its own"
    )


def row(*, test: str, case: str, dtype: str | None, seed: int | None, verdict: Verdict, known: Any = None) -> Row:
    """The row of one test: what ran, its verdict, the numbers of the output that stands for it, the digests."""
    return Row.of(verdict, test=test, case=case, dtype=dtype, seed=seed, known=known)


def _numbers(result: Comparison) -> dict[str, Any]:
    """What a Comparison measured, as the row holds it."""
    named = {name: getattr(result, name) for name in NUMBERS} | {
        name: result.quantile(share) for name, share in QUANTILES.items()
    }
    return {"shape": result.shape, "actual_dtype": result.dtype, **named}


def _ratios(verdict: Verdict) -> dict[str, Any]:
    """The row's output against float64: the device, the CPU and the forecast, the device over the CPU, and over the
    floor.
    """
    references = verdict.references.get(verdict.output)
    if references is None:
        return {}
    return {
        "golden_rel_l2": references.golden.rel_l2,
        "cpu_golden_rel_l2": references.cpu.rel_l2,
        "forecast_golden_rel_l2": references.forecast.rel_l2 if references.forecast is not None else None,
        "golden_ratio": references.golden.rel_l2 / references.cpu.rel_l2 if references.cpu.rel_l2 else None,
        "effective_bits": bits(references.golden.rel_l2),
        "forecast_bits": bits(references.floor("rel_l2")),
        "unexplained": references.unexplained,
        **references.ratios(),
    }


def _allowed(verdict: Verdict) -> dict[str, float]:
    """Every limit that was judged by, its preset's included: the loosest of all outputs. What hangs on the numbers of
    the run is left out.
    """
    result: dict[str, float] = {}
    for check in checks_of(verdict):
        if check.name != "flip_margin":
            loosest = min if check.name in AT_LEAST else max
            result[check.name] = loosest(check.limit, result.get(check.name, check.limit))
    return result


# -------- stored rows

HISTOGRAM = re.compile("(-?[0-9]{1,9}:[0-9]{1,18}( |$))*")  # bins and how many elements are in each
SIDES = ("golden", "cpu", "forecast")  # the Comparisons that References hold
LATER = ("slices", "scatter")  # which rows of older versions lack, and rows that have none
_ORDER = (  # of the names of a row in JSON
    "test",
    "case",
    "dtype",
    "seed",
    "output",
    "status",
    "marks",
    "reasons",
    "criteria",
    *(item.name for item in fields(Numbers)),
    "outputs",
    *RATIOS,
    "measured",
    "preset",
    "known",
    "located",
    "baseline",
    "limits",
    "allowed",
    "limits_reason",
    "decisions",
    *(item.name for item in fields(Evidence)),
    "host",
)
NEEDED = {
    "test",
    "case",
    "dtype",
    "seed",
    "status",
    "marks",
    "reasons",
}  # of a row in every version; baselines say how theirs are filled


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a row holds of one output: the device against the CPU, and where float64 was measured, against that."""

    comparison: Comparison
    references: References | None = None

    @classmethod
    def from_json(cls, stored: Any) -> Measured:
        read = read_fields(
            stored, [("comparison", _comparison), *((name, _comparison) for name in SIDES), *_BESIDE], {"comparison"}
        )
        comparison = read.pop("comparison")
        if "golden" not in read:
            return cls(comparison=comparison)
        if "cpu" not in read:
            raise Mismatch("nothing", "a value").within("cpu")
        return cls(comparison=comparison, references=References(**read))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        kinds = {name: kind for name, kind in fields_of(References).items() if name not in SIDES}
        whole = object_schema(fields_of(Comparison), WHOLE)
        whole["properties"]["histogram"] = {"type": "string", "pattern": f"^{HISTOGRAM.pattern}$"}
        schema = object_schema(kinds, ("comparison",))
        schema["properties"] |= dict.fromkeys(("comparison", *SIDES), whole)
        return schema


def _whole(result: Comparison) -> dict[str, Any]:
    values = {name: to_json(getattr(result, name)) for name in names_of(Comparison) if name != "histogram"}
    values = {name: value for name, value in values.items() if name not in WHERE_KNOWN or value}
    return values | {"histogram": " ".join(f"{number}:{count}" for number, count in result.histogram)}


# What a Comparison must hold to be read: shapes, dtypes and counts. A number that an older version did not measure
# reads as NaN, so that it fails whatever is judged by it; a place reads as None.
WHOLE = {item.name for item in fields(Comparison) if item.default is MISSING or type(item.default) is int}
WHERE_KNOWN = ("unsettled",)  # is written where it is not zero, and zero where it is absent
_NOT_MEASURED = {
    item.name: math.nan for item in fields(Comparison) if type(item.default) is float and item.name not in WHERE_KNOWN
}


def _comparison(stored: Any) -> Comparison:
    return Comparison(**_NOT_MEASURED | _READ_WHOLE(stored))


def _histogram(text: Any) -> tuple[tuple[int, int], ...]:
    if type(text) is not str or not HISTOGRAM.fullmatch(text):
        raise Mismatch(named(text), "pairs such as '12:3 13:1'")
    numbers = list(map(int, text.replace(":", " ").split()))
    return tuple(zip(numbers[::2], numbers[1::2]))


def _limits(value: Any) -> dict[str, float]:
    result: dict[str, float] = reader_of(Mapping[str, Size])(value)
    unknown = [name for name in result if name not in LIMITS]
    if unknown:
        raise Mismatch(named(unknown[0]), f"one of {', '.join(LIMITS)} (a newer version may have written it)")
    return result


def _preset(value: Any) -> str:
    preset: str = reader_of(str)(value)
    if preset not in ("", *PRESETS):
        raise Mismatch(named(value), f"one of {', '.join(PRESETS)} (a newer version may have written it)")
    return preset


def _change(value: Any) -> Change | None:
    try:
        change: Change | None = reader_of(Change | None)(value)
    except Mismatch:
        raise
    except ValueError as error:
        raise Mismatch(str(error), "what became of the row since its baseline").within("kind") from None
    return change


def _decisions(value: Any) -> Decisions | None:
    """Decisions, also of a version that kept the shares of right ones in place of their counts."""
    if value is None:
        return None
    result: Decisions = reader_of(Decisions)(value)

    def counted(name: str, share_name: str, read: int | None) -> int | None:
        share: float | None = None if name in value else reader_of(Share | None)(value.get(share_name))
        return read if share is None or not math.isfinite(share) else round(share * result.count)

    return replace(
        result,
        correct_actual=counted("correct_actual", "accuracy", result.correct_actual),
        correct_expected=counted("correct_expected", "expected_accuracy", result.correct_expected),
    )


_MEASURED = reader_of(Mapping[str, Measured])
_KINDS = {name: kind for name, kind in fields_of(Row).items() if name not in ("comparisons", "references")}
_OWN = {
    "limits": _limits,
    "preset": _preset,
    "decisions": _decisions,
    "baseline": _change,
    "measured": _MEASURED,
}
READ_ROW = FieldReader(
    (
        (name, _OWN.get(name) or reader_of(kind))
        for name, kind in (_KINDS | {"status": Status, "measured": None}).items()
    ),
    NEEDED,
)
_READ_WHOLE = FieldReader(
    ((name, _histogram if name == "histogram" else reader_of(kind)) for name, kind in fields_of(Comparison).items()),
    WHOLE,
)
_BESIDE = [(name, reader_of(kind)) for name, kind in fields_of(References).items() if name not in SIDES]


def _reasons(result: Mapping[str, Any], status: Status) -> dict[str, tuple[str, ...]]:
    """The reasons and their criteria, also of a file that kept no criteria, or as a baseline neither."""
    reasons, criteria = result.get("reasons", ()), result.get("criteria")
    if criteria is None:
        leading = {
            Status.ERROR: "run",
            Status.SKIPPED: "skip",
            Status.REGRESSED: "baseline",
            Status.FAIL: UNKNOWN_CRITERION,
        }.get(status)
        reasons = reasons or (("its reason was not recorded",) if leading else ())
        return {"reasons": reasons, "criteria": () if leading is None else (leading,) * len(reasons)}
    if len(reasons) != len(criteria):
        raise Mismatch(f"{len(criteria)} criteria", f"one for each of {len(reasons)} reasons").within("criteria")
    return {"reasons": reasons, "criteria": criteria}


def _refused(where: str, test: Any, error: Exception) -> HarnessError:
    """That a stored row cannot be read, in one sentence; `test` names it, where it is a name."""
    called = f" ({named(test)})" if isinstance(test, str) and test else ""
    return HarnessError(f"{where or 'a row'}{called}: {error}; write the file again with `pytest -k precision`")


def _part_of(measured: Mapping[str, Measured], part: str) -> dict[str, Any]:
    """The comparisons or the references of the outputs that have them, by name."""
    there = {name: getattr(item, part) for name, item in measured.items()}
    return {name: item for name, item in there.items() if item is not None}


class _Unread:
    """The JSON text of what was measured of a row's outputs, which is read when it is first used."""

    def __init__(self, text: Callable[[], str], *, where: str, test: Any):
        self.text, self._where, self._test = text, where, test

    @functools.cached_property
    def outputs(self) -> Mapping[str, Measured]:
        """By name of the output. Raises: HarnessError."""
        try:
            measured: Mapping[str, Measured] = _MEASURED(parse_json(self.text()))
        except Mismatch as error:
            raise _refused(self._where, self._test, error.within("measured")) from None
        except ValueError as error:
            raise _refused(self._where, self._test, error) from None
        return measured


class _UnreadPart(Mapping[str, Any]):
    """The comparisons or the references of the outputs, by name."""

    def __init__(self, unread: _Unread, part: str):
        self._unread, self._part = unread, part

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        return _part_of(self._unread.outputs, self._part)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _UnreadPart) and self._part == other._part and self._unread.text() == other._unread.text():
            return True
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]


jsonable = to_json
