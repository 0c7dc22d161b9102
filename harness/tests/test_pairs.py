"""python -m harness compare and judge: what must fail fails, with exit status 1 and a reason; what is only rounding
passes.
"""

import json
import math
import threading

import numpy
import pytest
import torch
from safetensors.torch import save_file

from harness import pairs
from harness.commands.main import main

SHAPE = (200, 1000)


def seeded(*shape, seed=0):
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def changed(change, expected=None):
    expected = seeded() if expected is None else expected
    actual = expected.clone()
    returned = change(actual)
    return (actual if returned is None else returned), expected


def one_element(x, value=1e3):
    x[3, 7] = value


def garbage(x):
    x.view(-1)[torch.arange(20) * 9973] = seeded(20, seed=5) * 3


def argmax_flip(x):
    top = x[11].topk(2)
    x[11, top.indices] = top.values.flip(0)


def close_argmax_flip(x):
    top = x[11].argmax()
    x[11, top + 1 if top + 1 < x.shape[1] else top - 1] = x[11, top] * (1 + 1e-4)


def part_zeroed(x):
    x[:2] = 0


HOSTILE = {
    "unrelated": (seeded(seed=1), seeded()),
    "unrelated, scale 1e-6": (seeded(seed=1) * 1e-6, seeded() * 1e-6),
    "unrelated, scale 1e-20": (seeded(seed=1) * 1e-20, seeded() * 1e-20),
    "unrelated bfloat16": (seeded(seed=1).bfloat16(), seeded().bfloat16()),
    "unrelated complex": (torch.complex(seeded(seed=1), seeded(seed=2)), torch.complex(seeded(), seeded(seed=3))),
    "unrelated scalars": (torch.tensor(1.0), torch.tensor(2.0)),
    "negated": changed(torch.neg),
    "zeros": (torch.zeros(SHAPE), seeded()),
    "times 2": changed(lambda x: x * 2),
    "times 1.05": changed(lambda x: x * 1.05),
    "times 1.02": changed(lambda x: x * 1.02),
    "an outlier": changed(one_element),
    "rows shifted": changed(lambda x: x.roll(1, 0)),
    "inf of the other sign": changed(
        lambda x: one_element(x, -math.inf), changed(lambda x: one_element(x, math.inf))[0]
    ),
    "inf on one side": changed(lambda x: one_element(x, math.inf)),
    "nan on one side": changed(lambda x: one_element(x, math.nan)),
    "nan everywhere, on both sides": (torch.full(SHAPE, math.nan), torch.full(SHAPE, math.nan)),
    "integers off by one": (torch.arange(100) + 1, torch.arange(100)),
    "bools flipped": (torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)),
    "another shape": (seeded(1000, 200), seeded(1000, 200).t().contiguous()),
    "another dtype": changed(torch.Tensor.half),
    "1 % zeroed": changed(part_zeroed),
    "0.5 % of bias": changed(lambda x: x * 1.005),
    "a factor of 1.0005": changed(lambda x: x * 1.0005),
    "20 elements of garbage in 200,000": changed(garbage),
    "an argmax flipped": changed(argmax_flip),
    "an argmax flipped by 1e-4": changed(close_argmax_flip),
    "a mean shift of 1e-3": changed(lambda x: x + 1e-3),
}
BENIGN = {
    "equal": changed(lambda x: None),
    "sums in another order": (
        seeded(200, 64) @ seeded(64, 1000, seed=1),
        ((seeded(200, 64).double()) @ seeded(64, 1000, seed=1).double()).float(),
    ),
    "bfloat16 rounded twice": ((seeded().float() + 1e-3 * seeded(seed=4)).bfloat16(), seeded().bfloat16()),
    "a shared infinity": changed(lambda x: None, changed(lambda x: one_element(x, math.inf))[0]),
}


def written(folder, pair):
    save_file({"y": pair[0].contiguous()}, folder / "a.safetensors")
    save_file({"y": pair[1].contiguous()}, folder / "b.safetensors")
    return [str(folder / "a.safetensors"), str(folder / "b.safetensors")]


def saved_pt(folder, pair):
    for name, tensor in zip("ab", pair):
        torch.save({"y": tensor}, folder / f"{name}.pt")
    return [str(folder / "a.pt"), str(folder / "b.pt")]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pair_fails(name, tmp_path, capsys):
    assert main(["compare", *saved_pt(tmp_path, HOSTILE[name])]) == 1
    out = capsys.readouterr().out
    assert "❌ FAIL" in out and "- FAIL y: " in out


