"""What pytest-xdist's workers tell the process that started them, which collects nothing: the case of each test, and
the row that runs.

They share a temporary folder. A worker that is killed has no other way to say which case it ran.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLLECTED = "collected.json"


class Workers:
    """One end of it: `worker` is the worker's name, or None in the process that started the workers."""

    def __init__(self, worker: str | None):
        self.worker = worker
        self._folder: Path | None = None

    def join(self, config: Any) -> None:
        """In a worker: the folder that it was given."""
        given = getattr(config, "workerinput", {}).get("precision_folder")
        self._folder = Path(given) if given and Path(given).is_dir() else None

    def configure(self, node: Any) -> None:
        """Before a worker starts."""
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="accuracy-workers-"))
        node.workerinput["precision_folder"] = str(self._folder)

    def tell(self, collected: Mapping[str, Any]) -> None:
        """In a worker: the tests that it collected, by id, with case, dtype and seed."""
        self._write(COLLECTED, collected)

    def running(self, test: str, named: Mapping[str, Any]) -> None:
        """In a worker: the row that begins."""
        self._write(f"{self.worker}.json", {"test": test, **named})

    def collected(self) -> dict[str, dict]:
        """The tests that the workers collected; empty where they could not tell, as on another machine."""
        found = self._read(COLLECTED)
        return found if isinstance(found, dict) else {}

    def ran(self, test: str) -> dict[str, Any]:
        """Case, dtype and seed of the row of `test` that a worker began last; empty where nothing is known."""
        for path in sorted(self._folder.glob("gw*.json")) if self._folder is not None else ():
            said = self._read(path.name)
            if isinstance(said, dict) and said.pop("test", None) == test:
                return said
        return {}

    def close(self) -> None:
        """Remove the folder, in the process that made it."""
        if self.worker is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        if self.worker is None or self._folder is None:
            return
        partial = self._folder / f".{self.worker}.{name}"
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(self._folder / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._folder / name).read_text(encoding="utf-8")) if self._folder is not None else None
        except (OSError, ValueError):
            return None
