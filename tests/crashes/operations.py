"""What is killed: every way in which the library writes files that belong together or take long.

One entry of OPERATIONS each. Everything is small, and made once, before the first fork.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import GOLDEN, small_config
from fvg_adapter import FeatureBank, FVGModel, load, wrap
from fvg_adapter.data import MaskedImageFolder
from fvg_adapter.errors import FVGError
from fvg_adapter.mask_files import PLAN, write_masks
from fvg_adapter.mask_makers import source_masks
from fvg_adapter.train import fit
from fvg_adapter.train import trainer as _loaded_before_the_fork  # noqa: F401
from fvg_adapter.tuners import CoOp, LoRA, PromptSRC, Tuner, ZeroShot
from fvg_adapter.tuners.recipes import Stage

from .harness import Operation, tree

NAMES = ["cat", "dog", "hot-air balloon"]
RECIPE = Stage("adamw", 0.01, 4, "a test", epochs=4)


@functools.cache
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")


def clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(small_config()).eval()


class Pictures(Dataset[dict[str, Any]]):
    """Twelve random pictures with masks; every access draws an augmentation."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        self.classes, self.labels = NAMES, [i % 3 for i in range(12)]
        self.pixels = torch.randn(12, 3, 32, 32, generator=draw)
        self.masks = (torch.rand(12, 1, 32, 32, generator=draw) > 0.4).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[index] + 0.3 * torch.rand(())
        return {"pixel_values": pixels, "labels": self.labels[index], "foreground_mask": self.masks[index]}


# -- saves -------------------------------------------------------------------------------------------------------------


@functools.cache
def _made(kind: type[Tuner], version: int) -> FVGModel:
    torch.manual_seed(1)
    model = wrap(kind(clip(), tokenizer(), NAMES), foreground="given")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float(version))
    return model


def _save(kind: type[Tuner], version: int, folder: Path) -> None:
    _made(kind, version).save_pretrained(folder / "adapter")


def _version(folder: Path) -> str:
    """Which version a load gives; raises where tensors of several are mixed."""
    if not (folder / "adapter").exists():
        return "nothing"
    model = load(folder / "adapter", clip=clip(), tokenizer=tokenizer())
    values = {float(v) for tensor in model.state_dict().values() for v in tensor.flatten().unique()}
    assert len(values) == 1, f"a mix of versions: {values}"
    return {1.0: "old", 2.0: "new"}[values.pop()]


def _saving(kind: type[Tuner], name: str, kills: int, *, over: bool) -> Operation:
    return Operation(
        f"save_pretrained, {name}",
        run=functools.partial(_save, kind, 2),
        inspect=_version,
        result=tree,
        prepare=functools.partial(_save, kind, 1) if over else lambda folder: None,
        kills=kills,
        every_step=True,
    )


# -- banks -------------------------------------------------------------------------------------------------------------


@functools.cache
def _model() -> FVGModel:
    torch.manual_seed(3)
    return wrap(ZeroShot(clip(), tokenizer(), NAMES), foreground="given")


def _encode(folder: Path) -> None:
    FeatureBank.encode(_model(), Pictures(), views=2, batch_size=2, output=folder / "bank", rows_per_shard=2)


@functools.cache
def _bank() -> FeatureBank:
    return FeatureBank.encode(_model(), Pictures(), views=2)


def _save_bank(version: int, folder: Path) -> None:
    bank = _bank()
    rows = range(12) if version == 1 else range(5, 12)
    labels = [version % 3] * len(rows)
    features = {k: torch.full_like(v[list(rows)], version) for k, v in bank.features.items()}
    FeatureBank(features, labels, NAMES, bank.fingerprint, bank.settings).save(folder / "bank")


def _bank_version(folder: Path) -> str:
    bank = FeatureBank.load(folder / "bank", _model())
    values = {float(v) for t in bank.features.values() if t.dtype != torch.bool for v in t.flatten().unique()}
    assert values == {float(bank.labels[0])}, f"labels {bank.labels} with features {values}"
    return {1: "old", 2: "new"}[bank.labels[0]]


def _bank_state(folder: Path) -> str:
    """Shards that are there are whole; the bank is refused until all are."""
    there = sorted((folder / "bank").glob("0*.safetensors"))
    for shard in there:
        load_file(shard)
    try:
        FeatureBank.load(folder / "bank", _model())
    except FVGError as error:
        assert "is not finished" in str(error) or "no bank" in str(error), error
        return "unfinished"
    assert len(there) == 6
    return "whole"


# -- masks -------------------------------------------------------------------------------------------------------------


def _masks(folder: Path) -> None:
    data = [MaskedImageFolder(folder / "data", split=split, masks="none") for split in ("train", "test")]
    write_masks(
        data, folder / "masks", source_masks(lambda pixels: pixels.mean(1) > 0, 32), {"source": "bright"}, batch_size=4
    )


def _masks_there(folder: Path) -> str:
    """Masks that are there are whole, and the plan that they follow."""
    there = sorted((folder / "masks").rglob("[!.]*.png"))
    for file in there:
        with Image.open(file) as mask:
            assert (mask.load(), mask.size)[1] == (32, 32)
    if there:
        json.loads((folder / "masks" / PLAN).read_text())
    return {0: "nothing", 24: "whole"}.get(len(there), "unfinished")


# -- training ----------------------------------------------------------------------------------------------------------


