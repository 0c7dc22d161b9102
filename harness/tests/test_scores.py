"""Scores of datasets: judged one-sidedly with stated errors, read from the files of other tools."""

import json
import math
import random
from statistics import NormalDist

import pytest

from harness import HarnessError
from harness.commands.main import main
from harness.judging.scores import ALPHA, BETA, EFFECT, Decision, Score, _sign_test, judge_score
from harness.scores import read_scores


def answers(count, wrong=()):
    """So many samples, all of them right but these."""
    samples = {str(number): 0.0 if number in set(wrong) else 1.0 for number in range(count)}
    return Score(value=sum(samples.values()) / count, count=count, samples=samples)


# -------- the judgement


def test_the_defaults_are_stated():
    assert (ALPHA, BETA, EFFECT) == (0.05, 0.2, 0.03)


def test_only_a_lower_score_fails():
    low, high = Score(value=0.6, count=4000), Score(value=0.8, count=4000)
    assert judge_score(low, high).decision is Decision.FAIL
    assert judge_score(high, low).decision is Decision.PASS


@pytest.mark.parametrize(("drop", "decision"), [(1.63, Decision.PASS), (1.66, Decision.FAIL)])
def test_a_drop_fails_from_the_quantile_of_alpha_on(drop, decision):
    """Standard errors of 0.3 and 0.4 points make 0.5; the quantile of 95 % is 1.645."""
    device = Score(value=0.5 - drop * 0.005, count=10_000, error=0.003)
    verdict = judge_score(device, Score(value=0.5, count=10_000, error=0.004))
    assert verdict.decision is decision and verdict.threshold == pytest.approx(1.6448536 * 0.005)
    assert verdict.detectable == pytest.approx((1.6448536 + 0.8416212) * 0.005)


@pytest.mark.parametrize(("effect", "decision"), [(0.01244, Decision.PASS), (0.01243, Decision.UNDECIDED)])
def test_an_effect_that_could_not_be_seen_is_undecided(effect, decision):
    same = Score(value=0.5, count=10_000, error=0.0035355339)
    assert judge_score(same, same, effect=effect).decision is decision


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_samples_that_are_all_alike_are_no_certainty(share):
    """Their standard error is zero in the file."""
    few, many = (Score(value=share, count=count, error=0.0) for count in (40, 4000))
    assert few.variance == pytest.approx(0.0125 * 0.9875 / 40)
    assert judge_score(few, few, effect=0.03).decision is Decision.UNDECIDED
    assert judge_score(many, many, effect=0.03).decision is (Decision.PASS if share else Decision.UNDECIDED)


@pytest.mark.parametrize(("share", "decision"), [(0.0299, Decision.UNDECIDED), (0.0301, Decision.PASS)])
def test_a_reference_below_the_effect_decides_nothing(share, decision):
    """No device can be three points worse than one that scores less than three."""
    low = Score(value=share, count=100_000)
    verdict = judge_score(low, low)
    assert verdict.decision is decision and not verdict.needed
    assert ("no device could be that much worse" in verdict.text) == (decision is Decision.UNDECIDED)
    assert judge_score(Score(value=0.0, count=100_000), low).decision is Decision.FAIL


def test_so_many_samples_more_as_it_says_are_enough():
    same = Score(value=0.7, count=200)
    verdict = judge_score(same, same)
    assert verdict.decision is Decision.UNDECIDED
    more = Score(value=0.7, count=200 + verdict.needed)
    fewer = Score(value=0.7, count=190 + verdict.needed)
    assert judge_score(more, more).decision is Decision.PASS
    assert judge_score(fewer, fewer).decision is Decision.UNDECIDED
    assert f"{verdict.needed} samples more are needed" in verdict.text


def test_alpha_and_beta_are_kept():
    """Of devices as good about 5 % fail; of those worse by the effect about 20 % do not."""
    generator = random.Random(1)
    size = judge_score(Score(value=0.7, count=200), Score(value=0.7, count=200)).needed + 200

    def drawn(share):
        return Score(value=sum(generator.random() < share for _ in range(size)) / size, count=size)

    failed = sum(judge_score(drawn(0.7), drawn(0.7)).decision is Decision.FAIL for _ in range(300))
    missed = sum(judge_score(drawn(0.67), drawn(0.7)).decision is not Decision.FAIL for _ in range(300))
    assert 3 <= failed <= 30 and 35 <= missed <= 85


