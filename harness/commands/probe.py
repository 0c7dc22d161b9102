"""What the measurements of a device say of the forecast's rules. python -m harness calibrate

What the forecast says is measured as well: the same measurements run on the CPU under its rounding rules. So a rule
that changes, or that a family of chips has for itself, needs no second statement here.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from harness.devices import Device, Stack, measurements, open_device
from harness.devices.measurements import ADDED, BITS, LENGTH, PROBE_SCHEMA, measure, plain, ties_of, without_queue
from harness.errors import HarnessError
from harness.numerics.expected_error import rounding, rules_of

AGREES, CONTRADICTS, UNMEASURED, NO_RULE = "agrees", "contradicts", "not measured", "no rule"
# a float32 sum may lose this much more or less than the forecast: its order is not public. `floor` leaves a factor of 2
FLOAT32_BITS = 1.0
HALF_BITS = 0.25  # one more rounding of the same size costs half a bit
ATTENTION_BITS = 0.5  # the tiles of its softmax are not public
_ULPS = 1.0  # last places that a float32 function of the vector unit may be further off than the CPU's
HALF_ULPS = 0.25  # half results are rounded once: 0.5 places, and none may be a quarter further off
SKIPPED_BY_FORECAST = ("9 repeats",)  # the forecast is one run


@dataclass(frozen=True, kw_only=True)
class FactVerdict:
    """One rule: what the forecast says, what was measured, and whether they agree."""

    rule: str
    says: Any  # None where the forecast says nothing
    measured: Any  # None where it was not measured
    verdict: str
    words: str  # one sentence


# -------- from numbers to facts


@dataclass(frozen=True, kw_only=True)
class Fact:
    """What the numbers of a measurement come to: a word, a count of bits or of last places; or why there is none."""

    value: Any = None
    lacks: str | None = None  # what was raised instead
    within: float | None = None  # how far from the forecast's it may be; None: it must be the same
    above: bool = False  # only more than the forecast's contradicts


def facts_of(measured: Mapping[str, Any]) -> dict[str, Fact]:
    """The facts in what `measure` gave, by the name of their rule, in the order of the measurements."""
    result: dict[str, Fact] = {}
    for name, numbers in measured.items():
        derive = _DERIVED[name.partition(" ")[0]]
        result |= derive(name, numbers)
    return result


def lacking(numbers: Any) -> str | None:
    """Why there are no numbers: what was raised, or what is not there."""
    return (numbers.get("raised") or numbers.get("absent")) if isinstance(numbers, Mapping) else None


def fact(numbers: Any, derive: Callable[[Any], Any], **room: Any) -> Fact:
    """What `derive` makes of the numbers, or why there are none."""
    why = lacking(numbers)
    return Fact(value=derive(numbers), **room) if why is None else Fact(lacks=why)


def value(text: Any) -> float:
    """A number as the JSON holds it: hexadecimal, "nan", "inf", or a plain one."""
    if not isinstance(text, str):
        return float(text)
    return float(text) if text in ("nan", "inf", "-inf") else float.fromhex(text)


def _operand(name: str, numbers: Any) -> dict[str, Fact]:
    """Bits, ties, range and subnormals of an operand; a number stands for itself where it comes back."""
    what = name.partition(" ")[2]
    parts = ("mantissa bits", "rounding", "range", "subnormals")
    if lacking(numbers):
        return {f"{what}: {part}": Fact(lacks=lacking(numbers)) for part in parts}
    back = {value(given): value(found) for given, found in zip(numbers["given"], numbers["returned"])}
    whole = [bit for bit in BITS if back[1 + 2.0**-bit] == 1 + 2.0**-bit]
    bits = next((bit for bit in reversed(BITS) if set(range(1, bit + 1)) <= set(whole)), 0)
    result = (bits, _rounding(bits, back), _range(back), _subnormals(back))
    return {f"{what}: {part}": Fact(value=item) for part, item in zip(parts, result)}


def _rounding(bits: int, back: Mapping[float, float]) -> str:
    """How what is between two numbers of `bits` bits is rounded, in words."""
    if bits == max(BITS):
        return "none"
    if any(tie not in back for tie in ties_of(bits)):
        return f"unknown: no ties of {bits} bits were sent"
    up = []
    for sign in (1, -1):
        up.append(tuple(abs(back[sign * tie]) > tie for tie in ties_of(bits)))  # low tie, high tie, above, below
    if up[0] != up[1]:
        return "another for each sign"
    kinds = {
        (True, True, True, False): "to nearest, ties away from zero",
        (False, True, True, False): "to nearest, ties to even",
        (False, False, True, False): "to nearest, ties towards zero",
        (True, False, True, False): "to nearest, ties to odd",
        (False, False, False, False): "truncated",
        (True, True, True, True): "away from zero",
    }
    return kinds.get(up[0], f"unknown: {up[0]}")


def _range(back: Mapping[float, float]) -> str:
    large = next(found for given, found in back.items() if given > 1e38)
    if math.isfinite(large) and math.isfinite(back[70000.0]) and back[70000.0] > 65536:
        return "of float32"
    return f"70000 becomes {back[70000.0]:g}, 3e38 becomes {large:g}"


def _subnormals(back: Mapping[float, float]) -> str:
    """Of float32 numbers below the normal range, 2^-126."""
    small = {given: found for given, found in back.items() if 0 < given < 2.0**-126}
    if all(small.values()):
        return "kept"
    return "flushed to zero" if not any(small.values()) else "some flushed to zero"


def _sums(name: str, numbers: Any) -> dict[str, Fact]:
    """The order of the sums, for which the forecast has no rule, and how the accumulator rounds."""
    if lacking(numbers):
        return {"accumulator: rounding": Fact(lacks=lacking(numbers))}
    result = {}
    for dtype in ("float32", "float16", "bfloat16"):
        result[f"order of a {dtype} sum of {LENGTH}"] = fact(numbers[dtype], _order)
    result["accumulator: rounding"] = fact(numbers["rounded"], accumulator_of)
    return result


def _order(sums: Sequence[Any]) -> str:
    return order_of([value(item) for item in sums])


def order_of(sums: Sequence[float]) -> str:
    """Which order of additions gives these sums.

    A group of products is added exactly, then to the total, with one rounding to float32; the group's width is told.
    """
    for width in (1, 2, 4, 8, 16, 32, 64):
        if list(sums) == _grouped(width):
            return "one rounding a product" if width == 1 else f"one rounding for {width} products"
    if all(item == LENGTH - 2 for item in sums[1:]):
        return "exact"
    return "none of groups of 1, 2, 4, 8, 16, 32, 64"


def _grouped(width: int) -> list[float]:
    result = []
    for index in range(LENGTH):
        terms = [1.0] * LENGTH
        if index:
            terms[0], terms[index] = 2.0**24, -(2.0**24)
        total = 0.0
        for start in range(0, LENGTH, width):
            total = torch.tensor(total + math.fsum(terms[start : start + width]), dtype=torch.float64).float().item()
        result.append(total)
    return result


def accumulator_of(rounded: Mapping[str, Any]) -> str:
    """How 2^24 plus a smaller number is rounded: `rounded` holds what came of each. A last place of 2^24 is 2."""
    kinds = {
        "to nearest, ties to even": lambda added: 2 * round(added / 2),
        "to nearest, ties away from zero": lambda added: 2 * math.copysign(math.floor(abs(added) / 2 + 0.5), added),
        "truncated": lambda added: 2 * math.trunc(added / 2),
        "not rounded": lambda added: added,
    }
    sent = [sign * item for item in ADDED for sign in (1, -1)]
    return next(
        (name for name, rule in kinds.items() if all(value(rounded[str(item)]) == rule(item) for item in sent)),
        "none of these",
    )


def _leaves(numbers: Mapping[str, Any], *names: str):
    """The numbers under nested names, ("float32", "64") and so on; what is lacking stands once."""
    for name, number in numbers.items():
        if isinstance(number, Mapping) and not lacking(number):
            yield from _leaves(number, *names, name)
        else:
            yield (*names, name), number


def _bits(what: str, half: float) -> Callable[[str, Any], dict[str, Fact]]:
    """The effective bits of a measurement, by dtype."""

    def derive(name: str, numbers: Any) -> dict[str, Fact]:
        if lacking(numbers):
            return {f"{what}: effective bits": Fact(lacks=lacking(numbers))}
        return {
            f"{what}: effective bits, {' '.join(names)}": _number(leaf, None if names[0] == "float32" else half)
            for names, leaf in _leaves(numbers)
        }

    return derive


def _number(each: Any, within: float | None) -> Fact:
    """Effective bits: of results that lose more than float32 sums do, how much is known better."""
    if lacking(each):
        return Fact(lacks=lacking(each))
    bits = value(each)
    within = within or (FLOAT32_BITS if bits > 16 else HALF_BITS)
    return Fact(value=round(bits, 2) if math.isfinite(bits) else str(bits), within=within)


def _gelu(name: str, numbers: Any) -> dict[str, Fact]:
    if lacking(numbers):
        return {"gelu: formula": Fact(lacks=lacking(numbers))}
    return {f"gelu: formula for approximate={how!r}": _formula(number) for how, number in numbers.items()}


def _formula(distances: Mapping[str, Any]) -> Fact:
    """The nearer of the two formulas, which are 4.7e-4 apart; neither where both are a hundredth of that away."""
    if lacking(distances):
        return Fact(lacks=lacking(distances))
    distance, name = min((value(distances[f"to {name}"]), name) for name in ("erf", "tanh"))
    return Fact(value=name if distance < 5e-6 else f"neither: {distance:.1e} from {name}")


def _vector(name: str, numbers: Any) -> dict[str, Fact]:
    if lacking(numbers):
        return {"vector unit": Fact(lacks=lacking(numbers))}
    result = {}
    for dtype, room in (("float32", _ULPS), ("float16", HALF_ULPS)):
        for function, number in numbers[dtype].items():
            largest = fact(number, lambda item: value(item["max"]), within=room, above=True)
            result[f"{function} {dtype}: largest error in last places"] = largest
    return result | {f"{row}: effective bits": _number(number, FLOAT32_BITS) for row, number in numbers["rows"].items()}


def _edges(name: str, numbers: Any) -> dict[str, Fact]:
    if lacking(numbers):
        return {"overflow, subnormals, nan": Fact(lacks=lacking(numbers))}
    return {what: fact(number, lambda item: f"{value(item):g}") for what, number in numbers.items()}


def _repeats(name: str, numbers: Any) -> dict[str, Fact]:
    if lacking(numbers):
        return {"repeats": Fact(lacks=lacking(numbers))}
    result = {}
    for names, leaf in _leaves(numbers):
        what, kind = (names[:-1], names[-1]) if names[-1] in ("answers", "row alone") else (names, None)
        label = {
            "answers": "different answers in 20 runs",
            "row alone": "a row alone has its bits of the batch",
            None: "repeats",
        }[kind]
        result[f"{' '.join(what)}: {label}"] = fact(leaf, lambda item: item)
    return result


_DERIVED: dict[str, Callable[[str, Any], dict[str, Fact]]] = {
    "1": _operand,
    "2": _operand,
    "3": _sums,
    "4": _bits("product", HALF_BITS),
    "5": _gelu,
    "6": _bits("attention", ATTENTION_BITS),
    "7": _vector,
    "8": _edges,
    "9": _repeats,
    "10": _bits("patch convolution", HALF_BITS),
}
UNRULED = ("order of a ", "its bits of the batch")  # the forecast gives errors of the right size, not the order of sums


# -------- the verdicts


def forecast_of(stack: Stack, names: Sequence[str]) -> dict[str, Any] | None:
    """The same measurements on the CPU under the forecast's rules for this stack; None for a device without rules."""
    if rules_of(stack) is None:
        return None
    result: dict[str, Any] = {}
    for measurement in measurements.MEASUREMENTS:
        if measurement.name not in names or measurement.name in SKIPPED_BY_FORECAST:
            continue
        changed = (
            stack
            if measurement.switch is None
            else replace(stack, **{f"{measurement.switch[0]}_allow_hf32": measurement.switch[1]})
        )
        with torch.no_grad(), rounding(rules_of(changed)):
            result[measurement.name] = plain(
                measurements.tried(lambda item=measurement: item.take(torch.device("cpu")))
            )
    return result


