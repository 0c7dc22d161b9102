"""The house: who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1]
LEAVES = {
    "errors",
    "autoload",
    "compiling",
    "last_operator",
    "torch_private",
    "typed_json",
    "versions",
}  # free for all
ALLOWED = {  # module or package: what of the harness it may import, at the top or inside a function
    "errors": set(),
    "autoload": set(),
    "languages": set(),
    "compiling": set(),
    "last_operator": set(),
    "versions": set(),
    "torch_private": set(),
    "typed_json": set(),
    "measure": set(),
    "generation": {"measure"},  # the former name
    "numerics": {"devices"},  # the device for its types alone
    "emulator": {"numerics"},
    "devices": {"emulator", "numerics"},
    "device": {"devices"},  # the former name
    "checkpoints": {
        "devices",
        "measure",
        "models",  # for AIMv2, whose layouts are rules of `checkpoints.conversion`
        "reference",  # for what fits into memory
    },
    "judging": {"measure"},
    "reference": {"numerics"},
    "case": {"checkpoints", "devices", "judging", "reference", "run"},  # the last for the former place of `validate`
    "run": {"case", "checkpoints", "devices", "judging", "measure", "numerics", "reference"},
    "locate": {"case", "devices", "judging", "numerics", "reference", "run"},
    "report": {"judging", "languages", "measure"},
    "upgrade": {"judging", "report"},
    "pairs": {"judging", "measure"},
    "scores": {"judging"},
    "models": {"checkpoints", "devices", "reference", "report", "run"},
    "card": {
        "case",
        "checkpoints",
        "devices",
        "judging",
        "languages",
        "measure",
        "models",
        "reference",
        "report",
        "run",
    },
    "conformance": {
        "case",
        "checkpoints",
        "devices",
        "emulator",
        "judging",
        "locate",
        "measure",
        "models",
        "numerics",
        "reference",
        "report",
        "run",
        "upgrade",
    },
    "commands": {
        "card",
        "checkpoints",
        "devices",
        "emulator",
        "judging",
        "languages",
        "models",
        "numerics",
        "pairs",
        "reference",
        "report",
        "run",
        "scores",
        "upgrade",
    },
    "plugin": {
        "case",
        "checkpoints",
        "devices",
        "emulator",
        "judging",
        "languages",
        "locate",
        "reference",
        "report",
        "run",
        "upgrade",
    },
    "__main__": {"commands"},
    "__init__": set(),
}
TOP = {"plugin", "cases"}  # nobody imports these


def sources():
    return [
        path for path in sorted(HARNESS.rglob("*.py")) if "tests" not in path.parts and "benchmarks" not in path.parts
    ]


def imported(path):
    """The parts of the harness that a file imports, by the first name under it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield "a relative import"
            continue
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "cases":
                yield "cases"
            if parts[0] == "harness" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(HARNESS)))
def test_imports_go_one_way(path):
    part = path.relative_to(HARNESS).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{part} has no place in the house: say here what it may import"
    own = {part} if path.parent != HARNESS else set()
    result = set(imported(path))
    if part == "__init__":
        result -= {"errors"}
    assert result <= ALLOWED[part] | LEAVES | own
    assert part in ("__main__",) or not (result - own) & TOP


def test_the_check_sees_a_forbidden_import(tmp_path):
    planted = tmp_path / "compare.py"
    planted.write_text("def late():\n    from harness.plugin import Session\n    import harness.case\n")
    assert set(imported(planted)) == {"plugin", "case"}


def test_torch_is_not_needed_for_help():
    """The command line answers at once because nothing that it imports imports torch."""
    commands = [
        f"commands/{path.stem}" for path in (HARNESS / "commands").glob("*.py") if path.stem != "probe"
    ]  # the work of `calibrate`
    for name in ("__init__", "__main__", *commands, "errors", "versions", "measure/__init__", "measure/comparison"):
        for node in ast.parse((HARNESS / f"{name}.py").read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = getattr(node, "module", "") or ""
            assert not any(text.split(".")[0] in ("torch", "numpy", "pandas") for text in [*names, module])


def test_the_word_of_accuracy_tests_is_theirs_alone():
    """`pytest -k precision` takes every test whose name, file or folder holds the word."""
    for path in sorted((HARNESS / "tests").rglob("*.py")):
        names = [
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        assert not [
            name
            for name in (*names, *path.relative_to(HARNESS).parts)
            if "precision" in name.lower() and name != "precision"
        ], path


def test_the_measurements_of_a_card_run_without_the_harness():
    """The owner of a card may run that file alone."""
    path = HARNESS / "devices" / "measurements.py"
    result = {
        name.split(".")[0] for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in _modules(node)
    }
    assert result <= set(sys.stdlib_module_names) | {"torch", "torch_npu"}


def _modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []
