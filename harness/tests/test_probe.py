"""calibrate: the measurements show what a device rounds, and the verdicts follow the rules in force."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from harness import emulator, open_device
from harness.commands import probe as probing
from harness.commands.main import main
from harness.commands.probe import (
    AGREES,
    CONTRADICTS,
    NO_RULE,
    UNMEASURED,
    Fact,
    probe,
    read_probe,
    text_of,
    verdicts_of,
)
from harness.devices import Stack, measurements
from harness.devices.measurements import MEASUREMENTS, cube_operands, measure
from harness.emulator import faults
from harness.numerics import matmul_by_groups
from harness.tests.needs import emulated_device, needs_torch_npu

CHEAP = tuple(
    measurement.name for measurement in MEASUREMENTS if measurement.name.partition(" ")[0] in ("1", "2", "3", "5", "8")
)


@pytest.fixture(scope="module")
def emulated():
    return emulated_device()


@pytest.fixture
def small(monkeypatch):
    """Every measurement, on less."""
    monkeypatch.setattr(measurements, "INNER", (64, 1024))
    monkeypatch.setattr(measurements, "_KEYS", (64, 513))
    monkeypatch.setattr(measurements, "ELEMENTS", 1 << 14)
    monkeypatch.setattr(measurements, "REPEATS", 2)
    measurements._wave.cache_clear()
    yield
    measurements._wave.cache_clear()


def strict(text):
    """JSON as the standard has it, without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def of(document, verdict):
    return {item["rule"]: item for item in document["verdicts"] if item["verdict"] == verdict}


# -------- facts from
# numbers


def rounded(number, bits, ties):
    """A number with `bits` mantissa bits, in exact arithmetic."""
    if number == 0:
        return number
    step = Fraction(2) ** (math.frexp(number)[1] - 1 - bits)
    whole, left = divmod(abs(Fraction(number)), step)
    up = {
        "away": left * 2 >= step,
        "even": left * 2 > step or (left * 2 == step and whole % 2),
        "truncated": False,
        "zero": left * 2 > step,
    }[ties]
    return math.copysign(float((whole + bool(up)) * step), number)


WORDS = {
    "away": "to nearest, ties away from zero",
    "even": "to nearest, ties to even",
    "truncated": "truncated",
    "zero": "to nearest, ties towards zero",
}


@pytest.mark.parametrize("bits", [7, 8, 10, 11, 12, 13])
@pytest.mark.parametrize("ties", WORDS)
def test_bits_and_ties_of_an_operand_are_read_off_what_comes_back(bits, ties):
    numbers = measurements._pairs(
        torch.tensor(
            [rounded(torch.tensor(operand).item(), bits, ties) for operand in cube_operands()], dtype=torch.float64
        )
    )
    facts = probing.facts_of({"1 conv operand": numbers})
    assert [facts[f"conv operand: {part}"].value for part in ("mantissa bits", "rounding", "range", "subnormals")] == [
        bits,
        WORDS[ties],
        "of float32",
        "kept",
    ]


def test_a_float16_operand_shows_its_range():
    numbers = measurements._pairs(torch.tensor(cube_operands()).half().double())
    facts = probing.facts_of({"2 product operand": numbers})
    assert facts["product operand: mantissa bits"].value == 10
    assert facts["product operand: range"].value == "70000 becomes inf, 3e38 becomes inf"
    assert facts["product operand: subnormals"].value == "flushed to zero"


def test_an_operand_that_is_not_rounded_has_no_ties():
    facts = probing.facts_of({"1 conv operand": measurements._pairs(torch.tensor(cube_operands()).double())})
    assert facts["conv operand: mantissa bits"].value == 23 and facts["conv operand: rounding"].value == "none"


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_the_order_of_a_sum_is_told_from_sums(width):
    left = torch.ones(measurements.LENGTH, measurements.LENGTH)
    for place in range(1, measurements.LENGTH):
        left[place, 0], left[place, place] = 2.0**24, -(2.0**24)
    sums = matmul_by_groups(left, torch.ones(measurements.LENGTH, 1), width)[:, 0].tolist()
    assert probing.order_of(sums) == ("one rounding a product" if width == 1 else f"one rounding for {width} products")
    assert probing.order_of([item + (place == 40) for place, item in enumerate(sums)]).startswith("none of groups")


