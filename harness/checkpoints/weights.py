"""The weight files of any checkpoint: whether they are all there, and whether the host has room for them."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from harness.checkpoints.conversion import INDEX, PICKLES, read_header, weight_files
from harness.checkpoints.recognition import read_config
from harness.errors import CheckpointError, MemoryLimitError
from harness.reference.memory import GIB, Policy, SizeInMemory, needed

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of the format: torch's name


def weights_of(path: Path) -> list[Path]:
    """The safetensors files under a directory, sorted; a file is its own weights."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def require_weights(path: Path) -> None:
    """Refuse half a checkpoint: no safetensors file, one that is cut off, or shards that an index names and that are
    absent.

    Raises: CheckpointError.
    """
    result = weights_of(path)
    if not result:
        pickles = sorted(item.name for item in path.rglob("*") if item.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{path} holds pickles only ({', '.join(pickles[:3])}), which are never read; save the model as "
                "safetensors"
            )
        raise CheckpointError(f"{path} holds a config and no weights; copy its .safetensors files too")
    for index in path.rglob("*.safetensors.index.json"):
        named = sorted(set(read_config(index).get("weight_map", {}).values()))
        missing = [item for item in named if not (index.parent / item).is_file()]
        if missing:
            raise CheckpointError(
                f"{index.parent} lacks {len(missing)} of {len(named)} shards that {index.name or INDEX} names: "
                f"{', '.join(missing)}"
            )
    for item in result:
        read_header(item)


def size_of_weights(path: Path) -> SizeInMemory:
    """The floating-point weights of a checkpoint by the headers of its files, as if all lay in mapped files."""
    elements: dict[str, int] = {}
    largest = 0
    for file in _files(path):
        for entry in read_header(file).values():
            if entry.dtype in DTYPE_NAMES:
                count = math.prod(entry.shape)
                elements[DTYPE_NAMES[entry.dtype]] = elements.get(DTYPE_NAMES[entry.dtype], 0) + count
                largest = max(largest, count)
    total = sum(elements.values())
    commonest = max(elements, key=elements.get, default="float32")
    return SizeInMemory(parameters=total, largest=largest, mapped=total, built_in=commonest)


def _files(path: Path) -> list[Path]:
    """The files that a library reads: those that an index names, where the directory has one."""
    try:
        return weight_files(path)
    except CheckpointError:  # several files without an index, as the parts of a pipeline are
        return weights_of(path)


def require_room(path: Path, dtype: torch.dtype) -> None:
    """Refuse to load weights in a dtype in which they do not fit into this machine's memory, before any is read.

    Weights that are loaded in the dtype in which they are stored stay the pages of their file and need no room.

    Raises: MemoryLimitError.
    """
    size, name = size_of_weights(path), str(dtype).removeprefix("torch.")
    room = Policy.here().room
    need = size.loaded_in(name).bytes
    if room is None or need <= room:
        return
    raise MemoryLimitError(
        f"{path}: {size.parameters:,} weights in {name} need {need / GIB:.1f} GiB of host memory, and "
        f"{room / GIB:.1f} GiB are left; use {size.built_in}, in which they are stored and are read where they lie, "
        "or a machine with more memory"
    )


def fits_in_float32(path: Path) -> bool:
    """Whether a case of the checkpoint in float32 has room in the memory that this machine has in all.

    Asked when tests are collected: every worker of a run gets the same answer, whatever is in use just then.
    """
    size, policy = size_of_weights(path).loaded_in("float32"), Policy.here()
    if policy.memory is None:
        return True
    return needed(size, "float32", layers=True, separate=True).host <= policy.memory.total // policy.workers
