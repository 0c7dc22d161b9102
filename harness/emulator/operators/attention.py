"""Fused attention: training, forward and backward, and inference."""

from __future__ import annotations

import itertools
import math

import torch

from harness import numerics
from harness.emulator.operators.common import upcast
from harness.emulator.table import operator

SPLIT = {  # a layout as (B, H, N, D); the heads' number tells the axes H apart
    "BNSD": lambda x, heads: x,
    "BSND": lambda x, heads: x.transpose(1, 2),
    "BSH": lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2),
    "SBH": lambda x, heads: x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3),
    "NSD": lambda x, heads: x.unsqueeze(0),
}
JOIN = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    "NSD": lambda x: x.squeeze(0),
    "NBSD": lambda x: x.transpose(0, 1),
}


def _given(tensor):
    return tensor is not None and tensor.numel() > 0


def _ends(lengths) -> list[slice]:
    """The rows of each sequence, from the cumulated lengths."""
    return [slice(start, end) for start, end in itertools.pairwise([0, *lengths])]


def _band(queries: int, keys: int, before: int, after: int, shift: int):
    """True outside the band; shift moves its start from the upper left to the lower right corner."""
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - shift
    return (distance > after) | (-distance > before)


def _hidden(mask, queries: int, keys: int, before: int, after: int, sparse: int, prefix=None, last=True, first=True):
    """Which keys are hidden, by the kernel's sparse mode; without a mask none is, whatever the mode says.

    0: the mask, and outside the band; 1 and 5: the mask alone; 2 and 3: causal from the upper left and the lower right
    corner; 4: band;
    6: as 3, but for a prefix that all see; 7 and 8: as 3 and 2, with a band in the last and the first sequence. The
    compressed masks of 2048 rows that modes 2 to 8 come with say nothing more.
    """
    if mask is None:
        return None
    shift = keys - queries
    if sparse in (0, 1, 5):
        mask = mask.bool()
        mask = mask[..., :queries, :keys] if mask.shape[-2] != 1 else mask[..., :keys]
        outside = _band(queries, keys, before, after, 0) if sparse == 0 else None
        return mask if outside is None or not bool(outside.any()) else mask | outside
    if sparse == 4 or (sparse == 7 and last) or (sparse == 8 and first):
        return _band(queries, keys, before, after, shift)
    causal = _band(queries, keys, math.inf, 0, 0 if sparse in (2, 8) else shift)
    if sparse == 6:
        seen = torch.arange(keys) < torch.tensor(prefix)[:, None, None, None]
        return causal & ~seen
    return causal


def _hidden_score(given: dict) -> float:
    """What the kernel writes as the score of a hidden key; it shows in rows whose keys are all hidden.

    Those are zeros where inner_precise asks for it (2 and 3), and where the kernel can tell from its sparse mode that
    there are such rows; from a mask of the caller's it cannot. Stated: op-plugin's page of npu_fusion_attention,
    inner_precise; ops-transformer, AdjustSoftMaxRes.
    """
    corrected = given.get("inner", 0) in (2, 3) or given.get("sparse", 0) % 10 not in (0, 1, 5)
    return -math.inf if corrected else numerics.LEAST


def _bias(pse, kind: int, scale: float, queries: int, keys: int, batch: slice, starts):
    """What is added to the scaled scores: (Q Kᵀ + pse) · scale for 1, scale · Q Kᵀ + pse for 0, made of slopes for 2
    and 3.
    """
    if not _given(pse):
        return None
    if kind in (2, 3):
        slopes = pse.float().reshape(-1, pse.shape[-1])[..., None, None]  # (B or 1, H, 1, 1)
        slopes = slopes if slopes.shape[0] == 1 else slopes[batch]
        distance = (torch.arange(keys)[None, :] + starts[1] - torch.arange(queries)[:, None] - starts[0]).abs().float()
        return -slopes * (distance.sqrt() if kind == 3 else distance)
    pse = pse if pse.shape[0] == 1 else pse[batch]
    if pse.shape[-2] > queries:  # alibi: the last rows of a larger square
        pse = pse[..., -queries:, :]
    pse = pse[..., :keys].float()
    return pse * scale if kind == 1 else pse


