"""Models that draw random numbers: the same on the CPU, in float64, under the forecast's rules and on the device."""

import random
import threading

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, validate
from harness.emulator import faults
from harness.reference import Draws, Models, drawing, seeded
from harness.tests.needs import emulated_device

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def device():
    return emulated_device()


class Net(nn.Module):
    """Two layers, and something that is drawn."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.second, self.draw = nn.Linear(64, 128), nn.Linear(128, 64), draw

    def forward(self, x):
        return self.draw(self.second(torch.relu(self.first(x))))


def case(draw, **more):
    return Case(
        **(
            dict(name="net", model=lambda: Net(draw), inputs=lambda generator: torch.randn(32, 64, generator=generator))
            | more
        )
    )


def own(y):
    generator = torch.Generator(y.device).manual_seed(5)
    return y + torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)


def in_thread(y):
    result = []
    thread = threading.Thread(target=lambda: result.append(y + torch.randn_like(y)))
    thread.start()
    thread.join()
    return result[0]


DRAWS = {
    "randn_like": lambda y: y + torch.randn_like(y),
    "randn on the device": lambda y: y + torch.randn(y.shape, device=y.device, dtype=y.dtype),
    "randn on the CPU": lambda y: y + torch.randn(y.shape).to(y.device, y.dtype),
    "rand": lambda y: y * torch.rand(y.shape, device=y.device, dtype=y.dtype),
    "rand_like": lambda y: y * torch.rand_like(y),
    "normal_": lambda y: y + torch.empty_like(y).normal_(1, 2),
    "uniform_": lambda y: y + torch.empty_like(y).uniform_(-1, 1),
    "exponential_": lambda y: y + torch.empty_like(y).exponential_(2),
    "normal of tensors": lambda y: torch.normal(y, y.abs() + 1),
    "normal of a tensor and a number": lambda y: torch.normal(y, 2.0),
    "normal of numbers": lambda y: y + torch.normal(0.0, 1.0, y.shape, device=y.device).to(y.dtype),
    "bernoulli": lambda y: y * torch.bernoulli(torch.full_like(y, 0.3)),
    "bernoulli_": lambda y: y * torch.empty_like(y).bernoulli_(0.3),
    "dropout": lambda y: F.dropout(y, 0.3, True),
    "dropout2d": lambda y: F.dropout1d(y[None], 0.3, True),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.3, True),
    "gumbel": lambda y: F.gumbel_softmax(y, tau=2.0),
    "multinomial": lambda y: y[:, torch.multinomial(torch.ones(64, device=y.device), 8)],
    "randint": lambda y: y[torch.randint(0, 32, (16,), device=y.device)],
    "randperm": lambda y: y[torch.randperm(32, device=y.device)],
    "own generator": own,
    "numpy": lambda y: y + torch.from_numpy(numpy.random.randn(64)).to(y.device, y.dtype),
    "python": lambda y: y * (1 + random.random()),
    "in a thread": in_thread,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_model_that_draws_is_compared_as_well_as_any_other(device, name):
    for dtype in DTYPES:
        verdict = validate(case(DRAWS[name], dtype=dtype), 42, device)
        result = verdict.references["output"]
        assert verdict.passed, (dtype, verdict.failures)
        assert result.floor("rel_l2") < 0.03 and verdict.comparison.cos_sim > 0.999, dtype


@pytest.mark.parametrize(
    "name", ["randn_like", "normal of tensors", "dropout", "bernoulli", "own generator", "numpy", "in a thread"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_and_its_faults_are_caught(device, name, dtype):
    planted = faults.Fault("aclnnAddmm", "scale", by=1.05)
    faults.plant(planted)
    try:
        assert validate(case(DRAWS[name], dtype=dtype), 42, device).status == "FAIL" and planted.hits
    finally:
        faults.remove(planted)


def test_a_row_says_that_its_model_draws_and_others_do_not(device):
    drew = validate(case(DRAWS["randn_like"]), 1, device)
    assert any("all sides got those that the CPU drew" in note for note in drew.evidence.notes)
    assert not validate(case(torch.tanh), 1, device).evidence.notes


def test_what_a_kernel_draws_itself_is_said_where_the_row_fails(device):
    verdict = validate(case(lambda y: F.rrelu(y, training=True)), 1, device)
    assert verdict.status == "FAIL"
    assert any("the device drew random numbers itself" in str(failure) for failure in verdict.failures)


def test_seeds_draw_other_numbers(device):
    models = Models()
    draw = lambda y: torch.randn_like(y)
    digests = [validate(case(draw), seed, device, models=models).evidence.expected_sha256 for seed in (1, 2, 1)]
    assert digests[0] == digests[2] != digests[1]


def test_a_model_that_draws_for_some_inputs_alone(device):
    """The first seed does not draw, so that the harness believes for a while that the model does not."""
    models = Models()

    def draw(y):
        return y + torch.randn_like(y) if float(y[0, 0]) > 0 else y

    verdicts = [validate(case(draw), seed, device, models=models) for seed in range(6)]
    assert all(verdict.passed for verdict in verdicts)
    assert {bool(verdict.evidence.notes) for verdict in verdicts} == {True, False}


# -------- the generators


def states():
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_generators_are_seeded_alike_and_put_back(device):
    before = states() + [device.generator.get_state().tolist()]
    drawn = []
    for _ in range(2):
        with seeded(7, device.generator):
            drawn.append(
                (
                    random.random(),
                    numpy.random.rand(),
                    torch.rand(()).item(),
                    torch.rand((), device=device.torch_device).item(),
                )
            )
    assert drawn[0] == drawn[1]
    assert states() + [device.generator.get_state().tolist()] == before
    with pytest.raises(KeyError), seeded(7):
        raise KeyError
    assert states() == before[:3]


def test_a_run_touches_nobody_elses_generators(device):
    before = states()
    validate(case(DRAWS["dropout"]), 1, device)
    validate(case(DRAWS["numpy"]), 1, device)
    assert states() == before


def test_float64_gets_the_numbers_of_the_dtype():
    def draw(dtype, asked):
        with drawing(Draws(seed=3, dtype=dtype, alike=True)):
            return [
                torch.randn(1000, dtype=asked),
                torch.rand(1000, dtype=asked),
                torch.empty(1000, dtype=asked).exponential_(),
            ]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow, wide = draw(dtype, dtype), draw(dtype, torch.float64)
        assert all(torch.equal(one.double(), other) for one, other in zip(narrow, wide))
    assert not torch.equal(draw(torch.float32, torch.float32)[0], draw(torch.float16, torch.float16)[0].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_numbers_stay_below_one_in_half_dtypes(dtype):
    with drawing(Draws(seed=3, dtype=dtype, alike=True)):
        drawn = [
            torch.rand(200_000, dtype=dtype),
            torch.empty(200_000, dtype=dtype).uniform_(),
            torch.rand_like(torch.empty(200_000, dtype=dtype)),
        ]
    assert all(float(item.max()) < 1 and float(item.min()) >= 0 for item in drawn)
    assert not torch.rand(200_000).to(dtype).max() < 1  # rounding alone reaches it
    with drawing(Draws(seed=3, dtype=dtype, alike=True)):
        assert float(torch.empty(200_000, dtype=dtype).uniform_(2, 3).max()) < 3


def test_distributions_are_those_that_were_asked_for():
    """Means and deviations of 200,000 numbers, within five standard errors."""
    asked = torch.full((200_000,), 0.25)
    with drawing(Draws(seed=3, dtype=torch.float32, alike=True)):
        drawn = {
            "bernoulli": (torch.bernoulli(asked), 0.25, 0.433),
            "bernoulli p": (torch.empty(200_000).bernoulli_(0.25), 0.25, 0.433),
            "normal": (torch.normal(asked, 3.0), 0.25, 3.0),
            "normal_": (torch.empty(200_000).normal_(1, 2), 1.0, 2.0),
            "dropout": (F.dropout(torch.ones(200_000), 0.2, True), 1.0, 0.5),
            "poisson": (torch.poisson(asked * 16), 4.0, 2.0),
            "randint": (torch.randint(0, 10, (200_000,)).float(), 4.5, 2.872),
        }
    for name, (numbers, mean, deviation) in drawn.items():
        assert abs(float(numbers.mean()) - mean) < 5 * deviation / 200_000**0.5, name
        assert abs(float(numbers.std()) - deviation) < 0.02 * deviation, name
