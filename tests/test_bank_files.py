"""Banks on disk: the bytes of an unbroken encoding whatever happened, read by rows, refused where they do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_features import Pictures, close
from transformers import CLIPModel

import fvg_adapter
from conftest import CLASSES, small_config
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, wrap
from fvg_adapter.bank_files import read_plan, shard_file
from fvg_adapter.errors import FVGError
from fvg_adapter.train import fit
from fvg_adapter.tuners import LoRA, ZeroShot
from fvg_adapter.tuners.recipes import RECIPES, Stage

RECIPE = Stage("sgd", 0.05, 3, "a test", epochs=3)


def fresh(tokenizer: Any, **options: Any) -> FVGModel:
    torch.manual_seed(0)
    clip = CLIPModel(small_config()).eval()
    return wrap(ZeroShot(clip, tokenizer, CLASSES), **{"foreground": "given", **options})


@pytest.fixture
def model(tokenizer: Any) -> FVGModel:
    return fresh(tokenizer)


def pictures(**options: Any) -> Pictures:
    return Pictures(CLASSES, 10, noisy=True, **options)


def encode(model: Any, folder: Path | None, **options: Any) -> FeatureBank:
    return FeatureBank.encode(model, pictures(), views=3, batch_size=4, output=folder, rows_per_shard=4, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_bank_in_shards_is_the_bank_in_memory(model: FVGModel, tmp_path: Path) -> None:
    memory, files = encode(model, None), encode(model, tmp_path / "bank")
    assert sorted(content(tmp_path / "bank")) == [f"{i:05d}.safetensors" for i in range(3)] + [
        "index.json",
        "plan.json",
    ]
    rows, views = [9, 0, 5], [2, 0, 1]
    ours, theirs = files.batch(rows, views), memory.batch(rows, views)  # before anything was put together
    assert len(files._parts) == 3 and torch.equal(ours["labels"], theirs["labels"])
    for name, tensor in memory.features.items():
        close(ours["features"][name], theirs["features"][name])
        close(files.features[name], tensor)
    again = FeatureBank.load(tmp_path / "bank", model)
    for index in range(10):
        torch.manual_seed(index)
        item = again[index]
        torch.manual_seed(index)
        close(item["features"]["image"], memory[index]["features"]["image"])
        assert item["labels"] == memory.labels[index]


def test_training_from_files_equals_training_from_memory(tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for way in range(3):
        model = fresh(tokenizer)
        bank = encode(model, tmp_path / "bank")  # whole from the second time on
        if way == 1:
            bank.features  # noqa: B018 (puts the shards together)
        torch.manual_seed(1)
        model = fresh(tokenizer)
        output = tmp_path / "checkpoints" if way == 2 else None  # with checkpoints it is the Trainer's loop
        result = fit(model, bank, recipe=RECIPE, output_dir=output)
        found.append((model, result))
    for model, result in found[1:]:
        for (name, ours), theirs in zip(found[0][0].named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        assert (result.losses, result.learning_rates) == (found[0][1].losses, found[0][1].learning_rates)
        assert result.terms == found[0][1].terms and result.steps == found[0][1].steps == 9


def test_an_encoding_that_broke_off_goes_on(model: FVGModel, tmp_path: Path) -> None:
    encode(model, tmp_path / "unbroken")

    def stop(done: int, total: int) -> None:
        if done > 12:  # in the second shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(model, tmp_path / "bank", progress=stop)
    assert sorted(content(tmp_path / "bank")) == ["00000.safetensors", "plan.json"]
    with pytest.raises(FVGError, match="is not finished"):
        FeatureBank.load(tmp_path / "bank")
    seen: list[int] = []
    encode(model, tmp_path / "bank", progress=lambda done, total: seen.append(done))
    assert seen[-1] == 18  # six pictures in three views were left
    assert content(tmp_path / "bank") == content(tmp_path / "unbroken")
    seen.clear()
    encode(model, tmp_path / "bank", progress=lambda done, total: seen.append(done))
    assert not seen


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import GOLDEN
from test_bank_files import encode, fresh
from transformers import CLIPTokenizer

def kill(done, total):
    if done > 12:
        os.kill(os.getpid(), signal.SIGKILL)

encode(fresh(CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")), Path({folder!r}), progress=kill)
"""


