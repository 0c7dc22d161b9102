"""`module:function`: a Case of one's own, where no checkpoint directory can say it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Any

from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised
from harness.errors import CheckpointError


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """One: the Case that the function returns."""
    return ("forward",)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The fields of the Case that the function returns, without its name and its dtype.

    Raises: CheckpointError where there is no such function, or it returns something else.
    """
    module, _, name = str(recognised.path).rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{recognised.path}: no module {error.name} is here; start in its folder") from None
    except AttributeError:
        raise CheckpointError(f"{recognised.path}: the module {module} has no {name}") from None
    case = function()
    names = {field.name for field in dataclasses.fields(case)} if dataclasses.is_dataclass(case) else set()
    if not {"model", "inputs"} <= names:
        raise CheckpointError(f"{recognised.path} returned a {type(case).__name__} where a harness.Case was expected")
    left_out = ("name", "dtype")
    return {item: getattr(case, item) for item in names if item not in left_out}
