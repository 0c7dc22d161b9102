"""Moving, joining and indexing on the emulated device are torch's own."""

import pytest
import torch
from torch.nn import functional as F

from harness.tests.operators.conftest import agrees, seeded

DTYPES = [torch.float32, torch.float16]
ROWS = torch.tensor([2, 0, 2])


def grad(*shape, seed=0, dtype=torch.float32):
    return seeded(shape, seed=seed, dtype=dtype).requires_grad_()


INDICES = {
    "ints": lambda x: x[ROWS.to(x.device)],
    "int": lambda x: x[1, ..., 2],
    "pair": lambda x: x[ROWS.to(x.device), ROWS.to(x.device)],
    "slice between": lambda x: x[ROWS.to(x.device), :, ROWS.to(x.device)],
    "slice first": lambda x: x[:, ROWS.to(x.device)],
    "slices": lambda x: x[:, 1:3, ROWS.to(x.device)],
    "None": lambda x: x[None, ROWS.to(x.device), None],
    "None between": lambda x: x[ROWS.to(x.device), None, :, ROWS.to(x.device)],
    "mask": lambda x: x[torch.arange(x.numel(), device=x.device).reshape(x.shape) % 3 == 0],
    "mask of rows": lambda x: x[torch.tensor([True, False, True], device=x.device)],
    "mask and ints": lambda x: x[
        torch.tensor([True, False, True], device=x.device), :, torch.tensor([0, 1], device=x.device)
    ],
    "negative": lambda x: x[torch.tensor([-1, -3], device=x.device)],
    "matrix": lambda x: x[:, torch.tensor([[0, 1], [2, 3]], device=x.device)],
    "broadcast": lambda x: x[torch.tensor([[0], [2]], device=x.device), torch.tensor([1, 3], device=x.device)],
    "none at all": lambda x: x[torch.tensor([], dtype=torch.long, device=x.device)],
    "none in the middle": lambda x: x[:, torch.tensor([], dtype=torch.long, device=x.device)],
    "int32": lambda x: x[ROWS.int().to(x.device)],
    "steps": lambda x: x[::2, ::3],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDICES)
def test_index(npu, name, dtype):
    agrees(npu, INDICES[name], grad(3, 4, 5, dtype=dtype))
    agrees(npu, lambda x: INDICES[name](x.transpose(0, 2)), grad(5, 4, 3, dtype=dtype))


def _put(places, accumulate=False):
    def change(x, value):
        at = tuple(slice(None) if place is None else place.to(x.device) for place in places)
        if accumulate:
            return torch.ops.aten.index_put(
                x, [None if place is None else place.to(x.device) for place in places], value, True
            )
        x = x.clone()
        x[at] = value
        return x

    return change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "places, shape",
    [
        ((ROWS,), (3, 4, 5)),
        ((ROWS,), (5,)),
        ((None, ROWS), (3, 3, 5)),
        ((ROWS, None, ROWS), (3, 4)),
        ((torch.tensor([True, False, True]),), (2, 4, 5)),
        ((torch.tensor([], dtype=torch.long),), (1,)),
        ((None, torch.tensor([], dtype=torch.long)), (1,)),
    ],
)
def test_index_put(npu, places, shape, dtype):
    agrees(npu, _put(places, accumulate=True), grad(3, 4, 5, dtype=dtype), grad(*shape, seed=1, dtype=dtype))
    unique = [torch.tensor([2, 0, 1]) if place is ROWS else place for place in places]
    agrees(npu, _put(unique), grad(3, 4, 5, dtype=dtype), grad(*shape, seed=1, dtype=dtype))


def test_assignment(npu):
    def assigned(x):
        x = x.clone()
        x[x > 1] = 0
        x[0, 1:3] = 5
        x[torch.tensor([1, 2], device=x.device), :2] = x[0, :2]
        return x

    agrees(npu, assigned, seeded(3, 4, 5))
    agrees(npu, assigned, (seeded(3, 4, 5) * 3).long())


