"""Fused attention against the CPU's: training with masks and layouts of all kinds, inference with caches."""

import math

import pytest
import torch
from torch.nn import functional as F

from harness import numerics
from harness.tests.operators.conftest import agrees, seeded

TOKENS = 2147483647


def qkv(q=(2, 4, 6, 8), k=(2, 4, 6, 8), dtype=torch.float32):
    return [seeded(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate((q, k, k))]


def exact(q, k, v, hidden=None, bias=None, scale=None):
    """Attention on the CPU, (B, H, N, D); bias is added to the scaled scores."""
    k, v = [tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v)]
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias
    scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
    return torch.nan_to_num(scores.softmax(-1), 0.0) @ v


def matches(npu, fused, plain, tensors, rtol=1e-5):
    """Assert that fused(*tensors on the device) and its gradients are plain(*tensors)'s."""
    there = [tensor.detach().to(npu).requires_grad_() for tensor in tensors]
    here = [tensor.detach().float().requires_grad_() for tensor in tensors]
    actual, expected = fused(*there), plain(*here)
    weights = torch.linspace(0.5, 1.5, expected.numel()).reshape(expected.shape)
    (actual.float() * weights.to(npu)).sum().backward()
    (expected * weights).sum().backward()
    rtol = rtol if tensors[0].dtype == torch.float32 else 1e-2
    assert actual.dtype == tensors[0].dtype
    torch.testing.assert_close(actual.detach().cpu().float(), expected.detach(), rtol=rtol, atol=rtol)
    for one, other in zip(there, here):
        assert one.grad.dtype == one.dtype
        torch.testing.assert_close(one.grad.cpu().float(), other.grad, rtol=rtol, atol=2 * rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "one mask for all", "grouped"])
