"""The tensors under one path: their names in order, what their headers say, and a way to read each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.pairs.files import LIMIT, SMALL_FILE, SUFFIXES, Header, Holder, inflated, open_tensors, regular, words
from harness.pairs.layouts import LISTS, Item, read_layout
from harness.pairs.names import AS_THEY_ARE, Naming
from harness.typed_json import named, shown

if TYPE_CHECKING:
    from torch import Tensor


_CACHE_LIMIT = (
    64 << 20
)  # bytes of small files that are kept in memory from their headers on, so that none is read twice


class Unreadable(Exception):
    """Why a file, or a tensor in it, could not be read."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor is: its file, its name inside it, its header."""

    file: Path
    inner: str
    header: Header


class Side:
    """One side: `tensors` in order, and `broken`, the names that nothing can be read for, with the reason."""

    def __init__(self, path: Path, *, naming: Naming = AS_THEY_ARE, first: bool = False, limit: int = LIMIT):
        self.path = path
        self.naming, self.first, self.limit = naming, first, limit
        self.tensors: dict[str, Stored] = {}
        self.broken: dict[str, str] = {}
        self.valueless: set[str] = set()  # values that SGLang's dumper wrote and that hold no tensor: None, text
        self.unmapped: list[str] = []  # the names as the files have them
        self.executed = False  # whether `names` are in the order of execution
        self._origins: dict[str, str] = {}  # a name: the file and the name in it that it was made of
        self._order: list[str] = []
        self._whole: dict[str, str] = {}  # a file that cannot be opened: why, by the name that its tensors begin with
        self._opened: tuple[Path, Holder] | None = None
        self._small: dict[Path, Holder] = {}  # files that are in memory since their headers were read
        self._room = _CACHE_LIMIT
        self._open_all()

    @property
    def names(self) -> list[str]:
        """Every name, also of what is broken, in order."""
        return list(dict.fromkeys([*self._order, *self.broken]))

    def _open_all(self) -> None:
        if not self.path.is_dir():
            _file_expected(self.path)
            self._open(Item(name="", file=self.path))
            return
        listed: dict[str, str] = {}
        files = _files(self.path, listed)
        layout = read_layout(
            self.path,
            [element for element in files if element.name not in LISTS],
            [element for element in files if element.name in LISTS],
        )
        self.executed = layout.executed
        for name, reason in listed.items():
            self._refuse(name, reason)
        for item in layout.items:
            self._refuse(item.name, item.refused) if item.refused else self._open(item)

    def _open(self, item: Item) -> None:
        file = shown(item.file.name, 400)
        try:
            holder = open_tensors(item.file, self.limit)
            self._keep(item.file, holder)
            if not holder.headers and not holder.refused and not item.value:
                raise ValueError("it holds no tensor")
        except Exception as error:  # noqa: BLE001  a damaged file raises whatever its library raises
            name = self._refuse(item.name or item.file.stem, f"cannot read {file}: {words(error)}")
            self._whole[name] = self.broken[name]
            return
        wanted = _value(holder) if item.value else {inner: inner for inner in {**holder.headers, **holder.refused}}
        if item.value and not wanted:
            name = self._mapped(item.name)
            self.valueless.add(name)
            self._order.append(name)
        for inner, shown_inner in wanted.items():
            raw = "/".join(element for element in (item.name, shown_inner) if element) or item.file.stem
            if inner in holder.refused:
                self._refuse(raw, f"{file}: {holder.refused[inner]}")
            else:
                self._add(raw, Stored(file=item.file, inner=inner, header=holder.headers[inner]))

    def _keep(self, file: Path, holder: Holder) -> None:
        self._opened = file, holder
        if holder.whole is not None and holder.whole <= min(SMALL_FILE, self._room):
            self._small[file] = holder
            self._room -= holder.whole + 4096  # and what is around the tensors

    def _holder(self, file: Path) -> Holder:
        """An open file; one that is not small is alone in memory."""
        if file in self._small:
            return self._small[file]
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # before the next is read
            self._opened = file, open_tensors(file, self.limit)
        return self._opened[1]

    def _mapped(self, raw: str) -> str:
        self.unmapped.append(raw)
        return self.naming.mapped(raw, first=self.first)

    def _add(self, raw: str, stored: Stored) -> None:
        name = self._mapped(raw)
        relative = stored.file.relative_to(self.path) if self.path.is_dir() else stored.file.name
        origin = named(str(relative)) + (f" ({named(stored.inner)})" if stored.inner else "")
        if raw != name:
            origin += f" as {named(raw)}"
        if name in self._origins:
            self.broken[name] = (
                f"two files or keys have the name {named(name)}, and one would hide the other: {self._origins[name]}"
                f" and {origin}; rename one"
            )
            return
        self._origins[name] = origin
        self.tensors[name] = stored
        self._order.append(name)

    def _refuse(self, raw: str, reason: str) -> str:
        name = self._mapped(raw)
        self.broken[name] = reason
        self._order.append(name)
        return name

    def single(self) -> bool:
        """Whether this is a file of one tensor."""
        return not self.path.is_dir() and len(self.tensors) == 1 and not self.broken

    def call(self, name: str) -> None:
        """Give the only tensor another name."""
        self.tensors = {name: next(iter(self.tensors.values()))}
        self._order = [name]

    def header(self, name: str) -> Header:
        """What is known of a tensor without its data. Raises: Unreadable."""
        if name in self.broken:
            raise Unreadable(self.broken[name])
        if name not in self.tensors:
            whole = next(
                (
                    reason
                    for item, reason in self._whole.items()
                    if name.startswith(f"{item}/") or not self.path.is_dir()
                ),
                None,
            )
            raise Unreadable(whole if whole is not None else f"there is no {named(name)}")
        return self.tensors[name].header

    def read(self, name: str) -> Tensor:
        """A tensor. Raises: Unreadable, also where it takes more memory beyond its bytes in the file than the limit."""
        too_large = inflated(self.header(name), self.limit)
        if too_large is not None:
            raise Unreadable(f"{named(name)} is not read: {too_large}")
        stored = self.tensors[name]
        try:
            return self._holder(stored.file).read(stored.inner)
        except Exception as error:  # noqa: BLE001
            raise Unreadable(f"cannot read {named(name)}: {words(error)}") from None


