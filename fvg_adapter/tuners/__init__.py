"""What gives image and text features: plain CLIP and the prompt tuners of the paper.

`TUNERS` maps the name that stands in a saved file to the class; `register` adds one of your own.
"""

from __future__ import annotations

from fvg_adapter.tuners.base import Tuner, TunerOutput
from fvg_adapter.tuners.coop import CoOp
from fvg_adapter.tuners.external import External
from fvg_adapter.tuners.kgcoop import KgCoOp
from fvg_adapter.tuners.lora import LoRA
from fvg_adapter.tuners.mmrl import MMRL
from fvg_adapter.tuners.promptsrc import PromptSRC
from fvg_adapter.tuners.recipes import RECIPES, Recipe, Stage
from fvg_adapter.tuners.registry import TUNERS, register, tuner_named
from fvg_adapter.tuners.zero_shot import ZeroShot

__all__ = [
    "MMRL",
    "RECIPES",
    "TUNERS",
    "CoOp",
    "External",
    "KgCoOp",
    "LoRA",
    "PromptSRC",
    "Recipe",
    "Stage",
    "Tuner",
    "TunerOutput",
    "ZeroShot",
    "register",
    "tuner_named",
]

for _tuner in (ZeroShot, CoOp, KgCoOp, PromptSRC, MMRL, LoRA, External):
    register(_tuner)
