"""The Kullback-Leibler divergence of logits on the device from those of the CPU."""

import math

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.report import Row
from harness.run import judged


def by_definition(actual, expected):
    """The mean and the largest KL(P_expected || P_actual) of the rows, from exponentials and logarithms."""
    rows = []
    for left, right in zip(actual.tolist(), expected.tolist()):
        p = [math.exp(x - max(right)) for x in right]
        q = [math.exp(x - max(left)) for x in left]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        rows.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
    return sum(rows) / len(rows), max(rows)


@pytest.mark.parametrize("at_a_time", [1, 5, 1 << 20])
def test_it_is_that_of_the_definition(monkeypatch, at_a_time):
    monkeypatch.setattr(judged, "_ROWS", at_a_time)
    expected = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = expected + 0.1 * torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = judged._divergence(actual.view(7, 1, 5), expected.view(7, 1, 5))
    mean, largest = by_definition(actual, expected)
    assert result["kl"] == pytest.approx(mean, rel=1e-9) and result["kl_max"] == pytest.approx(largest, rel=1e-9)


def test_equal_logits_masked_ones_and_what_is_no_distribution():
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    assert judged._divergence(logits, logits) == {"kl": 0.0, "kl_max": 0.0}
    broken = judged._divergence(torch.tensor([[1.0, math.nan, 0.0]]), logits)
    assert math.isnan(broken["kl"]) and math.isnan(broken["kl_max"])
    assert judged._divergence(torch.ones(3, 1), torch.ones(3, 1)) == {}
    assert judged._divergence(torch.ones(0, 4), torch.ones(0, 4)) == {}
    assert judged._divergence(torch.ones(2, 4).long(), torch.ones(2, 4).long()) == {}


def test_a_row_holds_it():
    case = Case(
        name="logits",
        model=lambda: nn.Linear(8, 5).eval(),
        inputs=lambda generator: torch.randn(4, 8, generator=generator),
        decisions="output",
        dtype="bfloat16",
    )
    verdict = validate(case, 1, open_device("cpu"))
    row = Row.of(verdict, test="t", case="logits", dtype="bfloat16", seed=1)
    assert row.decisions.kl == row.decisions.kl_max == 0.0  # the CPU beside itself
    assert Row.from_dict(row.to_dict()).decisions == row.decisions
