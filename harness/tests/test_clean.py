"""The process without torch_npu: what it keeps right, what comes back from it, and how it ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from torch import nn

from harness import open_device
from harness.errors import CaseError, RunError
from harness.reference import run_cpu
from harness.reference.isolated_process import WHERE, CleanProcess, needs_clean
from harness.tests.execute import ROOT, emulated
from harness.tests.needs import needs_torch_npu

CPU = dict(forward=None, dtype=torch.float32)
SENT = []  # a line for each time that a Tied was pickled here


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.act = lambda x: x.relu()
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.act(self.second(self.first(x))) * self.scale

    def __getstate__(self):
        SENT.append("sent")
        return self.__dict__


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("no such head")


class Wordy(nn.Module):
    def forward(self, x):
        return x, {"words"}


@pytest.fixture(scope="module")
def clean():
    process = CleanProcess()
    yield process
    process.close()


@pytest.fixture
def x():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(2))


def seen_there():
    from harness.reference import isolated_process as clean

    compiler = "torch._inductor.config" in sys.modules
    return (
        os.getpid(),
        len(clean._models),
        sys.modules.get("torch_npu", "not asked for"),
        hasattr(torch, "npu"),
        compiler,
    )


def torch_brings_the_compiler():
    """Whether `import torch` alone imports it, as torch 2.5 does."""
    code = "import sys, torch; print('torch._inductor.config' in sys.modules)"
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "True"
    )


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_soon(pid):
    until = time.monotonic() + 60  # it may be importing torch, which an older one takes long for
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


# -------- the mask trap

TRAP = """
import json, os, sys, torch
from harness.devices import open_device

if __name__ == "__main__":
    open_device("emulated")
    from harness.reference.isolated_process import CleanProcess
    clean = CleanProcess()
    clean.start()

from transformers import SwinConfig, SwinModel


class Swin(SwinModel):  # of the program itself, which the other process can only find by its file
    pass


def built(attention):
    sizes = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, patch_size=2, image_size=32)
    config = SwinConfig(**sizes, attn_implementation=attention)
    torch.default_generator.manual_seed(0)
    model = Swin(config).eval().requires_grad_(False)
    for module in model.modules():  # the bias that is passed as a mask starts as zeros
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.normal_(module.relative_position_bias_table)
    return model


def seen():
    from transformers.utils import is_torch_npu_available

    emulated = "EMULATED_CANN_MACHINE" in os.environ
    return [is_torch_npu_available(), sys.modules["torch_npu"] is not None, hasattr(torch, "npu"), emulated]


if __name__ == "__main__":
    from harness.reference.isolated_process import needs_clean
    from harness.reference import run_cpu
    from harness.reference.store import code_digest

    how = dict(forward=lambda model, x: model(x).last_hidden_state, dtype=torch.float32)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = built("sdpa")
    right = run_cpu(built("eager"), x, **how)[0]
    here = run_cpu(model, x, **how)[0]
    there = clean.forward(model, x, **how).outputs["output"]
    far = lambda tensor: float((tensor - right).norm() / right.norm())
    digests = [code_digest(model, how["forward"]), clean.run(code_digest, model, how["forward"])]
    try:
        error = clean.forward(model, x.to("npu"), **how)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    seen = [seen(), clean.run(seen)]
    told = dict(here=far(here), there=far(there), seen=seen, needs=needs_clean(model), digests=digests)
    print(json.dumps(dict(told, pid=clean.pid, error=error)))
