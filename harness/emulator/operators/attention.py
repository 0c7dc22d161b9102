"""Fused attention."""

from __future__ import annotations

import torch

from harness import numerics
from harness.emulator.table import operator


@operator(
    "aclnnFlashAttentionScore",
    "q k v pse drop_mask padding_mask hidden prefix:ints scale:double keep:double before:int after:int heads:int layout:str "
    "inner_precise:int sparse_mode:int >max >sum >softmax >result",
)
def flash_attention(q, k, v, pse, drop_mask, padding_mask, hidden, prefix, scale, keep, before, after, heads, layout, inner, sparse, out):
    if drop_mask is not None and drop_mask.numel() or keep != 1.0:
        raise NotImplementedError("fused attention with dropout")
    if prefix or padding_mask is not None and padding_mask.numel():
        raise NotImplementedError("fused attention with a prefix or a padding mask")
    split = {
        "BNSD": lambda x, n: x,
        "BSND": lambda x, n: x.transpose(1, 2),
        "BSH": lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2),
        "SBH": lambda x, n: x.unflatten(-1, (n, -1)).permute(1, 2, 0, 3),
    }
    if layout not in split:
        raise NotImplementedError(f"fused attention with layout {layout}")
    width = q.shape[-1] // heads if layout in ("BSH", "SBH") else q.shape[-1]
    few = k.shape[-1] // width if layout in ("BSH", "SBH") else heads
    queries, keys, values = split[layout](q, heads), split[layout](k, few), split[layout](v, few)
    hidden = _hidden(hidden, queries.shape[2], keys.shape[2], before, after, sparse)
    found, top, total = numerics.attention(queries, keys, values, scale=scale, hidden=hidden, bias=pse)
    join = {
        "BNSD": lambda x: x,
        "BSND": lambda x: x.transpose(1, 2),
        "BSH": lambda x: x.transpose(1, 2).flatten(2),
        "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    }
    rows = out[0].shape  # (B, H, N, 8): the same number eight times, as the kernel stores it
    return top.expand(rows), total.expand(rows), torch.empty(out[2].shape, dtype=out[2].dtype), join[layout](found)


def _hidden(mask, queries: int, keys: int, before: int, after: int, sparse: int):
    """Which keys are hidden, by the kernel's sparse mode: 0 mask and band, 1 the mask alone, 2 and 3 causal, 4 band."""
    if sparse == 1:
        return None if mask is None else mask.bool()
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    if sparse == 0:
        outside = (j - i > after) | (i - j > before)
        if mask is None:
            return outside if bool(outside.any()) else None
        return mask.bool() | outside
    if sparse == 2:
        return j > i
    if sparse == 3:
        return j - i > keys - queries
    raise NotImplementedError(f"fused attention with sparse mode {sparse}")
