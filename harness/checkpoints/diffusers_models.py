"""Checkpoints of diffusers: a component, or the components of a pipeline one by one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoints import transformers_models
from harness.checkpoints.libraries import library, loading
from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised, read_config, recognise
from harness.checkpoints.weights import require_room, require_weights, weights_of
from harness.errors import CheckpointError

_KIND = "diffusers"
TOKENS = 8  # of a prompt's embedding
LATENT = 32  # the edge of a latent picture where the config has none, and the most that is drawn
_LIBRARIES = ("diffusers", "transformers")  # whose components can be run


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """One of a component; of a pipeline its components with weights.

    Raises: CheckpointError for a pipeline without one.
    """
    if "_class_name" in recognised.fields and not (recognised.path / "model_index.json").is_file():
        return ("forward",)
    names = [name for name, field in recognised.fields.items() if isinstance(field, list) and field[0] in _LIBRARIES]
    there = [
        item
        for item in names
        if (recognised.path / item / "config.json").is_file() and weights_of(recognised.path / item)
    ]
    if not there:
        raise CheckpointError(
            f"{recognised.path} is a pipeline whose components ({', '.join(names)}) have no weights here"
        )
    return tuple(there)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The arguments of the Case that runs a component. Raises: CheckpointError."""
    if part != "forward":
        component = recognise(recognised.path / part)
        if component.kind != "transformers":
            return arguments(component, "forward", asked)
        beside = recognised.path / part.replace("text_encoder", "tokenizer")
        processors = beside if beside.is_dir() else None
        return transformers_models.arguments(component, "forward", asked, processors=processors)
    if asked.own_files:
        raise CheckpointError(
            f"{recognised.path} takes latents and embeddings: leave --precision-text, --precision-image and "
            "--precision-audio out"
        )
    kind = _class_of(recognised)
    note = "the latents and embeddings are noise, drawn by seed"
    return dict(model=Load(recognised.path), inputs=Draw(recognised, kind, asked), notes=(note,))


def _class_of(recognised: Recognised) -> type:
    """The class of a component. Raises: CheckpointError for one that diffusers lacks."""
    diffusers, name = library("diffusers", _KIND), recognised.fields["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise CheckpointError(
            f"{recognised.path} holds a {name}, which diffusers {diffusers.__version__} lacks; "
            "install the version that has it"
        )
    return kind


@dataclass(frozen=True)
class Load:
    """Builds a component in the dtype that it is given. Raises: CheckpointError."""

    path: Path

    def __call__(self, dtype: torch.dtype) -> nn.Module:
        require_weights(self.path)
        require_room(self.path, dtype)
        kind = _class_of(Recognised(kind=_KIND, path=self.path, fields=read_config(self.path / "config.json")))
        with loading(f"{kind.__name__} of {self.path}"):
            model = kind.from_pretrained(
                self.path, torch_dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            ).eval()
        if dtype not in {parameter.dtype for parameter in model.parameters()} and not model._keep_in_fp32_modules:
            return model.to(dtype)  # diffusers 0.42 leaves some classes in float32 where low_cpu_mem_usage is off
        return model


@dataclass(frozen=True)
class Draw:
    """Draws the inputs of a component by the names that its forward takes and the sizes in its config.

    Raises: CheckpointError for a component with an argument that is not known here.
    """

    found: Recognised
    kind: type
    asked: Asked

    def __call__(self, generator: torch.Generator) -> dict[str, Any]:
        names, made = _parameters(self.kind), {}
        for name in names:
            drawn = self._drawn(name, generator)
            if drawn is not None:
                made[name] = drawn
        needed = [name for name, item in names.items() if item.default is item.empty and name != "self"]
        absent = [name for name in needed if name not in made and names[name].kind is not inspect.Parameter.VAR_KEYWORD]
        if absent or not made:
            raise CheckpointError(
                f"{self.kind.__name__} takes {', '.join(absent) or 'inputs'} that cannot be drawn here; write a "
                "function that returns a Case and give it as module:function"
            )
        return made

    def _size(self, *names: str) -> Any:
        """The first of these that the config has."""
        values = (self.found.fields.get(name) for name in names)
        return next((value for value in values if value is not None), None)

    def _drawn(self, name: str, generator: torch.Generator) -> Any:
        batch = self.asked.batch
        if name in ("sample", "hidden_states", "x"):
            channels = self._size("in_channels", "num_channels_in") or 3
            edge = self._size("sample_size") or LATENT
            edges = tuple(edge) if isinstance(edge, (list, tuple)) else (edge, edge)
            limit = 1 << 20 if self._size("pos_embed_max_size", "patch_size") else LATENT
            return torch.randn(batch, channels, *(min(item, limit) for item in edges), generator=generator)
        if name == "timestep":
            return torch.randint(1, 1000, (batch,), generator=generator)
        if name == "encoder_hidden_states" and (width := self._prompt_width()):
            return torch.randn(batch, TOKENS, width, generator=generator)
        if name == "class_labels" and (classes := self._size("num_embeds_ada_norm", "num_class_embeds")):
            return torch.randint(0, classes, (batch,), generator=generator)
        if name == "pooled_projections" and (width := self._size("pooled_projection_dim")):
            return torch.randn(batch, width, generator=generator)
        return None

    def _prompt_width(self) -> int | None:
        result = self._size("joint_attention_dim", "cross_attention_dim", "caption_channels", "text_embed_dim")
        return result[0] if isinstance(result, (list, tuple)) else result


@functools.cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters
