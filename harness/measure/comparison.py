"""How far two tensors are apart: one pass in float64, in bounded memory.

This module measures and never judges. `actual` is what the device under test gave, `expected` what it is held against.
The pass is compiled code, comparison.c. Where nothing can be compiled, and for dtypes that it does not read, the same
numbers are computed by torch, chunk by chunk; that code says what each number is, and tests hold the compiled code
against it. torch is imported inside, so that importing the package costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated

from harness.measure.compiled import PART_SIZE
from harness.measure.compiled_comparison import BINS, TOGETHER, CloseLimits, Prepared, Shape, read_together
from harness.typed_json import Bounds
from harness.versions import require_torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

CHUNK = 1 << 18  # elements compared at a time: 2 MiB a float64 temporary, so that they stay in the processor's cache


# What a stored number may be; NaN, which says that nothing was measured, is always one.
Count = Annotated[int, Bounds(0, math.inf, "zero or more")]
Size = Annotated[float, Bounds(0, math.inf, "zero or more")]  # of a difference, an error, a time
Share = Annotated[float, Bounds(0, 1, "between 0 and 1")]
Cosine = Annotated[float, Bounds(-1 - 1e-9, 1 + 1e-9, "between -1 and 1")]
Axes = tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured between one pair of tensors: numbers only.

    Differences are in output units. Where the shapes differ nothing could be measured and the numbers are NaN;
    a NaN on either side makes them NaN, and an infinity that the other side lacks makes max_diff infinite.

    The metadata of a field says what a limit on it needs to know: `at_least`, where it must be at least its limit and
    not at most; `where`, the field that holds where its worst is, and `of`, what lies there if not an element.
    """

    shape: Axes  # of actual
    expected_shape: Axes
    dtype: str  # of actual: "float32", …
    expected_dtype: str
    max_diff: Size = field(default=math.nan, metadata={"where": "worst_index"})  # largest |actual - expected|
    mean_diff: Size = math.nan  # mean |actual - expected|
    # Cosine of the two flattened tensors, at most 1.
    cos_sim: Cosine = field(default=math.nan, metadata={"at_least": True})
    cos_distance: Size = math.nan  # 1 - cosine, without the cancellation of that subtraction
    rel_l2: Size = math.nan  # ‖actual - expected‖ / ‖expected‖
    rms: Size = math.nan  # root mean square of expected: the scale that differences are read against
    worst_index: Axes | None = None  # of max_diff, or of the first element that is not finite on one side only
    worst_actual: float = math.nan  # the two values there
    worst_expected: float = math.nan
    # Least cosine of a token, a vector along the last axis; NaN below two axes.
    token_cos_sim: Cosine = field(default=math.nan, metadata={"at_least": True, "where": "worst_token", "of": "token"})
    worst_token: Axes | None = None
    nan_actual: Count = 0  # elements that are NaN
    nan_expected: Count = 0
    inf_actual: Count = 0  # elements that are +inf or -inf
    inf_expected: Count = 0
    # Positions where one side is NaN or infinite and the other is not the same, sign included.
    nonfinite_differ: Count = 0
    unequal: Count = 0  # elements that are not equal
    unsettled: Size = 0.0  # of whole numbers: in how many healthy runs differ from expected on average, by near-ties
    rmse: Size = math.nan  # root mean square of the differences
    shift: float = math.nan  # mean of actual - expected
    gain: float = (
        math.nan
    )  # <actual - expected, expected> / <expected, expected>: what a factor 1 + gain would have left
    balance: float = math.nan  # share of elements above expected less the share below
    max_rel: Size = math.nan  # largest |difference| / (|expected| + 1e-7): CANN's MARE
    mean_rel: Size = math.nan  # its mean: CANN's MERE
    wape: Size = math.nan  # mean |difference| / mean |expected|: weighted absolute percentage error, as a share
    max_scaled: Size = (
        math.nan
    )  # largest |difference| / (|expected| + rms of its row, or of all that is flat): outliers of any size
    # Largest ‖difference‖ of a row, over the root mean square ‖expected‖ of the rows.
    token_rel_l2: Size = field(default=math.nan, metadata={"where": "worst_token_diff", "of": "token"})
    worst_token_diff: Axes | None = None  # the row of it
    ulp_max: Size = math.nan  # largest difference in units of the last place of expected, in actual's dtype
    ulp_mean: Size = math.nan
    close_atol: Size = math.nan  # the absolute tolerance that every element needs beside torch.testing's relative one
    # Share of elements within torch.testing's two tolerances.
    matched: Share = field(default=math.nan, metadata={"at_least": True})
    dynamo_atol: Size = math.nan  # as close_atol, beside the relative tolerance of PyTorch's compiler benchmarks
    flips: Count = 0  # rows whose largest element is another one
    # The largest gap, in expected, between its largest element and the one that actual has as such.
    flip_margin: Size = field(default=0.0, metadata={"where": "first_flip", "of": "row"})
    first_flip: Axes | None = None  # the row with that gap
    flip_value: float = 0.0  # its largest element in expected
    histogram: tuple[tuple[int, int], ...] = ()  # (bin, elements) of |difference|, `_STEPS` bins an octave; see `edge`

    @property
    def snr(self) -> float:
        """Signal to noise in decibels: 20 log10(‖expected‖ / ‖difference‖)."""
        if self.rel_l2 == 0:
            return math.inf
        return -20 * math.log10(self.rel_l2) if self.rel_l2 < math.inf else -math.inf

    def quantile(self, share: float) -> float:
        """The difference that `share` of the elements do not exceed: the upper edge of its bin, at most 1/4 too large,
        or max_diff.
        """
        wanted, seen = share * sum(count for _, count in self.histogram), 0
        for number, count in self.histogram:
            seen += count
            if seen >= wanted:
                highest = self.max_diff if number > _LAST else min(edge(number + 1), self.max_diff)
                return 0.0 if number == 0 else highest
        return math.nan

    @property
    def comparable(self) -> bool:
        """Whether the shapes agree, so that there was something to measure."""
        return self.shape == self.expected_shape

    @property
    def numel(self) -> int:
        """Number of elements of actual."""
        return math.prod(self.shape)

    @property
    def max_diff_rms(self) -> float:
        """Largest difference in units of the root mean square of expected."""
        return _ratio(self.max_diff, self.rms)


