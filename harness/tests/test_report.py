"""The report: full numbers in the JSON, honest words in the markdown, whole files or none."""

import base64
import datetime
import hashlib
import json
import math
import re
import time
from dataclasses import replace

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.verdict import NOTHING, Evidence, error, skipped
from harness.locate.finding import COMES_AND_GOES, INSIDE, LOOK
from harness.numerics.expected_error import Rules
from harness.report import Row, build, load, render, rerender, row, upgrade_text, write
from harness.report import rows as rows_module
from harness.report.content import NOT_RUN
from harness.report.document import Bullets, Folded, Table, Text, to_markdown, to_short_markdown
from harness.report.journal import DIED
from harness.report.page import BLOCK, PICTURED
from harness.report.rows import Excuse, Located
from harness.report.sentences import in_language
from harness.report.text import document, line_of, unlocated_count
from harness.report.words import EN, LANGUAGES
from harness.run.notes import UNMOVED
from harness.run.validation import DRAWN_THERE
from harness.upgrade.transitions import compare_reports

STACK = {
    "device": "Ascend910B4",
    "torch": "2.13.0",
    "conv_allow_hf32": True,
    "driver": None,
    "environment": {"TASK_QUEUE_ENABLE": "1"},
}


def verdict(change=0.0, limit=1e-2, **more):
    expected = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[0, 3, 4] += change
    return judge(compare(actual, expected), Tolerance(max_diff=limit, reason="because"), **more)


def row_of(verdict, seed=42, **more):
    given = {
        "test": f"cases/test_x.py::test_x[float32-seed{seed}]",
        "case": "x-large",
        "dtype": "float32",
        "seed": seed,
    }
    return row(**(given | more), verdict=verdict)


def report(*rows, backend="emulated", performance=()):
    return build(rows, stack=STACK, backend=backend, performance=performance)


def test_json_keeps_every_digit_and_no_nan_literal(tmp_path):
    result = verdict(1.0)
    stored = report(row_of(result), row_of(verdict(math.nan), seed=1), row_of(verdict(math.inf), seed=2))
    path, _ = write(stored, tmp_path)
    text = path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"literal {name}"))
    rows = load(path).rows
    assert rows[0].max_diff == result.comparison.max_diff
    assert rows[0].cos_sim == result.comparison.cos_sim
    assert math.isnan(rows[1].max_diff) and rows[2].max_diff == math.inf
    assert [item["max_diff"] for item in json.loads(text)["rows"][1:]] == ["nan", "inf"]
    assert rows[0].worst_index == (0, 3, 4)


def test_headline_counts_what_the_rows_say():
    stored = report(
        row_of(verdict()),
        row_of(verdict(1.0), seed=1),
        row_of(error("crashed"), seed=2),
        row_of(skipped("why"), seed=3),
    )
    assert stored.headline == {"PASS": 1, "FAIL": 1, "REGRESSED": 0, "ERROR": 1, "SKIPPED": 1, "NEW": 0}
    assert stored.to_dict()["schema"] == "precision-report/1"


def test_markdown_of_an_emulated_run_starts_by_saying_so():
    text = render(report(row_of(verdict())))
    assert text.splitlines()[0].startswith("**EMULATED")
    assert "nothing about hardware" in text.splitlines()[0]
    assert "EMULATED" not in render(report(row_of(verdict()), backend="npu"))


def test_a_stored_row_without_a_cosine_beside_one_that_has_it_is_shown():
    stored = [row_of(verdict(1e-3 * seed), seed=seed).to_dict() for seed in (1, 2, 3)]
    least = min(item["cos_sim"] for item in stored[1:])
    stored[0]["cos_sim"] = None
    assert f"least cos_sim {least:.9f}" in render(report(*map(Row.from_dict, stored)))
    for item in stored:
        item["cos_sim"] = None
    assert all(render(report(*map(Row.from_dict, stored)), lang=lang) for lang in ("en", "zh"))


