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

    tensors = [
        seeded(*shape, seed=seed, dtype=dtype).requires_grad_()
        for seed, shape in enumerate([(2, 5, 3, 8), place, place])
    ]
    agrees(npu, rotate, *tensors)
    agrees(
        npu,
        lambda x, cos, sin: rotate(x.transpose(0, 2), cos, sin),
        *[tensor[:1, :5, :1] if tensor is not tensors[0] else tensor for tensor in tensors],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_and_keys_are_rotated_in_place(npu, dtype):
    import torch_npu

    q, k = seeded(2, 3, 4, 8, dtype=dtype), seeded(2, 3, 1, 8, seed=1, dtype=dtype)
    cos, sin = seeded(2, 3, 1, 8, seed=2, dtype=dtype), seeded(2, 3, 1, 8, seed=3, dtype=dtype)
    there = q.to(npu), k.to(npu)
    torch_npu.npu_apply_rotary_pos_emb(*there, cos.to(npu), sin.to(npu), "BSND", "half")
    for result, x in zip(there, (q, k)):
        wanted = x.float() * cos.float() + half(x.float()) * sin.float()
        torch.testing.assert_close(result.cpu(), wanted.to(dtype), rtol=1e-3, atol=1e-3)


def test_interleaved_pairs_are_sorted_before_they_turn(npu):
    import torch_npu

    x, cos, sin = (
        seeded(2, 4, 1, 64, dtype=torch.float16),
        *[seeded(2, 1, 1, 64, seed=seed, dtype=torch.float16) for seed in (1, 2)],
    )
    result = torch_npu.npu_interleave_rope(x.to(npu), cos.to(npu), sin.to(npu))
    wide = torch.cat((x[..., ::2], x[..., 1::2]), -1).float()
    torch.testing.assert_close(
        result.cpu(), (wide * cos.float() + half(wide) * sin.float()).half(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_positions_read_a_cache(npu, mode):
    import torch_npu

    positions, cache = torch.tensor([3, 0, 7]), seeded(10, 8)
    q, k = seeded(3, 2 * 12, seed=1), seeded(3, 12, seed=2)
    result = torch_npu.npu_mrope(
        positions.to(npu), q.to(npu), k.to(npu), cache.to(npu), 12, mrope_section=[0, 0, 0], rotary_mode=mode
    )
    cos, sin = [part.unsqueeze(1) for part in cache[positions].chunk(2, -1)]
    for one, x in zip(result, (q, k)):
        heads = x.unflatten(-1, (-1, 12))
        a, b = (heads[..., :4], heads[..., 4:8]) if mode == "half" else (heads[..., 0:8:2], heads[..., 1:8:2])
        turned = a * cos - b * sin, b * cos + a * sin
        inner = torch.cat(turned, -1) if mode == "half" else torch.stack(turned, -1).flatten(-2)
        torch.testing.assert_close(one.cpu(), torch.cat((inner, heads[..., 8:]), -1).flatten(1))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mode", ["PA", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"])
def test_a_cache_gets_the_latent_and_the_rotated_key(npu, mode, quantized):
    import torch_npu

    pages, size, batch, tokens = 8, 16, 2, 20
    kv, gamma = seeded(batch, 1, tokens, 576, dtype=torch.float16), seeded(512, seed=1, dtype=torch.float16)
    cos, sin = [seeded(batch, 1, tokens, 64, seed=seed, dtype=torch.float16) for seed in (2, 3)]
    dtype = torch.int8 if quantized else torch.float16
    scales = [seeded(width, seed=width) * 10 if quantized else None for width in (64, 512)]
    starts = torch.tensor([[3, 0], [6, 1]]) * size  # the pages of each sequence
    places = (starts[:, torch.arange(tokens) // size] + torch.arange(tokens) % size).flatten()
    index = starts.flatten() if "BLK" in mode else places.clone()
    if "BLK" not in mode:
        index[5] = -1
    there = [torch.full((pages, size, 1, width), 7, dtype=dtype).to(npu) for width in (64, 512)]
    move = lambda tensor: None if tensor is None else tensor.to(npu)
    _, _, key, latent = torch_npu.npu_kv_rmsnorm_rope_cache(
        *[move(item) for item in (kv, gamma, cos, sin, index)],
        *there,
        k_rope_scale=move(scales[0]),
        c_kv_scale=move(scales[1]),
        cache_mode=mode,
        is_output_kv=True,
    )
    left, right = kv.float().split((512, 64), -1)
    wide = torch.cat((right[..., ::2], right[..., 1::2]), -1)
    wanted = (
        wide * cos.float() + half(wide) * sin.float(),
        left / (left.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma.float(),
    )
    for cache, shown, value, scale in zip(there, (key, latent), wanted, scales):
        torch.testing.assert_close(shown.cpu().float(), value, rtol=2e-3, atol=2e-3)
        value = value.reshape(batch * tokens, -1)
        value = (value * scale).round().clamp(-128, 127) if quantized else value
        plain = torch.full((pages * size, value.shape[1]), 7.0)
        kept = torch.tensor([index[place] >= 0 if "BLK" not in mode else True for place in range(batch * tokens)])
        plain[places[kept]] = value[kept]
        if mode.endswith("NZ"):
            plain = plain.reshape(pages, size, -1, 32 if quantized else 16).transpose(1, 2)
        assert cache.dtype == dtype
        torch.testing.assert_close(
            cache.cpu().float().flatten(), plain.flatten(), rtol=2e-3, atol=1.0 if quantized else 2e-3
        )


@pytest.mark.parametrize("quantized", [False, True])
def test_queries_keys_and_values_go_to_pages_of_pieces(npu, quantized):
    import torch_npu

    heads, width, tokens, pages, size = (2, 1, 1), 128, 5, 3, 16
    dtype, piece = (torch.int8, 32) if quantized else (torch.float16, 16)
    qkv = seeded(tokens, 4 * width, dtype=torch.float16)
    gammas = [seeded(width, seed=seed, dtype=torch.float16) for seed in (1, 2)]
    cos, sin = [seeded(tokens, width, seed=seed, dtype=torch.float16) for seed in (3, 4)]
    index = torch.tensor([17, 3, -1, 40, 0])
    scales = [seeded(1, width, seed=seed).abs() + 0.05 if quantized else None for seed in (5, 6)]
    query = torch.zeros(tokens, 2 * width, dtype=torch.float16).to(npu)
    caches = [torch.full((pages, width // piece, size, piece), 7, dtype=dtype).to(npu) for _ in range(2)]
    move = lambda tensor: None if tensor is None else tensor.to(npu)
    torch_npu.npu_qkv_rms_norm_rope_cache(
        *[move(item) for item in (qkv, *gammas, cos, sin, index)],
        query,
        *caches,
        qkv_size=[1, tokens, 4, width],
        head_nums=heads,
        k_scale=move(scales[0]),
        v_scale=move(scales[1]),
        epsilon=1e-6,
        cache_mode="PA_NZ",
        is_output_qkv=False,
    )
    q, k, v = qkv.float().unflatten(1, (4, width)).split(heads, 1)
    q, k = [
        part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gamma.float()
        for part, gamma in ((q, gammas[0]), (k, gammas[1]))
    ]
    q, k = [part * cos.float()[:, None] + half(part) * sin.float()[:, None] for part in (q, k)]
    torch.testing.assert_close(query.cpu().float(), q.flatten(1), rtol=2e-3, atol=2e-3)
    for cache, rows, scale in zip(caches, (k, v), scales):
        rows = rows.flatten(1) if scale is None else (rows.flatten(1) / scale).round().clamp(-128, 127)
        plain = torch.full((pages * size, width), 7.0)
        plain[index[index >= 0]] = rows[index >= 0]
        plain = plain.reshape(pages, size, -1, piece).transpose(1, 2)
        torch.testing.assert_close(cache.cpu().float(), plain, rtol=2e-3, atol=1.0 if quantized else 2e-3)
