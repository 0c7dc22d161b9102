"""Checkpoint layouts: safetensors in, safetensors out, streamed, bit for bit.

A layout is a table of rules between its own keys and the model's. `Rename` gives a tensor another name, `Fuse` joins
several along their first axis, and each rule runs both ways. Bytes are copied, never computed on, so every dtype passes
as it is.

    entries, twice = read_checkpoint(source)
    # Every key matched, or one error that lists those that were not.
    tensors = to_model(entries, shapes, rules_of_source, "apple", twice)
    with appearing(destination) as folder:
        write_checkpoint(folder, from_model(tensors, rules_of_destination, "timm"))

The file format: https://github.com/huggingface/safetensors (8 bytes of length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import struct
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from harness.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
PIECE = 1 << 20  # bytes copied at a time
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    path: Path
    dtype: str  # as the format names it: "F32", "BF16", …
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file
    size: int  # in bytes


# -------- reading what is there


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by key, after every offset was checked against the file.

    Raises: CheckpointError, on one line, when the file is absent, truncated, a pickle or otherwise not what it must be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, brace = file.read(8), file.read(1)
            zipped, pickled = head[:4] == b"PK\x03\x04", head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5"
            if path.suffix in PICKLES or (brace != b"{" and (zipped or pickled)):
                raise CheckpointError(
                    f"{path} is a pickle, which can run any program and is never read; save it as safetensors"
                )
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= size - 8:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: it has {size} bytes and its header claims "
                    f"{max(length, 0)}; copy it again"
                )
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path}: a header of {length} bytes is over the format's limit of {HEADER_LIMIT}"
                )
            raw = brace + file.read(length - 1)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint file at {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a directory where a safetensors file was expected") from None
    return _entries(path, _parse_header(path, raw), start=8 + length, end=size)


def _parse_header(path: Path, raw: bytes) -> dict:
    def unique(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise CheckpointError(f"{path}: {len(twice)} duplicate: {_listed(twice)}")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header cannot be read ({_short(error)})"
        ) from None
    return header


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _entries(path: Path, header: dict, *, start: int, end: int) -> dict[str, TensorEntry]:
    """Check the header's entries: known dtypes, sizes that fit the shapes, bytes that tile the file without gap or
    overlap.
    """
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for key, value in header.items():
        try:
            dtype, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            whole = all(isinstance(item, int) and item >= 0 for item in (*shape, first, last))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path}: the header's entry for {key!r} is not dtype, shape and data_offsets"
            ) from None
        if not whole or not isinstance(dtype, str) or dtype not in _BITS:
            raise CheckpointError(
                f"{path}: {key!r} has dtype {dtype!r} and shape {list(shape)!r}, which the format does not know"
            )
        needed = math.prod(shape) * _BITS[dtype] // 8
        if last - first != needed:
            raise CheckpointError(
                f"{path}: {key!r} is {dtype} {list(shape)}, {needed} bytes, and its offsets span {last - first}"
            )
        if start + last > end:
            raise CheckpointError(
                f"{path} is truncated: {key!r} ends at byte {start + last} and the file at {end}; copy it again"
            )
        entries[key] = TensorEntry(path, dtype, shape, start + first, needed)
        spans.append((first, last, key))
    position = 0
    for first, last, key in sorted(spans):
        if first != position:
            raise CheckpointError(
                f"{path}: the bytes of {key!r} begin at {first} where {position} was expected: a gap or an overlap"
            )
        position = last
    if start + position != end:
        raise CheckpointError(f"{path} has {end - start - position} bytes that belong to no tensor")
    return entries


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file itself, or what a directory holds: one file, or shards with an
    index.

    Raises: CheckpointError when there are none, or an index names a file that is absent or outside the directory.
    """
    if not source.exists():
        raise CheckpointError(f"no such model: {source}; give a directory with {WEIGHTS}, or with shards and {INDEX}")
    if not source.is_dir():
        return [source]
    if (source / INDEX).is_file():
        return _shards(source)
    if (source / WEIGHTS).is_file():
        return [source / WEIGHTS]
    result = sorted(source.glob("*.safetensors"))
    if len(result) == 1:
        return result
    pickles = sorted(path.name for path in source.iterdir() if path.suffix in PICKLES)
    if pickles and not result:
        raise CheckpointError(
            f"{source} holds pickles only ({', '.join(pickles)}), which are never read; save the model as safetensors"
        )
    several = f"{len(result)} safetensors files and no {INDEX}" if result else "no safetensors file"
    raise CheckpointError(f"{source} holds {several}; {WEIGHTS}, or shards and {INDEX}, were expected")


def _weight_map(source: Path) -> dict[str, str]:
    path = source / INDEX
    try:
        result = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(result, dict) or not all(isinstance(name, str) for name in result.values()):
            raise ValueError("weight_map is not an object of names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {_short(error)}") from None
    return result


