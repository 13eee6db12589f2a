"""LoRA: PEFT is the oracle; CLIP-LoRA's setting; and any PEFT adapter as a ready tuner."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_wrapping import assert_same, snapshot
from torch import Tensor
from transformers import CLIPModel

from fvg_adapter import load, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp, LoRA, ZeroShot
from fvg_adapter.untrusted import sha256_of

NAMES = ["cat", "dog", "hot_air_balloon"]
LABELS = torch.tensor([0, 1, 2, 0])


def close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=atol, rtol=0)


def shaken(model: Any) -> Any:
    """Adapters away from zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def test_the_default_is_clip_loras_setting(small_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = LoRA(small_clip, tokenizer, NAMES)
    config = tuner.encoder.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 1, 0.25)
    adapted = [n for n, m in small_clip.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert len(adapted) == 2 * 2 * 3  # towers, layers, query key value
    assert all(n.endswith(("q_proj", "k_proj", "v_proj")) for n in adapted)
    assert small_clip.get_submodule(adapted[0]).scaling["default"] == pytest.approx(1 / math.sqrt(2))
    assert sum(p.numel() for p in tuner.trainable_parameters()) == sum(
        2 * (m.in_features + m.out_features) for m in (small_clip.get_submodule(n) for n in adapted)
    )


@pytest.mark.parametrize(
    ("towers", "images", "texts"), [("vision", True, False), ("text", False, True), ("both", True, True)]
)
def test_towers(towers: Any, images: bool, texts: bool, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    plain = ZeroShot(copy.deepcopy(small_clip), tokenizer, NAMES)
    tuner = shaken(LoRA(small_clip, tokenizer, NAMES, towers=towers))
    assert tuner.changes_images == images
    for changed, ours, theirs in (
        (images, tuner.image_features(pixels), plain.image_features(pixels)),
        (texts, tuner.text_features(), plain.text_features()),
    ):
        assert (float((ours - theirs).detach().abs().max()) > 1e-3) == changed
    close(tuner.prior_image_features(pixels), plain.image_features(pixels))
    close(tuner.prior_text_features(), plain.text_features())


def test_it_starts_at_the_plain_clip(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    expected = ZeroShot(copy.deepcopy(small_clip), tokenizer, NAMES)(pixels).logits
    close(LoRA(small_clip, tokenizer, NAMES)(pixels).logits, expected)


def test_equal_to_peft(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any) -> None:
    """Trained here, the same logits in PEFT's own hands."""
    twin = copy.deepcopy(small_clip)
    tuner = LoRA(small_clip, tokenizer, NAMES)
    optimizer = torch.optim.AdamW(tuner.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = tuner.train()(pixels, LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = tuner.eval()(pixels).logits
    folder = tuner.save_pretrained(tmp_path / "saved")
    peft = PeftModel.from_pretrained(twin, str(folder / "lora")).eval()
    ids = tokenizer([f"a photo of a {n.replace('_', ' ')}." for n in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        close(peft(**ids, pixel_values=pixels).logits_per_image, expected, 1e-5)
    text = (folder / "lora" / "adapter_config.json").read_text()
    assert str(tmp_path) not in text
    assert sorted(p.name for p in (folder / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_dropout_acts_in_training_alone(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = shaken(LoRA(small_clip, tokenizer, NAMES))

    def moves() -> float:
        first, second = tuner(pixels).logits, tuner(pixels).logits
        return float((first - second).detach().abs().max())

    assert moves() == 0  # not before train()
    tuner.train()
    assert moves() > 1e-3
    assert not small_clip.vision_model.encoder.layers[0].mlp.training
    tuner.eval()
    assert moves() == 0
    tuner.train()
    model = wrap(tuner).train()
    with torch.no_grad():
        model(pixels, LABELS)
    assert moves() == 0  # frozen features have no dropout


@pytest.mark.parametrize("as_tuner", [ZeroShot, LoRA])
def test_a_peft_model_is_a_ready_tuner(
    as_tuner: Any, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any
) -> None:
    plain = ZeroShot(copy.deepcopy(small_clip), tokenizer, NAMES)
    config = LoraConfig(r=3, target_modules=r".*(q_proj|fc1)", modules_to_save=["visual_projection"])
    made = shaken(get_peft_model(copy.deepcopy(small_clip), config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.0 + torch.rand_like(parameter))
    made.save_pretrained(str(tmp_path / "peft"))
    peft = PeftModel.from_pretrained(small_clip, str(tmp_path / "peft")).eval()
    ids = tokenizer([f"a photo of a {n.replace('_', ' ')}." for n in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = peft(**ids, pixel_values=pixels).logits_per_image
    tuner = as_tuner(peft, tokenizer, NAMES)
    close(tuner(pixels).logits, expected, 1e-5)
    assert tuner.changes_images
    close(tuner.prior_image_features(pixels), plain.image_features(pixels))
    close(tuner.prior_text_features(), plain.text_features())
    with peft.disable_adapter(), torch.no_grad():  # cached features notice
        close(tuner.text_features(), plain.text_features())
    tuner.detach()
    with torch.no_grad():
        close(peft(**ids, pixel_values=pixels).logits_per_image, expected)


def test_another_peft_method(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any) -> None:
    config = IA3Config(target_modules=r".*(k_proj|v_proj|fc2)", feedforward_modules=r".*fc2")
    plain = ZeroShot(copy.deepcopy(small_clip), tokenizer, NAMES)
    twin = copy.deepcopy(small_clip)
    tuner = shaken(LoRA(small_clip, tokenizer, NAMES, peft_config=config))
    close(tuner.prior_image_features(pixels), plain.image_features(pixels))
    expected = tuner(pixels).logits
    again = load(tuner.save_pretrained(tmp_path / "saved"), clip=twin, tokenizer=tokenizer)
    close(again(pixels).logits, expected, 0)
    tuner.detach()
    close(ZeroShot(small_clip, tokenizer, NAMES)(pixels).logits, plain(pixels).logits, 0)


def test_adapters_that_are_there_can_be_tuned_further(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    peft = get_peft_model(small_clip, LoraConfig(target_modules=r".*q_proj"))
    tuner = LoRA(peft, tokenizer, NAMES)
    assert all("lora_" in n for n, p in tuner.named_parameters() if p.requires_grad)
    assert len(tuner.trainable_parameters()) == 8
    tuner(pixels, LABELS).loss.backward()
    assert tuner.detach() is peft
    assert hasattr(small_clip.vision_model.encoder.layers[0].self_attn.q_proj, "lora_A")


def test_the_active_one_of_two_adapters_learns_and_both_are_kept(
    small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    peft = get_peft_model(small_clip, LoraConfig(r=2, target_modules=r".*q_proj"))
    peft.add_adapter("other", LoraConfig(r=3, target_modules=r".*q_proj"))
    shaken(peft)
    values = {n: p.detach().clone() for n, p in peft.named_parameters() if "lora_" in n}
    tuner = LoRA(peft, tokenizer, NAMES)
    learning = [n for n, p in tuner.named_parameters() if p.requires_grad]
    assert len(learning) == 8 and all(".default." in n for n in learning)
    state = tuner.state_dict()
    assert sum(".other." in n for n in state) == sum(".default." in n for n in state) == 8
    tuner.half()  # of the CLIP; adapters learn in full precision
    own = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    assert len(own) == 16
    for name, parameter in own.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, values[name]), name


def test_ranks_by_layer_come_back(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any) -> None:
    twin, plain = copy.deepcopy(small_clip), copy.deepcopy(small_clip)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 5}
    )
    tuner = LoRA(shaken(get_peft_model(small_clip, config)), tokenizer, NAMES)
    folder = tuner.save_pretrained(tmp_path / "saved")
    loaded = load(folder, clip=twin, tokenizer=tokenizer)
    close(loaded(pixels).logits, tuner(pixels).logits, 0)
    assert {m.lora_A["default"].weight.shape[0] for n, m in twin.named_modules() if n.endswith("k_proj")} == {3}
    for key in ("k-proj", "(a+)+$", "x" * 301):
        record = json.loads((folder / "lora/adapter_config.json").read_text())
        (folder / "lora/adapter_config.json").write_text(json.dumps({**record, "rank_pattern": {key: 3}}))
        saved = json.loads((folder / "config.json").read_text())
        saved["sha256"]["lora/adapter_config.json"] = sha256_of(folder / "lora/adapter_config.json")
        (folder / "config.json").write_text(json.dumps(saved))
        with pytest.raises(FVGError, match="in rank_pattern; the name of a module is expected"):
            load(folder, clip=plain, tokenizer=tokenizer)


@pytest.mark.parametrize("layers", [0, [0], [0, 1], None])
def test_adapters_in_some_layers_come_back(
    layers: Any, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any
) -> None:
    twin = copy.deepcopy(small_clip)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=layers)
    tuner = LoRA(shaken(get_peft_model(small_clip, config)), tokenizer, NAMES)
    loaded = load(tuner.save_pretrained(tmp_path / "saved"), clip=twin, tokenizer=tokenizer)
    close(loaded(pixels).logits, tuner(pixels).logits, 0)
    assert [n for n, _ in twin.named_modules() if n.endswith("lora_A")] == [
        n for n, _ in small_clip.named_modules() if n.endswith("lora_A")
    ]


def test_the_prior_needs_unmerged_weights(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    peft = shaken(get_peft_model(small_clip, LoraConfig(target_modules=r".*q_proj")))
    tuner = ZeroShot(peft, tokenizer, NAMES)
    expected = tuner.prior_image_features(pixels)
    peft.merge_adapter()
    with pytest.raises(FVGError, match="merged into the CLIP's weights.*unmerge_adapter"):
        tuner.prior_image_features(pixels)
    peft.unmerge_adapter()
    close(tuner.prior_image_features(pixels), expected, 1e-5)


def test_prompts_on_an_adapted_clip(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    plain = ZeroShot(copy.deepcopy(small_clip), tokenizer, NAMES)
    tuner = CoOp(shaken(get_peft_model(small_clip, LoraConfig(target_modules=r".*q_proj"))), tokenizer, NAMES)
    assert tuner.changes_images  # its features cannot serve as the plain CLIP's
    close(tuner.prior_image_features(pixels), plain.image_features(pixels))
    close(wrap(tuner).views(pixels).prior, plain.image_features(pixels))


def test_what_does_not_fit(small_clip: CLIPModel, tokenizer: Any, tmp_path: Any) -> None:
    state = list(small_clip.state_dict())
    with pytest.raises(FVGError, match="PEFT refused the config"):
        LoRA(small_clip, tokenizer, NAMES, peft_config=LoraConfig(target_modules=["no_such_layer"]))
    assert list(small_clip.state_dict()) == state
    assert all(p.requires_grad for p in small_clip.parameters())
    assert "peft_config" not in small_clip.__dict__
    with pytest.raises(FVGError, match="towers 'vission' is unknown. Did you mean 'vision'"):
        LoRA(small_clip, tokenizer, NAMES, towers="vission")  # type: ignore[arg-type]
    peft = get_peft_model(copy.deepcopy(small_clip), LoraConfig(target_modules=r".*q_proj"))
    with pytest.raises(FVGError, match="8 adapted layers already|4 adapted layers already"):
        LoRA(peft, tokenizer, NAMES, peft_config=LoraConfig())
    folder = ZeroShot(peft, tokenizer, NAMES).save_pretrained(tmp_path / "zero")
    with pytest.raises(FVGError, match="saved on a CLIP with PEFT adapters"):
        load(folder, clip=copy.deepcopy(small_clip), tokenizer=tokenizer)


def test_files_that_do_not_fit(small_clip: CLIPModel, tokenizer: Any, tmp_path: Any) -> None:
    plain = copy.deepcopy(small_clip)
    folder = LoRA(small_clip, tokenizer, NAMES).save_pretrained(tmp_path / "saved")
    weights = folder / "lora" / "adapter_model.safetensors"
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=r".*q_proj"))
    with pytest.raises(FVGError, match="has adapters already; give the plain CLIP"):
        load(folder, clip=adapted, tokenizer=tokenizer)
    other = LoRA(copy.deepcopy(plain), tokenizer, NAMES, towers="text").save_pretrained(tmp_path / "other")
    weights.write_bytes((other / "lora" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(FVGError, match="sha256 differs"):
        load(folder, clip=plain, tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]["lora/adapter_model.safetensors"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FVGError, match="does not fit: missing"):
        load(folder, clip=plain, tokenizer=tokenizer)
    assert not any(hasattr(m, "lora_A") for m in plain.modules())
    weights.unlink()
    with pytest.raises(FVGError, match="has no lora/adapter_model"):
        load(folder, clip=plain, tokenizer=tokenizer)


def test_a_damaged_adapter_is_refused_before_the_model_is_touched(
    small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(small_clip)
    whole = LoRA(small_clip, tokenizer, NAMES).save_pretrained(tmp_path / "whole")
    weights, settings = "lora/adapter_model.safetensors", "lora/adapter_config.json"
    config = json.loads((whole / "config.json").read_text())
    del config["sha256"][weights], config["sha256"][settings]  # so that no hash tells
    (whole / "config.json").write_text(json.dumps(config))

    def cut(folder: Path) -> None:
        (folder / weights).write_bytes((folder / weights).read_bytes()[:-8])

    def not_finite(folder: Path) -> None:
        tensors = load_file(folder / weights)
        tensors[min(tensors)][0, 0] = math.nan
        save_file(tensors, folder / weights)

    def never(*unused: Any, **unused_too: Any) -> None:
        raise AssertionError("the model was touched")

    monkeypatch.setattr(LoRA, "__init__", never)
    before = snapshot(plain)
    for number, (damage, told) in enumerate(
        (
            (lambda folder: shutil.rmtree(folder / "lora"), "has no lora/adapter_model"),
            (lambda folder: (folder / weights).unlink(), "has no lora/adapter_model"),
            (lambda folder: (folder / settings).unlink(), "adapter_config.json is no file"),
            (lambda folder: (folder / settings).write_text("{"), "not valid JSON"),
            (cut, "no whole safetensors file"),
            (not_finite, "NaN or infinite"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder)
        with pytest.raises(FVGError, match=told):
            load(folder, clip=plain, tokenizer=tokenizer)
        assert_same(before, snapshot(plain))


def test_files_without_the_adapters_say_so(
    small_clip: CLIPModel, tokenizer: Any, tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    peft = shaken(get_peft_model(small_clip, LoraConfig(r=2, target_modules=r".*q_proj")))
    tuner = ZeroShot(peft, tokenizer, NAMES)
    with pytest.warns(UserWarning, match="are not in the files of a ZeroShot"):
        tuner.save_pretrained(tmp_path / "without")
    tuner.detach()
    recwarn.clear()
    LoRA(peft, tokenizer, NAMES).save_pretrained(tmp_path / "with")
    assert not [w for w in recwarn if "PEFT adapters" in str(w.message)]
