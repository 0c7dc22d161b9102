"""Baselines: what is kept, what a change is called, and that nothing is accepted or passed over in silence."""

import json
import math

import pytest

from harness.errors import HarnessError
from harness.report import Row, device_key
from harness.report.rows import Numbers
from harness.upgrade import baseline

STACK = {"device": "Ascend910B4", "cann": "8.5.0"}


def row(seed=42, error=1e-4, digest=None, **more):
    given = dict(
        test="", case="m", dtype="float32", seed=seed, weights="seeded:0", inputs_sha256=f"in{seed}", rel_l2=error,
        golden_rel_l2=error, actual_sha256=digest or f"{error}",
    )  # fmt: skip
    return Row(**given | more)


def rows(errors, **more):
    return [row(seed=seed, error=error, **more) for seed, error in enumerate(errors)]


def entry_of(accepted):
    stored = baseline.accepted(None, accepted, stack=STACK, backend="npu", when="2026-01-01")
    return stored.entries["Ascend910B4 (npu)"]


def kinds(now, then):
    return [verdict.kind for verdict in baseline.verdicts(now, entry_of(then))]


FIVE = [1.00e-4, 1.10e-4, 0.90e-4, 1.05e-4, 0.97e-4]


def test_the_same_bits_are_identical_whatever_the_numbers_say():
    assert kinds(rows(FIVE), rows(FIVE)) == ["IDENTICAL"] * 5


def test_without_a_baseline_a_row_is_new_and_says_how_to_accept_it():
    (result,) = baseline.verdicts([row()], None)
    assert result.kind == "NEW" and "--precision-baseline=accept" in result.text and "m float32 seed 42" in result.text


def test_a_small_drift_that_all_seeds_share_is_a_regression():
    assert kinds(rows([item * 1.05 for item in FIVE]), rows(FIVE)) == ["REGRESSED"] * 5
    assert kinds(rows([item / 1.05 for item in FIVE]), rows(FIVE)) == ["IMPROVED"] * 5


def test_one_noisy_seed_and_scatter_are_drift():
    assert kinds(rows([FIVE[0] * 1.3, *FIVE[1:]]), rows(FIVE)) == ["DRIFT"] + ["IDENTICAL"] * 4
    scattered = [item * factor for item, factor in zip(FIVE, (1.03, 0.98, 1.04, 0.97, 1.01))]
    assert kinds(rows(scattered), rows(FIVE)) == ["DRIFT"] * 5


def test_a_shared_change_too_small_to_matter_is_drift():
    assert kinds(rows([item * 1.01 for item in FIVE]), rows(FIVE)) == ["DRIFT"] * 5


def test_one_seed_that_is_much_worse_is_a_regression_by_itself():
    assert kinds(rows([FIVE[0] * 1.6, *FIVE[1:]]), rows(FIVE)) == ["REGRESSED"] + ["IDENTICAL"] * 4


def test_with_few_seeds_only_a_large_change_counts():
    assert kinds([row(error=1.4e-4)], [row(error=1e-4)]) == ["DRIFT"]
    assert kinds([row(error=1.6e-4)], [row(error=1e-4)]) == ["REGRESSED"]
    assert kinds([row(error=0.6e-4)], [row(error=1e-4)]) == ["IMPROVED"]
    assert kinds([row(error=1e-9)], [row(error=0.0)]) == ["REGRESSED"]


def test_a_change_within_the_noise_of_reruns_is_drift():
    assert kinds(rows([item * 1.05 for item in FIVE], rerun={"rel_l2": 1e-5}), rows(FIVE)) == ["DRIFT"] * 5


@pytest.mark.parametrize(
    ("change", "word"), [({"weights": "seeded:1"}, "other weights"), ({"inputs_sha256": "x"}, "other inputs")]
)
def test_other_weights_or_inputs_are_not_comparable(change, word):
    (result,) = baseline.verdicts([row(**change)], entry_of([row()]))
    assert result.kind == "NOT COMPARABLE" and word in result.text


def test_numbers_that_are_not_finite_are_not_comparable():
    assert kinds([row(error=math.nan, digest="x")], [row()]) == ["NOT COMPARABLE"]
    assert math.isnan(baseline.error_of(Row(test="", case="m", dtype=None, seed=None)))


