"""What the pocket suite measures, and the runs themselves: each tuner on its tasks, into one JSON file a task.

The settings of a tuner were chosen with that tuner alone, before FVG-PT was run behind it: CoOp's are the frozen recipe
of the suite, the others' the better of two by HM on `places` (seed 1, random backgrounds).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.pocket.concepts import TASKS

HERE = Path(__file__).parent
SPLITS = {
    "test": "random backgrounds",
    "test_swapped": "backgrounds swapped between classes",
    "test_home": "the training backgrounds again, as in an ordinary benchmark",
}
CROP = (0.5, 1.0)
"""At 64 pixels a crop of 8 % holds no object: with Dassl's (0.08, 1) CoOp alone loses 3 to 7 points of base accuracy on
fruit_vegetables and mammals; chosen on CoOp, before FVG-PT was run on the final model."""
PICTURES = HERE.parent.parent / "output" / "pocket"
THREE = ("fruit_vegetables", "other_animals", "clothing")
"""Tasks of the tuners that change the image tower: their test pictures must be encoded anew for every seed."""


@dataclass(frozen=True)
class Setting:
    """How a tuner is run here.

    Attributes:
        name: as people write it. gain: what FVG-PT adds to its HM in the paper, None where the paper has no figure.
        options: keyword arguments of the tuner. tune: fields of its recipe that differ from the published one.
        tasks: where it runs. ablation: the paper's ablation rows too.
        said: the settings in words, for the page.
    """

    name: str
    gain: float | None
    said: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = THREE
    ablation: bool = False


_SMALL_SCALE = {"lr": 0.05, "epochs": 20, "batch_size": 32}  # the logit scale is 22, not 100: see pocket/README.md
SETTINGS: Mapping[str, Setting] = {
    "coop": Setting(
        "CoOp",
        2.67,
        '"a photo of a", SGD 0.05, 20 epochs, batch 32',
        {"n_ctx": 4, "ctx_init": "a photo of a"},
        _SMALL_SCALE,
        tuple(TASKS),
        ablation=True,
    ),
    "kgcoop": Setting(
        "KgCoOp", 1.22, "weight 2, SGD 0.05, 20 epochs, batch 32", {"weight": 2.0}, _SMALL_SCALE, tuple(TASKS)
    ),
    "promptsrc": Setting(
        "PromptSRC",
        0.65,
        "4 + 4 tokens, depth 3 of 4 (text) and 4 of 6 (vision), SGD 0.0025, 10 epochs, batch 32",
        {"prompt_depth_text": 3, "prompt_depth_vision": 4},
    ),
    "mmrl": Setting(
        "MMRL",
        0.65,
        "layers 3 and 4, 5 tokens, dimension 128, AdamW 0.001, 10 epochs, batch 4",
        {"rep_layers": (3, 4), "rep_dim": 128},
    ),
    "lora": Setting(
        "LoRA", None, "CLIP-LoRA's adapters, AdamW 0.002, 20 epochs, batch 32", {}, {"lr": 2e-3, "epochs": 20}
    ),
}
"""By `Tuner.kind`. Depths are the published ones (9 of 12 layers; 6 to 12) scaled to towers of 4 and 6 layers."""


def data_of(task: str) -> Path:
    """The folder of a task's pictures, written when it is not there yet."""
    from examples.pocket.tasks import write_task

    data = PICTURES / task
    if not (data / "classes.txt").exists():
        write_task(task, data)
    return data


def stages(kind: str) -> dict[str, Any]:
    """The recipes of both stages, with this suite's crop."""
    from fvg_adapter.tuners.recipes import RECIPES

    recipe = RECIPES[kind]
    assert recipe.tune is not None
    return {
        "tune": dataclasses.replace(recipe.tune, **SETTINGS[kind].tune, crop_scale=CROP),
        "heads": dataclasses.replace(recipe.fvg, crop_scale=CROP),
    }


def pocket_clip() -> tuple[Any, Any]:
    """The pocket CLIP and its tokenizer."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(HERE / "model"), CLIPTokenizer.from_pretrained(HERE / "model")


def run_task(kind: str, task: str, seeds: Sequence[int], output: Path) -> str:
    """All rows, seeds and test sets of one tuner on one task, into OUTPUT/<kind>/<task>.json; one thread."""
    import torch

    from fvg_adapter.protocols import base_to_new

    torch.set_num_threads(1)
    target = output / kind / f"{task}.json"
    if target.exists():
        return f"{kind} {task}: there already"
    clip, tokenizer = pocket_clip()
    results = base_to_new(
        clip,
        tokenizer,
        data_of(task),
        tuner=kind,
        tuner_options=dict(SETTINGS[kind].options),
        **stages(kind),
        seeds=seeds,
        test_split="test",
        also_test=tuple(SPLITS)[1:],
        ablation=SETTINGS[kind].ablation,
    )
    results.settings["data"] = task  # not where it lies on this machine
    write_json(target, results.to_json())
    return f"{kind} {task}: {results.seconds:.0f} s"


def write_json(target: Path, record: Any) -> None:
    """A whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(target)


def run(tuners: Sequence[str], tasks: Sequence[str] | None, seeds: Sequence[int], output: Path, processes: int) -> None:
    """Runs what is not there yet, a process a task; `tasks` narrows each tuner's own list."""
    wanted = [(kind, task) for kind in tuners for task in SETTINGS[kind].tasks if tasks is None or task in tasks]
    for task in dict.fromkeys(task for _, task in wanted):
        data_of(task)  # before two processes could write the same pictures
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for job in [pool.submit(run_task, kind, task, seeds, output) for kind, task in wanted]:
            print(job.result(), file=sys.stderr, flush=True)
