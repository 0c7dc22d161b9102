"""LSTM and GRU against the CPU's, forward and backward: on the path of aclnn, and on the older one where torch_npu
takes it.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from harness.tests.operators.conftest import agrees, seeded

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 5, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LAYERS = {  # layers, both directions, bias, batch first
    "one layer": (1, False, True, False),
    "batch first": (1, False, True, True),
    "without bias": (1, False, False, False),
    "two layers": (2, False, True, False),
    "two layers without bias": (2, False, False, True),
    "both directions": (1, True, True, False),
    "both directions without bias": (1, True, False, True),
    "all of it": (2, True, True, True),
}


def leaf(*shape, seed, dtype, scale=1.0):
    return (seeded(*shape, seed=seed) * scale).to(dtype).requires_grad_()


def parameters(gates, layers, both, bias, dtype):
    """The parameters in torch's order."""
    result, directions = [], 2 if both else 1
    for layer in range(layers):
        width = INPUTS if layer == 0 else directions * HIDDEN
        shapes = [(gates * HIDDEN, width), (gates * HIDDEN, HIDDEN), *[(gates * HIDDEN,)] * (2 if bias else 0)]
        result += [shape for _ in range(directions) for shape in shapes]
    return [leaf(*shape, seed=seed, dtype=dtype, scale=0.3) for seed, shape in enumerate(result)]


def state(layers, both, dtype, seed, batch=BATCH):
    return leaf((2 if both else 1) * layers, batch, HIDDEN, seed=seed, dtype=dtype)


def inputs(batch_first, dtype, batch=BATCH):
    shape = (batch, STEPS) if batch_first else (STEPS, batch)
    return leaf(*shape, INPUTS, seed=50, dtype=dtype, scale=0.5)


def lstm(layers, both, bias, batch_first, train=True):
    return lambda x, h, c, params: torch.lstm(x, (h, c), params, bias, layers, 0.0, train, both, batch_first)


def gru(layers, both, bias, batch_first, train=True):
    return lambda x, h, params: torch.gru(x, h, params, bias, layers, 0.0, train, both, batch_first)


@DTYPES
@pytest.mark.parametrize("case", LAYERS)
def test_lstm(npu, case, dtype):
    layers, both, bias, batch_first = LAYERS[case]
    states = [state(layers, both, dtype, seed) for seed in (60, 61)]
    agrees(npu, lstm(*LAYERS[case]), inputs(batch_first, dtype), *states, parameters(4, layers, both, bias, dtype))


@DTYPES
@pytest.mark.parametrize("case", LAYERS)
def test_gru(npu, case, dtype):
    layers, both, bias, batch_first = LAYERS[case]
    agrees(
        npu,
        gru(*LAYERS[case]),
        inputs(batch_first, dtype),
        state(layers, both, dtype, 60),
        parameters(3, layers, both, bias, dtype),
    )


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_do_not_train_save_nothing(npu, case):
    layers, both, bias, batch_first = LAYERS[case]
    x, states = (
        inputs(batch_first, torch.float32).detach(),
        [state(layers, both, torch.float32, seed).detach() for seed in (60, 61)],
    )
    params = [
        [parameter.detach() for parameter in parameters(gates, layers, both, bias, torch.float32)] for gates in (4, 3)
    ]
    agrees(npu, lstm(*LAYERS[case], train=False), x, *states, params[0])
    agrees(npu, gru(*LAYERS[case], train=False), x, states[0], params[1])


@pytest.mark.parametrize("case", ["one layer", "without bias", "all of it"])
def test_inputs_that_are_not_contiguous(npu, case):
    layers, both, bias, batch_first = LAYERS[case]

    def turned(compute):
        return lambda x, *rest: compute(x.transpose(0, 1), *rest)

    x = inputs(not batch_first, torch.float32)
    states = [state(layers, both, torch.float32, seed) for seed in (60, 61)]
    agrees(npu, turned(lstm(*LAYERS[case])), x, *states, parameters(4, layers, both, bias, torch.float32))
    agrees(npu, turned(gru(*LAYERS[case])), x, states[0], parameters(3, layers, both, bias, torch.float32))


@pytest.mark.parametrize("case", ["one layer", "without bias", "all of it"])
def test_a_batch_of_none(npu, case):
    layers, both, bias, batch_first = LAYERS[case]
    x, states = (
        inputs(batch_first, torch.float32, batch=0),
        [state(layers, both, torch.float32, seed, batch=0) for seed in (60, 61)],
    )
    agrees(npu, lstm(*LAYERS[case]), x, *states, parameters(4, layers, both, bias, torch.float32))
    agrees(npu, gru(*LAYERS[case]), x, states[0], parameters(3, layers, both, bias, torch.float32))


@pytest.mark.parametrize(("family", "gates"), [(lstm, 4), (gru, 3)], ids=["lstm", "gru"])
def test_half_inputs_with_float32_weights_take_the_older_path(npu, family, gates):
    x = inputs(False, torch.float16)
    states = [state(1, False, torch.float16, seed) for seed in ((60, 61) if gates == 4 else (60,))]
    agrees(npu, family(1, False, True, False), x, *states, parameters(gates, 1, False, True, torch.float32))