def _shards(source: Path) -> list[Path]:
    names = sorted(set(_weight_map(source).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{source / INDEX} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(names)} shards that {INDEX} names: {', '.join(missing)}"
        )
    if not names:
        raise CheckpointError(f"{source / INDEX} names no shard")
    return [source / name for name in names]


def read_checkpoint(source: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of a checkpoint by key, in the files' order, and the keys that more than one shard holds.

    Raises: CheckpointError as `read_header` and `weight_files` do, and when shards and their index disagree.
    """
    entries: dict[str, TensorEntry] = {}
    twice = []
    for path in weight_files(source):
        for key, entry in read_header(path).items():
            if key in entries:
                twice.append(key)
            entries[key] = entry
    if not twice and source.is_dir() and (source / INDEX).is_file():
        listed = _weight_map(source)
        absent = [key for key, name in listed.items() if key not in entries or entries[key].path.name != name]
        extra = [key for key in entries if key not in listed]
        if absent or extra:
            problems = [
                f"{what}: {_listed(keys)}"
                for what, keys in (("not in their shard", absent), ("not in the index", extra))
                if keys
            ]
            raise CheckpointError(f"{source / INDEX} and its shards disagree; {'; '.join(problems)}")
    return entries, twice


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(sorted(keys))


def checkpoint_digest(source: Path) -> str:
    """sha256 over keys, dtypes, shapes and bytes in the order of the keys: the same for one file and for any sharding
    of it.

    Raises: CheckpointError as `read_checkpoint` does.
    """
    total = hashlib.sha256()
    entries, twice = read_checkpoint(Path(source))
    complain("a digest", duplicate=twice)
    with _Files() as files:
        for key in sorted(entries):
            entry = entries[key]
            total.update(f"{key} {entry.dtype} {list(entry.shape)}\n".encode())
            for piece in files.pieces(entry):
                total.update(piece)
    return total.hexdigest()


class _Files(contextlib.AbstractContextManager):
    """Open files, read a piece at a time into one buffer, so that memory does not grow with the tensors."""

    def __init__(self):
        self._open: dict[Path, BinaryIO] = {}
        self._buffer = memoryview(bytearray(PIECE))

    def __exit__(self, *exception) -> None:
        for file in self._open.values():
            file.close()

    def pieces(self, entry: TensorEntry, start: int = 0, size: int | None = None) -> Iterator[memoryview]:
        """The bytes of a tensor, or of a part of it; each piece is gone when the next is asked for."""
        if entry.path not in self._open:
            self._open[entry.path] = entry.path.open("rb", buffering=0)
        file, left = self._open[entry.path], entry.size if size is None else size
        file.seek(entry.start + start)
        while left:
            count = file.readinto(self._buffer[: min(left, PIECE)])
            if not count:
                raise CheckpointError(f"{entry.path} became shorter while it was read")
            yield self._buffer[:count]
            left -= count


# -------- rules


@dataclass(frozen=True)
class Rename:
    """One tensor under two names. `{i}` stands for a number. `added` leading axes of size one are on the model's side
    only.
    """

    own: str  # in the layout
    model: str
    added: int = 0

    def owns(self) -> tuple[str, ...]:
        return (self.own,)

    def shapes(self, model: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes in the layout of a tensor that has this one in the model."""
        return [model[self.added :]]


@dataclass(frozen=True)
class Fuse:
    """Several tensors of the layout that are one in the model, joined along their first axis in this order."""

    parts: tuple[str, ...]
    model: str

    def owns(self) -> tuple[str, ...]:
        return self.parts

    def shapes(self, model: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(model[0] // len(self.parts), *model[1:])] * len(self.parts)


Rule = Rename | Fuse


@dataclass(frozen=True)
class Joined:
    """One tensor of the model and where its bytes lie, one part after another."""

    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]


def layout_shapes(
    model: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], layout: str
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes in a layout of a model that has these.

    Raises: CheckpointError that lists every tensor of the model for which the layout has no name.
    """
    result, nameless = {}, []
    for name, shape in model.items():
        rule, number = _rule_of(name, rules)
        if rule is None:
            nameless.append(name)
            continue
        result |= {own.replace("{i}", number): item for own, item in zip(rule.owns(), rule.shapes(shape))}
    if nameless:
        raise CheckpointError(f"the {layout} layout has no place for {_listed(nameless)}")
    return result


def to_model(
    entries: Mapping[str, TensorEntry],
    model: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    layout: str,
    duplicate=(),
) -> dict[str, Joined]:
    """The tensors of a model that must have these names and shapes, out of a checkpoint in the layout of `rules`.

    Raises: CheckpointError that lists every key that is missing, unmatched, duplicate, mis-shaped, or to be joined with
    one of
        another dtype.
    """
    expected = layout_shapes(model, rules, layout)
    shaped = {key: entry for key, entry in entries.items() if key in expected}
    misshaped = [
        f"{key} {list(tensor.shape)} where {list(expected[key])} was expected"
        for key, tensor in shaped.items()
        if tensor.shape != expected[key]
    ]
    result = {}
    for name, shape in model.items():
        rule, number = _rule_of(name, rules)
        parts = tuple(entries[key] for key in (own.replace("{i}", number) for own in rule.owns()) if key in entries)
        if len({part.dtype for part in parts}) > 1:
            misshaped.append(f"{name} of parts in {' and '.join(sorted({part.dtype for part in parts}))}")
        result[name] = Joined(shape, parts)
    complain(
        f"an AIMv2 in the {layout} layout" if layout else "the layout",
        missing=[key for key in expected if key not in entries],
        unmatched=[key for key in entries if key not in expected],
        duplicate=duplicate,
        misshaped=misshaped,
    )
    return result


def _rule_of(name: str, rules: Sequence[Rule]) -> tuple[Rule | None, str]:
    """The rule that makes a tensor of the model, and the number that stands for {i}."""
    for rule in rules:
        match = _pattern(rule.model).fullmatch(name)
        if match:
            return rule, match.groupdict().get("i") or ""
    return None, ""


def complain(where: str, **problems: Sequence[str]) -> None:
    """Raise one CheckpointError that lists every problem, sorted, by its kind; nothing to list raises nothing."""
    told = [
        f"{len(keys)} {kind.replace('misshaped', 'mis-shaped')}: {_listed(keys)}"
        for kind, keys in problems.items()
        if keys
    ]
    if told:
        raise CheckpointError(f"the checkpoint does not fit {where}; {'; '.join(told)}")


@cache
def _pattern(own: str) -> re.Pattern:
    return re.compile(re.escape(own).replace(re.escape("{i}"), r"(?P<i>0|[1-9][0-9]*)"))


@dataclass(frozen=True)
class Output:
    """One tensor to write: its key, and the bytes it takes from the model's tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: Joined
    start: int  # in bytes, within the model's tensor
    size: int


def from_model(model: Mapping[str, Joined], rules: Sequence[Rule], layout: str) -> list[Output]:
    """The tensors of another layout, in the model's order.

    Raises: CheckpointError that lists every tensor for which the layout has no name.
    """
    layout_shapes({name: joined.shape for name, joined in model.items()}, rules, layout)
    outputs = []
    for name, joined in model.items():
        rule, number = _rule_of(name, rules)
        dtype, at = joined.parts[0].dtype, 0
        for own, shape in zip(rule.owns(), rule.shapes(joined.shape)):
            size = math.prod(shape) * _BITS[dtype] // 8
            outputs.append(Output(own.replace("{i}", number), dtype, shape, joined, at, size))
            at += size
    return outputs


# -------- writing


@contextlib.contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A directory to fill that takes the name `destination` when the block ends well, and vanishes when it does not.

    Raises: CheckpointError when something is there already, or it cannot be made.
    """
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new directory")
    aside = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error.strerror}") from None
    try:
        yield aside
        aside.rename(destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_checkpoint(folder: Path, outputs: Sequence[Output]) -> list[str]:
    """Write tensors into `folder`: one file, or as many shards as they come from, with an index. Returns the files'
    names.

    A tensor goes to the shard in which its first bytes lay.
    """
    sources = sorted({output.source.parts[0].path for output in outputs})
    groups = [[output for output in outputs if output.source.parts[0].path == source] for source in sources]
    names = (
        [WEIGHTS]
        if len(groups) == 1
        else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    )
    for name, group in zip(names, groups):
        _write_file(folder / name, group)
    if len(groups) > 1:
        weight_map = {output.key: name for name, group in zip(names, groups) for output in group}
        total = sum(output.size for output in outputs)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    return names


def _write_file(path: Path, outputs: Sequence[Output]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        header[output.key] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, position + output.size],
        }
        position += output.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begin at a multiple of eight
    with path.open("wb") as file, _Files() as files:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for output in outputs:
            for piece in _bytes_of(output, files):
                file.write(piece)


def _bytes_of(output: Output, files: _Files) -> Iterator[bytes]:
    """The bytes [start, start + size) of the joined parts."""
    begin, end, position = output.start, output.start + output.size, 0
    for part in output.source.parts:
        first, last = max(begin, position), min(end, position + part.size)
        if first < last:
            yield from files.pieces(part, first - position, last - first)
        position += part.size


def config_beside(source: Path) -> dict | None:
    """The config.json beside a checkpoint; None where there is none.

    Raises: CheckpointError when it is not a JSON object.
    """
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a config: {_short(error)}") from None
    return config


def write_config(folder: Path, config: Mapping) -> None:
    """Write config.json."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
