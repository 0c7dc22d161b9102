"""The float64 reference of a model that asks for float32 by name, as norms, rotary tables and time embeddings do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.torch_private import TorchDispatchMode, returns_new, tree_map

WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
MAKES = frozenset(  # of numbers, in torch's default dtype where none is named
    "arange empty empty_strided eye full linspace logspace ones scalar_tensor zeros".split()
)
LEFT = frozenset(  # whose numbers another dtype would change: bits that are read otherwise, and random draws
    "view bernoulli cauchy dropout exponential geometric log_normal multinomial normal normal_functional "
    "poisson rand rand_like randint "
    "randint_like randn randn_like random rrelu_with_noise uniform".split()
)


class WideRequests(TorchDispatchMode):
    """Gives float64 where float32 is asked for: `x.float()`, `dtype=torch.float32`, `torch.arange(0., 8)`.

    Without it those parts of a float64 run would be float32 ones, and what the CPU loses there in float32 would count
    as nothing. Requests of half dtypes are left, as are random draws. What float32 tensors that were made elsewhere
    give is widened.

    >>> import torch
    >>> with WideRequests():
    ...     torch.ones(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        if name in LEFT:
            return func(*args, **kwargs)
        args = tuple(_wide_dtype(arg) for arg in args)  # no operator takes a dtype within a list
        kwargs = {key: _wide_dtype(value) for key, value in kwargs.items()}
        if name == "full" and kwargs.get("dtype") is None and isinstance(args[1], float):
            # Filled with float64's lowest number, as masks are, it has no float32 form to begin with.
            kwargs["dtype"] = WIDE.get(torch.get_default_dtype(), torch.get_default_dtype())
        made = func(*args, **kwargs)
        if name in MAKES and isinstance(made, Tensor) and made.dtype in WIDE and "out" not in kwargs:
            return func(*args, **kwargs | {"dtype": WIDE[made.dtype]})
        if func._schema.is_mutable or not returns_new(func):
            return made
        return _widened(made) if isinstance(made, Tensor) else tree_map(_widened, made)


def _wide_dtype(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _widened(value: Any) -> Any:
    return value.to(WIDE[value.dtype]) if isinstance(value, Tensor) and value.dtype in WIDE else value
