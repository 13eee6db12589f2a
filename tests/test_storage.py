"""Files: bit-equal after loading, for other classes too, whole or untouched, and refused when they do not fit."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection

from conftest import CLASSES, GOLDEN, NEW_CLASSES, small_config
from fvg_adapter import FVGConfig, FVGModel, files, load, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.replacing import read_whole
from fvg_adapter.storage import read
from fvg_adapter.tuners import CoOp, LoRA, ZeroShot
from fvg_adapter.untrusted import sha256_of


@pytest.fixture
def model(small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    torch.manual_seed(0)
    model = wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init=""), foreground="given").eval()
    with torch.no_grad():
        model.visual_adapter.up.weight.normal_(std=0.1)
    return model


def test_saved_and_loaded_logits_are_bit_equal(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md", "config.json", "fvg_heads.safetensors", "tuner.safetensors",
    ]  # fmt: skip
    lists = [CLASSES, NEW_CLASSES, [*CLASSES, *NEW_CLASSES]]
    expected = []
    for names in lists:
        with model.use_classes(names), torch.no_grad():
            expected.append(model(pixels).logits)
    loaded = load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer)
    assert isinstance(loaded, FVGModel) and not loaded.training
    assert loaded.classes == loaded.base_classes == tuple(CLASSES)
    for names, logits in zip(lists, expected, strict=True):
        with loaded.use_classes(names), torch.no_grad():
            assert torch.equal(loaded(pixels).logits, logits)
    other = load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer, classes=NEW_CLASSES)
    assert other.classes == tuple(NEW_CLASSES)
    with torch.no_grad():
        assert torch.equal(other(pixels).logits, expected[1])


def test_a_vision_tower_with_given_text_features(pixels: Tensor, tmp_path: Path) -> None:
    """Its classes' features are in the file; a part of them can be scored, others cannot."""
    vision = CLIPVisionModelWithProjection(small_config().vision_config).eval()
    model = wrap(vision, classes={name: torch.randn(16) for name in CLASSES}).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(pixels).logits
        assert torch.equal(load(tmp_path, clip=vision)(pixels).logits, wanted)
        some = load(tmp_path, clip=vision, classes=CLASSES[1:3])(pixels).logits
    torch.testing.assert_close(some, wanted[:, 1:3], atol=1e-4, rtol=0)
    with pytest.raises(FVGError, match="no text feature was given"):
        load(tmp_path, clip=vision, classes=NEW_CLASSES)


def test_features_of_another_number_of_classes_are_refused(pixels: Tensor, tmp_path: Path) -> None:
    vision = CLIPVisionModelWithProjection(small_config().vision_config).eval()
    tuner = ZeroShot(vision, None, {name: torch.randn(16) for name in CLASSES})
    tuner.save_pretrained(tmp_path)
    save_file({"class_features": torch.randn(2, 16)}, tmp_path / "tuner.safetensors")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["sha256"] = {name: sha256_of(tmp_path / name) for name in config["sha256"]}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FVGError, match=rf"{len(CLASSES)} classes, but .* \(2, 16\)"):
        ZeroShot.from_pretrained(tmp_path, clip=vision)


def test_the_base_model_is_found_through_its_id(tmp_path: Path, pixels: Tensor) -> None:
    from transformers import AutoTokenizer

    clip = CLIPModel.from_pretrained(GOLDEN / "model")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    tuner = CoOp(clip, tokenizer, CLASSES)
    tuner.save_pretrained(tmp_path / "prompts")
    record = json.loads((tmp_path / "prompts/config.json").read_text())["base_model"]
    assert record["id"] == "local" and record["path"] == str(tmp_path / "clip")
    images = torch.randn(2, 3, 64, 64)
    loaded = load(tmp_path / "prompts")
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, tuner(images).logits)
    again = CoOp.from_pretrained(tmp_path / "prompts", classes=NEW_CLASSES)
    assert again.classes == tuple(NEW_CLASSES) and again.base_classes == tuple(CLASSES)
    with pytest.raises(FVGError, match="holds a CoOp, not a ZeroShot"):
        ZeroShot.from_pretrained(tmp_path / "prompts")
    (tmp_path / "clip/config.json").unlink()
    with pytest.raises(FVGError, match="could not be loaded"):
        load(tmp_path / "prompts")


