"""A row as a value: what is written is read again, what an older version wrote too, and what cannot be is refused in
one sentence.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.commands.main import main
from harness.errors import HarnessError
from harness.judging.criteria import FLOORED
from harness.judging.status import Mark, Status, leads_to, status_of
from harness.judging.verdict import Evidence, error, skipped
from harness.measure import Comparison
from harness.reference.origin import Origin
from harness.report import (
    Report,
    Row,
    json_schema,
    layout,
    load,
    rejudged_rows,
    render,
    upgrade_text,
    verdicts_text,
    write,
)
from harness.report import rows as rows_module
from harness.report.plot import _series
from harness.report.rows import NUMBERS, RATIOS, Change, Numbers, Proof
from harness.tests.mutations import damaged, mutated
from harness.typed_json import Mismatch, fields_of, parse_json, read_fields
from harness.upgrade import baseline
from harness.upgrade.ratchet import loose
from harness.upgrade.transitions import compare_reports

STORED = Path(__file__).parent / "stored"
ACCEPTED = next((Path(__file__).parents[2] / "reports" / "accepted").glob("*/precision.json"))
REPORTS = [*sorted(STORED.glob("report-*.json")), ACCEPTED]
BASELINES = sorted(STORED.glob("baseline-*.json"))
NEWEST = STORED / "report-2026-11-26.json"


def name_of(path):
    return path.stem if path.parent == STORED else "accepted"


def a_row(**more):
    expected = torch.ones(4, 8)
    verdict = judge(compare(expected * 1.001, expected), Tolerance(rel_l2=1e-2, reason="because"))
    return replace(Row.of(verdict, test="t::test[1]", case="mine", dtype="float32", seed=1), **more)


# -------- there and back


def test_the_fields_of_a_row_have_the_types_of_what_they_are_taken_from():
    measured, numbers = fields_of(Comparison), fields_of(Numbers)
    shared = numbers.keys() & measured.keys()
    assert {*NUMBERS} - shared == {"max_diff_rms", "snr"}
    assert all(numbers[name] == measured[name] | None for name in shared)
    assert fields_of(Proof) == {name: kind | None for name, kind in fields_of(Evidence).items()}
    assert RATIOS[-len(FLOORED) :] == FLOORED


def test_a_row_whose_case_is_not_known_is_called_by_its_test():
    assert a_row().name == "mine float32 seed 1"
    unknown = dict(test="cases/test_it.py::test_precision[7]", case="cases/test_it.py", dtype=None, seed=None)
    early = Row.of(error("it did not run"), **unknown)
    assert early.name == early.key[0] == "cases/test_it.py::test_precision[7]"


def test_a_row_is_what_it_was_written_as():
    row = a_row(marks=(Mark.NEW,))
    again = Row.from_dict(json.loads(json.dumps(row.to_dict())))
    assert again.to_dict() == row.to_dict() and again.comparisons == row.comparisons and again.status is Status.PASS
    assert list(row.to_dict())[:9] == [
        "test",
        "case",
        "dtype",
        "seed",
        "output",
        "status",
        "marks",
        "reasons",
        "criteria",
    ]
    with pytest.raises(FrozenInstanceError):
        row.case = "other"


def only(stored, written):
    """Of what is written now the names that an older version stored: metrics came later."""
    if isinstance(stored, dict):
        return {name: only(item, written[name]) for name, item in stored.items()}
    if isinstance(stored, list) and len(stored) == len(written):
        return [only(*items) for items in zip(stored, written)]
    return written


@pytest.mark.parametrize("path", REPORTS, ids=name_of)
def test_a_report_of_every_version_is_read_and_written_with_the_same_values(path):
    stored, report = json.loads(path.read_text(encoding="utf-8")), load(path)
    again = report.to_dict()
    assert (
        all(again["headline"][name] == count for name, count in stored["headline"].items())
        and stored["stack"] == again["stack"]
    )
    for before, after in zip(stored["rows"], again["rows"], strict=True):
        decided = before.pop("decisions")  # which have more names now
        assert before == only(before, after)
        assert decided is None or decided == {name: after["decisions"][name] for name in decided}
    assert render(report) and render(report, lang="zh", html=True)
    assert compare_reports(report, report).to_dict()["counts"]


@pytest.mark.parametrize("path", BASELINES, ids=name_of)
def test_a_baseline_of_every_version_is_read_and_written_with_the_same_values(path):
    stored, read = json.loads(path.read_text(encoding="utf-8")), baseline.load_baseline(path)
    ((device, before),) = stored["entries"].items()
    after = read.to_dict()["entries"][device]
    assert before["stack"] == after["stack"] and (stored["case"], stored["dtype"]) == (read.case, read.dtype)
    for seed, row in before["rows"].items():
        assert row == only(row, after["rows"][seed])


def test_a_report_that_lacks_a_metric_of_a_later_version_is_judged_and_the_metric_is_not(tmp_path):
    """What was not measured is NaN: a limit on it fails, and nothing else does."""
    stored = json.loads(NEWEST.read_text(encoding="utf-8"))
    stored["rows"] = [row for row in stored["rows"] if row["status"] == "PASS"]
    for row in stored["rows"]:
        for kept in row["measured"].values():
            for side in ("comparison", "golden", "cpu", "forecast"):
                for metric in ("balance", "ulp_max"):
                    kept.get(side, {}).pop(metric, None)
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(stored))
    assert {verdict.status for _, verdict in rejudged_rows(load(path), None)} == {Status.PASS}
    for row in stored["rows"]:
        for kept in row["measured"].values():
            kept["comparison"].pop("max_diff")
    path.write_text(json.dumps(stored))
    assert {verdict.status for _, verdict in rejudged_rows(load(path), "card")} == {Status.FAIL}


# -------- one status


def test_the_status_is_decided_in_one_place():
    cases = {
        (): Status.PASS,
        ("baseline",): Status.REGRESSED,
        ("max_diff", "baseline"): Status.FAIL,
        ("skip", "max_diff"): Status.SKIPPED,
        ("run", "skip"): Status.ERROR,
    }
    for criteria, expected in cases.items():
        assert status_of([leads_to(item) for item in criteria], compared=True) is expected
        assert a_row(reasons=criteria, criteria=criteria).status is expected
    assert (
        status_of([], compared=False) is Status.ERROR and status_of([Status.REGRESSED], compared=False) is Status.ERROR
    )
    for verdict in (
        error("crashed"),
        skipped("no card"),
        judge(compare(torch.ones(2), torch.zeros(2)), Tolerance(max_diff=0.5)),
    ):
        assert Row.of(verdict, test="t", case="c", dtype=None, seed=None).status is verdict.status


def test_words_of_the_report_are_text_everywhere():
    assert f"{Status.PASS} {Mark.NEAR_TIE}" == "PASS NEAR TIE" == str(Status.PASS) + " " + Mark.NEAR_TIE
    assert json.dumps([Status.FAIL, Mark.UNDECIDABLE]) == '["FAIL", "UNDECIDABLE"]'
    assert {"CRASHED", "HUNG", "RERUN", "UNDECIDABLE"} <= set(Mark)
    assert [item for item in Status if item.is_fine] == ["PASS", "SKIPPED"]


# -------- what cannot be


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"status": "OK"},
            (
                r"status: 'OK' where one of PASS, FAIL, REGRESSED, ERROR, SKIPPED "
                r"\(a newer version may have written it\) was expected"
            ),
        ),
        ({"marks": ["BLESSED"]}, r"marks\[0\]: 'BLESSED' where one of"),
        ({"status": "FAIL"}, "status: FAIL where PASS, to which its reasons and numbers lead, was expected"),
        ({"status": "PASS", "reasons": ["x"], "criteria": ["max_diff"]}, "status: PASS where FAIL"),
        ({"reasons": ["x"]}, "criteria: 0 criteria where one for each of 1 reasons was expected"),
        ({"rel_l2": None}, "status: PASS where ERROR"),
        ({"rel_l2": -1e-9}, "rel_l2: -1e-09 where zero or more was expected"),
        ({"golden_rel_l2": -1.0}, "golden_rel_l2: -1.0 where zero or more"),
        ({"cos_sim": 1.000014}, "cos_sim: 1.000014 where between -1 and 1 was expected"),
        ({"max_diff": "small"}, "max_diff: 'small' where a number was expected"),
        ({"max_diff": True}, "max_diff: true where a number was expected"),
        ({"seed": 1.5}, "seed: 1.5 where a whole number was expected"),
        ({"shape": [4, "x"]}, r"shape\[1\]: 'x' where a whole number was expected"),
        ({"limits": {"niceness": 1}}, "limits: 'niceness' where one of max_diff"),
        ({"preset": "best"}, "preset: 'best' where one of floor"),
        ({"marks": ["KNOWN FAILURE"]}, "marks: the mark KNOWN FAILURE where a row that fails"),
        ({"located": "x"}, "located: 'x' where an object was expected"),
        ({"baseline": {"kind": "RERUN", "text": ""}}, "baseline.kind: RERUN says nothing of a baseline"),
        ({"measured": {"output": {"golden": {}}}}, "measured.output.comparison: nothing where a value was expected"),
        ({"test": 1}, "test: 1 where text was expected"),
        ({"weights_from": "inf"}, "weights_from: 'inf' where one of loaded, partly, built, none, and a path after"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(tmp_path, change, words):
    sound = load(NEWEST).to_dict()
    stored = sound | {"rows": [sound["rows"][1], a_row().to_dict() | change]}
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(HarnessError, match=words) as raised:
        load(path)
    said = str(raised.value)
    assert (
        said.startswith(f"{path}: row 2")
        and "\n" not in said
        and said.endswith("write the file again with `pytest -k precision`")
    )


@pytest.mark.parametrize("origin", Origin)
def test_every_origin_of_weights_is_read_and_has_its_words(origin):
    stored = a_row().to_dict() | {"weights": "seeded:0", "weights_from": f"{origin.value}:a/b" if origin.value else ""}
    row = Row.from_dict(stored)
    for lang in ("en", "zh"):
        assert ("a/b" in render(replace(load(NEWEST), rows=(row,)), lang=lang)) == (
            origin.value in ("loaded", "partly")
        )


def test_a_cosine_beyond_one_by_rounding_alone_is_read():
    assert Row.from_dict(a_row().to_dict() | {"cos_sim": 1 + 5e-10}).cos_sim > 1
    with pytest.raises(HarnessError):
        Row.from_dict(a_row().to_dict() | {"cos_sim": 1 + 2e-9})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested more deeply than 64 levels"),
        ("[" * 70 + "]" * 70, "nested more deeply than 64 levels"),
        ('{"a": 1, "a": 2}', "an object holds 'a' twice"),
        ('{"a": NaN}', "it holds NaN where a number is text"),
        ("1" * 5000, "a whole number of 5000 digits"),
    ],
    ids=["deep", "deeper", "twice", "literal", "digits"],
)
def test_json_that_is_not_read_says_why(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    assert parse_json("[" * 64 + "]" * 64)


def test_half_of_a_character_is_written_as_its_escape(tmp_path):
    row = Row.of(error("no \udcff file"), test="t\ud800", case="c", dtype=None, seed=None)
    assert json.dumps(row.to_dict(), ensure_ascii=False).encode("utf-8")
    assert parse_json('{"a\\udcff": ["\\ud83d\\ude00", "\\ud83d"]}') == {"a\\udcff": ["😀", "\\ud83d"]}


# -------- a file that is as it was written


def written(tmp_path, *rows):
    """The file of a report whose rows have numbers to read; and those rows, read from the sample."""
    report = load(NEWEST)
    rows = rows or tuple(row for row in report.rows if row.comparisons)
    return write(replace(report, rows=rows), tmp_path)[0], rows


def test_a_file_as_it_was_written_is_read_without_what_was_measured(tmp_path, monkeypatch):
    path, rows = written(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(rows_module, "_MEASURED", lambda value: pytest.fail("it was read at once"))
        report = load(path)
        assert [row.rel_l2 for row in report.rows] == [row.rel_l2 for row in rows]
        assert compare_reports(report, load(path)).passed
    assert len(rows) > 3 and any(row.references for row in rows)
    for row, again in zip(rows, report.rows, strict=True):
        assert again.comparisons == row.comparisons and again.references == row.references
        assert dict(again.comparisons) == dict(row.comparisons) and again.to_dict() == row.to_dict()
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["rows"] == [json.loads(json.dumps(row.to_dict())) for row in rows]


def test_a_file_without_rows_is_as_it_was_written(tmp_path):
    path, _ = write(replace(load(NEWEST), rows=()), tmp_path)
    assert layout.unchanged(path.read_bytes()).rows == [] and load(path).rows == ()


DAMAGE = {
    "a number": ('"nan_actual": 0', '"nan_actual": -1', "where zero or more was expected"),
    "a word": ('"expected_dtype": "float32"', '"expected_dtype": 3', "expected_dtype: 3 where text was expected"),
    "a name twice": ('"comparison": {', '"comparison": {"shape": [], ', "holds 'shape' twice"),
    "the end": (" ]\n}\n", "", "it is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_was_changed_is_read_and_checked_whole(tmp_path, damage):
    """With its old digest at once, with a digest that was made to fit when what is wrong is used; in the same words."""
    before, after, words = DAMAGE[damage]
    path, _ = written(tmp_path)
    text = path.read_text(encoding="utf-8")
    changed = after.join(text.rsplit(before, 1))
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(HarnessError, match=words) as at_once:
        load(path)
    rows = changed[changed.index(' "rows": [\n') + 11 : -5]
    path.write_text(re.sub(r'(?<="rows_sha256": ")\w+', hashlib.sha256(rows.encode()).hexdigest(), changed))
    with pytest.raises(HarnessError, match=words) as later:
        rejudged_rows(load(path), None)
    if damage not in ("a name twice", "the end"):
        assert str(later.value) == str(at_once.value)


def test_many_fields_are_read_as_one_by_one():
    """`FieldReader` against `read_fields`, whose plain loop says what is right."""
    quick, results = rows_module.READ_ROW, Counter()
    stored = next(row for row in json.loads(NEWEST.read_text(encoding="utf-8"))["rows"] if row["status"] == "PASS")
    del stored["measured"]
    for text in mutated(json.dumps(stored), 4000):
        with contextlib.suppress(ValueError):
            changed = parse_json(text)
            outcomes = [outcome_of(lambda: read_fields(changed, quick.readers.items(), quick.needed))]
            outcomes += [outcome_of(lambda: quick(changed)) for _ in range(2)]
            assert repr(outcomes[0]) == repr(outcomes[1]) == repr(outcomes[2])
            results[type(outcomes[0])] += 1
    assert results[str] > 500 and results[dict] > 500


def outcome_of(read):
    """What is read, or the words of the refusal."""
    try:
        return read()
    except Mismatch as error:
        return str(error)


# -------- the schema


@pytest.mark.parametrize("path", REPORTS, ids=name_of)
def test_stored_reports_meet_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    check.check_schema(check.schema)
    check.validate(json.loads(path.read_text(encoding="utf-8")))
    written = load(path).to_dict()
    check.validate(json.loads(json.dumps(written)))
    for change in (
        {"rel_l2": -1.0},
        {"status": "OK"},
        {"shape": ["x"]},
        {"measured": {"output": {}}},
        {"cos_sim": 2.0},
    ):
        assert not check.is_valid(written | {"rows": [written["rows"][0] | change]}), change


@pytest.mark.parametrize("path", BASELINES, ids=name_of)
def test_stored_baselines_meet_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(baseline.baseline_schema())
    check.check_schema(check.schema)
    check.validate(json.loads(path.read_text(encoding="utf-8")))
    check.validate(json.loads(json.dumps(baseline.load_baseline(path).to_dict())))
    assert not check.is_valid(baseline.load_baseline(path).to_dict() | {"entries": []})


def test_the_schemas_are_printed(capsys):
    for name, schema in (("report", json_schema()), ("baseline", baseline.baseline_schema())):
        assert main(["report", "--schema", name]) == 0
        assert json.loads(capsys.readouterr().out) == schema
    assert main(["report"]) == 1 and "name a report" in capsys.readouterr().err


# -------- files that went wrong


def small() -> Report:
    """A row with two outputs and decisions, a known failure, an error that was located; one output's numbers are
    enough.
    """
    report = load(NEWEST)
    rows = [row for row in report.rows if row.case in ("several", "known", "raises")]
    noisy = {"max_diff": 1e-3, "rel_l2": 1e-4, "unequal": 3}
    beside = Change(kind=Mark.DRIFT, text="said", ratio=1.01)
    rows[0] = replace(
        rows[0],
        rerun=noisy,
        conditioning=3.0,
        stored=("cpu",),
        parted="at token 3",
        card="0",
        baseline=beside,
        marks=(Mark.NONDETERMINISTIC, Mark.DRIFT),
    )
    return replace(
        report, stack={"device": report.stack["device"], "faults": ["x"], "environment": {"A": "1"}}, rows=tuple(rows)
    )


def use(report: Report, sound: Report) -> None:
    """What every reader of a report does with it, short of tables."""
    rejudged_rows(report, None), rejudged_rows(report, "cann")
    assert all(compare_reports(*pair).to_dict() for pair in ((report, sound), (sound, report)))
    loose(report.rows, every=True)
    _series([report, sound], baseline.error_of)


def show(report: Report, sound: Report) -> None:
    """The tables of every reader of a report, which take longer than all the rest."""
    assert verdicts_text(rejudged_rows(report, None), title="as it was").encode("utf-8")
    assert upgrade_text(compare_reports(report, sound), title="gate").encode("utf-8")
    assert all(render(report, lang=lang, html=lang == "zh").encode("utf-8") for lang in ("en", "zh"))


def test_a_damaged_report_is_read_or_refused_in_one_line(tmp_path):
    sound, path = small(), tmp_path / "precision.json"
    refused, read, tracebacks = 0, 0, []
    whole, _ = write(sound, tmp_path)
    texts = itertools.chain(mutated(json.dumps(sound.to_dict()), 4500), damaged(whole.read_text(encoding="utf-8"), 500))
    for number, text in enumerate(texts):
        path.write_text(text, encoding="utf-8")
        try:
            report = load(path)
            read += 1
            use(report, sound)
            if read % 20 == 0:
                show(report, sound)
        except HarnessError as error:
            refused += 1
            assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1500, str(error)
        except Exception as error:
            tracebacks.append(f"{number}: {type(error).__name__}: {error}"[:200])
    assert not tracebacks
    assert refused > 2500 and read > 500  # the changes are neither all seen nor all harmless


def test_a_damaged_baseline_is_read_or_refused_in_one_line(tmp_path):
    rows = [row for row in small().rows if row.case == "several"]
    stack, backend = small().stack, small().backend
    sound = baseline.accepted(
        None,
        [replace(rows[0], seed=seed) for seed in (1, 2, 3)],
        stack={"device": stack["device"]},
        backend=backend,
        when="2026-11-26",
    )
    path, refused, read, tracebacks = tmp_path / "several-float16.json", 0, 0, []
    for number, text in enumerate(mutated(json.dumps(sound.to_dict()), 2000)):
        path.write_text(text, encoding="utf-8")
        try:
            stored = baseline.load_baseline(path)
            entry = baseline.entry_of(stored, stack, backend)
            baseline.settled_entries(rows, entry)
            baseline.loosened(entry, rows), baseline.absent(entry, rows)
            json.dumps(
                baseline.accepted(stored, rows, stack=stack, backend=backend, when="2026-11-27").to_dict(),
                allow_nan=False,
            )
            read += 1
        except HarnessError as error:
            refused += 1
            assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1500, str(error)
        except Exception as error:
            tracebacks.append(f"{number}: {type(error).__name__}: {error}"[:200])
    assert not tracebacks
    assert refused > 800 and read > 200
