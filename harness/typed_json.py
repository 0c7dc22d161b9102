"""JSON as typed values: one reader that follows the annotations of frozen dataclasses, and the JSON schema of the same
annotations.

    read = reader_of(tuple[int, ...])
    read([2, 3])                       # (2, 3)
    read([2, "x"])                     # Mismatch: at [1] 'x' where a whole number was expected

A number that is not finite is stored as the text "nan", "inf" or "-inf"; no other text is a number. Names that a class
does not know are left out, since a newer version may have added them. A field without a default must be there.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

DEEPEST = 64  # lists and objects within one another that a file may hold; ours hold 8
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of one half of a character, which no file can be written with
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Mismatch(ValueError):
    """A value is not of the type that was expected: where it lies, what was found, what was expected."""

    def __init__(self, result: str, expected: str):
        super().__init__()
        self.found, self.expected, self.path = result, expected, []

    def within(self, name: str | int) -> Mismatch:
        """The same, seen from the object or the list that holds the value."""
        self.path.insert(0, name)
        return self

    @property
    def location(self) -> str:
        """Such as `measured.output.comparison.shape[1]`; "" for the value itself."""
        parts = [f"[{item}]" if isinstance(item, int) else f".{item}" for item in self.path]
        return shown("".join(parts).removeprefix("."))

    def __str__(self) -> str:
        where = f"{self.location}: " if self.path else ""
        return f"{where}{self.found} where {self.expected} was expected"


def shown(value: Any, most: int = 80) -> str:
    """A value of a file on one line of printable text, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
    text = "".join(item if item.isprintable() else ascii(item)[1:-1] for item in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def named(value: Any) -> str:
    """A value as messages name it: text in quotes, a list or an object by what it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


# -------- text to JSON


def parse_json(text: str) -> Any:
    """The JSON of a text.

    Raises: ValueError, in one line, where it is not JSON, holds one name twice in an object, a literal such as NaN, or
    is nested too deeply.
    """
    try:
        result = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"it is nested more deeply than {DEEPEST} levels") from None
    level, depth = [result], 0
    while level:  # by levels, so that no depth of it is a depth of calls
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more deeply than {DEEPEST} levels")
        level = [inner for item in level for inner in _inside(item)]
    return _encodable(result) if SURROGATE.search(text) else result


def read_json(path: Path) -> Any:
    """The JSON of a file in UTF-8. Raises: OSError where it cannot be read; ValueError as `parse_json`."""
    return parse_json(path.read_bytes().decode("utf-8"))


def _inside(value: Any) -> list:
    if isinstance(value, dict):
        return [item for item in value.values() if isinstance(item, (dict, list))]
    return [item for item in value if isinstance(item, (dict, list))] if isinstance(value, list) else []


def _encodable(value: Any) -> Any:
    """The same with halves of characters written as escapes."""
    if isinstance(value, dict):
        return {encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return encodable(value) if isinstance(value, str) else value


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: a lone half of a character, as names of files bring, is written as its escape.

    >>> encodable("a\\udcff")
    'a\\\\udcff'
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of json: an object whose names are all different. Raises: ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {named(twice)} twice, and one would hide the other")
    return result


def _refuse(literal: str) -> Any:
    raise ValueError(f'it holds {literal} where a number is text: "nan", "inf" or "-inf"')


def _whole(digits: str) -> int:
    if len(digits) > 30:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


# -------- JSON to values


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number may be, both ends included: `Annotated[float, Bounds(0, 1)]`. NaN is always allowed."""

    least: float
    most: float
    words: str  # "zero or more"


@functools.cache
def reader_of(kind: Any) -> Callable[[Any], Any]:
    """A function that reads a JSON value as `kind`, or raises Mismatch."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        bounds = next((item for item in inner[1:] if isinstance(item, Bounds)), None)
        return reader_of(inner[0]) if bounds is None else _bounded(reader_of(inner[0]), bounds)
    if origin in (typing.Union, types.UnionType):
        (one,) = (item for item in inner if item is not type(None))
        return _optional(reader_of(one))
    if origin is tuple:
        return _list(reader_of(inner[0])) if inner[-1] is Ellipsis else _fixed(tuple(map(reader_of, inner)))
    if origin in (dict, Mapping):
        return _mapping(reader_of(inner[1]))
    if kind is Any:
        return lambda value: value
    if dataclasses.is_dataclass(kind):
        return _record(kind)
    if issubclass(kind, Enum):
        return _member(kind)
    return {str: _text, bool: _bool, int: _int, float: _float, datetime.date: _date}[kind]


def fields_of(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, its bases' too."""
    known = typing.get_type_hints(kind, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(kind)}


def _record(kind: type) -> Callable[[Any], Any]:
    from_json = getattr(kind, "from_json", None)  # a class that stores itself in another form
    if from_json is not None:
        return from_json
    readers = [(name, reader_of(field)) for name, field in fields_of(kind).items()]
    read_all = FieldReader(readers, {field.name for field in dataclasses.fields(kind) if _has_no_default(field)})

    def read(value: Any) -> Any:
        return kind(**read_all(value))

    return read


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_fields(value: Any, readers: Any, needed: set[str]) -> dict[str, Any]:
    """The fields of an object that it holds, each by its reader. Raises: Mismatch also where a needed one is absent."""
    if type(value) is not dict:
        raise Mismatch(named(value), "an object")
    if not value.keys() >= needed:
        raise Mismatch("nothing", "a value").within(min(needed - value.keys()))
    result, name = {}, ""
    try:
        for name, read in readers:
            if name in value:
                result[name] = read(value[name])
    except Mismatch as error:
        raise error.within(name) from None
    return result


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What a reader gives back as it is: the types of such values, and the bounds of those that are numbers."""

    types: frozenset[type]
    bounds: Bounds | None = None

    def hold_all(self, values: list) -> bool:
        """Whether this is true of all the values, of which there is one at least."""
        if not self.types.issuperset(map(type, values)):
            return False
        return self.bounds is None or (min(values) >= self.bounds.least and max(values) <= self.bounds.most)


class _Absent:
    """The type of what stands in for a value that is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is left to do for objects whose values have certain types."""

    complete: bool  # whether all values are there that must be
    absent: list[str]
    read: list[tuple[str, Callable[[Any], Any]]]  # what the type alone does not settle
    bounded: list[tuple[Bounds, Callable[[list], tuple]]]  # the numbers that have these bounds, of all the values

    def holds(self, values: list) -> bool:
        """Whether the numbers are within their bounds; where one is NaN perhaps not."""
        return all(
            min(of := pick(values)) >= bounds.least and (bounds.most == math.inf or max(of) <= bounds.most)
            for bounds, pick in self.bounded
        )


class FieldReader:
    """Reads the fields of objects as `read_fields` does, and faster where many objects are alike.

    Most values are numbers and text that are taken as they are, if their types are right: all types of an object are
    looked at together, and what is to be done for that combination is worked out once.
    """

    MOST = 1000  # combinations that are kept

    def __init__(self, readers: Iterable[tuple[str, Callable[[Any], Any]]], needed: set[str]):
        """`readers`: by name; `needed`: those of the names that must be there."""
        self.readers, self.needed = dict(readers), needed
        self._plans: dict[tuple[type, ...], _Plan] = {}

    def __call__(self, value: Any) -> dict[str, Any]:
        """Raises: Mismatch."""
        if type(value) is not dict:
            raise Mismatch(named(value), "an object")
        values = list(map(value.get, self.readers, itertools.repeat(_Absent())))
        kinds = tuple(map(type, values))
        plan = self._plans.get(kinds) or self._planned(kinds)
        if not plan.complete or not plan.holds(values):
            return read_fields(value, self.readers.items(), self.needed)
        result, name = dict(zip(self.readers, values)), ""
        for name in plan.absent:
            del result[name]
        try:
            for name, read in plan.read:
                result[name] = read(result[name])
        except Mismatch as error:
            raise error.within(name) from None
        return result

    def _planned(self, kinds: tuple[type, ...]) -> _Plan:
        """What is left to do for values of these types, which is kept for the next object."""
        absent = [name for name, kind in zip(self.readers, kinds) if kind is _Absent]
        to_read, bounded = [], {}
        for place, ((name, read), kind) in enumerate(zip(self.readers.items(), kinds)):
            taken = _TAKEN.get(read)
            if taken is None or kind not in taken.types:
                to_read += [] if kind is _Absent else [(name, _OF_A_VALUE.get(read, read))]
            elif taken.bounds is not None and kind in (int, float):
                bounded.setdefault(taken.bounds, []).append(place)
        picks = [(bounds, operator.itemgetter(*places, places[0])) for bounds, places in bounded.items()]
        complete = not self.needed.intersection(absent)
        plan = _Plan(complete=complete, absent=absent, read=to_read, bounded=picks)
        if len(self._plans) < self.MOST:
            self._plans[kinds] = plan
        return plan


def _optional(read: Callable) -> Callable:
    def optional(value: Any) -> Any:
        return None if value is None else read(value)

    taken = _TAKEN.get(read, _Taken(frozenset()))
    _TAKEN[optional] = dataclasses.replace(taken, types=taken.types | {types.NoneType})
    _OF_A_VALUE[optional] = read
    return optional


def _list(read: Callable) -> Callable:
    taken = _TAKEN.get(read, _Taken(frozenset()))

    def all_of(value: Any) -> tuple:
        if type(value) is not list:
            raise Mismatch(named(value), "a list")
        if not value or taken.hold_all(value):
            return tuple(value)
        result = []
        for number, item in enumerate(value):
            try:
                result.append(read(item))
            except Mismatch as error:
                raise error.within(number) from None
        return tuple(result)

    return all_of


def _fixed(readers: tuple[Callable, ...]) -> Callable:
    def all_of(value: Any) -> tuple:
        if type(value) is not list or len(value) != len(readers):
            raise Mismatch(named(value), f"a list of {len(readers)}")
        return tuple(read(item) for read, item in zip(readers, value))

    return all_of


def _mapping(read: Callable) -> Callable:
    def all_of(value: Any) -> dict:
        if type(value) is not dict:
            raise Mismatch(named(value), "an object")
        result = {}
        for name, item in value.items():
            try:
                result[name] = read(item)
            except Mismatch as error:
                raise error.within(name) from None
        return result

    return all_of


def _bounded(read: Callable, bounds: Bounds) -> Callable:
    least, most, usual = bounds.least, bounds.most, int if read is _int else float

    def within(value: Any) -> Any:
        if type(value) is usual and least <= value <= most:
            return value
        result = read(value)
        if result < bounds.least or result > bounds.most:
            raise Mismatch(shown(value), bounds.words)
        return result

    _TAKEN[within] = dataclasses.replace(_TAKEN[read], bounds=bounds)
    return within


def _member(kind: type[Enum]) -> Callable:
    known = {item.value: item for item in kind}

    def member(value: Any) -> Enum:
        if type(value) is not str:
            raise Mismatch(named(value), "text")
        if value not in known:
            raise Mismatch(named(value), f"one of {', '.join(known)} (a newer version may have written it)")
        return known[value]

    return member


def _exactly(kind: type, words: str) -> Callable:
    """The reader of values of one type and of none that is derived from it: True is no number."""

    def exactly(value: Any) -> Any:
        if type(value) is not kind:
            raise Mismatch(named(value), words)
        return value

    return exactly


_text, _bool, _int = _exactly(str, "text"), _exactly(bool, "true or false"), _exactly(int, "a whole number")


def _float(value: Any) -> float:
    if type(value) is float or type(value) is int:
        return value
    if type(value) is str and value in NOT_FINITE:
        return NOT_FINITE[value]
    raise Mismatch(named(value), "a number")


_TAKEN: dict[Callable[[Any], Any], _Taken] = {  # by the reader
    _text: _Taken(frozenset({str})),
    _bool: _Taken(frozenset({bool})),
    _int: _Taken(frozenset({int})),
    _float: _Taken(frozenset({float, int})),
}

_OF_A_VALUE: dict[Callable[[Any], Any], Callable[[Any], Any]] = {}  # by the reader of a value or null: that of a value


def _date(value: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(_text(value))
    except ValueError as error:
        raise error if isinstance(error, Mismatch) else Mismatch(named(value), "a day such as 2027-01-31") from None


# -------- values to JSON


def to_json(value: Any) -> Any:
    """`value` for JSON: dataclasses become objects, tuples lists, a number that is not finite "nan", "inf" or
    "-inf".
    """
    kind = type(value)
    if value is None or kind is int or kind is bool or (kind is float and math.isfinite(value)):
        return value  # as most values of a row
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        signed = "inf" if value > 0 else "-inf"
        return "nan" if math.isnan(value) else signed
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, int):
        return value
    if isinstance(value, datetime.date):
        return value.isoformat()
    if dataclasses.is_dataclass(value):
        own = getattr(value, "to_dict", None)  # a class that stores itself in another form
        return own() if own else {name: to_json(getattr(value, name)) for name in names_of(kind)}
    if isinstance(value, Mapping):
        return {encodable(str(name)): to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def names_of(kind: type) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(kind))


# -------- JSON schema


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what `reader_of(kind)` reads."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _schema_within(schema_of(inner[0]), next((item for item in inner[1:] if isinstance(item, Bounds)), None))
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [*(schema_of(item) for item in inner if item is not type(None)), {"type": "null"}]}
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": schema_of(inner[0])}
        return {
            "type": "array",
            "prefixItems": [schema_of(item) for item in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": schema_of(inner[1])}
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        own = getattr(kind, "json_schema", None)
        return (
            own()
            if own
            else object_schema(
                fields_of(kind), [field.name for field in dataclasses.fields(kind) if _has_no_default(field)]
            )
        )
    if issubclass(kind, Enum):
        return {"enum": [item.value for item in kind]}
    return {
        str: {"type": "string"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]},
        datetime.date: {"type": "string", "format": "date"},
    }[kind]


def object_schema(kinds: Mapping[str, Any], required: Any = ()) -> dict[str, Any]:
    """The schema of an object with these names; more may be there."""
    return {
        "type": "object",
        "properties": {name: schema_of(kind) for name, kind in kinds.items()},
        "required": sorted(required),
    }


def _schema_within(schema: dict[str, Any], bounds: Bounds | None) -> dict[str, Any]:
    """A schema of a number with its bounds, which text such as "nan" does not meet or miss."""
    if bounds is None:
        return schema
    ends = {"minimum": bounds.least} | ({"maximum": bounds.most} if bounds.most < math.inf else {})
    return schema | ends
