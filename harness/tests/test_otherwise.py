"""A vector unit that computes otherwise, against restatements in numpy and float64; what of it a forecast takes."""

import math

import numpy
import pytest
import torch
from torch.nn import functional as F

from harness import numerics
from harness.errors import RunError
from harness.judging.verdict import Reason, Verdict
from harness.measure import compare
from harness.numerics import Vector, effective_bits
from harness.numerics.expected_error import ASSUMPTIONS, Rules, alternatives, rounding
from harness.numerics.otherwise import _off
from harness.run.assumptions import assumption_of
from harness.run.cpu import _stated
from harness.tests.operators.conftest import seeded


def by(vector, function, *args, **options):
    """A function's result on the CPU whose vector unit computes so."""
    with torch.no_grad(), rounding(Rules(vector=vector, gelu_tanh=False)):
        return function(*args, **options)


def test_by_default_nothing_is_computed_otherwise():
    assert Vector().operators == frozenset()
    x = seeded(8, 32)
    for function in (
        F.gelu,
        F.silu,
        torch.exp,
        lambda x: x.softmax(-1),
        lambda x: F.layer_norm(x, (32,)),
        lambda x: x.mean(-1),
    ):
        with rounding(Rules(gelu_tanh=False)):
            assert torch.equal(by(Vector(), function, x), function(x))


@pytest.mark.parametrize("settings", [{"order": "upwards"}, {"places": -1}, {"half_places": -1}, {"tile": -1}], ids=str)
def test_a_vector_unit_that_there_is_not_is_refused(settings):
    with pytest.raises(ValueError):
        Vector(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("places", [1, 2])
def test_numbers_are_off_by_so_many_last_places_and_no_more(dtype, places):
    x = seeded(4096).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    moved = _off(x, places, False).view(bits).long() - x.view(bits).long()
    assert moved.unique().tolist() == list(range(-places, places + 1))
    assert abs(float(moved.double().mean())) < 0.1 * places  # neither way more than the other
    assert torch.equal(_off(x, places, False), _off(x.clone(), places, False))  # a function of the number
    assert (_off(x, places, True).view(bits).long() - x.view(bits).long()).unique().tolist() == [places]
    special = torch.tensor([0.0, math.inf, -math.inf], dtype=dtype)
    assert torch.equal(_off(special, places, True), special) and _off(special * 0, places, True).isnan().sum() == 2
    largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    assert torch.equal(_off(largest, 1, True), largest)


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "log": lambda x: x.abs().log(),
    "cube": lambda x: x.pow(3),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (8, 16)),
    "group norm": lambda x: F.group_norm(x, 4),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_off_by_last_places_lose_a_bit_or_two(name):
    function, x = FUNCTIONS[name], seeded(2, 4, 8, 16)
    exact = function(x.double())
    near, off, up = (by(vector, function, x) for vector in (Vector(), Vector(places=2), Vector(places=2, upwards=True)))
    assert not torch.equal(off, near) and effective_bits(near, exact) > 22.5
    hides = 0.5 if name in ("gelu", "silu", "attention") else -0.2  # what follows the function loses as much as it
    assert 20 < effective_bits(off, exact) < effective_bits(near, exact) + hides
    assert 20 < effective_bits(up, exact) < effective_bits(near, exact) + hides
    half = by(Vector(places=2), function, x.half())
    assert (
        half.dtype == torch.float16 and effective_bits(half, function(x.half().double())) > 10.5
    )  # one rounding hides it


@pytest.mark.parametrize(
    "name", ["gelu", "gelu by tanh", "silu", "exp", "tanh", "sigmoid", "rsqrt", "softmax", "attention"]
)
def test_functions_computed_in_half_lose_more_than_one_rounding(name):
    function, x = FUNCTIONS[name], seeded(2, 4, 8, 16).half()
    exact = function(x.double())
    plain, half, off = (
        effective_bits(by(item, function, x), exact)
        for item in (Vector(), Vector(half=True), Vector(half=True, half_places=1))
    )
    assert 8 < off < half <= plain
    for dtype in (torch.float32, torch.bfloat16):  # those have no such instructions
        wide = x.to(dtype)
        bits = effective_bits(by(Vector(half=True), function, wide), function(wide.double()))
        assert bits > (22 if dtype == torch.float32 else 8)


def one_by_one(row):
    total = numpy.float32(0)
    for item in row:
        total = numpy.float32(total + item)
    return total


def in_lanes(row):
    lanes = [one_by_one(row[lane::64]) for lane in range(64)]
    while len(lanes) > 1:
        lanes = [numpy.float32(left + right) for left, right in zip(lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :])]
    return lanes[0]


@pytest.mark.parametrize(("order", "restated"), [("one by one", one_by_one), ("lanes", in_lanes)])
@pytest.mark.parametrize("width", [24, 64, 200])
def test_sums_go_in_the_order_that_they_are_said_to(order, restated, width):
    x = seeded(3, width)
    wanted = [restated(row.numpy()) / numpy.float32(width) for row in x]
    result = by(Vector(order=order), lambda x: x.mean(-1), x)
    assert result.tolist() == [float(item) for item in wanted]
    assert torch.equal(by(Vector(order=order), lambda x: x.mean((0, 1), keepdim=True), x[:1]), result[:1, None])
    both = by(Vector(order=order), torch.mean, x)
    assert both.dim() == 0 and abs(float(both) - float(x.double().mean())) < 1e-6


