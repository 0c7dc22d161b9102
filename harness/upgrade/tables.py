"""TOML files that a user writes: read, and held to the keys that are known."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there


def read_toml(path: Path, absent: str) -> dict[str, Any]:
    """What a file holds. `absent` says what to do where there is none.

    Raises: HarnessError when there is no file, or it is not TOML.
    """
    try:
        result: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HarnessError(absent) from None
    except (ValueError, RecursionError) as error:
        raise HarnessError(f"{path} is not TOML ({error}); correct it") from None
    return result


def only_known(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises: HarnessError when an entry holds keys that are not known."""
    unknown = [name for name in entry if name not in known]
    if unknown:
        raise HarnessError(f"{where} holds {', '.join(map(repr, unknown))}; what is known there is {', '.join(known)}")
