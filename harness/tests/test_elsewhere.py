"""Rows that no operator explains: another path on the device, memory that is overwritten, errors, faults that do not
come back.
"""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harness.emulator.operators  # noqa: F401  the operators that `changed` changes
from harness import Case, emulator
from harness.emulator.table import changed
from harness.locate import Symptom, locate
from harness.locate.calls import Call, partings
from harness.reference.outside import _mapping_back
from harness.tests.needs import needs_torch_npu
from harness.tests.test_locate import npu  # noqa: F401
from harness.tests.test_plugin import stored, torch_npu_is_imported, user, write  # noqa: F401


def tokens(generator):
    return torch.randn(2, 16, 64, generator=generator)


def case(model, inputs=tokens, **more):
    return Case(name="elsewhere", model=lambda: model().eval(), inputs=inputs, isolated=False, **more)


def on_npu(x):
    return x.device.type == "npu"


# -------- another path


class Norm(nn.Module):
    """RMSNorm with an operator of torch_npu's own in its place on the device, and another eps there: `wrong` or the
    same.
    """

    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(64) + 0.5), eps

    def forward(self, x):
        if on_npu(x):
            import torch_npu

            return torch_npu.npu_rms_norm(x, self.weight, self.eps)[0]
        return F.rms_norm(x, (64,), self.weight, 1e-6)


class Norms(nn.Module):
    """Four norms between linear layers; the third is as `eps` says."""

    def __init__(self, eps):
        super().__init__()
        self.norms = nn.ModuleList(Norm(eps if number == 2 else 1e-6) for number in range(4))
        self.fcs = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for norm, fc in zip(self.norms, self.fcs):
            x = x + fc(norm(x))
        return x


class Gated(nn.Module):
    """A gate whose columns alternate; where `halves`, the device takes halves."""

    def __init__(self, halves):
        super().__init__()
        self.up, self.down, self.halves = nn.Linear(64, 256), nn.Linear(128, 64), halves

    def forward(self, x):
        y = self.up(x)
        if on_npu(y):
            import torch_npu

            y = y if self.halves else torch.cat((y[..., ::2], y[..., 1::2]), -1)
            return self.down(torch_npu.npu_swiglu(y))
        return self.down(F.silu(y[..., ::2]) * y[..., 1::2])


class Chain(nn.Sequential):
    def forward(self, x):
        for item in self:
            x = x + item(x)
        return x


class Attention(nn.Module):
    """Causal attention; the device goes without the mask where `dropped`."""

    def __init__(self, dropped):
        super().__init__()
        self.dropped = dropped

    def forward(self, x):
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if on_npu(x) and self.dropped:
            seen = None
        return F.scaled_dot_product_attention(q, q, q, attn_mask=seen).transpose(1, 2).flatten(2)


