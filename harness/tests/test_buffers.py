"""Training mode: the buffers that a model writes are outputs of its row."""

import contextlib

import pytest
import torch
from torch import nn

from harness import Case, validate
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
    return Case(name="normed", model=lambda: model().train(), inputs=lambda g: torch.randn(12, 16, generator=g) * 2 + 1, dtype=dtype, **options)


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
    [(wrong_variance, {"buffer norm.running_var"}), (no_update, {"buffer norm.running_mean", "buffer norm.running_var"})],
)
def test_statistics_that_the_device_updates_wrongly_fail(change, wrong):
    with changed("aclnnBatchNorm", change):
        verdict = validate(a_case(), 0, emulated_device())
    assert verdict.status == "FAIL" and {each.output for each in verdict.failures} == wrong, verdict.reasons


# ---------------------------------------------------------------------------------------------------- what is watched


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
    with watching(model, None, restore=True) as written:
        model(torch.ones(3))
    assert {*written.outputs} == {"buffer total"} and torch.equal(written.outputs["buffer total"], torch.ones(3))
    assert not model.total.any() and model.count == 0, "put back, whole numbers too"
    with watching(model, frozenset({"buffer total", "buffer still"})) as written:
        pass
    assert {*written.outputs} == {"buffer total", "buffer still"}, "also where nothing changed"
    with watching(model, ()) as written:
        model(torch.ones(3))
    assert written.outputs == {} and model.count == 1


def referred(buffers, twice=True):
    def lend():
        return contextlib.nullcontext(Writes())

    draws = Draws(seed=0, dtype=torch.float32, alike=True)
    return refer(lend, torch.ones(3), what="m", draws=draws, twice=twice, buffers=buffers, forward=None, dtype=torch.float32)


def test_a_second_run_begins_where_the_first_did_if_buffers_are_outputs():
    found = referred(None)
    assert found.again is None and {*found.outputs} == {"output", "buffer total"}
    found = referred(())
    assert found.again is not None and "buffer total" in found.changed and "buffer count" in found.changed
