"""python -m harness gate: every way in which a row can differ between two reports, by its name, and the exit status."""

import json
import math
import re
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.commands.main import main
from harness.judging.status import Mark
from harness.judging.verdict import error
from harness.report import Row, build, load, row, write
from harness.report.rows import Excuse
from harness.upgrade.transitions import compare_reports

STACK = {"device": "Ascend910B4", "torch_npu": "2.9.0", "cann": "8.3.RC1", "conv_allow_hf32": True}
LATER = STACK | {"cann": "8.5.0"}
CRITERIA = {"ERROR": "run", "SKIPPED": "skip"}


def measured(seed, error=1e-4, *, case="m", limit=1.0, status=None, digest="", **more):
    """A row whose error is `error` times a factor of its own."""
    expected = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 + seed))
    result = row(
        test=f"t::test[{case}-{seed}]",
        case=case,
        dtype="float32",
        seed=seed,
        verdict=judge(compare(expected + error * noise, expected), Tolerance(max_diff=limit)),
    )
    result = replace(
        result,
        **dict(weights="seeded:0", inputs_sha256=f"in{seed}", expected_sha256=f"out{seed}", marks=(Mark.NEW,)) | more,
    )
    result = replace(result, actual_sha256=f"{seed} {error}" if digest == "" else digest)
    return replace(result, reasons=("because",), criteria=(CRITERIA[status],), rel_l2=None) if status else result


def fell_back(seed, error):
    return measured(seed, error, marks=(Mark.FELL_BACK,)).because("fallback", "FELL BACK: aten::exp")


@pytest.fixture
def reports(tmp_path):
    def two(before, after, stack=LATER, backend="npu"):
        paths = []
        for name, rows, where, kind in (("before", before, STACK, "npu"), ("after", after, stack, backend)):
            paths.append(str(write(build(rows, stack=where, backend=kind), tmp_path / name)[0]))
        return paths

    return two


SEEDS = range(5)


