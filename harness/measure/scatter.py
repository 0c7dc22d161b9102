"""How far healthy runs of one computation scatter: from a few runs that round at random.

The error of an output with few elements says little by itself: of ten logits two healthy runs may differ threefold.
Runs whose roundings are drawn at random (`harness.numerics.random_rounding`) tell the size of the error and how many of
the elements are independent, and with both how much more than that size a healthy device may lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from harness.measure.comparison import Count, Size, compare

if TYPE_CHECKING:
    from torch import Tensor

RUNS = 16  # that round at random
RISK = 1e-2  # of a device whose roundings are `LARGER` times as large as expected, to be blamed for one output
LARGER = 2.0


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """What `runs` with random roundings differ by from the one without: root mean squares of the metrics of these
    names.
    """

    runs: Count
    degrees: Size  # of freedom: how many independent errors the output's error is made of
    rel_l2: Size
    token_rel_l2: Size
    max_scaled: Size
    gain: Size
    shift: Size
    max_diff: Size
    rmse: Size

    @property
    def slack(self) -> float:
        """How many times the floor a healthy device may lose.

        `LARGER` times the root of the ratio of two mean squares, one of `degrees` and one of `runs` times so many,
        which only one in 1 / `RISK` exceeds: the quantile of the F distribution.
        """
        return LARGER * math.sqrt(f_quantile(1 - RISK, self.degrees, self.runs * self.degrees))

    def explains(self, error: float) -> bool:
        """Whether a relative L2 error is one that these roundings make; a larger one comes from roundings that do not
        move here.
        """
        return error <= self.rel_l2 * math.sqrt(f_quantile(1 - RISK, self.degrees, self.runs * self.degrees))


METRICS = tuple(field.name for field in fields(Scatter) if field.name not in ("runs", "degrees"))


def scatter_of(moved: Sequence[Tensor], still: Tensor) -> Scatter | None:
    """The scatter of runs with random roundings around the one without.

    Args:
        moved: at least two outputs of runs with random roundings.
        still: the output of the run without; the same shape and dtype.

    Returns: None where it cannot be told: fewer than two runs, another shape, complex numbers, elements that are not
    finite, or no run that differs.

    The degrees of freedom of an error with the covariance C are tr(C)² / tr(C²) (F. E. Satterthwaite, An approximate
    distribution of estimates of variance components, Biometrics 2, 1946): tr(C) is the mean of |d|² over the runs'
    differences d, tr(C²) the mean of (d · d')² over pairs of runs.
    """
    import torch

    if len(moved) < 2 or still.is_complex() or any(tensor.shape != still.shape for tensor in moved):
        return None
    differences = torch.stack([(tensor.double() - still.double()).reshape(-1) for tensor in moved])
    if not bool(differences.isfinite().all()) or not bool(differences.any()):
        return None
    products = differences @ differences.mT
    whole = float(products.diagonal().mean())
    pairs = products[tuple(torch.triu_indices(len(moved), len(moved), 1))]
    shared = float(pairs.square().mean())
    most = float(still.numel())
    degrees = most if shared == 0 else min(whole**2 / shared, most)  # at least 1, by Cauchy and Schwarz
    compared = [compare(item, still) for item in moved]
    sizes = {name: math.sqrt(fmean(float(getattr(item, name)) ** 2 for item in compared)) for name in METRICS}
    return Scatter(runs=len(moved), degrees=degrees, **sizes)


def f_quantile(share: float, above: float, below: float) -> float:
    """The quantile of the F distribution with `above` and `below` degrees of freedom, for a share of a half or more.

    By Paulson's normal approximation of the cube root (E. Paulson, Annals of Mathematical Statistics 13, 1942), within
    4 % for three degrees of freedom and more below. Infinite where the approximation has no answer: very few degrees
    below.

    >>> round(f_quantile(0.99, 10, 80), 1)
    2.6
    """
    z = NormalDist().inv_cdf(share)
    a, b = 2 / (9 * above), 2 / (9 * below)
    # (1 - b) r - (1 - a) = z √(b r² + a) for the cube root r, squared: a quadratic equation
    square, linear, rest = (1 - b) ** 2 - z**2 * b, -2 * (1 - a) * (1 - b), (1 - a) ** 2 - z**2 * a
    if square <= 0:
        return math.inf
    root = (-linear + math.sqrt(max(linear**2 - 4 * square * rest, 0.0))) / (2 * square)
    return root**3
