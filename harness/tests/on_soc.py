"""In a process of its own, since torch_npu keeps the SoC: what cases and probes give on an emulated card of a name, as
one line of JSON.

python -m harness.tests.on_soc Ascend310P3
"""

import json
import sys

import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, Tolerance, validate
from harness.emulator import Machine, fault, install


class Picture(nn.Module):
    """A convolution, GELU, a normalization, attention and products in one."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 64, 8, stride=8), nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Operator(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def built(function):
    return lambda: Operator(function)


CASES = {
    "picture": (Picture, ((2, 3, 56, 56),)),
    "linear": (lambda: nn.Linear(96, 64), ((40, 96),)),
    "matmul": (built(torch.matmul), ((96, 96), (96, 96))),
    "convolution": (built(lambda x, w: F.conv2d(x, w, padding=1)), ((2, 8, 12, 12), (6, 8, 3, 3))),
    "gelu": (built(F.gelu), ((64, 48),)),
    "attention": (built(F.scaled_dot_product_attention), ((2, 4, 33, 32),) * 3),
    "overflow": (built(lambda x: (x * 300) * 400), ((40, 48),)),
    "infinite": (built(lambda x: torch.where(x > 0, 1 / (x - x) + x, x * 2)), ((40, 48),)),
}


def case_of(name, dtype="float32", **more):
    model, shapes = CASES[name]

    def draw(generator):
        return tuple(torch.randn(*shape, generator=generator) for shape in shapes)

    return Case(name=name, model=model, inputs=draw, dtype=dtype, **more)


def told(verdict):
    """A verdict as JSON holds it."""
    ratios = [reference.ratios()["forecast_ratio"] for reference in verdict.references.values()]
    return {
        "status": verdict.status,
        "reasons": [str(reason) for reason in verdict.reasons],
        "ratio": max(ratios, default=None),
        "limits": verdict.tolerance.reason if verdict.tolerance else "",
        "preset": verdict.tolerance.preset if verdict.tolerance else "",
        "forecast": verdict.evidence.forecast if verdict.evidence else None,
        "bits": None
        if verdict.comparison is None or not verdict.references
        else -float(torch.tensor(verdict.references[verdict.output].golden.rel_l2).log2()),
    }


def judged(device, case, *planted):
    with_faults = [fault(*item[:2], **item[2]) for item in planted]
    for with_fault in with_faults:
        with_fault.__enter__()
    try:
        return told(validate(case, 0, device))
    finally:
        for with_fault in reversed(with_faults):
            with_fault.__exit__(None, None, None)


PRODUCTS = ("aclnnMatmul*", "aclnnAddmm*", "aclnnBatchMatMul*")
FLOAT16 = [(pattern, "fp16", {}) for pattern in PRODUCTS]
SCALED = [(pattern, "scale", {"by": 1.01}) for pattern in PRODUCTS]


def rows(device):
    """Healthy rows, and rows with a planted fault, by name."""
    result = {
        f"{name} {dtype}": judged(device, case_of(name, dtype))
        for name in CASES
        for dtype in ("float32", "float16", "bfloat16")
    }
    result["matmul in float16"] = judged(device, case_of("matmul"), *FLOAT16)
    result["matmul scaled"] = judged(device, case_of("matmul"), *SCALED)
    result["picture scaled"] = judged(device, case_of("picture", "float16"), *SCALED)
    result["gelu off"] = judged(device, case_of("gelu"), ("aclnnGelu*", "scale", {"by": 1.0005}))
    result["infinite saturates"] = judged(device, case_of("infinite", "float16"), ("aclnn*", "saturate", {}))
    result["own limits"] = judged(device, case_of("matmul", tolerance=Tolerance(rel_l2=0.5, reason="mine")))
    result["dynamo"] = judged(device, case_of("matmul", tolerance=Tolerance(preset="dynamo")))
    return result


def switches(device):
    """Effective bits of a product and a convolution under each switch that changes them, and what the forecast's error
    is of them.
    """
    result = {}
    torch.npu.conv.allow_hf32 = False
    result["conv.allow_hf32 = False"] = judged(device, case_of("convolution"))
    torch.npu.conv.allow_hf32 = True
    torch.npu.matmul.allow_hf32 = True
    result["matmul.allow_hf32 = True"] = judged(device, case_of("matmul"))
    torch.npu.matmul.allow_hf32 = False
    if hasattr(torch.npu, "CubeMathType"):
        for kind in torch.npu.CubeMathType:
            torch.npu.matmul.cube_math_type = kind
            result[f"cube_math_type = {kind.value}"] = _caught(device, "matmul")
        import torch_npu

        torch_npu._C._npu_setOption({"CUBE_MATH_TYPE": ""})
    for mode in ("allow_fp32_to_fp16", "must_keep_origin_dtype"):
        torch.npu.set_option({"ACL_PRECISION_MODE": mode})
        result[f"{mode}, matmul"] = _caught(device, "matmul")
        torch.npu.conv.allow_hf32 = False
        result[f"{mode}, convolution"] = _caught(device, "convolution")
        torch.npu.conv.allow_hf32 = True
    return result


def _caught(device, name):
    """A card that refuses what it is asked for raises."""
    from harness import HarnessError

    try:
        return judged(device, case_of(name))
    except HarnessError as error:
        return {"status": "ERROR", "reasons": [str(error)]}


def located(device):
    """What localisation names in a healthy model, and in one with a planted fault."""
    from harness.locate import locate

    healthy = locate(case_of("picture"), 0, device)
    with fault("aclnnSilu", kind="scale", by=1.1), fault("aclnnLayerNorm", kind="scale", by=1.1):
        faulty = locate(case_of("picture"), 0, device)
        modules = locate(case_of("picture"), 0, device, level="modules")
    names = {
        "healthy": healthy,
        "faulty": faulty,
        "modules": modules,
        "healthy modules": locate(case_of("picture"), 0, device, level="modules"),
    }
    return {name: None if item.first is None else item.first.operator for name, item in names.items()}


def refused(device):
    """What the chip says where an operator has a bfloat16 tensor; "" where it computes."""
    try:
        (torch.ones(3, dtype=torch.bfloat16).to(device.torch_device) + 1).cpu()
    except RuntimeError as error:
        return str(error)
    return ""


def main(name):
    install(Machine(name=name))
    from harness import open_device

    device = open_device("emulated")
    result = {"device": device.name, "rows": rows(device), "switches": switches(device)}
    torch.npu.set_option(
        {"ACL_PRECISION_MODE": "allow_fp32_to_fp16" if not torch.npu.is_bf16_supported() else "must_keep_origin_dtype"}
    )
    result |= {"located": located(device), "refused": refused(device)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
