"""The plugin through pytester: what a user types, the lines that they read, the files that they find."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pandas  # noqa: F401
import pytest
import torch

import harness.report
import harness.run.validation
from harness import open_device
from harness.errors import DeviceError
from harness.tests.needs import needs_torch_npu

# Most of those imports are not used: pytester forgets what an inner run imported, and torch cannot be imported twice.

ROOT = Path(__file__).parents[2]

CASE = """
import pytest, torch
from harness import Case, Tolerance

def tokens(generator):
    return torch.randn(2, 8, 16, generator=generator)

def case(name="small", tolerance=Tolerance(max_diff=1e-3), inputs=tokens, model=None, **more):
    build = model or (lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4)))
    return Case(name=name, model=build, inputs=inputs, tolerance=tolerance, **more)
"""

FIVE_SEEDS = (
    CASE
    + """
SMALL = case()

@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    precision(SMALL, seed)

def test_other():
    assert True
"""
)


@pytest.fixture(scope="module", autouse=True)
def torch_npu_is_imported():
    """Before an inner run imports parts of it and has them forgotten."""
    with contextlib.suppress(DeviceError):
        open_device("emulated")
    import torch._dynamo  # noqa: F401  a dispatch mode brings it in, and it cannot be imported twice either


@pytest.fixture
def user(pytester, monkeypatch):
    """A user's project: a test file, the plugin, no report yet."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    pytester.makeini("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    pytester.makeconftest('pytest_plugins = ("harness.plugin",)')
    return pytester


def write(user, source):
    user.makepyfile(test_model=source)


def run(user, *arguments, device="cpu"):
    return user.runpytest_inprocess("--device", device, *arguments)


def stored(user, directory="reports"):
    return json.loads((user.path / directory / "precision.json").read_text())


def markdown(user, directory="reports"):
    return (user.path / directory / "precision.md").read_text()


def only_test(body):
    return CASE + "\ndef test_precision(precision):\n" + "".join(f"    {line}\n" for line in body.splitlines())


def test_every_seed_is_a_row_and_every_number_is_kept(user):
    write(user, FIVE_SEEDS)
    result = run(user, "-k", "precision")
    result.assert_outcomes(passed=5, deselected=1)
    result.stdout.fnmatch_lines(["*5 PASS (5 NEW) on * (cpu)", "report: *precision.md"])
    report = stored(user)
    assert [row["seed"] for row in report["rows"]] == [1, 2, 3, 4, 5]
    assert report["headline"] == {"PASS": 5, "FAIL": 0, "REGRESSED": 0, "ERROR": 0, "SKIPPED": 0, "NEW": 5}
    assert {row["weights"] for row in report["rows"]} == {"seeded:0"}
    assert len({row["inputs_sha256"] for row in report["rows"]}) == 5
    assert all(row["cos_sim"] <= 1 and row["shape"] == [2, 8, 4] for row in report["rows"])
    assert report["backend"] == "cpu" and report["stack"]["torch"]
    assert "EMULATED" not in markdown(user)


def test_runs_repeat_to_the_last_digit(user):
    write(user, FIVE_SEEDS)
    run(user)
    first = [row["expected_sha256"] for row in stored(user)["rows"]]
    run(user)
    assert [row["expected_sha256"] for row in stored(user)["rows"]] == first


def test_workers_bring_the_same_rows(user):
    pytest.importorskip("xdist")
    write(user, FIVE_SEEDS)
    result = user.runpytest_subprocess("--device", "cpu", "-n", "2", "-k", "precision")
    result.assert_outcomes(passed=5)
    report = stored(user)
    assert [row["seed"] for row in report["rows"]] == [1, 2, 3, 4, 5]
    assert report["backend"] == "cpu" and report["stack"]["torch"]


def test_junit_holds_the_numbers_as_properties(user):
    write(user, FIVE_SEEDS)
    run(user, "-k", "seed3", "--junitxml", "junit.xml")
    properties = ElementTree.parse(user.path / "junit.xml").findall(".//property")
    values = {item.get("name"): item.get("value") for item in properties}
    row = stored(user)["rows"][0]
    assert float(values["max_diff"]) == row["max_diff"] and float(values["cos_sim"]) == row["cos_sim"]
    assert values["status"] == "PASS" and values["seed"] == "3"


def test_report_goes_where_it_is_told_in_chinese(user):
    write(user, FIVE_SEEDS)
    result = run(user, "-k", "seed1", "--report", "elsewhere/deep", "--lang", "zh")
    result.stdout.fnmatch_lines(["*正在打开设备（cpu）", "精度：cpu 为 *：指定了 CPU", "精度：*threads"])
    assert "outcome: passed" in result.outlines  # which CI reads, in every language
    assert "精度" in markdown(user, "elsewhere/deep")
    assert not (user.path / "reports").exists()


