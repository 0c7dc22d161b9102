"""The weight files of any checkpoint: whether they are all there."""

from __future__ import annotations

from pathlib import Path

from harness.checkpoints.conversion import INDEX, PICKLES, read_header
from harness.checkpoints.recognition import read_config
from harness.errors import CheckpointError


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
