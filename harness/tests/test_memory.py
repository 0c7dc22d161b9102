"""Host memory: what is needed, what is there, on both sides of each limit, and the row of a case that does not fit."""

import contextlib
import json
import re

import pytest
import torch
from torch import nn

import harness.report

# pytester forgets the modules that an inner run imported, and torch cannot be imported twice.
import harness.run.validation  # noqa: F401
from harness import Case, open_device, validate
from harness.commands.model_size import model_size
from harness.errors import DeviceError, MemoryLimitError
from harness.reference import Models, copy_module, memory, models, run_cpu
from harness.reference.isolated_process import CleanProcess
from harness.reference.layers import is_layered
from harness.reference.memory import (
    GIB,
    SHARE,
    SMALL,
    Memory,
    Policy,
    SizeInMemory,
    count_of,
    estimates,
    needed,
    read_memory,
    room,
)
from harness.tests.needs import needs_torch_npu

CPU = torch.device("cpu")
LARGE_BYTES = 64 << 20  # `harness.reference.models.LARGE`


@pytest.fixture(scope="module", autouse=True)
def torch_npu_is_imported():
    """Before an inner run of pytest imports parts of it and has them forgotten."""
    with contextlib.suppress(DeviceError):
        open_device("emulated")
    import torch._dynamo  # noqa: F401  a dispatch mode brings it in, and it cannot be imported twice either


LARGE = SizeInMemory(parameters=1_000_000_000, largest=10_000_000)


# -------- what is there

MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1000 kB\nMemAvailable:    8388608 kB\nHugePages_Total: 0\n"


def machine(root, **files):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_without_a_limit_has_what_the_kernel_calls_available(tmp_path):
    expected = Memory(total=16 * GIB, available=8 * GIB, source="this machine")
    assert read_memory(machine(tmp_path)) == expected
    unlimited = {
        "proc/self/cgroup": "4:memory:/a\n0::/b\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert read_memory(machine(tmp_path, **unlimited, **{"sys/fs/cgroup/b/memory.max": "max\n"})) == expected


def test_a_machine_that_says_nothing_is_unknown(tmp_path):
    assert read_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    assert read_memory(tmp_path) is None


def v2(folder, limit, used, files=0):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {files}\n",
    }


def v1(folder, limit, used, files=0):
    stat = f"cache 7\ninactive_file 1\ntotal_inactive_file {files}\n"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def test_the_limit_of_a_cgroup_of_version_2(tmp_path):
    """A pod: the group of the process has no limit, the one above it 4 GiB; 3 are used, one of them by files."""
    files = {
        "proc/self/cgroup": "0::/pod/app\n",
        "sys/fs/cgroup/pod/app/memory.max": "max\n",
        **v2("sys/fs/cgroup/pod", 4 * GIB, 3 * GIB, GIB),
    }
    assert read_memory(machine(tmp_path, **files)) == Memory(total=4 * GIB, available=2 * GIB, source="the cgroup")


