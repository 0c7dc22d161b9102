"""The criteria themselves: what `floor` promises to catch it catches, and what is only another rounding it lets pass.

The whole matrix is `python -m harness.conformance detection`; here two of its models.
"""

import math

import pytest

from harness.conformance import floor
from harness.conformance.detection import SUBJECTS, Trial, Bench, _called, _planted, matrix, text
from harness.devices import open_device
from harness.models.aimv2 import AIMv2Config
from harness.tests.needs import needs_torch_npu, skip_without_torch_npu


@pytest.fixture(scope="module", params=[("causal", "float32"), ("convolutional", "bfloat16")], ids=" ".join)
def trials(request):
    skip_without_torch_npu()
    name, dtype = request.param
    return matrix([name], [dtype], seeds=2)


def test_the_floor_catches_every_fault_above_its_size(trials):
    promised = [each for each in trials if each.promised]
    assert len(promised) > 30 and len({each.kind for each in promised}) >= 10
    assert [each for each in promised if "floor" not in each.alarms] == []


def test_the_floor_raises_no_alarm_on_what_is_only_another_rounding(trials):
    sound = [each for each in trials if each.kind == "benign"]
    assert len(sound) == 20
    assert [each for each in sound if each.alarms & {"floor", "sharp"}] == []


def test_the_other_presets_miss_faults_or_alarm_on_what_is_sound(trials):
    promised = [each for each in trials if each.promised]
    sound = [each for each in trials if each.kind == "benign"]
    if trials[0].dtype == "float32":
        for preset in ("card", "dynamo"):
            assert any(preset not in each.alarms for each in promised), preset
    else:
        for preset in ("card", "cann", "close"):
            assert all(preset in each.alarms for each in sound), preset


@needs_torch_npu
def test_a_fault_below_the_noise_of_hf32_is_seen_by_the_sharp_preset_alone():
    """The patch embedding's HF32 hides a scale error of 1e-5 in a norm; its rounding is known element by element, and hides nothing."""
    bench = Bench(next(each for each in SUBJECTS if each.name == "aimv2"), "float32", open_device("emulated"))
    names = _called(bench)
    position = len(names) // 2 + names[len(names) // 2 :].index("aclnnMatmul")
    found = _planted(bench, names, position, "scale", {"by": 1.0001}, "middle")
    assert found is not None and not found.promised
    assert "sharp" in found.alarms and "floor" not in found.alarms and "card" not in found.alarms


def test_the_report_counts_what_it_was_given():
    given = dict(subject="m", dtype="float32", place="late", size=3.0)
    trials = [
        Trial(what="a scale", kind="scale", damage=9.0, alarms=frozenset({"floor", "close"}), **given),
        Trial(what="b scale", kind="scale", damage=9.0, alarms=frozenset(), **given),
        Trial(what="c scale", kind="scale", damage=1.0, alarms=frozenset({"floor"}), **given),
        Trial(what="rerun", kind="benign", damage=math.nan, alarms=frozenset({"cann"}), **given),
    ]
    said = text(trials)
    assert "3 faults planted, 2 above the size" in said and "1 benign changes" in said
    assert "| floor | 1 of 2 | 1 of 1 | 0 of 1 |" in said and "| cann | 0 of 2 | 0 of 1 | 1 of 1 |" in said
    assert "| m | float32 | b scale | late | 9 |  |" in said and "| m | float32 | rerun (1) | cann |" in said


@needs_torch_npu
def test_the_forecast_says_what_the_device_loses_under_every_switch():
    device = open_device("emulated")
    found = list(floor.measured(device, AIMv2Config(width=128, depth=6, heads=4, hidden=352, image_size=56), seeds=(1, 2)))
    errors = {}
    for each in found:
        held = each.verdict.references["output"]
        assert each.verdict.passed and 0.5 < held.golden.rel_l2 / held.forecast.rel_l2 < 2, each
        errors[each.mode] = held.golden.rel_l2
    assert errors["float32, no HF32"] < errors["float32, HF32 convolutions"] / 5 < errors["float32, HF32 throughout"] / 5
    assert errors["float32, HF32 throughout"] < errors["float16"] < errors["bfloat16"]
    assert "| bfloat16 | 2 |" in floor.text(found, device)
