"""Faults that no operator shows by itself: writes, other values, gradients, transforms; and who is not blamed."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import harness.emulator.operators  # noqa: F401  the operators that `changed` changes
from harness import Case, emulator
from harness.emulator.table import changed
from harness.locate import Symptom, locate
from harness.tests.test_locate import npu  # noqa: F401


def rows(generator):
    return torch.randn(40, 32, generator=generator)


def case(model, inputs=rows, **more):
    return Case(
        name="place", model=lambda: model().train(more.get("training", False)), inputs=inputs, isolated=False, **more
    )


def grads(model, x):
    y = model(x)
    result = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return {name: item for (name, _), item in zip(model.named_parameters(), result)}


def training(model, **more):
    return case(model, forward=grads, training=True, gradients=True, **more)


# -------- what was measured, and no more


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_wrong_gradient_is_said_without_a_share_that_nobody_measured(npu):
    with emulator.fault("aclnnTanhBackward", "scale", by=1.01):
        location = locate(training(Tanh), 1, npu, backward=True, row=Symptom(away=0.01))
    assert location.first.operator == "tanh" and location.cut == "the model: grad"
    assert location.sentences().endswith("No other operator is wrong by itself: what comes after inherits.")


def test_what_gradients_give_together_is_said_to_be_unmeasured(npu):
    location = locate(training(Tanh), 1, npu, backward=True, row=Symptom(away=1e-9))
    said = location.sentences()
    assert location.first is None and location.followed != location.followed and "0.00e+00" not in said
    assert "was not measured: from the model: grad on the device had the CPU's numbers" in said


def test_a_fault_that_comes_and_goes_is_held_against_no_other_run(npu):
    with emulator.fault("aclnnTanh", "noise", by=0.01):
        location = locate(case(Tanh), 1, npu, row=Symptom(away=1e3, scatters=True))
    assert location.first.operator == "tanh" and "differs from run to run" in location.first.cause
    assert "give a difference" not in location.sentences() and "C++" not in location.sentences()


# -------- transforms, autocast


class Mapped(nn.Module):
    """A product under vmap, then a function outside of it."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(32, 32) / 6), nn.Linear(32, 32)

    def forward(self, x):
        return self.o(F.silu(torch.vmap(lambda row: row @ self.w)(x)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        inner = checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False)
        return F.silu(self.b(inner))


class Autocast(nn.Module):
    """Products in bfloat16, a norm that one device casts and the other does not."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.b(F.silu(self.n(self.a(x)))).float()


@pytest.mark.parametrize(
    "subject",
    [case(Mapped), training(Checkpointed), case(Autocast)],
    ids=["vmap", "checkpoint", "autocast"],
)
def test_a_wrong_operator_beside_what_cannot_be_looked_at_is_named(npu, subject):
    assert locate(subject, 1, npu).first is None
    with emulator.fault("aclnnSilu", "scale", by=1.1):
        location = locate(subject, 1, npu)
    assert location.first.name.startswith("the model: silu (test_place.py:"), location.sentences()
    assert "1 more are wrong" not in location.sentences() and "raised" not in location.sentences()


def test_a_product_under_autocast_is_named_with_its_module(npu):
    with emulator.fault("aclnnAddmm", "scale", by=1.1):
        location = locate(case(Autocast), 1, npu)
    assert location.first.module == "a" and "multiplied by 1.1" in location.first.cause


def test_calls_inside_of_a_transform_are_counted_as_not_looked_at(npu):
    with emulator.fault("aclnnMatmul", "scale", by=1.1), emulator.fault("aclnnMm", "scale", by=1.1):
        location = locate(case(Mapped), 1, npu, row=Symptom(away=0.1))
    assert "1 calls were not looked at by themselves: inside of a transform of torch.func" in location.sentences()
    assert not [step for step in location.steps if step.bad and step.operator in ("matmul", "silu")]


# -------- writes into what is used afterwards


def on_npu(x):
    return x.device.type == "npu"


class Residual(nn.Module):
    """A residual that is added in place: `where` says on which side."""

    def __init__(self, where):
        super().__init__()
        self.fc, self.where = nn.Linear(32, 32), where

    def forward(self, x):
        y = torch.tanh(self.fc(x))
        return x.add_(y) if x.device.type in self.where else x + y


class Skip(nn.Module):
    """A block whose input is used once more after it; with `kept` false it is not."""

    def __init__(self, where, kept=True):
        super().__init__()
        self.i, self.block, self.o = nn.Linear(32, 32), Residual(where), nn.Linear(64 if kept else 32, 32)
        self.kept = kept

    def forward(self, x):
        x = self.i(x)
        y = self.block(x)
        return self.o(torch.cat((y, x), -1) if self.kept else y)


class Clone(nn.Module):
    """A copy that is written into; `shared` leaves the copying out on the device."""

    def __init__(self, shared):
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(32, 32), nn.Linear(32, 32), shared

    def forward(self, x):
        y = self.a(x)
        z = y if self.shared and on_npu(x) else y.clone()
        z += 1
        return self.b(z) * y


class Input(nn.Module):
    """What is given to the model is centred in place on the device, and returned."""

    def __init__(self, spoils):
        super().__init__()
        self.fc, self.spoils = nn.Linear(32, 32), spoils

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        y = x.sub_(mean) if self.spoils and on_npu(x) else x - mean
        return self.fc(y), x


WRITES = {  # the model, what is named, what is said of it
    "a residual spoils a skip": (
        lambda: Skip(("npu",)), "block: add_",
        (r"it writes into what i: linear \(\S+\) returned, which the model: cat \(\S+\) takes afterwards: it differs"
        r" by \S+ then, by \S+ before; on the CPU nothing writes into it"),
    ),
    "a residual on the CPU alone": (
        lambda: Skip(("cpu",)), "block: add_",
        r"on the CPU it writes into what i: linear .* on the device nothing does: it differs",
    ),
    "a clone left out": (
        lambda: Clone(True), "the model: add_",
        r"on the CPU it writes into a copy of that, made by clone \(test_place.py",
    ),
    "what the model is given and returns": (
        lambda: Input(True), "the model: sub_", r"it writes into input 0, which the model returns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_write_on_one_side_is_named_with_who_takes_it_afterwards(npu, name):
    model, named, said = WRITES[name]
    location = locate(case(model), 1, npu)
    assert location.first is not None and location.first.name.startswith(f"{named} (test_place.py:"), (
        location.sentences()
    )
    assert re.search(said, location.sentences()), location.sentences()


SOUND = {
    "both sides write": lambda: Skip(("cpu", "npu")),
    "neither writes": lambda: Skip(()),
    "nobody uses it afterwards": lambda: Skip(("npu",), kept=False),
    "a copy on both sides": lambda: Clone(False),
    "the input stays": lambda: Input(False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_a_write_that_changes_nothing_is_not_blamed(npu, name, dtype):
    location = locate(case(SOUND[name], dtype=dtype), 1, npu)
    assert location.first is None and location.sentences().startswith("No operator is wrong"), location.sentences()


# -------- other values


class Number(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.a, self.b, self.by = nn.Linear(32, 32), nn.Linear(32, 32), by

    def forward(self, x):
        return self.b(self.a(x) * (self.by if on_npu(x) else 0.1) + x)


class Other(nn.Module):
    """Two tensors of one shape; the device takes the one that `takes` says."""

    def __init__(self, takes):
        super().__init__()
        self.a, self.b, self.o, self.takes = *(nn.Linear(32, 32) for _ in range(3)), takes

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        taken = a if on_npu(x) and self.takes == "a" else b
        return self.o(torch.tanh(taken + x))


class Turned(nn.Module):
    """Calls that are the same, in another order on the device."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if on_npu(x):
            y, x = torch.tanh(b), torch.tanh(a)
        else:
            x, y = torch.tanh(a), torch.tanh(b)
        return x - 2 * y


class Read(nn.Module):
    """A number that is read from a tensor, so that its last digits are the device's."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        y = self.a(x)
        return y * float(y.norm()) + torch.exp(y).sum().item()


VALUES = {
    "a number": (
        lambda: Number(0.100002), "the model: mul",
        r"the device gives it the number 0.100002 where the CPU gives it 0.1",
    ),
    "another tensor": (
        lambda: Other("a"), "the model: add",
        r"the device gives it what a: linear \(\S+\) returned where the CPU gives it what b: linear \(\S+\) returned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_the_first_call_that_is_given_other_values_is_named(npu, name):
    model, named, said = VALUES[name]
    location = locate(case(model), 1, npu)
    assert location.first is not None and location.first.name.startswith(f"{named} (test_place.py:"), (
        location.sentences()
    )
    assert location.first.kind == "value" and re.search(said, location.sentences()), location.sentences()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "model", [lambda: Number(0.1), lambda: Other("b"), Turned, Read], ids="number tensor order read".split()
)
def test_the_same_values_are_not_blamed(npu, model, dtype):
    location = locate(case(model, dtype=dtype), 1, npu)
    assert location.first is None, location.sentences()


class Weights(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(32, 32), nn.Linear(32, 32), first

    def forward(self, x):
        layer = self.a if self.first and on_npu(x) else self.b
        return F.linear(x, layer.weight) + self.a(x)


def test_another_weight_is_named(npu):
    location = locate(case(lambda: Weights(True)), 1, npu)
    assert "with a.weight float32[32, 32] where the CPU runs it with b.weight float32[32, 32]" in location.sentences()
    assert locate(case(lambda: Weights(False)), 1, npu).first is None


class Alone(nn.Module):
    """An operator whose input a run by itself has at another time."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        return torch.tanh(self.a(x)).mean(-1)


def test_an_operator_that_is_wrong_only_in_a_run_by_itself_is_named(npu):
    with changed("aclnnTanh", at_times(4)):  # after two calls beside the CPU
        location = locate(case(Alone), 1, npu, row=Symptom(away=0.1, scatters=True))
    assert (location.first.operator, location.first.kind) == ("tanh", "value"), location.sentences()
    assert re.search(r"it differs by \S+ in a run of the device by itself", location.sentences())


def at_times(number):
    """An operator that is wrong the `number`th time that it runs, counted from 1."""
    count = itertools.count(1)

    def change(before):
        return lambda *given, **more: before(*given, **more) * (1.1 if next(count) == number else 1)

    return change


# -------- gradients


class Detached(nn.Module):
    """A gradient that the device lets flow through one of two ways alone, as `way` says."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(32, 32), nn.Linear(32, 32), way

    def forward(self, x):
        y = torch.tanh(self.a(x))
        if on_npu(x) and self.way == "detach":
            return self.b(y + y.detach())
        with torch.set_grad_enabled(not (on_npu(x) and self.way == "no_grad")):
            z = y * 0.5
        return self.b(y + 2 * z)


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, wrong):
        ctx.save_for_backward(x)
        ctx.wrong = wrong
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient if ctx.wrong and on_npu(x) else gradient * (x.abs() <= 0.5), None


class Custom(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.a, self.b, self.wrong = nn.Linear(32, 32), nn.Linear(32, 32), wrong

    def forward(self, x):
        return self.b(Clip.apply(self.a(x), self.wrong))


def steps(model, x):
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("forward", [grads, steps], ids=["grad", "backward"])
def test_a_backward_of_the_models_own_is_named(npu, forward):
    location = locate(case(lambda: Custom(True), forward=forward, training=True, gradients=True), 1, npu)
    assert location.first.kind == "gradient" and location.first.name.startswith("the model: clamp (test_place.py:")
    said = r"the backward of Clip is another on the device: the gradient of what a: linear"
    assert re.search(said, location.sentences())


@pytest.mark.parametrize("way", ["detach", "no_grad"])
def test_a_gradient_that_is_cut_on_the_device_is_named(npu, way):
    model = {"detach": Halved, "no_grad": lambda: Detached("no_grad")}[way]
    location = locate(training(model), 1, npu)
    named = {"detach": "the model: detach (", "no_grad": "the model: mul ("}[way]
    assert location.first is not None and location.first.name.startswith(named), location.sentences()
    assert "on the device alone it keeps gradients from flowing back" in location.sentences()


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return self.b(y + (y.detach() if on_npu(x) else y))


@pytest.mark.parametrize("forward", [grads, steps], ids=["grad", "backward"])
@pytest.mark.parametrize("model", [lambda: Custom(False), lambda: Detached(""), Tanh], ids=["own", "ways", "plain"])
def test_gradients_that_are_right_are_not_blamed(npu, model, forward):
    location = locate(case(model, forward=forward, training=True, gradients=True), 1, npu, backward=True)
    assert location.first is None, location.sentences()


# -------- where arguments lie, norms, the root module


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.a(x)
        y.mul_(y)
        return self.b(torch.cat((F.elu(y[:3]), F.elu(y[3:]))))


def where(lies, wrong):
    """An operator that is `wrong` for arguments of which `lies` is true."""

    def change(before):
        def meaning(*given, **more):
            hit = lies(*given)
            result = before(*given, **more)
            return wrong(result) if hit else result

        return meaning

    return change


PLACES = {  # the operator of CANN, how its arguments lie, what is named and said
    "shared": ("aclnnInplaceMul", lambda x, y, *_: isinstance(y, torch.Tensor) and x.data_ptr() == y.data_ptr(), "mul_",
               "two of its arguments share memory"),
    "offset": ("aclnnElu", lambda x, *_: x.data_ptr() % 512 != 0, "elu",
               "an argument begins 384 bytes into its memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_an_operator_that_is_wrong_as_its_arguments_lie_is_named(npu, name):
    aclnn, lies, operator, said = PLACES[name]
    with changed(aclnn, where(lies, lambda found: found * 1.1)):
        location = locate(case(Square), 1, npu)
    assert location.first is not None and location.first.operator == operator, location.sentences()
    assert f"With copies of its arguments it passes: {said}." in location.sentences() and location.replay is None
    assert locate(case(Square), 1, npu).first is None


class Normed(nn.Module):
    """A batch norm that trains where `where` says."""

    def __init__(self, where):
        super().__init__()
        self.a, self.n, self.where = nn.Linear(32, 32), nn.BatchNorm1d(32), where
        nn.init.uniform_(self.n.running_var, 0.5, 1.0)

    def forward(self, x):
        n = self.n
        trains = x.device.type in self.where
        y = F.batch_norm(self.a(x), n.running_mean, n.running_var, n.weight, n.bias, trains, 0.1, n.eps)
        return y, n.running_var * 1.0


@pytest.mark.parametrize("where", ["npu", "cpu"])
def test_a_norm_that_trains_on_one_side_is_told_as_that(npu, where):
    location = locate(case(lambda: Normed((where,))), 1, npu)
    assert (location.first.operator, location.first.kind) == ("batch_norm", "path"), location.sentences()
    batch, running = "with the statistics of the batch, and updates the running ones", "with the running statistics"
    there, here = (batch, running) if where == "npu" else (running, batch)
    said = rf"the device runs batch_norm \(\S+\) in \w+ mode, {there}, where the CPU runs it {here};"
    assert re.search(said, location.sentences())
    assert "must not" not in location.sentences()


def test_running_statistics_that_are_wrong_are_named(npu):
    subject = case(lambda: Normed(("cpu", "npu")))
    assert locate(subject, 1, npu).first is None

    def wider(before):
        def meaning(*given, **more):
            mean, variance, *others = before(*given, **more)
            return mean, None if variance is None else variance * 1.1, *others

        return meaning

    with changed("aclnnBatchNorm", wider):
        location = locate(subject, 1, npu)
    assert location.first.operator == "batch_norm" and location.first.reasons[0].startswith("running statistics: 1: ")


def test_the_root_module_is_looked_at_where_none_of_its_parts_is_wrong(npu):
    location = locate(case(lambda: Other("a")), 1, npu, level="modules")
    assert (location.first.module, location.first.operator) == ("", "Other")
    assert location.sentences().startswith("the model: Other is the first wrong module: it differs from the CPU by")
    assert locate(case(lambda: Other("b")), 1, npu, level="modules").first is None