def test_ids_tell_float16_from_bfloat16(user):
    body = """
from harness.plugin import dtype_id
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"], ids=dtype_id)
def test_precision(precision, dtype):
    precision(case(dtype=dtype, tolerance=Tolerance(max_diff=1.0)), 42)
"""
    write(user, CASE + body)
    run(user, "-k", "precision and float16").assert_outcomes(passed=1, deselected=2)
    assert [row["dtype"] for row in stored(user)["rows"]] == ["float16"]
    run(user, "-k", "precision and bfloat16").assert_outcomes(passed=1, deselected=2)
    assert [row["dtype"] for row in stored(user)["rows"]] == ["bfloat16"]


FAULTY = (
    CASE
    + """
import inspect

class Faulty(torch.nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault, self.layer = fault, torch.nn.Linear(16, 4)
    def forward(self, x):
        on_device = any(frame.function == "run_on_device" for frame in inspect.stack(0))
        return self.fault(self.layer(x)) if on_device else self.layer(x)

def run(precision, fault):
    precision(case(model=lambda: Faulty(fault)), 42)
"""
)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("lambda y: y * 1.1", "max_diff *e-* at (*) (up to 1.00e-03 allowed)*"),
        (
            "lambda y: y.index_fill(1, torch.tensor([3]), float('nan'))",
            "*8 elements are NaN or infinite on one side only, the first at (0, 3, 0): nan*",
        ),
        ("lambda y: y.flip(1)", "max_diff *allowed)*"),
        ("lambda y: y[:, :4]", "shape (2, 4, 4) where (2, 8, 4) was expected"),
        ("lambda y: y.double()", "dtype float64 where float32 was expected"),
        ("lambda y: {'other': y}", "output 'output': the device did not return it"),
    ],
    ids=["scaled", "nan", "tokens swapped", "cut", "dtype", "name"],
)
def test_a_fault_on_the_device_fails_with_its_words(user, fault, words):
    write(user, FAULTY + f"\ndef test_precision(precision):\n    run(precision, {fault})\n")
    result = run(user)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["FAIL small float32 seed 42", f"  {words.replace('[', '[[]')}"])
    row = stored(user)["rows"][0]
    assert row["status"] == "FAIL" and row["reasons"]
    assert row["reasons"][0] in markdown(user)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "compared nothing: the test must hand its case to the `precision` fixture"),
        ("precision(case(forward=lambda model, x: None), 1)", "small: the model returned None: nothing to compare"),
        (
            "precision(case(forward=lambda model, x: model(x).argmax(-1)), 1)",
            "returned only int64, in which no rounding error shows",
        ),
        ("precision(case(forward=lambda model, x: 'text'), 1)", "returned a str where a tensor was expected"),
        ("precision(case(model=lambda: 3), 1)", "model() returned a int where a torch.nn.Module was expected"),
        ("precision(case(forward=lambda model, x: [][0]), 1)", "on the CPU: IndexError: list index out of range"),
        ("raise KeyError('lost')", "KeyError: 'lost'"),
    ],
    ids=["no call", "None", "integers", "text", "no module", "model raises", "exception"],
)
def test_a_case_that_cannot_be_compared_is_an_error_row(user, body, words):
    write(user, only_test(body))
    result = run(user)
    result.assert_outcomes(failed=1)
    report = stored(user)
    assert report["headline"]["ERROR"] == 1
    assert words in report["rows"][0]["reasons"][0]


def test_a_skipped_case_is_a_row_that_says_why(user):
    write(user, only_test("pytest.skip('needs 64 GiB')"))
    run(user).assert_outcomes(skipped=1)
    row = stored(user)["rows"][0]
    assert (row["status"], row["reasons"]) == ("SKIPPED", ["needs 64 GiB"])


def test_a_broken_fixture_is_an_error_row(user):
    write(
        user,
        CASE + "@pytest.fixture\ndef broken():\n    raise OSError('gone')\ndef test_precision(precision, broken):\n   "
        " pass\n",
    )
    run(user).assert_outcomes(errors=1)
    assert "gone" in stored(user)["rows"][0]["reasons"][0]


def test_cases_that_did_not_run_are_rows_too(user):
    write(user, FIVE_SEEDS.replace("precision(SMALL, seed)", "assert seed != 2; precision(SMALL, seed)"))
    run(user, "-x")
    rows = stored(user)["rows"]
    assert [row["status"] for row in rows] == ["PASS", "ERROR", "ERROR", "ERROR", "ERROR"]
    assert rows[4]["reasons"] == ["not run: the session ended before it"]
    assert rows[4]["seed"] == 5


