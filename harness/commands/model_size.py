"""What a case with a model of a given size needs of this machine: `python -m harness doctor --model-size 7B`."""

from __future__ import annotations

from tabulate import tabulate


def model_size(text: str, *, dtype: str | None = None, workers: int = 1, emulated: bool = False) -> tuple[str, bool]:
    """A table by dtype, without and with the process without torch_npu; False where one of its rows does not fit.

    `workers` are those of xdist, each with a case of its own. With `emulated` the device's memory is the host's.

    Raises: ValueError for a size, a dtype or a number of workers that is none.
    """
    from harness.reference.memory import GIB, count_of, estimates, read_memory

    count, memory = count_of(text), read_memory()
    rows = estimates(
        count,
        (dtype,) if dtype else ("float32", "float16", "bfloat16"),
        workers=workers,
        memory=memory,
        emulated=emulated,
    )
    words = {True: "yes", False: "NO", None: "unknown"}
    cells = [
        (
            row.dtype,
            "yes" if row.separate else "no",
            f"{row.host / GIB:.1f} GiB",
            f"{row.bytes_a_parameter:.1f}",
            f"{row.device / GIB:.1f} GiB",
            words[row.fits],
        )
        for row in rows
    ]
    headers = (
        "dtype",
        "model of transformers",
        "host memory",
        "bytes a parameter",
        "weights on each device",
        "fits here",
    )
    there = "this system does not say how much memory is there"
    if memory is not None:
        there = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB are there now ({memory.source})"
    summary = f"{count:,} parameters, {workers} worker{'s' if workers > 1 else ''}; {there}"
    notes = (
        "An estimate: the largest weight is taken for an embedding of 128,000 words; activations, and a checkpoint\n"
        "that is read into memory while the model is built, are not in it. A model of transformers has its CPU side\n"
        "in a second process."
    )
    table = tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True)
    return f"{summary}\n\n{table}\n\n{notes}", all(row.fits is not False for row in rows)
