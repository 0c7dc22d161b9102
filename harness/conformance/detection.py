"""The criteria put to the test: faults planted in the emulated device, and changes that are none, each judged by every
preset.

    python -m harness.conformance detection [--models digits causal …] [--dtypes float32 …] [--jobs N] [--output FILE]

A fault's size is its damage: how far it moves the output, ‖faulty - sound‖ / ‖sound‖, in units of the floor, what a
sound device is expected to lose. `floor` promises to catch what moves the output by more than its slack and one: 3
floors for a thousand elements and more, of fewer what their scatter allows and one.
Faults are planted in one operator, in the calls that a model makes, or in its output. A benign change is another
rounding, or an assumption of the forecast made otherwise that no NPU has confirmed. A fault that the row of a half
dtype does not show may show in the float32 row.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness import emulator
from harness.conformance.options import parser_of
from harness.conformance.subjects import MORE, SUBJECT_DTYPES, SUBJECTS, Subject
from harness.conformance.wrong import EVERY, ONE, Wrong, computing_wrongly
from harness.devices import Device, open_device
from harness.emulator.faults import Fault
from harness.errors import HarnessError
from harness.judging.checks import checks_of, hangs_on_slack, judge
from harness.judging.presets import PRESETS
from harness.judging.references import MANY
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Verdict
from harness.measure import RUNS, compare
from harness.numerics import Vector
from harness.numerics.expected_error import Rules, rounding, rules_of
from harness.reference import WideRequests, copy_module, move, run, tensors_of
from harness.run.assumptions import assumption_of, hangs
from harness.run.comparisons import measured_outputs

_DEPTHS = {"early": 0.05, "middle": 0.5, "late": 0.95}  # of the operators of a forward
FAULT_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("hf32", {}), ("fp16", {}), ("mask", {}), ("index", {}),
    *[("scale", {"by": by}) for by in (2.0, 1.1, 1.01, 1.001)],
    *[("offset", {"by": by}) for by in (1.0, 1e-2, 1e-3)],
    *[("noise", {"by": by}) for by in (1e-1, 1e-2, 1e-3)],
    *[("tile", {"size": size}) for size in (16, 2)],
    *[("tail", {"size": size}) for size in (64, 4)],
    ("swap_rows", {"at": 1}), ("zero_rows", {"at": 2}), ("swap_heads", {}), ("zero_heads", {"at": 1}),
    ("nan", {"at": 5}), ("inf", {"at": 5}), ("saturate", {"by": 1.0}), ("stale", {}),
]  # fmt: skip
MORE_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {}), ("int8", {}), ("no_bias", {}), ("copy_heads", {}),
    ("half_rows", {"by": 1.02}), *[("channel", {"at": 3, "by": by}) for by in (0.0, 1.1)],
]  # fmt: skip
TRIES = 12  # operators near a place that are tried until one has something to change


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault or benign change: where, how far it moved the output, and which presets raised an alarm."""

    subject: str
    dtype: str
    what: str  # the fault, or the benign change
    kind: str
    depth: str
    damage: float  # in floors; infinite where an element is not finite; NaN for a benign change
    size: float  # from which `floor` promises to catch it, in floors
    alarms: frozenset[str] = field(default_factory=frozenset)
    assumption: str = ""  # what an NPU would have to do otherwise for `floor` to pass, as the row says
    share: float = math.nan  # of a limit of `floor` that was used up, where most of it was
    nearest: str = ""  # the name of that limit

    @property
    def promised(self) -> bool:
        return self.damage > self.size

    @property
    def planted(self) -> tuple[str, str, str]:
        """What names the same fault in another dtype."""
        return self.subject, self.what, self.depth


@dataclass(frozen=True, kw_only=True)
class Benign:
    """What a sound device may do otherwise: rules of its rounding, or the number of threads."""

    what: str
    rules: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    dtypes: tuple[str, ...] = SUBJECT_DTYPES  # of the models in which it is something else


def _vector(what: str, *dtypes: str, **settings) -> Benign:
    return Benign(what=what, rules={"vector": Vector(**settings)}, dtypes=dtypes or SUBJECT_DTYPES)


