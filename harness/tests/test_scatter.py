"""Few elements: what runs with random roundings say of the error, and what a verdict allows by it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.judging.checks import hangs_on_slack, judge
from harness.judging.references import slack
from harness.judging.tolerance import Tolerance
from harness.measure import RUNS, scatter_of
from harness.measure.scatter import LARGER, RISK, Scatter, f_quantile
from harness.numerics import move_at_random
from harness.numerics.expected_error import Rules, rounding
from harness.report.rejudge import judged_again
from harness.report.rows import Row
from harness.run.comparisons import measured_outputs
from harness.tests.needs import emulated_device

FLOOR = Tolerance(preset="floor")


# -------- random roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_of_random_roundings_has_the_size_of_one_rounding(dtype):
    """A twelfth of the numbers moves by one last place: the variance of a rounding to the nearest, u² / 12."""
    ones = torch.ones(120_000, dtype=dtype)
    moved = move_at_random(ones, torch.Generator().manual_seed(3)).double() - 1
    place = torch.finfo(dtype).eps
    assert {*moved.unique().tolist()} == {-place / 2, 0.0, place}  # below 1 a last place is half as large
    up, down = ((moved == item).double().mean().item() for item in (place, -place / 2))
    assert up == pytest.approx(1 / 24, rel=0.1) and down == pytest.approx(1 / 24, rel=0.1)


def test_what_is_no_number_zero_or_the_largest_stays():
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).repeat(500)
    assert torch.equal(move_at_random(special, torch.Generator()).nan_to_num(7.0), special.nan_to_num(7.0))
    most = torch.full((500,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert move_at_random(most, torch.Generator().manual_seed(0)).isfinite().all()
    whole = torch.arange(5)
    assert move_at_random(whole, torch.Generator()) is whole


def test_the_last_place_lies_before_the_dropped_bits():
    moved = move_at_random(torch.ones(5000), torch.Generator().manual_seed(0), dropped=12)  # HF32: 11 bits
    assert {*(moved - 1).unique().tolist()} == {-(2.0**-12), 0.0, 2.0**-11}


def under(rules, compute):
    with torch.no_grad(), rounding(rules):
        return compute()


def test_rounding_operators_move_and_others_do_not():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).bfloat16()
    rules = Rules(random=1)
    same = {
        "relu": lambda: x.relu(),
        "cat": lambda: torch.cat([x, x]),
        "index": lambda: x[torch.arange(7)],
        "view": lambda: x.view(20, 20),
        "sort": lambda: x.sort().values,
        "wider": lambda: x.float(),
        "max": lambda: x.view(20, 20).max(-1).values,
        "copy": lambda: x.clone(),
        "embedding": lambda: nn.functional.embedding(torch.tensor([3, 1]), x.view(20, 20)),
        "zeros": lambda: torch.zeros(9),
        "masked": lambda: x.masked_fill(x > 0, 1.5),
    }
    other = {
        "mul": lambda: x * 3,
        "in place": lambda: x.clone().mul_(3),
        "narrower": lambda: x.float().half(),
        "exp": lambda: x.exp(),
        "matmul": lambda: x.view(20, 20) @ x.view(20, 20),
        "out": lambda: torch.add(x, 1, out=torch.empty_like(x)),
        "softmax": lambda: x.view(20, 20).softmax(-1),
        "tuple": lambda: torch.var_mean(x.view(20, 20), -1)[0],
    }
    plain = replace(rules, random=None)
    assert [name for name, item in same.items() if not torch.equal(under(rules, item), under(plain, item))] == []
    assert [name for name, item in other.items() if torch.equal(under(rules, item), under(plain, item))] == []


def test_the_same_seed_draws_the_same_and_another_one_not():
    x = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).half()
    runs = [under(Rules(random=seed), lambda: (x @ x).exp()) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("kind", "bits"), [("HF32", 11), ("HF32 of 10 bits", 10), ("TF32", 10), ("float16", 10)])
def test_float32_operands_move_by_a_last_place_of_what_they_are_rounded_to(kind, bits):
    eye, ones = torch.eye(64), torch.ones(64, 64)
    moved = under(Rules(matmul=kind, random=1), lambda: eye @ ones) - 1
    assert moved.abs().max().item() == pytest.approx(2 * 2.0**-bits, rel=2e-3)  # where both operands moved


# -------- the scatter


@pytest.mark.parametrize(
    ("above", "below", "quantile"),  # of 0.99, from tables of the F distribution
    [(3, 30, 4.51), (5, 40, 3.51), (10, 60, 2.63), (10, 120, 2.47), (20, 60, 2.20), (60, 120, 1.66)],
)
def test_the_quantile_is_that_of_the_tables(above, below, quantile):
    assert f_quantile(0.99, above, below) == pytest.approx(quantile, rel=0.005)


def test_one_degree_of_freedom_is_no_better_known_than_the_approximation_says():
    assert f_quantile(0.99, 1, 8) == pytest.approx(11.26, rel=0.01)
    assert f_quantile(0.9999, 1, 1) == math.inf  # the cube root has no normal approximation there
    assert f_quantile(0.99, math.inf, math.inf) == 1.0


@pytest.mark.parametrize("independent", [1, 3, 10])
def test_the_degrees_of_freedom_are_the_independent_errors(independent):
    generator = torch.Generator().manual_seed(independent)
    spread = torch.linalg.qr(torch.randn(10, independent, generator=generator)).Q.double()
    still = torch.ones(10).double()
    runs = [still + 1e-3 * spread @ torch.randn(independent, generator=generator).double() for _ in range(400)]
    result = scatter_of(runs, still)
    assert result.runs == 400 and result.degrees == pytest.approx(independent, rel=0.15)
    assert result.rel_l2 == pytest.approx(1e-3 * math.sqrt(independent / 10), rel=0.1)


def test_the_degrees_of_freedom_lie_between_one_and_the_number_of_elements():
    still, eye = torch.ones(4).double(), torch.eye(4).double()
    assert scatter_of([still + eye[0], still - 3 * eye[0], still + 2 * eye[0]], still).degrees == pytest.approx(
        (14 / 3) ** 2 / ((9 + 4 + 36) / 3)
    )
    assert scatter_of([still + eye[0]] * 3, still).degrees == 1.0
    assert scatter_of([still + eye[0], still + eye[1]], still).degrees == 4.0  # none of the error is shared
    near = [still + eye[0] + 0.1 * eye[1], still + eye[1]]
    assert scatter_of(near, still).degrees == 4.0  # 1.005² / 0.1² would be more than there are elements


def test_fewer_degrees_have_more_slack_and_none_less_than_twice():
    slacks = [replace(SCATTER, degrees=degrees).slack for degrees in (1, 2, 4, 10, 100, 1e6)]
    assert slacks == sorted(slacks, reverse=True) and slacks[-1] == pytest.approx(LARGER, rel=1e-2)
    assert slacks[3] == pytest.approx(LARGER * math.sqrt(2.44), rel=0.01)  # F(0.99; 10, 160)


def test_what_the_allowance_is_for():
    """A device whose errors are `LARGER` times as large is blamed as often as `RISK` says."""
    generator = torch.Generator().manual_seed(0)
    degrees, trials = 5, 20_000
    device = LARGER * torch.randn(trials, degrees, generator=generator).square().mean(1).sqrt()
    floor = torch.randn(trials, degrees * RUNS, generator=generator).square().mean(1).sqrt()
    blamed = float((device / floor > replace(SCATTER, runs=RUNS, degrees=degrees).slack).float().mean())
    assert blamed == pytest.approx(RISK, rel=0.3)


def test_what_cannot_be_told_is_none():
    still = torch.ones(4)
    assert scatter_of([still + 1], still) is None  # one run
    assert scatter_of([still, still], still) is None  # none differs
    assert scatter_of([still * math.nan, still], still) is None
    assert scatter_of([torch.ones(5), torch.ones(5)], still) is None
    assert scatter_of([still.to(torch.complex64)] * 2, still.to(torch.complex64)) is None


# -------- the verdict

SCATTER = Scatter(
    runs=16,
    degrees=10.0,
    rel_l2=1e-3,
    token_rel_l2=1e-3,
    max_scaled=2e-3,
    gain=5e-4,
    shift=5e-4,
    max_diff=1e-3,
    rmse=1e-3,
)


def compared(times, scatter=None, count=10):
    """The verdict on an output whose error is `times` that of the CPU."""
    generator = torch.Generator().manual_seed(0)
    golden = torch.randn(count, generator=generator).double()
    error = torch.randn(count, generator=generator).double()
    error *= 1e-3 * golden.norm() / error.norm()
    sides = {"x": golden + times * error}, {"x": golden + error}, {"x": golden}
    comparisons, references = measured_outputs(*(dict(side) for side in sides), None)
    references = {"x": replace(references["x"], scatter=scatter)}
    return judge(comparisons, FLOOR, references=references)


def test_the_scatter_takes_the_place_of_the_steps_on_either_side_of_its_limit():
    limit = SCATTER.slack
    assert 3 < limit < 4 < slack(10)
    assert compared(limit * 0.99, SCATTER).passed
    assert [failure.criterion for failure in compared(limit * 1.01, SCATTER).failures] == ["forecast_ratio"]
    assert compared(limit * 1.01).passed and compared(9.9).passed  # without it the steps hold


def test_the_scatter_never_allows_more_than_the_steps():
    wide = replace(SCATTER, degrees=1.0)
    assert wide.slack < slack(10) and replace(SCATTER, degrees=1.0, runs=2).slack > slack(10)
    assert not compared(10.1, replace(SCATTER, degrees=1.0, runs=2)).passed


def test_a_larger_scatter_is_the_floor():
    assert compared(SCATTER.slack * 1.9, replace(SCATTER, rel_l2=2e-3, token_rel_l2=2e-3)).passed


@pytest.mark.parametrize(("times", "hangs"), [(1.98, False), (2.02, True), (9.9, True), (10.1, False)])
def test_a_verdict_hangs_on_the_slack_between_twice_the_floor_and_the_steps(times, hangs):
    assert hangs_on_slack(compared(times)) is hangs


def test_a_verdict_on_many_elements_hangs_on_nothing():
    assert not hangs_on_slack(compared(1.98, count=1000))


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_an_error_that_these_roundings_do_not_make_is_seen(share):
    limit = SCATTER.rel_l2 * math.sqrt(f_quantile(1 - RISK, 10, 160))
    assert SCATTER.explains(share * limit) is (share < 1)


def test_random_runs_that_do_not_explain_the_cpu_are_left_out():
    """Sums in float32, say: their roundings lie inside of one operator and are not moved."""
    golden = torch.linspace(-1, 1, 10).double()
    still = golden.float()
    random = [{"x": still}, *({"x": move_at_random(still, torch.Generator().manual_seed(seed))} for seed in range(16))]
    for error, known in ((1e-8, True), (1e-6, False)):
        sides = {"x": still}, {"x": (golden * (1 + error)).float() if error > 1e-7 else still}, {"x": golden}
        _, references = measured_outputs(*sides, None, random=random)
        assert (references["x"].scatter is not None) is known


class Classifier(nn.Module):
    """(1, 3, 32, 32) to 10 logits; on a device that is not the CPU something is otherwise."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        self.stem, self.second, self.head = nn.Conv2d(3, 32, 5, 2, 2), nn.Conv2d(32, 64, 3, 2, 1), nn.Linear(64, 10)

    def forward(self, x):
        fault = self.fault if x.device.type != "cpu" else ""
        x = nn.functional.avg_pool2d(self.stem(x).relu(), 3, 1, 1, count_include_pad=fault == "padding")
        x = self.head(self.second(x).relu().mean((2, 3)))
        return x * 1.013 if fault == "factor" else x


