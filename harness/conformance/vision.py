"""torchvision where its own library does not fit this torch: timm and transformers need its Python alone."""

from __future__ import annotations

import importlib.util

_OPERATORS = ("nms", "qnms")
_library = None  # holds the declarations for as long as the process lives


def declare_torchvision() -> None:
    """Declare the operators that torchvision's Python asks for at import, where its library, which has them, cannot be
    loaded.
    """
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        try:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # torchvision's own is there
            return
