"""Random roundings: numbers moved by a last place at random, as often as makes an error of the size of a rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.torch_private import TorchDispatchMode, tree_leaves

MOVED = 1 / 12  # share of numbers that move: (1 last place)² · 1/12 is the variance of a rounding to the nearest
_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def move_at_random(tensor: Tensor, generator: torch.Generator, *, dropped: int = 0) -> Tensor:
    """A tensor of which a twelfth of the numbers, drawn from `generator`, is larger or smaller by one last place.

    A rounding to the nearest is off by up to half a last place u either way, with the variance u²/12; so is this,
    beside the rounding that the numbers had before. It is the random rounding of Monte Carlo arithmetic (D. S. Parker,
    Monte Carlo Arithmetic, UCLA CSD-970002, 1997): run a few times, it shows how the roundings of a computation scatter
    its result.

    Args:
        tensor: float32, float16 or bfloat16 on the CPU, of any shape; it is not written into.
        generator: what is drawn from.
        dropped: mantissa bits at the end that the numbers do not use, 13 of float32 for HF32 of 10 bits; their last
            place is that of the bits before.

    Zeros stay zero, and what is not finite or would become so stays as it is. Other dtypes are returned as they are.

    >>> import torch
    >>> moved = move_at_random(torch.ones(1200), torch.Generator().manual_seed(0))
    >>> 60 < int((moved != 1).sum()) < 140
    True
    """
    kind = _INTEGERS.get(tensor.dtype)
    if kind is None or not tensor.numel():
        return tensor
    drawn = torch.rand(tensor.shape, generator=generator)
    step = (drawn < MOVED / 2).to(kind) - (drawn >= 1 - MOVED / 2).to(kind)
    moved = (tensor.contiguous().view(kind) + (step << dropped)).view(tensor.dtype)
    return torch.where((tensor != 0) & tensor.isfinite() & moved.isfinite(), moved, tensor)


# What hands numbers on as they are, or rounds only to whole ones; forms that write in place end in "_".
_EXACT = frozenset(
    "abs amax amin as_strided as_strided_scatter bernoulli ceil clamp clamp_max clamp_min clone "
    "constant_pad_nd detach diag_embed diagonal_copy "
    "diagonal_scatter embedding expand_copy fill flip floor gather hardtanh index index_copy index_fill "
    "index_put index_select "
    "kthvalue lift lift_fresh masked_fill masked_scatter masked_select max max_pool2d_with_indices "
    "max_pool3d_with_indices maximum "
    "median min minimum nan_to_num neg pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d relu "
    "repeat repeat_interleave "
    "replication_pad1d replication_pad2d roll round scatter select_scatter sign slice_scatter sort stack cat "
    "take threshold topk tril "
    "triu trunc unfold_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d where zero".split()
)
CASTS = ("_to_copy", "copy")  # which round where they narrow


# What returns indices among which torch leaves open those of equal numbers: where `dim` stands among the positional
# arguments, and its default. argmax, max, min and a stable sort promise the first.
_OPEN_CHOICES: dict[str, tuple[int, int | None]] = {
    "topk": (2, -1),
    "sort": (1, -1),
    "argsort": (1, -1),
    "kthvalue": (2, -1),
    "median": (1, None),
    "nanmedian": (1, None),
    "mode": (1, -1),
}


def open_dimension(name: str, args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """The dimension along which a call may choose freely among equal numbers; None of a call that may not.

    >>> import torch
    >>> open_dimension("sort", (torch.ones(3),), {}), open_dimension("sort", (torch.ones(3),), {"stable": True})
    (-1, None)
    """
    numbers = args[0] if args else None
    if name not in _OPEN_CHOICES or kwargs.get("stable") or not isinstance(numbers, Tensor) or not numbers.dim():
        return None
    position, default = _OPEN_CHOICES[name]
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


class RandomRoundings(TorchDispatchMode):
    """While it is active, the results of CPU operators are moved at random: see `move_at_random`.

    Of equal numbers, `topk`, `sort` and others that leave it open choose from the other end than the CPU does.

    Args:
        seed: of what is drawn.
        operands: of which operators float32 operands are rounded before, and how many mantissa bits that drops.
    """

    def __init__(self, seed: int, operands: Mapping[Any, int]):
        super().__init__()
        self.generator, self.operands = torch.Generator().manual_seed(seed), operands

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dropped = self.operands.get(func.overloadpacket, 0)
        taken = tuple(self._moved(arg, dropped) for arg in args) if dropped else args
        result = _from_the_other_end(func, taken, kwargs or {})
        if not _rounds(func, args, result):
            return result
        if func._schema.is_mutable:
            for tensor in _tensors(result):
                tensor.copy_(self._moved(tensor, 0))
            return result
        if isinstance(result, Tensor):
            return self._moved(result, 0)
        return tuple(self._moved(item, 0) for item in result) if isinstance(result, tuple) else result

    def _moved(self, value: Any, dropped: int) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        if dropped and value.dtype != torch.float32:
            return value
        return move_at_random(value, self.generator, dropped=dropped)


def _from_the_other_end(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator returns; one that chooses among numbers is given them in the opposite order."""
    dim = open_dimension(func.overloadpacket.__name__, args, kwargs)
    if dim is None or func._schema.is_mutable or len(func._schema.returns) != 2:
        return func(*args, **kwargs)
    values, indices = func(args[0].flip(dim), *args[1:], **kwargs)
    return values, args[0].shape[dim] - 1 - indices


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _rounds(func, args: tuple, result: Any) -> bool:
    """Whether an operator may have rounded what it returned: not a view, a copy, a choice among numbers, or made of no
    tensors.
    """
    given = _tensors(args)
    if func.is_view or not given:
        return False
    name = func.overloadpacket.__name__.rstrip("_")  # forms in place end in one
    if name in CASTS:
        return any(tensor.dtype.itemsize < given[-1].dtype.itemsize for tensor in _tensors(result))
    return name not in _EXACT
