"""Faults on demand: each kind acts where it was asked to, as it was asked to, and nowhere else."""

import math
import signal
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from harness import emulator
from harness.emulator import faults
from harness.numerics import effective_bits, round_hf32
from harness.tests.execute import emulated
from harness.tests.needs import emulated_device, needs_torch_npu
from harness.tests.operators.conftest import seeded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def npu():
    return emulated_device().torch_device


X = seeded(2, 4, 8, 16)


def changed(result, clean):
    """The positions that differ, as a boolean tensor; NaN differs."""
    return (result != clean) | (result.isnan() != clean.isnan())


def block(rows=slice(None), columns=slice(None), heads=slice(None), batch=slice(None)):
    where = torch.zeros(2, 4, 8, 16, dtype=torch.bool)
    where[batch, heads, rows, columns] = True
    return where


ELEMENT = torch.zeros(2 * 4 * 8 * 16, dtype=torch.bool).index_fill(0, torch.tensor(37), True).view(2, 4, 8, 16)
RESULTS = {  # kind: settings, where it shows, what the result is there
    "scale": ({"by": 1.5}, block(), lambda y: y * 1.5),
    "offset": ({"by": 0.25}, block(), lambda y: y + 0.25),
    "noise": ({"by": 1e-2}, block(), None),
    "tile": ({"at": 2, "size": 3}, block(slice(2, 5), slice(2, 5), 0, 0), lambda y: y * 0),
    "tail": ({"size": 5}, block(7, slice(11, 16), 3, 1), lambda y: y * 0),
    "swap_rows": ({"at": 1}, block(slice(1, 3), heads=0, batch=0), lambda y: y[..., [0, 2, 1, *range(3, 8)], :]),
    "zero_rows": ({"at": 1}, block(1, heads=0, batch=0), lambda y: y * 0),
    "swap_heads": ({"at": 1}, block(heads=slice(1, 3)), lambda y: y[:, [0, 2, 1, 3]]),
    "zero_heads": ({"at": 3}, block(heads=3), lambda y: y * 0),
    "copy_heads": ({"at": 2}, block(heads=2), None),
    "half_rows": ({"by": 1.5}, block(batch=1), lambda y: y * 1.5),
    "channel": ({"at": 3, "by": 1.5}, block(heads=3), lambda y: y * 1.5),
    "nan": ({"at": 37}, ELEMENT, lambda y: y * math.nan),
    "inf": ({"at": 37}, ELEMENT, lambda y: y * 0 + math.inf),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_fault_of_the_result_shows_there_and_nowhere_else(npu, kind):
    settings, where, meaning = RESULTS[kind]
    x = X.to(npu)
    clean = F.silu(x).cpu()
    with emulator.fault("aclnnSilu", kind=kind, **settings) as planted:
        result, other = F.silu(x).cpu(), (x * 2).cpu()
    assert planted.hits == planted.calls == 1
    if kind == "copy_heads":
        assert torch.equal(result[:, 2], clean[:, 3]) and torch.equal(changed(result, clean), where)
    elif meaning is None:  # noise in every element; a few can be below half the spacing of numbers there
        assert changed(result, clean).sum() >= clean.numel() - 5
    else:
        assert torch.equal(changed(result, clean), where)
        torch.testing.assert_close(result[where], meaning(clean)[where], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(other, X * 2) and torch.equal(F.silu(x).cpu(), clean)


def test_noise_differs_from_run_to_run_and_has_its_size(npu):
    x = X.to(npu)
    clean = F.silu(x).cpu()
    with emulator.fault("aclnnSilu", kind="noise", by=1e-3):
        first, second = F.silu(x).cpu(), F.silu(x).cpu()
    assert not torch.equal(first, second)
    assert 9 < effective_bits(first, clean.double()) < 11


def test_saturation_cuts_what_float16_cannot_hold(npu):
    x = torch.tensor([1.0, 7e4, -7e4, math.inf, math.nan]).to(npu)
    with emulator.fault("aclnnMuls", kind="saturate") as planted:
        result = (x * 1.0).cpu()
    assert result.tolist() == [1.0, 65504.0, -65504.0, 65504.0, 0.0] and planted.hits == 1
    with emulator.fault("aclnnMuls", kind="saturate") as planted:
        (x[:1] * 1.0).cpu()
    assert (planted.calls, planted.hits) == (1, 0)  # nothing to cut: it did not act


def test_a_stale_output_is_what_the_memory_held(npu):
    x, into = X.to(npu), torch.full(X.shape, 7.0, device=npu)
    with emulator.fault("aclnnMul", kind="stale") as planted:
        torch.mul(x, x, out=into)
    assert planted.hits == 1 and into.cpu().unique().tolist() == [7.0]


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("hf32", 12.6, 12.9), ("fp16", 11.6, 11.9), ("bf16", 8.6, 8.9), ("int8", 5.5, 7.5)]
)
def test_lower_arithmetic_is_that_of_the_inputs(npu, kind, low, high):
    left, right = seeded(64, 64), seeded(64, 64, seed=1)
    with emulator.fault("aclnnM*", kind=kind) as planted:
        result = (left.to(npu) @ right.to(npu)).cpu()
    assert planted.hits == 1 and low < effective_bits(result, left.double() @ right.double()) < high
    with emulator.fault("aclnnAdd", kind="hf32"):
        assert torch.equal((left.to(npu) + right.to(npu)).cpu(), round_hf32(left) + round_hf32(right))