def test_exact_sums_are_exact():
    assert probing.order_of([64.0] + [62.0] * 63) in ("exact", "one rounding for 64 products")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("to nearest, ties to even", lambda x: torch.tensor(x, dtype=torch.float64).float().item()),
        ("truncated", lambda x: math.copysign(math.floor(abs(x) / 2) * 2, x)),
        ("to nearest, ties away from zero", lambda x: math.copysign(math.floor(abs(x) / 2 + 0.5) * 2, x)),
        ("not rounded", lambda x: x),
    ],
)
def test_the_accumulators_rounding_is_told(words, rule):
    sent = [sign * item for item in measurements.ADDED for sign in (1, -1)]
    result = {str(item): rule(math.copysign(2.0**24, item) + item) - math.copysign(2.0**24, item) for item in sent}
    assert probing.accumulator_of(result) == words


@pytest.mark.parametrize(
    ("said", "measured", "agree"),
    [
        (Fact(value=22.0, within=1.0), 23.0, True),
        (Fact(value=22.0, within=1.0), 23.02, False),
        (Fact(value=22.0, within=1.0), 20.98, False),
        (Fact(value=12.2, within=0.25), 11.96, True),
        (Fact(value=12.2, within=0.25), 11.94, False),
        (Fact(value=12.2, within=0.25), 12.46, False),
        (Fact(value=0.5, within=1.0, above=True), 1.5, True),
        (Fact(value=0.5, within=1.0, above=True), 1.51, False),
        (Fact(value=2.0, within=1.0, above=True), 0.5, True),
        (Fact(value=11), 11, True),
        (Fact(value=11), 10, False),
        (Fact(value="erf"), "tanh", False),
        (Fact(value=12.2, within=0.25), "nan", False),
    ],
)
def test_a_fact_agrees_inside_its_room_and_not_outside(said, measured, agree):
    assert probing._agree(replace(said, value=measured), said) is agree


@pytest.mark.parametrize(
    ("bits", "within"), [(16.01, probing.FLOAT32_BITS), (16.0, probing.HALF_BITS), (12.7, probing.HALF_BITS)]
)
def test_float32_results_that_lose_more_than_sums_are_known_better(bits, within):
    assert probing._number(bits, None).within == within


@pytest.mark.parametrize(("far", "formula"), [(4.9e-6, "tanh"), (5.1e-6, "neither: 5.1e-06 from tanh")])
def test_a_formula_of_its_own_is_neither(far, formula):
    assert probing._formula({"to erf": 4.7e-4, "to tanh": far}).value == formula


# -------- probes and rule
# sets


def test_the_cpu_is_exact_and_has_no_rules(tmp_path):
    document = probe(open_device("cpu"), tmp_path / "cpu.json", wanted=CHEAP)
    facts = {item["rule"]: item["measured"] for item in document["verdicts"]}
    for operand in ("conv operand", "conv weight", "conv bias", "product operand", "product weight"):
        assert facts[f"{operand}: mantissa bits"] == 23 and facts[f"{operand}: range"] == "of float32"
    assert facts["gelu: formula for approximate='none'"] == "erf" and facts["half times 2 above the range"] == "inf"
    assert document["emulated"] is False and document["rules"] is None
    assert of(document, AGREES) == of(document, CONTRADICTS) == {}
    assert set(of(document, UNMEASURED)) == {
        f"{what}: {part}"
        for what in ("conv operand, allow_hf32 off", "product operand, allow_hf32 on")
        for part in ("mantissa bits", "rounding", "range", "subnormals")
    }
    assert "it has no rules for this device" in text_of(document)


