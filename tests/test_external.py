"""External: FVG-PT's own golden numbers through two functions, and a Dassl-style CustomCLIP behind the heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from conftest import Golden
from fvg_adapter import FVGConfig, FVGModel, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp, External, ZeroShot

NAMES = [f"class {i}" for i in range(5)]
NEW_NAMES = [f"new {i}" for i in range(4)]


def close(actual: Any, expected: Tensor, atol: float = 1e-9) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, atol=atol, rtol=0)


def by_name(case: Golden, prefix: str = "") -> Callable[[tuple[str, ...]], Tensor]:
    """Text features by class name, as a user's text tower would give them."""
    rows = torch.cat([case[f"{prefix}text_features"], case[f"new_{prefix}text_features"]])
    table = dict(zip(NAMES + NEW_NAMES, rows, strict=True))
    return lambda classes: torch.stack([table[name] for name in classes])


@pytest.fixture
def fvg(golden: Callable[[str], Golden]) -> tuple[Golden, FVGModel]:
    """FVG-PT behind functions that give the golden features in float64, with the golden heads."""
    case = golden("fvg")
    tuner = External(
        image_features=lambda pixels: case["image_features"][: len(pixels)],
        text_features=by_name(case),
        prior_image_features=lambda pixels: case["prior_image_features"][: len(pixels)],
        prior_text_features=by_name(case, "prior_"),
        classes=NAMES,
        logit_scale=case.config["logit_scale_exp"],
    )
    config = FVGConfig(bottleneck=case.config["adapter_hidden"], gate_hidden=case.config["gate_hidden"])
    model = wrap(tuner, config=config, foreground="given").double()
    model.load_state_dict(case.under("param"))
    return case, model


def batch(case: Golden) -> dict[str, Tensor]:
    return {
        "image": case["image_features"],
        "foreground": case["foreground_features"],
        "prior": case["prior_image_features"],
        "mask_area": case["mask_area"],
        "usable": case["usable"],
    }


def test_golden_fvg_training(fvg: tuple[Golden, FVGModel]) -> None:
    case, model = fvg
    model.train()
    settings = case.config["sgd"]
    optimizer = torch.optim.SGD(model.trainable_parameters(), **settings)
    output = model(features=batch(case), labels=case["labels"])
    for name in ("base_ce", "frg", "distill", "new_ce", "new_kl"):
        close(output.losses[name], case[name])
    close(output.loss, case["loss"])
    close(output.logits_base, case["z_fdc"])
    close(output.logits_new, case["z_pc"])
    close(output.foreground_trust, case["foreground_trust"])
    close(output.prior_trust, case["prior_trust"])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in case.under("grad").items():
        close(parameters[name].grad, gradient)
    optimizer.step()
    for name, expected in case.under("step1").items():
        if name != "loss":
            close(parameters[name], expected)
    optimizer.zero_grad()
    loss = model(features=batch(case), labels=case["labels"]).loss
    close(loss, case["step1/loss"])
    loss.backward()
    optimizer.step()
    for name, expected in case.under("step2").items():
        close(parameters[name], expected)


def test_golden_fvg_scores(fvg: tuple[Golden, FVGModel]) -> None:
    case, model = fvg
    model.eval()
    pixels = torch.zeros(6, 3, 8, 8)
    assert model(pixels).logits.dtype == torch.float64
    close(model(pixels, branch="base").logits, case["z_fdc"])
    close(model(pixels, branch="new").logits, case["z_pc"])
    with model.use_classes(NAMES + NEW_NAMES):
        close(model(pixels, branch="new").logits, case["joint_z_pc"])
        close(model(pixels).logits, case["joint_log_probs"])


def test_the_numbers_notice_a_float32_step(fvg: tuple[Golden, FVGModel]) -> None:
    case, model = fvg
    model.float().eval()
    with pytest.raises(AssertionError):
        close(model(torch.zeros(6, 3, 8, 8), branch="base").logits, case["z_fdc"])


# -- a trainer's CustomCLIP ------------------------------------------------------------------------------------------


