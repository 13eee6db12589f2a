"""What starting costs: importing the package, and the command's help. Every run is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.harness import Row, compared
from benchmarks.setting import ROOT, Setting

TORCH_AND_CLIP = "import torch; from transformers import CLIPModel"
PUBLIC = "FVGConfig, FVGModel, FVGOutput, FeatureBank, evaluate, load, record_attention, unwrap, wrap"
TYPER = "import typer"


def startup(setting: Setting) -> list[Row]:
    """The package ÷ torch and transformers.CLIPModel; every public name likewise; the help ÷ typer."""
    few, many = setting.pairs, 3 * setting.pairs
    return [
        compared(
            "import fvg_adapter ÷ import torch and CLIPModel",
            python("import fvg_adapter"),
            python(TORCH_AND_CLIP),
            "≤ 1.1",
            pairs=few,
            note="the package imports its names when they are asked for",
        ),
        compared(
            "importing every public name ÷ import torch and CLIPModel",
            python(f"{TORCH_AND_CLIP}; from fvg_adapter import {PUBLIC}"),
            python(TORCH_AND_CLIP),
            "≤ 1.1",
            pairs=few,
            note="torch and CLIPModel are in the numerator too",
        ),
        compared(
            "fvg-adapter --help ÷ import typer",
            started("-m", "fvg_adapter.cli", "--help"),
            python(TYPER),
            "≤ 1.5",
            pairs=many,
        ),
    ]


def python(code: str) -> Callable[[], None]:
    """A process that runs a line."""
    return started("-c", code)


def started(*arguments: str) -> Callable[[], None]:
    """A process of this Python with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)

    return run
