"""A model card, measured and written: `make` runs the checkpoint and fills a folder that can be published as it is."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.card import facts, performance, scripts
from harness.card.facts import Stated, stated
from harness.card.percent import ASKED, MEANINGS, ONE_PERCENT, relative_errors
from harness.card.readme import readme
from harness.card.rendering import compiled, plain_name
from harness.case import Case
from harness.checkpoints.building import SEEDS, parts_of, require_whole, stored_dtypes, usual_dtypes
from harness.checkpoints.conversion import appearing, checkpoint_digest
from harness.checkpoints.libraries import quiet_libraries
from harness.checkpoints.material import Asked
from harness.checkpoints.recognition import Recognised, recognise
from harness.checkpoints.weights import weights_of
from harness.devices import Device, open_device
from harness.errors import CheckpointError, HarnessError
from harness.judging.status import FELL_BACK, Status
from harness.judging.verdict import Verdict
from harness.judging.verdict import error as could_not_compare
from harness.reference import Models
from harness.report import Row, build, write
from harness.run.cpu import inputs_of
from harness.run.notes import BATCH_INVARIANCE
from harness.run.once import Once, run_once
from harness.run.switches import measured_costs
from harness.run.validation import validate
from harness.typed_json import to_json

CARD_SCHEMA = "precision-card/1"
BATCHES, ITERATIONS, WARMUP = (1, 4), 100, 10  # of the times
_TOP = 5
_SHOWN = 5  # first values of an output


@dataclass(frozen=True, kw_only=True)
class Order:
    """What model card is asked for.

    Raises: ValueError for a meaning of "1 %" that there is none of.
    """

    path: str
    output: Path
    device: str = "auto"
    dtypes: tuple[str, ...] = ()  # none: float32 and the dtype that the weights are stored in
    seeds: tuple[int, ...] = SEEDS
    lang: str = "en"
    template: str = "origin"
    meaning: str = ASKED
    limit: float = ONE_PERCENT
    batches: tuple[int, ...] = BATCHES
    iterations: int = ITERATIONS
    warmup: int = WARMUP
    asked: Mapping[str, Any] = field(default_factory=dict)  # what `Case.from_checkpoint` takes

    def __post_init__(self):
        if self.meaning not in MEANINGS:
            raise ValueError(f"no relative error is called {self.meaning!r}; there are {', '.join(MEANINGS)}")
        if not 0 < self.limit < 1:
            raise ValueError(f"a limit of {self.limit} is no share between 0 and 1; 0.01 is 1 %")

    @property
    def command(self) -> str:
        """The command line that makes this card again."""
        words = ["python -m harness card", shlex.quote(Path(self.path).name or self.path), f"--lang {self.lang}"]
        words += [] if self.device == "auto" else [f"--device {self.device}"]
        words += [f"--dtype {' '.join(self.dtypes)}"] if self.dtypes else []
        words += [] if self.seeds == SEEDS else [f"--seeds {' '.join(map(str, self.seeds))}"]
        words += [] if self.template == "origin" else [f"--template {shlex.quote(self.template)}"]
        words += [] if self.meaning == ASKED else [f"--one-percent {self.meaning}"]
        words += [] if self.limit == ONE_PERCENT else [f"--within {self.limit:g}"]
        words += [] if self.batches == BATCHES else [f"--batch-size {' '.join(map(str, self.batches))}"]
        words += [] if self.iterations == ITERATIONS else [f"--iters {self.iterations}"]
        words += [] if self.warmup == WARMUP else [f"--warmup {self.warmup}"]
        return " ".join([*words, *self._asked_words(), "--output OUT"])

    def _asked_words(self) -> list[str]:
        """What was asked of the inputs and of the loading, as options; a file by its name alone."""
        result = []
        for name, value in self.asked.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                result.append(option)
            elif value != getattr(Asked(), name):
                is_file = isinstance(value, str) and Path(value).exists()
                result.append(f"{option} {shlex.quote(Path(value).name if is_file else str(value))}")
        return result


@dataclass(frozen=True, kw_only=True)
class CardFolder:
    """A model card that was written."""

    folder: Path
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()  # what of the folder could not be offered, in sentences

    @property
    def passed(self) -> int:
        """How many rows pass; a row that was not run does not."""
        return sum(row.status is Status.PASS for row in self.rows)

    @property
    def bad(self) -> list[Row]:
        return [row for row in self.rows if row.is_bad]


def make(order: Order) -> CardFolder:
    """Measure a checkpoint and write its card into `order.output`, which must not exist.

    Nothing is left behind where it cannot be made.
    Raises: HarnessError, in one sentence.
    """
    compiled(order.template)
    facts.required("yaml")
    recognised = recognise(order.path)
    asked = Asked(**order.asked)
    parts = parts_of(order.path, asked)
    _require_all(order, parts[0])
    with appearing(order.output) as folder, contextlib.ExitStack() as stack:
        device = open_device(order.device, timing=True)
        stack.enter_context(quiet_libraries())
        dtypes = order.dtypes or usual_dtypes(order.path)
        run = _Run(order=order, asked=asked, device=device, recognised=recognised, parts=parts, dtypes=dtypes)
        missing = run.write(folder)
    return CardFolder(folder=order.output, rows=tuple(run.rows), missing=tuple(missing))


def _require_all(order: Order, part: str) -> None:
    """Refuse half a checkpoint, and inputs that cannot be drawn, before a device is opened.

    Raises: HarnessError.
    """
    require_whole(order.path)
    with quiet_libraries():
        inputs_of(Case.from_checkpoint(order.path, part=part, **order.asked), order.seeds[0])


class _Run:
    """The measurements of one model card."""

    def __init__(
        self,
        *,
        order: Order,
        asked: Asked,
        device: Device,
        recognised: Recognised,
        parts: Sequence[str],
        dtypes: Sequence[str],
    ):
        self.order, self.asked, self.device, self.recognised = order, asked, device, recognised
        self.parts, self.dtypes = parts, dtypes
        self.models, self.rows = Models(), []
        self.part_of: dict[str, str] = {}  # by name of the case
        self.first = self.case(parts[0], dtypes[0])

    def case(self, part: str, dtype: str) -> Case:
        return Case.from_checkpoint(self.order.path, part=part, dtype=dtype, **self.order.asked)

    # -------- measuring

    def measure(self) -> None:
        """A row for each part, dtype and seed; the first part with all seeds."""
        for part in self.parts:
            for dtype in self.dtypes:
                case = self.case(part, dtype)
                self.part_of[case.name] = part
                seeds = self.order.seeds if part == self.parts[0] else self.order.seeds[:1]
                for seed in (None,) if self.asked.own_files else seeds:
                    self.rows.append(self._row(case, seed))

    def _row(self, case: Case, seed: int | None) -> Row:
        try:
            verdict = validate(case, seed, self.device, models=self.models)
            verdict = self._with_measured_switches(case, seed, verdict)
        except CheckpointError:
            raise
        except HarnessError as error:
            verdict = could_not_compare(str(error))
        name = f"card[{case.dtype}-{'files' if seed is None else f'seed{seed}'}-{case.name}]"
        row = Row.of(verdict, test=name, case=case.name, dtype=case.dtype, seed=seed)
        return replace(row, weights_from=_without_folder(row.weights_from))

    def _with_measured_switches(self, case: Case, seed: int | None, verdict: Verdict) -> Verdict:
        costs = verdict.evidence.switches if verdict.evidence else ()
        if not costs or self.device.torch_device.type == "cpu":
            return verdict
        measured = measured_costs(case, seed, self.device, costs, self.models)
        return replace(verdict, evidence=replace(verdict.evidence, switches=measured))

    def once(self) -> Once:
        """One forward on the device with the first seed, for the evidence of a run."""
        return run_once(self.first, self.order.seeds[0], self.device)

    # -------- writing

    def write(self, folder: Path) -> list[str]:
        """Fill the folder; returns what could not be offered."""
        self.measure()
        once = self.once()
        times = performance.forwards(
            self.order.path,
            self.device,
            self.dtypes[0],
            self.order.batches,
            self.order.iterations,
            self.order.warmup,
            **self.order.asked,
        )
        values = self.facts(once, times)
        missing, logs = self._scripts(folder, values)
        report = build(
            self.rows,
            stack=self.device.stack.to_dict(),
            backend=self.device.backend,
            performance=[_timed(row) for row in times.value or ()],
        )
        write(report, folder / "results", lang=self.order.lang)
        values |= {"created": report.created, "headline": report.headline, "logs": logs}
        values["files"] = sorted(
            [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
            + ["README.md", "results/card.json"]
        )
        card = to_json(values)
        text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "results" / "card.json").write_text(text + "\n", encoding="utf-8")
        text = readme(card, self.rows, self.order.lang, self.order.template)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return missing

    def _scripts(self, folder: Path, values: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Write the scripts and run inference.py; one that does not run is not offered. Returns what is missing, and
        the logs.
        """
        (folder / "logs").mkdir()
        if self.recognised.kind == "function":
            values["inference"] = Stated(why="script_function")
            return ["inference.py: the case is a function of yours"], []
        if len(self.parts) > 1 and self.parts[0] != "forward":
            values["inference"] = Stated(why="script_pipeline")
            return ["inference.py: a pipeline of several models has none"], []
        try:
            names = scripts.write_scripts(folder, self.recognised, self.first, values)
        except HarnessError as error:
            values["inference"] = Stated(why="script_inputs")
            return [str(error)], []
        ran = scripts.run_script(folder, self.recognised.path, self.device, ["--dtype", self.dtypes[0]])
        (folder / "logs" / "inference.log").write_text(f"$ {ran.command}\n{ran.printed}", encoding="utf-8")
        if not ran.well:
            for name in names:
                (folder / name).unlink()
            values["inference"] = Stated(why="script_failed")
            return [f"inference.py does not run: {_last_line(ran.printed)}"], ["logs/inference.log"]
        values["inference"] = Stated(value=ran.printed)
        return [], ["logs/inference.log"]

    # -------- facts

    def facts(self, once: Once, times: Stated) -> dict[str, Any]:
        """All that a README says, by name."""
        recognised, order = self.recognised, self.order
        front, text = facts.readme_of(recognised.path) if recognised.path.is_dir() else ({}, "")
        model = self.models.base(**self.first.recipe)
        kind = getattr(self.first.inputs, "kind", None)
        main = getattr(kind, "main_input_name", "")
        task = facts.task_of(recognised, kind, main, front)
        citation = facts.citation_of(text) or (facts.AIMV2_CITATION if recognised.kind == "AIMv2" else None)
        stack = self.device.stack.to_dict()
        first = [row for row in self.rows if row.case == self.first.name]
        return {
            "schema": CARD_SCHEMA,
            "name": plain_name(recognised.name),
            "emulated": self.device.backend == "emulated",
            "backend": self.device.backend,
            "device": self.device.name,
            "kind": recognised.kind,
            "library": facts.library_of(recognised),
            "task": stated(task, "task_unknown"),
            "model_class": type(model).__name__ if kind is None else kind.__name__,
            "architecture": _architecture(model),
            "parameters": sum(item.numel() for item in {id(item): item for item in model.parameters()}.values()),
            "dtypes": list(self.dtypes),
            "stored_dtype": stored_dtypes(order.path)[0],
            "inputs": {name or "pixel_values": list(shape) for name, shape in once.shapes.items()},
            "outputs": {name: list(tensor.shape) for name, tensor in once.outputs.items()},
            "licence": stated(facts.licence_of(recognised.path, front), "licence_unknown"),
            "languages": stated(front.get("language"), "language_unknown"),
            "base_model": stated(front.get("base_model") or _named(recognised), "base_unknown"),
            "citation": stated(citation, "citation_unknown"),
            "environment": {name: value for name, value in stack.items() if value not in (None, "", {}, [], ())},
            "notes": self._notes(),
            "weights": self._weights(),
            "takes": _takes(self.first, recognised),
            "generates": "generate" in self.parts,
            "decisions": self.first.decisions,
            "base": self._base(),
            "requirements": _requirements(recognised, stack),
            "evidence": self._evidence(once, model),
            "accuracy": {
                "percent": [
                    {"case": case, "dtype": dtype, "meanings": [asdict(item) for item in meanings]}
                    for case, dtype, meanings in self._percent()
                ],
                "limit": order.limit,
                "asked": order.meaning,
                "reference": first[0].reference if first else None,
                "parts": self.part_of,
            },
            "performance": times,
            "generation": self._generation(),
            "memory": performance.peak_memory(self.first, self.device),
            "regenerate": order.command,
            "limits": sorted(
                {note for row in self.rows for note in row.notes or () if not note.startswith(BATCH_INVARIANCE)}
            ),
        }

    def _percent(self) -> list[tuple[str, str, list]]:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.rel_l2 is not None:
                groups.setdefault((row.case, row.dtype or ""), []).append(row)
        how = dict(asked=self.order.meaning, limit=self.order.limit)
        return [(*key, relative_errors(rows, **how)) for key, rows in groups.items()]

    def _notes(self) -> dict[str, Any]:
        """What the adaptation took: conversion, switches, fallbacks, patches."""
        layout = None
        if self.recognised.kind == "AIMv2":
            from harness.checkpoints.conversion import read_checkpoint
            from harness.models.aimv2 import layout_of

            layout = layout_of(read_checkpoint(self.recognised.path)[0])
        switches = {
            name: value
            for name in ("conv_allow_hf32", "matmul_allow_hf32", "compatible_impl", "precision_mode", "inf_nan_mode")
            if (value := getattr(self.device.stack, name)) is not None
        }
        fell_back = [row.name for row in self.rows if FELL_BACK in row.marks]
        apart = any("process" in (row.reference or "") for row in self.rows)
        return dict(layout=layout, switches=switches, fell_back=fell_back, patched=apart)

    def _weights(self) -> dict[str, Any]:
        path = self.recognised.path
        files = weights_of(path) if path.is_dir() else [path]
        files = [file for file in files if file.is_file()]  # a function has none
        return dict(
            files={file.name: file.stat().st_size for file in files},
            sha256=checkpoint_digest(path) if files and path.is_dir() else None,
            seeded=sorted({row.weights_from or "" for row in self.rows if row.weights_from is not None}),
        )

    def _base(self) -> str | None:
        if self.recognised.kind != "PEFT":
            return None
        from harness.checkpoints.adapters import base_of

        return f"../{base_of(self.recognised, self.asked).path.resolve().name}"

    def _evidence(self, once: Once, model: nn.Module) -> dict[str, Any]:
        labels = getattr(getattr(model, "config", None), "id2label", None) or {}
        outputs = []
        for name, tensor in once.outputs.items():
            flat = tensor.reshape(-1)
            item = dict(name=name, shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            wrong = int((~torch.isfinite(flat.double())).sum())
            item |= dict(first=flat[:_SHOWN].tolist(), not_finite=wrong, top=[])
            if name == self.first.decisions and tensor.dim():
                values, classes = tensor.float().reshape(-1, tensor.shape[-1])[0].topk(min(_TOP, tensor.shape[-1]))
                item["top"] = [
                    dict(index=int(index), label=labels.get(int(index)), value=float(value))
                    for index, value in zip(classes, values)
                ]
            outputs.append(item)
        return dict(seed=self.order.seeds[0], dtype=self.dtypes[0], outputs=outputs)

    def _generation(self) -> Stated:
        if "generate" not in self.parts:
            return Stated(why="generates_nothing")
        few = max(self.order.iterations // 10, 1)
        return performance.generation(self.first, self.device, iterations=few, warmup=min(self.order.warmup, 2))


def _architecture(model: nn.Module) -> str:
    """The activation, normalisation, attention and other layers of a model, the most frequent kinds first."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if not next(iter(module.children()), None):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    most = sorted(counts, key=counts.__getitem__, reverse=True)[:6]
    return ", ".join(f"{counts[name]} {name}" for name in most)


def _without_folder(source: str | None) -> str | None:
    """Where weights come from, without the folders of this machine: the card is published."""
    kind, colon, path = (source or "").partition(":")
    return f"{kind}:{Path(path).name}" if colon else source


def _named(recognised: Recognised) -> str | None:
    name = recognised.fields.get("_name_or_path") or recognised.fields.get("base_model_name_or_path")
    return name if isinstance(name, str) and name and not name.startswith(("/", ".")) else None


def _takes(case: Case, recognised: Recognised) -> dict[str, bool]:
    """The files that inference.py takes: those for which the checkpoint has a processor."""
    draw = case.inputs
    if recognised.kind in ("AIMv2", "timm"):
        return dict(text=False, image=True, audio=False)
    if recognised.kind == "sentence-transformers":
        return dict(text=True, image=False, audio=False)
    if recognised.kind not in ("transformers", "PEFT"):
        return dict(text=False, image=False, audio=False)
    from harness.checkpoints.transformers_models import has_tokenizer

    return dict(
        text=draw.takes_text and has_tokenizer(draw.place),
        image=draw.takes_pictures and draw.has_processor("image_processor"),
        audio=draw.takes_sound and draw.has_processor("feature_extractor"),
    )


_PACKAGES = {
    "transformers": ("transformers",),
    "sentence-transformers": ("sentence-transformers", "transformers"),
    "PEFT": ("peft", "transformers"),
    "diffusers": ("diffusers", "transformers"),
    "timm": ("timm",),
}


def _requirements(recognised: Recognised, stack: Mapping[str, Any]) -> list[tuple[str, str]]:
    from importlib import metadata

    names = [*_PACKAGES.get(recognised.kind, ()), "safetensors", "pillow", "numpy"]
    result = [
        ("torch", str(stack.get("torch") or "").partition("+")[0]),
        ("torch_npu", str(stack.get("torch_npu") or "")),
    ]
    for name in names:
        try:
            result.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            result.append((name, ""))
    return result


def _timed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "throughput"}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
