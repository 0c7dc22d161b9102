"""Which operators of the emulator have a known table of dtypes (harness/emulator/dtypes.csv), of how many.

    python -m harness.conformance dtypes [--names]
    python -m harness.conformance dtypes --read ops-math ops-nn ops-transformer ops-cv

The second writes the table anew from git checkouts of CANN's operators. A line is read from two sources that must both
be there: the operator's page (docs/aclnnXxx.md) and the check of its arguments (op_api/aclnn_xxx.cpp). The line holds
every dtype that either of them names for any tensor of the operator on an Atlas A2 or A3, so that a dtype outside the
line is one that neither names. Lists for the Ascend 950 alone are left out.
"""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path

from harness.conformance.options import parser_of
from harness.emulator import build
from harness.emulator.known_dtypes import CODES, TABLE, Line, known_lines
from harness.errors import HarnessError

REPOSITORY = "https://gitcode.com/cann/"
_NAMES = {  # what the sources write: what the table holds
    "FLOAT": "FLOAT",
    "FLOAT32": "FLOAT",
    "FLOAT16": "FLOAT16",
    "BFLOAT16": "BF16",
    "BF16": "BF16",
    "DOUBLE": "DOUBLE",
    "FLOAT64": "DOUBLE",
    **{name: name for name in CODES},
}
_LIST = re.compile(r"initializer_list<\s*(?:op::)?DataType\s*>\s*&?\s*(\w+)\s*=?\s*\{([^{}]*)\}")
_NEWER = re.compile(r"REGBASE|950|910_95|91095|3510|ARCH35|DAV_35|_95\b", re.IGNORECASE)  # lists for the Ascend 950


def checked(source: str) -> set[str]:
    """The dtypes in the lists of an op_api file, those for the Ascend 950 left out; empty where it has no lists."""
    result: set[str] = set()
    for name, body in _LIST.findall(source):
        if not _NEWER.search(name):
            result |= set(re.findall(r"DT_([A-Z]+\d*)", body))
    return {_NAMES[name] for name in result if name in _NAMES}


def documented(page: str) -> set[str]:
    """The dtypes that a page names for the arguments, without those that it denies to Atlas A2 and A3."""
    begin = page.find("参数说明")
    end = page.find("返回值", begin)
    part = page[begin : end if end > 0 else len(page)]
    named = set(re.findall(r"(?<![A-Z0-9_])([A-Z]+\d*)(?![A-Z0-9_])", re.sub(r"<[^>]+>", " ", part)))
    denied: set[str] = set()
    for line in part.splitlines():
        if "Atlas A2" in line and "不支持" in line:
            denied |= set(re.findall(r"(?<![A-Z0-9_])([A-Z]+\d*)(?![A-Z0-9_])", line[line.index("不支持") :]))
    return {_NAMES[name] for name in named - denied if name in _NAMES}


def _git(checkout: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True)
    if done.returncode:
        raise HarnessError(f"{checkout} is no git checkout of CANN's operators: {done.stderr.strip()}")
    return done.stdout


def _read(checkout: Path, repository: str, operators: set[str]) -> list[Line]:
    """The lines of the operators that a checkout holds, page and check."""
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    files = [
        file
        for file in _git(checkout, "ls-tree", "-r", "--name-only", "HEAD").splitlines()
        if not file.startswith("experimental/")
    ]
    checks = {}
    for file in files:
        if re.search(r"op_api/aclnn_\w+\.cpp$", file) and "/tests/" not in file:
            source = _git(checkout, "show", f"HEAD:{file}")
            for name in re.findall(r"aclnnStatus\s+(aclnn\w+?)GetWorkspaceSize\s*\(", source):
                checks[name] = (file, checked(source))
    lines = []
    for file in files:
        if not re.search(r"/docs/aclnn[^/]*\.md$", file):
            continue
        names = [name for name in Path(file).stem.split("&") if name in operators and checks.get(name, ("", set()))[1]]
        dtypes = documented(_git(checkout, "show", f"HEAD:{file}")) if names else set()
        lines += [
            Line(name, frozenset(dtypes | checks[name][1]), repository, commit, f"{file} {checks[name][0]}")
            for name in names
            if dtypes
        ]
    return lines


def _write(lines: list[Line]) -> None:
    """Write the table, a line for each operator, sorted."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["operator", "dtypes", "repository", "commit", "files"])
        for line in sorted(lines):
            rows.writerow(
                [
                    line.operator,
                    " ".join(name for name in CODES if name in line.dtypes),
                    line.repository,
                    line.commit,
                    line.files,
                ]
            )


def main(argv: list[str]) -> int:
    from harness.emulator.operators import OPERATORS

    arguments = parser_of("dtypes").parse_args(argv)
    if arguments.read:
        lines: dict[str, Line] = {}
        for checkout in arguments.read:
            for line in _read(checkout, REPOSITORY + checkout.name, set(OPERATORS)):
                lines.setdefault(line.operator, line)
        _write(list(lines.values()))
        known_lines.cache_clear()
    names, table = [name for name in build.operator_names() if name in OPERATORS], known_lines()
    print(f"operators with a known table of dtypes: {sum(name in table for name in names)} of {len(names)}")
    if arguments.names:
        print(f"without: {', '.join(name for name in names if name not in table) or 'none'}")
    return 0