def test_emulated_numbers_never_meet_a_card_nor_another_model():
    stored = baseline.accepted(None, [row()], stack=STACK, backend="emulated", when="2026-01-01")
    stored = baseline.accepted(stored, [row(error=2e-4)], stack=STACK, backend="npu", when="2026-01-02")
    assert sorted(stored.entries) == ["Ascend910B4 (emulated)", "Ascend910B4 (npu)"]
    assert stored.entries["Ascend910B4 (emulated)"].rows["42"].rel_l2 == 1e-4
    assert device_key(STACK | {"device": "Ascend910B2"}, "npu") not in stored.entries


def test_a_file_comes_back_as_it_was_and_a_damaged_or_newer_one_is_refused(tmp_path):
    path = baseline.path_of(tmp_path, "a model/with:odd name", "float32")
    assert path.parent == tmp_path and baseline.load_baseline(path) is None
    stored = baseline.accepted(None, rows(FIVE), stack=STACK, backend="npu", when="2026-01-01")
    path.write_text(json.dumps(stored.to_dict()))
    assert baseline.load_baseline(path).to_dict() == stored.to_dict()
    for text, word in (
        ("{", "is damaged"),
        (json.dumps(stored.to_dict() | {"schema": "precision-baseline/2"}), "has schema 'precision-baseline/2'"),
        ('{"schema": "precision-baseline/1"}', "lacks its entries"),
    ):
        path.write_text(text)
        with pytest.raises(HarnessError, match=word):
            baseline.load_baseline(path)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-3}, []),
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-4}, []),
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-2}, ["rel_l2 0.01 where 0.001 was accepted"]),
        ({"cos_sim": 0.99}, {"cos_sim": 0.999}, []),
        ({"cos_sim": 0.99}, {"cos_sim": 0.9}, ["cos_sim 0.9 where 0.99 was accepted"]),
        ({"rel_l2": 1e-3}, {}, ["no rel_l2 where 0.001 was accepted"]),
        ({"forecast_ratio": 2.0}, {"forecast_ratio": 2.0, "unexplained_ratio": 2.0}, []),
        ({}, {"rel_l2": 1.0}, []),
    ],
)
def test_a_limit_that_is_looser_than_accepted_is_named(then, now, said):
    entry = baseline.Entry(rows={"1": row(1, allowed=then)})
    assert baseline.loosened(entry, [row(1, allowed=now)]) == said
    assert baseline.loosened(None, [row(1, allowed=now)]) == []


def test_the_error_of_one_number_may_change_by_chance():
    assert (
        baseline._chance(row(shape=())) == baseline._chance(row(shape=(1,))) == 10.0
        and baseline._chance(row(shape=(4, 500))) == 1.0
    )


# -------- one case, one file


def kept(case, **more):
    return baseline.accepted(None, [row(case=case, **more)], stack=STACK, backend="npu", when="2026-01-01")


def older(folder, case):
    """A file as versions before named them: every odd character a dash below."""
    path = folder / f"{''.join(item if item.isalnum() or item in '-_.' else '_' for item in case)}-float32.json"
    path.write_text(json.dumps(kept(case).to_dict()))
    return path


NAMES = ("a b", "a_b", "a/b", "a:b", "../a_b", "a_b ", "x" * 300, "é漢字", "y" * 145 + "漢")


def test_every_case_has_a_file_of_its_own(tmp_path):
    for name in NAMES:
        path = baseline.write_baseline(tmp_path, kept(name))
        assert path.parent == tmp_path and len(path.name.encode()) < 200
    assert len(list(tmp_path.iterdir())) == len(NAMES)
    for name in NAMES:
        assert (
            baseline.read_baseline(tmp_path, name, "float32").case == name
            and baseline.read_baseline(tmp_path, name, "float16") is None
        )
    assert (tmp_path / "a_b-float32.json").exists()  # a name that can be a file's is one


