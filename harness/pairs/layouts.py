"""The folders that other tools dump: the name of each file as the tool pairs it, in the order of execution.

msprobe (github.com/Ascend/msprobe, python/msprobe/core/dump): step0/rank0/ with dump.json, construct.json, stack.json
and dump_tensor_data/Module.layer.Linear.forward.0.output.0.pt (.npy of MindSpore); proc4711/ in place of rank0/ where
nothing is distributed. SGLang (sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py): one folder with files
named by tags, step=0___rank=0___dump_index=7___name=hidden_states___layer_id=3.pt, each a dictionary of "value" and
"meta".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.pairs.files import SUFFIXES, regular, words
from harness.pairs.names import natural
from harness.typed_json import named, unique

LISTS = ("dump.json", "debug.json")  # of msprobe: what was dumped, in this order
DATA = "dump_tensor_data"
OLD_STEP = ("forward_pass_id", "curr_step")  # what older dumpers of SGLang call step
DAMAGED = (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError)  # what a damaged list raises
_LARGEST = 1 << 30  # bytes of a dump.json


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file of a folder."""

    name: str  # the name that it is paired by
    file: Path
    value: bool = False  # it is SGLang's dictionary, of which "value" alone is compared
    refused: str = ""  # why there is no tensor of the name


@dataclass(kw_only=True)
class DumpLayout:
    """The files of a folder, in order."""

    items: list[Item] = field(default_factory=list)
    executed: bool = False  # whether the order is that of execution, not of names


def read_layout(folder: Path, files: Sequence[Path], lists: Sequence[Path]) -> DumpLayout:
    """Recognise the tools' folders under a folder; every other file is named by its path without the suffix.

    `files` may hold tensors, `lists` have the names of `LISTS`.

    Raises: HarnessError where msprobe dumped statistics alone.
    """
    result = DumpLayout()
    rest = list(files)
    for listed in sorted((item for item in lists if _is_list(item)), key=lambda item: natural(item.as_posix())):
        directory = listed.parent
        inside = [argument for argument in rest if argument.parent == directory / DATA]
        rest = [argument for argument in rest if argument.parent != directory / DATA]
        _msprobe(result, folder, directory, listed, inside)
    tagged = {argument: tags for argument in rest if (tags := _tags(argument)) is not None}
    _sglang(result, folder, tagged)
    result.items += [
        Item(name=argument.relative_to(folder).with_suffix("").as_posix(), file=argument)
        for argument in rest
        if argument not in tagged
    ]
    return result


# -------- msprobe


def _is_list(file: Path) -> bool:
    """Whether a dump.json is msprobe's: its first bytes say what was dumped."""
    if not file.is_file():
        return (file.parent / DATA).is_dir()
    with open(file, "rb") as opened:
        start = opened.read(4096)
    return (file.parent / DATA).is_dir() or (b'"task"' in start and b'"dump_data_dir"' in start)


def _msprobe(result: DumpLayout, folder: Path, directory: Path, listed: Path, files: Sequence[Path]) -> None:
    prefix = _step_and_rank(folder, directory)
    by_name = {item.name: item for item in files}
    try:
        document = _read_json(listed)
        data = document["data"]
        entries = {name: list(_data_names(entry)) for name, entry in data.items()}
    except DAMAGED as error:
        result.items.append(_unread(prefix, listed, error))
        entries, document = {}, None
    try:
        parents = _parents(directory / "construct.json")
    except DAMAGED as error:
        result.items.append(_unread(prefix, directory / "construct.json", error))
        parents = {}
    if document is not None and not by_name and not any(entries.values()):
        task = named(document.get("task"))
        raise HarnessError(
            f'{listed} was dumped with the task {task}, which saves no tensors; dump again with "task": "tensor" in'
            " msprobe's config.json"
        )
    result.executed = True
    seen = set()
    for data_name in _executed(entries, parents):
        name = f"{prefix}{_stem(data_name)}"
        if data_name in seen:
            continue
        seen.add(data_name)
        lost = (
            f"{listed.name} names {named(data_name)}, and {DATA} has no such file: the dump is not complete, dump again"
        )
        known = by_name.get(data_name)
        result.items.append(Item(name=name, file=known or listed, refused="" if known else lost))
    result.items += [
        Item(name=f"{prefix}{_stem(item.name)}", file=item)
        for item in sorted(files, key=lambda item: natural(item.name))
        if item.name not in seen
    ]


def _unread(prefix: str, file: Path, error: Exception) -> Item:
    return Item(name=f"{prefix}{file.name}", file=file, refused=f"cannot read {file.name}: {words(error)}")


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.lower().endswith(SUFFIXES) else name


