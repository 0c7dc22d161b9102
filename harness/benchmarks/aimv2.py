"""AIMv2 at full size against transformers' on the same weights: as fast, and equal to float64 rounding."""

import copy
import tempfile
from pathlib import Path

from harness.benchmarks import Figure, interleaved

_ROUNDS = 7


def measure() -> list[Figure]:
    import torch

    from harness import compare
    from harness.models.aimv2 import build
    from harness.tests.reference_aimv2 import in_float64, transformers_model

    ours, x = (
        build("aimv2-large-patch14-224-distilled", 0),
        torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs = copy.deepcopy(
            transformers_model(ours, Path(folder))
        )  # in memory, as ours: the loaded one is mapped from its file
        seconds = interleaved([lambda: ours(x), lambda: theirs(x).last_hidden_state], _ROUNDS)
        single = compare(ours(x), theirs(x).last_hidden_state).max_diff
        double = compare(ours.double()(x.double()), in_float64(theirs)(x.double()).last_hidden_state).max_diff
    return [
        Figure(name="AIMv2-large float32 forward / transformers'", value=seconds[0] / seconds[1], promise=1.0),
        Figure(name="AIMv2-large float32, max_diff to transformers'", value=single, promise=2e-5),
        Figure(name="AIMv2-large float64, max_diff to transformers'", value=double, promise=1e-12),
    ]
