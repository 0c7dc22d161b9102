"""The upgrade gate put to the test: releases of CANN that differ by one change, as real upgrades did, and changes that
are none.

    python -m harness.conformance upgrades cases/test_operators.py [--only NAME …] [--jobs N] [--output FILE]

The cases are accepted on the emulated device as it is. Then each release is played: the same cases run with one
operator's meaning changed, through pytest, held against that baseline and, report against report, through `gate`.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import numerics
from harness.conformance.detection import BENIGN, SUBJECT_DTYPES, SUBJECTS, Bench, Benign, Subject
from harness.conformance.options import parser_of
from harness.devices import open_device
from harness.emulator.table import changed
from harness.errors import HarnessError
from harness.judging.status import Mark, Status
from harness.measure import compare
from harness.numerics import HALF
from harness.report import Row, load
from harness.upgrade import baseline
from harness.upgrade.transitions import BAD, Upgrade, compare_reports

# -------- what upgrades changed


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release that differs by one change: which real regression it plays, and what the operators named mean in it."""

    what: str
    source: str  # where it happened
    operators: tuple[str, ...]
    change: Callable[[Callable], Callable]


RELEASES: dict[str, Release] = {}


def _release(name: str, what: str, source: str, *operators: str) -> Callable:
    """Enter `meaning(operator, *arguments, **keywords)`: what the operators compute in the release, `operator` being
    what they computed before.
    """

    def enter(meaning: Callable) -> Callable:
        def change(before: Callable) -> Callable:
            return lambda *arguments, **keywords: meaning(before, *arguments, **keywords)

        RELEASES[name] = Release(what=what, source=source, operators=operators, change=change)
        return meaning

    return enter


FLASH = ("aclnnFlashAttentionScore", "aclnnFlashAttentionScoreV2", "aclnnFlashAttentionScoreV3")
_PRODUCTS = (
    "aclnnMatmul",
    "aclnnMm",
    "aclnnBatchMatMul",
    "aclnnMv",
    "aclnnAddmm",
    "aclnnInplaceAddmm",
    "aclnnBaddbmm",
    "aclnnAddbmm",
    "aclnnAddmv",
)


def _rounded(rounding: Callable, values: Sequence[Any], count: int) -> list[Any]:
    """The first `count` float32 tensors of the arguments, rounded."""
    left = itertools.count(count, -1)
    return [
        rounding(value)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and next(left) > 0
        else value
        for value in values
    ]


@_release(
    "backward in HF32",
    "the gradients of products are computed in HF32 whatever the switch says",
    "op-plugin 9e3fe64e",
    "aclnnMatmul",
    "aclnnMm",
)
def _(before, left, right, *more, **keywords):
    backward = not (left.is_contiguous() and right.is_contiguous())  # its operands are transposed
    return before(*(_rounded(numerics.round_hf32, (left, right), 2) if backward else (left, right)), *more, **keywords)


@_release(
    "addmm by halves",
    "addmm rounds the product to half before it is scaled and added",
    "op-plugin 1d92099b, 422e6526",
    "aclnnAddmm",
    "aclnnBaddbmm",
)
def _(before, self, left, right, beta, alpha, cube, out):
    product = numerics.matmul(left, right, out=torch.float16)
    return (beta * self.float() + alpha * product.float()).to(out.dtype)


@_release("addbmm without alpha", "addbmm leaves alpha out", "op-plugin fefa4861", "aclnnAddbmm")
def _(before, self, left, right, beta, alpha, cube, out):
    return before(self, left, right, beta, 1, cube, out=out)


@_release(
    "logspace by steps",
    "logspace writes every value to the next place in memory",
    "op-plugin 222127c5",
    "aclnnLogSpace",
)
def _(before, start, end, steps, base, out):
    return before(start, end, steps, base, out=out).float().cumsum(0).to(out.dtype)


