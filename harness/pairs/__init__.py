"""Two files or folders of tensors, paired by name and judged: python -m harness compare A B.

Every name on either side is a row. What is missing, unreadable, of another shape or of another dtype is a FAIL, and so
is to have found nothing. Shapes and dtypes come from headers, before any data; one pair is in memory at a time, and the
next where it is small; nothing that is read can run code.

    side.py      the tensors under one path         layouts.py  folders that msprobe and SGLang dump
    files.py     formats: headers, then data        pickled.py  what a pickle would make, without making it
    names.py     mapping, order                     dtypes.py, axes.py  the coarser dtype; exchanged axes
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.judging.checks import judge
from harness.judging.preset_names import NEED_REFERENCES
from harness.judging.references import References, is_floating
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Reason, Verdict
from harness.measure import Comparison, compare
from harness.pairs import axes
from harness.pairs.dtypes import at_coarser
from harness.pairs.files import LIMIT, SUFFIXES, inflated, words
from harness.pairs.names import AS_THEY_ARE, Naming, in_order, mapping_hints, natural
from harness.pairs.side import Side, Unreadable
from harness.typed_json import shown

if TYPE_CHECKING:
    from torch import Tensor

_LONG = 4000  # characters of a name that are shown
AHEAD = 64 << 20  # bytes in memory of a pair that is read while the one before it is compared


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One name, printable, and what became of it."""

    name: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Every pair in order, and what is to be said of them beside their verdicts."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every pair passed."""
        return all(pair.verdict.passed for pair in self.pairs)

    @property
    def first(self) -> Pair | None:
        """The first pair that does not pass, in the order of execution where the dumps have one."""
        return next((pair for pair in self.pairs if not pair.verdict.passed), None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How two sides are compared.

    `coarser`: pairs of two dtypes are compared in the one with fewer bits. `limit`: bytes that a tensor may take in
    memory beyond those that its file holds.
    """

    naming: Naming = AS_THEY_ARE
    coarser: bool = False
    limit: int = LIMIT


def compare_paths(
    actual: Path, expected: Path, tolerance: Tolerance, *, golden: Path | None = None, options: Options = Options()
) -> Compared:
    """Judge every tensor of `actual` against the one of its name in `expected`; with `golden`, by float64 too.

    In a folder a tensor's name is the file's path in it without the suffix, then the name inside the file, if it has
    one; folders that msprobe and SGLang's dumper wrote are named as those tools do. Two files that hold one tensor each
    are paired whatever it is called.

    Raises: HarnessError when a path does not exist or is no file or folder, or where neither side holds a tensor.
    """
    paths = [tensor for tensor in (actual, expected, golden) if tensor is not None]
    sides = [
        Side(path, naming=options.naming, first=number == 0, limit=options.limit) for number, path in enumerate(paths)
    ]
    if all(item.single() for item in sides):
        for side in sides[1:]:
            side.call(next(iter(sides[0].tensors)))
    names = _ordered(*sides[:2])
    if not names:
        raise HarnessError(f"neither {actual} nor {expected} holds a tensor; files of {', '.join(SUFFIXES)} are read")
    empty = sides[0].valueless & sides[1].valueless
    compared = [name for name in names if name not in empty]
    pairs = tuple(
        Pair(name=shown(name, _LONG), verdict=verdict)
        for name, verdict in zip(compared, _verdicts(compared, sides, tolerance, options.coarser))
    )
    if not pairs:
        raise HarnessError(f"no value in {actual} and {expected} holds a tensor: nothing was compared")
    return Compared(
        pairs=pairs,
        notes=(
            *_mapping_notes(sides, options.naming),
            *_dtype_notes(pairs, sides, names, options.coarser),
            *_empty_notes(empty),
        ),
    )


def _ordered(first: Side, second: Side) -> list[str]:
    if second.executed:
        return in_order(first.names, second.names)
    if first.executed:
        return in_order(second.names, first.names)
    return sorted({*first.names, *second.names}, key=natural)


def _mapping_notes(sides: list[Side], naming: Naming) -> list[str]:
    notes = naming.unused([side.unmapped for side in sides])
    first, second = (set(side.tensors) for side in sides[:2])
    return [shown(note, _LONG) for note in (*notes, *mapping_hints(first - second, second - first))]


def _dtype_notes(pairs: tuple[Pair, ...], sides: list[Side], names: list[str], coarser: bool) -> list[str]:
    """What was compared by the coarser dtype; or that it could be."""
    told = {
        shown(name, _LONG): tuple(side.tensors[name].header.dtype for side in sides[:2])
        for name in names
        if all(name in side.tensors for side in sides[:2])
    }
    mixed = [(pair.name, told[pair.name]) for pair in pairs if len(set(told.get(pair.name, ()))) == 2]
    if not mixed:
        return []
    name, (first, second) = mixed[0]
    some = f"{name} ({first} and {second})" + (f" and {len(mixed) - 1} more" if len(mixed) > 1 else "")
    if coarser:
        return [f"compared by the coarser dtype of both: {some}"]
    return [f"dtypes differ: {some}; --coarser-dtype compares such pairs by the dtype with fewer bits"]


def _empty_notes(empty: set[str]) -> list[str]:
    if not empty:
        return []
    name = min(empty, key=natural)
    return [
        f"not compared, since neither side holds a tensor there: {shown(name, _LONG)}"
        + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
    ]


def _verdicts(names: list[str], sides: list[Side], tolerance: Tolerance, coarser: bool) -> Iterator[Verdict]:
    """The verdict on each pair. While one is compared, a thread reads the next, if that takes at most `AHEAD` bytes.

    Only one of the two threads reads at a time, since a side keeps the file open that it read from.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead: Future[Verdict | list[Tensor]] | None = None
        for number, name in enumerate(names):
            read = _read(name, sides, tolerance) if ahead is None else ahead.result()
            ahead = None
            if number + 1 < len(names) and _memory(names[number + 1], sides) <= AHEAD:
                ahead = reader.submit(_read, names[number + 1], sides, tolerance)
            yield read if isinstance(read, Verdict) else _compared(read, tolerance, coarser)


def _memory(name: str, sides: list[Side]) -> int:
    """The bytes that a pair takes when it is read."""
    return sum(side.tensors[name].header.memory for side in sides if name in side.tensors)


def _read(name: str, sides: list[Side], tolerance: Tolerance) -> Verdict | list[Tensor]:
    """The tensors of a name, or the verdict where they cannot be compared."""
    headers, failures = [], []
    for side in sides:
        try:
            headers.append(side.header(name))
        except Unreadable as error:
            failures.append(
                Reason(
                    criterion="output", text=f"{shown(str(side.path), _LONG)}: {_unreadable_text(name, side, error)}"
                )
            )
    if failures:
        return Verdict(failures=tuple(failures), comparisons={})
    if headers[0].shape != headers[1].shape:
        return _shapes_differ(name, sides, tolerance)
    result: list[Tensor] = []
    for side in sides:
        try:
            result.append(side.read(name))
        except Unreadable as error:
            failures.append(Reason(criterion="output", text=f"{shown(str(side.path), _LONG)}: {error}"))
    return Verdict(failures=tuple(failures), comparisons={}) if failures else result


def _compared(read: list[Tensor], tolerance: Tolerance, coarser: bool) -> Verdict:
    try:
        return _judged(read, tolerance, coarser)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a layout that has no elements to look at
        return Verdict(failures=(Reason(criterion="output", text=f"cannot be compared: {words(error)}"),))


def _unreadable_text(name: str, side: Side, error: Unreadable) -> str:
    return "the value there is no tensor" if name in side.valueless else str(error)


def _shapes_differ(name: str, sides: list[Side], tolerance: Tolerance) -> Verdict:
    """The failure that the headers tell; the data is read only where two axes may have changed places."""
    first, second = (side.header(name) for side in sides[:2])
    result = judge(
        Comparison(shape=first.shape, expected_shape=second.shape, dtype=first.dtype, expected_dtype=second.dtype),
        tolerance,
    )
    pairs = axes.exchanges(first.shape, second.shape)
    if not pairs:
        return result
    readable = max(first.memory, second.memory) <= axes.READ and not any(
        inflated(side.header(name), side.limit) for side in sides[:2]
    )
    if not readable:
        return _hinted(
            result,
            f"the shapes agree after transposing axes {pairs[0][0]} and {pairs[0][1]}; the data is too large to look"
            " at for this hint",
        )
    try:
        return _hinted(result, _exchanged(*(side.read(name) for side in sides[:2]), tolerance))
    except (Unreadable, RuntimeError, NotImplementedError, TypeError):
        return result


def _exchanged(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> str | None:
    pair = tolerance if tolerance.preset not in NEED_REFERENCES else Tolerance(preset="pair")

    def passes(turned: Tensor, other: Tensor) -> bool:
        first, second, lost = at_coarser(turned, other)
        return lost is None and judge(compare(first, second), pair).passed

    result = axes.exchanged_axes(actual, expected, passes)
    return None if result is None else f"equal after transposing axes {result[0]} and {result[1]}"


def _hinted(verdict: Verdict, hint: str | None) -> Verdict:
    """A failed verdict with a hint behind its first reason."""
    if hint is None or not verdict.failures:
        return verdict
    first, *others = verdict.failures
    return replace(verdict, failures=(replace(first, text=f"{first.text}; {hint}"), *others))


def _judged(read: list[Tensor], tolerance: Tolerance, coarser: bool) -> Verdict:
    if len(read) == 2:
        actual, expected, lost = at_coarser(*read) if coarser else (*read, None)
        result = judge(compare(actual, expected), tolerance)
        if lost is not None:
            result = replace(result, failures=(Reason(criterion="finite", text=lost), *result.failures))
        return result if result.passed else _hinted(result, _exchanged(*read, tolerance))
    result = compare(read[0], read[1])
    if not is_floating(result.expected_dtype):
        return judge(result, tolerance)
    dtype = str(read[2].dtype).removeprefix("torch.")
    if read[2].shape != read[1].shape or dtype not in ("float64", "complex128"):
        shapes = tuple(read[2].shape), result.expected_shape
        text = f"the golden tensor is {dtype} {shapes[0]} where float64 {shapes[1]} was expected"
        failure = Reason(criterion="golden", text=text)
        return replace(judge(result, Tolerance(preset="pair")), failures=(failure,))
    references = References(golden=compare(read[0], read[2]), cpu=compare(read[1], read[2]))
    return judge(result, tolerance, references={"output": references})
