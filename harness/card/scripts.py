"""The scripts of a model card's repository, and their run in a fresh process before they are offered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.card.rendering import FOLDER, rendered
from harness.case import Case
from harness.checkpoints.recognition import Recognised
from harness.devices import Device
from harness.errors import HarnessError
from harness.run.cpu import inputs_of

INFERENCE = "inference.py"
AIMV2 = ("modeling_aimv2_distilled.py", "configuration_aimv2_distilled.py", "convert_weights.py")
_LIMIT = 1800.0  # seconds for a script
# Runs a script in which no line imports the harness; that of the emulated device may go on to import its own.
_GUARD = """import runpy, sys

class WithoutHarness:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "harness":
            return None
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib")):
            frame = frame.f_back
        if frame is None or frame.f_globals.get("__name__", "").partition(".")[0] != "harness":
            raise ImportError("this script must do without " + name)

sys.meta_path.insert(0, WithoutHarness())
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, kw_only=True)
class DrawnInput:
    """An input tensor as inference.py draws it: whole numbers between two, or normal fractions."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    least: int | None = None
    largest: int | None = None


def drawn_inputs(case: Case) -> tuple[list[DrawnInput], dict[str, Any], bool]:
    """The case's input tensors, its arguments that are no tensors, and whether they are given by position."""
    inputs = inputs_of(case, 42)
    positional = not isinstance(inputs, Mapping)
    if isinstance(inputs, Tensor):
        named: Mapping[str, Any] = {"": inputs}
    elif positional:
        named = {str(number): value for number, value in enumerate(inputs)}
    else:
        named = inputs
    drawn = [_drawn(name, value) for name, value in named.items() if isinstance(value, Tensor)]
    plain = (bool, int, float, str, type(None))
    given = {name: value for name, value in named.items() if isinstance(value, plain)}
    left_out = named.keys() - {item.name for item in drawn} - given.keys()
    if left_out:
        raise HarnessError(f"inference.py cannot draw {', '.join(sorted(left_out))}")
    return drawn, given, positional


def _drawn(name: str, value: Tensor) -> DrawnInput:
    how = dict(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape))
    whole = not value.is_floating_point()
    if value.is_floating_point() and value.numel():
        whole = bool((value == value.round()).all()) and float(value.abs().max()) < 2**24
    if not whole or not value.numel():
        return DrawnInput(**how)
    least, largest = int(value.min()), int(value.max())
    if name.endswith("mask") and (least, largest) == (0, 1):
        least = 1  # a drawn mask may hide all of a sequence
    return DrawnInput(**how, least=least, largest=largest)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a script printed, and whether it ended well."""

    command: str
    printed: str
    well: bool


def write_scripts(folder: Path, recognised: Recognised, case: Case, values: Mapping[str, Any]) -> list[str]:
    """Write inference.py and what it needs; returns the files' names."""
    drawn, given, positional = drawn_inputs(case)
    takes = dict(values["takes"])
    processor = takes["text"] and takes["image"]
    files = " or ".join(f"arguments.{name}" for name in ("text", "image") if takes[name])
    context = {
        **values,
        "kind": recognised.kind,
        "drawn": drawn,
        "given": given,
        "positional": positional,
        "processor": processor,
        "given_files": files or "False",
        "default_directory": recognised.name,
        "side": drawn[0].shape[-1] if recognised.kind == "AIMv2" and drawn else None,
    }
    names = [INFERENCE]
    (folder / INFERENCE).write_text(rendered("inference.py.j2", context), encoding="utf-8")
    if recognised.kind == "AIMv2":
        for name in AIMV2:
            shutil.copy(FOLDER / "aimv2" / f"{name}.j2", folder / name)
        names += AIMV2
    (folder / "requirements.txt").write_text(rendered("requirements.txt.j2", context), encoding="utf-8")
    return [*names, "requirements.txt"]


def run_script(folder: Path, model_dir: Path, device: Device, arguments: Sequence[str]) -> Ran:
    """Run inference.py of a folder in a fresh process in which the harness cannot be imported by it."""
    spec = "cpu" if device.torch_device.type == "cpu" else str(device.torch_device)
    script = [INFERENCE, "--model-dir", str(model_dir.resolve()), "--device", spec, *arguments]
    guard = folder / ".guard.py"
    guard.write_text(_GUARD, encoding="utf-8")
    command = [sys.executable]
    if device.backend == "emulated":
        command += ["-m", "harness", "emulate"]
    try:
        done = subprocess.run(
            [*command, guard.name, *script],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            errors="replace",
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        return Ran(command=" ".join(script), printed=f"it did not end within {_LIMIT:.0f} s", well=False)
    finally:
        guard.unlink()
    printed = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    if not device.kind.hardware:
        printed = re.sub(r"(?m)^forward .*\n?", "", printed)  # a time that says nothing about hardware
    shown = f"python {' '.join([INFERENCE, '--device', spec, *arguments])}"
    return Ran(command=shown, printed=_without_paths(printed, folder, model_dir), well=done.returncode == 0)


def _without_paths(text: str, *folders: Path) -> str:
    """A text that names no folder of this machine."""
    for folder in folders:
        text = text.replace(str(folder.resolve()), folder.name).replace(str(folder), folder.name)
    return text


def _environment() -> dict[str, str]:
    """That of this process, with the harness found where it is imported from."""
    import harness

    root = str(Path(harness.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
