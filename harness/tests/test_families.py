"""SoC families: what each can do, by its names; and each played by the emulated CANN, in a process of its own."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from harness.devices import Device, Stack, family_of, lacks, unknown_rounding
from harness.devices.families import FAMILIES, UNKNOWN
from harness.judging.presets import MERE
from harness.judging.tolerance import Tolerance, without_forecast
from harness.numerics import NoFloat32, Operands, cube_type, effective_bits, matmul, round_hf32
from harness.numerics.expected_error import Rules, overflow_of, rounding, rules_of
from harness.tests.needs import needs_torch_npu

NAMES = {  # torch_npu's enum, NpuVariables.cpp
    "A2": "Ascend910B1 Ascend910B2 Ascend910B2C Ascend910B3 Ascend910B4 Ascend910B4-1",
    "A3": "Ascend910_9391 Ascend910_9392 Ascend910_9381 Ascend910_9382 Ascend910_9372 Ascend910_9362 Ascend910_9363",
    "910A": "Ascend910PremiumA Ascend910ProA Ascend910A Ascend910ProB Ascend910B",
    "310P": "Ascend310P1 Ascend310P2 Ascend310P3 Ascend310P4 Ascend310P5 Ascend310P7",
    "310B": "Ascend310B1 Ascend310B2 Ascend310B3 Ascend310B4",
    "950": "Ascend950 Ascend950PR_9579 Ascend950DT_9591",
    "unknown": "Ascend1000 Ascend910 Ascend910C ascend910b4 Ascend310 910B4",
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in NAMES.items() for name in names.split()]
)
def test_a_name_says_its_family(family, name):
    assert family_of(name).name == family


def test_what_a_family_computes_in_as_it_comes():
    result = {
        family.name: (
            family.products,
            family.convolutions,
            family.saturates,
            family.bfloat16,
            family.gelu_tanh,
            family.fused_attention,
        )
        for family in FAMILIES
    }
    a2 = ("float32", "HF32", False, True, True, True)
    half = ("float16", "float16", True, False, True, False)
    assert result["A2"] == result["A3"] == a2 and result["910A"] == result["310P"] == half
    assert result["950"] == ("float32", "HF32 of 10 bits", False, True, False, True)
    assert result["310B"][:2] == (None, None) and UNKNOWN.products is None
    assert all(family.sources for family in FAMILIES), "what is said of a family is said with its source"


def stack(name="Ascend910B4", backend="npu", **more):
    return Stack(device=name, backend=backend, **more)


def test_rules_go_by_the_family_and_its_switches():
    assert (
        str(rules_of(stack("Ascend310P3")))
        == "Ascend 310P: convolutions in float16, products in float16, GELU by its tanh formula, float16 saturates"
    )
    assert (
        str(rules_of(stack("Ascend950PR_9579")))
        == "Ascend 950: convolutions in HF32 of 10 bits, products float32, GELU as it is asked for"
    )
    assert rules_of(stack("Ascend310B4")) is None and rules_of(stack("Ascend1000")) is None
    assert rules_of(stack("Ascend950")).modes == ("HF32",)  # of whatever width
    switched = [  # the stack's fields, what products and convolutions then run in
        (dict(cube_math_type=0, matmul_allow_hf32=True), "float32", "HF32"),
        (dict(cube_math_type=1), "HF32", "HF32"),
        (dict(cube_math_type=2), "float16", "HF32"),
        (dict(cube_math_type=3), "HF32", "HF32"),
        (dict(cube_math_type=4, matmul_allow_hf32=True), "float32", "HF32"),
        (dict(cube_math_type=9, matmul_allow_hf32=True), "HF32", "HF32"),  # torch_npu passes no other number through
        (dict(precision_mode="allow_fp32_to_fp16"), "float16", "HF32"),
        (dict(precision_mode="allow_fp32_to_fp16", conv_allow_hf32=False, matmul_allow_hf32=True), "HF32", "float16"),
        (dict(precision_mode="must_keep_origin_dtype"), "float32", "HF32"),
    ]
    for fields, products, convolutions in switched:
        rules = rules_of(stack(**fields))
        assert (rules.matmul, rules.conv) == (products, convolutions), fields


def test_the_mode_of_overflow_is_what_the_stack_says_else_the_familys():
    assert not rules_of(stack()).saturates and rules_of(stack(inf_nan_mode=False)).saturates
    assert rules_of(stack("Ascend310P3")).saturates and not rules_of(stack("Ascend310P3", inf_nan_mode=True)).saturates
    assert overflow_of(stack("Ascend310B4"), torch.float16) is not None, "known even where the rounding is not"
    assert overflow_of(stack("Ascend310P3"), torch.float32) is overflow_of(stack(), torch.float16) is None
    assert overflow_of(stack("NVIDIA", backend="cuda"), torch.float16) is None
    x = torch.tensor([300.0, 1.0, math.nan]).half()
    with rounding(overflow_of(stack("Ascend310P3"), torch.float16)):
        assert (x * 400).tolist() == [65504.0, 400.0, 0.0]
    assert (x * 400)[0] == math.inf


def test_where_float64_is_not_finite_the_cpu_is_the_reference_to_a_last_place():
    from harness.run.comparisons import cut_as_float16

    golden = {"y": torch.tensor([math.inf, math.inf, 65519.0, 65520.0]).double()}
    expected = {"y": torch.tensor([256.0, 256.0, 65504.0, 65504.0]).half()}
    actual = {"y": torch.tensor([256.25, 256.5, 65504.0, 65504.0]).half()}
    held, reasons = cut_as_float16(golden, expected, actual, "Ascend310P3")
    assert held["y"].tolist() == [256.25, 256.0, 65519.0, 65520.0]
    assert [reason.found for reason in reasons] == [1], "65519 rounds to 65504, 65520 to Inf"


def test_the_overflow_of_the_device_leaves_gradients_alone():
    q = seeded(1, 2, 5, 8).half().requires_grad_()
    with rounding(overflow_of(stack("Ascend310P3"), torch.float16)):
        result = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        (grad,) = torch.autograd.grad(result.sum(), q)
    assert grad.isfinite().all()


def test_a_cube_without_float32_refuses_to_keep_it():
    half, a2 = family_of("Ascend310P3"), family_of("Ascend910B4")
    for cube in (0, 3, 4):
        with pytest.raises(NoFloat32, match="KEEP_DTYPE or USE_HF32"):
            half.operands(cube)
    assert half.operands(1) == half.operands(2) == a2.operands(2) == "float16"
    assert [cube_type(allow_hf32=hf32, allow_float16=half) for hf32 in (False, True) for half in (False, True)] == [
        0,
        2,
        3,
        1,
    ]
    with pytest.raises(ValueError):
        family_of("Ascend310B4").operands(0)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_operands_are_rounded_as_their_kind_says():
    x = seeded(2000) * 3
    for bits in (10, 11):
        step = torch.exp2(torch.floor(torch.log2(x.double().abs())) - bits)
        exact = torch.floor(x.double().abs() / step + 0.5) * step * x.double().sign()  # to the nearest, ties away
        assert torch.equal(round_hf32(x, bits=bits).double(), exact)
    assert torch.equal(Operands(kind="HF32 of 10 bits").entering(x), round_hf32(x, bits=10))
    assert torch.equal(Operands(kind="float16").entering(x), x.half().float())
    large = torch.tensor([7e4, -7e4, 1.0])
    assert Operands(kind="float16").entering(large)[0] == math.inf
    assert Operands(kind="float16", saturates=True).entering(large).tolist() == [65504.0, -65504.0, 1.0]
    with pytest.raises(ValueError):
        Operands(kind="HF32 of 9 bits")
    with pytest.raises(ValueError):
        round_hf32(x, bits=9)


def test_products_in_float16_keep_float32_results_unless_they_say_otherwise():
    left, right = seeded(64, 64), seeded(64, 64, seed=1)
    exact = left.double() @ right.double()
    wide, half = (matmul(left, right, operands=Operands(kind="float16", half_results=item)) for item in (False, True))
    assert not torch.equal(wide, wide.half().float()) and torch.equal(half, half.half().float())
    assert 11.4 < effective_bits(half, exact) < effective_bits(wide, exact) < 12.2


def card(name, backend="cpu"):
    return Device(name=name, backend=backend, torch_device=torch.device("npu:0"), reason="")


def test_a_dtype_that_the_soc_lacks_is_said_by_torch_npu_else_by_the_family(monkeypatch):
    class Npu:
        answer = None

        def is_bf16_supported(self):
            if self.answer is None:
                raise RuntimeError("no device")
            return self.answer

    npu = Npu()
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch, "device", lambda *_: type("Place", (), {"type": "npu"})())
    place = card("Ascend310P3")
    assert lacks(place, "bfloat16") == "Ascend310P3 has no bfloat16" and lacks(place, "float16") is None
    assert lacks(card("Ascend910B4"), "bfloat16") is lacks(card("Ascend310B4"), "bfloat16") is None
    npu.answer = True
    assert lacks(place, "bfloat16") is None
    npu.answer = False
    assert lacks(card("Ascend910B4"), "bfloat16") == "Ascend910B4 has no bfloat16"


def test_what_judges_where_no_error_can_be_expected():
    why = unknown_rounding(stack("Ascend310B4"))
    assert why == "Ascend310B4: how this SoC rounds is not known, so there is no expected error"
    assert unknown_rounding(stack()) is unknown_rounding(stack("any", backend="cuda")) is None
    result = without_forecast(Tolerance(preset="floor"), why, "float16")
    assert (result.preset, result.limits(), result.reason) == ("pair", {}, f"{why}; judged by preset pair")
    result = without_forecast(Tolerance(preset="sharp"), why, "float32")
    assert result.limits()["rel_l2"] == MERE["HF32"] and result.reason.startswith(f"{why}; judged by preset pair")
    own = Tolerance(rel_l2=0.25, forecast_ratio=2.0, reason="mine")
    result = without_forecast(own, why, "float32")
    assert (result.preset, result.limits()) == ("", {"rel_l2": 0.25}) and result.reason.startswith("mine; Ascend310B4")
    kept = without_forecast(Tolerance(preset="floor", top1=1.0, reason="mine"), why, "bfloat16")
    assert kept.preset == "pair" and kept.limits() == {"top1": 1.0}
    only = without_forecast(Tolerance(forecast_ratio=2.0), why, "bfloat16")
    assert only.preset == "pair"
    for left in (Tolerance(preset="card"), Tolerance(preset="dynamo"), Tolerance(rel_l2=0.25)):
        assert without_forecast(left, why, "float32") is left


def test_attention_is_fused_where_torch_npu_fuses_it():
    from harness.numerics.expected_error import _fits_fused

    def fits(shape, rules=Rules(), dtype=torch.float32):
        return _fits_fused(rules, *[torch.empty(shape, dtype=dtype, device="meta")] * 3, None, False)

    assert fits((1, 2048, 4, 8)) and not fits((1, 2049, 4, 8))
    assert fits((1, 2, 4, 512)) and not fits((1, 2, 4, 516))
    assert not fits((1, 2, 4, 10)) and fits((1, 2, 4, 10), dtype=torch.float16)
    narrow = Rules(narrow_attention=True)
    assert fits((1, 2, 4, 256), narrow) and not fits((1, 2, 4, 260), narrow)
    assert not fits((1, 2, 4, 8), Rules(fused_attention=False))


# -------- each family, emulated


@functools.cache
def played(name):
    """What harness.tests.on_soc found on an emulated chip."""
    command = [sys.executable, "-W", "ignore", "-m", "harness.tests.on_soc", name]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"TASK_QUEUE_ENABLE": "0"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


HALF_ONLY, NEWEST, UNKNOWN_SOC = "Ascend310P3", "Ascend950PR_9579", "Ascend310B4"
MODELS = ("picture", "linear", "matmul", "convolution", "gelu", "attention")


@needs_torch_npu
@pytest.mark.parametrize("name", [HALF_ONLY, NEWEST])
def test_a_healthy_chip_errs_as_its_familys_forecast_says(name):
    rows = played(name)["rows"]
    for model in MODELS:
        for dtype in ("float32", "float16"):
            row = rows[f"{model} {dtype}"]
            assert row["status"] == "PASS" and row["ratio"] <= 1.4, (
                model,
                dtype,
                row,
            )  # at most: the CPU's own error may be the larger


@needs_torch_npu
@pytest.mark.parametrize("name", [HALF_ONLY, NEWEST])
def test_bits_are_those_of_the_operands(name):
    """Half a rounding of each operand: 2^-12 of float16's 11 bits, at most; of 1/√3 of that on average, for each of two
    operands.
    """
    rows = played(name)["rows"]
    low, high = (11.0, 13.0) if name == HALF_ONLY else (22.0, 25.0)
    assert low < rows["matmul float32"]["bits"] < high
    assert 11.0 < rows["convolution float32"]["bits"] < 12.5
    assert (rows["gelu float32"]["bits"] > 20) == (name == NEWEST)


@needs_torch_npu
def test_a_dtype_that_the_chip_lacks_is_skipped_and_its_operators_are_refused():
    rows = played(HALF_ONLY)["rows"]
    for model in MODELS:
        assert rows[f"{model} bfloat16"]["status"] == "SKIPPED" and rows[f"{model} bfloat16"]["reasons"] == [
            f"{HALF_ONLY} has no bfloat16"
        ]
        assert played(NEWEST)["rows"][f"{model} bfloat16"]["status"] == "PASS"
    refused = played(HALF_ONLY)["refused"]
    assert "161002" in refused and "DT_BFLOAT16" in refused and played(NEWEST)["refused"] == ""


@needs_torch_npu
def test_a_product_in_float16_is_healthy_where_the_chip_has_no_other():
    assert played(HALF_ONLY)["rows"]["matmul in float16"]["status"] == "PASS"
    assert played(NEWEST)["rows"]["matmul in float16"]["status"] == "FAIL"


@needs_torch_npu
@pytest.mark.parametrize("name", [HALF_ONLY, NEWEST, UNKNOWN_SOC])
def test_a_real_fault_is_caught_on_each(name):
    rows = played(name)["rows"]
    for fault in ("matmul scaled", "picture scaled", "gelu off"):
        assert rows[fault]["status"] == "FAIL", (fault, rows[fault])
    located = played(name)["located"]
    assert located == {"healthy": None, "faulty": "layer_norm", "modules": "LayerNorm", "healthy modules": None}


@needs_torch_npu
def test_overflow_is_said_with_the_mode():
    text = "where float16 saturates on {}: float16 cannot hold this model"
    for name in (HALF_ONLY, UNKNOWN_SOC):
        row = played(name)["rows"]["overflow float16"]
        assert row["status"] == "FAIL" and len(row["reasons"]) == 1 and text.format(name) in row["reasons"][0]
        assert (
            played(name)["rows"]["infinite float16"]["status"] == "PASS"
        )  # where float64 has Inf, 65504 is right there
    newest = played(NEWEST)["rows"]
    assert newest["infinite float16"]["status"] == "PASS"
    saturating = newest["infinite saturates"]
    assert saturating["status"] == "FAIL" and "infinite on one side only" in saturating["reasons"][0]


@needs_torch_npu
def test_switches_change_the_forecast_as_they_change_the_chip():
    for name in (HALF_ONLY, NEWEST):
        for switch, row in played(name)["switches"].items():
            if row["status"] == "ERROR":
                assert name == HALF_ONLY and "161002" in row["reasons"][0], (switch, row)
            else:
                assert row["status"] == "PASS" and row["ratio"] <= 1.4, (name, switch, row)
    half = played(HALF_ONLY)["switches"]
    errors = {switch for switch, row in half.items() if row["status"] == "ERROR"}
    assert errors >= {"must_keep_origin_dtype, matmul", "must_keep_origin_dtype, convolution"}
    newest = played(NEWEST)["switches"]
    assert newest["conv.allow_hf32 = False"]["bits"] > 20 > newest["allow_fp32_to_fp16, matmul"]["bits"]


@needs_torch_npu
def test_a_chip_of_which_nobody_knows_is_judged_by_another_preset_and_the_report_says_so():
    rows = played(UNKNOWN_SOC)["rows"]
    for model in MODELS:
        for dtype in ("float32", "float16", "bfloat16"):
            row = rows[f"{model} {dtype}"]
            assert (row["status"], row["preset"], row["forecast"]) == ("PASS", "pair", None), (model, dtype, row)
            assert row["limits"].startswith(
                "Ascend310B4: how this SoC rounds is not known, so there is no expected error; judged by preset pair"
            )
    assert rows["own limits"]["limits"] == "mine" and rows["own limits"]["preset"] == ""
    assert rows["dynamo"]["preset"] == "dynamo"


@needs_torch_npu
def test_soc_is_an_option_of_pytest(tmp_path):
    (tmp_path / "test_soc.py").write_text(
        "import pytest\nfrom torch import nn\nfrom harness import Case\n\n"
        "@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])\n"
        "def test_precision(precision, dtype):\n"
        "    precision(Case(name='linear', model=lambda: nn.Linear(8, 8), inputs=draw, dtype=dtype), 0)\n\n"
        "def draw(generator):\n    import torch\n    return torch.randn(4, 8, generator=generator)\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]

    def run(*options):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    status, said = run("--precision-soc=Ascend310P3")
    assert status == 0 and "1 PASS (1 NEW), 1 SKIPPED" in said and "on Ascend310P3 (emulated)" in said, said
    status, said = run("--precision-soc=Ascend1000")
    assert status == 4 and "no chip is called 'Ascend1000'" in said, said
    status, said = run("--precision-soc=Ascend310P3", "--precision-device=cpu")
    assert status == 4 and "which chip the emulated device plays" in said, said
