"""The torches that the harness runs on: what an older one is told, which names of torch it needs, what pip may not
move.
"""

import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from harness import torch_private, versions
from harness.errors import TorchError
from harness.tests import needs

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "harness"
REFUSED = """
import harness
from harness.errors import TorchError
try:
    {code}
except TorchError as error:
    print(error)
"""
SENTENCE = "torch 2.4.1 is installed and the harness needs 2.5 or later: "


# -------- the oldest torch


@pytest.fixture
def planted(monkeypatch):
    """A function that plants a version of torch; None plants that there is none."""

    def plant(version):
        versions.require_torch.cache_clear()
        monkeypatch.setattr(versions, "torch_version", lambda: version)

    yield plant
    versions.require_torch.cache_clear()


@pytest.mark.parametrize("version", ["2.5.0", "2.5.1+cu124", "2.13.0+cpu", "2.5.0a0+gitb465a58", "3.0.0", "10.1"])
def test_a_torch_that_is_new_enough_is_taken(planted, version):
    planted(version)
    versions.require_torch()


@pytest.mark.parametrize("version", ["2.4.1", "2.4.1+cu118", "2.1.0.post17", "1.13.1"])
def test_an_older_torch_is_refused_in_one_sentence(planted, version):
    planted(version)
    with pytest.raises(
        TorchError, match=re.escape(f"torch {version} is installed and the harness needs 2.5 or later: ")
    ) as error:
        versions.require_torch()
    assert "\n" not in str(error.value)


def test_no_torch_is_said(planted):
    planted(None)
    with pytest.raises(
        TorchError, match="torch is not installed and the harness needs 2.5 or later: pip install torch"
    ):
        versions.require_torch()


@pytest.fixture
def old_torch(tmp_path):
    """A folder with a torch 2.4.1 that cannot be imported, as torch 2.1 to 2.4 cannot be by the harness, and its
    metadata.
    """
    package, metadata = tmp_path / "torch", tmp_path / "torch-2.4.1.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('an old torch was imported')\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.1\n")
    return tmp_path


def answer(folder, *command):
    """(exit status, standard output, standard error) of a Python that meets the packages of a folder first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from harness import Case", "import harness; harness.validate", "import harness; harness.open_device('cpu')",
        "import harness; harness.compare(None, None)", "from harness.emulator import install; install()",
        "import harness.torch_private",
    ],
)  # fmt: skip
def test_what_needs_torch_refuses_an_older_one_before_it_imports_it(old_torch, code):
    status, out, err = answer(old_torch, "-c", REFUSED.format(code=code))
    assert status == 0 and out.startswith(SENTENCE), err


@pytest.mark.parametrize("module", ["case", "devices.device", "locate", "numerics.expected_error", "run.validation"])
def test_a_module_that_is_imported_by_its_own_name_refuses_an_older_torch_too(tmp_path, module):
    code = f"import torch; torch.__version__ = '2.4.1'; import harness.{module}"
    status, out, err = answer(tmp_path, "-c", REFUSED.format(code=code))
    assert status == 0 and out.startswith(SENTENCE), err


def test_importing_the_package_alone_asks_for_no_torch(old_torch):
    assert answer(old_torch, "-c", "import harness, harness.commands.main; print(harness.compare.__name__)")[:2] == (
        0,
        "compare\n",
    )


def test_doctor_says_it_on_one_line(old_torch):
    status, out, err = answer(old_torch, "-m", "harness", "doctor", "--device", "cpu")
    assert status == 1 and "Traceback" not in err
    assert [line for line in out.splitlines() if "FAILED" in line] == [
        next(line for line in out.splitlines() if SENTENCE in line)
    ]


def test_pytest_stops_with_that_sentence_before_it_collects(old_torch):
    (old_torch / "conftest.py").write_text('pytest_plugins = ("harness.plugin",)\n')
    (old_torch / "test_case.py").write_text("import torch\ndef test_precision(precision):\n    pass\n")
    status, out, err = answer(old_torch, "-m", "pytest", "-p", "no:cacheprovider", "-k", "precision", "--device", "cpu")
    lines = [line for line in (out + err).splitlines() if line.startswith("ERROR")]
    assert status == 4 and len(lines) == 1 and lines[0].startswith(f"ERROR: {SENTENCE}"), out + err


# -------- names of torch's own


@pytest.mark.parametrize(
    "name", [*torch_private.NAMES, *(f"ops.aten.{name}" for name in torch_private.PRIVATE_OPERATORS)]
)
def test_this_torch_has_the_name(name):
    """Red in a new torch: one of its own names went; `torch_private` says what it was for and is the one place to
    change.
    """
    missing = torch_private.missing()
    assert name not in missing, f"torch {torch.__version__} has no torch.{name}: {missing[name]}"


def test_a_name_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(torch_private.NAMES, "_C._of_no_torch", "nothing")
    monkeypatch.setitem(torch_private.PRIVATE_OPERATORS, "_of_no_torch", (2, 5))
    monkeypatch.setitem(torch_private.PRIVATE_OPERATORS, "_of_the_future", (99, 0))
    assert torch_private.missing() == {"_C._of_no_torch": "nothing", "ops.aten._of_no_torch": "an operator"}


def private_names(source):
    """The private names of torch that Python code names: torch._C.x, torch.ops.aten._x, from torch.utils._pytree import
    x.
    """
    result = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            result |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if re.fullmatch(r"(torch|aten|parametrize|nn|F)(\.\w+)+", path):
                result.add(path)
    return {path for path in result if re.search(r"\._[^_]", path)}


SOURCES = [path for path in sorted(HARNESS.rglob("*.py")) if not {"tests", "operators"} & set(path.parts)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HARNESS)))
def test_private_names_of_torch_are_in_one_place(path):
    """The emulated operators apart: torch_npu asks for them, so that the operator that they call is there."""
    allowed = {"torch._VF"} if path.name == "repro.py" else set()
    if path.name != "torch_private.py":
        assert private_names(path.read_text(encoding="utf-8")) <= allowed


def test_the_check_sees_private_names():
    code = (
        "import torch\nfrom torch.utils._pytree import "
        "tree_map\naten._mm(1)\ntorch._C._x()\ntorch.__version__\ntorch.nn.Linear"
    )
    assert private_names(code) == {"torch.utils._pytree.tree_map", "aten._mm", "torch._C", "torch._C._x"}


class Lacking:
    """torch.ops.aten of a torch without some operators."""

    def __init__(self, *names):
        self.names = names

    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(f"'_OpNamespace' 'aten' object has no attribute {name!r}")
        return getattr(torch.ops.aten, name)


def test_an_operator_that_torch_lacks_is_none(monkeypatch):
    monkeypatch.setattr(
        torch_private, "torch", types.SimpleNamespace(ops=types.SimpleNamespace(aten=Lacking("_grouped_mm")))
    )
    assert torch_private.aten_operator("_grouped_mm") is None and torch_private.aten_operator("mm") is torch.ops.aten.mm


OLDER = """
import sys, torch
names = {names!r}
found = type(torch.ops.aten).__getattr__
def without(self, name):
    if name not in names:
        return found(self, name)
    if "/harness/" in sys._getframe(1).f_code.co_filename:  # torch itself has them and needs them
        raise AttributeError(f"no operator {{name}}")
    operator = found(self, name)
    self.__dict__.pop(name, None)  # it is remembered there
    return operator