def test_the_emulated_device_as_it_comes_agrees_with_every_rule(emulated, small, tmp_path):
    document = probe(emulated, tmp_path / "probe.json")
    stored = strict((tmp_path / "probe.json").read_text())
    assert (
        stored == document
        and stored["schema"] == "npu-probe/1"
        and stored["emulated"] is True
        and stored["stack"]["backend"] == "emulated"
    )
    assert set(stored["measured"]) == set(stored["seconds"]) == {measurement.name for measurement in MEASUREMENTS}
    assert not of(document, CONTRADICTS) and not of(document, UNMEASURED)
    facts = {item["rule"]: (item["says"], item["measured"]) for item in document["verdicts"]}
    assert facts["conv operand: mantissa bits"] == facts["product operand, allow_hf32 on: mantissa bits"] == (11, 11)
    assert (
        facts["conv operand, allow_hf32 off: mantissa bits"]
        == facts["product operand: mantissa bits"]
        == facts["conv bias: mantissa bits"]
        == (23, 23)
    )
    assert facts["conv operand: rounding"] == ("to nearest, ties away from zero",) * 2
    assert facts["gelu: formula for approximate='none'"] == ("tanh", "tanh")
    assert 12 < facts["patch convolution: effective bits, float32"][1] < 13.5
    assert set(of(document, NO_RULE)) == {
        rule for rule in facts if rule.startswith("order of a ") or rule.endswith("bits of the batch")
    }
    assert text_of(document).startswith(
        "EMULATED: these numbers come from the emulated CANN; they confirm nothing of an NPU."
    )


def test_with_hf32_off_the_rules_and_the_device_change_together(emulated, tmp_path):
    wanted = (*CHEAP, "10 patches")
    with measurements.switch("conv", False):
        document = probe(emulated, tmp_path / "probe.json", wanted=wanted)
    facts = {item["rule"]: (item["says"], item["measured"]) for item in document["verdicts"]}
    assert document["rules"] == "Ascend A2: convolutions float32, products float32, GELU by its tanh formula"
    assert facts["conv operand: mantissa bits"] == (23, 23) and facts["conv operand: rounding"] == ("none", "none")
    assert facts["patch convolution: effective bits, float32"][1] > 20
    assert not of(document, CONTRADICTS)


def test_a_device_that_does_not_follow_its_rules_contradicts_them(emulated, tmp_path):
    planted = [faults.parse(f"aclnn{name}:hf32") for name in ("Matmul", "Mm", "Gemm", "Addmm")]
    for fault in planted:
        faults.plant(fault)
    try:
        document = probe(emulated, tmp_path / "probe.json", wanted=(*CHEAP, "4 products"))
    finally:
        for fault in planted:
            faults.remove(fault)
    result = of(document, CONTRADICTS)
    assert set(result) >= {
        "product operand: mantissa bits",
        "product operand: rounding",
        "product weight: mantissa bits",
        "product: effective bits, float32 64",
    }
    assert all("product" in rule for rule in result)
    assert (result["product operand: mantissa bits"]["says"], result["product operand: mantissa bits"]["measured"]) == (
        23,
        11,
    )
    assert "- product operand: mantissa bits: 11 where the forecast says 23" in text_of(document)
    assert any("aclnnMatmul:hf32" in item for item in document["stack"]["faults"])


@pytest.fixture(scope="module")
def cheap(emulated, tmp_path_factory):
    return probe(emulated, tmp_path_factory.mktemp("probe") / "probe.json", wanted=CHEAP)


@pytest.mark.parametrize(
    ("changed", "rules"),
    [
        (
            {"conv_allow_hf32": False},
            {
                "conv operand: mantissa bits",
                "conv operand: rounding",
                "conv weight: mantissa bits",
                "conv weight: rounding",
            },
        ),
        (
            {"matmul_allow_hf32": True},
            {
                "product operand: mantissa bits",
                "product operand: rounding",
                "product weight: mantissa bits",
                "product weight: rounding",
            },
        ),
        ({"compatible_impl": True}, {"gelu: formula for approximate='none'"}),
    ],
)
def test_the_same_numbers_contradict_another_rule_set(cheap, changed, rules):
    stack = replace(Stack.from_dict(cheap["stack"]), **changed)
    verdicts = verdicts_of(cheap["measured"], probing.forecast_of(stack, CHEAP))
    assert {verdict.rule for verdict in verdicts if verdict.verdict == CONTRADICTS} == rules


SOC = """
import sys
from pathlib import Path
from harness.commands.probe import probe
probe("emulated", Path(sys.argv[1]), wanted=("1 conv operand", "2 product operand", "4 products", "5 gelu", "8 edges"))
"""