@pytest.mark.parametrize(
    ("before", "after", "kinds", "status"),
    [
        ([measured(n) for n in SEEDS], [measured(n) for n in SEEDS], {"IDENTICAL": 5}, 0),
        ([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS], {"REGRESSED": 5}, 1),
        ([measured(n) for n in SEEDS], [measured(n, 0.9e-4) for n in SEEDS], {"IMPROVED": 5}, 0),
        ([measured(n) for n in SEEDS], [measured(n, 1.001e-4) for n in SEEDS], {"DRIFT": 5}, 0),
        ([measured(1)], [measured(1, 1.0)], {"NEW FAILURE": 1}, 1),
        ([measured(1, 1.0)], [measured(1)], {"FIXED": 1}, 0),
        ([measured(1, 1.0)], [measured(1, 1.0)], {"STILL FAILING": 1}, 1),
        ([measured(1), measured(2)], [measured(1)], {"MISSING": 1, "IDENTICAL": 1}, 1),
        ([measured(1)], [measured(1), measured(2)], {"NEW": 1, "IDENTICAL": 1}, 0),
        ([measured(1)], [measured(1, weights="seeded:1")], {"NOT COMPARABLE": 1}, 1),
        ([measured(1)], [measured(1, status="ERROR")], {"NEW FAILURE": 1}, 1),
        ([measured(1)], [measured(1, status="SKIPPED")], {"MISSING": 1}, 1),
        ([measured(1, status="SKIPPED")], [measured(1, status="SKIPPED")], {"SKIPPED": 1}, 1),
        (
            [measured(1), measured(2, status="SKIPPED")],
            [measured(1), measured(2, status="SKIPPED")],
            {"IDENTICAL": 1, "SKIPPED": 1},
            0,
        ),
        ([measured(1), measured(2, status="SKIPPED")], [measured(1), measured(2)], {"NEW": 1, "IDENTICAL": 1}, 0),
        (
            [measured(1), measured(2, 1.0)],
            [measured(1), measured(2, status="SKIPPED")],
            {"MISSING": 1, "IDENTICAL": 1},
            1,
        ),
        ([measured(1)], [measured(1), measured(2, 1.0)], {"NEW FAILURE": 1, "IDENTICAL": 1}, 1),
        ([measured(1)], [measured(1), measured(2, status="ERROR")], {"NEW FAILURE": 1, "IDENTICAL": 1}, 1),
        ([measured(1), measured(2, 1.0)], [measured(1), measured(2, 1.0)], {"STILL FAILING": 1, "IDENTICAL": 1}, 0),
        (
            [measured(1), measured(2, 1.0)],
            [measured(1), measured(2, status="ERROR")],
            {"NEW FAILURE": 1, "IDENTICAL": 1},
            1,
        ),
        ([measured(1), measured(2, 1.0)], [measured(1), measured(2, math.nan)], {"NEW FAILURE": 1, "IDENTICAL": 1}, 1),
        ([measured(1), measured(2, 1.0)], [measured(1), measured(2, 10.0)], {"REGRESSED": 1, "IDENTICAL": 1}, 1),
        ([measured(1), measured(2, 1.0)], [measured(1), measured(2, 1.4)], {"STILL FAILING": 1, "IDENTICAL": 1}, 0),
        ([measured(1), measured(2, 1.0)], [measured(1), fell_back(2, 1.0)], {"NEW FAILURE": 1, "IDENTICAL": 1}, 1),
        (
            [measured(1), measured(2, status="ERROR")],
            [measured(1), measured(2, status="ERROR")],
            {"STILL FAILING": 1, "IDENTICAL": 1},
            0,
        ),
        (
            [measured(1), measured(2, status="ERROR")],
            [measured(1), measured(2, 1.0)],
            {"STILL FAILING": 1, "IDENTICAL": 1},
            0,
        ),
        (
            [measured(1), measured(2, math.nan)],
            [measured(1), measured(2, math.nan, digest="x")],
            {"STILL FAILING": 1, "IDENTICAL": 1},
            0,
        ),
        (
            [measured(1), measured(2, 1.0)],
            [measured(1), measured(2, 1.0, weights="seeded:1")],
            {"NOT COMPARABLE": 1, "IDENTICAL": 1},
            1,
        ),
        (
            [measured(1), measured(2, 1.0)],
            [measured(1), measured(2, weights="seeded:1")],
            {"NOT COMPARABLE": 1, "IDENTICAL": 1},
            1,
        ),
        ([measured(1)], [measured(1, inputs_sha256=None)], {"NOT COMPARABLE": 1}, 1),
        ([measured(1, digest=None)], [measured(1, digest=None)], {"NOT COMPARABLE": 1}, 1),
        ([measured(1)], [measured(1, 2e-4, digest="1 0.0001")], {"NOT COMPARABLE": 1}, 1),
        ([measured(1)], [measured(1, digest="another")], {"DRIFT": 1}, 0),
        ([], [measured(1)], {"NEW": 1}, 1),
    ],
)
def test_every_transition_has_a_name_and_a_status(reports, tmp_path, capsys, before, after, kinds, status):
    assert main(["gate", *reports(before, after), "--json", str(tmp_path / "found.json")]) == status
    (result,) = json.loads((tmp_path / "found.json").read_text())
    assert result["counts"] == kinds and result["passed"] == (status == 0)
    out = capsys.readouterr().out
    assert out.startswith("**✅" if status == 0 else "**❌")
    assert all(f"{count} {kind}" in out for kind, count in kinds.items())


def test_the_difference_of_the_stacks_stands_beside(reports, capsys, tmp_path):
    paths = reports([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS])
    assert main(["gate", *paths, "--output", str(tmp_path / "upgrade.md")]) == 1
    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "upgrade.md").read_text().strip()
    assert "| cann" in out and "8.3.RC1" in out and "8.5.0" in out and "| torch_npu" not in out
    assert out.startswith("**❌ Ascend910B4 (npu), cann 8.3.RC1, torch_npu 2.9.0 → cann 8.5.0: 5 REGRESSED**")
    assert (
        re.search(r"\| REGRESSED +\| m +\| float32 +\| +0 +\| PASS", out)
        and "1.100 times on average over 5 seeds" in out
    )


def test_an_emulated_report_never_meets_a_cards(reports, capsys):
    assert main(["gate", *reports([measured(1)], [measured(1)], backend="emulated")]) == 1
    assert "the reports come from Ascend910B4 (npu) and Ascend910B4 (emulated)" in capsys.readouterr().err