class Scale(nn.Module):
    """The same operator with another number on the device."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return F.softmax(x * (self.by if on_npu(x) else 0.5), -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patched_norm_is_named_with_what_either_side_ran(npu, dtype):
    location = locate(case(lambda: Norms(0.5), dtype=dtype), 1, npu)
    assert (location.first.module, location.first.operator, location.first.kind) == ("norms.2", "npu_rms_norm", "path")
    said = location.sentences()
    assert re.match(
        r"norms.2: npu_rms_norm \(test_elsewhere.py:\d+\): the model takes another path on the device", said
    )
    assert re.search(
        r"runs npu_rms_norm \(test_elsewhere.py:\d+\) where the CPU runs rms_norm \(test_elsewhere.py:\d+\)", said
    )
    assert (
        "None of the 12 operators that the CPU runs is wrong with the CPU's inputs." in said
        and location.sound_paths == 3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_path_that_is_right_is_not_blamed(npu, dtype):
    for model in (
        lambda: Norms(1e-6),
        lambda: Chain(Gated(False), Gated(False)),
        lambda: Attention(False),
        lambda: Scale(0.5),
    ):
        location = locate(case(model, dtype=dtype), 1, npu)
        assert location.first is None and location.sentences().startswith("No operator is wrong"), location.sentences()


def test_a_step_in_the_forward_of_a_module_with_children_is_named(npu):
    location = locate(case(lambda: Chain(Gated(False), Gated(True), Gated(True))), 1, npu)
    assert (location.first.module, location.first.operator) == ("1", "npu_swiglu") and location.sound_paths == 1
    assert re.search(
        r"runs npu_swiglu \(\S+\) where the CPU runs getitem \(\S+\), silu, getitem, mul;", location.sentences()
    )
    assert "So do 1 more modules." in location.sentences()


def test_a_mask_that_the_device_goes_without_is_named(npu):
    location = locate(case(lambda: Chain(Attention(False), Attention(True))), 1, npu)
    assert (location.first.module, location.first.operator) == ("1", "scaled_dot_product_attention")
    assert "where the CPU runs it with attn_mask=bool[16, 16]" in location.sentences()


def test_another_number_is_named(npu):
    location = locate(case(lambda: Chain(Scale(0.5), Scale(0.25))), 1, npu)
    assert (location.first.module, location.first.operator) == ("1", "mul")
    assert (
        "the device runs mul" in location.sentences()
        and "with 0.25 where the CPU runs it with 0.5;" in location.sentences()
    )


def test_a_number_that_differs_in_its_fourth_digit_is_named(npu):
    location = locate(case(lambda: Chain(nn.Linear(64, 64), Scale(0.5003))), 1, npu)
    assert (location.first.module, location.first.operator) == ("1", "mul")
    assert "with 0.5003 where the CPU runs it with 0.5;" in location.sentences()


def test_an_operator_beside_a_scripted_part_is_named(npu):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    with emulator.fault("aclnnSilu", "scale", by=1.1):
        location = locate(case(lambda: Chain(scripted, nn.SiLU())), 1, npu)
    assert (location.first.module, location.first.operator) == ("1", "silu")


def test_a_path_of_the_cases_own_forward_is_named(npu):
    def forward(model, x):
        return model(x) * (2 if on_npu(x) else 1)

    location = locate(case(lambda: Chain(nn.Linear(64, 64)), forward=forward), 1, npu)
    assert (location.first.module, location.first.operator) == (
        "",
        "mul",
    ) and "with 2 where the CPU runs it with 1" in location.sentences()


def call(operator, module="", *given):
    return Call(operator=operator, module=module, line="m.py:1", given=given)


def test_runs_are_aligned_by_operator_module_and_arguments():
    here = [call("linear", "a"), call("silu", "b.c"), call("mul", "b.d"), call("add")]
    there = [call("linear", "a"), call("npu_swiglu", "b"), call("add"), call("cat", "e")]
    first, second = partings(here, there)
    assert (
        [item.operator for item in first.here] == ["silu", "mul"]
        and first.module == "b"
        and first.operator == "npu_swiglu"
    )
    assert (second.module, second.text) == ("e", "the device runs cat (m.py:1) where the CPU runs nothing")
    assert partings(here, here) == []
    (one,) = partings([call("softmax", "a", "dim=-1")], [call("softmax", "a", "dim=1")])
    assert one.text == "the device runs softmax (m.py:1) with dim=1 where the CPU runs it with dim=-1"
    (many,) = partings([call("x")], [call(f"y{number}") for number in range(9)])
    assert "y0 (m.py:1), y1, y2, 3 more, y6, y7, y8 where" in many.text


# -------- memory


class Guard(nn.Module):
    """Looks whether some columns are finite before the next layer takes all of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        h = self.a(x)
        sound = torch.isfinite(h[..., 4:50]).all()
        y = self.b(h)
        return torch.where(sound, y, torch.zeros_like(y))


def spoils(write):
    """An operator that answers rightly and writes as `write` says into what it is given."""

    def change(before):
        def meaning(self, *more, **keywords):
            result = before(self, *more, **keywords)
            write(self)
            return result

        return meaning

    return change


