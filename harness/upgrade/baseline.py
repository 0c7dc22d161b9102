"""Accepted numbers per case, and whether a run is identical to them, changed but fine, worse, better, or not
comparable. Pure: rows in, rows out.

A baseline file holds one case in one dtype, and in it an entry for each device and backend, so that emulated numbers
never meet an NPU's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.judging.criteria import AT_LEAST
from harness.judging.references import MANY, ROUNDOFF, slack
from harness.judging.status import CHANGES, Mark, Status
from harness.report import device_key, safe_of, stem_of, write_text
from harness.report.rows import Change, Row
from harness.typed_json import Mismatch, named, object_schema, read_fields, read_json, reader_of, shown, to_json

_SCHEMA = "precision-baseline/1"
_KINDS = CHANGES
IDENTICAL, DRIFT, REGRESSED, IMPROVED, NEW, INCOMPARABLE = CHANGES

_EFFECT = 1.03  # a change of the error below this factor is drift, however many seeds share it
_ALONE = 1.5  # the factor from which a change counts by itself
_SUMS = 2.0  # both, where the error is that of float32 sums: cut into four parts or not, a sum's rounding differs by √4
_SEEDS = 3  # that the paired test needs
NOISE = 3.0  # times the difference of a row's reruns within which its error scatters
_PARTS = 4.0  # the factor from which the error of the worst token, or of another output, counts by itself
SAME = 1e-6  # relative: numbers that were computed from the same bits agree to this on every host
STUDENT = {  # one-sided 1 % points of Student's t by degrees of freedom (Fisher and Yates, Statistical Tables, III)
    2: 6.965,
    3: 4.541,
    4: 3.747,
    5: 3.365,
    6: 3.143,
    7: 2.998,
    8: 2.896,
    9: 2.821,
    10: 2.764,
    12: 2.681,
    15: 2.602,
    20: 2.528,
    30: 2.457,
    10**9: 2.326,
}

STORED_FIELDS = (  # of a row
    "seed",
    "status",
    "marks",
    "criteria",
    "preset",
    "limits",
    "allowed",
    "weights",
    "weights_sha256",
    "inputs_sha256",
    "expected_sha256",
    "actual_sha256",
    "max_diff",
    "mean_diff",
    "cos_sim",
    "rel_l2",
    "golden_rel_l2",
    "cpu_golden_rel_l2",
    "forecast_golden_rel_l2",
    "forecast_ratio",
    "token_ratio",
    "outlier_ratio",
    "gain_ratio",
    "shift_ratio",
    "decisions",
    "rerun",
    "output",
    "outputs",
    "shape",
    "rms",
    "token_rel_l2",
    "parted",
    "card",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was accepted of one case in one dtype on one device: rows by the name that `seed_of` gives them."""

    rows: Mapping[str, Row]
    accepted: str = ""  # the day
    stack: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it: of each row what is compared."""
        rows = {name: row.to_dict() for name, row in self.rows.items()}
        return {
            "accepted": self.accepted,
            "stack": to_json(self.stack),
            "rows": {name: {item: row[item] for item in STORED_FIELDS} for name, row in rows.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A file: one case in one dtype, with an entry for each device, by `key_of`."""

    case: str
    dtype: str | None
    entries: Mapping[str, Entry]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "schema": _SCHEMA,
            "case": self.case,
            "dtype": self.dtype,
            "entries": {name: entry.to_dict() for name, entry in sorted(self.entries.items())},
        }


def path_of(folder: Path, case: str, dtype: str | None) -> Path:
    """The file of a case in a dtype: its name, and a digest of it where a file's name cannot be just that.

    >>> [path_of(Path("b"), name, "float32").name for name in ("a_b", "a b", "a/b")]
    ['a_b-float32.json', 'a_b-float32-b859db68.json', 'a_b-float32-85453266.json']
    """
    return folder / f"{stem_of(f'{case}-{dtype}')}.json"


def read_baseline(folder: Path, case: str, dtype: str | None) -> Baseline | None:
    """The baseline of a case in a dtype; None where there is none. Files with the names of older versions are read
    where they are of that case.

    Raises: HarnessError as `load`, or where the file of that name is another case's.
    """
    path = path_of(folder, case, dtype)
    stored = load_baseline(path)
    if stored is None:
        older = folder / f"{safe_of(f'{case}-{dtype}')}.json"
        result = load_baseline(older) if older != path and len(older.name.encode()) <= 255 else None
        return result if result is not None and (result.case, result.dtype) == (case, dtype) else None
    if (stored.case, stored.dtype) != (case, dtype):
        raise HarnessError(
            f"baseline {path} holds {shown(stored.case)} {stored.dtype} where {shown(case)} {dtype} was expected; "
            "restore it from version control, or accept again with --precision-baseline=accept"
        )
    return stored