@_release(
    "std of whole corrections",
    "std and var divide by n - 1 whatever the correction",
    "op-plugin d53ed98b",
    "aclnnStd",
    "aclnnVarCorrection",
)
def _(before, self, dims, correction, keep, out):
    return before(self, dims, 1, keep, out=out)


@_release(
    "numbers lose their type",
    "a Python number is cast to the tensor's dtype before it is used",
    "op-plugin 1f67b635",
    "aclnnMuls",
    "aclnnAdds",
    "aclnnDivs",
)
def _(before, self, *more, **keywords):
    cast = [int(item) if isinstance(item, float) and not self.is_floating_point() else item for item in more]
    cast = [
        torch.tensor(item, dtype=self.dtype).item() if isinstance(item, float) and self.dtype in HALF else item
        for item in cast
    ]
    return before(self, *cast, **keywords)


@_release("bool mask turned around", "attention hides what the mask shows", "Ascend/pytorch #88", *FLASH)
def _(before, *arguments, out):
    return before(
        *[argument.logical_not().to(argument.dtype) if _is_mask(argument) else argument for argument in arguments],
        out=out,
    )


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8) and value.numel() > 1


@_release("mask dropped", "attention takes no mask", "diffusers #14397, vllm-omni #1031", *FLASH)
def _(before, *arguments, out):
    return before(*[torch.zeros_like(argument) if _is_mask(argument) else argument for argument in arguments], out=out)


@_release("mask to 512 keys", "attention ignores the mask past key 512", "vllm-ascend #15503", *FLASH)
def _(before, *arguments, out):
    def cut(mask):
        mask = mask.clone()
        mask[..., 512:] = False
        return mask

    return before(*[cut(argument) if _is_mask(argument) else argument for argument in arguments], out=out)


@_release(
    "additive mask as bools",
    "a mask that is added counts as bools: what is not 0 hides",
    "diffusers #14396, transformers #48843",
    "aclnnInplaceAdd",
)
def _(before, self, other, *more, **keywords):
    mask = (
        isinstance(other, torch.Tensor)
        and other.dim() in (2, 4)
        and self.dim() == 4
        and other.is_floating_point()
        and other.shape[-2:] == self.shape[-2:]
    )
    return before(
        self, torch.zeros_like(other).masked_fill(other != 0, -torch.inf) if mask else other, *more, **keywords
    )


@_release("heads of 200", "attention computes 192 of 200 columns of a head", "flash-attention-npu #135", *FLASH)
def _(before, *arguments, out):
    result = list(before(*arguments, out=out))
    if result[-1] is not None and result[-1].shape[-1] == 200:
        result[-1] = result[-1].clone()
        result[-1][..., 192:] = 0
    return result


@_release(
    "exact GELU", "GELU takes the exact formula where it took the tanh one", "Ascend/pytorch 7951496d", "aclnnGelu"
)
def _(before, x):
    return numerics.gelu(x, "none")


@_release(
    "short exponentials",
    "uniform numbers come in steps of 1/64, so exponential ones end at 2.1",
    "dev20250308.3 note",
    "aclnnInplaceUniform",
)
def _(before, *arguments, **keywords):
    return (before(*arguments, **keywords).float() * 64).floor().div(64).to(keywords["out"].dtype)


@_release(
    "mixed by default",
    "float32 operands of products and convolutions are halved",
    "Ascend/pytorch #125",
    *_PRODUCTS,
    "aclnnConvolution",
)
def _(before, *arguments, **keywords):
    return before(*_rounded(lambda tensor: tensor.half().float(), arguments, 3), **keywords)


@_release(
    "HF32 by default", "products of float32 run in HF32, the switch says they do not", "Jittor #18025", *_PRODUCTS
)
def _(before, *arguments, **keywords):
    return before(*_rounded(numerics.round_hf32, arguments, 3), **keywords)


@_release(
    "softmax overflows",
    "softmax in float16 takes the exponential before it subtracts the largest",
    "vllm-ascend #5144",
    "aclnnSoftmax",
)
def _(before, x, dim, *more, **keywords):
    if x.dtype != torch.float16:
        return before(x, dim, *more, **keywords)
    powers = x.exp()
    return powers / powers.sum(dim, keepdim=True)


