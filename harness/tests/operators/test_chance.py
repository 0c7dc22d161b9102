"""Random numbers have their distributions and follow the seed; dropout drops its share and its gradient the same
elements.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from harness.tests.operators.conftest import agrees

COUNT = 20000


def distance(values, cumulative):
    """Kolmogorov and Smirnov's, times the root of the count: above 1.95 once in a thousand."""
    values = values.double().sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    expected = cumulative(values)
    return float(torch.maximum((steps - expected).abs(), (steps - 1 / len(values) - expected).abs()).max()) * math.sqrt(
        len(values)
    )


def normal(mean, std):
    return lambda x: 0.5 * (1 + torch.erf((x - mean) / std / math.sqrt(2)))


DRAWN = {
    "normal": (lambda x: x.normal_(2, 3), normal(2, 3)),
    "uniform": (lambda x: x.uniform_(-1, 3), lambda x: ((x + 1) / 4).clamp(0, 1)),
    "exponential": (lambda x: x.exponential_(2), lambda x: 1 - torch.exp(-2 * x)),
    "of numbers": (lambda x: torch.normal(2.0, 3.0, x.shape, device=x.device), normal(2, 3)),
    "of tensors": (lambda x: torch.normal(x.fill_(2), x.clone().fill_(3)), normal(2, 3)),
    "of a mean": (lambda x: torch.normal(x.fill_(2), 3.0), normal(2, 3)),
    "of a deviation": (lambda x: torch.normal(2.0, x.fill_(3)), normal(2, 3)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_distributions(npu, name):
    draw, cumulative = DRAWN[name]
    torch.npu.manual_seed(1)
    values = draw(torch.empty(COUNT, device=npu)).cpu()
    assert values.dtype == torch.float32 and distance(values, cumulative) < 1.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(npu, dtype):
    torch.npu.manual_seed(1)
    values = torch.empty(COUNT, device=npu, dtype=dtype).uniform_().cpu()
    assert values.dtype == dtype and 0 <= values.min() and values.max() < 1 and abs(values.double().mean() - 0.5) < 0.02
    assert abs(torch.randn(COUNT, device=npu, dtype=dtype).cpu().double().std() - 1) < 0.03


def test_seed_and_state(npu):
    def drawn():
        return torch.cat(
            [torch.rand(5, device=npu), torch.randn(5, device=npu), torch.randperm(5, device=npu).float()]
        ).cpu()

    torch.npu.manual_seed(3)
    state, first, second = torch.npu.get_rng_state(), drawn(), drawn()
    assert not torch.equal(first, second)
    torch.npu.set_rng_state(state)
    assert torch.equal(drawn(), first)
    torch.npu.manual_seed(3)
    assert torch.equal(drawn(), first)
    own = torch.Generator(device=npu).manual_seed(3)
    assert torch.equal(torch.empty(5, device=npu).uniform_(generator=own).cpu(), first[:5])
    torch.npu.manual_seed(4)
    assert not torch.equal(drawn(), first)


def test_whole_numbers(npu):
    torch.npu.manual_seed(1)
    values = torch.randint(2, 7, (COUNT,), device=npu).cpu()
    counts = torch.bincount(values, minlength=7)
    assert (
        values.dtype == torch.int64
        and counts[:2].sum() == 0
        and (counts[2:] - COUNT / 5).abs().max() < 4.5 * math.sqrt(COUNT * 0.16)
    )
    assert torch.equal(torch.randperm(50, device=npu).sort().values.cpu(), torch.arange(50))
    assert torch.empty(COUNT, dtype=torch.int32, device=npu).random_().cpu().min() >= 0
    assert torch.empty(COUNT, dtype=torch.float16, device=npu).random_(0, 65504).max() < 65504


def test_chances(npu):
    torch.npu.manual_seed(1)
    wide = 4.5 * math.sqrt(COUNT) / 2
    assert abs(torch.empty(COUNT, device=npu).bernoulli_(0.3).sum().cpu() - 0.3 * COUNT) < wide
    chances = torch.tensor([0.0, 0.25, 1.0], device=npu)
    hits = torch.bernoulli(chances.expand(COUNT, 3)).cpu().sum(0)
    assert hits[0] == 0 and hits[2] == COUNT and abs(hits[1] - 0.25 * COUNT) < wide
    counts = torch.bincount(
        torch.multinomial(torch.tensor([1.0, 0.0, 3.0], device=npu), COUNT, True).cpu(), minlength=3
    )
    assert counts[1] == 0 and abs(counts[0] - 0.25 * COUNT) < wide
    assert torch.equal(
        torch.multinomial(torch.ones(4, 6, device=npu), 6).sort(1).values.cpu(), torch.arange(6).expand(4, 6)
    )


def test_sequences(npu):
    agrees(npu, lambda x: torch.linspace(-1, 2, 7, device=x.device), torch.zeros(1))
    agrees(npu, lambda x: torch.logspace(0, 3, 5, base=2, device=x.device), torch.zeros(1))
    agrees(npu, lambda x: torch.linspace(0, 9, 4, dtype=torch.int32, device=x.device), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(100, 200), (7, 3), (0, 3)])
def test_dropout(npu, shape, dtype):
    torch.npu.manual_seed(1)
    values = torch.ones(shape, dtype=dtype, device=npu, requires_grad=True)
    result = F.dropout(values, 0.25)
    result.sum().backward()
    torch.testing.assert_close(values.grad, result.detach())
    kept = result.detach().cpu()
    assert kept.shape == shape and kept.dtype == dtype
    scale = torch.tensor(1 / 0.75).to(dtype)
    assert bool(((kept == 0) | (kept == scale)).all())
    if kept.numel() > 1000:
        assert abs((kept != 0).double().mean() - 0.75) < 4.5 * math.sqrt(0.1875 / kept.numel())


def test_mask_of_dropout(npu):
    torch.npu.manual_seed(1)
    values = torch.ones(1000, device=npu)
    result, mask = torch.native_dropout(values, 0.5, True)
    assert mask.dtype == torch.uint8 and mask.shape == (128,)
    bits = (mask.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert torch.equal(bits.flatten()[:1000] * 2.0, result.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(100, 70), (2, 3), ()])
def test_dropout_of_the_older_path(npu, shape, dtype):
    import torch_npu

    torch.npu.manual_seed(1)
    values = torch.full(shape, 3, dtype=dtype, device=npu)
    result, mask = torch_npu._npu_dropout(values, 0.25)
    bits = ((mask.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: values.numel()].reshape(shape)
    assert mask.dtype == torch.uint8 and mask.numel() * 8 == (values.numel() + 127) // 128 * 128
    assert result.dtype == dtype and torch.equal(result.cpu(), (bits * (3 / 0.75)).to(dtype))
    again, same = torch_npu.npu_dropout_do_mask(values, mask, 0.25)
    assert torch.equal(again, result) and torch.equal(same, mask)
    if values.numel() > 1000:
        assert abs(bits.double().mean() - 0.75) < 4.5 * math.sqrt(0.1875 / bits.numel())
        other = torch_npu._npu_dropout(values, 0.25)[1]
        torch.npu.manual_seed(1)
        assert not torch.equal(mask, other) and torch.equal(torch_npu._npu_dropout(values, 0.25)[1], mask)
    assert not torch_npu._npu_dropout(values, 1.0)[0].any() and torch.equal(
        torch_npu._npu_dropout(values, 0.0)[0], values
    )
