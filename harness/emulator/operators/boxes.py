"""Boxes of detection: overlaps, suppression, encodings, regions; and what else only the older path has: CTC loss,
distances, a search.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from harness.emulator.operators.common import ints, upcast
from harness.emulator.table import aclop, operator

# -------- overlaps


def _edges(boxes, trans: bool):
    """Left, top, right, bottom of boxes (4, N), which may come as centre and size."""
    if trans:
        x, y, width, height = boxes
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return tuple(boxes)


def _pairs(one, other, trans, is_cross):
    """The edges of both, each box of the first against each of the second along a new first axis, where that is
    wanted.
    """
    first, second = _edges(one, trans), _edges(other, trans)
    return (first, [edge.unsqueeze(-1) for edge in second]) if is_cross else (first, second)


def _shared(first, second):
    """What two boxes share, their outer width and height."""
    low, high = torch.maximum, torch.minimum
    inner = (high(first[2], second[2]) - low(first[0], second[0])).clamp(0) * (
        high(first[3], second[3]) - low(first[1], second[1])
    ).clamp(0)
    outer = low(first[2], second[2]) - high(first[0], second[0]), low(first[3], second[3]) - high(first[1], second[1])
    return inner, *outer


def _giou(one, other, trans=False, is_cross=True, mode="iou"):
    first, second = _pairs(one, other, trans, is_cross)
    inner, width, height = _shared(first, second)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = areas[0] + areas[1] - inner + 1e-16
    return inner / (areas[1] if mode == "iof" else union) - (width * height - union) / (width * height)


def _distance_iou(one, other, trans, is_cross, mode, small=1e-9):
    """The overlap, less the distance of the centres against the outer diagonal; and width and height of both."""
    first, second = _pairs(one, other, trans, is_cross)
    inner, width, height = _shared(first, second)
    apart = (
        (second[0] + second[2] - first[0] - first[2]) ** 2 + (second[1] + second[3] - first[1] - first[3]) ** 2
    ) / 4
    sizes = [(box[2] - box[0], box[3] - box[1] + small) for box in (first, second)]
    areas = [w * h for w, h in sizes]
    overlap = inner / (areas[1] + small if mode == "iof" else areas[0] + areas[1] - inner + small)
    return overlap, apart / (width**2 + height**2 + small), sizes


def _diou(one, other, trans=False, is_cross=True, mode="iou"):
    overlap, apart, _ = _distance_iou(one, other, trans, is_cross, mode)
    return overlap - apart


def _ciou(one, other, trans=False, is_cross=True, mode="iou"):
    overlap, apart, ((w1, h1), (w2, h2)) = _distance_iou(one, other, trans, is_cross, mode)
    turned = 4 / math.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)) ** 2
    share = (turned / (1 + 1e-9 - overlap + turned)).detach()  # a weight: no gradient goes through it
    return overlap - apart - turned * share


@aclop("Iou")
def iou(boxes, others, out, mode="iou", eps=1.0):
    """Boxes (N, 4) against others (M, 4), as (M, N); a little is added to width and height of both, not to what they
    share.
    """
    first, second = upcast(boxes).t(), [edge.unsqueeze(-1) for edge in upcast(others).t()]
    inner, _, _ = _shared(tuple(first), second)
    areas = [(box[2] - box[0] + eps) * (box[3] - box[1] + eps) for box in (first, second)]
    return (inner / (areas[1] if mode == "iof" else areas[0] + areas[1] - inner)).to(out.dtype)


@operator("aclnnIou", "boxes others mode:str eps:float aligned:bool >out")
def iou_of_version_2(boxes, others, mode, eps, aligned, out):
    """Boxes (N, 4) against others (M, 4), as (N, M), or each with its own; the little is added to what they share
    too.
    """
    first, second = upcast(boxes).t(), upcast(others).t()
    first = list(first) if aligned else [edge.unsqueeze(-1) for edge in first]
    sides = [torch.minimum(first[at + 2], second[at + 2]) - torch.maximum(first[at], second[at]) for at in (0, 1)]
    inner = (sides[0] + eps).clamp(0) * (sides[1] + eps).clamp(0)
    areas = [(box[2] - box[0] + eps) * (box[3] - box[1] + eps) for box in (first, second)]
    return (inner / (areas[1] if mode == "iof" else areas[0] + areas[1] - inner)).reshape(out.shape).to(out.dtype)


@aclop("GIoU")
def giou(boxes, others, out, trans=False, is_cross=True, mode="iou"):
    return _giou(upcast(boxes), upcast(others), trans, is_cross, mode).reshape(out.shape).to(out.dtype)


@aclop("DIoU")
def diou(boxes, others, out, trans=False, is_cross=True, mode="iou"):
    return _diou(upcast(boxes), upcast(others), trans, is_cross, mode).reshape(out.shape).to(out.dtype)


@aclop("CIoU")
def ciou(boxes, others, out, trans=False, is_cross=True, mode="iou", atan_sub_flag=False):
    _, _, ((w1, h1), (w2, h2)) = _distance_iou(upcast(boxes), upcast(others), trans, is_cross, mode)
    result = _ciou(upcast(boxes), upcast(others), trans, is_cross, mode), torch.atan(w2 / h2) - torch.atan(w1 / h1)
    return [tensor.reshape(spec.shape).to(spec.dtype) for tensor, spec in zip(result, out)]


@operator("aclnnCIoU", "boxes others trans:bool is_cross:bool mode:str >overlap >turned")
def ciou_of_the_newer_path(boxes, others, trans, is_cross, mode, out):
    return ciou(boxes, others, out, trans, is_cross, mode)


def _both_gradients(compute, grad, boxes, others, out, **settings):
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [upcast(item).clone().requires_grad_() for item in (boxes, others)]
        result = compute(*inputs, **settings)
        gradients = torch.autograd.grad(result, inputs, upcast(grad).clone().reshape(result.shape))
    return [gradient.to(spec.dtype) for gradient, spec in zip(gradients, out)]


@aclop("GIoUGrad")
def giou_grad(grad, boxes, others, out, **settings):
    return _both_gradients(_giou, grad, boxes, others, out, **settings)


@aclop("DIoUGrad")
def diou_grad(grad, boxes, others, out, **settings):
    return _both_gradients(_diou, grad, boxes, others, out, **settings)


@aclop("CIoUGrad")
def ciou_grad(grad, boxes, others, turned, out, **settings):
    return _both_gradients(_ciou, grad, boxes, others, out, **settings)


# -------- turned boxes


def _corners(x, y, width, height, degrees):
    """The corners of a turned box, in the order in which they follow each other."""
    turn = math.radians(degrees)
    across, along = (
        (math.cos(turn) * width / 2, math.sin(turn) * width / 2),
        (-math.sin(turn) * height / 2, math.cos(turn) * height / 2),
    )
    return [
        (x + a * across[0] + b * along[0], y + a * across[1] + b * along[1])
        for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]


def _area(corners) -> float:
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(corners, corners[1:] + corners[:1])) / 2


def _clipped(corners, others):
    """The part of a convex polygon inside another, whose corners follow each other with the inside at the left."""
    for a, b in zip(others, others[1:] + others[:1]):
        sides = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in corners]
        inside = []
        for p, q, s, t in zip(corners, corners[1:] + corners[:1], sides, sides[1:] + sides[:1]):
            if s >= 0:
                inside.append(p)
            if s * t < 0:
                inside.append((p[0] + (q[0] - p[0]) * s / (s - t), p[1] + (q[1] - p[1]) * s / (s - t)))
        corners = inside
    return corners


def _counted(corners):
    return corners if _area(corners) >= 0 else corners[::-1]


def _turned_overlap(one, other) -> float:
    """The area that two turned boxes (x, y, width, height, degrees) share."""
    middle = (one[0] + other[0]) / 2, (one[1] + other[1]) / 2
    first, second = (_counted(_corners(box[0] - middle[0], box[1] - middle[1], *box[2:])) for box in (one, other))
    shared = _clipped(first, second)
    return abs(_area(shared)) if len(shared) > 2 else 0.0


def _centred(boxes, trans: bool) -> list[list[float]]:
    """Turned boxes (N, 5) as centre, size and degrees, which may come as edges."""
    rows = boxes.double().tolist()
    return [[(a + c) / 2, (b + d) / 2, c - a, d - b, angle] for a, b, c, d, angle in rows] if trans else rows


def _turned_pairs(boxes, others, trans, compute):
    """Of boxes (B, 5, N) and others (B, 5, K): what is computed of each pair, as (B, N, K)."""
    result = [
        [[compute(one, other) for other in _centred(theirs.t(), trans)] for one in _centred(ours.t(), trans)]
        for ours, theirs in zip(boxes, others)
    ]
    return torch.tensor(result, dtype=torch.float64).reshape(boxes.shape[0], boxes.shape[2], others.shape[2])


@aclop("RotatedOverlaps")
def rotated_overlaps(boxes, others, out, trans=False):
    return _turned_pairs(boxes, others, trans, _turned_overlap).to(out.dtype)


def _turned_iou(one, other, mode="iou") -> float:
    shared, areas = _turned_overlap(one, other), (one[2] * one[3], other[2] * other[3])
    below = areas[0] if mode == "iof" else areas[0] + areas[1] - shared
    return shared / below if below else 0.0


@aclop("RotatedIou")
def rotated_iou(boxes, others, out, trans=False, mode="iou", is_cross=True, value=0.0):
    result = _turned_pairs(boxes, others, trans, lambda one, other: _turned_iou(one, other, mode))
    return (result if is_cross else result.diagonal(dim1=1, dim2=2)).reshape(out.shape).to(out.dtype)


@aclop("RotatedNMS", free=(0, 1))
def rotated_nms(boxes, scores, labels, out, iou_threshold, score_threshold=0.0, max_output_size=-1, mode=0):
    """Mode 1 says that boxes come as edges with the angle counted the other way."""
    centred = _centred(boxes, mode == 1)
    centred = [[*box[:4], -box[4]] if mode == 1 else box for box in centred]
    selected: list[int] = []
    for at in scores.argsort(descending=True, stable=True).tolist():
        if scores[at] < score_threshold or 0 <= max_output_size <= len(selected):
            break
        flat = centred[at][2] * centred[at][3] < 1e-8  # it overlaps nothing
        if flat or all(
            centred[other][2] * centred[other][3] < 1e-8 or _turned_iou(centred[at], centred[other]) <= iou_threshold
            for other in selected
        ):
            selected.append(at)
    return boxes[selected].to(out[0].dtype), torch.tensor(selected, dtype=out[1].dtype)


@aclop("RotatedBoxEncode")
def rotated_box_encode(anchors, boxes, out, weight):
    (x, y, w, h, angle), (gx, gy, gw, gh, turn) = _turned(anchors), _turned(boxes)
    result = (
        (gx - x) / w,
        (gy - y) / h,
        torch.log(gw / w),
        torch.log(gh / h),
        torch.tan(torch.deg2rad(turn)) - torch.tan(torch.deg2rad(angle)),
    )
    return torch.stack([item * scale for item, scale in zip(result, weight)], 1).to(out.dtype)


@aclop("RotatedBoxDecode")
def rotated_box_decode(anchors, deltas, out, weight):
    x, y, w, h, angle = _turned(anchors)
    dx, dy, dw, dh, turn = (part / scale for part, scale in zip(upcast(deltas).unbind(1), weight))
    x, y, w, h = x + dx * w, y + dy * h, w * torch.exp(dw), h * torch.exp(dh)
    angle = torch.rad2deg(torch.atan(torch.tan(torch.deg2rad(angle)) + turn))
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2, angle], 1).to(out.dtype)


def _turned(boxes):
    """Centre, size and angle of boxes (B, 5, N) of edges and angle."""
    left, top, right, bottom, angle = upcast(boxes).unbind(1)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top, angle


# -------- suppression


def _overlap(one, others):
    """The intersection over union of one box (4,) with others (N, 4), whose corners may lie in any order."""
    low, high = (
        [pick(item[..., :2], item[..., 2:]) for item in (one, others)] for pick in (torch.minimum, torch.maximum)
    )
    inner = (torch.minimum(*high) - torch.maximum(*low)).clamp(0).prod(-1)
    areas = [(far - near).prod(-1) for near, far in zip(low, high)]
    return inner / (areas[0] + areas[1] - inner).clamp(min=1e-12)


def _suppressed(boxes, scores, most: int, iou_threshold: float, score_threshold: float) -> list[int]:
    """The boxes that stay, best first: none overlaps a better one by more than the threshold."""
    selected: list[int] = []
    for at in scores.argsort(descending=True, stable=True).tolist():
        if len(selected) == most or not scores[at] > score_threshold:
            break
        if not selected or bool((_overlap(boxes[at], boxes[selected]) <= iou_threshold).all()):
            selected.append(at)
    return selected


@aclop("NonMaxSuppressionV4")
def nms_v4(boxes, scores, most, iou_threshold, score_threshold, out, pad_to_max_output_size=False):
    selected = _suppressed(upcast(boxes), upcast(scores), int(most), float(iou_threshold), float(score_threshold))
    indices = F.pad(torch.tensor(selected, dtype=out[0].dtype), (0, out[0].shape[0] - len(selected)))
    return indices, torch.full(out[1].shape, len(selected), dtype=out[1].dtype)


@aclop("NMSWithMask")
def nms_with_mask(boxes, out, iou_threshold):
    """Of boxes with scores (N, 5), best first: themselves, their numbers, and which of them stay."""
    selected: list[int] = []
    for at in range(boxes.shape[0]):
        if not selected or bool((_overlap(upcast(boxes)[at, :4], upcast(boxes)[selected, :4]) <= iou_threshold).all()):
            selected.append(at)
    mask = torch.zeros(boxes.shape[0], dtype=out[2].dtype)
    mask[selected] = 1
    return boxes, torch.arange(boxes.shape[0], dtype=out[1].dtype), mask


@aclop("BatchMultiClassNonMaxSuppression")
def batch_nms(
    boxes,
    scores,
    out,
    score_threshold,
    iou_threshold,
    max_size_per_class,
    max_total_size,
    change_coordinate_frame=False,
    transpose_box=False,
):
    """Of boxes (B, N, classes or 1, 4) and scores (B, N, classes): each class for itself, then the best of all
    classes.
    """
    boxes, scores = upcast(boxes), upcast(scores)
    if transpose_box:
        boxes, scores = boxes.permute(0, 3, 1, 2), scores.permute(0, 2, 1)
    result = [torch.zeros(spec.shape) for spec in out]
    for image in range(boxes.shape[0]):
        best = []
        for label in range(scores.shape[2]):
            candidates = boxes[image, :, label if boxes.shape[2] > 1 else 0]
            selected = _suppressed(
                candidates, scores[image, :, label], max_size_per_class, iou_threshold, score_threshold
            )
            best += [(float(scores[image, at, label]), label, candidates[at]) for at in selected]
        best = sorted(best, key=lambda value: -value[0])[:max_total_size]
        for at, (score, label, box) in enumerate(best):
            result[0][image, at], result[1][image, at], result[2][image, at] = box, score, label
        result[3][image] = len(best)
    return [tensor.to(spec.dtype) for tensor, spec in zip(result, out)]


# -------- encodings, assignments


def _middles(boxes, more=0):
    """Centre, width and height of boxes (N, 4) of edges; a last pixel may count."""
    return [*((boxes[:, :2] + boxes[:, 2:]) * 0.5).t(), *(boxes[:, 2:] - boxes[:, :2] + more).t()]


@aclop("BoundingBoxEncode")
def bounding_box_encode(anchors, boxes, out, means, stds):
    """In float16 step by step, whatever comes; a corner counts as a pixel."""
    (px, py, pw, ph), (gx, gy, gw, gh) = (_middles(tensor.half(), 1) for tensor in (anchors, boxes))
    result = (gx - px) / pw, (gy - py) / ph, torch.log(gw / pw), torch.log(gh / ph)
    return torch.stack([(item - mean) / std for item, mean, std in zip(result, means, stds)], 1).to(out.dtype)


@aclop("BoundingBoxDecode")
def bounding_box_decode(rois, deltas, out, means, stds, max_shape=(), wh_ratio_clip=0.016):
    dx, dy, dw, dh = (item * std + mean for item, mean, std in zip(upcast(deltas).t(), means, stds))
    furthest = abs(math.log(wh_ratio_clip))
    dw, dh = dw.clamp(-furthest, furthest), dh.clamp(-furthest, furthest)
    x, y, w, h = _middles(upcast(rois), 1)
    x, y, w, h = x + w * dx, y + h * dy, w * torch.exp(dw), h * torch.exp(dh)
    result = torch.stack([x - w / 2 + 0.5, y - h / 2 + 0.5, x + w / 2 - 0.5, y + h / 2 - 0.5], 1)
    if max_shape:
        high, wide = max_shape[0] - 1, max_shape[-1] - 1
        result = torch.minimum(result.clamp(min=0), torch.tensor([wide, high, wide, high]))
    return result.to(out.dtype)


@aclop("YoloBoxesEncode")
def yolo_boxes_encode(anchors, boxes, stride, out, performance_mode="high_precision"):
    (x, y, w, h), (gx, gy, gw, gh) = _middles(upcast(anchors)), _middles(upcast(boxes))
    small = 1e-6
    offsets = [((to - at) / stride + 0.5).clamp(small, 1 - small) for to, at in ((gx, x), (gy, y))]
    return torch.stack([*offsets, *(torch.log((to / size).clamp(min=small)) for to, size in ((gw, w), (gh, h)))], 1).to(
        out.dtype
    )


@aclop("AnchorResponseFlags")
def anchor_response_flags(boxes, out, featmap_size, strides, num_base_anchors):
    """Which cells of a grid hold the centre of a box, once for each anchor of a cell."""
    high, wide = featmap_size
    column, row = (
        ((upcast(boxes)[:, at] + upcast(boxes)[:, at + 2]) * 0.5 / strides[at]).floor().long() for at in (0, 1)
    )
    cells = row * wide + column
    flags = torch.zeros(high * wide, dtype=out.dtype)
    flags[cells[(cells >= 0) & (cells < high * wide)]] = 1
    return flags.repeat_interleave(num_base_anchors)


@aclop("GridAssignPositive")
def grid_assign_positive(
    assigned,
    overlaps,
    flags,
    best,
    best_box,
    box_best,
    box_best_at,
    count,
    out,
    pos_iou_thr,
    min_pos_iou=0.0,
    gt_max_assign_all=True,
):
    """Numbers of boxes, from 1, for the responsible anchors that overlap one enough, and for the anchors that overlap a
    box best.
    """
    result, flagged = upcast(assigned).clone(), flags.bool()
    positive = (upcast(best) > pos_iou_thr) & flagged
    result[positive] = best_box[positive].to(result.dtype) + 1
    for box in range(min(int(count), overlaps.shape[0])):
        if box_best[box] > min_pos_iou:
            if gt_max_assign_all:
                result[(overlaps[box] == box_best[box]) & flagged] = box + 1
            elif flagged[box_best_at[box]]:
                result[box_best_at[box]] = box + 1
    return result.to(out.dtype)


# -------- regions


def _sampled(image, y, x):
    """An image (C, H, W) between its pixels at rows y and columns x, (C, rows, columns); nothing outside."""
    high, wide = image.shape[1:]

    def between(coordinate, size):
        outside = (coordinate < -1) | (coordinate > size)
        coordinate = coordinate.clamp(0, size - 1)
        low = coordinate.floor().long().clamp(max=size - 1)
        return low, (low + 1).clamp(max=size - 1), coordinate - low, ~outside

    y0, y1, fy, within_y = between(y, high)
    x0, x1, fx, within_x = between(x, wide)
    rows = image[:, y0] * (1 - fy)[:, None] + image[:, y1] * fy[:, None]
    return (rows[:, :, x0] * (1 - fx) + rows[:, :, x1] * fx) * (within_y[:, None] & within_x)


def _region(features, roi, scale, height, width, samples, mode):
    """The averages of a region in height by width cells. The mode counts a last pixel more (1) or shifts by half a
    pixel (2, 3).

    Mode 3 is what torch_npu's ROIAlign sends with `aligned=True`; its own test holds the numbers of the shift. Unlike
    mode 2 it takes a region whose end lies before its start as one without extent.
    """
    aligned = mode in (2, 3)
    shift, more = (0.5 if aligned else 0.0), (1.0 if mode == 1 else 0.0)
    batch, left, top, right, bottom = roi.tolist()
    left, top, right, bottom = (
        left * scale - shift,
        top * scale - shift,
        (right + more) * scale - shift,
        (bottom + more) * scale - shift,
    )
    least = {2: -math.inf, 3: 0.0}.get(mode, 1.0)  # in pixels
    cell_h, cell_w = max(bottom - top, least) / height, max(right - left, least) / width
    across = [samples or max(math.ceil(cell), 1) for cell in (cell_h, cell_w)]
    y, x = (
        start + (torch.arange(count * item) + 0.5) / item * cell
        for start, count, item, cell in ((top, height, across[0], cell_h), (left, width, across[1], cell_w))
    )
    return _sampled(features[int(batch)], y, x).unflatten(2, (width, -1)).unflatten(1, (height, -1)).mean((2, 4))


@aclop("ROIAlign")
def roi_align(features, rois, out, spatial_scale, pooled_height, pooled_width, sample_num=2, roi_end_mode=1):
    wide = upcast(features)
    cells = [
        _region(wide, roi, spatial_scale, pooled_height, pooled_width, sample_num, roi_end_mode) for roi in upcast(rois)
    ]
    return torch.stack(cells).to(out.dtype) if cells else torch.zeros(out.shape, dtype=out.dtype)


@operator("aclnnROIAlign", "features rois scale:float height:int width:int samples:int mode:int >out")
def roi_align_of_the_newer_path(features, rois, scale, height, width, samples, mode, out):
    return roi_align(features, rois, out, scale, height, width, samples, mode)


@aclop("ROIAlignGrad")
def roi_align_grad(
    grad, rois, out, xdiff_shape, spatial_scale, pooled_height, pooled_width, sample_num=2, roi_end_mode=1
):
    with torch.inference_mode(False), torch.enable_grad():
        features = torch.zeros(xdiff_shape, requires_grad=True)
        cells = [
            _region(features, roi, spatial_scale, pooled_height, pooled_width, sample_num, roi_end_mode)
            for roi in upcast(rois)
        ]
        result = (
            torch.autograd.grad(torch.stack(cells), features, upcast(grad).clone())[0] if cells else features.detach()
        )
    return result.to(out.dtype)


@operator("aclnnROIAlignBackward", "grad rois shape:ints width:int height:int scale:float samples:int mode:int >out")
def roi_align_backward(grad, rois, shape, width, height, scale, samples, mode, out):
    return roi_align_grad(grad, rois, out, shape, scale, height, width, samples, mode)


def _position_bins(rois, scale, group, high, wide):
    """For each region (5, batch by batch) and each of its bins: the image, and the rows and columns that the bin
    covers.
    """
    for number, roi in enumerate(upcast(rois).permute(0, 2, 1).reshape(-1, 5).tolist()):
        left, top = (math.floor(item + 0.5) * scale for item in roi[1:3])
        right, bottom = ((math.floor(item + 0.5) + 1) * scale for item in roi[3:5])
        cell_h, cell_w = max(bottom - top, 0.1) / group, max(right - left, 0.1) / group
        for row in range(group):
            for column in range(group):
                y0, y1 = math.floor(row * cell_h + top), math.ceil((row + 1) * cell_h + top)
                x0, x1 = math.floor(column * cell_w + left), math.ceil((column + 1) * cell_w + left)
                rows, columns = (
                    slice(min(max(a, 0), size), min(max(b, 0), size)) for a, b, size in ((y0, y1, high), (x0, x1, wide))
                )
                if rows.start < rows.stop and columns.start < columns.stop:
                    yield number, int(roi[0]), row, column, rows, columns


@aclop("PSROIPoolingV2")
def position_sensitive_pooling(x, rois, out, spatial_scale, output_dim, group_size):
    result = torch.zeros(out.shape)
    maps = upcast(x).unflatten(1, (output_dim, group_size, group_size))
    for number, image, row, column, rows, columns in _position_bins(rois, spatial_scale, group_size, *x.shape[2:]):
        result[number, :, row, column] = maps[image, :, row, column, rows, columns].mean((-2, -1))
    return result.to(out.dtype)


@aclop("PSROIPoolingGradV2D")
def position_sensitive_pooling_grad(grad, rois, out, spatial_scale, output_dim, group_size, input_size):
    result = torch.zeros(out.shape)
    maps = result.unflatten(1, (output_dim, group_size, group_size))
    for number, image, row, column, rows, columns in _position_bins(rois, spatial_scale, group_size, *out.shape[2:]):
        cells = maps[image, :, row, column, rows, columns]
        cells += upcast(grad)[number, :, row, column].reshape(-1, 1, 1) / cells[0].numel()
    return result.to(out.dtype)


# -------- sequences, ranges, distances


@aclop("CTCLossV2")
def ctc_loss(log_probs, targets, input_lengths, target_lengths, out, blank=0, zero_infinity=False):
    """The blank comes with the longest target counted in, as many times the number of classes."""
    classes = log_probs.shape[-1]
    losses, alpha = torch._ctc_loss(
        log_probs, targets.long(), ints(input_lengths), ints(target_lengths), blank % classes, zero_infinity
    )
    room = torch.zeros(out[1].shape, dtype=out[1].dtype)
    room[..., : alpha.shape[-1]] = alpha
    return losses.reshape(out[0].shape).to(out[0].dtype), room


@aclop("CTCLossV2Grad")
def ctc_loss_grad(
    grad, log_probs, targets, input_lengths, target_lengths, losses, alpha, out, blank=0, zero_infinity=False
):
    inputs, lengths = ints(input_lengths), ints(target_lengths)
    probs = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    alpha = alpha[..., : 2 * max(lengths, default=0) + 1].contiguous()
    settings = (targets.long(), inputs, lengths, losses.reshape(-1), alpha, blank % probs.shape[-1])
    return (
        torch.ops.aten._ctc_loss_backward(grad.reshape(-1), probs, *settings, zero_infinity)
        .reshape(out.shape)
        .to(out.dtype)
    )


@aclop("Cdist")
def cdist(one, other, out, p=2.0):
    """Distances along the last axis of two tensors of one shape; -1 stands for the largest difference."""
    return (
        torch.linalg.vector_norm(upcast(one) - upcast(other), math.inf if p < 0 else p, -1)
        .reshape(out.shape)
        .to(out.dtype)
    )


@aclop("CdistGrad")
def cdist_grad(grad, one, other, distance, out, p=2.0):
    grad, distance, apart = upcast(grad), upcast(distance), upcast(one) - upcast(other)
    size = apart.abs()
    if p == 0:
        result = torch.zeros_like(apart)
    elif p < 0:
        result = grad * apart.sign() * (size >= distance)
    else:
        result = grad * apart.sign() * torch.where(size == 0, torch.zeros(()), size.pow(p - 1)) / distance.pow(p - 1)
    return torch.where(distance == 0, torch.zeros(()), result).sum(-2).reshape(out.shape).to(out.dtype)


@aclop("IFMR")
def search_scale(
    data, least, most, cumulated, out, min_percentile, max_percentile, search_range, search_step, with_offset
):
    """The scale and offset of int8 that lose least of the data, over a range around what the histogram says."""
    data, least, most = upcast(data), float(least), float(most)
    share = cumulated.float() / data.numel()
    high, low = (
        int((share < bound).sum()) / cumulated.numel() * (most - least) + least
        for bound in (max_percentile, 1 - min_percentile)
    )
    steps = torch.arange(search_range[0], search_range[1], search_step)
    if with_offset:
        high, low = max(high, 0.0), min(low, 0.0)
        scales = (high * steps - low) / 255
        scales = torch.where(scales < torch.finfo(torch.float32).eps, torch.ones(()), scales)
        offsets = -(torch.round(low / scales) + 128)
    else:
        scales = max(abs(high), abs(low)) * steps / 127
        offsets = torch.zeros_like(scales)
    losses = [
        (((torch.round(data / scale) + offset).clamp(-128, 127) - offset) * scale - data).square().sum()
        for scale, offset in zip(scales, offsets)
    ]
    best = int(torch.stack(losses).argmin())
    return [found[best].expand(spec.shape).to(spec.dtype) for found, spec in zip((scales, offsets), out)]
