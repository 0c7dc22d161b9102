"""What a model keeps outside of itself: tensors in a class, a module of Python, a closure, a cache of a function.

Every run gets a model that has not run, and state outside of the model would still go from one run to the next: a table
that the CPU's run made in a class attribute would be the device's table too, and a list that a hook fills would hand
the first run's tensor to all others.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_DEPTH = 4  # containers inside of one another that are looked into
_MOST = 4096  # elements of a container that are looked at: a larger one holds data, not state
_ABSENT = object()
_MAPPINGS = (dict, OrderedDict, defaultdict)  # these alone: another class may compute what it seems to hold
_SEQUENCES = (list, deque)
_LIBRARIES = ("torch", "torch_npu", "builtins", "numpy", "typing", "collections", "functools", "abc")


@contextlib.contextmanager
def put_back(model: nn.Module, forward: Callable | None = None) -> Iterator[None]:
    """Whatever tensors the block puts into places outside of `model`, or takes from there, it finds them as they were.

    Places are the attributes of the model's classes, the global names that their methods, hooks, `forward` and the
    functions among the modules' attributes use, and the functions of the same package that these call, what such
    functions close over, their default arguments, and `functools.lru_cache`. Only what holds tensors is put back: a
    flag that something was done once stays.

    Example: a class that makes its table in the first run makes it anew in each.

    >>> import torch
    >>> class Net(torch.nn.Module):
    ...     table = None
    ...     def forward(self, x):
    ...         Net.table = x if Net.table is None else Net.table
    ...         return Net.table
    >>> for value in (1.0, 2.0):
    ...     with put_back(net := Net()):
    ...         print(net(torch.tensor(value)))
    tensor(1.)
    tensor(2.)
    """
    seen = _Seen()
    for target in _writable_objects(model, forward):
        seen.look(target)
    try:
        yield
    finally:
        seen.restore()


# -------- the places


@dataclass(frozen=True, eq=False)
class _Names:
    """Some names of a namespace: the globals of a module, or the attributes of a class."""

    owner: Any
    names: frozenset[str]

    def get(self, name: str) -> Any:
        return self.owner.get(name, _ABSENT) if isinstance(self.owner, dict) else vars(self.owner).get(name, _ABSENT)

    def set(self, name: str, value: Any) -> None:
        with contextlib.suppress(AttributeError, TypeError):  # a class that forbids it
            if isinstance(self.owner, dict):
                self.owner.pop(name, None) if value is _ABSENT else self.owner.__setitem__(name, value)
            elif value is _ABSENT:
                delattr(self.owner, name)
            else:
                setattr(self.owner, name, value)


def _writable_objects(model: nn.Module, forward: Callable | None) -> Iterator[Any]:
    """Namespaces, closed-over cells, default arguments and cached functions that a model's code can write into."""
    kinds = frozenset(kind for module in model.modules() for kind in type(module).__mro__ if _is_own(kind))
    for kind in kinds:
        yield _Names(kind, frozenset())  # every attribute: a method may name it by its class
    for module in model.modules():  # what copies of the model share
        yield [
            variable
            for variable in vars(module).values()
            if hasattr(type(variable), "__deepcopy__") and _is_object(variable)
        ]
    more = [item for module in model.modules() for table in _HOOKS for item in getattr(module, table, {}).values()]
    more += [item for module in model.modules() for item in _functions_of(module)]
    more += [] if forward is None else [forward]
    for function in {*_reached_by(kinds), *_reached(filter(None, map(_plain, more)))}:
        if _is_cached(function):
            yield function
            continue
        names = _names_in(function.__code__)
        if names:
            yield _Names(function.__globals__, names)
        yield from function.__closure__ or ()
        if function.__defaults__ or function.__kwdefaults__:
            yield [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _functions_of(module: nn.Module) -> Iterator[Any]:
    """The functions that a module was given, such as `self.act = swiglu`, also in a list, tuple or dict."""
    for variable in vars(module).values():
        inside: Iterable[Any] = variable.values() if type(variable) in _MAPPINGS else (variable,)
        if type(variable) in (*_SEQUENCES, tuple):
            inside = variable if len(variable) <= _MOST else ()
        functions = (item for item in inside if isinstance(item, _FUNCTIONS))
        yield from (item for item in functions if _is_own(_plain(item) or type(item)))


@functools.lru_cache(maxsize=64)
def _reached_by(kinds: frozenset[type]) -> tuple[Any, ...]:
    """The functions of some classes and those that they call."""
    return tuple(_reached(filter(None, (_plain(variable) for kind in kinds for variable in vars(kind).values()))))


def _reached(functions: Iterable[Any]) -> Iterator[Any]:
    """Functions, and those of their package that they call, cached ones too; of an installed package, of their
    module.
    """
    todo, done = list(functions), set()
    while todo:
        function = todo.pop()
        if id(function) in done:
            continue
        done.add(id(function))
        yield function
        if _is_cached(function):
            called = [getattr(function, "__wrapped__", None)]
        else:
            called = [function.__globals__.get(name) for name in _names_in(function.__code__)]
            called += [_contents(cell) for cell in function.__closure__ or ()]
        todo += [item for item in map(_plain, called) if item is not None and _home(item) == _home(function)]


@functools.lru_cache(maxsize=4096)
def _home_of(name: str) -> str:
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name if "site-packages" in file else name.partition(".")[0]


def _home(function: Any) -> str:
    return _home_of(getattr(function, "__module__", None) or "")


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, type(_home_of))  # the last is a cached one's
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _is_own(kind: Any) -> bool:
    """Whether a class or a function is of no library that keeps no state of a model."""
    return (kind.__module__ or "").partition(".")[0] not in _LIBRARIES


