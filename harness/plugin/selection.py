"""Whether a run of pytest is of all accuracy tests or of a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest

ALL = ("", "precision", "test_precision")  # texts of -k that select every accuracy test
_PARTS = (
    "markexpr",
    "lf",
    "stepwise",
    "ignore",
    "ignore_glob",
    "deselect",
    "precision_locate_case",
    "precision_shard",
)  # options that leave tests out


def selects_all(config: pytest.Config, cases: Path) -> bool:
    """Whether no option and no path of the command line leaves accuracy tests out. `cases` is the folder that holds
    them.
    """
    if config.option.keyword.strip() not in ALL or any(getattr(config.option, name, None) for name in _PARTS):
        return False
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return True  # the project's own folders
    paths = [Path(config.invocation_params.dir, arg) for arg in config.args]
    return any(path == cases or path in cases.parents for path in paths)
