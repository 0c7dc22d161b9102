"""The stack: what changes numbers is recorded where it is set, stands in the difference that gate prints, and names
the card that ran.
"""

import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from harness import open_device
from harness.commands.main import main
from harness.devices import cards, npu, stack
from harness.devices.kind import uuid_of
from harness.devices.stack import ENVIRONMENT, Stack
from harness.report import build, write
from harness.report.format import NO_VALUE
from harness.tests.needs import emulated_device
from harness.tests.test_upgrade import measured
from harness.upgrade.transitions import EFFECTS, compare_reports


@pytest.fixture(scope="module")
def emulated():
    return emulated_device()


def gate(tmp_path, capsys, before, after):
    """What `gate` prints of two reports with the same rows and these stacks."""
    paths = [
        str(write(build([measured(1)], stack=item, backend="npu"), tmp_path / str(number))[0])
        for number, item in enumerate((before, after))
    ]
    assert main(["gate", *paths]) == 0
    return capsys.readouterr().out


# -------- what is
# recorded


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_every_variable_that_changes_numbers_is_in_the_stack_and_in_the_difference(monkeypatch, tmp_path, capsys, name):
    monkeypatch.delenv(name, raising=False)
    before = open_device("cpu").stack
    monkeypatch.setenv(name, "1")
    after = open_device("cpu").stack
    assert name not in before.environment and after.environment[name] == "1"
    out = gate(tmp_path, capsys, before.to_dict(), after.to_dict())
    row = next(line for line in out.splitlines() if f"environment.{name}" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [f"environment.{name}", NO_VALUE, "1"]
    said = EFFECTS.get(f"environment.{name}")
    assert said is None or f"environment.{name}: {said}" in out


OPTIONS = {
    "CUBE_MATH_TYPE": ("3", "cube_math_type", 3),
    "ACL_PRECISION_MODE": ("allow_fp32_to_fp16", "precision_mode", "allow_fp32_to_fp16"),
    "ACL_OP_COMPILER_CACHE_MODE": ("force", "compile_cache", "force in its default folder"),
}


@pytest.mark.parametrize("option", OPTIONS, ids=["products", "operands", "compiled operators"])
def test_every_option_of_torch_npu_that_changes_numbers_is_in_the_stack_and_in_the_difference(
    emulated, monkeypatch, tmp_path, capsys, option
):
    import torch_npu

    value, field, shown = OPTIONS[option]
    real, set_to = torch_npu._C._npu_getOption, {option: None}  # a test before this one may have set it in this process
    monkeypatch.setattr(torch_npu._C, "_npu_getOption", lambda name: set_to[name] if name in set_to else real(name))
    before = emulated.stack
    set_to[option] = value.encode()
    after = emulated.stack
    assert getattr(before, field) is None and getattr(after, field) == shown
    out = gate(tmp_path, capsys, before.to_dict(), after.to_dict())
    assert f"{field}: {EFFECTS[field]}" in out and str(shown) in out


def test_the_options_are_read_where_torch_npu_sets_them(emulated):
    """Set in a process of its own, since torch_npu has no way back to an option that is not set."""
    code = (
        "import harness; device = harness.open_device('emulated'); import torch\n"
        "from torch_npu.npu.npu_config import _CubeMathType\n"
        "torch.npu.matmul.cube_math_type = _CubeMathType.USE_HF32\n"
        "torch.npu.set_option({'ACL_PRECISION_MODE': 'must_keep_origin_dtype'})\n"
        "torch.npu.set_deterministic_level(1)\n"
        "stack = device.stack; print(stack.cube_math_type, stack.precision_mode, stack.inf_nan_mode, "
        "stack.deterministic_level)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"INF_NAN_MODE_FORCE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["3", "must_keep_origin_dtype", "False", "1"], done.stderr


def test_model_code_counts_where_it_was_imported(monkeypatch):
    for name in stack.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert open_device("cpu").stack.packages == {}
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="4.57.1"))
    assert open_device("cpu").stack.packages == {"transformers": "4.57.1"}


def test_torchs_own_choice_and_the_harness_are_recorded(monkeypatch):
    result = open_device("cpu").stack
    assert result.float32_matmul_precision == torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert open_device("cpu").stack.float32_matmul_precision == "medium"
    monkeypatch.setattr(sys.modules["harness"], "__version__", "9.9", raising=False)
    assert open_device("cpu").stack.harness == "9.9"


# -------- older
# reports


def test_an_older_stack_is_read_and_a_newer_one_too():
    old = {"device": "Ascend910B4", "backend": "npu", "torch_npu": "2.9.0", "faults": []}
    read = Stack.from_dict(old)
    assert (
        read.torch_npu == "2.9.0"
        and read.cube_math_type is None
        and read.card is None
        and read.packages == {}
        and read.faults == ()
    )
    assert Stack.from_dict(old | {"a_later_field": 1}) == read
    now = open_device("cpu").stack
    assert Stack.from_dict(now.to_dict()) == now


