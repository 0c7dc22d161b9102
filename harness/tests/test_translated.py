"""Every sentence that the code gives to a row, to a report or to the terminal is said in the other language too.

The sentences are looked for where they arise, in the source: string constants and f-strings of three or more English
words. One that is added without its translation in `languages/zh.txt` fails here with its file and line.
"""

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness
from harness.report.sentences import in_language
from harness.tests.test_report import english_left

HARNESS = Path(harness.__file__).parent
NO_NAMES: Mapping[str, list[str]] = {}
CHOICES = 64  # texts of one f-string that are looked at
NAME = "x_1"  # what stands in a sentence for what is put into it when it is said

# Whose texts reach a reason, a note, a location, a reference, a forecast, a headline or the summary on the terminal.
SPEAKING = (
    "case.py", "generation.py", "last_operator.py", "judging", "run", "locate", "measure",
    "checkpoints", "models", "reference", "numerics", "upgrade", "devices", "plugin", "report", "emulator/faults.py",
)  # fmt: skip

# Exceptions that end a command or pytest's start with a line of their own, before there is a row or a report.
SET_UP = {
    "UsageError": "pytest prints it and runs nothing",
    "CollectError": "pytest prints it and runs nothing",
    "ValueError": "an argument that cannot be: pytest or Python prints it with the line of the caller",
    "TypeError": "as a ValueError",
    "AttributeError": "as a ValueError",
    "KeyError": "as a ValueError",
    "Mismatch": "as a ValueError",
    "NotImplementedError": "a mistake of the harness",
    "CompilerError": "the compiled code is left out, and the run goes on",
}