def _behind(x):
    if not x.is_contiguous():
        flat = x.flatten(0, -2) if x.dim() > 2 else x
        torch.as_strided(flat, (flat.shape[0] - 1, 1), (flat.stride(0), 1), x.storage_offset() + x.shape[-1]).zero_()


def _input(x):
    x[0, 0, 0] = 7


@pytest.mark.parametrize(("write", "said"), [
    (_behind, ("it wrote into memory beside its input: 31 of 2048 elements of what a: linear returned, "
     "the first at (0, "
        "0, 50), the last at (1, 14, 50): 0 where ")),
    (_input, ("it wrote into its input, which it must not: 1 of 2048 elements of what a: linear returned, the first at "
        "(0, 0, 4): 7 where ")),
], ids=["its neighbour", "its input"])  # fmt: skip
def test_an_operator_that_overwrites_memory_is_named(npu, write, said):
    with changed("aclnnIsFinite", spoils(write)):
        location = locate(case(Guard), 1, npu)
    assert (location.first.operator, location.first.kind) == ("isfinite", "memory") and said in location.sentences()
    assert locate(case(Guard), 1, npu).first is None


class Tied(nn.Module):
    """One weight that two layers take."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.fc.weight)), self.fc.weight.t())


def test_who_takes_a_weight_that_another_overwrote_is_innocent(npu):
    def writes_weight(before):
        def meaning(self, other, *more, **keywords):
            result = before(self, other, *more, **keywords)
            if other.stride(0) == 1:  # the first of the two, which takes the weight as it lies in memory
                other[3].zero_()
            return result

        return meaning

    subject = case(Tied)
    from harness.reference import Models

    models = Models()
    with changed("aclnnMatmul", writes_weight):
        result = locate(subject, 1, npu, models=models)
        wrote = [step for step in result.steps if step.bad]
        assert [item.kind for item in wrote] == ["memory"] and wrote[0].operator == "linear", result.sentences()
        assert "of the weight fc.weight" in result.sentences()
    assert locate(subject, 1, npu, models=models).first is None  # the weights on the device were put right


def test_what_writes_as_it_says_is_not_blamed(npu):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(64).train()

        def forward(self, x):
            y = x.clone()
            y[:, 0] = 1
            y[..., 4:8].mul_(2)
            y.relu_()
            torch.add(x, 1, out=y[0].new_empty(x.shape))
            self.norm.train()
            return self.norm(F.dropout(y, 0.0, training=True, inplace=True).flatten(0, 1)).view_as(x)

    location = locate(case(Writes), 1, npu)
    assert location.first is None, location.sentences()


# -------- errors, and what comes and goes


def gelu():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        ("on npu:0: OutOfMemoryError", "The row's error"),
        ("on npu:0: it failed; raised in 1: gelu; use less", "The row's error, raised in 1: gelu,"),
        (
            "a fault; noticed in 2: linear (m.py:3), which may",
            "The row's error, noticed in 2: linear (m.py:3), which may,",
        ),
    ],
)
def test_an_error_that_does_not_come_back_is_said_so(npu, error, named):
    location = locate(case(gelu), 1, npu, row=Symptom(error=error))
    assert location.first is None
    assert location.sentences().startswith(
        f"{named} did not come back: nothing raised, neither operator by operator nor in a run of its own"
    )
    assert "GELU" not in location.sentences()


def test_what_raises_only_when_the_model_runs_by_itself_is_named(npu):
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x):
            return torch.add(self.fc(x), torch.ones(2, 16, 8))

    location = locate(case(Left), 1, npu, row=Symptom(error="on npu:0: RuntimeError"))
    assert (location.first.operator, location.first.kind) == ("add", "raise")
    assert re.match(
        r"the model: add \(test_elsewhere.py:\d+\) is what raises when the model runs on the device by itself: "
        r"on npu:0",
        location.sentences(),
    )
    assert "the model makes one on the CPU" in location.sentences()


def test_a_fault_that_does_not_come_back_is_said_so(npu):
    location = locate(case(gelu), 1, npu, row=Symptom(away=float("inf"), scatters=True))
    assert location.first is None and not location.came_back
    said = location.sentences()
    assert said.startswith(
        "The fault did not come back: the row differs from the CPU by inf, the same run while locating by "
    )
    assert "Its own two runs differ too." in said and "GELU" not in said


def test_a_row_as_far_off_as_its_operators_is_explained(npu):
    healthy = locate(case(gelu), 1, npu)
    away = healthy.followed
    assert 1e-5 < away < 1e-3 and healthy.plain == pytest.approx(away, rel=1e-3)
    assert "GELU takes its tanh formula" in locate(case(gelu), 1, npu, row=Symptom(away=1.9 * away)).sentences()
    said = locate(case(gelu), 1, npu, row=Symptom(away=2.1 * away)).sentences()
    assert "GELU" not in said and said.startswith("The fault did not come back")


def test_a_row_that_passes_has_nothing_to_explain(npu):
    location = locate(case(lambda: Norms(0.5)), 1, npu, row=Symptom(fails=False, away=1e-7))
    assert (
        location.first is None
        and location.sentences().startswith("No operator is wrong")
        and location.plain != location.plain
    )


def test_an_operator_that_is_wrong_beside_another_path_is_not_all(npu):
    with emulator.fault("aclnnAdd", "scale", by=1.0001):
        location = locate(case(lambda: Norms(1e-6)), 1, npu)
        assert location.first.operator == "add" and location.plain != location.plain
        explained = locate(case(lambda: Norms(1e-6)), 1, npu, row=Symptom(away=1.9 * location.followed))
        assert (
            "Besides" not in explained.sentences()
            and "The operators that the CPU runs give" not in explained.sentences()
        )
        left = locate(case(lambda: Norms(1e-6)), 1, npu, row=Symptom(away=2.1 * location.followed))
        assert "The operators that the CPU runs give" in left.sentences()
        location = locate(case(lambda: Norms(0.01)), 1, npu, row=Symptom(away=0.5))
    assert location.first.operator == "add" and "Besides, norms.2: npu_rms_norm" in location.sentences()


class Extension(nn.Module):
    """What no torch function is called for: lockstep does not see it."""

    def forward(self, x):
        return torch.from_numpy(x.cpu().numpy() * (2 if on_npu(x) else 1)).to(x.device)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = Chain(nn.Linear(64, 64), Extension(), nn.Linear(64, 64))

    def forward(self, x):
        return self.trunk(x)


def test_modules_are_looked_at_where_no_operator_explains(npu):
    location = locate(case(Deep), 1, npu)
    assert (location.first.module, location.first.kind) == ("trunk.1", "module"), location.sentences()
    assert (
        "Together they give a difference of" in location.sentences()
        and "trunk.1: Extension is the first wrong module" in location.sentences()
    )
    location = locate(case(Deep), 1, npu, level="operators")
    assert (
        location.first is None
        and "its error is elsewhere." in location.sentences()
        and "Look at what the model does" in location.sentences()
    )


# -------- modules


class Cache:
    def __init__(self):
        self.kept = {}

    def update(self, layer, h):
        self.kept[layer] = torch.cat((self.kept[layer], h), 1) if layer in self.kept else h
        return self.kept[layer]


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.a, self.act, self.calls = number, nn.Linear(64, 64), nn.SiLU(), 0

    def forward(self, x, cache=None):
        self.calls += 1
        h = self.a(x) / self.calls
        if cache is not None:
            h = cache.update(self.number, h)[:, -x.shape[1] :]
            h = h / (cache.kept[self.number].shape[1] // x.shape[1])
        return x + self.act(h)


class Trunk(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(3))

    def forward(self, x, cache=None):
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x


class Wrapper(nn.Module):
    def __init__(self, cached):
        super().__init__()
        self.trunk, self.head, self.cached = Trunk(), nn.Linear(64, 8), cached

    def forward(self, x):
        return self.head(self.trunk(x, cache=Cache() if self.cached else None))


@pytest.mark.parametrize("cached", [False, True], ids=["wrapped", "cached"])
def test_modules_are_found_below_a_wrapper_and_with_a_cache(npu, cached):
    subject = case(lambda: Wrapper(cached))
    healthy = locate(subject, 1, npu, level="modules")
    names = [step.module for step in healthy.steps]
    assert healthy.first is None and names == ["trunk", "head", ""], healthy.sentences()
    with emulator.fault("aclnnSilu", "scale", by=1.1):
        location = locate(subject, 1, npu, level="modules")
    assert (
        location.first.module == "trunk.layers.0.act"
        and "trunk.layers.0.act: SiLU is the first wrong module" in location.sentences()
    )
    with emulator.fault("aclnnSilu", "scale", by=1.1, nth=3):
        assert locate(subject, 1, npu, level="modules").first is not None


def test_modules_that_draw_are_not_blamed(npu):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.drop(x)) + torch.randn_like(x)

    subject = Case(
        name="noisy", model=lambda: Chain(Noisy(), Noisy()).train(), inputs=tokens, training=True, isolated=False
    )
    location = locate(subject, 1, npu, level="modules")
    assert location.first is None and [step.module for step in location.steps] == ["0", "1", ""]
    assert locate(subject, 1, npu).first is None


def test_modules_end_with_the_time(npu):
    location = locate(case(lambda: Wrapper(False)), 1, npu, level="modules", limit=0.0)
    assert not location.steps and location.unseen == 2


# -------- in the flow

BRANCH = """
import pytest, torch
from torch import nn
from harness import Case

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        return torch.sigmoid(y) if y.device.type == "npu" else torch.tanh(y)

