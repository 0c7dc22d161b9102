"""Rotary embeddings against their formulas."""

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded


def half(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode, turn", [("half", half), ("interleave", pairs)])
@pytest.mark.parametrize("place", [(1, 5, 1, 8), (2, 5, 1, 8), (1, 1, 1, 8)], ids=str)
def test_a_rotation_and_its_gradients(npu, place, mode, turn, dtype):
    import torch_npu

    def rotate(x, cos, sin):
        return torch_npu.npu_rotary_mul(x, cos, sin, mode) if x.device.type == "npu" else x * cos + turn(x) * sin

    tensors = [seeded(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate([(2, 5, 3, 8), place, place])]
    agrees(npu, rotate, *tensors)
    agrees(npu, lambda x, cos, sin: rotate(x.transpose(0, 2), cos, sin), *[each[:1, :5, :1] if each is not tensors[0] else each for each in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_and_keys_are_rotated_in_place(npu, dtype):
    import torch_npu

    q, k = seeded(2, 3, 4, 8, dtype=dtype), seeded(2, 3, 1, 8, seed=1, dtype=dtype)
    cos, sin = seeded(2, 3, 1, 8, seed=2, dtype=dtype), seeded(2, 3, 1, 8, seed=3, dtype=dtype)
    there = q.to(npu), k.to(npu)
    torch_npu.npu_apply_rotary_pos_emb(*there, cos.to(npu), sin.to(npu), "BSND", "half")
    for found, x in zip(there, (q, k)):
        wanted = x.float() * cos.float() + half(x.float()) * sin.float()
        torch.testing.assert_close(found.cpu(), wanted.to(dtype), rtol=1e-3, atol=1e-3)


def test_interleaved_pairs_are_sorted_before_they_turn(npu):
    import torch_npu

    x, cos, sin = seeded(2, 4, 1, 64, dtype=torch.float16), *[seeded(2, 1, 1, 64, seed=seed, dtype=torch.float16) for seed in (1, 2)]
    found = torch_npu.npu_interleave_rope(x.to(npu), cos.to(npu), sin.to(npu))
    wide = torch.cat((x[..., ::2], x[..., 1::2]), -1).float()
    torch.testing.assert_close(found.cpu(), (wide * cos.float() + half(wide) * sin.float()).half(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_positions_read_a_cache(npu, mode):
    import torch_npu

    positions, cache = torch.tensor([3, 0, 7]), seeded(10, 8)
    q, k = seeded(3, 2 * 12, seed=1), seeded(3, 12, seed=2)
    found = torch_npu.npu_mrope(positions.to(npu), q.to(npu), k.to(npu), cache.to(npu), 12, mrope_section=[0, 0, 0], rotary_mode=mode)
    cos, sin = [each.unsqueeze(1) for each in cache[positions].chunk(2, -1)]
    for one, x in zip(found, (q, k)):
        heads = x.unflatten(-1, (-1, 12))
        a, b = (heads[..., :4], heads[..., 4:8]) if mode == "half" else (heads[..., 0:8:2], heads[..., 1:8:2])
        turned = a * cos - b * sin, b * cos + a * sin
        inner = torch.cat(turned, -1) if mode == "half" else torch.stack(turned, -1).flatten(-2)
        torch.testing.assert_close(one.cpu(), torch.cat((inner, heads[..., 8:]), -1).flatten(1))
