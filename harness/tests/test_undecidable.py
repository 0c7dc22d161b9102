"""Rows that show nothing: floors as large as the output, nothing to see, nothing computed on the device."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from harness import Case, Tolerance, validate
from harness.errors import CaseError
from harness.judging.checks import judge
from harness.judging.presets import UNDECIDED
from harness.reference import tensors_of
from harness.run.comparisons import measured_outputs
from harness.tests.needs import emulated_device


@pytest.fixture(scope="module")
def device():
    return emulated_device()


def drawn(generator):
    return torch.randn(32, 64, generator=generator)


def case(model, **more):
    return Case(**(dict(name=getattr(model, "__name__", "case"), model=model, inputs=drawn) | more))


# -------- the floor has a ceiling


@pytest.mark.parametrize(("count", "share"), [(4000, 0.25), (600, 1 / 6), (100, 0.1), (8, 0.05)])
def test_a_floor_just_under_its_ceiling_decides_and_one_just_over_does_not(count, share):
    golden = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    noise *= golden.norm() / noise.norm()
    for over, marks in ((0.98, ()), (1.02, ("UNDECIDABLE",))):
        healthy = (golden + over * share * noise).float()
        compared = measured_outputs({"output": healthy}, {"output": healthy}, {"output": golden}, None)
        verdict = judge(compared[0], Tolerance(preset="floor"), references=compared[1])
        assert verdict.marks == marks and verdict.passed is (not marks), over
    assert "an error of 0.51 times the output would pass (up to 0.5 allowed)" in str(verdict.failures[0])
    accepted = Tolerance(preset="floor", undecided=0.52, reason="the model is chaotic and nobody uses these numbers")
    assert judge(compared[0], accepted, references=compared[1]).passed
    assert UNDECIDED == 0.5


class Chaos(nn.Module):
    """40 steps that double every error; the device returns other numbers altogether."""

    def __init__(self, wrong=True):
        super().__init__()
        self.lin, self.wrong = nn.Linear(64, 64, bias=False), wrong
        self.lin.weight.data *= 8

    def forward(self, x):
        for _ in range(40):
            x = torch.tanh(self.lin(x))
        return x.roll(7, 0).flip(1) if self.wrong and x.device.type != "cpu" else x


@pytest.mark.parametrize(
    ("dtype", "wrong", "tolerance"),
    [
        ("float32", True, Tolerance(preset="floor")),
        ("float16", True, Tolerance(preset="sharp")),
        ("float16", False, Tolerance(forecast_ratio=3.0)),
    ],
    ids=["float32", "float16", "own limit"],
)
def test_a_chaotic_model_is_undecidable(device, dtype, wrong, tolerance):
    verdict = validate(case(lambda: Chaos(wrong), dtype=dtype, tolerance=tolerance), 1, device)
    assert verdict.status == "FAIL" and "UNDECIDABLE" in verdict.marks


@pytest.mark.parametrize(
    "limits",
    [{"rel_l2": float("inf")}, {"cos_sim": 0.0}, {"max_diff": float("inf"), "matched": 0.0}, {"undecided": 0.5}],
)
def test_limits_that_pass_anything_are_refused(limits):
    with pytest.raises(ValueError, match="a Tolerance without limits would pass anything"):
        Tolerance(**limits)
    assert Tolerance(**limits, preset="floor", reason="one of its limits is switched off").preset == "floor"
    assert Tolerance(**limits | {"token_cos_sim": 0.9}).token_cos_sim == 0.9


# -------- nothing to see


class Ends(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), last

    def forward(self, x):
        x = self.first(x)
        return self.last(x * 1.5 if x.device.type != "cpu" else x)


def zeros():
    head = nn.Linear(64, 8)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (zeros, "zero"),
        (lambda: Function(lambda x: x.square().sum(-1).add(1).reciprocal().log().mul(float("inf"))), "Inf or NaN"),
        (lambda: Function(lambda x: torch.sigmoid(x.abs() * 1e6 + 1e3)), "the same number"),
    ],
    ids=["zero", "infinite", "constant"],
)
def test_outputs_that_show_nothing_do_not_pass(device, last, said):
    for tolerance in (Tolerance(preset="floor"), Tolerance(preset="card")):
        verdict = validate(case(lambda: Ends(last()), tolerance=tolerance), 1, device)
        assert verdict.status == "FAIL"
        assert f"every element of every output is {said} on both sides" in " ".join(map(str, verdict.failures))


def test_a_constant_beside_what_can_be_judged_passes(device):
    def forward(model, x):
        y = model(x)
        return {"features": y, "mask": torch.ones_like(y), "rest": torch.zeros_like(y)}

    assert validate(case(lambda: nn.Linear(64, 64), forward=forward), 1, device).passed


def test_a_constant_that_is_computed_wrong_fails_by_its_numbers(device):
    wrong = Function(lambda x: torch.ones_like(x) * (1.1 if x.device.type != "cpu" else 1.0))
    verdict = validate(case(lambda: wrong), 1, device)
    assert verdict.status == "FAIL" and "empty" not in {failure.criterion for failure in verdict.failures}


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(CaseError, match="two tensors that are both called 'a.b'"):
        tensors_of({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}, "the model")
    with pytest.raises(CaseError, match="both called '0'"):
        tensors_of({0: torch.ones(2), "0": torch.zeros(2)}, "the model")


def test_a_sparse_tensor_is_refused_in_words(device):
    sparse = Function(lambda x: torch.relu(x).to_sparse())
    with pytest.raises(CaseError, match="layout sparse_coo as 'output' where a dense one was expected; give its"):
        validate(case(lambda: sparse), 1, device)


# -------- what the device computed


class Inside(nn.Module):
    """Computes with the CPU in the middle."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(64, 64), function

    def forward(self, x):
        return self.function(self.first(x))