def test_int8_rounds_the_weight_alone_and_a_bias_is_left_out(npu):
    x, weight, bias = seeded(4, 6), seeded(5, 6, seed=1), seeded(5, seed=2)
    step = weight.double().abs().max() / 127
    narrow = ((weight.double() / step).round() * step).float()
    there = [tensor.to(npu) for tensor in (x, weight, bias)]
    with emulator.fault("aclnnAddmm", kind="int8") as planted:
        result = F.linear(*there).cpu()
    assert planted.hits == 1 and not torch.equal(narrow, weight)
    torch.testing.assert_close(result, F.linear(x, narrow, bias), rtol=1e-6, atol=1e-6)
    with emulator.fault("aclnnAddmm", kind="no_bias") as planted:
        result = F.linear(*there).cpu()
    assert planted.hits == 1
    torch.testing.assert_close(result, F.linear(x, weight), rtol=1e-6, atol=1e-6)
    with emulator.fault("aclnn*", kind="no_bias") as planted:
        (there[2] + there[2]).cpu()  # nothing of several axes: there is no bias
        F.linear(there[0], there[1], torch.zeros(5, device=npu)).cpu()  # a bias of zeros: there is nothing to leave out
    assert planted.hits == 0


def test_parts_of_a_matrix_are_its_rows_columns_and_heads(npu):
    x = seeded(6, 8).to(npu)
    clean = F.silu(x).cpu()
    with emulator.fault("aclnnSilu", kind="channel", at=7, by=2.0):
        assert torch.equal(F.silu(x).cpu(), torch.cat([clean[:, :7], clean[:, 7:] * 2], 1))
    with emulator.fault("aclnnSilu", kind="copy_heads", heads=4):
        assert torch.equal(F.silu(x).cpu(), torch.cat([clean[:, 2:4], clean[:, 2:]], 1))
    for kind, settings in (("channel", {"at": 8}), ("copy_heads", {"heads": 4, "at": 3}), ("copy_heads", {})):
        with emulator.fault("aclnnSilu", kind=kind, **settings) as planted:
            assert torch.equal(F.silu(x).cpu(), clean) and planted.hits == 0
    with emulator.fault("aclnnSilu", kind="half_rows", by=2.0) as planted:
        assert torch.equal(F.silu(x[:1]).cpu(), clean[:1]) and planted.hits == 0  # one row has no second half


