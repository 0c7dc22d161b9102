"""The card's own layouts of memory, in blocks of 16 by 16 or 16 by 32: a tensor in one of them, and out of it.

Each layout splits some axes of the tensor in blocks and orders the parts. `_LAYOUTS` says it in letters: a capital
letter is an axis in blocks, the small one what lies within a block; the axes as the program sees them, and the parts in
the order in which they lie.
"""

from __future__ import annotations

import torch

NCHW, NHWC, ND, NC1HWC0, FRACTAL_Z, NDHWC, FRACTAL_NZ, NCDHW, NDC1HWC0, FRACTAL_Z_3D = 0, 1, 2, 3, 4, 27, 29, 30, 32, 33
NZ_C0 = (50, 51, 52, 53, 54)  # FRACTAL_NZ with a width of block in its name

_LAYOUTS = {  # format: (axes, of which in blocks, parts in memory); B stands for any number of axes in front
    **dict.fromkeys((FRACTAL_NZ, *NZ_C0), ("BMN", "MN", "BNMmn")),
    NC1HWC0: ("NCHW", "C", "NCHWc"),
    FRACTAL_Z: ("NCHW", "NC", "CHWNnc"),
    NDHWC: ("NCDHW", "", "NDHWC"),
    NDC1HWC0: ("NCDHW", "C", "NDCHWc"),
    FRACTAL_Z_3D: ("NCDHW", "NC", "DCHWNnc"),
}


def blocked(format: int) -> bool:
    """Whether a format orders its elements otherwise than the program sees them."""
    return format in _LAYOUTS


def unpack(memory: torch.Tensor, format: int, storage: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of a shape out of flat memory with the given dimensions; a copy."""
    axes, whole = _axes(format, shape)
    parts = _parts(memory, format, storage, whole)
    padded = parts.reshape(_padded(format, storage, whole))
    for axis, size in enumerate(whole):
        padded = padded.narrow(axis, 0, size)
    return padded.reshape(shape).clone()


def pack(tensor: torch.Tensor, format: int, storage: tuple[int, ...]) -> torch.Tensor:
    """The flat memory of a tensor in a format: padding is zero."""
    axes, whole = _axes(format, tuple(tensor.shape))
    memory = tensor.new_zeros(_count(storage))
    parts = _parts(memory, format, storage, whole)
    padded = tensor.new_zeros(_padded(format, storage, whole))
    inner = padded
    for axis, size in enumerate(whole):
        inner = inner.narrow(axis, 0, size)
    inner.copy_(tensor.reshape(whole))
    parts.copy_(padded.reshape(parts.shape))
    return memory


def _axes(format: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The letters of the layout's axes, and the shape with one size for each: fewer dimensions count from C, or are
    columns of one.
    """
    axes = _LAYOUTS[format][0]
    if axes == "BMN":
        rows, columns = (*shape, *(1, 1)[len(shape) :])[-2:] if len(shape) < 2 else shape[-2:]
        return axes, (_count(shape[:-2]), rows, columns)
    if len(axes) == 4 and len(shape) < 4:
        shape = (1, *shape, *(1,) * (3 - len(shape)))
    if len(shape) != len(axes):
        raise ValueError(f"a tensor of {len(shape)} dimensions has no layout {format}")
    return axes, shape


def _blocks(format: int, storage: tuple[int, ...]) -> dict[str, int]:
    _, split, parts = _LAYOUTS[format]
    sizes = dict(zip(reversed(parts), reversed(storage)))
    return {axis: sizes[axis.lower()] for axis in split}


def _padded(format: int, storage, whole) -> tuple[int, ...]:
    blocks = _blocks(format, storage)
    return tuple(
        -(-size // blocks.get(axis, 1)) * blocks.get(axis, 1) for axis, size in zip(_LAYOUTS[format][0], whole)
    )


def _parts(memory: torch.Tensor, format: int, storage, whole) -> torch.Tensor:
    """A view of the memory whose axes are the tensor's, each one that is in blocks as (block, within it)."""
    axes, split, order = _LAYOUTS[format]
    blocks = _blocks(format, storage)
    sizes = {axis: -(-size // blocks.get(axis, 1)) for axis, size in zip(axes, whole)} | {
        axis.lower(): size for axis, size in blocks.items()
    }
    lying = [sizes[part] for part in order]
    if _count(lying) != _count(storage) or memory.numel() < _count(storage):
        raise ValueError(f"{tuple(storage)} in memory is not a tensor of {tuple(whole)} in layout {format}")
    wanted = [part for axis in axes for part in ((axis, axis.lower()) if axis in split else (axis,))]
    return memory[: _count(storage)].view(lying).permute([order.index(part) for part in wanted])


def _count(sizes) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
