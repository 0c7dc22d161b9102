"""The checkpoints that `--precision-checkpoint` names, as rows: what cases/test_checkpoints.py parametrizes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.plugin.names import dtype_id
from harness.plugin.options import options_of

if TYPE_CHECKING:
    from harness.case import Case

ARGUMENT = "checkpoint"  # what the test's parameter is called


@dataclass(frozen=True, kw_only=True)
class CheckpointRun:
    """One row: a part of a checkpoint in a dtype with a seed. `problem`: why the checkpoint cannot be run."""

    path: str
    name: str
    part: str
    dtype: str
    seed: int | None
    options: tuple[tuple[str, Any], ...] = ()
    problem: str = ""

    @property
    def id(self) -> str:
        """The row in a test id: "float32-seed42-bert", with its part where that is not the whole."""
        words = [dtype_id(self.dtype), "files" if self.seed is None else f"seed{self.seed}", self.name]
        return "-".join([*words, *([] if self.part == "forward" else [self.part])])

    @property
    def case_name(self) -> str:
        """What its rows are called."""
        return self.name if self.part == "forward" else f"{self.name}-{self.part}"

    def case(self) -> Case:
        """The case to run; fails the test with one sentence where the checkpoint cannot be run."""
        from harness.case import Case
        from harness.errors import CheckpointError

        if self.problem:
            pytest.fail(f"CheckpointError: {self.problem}", pytrace=False)
        try:
            how = dict(part=self.part, dtype=self.dtype, name=self.case_name)
            return Case.from_checkpoint(self.path, **how, **dict(self.options))
        except CheckpointError as error:
            pytest.fail(f"CheckpointError: {error}", pytrace=False)

    def run(self, precision: Callable[..., Any]) -> None:
        """Measure the row by the fixture `precision`; fails the test with one sentence, without a traceback, where the
        checkpoint cannot be run.
        """
        from harness.errors import CheckpointError

        try:
            precision(self.case(), self.seed)
        except CheckpointError as error:
            pytest.fail(f"CheckpointError: {error}", pytrace=False)


_configs: list[pytest.Config] = []  # of the runs of pytest that have begun and not ended, the inner one last


def begin(config: pytest.Config) -> None:
    """A run of pytest begins."""
    _configs.append(config)


def end(config: pytest.Config) -> None:
    """A run of pytest ends."""
    if config in _configs:
        _configs.remove(config)


def is_asked() -> bool:
    """Whether this run is of checkpoints."""
    return bool(_configs and _given(_configs[-1]))


def only_checkpoints(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other accuracy tests out of a run that names checkpoints."""
    from harness.plugin.fixtures import uses_fixture

    if not options_of(config).checkpoint:
        return
    others = {id(item) for item in items if uses_fixture(item) and ARGUMENT not in _parameters(item)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in others])
    items[:] = [item for item in items if id(item) not in others]


def run_of(item: pytest.Item) -> CheckpointRun | None:
    """The row that a test is; None for any other test."""
    result = _parameters(item).get(ARGUMENT)
    return result if isinstance(result, CheckpointRun) else None


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In a file of tests that imports this: one test for each row."""
    if ARGUMENT in metafunc.fixturenames:
        result = runs(metafunc.config)
        metafunc.parametrize(ARGUMENT, result, ids=[item.id for item in result])


def _given(config: pytest.Config) -> list[str]:
    """What the option names, and MODEL_DIR where that is no AIMv2, which has a file of cases of its own."""
    from harness.checkpoints.recognition import recognise
    from harness.errors import CheckpointError

    named, usual = list(options_of(config).checkpoint), os.environ.get("MODEL_DIR")
    if named or not usual:
        return named
    try:
        return [] if recognise(usual).kind == "AIMv2" else [usual]
    except CheckpointError:
        return []  # the cases of AIMv2 say so


def runs(config: pytest.Config) -> list[CheckpointRun]:
    """A row for each part, dtype and seed of the checkpoints that a run's options name; a checkpoint that cannot be run
    is one row, which says why.

    Raises: pytest.Collector.CollectError, which pytest shows without a traceback, for a folder without a checkpoint.
    """
    from harness.checkpoints.material import Asked
    from harness.checkpoints.recognition import checkpoints_in
    from harness.errors import CheckpointError

    options = options_of(config)
    try:
        result = [
            checkpoint for given in _given(config) for checkpoint in checkpoints_in(_relative_path(given, config))
        ]
        asked = Asked(
            batch=options.batch_size,
            length=options.length,
            text=_file(options.text, config),
            image=_file(options.image, config),
            audio=_file(options.audio, config),
            base=None if options.base is None else str(_relative_path(options.base, config)),
            trust_remote_code=options.trust_remote_code,
        )
    except (CheckpointError, ValueError) as error:
        raise pytest.Collector.CollectError(f"--precision-checkpoint: {error}") from None
    names = _names([str(item) for item in result])
    return [run for item in result for run in _runs(str(item), names[str(item)], asked, options.dtype)]


def _runs(path: str, name: str, asked: Any, dtypes: Sequence[str]) -> list[CheckpointRun]:
    from dataclasses import asdict

    from harness.checkpoints.building import SEEDS, parts_of, require_whole, usual_dtypes
    from harness.errors import CheckpointError

    seeds = (None,) if asked.own_files else SEEDS
    options = tuple(asdict(asked).items())
    try:
        parts = parts_of(path, asked)
        require_whole(path)
        wanted = dtypes or usual_dtypes(path)
    except CheckpointError as error:
        how = dict(part="forward", dtype=(dtypes or ["float32"])[0], seed=seeds[0])
        return [CheckpointRun(path=path, name=name, problem=str(error), **how)]
    return [
        CheckpointRun(path=path, name=name, part=part, dtype=dtype, seed=seed, options=options)
        for part in parts
        for dtype in wanted
        for seed in (seeds if part == parts[0] else seeds[:1])
    ]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each checkpoint: its directory's, with the parent's before it where two have one name."""
    from harness.checkpoints.recognition import recognise
    from harness.errors import CheckpointError

    def name(path: str) -> str:
        try:
            return recognise(path).name
        except CheckpointError:
            return Path(path).resolve().name

    short = {path: name(path) for path in dict.fromkeys(paths)}
    counts = Counter(short.values())
    return {
        path: item if counts[item] == 1 else f"{Path(path).resolve().parent.name}-{item}"
        for path, item in short.items()
    }


def _relative_path(given: str, config: pytest.Config) -> str:
    """A path as it is from where pytest started; `module:function` stays as it is."""
    path = Path(config.invocation_params.dir, given)
    return os.path.relpath(path) if path.exists() else str(given)


def _file(given: str | None, config: pytest.Config) -> str | None:
    return None if given is None else _relative_path(given, config)