def test_markdown_holds_the_columns_of_a_model_card():
    text = render(report(row_of(verdict(1e-3)), row_of(verdict(5.0), seed=123)))
    header = next(line for line in text.splitlines() if "max_diff" in line and line.startswith("|"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[2:6] == ["seed", "max_diff", "mean_diff", "cos_sim"] and columns[-1] == "result"
    assert columns[:2] == ["case", "dtype"]
    passed, failed = (
        next(line for line in text.splitlines() if line.startswith("|") and f" {seed} |" in line) for seed in (42, 123)
    )
    assert "✅ PASS" in passed and "1.00e-03" in passed
    assert "❌ FAIL" in failed
    assert "max_diff 5.00e+00 at (0, 3, 4) (up to 1.00e-02 allowed)" in text
    assert "Limits: max_diff ≤ 1.00e-02. because" in text
    assert "1 of 2 rows did not pass" in text


def test_a_report_without_failures_concludes_with_the_worst_numbers():
    text = render(report(row_of(verdict(1e-3)), row_of(verdict(2e-3), seed=1)))
    worst = verdict(2e-3).comparison.rel_l2
    assert f"All 2 rows pass on Ascend910B4: largest rel_l2 {worst:.2e}" in text


def test_weights_are_named_in_words():
    def evidence(weights):
        digests = dict.fromkeys(("inputs_sha256", "expected_sha256", "actual_sha256"), "0")
        return Evidence(weights=weights, reference="CPU float32", expected_ms=1.0, actual_ms=1.0, **digests)

    from dataclasses import replace

    seeded = render(report(row_of(replace(verdict(), evidence=evidence("seeded:7")))))
    assert "random, seed 7; no checkpoint was given" in seeded
    assert "Reference: CPU float32." in seeded
    assert "checkpoint, sha256 abc." in render(report(row_of(replace(verdict(), evidence=evidence("abc")))))


def test_performance_table_and_its_caveat():
    timing = {
        "case": "x",
        "dtype": "float32",
        "batch_size": 1,
        "device": "cpu",
        "n": 20,
        "warmup": 3,
        "avg_ms": 10.0,
        "p50_ms": 9.0,
        "p99_ms": None,
    }
    text = render(report(row_of(verdict()), performance=[timing]))
    assert "| x " in text and " – |" in text
    assert "times say nothing about hardware" in text
    assert "times say nothing" not in render(report(row_of(verdict()), performance=[timing], backend="npu"))


def test_chinese_report_has_the_same_numbers():
    stored = report(row_of(verdict(1e-3)))
    chinese = render(stored, lang="zh")
    assert chinese.startswith("**EMULATED") and "精度评测" in chinese and "1.00e-03" in chinese
    assert "Accuracy" not in chinese


# What stays as it is: names with a sign in them, code, quotations, statuses, and words of the field.
ALLOWED = re.compile(
    r"\S*[\d_./=:()\[\]`'\"]\S*|[A-Z]{2,}|FAIL|NaN|Inf|[a-z]+_[a-z_]+|float|seed|token|dtype|bool|x-large|silu|linear"
    r"|torch|top|fixture|transformers|nan|inf"
)


def english_left(text):
    """Runs of three or more English words in a text, with no Chinese between them."""
    result = []
    for line in re.split(r"[\n\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+", text):
        words = re.split(r"[^\x21-\x7e]+", line)
        run = []
        for word in [*words, ""]:
            if re.fullmatch("[A-Za-z][a-z']*[,;.:]?", word) and not ALLOWED.fullmatch(word):
                run.append(word)
                continue
            if len(run) >= 3:
                result.append(" ".join(run))
            run = []
    return result


def sentences_of_rows():
    """Rows whose sentences are those that runs say most."""
    half = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    broken = {
        "shape": compare(half[:, :4], half),
        "dtype": compare(half.half(), half),
        "NaN": compare(torch.full_like(half, math.nan), half),
        "both": compare(torch.full_like(half, math.nan), torch.full_like(half, math.nan)),
        "integers": compare(torch.tensor([1, 2]), torch.tensor([1, 3])),
        "zero": compare(half[:0], half[:0]),
        "scaled": compare(half * 3, half),
    }
    limits = {"scaled": Tolerance(cos_sim=0.9, reason="因为")}
    verdicts = [judge(item, limits.get(name, Tolerance(max_diff=0.1))) for name, item in broken.items()]
    texts = [
        NOT_RUN, DIED, NOTHING.text, UNMOVED, DRAWN_THERE, COMES_AND_GOES, LOOK, INSIDE,
        "forecast_ratio 9.74e+00 with 10.6 effective bits where a healthy device keeps 13.9 (up to 2.00e+00 allowed)",
        "slice_ratio 9.69e+00 at index 7 of axis 1, off by 0.00079 of its own norm (up to 7.50e+00 allowed)",
        "slice_ratio 5.60e+00 at values between 2^-3 and 2^-2, off by 0.011 of its own norm (up to 4.50e+00 allowed)",
        "slice_ratio 4.10e+01 at block 12 of 16 of row (1,), off by 0.01 of its own norm (up to 3.00e+00 allowed)",
        "Nothing was looked at: the time was over before the first of 414.",
        "Ascend310P3 has no bfloat16",
        "FELL BACK: computed by the CPU in place of the device: aten::i0; there CPU was compared with CPU",
        "no baseline for x float32 seed 1; accept this run with --precision-baseline=accept",
        "mlp: silu (a.py:2) is the first wrong operator: rel_l2 1 (up to 2 allowed). 3 more are wrong by themselves.",
        "All of it is multiplied by 1.001. 4 more were not looked at: the time was over.",
        "None of the 12 operators that the CPU runs is wrong with the CPU's inputs.",
        "The first call that shows it is a: b.",
        "Together they give a difference of 1.0e-3 of the row's 2.0e-2: its error is elsewhere.",
        str(Rules(family="Ascend A2")),
    ]  # fmt: skip
    return [row_of(item, seed=seed) for seed, item in enumerate(verdicts)] + [
        replace(row_of(error(text), seed=100 + seed), notes=(text,), located=Located(said=text), forecast=text)
        for seed, text in enumerate(texts)
    ]


@pytest.mark.parametrize("html", [False, True], ids=["markdown", "html"])
def test_no_english_is_left_in_a_chinese_report(html):
    text = render(report(*sentences_of_rows()), lang="zh", html=html)
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S)
    text = re.sub(r"<[^>]*>", " ", text)
    assert english_left(text) == []
    assert len(english_left(render(report(*sentences_of_rows())))) > 50  # and English is found where it is


@pytest.mark.parametrize(
    "text",
    [
        "where " * 400,
        "a where b was expected (" * 90,
        "x " * 1000,
        "1 elements are " * 150,
        "differ, the first at " * 100,
    ],
)
def test_a_long_text_is_said_in_chinese_at_once(text):
    began = time.perf_counter()
    in_language(text, "zh")
    assert time.perf_counter() - began < 2


def test_html_escapes_and_keeps_long_cells(tmp_path):
    stored = report(row_of(error("<script>alert(1)</script> " + "x" * 80), case="<b>case</b>"))
    write(stored, tmp_path)
    assert rerender(tmp_path / "precision.json", output=tmp_path / "page.html") is None
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "<b>case" not in page
    assert "x" * 80 in page


def test_cells_cannot_break_the_table():
    text = to_markdown([Table(columns=("a|b", "c"), rows=(("1|2\n3", "*x*"),)), Text(text="a `b` <c>")])
    assert "1\\|2 3" in text and "\\*x\\*" in text and "&lt;c>" in text and "a\\|b" in text
    assert len(text.splitlines()) == 5


# -------- nothing that a name or a reason holds is markup

HOSTILE = {
    "link": ("[click](http://evil)", "[click\\](http://evil)"),
    "definition": ("[x]: http://evil", "[x\\]: http://evil"),
    "heading": ("# large", "\\# large"),
    "list": ("- item", "\\- item"),
    "numbers": ("1. item", "1\\. item"),
    "quotation": ("> said", "\\> said"),
    "emphasis": ("_slanted_ and ~~gone~~", "\\_slanted\\_ and \\~\\~gone\\~\\~"),
    "words with underscores": ("max_diff", "max_diff"),
    "entity": ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
    "tag": ("</details><img src=x>", "&lt;/details>&lt;img src=x>"),
    "direction": ("a\u202eb\u2066c", "a\\\\u202eb\\\\u2066c"),
    "terminal": ("\x1b[31mred\x07", "\\\\x1b[31mred\\\\x07"),
    "half a pair": ("\ud800", "\\\\ud800"),
    "lines": ("a\n\n# b\u2028c", "a # b c"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_is_markup_in_markdown(kind):
    text, expected = HOSTILE[kind]
    assert to_markdown([Text(text=text)]).rstrip("\n") == expected
    assert to_markdown([Bullets(items=(text,))]).rstrip("\n") == f"- {expected}"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_text_is_markup_anywhere_in_a_report(tmp_path, lang):
    for text, _ in HOSTILE.values():
        broken = replace(row_of(error(text), case=text), test=text, notes=(text,), located=Located(said=text))
        stored = report(broken, row_of(verdict(), case=text))
        for html in (False, True):
            rendered = render(stored, lang=lang, html=html)
            rendered.encode()  # a lone surrogate would end the writing
            assert not set(rendered) & set("\u202e\u2066\x1b\x07\u2028\ud800")
            assert "<img src=x" not in rendered and ("](http" not in rendered or "\\](http" in rendered or html)
            for line in rendered.splitlines():
                assert not line.startswith(("# large", "# b", "> said", "[x]:"))


def test_a_picture_of_another_folder_is_not_read(tmp_path):
    (tmp_path / "secret.svg").write_text("<svg>secret</svg>")
    folder = tmp_path / "reports"
    for path in ("../secret.svg", str(tmp_path / "secret.svg"), "absent.svg", "javascript:alert(1)"):
        bad = replace(row_of(verdict(1.0)), located=Located(said="there", picture=path))
        write(report(bad), folder)
        rerender(folder, output=tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert base64.b64encode(b"<svg>secret").decode()[:12] not in page and 'alt="error over depth"' not in page
    assert "(javascript%3Aalert" in render(report(bad))
    (folder / "depth.svg").write_text("<svg>depth</svg>")
    write(report(replace(bad, located=Located(said="there", picture="depth.svg"))), folder)
    rerender(folder, output=tmp_path / "page.html")
    assert 'alt="error over depth"' in (tmp_path / "page.html").read_text()


# -------- what failed comes first, and no report is too long


def test_what_failed_comes_first_with_where_it_comes_from():
    bad = replace(row_of(verdict(5.0), seed=7), located=Located(said="trunk.0: silu is wrong. More of it."))
    lines = render(report(row_of(verdict()), row_of(verdict(), seed=1), bad)).splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("- FAIL"))
    assert place < next(place for place, line in enumerate(lines) if line.startswith("|"))
    assert lines[place].startswith("- FAIL x-large float32 seed 7: max_diff 5.00e+00 at (0, 3, 4)")
    assert lines[place].endswith("→ trunk.0: silu is wrong")
    page = render(report(row_of(verdict()), bad), html=True)
    first = page.index("<tr data-status")
    assert page[first:].startswith('<tr data-status="FAIL"') and 'href="#row0"' in page and 'id="row0"' in page


def test_a_sentence_that_holds_for_all_rows_is_said_once_and_others_name_their_case():
    rows = [replace(row_of(verdict(), case=case), reference="CPU float32", notes=("alone",) * (case == "b"))
            for case in "abc"]  # fmt: skip
    text = render(report(*rows))
    assert text.count("Reference: CPU float32.") == 1 and "- Reference: CPU float32." in text
    assert "- b float32 seed 42: alone" in text


def probes(count, bad=0):
    good, wrong, made = row_of(verdict(1e-3)), row_of(verdict(5.0)), []
    for number in range(count):
        test = f"cases/test_ops.py::test_precision[{number}]"
        case = f"{'matmul' if number % 2 else 'exp'}, n {number}"
        made.append(replace(wrong if number < bad else good, test=test, case=case, forecast_ratio=1.0 + number))
    return made


def test_probes_are_counted_by_operator_and_in_full_where_they_fail():
    text = render(report(*probes(20, bad=1)))
    tables = [line.replace(" ", "") for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("|exp|float32|10|19|") and "1FAIL" in line and "9PASS" in line for line in tables)
    assert any(line.startswith("|matmul|float32|10|20|") and "10PASS" in line for line in tables)
    assert any(line.startswith("|exp,n0|") for line in tables)
    assert not any(line.startswith("|exp,n2|") for line in tables)


@pytest.mark.parametrize(
    ("kind", "count"),
    [*((kind, n) for kind in ("cases", "probes") for n in (1, 700, 20_000)), ("long", 1), ("long", 300)],
)
def test_no_report_is_longer_than_a_comment_may_be(kind, count):
    if kind == "probes":
        rows = probes(count, bad=count)
    else:
        one = row_of(verdict(5.0), case="x" * (20_000 if kind == "long" else 20))
        rows = [
            replace(one, seed=seed, reasons=("a reason " * (900 if kind == "long" else 9),)) for seed in range(count)
        ]
    began = time.perf_counter()
    text = render(report(*rows))
    assert len(text) < 65_536 and time.perf_counter() - began < 20
    assert len(render(report(*rows), lang="zh").encode()) < STEP_SUMMARY
    assert text.splitlines()[2].startswith(f"# Accuracy report: {count} FAIL")
    assert count == 1 or "more" in text


STEP_SUMMARY = 1 << 20  # bytes of the summary of a step that GitHub takes, all that the step writes there together


def test_what_a_gate_says_of_thousands_of_rows_fits_in_the_summary_of_a_step():
    good, bad = row_of(verdict(), case="模型" * 40), row_of(verdict(5.0), case="模型" * 40)
    before, after = (report(*(replace(one, seed=seed) for seed in range(20_000))) for one in (good, bad))
    result = compare_reports(before, after)
    text = upgrade_text(result, title="gate", every=True)
    assert result.counts() == {"NEW FAILURE": 20_000} and "20000 NEW FAILURE" in text
    assert 10_000 < len(text.encode()) < STEP_SUMMARY


def test_a_page_reads_what_was_measured_for_its_pictures_alone(tmp_path, monkeypatch):
    write(report(*(replace(row_of(verdict(5.0)), seed=seed) for seed in range(PICTURED + 5))), tmp_path)
    stored, read = load(tmp_path), []
    read_one = rows_module._MEASURED
    monkeypatch.setattr(rows_module, "_MEASURED", lambda value: read.append(value) or read_one(value))
    assert render(stored, html=True).count("data:image/svg") == PICTURED == len(read)


def test_rows_are_laid_out_by_hundreds_in_columns_of_given_widths():
    rows = [replace(row_of(verdict(5.0 * (seed == 7))), seed=seed) for seed in range(2 * BLOCK + 1)]
    for lang in ("en", "zh"):
        page = render(report(*rows), html=True, lang=lang)
        bodies = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)
        assert [body.count("<tr data-status") for body in bodies[:3]] == [BLOCK, BLOCK, 1]
        columns = re.search(r"grid-template-columns: (.*?) }", page)[1].split()
        for line in bodies[0].strip().splitlines():
            below = line.count('<td class="reason">')  # a line of its own, and no column
            assert line.count("<td") == len(columns) + below and below == line.count('class="with-reason"')
        assert bodies[0].count('<td class="reason">') == 1
        assert len(re.findall("<th[ >]", page.partition("<tbody>")[0])) == len(columns)
        assert float(columns[1].removesuffix("ch")) >= 0.9 * len("x-large")


def test_many_marks_take_lines_and_no_width():
    marks = (Mark.NONDETERMINISTIC, Mark.NEAR_TIE, Mark.NEW)
    for passed in (row_of(verdict()), replace(row_of(verdict()), marks=marks)):
        page = render(report(passed, row_of(verdict(5.0), seed=1)), html=True)
        width = float(re.search(r"grid-template-columns: ([0-9.]+)ch", page)[1])
        assert width <= 1.15 * 17 + 2 and 17 >= len(Mark.NONDETERMINISTIC)


def test_the_stack_is_left_out_after_all_else_that_is_folded():
    def folded(summary, **more):
        return Folded(summary=summary, blocks=(Bullets(items=tuple("x" * 50 for _ in range(5))),), **more)

    blocks = [folded("reasons"), folded("stack", left_out_last=True), folded("numbers")]
    whole = to_markdown(blocks)
    texts = [
        to_short_markdown(blocks, left_out="{count} out", longest=longest) for longest in (len(whole) + 10, 800, 500)
    ]
    left = [[name for name in ("reasons", "stack", "numbers") if f"{name}: 5 out" in text] for text in texts]
    assert left == [[], ["numbers"], ["reasons", "numbers"]]
    assert render(report(row_of(verdict()))).rstrip().endswith("</details>")  # the stack is the last of a report
    (last,) = document(report(row_of(verdict())))[-1:]
    assert last.summary == "Environment" and last.left_out_last


def test_a_row_says_in_words_how_many_reasons_it_has():
    expected = torch.ones(4, 4)
    one, two, three = (
        judge(compare(expected + 1, expected), Tolerance(reason="因为", **dict.fromkeys(names, 0.1)))
        for names in (("max_diff",), ("max_diff", "rel_l2"), ("max_diff", "rel_l2", "mean_diff"))
    )
    lines = [line_of(row_of(item), EN) for item in (one, two, three)]
    assert "more" not in lines[0] and lines[1].endswith(" (and 1 more reason)")
    assert lines[2].endswith(" (and 2 more reasons)")
    assert line_of(row_of(three), LANGUAGES["zh"]).endswith("（另有 2 条原因）")


def test_failing_rows_that_were_not_located_are_counted():
    located = replace(row_of(verdict(5.0)), located=Located(said="there"))
    same, other = row_of(verdict(5.0), seed=1), row_of(verdict(5.0), case="other", seed=2)
    assert unlocated_count([located, same, other, row_of(error("gone"), case="third", seed=3)]) == 1
    assert unlocated_count([same, other]) == 0  # where none was located, nobody asked for it
    assert "Failing rows of other cases that were not located: 1." in render(report(located, same, other))
    assert "not located" not in render(report(located, same))


def test_a_page_of_thousands_of_rows_is_made_in_seconds(tmp_path):
    one = row_of(verdict(5.0))
    began = time.perf_counter()
    page = render(report(*(replace(one, seed=seed) for seed in range(2000))), html=True)
    assert time.perf_counter() - began < 20 and page.count("<tr data-status") == 2000 and len(page) < 6_000_000
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    for kind in ("style", "script"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "http://" not in page and "https://" not in page


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write(report(row_of(verdict())), tmp_path)
    before = (tmp_path / "precision.json").read_text()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(report(row_of(verdict()), row_of(verdict(), seed=1)), tmp_path)
    assert (tmp_path / "precision.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precision.json", "precision.md"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "it is not JSON"),
        ("[]", "schema None"),
        ('{"schema": "precision-report/9"}', "'precision-report/9'"),
        ('{"schema": "precision-report/1"}', "lacks backend, created, headline"),
    ],
    ids=["text", "list", "newer", "empty"],
)
def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "precision.json"
    path.write_text(content)
    with pytest.raises(HarnessError, match=words):
        load(path)
    with pytest.raises(HarnessError, match="no report at"):
        load(tmp_path / "absent.json")


# -------- the outcome in one word


@pytest.mark.parametrize(
    "rows, word",
    [
        ((), "nothing measured"),
        (("SKIPPED",), "nothing measured"),
        (("PASS", "SKIPPED"), "passed"),
        (("KNOWN", "PASS"), "passed"),
        (("PASS", "lost"), "infrastructure"),
        (("gone", "PASS"), "infrastructure"),
        (("crashed", "PASS"), "infrastructure"),
        (("REGRESSED", "lost"), "regressions"),
        (("REGRESSED", "FAIL", "lost"), "failures"),
        (("ERROR", "PASS"), "failures"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "none",
)
def test_the_outcome_is_the_gravest_thing_that_is_true(tmp_path, rows, word):
    base = Row.of(error("why"), test="t", case="c", dtype="float32", seed=1)
    known = Excuse(reason="r", link="l", expires=datetime.date(2030, 1, 1))
    made = {
        "PASS": dict(criteria=(), reasons=(), rel_l2=0.1),
        "FAIL": dict(criteria=("rel_l2",), rel_l2=0.1),
        "REGRESSED": dict(criteria=("baseline",), rel_l2=0.1),
        "SKIPPED": dict(criteria=("skip",)),
        "ERROR": {},
        "KNOWN": dict(criteria=("rel_l2",), rel_l2=0.1, marks=(Mark.KNOWN,), known=known),
        "lost": dict(reasons=(NOT_RUN,)),
        "gone": dict(reasons=("DeviceError: the device stopped computing at c float32 seed 1: 507035; restart it",)),
        "crashed": dict(marks=(Mark.CRASHED,)),
    }
    report = build([replace(base, seed=n, **made[item]) for n, item in enumerate(rows)], stack={}, backend="cpu")
    assert report.outcome == word
    write(report, tmp_path)
    assert json.loads((tmp_path / "precision.json").read_text())["outcome"] == word
    assert load(tmp_path).outcome == word


def test_pictures_of_a_page_are_in_its_language():
    for lang, caption in (("en", "elements by"), ("zh", "元素个数")):
        page = render(report(row_of(verdict(5.0))), html=True, lang=lang)
        (drawn,) = (base64.b64decode(item).decode() for item in re.findall(r"svg\+xml;base64,([^\"]*)", page))
        assert caption in drawn


def test_the_gate_shows_what_changed_without_signs_of_python():
    faulty = STACK | {"faults": ("aclnnSilu:hf32", "aclnnGelu:hf32"), "environment": {"A": "1", "B": "2"}}
    one = build([row_of(verdict())], stack=STACK, backend="emulated")
    other = build([row_of(verdict())], stack=faulty, backend="emulated")
    text = upgrade_text(compare_reports(one, other), title="gate")
    assert "| aclnnSilu:hf32, aclnnGelu:hf32 " in text and "['" not in text
