"""What a checkpoint is, told by its files: no library is imported and nothing is loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.checkpoints.conversion import CONFIG, PICKLES
from harness.errors import CheckpointError
from harness.models.aimv2_layouts import is_tower_config

_KINDS = (
    "sentence-transformers",
    "PEFT",
    "diffusers",
    "timm",
    "transformers",
    "AIMv2",
    "torch.export",
    "TorchScript",
    "function",
)
_MARKS = {  # the files that tell a directory, and what they are a sign of
    "modules.json": "sentence-transformers",
    "adapter_config.json": "PEFT",
    "model_index.json": "diffusers",
    CONFIG: "transformers, diffusers, timm or AIMv2",
}
PROGRAMS = (".pt2", ".pt", ".pth", ".ts", ".torchscript")  # suffixes of files that may be programs


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A checkpoint and its kind; `fields` is what the file that tells it holds."""

    kind: str  # one of `_KINDS`
    path: Path  # a directory or a file; of a function "module:function"
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def name(self) -> str:
        """What its rows are called."""
        if self.kind == "function":
            return str(self.path).replace(":", ".")
        resolved = self.path.resolve()
        return resolved.stem if resolved.is_file() else resolved.name


def recognise(given: str | Path) -> Recognised:
    """The kind of a checkpoint: a directory, a file with a program, or `module:function`.

    Raises: CheckpointError, in one sentence, where there is none, or one of no kind that is known.
    """
    path = Path(given)
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    module, _, function = str(given).rpartition(":")
    if module and all(part.isidentifier() for part in [*module.split("."), function]):
        return Recognised(kind="function", path=path)
    raise CheckpointError(
        f"no checkpoint at {given}; give a directory with a {CONFIG}, a .pt2 or TorchScript file, or module:function"
    )


def is_aimv2(given: str | Path) -> bool:
    """Whether a path is a checkpoint of AIMv2, or one that only the loader of AIMv2 can speak of: an absent path, or
    none that is recognised.
    """
    if not Path(given).exists():
        return ":" not in str(given)
    return recognise(given).kind == "AIMv2"


def checkpoints_in(given: str | Path) -> list[str | Path]:
    """The checkpoints that a path names: itself, or of a folder that is none its folders and programs that are, sorted.

    Raises: CheckpointError where there is none.
    """
    path = Path(given)
    if not path.is_dir() or _is_marked(path) or _weights_in(path):
        return [given]
    result = [item for item in sorted(path.iterdir()) if _looks_like_one(item)]
    if not result:
        raise CheckpointError(
            f"{path} holds no checkpoint, and neither do its folders; "
            f"a directory with one of {', '.join(_MARKS)} was expected"
        )
    return list(result)


def _read_json(path: Path) -> dict[str, Any] | list[Any]:
    """What a JSON file of a checkpoint holds. Raises: CheckpointError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again") from None


def read_config(path: Path) -> dict[str, Any]:
    """What a JSON file with one object holds. Raises: CheckpointError where it holds something else."""
    result = _read_json(path)
    if not isinstance(result, dict):
        raise CheckpointError(f"{path} holds a JSON {type(result).__name__} where an object was expected")
    return result


def _directory(path: Path) -> Recognised:
    if (path / "modules.json").is_file():
        return Recognised(
            kind="sentence-transformers", path=path, fields={"modules": _read_json(path / "modules.json")}
        )
    for name, kind in (("adapter_config.json", "PEFT"), ("model_index.json", "diffusers")):
        if (path / name).is_file():
            return Recognised(kind=kind, path=path, fields=read_config(path / name))
    if not (path / CONFIG).is_file():
        return _without_config(path)
    fields = read_config(path / CONFIG)
    return Recognised(kind=_kind_of_config(path, fields), path=path, fields=fields)


def _kind_of_config(path: Path, fields: dict[str, Any]) -> str:
    if "_class_name" in fields:
        return "diffusers"
    if is_tower_config(fields):
        return "AIMv2"
    if "architecture" in fields or "pretrained_cfg" in fields:
        return "timm"
    if "architectures" in fields or "model_type" in fields:
        return "transformers"
    if fields.keys() & {"patch_size", "num_attention_heads"} and _weights_in(path):
        return "AIMv2"  # a bare config of heads and eps beside the weights; its keys are checked when it is loaded
    raise CheckpointError(
        f"{path / CONFIG} names no model: it has none of architectures, model_type, _class_name and architecture; "
        "save the model by its library's save_pretrained"
    )


def _without_config(path: Path) -> Recognised:
    """A directory without any file that tells: bare weights are AIMv2's, whose keys are checked when it is loaded."""
    if [*path.glob("*.safetensors")]:
        return Recognised(kind="AIMv2", path=path)
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} holds pickles only ({', '.join(pickles)}), which are never read; save the model as safetensors "
            f"with its {CONFIG}"
        )
    raise CheckpointError(f"{path} holds no checkpoint; one of {', '.join(_MARKS)} was expected in it")


def _file(path: Path) -> Recognised:
    if path.suffix == ".safetensors":
        return Recognised(kind="AIMv2", path=path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is neither a checkpoint directory, a torch.export program, a TorchScript file nor safetensors; "
            f"of a checkpoint give the directory that holds its {CONFIG}"
        )
    with zipfile.ZipFile(path) as archive:
        names = [text.split("/", 1)[-1] for text in archive.namelist()]
    if any(name.startswith("code/") for name in names) and "constants.pkl" in names:
        return Recognised(kind="TorchScript", path=path)
    if any(name == "archive_format" or "serialized_exported_program" in name for name in names):
        return Recognised(kind="torch.export", path=path)
    raise CheckpointError(
        f"{path} is a pickle, which can run any program and is never read; save the model as safetensors with its "
        f"{CONFIG}, or as a program by torch.export.save"
    )


def _is_marked(path: Path) -> bool:
    return any((path / name).is_file() for name in _MARKS)


def _weights_in(path: Path) -> bool:
    return any(item.suffix in (".safetensors", *PICKLES) for item in path.iterdir() if item.is_file())


def _looks_like_one(path: Path) -> bool:
    if path.is_dir():
        return _is_marked(path) or _weights_in(path)
    return path.suffix in PROGRAMS
