"""The emulated device refuses the dtypes that CANN's operators refuse, in CANN's words, and takes the others."""

import pytest
import torch

from harness.emulator import known_dtypes, soc
from harness.emulator.operators import OPERATORS
from harness.tests.operators.conftest import seeded

REFUSED = {  # of float64 inputs; by the operators' pages and checks; the first two stopped rotary tables on every card
    "repeat_interleave of float64 along an axis": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave of float64": lambda x: x.flatten().repeat_interleave(2),
    "indexing of complex64": lambda x: torch.complex(x.float(), x.float())[torch.tensor([1, 0], device=x.device)],
    "roll of float64": lambda x: x.roll(1),
    "std of float64": lambda x: x.std(),
}
TAKEN = {
    "repeat_interleave": lambda x: x.float().repeat_interleave(2, dim=1),
    "indexing of float64": lambda x: x[torch.tensor([1, 0], device=x.device)],
    "sums of float64": lambda x: x + x,
    "cos of float64": lambda x: x.cos(),
    "products of complex64": lambda x: torch.view_as_real(
        torch.complex(x.float(), x.float()) * torch.complex(x.float(), x.float())
    ),
    "softmax of float64": lambda x: x.softmax(-1),
    "cumsum of bool": lambda x: (x > 0).cumsum(-1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cann_refuses_is_refused_in_its_words(npu, name):
    with pytest.raises(
        RuntimeError,
        match=(
            r"error code is 161002[\s\S]*not implemented for DT_(DOUBLE|COMPLEX64), "
            r"should be in dtype support list \[DT_"
        ),
    ):
        REFUSED[name](seeded(2, 4).double().to(npu)).cpu()


@pytest.mark.parametrize("name", TAKEN)
def test_what_cann_takes_runs(npu, name):
    x = seeded(2, 4).double()
    torch.testing.assert_close(TAKEN[name](x.to(npu)).cpu(), TAKEN[name](x))


def test_every_line_has_its_source_and_an_operator():
    lines = known_dtypes.known_lines()
    assert len(lines) > 500 and set(lines) <= set(OPERATORS)
    for line in lines.values():
        assert line.dtypes and line.dtypes <= set(known_dtypes.CODES), line
        assert line.repository.startswith("https://gitcode.com/cann/") and len(line.commit) == 12, line
        page, check = line.files.split(" ")
        assert page.endswith(".md") and check.endswith(".cpp"), line


def test_an_operator_without_a_line_and_a_newer_chip_are_left_alone(monkeypatch):
    strange = {torch.complex128, torch.float64, torch.uint64}
    assert known_dtypes.refusal("aclnnNoSuchOperator", strange) is None
    assert "DT_DOUBLE" in soc.soc_refusal("aclnnRepeatInterleaveInt", {torch.float64})
    monkeypatch.setattr(soc, "_played", [("Ascend950PR_9599", soc.family_of("Ascend950PR_9599"), lambda: False)])
    assert soc.soc_refusal("aclnnRepeatInterleaveInt", {torch.float64}) is None


def test_lists_are_read_from_pages_and_checks():
    from harness.conformance.dtypes import checked, documented

    source = """static const std::initializer_list<op::DataType> LIST_910B = {
        op::DataType::DT_FLOAT, op::DataType::DT_BF16, DataType::DT_INT64};
    static const std::initializer_list<DataType> LIST_REGBASE = {DataType::DT_COMPLEX64};"""
    assert checked(source) == {"FLOAT", "BF16", "INT64"} and checked("no list") == set()
    page = (
        "- **参数说明**\n<td>FLOAT、FLOAT16、BFLOAT16、DOUBLE、COMPLEX64</td>\n- <term>Atlas A2 "
        "训练系列产品</term>：不支持COMPLEX64。\n- **返回值** INT8"
    )
    assert documented(page) == {"FLOAT", "FLOAT16", "BF16", "DOUBLE"}
