"""The libraries that checkpoints are of: imported where they are used, with one sentence where they are not there."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from harness.devices import without_broken_npu
from harness.errors import CheckpointError, HarnessError

PERMISSION = "--precision-trust-remote-code (trust_remote_code=True in Python)"
_LONGEST = 300  # characters of what a library says
EXTRA = "pip install 'npu-accuracy-harness[models]'"


def library(name: str, kind: str) -> ModuleType:
    """A library, imported. `kind`: whose checkpoint it is, for the message.

    Raises: CheckpointError where it is not installed, or cannot be imported.
    """
    try:
        with without_broken_npu():
            return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == name:
            text = f"this is a checkpoint of {kind}, and {name} is not installed; {EXTRA}"
        else:
            text = f"this is a checkpoint of {kind}, and {name} cannot be imported ({_line(error)})"
        raise CheckpointError(text) from None
    except RuntimeError as error:  # torchvision beside a torch that it was not built for
        raise CheckpointError(
            f"this is a checkpoint of {kind}, and {name} cannot be imported ({_line(error)}); install the torchvision "
            "that fits this torch, or none"
        ) from None


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever a library raises while it loads something becomes one sentence that names it.

    Raises: CheckpointError.
    """
    try:
        with _without_pickles(), without_broken_npu(), quiet_libraries():
            yield
    except HarnessError:
        raise
    except Exception as error:
        if "torchvision" in str(error).lower() and not _has_torchvision():
            raise CheckpointError(
                f"{what} needs torchvision, which is not installed here or does not fit this torch; install the one "
                "that fits"
            ) from error
        raise CheckpointError(f"{what}: {_advised(_line(error))}") from error


@contextlib.contextmanager
def _without_pickles() -> Iterator[None]:
    """torch.load unpickles nothing but tensors and numbers, also where a library asks for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars and tables of transformers on standard error, and no word of names that one library still takes from
    another: what is wrong is said in one sentence.
    """
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        logging = getattr(sys.modules.get("transformers"), "logging", None)
        if logging is None:
            yield
            return
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """What an exception says, on one line of bounded length."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST].rpartition(' ')[0]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _has_torchvision() -> bool:
    """Whether torchvision can be imported: one that was built for another torch cannot."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


def _advised(text: str) -> str:
    """The text with what to do, where that is known."""
    if "trust_remote_code" in text:
        return f"{text}; read its code, then add {PERMISSION}"
    if "weights_only" in text.lower() or "Weights only" in text:
        return f"{text}; it holds a pickle, which is never read"
    return text


def keys_left_out(kind: str, missing: Any, stored: Any) -> None:
    """Refuse a model of which some weights of a part are in the checkpoint and others are not.

    A part, the first word of a key, of which the checkpoint has nothing at all is a head that it never had: it is drawn
    by seed, and the report says of such weights that they are partly random.

    Raises: CheckpointError, with the weights that are missing.
    """
    parts = {key.partition(".")[0] for key in stored}
    torn = sorted(key for key in missing if key.partition(".")[0] in parts)
    if torn:
        shown = ", ".join(torn[:3]) + (", …" if len(torn) > 3 else "")
        raise CheckpointError(f"{kind} lacks {len(torn)} weights of the model that its config describes: {shown}")


def shapes_that_differ(kind: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse a model of which stored weights have other shapes than its config says: (key, stored, wanted) of each.

    Raises: CheckpointError, with the first of them.
    """
    result = sorted((key, tuple(stored), tuple(wanted)) for key, stored, wanted in mismatched)
    if result:
        key, stored, wanted = result[0]
        raise CheckpointError(
            f"{kind}: {len(result)} weights have other shapes than its config says: {key} is {list(stored)} where "
            f"{list(wanted)} was expected"
        )
