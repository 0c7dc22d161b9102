"""The fixtures: `precision`, which runs a case, and `plant_fault`, which breaks the emulated device."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import pytest

SESSION = "precision-session"  # the name of the session object among pytest's plugins
SKIPPED = pytest.StashKey[list]()  # why rows of a test did not run
EXCUSED = pytest.StashKey[list]()  # the known failures of a test, in words
ROWS = pytest.StashKey[list]()  # the rows of a test
PROPERTIES = pytest.StashKey[list]()  # what the rows of a test added to its properties


def uses_fixture(item: pytest.Item) -> bool:
    """Whether a test uses the harness's own `precision`, not another fixture or parameter of that name."""
    return _is_the_harness(getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {}).get("precision"))


def is_ours(node: pytest.Collector) -> bool:
    """Whether `precision` is the harness's own fixture for the tests below a collector, as far as conftest.py files
    say.
    """
    theirs = _is_defined_by_a_conftest(node)  # pytest 9.1 enters those fixtures after it collected the directory
    return not theirs and _is_the_harness(node.session._fixturemanager.getfixturedefs("precision", node))


def _is_defined_by_a_conftest(node: pytest.Collector) -> bool:
    """Whether a conftest.py beside or above a collector has a `precision` of its own."""
    above = {node.path, *node.path.parents}
    plugins = node.config.pluginmanager.list_name_plugin()
    conftests = [plugin for name, plugin in plugins if name.endswith("conftest.py") and Path(name).parent in above]
    return any(getattr(plugin, "precision", precision) is not precision for plugin in conftests)


def _is_the_harness(definitions) -> bool:
    return bool(definitions) and getattr(definitions[-1].func, "__module__", "") == __name__


@pytest.fixture
def precision(request: pytest.FixtureRequest):
    """`precision(case, seed)` runs a `Case` on the CPU and on the device and fails the test unless it passes.

    Returns the Verdict. The numbers go to the report and to junit; the reasons are the failure's text. Several threads
    of a test may call
    it: their rows run one after the other. A row that does not pass fails its test, also where the test catches what
    this raises.

    Raises: RuntimeError when the test has ended.
    """
    from harness.errors import HarnessError

    session = request.config.pluginmanager.get_plugin(SESSION)

    def check(case, seed: int | None = None):
        seed = _whole(case, seed)
        with session.one_row(request.node, case, seed):
            try:
                verdict = _check(session, request.node, case, seed)
            except (Exception, pytest.fail.Exception) as first:
                try:
                    _check_companion(session, request.node, case, seed)
                except (HarnessError, pytest.fail.Exception) as second:  # the first failure is the test's
                    if not isinstance(first, pytest.fail.Exception):
                        _add_note(first, str(second))
                        raise first from None
                    pytest.fail(f"{first}\n{second}", pytrace=False)
                raise
            _check_companion(session, request.node, case, seed)
            return verdict

    return check


def _add_note(raised: BaseException, text: str) -> None:
    """Let pytest show a text below an exception; Python 3.11 or later."""
    if hasattr(raised, "add_note"):
        raised.add_note(text)


def _whole(case, seed) -> int | None:
    """A seed as a plain int, so that numpy's may be given; None stays. Raises: CaseError for what torch takes for no
    seed.
    """
    from harness.errors import CaseError

    if seed is None:
        return None
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = None
    if number is None or not 0 <= number < 2**63:
        raise CaseError(
            f"{case.name}: the seed {seed!r} ({type(seed).__name__}) where a whole number from 0 to 2^63 - 1 "
            "was expected;"
            " give such a number, or none"
        )
    return number


def _check_companion(session, item: pytest.Item, case, seed: int | None) -> None:
    """The float32 row beside the first half row of a case that has half rows alone, SKIPPED where it cannot be
    measured.
    """
    from harness.errors import DeviceError, HarnessError
    from harness.judging.status import Mark
    from harness.judging.verdict import skipped
    from harness.plugin.companion import companion_of, unseen

    if not session.wants_companion(item, case):
        return
    beside = companion_of(case)
    if _resumed(session, item, beside, seed) is not None:
        return
    try:
        verdict = session.measure(beside, seed)
    except DeviceError:
        raise
    except (HarnessError, ValueError) as raised:
        verdict = skipped(unseen(case, raised))
    _check(session, item, beside, seed, replace(verdict, marks=(*verdict.marks, Mark.COMPANION)))


