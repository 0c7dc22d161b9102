"""What the numeric switches of a device cost, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness.judging.verdict import ALL_SWITCHES, SwitchCost
from harness.report.document import Block, Heading, Table, Text
from harness.report.format import NO_VALUE, difference_text
from harness.report.rows import Row
from harness.report.words import told

AGREE = 0.2  # of the expected error: what is measured further away is shown in any case


def shown_costs(costs: Sequence[SwitchCost]) -> list[SwitchCost]:
    """The switches that change the error by more than a hundredth, as expected or as measured; "all of them" where two
    or more do, or where the measured error of all together is not the expected one.
    """
    single = [cost for cost in costs if cost.switch != ALL_SWITCHES]
    together = [cost for cost in costs if cost.switch == ALL_SWITCHES]
    changing = [cost for cost in single if cost.felt or _unlike(cost)]
    return changing + (together if len(changing) > 1 or any(map(_unlike, together)) else [])


def _unlike(cost: SwitchCost) -> bool:
    """Whether the device does not give with the switch what the forecast says, within `AGREE`."""
    measured = cost.measured_after
    return measured is not None and not abs(measured - cost.after) <= AGREE * cost.after


def switch_table(rows: Iterable[Row], words: Mapping[str, str], *, named: bool = True) -> Table | None:
    """A row for each switch that changes the error of a case; None where none does. `named`: with the case's name."""
    body = []
    measured = False
    for row in rows:
        for cost in shown_costs(row.switches or ()):
            name = [row.case, row.dtype or NO_VALUE] if named else []
            numbers = [difference_text(cost.before), difference_text(cost.after)]
            if cost.measured_after is not None:
                measured = True
                numbers.append(difference_text(cost.measured_after))
            else:
                numbers.append(NO_VALUE)
            body.append((*name, told(cost.switch, words), *numbers, told(cost.remedy, words)))
    if not body:
        return None
    columns = [words["case"], "dtype"] if named else []
    first = len(columns) + 1
    columns += [words["switch"], words["switch_before"], words["switch_after"], words["switch_measured"]]
    columns.append(words["switch_remedy"])
    if not measured:
        columns.pop(first + 2)
        body = [(*line[: first + 2], *line[first + 3 :]) for line in body]
    return Table(
        columns=tuple(columns), rows=tuple(body), numbers_from=first, numbers_to=first + (3 if measured else 2)
    )


def switch_blocks(rows: Iterable[Row], words: Mapping[str, str]) -> list[Block]:
    """The table under its heading; nothing where no switch changes a number."""
    table = switch_table(rows, words)
    if table is None:
        return []
    return [Heading(text=words["switches"]), Text(text=words["switches_intro"]), table]