@_release(
    "log_softmax in bfloat16", "log_softmax rounds its sum to bfloat16", "RL-Align/RL-Kernel #406", "aclnnLogSoftmax"
)
def _(before, x, dim, *more, **keywords):
    if x.dtype != torch.bfloat16:
        return before(x, dim, *more, **keywords)
    return x - x.float().exp().bfloat16().sum(dim, keepdim=True).log()


@_release("half sums", "products of half operands sum in half", "vllm-ascend #9395, CANN 9.0", *_PRODUCTS)
def _(before, *arguments, **keywords):
    spec = keywords["out"]
    result = before(*arguments, **keywords)
    if spec.dtype not in HALF:
        return result
    steps = torch.finfo(spec.dtype).eps * torch.sin(
        torch.arange(result.numel(), dtype=torch.float32) * 12.9898
    ).reshape(result.shape)
    return (result.float() * (1 + steps)).to(spec.dtype)  # one more rounding, of the size of a last place


@_release(
    "workspace freed early",
    "a norm reads memory that another operator has been given",
    "release notes 26.1.0",
    "aclnnLayerNorm",
)
def _(before, x, *more, **keywords):
    y, *rest = before(x, *more, **keywords)
    y = y.contiguous().clone()
    y.view(-1)[::97] = torch.randn(
        len(y.view(-1)[::97]), generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
    ).to(y.dtype)
    return (y, *rest)


@_release(
    "NaN on one core",
    "one core writes NaN: the last block of a long sum",
    "flash-linear-attention #1215",
    "aclnnReduceSum",
)
def _(before, *arguments, **keywords):
    result = before(*arguments, **keywords)
    if result.numel() >= 1000 and result.is_floating_point():
        result = result.clone()
        result.view(-1)[-16:] = torch.nan
    return result


@_release(
    "convolutions in float32",
    "the switch of convolutions says HF32 and they run in float32",
    "a default that changes",
    "aclnnConvolution",
)
def _(before, *arguments, **keywords):
    *operands, cube = arguments
    return before(*operands, 0, **keywords)


@_release(
    "bfloat16 cut off", "results in bfloat16 are cut off where they were rounded", "CANN 9.0, sglang #18481", *_PRODUCTS
)
def _(before, *arguments, **keywords):
    if keywords["out"].dtype != torch.bfloat16:
        return before(*arguments, **keywords)
    wide = before(*arguments, **keywords | {"out": replace(keywords["out"], dtype=torch.float32)}).float()
    return (wide.view(torch.int32) & -65536).view(torch.float32).bfloat16()


# -------- a plugin of pytest that plays one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--played", help="the release of CANN that the emulated device plays")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session):
    release = RELEASES[session.config.option.played]
    import harness.emulator.operators  # noqa: F401  enters them into the table

    with ExitStack() as stack:
        for name in release.operators:
            stack.enter_context(changed(name, release.change))
        return (yield)


def _pytest(cases: Path, report: Path, baselines: Path, *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(cases),
        "-q",
        "-p",
        "no:cacheprovider",
        "--device",
        "emulated",
        f"--report={report}",
        f"--baselines={baselines}",
        *more,
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # of a run that this one is part of
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # the operators are small
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, 1):
        raise HarnessError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")


@dataclass(frozen=True, kw_only=True)
class Played:
    """What became of the cases in one release: by the baseline, row by row, and by `gate`."""

    name: str
    rows: tuple[Row, ...]
    before: tuple[Row, ...]
    upgrade: Upgrade

    @property
    def moved(self) -> list[Row]:
        """The rows in which a bit changed."""
        return [row for row in self.rows if Mark.IDENTICAL not in row.marks]

    @property
    def caught(self) -> list[Row]:
        """The rows that fail because of it."""
        passed = {row.test for row in self.before if row.status is Status.PASS}
        return [row for row in self.rows if row.status is not Status.PASS and row.test in passed]

    @property
    def improved(self) -> list[Row]:
        felt = {row.test for row in self.before if Mark.UNFELT not in row.marks}
        return [
            row for row in self.rows if Mark.IMPROVED in row.marks or (Mark.UNFELT in row.marks and row.test in felt)
        ]


