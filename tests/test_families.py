"""Every supported family of dual encoders against transformers' own eager attention, features and logits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fvg_adapter import record_attention, unwrap, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder, packed
from fvg_adapter.tuners import MMRL, CoOp, KgCoOp, LoRA, PromptSRC, ZeroShot

NAMES = ["snow leopard", "car", "a bird's nest"]
ALL = [*families.IMAGE_FAMILIES, *families.COMPOSED]
WITH_TEXT = [name for name in ALL if name != "aimv2"]


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def eager_attention(model: Any) -> tuple[Tensor, ...]:
    """(B, heads, N, N) of every layer, by transformers itself."""
    tower = DualEncoder(model).vision
    if DualEncoder(model).layout.packed:
        values: Any = packed(images(), 8)
        values["attention_mask" if "attention_mask" in _parameters(tower) else "pixel_attention_mask"] = None
    else:
        values = {"pixel_values": images()}
    kept: list[Tensor] = []
    handles = []
    for layer in DualEncoder(model).vision_layers:  # SigLIP of transformers 4.57 does not pass them on
        attention = DualEncoder(model).attention_of(layer)
        handles.append(attention.register_forward_hook(lambda m, a, o: kept.append(o[1])))
    output = tower(**values, output_attentions=True)
    for handle in handles:
        handle.remove()
    return tuple(kept) if output.attentions is None else tuple(a for a in output.attentions if a is not None)


def _parameters(tower: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(tower.forward).parameters)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_hooks_see_eager_attention(family: str, implementation: str) -> None:
    model = families.tiny(family, "eager")
    encoder = DualEncoder(model)
    if encoder.layout.head is None:
        expected = torch.stack([a[:, :, 0, encoder.leading_tokens :] for a in eager_attention(model)], 1)
    else:
        expected = head_attention(encoder)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:  # transformers says so: BLIP, FLAVA in some versions
        assert "does not support" in str(error)
        return
    with record_attention(model, "all") as record:
        encoder.image_features(images())
    assert record.attention().shape[-2:] == (4, 4)
    torch.testing.assert_close(
        record.attention().flatten(3), expected.reshape(record.attention().flatten(3).shape), atol=1e-5, rtol=0
    )
    assert expected.std() > 1e-3  # not flat


def head_attention(encoder: DualEncoder) -> Tensor:
    """(B, 1, heads, N) of the pooling head, by hand from its inputs."""
    head = encoder.pooling_attention[0]
    kept: list[Any] = []
    handle = head.register_forward_pre_hook(lambda m, a, k: kept.append((a, k)), with_kwargs=True)
    encoder.image_features(images())
    handle.remove()
    args, _ = kept[0]
    if isinstance(head, nn.MultiheadAttention):
        return head(*args, average_attn_weights=False)[1][:, :, 0].unsqueeze(1)
    hidden = args[0]
    keys = head.k_proj(hidden).reshape(2, -1, 4, 8).transpose(1, 2)
    query = head.cls_token.reshape(1, 1, 4, 8).transpose(1, 2)
    return (query @ keys.mT * 8**-0.5).softmax(-1)[:, :, 0].unsqueeze(1)


@pytest.mark.parametrize("family", WITH_TEXT)
@torch.no_grad()
def test_zero_shot_logits_are_the_models_own(family: str, tokenizer: Any) -> None:
    model = families.tiny(family)
    tuner = ZeroShot(model, tokenizer, NAMES)
    prompts = tuner.prior_prompts(NAMES)
    layout = tuner.encoder.layout
    values: Any = packed(images(), 8) if layout.packed else {"pixel_values": images()}
    if layout.text == "masked":
        values["attention_mask"] = prompts.attention_mask
    if family in ("flava", "chinese_clip"):  # one's forward gives no logits, the other's fails in transformers 4.57
        image = model.get_image_features(pixel_values=images())
        image = getattr(image, "pooler_output", image)
        text = model.text_model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).last_hidden_state
        text = model.text_projection(text)[:, 0]
        image = image[:, 0] if image.dim() == 3 else image
        expected = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * model.logit_scale.exp()
    else:
        expected = model(input_ids=prompts.input_ids, **values).logits_per_image
    torch.testing.assert_close(tuner(images()).logits, expected, atol=2e-4, rtol=1e-5)
    assert expected.std(dim=1).min() > 0 and expected.shape == (2, 3)
    assert prompts.input_ids.shape[1] == (32 if layout.text == "last" else int(prompts.attention_mask.sum(1).max()))


@pytest.mark.parametrize("family", ALL)
def test_wrap_trains_the_heads_and_gives_the_model_back(family: str, tokenizer: Any) -> None:
    model = families.tiny(family)
    before = copy.deepcopy(model.state_dict())
    encoder = DualEncoder(model)
    classes: Any = NAMES if encoder.has_text else {n: torch.randn(encoder.feature_dim) for n in NAMES}
    wrapped = wrap(model, tokenizer if encoder.has_text else None, classes)
    output = wrapped(images(), torch.tensor([0, 2]))
    output.loss.backward()
    assert output.loss.isfinite() and wrapped.visual_adapter.up.weight.grad.abs().sum() > 0
    assert wrapped.eval()(images(), return_attention=True).foreground_attention.shape == (2, 4, 4)
    assert unwrap(wrapped) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [ZeroShot, CoOp, KgCoOp])
@pytest.mark.parametrize("family", ["siglip", "siglip2"])
@torch.no_grad()
def test_the_bias_reaches_every_branch_and_no_answer(family: str, kind: Any, tokenizer: Any) -> None:
    model = families.tiny(family)
    model.logit_bias.fill_(-7.25)
    tuner = kind(model, tokenizer, NAMES)
    wrapped = wrap(tuner).eval()
    wrapped.visual_adapter.up.weight.zero_()
    wrapped.text_adapter.up.weight.zero_()
    cosines = tuner.image_features(images()) @ tuner.text_features().T
    expected = model.logit_scale.exp() * cosines - 7.25
    for branch in ("base", "new"):  # where nothing is learned yet both are the tuner's
        torch.testing.assert_close(wrapped(images(), branch=branch).logits, expected, atol=1e-3, rtol=1e-5)
    joint = wrapped(images(), branch="joint").logits
    torch.testing.assert_close(joint, expected.log_softmax(-1), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", [CoOp, KgCoOp, PromptSRC])
@pytest.mark.parametrize("family", WITH_TEXT)
def test_prompts_learn_in_every_text_tower(family: str, kind: Any, tokenizer: Any) -> None:
    options = {"prompt_depth_text": 2, "prompt_depth_vision": 2} if kind is PromptSRC else {}
    tuner = kind(families.tiny(family), tokenizer, NAMES, **options)
    plain = tuner.prior_text_features()
    loss = tuner(images(), torch.tensor([0, 2])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.trainable_parameters())
    if kind is not PromptSRC:  # starts at the words of the template, so at the plain CLIP
        torch.testing.assert_close(tuner.text_features(), plain, atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(tuner.text_features(), plain, atol=1e-3)
    torch.testing.assert_close(tuner.prior_text_features(), plain)


@pytest.mark.parametrize("family", WITH_TEXT)
def test_lora_learns_in_every_family(family: str, tokenizer: Any) -> None:
    tuner = LoRA(families.tiny(family), tokenizer, NAMES)
    tuner(images(), torch.tensor([0, 2])).loss.backward()
    learned = [p.grad is not None for p in tuner.trainable_parameters()]
    assert learned and all(learned)


@pytest.mark.parametrize("family", ["siglip", "altclip", "blip"])
def test_mmrl_says_what_it_needs(family: str, tokenizer: Any) -> None:
    with pytest.raises(FVGError, match=f"causal text tower.*{family}'s are not.*CoOp"):
        MMRL(families.tiny(family), tokenizer, NAMES, rep_layers=[2])


def test_mmrl_takes_causal_families(tokenizer: Any) -> None:
    tuner = MMRL(families.tiny("metaclip_2"), tokenizer, NAMES, rep_layers=[2], rep_dim=8)
    tuner(images(), torch.tensor([0, 2])).loss.backward()
    assert tuner.rep_tokens.grad.abs().sum() > 0


def llava(vision: Any, **options: Any) -> Any:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 60}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=59, **options
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


WORDS = torch.tensor([[1] + [59] * 16 + [5, 6]] * 2)


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_a_tower_inside_a_larger_model(adapted: bool) -> None:
    model = llava(transformers.CLIPVisionConfig(**families.VISION), vision_feature_layer=-2)
    tower = next(m for m in model.modules() if type(m).__name__ == "CLIPVisionModel")
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with record_attention(model, "all") as record:
        model(input_ids=WORDS, pixel_values=images())
    with record_attention(tower, "all") as direct:
        tower(pixel_values=images())
    kept: list[Tensor] = []
    tower.set_attn_implementation("eager")
    encoder = DualEncoder(tower)
    hooks = [
        encoder.attention_of(x).register_forward_hook(lambda m, a, o: kept.append(o[1])) for x in encoder.vision_layers
    ]
    tower(pixel_values=images(), output_attentions=True)
    assert len(hooks) == 3 and record.attention().shape == (2, 3, 4, 4, 4)
    torch.testing.assert_close(record.attention(), direct.attention())
    expected = torch.stack([a[:, :, 0, 1:].unflatten(-1, (4, 4)) for a in kept], 1)
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_siglip_tower_inside_a_larger_model() -> None:
    model = llava(transformers.SiglipVisionConfig(**families.VISION), vision_feature_select_strategy="full")
    with record_attention(model) as record:
        model(input_ids=WORDS, pixel_values=images())
    tower = next(m for m in model.modules() if type(m).__name__ == "SiglipVisionModel")
    expected = head_attention(DualEncoder(tower)).reshape(2, 1, 4, 4, 4)
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)


def test_several_towers_are_named() -> None:
    both = nn.ModuleDict({"left": families.tiny("clip"), "right": families.tiny("siglip")})
    with (
        pytest.raises(FVGError, match=r"holds 2 vision towers \(left, right\).*record_attention\(model.left\)"),
        record_attention(both),
    ):
        pass


@torch.no_grad()
def test_video_frames_are_recorded_and_features_refused(tokenizer: Any) -> None:
    model, frames = families.tiny("xclip", "eager"), torch.randn(8, 3, 32, 32)
    with record_attention(model, "all") as record:
        output = model.vision_model(pixel_values=frames, output_attentions=True)
    assert record.attention().shape == (8, 3, 4, 4, 4)
    weights = [a for a in output.attentions if a.shape[-1] >= 17]  # beside patches and class token a message token
    expected = torch.stack([a[:, :, 0, 1:17].unflatten(-1, (4, 4)) for a in weights], 1)
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)
    with pytest.raises(FVGError, match="encodes videos"):
        ZeroShot(model, tokenizer, NAMES)


def test_texts_that_cannot_be_relied_on(tokenizer: Any) -> None:
    model = families.tiny("aimv2")
    with pytest.raises(FVGError, match="no text tower"):
        ZeroShot(model, tokenizer, NAMES)
    with pytest.raises(TypeError, match="another attention implementation"):
        DualEncoder(model).text  # noqa: B018


def test_packed_images_of_several_grids_are_refused() -> None:
    model = families.tiny("siglip2")
    both = {
        k: torch.cat([a, b])
        for (k, a), b in zip(packed(images()[:1], 8).items(), packed(images()[1:], 8).values(), strict=True)
    }
    both["spatial_shapes"][1] = torch.tensor([2, 8])
    with pytest.raises(FVGError, match=r"2 grids of patches.*one grid"), record_attention(model):
        model.get_image_features(**both)


def test_layers_of_a_tower_without_class_token() -> None:
    model = families.tiny("siglip")
    with (
        pytest.raises(FVGError, match=r"layer -2 cannot be read.*pooling head alone.*layers=\[-1\]"),
        record_attention(model, [-2]),
    ):
        pass


def headless(kind: str) -> Any:
    """A vision tower whose pooling head was left out, as larger models have it."""
    config = families.tiny(kind).config.vision_config
    torch.manual_seed(0)
    if kind == "aimv2":
        config.use_head = False
        model = transformers.Aimv2VisionModel(config)
    else:
        config.vision_use_head = False
        model = (transformers.SiglipVisionModel if kind == "siglip" else transformers.Siglip2VisionModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("kind", ["siglip", "siglip2", "aimv2"])
def test_towers_whose_head_was_left_out(kind: str, padding: int) -> None:
    """All patches look, on average: attention, rollout and relevance against eager attention and autograd."""
    if (kind == "aimv2" and "aimv2" not in ALL) or (padding and kind != "siglip2"):
        return
    model = headless(kind)
    values: Any = {"pixel_values": images()}
    if kind == "siglip2":
        values = packed(images(), 8)
        values["pixel_values"] = F.pad(values["pixel_values"], (0, 0, 0, padding), value=0.3)
        mask = torch.ones(2, 16 + padding)
        mask[:, 16:] = 0
        name = (
            "attention_mask" if "attention_mask" in _parameters(DualEncoder(model).vision) else "pixel_attention_mask"
        )
        values[name if DualEncoder(model).vision is model else "pixel_attention_mask"] = mask
    values["pixel_values"].requires_grad_()
    model.set_attn_implementation("eager")
    encoder, weights = DualEncoder(model), []
    hooks = [
        encoder.attention_of(x).register_forward_hook(lambda m, a, o: weights.append(o[1]))
        for x in encoder.vision_layers
    ]
    score = model(**values, output_attentions=True).last_hidden_state[:, :16].pow(2).sum((1, 2))
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(score.sum(), weights)
    n = weights[0].shape[-1]
    rollout = relevance = torch.eye(n)
    for weight, gradient in zip(weights, gradients, strict=True):
        rollout = (0.5 * weight.mean(1) + 0.5 * torch.eye(n)) @ rollout
        relevance = relevance + (weight * gradient).relu().mean(1) @ relevance
    model.set_attn_implementation("sdpa")
    with record_attention(model, "all", rollout=True, relevance=True) as record:
        again = model(**values).last_hidden_state[:, :16].pow(2).sum((1, 2))
        found = record.relevance(again)
    expected = torch.stack([w[:, :, :16, :16].mean(2) for w in weights], 1).unflatten(-1, (4, 4))
    torch.testing.assert_close(record.attention(), expected.detach(), atol=1e-5, rtol=0)
    grid = [x[:, :16, :16].mean(1).unflatten(-1, (4, 4)).detach() for x in (rollout, relevance)]
    torch.testing.assert_close(record.rollout(), grid[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, grid[1], atol=1e-4 * float(grid[1].max()), rtol=1e-3)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_fingerprints_tell_two_models_of_a_family_apart(family: str) -> None:
    one, other = families.tiny(family), families.tiny(family)
    assert DualEncoder(one).fingerprint() == DualEncoder(other).fingerprint()
    encoder = DualEncoder(other)
    for name in encoder.layout.identity:
        value = encoder._named(name)
        assert value is not None, name
    with torch.no_grad():
        target = encoder._named(encoder.layout.identity[0])
        getattr(target, "weight", target).add_(1.5)
    assert DualEncoder(one).fingerprint() != encoder.fingerprint()


# -- rollout and relevance ---------------------------------------------------------------------------------------------


def naive_rollout(model: Any) -> Tensor:
    encoder = DualEncoder(model)
    with torch.no_grad():
        matrices = [a.mean(1) for a in eager_attention(model)]
        n = matrices[0].shape[-1]
        total = torch.eye(n).expand(2, n, n)
        for matrix in matrices:
            total = (0.5 * matrix + 0.5 * torch.eye(n)) @ total
        row = total[:, :1] if encoder.layout.head is None else head_attention(encoder).mean(2) @ total
    return row[:, 0, encoder.leading_tokens :].reshape(2, 4, 4)


@pytest.mark.parametrize("family", ALL)
def test_rollout_is_the_product_of_the_layers(family: str) -> None:
    model = families.tiny(family, "eager")
    expected = naive_rollout(model)
    with record_attention(model, rollout=True) as record, torch.no_grad():
        DualEncoder(model).image_features(images())
    torch.testing.assert_close(record.rollout(), expected, atol=1e-6, rtol=1e-4)


CLASS_TOKEN = [name for name in WITH_TEXT if name not in ("siglip", "siglip2")]


def scored(model: nn.Module, tokenizer: Any, kept: list[Any]) -> Tensor:
    """(B, C) logits of a frozen ZeroShot, with the tower's own eager attention weights of that pass, in its graph."""
    tuner = ZeroShot(model, tokenizer, NAMES)
    with families.giving_weights(tuner.encoder.vision, kept):
        logits = tuner(images().requires_grad_()).logits
    tuner.detach()
    return logits


