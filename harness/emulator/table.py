"""The table of operators: how an entry is written, and how its C signature is read.

    @operator("aclnnAddmm", "self mat1 mat2 beta:scalar alpha:scalar >out cube:int8")
    def addmm(self, mat1, mat2, beta, alpha, cube): return ...

The words of a signature are the C arguments in their order, named at will. A bare word is a tensor; `>out` is an
output, whose value the function returns; `>out~` is one whose shape the operator decides; `self!` is both, an in-place
operator. Others say their
type: scalar, int (int64), int32, int8, bool, double, float, str, ints, bools, floats, tensors, scalars; `>outs:tensors`
is a list of outputs. A null pointer arrives as None.
The function gets the inputs in order and returns the outputs in order; the runner alone writes them, after checking
number, shape and dtype, so an operator cannot leave one unwritten. A last argument `out` of the function receives the
specification of the outputs (`.shape`, `.dtype`), for operators whose result depends on it.

Some operators still come by CANN's older path, where a call describes itself: a type, descriptions, named attributes.
So they need no signature:

    @older("Fill")
    def fill(dims, value, out): return ...

The function gets the inputs in order, None for an optional one that is not there, and the attributes as keywords; those
that a call leaves out keep the function's defaults, and one that it does not know is an error. `names` as an argument
receives the names of the inputs, where the operator goes by them.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

POINTER = ("tensor", "scalar", "ints", "bools", "floats", "tensors", "scalars")
TYPES = {  # as C passes them; a bool or an int8 read as a wider integer would bring garbage in its upper bits
    **dict.fromkeys(POINTER, ctypes.c_void_p),
    "str": ctypes.c_char_p,
    "int": ctypes.c_int64,
    "int32": ctypes.c_int32,
    "int8": ctypes.c_int8,
    "uint64": ctypes.c_uint64,
    "bool": ctypes.c_bool,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
}


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    role: str  # "in", "out" or "both"
    free: bool = False  # an output whose shape the operator decides


@dataclass(frozen=True)
class Operator:
    name: str
    arguments: tuple[Argument, ...]
    compute: Callable[..., Any]
    wants_out: bool  # the function takes the outputs' specification

    def callback_type(self):
        """The C type of its GetWorkspaceSize: the arguments, then uint64_t *size, aclOpExecutor **executor."""
        types = [TYPES[argument.type] for argument in self.arguments]
        return ctypes.CFUNCTYPE(ctypes.c_int, *types, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Older:
    name: str
    compute: Callable[..., Any]
    wants_out: bool
    wants_names: bool  # of the inputs
    free: tuple[int, ...]  # the outputs whose shape the operator decides


Meaning = Callable[..., Any]
CHANGED: dict[str, Callable[[Meaning], Meaning]] = {}  # operators that another release is played with, see `changed`


@contextmanager
def changed(name: str, change: Callable[[Meaning], Meaning]) -> Iterator[None]:
    """Play another release of CANN while the block runs: `change` gets what an operator means and returns what it means
    there.

        with changed("aclnnStd", lambda std: lambda self, dims, correction, keep, out: std(self, dims, 1, keep, out)): …

    Raises: ValueError for an operator that is in no table, or is changed already.
    """
    if name not in OPERATORS and name not in OLDER:
        raise ValueError(f"no operator is called {name!r}; harness/emulator/operators holds them")
    if name in CHANGED:
        raise ValueError(f"{name} is changed already")
    CHANGED[name] = change
    try:
        yield
    finally:
        del CHANGED[name]


def meaning(entry: Operator | Older) -> Meaning:
    """What an operator computes in the release that is played."""
    return CHANGED[entry.name](entry.compute) if entry.name in CHANGED else entry.compute


OPERATORS: dict[str, Operator] = {}
OLDER: dict[str, Older] = {}


def operator(names: str, signature: str) -> Callable:
    """Enter a function as the meaning of one operator, or of several with one signature, separated by spaces."""
    arguments = tuple(_argument(word) for word in signature.split())

    def enter(compute: Callable) -> Callable:
        wants_out = "out" in inspect.signature(compute).parameters
        for name in names.split():
            if name in OPERATORS:
                raise ValueError(f"{name} is in the table twice")
            OPERATORS[name] = Operator(name, arguments, compute, wants_out)
        return compute

    return enter


def aclop(names: str, free: tuple[int, ...] = ()) -> Callable:
    """Enter a function as the meaning of types of the older path; `free` counts the outputs whose shape it decides."""

    def enter(compute: Callable) -> Callable:
        wanted = inspect.signature(compute).parameters
        for name in names.split():
            if name in OLDER:
                raise ValueError(f"{name} is in the older table twice")
            OLDER[name] = Older(name, compute, "out" in wanted, "names" in wanted, free)
        return compute

    return enter


def _argument(word: str) -> Argument:
    name, _, kind = word.partition(":")
    given = "both" if name.endswith("!") else "in"
    role = "out" if name.startswith(">") else given
    kind, free = kind or "tensor", name.endswith("~")
    if kind not in TYPES:
        raise ValueError(f"{word!r}: no argument type is called {kind!r}; there are {', '.join(TYPES)}")
    return Argument(name.strip(">!~"), kind, role, free)