METRICS_AT_LEAST = tuple(item.name for item in fields(Comparison) if item.metadata.get("at_least"))
WORST = {  # by metric: the field that holds where its worst is, and what lies there
    item.name: (item.metadata["where"], item.metadata.get("of", ""))
    for item in fields(Comparison)
    if item.metadata.get("where")
}

_LAST = 1019  # the last bin of finite float32 numbers; larger differences are in the one after it
_STEPS = 4  # bins of the histogram to a factor of two: they are the leading bits of a float32


def edge(number: int) -> float:
    """The lower edge of a bin of the histogram, in output units."""
    octave, step = divmod(number, _STEPS)
    return math.ldexp(1 + step / _STEPS, octave - 127) if octave else math.ldexp(step / _STEPS, -126)


CLOSE = {  # (rtol, atol) of torch.testing.assert_close (torch/testing/_comparison.py)
    "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5), "float32": (1.3e-6, 1e-5), "float64": (1e-7, 1e-7),
    "complex64": (1.3e-6, 1e-5), "complex128": (1e-7, 1e-7),
}  # fmt: skip
DYNAMO = {"float32": 1e-3, "float64": 1e-3, "float16": 1e-2, "bfloat16": 1e-2}  # both tolerances, see `gate.PRESETS`
MANTISSA = {
    "float16": 10,
    "bfloat16": 7,
    "float32": 23,
    "float64": 52,
    "complex64": 23,
    "complex128": 52,
}  # stored bits
SMALLEST = {
    "float16": -14,
    "bfloat16": -126,
    "float32": -126,
    "float64": -1022,
    "complex64": -126,
    "complex128": -1022,
}  # normal exponent
_EXPONENT = 0x7FF << 52  # the bits of a float64 that hold it


def compare(actual: Tensor, expected: Tensor) -> Comparison:
    """Measure how far `actual` is from `expected`, both of any dtype and on any device.

    Both are brought to the CPU and read in float64, a few thousand elements at a time. Complex numbers are compared as
    pairs (a last axis of 2 is added), bools as 0 and 1. An infinity that both sides share counts as no difference, and
    so does a shared fill value, such as the -1e9 of masked logits: it would outweigh all that the model computed.
    The cosine distance is (‖a-e‖² - (‖a‖-‖e‖)²) / (2 ‖a‖ ‖e‖), equal to 1 - cos in exact arithmetic.

    Raises: TorchError where torch is older than the harness needs.
    """
    require_torch()
    import torch

    if actual.is_complex() != expected.is_complex():
        comparison = compare(
            *(tensor if tensor.is_complex() else tensor.to(torch.complex128) for tensor in (actual, expected))
        )
        return replace(comparison, dtype=_name(actual.dtype), expected_dtype=_name(expected.dtype))
    if actual.shape != expected.shape:
        return _header(actual, expected)
    with torch.no_grad():
        return _measure(_on_cpu(actual), _on_cpu(expected), _header(actual, expected))


