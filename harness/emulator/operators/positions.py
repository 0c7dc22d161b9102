"""Rotary embeddings of positions."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import upcast
from harness.emulator.table import operator


def _half(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def _pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _quarters(x):
    return torch.cat([_half(part) for part in x.chunk(2, -1)], -1)


def _sorted(x):
    """What lies at even places before what lies at odd ones."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def _unsorted(x):
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def _same(x):
    return x


ROTATIONS = {0: _half, 1: _pairs, 2: _quarters, 3: _half}
ORDERS = {3: (_sorted, _unsorted)}  # the mode that sorts first, and how to undo it
MODES = {"half": 0, "interleave": 1, "quarter": 2}


def _rotated(x, cos, sin, mode: int, matrix=None):
    x, cos, sin = upcast(x), upcast(cos), upcast(sin)
    x = ORDERS.get(mode, (_same, _same))[0](x)
    turned = ROTATIONS[mode](x) if matrix is None else x @ upcast(matrix)
    return x * cos + turned * sin


@operator("aclnnRotaryPositionEmbedding", "self cos sin mode:int >out")
def rotary(self, cos, sin, mode, out):
    return _rotated(self, cos, sin, mode).to(out.dtype)


@operator("aclnnRotaryPositionEmbeddingV2", "self cos sin mode:int matrix >out")
def rotary_v2(self, cos, sin, mode, matrix, out):
    return _rotated(self, cos, sin, mode, matrix).to(out.dtype)


@operator("aclnnRotaryPositionEmbeddingGrad", "grad cos sin self mode:int >self_grad >cos_grad >sin_grad")
def rotary_backward(grad, cos, sin, self, mode, out):
    grad, cos, sin = upcast(grad), upcast(cos), upcast(sin)
    turn, (order, undo) = ROTATIONS[mode], ORDERS.get(mode, (_same, _same))
    towards = undo(grad * cos - turn(grad * sin))  # the rotation's transpose is its negative
    if self is None:  # without x the other two are not asked for
        return [
            towards.to(out[0].dtype),
            *[None if spec is None else torch.zeros(spec.shape, dtype=spec.dtype) for spec in out[1:]],
        ]
    x = order(upcast(self))
    sums = [
        None if spec is None else part.sum_to_size(spec.shape).to(spec.dtype)
        for part, spec in zip((grad * x, grad * turn(x)), out[1:])
    ]
    return [towards.to(out[0].dtype), *sums]


def _leading(x, cos, sin, mode: int):
    """Rotated as far as cos reaches, the rest as it was."""
    width = cos.shape[-1]
    return torch.cat((_rotated(x[..., :width], cos, sin, mode).to(x.dtype), x[..., width:]), -1)


@operator("aclnnApplyRotaryPosEmb", "query! key! cos sin layout:int")
def rotary_both(query, key, cos, sin, layout):
    return _leading(query, cos, sin, 0), _leading(key, cos, sin, 0)


@operator("aclnnApplyRotaryPosEmbV2", "query! key! cos sin layout:int mode:str")
def rotary_both_v2(query, key, cos, sin, layout, mode):
    return _leading(query, cos, sin, MODES[mode]), _leading(key, cos, sin, MODES[mode])


@operator("aclnnInterleaveRope", "self cos sin >out")
def rotary_sorted(self, cos, sin, out):
    return _rotated(self, cos, sin, 3).to(out.dtype)


def _of_axes(cache, sections, interleaved: bool):
    """Numbers of three axes of positions (3, T, D) as those of a token (T, D): each axis has its section of D, or every
    third place.
    """
    if not interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(cache.split(tuple(sections), -1))], -1)
    mixed = cache[0].clone()
    for axis in (1, 2):
        indices = slice(axis, sections[1] * 3, 3)
        mixed[..., indices] = cache[axis][..., indices]
    return mixed


def _cached(x, cos, sin, size: int, halves: bool):
    heads = upcast(x).unflatten(-1, (-1, size))  # (T, H, D)
    width = 2 * cos.shape[-1]
    inner, rest = heads[..., :width], heads[..., width:]
    join = (lambda part: torch.cat((part, part), -1)) if halves else (lambda part: part.repeat_interleave(2, -1))
    turned = _rotated(inner, join(cos).unsqueeze(-2), join(sin).unsqueeze(-2), 0 if halves else 1)
    return torch.cat((turned, rest), -1).flatten(-2).reshape(x.shape).to(x.dtype)


@operator(
    "aclnnRopeWithSinCosCacheV2",
    "positions query key cache sections:ints size:int halves:bool interleaved:int >query_out >key_out",
)
def rotary_cached_v2(positions, query, key, cache, sections, size, halves, interleaved):
    cos, sin = upcast(cache)[positions.long()].chunk(2, -1)
    if positions.dim() == 2:
        cos, sin = _of_axes(cos, sections, bool(interleaved)), _of_axes(sin, sections, bool(interleaved))
    return _cached(query, cos, sin, size, halves), _cached(key, cos, sin, size, halves)


@operator(
    "aclnnRopeWithSinCosCache", "positions query key cache sections:ints size:int halves:bool >query_out >key_out"
)
def rotary_cached(positions, query, key, cache, sections, size, halves):
    return rotary_cached_v2(positions, query, key, cache, sections, size, halves, 0)


