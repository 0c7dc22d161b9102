"""The emulated device: a forward of AIMv2-large in float32 costs at most 1.5 of the CPU's."""

from harness.benchmarks import Figure, interleaved

ROUNDS = 7


def measure() -> list[Figure]:
    import torch

    from harness import open_device
    from harness.models.aimv2 import build
    from harness.reference import copy_module

    device = open_device("emulated")
    model = build("aimv2-large-patch14-224-distilled", 0)
    moved = copy_module(model, dtype=torch.float32, device=device.torch_device)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    there = x.to(device.torch_device)

    def emulated():
        moved(there)
        device.synchronize()

    with torch.no_grad():
        seconds = interleaved([emulated, lambda: model(x)], ROUNDS)
    return [Figure(name="emulated forward / CPU forward, AIMv2-large float32", value=seconds[0] / seconds[1], promise=1.5)]
