"""The verdict on one run of the device from its tensors alone, against restatements element by element: what is
compared with what, decisions, outputs that show nothing, and where float16 saturates. No model runs here.
"""

import math

import pytest
import torch
from torch import nn

from harness import Case, compare
from harness.errors import CaseError
from harness.judging.references import MANY
from harness.judging.status import Mark
from harness.judging.tolerance import Tolerance
from harness.measure import scatter_of
from harness.measure.slices import worst_slices
from harness.run import comparisons as runs
from harness.run import judged
from harness.run.comparisons import cut_as_float16, measured_outputs, near_tied
from harness.run.judged import NO_TOKEN, Healthy, Judge, next_tokens

INF, NAN = math.inf, math.nan
TINY = torch.finfo(torch.float32).tiny


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_case(**more):
    return Case(**(dict(name="m", model=nn.Identity, inputs=lambda generator: None) | more))


def a_verdict(actual, expected, golden=None, *, case=None, preset="pair", saturates="", targets=None, **healthy):
    """The verdict on outputs by name, and where generations part."""
    given = dict(forecast=None, other=None, wide=None, modes=()) | healthy
    judge = Judge(
        case=case or a_case(),
        healthy=Healthy(expected=expected, golden=golden, **given),
        tolerance=Tolerance(preset=preset),
        saturates=saturates,
        targets=targets,
    )
    return judge(actual)


def criteria(verdict):
    return [(failure.criterion, failure.output) for failure in verdict.failures]


# -------- decisions


def by_definition(actual, expected, skips):
    """count, agree and the first that differs, row by row. `skips`: rows of zeros on both sides decide nothing."""
    rows = [*zip(actual.reshape(-1, actual.shape[-1]).tolist(), expected.reshape(-1, expected.shape[-1]).tolist())]
    counted = [index for index, (left, right) in enumerate(rows) if any(left) or any(right)]
    counted = counted if skips and counted else [*range(len(rows))]
    wrong = []
    for index in counted:
        left, right = rows[index]
        choice = left.index(max(left))
        if right[choice] != max(right):
            wrong.append((index, choice, right.index(max(right))))
    return len(counted), len(counted) - len(wrong), wrong[0] if wrong else None


def decided(actual, expected, **more):
    return judged._decide(a_case(decisions="y", **more), {"y": actual}, {"y": expected}, None)


def planted_logits(*shape):
    """Logits of which some rows are otherwise, tied, zero on both sides or zero on one."""
    expected = drawn(*shape, dtype=torch.float32)
    actual = expected.clone()
    left, right = actual.view(-1, shape[-1]), expected.view(-1, shape[-1])
    left[0] = right[0] = 0.0
    right[1, 0] = right[1, -1] = 9.0  # equal: either is the decision
    left[1], left[1, -1] = right[1], 9.5
    left[2] = 0.0
    right[3] = 0.0
    left[4, 0], left[4, 1] = 7.0, 7.0  # the first of equals, where another one is expected
    right[4, 1] = 8.0
    left[5], right[5, 0] = 0.0, 0.0  # of what is zero on one side, some is zero on the other too
    return actual, expected


@pytest.mark.parametrize("shape", [(7, 3), (2, 4, 5), (8, 1)], ids=str)
def test_decisions_are_those_of_the_definition(shape):
    actual, expected = planted_logits(*shape) if shape[-1] > 1 else [drawn(*shape)] * 2
    for left, right in ((actual, expected), (expected, actual), (expected, expected), (actual * 0, expected * 0)):
        found = decided(left, right)
        assert (found.count, found.agree, found.first) == by_definition(left, right, skips=True)
        assert found.correct_actual is found.correct_expected is None
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    for left, right in ((actual, expected), (expected, actual)):
        found = decided(left, right, labels=labels)
        assert (found.count, found.agree, found.first) == by_definition(left, right, skips=False)
        counts = [sum(row.index(max(row)) == 0 for row in side.view(-1, shape[-1]).tolist()) for side in (left, right)]
        assert [found.correct_actual, found.correct_expected] == counts


