"""A part of an output that is small beside the rest is measured by its own size."""

import json
import math

import pytest
import torch

from harness.judging.checks import judge
from harness.judging.references import slack
from harness.judging.tolerance import Tolerance
from harness.measure import worst_slices
from harness.report.rejudge import judged_again
from harness.report.rows import Row
from harness.run.comparisons import measured_outputs
from harness.tests.needs import compiled_and_by_torch  # noqa: F401  each test runs both ways


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(actual, golden, healthy):
    """The relative error of every part, a part at a time: the worst one and its place, by kind."""
    parts = {"row": {}, "block": {}, "values": {}}
    shape = golden.shape
    for row in torch.cartesian_prod(*(torch.arange(size) for size in shape[:-1])).reshape(-1, len(shape) - 1).tolist():
        parts["row"][f"row {tuple(row)}"] = tuple(row)
        if shape[-1] >= 1024 and golden.numel() > shape[-1]:
            width = shape[-1] // 16
            for block in range(16):
                parts["block"][f"block {block} of 16 of row {tuple(row)}"] = (
                    *row,
                    slice(block * width, (block + 1) * width),
                )
    for axis, size in enumerate(shape):
        if len(shape) == 2 and axis == 0:
            continue
        parts[f"axis {axis}"] = {
            f"index {index} of axis {axis}": (slice(None),) * axis + (index,) for index in range(size)
        }
    for exponent in range(-40, 40):
        inside = (golden.abs() >= 2.0 ** (exponent - 1)) & (golden.abs() < 2.0**exponent)
        if int(inside.sum()) >= 64:
            parts["values"][f"values between 2^{exponent - 1} and 2^{exponent}"] = inside
    result = {}
    for places in parts.values():
        places = {
            name: place
            for name, place in places.items()
            if golden[place].numel() >= 8 and float(golden[place].norm()) > 0
        }
        if len(places) < 2:
            continue
        errors = {
            name: float((actual[place] - golden[place]).norm() / golden[place].norm()) for name, place in places.items()
        }
        sound = max(
            float((run[place] - golden[place]).norm() / golden[place].norm())
            for place in places.values()
            for run in healthy
        )
        worst = max(errors, key=errors.get)
        result[worst] = (errors[worst], sound, golden[places[worst]].numel())
    return result


@pytest.mark.parametrize(
    "shape", [(6, 33), (2, 3, 40), (4, 5, 7, 9), (3, 1, 16), (2, 1600), (40, 8), (8, 40, 2), (1, 64)]
)
def test_the_fast_way_finds_what_the_slow_one_does(shape):
    scales = torch.logspace(-3, 3, shape[1], dtype=torch.float64).reshape(-1, *(1,) * (len(shape) - 2))
    golden = drawn(*shape) * scales
    actual, healthy = (
        golden * (1 + 1e-3 * drawn(*shape, seed=1)),
        [golden + 1e-6 * drawn(*shape, seed=2), golden * (1 + 1e-4)],
    )
    result = {
        worst_slice_.where: (worst_slice_.error, worst_slice_.healthy, worst_slice_.count)
        for worst_slice_ in worst_slices(actual, golden, healthy)
    }
    expected = slow(actual, golden, healthy)
    assert result.keys() == expected.keys()
    assert bool(result) is (shape != (1, 64))
    for name, numbers in expected.items():
        assert result[name] == pytest.approx(numbers, rel=1e-9)


@pytest.mark.parametrize(
    "change", [lambda y: y.t(), lambda y: y[:, ::2], lambda y: y.t()[::3]], ids=["transposed", "strided", "both"]
)
def test_strides_change_nothing(change):
    golden = drawn(40, 60)
    sides = [
        change(item) for item in (golden + 1e-3 * drawn(40, 60, seed=1), golden, golden + 1e-4 * drawn(40, 60, seed=2))
    ]
    strided, plain = ((item[0], item[1], [item[2]]) for item in (sides, [side.contiguous() for side in sides]))
    assert worst_slices(*strided) == worst_slices(*plain)


