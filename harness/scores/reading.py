"""Score files in, scores by dataset and metric out.

- lm_eval: results_*.json with `results` and `n-samples`; samples_*.jsonl with a `doc_id` and a `filter` a line
- evalscope: reports/MODEL/DATASET.json with `metrics` of `categories` of `subsets`, which have a `name`, and from
  schema 2 on an `identity`; reviews/MODEL/DATASET_SUBSET.jsonl with an `index` and a `sample_score` a line
- AISBench and OpenCompass: results/MODEL/DATASET.json with `accuracy` in percent, and `details` with `correct`
- two columns, separated by commas, tabs or blanks: the id of a sample and its score

A metric that is better the lower it is, and a share, is read as 1 - value and called so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.judging.scores import Score

_LARGEST = 1 << 30  # bytes of a file that is read
FORMATS = "results or samples of lm_eval, a report of evalscope, results of AISBench, or two columns: sample, score"


def read_scores(path: Path) -> dict[str, Score]:
    """The scores of a file, by "dataset metric".

    Raises: HarnessError, in one sentence, for a file that cannot be read or holds no score.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise HarnessError(f"{path} has more than {_LARGEST >> 20} MiB; give the file of scores")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"{path} cannot be read: {error}") from None
    try:
        result = _read(text, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise HarnessError(f"{path} holds no scores that are known ({said}); {FORMATS} were expected") from None
    if not result:
        raise HarnessError(f"{path} holds no score; {FORMATS} were expected")
    return result


def _read(text: str, path: Path) -> dict[str, Score]:
    if path.suffix == ".jsonl":
        return _lines([json.loads(line) for line in text.splitlines() if line.strip()], path)
    if not text.lstrip().startswith(("{", "[")):
        return {f"{path.stem} score": _columns(text)}
    value = json.loads(text)
    if isinstance(value, Mapping) and isinstance(value.get("results"), Mapping):
        return _lm_eval(value)
    if isinstance(value, Mapping) and isinstance(value.get("metrics"), list):
        return _evalscope(value)
    if isinstance(value, Mapping) and "accuracy" in value:
        return {f"{path.stem} accuracy": _aisbench(value)}
    raise ValueError("its keys are those of no tool that is known")


def _lm_eval(value: Mapping[str, Any]) -> dict[str, Score]:
    counts = value.get("n-samples") or {}
    result = {}
    for task, numbers in value["results"].items():
        directions = (value.get("higher_is_better") or {}).get(task) or {}
        count = counts.get(task) or 0
        count = int(count["effective"] if isinstance(count, Mapping) else count)
        for name, number in numbers.items():
            metric, comma, kind = name.partition(",")
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not comma or metric.endswith("_stderr") or not is_number or not 0 <= number <= 1 or count < 1:
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            name, number = _upwards(name, number, directions.get(metric) is not False)
            result[f"{task} {name}"] = Score(value=number, count=count, error=float(error) if known else None)
    return result


def _upwards(name: str, share: float, higher_is_better: bool) -> tuple[str, float]:
    """A share of which more is better, and its name."""
    return (name, float(share)) if higher_is_better else (f"1 - {name}", 1 - float(share))


def _lines(lines: list[Mapping[str, Any]], path: Path) -> dict[str, Score]:
    if lines and all("sample_score" in line for line in lines):
        return _evalscope_reviews(lines, path)
    task = re.sub(r"_\d{4}-\d\d-\d\dT.*$", "", path.stem.removeprefix("samples_"))
    return _by_metric(task, [(str(line["doc_id"]), _lm_eval_sample(line)) for line in lines])


def _lm_eval_sample(line: Mapping[str, Any]) -> dict[str, Any]:
    """The shares of one line, by metric and filter, as results have them: "exact_match,strict-match"."""
    names = line.get("metrics") or [name for name in line if name not in ("doc_id", "filter", "idx")]
    filtered = f",{line['filter']}" if line.get("filter") else ""
    return {f"{name}{filtered}": line[name] for name in names if _is_share(line.get(name))}


def _evalscope_reviews(lines: list[Mapping[str, Any]], path: Path) -> dict[str, Score]:
    samples = []
    for line in lines:
        score = line["sample_score"]
        number = score.get("generation_index")
        again = f" {number}" if number is not None else ""
        shares = {name: item for name, item in (score["score"].get("value") or {}).items() if _is_share(item)}
        samples.append((f"{line['index']}{again}", shares))
    return _by_metric(path.stem, samples)


def _by_metric(dataset: str, samples: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Score]:
    names = {name for _, shares in samples for name in shares}
    return {
        f"{dataset} {name}": _of_samples((sample, shares[name]) for sample, shares in samples if name in shares)
        for name in sorted(names)
    }


def _evalscope(value: Mapping[str, Any]) -> dict[str, Score]:
    dataset = value.get("dataset_name") or value["name"]
    result = {}
    for metric in value["metrics"]:
        meaning = metric.get("semantics") or {}
        if meaning.get("kind") == "diagnostic" or not _is_share(metric["score"]):
            continue
        subsets = [subset for category in metric.get("categories") or () for subset in category.get("subsets") or ()]
        count = int(
            metric.get("num") or sum(int(subset["num"]) for subset in subsets if not subset.get("is_aggregate"))
        )
        upwards = meaning.get("direction") != "lower_is_better"
        name, share = _upwards(metric.get("name") or _identity(metric["identity"]), metric["score"], upwards)
        result[f"{dataset} {name}"] = Score(value=share, count=count)
    return result


def _identity(identity: Mapping[str, Any]) -> str:
    """A metric's name, how it was aggregated, and of what: "accuracy pass_at_k k=4"."""
    dimensions = [f"{name}={value}" for name, value in sorted((identity.get("dimensions") or {}).items())]
    return " ".join([identity["name"], identity["aggregation"], *dimensions])


def _aisbench(value: Mapping[str, Any]) -> Score:
    details = value.get("details") or {}
    items = details.items() if isinstance(details, Mapping) else enumerate(details)
    right = [(str(name), _correct(item)) for name, item in items if isinstance(item, Mapping) and "correct" in item]
    if right:
        return _of_samples(right)
    raise ValueError("it has an accuracy and no details, so the number of samples is not known; dump them")


def _correct(item: Mapping[str, Any]) -> float:
    """Whether a sample is right; of several tries the share."""
    value = item["correct"]
    tries = value if isinstance(value, list) else [value]
    return sum(map(float, tries)) / len(tries)


def _columns(text: str) -> Score:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell for cell in re.split(r"[,\t ]+", line.strip()) if cell]
        if not cells or line.startswith("#"):
            continue
        if len(cells) != 2:
            raise ValueError(f"line {number} has {len(cells)} columns where 2 were expected")
        try:
            pairs.append((cells[0], float(cells[1])))
        except ValueError:
            if pairs:
                raise ValueError(f"line {number}: {cells[1]!r} is no number") from None  # else it is the heading
    return _of_samples(pairs)


def _of_samples(pairs: Iterable[tuple[str, Any]]) -> Score:
    samples: dict[str, float] = {}
    for name, value in pairs:
        if name in samples:
            raise ValueError(f"the sample {name} is there twice")
        if not _is_share(value):
            raise ValueError(f"the score {value!r} of the sample {name} is no share between 0 and 1")
        samples[name] = float(value)
    if not samples:
        raise ValueError("it has no samples")
    return Score(value=sum(samples.values()) / len(samples), count=len(samples), samples=samples)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1