def test_a_killed_encoding_goes_on(model: FVGModel, tmp_path: Path) -> None:
    encode(model, tmp_path / "unbroken")
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "bank"))
    path = os.pathsep.join([str(Path(fvg_adapter.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert "index.json" not in content(tmp_path / "bank")
    encode(model, tmp_path / "bank")
    assert content(tmp_path / "bank") == content(tmp_path / "unbroken")


def test_a_truncated_shard_is_refused_and_made_again(model: FVGModel, tmp_path: Path) -> None:
    encode(model, tmp_path / "bank")
    before = content(tmp_path / "bank")
    shard = shard_file(tmp_path / "bank", 1)
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(FVGError, match="no whole safetensors file"):
        FeatureBank.load(tmp_path / "bank")
    encode(model, tmp_path / "bank")
    assert content(tmp_path / "bank") == before


def test_half_the_size(model: FVGModel, tmp_path: Path) -> None:
    full, half = encode(model, tmp_path / "full"), encode(model, tmp_path / "half", dtype=torch.float16)
    assert half.features["image"].dtype == torch.float16 and half.features["mask_area"].dtype == torch.float32
    torch.testing.assert_close(half.features["image"].float(), full.features["image"], atol=1e-3, rtol=0)
    batch = half.batch([0, 1, 2], [0, 0, 0])
    exact = full.batch([0, 1, 2], [0, 0, 0])
    torch.testing.assert_close(model(**batch).loss, model(**exact).loss, atol=1e-2, rtol=1e-2)
    assert model(**batch).logits.dtype == torch.float32
    assert all(loss == loss for loss in fit(model, half, recipe=RECIPE).losses)
    sizes = [sum(len(b) for b in content(tmp_path / n).values()) for n in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]


def test_saved_from_memory_and_replaced(model: FVGModel, tmp_path: Path) -> None:
    bank = encode(model, None)
    for _ in range(2):
        loaded = FeatureBank.load(bank.save(tmp_path / "bank"), model)
    assert loaded.labels == bank.labels and loaded.classes == bank.classes and loaded.settings == bank.settings
    assert all(torch.equal(loaded.features[k], v) for k, v in bank.features.items())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(FVGError, match="holds no bank"):
        bank.save(tmp_path / "mine")
    assert content(tmp_path / "mine") == {"thesis.tex": b"years"}
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "mine"}


def test_a_save_that_fails_leaves_the_bank_that_was_there(
    model: FVGModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = encode(model, None)
    before = content(bank.save(tmp_path / "bank"))

    def full(*unused: Any, **unused_too: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("save_file", "_write_json"):
        with monkeypatch.context() as patch, pytest.raises(FVGError, match="No space left"):
            patch.setattr(f"fvg_adapter.bank_files.{broken}", full)
            bank.save(tmp_path / "bank", dtype=torch.float16)
        assert content(tmp_path / "bank") == before
        assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_another_models_bank_is_refused(model: FVGModel, tokenizer: Any, tmp_path: Path) -> None:
    encode(model, tmp_path / "bank")
    torch.manual_seed(1)
    other = ZeroShot(CLIPModel(small_config()), tokenizer, CLASSES)
    with pytest.raises(FVGError, match="encoded by clip:"):
        FeatureBank.load(tmp_path / "bank", other)
    with pytest.raises(FVGError, match="holds another bank: it differs in fingerprint"):
        encode(other, tmp_path / "bank")
    torch.manual_seed(0)
    lora = LoRA(CLIPModel(small_config()).eval(), tokenizer, CLASSES)
    bank = encode(lora, None)
    bank.check(lora)
    with torch.no_grad():
        for parameter in lora.trainable_parameters():
            parameter.add_(0.1)
    with pytest.raises(FVGError, match="encoded by lora:"):
        bank.check(lora)


@pytest.mark.parametrize(
    ("config", "foreground", "told"),
    [
        ({"outside_mask": "black"}, "given", "outside_mask 'mean' "),
        ({"mask_threshold": 0.7}, "given", "mask_threshold 0.5 "),
        ({}, "attention", None),  # every picture brought its mask
        ({}, "whole", None),
    ],
)
def test_a_bank_of_other_views_is_refused(
    config: dict[str, Any], foreground: str, told: str | None, model: FVGModel, tokenizer: Any
) -> None:
    bank = encode(model, None)
    other = fresh(tokenizer, config=FVGConfig(**config), foreground=foreground)
    if told is None:
        fit(other, bank, recipe=RECIPE)
        return
    with pytest.raises(FVGError, match=f"this bank was encoded with {told}"):
        fit(other, bank, recipe=RECIPE)


def test_masks_of_another_source_are_refused_in_training(tokenizer: Any) -> None:
    bare = pictures(masks=False)
    attention = fresh(tokenizer, foreground="attention")
    bank = FeatureBank.encode(attention, bare)
    assert bank.settings["masks"] == "attention"
    fit(attention, bank, recipe=RECIPE)
    fit(fresh(tokenizer, foreground="whole"), bank, recipe=RECIPE)
    with pytest.raises(FVGError, match="encoded with masks 'attention' .the model's: 'given'."):
        fit(fresh(tokenizer), bank, recipe=RECIPE)
    deeper = FVGConfig(attention_layers=(0,))
    with pytest.raises(FVGError, match="attention_layers"):
        fit(fresh(tokenizer, foreground="attention", config=deeper), bank, recipe=RECIPE)


@pytest.mark.parametrize("changed", [{"views": 2}, {"seed": 9}, {"dtype": torch.float16}, {"measure": True}])
def test_a_folder_with_another_bank_is_refused(changed: dict[str, Any], model: FVGModel, tmp_path: Path) -> None:
    encode(model, tmp_path / "bank")
    before = content(tmp_path / "bank")
    with pytest.raises(FVGError, match="holds another bank: it differs in"):
        options = {"views": 3, "batch_size": 4, "rows_per_shard": 4, **changed}
        FeatureBank.encode(model, pictures(), output=tmp_path / "bank", **options)
    assert content(tmp_path / "bank") == before


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"version": 99}, "has format version 99, but this fvg_adapter reads 2; upgrade"),
        ({"format": "zip"}, "is no index"),
        ({"surprise": 1}, "does not hold what an index holds"),
        ({"rows": 0}, "has rows of the wrong type, or out of range"),
        ({"labels": ["a"]}, "has labels of the wrong type, or out of range"),
        ({"views": 7}, "but the index says"),
    ],
)
def test_an_index_that_lies_is_refused(edit: dict[str, Any], told: str, model: FVGModel, tmp_path: Path) -> None:
    encode(model, tmp_path / "bank")
    index = tmp_path / "bank" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **edit}))
    with pytest.raises(FVGError, match=told):
        FeatureBank.load(tmp_path / "bank")
    index.write_text("[1, 2")
    with pytest.raises(FVGError, match="is not valid JSON"):
        FeatureBank.load(tmp_path / "bank")


def test_what_cannot_be_encoded_is_told(model: FVGModel, tmp_path: Path) -> None:
    with pytest.raises(FVGError, match="views is 0"):
        FeatureBank.encode(model, pictures(), views=0)
    with pytest.raises(FVGError, match="float32 or float16"):
        FeatureBank.encode(model, pictures(), dtype=torch.int8)
    nameless = [pictures()[i] for i in range(3)]
    with pytest.raises(FVGError, match="needs the labels before"):
        FeatureBank.encode(model, nameless, output=tmp_path / "bank")
    with pytest.raises(FVGError, match="is no bank written by FeatureBank"):
        FeatureBank.load(tmp_path)
    assert read_plan(encode(model, tmp_path / "bank") and tmp_path / "bank").views == 3


def test_the_published_recipe_runs_from_a_bank(model: FVGModel) -> None:
    result = fit(model, encode(model, None), recipe=RECIPES["coop"].fvg, seed=2)
    assert len(result.losses) == 10 and result.losses[-1] < result.losses[0]
