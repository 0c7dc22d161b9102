"""What the harness adds to the bare forwards that a case needs, AIMv2-large over five seeds: at most a tenth.

They are the CPU's in float32, in float64 and under the forecast's rounding, and two of the device."""

from statistics import median
from time import perf_counter

from harness.benchmarks import Figure

_SEEDS = (42, 123, 256, 789, 1024)
_ROUNDS = 3


def measure() -> list[Figure]:
    import torch

    from harness import Case, open_device, validate
    from harness.models.aimv2 import build
    from harness.numerics.expected_error import rounding, rules_of
    from harness.reference import Models

    device, models = open_device("emulated"), Models()
    weights = build("aimv2-large-patch14-224-distilled", 0)
    case = Case(
        name="large",
        model=lambda: weights,
        inputs=lambda generator: torch.randn(1, 3, 224, 224, generator=generator),
    )
    validate(
        case, _SEEDS[0], device, models=models
    )  # the copies of the weights are made once, whatever the number of seeds
    key, cpu, rules = (case.model, None, 0), torch.device("cpu"), rules_of(device.stack)
    moved = models.get(key, case.model, seed=0, dtype=torch.float32, device=device.torch_device)
    wide = models.get(key, case.model, seed=0, dtype=torch.float32, device=cpu, wide=True)

    def bare():
        for seed in _SEEDS:
            x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                weights(x)
                wide(x.double())
                with rounding(rules):
                    weights(x)
                for _ in range(2):
                    moved(x.to(device.torch_device)).cpu()

    def through_the_harness():
        for seed in _SEEDS:
            validate(case, seed, device, models=models)

    times = {bare: [], through_the_harness: []}
    for _ in range(_ROUNDS):
        for function, taken in times.items():
            begin = perf_counter()
            function()
            taken.append(perf_counter() - begin)
    ratio = median(times[through_the_harness]) / median(times[bare])
    return [Figure(name="harness / bare forwards, AIMv2-large, five seeds", value=ratio, promise=1.1)]
