"""`DualEncoder` against the Hugging Face calls that it stands for, on every version that pyproject admits."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from fvg_adapter.base_models import check_base_model
from fvg_adapter.layouts import LAYOUTS
from fvg_adapter.towers import (
    DualEncoder,
    attention_scale,
    head_dim,
    hidden_of,
    pooled,
    projected,
    replace_hidden,
    unwrap_peft,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {**VISION, "hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 10}
TEXT |= {"bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


def vision(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind(CLIPVisionConfig(**VISION)).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def lora(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()


IDS = torch.tensor([[58, 5, 6, 59, 0, 0], [58, 7, 8, 9, 10, 59]])


# -- reading a model ---------------------------------------------------------------------------------------------------


def test_clip(clip: CLIPModel) -> None:
    encoder = DualEncoder(clip)
    assert encoder.has_text and encoder.layout is LAYOUTS["clip"]
    assert (encoder.vision_width, encoder.text_width, encoder.feature_dim) == (32, 24, 16)
    assert (len(encoder.vision_layers), len(encoder.text_layers)) == (3, 2)
    assert (encoder.image_size, encoder.text_length) == ((32, 32), 10)
    assert encoder.token_embedding.weight.shape == (60, 24)
    assert type(encoder.attention_of(encoder.vision_layers[0])).__name__ == "CLIPAttention"
    assert hasattr(encoder.vision_embeddings, "patch_embedding")
    assert encoder.vision_encoder.layers is encoder.vision_layers
    assert (encoder.dtype, encoder.device.type) == (torch.float32, "cpu")
    assert encoder.grid(images(24, 40)) == (3, 5)
    torch.testing.assert_close(encoder.logit_scale, clip.logit_scale.exp())


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_image_features_are_hugging_faces(clip: CLIPModel, size: tuple[int, int]) -> None:
    options = {} if size == (32, 32) else {"interpolate_pos_encoding": True}
    expected = clip.visual_projection(clip.vision_model(pixel_values=images(*size), **options).pooler_output)
    assert torch.equal(DualEncoder(clip).image_features(images(*size)), expected)
    model = vision(CLIPVisionModelWithProjection)
    expected = model(pixel_values=images(*size), **options).image_embeds
    assert torch.equal(DualEncoder(model).image_features(images(*size)), expected)


def test_text_features_are_hugging_faces(clip: CLIPModel) -> None:
    expected = clip.text_projection(clip.text_model(input_ids=IDS).pooler_output)
    encoder = DualEncoder(clip)
    assert torch.equal(encoder.text_features(IDS), expected)
    mask = (IDS != 0).long()
    torch.testing.assert_close(encoder.text_features(IDS, mask), expected)
    torch.testing.assert_close(encoder.text_features(IDS[:1, :4]), expected[:1])  # trims_text: padding cannot matter


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_vision_models_have_no_text(kind: type[nn.Module]) -> None:
    encoder = DualEncoder(vision(kind))
    assert not encoder.has_text
    assert len(encoder.vision_layers) == 3 and encoder.vision_width == 32
    assert encoder.logit_scale == 100
    with pytest.raises(TypeError, match=f"{kind.__name__} has no text tower: give text features"):
        encoder.text  # noqa: B018


def test_a_projection_of_ones_own() -> None:
    model, projection = vision(CLIPVisionModel), nn.Linear(32, 7)
    encoder = DualEncoder(model, projection)
    assert encoder.feature_dim == 7
    torch.testing.assert_close(encoder.image_features(images()), projection(model(images()).pooler_output))
    assert DualEncoder(model).image_features(images()).shape == (2, 32)


def test_the_inner_tower_alone(clip: CLIPModel) -> None:
    encoder = DualEncoder(clip.vision_model)
    assert encoder.vision is DualEncoder(clip).vision
    assert len(encoder.vision_layers) == 3


def test_peft(clip: CLIPModel) -> None:
    plain = DualEncoder(clip).image_features(images())
    model = lora(clip)
    assert unwrap_peft(model) is clip and unwrap_peft(clip) is clip
    encoder = DualEncoder(model)
    assert encoder.model is clip
    tuned = encoder.image_features(images())
    assert torch.equal(tuned, pooled(model.get_image_features(pixel_values=images())))
    assert not torch.allclose(tuned, plain)  # adapters stay active


def test_embeddings_and_encoder_run_whoever_calls() -> None:
    """PEFT 0.17 calls `model.forward`, so that hooks on the model itself would be silent."""
    model = vision(CLIPVisionModel)
    encoder = DualEncoder(model)
    called: list[str] = []
    encoder.vision_embeddings.register_forward_pre_hook(lambda *_: called.append("embeddings"))
    encoder.vision_encoder.register_forward_hook(lambda *_: called.append("encoder"))
    lora(model)(pixel_values=images())
    model.forward(pixel_values=images())
    assert called == ["embeddings", "encoder"] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: nn.Linear(2, 2),
        lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        lambda: SimpleNamespace(config=SimpleNamespace(model_type="clip")),
        lambda: BertModel(BertConfig(**{**TEXT, "num_hidden_layers": 1})),
        lambda: "openai/clip-vit-base-patch16",
        lambda: None,
    ],
)
def test_what_is_no_dual_encoder(wrong: Any) -> None:
    model = wrong()
    with pytest.raises(TypeError, match=f"{type(model).__name__} is not a dual encoder.*CLIPModel.*PeftModel.*clip"):
        DualEncoder(model)


def test_reading_changes_nothing(clip: CLIPModel) -> None:
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    flags = [p.requires_grad for p in clip.parameters()]
    attributes = {name: sorted(module.__dict__) for name, module in clip.named_modules()}
    encoder = DualEncoder(clip)
    encoder.image_features(images()), encoder.text_features(IDS), encoder.fingerprint()
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())
    assert flags == [p.requires_grad for p in clip.parameters()]
    assert attributes == {name: sorted(module.__dict__) for name, module in clip.named_modules()}


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_fingerprint_tells_makers_apart_but_not_precisions(clip: CLIPModel) -> None:
    mine = DualEncoder(clip).fingerprint()
    assert mine["model_type"] == "clip" and mine["feature_dim"] == 16 and len(mine["hash"]) == 16
    for dtype in (torch.float16, torch.bfloat16):
        copied = copy.deepcopy(clip).to(dtype)
        check_base_model(copied, {"fingerprint": mine})
        check_base_model(clip, {"fingerprint": DualEncoder(copied).fingerprint()})
    assert DualEncoder(lora(copy.deepcopy(clip))).fingerprint() == mine
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.visual_projection.weight[3, 5] += 0.05
    theirs = DualEncoder(other).fingerprint()
    assert {k for k in mine if mine[k] != theirs[k]} == {"hash", "hash_by_half"}
    alone = DualEncoder(vision(CLIPVisionModelWithProjection)).fingerprint()
    assert alone["text_layers"] == 0 and alone["vision_layers"] == 3


# -- small parts -------------------------------------------------------------------------------------------------------


def test_pooled_takes_any_output() -> None:
    value = torch.ones(2, 3)
    assert pooled(value) is value
    assert pooled(SimpleNamespace(pooler_output=value)) is value
    assert pooled(SimpleNamespace(image_embeds=value, pooler_output=torch.zeros(1))) is value
    with pytest.raises(TypeError, match="no pooled features in an output of type tuple"):
        pooled((value,))


def test_hidden_states_by_position_and_by_name() -> None:
    old, new, mask = torch.zeros(1), torch.ones(1), torch.ones(2)
    for args, kwargs in [((old, mask), {}), ((), {"hidden_states": old, "attention_mask": mask})]:
        assert hidden_of(args, kwargs) is old
        changed = replace_hidden(args, kwargs, new)
        assert hidden_of(*changed) is new
        assert changed[0][1:] == args[1:] and changed[1].get("attention_mask") is kwargs.get("attention_mask")
        assert hidden_of(args, kwargs) is old  # the caller's arguments stay as they were


def test_head_sizes_under_either_name() -> None:
    for attributes in ({"head_dim": 16}, {"num_heads": 4}, {"num_attention_heads": 4}):
        module = SimpleNamespace(**attributes)
        assert head_dim(module, 64) == 16  # type: ignore[arg-type]
        assert attention_scale(module, 64) == 0.25  # type: ignore[arg-type]


def test_projections_separate_and_fused(clip: CLIPModel) -> None:
    hidden = torch.randn(2, 5, 32)
    attention = DualEncoder(clip).attention_of(DualEncoder(clip).vision_layers[0])
    assert torch.equal(projected(attention, "q_proj", hidden), attention.q_proj(hidden))  # type: ignore[operator]
    blip = BlipVisionModel(BlipVisionConfig(**{**VISION, "num_hidden_layers": 1}))
    fused = blip.encoder.layers[0].self_attn
    query, key, _ = fused.qkv(hidden).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)  # as BlipAttention reads it
    for name, expected in (("qkv[0]", query), ("qkv[1]", key)):
        assert torch.equal(projected(fused, name, hidden), expected.transpose(1, 2).flatten(2))
