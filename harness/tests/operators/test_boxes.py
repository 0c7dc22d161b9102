"""Boxes of detection on the emulated device: overlaps, suppression, encodings, regions; CTC loss, distances, a search
for a scale.
"""

import math

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded


@pytest.fixture(params=["npu", "compiling"])
def either(request):
    """The newer path and the older one."""
    return request.getfixturevalue(request.param)


def placed(count, seed=0):
    """Boxes of edges (N, 4), with some area."""
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat(
        [corner, corner + torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1)) * 15 + 1], 1
    )


def shared(one, other):
    """The area that two boxes (…, 4) share, and those of each."""
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(0)
    return sides.prod(-1), (one[..., 2:] - one[..., :2]).prod(-1), (other[..., 2:] - other[..., :2]).prod(-1)


@pytest.mark.parametrize("mode", [0, 1])
def test_overlaps(either, mode):
    import torch_npu

    boxes, others = placed(5).half(), placed(3, seed=7).half()
    inner, first, second = shared(boxes.float()[None], others.float()[:, None])
    expected = inner / (second if mode else first + second - inner)
    result = torch_npu.npu_iou(boxes.to(either), others.to(either), mode)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.cpu().float(), expected, rtol=0, atol=2e-2)  # the card adds 0.01 to each side
    torch.testing.assert_close(
        torch_npu.npu_ptiou(boxes.to(either), others.to(either), mode).cpu(), result.cpu(), rtol=0, atol=2e-2
    )


def _generalized(one, other):
    first, second = (torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) for x, y, w, h in (one, other))
    inner, a, b = shared(first, second)
    sides = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    union = a + b - inner
    apart = ((first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]) / 2).square().sum(
        -1
    ) / sides.square().sum(-1)
    return inner / union, union, sides, apart


def _giou(one, other):
    overlap, union, sides, _ = _generalized(one, other)
    return (overlap - (sides.prod(-1) - union) / sides.prod(-1))[:, None]


def _diou(one, other):
    overlap, _, _, apart = _generalized(one, other)
    return (overlap - apart)[None]


def _ciou(one, other):
    overlap, _, _, apart = _generalized(one, other)
    turned = 4 / math.pi**2 * (torch.atan(other[2] / other[3]) - torch.atan(one[2] / one[3])).square()
    return (overlap - apart - turned * (turned / (1 - overlap + turned)).detach())[None]


@pytest.mark.parametrize(
    ("name", "expected", "more"), [("npu_giou", _giou, ()), ("npu_diou", _diou, ()), ("npu_ciou", _ciou, (True,))]
)
def test_generalized_overlaps_and_their_gradients(either, name, expected, more):
    import torch_npu

    inputs = [placed(6, seed=seed).t().contiguous() for seed in (0, 20)]
    grad = torch.linspace(1, 2, 6)

    def run(function, device):
        leaves = [input_.to(device).requires_grad_() for input_ in inputs]
        result = function(*leaves)
        return [
            result.detach().cpu(),
            *(tensor.cpu() for tensor in torch.autograd.grad(result, leaves, grad.to(device).reshape(result.shape))),
        ]

    actual = run(lambda one, other: getattr(torch_npu, name)(one, other, True, False, 0, *more), either)
    for result, wanted in zip(actual, run(expected, "cpu"), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_turned_boxes_overlap(npu):
    import torch_npu

    one = torch.tensor([[[0.0, 0, 2, 2, 0], [0, 0, 2, 2, 45], [5, 5, 2, 4, 90]]])
    other = torch.tensor([[[0.0, 0, 2, 2, 0], [5, 5, 4, 2, 0]]])
    areas = torch.tensor([[[4.0, 0], [8 * (math.sqrt(2) - 1), 0], [0, 8]]])
    torch.testing.assert_close(torch_npu.npu_rotated_overlaps(one.to(npu), other.to(npu), False).cpu(), areas)
    overlap = torch_npu.npu_rotated_iou(one.to(npu), other.to(npu), False, 0, True, 0.0, 0.0).cpu()
    torch.testing.assert_close(
        overlap, areas / (torch.tensor([4.0, 4, 8])[None, :, None] + torch.tensor([4.0, 8]) - areas)
    )
    tilted = (
        torch.tensor([[[0.0, 0, 8, 1, 30]]]),
        torch.tensor([[[3.0, math.sqrt(3), 1, 1, 30]]]),
    )  # along the axis at 30 degrees
    torch.testing.assert_close(
        torch_npu.npu_rotated_overlaps(*(tensor.to(npu) for tensor in tilted), False).cpu(), torch.tensor([[[1.0]]])
    )


def test_turned_boxes_suppress_each_other(npu):
    import torch_npu

    boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 2, 4, 90], [9, 9, 2, 2, 10], [0, 0, 4, 2, 90]])
    scores = torch.tensor([0.3, 0.9, 0.5, 0.8])
    kept, count = torch_npu.npu_nms_rotated(boxes.to(npu), scores.to(npu), 0.5, 0, -1, 0)
    assert kept.cpu().tolist() == [1, 3, 2] and count.cpu().tolist() == [3]