def compare_all(
    pairs: Sequence[tuple[Tensor, Tensor]], errors: Sequence[tuple[Tensor, Tensor]] = ()
) -> tuple[list[Comparison], list[float]]:
    """`compare` of each of `pairs`, and its `rel_l2` alone of each of `errors`: the same numbers, bit for bit.

    Pairs of one shape that the compiled pass reads are read together: a tensor that several of them share comes from
    memory once. The others are compared one after the other.

    Example: a row's outputs against the CPU's and float64, and how far they are from the forecast.

    >>> import torch
    >>> actual, golden = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5], dtype=torch.float64)
    >>> (against, same), (error,) = compare_all([(actual, golden), (actual, actual)], [(actual, golden)])
    >>> against.max_diff, same.max_diff, error == against.rel_l2
    (0.5, 0.0, True)
    """
    require_torch()
    every = [*((pair, False) for pair in pairs), *((pair, True) for pair in errors)]
    here: dict[int, Tensor] = {}  # by tensor: on the CPU, with its elements in order
    prepared = [_prepared(*pair, brief, here) for pair, brief in every]
    groups: dict[tuple[int, int, int], list[Prepared]] = {}
    for item in prepared:
        if item is not None:
            groups.setdefault(item[1].cut, []).append(item[1])
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            read_together(group[start : start + TOGETHER])
    comparisons = [
        compare(*pair) if item is None else item[0].of_pass(item[1], _header(*pair))
        for pair, item in zip(pairs, prepared)
    ]
    sizes = [
        compare(*pair).rel_l2 if item is None else _error_of(item[1])
        for pair, item in zip(errors, prepared[len(pairs) :])
    ]
    return comparisons, sizes


def _error_of(read: Prepared) -> float:
    part = read.total
    return _relative_l2(part.diff2, part.expected2, part.max_diff)


def _prepared(actual: Tensor, expected: Tensor, brief: bool, here: dict[int, Tensor]) -> tuple[_Sums, Prepared] | None:
    """A pair for the compiled pass; None for one that is compared by itself."""
    import torch

    if actual.is_complex() != expected.is_complex() or actual.shape != expected.shape or not actual.numel():
        return None
    with torch.no_grad():
        for tensor in (actual, expected):
            if id(tensor) not in here:
                here[id(tensor)] = _on_cpu(tensor).contiguous()
    left, right = here[id(actual)], here[id(expected)]
    sums, width = _sums_of(left, _name(actual.dtype))
    ready = sums.prepared(left, right, width, brief)
    return None if ready is None else (sums, ready)


