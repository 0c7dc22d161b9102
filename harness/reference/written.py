"""What a model writes besides what it returns: outputs of its run as well.

In training mode these are buffers, as the running statistics of batch norm are; in any mode the tensors that the model
was given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.reference.tensors import leaves

BUFFER, INPUT = "buffer", "input"


@dataclass
class Written:
    """What `watching` tells when its block has ended: tensors by "buffer NAME" and "input NAME"."""

    outputs: dict[str, Tensor] = field(default_factory=dict)

    def after(self, returned: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model returned, and after it what it wrote; a name that both have is that of what it returned."""
        return returned | {name: output for name, output in self.outputs.items() if name not in returned}


@contextmanager
def watching(
    model: nn.Module,
    given: Any = None,
    *,
    buffers: Collection[str] | None = (),
    inputs: Collection[str] | None = (),
    before: Any = None,
    restore: bool = False,
) -> Iterator[Written]:
    """Tells the tensors of floats that a run of `model` on `given` writes into, as they are after the block.

    `buffers` and `inputs` name them as the outputs are named; None means those that the block changed. The first run of
    a model finds the names, and the other sides return the same ones, changed or not. `before`: what `given` was copied
    from. With `restore` the buffers are put back at the end, for another run of the same model.

        with watching(model, buffers=None) as written:
            model(x)
        written.outputs  # {"buffer norm.running_mean": tensor(…), "buffer norm.running_var": tensor(…)}
    """  # fmt: skip
    written = Written()
    looked_at = dict(model.named_buffers()) if buffers is None or buffers or restore else {}
    old = {name: tensor.detach().clone() for name, tensor in looked_at.items()}
    yield written
    now = dict(model.named_buffers()) if looked_at else {}
    written.outputs |= _chosen(BUFFER, now, old, buffers)
    if inputs is None or inputs:
        written.outputs |= _chosen(INPUT, _named(given), _named(before) if inputs is None else {}, inputs)
    for name in now.keys() & old.keys() if restore else ():
        if now[name].shape == old[name].shape:
            now[name].detach().copy_(old[name])


def _chosen(
    kind: str, now: dict[str, Tensor], old: dict[str, Tensor], names: Collection[str] | None
) -> dict[str, Tensor]:
    chosen = {}
    for name, tensor in now.items():
        wanted = _differs(tensor, old.get(name)) if names is None else f"{kind} {name}".rstrip() in names
        if wanted and tensor.is_floating_point():
            chosen[f"{kind} {name}".rstrip()] = tensor.detach().clone()
    return chosen


def _differs(now: Tensor, old: Tensor | None) -> bool:
    if old is None or now.shape != old.shape or now.dtype != old.dtype:
        return True
    same = (now == old) | (now != now) & (old != old)  # NaN stays NaN
    return not bool(same.all())


def _named(given: Any) -> dict[str, Tensor]:
    """The dense tensors among inputs by key and position, "" for a bare one; whatever else there is, is left out."""
    tensors = {name: leaf for name, leaf in leaves(given) if isinstance(leaf, Tensor)}
    return {name: tensor for name, tensor in tensors.items() if tensor.layout == torch.strided}


def named_tensors(outputs: Collection[str], kinds: tuple[str, ...] = (BUFFER, INPUT)) -> frozenset[str]:
    """The names of outputs that are buffers, or inputs that were written into."""
    return frozenset(name for name in outputs if name.partition(" ")[0] in kinds)