def _is_cached(value: Any) -> bool:
    """Whether a value is a function with a cache, as functools.lru_cache makes them."""
    try:
        return hasattr(value, "cache_info") and hasattr(value, "cache_clear")
    except ImportError:  # what stands in transformers for a class whose library is absent raises at any attribute
        return False


def _plain(value: Any) -> Any:
    """The function of Python behind a method, property or partial; a cached one as it is; None for all else."""
    for _ in range(8):
        if isinstance(value, types.FunctionType) or _is_cached(value):
            return value
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            return None
    return None


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    inner = (_names_in(co_const) for co_const in code.co_consts if isinstance(co_const, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _ABSENT


# -------- what was there before


@dataclass
class _Seen:
    """What the places held, and what a container among them held."""

    restores: list[Callable[[], None]] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    retained: list[Any] = field(default_factory=list)  # so that no other object gets the identity of one

    def look(self, target: Any) -> None:
        if isinstance(target, _Names):
            names = target.names or frozenset(name for name in vars(target.owner) if not name.startswith("__"))
            before = {name: target.get(name) for name in names}
            self.restores.append(lambda: _names_back(target, before))
            for value in before.values():
                self.container(value, 0)
        elif isinstance(target, types.CellType):
            before = _contents(target)
            self.restores.append(lambda: _cell_back(target, before))
            self.container(before, 0)
        elif _is_cached(target):
            size = target.cache_info().currsize
            self.restores.append(lambda: target.cache_clear() if target.cache_info().currsize != size else None)
        else:
            for value in target:
                self.container(value, 0)

    def container(self, value: Any, depth: int) -> None:
        """Remember what a container holds, and the containers in it."""
        if depth > _DEPTH or id(value) in self.known:
            return
        if type(value) in (*_MAPPINGS, *_SEQUENCES):
            content = value
        elif _is_object(value):
            content = vars(value)
        else:
            return
        self.known.add(id(value))
        self.retained.append(value)
        if len(content) > _MOST:
            return
        if type(content) in _MAPPINGS:
            before, restore = dict(content), _mapping_back
            inside = before.values()
        else:
            before, restore = list(content), _sequence_back
            inside = before
        self.restores.append(lambda: restore(content, before))
        for item in list(inside):
            self.container(item, depth + 1)

    def restore(self) -> None:
        for restore in reversed(self.restores):
            restore()


def _is_object(value: Any) -> bool:
    """Whether a value is an instance of a class of Python's that is neither code, a module nor a model."""
    if isinstance(value, (type, types.ModuleType, nn.Module, Tensor)) or (
        callable(value) and not hasattr(value, "__dict__")
    ):
        return False
    return _is_own(type(value)) and isinstance(getattr(value, "__dict__", None), dict)


def _names_back(namespace: _Names, before: dict[str, Any]) -> None:
    names = before if namespace.names else {**dict.fromkeys(vars(namespace.owner), _ABSENT), **before}
    for name in [name for name in names if not name.startswith("__")]:
        old, now = before.get(name, _ABSENT), namespace.get(name)
        if now is not old and (_has_tensors(now) or _has_tensors(old)):
            namespace.set(name, old)


def _cell_back(cell: types.CellType, before: Any) -> None:
    now = _contents(cell)
    if now is not before and before is not _ABSENT and (_has_tensors(now) or _has_tensors(before)):
        cell.cell_contents = before


def _mapping_back(content: dict, before: dict[Any, Any]) -> None:
    for key in [key for key in content if key not in before and _has_tensors(content[key])]:
        del content[key]
    for key, old in before.items():
        now = content[key] if key in content else _ABSENT  # a registry may have a get() of its own
        if now is not old and (_has_tensors(now) or _has_tensors(old)):
            content[key] = old


def _sequence_back(content: list | deque, before: list[Any]) -> None:
    same = len(content) == len(before) and all(now is old for now, old in zip(content, before))
    if not same and any(_has_tensors(item) for item in [*content, *before]):
        content.clear()
        content.extend(before)


def _has_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > _DEPTH:
        return False
    if type(value) in _MAPPINGS:
        return len(value) <= _MOST and any(_has_tensors(item, depth + 1) for item in list(value.values()))
    if isinstance(value, tuple) or type(value) in _SEQUENCES:
        return len(value) <= _MOST and any(_has_tensors(item, depth + 1) for item in list(value))
    return _is_object(value) and any(_has_tensors(variable, depth + 1) for variable in list(vars(value).values()))