def verdicts_of(measured: Mapping[str, Any], forecast: Mapping[str, Any] | None) -> tuple[FactVerdict, ...]:
    """A verdict on every rule that was looked at."""
    forecast_facts = {} if forecast is None else facts_of(forecast)
    return tuple(
        _verdict(rule, fact, forecast_facts.get(rule), forecast is not None)
        for rule, fact in facts_of(measured).items()
    )


def _verdict(rule: str, fact: Fact, expected: Fact | None, has_rules: bool) -> FactVerdict:
    expected_value = None if expected is None or expected.lacks else expected.value
    if rule.endswith("different answers in 20 runs") and has_rules:
        expected_value, expected = 1, Fact(value=1)
    if any(item in rule for item in UNRULED):
        expected_value = None
    known = dict(rule=rule, says=expected_value, measured=fact.value)
    if fact.lacks:
        return FactVerdict(**known, verdict=UNMEASURED, words=f"{rule} was not measured: {fact.lacks}")
    if expected_value is None:
        return FactVerdict(**known, verdict=NO_RULE, words=f"{rule}: {fact.value}; the forecast has no rule for it")
    if _agree(fact, expected):
        return FactVerdict(
            **known, verdict=AGREES, words=f"{rule}: {fact.value}, and the forecast says {expected_value}"
        )
    room = "" if expected.within is None else f", give or take {expected.within:g}"
    return FactVerdict(
        **known, verdict=CONTRADICTS, words=f"{rule}: {fact.value} where the forecast says {expected_value}{room}"
    )


