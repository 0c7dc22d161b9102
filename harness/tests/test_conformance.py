"""The measurements of the emulator see what they must: a missing symbol, a wrong number, a test that fails."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from harness import emulator
from harness.conformance import architectures, bits, symbols, vendor
from harness.emulator import build
from harness.errors import HarnessError
from harness.tests.needs import emulated_device, needs_torch_npu

pytestmark = needs_torch_npu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def npu():
    return emulated_device().torch_device


# -------- symbols


def test_the_installed_wheel_is_read_and_what_the_emulator_lacks_is_listed():
    result = symbols.survey(build.wheel_libraries(), build.wheel_version())
    assert len(result.operators) > 800 and len(result.linked) > 60 and len(result.looked_up) > 100
    assert "aclnnAddmm" in result.operators and "aclnnAddmm" not in result.not_emulated
    assert (
        "aclrtMallocAlign32" in result.linked + result.looked_up
        and "aclrtMallocAlign32" not in result.refused + result.absent
    )
    assert (
        set(result.refused) <= set(result.linked) and set(result.absent) <= set(result.looked_up) and result.gone == ()
    )
    assert "aclmdlRICaptureBegin" in result.absent  # graphs are not emulated


def test_an_operator_and_a_function_of_another_wheel_show_up(tmp_path):
    library = build.wheel_libraries()[0] + b"\0aclnnFromTheFutureGetWorkspaceSize\0aclrtFromTheFuture\0"
    with zipfile.ZipFile(tmp_path / "torch_npu-9.9.9-cp311-none.whl", "w") as wheel:
        wheel.writestr("torch_npu/lib/libtorch_npu.so", library)
    path = next(tmp_path.iterdir())
    result = symbols.survey(symbols.read_wheel(path), symbols._version(path))
    assert (
        result.name == "9.9.9" and "aclnnFromTheFuture" in result.not_emulated and "aclrtFromTheFuture" in result.absent
    )
    with pytest.raises(HarnessError, match="holds no torch_npu/lib/libtorch_npu.so; give a wheel of torch_npu"):
        symbols.read_wheel(tmp_path / "nothing")


# -------- bits

LIMITS = {"float32": (22.5, 26.0), "hf32": (12.6, 12.9), "float16": (11.9, 12.6), "bfloat16": (8.9, 9.5)}


def test_effective_bits_tell_the_arithmetic_of_each_family(npu):
    result = dict(bits.rows(npu))
    for name in ("matmul", "linear", "bmm", "conv2d", "conv1d"):
        for arithmetic, (low, high) in LIMITS.items():
            assert low < result[name][arithmetic] < high, (name, arithmetic, result[name])
    assert result["matmul"]["float32"] > 23.2  # better than the CPU's 22.7: one rounding for each four of K
    assert result["gelu, none"]["float32"] < 13 and result["gelu, none, as tanh"]["float32"] > 24
    assert all(value["float32"] > 21.5 for name, value in result.items() if name != "gelu, none")


def test_a_product_that_claims_float32_and_runs_lower_is_seen(npu):
    matmul = bits.BIT_FAMILIES[0]
    for kind, low, high in (("hf32", 12.6, 12.9), ("fp16", 11.6, 11.9)):
        with emulator.fault("aclnnM*", kind=kind):
            assert low < bits.measure(matmul, torch.float32, npu) < high


# -------- architectures

pytest_transformers = pytest.mark.skipif(
    not build.util.find_spec("transformers"), reason="transformers is not installed"
)


@pytest_transformers
def test_architectures_of_every_kind_agree_with_the_cpu():
    names = ["bert", "llama", "t5", "resnet", "vit", "mamba", "wav2vec2", "clip"]
    for result in architectures.results(names):
        assert result.problem == "" and set(result.fell_back) <= {"aten::_weight_norm_interface"}, result
        assert 0 < result.exact[1] < 5 * result.rounding < 1e-5 and 0 < result.gradient < 1e-4, result
        assert result.tokens in ("", "same"), result
        if result.name in ("bert", "resnet", "vit", "wav2vec2"):  # convolutions in HF32, or a GELU by tanh
            assert result.default[1] > 5 * result.exact[1], result


@pytest_transformers
def test_an_architecture_with_a_fault_does_not_agree(npu):
    entry = next(architecture for architecture in architectures.architectures() if architecture.name == "llama")
    expected = architectures.run_architecture(entry, torch.device("cpu"))
    with emulator.fault("aclnnSilu", kind="scale", by=1.001) as planted:
        result = architectures.run_architecture(entry, npu)
    assert planted.hits > 0 and architectures.difference(result, expected, "forward/")[1] > 1e-5
    del result["loss"], result["gradient/lm_head.weight"]
    assert architectures.difference(result, expected, "gradient/") == (float("inf"), float("inf"))


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="no architecture is called nothing; there are bert, "):
        architectures._chosen(["nothing"])


# -------- the vendor's tests

FILE = """
import unittest, torch, torch_npu
class TestOperator(unittest.TestCase):
    def test_right(self): self.assertEqual((torch.ones(2, device="npu:0") + 1).cpu().tolist(), [2.0, 2.0])
    def test_wrong(self): self.assertEqual((torch.ones(2, device="npu:0") + 1).cpu().tolist(), [3.0, 2.0])
    def test_missing(self):
        torch_npu.npu_moe_compute_expert_tokens(torch.ones(2, dtype=torch.int32, device="npu:0"), 2).cpu()
    @unittest.skip("another machine's")
    def test_other(self): pass
