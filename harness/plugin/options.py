"""The options, declared once: `--precision-NAME` in every repository, `--NAME` beside it where a conftest.py names
harness.plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.devices.names import SPECS_LISTED
from harness.judging.preset_names import PRESETS_LISTED
from harness.languages import LANGUAGE_NAMES

PREFIX = "--precision-"
ACROSS = 10  # runs of a row on each card, where --precision-across-cards names no number
GROUP = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option. `settings` go to argparse as they are; without `choices`, `type` or `action` the value is a text."""

    name: str  # as it is typed behind the prefix: "reference-store"
    help: str
    default: Any = None
    is_path: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """The option in every repository: "--precision-reference-store"."""
        return PREFIX + self.name

    @property
    def short(self) -> str:
        """The option where a conftest.py names harness.plugin: "--reference-store"."""
        return f"--{self.name}"

    @property
    def key(self) -> str:
        """The attribute of `options_of`: "reference_store"."""
        return self.name.replace("-", "_")

    @property
    def dest(self) -> str:
        """The attribute of pytest's `config.option`: "precision_reference_store"."""
        return f"precision_{self.key}"


def _path(name: str, metavar: str, help: str) -> Option:
    return Option(name=name, help=help, is_path=True, settings={"type": Path, "metavar": metavar})


def _given(name: str, help: str) -> Option:
    """A file that a user gives in place of drawn inputs."""
    return Option(name=name, help=help, is_path=True, settings={"metavar": "FILE"})


def _text(name: str, metavar: str, help: str, default: str | None = None) -> Option:
    return Option(name=name, help=help, default=default, settings={"metavar": metavar})


def _choice(name: str, choices: Sequence[str], help: str) -> Option:
    """The first choice is the default."""
    return Option(name=name, help=help, default=choices[0], settings={"choices": tuple(choices)})


def _switch(name: str, help: str) -> Option:
    return Option(name=name, help=help, default=False, settings={"action": "store_true"})


def _number(name: str, kind: type, metavar: str, help: str, default: float | None = None) -> Option:
    return Option(name=name, help=help, default=default, settings={"type": kind, "metavar": metavar})