class OnTheCpu(nn.Module):
    def __init__(self, back=True):
        super().__init__()
        self.net, self.back = nn.Linear(64, 64), back

    def forward(self, x):
        y = self.net.to("cpu")(x.cpu())
        return y.to(x.device) if self.back else y


@pytest.fixture(params=["emulated", "as on a card"])
def watched(request, device, monkeypatch):
    """The emulated device, and one that does not count the bytes that come back, as a card does not."""
    if request.param == "as on a card":
        monkeypatch.setattr("harness.emulator.installed", lambda: False)
    return device


@pytest.mark.parametrize("back", [True, False])
def test_a_model_that_is_computed_on_the_cpu_does_not_pass(watched, back):
    verdict = validate(case(lambda: OnTheCpu(back), tolerance=Tolerance(preset="card")), 1, watched)
    assert verdict.status == "FAIL" and "the device computed nothing" in " ".join(map(str, verdict.failures))


library = torch.library.Library("undecidable", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: x * 2, "CPU")
library.define("plus(Tensor x) -> Tensor")
library.impl("plus", lambda x: (x.cpu() + 1).to(x.device), "CompositeExplicitAutograd")
library.define("right(Tensor x) -> Tensor")
library.impl("right", lambda x: x * 2 + 1, "CompositeExplicitAutograd")


def kept(x, tables={}):  # noqa: B006  it is to outlive the model
    key = str(x.device), x.dtype
    if key not in tables:
        tables[key] = torch.special.i0(torch.linspace(0, 1, 64, device=x.device).to(x.dtype))
    return x * tables[key]


def in_thread(x):
    result = []
    thread = threading.Thread(target=lambda: result.append(torch.special.i0(x)))
    thread.start()
    thread.join()
    return result[0]


