"""What a model writes besides what it returns is compared: buffers in training mode, and inputs."""

import contextlib

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.emulator.table import changed
from harness.reference import Draws, Models, refer, watching
from harness.tests.needs import emulated_device


class Normed(nn.Module):
    """Batch norm and a layer; `shows`: the running variance is returned as well."""

    def __init__(self, shows: bool = False):
        super().__init__()
        self.shows, self.norm, self.out = shows, nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x):
        y = self.out(self.norm(x)) * self.scale[0]
        return (y, self.norm.running_var.clone()) if self.shows else y


def a_case(model=Normed, dtype="float32", **options):
    options = dict(training=True) | options
    return Case(
        name="normed",
        model=lambda: model().train(),
        inputs=lambda g: torch.randn(12, 16, generator=g) * 2 + 1,
        dtype=dtype,
        **options,
    )


STATISTICS = {"output", "buffer norm.running_mean", "buffer norm.running_var"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_running_statistics_are_outputs_of_a_sound_row(dtype):
    models = Models()
    for seed in (0, 1):
        verdict = validate(a_case(dtype=dtype), seed, emulated_device(), models=models, rerun_reference=True)
        assert verdict.passed, verdict.reasons
        assert {*verdict.comparisons} == STATISTICS


def test_a_model_may_return_the_buffers_that_it_writes():
    """The second run of the reference begins with the buffers of the first."""
    verdict = validate(a_case(lambda: Normed(shows=True)), 0, emulated_device())
    assert verdict.passed, verdict.reasons
    assert {"buffer norm.running_mean", "buffer norm.running_var"} < {*verdict.comparisons}


def test_in_evaluation_mode_nothing_is_added():
    verdict = validate(a_case(training=False), 0, emulated_device())
    assert verdict.passed and {*verdict.comparisons} == {"output"}


def wrong_variance(real):
    def compute(self, weight, bias, running_mean, running_var, training, momentum, eps, out):
        mean, var, *rest = real(self, weight, bias, running_mean, running_var, training, momentum, eps, out)
        return mean, var * 1.01, *rest

    return compute


def no_update(real):
    def compute(self, weight, bias, running_mean, running_var, training, momentum, eps, out):
        _, _, *rest = real(self, weight, bias, running_mean, running_var, training, momentum, eps, out)
        return running_mean, running_var, *rest

    return compute


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (wrong_variance, {"buffer norm.running_var"}),
        (no_update, {"buffer norm.running_mean", "buffer norm.running_var"}),
    ],
)
def test_statistics_that_the_device_updates_wrongly_fail(change, wrong):
    with changed("aclnnBatchNorm", change):
        verdict = validate(a_case(), 0, emulated_device())
    assert verdict.status == "FAIL" and {failure.output for failure in verdict.failures} == wrong, verdict.reasons


# -------- what is watched


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("still", torch.ones(2))
        self.register_buffer("table", None)

    def forward(self, x):
        self.total += x
        self.count += 1
        return self.total * 2


def test_the_first_run_finds_the_names_and_others_return_the_same():
    model = Writes()
    with watching(model, buffers=None, restore=True) as written:
        model(torch.ones(3))
    assert {*written.outputs} == {"buffer total"} and torch.equal(written.outputs["buffer total"], torch.ones(3))
    assert not model.total.any() and model.count == 0, "put back, whole numbers too"
    with watching(model, buffers=frozenset({"buffer total", "buffer still"})) as written:
        pass
    assert {*written.outputs} == {"buffer total", "buffer still"}, "also where nothing changed"
    with watching(model) as written:
        model(torch.ones(3))
    assert written.outputs == {} and model.count == 1


def referred(buffers, twice=True):
    def lend():
        return contextlib.nullcontext(Writes())

    draws = Draws(seed=0, dtype=torch.float32, alike=True)
    return refer(
        lend, torch.ones(3), what="m", draws=draws, twice=twice, buffers=buffers, forward=None, dtype=torch.float32
    )