def test_turned_boxes_are_encoded_and_decoded(npu):
    import torch_npu

    anchors = torch.cat([placed(4), seeded(4, 1) * 20], 1).t()[None].contiguous()
    boxes = torch.cat([placed(4, seed=9), seeded(4, 1, seed=3) * 20], 1).t()[None].contiguous()
    weight = torch.tensor([1.0, 2, 1, 0.5, 1]).to(npu)
    deltas = torch_npu.npu_rotated_box_encode(anchors.to(npu), boxes.to(npu), weight)
    width = anchors[:, 2] - anchors[:, 0]
    torch.testing.assert_close(
        deltas[:, 0].cpu(), (boxes[:, 0] + boxes[:, 2] - anchors[:, 0] - anchors[:, 2]) / 2 / width
    )
    torch.testing.assert_close(
        torch_npu.npu_rotated_box_decode(anchors.to(npu), deltas, weight).cpu(), boxes, rtol=1e-4, atol=1e-3
    )


def test_boxes_are_encoded_and_decoded(npu):
    import torch_npu

    anchors, boxes = torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 6]]), torch.tensor([[5.0, 6, 7, 8], [7, 8, 9, 6]])
    result = torch_npu.npu_bounding_box_encode(anchors.to(npu), boxes.to(npu), 0, 0, 0, 0, 0.1, 0.1, 0.2, 0.2).cpu()
    expected = torch.tensor([[13.3281, 13.3281, 0, 0], [13.3281, 6.6641, 0, math.nan]])  # the steps of float16
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4, equal_nan=True)
    decoded = torch_npu.npu_bounding_box_decode(
        anchors.to(npu), boxes.to(npu), 0, 0, 0, 0, 1, 1, 1, 1, (10, 10), 0.1
    ).cpu()
    torch.testing.assert_close(decoded, torch.tensor([[2.5, 6.5, 9, 9], [9, 9, 9, 9]]))
    decoded = torch_npu.npu_bounding_box_decode(
        anchors.to(npu), torch.zeros(2, 4).to(npu), 0, 0, 0, 0, 1, 1, 1, 1, (5, 4), 0.1
    ).cpu()
    torch.testing.assert_close(decoded, torch.tensor([[1.0, 2, 3, 4], [3, 4, 3, 4]]))  # width 4, height 5


def test_boxes_are_encoded_for_a_grid(npu):
    import torch_npu

    anchors, boxes = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.0, 1, 5, 3]])
    result = torch_npu.npu_yolo_boxes_encode(
        anchors.to(npu), boxes.to(npu), torch.tensor([8], dtype=torch.int32).to(npu), False
    ).cpu()
    torch.testing.assert_close(result, torch.tensor([[0.625, 0.5, 0, math.log(0.5)]]), rtol=1e-5, atol=1e-6)
    flags = torch_npu.npu_anchor_response_flags(
        torch.tensor([[0.0, 0, 4, 6], [9, 9, 11, 11]]).to(npu), [3, 4], [4, 4], 2
    ).cpu()
    assert (
        flags.reshape(3, 4, 2).nonzero()[:, :2].unique(dim=0).tolist() == [[0, 0], [2, 2]]
        and flags.dtype == torch.uint8
    )


