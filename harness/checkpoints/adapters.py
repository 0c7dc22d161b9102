"""Adapters of PEFT, on the base model that lies beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoints import transformers_models
from harness.checkpoints.libraries import library, loading
from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised, recognise
from harness.checkpoints.weights import require_weights
from harness.errors import CheckpointError

_KIND = "PEFT"


def base_of(recognised: Recognised, asked: Asked) -> Recognised:
    """The base model of an adapter: where the user or the adapter's config says, or beside the adapter.

    Raises: CheckpointError where it is nowhere, or is no model of transformers.
    """
    named = asked.base or str(recognised.fields.get("base_model_name_or_path") or "")
    path = recognised.path
    places = [Path(named), path / named, path.parent / named, path.parent / Path(named).name, path / "base"]
    places += [path.parent, path.parent / "base"]
    fits = [place for place in places if named or place not in places[:4]]
    for fit in fits:
        if fit.resolve() != path.resolve() and (fit / "config.json").is_file():
            base = recognise(fit)
            if base.kind == "transformers":
                return base
    raise CheckpointError(
        f"{path} is an adapter of {named or 'an unnamed model'}, which is not here; put the base model's directory "
        f"beside it as {path.parent / (Path(named).name or 'base')}"
    )


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """Those of the base model."""
    return transformers_models.parts(base_of(recognised, asked), asked)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The base model's arguments, with the adapter in the model."""
    base = base_of(recognised, asked)
    beside = recognised.path if transformers_models.has_tokenizer(recognised.path) else None
    given = transformers_models.arguments(base, part, asked, processors=beside)
    return given | dict(model=Load(recognised.path, base.path, asked))


@dataclass(frozen=True)
class Load:
    """Builds the base model with the adapter in it, not merged. Raises: CheckpointError."""

    path: Path
    base: Path
    asked: Asked

    def __call__(self, dtype: torch.dtype) -> nn.Module:
        library("transformers", _KIND)
        peft = library("peft", _KIND)
        require_weights(self.path)
        model = transformers_models.Load(self.base, self.asked)(dtype)
        with loading(f"the adapter of {self.path}"):
            return peft.PeftModel.from_pretrained(model, str(self.path), local_files_only=True).eval()