model, inputs = lambda: nn.Sequential(nn.Linear(8, 8), Block()).eval(), lambda g: torch.randn(4, 8, generator=g)
CASE = Case(name="block", model=model, inputs=inputs, isolated=False)

def test_precision(precision):
    precision(CASE, 1)
"""


@needs_torch_npu
def test_the_report_of_a_row_names_the_path(user):
    write(user, BRANCH)
    user.runpytest_inprocess("--device", "emulated")
    row = stored(user)["rows"][0]
    assert (
        row["status"] == "FAIL"
        and row["located"]["ranking"][0]["operator"] == "sigmoid"
        and row["located"]["first"] == 3
    )
    assert "1: sigmoid (" in row["located"]["said"] and "where the CPU runs tanh (" in row["located"]["said"]
    assert "the device runs sigmoid" in (user.path / "reports" / "precision.md").read_text()


@needs_torch_npu
def test_the_report_of_a_fault_that_is_gone_says_so(user):
    write(
        user, BRANCH.replace('torch.sigmoid(y) if y.device.type == "npu" else torch.tanh(y)', "nn.functional.gelu(y)")
    )
    user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnGelu*:nan:at=3,nth=1")
    row = stored(user)["rows"][0]
    assert row["status"] == "FAIL" and "NONDETERMINISTIC" in row["marks"]
    assert (
        row["located"]["said"].startswith("The fault did not come back")
        and "tanh formula" not in row["located"]["said"]
    )


@needs_torch_npu
def test_what_the_first_look_found_stands_where_gradients_cannot_be_looked_at(user, monkeypatch):
    import harness.locate
    from harness.errors import RunError
    from harness.locate.finding import Finding

    whole = harness.locate.locate

    def without_gradients(*args, backward=False, **how):
        if backward:
            raise RunError("checkpoint saw other tensors")
        return whole(*args, **how)

    monkeypatch.setattr(Finding, "has_gradients", True)
    monkeypatch.setattr(harness.locate, "locate", without_gradients)
    write(
        user, BRANCH.replace('torch.sigmoid(y) if y.device.type == "npu" else torch.tanh(y)', "nn.functional.gelu(y)")
    )
    result = user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnGelu*:nan:at=3,nth=1")
    row = stored(user)["rows"][0]
    assert row["located"]["said"].startswith("The fault did not come back")
    result.stdout.fnmatch_lines(["*the gradients of its operators were not looked at: checkpoint saw other tensors*"])


def test_what_another_run_on_the_cpu_calls_otherwise_is_no_path_of_the_device(npu):
    calls = []

    def forward(model, x):
        calls.append(0)
        return model(x) + 1e-9 * len(calls)

    location = locate(case(lambda: Chain(nn.Linear(64, 64)), forward=forward), 1, npu)
    assert location.first is None, location.sentences()


# -------- a language model


def _patched_norm(model):
    module = model.model.layers[1].post_attention_layernorm

    class Patched(type(module)):
        def forward(self, x):
            if on_npu(x):
                import torch_npu

                return torch_npu.npu_rms_norm(x, self.weight, 1e-1)[0]
            return super().forward(x)

    module.__class__ = Patched


def _unmasked(model):
    module = model.model.layers[1].self_attn

    class Unmasked(type(module)):
        def forward(self, hidden_states, attention_mask=None, **more):
            if on_npu(hidden_states):
                attention_mask = torch.zeros(1, 1, 12, 12, device=hidden_states.device)
            return super().forward(hidden_states, attention_mask=attention_mask, **more)

    module.__class__ = Unmasked


def _guarded(model):
    module = model.model.layers[1].mlp

    class Guarded(type(module)):
        def forward(self, x):
            y = self.up_proj(x)
            sound = torch.isfinite(y[..., :60]).all()
            return self.down_proj(torch.where(sound, self.act_fn(self.gate_proj(x)) * y, y))

    module.__class__ = Guarded


def llama(patch):
    def build():
        transformers = pytest.importorskip("transformers")
        sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes))
        patch(model)
        return model

    def inputs(generator):
        return {"input_ids": torch.randint(0, 128, (1, 12), generator=generator)}

    return case(build, inputs, forward=lambda model, given: model(**given).logits)


LLAMA = {  # the patch, the operator that writes beside its input, what is named
    "a norm": (_patched_norm, None, "model.layers.1.post_attention_layernorm: npu_rms_norm"),
    "a mask": (_unmasked, None, "model.layers.1.self_attn: zeros"),
    "its neighbour": (_guarded, _behind, "model.layers.1.mlp: isfinite"),
}


@pytest.mark.parametrize("name", LLAMA)
def test_a_language_model_with_a_fault_that_is_no_operators(npu, name):
    patch, write, named = LLAMA[name]
    with changed("aclnnIsFinite", spoils(write or (lambda x: None))):
        location = locate(llama(patch), 1, npu)
    assert location.first is not None and location.first.name.startswith(f"{named} ("), location.sentences()


def test_a_language_model_with_a_cache_is_located_by_modules(npu):
    healthy = locate(llama(lambda model: None), 1, npu)
    assert healthy.first is None and healthy.sentences().startswith("No operator is wrong"), healthy.sentences()
    assert locate(llama(lambda model: None), 1, npu, level="modules").first is None
    with emulator.fault("aclnnSilu", "scale", by=1.1):
        location = locate(llama(lambda model: None), 1, npu, level="modules")
    assert location.first.module == "model.layers.0.mlp.act_fn", location.sentences()


class Registry(dict):
    """As transformers has one: its get() takes no default."""

    def get(self, key):
        return self[key]


def test_a_registry_with_a_get_of_its_own_is_put_back():
    old = torch.ones(2)
    registry = Registry(table=torch.zeros(2), more=torch.zeros(2))
    _mapping_back(registry, {"table": old, "gone": old})
    assert registry == {"table": old, "gone": old}
