"""Outputs of whole numbers, indices and classes: near-ties that healthy runs choose otherwise too, and wrong
choices.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.emulator.table import changed
from harness.judging.checks import hangs_on_choice, hangs_on_ties, judge, near_ties
from harness.judging.status import Mark
from harness.judging.tolerance import Tolerance
from harness.judging.verdict import Reason, Verdict
from harness.locate.replay import Replay
from harness.measure import Comparison
from harness.report.rejudge import judged_again
from harness.report.rows import Row
from harness.tests.needs import emulated_device, needs_torch_npu


class Chosen(nn.Module):
    """Scores of a convolution that Ascend computes in HF32, and what is chosen by them."""

    def __init__(self, choose):
        super().__init__()
        self.conv, self.choose = nn.Conv1d(8, 64, 3), choose

    def forward(self, x):
        scores = self.conv(x)
        return {"mean": scores.mean(2), "chosen": self.choose(scores)}


CHOICES = {
    "argmax": lambda scores: scores.argmax(1),
    "topk": lambda scores: scores.topk(8, 1).indices,
    "sort": lambda scores: scores.argsort(1),
    "threshold": lambda scores: scores > 0.5,
    "rounded": lambda scores: (scores * 16).round().to(torch.int32),
}


def a_case(choose, dtype="float32", tolerance=Tolerance(preset="floor")):
    inputs = lambda generator: torch.randn(4, 8, 514, generator=generator)
    return Case(name="chosen", model=lambda: Chosen(choose), inputs=inputs, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHOICES)
def test_near_ties_of_a_sound_device_pass_and_say_so(name, dtype):
    for seed in (0, 1):
        verdict = validate(a_case(CHOICES[name], dtype), seed, emulated_device())
        assert verdict.passed, verdict.reasons
        if verdict.comparisons["chosen"].unequal:
            assert Mark.NEAR_TIE in verdict.marks and any("near-ties" in note for note in verdict.evidence.notes)


def shifted(real):
    """The convolution's first channel is 2 % too large."""

    def compute(*args, **options):
        scores = real(*args, **options).clone()
        scores[:, 0] *= 1.02
        return scores

    return compute


def next_one(real):
    """Every index is the next one."""
    return lambda self, dim, keep, out: (real(self, dim, keep, out) + 1) % 64


@pytest.mark.parametrize(
    ("name", "operator", "change"), [("sort", "aclnnConvolution", shifted), ("argmax", "aclnnArgMax", next_one)]
)
def test_wrong_choices_fail(name, operator, change):
    with changed(operator, change):
        verdict = validate(a_case(CHOICES[name]), 0, emulated_device())
    wrong = {(failure.output, failure.criterion) for failure in verdict.failures}
    assert verdict.status == "FAIL" and ("chosen", "equal") in wrong, verdict.reasons


def test_some_choices_really_change_in_a_sound_device():
    """Without near-ties these rows were wrong: the test above must have something to say."""
    verdict = validate(a_case(CHOICES["sort"]), 0, emulated_device())
    assert verdict.passed and verdict.comparisons["chosen"].unequal > 10 and verdict.comparisons["chosen"].unsettled > 5


class Few(nn.Module):
    """Choices among numbers of which many are equal."""

    def __init__(self, choose):
        super().__init__()
        self.linear, self.choose = nn.Linear(64, 16), choose

    def forward(self, x):
        return {"scores": self.linear(x), "chosen": self.choose((8 * x).round())}


def of_few(choose):
    inputs = lambda generator: torch.randn(8, 64, generator=generator)
    return Case(name="few", model=lambda: Few(choose), inputs=inputs, tolerance=Tolerance(preset="floor"))


def from_the_other_end(real):
    """A device that takes others of equal numbers."""

    def compute(self, *args, out):
        values, indices = real(self.flip(-1), *args, out=out)
        return [values, self.shape[-1] - 1 - indices]

    compute.__signature__ = inspect.signature(real)
    return compute


def off_by_one(real):
    def compute(self, *args, out):
        values, indices = real(self, *args, out=out)
        return [values, (indices + 1) % self.shape[-1]]

    compute.__signature__ = inspect.signature(real)
    return compute


OPEN = {
    "topk": ("aclnnTopkV2", lambda x: x.topk(12).indices),
    "argsort": ("aclnnSort", lambda x: x.argsort(-1)[:, :20]),
}


@needs_torch_npu
@pytest.mark.parametrize("name", OPEN)
def test_of_equal_numbers_a_device_may_take_others(name):
    operator, choose = OPEN[name]
    with changed(operator, from_the_other_end):
        verdict = validate(of_few(choose), 0, emulated_device())
    assert verdict.comparisons["chosen"].unequal > 4, "the plant does not act"
    assert verdict.passed and Mark.NEAR_TIE in verdict.marks, verdict.reasons
    with changed(operator, off_by_one):
        assert validate(of_few(choose), 0, emulated_device()).status == "FAIL"


