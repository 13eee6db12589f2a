"""wrap and unwrap: what is accepted, what is refused, and that the user's model comes back byte-identical."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from conftest import CLASSES, NEW_CLASSES, small_config
from fvg_adapter import FVGConfig, FVGModel, unwrap, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp, ZeroShot


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a wrap could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
             "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return {
        "class": type(model),
        "signature": str(inspect.signature(model.forward)),
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": {(n, h): len(getattr(m, h)) for n, m in model.named_modules() for h in hooks},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "mode": {n: m.training for n, m in model.named_modules()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    for key in before:
        if key != "state":
            assert before[key] == after[key], key


def train_a_step(model: FVGModel, pixels: Tensor) -> None:
    masks = torch.zeros(4, 32, 32)
    masks[:, 8:24, 8:24] = 1
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(pixels, torch.tensor([0, 1, 2, 3]), masks, return_attention=True).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("foreground", ["attention", "given"])
def test_unwrap_gives_a_clip_back(
    small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, training: bool, foreground: str
) -> None:
    small_clip.train(training)
    small_clip.text_model.requires_grad_(False)
    before = snapshot(small_clip)
    model = wrap(small_clip, tokenizer, CLASSES, foreground=foreground)
    train_a_step(model, pixels)
    assert not any(p.requires_grad for p in small_clip.parameters()) and not small_clip.training
    assert unwrap(model) is small_clip
    assert_same(before, snapshot(small_clip))


def test_unwrap_gives_a_tuner_back_and_detach_the_clip(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    bare = snapshot(small_clip)
    tuner = CoOp(small_clip, tokenizer, CLASSES)
    before = snapshot(tuner)
    model = wrap(tuner)
    train_a_step(model, pixels)
    assert not tuner.ctx.requires_grad
    assert unwrap(model) is tuner
    assert_same(before, snapshot(tuner))
    assert tuner.detach() is small_clip
    assert_same(bare, snapshot(small_clip))


def test_a_peft_model_comes_back(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    peft = get_peft_model(small_clip, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    before = snapshot(peft)
    model = wrap(peft, tokenizer, CLASSES)
    train_a_step(model, pixels)
    model.train()
    assert torch.equal(model.views(pixels).base, model.views(pixels).base)  # no LoRA dropout in frozen features
    assert unwrap(model) is peft
    assert_same(before, snapshot(peft))


def test_a_failed_wrap_changes_nothing(small_clip: CLIPModel, tokenizer: Any) -> None:
    before = snapshot(small_clip)
    bad: list[dict[str, Any]] = [
        {"classes": []},
        {"classes": ["cat", "cat"]},
        {"classes": ["cat"], "template": "a photo"},
        {"classes": ["cat"], "foreground": "atention"},
        {"classes": ["cat"], "config": FVGConfig(attention_layers=(7,))},
        {"classes": ["word " * 100]},
    ]
    for arguments in bad:
        with pytest.raises((FVGError, ValueError, IndexError)):
            wrap(small_clip, tokenizer, **arguments)
        assert_same(before, snapshot(small_clip))


def test_mistakes_are_named(small_clip: CLIPModel, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="BertModel is not a dual encoder"):
        wrap(BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), tokenizer, CLASSES)
    with pytest.raises(TypeError, match="str is not a dual encoder"):
        wrap("openai/clip-vit-base-patch16", tokenizer, CLASSES)  # type: ignore[arg-type]
    with pytest.raises(FVGError, match=r"classes is one string, 'cat'; give a list"):
        wrap(small_clip, tokenizer, "cat")
    with pytest.raises(FVGError, match=r"tokenizer is a list; the order is wrap\(model, tokenizer, classes\)"):
        wrap(small_clip, ["cat", "dog"], tokenizer)
    with pytest.raises(FVGError, match="classes is missing"):
        wrap(small_clip, tokenizer)
    with pytest.raises(FVGError, match="tokenizer is missing"):
        wrap(small_clip, classes=CLASSES)
    with pytest.raises(FVGError, match="Did you mean 'attention'"):
        wrap(small_clip, tokenizer, CLASSES, foreground="atention")
    tuner = CoOp(small_clip, tokenizer, CLASSES)
    with pytest.raises(FVGError, match="brings its own tokenizer"):
        wrap(tuner, tokenizer)
    model = wrap(tuner)
    with pytest.raises(FVGError, match="wrapped already"):
        wrap(model)
    with pytest.raises(FVGError, match="FVGModel that wrap returned"):
        unwrap(tuner)  # type: ignore[arg-type]
    config = FVGConfig()
    config.trust = "always"  # type: ignore[assignment]
    with pytest.raises(FVGError, match="trust is 'always'"):
        wrap(unwrap(model), config=config)


def test_vision_towers_with_given_text_features(pixels: Tensor) -> None:
    vision = CLIPVisionModelWithProjection(small_config().vision_config)
    features = {name: torch.randn(16) for name in CLASSES}
    model = wrap(vision, classes=features)
    train_a_step(model, pixels)
    model.eval()
    with model.use_classes(CLASSES[:2]):
        assert model(pixels).logits.shape == (4, 2)
    with pytest.raises(FVGError, match="no text feature was given"):
        model.set_classes(NEW_CLASSES)
    with pytest.raises(FVGError, match=r"shape \(15,\)"):
        wrap(vision, classes={"cat": torch.randn(15)})
    with pytest.raises(FVGError, match="has no text tower"):
        wrap(vision, object(), CLASSES)


def test_vision_tower_without_projection(pixels: Tensor) -> None:
    vision = CLIPVisionModel(small_config().vision_config)
    features = {name: torch.randn(12) for name in CLASSES}
    with pytest.raises((FVGError, TypeError), match="projection"):
        wrap(vision, classes=features)
    model = wrap(vision, classes=features, projection=nn.Linear(32, 12))
    train_a_step(model, pixels)
    assert model.eval()(pixels).logits.shape == (4, 6)


def test_two_models_around_one_clip(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    with torch.no_grad():
        plain = ZeroShot(small_clip, tokenizer, CLASSES)(pixels).logits
    first = CoOp(small_clip, tokenizer, CLASSES, ctx_init="")
    second = CoOp(small_clip, tokenizer, CLASSES, ctx_init="")
    with torch.no_grad():
        alone = first(pixels).logits
        assert (alone - second(pixels).logits).abs().max() > 1e-3
        assert torch.equal(first(pixels).logits, alone)
        assert torch.equal(ZeroShot(small_clip, tokenizer, CLASSES)(pixels).logits, plain)


def test_unwrapping_in_any_order_restores_at_the_end(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    small_clip.train()
    before = snapshot(small_clip)
    first, second = wrap(small_clip, tokenizer, CLASSES), wrap(small_clip, tokenizer, CLASSES)
    unwrap(first)
    assert not small_clip.training and len(second.trainable_parameters()) == 16
    train_a_step(second, pixels)
    unwrap(second)
    assert_same(before, snapshot(small_clip))
    unwrap(second)  # a second time changes nothing
    assert_same(before, snapshot(small_clip))


def test_a_used_up_wrapper_says_so(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = CoOp(small_clip, tokenizer, CLASSES)
    model = wrap(tuner, classes=CLASSES[:3])
    unwrap(model)
    assert tuner.classes == tuple(CLASSES)
    with pytest.raises(FVGError, match="was unwrapped"):
        model(pixels)
    tuner.detach()
    with pytest.raises(FVGError, match="was detached"):
        tuner(pixels)


def test_underscores_are_spaces_in_class_lists(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = wrap(small_clip, tokenizer, ["golden_retriever", "airplane"]).eval()
    expected = model(pixels).logits
    with model.use_classes(["golden retriever", "airplane"]):
        assert model.branch_for() == "base"
        assert torch.equal(model(pixels).logits, expected)


def test_a_projection_of_several_layers(pixels: Tensor) -> None:
    vision = CLIPVisionModel(small_config().vision_config)
    projection = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 12))
    model = wrap(vision, classes={name: torch.randn(12) for name in CLASSES}, projection=projection).eval()
    assert model(pixels).logits.shape == (4, 6)
    with pytest.raises(FVGError, match="cannot be saved"):
        model.save_pretrained("/nowhere/at/all")
