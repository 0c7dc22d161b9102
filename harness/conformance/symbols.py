"""What a torch_npu wheel wants of CANN and the emulator lacks: the work that the next version brings.

python -m harness.conformance symbols [WHEEL.whl | DIRECTORY …] [--names]
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from harness.conformance.options import parser_of
from harness.emulator import build
from harness.errors import HarnessError


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one wheel wants, and the part of it that is not there; names, sorted."""

    name: str
    operators: tuple[str, ...]  # aclnn operators that it calls
    not_emulated: tuple[str, ...]  # of those, the ones outside the table: an error that names them
    linked: tuple[str, ...]  # functions that it cannot be loaded without
    refused: tuple[str, ...]  # of those, the ones that answer "not emulated"
    looked_up: tuple[str, ...]  # functions that it asks for at run time
    absent: tuple[str, ...]  # of those, the ones that it will not find
    gone: tuple[str, ...]  # operators of the table that it does not know


def survey(libraries: list[bytes], name: str) -> Survey:
    """Hold what the libraries of a wheel want against the emulator's table and runtime.c."""
    from harness.emulator.operators import OPERATORS

    operators, linked = build.operator_names(libraries), build.wanted_symbols(libraries)
    looked_up = [looked_up_name for looked_up_name in build.looked_up_names(libraries) if looked_up_name not in linked]
    there = build.defined_names()
    lacking = lambda names, known: tuple(item for item in names if item not in known)  # noqa: E731
    return Survey(
        name=name,
        operators=tuple(operators),
        not_emulated=lacking(operators, OPERATORS),
        linked=tuple(linked),
        refused=lacking(linked, there),
        looked_up=tuple(looked_up),
        absent=lacking(looked_up, there),
        gone=lacking(sorted(OPERATORS), operators),
    )


def read_wheel(path: Path) -> list[bytes]:
    """The libraries in a wheel file, or in the directory of an installed or unpacked torch_npu.

    Raises: HarnessError when there is no torch_npu there.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            inside = set(wheel.namelist())
            result = [
                wheel.read(f"torch_npu/lib/{name}") for name in build.LIBRARY_NAMES if f"torch_npu/lib/{name}" in inside
            ]
    else:
        folder = next(
            (
                item
                for item in (path / "torch_npu" / "lib", path / "lib", path)
                if (item / build.LIBRARY_NAMES[0]).is_file()
            ),
            None,
        )
        result = (
            []
            if folder is None
            else [(folder / name).read_bytes() for name in build.LIBRARY_NAMES if (folder / name).exists()]
        )
    if not result:
        raise HarnessError(
            f"{path} holds no torch_npu/lib/{build.LIBRARY_NAMES[0]}; give a wheel of torch_npu, or the "
            "directory of an unpacked one"
        )
    return result


def _table(surveys: list[Survey]) -> str:
    """The surveys as markdown, a row each."""
    lines = [
        "| torch_npu | operators | of them emulated | linked | refused | looked up | absent | gone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in surveys:
        counts = (
            len(item.operators),
            len(item.operators) - len(item.not_emulated),
            *map(len, (item.linked, item.refused, item.looked_up, item.absent, item.gone)),
        )
        lines.append(f"| {item.name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = parser_of("symbols").parse_args(argv)
    result = [survey(read_wheel(path), _version(path)) for path in arguments.wheels] or [
        survey(build.wheel_libraries(), build.wheel_version())
    ]
    print(_table(result))
    if arguments.names:
        for item in result:
            for what in ("not_emulated", "refused", "absent", "gone"):
                print(f"\n{item.name}, {what.replace('_', ' ')}: {', '.join(getattr(item, what)) or 'none'}")
    return 0


def _version(path: Path) -> str:
    match = re.match(r"torch_npu-([^-]+)-", path.name)
    return match[1] if match else str(path)