SLOW = FIVE_SEEDS.replace(
    "precision(SMALL, seed)", "precision(SMALL, seed)\n    import time; time.sleep(0 if seed < 3 else 60)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_a_whole_report(user, number):
    write(user, SLOW)
    command = [sys.executable, "-m", "pytest", "--device", "cpu", "-k", "precision"]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell starts what runs in the background deaf to it
    process = subprocess.Popen(
        command,
        cwd=user.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=heard,
    )
    path = user.path / "reports" / "precision.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or stored(user)["headline"]["PASS"] < 2):
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) != 0
    rows = stored(user)["rows"]
    assert [row["status"] for row in rows[:2]] == ["PASS", "PASS"]
    assert len(rows) == 5 and all(row["status"] in ("PASS", "ERROR") for row in rows)
    assert [path.name for path in (user.path / "reports").iterdir() if path.name.startswith(".")] == []


@needs_torch_npu
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_an_emulated_operator_runs_is_no_failure_of_the_device(user, number):
    hang = "emulator.fault('aclnnSilu', kind='hang', seconds=120)"
    body = f"with {hang} if seed == 3 else contextlib.nullcontext(): precision(SMALL, seed)"
    imports = "import contextlib, pytest, torch\nfrom harness import emulator"
    write(user, FIVE_SEEDS.replace("import pytest, torch", imports, 1).replace("precision(SMALL, seed)", body))
    command = [sys.executable, "-m", "pytest", "--device", "emulated", "-k", "precision", "-p", "no:warnings"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        cwd=user.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=heard,
    )
    path = user.path / "reports" / "precision.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or stored(user)["headline"]["PASS"] < 2):
        time.sleep(0.1)
    time.sleep(3)  # into the operator; what is before it takes milliseconds
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    rows = stored(user)["rows"]
    assert [row["status"] for row in rows] == ["PASS", "PASS", "ERROR", "ERROR", "ERROR"]
    assert (
        rows[2]["reasons"] == ["it was running when the session ended (KeyboardInterrupt)"]
        and rows[2]["case"] == "small"
    )
    assert {row["reasons"][0] for row in rows[3:]} == {"not run: the session ended before it"}


def test_an_unknown_device_is_a_usage_error(user):
    write(user, FIVE_SEEDS)
    result = run(user, "-k", "precision", device="tpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "tpu" in result.stderr.str()
    assert not (user.path / "reports" / "precision.json").exists()


def test_an_unwritable_report_directory_is_a_usage_error_before_any_test(user):
    write(user, FIVE_SEEDS)
    (user.path / "file").write_text("")
    result = run(user, "-k", "precision", "--report", "file/reports")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot write there" in result.stderr.str()
    assert "PASSED" not in result.stdout.str()


def test_a_run_without_accuracy_tests_opens_no_device_and_writes_nothing(user):
    write(user, "def test_other():\n    assert True\n")
    result = run(user, device="npu")
    result.assert_outcomes(passed=1)
    assert not (user.path / "reports").exists()


def test_weights_are_built_once_for_all_seeds_and_dtypes(user):
    body = """
builds = []
def build():
    builds.append(1)
    return torch.nn.Linear(16, 4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_precision(precision, dtype, seed):
    precision(case(model=build, dtype=dtype, tolerance=Tolerance(max_diff=1.0)), seed)
    assert len(builds) == 1
"""
    write(user, CASE + body)
    run(user).assert_outcomes(passed=6)


# -------- faults planted underneath the real torch_npu

EMULATED = (
    CASE
    + """
from harness import emulator

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))

LIMITS = Tolerance(max_diff=1e-5, token_cos_sim=0.99999)

def test_precision(precision):
    {body}

"""
)


@needs_torch_npu
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("precision(case(model=Small, tolerance=LIMITS), 1)", "PASS", None),
        (
            (
                "with emulator.fault('aclnnSilu', kind='scale', by=1.01): precision(case(model=Small, "
                "tolerance=LIMITS), 1)"
            ),
            "FAIL",
            "max_diff",
        ),
        (
            "with emulator.fault('aclnnSilu', kind='nan'): precision(case(model=Small, tolerance=LIMITS), 1)",
            "FAIL",
            "NaN or infinite on one side only",
        ),
        (
            (
                "with emulator.fault('aclnnSilu', kind='swap_rows', at=3): precision(case(model=Small, "
                "tolerance=LIMITS), 1)"
            ),
            "FAIL",
            "token_cos_sim",
        ),
        (
            "with emulator.fault('aclnnSilu', kind='unwritten'): precision(case(model=Small, tolerance=LIMITS), 1)",
            "ERROR",
            "aclnnSilu: output 0 was not written",
        ),
        (
            "with emulator.fault('aclnnSilu', kind='missing'): precision(case(model=Small, tolerance=LIMITS), 1)",
            "ERROR",
            "aclnnSilu is not emulated",
        ),
        (
            "precision(case(model=Small, tolerance=LIMITS, forward=lambda m, x: torch.special.i0(m(x))), 1)",
            "FAIL",
            "FELL BACK: computed by the CPU in place of the device: aten::i0",
        ),
    ],
    ids=["healthy", "scaled", "nan", "tokens swapped", "never written", "no such operator", "fallback"],
)
def test_a_fault_in_the_emulator_fails_the_run_with_the_right_words(user, body, status, words):
    write(user, EMULATED.replace("{body}", body))
    result = user.runpytest_subprocess("--device", "emulated", "-p", "no:warnings")
    report = stored(user)
    row = report["rows"][0]
    assert row["status"] == status, row["reasons"]
    assert result.ret == (0 if status == "PASS" else 1)
    assert "EMULATED: measured on an emulated device" in result.stdout.str()
    assert markdown(user).startswith("**EMULATED")
    if words is not None:
        assert any(words in reason for reason in row["reasons"]), row["reasons"]
    if words and words.startswith("FELL BACK"):
        assert "FELL BACK" in row["marks"]