def _dropout_mask(mask, start: int, shape):
    """Dropout's mask for one problem: bit i of byte i // 8, lowest first, is 1 where element i of (B, H, N, S) is
    kept.
    """
    if not _given(mask):
        return None
    count = math.prod(shape)
    first = start // 8
    octets = mask.flatten()[first : (start + count + 7) // 8]
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()
    return bits[start - 8 * first :][:count].reshape(shape).bool()


DEQUANTIZES = ("q_scale", "k_scale", "v_scale", "grad_scale", "found_scale")  # of V4: scales of quantized tensors


class _Problem:
    """One call of fused attention, its arguments by name, as problems of (B, H, N, D) that numerics knows."""

    def __init__(self, given: dict):
        self.given = given
        self.layout, self.heads = given["layout"], given["heads"]
        self.ragged = self.layout == "TND"
        q, k, v = [given[name] for name in "qkv"]
        if given.get("padding") is not None and given["padding"].numel():
            raise NotImplementedError("fused attention with a padding mask")
        if given["keep"] < 1 and not _given(given["drop"]) and "seed" in given:
            raise NotImplementedError("fused attention that draws its own mask of dropout")
        if any(_given(given.get(name)) for name in DEQUANTIZES):
            raise NotImplementedError("fused attention of quantized tensors")
        ropes = [given.get("q_rope"), given.get("k_rope")]
        self.inner = q.shape[-1], k.shape[-1]
        if _given(ropes[0]):
            q, k = torch.cat((q, ropes[0]), -1), torch.cat((k, ropes[1]), -1)
        self.q, self.k, self.v = q, k, v
        width = q.shape[-1] // self.heads if self.layout in ("BSH", "SBH") else 0
        self.few = k.shape[-1] // width if width else 0

    def split(self, x, few=False):
        return SPLIT[self.layout](x, self.few if few else self.heads)

    def parts(self):
        """For each sequence, or for the whole: how to cut tensors with queries' rows, with keys' rows, and the options
        of numerics.
        """
        given = self.given
        if not self.ragged:
            batch = self.split(self.q).shape[0]
            queries, keys = self.split(self.q).shape[2], self.split(self.k, True).shape[2]
            yield (
                self.split,
                lambda x: self.split(x, True),
                self.options(queries, keys, slice(None), 0, batch, True, True),
            )
            return
        rows, columns = _ends(given["lens_q"]), _ends(given["lens_kv"])
        filled = [index for index, item in enumerate(rows) if item.stop > item.start] or [0]
        start = 0
        for index, (row, column) in enumerate(zip(rows, columns)):
            queries, keys = row.stop - row.start, column.stop - column.start
            options = self.options(
                queries, keys, slice(index, index + 1), start, 1, index == filled[-1], index == filled[0]
            )
            yield (
                lambda x, row=row: x[row].transpose(0, 1).unsqueeze(0),
                lambda x, column=column: x[column].transpose(0, 1).unsqueeze(0),
                options,
            )
            start += self.heads_of_q() * queries * keys

    def heads_of_q(self):
        return self.q.shape[1] if self.ragged else self.heads

    def options(self, queries, keys, batch, start, count, last, first):
        given = self.given
        mask = given["mask"] if _given(given["mask"]) else None
        if self.ragged and mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[batch]
        prefix = (given["prefix"] or None) and given["prefix"][batch]
        starts = [(given.get(name) or (0,))[0] for name in ("q_start", "kv_start")]
        return dict(
            scale=given["scale"],
            hidden=_hidden(mask, queries, keys, given["before"], given["after"], given["sparse"], prefix, last, first),
            bias=_bias(given["pse"], given.get("pse_type", 1), given["scale"], queries, keys, batch, starts),
            dropout_mask=_dropout_mask(given["drop"], start, (count, self.heads_of_q(), queries, keys)),
            keep=given["keep"],
            sink=given["sink"] if _given(given.get("sink")) else None,
            hidden_score=_hidden_score(given),
        )

    def joined(self, parts, few=False):
        if self.ragged:
            rows = [part.squeeze(0).transpose(0, 1) for part in parts]
            whole = (self.k if few else self.q).shape[0]
            tail = whole - sum(row.shape[0] for row in rows)
            return torch.cat(rows + [rows[0].new_zeros(tail, *rows[0].shape[1:])] if tail else rows)
        return JOIN[self.layout](parts[0])

    def stored(self, parts, spec):
        """A row's number eight times over, as the kernel stores it; of ragged rows those of a head lie together, unless
        asked otherwise.
        """
        if not self.ragged:
            return parts[0].expand(spec.shape)
        if self.given.get("stored") == "same_as_input":
            return self.joined(parts).expand(spec.shape)
        flat = torch.cat([part.flatten() for part in parts])
        flat = torch.cat((flat, flat.new_zeros(math.prod(spec.shape[:-1]) - flat.numel())))
        return flat.reshape(*spec.shape[:-1], 1).expand(spec.shape)

    def loaded(self, statistic):
        """The numbers of `stored` again, (B, H, N, 1) for each problem."""
        statistic = statistic[..., :1]
        if not self.ragged:
            return [statistic]
        if self.given.get("stored") == "same_as_input":
            return [statistic[row].transpose(0, 1).unsqueeze(0) for row in _ends(self.given["lens_q"])]
        heads, flat = self.heads_of_q(), statistic.flatten()
        return [
            flat[heads * row.start : heads * row.stop].reshape(1, heads, -1, 1) for row in _ends(self.given["lens_q"])
        ]


def _forward(given, out, kind=_Problem):
    problem = kind(given)
    result = [
        numerics.attention(of_q(problem.q), of_k(problem.k), of_k(problem.v), **options)
        for of_q, of_k, options in problem.parts()
    ]
    results, tops, totals = zip(*result)
    return [
        problem.stored(tops, out[0]),
        problem.stored(totals, out[1]),
        torch.zeros(out[2].shape, dtype=out[2].dtype) if out[2] is not None else None,
        problem.joined(results).to(out[3].dtype),
    ]


def _backward(given, out, kind=_Problem):
    problem = kind(given)
    tops, totals = problem.loaded(given["max"]), problem.loaded(given["sum"])
    result = []
    for (of_q, of_k, options), top, total in zip(problem.parts(), tops, totals):
        tensors = of_q(given["grad"]), of_q(problem.q), of_k(problem.k), of_k(problem.v), of_q(given["found"])
        result.append(numerics.attention_backward(*tensors, top, total, **options))
    for_q, for_k, for_v, for_bias, for_sink = zip(*result)
    towards_q, towards_k = problem.joined(for_q), problem.joined(for_k, few=True)
    inner_q, inner_k = problem.inner
    values = {
        "dq": towards_q[..., :inner_q],
        "dq_rope": towards_q[..., inner_q:],
        "dk": towards_k[..., :inner_k],
        "dk_rope": towards_k[..., inner_k:],
        "dv": problem.joined(for_v, few=True),
        "dpse": _towards_pse(for_bias, given, out),
        "dsink": None if for_sink[0] is None else sum(for_sink),
    }
    return [_written(values[name], spec) for name, spec in out.items()]


def _towards_pse(for_bias, given, out):
    """The gradient of the scores, summed over what pse was spread to."""
    spec = out.get("dpse")
    if for_bias[0] is None or spec is None or not spec.numel or given.get("pse_type", 1) > 1:
        return None
    total = for_bias[0] * (given["scale"] if given.get("pse_type", 1) == 1 else 1.0)
    return total.sum_to_size(spec.shape) if len(for_bias) == 1 and total.dim() == len(spec.shape) else None


def _written(value, spec):
    if spec is None:
        return None
    if value is None or not spec.numel:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return value.reshape(spec.shape).to(spec.dtype)


def _enter(name: str, signature: str, compute) -> None:
    """Enter a member of a family whose function takes the arguments by their names in the signature."""
    words = [word.partition(":")[0] for word in signature.split()]
    inputs = [word for word in words if not word.startswith(">")]
    outputs = [word[1:] for word in words if word.startswith(">")]
    backward = compute is _backward

    def run(*values, out):
        specs = out if isinstance(out, list) else [out]
        return compute(dict(zip(inputs, values)), dict(zip(outputs, specs)) if backward else specs)

    operator(name, signature)(run)


MASKS = "pse drop padding mask"
STARTS = "q_start:ints kv_start:ints"
_LENGTHS = "lens_q:ints lens_kv:ints"
PLAIN = "scale:double keep:double before:int after:int heads:int layout:str inner:int sparse:int"
FOUND = ">max >sum >softmax >found"
SAVED = "max sum softmax found"
_KEYS = "q_rope k k_rope v"
ROPES = "q_rope k_rope"

for name, signature in {
    "aclnnFlashAttentionScore": f"q k v {MASKS} prefix:ints {PLAIN} {FOUND}",
    "aclnnFlashAttentionScoreV2": f"q k v {MASKS} prefix:ints {STARTS} {PLAIN} pse_type:int {FOUND}",
    "aclnnFlashAttentionScoreV3": f"q k v {MASKS} sink prefix:ints {STARTS} {PLAIN} pse_type:int {FOUND}",
    "aclnnFlashAttentionScoreV4": f"q k v {MASKS} {ROPES} q_scale k_scale v_scale sink prefix:ints {_LENGTHS} "
    f"{STARTS} {PLAIN} out_type:int "
    f"pse_type:int stored:str seed:int offset:int {FOUND}",
    "aclnnFlashAttentionVarLenScore": f"q k v {MASKS} prefix:ints {_LENGTHS} {PLAIN} {FOUND}",
    "aclnnFlashAttentionVarLenScoreV2": f"q k v {MASKS} prefix:ints {_LENGTHS} {STARTS} {PLAIN} pse_type:int {FOUND}",
    "aclnnFlashAttentionVarLenScoreV3": (
        f"q {_KEYS} {MASKS} prefix:ints {_LENGTHS} {STARTS} {PLAIN} pse_type:int {FOUND}"
    ),
    "aclnnFlashAttentionVarLenScoreV4": f"q k v {MASKS} prefix:ints {_LENGTHS} {PLAIN} stored:str {FOUND}",
    "aclnnFlashAttentionVarLenScoreV5": f"q {_KEYS} {MASKS} sink prefix:ints {_LENGTHS} {STARTS} {PLAIN} pse_type:int "
    f"stored:str {FOUND}",
}.items():
    _enter(name, signature, _forward)

for name, signature in {
    "aclnnFlashAttentionScoreGrad": f"q k v grad {MASKS} {SAVED} prefix:ints {PLAIN} >dq >dk >dv >dpse",
    "aclnnFlashAttentionScoreGradV2": f"q k v grad {MASKS} {SAVED} prefix:ints {STARTS} {PLAIN} pse_type:int >dq "
    f">dk >dv >dpse",
    "aclnnFlashAttentionScoreGradV3": f"q k v grad {MASKS} {SAVED} sink prefix:ints {STARTS} {PLAIN} pse_type:int "
    f">dq >dk >dv >dpse >dsink",
    "aclnnFlashAttentionScoreGradV4": f"q k v grad {MASKS} {SAVED} sink {ROPES} q_scale k_scale v_scale grad_scale "
    f"found_scale prefix:ints "
    f"{_LENGTHS} {STARTS} scale:double keep:double before:int after:int heads:int layout:str stored:str "
    "inner:int sparse:int pse_type:int seed:int "
    "offset:int out_type:int >dq >dk >dv >dq_rope >dk_rope >dpse >dsink",
    "aclnnFlashAttentionUnpaddingScoreGrad": f"q k v grad {MASKS} {SAVED} prefix:ints {_LENGTHS} {PLAIN} >dq >dk >dv "
    f">dpse",
    "aclnnFlashAttentionUnpaddingScoreGradV2": f"q k v grad {MASKS} {SAVED} prefix:ints {_LENGTHS} {STARTS} {PLAIN} "
    f"pse_type:int >dq >dk >dv >dpse",
    "aclnnFlashAttentionUnpaddingScoreGradV3": f"q {_KEYS} grad {MASKS} {SAVED} prefix:ints {_LENGTHS} {STARTS} "
    f"{PLAIN} pse_type:int "
    ">dq >dq_rope >dk >dk_rope >dv >dpse",
    "aclnnFlashAttentionUnpaddingScoreGradV4": f"q k v grad {MASKS} {SAVED} prefix:ints {_LENGTHS} {PLAIN} >dq >dk "
    f">dv >dpse stored:str",
    "aclnnFlashAttentionUnpaddingScoreGradV5": f"q {_KEYS} grad {MASKS} {SAVED} sink prefix:ints {_LENGTHS} {STARTS} "
    f"{PLAIN} pse_type:int stored:str "
    ">dq >dq_rope >dk >dk_rope >dv >dpse >dsink",
}.items():
    _enter(name, signature, _backward)


def _caches(given, name: str, batch: int, heads: int, lengths):
    """Keys or values of an inference as a list with (H, S, D) for each sequence."""
    tensors, layout = given[name], given["layout"].split("_")[0]
    tensors = tensors if isinstance(tensors, list) else [tensors]
    if _given(given.get("blocks")):
        cache = tensors[0]  # (blocks, size, H·D) or (blocks, H, size, D)
        pages = cache.unflatten(-1, (heads, -1)).transpose(1, 2) if cache.dim() == 3 else cache
        table = given["blocks"].long()
        return [
            pages[table[index][: -(-lengths[index] // pages.shape[2])]].transpose(0, 1).flatten(1, 2)
            for index in range(batch)
        ]
    if layout in ("TND", "NTD"):
        whole = tensors[0] if layout == "NTD" else tensors[0].transpose(0, 1)
        return [whole[:, part] for part in _ends(given["lens_kv"] or given["lens_q"])]
    return [one for tensor in tensors for one in SPLIT[layout](tensor, heads)]


def _infer(given, out):
    """Attention of an inference: sequences of their own lengths, key caches in pages, layouts that change on the
    way.
    """
    if any(_given(given.get(name)) for name in QUANTIZED):
        raise NotImplementedError("attention of an inference with quantization")
    if any(_given(given.get(name)) for name in ("pad_q", "pad_kv")):
        raise NotImplementedError("attention of an inference with padding on the left")
    came, _, goes = given["layout"].partition("_")
    goes, heads = goes or came, given["heads"]
    few = given["few"] or heads
    q, rope = given["q"], given.get("q_rope")
    q = torch.cat((q, rope), -1) if _given(rope) and came not in ("BSH",) else q
    ragged = came in ("TND", "NTD")
    if ragged:
        rows = _ends(given["lens_q"])
        queries = [(q if came == "NTD" else q.transpose(0, 1))[:, row] for row in rows]
    else:
        queries = list(SPLIT[came](q, heads))
        if _given(rope) and came == "BSH":
            queries = [torch.cat(pair, -1) for pair in zip(queries, SPLIT[came](rope, heads))]
    batch = len(queries)
    lengths = _lengths(given.get("lens_kv"), batch, ragged and not _given(given.get("blocks")))
    keys, values = [_caches(given, name, batch, few, lengths) for name in ("k", "v")]
    if _given(given.get("k_rope")):
        ropes = _caches({**given, "k_rope": [given["k_rope"]]}, "k_rope", batch, few, lengths)
        keys = [torch.cat(pair, -1) for pair in zip(keys, ropes)]
    sizes = _lengths(given.get("lens_q") if not ragged else None, batch, False)
    result, sums = [], []
    for index in range(batch):
        rows = queries[index].shape[1] if sizes is None or ragged else min(sizes[index], queries[index].shape[1])
        end = keys[index].shape[1] if lengths is None else lengths[index]
        key, value = keys[index][:, :end], values[index][:, :end]
        if _given(given.get("k_shared")):
            shared = [
                SPLIT[came](given[name], few)[0][:, : (given["shared_len"] or (None,))[0]]
                for name in ("k_shared", "v_shared")
            ]
            key, value = torch.cat((shared[0], key), 1), torch.cat((shared[1], value), 1)
        y, lse = _one(given, queries[index][:, :rows], key, value, index, batch)
        missing = queries[index].shape[1] - rows
        result.append(torch.nn.functional.pad(y, (0, 0, 0, missing)))
        sums.append(torch.nn.functional.pad(lse, (0, 0, 0, missing), value=math.inf))
    if ragged:
        joined, stored = torch.cat(result, 1), torch.cat(sums, 1)
        joined = joined if goes == "NTD" else joined.transpose(0, 1)
        stored = stored.transpose(0, 1)
    else:
        joined, stored = JOIN[goes](torch.stack(result)), torch.stack(sums)
    results = [joined.reshape(out[0].shape).to(out[0].dtype)]
    if len(out) > 1:
        results.append(
            stored.reshape(out[1].shape)
            if out[1] is not None and out[1].numel == stored.numel()
            else _written(None, out[1])
        )
    return results


def _lengths(lengths, batch: int, cumulated: bool):
    if not lengths:
        return None
    lengths = list(lengths)
    if cumulated:
        return [part.stop - part.start for part in _ends(lengths)]
    return lengths * batch if len(lengths) == 1 else lengths


def _one(given, q, k, v, index: int, batch: int):
    """One sequence: the result (H, N, D) and the log of its sums (H, N, 1)."""
    queries, keys = q.shape[1], k.shape[1]
    mask = given["mask"] if _given(given["mask"]) else None
    sparse = given.get("sparse", 0) % 10  # ten more asks for the higher precision of the same mode
    if mask is not None and sparse in (0, 1):
        if mask.dim() == 2 and queries == 1 and mask.shape[0] == batch and "sparse" not in given:
            mask = mask[:, None, :]
        mask = mask.reshape(-1, *mask.shape[-2:])
        mask = mask[index if mask.shape[0] == batch else 0]
    hidden = _hidden(mask, queries, keys, given.get("before", math.inf), given.get("after", math.inf), sparse)
    pse = given["pse"] if _given(given["pse"]) else None
    bias = None
    if pse is not None:
        bias = pse[index if pse.shape[0] == batch else 0][:, :queries, :keys]
    sink = given["sink"] if _given(given.get("sink")) else None
    fast = "sparse" in given and queries > 1 and given["inner"] % 2 == 1  # prompts know a mode of high performance
    options = dict(scale=given["scale"], hidden=hidden, hidden_score=_hidden_score(given), bias=bias)
    options |= dict(sink=sink, fast=fast)
    y, top, total = numerics.attention(*[tensor.unsqueeze(0) for tensor in (q, k, v)], **options)
    lse = torch.where(total == 0, math.inf, top + total.log())
    return y[0], lse[0]


QUANTIZED = (
    "deq1",
    "quant1",
    "deq2",
    "quant2",
    "offset2",
    "anti_scale",
    "anti_offset",
    "k_scale",
    "k_offset",
    "v_scale",
    "v_offset",
    "rope_scale",
    "q_scale",
)
SCALES = "deq1 quant1 deq2 quant2 offset2"
CACHE = (
    f"{SCALES} anti_scale anti_offset blocks pad_q pad_kv k_scale k_offset v_scale v_offset k_shared v_shared "
    "shared_len:ints"
)
COMMON = "heads:int scale:double before:int after:int layout:str few:int sparse:int inner:int"
MODES = "block:int anti_mode:int with_sums:bool k_mode:int v_mode:int"

for name, signature in {
    "aclnnPromptFlashAttentionV3": f"q k v pse mask lens_q:ints lens_kv:ints {SCALES} {COMMON} >y",
    "aclnnIncreFlashAttentionV4": f"q k:tensors v:tensors pse mask lens_kv:ints {SCALES} anti_scale anti_offset "
    f"blocks pad_kv "
    "heads:int scale:double layout:str few:int block:int inner:int >y",
    "aclnnFusedInferAttentionScoreV2": f"q k:tensors v:tensors pse mask lens_q:ints lens_kv:ints {CACHE} {COMMON} "
    f"{MODES} >y >sums",
    "aclnnFusedInferAttentionScoreV3": f"q k:tensors v:tensors pse mask lens_q:ints lens_kv:ints {CACHE} q_rope "
    f"k_rope rope_scale "
    f"{COMMON} {MODES} >y >sums",
    "aclnnFusedInferAttentionScoreV4": f"q k:tensors v:tensors pse mask lens_q:ints lens_kv:ints {CACHE} q_rope "
    f"k_rope rope_scale q_scale sink "
    f"{COMMON} {MODES} q_mode:int >y >sums",
}.items():
    _enter(name, signature, _infer)


@operator("aclnnAttentionUpdate", "sums:tensors parts:tensors kind:int >y >sums_all")
def attention_update(sums, parts, kind, out):
    """Results over parts of the keys as one: weighted by their sums' share."""
    stacked = torch.stack([upcast(item) for item in sums])
    whole = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - whole).unsqueeze(-1)
    y = (torch.stack([upcast(part) for part in parts]) * weights).sum(0)
    return [y.to(out[0].dtype), None if out[1] is None else _written(whole, out[1])]


@operator(
    "aclnnRingAttentionUpdateV2",
    "old old_max old_sum new new_max new_sum lens layout:str stored:str >found >max >sum",
)
def ring_update(old, old_max, old_sum, new, new_max, new_sum, lens, layout, stored, out):
    """What was found over the keys so far, and over the next ones, as one; the weights of each are its share of the
    sums.
    """
    top = torch.maximum(old_max, new_max)
    finite = torch.where(torch.isfinite(top), top, 0.0)  # rows that have seen no key yet
    parts = old_sum * torch.exp(old_max - finite), new_sum * torch.exp(new_max - finite)
    total = parts[0] + parts[1]
    shares = [(part / torch.where(total == 0, 1.0, total))[..., :1] for part in parts]
    if layout == "SBH":  # statistics are (B, H, S, 8)
        results = [tensor.float().unflatten(-1, (old_max.shape[1], -1)) for tensor in (old, new)]
        shares = [tensor.permute(2, 0, 1, 3) for tensor in shares]
    else:
        results = [old.float(), new.float()]
        if stored != "TND":  # the rows of a head lie together within a sequence
            shares = [
                _tokens_first(item, [part for part in _ends(lens.tolist()) if part.stop > part.start])
                for item in shares
            ]
    outcome = sum(result * share for result, share in zip(results, shares))
    return [_written(item, spec) for item, spec in zip((outcome, top, total), out)]


def _tokens_first(statistic, rows):
    heads, flat = statistic.shape[1], statistic.flatten()
    return torch.cat([flat[heads * row.start : heads * row.stop].reshape(heads, -1).t() for row in rows]).unsqueeze(-1)


def _floyd_weights(q, k_ij, k_jk, mask, scale):
    """Scores over j of what lies between i and k: (B, H, I, K, J)."""
    scores = torch.einsum("bhikc,bhijc->bhikj", upcast(q), upcast(k_ij)) + torch.einsum(
        "bhikc,bhjkc->bhikj", upcast(q), upcast(k_jk)
    )
    scores = scores if mask is None else scores - mask.bool() * 4e9
    return scores * scale


def _narrow(weights, dtype):
    return upcast(numerics.round_half_away(weights, dtype))


@operator("aclnnFusedFloydAttention", "q k_ij v_ij k_jk v_jk mask scale:double >max >sum >found")
def floyd_attention(q, k_ij, v_ij, k_jk, v_jk, mask, scale, out):
    scores = _floyd_weights(q, k_ij, k_jk, mask, scale)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    weights = _narrow(weights, q.dtype)
    result = torch.einsum("bhikj,bhijc->bhikc", weights, upcast(v_ij)) + torch.einsum(
        "bhikj,bhjkc->bhikc", weights, upcast(v_jk)
    )
    return top.expand(out[0].shape), total.expand(out[1].shape), (result / total).to(out[2].dtype)


@operator(
    "aclnnFusedFloydAttentionGrad",
    "q k_ij v_ij k_jk v_jk grad mask max sum found scale:double >dq >dk_ij >dv_ij >dk_jk >dv_jk",
)
def floyd_attention_backward(q, k_ij, v_ij, k_jk, v_jk, grad, mask, top, total, outcome, scale, out):
    weights = torch.exp(_floyd_weights(q, k_ij, k_jk, mask, scale) - top[..., :1]) / total[..., :1]
    towards = _floyd_weights(grad, v_ij, v_jk, None, 1.0) - (upcast(grad) * upcast(outcome)).sum(-1, keepdim=True)
    scores, weights = _narrow(weights * towards, q.dtype) * scale, _narrow(weights, q.dtype)
    results = (
        torch.einsum("bhikj,bhijc->bhikc", scores, upcast(k_ij))
        + torch.einsum("bhikj,bhjkc->bhikc", scores, upcast(k_jk)),
        torch.einsum("bhikj,bhikc->bhijc", scores, upcast(q)),
        torch.einsum("bhikj,bhikc->bhijc", weights, upcast(grad)),
        torch.einsum("bhikj,bhikc->bhjkc", scores, upcast(q)),
        torch.einsum("bhikj,bhikc->bhjkc", weights, upcast(grad)),
    )
    return [result.to(spec.dtype) for result, spec in zip(results, out)]


class _Selected(_Problem):
    """Ragged attention in which each token sees the chosen blocks of keys only: `chosen` (T, key heads, blocks)."""

    def __init__(self, given: dict):
        nothing = dict(
            layout="TND",
            pse=None,
            drop=None,
            prefix=None,
            keep=1.0,
            before=math.inf,
            after=math.inf,
            stored="same_as_input",
        )
        super().__init__({**given, **nothing})

    def options(self, queries, keys, batch, start, count, last, first):
        options = super().options(queries, keys, batch, start, count, last, first)
        chosen = (
            self.given["chosen"][_ends(self.given["lens_q"])[batch.start]].long().transpose(0, 1)
        )  # (key heads, N, blocks)
        blocks = -(-keys // self.given["block"])
        seen = (
            torch.zeros(*chosen.shape[:2], blocks + 1).scatter_(2, torch.where(chosen < 0, blocks, chosen), 1.0).bool()
        )
        seen = seen[..., :blocks].repeat_interleave(self.given["block"], -1)[..., :keys]
        unseen = ~seen.repeat_interleave(self.heads_of_q() // seen.shape[0], 0).unsqueeze(0)
        hidden = options["hidden"]
        return {**options, "hidden": unseen if hidden is None else hidden | unseen}


SELECTED = f"chosen mask {_LENGTHS} scale:double heads:int layout:str sparse:int block:int count:int"

_enter(
    "aclnnNsaSelectedAttention",
    f"q k v {SELECTED} >max >sum >found",
    lambda given, out: [item for item in _forward(given, [*out[:2], None, out[2]], _Selected) if item is not None],
)
_enter(
    "aclnnNsaSelectedAttentionGrad",
    f"q k v found grad max sum chosen {_LENGTHS} mask scale:double block:int count:int heads:int layout:str "
    "sparse:int >dq >dk >dv",
    lambda given, out: _backward(given, dict(zip(("dq", "dk", "dv"), out)), _Selected),
)


def _windows(rows, block: int, stride: int):
    """Where the blocks of a compression start, in all sequences one after the other."""
    return [start for row in rows for start in range(row.start, row.stop - block + 1, stride)]


@operator("aclnnNsaCompress", "self weight lens:ints layout:str block:int stride:int lens_kind:int >out")
def compress(self, weight, lens, layout, block, stride, lens_kind, out):
    """Each block of rows (T, H, D) as one, summed by weights (block, H)."""
    starts = _windows(_ends(lens), block, stride)
    rows = upcast(self)[torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(block)]  # (blocks, block, H, D)
    return (rows * upcast(weight)[..., None]).sum(1).to(out.dtype)


@operator(
    "aclnnNsaCompressGrad",
    "grad self weight lens:ints block:int stride:int lens_kind:int layout:str >self_grad >weight_grad",
)
def compress_backward(grad, self, weight, lens, block, stride, lens_kind, layout, out):
    starts = _windows(_ends(lens), block, stride)
    indices = torch.tensor(starts, dtype=torch.long)[:, None] + torch.arange(block)
    grad, x = upcast(grad).unsqueeze(1), upcast(self)
    towards = torch.zeros(x.shape).index_put_((indices,), grad * upcast(weight)[..., None], accumulate=True)
    return towards.to(out[0].dtype), (x[indices] * grad).sum((0, 3)).to(out[1].dtype)
