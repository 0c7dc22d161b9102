"""What a pickle of torch.save would make, read from its opcodes: nothing is made, imported or called.

`pickletools.genops` names the opcodes; a small stack keeps the strings, numbers and containers among them. It serves to
look before `torch.load(weights_only=True)` reads: which bytes the storages claim, and which keys stand twice in one
dictionary.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_SIZES = {  # of an element of a storage, in bytes; storages of other types claim one byte an element at least
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4,
}  # fmt: skip
# A number makes so many zeros of these.
FILLING = ("builtins bytearray", "__builtin__ bytearray", "builtins bytes", "__builtin__ bytes")
MARK = object()


class Name(str):
    """A class or function that a pickle names: "module name"."""


class Made:
    """What a call would have made, or a storage: a value of which nothing is known."""


@dataclass(frozen=True, kw_only=True)
class Pickled:
    """What was seen."""

    claims: dict[str, int] = field(default_factory=dict)  # a storage's key: the bytes that it must hold
    twice: tuple[str, ...] = ()  # keys that stand twice in one dictionary


def read_pickle(file: BinaryIO) -> Pickled:
    """Read one pickle from where `file` stands, up to its end.

    Raises: ValueError where it is damaged, or asks for memory that the file does not hold.
    """
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            reader.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("its pickle is damaged: an opcode has no operand") from None
    return Pickled(claims=reader.claims, twice=tuple(reader.twice))


class _Reader:
    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.keys: dict[int, set] = {}  # by the identity of a dictionary: the keys that it was given
        self.retained: list[Any] = []  # these dictionaries, so that no other object gets the identity of one
        self.claims: dict[str, int] = {}
        self.twice: list[str] = []

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MARK":
            stack.append(MARK)
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name in ("POP", "POP_MARK"):
            self._marked() if name == "POP_MARK" else stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name == "GLOBAL":
            stack.append(Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(f"{module} {attribute}"))
        elif name in ("PERSID", "BINPERSID"):
            self._claim(stack.pop() if name == "BINPERSID" else argument)
            stack.append(Made())
        elif name in _CONTAINERS:
            self._container(name)
        elif name in _CALLS:
            self._call(name)
        else:  # a string, bytes, a number
            stack.append(argument)

    def _marked(self) -> list[Any]:
        """The values above the last mark, which are taken off the stack with it."""
        index = len(self.stack) - 1
        while self.stack[index] is not MARK:  # IndexError where there is none
            index -= 1
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def _container(self, name: str) -> None:
        stack = self.stack
        if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_SET": set(), "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("LIST", "FROZENSET"):
            self._marked()
            stack.append([])
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            stack.pop() if name == "APPEND" else self._marked()
        else:
            self._items(name)

    def _items(self, name: str) -> None:
        if name == "DICT":
            values = self._marked()
            self.stack.append({})
        elif name == "SETITEMS":
            values = self._marked()
        else:
            values = self.stack[-2:]
            del self.stack[-2:]
        owner = self.stack[-1]
        if id(owner) not in self.keys:
            self.retained.append(owner)
        seen = self.keys.setdefault(id(owner), set())
        for key in values[::2]:
            known = (type(key), key) if isinstance(key, (str, int, float, bytes)) else None
            if known is not None and known in seen:
                self.twice.append(str(key))
            seen.add(known)

    def _call(self, name: str) -> None:
        stack = self.stack
        if name == "BUILD":
            stack.pop()  # a state; what it belongs to stays
            return
        if name == "INST" or name == "OBJ":
            self._marked()
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if (
                called in FILLING
                and isinstance(arguments, tuple)
                and any(isinstance(argument, int) for argument in arguments)
            ):
                raise ValueError(
                    f"its pickle asks {called.replace(' ', '.')} for"
                    f" {max(argument for argument in arguments if isinstance(argument, int))} zeros"
                )
        elif name == "NEWOBJ_EX":
            del stack[-3:]
        stack.append(Made())

    def _claim(self, identity: Any) -> None:
        """Note ('storage', class, key, location, elements), the identity that torch.save gives a storage."""
        if not (
            isinstance(identity, tuple)
            and len(identity) >= 5
            and identity[0] == "storage"
            and isinstance(identity[4], int)
        ):
            return
        size = _SIZES.get(str(identity[1]).split()[-1].split(".")[-1], 1)
        key = str(identity[2])
        if identity[4] < 0:
            raise ValueError(f"its storage {key!r} claims {identity[4]} elements")
        self.claims[key] = max(self.claims.get(key, 0), identity[4] * size)


_CONTAINERS = {
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "LIST",
    "FROZENSET", "APPEND", "APPENDS", "ADDITEMS", "DICT", "SETITEM", "SETITEMS",
}  # fmt: skip
_CALLS = {"BUILD", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX"}