def test_a_report_of_before_the_fields_does_not_claim_that_they_changed():
    rows = [measured(1)]
    old = {"device": "a", "torch_npu": "2.9.0", "environment": {}}
    new = old | {
        "cube_math_type": 3,
        "precision_mode": None,
        "packages": {},
        "environment": {"CLOSE_MATMUL_K_SHIFT": "1"},
    }
    upgrade = compare_reports(build(rows, stack=old, backend="npu"), build(rows, stack=new, backend="npu"))
    assert upgrade.stack == (("environment.CLOSE_MATMUL_K_SHIFT", None, "1"), ("cube_math_type", "not recorded", 3))
    newer = new | {"packages": {"timm": "1.0"}}
    assert compare_reports(build(rows, stack=old, backend="npu"), build(rows, stack=newer, backend="npu")).stack[
        -1
    ] == ("packages.timm", "not recorded", "1.0")
    assert compare_reports(build(rows, stack=new, backend="npu"), build(rows, stack=newer, backend="npu")).stack == (
        ("packages.timm", None, "1.0"),
    )


# -------- the
# card

# Columns and spacing of `npu-smi info -m` and `-t board` as driver releases 23 to 25 print them; numbers and serials
# are made up.
A2 = """\
	NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
	0                              0                              0                              Ascend 910B3
	0                              1                              -                              Mcu
	1                              0                              1                              Ascend 910B3
	1                              1                              -                              Mcu
	2                              0                              2                              Ascend 910B3
	2                              1                              -                              Mcu
"""
A3 = """\
	NPU ID                         Chip ID                        Chip Logic ID                  Chip Phy-ID                    Chip Name
	0                              0                              0                              0                              Ascend910
	0                              1                              1                              1                              Ascend910
	0                              2                              -                              -                              Mcu
	1                              0                              2                              2                              Ascend910
	1                              1                              3                              3                              Ascend910
	1                              2                              -                              -                              Mcu
"""  # noqa: E501
CONTAINER = """\
	NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
	5                              0                              0                              Ascend 910B4
	5                              1                              -                              Mcu
	7                              0                              1                              Ascend 910B4
	7                              1                              -                              Mcu
"""
A5 = """\
	NPU ID                         Chip ID                        Slot ID                        Chip Phy-ID                    Chip Name
	0                              0                              1                              0                              Ascend950PR
"""  # noqa: E501
CARD = """\
	NPU ID                         : {npu}
	Product Name                   : NA
	Serial Number                  : SN{npu}
	Software Version               : 25.0.rc1
	Firmware Version               : 7.7.0.1.231
	Compatibility                  : OK
	PCIe Bus Info                  : 0000:C1:00.0
	Chip Count                     : 1
"""
CHIP = """\
	NPU ID                         : {npu}
	Chip ID                        : {chip}
	Chip Type                      : Ascend
	Chip Name                      : 910B4
	VDie ID                        : 42C711D4 20B03704 4A10C8D4 14CC040A D210200{chip}
	NDie ID                        : NA
	Firmware Version               : 7.7.{npu}.{chip}.231
"""


def smi(mapping):
    """What npu-smi answers on a machine with this mapping; cards that are not in it are refused."""
    there = {tuple(line.split()[:2]) for line in mapping.splitlines()[1:]}

    def ask(*words):
        if words == ("info", "-m"):
            return mapping
        npu, chip = words[4], words[6] if len(words) > 6 else "0"
        if (npu, chip) not in there:
            return None
        return (CHIP if len(words) > 6 else CARD).format(npu=npu, chip=chip)

    return ask


@pytest.mark.parametrize(
    ("mapping", "index", "visible", "npu", "chip"),
    [
        (A2, 0, None, 0, 0), (A2, 2, None, 2, 0), (A2, 0, "2,0", 2, 0), (A2, 1, "2,0", 0, 0), (A2, 1, " 2 , 1", 1, 0),
        (A3, 1, None, 0, 1), (A3, 3, None, 1, 1), (A3, 0, "3", 1, 1),
        (CONTAINER, 0, None, 5, 0), (CONTAINER, 1, None, 7, 0), (CONTAINER, 0, "1", 7, 0),
        (A5, 0, None, 0, 0),
    ],
)  # fmt: skip
def test_the_card_of_an_index_is_the_one_that_torch_sees(mapping, index, visible, npu, chip):
    environment = {} if visible is None else {cards.VISIBLE: visible}
    result = cards.read_card(index, smi(mapping), environment)
    assert (result.npu, result.chip, result.serial) == (npu, chip, f"SN{npu}")
    assert result.firmware == f"7.7.{npu}.{chip}.231"  # of this chip, not of the one whose number is torch's index
    assert (
        str(result) == f"NPU {npu} chip {chip}, serial SN{npu}, die 42C711D4-20B03704-4A10C8D4-14CC040A-D210200{chip}"
    )