def test_several_reports_make_a_history_and_the_last_step_decides(reports, capsys):
    before, after = reports([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS])
    assert main(["gate", before, after, before]) == 0
    out = capsys.readouterr().out
    assert out.count("| REGRESSED    | m") == 5 and "5 IMPROVED" in out
    assert main(["gate", before]) == 1
    assert "one report was given" in capsys.readouterr().err


def test_a_history_is_drawn(reports, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before, after = reports([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS])
    picture = tmp_path / "history.svg"
    assert main(["gate", before, after, "--plot", str(picture)]) == 1
    drawn = picture.read_text()
    assert "<svg" in drawn and "m, float32" in drawn and "cann 8.5.0" in drawn  # as comments beside the glyphs
    assert main(["gate", before, after, "--plot", str(tmp_path / "history.doc")]) == 1
    assert "no picture ends in '.doc'; name a .png, .svg or .pdf" in capsys.readouterr().err


def test_a_history_without_matplotlib_says_what_to_install(reports, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["gate", *reports([measured(1)], [measured(1)]), "--plot", str(tmp_path / "history.png")]) == 1
    assert (
        "needs matplotlib, which is not installed: pip install" in capsys.readouterr().err
        and not (tmp_path / "history.png").exists()
    )


def test_a_known_failure_passes_the_gate_and_one_that_became_worse_does_not(reports, capsys):
    known = {
        "marks": (Mark.KNOWN,),
        "known": Excuse(reason="because", link="https://example.org/1", expires=date(2999, 1, 1)),
    }
    before, after = reports(
        [measured(n) for n in SEEDS], [measured(1, 1.0, **known), *[measured(n) for n in SEEDS if n != 1]]
    )
    assert main(["gate", before, after]) == 0 and "1 KNOWN FAILURE" in capsys.readouterr().out
    before, after = reports([measured(n, 2.0) for n in SEEDS], [measured(n, 3.5, **known) for n in SEEDS])
    assert main(["gate", before, after]) == 1 and "FAIL before, and worse now" in capsys.readouterr().out


# -------- what cannot be talked round


def rows(*seeds, **more):
    return [measured(seed, **more) for seed in seeds]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("side", ["before", "after"])
def test_two_rows_of_one_name_are_an_error_that_names_both_tests(reports, capsys, order, side):
    """Whichever comes last, the other one would be hidden."""
    twins = [measured(1), replace(measured(1, 1.0), test="t::test[twin]")][::order]
    sides = {"before": rows(1), "after": rows(1)} | {side: twins}
    assert main(["gate", *reports(sides["before"], sides["after"])]) == 1
    err = capsys.readouterr().err
    assert (
        "two rows are called m float32 seed 1" in err
        and "t::test[twin]" in err
        and "t::test[m-1]" in err
        and err.count("\n") == 1
    )


def test_errors_of_tests_whose_case_is_not_known_are_no_twins(reports, capsys):
    """They are filed under their test's file."""
    errors = [
        Row.of(
            error("no room"),
            test=f"cases/test_a.py::test_precision[{name}]",
            case="cases/test_a.py",
            dtype=None,
            seed=None,
        )
        for name in "ab"
    ]
    assert main(["gate", *reports([*rows(1), *errors], [*rows(1), *errors])]) == 0
    assert "2 STILL FAILING" in capsys.readouterr().out
    assert main(["gate", *reports([*rows(1), *errors[:1]], [*rows(1), *errors])]) == 1


@pytest.mark.parametrize("which", ["older", "newer"])
def test_a_report_of_a_broken_device_fails_the_gate(reports, capsys, which):
    paths = reports(rows(1, 2), rows(1, 2))
    path = Path(paths[which == "newer"])
    stored = json.loads(path.read_text())
    stored["stack"]["faults"] = ["aclnnRelu:scale, 3 of 3 calls"]
    path.write_text(json.dumps(stored))
    assert main(["gate", *paths]) == 1
    out = capsys.readouterr().out
    assert (
        out.startswith("**❌")
        and f"the {which} report was measured on a device with planted faults (aclnnRelu:scale, 3 of 3 calls)" in out
    )


def test_looser_limits_fail_the_gate_and_tighter_ones_do_not(reports, capsys):
    assert main(["gate", *reports(rows(1, limit=1.0), rows(1, limit=1.1))]) == 1
    assert (
        "m float32 is judged more loosely than before: max_diff 1.1 where 1 was accepted; judge both by the same limits"
        in capsys.readouterr().out
    )
    assert main(["gate", *reports(rows(1, limit=1.0), rows(1, limit=0.9))]) == 0
    assert (
        main(["gate", *reports([measured(1, 0.2, limit=0.1)], [measured(1, 0.19, limit=10.0)])]) == 1
    )  # "fixed" by its limit alone


def test_a_subset_is_compared_as_one_where_that_is_asked_for(reports, capsys, tmp_path):
    paths = reports(rows(*SEEDS), rows(0, 1))
    assert main(["gate", *paths]) == 1 and "3 MISSING" in capsys.readouterr().out
    assert main(["gate", *paths, "--subset", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert (
        "a subset was compared, as --subset asks: 3 rows of the older report did not run and were left out" in out
        and "2 IDENTICAL" in out
        and "MISSING" not in out
    )
    (result,) = json.loads((tmp_path / "found.json").read_text())
    assert result["counts"] == {"IDENTICAL": 2} and len(result["notes"]) == 1
    assert main(["gate", *reports(rows(1), rows(7)), "--subset"]) == 1  # nothing in common
    assert "nothing shows that they are right" in capsys.readouterr().out
    assert (
        main(["gate", *reports(rows(1, 2), [measured(1), measured(2, status="SKIPPED")]), "--subset"]) == 1
    )  # a row that was skipped was selected


def test_digests_and_numbers_that_contradict_each_other_are_said(reports, capsys):
    other = [replace(measured(1), max_diff=measured(1).max_diff * (1 + 1e-5))]
    assert main(["gate", *reports(rows(1), other)]) == 1
    assert "the digests say that every bit is as accepted, and max_diff is" in capsys.readouterr().out
    near = [replace(measured(1), max_diff=measured(1).max_diff * (1 + 1e-7))]  # another host's sums
    assert main(["gate", *reports(rows(1), near)]) == 0
    assert main(["gate", *reports(rows(1), [measured(1, 1.001e-4, expected_sha256="another")])]) == 0
    assert "against another result of the CPU than was accepted" in json.dumps(
        [
            transition.text
            for transition in upgrade_of(reports, rows(1), [measured(1, 1.001e-4, expected_sha256="x")]).transitions
        ]
    )


def upgrade_of(reports, before, after):
    return compare_reports(*(load(Path(report)) for report in reports(before, after)))


@pytest.mark.parametrize(
    ("factor", "noise", "accepted_noise", "kind"),
    [
        (10.0, 10.0, 0.0, "REGRESSED"),  # not repeatable any more, and ten times worse
        (1.9, 10.0, 0.0, "DRIFT"),  # within the accepted error beside it
        (2.1, 10.0, 0.0, "REGRESSED"),
        (2.1, 10.0, 0.2, "DRIFT"),  # within the accepted error and the accepted noise
        (2.3, 10.0, 0.2, "REGRESSED"),
        (1.8, 0.2, 0.0, "REGRESSED"),  # beyond three times the noise
        (1.55, 0.2, 0.0, "DRIFT"),
        (1.55, 0.0, 0.2, "DRIFT"),
        (0.3, 10.0, 0.0, "DRIFT"),  # better by chance is no improvement
        (0.3, 0.0, 0.0, "IMPROVED"),
    ],
)
def test_a_difference_of_reruns_excuses_scatter_and_never_growth(reports, factor, noise, accepted_noise, kind):
    def noisy(error, size):
        rerun = {"max_diff": 1e-3, "rel_l2": size * 1e-4, "unequal": 3} if size else {}
        return [
            measured(1, error, rerun=rerun, golden_rel_l2=error, shape=(100, 100))
        ]  # of few elements an error changes by chance

    assert upgrade_of(reports, noisy(1e-4, accepted_noise), noisy(factor * 1e-4, noise)).counts() == {kind: 1}


def test_a_report_against_itself_and_the_newer_one_first_are_told(tmp_path):
    report = build(rows(*SEEDS), stack=STACK, backend="npu")
    assert compare_reports(report, report).notes == (
        "both reports are the same run: that its numbers agree says nothing of another stack",
    )
    later = replace(report, created="2999-01-01T00:00:00+00:00")
    assert compare_reports(report, later).notes == ()
    assert "was made before the older one" in compare_reports(later, report).notes[0]
    assert compare_reports(later, report).passed