BENIGN = (
    *(Benign(what=f"sums in {groups} parts", rules={"groups": groups}) for groups in (1, 2, 8, 16)),
    Benign(what="ties to even", rules={"ties": "even"}),
    *(Benign(what=f"{count} threads", threads=count) for count in (2, 3)),
)
UNSUPPORTED = (  # assumptions of the forecast that no measurement of an NPU supports, each made otherwise
    _vector("vector functions off by up to a last place", places=1),
    _vector("vector functions off by up to two last places", places=2),
    _vector("vector functions too large by a last place", places=1, upwards=True),
    _vector("vector functions too large by two last places", places=2, upwards=True),
    _vector("half functions in half", "float16", half=True),
    _vector("half functions in half, up to a last place off", "float16", half=True, half_places=1),
    _vector("sums of norms and softmax in 64 lanes", order="lanes"),
    _vector("sums of norms and softmax one by one", order="one by one"),
    _vector("variances in one pass", one_pass=True),
    _vector("softmax in tiles of 8", tile=8),
    _vector("ties of elementwise half results away from zero", "float16", "bfloat16", ties_away=True),
    _vector("ties of attention's casts to even", "float16", "bfloat16", attention_even=True),
    Benign(what="attention by its products", rules={"fused_attention": False}),
    Benign(what="float32 convolutions, GELU as asked", rules={"conv": "float32", "gelu_tanh": False}),
)


class Bench:
    """One model in one dtype with one set of inputs: the references, and the device to break."""

    def __init__(self, subject: Subject, dtype: str, device: Device, seed: int = 0):
        self.subject, self.dtype, self.device = subject, dtype, device
        self._by: dict[Rules, dict[str, Tensor]] = {}
        chosen = getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = subject.build().eval().requires_grad_(False)
        self.inputs = move(subject.inputs(torch.Generator().manual_seed(seed)), device="cpu", dtype=chosen)
        self.narrow = copy_module(base, dtype=chosen, device=torch.device("cpu"))
        self.there = copy_module(base, dtype=chosen, device=device.torch_device)
        with self.switched():
            self.rules = rules_of(device.stack)
        self.expected = self.on_cpu(self.narrow, self.inputs)
        self.forecast = self.on_cpu(self.narrow, self.inputs, self.rules)
        self.other = self.on_cpu(self.narrow, self.inputs, replace(self.rules, ties="even"))
        wide = copy_module(self.narrow, dtype=torch.float64, device=torch.device("cpu"))
        with WideRequests():
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

    @contextlib.contextmanager
    def switched(self) -> Iterator[None]:
        """While the block runs the device has the subject's switches."""
        before = torch.npu.conv.allow_hf32
        torch.npu.conv.allow_hf32 = before and self.subject.hf32
        try:
            yield
        finally:
            torch.npu.conv.allow_hf32 = before

    def on_device(self) -> dict[str, Tensor]:
        inputs = move(self.inputs, device=self.device.torch_device)
        with self.switched():
            outputs = run(self.there, inputs, forward=self.subject.forward, where="on the device")
            self.device.synchronize()
        return move(tensors_of(outputs, self.subject.name), device="cpu")

    def assumption(self, outputs: dict[str, Tensor], verdict: Verdict) -> str:
        """What a row that fails says that it hangs on."""
        if not hangs(verdict):
            return ""

        def again(forecast: dict[str, Tensor]) -> Verdict:
            comparisons, references = measured_outputs(outputs, self.expected, self.golden, forecast, self.rules.modes)
            return judge(comparisons, verdict.tolerance, references=references)

        return assumption_of(again, self.forecast_by, self.rules, self.dtype)

    def forecast_by(self, rules: Rules) -> dict[str, Tensor]:
        """What the CPU computes under other rules, once for all faults."""
        if rules not in self._by:
            self._by[rules] = self.on_cpu(self.narrow, self.inputs, rules)
        return self._by[rules]

    @functools.cached_property
    def random(self) -> list[dict[str, Tensor]]:
        """The forecast, and as many with random roundings as a row is judged by (`harness.measure.scatter`)."""
        rules = [replace(self.rules, random=seed) for seed in range(RUNS)]
        return [self.forecast, *(self.on_cpu(self.narrow, self.inputs, rule) for rule in rules)]

    def measured(self, outputs: dict[str, Tensor], random: Sequence[dict[str, Tensor]] = ()) -> tuple[dict, dict]:
        """The comparisons and references of `harness.run.comparisons.measure` for what the device returned."""
        return measured_outputs(
            outputs, self.expected, self.golden, self.forecast, self.rules.modes, self.other, random
        )

    def trial(
        self, outputs: dict[str, Tensor], *, what: str, kind: str, depth: str, benign: bool = False
    ) -> Trial | None:
        """None where a fault left every bit as it was."""
        comparisons, references = self.measured(outputs)
        verdicts = {name: judge(comparisons, Tolerance(preset=name), references=references) for name in PRESETS}
        if any(comparison.numel < MANY for comparison in comparisons.values()):
            comparisons, references = self.measured(outputs, self.random)
            verdicts |= {
                name: judge(comparisons, Tolerance(preset=name), references=references)
                for name, verdict in verdicts.items()
                if hangs_on_slack(verdict)
            }
        alarms = frozenset(name for name, verdict in verdicts.items() if not verdict.passed)
        nearest = max(checks_of(verdicts["floor"]), key=lambda value: _share(value.found, value.limit))
        (name, reference), *_ = references.items()
        moved = compare(outputs[name], self.sound[name])
        if not benign and not moved.unequal:
            return None
        damage = math.inf if moved.nonfinite_differ else moved.rel_l2 / max(reference.floor("rel_l2"), 1e-30)
        more = dict(damage=math.nan if benign else damage, size=reference.slack + 1, alarms=alarms)
        more |= dict(assumption=self.assumption(outputs, verdicts["floor"]))
        more |= dict(share=_share(nearest.found, nearest.limit), nearest=nearest.name)
        return Trial(subject=self.subject.name, dtype=self.dtype, what=what, kind=kind, depth=depth, **more)