def test_a_second_run_begins_where_the_first_did_if_buffers_are_outputs():
    result = referred(None)
    assert result.again is None and {*result.outputs} == {"output", "buffer total"}
    result = referred(())
    assert result.again is not None and "buffer total" in result.changed and "buffer count" in result.changed


# -------- inputs


class Cache(nn.Module):
    """Writes keys into a cache that it was given, and does not return it."""

    def __init__(self):
        super().__init__()
        self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, cache):
        cache[:, 2:6] = self.key(x)
        return self.out(x)


def cached(model=Cache, dtype="float32"):
    inputs = lambda g: (torch.randn(3, 4, 16, generator=g), torch.zeros(3, 8, 16))
    return Case(name="cached", model=model, inputs=inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_input_that_is_written_into_is_an_output(dtype):
    verdict = validate(cached(dtype=dtype), 0, emulated_device(), rerun_reference=True)
    assert verdict.passed, verdict.reasons
    assert {*verdict.comparisons} == {"output", "input 1"}


class OffByOne(Cache):
    """On the device the keys go into other places."""

    def forward(self, x, cache):
        first = 2 if x.device.type == "cpu" else 3
        cache[:, first : first + 4] = self.key(x)
        return self.out(x)


class Elsewhere(Cache):
    """On the device the cache is copied first."""

    def forward(self, x, cache):
        return super().forward(x, cache if x.device.type == "cpu" else cache.clone())


@pytest.mark.parametrize("model", [OffByOne, Elsewhere])
def test_an_input_that_the_device_writes_wrongly_or_not_at_all_fails(model):
    verdict = validate(cached(model), 0, emulated_device())
    assert verdict.status == "FAIL" and {failure.output for failure in verdict.failures} == {"input 1"}, verdict.reasons


class Doubled(nn.Module):
    """A cast to the dtype that a tensor has copies nothing, so what follows writes into the input."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        wide = x.to(self.dtype)
        wide *= 2
        return (wide + 1).to(x.dtype)


@pytest.mark.parametrize("cast", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_input_counts_where_the_float64_run_and_the_cpus_write_into_it(dtype, cast):
    """float32 alone writes under the first cast, float64 alone under the second: nothing can be compared."""
    inputs = lambda g: torch.randn(64, 64, generator=g)
    case = Case(name="doubled", model=lambda: Doubled(cast), inputs=inputs, dtype=dtype)
    verdict = validate(case, 0, open_device("cpu"))
    assert verdict.passed and {*verdict.comparisons} == {"output"}, verdict.reasons


class Returns(Cache):
    """Calls what it returns as an input is called that it writes into."""

    def forward(self, x, cache):
        return {"input 1": super().forward(x, cache)}


def test_what_a_model_returns_keeps_its_name():
    verdict = validate(cached(Returns), 0, emulated_device())
    assert (
        verdict.passed and {*verdict.comparisons} == {"input 1"} and verdict.comparisons["input 1"].shape == (3, 4, 16)
    )


def test_an_input_with_nan_that_stays_is_not_written():
    given = torch.tensor([1.0, float("nan")])
    with watching(nn.Identity(), given, inputs=None, before=given.clone()) as written:
        pass
    assert written.outputs == {}
    with watching(nn.Identity(), {"x": given}, inputs=None, before={"x": given.clone()}) as written:
        given[0] = 2
    assert {*written.outputs} == {"input x"}


def test_inputs_that_are_no_dense_tensors_are_left_out():
    given = {"x": torch.zeros(2), "flag": True, "pair": (torch.ones(2), None), "sparse": torch.eye(2).to_sparse()}
    with watching(
        nn.Identity(), given, inputs=None, before={**given, "x": given["x"].clone(), "pair": (torch.zeros(2), None)}
    ) as written:
        given["x"] += 1
    assert {*written.outputs} == {"input x", "input pair.0"}
