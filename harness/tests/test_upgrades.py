"""Releases that are played: an operator means something else while a block runs; a change is seen, and one that is none
is not.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from harness.conformance import upgrades
from harness.conformance.detection import SUBJECTS
from harness.emulator.table import changed
from harness.errors import HarnessError
from harness.tests.needs import emulated_device, needs_torch_npu
from harness.upgrade import baseline

ROOT = Path(__file__).parents[2]

CASES = """
import pytest, torch
from torch import nn
from harness import Case

class Std(nn.Module):
    def forward(self, x):
        return x.std(-1, correction=0)

class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

inputs = lambda generator: torch.randn(1024, 33, generator=generator)
CASES = [Case(name=name, model=model, inputs=inputs) for name, model in (("std", Std), ("exp", Exp))]

@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_precision(precision, case):
    precision(case, 1)
"""


@pytest.fixture(scope="module")
def npu():
    return emulated_device().torch_device


def test_an_operator_means_something_else_inside_the_block_alone(npu):
    x = torch.tensor([1.0, 2.0], device=npu)
    with changed("aclnnExp", lambda before: lambda self, out: before(self, out=out) * 2):
        inside = x.exp().cpu()
        with pytest.raises(ValueError, match="aclnnExp is changed already"), changed("aclnnExp", lambda before: before):
            pass
    assert torch.equal(inside, 2 * torch.tensor([1.0, 2.0]).exp()) and torch.equal(
        x.exp().cpu(), torch.tensor([1.0, 2.0]).exp()
    )
    with (
        pytest.raises(ValueError, match="no operator is called 'aclnnNothing'"),
        changed("aclnnNothing", lambda before: before),
    ):
        pass


@needs_torch_npu
def test_a_played_release_fails_the_case_that_meets_it_and_no_other(tmp_path):
    (tmp_path / "test_two.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ("harness.plugin",)')
    (played,) = upgrades.play_releases(tmp_path / "test_two.py", ["std of whole corrections"], tmp_path / "work", 1)
    assert [row.case for row in played.moved] == ["std"] == [row.case for row in played.caught]
    assert played.upgrade.counts() == {"NEW FAILURE": 1, "IDENTICAL": 1}
    result = upgrades.text([played], [], [])
    assert (
        "1 releases, each with one change, over 2 rows: 1 seen." in result
        and "op-plugin d53ed98b | 1 | 1 | 0 | 1 NEW FAILURE | std |" in result
    )


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(HarnessError, match="no release is called nothing; there are backward in HF32"):
        upgrades.main(["cases", "--only", "nothing"])
    with pytest.raises(HarnessError, match="no cases at"):
        upgrades.main([str(tmp_path / "none.py"), "--only", "heads of 200"])


def test_benign_changes_regress_nothing_and_a_shared_growth_is_seen(monkeypatch, npu):
    monkeypatch.setattr(upgrades, "SUBJECT_DTYPES", ("bfloat16",))
    small = [subject for subject in SUBJECTS if subject.name == "aimv2"]
    calm = list(upgrades.quiet(small, seeds=3))
    assert len(calm) == 8 and not any(baseline.REGRESSED in item.kinds for item in calm)
    ((name, dtype, percent),) = upgrades.smallest_drift(small, seeds=3)
    assert (name, dtype) == ("aimv2", "bfloat16") and 2 < percent <= 4
    assert "8 gate runs of five seeds each: 0 say REGRESSED" in upgrades.text([], calm, [(name, dtype, percent)])


def test_every_probe_has_a_name_and_a_baseline_of_its_own():
    spec = importlib.util.spec_from_file_location("probes", ROOT / "cases" / "test_operators.py")
    probes = importlib.util.module_from_spec(spec)
    sys.modules["probes"] = probes
    spec.loader.exec_module(probes)
    paths = Counter(baseline.path_of(Path(), case.name, case.dtype) for case in probes.CASES)
    assert len(paths) == len(probes.CASES) > 500 and max(paths.values()) == 1
