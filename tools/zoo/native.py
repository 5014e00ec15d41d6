"""torchvision, also where its compiled operators do not load, as those of the CUDA build beside a torch for CPUs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

_DEFINED: list[torch.library.Library] = []


def torchvision() -> Any:
    """The library. Call this before importing another one that imports torchvision. None where it is absent."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision as library
    except RuntimeError:  # it describes operators that are not there
        _stand_in()
        import torchvision as library
    if _DEFINED:
        torch._dynamo.config.disable = True  # the twin of roi_align would be compiled
        library.ops.boxes._assert_has_ops = lambda: None  # nms is there; what else detectors call has twins in Python
    return library


def _stand_in() -> None:
    """Define the two operators that torchvision describes while it is imported."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.impl("nms", _nms, "CPU")
    _DEFINED.append(operators)  # they vanish with it


def _nms(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Non-maximum suppression: the boxes by falling score, without those that overlap a kept one by more than ``most``
    (intersection over union).
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    lowest = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - lowest).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = shared / (areas[:, None] + areas[None] - shared) > most
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[kept]
