"""From a checkpoint to the arguments of a Case."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.checkpoints.conversion import read_header
from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised, recognise
from harness.checkpoints.weights import DTYPE_NAMES, fits_in_float32, require_weights, weights_of
from harness.errors import CheckpointError

FORWARD = "forward"  # the part of a checkpoint that is all of it
SEEDS = (42, 123, 256, 789, 1024)  # of the first part; the others are run with the first of them
MODULES = {  # kind: the module that knows it, with `parts` and `arguments`
    "transformers": "transformers_models",
    "sentence-transformers": "sentence_models",
    "diffusers": "diffusers_models",
    "timm": "timm_models",
    "PEFT": "adapters",
    "AIMv2": "aimv2_models",
    "torch.export": "programs",
    "TorchScript": "programs",
    "function": "functions",
}
_WITHOUT_WEIGHTS = ("function", "torch.export", "TorchScript")  # kinds whose weights are no safetensors files


def parts_of(path: str | Path, asked: Asked | None = None) -> tuple[str, ...]:
    """What can be run of a checkpoint: "forward" first, "decode" and "generate" of a language model, the components of
    a pipeline.

    Raises: CheckpointError.
    """
    result = recognise(path)
    return _module(result).parts(result, asked or Asked())


def require_whole(path: str | Path) -> None:
    """Refuse half a checkpoint before anything is built. Raises: CheckpointError."""
    result = recognise(path)
    if result.path.is_dir():
        require_weights(result.path)


def case_arguments(path: str | Path, *, part: str | None = None, asked: Asked | None = None) -> dict[str, Any]:
    """The arguments of the Case that runs a part of a checkpoint, all but its dtype. `part` None: the first.

    Raises: CheckpointError, in one sentence, for what is no whole checkpoint of a library that is here.
    """
    asked, result = asked or Asked(), recognise(path)
    known = _module(result).parts(result, asked)
    chosen = part or known[0]
    if chosen not in known:
        raise CheckpointError(f"{path} has no part {chosen!r}; it has {', '.join(known)}")
    name = result.name if chosen == FORWARD else f"{result.name}-{chosen}"
    return dict(name=name) | _module(result).arguments(result, chosen, asked)


@functools.lru_cache(maxsize=64)
def stored_dtypes(path: str | Path) -> tuple[str, ...]:
    """The dtypes that the weights are stored in and a Case may have, the commonest first; float32 where none is."""
    result = recognise(path)
    counts: dict[str, int] = {}
    if result.kind not in _WITHOUT_WEIGHTS:
        for file in weights_of(result.path):
            for entry in read_header(file).values():
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.size
    known = [DTYPE_NAMES[name] for name in sorted(counts, key=counts.get, reverse=True) if name in DTYPE_NAMES]
    return tuple(dtype for dtype in known if dtype != "float64") or ("float32",)


def usual_dtypes(path: str | Path) -> tuple[str, ...]:
    """The dtypes in which a checkpoint is run where none is asked for: float32, where the machine has room for it, and
    the one that most of its weights are stored in.
    """
    stored, result = stored_dtypes(path)[0], recognise(path)
    has_room = result.kind in _WITHOUT_WEIGHTS or fits_in_float32(result.path)
    return tuple(dict.fromkeys(["float32", stored] if has_room else [stored]))


def _module(recognised: Recognised) -> ModuleType:
    return importlib.import_module(f"harness.checkpoints.{MODULES[recognised.kind]}")