OPTIONS = (
    _text("device", "DEVICE", SPECS_LISTED, default="auto"),
    _text("soc", "NAME", "the chip that the emulated device plays, such as Ascend310P3 (default Ascend910B4)"),
    _number("devices", int, "N", "how many cards the emulated machine has; with -n each worker takes one of them"),
    Option(
        name="across-cards",
        help="run every row on all visible cards, N times on each (10 where N is not given): a card whose bits are "
        "not those of most cards fails its row",
        settings={"type": int, "nargs": "?", "const": ACROSS, "metavar": "N"},
    ),
    _path("report", "DIR", "where the report goes (default: reports/)"),
    _choice("lang", LANGUAGE_NAMES, "language of the markdown report"),
    Option(
        name="fault",
        help="break the emulated device on purpose, such as 'aclnnMatmul:hf32'; the report says so",
        default=[],
        settings={"action": "append", "metavar": "OPERATOR:KIND[:SETTINGS]"},
    ),
    _text("preset", "NAME", f"judge every case by this preset: {PRESETS_LISTED}"),
    _path("reference-store", "DIR", "keep the CPU's outputs there and read them the next time"),
    _switch(
        "rerun-reference", "repeat the CPU's run with every seed; without it, with the first of each model and dtype"
    ),
    _choice(
        "companion",
        ("auto", "off"),
        "run a case that has half dtypes alone in float32 too, with its first seed (default)",
    ),
    _choice(
        "baseline",
        ("check", "require", "accept", "off"),
        "compare rows with accepted numbers (default); fail those that have none as well; or accept this run's",
    ),
    _path("baselines", "DIR", "where accepted numbers are (default: cases/baselines/)"),
    _text("shard", "K/N", "run the K-th of N parts of the accuracy tests, about equally long; merge makes one report"),
    _path("shard-times", "JSON", "the report of an earlier run, by whose times the parts are made"),
    _text("ray", "ADDRESS", "spread the rows over the Ray cluster at this address (auto, HOST:PORT, ray://HOST:PORT)"),
    _choice(
        "locate",
        ("auto", "off", "modules", "operators"),
        "find the operator (default), or the module, that a failing row comes from",
    ),
    _number("locate-budget", float, "SECONDS", "what that may take in all (default 120)", default=120.0),
    _text(
        "locate-case",
        "NAME",
        "run the rows of this case, or of tests whose id has the text, and locate every row, passing or not",
    ),
    _number("locate-seed", int, "SEED", "of these rows the one with this seed"),
    _switch("locate-backward", "look at each operator's gradients too"),
    _path(
        "known-failures",
        "FILE",
        "failures that are known, reviewed and dated (default: cases/known_failures.toml where it is)",
    ),
    _number(
        "row-timeout",
        float,
        "SECONDS",
        "end a row that takes longer (default: an hour for the first of a case, then 20 times its longest, "
        "10 minutes at least)",
    ),
    _switch("resume", "keep rows of the run before that passed, where weights, inputs, code and stack are the same"),
    _switch("isolate", "run rows in a process that is replaced when it dies (pytest-xdist); the default on a card"),
    _switch("no-isolate", "run rows in pytest's own process, on a card too"),
    _switch("bench", "time each accuracy case's model and add the table to the report"),
    Option(
        name="checkpoint",
        help="run this checkpoint, or those in this folder, and no other case (repeatable; cases/test_checkpoints.py)",
        default=[],
        is_path=True,
        settings={"action": "append", "metavar": "DIR"},
    ),
    Option(
        name="dtype",
        help="run checkpoints in this dtype (repeatable; default: float32, and the one that they are stored in)",
        default=[],
        settings={"action": "append", "choices": ("float32", "float16", "bfloat16")},
    ),
    _number("batch-size", int, "B", "sequences, pictures or sounds that a checkpoint gets at a time (default 2)", 2),
    _number("length", int, "N", "tokens of a checkpoint's sequences at most (default 32)", 32),
    _given("text", "give checkpoints these texts, one a line, in place of sentences drawn by seed"),
    _given("image", "give checkpoints this picture in place of those drawn by seed"),
    _given("audio", "give checkpoints this WAV recording in place of sounds drawn by seed"),
    _path("base", "DIR", "the base model of adapters (default: what their config names, or what lies beside them)"),
    _switch("trust-remote-code", "run code that lies in a checkpoint"),
)


def add_options(parser: pytest.Parser) -> None:
    """Add `--precision-NAME` for every option."""
    group = parser.getgroup(GROUP, "accuracy of a device against the CPU")
    for option in OPTIONS:
        group.addoption(option.flag, dest=option.dest, default=option.default, help=option.help, **option.settings)


def add_short_names(parser: pytest.Parser) -> None:
    """Add `--NAME` for every option; it sets what `--precision-NAME` sets."""
    group = parser.getgroup(f"{GROUP}, short names", "the short names of the accuracy options, in this repository")
    for option in OPTIONS:
        same = f"the same as {option.flag}"
        group.addoption(option.short, dest=option.dest, default=option.default, help=same, **option.settings)


def options_of(config: pytest.Config) -> SimpleNamespace:
    """The options of a run by their short names, with underscores: `options_of(config).reference_store`."""
    return SimpleNamespace(**{option.key: getattr(config.option, option.dest) for option in OPTIONS})


def is_given(arguments: Sequence[str]) -> bool:
    """Whether a command line holds one of the prefixed options."""
    return any(argument.startswith(PREFIX) for argument in arguments)


def check_paths(arguments: Sequence[str], *, names: Sequence[str], directory: Path) -> None:
    """Refuse `--precision-report DIR` where pytest takes an existing DIR outside of `directory` for a test path.

    pytest looks for its root directory, its ini file and the first conftest.py before it knows the options of plugins,
    and takes an unknown option's value for a path of tests. `names` are the options to look at, `directory` is where
    pytest started.

    Raises: pytest.UsageError, with the words to type.
    """
    for name, value in zip(arguments, arguments[1:]):
        path = directory / value
        if name in names and path.exists() and directory not in (path.resolve(), *path.resolve().parents):
            raise pytest.UsageError(
                f"{name} {value}: pytest takes an existing path after a space for a path of tests and looks "
                "for its ini file and "
                f"conftest.py there; write {name}={value}"
            )
