"""The buffers that a model in training mode writes: outputs of its run, as the running statistics of batch norm are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PREFIX = "buffer "


@dataclass
class Written:
    """What `watching` tells, when its block has ended: tensors by "buffer NAME"."""

    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watching(model: nn.Module, names: Collection[str] | None, *, restore: bool = False) -> Iterator[Written]:
    """Tells the buffers of floats named in `names` as they are after the block, and for None those that the block changed.

    With None the first run of a model finds the names; every other side then returns the same ones, changed or not. With `restore` all buffers
    are put back at the end, for another run of the same model.

        with watching(model, None) as written:
            model(x)
        written.outputs  # {"buffer norm.running_mean": tensor(…), "buffer norm.running_var": tensor(…)}
    """
    written = Written()
    looked_at = names is None or bool(names) or restore
    before = {name: each.detach().clone() for name, each in _buffers(model)} if looked_at else {}
    yield written
    for name, each in _buffers(model) if looked_at else ():
        now, old = each.detach(), before.get(name)
        key = f"{PREFIX}{name}"
        changed = names is None and (old is None or not torch.equal(now, old))
        if now.is_floating_point() and (changed or names is not None and key in names):
            written.outputs[key] = now.clone()
        if restore and old is not None and old.shape == now.shape:
            now.copy_(old)


def named(outputs: Collection[str]) -> frozenset[str]:
    """The names of outputs that are buffers."""
    return frozenset(name for name in outputs if name.startswith(PREFIX))


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, each in model.named_buffers():
        if each is not None and each.layout == torch.strided:
            yield name, each