def play_releases(cases: Path, names: Sequence[str], work: Path, jobs: int) -> Iterator[Played]:
    """Accept the cases as they are, then play each release and hold it against them."""
    _pytest(cases, work / "before", work / "baselines", "--baseline=accept")
    before = load(work / "before" / "precision.json")

    def one(name: str) -> Played:
        report = work / "".join(item if item.isalnum() else "_" for item in name)
        _pytest(cases, report, work / "baselines", "-p", "harness.conformance.upgrades", f"--played={name}")
        after = load(report / "precision.json")
        return Played(name=name, rows=after.rows, before=before.rows, upgrade=compare_reports(before, after))

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, names)


# -------- changes that are none, and small


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One model in one dtype with several seeds."""

    subject: str
    dtype: str
    benches: dict[int, Bench]

    def row(self, seed: int, outputs: dict[str, torch.Tensor], digest: str) -> Row:
        """What a baseline looks at, of one seed's outputs."""
        bench, (name, result) = self.benches[seed], next(iter(outputs.items()))
        error, cpu = (compare(item, bench.golden[name]).rel_l2 for item in (result, bench.expected[name]))
        return Row(
            test="",
            case=self.subject,
            dtype=self.dtype,
            seed=seed,
            rel_l2=error,
            golden_rel_l2=error,
            cpu_golden_rel_l2=cpu,
            actual_sha256=digest,
            weights="seeded:0",
            inputs_sha256=f"{seed}",
        )

    @functools.cached_property
    def accepted(self) -> baseline.Entry:
        """The device as it is, as an entry of a baseline."""
        rows = [self.row(seed, bench.sound, "device") for seed, bench in self.benches.items()]
        return baseline.Entry(rows={baseline.seed_of(row): row for row in rows})

    def against(self, rows: list[Row]) -> list[baseline.Change]:
        return baseline.verdicts(rows, self.accepted)


def _groups(subjects: Sequence[Subject], seeds: int) -> Iterator[_Group]:
    device = open_device("emulated")
    for subject, dtype in itertools.product(subjects, SUBJECT_DTYPES):
        yield _Group(
            subject=subject.name,
            dtype=dtype,
            benches={seed: Bench(subject, dtype, device, seed) for seed in range(seeds)},
        )


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """One gate run between two stacks that differ in a benign way."""

    subject: str
    dtype: str
    what: str
    kinds: tuple[str, ...]  # of the seeds
    ratio: float  # of the errors, geometric mean


def quiet(subjects: Sequence[Subject], seeds: int = 5) -> Iterator[Quiet]:
    """Other threads, orders of sums and ties: the error of each seed against that of the device as it is."""
    for group in _groups(subjects, seeds):
        for change in (Benign(what="as it is"), *BENIGN):
            changes = group.against(
                [group.row(seed, bench.otherwise(change), change.what) for seed, bench in group.benches.items()]
            )
            ratio = torch.tensor([item.ratio or float("nan") for item in changes]).log().mean().exp().item()
            yield Quiet(
                subject=group.subject,
                dtype=group.dtype,
                what=change.what,
                kinds=tuple(item.kind for item in changes),
                ratio=ratio,
            )