def test_anchors_are_assigned(npu):
    import torch_npu

    overlaps = torch.tensor([[0.9, 0.1, 0.2, 0.9], [0.3, 0.4, 0.1, 0.0]])
    best, at = overlaps.max(0)
    gt_best, gt_at = overlaps.max(1)
    flags = torch.tensor([1, 1, 1, 0], dtype=torch.uint8)
    inputs = [torch.zeros(4), overlaps, flags, best, at.int(), gt_best, gt_at.int()]
    result = torch_npu.npu_grid_assign_positive(*(input_.to(npu) for input_ in inputs), 2, 0.5, 0.2, True)
    assert result.cpu().tolist() == [1, 2, 0, 0]


def test_suppression(npu):
    import torch_npu

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 20, 30, 30], [0, 0, 9, 10]])
    scores = torch.tensor([0.6, 0.9, 0.1, 0.5])
    kept, count = torch_npu.npu_nms_v4(
        boxes.to(npu), scores.to(npu), 3, torch.tensor(0.5).to(npu), torch.tensor(0.05).to(npu)
    )
    assert kept.cpu().tolist() == [1, 2, 0] and count.item() == 2
    rows = torch.cat([boxes, scores[:, None]], 1)[[1, 0, 3, 2]]
    same, numbers, mask = torch_npu.npu_nms_with_mask(rows.to(npu), 0.5)
    assert (
        torch.equal(same.cpu(), rows) and numbers.cpu().tolist() == [0, 1, 2, 3] and mask.cpu().tolist() == [1, 0, 0, 1]
    )
    classes = torch.stack([scores, scores.flip(0)], 1)
    result = [
        npu_batch_nm.cpu()
        for npu_batch_nm in torch_npu.npu_batch_nms(boxes[None, :, None].to(npu), classes[None].to(npu), 0.3, 0.5, 3, 5)
    ]
    assert (
        result[1].tolist() == [pytest.approx([0.9, 0.9, 0.6, 0, 0])]
        and result[2].tolist() == [[0, 1, 1, 0, 0]]
        and result[3].tolist() == [3]
    )
    assert torch.equal(result[0][0, :3], boxes[[1, 2, 3]])


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_regions_of_a_ramp_are_its_middle_values(either, mode):
    """Between pixels a ramp is exact, so each cell is the ramp at its middle."""
    import torch_npu

    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    features = (10 * y + x)[None, None].repeat(2, 3, 1, 1) * torch.tensor([1.0, 2]).reshape(2, 1, 1, 1)
    rois = torch.tensor([[1, 4.0, 6, 20, 14], [0, 8, 4, 24, 16]])
    more, shift = float(mode == 1), 0.5 * (mode in (2, 3))
    rows, columns = (
        [
            [(roi[a] + (roi[b] + more - roi[a]) * (cell + 0.5) / size) * 0.5 - shift for cell in range(size)]
            for roi in rois.tolist()
        ]
        for a, b, size in ((2, 4, 2), (1, 3, 4))
    )
    expected = torch.stack(
        [
            (10 * torch.tensor(r)[:, None] + torch.tensor(c)).expand(3, 2, 4) * scale
            for r, c, scale in zip(rows, columns, (2, 1))
        ]
    )
    leaf = features.to(either).requires_grad_()
    result = torch_npu.npu_roi_align(leaf, rois.to(either), 0.5, 2, 4, 2, mode)
    torch.testing.assert_close(result.detach().cpu(), expected, rtol=1e-5, atol=1e-4)
    back = torch_npu.npu_roi_alignbk(
        torch.ones_like(result), rois.to(either), list(features.shape), 4, 2, 0.5, 2, mode
    ).cpu()
    torch.testing.assert_close(
        (back * features).sum(), expected.sum(), rtol=1e-4, atol=1e-2
    )  # it is linear in the features