@needs_torch_npu
def test_a_failed_operator_does_not_spoil_the_next_case(user):
    body = """
@pytest.mark.parametrize("seed", [1, 2, 3], ids=["before", "broken", "after"])
def test_precision(precision, seed):
    from contextlib import nullcontext
    from harness import emulator
    with emulator.fault("aclnnSilu", kind="error") if seed == 2 else nullcontext():
        precision(case(tolerance=Tolerance(max_diff=1e-5)), seed)
"""
    write(user, CASE + body)
    user.runpytest_subprocess("--device", "emulated", "-p", "no:warnings")
    assert [row["status"] for row in stored(user)["rows"]] == ["PASS", "ERROR", "PASS"]


@needs_torch_npu
def test_rows_after_the_devices_end_are_errors_of_the_device(user, monkeypatch):
    """With torch_npu's queue on. No known failure excuses them, nothing is located, all rows have the same inputs."""
    body = """
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_precision(precision, seed):
    from contextlib import nullcontext
    from harness import emulator
    with emulator.fault("aclnnSilu", kind="error", code=507015) if seed == 2 else nullcontext():
        precision(case(inputs=lambda generator: torch.ones(2, 8, 16)), seed)
"""
    write(user, CASE + body)
    entry = (
        '[[known]]\ncase = "small"\nseeds = [{}]\ncriteria = ["run"]\nreason = "r"\nlink = '
        '"https://example.org/1"\nexpires = 2999-01-01\n'
    )
    (user.path / "known.toml").write_text("\n".join(entry.format(seed) for seed in (2, 3)))
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    result = user.runpytest_subprocess("--device", "emulated", "-p", "no:warnings", "--known-failures=known.toml")
    rows = stored(user)["rows"]
    assert [row["status"] for row in rows] == ["PASS", "ERROR", "ERROR", "ERROR"]
    assert ["KNOWN FAILURE" in row["marks"] for row in rows] == [False, True, False, False]
    failed = "on npu:0 (Ascend910B4): RuntimeError: aclnnSilu failed in torch_npu's queue"
    assert f"RunError: {failed}" in rows[1]["reasons"][0]
    for row in rows[2:]:
        said = f"DeviceError: the device stopped computing at small float32 seed 2: {failed}"
        assert row["reasons"][0].startswith(said)
    assert not any(row["located"] for row in rows) and result.ret == pytest.ExitCode.TESTS_FAILED


@needs_torch_npu
def test_a_first_run_that_compiles_is_said(user):
    write(user, FIVE_SEEDS)
    options = ("-p", "no:warnings", "--fault", "aclnnSilu:hang:seconds=3,nth=1", "-k", "seed1")
    result = user.runpytest_subprocess("--device", "emulated", *options)
    row = stored(user)["rows"][0]
    assert row["status"] == "PASS" and row["first_run_ms"] > 3000 > row["actual_ms"]
    words = "the first run took 3.* s, the second * s; the first is not timed"
    result.stdout.fnmatch_lines([f"small float32 seed 1: {words}"])


def test_the_performance_table_comes_on_request(user):
    write(user, FIVE_SEEDS)
    run(user, "-k", "seed1 or seed2", "--bench")
    rows = stored(user)["performance"]
    assert [(row["case"], row["device"], row["batch_size"], row["p99_ms"]) for row in rows] == [
        ("small", "cpu", 2, None)
    ]
    assert "Performance" in markdown(user)


# -------- planted faults


