"""Lockstep: the operator that is wrong is named, with its module, its line and its cause; what only inherits is not."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, emulator
from harness.emulator import faults
from harness.emulator.table import changed
from harness.locate import is_explained, locate
from harness.locate.diagnose import cause_of
from harness.locate.replay import Replay, copy_strided, relative_difference
from harness.locate.repro import reduced, write_repro
from harness.reference import roundoff
from harness.report.located import found_text, located
from harness.report.pictures import depth_picture
from harness.report.rows import Located
from harness.report.words import LANGUAGES
from harness.tests.needs import emulated_device, needs_torch_npu
from harness.tests.test_clean import TRAP, emulated
from harness.tests.test_plugin import CASE, stored, torch_npu_is_imported, user, write  # noqa: F401
from harness.typed_json import reader_of, to_json


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens (B, N, 32) through four blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(32) for _ in range(4)])

    def forward(self, x):
        return self.blocks(x)


def tokens(generator):
    return torch.randn(2, 24, 32, generator=generator)


def case(model=Model, inputs=tokens, **more):
    return Case(name="small", model=lambda: model().eval(), inputs=inputs, **more)


def broken(place, fault):
    """The model whose module at `place` runs on a broken device."""

    def build():
        model = Model().eval()
        module = model.get_submodule(place)
        module.register_forward_pre_hook(lambda *_: faults.plant(fault))
        module.register_forward_hook(lambda *_: faults.remove(fault), always_call=True)
        return model

    return Case(name="small", model=build, inputs=tokens)


@pytest.fixture(scope="module")
def npu():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield emulated_device()
    torch.set_num_threads(before)


# -------- finding


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_healthy_run_names_no_operator(npu, dtype):
    location = locate(case(dtype=dtype), 1, npu)
    assert (
        location.first is None
        and location.replay is None
        and location.sentences().startswith("No operator is wrong: each of ")
    )
    names = [(step.module, step.operator) for step in location.steps]
    assert (
        ("blocks.2.qkv", "linear") in names
        and ("blocks.0", "scaled_dot_product_attention") in names
        and ("blocks.3", "silu") in names
    )
    assert all(re.fullmatch(r"test_locate.py:\d+", step.place) for step in location.steps if step.module == "blocks.1")
    assert all(0 <= step.own < 1e-2 and step.inherited < 3e-2 for step in location.steps)


KINDS = [
    ("scale", {"by": 1.01}, "all of it is multiplied by 1.01"),
    ("offset", {"by": 0.5}, "+0.5 is added to all of it"),
    ("noise", {"by": 0.01}, "it differs from run to run"),
    ("hf32", {}, "it computes as if its operands were rounded to HF32"),
    ("fp16", {}, "it computes as if its operands were rounded to float16"),
    ("tail", {"size": 8}, "8 of 1536 elements are zero, from (1, 23, 24) to (1, 23, 31)"),
    ("swap_rows", {"at": 3}, "rows 3 and 4 stand in each other's place"),
    ("nan", {"at": 5}, "1 of 1536 elements are NaN, the first at (0, 0, 5), from finite inputs"),
    ("stale", {}, "its output is not written, or not all of it"),
    ("saturate", {"by": 0.1}, "elements are cut to 0.1"),
    ("error", {}, ""),
]


@pytest.mark.parametrize(("kind", "settings", "cause"), KINDS, ids=[item[0] for item in KINDS])
def test_the_broken_operator_is_named_with_its_cause(npu, kind, settings, cause):
    fault = emulator.Fault("aclnnAddmm", kind, **settings)
    location = locate(broken("blocks.2.out", fault), 1, npu)
    assert fault.hits and (location.first.module, location.first.operator) == ("blocks.2.out", "linear")
    assert cause in location.first.cause and "blocks.2.out: linear (" in location.sentences()
    if kind == "error":
        assert "the device raised RuntimeError" in location.first.reasons[0]
    else:
        later = [step for step in location.steps if step.number > location.first.number]
        assert not any(item.bad for item in later) and "what comes after inherits" in location.sentences()
        assert kind in ("nan", "stale") or max(item.inherited for item in later) > 1e-5 > max(
            item.own for item in later
        )


def test_a_mask_that_is_turned_around_is_named(npu):
    class Masked(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            return F.scaled_dot_product_attention(q, q, q, attn_mask=seen)

    with emulator.fault("aclnnFlashAttention*", "mask"):
        location = locate(case(Masked), 1, npu)
    assert location.first.operator == "scaled_dot_product_attention" and "with the mask" in location.first.cause


def only_views(before):
    """An operator that is wrong for what is not contiguous."""
    return lambda self, **more: before(self, **more) * (1 if self.is_contiguous() else 2)


def test_a_view_that_breaks_an_operator_is_named_as_one(npu):
    class Twice(nn.Module):
        def forward(self, x):
            return torch.exp(x.transpose(1, 2))

    with changed("aclnnExp", only_views):
        location = locate(case(Twice), 1, npu)
    assert (
        location.first.operator == "exp"
        and location.first.cause == "an input is a view that is not contiguous; made contiguous, it passes"
    )


class Everything(nn.Module):
    """Views, operators in place, out=, indices, several results, results that are no fractions, a cache, random
    numbers.
    """

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.register_buffer("seen", torch.zeros(24, 32))

    def forward(self, x):
        kept = x.clone()
        kept[:, 0] = x[:, 1] * 2
        kept[:, 2:4].mul_(0.5)
        kept += x
        torch.add(x, 1, out=kept[:1].new_empty(x.shape))
        self.seen.add_(kept.mean(0))
        top, index = kept.topk(3, -1)
        noise = torch.rand(x.shape, device=x.device).to(x.dtype)
        with_noise = F.dropout(kept, 0.5, training=True) + noise
        mean, scale = torch.var_mean(with_noise, -1, keepdim=True)
        hidden, (last, _) = self.lstm(with_noise)
        cache = torch.cat([hidden, hidden[:, -1:]], 1)
        position = torch.arange(cache.shape[1], device=x.device)
        return {
            "cache": cache * position[:, None],
            "top": top,
            "index": index.to(x.dtype),
            "mean": mean,
            "scale": scale,
            "last": last.sigmoid_(),
        }


def test_every_kind_of_call_is_followed(npu):
    torch.manual_seed(3)
    location = locate(case(Everything), 1, npu)
    assert location.first is None, location.sentences()
    names = [step.operator for step in location.steps]
    assert {"setitem", "mul_", "add_", "add", "topk", "lstm", "cat", "sigmoid_", "var_mean"} <= set(names)
    assert {step.operator for step in location.steps if step.note.startswith("random")} == {"rand", "dropout"}
    assert (
        max(step.inherited for step in location.steps if step.inherited == step.inherited) < 1e-4
    )  # writing in place reached the device's own copies


def test_the_devices_own_values_are_those_of_its_forward(npu):
    """What is inherited at the end is what a forward on the device differs by."""
    model = Model().eval()
    x = tokens(torch.Generator().manual_seed(1))
    with emulator.fault("aclnnSilu", "scale", by=1.01), torch.no_grad():
        location = locate(Case(name="small", model=lambda: model, inputs=tokens), 1, npu)
        import copy

        there = copy.deepcopy(model).to(npu.torch_device)(x.to(npu.torch_device)).cpu()
    here = model(x)
    assert location.steps[-1].inherited == pytest.approx(
        float((there.double() - here).norm() / here.double().norm()), rel=1e-3
    )


def test_gradients_are_looked_at_on_request(npu):
    with emulator.fault("aclnnLayerNormBackward", "scale", by=1.01):
        assert locate(case(), 1, npu).first is None
        location = locate(case(), 1, npu, backward=True)
    assert (location.first.module, location.first.operator) == (
        "blocks.0.norm",
        "layer_norm",
    ) and location.first.reasons[0].startswith("backward: ")
    assert locate(case(), 1, npu, backward=True).first is None


def test_modules_alone_are_a_first_look(npu):
    fault = emulator.Fault("aclnnAddmm", "scale", by=1.5)
    location = locate(broken("blocks.2.out", fault), 1, npu, level="modules")
    assert location.first.module == "blocks.2.out" and "is the first wrong module" in location.sentences()
    assert locate(case(), 1, npu, level="modules").first is None
    with pytest.raises(ValueError, match="there is no level 'layers'; there are auto, operators, modules"):
        locate(case(), 1, npu, level="layers")


class Lists(nn.Module):
    """Modules in a list, one that returns integers, one that returns nothing of tensors."""

    class Route(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    class Note(nn.Module):
        def forward(self, x):
            return None

    def __init__(self):
        super().__init__()
        self.layers, self.route, self.note = (
            nn.ModuleList([nn.Linear(32, 32) for _ in range(11)]),
            Lists.Route(),
            Lists.Note(),
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        self.note(x)
        return x + self.route(x)[..., None]


def test_modules_in_lists_are_looked_at_and_those_without_fractions_pass(npu):
    location = locate(case(Lists), 1, npu, level="modules")
    names = [*(f"layers.{number}" for number in range(11)), "route", ""]
    assert location.first is None and [step.module for step in location.steps] == names
    with emulator.fault("aclnnAddmm", "scale", by=1.5):
        assert locate(case(Lists), 1, npu, level="modules").first.module == "layers.0"


def test_a_model_that_takes_gradients_is_followed(npu):
    class Slope(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(F.layer_norm(x, (32,)).pow(2).sum(), x)[0]

    location = locate(case(Slope), 1, npu)
    assert location.first is None and location.has_gradients
    with emulator.fault("aclnnLayerNormBackward", "scale", by=1.5):
        assert locate(case(Slope), 1, npu, backward=True).first.operator == "layer_norm"


def test_what_cannot_be_made_again_is_noted_and_what_raised_first_has_no_repro_of_another(npu):
    class Odd(nn.Module):
        def forward(self, x):
            y = x.clone()
            y.data = x * 2
            sparse = x.to_sparse().to_dense()
            return torch.exp(y * 0.1) + F.silu(sparse)

    location = locate(case(Odd), 1, npu)
    assert not [step for step in location.steps if step.bad and step.operator not in ("to_sparse", "to_dense")]
    with emulator.fault("aclnnExp", "error"), emulator.fault("aclnnSilu", "scale", by=2.0):
        location = locate(case(Odd), 1, npu)
    assert location.first.operator in ("exp", "to_sparse", "to_dense") and location.replay is None


def test_when_the_time_is_over_what_was_not_looked_at_is_counted(npu):
    location = locate(case(), 1, npu, limit=0.0)
    assert not location.steps and location.unseen > 20
    expected = f"Nothing was looked at: the time was over before the first of {location.unseen}."
    assert location.sentences() == expected  # the first sentence, which alone stands in the list of rows, says why


# -------- repro, report


def trial_of(npu, func=F.linear, shapes=((4, 24, 32), (64, 32), (64,))):
    generator = torch.Generator().manual_seed(0)
    return Replay(
        func=func, args=tuple(torch.randn(shape, generator=generator) for shape in shapes), kwargs={}, device=npu
    )


def printed_error(text):
    return float(re.search(r"rel_l2 (\S+),", text)[1])


def test_a_repro_prints_the_error_in_a_process_of_its_own(npu, tmp_path):
    text = "aclnnAddmm:scale:by=1.01"
    fault = faults.parse(text)
    faults.plant(fault)
    try:
        made = write_repro(
            trial_of(npu), tmp_path / "row", title="linear is wrong", stack={"device": npu.name}, faults=[text]
        )
    finally:
        faults.remove(fault)
    assert (
        made.shows
        and printed_error(made.printed) == pytest.approx(0.01, rel=1e-3)
        and made.elements[1] < 10 < made.elements[0] == 4 * 24 * 32 + 64 * 32 + 64
    )
    script = (tmp_path / "row" / "repro.py").read_text()
    assert f"\n\nRun it in this folder: python -m harness emulate --fault {text} repro.py\n" in script
    assert made.command == f"python -m harness emulate --fault {text} {tmp_path / 'row' / 'repro.py'}"
    assert "import harness" not in script and "pickle" not in script and "torch.nn.functional.linear(" in script
    assert sorted(path.name for path in (tmp_path / "row").iterdir()) == [
        "inputs.safetensors",
        "printed.txt",
        "repro.py",
        "stack.json",
    ]


def test_a_repro_keeps_views_numbers_and_gradients(npu, tmp_path):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for number, replay in enumerate((
        Replay(func=torch.Tensor.exp, args=(x.t()[1:],), kwargs={}, device=npu),
        Replay(func=torch.softmax, args=(x[:, ::2],), kwargs={"dim": -1, "dtype": torch.float32}, device=npu),
        Replay(func=torch.Tensor.mul_, args=(x.clone(), 0.5), kwargs={}, device=npu),
        Replay(func=F.layer_norm, args=(x, (8,)), kwargs={}, device=npu).backward(),
    )):  # fmt: skip
        with emulator.fault("aclnn*", "scale", by=1.25):
            made = write_repro(replay, tmp_path / str(number), title="t", stack={}, faults=["aclnn*:scale:by=1.25"])
        assert made.printed.startswith("result 0 (") and made.shows, (number, made)


def test_a_repro_keeps_a_view_only_where_it_takes_one(npu, tmp_path):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    replay = Replay(func=torch.Tensor.exp, args=(x.t()[1:],), kwargs={}, device=npu)
    with changed("aclnnExp", only_views):
        small = reduced(replay)
        write_repro(replay, tmp_path, title="t", stack={}, seconds=2)
    assert not small.tensors[0].is_contiguous() and ".as_strided(" in (tmp_path / "repro.py").read_text()
    with emulator.fault("aclnnExp", "swap_rows"):
        small = reduced(replay)
        made = write_repro(replay, tmp_path, title="t", stack={}, faults=["aclnnExp:swap_rows"])
    assert (
        small.tensors[0].is_contiguous()
        and small.tensors[0].numel() < 5
        and made.shows
        and ".as_strided(" not in (tmp_path / "repro.py").read_text()
    )


def test_a_call_that_no_script_can_name_has_no_repro(npu, tmp_path):
    replay = Replay(func=lambda x: x, args=(torch.ones(3),), kwargs={}, device=npu)
    assert write_repro(replay, tmp_path / "row", title="t", stack={}) is None and not (tmp_path / "row").exists()


def test_a_call_is_made_smaller_as_long_as_it_is_wrong(npu):
    with emulator.fault("aclnnAddmm", "nan", at=0):
        small = reduced(trial_of(npu))
    assert sum(tensor.numel() for tensor in small.tensors) < 10
    assert reduced(trial_of(npu)).args[0].shape == (4, 24, 32)  # it is not wrong: it stays


def test_a_copy_has_the_strides_of_what_it_copies(npu):
    x = torch.randn(5, 6, 7)[:, 1::2].transpose(0, 2)
    there = copy_strided(x, npu.torch_device)
    assert there.stride() == x.stride() and torch.equal(there.cpu(), x)
    assert copy_strided(torch.ones(3).expand(4, 3), npu.torch_device).stride() == (0, 1)


def test_no_cause_is_named_where_nothing_explains(npu):
    replay = trial_of(npu)
    results = replay.on_cpu()
    with emulator.fault("aclnnAddmm", "swap_heads", heads=4):
        assert cause_of(replay, replay.on_device(), results) == ""
    assert cause_of(replay, results, results) == ""


def test_what_a_sound_device_rounds_is_named_with_what_turning_it_off_gives(npu):
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(24, 32, 3)

        def forward(self, x):
            return F.gelu(self.conv(x))

    location = locate(case(Convolved), 1, npu)
    conv, gelu = location.steps
    assert (
        location.first is None
        and 1e-5 < conv.own < 1e-3
        and conv.cause.startswith("HF32 is on: with torch.npu.conv.allow_hf32 = False it is ")
    )
    assert float(conv.cause.rpartition(" ")[2]) < 1e-6 and torch.npu.conv.allow_hf32
    assert "GELU takes its tanh formula here whatever is asked for" in gelu.cause
    assert (
        f"{max(conv, gelu, key=lambda value: value.own).name}: " in location.sentences()
        and "use_compatible_impl" in found_text(located(location))
    )
    with npu.in_float32("conv"):
        assert not locate(case(Convolved), 1, npu).steps[0].cause and not torch.npu.conv.allow_hf32
    x = torch.randn(64)
    replay = Replay(func=F.gelu, args=(x,), kwargs={}, device=npu)
    assert cause_of(replay, replay.on_device(), replay.on_cpu()) == "it computes GELU by its tanh formula"


@needs_torch_npu
def test_a_model_that_is_another_beside_an_npu_is_said_to_be(tmp_path):
    run = emulated(TRAP.partition("    how = ")[0] + LOCATED, path=tmp_path / "trap.py")
    assert run.returncode == 0, run.stderr
    sdpa, eager, odd, counted = run.stdout.strip().splitlines()
    assert all("another" not in item for item in (odd, counted))
    assert re.search(
        r"But the model is another where torch_npu is: "
        r"what it gives on the CPU of this process is \d\.\d\de-0[12] away",
        sdpa,
    )
    assert eager.startswith("No operator is wrong") and "another" not in eager


LOCATED = """
    from harness import Case
    from harness.locate import locate

    for attention in ("sdpa", "eager"):
        inputs = lambda generator: torch.randn(1, 3, 32, 32, generator=generator)
        forward = lambda model, x: model(x).last_hidden_state
        case = Case(name="swin", model=lambda: built(attention), inputs=inputs, forward=forward)
        print(locate(case, 1, open_device("emulated")).sentences())
    calls = []
    odd = lambda model, x: model(x).last_hidden_state.index_fill(1, torch.tensor([0], device=x.device), float("nan"))
    counted = lambda model, x: (calls.append(0), model(x).last_hidden_state + len(calls))[1]
    for forward in (odd, counted):
        case = Case(name="swin", model=lambda: built("eager"), inputs=inputs, forward=forward)
        print(locate(case, 1, open_device("emulated")).sentences())
