"""The pocket CLIP's size, and how it is written to disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import CLIPConfig, CLIPModel

from . import captions, fast


def make_model(vocabulary: int) -> CLIPModel:
    """A randomly initialised pocket CLIP: 2.3 M parameters."""
    size = {
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_size": 128,
        "hidden_act": "quick_gelu",
        "projection_dim": 128,
    }
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={
            **size,
            **special,
            "num_hidden_layers": 4,
            "vocab_size": vocabulary,
            "max_position_embeddings": captions.CONTEXT,
        },
        vision_config={**size, "num_hidden_layers": 6, "image_size": 64, "patch_size": 8},
        projection_dim=128,
    )
    return CLIPModel(config)


def save_model(model: CLIPModel, tokenizer_folder: Path, folder: Path) -> None:
    """Write a complete Hugging Face folder (fp16 weights, `dtype: float32`), replacing `folder` in one step."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(tokenizer_folder, fresh)
    half = CLIPModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 64}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": fast.CLIP_MEAN, "image_std": fast.CLIP_STD, "do_convert_rgb": True,
    }  # fmt: skip
    (fresh / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    for file in fresh.iterdir():
        file.chmod(0o644)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
