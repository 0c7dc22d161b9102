"""What a row's notes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from harness.case import Case
from harness.devices import Watched
from harness.errors import CaseError
from harness.judging.verdict import Verdict
from harness.measure import compare
from harness.run.comparisons import near_tied
from harness.run.cpu import CpuSide

BATCH_INVARIANCE = "batch invariance"  # what the note on a sample alone and in its batch begins with
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


def alone_text(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is said of a sample that was run alone and in its batch: whether the bits are the same, and by how much
    they differ. Raises: CaseError where the outputs that the case names are not there.
    """
    if case.alone is None:
        return ""
    pairs = []
    for side in (actual, expected):
        if any(name not in side for name in case.alone):
            raise CaseError(f"{case.name}: alone={case.alone!r}, but the outputs are {', '.join(side)}")
        pairs.append(tuple(side[name] for name in case.alone))
    return f"{BATCH_INVARIANCE}: a sample alone and in its batch {_sides(pairs)}"


def _sides(pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    on_device, on_cpu = (_apart(*pair) for pair in pairs)
    if on_device == on_cpu:
        return f"{on_device} on the device and on the CPU"
    return f"{on_device} on the device, {on_cpu} on the CPU"


def _apart(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return "have different shapes"
    result = compare(one, other)
    if not result.unequal:
        return "have the same bits"
    return (
        f"differ in {result.unequal} of {result.numel} elements by at most {result.max_diff:.2e} "
        f"(rel_l2 {result.rel_l2:.2e})"
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
