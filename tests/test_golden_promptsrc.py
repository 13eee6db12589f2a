"""PromptSRC against the authors' numbers (golden/README.md), against CLIP written out in loops, and its traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from conftest import Golden
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import PromptSRC
from fvg_adapter.tuners.averaging import GaussianAverage, gaussian_weights
from fvg_adapter.tuners.prompts import fill
from fvg_adapter.tuners.promptsrc import MAX_TEMPLATES
from fvg_adapter.tuners.recipes import dassl_learning_rate
from fvg_adapter.tuners.templates import PROMPTSRC_TEMPLATES

TERMS = {"ce": "loss_ce", "scl_text": "loss_scl_text", "scl_image": "loss_scl_image", "scl_logits": "loss_scl_logits"}
FEW = ("a photo of a {}.", "a bad photo of a {}.", "the origami {}.")


def close(actual: Any, expected: Tensor, atol: float = 1e-4) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=atol, rtol=0)


def make(case: Golden, clip: CLIPModel, tokenizer: Any) -> PromptSRC:
    config = case.config
    tuner = PromptSRC(
        clip,
        tokenizer,
        config["classnames"],
        n_ctx_text=config["n_ctx_text"],
        n_ctx_vision=config["n_ctx_vision"],
        prompt_depth_text=config["prompt_depth_text"],
        prompt_depth_vision=config["prompt_depth_vision"],
        ctx_init=config["ctx_init"],
        text_loss_weight=config["text_loss_weight"],
        image_loss_weight=config["image_loss_weight"],
    )
    missing, unexpected = tuner.load_state_dict(case.under("param"), strict=False)
    assert not missing
    assert not unexpected
    return tuner


def test_promptsrc(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("promptsrc")
    tuner = make(case, golden_clip, tokenizer)
    output = tuner(case["images"], case["labels"])
    close(tuner.text_features(), case["text_features"])
    close(tuner.image_features(case["images"]), case["image_features"])
    close(tuner.prior_image_features(case["images"]), case["zs_image_features"])
    close(output.logits, case["logits"])
    for ours, theirs in TERMS.items():
        close(output.losses[ours], case[theirs])
    close(output.loss, case["loss"])
    output.loss.backward()
    for name, gradient in case.under("grad").items():
        close(getattr(tuner, name).grad, gradient, 1e-4 * float(gradient.abs().max()))
    settings = {k: v for k, v in case.config["optimizer"].items() if k != "name"}
    torch.optim.SGD(tuner.trainable_parameters(), **settings).step()
    for name, expected in case.under("step1").items():
        close(getattr(tuner, name), expected, 1e-5)


def test_scores_alone_and_other_classes(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("promptsrc")
    tuner = make(case, golden_clip, tokenizer).eval()
    with torch.no_grad():
        output = tuner(case["images"])
        close(output.logits, case["eval/logits"])
        assert output.loss is None
        with tuner.use_classes(case.config["new_classnames"]):
            close(tuner.text_features(), case["new/text_features"])
            close(tuner(case["images"]).logits, case["new/logits"])


def test_context_starts_at_the_words(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = PromptSRC(golden_clip, tokenizer, ["cat"])
    close(tuner.text_ctx, golden("promptsrc")["init/text_ctx"], 0)
    for name, shape in (("text_deep", (8, 4, 48)), ("vision_ctx", (4, 64)), ("vision_deep", (8, 4, 64))):
        parameter = getattr(tuner, name)
        assert tuple(parameter.shape) == shape
        assert 0.015 < float(parameter.detach().std()) < 0.025


def test_hidden_states_layer_by_layer(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("promptsrc")
    tuner = make(case, golden_clip, tokenizer)
    seen: dict[str, Tensor] = {}

    def record(name: str, layers: Any) -> None:
        for k, layer in enumerate(layers, 1):
            layer.register_forward_hook(
                lambda m, a, out, key=f"{name}/{k:02d}": seen.update({key: out[0] if isinstance(out, tuple) else out})
            )

    record("hidden_text", golden_clip.text_model.encoder.layers)
    record("hidden_vision", golden_clip.vision_model.encoder.layers)
    with torch.no_grad():
        tuner(case["images"])
    for k in range(1, 13):
        close(seen[f"hidden_vision/{k:02d}"], case[f"hidden_vision/{k:02d}"])
        ours, theirs = seen[f"hidden_text/{k:02d}"], case[f"hidden_text/{k:02d}"]
        for row, end in enumerate(case["eot_index"].tolist()):
            close(ours[row, : end + 1], theirs[row, : end + 1])


def test_the_teacher_has_the_authors_60_prompts(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("promptsrc")
    expected = case["teacher_input_ids"]  # (60, C, 77), padded with 0
    assert len(PROMPTSRC_TEMPLATES) == len(expected) == 60
    for template, rows in zip(PROMPTSRC_TEMPLATES, expected, strict=True):
        for name, row in zip(case.config["classnames"], rows, strict=True):
            ids = tokenizer(fill(template, name))["input_ids"]
            assert ids == row[: len(ids)].tolist()
            assert int(row[len(ids) :].sum()) == 0


def test_the_teacher_is_the_mean_before_normalisation(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("promptsrc")
    tuner = make(case, golden_clip, tokenizer)
    close(tuner.teacher_features(), F.normalize(case["fixed_embeddings_raw_mean"], dim=-1), 1e-5)
    assert not tuner.teacher_features().requires_grad
    first = tuner.teacher_features()
    assert tuner.teacher_features() is first  # 60 · C prompts are encoded once
    tuner.set_classes(case.config["new_classnames"])
    assert tuner.teacher_features().shape == (5, 32)


# -- other sizes: CLIP written out -----------------------------------------------------------------------------------


def naive_features(
    clip: CLIPModel, tokenizer: Any, tuner: PromptSRC, words: str, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    n = len(tuner.text_ctx)
    tokens, ends = naive_clip.embedded(clip, tokenizer, [f"{words} {c}." for c in tuner.classes])
    text_deep = getattr(tuner, "text_deep", [])
    texts = naive_clip.text(
        clip,
        naive_clip.put(tokens, tuner.text_ctx, 1),
        ends,
        lambda k, x: naive_clip.put(x, text_deep[k - 2], 1) if 2 <= k <= len(text_deep) + 1 else x,
    )
    behind, deep = getattr(tuner, "vision_ctx", None), getattr(tuner, "vision_deep", [])
    assert n == len(tuner.text_ctx)
    hidden = naive_clip.vision(
        clip,
        pixels,
        lambda k, x: naive_clip.put(x, deep[k - 2], x.shape[1] - deep.shape[1]) if 2 <= k <= len(deep) + 1 else x,
        behind,
    )
    return F.normalize(texts, dim=-1), F.normalize(naive_clip.image(clip, hidden), dim=-1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_depth_text": 1, "prompt_depth_vision": 1}, "a photo of a"),
        ({"prompt_depth_text": 12, "prompt_depth_vision": 3, "n_ctx_vision": 7}, "a photo of a"),
        ({"prompt_depth_text": 3, "prompt_depth_vision": 0}, "a photo of a"),
        ({"n_ctx_text": 2, "prompt_depth_text": 4, "prompt_depth_vision": 2}, "a photo of a"),  # "of a" stays
        ({"n_ctx_text": 6, "prompt_depth_text": 2, "prompt_depth_vision": 12}, "X X X X X X"),  # beyond 4: no words
        ({"n_ctx_text": 3, "ctx_init": "", "prompt_depth_text": 2, "prompt_depth_vision": 2}, "X X X"),
    ],
)
def test_other_sizes(
    options: dict[str, Any], words: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    tuner = PromptSRC(golden_clip, tokenizer, ["golden_retriever", "737-800"], teacher_templates=FEW, **options)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = golden("promptsrc")["images"][:3]
    tuner.set_classes(["golden retriever", "737-800"])
    texts, pictures = naive_features(golden_clip, tokenizer, tuner, words, images)
    close(tuner.text_features(), texts)
    close(tuner.image_features(images), pictures)
    assert tuner.changes_images == (options["prompt_depth_vision"] > 0)
    names = {n for n, p in tuner.named_parameters() if p.requires_grad}
    assert ("text_deep" in names) == (options["prompt_depth_text"] > 1)
    assert ("vision_ctx" in names) == (options["prompt_depth_vision"] > 0)
    assert ("vision_deep" in names) == (options["prompt_depth_vision"] > 1)
    output = tuner(images, torch.tensor([0, 1, 0]))
    assert torch.isfinite(output.loss)
    if not options["prompt_depth_vision"]:
        close(output.losses["scl_image"], torch.tensor(0.0), 1e-6)


def test_losses_of_another_batch(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    """By the formulas, for B ≠ C ≠ 4 and other weights."""
    case = golden("promptsrc")
    names = ["cat", "dog", "a car"]
    tuner = PromptSRC(
        golden_clip,
        tokenizer,
        names,
        teacher_templates=FEW,
        text_loss_weight=3,
        image_loss_weight=2,
        prompt_depth_text=2,
    )
    images, labels = case["images"][:2], torch.tensor([2, 0])
    output = tuner(images, labels)
    t, v = tuner.text_features(), tuner.image_features(images)
    f = torch.zeros(3, 32)
    for template in FEW:
        tokens, ends = naive_clip.embedded(golden_clip, tokenizer, [template.replace("{}", n) for n in names])
        f += naive_clip.text(golden_clip, tokens, ends, lambda k, x: x).detach() / len(FEW)
    f, s = F.normalize(f, dim=-1), golden_clip.logit_scale.exp()
    z = F.normalize(naive_clip.image(golden_clip, naive_clip.vision(golden_clip, images, lambda k, x: x)), dim=-1)
    p, r = (s * z @ f.T).softmax(-1), (s * v @ t.T).softmax(-1)
    close(output.losses["scl_text"], 3 * (t - f).abs().sum() / (3 * 32))
    close(output.losses["scl_image"], 2 * (v - z).abs().sum() / (2 * 32))
    close(output.losses["scl_logits"], (p * (p.log() - r.log())).sum() / (2 * 3))


# -- Gaussian weight averaging ---------------------------------------------------------------------------------------


def test_gaussian_weights(golden: Callable[[str], Golden]) -> None:
    case = golden("promptsrc_gpa")
    for name, expected in case.under("gauss").items():
        epochs, mean, std = (float("".join(c for c in part if c.isdigit())) for part in name.split("_"))
        close(gaussian_weights(int(epochs), mean, std), expected, 1e-12)
    close(gaussian_weights(4, 3, 1.2), case["gpa_weights"], 1e-12)
    far = gaussian_weights(3, 400, 1)  # exp(−79 000) would be 0 / 0
    assert torch.isfinite(far).all()
    assert float(far.sum()) == pytest.approx(1)


def test_golden_averaging(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("promptsrc_gpa")
    config = case.config
    tuner = make(case, golden_clip, tokenizer)
    settings = {k: v for k, v in config["optimizer"].items() if k != "name"}
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), **settings)
    average = GaussianAverage(config["epochs"], config["gpa_mean"], config["gpa_std"])
    for epoch in range(1, config["epochs"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = dassl_learning_rate(epoch - 1, settings["lr"], config["epochs"])
        loss = tuner(case["images"], case["labels"]).loss
        assert float(loss.detach()) == pytest.approx(float(case["losses"][epoch - 1]), abs=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(tuner, epoch)
        for name, expected in case.under(f"epoch{epoch}").items():
            close(getattr(tuner, name), expected)
    average.apply(tuner)
    for name, expected in case.under("gpa").items():
        if name != "eval_logits":
            close(getattr(tuner, name), expected, 1e-3)
    with torch.no_grad():
        close(tuner(case["images"]).logits, case["gpa/eval_logits"], 1e-3)


def test_the_released_setting_is_the_default(small_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = PromptSRC(small_clip, tokenizer, ["cat"], prompt_depth_text=1, prompt_depth_vision=1)
    assert float(tuner.weight_average(10).weights[-1]) == pytest.approx(0.996, abs=1e-3)


def test_an_interrupted_average_goes_on(small_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = PromptSRC(small_clip, tokenizer, ["cat"], prompt_depth_text=1, prompt_depth_vision=1)
    whole, first, second = (GaussianAverage(3, 2, 1) for _ in range(3))
    values = []
    for epoch in range(1, 4):
        with torch.no_grad():
            tuner.text_ctx.add_(float(epoch))
        values.append(tuner.text_ctx.detach().clone())
        whole.update(tuner, epoch)
        if epoch < 3:
            first.update(tuner, epoch)
    second.load_state_dict(first.state_dict())
    second.update(tuner, 3)
    expected = sum(g * v for g, v in zip(gaussian_weights(3, 2, 1).tolist(), values, strict=True))
    for average in (whole, second):
        average.apply(tuner)
        close(tuner.text_ctx, expected, 1e-6)
    with pytest.raises(FVGError, match="2 of 3 epochs were averaged"):
        first.apply(tuner)
    with pytest.raises(FVGError, match="epoch 3 of 3 is to be averaged next, but 1 was given"):
        first.update(tuner, 1)
    one = GaussianAverage(1)
    one.update(tuner, 1)
    with torch.no_grad():
        tuner.text_ctx.zero_()
    one.apply(tuner)
    close(tuner.text_ctx, expected, 1e-6)  # the last epoch is all there is
    for wrong in ({"epochs": 0}, {"epochs": 3, "std": 0}):
        with pytest.raises(FVGError, match="at least 1 epoch and std above 0, but got"):
            GaussianAverage(**wrong)  # type: ignore[arg-type]


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_depth_text": 3}, "prompt_depth_text is 3, but the text tower has 2 layers"),
        ({"prompt_depth_vision": 5}, "prompt_depth_vision is 5, but the vision tower has 2 layers"),
        ({"prompt_depth_text": 0}, "prompt_depth_text is 0"),
        ({"n_ctx_text": 0}, "n_ctx_text is 0"),
        ({"n_ctx_text": 3, "ctx_init": "a photo"}, "'a photo' has 2 tokens, but n_ctx_text is 3"),
        ({"n_ctx_text": 76}, "tokens, but the text tower holds 77"),
        ({"teacher_templates": ()}, "teacher_templates is empty"),
        ({"teacher_templates": ("photo",)}, "exactly one"),
        ({"teacher_templates": ("a {}.",) * (MAX_TEMPLATES + 1)}, f"prompts; at most {MAX_TEMPLATES}"),
        ({"prompt_depth_vision": -1}, "prompt_depth_vision -1; at least 1 and 0 are needed"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str, small_clip: CLIPModel, tokenizer: Any) -> None:
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small_clip.modules()]
    with pytest.raises(FVGError, match=message):
        PromptSRC(small_clip, tokenizer, ["cat"], **{"prompt_depth_text": 2, "prompt_depth_vision": 2, **options})
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small_clip.modules()] == before
    assert all(p.requires_grad for p in small_clip.parameters())


def test_features_of_a_bank_are_refused(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = PromptSRC(small_clip, tokenizer, ["cat"], prompt_depth_text=2, prompt_depth_vision=2)
    with pytest.raises(FVGError, match="PromptSRC changes the image tower"):
        tuner(features={"image": torch.ones(1, 16)})
