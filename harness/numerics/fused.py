"""Fused attention, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.numerics.rounding import round_half_away

SCORES = 1 << 26  # attention scores held at a time: 256 MiB
LEAST = torch.finfo(torch.float32).min  # 0xFF7FFFFF, negativeIntScalar of the kernels of fused attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    keep: float = 1.0,
    sink: Tensor | None = None,
    fast: bool = False,
    hidden_score: float = -math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused attention on (B, H, N, D): the result, and each row's maximum and sum, both (B, H, N, 1) in float32.

    `hidden` is True where a key is hidden, broadcast to (B, H, N, S); `bias` is added to the scaled scores;
    `dropout_mask` is True where dropout left a probability, which is then divided by `keep`; `sink` (H,) is one more
    score for each row, without a value. Heads of k and v may be fewer, shared by groups of q's. Scores, softmax and
    sums are float32; probabilities and the result are cast to q's dtype, ties away from zero. Stated, but for the tiles
    of the online softmax: hicann/ops-transformer, flash_attention_score. With `fast`, the high performance of prompts,
    scores and softmax of float16 are float16. Stated: prompt_flash_attention_base.h; after which steps they are rounded
    is assumed.

    `hidden_score` is what stands for a hidden key's score. With -inf a row whose keys are all hidden gives zeros; with
    `LEAST`, which the kernel writes, it gives the mean of v. Stated: ops-transformer, flash_attention_score, which
    replaces such rows only in its mode AA_INVALID_LINE_HIGH_PRECISION.
    """  # fmt: skip
    k, v = _shared(k, q), _shared(v, q)
    parts = []
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    masks = [_spread(tensor, q, k) for tensor in (hidden, bias, dropout_mask)]
    sink = None if sink is None else sink.float().repeat(q.shape[0])
    fast = fast and q.dtype == torch.float16
    for part in _parts(q, k):
        parts.append(
            _attend(
                *[item[part] for item in flat],
                scale,
                *[None if mask is None else mask[part] for mask in (*masks, sink)],
                keep,
                fast,
                hidden_score,
            )
        )
    return tuple(torch.cat(item).unflatten(0, q.shape[:2]) for item in zip(*parts))


def _shared(heads: Tensor, q: Tensor) -> Tensor:
    group = q.shape[1] // max(heads.shape[1], 1)
    return heads.repeat_interleave(group, 1) if group > 1 else heads


def _spread(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2]).flatten(0, 1)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    step = max(SCORES // max(q.shape[2] * k.shape[2], 1), 1)
    return [slice(start, start + step) for start in range(0, q.shape[0] * q.shape[1], step)] or [slice(None)]


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None, least: float) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if bias is not None:
        scores += bias.float()
    if hidden is not None:
        scores.masked_fill_(hidden, least)
    return scores


def _half_scores(
    q: Tensor, k: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None, least: float
) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)).half() * scale
    scores = (scores if bias is None else scores + bias.half()).float()
    return scores if hidden is None else scores.masked_fill_(hidden, least)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    hidden: Tensor | None,
    bias: Tensor | None,
    dropout_mask: Tensor | None,
    sink: Tensor | None,
    keep: float,
    fast: bool,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = (_half_scores if fast else _scores)(q, k, scale, hidden, bias, least)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    top = top if sink is None else torch.maximum(top, sink[:, None, None])
    finite = torch.where(torch.isfinite(top), top, 0.0)
    weights = scores.sub_(finite).exp_()
    weights = weights.half().float() if fast else weights
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink[:, None, None] - finite)
    if dropout_mask is not None:
        weights = weights.mul_(dropout_mask) / keep if keep else weights.zero_()
    weights = round_half_away(weights, q.dtype).float()
    result = torch.matmul(weights, v.float()) / torch.where(
        total == 0, 1.0, total
    )  # a row that sees no key gives zeros
    return round_half_away(result, q.dtype), top, total


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Tensor,
    top: Tensor,
    total: Tensor,
    *,
    scale: float,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    keep: float = 1.0,
    sink: Tensor | None = None,
    hidden_score: float = -math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `attention` towards q, k, v, bias (B, H, N, S) and sink (H,); the last two in float32, None
    without the input.

    Probabilities are made again from the saved maximum and sum, in float32. They and the gradient of the scores enter
    the products that follow in q's dtype, ties away from zero, and the row sums of grad · found replace those over the
    keys. Stated: hicann/ops-transformer, flash_attention_score_grad; that the results are cast once, after the sum over
    all tiles, as well.
    """  # fmt: skip
    wide_k, wide_v = _shared(k, q), _shared(v, q)
    flat = [tensor.flatten(0, 1) for tensor in (grad, q, wide_k, wide_v, result, top, total)]
    masks = [_spread(tensor, q, k) for tensor in (hidden, bias, dropout_mask)]
    parts = []
    for part in _parts(q, k):
        parts.append(
            _attend_backward(
                *[item[part] for item in flat],
                scale,
                *[None if mask is None else mask[part] for mask in masks],
                keep,
                hidden_score,
            )
        )
    joined = [None if item[0] is None else torch.cat(item).unflatten(0, q.shape[:2]) for item in zip(*parts)]
    towards_q, towards_k, towards_v, towards_bias, rows = joined
    group = q.shape[1] // max(k.shape[1], 1)
    if group > 1:
        towards_k, towards_v = [item.unflatten(1, (-1, group)).sum(2) for item in (towards_k, towards_v)]
    towards_sink = None
    if sink is not None:
        share = torch.exp(sink.float()[None, :, None, None] - top) / total
        towards_sink = -(share * rows).sum((0, 2, 3))
    return towards_q.to(q.dtype), towards_k.to(k.dtype), towards_v.to(v.dtype), towards_bias, towards_sink


def _attend_backward(
    grad, q, k, v, result, top, total, scale: float, hidden, bias, dropout_mask, keep: float, least: float
):
    finite = torch.where(torch.isfinite(top), top, 0.0)
    weights = _scores(q, k, scale, hidden, bias, least).sub_(finite).exp_() / torch.where(total == 0, 1.0, total)
    grad = grad.float()
    towards_weights = torch.matmul(grad, v.float().transpose(1, 2))
    dropped = weights
    if dropout_mask is not None:
        factor = dropout_mask.float() / keep if keep else torch.zeros_like(weights)
        dropped, towards_weights = weights * factor, towards_weights * factor
    rows = (grad * result.float()).sum(-1, keepdim=True)
    towards_scores = weights * (towards_weights - rows)
    narrow = [round_half_away(item, q.dtype).float() for item in (dropped, towards_scores)]
    return (
        torch.matmul(narrow[1], k.float()) * scale,
        torch.matmul(narrow[1].transpose(1, 2), q.float()) * scale,
        torch.matmul(narrow[0].transpose(1, 2), grad),
        None if bias is None else towards_scores,
        rows,
    )