def write_baseline(folder: Path, baseline: Baseline) -> Path:
    """Write a baseline whole or not at all. A file of an older version that holds the same case goes; one of another
    case takes its own name.

    Raises: HarnessError where the folder cannot be written.
    """
    path, older = (
        path_of(folder, baseline.case, baseline.dtype),
        folder / f"{safe_of(f'{baseline.case}-{baseline.dtype}')}.json",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, path, baseline)
        write_text(path, json.dumps(baseline.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if older != path and len(older.name.encode()) <= 255 and _is_of(older, baseline):
            older.unlink()
    except OSError as error:
        raise HarnessError(
            f"baselines cannot be written to {folder} ({error.strerror}); name a folder that can be, with "
            "--precision-baselines"
        ) from None
    return path


def _make_room(folder: Path, path: Path, baseline: Baseline) -> None:
    """Give a file of another case, which an older version kept under this name, the name that is its own."""
    try:
        there = load_baseline(path)
    except HarnessError:
        return  # damaged: it is written anew
    if there is not None and (there.case, there.dtype) != (baseline.case, baseline.dtype):
        own = path_of(folder, there.case, there.dtype)
        if own != path and not own.exists():
            path.rename(own)


def _is_of(path: Path, baseline: Baseline) -> bool:
    try:
        there = load_baseline(path)
    except HarnessError:
        return False
    return there is not None and (there.case, there.dtype) == (baseline.case, baseline.dtype)


def without_a_case(
    folder: Path, cases: Collection[tuple[str, str | None]], device: str, *, whole: bool = True
) -> list[str]:
    """The accepted cases of a device that are not among `cases`, in words.

    Of a `whole` run they were renamed or deleted, and each file has a line; of a part of the tests they are counted. A
    file that cannot be read has a line in any run.
    """
    damaged, gone = [], []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            stored = load_baseline(path)
        except HarnessError as error:
            damaged.append(str(error))
            continue
        if stored is None or (stored.case, stored.dtype) in cases or device not in stored.entries:
            continue
        rows = len(stored.entries[device].rows)
        gone.append(
            f"no case of this run is called {shown(stored.case)} {stored.dtype}, of which {rows} rows are "
            "accepted: it was renamed or deleted; "
            f"give the case its name again, or accept the new one and delete {path}"
        )
    if whole or not gone:
        return [*damaged, *gone]
    return [*damaged, f"{len(gone)} accepted case{'' if len(gone) == 1 else 's'} had no row in this part of the tests"]


def load_baseline(path: Path) -> Baseline | None:
    """A stored baseline; None where there is none.

    Raises: HarnessError, in one sentence, when the file is damaged, of another schema, or holds a value that cannot be.
    """
    advice = "restore it from version control, or accept again with --precision-baseline=accept"
    try:
        stored = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HarnessError(f"baseline {path} cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise HarnessError(f"baseline {path} is damaged ({error}); {advice}") from None
    schema = stored.get("schema") if isinstance(stored, dict) else None
    if schema != _SCHEMA:
        raise HarnessError(
            f"baseline {path} has schema {schema if schema is None else named(schema)} where {_SCHEMA!r} was "
            "expected; use the version that wrote it, or accept again with --precision-baseline=accept"
        )
    if not isinstance(stored.get("entries"), dict):
        raise HarnessError(f"baseline {path} lacks its entries; {advice}")
    try:
        return _baseline(stored)
    except Mismatch as error:
        raise HarnessError(f"baseline {path}: {error}; {advice}") from None


def _baseline(stored: Mapping[str, Any]) -> Baseline:
    """Raises: Mismatch."""
    head = read_fields(stored, [("case", reader_of(str)), ("dtype", reader_of(str | None))], {"case", "dtype"})
    entries = {}
    for name, item in stored["entries"].items():
        try:
            entries[name] = _entry(item, **head)
        except Mismatch as error:
            raise error.within(name).within("entries") from None
    return Baseline(**head, entries=entries)


def _entry(stored: Any, *, case: str, dtype: str | None) -> Entry:
    """An entry with its rows, filled with what the file says once for all of them. Raises: Mismatch."""
    texts, table = reader_of(str), reader_of(Mapping[str, Any])
    read = read_fields(stored, [("accepted", texts), ("stack", table), ("rows", table)], {"rows"})
    faults = reader_of(tuple[str, ...] | None)(read.get("stack", {}).get("faults"))
    if faults:
        raise Mismatch(f"planted faults ({shown('; '.join(faults))})", "a sound device").within("stack")
    if not read["rows"]:
        raise Mismatch("nothing", "an accepted row").within("rows")
    rows = {}
    for name, item in read["rows"].items():
        try:
            row = {"seed": None, "marks": [], "reasons": []} | reader_of(Mapping[str, Any])(item)
            rows[name] = Row.from_json(row | {"test": "", "case": case, "dtype": dtype} | _reasons_of(row))
            if seed_of(rows[name]) != name:
                raise Mismatch(f"seed {seed_of(rows[name])}", f"the seed {name} that it is kept under")
        except Mismatch as error:
            raise error.within(name).within("rows") from None
    return Entry(**read | {"rows": rows})


def _reasons_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reasons of an accepted row, of which its criteria alone are kept."""
    criteria = row.get("criteria")
    return {"reasons": ["accepted so"] * len(criteria)} if isinstance(criteria, list) else {}


def baseline_schema() -> dict[str, Any]:
    """The JSON schema of a baseline."""
    row = Row.json_schema()
    row_schema = {
        "type": "object",
        "properties": {name: row["properties"][name] for name in STORED_FIELDS},
        "required": ["status"],
    }
    entry = object_schema({"accepted": str, "stack": Mapping[str, Any]}, ["rows"])
    entry["properties"]["rows"] = {"type": "object", "additionalProperties": row_schema}
    schema = object_schema({"case": str, "dtype": str | None}, ["schema", "case", "dtype", "entries"])
    schema["properties"] |= {"schema": {"const": _SCHEMA}, "entries": {"type": "object", "additionalProperties": entry}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": _SCHEMA} | schema


def accepted(
    stored: Baseline | None,
    rows: Iterable[Row],
    *,
    stack: Mapping[str, Any],
    backend: str | None,
    when: str,
    kept: Mapping[str, Row] | None = None,
) -> Baseline:
    """The file with the entry of this device replaced: the rows of one case in one dtype. `kept`: rows that were
    accepted before and stay, by their names in the entry.
    """
    rows = list(rows)
    entries = {} if stored is None else dict(stored.entries)
    named = {**(kept or {}), **{seed_of(row): row for row in rows}}
    before = entries.get(device_key(stack, backend))
    order = [*([] if before is None else before.rows), *named]  # as the file has it, so that its diff is short
    ordered = {name: named[name] for name in order if name in named}
    entries[device_key(stack, backend)] = Entry(accepted=when, stack=dict(stack), rows=ordered)
    return Baseline(case=rows[0].case, dtype=rows[0].dtype, entries=entries)


def stack_name(stack: Mapping[str, Any], backend: str | None) -> str:
    """A folder's name that says where something was measured: "ascend910b4-emulated_torch_npu-2.13.0_cann-9.1.0"."""
    device = str(stack.get("device")).lower() + ("" if backend in ("npu", None) else f"-{backend}")
    cann = str(stack.get("cann") or "").removesuffix("(emulated)").strip()
    parts = [
        device,
        *(f"{name}-{value}" for name, value in (("torch_npu", stack.get("torch_npu")), ("cann", cann)) if value),
    ]
    if not stack.get("torch_npu"):
        parts.append(f"torch-{stack.get('torch')}")
    return "".join(item if item.isalnum() or item in "-_." else "_" for item in "_".join(parts))


def entry_of(stored: Baseline | None, stack: Mapping[str, Any], backend: str | None) -> Entry | None:
    """What was accepted on a device, of a file; None where there is nothing."""
    return None if stored is None else stored.entries.get(device_key(stack, backend))


def absent(entry: Entry | None, rows: Iterable[Row]) -> list[str]:
    """The accepted rows that are not among `rows`, in words."""
    return [f"seed {seed}" for seed in absent_rows(entry, rows)]


def absent_rows(entry: Entry | None, rows: Iterable[Row]) -> dict[str, Row]:
    """The accepted rows that are not among `rows`, by their names in the entry."""
    ran = {seed_of(row) for row in rows}
    return {} if entry is None else {name: row for name, row in entry.rows.items() if name not in ran}


def loosened(entry: Entry | None, rows: Iterable[Row]) -> list[str]:
    """The limits that are looser than when the rows were accepted, in words: limits tighten freely, and loosen by
    acceptance alone.
    """
    result: dict[str, None] = {}
    for row in rows:
        then = None if entry is None else entry.rows.get(seed_of(row))
        for name, accepted in {} if then is None else then.allowed.items():
            now = row.allowed.get(name)
            if now is None:
                result[f"no {name} where {accepted:.3g} was accepted"] = None
            elif now < accepted if name in AT_LEAST else now > accepted:
                result[f"{name} {now:.9g} where {accepted:.9g} was accepted"] = None
    return list(result)


def seed_of(row: Row) -> str:
    """The row's name in an entry."""
    return "-" if row.seed is None else str(row.seed)


def error_of(row: Row) -> float:
    """The error that is followed: relative L2 to float64, else to the CPU. NaN where a row holds no numbers."""
    return row.error


def change_of(row: Row, entry: Entry | None) -> Change:
    """One row against its accepted one, without a verdict on drift: that takes all seeds, see `verdicts`."""
    name = row.name
    then = None if entry is None else entry.rows.get(seed_of(row))
    if then is None:
        return Change(kind=NEW, text=f"no baseline for {name}; accept this run with --precision-baseline=accept")
    for item, what in (("weights", "weights"), ("weights_sha256", "weights"), ("inputs_sha256", "inputs")):
        now, before = getattr(row, item), getattr(then, item)
        unknown = item == "weights_sha256" and None in (now, before)  # older rows lack it
        if now != before and not unknown:
            text = (
                f"{name} ran with other {what} ({_short(now)}) than were accepted ({_short(before)}); its numbers "
                "cannot be compared: run with the accepted ones, or --precision-baseline=accept"
            )
            return Change(kind=INCOMPARABLE, text=text)
    absent = [digest for digest in DIGESTS if getattr(row, digest) is None or getattr(then, digest) is None]
    if absent:
        text = f"{name} has no {absent[0]}, now or as accepted, so nobody can say what was compared; {_AGAIN}"
        return Change(kind=INCOMPARABLE, text=text)
    if not _same_reference(row, then):
        text = (
            f"{name}: the CPU's result is another one than was accepted: its root mean square is {row.rms:.6g} "
            f"where {then.rms:.6g} "
            "was, further apart than both are from float64, so the model's code computes something else; run "
            "the accepted code, or "
            "--precision-baseline=accept"
        )
        return Change(kind=INCOMPARABLE, text=text)
    if row.status is Status.PASS and Mark.ON_HOST in row.marks and Mark.ON_HOST not in then.marks:
        text = (
            f"{name}: the model's own code computes on the CPU what it did not when it was accepted, so its numbers "
            "say less of the device; run the accepted code, or --precision-baseline=accept"
        )
        return Change(kind=INCOMPARABLE, text=text)
    now, before = error_of(row), error_of(then)
    if row.actual_sha256 == then.actual_sha256:
        return _of_same_bits(row, then)
    if not (math.isfinite(now) and math.isfinite(before)):
        return Change(kind=INCOMPARABLE, text=f"{name}: no finite error to compare, {now} now and {before} accepted")
    ratio = math.inf if before == 0 else now / before
    ratio = 1.0 if now == before else ratio
    text = f"{name}: error to float64 {now:.3e} where {before:.3e} was accepted ({ratio:.3f} times)"
    text += ", to every digit, though the bits are others" if ratio == 1.0 else ""
    if None not in (row.expected_sha256, then.expected_sha256) and row.expected_sha256 != then.expected_sha256:
        text += ", against another result of the CPU than was accepted"
    return Change(kind=DRIFT, text=text, ratio=ratio)


def same_subject(row: Row, then: Row) -> bool:
    """Whether two rows ran the same weights on the same inputs."""
    contents = {row.weights_sha256, then.weights_sha256} - {None}
    return (row.weights, row.inputs_sha256) == (then.weights, then.inputs_sha256) and len(contents) < 2


def _same_reference(row: Row, then: Row) -> bool:
    """Whether the CPU computed the same thing for two rows, as far as their numbers tell.

    Two results that are off from the same float64 result by e1 and e2, relative, have norms that are off by e1 + e2 at
    most (triangle inequality); twice that is allowed, and `SAME`.
    """
    if (row.output, row.shape) != (then.output, then.shape) or row.parted or then.parted:
        return True
    numbers = (row.rms, then.rms, row.cpu_golden_rel_l2, then.cpu_golden_rel_l2)
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if len(known) < len(numbers) or not then.rms:
        return True
    rms, rms_then, error, error_then = known
    return abs(rms / rms_then - 1) <= 2 * (error + error_then) + SAME


def _worse_parts(row: Row, then: Row) -> list[str]:
    """In words, the outputs and the token whose own error grew though that of the output that stands for the row did
    not.
    """
    scatter = NOISE * max((item.rerun or {}).get("rel_l2", 0.0) for item in (row, then))
    result, parts = [], _parts(row)
    for what, (before, _) in _parts(then).items():
        now, count = parts.get(what, (math.nan, MANY))
        least = max(before, ROUNDOFF.get(row.dtype or "", 0.0))
        if now > max(_PARTS, slack(count)) * least and now - before > scatter:
            result.append(f"{what} is off by {now:.3e} where {before:.3e} was accepted")
    return result


def _parts(row: Row) -> dict[str, tuple[float, int]]:
    """The relative errors to the CPU of a row's parts, and how many elements each has."""
    several = {f"output {name}": (output.rel_l2, math.prod(output.shape or ())) for name, output in row.outputs.items()}
    token = {f"the worst token of {row.output or 'the output'}": (row.token_rel_l2, row.shape[-1])} if row.shape else {}
    return {
        what: (error, count)
        for what, (error, count) in (several | token).items()
        if error is not None and math.isfinite(error)
    }


DIGESTS = ("weights", "inputs_sha256", "actual_sha256")  # without which two rows cannot be held against each other
ADVICE = "find out what changed, or accept it with --precision-baseline=accept"
_AGAIN = "run it again with this version"


def _of_same_bits(row: Row, then: Row) -> Change:
    """A row whose outputs are those that were accepted: numbers of the same bits on both sides must agree."""
    name = row.name
    if None not in (row.expected_sha256, then.expected_sha256) and row.expected_sha256 == then.expected_sha256:
        for number in ("rel_l2", "max_diff", "mean_diff"):
            now, before = getattr(row, number), getattr(then, number)
            if None not in (now, before) and not _agree(now, before):
                text = (
                    f"{name}: the digests say that every bit is as accepted, and {number} is {now:.6e} where "
                    f"{before:.6e} was; a file was changed by hand or is damaged: {_AGAIN}"
                )
                return Change(kind=INCOMPARABLE, text=text)
        return Change(kind=IDENTICAL, text=f"{name}: every bit as accepted", ratio=1.0)
    return Change(kind=IDENTICAL, text=f"{name}: every bit of the device's output as accepted", ratio=1.0)


def _agree(now: float, before: float) -> bool:
    return (
        now == before
        or (math.isnan(now) and math.isnan(before))
        or abs(now - before) <= SAME * max(abs(now), abs(before))
    )


def _short(digest: Any) -> str:
    return str(digest)[:16]


def verdicts(rows: Iterable[Row], entry: Entry | None) -> list[Change]:
    """Every row of one case in one dtype against its entry.

    The errors of all seeds are paired with the accepted ones, those with equal inputs once. With `_SEEDS` or more the
    change is judged together, by a one-sided paired t-test of log(error now / error then) at 1 % (Student 1908), and by
    its size: the geometric mean must pass `_EFFECT`. So a small drift that all seeds share is seen, and one seed that
    is off by chance is not. A row whose error changed by more than `_ALONE` counts by itself, or by more than the slack
    of its few elements. Where nothing is rounded but float32 sums, both are `_SUMS`: no library promises their order.
    Where the device's reruns differ, here or in the accepted run, a change within `NOISE` times that difference is
    scatter; but a row whose error grew by more than the accepted error and the accepted run's own rerun difference
    together is worse, however much its reruns differ. The other outputs of a row and its worst token are followed too:
    an error of theirs that is `_PARTS` times the accepted one, or the slack of its few elements, is worse, whatever the
    output does that stands for the row.
    """
    rows = list(rows)
    result = [change_of(row, entry) for row in rows]
    if entry is None:
        return result
    pairs = {
        index: item.ratio
        for index, item in enumerate(result)
        if item.ratio is not None and math.isfinite(item.ratio) and item.ratio > 0
    }
    samples = {rows[index].inputs_sha256 or index: index for index in reversed(pairs)}  # the same inputs are one sample
    logs = [math.log(pairs[index]) for index in samples.values()]
    summed = [_is_of_sums(rows[index], entry.rows[seed_of(rows[index])]) for index in pairs]
    effect = _SUMS if any(summed) else _EFFECT
    together = _shared(logs, effect) if len(logs) >= _SEEDS else 0
    for index, item in enumerate(result):
        if item.kind != DRIFT:
            continue
        assert item.ratio is not None, "drift has a ratio"
        alone = max(_SUMS if any(summed) else _ALONE, _chance(rows[index]))
        shrunk = -1 if item.ratio < 1 / alone else together
        sign = 1 if item.ratio > alone else shrunk
        if sign and _is_scatter(rows[index], entry.rows[seed_of(rows[index])]):
            sign = 0
        grown = sign == 1
        if sign and (item.ratio > 1) == grown:
            kind = REGRESSED if grown else IMPROVED
            shared = (
                f", {math.exp(sum(logs) / len(logs)):.3f} times on average over {len(logs)} seeds"
                if sign == together
                else ""
            )
            advice = ADVICE if grown else "accept it with --precision-baseline=accept, so that it cannot be lost again"
            result[index] = Change(kind=kind, text=f"{item.text}{shared}; {advice}", ratio=item.ratio)
    for index, item in enumerate(result):
        worse = _worse_parts(rows[index], entry.rows[seed_of(rows[index])]) if item.kind in (DRIFT, IMPROVED) else []
        if worse:
            text = f"{rows[index].name}: {'; '.join(worse)}; {ADVICE}"
            result[index] = Change(kind=REGRESSED, text=text, ratio=item.ratio)
    return [_with_card(row, item, entry) for row, item in zip(rows, result)]


def _with_card(row: Row, change: Change, entry: Entry) -> Change:
    """A change of bits with the two cards, where the row was accepted on another one than that which measured it."""
    if change.kind not in (DRIFT, REGRESSED, IMPROVED):
        return change
    then = entry.rows[seed_of(row)].card or entry.stack.get("card")  # files of older versions name one for all rows
    if not then or not row.card or then == row.card:
        return change
    text = f"{change.text}; accepted on {then}, measured on {row.card}, so the card may be what changed"
    return replace(change, text=text)


def settled_entries(rows: Iterable[Row], entry: Entry | None) -> list[Row]:
    """The rows of one case in one dtype as their baseline leaves them, all seeds together: with what became of each,
    and a reason where it is worse.

    A known failure that is worse than what was accepted is none. A row that fails or is REGRESSED by itself gets no
    second reason.
    """
    rows = list(rows)
    return [_settled(row, change) for row, change in zip(rows, verdicts(rows, entry))]


def _settled(row: Row, change: Change) -> Row:
    row = replace(row, baseline=change, marks=tuple(change.kind if mark.is_change else mark for mark in row.marks))
    if change.kind is not REGRESSED or not (row.status is Status.PASS or Mark.KNOWN in row.marks):
        return row
    worse = row.because("baseline", f"{change.kind}: {change.text}")
    return replace(worse, marks=tuple(mark for mark in worse.marks if mark is not Mark.KNOWN))


def _is_scatter(row: Row, then: Row) -> bool:
    """Whether the difference of a row's reruns explains by how much its error changed."""
    now, before = ((item.rerun or {}).get("rel_l2", 0.0) for item in (row, then))
    growth = error_of(row) - error_of(then)
    return abs(growth) <= NOISE * max(now, before) and growth <= error_of(then) + before


def _is_of_sums(row: Row, then: Row) -> bool:
    """Whether an accepted error was made by nothing but float32 sums: it was of the size of the CPU's."""
    cpu, error = then.cpu_golden_rel_l2, error_of(then)
    return row.dtype == "float32" and cpu is not None and error <= _SUMS * cpu


def _chance(row: Row) -> float:
    """The factor by which the error of so few elements may change by chance; 1 for many."""
    count = MANY if row.shape is None else math.prod(row.shape)
    return slack(count) if count < MANY else 1.0


def _shared(logs: list[float], least: float) -> int:
    """1 where the errors grew together, -1 where they shrank, 0 where chance would do."""
    count = len(logs)
    mean = sum(logs) / count
    if abs(mean) <= math.log(least):
        return 0
    spread = math.sqrt(sum((log - mean) ** 2 for log in logs) / (count - 1))
    limit = STUDENT[max(item for item in STUDENT if item <= count - 1)]
    if not abs(mean) > limit * spread / math.sqrt(count):
        return 0
    return 1 if mean > 0 else -1
