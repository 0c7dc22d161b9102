"""Optimizers and the scaling of gradients: training on the device takes the steps that it takes on the CPU."""

import pytest
import torch
from torch import optim

from harness.tests.operators.conftest import seeded

OPTIMIZERS = [
    (optim.Adam, {}),
    (optim.Adam, dict(amsgrad=True, weight_decay=0.1)),
    (optim.AdamW, {}),
    (optim.AdamW, dict(amsgrad=True, maximize=True)),
    (optim.SGD, {}),
    (optim.SGD, dict(momentum=0.9)),
    (optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    (optim.RMSprop, dict(momentum=0.5, centered=True)),
    (optim.Adagrad, {}),
    (optim.Adadelta, {}),
    (optim.Adamax, {}),
    (optim.NAdam, {}),
    (optim.RAdam, {}),
    (optim.ASGD, {}),
    (optim.Rprop, {}),
]
FUSED = [pair for pair in OPTIMIZERS if pair[0] in (optim.Adam, optim.AdamW) or (pair[0] is optim.SGD and pair[1])]


def trained(device, kind, settings, scaler=None):
    weights = [seeded(3, 5).to(device).requires_grad_(), seeded(3, seed=1).to(device).requires_grad_()]
    inputs = seeded(4, 5, seed=2).to(device)
    optimizer = kind(weights, lr=0.01, **settings)
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.linear(inputs, *weights).pow(2).sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return [weight.detach().cpu() for weight in weights]


def check(npu, kind, settings, mode):
    for result, expected in zip(
        trained(npu, kind, {**settings, **mode}), trained("cpu", kind, {**settings, "foreach": False})
    ):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "kind, settings",
    OPTIMIZERS,
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "plain",
)
def test_steps(npu, kind, settings, foreach):
    check(npu, kind, settings, {"foreach": foreach})


@pytest.mark.parametrize(
    "kind, settings", FUSED, ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "plain"
)
def test_fused_steps(npu, kind, settings):
    check(npu, kind, settings, {"fused": True})


def test_scaled_gradients(npu):
    scaler = torch.amp.GradScaler("npu", init_scale=1024.0, growth_interval=2)
    for result, expected in zip(trained(npu, optim.SGD, {}, scaler), trained("cpu", optim.SGD, {})):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 4096.0


def test_an_infinite_gradient_skips_the_step(npu):
    scaler = torch.amp.GradScaler("npu", init_scale=1024.0)
    weight = torch.ones(3, device=npu, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0 and torch.equal(weight.detach().cpu(), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clipped_gradients(npu, dtype):
    norms = []
    for device in ("cpu", npu):
        weight = torch.nn.Parameter(seeded(4, 5, dtype=dtype).to(device))
        weight.grad = seeded(4, 5, seed=1, dtype=dtype).to(device)
        norms.append((torch.nn.utils.clip_grad_norm_([weight], 1.0).cpu(), weight.grad.cpu()))
    for expected, result in zip(*norms):
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
