"""Networks of timm: a small variant of every family, on small images; transformers with fewer blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from .entry import add, noise
from .native import torchvision

CLASSES = 10
# Those that take images of any size, at 64 pixels.
CONVOLUTIONAL = (
    "tf_efficientnetv2_b0 efficientnet_lite0 poolformer_s12 poolformerv2_s12 resnest14d hrnet_w18_small dm_nfnet_f0 "
    "nf_regnet_b0 fastvit_t8 mobilevit_xxs mobilevitv2_050 edgenext_xx_small ghostnet_050 repvgg_a0 mobileone_s0 "
    "mobilenetv4_conv_small resnetv2_50 seresnext26d_32x4d ecaresnet26t skresnet18 gernet_s convnextv2_atto "
    "inception_next_atto starnet_s1 dla34 vovnet39a rexnet_100 efficientvit_b0 repvit_m0_9 focalnet_tiny_srf "
    "caformer_s18 hgnetv2_b0 mambaout_femto shvit_s1 test_byobnet test_nfnet"
).split()
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
# name -> (pixels along a side, what is smaller than usual)
SHAPED: dict[str, tuple[int, dict[str, Any]]] = {
    "convmixer_768_32": (56, {}),
    "beit_base_patch16_224": (32, SMALL),
    "beitv2_base_patch16_224": (32, SMALL),
    "eva02_tiny_patch14_224": (32, SMALL),
    "deit3_small_patch16_224": (32, SMALL),
    "vit_tiny_patch16_224": (32, SMALL),
    "cait_xxs24_224": (32, SMALL),
    "xcit_nano_12_p8_224": (32, {"img_size": 32, "depth": 2}),
    "mixer_s16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "levit_128s": (224, {"depth": (1, 1, 1)}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "pvt_v2_b0": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "depths": (2, 2), "embed_dim": 24,
                                     "num_heads": (2, 4)}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "crossvit_tiny_240": (240, {"depth": ((1, 1, 0), (1, 1, 0))}),
    "convit_tiny": (32, {"img_size": 32, "patch_size": 8, "depth": 3, "local_up_to_layer": 2}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "visformer_tiny": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "hiera_tiny_224": (224, {"stages": (1, 1, 1, 1), "embed_dim": 24}),
    "volo_d1_224": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2)}),
}  # fmt: skip


def _add(name: str, size: int, changes: dict[str, Any]) -> None:
    def build() -> nn.Module:
        torchvision()
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **changes)
        return model

    add("timm", f"timm/{name}", build, noise(3, size, size))


for _name in CONVOLUTIONAL:
    _add(_name, 64, {})
for _name, (_size, _changes) in SHAPED.items():
    _add(_name, _size, _changes)
