"""The cause of a wrong operator is named where the evidence names one: each is planted, and none is named of another
fault.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import harness.emulator.operators  # noqa: F401  the operators that `changed` changes
from harness import emulator
from harness.emulator.table import changed
from harness.locate.diagnose import CLUES, cause_of
from harness.locate.replay import Replay
from harness.tests.needs import emulated_device


@pytest.fixture(scope="module")
def npu():
    return emulated_device()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def edited(edit):
    """An operator whose first result is edited: `edit(result, arguments)`."""

    def change(real):
        def meaning(*args, **kwargs):
            result = real(*args, **kwargs)
            many = isinstance(result, (tuple, list))
            one = edit(result[0] if many else result, args)
            return (one, *result[1:]) if many else one

        meaning.__signature__ = inspect.signature(real)
        return meaning

    return change


def given(edit):
    """An operator whose arguments are edited: `edit(list of arguments)`."""

    def change(real):
        def meaning(*args, **kwargs):
            return real(*edit(list(args)), **kwargs)

        meaning.__signature__ = inspect.signature(real)
        return meaning

    return change


def half_scaled(result, args):
    result = result.clone()
    result[result.shape[0] // 2 :] *= 1.02
    return result


def head_copied(result, args):
    result = result.clone()
    result[:, 1] = result[:, 0]
    return result


def first_write(target, dim, index, source, *more):
    return [target, dim, index.flip(dim), source.flip(dim), *more]


INDEX = torch.tensor([[0, 2, 2, 5], [1, 1, 3, 0], [4, 4, 4, 4]])
LINEAR = (draw(4, 24, 32), draw(64, 32), draw(64))
HEADS = (draw(2, 4, 24, 16), draw(2, 4, 16, 24))
PICTURE = draw(2, 3, 8, 8)
LEFT_PADDED = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
LEFT_PADDED[0, :, :, :2] = False

PLANTED = {  # the call, the operator of CANN and its change, what is named
    "products in bfloat16": (
        torch.matmul,
        HEADS,
        {},
        "aclnnMatmul",
        edited(lambda y, a: (a[0].bfloat16() @ a[1].bfloat16()).to(y.dtype)),
        "it computes as if its operands and its result were rounded to bfloat16",
    ),
    "a result in bfloat16": (
        torch.rsqrt,
        (draw(64, 32).abs() + 1,),
        {},
        "aclnnRsqrt",
        edited(lambda y, a: y.bfloat16().to(y.dtype)),
        "its result is rounded to bfloat16",
    ),
    "a dropped bias": (
        F.linear,
        LINEAR,
        {},
        "aclnnAddmm",
        edited(lambda y, a: y - a[0]),
        "it computes as without its bias",
    ),
    "a copied head": (torch.matmul, HEADS, {}, "aclnnMatmul", edited(head_copied), "head 1 is a copy of 0"),
    "half of the rows scaled": (
        torch.matmul,
        (draw(48, 32), draw(32, 16)),
        {},
        "aclnnMatmul",
        edited(half_scaled),
        "rows 24 to 47 of 48 are multiplied by 1.02",
    ),
    "align_corners": (
        F.interpolate,
        (PICTURE,),
        {"size": (16, 16), "mode": "bilinear"},
        "aclnnUpsampleBilinear2d",
        edited(lambda y, a: F.interpolate(a[0].float(), y.shape[-2:], mode="bilinear", align_corners=True).to(y.dtype)),
        "it computes as with align_corners=True",
    ),
    "padding that is counted": (
        F.avg_pool2d,
        (PICTURE, 3, 1, 1, False, False),
        {},
        "aclnnAvgPool2d",
        edited(lambda y, a: F.avg_pool2d(a[0].float(), 3, 1, 1).to(y.dtype)),
        "it computes as with count_include_pad=True",
    ),
    "another eps": (
        F.layer_norm,
        (draw(8, 16) * 0.05, (16,)),
        {},
        "aclnnLayerNorm",
        given(lambda a: [*a[:4], 1e-3, *a[5:]]),
        "it computes as with eps=0.001",
    ),
    "the first of repeated writes": (
        torch.scatter,
        (torch.zeros(3, 6), 1, INDEX, draw(3, 4)),
        {},
        "aclnnScatter",
        given(lambda a: first_write(*a)),
        (
            "3 elements are written more than once, since indices repeat: torch leaves open which write stays, and "
            "the device keeps the first write"
        ),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_cause_is_named(npu, name):
    func, args, kwargs, operator, change, cause = PLANTED[name]
    replay = Replay(func=func, args=args, kwargs=kwargs, device=npu)
    results = replay.on_cpu()
    with changed(operator, change):
        result = replay.on_device()
        assert replay.judged(result, results)[1], "the fault does not act"
        assert cause_of(replay, result, results) == cause


@pytest.mark.parametrize("name", PLANTED)
def test_no_cause_is_named_of_a_sound_operator(npu, name):
    """What a healthy device rounds is none of the causes, however small it is."""
    func, args, kwargs, *_ = PLANTED[name]
    replay = Replay(func=func, args=args, kwargs=kwargs, device=npu)
    results = replay.on_cpu()
    result = replay.on_device()
    assert not replay.judged(result, results)[1] and cause_of(replay, result, results) == ""


@pytest.mark.parametrize("name", PLANTED)
def test_scattered_damage_is_none_of_the_causes(npu, name):
    """A fault with another cause, elements that a seeded draw takes and changes, is not given one of these."""
    func, args, kwargs, operator, *_ = PLANTED[name]
    replay = Replay(func=func, args=args, kwargs=kwargs, device=npu)
    results = replay.on_cpu()

    def damaged(y, a):
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        return y + noise * 0.3 * y.abs().mean()

    with changed(operator, edited(damaged)):
        result = replay.on_device()
        assert replay.judged(result, results)[1]
        assert cause_of(replay, result, results) == ""


def test_rows_that_see_no_key_are_named(npu):
    """What Ascend's kernel gives there hangs on inner_precise, the 15th argument."""
    attention = tuple(draw(2, 4, 6, 16) + number for number in range(3))
    replay = Replay(func=F.scaled_dot_product_attention, args=(*attention, LEFT_PADDED), kwargs={}, device=npu)
    results = replay.on_cpu()
    assert cause_of(replay, replay.on_device(), results) == ""
    with changed("aclnnFlashAttentionScore", given(lambda a: [*a[:14], 0, *a[15:]])):
        result = replay.on_device()
        assert replay.judged(result, results)[1]
        assert cause_of(replay, result, results) == (
            "it differs only in rows whose mask hides every key, 8 of 48, such as padding: no attention defines these; "
            "leave them out of what the case returns"
        )
        result[0][1, 0, 0] *= 2  # and in a row that sees a key
        assert "hides every key" not in cause_of(replay, result, results)
    full = replace(replay, args=(*attention, torch.ones_like(LEFT_PADDED)))
    assert "hides every key" not in cause_of(full, [2 * item for item in full.on_cpu()], full.on_cpu())


