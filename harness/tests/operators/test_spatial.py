"""Pooling, resampling and padding on the emulated device are torch's own, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from harness.tests.operators.conftest import agrees, seeded

IMAGE, VOLUME, LINE = (2, 3, 7, 8), (2, 3, 5, 6, 7), (2, 3, 9)


def _ties(x):
    """A few values only, so that windows hold ties."""
    return (x * 2).round() + 0 * x


FUNCTIONS = {
    "adaptive average": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, (3, 5))),
    "adaptive average to one": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive average 3d": (VOLUME, lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4))),
    "adaptive maximum": (IMAGE, lambda x: F.adaptive_max_pool2d(x, (3, 5))),
    "adaptive maximum 3d": (VOLUME, lambda x: F.adaptive_max_pool3d(x, (2, 3, 4))),
    "average": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "average by divisor": (IMAGE, lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5)),
    "average 3d": (VOLUME, lambda x: F.avg_pool3d(x, 2, 2, 1)),
    "maximum": (IMAGE, lambda x: F.max_pool2d(x, 3, 2, 1)),
    "maximum overlapping": (IMAGE, lambda x: F.max_pool2d(_ties(x), (3, 2), 1, 1)),
    "maximum dilated": (IMAGE, lambda x: F.max_pool2d(x, 2, 2, 1, dilation=2, ceil_mode=True)),
    "maximum of one": (IMAGE, lambda x: F.max_pool2d(x, 1)),
    "maximum unbatched": (IMAGE[1:], lambda x: F.max_pool2d(x, 2)),
    "maximum 3d": (VOLUME, lambda x: F.max_pool3d(_ties(x), 2, 2, 1)),
    "nearest 1d": (LINE, lambda x: F.interpolate(x, 14)),
    "nearest": (IMAGE, lambda x: F.interpolate(x, scale_factor=2)),
    "nearest down": (IMAGE, lambda x: F.interpolate(x, (3, 5))),
    "nearest 3d": (VOLUME, lambda x: F.interpolate(x, scale_factor=1.5)),
    "exact 1d": (LINE, lambda x: F.interpolate(x, 14, mode="nearest-exact")),
    "exact": (IMAGE, lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest-exact")),
    "exact 3d": (VOLUME, lambda x: F.interpolate(x, (3, 8, 9), mode="nearest-exact")),
    "linear": (LINE, lambda x: F.interpolate(x, 14, mode="linear")),
    "bilinear": (IMAGE, lambda x: F.interpolate(x, (10, 5), mode="bilinear")),
    "bilinear by corners": (IMAGE, lambda x: F.interpolate(x, (10, 5), mode="bilinear", align_corners=True)),
    "bilinear by scale": (IMAGE, lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear")),
    "bilinear antialiased": (IMAGE, lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True)),
    "trilinear": (VOLUME, lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
    "bicubic": (IMAGE, lambda x: F.interpolate(x, (10, 5), mode="bicubic")),
    "bicubic by corners": (IMAGE, lambda x: F.interpolate(x, (10, 5), mode="bicubic", align_corners=True)),
    "bicubic antialiased": (IMAGE, lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True)),
    "reflection 1d": (LINE, lambda x: F.pad(x, (2, 1), mode="reflect")),
    "reflection": (IMAGE, lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect")),
    "reflection 3d": (VOLUME, lambda x: F.pad(x, (2, 1, 0, 3, 1, 1), mode="reflect")),
    "replication 1d": (LINE, lambda x: F.pad(x, (2, 1), mode="replicate")),
    "replication": (IMAGE, lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate")),
    "replication 3d": (VOLUME, lambda x: F.pad(x, (2, 1, 0, 3, 1, 1), mode="replicate")),
    "columns": (IMAGE, lambda x: F.unfold(x, (2, 3), dilation=2, padding=1, stride=2)),
    "columns back": ((2, 12, 20), lambda x: F.fold(x, (5, 6), 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_spatial(npu, name, dtype):
    shape, function = FUNCTIONS[name]
    agrees(npu, function, seeded(*shape, dtype=dtype).requires_grad_())
    turned = seeded(*shape[:-2], shape[-1], shape[-2], dtype=dtype).requires_grad_()
    agrees(npu, lambda x: function(x.transpose(-1, -2)), turned)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [True, False])
def test_grid_sample(npu, mode, padding, align):
    sample = lambda x, grid: F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=align)
    agrees(npu, sample, seeded(*IMAGE).requires_grad_(), seeded(2, 4, 5, 2, seed=1).requires_grad_())
    agrees(
        npu,
        sample,
        seeded(*VOLUME).requires_grad_(),
        seeded(2, 3, 4, 5, 3, seed=1).requires_grad_(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_affine_grid(npu):
    agrees(npu, lambda theta: F.affine_grid(theta, [2, 3, 4, 5], align_corners=False), seeded(2, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "pool", "unpool"),
    [
        (IMAGE, F.max_pool2d, F.max_unpool2d),
        (IMAGE[1:], F.max_pool2d, F.max_unpool2d),
        (VOLUME, F.max_pool3d, F.max_unpool3d),
        (VOLUME[1:], F.max_pool3d, F.max_unpool3d),
    ],
)
def test_maxima_go_back_to_their_places(npu, shape, pool, unpool, dtype):
    maxima, places = pool(seeded(*shape), 2, return_indices=True)
    size = shape[2 if len(shape) > 3 + (pool is F.max_pool3d) else 1 :]
    agrees(npu, lambda x, at: unpool(x, at, 2, output_size=size), maxima.to(dtype).requires_grad_(), places)
    turned = maxima.transpose(-1, -2).contiguous().to(dtype).requires_grad_()
    agrees(npu, lambda x, at: unpool(x.transpose(-1, -2), at, 2, output_size=size), turned, places)
