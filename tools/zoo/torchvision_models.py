"""Networks of torchvision: classification, segmentation, detection, optical flow, video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .entry import Inputs, add, noise, randn
from .native import torchvision

CLASSES = 10
# name -> pixels along a side; the smallest of every family, and further ones where the family changes.
CLASSIFICATION = {
    "alexnet": 64, "vgg11": 32, "vgg13_bn": 32, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64,
    "wide_resnet50_2": 32, "densenet121": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mobilenet_v3_large": 64,
    "efficientnet_b0": 64, "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "mnasnet0_5": 64, "convnext_tiny": 64, "swin_t": 64,
    "swin_v2_t": 64, "googlenet": 64, "inception_v3": 96,
}  # fmt: skip


def _add(name: str, inputs: Inputs, settings: dict[str, Any] | None = None) -> None:
    def build() -> nn.Module:
        model: nn.Module = torchvision().models.get_model(name, **({"weights": None} | (settings or {})))
        return model

    add("torchvision", f"torchvision/{name}", build, inputs)


def _images(samples: int, seed: int) -> tuple[list[Tensor]]:
    """A list of images, as detectors take them."""
    return ([randn(3, 96, 96, seed=seed * samples + i).sigmoid() for i in range(samples)],)


def _two_images(samples: int, seed: int) -> dict[str, Any]:
    """Two images and how often the flow between them is corrected, 12 times by default, every one a whole network."""
    one, other = (randn(samples, 3, 128, 128, seed=2 * seed + k).tanh() for k in (0, 1))
    return {"image1": one, "image2": other, "num_flow_updates": 2}


for _name, _size in CLASSIFICATION.items():
    _extra = {"aux_logits": True, "init_weights": True} if _name in ("googlenet", "inception_v3") else {}
    _add(_name, noise(3, _size, _size), {"num_classes": CLASSES, **_extra})


def _vit() -> nn.Module:
    vit: nn.Module = torchvision().models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=CLASSES)
    return vit


def _maxvit() -> nn.Module:
    maxvit: nn.Module = torchvision().models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES)
    return maxvit


add("torchvision", "torchvision/vit", _vit, noise(3, 32, 32))
add("torchvision", "torchvision/maxvit", _maxvit, noise(3, 64, 64))

_WITHOUT: dict[str, Any] = {"weights_backbone": None}
for _name in ("lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"):
    _add(_name, noise(3, 64, 64), {**_WITHOUT, "num_classes": CLASSES})
_FEW: dict[str, Any] = {"detections_per_img": 10, "topk_candidates": 50, "score_thresh": 0.0}
_SIDES: dict[str, Any] = {"min_size": 96, "max_size": 96}
_BOXES = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
_add("ssdlite320_mobilenet_v3_large", _images, {**_WITHOUT, **_FEW, "num_classes": CLASSES})
_add("retinanet_resnet50_fpn", _images, {**_WITHOUT, **_FEW, **_SIDES, "num_classes": CLASSES})
_add("fasterrcnn_mobilenet_v3_large_320_fpn", _images, {**_WITHOUT, **_SIDES, **_BOXES, "num_classes": CLASSES})
_add("raft_small", _two_images)
for _name in ("r3d_18", "mc3_18", "r2plus1d_18"):
    _add(_name, noise(3, 4, 32, 32), {"num_classes": CLASSES})


def _s3d() -> nn.Module:
    s3d: nn.Module = torchvision().models.video.S3D(CLASSES)
    s3d.avgpool = nn.AdaptiveAvgPool3d(1)  # its own wants videos of 224 pixels
    return s3d


def _mvit() -> nn.Module:
    video = torchvision().models.video
    blocks = [video.mvit.MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1])]
    blocks += [video.mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [1, 1, 1], [3, 3, 3], [1, 2, 2])]
    mvit: nn.Module = video.MViT((32, 32), 8, blocks, residual_pool=False, residual_with_cls_embed=False,
        rel_pos_embed=False, proj_after_attn=False, num_classes=CLASSES)  # fmt: skip
    return mvit


def _swin3d() -> nn.Module:
    video = torchvision().models.video
    swin: nn.Module = video.SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], num_classes=CLASSES)
    return swin


add("torchvision", "torchvision/s3d", _s3d, noise(3, 16, 64, 64))
add("torchvision", "torchvision/mvit", _mvit, noise(3, 8, 32, 32))
add("torchvision", "torchvision/swin3d", _swin3d, noise(3, 4, 32, 32))
