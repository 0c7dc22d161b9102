"""The criteria put to the test: faults planted in the emulated device, and changes that are none, each judged by every preset.

    python -m harness.conformance detection [--models digits causal …] [--dtypes float32 …] [--output FILE]

A fault's size is its damage: how far it moves the output, ‖faulty - sound‖ / ‖sound‖, in units of the floor, what a sound device is
expected to lose. `floor` promises to catch what moves the output by more than its slack and one: 3 floors for a thousand elements and more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import emulator
from harness.case import measure
from harness.measure import compare
from harness.devices import Device, open_device
from harness.emulator.faults import Fault
from harness.errors import HarnessError
from harness.forecast import Rules, rounding, rules_of
from harness.gate import PRESETS, Tolerance, judge, slack
from harness.reference import copy_module, move, run, tensors_of

DTYPES = ("float32", "float16", "bfloat16")
PLACES = {"early": 0.05, "middle": 0.5, "late": 0.95}  # of the operators of a forward
FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("hf32", {}), ("fp16", {}), ("mask", {}), ("index", {}),
    *[("scale", {"by": by}) for by in (2.0, 1.1, 1.01, 1.001)],
    *[("offset", {"by": by}) for by in (1.0, 1e-2, 1e-3)],
    *[("noise", {"by": by}) for by in (1e-1, 1e-2, 1e-3)],
    *[("tile", {"size": size}) for size in (16, 2)],
    *[("tail", {"size": size}) for size in (64, 4)],
    ("swap_rows", {"at": 1}), ("zero_rows", {"at": 2}), ("swap_heads", {}), ("zero_heads", {"at": 1}),
    ("nan", {"at": 5}), ("inf", {"at": 5}), ("saturate", {"by": 1.0}), ("stale", {}),
]  # fmt: skip
TRIES = 12  # operators near a place that are tried until one has something to change


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its inputs; `forward` picks the tensors."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    forward: Callable[[nn.Module, Any], Any] | None = None


def _noise(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def _digits() -> nn.Module:
    from harness.models.digits import model

    return model()


def _digit_pictures(generator: torch.Generator) -> Tensor:
    from harness.models.digits import held_out

    return held_out()[0][torch.randperm(360, generator=generator)[:128]]


def _aimv2() -> nn.Module:
    from harness.models.aimv2 import AIMv2Config, build

    return build(AIMv2Config(width=192, depth=12, heads=6, hidden=512, image_size=56))


class Residual(nn.Module):
    """(B, C, H, W) to the same: two convolutions, normalised in groups, around a GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Convolutional(nn.Module):
    """Pictures (B, 3, 32, 32) to features (B, 64, 16, 16), through 8 residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*[Residual(64) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).permute(0, 2, 3, 1)  # channels last: a position is a token


class Causal(nn.Module):
    """Token ids (B, N) to logits (B, N, 512): 8 blocks of causal attention, the last token fed with a KV cache."""

    def __init__(self, width: int = 128, depth: int = 8, heads: int = 4, vocabulary: int = 512):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.RMSNorm(width), "qkv": nn.Linear(width, 3 * width, bias=False), "out": nn.Linear(width, width, bias=False),
                "norm2": nn.RMSNorm(width), "gate": nn.Linear(width, 4 * width, bias=False), "down": nn.Linear(2 * width, width, bias=False),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        caches: list = [None] * len(self.blocks)
        return torch.cat([self._step(ids[:, :-1], caches), self._step(ids[:, -1:], caches)], 1)

    def _step(self, ids: Tensor, caches: list) -> Tensor:
        x = self.embedding(ids)
        for number, block in enumerate(self.blocks):
            q, k, v = block["qkv"](block["norm"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if caches[number] is not None:
                k, v = torch.cat([caches[number][0], k], 2), torch.cat([caches[number][1], v], 2)
            caches[number] = k, v
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
            gate, up = block["gate"](block["norm2"](x)).chunk(2, -1)
            x = x + block["down"](F.silu(gate) * up)
        return self.head(self.norm(x))


SUBJECTS = (
    Subject(name="digits", build=_digits, inputs=_digit_pictures),
    Subject(name="aimv2", build=_aimv2, inputs=_noise(2, 3, 56, 56)),
    Subject(name="convolutional", build=Convolutional, inputs=_noise(2, 3, 32, 32)),
    Subject(name="causal", build=Causal, inputs=lambda generator: torch.randint(0, 512, (2, 32), generator=generator)),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault or benign change: where, how far it moved the output, and which presets raised an alarm."""

    subject: str
    dtype: str
    what: str  # the fault, or the benign change
    kind: str
    place: str
    damage: float  # in floors; infinite where an element is not finite; NaN for a benign change
    size: float  # from which `floor` promises to catch it, in floors
    alarms: frozenset[str] = field(default_factory=frozenset)

    @property
    def promised(self) -> bool:
        return self.damage > self.size


