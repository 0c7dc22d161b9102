"""Where the failing rows of a run come from: located one after the other, within the budget of the run."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from harness.plugin.names import row_name


class Locating:
    """What was located in one run; `run` has its rows and its device."""

    def __init__(self, run: Any):
        self._run = run
        self.cases: dict[tuple[str, str], Any] = {}  # by name and dtype
        self.found: set[tuple[str, str]] = set()  # cases that were located, by name and dtype
        self.spent = 0.0  # seconds on locating
        self.unlocated = 0  # failing rows that the budget left out

    def wants(self, case, *, failed: bool) -> bool:
        """Whether to look where a row comes from: it fails, was not located with another seed, and the budget is not
        spent; or it was asked for.
        """
        self.cases[case.name, case.dtype] = case
        every, key = self._run.options.locate_case is not None, (case.name, case.dtype)
        if self._run.options.locate == "off" or not (failed or every) or (key in self.found and not every):
            return False
        if self._run.is_stopped:
            return False
        if self.spent >= self._run.options.locate_budget and not every:
            self.unlocated += 1
            return False
        self.found.add(key)
        return True

    def locate(self, case, seed: int | None, row):
        """Where a row's error comes from, as the report holds it; None where its checkpoint cannot be loaded: no
        operator ran.
        """
        from harness.errors import CheckpointError

        began, counted = time.monotonic(), [(item, item.calls, item.hits) for item in self._run.planted]
        every = self._run.options.locate_case is not None
        try:
            limit = math.inf if every else self._run.options.locate_budget - self.spent
            return self._located(case, seed, limit, row)
        except CheckpointError:
            return None
        except Exception as error:  # noqa: BLE001  a row that failed must not be lost because its cause was not found
            from harness.report.located import unlocated

            return unlocated(f"It could not be located: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            self.spent += time.monotonic() - began
            for item, calls, hits in counted:  # what a fault did to the row itself is what the report says
                item.calls, item.hits = calls, hits

    def _located(self, case, seed: int | None, limit: float, row):
        from harness.errors import HarnessError
        from harness.locate import locate
        from harness.locate.repro import write_repro
        from harness.report import stem_of, write_text
        from harness.report.located import located
        from harness.report.pictures import depth_picture
        from harness.report.words import LANGUAGES

        level = self._run.options.locate
        self._run.terminal.say(
            f"{row_name(case.name, case.dtype, seed)}: locating, by {'operators' if level == 'auto' else level}"
        )
        began, how = time.monotonic(), dict(models=self._run.models, level=level, limit=limit, row=_symptom(row))
        finding = locate(case, seed, self._run.device, backward=self._run.options.locate_backward, **how)
        if finding.first is None and finding.has_gradients:
            try:
                finding = locate(case, seed, self._run.device, backward=True, **how)
            except HarnessError as error:  # what the first look found stands without the gradients
                self._run.terminal.note(f"{case.name}: the gradients of its operators were not looked at: {error}")
        self.spent -= finding.compiling
        name = stem_of(f"{case.name}-{case.dtype}" + ("" if seed is None else f"-seed{seed}"))
        folder, repro, picture = self._run.directory / "repro" / name, None, None
        if finding.replay is not None:
            title = f"{finding.first.name} on {self._run.device.name}: {finding.first.reasons[0]}"
            try:
                more = dict(
                    stack=self._run.environment["stack"],
                    faults=[str(item) for item in self._run.planted],
                    seconds=limit - (time.monotonic() - began),
                )
                repro = write_repro(finding.replay, folder, title=title, **more)
            except Exception as error:  # noqa: BLE001  the finding stands without it
                self._run.terminal.note(
                    f"no repro of {finding.first.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                )
        if finding.level == "operators" and finding.steps:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "depth.svg", depth_picture(finding, LANGUAGES[self._run.options.lang]))
            picture = f"repro/{name}/depth.svg"
        return located(finding, repro, picture)

    def together(self) -> None:
        """Locate the rows that only all seeds together showed to be worse."""
        from harness.judging.status import Mark, Status

        for row in self._run.all_rows():
            case = self.cases.get((row.case, row.dtype))
            if (
                row.status is Status.REGRESSED
                and Mark.INCOMPARABLE not in row.marks
                and row.located is None
                and case is not None
                and self.wants(case, failed=True)
            ):
                self._run.replace_row(row, replace(row, located=self.locate(case, row.seed, row)))

    def print(self, terminal, row) -> None:
        """The finding on a row: whole where it was asked for, else its sentences."""
        from harness.report.located import found_text
        from harness.report.words import LANGUAGES

        name = row_name(row.case, row.dtype, row.seed)
        if self._run.options.locate_case is not None:
            terminal.write_line(f"{name}:")
            terminal.write_line(found_text(row.located, LANGUAGES[self._run.options.lang]))
        else:
            self._run.terminal.tell(f"located {name}: {row.located.said}")


def _symptom(row):
    """What a row shows that is to be located."""
    from harness.judging.status import Mark, Status
    from harness.locate import Symptom

    if row.status is Status.ERROR:
        return Symptom(error="; ".join(row.reasons))
    fractions = [
        comparison
        for comparison in row.comparisons.values()
        if comparison.expected_dtype.startswith(("float", "bfloat", "complex"))
    ]
    sizes = [math.inf if fraction.nonfinite_differ else fraction.rel_l2 for fraction in fractions]
    away = max((size for size in sizes if size == size), default=math.nan)
    return Symptom(fails=not row.status.is_fine, away=away, scatters=Mark.NONDETERMINISTIC in row.marks)