def test_paired_samples_are_judged_by_those_that_differ():
    reference = answers(1000)
    assert judge_score(answers(1000, range(5)), reference).decision is Decision.FAIL  # 1 of 32
    assert judge_score(answers(1000, range(4)), reference).decision is Decision.PASS  # 1 of 16
    verdict = judge_score(answers(1000, range(3)), answers(1000, range(100, 103)))
    assert verdict.decision is Decision.PASS and verdict.paired and verdict.drop == 0
    unpaired = judge_score(Score(value=0.998, count=1000), Score(value=1.0, count=1000))
    assert unpaired.decision is Decision.PASS and not unpaired.paired


def test_samples_that_are_better_count_in_the_sign_test():
    """6 worse and 1 better is 8 of 128; a normal test would fail it, 0.005 to 0.0044."""
    device, reference = answers(1000, range(6)), answers(1000, [999])
    assert judge_score(device, reference).decision is Decision.PASS
    verdict = judge_score(answers(1000, range(7)), reference)  # 9 of 256
    assert verdict.decision is Decision.FAIL and verdict.needed == 0


def test_the_error_of_paired_shares_is_that_of_their_mean_difference():
    """Differences of 0.5 and -0.3 in turn: 0.1 on average, each 0.4 away from it."""
    before = {str(number): 0.5 for number in range(100)}
    after = {name: 0.0 if int(name) % 2 else 0.8 for name in before}
    sides = [Score(value=sum(side.values()) / 100, count=100, samples=side) for side in (after, before)]
    assert judge_score(*sides).threshold == pytest.approx(1.6448536 * 0.4 / math.sqrt(100))


def test_paired_samples_are_compared_by_their_own_numbers():
    """A file may state a score that was rounded, or that is of other samples too."""
    samples = {str(number): float(number % 3 > 0) for number in range(300)}
    sides = [Score(value=value, count=1000, samples=samples) for value in (0.6, 0.7)]
    verdict = judge_score(*sides)
    assert (verdict.drop, verdict.count, verdict.decision) == (0.0, 300, Decision.PASS)


def test_the_sign_test_is_the_binomial_one():
    assert _sign_test(5, 0) == 1 / 32 and _sign_test(0, 0) == 1 and _sign_test(0, 5) == 1
    assert _sign_test(8, 2) == pytest.approx((45 + 10 + 1) / 1024)


def test_equal_samples_are_no_certainty():
    verdict = judge_score(answers(10), answers(10))
    assert verdict.decision is Decision.UNDECIDED and verdict.needed > 0
    assert judge_score(answers(200), answers(200)).decision is Decision.PASS


def test_shares_are_paired_by_their_mean_difference():
    generator = random.Random(2)
    before = {str(number): generator.random() for number in range(2000)}
    after = {name: max(value - 0.05, 0.0) for name, value in before.items()}
    sides = [Score(value=sum(side.values()) / 2000, count=2000, samples=side) for side in (after, before)]
    verdict = judge_score(*sides)
    assert verdict.decision is Decision.FAIL and verdict.paired and verdict.drop == pytest.approx(0.05, abs=2e-3)


@pytest.mark.parametrize("name", ["alpha", "beta", "effect"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_levels_are_shares(name, value):
    with pytest.raises(ValueError, match=f"{name} is a share between 0 and 1"):
        judge_score(answers(10), answers(10), **{name: value})


@pytest.mark.parametrize(
    "given",
    [
        dict(value=1.1, count=1),
        dict(value=math.nan, count=1),
        dict(value=0.5, count=0),
        dict(value=0.5, count=9, error=-1),
        dict(value=0.5, count=9, error=math.inf),
    ],
)
def test_what_is_no_score(given):
    with pytest.raises(ValueError, match=r"a score of|a standard error of"):
        Score(**given)


def test_other_samples_are_refused():
    with pytest.raises(ValueError, match="1 samples are on one side only, such as 10; score the same samples"):
        judge_score(answers(11), answers(10))
    with pytest.raises(ValueError, match="5 samples are on one side only, such as 10, 11, 12; score"):
        judge_score(answers(10), answers(15))


def test_of_unpaired_samples_the_fewer_ones_count():
    few, many = Score(value=0.7, count=50), Score(value=0.7, count=5000)
    assert judge_score(few, many).count == judge_score(many, few).count == 50


def test_no_score_is_certain():
    assert Score(value=1.0, count=1).variance == 0.25  # one answer says nothing
    assert Score(value=1.0, count=100).variance == pytest.approx(0.005 * 0.995 / 100)
    assert Score(value=0.5, count=100).variance == pytest.approx(0.0025)
    assert NormalDist().inv_cdf(0.95) == pytest.approx(1.6448536)


# -------- files

LM_EVAL = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.7,
            "exact_match_stderr,strict-match": 0.0126,
            "exact_match,flexible-extract": 0.72,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "wikitext": {"word_perplexity,none": 11.2, "word_perplexity_stderr,none": "N/A"},
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}, "wikitext": {"original": 62, "effective": 62}},
}
EVALSCOPE = {
    "name": "qwen@gsm8k",
    "dataset_name": "gsm8k",
    "model_name": "qwen",
    "score": 0.7,
    "metrics": [
        {
            "name": "AverageAccuracy",
            "score": 0.7,
            "categories": [{"name": ["default"], "subsets": [{"name": "main", "score": 0.7, "num": 1319}]}],
        }
    ],
}
AISBENCH = {
    "accuracy": 75.0,
    "details": {"0": {"pred": "A", "correct": True}, "1": {"correct": [True, True]}, "2": {"correct": True},
                "3": {"correct": False}, "type": "GEN"},
}  # fmt: skip


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_results_of_lm_eval(tmp_path):
    scores = read_scores(write(tmp_path / "results.json", LM_EVAL))
    assert scores == {
        "gsm8k exact_match,strict-match": Score(value=0.7, count=1319, error=0.0126),
        "gsm8k exact_match,flexible-extract": Score(value=0.72, count=1319),
    }