def _slots(index, mode: str, batch: int, tokens: int, cache):
    """Where each token goes among the cache's rows, (B·T,); below zero it goes nowhere."""
    if mode == "Norm":  # (B, 1, S, D), the index counts within a sequence
        return (index.reshape(batch, tokens) + torch.arange(batch).unsqueeze(1) * cache.shape[2]).flatten()
    if "BLK" not in mode:
        return index.flatten()
    size, pages = cache.shape[1], index.reshape(batch, -1)  # the first row of each page
    token = torch.arange(tokens)
    starts = pages[:, token // size]
    return torch.where(starts < 0, -1, starts // size * size + token % size).flatten()


def _stored(cache, values, scale, offset, mode: str, slots):
    """A cache with new rows (B·T, D), quantized where there is a scale; an NZ cache holds pieces of 32 bytes of each
    row apart.
    """
    if scale is not None:
        values = values * upcast(scale) if offset is None else values * upcast(scale) + upcast(offset)
        values = values.round().clamp(-128, 127)
    chosen = slots >= 0
    slots, values = slots[chosen].long(), values[chosen].to(cache.dtype)
    if not mode.endswith("NZ"):
        updated = cache.reshape(-1, cache.shape[-1]).clone()
        updated[slots] = values
        return updated.reshape(cache.shape)
    piece, size = 32 // cache.dtype.itemsize, cache.shape[1]
    pages = cache.reshape(cache.shape[0], -1, size, piece).clone()
    pages[slots // size, :, slots % size] = values.reshape(len(slots), -1, piece)
    return pages.reshape(cache.shape)


def _normalized(x, gamma, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * upcast(gamma)


def _cache_keys(key, latent, index, caches, scales, offsets, mode, wanted, out):
    batch, _, tokens, _ = key.shape
    updated = [
        _stored(
            cache, value.reshape(batch * tokens, -1), scale, offset, mode, _slots(index, mode, batch, tokens, cache)
        )
        for cache, value, scale, offset in zip(caches, (key, latent), scales, offsets)
    ]
    shown = [value if wanted else torch.zeros(spec.shape) for value, spec in zip((key, latent), out[2:])]
    return [*updated, *[value.reshape(spec.shape).to(spec.dtype) for value, spec in zip(shown, out[2:])]]


CACHES = "k_cache! latent_cache! k_scale latent_scale k_offset latent_offset"


@operator(
    "aclnnKvRmsNormRopeCache",
    f"kv gamma cos sin index {CACHES} eps:double mode:str wanted:bool >key >latent",
)
def cache_latent(
    kv,
    gamma,
    cos,
    sin,
    index,
    k_cache,
    latent_cache,
    k_scale,
    latent_scale,
    k_offset,
    latent_offset,
    eps,
    mode,
    wanted,
    out,
):
    """What multi-head latent attention keeps of a token: the normalized latent, and the rotated part of the key behind
    it.
    """
    latent, key = upcast(kv).split((gamma.shape[0], cos.shape[-1]), -1)
    key = _rotated(key, cos, sin, 3)
    caches, scales, offsets = (k_cache, latent_cache), (k_scale, latent_scale), (k_offset, latent_offset)
    return _cache_keys(key, _normalized(latent, gamma, eps), index, caches, scales, offsets, mode, wanted, out)


@operator(
    "aclnnKvRmsNormRopeCacheV2",
    f"key gamma cos sin index {CACHES} value eps:double mode:str wanted:bool >key_out >value_out",
)
def cache_key_and_value(
    key,
    gamma,
    cos,
    sin,
    index,
    k_cache,
    latent_cache,
    k_scale,
    latent_scale,
    k_offset,
    latent_offset,
    value,
    eps,
    mode,
    wanted,
    out,
):
    normal = _normalized(upcast(key), gamma, eps)
    width = cos.shape[-1]
    key = torch.cat((_rotated(normal[..., :width], cos, sin, 3), normal[..., width:]), -1)
    caches, scales, offsets = (k_cache, latent_cache), (k_scale, latent_scale), (k_offset, latent_offset)
    return _cache_keys(key, upcast(value), index, caches, scales, offsets, mode, wanted, out)


@operator(
    "aclnnQkvRmsNormRopeCache",
    "qkv q_gamma k_gamma cos sin index query! k_cache! v_cache! k_scale v_scale k_offset v_offset size:ints "
    "heads:ints eps:double mode:str "
    ">query_shown >key_shown >value_shown",
)
def cache_joint(
    qkv,
    q_gamma,
    k_gamma,
    cos,
    sin,
    index,
    query,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    k_offset,
    v_offset,
    size,
    heads,
    eps,
    mode,
    out,
):
    """Queries and keys normalized and rotated, keys and values kept in pages of pieces (page, pieces of a row, place,
    piece).
    """
    if mode != "PA_NZ":
        raise NotImplementedError(f"a cache of queries, keys and values in mode {mode}")
    batch, tokens, _, width = size
    q, k, v = upcast(qkv).reshape(batch, tokens, -1, width).split(tuple(heads), 2)
    cos, sin = [upcast(tensor).reshape(batch, -1, tensor.shape[1] // width, width) for tensor in (cos, sin)]
    q, k = [_rotated(_normalized(part, gamma, eps), cos, sin, 0) for part, gamma in ((q, q_gamma), (k, k_gamma))]
    caches = [
        _paged(cache, part.flatten(0, 1), scale, offset, index)
        for cache, part, scale, offset in ((k_cache, k, k_scale, k_offset), (v_cache, v, v_scale, v_offset))
    ]
    shown = [
        None if spec is None else part.reshape(spec.shape).to(spec.dtype) for part, spec in zip((q, k, v), out[3:])
    ]
    return [q.reshape(query.shape).to(query.dtype), *caches, *shown]


def _paged(cache, rows, scale, offset, index):
    if scale is not None:
        rows = rows / upcast(scale) if offset is None else rows / upcast(scale) + upcast(offset)
        rows = rows.round().clamp(-128, 127)
    chosen = index >= 0
    slots, size, updated = index[chosen], cache.shape[2], cache.clone()
    updated[slots // size, :, slots % size] = rows[chosen].to(cache.dtype).reshape(len(slots), -1, cache.shape[-1])
    return updated
