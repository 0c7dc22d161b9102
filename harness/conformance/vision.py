"""timm where torchvision's own library does not fit this torch: timm needs its Python alone."""

from __future__ import annotations

import importlib.util

_library = None  # holds the definitions for as long as the process lives


def import_timm():
    """The timm package. torchvision's operators are declared where its library cannot be loaded, so that it imports.

    Raises: ImportError without timm.
    """
    global _library
    import torch

    if _library is None and importlib.util.find_spec("torchvision"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
            try:
                _library.define(schema)
            except RuntimeError:  # torchvision's own is there
                break
    import timm

    return timm