def test_pooling_by_position(npu):
    import torch_npu

    x = seeded(2, 8, 6, 6).half()
    rois = torch.tensor([[0.0, 0, 0, 7, 7], [1, 4, 0, 11, 7]]).reshape(2, 5, 1).half()
    leaf = x.to(npu).requires_grad_()
    result = torch_npu.npu_ps_roi_pooling(leaf, rois.to(npu), 0.5, 2, 2)
    expected = torch.zeros(2, 2, 2, 2)
    for number, left in ((0, 0), (1, 2)):
        for channel, row, column in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            plane = x.float()[number, channel * 4 + row * 2 + column]
            expected[number, channel, row, column] = plane[
                row * 2 : row * 2 + 2, left + column * 2 : left + column * 2 + 2
            ].mean()
    torch.testing.assert_close(result.detach().cpu().float(), expected, rtol=2e-3, atol=2e-3)
    result.sum().backward()
    gradient = leaf.grad.cpu()
    assert gradient.sum() == 16 and gradient[0, 0, :2, :2].eq(0.25).all() and gradient[0, 3, 2:4, 2:4].eq(0.25).all()
    assert not gradient[1, 0, :, :2].any()


@pytest.mark.parametrize("blank", [0, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ctc_loss(either, reduction, blank):
    targets = torch.tensor([[1, 2, 2], [4, 1, 5]])
    lengths = torch.tensor([7, 6]), torch.tensor([3, 2])

    def loss(x):
        on = [length.to(x.device) for length in (targets, *lengths)]
        return torch.nn.functional.ctc_loss(x.log_softmax(2), *on, blank, reduction, True)

    agrees(either, loss, seeded(7, 2, 6).requires_grad_(), rtol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, math.inf])
def test_distances(either, p):
    agrees(
        either,
        lambda one, other: torch.cdist(one, other, p),
        seeded(2, 5, 4).requires_grad_(),
        seeded(2, 3, 4, seed=1),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("with_offset", [True, False])
def test_a_scale_for_int8_is_searched(npu, with_offset):
    import torch_npu

    data = seeded(6, 7)
    histogram = torch.histc(data, 128, data.min().item(), data.max().item()).cumsum(0).int()
    arguments = [tensor.to(npu) for tensor in (data, data.min().reshape(1), data.max().reshape(1), histogram)]
    scale, offset = (
        tensor.cpu() for tensor in torch_npu.npu_ifmr(*arguments, 0.999999, 0.999999, 0.7, 1.3, 0.01, with_offset)
    )

    def lost(scale, offset):
        return (((data / scale).round() + offset).clamp(-128, 127).sub(offset) * scale - data).square().sum().item()

    plain = (data.max() - data.min()) / 255 if with_offset else data.abs().max() / 127
    assert (
        lost(scale, offset)
        <= lost(plain, -((data.min() / plain).round() + 128) if with_offset else torch.zeros(())) * 1.05
    )
    assert with_offset or not offset.any()


@pytest.mark.parametrize("aligned", [False, True])
def test_the_module_of_torch_npu_aligns_as_its_own_test_holds(npu, aligned):
    from torch_npu.contrib.module import ROIAlign

    features = torch.arange(1.0, 37.0).reshape(1, 1, 6, 6).to(npu).requires_grad_()
    result = ROIAlign((3, 3), 0.25, 2, aligned=aligned).to(npu)(
        features, torch.tensor([[0, -2.0, -2.0, 22.0, 22.0]]).to(npu)
    )
    result.sum().backward()
    rows, columns = ([1.5, 12.0, 24.0], [1.25, 3.0, 5.0]) if aligned else ([2.5, 14.5, 26.5], [2.0, 4.0, 6.0])
    assert result.cpu()[0, 0].tolist() == [[row + column for column in columns] for row in rows]
    shares = torch.tensor([1.5, 1.0, 1.0, 1.0, 1.0, 0.5] if aligned else [1.0] * 6) / 2
    assert torch.equal(features.grad.cpu()[0, 0], shares[:, None] * shares)