if __name__ == "__main__":
    unittest.main()
"""


def test_the_vendors_tests_are_counted_by_what_became_of_them(tmp_path):
    (tmp_path / "test_operator.py").write_text(FILE)
    (tmp_path / "test_dead.py").write_text("import os\nos.abort()\n")
    command = [
        sys.executable,
        "-m",
        "harness",
        "emulate",
        "-m",
        "harness.conformance",
        "vendor",
        str(tmp_path),
        "--output",
        str(tmp_path / "table.md"),
        "--logs",
        str(tmp_path / "logs" / "of today"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("1 of 4 tests that can run on a 910B pass (25.0%); 1 do not apply.")
    assert "| test_operator.py | 1 | 1 | 1 | 1 |  |" in text
    assert {path.name for path in (tmp_path / "logs" / "of today").iterdir()} >= {"test_operator.log", "test_dead.log"}
    assert "| test_dead.py | 0 | 1 | 0 | 0 |  |" in text and "killed by signal 6" in text
    assert "| 1 | test_operator.py | aclnnMoeComputeExpertTokens |" in text and "another machine's" in text


def test_a_package_that_the_vendors_tests_lack_is_one_line(tmp_path):
    (tmp_path / "test_operator.py").write_text("from torch_npu.testing.testcase import TestCase\n" + FILE)
    code = (
        "import sys; sys.modules['expecttest'] = None\n"
        "from harness.__main__ import main\n"
        f"sys.exit(main(['emulate', '-m', 'harness.conformance', 'vendor', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stdout == ""
    assert "expecttest" in done.stderr and "they need: pip install expecttest scipy hypothesis pyyaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_tests_is_one_line(tmp_path):
    with pytest.raises(HarnessError, match="holds no test_"):
        next(vendor.run_files(tmp_path, 1, tmp_path))


def test_the_operators_with_a_known_table_of_dtypes_are_counted(capsys):
    from harness.conformance import dtypes

    assert dtypes.main(["--names"]) == 0
    counted, without = capsys.readouterr().out.splitlines()
    known, whole = map(int, counted.removeprefix("operators with a known table of dtypes: ").split(" of "))
    assert 500 < known < whole and len(without.removeprefix("without: ").split(", ")) == whole - known