def test_a_file_with_an_older_name_is_read_where_it_is_of_that_case_and_gives_way(tmp_path):
    path = older(tmp_path, "a b")
    assert path.name == "a_b-float32.json"
    assert (
        baseline.read_baseline(tmp_path, "a b", "float32").case == "a b"
        and baseline.read_baseline(tmp_path, "a/b", "float32") is None
    )
    with pytest.raises(
        HarnessError, match="a_b-float32.json holds a b float32 where a_b float32 was expected; restore it"
    ):
        baseline.read_baseline(tmp_path, "a_b", "float32")
    baseline.write_baseline(tmp_path, kept("a_b"))  # which has a right to the name; the other keeps its numbers
    assert (
        baseline.read_baseline(tmp_path, "a_b", "float32").case == "a_b"
        and baseline.read_baseline(tmp_path, "a b", "float32").case == "a b"
    )
    older(tmp_path, "c/d")
    baseline.write_baseline(tmp_path, kept("c/d"))
    assert (
        not (tmp_path / "c_d-float32.json").exists()
        and baseline.read_baseline(tmp_path, "c/d", "float32").case == "c/d"
    )


@pytest.mark.parametrize("length", [255, 256])
def test_a_name_too_long_for_an_older_file_is_written_all_the_same(tmp_path, length):
    name = "x" * (length - len("-float32.json"))
    if length == 255:  # what an older version could write
        assert older(tmp_path, name).exists()
    baseline.write_baseline(tmp_path, kept(name))
    assert [path.name for path in tmp_path.iterdir()] == [baseline.path_of(tmp_path, name, "float32").name]
    assert baseline.read_baseline(tmp_path, name, "float32").case == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored, entry: stored.update(case="another"), "holds another float32 where m float32 was expected"),
        (lambda stored, entry: stored.update(dtype="float16"), "holds m float16 where m float32 was expected"),
        (lambda stored, entry: entry.update(rows={}), "rows: nothing where an accepted row was expected"),
        (lambda stored, entry: entry.update(rows=[]), "rows: a list where an object was expected"),
        (
            lambda stored, entry: entry["rows"]["42"].update(golden_rel_l2="many"),
            r"rows.42.golden_rel_l2: 'many' where a number was expected",
        ),
        (
            lambda stored, entry: entry["rows"].update({"7": entry["rows"]["42"]}),
            "rows.7: seed 42 where the seed 7 that it is kept under was expected",
        ),
        (
            lambda stored, entry: entry["stack"].update(faults=["aclnnExp:nan"]),
            r"stack: planted faults \(aclnnExp:nan\) where a sound device",
        ),
        (lambda stored, entry: entry["rows"].update({"42": None}), "rows.42: null where an object was expected"),
    ],
)
def test_a_baseline_that_says_something_else_is_refused(tmp_path, change, words):
    path = baseline.write_baseline(tmp_path, kept("m"))
    stored = json.loads(path.read_text())
    change(stored, stored["entries"]["Ascend910B4 (npu)"])
    path.write_text(json.dumps(stored))
    with pytest.raises(HarnessError, match=words) as raised:
        baseline.read_baseline(tmp_path, "m", "float32")
    assert "accept again with --precision-baseline=accept" in str(raised.value) and "\n" not in str(raised.value)


def test_accepted_rows_without_a_case_are_named(tmp_path):
    baseline.write_baseline(tmp_path, kept("m"))
    baseline.write_baseline(tmp_path, kept("gone", dtype="float16"))
    device = "Ascend910B4 (npu)"
    (text,) = baseline.without_a_case(tmp_path, {("m", "float32")}, device)
    assert "no case of this run is called gone float16, of which 1 rows are accepted: it was renamed or deleted" in text
    assert len(baseline.without_a_case(tmp_path, {("gone", "float32")}, device)) == 2
    assert (
        baseline.without_a_case(tmp_path, set(), "Ascend910B4 (emulated)")
        == []
        == baseline.without_a_case(tmp_path / "none", set(), device)
    )
    part = lambda cases: baseline.without_a_case(tmp_path, cases, device, whole=False)
    both = {("m", "float32"), ("gone", "float16")}
    assert part({("m", "float32")}) == ["1 accepted case had no row in this part of the tests"]
    assert part(set()) == ["2 accepted cases had no row in this part of the tests"] and part(both) == []
    (tmp_path / "m-float32.json").write_text("{")
    for text in (*part({("gone", "float16")}), part(set())[0]):
        assert "is damaged" in text
    assert part(set())[1:] == ["1 accepted case had no row in this part of the tests"]
    assert "is damaged" in baseline.without_a_case(tmp_path, {("gone", "float16")}, device)[0]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="baselines cannot be written to .*; name a folder that can be"):
        baseline.write_baseline(tmp_path / "file", kept("m"))