@needs_torch_npu
def test_a_planted_fault_fails_the_case_and_the_report_says_so_first(user):
    write(user, FIVE_SEEDS)
    result = user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnSilu:scale:by=1.1", "-k", "precision")
    result.assert_outcomes(failed=5, deselected=1)
    result.stdout.fnmatch_lines(["FAULT PLANTED: aclnnSilu:scale:by=1.1 (acted on 10 of the 10 calls that it matches)"])
    assert stored(user)["stack"]["faults"] == ["aclnnSilu:scale:by=1.1 (acted on 10 of the 10 calls that it matches)"]
    assert "FAULTS WERE PLANTED: aclnnSilu:scale:by=1.1" in markdown(user).split("# Accuracy report")[0]
    user.runpytest_inprocess("--device", "emulated", "-k", "precision").assert_outcomes(
        passed=5, deselected=1
    )  # it is gone
    assert "FAULT" not in markdown(user)


@needs_torch_npu
def test_a_fault_that_never_acted_fails_the_run(user):
    write(user, FIVE_SEEDS)
    result = user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnGelu:nan", "-k", "precision")
    result.assert_outcomes(passed=5, deselected=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "aclnnGelu:nan never acted: none of the operators that it names ran*",
            "outcome: failures",
        ]
    )
    user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnSilo:scale:by=2", "-k", "precision")
    report, text = stored(user), markdown(user)
    sentence = (
        "aclnnSilo:scale:by=2.0 never acted: no operator of the emulated CANN is called aclnnSilo; the nearest name is "
        "aclnnSilu"
    )
    assert report["outcome"] == "failures" and report["idle_faults"] == [sentence]
    assert f"The run fails: {sentence}." in text and "rows pass" not in text
    assert harness.report.load(user.path / "reports").outcome == "failures"


@needs_torch_npu
def test_faults_act_in_workers_too(user):
    pytest.importorskip("xdist")
    write(user, FIVE_SEEDS)
    result = user.runpytest_subprocess("--device", "emulated", "--fault", "aclnnSilu:nan", "-n", "2", "-k", "precision")
    result.assert_outcomes(failed=5)
    assert "never acted" not in result.stdout.str() and "FAULTS WERE PLANTED" in markdown(user)


@needs_torch_npu
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_what_a_fault_did_is_counted_in_rows_that_raised_and_in_all_workers(user, workers):
    if workers:
        pytest.importorskip("xdist")
    write(user, FIVE_SEEDS)
    arguments = ("--device", "emulated", "--fault", "aclnnSilu:error", "--locate", "off", "-k", "precision", *workers)
    result = user.runpytest_subprocess(*arguments)
    result.assert_outcomes(failed=5, **({} if workers else {"deselected": 1}))
    # A row that raises under the watch runs once more without it.
    result.stdout.fnmatch_lines(["FAULT PLANTED: aclnnSilu:error (acted on 10 of the 10 calls that it matches)"])
    assert all(row["reasons"][0].count("raised in") == 1 for row in stored(user)["rows"])


@needs_torch_npu
def test_a_fault_that_ends_its_process_is_not_said_to_have_done_nothing(user):
    pytest.importorskip("xdist")
    write(user, FIVE_SEEDS)
    fault = ("--fault", "aclnnSilu:crash", "--fault", "aclnnGelu:nan", "--locate", "off")
    result = user.runpytest_subprocess("--device", "emulated", *fault, "-n", "1", "-k", "seed1")
    result.assert_outcomes(failed=1)
    assert [row["marks"] for row in stored(user)["rows"]] == [["CRASHED"]]
    counts = {"aclnnSilu:crash": "1 of the 1 calls", "aclnnGelu:nan": "0 of the 0 calls"}
    assert stored(user)["stack"]["faults"] == [f"{name} (acted on {of} that it matches)" for name, of in counts.items()]
    assert [text.partition(" ")[0] for text in stored(user)["idle_faults"]] == ["aclnnGelu:nan"]