def smallest_drift(
    subjects: Sequence[Subject], seeds: int = 5, steps: Sequence[float] = (0.5, 1, 2, 3, 3.5, 4, 5, 10, 50, 110)
) -> list[tuple[str, str, float]]:
    """Model, dtype, and the smallest growth of the error, in percent, that all seeds together reveal.

    The device's error is made larger by what is orthogonal to it, so that its norm grows as said.
    """

    def revealed(group: _Group, percent: float) -> bool:
        grown = [group.row(seed, _grown(bench, percent, seed), f"{percent}") for seed, bench in group.benches.items()]
        return all(item.kind == baseline.REGRESSED for item in group.against(grown))

    return [
        (group.subject, group.dtype, next((step for step in steps if revealed(group, step)), float("nan")))
        for group in _groups(subjects, seeds)
    ]


def _grown(bench: Bench, percent: float, seed: int) -> dict[str, torch.Tensor]:
    name, sound = next(iter(bench.sound.items()))
    error = sound.double() - bench.golden[name]
    noise = torch.randn(error.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= error * (noise * error).sum() / error.square().sum()
    share = ((1 + percent / 100) ** 2 - 1) ** 0.5
    return {name: sound.double() + noise * share * error.norm() / noise.norm()}


# -------- the report


def text(played: Sequence[Played], calm: Sequence[Quiet], drift: Sequence[tuple[str, str, float]]) -> str:
    lines = ["# Upgrades, played", ""]
    if played:
        seen = sum(bool(item.caught or item.improved) for item in played)
        lines += [f"{len(played)} releases, each with one change, over {len(played[0].rows)} rows: {seen} seen.", ""]
        lines += [
            "| release | what changed | as in | rows that moved | that fail | that improve | by `gate` | where |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for item in played:
        release = RELEASES[item.name]
        counted = item.upgrade.counts()
        changes = ", ".join(
            f"{counted[kind]} {kind}" for kind in (*BAD, baseline.DRIFT, baseline.IMPROVED) if counted.get(kind)
        )
        where = list(dict.fromkeys(row.case for row in (item.caught or item.improved)))
        named = "; ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(
            f"| {item.name} | {release.what} | {release.source} | {len(item.moved)} | {len(item.caught)} | "
            f"{len(item.improved)} | {changes} | {named} |"
        )
    if calm:
        loud = [item for item in calm if baseline.REGRESSED in item.kinds]
        lines += [
            "",
            "## Benign changes",
            "",
            f"{len(calm)} gate runs of five seeds each: {len(loud)} say REGRESSED.",
            "",
        ]
        lines += ["| model | dtype | change | error now / then | kinds |", "|---|---|---|---|---|"]
        lines += [
            f"| {item.subject} | {item.dtype} | {item.what} | {item.ratio:.4f} | "
            f"{', '.join(dict.fromkeys(item.kinds))} |"
            for item in calm
        ]
    if drift:
        lines += [
            "",
            "## The smallest shared growth of the error that five seeds reveal",
            "",
            "| model | dtype | percent |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {dtype} | {percent:g} |" for name, dtype, percent in drift]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = parser_of("upgrades").parse_args(argv)
    only = list(RELEASES) if arguments.only is None else arguments.only
    unknown = [item for item in only if item not in RELEASES]
    if unknown:
        raise HarnessError(f"no release is called {', '.join(unknown)}; there are {', '.join(RELEASES)}")
    if not arguments.cases.exists():
        raise HarnessError(f"no cases at {arguments.cases}; name a file of accuracy cases")
    with tempfile.TemporaryDirectory() as work:
        played = list(play_releases(arguments.cases, only, Path(work), arguments.jobs))
    torch.set_num_threads(1)
    whole = SUBJECTS if len(only) == len(RELEASES) else ()
    result = text(played, list(quiet(whole)), smallest_drift(whole))
    if arguments.output:
        arguments.output.write_text(result + "\n", encoding="utf-8")
    else:
        print(result)
    idle = [item.name for item in played if not item.moved]
    missed = [item.name for item in played if item.moved and not (item.caught or item.improved)]
    if idle or missed:
        problems = [f"{', '.join(missed)}: a number changed and nothing said so"] if missed else []
        raise HarnessError(
            "; ".join([*problems, *([f"{', '.join(idle)}: no number changed, so no case meets it"] if idle else [])])
        )
    return 0