# -------- every output, the worst token


def several(error, digest, **more):
    """Rows whose output `b` is off by `error`, while the output that stands for them stays as it is."""
    outputs = {"a": Numbers(rel_l2=8e-3, shape=(8, 32)), "b": Numbers(rel_l2=error, shape=(8, 200))}
    return [
        row(seed=seed, error=8e-3, digest=f"{digest}{seed}", output="a", outputs=outputs, **more) for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("error", "kind"), [(6e-3, "REGRESSED"), (4.01e-6, "REGRESSED"), (3.99e-6, "DRIFT"), (1e-7, "DRIFT")]
)
def test_an_output_that_does_not_stand_for_the_row_is_followed_too(error, kind):
    result = baseline.verdicts(several(error, "now"), entry_of(several(1e-6, "then")))
    assert [item.kind for item in result] == [kind] * 3
    assert kind == "DRIFT" or "output b is off by" in result[0].text


def test_an_output_of_ten_elements_may_scatter_more():
    def small(error, digest):
        outputs = {"a": Numbers(rel_l2=8e-3, shape=(8, 32)), "b": Numbers(rel_l2=error, shape=(10,))}
        return [row(error=8e-3, digest=digest, output="a", outputs=outputs)]

    assert kinds(small(9.9e-6, "now"), small(1e-6, "then")) == ["DRIFT"]
    assert kinds(small(1.01e-5, "now"), small(1e-6, "then")) == ["REGRESSED"]


def test_the_worst_token_is_followed_though_the_whole_hardly_changes():
    def tokens(error, digest):
        return [row(error=8e-3, digest=digest, shape=(60000, 64), token_rel_l2=error)]

    for error, kind in ((4.9e-2, "DRIFT"), (5.1e-2, "REGRESSED")):  # a token of 64 elements has a slack of 5
        assert kinds(tokens(error, "now"), tokens(1e-2, "then")) == [kind]


def test_an_output_whose_reruns_scatter_as_much_is_no_worse():
    assert kinds(several(6e-3, "now", rerun={"rel_l2": 3e-3}), several(1e-6, "then")) == ["DRIFT"] * 3
    assert kinds(several(6e-3, "now", rerun={"rel_l2": 1e-3}), several(1e-6, "then")) == ["REGRESSED"] * 3


def test_what_is_followed_is_kept_in_the_file():
    stored = baseline.accepted(
        None, several(1e-6, "then", shape=(8, 32), token_rel_l2=1e-2), stack=STACK, backend="npu", when="2026-01-01"
    )
    kept = baseline._baseline(json.loads(json.dumps(stored.to_dict())))
    entry = kept.entries["Ascend910B4 (npu)"]
    assert [verdict.kind for verdict in baseline.verdicts(several(6e-3, "now"), entry)] == ["REGRESSED"] * 3


# -------- what the CPU computes


def of_norm(rms, digest, cpu=1e-6, **more):
    return [row(error=1e-6, digest=digest, rms=rms, cpu_golden_rel_l2=cpu, output="", shape=(8, 32), **more)]


@pytest.mark.parametrize(
    ("rms", "kind"),
    [(1 + 4.9e-6, "DRIFT"), (1 + 5.1e-6, "NOT COMPARABLE"), (1 - 5.1e-6, "NOT COMPARABLE"), (0.7, "NOT COMPARABLE")],
)
def test_another_result_of_the_cpu_is_not_comparable(rms, kind):
    (result,) = baseline.verdicts(of_norm(rms, "now"), entry_of(of_norm(1.0, "then")))
    assert result.kind == kind
    assert kind == "DRIFT" or "the model's code computes something else" in result.text


def test_results_that_are_no_longer_the_same_part_are_not_compared_by_their_norm():
    assert kinds(of_norm(0.7, "now", parted="at token 3"), of_norm(1.0, "then")) == ["DRIFT"]
    assert kinds(of_norm(0.7, "now", cpu=None), of_norm(1.0, "then")) == ["DRIFT"]
