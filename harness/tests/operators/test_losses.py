"""Losses and masked softmaxes on the emulated device, forward and backward, against the CPU."""

import pytest
import torch
from torch.nn import functional as F

from harness.emulator.operators import OPERATORS
from harness.tests.operators.conftest import agrees, seeded

aten = torch.ops.aten

N, C = 6, 5
PROBABILITIES = torch.sigmoid(seeded(N, C, seed=1))
SIGNS = torch.sign(seeded(N, C, seed=2))
CLASSES = torch.tensor([4, 0, 2, -100, 2, 1])
WEIGHT = torch.linspace(0.5, 1.5, C)

ELEMENTWISE = {
    "binary_cross_entropy": lambda x, how: F.binary_cross_entropy(torch.sigmoid(x), PROBABILITIES.to(x), reduction=how),
    "binary_cross_entropy, weighted": lambda x, how: F.binary_cross_entropy(
        torch.sigmoid(x), PROBABILITIES.to(x), WEIGHT.to(x), reduction=how
    ),
    "with_logits": lambda x, how: F.binary_cross_entropy_with_logits(x, PROBABILITIES.to(x), reduction=how),
    "with_logits, weighted": lambda x, how: F.binary_cross_entropy_with_logits(
        x, PROBABILITIES.to(x), PROBABILITIES.to(x), pos_weight=WEIGHT.to(x), reduction=how
    ),
    "kl_div": lambda x, how: F.kl_div(F.log_softmax(x, -1), PROBABILITIES.to(x), reduction=how),
    "kl_div, log target": lambda x, how: F.kl_div(
        F.log_softmax(x, -1), -PROBABILITIES.to(x), reduction=how, log_target=True
    ),
    "l1": lambda x, how: F.l1_loss(x, PROBABILITIES.to(x), reduction=how),
    "mse": lambda x, how: F.mse_loss(x, PROBABILITIES.to(x), reduction=how),
    "smooth_l1": lambda x, how: F.smooth_l1_loss(x, PROBABILITIES.to(x), reduction=how, beta=0.4),
    "soft_margin": lambda x, how: F.soft_margin_loss(x, SIGNS.to(x), reduction=how),
    "huber": lambda x, how: F.huber_loss(x, PROBABILITIES.to(x), reduction=how, delta=0.7),
}
BY_CLASS = {
    "cross_entropy": dict(),
    "weighted": dict(weight=WEIGHT),
    "smoothed": dict(label_smoothing=0.2),
    "weighted and smoothed": dict(weight=WEIGHT, label_smoothing=0.2),
    "another class ignored": dict(ignore_index=2),
}


