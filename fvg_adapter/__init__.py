"""FVG-PT for any Hugging Face CLIP: foreground-guided adapters behind a frozen, tuned model (arXiv 2603.08708)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "wrap": "wrapping",
    "unwrap": "wrapping",
    "load": "hub",
    "FVGConfig": "config",
    "FVGModel": "model",
    "FVGOutput": "outputs",
    "record_attention": "attention",
    "FeatureBank": "features",
    "evaluate": "evaluation",
}

__all__ = [
    "FVGConfig",
    "FVGModel",
    "FVGOutput",
    "FeatureBank",
    "evaluate",
    "load",
    "record_attention",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from fvg_adapter.attention import record_attention
    from fvg_adapter.config import FVGConfig
    from fvg_adapter.evaluation import evaluate
    from fvg_adapter.features import FeatureBank
    from fvg_adapter.hub import load
    from fvg_adapter.model import FVGModel
    from fvg_adapter.outputs import FVGOutput
    from fvg_adapter.wrapping import unwrap, wrap


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