@pytest.mark.parametrize("wanted", ["y", "h", "c"])
def test_one_result_alone_brings_the_gradient(npu, wanted):
    def one(x, h, c, params):
        return lstm(1, False, True, False)(x, h, c, params)["yhc".index(wanted)]

    states = [state(1, False, torch.float32, seed) for seed in (60, 61)]
    agrees(npu, one, inputs(False, torch.float32), *states, parameters(4, 1, False, True, torch.float32))


@pytest.mark.parametrize("wanted", [0, 1], ids=["y", "h"])
def test_one_result_of_a_gru_alone_brings_the_gradient(npu, wanted):
    def one(x, h, params):
        return gru(1, True, True, False)(x, h, params)[wanted]

    agrees(
        npu,
        one,
        inputs(False, torch.float32),
        state(1, True, torch.float32, 60),
        parameters(3, 1, True, True, torch.float32),
    )


# -------- sequences of many lengths


LENGTHS = [4, 3, 1]


def packed(x, device):
    """A packed sequence of leaves: torch_npu keeps the steps behind the end, so it has more rows there than on the
    CPU.
    """
    result = pack_padded_sequence(x.to(device), LENGTHS)
    return PackedSequence(result.data.detach().requires_grad_(), result.batch_sizes)


def rows_of(data):
    """The rows that count, in the CPU's order."""
    if len(data) == sum(LENGTHS):
        return data
    there = torch.arange(STEPS)[:, None] < torch.tensor(LENGTHS)
    assert not data.reshape(STEPS, BATCH, -1)[~there].any()
    return data.reshape(STEPS, BATCH, -1)[there]


@pytest.mark.parametrize("case", [name for name, (*_, batch_first) in LAYERS.items() if name != "batch first"])
def test_lstm_of_packed_sequences(npu, case):
    layers, both, bias, _ = LAYERS[case]
    older = both and bias  # torch_npu drops the gradient of the last states of its second direction there
    x, results = seeded(STEPS, BATCH, INPUTS, seed=50), []
    for device in ("cpu", npu):
        sequence = packed(x, device)
        leaves = [state(layers, both, torch.float32, seed) for seed in (60, 61)] + parameters(
            4, layers, both, bias, torch.float32
        )
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in leaves]
        y, h, c = torch.lstm(sequence.data, sequence.batch_sizes, leaves[:2], leaves[2:], bias, layers, 0.0, True, both)
        y = y.flatten(0, 1) if y.dim() == 3 else y
        total = y.sin().sum() if older else y.sin().sum() + h.sin().sum() + c.cos().sum()
        grads = torch.autograd.grad(total, [sequence.data, *leaves])
        results.append(
            [rows_of(tensor.detach().cpu()) for tensor in (y, grads[0])]
            + [tensor.detach().cpu() for tensor in (h, c, *grads[1:])]
        )
    for wanted, result in zip(*results):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


# -------- cells


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_cell(npu, bias, dtype):
    def step(x, h, c, params):
        return torch.lstm_cell(x, (h, c), *params)

    states = [leaf(BATCH, HIDDEN, seed=seed, dtype=dtype) for seed in (60, 61)]
    agrees(npu, step, leaf(BATCH, INPUTS, seed=50, dtype=dtype), *states, parameters(4, 1, False, bias, dtype))


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_gru_cell(npu, bias, dtype):
    def step(x, h, params):
        return torch.gru_cell(x, h, *params)

    h = leaf(BATCH, HIDDEN, seed=60, dtype=dtype)
    agrees(npu, step, leaf(BATCH, INPUTS, seed=50, dtype=dtype), h, parameters(3, 1, False, bias, dtype))


def fused(from_inputs, from_hidden, c, *biases):
    if c.device.type == "npu":
        return torch.ops.aten._thnn_fused_lstm_cell(from_inputs, from_hidden, c, *biases)[:2]
    i, f, j, o = sum([from_inputs, from_hidden, *biases]).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * j.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_lstm_cell(npu, bias, dtype):
    gates = [leaf(BATCH, 4 * HIDDEN, seed=seed, dtype=dtype) for seed in (50, 51)]
    biases = [leaf(4 * HIDDEN, seed=seed, dtype=dtype) for seed in (52, 53)] if bias else []
    agrees(npu, fused, *gates, leaf(BATCH, HIDDEN, seed=60, dtype=dtype), *biases)


# -------- modules


def test_a_model_with_an_lstm_learns(npu):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"lstm": torch.nn.LSTM(INPUTS, HIDDEN, num_layers=2, batch_first=True), "head": torch.nn.Linear(HIDDEN, 1)}
    ).to(npu)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x = seeded(16, STEPS, INPUTS).to(npu)
    wanted, losses = x.sum((1, 2))[:, None].tanh(), []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(model["head"](model["lstm"](x)[0][:, -1]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
