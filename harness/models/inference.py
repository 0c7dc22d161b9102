"""One forward of AIMv2 on a device, on a picture or on seeded noise: what `python -m harness infer` does."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.checkpoints.conversion import checkpoint_digest
from harness.devices import Device, open_device
from harness.errors import HarnessError
from harness.models.aimv2 import VARIANTS, AIMv2, build, load, preprocess
from harness.reference import Models, copy_module, run, run_cpu

DEFAULT = "aimv2-large-patch14-224-distilled"
NATIVE_SIDE = 448  # pixels of the noise that a native-resolution model is given


def model_directory(given: str | Path | None) -> tuple[Path | None, str]:
    """The checkpoint to use and where its name came from: the command line, else MODEL_DIR, else none."""
    if given is not None:
        return Path(given), "--model-dir"
    named = os.environ.get("MODEL_DIR")
    return (Path(named), "MODEL_DIR") if named else (None, "")


def open_model(given: Path | None) -> tuple[AIMv2, str]:
    """The model in float32 on the CPU, and what its weights are, in words.

    Raises: CheckpointError when the directory holds no AIMv2.
    """
    directory, origin = model_directory(given)
    if directory is None:
        return build(DEFAULT, seed=0), f"{DEFAULT} with random weights, seeded:0 (no --model-dir, no MODEL_DIR)"
    model = load(directory, dtype=torch.float32)
    name = next((name for name, config in VARIANTS.items() if config == model.config), "an AIMv2 of its own sizes")
    return (
        model,
        f"{name.removesuffix('-distilled')} from {directory} ({origin}), sha256 {checkpoint_digest(directory)}",
    )


def infer(
    *, image: Path | None, dtype: str, device: str, model_dir: Path | None, seed: int, output: Path | None
) -> str:
    """Run the model once; returns what ran and what came out. `output` gets the features, and the pooled ones, as
    safetensors.

    Raises: HarnessError for a picture, checkpoint, device or output that cannot be used, before anything heavy is done.
    """
    if output is not None:
        check_writable(output)
    directory, _ = model_directory(model_dir)
    if directory is not None and not directory.exists():
        raise HarnessError(
            f"no such model: {directory}; give the directory of a checkpoint, or none for seeded weights"
        )
    picture = (
        None if image is None else preprocess(image, size=None)
    )  # a broken picture is found before the weights are built
    opened = open_device(device)
    model, weights = open_model(model_dir)
    side = model.config.image_size
    if image is not None:
        pixels, source = (picture if side is None else preprocess(image, size=side)), f"{image}"
    else:
        height = side or NATIVE_SIDE
        pixels, source = (
            torch.randn(1, 3, height, height, generator=torch.Generator().manual_seed(seed)),
            f"noise, seed {seed}",
        )
    features, pooled, milliseconds = _forward(model, pixels, getattr(torch, dtype), opened)
    if output is not None:
        write_tensors(output, {"features": features} | ({} if pooled is None else {"pooled": pooled}))
    lines = [
        f"model     {weights}",
        (
            f"device    {opened.torch_device} "
            f"{opened.name}{', EMULATED: no evidence about hardware' if opened.backend == 'emulated' else ''}"
        ),
        f"input     {source}, {tuple(pixels.shape)} {dtype}",
        f"features  {_described(features)}",
        *([] if pooled is None else [f"pooled    {_described(pooled)}"]),
        f"forward   {milliseconds:.1f} ms, the first one, model on the device already",
        *([] if output is None else [f"written   {output}"]),
    ]
    return "\n".join(lines)


def _forward(model: AIMv2, pixels: Tensor, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor | None, float]:
    """Features, pooled features where the model has the head, both on the CPU, and the time in milliseconds."""

    def forward(model: AIMv2, pixels: Tensor) -> list[Tensor]:
        features = model(pixels)
        return [features, model.pool(features)] if model.config.pool else [features]

    if device.torch_device.type == "cpu":
        copied = model if dtype == torch.float32 else copy_module(model, dtype=dtype, device=device.torch_device)
        outputs, milliseconds, _ = run_cpu(copied, pixels.to(dtype), forward=forward, dtype=dtype)
    else:
        with device.telling():
            copied = copy_module(model, dtype=dtype, device=device.torch_device)
            moved = pixels.to(dtype).to(device.torch_device)
            device.synchronize()
            begin = time.perf_counter()
            outputs = run(copied, moved, forward=forward, where=device.where)
            device.synchronize()
            milliseconds = (time.perf_counter() - begin) * 1e3
            outputs = [output.cpu() for output in outputs]
        device.check()
    features, *pooled = outputs
    return features, pooled[0] if pooled else None, milliseconds


def _described(tensor: Tensor) -> str:
    wide = tensor.double()
    broken = int((~torch.isfinite(wide)).sum())
    numbers = f"mean {wide.mean():.6f}, std {wide.std():.6f}, least {wide.min():.4f}, largest {wide.max():.4f}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}: {numbers}" + (
        f", {broken} NOT FINITE" if broken else ""
    )


def check_writable(output: Path) -> None:
    """Raises: HarnessError where a file cannot be written."""
    if output.is_dir():
        raise HarnessError(f"--output {output} is a directory; name a file")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise HarnessError(
            f"--output {output}: cannot write there ({error.strerror}); name a file in a directory that can be written"
        ) from None


def write_tensors(output: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that appears whole or not at all."""
    from safetensors.torch import save_file

    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def bench_aimv2(
    *, device: str, dtype: str, batch_sizes: Sequence[int], iterations: int, warmup: int, model_dir: Path | None
) -> str:
    """Time AIMv2 at several batch sizes; returns the table in markdown, with what was measured and where.

    Raises: DeviceError, CheckpointError as opening them does.
    """
    from harness.report import performance_text
    from harness.run.timing import time_pair

    opened = open_device(device, timing=True)
    model, weights = open_model(model_dir)
    side = model.config.image_size or 224
    wanted, models, rows = getattr(torch, dtype), Models(), []
    devices = (torch.device("cpu"), opened.torch_device)
    with opened.telling("aimv2, timing"):
        copies = tuple(models.get("model", lambda: model, seed=0, dtype=wanted, device=target) for target in devices)
    for size in batch_sizes:
        pixels = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(wanted)
        rows += time_pair(
            "aimv2", wanted, copies, pixels, opened, iterations=iterations, warmup=warmup, batch_size=size
        )
    return f"{weights}\n\n{performance_text(rows, backend=opened.backend, stack=opened.stack.to_dict())}"
