"""The plugin in other people's repositories: idle until it is asked for, beside options of their own, with the device
there in time.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness import autoload, open_device
from harness.devices import npu
from harness.tests.environment import of_a_shell
from harness.tests.needs import needs_torch_npu

ROOT = Path(__file__).parents[2]
LIGHT = {"harness", "harness.autoload", "harness.languages"} | {
    f"harness.{name}"
    for name in (
        *("devices", "devices.names", "judging", "judging.preset_names"),
        *("plugin", "plugin.entry", "plugin.fixtures", "plugin.names", "plugin.opening", "plugin.options"),
    )
}

IDLE = f"""
import os, sys

def test_nothing_was_touched():
    assert "torch" not in sys.modules and "torch_npu" not in sys.modules
    assert {{name for name in sys.modules if name.split(".")[0] == "harness"}} <= {LIGHT!r}
    assert not [name for name in os.environ if name.startswith(("TORCH_DEVICE", "ASCEND", "TASK_QUEUE"))]
"""

CASE = """
import torch
from harness import Case, Tolerance

SMALL = Case(name="small", model=lambda: torch.nn.Linear(8, 4), inputs=lambda g: torch.randn(2, 8, generator=g))
"""
ACCURACY = CASE + "\ndef test_precision(precision):\n    precision(SMALL, 1)\n"


@pytest.fixture
def project(tmp_path):
    """Somebody's repository, with an ini file and without a conftest.py."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -p no:benchmark\n")
    return folder


def pytest_in(folder, *arguments, **environment):
    """(exit status, output) of pytest in a folder, as a user starts it there."""
    prepared = of_a_shell("PYTEST", "PYTHONPATH", **environment)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=folder, env=prepared, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def is_quiet(said):
    """Whether the plugin printed nothing."""
    return "accuracy:" not in said and " accuracy =" not in said


def test_the_entry_point_is_installed():
    assert [
        entry.value for entry in metadata.entry_points(group="pytest11") if entry.name == "harness.plugin.entry"
    ] == ["harness.plugin.entry"]


@pytest.mark.parametrize(
    "arguments", [(), ("-k", "nothing"), ("-k", "not precision"), ("-k", "not test_precision and nothing")]
)
def test_a_run_that_asks_for_nothing_is_left_alone(project, arguments):
    (project / "test_theirs.py").write_text(IDLE)
    (project / "test_more.py").write_text("def test_precision_score():\n    assert True\n")
    status, said = pytest_in(project, *arguments, "-v")
    assert status == 0 and is_quiet(said), said
    assert sorted(path.name for path in project.iterdir() if path.name != "__pycache__") == [
        "pytest.ini",
        "test_more.py",
        "test_theirs.py",
    ]


@pytest.mark.parametrize("given", ["test_theirs.py", "test_theirs.py::test_nothing_was_touched", "below"])
def test_an_accuracy_test_beside_the_file_that_was_given_opens_nothing(project, given):
    (project / "below").mkdir()
    for path in (project / "test_theirs.py", project / "below" / "test_idle.py"):
        path.write_text(IDLE)
    (project / "test_model.py").write_text(ACCURACY)
    status, said = pytest_in(project, given)
    assert status == 0 and "1 passed" in said and is_quiet(said), said


def test_a_failing_run_that_asks_for_nothing_keeps_its_status(project):
    (project / "test_theirs.py").write_text("def test_red():\n    assert False\n")
    assert pytest_in(project)[0] == 1
    assert pytest_in(project, "test_none.py")[0] == 4
    (project / "test_theirs.py").write_text("")
    assert pytest_in(project)[0] == 5


@pytest.mark.parametrize(
    "theirs",
    [
        (
            'import pytest\n\n@pytest.mark.parametrize("precision", ["fp32", "fp16"])\ndef '
            "test_their_own(precision):\n    assert precision\n"
        ),
        (
            "import pytest\n\n@pytest.fixture\ndef precision():\n    return 32\n\ndef test_their_own(precision):\n "
            "   assert precision == 32\n"
        ),
        "def test_their_own(precision):\n    assert precision == 32\n",
    ],
    ids=["parameter", "fixture", "fixture of a conftest"],
)
def test_a_name_of_theirs_is_not_the_fixture(project, theirs):
    if "import" not in theirs:
        (project / "conftest.py").write_text("import pytest\n\n@pytest.fixture\ndef precision():\n    return 32\n")
    (project / "test_theirs.py").write_text(theirs)
    (project / "test_zidle.py").write_text(IDLE)
    status, said = pytest_in(project)
    assert status == 0 and is_quiet(said), said