def test_a_metric_that_is_better_the_lower_is_turned(tmp_path):
    numbers = {"brier_score,none": 0.2, "brier_score_stderr,none": 0.005, "acc,none": 0.9}
    value = {"results": {"t": numbers}, "n-samples": {"t": {"effective": 5000}}}
    value["higher_is_better"] = {"t": {"brier_score": False, "acc": True}}
    path = write(tmp_path / "results.json", value)
    scores = read_scores(path)
    assert scores["t 1 - brier_score,none"] == Score(value=0.8, count=5000, error=0.005)
    assert scores["t acc,none"].value == 0.9 and len(scores) == 2
    numbers["brier_score,none"] = 0.3
    worse = read_scores(write(tmp_path / "worse.json", value))
    name = "t 1 - brier_score,none"
    assert judge_score(worse[name], scores[name]).decision is Decision.FAIL
    assert judge_score(scores[name], worse[name]).decision is Decision.PASS


def test_samples_of_lm_eval_by_filter(tmp_path):
    """As lm_eval 0.4.13 writes them: a line for each document and filter."""
    lines = [
        {"doc_id": number, "filter": kind, "metrics": ["exact_match"], "exact_match": float(right), "doc_hash": "x"}
        for number in range(3)
        for kind, right in (("strict-match", number > 0), ("flexible-extract", True))
    ]
    text = "\n".join(map(json.dumps, lines))
    scores = read_scores(write(tmp_path / "samples_gsm8k_2026-01-02T03-04-05.jsonl", text))
    assert scores["gsm8k exact_match,strict-match"].samples == {"0": 0.0, "1": 1.0, "2": 1.0}
    assert scores["gsm8k exact_match,flexible-extract"].value == 1 and len(scores) == 2
    twice = write(tmp_path / "samples_twice.jsonl", text + "\n" + json.dumps(lines[0]))
    with pytest.raises(HarnessError, match="the sample 0 is there twice"):
        read_scores(twice)


def test_samples_of_lm_eval(tmp_path):
    lines = "\n".join(json.dumps({"doc_id": number, "acc": number % 2, "target": "x"}) for number in range(4))
    scores = read_scores(write(tmp_path / "samples_arc_easy_2026-01-02T03-04-05.jsonl", lines))
    assert list(scores) == ["arc_easy acc"] and scores["arc_easy acc"].value == 0.5
    assert scores["arc_easy acc"].samples == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 1.0}


def test_a_report_of_evalscope_and_results_of_aisbench(tmp_path):
    assert read_scores(write(tmp_path / "gsm8k.json", EVALSCOPE)) == {
        "gsm8k AverageAccuracy": Score(value=0.7, count=1319)
    }
    subsets = [*EVALSCOPE["metrics"][0]["categories"][0]["subsets"], {"num": 7, "score": 1, "is_aggregate": True}]
    metrics = [
        {"score": 0.7, "categories": [{"subsets": subsets}], "semantics": {"direction": "higher_is_better"}}
        | {"identity": {"name": "accuracy", "aggregation": "pass_at_k", "dimensions": {"k": 4}}},
        {"score": 0.1, "num": 9, "semantics": {"direction": "lower_is_better", "kind": "quality"}}
        | {"identity": {"name": "wer", "aggregation": "mean", "dimensions": {}}},
        {"score": 0.5, "num": 9, "semantics": {"kind": "diagnostic"}, "identity": {"name": "a", "aggregation": "b"}},
    ]
    current = {"schema_version": 2, "dataset_name": "gsm8k", "metrics": metrics}
    assert read_scores(write(tmp_path / "gsm8k.json", current)) == {
        "gsm8k accuracy pass_at_k k=4": Score(value=0.7, count=1319),
        "gsm8k 1 - wer mean": Score(value=0.9, count=9),
    }
    (score,) = read_scores(write(tmp_path / "ceval.json", AISBENCH)).values()
    assert (score.value, score.count) == (0.75, 4) and score.samples["3"] == 0.0
    partly = AISBENCH | {"details": {**AISBENCH["details"], "1": {"pred": "not judged"}}}
    (score,) = read_scores(write(tmp_path / "ceval.json", partly)).values()
    assert dict(score.samples) == {"0": 1.0, "2": 1.0, "3": 0.0}  # by their own ids, not by their order