def test_a_base_model_without_an_id(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(FVGError, match="give it as clip="):
        load(tmp_path / "a")


def test_another_base_model_is_refused(model: FVGModel, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    twin = CLIPModel(small_config())  # the same shapes, other values
    with pytest.raises(FVGError, match="hash"):
        load(tmp_path / "a", clip=twin, tokenizer=tokenizer)
    wide = CLIPModel(small_config(num_hidden_layers=3))
    with pytest.raises(FVGError, match="vision_layers 2, but the model given has vision_layers 3"):
        load(tmp_path / "a", clip=wide, tokenizer=tokenizer)


def test_half_precision_copies_are_the_same_base_model(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a", clip=small_clip.half(), tokenizer=tokenizer)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rehash(folder: Path, name: str) -> None:
    hashes = json.loads((folder / "config.json").read_text())["sha256"]
    edit(folder, sha256={**hashes, name: sha256_of(folder / name)})


def test_bad_files_are_refused(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = sum(len(m._forward_hooks) for m in small_clip.modules())

    def refused(message: str, change: Any) -> None:
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        change(folder)
        with pytest.raises(FVGError, match=message):
            load(folder, clip=small_clip, tokenizer=tokenizer)

    heads = "fvg_heads.safetensors"

    def renamed(folder: Path) -> None:
        tensors = load_file(folder / heads)
        tensors["visual_adapter.sideways.weight"] = tensors.pop("visual_adapter.down.weight")
        save_file(tensors, folder / heads)
        rehash(folder, heads)

    def misshapen(folder: Path) -> None:
        tensors = load_file(folder / heads)
        tensors["backbone_gate.out.bias"] = torch.zeros(2)
        save_file(tensors, folder / heads)
        rehash(folder, heads)

    def pickled(folder: Path) -> None:
        torch.save({}, folder / heads)
        rehash(folder, heads)

    def beside_a_pickle(folder: Path) -> None:
        (folder / heads).rename(folder / "heads.bin")

    refused("format version 2, but this fvg_adapter reads up to 1", lambda f: edit(f, format_version=2))
    refused("format_version 'new'", lambda f: edit(f, format_version="new"))
    refused("no fvg_adapter config", lambda f: edit(f, format="other"))
    refused("lacks 'base_model'", lambda f: edit(f, base_model=None))
    refused("not valid JSON", lambda f: (f / "config.json").write_text("{"))
    refused("has no config.json", lambda f: (f / "config.json").unlink())
    refused(f"has no {heads}", lambda f: (f / heads).unlink())
    refused("no whole safetensors file", lambda f: (f / heads).write_bytes((f / heads).read_bytes()[:-10]))
    refused("fvg_heads.safetensors is no whole safetensors file but a pickle, which can run code", pickled)
    for protocol in (2, 3, 4, 5):
        bare = pickle.dumps({"x": list(range(100))}, protocol=protocol)
        refused("file but a pickle", lambda f, bare=bare: (f / heads).write_bytes(bare))
    refused("sha256 differs", lambda f: save_file({"a": torch.zeros(1)}, f / heads))
    refused("missing visual_adapter.down.weight; unexpected visual_adapter.sideways", renamed)
    refused(r"backbone_gate.out.bias is \(2,\), expected \(1,\)", misshapen)
    refused("'copo', which is not registered here. Did you mean 'coop'", lambda f: edit(f, tuner={"kind": "copo"}))
    refused("arguments do not fit", lambda f: edit(f, tuner={"kind": "coop", "arguments": {"n_token": 3}}))
    refused(rf"has no {heads}, .*whole folder. It holds pickle files \(heads.bin\)", beside_a_pickle)
    refused("lists a file '../x'", lambda f: edit(f, sha256={"../x": "0"}))
    monkeypatch.setattr("fvg_adapter.storage.MAX_CLASSES", 5)
    refused(r"'classes' holds 6 class names; more than 5 are not read", lambda f: edit(f, base_classes=CLASSES[:5]))
    monkeypatch.setattr("fvg_adapter.storage.MAX_CLASSES", 6)
    load(model.save_pretrained(tmp_path / "whole"), clip=small_clip, tokenizer=tokenizer).release().detach()
    assert sum(len(m._forward_hooks) for m in small_clip.modules()) == hooks  # failed loads left nothing


def test_settings_come_back(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    settings = FVGConfig(
        bottleneck=5, gate_hidden=7, temperature=2.0, attended_view=0.3, image_mean=(0.1, 0.2, 0.3), trust="half"
    )
    base = [*CLASSES, "one more"]
    model = FVGModel(ZeroShot(small_clip, tokenizer, CLASSES), settings, foreground="whole", base_classes=base)
    model.set_classes(NEW_CLASSES)
    config = json.loads((model.save_pretrained(tmp_path / "a") / "config.json").read_text())
    assert config["preprocessing"] == {
        "image_size": [32, 32], "image_mean": [0.1, 0.2, 0.3], "image_std": list(settings.image_std),
    }  # fmt: skip
    assert (config["kind"], config["foreground"], config["base_classes"]) == ("fvg", "whole", base)
    loaded = load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer)
    assert isinstance(loaded, FVGModel) and loaded.config == settings and loaded.foreground == "whole"
    assert loaded.base_classes == tuple(base) and loaded.classes == tuple(NEW_CLASSES)
    assert loaded.saved_in == tmp_path / "a" and loaded.about == {}
    assert loaded.wraps_clip and not load_tuned(small_clip, tokenizer, tmp_path).wraps_clip


def load_tuned(clip: CLIPModel, tokenizer: Any, folder: Path) -> Any:
    saved = wrap(CoOp(clip, tokenizer, CLASSES), foreground="given").save_pretrained(folder / "tuned")
    return load(saved, clip=clip, tokenizer=tokenizer)


def test_given_text_features_need_no_tokenizer(small_clip: CLIPModel, tmp_path: Path, pixels: Tensor) -> None:
    from transformers import CLIPVisionModelWithProjection

    vision = CLIPVisionModelWithProjection(small_clip.config.vision_config).eval()
    features = {name: torch.randn(16) for name in CLASSES}
    model = wrap(vision, classes=features, foreground="given")
    model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a", clip=vision)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model.eval()(pixels).logits)


def test_what_is_told_of_files(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model.save_pretrained(tmp_path / "a")
    versions = json.loads((folder / "config.json").read_text())["versions"]
    assert versions["torch"] == importlib.metadata.version("torch") and all(versions.values())
    with caplog.at_level(logging.INFO, logger="fvg_adapter"):
        load(folder, clip=small_clip, tokenizer=tokenizer).release().detach()
    assert f"loading a FVGModel from {folder}" in caplog.messages
    heads = folder / "fvg_heads.safetensors"
    save_file({**load_file(heads), "x" * 200: torch.zeros(1)}, heads)
    rehash(folder, heads.name)
    with pytest.raises(FVGError, match="unexpected x{80}[^x]"):
        load(folder, clip=small_clip, tokenizer=tokenizer)
    heads.rename(folder / "heads.bin")
    with pytest.raises(FVGError, match=r"whole folder\. It holds pickle files \(heads.bin\)"):
        read(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FVGError, match="there is no folder"):
        load(tmp_path / "absent")
    with pytest.raises(FVGError, match="could not be loaded from the Hub"):
        load("me/absent", local_files_only=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_old_files(
    model: FVGModel, tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    if exists:
        model.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if exists else None

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.json, "dumps", full)
    with pytest.raises(FVGError, match="No space left on device"):
        model.save_pretrained(target)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if exists else [])
    if exists:
        assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_saving_over_an_earlier_save_keeps_other_files(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("mine")
    with torch.no_grad():
        model.tuner.ctx.add_(1.0)
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "mine"
    assert torch.equal(load_file(tmp_path / "a/tuner.safetensors")["ctx"], model.tuner.ctx)
    with pytest.raises(FVGError, match="is a file"):
        model.save_pretrained(tmp_path / "a/README.md")


def test_heads_are_half_a_megabyte(tokenizer: Any, tmp_path: Path) -> None:
    from fvg_adapter.heads import BottleneckAdapter, ReliabilityGate

    parts = [BottleneckAdapter(512), BottleneckAdapter(512), ReliabilityGate(), ReliabilityGate()]
    save_file({f"{i}.{k}": v for i, m in enumerate(parts) for k, v in m.state_dict().items()}, tmp_path / "x")
    assert 0.5e6 < (tmp_path / "x").stat().st_size < 0.6e6


def test_a_bfloat16_copy_is_the_same_base_model(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a", clip=small_clip.to(torch.bfloat16), tokenizer=tokenizer)


def test_a_save_that_fails_half_way_is_taken_back(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    model.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with torch.no_grad():
        model.tuner.ctx.add_(1.0)
    replace, calls = Path.replace, []

    def fails_once(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fails_once)
    with pytest.raises(FVGError, match="No space left"):
        model.save_pretrained(target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    load(target, clip=small_clip, tokenizer=tokenizer)
    assert model.save_pretrained(tmp_path / "b", is_main_process=False) == tmp_path / "b"
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows replaces no open file")
def test_a_large_file_that_is_replaced_while_its_base_model_loads(
    small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files above `SMALL_BYTES` are read when their tensors are asked for, which is long after their config was."""
    monkeypatch.setattr("fvg_adapter.untrusted.SMALL_BYTES", 0)
    tuner = CoOp(small_clip, tokenizer, CLASSES)
    folder = tuner.save_pretrained(tmp_path / "a")
    wanted = tuner.ctx.detach().clone()
    _, _, tensors = read_whole(folder, read)
    with torch.no_grad():
        tuner.ctx.add_(1.0)
    tuner.save_pretrained(folder)
    assert torch.equal(tensors["tuner.safetensors"]["ctx"], wanted)
    assert torch.equal(read_whole(folder, read)[2]["tuner.safetensors"]["ctx"], wanted + 1)


def test_a_lora_config_that_is_replaced_while_its_base_model_loads(
    small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    tuner = LoRA(small_clip, tokenizer, CLASSES)
    folder = tuner.save_pretrained(tmp_path / "a")
    tuner.detach()
    _, config, tensors = read_whole(folder, read)
    record = json.loads((folder / "lora/adapter_config.json").read_text())
    (folder / "lora/adapter_config.json").write_text(json.dumps({**record, "lora_alpha": 9}))
    other = r"lora.adapter_config.json is not the file that was saved with this config.json \(its sha256 differs\)"
    with pytest.raises(FVGError, match=other):
        load(folder, clip=small_clip, tokenizer=tokenizer)
    with pytest.raises(FVGError, match="sha256 differs"):
        LoRA.rebuild(config, tensors, small_clip, tokenizer, folder=folder)
