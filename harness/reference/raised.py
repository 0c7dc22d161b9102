"""Where in a model an exception was raised: the module, the operator and the line of the model's code."""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

HARNESS = str(Path(__file__).parents[1])
MODELS = tuple(f"{HARNESS}/{item}/" for item in ("models", "tests", "conformance", "benchmarks"))  # the code of models
TORCH = str(Path(torch.__file__).parent)
PYTHON = str(Path(ast.__file__).parent) + "/"  # the standard library, without what is installed beside it
CALLERS = tuple(  # files of torch that call an operator for another, which is the one to name
    f"{TORCH}/{item}"
    for item in (
        "_ops.py",
        "_compile.py",
        "_jit_internal.py",
        "_dynamo/",
        "_library/",
        "utils/",
        "overrides.py",
        "nn/modules/module.py",
        "autograd/graph.py",
    )
)
SIGNS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor", ast.USub: "neg",
    ast.Invert: "invert", ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
}  # fmt: skip


def location_of(error: BaseException, model: nn.Module) -> str:
    """The module, operator and line at which `model` raised, "blocks.3.attn: softmax (vit.py:12)"; "" where it did not.

    The operator is the torch function that the innermost line calls. It is left out where that line raises by itself,
    and where Python 3.10 or older does not tell which of several calls on a line raised.
    """
    steps = list(_steps(error))
    if not steps:
        return ""
    names = {id(module): name for name, module in model.named_modules()}
    path = ""
    for frame, _, _ in steps:
        path = names.get(id(frame.f_locals.get("self")), path)
    lines = [(frame, line) for frame, _, line in steps if is_of_a_model(frame.f_code.co_filename)]
    line_text = f" ({Path(lines[-1][0].f_code.co_filename).name}:{lines[-1][1]})" if lines else ""
    operator = _operator(steps)
    if not operator and not lines:
        return ""
    return f"{path or 'the model'}" + (f": {operator}" if operator else "") + line_text


def is_of_a_model(file: str) -> bool:
    """Whether a file may hold a model's code: not torch's or torch_npu's, not the harness's but for its own models."""
    if file.startswith("<") or (file.startswith(f"{HARNESS}/") and not file.startswith(MODELS)):
        return False
    return not file.startswith((TORCH, _torch_npu())) and not _is_pythons(file)


def _is_pythons(file: str) -> bool:
    return file.startswith(PYTHON) and not file.startswith(f"{PYTHON}site-packages/")


def _torch_npu() -> str:
    file = getattr(sys.modules.get("torch_npu"), "__file__", None)
    return str(Path(file).parent) if file else TORCH


def _steps(error: BaseException) -> list[tuple[FrameType, int, int]]:
    """The frames below the caller of the model, outermost first, with the instruction and the line of each."""
    result, step = [], error.__traceback__
    step = step.tb_next if step is not None else None
    while step is not None:
        result.append((step.tb_frame, step.tb_lasti, step.tb_lineno))
        step = step.tb_next
    return result


def _operator(steps: list[tuple[FrameType, int, int]]) -> str:
    """What the innermost frame calls that is torch's or the model's; "" where it raises by itself."""
    for frame, instruction, line in reversed(steps):
        file = frame.f_code.co_filename
        ours = file.startswith(f"{HARNESS}/") and not file.startswith(MODELS)
        if file.startswith(CALLERS) or ours or _is_pythons(file):
            continue
        name, raises = _called(frame.f_code, instruction, line)
        if not raises or is_of_a_model(file):
            return name
    return ""


def _called(code: CodeType, instruction: int, line: int) -> tuple[str, bool]:
    """The name of what an instruction calls, "" where it is not known, and whether its line is a `raise`."""
    if dis.opname[code.co_code[instruction]].startswith("STORE_SUBSCR"):
        return "setitem", False
    source = linecache.getline(code.co_filename, line).strip()
    if source.startswith("raise"):
        return "", True
    node = _expression(code, instruction)
    if node is not None:
        return _name(node), False
    calls = _calls(source)
    return calls[0] if len(calls) == 1 else "", False


def _expression(code: CodeType, instruction: int) -> ast.expr | None:
    """The expression that an instruction stands for, from Python 3.11 on."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return None
    first, last, begin, end = list(positions())[instruction // 2]
    if None in (first, last, begin, end):
        return None
    lines = [linecache.getline(code.co_filename, number).encode() for number in range(first, last + 1)]
    if not all(lines):
        return None
    lines[-1] = lines[-1][:end]
    text = b"".join([lines[0][begin:], *lines[1:]]).decode()
    return _parsed(f"({text})")


def _parsed(text: str) -> Any:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        pass
    try:  # an assignment such as x += y
        return ast.parse(text[1:-1]).body[0]
    except (SyntaxError, ValueError, IndexError):
        return None


def _name(node: Any) -> str:
    """How an operator of that kind is named: "linear" of F.linear(…), "add" of a + b, "getitem" of x[…]."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", ""))
    if isinstance(node, ast.AugAssign):
        return f"{SIGNS.get(type(node.op), '')}_"
    if isinstance(node, (ast.BinOp, ast.UnaryOp)):
        return SIGNS.get(type(node.op), "")
    if isinstance(node, ast.Compare):
        return SIGNS.get(type(node.ops[0]), "")
    if isinstance(node, ast.Subscript):
        return "getitem"
    return node.attr if isinstance(node, ast.Attribute) else ""


def _calls(source: str) -> list[str]:
    """The names of what a line calls; none of a line that is no statement by itself."""
    tree = _parsed(f"({source.removeprefix('return ')})")
    if tree is None:
        return []
    kinds = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.AugAssign)
    return [_name(node) for node in ast.walk(tree) if isinstance(node, kinds)]