@pytest.mark.parametrize("name", BENIGN)
def test_a_benign_pair_passes(name, tmp_path, capsys):
    status = main(["compare", *saved_pt(tmp_path, BENIGN[name])])
    assert (status, "1 PASS" in capsys.readouterr().out) == (0, True)


def test_folders_are_paired_by_name_and_what_is_missing_or_damaged_fails(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side / "deep").mkdir(parents=True)
        numpy.save(tmp_path / side / "deep" / "x.npy", numpy.arange(6, dtype=numpy.float32))
        numpy.savez(tmp_path / side / "z.npz", one=numpy.ones(3), two=numpy.zeros(2))
        torch.save({"layers": [torch.ones(2), {"w": torch.ones(3)}]}, tmp_path / side / "nested.pt")
        save_file({"only": torch.ones(2)}, tmp_path / side / "whole.safetensors")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    for name in ("deep/x", "z/one", "z/two", "nested/layers.0", "nested/layers.1.w", "whole/only"):
        assert f"| {name}" in out
    (tmp_path / "a" / "deep" / "x.npy").unlink()
    (tmp_path / "a" / "whole.safetensors").write_bytes((tmp_path / "b" / "whole.safetensors").read_bytes()[:-3])
    (tmp_path / "b" / "z.npz").write_bytes(b"PK damaged")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "FAIL deep/x: " in out and "there is no 'deep/x'" in out
    assert "FAIL whole/only: " in out and "cannot read whole.safetensors" in out
    assert "FAIL z/one: " in out and "cannot read z.npz" in out
    assert "2 PASS" in out


class Evil:
    def __reduce__(self):
        return print, ("planted code ran",)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    import pickle

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(torch.ones(2), tmp_path / "b.pt")
    numpy.save(tmp_path / "c.npy", numpy.array([Evil()], dtype=object), allow_pickle=True)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    assert main(["compare", str(tmp_path / "c.npy"), str(tmp_path / "b.pt")]) == 1
    assert "planted code ran" not in capsys.readouterr().out


def test_single_tensors_are_paired_whatever_they_are_called(tmp_path):
    torch.save(torch.ones(3, 4), tmp_path / "npu_output.pt")
    numpy.save(tmp_path / "cpu.npy", numpy.ones((3, 4), dtype=numpy.float32))
    assert main(["compare", str(tmp_path / "npu_output.pt"), str(tmp_path / "cpu.npy")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent.pt", "b.pt"], "absent.pt does not exist; give a file"),
        (["b.pt", "c.txt"], "c.txt: a file of .safetensors"),
        (["empty", "empty"], "holds a tensor; files of"),
        (["b.pt", "b.pt", "--preset", "nice"], "no preset is called 'nice'; there are floor"),
        (["b.pt", "b.pt", "--limit", "max=1"], "there is no limit 'max'"),
        (["b.pt", "b.pt", "--limit", "max_diff=much"], "'much' is no number"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(2), "b.pt")
    (tmp_path / "c.txt").write_text("1 2")
    (tmp_path / "empty").mkdir()
    assert main(["compare", *words]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_golden_gives_a_floor(tmp_path, capsys):
    golden = (seeded(200, 64).double() @ seeded(64, 1000, seed=1).double()) / 8
    torch.save(golden, tmp_path / "golden.pt")
    torch.save(golden.half() * 1, tmp_path / "cpu.pt")
    torch.save(golden.float().half(), tmp_path / "good.pt")
    torch.save((golden * (1 + 2e-4)).half(), tmp_path / "scaled.pt")  # a fifth of a last place: no element tells
    paths = [str(tmp_path / f"{name}.pt") for name in ("good", "cpu", "golden")]
    assert main(["compare", *paths[:2], "--golden", paths[2]]) == 0
    assert main(["compare", str(tmp_path / "scaled.pt"), paths[1], "--golden", paths[2]]) == 1
    assert "gain_ratio" in capsys.readouterr().out


def test_limits_of_ones_own_and_the_numbers_as_json(tmp_path):
    paths = written(tmp_path, changed(lambda x: x + 1e-2))
    assert main(["compare", *paths, "--limit", "max_diff=0.02"]) == 0
    assert main(["compare", *paths, "--limit", "max_diff=0.009", "--json", str(tmp_path / "found.json")]) == 1
    result = json.loads((tmp_path / "found.json").read_text())
    (pair,) = result["pairs"]
    assert (result["schema"], pair["case"], pair["status"], pair["criteria"]) == (
        "precision-pairs/1",
        "y",
        "FAIL",
        ["max_diff"],
    )
    assert pair["shift"] == pytest.approx(1e-2, rel=1e-3) and pair["p99"] >= 0.99e-2


def test_links_are_followed_and_circles_and_dead_ones_are_not_passed_over(tmp_path, capsys):
    for side in "ab":
        (tmp_path / f"real_{side}").mkdir()
        (tmp_path / side).mkdir()
        torch.save(torch.full((3,), float(ord(side))), tmp_path / f"real_{side}" / "BAD.PT")
        (tmp_path / side / "step0").symlink_to(tmp_path / f"real_{side}")
        (tmp_path / side / "self").symlink_to(tmp_path / side)
        (tmp_path / side / "dead.npy").symlink_to(tmp_path / "nowhere.npy")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "FAIL step0/BAD: " in out and "FAIL dead: " in out and "cannot read dead.npy" in out


def test_numbers_beside_tensors_names_that_collide_and_empty_files_fail(tmp_path, capsys):
    torch.save({"loss": 1.0, "step": 3, "x": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"loss": 99.0, "step": 3, "x": torch.ones(2)}, tmp_path / "b.pt")
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    assert "FAIL loss: " in capsys.readouterr().out
    torch.save({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}, tmp_path / "a.pt")
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "a.pt")]) == 1
    assert "two tensors in it have the name 'a.b'" in capsys.readouterr().out
    torch.save({}, tmp_path / "b.pt")
    assert main(["compare", str(tmp_path / "b.pt"), str(tmp_path / "b.pt")]) == 1
    assert "it holds no tensor" in capsys.readouterr().out