def test_the_limit_of_a_cgroup_of_version_1_in_a_container(tmp_path):
    """Docker: the path is the host's, what is mounted is the container's own group."""
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n",
        **v1("sys/fs/cgroup/memory", 6 * GIB, 5 * GIB, GIB // 2),
    }
    assert read_memory(machine(tmp_path, **files)) == Memory(total=6 * GIB, available=3 * GIB // 2, source="the cgroup")


def test_the_smaller_of_machine_and_cgroup_counts(tmp_path):
    roomy = {"proc/self/cgroup": "0::/\n", **v2("sys/fs/cgroup", 12 * GIB, 1 * GIB)}
    assert read_memory(machine(tmp_path, **roomy)).source == "this machine"
    full = v2("sys/fs/cgroup", 2 * GIB, 3 * GIB)
    assert read_memory(machine(tmp_path, **roomy | full)) == Memory(total=2 * GIB, available=0, source="the cgroup")


def test_this_machine_says_what_it_has():
    result = read_memory()
    assert result is None or 0 <= result.available <= result.total


def test_a_worker_has_its_even_part_and_what_it_holds_is_of_that():
    there = Memory(total=16 * GIB, available=12 * GIB)
    assert room(there, 1, own=1 * GIB) == 12 * GIB
    assert room(there, 4, own=1 * GIB) == 3 * GIB
    assert room(there, 4, own=5 * GIB) == 0
    assert room(Memory(total=16 * GIB, available=GIB), 4, own=0) == GIB


# -------- what is needed


@pytest.mark.parametrize("separate", [False, True], ids=["here", "two processes"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_large_model_needs_at_most_14_bytes_a_parameter(dtype, separate):
    roomy = Policy(memory=Memory(total=4096 * GIB, available=4096 * GIB))
    layers = roomy.layers(LARGE, dtype, separate=separate)
    assert layers and needed(LARGE, dtype, layers=layers, separate=separate).host <= 14 * LARGE.parameters


def test_each_copy_is_counted():
    size = SizeInMemory(parameters=100, largest=0)
    each = {
        (dtype, layers, separate): needed(size, dtype, layers=layers, separate=separate).host / 100
        for dtype in ("float32", "float16") for layers in (True, False) for separate in (False, True)
    }  # fmt: skip
    assert each == {
        ("float32", True, False): 4, ("float32", True, True): 8,
        ("float32", False, False): 12, ("float32", False, True): 16,
        ("float16", True, False): 6, ("float16", True, True): 8,
        ("float16", False, False): 14, ("float16", False, True): 14,
    }  # fmt: skip
    assert needed(size, "float16", layers=True, separate=False, emulated=True).host == 800
    assert needed(size, "float16", layers=True, separate=False).device == 200
    with pytest.raises(ValueError, match="memory is known for float64, .*, not for 'int8'"):
        needed(size, "int8", layers=True, separate=False)


def test_small_models_keep_a_whole_float64_copy_up_to_a_limit():
    """12 bytes a parameter for a plain float32 model: SMALL, and SHARE of what is there, from both sides."""
    roomy, unknown = Policy(memory=Memory(total=1024 * GIB, available=1024 * GIB)), Policy(memory=None)
    tight = Policy(memory=Memory(total=GIB, available=GIB))
    for policy, limit in ((roomy, SMALL), (unknown, SMALL), (tight, SHARE * GIB)):
        count = int(limit // 12)
        assert not policy.layers(SizeInMemory(parameters=count, largest=0), torch.float32, separate=False)
        assert policy.layers(SizeInMemory(parameters=count + 1, largest=0), torch.float32, separate=False)


def test_a_case_that_just_fits_runs_and_one_byte_less_is_an_error():
    more = needed(LARGE, "float32", layers=True, separate=True).host - LARGE.bytes
    how = dict(separate=True, emulated=False, layers=True)
    Policy(memory=Memory(total=64 * GIB, available=more)).check("llama", LARGE, torch.float32, **how)
    Policy(memory=None).check("llama", LARGE, torch.float32, **how)
    with pytest.raises(MemoryLimitError) as caught:
        Policy(memory=Memory(total=64 * GIB, available=more - 1, source="the cgroup"), workers=2).check(
            "llama", LARGE, torch.float32, **how
        )
    assert str(caught.value) == (
        "llama: 1,000,000,000 parameters in float32 need 3.9 GiB of host memory beside the model as built "
        "(float64 layer by layer already), and 3.9 GiB are left on the cgroup, the part of one of 2 workers; "
        "use fewer workers (-n), a machine with more memory"
    )


# -------- what is done


class Noting(nn.Module):
    """Counts its runs in a buffer, so that a copy of a model that has run is told from one that has not."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * self.calls


def policy(monkeypatch, available):
    monkeypatch.setattr(
        memory, "read_memory", lambda: None if available is None else Memory(total=64 * GIB, available=available)
    )


def drawn(generator):
    return torch.randn(4, 16, generator=generator)


def built():
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_little_memory_changes_the_way_and_no_number(monkeypatch, dtype):
    """4,352 weights: their copies take 34 KiB and more than SHARE of 200 KiB, in which they fit."""
    device, case = open_device("cpu"), Case(name="small", model=built, inputs=drawn, dtype=dtype)
    verdicts = []
    for available, wanted in ((None, False), (200 << 10, True)):
        policy(monkeypatch, available)
        models = Models()
        verdicts.append(validate(case, 3, device, models=models))
        wide = models.get((built, None, 0), built, seed=0, dtype=case.torch_dtype, device=CPU, wide=True)
        assert is_layered(wide) is wanted
    assert (
        verdicts[0].references == verdicts[1].references
        and verdicts[0].evidence.conditioning == verdicts[1].evidence.conditioning
    )


def test_a_dtype_after_another_gets_its_own_float64_copy(monkeypatch):
    policy(monkeypatch, 200 << 10)
    models = Models()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        wide = models.get("key", built, seed=0, dtype=dtype, device=CPU, wide=True)
        narrow = models.get("key", built, seed=0, dtype=dtype, device=CPU)
        assert is_layered(wide) and torch.equal(wide[0].weight, narrow[0].weight.double())
        assert narrow[0].weight.dtype == dtype


@pytest.fixture(scope="module")
def clean():
    process = CleanProcess()
    yield process
    process.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_process_without_torch_npu_makes_its_copies_itself(clean, dtype):
    torch.manual_seed(0)
    base, x = Noting().eval().requires_grad_(False), torch.randn(3, 16).to(dtype)
    narrow = copy_module(base, dtype=dtype, device=CPU)
    wide = copy_module(narrow, dtype=torch.float64, device=CPU)
    expected = [
        run_cpu(narrow, x, forward=None, dtype=dtype)[0],
        run_cpu(wide, x.double(), forward=None, dtype=torch.float64)[0],
    ]
    for layers in (False, True):
        model = copy_module(base, dtype=torch.float32, device=CPU)
        result = [clean.forward(model, x, cast=dtype, layers=layers, forward=None, dtype=dtype).outputs["output"]]
        # The float64 copy is of the weights that were sent, not of what the run above made of the buffers.
        result.append(
            clean.forward(
                model, x.double(), cast=dtype, wide=True, layers=layers, forward=None, dtype=torch.float64
            ).outputs["output"]
        )
        assert (
            all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
            and result[1].dtype == torch.float64
        )
        assert model.calls == 0 and model.lin.weight.dtype == torch.float32


def test_a_dtype_that_is_over_is_forgotten_there(clean):
    model, x = built().eval().requires_grad_(False), torch.ones(1, 16)
    before = clean.run(_count)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        clean.forward(model, x.to(dtype), cast=dtype, forward=None, dtype=dtype)
        assert clean.run(_count) <= before + 1
    del model
    clean.forget_gone()
    assert clean.run(_count) <= before


def _count():
    from harness.reference import isolated_process as clean

    return len(clean._models)


CASE = """
import pytest, torch
from harness import Case
from harness.reference import memory

memory.read_memory = lambda: memory.Memory(total=8 << 30, available={available}, source="the cgroup")

def inputs(generator):
    return torch.randn(4, 16, generator=generator)

CASE = Case(name="big", model=lambda: torch.nn.Linear(16, 16), inputs=inputs, dtype="float16", companion=False)

def test_precision(precision):
    precision(CASE, 0)
"""


@pytest.mark.parametrize(("available", "status"), [(100 << 20, "PASS"), (1000, "ERROR")])
def test_a_case_that_does_not_fit_is_an_error_row(pytester, monkeypatch, available, status):
    monkeypatch.setattr(memory, "read_memory", memory.read_memory)  # put back what the inner run plants
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)  # the message would name the workers of this run
    pytester.makeconftest('pytest_plugins = ("harness.plugin",)')
    pytester.makepyfile(CASE.replace("{available}", str(available)))
    result = pytester.runpytest("--device=cpu", "-p", "no:cacheprovider", "--report=out")
    (row,) = json.loads((pytester.path / "out/precision.json").read_text())["rows"]
    assert row["status"] == status
    if status == "ERROR":
        said = r"MemoryLimitError: big: 272 parameters in float16 need 0\.0 GiB .* on the cgroup; use a machine"
        assert any(re.search(said, line) for line in result.outlines)


# -------- what doctor says


def test_sizes_are_read_as_people_write_them():
    assert [count_of(item) for item in ("7B", "1.1b", "350M", "124000000", "8k")] == [
        7 * 10**9,
        11 * 10**8,
        35 * 10**7,
        124_000_000,
        8000,
    ]
    for text in ("", "B", "seven", "7Q", "0", "-1B", "nan", "inf"):
        with pytest.raises(ValueError, match="write the number of parameters, such as 7B"):
            count_of(text)


def test_doctor_says_what_fits_and_what_does_not(monkeypatch):
    (one,) = [
        estimate for estimate in estimates(7 * 10**9, ("float16",), workers=1, memory=None) if not estimate.separate
    ]
    assert one.fits is None and 6 < one.bytes_a_parameter < 8 and one.device == 14 * 10**9
    for available, workers, wanted in ((one.host, 1, True), (one.host - 1, 1, False), (one.host, 2, False)):
        there = Memory(total=4096 * GIB, available=available)
        assert estimates(7 * 10**9, ("float16",), workers=workers, memory=there)[0].fits is wanted
    policy(monkeypatch, one.host)
    text, fits = model_size("7B", dtype="float16")
    assert not fits and text.startswith("7,000,000,000 parameters, 1 worker; ")
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("float16")] == ["yes", "NO", "yes"]
    with pytest.raises(ValueError, match="not for 'int4'"):
        model_size("7B", dtype="int4")


@needs_torch_npu
def test_the_devices_memory_of_a_large_model_is_given_back_before_the_next_is_built():
    """From one byte above LARGE on; that of a small model stays for the next."""
    device, models = open_device("emulated").torch_device, Models()
    for rows, stays in ((LARGE_BYTES // 4096, True), (LARGE_BYTES // 4096 + 1, False)):
        torch.npu.empty_cache()
        before = torch.npu.memory_reserved()
        how = dict(seed=0, dtype=torch.float32)
        models.get(f"first {rows}", lambda rows=rows: nn.Linear(1024, rows, bias=False), device=device, **how)
        assert torch.npu.memory_reserved() - before >= rows * 4096
        models.base("second", lambda: nn.Linear(4, 4), seed=0)
        assert (torch.npu.memory_reserved() - before >= rows * 4096) is stays
        models = Models()


def test_freed_blocks_are_given_back_where_less_is_left_than_the_process_holds(monkeypatch):
    monkeypatch.setattr(models, "resident", lambda: 5 * GIB)
    released = []
    monkeypatch.setattr(models, "release_memory", lambda: released.append(True))
    for available, tight in ((5 * GIB, False), (5 * GIB - 1, True), (None, False)):
        there = None if available is None else Memory(total=64 * GIB, available=available)
        monkeypatch.setattr(models, "read_memory", lambda there=there: there)
        assert models.release_where_tight() is tight and bool(released) is tight
        released.clear()