def _check(session, item: pytest.Item, case, seed: int | None, verdict=None):
    """The row of a case with one seed: measured where it comes without its verdict, judged, kept; raises where it does
    not pass.
    """
    from harness.errors import DeviceError, HarnessError
    from harness.judging.status import Mark
    from harness.judging.verdict import error, skipped
    from harness.upgrade.known_failures import KNOWN

    if verdict is None and (stands := _resumed(session, item, case, seed)) is not None:
        return stands
    try:
        verdict = session.measure(case, seed) if verdict is None else verdict
        verdict, known = session.accepted.settle(case, seed, verdict)
    except HarnessError as raised:
        verdict, known = error(_words(raised)), None
        if not isinstance(raised, DeviceError):  # the device's end is no failure of this row, so no known one
            verdict, known = session.accepted.settle(case, seed, verdict)
        if known is None:
            session.add_row(item, case, seed, verdict)
            raise
    except pytest.skip.Exception as raised:  # in the case's own functions, as where weights are not there
        session.add_row(item, case, seed, skipped(_words(raised, name=False)))
        raise
    except pytest.exit.Exception:
        raise
    except (Exception, pytest.fail.Exception) as raised:  # a case's own error, a test's limit of time
        session.add_row(item, case, seed, error(_words(raised)))
        raise
    session.add_row(item, case, seed, verdict, known)
    if KNOWN in verdict.marks:
        item.stash.setdefault(EXCUSED, []).append(f"{KNOWN}: {known.reason} ({known.link}), until {known.expires}")
        return verdict
    if verdict.skips:
        item.stash.setdefault(SKIPPED, []).extend(str(reason) for reason in verdict.reasons)
        return verdict
    if not verdict.passed:
        beside = " (companion row)" if Mark.COMPANION in verdict.marks else ""
        lines = [f"{verdict.status} {case.name} {case.dtype}{'' if seed is None else f' seed {seed}'}{beside}"]
        limits = (
            [f"  limits: {verdict.tolerance.reason}"]
            if verdict.tolerance is not None and verdict.tolerance.reason
            else []
        )
        lines += [*(f"  {reason}" for reason in verdict.reasons), *limits]
        lines = [f"{'  ' * line.startswith('  ')}{session.terminal.in_language(line)}" for line in lines]
        pytest.fail("\n".join(lines), pytrace=False)
    return verdict


def _resumed(session, item: pytest.Item, case, seed: int | None):
    """The verdict of a row of an earlier run that stands for this one, which is attached to its test; else None."""
    from harness.report.rejudge import judged_again

    row = session.resumed(item, case, seed)
    if row is None:
        return None
    session.add_resumed(item, row)
    return judged_again(row)


def _words(raised: BaseException, *, name: bool = True) -> str:
    """An exception on one line, with the name of its class or without."""
    text = " ".join(str(raised).split())
    return f"{type(raised).__name__}: {text}" if name else text


@pytest.fixture
def plant_fault():
    """`plant_fault("aclnnSilu", kind="scale", by=1.001)` breaks the emulated device until the test ends, which fails
    where nothing was broken.

    Returns the Fault, with `calls` and `hits`.
    """
    from harness.emulator import faults

    planted = []

    def plant(pattern: str, kind: str, **settings):
        planted.append(faults.Fault(pattern, kind, **settings))
        faults.plant(planted[-1])
        return planted[-1]

    yield plant
    for fault in planted:
        faults.remove(fault)
    idle = [fault.effect for fault in planted if not fault.hits]
    if idle:
        pytest.fail(f"planted and never met: {'; '.join(idle)}", pytrace=False)