BY_INDEX = {
    "index_add": (lambda x, s, i: x.index_add(1, i, s, alpha=2), (3, 4), (3, 3)),
    "index_add rows": (lambda x, s, i: x.index_add(0, i, s), (3, 4), (3, 4)),
    "index_copy": (lambda x, s, i: x.index_copy(1, i + torch.arange(3, device=x.device) % 2, s), (3, 4), (3, 3)),
    "index_copy_": (lambda x, s, i: x.clone().index_copy_(0, i[:2], s), (3, 4), (2, 4)),
    "index_fill": (lambda x, s, i: x.index_fill(1, i, 3.0) + s, (3, 4), (3, 4)),
    "index_fill_": (lambda x, s, i: x.clone().index_fill_(-1, i[0], 3.0) + s, (3, 4), (3, 4)),
    "take": (lambda x, s, i: x.take(i) + s, (3, 4), (3,)),
    "put": (lambda x, s, i: x.clone().put_(i[:2], s), (3, 4), (2,)),
    "put accumulate": (lambda x, s, i: x.put(i, s, accumulate=True), (3, 4), (3,)),
    "gather": (lambda x, s, i: x.gather(1, i.expand(3, 3)) + s, (3, 4), (3, 3)),
    "index_select": (lambda x, s, i: x.index_select(1, i) + s, (3, 4), (3, 3)),
    "scatter": (lambda x, s, i: x.scatter(1, i[:2].expand(3, 2), s), (3, 4), (3, 2)),
    "scatter_": (lambda x, s, i: x.clone().scatter_(0, i[:2, None].expand(2, 3), s), (3, 4), (2, 3)),
    "scatter value": (lambda x, s, i: x.scatter(1, i.expand(3, 3), 7.0) + s, (3, 4), (3, 4)),
    "scatter_add": (lambda x, s, i: x.scatter_add(1, i.expand(3, 3), s), (3, 4), (3, 3)),
    "scatter_add_": (lambda x, s, i: x.clone().scatter_add_(0, i[:, None].expand(3, 4), s), (3, 4), (3, 4)),
    "masked_scatter": (lambda x, s, i: x.masked_scatter(x > 0, s), (3, 4), (12,)),
    "0-d": (lambda x, s, i: x.index_fill(0, i[1], 2.0).scatter_add(0, i[1], s), (), ()),
    "no element": (lambda x, s, i: x.index_add(0, i[:0], s), (3, 4), (0, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_INDEX)
def test_by_index(npu, name, dtype):
    function, shape, source = BY_INDEX[name]
    agrees(npu, function, grad(*shape, dtype=dtype), grad(*source, seed=1, dtype=dtype), ROWS)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
@pytest.mark.parametrize("include_self", [True, False])
def test_scatter_reduce(npu, reduce, include_self, dtype):
    x, source = ((seeded(3, 4, seed=seed) * 4).to(dtype) for seed in (0, 1))
    agrees(
        npu, lambda x, s, i: x.scatter_reduce(1, i.expand(3, 3), s, reduce, include_self=include_self), x, source, ROWS
    )
    agrees(
        npu,
        lambda x, s, i: x.clone().scatter_reduce_(1, i.expand(3, 3), s, reduce, include_self=include_self),
        x,
        source,
        ROWS,
    )


@pytest.mark.parametrize("reduce", ["add", "multiply"])
def test_scatter_with_a_reduction(npu, reduce):
    agrees(
        npu, lambda x, s, i: x.scatter(1, i.expand(3, 3), s, reduce=reduce), seeded(3, 4), seeded(3, 4, seed=1), ROWS
    )
    agrees(npu, lambda x, i: x.scatter(1, i.expand(3, 3), 2.5, reduce=reduce), seeded(3, 4), ROWS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64])
def test_other_dtypes(npu, dtype):
    x = (seeded(4, 5) * 3).abs().to(dtype)
    for function in (
        lambda x, i: x[i, 1:],
        lambda x, i: x.index_fill(0, i, 1),
        lambda x, i: x.scatter(0, i[:, None], x),
    ):
        agrees(npu, function, x, ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_embedding(npu, options, dtype):
    agrees(npu, lambda w, i: F.embedding(i, w, **options), grad(5, 3, dtype=dtype), torch.tensor([[1, 2], [2, 4]]))
    agrees(npu, lambda w, i: F.embedding(i, w, **options), grad(5, 3, dtype=dtype), torch.zeros(0, 2, dtype=torch.long))


BAGS = [
    *[{"mode": mode} for mode in ("sum", "mean", "max")],
    {"mode": "mean", "padding_idx": 1},
    {"mode": "sum", "include_last_offset": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", BAGS)
def test_embedding_bag(npu, options, dtype):
    places, starts = (
        torch.tensor([1, 2, 4, 1, 3]),
        torch.tensor([0, 2, 2, 5] if "include_last_offset" in options else [0, 2, 2]),
    )
    agrees(npu, lambda w, i, o: F.embedding_bag(i, w, o, **options), seeded(5, 3, dtype=dtype), places, starts)


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    ("mode", "sparse"), [("sum", True), ("sum", False), ("mean", True), ("mean", False), ("max", False)]
)
def test_the_gradient_of_embedding_bag(npu, mode, sparse, padding):
    places, starts, result = torch.tensor([0, 2, 2, 2, 0, 5]), torch.tensor([0, 1, 4, 4]), {}
    for device in ("cpu", npu):
        weight = seeded(6, 3).to(device).requires_grad_()
        F.embedding_bag(
            places.to(device), weight, starts.to(device), mode=mode, sparse=sparse, padding_idx=padding
        ).sum().backward()
        assert weight.grad.is_sparse == sparse
        result[device] = (weight.grad.to_dense() if sparse else weight.grad).cpu()
    assert torch.equal(result[npu], result["cpu"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "repeats, dim",
    [(2, None), (3, 1), (torch.tensor([2, 0, 1]), 0), (torch.tensor([2]), 1), (torch.arange(12) % 3, None)],
)
def test_repeat_interleave(npu, repeats, dim, dtype):
    agrees(npu, lambda x, r: x.repeat_interleave(r, dim), grad(3, 4, dtype=dtype), repeats)
    agrees(npu, lambda x, r: x.t().repeat_interleave(r, dim), seeded(4, 3, dtype=dtype), repeats)


MOVED = {
    "roll": lambda x: x.roll((1, -2), (0, 1)),
    "roll flat": lambda x: x.roll(3),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "split": lambda x: x.split([1, 2, 1], 1),
    "chunk": lambda x: x.chunk(3, 1),
    "fill_diagonal": lambda x: x.detach()[..., 0].clone().fill_diagonal_(3.0),
    "fill_diagonal wrapped": lambda x: x.detach()[..., 0].clone().fill_diagonal_(3.0, wrap=True),
    "flip": lambda x: x.flip(0, 2),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "cat": lambda x: torch.cat([x, x[:1], x[:0]], 0),
    "pad": lambda x: F.pad(x, (1, -1, 0, 2), value=1.5),
    "tril": lambda x: x.tril(1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVED)
def test_moved(npu, name, dtype):
    backward = "fill" not in name  # torch_npu's own fill_diagonal_ has no derivative
    agrees(npu, MOVED[name], grad(6, 4, 3, dtype=dtype), backward=backward)
    agrees(npu, lambda x: MOVED[name](x.transpose(0, 2)), grad(3, 4, 6, dtype=dtype), backward=backward)


@pytest.mark.parametrize("values", [[3, 1, 1, 2, 3, 3], [2.5, -1.0, 2.5], [[1, 1], [0, 0], [1, 1]], [True, True], []])
def test_unique(npu, values):
    values = torch.tensor(values)
    agrees(npu, lambda x: torch.unique(x), values)
    for options in ({"return_inverse": True}, {"return_counts": True}, {"return_inverse": True, "return_counts": True}):
        agrees(npu, lambda x: torch.unique(x, **options), values)
        agrees(npu, lambda x: torch.unique_consecutive(x, **options), values)
        if values.dim() > 1:
            agrees(npu, lambda x: torch.unique(x, dim=0, **options), values)
            agrees(npu, lambda x: torch.unique_consecutive(x, dim=1, **options), values)


def test_scatter_update_takes_each_batch_at_its_own_place(npu):
    data, update = seeded(2, 6, 3), seeded(2, 2, 3, seed=1)
    result = torch.ops.npu.scatter_update(data.to(npu), torch.tensor([1, 3]).to(npu), update.to(npu), -2)
    expected = data.clone()
    expected[0, 1:3], expected[1, 3:5] = update
    assert torch.equal(result.cpu(), expected)


def test_scatter_nd_update(npu):
    data, update = seeded(4, 5), seeded(2, seed=1)
    result = torch.ops.npu.npu_scatter_nd_update(data.to(npu), torch.tensor([[1, 2], [3, 0]]).to(npu), update.to(npu))
    expected = data.clone()
    expected[1, 2], expected[3, 0] = update
    assert torch.equal(result.cpu(), expected)


def test_scatter_list_leaves_what_the_mask_excludes(npu):
    data, update = [seeded(4, 3), seeded(4, 3, seed=1)], seeded(2, 1, 3, seed=2)
    places, mask = torch.tensor([1, 3]).to(npu), torch.tensor([1, 0], dtype=torch.uint8).to(npu)
    result = torch.ops.npu.npu_scatter_list(
        [tensor.to(npu) for tensor in data], places, update.to(npu), mask, reduce="update", axis=-2
    )
    expected = data[0].clone()
    expected[1] = update[0, 0]
    assert torch.equal(result[0].cpu(), expected) and torch.equal(result[1].cpu(), data[1])


def test_chunk_cat(npu):
    tensors = [seeded(4, 3), seeded(2, 5, seed=1)]
    assert torch.equal(
        torch._chunk_cat([tensor.to(npu) for tensor in tensors], 0, 2).cpu(), torch._chunk_cat(tensors, 0, 2)
    )