FALLS_BACK = {
    "plainly": torch.special.i0,
    "in a table that outlives the first run": kept,
    "in a thread": in_thread,
    "custom, with a kernel of the CPU alone": lambda x: torch.ops.undecidable.twice(x),
    "custom, copying to the CPU": lambda x: torch.ops.undecidable.plus(x),
    "in inference mode": torch.inference_mode()(lambda x: torch.special.i0(x) * 1),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_falls_back_is_seen(watched, name):
    if name.startswith("in a table"):
        kept.__defaults__[0].clear()
    verdict = validate(case(lambda: Inside(FALLS_BACK[name])), 1, watched)
    assert verdict.status == "FAIL" and "FELL BACK" in verdict.marks and "ON HOST" not in verdict.marks


OWN_CODE = {
    "softmax on the CPU": lambda x: x.cpu().softmax(-1).to(x.device),
    "left there": lambda x: x.cpu().softmax(-1),
    "numpy": lambda x: torch.from_numpy(x.cpu().numpy() * 2).to(x.device),
    "numpy, in another size": lambda x: x + torch.from_numpy(x.cpu().numpy()[:, :1] * 2).to(x.device),
    "numpy, in another size and dtype": lambda x: (
        x + torch.from_numpy(np.asarray(x.cpu(), dtype=np.float64)[:, :1]).float().to(x.device)
    ),
    "lists of Python": lambda x: x + torch.tensor([sum(number) for number in x.tolist()])[:, None].to(x.device),
    "in place": lambda x: x.cpu().mul_(2).to(x.device),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_a_models_own_code_on_the_cpu_is_said_apart(watched, name):
    verdict = validate(case(lambda: Inside(OWN_CODE[name])), 1, watched)
    assert verdict.passed and verdict.marks == ("ON HOST",)
    assert (
        "the model's own code brings values from the device to the CPU and computes there" in verdict.evidence.notes[0]
    )


SOUND = {
    "returned on the CPU": lambda x: x.cpu(),
    "returned on the CPU in inference mode": torch.inference_mode()(lambda x: x.cpu()),
    "moved in inference mode": torch.inference_mode()(
        lambda x: (x.to(torch.float16).to("cpu").float().to(x.device), x.softmax(-1))
    ),
    "a number": lambda x: x * float(x.abs().max()),
    "lengths": lambda x: x[: int((x.argmax(-1).cpu() >= 0).sum())],
    "seen by numpy, beside a table made on the CPU": lambda x: (
        x * torch.arange(64).float().div(64).to(x.device, x.dtype) * bool(np.isfinite(x.cpu().numpy()).all())
    ),
    "a table made on the CPU": lambda x: x * torch.arange(64).float().div(64).to(x.device, x.dtype),
    "custom, made of sound operators": lambda x: torch.ops.undecidable.right(x),
    "in a thread": lambda x: x.sin(),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_fallback_passes_without_a_mark(watched, name):
    verdict = validate(case(lambda: Inside(SOUND[name])), 1, watched)
    assert verdict.passed and verdict.marks == (), verdict.failures


class Autocasting(nn.Linear):
    def __init__(self, kind):
        super().__init__(64, 64)
        self.kind = kind

    def forward(self, x):
        with torch.autocast(self.kind or x.device.type, dtype=torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.parametrize(
    ("kind", "dtype", "status"),
    [
        ("cpu", "float32", "FAIL"),  # the reference would excuse an error of the size of its own
        ("cpu", "bfloat16", "PASS"),  # and here it rounds as the device does
        ("npu", "float32", "FAIL"),
        ("npu", "bfloat16", "PASS"),
        (None, "float32", "PASS"),
    ],
)
def test_autocast_for_one_side_alone(device, kind, dtype, status):
    verdict = validate(case(lambda: Autocasting(kind), dtype=dtype), 1, device)
    assert verdict.status == status, verdict.failures
    side = {"cpu": "the CPU's", "npu": "the device's"}.get(kind)
    expected = [f"torch.autocast was on for {side} side alone"] if status == "FAIL" else []
    assert [
        failure.text.partition(",")[0] for failure in verdict.failures if failure.criterion == "autocast"
    ] == expected


def test_an_error_in_one_of_two_runs_fails(device):
    from harness.emulator import faults

    for nth in (1, 2):
        planted = faults.Fault("aclnnAddmm", "scale", by=1.1, nth=nth)
        faults.plant(planted)
        try:
            verdict = validate(case(lambda: nn.Linear(64, 64)), 1, device)
        finally:
            faults.remove(planted)
        assert planted.hits == 1 and verdict.status == "FAIL" and "NONDETERMINISTIC" in verdict.marks