@pytest.mark.parametrize("how", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_loss_and_its_gradient_are_the_cpus(npu, name, how):
    agrees(npu, lambda x: ELEMENTWISE[name](x, how), seeded(C, N).t().requires_grad_())


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_loss_of_halves(npu, name):
    agrees(npu, lambda x: ELEMENTWISE[name](x, "mean"), seeded(N, C, dtype=torch.float16).requires_grad_())


@pytest.mark.parametrize("how", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", BY_CLASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_cross_entropy_and_its_gradient_are_the_cpus(npu, name, how, dtype):
    given = BY_CLASS[name]
    classes = torch.where(CLASSES < 0, 2, CLASSES) if "ignore_index" in given else CLASSES

    def loss(x, classes):
        return F.cross_entropy(
            x,
            classes,
            reduction=how,
            **{key: argument.to(x) if key == "weight" else argument for key, argument in given.items()},
        )

    agrees(npu, loss, seeded(N, C, dtype=dtype).requires_grad_(), classes)


@pytest.mark.parametrize("how", ["none", "mean", "sum"])
def test_cross_entropy_of_pictures(npu, how):
    classes = torch.randint(0, C, (2, 3, 4), generator=torch.Generator().manual_seed(4))
    agrees(
        npu,
        lambda x, y: F.cross_entropy(x, y, WEIGHT.to(x), reduction=how),
        seeded(2, C, 3, 4).requires_grad_(),
        classes,
    )
    agrees(
        npu, lambda x, y: F.nll_loss(x, y, reduction=how, ignore_index=1), seeded(2, C, 3, 4).requires_grad_(), classes
    )


def test_cross_entropy_of_one_sample_and_of_none(npu):
    agrees(npu, lambda x, y: F.cross_entropy(x, y), seeded(C).requires_grad_(), torch.tensor(3))
    agrees(
        npu,
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        torch.empty(0, C, requires_grad=True),
        torch.empty(0, dtype=torch.long),
    )
    assert F.cross_entropy(seeded(2, C).to(npu), torch.tensor([-100, -100]).to(npu)).isnan()


def test_losses_of_operands_that_broadcast(npu):
    pair = (seeded(4, 1).requires_grad_(), seeded(1, 3, seed=1))
    for loss in (F.l1_loss, F.mse_loss, F.smooth_l1_loss):
        for how in ("none", "mean"):
            agrees(npu, lambda x, y: loss(x, y, reduction=how), *pair)


def test_a_target_may_need_a_gradient(npu):
    x, target = seeded(3, 4), (seeded(3, 4, seed=1).abs() + 0.1).requires_grad_()
    for loss in (F.l1_loss, F.mse_loss, F.smooth_l1_loss):
        agrees(npu, loss, x.clone().requires_grad_(), target)
    for log_target in (True, False):
        agrees(
            npu,
            lambda x, y: F.kl_div(x, y, reduction="batchmean", log_target=log_target),
            x.clone().requires_grad_(),
            target,
        )


def test_smooth_l1_without_a_smooth_part_is_l1(npu):
    agrees(npu, lambda x, y: F.smooth_l1_loss(x, y, beta=0.0), seeded(3, 4).requires_grad_(), seeded(3, 4, seed=1))


def test_probabilities_of_zero_and_one_have_a_finite_loss(npu):
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).requires_grad_()
    agrees(npu, lambda x, y: F.binary_cross_entropy(x, y, reduction="none"), x, torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("how", ["none", "mean", "sum"])
def test_multilabel_margin(npu, how):
    labels = torch.tensor([[3, 0, -1, 1], [1, -1, 0, 2], [-1, 0, 1, 2]])
    agrees(npu, lambda x, y: F.multilabel_margin_loss(x, y, reduction=how), seeded(3, 4), labels)


@pytest.mark.parametrize("how", ["none", "mean"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded targets", "joined targets"])
def test_ctc(npu, padded, how):
    lengths, labels = (12, 9, 10), (4, 3, 5)
    targets = torch.randint(1, C, (3, 5) if padded else (12,), generator=torch.Generator().manual_seed(5))

    def loss(x, targets):
        return F.ctc_loss(F.log_softmax(x, -1), targets, lengths, labels, reduction=how)

    agrees(npu, loss, seeded(12, 3, C).requires_grad_(), targets, rtol=1e-4)


def test_ctc_that_cannot_be_aligned_is_infinite_or_left_out(npu):
    targets = torch.full((1, 4), 2)
    for left_out in (True, False):
        x = F.log_softmax(seeded(4, 1, C), -1)
        agrees(npu, lambda x, y: F.ctc_loss(x, y, (4,), (4,), reduction="sum", zero_infinity=left_out), x, targets)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("given", BY_CLASS.values(), ids=BY_CLASS)
def test_the_vendors_cross_entropy(npu, given, reduction):
    import torch_npu

    classes = torch.where(CLASSES < 0, 2, CLASSES) if "ignore_index" in given else CLASSES
    x = seeded(N, C).requires_grad_()
    expected = F.cross_entropy(x, classes, reduction=reduction, **given)
    expected.sum().backward()
    on_card = x.detach().to(npu).requires_grad_()
    weighted = {key: argument.to(npu) if key == "weight" else argument for key, argument in given.items()}
    loss, log_prob, *_ = torch_npu.npu_cross_entropy_loss(on_card, classes.to(npu), reduction=reduction, **weighted)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach().cpu().reshape(expected.shape), expected.detach())
    torch.testing.assert_close(log_prob.detach().cpu(), F.log_softmax(x.detach(), -1))
    torch.testing.assert_close(on_card.grad.cpu(), x.grad)


@pytest.mark.parametrize("saving", [True, False], ids=["recomputed", "softmax kept"])
def test_a_linear_and_its_cross_entropy_in_one(npu, saving):
    import torch_npu

    rows, hidden, vocabulary = 11, 16, 128
    x, weight = (
        seeded(rows, hidden, dtype=torch.bfloat16).requires_grad_(),
        seeded(vocabulary, hidden, seed=1, dtype=torch.bfloat16).requires_grad_(),
    )
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(6))
    expected = F.cross_entropy(x.float() @ weight.float().t(), target, reduction="none")
    expected.sum().backward()

    card = [tensor.detach().to(npu) for tensor in (x, weight)]
    top, total, predicted, mask, masked, logits = torch_npu.npu_fused_linear_online_max_sum(
        *card, target.to(npu), 0, vocabulary, not saving
    )
    assert mask.cpu().tolist() == [0, 0b11111000]  # rows that there are not count as elsewhere
    loss, softmax = torch_npu.npu_fused_cross_entropy_loss_with_max_sum(
        top, total, predicted, vocab_parallel_logits=None if saving else logits
    )
    torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=1e-4, atol=1e-4)
    kept = dict(logits_max=top, sum_exp_logits=total) if saving else dict(softmax=softmax)
    grads = torch_npu.npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
        torch.ones(rows).to(npu), *card, mask, masked, **kept
    )
    for result, leaf in zip(grads, (x, weight)):
        torch.testing.assert_close(result.cpu(), leaf.grad, rtol=2e-2, atol=2e-2)