def put(target, indices, values, accumulate=False):
    return torch.index_put(target, indices, values, accumulate)


ROWS = (torch.tensor([1, 4, 4, 0, 1]),)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("first", "keeps the first write"),
        ("sum", "adds the writes up"),
        ("mean", "keeps another of the writes than the CPU"),
    ],
)
@pytest.mark.parametrize("func", ["index_put", "setitem", "index_copy", "scatter"])
def test_repeated_indices_are_named_with_what_stays(npu, func, kind, kept):
    target, values = draw(6, 3), draw(5, 3) + 4
    index = ROWS[0][:, None].expand(5, 3)
    call = {
        "index_put": (torch.index_put, (target, ROWS, values)),
        "setitem": (torch.Tensor.__setitem__, (target, ROWS[0], values)),
        "index_copy": (torch.index_copy, (target, 0, ROWS[0], values)),
        "scatter": (torch.scatter, (target, 0, index, values)),
    }[func]
    replay = Replay(func=call[0], args=call[1], kwargs={}, device=npu)
    results = replay.on_cpu()
    answers = {"first": values[[0, 1]], "sum": torch.stack((values[0] + values[4], values[1] + values[2]))}
    answers["mean"] = answers["sum"] / 2
    result = [results[0].clone()]
    result[0][[1, 4]] = answers[kind]
    repeated = next(clue for clue in CLUES if clue.__name__ == "_of_repeated_indices")
    said = list(repeated(replay, 0, result[0], results[0]))
    assert said[0].startswith("6 elements are written more than once") and said[0].endswith(f"and the device {kept}")
    result[0][2, 0] += 1  # an element that is written once, or never, is not explained so
    assert not list(repeated(replay, 0, result[0], results[0]))


def test_distinct_indices_and_sums_are_no_repetition(npu):
    repeated = next(clue for clue in CLUES if clue.__name__ == "_of_repeated_indices")
    target, values = draw(6, 3), draw(3, 3)
    for func, args, kwargs in (
        (torch.index_put, (target, (torch.tensor([0, 1, 2]),), values), {}),
        (torch.index_put, (target, (torch.tensor([0, 1, 1]),), values, True), {}),
        (torch.scatter, (target, 0, INDEX[:, :3] % 3, values), {"reduce": "add"}),
        (torch.add, (target, target), {}),
    ):
        replay = Replay(func=func, args=args, kwargs=kwargs, device=npu)
        results = replay.on_cpu()
        assert not list(repeated(replay, 0, results[0] * 1.5, results[0]))


def test_slices_on_either_side_of_what_is_named(npu):
    slices = next(clue for clue in CLUES if clue.__name__ == "_of_slices")
    expected = draw(2, 4, 6, 8)
    replay = Replay(func=torch.relu, args=(expected,), kwargs={}, device=npu)

    def said(change):
        actual = expected.clone()
        change(actual)
        return next(slices(replay, 0, actual, expected), "")

    assert said(lambda y: y[:, 2].copy_(y[:, 3])) == "head 2 is a copy of 3"
    assert said(lambda y: y[:, :, 1].copy_(y[:, :, 4])) == "row 1 is a copy of 4"
    assert said(lambda y: y[..., 5:].mul_(-1)) == "columns 5 to 7 of 8 are multiplied by -1"
    assert said(lambda y: y[1].mul_(0.5)) == "slices along axis 0, 1 to 1 of 2 are multiplied by 0.5"
    assert said(lambda y: y[:, 2].copy_(draw(2, 6, 8).flip(-1))) == "" and said(lambda y: y.mul_(2)) == ""
    noisy = draw(2, 6, 8).flip(0)
    assert said(lambda y: y[:, 2].copy_(y[:, 3] + 0.05 * noisy)) == "head 2 is a copy of 3"
    assert said(lambda y: y[:, 2].copy_(y[:, 3] + 0.3 * noisy)) == ""


def test_swapped_heads_are_still_named_as_such(npu):
    replay = Replay(func=torch.matmul, args=HEADS, kwargs={}, device=npu)
    results = replay.on_cpu()
    with emulator.fault("aclnnMatmul", "swap_rows", at=3):
        assert cause_of(replay, replay.on_device(), results) == "rows 3 and 4 stand in each other's place"