"""


@pytest.mark.parametrize(("operator", "wrong"), [("aclnnInplaceAdd", True), ("aclnnAdd", False)])
def test_an_operator_is_judged_as_it_runs_unwatched(npu, operator, wrong):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(24, 16)

        def forward(self, x):
            return self.out(x.transpose(1, 2))

    with emulator.fault(operator, "scale", by=1.01):
        location = locate(case(Turned), 1, npu)
    assert (location.first is not None) is wrong and (
        not wrong or (location.first.module, location.first.operator) == ("out", "linear")
    )


def test_an_operator_that_falls_back_is_named(npu):
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.i0(x + 1)

    location = locate(case(Bessel), 1, npu)
    assert [item.operator for item in location.fallen] == ["special_i0"] and location.ranking(1) == location.fallen
    assert re.search(
        r"1 fell back to the CPU, the first is the model: special_i0 \(test_locate.py:\d+\) \(aten::",
        location.sentences(),
    )
    assert "the CPU computes it in place of the device: aten::" in found_text(located(location))
    allowed = location.fallen[0].note.partition(": ")[2].split(", ")
    assert not locate(replace(case(Bessel), fallbacks=tuple(allowed)), 1, npu).fallen

    class Random(nn.Module):
        def forward(self, x):
            return F.silu(x) + 0 * torch.poisson(x.abs())

    location = locate(case(Random), 1, npu)
    assert (
        [item.operator for item in location.fallen] == ["poisson"]
        and "random" in location.fallen[0].note
        and "The largest own difference" in location.sentences()
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("offset", {"by": 1e-3}), ("scale", {"by": 1.002}), ("zero_rows", {"at": 2}), ("tail", {"size": 1})],
)
def test_small_damage_is_no_rounding(npu, dtype, kind, more):
    class Sum(nn.Module):
        def forward(self, x):
            return x + x.flip(-1) * 0.5

    settings = {"float16": {}, "bfloat16": {"by": {"offset": 4e-3, "scale": 1.01}.get(kind)}}[dtype]
    with emulator.fault(
        "aclnnAdd", kind, **{**more, **{name: setting for name, setting in settings.items() if setting}}
    ) as fault:
        location = locate(case(Sum, dtype=dtype), 1, npu)
    assert fault.hits and location.first is not None and location.first.operator == "add"


def test_differences_of_what_is_not_finite():
    inf, nan = math.inf, math.nan
    base = torch.tensor([1.0, 2.0, inf, nan])
    assert relative_difference(base, base.clone()) == 0 and relative_difference(
        torch.tensor([1.0, 2.0, -inf, nan]), base
    ) == inf == relative_difference(torch.tensor([1.0, 2.0, nan, nan]), base)
    assert (
        relative_difference(torch.tensor([1.0, 4.0, inf, nan]), base) == pytest.approx(2 / math.sqrt(5))
        and relative_difference(torch.tensor([nan]), torch.tensor([nan])) == 0
    )
    large = torch.tensor([3e38, -3e38])
    assert (
        relative_difference(-large, large) == pytest.approx(2)
        and relative_difference(torch.tensor([0.0]), torch.tensor([0j])) == 0
    )
    assert (
        relative_difference(torch.tensor([1j]), torch.tensor([1.0 + 0j])) == pytest.approx(math.sqrt(2))
        and relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    )
    assert relative_difference(torch.tensor([60000.0]).half(), torch.tensor([-60000.0]).half()) == pytest.approx(2)
    tiny = torch.tensor([1e-200], dtype=torch.float64)
    assert relative_difference(2 * tiny, tiny) == pytest.approx(1) and relative_difference(
        torch.tensor([1.0, inf]), torch.tensor([1.5, inf]).half()
    ) == pytest.approx(1 / 3)


def _at(number, change):
    """Change one element of the first result, that which is nearest to a number."""

    def spoil(result):
        flat = result[0].view(-1)
        place = int((flat.abs() - number).abs().argmin())
        flat[place] = change(flat[place])

    return spoil


def _off(result):
    result[-1].view(-1)[7] += 1


DAMAGE = {
    "an index of topk": (torch.topk, (600, 64), (16,), _off),
    "an index of max": (torch.max, (2000, 64), (1,), _off),
    "a small element that is zero": (torch.mul, (257, 1024), (1.0,), _at(0.02, lambda x: 0 * x)),
    "a column that is zero": (
        torch.mul,
        (257, 1024),
        (torch.cat([torch.full((1,), 1e-2), torch.ones(1023)]),),
        lambda found: found[0][:, :1].mul_(0),
    ),
    "a factor": (
        torch.mul,
        (64, 64),
        (1.0,),
        lambda found: found[0].copy_(found[0].float() * (1 + torch.finfo(found[0].dtype).eps * 0.75)),
    ),
    "a row of noise": (
        torch.relu,
        (64, 64),
        (),
        lambda found: found[0][3].mul_(1 + 8 * torch.finfo(found[0].dtype).eps * torch.randn(64)),
    ),
    "a summand": (
        torch.add,
        (64, 64),
        (2.0,),
        lambda found: found[0].copy_(found[0].float() + torch.finfo(found[0].dtype).eps),
    ),
    "a dtype": (torch.mul, (64, 64), (1.0,), lambda found: found.append(found.pop(0).double())),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_the_judge_fails_is_not_taken_for_roundings(npu, name, dtype):
    func, shape, more, spoil = DAMAGE[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if name == "a small element that is zero":
        x[:, 5] *= 40  # beside a channel of large ones
    replay = Replay(
        func=func,
        args=(x, *(tensor.to(dtype) if isinstance(tensor, torch.Tensor) else tensor for tensor in more)),
        kwargs={},
        device=npu,
    )
    results = replay.on_cpu()
    outcome = [result.clone() for result in results]
    assert is_explained(outcome, results, func.__name__)
    spoil(outcome)
    assert replay.judged(outcome, results)[1] and not is_explained(outcome, results, func.__name__)


def test_a_finding_is_a_table_and_a_picture(npu):
    fault = emulator.Fault("aclnnAddmm", "scale", by=1.5)
    location = locate(broken("blocks.2.out", fault), 1, npu)
    kept = json.loads(json.dumps(to_json(located(location)), allow_nan=False))
    text = found_text(reader_of(Located)(kept))
    assert text.startswith("**blocks.2.out: linear (module.py") or (
        text.startswith("**blocks.2.out: linear (") and "| blocks.2.out" in text
    )
    picture = depth_picture(location)
    assert picture.count("<circle") == 1 and "blocks.2.out linear" in picture and picture.startswith("<svg")
    chinese = depth_picture(location, LANGUAGES["zh"])
    assert "个算子" in chinese and "operators" not in chinese and "operators" in picture
    assert "<circle" not in depth_picture(replace(location, steps=())) and math.isfinite(location.steps[0].own)


# -------- in the flow

FAILING = (
    CASE
    + """
