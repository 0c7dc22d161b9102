"""python -m harness compare: names in natural order and mapped, the coarser dtype, exchanged axes, the first that
differs."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

from harness.commands.main import main
from harness.pairs import axes
from harness.pairs.names import Naming, in_order, natural
from harness.tests.test_pairs_files import compared, last_line


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(folder, actual, expected):
    save_file({name: tensor.contiguous() for name, tensor in actual.items()}, folder / "a.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


# -------- order


def test_layer_9_is_the_first_that_differs_and_the_last_line(tmp_path, capsys):
    expected = {f"layers.{n}.out": seeded(4, 8, seed=n) for n in range(12)}
    actual = {name: item * (1.01 if natural(name) >= natural("layers.9.out") else 1) for name, item in expected.items()}
    status, text = compared(capsys, *written(tmp_path, actual, expected))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| layers")]
    assert status == 1 and rows == [f"layers.{n}.out" for n in range(12)]
    assert last_line(text).startswith("first that differs: layers.9.out: rel_l2 1.00e-02 (up to")


def test_where_all_pass_no_line_names_a_first(tmp_path, capsys):
    status, text = compared(capsys, *written(tmp_path, {"x": torch.ones(3)}, {"x": torch.ones(3)}))
    assert status == 0 and "first that differs" not in text


def test_numbers_in_names_are_numbers_and_the_text_before_them_comes_first():
    names = ["a10.z", "a9.z", "a9.b", "b1", "a", "a010", "a" + "9" * 5000]
    assert sorted(names, key=natural) == ["a", "a9.b", "a9.z", "a010", "a10.z", "a" + "9" * 5000, "b1"]


def test_the_order_of_execution_of_the_second_side_leads():
    assert in_order(["x", "only", "z", "y"], ["z", "x", "y", "w"]) == ["z", "x", "only", "y", "w"]
    assert in_order(["first", "x"], ["x"]) == ["first", "x"]


# -------- mapping


def layers(prefix, count=200, factor=1.0):
    return {f"{prefix}layers.{n}.out": torch.full((2,), 1.0 + n) * factor for n in range(count)}


def test_a_prefix_that_would_pair_all_is_named_and_pairs_all(tmp_path, capsys):
    paths = written(tmp_path, layers(""), layers("model."))
    status, text = compared(capsys, *paths)
    assert status == 1 and "- all 200 unpaired names of B pair after --strip-prefix model.\n" in text
    status, text = compared(capsys, *paths, "--strip-prefix", "model.")
    assert status == 0 and "200 PASS" in text
    status, text = compared(capsys, *reversed(paths))
    assert status == 1 and "all 200 unpaired names of A pair after --strip-prefix model." in text


@pytest.mark.parametrize(("paired", "named"), [(3, False), (4, True)], ids=["half", "most"])
def test_a_prefix_is_named_where_it_would_pair_most(paired, named, tmp_path, capsys):
    other = {"": "unlike", "model.": "other"}
    actual, expected = (
        {(f"{prefix}x{n}" if n < paired else f"{other[prefix]}{n}"): torch.ones(2) for n in range(6)}
        for prefix in other
    )
    text = compared(capsys, *written(tmp_path, actual, expected))[1]
    assert (f"{paired} of the 6 unpaired names of B pair after --strip-prefix model." in text) == named


def test_two_prefixes_give_a_map_that_works(tmp_path, capsys):
    paths = written(tmp_path, layers("module.", 12), layers("model.", 12))
    text = compared(capsys, *paths)[1]
    assert r"all 12 unpaired names of A pair after --map '^module\\.=model.'" in text  # \\: markdown's \
    assert compared(capsys, *paths, "--map", r"^module\.=model.")[0] == 0
    assert compared(capsys, *paths, "--strip-prefix", "module.", "--strip-prefix", "model.")[0] == 0


def test_a_map_is_a_regular_expression_for_the_names_of_a_alone(tmp_path, capsys):
    actual = {f"h{n}.attn": torch.full((2,), float(n)) for n in range(3)}
    expected = {f"layers.{n}.self_attn": torch.full((2,), float(n)) for n in range(3)}
    paths = written(tmp_path, actual, expected)
    assert compared(capsys, *paths, "--map", r"^h([0-9]+)=layers.\1", "--map", r"\.attn$=.self_attn")[0] == 0
    assert compared(capsys, *reversed(paths), "--map", r"^h([0-9]+)=layers.\1", "--map", r"\.attn$=.self_attn")[0] == 1


def test_a_wrong_tensor_under_a_mapped_name_fails(tmp_path, capsys):
    actual = layers("module.", 12)
    actual["module.layers.5.out"] = torch.full((2,), 60.0)
    status, text = compared(capsys, *written(tmp_path, actual, layers("", 12)), "--strip-prefix", "module.")
    assert status == 1 and last_line(text).startswith("first that differs: layers.5.out: ")


def test_a_prefix_is_taken_off_once():
    assert Naming(prefixes=("m.",)).mapped("m.m.x", first=False) == "m.x"
    assert Naming(prefixes=("model.", "m")).mapped("model.x", first=False) == "x"


def test_options_that_match_nothing_are_told(tmp_path, capsys):
    paths = written(tmp_path, {"x": torch.ones(2)}, {"x": torch.ones(2)})
    status, text = compared(capsys, *paths, "--strip-prefix", "module.", "--map", "y=z")
    assert status == 0 and "--strip-prefix module. takes nothing off" in text and "--map y=z renames nothing" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--map", "abc"], "--map abc: OLD=NEW was expected"),
        (["--map", "=abc"], "--map =abc: OLD=NEW was expected"),
        (["--map", "(=x"], "'(' is no regular expression"),
        (["--map", r"x=\9"], "cannot be filled: invalid group reference 9"),
        (["--max-inflated", "much"], "--max-inflated much: a number of bytes with a unit was expected"),
        (["--max-inflated", "-1"], "--max-inflated -1: a number of bytes"),
        (["--coarser-dtype", "--golden", "b.safetensors"], "--coarser-dtype and --golden exclude one another"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = written(tmp_path, {"x": torch.ones(2)}, {"x": torch.ones(2)})
    joined = [f"{words[0]}={words[1]}"] if len(words) == 2 else words
    status, text = compared(capsys, *paths, *joined)
    assert status == 1 and said in text and text.count("\n") == 1


# -------- dtypes


def test_two_dtypes_fail_and_pass_by_the_coarser_on_request(tmp_path, capsys):
    x = seeded(64, 128)
    paths = written(tmp_path, {"x": x.bfloat16()}, {"x": x})
    status, text = compared(capsys, *paths)
    assert (
        status == 1
        and "dtype bfloat16 where float32 was expected" in text
        and "--coarser-dtype compares such pairs" in text
    )
    status, text = compared(capsys, *paths, "--coarser-dtype")
    assert status == 0 and "compared by the coarser dtype of both: x (bfloat16 and float32)" in text
    assert compared(capsys, *reversed(paths), "--coarser-dtype")[0] == 0


def test_a_fault_is_seen_in_the_coarser_dtype(tmp_path, capsys):
    x = seeded(64, 128)
    status, text = compared(capsys, *written(tmp_path, {"x": (x * 1.02).bfloat16()}, {"x": x}), "--coarser-dtype")
    assert status == 1 and "first that differs: x: " in text


def test_what_the_coarser_dtype_cannot_hold_is_no_shared_infinity(tmp_path, capsys):
    x = seeded(4, 8)
    x[1, 2] = 1e6
    status, text = compared(capsys, *written(tmp_path, {"x": x.half()}, {"x": x}), "--coarser-dtype")
    assert status == 1 and "1 finite elements are too large for float16, the coarser dtype of both" in text


def test_float16_and_bfloat16_meet_in_bfloat16(tmp_path, capsys):
    x = seeded(64, 128)
    assert compared(capsys, *written(tmp_path, {"x": x.half()}, {"x": x.bfloat16()}), "--coarser-dtype")[0] == 0


def test_integers_of_two_widths_must_be_equal(tmp_path, capsys):
    whole = torch.arange(5)
    assert compared(capsys, *written(tmp_path, {"x": whole.int()}, {"x": whole}), "--coarser-dtype")[0] == 0
    whole[3] += 1 << 32  # equal in 32 bits
    assert compared(capsys, *written(tmp_path, {"x": torch.arange(5).int()}, {"x": whole}), "--coarser-dtype")[0] == 1
    assert (
        compared(
            capsys, *written(tmp_path, {"x": torch.ones(3)}, {"x": torch.ones(3, dtype=torch.long)}), "--coarser-dtype"
        )[0]
        == 1
    )


# -------- axes


@pytest.mark.parametrize("shape", [(4, 16, 32), (2, 3), (5, 5)])
def test_exchanged_axes_are_hinted_at_and_fail(shape, tmp_path, capsys):
    x = seeded(*shape)
    status, text = compared(capsys, *written(tmp_path, {"x": x.transpose(0, 1)}, {"x": x}))
    assert status == 1 and "; equal after transposing axes 0 and 1" in last_line(text)


@pytest.mark.parametrize("preset", ["floor", "sharp", "dynamo", "pair", "close"])
def test_exchanged_axes_are_hinted_at_by_every_preset(preset, tmp_path, capsys):
    x = seeded(4, 16, 32)
    one, other, golden = (tmp_path / f"{name}.pt" for name in ("npu", "cpu", "golden"))
    for path, tensor in ((one, x.transpose(0, 1).contiguous()), (other, x), (golden, x.double())):
        torch.save(tensor, path)
    for more in ((), ("--golden", golden)):
        status, text = compared(capsys, one, other, *more, "--preset", preset)
        assert status == 1 and "equal after transposing axes 0 and 1" in text


def test_exchanged_axes_of_another_dtype_are_hinted_at(tmp_path, capsys):
    x = seeded(4, 16, 32)
    assert (
        "equal after transposing axes 1 and 2"
        in compared(capsys, *written(tmp_path, {"x": x.transpose(1, 2).bfloat16()}, {"x": x}))[1]
    )


def test_wrong_numbers_in_exchanged_shapes_are_not_hinted_at(tmp_path, capsys):
    for actual in (seeded(16, 4, 32, seed=1), seeded(4, 16, 32).transpose(0, 1) * 1.01):
        status, text = compared(capsys, *written(tmp_path, {"x": actual}, {"x": seeded(4, 16, 32)}))
        assert status == 1 and "shape (16, 4, 32) where (4, 16, 32) was expected" in text and "transposing" not in text


def test_a_symmetric_matrix_that_differs_is_not_hinted_at(tmp_path, capsys):
    x = seeded(8, 8)
    x = x + x.T
    status, text = compared(capsys, *written(tmp_path, {"x": x * 1.01}, {"x": x}))
    assert status == 1 and "transposing" not in text


def test_exchanged_shapes_that_are_too_large_are_not_read_for_a_hint(tmp_path, capsys):
    torch.save(torch.zeros(1).expand(2**15, 2**16), tmp_path / "a.pt")
    torch.save(torch.zeros(1).expand(2**16, 2**15), tmp_path / "b.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")
    assert status == 1 and "the shapes agree after transposing axes 0 and 1; the data is too large to look at" in text


def test_axes_are_read_for_a_hint_up_to_a_number_of_bytes(tmp_path, capsys, monkeypatch):
    x = seeded(4, 8)
    for room, said in ((128, "equal after transposing axes 0 and 1"), (127, "too large to look at")):
        monkeypatch.setattr(axes, "READ", room)
        assert said in compared(capsys, *written(tmp_path, {"x": x.T}, {"x": x}))[1]


def test_axes_are_exchanged_up_to_six_of_them():
    shape = (1, 1, 1, 1, 3, 2)
    assert axes.exchanges(shape, (1, 1, 1, 1, 2, 3)) == [(4, 5)]
    assert axes.exchanges((1, *shape), (1, 1, 1, 1, 1, 2, 3)) == []


@pytest.mark.parametrize(("off", "asked"), [(0.009, True), (0.011, False)])
def test_an_exchange_is_compared_whole_where_a_sample_agrees_to_one_percent(off, asked):
    whole = []
    x = seeded(40, 50)
    axes.exchanged_axes(x.T * (1 + off), x, lambda *both: whole.append(both) or True)
    assert bool(whole) == asked


def test_help_shows_the_options_and_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in (
        "--strip-prefix",
        "--map",
        "--coarser-dtype",
        "--max-inflated",
        "python -m harness compare npu_dump/ gpu_dump/",
        "msprobe",
    ):
        assert option in text


def test_a_folder_of_npy_and_one_of_pt_pair(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side).mkdir()
    numpy.save(tmp_path / "a" / "x.npy", numpy.ones(3, numpy.float32))
    torch.save(torch.ones(3), tmp_path / "b" / "x.pt")
    assert compared(capsys, tmp_path / "a", tmp_path / "b")[0] == 0
