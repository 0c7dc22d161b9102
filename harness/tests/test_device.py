"""Devices: a named one is a promise, auto emulates only where nothing of Ascend is, and every refusal says what to
do.
"""

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from harness import emulator, open_device
from harness.devices import npu as npu_module
from harness.devices.npu import task_queue
from harness.emulator import build
from harness.errors import DeviceError
from harness.tests.environment import of_a_shell
from harness.tests.needs import emulated_device, needs_torch_npu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emulated():
    return emulated_device()


def child(code, **environment):
    prepared = of_a_shell(**environment)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=prepared, capture_output=True, text=True, timeout=120
    )


def refusal(spec, **environment):
    """What opening a device says in a fresh process that has no emulated CANN yet."""
    code = (
        f"import harness\ntry:\n    print('opened', harness.open_device({spec!r}).backend)\nexcept "
        "harness.DeviceError as error:\n    print(error)"
    )
    done = child(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("spec", ["tpu", "npu:", "npu:x", "cpu:1", "cuda:-1", "NPU", "", "emulated:0"])
def test_a_word_that_is_no_device_lists_those_that_are(spec):
    with pytest.raises(ValueError, match="auto, npu.:n., emulated, cuda.:n. or cpu"):
        open_device(spec)


@needs_torch_npu
def test_npu_without_cann_is_refused_and_says_how_to_set_it_up():
    words = refusal("npu")
    assert f"torch_npu {metadata.version('torch_npu')} is installed, but CANN cannot be loaded (libhccl.so:" in words
    assert "set_env.sh" in words and "\n" not in words


@needs_torch_npu
def test_auto_emulates_where_there_is_no_trace_of_ascend():
    assert refusal("auto") == "opened emulated"


@needs_torch_npu
@pytest.mark.parametrize("name", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_auto_never_emulates_where_there_is_a_trace(name):
    words = refusal("auto", **{name: "/usr/local/Ascend/latest"})
    assert words.startswith(f"there is a trace of an NPU here ({name}=/usr/local/Ascend/latest) but it does not answer")
    assert "so nothing is emulated in its place" in words
    assert refusal("emulated", **{name: "/usr/local/Ascend/latest"}) == "opened emulated"


def test_auto_sees_a_card_and_a_library(monkeypatch):
    monkeypatch.setattr(emulator, "installed", lambda: False)
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(npu_module.glob, "glob", lambda pattern: ["/dev/davinci0", "/dev/davinci1"])
    assert npu_module.traces_of_ascend() == ["/dev/davinci0"]
    monkeypatch.setattr(npu_module.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(npu_module, "loads", lambda library: None)
    assert npu_module.traces_of_ascend() == ["a loadable libascendcl.so"]
    monkeypatch.setattr(npu_module, "loads", lambda library: "no such file")
    assert npu_module.traces_of_ascend() == []


def test_the_emulated_libraries_alone_are_no_card(emulated):
    """A child process may lose ASCEND_HOME_PATH and still find the libraries: it must not take them for a card."""
    paths = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]}
    assert "inherits it; start it from a shell, or use --device emulated" in refusal("npu", **paths)
    assert refusal("auto", **paths) == "opened emulated"


def test_a_child_of_an_emulated_process_is_emulated_too(emulated):
    code = "import harness; print(harness.open_device('auto').backend)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "emulated", done.stderr


def test_a_card_that_is_not_there_is_refused_with_those_that_are(emulated):
    with pytest.raises(DeviceError, match=r"npu:3 was asked for and torch_npu 9 finds 1 NPU \(npu:0\)"):
        npu_module.answering(3, "torch_npu 9")


def test_no_card_is_refused(emulated, monkeypatch):
    monkeypatch.setattr(torch.npu, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="finds 0 NPUs .no card answers: is ASCEND_RT_VISIBLE_DEVICES set"):
        npu_module.answering(0, "torch_npu 9")


def test_a_card_that_computes_wrongly_or_not_at_all_is_refused(emulated):
    with (
        emulator.fault("aclnnAdd*", kind="offset", by=1.0),
        pytest.raises(DeviceError, match="npu:0 computes wrongly: the sum of two twos is"),
    ):
        npu_module.answering(0, "torch_npu 9")
    with emulator.fault("aclnnAdd*", kind="error"), pytest.raises(DeviceError, match="npu:0 does not answer"):
        npu_module.answering(0, "torch_npu 9")


def test_a_planted_fault_is_no_reason_to_call_a_device_dead(emulated):
    with emulator.fault("aclnnAdd*", kind="scale", by=2.0):
        emulated.check()


@pytest.mark.parametrize("kind", ["scale", "stale", "error"])
def test_a_device_that_stopped_computing_is_noticed_and_stays_stopped(emulated, monkeypatch, kind):
    """`stale` is what torch_npu's queue does after an error: nothing is written, and memory shows what it held."""
    device = open_device("emulated")
    device.check("the row before")
    said = "the device stopped computing at model float32 seed 3: .*run the rows that are left in another process"
    with monkeypatch.context() as patch, emulator.fault("aclnnAdd*", kind=kind, by=2.0):
        patch.setattr(emulator.faults, "suspended", contextlib.nullcontext)
        with pytest.raises(DeviceError, match=said):
            device.check("model float32 seed 3")
    with pytest.raises(DeviceError, match="stopped computing at model float32 seed 3"):  # sound again, not trusted
        device.check("the row after")


def test_a_check_asks_what_was_never_asked(emulated, monkeypatch):
    """Memory that holds the answer to an earlier check must not pass for an answer."""
    asked, equal = [], torch.equal
    monkeypatch.setattr(
        torch, "equal", lambda answer, expected: asked.append(expected.tolist()) or equal(answer, expected)
    )
    emulated.check()
    emulated.check()
    first, second = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert [len(item) for item in first] == [len(item) for item in second] == [4, 1000, 100_000]
    assert all(sum(a == b for a, b in zip(one, other)) < len(one) / 100 + 1 for one, other in zip(first, second))


def test_a_process_that_is_emulated_opens_no_card(emulated):
    with pytest.raises(DeviceError, match="plays an emulated CANN and cannot open a card"):
        open_device("npu")


def test_torch_npu_that_does_not_fit_torch_is_refused(monkeypatch):
    monkeypatch.setattr(build.metadata, "version", lambda name: {"torch": "2.9.0+cpu"}.get(name, "2.13.0"))
    monkeypatch.setattr(build.metadata, "requires", lambda name: ["pyyaml", "torch==2.13.0"])
    with pytest.raises(
        DeviceError,
        match=r"torch_npu 2.13.0 needs torch 2.13.0 and torch 2.9.0\+cpu is installed: pip install torch==2.13.0",
    ):
        build.wheel_version()


def test_torch_npu_that_is_not_there_is_refused(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build.metadata, "version", absent)
    with pytest.raises(
        DeviceError, match=r"torch_npu is not installed; .* pip install -e '.\[emulated\]' .* --device cpu"
    ):
        build.wheel_version()
    monkeypatch.setattr(build.sys, "platform", "darwin")
    with pytest.raises(DeviceError, match="Linux only and this is darwin; use --device cpu"):
        build.wheel_version()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="cuda:1 was asked for and no CUDA device answers"):
        open_device("cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_answers():
    device = open_device("cuda")
    assert device.backend == "cuda" and device.stack.cuda == torch.version.cuda
    with pytest.raises(DeviceError, match="was asked for and there"):
        open_device("cuda:99")


@needs_torch_npu
def test_the_package_and_the_help_work_where_import_torch_alone_raises():
    """torch_npu is installed here and CANN is not: a bare `import torch` fails."""
    assert child("import torch").returncode != 0
    assert (
        child(
            "import harness; import torch; print(harness.compare(torch.ones(2), torch.ones(2)).max_diff)"
        ).stdout.strip()
        == "0.0"
    )
    environment = of_a_shell()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "--device=DEVICE" in done.stdout


# -------- stack and watch


def test_the_stack_says_where_and_under_which_switches(emulated):
    stack = emulated.stack
    assert (stack.device, stack.backend, stack.device_count) == ("Ascend910B4", "emulated", 1)
    assert stack.torch_npu == metadata.version("torch_npu") and len(stack.torch_npu_git) == 40
    assert "emulated" in stack.cann and stack.driver is None and stack.firmware is None
    assert (stack.conv_allow_hf32, stack.matmul_allow_hf32, stack.jit_compile) == (True, False, False)
    assert stack.threads == torch.get_num_threads()
    json.dumps(stack.to_dict(), allow_nan=False)


def test_the_stack_is_read_when_it_is_asked_for(emulated):
    torch.npu.conv.allow_hf32 = False
    try:
        assert emulated.stack.conv_allow_hf32 is False
    finally:
        torch.npu.conv.allow_hf32 = True
    assert emulated.stack.conv_allow_hf32 is True


def test_the_stack_says_which_queue_is_in_force(monkeypatch):
    both = {"TASK_QUEUE_ENABLE": "2", "ASCEND_LAUNCH_BLOCKING": "1"}
    for variables, mode in (({}, 1), ({"TASK_QUEUE_ENABLE": "0"}, 0), ({"TASK_QUEUE_ENABLE": "2"}, 2), (both, 0)):
        with monkeypatch.context() as patch:
            for name in ("TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            assert task_queue.__wrapped__() == mode


@needs_torch_npu
def test_operators_are_launched_at_once_but_for_timing():
    code = "import harness, os; device = harness.open_device('emulated'{more})\n"
    code += "print(device.stack.task_queue, os.environ.get('TASK_QUEUE_ENABLE'))"
    own = ("ASCEND", "TORCH_DEVICE", "TASK_QUEUE")
    unset = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    chosen = {"TASK_QUEUE_ENABLE": "2"}
    for more, variables, words in (("", {}, "0 0"), (", timing=True", {}, "1 None"), ("", chosen, "2 2")):
        command, how = [sys.executable, "-c", code.format(more=more)], dict(capture_output=True, text=True, timeout=120)
        done = subprocess.run(command, cwd=ROOT, env=unset | variables, **how)
        assert done.stdout.strip() == words, done.stderr


def test_the_cpu_has_a_stack_without_npus():
    stack = open_device("cpu").stack
    assert stack.backend == "cpu" and stack.torch_npu is None and stack.conv_allow_hf32 is None and stack.python


def test_operators_that_fall_back_to_the_cpu_are_seen_every_time(emulated):
    x = torch.ones(3, device=emulated.torch_device)
    for _ in range(2):  # torch_npu's own warning comes once in a process
        with emulated.watch() as seen:
            torch.special.i0(x + 1)
        assert seen.fell_back == ["aten::i0"]


def test_operators_that_run_on_the_device_are_not_reported(emulated):
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.LayerNorm(8)).to(emulated.torch_device)
    with torch.no_grad(), emulated.watch() as seen:
        y = layer(torch.ones(2, 4, 8).to(emulated.torch_device)).softmax(-1)
        y = torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])
        y.flatten(1).t().contiguous().mean().cpu()
    with emulated.watch() as training:  # select_backward's out= form is made of it, so that it is no fallback
        x = torch.ones(3, 2).to(emulated.torch_device).requires_grad_()
        x[1].sum().backward()
    assert seen.fell_back == [] and training.fell_back == []


def test_a_kernel_that_calls_the_cpu_itself_is_seen_on_the_emulated_device(emulated):
    """torch_npu 2.13 computes std with a correction that is no whole number on the CPU, inside its kernel, and says
    nothing.
    """
    x = torch.randn(8, 33, device=emulated.torch_device)
    with torch.no_grad(), emulated.watch() as seen:
        x.std(-1, correction=0.5)
        x.var(-1, correction=0.5)
    assert seen.fell_back == ["aten::std.correction", "aten::var.correction"]
    with torch.no_grad(), emulated.watch() as seen:  # these bring answers to the host, or copy on purpose
        (
            x.std(-1, correction=2),
            x.sum().item(),
            x.cpu(),
            x.nonzero(),
            x[x > 0],
            x.equal(x + 1),
            bool((x > 0).any()),
            x.unique(),
            x.tolist(),
        )
    assert seen.fell_back == []
