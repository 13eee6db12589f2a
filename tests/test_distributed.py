"""Two processes train to the same heads as one: this file is the test, and the script that the processes run."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import NAMES, RECIPE, Pictures, changed, distance, own
from transformers import CLIPModel, CLIPTokenizer

import fvg_adapter
from conftest import GOLDEN, small_config
from fvg_adapter import FeatureBank
from fvg_adapter.train import fit
from fvg_adapter.tuners import MMRL, CoOp, ZeroShot
from fvg_adapter.tuners.recipes import Stage
from fvg_adapter.wrapping import wrap

BATCH = 2
"""Pictures of one process in a batch; one process alone takes twice as many."""


def base() -> tuple[Any, Any]:
    torch.manual_seed(0)
    clip = CLIPModel(small_config()).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return clip, CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")


def heads(data: Pictures, recipe: Stage, **options: Any) -> Any:
    clip, tokenizer = base()
    torch.manual_seed(3)
    model = wrap(ZeroShot(clip, tokenizer, NAMES), foreground="given")
    fit(model, data, recipe=recipe, **options)
    return model


def with_masks(recipe: Stage, folder: Path) -> Any:
    return heads(Pictures(13, noise=0.3), recipe, output_dir=folder)  # 13: one is left over


def one_usable_mask(recipe: Stage, folder: Path) -> Any:
    data = Pictures()
    data.masks[2:] = 0
    return heads(data, recipe)


def no_usable_mask(recipe: Stage, folder: Path) -> Any:
    data = Pictures()
    data.masks.zero_()
    return heads(data, recipe)


def accumulated(recipe: Stage, folder: Path) -> Any:
    half = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2)
    return heads(Pictures(), half, accumulate=2)


def twice(recipe: Stage, folder: Path) -> Any:
    model = heads(Pictures(), recipe)
    fit(model, Pictures(), recipe=recipe, seed=2)
    return model


def prompts_then_heads(recipe: Stage, folder: Path) -> Any:
    clip, tokenizer = base()
    torch.manual_seed(3)
    tuner = CoOp(clip, tokenizer, NAMES)
    fit(tuner, Pictures(), recipe=recipe)
    torch.manual_seed(4)
    model = wrap(tuner, foreground="given")
    fit(model, Pictures(), recipe=recipe)
    return model


def prompts_in_chunks(recipe: Stage, folder: Path) -> Any:
    clip, tokenizer = base()
    torch.manual_seed(3)
    tuner = MMRL(clip, tokenizer, NAMES, rep_layers=[1, 2], rep_dim=8)
    tuner.text_memory = 1  # every prompt alone, computed again in backward
    fit(tuner, Pictures(), recipe=recipe)
    return tuner


def encoded_then_trained(recipe: Stage, folder: Path) -> Any:
    clip, tokenizer = base()
    torch.manual_seed(3)
    model = wrap(ZeroShot(clip, tokenizer, NAMES), foreground="given")
    bank = FeatureBank.encode(model, Pictures(13, noise=0.3), views=2, output=folder, rows_per_shard=3)
    fit(model, bank, recipe=recipe)
    return model


CASES: dict[str, Callable[[Stage, Path], Any]] = {
    f.__name__: f
    for f in (
        with_masks,
        one_usable_mask,
        no_usable_mask,
        accumulated,
        twice,
        prompts_then_heads,
        prompts_in_chunks,
        encoded_then_trained,
    )
}


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for name, case in CASES.items():
        save_file(own(case(changed(RECIPE, batch_size=BATCH), folder / name)), folder / f"{name}-{rank}.safetensors")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs this file in two processes over gloo on the loopback; returns the folder with their heads."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [*launcher, f"--master-port={port}", __file__, str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    package = str(Path(fvg_adapter.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **settings, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_to_the_same_heads_as_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    alone = own(CASES[name](changed(RECIPE, batch_size=2 * BATCH), tmp_path))
    ours = [load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert distance(ours[0], ours[1]) == 0.0
    assert distance(ours[0], alone) < 1e-5


def test_one_of_two_processes_writes_checkpoints(two_processes: Path) -> None:
    found = sorted(path.name for path in (two_processes / "with_masks").iterdir())
    assert found == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    saved = load_file(two_processes / "with_masks" / "checkpoint-9" / "model.safetensors")
    assert distance(saved, load_file(two_processes / "with_masks-0.safetensors")) == 0.0


def test_two_processes_write_the_bank_of_one(two_processes: Path, tmp_path: Path) -> None:
    encoded_then_trained(changed(RECIPE, batch_size=2 * BATCH), tmp_path)
    ours, alone = (
        {f.name: f.read_bytes() for f in folder.iterdir()}
        for folder in (two_processes / "encoded_then_trained", tmp_path)
    )
    assert ours == alone and len(alone) == 5 + 2


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    gc.collect()  # DDP in a cycle would keep the threads of gloo
    torch.distributed.destroy_process_group()  # its threads must have ended before the interpreter does
