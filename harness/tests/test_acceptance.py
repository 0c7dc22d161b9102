"""What a run does with accepted numbers that it cannot be talked round with: rows of one name, cases that are gone,
folders that cannot be written.
"""

import json

import pytest

from harness.tests.needs import skip_without_torch_npu
from harness.tests.test_plugin import CASE, stored, torch_npu_is_imported, user, write  # noqa: F401

ACCEPT = "--baseline=accept"
TWO = (
    CASE
    + """
import os
NAMES = os.environ["NAMES"].split(",")

@pytest.mark.parametrize("number", range(len(NAMES)))
@pytest.mark.parametrize("seed", [1, 2], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed, number):
    precision(case(name=NAMES[number], tolerance=Tolerance(preset="card")), seed)
"""
)


@pytest.fixture
def session(user, monkeypatch):
    """Runs pytest with cases of these names on the CPU as its own device; gives the exit status and the output."""
    folder = user.path / "cases"
    folder.mkdir()
    (folder / "test_them.py").write_text(TWO)
    user.makepyprojecttoml('[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"')

    def run(names, *more):
        monkeypatch.setenv("NAMES", names)
        result = user.runpytest_inprocess("--device", "cpu", "--locate", "off", *more)
        return result.ret, result.stdout.str() + result.stderr.str()

    return run


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_two_cases_of_one_name_are_errors_that_name_both_tests(user, session, workers):
    status, said = session("same,other,same", *workers)
    rows = stored(user)["rows"]
    assert status == 1 and [row["status"] for row in rows if row["case"] == "same"] == ["ERROR"] * 4
    assert [row["status"] for row in rows if row["case"] == "other"] == ["PASS"] * 2
    (reason,) = next(row["reasons"] for row in rows if row["case"] == "same" and row["seed"] == 1)
    assert (
        "two rows are called same float32 seed 1, of cases/test_them.py::test_precision[seed1-0] and "
        "cases/test_them.py::test_precision[seed1-2]" in reason
    )
    status, said = session("same,same", "--baseline=accept", *workers)
    assert (
        status == 1
        and "same float32 is not accepted: 4 of its rows did not pass" in said
        and not (user.path / "cases" / "baselines").exists()
    )


