"""--precision-resume: rows of an earlier run stand where nothing that they rest on has changed."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from harness.errors import HarnessError

_OWN = ("card", "packages")  # of a stack: what may differ, and what is compared by name


class Earlier:
    """The rows of the run before, in `directory`, that passed; none where there is no report of it."""

    def __init__(self, directory: Path):
        from harness.judging.status import Mark, Status
        from harness.report import PREVIOUS_JSON, load

        path = directory / PREVIOUS_JSON
        self._report = None
        if path.is_file():
            with contextlib.suppress(HarnessError):  # where it cannot be read, every row is measured
                self._report = load(path)
        rows = () if self._report is None else self._report.rows
        self._rows = {
            (row.test, *row.key): row
            for row in rows
            if row.status is Status.PASS and row.code_sha256 is not None and Mark.RERUN not in row.marks
        }

    def __len__(self) -> int:
        return len(self._rows)

    def row(
        self, test: str, case: Any, seed: int | None, *, models: Any, environment: Mapping[str, Any], code: str
    ) -> Any:
        """The row of `test` with this case and seed, where its weights, inputs, code and stack are as they were; else
        None.
        """
        from harness.reference import inputs_digest
        from harness.run.validation import inputs_of

        row = self._rows.get((test, case.name, case.dtype, seed))
        if row is None or row.code_sha256 != code or not self._same_stack(environment):
            return None
        inputs = inputs_digest(inputs_of(case, seed), f"{case.name}: inputs()")
        if row.inputs_sha256 != inputs or row.weights_sha256 != models.content(**case.recipe):
            return None
        return row

    def _same_stack(self, environment: Mapping[str, Any]) -> bool:
        report = self._report
        if report is None or report.backend != environment["backend"]:
            return False
        before, now = report.stack, environment["stack"]
        packages = before.get("packages") or {}, now.get("packages") or {}
        common = packages[0].keys() & packages[1].keys()
        same = {name: value for name, value in before.items() if name not in _OWN} == {
            name: value for name, value in now.items() if name not in _OWN
        }
        return same and all(packages[0][name] == packages[1][name] for name in common)


def code_of_run() -> str:
    """sha256 over the files of one's own that are imported once the tests are collected, and over the harness's.

    A file in a folder of installed packages is none of one's own: its version is in the stack.
    """
    folder = Path(harness.__file__).parent
    own = {str(path): path for path in folder.rglob("*.py") if "tests" not in path.relative_to(folder).parts}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py") and not _is_installed(file) and folder not in Path(file).parents:
            own[file] = Path(file)
    contents = {hashlib.sha256(path.read_bytes()).hexdigest() for path in own.values() if path.is_file()}
    return hashlib.sha256(" ".join(sorted(contents)).encode()).hexdigest()


def _is_installed(file: str) -> bool:
    """Whether a file is of an installed package or of Python itself."""
    parts = Path(file).parts
    return "site-packages" in parts or "dist-packages" in parts or str(Path(file)).startswith(sys.base_prefix)
