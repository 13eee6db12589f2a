"""The files of a saved folder: their names, and its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
TUNER_FILE = "tuner.safetensors"
HEADS_FILE = "fvg_heads.safetensors"
PEFT_FILES = ("lora/adapter_config.json", "lora/adapter_model.safetensors")
CARD_FILE = "README.md"
PICTURE_FILE = "attention.png"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json into a folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
