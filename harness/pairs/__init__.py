"""Two files or folders of tensors, paired by name and judged: python -m harness compare A B.

Every name on either side is a row. What is missing, unreadable, of another shape or of another dtype is a FAIL, and so is to have found
nothing. One pair is in memory at a time, but for .pt files, which are read whole; nothing that is read can run code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measure import compare
from harness.errors import HarnessError
from harness.gate import Reason, References, Tolerance, Verdict, is_floating, judge

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One name and what became of it."""

    name: str
    verdict: Verdict


class Unreadable(Exception):
    """Why a file, or a tensor in it, could not be read."""


def compare_paths(actual: Path, expected: Path, tolerance: Tolerance, *, golden: Path | None = None) -> Iterator[Pair]:
    """Judge every tensor of `actual` against the one of its name in `expected`; with `golden`, both against float64 too.

    In a folder a tensor's name is the file's path in it without the suffix, then the name inside the file, if it has one. Two files that
    hold one tensor each are paired whatever it is called.

    Raises: HarnessError when a path does not exist.
    """
    sides = [_Side(each) for each in (actual, expected, golden) if each is not None]
    if not actual.is_dir() and not expected.is_dir() and all(len(each.tensors) == 1 and not each.broken for each in sides):
        for side in sides[1:]:
            side.tensors = dict.fromkeys(sides[0].tensors, *side.tensors.values())
    names = sorted({name for side in sides[:2] for name in (*side.tensors, *side.broken)})
    if not names:
        raise HarnessError(f"neither {actual} nor {expected} holds a tensor; files of {', '.join(SUFFIXES)} are read")
    for name in names:
        yield Pair(name=name, verdict=_verdict(name, sides, tolerance))


def _verdict(name: str, sides: list[_Side], tolerance: Tolerance) -> Verdict:
    read, failures = [], []
    for side in sides:
        try:
            read.append(side.read(name))
        except Unreadable as error:
            failures.append(Reason(criterion="output", text=f"{side.path}: {error}"))
    if failures:
        return Verdict(failures=tuple(failures), comparisons={})
    try:
        return _judged(read, tolerance)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a layout that has no elements to look at
        return Verdict(failures=(Reason(criterion="output", text=f"cannot be compared: {_words(error)}"),))


def _judged(read: list[Tensor], tolerance: Tolerance) -> Verdict:
    found = compare(read[0], read[1])
    if len(read) < 3 or not is_floating(found.expected_dtype):
        return judge(found, tolerance)
    dtype = str(read[2].dtype).removeprefix("torch.")
    if read[2].shape != read[1].shape or dtype not in ("float64", "complex128"):
        failure = Reason(criterion="golden", text=f"the golden tensor is {dtype} {tuple(read[2].shape)} where float64 {found.expected_shape} was expected")
        return replace(judge(found, Tolerance(preset="pair")), failures=(failure,))
    held = References(golden=compare(read[0], read[2]), cpu=compare(read[1], read[2]))
    return judge(found, tolerance, references={"output": held})


class _Side:
    """The tensors under one path: a way to read each by its name, and the files that could not be opened."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Callable[[], Tensor]] = {}
        self.broken: dict[str, str] = {}
        if path.is_dir():
            for file in _files(path, self.broken):
                self._open(file, file.relative_to(path).with_suffix("").as_posix())
        elif path.exists():
            if path.suffix.lower() not in SUFFIXES:
                raise HarnessError(f"{path}: a file of {', '.join(SUFFIXES)} or a folder of them was expected")
            self._open(path, "")
        else:
            raise HarnessError(f"{path} does not exist; give a file of {', '.join(SUFFIXES)} or a folder of them")

    def _open(self, file: Path, prefix: str) -> None:
        try:
            found = _READERS[file.suffix.lower()](file)
            if not found:
                raise ValueError("it holds no tensor")
        except Exception as error:  # noqa: BLE001  a damaged file raises whatever its library raises
            self.broken[prefix or file.stem] = f"cannot read {file.name}: {_words(error)}"
            return
        for inner, reader in found.items():
            name = "/".join(each for each in (prefix, inner) if each) or file.stem
            if name in self.tensors:
                self.broken[name] = f"two files hold a tensor of the name {name!r}"
            self.tensors[name] = reader

    def read(self, name: str) -> Tensor:
        if name in self.broken:
            raise Unreadable(self.broken[name])
        if name not in self.tensors:
            whole = next((each for each in self.broken if name.startswith(f"{each}/") or not self.path.is_dir()), None)
            raise Unreadable(self.broken[whole] if whole is not None else f"there is no {name!r}")
        try:
            return self.tensors[name]()
        except Exception as error:  # noqa: BLE001
            raise Unreadable(f"cannot read {name!r}: {_words(error)}") from None


def _files(folder: Path, broken: dict[str, str]) -> list[Path]:
    """The files of tensors under a folder, through links too; what cannot be listed goes to `broken`."""

    def unlisted(error: OSError) -> None:
        broken[Path(error.filename).relative_to(folder).as_posix()] = f"cannot list the folder: {_words(error)}"

    found, seen = [], set()
    for place, inner, names in os.walk(folder, onerror=unlisted, followlinks=True):
        real = os.path.realpath(place)
        if real in seen and os.path.islink(place):
            inner.clear()  # a link to where we have been: a circle
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _safetensors(file: Path) -> Mapping[str, Callable[[], Tensor]]:
    from safetensors import safe_open

    def read(name: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    with safe_open(file, framework="pt") as opened:
        return {name: lambda name=name: read(name) for name in opened.keys()}


def _npy(file: Path) -> Mapping[str, Callable[[], Tensor]]:
    import numpy

    numpy.load(file, mmap_mode="r", allow_pickle=False)  # its header; what is cut short says so now
    return {"": lambda: _tensor(numpy.load(file, allow_pickle=False))}


def _npz(file: Path) -> Mapping[str, Callable[[], Tensor]]:
    import numpy

    def read(name: str) -> Tensor:
        with numpy.load(file, allow_pickle=False) as opened:
            return _tensor(opened[name])

    with numpy.load(file, allow_pickle=False) as opened:
        return {name: lambda name=name: read(name) for name in opened.files}


def _tensor(array) -> Tensor:
    import torch

    return torch.from_numpy(array.copy() if not array.flags.writeable or any(step < 0 for step in array.strides) else array)


def _pt(file: Path) -> Mapping[str, Callable[[], Tensor]]:
    import torch

    found: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in _named(torch.load(file, map_location="cpu", weights_only=True), ""):
        if name in found:
            raise ValueError(f"two tensors in it have the name {name!r}")
        found[name] = lambda tensor=tensor: tensor
    return found


def _named(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, (bool, int, float, complex)):  # a loss, a step
        yield prefix, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _named(each, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _named(each, f"{prefix}.{index}" if prefix else str(index))


_READERS = {".safetensors": _safetensors, ".npy": _npy, ".npz": _npz, ".pt": _pt, ".pth": _pt, ".bin": _pt, ".ckpt": _pt}
