"""The emulated CANN under the real torch_npu: what runs, what it answers, and that nothing comes back unwritten."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from harness import compare, compiling, emulator
from harness.emulator import build
from harness.errors import DeviceError, HarnessError
from harness.models.aimv2 import AIMv2Config
from harness.models.aimv2 import build as build_aimv2
from harness.reference import copy_module, run_cpu
from harness.tests.needs import emulated_device, needs_torch_npu

pytestmark = needs_torch_npu

ROOT = Path(__file__).parents[2]
SIZES = dict(width=64, depth=2, heads=4, hidden=176)


@pytest.fixture(scope="module")
def npu():
    return emulated_device().torch_device


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def child(code, *arguments, **environment):
    """Run Python in a fresh process at the root of the project."""
    prepared = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ASCEND", "LD_LIBRARY_PATH", "EMULATED"))
    } | environment
    command = [sys.executable, "-c", code] if code else [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=prepared, capture_output=True, text=True, timeout=120)


# -------- the device


def test_torch_npu_sees_one_910b4(npu):
    assert torch.npu.is_available() and torch.npu.device_count() == 1
    assert torch.npu.get_device_name(0) == "Ascend910B4"
    assert torch.accelerator.current_accelerator().type == "npu"
    free, total = torch.npu.mem_get_info()
    assert total == 32 << 30 and 0 < free <= total


def test_a_sum_is_a_sum_and_never_zeros(npu):
    y = torch.ones(4).to(npu)
    assert (y + y).cpu().tolist() == [2.0] * 4


def test_copies_keep_every_dtype_and_view(npu):
    x = seeded(6, 8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8):
        moved = (x * 10).to(dtype).to(npu)
        assert torch.equal(moved.cpu(), (x * 10).to(dtype))
    moved = x.to(npu)
    assert torch.equal(moved.t().contiguous().cpu(), x.t())
    assert torch.equal(moved[1::2, 2:5].cpu(), x[1::2, 2:5])
    assert torch.equal((moved.t()[2:] + moved.t()[2:]).cpu(), x.t()[2:] * 2)
    moved[:, 3] = 7
    assert moved.cpu()[:, 3].tolist() == [7.0] * 6
    assert torch.equal(moved.half().float().cpu()[:, :3], x.half().float()[:, :3])


def test_empty_scalar_and_broadcast_tensors(npu):
    assert torch.empty(0, 4, device=npu).add(1).cpu().shape == (0, 4)
    assert (torch.tensor(3.0, device=npu) * 2).item() == 6.0
    assert (torch.ones(3, 1, device=npu) + torch.ones(4, device=npu)).cpu().shape == (3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp().sum(-1),
        lambda x: x.mean((0, 1)),
        lambda x: x.softmax(-1),
        lambda x: x.abs().sqrt().rsqrt(),
        lambda x: x @ x.transpose(1, 2),
        lambda x: torch.cat([x, x * 2], 1),
        lambda x: torch.where(x > 0, x, -x),
        lambda x: x.amax(-1),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.pow(3) / (x.square() + 1),
        lambda x: x.flatten(1).cumsum(1),
        lambda x: torch.nn.functional.layer_norm(x, (16,)),
        lambda x: x.tanh().sigmoid(),
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: x.sort(-1)[0],
        lambda x: x.topk(3)[0],
        lambda x: x.tril(),
        lambda x: torch.stack([x, x]),
        lambda x: x - 2 * x,
        lambda x: x.index_select(1, torch.tensor([2, 0], device=x.device)),
        lambda x: x.norm(dim=-1),
        lambda x: x.max(),
        lambda x: x.argmax(-1).float(),
        lambda x: (x > 0).any(-1).float(),
        lambda x: torch.arange(5, device=x.device).float(),
    ],
)
def test_common_operators_agree_with_the_cpu(npu, function):
    x = seeded(2, 8, 16)
    result, expected = function(x.to(npu)).cpu(), function(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# -------- AIMv2


@pytest.mark.parametrize(
    "more",
    [{"image_size": 56}, {"image_size": None}, {"image_size": 56, "pool": True}],
    ids=["plain", "native", "head"],
)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_aimv2_agrees_to_rounding(npu, more, dtype, limit):
    model = copy_module(build_aimv2(AIMv2Config(**SIZES, **more), 0), dtype=dtype, device=torch.device("cpu"))
    moved, x = copy_module(model, dtype=dtype, device=npu), seeded(2, 3, 56, 56).to(dtype)

    def forward(model, x):
        features = model(x)
        return model.pool(features) if model.config.pool else features

    before = torch.npu.conv.allow_hf32
    torch.npu.conv.allow_hf32 = False
    try:
        with torch.no_grad():
            actual = forward(moved, x.to(npu))
    finally:
        torch.npu.conv.allow_hf32 = before
    expected, _, _ = run_cpu(model, x, forward=forward, dtype=dtype)
    assert 0 < compare(actual, expected).rel_l2 <= limit


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-3), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_transformers_own_aimv2_runs_eager_and_fused(npu, attention, dtype, limit):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=176, image_size=56, patch_size=14
    )
    config = transformers.Aimv2VisionConfig(**sizes, attn_implementation=attention)
    torch.default_generator.manual_seed(0)
    model = copy_module(transformers.Aimv2VisionModel(config).eval(), dtype=dtype, device=torch.device("cpu"))
    moved, x = copy_module(model, dtype=dtype, device=npu), seeded(2, 3, 56, 56).to(dtype)
    with torch.no_grad():
        actual = moved(x.to(npu)).pooler_output
    expected, _, _ = run_cpu(model, x, forward=None, dtype=dtype)
    assert 0 < compare(actual, expected.pooler_output).rel_l2 <= limit


def test_convolutions_run_in_hf32_until_they_are_told_not_to(npu):
    model, x = build_aimv2(AIMv2Config(**SIZES, image_size=56), 0), seeded(2, 3, 56, 56)
    moved, errors = copy_module(model, dtype=torch.float32, device=npu), {}
    for allowed in (True, False):
        torch.npu.conv.allow_hf32 = allowed
        with torch.no_grad():
            errors[allowed] = compare(moved(x.to(npu)), model(x)).max_diff
    torch.npu.conv.allow_hf32 = True
    assert errors[True] >= 50 * errors[False] > 0


def test_matrix_products_run_in_hf32_only_when_they_are_told_to(npu):
    left, right, errors = seeded(64, 64), seeded(64, 64, seed=1), {}
    for allowed in (False, True):
        torch.npu.matmul.allow_hf32 = allowed
        errors[allowed] = compare(left.to(npu) @ right.to(npu), left.double() @ right.double()).rel_l2
    torch.npu.matmul.allow_hf32 = False
    assert errors[False] < 2.0**-22 and 2.0**-13.5 < errors[True] < 2.0**-12


def test_products_of_float64_are_refused_as_on_the_card_and_the_rest_of_float64_runs(npu):
    x = seeded(4, 4).double()
    assert torch.equal((x.to(npu) + x.to(npu)).cpu(), x + x)
    for product in (
        lambda: x.to(npu) @ x.to(npu),
        lambda: torch.nn.functional.conv1d(x.to(npu), x[:, :, None].to(npu)),
    ):
        with pytest.raises(RuntimeError, match="the cube of a 910B has no float64|not implemented for DT_DOUBLE"):
            product().cpu()


def test_attention_with_a_mask_agrees(npu):
    q, k, v = (seeded(1, 2, 6, 16, seed=n) for n in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    for options in ({"attn_mask": seen}, {"is_causal": True}, {"attn_mask": torch.where(seen, 0.5, -3.0)}):
        moved = {name: value.to(npu) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        torch.testing.assert_close(
            attend(q.to(npu), k.to(npu), v.to(npu), **moved).cpu(), attend(q, k, v, **options), rtol=1e-5, atol=1e-5
        )


# -------- what must not happen


ERRORS = """
from harness.emulator.operators import OLDER, OPERATORS
OPERATORS.pop("aclnnMish"); OLDER.pop("Add", None); OLDER.pop("AddV2", None)  # two operators that the tables then lack
import harness; harness.open_device("emulated")
import torch
{body}
"""


@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_an_operator_outside_the_table_is_an_error_that_names_it(queue):
    """With a queue the error comes with the first copy or with the one after it.

    torch_npu empties its queue first and records the error then (`ReadQueue` in NPUQueue.cpp): a copy that waits for
    the empty queue between the two returns without an error.
    """
    body = "for _ in range(2): torch.nn.functional.mish(torch.ones(3).to('npu:0')).cpu(); import time; time.sleep(0.2)"
    done = child(ERRORS.format(body=body), TASK_QUEUE_ENABLE=queue)
    assert done.returncode == 1
    assert "aclnnMish is not emulated" in done.stderr
    assert "RuntimeError" in done.stderr


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unwritten", "aclnnSilu: output 0 was not written"),
        ("missing", "aclnnSilu is not emulated"),
        ("error", "error code 507011"),
    ],
)
def test_a_fault_that_leaves_an_output_unwritten_is_an_error_that_names_the_operator(kind, words):
    body = (
        f"with harness.emulator.fault('aclnnSilu', kind='{kind}'): "
        "torch.nn.functional.silu(torch.ones(3).to('npu:0')).cpu()"
    )
    done = child(ERRORS.format(body="import harness.emulator\n" + body))
    assert done.returncode == 1
    assert words in done.stderr and "RuntimeError" in done.stderr


def test_an_operator_outside_the_older_table_is_an_error_that_names_it():
    body = "torch.npu.set_compile_mode(jit_compile=True)\ny = torch.ones(4).to('npu:0')\nprint((y + y).cpu())"
    done = child(ERRORS.format(body=body))
    assert done.returncode == 1 and "tensor(" not in done.stdout
    assert "aclop Add (the older operator path) is not emulated" in done.stderr


@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_every_queue_mode_computes_and_ends_cleanly(queue):
    body = (
        "x = torch.randn(64, 64).to('npu:0')\nfor _ in range(50): y = (x @ "
        "x).softmax(-1)\nprint(float(y.sum().cpu()))\nz = y @ x"
    )
    done = child(ERRORS.format(body=body), TASK_QUEUE_ENABLE=queue)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(64.0, rel=1e-4)


def test_memory_runs_out_as_on_a_card():
    body = (
        "try:\n    torch.empty(1 << 21, dtype=torch.uint8, device='npu:0'); torch.empty(1 << 27, "
        "dtype=torch.uint8, device='npu:0')\n"
        "except torch.OutOfMemoryError as error:\n    print('out of memory', 'NPU' in str(error))"
    )
    code = f"import harness.emulator as e; e.install(e.Machine(memory=1 << 26))\nimport torch\n{body}"
    done = child(code)
    assert done.stdout.strip() == "out of memory True", done.stderr


def test_a_rack_can_be_played():
    code = (
        "import harness.emulator as e; e.install(e.Machine(devices=4, name='Ascend910B2'))\nimport torch\n"
        "x = (torch.ones(2, device='npu:3') * 3).cpu().tolist()\n"
        "print(torch.npu.device_count(), torch.npu.get_device_name(3), x)"
    )
    assert child(code).stdout.strip() == "4 Ascend910B2 [3.0, 3.0]"


def test_memory_does_not_grow_over_many_forwards(npu):
    model = copy_module(build_aimv2(AIMv2Config(**SIZES, image_size=56), 0), dtype=torch.float32, device=npu)
    x = seeded(2, 3, 56, 56).to(npu)
    with torch.no_grad():
        model(x)
        torch.npu.synchronize()
        before = torch.npu.memory_allocated(), torch.npu.memory_reserved()
        for _ in range(50):
            model(x)
        torch.npu.synchronize()
    assert (torch.npu.memory_allocated(), torch.npu.memory_reserved()) == before


def test_a_second_stream_waits_for_an_event_of_the_first(npu):
    first, second, event = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Event()
    for _ in range(20):
        x = torch.zeros(256, 256, device=npu)
        torch.npu.synchronize()
        with torch.npu.stream(first):
            y = x
            for _ in range(20):
                y = y @ y + 1
            x.copy_(y.clamp(0, 1))
            event.record()
        with torch.npu.stream(second):
            event.wait()
            z = x * 2
        torch.npu.synchronize()
        assert z.cpu().unique().tolist() == [2.0]


def test_events_time_what_lies_between_them(npu):
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    x = torch.ones(512, 512, device=npu)
    begin.record()
    for _ in range(5):
        x = x @ x * 1e-3
    end.record()
    torch.npu.synchronize()
    assert 0 < begin.elapsed_time(end) < 10_000


def test_several_threads_compute_each_its_own(npu):
    results = {}

    def work(number):
        x = torch.full((32, 32), float(number), device=npu)
        for _ in range(20):
            x = x * 1.0 + 0.0
        results[number] = x.cpu().unique().tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [float(number)] for number in range(4)}


def test_random_numbers_follow_the_seed(npu):
    torch.npu.manual_seed(3)
    first = torch.randn(1000, device=npu).cpu()
    torch.npu.manual_seed(3)
    assert torch.equal(torch.randn(1000, device=npu).cpu(), first)
    assert abs(float(first.mean())) < 0.2 and 0.8 < float(first.std()) < 1.2


# -------- faults


@pytest.mark.parametrize(
    ("kind", "options", "change"),
    [
        ("scale", {"by": 1.5}, lambda x: x * 1.5),
        ("offset", {"by": 0.25}, lambda x: x + 0.25),
        ("swap_rows", {"at": 1}, lambda x: x[[0, 2, 1, 3]]),
    ],
)
def test_a_fault_acts_where_it_is_asked_to_and_nowhere_else(npu, kind, options, change):
    x = seeded(4, 8)
    silu = torch.nn.functional.silu
    clean = silu(x.to(npu)).cpu()
    with emulator.fault("aclnnSilu", kind=kind, **options) as planted:
        result, other = silu(x.to(npu)).cpu(), (x.to(npu) * 2).cpu()
    assert planted.hits == 1
    assert torch.equal(result, change(clean)) and torch.equal(other, x * 2)
    assert torch.equal(silu(x.to(npu)).cpu(), clean)


def test_a_fault_can_choose_the_call(npu):
    x = torch.ones(4, device=npu)
    with emulator.fault("aclnnSil*", kind="nan", nth=2, at=3) as planted:
        broken = [torch.nn.functional.silu(x).cpu().isnan().sum().item() for _ in range(3)]
    assert broken == [0, 1, 0] and (planted.calls, planted.hits) == (3, 1)
    with pytest.raises(ValueError, match="no kind of fault is called 'magic'"):
        emulator.fault("aclnnSilu", kind="magic").__enter__()


# -------- building and programs


def test_every_operator_of_the_wheel_is_exported_and_the_table_names_none_other():
    from harness.emulator.operators import OPERATORS

    names = build.operator_names()
    assert len(names) > 900 and len(set(names)) == len(names)
    assert set(OPERATORS) <= set(names)


def test_a_home_that_was_made_here_is_told_from_a_real_one(npu, tmp_path):
    assert emulator.is_emulated_home(os.environ["ASCEND_HOME_PATH"])
    assert not emulator.is_emulated_home(tmp_path)


def test_no_compiler_is_a_message_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "_write_names", lambda made: None)
    monkeypatch.setattr(build.compiling, "built", lambda name, marker, make: make(tmp_path))
    wanted = "the emulated CANN cannot be built: no C compiler: looked for cc, gcc, clang and the ziglang package; pip"
    with pytest.raises(DeviceError, match=wanted):
        build.build("2.13.0")


def test_two_processes_build_at_once(tmp_path):
    code = "import harness; print(harness.open_device('emulated').name)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment = {name: value for name, value in environment.items() if not name.startswith("ASCEND")}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["Ascend910B4"] * 2
    assert [path.name[:5] for path in (tmp_path / "npu-accuracy-harness").iterdir()] == ["cann-"]


def test_a_cache_that_cannot_be_written_is_not_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    done = child("import harness; print(harness.open_device('emulated').name)", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.strip() == "Ascend910B4", done.stderr


@pytest.mark.skipif(build.util.find_spec("ziglang") is None, reason="ziglang is not installed")
def test_ziglang_compiles_where_there_is_no_cc(tmp_path):
    done = child(
        "import harness; print(harness.open_device('emulated').name)",
        PATH="/nowhere",
        XDG_CACHE_HOME=str(tmp_path),
        CC="",
    )
    assert done.stdout.strip() == "Ascend910B4", done.stderr


PROGRAM = """
import sys, torch
print(sys.argv[1:], (torch.ones(2, device="npu:0") + 1).cpu().tolist(), __name__)
sys.exit(int(sys.argv[1]))
"""


def test_programs_run_unchanged_and_give_their_status(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    for status in ("0", "3"):
        done = child("", "-m", "harness", "emulate", str(tmp_path / "program.py"), status, "--flag")
        assert done.stdout.strip() == f"['{status}', '--flag'] [2.0, 2.0] __main__", done.stderr
        assert done.returncode == int(status)
    done = child("", "-m", "harness", "emulate", "-m", "this")
    assert "Zen of Python" in done.stdout and done.returncode == 0
    (tmp_path / "broken.py").write_text("raise ValueError('inside')")
    done = child("", "-m", "harness", "emulate", str(tmp_path / "broken.py"))
    assert done.returncode == 1 and "ValueError: inside" in done.stderr


def test_a_program_that_is_not_there_is_one_line():
    done = child("", "-m", "harness", "emulate", "/nowhere.py")
    assert done.returncode == 1 and done.stderr.startswith("harness emulate: no script at /nowhere.py")
    with pytest.raises(HarnessError, match="nothing to run"):
        emulator.emulate([])