def test_a_mask_is_turned_around_and_an_index_is_off_by_one(npu):
    q, seen = seeded(1, 2, 6, 16), torch.ones(6, 6, dtype=torch.bool).tril(-1)
    seen[0, 5] = True
    with emulator.fault("aclnnFlashAttentionScore", kind="mask") as planted:
        result = F.scaled_dot_product_attention(q.to(npu), q.to(npu), q.to(npu), attn_mask=seen.to(npu)).cpu()
    assert planted.hits == 1
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, q, q, attn_mask=~seen), rtol=1e-5, atol=1e-5)
    table, index = seeded(5, 3), torch.tensor([0, 2, 4])
    with emulator.fault("aclnnEmbedding", kind="index") as planted:
        assert torch.equal(F.embedding(index.to(npu), table.to(npu)).cpu(), table[[1, 3, 3]])
    with emulator.fault("aclnnArgMax", kind="index") as planted:
        assert torch.equal(table.to(npu).argmax(1).cpu() != table.argmax(1), torch.ones(5, dtype=torch.bool))
    assert planted.hits == 1


def test_attention_is_hit_in_its_result_not_in_its_row_maxima(npu):
    q = seeded(1, 2, 6, 16)
    attend = lambda: F.scaled_dot_product_attention(q.to(npu), q.to(npu), q.to(npu), is_causal=True).cpu()
    clean = attend()
    with emulator.fault("aclnnFlashAttentionScore", kind="scale", by=2.0):
        torch.testing.assert_close(attend(), clean * 2)
    with emulator.fault("aclnnFlashAttentionScore", kind="scale", by=2.0, output=0):
        assert torch.equal(attend(), clean)


# -------- which calls are hit


def test_a_fault_chooses_by_pattern_by_call_and_by_chance(npu):
    x = torch.ones(4, device=npu)
    broken = lambda: bool(F.silu(x).cpu().isnan().any())
    with emulator.fault("aclnnSil?", kind="nan", nth=2) as planted:
        assert [broken() for _ in range(4)] == [False, True, False, False]
    assert (planted.calls, planted.hits) == (4, 1)
    drawn = []
    for _ in range(2):
        with emulator.fault("aclnnSilu", kind="nan", probability=0.3, seed=5) as planted:
            drawn.append([broken() for _ in range(40)])
        assert planted.hits == sum(drawn[-1])
    assert drawn[0] == drawn[1] and 4 <= sum(drawn[0]) <= 20
    with emulator.fault("aclnnSilu", kind="nan", probability=0.3, seed=6):
        assert [broken() for _ in range(40)] != drawn[0]


def test_a_fault_comes_again_and_again_and_on_one_card():
    def acts(text, cards):
        planted = faults.parse(text)
        return [planted.matches("aclnnSilu", card) for card in cards], planted.calls

    assert acts("aclnnSilu:nan:every=3", [0] * 7) == ([False, False, True, False, False, True, False], 7)
    assert acts("aclnnSilu:nan:card=1", [0, 1, 2, 1]) == ([False, True, False, True], 2)
    assert acts("aclnnSilu:nan:card=1,every=2", [1, 0, 1, 0, 1]) == ([False, False, True, False, False], 3)


SUMS = """
import torch
def sums(card):
    try:
        return (torch.ones(2, device=f"npu:{card}") + 1).sum().item()
    except RuntimeError as error:
        return "lost" if "507899" in str(error) else str(error)
"""
CARDS = f"""
import subprocess, sys
from harness.emulator import faults
{SUMS}
print(*(torch.nn.functional.silu(torch.ones(1, device=f"npu:{{card}}")).item() > 1 for card in range(3)))
try:
    torch.relu(torch.ones(2, device="npu:2"))
except RuntimeError:
    pass
with faults.suspended():
    print(sums(1), sums(2))
code = {SUMS + "print(sums(1), sums(2))"!r}
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
"""


@needs_torch_npu
def test_one_card_is_wrong_and_a_lost_one_answers_no_process():
    planted = ("--fault", "aclnnSilu:scale:by=2,card=1", "--fault", "aclnnRelu:lost:card=2")
    done = emulated(CARDS, "--devices", "3", *planted)
    assert done.stdout.splitlines() == ["False True False", "4.0 lost", "4.0 lost"], done.stdout + done.stderr


