"""Fixtures: the tiny CLIP and the numbers of golden/, and small CLIPs made from configs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# The same cases on every run, so that a change is judged by what it changed; HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

GOLDEN = Path(__file__).parent / "golden"
CLASSES = ["golden_retriever", "airplane", "Siamese cat", "hot-air balloon", "forget-me-not", "737-800"]
NEW_CLASSES = ["snow_leopard", "bicycle", "sugar-snap pea", "bird's nest", "A380"]


class Golden:
    """Tensors and config of one case of golden/README.md."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open has no iterator)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix/`, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loads a golden case by name."""
    return Golden


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """CLIP's BPE tokenizer."""
    return CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")


def checkpoint_activations(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Switches gradient checkpointing on, by the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.fixture
def golden_clip() -> CLIPModel:
    """The tiny random CLIP of golden/: three different widths, logit scale 29.976."""
    return CLIPModel.from_pretrained(GOLDEN / "model")


def small_config(**vision: Any) -> CLIPConfig:
    """A CLIP config small enough for any test; hidden 32, 2 layers, image 32, patch 8."""
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**common, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    return CLIPConfig(
        text_config={**text, "hidden_size": 24, "projection_dim": 16},
        vision_config={**common, "image_size": 32, "patch_size": 8, "projection_dim": 16, **vision},
        projection_dim=16,
    )


@pytest.fixture
def small_clip() -> CLIPModel:
    """A small random CLIP whose text and image features are not nearly parallel."""
    torch.manual_seed(0)
    model = CLIPModel(small_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


@pytest.fixture
def pixels() -> Tensor:
    """Four images for `small_clip`."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