SEEDS = """
@pytest.mark.parametrize("seed", [1, 2, 3], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    precision(case(tolerance=Tolerance(preset="card"), %s), seed)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_seeds_that_give_the_same_inputs_are_errors(user, workers):
    write(user, CASE + SEEDS % "inputs=lambda generator: torch.ones(8, 16)")
    result = user.runpytest_inprocess("--device", "cpu", "--locate", "off", *workers)
    assert result.ret == 1
    rows = stored(user)["rows"]
    assert [row["status"] for row in rows] == ["PASS", "ERROR", "ERROR"]
    assert all("it has the same inputs as seed 1" in row["reasons"][0] for row in rows[1:])
    assert "same inputs" in result.stdout.str()


@pytest.mark.parametrize(
    "more",
    [
        "inputs=lambda generator: torch.randn(8, 16, generator=generator)",
        (
            "inputs=lambda generator: torch.ones(8, 16), forward=lambda model, x: model(x) + torch.randn(4, "
            "device=x.device)"
        ),
    ],
    ids=["inputs drawn", "the model draws"],
)
def test_seeds_that_change_the_inputs_or_what_the_model_draws_are_rows_of_their_own(user, more):
    write(user, CASE + SEEDS % more)
    assert user.runpytest_inprocess("--device", "cpu", "--locate", "off").ret == 0
    assert [row["status"] for row in stored(user)["rows"]] == ["PASS"] * 3


def test_a_test_that_measures_a_row_twice_is_an_error(user):
    write(user, CASE + "\ndef test_precision(precision):\n    precision(case(), 1)\n    precision(case(), 1)\n")
    assert user.runpytest_inprocess("--device", "cpu").ret == 1
    assert "test_precision, which measures it twice" in stored(user)["rows"][0]["reasons"][0]


def test_a_case_that_was_renamed_or_deleted_fails_a_whole_run(user, session):
    assert session("one,two", "--baseline=accept")[0] == 0
    status, said = session("one,two")
    assert status == 0 and "it was renamed" not in said
    words = "no case of this run is called two float32, of which 2 rows are accepted: it was renamed or deleted"
    for names, more in (("one,two v2", ("-k", "precision")), ("one", ("cases",))):
        status, said = session(names, *more)
        assert status == 1 and words in said, said
    for part in (("-k", "precision and seed1"), ("cases/test_them.py",), ("-k", "precision and seed1", ACCEPT)):
        status, said = session("one,two v2", *part)
        assert status == 0 and "it was renamed" not in said, said
        assert "1 accepted case had no row in this part of the tests" in said
    status, said = session("one", ACCEPT)
    assert status == 0 and words in said


def test_accepting_a_part_of_the_tests_keeps_the_other_rows(user, session):
    assert session("one,two", ACCEPT)[0] == 0
    (report,) = (user.path / "reports" / "accepted").glob("*/precision.json")
    before, one = json.loads(report.read_text()), user.path / "cases" / "baselines" / "one-float32.json"
    headings = report.with_suffix(".md").read_text().count("### ")
    status, said = session("one,two", "-k", "precision and seed1-0", ACCEPT)
    assert status == 0 and "3 rows of earlier runs stay in the accepted report\n" in said
    assert "one float32: 1 rows that were accepted before did not run and stay: seed 2" in said
    after = json.loads(report.read_text())
    names = [(row["case"], row["seed"]) for row in after["rows"]]
    assert names == [(row["case"], row["seed"]) for row in before["rows"]] and len(names) == 4
    assert report.with_suffix(".md").read_text().count("### ") == headings
    (entry,) = json.loads(one.read_text())["entries"].values()
    assert list(entry["rows"]) == ["1", "2"]
    session("one,two,three", "-k", "precision and seed2-2", ACCEPT)
    assert [row["case"] for row in json.loads(report.read_text())["rows"]].count("three") == 1
    session("one", ACCEPT)  # all tests: what has no case any more is gone
    assert {row["case"] for row in json.loads(report.read_text())["rows"]} == {"one"}


def test_an_accepted_report_that_cannot_be_read_accepts_nothing(user, session):
    assert session("one", ACCEPT)[0] == 0
    (report,) = (user.path / "reports" / "accepted").glob("*/precision.json")
    report.write_text("{")
    status, said = session("two", "-k", "precision", ACCEPT)
    assert status == 1 and report.read_text() == "{"
    assert "nothing was accepted, since the accepted report cannot be read (" in said
    assert not (user.path / "cases" / "baselines" / "two-float32.json").exists()


def test_cases_whose_names_differ_by_odd_characters_are_accepted_apart(user, session):
    names = "a b,a_b,a/b"
    assert session(names, "--baseline=accept")[0] == 0
    assert len(list((user.path / "cases" / "baselines").glob("*.json"))) == 3
    assert session(names)[0] == 0 and {mark for row in stored(user)["rows"] for mark in row["marks"]} == {"IDENTICAL"}


def test_a_known_failure_that_was_accepted_excuses_nothing_worse(user, monkeypatch):
    skip_without_torch_npu()
    folder = user.path / "cases"
    folder.mkdir()
    entry = '[[known]]\ncase = "small"\nreason = "a kernel"\nlink = "https://example.org/1"\nexpires = 2999-12-31\n'
    (folder / "known_failures.toml").write_text(entry)
    source = (
        CASE
        + """
import os

class Broken(torch.nn.Linear):
    def __init__(self):
        super().__init__(16, 4)

    def forward(self, x):
        y = super().forward(x)
        return y if y.device.type == "cpu" else y * float(os.environ["BY"])

@pytest.mark.parametrize("seed", [1, 2, 3], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed):
    precision(case(model=Broken, tolerance=Tolerance(rel_l2=1e-4, reason="ours")), seed)
"""
    )
    write(user, source)

    def run(by, *more):
        monkeypatch.setenv("BY", by)
        result = user.runpytest_inprocess("--device", "emulated", "--locate", "off", *more)
        return result.ret, [row["marks"] for row in stored(user)["rows"]]

    assert run("1.01")[0] == 0  # numbers alone, and smaller than the output
    assert run("100")[0] == 1 and run("nan")[0] == 1  # with nothing accepted
    assert run("1.01", "--baseline=accept")[0] == 0
    accepted = json.loads((folder / "baselines" / "small-float32.json").read_text())["entries"][
        "Ascend910B4 (emulated)"
    ]["rows"]["1"]
    assert (accepted["status"], accepted["criteria"]) == ("FAIL", ["rel_l2"])
    status, marks = run("1.01")
    assert status == 0 and all("KNOWN FAILURE" in mark and "IDENTICAL" in mark for mark in marks)
    for by in ("1.02", "nan", "0.5"):
        status, marks = run(by)
        assert status == 1 and not any("KNOWN FAILURE" in mark for mark in marks), by