def test_one_vector_is_one_decision():
    found = decided(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([5.0, 2.0, 1.0]))
    assert (found.count, found.agree, found.first) == (1, 0, (0, 1, 0))
    assert decided(torch.zeros(3), torch.zeros(3)).count == 1


def test_what_decides_nothing_is_none_or_told():
    one, other = {"y": torch.ones(2, 3)}, {"y": torch.ones(3, 3)}
    case = a_case(decisions="y")
    assert judged._decide(case, other, one) is None and judged._decide(case, {}, one) is None
    with pytest.raises(CaseError, match="decisions='y', but the outputs are z"):
        judged._decide(case, one, {"z": one["y"]})
    with pytest.raises(CaseError, match="3 labels for 2 decisions"):
        judged._decide(a_case(decisions="y", labels=torch.zeros(3)), one, one)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9, 10, 11, 30])
def test_the_largest_logits_that_both_sides_share(width):
    actual, expected = drawn(6, width), drawn(6, width, seed=1)
    k = min(5, width // 2)
    result = judged._overlap(actual, expected)
    if not k:
        assert result == {}
        return
    shared = [
        len({*sorted(range(width), key=left.__getitem__)[-k:]} & {*sorted(range(width), key=right.__getitem__)[-k:]})
        for left, right in zip(actual.tolist(), expected.tolist())
    ]
    assert result == {"k": k, "topk": pytest.approx(sum(shared) / (6 * k))}
    assert decided(actual, expected).topk == result["topk"]


def test_nothing_has_no_largest_logits():
    for empty in (torch.tensor(1.0), torch.ones(0, 4), torch.ones(3, 0)):
        assert judged._overlap(empty, empty) == {}


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 8, 1 << 20])
def test_the_worst_row_counts_wherever_it_stands(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(judged, "_ROWS", rows_at_a_time)
    expected = drawn(5, 4)
    rows = [1e-3, 3e-1, 1e-2, 2e-3, 5e-2]
    actual = expected + torch.tensor(rows, dtype=torch.float64)[:, None] * drawn(5, 4, seed=1).sign()
    p, q = expected.softmax(-1), actual.softmax(-1)
    lost = [float((a * (a / b).log()).sum()) for a, b in zip(p, q)]
    found = judged._divergence(actual, expected)
    assert found["kl"] == pytest.approx(sum(lost) / 5, rel=1e-9) and found["kl_max"] == pytest.approx(max(lost))
    taken = []
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda x, dim: taken.append(x.numel()) or x - x.logsumexp(dim, True)
    )
    judged._divergence(actual, expected)
    assert sum(taken) == 2 * 20 and max(taken) == min(max(rows_at_a_time // 4, 1) * 4, 20)  # in bounded memory
    spoiled = actual.clone()
    spoiled[1] = NAN
    assert all(math.isnan(value) for value in judged._divergence(spoiled, expected).values())
    assert judged._divergence(torch.tensor(1.0), torch.tensor(1.0)) == {}
    both = torch.tensor([[0.0, 1.0]])
    assert judged._divergence(both, both) == {"kl": 0.0, "kl_max": 0.0}  # two classes are the fewest


def test_rounding_makes_no_divergence_negative():
    """A constant beside all logits changes no distribution, and what is left of it is rounding of either sign."""
    expected = drawn(300, 7)
    found = [judged._divergence(row + 0.7, row) for row in expected.split(1)]
    assert all(0 <= value < 1e-14 for numbers in found for value in numbers.values())


# -------- the tokens that come next


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 1, 1, 0]], "wide", "list"])
def test_the_tokens_that_come_next_are_those_of_the_definition(mask):
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    given = {"ids": ids, "attention_mask": torch.tensor(mask) if isinstance(mask, list) else torch.ones(2, 1, 4, 4)}
    given["attention_mask"] = [1] if mask == "list" else given["attention_mask"]
    if mask is None:
        del given["attention_mask"]
    shown = mask if isinstance(mask, list) else [[1] * 4] * 2  # a mask of another shape is of something else
    right = [
        [int(ids[b, t + 1]) if t < 3 and shown[b][t] and shown[b][t + 1] else NO_TOKEN for t in range(4)]
        for b in range(2)
    ]
    assert next_tokens(a_case(decisions="y", next_tokens="ids"), given).tolist() == right
    assert NO_TOKEN == torch.nn.CrossEntropyLoss().ignore_index


