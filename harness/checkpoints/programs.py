"""Programs that torch itself saved: of torch.export and of TorchScript."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints.libraries import loading
from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised
from harness.errors import CheckpointError

PICTURE = 224  # pixels of the edge of a picture that a convolution is given where no example says more


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """One: the program's own forward."""
    return ("forward",)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The arguments of the Case that runs a program."""
    if asked.own_files:
        raise CheckpointError(
            f"{recognised.path} is a program without a tokenizer or a processor: leave --precision-text, "
            f"--precision-image and --precision-audio out, or put tensors into {_beside(recognised.path).name}"
        )
    if recognised.kind == "torch.export":
        note = "the inputs are drawn by seed like the examples in the program"
        return dict(
            model=LoadExported(recognised.path), inputs=DrawExported(recognised.path), notes=(note,), forward=_spread
        )
    note = f"the inputs are noise, drawn by seed: there is no {_beside(recognised.path).name} beside the program"
    notes = () if _beside(recognised.path).is_file() else (note,)
    return dict(model=LoadScript(recognised.path), inputs=DrawScript(recognised.path, asked), notes=notes)


def _spread(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The program called with its positional arguments and its keywords."""
    return model(*inputs["args"], **inputs["kwargs"])


def drawn_like(example: Any, generator: torch.Generator) -> Any:
    """Tensors of the shapes and dtypes of an example: fractions of its mean and deviation, integers of its range."""
    if isinstance(example, dict):
        return {name: drawn_like(item, generator) for name, item in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(drawn_like(item, generator) for item in example)
    if not isinstance(example, Tensor) or not example.numel():
        return example
    if example.dtype == torch.bool:
        return example.clone()
    if example.is_floating_point():
        wide = example.double()
        spread_of = float(wide.std()) if example.numel() > 1 else 0.0
        noise = torch.randn(example.shape, generator=generator, dtype=torch.float64)
        return (float(wide.mean()) + (spread_of or 1.0) * noise).to(example.dtype)
    if example.is_complex():
        return torch.randn(example.shape, generator=generator, dtype=example.dtype)
    low, high = int(example.min()), int(example.max())
    if low == high:
        return example.clone()  # a mask of ones, or a number that counts something
    return torch.randint(low, high + 1, example.shape, generator=generator, dtype=example.dtype)


# -------- torch.export


@functools.lru_cache(maxsize=2)
def _exported(path: Path) -> Any:
    with loading(f"the exported program {path}"):
        return torch.export.load(str(path))


@dataclass(frozen=True)
class LoadExported:
    """Builds the module of an exported program. Raises: CheckpointError."""

    path: Path

    def __call__(self) -> nn.Module:
        with loading(f"the exported program {self.path}"):
            return _exported(self.path).module()


@dataclass(frozen=True)
class DrawExported:
    """Draws what an exported program is given, like the examples that are saved in it. Raises: CheckpointError."""

    path: Path

    def __call__(self, generator: torch.Generator) -> dict[str, Any]:
        examples = _exported(self.path).example_inputs
        if examples is None:
            raise CheckpointError(
                f"{self.path} holds no example inputs; save it by torch.export.save of a program that has them"
            )
        args, kwargs = examples
        return {"args": drawn_like(tuple(args), generator), "kwargs": drawn_like(dict(kwargs), generator)}


# -------- TorchScript


def _beside(path: Path) -> Path:
    """Where examples for a TorchScript file lie: tensors named as the arguments of its forward."""
    return path.with_suffix(".inputs.safetensors")


@functools.lru_cache(maxsize=2)
def _scripted(path: Path) -> Any:
    with loading(f"the TorchScript file {path}"):
        return torch.jit.load(str(path), map_location="cpu").eval()


@dataclass(frozen=True)
class LoadScript:
    """Builds the module of a TorchScript file. Raises: CheckpointError."""

    path: Path

    def __call__(self) -> nn.Module:
        return _scripted(self.path)


@dataclass(frozen=True)
class DrawScript:
    """Draws what a TorchScript file is given: like the examples beside it, or a picture where a convolution is first.

    Raises: CheckpointError where neither is there.
    """

    path: Path
    asked: Asked

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor] | Tensor:
        beside = _beside(self.path)
        if beside.is_file():
            from safetensors.torch import load_file

            with loading(f"the examples {beside}"):
                return drawn_like(load_file(beside), generator)
        model = _scripted(self.path)
        names = _needed(model)
        first = next((parameter for parameter in model.parameters() if parameter.dim() > 1), None)
        if len(names) == 1 and first is not None and first.dim() == 4:
            return torch.randn(self.asked.batch, first.shape[1], PICTURE, PICTURE, generator=generator)
        raise CheckpointError(
            f"{self.path} does not say what shapes it takes; put an example of {', '.join(names)} into {beside} by "
            "safetensors.torch.save_file"
        )


def _needed(model: Any) -> Sequence[str]:
    """The arguments of a scripted forward that have no default."""
    return [argument.name for argument in model.forward.schema.arguments[1:] if not argument.has_default_value()]
