"""The dtypes that CANN's operators take, by dtypes.csv, so that the emulated device refuses what a card refuses.

Every line of the table has its source: the operator's page and the check of its arguments in CANN's open repositories.
An operator without a line takes what its function here computes. `python -m harness.conformance dtypes` counts both.

Only float64, the complex dtypes and the wider unsigned integers are refused (`REFUSED`). Operators cast the small
integers, bool and the half dtypes inside, before or behind the check that the table was read from, so the table alone
does not show that CANN refuses those.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("dtypes.csv")
CODES = {  # CANN's names without DT_, in the order of its lists: torch's
    "FLOAT": torch.float32, "FLOAT16": torch.float16, "BF16": torch.bfloat16, "DOUBLE": torch.float64,
    "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64,
    "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32, "UINT64": torch.uint64,
    "BOOL": torch.bool, "COMPLEX32": torch.complex32, "COMPLEX64": torch.complex64, "COMPLEX128": torch.complex128,
}  # fmt: skip
REFUSED = frozenset({
    torch.float64, torch.complex32, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
})  # fmt: skip
_CANNS = {dtype: name for name, dtype in CODES.items()}


class Line(NamedTuple):
    """What the table says of one operator."""

    operator: str
    dtypes: frozenset[str]  # that any of its tensors may have, CANN's names
    repository: str
    commit: str
    files: str


@functools.cache
def known_lines() -> dict[str, Line]:
    """The table, by operator."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["operator"]: Line(
            row["operator"], frozenset(row["dtypes"].split()), row["repository"], row["commit"], row["files"]
        )
        for row in rows
    }


@functools.cache
def _not_taken(operator: str) -> frozenset[torch.dtype]:
    line = known_lines().get(operator)
    return REFUSED - {CODES[name] for name in line.dtypes} if line else frozenset()


def refusal(operator: str, dtypes: set[torch.dtype]) -> str | None:
    """Why CANN takes no tensor of these dtypes in an operator, in its words; None where it does or nothing is known."""
    refused = sorted(_CANNS[dtype] for dtype in dtypes & _not_taken(operator))
    if not refused:
        return None
    line = known_lines()[operator]
    listed = ",".join(f"DT_{name}" for name in CODES if name in line.dtypes)
    return f"a tensor is not implemented for DT_{refused[0]}, should be in dtype support list [{listed}]"