def test_no_token_or_another_shape_has_no_perplexity():
    logits, targets = drawn(2, 3, 4), torch.tensor([[1, NO_TOKEN, NO_TOKEN]] * 2)
    assert judged._perplexities(logits, logits, targets[:, :2]) == {}
    found = judged._perplexities(logits * 2, logits, targets)
    for name, side in (("perplexity", logits * 2), ("expected_perplexity", logits)):
        right = math.exp(-sum(float(side[row, 0].log_softmax(-1)[1]) for row in range(2)) / 2)
        assert found[name] == pytest.approx(right, rel=1e-12)
    case = a_case(decisions="y", generates=None)
    verdict, _ = a_verdict({"y": logits * 2}, {"y": logits}, case=case, targets=targets)
    assert verdict.decisions.perplexity == found["perplexity"]


# -------- outputs that show nothing

ONES, ZEROS = torch.ones(4), torch.zeros(4)
COUNTS = torch.arange(4)
INFINITE, MIXED = torch.tensor([INF, NAN, -INF, INF]), torch.tensor([INF, NAN, 1.0, INF])


@pytest.mark.parametrize(
    ("actual", "expected", "golden", "shown"),
    [
        ({"x": ZEROS}, {"x": ZEROS}, None, "zero"),
        ({"x": ZEROS, "y": ZEROS}, {"x": ZEROS, "y": ZEROS}, None, "zero"),
        ({"x": COUNTS.float()}, {"x": COUNTS.float()}, None, ""),  # one of four is zero
        ({"x": ZEROS, "y": MIXED}, {"x": ZEROS, "y": MIXED}, None, ""),
        ({"x": ONES}, {"x": ZEROS}, None, ""),
        ({"x": ZEROS, "n": COUNTS}, {"x": ZEROS, "n": COUNTS}, None, "zero"),  # whole numbers are not looked at
        ({"n": COUNTS * 0}, {"n": COUNTS * 0}, None, ""),
        ({"x": ZEROS[:0]}, {"x": ZEROS[:0]}, None, ""),
        ({"x": ZEROS, "y": ONES[:0]}, {"x": ZEROS, "y": ONES[:0]}, None, "zero"),
        ({"x": ZEROS}, {"x": ZEROS, "y": MIXED}, None, "zero"),  # the device lacks y, which fails by itself
        ({"x": ZEROS, "input x": MIXED}, {"x": ZEROS, "input x": MIXED}, None, "zero"),
        ({"x": INFINITE}, {"x": INFINITE}, None, "Inf or NaN"),
        ({"x": INFINITE, "y": INFINITE}, {"x": INFINITE, "y": ONES}, None, ""),
        ({"x": MIXED}, {"x": INFINITE}, None, ""),
        ({"x": INFINITE}, {"x": MIXED}, None, ""),
        ({"x": ONES}, {"x": ONES}, {"x": ONES.double()}, "the same number"),
        ({"x": ONES}, {"x": ONES}, {"x": ONES.double() + 1e-9}, ""),  # it was rounded: something computed it
        ({"x": ONES}, {"x": ONES}, None, ""),
        ({"x": ONES, "y": ONES}, {"x": ONES, "y": ONES}, {"x": ONES.double(), "y": ONES.double() - 1e-9}, ""),
        ({"x": ONES}, {"x": ONES}, {}, ""),
        ({"x": ONES, "n": COUNTS}, {"x": ONES, "n": COUNTS}, {"x": ONES.double()}, "the same number"),
        ({"x": ONES, "y": drawn(4)}, {"x": ONES, "y": drawn(4)}, {"x": ONES.double(), "y": drawn(4)}, ""),
        ({"x": ONES * 2}, {"x": ONES}, {"x": ONES.double()}, ""),
        ({"x": ONES[:1]}, {"x": ONES[:1]}, {"x": ONES[:1].double()}, ""),  # one number is no constant
        ({"x": ONES[:2]}, {"x": ONES[:2]}, {"x": ONES[:2].double()}, "the same number"),
    ],
)
def test_outputs_that_show_nothing_are_told_by_what_they_are(actual, expected, golden, shown):
    result = judged._unseen(actual, expected, golden)
    assert [reason.criterion for reason in result] == (["empty"] if shown else [])
    assert not shown or f"every element of every output is {shown} on both sides" in result[0].text