def _share(result: float, limit: float) -> float:
    """The part of a limit that was used up; infinite for what is not finite."""
    if result == 0:
        return 0.0
    return abs(result) / limit if math.isfinite(result) and limit else math.inf


class _Census(Fault):
    """Counts the calls and changes nothing."""

    def __init__(self):
        super().__init__("*", "stale")
        self.names: list[str] = []

    def matches(self, name: str, card: int = 0) -> bool:
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


def faulty(bench: Bench, faults: list[tuple[str, dict[str, Any]]] = FAULT_KINDS) -> Iterator[Trial]:
    """Each fault at each place: in the operator nearest to it that has something to change."""
    names = _called(bench)
    for kind, settings in faults:
        idle: set[str] = set()  # operators in which this fault has nothing to change, such as a mask in a product
        for depth, share in _DEPTHS.items():
            start = int(share * len(names))
            for position in sorted(range(len(names)), key=lambda value: abs(value - start))[:TRIES]:
                if names[position] in idle:
                    continue
                result = _planted(bench, names, position, kind, settings, depth, idle)
                if result is not None:
                    yield result
                    break


def miscomputed(bench: Bench, wrongs: tuple[Wrong, ...] = (*EVERY, *ONE)) -> Iterator[Trial]:
    """Each wrong computation that the model has calls for: those of `ONE` in the middle one of these calls."""
    for wrong in wrongs:
        with computing_wrongly(wrong) as acted:
            outputs = bench.on_device()
        if wrong in ONE and acted.calls > 1:
            with computing_wrongly(replace(wrong, nth=(acted.calls + 1) // 2)) as acted:
                outputs = bench.on_device()
        if not acted.hits:
            continue
        result = bench.trial(outputs, what=wrong.what, kind="one call" if wrong in ONE else "every call", depth="")
        if result is not None:
            yield result


def edited(bench: Bench) -> Iterator[Trial]:
    """The faults of the subject's first output, made in what a sound device returns."""
    (name, sound), *others = bench.sound.items()
    for what, edit in bench.subject.outputs.items():
        result = bench.trial({name: edit(sound), **dict(others)}, what=what, kind="output", depth="")
        if result is not None:
            yield result


def _planted(
    bench: Bench,
    names: list[str],
    position: int,
    kind: str,
    settings: dict[str, Any],
    depth: str,
    idle: set[str] | None = None,
) -> Trial | None:
    """The fault in one call; None where it changes nothing. Operators with nothing to change join `idle`."""
    name = names[position]
    heads = {"heads": 4} if "heads" in kind else {}
    with emulator.fault(name, kind, nth=names[: position + 1].count(name), **heads, **settings) as fault:
        outputs = bench.on_device()
    if not fault.hits:
        if idle is not None:
            idle.add(name)
        return None
    options = ", ".join(f"{option} {value:g}" for option, value in settings.items())
    return bench.trial(outputs, what=f"{name} {kind}{f' {options}' if options else ''}", kind=kind, depth=depth)


def benign(bench: Bench, changes: tuple[Benign, ...] = (*BENIGN, *UNSUPPORTED)) -> Iterator[Trial]:
    """Changes that a sound device may show; of `UNSUPPORTED` those that change a bit."""

    def trial(what: str, outputs: dict[str, Tensor]) -> Trial:
        return bench.trial(outputs, what=what, kind="benign", depth="", benign=True)

    yield trial("as it is", bench.sound)
    yield trial("rerun", bench.on_device())
    for change in (Benign(what="1 threads"), *changes):
        if bench.dtype not in change.dtypes:
            continue
        outputs = bench.otherwise(change)
        if change in UNSUPPORTED and all(torch.equal(outputs[name], item) for name, item in bench.forecast.items()):
            continue  # nothing in this model is computed so
        yield trial(change.what, outputs)


def matrix(
    names: list[str],
    dtypes: list[str],
    *,
    faults: list[tuple[str, dict[str, Any]]] | None = None,
    seeds: int = 5,
    jobs: int = 1,
) -> list[Trial]:
    """Every fault and every benign change on every model in every dtype, benign ones with `seeds` inputs.

    `jobs` processes share the work.

    Raises: HarnessError for a model that there is not, or that lacks what must be installed.
    """
    open_device("emulated")  # before a model's library, which may ask for an NPU as it is imported
    for name in names:
        lacks = subject(name).lacking()
        if lacks:
            raise HarnessError(f"{name}: {lacks}")
    pairs = [(name, dtype) for name, dtype in itertools.product(names, dtypes) if dtype in subject(name).dtypes]
    given = [(name, dtype, faults, seeds) for name, dtype in pairs]
    if jobs == 1:
        return [trial for work in given for trial in _trials(*work)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [item for found in pool.map(_trials, *zip(*given)) for item in found]


def subject(name: str) -> Subject:
    """The model of a name. Raises: HarnessError for one that there is not."""
    known = {item.name: item for item in (*SUBJECTS, *MORE)}
    if name not in known:
        raise HarnessError(f"no model is called {name}; there are {', '.join(known)}")
    return known[name]


def _trials(name: str, dtype: str, faults: list[tuple[str, dict[str, Any]]] | None, seeds: int) -> list[Trial]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small: threads would wait for one another
    try:
        device = open_device("emulated")
        first = Bench(subject(name), dtype, device)
        result = list(faulty(first, [*FAULT_KINDS, *MORE_FAULTS] if faults is None else faults))
        result += [*miscomputed(first), *edited(first), *benign(first)]
        for seed in range(1, seeds):
            result += benign(Bench(subject(name), dtype, device, seed))
        return result
    finally:
        torch.set_num_threads(threads)


# -------- the report


def text(trials: list[Trial], skipped: Mapping[str, str] | None = None) -> str:
    """The counts by preset, by kind of fault, by model; benign changes; what `floor` did not see; false alarms."""
    planted = [trial for trial in trials if trial.kind != "benign"]
    sound = [trial for trial in trials if trial.kind == "benign"]
    large = [fault for fault in planted if fault.promised]
    small = [fault for fault in planted if not fault.promised]
    above = f"{len(large)} above the size that `floor` promises to catch"
    count = f"{len(planted)} faults planted, {above}; {len(sound)} benign changes."
    lines = ["# The detection matrix", "", count, ""]
    lines += ["| preset | caught, above the size | caught, below it | false alarms |", "|---|---|---|---|"]
    for name in PRESETS:
        caught = [sum(name in item.alarms for item in group) for group in (large, small, sound)]
        lines.append(
            f"| {name} | {caught[0]} of {len(large)} | {caught[1]} of {len(small)} | {caught[2]} of {len(sound)} |"
        )
    lines += ["", *_summary(planted, sound)]
    lines += [f"Left out: {name}, {why}." for name, why in (skipped or {}).items()]
    for title, key in (("kind", "kind"), ("model", "subject"), ("dtype", "dtype"), ("place", "depth")):
        lines += [
            "",
            f"## Caught by {title}, above the size",
            "",
            f"| {title} | faults | {' | '.join(PRESETS)} |",
            f"|---|---|{'---|' * len(PRESETS)}",
        ]
        for value in dict.fromkeys(getattr(item, key) for item in large):
            group = [item for item in large if getattr(item, key) == value]
            counts = " | ".join(str(sum(name in item.alarms for item in group)) for name in PRESETS)
            lines.append(f"| {value or 'no operator'} | {len(group)} | {counts} |")
    lines += ["", *_benign_table(sound)]
    lines += ["", *_missed_table(planted), "", *_alarm_table(sound)]
    return "\n".join(lines)


LISTED = 0.5  # floors: a fault that moves the output by less and is not seen is counted, and not listed


def _missed_table(planted: list[Trial]) -> list[str]:
    """What `floor` did not catch, the largest first, and what the float32 row says of it."""
    seen = _float32_rows(planted)
    missed = sorted((fault for fault in planted if "floor" not in fault.alarms), key=lambda value: -value.damage)
    listed = [item for item in missed if item.damage >= LISTED]
    lines = ["## What `floor` did not catch", ""]
    lines += [
        "| model | dtype | fault | place | damage in floors | float32 row | caught by |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in listed:
        row = "" if item.dtype == "float32" else seen.get(item.planted, "not planted")
        where = f"{item.subject} | {item.dtype} | {item.what} | {item.depth}"
        lines.append(f"| {where} | {item.damage:.2g} | {row} | {', '.join(sorted(item.alarms))} |")
    return [*lines, "", f"{len(missed) - len(listed)} more move the output by less than {LISTED:g} floors."]


def _alarm_table(sound: list[Trial]) -> list[str]:
    """The false alarms: of `floor` and `sharp` by change, of the other presets by model and dtype."""
    counts: dict[tuple[str, ...], int] = {}
    for item in sound:
        if item.alarms:
            what = item.what if item.alarms & {"floor", "sharp"} else "any"
            key = (item.subject, item.dtype, what, ", ".join(sorted(item.alarms)))
            counts[key] = counts.get(key, 0) + 1
    lines = ["## False alarms", "", "| model | dtype | change | alarms |", "|---|---|---|---|"]
    for (model, dtype, what, names), count in counts.items():
        lines.append(f"| {model} | {dtype} | {what} ({count}) | {names} |")
    return lines


def _float32_rows(planted: list[Trial]) -> dict[tuple, str]:
    """What the float32 row says of each fault."""
    return {
        fault.planted: "FAIL" if "floor" in fault.alarms else "PASS" for fault in planted if fault.dtype == "float32"
    }


def _summary(planted: list[Trial], sound: list[Trial]) -> list[str]:
    """Sentences on float32 rows and on assumptions."""
    lines = []
    rows = _float32_rows(planted)
    missed = [fault for fault in planted if fault.dtype != "float32" and "floor" not in fault.alarms]
    there = [rows[item.planted] for item in missed if item.planted in rows]
    if there:
        sentence = f"Of {len(missed)} faults that a row in a half dtype does not show, {len(there)} were planted"
        lines += [f"{sentence} in the float32 row too, which `floor` fails in {there.count('FAIL')}.", ""]
    alarms = [item for item in sound if "floor" in item.alarms]
    named = [alarm.assumption for alarm in alarms if alarm.assumption]
    if alarms:
        sentence = f"{len(named)} of the {len(alarms)} false alarms of `floor` are rows that name the assumption"
        lines += [f"{sentence} on which they hang:", ""]
        lines += [*(f"- it would pass if {what}: {named.count(what)}" for what in dict.fromkeys(named)), ""]
    caught = [fault for fault in planted if "floor" in fault.alarms]
    if caught:
        also = sum(bool(item.assumption) for item in caught)
        lines += [f"Of {len(caught)} faults that `floor` catches, {also} rows name an assumption.", ""]
    return lines


def _benign_table(sound: list[Trial]) -> list[str]:
    """For each benign change how much of a limit of `floor` it takes at most, and where."""
    caption = "What was nearest to a limit of `floor`, as a share of that limit: above 1 it is a false alarm."
    lines = ["## Benign changes", "", caption, ""]
    lines += ["| change | runs | alarms | share | limit | model | dtype |", "|---|---|---|---|---|---|---|"]
    for what in dict.fromkeys(item.what for item in sound):
        group = [item for item in sound if item.what == what]
        worst = max(group, key=lambda value: value.share)
        alarms = sum("floor" in item.alarms for item in group)
        nearest = f"{worst.share:.2f} | {worst.nearest} | {worst.subject} | {worst.dtype}"
        lines.append(f"| {what} | {len(group)} | {alarms} | {nearest} |")
    return lines


def main(argv: list[str]) -> int:
    names = [item.name for item in (*SUBJECTS, *MORE)]
    arguments = parser_of("detection").parse_args(argv)
    skipped = {} if arguments.models else {name: why for name in names if (why := subject(name).lacking())}
    for name, why in skipped.items():
        print(f"conformance detection: {name} is left out: {why}", file=sys.stderr)
    begin = time.monotonic()
    chosen = arguments.models or [name for name in names if name not in skipped]
    trials = matrix(chosen, arguments.dtypes, seeds=arguments.seeds, jobs=arguments.jobs)
    report = text(trials, skipped)
    if arguments.output:
        arguments.output.write_text(report + "\n", encoding="utf-8")
    print(report if not arguments.output else "\n".join(report.splitlines()[2:14]))
    print(f"{len(trials)} trials took {(time.monotonic() - begin) / 60:.1f} minutes", file=sys.stderr)
    missed = [trial for trial in trials if trial.promised and "floor" not in trial.alarms]
    alarms = [trial for trial in trials if trial.kind == "benign" and "floor" in trial.alarms and not trial.assumption]
    return 1 if missed or alarms else 0