def test_faults_that_cannot_be_planted_stop_the_session(user):
    write(user, FIVE_SEEDS)
    for arguments, words in (
        (
            ("--device", "cpu", "--fault", "aclnnSilu:nan"),
            "--precision-fault breaks an emulated device and this one is",
        ),
        (("--fault", "aclnnSilu:magic"), "no kind of fault is called 'magic'"),
    ):
        result = user.runpytest_inprocess(*arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert words in result.stderr.str()
    assert not (user.path / "reports").exists() or not list((user.path / "reports").iterdir())


@needs_torch_npu
def test_the_fixture_plants_until_the_test_ends(user):
    write(
        user,
        CASE
        + """
from harness import open_device

def test_broken(plant_fault):
    planted = plant_fault("aclnnSilu", kind="scale", by=2.0)
    x = torch.ones(3, device=open_device("emulated").torch_device)
    assert torch.nn.functional.silu(x).cpu()[0] > 1.4 and planted.hits == 1

def test_sound():
    x = torch.ones(3, device=open_device("emulated").torch_device)
    assert torch.nn.functional.silu(x).cpu()[0] < 0.8

def test_idle(plant_fault):
    plant_fault("aclnnGelu", kind="nan")
""",
    )
    result = user.runpytest_inprocess("--device", "emulated")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*planted and never met: aclnnGelu:nan*"])


# -------- the references, and what judges by them

SMALL = (
    CASE
    + """
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 64)
    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))
"""
)

FLOORED = (
    SMALL
    + """
@pytest.mark.parametrize("seed", [1, 2], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    precision(Case(name="small", model=Small, inputs=tokens, dtype="DTYPE"), seed)
"""
)


@needs_torch_npu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_floor_is_what_judges_by_default_and_every_reference_is_shown(user, dtype):
    write(user, FLOORED.replace("DTYPE", dtype))
    assert user.runpytest_inprocess("--device", "emulated").ret == 0
    row = stored(user)["rows"][0]
    assert row["preset"] == "floor" and row["conditioning"] > 0 and row["rerun"] == {} and row["threads"] > 0
    assert 0.5 < row["forecast_ratio"] < 2 and 0.2 < row["golden_ratio"] < 5
    assert row["forecast"].startswith("Ascend A2: convolutions in HF32")
    assert {"comparison", "golden", "cpu", "forecast"} <= row["measured"]["output"].keys()
    text = markdown(user)
    assert (
        "measured / forecast" in text and "Limits: preset floor." in text and "Conditioning: moving every input" in text
    )


@needs_torch_npu
def test_a_small_factor_that_no_element_shows_fails_the_floor_and_passes_the_card(user):
    write(user, FLOORED.replace("DTYPE", "float32"))
    fault = ("--device", "emulated", "--fault", "aclnnAddmm:scale:by=1.000003")
    assert user.runpytest_inprocess(*fault).ret == 1
    reasons = " ".join(stored(user)["rows"][0]["reasons"])
    assert "gain_ratio" in reasons and "allowed); a limit of" in reasons
    assert user.runpytest_inprocess(*fault, "--preset", "card").ret == 0
    assert stored(user)["rows"][0]["preset"] == "card"


@needs_torch_npu
def test_stored_results_are_judged_again_by_another_preset(user, capsys):
    from harness.commands.main import main

    write(user, FLOORED.replace("DTYPE", "float32"))
    user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnAddmm:scale:by=1.000003", "--preset", "card")
    path = str(user.path / "reports" / "precision.json")
    capsys.readouterr()
    assert main(["judge", path]) == 0
    assert "card" not in capsys.readouterr().err
    assert main(["judge", path, "--preset", "floor"]) == 1
    out = capsys.readouterr().out
    assert "2 FAIL" in out and "gain_ratio" in out and re.search(r"\| +PASS +\|", out)  # what was stored stands beside
    assert main(["judge", path, "--preset", "nice"]) == 1
    assert "no preset is called 'nice'" in capsys.readouterr().err


@needs_torch_npu
def test_a_device_that_differs_from_run_to_run_is_marked_with_its_size(user):
    write(user, FLOORED.replace("DTYPE", "float32"))
    user.runpytest_inprocess("--device", "emulated", "--fault", "aclnnAddmm:noise:by=1e-7", "-k", "seed1")
    row = stored(user)["rows"][0]
    assert "NONDETERMINISTIC" in row["marks"] and 0 < row["rerun"]["rel_l2"] < 1e-6
    assert "the device's second run differs from its first by" in markdown(user)


def test_a_reference_that_differs_from_run_to_run_is_an_error(user):
    noise = "import numpy; x = x + 1e-3 * float(numpy.random.default_rng().random()); return self.second"
    write(user, FLOORED.replace("DTYPE", "float32").replace("return self.second", noise))
    for more in ((), ("--rerun-reference",)):
        user.runpytest_inprocess("--device", "cpu", "-k", "seed1", *more)
        row = stored(user)["rows"][0]
        assert row["status"] == "ERROR" and "REFERENCE UNSTABLE: two runs on the CPU differ" in row["reasons"][0]
    write(user, FLOORED.replace("DTYPE", "float32"))
    assert user.runpytest_inprocess("--device", "cpu", "--rerun-reference").ret == 0


def test_a_model_without_float64_says_so(user):
    source = FLOORED.replace("DTYPE", "float32").replace(
        "return self.second", "assert x.dtype != torch.float64, 'no float64 here'; return self.second"
    )
    write(user, source)
    assert user.runpytest_inprocess("--device", "cpu", "-k", "seed1").ret == 1
    assert any("no float64 reference was measured" in reason for reason in stored(user)["rows"][0]["reasons"])
    assert "NO GOLDEN: the model does not run in float64" in markdown(user) and "no float64 here" in markdown(user)


@needs_torch_npu
def test_a_second_run_reads_the_store_and_a_damaged_entry_is_computed_again(user, monkeypatch):
    monkeypatch.setenv(
        "OMP_NUM_THREADS", str(torch.get_num_threads())
    )  # part of the key; a worker has its share of the cores
    write(user, FLOORED.replace("DTYPE", "float32"))
    arguments = ("--device", "emulated", "--reference-store", str(user.path / "store"), "-p", "no:warnings")
    assert user.runpytest_inprocess(*arguments).ret == 0
    first = stored(user)["rows"]
    assert [row["stored"] for row in first] == [[], []]
    assert user.runpytest_inprocess(*arguments).ret == 0
    second = stored(user)["rows"]
    assert second[0]["stored"] == [
        "golden",
        "cpu",
        "forecast",
        "moved",
    ] and "read from the reference store" in markdown(user)
    for before, after in zip(first, second):
        assert before["expected_sha256"] == after["expected_sha256"] and before["measured"] == after["measured"]
    for path in (user.path / "store").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    result = user.runpytest_subprocess(*arguments[:-2])
    assert result.ret == 0 and "it was removed and is computed again" in result.stdout.str()
    assert [row["measured"] for row in stored(user)["rows"]] == [row["measured"] for row in first]
    source = FLOORED.replace("DTYPE", "float32").replace("silu(self.first(x))", "silu(self.first(x) * 2)")
    write(user, source)
    assert user.runpytest_inprocess(*arguments).ret == 0
    assert stored(user)["rows"][0]["stored"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--preset", "nice"), "--precision-preset: there is no 'nice'; there are floor"),
        (("--reference-store", "/proc/none"), "--precision-reference-store: reference store"),
    ],
    ids=["preset", "store"],
)
def test_settings_that_cannot_be_stop_the_session(user, arguments, words):
    write(user, FLOORED.replace("DTYPE", "float32"))
    result = user.runpytest_inprocess("--device", "cpu", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR and words in result.stderr.str()
    assert not (user.path / "reports" / "precision.json").exists()


SWIN = """
import pytest, torch
from harness import Case

def swin():
    from transformers import SwinConfig, SwinModel
    sizes = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = SwinModel(SwinConfig(**sizes, attn_implementation="sdpa"))
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.data.normal_(std=2.0)
    return model

def test_precision(precision):
    inputs, forward = lambda g: torch.randn(1, 3, 32, 32, generator=g), lambda m, x: m(x).last_hidden_state
    case = Case(name="swin", model=swin, inputs=inputs, forward=forward)
    precision(case, 1)
"""


@needs_torch_npu
def test_a_transformers_model_is_held_against_a_reference_that_saw_no_npu(user):
    """On a machine with an NPU transformers makes a boolean mask of swin's position bias, on the CPU too: both sides
    would be wrong alike.
    """
    write(user, SWIN)
    result = user.runpytest_subprocess("--device", "emulated", "-p", "no:warnings")
    row = stored(user)["rows"][0]
    assert result.ret == 1 and row["status"] == "FAIL" and row["golden_rel_l2"] > 1e-2
    assert "in the process without torch_npu" in row["reference"] and row["cpu_golden_rel_l2"] < 1e-5


# -------- accepted numbers

LIFE = (
    SMALL
    + """
import os

def forward(model, x):
    if x.device.type == "npu":
        torch.npu.matmul.allow_hf32 = "WORSE" in os.environ
    return model(x)

@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    limits = Tolerance(preset="card")
    case = Case(name="small", model=Small, inputs=tokens, forward=forward, weights_seed=WEIGHTS, tolerance=limits)
    precision(case, seed)
"""
)


def life(seeds=(1, 2, 3, 4, 5), weights=0):
    return LIFE.replace("SEEDS", str(seeds)).replace("WEIGHTS", str(weights))


def kinds(user):
    return [(row["status"], row["marks"], (row["baseline"] or {}).get("kind")) for row in stored(user)["rows"]]


@needs_torch_npu
def test_the_life_of_a_baseline(user, monkeypatch):
    def session(*more):
        result = user.runpytest_inprocess("--device", "emulated", *more)
        return result.ret, result.stdout.str()

    path = user.path / "cases" / "baselines" / "small-float32.json"
    write(user, life())
    assert session()[0] == 0
    assert kinds(user) == [("PASS", ["NEW"], "NEW")] * 5 and not path.exists()
    status, said = session("--baseline=accept")
    assert status == 0 and "accepted 5 rows into" in said
    first = json.loads(path.read_text())
    assert first["schema"] == "precision-baseline/1" and list(first["entries"]) == ["Ascend910B4 (emulated)"]
    assert (
        user.path / "reports" / "accepted" / "ascend910b4-emulated_torch_npu-2.13.0_cann-9.1.0" / "precision.md"
    ).exists()
    assert session()[0] == 0
    assert kinds(user) == [("PASS", ["IDENTICAL"], "IDENTICAL")] * 5

    status, said = session("--fault", "aclnnAddmm:scale:by=1.00000006")  # a last place: passes, and is said
    assert {kind for _, _, kind in kinds(user)} <= {"DRIFT", "REGRESSED", "IMPROVED"} and "accepted" in said

    monkeypatch.setenv("WORSE", "1")
    assert session()[0] == 1
    assert kinds(user) == [("REGRESSED", ["REGRESSED"], "REGRESSED")] * 5
    assert (
        "where" in stored(user)["rows"][0]["reasons"][0]
        and "--precision-baseline=accept" in stored(user)["rows"][0]["reasons"][0]
    )
    assert session("--baseline=off")[0] == 0
    assert session("--baseline=accept")[0] == 0 and session()[0] == 0
    monkeypatch.delenv("WORSE")
    status, said = session()
    assert (
        status == 0
        and [kind for *_, kind in kinds(user)] == ["IMPROVED"] * 5
        and "so that it cannot be lost again" in said
    )

    path.write_text(json.dumps(first))
    write(user, life(weights=1))
    assert session()[0] == 1
    assert all(
        "NOT COMPARABLE" in row["marks"] and "other weights" in row["reasons"][0] for row in stored(user)["rows"]
    )
    write(user, life(seeds=(1, 2, 3)))
    status, said = session()
    assert status == 0 and "2 accepted rows of small float32 did not run: seed 4, seed 5" in said
    assert (
        "2 rows that were accepted before did not run and are dropped: seed 4, seed 5"
        in session("--baseline=accept")[1]
    )

    other = {"Ascend910B2 (emulated)": first["entries"]["Ascend910B4 (emulated)"]}
    path.write_text(json.dumps(first | {"entries": other}))
    assert session()[0] == 0 and kinds(user)[0][2] == "NEW"
    for text, words in (
        ("{", "is damaged"),
        (json.dumps(first | {"schema": "precision-baseline/9"}), "has schema 'precision-baseline/9'"),
    ):
        path.write_text(text)
        assert session()[0] == 1
        assert stored(user)["rows"][0]["status"] == "ERROR" and words in stored(user)["rows"][0]["reasons"][0]


@needs_torch_npu
def test_a_failure_and_a_broken_device_are_not_accepted(user):
    write(user, life().replace('preset="card"', "max_diff=1e-12"))
    result = user.runpytest_inprocess("--device", "emulated", "--baseline=accept")
    assert result.ret == 1 and "is not accepted: 5 of its rows did not pass" in result.stdout.str()
    assert not (user.path / "cases").exists()
    write(
        user,
        life().replace(
            "return model(x)", "return model(x) if float(x.sum()) > 0 or x.device.type == 'cpu' else model(x[:, :, :3])"
        ),
    )
    result = user.runpytest_inprocess("--device", "emulated", "--baseline=accept")
    assert (
        result.ret == 1 and "of its rows did not pass" in result.stdout.str() and not (user.path / "cases").exists()
    )  # some are errors
    result = user.runpytest_inprocess("--device", "emulated", "--baseline=accept", "--fault", "aclnnAddmm:hf32")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "are no baseline" in result.stderr.str()


@needs_torch_npu
def test_a_limit_that_was_loosened_fails_until_it_is_accepted(user):
    write(user, FIVE_SEEDS)
    assert user.runpytest_inprocess("--device", "emulated", "--baseline=accept", "-k", "precision").ret == 0
    write(user, FIVE_SEEDS.replace("SMALL = case()", "SMALL = case(tolerance=Tolerance(max_diff=1e-2))"))
    result = user.runpytest_inprocess("--device", "emulated", "-k", "precision")
    assert (
        result.ret == 1
        and "small float32 is judged more loosely than when it was accepted: max_diff 0.01 where 0.001 was accepted"
        in result.stdout.str()
    )
    assert user.runpytest_inprocess("--device", "emulated", "--baseline=accept", "-k", "precision").ret == 0
    assert user.runpytest_inprocess("--device", "emulated", "-k", "precision").ret == 0
    write(user, FIVE_SEEDS)
    assert user.runpytest_inprocess("--device", "emulated", "-k", "precision").ret == 0  # tightened