def zeroed(actual, expected, golden=None):
    return [reason.output for reason in judged._zeroed(actual, expected, golden)]


def test_zeros_where_the_cpu_has_none_fail_whatever_the_limits_allow():
    assert zeroed({"x": ZEROS}, {"x": ONES}) == [""]
    assert zeroed({"x": ZEROS, "y": ZEROS, "z": ONES}, {"x": ONES, "y": ONES, "z": ONES}) == ["x", "y"]
    assert zeroed({"x": ZEROS}, {"x": ONES, "y": ONES}) == ["x"]  # of two outputs it is named, and y is lacking
    sound = ({"x": ZEROS}, {"x": ZEROS}), ({"x": ONES}, {"x": ONES}), ({"n": COUNTS * 0}, {"n": COUNTS})
    assert [zeroed(*sides) for sides in (*sound, ({"x": ZEROS[:0]}, {"x": ZEROS[:0]}), ({}, {"x": ONES}))] == [[]] * 5
    one = torch.tensor([0.0, 0.0, 1e-3, 0.0])
    assert zeroed({"x": one}, {"x": ONES}) == []
    for size, fails in ((TINY, [""]), (TINY / 2, [])):  # below the smallest normal number a device may flush to zero
        assert zeroed({"x": ZEROS}, {"x": torch.tensor([0.0, -size, 0.0, 0.0])}) == fails


@pytest.mark.parametrize(("error", "fails"), [(0.49, [""]), (0.51, []), (NAN, [])])
def test_a_difference_of_equal_numbers_may_be_zero_on_one_side(error, fails):
    """The CPU's own error to float64 as a share of it."""
    golden = torch.ones(4, dtype=torch.float64)
    assert zeroed({"x": ZEROS}, {"x": (golden * (1 + error)).float()}, {"x": golden}) == fails
    assert zeroed({"x": ZEROS}, {"x": ONES}, {"y": golden}) == [""]
    assert zeroed({"x": ZEROS}, {"x": ONES * 3}, {"x": golden[:2]}) == [""]  # of another shape: nothing is known


def test_what_shows_nothing_takes_the_place_of_what_cannot_be_decided():
    """Outputs of zeros by a device, and a CPU that lost all of its bits: the first says why."""
    golden = drawn(2000)
    wild = {"x": (golden + 2 * drawn(2000, seed=1)).float()}
    verdict, _ = a_verdict({"x": wild["x"].clone()}, wild, {"x": golden}, preset="floor")
    assert ("undecided", "") in criteria(verdict) and verdict.marks == (Mark.UNDECIDABLE,)
    verdict, _ = a_verdict({"x": INFINITE}, {"x": INFINITE}, {"x": INFINITE.double()}, preset="floor")
    assert criteria(verdict)[0] == ("empty", "") and Mark.UNDECIDABLE not in verdict.marks
    wide = {"x": drawn(2000), "y": drawn(2000)}
    sides = {"x": (wide["x"] + 2 * drawn(2000, seed=1)).float(), "y": wide["y"].float()}
    verdict, _ = a_verdict({"x": sides["x"], "y": sides["y"] * 0}, sides, wide, preset="floor")
    assert {("empty", "y")} < {*criteria(verdict)} and verdict.marks == ()
    assert "undecided" not in {failure.criterion for failure in verdict.failures}


def test_outputs_that_one_side_lacks_fail_by_name():
    both = {"x": ONES, "y": drawn(4, dtype=torch.float32)}
    verdict, _ = a_verdict({"y": both["y"]}, both)
    assert [str(failure) for failure in verdict.failures] == ["output 'x': the device did not return it"]
    verdict, _ = a_verdict(both, {"y": both["y"]})
    assert [str(failure) for failure in verdict.failures] == ["output 'x': the CPU did not return it"]
    assert a_verdict(both, both)[0].passed


# -------- what is compared with what


