"""Processes whose client talks to a loopback hub: how they are run, and the models that they push and load.

huggingface_hub reads its settings when it is first imported, so that every machine in a test is a process of its own. A
step is a function of a test file that takes a folder and returns what it found: a report, and tensors.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hub_server import LoopbackHub
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

import fvg_adapter
from conftest import CLASSES
from fvg_adapter import FVGModel, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp

Report = dict[str, Any]
Found = tuple[Report, dict[str, Tensor]]


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, classes: Any = None) -> Tensor:
    with model.use_classes(classes or model.classes):
        return model.eval()(images()).logits


def own_base(name: str) -> tuple[Any, Any]:
    return CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)


base = functools.cache(own_base)


def prompts(name: str, shift: float = 0.0) -> CoOp:
    tuner = CoOp(*base(name), CLASSES)
    with torch.no_grad():
        tuner.ctx.add_(torch.randn(tuner.ctx.shape, generator=torch.Generator().manual_seed(2)) * 0.02 + shift)
    return tuner


def heads(name: str) -> FVGModel:
    model = wrap(prompts(name), foreground="given")
    with torch.no_grad():
        for head in (model.visual_adapter, model.text_adapter):
            head.up.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def message(call: Callable[[], Any]) -> str:
    """What the FVGError of a call says; any other outcome is reported as itself."""
    try:
        return f"no error: {call()!r}"
    except FVGError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"


def start(step: Callable[..., Any], endpoint: str, folder: Path, **settings: str | None) -> subprocess.Popen[str]:
    """Starts a step in a process of its own whose Hub is the one at `endpoint`; a setting of None is left out."""
    package = str(Path(fvg_adapter.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_OFFLINE": "0",
    }
    for name, value in settings.items():
        environment.pop(name, None) if value is None else environment.__setitem__(name, value)
    script = str(sys.modules[step.__module__].__file__)
    command = [sys.executable, script, step.__name__, str(folder)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def finish(process: subprocess.Popen[str], folder: Path) -> Found:
    """What a started step found."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return json.loads((folder / "report.json").read_text()), load_file(folder / "logits.safetensors")


def run(step: Callable[..., Any], hub: LoopbackHub, folder: Path, **settings: str | None) -> Found:
    """Runs a step in a process of its own whose Hub is the loopback's."""
    return finish(start(step, hub.url, folder, **settings), folder)


def work(*steps: Callable[[Path], Found]) -> None:
    """The main part of a step's process."""
    torch.set_num_threads(1)
    here = Path(sys.argv[2])
    report, found = {f.__name__: f for f in steps}[sys.argv[1]](here)
    save_file(found, here / "logits.safetensors")
    (here / "report.json").write_text(json.dumps(report))
