"""The emulated device beside torch's CUDA build, which registers the same allocator options: it opens or says why."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import compiling
from harness.emulator import build
from harness.tests import planted_keys
from harness.tests.execute import ROOT, emulated
from harness.tests.needs import emulated_device, needs_torch_npu
from harness.tests.planted_keys import Names, word

pytestmark = needs_torch_npu

TORCH = ("max_split_size_mb", "garbage_collection_threshold", "roundup_power2_divisions", "expandable_segments")
SAME = ("pinned_reserve_segment_size_mb", "page_size")  # one on the heap, one within its string
INSTALL = f"pip install torch=={torch.__version__.split('+')[0]} --index-url https://download.pytorch.org/whl/cpu"
CPU_BUILD = f"install the CPU build: {INSTALL}"
REFUSED = "torch_npu cannot be imported beside this build of torch: both register the same allocator options"
cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} is not the CUDA build")


@pytest.fixture(scope="module")
def core():
    emulated_device()
    return ctypes.CDLL(str(Path(os.environ["ASCEND_HOME_PATH"]) / build.CORE))


def set_aside(core, address, keys=SAME):
    """What the check says of the set at an address (None: nothing), and how many names were changed."""
    texts = (ctypes.c_char_p * (len(keys) + 1))(*(key.encode() for key in keys), None)
    changed = ctypes.c_int(-1)
    core.emulator_set_keys_aside.restype = ctypes.c_char_p
    core.emulator_set_keys_aside.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
    problem = core.emulator_set_keys_aside(address, texts, ctypes.byref(changed))
    return problem and problem.decode(), changed.value


def names(buckets=13):
    return Names([*TORCH, "backend", *SAME], buckets)


# -------- the check


@pytest.mark.parametrize("buckets", [7, 13, 59, 65536])
def test_the_names_that_both_register_are_changed_and_no_others(core, buckets):
    made = names(buckets)
    assert set_aside(core, made.address) == (None, 2)
    assert sorted(made.read()) == sorted([*TORCH, "backend", *("\1" + name[1:] for name in SAME)])


def test_nothing_is_changed_where_no_name_is_the_same(core):
    made = Names([*TORCH, "backend"], 13)
    assert set_aside(core, made.address) == (None, 0)
    assert sorted(made.read()) == sorted([*TORCH, "backend"])


def test_the_longest_chain_and_the_longest_name_that_are_taken(core):
    many = [f"name_{number}" for number in range(512 - len(TORCH))]
    assert set_aside(core, Names([*TORCH, *many], 541).address, ("name_7",)) == (None, 1)
    too_many = Names([*TORCH, *many, "one_more"], 541)
    assert set_aside(core, too_many.address)[0] == "the set has an impossible number of names"
    assert set_aside(core, Names([*TORCH, "a" * 255], 13).address, ("a" * 255,)) == (None, 1)
    assert set_aside(core, Names([*TORCH, "a" * 256], 13).address)[0] == "a name has an impossible length"


def unreadable():
    """The address of a page that nobody may read."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_uint64
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    return libc.mmap(None, mmap.PAGESIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def _set(offset, value, at="set"):
    """A damage: the word at an offset of the set, or of a name's node, becomes another one (a function gives it)."""

    def damage(made):
        place = word((made.address if at == "set" else made.node[at]) + offset)
        place.value = value(place.value) if callable(value) else value

    return damage


def _letter(name, position, letter):
    def damage(made):
        ctypes.c_char.from_address(word(made.node[name] + planted_keys.TEXT).value + position).value = letter

    return damage


def _load(made):
    ctypes.c_float.from_address(made.address + planted_keys.LOAD).value = 0.75


def _circle(made):
    first = last = word(made.address + planted_keys.FIRST).value
    while word(last).value:
        last = word(last).value
    word(last).value = first


def _break(made):
    word(word(made.address + planted_keys.FIRST).value + planted_keys.NEXT).value = unreadable()


P, LONG, SHORT = planted_keys, SAME[0], SAME[1]
DAMAGES = {
    "one name less than counted": (_set(P.COUNT, lambda count: count + 1), "the set holds fewer names than it counts"),
    "one name more than counted": (_set(P.COUNT, lambda count: count - 1), "the set holds more names than it counts"),
    "a chain in a circle": (_circle, "the set holds more names than it counts"),
    "no names": (_set(P.COUNT, 0), "the set has an impossible number of names"),
    "a huge number of names": (_set(P.COUNT, 1 << 60), "the set has an impossible number of names"),
    "no buckets": (_set(P.COUNT_OF_BUCKETS, 0), "the set has an impossible number of buckets"),
    "fewer buckets than names": (_set(P.COUNT_OF_BUCKETS, 6), "the set has an impossible number of buckets"),
    "a huge number of buckets": (_set(P.COUNT_OF_BUCKETS, 65537), "the set has an impossible number of buckets"),
    "another load": (_load, "the set has an impossible number of buckets"),
    "buckets nowhere": (_set(P.BUCKETS, lambda _: unreadable()), "the buckets of the set cannot be read"),
    "buckets at null": (_set(P.BUCKETS, 0), "the buckets of the set cannot be read"),
    "odd buckets": (_set(P.BUCKETS, lambda at: at + 1), "the buckets of the set are in an impossible place"),
    "buckets one further": (_set(P.BUCKETS, lambda place: place + 8), "a bucket of the set does not lead to its names"),
    "a chain that leads nowhere": (_set(P.FIRST, lambda _: unreadable()), "a name of the set cannot be read"),
    "a chain that leads to an odd place": (_set(P.FIRST, lambda place: place + 1), "a name of the set cannot be read"),
    "a name that leads nowhere": (_break, "a name of the set cannot be read"),
    "letters nowhere": (_set(P.TEXT, lambda _: unreadable(), at=LONG), "the letters of a name cannot be read"),
    "letters at null": (_set(P.TEXT, 0, at=LONG), "the letters of a name cannot be read"),
    "a name without letters": (_set(P.LENGTH, 0, at=LONG), "a name has an impossible length"),
    "a huge name": (_set(P.LENGTH, 1 << 40, at=LONG), "a name has an impossible length"),
    "a long name within its string": (_set(P.LENGTH, 16, at=SHORT), "a name is no string of the known layout"),
    "a string with less room than letters": (_set(P.HERE, 29, at=LONG), "a name is no string of the known layout"),
    "a string with huge room": (_set(P.HERE, 1 << 40, at=LONG), "a name is no string of the known layout"),
    "a shorter length": (_set(P.LENGTH, 29, at=LONG), "a name holds letters that no option has"),
    "a capital": (_letter(LONG, 3, b"N"), "a name holds letters that no option has"),
    "no end": (_letter(LONG, 30, b"x"), "a name holds letters that no option has"),
    "an end in the middle": (_letter(LONG, 5, b"\0"), "a name holds letters that no option has"),
    "another letter": (_letter(LONG, 3, b"x"), "the hash of a name is another one"),
    "another hash": (_set(P.HASH, lambda old: old ^ 1, at=LONG), "the hash of a name is another one"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_set_of_another_layout_is_refused_and_not_touched(core, damage):
    made = names()
    strings = {name: word(made.node[name] + P.TEXT).value for name in SAME}
    strike, reason = DAMAGES[damage]
    strike(made)
    before = [ctypes.string_at(strings[name], len(name)) for name in SAME]
    assert set_aside(core, made.address) == (reason, 0)
    assert [ctypes.string_at(strings[name], len(name)) for name in SAME] == before


def test_no_set_at_all_is_refused(core):
    for address in (0, 8, names().address + 4, unreadable(), (1 << 64) - 8):
        assert set_aside(core, address)[0] == "the set of names cannot be read"


@pytest.mark.parametrize("name", TORCH)
def test_a_set_without_an_option_of_torch_is_refused(core, name):
    made = Names([*(item for item in TORCH if item != name), *SAME], 13)
    assert set_aside(core, made.address) == ("the set lacks options of torch itself", 0)


def test_names_that_cannot_be_written_are_refused_before_any_is_changed(core):
    made = names()
    mapped = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    mapped[: len(SAME[0]) + 1] = SAME[0].encode() + b"\0"
    word(made.node[SAME[0]] + P.TEXT).value = address
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0
    assert set_aside(core, made.address)[0] == "the letters of a name cannot be written"
    assert set(SAME) <= set(made.read())


# -------- what the wheel registers

HEADER = """
  // Required by REGISTER_ALLOCATOR_CONFIG_PARSE_HOOK macro
  static const std::unordered_set<std::string>& getKeys() {
    static std::unordered_set<std::string> keys{
        "page_size",
        "pinned_reserve_segment_size_mb"};
    return keys;
  }
  void parseArgs(const std::string& env);  // "not_a_key"
"""


def test_the_names_are_read_from_the_wheel():
    text = build.allocator_keys(["malloc", planted_keys.FUNCTION], HEADER, "2.13.0")
    lines = text.splitlines()
    assert lines[:2] == [f'#define KEYS_FUNCTION "{planted_keys.FUNCTION}"', '#define TORCH "2.13.0"']
    assert lines[2:] == ["KEY(page_size)", "KEY(pinned_reserve_segment_size_mb)"]


def test_a_wheel_that_registers_nothing_needs_nothing():
    """torch_npu 2.9 to 2.12."""
    instance = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig8instanceEv"
    assert build.allocator_keys(["malloc", instance], HEADER, "2.12.0") == ""


def test_a_wheel_without_its_header_lists_no_names():
    text = build.allocator_keys([planted_keys.FUNCTION], "", "2.13.0")
    assert "KEYS_FUNCTION" in text and "KEY(" not in text


def test_the_installed_wheel_says_which_names_it_registers(core):
    made = (Path(os.environ["ASCEND_HOME_PATH"]) / "keys.inc").read_text()
    registers = any("getMutableKeys" in name for name in build.undefined_symbols(build.wheel_libraries()[0]))
    assert ("KEY(pinned_reserve_segment_size_mb)" in made) == registers


# -------- in processes


def alone(code, **environment):
    """Python code in a process of its own, which inherits no emulated CANN. Returns the ended process."""
    return process("-c", code, without=EMULATION, **environment)


EMULATION = (
    "ASCEND",
    "TORCH_DEVICE",
    "LD_LIBRARY_PATH",
    "EMULATED",
)  # what an emulated process shares with its children


def process(*arguments, without=(), **environment):
    """Python in a process that inherits this one's environment, but for variables that begin so. Returns it, ended."""
    unwanted = ("PYTEST", *without)
    prepared = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=prepared, capture_output=True, text=True, timeout=540)


PLANT = """
import ctypes, os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
from harness import DeviceError, open_device
from harness.tests import planted_keys
live = planted_keys.torch_set()
def plant():
    for name in ("pinned_reserve_segment_size_mb", "per_process_memory_fraction"):
        if name not in planted_keys.read(live):
            planted_keys.insert(live, name)
def open():
    try:
        return open_device("emulated").backend
    except DeviceError as error:
        return f"DeviceError: {error}"
"""
WRONG_COUNT = "planted_keys.word(live + planted_keys.COUNT).value += 1\n"


@pytest.fixture
def registers(core):
    """Skips where the installed torch_npu registers no allocator options."""
    if not (Path(os.environ["ASCEND_HOME_PATH"]) / "keys.inc").read_text():
        pytest.skip("this torch_npu registers no allocator options")


LATE = """
from harness.emulator import build
home = build.build(build.wheel_version())
os.environ["ASCEND_HOME_PATH"], os.environ["ASCEND_OPP_PATH"] = str(home), str(home / "opp")
for name in build.LIBRARIES:
    ctypes.CDLL(str(home / name), mode=ctypes.RTLD_GLOBAL)
plant()
import torch_npu
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the names, nothing is planted")
def test_a_name_that_is_there_already_ends_torch_npu_without_the_cure(registers):
    """What the other tests plant does what the CUDA build does: here it comes too late for the cure."""
    done = alone(PLANT + LATE)
    assert done.returncode == -6 and "Duplicated key" in done.stderr


def test_the_device_opens_where_both_register_a_name(registers):
    lost = "print(before - set(planted_keys.read(live)))"
    done = alone(PLANT + "plant()\nbefore = set(planted_keys.read(live))\nprint(open())\n" + lost)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["emulated", "set()"]), done.stderr


def stub(tmp_path):
    """A library that is called as CUDA's part of torch is, for a process whose torch has none."""
    path = tmp_path / "libc10_cuda.so"
    (tmp_path / "empty.c").write_text("")
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libc10_cuda.so", "-o", str(path)]
    compiling.run_compiler([*compiling.compiler(), *flags, str(tmp_path / "empty.c")])
    return path


def test_a_layout_that_is_not_known_is_one_line_that_says_which_torch_to_install(registers, tmp_path):
    ask = "print(open())\nfrom harness.commands.health import doctor\ntext, fine = doctor('emulated')\n"
    doctors = "print(fine, text.splitlines()[-1])"
    done = alone(PLANT + f"plant()\nctypes.CDLL({str(stub(tmp_path))!r})\n" + WRONG_COUNT + ask + doctors)
    assert done.returncode == 0, done.stderr
    opened, diagnosed = done.stdout.splitlines()
    assert opened.startswith(f"DeviceError: {REFUSED}")
    assert "(the set holds fewer names than it counts)" in opened and opened.endswith(CPU_BUILD)
    assert diagnosed.split() == ["False", "device", "FAILED", *opened.removeprefix("DeviceError: ").split()]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is the CUDA build")
def test_a_layout_that_is_not_known_is_no_matter_where_nothing_else_registers_names():
    done = alone(PLANT + WRONG_COUNT + "print(open())")
    assert done.stdout.splitlines() == ["emulated"], done.stderr


CHILD_REFUSED = """
import subprocess, sys
# Without warnings: Python 3.12 has many of torch_npu's own lines when it compiles them first.
done = subprocess.run([sys.executable, "-W", "ignore", "-c", {child!r}], capture_output=True, text=True)
print(done.returncode, done.stderr.strip())
"""


def test_a_child_that_cannot_import_torch_npu_ends_with_that_line(registers, tmp_path):
    child = PLANT + f"plant()\nctypes.CDLL({str(stub(tmp_path))!r})\n" + WRONG_COUNT + "import torch_npu"
    done = emulated(CHILD_REFUSED.format(child=child))
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"1 {REFUSED}") and line.endswith(CPU_BUILD), done.stderr


# -------- with the CUDA build

CHILDREN = """
import os, subprocess, sys
import torch, torch_npu
from torch.multiprocessing import spawn

def work(rank):
    print("spawned", (torch.ones(2, device="npu:0") + rank).tolist(), flush=True)

if __name__ == "__main__":
    add = "; print('{}', (torch.ones(2, device='npu:0') + 1).tolist())"
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    subprocess.run([sys.executable, "-c", "import torch, torch_npu" + add.format("plain")], check=True)
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    subprocess.run([sys.executable, "-c", "import torch" + add.format("loaded")], check=True)
    spawn(work, nprocs=1)
"""


@cuda_build
def test_cuda_builds_children_and_spawned_workers_are_emulated_too(tmp_path):
    done = emulated(CHILDREN, path=tmp_path / "children.py")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("plain", "loaded", "spawned"))]
    assert lines == ["plain [2.0, 2.0]", "loaded [2.0, 2.0]", "spawned [1.0, 1.0]"]


@cuda_build
def test_cuda_builds_own_options_are_still_options(core):
    known = planted_keys.read(planted_keys.torch_set())
    assert {"backend", "pinned_reserve_segment_size_mb", "per_process_memory_fraction"} <= set(known)


@cuda_build
def test_cuda_builds_options_in_the_environment_are_read():
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native,pinned_reserve_segment_size_mb:64"}
    done = alone("import harness\nprint(harness.open_device('emulated').backend)", **settings)
    assert done.stdout.strip() == "emulated", done.stderr


@cuda_build
@pytest.mark.parametrize("without", [EMULATION, ()], ids=["alone", "child"])
def test_doctor_answers_beside_the_cuda_build(core, without):
    done = process("-m", "harness", "doctor", without=without)
    assert done.returncode == 0 and torch.__version__ in done.stdout, done.stdout + done.stderr


@cuda_build
def test_workers_of_xdist_are_emulated_beside_the_cuda_build(tmp_path):
    rows = ["-n", "2", "-k", "precision and float32-digits", f"--report={tmp_path}", "cases"]
    done = process("-m", "pytest", "-p", "no:cacheprovider", *rows, without=EMULATION)
    assert done.returncode == 0 and " PASS" in done.stdout, done.stdout + done.stderr
