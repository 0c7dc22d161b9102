"""Where two generations part: the first token that differs, the logits there, and whether it was a near-tie or a fault.

After the first token that differs the two runs read different inputs, so nothing behind it can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
        """Whether two healthy errors, one on each token, could turn the choice. Where nothing is known of them it is
        none.
        """
        return abs(self.margin) <= 2 * self.healthy

    @property
    def text(self) -> str:
        """One sentence: what was found, where, and what it means."""
        where = f"token {self.position} of sequence {self.sequence} is {self.actual} where {self.expected} was expected"
        if self.healthy != self.healthy:
            return (
                f"{where}: it lies {self.margin:.3g} below in the CPU's logits, and no healthy run says how well "
                "they are known"
            )
        size = (
            f"it lies {self.margin:.3g} below in the CPU's logits, which healthy runs know to {self.healthy:.2g} "
            f"and the device differs from by {self.error:.2g} there"
        )
        return f"{where}: {size}; " + (
            "a near-tie" if self.near_tie else "no near-tie: the logits are wrong, or the choice is"
        )


def first_divergence(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    healthy: list[Mapping[str, Tensor]],
    names: tuple[str, str],
) -> Divergence | None:
    """The first position at which a token differs, of all sequences; None where none does.

    `names` are those of the outputs with the tokens (B, T) and with the logits that each was taken from (B, T, V).
    `healthy` are runs of the same inputs, float64 first: the errors of the others to it say how well the logits are
    known. Of several sequences that part there, the gravest.

    Raises: CaseError when the outputs are not there, or their shapes are not these.
    """
    tokens, logits = names
    for name in names:
        if name not in expected or name not in actual:
            raise CaseError(
                f"generates={names!r}, but the outputs are {', '.join(expected)}; return a dict with the "
                "tokens (B, T) and their logits (B, T, V)"
            )
    if (
        expected[tokens].dim() != 2
        or expected[logits].dim() != 3
        or expected[logits].shape[:2] != expected[tokens].shape
    ):
        raise CaseError(
            f"{tokens} has shape {tuple(expected[tokens].shape)} and {logits} {tuple(expected[logits].shape)} "
            "where (B, T) and (B, T, V) were expected"
        )
    parted = _partings(actual[tokens], expected[tokens])
    length = min(actual[tokens].shape[1], expected[tokens].shape[1])
    position = min(parted, default=length)
    if position >= length:
        return None  # none differs, or one side ended: the shapes say so
    result = [
        _divergence(sequence, position, actual, expected, healthy, names)
        for sequence, index in enumerate(parted)
        if index == position
    ]
    return max(result, key=lambda value: (not value.near_tie, abs(value.margin)))


def _divergence(
    sequence: int,
    position: int,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    healthy: list[Mapping[str, Tensor]],
    names: tuple[str, str],
) -> Divergence:
    tokens, logits = names
    here, there = (tensor[logits][sequence, position].double() for tensor in (expected, actual))
    ours, theirs = int(expected[tokens][sequence, position]), int(actual[tokens][sequence, position])
    return Divergence(
        sequence=sequence,
        position=position,
        actual=theirs,
        expected=ours,
        margin=float(here[ours] - here[theirs]),
        error=float((there - here).abs().max()),
        healthy=_known(sequence, position, expected, healthy, names) if healthy else math.nan,
    )


def _known(
    sequence: int,
    position: int,
    expected: Mapping[str, Tensor],
    healthy: list[Mapping[str, Tensor]],
    names: tuple[str, str],
) -> float:
    """The largest error of healthy logits at a place; where a run parted from float64 before or one of both ended, at
    the places where they had not.
    """
    tokens, logits = names
    golden, *others = healthy
    known = []
    for run in (expected, *others):
        parted = _partings(run[tokens], golden[tokens])
        length = min(golden[logits].shape[1], run[logits].shape[1])
        if position <= parted[sequence] and position < length:
            known.append(
                float(
                    (run[logits][sequence, position].double() - golden[logits][sequence, position].double()).abs().max()
                )
            )
        else:
            before = [(row, column) for row, index in enumerate(parted) for column in range(min(index + 1, length))]
            known += [
                float((run[logits][index].double() - golden[logits][index].double()).abs().max()) for index in before
            ]
    return max(known, default=math.nan)


def _partings(actual: Tensor, expected: Tensor) -> list[int]:
    """For each sequence the position of the first token that differs; the shorter length where none does."""
    length = min(actual.shape[1], expected.shape[1])
    differs = actual[:, :length] != expected[:, :length]
    return [int(row.nonzero()[0]) if bool(row.any()) else length for row in differs]


def until(outputs: Mapping[str, Tensor], position: int, names: tuple[str, str]) -> dict[str, Tensor]:
    """The outputs as far as they can be compared: the tokens before a position, the logits up to it."""
    tokens, logits = names
    return {**outputs, tokens: outputs[tokens][:, :position], logits: outputs[logits][:, : position + 1]}


def shared_length(
    runs: list[Mapping[str, Tensor]], expected: Mapping[str, Tensor], names: tuple[str, str]
) -> int | None:
    """The position of the first token at which any of the runs leaves `expected`; None where none does."""
    tokens = names[0]
    whole = expected[tokens].shape[1]
    first = min((position for run in runs for position in _partings(run[tokens], expected[tokens])), default=whole)
    return first if first < whole else None


class Generates(Protocol):
    """What `greedy` asks of a model: the method `generate` of transformers."""

    @property
    def generate(self) -> Callable[..., Any]: ...


def greedy(model: Generates, inputs: Tensor | Mapping[str, Any], steps: int) -> dict[str, Tensor]:
    """Greedy generation with a model of transformers: the new tokens (B, T) and the logits that each was taken from (B,
    T, V).

    `inputs`: token ids (B, N), or what `generate` takes by name: ids with a mask, pictures, sounds.

    For `Case(forward=lambda model, ids: greedy(model, ids, 16), generates=("tokens", "logits"))`.
    """
    given = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    made = model.generate(
        **given,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(made.logits, 1)
    return {"tokens": made.sequences[:, -logits.shape[1] :], "logits": logits}