@dataclass(frozen=True, kw_only=True)
class Benign:
    """What a sound device may do otherwise: rules of its rounding, or the number of threads."""

    what: str
    rules: dict[str, Any] = field(default_factory=dict)
    threads: int = 1


BENIGN = (
    *(Benign(what=f"sums in {groups} parts", rules={"groups": groups}) for groups in (1, 2, 8, 16)),
    Benign(what="ties to even", rules={"ties": "even"}),
    *(Benign(what=f"{count} threads", threads=count) for count in (2, 3)),
)


class Bench:
    """One model in one dtype with one set of inputs: the references, and the device to break."""

    def __init__(self, subject: Subject, dtype: str, device: Device, seed: int = 0):
        self.subject, self.dtype, self.device = subject, dtype, device
        chosen = getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = subject.build().eval().requires_grad_(False)
        self.inputs = move(subject.inputs(torch.Generator().manual_seed(seed)), device="cpu", dtype=chosen)
        self.narrow = copy_module(base, dtype=chosen, device=torch.device("cpu"))
        self.there = copy_module(base, dtype=chosen, device=device.torch_device)
        self.rules = rules_of(device.stack)
        self.expected = self.on_cpu(self.narrow, self.inputs)
        self.forecast = self.on_cpu(self.narrow, self.inputs, self.rules)
        self.other = self.on_cpu(self.narrow, self.inputs, replace(self.rules, ties="even"))
        wide = copy_module(self.narrow, dtype=torch.float64, device=torch.device("cpu"))
        self.golden = self.on_cpu(wide, move(self.inputs, device="cpu", dtype=torch.float64))
        self.sound = self.on_device()

    def on_cpu(self, model: nn.Module, inputs: Any, rules: Rules | None = None) -> dict[str, Tensor]:
        with rounding(rules):
            return tensors_of(run(model, inputs, forward=self.subject.forward, where="on the CPU"), self.subject.name)

    def otherwise(self, change: Benign) -> dict[str, Tensor]:
        """The forecast of a device that does something otherwise."""
        before = torch.get_num_threads()
        torch.set_num_threads(change.threads)
        try:
            return self.on_cpu(self.narrow, self.inputs, replace(self.rules, **change.rules))
        finally:
            torch.set_num_threads(before)

    def on_device(self) -> dict[str, Tensor]:
        inputs = move(self.inputs, device=self.device.torch_device)
        outputs = run(self.there, inputs, forward=self.subject.forward, where="on the device")
        self.device.synchronize()
        return move(tensors_of(outputs, self.subject.name), device="cpu")

    def trial(self, outputs: dict[str, Tensor], *, what: str, kind: str, place: str, benign: bool = False) -> Trial | None:
        """None where a fault left every bit as it was."""
        comparisons, references = measure(outputs, self.expected, self.golden, self.forecast, self.rules.modes, self.other)
        alarms = frozenset(name for name in PRESETS if not judge(comparisons, Tolerance(preset=name), references=references).passed)
        (name, held), *_ = references.items()
        moved = compare(outputs[name], self.sound[name])
        if not benign and not moved.unequal:
            return None
        damage = float("nan") if benign else float("inf") if moved.nonfinite_differ else moved.rel_l2 / max(held.floor("rel_l2"), 1e-30)
        more = dict(damage=damage, size=slack(moved.numel) + 1, alarms=alarms)
        return Trial(subject=self.subject.name, dtype=self.dtype, what=what, kind=kind, place=place, **more)


class _Census(Fault):
    """Counts the calls and changes nothing."""

    def __init__(self):
        super().__init__("*", "stale")
        self.names: list[str] = []

    def strikes(self, name: str) -> bool:
        self.names.append(name)
        return False


def _called(bench: Bench) -> list[str]:
    """The operators of one forward, in order."""
    census = _Census()
    emulator.faults.plant(census)
    try:
        bench.on_device()
    finally:
        emulator.faults.remove(census)
    return census.names


def faulty(bench: Bench, faults: list[tuple[str, dict[str, Any]]] = FAULTS) -> Iterator[Trial]:
    """Each fault at each place: in the operator nearest to it that has something to change."""
    names = _called(bench)
    for kind, settings in faults:
        for place, share in PLACES.items():
            start = int(share * len(names))
            for position in sorted(range(len(names)), key=lambda each: abs(each - start))[:TRIES]:
                found = _planted(bench, names, position, kind, settings, place)
                if found is not None:
                    yield found
                    break


def _planted(bench: Bench, names: list[str], position: int, kind: str, settings: dict[str, Any], place: str) -> Trial | None:
    name = names[position]
    heads = {"heads": 4} if "heads" in kind else {}
    with emulator.fault(name, kind, nth=names[: position + 1].count(name), **heads, **settings) as planted:
        outputs = bench.on_device()
    if not planted.hits:
        return None
    options = ", ".join(f"{option} {value:g}" for option, value in settings.items())
    return bench.trial(outputs, what=f"{name} {kind}{f' {options}' if options else ''}", kind=kind, place=place)