class PromptLearner(nn.Module):
    """Learned context words, as the Dassl family writes them."""

    def __init__(self, clip: CLIPModel, n_ctx: int = 2) -> None:
        super().__init__()
        self.ctx = nn.Parameter(0.02 * torch.randn(n_ctx, clip.config.text_config.hidden_size))


class CustomCLIP(nn.Module):
    """The shape of a Dassl trainer's model: image_encoder, prompt_learner, text_encoder, logit_scale."""

    def __init__(self, clip: CLIPModel, tokenizer: Any) -> None:
        super().__init__()
        self.image_encoder = clip.get_image_features
        self.text_encoder = clip.get_text_features
        self.prompt_learner = PromptLearner(clip)
        self.logit_scale = clip.logit_scale
        self.tokenizer = tokenizer
        self.table = clip.text_model.embeddings.token_embedding

    def encode_image(self, pixels: Tensor) -> Tensor:
        output = self.image_encoder(pixel_values=pixels)
        return output if isinstance(output, Tensor) else output.pooler_output

    def encode_text(self, classes: tuple[str, ...]) -> Tensor:
        texts = [f"X X {name.replace('_', ' ')}." for name in classes]
        ids = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        ctx = self.prompt_learner.ctx

        def learned(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return torch.cat([out[:, :1], ctx.expand(len(out), -1, -1), out[:, 1 + len(ctx) :]], 1)

        handle = self.table.register_forward_hook(learned)
        try:
            output = self.text_encoder(input_ids=ids)
        finally:
            handle.remove()
        return output if isinstance(output, Tensor) else output.pooler_output

    def forward(self, pixels: Tensor, classes: tuple[str, ...]) -> Tensor:
        image = F.normalize(self.encode_image(pixels), dim=-1)
        return self.logit_scale.exp() * image @ F.normalize(self.encode_text(classes), dim=-1).T


@pytest.fixture
def custom(small_clip: CLIPModel, tokenizer: Any) -> CustomCLIP:
    torch.manual_seed(3)
    return CustomCLIP(small_clip, tokenizer)


def as_tuner(custom: CustomCLIP, clip: CLIPModel, **options: Any) -> External:
    return External(
        image_features=custom.encode_image,
        text_features=custom.encode_text,
        classes=["cat", "hot_dog", "bird"],
        clip=clip,
        tokenizer=custom.tokenizer,
        model=custom,
        **options,
    )


def test_custom_clip_scores_as_itself(custom: CustomCLIP, small_clip: CLIPModel, pixels: Tensor) -> None:
    tuner = as_tuner(custom, small_clip)
    expected = custom(pixels, tuner.classes).detach()
    close(tuner(pixels).logits, expected, 1e-5)
    plain = ZeroShot(small_clip, custom.tokenizer, ["cat", "hot_dog", "bird"])
    close(tuner.prior_text_features(), plain.text_features(), 1e-6)
    close(tuner.prior_image_features(pixels), plain.image_features(pixels), 1e-6)
    with tuner.use_classes(["snow_leopard", "car"]):
        close(tuner(pixels).logits, custom(pixels, ("snow_leopard", "car")).detach(), 1e-5)


def test_fvg_behind_a_custom_clip_trains_heads_only(custom: CustomCLIP, small_clip: CLIPModel, pixels: Tensor) -> None:
    tuner = as_tuner(custom, small_clip)
    model = wrap(tuner, config=FVGConfig(init_std=0.0))
    assert not custom.training
    close(model.eval()(pixels).logits, custom(pixels, tuner.classes).detach(), 1e-4)
    learned = {id(p) for p in model.trainable_parameters()}
    assert all(id(p) not in learned for p in custom.parameters())
    output = model.train()(pixels, torch.tensor([0, 1, 2, 0]))  # the functions run the CLIP, so its attention is seen
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert custom.prompt_learner.ctx.grad is None


def test_frozen_text_is_asked_for_once_and_never_stale(
    custom: CustomCLIP, small_clip: CLIPModel, pixels: Tensor
) -> None:
    calls = []

    def counted(classes: tuple[str, ...]) -> Tensor:
        calls.append(classes)
        return custom.encode_text(classes)

    tuner = External(
        custom.encode_image, counted, classes=["cat", "dog"], clip=small_clip, tokenizer=custom.tokenizer, model=custom
    )
    tuner.requires_grad_(False)
    before = tuner.text_features()
    assert torch.equal(tuner.text_features(), before)
    assert len(calls) == 1
    with torch.no_grad():
        custom.prompt_learner.ctx.add_(1.0)
    assert not torch.equal(tuner.text_features(), before)


def test_gradients_reach_the_functions_while_they_learn(
    custom: CustomCLIP, small_clip: CLIPModel, pixels: Tensor
) -> None:
    tuner = as_tuner(custom, small_clip)
    tuner(pixels, torch.tensor([0, 1, 2, 0])).loss.backward()
    assert custom.prompt_learner.ctx.grad is not None


def test_another_tuner_can_be_the_functions(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    inner = CoOp(small_clip, tokenizer, ["cat", "dog"])

    def texts(classes: tuple[str, ...]) -> Tensor:
        with inner.use_classes(classes):
            return inner.text_features()

    tuner = External(inner.image_features, texts, classes=["cat", "dog"], clip=small_clip, tokenizer=tokenizer)
    close(tuner(pixels).logits, inner(pixels).logits.detach(), 1e-5)


# -- what does not fit ---------------------------------------------------------------------------------------------


def give(rows: int, width: int) -> Callable[[Any], Tensor]:
    return lambda _: torch.ones(rows, width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no prior.*clip=.*prior_image_features=… and prior_text_features=…"),
        ({"prior_image_features": give(2, 4)}, "no prior.*prior_text_features=…"),
        ({"prior_image_features": give(2, 4), "prior_text_features": give(2, 4)}, "logit_scale is missing"),
    ],
)
def test_what_is_missing_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FVGError, match=message):
        External(give(2, 4), give(2, 4), classes=["a", "b"], **options)