@pytest.mark.parametrize("layers", [(-1,), (0, 2), "all"])
@pytest.mark.parametrize("family", CLASS_TOKEN)
def test_class_relevance_is_that_of_autograd(family: str, layers: Any, tokenizer: Any) -> None:
    """The naive way: eager attention weights in the graph, their gradients by autograd, the products by hand."""
    model, kept = families.tiny(family, "eager"), []
    logits = scored(model, tokenizer, kept)
    weights = kept[-1]
    first = DualEncoder(model).leading_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        families.use(model, "sdpa" if family not in ("flava", "blip") else "eager")
    tuner = ZeroShot(model, tokenizer, NAMES)
    with record_attention(tuner, layers, relevance=True) as record:
        again = tuner(images().requires_grad_()).logits
        for label in range(len(NAMES)):
            gradients = torch.autograd.grad(logits[:, label].sum(), weights, retain_graph=True)
            n = weights[0].shape[-1]
            total = torch.eye(n).expand(2, n, n)
            for number in {"all": (0, 1, 2), (-1,): (2,)}.get(layers, layers):
                total = total + (gradients[number] * weights[number]).relu().mean(1) @ total
            expected = total[:, 0, first:].reshape(2, 4, 4).detach()
            found = record.relevance(again[:, label])
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=1e-3)
            assert expected.max() > 0


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_class_relevance_of_a_probe_is_that_of_autograd(family: str, tokenizer: Any) -> None:
    """The head's attention once more by its definition, in the model's own pass, with its weights in the graph."""
    model = families.tiny(family)
    tuner = ZeroShot(model, tokenizer, NAMES)
    head: Any = tuner.encoder.pooling_attention[0]
    kept: list[Tensor] = []

    def forward(probe: Tensor, keys: Tensor, values: Tensor, **_: Any) -> tuple[Tensor, None]:
        parts = zip(head.in_proj_weight.chunk(3), head.in_proj_bias.chunk(3), (probe, keys, values), strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (4, 8)).transpose(1, 2) for w, b, x in parts)
        kept.append((q @ k.mT * 8**-0.5).softmax(-1))  # (B, heads, 1, N)
        return head.out_proj((kept[-1] @ v).transpose(1, 2).flatten(2)), None

    expected_logits = tuner(images()).logits
    head.forward = forward
    logits = tuner(images().requires_grad_()).logits
    del head.forward
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-5)
    with record_attention(tuner, relevance=True) as record:
        again = tuner(images().requires_grad_()).logits
        for label in range(len(NAMES)):
            gradient = torch.autograd.grad(logits[:, label].sum(), kept[-1], retain_graph=True)[0]
            expected = (gradient * kept[-1]).relu().mean(1)[:, 0].reshape(2, 4, 4).detach()
            found = record.relevance(again[:, label])
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=1e-3)
            assert expected.max() > 0