def test_the_word_alone_makes_no_accuracy_test_of_theirs(project):
    (project / "test_theirs.py").write_text("def test_precision():\n    assert True\n")
    status, said = pytest_in(project, "-k", "precision")
    assert status == 0 and "1 passed" in said and not (project / "reports").exists(), said


def test_a_run_that_only_collects_leaves_the_report(project):
    (project / "test_theirs.py").write_text(ACCURACY)
    assert pytest_in(project, "--precision-device=cpu", "--precision-report=numbers")[0] == 0
    before = (project / "numbers" / "precision.json").read_bytes()
    status, said = pytest_in(
        project, "--collect-only", "-k", "precision", "--precision-device=cpu", "--precision-report=numbers"
    )
    assert status == 0 and "test_theirs.py" in said and "outcome" not in said and " accuracy =" not in said, said
    assert (project / "numbers" / "precision.json").read_bytes() == before
    assert {path.name for path in (project / "numbers").iterdir()} == {"precision.json", "precision.md"}


def test_an_option_of_their_own_goes_on_working(project):
    (project / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--device', default='gpu7')\n    "
        "parser.addoption('--report', default='theirs')\n"
    )
    (project / "test_theirs.py").write_text(
        ACCURACY + "\ndef test_other(request):\n    assert request.config.getoption('--device') == 'mine' and "
        "request.config.getoption('--report') == 'theirs'\n"
    )
    status, said = pytest_in(project, "--precision-device=cpu", "--device=mine", "--precision-report=numbers")
    assert status == 0 and "2 passed" in said and (project / "numbers" / "precision.json").exists(), said


@needs_torch_npu
def test_the_fixture_alone_asks_for_it(project):
    """Without an option, a conftest line or the word in -k; here the file of tests does not name the harness either."""
    (project / "mine.py").write_text(CASE)
    (project / "test_model.py").write_text(
        "import sys; sys.path.insert(0, '.')\nfrom mine import SMALL\n\ndef test_small(precision):\n    "
        "precision(SMALL, 1)\n"
    )
    status, said = pytest_in(project, "-k", "small")
    assert status == 0 and "1 passed" in said, said


@pytest.mark.parametrize("line", ["conftest", "-p"])
def test_the_line_of_a_conftest_adds_the_short_names(project, line):
    (project / "test_model.py").write_text(ACCURACY)
    if line == "conftest":
        (project / "conftest.py").write_text('pytest_plugins = ("harness.plugin",)')
    status, said = pytest_in(
        project,
        "--device=cpu",
        "--report",
        "numbers",
        "-W",
        "error",
        *([] if line == "conftest" else ["-p", "harness.plugin"]),
    )
    assert status == 0 and "1 passed" in said and (project / "numbers" / "precision.json").exists(), said
    assert "--precision-device" in pytest_in(project, "--help")[1]


@pytest.mark.parametrize("option", ["--precision-report", "--report"], ids=["prefixed", "short"])
def test_a_path_after_a_space_works_or_says_what_to_write(project, tmp_path, option):
    (project / "test_model.py").write_text(ACCURACY)
    (project / "conftest.py").write_text('pytest_plugins = ("harness.plugin",)')
    outside = tmp_path / "outside"
    device = "--precision-device=cpu"
    status, said = pytest_in(project, device, option, str(outside))
    assert status == 0 and (outside / "precision.json").exists(), said  # it was not there before
    status, said = pytest_in(project, device, option, str(outside))
    assert status == 4 and f"write {option}={outside}" in said and said.count("ERROR") == 1, said
    status, said = pytest_in(project, device, option, str(outside), "--lang", "zh")  # "zh" is no path of tests either
    assert status == 4 and f"write {option}={outside}" in said and said.count("ERROR") == 1, said
    for arguments in (
        [f"{option}={outside}"],
        [option, str(outside), "test_model.py"],
        [option, str(outside), "--rootdir=."],
    ):
        if option == "--report" and "--rootdir=." in arguments:
            continue  # pytest does not look for a conftest.py there
        status, said = pytest_in(project, device, *arguments)
        assert status == 0 and "1 passed" in said, said
    (project / "inside").mkdir()
    status, said = pytest_in(project, device, option, "inside")
    assert status == 0 and (project / "inside" / "precision.json").exists(), said


def test_a_device_that_an_option_names_stops_the_run_with_one_line(project):
    (project / "test_model.py").write_text(ACCURACY)
    status, said = pytest_in(project, "--precision-device=cuda:7")
    assert status == 4 and "ERROR: --precision-device=cuda:7: cuda:7 was asked for and" in said, said
    assert pytest_in(project, "--precision-device=cuda:7", "--collect-only", "-q")[0] == 0