for name in names:
    torch.ops.aten.__dict__.pop(name, None)
type(torch.ops.aten).__getattr__ = without
from harness import Case, open_device, validate
from torch import nn
model = lambda: nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4))
for dtype in ("float32", "float16", "bfloat16"):
    inputs = lambda generator: torch.randn(4, 16, generator=generator)
    case = Case(name="small", model=model, inputs=inputs, dtype=dtype)
    print(validate(case, 0, open_device("cpu")).status)
"""


def test_every_dtype_has_its_float64_reference_where_operators_are_missing(tmp_path):
    """As torch before 2.8, which has no _grouped_mm: no operator that a model does not call may be needed."""
    code = OLDER.format(names=("_grouped_mm", "_upsample_bicubic2d_aa", "_scaled_dot_product_flash_attention_for_cpu"))
    status, out, err = answer(tmp_path, "-c", code)
    assert (status, out.split()) == (0, ["PASS"] * 3), err


# -------- tests that need torch_npu


def test_where_torch_npu_is_installed_no_test_is_skipped_for_it():
    """With the `emulated` extra, as in CI; a torch_npu that is installed and cannot be imported makes tests fail, not
    skip.
    """
    assert not (needs.torch_npu_is_installed() and needs.lacks_torch_npu())


def test_without_torch_npu_tests_are_skipped_unless_nothing_may_be(monkeypatch):
    monkeypatch.setattr(needs.util, "find_spec", lambda name: None)
    monkeypatch.delenv("PRECISION_TESTS_SKIP_NOTHING", raising=False)
    assert needs.lacks_torch_npu()
    with pytest.raises(pytest.skip.Exception, match="torch_npu is not installed"):
        needs.emulated_device()
    monkeypatch.setenv("PRECISION_TESTS_SKIP_NOTHING", "1")
    assert not needs.lacks_torch_npu()


def test_ci_skips_none_of_them():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "export PRECISION_TESTS_SKIP_NOTHING=1" in script and "[emulated,test]" in script


# -------- what pip may not move


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_no_bound_on_torch_since_pip_would_replace_that_of_an_ascend_machine(project):
    assert "torch" in project["dependencies"]
    assert not [item for item in project["dependencies"] if re.match(r"torch[-_]?npu", item)]


def test_pandas_3_is_left_out_since_it_moves_numpy_away_from_what_old_canns_need(project):
    """pandas 3 needs numpy 1.26 or 2, and CANN up to 8.2 fails beside numpy 2. `.ci/dry-run` asks pip itself."""
    bound = next(text for text in project["dependencies"] if text.startswith("pandas"))
    assert re.search(r"<\s*3(\.0)?$", bound)


def test_the_lowest_numpy_is_that_of_old_canns(project):
    assert "numpy>=1.24.4" in project["dependencies"]


def test_the_licence_is_said_as_setuptools_will_read_it(project):
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