def test_reviews_of_evalscope(tmp_path):
    lines = [
        {"index": number, "sample_score": {"sample_id": number, "score": {"value": {"acc": float(number > 0)}}}}
        for number in range(4)
    ]
    lines[3]["sample_score"]["score"] = {"value": {}, "status": "judge_failed"}
    path = write(tmp_path / "gsm8k_main.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_scores(path)["gsm8k_main acc"].samples == {"0": 0.0, "1": 1.0, "2": 1.0}
    for number, line in enumerate(lines):
        line |= {"index": 0}
        line["sample_score"]["generation_index"] = number
    path = write(tmp_path / "gsm8k_main.jsonl", "\n".join(map(json.dumps, lines)))
    assert list(read_scores(path)["gsm8k_main acc"].samples) == ["0 0", "0 1", "0 2"]


@pytest.mark.parametrize("text", ["id,score\na,1\nb,0\n", "a\t1\nb\t0\n", "# comment\na 1.0\nb 0.0\n"])
def test_two_columns(tmp_path, text):
    (score,) = read_scores(write(tmp_path / "mine.csv", text)).values()
    assert score == Score(value=0.5, count=2, samples={"a": 1.0, "b": 0.0})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("a.json", "{", "holds no scores that are known"),
        ("a.json", {"other": 1}, "its keys are those of no tool that is known"),
        ("a.json", {"accuracy": 50.0}, "the number of samples is not known"),
        ("a.json", {"results": {}}, "holds no score;"),
        ("a.json", "[" * 100_000, "holds no scores"),
        ("a.csv", "a,1,2", "line 1 has 3 columns"),
        ("a.csv", "a,1\nb,x", "line 2: 'x' is no number"),
        ("a.csv", "a,1\na,0", "the sample a is there twice"),
        ("a.csv", "a,70\nb,80", "is no share between 0 and 1"),
        ("a.csv", "", "it has no samples"),
        ("a.jsonl", '{"acc": 1}', "doc_id"),
    ],
)
def test_what_is_no_file_of_scores_is_told(tmp_path, name, value, said):
    with pytest.raises(HarnessError, match=said):
        read_scores(write(tmp_path / name, value))
    with pytest.raises(HarnessError, match="cannot be read"):
        read_scores(tmp_path / "absent.json")


# -------- the command


def test_the_command_says_and_exits(tmp_path, capsys):
    reference = write(tmp_path / "gpu.csv", "".join(f"{number},1\n" for number in range(1000)))
    worse = write(tmp_path / "npu.csv", "".join(f"{number},{int(number > 30)}\n" for number in range(1000)))
    assert main(["score", str(worse), str(reference)]) == 1
    assert capsys.readouterr().out.startswith("FAIL gpu score: 0.9690 against 1.0000; the score is 3.10 points lower")
    assert main(["score", str(reference), str(reference)]) == 0
    assert "PASS gpu score" in capsys.readouterr().out
    few = write(tmp_path / "few.csv", "a,1\nb,1\n")
    assert main(["score", str(few), str(few)]) == 1 and "samples more are needed" in capsys.readouterr().out


def test_a_score_that_the_device_lacks_fails(tmp_path, capsys):
    whole = write(tmp_path / "gpu.json", LM_EVAL | {"n-samples": {"gsm8k": 100_000}})
    part = json.loads(json.dumps(LM_EVAL)) | {"n-samples": {"gsm8k": 100_000}}
    del part["results"]["gsm8k"]["exact_match,flexible-extract"]
    part["results"]["gsm8k"]["other,none"] = 0.5
    assert main(["score", str(write(tmp_path / "npu.json", part)), str(whole)]) == 1
    assert "MISSING gsm8k exact_match,flexible-extract" in capsys.readouterr().out
    assert main(["score", str(write(tmp_path / "npu.json", part)), str(whole), "--metric", "nothing"]) == 1
    assert "no score is in both files with nothing" in capsys.readouterr().err