def _header(actual: Tensor, expected: Tensor) -> Comparison:
    """Shapes and dtypes, and no number."""
    return Comparison(
        shape=tuple(actual.shape),
        expected_shape=tuple(expected.shape),
        dtype=_name(actual.dtype),
        expected_dtype=_name(expected.dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_cpu(tensor: Tensor) -> Tensor:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _measure(actual: Tensor, expected: Tensor, header: Comparison) -> Comparison:
    """The shapes and dtypes of `header` with the numbers of two CPU tensors of one shape."""
    if not actual.numel():
        return _of_nothing(header)
    sums, width = _sums_of(actual, header.dtype)
    ready = sums.prepared(actual, expected, width)
    if ready is not None:
        read_together([ready])
        return sums.of_pass(ready, header)
    sums.fill = _fill(expected)
    sums.rms = _rms(expected, sums.fill)
    for start, left, right in _chunks(actual, expected, width if sums.tokens else min(width, CHUNK)):
        sums.add(start, left, right)
    return sums.complete(header, tuple(actual.shape))


def _sums_of(actual: Tensor, dtype: str) -> tuple[_Sums, int]:
    """What sums up tensors like `actual`, and the elements of a row: all of them where rows mean nothing."""
    shape, count = tuple(actual.shape), actual.numel()
    tokens = len(shape) > 1 and shape[-1] > 1
    rows = tokens or 1 < count <= CHUNK
    return _Sums(tokens=tokens, dtype=dtype, rows=rows), shape[-1] if tokens else count


def _of_nothing(header: Comparison) -> Comparison:
    """Of tensors without elements: nothing differs."""
    return replace(
        header,
        max_diff=0.0,
        mean_diff=0.0,
        cos_sim=1.0,
        cos_distance=0.0,
        rel_l2=0.0,
        rms=0.0,
        worst_actual=0.0,
        worst_expected=0.0,
        rmse=0.0,
        shift=0.0,
        gain=0.0,
        balance=0.0,
        max_rel=0.0,
        mean_rel=0.0,
        wape=0.0,
        max_scaled=0.0,
        ulp_max=0.0,
        ulp_mean=0.0,
        close_atol=0.0,
        matched=1.0,
        dynamo_atol=0.0,
    )


FILL = (
    1e3  # times the largest of the other elements, from which on a value that is there more than once is a fill value
)


def _fill(expected: Tensor) -> float | None:
    """The value that masked elements were filled with, None where there is none: the largest by far, and more than
    once.
    """
    import torch

    if not expected.is_floating_point():
        return None
    flat = expected.reshape(-1)
    low, high = (float(item) for item in torch.aminmax(flat))
    value = low if -low > high else high
    if not math.isfinite(value):  # a NaN, or an infinity: those are told apart elsewhere
        return None
    count, rest = 0, 0.0
    for part in torch.split(flat, CHUNK):
        filled = part == value
        count += int(torch.count_nonzero(filled))
        rest = max(rest, float(torch.where(filled, 0.0, part).abs().max()))
        if rest * FILL > abs(value):
            return None
    return value if count > 1 and rest > 0 else None


def _rms(tensor: Tensor, fill: float | None = None) -> float:
    """Root mean square of the finite elements, without those that were filled."""
    import torch

    total = count = 0.0
    for part in torch.split(tensor.reshape(-1), CHUNK):
        part = part.double()
        part = part if fill is None else part[part != fill]
        square = float(torch.dot(part, part))
        if not math.isfinite(square):
            part = part[part.isfinite()]
            square = float(torch.dot(part, part))
        total, count = total + square, count + part.numel()
    return _root(total / count) if count else 0.0


def _chunks(actual: Tensor, expected: Tensor, width: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index of the first element, rows of actual, rows of expected), rows of `width` elements."""
    left, right = actual.reshape(-1), expected.reshape(-1)
    step = max(CHUNK // width, 1) * width
    for start in range(0, left.numel(), step):
        a, e = left[start : start + step], right[start : start + step]
        rows = (-1, width) if a.numel() % width == 0 else (1, -1)  # the last chunk of a flat tensor may be shorter
        yield start, a.view(rows), e.view(rows)


class _Sums:
    """What is carried from chunk to chunk."""

    def __init__(self, tokens: bool, dtype: str, rows: bool):
        self.tokens, self.rows = tokens, rows
        self.rms = 0.0
        self.fill: float | None = None
        self.first_differ: tuple[int, float, float] | None = (
            None  # of what is not finite on one side only: its index and the two values
        )
        self.close = CLOSE.get(dtype, (0.0, 0.0))
        self.dynamo = DYNAMO.get(dtype, 0.0)
        self.mantissa = MANTISSA.get(dtype, 0)  # of integers there is none, and a place is 1
        self.smallest = math.ldexp(1.0, SMALLEST[dtype]) if dtype in SMALLEST else math.nan
        self.shifted = self.above = self.relative = self.ulps = self.scaled_max = self.relative_max = self.ulps_max = (
            0.0
        )
        self.gained, self.within, self.size = 0.0, 0, 0.0
        self.close_excess = self.dynamo_excess = -math.inf
        self.token_diff2, self.worst_token_diff = -1.0, 0
        self.flips, self.flip_margin, self.flip_value = 0, 0.0, 0.0
        self.first_flip: int | None = None  # the row
        self.histogram: list[int] | None = None
        self.count = self.width = 0
        self.abs_diff = self.diff2 = self.actual2 = self.expected2 = self.dot = 0.0
        self.max_diff, self.worst = -1.0, 0
        self.worst_values: tuple[float, float]  # of the worst element, from the first chunk on
        self.token_distance, self.worst_token = -1.0, 0
        self.nan_actual = self.nan_expected = self.inf_actual = self.inf_expected = 0
        self.nonfinite_differ = self.unequal = 0

    def prepared(self, actual: Tensor, expected: Tensor, width: int, brief: bool = False) -> Prepared | None:
        """Two tensors, rows of `width`, for the compiled pass; None where there is none for them."""
        limits = CloseLimits(
            close_relative=self.close[0],
            close_absolute=self.close[1],
            dynamo_relative=self.dynamo,
            mantissa=self.mantissa,
            smallest=self.smallest,
        )
        shape = Shape(width=width, tokens=self.tokens, rows=self.rows, step=min(PART_SIZE, CHUNK))
        return Prepared.of(actual, expected, shape, limits, brief)

    def of_pass(self, read: Prepared, header: Comparison) -> Comparison:
        """The shapes and dtypes of `header` with the numbers of what the compiled pass read."""
        part, self.histogram = read.total, read.histogram
        self.count, self.width, _ = read.cut
        for name, *_ in part._fields_:
            if name in vars(self) and name not in ("first_differ", "first_flip"):  # -1 where there is none
                setattr(self, name, getattr(part, name))
        self.worst_values = part.worst_actual, part.worst_expected
        if part.first_differ >= 0:
            self.first_differ = part.first_differ, part.differ_actual, part.differ_expected
        self.first_flip = part.first_flip if part.first_flip >= 0 else None
        return self.complete(header, read.shape)

    def add(self, start: int, actual: Tensor, expected: Tensor) -> None:
        """Take in one chunk, (rows, width) each; `start` is the flat index of its first element."""
        import torch

        a, e = (tensor.to(torch.float64, copy=True) for tensor in (actual, expected))  # what follows works in place
        if self.fill is not None:
            shared = (a == self.fill) & (e == self.fill)
            a.masked_fill_(shared, 0.0), e.masked_fill_(shared, 0.0)
        diff = a - e
        self.count, self.width = self.count + a.numel(), a.shape[1]
        self.unequal += int(torch.count_nonzero(actual != expected))
        diff2 = torch.linalg.vecdot(diff, diff)
        if not bool(torch.isfinite(diff2).all()):  # rare: only then is every element looked at
            diff = self._nonfinite(start, a, e, diff)
            diff2 = torch.linalg.vecdot(diff, diff)
        actual2, expected2, dot = torch.linalg.vecdot(a, a), torch.linalg.vecdot(e, e), torch.linalg.vecdot(a, e)
        self.gained += float(torch.linalg.vecdot(diff, e).sum())
        self.shifted += float(diff.sum())
        self.above += float(torch.sign(diff).sum())
        magnitude = diff.abs_()
        self.abs_diff += float(magnitude.sum())
        self._find_worst(start, a, e, magnitude)
        for name, rows in (("diff2", diff2), ("actual2", actual2), ("expected2", expected2), ("dot", dot)):
            setattr(self, name, getattr(self, name) + float(rows.sum()))
        if self.tokens:
            self._find_worst_token(start, diff2, actual2, expected2, dot)
        self._count(magnitude)
        if self.rows:
            self._find_flips(start, actual, expected)
        self._weigh(magnitude, e.abs_(), expected2)  # last, since it works in place

    def _count(self, magnitude: Tensor) -> None:
        """Add to the histogram. The bins are the leading bits of a float32: its exponent and two of its mantissa."""
        import torch

        bits = magnitude.float().view(torch.int32).view(-1) >> 21
        counts = torch.bincount(bits, minlength=BINS).tolist()
        self.histogram = counts if self.histogram is None else [sum(pair) for pair in zip(self.histogram, counts)]

    def _find_flips(self, start: int, actual: Tensor, expected: Tensor) -> None:
        import torch

        actual, expected = (
            tensor.byte() if tensor.dtype == torch.bool else tensor for tensor in (actual, expected)
        )  # bools have no argmax
        left, right = actual.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
        gaps = (expected.gather(1, right).double() - expected.gather(1, left).double()).view(
            -1
        )  # equal logits: either is the decision
        gaps = torch.where((left == right).view(-1), 0.0, gaps).nan_to_num_(nan=0.0, posinf=math.inf)
        self.flips += int((gaps > 0).sum())
        row = int(gaps.argmax())
        gap = float(gaps[row])
        if gap > self.flip_margin:
            self.flip_margin, self.first_flip, self.flip_value = (
                gap,
                start // self.width + row,
                float(expected[row, right[row]]),
            )

    def _weigh(self, magnitude: Tensor, size: Tensor, expected2: Tensor) -> None:
        """Differences against the size of what was expected. Changes both in place."""
        import torch

        self.size += float(size.sum())
        for name, tolerance in (("close_excess", self.close[0]), ("dynamo_excess", self.dynamo)):
            excess = torch.add(magnitude, size, alpha=-tolerance)
            setattr(self, name, _largest(getattr(self, name), float(excess.max())))
            if name == "close_excess":
                self.within += int(torch.count_nonzero(excess <= self.close[1]))
        least = self.rms / 10 if self.tokens else self.rms  # a row of nothing is measured by the others
        scale = torch.add(
            size, (expected2 / size.shape[1]).sqrt_().clamp_(min=least)[:, None] if self.tokens else least
        )
        torch.div(magnitude, scale, out=scale)
        largest = float(scale.max())
        if math.isnan(largest) and not bool(magnitude.isnan().any()):  # 0 / 0: nothing was expected, and it was met
            largest = float(scale.nan_to_num_(nan=0.0, posinf=math.inf).max())
        self.scaled_max = _largest(self.scaled_max, largest)
        torch.div(magnitude, torch.add(size, 1e-7), out=scale)
        self.relative += float(scale.sum())
        self.relative_max = _largest(self.relative_max, float(scale.max()))
        ulp = size.view(torch.int64).bitwise_and_(_EXPONENT).view(torch.float64).clamp_(min=self.smallest)
        ulps = magnitude.div_(ulp if self.mantissa else 1.0)
        self.ulps += float(ulps.sum())
        self.ulps_max = _largest(self.ulps_max, float(ulps.max()))

    def _nonfinite(self, start: int, a: Tensor, e: Tensor, diff: Tensor) -> Tensor:
        """Count what is not finite and make shared infinities no difference. Zeroes them in `a` and `e`, in place."""
        import torch

        nan_a, nan_e, inf_a, inf_e = a.isnan(), e.isnan(), a.isinf(), e.isinf()
        for name, mask in (
            ("nan_actual", nan_a),
            ("nan_expected", nan_e),
            ("inf_actual", inf_a),
            ("inf_expected", inf_e),
        ):
            setattr(self, name, getattr(self, name) + int(torch.count_nonzero(mask)))
        shared = inf_a & (a == e)
        either = nan_a | nan_e | inf_a | inf_e
        differ = (either & ~shared & ~(nan_a & nan_e)).view(-1)
        self.nonfinite_differ += int(torch.count_nonzero(differ))
        if self.first_differ is None and bool(differ.any()):
            first = int(differ.int().argmax())
            self.first_differ = start + first, float(a.view(-1)[first]), float(e.view(-1)[first])
        for tensor in (a, e, diff):
            tensor.masked_fill_(shared, 0.0)
        return diff

    def _find_worst(self, start: int, a: Tensor, e: Tensor, magnitude: Tensor) -> None:
        flat = int(magnitude.argmax())  # a NaN counts as the largest
        result = float(magnitude.view(-1)[flat])
        if math.isnan(self.max_diff) or not (result > self.max_diff or math.isnan(result)):
            return
        self.max_diff, self.worst = result, start + flat
        self.worst_values = (float(a.view(-1)[flat]), float(e.view(-1)[flat]))

    def _find_worst_token(self, start: int, diff2: Tensor, actual2: Tensor, expected2: Tensor, dot: Tensor) -> None:
        largest = int(diff2.argmax())
        if not float(diff2[largest]) <= self.token_diff2 and not math.isnan(self.token_diff2):
            self.token_diff2, self.worst_token_diff = float(diff2[largest]), start // self.width + largest
        distance = _cos_distance_rows(diff2, actual2, expected2, dot)
        row = int(distance.argmax())
        result = float(distance[row])
        if math.isnan(self.token_distance) or not (result > self.token_distance or math.isnan(result)):
            return
        self.token_distance, self.worst_token = result, start // self.width + row

    def complete(self, header: Comparison, shape: tuple[int, ...]) -> Comparison:
        """The shapes and dtypes of `header` with the numbers of what was added; places are in `shape`."""
        assert self.histogram is not None, "nothing was added"
        distance = _cos_distance(self.diff2, self.actual2, self.expected2, self.dot)
        if _is_lost(self.diff2, self.max_diff):
            self.diff2 = distance = math.nan
        if self.first_differ is not None:
            self.worst, *values = self.first_differ
            self.worst_values = values[0], values[1]
        result = replace(
            header,
            max_diff=self.max_diff,
            mean_diff=self.abs_diff / self.count,
            cos_sim=1.0 - distance,
            cos_distance=distance,
            rel_l2=_relative_l2(self.diff2, self.expected2, self.max_diff),
            rms=_root(self.expected2 / self.count),
            worst_index=_unravel(self.worst, shape),
            worst_actual=self.worst_values[0],
            worst_expected=self.worst_values[1],
            nan_actual=self.nan_actual,
            nan_expected=self.nan_expected,
            inf_actual=self.inf_actual,
            inf_expected=self.inf_expected,
            nonfinite_differ=self.nonfinite_differ,
            unequal=self.unequal,
            rmse=_root(self.diff2 / self.count),
            shift=self.shifted / self.count,
            gain=_ratio(self.gained, self.expected2) if self.gained >= 0 else -_ratio(-self.gained, self.expected2),
            balance=self.above / self.count,
            max_rel=self.relative_max,
            mean_rel=self.relative / self.count,
            wape=_ratio(self.abs_diff, self.size),
            max_scaled=self.scaled_max,
            ulp_max=self.ulps_max * 2.0**self.mantissa,
            ulp_mean=self.ulps / self.count * 2.0**self.mantissa,
            close_atol=_largest(0.0, self.close_excess),
            dynamo_atol=_largest(0.0, self.dynamo_excess),
            matched=self.within / self.count,
            flips=self.flips,
            flip_margin=self.flip_margin,
            flip_value=self.flip_value,
            first_flip=None if self.first_flip is None else _unravel(self.first_flip, shape[:-1]),
            histogram=tuple((number, count) for number, count in enumerate(self.histogram) if count),
        )
        if not self.tokens:
            return result
        return replace(
            result,
            token_cos_sim=1.0 - self.token_distance,
            worst_token=_unravel(self.worst_token, shape[:-1]),
            token_rel_l2=_ratio(_root(self.token_diff2), _root(self.expected2 * self.width / self.count)),
            worst_token_diff=_unravel(self.worst_token_diff, shape[:-1]),
        )


def _is_lost(diff2: float, max_diff: float) -> bool:
    """Whether the squares of differences are zero and the differences are not: those of float64 numbers below 1e-162,
    of which nothing can be said.
    """
    return diff2 == 0 and max_diff > 0


def _relative_l2(diff2: float, expected2: float, max_diff: float) -> float:
    return math.nan if _is_lost(diff2, max_diff) else _ratio(_root(diff2), _root(expected2))


def _largest(one: float, other: float) -> float:
    """The larger; NaN where one is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _cos_distance(diff2: float, actual2: float, expected2: float, dot: float) -> float:
    """1 - cosine, from squared norms and the product; two zero vectors point the same way, a zero and another do not.

    Near 0 by the difference, in which nothing cancels; away from it by the cosine, since there the norms may be far
    apart.
    """
    if actual2 == 0 or expected2 == 0:
        return 0.0 if actual2 == expected2 else 1.0
    product = _root(actual2) * _root(expected2)
    plain = 1 - dot / product if product else math.nan
    gap = _root(actual2) - _root(expected2)
    near = (diff2 - gap * gap) / (2 * product) if product else math.nan
    distance = plain if plain > 0.01 else near
    return min(max(distance, 0.0), 2.0) if distance == distance else distance


def _cos_distance_rows(diff2: Tensor, actual2: Tensor, expected2: Tensor, dot: Tensor) -> Tensor:
    """`_cos_distance` of every row."""
    import torch

    left, right = actual2.sqrt(), expected2.sqrt()
    product = left * right
    plain = 1 - dot / product
    distance = torch.where(plain > 0.01, plain, (diff2 - (left - right).square_()) / (2 * product)).clamp_(0.0, 2.0)
    zero = (actual2 == 0) | (expected2 == 0)
    return torch.where(zero, (actual2 != expected2).double(), distance) if bool(zero.any()) else distance


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def _ratio(part: float, whole: float) -> float:
    """part / whole, where nothing of nothing is 0 and something of nothing is infinite."""
    if whole != 0:
        return part / whole
    if part == 0:
        return 0.0
    return math.inf if part > 0 else math.nan


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))
