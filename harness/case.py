"""What to run: a model in one dtype, its inputs, and the limits on what the device may lose."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.devices import Stack
from harness.judging.references import is_floating
from harness.judging.tolerance import Tolerance
from harness.versions import require_torch

require_torch()  # before a name that an older torch lacks is an ImportError

FLOOR = Tolerance(preset="floor")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one dtype, its inputs and the limits on what the device may lose.

    `model()` builds it in float32 on the CPU; rows of one name with the same `model` object and weights share the
    build. A `model` with one parameter that must be given gets the case's dtype, and what it returns is not cast:
    `model=lambda dtype: AutoModel.from_pretrained(FOLDER, dtype=dtype)`. What it returned is never run: every side
    runs copies. One in training mode is run in evaluation mode, and the report says so, unless `training` is set.
    `inputs(generator)` draws its inputs on the CPU: a tensor, a tuple of arguments or a dict of keywords;
    floating-point ones are cast to `dtype`. `forward(model, inputs)` calls it where `model(inputs)` does not do.

    Raises: ValueError for an unknown dtype, or for labels without the output that holds the decisions.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    tolerance: Tolerance | Mapping[str, Tolerance] | Callable[[str, Stack], Tolerance] = (
        FLOOR  # by dtype, or by dtype and switches
    )
    dtype: str = "float32"
    checkpoint: Path | None = None  # where model() takes its weights from; None: seeded ones
    weights_seed: int = 0  # model() runs under torch's generator with this seed
    forward: Callable[[nn.Module, Any], Any] | None = None
    decisions: str | None = None  # name of the output with logits along its last axis; "output" for a bare tensor
    generates: tuple[str, str] | None = (
        None  # the outputs with generated tokens (B, T) and the logits that each was taken from (B, T, V)
    )
    # Of a language model: the input with the token ids (B, T) of which `decisions` (B, T, V) predicts the next ones.
    next_tokens: str | None = None
    alone: tuple[str, str] | None = None  # the outputs of one sample alone, and of the same sample in its batch
    labels: Tensor | None = None  # the right decisions, one for each input
    fallbacks: tuple[
        str, ...
    ] = ()  # operators, "aten::std.correction", that the device may leave to the CPU: marked, and no failure
    training: bool = False  # run in training mode, in which model() returns it: dropout is drawn alike on all sides
    # The CPU's side in a process without torch_npu; None: where the model's code asks for an NPU.
    isolated: bool | None = None
    gradients: bool = False  # autograd is on and parameters ask for gradients, which `forward` may return
    # Of a case in half dtypes alone one row is run in float32 too, where errors show that half roundings hide.
    companion: bool = True
    # The device draws random numbers itself: for cases about its generator, which no other gives the same.
    own_random: bool = False
    notes: tuple[str, ...] = ()  # what the report says of every row of the case, in sentences

    def __post_init__(self):
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype) or not is_floating(self.dtype):
            raise ValueError(
                f"case {self.name}: dtype {self.dtype!r} must be a floating-point dtype, such as 'float32'"
            )
        if self.generates is not None and len(self.generates) != 2:
            raise ValueError(
                f"case {self.name}: generates={self.generates!r} must name two outputs: the tokens and their logits"
            )
        if self.next_tokens is not None and self.decisions is None:
            raise ValueError(
                f"case {self.name}: next_tokens need `decisions`, the name of the output that predicts them"
            )
        if self.alone is not None and len(self.alone) != 2:
            raise ValueError(
                f"case {self.name}: alone={self.alone!r} must name two outputs: of a sample alone, and in its batch"
            )
        if self.labels is not None and self.decisions is None:
            raise ValueError(f"case {self.name}: labels need `decisions`, the name of the output that holds the logits")
        if isinstance(self.tolerance, Mapping) and self.dtype not in self.tolerance:
            raise ValueError(f"case {self.name}: no tolerance for {self.dtype}; there are {', '.join(self.tolerance)}")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        part: str | None = None,
        name: str | None = None,
        batch: int = 2,
        length: int = 32,
        text: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
        **more: Any,
    ) -> Case:
        """The case of a checkpoint, recognised by its files: a directory of transformers, sentence-transformers,
        diffusers, timm, PEFT or AIMv2, a file of torch.export or TorchScript, or "module:function".

        `dtype` None: float32. `part`: "forward" (the default), "decode", "generate", or a component of a pipeline, see
        `harness.checkpoints.building.parts_of`. `batch` sequences or pictures of at most `length` tokens are drawn by
        seed; `text`, `image` and `audio` are files in their place. `base`: the base model of an adapter. Code that lies
        in the checkpoint runs only with `trust_remote_code`. `more`: arguments of the Case itself.

        Raises: CheckpointError, in one sentence, for what is no whole checkpoint; ValueError for a bad argument.

        Example: `validate(Case.from_checkpoint("./bert-base-chinese", dtype="float16"), seed=42, device=device)`.
        """
        from harness.checkpoints.building import case_arguments
        from harness.checkpoints.material import Asked

        files = dict(text=text, image=image, audio=audio, base=base)
        asked = Asked(batch=batch, length=length, trust_remote_code=trust_remote_code, **files)
        given = case_arguments(path, part=part, asked=asked)
        return cls(**given | dict(dtype=dtype or "float32") | ({"name": name} if name else {}) | more)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @functools.cached_property
    def takes_dtype(self) -> bool:
        """Whether `model` is given the dtype that it builds in."""
        try:
            parameters = inspect.signature(self.model).parameters.values()
        except (TypeError, ValueError):
            return False
        needed = [
            parameter
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        return len(needed) == 1 and needed[0].kind is not needed[0].KEYWORD_ONLY

    @property
    def key(self) -> tuple:
        """What names the model that the case runs: rows with one key share the build.

        The name is a part of it: `model` may read what a test has changed since, a setting or a file, and another case
        must not get the model of the one before.
        """
        return (self.name, *self._builder)

    @property
    def _builder(self) -> tuple:
        more = (self.dtype if self.takes_dtype else "", self.training, self.gradients)
        return (self.model, self.checkpoint, self.weights_seed, *(more if any(more) else ()))

    @property
    def subject(self) -> tuple:
        """What names the model and how it is called: whether it draws, repeats and how it is conditioned is known by
        it.
        """
        return (*self._builder, self.forward)

    @property
    def recipe(self) -> dict[str, Any]:
        """How `Models` builds the model."""
        build = functools.partial(self.model, self.torch_dtype) if self.takes_dtype else self.model
        how = dict(seed=self.weights_seed, training=self.training, gradients=self.gradients)
        return dict(key=self.key, build=build, **how)

    @property
    def built(self) -> dict[str, Any]:
        """How `Models` builds and copies the model, but for its device."""
        return dict(dtype=self.torch_dtype, cast=not self.takes_dtype, **self.recipe)

    def limits(self, stack: Stack) -> Tolerance:
        """The tolerance for this dtype under these numeric switches."""
        if isinstance(self.tolerance, Tolerance):
            return self.tolerance
        return self.tolerance[self.dtype] if isinstance(self.tolerance, Mapping) else self.tolerance(self.dtype, stack)

    def weights(self) -> str:
        """sha256 of the checkpoint, or "seeded:<n>" where none was given."""
        if self.checkpoint is None:
            return f"seeded:{self.weights_seed}"
        from harness.checkpoints.conversion import checkpoint_digest

        return checkpoint_digest(self.checkpoint)


def __getattr__(name: str) -> Any:
    if name == "validate":  # its former place
        from harness.run.validation import validate

        return validate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
