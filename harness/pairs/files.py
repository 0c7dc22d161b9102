"""The formats of files that hold tensors: names, shapes and dtypes before any data is read, then each tensor.

What a header claims is held against the bytes that the file has. No pickle runs: `torch.load` reads with weights_only,
after `pickled` has looked at it, and numpy without pickle.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.pairs.pickled import Pickled, read_pickle
from harness.typed_json import encodable, named, shown

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 512 << 20  # bytes that a tensor may take in memory beyond those that its file holds: --max-inflated
SMALL_FILE = 1 << 20  # bytes up to which a .pt file is read whole, and may be kept until its tensors are compared
VALUES = 1_000_000  # tensors, numbers and containers that one .pt file may name
_HEADER = 100_000_000  # bytes of a safetensors header, the limit of that format


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without "torch."; numpy's where torch has none
    memory: int  # bytes that it takes when read
    stored: int  # bytes that the file holds for it


@dataclass(frozen=True, kw_only=True)
class Holder:
    """An open file: headers by the name inside it, refused names with the reason, and the way to read a tensor."""

    headers: Mapping[str, Header]
    read: Callable[[str], Tensor]
    refused: Mapping[str, str]
    whole: int | None = None  # bytes of the tensors that are in memory already, where all are and no file is open


def open_tensors(file: Path, limit: int) -> Holder:
    """Open a file of one of `SUFFIXES` and read its headers.

    Raises: ValueError, OSError or what the library of the format raises, where it is no regular file or is damaged.
    """
    regular(file)
    return OPENERS[file.suffix.lower()](file, limit)


def regular(path: Path) -> int:
    """The size of a regular file in bytes, links followed.

    Raises: ValueError for a named pipe, a socket, a device or a folder, which would block or hold no bytes; OSError
    where there is nothing.
    """
    result = os.stat(path)
    if not stat.S_ISREG(result.st_mode):
        raise ValueError(f"it is {_kind(result.st_mode)} where a regular file was expected; write the tensors into one")
    return result.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a named pipe (FIFO)", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder"}
    return next((kind for of, kind in kinds.items() if of(mode)), "a device")


def size_text(size: int) -> str:
    """A number of bytes with a binary unit: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{size:.4g} {unit}"
        size = size / 1024
    return f"{size:.4g} TiB"


def _allocated(file: Path) -> float:
    """The bytes that the disk holds for a file with holes or without; infinite where the system does not say."""
    blocks = getattr(os.stat(file), "st_blocks", 0)
    return blocks * 512 if blocks else math.inf


# -------- safetensors