def test_scaled_dot_product_attention_learns(npu, kind, dtype):
    q, k, v = qkv(k=(2, 2, 6, 8) if kind == "grouped" else (2, 4, 6, 8), dtype=dtype)
    mask = {
        "bool": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.3,
        "one mask for all": torch.ones(6, 6).tril().bool(),
        "float": seeded(6, 6, seed=4, dtype=dtype),
    }.get(kind)
    if kind == "bool":
        mask[..., 0] = True  # a row that sees nothing has no defined result on the CPU
    options = dict(is_causal=kind == "causal", enable_gqa=kind == "grouped")
    matches(
        npu,
        lambda *tensors: F.scaled_dot_product_attention(*tensors, None if mask is None else mask.to(npu), **options),
        lambda *tensors: F.scaled_dot_product_attention(*tensors, mask.float() if kind == "float" else mask, **options),
        (q, k, v),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layout, there, back",
    [
        ("BNSD", lambda x: x, lambda x: x),
        ("BSND", lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
        ("BSH", lambda x: x.transpose(1, 2).flatten(2), lambda x: x.unflatten(2, (4, -1)).transpose(1, 2)),
        ("SBH", lambda x: x.permute(2, 0, 1, 3).flatten(2), lambda x: x.unflatten(2, (4, -1)).permute(1, 2, 0, 3)),
    ],
)
def test_a_layout_changes_nothing(npu, layout, there, back, dtype):
    import torch_npu

    def fused(q, k, v):
        return back(torch_npu.npu_fusion_attention(there(q), there(k), there(v), 4, layout, scale=0.3)[0])

    matches(npu, fused, lambda q, k, v: exact(q, k, v, scale=0.3), qkv(dtype=dtype))


def band(queries, keys, before, after, shift=0):
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - shift
    return (distance > after) | (-distance > before)


COMPRESSED = torch.ones(2048, 2048).triu(1).bool()
PREFIX = torch.cat((COMPRESSED, torch.cat((torch.zeros(1024, 1024), torch.ones(1024, 1024)), 1).bool()))


@pytest.mark.parametrize(
    "sparse, mask, before, after, prefix, hidden",
    [
        (0, band(5, 7, 2, 1), 2, 1, None, band(5, 7, 2, 1)),
        (1, band(5, 7, 9, 3), TOKENS, TOKENS, None, band(5, 7, 9, 3)),
        (2, COMPRESSED, TOKENS, 0, None, band(5, 7, 99, 0)),
        (3, COMPRESSED, TOKENS, 0, None, band(5, 7, 99, 0, 2)),
        (4, COMPRESSED, 3, 1, None, band(5, 7, 3, 1, 2)),
        (
            6,
            PREFIX,
            TOKENS,
            0,
            [4, 2],
            band(5, 7, 99, 0, 2) & (torch.arange(7) >= torch.tensor([4, 2])[:, None, None, None]),
        ),
    ],
)
def test_a_sparse_mode_hides_what_its_document_says(npu, sparse, mask, before, after, prefix, hidden):
    import torch_npu

    def fused(q, k, v):
        options = dict(
            scale=0.3,
            pre_tockens=before,
            next_tockens=after,
            sparse_mode=sparse,
            prefix=prefix,
            atten_mask=mask.to(npu),
        )
        return torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", **options)[0]

    matches(npu, fused, lambda q, k, v: exact(q, k, v, hidden, scale=0.3), qkv((2, 4, 5, 8), (2, 4, 7, 8)))


@pytest.mark.parametrize(("inner", "rows"), [(0, "mean"), (1, "mean"), (2, "zero"), (3, "zero")])
def test_a_row_that_sees_no_key_is_zero_where_inner_precise_asks_for_it(npu, inner, rows):
    import torch_npu

    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[1, :, 3] = True

    def fused(q, k, v):
        options = dict(scale=0.3, atten_mask=mask.to(npu), inner_precise=inner)
        return torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", **options)[0]

    q, k, v = [tensor.detach() for tensor in qkv((2, 4, 5, 8), (2, 4, 7, 8))]
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(mask, -math.inf)
    expected = scores.softmax(-1).nan_to_num(1 / 7 if rows == "mean" else 0.0) @ v
    actual = fused(*[tensor.to(npu) for tensor in (q, k, v)]).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_see_no_key_are_zero_in_torch_own_attention_and_where_the_mode_tells_them(npu):
    import torch_npu

    q, k, v = qkv((1, 4, 7, 8), (1, 4, 5, 8))
    mask = torch.ones(1, 1, 7, 5, dtype=torch.bool)
    mask[..., :2, :] = False
    there = [tensor.to(npu) for tensor in (q, k, v)]
    result = torch.nn.functional.scaled_dot_product_attention(*there, attn_mask=mask.to(npu)).cpu()
    assert not result[:, :, :2].any() and result[:, :, 2:].all()
    options = dict(scale=0.3, sparse_mode=3, atten_mask=COMPRESSED.to(npu))  # the first two rows end before any key
    result = torch_npu.npu_fusion_attention(*there, 4, "BNSD", **options)[0].cpu()
    assert not result[:, :, :2].any() and result[:, :, 2:].all()


@pytest.mark.parametrize("layout", ["", "TND"])
@pytest.mark.parametrize("sparse", [0, 3])
def test_ragged_sequences_are_attended_one_by_one(npu, sparse, layout):
    import torch_npu

    lengths, ends = (3, 4, 1), [3, 7, 8]

    def fused(q, k, v):
        mask = COMPRESSED.to(npu) if sparse else None
        options = dict(
            scale=0.3,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=sparse,
            atten_mask=mask,
            softmax_layout=layout,
        )
        return torch_npu.npu_fusion_attention(q, k, v, 4, "TND", **options)[0]

    def plain(q, k, v):
        parts = zip(*[tensor.split(lengths) for tensor in (q, k, v)])
        return torch.cat(
            [
                exact(
                    *[tensor.transpose(0, 1)[None] for tensor in part],
                    band(len(part[0]), len(part[0]), 99, 0) if sparse else None,
                    scale=0.3,
                )[0].transpose(0, 1)
                for part in parts
            ]
        )

    matches(npu, fused, plain, qkv((8, 4, 8), (8, 4, 8)))


def test_what_is_added_to_the_scores_is_scaled_with_them(npu):
    import torch_npu

    pse = seeded(2, 4, 6, 6, seed=7)
    matches(
        npu,
        lambda q, k, v: torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", pse=pse.to(npu), scale=0.3)[0],
        lambda q, k, v: exact(q, k, v, bias=pse * 0.3, scale=0.3),
        qkv(),
    )


def test_a_row_that_sees_no_key_gives_zeros(npu):
    hidden = torch.ones(6, 6).bool()
    hidden[2:] = False
    q, k, v = [tensor.detach() for tensor in qkv()]
    result = F.scaled_dot_product_attention(*[tensor.to(npu) for tensor in (q, k, v)], ~hidden.to(npu))
    assert not result[:, :, :2].cpu().any()
    torch.testing.assert_close(result.cpu()[:, :, 2:], exact(q, k, v)[:, :, 2:])


def test_no_tokens_at_all(npu):
    agrees(npu, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv((0, 4, 6, 8), (0, 4, 6, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dropout_forgets_the_same_on_the_way_back(npu, dtype):
    """The value's gradient shows the probabilities that were used: the result is linear in the value."""
    q, k, v = [tensor.detach().to(npu) for tensor in qkv((1, 2, 64, 16), (1, 2, 64, 16), dtype=dtype)]
    v.requires_grad_()
    result = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    result.sum().backward()
    torch.testing.assert_close((v.grad * v).float().sum().cpu(), result.float().sum().cpu(), rtol=2e-2, atol=2e-1)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert (plain - result).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_over_a_cache_of_pages(npu, dtype):
    import torch_npu

    lengths, size = [5, 9], 4
    keys, values = seeded(2, 12, 2 * 16, dtype=dtype), seeded(2, 12, 2 * 16, seed=1, dtype=dtype)
    q = seeded(2, 1, 4 * 16, seed=2, dtype=dtype)
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    pages = [torch.zeros(6, size, 32, dtype=dtype) for _ in range(2)]
    for cache, whole in zip(pages, (keys, values)):
        for row in range(2):
            for column in range(3):
                cache[table[row, column]] = whole[row, column * size : (column + 1) * size]
    result, sums = torch_npu.npu_fused_infer_attention_score(
        q.to(npu),
        *[page.to(npu) for page in pages],
        num_heads=4,
        num_key_value_heads=2,
        scale=0.25,
        input_layout="BSH",
        actual_seq_lengths_kv=lengths,
        block_table=table.to(npu),
        block_size=size,
        softmax_lse_flag=True,
    )
    assert result.dtype == dtype and result.shape == q.shape and sums.shape == (2, 4, 1, 1)
    for row, length in enumerate(lengths):
        one, two, three = [
            item[row : row + 1].float().unflatten(-1, (-1, 16)).transpose(1, 2)
            for item in (q, keys[:, :length], values[:, :length])
        ]
        torch.testing.assert_close(
            result[row].cpu().float().flatten(), exact(one, two, three, scale=0.25).flatten(), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("layout", ["BNSD", "BSH", "BNSD_BSND"])
def test_inference_of_a_prompt(npu, layout):
    import torch_npu

    q, k, v = [tensor.detach() for tensor in qkv((2, 4, 6, 16), (2, 2, 6, 16), torch.float16)]
    came, _, goes = layout.partition("_")
    there = [tensor.transpose(1, 2).flatten(2) if came == "BSH" else tensor for tensor in (q, k, v)]
    mask = torch.ones(6, 6).triu(1).bool()
    result = (
        torch_npu.npu_prompt_flash_attention(
            *[tensor.to(npu) for tensor in there],
            num_heads=4,
            num_key_value_heads=2,
            scale_value=0.25,
            input_layout=layout,
            atten_mask=mask.to(npu),
        )
        .cpu()
        .float()
    )
    wanted = exact(q.float(), k.float(), v.float(), mask, scale=0.25)
    if (goes or came) != "BNSD":
        wanted = wanted.transpose(1, 2) if goes else wanted.transpose(1, 2).flatten(2)
    torch.testing.assert_close(result, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["BSH", "BNSD", "BSND"])
def test_inference_of_one_token(npu, layout):
    import torch_npu

    q, k, v = [tensor.detach() for tensor in qkv((2, 4, 1, 16), (2, 4, 6, 16), torch.float16)]
    there = [
        {"BSH": x.transpose(1, 2).flatten(2), "BNSD": x, "BSND": x.transpose(1, 2)}[layout].to(npu) for x in (q, k, v)
    ]
    result = torch_npu.npu_incre_flash_attention(
        *there, num_heads=4, scale_value=0.25, input_layout=layout, actual_seq_lengths=[4, 6]
    )
    for row, length in enumerate((4, 6)):
        wanted = exact(*[item[row : row + 1].float() for item in (q, k[:, :, :length], v[:, :, :length])], scale=0.25)
        torch.testing.assert_close(result[row].cpu().float().flatten(), wanted.flatten(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype, bits", [(torch.float32, 19), (torch.float16, 9), (torch.bfloat16, 6)], ids=str)
def test_gradients_of_attention_have_the_bits_of_their_dtype(dtype, bits):
    q, k, v, grad = [seeded(1, 2, 64, 16, seed=seed, dtype=dtype) for seed in range(4)]
    sink = seeded(2, seed=9)
    result, top, total = numerics.attention(q, k, v, scale=0.25, sink=sink)
    actual = numerics.attention_backward(grad, q, k, v, result, top, total, scale=0.25, sink=sink)
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v, sink)]
    scores = torch.cat(
        (wide[0] @ wide[1].transpose(-1, -2) * 0.25, wide[3].reshape(1, 2, 1, 1).expand(1, 2, 64, 1)), -1
    )
    (scores.softmax(-1)[..., :-1] @ wide[2]).backward(grad.double())
    for one, other in zip((*actual[:3], actual[4]), wide):
        assert numerics.effective_bits(one, other.grad) > bits


def test_a_sink_takes_a_share_and_learns(npu):
    import torch_npu

    sink = seeded(4, seed=5).requires_grad_()
    q, k, v = qkv()

    def exact_with_sink(q, k, v, sink):
        scores = torch.cat((q @ k.transpose(-1, -2) * 0.3, sink[None, :, None, None].expand(2, 4, 6, 1)), -1)
        return scores.softmax(-1)[..., :-1] @ v

    def fused(q, k, v, sink):
        return torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.3, sink=sink)[0]

    matches(npu, fused, exact_with_sink, (q, k, v, sink))


def test_results_over_parts_of_the_keys_join(npu):
    """The two halves of the keys, joined, are the whole: as ring attention does it."""
    import torch_npu

    q, k, v = [tensor.detach().permute(2, 0, 1, 3).flatten(2).to(npu) for tensor in qkv((2, 4, 6, 8), (2, 4, 6, 8))]
    attend = lambda k, v: torch_npu.npu_fusion_attention(q, k, v, 4, "SBH", scale=0.3)[:3]
    whole, parts = attend(k, v), [attend(k[part], v[part]) for part in (slice(0, 2), slice(2, 6))]
    joined = torch_npu.npu_ring_attention_update(*parts[0], *parts[1])
    for one, other in zip(joined, whole):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-5)


def test_attention_over_a_third_token(npu):
    import torch_npu

    def fused(q, k_ij, v_ij, k_jk, v_jk):
        return torch_npu.npu_fused_floyd_attention(q, k_ij, v_ij, k_jk, v_jk, scale_value=0.3)[2]

    def plain(q, k_ij, v_ij, k_jk, v_jk):
        scores = torch.einsum("bhikc,bhijc->bhikj", q, k_ij) + torch.einsum("bhikc,bhjkc->bhikj", q, k_jk)
        weights = (scores * 0.3).softmax(-1)
        return torch.einsum("bhikj,bhijc->bhikc", weights, v_ij) + torch.einsum("bhikj,bhjkc->bhikc", weights, v_jk)

    shapes = [(1, 2, 3, 4, 8), (1, 2, 3, 5, 8), (1, 2, 3, 5, 8), (1, 2, 5, 4, 8), (1, 2, 5, 4, 8)]
    tensors = [seeded(*shape, seed=seed, dtype=torch.float16).requires_grad_() for seed, shape in enumerate(shapes)]
    matches(npu, fused, plain, tensors)


@pytest.mark.parametrize("layout", ["TND", "NTD_TND"])
def test_inference_of_ragged_prompts_with_a_rope_of_their_own(npu, layout):
    import torch_npu

    lengths, ends = [3, 5], [3, 8]
    q, q_rope = seeded(8, 4, 128, dtype=torch.float16), seeded(8, 4, 64, seed=1, dtype=torch.float16)
    k, k_rope, v = [
        seeded(8, 4, width, seed=seed, dtype=torch.float16) for seed, width in ((2, 128), (3, 64), (4, 128))
    ]
    there = [
        (tensor.transpose(0, 1).contiguous() if layout == "NTD_TND" else tensor).to(npu)
        for tensor in (q, k, v, q_rope, k_rope)
    ]
    result, sums = torch_npu.npu_fused_infer_attention_score_v2(
        *there[:3],
        query_rope=there[3],
        key_rope=there[4],
        num_query_heads=4,
        num_key_value_heads=4,
        softmax_scale=0.07,
        input_layout=layout,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=3,
        atten_mask=COMPRESSED.to(npu),
        return_softmax_lse=True,
    )
    assert result.shape == (8, 4, 128) and sums.shape == (8, 4, 1)
    whole = [torch.cat((q, q_rope), -1), torch.cat((k, k_rope), -1), v]
    for part, one in zip(result.cpu().split(lengths), zip(*[tensor.float().split(lengths) for tensor in whole])):
        q, k, v = [tensor.transpose(0, 1)[None] for tensor in one]
        wanted = exact(q, k, v, band(q.shape[2], q.shape[2], 99, 0), scale=0.07)[0].transpose(0, 1)
        torch.testing.assert_close(part.float(), wanted, rtol=1e-2, atol=1e-2)


def test_inference_over_ragged_prompts_and_pages(npu):
    import torch_npu

    size, table = 16, torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    lengths_q, lengths_kv = [2, 3], [9, 21]
    q = seeded(5, 4, 32, dtype=torch.bfloat16)
    pages = [seeded(5, size, 2 * 32, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    result, _ = torch_npu.npu_fused_infer_attention_score(
        q.to(npu),
        *[page.to(npu) for page in pages],
        num_heads=4,
        num_key_value_heads=2,
        scale=0.2,
        input_layout="TND",
        sparse_mode=3,
        atten_mask=COMPRESSED.to(npu),
        actual_seq_lengths=[2, 5],
        actual_seq_lengths_kv=lengths_kv,
        block_table=table.to(npu),
        block_size=size,
    )
    for row, part in enumerate(result.cpu().split(lengths_q)):
        one = q.split(lengths_q)[row].float().transpose(0, 1)[None]
        k, v = [
            page[table[row].long()]
            .flatten(0, 1)[: lengths_kv[row]]
            .float()
            .unflatten(-1, (2, 32))
            .transpose(0, 1)[None]
            for page in pages
        ]
        queries, keys = lengths_q[row], lengths_kv[row]
        wanted = exact(one, k, v, band(queries, keys, 99, 0, keys - queries), scale=0.2)[0].transpose(0, 1)
        torch.testing.assert_close(part.float(), wanted, rtol=2e-2, atol=2e-2)


def test_attention_to_chosen_blocks(npu):
    import torch_npu

    lengths, size = (3, 4), 64
    keys = (128, 192)
    q = seeded(7, 4, 192, dtype=torch.float16)
    k, v = seeded(320, 2, 192, seed=1, dtype=torch.float16), seeded(320, 2, 128, seed=2, dtype=torch.float16)
    chosen = torch.stack(
        [torch.randperm(2 if row < 3 else 3, generator=torch.Generator().manual_seed(row))[:2] for row in range(14)]
    )
    chosen = chosen.reshape(2, 7, 2).transpose(0, 1).sort(-1).values
    chosen[:3] = torch.tensor([[[0, 1], [1, 0]]])

    def fused(q, k, v):
        options = dict(actual_seq_qlen=[3, 7], actual_seq_kvlen=[128, 320])
        return torch_npu.npu_nsa_select_attention(
            q, k, v, chosen.int().contiguous().to(npu), 0.07, 4, size, 2, **options
        )[0]

    def plain(q, k, v):
        results = []
        for one, block, key, value in zip(
            *[text.split(share) for text, share in ((q, lengths), (chosen, lengths), (k, keys), (v, keys))]
        ):
            seen = torch.zeros(len(one), 2, len(key) // size).scatter_(2, block, 1.0).bool().repeat_interleave(size, -1)
            hidden = ~seen.transpose(0, 1).repeat_interleave(2, 0)[None]
            results.append(
                exact(*[tensor.transpose(0, 1)[None] for tensor in (one, key, value)], hidden, scale=0.07)[0].transpose(
                    0, 1
                )
            )
        return torch.cat(results)

    matches(npu, fused, plain, (q, k, v))


def test_blocks_of_rows_are_compressed(npu):
    import torch_npu

    x, weight = seeded(80, 2, 16, dtype=torch.float16), seeded(32, 2, seed=1, dtype=torch.float16)

    def plain(x, weight):
        parts = [part[start : start + 32] for part in x.split([48, 32]) for start in range(0, len(part) - 31, 16)]
        return torch.stack([(part * weight[..., None]).sum(0) for part in parts])

    matches(
        npu,
        lambda x, weight: torch_npu.npu_nsa_compress(x, weight, 32, 16, actual_seq_len=[48, 80]),
        plain,
        (x, weight),
    )
