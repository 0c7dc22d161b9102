"""What a test needs of the machine: one that needs torch_npu is skipped where it is not installed, with one reason.

    @needs_torch_npu
    def test_…                                 a test that opens the emulated device, or has a child process do so

    @pytest.fixture(scope="module")
    def npu():
        return emulated_device().torch_device  a fixture

CI sets PRECISION_TESTS_SKIP_NOTHING=1, under which nothing is skipped for such a reason: it installs the extras
`emulated` and `test`, which bring a compiler too.
"""

import os
from importlib import metadata, util

import pytest

NOT_COMPILED = "nothing can be compiled here"
REASON = "torch_npu is not installed: pip install -e '.[emulated]'"


def may_skip() -> bool:
    """Whether a test may be left out for what the machine lacks; where nobody said that all of it must be there."""
    return os.environ.get("PRECISION_TESTS_SKIP_NOTHING") != "1"


def lacks(library: str) -> bool:
    """Whether the tests of an optional library are skipped."""
    return may_skip() and util.find_spec(library) is None


def lacks_torch_npu() -> bool:
    """Whether the tests of the emulated device are skipped."""
    return lacks("torch_npu")


def lacks_compiled_code() -> bool:
    """Whether the tests of the compiled code are skipped, since nothing can be compiled here."""
    from harness.measure import compiled

    return may_skip() and compiled.compiled_code() is None


def skip_without_torch_npu() -> None:
    if lacks_torch_npu():
        pytest.skip(REASON)


def emulated_device():
    """The emulated device; the test is skipped where there is no torch_npu."""
    skip_without_torch_npu()
    from harness import open_device

    return open_device("emulated")


def import_transformers():
    """transformers, which imports torch_npu wherever that is installed; skipped where it takes no torch as old as
    this.
    """
    if not lacks_torch_npu():
        emulated_device()
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        torch = metadata.version("torch")
        pytest.skip(f"transformers {transformers.__version__} asks for a newer torch than {torch}")
    return transformers


def skip_without_ray() -> None:
    """Skip a test that needs a Ray cluster where ray is not installed."""
    if lacks("ray"):
        pytest.skip("ray is not installed: pip install -e '.[ray]'")


needs_torch_npu = pytest.mark.skipif(lacks_torch_npu(), reason=REASON)


def torch_npu_is_installed() -> bool:
    """By its metadata, thus by another way than the one that decides on skipping."""
    try:
        metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def compiled_and_by_torch(request, monkeypatch):
    """Each test of a module that imports this runs twice: by the compiled code of harness.measure, and without it."""
    from harness.measure import compiled

    if request.param == "torch":
        monkeypatch.setattr(compiled, "compiled_code", lambda: None)
    elif lacks_compiled_code():
        pytest.skip(NOT_COMPILED)
    else:
        assert compiled.compiled_code() is not None, "nothing can be compiled here, and nothing may be skipped"