@pytest.mark.parametrize("family", ["siglip", "siglip2", "aimv2"])
def test_relevance_of_a_pooling_head(family: str) -> None:
    """The gradient by the definition: the head again by hand, with its weights in the graph."""
    model = families.tiny(family)
    encoder = DualEncoder(model)
    head, direction = encoder.pooling_attention[0], torch.randn(encoder.vision_width)
    kept: list[Any] = []
    handle = head.register_forward_hook(lambda m, a, k, o: kept.append((a, o)), with_kwargs=True)
    with record_attention(model, relevance=True) as record:
        encoder.image_features(images().requires_grad_())
        args, output = kept[0]
        pooled = output[0][:, 0] if isinstance(output, tuple) else output
        found = record.relevance(pooled @ direction)
    handle.remove()
    row = head_attention(encoder)[:, 0].detach().requires_grad_()  # (B, heads, N)
    hidden = args[1] if isinstance(head, nn.MultiheadAttention) else args[0]
    if isinstance(head, nn.MultiheadAttention):
        values, project = F.linear(hidden, head.in_proj_weight[64:], head.in_proj_bias[64:]), head.out_proj
    else:
        values, project = head.v_proj(hidden), head.output_proj
    mixed = (row.unsqueeze(2) @ values.reshape(2, -1, 4, 8).transpose(1, 2)).reshape(2, 32)
    gradient = torch.autograd.grad((project(mixed) @ direction).sum(), row)[0]
    torch.testing.assert_close(found.flatten(1), (gradient * row).relu().mean(1).detach(), atol=1e-5, rtol=1e-3)


