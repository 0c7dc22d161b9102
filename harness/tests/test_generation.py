"""Generations that part: a near-tie is told from a fault, and nothing is compared behind it."""

import pytest
import torch
from torch import nn

from harness import Case, emulator, validate
from harness.errors import CaseError
from harness.judging.checks import hangs_on_choice
from harness.judging.tolerance import Tolerance
from harness.measure.generation import first_divergence, shared_length, until
from harness.run.judged import Healthy, Judge
from harness.tests.needs import emulated_device

NAMES = ("tokens", "logits")


def outputs(tokens, logits):
    return {"tokens": torch.tensor(tokens), "logits": torch.tensor(logits)}


EXPECTED = outputs([[1, 2, 0], [1, 1, 1]], [[[0.0, 1.0, 0.5], [0.0, 0.2, 1.0], [2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]] * 3])


def test_the_first_token_that_differs_is_found_with_its_margin():
    actual = outputs(
        [[1, 1, 2], [1, 1, 0]], [[[0.0, 1.0, 0.5], [0.0, 1.1, 1.0], [0.0, 0.0, 9.0]], [[0.0, 1.0, 0.0]] * 3]
    )
    golden = {"tokens": EXPECTED["tokens"], "logits": EXPECTED["logits"].double() + 0.01}
    result = first_divergence(actual, EXPECTED, [golden], NAMES)
    assert (result.sequence, result.position, result.actual, result.expected) == (0, 1, 1, 2)
    assert (
        result.margin == pytest.approx(0.8)
        and result.error == pytest.approx(0.9)
        and result.healthy == pytest.approx(0.01)
    )
    assert (
        not result.near_tie
        and result.text.startswith("token 1 of sequence 0 is 1 where 2 was expected: it lies 0.8 below")
        and "no near-tie" in result.text
    )
    assert shared_length([actual, golden], EXPECTED, NAMES) == 1
    cut = until(actual, 1, NAMES)
    assert cut["tokens"].tolist() == [[1], [1]] and cut["logits"].shape == (2, 2, 3)


def test_a_margin_below_two_healthy_errors_is_a_near_tie():
    close = EXPECTED | {"logits": EXPECTED["logits"].clone()}
    close["logits"][0, 1] = torch.tensor([0.0, 0.999, 1.0])
    actual = close | {"tokens": torch.tensor([[1, 1, 2], [1, 1, 1]])}
    golden = {"tokens": EXPECTED["tokens"], "logits": close["logits"].double() + 0.002}
    result = first_divergence(actual, close, [golden], NAMES)
    assert result.near_tie and result.text.endswith("; a near-tie")
    assert first_divergence(close, close, [golden], NAMES) is None and shared_length([golden], close, NAMES) is None


def generation(tokens, *, tie=1e-5):
    """Two sequences of six tokens out of four; at each place token 0 lies `tie` above token 1, and the others far
    below.
    """
    logits = torch.tensor([1.0 + tie, 1.0, -9.0, -9.0], dtype=torch.float64).repeat(2, 6, 1)
    return {"tokens": torch.tensor(tokens), "logits": logits}


def test_what_a_healthy_run_does_in_one_sequence_says_nothing_of_another():
    expected = generation([[0] * 6] * 2)
    golden = generation([[0] * 6, [0, 1, 0, 0, 0, 0]]) | {
        "logits": expected["logits"] + 1e-4
    }  # parts in sequence 1 at token 1
    actual = generation([[0, 0, 0, 0, 1, 0], [0] * 6])
    result = first_divergence(actual, expected, [golden], NAMES)
    assert (result.sequence, result.position, result.near_tie) == (0, 4, True) and result.healthy == pytest.approx(1e-4)
    early = generation([[0, 0, 1, 0, 0, 0], [0] * 6]) | {
        "logits": expected["logits"] + 1e-4
    }  # parts in sequence 0 before: errors from before serve
    assert first_divergence(actual, expected, [early], NAMES).healthy == pytest.approx(1e-4)
    assert not first_divergence(actual, expected, [], NAMES).near_tie  # nothing is known of the logits


def test_of_several_sequences_that_part_together_the_gravest_decides():
    expected = generation([[0] * 6] * 2)
    golden = expected | {"logits": expected["logits"] + 1e-4}
    actual = generation([[0, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]])
    result = first_divergence(actual, expected, [golden], NAMES)
    assert (result.sequence, result.actual, result.near_tie) == (1, 2, False)
    below = expected | {
        "tokens": torch.tensor([[2, 0, 0, 0, 0, 0], [0] * 6])
    }  # the CPU chose a token far below: no tie either
    assert not first_divergence(expected, below, [golden], NAMES).near_tie


