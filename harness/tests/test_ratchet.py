"""The ratchet: a limit far above what is found could come down; one that is near, or a preset's, is left alone."""

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.commands.main import main
from harness.judging.checks import checks_of
from harness.report import build, row, write
from harness.upgrade.ratchet import loose, ratchet_text

STACK = {"device": "Ascend910B4"}


def rows(tolerance, errors=(1e-3, 2e-3, 1.5e-3)):
    expected = torch.ones(8, 32)
    for seed, error in enumerate(errors):
        yield row(
            test=f"t::test[{seed}]",
            case="m",
            dtype="float32",
            seed=seed,
            verdict=judge(compare(expected + error, expected), tolerance),
        )


def found(tolerance, **more):
    return loose(rows(tolerance), **more)


def test_a_loose_limit_could_be_twice_the_worst_found():
    (each,) = found(Tolerance(max_diff=1e-1))
    assert (each.case, each.name, each.limit, each.rows) == ("m", "max_diff", 1e-1, 3)
    assert (
        each.worst == pytest.approx(2e-3, rel=1e-3)
        and each.could_be == pytest.approx(4e-3, rel=0.06)
        and each.could_be >= 2 * each.worst
    )


def test_a_cosine_is_measured_by_what_it_lacks_to_one():
    expected = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    verdict = judge(compare(expected + 0.1 * noise, expected), Tolerance(cos_sim=0.9))
    (each,) = loose([row(test="t", case="m", dtype=None, seed=None, verdict=verdict)])
    assert (
        each.name == "cos_sim"
        and 0.98 < each.could_be < each.worst < 1
        and each.could_be == pytest.approx(1 - 2 * (1 - each.worst), abs=2e-3)
    )


def test_a_tight_limit_a_failing_row_and_a_preset_are_left_alone():
    assert found(Tolerance(max_diff=2.2e-3)) == []
    assert found(Tolerance(max_diff=1.2e-3)) == []  # two rows fail by it, one is near
    assert found(Tolerance(preset="card")) == []
    assert {item.name for item in found(Tolerance(preset="card"), every=True)} == {"max_diff", "cos_sim"}


def test_what_was_judged_is_what_is_listed():
    verdict = judge(compare(torch.ones(4, 4) * 1.01, torch.ones(4, 4)), Tolerance(max_diff=1e-3, rel_l2=1e-1))
    assert {check.name: check.holds for check in checks_of(verdict)} == {"max_diff": False, "rel_l2": True}


def test_the_command_reads_several_reports_and_prints_a_table(tmp_path, capsys):
    paths = []
    for name, errors in (("one", (1e-3,)), ("two", (3e-3,))):
        report = build(list(rows(Tolerance(max_diff=1e-1), errors)), stack=STACK, backend="npu")
        paths.append(str(write(report, tmp_path / name)[0]))
    assert main(["ratchet", *paths]) == 0
    out = capsys.readouterr().out
    assert out.startswith("**1 limits could come down") and "0.0061" in out and "| m " in out
    assert main(["ratchet", str(tmp_path / "none.json")]) == 1
    assert ratchet_text([]) == "**No limit could come down.**"


def test_an_output_without_references_has_no_limits_in_floors():
    verdict = judge(compare(torch.ones(4, 4), torch.ones(4, 4)), Tolerance(preset="floor"))
    assert not verdict.passed and checks_of(verdict) == []