def _heads(folder: Path) -> None:
    model = _model()  # a fork's own copy
    recipe = dataclasses.replace(RECIPE, epochs=16)  # so that most of the time is not the Trainer's setting up
    fit(model, Pictures(), recipe=recipe, output_dir=folder / "run", resume="auto")
    model.save_pretrained(folder / "adapter")


@functools.cache
def _tuner() -> PromptSRC:
    torch.manual_seed(3)
    few = ("a photo of a {}.", "the plastic {}.")
    options = {"prompt_depth_text": 2, "prompt_depth_vision": 2, "teacher_templates": few}
    return PromptSRC(clip(), tokenizer(), NAMES, **options)


def _prompts(folder: Path) -> None:
    tuner = _tuner()
    fit(tuner, Pictures(), recipe=RECIPE, output_dir=folder / "run", resume="auto")
    tuner.save_pretrained(folder / "adapter")


def _checkpoints(folder: Path) -> str:
    """Checkpoints that are there are whole, every file of them."""
    there = sorted((folder / "run").glob("checkpoint-*"))
    for checkpoint in there:
        _weights(checkpoint)
        json.loads((checkpoint / "trainer_state.json").read_text())
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
    if (folder / "adapter").exists():
        load(folder / "adapter", clip=clip(), tokenizer=tokenizer())
    return f"{len(there)} checkpoints"


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(f).items()}


def _trained(folder: Path) -> Any:
    """Bytes of the adapter and of every checkpoint's weights."""
    checkpoints = sorted((folder / "run").glob("checkpoint-*"))
    return tree(folder / "adapter"), {c.name: tree(c).get("model.safetensors") for c in checkpoints}


# -- the command -------------------------------------------------------------------------------------------------------


def _data(folder: Path) -> None:
    """A CLIP, and four classes of pictures with masks."""
    model = clip()
    model.save_pretrained(folder / "clip")
    tokenizer().save_pretrained(folder / "clip")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("fox", "bird", "frog", "boat"):
            for i in range(3):
                mask = np.zeros((32, 32), np.uint8)
                mask[6 : 20 + i, 5:25] = 255
                for root, pixels in (("data", draw.integers(0, 256, (32, 32, 3), np.uint8)), ("data/mask", mask)):
                    path = folder / root / split / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)


def _command(folder: Path) -> None:
    from fvg_adapter.cli import main

    short = ["--tune-epochs", "1", "--epochs", "1", "--shots", "2", "--views", "2", "--seeds", "1,2", "--no-controls"]
    places = ["--model", str(folder / "clip"), "--output", str(folder / "out"), "--bank", str(folder / "bank")]
    sys.argv = ["fvg-adapter", "train", str(folder / "data"), *places, *short, "--json"]
    sys.stdout = sys.stderr = Path("/dev/null").open("w")  # noqa: SIM115 (this process ends)
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"the command ended with {end.code}"


def _outputs(folder: Path) -> str:
    """Every file that is there is whole."""
    out = folder / "out"
    found = []
    if (out / "results.json").exists():
        results = json.loads((out / "results.json").read_text())
        found.append(f"{len(results['coop+fvg']['hm'])} seeds")
    if (out / "picture.png").exists():
        with Image.open(out / "picture.png") as picture:
            picture.load()
        found.append("picture")
    if (out / "adapter").exists():
        model = CLIPModel.from_pretrained(folder / "clip")
        load(out / "adapter", clip=model, tokenizer=tokenizer())
        found.append("adapter")
    return ", ".join(sorted(found)) or "nothing"


def _command_result(folder: Path) -> Any:
    results = json.loads((folder / "out" / "results.json").read_text())
    del results["settings"], results["cost"]  # they hold the wall time, speeds and the folder
    adapter = {k: v for k, v in tree(folder / "out/adapter").items() if k != "config.json"}  # the folder's name
    with Image.open(folder / "out/picture.png") as picture:
        return results, adapter, tree(folder / "bank"), picture.size


OPERATIONS: tuple[Operation, ...] = (
    _saving(CoOp, "a new folder", 25, over=False),
    _saving(CoOp, "over an earlier save", 25, over=True),
    _saving(LoRA, "with PEFT's files, over an earlier save", 25, over=True),
    Operation(
        "FeatureBank.encode into a folder", _encode, _bank_state, lambda f: tree(f / "bank"), kills=25, every_step=True
    ),
    Operation(
        "FeatureBank.save over another bank",
        run=functools.partial(_save_bank, 2),
        inspect=_bank_version,
        result=lambda f: tree(f / "bank"),
        prepare=functools.partial(_save_bank, 1),
        kills=20,
        every_step=True,
    ),
    Operation(
        "masks for a data set", _masks, _masks_there, lambda f: tree(f / "masks"), _data, kills=20, every_step=True
    ),
    Operation("fit with checkpoints, heads", _heads, _checkpoints, _trained, kills=25),
    Operation("fit with checkpoints, PromptSRC and its average", _prompts, _checkpoints, _trained, kills=15),
    Operation("fvg-adapter train --output --bank", _command, _outputs, _command_result, _data, kills=20),
)


def warm_up() -> None:
    """Makes and loads what the forks need, so that they do nothing but write."""
    for kind, version in ((CoOp, 1), (CoOp, 2), (LoRA, 1), (LoRA, 2)):
        _made(kind, version)
    tokenizer(), _bank(), _model(), _tuner()
    from fvg_adapter import cli, protocols, visualize  # noqa: F401