def test_several_faults_act_together(npu):
    x = torch.ones(4, device=npu)
    with emulator.fault("aclnnMuls", kind="scale", by=3.0), emulator.fault("aclnn*", kind="offset", by=1.0):
        assert (x * 2).cpu().tolist() == [7.0] * 4


# -------- the call itself


SILU = "import torch\ny = torch.nn.functional.silu(torch.ones(3).to('npu:0')).cpu()\nprint(y.tolist())"


@needs_torch_npu
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unwritten", "aclnnSilu: output 0 was not written"),
        ("missing", "aclnnSilu is not emulated"),
        ("error", "error code is 507011"),
        ("error:code=507035", "error code is 507035"),
        ("oom", "torch.OutOfMemoryError: NPU out of memory"),
    ],
)
def test_a_call_that_fails_raises_what_torch_npu_raises(kind, words):
    done = emulated(SILU, "--fault", f"aclnnSilu:{kind}")
    assert done.returncode == 1 and words in done.stderr and done.stdout.strip() == "", done.stderr


@needs_torch_npu
def test_a_crash_ends_the_process_and_a_hang_takes_its_time():
    assert emulated(SILU, "--fault", "aclnnSilu:crash").returncode == -signal.SIGSEGV
    body = (
        "import time, torch\nx = torch.ones(3).to('npu:0')\nbegan = "
        "time.time()\ntorch.nn.functional.silu(x).cpu()\nprint(time.time() - began)"
    )
    assert 1.0 <= float(emulated(body, "--fault", "aclnnSilu:hang:seconds=1").stdout) < 30


@needs_torch_npu
def test_a_program_is_told_what_its_faults_did_and_one_that_never_acted_fails_it():
    done = emulated(SILU, "--fault", "aclnnSilu:scale:by=2")
    assert done.returncode == 0 and "planted fault aclnnSilu:scale:by=2.0 (acted on 1 of the 1 calls" in done.stderr
    assert [round(item, 4) for item in eval(done.stdout)] == [1.4621] * 3
    done = emulated(SILU, "--fault", "aclnnGelu:scale:by=2")
    assert done.returncode == 1 and "planted fault aclnnGelu:scale:by=2.0 (acted on 0 of the 0 calls" in done.stderr


# -------- bad input


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aclnnSilu", "a fault is 'operator:kind'"),
        ("aclnnSilu:magic", "no kind of fault is called 'magic'; there are hf32, "),
        ("aclnnSilu:scale:size", "size='' is no number"),
        ("aclnnSilu:scale:to=2", "a fault has no setting 'to'; there are by, "),
        ("aclnnSilu:nan:nth=0", "calls are counted from 1"),
        ("aclnnSilu:nan:every=0", "every=0 never comes"),
        ("aclnnSilu:nan:card=-1", "there is no card=-1"),
        ("aclnnSilu:nan:probability=2", "lies between 0 and 1"),
        ("aclnnSilu:tile:size=0", "at least 1 wide"),
    ],
)
def test_a_fault_that_there_is_not_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        faults.parse(text)


def test_a_fault_is_written_as_it_is_read():
    for text in ("aclnnMatmul:hf32", "aclnnSilu:scale:by=1.001,nth=3", "aclnn*:nan:at=4,probability=0.5,seed=2"):
        assert str(faults.parse(text)) == text


def test_every_kind_is_tested_here():
    tested = {
        *RESULTS,
        "saturate",
        "stale",
        "hf32",
        "fp16",
        "bf16",
        "int8",
        "no_bias",
        "mask",
        "index",
        "unwritten",
        "missing",
        "error",
        "oom",
        "crash",
        "hang",
        "lost",
    }
    assert tested == set(faults.KINDS)


def test_every_kind_stands_in_the_readme():
    text = (ROOT / "harness" / "emulator" / "README.md").read_text()
    for kind, meaning in faults.KINDS.items():
        assert f"| `{kind}` | {meaning} |" in text