_SAFE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _safetensors(file: Path, limit: int) -> Holder:
    from safetensors import safe_open

    size, allocated = regular(file), _allocated(file)
    with safe_open(file, framework="pt"):  # it checks that the offsets cover the file
        pass

    def read(name: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:  # anew, so that what was read does not stay in memory
            return opened.get_tensor(name)

    entries, twice = _safetensors_header(file, size)
    headers = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        shape = tuple(int(item) for item in entry["shape"])
        headers[name] = Header(
            shape=shape,
            dtype=_SAFE.get(entry["dtype"], entry["dtype"].lower()),
            memory=end - begin,
            stored=min(end - begin, allocated),
        )
    refused = {name: f"two keys of its header are called {named(name)}, and one would hide the other" for name in twice}
    return Holder(headers=headers, read=read, refused=refused)


def _safetensors_header(file: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    twice: list[str] = []

    def dict_of(pairs):
        names = [name for name, _ in pairs]
        twice.extend({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ())
        return dict(pairs)

    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(_HEADER, size - 8):
            raise ValueError(
                f"its header claims {size_text(length)} where the file holds {size_text(size)}; write it again"
            )
        entries = json.loads(opened.read(length).decode("utf-8"), object_pairs_hook=dict_of)
    entries.pop("__metadata__", None)
    return entries, [name for name in twice if name in entries]


# -------- npz


def _npy(file: Path, limit: int) -> Holder:
    import numpy

    size = regular(file)
    with open(file, "rb") as opened:
        header, claimed = _npy_header(opened, min(size, _allocated(file)))
        available = size - opened.tell()
    if claimed > available:
        raise ValueError(
            f"its header claims {size_text(claimed)} of data where the file holds {size_text(available)}; it was cut"
            " short, write it again"
        )
    return Holder(headers={"": header}, read=lambda _: _tensor(numpy.load(file, allow_pickle=False)), refused={})


def _npy_header(opened, stored: float) -> tuple[Header, int]:
    """The header of a .npy at the start of an open file, and the bytes of data that it claims."""
    from numpy.lib import format as npy

    version = npy.read_magic(opened)
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(opened)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run code; save an array of numbers")
    if any(item < 0 for item in shape):
        raise ValueError(f"its header claims the shape {tuple(shape)}")
    claimed = math.prod(shape) * dtype.itemsize
    return Header(shape=tuple(shape), dtype=dtype.name, memory=claimed, stored=int(min(stored, claimed))), claimed


def _npz(file: Path, limit: int) -> Holder:
    import numpy

    headers, refused, members = {}, {}, {}
    with zipfile.ZipFile(file) as archive:
        for number, member in enumerate(archive.infolist(), 1):
            name = member.filename.removesuffix(".npy")
            if name in members:
                before, first = members[name]
                refused[name] = (
                    f"two members are called {named(name)}: {named(first)} (member {before}) and"
                    f" {named(member.filename)} (member {number})"
                )
                continue
            members[name] = (number, member.filename)
            try:
                with archive.open(member) as opened:
                    header, claimed = _npy_header(opened, member.compress_size)
                    available = member.file_size - opened.tell()
                if claimed > available:
                    raise ValueError(
                        f"its header claims {size_text(claimed)} of data where the member holds {size_text(available)}"
                    )
                headers[name] = header
            except Exception as error:  # noqa: BLE001  zlib, lzma and numpy each have their own
                refused[name] = f"cannot read the member {named(member.filename)}: {words(error)}"

    archive = numpy.load(file, allow_pickle=False)
    return Holder(headers=headers, read=lambda name: _tensor(archive[members[name][1]]), refused=refused)


def _tensor(array) -> Tensor:
    import torch

    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(
        array.copy() if not array.flags.writeable or any(step < 0 for step in array.strides) else array
    )


# -------- pt


def _pt(file: Path, limit: int) -> Holder:
    import torch

    with open(file, "rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    looked, mapped = _zipped(file, limit) if zipped else (_legacy(file), False)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, **({"mmap": True} if mapped else {}))
    except Exception as error:  # noqa: BLE001
        raise _without_advice(error) from None
    tensors, refused = _flat(loaded)
    for key in looked.twice:
        refused |= {
            name: f"the key {named(key)} stands twice in one dictionary, and one would hide the other"
            for name in _under(key, tensors) or [key]
        }
    allocated = _allocated(file)
    headers = {}
    for name, tensor in tensors.items():
        try:
            headers[name] = _pt_header(tensor, allocated)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # a layout without a shape
            refused[name] = f"its shape cannot be read: {words(error)}"
    whole = None if mapped else sum(header.stored for header in headers.values())
    return Holder(headers=headers, read=lambda name: _dense(tensors[name]), refused=refused, whole=whole)


def _zipped(file: Path, limit: int) -> tuple[Pickled, bool]:
    """What a zip of torch.save claims, and whether its storages can be mapped, so that no data is read yet."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        sizes: dict[str, int] = {}
        for member in members:
            if member.filename in sizes:
                raise ValueError(f"two members are called {named(member.filename)}, and one would hide the other")
            sizes[member.filename] = member.file_size
        grown = sum(member.file_size - member.compress_size for member in members)
        if grown > limit:
            raise ValueError(_inflated(sum(sizes.values()), sum(member.compress_size for member in members), limit))
        pickle = next((name for name in sizes if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if pickle is None:
            raise ValueError("it is a zip without data.pkl, which torch.save writes")
        looked = read_pickle(io.BytesIO(archive.read(pickle)))
    root = pickle.removesuffix("data.pkl")
    for key, claimed in looked.claims.items():
        available = sizes.get(f"{root}data/{key}", 0)
        if claimed > available:
            raise ValueError(
                f"its storage {named(key)} claims {size_text(claimed)} where the file holds {size_text(available)}; it "
                "is damaged, write it again"
            )
    mappable = str(file).isascii() or encodable(str(file)) == str(file)  # torch maps no name that is not UTF-8
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return looked, mappable and stored and regular(file) > SMALL_FILE


def _legacy(file: Path) -> Pickled:
    """What a file of torch.save before 1.6 claims: three pickles stand before that of the object."""
    size = regular(file)
    with open(file, "rb") as opened:
        looked = read_pickle(opened)
        for _ in range(3):
            if not opened.peek(1):  # a pickle that torch.save did not write
                break
            looked = read_pickle(opened)
    claimed = sum(looked.claims.values())
    if claimed > size:
        raise ValueError(
            f"its storages claim {size_text(claimed)} where the file holds {size_text(size)}; it is damaged, write"
            " it again"
        )
    return looked


def _without_advice(error: Exception) -> Exception:
    """torch's refusal without its advice to load the file unsafely."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused is not None:
        wanted = shown(refused.group(1))
        return ValueError(
            f"it asks for {wanted}, which may run code, so it is not read; save the tensors alone, in a dictionary"
        )
    first = text.split("\n")[0]
    return (
        type(error)(first.split("Re-running")[0])
        if type(error) in (RuntimeError, ValueError, TypeError, EOFError)
        else ValueError(first)
    )


def _flat(value: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and numbers in nested containers by name, and the names that two of them have."""
    tensors: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    refused: dict[str, str] = {}
    for count, (name, path, tensor) in enumerate(_nested(value, "", "")):
        if count > VALUES:
            raise ValueError(f"it names more than {VALUES:,} values")
        if tensor is None:
            continue
        if name in tensors:
            refused[name] = f"two tensors in it have the name {named(name)}: {paths[name]} and {path}"
            continue
        tensors[name], paths[name] = tensor, path
    return tensors, refused


def _nested(value: Any, name: str, path: str) -> Iterator[tuple[str, str, Tensor | None]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, path, value
    elif isinstance(value, (bool, int, float, complex)):  # a loss, a step
        yield name, path, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    else:
        yield name, path, None
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        for key, item in items:
            yield from _nested(item, f"{name}.{key}" if name else str(key), f"{path}[{shown(repr(key))}]")


def _under(key: str, names: Mapping[str, Any]) -> list[str]:
    """The names that a key is a part of."""
    return [name for name in names if f".{key}." in f".{name}."]


def _pt_header(tensor: Tensor, allocated: float) -> Header:
    import torch

    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    memory = math.prod(shape) * tensor.element_size()
    if tensor.layout is torch.strided and not tensor.is_meta:
        stored = tensor.untyped_storage().nbytes()
    else:
        stored = tensor._values().nbytes if tensor.layout is torch.sparse_coo else 0
    return Header(shape=shape, dtype=dtype, memory=memory, stored=int(min(stored, memory, allocated)))


def _dense(tensor: Tensor) -> Tensor:
    import torch

    tensor = tensor.detach()
    return tensor if tensor.layout is torch.strided or tensor.is_meta else tensor.to_dense()


def _inflated(memory: int, stored: int, limit: int) -> str:
    return (
        f"it takes {size_text(memory)} in memory where the file holds {size_text(stored)}; a tensor may take"
        f" {size_text(limit)} more than the file"
        f" holds; give --max-inflated={math.ceil((memory - stored) / (1 << 20))}MiB where that is meant"
    )


def inflated(header: Header, limit: int) -> str | None:
    """Why a tensor is not read: it takes more memory than its bytes in the file and `limit`; None where it is."""
    return _inflated(header.memory, header.stored, limit) if header.memory - header.stored > limit else None


def words(error: Exception) -> str:
    """An exception on one line of printable text; a ValueError says in its own words what is wrong."""
    text = shown(" ".join(str(error).split()), 400)
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


OPENERS = {".safetensors": _safetensors, ".npy": _npy, ".npz": _npz, ".pt": _pt, ".pth": _pt, ".bin": _pt, ".ckpt": _pt}
SUFFIXES = tuple(OPENERS)