def test_a_target_on_another_card_predicts_nothing_here(npu):
    import torch_npu

    x, weight = seeded(3, 16, dtype=torch.float16).to(npu), seeded(128, 16, dtype=torch.float16).to(npu)
    _, _, predicted, mask, masked, _ = torch_npu.npu_fused_linear_online_max_sum(
        x, weight, torch.tensor([127, 130, 256]).to(npu), 128, 256
    )
    assert masked.cpu().tolist() == [0, 2, 0] and mask.cpu().tolist() == [0b11111101]
    assert [number != 0 for number in predicted.cpu().tolist()] == [False, True, False]


def test_a_masked_softmax(npu):
    mask = seeded(2, 3, 4, 8, seed=3) > 0.5
    mask[0, 0, 0] = False
    agrees(npu, lambda x, mask: aten._masked_softmax(x, mask, -1, 2), seeded(2, 3, 4, 8), mask)


@pytest.mark.parametrize("triangle", [True, False])
def test_a_scaled_masked_softmax_that_only_newer_cards_are_asked_for(triangle):
    x, mask = seeded(2, 3, 4, 4).requires_grad_(), seeded(2, 1, 4, 4, seed=3) > 0.5
    hidden = torch.ones(4, 4).triu(1).bool() if triangle else mask
    expected = F.softmax((0.5 * x).masked_fill(hidden, -10000.0), -1)
    expected.backward(seeded(2, 3, 4, 4, seed=1))
    result = OPERATORS["aclnnScaledMaskedSoftmax"].compute(x.detach(), mask, 0.5, triangle, out=x)
    torch.testing.assert_close(result, expected.detach())
    grad = OPERATORS["aclnnScaledMaskedSoftmaxBackward"].compute(
        seeded(2, 3, 4, 4, seed=1), result, mask, 0.5, triangle, out=x
    )
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dims", [4, 5])
def test_a_softmax_with_a_window_mask_and_a_positional_bias(npu, dims, masked):
    import torch_npu

    x, mask, bias = seeded(2, 3, 4, 5, 5), seeded(3, 5, 5, seed=1), seeded(4, 5, 5, seed=2)
    expected = F.softmax(0.5 * x + (mask[:, None] if masked else 0) + bias, -1)
    x, expected = (x, expected) if dims == 5 else (x.flatten(0, 1), expected.flatten(0, 1))
    actual = torch_npu.npu_masked_softmax_with_rel_pos_bias(
        x.to(npu), mask.to(npu) if masked else None, bias.to(npu), 0.5, 0
    )
    torch.testing.assert_close(actual.cpu(), expected)