def test_outputs_that_are_no_generation_are_one_line():
    with pytest.raises(CaseError, match="but the outputs are other"):
        first_divergence({"other": torch.ones(2)}, {"other": torch.ones(2)}, [], NAMES)
    with pytest.raises(
        CaseError, match=r"tokens has shape \(2, 3\) and logits \(2, 3\) where \(B, T\) and \(B, T, V\) were expected"
    ):
        first_divergence(EXPECTED | {"logits": torch.ones(2, 3)}, EXPECTED | {"logits": torch.ones(2, 3)}, [], NAMES)
    with pytest.raises(ValueError, match="must name two outputs"):
        Case(name="m", model=Tiny, inputs=lambda generator: torch.zeros(1), generates=("tokens",))


class Tiny(nn.Module):
    """The next token by two products: ids (B, T) to ids and logits of eight steps more."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(64, 48), nn.Linear(48, 48), nn.Linear(48, 64, bias=False)

    def forward(self, ids):
        tokens, logits, state = [], [], self.embedding(ids).mean(1)
        for _ in range(8):
            state = torch.tanh(self.mix(state))
            logits.append(self.head(state))
            tokens.append(logits[-1].argmax(-1))
            state = state + self.embedding(tokens[-1])
        return {"tokens": torch.stack(tokens, 1), "logits": torch.stack(logits, 1)}


class Tied(Tiny):
    """Two tokens have almost the same row in the head: the choice between them hangs on HF32's rounding."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.head.weight[1::2] = self.head.weight[::2] + 3e-5 * torch.randn(32, 48)


def case(model, dtype):
    ids = lambda generator: torch.randint(0, 64, (16, 5), generator=generator)
    return Case(name="tiny", model=lambda: model().eval(), inputs=ids, dtype=dtype, generates=NAMES)


@pytest.fixture(scope="module")
def npu():
    return emulated_device()


def test_a_healthy_generation_passes_and_near_ties_do_not_fail(npu):
    verdict = validate(case(Tiny, "float32"), 1, npu)
    assert verdict.passed and "NEAR TIE" not in verdict.marks and verdict.comparisons["tokens"].shape == (16, 8)
    torch.npu.matmul.allow_hf32 = True
    try:
        marks = [validate(case(Tied, "float32"), seed, npu) for seed in range(4)]
    finally:
        torch.npu.matmul.allow_hf32 = False
    assert all(mark.passed for mark in marks), [str(mark.reasons) for mark in marks]
    tied = [mark for mark in marks if "NEAR TIE" in mark.marks]
    assert tied and "a near-tie" in tied[0].evidence.parted and tied[0].comparisons["tokens"].shape[1] < 8


def test_a_fault_in_the_logits_is_no_near_tie(npu):
    with emulator.fault("aclnnAddmm", "zero_rows", at=3):
        verdict = validate(case(Tiny, "float32"), 1, npu)
    assert verdict.status == "FAIL" and any("no near-tie" in str(reason) for reason in verdict.reasons)
    assert verdict.comparisons["tokens"].unequal == 0  # what is behind it is not compared


def test_a_token_alone_that_differs_is_judged_by_more_healthy_runs(npu):
    """The logits are as a healthy device's, and the margin is just beyond twice what two runs happened to lose."""

    def drawn(runs, *, tie):
        expected = generation([[0] * 6] * 2, tie=tie)
        actual = generation([[0, 1, 0, 0, 0, 0], [0] * 6], tie=tie)
        golden = expected | {"logits": expected["logits"] + 1e-4}
        random = [expected | {"logits": golden["logits"] + error} for error in runs]
        healthy = Healthy(expected=expected, golden=golden, forecast=expected, other=None, wide=None, modes=())
        judge = Judge(
            case=Case(name="m", model=Tiny, inputs=lambda generator: None, generates=NAMES),
            healthy=healthy,
            tolerance=Tolerance(preset="floor"),
            saturates="",
        )
        first, _ = judge(actual)
        again, _ = judge.with_healthy(random=(expected, *random))(actual)
        return first, again

    first, again = drawn([1.6e-4, 1.2e-4], tie=3.1e-4)
    assert hangs_on_choice(first) and not hangs_on_choice(again) and "NEAR TIE" in again.marks
    first, again = drawn([1.5e-4, 1.2e-4], tie=3.1e-4)
    assert hangs_on_choice(first) and hangs_on_choice(again)
    first, again = drawn([], tie=1.9e-4)
    assert "NEAR TIE" in first.marks and not hangs_on_choice(first)
