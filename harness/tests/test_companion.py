"""A case in half dtypes alone gets one row in float32, where errors show that half roundings hide."""

import pytest

from harness.tests.needs import skip_without_torch_npu
from harness.tests.test_plugin import CASE, stored, torch_npu_is_imported, user, write  # noqa: F401

ROWS = (
    CASE
    + """
class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.by = torch.nn.Linear(16, 512), BY

    def forward(self, x):
        y = self.first(x)
        return y if y.device.type == "cpu" else y * self.by

DTYPES = %s

@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16" if each == "bfloat16" else each for each in DTYPES])
@pytest.mark.parametrize("seed", [1, 2], ids=lambda seed: f"seed{seed}")
def test_precision(precision, seed, dtype):
    precision(case(model=Scaled, tolerance=Tolerance(preset="floor"), dtype=dtype), seed)
"""
)


@pytest.fixture
def run(user):
    """Runs cases of these dtypes, on the emulated device, wrong by a factor `by`; gives the exit status, the rows and
    the output.
    """
    skip_without_torch_npu()

    def run_(dtypes, *more, by=1.0):
        write(user, (ROWS % dtypes).replace("BY", str(by)))
        result = user.runpytest_inprocess("--device", "emulated", "--locate", "off", "--baseline", "off", *more)
        return result.ret, stored(user)["rows"], result.stdout.str()

    return run_


def named(rows):
    return [(row["dtype"], row["seed"], row["status"], "COMPANION" in row["marks"]) for row in rows]


def test_an_error_below_two_floors_of_bfloat16_fails_in_float32(run):
    status, rows, said = run(["bfloat16"], by=1.0005)
    assert status == 1
    assert named(rows) == [("bfloat16", 1, "PASS", False), ("float32", 1, "FAIL", True), ("bfloat16", 2, "PASS", False)]
    assert "FAIL small float32 seed 1 (companion row)" in said


def test_the_reasons_of_both_rows_are_shown_where_both_fail(run):
    status, rows, said = run(["bfloat16"], by=1.5)
    assert status == 1 and named(rows)[:2] == [("bfloat16", 1, "FAIL", False), ("float32", 1, "FAIL", True)]
    shown = said.partition("FAIL small float32 seed 1 (companion row)")
    assert "FAIL small bfloat16 seed 1" in shown[0] and rows[1]["reasons"][0] in shown[2].partition("\nFAILED")[0]


def test_a_sound_case_passes_with_one_row_more(run):
    status, rows, _ = run(["bfloat16", "float16"])
    assert status == 0
    assert named(rows) == [
        ("bfloat16", 1, "PASS", False),
        ("float32", 1, "PASS", True),
        ("float16", 1, "PASS", False),
        ("bfloat16", 2, "PASS", False),
        ("float16", 2, "PASS", False),
    ]


@pytest.mark.parametrize(
    ("dtypes", "more"),
    [
        (["float32", "float16"], ()),
        (["float32", "float16"], ("-k", "float16 and seed1")),
        (["float16"], ("--companion", "off")),
    ],
    ids=["has float32", "float32 deselected", "switched off"],
)
def test_no_row_is_added(run, dtypes, more):
    status, rows, _ = run(dtypes, *more)
    assert status == 0 and not any(companion for *_, companion in named(rows))


def test_workers_bring_one(run):
    status, rows, _ = run(["bfloat16"], "-n", "2", "--dist", "load")
    assert status == 0
    assert [item for item in named(rows) if item[3]] == [("float32", 1, "PASS", True)]


def test_a_float32_row_of_the_case_by_another_test_stands_alone(user):
    write(
        user,
        CASE
        + """
def test_precision(precision):
    for dtype in ("float16", "float32"):
        precision(case(dtype=dtype, tolerance=Tolerance(preset="card")), 1)
""",
    )
    assert user.runpytest_inprocess("--device", "cpu", "--locate", "off").ret == 0
    assert [(row["dtype"], row["marks"]) for row in stored(user)["rows"]] == [
        ("float16", ["NEW"]),
        ("float32", ["NEW"]),
    ]


def test_what_cannot_run_in_float32_is_skipped_and_says_what_is_not_seen(user):
    model = """
class HalfOnly(torch.nn.Linear):
    def __init__(self):
        super().__init__(16, 4)

    def forward(self, x):
        if x.dtype == torch.float32:
            raise NotImplementedError("a kernel of half numbers")
        return super().forward(x)

def test_precision(precision):
    precision(case(model=HalfOnly, dtype="float16", tolerance=Tolerance(preset="card")), 1)
"""
    write(user, CASE + model)
    assert user.runpytest_inprocess("--device", "cpu", "--locate", "off").ret == 0
    half, single = stored(user)["rows"]
    assert (half["status"], single["status"], single["dtype"]) == ("PASS", "SKIPPED", "float32")
    (reason,) = single["reasons"]
    assert "a kernel of half numbers" in reason
    assert (
        "a logic error that moves the output by less than two floors of float16 cannot be seen in this case" in reason
    )


def test_a_case_may_do_without(user):
    write(user, CASE + "\ndef test_precision(precision):\n    precision(case(dtype='float16', companion=False), 1)\n")
    assert user.runpytest_inprocess("--device", "cpu", "--locate", "off").ret == 0
    assert [row["dtype"] for row in stored(user)["rows"]] == ["float16"]
