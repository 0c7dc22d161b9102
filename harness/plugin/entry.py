"""What pytest loads, by entry point, in every environment in which the harness is installed.

It is idle until something of the harness is asked for: an option of it, `harness.plugin` in a conftest.py, the word
`precision` in `-k`, or a test that uses the fixture. Until then it imports neither torch nor the rest of the harness,
but for the names of the presets, changes no environment variable, opens no device and writes no file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from harness.plugin.fixtures import (  # pytest finds the fixtures here
    SESSION,
    is_ours,
    plant_fault,  # noqa: F401
    precision,  # noqa: F401
    uses_fixture,
)
from harness.plugin.names import keyword_of
from harness.plugin.opening import DEVICE, Opening
from harness.plugin.options import OPTIONS, add_options, check_paths, is_given, options_of

CONFTEST = "harness.plugin"  # what a conftest.py names to get the short options
EXPLICIT = pytest.StashKey[bool]()  # whether the command line asks for accuracy tests or holds an option of the harness
PARAMETER = re.compile(
    rb"\bdef \w+\((?:[^()]|\([^()]*\))*\bprecision\b"
)  # a test with a parameter `precision`, in a file of tests
THEIR_OWN = re.compile(
    rb"""\bdef precision\(|["'](?:\w+ *, *)*precision(?: *, *\w+)*["']"""
)  # a fixture of that name, or the name in parametrize


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Before the first conftest.py: the device of a run that asks for one, since a conftest.py may import
    transformers.
    """
    _check_paths(early_config, parser, args)
    asked = is_given(args) or _names_accuracy_tests(early_config.known_args_namespace.keyword)
    early_config.stash[EXPLICIT] = asked
    if _only_informs(early_config.known_args_namespace) or not (asked or "--isolate" in args):
        return
    from harness.plugin.cluster import is_spread

    spread = is_spread(early_config, early_config.known_args_namespace, args)
    if not spread:
        from harness.plugin.isolation import isolate

        isolate(early_config, early_config.known_args_namespace, args)
    if not asked:
        return
    from harness import autoload

    autoload.hold()
    _require_torch()
    if spread:
        return  # the workers open theirs; there may be none here
    if any(word.split("=")[0] in ("--device", "--devices", "--soc") for word in args):
        return  # a short name, which a conftest.py adds: the device is opened in pytest_configure
    known = early_config.known_args_namespace
    timing = known.precision_bench or "--bench" in args
    soc, devices = known.precision_soc, known.precision_devices
    early_config.stash[DEVICE] = Opening(known.precision_device, soc, devices, timing=timing)
    early_config.stash[DEVICE].open()


def _require_torch() -> None:
    """Stop with one sentence where the installed torch is older than the harness needs."""
    from harness.errors import TorchError
    from harness.versions import require_torch

    try:
        require_torch()
    except TorchError as error:
        raise pytest.UsageError(str(error)) from None


def _check_paths(config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Refuse a path after a space where pytest has taken it for a path of tests."""
    directory, known = Path(config.invocation_params.dir), config.known_args_namespace
    names = [option.flag for option in OPTIONS if option.is_path]
    conftest = directory / "conftest.py"
    if conftest.is_file() and CONFTEST.encode() in conftest.read_bytes():
        unknown = set(parser.parse_known_and_unknown_args(args)[1])
        names += [option.short for option in OPTIONS if option.is_path and option.short in unknown]
    values = {value for name, value in zip(args, args[1:]) if name in names}
    others = [word for word in known.file_or_dir if word not in values and (directory / word.split("::")[0]).exists()]
    if others or known.rootdir or known.inifilename:
        return  # pytest knows its root directory by these
    check_paths(args, names=names, directory=directory)


def _names_accuracy_tests(keyword: str) -> bool:
    """Whether `-k` selects accuracy tests: it has the word `precision`, and not behind a `not`."""
    return re.search(r"\b(?:test_)?precision\b", re.sub(r"\bnot\s+\w+", "", keyword)) is not None


def _asks_for_checkpoints(config: pytest.Config) -> bool:
    return bool(config.option.precision_checkpoint or os.environ.get("MODEL_DIR"))


def _only_informs(options) -> bool:
    """Whether pytest only prints something and ends: its help, its version, fixtures, markers."""
    return any(
        getattr(options, name, False)
        for name in ("help", "version", "showfixtures", "show_fixtures_per_test", "markers")
    )


def pytest_configure(config: pytest.Config) -> None:
    if _asks_for_checkpoints(config):
        from harness.plugin import checkpoints

        checkpoints.begin(config)
    config.stash.setdefault(EXPLICIT, _names_accuracy_tests(config.option.keyword))
    if _only_informs(config.option):
        return
    if config.stash[EXPLICIT] or config.pluginmanager.has_plugin(CONFTEST):
        activate(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _asks_for_checkpoints(config):
        from harness.plugin import checkpoints

        checkpoints.end(config)


def activate(config: pytest.Config):
    """The session object of a run in which something of the harness is asked for; made once.

    Raises: pytest.UsageError where an option cannot be.
    """
    session = config.pluginmanager.get_plugin(SESSION)
    if session is not None:
        return session
    from harness import autoload
    from harness.plugin.session import Session

    autoload.hold()
    _require_torch()
    config.option.keyword = keyword_of(config.option.keyword)
    options = options_of(config)
    opening = config.stash.setdefault(
        DEVICE, Opening(options.device, options.soc, options.devices, timing=options.bench)
    )
    given, explicit = _has_option(config), config.stash[EXPLICIT]
    whole = config.pluginmanager.has_plugin(CONFTEST) or given
    session = Session(config, opening, whole=whole, explicit=explicit or given)
    config.pluginmanager.register(session, SESSION)
    session.begin(explicit=explicit)
    return session


def _has_option(config: pytest.Config) -> bool:
    """Whether an option of the harness is set."""
    return any(getattr(config.option, option.dest) != option.default for option in OPTIONS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs) -> None:
    session = config.pluginmanager.get_plugin(SESSION)
    if session is not None:
        from harness.plugin.cards import share_cards

        share_cards(config, specs)
        session.quarantine.begin()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    if not config.stash.get(EXPLICIT, False) and not config.pluginmanager.has_plugin(CONFTEST):
        return None
    from harness.plugin.cards import count_cards

    return count_cards(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    session = config.pluginmanager.get_plugin(SESSION)
    return [] if session is None else session.header()


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """The header's lines where the device was opened only while tests were collected."""
    return pytest_report_header(config)


def _is_asked_for(config: pytest.Config, path: Path) -> bool:
    """Whether a file is at or below a path that pytest was given: it makes collectors of the files beside those too."""
    given = [Path(config.invocation_params.dir, word.partition("::")[0]) for word in config.args]
    above = {path.resolve(), *path.resolve().parents}
    return any(not item.exists() or item.resolve() in above for item in given)  # with --pyargs a name is no path


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """Before a file of tests is imported: the device where the file uses the fixture, since it may import
    transformers.
    """
    config = parent.config
    session = config.pluginmanager.get_plugin(SESSION)
    if (session is not None and session.opening.is_open) or not _is_asked_for(config, module_path):
        return
    try:
        source = module_path.read_bytes()
    except OSError:
        return  # pytest says so
    if PARAMETER.search(source) and not THEIR_OWN.search(source) and is_ours(parent):
        activate(config).open_for_collection()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that uses the fixture asks for the harness, also where its file did not show it."""
    if config.pluginmanager.get_plugin(SESSION) is None and any(uses_fixture(item) for item in items):
        activate(config)
    if config.option.precision_checkpoint:
        from harness.plugin import checkpoints

        checkpoints.only_checkpoints(config, items)
