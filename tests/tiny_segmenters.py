"""Tiny random segmenters and detectors of every supported family, made from configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SIDE = 64
CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "projection_dim": 16,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
SWIN = {"image_size": SIDE, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
SWIN_OUT = {**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
LABELS = {0: "background", 1: "cat", 2: "dog"}
NUMBERS = {name: number for number, name in LABELS.items()}
FEW = {"id2label": LABELS, "label2id": NUMBERS}


def _clipseg() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8, "projection_dim": 16}
    config = transformers.CLIPSegConfig(
        text_config=CLIP_TEXT,
        vision_config=vision,
        projection_dim=16,
        extract_layers=[1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        conditional_layer=0,
    )
    return transformers.CLIPSegForImageSegmentation(config)


def _sam() -> nn.Module:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    vision |= {"output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
    }
    return transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )


def _sam2() -> nn.Module:
    hiera = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 24, 32],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [2, 2],
    }
    vision = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **hiera},
        "backbone_channel_list": [32, 24, 16, 8],
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
    }
    return transformers.Sam2Model(
        transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )


def _sam3() -> nn.Module:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "pretrain_image_size": SIDE,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    vision = {
        "backbone_config": backbone,
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    small = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.Sam3Model(
        transformers.Sam3Config(
            vision_config=vision,
            text_config={**CLIP_TEXT},
            geometry_encoder_config={**small, "roi_size": 3},
            detr_encoder_config=small,
            detr_decoder_config={**small, "num_queries": 5},
            mask_decoder_config={"hidden_size": 16, "num_upsampling_stages": 3, "num_attention_heads": 2},
        )
    )


def _grounding() -> nn.Module:
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**{**SWIN, "out_features": ["stage2", "stage3", "stage4"]}),
        text_config={
            "model_type": "bert",
            "vocab_size": 99,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_queries=6,
        num_feature_levels=4,
        max_text_len=16,
    )
    return transformers.GroundingDinoForObjectDetection(config)


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        **FEW,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_attention_heads=[1, 1, 1, 1],
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        **FEW,
        backbone_config=transformers.SwinConfig(**SWIN_OUT),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=24,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=24,
        num_queries=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _maskformer() -> nn.Module:
    config = transformers.MaskFormerConfig(
        **FEW,
        backbone_config=transformers.SwinConfig(**SWIN_OUT),
        fpn_feature_size=32,
        mask_feature_size=32,
        decoder_config=transformers.DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_queries=5,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        ),
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def _oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        **FEW,
        backbone_config=transformers.SwinConfig(**SWIN_OUT),
        num_queries=6,
        hidden_dim=32,
        mask_dim=32,
        conv_dim=32,
        encoder_feedforward_dim=24,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=24,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_context_length=77,
        task_seq_len=77,
        query_dec_layers=1,
        common_stride=4,
    )
    return transformers.OneFormerForUniversalSegmentation(config)


def _eomt() -> nn.Module:
    config = transformers.EomtConfig(
        **FEW,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIDE,
        patch_size=8,
        num_blocks=1,
        num_queries=5,
        num_upscale_blocks=1,
    )
    return transformers.EomtForUniversalSegmentation(config)


BUILDERS: dict[str, Any] = {
    "clipseg": _clipseg,
    "sam": _sam,
    "sam2": _sam2,
    "sam3": _sam3,
    "grounding-dino": _grounding,
    "segformer": _segformer,
    "mask2former": _mask2former,
    "maskformer": _maskformer,
    "oneformer": _oneformer,
    "eomt": _eomt,
}
NEEDS = {"sam3": "Sam3Model"}
BUILT = [name for name in BUILDERS if name not in NEEDS or hasattr(transformers, NEEDS[name])]
"""Families that this version of transformers has (SAM 3 came with 5.0)."""


def tiny(family: str) -> nn.Module:
    """A random model of a family, in evaluation mode, with weights large enough to matter."""
    torch.manual_seed(0)
    model = BUILDERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model