def test_a_golden_that_is_no_float64_is_refused(tmp_path, capsys):
    torch.save(seeded().half(), tmp_path / "golden.pt")
    torch.save(seeded(), tmp_path / "a.pt")
    assert (
        main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--golden", str(tmp_path / "golden.pt")]) == 1
    )
    assert "the golden tensor is float16 (200, 1000) where float64" in capsys.readouterr().out


def test_one_pair_that_cannot_be_compared_costs_no_other(tmp_path, capsys):
    for side in "ab":
        torch.save({"meta": torch.ones(2, device="meta"), "x": torch.ones(2)}, tmp_path / f"{side}.pt")
    assert main(["compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 1
    out = capsys.readouterr().out
    assert "FAIL meta: " in out and "1 PASS, 1 FAIL" in out


def test_a_damaged_report_is_not_judged(tmp_path, capsys):
    from harness import Tolerance, compare, judge
    from harness.report import build, row, write

    verdict = judge(compare(torch.ones(3) * 2, torch.ones(3)), Tolerance(max_diff=0.5))
    rows = [row(test="t", case="c", dtype="float32", seed=1, verdict=verdict)]
    path, _ = write(build(rows, stack={"device": "x"}, backend="cpu"), tmp_path)
    assert main(["judge", str(path)]) == 1
    assert "1 FAIL" in capsys.readouterr().out
    whole = json.loads(path.read_text())
    for damage in (
        lambda kept: kept["rows"][0]["measured"]["output"]["comparison"].pop("unequal"),
        lambda kept: kept["rows"][0].pop("measured"),
        lambda kept: kept["rows"].append(None),
        lambda kept: kept["rows"][0].update(measured=None),
        lambda kept: kept["rows"][0].update(limits={"max_diff": "much"}),
    ):
        kept = json.loads(json.dumps(whole))
        damage(kept)
        path.write_text(json.dumps(kept))
        assert main(["judge", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


# -------- the next pair


@pytest.mark.parametrize(("room", "ahead"), [(2 * 4 * 6, True), (2 * 4 * 6 - 1, False)])
def test_the_next_pair_is_read_while_one_is_compared_where_it_is_small(monkeypatch, tmp_path, capsys, room, ahead):
    for side in ("a", "b"):
        save_file({name: seeded(2, 3) + number for number, name in enumerate("xyz")}, tmp_path / f"{side}.safetensors")
    second, read, results = threading.Event(), pairs.Side.read, []

    def reading(side, name):
        if name == "y" and side.path.stem == "b":
            second.set()
        return read(side, name)

    def comparing(tensors, tolerance, coarser):
        results.append(second.wait(10 if ahead else 0.2))
        return compared(tensors, tolerance, coarser)

    compared = pairs._compared
    monkeypatch.setattr(pairs, "AHEAD", room)
    monkeypatch.setattr(pairs.Side, "read", reading)
    monkeypatch.setattr(pairs, "_compared", comparing)
    assert main(["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    assert results == [ahead, True, True] and "3" in capsys.readouterr().out