def sides_of(count=40):
    """The device, the CPU, float64, the forecast and one with other ties: all apart."""
    golden = drawn(count)
    apart = [golden + size * drawn(count, seed=seed) for seed, size in ((1, 1e-3), (2, 2e-3), (3, 3e-3), (4, 4e-3))]
    return [{"x": golden}, *({"x": item.float()} for item in apart)]


def test_each_number_is_of_the_pair_that_it_says():
    golden, actual, expected, forecast, other = sides_of()
    modes = ("HF32",)
    found, references = measured_outputs(actual, expected, golden, forecast, modes, other)
    (known,) = references.values()
    pair = lambda one, two: compare(one["x"], two["x"])
    assert found == {"x": pair(actual, expected)}
    assert (known.golden, known.cpu) == (pair(actual, golden), pair(expected, golden))
    assert (known.forecast, known.modes) == (pair(forecast, golden), modes)
    assert (known.unexplained, known.ties) == (pair(actual, forecast).rel_l2, pair(other, forecast).rel_l2)
    assert known.slices == worst_slices(actual["x"], golden["x"], [expected["x"], forecast["x"]])
    known = measured_outputs(actual, expected, golden, forecast)[1]["x"]
    assert known.ties is None and known.unexplained == pair(actual, forecast).rel_l2 and known.scatter is None
    for none in (None, {"y": forecast["x"]}):
        known = measured_outputs(actual, expected, golden, none, modes, other)[1]["x"]
        assert known.forecast is known.unexplained is known.ties is None
        assert known.slices == worst_slices(actual["x"], golden["x"], [expected["x"]])


def test_slices_know_the_forecast_and_the_cpu():
    golden = drawn(9, 16)
    expected, forecast = ((golden + size * drawn(9, 16, seed=5)).float() for size in (1e-6, 1e-3))
    known = measured_outputs({"x": expected}, {"x": expected}, {"x": golden}, {"x": forecast})[1]["x"]
    alone = measured_outputs({"x": expected}, {"x": expected}, {"x": golden}, None)[1]["x"]
    assert known.slices and max(part.healthy for part in alone.slices) < min(part.healthy for part in known.slices)


@pytest.mark.parametrize(
    ("expected", "golden", "has"),
    [
        (ONES, {"x": ONES.double()}, True),
        (ONES.to(torch.complex64), {"x": ONES.to(torch.complex128)}, True),
        (COUNTS, {"x": COUNTS.double()}, False),
        (ONES, {"x": torch.ones(2, 2).double()}, False),
        (ONES, {"y": ONES.double()}, False),
        (ONES, None, False),
    ],
)
def test_which_outputs_have_a_float64_reference(expected, golden, has):
    found, references = measured_outputs({"x": expected}, {"x": expected, "lacking": expected}, golden, None)
    assert [*found] == ["x"] and [*references] == (["x"] if has else [])
    if golden is not None:
        assert runs.has_golden("x", {"x": expected}, golden) is has


def test_near_ties_are_the_mean_of_what_healthy_runs_change():
    """Of float64, the forecast and the random runs but the first, which is the CPU's own; or of the random runs alone,
    which choose among equal numbers too, where that is more.
    """
    expected = torch.arange(10)

    def changed(count):
        return torch.where(torch.arange(10) < count, -1, expected)

    actual, golden, forecast = ({"x": changed(count)} for count in (5, 1, 2))
    random = [{"x": changed(9)}, {"x": changed(4)}, {"x": changed(6)}]

    def unsettled(golden=golden, forecast=forecast, random=random):
        found, references = measured_outputs(actual, {"x": expected}, golden, forecast, random=random)
        assert references == {} and found["x"].unequal == 5
        return found["x"].unsettled

    more = {"x": changed(8)}
    assert unsettled() == unsettled(golden=None) == unsettled(forecast=None) == (4 + 6) / 2
    assert unsettled(golden=more, forecast=more) == (8 + 8 + 4 + 6) / 4
    assert unsettled(golden=None, forecast=more) == unsettled(golden=more, forecast=None) == (8 + 4 + 6) / 3
    assert unsettled(golden={"y": expected}, forecast=more) == (8 + 4 + 6) / 3
    assert unsettled(golden={"x": torch.ones(3)}, forecast=more) == (8 + 4 + 6) / 3  # of another shape
    assert unsettled(random=[]) == 0.0
    assert unsettled(golden=None, forecast=None, random=random[:1]) == 0.0
    floats = {"x": drawn(10)}
    found, _ = measured_outputs({"x": drawn(10, seed=1)}, floats, None, None, random=[floats, floats])
    assert found["x"].unsettled == 0.0


