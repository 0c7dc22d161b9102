"""The compiled comparison against the same one in torch; where nothing can be compiled; and its threads."""

import ctypes
import math
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from harness import compare, compiling
from harness.measure import compare_all, comparison, compiled, compiled_comparison, slices
from harness.measure.compiled import PART_SIZE
from harness.measure.compiled_comparison import TOGETHER, Part, _Job, _Row, _Work
from harness.measure.compiled_slices import CompiledSums
from harness.measure.compiled_slices import _Job as _SlicesJob
from harness.tests.needs import NOT_COMPILED, lacks_compiled_code
from harness.tests.test_commands import ROOT

INF, NAN = math.inf, math.nan
SUMS = {  # numbers that the order of a summation changes, and the number that their rounding is measured by
    "mean_diff": "mean_diff",
    "rel_l2": "rel_l2",
    "rms": "rms",
    "rmse": "rmse",
    "shift": "mean_diff",
    "gain": "rel_l2",
    "cos_sim": "cos_sim",
    "token_cos_sim": "token_cos_sim",
    "mean_rel": "mean_rel",
    "wape": "wape",
    "max_scaled": "max_scaled",
    "token_rel_l2": "token_rel_l2",
    "ulp_mean": "ulp_mean",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
needs_compiler = pytest.mark.skipif(lacks_compiled_code(), reason=NOT_COMPILED)


def by_torch(actual, expected):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.Prepared, "of", lambda *arguments: None)
        return compare(actual, expected)


def by_compiled(actual, expected):
    read = []

    def read_together(pairs):
        read.extend(pairs)
        compiled_comparison.read_together(pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_together", read_together)
        result = compare(actual, expected)
    assert len(read) == 1, "the compiled code was not called"
    return result


def agree(actual, expected):
    """The comparison, which the compiled code and torch agree on."""
    first, second = asdict(by_compiled(actual, expected)), asdict(by_torch(actual, expected))
    for name, value in second.items():
        if name in SUMS:
            size = max(abs(value), abs(second[SUMS[name]]))
            assert first[name] == pytest.approx(value, rel=1e-12, abs=1e-12 * size, nan_ok=True), name
        elif name == "cos_distance":  # the difference of two nearly equal norms is in it, squared
            assert first[name] == pytest.approx(value, rel=1e-12, abs=1e-15, nan_ok=True), name
        elif isinstance(value, float) and math.isnan(value):
            assert math.isnan(first[name]), name
        else:
            assert first[name] == value, name
    return second


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape, dtype=torch.float32, noise=1e-3):
    """Actual and expected."""
    expected = seeded(*shape, dtype=dtype)
    return (expected.double() * (1 + noise) + 10 * noise * seeded(*shape, seed=1).double()).to(dtype), expected


SHAPES = [
    (),
    (1,),
    (7,),
    (PART_SIZE,),
    (comparison.CHUNK,),
    (comparison.CHUNK + 3,),
    (1, 3),
    (3, 5),
    (5, 1),
    (2, 1, 4),
    (2, 16, 64),
    (1, 1500),
    (3, 1024),
    (5, 1025),
    (7, 4099),
    (2, PART_SIZE + 5),
    (1, comparison.CHUNK + 77),
    (20000, 2),
    (9000, 3),
    (700, 129),
]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_shape_and_dtype(shape, dtype):
    actual, expected = pair(*shape, dtype=dtype)
    result = agree(actual, expected)
    assert result["max_diff"] > 0
    if len(shape) > 1 and shape[-1] > 1:
        actual[..., 0, 1], expected[..., 0, 0] = 11.0, 12.0
        assert agree(actual, expected)["flips"] > 0


@needs_compiler
@pytest.mark.parametrize("noise", [1e-6, 0.011, 0.019, 1.0, -2.0])
@pytest.mark.parametrize("shape", [(50,), (30, 40), (3, 2500), (2, PART_SIZE + 5)], ids=str)
def test_every_distance(shape, noise):
    agree(*pair(*shape, noise=noise))
    assert (agree(*pair(*shape, dtype=torch.float64, noise=noise))["cos_distance"] > 0.01) == (abs(noise) > 0.015)


