"""python -m harness gate: every way in which a row can differ between two reports, by its name, and the exit status."""

import json
import sys
from dataclasses import replace
from datetime import date

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.cli import main
from harness.gate import Mark
from harness.report import build, row, write
from harness.report.rows import Excuse

STACK = {"device": "Ascend910B4", "torch_npu": "2.9.0", "cann": "8.3.RC1", "conv_allow_hf32": True}
LATER = STACK | {"cann": "8.5.0"}
CRITERIA = {"ERROR": "run", "SKIPPED": "skip"}


def measured(seed, error=1e-4, *, case="m", limit=1.0, status=None, **more):
    """A row whose error is `error` times a factor of its own."""
    expected = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 + seed))
    found = row(test=f"t::test[{case}-{seed}]", case=case, dtype="float32", seed=seed, verdict=judge(compare(expected + error * noise, expected), Tolerance(max_diff=limit)))
    found = replace(found, **dict(weights="seeded:0", inputs_sha256=f"in{seed}", actual_sha256=f"{seed} {error}", marks=(Mark.NEW,)) | more)
    return replace(found, reasons=("because",), criteria=(CRITERIA[status],), rel_l2=None) if status else found


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
        ([measured(1, status="SKIPPED")], [measured(1, status="SKIPPED")], {"IDENTICAL": 1}, 0),
        ([], [measured(1)], {"NEW": 1}, 1),
    ],
)
def test_every_transition_has_a_name_and_a_status(reports, tmp_path, capsys, before, after, kinds, status):
    assert main(["gate", *reports(before, after), "--json", str(tmp_path / "found.json")]) == status
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"] == kinds and found["passed"] == (status == 0)
    out = capsys.readouterr().out
    assert out.startswith("**✅" if status == 0 else "**❌")
    assert all(f"{count} {kind}" in out for kind, count in kinds.items())


def test_the_difference_of_the_stacks_stands_beside(reports, capsys, tmp_path):
    paths = reports([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS])
    assert main(["gate", *paths, "--output", str(tmp_path / "upgrade.md")]) == 1
    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "upgrade.md").read_text().strip()
    assert "| cann" in out and "8.3.RC1" in out and "8.5.0" in out and "torch_npu" not in out
    assert "- REGRESSED m float32 seed 0: " in out and "1.100 times on average over 5 seeds" in out


def test_an_emulated_report_never_meets_a_cards(reports, capsys):
    assert main(["gate", *reports([measured(1)], [measured(1)], backend="emulated")]) == 1
    assert "the reports come from Ascend910B4 (npu) and Ascend910B4 (emulated)" in capsys.readouterr().err


def test_several_reports_make_a_history_and_the_last_step_decides(reports, capsys):
    before, after = reports([measured(n) for n in SEEDS], [measured(n, 1.1e-4) for n in SEEDS])
    assert main(["gate", before, after, before]) == 0
    out = capsys.readouterr().out
    assert out.count("REGRESSED m float32") == 5 and "5 IMPROVED" in out
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
    assert "needs matplotlib, which is not installed: pip install" in capsys.readouterr().err and not (tmp_path / "history.png").exists()


def test_a_known_failure_passes_the_gate_and_one_that_became_worse_does_not(reports, capsys):
    known = {"marks": (Mark.KNOWN,), "known": Excuse(reason="because", link="https://example.org/1", expires=date(2999, 1, 1))}
    before, after = reports([measured(n) for n in SEEDS], [measured(1, 1.0, **known), *[measured(n) for n in SEEDS if n != 1]])
    assert main(["gate", before, after]) == 0 and "1 KNOWN FAILURE" in capsys.readouterr().out
    before, after = reports([measured(n, 2.0) for n in SEEDS], [measured(n, 3.5, **known) for n in SEEDS])
    assert main(["gate", before, after]) == 1 and "FAIL before, and worse now" in capsys.readouterr().out
