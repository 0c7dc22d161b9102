"""Recurrent layers and cells: LSTM and GRU, forward and backward, on both paths.

A layer is a loop over time in the kernels too: states are rounded to the inputs' dtype at each step, gates stay float32
inside one. Backward everything is float32 until the results are rounded. Stated: hicann/ops-nn, rnn/dynamic_rnn,
rnn/single_layer_lstm_grad, rnn/gru_grad.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from harness import numerics
from harness.emulator import soc
from harness.emulator.operators.aclop import of_products
from harness.emulator.operators.common import upcast
from harness.emulator.table import aclop, operator


def product(left, right, of=soc.default_operands):
    """A product in float32; `of` says what becomes of its float32 operands."""
    return numerics.matmul(left, right, operands=of(left, right), out=torch.float32)


def over_time(x, weight, of=soc.default_operands):
    """(T, B, I) by (I, N), all steps in one product."""
    return product(x.flatten(0, 1), weight, of).unflatten(0, x.shape[:2])


def gradient(x, grads, of=soc.default_operands):
    """Of a weight (I, N) that all steps share: x (T, B, I), grads (T, B, N)."""
    return product(x.flatten(0, 1).t(), grads.flatten(0, 1), of)


def steps(count: int, reverse: bool) -> list[int]:
    return list(range(count))[::-1] if reverse else list(range(count))


def before(states, initial, reverse: bool):
    """The state that each step started from."""
    rows = torch.cat([states, initial[None]]) if reverse else torch.cat([initial[None], states])
    return rows[1:] if reverse else rows[:-1]


def laid_out(result: dict[int, tuple]) -> list:
    """What each step found, (T, …) for each kind, in the order of time."""
    return [torch.stack(item) for item in zip(*(result[step] for step in sorted(result)))]


# -------- LSTM


class Lstm(NamedTuple):
    """What one layer in one direction leaves for its gradient, each (T, B, H)."""

    y: torch.Tensor
    h: torch.Tensor
    c: torch.Tensor
    i: torch.Tensor
    j: torch.Tensor
    f: torch.Tensor
    o: torch.Tensor
    tanh_c: torch.Tensor


class Weights(NamedTuple):
    """One layer in one direction, as the products take them: (I, 4·H), (H, 4·H) and the sum of the biases or None; 3·H
    for a GRU.
    """

    x: torch.Tensor
    h: torch.Tensor
    bias: torch.Tensor | None = None


def cell(gates, c, order: str = "ifjo"):
    """One step from its gates before activation: h, c, i, j, f, o, tanh(c) in float32."""
    part = dict(zip(order.replace("c", "j"), gates.chunk(4, -1)))
    i, f, o = (torch.sigmoid(part[name]) for name in "ifo")
    j = torch.tanh(part["j"])
    c = f * c + i * j
    return o * torch.tanh(c), c, i, j, f, o, torch.tanh(c)


def cell_backward(grad_h, grad_c, c_before, i, j, f, o, tanh_c, order: str = "ifjo"):
    """The gradients towards the gates before activation and towards the cell's state of before."""
    total = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
    part = {
        "i": total * j * i * (1 - i),
        "f": total * c_before * f * (1 - f),
        "j": total * i * (1 - j * j),
        "o": grad_h * tanh_c * o * (1 - o),
    }
    return torch.cat([part[name] for name in order.replace("c", "j")], -1), total * f


def lstm_layer(x, weights: Weights, h, c, mask=None, reverse: bool = False, order: str = "ifjo") -> Lstm:
    """`mask` (T, B, 1 or H) is False where a sequence has ended: y is zero there and the states stay. Products never
    take HF32: stated.
    """
    dtype, result = x.dtype, {}
    gates = over_time(x, weights.x)
    gates = gates if weights.bias is None else gates + upcast(weights.bias)
    for step in steps(x.shape[0], reverse):
        h_new, c_new, *activations, tanh_c = cell(gates[step] + product(h, weights.h), upcast(c), order)
        y = h_new
        if mask is not None:
            y, c_new = h_new * mask[step], torch.where(mask[step].bool(), c_new, upcast(c))
            h_new, tanh_c = torch.where(mask[step].bool(), h_new, upcast(h)), torch.tanh(c_new)
        result[step] = tuple(activation.to(dtype) for activation in (y, h_new, c_new, *activations, tanh_c))
        _, h, c = result[step][:3]
    return Lstm(*laid_out(result))


