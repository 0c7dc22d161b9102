"""What a case with a model of a given size needs of this machine: `python -m harness doctor --model-size 7B`."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from harness.commands.base import DTYPES
from harness.reference import memory as host_memory
from harness.reference.memory import GIB, Estimate, Memory, count_of, estimate, estimates

_FITS = {True: "yes", False: "NO", None: "unknown"}
_NOTES = (
    "An estimate: {largest}activations are not in it.\n"
    "A model of transformers has its CPU side in a second process.\n"
    "Weights that are loaded in the dtype in which a checkpoint stores them stay the pages of its files: the kernel\n"
    "takes such pages back where memory is short, and reads them again."
)
_TAKEN = "the largest weight is taken for an embedding of 128,000 words; "


def model_size(text: str, *, dtype: str | None = None, workers: int = 1, emulated: bool = False) -> tuple[str, bool]:
    """A table by dtype of what a number of parameters ("7B") or a checkpoint (its path) needs; False where one of its
    rows does not fit.

    `workers` are those of xdist, each with a case of its own. With `emulated` the device's memory is the host's.

    Raises: ValueError for a size, a dtype or a number of workers that is none; CheckpointError for half a checkpoint.
    """
    memory, how = host_memory.read_memory(), dict(workers=workers, emulated=emulated)
    dtypes = (dtype,) if dtype else DTYPES
    path = Path(text)
    if path.exists():
        count, rows = _of_checkpoint(path, dtypes, memory, **how)
    else:
        count = count_of(text)
        rows = estimates(count, dtypes, memory=memory, **how)
    there = "this system does not say how much memory is there"
    if memory is not None:
        there = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB are there now ({memory.source})"
    summary = f"{count:,} parameters, {workers} worker{'s' if workers > 1 else ''}; {there}"
    notes = _NOTES.format(largest="" if path.exists() else _TAKEN)
    return f"{summary}\n\n{_table(rows)}\n\n{notes}", all(row.fits is not False for row in rows)


def _of_checkpoint(
    path: Path, dtypes: tuple[str, ...], memory: Memory | None, *, workers: int, emulated: bool
) -> tuple[int, list[Estimate]]:
    """The parameters of a checkpoint by its headers, and what it needs in each dtype."""
    from harness.checkpoints.weights import require_weights, size_of_weights

    if workers < 1:
        raise ValueError(f"a run has at least one worker, not {workers}")
    require_weights(path)
    stored = size_of_weights(path)
    how = dict(separate=True, workers=workers, memory=memory, emulated=emulated)
    return stored.parameters, [estimate(stored.loaded_in(dtype), dtype, **how) for dtype in dtypes]


def _table(rows: list[Estimate]) -> str:
    cells = [
        (
            row.dtype,
            _model_text(row),
            f"{row.host / GIB:.1f} GiB",
            f"{row.bytes_a_parameter:.1f}",
            f"{row.device / GIB:.1f} GiB",
            _FITS[row.fits],
        )
        for row in rows
    ]
    headers = ("dtype", "model", "host memory", "bytes a parameter", "weights on each device", "fits here")
    return tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True)


def _model_text(row: Estimate) -> str:
    if row.mapped:
        return "checkpoint in this dtype"
    return "of transformers" if row.separate else "any other"
