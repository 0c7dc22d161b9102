"""`pytest -k precision --precision-checkpoint DIR`: a row for each part, dtype and seed, and nothing without it."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pandas  # noqa: F401
import pytest

import harness.report
import harness.run.validation  # noqa: F401
from harness import Case, open_device, validate
from harness.conformance.checkpoints import known
from harness.errors import DeviceError
from harness.reference import Models
from harness.tests.needs import import_transformers

# Most of those imports are not used: pytester forgets what an inner run imported, and torch cannot be imported twice.

ROOT = Path(__file__).parents[2]
OTHER = """
import torch
from harness import Case

def drawn(generator):
    return torch.randn(3, 4, generator=generator)

def test_precision(precision):
    precision(Case(name="other", model=lambda: torch.nn.Linear(4, 2), inputs=drawn), 1)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder with a language model and an encoder; both have run, so that all they import is there."""
    import_transformers()
    with contextlib.suppress(DeviceError):
        open_device("emulated")
    import torch._dynamo  # noqa: F401

    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "bert"):
        known()[name](root / name)
        for part in (None, *(("decode", "batch", "generate") if name == "llama" else ())):
            validate(Case.from_checkpoint(root / name, part=part), 1, open_device("cpu"), models=Models())
    return root


@pytest.fixture
def user(pytester, monkeypatch):
    """A checkout with this repository's file of cases for checkpoints and one of the user's own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("MODEL_DIR", raising=False)
    pytester.makeini("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    pytester.makeconftest('pytest_plugins = ("harness.plugin",)')
    pytester.makepyfile(test_other=OTHER)
    (pytester.path / "test_checkpoints.py").write_text((ROOT / "cases" / "test_checkpoints.py").read_text())
    return pytester


def run(user, *arguments):
    return user.runpytest_inprocess("--device=cpu", "-k", "precision", *arguments)


def rows(user):
    return json.loads((user.path / "reports" / "precision.json").read_text())["rows"]


def test_nothing_is_collected_without_a_checkpoint(user):
    result = user.runpytest_inprocess("--device=cpu", "--collect-only", "-q", "test_checkpoints.py")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    run(user).assert_outcomes(passed=1)
    assert [row["case"] for row in rows(user)] == ["other"]


def test_a_checkpoint_is_a_row_for_each_part_and_seed_and_no_other_case_runs(user, folder):
    run(user, f"--checkpoint={folder / 'llama'}").assert_outcomes(passed=8, deselected=1)
    result = [(row["case"], row["dtype"], row["seed"], row["status"]) for row in rows(user)]
    seeds = (42, 123, 256, 789, 1024)
    expected = [("llama", "float32", seed, "PASS") for seed in seeds]
    expected += [(f"llama-{part}", "float32", 42, "PASS") for part in ("decode", "batch", "generate")]
    assert result == expected
    assert len({row["inputs_sha256"] for row in rows(user)}) == 6  # the other parts draw like the first seed


def test_a_folder_of_checkpoints_in_a_dtype_that_is_asked_for(user, folder):
    how = ("--precision-dtype=bfloat16", "--precision-batch-size=3", "--precision-companion=off")
    user.runpytest_inprocess(
        "--device=cpu", "-k", "precision and seed42 and not generate", f"--precision-checkpoint={folder}", *how
    ).assert_outcomes(passed=4, deselected=10)
    result = {row["case"]: row for row in rows(user)}
    assert result.keys() == {"bert", "llama", "llama-decode", "llama-batch"}
    assert {row["dtype"] for row in result.values()} == {"bfloat16"} and result["bert"]["shape"][0] == 3


def test_a_users_own_text_is_one_row_without_a_seed(user, folder):
    run(user, f"--checkpoint={folder / 'bert'}", "--text=It was the best of times").assert_outcomes(
        passed=1, deselected=1
    )
    assert [row["seed"] for row in rows(user)] == [None]


def test_a_checkpoint_that_cannot_be_run_is_an_error_row_with_its_name(user, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForNothing"]}))
    run(user, f"--checkpoint={broken}").assert_outcomes(failed=1, deselected=1)
    (row,) = rows(user)
    assert (row["case"], row["status"]) == ("broken", "ERROR")
    assert "BertForNothing, which transformers" in row["reasons"][0]


def test_half_a_checkpoint_is_one_error_row(user, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    run(user, f"--checkpoint={half}").assert_outcomes(failed=1, deselected=1)
    (row,) = rows(user)
    assert (row["case"], row["status"]) == ("half", "ERROR")
    assert "half holds a config and no weights; copy its .safetensors files too" in row["reasons"][0]


def test_weights_that_do_not_fit_are_told_in_one_sentence_without_a_traceback(user, folder, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(folder / "bert", narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    result = run(user, f"--checkpoint={narrow}", "-k", "precision and seed42")
    result.assert_outcomes(failed=1, deselected=5)
    (row,) = rows(user)
    assert row["status"] == "ERROR" and row["located"] is None
    said = result.stdout.str()
    assert "CheckpointError: " in said and "weights have other shapes than its config says" in said
    assert "checkpoints/libraries.py" not in said and "It could not be located" not in said


def test_a_path_at_which_nothing_is_stops_the_run(user, tmp_path):
    result = run(user, f"--checkpoint={tmp_path / 'absent'}")
    assert result.ret != 0
    assert "no checkpoint at" in result.stdout.str() + result.stderr.str()


def test_a_folder_without_a_checkpoint_stops_the_run_with_one_sentence(user, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(user, f"--checkpoint={tmp_path / 'empty'}")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    said = result.stdout.str()
    assert "--precision-checkpoint: " in said and "holds no checkpoint, and neither do its folders" in said
    assert "plugin/checkpoints.py" not in said and "_hookexec" not in said


def test_model_dir_names_a_checkpoint_that_is_no_aimv2(user, folder, monkeypatch):
    monkeypatch.setenv("MODEL_DIR", str(folder / "bert"))
    run(user, "test_checkpoints.py").assert_outcomes(passed=5)
    assert {row["case"] for row in rows(user)} == {"bert"}


def test_two_directories_of_one_name_are_told_apart(user, folder, tmp_path):
    import shutil

    shutil.copytree(folder / "bert", tmp_path / "again" / "bert")
    user.runpytest_inprocess(
        "--device=cpu",
        "-k",
        "precision and seed42",
        f"--checkpoint={folder / 'bert'}",
        f"--checkpoint={tmp_path / 'again' / 'bert'}",
    ).assert_outcomes(passed=2, deselected=9)
    assert {row["case"] for row in rows(user)} == {f"{folder.name}-bert", "again-bert"}
