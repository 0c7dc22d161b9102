"""Score files in, scores by dataset and metric out.

- lm_eval: results_*.json with `results` and `n-samples`; samples_*.jsonl with a `doc_id` a line
- evalscope: reports/MODEL/DATASET.json with `metrics` of `categories` of `subsets`
- AISBench and OpenCompass: results/MODEL/DATASET.json with `accuracy` in percent, and `details` with `correct`
- two columns, separated by commas, tabs or blanks: the id of a sample and its score
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
        return _lm_eval_samples([json.loads(line) for line in text.splitlines() if line.strip()], path)
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
        count = counts.get(task) or 0
        count = int(count["effective"] if isinstance(count, Mapping) else count)
        for name, number in numbers.items():
            metric, comma, kind = name.partition(",")
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not comma or metric.endswith("_stderr") or not is_number or not 0 <= number <= 1 or count < 1:
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            result[f"{task} {name}"] = Score(value=number, count=count, error=float(error) if known else None)
    return result


def _lm_eval_samples(lines: list[Mapping[str, Any]], path: Path) -> dict[str, Score]:
    task = re.sub(r"_\d{4}-\d\d-\d\dT.*$", "", path.stem.removeprefix("samples_"))
    names = {
        name
        for line in lines
        for name in line.get("metrics") or line
        if _is_share(line.get(name)) and name not in ("doc_id", "filter", "idx")
    }
    result = {}
    for name in sorted(names):
        result[f"{task} {name}"] = _of_samples((str(line["doc_id"]), line[name]) for line in lines)
    return result


def _evalscope(value: Mapping[str, Any]) -> dict[str, Score]:
    dataset = value.get("dataset_name") or value["name"]
    result = {}
    for metric in value["metrics"]:
        subsets = [subset for category in metric.get("categories") or () for subset in category.get("subsets") or ()]
        count = int(metric.get("num") or sum(int(subset["num"]) for subset in subsets))
        result[f"{dataset} {metric['name']}"] = Score(value=float(metric["score"]), count=count)
    return result


def _aisbench(value: Mapping[str, Any]) -> Score:
    details = value.get("details")
    items = list(details.values() if isinstance(details, Mapping) else details or ())
    right = [_correct(item) for item in items if isinstance(item, Mapping) and "correct" in item]
    if right:
        return _of_samples((str(number), item) for number, item in enumerate(right))
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