SMALL = case(tolerance=Tolerance(preset="floor"))

@pytest.mark.parametrize("seed", [1, 2], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    precision(SMALL, seed)
"""
)


@needs_torch_npu
def test_a_failing_row_is_located_by_itself(user):
    write(user, FAILING)
    result = user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnSilu:scale:by=1.1")
    assert result.ret == 1
    first, second = stored(user)["rows"]
    assert (
        first["located"]["ranking"][0]["operator"] == "silu"
        and first["located"]["ranking"][0]["module"] == "1"
        and second["located"] is None
    )
    assert first["located"]["repro"]["shows"] and printed_error(first["located"]["repro"]["printed"]) == pytest.approx(
        0.1, rel=1e-3
    )
    folder = user.path / "reports" / "repro" / "small-float32-seed1"
    assert {path.name for path in folder.iterdir()} == {
        "depth.svg",
        "inputs.safetensors",
        "printed.txt",
        "repro.py",
        "stack.json",
    }
    text = (user.path / "reports" / "precision.md").read_text()
    command = f"python -m harness emulate --fault aclnnSilu:scale:by=1.1 {folder}/repro.py"
    assert f"Repro: {command} (" in text and "input elements). It printed: result 0 (" in text
    assert "is the first wrong operator" in text and "![error over depth](repro/small-float32-seed1/depth.svg)" in text
    assert "located small float32 seed 1: 1: silu is the first wrong operator" in result.stdout.str()


@needs_torch_npu
def test_locating_can_be_left_out_or_run_out_of_its_budget(user):
    write(user, FAILING)
    fault = ("--device", "emulated", "--fault", "aclnnSilu:scale:by=1.1")
    assert user.runpytest_inprocess(*fault, "--locate=off").ret == 1
    assert (
        all(row["located"] is None for row in stored(user)["rows"]) and not (user.path / "reports" / "repro").exists()
    )
    result = user.runpytest_inprocess(*fault, "--locate-budget=0")
    assert (
        "2 failing rows were not located: the budget of 0 s is spent; --precision-locate-budget" in result.stdout.str()
    )
    assert user.runpytest_inprocess(*fault, "--locate=modules").ret == 1
    assert "1: SiLU is the first wrong module" in stored(user)["rows"][0]["located"]["said"]


@needs_torch_npu
def test_the_command_locates_a_row_that_passes(user):
    write(user, FAILING)

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "harness", "locate", *arguments, "--device", "emulated"],
            cwd=user.path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    status, said = command("small", "--seed", "2", "--cases", ".")
    assert status == 0 and "No operator is wrong: each of " in said and "| 0 " in said
    rows = json.loads((user.path / "reports" / "located" / "precision.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [2] and rows[0]["status"] == "PASS" and rows[0]["located"]["first"] is None
    status, said = command("large", "--cases", ".")
    assert status == 1 and "no accuracy test is of the case 'large', or has it in its id; of 1 cases" in said
    assert " the nearest are small\n" in said and not (user.path / "reports" / "located" / "precision.json").exists()
    status, said = command("small", "--cases", "nowhere")
    assert status == 1 and "no cases at nowhere" in said


def test_faults_are_planted_in_models_of_half_dtypes_too(npu):
    """The hooks that tell the module are in every copy of the model, the one that was cast among them."""
    from harness.conformance import locating
    from harness.conformance.detection import SUBJECTS

    bed = locating.Bed(next(item for item in SUBJECTS if item.name == "aimv2"), "float16", npu)
    assert sum(bool(census.names) for census in bed.census.values()) > 10
    result = list(locating.spread(bed, "nan", 2))
    assert len(result) == 2 and all(item.exact and item.target.module for item in result), result


def test_localisation_is_put_to_the_test(npu):
    from harness.conformance import locating
    from harness.conformance.detection import SUBJECTS

    subject = next(item for item in SUBJECTS if item.name == "aimv2")
    bed = locating.Bed(subject, "float32", npu)
    result = [next(locating.spread(bed, kind, 1)) for kind in ("scale", "stale")] + list(locating.spread(bed, "nan", 2))
    assert len({item.target.operator for item in result}) > 2 and len({item.target.depth for item in result}) > 2
    assert all(item.exact for item in result), result
    assert not list(locating.spread(bed, "mask", 1))  # it has none
    mean = next(target for target in locating.targets(bed) if target.operator == "aclnnPowTensorScalar")
    lost = locating._tried(bed, mean, "swap_heads", {})  # the addends of a mean in another order
    assert (
        not lost.exact
        and lost.lost
        and lost.own > 0
        and "nothing: the operator is within its floor" in locating.text([lost], [])
    )
    one = roundoff(
        torch.float32
    )  # a fault that leaves more than a rounding beside what a healthy run shows is not lost
    assert replace(lost, own=lost.sound + 0.9 * one).lost and not replace(lost, own=lost.sound + 1.1 * one).lost
    said = locating.text(result, [bed.healthy])
    assert (
        said.startswith("# Localisation\n\n4 faults in 4 places")
        and "| nan | 2 | 2 | 2 | 0 |" in said
        and "| aimv2 | float32 | 148 | none |" in said
    )
