"""Where two generations part: the first token that differs, the logits there, and whether it was a near-tie or a fault.

After the first token that differs the two runs read different inputs, so nothing behind it can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import CaseError


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token that the device chose otherwise than the CPU; logits are in their own units."""

    sequence: int
    position: int  # of the generated tokens, from 0
    actual: int  # the device's token
    expected: int  # the CPU's
    margin: float  # how far the device's token lies below the CPU's, in the CPU's logits
    error: float  # largest difference of the logits there, device to CPU
    healthy: float  # largest error there of a healthy run to float64

    @property
    def near_tie(self) -> bool:
        """Whether two healthy errors, one on each token, could turn the choice."""
        return self.margin <= 2 * self.healthy

    @property
    def text(self) -> str:
        """One sentence: what was found, where, and what it means."""
        where = f"token {self.position} of sequence {self.sequence} is {self.actual} where {self.expected} was expected"
        size = f"it lies {self.margin:.3g} below in the CPU's logits, which healthy runs know to {self.healthy:.2g} and the device differs from by {self.error:.2g} there"
        return f"{where}: {size}; " + ("a near-tie" if self.near_tie else "no near-tie: the logits are wrong, or the choice is")


def first_divergence(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], healthy: list[Mapping[str, Tensor]], names: tuple[str, str]) -> Divergence | None:
    """The first position at which a token differs, of all sequences; None where none does.

    `names` are those of the outputs with the tokens (B, T) and with the logits that each was taken from (B, T, V). `healthy` are runs of the same
    inputs, float64 first: the errors of the others to it say how well the logits are known. Where they parted before, `expected` does.

    Raises: CaseError when the outputs are not there, or their shapes are not these.
    """
    tokens, logits = names
    for name in names:
        if name not in expected or name not in actual:
            raise CaseError(f"generates={names!r}, but the outputs are {', '.join(expected)}; return a dict with the tokens (B, T) and their logits (B, T, V)")
    if expected[tokens].dim() != 2 or expected[logits].dim() != 3 or expected[logits].shape[:2] != expected[tokens].shape:
        raise CaseError(f"{tokens} has shape {tuple(expected[tokens].shape)} and {logits} {tuple(expected[logits].shape)} where (B, T) and (B, T, V) were expected")
    place = _parting(actual[tokens], expected[tokens])
    if place is None:
        return None
    sequence, position = place
    if position >= min(actual[tokens].shape[1], expected[tokens].shape[1]):
        return None  # one side ended: the shapes say so
    here, there = (each[logits][sequence, position].double() for each in (expected, actual))
    ours, theirs = int(expected[tokens][sequence, position]), int(actual[tokens][sequence, position])
    golden, known = healthy[0] if healthy else None, 0.0
    for each in [expected, *healthy[1:]] if golden is not None else []:
        parted = _parting(each[tokens], golden[tokens])
        if parted is None or parted[1] >= position:
            known = max(known, float((each[logits][sequence, position].double() - golden[logits][sequence, position].double()).abs().max()))
    return Divergence(
        sequence=sequence,
        position=position,
        actual=theirs,
        expected=ours,
        margin=float(here[ours] - here[theirs]),
        error=float((there - here).abs().max()),
        healthy=known,
    )


def _parting(actual: Tensor, expected: Tensor) -> tuple[int, int] | None:
    """The sequence and the position of the first token that differs: the earliest position of all sequences."""
    length = min(actual.shape[1], expected.shape[1])
    differs = (actual[:, :length] != expected[:, :length]).nonzero()
    if len(differs):
        first = differs[differs[:, 1].argmin()]
        return int(first[0]), int(first[1])
    return (0, length) if actual.shape[1] != expected.shape[1] else None


def until(outputs: Mapping[str, Tensor], position: int, names: tuple[str, str]) -> dict[str, Tensor]:
    """The outputs as far as they can be compared: the tokens before a position, the logits up to it."""
    tokens, logits = names
    return {**outputs, tokens: outputs[tokens][:, :position], logits: outputs[logits][:, : position + 1]}


def shared_length(runs: list[Mapping[str, Tensor]], expected: Mapping[str, Tensor], names: tuple[str, str]) -> int | None:
    """The position of the first token at which any of the runs leaves `expected`; None where none does."""
    places = [_parting(each[names[0]], expected[names[0]]) for each in runs]
    return min((place[1] for place in places if place is not None), default=None)


def greedy(model: torch.nn.Module, ids: Tensor, steps: int) -> dict[str, Tensor]:
    """Greedy generation with a model of transformers: the new tokens (B, T) and the logits that each was taken from (B, T, V).

    For `Case(forward=lambda model, ids: greedy(model, ids, 16), generates=("tokens", "logits"))`.
    """
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return {"tokens": made.sequences[:, ids.shape[1] :], "logits": torch.stack(made.logits, 1)}