def _agree(fact: Fact, expected: Fact) -> bool:
    """Whether a fact is the forecast's, or near enough; the forecast's own size decides how well it is known."""
    if expected.within is None or not all(isinstance(item.value, float) for item in (fact, expected)):
        return fact.value == expected.value
    more = fact.value - expected.value
    return more <= expected.within and (fact.above or -more <= expected.within)


# -------- the file and the terminal


def probe(
    device: Device | str,
    path: Path,
    *,
    wanted: tuple[str, ...] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a device, write one JSON, and return it.

    `device` is what `open_device` gives, or the word that it takes; `wanted` names the measurements (default: all);
    `say` hears which runs.
    Raises: HarnessError when the file cannot be written, DeviceError when the device cannot run.

        probe("npu:0", Path("probe.json"))
    """
    _check_writable(path)
    if isinstance(device, str):
        without_queue()
        device = open_device(device)
    stack = device.stack
    with torch.no_grad():
        result = measure(device.torch_device, wanted, say=say)
    say("what the forecast says")
    document = {
        "schema": PROBE_SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "emulated": stack.backend == "emulated",
        "stack": plain(stack.to_dict()),
        **result,
    }
    document |= derived_of(document)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return document


def _check_writable(path: Path) -> None:
    """Raises: HarnessError where a file cannot be written; said before the minute of measuring."""
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise HarnessError(f"{path} cannot be written: {why}; name a file")


def derived_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a probe come to: the rules in force, a verdict on each, and how many of each kind."""
    stack = Stack.from_dict(document["stack"])
    rules = rules_of(stack)
    verdicts = verdicts_of(document["measured"], forecast_of(stack, tuple(document["measured"])))
    counts = {
        kind: sum(item.verdict == kind for item in verdicts) for kind in (AGREES, CONTRADICTS, UNMEASURED, NO_RULE)
    }
    return {
        "rules": None if rules is None else str(rules),
        "counts": counts,
        "verdicts": [plain(asdict(item)) for item in verdicts],
    }


def read_probe(path: Path) -> dict[str, Any]:
    """A probe as its owner sent it, with the verdicts of this version. Raises: HarnessError when the file is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != PROBE_SCHEMA:
            result = f"{path} is of schema {document['schema']} where {PROBE_SCHEMA} was expected"
            raise HarnessError(f"{result}; read it with the version that wrote it")
        return document | derived_of(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        advice = "write one with `python -m harness calibrate --device npu --output FILE`"
        raise HarnessError(f"{path} is no probe ({type(error).__name__}: {error}); {advice}") from None


def text_of(document: Mapping[str, Any]) -> str:
    """A probe for the terminal: what contradicts the forecast, what was not measured, what there is no rule for."""
    stack, verdicts = document["stack"], document["verdicts"]
    parts = []
    if document["emulated"]:
        parts.append("EMULATED: these numbers come from the emulated CANN; they confirm nothing of an NPU.")
    rules = document["rules"] or "it has no rules for this device"
    parts.append(f"{stack['device']} ({stack['backend']}); the forecast: {rules}")
    parts.append(
        ", ".join(f"{count} {kind}" for kind, count in document["counts"].items() if count) or "nothing was measured"
    )
    if document.get("stopped"):
        parts.append(f"The device stopped computing at {document['stopped']}; what comes after it was not measured.")
    if document["rules"] is None:
        rows = [(item["rule"], "–" if item["measured"] is None else item["measured"]) for item in verdicts]
        return "\n\n".join(
            [*parts, tabulate(rows, headers=("what", "measured"), tablefmt="simple", disable_numparse=True)]
        )
    for kind in (CONTRADICTS, UNMEASURED, NO_RULE):
        lines = [f"- {item['words']}" for item in verdicts if item["verdict"] == kind]
        if lines:
            parts.append("\n".join([f"{kind}:", *lines]))
    return "\n\n".join(parts)
