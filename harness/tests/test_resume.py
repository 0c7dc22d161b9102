"""A run that goes on where an earlier one ended: rows stand where nothing that they rest on has changed."""

import json
import os
import signal

from harness.plugin.resume import code_of_run
from harness.report import load
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401
from harness.tests.test_survival import pytest_run

COUNTED = (
    CASE
    + """
import os

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x)

def counted(generator):
    x = torch.randn(2, 8, 4, generator=generator)
    x[0, 0, 0] = generator.initial_seed()  # which tells whose forward it is, moved by a rounding or not
    return x

def forward(model, x):
    with open("ran", "a") as file:
        file.write(f"{round(float(x[0, 0, 0]))}\\n")
    return model(x)

@pytest.mark.parametrize("seed", range(1, 6))
def test_precision(precision, seed):
    {before}
    precision(Case(name="small", model=Block, inputs=counted, forward=forward, isolated=False), seed)
"""
)


def forwards(user):
    """How many different inputs ran since the last time that this was asked."""
    path = user.path / "ran"
    lines = set(path.read_text().splitlines()) if path.exists() else set()
    path.unlink(missing_ok=True)
    return len(lines)


CHANGES = {
    "inputs": lambda text: text.replace("return x", "return x * 2", 1),
    "weights": lambda text: text.replace("forward=forward,", "forward=forward, weights_seed=1,"),
    "code": lambda text: text + "\n# another line\n",
}
# Times, and what is measured with the first row of a case in a process.
VOLATILE = ("expected_ms", "actual_ms", "first_run_ms", "conditioning")


def plain(report):
    rows = [{name: value for name, value in row.items() if name not in VOLATILE} for row in report["rows"]]
    return rows, report["stack"], report["headline"]


def test_a_killed_run_is_resumed_and_equals_an_uninterrupted_one(user):
    write(user, COUNTED.replace("{before}", "if seed == 3 and not os.path.exists('again'): os.kill(os.getpid(), 9)"))
    assert pytest_run(user).returncode == -signal.SIGKILL
    assert forwards(user) == 2
    (user.path / "again").write_text("")
    done = pytest_run(user, "--resume")
    assert done.returncode == 0 and "2 rows are of the run before, which this one resumes" in done.stdout, done.stdout
    assert forwards(user) == 3
    resumed = stored(user)
    assert resumed["headline"]["PASS"] == 5
    assert pytest_run(user, "--report=other").returncode == 0
    assert plain(resumed) == plain(stored(user, directory="other"))


def test_rows_run_again_where_something_changed(user):
    text = COUNTED.replace("{before}", "pass")
    write(user, text)
    assert pytest_run(user).returncode == 0 and forwards(user) == 5
    for what, change in CHANGES.items():
        text = change(text)
        write(user, text)
        done = pytest_run(user, "--resume")
        assert done.returncode == 0 and forwards(user) == 5 and "resumes" not in done.stdout, what


def test_inputs_that_change_by_a_file_are_noticed(user):
    """The code is the same, and the digest of the inputs is not: here of a number beside the tensor."""
    text = COUNTED.replace("{before}", "pass").replace("return x", "return x, float(open('size').read())", 1)
    write(user, text.replace("def forward(model, x):", "def forward(model, given):\n    x = given[0] * given[1]"))
    (user.path / "size").write_text("1")
    assert pytest_run(user).returncode == 0 and forwards(user) == 5
    assert pytest_run(user, "--resume").returncode == 0 and forwards(user) == 0
    (user.path / "size").write_text("2")
    assert pytest_run(user, "--resume").returncode == 0 and forwards(user) == 5


def test_failing_rows_and_those_of_another_stack_run_again(user):
    write(user, COUNTED.replace("{before}", "pass"))
    assert pytest_run(user).returncode == 0 and forwards(user) == 5
    path = user.path / "reports" / "precision.json"
    report = json.loads(path.read_text())
    report["rows"][1] |= {"status": "FAIL", "reasons": ["max_diff"], "criteria": ["max_diff"]}
    path.write_text(json.dumps(report))
    assert pytest_run(user, "--resume").returncode == 0 and forwards(user) == 1
    report = json.loads(path.read_text())
    report["stack"]["torch"] = "2.0"
    path.write_text(json.dumps(report))
    assert pytest_run(user, "--resume").returncode == 0 and forwards(user) == 5


def test_workers_resume_too(user):
    write(user, COUNTED.replace("{before}", "pass"))
    threads = {"OMP_NUM_THREADS": "1"}  # as many as a worker has: they are in the stack
    assert pytest_run(user, **threads).returncode == 0 and forwards(user) == 5
    assert pytest_run(user, "--resume", "-n", "2", **threads).returncode == 0 and forwards(user) == 0
    assert [row.seed for row in load(user.path / "reports").rows] == [1, 2, 3, 4, 5]


def test_the_code_of_a_run_is_that_of_its_files(tmp_path, monkeypatch):
    module = tmp_path / "of_ones_own.py"
    module.write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = code_of_run()
    import of_ones_own  # noqa: F401

    first = code_of_run()
    module.write_text("a = 2\n")
    assert len({before, first, code_of_run()}) == 3
    module.write_text("a = 1\n")
    assert code_of_run() == first and os.path.exists(module)
