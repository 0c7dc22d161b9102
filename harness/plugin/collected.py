"""The accuracy tests that a run collected: what is known of each, and which of them run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import pytest

from harness.plugin.checkpoints import run_of
from harness.plugin.fixtures import uses_fixture
from harness.plugin.names import SHORT_DTYPE, is_accuracy_test

NEAREST = 5  # names that a message lists in place of all


def known_of(item: pytest.Item) -> dict:
    """Case, dtype and seed of a collected test, from its parameters."""
    run = run_of(item)
    if run is not None:
        return {"case": run.case_name, "dtype": run.dtype, "seed": run.seed}
    case = case_of(item)
    if case is None:
        return guessed(item.nodeid)
    seed = _parameters(item).get("seed")
    return {"case": case.name, "dtype": case.dtype, "seed": seed if type(seed) is int and 0 <= seed < 2**63 else None}


def case_of(item: pytest.Item) -> Any:
    """The case among the parameters of a test; None where there is none."""
    from harness.case import Case

    return next((value for value in _parameters(item).values() if isinstance(value, Case)), None)


def _parameters(item: pytest.Item) -> Mapping[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def function_of(item: pytest.Item) -> str:
    """The test function of a test, whatever its parameters: its id without them."""
    return item.nodeid.partition("[")[0]


def cases_of(item: pytest.Item, known: dict) -> set[str]:
    """The names of the cases that a test may run: its own, or where it says none those that its module holds."""
    from harness.case import Case

    if known["case"] != item.nodeid.partition("::")[0]:
        return {known["case"]}
    return {value.name for value in vars(item.module).values() if isinstance(value, Case)} or {known["case"]}


def guessed(nodeid: str) -> dict:
    """The same from the test's id, where a worker holds the parameters."""
    identity = nodeid.partition("[")[2].removesuffix("]")
    names = {short: dtype for dtype, short in SHORT_DTYPE.items()} | {"float32": "float32", "float16": "float16"}
    dtype = next((dtype for short, dtype in names.items() if short in identity), None)
    seed = re.search(r"seed(\d+)", identity)
    return {"case": nodeid.partition("::")[0], "dtype": dtype, "seed": int(seed[1]) if seed else None}


def choose_shard(config: pytest.Config, shard: str, seconds: Mapping[str, float], items: list[pytest.Item]) -> None:
    """With --precision-shard, the accuracy tests of that part alone, and all others; `seconds` as of `parts`."""
    from harness.plugin.shards import parse_shard, parts

    number, count = parse_shard(shard)
    groups: dict[str, list[str]] = {}
    for item in items:
        if is_accuracy_test(item.nodeid) or uses_fixture(item):
            known = known_of(item)
            groups.setdefault(f"{function_of(item)} {known['case']} {known['dtype']}", []).append(item.nodeid)
    shares = parts(groups, seconds, count)
    chosen = set(shares.pop(number - 1))
    left_out = {nodeid for share in shares for nodeid in share} - chosen
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def choose_located(config: pytest.Config, options: Any, items: list[pytest.Item]) -> None:
    """With --precision-locate-case, the accuracy tests of that case alone."""
    wanted, seed = options.locate_case, options.locate_seed
    if wanted is None:
        return
    known = {id(item): known_of(item) for item in items if is_accuracy_test(item.nodeid)}
    cases = {id(item): cases_of(item, known[id(item)]) for item in items if id(item) in known}
    named = any(wanted in case for case in cases.values())
    chosen = [
        item for item in items if id(item) in known and (wanted in cases[id(item)] if named else wanted in item.nodeid)
    ]
    chosen = [item for item in chosen if seed is None or known[id(item)]["seed"] == seed]
    if not chosen:
        names = sorted(set().union(*cases.values()))
        nearest = get_close_matches(wanted, names, n=NEAREST, cutoff=0.0)
        told = f"of {len(names)} cases the nearest are {', '.join(nearest)}" if nearest else "there are none"
        raise pytest.UsageError(
            f"no accuracy test is of the case {wanted!r}, or has it in its "
            f"id{'' if seed is None else f', with seed {seed}'}; {told}"
        )
    there = {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in there])
    items[:] = chosen
