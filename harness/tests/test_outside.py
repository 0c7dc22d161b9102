"""State outside of a model goes from no run to the next: class attributes, globals, closures, defaults, cached
functions.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from harness import Case, validate
from harness.errors import CaseError
from harness.reference import Models
from harness.reference.outside import put_back
from harness.tests.needs import emulated_device

TABLES, FEATURES, SEEN = {}, [], {}
HELD = None
FLAG = False


@pytest.fixture(scope="module")
def device():
    return emulated_device()


def drawn(generator):
    return torch.randn(8, 64, generator=generator)


def case(model, **more):
    return Case(**(dict(name="case", model=model, inputs=drawn) | more))


def wrong(x):
    """A table as a device makes it that is wrong."""
    return x * 1.3 if x.device.type != "cpu" else x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(64, 64)

    def made(self, x):
        return wrong(torch.arange(64, device=x.device) / 64).cos()


class ByGlobal(Base):
    def forward(self, x):
        global HELD
        HELD = self.made(x) if HELD is None else HELD
        return self.lin(x) * HELD.to(x)


class Absent(type):
    """As transformers' stand-in for a class whose library is not installed: any attribute raises."""

    def __getattribute__(cls, name):
        if name.startswith("_"):
            return super().__getattribute__(name)
        raise ImportError("this class needs a library that is not here")


class NeedsAnotherLibrary(metaclass=Absent):
    pass


class NamesAnAbsentClass(Base):
    def forward(self, x):
        return self.lin(x) if NeedsAnotherLibrary is not None else x


def test_a_class_whose_library_is_absent_is_left_alone():
    with put_back(net := NamesAnAbsentClass()):
        assert net(torch.ones(1, 64)).shape == (1, 64)


class ByDict(Base):
    def forward(self, x):
        if 64 not in TABLES:
            TABLES[64] = self.made(x)
        return self.lin(x) * TABLES[64].to(x)


class ByClass(Base):
    table = None

    def forward(self, x):
        if ByClass.table is None:
            type(self).table = self.made(x)
        return self.lin(x) * ByClass.table.to(x)


class ByDefault(Base):
    def forward(self, x, kept={}):  # noqa: B006
        if "table" not in kept:
            kept["table"] = self.made(x)
        return self.lin(x) * kept["table"].to(x)


def through_a_table(x, kept={}):  # noqa: B006
    if "table" not in kept:
        kept["table"] = wrong(torch.arange(64, device=x.device) / 64).cos()
    return x * kept["table"].to(x)


class Given(Base):
    """Its functions are no names of its code: whoever builds it gives them."""

    def __init__(self, **functions):
        super().__init__()
        self.function, self.functions = functions.get("one"), functions

    def forward(self, x):
        return next(iter(self.functions.values()))(self.lin(x))


@functools.lru_cache(maxsize=4)
def cached(length):
    return wrong(torch.arange(length, device=WHERE[0]) / length).cos()


WHERE = ["cpu"]


class ByCache(Base):
    def forward(self, x):
        WHERE[0] = x.device
        return self.lin(x) * cached(64).to(x)


class Shared:
    def __init__(self):
        self.table = None

    def __deepcopy__(self, memo):
        return self


class ByShared(Base):
    def __init__(self):
        super().__init__()
        self.shared = Shared()

    def forward(self, x):
        self.shared.table = self.made(x) if self.shared.table is None else self.shared.table
        return self.lin(x) * self.shared.table.to(x)


def by_hook():
    model = Wrong()
    model.lin.register_forward_hook(lambda module, inputs, output: FEATURES.append(output))
    return model


class Wrong(Base):
    def forward(self, x):
        return self.lin(wrong(x))


def by_closure():
    kept = []

    class ByClosure(Base):
        def forward(self, x):
            if not kept:
                kept.append(self.made(x))
            return self.lin(x) * kept[0].to(x)

    return ByClosure()