def test_chunks_change_nothing(monkeypatch):
    golden = drawn(3, 50, 40)
    actual, healthy = golden + 1e-3 * drawn(3, 50, 40, seed=1), [golden + 1e-4 * drawn(3, 50, 40, seed=2)]
    whole = worst_slices(actual, golden, healthy)
    monkeypatch.setattr("harness.measure.slices.CHUNK", 130)
    for few, all_ in zip(worst_slices(actual, golden, healthy), whole, strict=True):
        assert (few.where, few.count) == (all_.where, all_.count)
        assert (few.error, few.healthy) == pytest.approx((all_.error, all_.healthy), rel=1e-12)


@pytest.mark.parametrize(
    "golden",
    [
        torch.tensor(1.0),
        drawn(7),
        drawn(1, 9),
        torch.zeros(8, 64),
        torch.ones(0, 4),
        drawn(4, 4) * 1j,
        torch.full((8, 64), math.nan),
    ],
    ids=["scalar", "few", "one row", "zeros", "empty", "complex", "NaN"],
)
def test_what_has_no_parts_gives_none(golden):
    assert worst_slices(golden, golden, [golden]) == ()
    assert worst_slices(golden, golden, []) == ()


def test_tensors_of_different_shapes_have_no_parts():
    golden = drawn(8, 64)
    assert worst_slices(golden[:, :32], golden, [golden]) == () == worst_slices(golden, golden, [golden, golden[:4]])


@pytest.mark.parametrize("error", [1.0, 4.0, 1e6])
def test_a_part_that_is_zero_is_left_out_however_large_what_stands_there(error):
    golden = drawn(9, 16)
    golden[4] = 0.0
    actual, healthy = golden + 1e-3, golden + 1e-6
    actual[4], healthy[4] = error, error
    for result in worst_slices(actual, golden, [healthy]):
        assert result.where != "row (4,)" and math.isfinite(result.error) and math.isfinite(result.healthy)
    (row,) = [
        worst_slice_ for worst_slice_ in worst_slices(actual, golden, [healthy]) if worst_slice_.where.startswith("row")
    ]
    others = [place for place in range(9) if place != 4]
    assert row.error == pytest.approx(max(float(1e-3 * 4 / golden[place].norm()) for place in others), rel=1e-6)


def test_what_is_not_finite_is_left_out():
    golden = drawn(8, 64)
    actual, healthy = golden + 1e-3, golden + 1e-4
    plain = worst_slices(actual, golden, [healthy])
    for bad in (math.nan, math.inf):
        broken = actual.clone()
        broken[0, 3] = bad
        parts = worst_slices(broken, golden, [healthy])
        assert all(math.isfinite(part.error) for part in parts) and len(parts) == len(plain)


# -------- as judged


def judged(actual, golden, healthy, **limits):
    tolerance = Tolerance(preset="floor", **limits, **({"reason": "a test"} if limits else {}))
    dtype = torch.float32
    golden, sides = golden.double(), [tensor.to(dtype) for tensor in (actual, healthy)]
    comparisons, references = measured_outputs({"output": sides[0]}, {"output": sides[1]}, {"output": golden}, None)
    return judge(comparisons, tolerance, references=references)


def criteria(verdict):
    return {failure.criterion for failure in verdict.failures}


def fields():
    """Pressure, two winds and humidity, as a weather model returns them, and a sound run in roundings of 2^-9."""
    scale = torch.tensor([1e5, 10.0, 10.0, 5e-3], dtype=torch.float64).reshape(4, 1, 1)
    golden = drawn(2, 4, 32, 64) * scale
    return (
        golden,
        golden * (1 + 2**-9 * drawn(2, 4, 32, 64, seed=1)),
        golden * (1 + 2**-9 * drawn(2, 4, 32, 64, seed=2)),
    )


def test_a_field_that_is_small_beside_another_is_judged_by_its_own_size():
    golden, healthy, sound = fields()
    assert judged(sound, golden, healthy).passed
    swapped = sound[:, [0, 2, 1, 3]]
    verdict = judged(swapped, golden, healthy)
    assert criteria(verdict) == {"slice_ratio"}
    assert "slice_ratio" in str(verdict.failures[0]) and "of its own norm" in str(verdict.failures[0])
    dry = sound.clone()
    dry[:, 3] = 0
    (reason,) = judged(dry, golden, healthy).failures
    assert "at row" in reason.text or "at index 3 of axis 1" in reason.text
    assert judged(dry, golden, healthy, slice_ratio=1e4).passed