@pytest.mark.parametrize(
    ("mapping", "index", "visible"),
    [
        (A2, 3, None),
        (A2, 2, "0,1"),
        (A2, 0, ""),
        (A2, 0, "x"),
        (A5 + A5.splitlines()[1].replace("0", "1", 1) + "\n", 0, None),
        ("", 0, None),
        ("dcmi model initialized failed\n", 0, None),
    ],
)
def test_a_card_that_npu_smi_does_not_name_is_unknown(mapping, index, visible):
    environment = {} if visible is None else {cards.VISIBLE: visible}
    assert cards.read_card(index, smi(mapping), environment) is None


def test_a_card_without_the_right_to_ask_for_its_board_is_named_by_its_numbers():
    result = cards.read_card(1, lambda *words: A3 if words == ("info", "-m") else None, {})
    assert str(result) == "NPU 0 chip 1" and result.firmware is None


def test_without_npu_smi_nothing_is_started(monkeypatch):
    monkeypatch.setattr(cards.shutil, "which", lambda name: None)
    monkeypatch.setattr(cards.subprocess, "run", lambda *words, **how: pytest.fail("npu-smi was started"))
    assert cards.read_card(0, cards.Smi(), {}) is None


def test_an_npu_smi_that_hangs_is_waited_for_once(monkeypatch):
    asked = []

    def run(words, timeout, **how):
        asked.append(timeout)
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(cards.shutil, "which", lambda name: "/usr/local/bin/npu-smi")
    monkeypatch.setattr(cards.subprocess, "run", run)
    ask = cards.Smi()
    assert ask("info", "-m") is None and ask("info", "-t", "board", "-i", "0") is None
    assert asked == [cards.TIMEOUT] and cards.TIMEOUT <= 5


def test_npu_smi_is_asked_about_the_whole_machine(monkeypatch, tmp_path):
    """It may follow ASCEND_RT_VISIBLE_DEVICES itself: then the numbers would be mapped twice."""
    program = tmp_path / "npu-smi"
    program.write_text('#!/bin/sh\necho "visible: ${ASCEND_RT_VISIBLE_DEVICES-unset}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3")
    assert cards.Smi()("info", "-m") == "visible: unset\n"


def test_a_cards_stack_names_it_and_the_gate_shows_another(monkeypatch, emulated, tmp_path, capsys):
    monkeypatch.setattr(npu, "this_card", lambda index: cards.read_card(index, smi(A3), {cards.VISIBLE: "3"}))
    result = replace(emulated, backend="npu").stack
    assert result.card.startswith("NPU 1 chip 1, serial SN1, die ") and result.firmware == "7.7.1.1.231"
    other = result.to_dict() | {"card": "NPU 0 chip 0, serial SN0"}
    assert "card: another piece of hardware" in gate(tmp_path, capsys, result.to_dict(), other)
    assert emulated.stack.card is None  # nothing emulated has a card


@pytest.mark.parametrize(
    ("uuid", "said"),
    [
        ("00000000-0000-0000-0000-000000000000", None),
        ("8f6d1a2b-0000-0000-0000-000000000001", "UUID 8f6d1a2b-0000-0000-0000-000000000001"),
    ],
)
def test_a_card_without_npu_smi_is_named_by_its_uuid(uuid, said):
    owner = types.SimpleNamespace(get_device_properties=lambda index: types.SimpleNamespace(uuid=uuid))
    assert uuid_of(owner, 0) == said
    assert uuid_of(types.SimpleNamespace(), 0) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6348 CPU @ 2.60GHz\n",
            "Intel(R) Xeon(R) Gold 6348 CPU @ 2.60GHz",
        ),
        (
            "processor\t: 0\nCPU implementer\t: 0x48\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd01\n",
            "Kunpeng 920 (implementer 0x48, part 0xd01)",
        ),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "Neoverse V1 (implementer 0x41, part 0xd40)"),
        ("CPU implementer\t: 0x48\nCPU part\t: 0xd03\n", "aarch64 (implementer 0x48, part 0xd03)"),
    ],
)
def test_the_cpu_has_a_name_on_arm_too(text, name):
    assert stack.name_of_cpu(text) == name


def test_the_stack_says_which_instructions_torch_takes():
    """The bits of the CPU's side hang on them."""
    assert open_device("cpu").stack.cpu_capability == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("owners", [("npu",), ("top",), ("npu", "top"), ()])
def test_cann_says_its_version_in_every_torch_npu(monkeypatch, owners):
    """torch_npu 2.5 and 2.6 have get_cann_version in npu.utils alone."""
    says = types.SimpleNamespace(get_cann_version=lambda: "8.2.RC1")
    nothing = types.SimpleNamespace()
    fake = types.SimpleNamespace(
        npu=types.SimpleNamespace(utils=says if "npu" in owners else nothing),
        utils=says if "top" in owners else nothing,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    assert npu.cann_version() == ("8.2.RC1" if owners else None)