def test_which_outputs_are_near_tied():
    whole = lambda count: compare(torch.where(torch.arange(10) < count, -1, torch.arange(10)), torch.arange(10))
    ties = {count: whole(count).__class__(**{**vars(whole(count)), "unsettled": 0.5}) for count in (0, 1, 2, 3)}
    assert [*near_tied(ties)] == [1, 2]  # a Poisson count of 0.5 reaches 2
    differs = compare(drawn(4), drawn(4) + 1)
    assert near_tied({"x": differs.__class__(**{**vars(differs), "unsettled": 9.0})}) == {}


def test_the_mark_of_a_near_tie_stands_once():
    expected = {"x": torch.arange(10)}
    actual = {"x": torch.where(torch.arange(10) < 2, -1, torch.arange(10))}
    random = [expected, actual, actual]
    verdict, _ = a_verdict(actual, expected, random=random)
    assert verdict.passed and verdict.marks == (Mark.NEAR_TIE,)
    verdict, _ = a_verdict(expected, expected, random=random)
    assert verdict.passed and verdict.marks == ()


@pytest.mark.parametrize("count", [MANY - 1, MANY])
def test_the_scatter_is_of_few_elements_alone(count):
    golden, actual, expected, *_ = ({"x": side["x"].view(-1, 3 if count % 3 == 0 else 2)} for side in sides_of(count))
    still = {"x": expected["x"]}
    random = [
        still,
        *({"x": (still["x"] + 5e-3 * drawn(*still["x"].shape, seed=seed)).float()} for seed in range(5, 9)),
    ]
    known = measured_outputs(actual, expected, golden, None, random=random)[1]["x"]
    right = scatter_of([run["x"] for run in random[1:]], still["x"])
    assert right.explains(known.cpu.rel_l2) and known.scatter == (right if count < MANY else None)
    assert measured_outputs(actual, expected, golden, None, random=random[:1])[1]["x"].scatter is None
    lacking = [still, {"y": still["x"]}, *random[1:]]
    assert measured_outputs(actual, expected, golden, None, random=lacking)[1]["x"].scatter == known.scatter


def test_a_switch_that_is_not_felt_is_marked():
    golden = drawn(2000)
    near, far = ({"x": (golden + size * drawn(2000, seed=1)).float()} for size in (1e-7, 1e-3))
    for actual, marks in ((near, (Mark.UNFELT,)), (far, ())):
        verdict, _ = a_verdict(actual, near, {"x": golden}, preset="floor", forecast=far, modes=("HF32",))
        assert verdict.marks == marks and verdict.passed


# -------- where float16 saturates


def cut_by_definition(wide, narrow, there):
    """One element: float64's, or where that is not finite the CPU's, or the device's within a last place of it."""
    if math.isfinite(wide):
        return wide
    return there if abs(there - narrow) <= abs(narrow) * 2**-10 else narrow


def test_float64_is_cut_where_float16_saturates():
    wide = torch.tensor([1.5, INF, INF, -INF, NAN, NAN, INF, -INF], dtype=torch.float64)
    narrow = torch.tensor([1.0, 65504, 65504, -65504, 3.0, NAN, 2.0, -64.0], dtype=torch.float16)
    there = torch.tensor([2.0, 65472, 65408, -65472, 3.01, 1.0, 2.01, 64.0], dtype=torch.float16)
    outputs, reasons = cut_as_float16({"x": wide}, {"x": narrow}, {"x": there}, "910A")
    right = [cut_by_definition(*item) for item in zip(wide.tolist(), narrow.tolist(), there.tolist())]
    assert outputs["x"].dtype == torch.float64
    assert str(outputs["x"].tolist()) == str(right) and reasons == []  # NaN stays
    alone, _ = cut_as_float16({"x": wide}, {"x": narrow}, {}, "910A")  # the device lacks it, or has another shape
    other, _ = cut_as_float16({"x": wide}, {"x": narrow}, {"x": there[:3]}, "910A")
    right = [item if math.isfinite(item) else cpu for item, cpu in zip(wide.tolist(), narrow.tolist())]
    assert str(alone["x"].tolist()) == str(other["x"].tolist()) == str(right)


