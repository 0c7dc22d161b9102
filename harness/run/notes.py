"""What a row's notes say."""

from __future__ import annotations

from harness.devices import Watched
from harness.judging.verdict import Verdict
from harness.run.comparisons import near_tied
from harness.run.cpu import CpuSide

UNMOVED = (
    "no bit of the output changes when every input moves by one rounding: see that the model uses its inputs, and that "
    "`forward` returns what this run computed"
)


def drawn_text(cpu: CpuSide) -> str:
    if not cpu.drawn.any:
        return ""
    if cpu.case.own_random:
        return "it draws random numbers: every side drew its own"
    return "it draws random numbers: all sides got those that the CPU drew"


def ties_text(verdict: Verdict) -> str:
    """What is said of whole numbers that differ by near-ties."""
    texts = [
        f"{name}: {item.unequal} of {item.numel} whole numbers differ, in healthy runs {item.unsettled:.2g} on average"
        for name, item in near_tied(verdict.comparisons).items()
    ]
    return f"near-ties: {'; '.join(texts)}" if texts else ""


def few_text(verdict: Verdict) -> str:
    """What is said of a verdict on few elements that was judged by their scatter."""
    known = [reference for reference in verdict.references.values() if reference.scatter is not None]
    if not known:
        return ""
    least = min(known, key=lambda value: value.slack)
    return (
        f"few elements: {least.scatter.runs} CPU runs with random roundings show an error made of about "
        f"{least.scatter.degrees:.0f} "
        f"independent ones, so a healthy device may lose {least.slack:.2g} floors"
    )


def pinned_text(cpu: CpuSide) -> str:
    """What is said of a model whose float64 reference is not float64 throughout."""
    why = cpu.models.pinned.get(cpu.case.subject)
    if why is None:
        return ""
    return (
        "the float64 reference computes in float32 where the model asks for it by name, since it raises "
        f"otherwise: {why}"
    )


def blind_text(seen: Watched) -> str:
    """What is said of a model that raises only while its operators are watched."""
    if not seen.blind:
        return ""
    return (
        f"not watched: fallbacks to the CPU were not looked for, since {seen.blind} raises while operators are "
        "watched, and not otherwise"
    )


def host_text(seen: Watched) -> str:
    """What is said of a model whose own code leaves the device."""
    if not seen.on_host:
        return ""
    return (
        "ON HOST: the model's own code brings values from the device to the CPU and computes there: "
        f"{', '.join(seen.on_host[:6])}"
    )