@needs_compiler
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("sides", ["actual", "expected", "both", "opposite"])
@pytest.mark.parametrize(
    "shape", [(7,), (3, 5), (40, 64), (3, 3000), (2, PART_SIZE + 9), (2 * PART_SIZE + 1,)], ids=str
)
def test_what_is_not_finite(shape, sides, value):
    actual, expected = pair(*shape)
    for at in (actual.numel() // 3, actual.numel() // 2, actual.numel() - 1):
        actual.view(-1)[at] = value if sides != "expected" else 1.0
        expected.view(-1)[at] = {"actual": 1.0, "opposite": -value}.get(sides, value)
    result = agree(actual, expected)
    count = 3 if shape != (7,) else len({7 // 3, 7 // 2, 6})
    assert result["nan_actual"] + result["inf_actual"] == (0 if sides == "expected" else count)
    first = actual.view(-1).clone()
    first[: actual.numel() // 3] = NAN  # a NaN that comes later than one that is equal
    agree(first.view(shape), expected)


@needs_compiler
@pytest.mark.parametrize("fill", [-1e9, 6e4, -INF])
@pytest.mark.parametrize("shape", [(64,), (8, 64), (4, 5000), (2, PART_SIZE + 40), (3 * PART_SIZE,)], ids=str)
def test_fill_values(shape, fill):
    actual, expected = pair(*shape)
    places = torch.arange(expected.numel()).view(shape) % 5 == 0
    shared = actual.masked_fill(places, fill), expected.masked_fill(places, fill)
    result = agree(*shared)
    assert result["rms"] < 2 and result["max_diff"] < 1
    agree(actual, shared[1]), agree(shared[0], expected), agree(shared[0].flip(-1), shared[1])
    shared[1].view(-1)[3] = NAN  # where one is, nothing is taken for a fill value
    agree(*shared)


@needs_compiler
@pytest.mark.parametrize(("value", "count"), [(1001.0, 2), (999.0, 2), (1e9, 1), (-1001.0, 2)])
def test_what_is_nearly_a_fill_value(value, count):
    expected = torch.cat([torch.linspace(-1, 1, 30), torch.full((count,), value)])
    agree(expected * 1.001, expected), agree(expected.clone(), expected)
    wide = torch.cat([torch.linspace(-1, 1, 2 * PART_SIZE), torch.full((count,), value)])
    agree(wide * 1.001, wide), agree(wide.clone(), wide)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 4, 9, 40, 5000])
def test_zeros_and_the_ends_of_the_range(dtype, count):
    zeros, ones = torch.zeros(3, count, dtype=dtype), torch.ones(3, count, dtype=dtype)
    for actual, expected in ((zeros, zeros), (zeros, ones), (ones, zeros), (-zeros, zeros), (ones, ones)):
        agree(actual, expected), agree(actual.flatten(), expected.flatten())
    actual, expected = pair(3, count, dtype=torch.float64)
    some = expected.clone()
    some[0] = 0.0
    agree(actual.to(dtype), some.to(dtype))
    info = torch.finfo(dtype)
    for size in (info.max / 4, info.tiny, info.tiny * info.eps * 3, info.max / 2**20):
        first, second = (expected * (size / 4)).to(dtype), (actual * (size / 4)).to(dtype)
        agree(second.clamp(-info.max, info.max), first.clamp(-info.max, info.max))
    agree(torch.full((3, count), info.max, dtype=dtype), torch.full((3, count), info.min, dtype=dtype))


@needs_compiler
def test_every_number_of_16_bits():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = torch.where(values.isnan(), torch.tensor(NAN, dtype=dtype), values)  # of one payload
        finite = values[values.isfinite()]
        agree(finite, finite.roll(1)), agree(finite, torch.zeros_like(finite)), agree(values, values.roll(7))
        for left in (values, values.flip(0)):  # both in a row of one: the largest of each
            agree(left.view(-1, 2), values.view(-1, 2))
        assert by_compiled(values, values.double()).unequal == int(values.isnan().sum())


@needs_compiler
@pytest.mark.parametrize("second", FLOATS, ids=str)
@pytest.mark.parametrize("first", FLOATS, ids=str)
def test_two_dtypes(first, second):
    actual, expected = pair(30, 70)
    agree(actual.to(first), expected.to(second))


@needs_compiler
def test_views_and_other_layouts():
    actual, expected = pair(40, 60)
    agree(actual.t(), expected.t()), agree(actual[:, ::3], expected[:, ::3]), agree(actual[3], expected[3])
    agree(actual.t().contiguous().t(), expected), agree(actual[1:, 1:], expected[1:, 1:])
    agree(expected[:1].expand(40, 60), expected), agree(actual.to_sparse(), expected.to_sparse())
    wave = torch.complex(actual, actual.flip(0)), torch.complex(expected, expected.flip(0))
    agree(*wave), agree(wave[0].conj(), wave[1].conj()), agree(wave[0].conj().imag, wave[1].conj().imag)
    assert by_compiled(wave[0].conj().imag, -actual.flip(0)).unequal == 0
    raw = torch.frombuffer(bytearray(4 * 2000 + 1), dtype=torch.uint8)
    raw[1:].view(-1)[:] = torch.arange(8000) % 100
    odd = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1)  # no element is where a float begins
    agree(odd, odd.clone() * 1.5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_whole_numbers(dtype):
    actual, expected = ((item * 40).abs().clamp(max=100).to(dtype) for item in pair(50, 33, noise=0.1))
    actual[7, 5], expected[7, 5] = False, True
    assert agree(actual, expected)["unequal"] > 0
    agree(actual.flatten(), expected.flatten()), agree(actual, expected.to(torch.uint8))
    if dtype == torch.int32:
        agree(actual + 2**30, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_what_has_no_kind_of_its_own_is_compared_by_torch_or_as_pairs(dtype):
    """2**53 and the number behind it are one double."""
    large = torch.tensor([2**53, 5]).to(dtype)
    assert compare(large + torch.tensor([1, 0]).to(dtype), large).unequal == (1 if dtype == torch.int64 else 0)
    assert compare(torch.tensor([2**24 + 1], dtype=torch.int32), torch.tensor([2.0**24])).unequal == 0  # as in torch


@needs_compiler
@pytest.mark.parametrize("shape", [(2 * PART_SIZE + 9,), (300, 1000), (2, 3 * PART_SIZE), (5, PART_SIZE - 1)], ids=str)
def test_no_number_depends_on_the_threads(shape):
    actual, expected = pair(*shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(asdict(by_compiled(actual, expected)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@needs_compiler
@pytest.mark.parametrize("step", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", [(50,), (12, 7), (3, 100), (200, 2)], ids=str)
def test_parts_of_any_size_give_the_same(monkeypatch, shape, step):
    monkeypatch.setattr(comparison, "PART_SIZE", step)
    actual, expected = pair(*shape)
    agree(actual, expected)
    actual.view(-1)[[3, 40]] = torch.tensor([NAN, INF])
    agree(actual, expected), agree(expected, actual)


# -------- slices


def summed(sums, rows, width):
    step = max(sums.batch // width, 1)
    parts = [sums.rows(start, min(start + step, rows)) for start in range(0, rows, step)]
    return torch.cat(parts, 1), sums.columns(), *sums.magnitudes()


@needs_compiler
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (40, 3), (300, 64), (30, 1100), (20, 5003), (2000, 96)], ids=str)
def test_sums_of_slices_are_those_of_torch(monkeypatch, shape, runs):
    monkeypatch.setattr(CompiledSums, "batch", 1 << 16)
    monkeypatch.setattr("harness.measure.compiled_slices.PART_SIZE", 1 << 10)
    golden = seeded(*shape, dtype=torch.float64) * torch.exp(3 * seeded(*shape, seed=7, dtype=torch.float64))
    golden.view(-1)[::7] = 0.0
    flat = [golden, *((golden + 1e-3 * seeded(*shape, seed=n)).to(FLOATS[n]) for n in range(runs))]
    planted = {3: INF, 11: NAN, 12: 1e-310, 13: 5e-324, 14: 1e300, 15: -1e-300, 16: 2.0, 17: -0.25, 18: INF, 20: NAN}
    for at, value in planted.items():
        flat[at % 2].view(-1)[at % golden.numel()] = value
    wanted = shape[1] >= 1024
    blocks = [torch.zeros(len(flat), shape[0], 16, dtype=torch.float64) for _ in range(2)]
    first, second = (
        CompiledSums.of(flat, True, blocks[0] if wanted else None),
        slices._TorchSums(flat, True, blocks[1] if wanted else None),
    )
    results = [(*summed(sums, *shape), part) for sums, part in zip((first, second), blocks)]
    for ours, torchs in zip(*results):
        assert torch.equal(ours, torchs) if ours.dtype == torch.int64 else torch.allclose(ours, torchs, rtol=1e-12)
    assert int(results[0][3].sum()) == golden.numel() and (not wanted or bool(blocks[0].any()))


@needs_compiler
@pytest.mark.parametrize("shape", [(3 * PART_SIZE + 5,), (400, 1100), (5, 64, 300)], ids=str)
def test_no_slice_depends_on_the_threads(shape):
    actual, expected = pair(*shape)
    golden = seeded(*shape, dtype=torch.float64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(slices.worst_slices(actual, golden, [expected, expected.half()]))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2] and len(results[0]) > 1


# -------- where nothing can be compiled


CODE = """
import torch
from harness import compare
from harness.measure import compiled
result = compare(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
print(compiled.compiled_code() is None, result.max_diff, result.unequal)
"""


def alone(tmp_path, **variables):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)} | variables
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_without_a_compiler_torch_compares_and_nothing_is_said(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho error: no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    assert alone(tmp_path, CC=str(broken)) == ["True", "0.5", "1"]
    assert alone(tmp_path, HARNESS_COMPARE="torch") == ["True", "0.5", "1"]


@needs_compiler
def test_it_is_compiled_once_into_the_cache_for_this_processor(tmp_path):
    assert alone(tmp_path) == ["False", "0.5", "1"]
    folder = tmp_path / "npu-accuracy-harness"
    (made,) = folder.iterdir()
    assert [path.name for path in made.iterdir()] == ["measure.so"]
    time = (made / "measure.so").stat().st_mtime_ns
    assert alone(tmp_path, CC="/nowhere") == ["False", "0.5", "1"]
    assert [path.name for path in folder.iterdir()] == [made.name]
    assert (made / "measure.so").stat().st_mtime_ns == time


def test_the_key_of_the_cache_names_the_processor(monkeypatch, tmp_path):
    text = "processor : 0\nmodel name : A\nflags : fpu avx2\ncpu MHz : 1\n\nprocessor : 1\nmodel name : A\n"
    names = []
    for changed in (text, text.replace("cpu MHz : 1", "cpu MHz : 2"), text.replace("avx2", "avx512f")):
        monkeypatch.setattr(compiling.Path, "read_text", lambda path, **more: changed)
        names.append(compiling.processor())
    assert names[0] == names[1] != names[2] and "fpu avx2" in names[0]


@needs_compiler
def test_the_structures_are_those_of_the_compiled_code():
    code = compiled.compiled_code()
    kinds = (_Job, Part, _Row, _Work)
    assert [code.harness_sizes(number) for number in range(len(kinds))] == [ctypes.sizeof(kind) for kind in kinds]
    assert code.harness_slices_size() == ctypes.sizeof(_SlicesJob)


# -------- several pairs in one pass


def one_by_one(pairs, errors):
    return [compare(*pair) for pair in pairs], [compare(*pair).rel_l2 for pair in errors]


def same(first, second):
    """Whether two comparisons hold the same numbers, bit for bit; NaN is one."""
    return repr(asdict(first)) == repr(asdict(second))


def outputs_of_a_row(*shape, dtype=torch.float32):
    """What the device, the CPU, float64 and the forecast give."""
    golden = seeded(*shape, dtype=torch.float64)
    device, cpu, forecast = (
        (golden + 1e-3 * seeded(*shape, seed=seed, dtype=torch.float64)).to(dtype) for seed in (1, 2, 3)
    )
    return device, cpu, golden, forecast


def pairs_of_a_row(device, cpu, golden, forecast):
    return [(device, cpu), (device, golden), (cpu, golden), (forecast, golden)], [(device, forecast)]


def joint_is_separate(pairs, errors):
    for (comparisons, sizes), (expected, expected_sizes) in [(compare_all(pairs, errors), one_by_one(pairs, errors))]:
        assert len(comparisons) == len(expected) and all(map(same, comparisons, expected))
        assert repr(sizes) == repr(expected_sizes)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (40, 5000), (2, 3, 70_001), (300_000,)], ids=str)
def test_pairs_that_are_read_together_give_the_same_bits(shape, dtype):
    joint_is_separate(*pairs_of_a_row(*outputs_of_a_row(*shape, dtype=dtype)))


@needs_compiler
def test_a_pass_reads_what_pairs_share_together(monkeypatch):
    groups = []

    def noting(pairs):
        groups.append([(item.job.same, item.job.brief) for item in pairs])
        compiled_comparison.read_together(pairs)
        groups[-1] = [(item.job.same, item.job.brief) for item in pairs]

    monkeypatch.setattr(comparison, "read_together", noting)
    compare_all(*pairs_of_a_row(*outputs_of_a_row(4, 100)))
    assert groups == [[(-1, 0), (-1, 0), (1, 0), (1, 0), (-1, 1)]]  # golden is surveyed once, of three pairs


@needs_compiler
def test_more_pairs_than_fit_in_one_pass_take_several(monkeypatch):
    outputs = [seeded(6, 50, seed=seed) for seed in range(TOGETHER + 2)]
    pairs = [(output, outputs[0]) for output in outputs[1:]]
    sizes, read = [], compiled_comparison.read_together
    monkeypatch.setattr(comparison, "read_together", lambda group: sizes.append(len(group)) or read(group))
    joint_is_separate(pairs, [])
    assert sizes[:2] == [TOGETHER, 1]


@needs_compiler
def test_fills_infinities_and_nans_of_one_pair_are_not_those_of_another():
    """One is filled, one holds an infinity on both sides, one a NaN: each pair waits for the others' stages."""
    device, cpu, golden, forecast = outputs_of_a_row(64, 3000)
    filled = golden.clone()
    filled[:, 100:200] = -1e9
    cpu[3, 7], golden[3, 7], forecast[5, 5] = INF, INF, NAN
    pairs = [(device, cpu), (filled.float(), filled), (cpu, golden), (forecast, golden), (device, filled)]
    joint_is_separate(pairs, [(device, forecast), (filled.float(), filled), (cpu, golden)])


@needs_compiler
def test_pairs_of_other_shapes_dtypes_and_kinds_stand_beside_one_another():
    torch.manual_seed(0)
    whole, mixed = torch.arange(12).view(3, 4), torch.randn(3, 4)
    complexes = torch.randn(3, 4, dtype=torch.complex64)
    pairs = [
        (whole, whole + 1),  # int64: torch does it
        (mixed, mixed.double() + 1e-3),
        (mixed, mixed[:2]),  # shapes that differ
        (complexes, complexes * (1 + 1e-5)),
        (mixed, complexes),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (mixed.t(), mixed.t() + 1e-3),
        (mixed > 0, mixed > 0.1),
        (torch.tensor(1.0), torch.tensor(1.5)),
    ]
    joint_is_separate(pairs, [pair for pair in pairs if pair[0].shape == pair[1].shape])


@needs_compiler
def test_an_error_alone_says_what_the_whole_comparison_does():
    """Also of squares that vanish, of nothing expected, and of nothing at all."""
    tiny = torch.full((3, 4), 1e-200, dtype=torch.float64)
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    pairs = [(tiny, 2 * tiny), (zeros, zeros), (tiny + 1, zeros), (zeros, tiny + 1), (tiny * NAN, tiny)]
    _, sizes = compare_all([], pairs)
    assert repr(sizes) == repr([compare(*pair).rel_l2 for pair in pairs])
    assert math.isnan(sizes[0]) and sizes[1:4] == [0.0, INF, 1.0] and math.isnan(sizes[4])


@needs_compiler
def test_threads_change_no_bit_of_pairs_that_are_read_together():
    pairs, errors = pairs_of_a_row(*outputs_of_a_row(100, 9000))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(repr(compare_all(pairs, errors)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_without_compiled_code_pairs_are_compared_one_by_one(monkeypatch):
    monkeypatch.setattr(comparison.Prepared, "of", lambda *arguments: None)
    joint_is_separate(*pairs_of_a_row(*outputs_of_a_row(4, 100)))
