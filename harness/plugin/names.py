"""What accuracy tests, their rows and their dtypes are called."""

from __future__ import annotations

import re

ACCURACY_TEST = "test_precision"
SHORT_DTYPE = {"bfloat16": "bf16"}  # in ids: -k matches substrings, and "float16" is one of "bfloat16"


def dtype_id(dtype: str) -> str:
    """The dtype as test ids say it.

    >>> dtype_id("bfloat16")
    'bf16'
    """
    return SHORT_DTYPE.get(dtype, dtype)


def row_name(case: str, dtype: str, seed: int | None) -> str:
    """A row in words.

    >>> row_name("aimv2-digits", "bfloat16", 42)
    'aimv2-digits bf16 seed 42'
    """
    return f"{case} {dtype_id(dtype)}" + ("" if seed is None else f" seed {seed}")


def is_accuracy_test(nodeid: str) -> bool:
    """Whether a test, by its id, is an accuracy test.

    >>> is_accuracy_test("cases/test_aimv2.py::test_precision[float32-seed42]")
    True
    """
    return re.sub(r"\[.*", "", nodeid, flags=re.DOTALL).rpartition("::")[2] == ACCURACY_TEST


def keyword_of(keyword: str) -> str:
    """The text of `-k` with dtypes as test ids say them."""
    for dtype, short in SHORT_DTYPE.items():
        keyword = re.sub(rf"\b{dtype}\b", short, keyword)
    return keyword