def test_relevance_of_a_class_through_tuner_and_fvg(tokenizer: Any) -> None:
    tuner = PromptSRC(families.tiny("clip"), tokenizer, NAMES, prompt_depth_text=2, prompt_depth_vision=2)
    maps = []
    for label in range(3):
        with record_attention(tuner, relevance=True, rollout=True) as record:
            logits = tuner(images().requires_grad_()).logits
            maps.append(record.relevance(logits[:, label]))
            assert torch.equal(maps[-1], record.relevance(logits[:, label]))  # may be asked for again
        assert record.rollout().shape == (2, 4, 4)
    assert not torch.allclose(maps[0], maps[1]) and maps[0].shape == (2, 4, 4)


def test_relevance_without_a_graph_says_so() -> None:
    model = families.tiny("clip").requires_grad_(False)
    with record_attention(model, relevance=True) as record:
        features = DualEncoder(model).image_features(images())
        with pytest.raises(FVGError, match=r"the score has no gradient.*pixel_values.requires_grad_\(\)"):
            record.relevance(features.sum())
        with pytest.raises(FVGError, match="does not depend on the attention"):
            DualEncoder(model).image_features(images().requires_grad_())
            record.relevance(torch.ones(1, requires_grad=True))
    with record_attention(model) as record:
        DualEncoder(model).image_features(images())
        with pytest.raises(FVGError, match="no rollout; open it with"):
            record.rollout()
        with pytest.raises(FVGError, match="no relevance; open it with"):
            record.relevance(torch.ones(1))
    with record_attention(model, rollout=True) as record, pytest.raises(FVGError, match="no rollout was recorded"):
        record.rollout()


def test_hooks_are_gone_afterwards() -> None:
    model = families.tiny("siglip")
    with record_attention(model, rollout=True, relevance=True):
        assert any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