@needs_torch_npu
def test_a_stable_sort_has_one_order():
    stable = of_few(lambda x: x.sort(dim=-1, stable=True).indices[:, :20])
    with changed("aclnnSort", from_the_other_end):
        verdict = validate(stable, 0, emulated_device())
    assert verdict.comparisons["chosen"].unequal > 4 and verdict.status == "FAIL"


@needs_torch_npu
@pytest.mark.parametrize("name", OPEN)
def test_an_operator_that_takes_others_of_equal_numbers_is_not_the_wrong_one(name):
    operator, choose = OPEN[name]
    replay = Replay(
        func={"topk": torch.topk, "argsort": torch.argsort}[name],
        args=(
            torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).mul(8).round(),
            *((12,) if name == "topk" else ()),
        ),
        kwargs={},
        device=emulated_device(),
    )
    results = replay.on_cpu()
    with changed(operator, from_the_other_end):
        result = replay.on_device()
    assert not torch.equal(result[-1], results[-1]) and not replay.judged(result, results)[1]
    for wrong in (
        [*result[:-1], (result[-1] + 1) % 64],  # other numbers
        [*result[:-1], result[-1][:, :1].expand_as(result[-1])],  # one element again and again
        [*result[:-1], result[-1] + 64],  # none at all
    ):
        assert replay.judged(wrong, results)[1]
    assert replace(replay, kwargs={"stable": True}).judged(result, results)[1] or name == "topk"


# -------- the rule


def compared(unequal, unsettled, dtype="int64"):
    return Comparison(
        shape=(100,), expected_shape=(100,), dtype=dtype, expected_dtype=dtype, unequal=unequal, unsettled=unsettled
    )


@pytest.mark.parametrize(("unsettled", "most"), [(0.0, 0), (0.05, 0), (0.1, 1), (0.5, 2), (1.0, 4), (16.0, 28)])
def test_as_many_may_differ_as_a_poisson_count_reaches(unsettled, most):
    assert near_ties(unsettled) == most
    for unequal, passes in ((most, True), (most + 1, False)):
        verdict = judge({"index": compared(unequal, unsettled)}, Tolerance(preset="floor"))
        assert verdict.passed is passes
        if not passes:
            assert verdict.failures[0].allowed == most and (
                not unsettled or f"up to {most} allowed" in verdict.failures[0].text
            )


def test_ties_are_looked_for_where_whole_numbers_alone_differ_and_not_in_most():
    for unequal, looked in ((1, True), (50, True), (51, False)):
        assert hangs_on_ties(judge({"index": compared(unequal, 0.0)}, Tolerance(preset="pair"))) is looked
    assert not hangs_on_ties(judge({"index": compared(0, 0.0)}, Tolerance(preset="pair")))
    for first, second, looked in ((1, 1, True), (1, 51, False), (51, 1, False)):
        two = judge({"index": compared(first, 0.0), "other": compared(second, 0.0)}, Tolerance(preset="pair"))
        assert hangs_on_ties(two) is looked
    other = compared(1, 0.0, "int32")
    wrong = judge(
        {"index": compared(1, 0.0), "other": other.__class__(**{**vars(other), "shape": (3,)})},
        Tolerance(preset="pair"),
    )
    assert {failure.criterion for failure in wrong.failures} == {"equal", "shape"} and not hangs_on_ties(wrong)


@pytest.mark.parametrize(
    ("criteria", "hangs"), [([], False), (["token"], True), (["token", "token"], True), (["token", "equal"], False)]
)
def test_a_verdict_hangs_on_a_choice_where_tokens_alone_differ(criteria, hangs):
    failures = tuple(Reason(criterion=criterion, text="") for criterion in criteria)
    assert hangs_on_choice(Verdict(failures=failures)) is hangs


def test_a_stored_row_is_judged_by_the_near_ties_that_were_known():
    verdict = judge({"index": compared(2, 0.5)}, Tolerance(preset="floor"))
    row = Row.from_dict(Row.of(test="t", case="c", dtype="float32", seed=0, verdict=verdict).to_dict())
    assert judged_again(row).passed
    stored = row.to_dict()
    del stored["measured"]["index"]["comparison"][
        "unsettled"
    ]  # as an older version wrote it, and any row without near-ties
    assert judged_again(Row.from_dict(stored)).status == "FAIL"
    settled = Row.of(
        test="t",
        case="c",
        dtype="float32",
        seed=0,
        verdict=judge({"index": compared(0, 0.0)}, Tolerance(preset="floor")),
    )
    assert "unsettled" not in settled.to_dict()["measured"]["index"]["comparison"]
