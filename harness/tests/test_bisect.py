"""python -m harness bisect: stacks played by shell commands that copy made-up reports, each run counted in a file."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.commands.main import main
from harness.report import JSON_NAME
from harness.upgrade import bisect as bisecting
from harness.upgrade.bisect import read_stacks

ROOT = Path(__file__).parents[2]
ACCEPTED = json.loads(
    next((ROOT / "reports" / "accepted").glob("*/*.json")).with_name(JSON_NAME).read_text(encoding="utf-8")
)
CRITERIA = {"ERROR": "run", "SKIPPED": "skip", "FAIL": "max_diff"}
ROWS = [
    row for row in ACCEPTED["rows"] if row["dtype"] == "float32" and "photo" not in row["test"]
]  # five seeds of a large model, and digits
EIGHT = (
    "alpha",
    "beta 2",
    "v2.10.0-rc1",
    "torch_npu 2.9.0 / CANN 8.3.RC1",
    "it's $HOME; `date`",
    "2.10",
    "夜间",
    "latest",
)  # the oldest first


def report(factor=1.0, *, case=None, cann="8.3.RC1", backend="npu", status=None, **more):
    """The accepted rows with `factor` times their error, of all cases or of one."""
    rows = copy.deepcopy(ROWS)
    for row in rows:
        if factor != 1.0 and case in (None, row["case"]):
            row |= {"golden_rel_l2": row["golden_rel_l2"] * factor, "actual_sha256": f"{row['actual_sha256']} {factor}"}
        row |= {"status": status, "reasons": ["no card answers"], "criteria": [CRITERIA[status]]} if status else {}
        row |= more
    return ACCEPTED | {
        "rows": rows,
        "stack": ACCEPTED["stack"] | {"device": "Ascend910B4", "cann": cann},
        "backend": backend,
    }


class Bench:
    """A folder with reports, the list of stacks that copy them, and the count of runs."""

    def __init__(self, folder):
        self.folder, self.file, self.count = folder, folder / "stacks.toml", folder / "count"

    def copies(self, result, name):
        """A command that writes a report, counts itself and exits as pytest does on a failing row."""
        source = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        source.write_text(json.dumps(result))
        return f"echo {name.encode().hex()} >> {self.count}; cp {source} {{report}}/{JSON_NAME}; exit 1"

    def write(self, stacks, top=""):
        """The list: names with a report or a command each."""
        lines = [top]
        for name, result in stacks.items():
            command = result if isinstance(result, str) else self.copies(result, name)
            lines += ["[[stack]]", f"name = {json.dumps(name, ensure_ascii=False)}", f"command = {json.dumps(command)}"]
        self.file.write_text("\n".join(lines), encoding="utf-8")

    def words(self, *more):
        return ["bisect", str(self.file), "--state", str(self.folder / "state"), *map(str, more)]

    def ran(self):
        """The names of what ran to its end, in order."""
        return [bytes.fromhex(line).decode() for line in self.count.read_text().split()] if self.count.exists() else []


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def stacks(change, names=EIGHT, **others):
    """Names with reports: worse from position `change` on."""
    result = {name: report(1.1, cann="8.5.0") if index >= change else report() for index, name in enumerate(names)}
    return result | others


def run(capsys, bench, *more):
    """(exit status, standard output, standard error)."""
    status = main(bench.words(*more))
    return status, *capsys.readouterr()


def answer(out):
    return out.splitlines()[0].strip("*").replace("\\", "")


# -------- the search


@pytest.mark.parametrize("change", range(1, 8))
def test_of_eight_stacks_three_runs_after_the_ends_find_the_change(bench, capsys, change):
    bench.write(stacks(change))
    status, out, err = run(capsys, bench)
    ran = bench.ran()
    assert status == 0
    assert answer(out) == f"the numbers changed between {EIGHT[change - 1]} and {EIGHT[change]}"
    assert ran[:2] == [EIGHT[0], EIGHT[-1]] and len(ran) == len(set(ran)) <= 5
    assert f"{len(ran)} runs, 0 kept from before, of 8 stacks" in out
    assert len([line for line in err.splitlines() if line.startswith("run ")]) == len(ran)
    assert f"run 1: {EIGHT[0]} … good: the good end" in err and f"run 2: {EIGHT[-1]} … bad: 5 REGRESSED" in err


def test_the_answer_shows_every_run_and_what_else_changed(bench, capsys):
    bench.write(stacks(5))
    _, out, _ = run(capsys, bench, "--output", bench.folder / "found.md")
    assert (bench.folder / "found.md").read_text() == out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    verdicts = {row[0]: row[1] for row in table[1:9]}
    assert list(verdicts) == [name.replace("`", "\\`") for name in EIGHT]
    assert list(verdicts.values()) == ["good", "not needed", "not needed", "not needed", "good", "bad", "bad", "bad"]
    assert "| cann" in out and "8.3.RC1" in out and "8.5.0" in out
    assert (
        f"{EIGHT[4]} → {EIGHT[5]}: 5 REGRESSED".replace("`", "\\`") in out
        and "1.100 times on average over 5 seeds" in out
    )


def test_a_stack_that_cannot_run_is_passed_over(bench, capsys):
    reports = stacks(4, names="abcdefg")
    reports["d"] = "echo no such wheel >&2; exit 3 # {report}"
    bench.write(reports)
    status, out, err = run(capsys, bench)
    assert status == 0 and answer(out) == "the numbers changed between c and e; d could not be run"
    assert "cannot run: no report; exit status 3; it said last: no such wheel" in err
    (log,) = (bench.folder / "state").glob("d-*/log.txt")
    assert log.read_text() == "no such wheel\n"


def test_ends_that_cannot_run_give_their_place_to_the_next(bench, capsys):
    reports = stacks(3, names="abcdef") | {
        "a": "no-such-program --report {report}",
        "f": f"echo '{{{{' > {{report}}/{JSON_NAME}",
    }
    bench.write(
        {name: found if isinstance(found, dict) else f"{found} # {{report}}" for name, found in reports.items()}
    )
    status, out, err = run(capsys, bench)
    assert status == 0 and answer(out) == "the numbers changed between c and d"
    assert "run 1: a … cannot run: no report; exit status 127; it said last: sh:" in err
    assert "run 2: b … good: the good end" in err
    assert "run 3: f … cannot run: " in err and "is not a report: it is not JSON" in err


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (report(status="ERROR"), "nothing was measured: ERROR no card answers; exit status 1"),
        (report(status="SKIPPED"), "nothing was measured: SKIPPED no card answers"),
        (ACCEPTED | {"rows": []}, "nothing was measured: no rows"),
        (
            report() | {"rows": [{"status": "PASS"}]},
            "row 1: case: nothing where a value was expected; write the file again",
        ),
        (report() | {"schema": "other/1"}, "has schema 'other/1' where 'precision-report/1' was expected"),
        (
            report(backend="emulated"),
            "other device: the reports come from Ascend910B4 (npu) and Ascend910B4 (emulated)",
        ),
    ],
    ids=itertools.count(1),
)
def test_a_report_that_shows_nothing_is_no_verdict(bench, capsys, result, why):
    bench.write(stacks(2, names="abc", b=result))
    status, out, err = run(capsys, bench)
    assert status == 0 and why in err
    assert answer(out).startswith("the numbers changed between a and c; b ")


def test_another_device_is_no_end(bench, capsys):
    bench.write(stacks(2, names="abc", c=report(backend="emulated")))
    status, out, err = run(capsys, bench)
    assert status == 1 and out == ""
    assert (
        "harness bisect: 'c' cannot be the bad end: the reports come from Ascend910B4 (npu) and Ascend910B4 (emulated)"
        in err
    )


def test_two_stacks_that_run_are_needed(bench, capsys):
    bench.write(stacks(1, names="ab", b="false # {report}"))
    status, out, err = run(capsys, bench)
    assert status == 1 and out == ""
    assert (
        "harness bisect: only 'a' of the 2 stacks can run where two are needed; mend them and add --retry (b: "
        "no report; exit status 1;" in err
    )
    bench.write({"a": "false # {report}", "b": "false # {report}"})
    assert "harness bisect: none of the 2 stacks can run" in run(capsys, bench)[2]


def test_ends_that_agree_leave_nothing_to_search(bench, capsys):
    bench.write(stacks(8))
    status, out, _ = run(capsys, bench)
    assert status == 1 and bench.ran() == [EIGHT[0], EIGHT[-1]]
    assert answer(out) == "good and bad end agree: latest is no worse than alpha"


def test_what_changed_finds_a_bit(bench, capsys):
    names = "abcde"
    bench.write({name: report(1.0001 if index >= 2 else 1.0) for index, name in enumerate(names)})
    assert run(capsys, bench)[0] == 1
    status, out, _ = run(capsys, bench, "--what", "changed")
    assert status == 0 and answer(out) == "the numbers changed between b and c" and "6 DRIFT" in out
    bench.write({name: report() for name in names})
    status, out, _ = run(capsys, bench, "--what", "changed")
    assert status == 1 and answer(out) == "good and bad end agree: e is to the bit as a"


def test_rows_that_fail_all_the_way_are_compared_by_their_bits(bench, capsys):
    failing = {"status": "FAIL", "reasons": ["max_diff"], "criteria": ["max_diff"]}
    bench.write({name: report(factor, **failing) for name, factor in {"a": 1.0, "b": 1.0, "c": 1.001}.items()})
    status, out, _ = run(capsys, bench, "--what", "changed")
    assert status == 0 and answer(out) == "the numbers changed between b and c"
    assert run(capsys, bench)[0] == 1  # nothing that passed is worse


def test_a_case_limits_the_rows_that_decide(bench, capsys):
    def both(large, digits):
        result, other = report(large, case=ROWS[0]["case"]), report(digits, case="aimv2-digits")
        return result | {"rows": [*result["rows"][:5], *other["rows"][5:]]}

    bench.write({"a": both(1, 1), "b": both(1, 2), "c": both(1.1, 2), "d": both(1.1, 2)})
    assert answer(run(capsys, bench, "--case", "aimv2-digits")[1]) == "the numbers changed between a and b"
    assert answer(run(capsys, bench, "--case", ROWS[0]["case"])[1]) == "the numbers changed between b and c"
    assert answer(run(capsys, bench, "--case", "float32-seed")[1]) == "the numbers changed between b and c"
    assert sorted(bench.ran()) == ["a", "b", "c", "d"]  # the same runs served
    status, out, err = run(capsys, bench, "--case", "resnet")
    assert status == 1 and out == ""
    assert (
        "--case resnet is no case and no part of a test id of the good end; it has the cases aimv2-digits, "
        f"{ROWS[0]['case']}" in err
    )


# -------- what is kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_was_killed_goes_on_where_it_was(bench, number):
    reports = stacks(3, names="abcdef")
    gate, child = bench.folder / "gate", bench.folder / "child"
    gate.touch()
    held = bench.copies(reports["d"], "d")
    bench.write(reports | {"d": f"if test -e {gate}; then sleep 300 & echo $! > {child}; wait; fi; {held}"})
    command = [sys.executable, "-m", "harness", *bench.words()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes
    )
    waits(lambda: child.exists() and child.read_text().strip())
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines()[-1] == "harness bisect: interrupted"
    waits(lambda: not alive(int(child.read_text())))
    assert bench.ran() == ["a", "f"]
    gate.unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and answer(done.stdout) == "the numbers changed between c and d"
    assert "kept: a … good: the good end" in done.stderr and "2 runs, 2 kept from before, of 6 stacks" in done.stdout
    assert sorted(bench.ran()) == sorted(set(bench.ran()))


def test_an_edited_entry_runs_anew_and_the_others_do_not(bench, capsys):
    reports = {name: bench.copies(found, name) for name, found in stacks(2, names="abcd").items()}
    bench.write(reports)
    assert answer(run(capsys, bench)[1]) == "the numbers changed between b and c"
    before = bench.ran()
    status, out, _ = run(capsys, bench)
    assert status == 0 and bench.ran() == before and f"0 runs, {len(before)} kept from before" in out
    bench.write(reports | {"c": bench.copies(report(), "c")})
    assert answer(run(capsys, bench)[1]) == "the numbers changed between c and d"
    assert bench.ran() == [*before, "c"]


def test_what_could_not_run_is_kept_until_retry(bench, capsys):
    present = bench.folder / "card"
    reports = {name: bench.copies(found, name) for name, found in stacks(2, names="abc").items()}
    bench.write(reports | {"b": f"test -e {present} || exit 1; {reports['b']}"})
    assert "b could not be run" in answer(run(capsys, bench)[1])
    present.touch()
    assert "b could not be run" in answer(run(capsys, bench)[1])
    status, out, _ = run(capsys, bench, "--retry")
    assert status == 0 and answer(out) == "the numbers changed between b and c" and "1 runs, 2 kept from before" in out
    assert sorted(bench.ran()) == ["a", "b", "c"]


# -------- the command


def waits(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(process):
    """Whether a process still runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interrupt_while_a_command_is_started_leaves_no_process(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    stack = bisecting.StackCommand(name="a", command="trap '' HUP; exec sleep 300 # {report}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with pytest.raises(KeyboardInterrupt):
            bisecting._execute(stack, tmp_path / "a")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    waits(lambda: not alive(started[0]), seconds=20)
    assert not (tmp_path / "a" / "result.json").exists()


def test_a_time_limit_ends_all_that_was_started(bench, capsys, monkeypatch):
    monkeypatch.setattr("harness.upgrade.bisect.GRACE", 0.5)
    child = bench.folder / "child"
    deaf = f"(trap '' TERM; sleep 300) & sleep 300 & echo $! > {child}; echo began; wait # {{report}}"
    bench.write(stacks(2, names="abc", b=deaf), top="timeout = 2")
    begin = time.monotonic()
    status, out, err = run(capsys, bench)
    assert status == 0 and answer(out) == "the numbers changed between a and c; b could not be run"
    assert "at its time limit; it said last: began" in err and time.monotonic() - begin < 30
    waits(lambda: not alive(int(child.read_text())))


def test_nothing_stays_running_beside_the_next_stack(bench, capsys):
    child = bench.folder / "child"
    reports = stacks(1, names="ab")
    bench.write(reports | {"a": f"sleep 300 & echo $! > {child}; {bench.copies(reports['a'], 'a')}"})
    assert run(capsys, bench)[0] == 0
    waits(lambda: not alive(int(child.read_text())))


def test_names_and_folders_are_quoted_for_the_shell(tmp_path, capsys):
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    bench = Bench(folder)
    said = tmp_path / "said"
    commands = {}
    for name, result in stacks(7).items():
        (tmp_path / f"{name.encode().hex()}.json").write_text(json.dumps(result))
        commands[name] = (
            f"printf '%s\\n' -{{name}} >> {said}; cp {tmp_path}/{name.encode().hex()}.json "
            f"{{report}}/{JSON_NAME}; test ${{{{HOME}}}}"
        )
    bench.write(commands)
    status, _, _ = run(capsys, bench)
    assert status == 0 and set(said.read_text().splitlines()) <= {f"-{name}" for name in EIGHT}
    assert len(said.read_text().splitlines()) == 4


TWO = '[[stack]]\nname = "a"\n[[stack]]\nname = "b"\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[stack", "is not TOML ("),
        (
            'command = "x {report}"',
            "holds no [[stack]] where two or more were expected; write one for each environment",
        ),
        ('[stack]\nname = "a"', "holds no [[stack]] where two or more were expected"),
        ("stack = 3", "holds no [[stack]] where two or more were expected"),
        ('[[stack]]\nname = "a"\ncommand = "x {report}"', "holds one [[stack]] where two or more were expected"),
        (
            'command = "x {report}"\n' + TWO.replace('"b"', '"a"'),
            "2 stacks are called 'a'; give each a name of its own",
        ),
        (
            'command = "x {report}"\n' + TWO.replace('name = "b"', ""),
            "stack 2 has no name where one line of text was expected; name it",
        ),
        (
            'command = "x {report}"\n' + TWO.replace('"b"', "2.9"),
            "stack 2 has the name 2.9 where one line of text was expected",
        ),
        ('command = "x {report}"\n' + TWO.replace('"b"', '"b\\nc"'), "stack 2 has the name 'b\\nc' where one line"),
        (
            TWO,
            (
                "stack 1 (a) has no command where a line for the shell was expected; give it one, or one to all "
                "above the first [[stack]]"
            ),
        ),
        ('command = ["x"]\n' + TWO, "stack 1 (a) has the command ['x'] where a line for the shell was expected"),
        ('comand = "x"\n' + TWO, "holds 'comand'; what is known there is command, timeout, stack"),
        (
            'command = "x {report}"\n' + TWO + "version = 3",
            "stack 2 holds 'version'; what is known there is name, command, timeout",
        ),
        (
            'command = "x {report} {verison}"\n' + TWO,
            "{verison} in its command is neither {name} nor {report}; write {{ and }} for braces of the shell",
        ),
        ('command = "x {report} {name.x}"\n' + TWO, "{name.x} in its command is neither {name} nor {report}"),
        ('command = "x {report} {name!r}"\n' + TWO, "{name} in its command"),
        ('command = "x {report} }"\n' + TWO, "the braces of its command do not pair"),
        (
            'command = "x"\n' + TWO,
            "its command has no {report}, the folder that it must write precision.json into; add it",
        ),
        (
            'timeout = -1\ncommand = "x {report}"\n' + TWO,
            "stack 1 (a) has the timeout -1 where seconds above 0 were expected; correct it, or leave it out",
        ),
        ('timeout = nan\ncommand = "x {report}"\n' + TWO, "has the timeout nan"),
        ('timeout = true\ncommand = "x {report}"\n' + TWO, "has the timeout True"),
    ],
    ids=itertools.count(1),  # the texts hold the word by which accuracy tests are selected
)
def test_a_bad_list_is_refused_on_one_line(bench, capsys, text, why):
    bench.file.write_text(text)
    status, out, err = run(capsys, bench)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"harness bisect: {bench.file}") and why in " ".join(err.split()).replace("b c", "b\\nc")
    assert not (bench.folder / "state").exists()


