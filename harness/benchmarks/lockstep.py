"""What it costs to look at every operator of AIMv2-large, in units of the CPU's forward and the device's: at most four
of them in float32, five in half, and a quarter more memory than the two need that hold the same weights. Where no
operator explains the row, a run of the device by itself is added, which is compared call by call: at most six then."""

from harness.benchmarks import Figure, in_child, interleaved

_ROUNDS = 3
PROMISES = {
    "float32": 4.0,
    "float16": 5.0,
    "bfloat16": 5.0,
}  # a dump of every module and call takes 24 forwards elsewhere
WITH_PLAIN_RUN = 6.0
HEAVIER = 1.25

_MEMORY = """
import json
from harness.benchmarks import high_water
from harness.benchmarks.lockstep import subjects
for each in subjects("float32")[:{count}]:
    each()
print(json.dumps(high_water()))
"""


def subjects(dtype: str) -> list:
    """The CPU's forward, the device's, the two in lockstep, and these with a run of the device by itself, as calls; the
    weights are made.
    """
    import torch

    from harness import Case, open_device
    from harness.locate import Symptom, locate
    from harness.models.aimv2 import build
    from harness.reference import Models

    device, models = open_device("emulated"), Models()
    case = Case(
        name="large",
        model=lambda: build("aimv2-large-patch14-224-distilled", 0),
        inputs=lambda generator: torch.randn(1, 3, 224, 224, generator=generator),
        dtype=dtype,
    )
    x = case.inputs(torch.Generator().manual_seed(1)).to(case.torch_dtype)
    devices = (torch.device("cpu"), device.torch_device)
    here, there = (models.get(**case.built, device=item) for item in devices)

    def forward(model, target):
        with torch.no_grad():
            model(x.to(target)).cpu()

    return [
        lambda: forward(here, "cpu"),
        lambda: forward(there, device.torch_device),
        lambda: locate(case, 1, device, models=models, row=Symptom(fails=False)),
        lambda: locate(case, 1, device, models=models),
    ]


def measure() -> list[Figure]:
    result = []
    for dtype, promise in PROMISES.items():
        cpu, device, lockstep, with_plain_run = interleaved(subjects(dtype), _ROUNDS)
        name = f"/ CPU + device forward, AIMv2-large {dtype}"
        result += [
            Figure(name=f"lockstep {name}", value=lockstep / (cpu + device), promise=promise),
            Figure(
                name=f"lockstep and a plain run {name}", value=with_plain_run / (cpu + device), promise=WITH_PLAIN_RUN
            ),
        ]
    bare, whole = (in_child(_MEMORY.format(count=count)) for count in (2, 4))
    result.append(
        Figure(
            name="peak memory of lockstep / of the two forwards, AIMv2-large float32",
            value=whole / bare,
            promise=HEAVIER,
        )
    )
    return result
