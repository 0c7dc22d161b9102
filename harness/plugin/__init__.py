"""pytest: the options, the `precision` fixture, and the report of every accuracy test that was collected.

An accuracy test is called `test_precision`; it hands its case to the fixture. Rows travel in the tests'
`user_properties`, so that they survive xdist and stand in junit; the session object of the controlling process turns
them into the report.

Installed, the harness is a plugin of every pytest run by its entry point, `harness.plugin.entry`, with options
`--precision-NAME`. `pytest_plugins = ("harness.plugin",)` in a conftest.py adds the short names, `--NAME`, and works
where the package is not installed. (PYTEST_DONT_REWRITE: there are no assertions here, and the entry point imports this
package first.)
"""

from __future__ import annotations

import pytest

from harness.plugin.names import dtype_id, row_name
from harness.plugin.options import add_short_names

__all__ = ["dtype_id", "row_name"]

pytest_plugins = ("harness.plugin.entry",)  # pytest loads it once, also where the entry point did


def pytest_addoption(parser: pytest.Parser) -> None:
    add_short_names(parser)