def _value(holder: Holder) -> dict[str, str]:
    """The names under "value" of SGLang's dictionary and what they are called; an older file is the value itself."""
    names = [*holder.headers, *holder.refused]
    if not any(re.match(r"meta(\.|$)", name) for name in names):
        return {name: name for name in names}
    return {name: name.removeprefix("value").removeprefix(".") for name in names if re.match(r"value(\.|$)", name)}


def _file_expected(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        raise HarnessError(f"{path} does not exist; give a file of {', '.join(SUFFIXES)} or a folder of them")
    try:
        regular(path)
    except (ValueError, OSError) as error:
        raise HarnessError(f"{path} cannot be read: {error}") from None
    if path.suffix.lower() not in SUFFIXES:
        raise HarnessError(f"{path}: a file of {', '.join(SUFFIXES)} or a folder of them was expected")


def _files(folder: Path, broken: dict[str, str]) -> list[Path]:
    """The files of tensors and msprobe's lists under a folder, through links too; what fails goes to `broken`."""

    def unlisted(error: OSError) -> None:
        broken[Path(error.filename).relative_to(folder).as_posix()] = f"cannot list the folder: {words(error)}"

    result, seen = [], set()
    for directory, inner, names in os.walk(folder, onerror=unlisted, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen and os.path.islink(directory):
            inner.clear()  # a link to where we have been: a circle
            continue
        seen.add(real)
        inside = [Path(directory, name) for name in names if Path(name).suffix.lower() in SUFFIXES or name in LISTS]
        if not inside and not inner and Path(directory).suffix.lower() in SUFFIXES and Path(directory) != folder:
            name = Path(directory).relative_to(folder).with_suffix("").as_posix()
            broken[name] = f"{shown(Path(directory).name, 400)} is a folder without tensors where a file was expected"
        result += inside
    return sorted(result)