def lstm_layer_backward(
    grad_y,
    grad_h,
    grad_c,
    x,
    weights: Weights,
    h,
    c,
    saved: Lstm,
    mask=None,
    reverse=False,
    order="ifjo",
    of=soc.default_operands,
):
    """The gradients towards x, both weights, the bias, and the first states, all in float32."""
    saved, grad_h, grad_c, result = Lstm(*map(upcast, saved)), upcast(grad_h), upcast(grad_c), {}
    h_before, c_before = before(saved.h, upcast(h), reverse), before(saved.c, upcast(c), reverse)
    for step in steps(x.shape[0], not reverse):
        through_h, through_c, passed_h, passed_c = upcast(grad_y[step]) + grad_h, grad_c, 0, 0
        if mask is not None:
            through_h, through_c = through_h * mask[step], through_c * mask[step]
            passed_h, passed_c = grad_h * ~mask[step].bool(), grad_c * ~mask[step].bool()
        gates, grad_c = cell_backward(through_h, through_c, c_before[step], *(item[step] for item in saved[3:]), order)
        result[step] = (gates,)
        grad_h, grad_c = product(gates, weights.h.t(), of) + passed_h, grad_c + passed_c
    (gates,) = laid_out(result)
    towards = gradient(upcast(x), gates, of), gradient(h_before, gates, of)
    return over_time(gates, weights.x.t(), of), *towards, gates.sum((0, 1)), grad_h, grad_c


def groups_of(params, has_bias: bool, add) -> list:
    """The parameters of each layer and direction: torch's own order, weights transposed for the products."""
    width = 4 if has_bias else 2
    groups = [params[at : at + width] for at in range(0, len(params), width)]
    return [Weights(group[0].t(), group[1].t(), add(*group[2:]) if has_bias else None) for group in groups]


def summed(first, second):
    return (upcast(first) + upcast(second)).to(first.dtype)


def time_first(x, batch_first: bool):
    return x.transpose(0, 1) if batch_first else x