@pytest.mark.parametrize(
    "vector", [Vector(order="lanes"), Vector(order="one by one"), Vector(one_pass=True)], ids=["lanes", "one", "pass"]
)
def test_norms_by_other_sums_are_norms(vector):
    x, weight, bias = seeded(5, 96) + 3, seeded(96, seed=1), seeded(96, seed=2)
    exact = F.layer_norm(x.double(), (96,), weight.double(), bias.double())
    assert effective_bits(by(vector, F.layer_norm, x, (96,), weight, bias), exact) > 19.5
    picture = seeded(2, 8, 3, 5)
    exact = F.group_norm(picture.double(), 4, weight[:8].double(), bias[:8].double())
    assert effective_bits(by(vector, F.group_norm, picture, 4, weight[:8], bias[:8]), exact) > 20.5


def test_a_variance_in_one_pass_loses_what_a_large_mean_hides():
    x = seeded(4, 64) + 1000
    exact = F.layer_norm(x.double(), (64,))
    result = [
        effective_bits(by(vector, F.layer_norm, x, (64,)), exact)
        for vector in (Vector(order="lanes"), Vector(order="lanes", one_pass=True))
    ]
    assert result[1] < result[0] - 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_softmax_in_tiles_is_a_softmax(dtype):
    q = seeded(2, 3, 21, 16).to(dtype)
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    mask[3] = False  # a row that sees nothing
    hidden = ~mask
    whole = numerics.attention(q, q, q, scale=0.25, hidden=hidden)[0]
    tiles = Vector(tile=8).unit(dtype).attention(q, q, q, scale=0.25, hidden=hidden)
    assert effective_bits(tiles, whole) > {torch.float32: 21, torch.float16: 9.5, torch.bfloat16: 6.5}[dtype]
    assert not tiles[:, :, 3].any() and tiles.dtype == dtype
    twice = torch.cat([q[:, :1], q[:, :1]], 1)  # two heads that share one of k and v
    shared = Vector(tile=8).unit(dtype).attention(twice, q[:, :1], q[:, :1], scale=0.25)
    assert torch.equal(shared[:, 0], shared[:, 1])
    scores = seeded(4, 21).to(dtype)
    assert torch.allclose(
        by(Vector(tile=8), torch.softmax, scores, -1).double(),
        scores.double().softmax(-1),
        atol=2 ** -{torch.float32: 22}.get(dtype, 8),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ties_of_half_results_go_away_from_zero(dtype):
    step = torch.finfo(dtype).eps
    one, half = torch.tensor([1.0, -1.0], dtype=dtype), torch.tensor([step / 2, -step / 2], dtype=dtype)
    assert torch.equal(one + half, one)
    assert torch.equal(by(Vector(ties_away=True), torch.add, one, half), one * (1 + step))
    assert torch.equal(by(Vector(ties_away=True), torch.add, one, 1), torch.tensor([2.0, 0.0], dtype=dtype))
    assert torch.equal(by(Vector(ties_away=True), torch.sub, one, half, alpha=-1), one * (1 + step))
    assert torch.equal(by(Vector(ties_away=True), torch.add, one.float(), half.float()), one.float() + half.float())


def test_an_assumption_is_tried_where_it_matters():
    rules = Rules()
    assert [len(list(alternatives(rules, dtype))) for dtype in ("float32", "float16", "bfloat16")] == [
        sum(not assumption.half_alone and not assumption.float16_alone for assumption in ASSUMPTIONS),
        len(ASSUMPTIONS),
        sum(not assumption.float16_alone for assumption in ASSUMPTIONS),
    ]
    for what, other in alternatives(rules, "float16"):
        assert what and other != rules and list(alternatives(other, "float16")) != list(alternatives(rules, "float16"))


def test_the_key_of_a_stored_reference_tells_vector_units_apart():
    plain, other = _stated(Rules()), _stated(Rules(vector=Vector(ties_away=True)))
    assert "vector" not in plain and other["vector"]["ties_away"] is True  # a store of before stays readable
    assert {name: item for name, item in other.items() if name != "vector"} == plain


def test_the_assumption_that_lets_a_row_pass_is_named_and_one_that_cannot_be_computed_is_not():
    known = list(alternatives(Rules(), "float16"))
    passing = Verdict(comparisons={"output": compare(torch.ones(2), torch.ones(2))})
    failing = Verdict(failures=(Reason(criterion="gain_ratio", text="too much"),))

    def forecast(rules):
        if rules == known[0][1]:
            raise RunError("no such operator")
        return rules

    assert passing.passed and not failing.passed
    assert assumption_of(lambda rules: passing, forecast, Rules(), "float16") == known[1][0]
    assert (
        assumption_of(lambda rules: passing if rules == known[-1][1] else failing, forecast, Rules(), "float16")
        == known[-1][0]
    )
    assert assumption_of(lambda rules: failing, forecast, Rules(), "float16") == ""