def test_an_absent_list_is_said(bench, capsys):
    assert "no list of stacks at" in run(capsys, bench)[2]


def test_a_stack_may_replace_what_is_given_to_all(bench):
    bench.file.write_text('command = "x {report}"\ntimeout = 3600\n' + TWO + 'command = "y {report}"\ntimeout = 7.5')
    first, second = read_stacks(bench.file)
    assert (first.name, first.command, first.timeout) == ("a", "x {report}", 3600)
    assert (second.name, second.command, second.timeout) == ("b", "y {report}", 7.5)
    assert first.folder != second.folder and first.folder.startswith("a-")


def test_the_command_answers_without_torch(bench):
    bench.write(stacks(2, names="abc"))
    code = (
        f"import sys; from harness.commands.main import main\nstatus = main({bench.words()!r})\nassert 'torch' not "
        "in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 0
        and answer(done.stdout) == "the numbers changed between b and c"
        and done.stderr.count("\n") == 3
    )
    done = subprocess.run(
        [sys.executable, "-m", "harness", "bisect", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "python -m harness bisect stacks.toml" in done.stdout and "[[stack]]" in done.stdout


def test_a_known_failure_on_both_sides_is_no_change(bench, capsys):
    known = {
        "marks": ["KNOWN FAILURE"],
        "known": {"reason": "because", "link": "https://example.org/1", "expires": "2999-01-01"},
    }
    known |= {"status": "FAIL", "reasons": ["max_diff"], "criteria": ["max_diff"]}
    bench.write({"old": report(**known), "new": report(**known)})
    status, out, _ = run(capsys, bench, "--what", "changed")
    assert status == 1 and "good and bad end agree" in out