def benign(bench: Bench) -> Iterator[Trial]:
    """Changes that a sound device may show: other orders of sums, other ties, other threads, a rerun."""

    def trial(what: str, outputs: dict[str, Tensor]) -> Trial:
        return bench.trial(outputs, what=what, kind="benign", place="", benign=True)

    yield trial("as it is", bench.sound)
    yield trial("rerun", bench.on_device())
    for change in (*BENIGN, Benign(what="1 threads")):
        yield trial(change.what, bench.otherwise(change))


def matrix(names: list[str], dtypes: list[str], *, faults: list[tuple[str, dict[str, Any]]] = FAULTS, seeds: int = 5) -> list[Trial]:
    """Every fault and every benign change, on each model in each dtype; benign ones with `seeds` inputs."""
    device = open_device("emulated")
    known = {each.name: each for each in SUBJECTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise HarnessError(f"no model is called {', '.join(unknown)}; there are {', '.join(known)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small: threads would wait for one another
    try:
        return [each for name in names for dtype in dtypes for each in _trials(known[name], dtype, device, faults, seeds)]
    finally:
        torch.set_num_threads(threads)


def _trials(subject: Subject, dtype: str, device: Device, faults: list[tuple[str, dict[str, Any]]], seeds: int) -> Iterator[Trial]:
    bench = Bench(subject, dtype, device)
    yield from faulty(bench, faults)
    yield from benign(bench)
    for seed in range(1, seeds):
        yield from benign(Bench(subject, dtype, device, seed))


# ---------------------------------------------------------------------------------------------------------- the report


def text(trials: list[Trial]) -> str:
    """The counts by preset, by kind of fault, by model, then what `floor` did not see, and every false alarm."""
    planted = [each for each in trials if each.kind != "benign"]
    sound = [each for each in trials if each.kind == "benign"]
    large = [each for each in planted if each.promised]
    small = [each for each in planted if not each.promised]
    lines = ["# The detection matrix", "", f"{len(planted)} faults planted, {len(large)} above the size that `floor` promises to catch; {len(sound)} benign changes.", ""]
    lines += ["| preset | caught, above the size | caught, below it | false alarms |", "|---|---|---|---|"]
    for name in PRESETS:
        caught = [sum(name in each.alarms for each in group) for group in (large, small, sound)]
        lines.append(f"| {name} | {caught[0]} of {len(large)} | {caught[1]} of {len(small)} | {caught[2]} of {len(sound)} |")
    for title, key in (("kind", "kind"), ("model", "subject"), ("dtype", "dtype"), ("place", "place")):
        lines += ["", f"## Caught by {title}, above the size", "", f"| {title} | faults | {' | '.join(PRESETS)} |", f"|---|---|{'---|' * len(PRESETS)}"]
        for value in dict.fromkeys(getattr(each, key) for each in large):
            group = [each for each in large if getattr(each, key) == value]
            lines.append(f"| {value} | {len(group)} | {' | '.join(str(sum(name in each.alarms for each in group)) for name in PRESETS)} |")
    lines += ["", "## What `floor` did not catch", "", "| model | dtype | fault | place | damage in floors | caught by |", "|---|---|---|---|---|---|"]
    for each in sorted(planted, key=lambda each: -each.damage):
        if "floor" not in each.alarms:
            lines.append(f"| {each.subject} | {each.dtype} | {each.what} | {each.place} | {each.damage:.2g} | {', '.join(sorted(each.alarms))} |")
    lines += ["", "## False alarms", "", "| model | dtype | change | alarms |", "|---|---|---|---|"]
    alarmed = {(each.subject, each.dtype, each.what, tuple(sorted(each.alarms))): 0 for each in sound if each.alarms}
    for each in sound:
        if each.alarms:
            alarmed[each.subject, each.dtype, each.what, tuple(sorted(each.alarms))] += 1
    lines += [f"| {subject} | {dtype} | {what} ({count}) | {', '.join(names)} |" for (subject, dtype, what, names), count in alarmed.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    names = [each.name for each in SUBJECTS]
    parser = argparse.ArgumentParser(prog="python -m harness.conformance detection", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=names, metavar="MODEL", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seeds", type=int, default=5, help="sets of inputs for the benign changes (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there; else it is printed")
    arguments = parser.parse_args(argv)
    trials = matrix(arguments.models, arguments.dtypes, seeds=arguments.seeds)
    report = text(trials)
    if arguments.output:
        arguments.output.write_text(report + "\n", encoding="utf-8")
    print(report if not arguments.output else "\n".join(report.splitlines()[2:14]))
    missed = [each for each in trials if each.promised and "floor" not in each.alarms]
    alarms = [each for each in trials if each.kind == "benign" and "floor" in each.alarms]
    return 1 if missed or alarms else 0