def test_the_scores_of_a_detector_beside_its_boxes():
    scale = torch.tensor([640.0, 640, 640, 640, 1.0], dtype=torch.float64)
    golden = drawn(300, 5).abs() * scale
    rounded = [golden * (1 + 2**-9 * drawn(300, 5, seed=seed)) for seed in (1, 2)]
    assert judged(rounded[0], golden, rounded[1]).passed
    lower = rounded[0].clone()
    lower[:, 4] *= 0.9
    (reason,) = judged(lower, golden, rounded[1]).failures
    assert reason.criterion == "slice_ratio" and "at index 4 of axis 1" in reason.text


def test_a_quiet_sample_a_quiet_stretch_and_small_probabilities():
    quiet = drawn(8, 2048)
    quiet[5] *= 1e-4
    wave = drawn(2, 1, 8192)
    wave[..., 4096:] *= 1e-3
    softmax = (6 * drawn(16, 1000)).softmax(-1)
    for golden, wrong in (
        (quiet, lambda y: torch.cat([y[:5], -y[5:6], y[6:]])),
        (wave, lambda y: torch.cat([y[..., :4096], y[..., 4096:] * 0], -1)),
        (softmax, lambda y: torch.where(y < y.amax(-1, keepdim=True) * 1e-3, torch.zeros_like(y), y)),
    ):
        healthy, sound = (golden * (1 + 2**-9 * drawn(*golden.shape, seed=seed)) for seed in (1, 2))
        assert judged(sound, golden, healthy).passed
        verdict = judged(wrong(sound), golden, healthy)
        assert "slice_ratio" in criteria(verdict), golden.shape


@pytest.mark.parametrize("count", [9, 100, 1024])
def test_the_limit_of_a_part_has_two_sides(count):
    """1.5 times what `slack` allows so many elements; a NaN fails."""
    golden = drawn(40, count)
    error = drawn(40, count, seed=1)
    error *= golden.norm(dim=1, keepdim=True) / error.norm(dim=1, keepdim=True)
    healthy = golden + 1e-3 * error
    for times, passes in ((0.98, True), (1.02, False)):
        actual = healthy.clone()
        actual[7] = golden[7] + 1e-3 * times * 1.5 * slack(count) * error[7]
        verdict = judged(actual, golden, healthy)
        assert ("slice_ratio" not in criteria(verdict)) is passes, (times, verdict.failures)
        if not passes:
            assert any(
                "at row (7,)" in failure.text for failure in verdict.failures if failure.criterion == "slice_ratio"
            )


def test_a_healthy_run_that_loses_a_part_excuses_the_same_loss_in_another():
    """As where a router sends another token to another expert: healthy runs do it too, and it is not known to which."""
    golden = drawn(64, 64)
    healthy, sound = golden + 1e-6 * drawn(64, 64, seed=1), golden + 1e-6 * drawn(64, 64, seed=2)
    healthy[12], sound[40] = drawn(64, seed=3), drawn(64, seed=4)
    assert "slice_ratio" not in criteria(judged(sound, golden, healthy))
    assert "slice_ratio" in criteria(judged(sound, golden, golden + 1e-6 * drawn(64, 64, seed=1)))


def test_a_stored_row_that_fails_by_a_part_alone_fails_when_it_is_judged_again():
    golden = (
        torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).double()
        * torch.tensor([1e5, 10.0, 1e-2])[:, None]
    )
    cpu, actual = golden * (1 + 1e-7), golden * (1 + 1e-7)
    actual[:, 2] *= 1.1
    comparisons, references = measured_outputs({"x": actual.float()}, {"x": cpu.float()}, {"x": golden}, None)
    verdict = judge(comparisons, Tolerance(preset="floor"), references=references)
    assert "slice_ratio" in [failure.criterion for failure in verdict.failures]
    row = Row.of(verdict, test="t", case="weather", dtype="float32", seed=0)
    read = Row.from_dict(json.loads(json.dumps(row.to_dict())))
    assert read.references == references
    assert [failure.text for failure in judged_again(read).failures] == [failure.text for failure in verdict.failures]
