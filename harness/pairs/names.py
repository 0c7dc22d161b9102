"""The names of two sides: how they are mapped and ordered, and which mapping would pair those without a partner."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.typed_json import named

SEPARATORS = re.compile(r"[./_ :]")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the names of the files become the names that are paired.

    `prefixes`: the first of these that a name begins with is taken off, on either side. `renames`: pairs of a regular
    expression and what takes the place of its matches (`re.sub`), one after the other, in the names of A alone, after
    the prefixes.

    >>> naming = Naming(prefixes=("module.",), renames=(("^layer([0-9]+)", "layers.\\\\1"),))
    >>> naming.mapped("module.layer3.out", first=True)
    'layers.3.out'
    """

    prefixes: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def mapped(self, name: str, *, first: bool) -> str:
        """A name as it is paired; `first` where it is one of A. Raises: HarnessError for a wrong NEW."""
        prefix = next((item for item in self.prefixes if name.startswith(item)), "")
        name = name[len(prefix) :]
        for old, new in self.renames if first else ():
            try:
                name = re.sub(old, new, name)
            except (re.error, IndexError) as error:
                raise HarnessError(f"--map {named(old + '=' + new)}: {named(new)} cannot be filled: {error}") from None
        return name

    def unused(self, names: Sequence[Sequence[str]]) -> list[str]:
        """The options that match no name, in words; `names`: those of each side as the files have them."""
        every = [name for side in names for name in side]
        idle = [
            f"--strip-prefix {shlex.quote(prefix)} takes nothing off: no name begins with it"
            for prefix in self.prefixes
            if not any(name.startswith(prefix) for name in every)
        ]
        stripped = [Naming(prefixes=self.prefixes).mapped(name, first=True) for name in names[0]]
        for index, (old, new) in enumerate(self.renames):
            before = Naming(renames=self.renames[:index])
            if not any(re.search(old, before.mapped(name, first=True)) for name in stripped):
                idle.append(f"--map {shlex.quote(old + '=' + new)} renames nothing: no name of A matches it")
        return idle


AS_THEY_ARE = Naming()


def natural(name: str) -> tuple:
    """What names are sorted by: the numbers in them as numbers, so that layer 9 comes before layer 10.

    >>> sorted(["layers.10", "layers.9"], key=natural)
    ['layers.9', 'layers.10']
    """
    parts: list = re.split(r"([0-9]+)", name)  # text, number, text, …
    parts[1::2] = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    return tuple(parts), name


def in_order(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The names of both sides in the order of `second`; those of `first` alone keep the name before them."""
    known, order = set(second), list(second)
    after: dict[str | None, list[str]] = {}
    last = None
    for name in first:
        if name in known:
            last = name
        else:
            after.setdefault(last, []).append(name)
    return after.get(None, []) + [item for name in order for item in (name, *after.get(name, []))]


def mapping_hints(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Which option would pair most of the names that A (`first`) and B (`second`) have alone, in words."""
    alone = {"A": set(first), "B": set(second)}
    if not alone["A"] or not alone["B"]:
        return []
    result = (
        _best(Counter(_prefixes(alone["A"], alone["B"])), "A"),
        _best(Counter(_prefixes(alone["B"], alone["A"])), "B"),
    )
    count, side, prefix = max(result)
    if 2 * count > min(len(alone["A"]), len(alone["B"])):
        return [
            (
                f"{_share(count, len(alone[side]))} unpaired names of {side} pair after --strip-prefix"
                f" {shlex.quote(prefix)}"
            )
        ]
    count, old, new = max(
        _exchanges(alone["A"], alone["B"]), key=lambda value: (value[0], -len(value[1])), default=(0, "", "")
    )
    if 2 * count > min(len(alone["A"]), len(alone["B"])):
        option = f"^{re.escape(old)}=" + new.replace("\\", "\\\\")
        return [f"{_share(count, len(alone['A']))} unpaired names of A pair after --map {shlex.quote(option)}"]
    return []


def _share(count: int, total: int) -> str:
    return f"all {total}" if count == total else f"{count} of the {total}"


def _best(counts: Counter, side: str) -> tuple[int, str, str]:
    prefix, count = max(counts.items(), key=lambda value: (value[1], -len(value[0])), default=("", 0))
    return count, side, prefix


def _cuts(name: str) -> list[int]:
    """Where a name may be cut: behind each separator."""
    return [found.end() for found in SEPARATORS.finditer(name) if found.end() < len(name)]


def _prefixes(names: set[str], others: set[str]) -> Iterable[str]:
    """For each name the prefix without which it is one of `others`, where there is one."""
    return (name[:cut] for name in names for cut in _cuts(name) if name[cut:] in others)


def _exchanges(first: set[str], second: set[str]) -> Iterable[tuple[int, str, str]]:
    """(count, old, new): how many names of `first` are names of `second` when the prefix `old` becomes `new`."""
    counts: Counter = Counter()
    ends = [_once(first), _once(second)]
    for end, old in ends[0].items():
        if end in ends[1] and "=" not in old:  # which would end OLD
            counts[old, ends[1][end]] += 1
    best: Counter = Counter()
    for old, new in counts:
        best[old, new] = sum(name.startswith(old) and new + name[len(old) :] in second for name in first)
        if len(best) == 100:
            break
    return [(count, old, new) for (old, new), count in best.items()]


def _once(names: set[str]) -> dict[str, str]:
    """Every end of a name behind a separator that no other name has, and what stands before it."""
    counts = Counter(name[cut:] for name in names for cut in _cuts(name))
    return {name[cut:]: name[:cut] for name in names for cut in _cuts(name) if counts[name[cut:]] == 1}