# What is no sentence of a row or a report: a file, or a function, a constant or a keyword in it, and why.
ELSEWHERE = {
    # what commands print and options say, which is in English in every language
    "judging/scores.py": "`score` prints it",
    "models/inference.py": "`infer` prints it",
    "run/once.py:infer_checkpoint": "`infer` prints it",
    "devices/measurements.py": "names of measurements, which `calibrate` and `probe` print",
    "upgrade/bisect.py": "`bisect` prints it",
    "upgrade/ratchet.py": "`ratchet` prints it",
    "upgrade/transitions.py": "`gate` prints it",
    "report/rejudge.py": "`judge` and `gate` print it",
    "report/files.py": "what commands print of a report that cannot be read or written",
    "report/history.py": "what `report --history` prints of a report that does not fit",
    "report/merge.py": "what `merge` prints of reports that do not fit",
    "report/plot.py": "what `report --plot` prints, and its picture's heading",
    "report/journal.py:read_journal": "what `merge` and `report` print of a journal that cannot be read",
    "report/journal.py:_lock": "raised before the first row",
    "report/rows.py:Row": "what commands print of a stored row that is no row",
    "report/rows.py:_reasons": "as Row",
    "report/rows.py:_refused": "as Row",
    "plugin/options.py": "the help of options",
    "plugin/cluster.py": "raised before the first row, or Ray's own words",
    "upgrade/known_failures.py:read_known": "raised before the first row",
    "upgrade/known_failures.py:_entry": "raised before the first row",
    "upgrade/tables.py": "raised before the first row",
    "emulator/faults.py:KINDS": "the help of faults",
    # what is no sentence
    "judging/tolerance.py:Tolerance.__post_init__": "a limit that cannot be: a ValueError",
    "measure/comparison.py:Count": "a stored number that cannot be: a ValueError",
    "measure/comparison.py:Size": "a stored number that cannot be: a ValueError",
    "reference/randomness.py:_KINDS": "names of operators",
    "reference/store.py:_Walk": "part of a key of the store",
    "run/cpu.py:CpuSide._key": "part of a key of the store",
    "checkpoints/recognition.py:_MARKS": "names of libraries",
    "models/aimv2.py:convert_checkpoint": "`convert` prints it",
    "devices/device_errors.py:QUEUED": "the vendor's words, by which an error is known",
    "devices/device_errors.py:FAULTS.name": "names of failures, by which their sentences begin",
    "plugin/spread.py:Spread.pytest_runtestloop": "pytest's own line of a collection that failed",
    "locate/repro.py:_body": "code of a script",
    "locate/repro.py:_SCRIPT": "code of a script",
    "numerics/cube.py": "in the words of the vendor, as the emulated operator raises it",
    "numerics/families.py:NoFloat32": "in the words of the vendor, as the emulated operator raises it",
    "numerics/families.py:GELU": "where a rule is read, which the documentation shows",
    "numerics/families.py:HALF_ONLY": "where a rule is read, which the documentation shows",
    "numerics/families.py:FAMILIES": "where a rule is read, and the names of chips, which the documentation shows",
    "numerics/families.py:UNKNOWN": "the names of chips, which the documentation shows",
    "numerics/otherwise.py": "names of orders of sums",
    "devices/device_errors.py:FAULTS.texts": "the vendor's words, by which an error is known",
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A text of the source with names put into it, and where it stands."""

    where: str  # "harness/run/notes.py:12"
    function: str  # "Judge.__call__", "FAULTS.texts"; "" at the top of the module
    text: str


def texts_of(node: ast.AST, known: Mapping[str, list[str]] = NO_NAMES) -> list[str]:
    """What a string constant or an f-string can say: every choice of an `if` in it, the texts that its names are
    `known` to hold, and `NAME` for all else.

    >>> texts_of(ast.parse('f"{n} row{s} of {what}"', mode="eval").body, {"what": ["the device", "the CPU"]})
    ['x_1 row of the device', 'x_1 row of the CPU']
    """
    if isinstance(node, ast.IfExp):
        return texts_of(node.body, known) + texts_of(node.orelse, known)
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if not isinstance(node, ast.JoinedStr):
        return []
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append([part.value])
        else:
            value = part.value
            parts.append(texts_of(value, known) or known.get(getattr(value, "id", ""), []) or [NAME])
    texts = ("".join(choice) for choice in itertools.islice(itertools.product(*parts), CHOICES))
    return [re.sub(f"{NAME}(?=[a-z]{{2}})", f"{NAME} ", re.sub(f"(?<=[a-z])(?:{NAME})+", "", text)) for text in texts]


def _known_in(body: Iterable[ast.AST], known: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The texts of the names that statements give a text, beside those that are known already."""
    result: dict[str, list[str]] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            texts = [text for text in texts_of(node.value, {**known, **result}) if text]
            result[name] = list(dict.fromkeys([*result.get(name, []), *(texts or [NAME])]))[:CHOICES]
    return {**known, **result}


def sentences_in(source: str, path: str) -> Iterator[Said]:
    """The texts of a module but its docstrings and what `SET_UP` raises, in their order."""

    def walk(node: ast.AST, function: str, known: Mapping[str, list[str]]) -> Iterator[Said]:
        if _is_no_sentence(node):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            known = _known_in(ast.walk(node), known)
        function = f"{function}.{_scope(node, function)}".strip(".")
        for text in dict.fromkeys(texts_of(node, known)):
            yield Said(where=f"{path}:{node.lineno}", function=function, text=text)
        if isinstance(node, ast.IfExp) and texts_of(node):
            return
        if isinstance(node, (ast.JoinedStr, ast.FormattedValue)):  # their own texts are in the whole already
            parts = node.values if isinstance(node, ast.JoinedStr) else [node.value]
            for part in parts:
                if not texts_of(part):
                    yield from walk(part, function, known)
            return
        for inner in ast.iter_child_nodes(node):
            yield from walk(inner, function, known)

    module = ast.parse(source)
    yield from walk(module, "", _known_in(module.body, NO_NAMES))


def _is_no_sentence(node: ast.AST) -> bool:
    """A docstring, what `SET_UP` raises, a comparison, an assertion, a list of names that is written as one text, and
    how a stored row is called where it is no row.
    """
    if isinstance(node, (ast.Assert, ast.Compare)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Raise):
        return _name(node.exc) in SET_UP
    method = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
    return method == "from_dict" or (method == "split" and isinstance(node.func.value, ast.Constant))


def _scope(node: ast.AST, function: str) -> str:
    """The name that a node adds to those of the functions around it: a function's, a constant's, a keyword's."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.keyword):
        return node.arg or ""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return _name(targets[0]) if not function and isinstance(node, (ast.Assign, ast.AnnAssign)) else ""


def _name(raised: ast.AST | None) -> str:
    if isinstance(raised, ast.Call):
        return _name(raised.func)
    if isinstance(raised, ast.Attribute) and isinstance(raised.value, ast.Call):  # Mismatch(…).within(…)
        return _name(raised.value)
    return getattr(raised, "attr", "") or getattr(raised, "id", "")


def left_in(said: Said) -> list[str]:
    """The English that is left of a text in a Chinese report, names apart."""
    if not english_left(said.text.replace(NAME, "")):
        return []
    return english_left(in_language(said.text.strip(), "zh").replace(NAME, ""))


def sources() -> Iterator[tuple[str, str]]:
    """The path of every module whose texts are looked at, below the package, and its source."""
    for name in SPEAKING:
        top = HARNESS / name
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            yield path.relative_to(HARNESS).as_posix(), path.read_text(encoding="utf-8")


def elsewhere(path: str, function: str) -> list[str]:
    """The entries of `ELSEWHERE` that name the function, one that it is part of, or its file."""
    inner = function.split(".")
    names = [path, *(f"{path}:{'.'.join(inner[: n + 1])}" for n in range(len(inner)))]
    return [name for name in names if name in ELSEWHERE]


def left_by_file() -> Iterator[tuple[str, Said, list[str]]]:
    """Every sentence of the source of which English is left, with its file, whether `ELSEWHERE` names it or not."""
    for path, source in sources():
        for said in sentences_in(source, f"harness/{path}"):
            left = left_in(said)
            if left:
                yield path, said, left


@functools.cache
def all_left() -> tuple[tuple[str, Said, list[str]], ...]:
    return tuple(left_by_file())


def test_every_sentence_is_said_in_chinese():
    left = [
        f"{said.where}: {', '.join(english)} (in {said.text!r})"
        for path, said, english in all_left()
        if not elsewhere(path, said.function)
    ]
    assert not left, "\n".join(left)


def test_what_is_said_elsewhere_is_there():
    """An entry that nothing needs any more would hide the next sentence of that name."""
    needed = {name for path, said, _ in all_left() for name in elsewhere(path, said.function)}
    assert sorted(ELSEWHERE.keys() - needed) == []


def test_a_sentence_without_its_translation_is_told():
    planted = '''
"""A docstring of a module is no sentence of a report."""
KINDS = "silu getitem mul add".split()

def check(case, side):
    """Nor is that of a function."""
    if side == "one of the sides that there are":
        raise ValueError("no argument of that name is known")
    how = "green bananas were counted" if case else "yellow bananas were eaten"
    raise CaseError(
        f"{case.name}: {how} on {side} {'more than once' if side else 'hardly ever again'}"
    )
'''
    left = [(said.where, english) for said in sentences_in(planted, "a.py") for english in left_in(said)]
    assert ("a.py:9", "green bananas were counted") in left
    assert ("a.py:11", "green bananas were counted on more than once") in left
    assert ("a.py:11", "yellow bananas were eaten on hardly ever again") in left
    assert {where for where, _ in left} == {"a.py:9", "a.py:11"}
    known = planted.replace("green bananas were counted", "it did not end within its limit")
    assert len([1 for said in sentences_in(known, "a.py") if left_in(said)]) < len(left)


NAMES = (
    "softmax, large values", "argmax, axis of 4097", "attention, mask additive finite", "norm of order 3",
    "max and where", "where with numbers", "activations at the edges", "silu, getitem, mul", "cat of views",
    "distribution of randn", "exp into a column", "matmul, both transposed", "linear, no bias", "attention, one query",
    "max_pool2d with padding", "layers.0.mlp: gelu (model.py:12)", "the-model", "rows", "index and gather",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_as_it_is(name):
    assert in_language(name, "zh") == name
    said = in_language(f"no baseline for {name} float32 seed 1; accept this run with --precision-baseline=accept", "zh")
    assert said == f"{name} float32 seed 1 没有基线；用 --precision-baseline=accept 接受本次结果"