MODELS = {item.__name__: item for item in (ByGlobal, ByDict, ByClass, ByDefault, ByCache, ByShared)} | {
    "ByClosure": by_closure,
    "a function among the attributes": lambda: Given(one=through_a_table),
    "a partial one in a dict": lambda: Given(other=functools.partial(through_a_table)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_table_kept_outside_of_the_model_is_made_on_each_side(name, device):
    assert validate(case(MODELS[name]), 1, device).status == "FAIL"


def test_a_list_that_a_hook_fills_gives_no_side_the_output_of_another(device):
    def forward(model, x):
        model(x)
        return FEATURES[0]

    assert validate(case(by_hook, forward=forward), 1, device).status == "FAIL"
    assert FEATURES == []


def test_what_holds_no_tensor_stays():
    class Once(nn.Module):
        def forward(self, x):
            global FLAG
            FLAG = True
            SEEN["count"] = SEEN.get("count", 0) + 1
            SEEN["tensor"] = x
            return x

    with put_back(model := Once()):
        model(torch.ones(1))
    assert FLAG and SEEN == {"count": 1}


def test_what_was_there_before_is_there_again():
    SEEN["before"] = before = torch.ones(2)

    class Replaces(nn.Module):
        def forward(self, x):
            SEEN["before"] = x
            return x

    with put_back(model := Replaces()):
        model(torch.zeros(1))
    assert SEEN["before"] is before


# -------- a build for every case's name


def by_environment():
    kind = Wrong if os.environ.get("ATTENTION") == "fused" else Base
    model = kind()
    model.forward = functools.partial(kind.forward, model) if kind is Wrong else model.lin.forward
    return nn.Sequential(model.lin) if kind is Base else Wrong()


def test_a_builder_that_reads_a_setting_builds_again_for_another_case(device, monkeypatch):
    models, result = Models(), {}
    for setting in ("eager", "fused"):
        monkeypatch.setenv("ATTENTION", setting)
        result[setting] = validate(case(by_environment, name=setting), 1, device, models=models).status
    assert result == {"eager": "PASS", "fused": "FAIL"}


# -------- what is no row of its dtype


def test_a_builder_that_ignores_its_dtype_is_refused(device):
    with pytest.raises(
        CaseError, match=r"model\(dtype\) was given float16 and returned a model that is float32 throughout"
    ):
        validate(case(lambda dtype: nn.Linear(64, 64), dtype="float16"), 1, device)
    assert validate(case(lambda dtype: nn.Linear(64, 64, dtype=dtype), dtype="float16"), 1, device).passed


def test_a_device_that_returns_zeros_fails_whatever_the_limits_allow(device):
    from harness import Tolerance

    class Zeroed(Base):
        def forward(self, x):
            y = self.lin(x) * 1e-3
            return torch.zeros_like(y) if x.device.type != "cpu" else y

    loose = Tolerance(max_diff=1e-2, reason="a card's")
    verdict = validate(case(Zeroed, tolerance=loose), 1, device)
    assert verdict.status == "FAIL" and "every element that the device returned is zero" in str(verdict.reasons[0])

    class Nothing(Base):  # on either side zero but for the CPU's own error
        def forward(self, x):
            return (x + 1e6) - 1e6 - x if x.device.type == "cpu" else torch.zeros_like(x)

    assert not any(
        "returned is zero" in str(reason) for reason in validate(case(Nothing, tolerance=loose), 1, device).reasons
    )


def test_a_model_that_ignores_its_inputs_is_told(device):
    class Ignores(Base):
        def forward(self, x):
            return self.lin.weight * 2

    def notes(model):
        return " ".join(validate(case(model), 1, device).evidence.notes)

    assert "see that the model uses its inputs" in notes(Ignores)
    assert "see that the model uses its inputs" not in notes(lambda: nn.Linear(64, 64))


# -------- threads and inputs

POOL = ThreadPoolExecutor(1)


def test_an_operator_that_falls_back_in_an_older_pool_of_threads_is_seen(device):
    POOL.submit(int).result()  # the thread is there before the case runs

    class Pooled(Base):
        def forward(self, x):
            return POOL.submit(torch.special.bessel_j0, self.lin(x)).result()

    assert "FELL BACK" in validate(case(Pooled), 1, device).marks


class Pair(NamedTuple):
    x: torch.Tensor
    scale: torch.Tensor


def test_inputs_may_be_a_named_tuple_and_a_packed_sequence(device):
    class Scaled(Base):
        def forward(self, x, scale):
            return self.lin(x) * scale

    named = case(Scaled, inputs=lambda g: Pair(torch.randn(8, 64, generator=g), torch.randn(64, generator=g)))
    assert validate(named, 1, device).passed

    class OfPacked(Base):
        def forward(self, packed):
            assert isinstance(packed, PackedSequence) and packed.batch_sizes.device.type == "cpu"
            return self.lin(packed.data)

    packed = case(OfPacked, inputs=lambda g: pack_sequence([torch.randn(n, 64, generator=g) for n in (5, 3, 2)]))
    assert validate(packed, 1, device).passed


def test_gradients_of_a_backward_inside_of_the_model_repeat(device):
    def gradients(model, x):
        model(x).square().mean().backward()
        return model.weight.grad

    verdict = validate(case(lambda: nn.Linear(64, 64), forward=gradients, gradients=True), 1, device)
    assert verdict.passed