def alive(batch_sizes, rows: int):
    """Where a step of a sequence is there, (T, B, 1), from how many sequences each step has; None for sequences of one
    length.
    """
    if batch_sizes is None or not batch_sizes.numel():
        return None
    return (torch.arange(rows // len(batch_sizes)) < batch_sizes[:, None]).unsqueeze(-1)


def last(states, reverse: bool):
    return states[0] if reverse else states[-1]


@operator(
    "aclnnLSTM",
    "input params:tensors hx:tensors batch_sizes has_bias:bool layers:int dropout:double train:bool "
    "bidirectional:bool batch_first:bool "
    ">output >hy >cy >i:tensors >j:tensors >f:tensors >o:tensors >h:tensors >c:tensors >tanh_c:tensors",
)
def lstm(input, params, hx, batch_sizes, has_bias, layers, dropout, train, bidirectional, batch_first, out):
    mask = alive(batch_sizes, input.shape[0])
    x = time_first(input, batch_first) if mask is None else input.reshape(*mask.shape[:2], input.shape[1])
    weights, directions, result = groups_of(params, has_bias, summed), 2 if bidirectional else 1, []
    h, c = hx or [torch.zeros(out[1].shape, dtype=x.dtype)] * 2
    for first in range(0, layers * directions, directions):
        result += [
            lstm_layer(x, weights[at], h[at], c[at], mask, reverse=at > first)
            for at in range(first, first + directions)
        ]
        x = torch.cat([item.y for item in result[first:]], -1)
    ends = [
        torch.stack([last(getattr(item, name), at % directions == 1) for at, item in enumerate(result)])
        for name in "hc"
    ]
    if train:
        kinds = [[getattr(item, name) for item in result] for name in ("i", "j", "f", "o", "h", "c", "tanh_c")]
        saved = [item for kind in kinds for item in kind]
    else:
        saved = [None if spec is None else torch.zeros(spec.shape, dtype=spec.dtype) for spec in out[3:]]
    return [time_first(x, batch_first), *ends, *saved]


@operator(
    "aclnnLstmBackward",
    "input hx:tensors params:tensors dy dh dc i:tensors j:tensors f:tensors o:tensors h:tensors c:tensors "
    "tanh_c:tensors batch_sizes "
    "has_bias:bool layers:int dropout:double train:bool bidirectional:bool batch_first:bool wanted:bools >dx "
    ">dh_before >dc_before "
    ">dparams:tensors",
)
def lstm_backward(
    input,
    hx,
    params,
    dy,
    dh,
    dc,
    i,
    j,
    f,
    o,
    h,
    c,
    tanh_c,
    batch_sizes,
    has_bias,
    layers,
    dropout,
    train,
    bidirectional,
    batch_first,
    wanted,
    out,
):
    mask, dtype = alive(batch_sizes, input.shape[0]), input.dtype
    x = time_first(input, batch_first) if mask is None else input.reshape(*mask.shape[:2], input.shape[1])
    weights, directions = groups_of(params, has_bias, summed), 2 if bidirectional else 1
    y = h if mask is None else [item * mask for item in h]
    saved = [Lstm(*item) for item in zip(y, h, c, i, j, f, o, tanh_c)]
    h0, c0 = hx or [torch.zeros(out[1].shape, dtype=dtype)] * 2
    dh, dc = (torch.zeros(out[1].shape) if item is None else item for item in (dh, dc))
    dy = torch.zeros(*x.shape[:2], directions * h[0].shape[-1]) if dy is None else time_first(dy, batch_first)
    result: dict[int, list] = {}
    for first in reversed(range(0, layers * directions, directions)):
        below = x if first == 0 else torch.cat(y[first - directions : first], -1)
        share = dy.chunk(directions, -1)
        for at in range(first, first + directions):
            towards = share[at - first], dh[at], dc[at]
            grads = lstm_layer_backward(
                *towards, below, weights[at], h0[at], c0[at], saved[at], mask, reverse=at > first
            )
            result[at] = [grad.to(dtype) for grad in grads]
        dy = sum(upcast(result[at][0]) for at in range(first, first + directions)).to(dtype)
    ends = [torch.stack([result[at][kind] for at in sorted(result)]) for kind in (4, 5)]
    params = []
    for at in sorted(result):
        _, weight_x, weight_h, bias = result[at][:4]
        params += [weight_x.t(), weight_h.t(), *([bias, bias] if has_bias else [])]
    return [(dy if mask is not None else time_first(dy, batch_first)).reshape(out[0].shape), *ends, *params]


@operator("aclnnThnnFusedLstmCell", "input_gates hidden_gates cx input_bias hidden_bias >hy >cy >storage")
def lstm_cell(input_gates, hidden_gates, cx, input_bias, hidden_bias):
    gates = sum(upcast(item) for item in (input_gates, hidden_gates, input_bias, hidden_bias) if item is not None)
    h, c, i, j, f, o, _ = cell(gates, upcast(cx))
    return [tensor.to(cx.dtype) for tensor in (h, c, torch.cat([i, f, j, o], -1))]


@operator(
    "aclnnThnnFusedLstmCellBackward", "grad_hy grad_cy cx cy storage has_bias:bool >grad_gates >grad_cx >grad_bias"
)
def lstm_cell_backward(grad_hy, grad_cy, cx, cy, storage, has_bias, out):
    grads = [torch.zeros(cx.shape) if item is None else upcast(item) for item in (grad_hy, grad_cy)]
    i, f, j, o = upcast(storage).chunk(4, -1)
    gates, towards = cell_backward(*grads, upcast(cx), i, j, f, o, torch.tanh(upcast(cy)))
    return [tensor.to(spec.dtype) for tensor, spec in zip((gates, towards, gates.sum(0)), out)]


# -------- GRU


class Gru(NamedTuple):
    """What one layer in one direction leaves for its gradient, each (T, B, H); `hn` is the hidden half of the new gate,
    before the reset.
    """

    h: torch.Tensor
    r: torch.Tensor
    z: torch.Tensor
    n: torch.Tensor
    hn: torch.Tensor


def gru_layer(x, weights: Weights, h, reverse: bool = False, order: str = "rzn", of=soc.default_operands) -> Gru:
    """`weights.bias` is a pair here: the reset gate lies between the two products of the new gate."""
    dtype, result = x.dtype, {}
    bias = [0, 0] if weights.bias is None else [upcast(item) for item in weights.bias]
    inputs = over_time(x, weights.x, of) + bias[0]
    for step in steps(x.shape[0], reverse):
        hidden = product(h, weights.h, of) + bias[1]
        own, other = (dict(zip(order, item.chunk(3, -1))) for item in (inputs[step], hidden))
        r, z = (torch.sigmoid(own[name] + other[name]) for name in "rz")
        n = torch.tanh(own["n"] + r * other["n"])
        result[step] = tuple(tensor.to(dtype) for tensor in ((1 - z) * n + z * upcast(h), r, z, n, other["n"]))
        h = result[step][0]
    return Gru(*laid_out(result))


def gru_layer_backward(
    grad_y, grad_h, x, weights: Weights, h, saved: Gru, reverse=False, order="rzn", of=soc.default_operands
):
    """The gradients towards x, both weights, both biases, and the first state, all in float32."""
    saved, grad_h, result = Gru(*map(upcast, saved)), upcast(grad_h), {}
    h_before = before(saved.h, upcast(h), reverse)
    for step in steps(x.shape[0], not reverse):
        _, r, z, n, hn = (item[step] for item in saved)
        total = upcast(grad_y[step]) + grad_h
        new = total * (1 - z) * (1 - n * n)
        part = {"r": new * hn * r * (1 - r), "z": total * (h_before[step] - n) * z * (1 - z), "n": new}
        result[step] = tuple(torch.cat([item[name] for name in order], -1) for item in (part, {**part, "n": new * r}))
        grad_h = product(result[step][1], weights.h.t(), of) + total * z
    inputs, hidden = laid_out(result)
    towards = gradient(upcast(x), inputs, of), gradient(h_before, hidden, of)
    return over_time(inputs, weights.x.t(), of), *towards, inputs.sum((0, 1)), hidden.sum((0, 1)), grad_h


def pair(first, second):
    return first, second


def no_packed_sequences(batch_sizes) -> None:
    if batch_sizes is not None:
        raise NotImplementedError("batchSizes: the vendor's GRU takes no packed sequences either (aclnnGRU.md)")


@operator(
    "aclnnGRU",
    "input params:tensors hx batch_sizes has_bias:bool layers:int dropout:double train:bool bidirectional:bool "
    "batch_first:bool "
    ">output >hy >r:tensors >z:tensors >n:tensors >hn:tensors >h:tensors",
)
def gru(input, params, hx, batch_sizes, has_bias, layers, dropout, train, bidirectional, batch_first, out):
    no_packed_sequences(batch_sizes)
    x, weights, directions, result = (
        time_first(input, batch_first),
        groups_of(params, has_bias, pair),
        2 if bidirectional else 1,
        [],
    )
    h = torch.zeros(out[1].shape, dtype=x.dtype) if hx is None else hx
    for first in range(0, layers * directions, directions):
        result += [gru_layer(x, weights[at], h[at], reverse=at > first) for at in range(first, first + directions)]
        x = torch.cat([item.h for item in result[first:]], -1)
    ends = torch.stack([last(item.h, at % directions == 1) for at, item in enumerate(result)])
    kinds = [[getattr(item, name) for item in result] for name in ("r", "z", "n", "hn", "h")]
    return [
        time_first(x, batch_first),
        ends,
        *([item for kind in kinds for item in kind] if train else [None] * (len(out) - 2)),
    ]


@operator(
    "aclnnGRUBackward",
    "input params:tensors hx dy dh r:tensors z:tensors n:tensors hn:tensors h:tensors batch_sizes "
    "has_bias:bool layers:int bidirectional:bool "
    "batch_first:bool >dx >dh_before >dparams:tensors",
)
def gru_backward(
    input, params, hx, dy, dh, r, z, n, hn, h, batch_sizes, has_bias, layers, bidirectional, batch_first, out
):
    no_packed_sequences(batch_sizes)
    x, weights, directions = (
        time_first(input, batch_first),
        groups_of(params, has_bias, pair),
        2 if bidirectional else 1,
    )
    saved = [Gru(*item) for item in zip(h, r, z, n, hn)]
    dy, outcome = time_first(dy, batch_first), {}
    for first in reversed(range(0, layers * directions, directions)):
        below = x if first == 0 else torch.cat(h[first - directions : first], -1)
        share = dy.chunk(directions, -1)
        for at in range(first, first + directions):
            outcome[at] = gru_layer_backward(
                share[at - first], dh[at], below, weights[at], hx[at], saved[at], reverse=at > first
            )
        dy = sum(outcome[at][0] for at in range(first, first + directions))
    towards = []
    for at in sorted(outcome):
        _, weight_x, weight_h, *biases, _ = outcome[at]
        towards += [weight_x.t(), weight_h.t(), *(biases if has_bias else [])]
    results = time_first(dy, batch_first), torch.stack([outcome[at][-1] for at in sorted(outcome)]), *towards
    return [result.to(spec.dtype) for result, spec in zip(results, out)]


# -------- the older path


# what torch_npu says of every layer, and the only values that have a meaning here; a literal of C++ arrives as a bool
_SETTINGS = {
    "cell_type": ("LSTM", True),
    "cell_depth": (0, 1),
    "use_peephole": (False,),
    "keep_prob": (1.0, -1.0),
    "cell_clip": (-1.0,),
    "num_proj": (0,),
    "time_major": (True,),
    "activation": ("tanh",),
    "recurrent_activation": ("sigmoid",),
    "forget_bias": (0.0,),
    "is_training": (True, False),
    "stateful": (False,),
    "merge_mode": ("concat",),
    "bias_type": ("no_bias",),
    "reset_after": (True,),
}


def _reverse(direction: str, settings: dict) -> bool:
    """Whether a layer runs from the end; everything else about it must be plain."""
    for name, value in settings.items():
        if value not in _SETTINGS[name]:
            raise NotImplementedError(f"{name} {value!r} of a recurrent layer")
    return direction == "REDIRECTIONAL"


def _state(value, like):
    """A first state (B, H), whatever axes came with it; zeros where none did."""
    return torch.zeros(like, dtype=torch.float32) if value is None else value.reshape(like)


def _mask(seq_length):
    """A mask (T, B, H) of steps that are there; torch_npu passes an empty or a single number where there is none."""
    return seq_length if seq_length is not None and seq_length.dim() == 3 else None


def _as(results, out) -> list:
    return [result.reshape(spec.shape).to(spec.dtype) for result, spec in zip(results, out)]


@aclop("DynamicRNN")
def dynamic_rnn(x, w, b, seq_length=None, init_h=None, init_c=None, *, out, direction, gate_order, **settings):
    weights, like = Weights(w[: x.shape[2]], w[x.shape[2] :], b), out[0].shape[1:]
    result = lstm_layer(
        x,
        weights,
        _state(init_h, like),
        _state(init_c, like),
        _mask(seq_length),
        _reverse(direction, settings),
        gate_order,
    )
    return _as(result, out)


@aclop("DynamicRNNV2")
def dynamic_rnn_v2(
    x, w_x, w_h, b=None, seq_length=None, init_h=None, init_c=None, *, out, direction, gate_order, **settings
):
    like, reverse = out[0].shape[1:], _reverse(direction, settings)
    result = lstm_layer(
        x, Weights(w_x, w_h, b), _state(init_h, like), _state(init_c, like), _mask(seq_length), reverse, gate_order
    )
    return _as(result, out)


def _dynamic_rnn_backward(
    x, weights, y, init_h, init_c, h, c, dy, dh, dc, i, j, f, o, tanh_c, seq_length, reverse, order
):
    like, whole = y.shape[1:], y.shape
    saved = Lstm(*(tensor.reshape(whole) for tensor in (y, h, c, i, j, f, o, tanh_c)))
    x, (dh, dc, init_h, init_c) = (
        x.reshape(*whole[:2], x.shape[-1]),
        (_state(item, like) for item in (dh, dc, init_h, init_c)),
    )
    return lstm_layer_backward(
        dy.reshape(whole), dh, dc, x, weights, init_h, init_c, saved, _mask(seq_length), reverse, order, of=of_products
    )  # fmt: skip


@aclop("DynamicRNNGrad")
def dynamic_rnn_grad(
    x,
    w,
    b,
    y,
    init_h,
    init_c,
    h,
    c,
    dy,
    dh,
    dc,
    i,
    j,
    f,
    o,
    tanh_c,
    seq_length=None,
    mask=None,
    wci=None,
    wcf=None,
    wco=None,
    *,
    out,
    direction,
    gate_order,
    **settings,
):
    weights, reverse = Weights(w[: x.shape[2]], w[x.shape[2] :]), _reverse(direction, settings)
    dx, dw_x, dw_h, db, *states = _dynamic_rnn_backward(
        x, weights, y, init_h, init_c, h, c, dy, dh, dc, i, j, f, o, tanh_c, seq_length, reverse, gate_order
    )  # fmt: skip
    return _as((torch.cat([dw_x, dw_h]), db, dx, *states), out)


@aclop("DynamicRNNV2Grad")
def dynamic_rnn_v2_grad(
    x,
    w_x,
    w_h,
    y,
    init_h,
    init_c,
    h,
    c,
    dy,
    dh,
    dc,
    i,
    j,
    f,
    o,
    tanh_c,
    seq_length=None,
    wci=None,
    wcf=None,
    wco=None,
    mask=None,
    *,
    out,
    direction,
    gate_order,
    **settings,
):
    dx, *towards, dh, dc = _dynamic_rnn_backward(
        x,
        Weights(w_x, w_h),
        y,
        init_h,
        init_c,
        h,
        c,
        dy,
        dh,
        dc,
        i,
        j,
        f,
        o,
        tanh_c,
        seq_length,
        _reverse(direction, settings),
        gate_order,
    )
    return _as((*towards, dx, dh, dc), out)


def _gru_order(gate_order: str) -> str:
    return gate_order.replace("h", "n")


@aclop("DynamicGRUV2")
def dynamic_gru_v2(
    x, w_x, w_h, b_x=None, b_h=None, seq_length=None, init_h=None, *, out, direction, gate_order, **settings
):
    weights = Weights(w_x, w_h, None if b_x is None else (b_x, b_h))
    state = _state(init_h, out[0].shape[1:])
    h, r, z, n, hn = gru_layer(x, weights, state, _reverse(direction, settings), _gru_order(gate_order), of_products)
    return _as((h, h, z, r, n, hn), out)


@aclop("DynamicGRUV2Grad")
def dynamic_gru_v2_grad(
    x,
    w_x,
    w_h,
    y,
    init_h,
    h,
    dy,
    dh,
    z,
    r,
    n,
    hn,
    seq_length=None,
    mask=None,
    *,
    out,
    direction,
    gate_order,
    **settings,
):
    like, reverse = y.shape[1:], _reverse(direction, settings)
    dx, *towards, state = gru_layer_backward(
        dy,
        _state(dh, like),
        x,
        Weights(w_x, w_h),
        _state(init_h, like),
        Gru(h, r, z, n, hn),
        reverse,
        _gru_order(gate_order),
        of_products,
    )
    return _as((*towards, dx, state), out)
