"""Every side runs an untouched copy: state that a run leaves reaches no other side, seed, dtype or case."""

import copy
import re

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.errors import CaseError, UnstableReferenceError
from harness.reference import Models, changes, copy_module, untouched
from harness.tests.needs import emulated_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device():
    return emulated_device()


def drawn(generator):
    return torch.randn(16, 32, generator=generator)


def case(model, **more):
    return Case(**(dict(name=model.__name__, model=model, inputs=drawn) | more))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(32, 32)

    def wrong(self, x, by=1.1):
        """What this model gets wrong on a device."""
        return x * by if x.device.type != "cpu" else x


# -------- the copies


class Parts(Base):
    def __init__(self):
        super().__init__()
        self.tied = self.lin
        self.norm = nn.BatchNorm1d(32)
        self.table, self.shapes, self.calls = torch.ones(3), {"a": [1, 2]}, 0
        self.lin.register_forward_hook(lambda module, inputs, output: output * 2)


def test_a_copy_shares_weights_and_nothing_else():
    model = Parts().eval().requires_grad_(False)
    copied, deep = untouched(model), copy.deepcopy(model)
    assert copied.lin.weight is not model.lin.weight and copied.lin.weight.data_ptr() == model.lin.weight.data_ptr()
    assert copied.tied is copied.lin and copied.lin is not model.lin
    copied.norm.running_mean += 1
    copied.table += 1
    copied.shapes["a"].append(3)
    copied.calls += 1
    copied.lin.weight = nn.Parameter(torch.zeros(32, 32))
    x = torch.ones(2, 32)
    assert torch.equal(model.lin(x), deep.lin(x))  # the hook too
    assert not changes(model, deep)
    named = changes(copied, model)
    for words in (
        "parameter lin.weight",
        "attribute table",
        "attribute shapes",
        "attribute calls (1 where 0 was)",
        "2 more",
    ):
        assert words in named  # the buffer, and the weight under its other name


def test_a_model_that_cannot_be_copied_is_refused_in_one_sentence(device):
    class Locked(Base):
        def __init__(self):
            super().__init__()
            import threading

            self.lock = threading.Lock()

    for dtype in ("float32", "float16"):
        with pytest.raises(CaseError, match="the model cannot be copied: TypeError: cannot pickle .*lock.* keep locks"):
            validate(case(Locked, dtype=dtype), 1, device)


class OfItsOwn(nn.Linear):
    def __deepcopy__(self, memo):
        made = OfItsOwn(32, 32)
        made.load_state_dict(self.state_dict())
        made.copied = True
        return made


def test_a_module_that_copies_itself_does_so():
    assert untouched(nn.Sequential(OfItsOwn(32, 32)))[0].copied


def test_old_weight_norm_is_copied(device):
    def model():
        with pytest.warns(Warning):
            return nn.utils.weight_norm(nn.Linear(32, 32))

    assert validate(Case(name="weight norm", model=model, inputs=drawn), 1, device).passed


# -------- state of the CPU's run stays there


class RotaryCache(Base):
    """Tables as attributes, made in the first forward; those of the device are off."""

    rows = 0

    def forward(self, x):
        if x.shape[0] > self.rows:
            angles = torch.outer(
                torch.arange(x.shape[0], device=x.device).float(), torch.linspace(0, 1, 32, device=x.device)
            )
            self.table, self.rows = self.wrong(angles.cos()), x.shape[0]
        return self.lin(x) * self.table.to(x.dtype)


class LazyBuffer(Base):
    def forward(self, x):
        if not hasattr(self, "table"):
            self.register_buffer("table", self.wrong(torch.full((32,), 1.5, device=x.device)), persistent=False)
        return self.lin(x) * self.table.to(x.dtype)


class Features(Base):
    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.wrong(self.lin(x))
        return self.kept.to(x.device)


@pytest.mark.parametrize("model", [RotaryCache, LazyBuffer, Features], ids=lambda value: value.__name__)
def test_what_a_forward_keeps_is_made_on_each_side_by_itself(device, model):
    models = Models()
    for dtype in ("float32", "float16", "bfloat16", "float32"):  # in any order
        verdict = validate(case(model, dtype=dtype), 1, device, models=models)
        assert verdict.status == "FAIL" and verdict.comparison.rel_l2 > 0.05, dtype