"""


@needs_torch_npu
def test_an_additive_mask_is_lost_where_an_npu_is_seen_and_kept_in_the_clean_process(tmp_path):
    run = emulated(TRAP, path=tmp_path / "trap.py")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["here"] > 0.01  # relative L2 error of the CPU's own result, beside the NPU that transformers sees
    assert result["there"] < 1e-5
    assert result["seen"] == [[True, True, True, True], [False, False, False, True]]
    assert result["needs"] is True
    assert result["digests"][0] == result["digests"][1]
    assert result["error"].startswith("CaseError: a tensor on npu:0 cannot be sent")
    assert ends_soon(result["pid"])  # with the program, which never closed it


def _patched(x):
    return torch.npu.synchronize() if hasattr(torch, "npu") else x


class AsksItself(nn.Module):
    def forward(self, x):
        from diffusers.utils import is_torch_npu_available

        return x if is_torch_npu_available() else x + 1


class AsksByAFunction(nn.Module):
    def forward(self, x):
        return _patched(x)


class AsksInside(nn.Module):
    @property
    def kernel(self):
        return [(lambda: torch_npu.npu_geglu(item)) for item in (1,)]  # noqa: F821

    def forward(self, x):
        return self.kernel


class AsksNothing(nn.Module):
    """Its module does (torch.npu)."""

    def forward(self, x):
        return x * 2 if x.device.type == "npu" else x


@pytest.mark.parametrize("kind", [AsksItself, AsksByAFunction, AsksInside])
def test_models_whose_code_asks_for_an_npu_need_it(kind):
    assert needs_clean(nn.Sequential(kind())) and not needs_clean(nn.Sequential(AsksNothing()))

    class Here(kind):  # cannot be imported by another process
        pass

    assert not needs_clean(Here())


def test_only_models_of_transformers_need_it():
    assert not needs_clean(nn.Sequential(nn.Linear(2, 2), Tied()))
    theirs = type("Attention", (nn.Module,), {"__module__": "transformers.models.any.modeling_any"})
    assert needs_clean(nn.Sequential(nn.Linear(2, 2), theirs()))
    assert needs_clean(type("Mine", (theirs,), {"__module__": "mine"})())
    assert not needs_clean(type("Other", (nn.Module,), {"__module__": "transformers_of_mine"})())


# -------- what goes and comes


def test_it_computes_what_this_process_computes_to_the_bit(clean, x):
    model = Tied()
    expected, _, words = run_cpu(model, x, **CPU)
    there = clean.forward(model, x, **CPU)
    outputs, milliseconds, words_there = there.outputs, there.milliseconds, there.words
    assert torch.equal(outputs["output"], expected)
    assert words_there == f"{words}, {WHERE}" and milliseconds > 0
    scale = 3.0
    forward = lambda model, given: {"a": model(**given) * scale, "b": [given["x"][1:2]]}
    named = clean.forward(model, {"x": x}, forward=forward, dtype=torch.float32).outputs
    assert torch.equal(named["a"], expected * scale) and torch.equal(named["b.0"], x[1:2])
    assert clean.run(seen_there)[2:] == (
        None,
        False,
        torch_brings_the_compiler(),
    )  # importing it would double the time of its start


def test_a_model_is_sent_once_again_when_it_changed_and_kept_no_longer_than_here(clean, x):
    model, other = Tied(), Tied()
    SENT.clear()
    for _ in range(3):
        clean.forward(model, x, **CPU)
        clean.forward(other, x, **CPU)
    assert len(SENT) == 2
    before = clean.run(seen_there)[1]
    model.scale.mul_(2)
    assert torch.equal(clean.forward(model, x, **CPU).outputs["output"], model(x))
    assert len(SENT) == 3 and clean.run(seen_there)[1] == before
    del other
    clean.forward(model, x, **CPU)
    assert clean.run(seen_there)[1] < before


def _the_same(*values):
    return values


def test_tensors_come_back_as_they_were_and_share_what_they_shared(clean):
    base = torch.arange(12.0).reshape(3, 4)
    given = [
        base,
        base.t(),
        base[1:],
        torch.tensor(True),
        torch.zeros(0, 3),
        base.bfloat16(),
        torch.complex(base, base),
        torch.tensor(float("nan")),
    ]
    back = clean.run(_the_same, *given)
    for one, other in zip(given, back, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
    back[0][2, 3] = 50
    assert back[1][3, 2] == 50 and back[2][1, 3] == 50 and base[2, 3] == 11


def _numbers_there():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.rand(3)


def test_threads_defaults_and_random_numbers_are_those_of_here(clean):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        there = clean.run(_numbers_there)
        here = _numbers_there()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert there[:2] == here[:2] == (1, torch.float64)
    assert torch.equal(there[2], here[2])
    assert clean.run(_numbers_there)[:2] == (threads, torch.float32)


def test_a_class_of_a_file_that_no_import_finds_is_taken_from_its_file(clean, tmp_path, monkeypatch):
    folder = tmp_path / "cases_of_somebody"
    folder.mkdir()
    (folder / "beside.py").write_text("FACTOR = 3\n")
    file = folder / "test_mine.py"
    text = (
        "from torch import nn\nfrom .beside import FACTOR\n\nclass Mine(nn.Module):\n    def forward(self, x):\n   "
        "     return x * FACTOR\n"
    )
    file.write_text(text)
    monkeypatch.setitem(sys.modules, folder.name, types.ModuleType(folder.name))  # as pytest does
    for name, path in (("cases_of_somebody.beside", folder / "beside.py"), ("cases_of_somebody.test_mine", file)):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    assert torch.equal(clean.forward(module.Mine(), torch.ones(2), **CPU).outputs["output"], torch.full((2,), 3.0))
    assert (
        clean.forward(nn.Identity(), torch.ones(2), forward=lambda model, x: x * 4, dtype=torch.float32)
        .outputs["output"]
        .sum()
        == 8
    )


# -------- what goes wrong


def test_what_is_raised_there_comes_back_with_its_type_and_text(clean, x):
    with pytest.raises(RunError, match="on the CPU: ValueError: no such head") as caught:
        clean.forward(Failing(), x, **CPU)
    assert "in forward" in str(caught.value.__cause__)
    with pytest.raises(CaseError, match="wordy returned a set at '1' where a tensor was expected"):
        clean.forward(Wordy(), x, what="wordy", **CPU)
    with pytest.raises(RunError, match=f"{WHERE}: ZeroDivisionError: "):
        clean.run(divmod, 1, 0)
    with pytest.raises(RunError, match="SystemExit: 3"):
        clean.run(sys.exit, 3)
    with pytest.raises(
        RunError, match="ModuleNotFoundError: .*torch_npu.*; import it inside the function that needs it"
    ):
        clean.run(importlib.import_module, "torch_npu")
    assert clean.run(abs, -1) == 1


def test_what_cannot_be_sent_is_told_with_what_to_do(clean, x):
    class Local(nn.Module):
        pass

    pid = clean.run(os.getpid)
    with pytest.raises(
        CaseError, match="cannot be pickled .*<locals>.Local.*; define every class at the top level of a module"
    ):
        clean.forward(Local(), x, **CPU)
    with pytest.raises(CaseError, match="what was returned cannot be pickled"):
        clean.run(open, os.devnull)
    with open(os.devnull) as file, pytest.raises(CaseError, match="cannot pickle '.*TextIOWrapper'"):
        clean.run(print, file)
    assert clean.run(os.getpid) == pid


def test_when_it_dies_that_is_told_and_the_next_call_starts_another(clean, x):
    model = Tied()
    clean.forward(model, x, **CPU)
    pid = clean.pid
    with pytest.raises(
        RunError, match="died of SIGKILL; the system may have run out of memory; the next run starts another"
    ):
        clean.run(os.kill, pid, signal.SIGKILL)
    assert clean.pid is None
    assert torch.equal(clean.forward(model, x, **CPU).outputs["output"], model(x))
    assert clean.pid not in (None, pid)
    with pytest.raises(RunError, match="ended with exit status 3"):
        clean.run(os._exit, 3)


ORPHAN = (
    "import time\nfrom harness.reference.isolated_process import CleanProcess\nc = "
    "CleanProcess()\nc.start()\nprint(c.pid, flush=True)\nc.run(time.sleep, 60)\n"
)


def test_it_ends_when_this_process_is_killed():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        parent.kill()
    assert ends_soon(pid)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))

    def forward(self, x):
        return self.layer(x)


def test_parametrized_modules_are_sent_too(clean):
    """As of weight_norm, in wav2vec2: torch refuses to pickle them, since their class is made at run time."""
    torch.manual_seed(0)
    model, x = Normed().eval().requires_grad_(False), torch.randn(2, 4, 9)
    result = clean.forward(model, x, **CPU).outputs
    assert torch.equal(result["output"], model(x))


@needs_torch_npu
def test_models_that_record_their_hidden_states_do_so_there(clean):
    """transformers notes which outputs a model can record when it is built; a model that is sent was not built
    there.
    """
    open_device("emulated")  # transformers imports torch_npu
    from transformers import SegformerConfig, SegformerModel

    sizes = dict(
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_attention_heads=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
    )
    torch.manual_seed(0)
    model = SegformerModel(SegformerConfig(**sizes, mlp_ratios=[2, 2], image_size=32)).eval().requires_grad_(False)
    x = {"pixel_values": torch.randn(1, 3, 32, 32), "output_hidden_states": True}
    result = clean.forward(model, x, forward=hidden_states, dtype=torch.float32).outputs
    expected = model(**x).hidden_states
    assert len(result) == len(expected) == 2
    assert all(torch.equal(result[str(index)], item) for index, item in enumerate(expected))


def hidden_states(model, inputs):
    return model(**inputs).hidden_states
