"""The emulated device: a forward of AIMv2-large in float32 costs at most 1.5 of the CPU's; what one operator and the
start cost.
"""

import tempfile

from harness.benchmarks import Figure, in_child, interleaved

_ROUNDS = 7
_OPERATORS = 2000
START = """
import json, time
began = time.perf_counter()
import harness.emulator
harness.emulator.install()
import torch
assert (torch.ones(2).to("npu:0") + 1).cpu().tolist() == [2.0, 2.0]
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def measure() -> list[Figure]:
    import torch

    from harness import open_device
    from harness.models.aimv2 import build
    from harness.reference import copy_module

    device = open_device("emulated")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    large = _ratio(device, copy_module, build("aimv2-large-patch14-224-distilled", 0), images)
    figures = [Figure(name="emulated forward / CPU forward, AIMv2-large float32", value=large, promise=1.5)]
    small = _small_bert()
    if small is not None:
        ids = torch.randint(3, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
        figures.append(
            Figure(
                name="emulated forward / CPU forward, BERT of 4 layers of 256, 8 x 128 tokens",
                value=_ratio(device, copy_module, small, ids),
                promise=3,
            )
        )
    figures.append(
        Figure(
            name="one addition of four numbers on the emulated device",
            value=_one_operator(device),
            promise=150,
            unit="us",
        )
    )
    with tempfile.TemporaryDirectory() as cache:
        cold = in_child(START, XDG_CACHE_HOME=cache)["seconds"]
    figures.append(Figure(name="import to first operator, shims compiled", value=cold, promise=10, unit="s"))
    return [
        *figures,
        Figure(name="import to first operator, shims there", value=in_child(START)["seconds"], promise=8, unit="s"),
    ]


def _ratio(device, copy_module, model, inputs) -> float:
    """Seconds of a forward on the emulated device over those on the CPU, medians of interleaved rounds."""
    import torch

    moved, there = copy_module(model, dtype=torch.float32, device=device.torch_device), inputs.to(device.torch_device)

    def emulated():
        moved(there)
        device.synchronize()

    with torch.no_grad():
        seconds = interleaved([emulated, lambda: model(inputs)], _ROUNDS)
    return seconds[0] / seconds[1]


def _small_bert():
    """A seeded BERT; None without transformers."""
    import torch

    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return None
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000)
    ).eval()


def _one_operator(device) -> float:
    """Microseconds."""
    import torch

    x = torch.ones(4, device=device.torch_device)

    def many():
        for _ in range(_OPERATORS):
            x + x
        device.synchronize()

    return interleaved([many], _ROUNDS)[0] / _OPERATORS * 1e6