def test_a_clip_without_a_tokenizer(small_clip: CLIPModel) -> None:
    with pytest.raises(FVGError, match="tokenizer is missing"):
        External(give(2, 16), give(2, 16), classes=["a", "b"], clip=small_clip)


def without_clip(image: Any, text: Any, **options: Any) -> External:
    return External(
        image,
        text,
        classes=["a", "b"],
        prior_image_features=give(2, 4),
        prior_text_features=give(2, 4),
        logit_scale=10.0,
        **options,
    )


def test_features_that_do_not_fit() -> None:
    tuner = without_clip(give(2, 5), give(2, 4))
    with pytest.raises(FVGError, match="image_features gave features of width 5, but feature_dim is 4"):
        tuner.image_features(torch.zeros(2, 3, 8, 8))
    with pytest.raises(FVGError, match=r"image_features gave \(2, 5\); expected a tensor of shape \(3, D\)"):
        tuner.image_features(torch.zeros(3, 3, 8, 8))
    with pytest.raises(FVGError, match=r"text_features gave list"):
        without_clip(give(2, 4), lambda classes: [1, 2])


def test_attention_without_a_tower_is_refused_and_given_masks_work() -> None:
    tuner = without_clip(give(2, 4), give(2, 4))
    pixels, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    tuner.train()
    with pytest.raises(FVGError, match="needs a vision tower, but this External tuner has no CLIP"):
        wrap(tuner, foreground="attention")
    assert tuner.training and tuner.hook_count == 0  # as it was
    model = FVGModel(without_clip(lambda p: torch.ones(len(p), 4), give(2, 4)), foreground="given").train()
    mask = torch.zeros(2, 8, 8)
    mask[:, :4] = 1
    assert torch.isfinite(model(pixels, labels, mask).loss)


def test_files_hold_the_heads_and_say_so(tmp_path: Any) -> None:
    model = wrap(without_clip(give(2, 4), give(2, 4)), foreground="given")
    folder = model.save_pretrained(tmp_path / "saved")
    assert (folder / "fvg_heads.safetensors").is_file()
    with pytest.raises(FVGError, match="no file holds"):
        External.rebuild({}, {}, nn.Identity(), None)