def test_what_float16_cannot_hold_is_wrong_on_any_device():
    """From 65520 on, half a last place beyond the largest number, float16 rounds to Inf."""
    below = math.nextafter(65520.0, 0.0)
    wide = torch.tensor([below, -below, INF, NAN], dtype=torch.float64)
    narrow = torch.ones(4, dtype=torch.float16)
    assert cut_as_float16({"x": wide}, {"x": narrow}, {}, "910A")[1] == []
    wide = torch.tensor([65520.0, -65520.0, 1e9, INF], dtype=torch.float64)
    (reason,) = cut_as_float16({"x": wide}, {"x": narrow}, {}, "910A")[1]
    assert (reason.criterion, reason.found, reason.allowed, reason.output) == ("finite", 3, 0, "")
    both = {"x": wide, "y": torch.ones(4, dtype=torch.float64)}
    (reason,) = cut_as_float16(both, {"x": narrow, "y": narrow}, {}, "910A")[1]
    assert reason.output == "x" and reason.text.startswith("3 elements of the float64 result are beyond 65504")


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.tensor([1, 70000]), torch.ones(2, dtype=torch.float16)),
        (torch.tensor([INF, 7e4], dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor([INF, 7e4], dtype=torch.float64), torch.ones(3, dtype=torch.float16)),
        (torch.tensor([INF, 7e4], dtype=torch.float64), None),
    ],
    ids=["whole numbers", "bfloat16", "another shape", "no output"],
)
def test_what_is_not_in_float16_is_left(wide, narrow):
    outputs, reasons = cut_as_float16({"x": wide}, {} if narrow is None else {"x": narrow}, {}, "910A")
    assert outputs["x"] is wide and reasons == []


@pytest.mark.parametrize("saturates", ["", "910A"])
def test_outputs_are_cut_for_a_device_that_saturates_alone(saturates):
    wide = {"x": torch.cat([drawn(3000), torch.tensor([7e4, INF], dtype=torch.float64)])}
    narrow = {"x": torch.cat([wide["x"][:3000], torch.tensor([65504.0, 65504.0], dtype=torch.float64)]).half()}
    verdict, _ = a_verdict({"x": narrow["x"].clone()}, narrow, wide, preset="floor", saturates=saturates)
    cut = [str(failure) for failure in verdict.failures if "where float16 saturates on 910A" in str(failure)]
    assert len(cut) == bool(saturates)
    finite = [str(failure) for failure in verdict.failures if "not finite" in str(failure)]
    assert len(finite) == (not saturates)  # without the cut an element of float64 is Inf where the CPU's is not


def test_where_a_mask_filled_float64_its_largest_number_is_inf():
    """float64's least number in masked logits is -Inf on both sides, and hides nothing."""
    least = torch.finfo(torch.float64).min
    wide = {"x": torch.cat([drawn(8), torch.tensor([least], dtype=torch.float64)])}
    golden = {"x": wide["x"].masked_fill(wide["x"] == least, -INF)}
    narrow = {"x": golden["x"].float().masked_fill(golden["x"].isinf(), torch.finfo(torch.float32).min)}
    verdict, _ = a_verdict({"x": narrow["x"].clone()}, narrow, golden, preset="floor", wide=wide, forecast=narrow)
    assert verdict.passed, verdict.reasons
    assert verdict.comparisons["x"].inf_expected == verdict.comparisons["x"].inf_actual == 1
    assert verdict.references["x"].forecast.inf_actual == 1
    verdict, _ = a_verdict({"x": narrow["x"].clone()}, narrow, golden, preset="floor")
    assert not verdict.passed and verdict.comparisons["x"].inf_actual == 0
