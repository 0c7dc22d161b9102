"""Generations that part: a near-tie is told from a fault, and nothing is compared behind it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness import Case, emulator, validate
from harness.errors import CaseError
from harness.judging.checks import hangs_on_choice
from harness.judging.status import Mark
from harness.judging.tolerance import Tolerance
from harness.measure.generation import Divergence, first_divergence, greedy, shared_length, until
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


def divergence_by_definition(actual, expected, healthy):
    """`first_divergence` in plain lists: (sequence, position, margin, error, healthy error, whether it is a tie)."""
    actual, expected, *healthy = (
        {name: tensor.tolist() for name, tensor in run.items()} for run in (actual, expected, *healthy)
    )

    def parting(run, other, row):
        pairs = [*zip(run["tokens"][row], other["tokens"][row])]
        return next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))

    def error(run, other, row, place):
        return max(abs(one - two) for one, two in zip(run["logits"][row][place], other["logits"][row][place]))

    rows = range(len(expected["tokens"]))
    first = [parting(actual, expected, row) for row in rows]
    place, result = min(first), []
    if place == min(len(actual["tokens"][0]), len(expected["tokens"][0])):
        return None
    for row in (row for row in rows if first[row] == place):
        scores = expected["logits"][row][place]
        margin = scores[expected["tokens"][row][place]] - scores[actual["tokens"][row][place]]
        known = []
        for run in [expected, *healthy[1:]] if healthy else []:
            there = range(min(len(run["logits"][0]), len(healthy[0]["logits"][0])))
            if parting(run, healthy[0], row) >= place and place in there:
                known.append(error(run, healthy[0], row, place))
                continue
            for other in rows:  # what it read is the same up to the token at which it parts
                for column in there:
                    if column <= parting(run, healthy[0], other):
                        known.append(error(run, healthy[0], other, column))
        size = max(known) if known else None
        tie = size is not None and abs(margin) <= 2 * size
        result.append((not tie, abs(margin), (row, place, margin, error(actual, expected, row, place), size), tie))
    gravest = max(result, key=lambda item: item[:2])
    return *gravest[2], gravest[3]


@pytest.mark.parametrize("seed", range(40))
def test_the_first_divergence_is_that_of_the_definition(seed):
    """Of three sequences, with runs that part early, late or not at all, and that end early."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 4, (3, 6), generator=draw)
    logits = torch.randn(3, 6, 4, generator=draw, dtype=torch.float64)

    def run(changes, size, length=6):
        other = tokens.clone()
        for _ in range(changes):
            row, place = (int(torch.randint(0, most, (), generator=draw)) for most in (3, 6))
            other[row, place] = (other[row, place] + 1) % 4
        error = size * torch.randn(3, 6, 4, generator=draw, dtype=torch.float64)
        return {"tokens": other[:, :length], "logits": (logits + error)[:, :length]}

    size = 10.0 ** -(seed % 4)
    expected, golden, *others = (run(count, size) for count in (0, seed % 2, seed % 3, 0))
    golden, others = ({name: item[:, : 6 - seed % 5 // 4] for name, item in golden.items()}, others)
    actual = run(seed % 4, size, length=6 - seed % 7 // 6)
    for healthy in ([golden, *others], [golden], []):
        right, found = (way(actual, expected, healthy) for way in (divergence_by_definition, of_names))
        assert (found is None) is (right is None)
        if found is not None:
            place = found.sequence, found.position
            assert place == right[:2] and found.near_tie is right[5]
            assert (found.margin, found.error) == pytest.approx(right[2:4])
            assert found.healthy == pytest.approx(math.nan if right[4] is None else right[4], nan_ok=True)
            assert found.actual == actual["tokens"][place] and found.expected == expected["tokens"][place]


def test_a_healthy_run_that_ended_at_once_says_nothing():
    expected = generation([[0] * 6] * 2)
    actual = generation([[0, 1, 0, 0, 0, 0], [0] * 6])
    nothing = {name: tensor[:, :0] for name, tensor in expected.items()}
    assert math.isnan(of_names(actual, expected, [nothing]).healthy)


def of_names(actual, expected, healthy):
    return first_divergence(actual, expected, healthy, NAMES)


@pytest.mark.parametrize("margin", [2.0, -2.0])
def test_a_near_tie_is_within_two_healthy_errors(margin):
    known = dict(sequence=0, position=0, actual=1, expected=0, error=1.0)
    assert Divergence(margin=margin, healthy=1.0, **known).near_tie
    assert not Divergence(margin=margin * 1.001, healthy=1.0, **known).near_tie
    unknown = Divergence(margin=0.0, healthy=math.nan, **known)
    assert not unknown.near_tie and unknown.text.endswith("no healthy run says how well they are known")


def test_the_shared_length_is_up_to_the_first_run_that_leaves():
    late, early = generation([[0] * 6, [0, 0, 0, 0, 1, 0]]), generation([[0, 0, 1, 0, 0, 0], [0] * 6])
    expected = generation([[0] * 6] * 2)
    assert shared_length([late], expected, NAMES) == 4 and shared_length([late, early], expected, NAMES) == 2
    assert shared_length([expected, expected], expected, NAMES) is None and shared_length([], expected, NAMES) is None
    shorter = {name: tensor[:, :5] for name, tensor in expected.items()}
    assert shared_length([shorter], expected, NAMES) == 5  # it ended: nothing behind can be compared
    cut = until(expected | {"other": torch.ones(9)}, 4, NAMES)
    assert cut["tokens"].shape == (2, 4) and cut["logits"].shape == (2, 5, 4) and cut["other"].shape == (9,)


class Repeats:
    """Generates as transformers does: the ids that it was given, and `steps` times the token 3."""

    def generate(self, **given):
        self.given = given
        ids, steps = given["input_ids"], given["max_new_tokens"]
        logits = tuple(torch.full((len(ids), 5), float(step)) for step in range(steps))
        sequences = torch.cat([ids, torch.full((len(ids), steps), 3)], 1)
        return SimpleNamespace(sequences=sequences, logits=logits)


def test_greedy_generation_returns_the_new_tokens_and_their_logits():
    model, ids = Repeats(), torch.tensor([[7, 8], [9, 9]])
    made = greedy(model, ids, 4)
    assert made["tokens"].tolist() == [[3] * 4] * 2 and made["logits"].shape == (2, 4, 5)
    assert made["logits"][1, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    asked = {name: model.given[name] for name in model.given if name not in ("input_ids", "attention_mask")}
    assert asked == dict(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(model.given["attention_mask"], torch.ones(2, 2, dtype=torch.int64))
    greedy(model, {"input_ids": ids, "pixels": 1}, 1)
    assert model.given["pixels"] == 1 and "attention_mask" not in model.given


# -------- the verdict on generations


def verdict_on(actual, expected, golden, forecast=None, random=()):
    healthy = Healthy(
        expected=expected, golden=golden, forecast=forecast, other=None, wide=None, modes=(), random=random
    )
    case = Case(name="m", model=Tiny, inputs=lambda generator: None, generates=NAMES)
    return Judge(case=case, healthy=healthy, tolerance=Tolerance(preset="floor"), saturates="")(actual)


def test_generations_are_compared_up_to_where_any_run_parts():
    expected = generation([[0] * 6] * 2)
    known = expected | {"logits": expected["logits"] + 1e-4}
    tie, early = (generation([[0, 0, 0, 0, 1, 0], [0] * 6]) | {"logits": known["logits"]} for _ in range(2))
    early["tokens"] = torch.tensor([[0] * 6, [0, 0, 1, 0, 0, 0]])
    for runs, length in (((known, None), 4), ((early, None), 2), ((known, early), 2)):
        verdict, parting = verdict_on(tie, expected, *runs)
        assert verdict.comparisons["tokens"].shape == (2, length)
        assert verdict.comparisons["logits"].shape == (2, length + 1, 4)
        assert verdict.marks == (Mark.NEAR_TIE,) and verdict.passed and "; a near-tie" in parting
    verdict, parting = verdict_on(expected, expected, early, known)
    assert parting == "healthy runs part at token 2: compared up to there"
    assert verdict.passed and verdict.marks == () and verdict.comparisons["logits"].shape == (2, 3, 4)
    verdict, parting = verdict_on(expected, expected, known, known)
    assert verdict.comparisons["tokens"].shape == (2, 6) and parting == ""


@pytest.mark.parametrize("token", [0, 1])
def test_random_runs_say_nothing_of_a_generations_scatter(token):
    """They may part elsewhere, so that they are no runs of the same computation."""
    expected = generation([[0] * 6] * 2)
    actual = generation([[0, 0, 0, token, 0, 0], [0] * 6])
    known = expected | {"logits": expected["logits"] + 1e-4}
    other = generation([[1] * 6] * 2) | {"logits": expected["logits"] - 2e-4}
    verdict, _ = verdict_on(actual, expected, known, random=(expected, known, other))
    assert verdict.references["logits"].scatter is None and verdict.comparisons["tokens"].unsettled == 0.0


def test_without_float64_no_token_is_a_near_tie():
    """Neither a forecast nor random runs say how far the logits are from what is right."""
    expected = generation([[0] * 6] * 2)
    actual = generation([[0, 1, 0, 0, 0, 0], [0] * 6])
    forecast = expected | {"logits": expected["logits"] + 1e-4}
    verdict, _ = verdict_on(actual, expected, None, forecast, random=(expected, forecast))
    assert verdict.failures[0].criterion == "token" and verdict.marks == ()


def test_the_first_of_the_random_runs_is_the_cpus_own_and_says_nothing():
    expected = generation([[0] * 6] * 2)
    actual = generation([[0, 1, 0, 0, 0, 0], [0] * 6])
    far, near = (expected | {"logits": expected["logits"] + error} for error in (1.0, 1e-7))
    for runs, passes in (((far, near), False), ((near, far), True), ((near, near), False)):
        verdict, _ = verdict_on(actual, expected, near, random=runs)
        assert (Mark.NEAR_TIE in verdict.marks) is passes


def test_outputs_that_are_no_generation_are_one_line():
    with pytest.raises(CaseError, match="but the outputs are other"):
        first_divergence({"other": torch.ones(2)}, {"other": torch.ones(2)}, [], NAMES)
    for actual, expected in (({"tokens": torch.ones(1, 2)}, EXPECTED), (EXPECTED, {"tokens": torch.ones(1, 2)})):
        with pytest.raises(CaseError, match=f"but the outputs are {', '.join(expected)}; return"):
            first_divergence(actual, expected, [], NAMES)
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


def test_a_token_alone_that_differs_is_judged_by_more_healthy_runs():
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