@needs_torch_npu
def test_the_header_names_the_device_why_it_is_this_one_and_its_switches(project):
    (project / "test_model.py").write_text(ACCURACY)
    status, said = pytest_in(project, "--precision-device=emulated")
    assert status == 0, said
    assert said.count("accuracy: npu:0 is Ascend910B4, emulated: it was asked for") == 1
    assert "conv_allow_hf32 on, matmul_allow_hf32 off" in said and "TASK_QUEUE_ENABLE=0" in said and "threads" in said


@needs_torch_npu
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_a_case_file_may_begin_with_an_import_of_transformers(project, workers):
    pytest.importorskip("transformers")
    if workers:
        pytest.importorskip("xdist")
    (project / "test_model.py").write_text(
        "import pytest\nfrom transformers import BertConfig, BertModel\n"
        + CASE
        + "CONFIG = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,"
        " intermediate_size=64, vocab_size=50)\nBERT = Case(name='bert', model=lambda: BertModel(CONFIG), "
        "inputs=lambda g: torch.randint(0, 50, (1, 8), generator=g),"
        " forward=lambda m, i: m(i).last_hidden_state)\n\n@pytest.mark.parametrize('seed', [1, 2])\ndef "
        "test_precision(precision, seed):\n    precision(BERT, seed)\n"
    )
    status, said = pytest_in(project, *workers)
    assert status == 0 and "2 passed" in said, said
    if not workers:  # opened while tests were collected
        assert said.count("accuracy: npu:0 is Ascend910B4, emulated: there is no trace of CANN") == 1


def test_this_checkout_selects_accuracy_tests_alone_by_the_word():
    status, said = pytest_in(ROOT, "--collect-only", "-q", "-k", "precision", "--device=cpu", "-p", "no:cacheprovider")
    names = [line for line in said.splitlines() if "::" in line]
    assert status == 0 and len(names) > 600
    assert [name for name in names if not name.split("[")[0].endswith("::test_precision")] == []


# -------- torch's backends


def test_the_import_of_backends_is_held_back_and_restored(monkeypatch):
    monkeypatch.setattr(autoload, "_before", [])
    module = sys.modules["torch"]
    for before in (None, "1"):
        monkeypatch.setitem(sys.modules, "torch", module)
        monkeypatch.delenv(autoload.VARIABLE, raising=False)
        if before:
            monkeypatch.setenv(autoload.VARIABLE, before)
        autoload.hold()
        assert os.environ.get(autoload.VARIABLE) == before, "torch is imported already: nothing is to be held back"
        monkeypatch.delitem(sys.modules, "torch")
        autoload.hold()
        autoload.hold()
        assert os.environ[autoload.VARIABLE] == "0"
        monkeypatch.setattr(autoload, "_before", [])
        autoload.hold()  # as in a worker, which this process started meanwhile
        autoload.release()
        assert os.environ.get(autoload.VARIABLE) == before and autoload.BEFORE not in os.environ
        autoload.release()
        assert os.environ.get(autoload.VARIABLE) == before


@needs_torch_npu
def test_a_card_that_is_open_restores_it(monkeypatch):
    monkeypatch.setattr(autoload, "_before", [None])
    monkeypatch.setenv(autoload.VARIABLE, "0")
    monkeypatch.setattr("harness.emulator.installed", lambda: False)
    monkeypatch.setattr(npu, "inherits_emulation", lambda: False)
    monkeypatch.setattr(npu, "loads", lambda library: None)
    monkeypatch.setattr(npu, "answering", lambda *arguments: "a card")
    assert npu.open_card(0) == "a card" and autoload.VARIABLE not in os.environ


def test_a_script_may_import_torch_after_the_harness():
    code = "import os, harness, torch; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=of_a_shell(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "0", done.stderr


CHILD = "import torch; print(torch.npu.get_device_name(0), (torch.ones(2).npu() + 1).tolist())"
HARNESS_LATER = "import torch, torch_npu; from harness import open_device; print(open_device('auto').backend)"


@needs_torch_npu
def test_a_child_of_an_emulated_process_sees_the_npu():
    """With a bare `import torch`, and when it opens the device only after torch_npu found the emulated CANN by
    itself.
    """
    open_device("emulated")
    for code, expected in ((CHILD, "Ascend910B4 [2.0, 2.0]"), (HARNESS_LATER, "emulated")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr
    code = "import torch, torch_npu; from harness import emulator; emulator.install(emulator.Machine(devices=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "this process already plays Machine(devices=1" in done.stderr