def _step_and_rank(folder: Path, directory: Path) -> str:
    """step0/rank0/; a process's number, which no two runs share, is left away where its step has one process alone."""
    parts = list(directory.relative_to(folder).parts)
    if (
        parts
        and re.fullmatch(r"proc[0-9]+", parts[-1])
        and len([path for path in directory.parent.iterdir() if path.name.startswith("proc")]) == 1
    ):
        parts[-1] = "proc"
    return "".join(f"{part}/" for part in parts)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; msprobe writes NaN as a literal."""
    if regular(file) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    return json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=unique)


def _data_names(entry: Any) -> Iterator[tuple[bool, str]]:
    """(whether it is an output, the file) of every tensor of one call, inputs and parameters first."""
    outputs = entry.get("output") if isinstance(entry, dict) else None
    inputs = {name: item for name, item in entry.items() if name != "output"} if isinstance(entry, dict) else entry
    yield from ((False, leaf) for leaf in _leaves(inputs))
    yield from ((True, leaf) for leaf in _leaves(outputs))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("data_name"), str) and "type" in value:
            yield value["data_name"]
            return
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _leaves(item)


def _parents(file: Path) -> dict[str, str | None]:
    """construct.json: the module that a call was made in; [module, micro step] where Megatron runs."""
    if not file.exists():
        return {}
    result = _read_json(file)
    return {
        name: item[0] if isinstance(item, list) and item else item
        for name, item in result.items()
        if isinstance(item, (str, list, type(None)))
    }


def _executed(entries: dict[str, list[tuple[bool, str]]], parents: dict[str, str | None]) -> Iterator[str]:
    """The files in the order of execution: a module's inputs come before the calls inside it, its outputs after them.

    dump.json has a module's inputs and outputs at one place, so that its output would stand before the operators that
    made it.
    """
    order = {name: index for index, name in enumerate(entries)}
    inside: dict[str | None, list[str]] = {}
    for name in entries:
        inside.setdefault(_known_parent(name, parents, order), []).append(name)
    first = dict(order)
    for name, index in order.items():  # a module begins where the first call inside it does
        parent, seen = _known_parent(name, parents, order), {name}
        while parent is not None and parent not in seen and index < first[parent]:
            first[parent] = index
            seen.add(parent)
            parent = _known_parent(parent, parents, order)
    left, stack = set(entries), [(name, False) for name in sorted(inside.get(None, []), key=first.get, reverse=True)]
    while stack:
        name, done = stack.pop()
        if done:
            yield from (file for output, file in entries[name] if output)
        elif name in left:
            left.discard(name)
            yield from (file for output, file in entries[name] if not output)
            stack.append((name, True))
            stack += [(item, False) for item in sorted(inside.get(name, []), key=first.get, reverse=True)]
    for name in sorted(left, key=order.get):  # a damaged construct.json has these inside themselves
        yield from (file for _, file in entries[name])


def _known_parent(name: str, parents: dict[str, str | None], order: dict[str, int]) -> str | None:
    """The nearest module around a call that was dumped too."""
    parent, seen = parents.get(name), {name}
    while parent is not None and parent not in order and parent not in seen:
        seen.add(parent)
        parent = parents.get(parent)
    return parent if parent in order and parent != name else None


# -------- SGLang


def _tags(file: Path) -> dict[str, str] | None:
    """The tags in a name of SGLang's dumper; None where it is not one."""
    if file.suffix != ".pt" or "___" not in file.stem or "dump_index=" not in file.stem:
        return None
    tags: dict[str, str] = {}
    key = ""
    for part in file.stem.split("___"):
        before, equals, value = part.partition("=")
        if equals and (before.isidentifier() or not key):
            key = before
            tags[key] = value
        elif key:
            tags[key] += f"___{part}"
    return tags if "name" in tags and re.fullmatch(r"[0-9]{1,18}", tags.get("dump_index", "")) else None


def _sglang(result: DumpLayout, folder: Path, tagged: dict[Path, dict[str, str]]) -> None:
    """Name by every tag but dump_index, as SGLang's comparator does; the second of a name is duplicate_index=1."""
    if not tagged:
        return
    result.executed = True
    alone = len({path.parent for path in tagged}) == 1  # the folder is named after the time of the run
    counts: dict[str, int] = {}
    for file in sorted(
        tagged, key=lambda path: (natural(path.parent.as_posix()), int(tagged[path]["dump_index"]), natural(path.name))
    ):
        prefix = "" if alone else f"{file.parent.relative_to(folder).as_posix()}/".removeprefix("./")
        name = prefix + _sglang_name(tagged[file])
        count = counts[name] = counts.get(name, -1) + 1
        result.items.append(Item(name=f"{name} duplicate_index={count}" if count else name, file=file, value=True))


def _sglang_name(tags: dict[str, str]) -> str:
    tags = {("step" if key in OLD_STEP else key): value for key, value in tags.items()}
    if tags.get("recompute_status") == "disabled":  # older dumpers have no such tag
        del tags["recompute_status"]
    leading = [key for key in ("step", "rank") if key in tags]
    others = sorted(key for key in tags if key not in ("name", "dump_index", *leading))
    return " ".join([tags["name"], *(f"{key}={tags[key]}" for key in (*leading, *others))])
