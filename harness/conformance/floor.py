"""How well the forecast says what the device loses: AIMv2-large, five seeds, with HF32 on and off, in float16 and in
bfloat16.

python -m harness.conformance floor [--device emulated] [--output FILE]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.case import Case
from harness.conformance.options import parser_of
from harness.devices import Device, open_device
from harness.judging.verdict import Verdict
from harness.models.aimv2 import AIMv2Config, build
from harness.reference import Models
from harness.run.validation import validate

_NAME = "aimv2-large-patch14-224-distilled"
_SEEDS = (42, 123, 256, 789, 1024)
MODES = {  # dtype, and HF32 for convolutions and for products; None leaves a switch as it comes
    "float32, HF32 convolutions": ("float32", True, False),
    "float32, no HF32": ("float32", False, False),
    "float32, HF32 throughout": ("float32", True, True),
    "float16": ("float16", None, None),
    "bfloat16": ("bfloat16", None, None),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One verdict of the floor."""

    mode: str
    seed: int
    verdict: Verdict


def measured(device: Device, model: str | AIMv2Config = _NAME, seeds: tuple[int, ...] = _SEEDS) -> Iterator[Found]:
    """Each mode with each seed. The switches are left as they were."""
    models = Models()
    weights = build(model, 0)
    side = weights.config.image_size

    def case(dtype: str) -> Case:
        return Case(
            name=_NAME,
            model=lambda: weights,
            inputs=lambda generator: torch.randn(1, 3, side, side, generator=generator),
            dtype=dtype,
        )

    cases = {dtype: case(dtype) for dtype in dict.fromkeys(dtype for dtype, *_ in MODES.values())}
    for mode, (dtype, conv, matmul) in MODES.items():
        before = torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32
        torch.npu.conv.allow_hf32 = before[0] if conv is None else conv
        torch.npu.matmul.allow_hf32 = before[1] if matmul is None else matmul
        try:
            for seed in seeds:
                yield Found(mode=mode, seed=seed, verdict=validate(cases[dtype], seed, device, models=models))
        finally:
            torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = before


def text(result: list[Found], device: Device) -> str:
    """The table: the errors to float64 of the device, the CPU and the forecast, and what the floor makes of them."""
    columns = (
        "mode",
        "seed",
        "device",
        "CPU",
        "forecast",
        "measured / forecast",
        "unexplained",
        "worst token",
        "worst element",
        "factor",
        "shift",
        "result",
    )
    lines = [
        "# Measured and forecast",
        "",
        (
            f"{_NAME}, seeded weights, {device.name} ({device.backend}); rel_l2 to float64; the last figures in "
            "units of the floor."
        ),
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in result:
        references = row.verdict.references["output"]
        ratios = references.ratios()
        errors = [f"{part.rel_l2:.2e}" for part in (references.golden, references.cpu, references.forecast)]
        shares = [f"{ratios[name]:.3f}" for name in ("token_ratio", "outlier_ratio", "gain_ratio", "shift_ratio")]
        cells = [
            row.mode,
            str(row.seed),
            *errors,
            f"{references.golden.rel_l2 / references.forecast.rel_l2:.3f}",
            f"{references.unexplained:.1e}",
            *shares,
            row.verdict.status,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = parser_of("floor")
    arguments = parser.parse_args(argv)
    device = open_device(arguments.device)
    if device.torch_device.type != "npu":
        parser.error(f"--device {arguments.device}: the switches are an NPU's; give emulated or npu")
    result = list(measured(device))
    if arguments.output:
        arguments.output.write_text(text(result, device) + "\n", encoding="utf-8")
    else:
        print(text(result, device))
    return 0 if all(item.verdict.passed for item in result) else 1
