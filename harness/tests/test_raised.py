"""An error's row names the module, the operator and the line that raised, without locating."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, emulator, validate
from harness.errors import RunError
from harness.reference import run
from harness.reference.raised import _calls, location_of
from harness.tests.needs import emulated_device, needs_torch_npu
from harness.tests.test_plugin import markdown, stored, torch_npu_is_imported, user, write  # noqa: F401

NAMED = sys.version_info >= (3, 11)  # from which on Python tells which call of a line raised


class Inner(nn.Module):
    """Raises as `how` says, on a tensor (N, 4)."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc = how, nn.Linear(3, 3)

    def forward(self, x):
        return self.how(self, x)


class Outer(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Inner(how)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def raised(how):
    model = Outer(how)
    with pytest.raises(RunError) as caught:
        run(model, torch.ones(2, 4), forward=None, where="on the moon")
    return caught.value


def _own(module, x):
    raise ValueError(f"{x.shape} is not what I take")


def _assigned(module, x):
    x[torch.tensor([7])] = 1
    return x


def _in_place(module, x):
    x += torch.ones(3)
    return x


KINDS = {  # what raises: the module and the operator that are named
    "a module of torch": (lambda module, x: module.fc(x), "blocks.1.fc: linear"),
    "a function": (lambda module, x: F.layer_norm(x, (3,)), "blocks.1: layer_norm"),
    "a method": (lambda module, x: x.view(3, 3), "blocks.1: view"),
    "an operator": (lambda module, x: x @ torch.ones(3, 3), "blocks.1: matmul"),
    "an inner call": (lambda module, x: torch.relu(x.view(3, 3)), "blocks.1: view"),
    "an index": (lambda module, x: x[torch.tensor([7])], "blocks.1: getitem"),
    "an index that is written": (_assigned, "blocks.1: setitem"),
    "an operator in place": (_in_place, "blocks.1: add_"),
    "a check of torch's own": (lambda module, x: F.cosine_embedding_loss(x, x, x), "blocks.1: cosine_embedding_loss"),
    "an assertion": (_own, "blocks.1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_module_operator_and_line_are_named(kind):
    how, where = KINDS[kind]
    error = raised(how)
    module, _, operator = where.partition(": ")
    operator = operator if NAMED else rf"(?:{operator})?"
    expected = rf"{re.escape(module)}(?:: {operator})? \(test_raised.py:\d+\)" if operator else rf"{module} \(.*\)"
    assert re.fullmatch(expected, error.location) and (not NAMED or error.location.startswith(f"{where} ("))
    assert str(error).startswith("on the moon: ") and str(error).endswith(f"; raised in {error.location}")


def test_what_no_model_raised_has_no_place():
    assert location_of(ValueError("never raised"), nn.Identity()) == ""
    error = raised(lambda module, x: x.view(3, 3))
    assert location_of(error.__cause__, nn.Identity()).startswith("the model: " if NAMED else "the model")


def test_what_the_standard_library_raises_is_no_operator():
    def how(module, x):
        import json

        return json.loads("{")

    place = raised(how).location
    assert re.fullmatch(r"blocks.1(: loads)? \(test_raised.py:\d+\)", place)


def test_a_line_with_one_call_is_named_without_positions():
    assert _calls("return F.gelu(x)") == ["gelu"] and _calls("x += y") == ["add_"]
    assert len(_calls("torch.relu(x.view(3, 3))")) == 2 and _calls("if x:") == []


# -------- on the device


class Gelu(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def case(model=Gelu, inputs=lambda generator: torch.randn(4, 8, generator=generator)):
    return Case(name="gelu", model=lambda: model().eval(), inputs=inputs)


@pytest.fixture(scope="module")
def npu():
    return emulated_device()


def test_the_device_row_names_what_raised(npu):
    with emulator.fault("aclnnGelu*", "oom", nth=1), pytest.raises(RunError) as caught:
        validate(case(), 1, npu)
    assert "; raised in 1: gelu" in str(caught.value) and caught.value.location.startswith("1: gelu")
    assert "; out of memory: the card has less free memory" in str(caught.value)


def test_a_tensor_left_on_the_cpu_is_named_with_its_line(npu):
    class Left(nn.Module):
        def forward(self, x):
            return torch.add(x, torch.ones(4, 16))

    with pytest.raises(RunError, match=r"; raised in the model: add \(test_raised.py:\d+\)"):
        validate(case(Left, lambda generator: torch.randn(4, 16, generator=generator)), 1, npu)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("where", ["cpu", "there"])
def test_a_loss_with_lengths_in_tensors_is_measured_as_it_runs_unwatched(npu, reduction, where):
    class Ctc(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x, targets):
            scores = self.fc(x).view(12, 2, 8).log_softmax(-1)
            lengths = [torch.full((2,), number, device="cpu" if where == "cpu" else x.device) for number in (12, 4)]
            return F.ctc_loss(scores, targets, lengths[0], target_lengths=lengths[1], reduction=reduction)

    def inputs(generator):
        return torch.randn(24, 16, generator=generator), torch.randint(1, 8, (2, 4), generator=generator)

    verdict = validate(case(Ctc, inputs), 1, npu)
    assert verdict.passed, verdict.reasons
    with emulator.fault("aclnnLogSoftmax*", "scale", by=1.1):
        assert validate(case(Ctc, inputs), 1, npu).status == "FAIL"


def test_an_encoder_whose_fused_operator_the_cpu_computes_is_told(npu):
    """torch's encoder layers call one fused operator where no mode looks on, which NPUs lack."""

    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()

    def inputs(generator):
        return torch.randn(2, 8, 32, generator=generator)

    asked = torch.overrides.has_torch_function
    verdict = validate(case(encoder, inputs), 1, npu)
    assert verdict.status == "FAIL" and verdict.marks == ("FELL BACK",), verdict.reasons
    assert "aten::_transformer_encoder_layer_fwd" in str(verdict.reasons[0])
    assert torch.overrides.has_torch_function is asked
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        verdict = validate(case(encoder, inputs), 1, npu)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert verdict.passed and verdict.marks == (), verdict.reasons


class Shy(nn.Module):
    """Raises while a mode looks on; `wrong` on a device that is not the CPU."""

    def __init__(self, wrong=False):
        super().__init__()
        self.fc, self.wrong = nn.Linear(16, 16), wrong

    def forward(self, x):
        if x.device.type != "cpu" and torch._C._len_torch_dispatch_stack():
            raise RuntimeError("being watched")
        return self.fc(x) * (1.5 if self.wrong and x.device.type != "cpu" else 1)


def shy_inputs(generator):
    return torch.randn(4, 16, generator=generator)


def test_a_model_that_raises_only_while_it_is_watched_is_measured_and_says_so(npu):
    verdict = validate(case(Shy, shy_inputs), 1, npu)
    assert verdict.passed, verdict.reasons
    [note] = [item for item in verdict.evidence.notes if "not watched" in item]
    assert "test_raised.py" in note and "not looked for" in note
    assert validate(case(lambda: Shy(wrong=True), shy_inputs), 1, npu).status == "FAIL"


def test_an_error_that_comes_once_is_not_taken_for_the_watch(npu):
    with emulator.fault("aclnnGelu*", "oom", nth=1) as fault, pytest.raises(RunError, match="out of memory"):
        validate(case(), 1, npu)
    assert fault.hits == 1


def test_what_may_come_late_is_noticed_not_raised_there(npu):
    with emulator.fault("aclnnGelu*", "error", code=507015), pytest.raises(RunError) as caught:
        validate(case(), 1, npu)
    assert "; noticed in 1: gelu" in str(caught.value) and "which may come after the operator that failed" in str(
        caught.value
    )


ERRORS = """
import pytest, torch
from torch import nn
from harness import Case

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.exp(self.fc(x))

model, inputs = lambda: nn.Sequential(Block(), Block()).eval(), lambda g: torch.randn(4, 8, generator=g)
CASE = Case(name="block", model=model, inputs=inputs)

def test_precision(precision):
    precision(CASE, 1)
"""


@needs_torch_npu
@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("torch.autograd.grad(self.fc(x).sum(), x)", "Case(gradients=True)"),
        ("torch.fft.rfft(self.fc(x).half())", "Half"),
        ("self.missing(x)", "missing"),
    ],
    ids=["gradients", "a dtype of the CPU", "an attribute"],
)
def test_an_error_of_the_cpus_side_is_not_looked_for_on_the_device(user, line, word):
    write(user, ERRORS.replace("return torch.exp(self.fc(x))", f"return {line}"))
    user.runpytest_inprocess("--device", "emulated")
    row = stored(user)["rows"][0]
    assert row["status"] == "ERROR" and "on the CPU" in row["reasons"][0] and word in row["reasons"][0]
    assert row["located"] is None and "located" not in markdown(user)


@needs_torch_npu
def test_the_row_of_an_error_says_where_without_locating(user):
    write(user, ERRORS)
    user.runpytest_inprocess("--device", "emulated", "--locate=off", "--fault", "aclnnExp:oom:nth=2")
    row = stored(user)["rows"][0]
    assert row["status"] == "ERROR" and row["located"] is None
    assert re.search(r"; raised in 1: exp \(\w+.py:11\)", row["reasons"][0]), row["reasons"]
