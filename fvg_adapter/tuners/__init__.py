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
from fvg_adapter.tuners.registry import TUNERS, register
from fvg_adapter.tuners.zero_shot import ZeroShot

__all__ = [
    "MMRL",
    "TUNERS",
    "CoOp",
    "External",
    "KgCoOp",
    "LoRA",
    "PromptSRC",
    "Tuner",
    "TunerOutput",
    "ZeroShot",
    "register",
]

for _tuner in (ZeroShot, CoOp, KgCoOp, PromptSRC, MMRL, LoRA, External):
    register(_tuner)
