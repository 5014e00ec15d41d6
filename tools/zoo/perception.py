"""Models of transformers that see or hear, from tiny configurations."""

from __future__ import annotations

from typing import Any

from .entry import Inputs, named, noise, randint, randn
from .language import SIZES, VOCABULARY, text, transformer

SIDE = 32
BLOCKS: dict[str, Any] = {
    key: value for key, value in SIZES.items() if not key.startswith(("vocab", "max_", "pad", "bos", "eos"))
}
IMAGE: dict[str, Any] = {**BLOCKS, "image_size": SIDE, "patch_size": 8, "num_labels": 4}


def pixels(side: int = SIDE) -> Inputs:
    return named("pixel_values", noise(3, side, side))


transformer("vit", "ViTForImageClassification", pixels(), **IMAGE)
transformer("deit", "DeiTForImageClassification", pixels(), **IMAGE)
transformer("beit", "BeitForImageClassification", pixels(), use_relative_position_bias=True, **IMAGE)
transformer("dinov2", "Dinov2ForImageClassification", pixels(), **IMAGE)
transformer("vit_msn", "ViTMSNForImageClassification", pixels(), **IMAGE)
transformer(
    "yolos", "YolosForObjectDetection", pixels(), **IMAGE | {"image_size": [SIDE, SIDE], "num_detection_tokens": 5}
)
_SWIN: dict[str, Any] = {"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                         "window_size": 4, "num_labels": 4}  # fmt: skip
transformer("swin", "SwinForImageClassification", pixels(), **_SWIN)
transformer("swinv2", "Swinv2ForImageClassification", pixels(), **_SWIN)
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_labels": 4}
transformer("segformer", "SegformerForSemanticSegmentation", pixels(64), num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=32, **_STAGES)  # fmt: skip
transformer("convnext", "ConvNextForImageClassification", pixels(), **_STAGES)
transformer("convnextv2", "ConvNextV2ForImageClassification", pixels(), **_STAGES)
transformer("resnet", "ResNetForImageClassification", pixels(), embedding_size=16, **_STAGES)
transformer("regnet", "RegNetForImageClassification", pixels(), embedding_size=16, groups_width=8, **_STAGES)
transformer("poolformer", "PoolFormerForImageClassification", pixels(64), **_STAGES)
transformer("mobilenet_v2", "MobileNetV2ForImageClassification", pixels(64), depth_multiplier=0.35, num_labels=4)
transformer("mobilevit", "MobileViTForImageClassification", pixels(64), image_size=64, hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=4, num_labels=4)  # fmt: skip
transformer("pvt", "PvtForImageClassification", pixels(64), image_size=64, num_attention_heads=[1, 2, 2, 4], **_STAGES)
transformer("levit", "LevitForImageClassification", pixels(64), image_size=64, hidden_sizes=[32, 32, 32],
            num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=4)  # fmt: skip
transformer("cvt", "CvtForImageClassification", pixels(64), embed_dim=[16, 16, 32], num_heads=[1, 2, 2],
            depth=[1, 2, 3], num_labels=4)  # fmt: skip
transformer("dpt", "DPTForSemanticSegmentation", pixels(), is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, **IMAGE | {"num_hidden_layers": 4})  # fmt: skip
transformer("videomae", "VideoMAEForVideoClassification", named("pixel_values", noise(4, 3, SIDE, SIDE)), num_frames=4,
            **IMAGE)  # fmt: skip
transformer("timesformer", "TimesformerForVideoClassification", named("pixel_values", noise(4, 3, SIDE, SIDE)),
            num_frames=4, **IMAGE)  # fmt: skip


def _detr() -> dict[str, Any]:
    """A ResNet of transformers' own as the backbone."""
    backbone = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
                "out_features": ["stage4"]}  # fmt: skip
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return {**sizes, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "num_labels": 4,
            "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": backbone,
            "backbone": None}  # fmt: skip


transformer("detr", "DetrForObjectDetection", pixels(64), **_detr())


def seen_and_read(samples: int, seed: int) -> dict[str, Any]:
    return {**text(samples, seed), "pixel_values": randn(samples, 3, SIDE, SIDE, seed=seed)}


_TOWERS: dict[str, Any] = {
    "text_config": {**SIZES, "projection_dim": 16},
    "vision_config": {**BLOCKS, "image_size": SIDE, "patch_size": 8, "projection_dim": 16},
}
transformer("clip", "CLIPModel", seen_and_read, projection_dim=16, **_TOWERS)
transformer("siglip", "SiglipModel", seen_and_read, **_TOWERS)
transformer("vilt", "ViltModel", seen_and_read, max_image_length=-1, **SIZES | {"image_size": SIDE, "patch_size": 8})

_SPEECH: dict[str, Any] = {**BLOCKS, "vocab_size": VOCABULARY, "conv_dim": [16, 16], "conv_kernel": [10, 3],
                           "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
                           "num_conv_pos_embedding_groups": 2, "num_labels": 4}  # fmt: skip
SOUND: Inputs = named("input_values", noise(400))
transformer("wav2vec2", "Wav2Vec2ForCTC", SOUND, **_SPEECH)
transformer("hubert", "HubertForCTC", SOUND, **_SPEECH)
transformer("wavlm", "WavLMForCTC", SOUND, **_SPEECH)
transformer("audio_spectrogram", "ASTForAudioClassification", named("input_values", noise(32, 16)), max_length=32,
            num_mel_bins=16, frequency_stride=8, time_stride=8, **IMAGE)  # fmt: skip


def spectrogram(samples: int, seed: int) -> dict[str, Any]:
    return {
        "input_features": randn(samples, 16, 40, seed=seed),
        "decoder_input_ids": randint(VOCABULARY, samples, 6, seed=seed),
    }


transformer("whisper", "WhisperForConditionalGeneration", spectrogram, vocab_size=VOCABULARY, num_mel_bins=16,
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20,
            max_target_positions=32, use_cache=False, init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1)  # fmt: skip
