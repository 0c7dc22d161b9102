"""What a worker of a cluster is told of the models of a test: facts that are measured once, by another worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Facts = dict[tuple[str, str], dict[str, Any]]  # by label and dtype; values of `Learned`, read without torch


@dataclass(kw_only=True)
class Told:
    """The facts for one test, and the cases that it ran.

    A group of tests is of one model, whose label is "", or of a function whose cases are known only when they run: then
    the label is the name of the case.
    """

    facts: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    by_name: bool = False
    cases: list[Any] = field(default_factory=list)

    def _label(self, case: Any) -> str:
        return case.name if self.by_name else ""

    def take_over(self, case: Any, models: Any) -> None:
        """Before a row of a case: let the models know what another worker measured of its model."""
        from harness.reference.models import Learned

        self.cases.append(case)
        learned = self.facts.get((self._label(case), case.dtype))
        if learned is not None:
            models.learn(case.subject, case.dtype, Learned(**learned))
            return
        conditioned = [item for (label, _), item in self.facts.items() if label == self._label(case)]
        if conditioned:  # in another dtype
            models.conditioning.setdefault(case.subject, conditioned[0]["conditioning"])

    def learned(self, models: Any) -> Facts:
        """After the test: what is known of the models of its cases."""
        known = {(self._label(case), case.dtype): models.learned(case.subject, case.dtype) for case in self.cases}
        return {key: asdict(learned) for key, learned in known.items() if learned is not None}
