"""pytest: the options, the `precision` fixture, and the report of every accuracy test that was collected.

An accuracy test is called `test_precision`; it hands its case to the fixture. Rows travel in the tests' `user_properties`, so
that they survive xdist and stand in junit; the session object of the controlling process turns them into the report.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.plugin.session import EXCUSED, SHORT_DTYPE, Session, dtype_id, row_name

__all__ = ["dtype_id", "row_name"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("accuracy", "accuracy of a device against the CPU")
    group.addoption("--device", default="auto", metavar="DEVICE", help="auto (default), npu[:n], emulated, cuda[:n] or cpu")
    group.addoption("--report", type=Path, default=None, metavar="DIR", help="where the report goes (default: reports/)")
    group.addoption("--lang", choices=("en", "zh"), default="en", help="language of the markdown report")
    group.addoption("--fault", action="append", default=[], metavar="OPERATOR:KIND[:SETTINGS]", help="break the emulated device on purpose, such as 'aclnnMatmul:hf32'; the report says so")
    group.addoption("--preset", default=None, metavar="NAME", help="judge every case by this preset: floor, sharp, card, cann, dynamo, close or pair")
    group.addoption("--reference-store", type=Path, default=None, metavar="DIR", help="keep the CPU's outputs there and read them the next time")
    group.addoption("--rerun-reference", action="store_true", help="run the CPU's side twice; a difference is a failure")
    group.addoption("--baseline", choices=("check", "accept", "off"), default="check", help="hold rows against accepted numbers (default), or accept this run's")
    group.addoption("--baselines", type=Path, default=None, metavar="DIR", help="where accepted numbers lie (default: cases/baselines/)")
    group.addoption("--locate", choices=("auto", "off", "modules", "operators"), default="auto", help="find the operator (default), or the module, that a failing row comes from")
    group.addoption("--locate-budget", type=float, default=120.0, metavar="SECONDS", help="what that may take in all (default 120)")
    group.addoption("--locate-case", default=None, metavar="NAME", help="run the rows of this case, or of tests whose id holds the text, and locate each, passing or not")
    group.addoption("--locate-seed", type=int, default=None, metavar="SEED", help="of them the one with this seed")
    group.addoption("--locate-backward", action="store_true", help="look at each operator's gradients too")
    group.addoption("--known-failures", type=Path, default=None, metavar="FILE", help="failures that are known, reviewed and dated (default: cases/known_failures.toml where it is)")
    group.addoption("--bench", action="store_true", help="time each accuracy case's model and add the table to the report")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.keyword:
        for dtype, short in SHORT_DTYPE.items():
            config.option.keyword = re.sub(rf"\b{dtype}\b", short, config.option.keyword)
    session = Session(config)
    config.pluginmanager.register(session, "precision-session")
    if not config.option.help:
        session.read_known_failures()
    if not session.worker and not config.option.help:
        session.check_options()  # now, since under pytest-xdist this process collects nothing


@pytest.fixture
def precision(request: pytest.FixtureRequest):
    """`precision(case, seed)` runs a `Case` on the CPU and on the device and fails the test unless it passes.

    Returns the Verdict. The numbers go to the report and to junit; the reasons are the failure's text.
    """
    session = request.config.pluginmanager.get_plugin("precision-session")

    def check(case, seed: int | None = None):
        from harness.errors import HarnessError
        from harness.gate import error
        from harness.known import KNOWN

        try:
            verdict, known = session.settle(case, seed, session.measure(case, seed))
        except HarnessError as raised:
            verdict, known = session.settle(case, seed, error(" ".join(f"{type(raised).__name__}: {raised}".split())))
            if known is None:
                session.add_row(request.node, case, seed, verdict)
                raise
        session.add_row(request.node, case, seed, verdict, known)
        if KNOWN in verdict.marks:
            request.node.stash.setdefault(EXCUSED, []).append(f"{KNOWN}: {known.reason} ({known.link}), until {known.expires}")
            return verdict
        if not verdict.passed:
            lines = [f"{verdict.status} {case.name} {case.dtype}{'' if seed is None else f' seed {seed}'}"]
            pytest.fail("\n".join([*lines, *(f"  {reason}" for reason in verdict.reasons)]), pytrace=False)
        return verdict

    return check


@pytest.fixture
def plant_fault():
    """`plant_fault("aclnnSilu", kind="scale", by=1.001)` breaks the emulated device until the test ends, which fails where nothing was broken.

    Returns the Fault, with `calls` and `hits`.
    """
    from harness.emulator import faults

    planted = []

    def plant(pattern: str, kind: str, **settings):
        planted.append(faults.Fault(pattern, kind, **settings))
        faults.plant(planted[-1])
        return planted[-1]

    yield plant
    for each in planted:
        faults.remove(each)
    idle = [each.deeds for each in planted if not each.hits]
    if idle:
        pytest.fail(f"planted and never met: {'; '.join(idle)}", pytrace=False)