@needs_torch_npu
@pytest.mark.parametrize(
    ("soc", "conv", "product", "gelu", "overflow", "bfloat16"),
    [
        ("Ascend310P3", 10, 10, "tanh", "65504", UNMEASURED),
        ("Ascend950PR_9589", 10, 23, "erf", "inf", AGREES),
        ("Ascend310B4", None, None, None, None, NO_RULE),
    ],
)
def test_the_verdicts_follow_the_rules_of_the_family(tmp_path, soc, conv, product, gelu, overflow, bfloat16):
    (tmp_path / "probing.py").write_text(SOC)
    command = [
        sys.executable,
        "-m",
        "harness",
        "emulate",
        "--soc",
        soc,
        str(tmp_path / "probing.py"),
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = strict((tmp_path / "x.json").read_text())
    says = {item["rule"]: item["says"] for item in document["verdicts"]}
    assert document["emulated"] and document["stack"]["device"] == soc and (document["rules"] is None) == (conv is None)
    assert not of(document, CONTRADICTS)
    assert [says[f"{what} operand: mantissa bits"] for what in ("conv", "product")] == [conv, product]
    assert says["gelu: formula for approximate='none'"] == gelu and says["half times 2 above the range"] == overflow
    assert "product: effective bits, bfloat16 64" in of(document, bfloat16)


def test_a_card_that_saturates_contradicts_a_rule_of_inf(cheap):
    stack = Stack.from_dict(cheap["stack"])
    edges = cheap["measured"]["8 edges"] | {
        "half times 2 above the range": (65504.0).hex(),
        "half inf less inf": (0.0).hex(),
    }
    verdicts = {
        verdict.rule: verdict for verdict in verdicts_of({"8 edges": edges}, probing.forecast_of(stack, ("8 edges",)))
    }
    assert {rule for rule, verdict in verdicts.items() if verdict.verdict == CONTRADICTS} == {
        "half times 2 above the range",
        "half inf less inf",
    }
    assert (
        verdicts["half times 2 above the range"].words
        == "half times 2 above the range: 65504 where the forecast says inf"
    )


def test_a_card_that_answers_differently_contradicts(cheap):
    numbers = {
        "product": {"float32": {"answers": 2, "row alone": True}},
        "convolution": {"answers": 1, "row alone": {"raised": "RuntimeError: x"}},
    }
    verdicts = {verdict.rule: verdict.verdict for verdict in verdicts_of({"9 repeats": numbers}, {})}
    assert verdicts == {
        "product float32: different answers in 20 runs": CONTRADICTS,
        "product float32: a row alone has its bits of the batch": NO_RULE,
        "convolution: different answers in 20 runs": AGREES,
        "convolution: a row alone has its bits of the batch": UNMEASURED,
    }


# -------- what goes wrong


def test_an_operator_that_raises_is_recorded_and_the_probe_goes_on(emulated, tmp_path):
    fault = faults.parse("aclnnGelu*:error")
    faults.plant(fault)
    try:
        document = probe(emulated, tmp_path / "probe.json", wanted=("5 gelu", "8 edges"))
    finally:
        faults.remove(fault)
    assert document["stopped"] is None and set(document["measured"]) == {"5 gelu", "8 edges"}
    raised = strict((tmp_path / "probe.json").read_text())["measured"]["5 gelu"]["none"]["raised"]
    assert "Error: " in raised and "\n" not in raised
    verdict = of(document, UNMEASURED)["gelu: formula for approximate='none'"]
    assert verdict["measured"] is None and raised in verdict["words"]
    assert "half times 2 above the range" in of(document, AGREES)


def test_a_dtype_that_a_card_lacks_is_not_measured_and_the_others_are(emulated, monkeypatch):
    real = measurements._factors

    def refusing(dtype, inner):
        if dtype == torch.bfloat16:
            raise RuntimeError("aclnnMatmul failed, 161002: tensor self not implemented for DT_BFLOAT16")
        return real(dtype, inner)

    monkeypatch.setattr(measurements, "_factors", refusing)
    result = measure(torch.device("cpu"), ("4 products",))
    facts = probing.facts_of(result["measured"])
    assert (
        "DT_BFLOAT16" in facts["product: effective bits, bfloat16 64"].lacks
        and facts["product: effective bits, float16 64"].value > 11
    )
    assert result["stopped"] is None


def test_a_device_that_stops_is_said_and_asked_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(measurements, "computes", lambda device: False)
    broken = tuple(
        replace(measurement, take=lambda device: 1 / 0) if measurement.name == "5 gelu" else measurement
        for measurement in MEASUREMENTS
    )
    monkeypatch.setattr(measurements, "MEASUREMENTS", broken)
    document = probe(open_device("cpu"), tmp_path / "probe.json", wanted=("3 sums", "5 gelu", "8 edges"))
    assert document["stopped"] == "5 gelu" and list(document["measured"]) == ["3 sums", "5 gelu"]
    assert "The device stopped computing at 5 gelu" in text_of(document)


def test_a_device_computes_where_it_answers_to_new_numbers(monkeypatch):
    assert measurements.computes(torch.device("cpu")) is True
    asked = []
    monkeypatch.setattr(
        measurements.random.SystemRandom, "randrange", lambda self, top: asked.append(top) or len(asked)
    )
    assert measurements.computes(torch.device("cpu")) and len(asked) == 8
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert measurements.computes(torch.device("cpu")) is False


def test_numbers_that_are_not_finite_are_words():
    assert strict(json.dumps(measurements.plain({"a": [math.nan, -math.inf, 1.5, True, None]}))) == {
        "a": ["nan", "-inf", 1.5, True, None]
    }
    facts = probing.facts_of({"10 patches": {"float32": "nan", "float16": 12.2, "bfloat16": 9.2}})
    assert facts["patch convolution: effective bits, float32"].value == "nan"


# -------- file and commands


@needs_torch_npu
def test_the_file_of_measurements_runs_alone(tmp_path, monkeypatch):
    """As its owner would run it: one file, torch beside it, nothing of the harness."""
    alone = tmp_path / "measurements.py"
    alone.write_text(Path(measurements.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    code = (
        "import sys, measurements\n"
        "measurements.MEASUREMENTS = measurements.MEASUREMENTS[:2]\n"
        "measurements.main('cpu')\n"
        "assert not [name for name in sys.modules if name.startswith('harness')]\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "probe.json").write_text(done.stdout)
    strict(done.stdout)
    document = read_probe(tmp_path / "probe.json")
    assert document["emulated"] is False and document["stack"]["torch"] == str(torch.__version__)
    assert {item["rule"]: item["measured"] for item in document["verdicts"]}["conv operand: mantissa bits"] == 23


def test_measurements_that_run_alone_over_the_emulated_cann_say_so(emulated):
    assert emulator.installed()
    stack = measurements.stack_of(torch.device("npu:0"))
    read = Stack.from_dict(stack)
    whole = emulated.stack
    assert read.backend == "emulated" and read.device == whole.device
    for name in set(stack) - {"python", "torch", "device", "backend", "cann"}:
        assert getattr(read, name) == getattr(whole, name), name


@pytest.mark.parametrize(
    ("command", "write", "read"), [("calibrate", "--output", "--read"), ("doctor", "--probe", "--read-probe")]
)
def test_a_probe_is_written_and_read_again(monkeypatch, tmp_path, capsys, command, write, read):
    monkeypatch.setattr(measurements, "MEASUREMENTS", MEASUREMENTS[4:5])
    path = tmp_path / "probe.json"
    assert main([command, "--device", "cpu", write, str(path)]) == 0
    out, err = capsys.readouterr()
    assert "product operand: mantissa bits" in out and f"written to {path}" in out and "2 product operand" in err
    assert main([command, read, str(path)]) == 0
    assert "product operand: mantissa bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no probe (JSONDecodeError"),
        ('{"schema": "npu-probe/9", "measured": {}}', "is of schema npu-probe/9 where npu-probe/1 was expected"),
        ("[]", "is no probe"),
        ('{"schema": "npu-probe/1"}', "is no probe (KeyError"),
    ],
)
def test_a_file_that_is_no_probe_is_refused_on_one_line(tmp_path, capsys, text, words):
    (tmp_path / "x.json").write_text(text)
    assert main(["doctor", "--read-probe", str(tmp_path / "x.json")]) != 0
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probing, "measure", lambda *words, **more: pytest.fail("it was measured"))
    for place in (tmp_path, tmp_path / "missing" / "probe.json"):
        assert main(["doctor", "--device", "cpu", "--probe", str(place)]) != 0
        assert "cannot be written" in capsys.readouterr().err