@pytest.fixture(scope="module")
def device():
    return emulated_device()


def row(device, fault, seed=1):
    """The verdict on the classifier in bfloat16 with a fault."""
    inputs = lambda generator: torch.rand(1, 3, 32, 32, generator=generator)
    return validate(
        Case(name="classifier", model=lambda: Classifier(fault), inputs=inputs, dtype="bfloat16"), seed, device
    )


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("fault", ["padding", "factor"])
def test_ten_logits_that_are_wrong_by_less_than_ten_floors_fail(device, fault, seed):
    verdict = row(device, fault, seed)
    references = verdict.references["output"]
    assert not verdict.passed and references.slack < slack(10) / 2
    assert judge(
        verdict.comparisons, FLOOR, references={"output": replace(references, scatter=None)}
    ).passed  # by the steps alone
    assert any("random roundings" in note for note in verdict.evidence.notes)


def test_ten_logits_that_are_right_pass_without_further_runs(device):
    verdict = row(device, "")
    assert verdict.passed and verdict.references["output"].scatter is None


def test_a_stored_row_is_judged_by_its_scatter_again(device):
    verdict = row(device, "padding")
    kept = Row.of(verdict, test="t", case="classifier", dtype="bfloat16", seed=1)
    read = Row.from_dict(json.loads(json.dumps(kept.to_dict())))
    assert read.references == verdict.references
    assert [failure.criterion for failure in judged_again(read).failures] == [
        failure.criterion for failure in verdict.failures
    ]