class Healthy(RotaryCache):
    def wrong(self, x, by=1.1):
        return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_lazy_cache_passes_with_every_seed(device, dtype):
    models = Models()
    assert all(validate(case(Healthy, dtype=dtype), seed, device, models=models).passed for seed in (1, 2, 3))


class Remembers(Base):
    """Returns what the first inputs gave, whatever comes later."""

    first = None

    def forward(self, x):
        self.first = self.lin(x) if self.first is None else self.first
        return self.first


def test_the_next_seed_finds_nothing_of_the_last_one(device):
    models = Models()
    digests = [validate(case(Remembers), seed, device, models=models).evidence.expected_sha256 for seed in (1, 2)]
    alone = validate(case(Remembers), 2, device).evidence.expected_sha256
    assert digests[0] != digests[1] == alone


def test_the_built_model_is_never_run(device):
    built = []

    class Counts(Base):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return self.lin(x)

    def model():
        built.append(Counts())
        return built[-1]

    assert validate(Case(name="counts", model=model, inputs=drawn), 1, device).passed
    assert len(built) == 1 and not hasattr(built[0], "calls")


# -------- references that repeat


class Counter(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * self.calls


class Average(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.lin(x) - self.mean


class Grows(Base):
    def forward(self, x):
        self.lin.weight.mul_(1.01)
        return self.lin(x)


class OwnGenerator(Base):
    def __init__(self):
        super().__init__()
        self.dice = torch.Generator().manual_seed(1)

    def forward(self, x):
        return self.lin(x) + torch.rand(32, generator=self.dice).to(x.device, x.dtype)


class Unseeded(Base):
    def forward(self, x):
        import numpy

        return self.lin(x) + float(numpy.random.default_rng().random())


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Counter, r"attribute calls \(2 where 0 was\)"),
        (Average, "buffer mean"),
        (Grows, "parameter lin.weight"),
        (OwnGenerator, "attribute dice"),
        (Unseeded, "changed no parameter, buffer or attribute"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reference_that_does_not_repeat_is_an_error_that_names_what_changed(device, model, named):
    models = Models()
    for seed in (1, 2):  # the second as well
        with pytest.raises(
            UnstableReferenceError, match=f"REFERENCE UNSTABLE: two runs on the CPU differ by .*{named}"
        ) as caught:
            validate(case(model), seed, device, models=models)
        assert len(re.findall(named, str(caught.value))) == 1  # and once


def test_the_reference_is_repeated_once_for_a_model_and_a_dtype(device):
    runs = []

    def forward(model, x):
        if x.device.type == "cpu":
            runs.append(x.dtype)
        return model(x)

    def count(**more):
        runs.clear()
        validate(given, seed, device, models=models, **more)
        return len(runs)

    given = Case(name="plain", model=lambda: nn.Linear(32, 32), inputs=drawn, forward=forward)
    models, seed = Models(), 1
    first = count()
    seed = 2
    later = count()
    assert first == later + 2  # one is the second run, one measures the conditioning
    assert count(rerun_reference=True) == later + 1


class Renormed(nn.Module):
    """torch renormalises these rows in place, and a second time changes nothing."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(50, 16, max_norm=1.0)

    def forward(self, ids):
        return self.rows(ids)


def test_weights_that_are_written_into_are_built_anew_and_a_model_that_repeats_may(device):
    given = Case(
        name="renormed", model=Renormed, inputs=lambda generator: torch.randint(0, 50, (30,), generator=generator)
    )
    models = Models()
    digests = [validate(given, seed, device, models=models, preset="card") for seed in (1, 2)]
    assert all(digest.passed for digest in digests)
    assert digests[1].evidence.expected_sha256 == validate(given, 2, device, preset="card").evidence.expected_sha256
    weight = models.base(given.key, Renormed, seed=0).rows.weight
    assert float(weight.norm(dim=1).max()) > 1.5  # as it was built


class Scatter(Base):
    """Differs from run to run by `by` roundings, as sums do that threads add in the order in which they end."""

    by, turn = 0.0, [0]

    def forward(self, x):
        y = self.lin(x)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            self.turn[0] += 1
            y = y * (1 + self.by * self.turn[0] * 2**-23)
        return y


def test_roundings_of_a_reference_are_said_and_no_error(device):
    class Little(Scatter):
        by = 1.0

    class Most(Scatter):
        by = 31.0

    class Much(Scatter):
        by = 33.0  # 66 roundings: 64 are a deep model's

    models = Models()
    for seed in (1, 2):
        verdict = validate(case(Little), seed, device, models=models)
        assert verdict.passed
        assert any("they add in an order that is not fixed" in note for note in verdict.evidence.notes)
    assert validate(case(Most), 1, device, preset="card").passed
    with pytest.raises(UnstableReferenceError):
        validate(case(Much), 1, device, preset="card")


def test_batch_norm_in_training_changes_its_buffers_and_repeats(device):
    given = Case(
        name="norm",
        model=lambda: nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).train(),
        inputs=drawn,
        training=True,
    )
    verdict = validate(given, 1, device)
    assert verdict.passed and not verdict.evidence.notes
    evaluated = validate(Case(name="norm", model=given.model, inputs=drawn), 1, device)
    assert evaluated.passed and evaluated.evidence.expected_sha256 != verdict.evidence.expected_sha256
    assert any("was run in evaluation mode; Case(training=True)" in note for note in evaluated.evidence.notes)


def test_a_mode_that_was_handed_over_is_kept_or_refused(device):
    class Part(Base):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.eval()
            self.drop.train()  # on purpose, as for an estimate of the spread

        def forward(self, x):
            return self.drop(self.lin(x))

    verdict = validate(case(Part), 1, device)
    assert verdict.passed and float(verdict.comparison.rms) > 0
    assert any("draws random numbers" in note for note in verdict.evidence.notes)
    with pytest.raises(CaseError, match="training=True, and model.. returned a model in evaluation mode"):
        validate(case(Part, training=True), 1, device)


class Loss(Base):
    def forward(self, x):
        return torch.autograd.grad(self.lin(x).square().mean(), list(self.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_parameters(device, dtype):
    verdict = validate(case(Loss, gradients=True, dtype=dtype), 1, device)
    assert verdict.passed and set(verdict.comparisons) == {"0", "1"} and verdict.comparisons["0"].rms > 0
    from harness.errors import RunError

    with pytest.raises(RunError, match="Case.gradients=True. lets autograd run"):
        validate(case(Loss, dtype=dtype), 1, device)


def test_a_wrong_gradient_fails(device):
    class Wrong(Loss):
        def forward(self, x):
            return [self.wrong(item) for item in super().forward(x)]

    assert validate(case(Wrong, gradients=True), 1, device).status == "FAIL"


def test_the_copies_take_no_memory_for_weights():
    model = copy_module(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), dtype=torch.float16, device=CPU)
    copied = untouched(model)
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(copied.parameters(), model.parameters())] == [True] * 4
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(copied.buffers(), model.buffers()))


# -------- TorchScript


class Drops(Base):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.lin(x)))


class Off(Base):
    """Wrong by 10 % where its input is not on the CPU."""

    def forward(self, x):
        return self.lin(x) * (1.0 if x.device.type == "cpu" else 1.1)


class Around(Base):
    """A part in TorchScript beside one that is not."""

    def __init__(self, part=Drops):
        super().__init__()
        self.part = torch.jit.script(part())

    def forward(self, x):
        return self.lin(self.part(x))


def script_case(model, **more):
    return Case(name="script", model=model, inputs=drawn, **more)


SCRIPTED = {
    "script": lambda part: torch.jit.script(part()),
    "trace": lambda part: torch.jit.trace(part().eval(), torch.ones(16, 32)),
    "part": Around,
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", SCRIPTED)
def test_a_model_in_torchscript_runs_on_the_device_in_its_dtype(device, kind, dtype):
    verdict = validate(script_case(lambda: SCRIPTED[kind](Drops), dtype=dtype), seed=0, device=device)
    assert verdict.status == "PASS" and verdict.comparisons["output"].dtype == dtype


@pytest.mark.parametrize("kind", ["script", "part"])  # a trace keeps the CPU's branch
def test_a_wrong_model_in_torchscript_fails(device, kind):
    assert validate(script_case(lambda: SCRIPTED[kind](Off)), seed=0, device=device).status == "FAIL"


def test_a_frozen_model_is_refused_in_words(device):
    with pytest.raises(CaseError, match="torch.jit.freeze .* return the module that was frozen"):
        validate(script_case(lambda: torch.jit.freeze(torch.jit.script(Drops().eval()))), seed=0, device=device)
