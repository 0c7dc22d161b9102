"""Numbers that others published of real devices, beside what the rounding rules here expect.

    python -m harness.conformance published [--weights NAME=DIR …] [--output FILE]

The table (published.csv) names source, hardware, stack, dtype and number. A number of a single operator is computed
here from its description. One of a model needs the model's weights: `--weights NAME=DIR` gives the checkpoint, and
without it the row is not counted. A row is explained where the expected number is within a factor of 2 of the published
one (within half a bit of effective bits, 4 of a maximum, which hangs on single elements), else contradicted.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from harness import numerics
from harness.case import Case
from harness.checkpoints.building import SEEDS, parts_of
from harness.conformance.options import parser_of
from harness.devices import open_device
from harness.errors import HarnessError
from harness.measure import compare
from harness.numerics.expected_error import Rules
from harness.reference import Models, inputs_digest
from harness.report import write_text
from harness.run.cpu import CpuSide, inputs_of

_TABLE = Path(__file__).with_suffix(".csv")
EXPLAINED, CONTRADICTED = "explained", "contradicted"
NEEDS_WEIGHTS, MEANINGLESS = "needs weights", "not meaningful: a cosine over one number"
FACTOR, FACTOR_OF_MAXIMA, _BITS = 2.0, 4.0, 0.5
_ASCEND = Rules(conv="HF32")  # the default switches of the NPUs in the table
_OPERATOR = "-"  # in the column of weights: computed here
_ONE_NUMBER = "one number"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number; `weights` names the checkpoint that it is of."""

    name: str
    source: str
    hardware: str
    stack: str
    dtype: str
    activation: str
    metric: str
    published: float
    weights: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A published number beside the expected one; `expected` is None where it cannot be computed."""

    row: Published
    expected: float | None
    verdict: str


def published_rows() -> list[Published]:
    """The table."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return [Published(**row | {"published": float(row["published"])}) for row in csv.DictReader(file)]


def verdict_on(row: Published, expected: float | None) -> str:
    """Whether an expected number explains a published one.

    >>> row = published_rows()[0]
    >>> verdict_on(row, row.published * 1.9), verdict_on(row, row.published * 2.1), verdict_on(row, None)
    ('explained', 'contradicted', 'needs weights')
    """
    if row.weights == _ONE_NUMBER:
        return MEANINGLESS
    if expected is None:
        return NEEDS_WEIGHTS
    if row.metric == "bits":
        return EXPLAINED if abs(expected - row.published) <= _BITS else CONTRADICTED
    factor = FACTOR_OF_MAXIMA if row.metric == "max_diff" else FACTOR
    if not (expected > 0 and row.published > 0):
        return CONTRADICTED
    return EXPLAINED if abs(math.log(expected / row.published)) <= math.log(factor) else CONTRADICTED


# -------- single operators


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bits(row: Published) -> float:
    operands = numerics.Operands(kind="HF32" if "HF32" in row.dtype else "float32")
    left, right = _normal(256, 64, seed=1), _normal(64, 256, seed=2)
    return numerics.effective_bits(numerics.matmul(left, right, operands=operands), left.double() @ right.double())


def _worst(row: Published) -> float:
    """Of 240 products of normal numbers, 16 x 64 x 128 and 64 x 128 x 64: the worst element against torch's CPU."""
    errors = []
    for seed in range(120):
        for rows, inner, columns in ((16, 64, 128), (64, 128, 64)):
            left, right = _normal(rows, inner, seed=2 * seed), _normal(inner, columns, seed=2 * seed + 1)
            errors.append(float((numerics.matmul(left, right) - left @ right).abs().max()))
    return statistics.median(errors) if row.metric == "worst_median" else max(errors)


def _last_place(row: Published) -> float:
    """One last place of results between 1 and 2: results are rounded once."""
    return torch.finfo(getattr(torch, row.dtype)).eps


_COMPUTED: Mapping[str, Callable[[Published], float]] = {
    "bits": _bits,
    "worst_median": _worst,
    "worst_peak": _worst,
    "last_place": _last_place,
}


# -------- models


def _of_model(row: Published, folder: Path) -> float:
    """The metric between the CPU's run and the expected one, the worst of five seeds; the mean of mean_diff."""
    rules = replace(_ASCEND, gelu_tanh=False) if row.activation == "exact GELU" else _ASCEND
    case = Case.from_checkpoint(folder, dtype=row.dtype, part=parts_of(folder)[0], batch=1)
    models, device, values = Models(), open_device("cpu"), []
    for seed in SEEDS:
        inputs = inputs_of(case, seed)
        cpu = CpuSide(case, models, inputs, inputs_digest(inputs, case.name), device, seed)
        plain, expected = cpu.run("cpu").outputs, cpu.run("forecast", rules=rules).outputs
        name = next(iter(plain))
        values.append(getattr(compare(expected[name], plain[name]), row.metric))
    return statistics.mean(values) if row.metric == "mean_diff" else max(values)


def measure(weights: Mapping[str, Path]) -> list[Outcome]:
    """Every row of the table, with what can be computed of it. Raises: HarnessError for a checkpoint of no row."""
    rows = published_rows()
    unknown = weights.keys() - {row.weights for row in rows}
    if unknown:
        known = sorted({row.weights for row in rows} - {_OPERATOR, _ONE_NUMBER})
        raise HarnessError(f"no published number is of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    result = []
    for row in rows:
        expected = None
        if row.weights == _OPERATOR:
            expected = _COMPUTED[row.metric](row)
        elif row.weights in weights:
            expected = _of_model(row, weights[row.weights])
        result.append(Outcome(row=row, expected=expected, verdict=verdict_on(row, expected)))
    return result


def text(result: list[Outcome]) -> str:
    """The table in markdown, and how many of the rows that could be computed are explained."""
    counted = [item for item in result if item.verdict in (EXPLAINED, CONTRADICTED)]
    explained = sum(item.verdict == EXPLAINED for item in counted)
    missing = sum(item.verdict == NEEDS_WEIGHTS for item in result)
    lines = [
        "# Published numbers of real devices",
        "",
        f"{explained} of {len(counted)} explained; {missing} need the weights and are not counted.",
        "",
        "| what | source | hardware | stack | dtype | metric | published | expected | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in result:
        row = item.row
        expected = "–" if item.expected is None else f"{item.expected:.3g}"
        lines.append(
            f"| {row.name} | {row.source} | {row.hardware} | {row.stack} | {row.dtype} | {row.metric} | "
            f"{row.published:.3g} | {expected} | {item.verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    arguments = parser_of("published").parse_args(argv)
    result = measure(dict(arguments.weights))
    if arguments.output is None:
        print(text(result), end="")
    else:
        write_text(arguments.output, text(result))
        print(f"{arguments.output}", file=sys.stderr)
    return 1 if any(item.verdict == CONTRADICTED for item in result) else 0
