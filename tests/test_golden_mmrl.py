"""MMRL against the authors' numbers (golden/README.md), against CLIP written out in loops, and its traps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import naive_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from conftest import GOLDEN, Golden
from fvg_adapter import FVGConfig, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import MMRL, ZeroShot


def close(actual: Any, expected: Tensor, atol: float = 1e-4) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=atol, rtol=0)


def make(case: Golden, clip: CLIPModel, tokenizer: Any, **changed: Any) -> MMRL:
    config = case.config
    names = ("n_rep_tokens", "rep_layers", "rep_dim", "alpha", "reg_weight", "template")
    tuner = MMRL(clip, tokenizer, config["classnames"], **{**{k: config[k] for k in names}, **changed})
    missing, unexpected = tuner.load_state_dict(case.under("param"), strict=False)
    assert not missing
    assert not unexpected
    return tuner


def test_mmrl(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    output = tuner(case["images"], case["labels"])
    main, rep = tuner.both_features(case["images"])
    close(main, case["image_features"])
    close(rep, case["image_features_rep"])
    close(tuner.text_features(), case["text_features"])
    close(tuner.prior_image_features(case["images"]), case["image_features_clip"])
    close(tuner.prior_text_features(), case["text_features_clip"])
    close(output.logits, case["logits_fusion"])
    close(output.losses["ce_main"] / 0.7, case["loss_ce_main"])
    close(output.losses["ce_rep"] / 0.3, case["loss_ce_rep"])
    close(output.losses["reg_image"], case["reg_image"])
    close(output.losses["reg_text"], case["reg_text"])
    close(output.loss, case["loss"])
    output.loss.backward()
    for name, gradient in case.under("grad").items():
        close(getattr(tuner, name).grad, gradient, 1e-4 * float(gradient.abs().max()))
    settings = {k: v for k, v in case.config["optimizer"].items() if k != "name"}
    torch.optim.AdamW(tuner.trainable_parameters(), **{**settings, "betas": tuple(settings["betas"])}).step()
    for name, expected in case.under("step1").items():
        seen = case[f"grad/{name}"].abs() > 1e-5  # near zero, Adam's first step is arbitrary
        close(getattr(tuner, name)[seen], expected[seen], 1e-5)


def test_both_branches_for_tuned_and_new_classes(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer).eval()
    with torch.no_grad():
        close(tuner.logits(case["images"]), case["eval_base/prediction_scores"])
        close(tuner.logits(case["images"], branch="new"), case["eval_base/logits"])
        with tuner.use_classes(case.config["new_classnames"]):
            close(tuner.text_features(), case["eval_new/text_features"])
            close(tuner.logits(case["images"], branch="new"), case["eval_new/prediction_scores"])
            close(tuner.logits(case["images"]), case["eval_new/logits_fusion"])
            rep = tuner.scores(tuner.both_features(case["images"])[1], tuner.text_features())
            close(rep, case["eval_new/logits_rep"])


def test_hidden_states_layer_by_layer(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    seen: dict[str, Tensor] = {}
    for side in ("text", "vision"):
        for k, layer in enumerate(getattr(golden_clip, f"{side}_model").encoder.layers, 1):
            layer.register_forward_hook(
                lambda m, a, out, key=f"hidden_{side}/{k:02d}": seen.update(
                    {key: out[0] if isinstance(out, tuple) else out}
                )
            )
    with torch.no_grad():
        tuner(case["images"])
    for k in range(1, 13):
        close(seen[f"hidden_vision/{k:02d}"], case[f"hidden_vision/{k:02d}"])
        ours, theirs = seen[f"hidden_text/{k:02d}"], case[f"hidden_text/{k:02d}"]
        for row, end in enumerate((case["eot_index"] + (5 if k >= 6 else 0)).tolist()):
            close(ours[row, : end + 1], theirs[row, : end + 1])


def test_the_projected_tokens(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    for side, short in (("text", "r2t"), ("vision", "r2v")):
        weight, bias = getattr(tuner, f"{short}_weight"), getattr(tuner, f"{short}_bias")
        close(torch.einsum("nr,ldr->lnd", tuner.rep_tokens, weight) + bias[:, None], case[f"rep_{side}"])


def test_the_start_is_one_map_copied_and_a_random_projection(golden_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = MMRL(golden_clip, tokenizer, ["cat"], rep_dim=16)
    for name in ("r2t_weight", "r2t_bias", "r2v_weight", "r2v_bias"):
        value = getattr(tuner, name).detach()
        assert torch.equal(value, value[:1].expand_as(value))
        assert len(value) == 7
    assert float(tuner.proj_rep.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
    assert 0.01 < float(tuner.rep_tokens.detach().std()) < 0.03


def test_the_scale_is_100_whatever_the_clip_says(golden_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = MMRL(golden_clip, tokenizer, ["cat"], rep_dim=16)
    assert float(tuner.logit_scale) == 100
    assert float(golden_clip.logit_scale.detach().exp()) < 31


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation(attention: str, golden: Callable[[str], Golden], tokenizer: Any) -> None:
    case = golden("mmrl")
    clip = CLIPModel.from_pretrained(GOLDEN / "model", attn_implementation=attention)
    tuner = make(case, clip, tokenizer)
    close(tuner(case["images"], case["labels"]).loss, case["loss"])
    close(tuner.text_features(), case["text_features"])


def naive_features(clip: CLIPModel, tokenizer: Any, tuner: MMRL, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layers, n = tuner.arguments()["rep_layers"], len(tuner.rep_tokens)

    def edit(weight: Tensor, bias: Tensor) -> naive_clip.Edit:
        def before(k: int, x: Tensor) -> Tensor:
            if k not in layers:
                return x
            index = layers.index(k)
            tokens = tuner.rep_tokens @ weight[index].T + bias[index]
            return naive_clip.insert(x, tokens) if index == 0 else naive_clip.put(x, tokens, 1)

        return before

    tokens, ends = naive_clip.embedded(clip, tokenizer, [tuner.template.format(c) for c in tuner.classes])
    texts = naive_clip.text(clip, tokens, ends, edit(tuner.r2t_weight, tuner.r2t_bias), shift=n)
    hidden = naive_clip.vision(clip, pixels, edit(tuner.r2v_weight, tuner.r2v_bias))
    rep = clip.vision_model.post_layernorm(hidden[:, 1 : 1 + n]).mean(1) @ tuner.proj_rep
    return tuple(F.normalize(x, dim=-1) for x in (texts, naive_clip.image(clip, hidden), rep))


@pytest.mark.parametrize(
    "options",
    [
        {"rep_layers": [1]},
        {"rep_layers": [12], "n_rep_tokens": 1},
        {"rep_layers": [2, 5, 9], "n_rep_tokens": 3},  # between them the tokens are carried on
        {"rep_layers": range(1, 13), "alpha": 1.0},
        {"rep_layers": (11, 12), "n_rep_tokens": 9, "rep_dim": 7, "alpha": 0.0},
        {"rep_layers": range(6, 13), "template": "a centered satellite photo of {}."},
    ],
)
def test_other_sizes(
    options: dict[str, Any], golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    tuner = MMRL(golden_clip, tokenizer, ["golden retriever", "737-800"], **{"rep_dim": 16, **options})
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = golden("mmrl")["images"][:3]
    texts, main, rep = naive_features(golden_clip, tokenizer, tuner, images)
    close(tuner.text_features(), texts)
    close(tuner.both_features(images)[0], main)
    close(tuner.both_features(images)[1], rep)
    alpha = options.get("alpha", 0.7)
    close(tuner(images).logits, 100 * (alpha * main + (1 - alpha) * rep) @ texts.T, 1e-3)
    output = tuner(images, torch.tensor([1, 0, 1]))
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tuner.trainable_parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prompt_that_fills_the_window(attention: str, golden: Callable[[str], Golden], tokenizer: Any) -> None:
    """L + n_rep tokens are more than the text tower has positions for; the tokens need none."""
    clip = CLIPModel.from_pretrained(GOLDEN / "model", attn_implementation=attention)
    name = " ".join(["cat"] * 70)  # 77 tokens with "a photo of a", the full stop, start and end
    tuner = MMRL(clip, tokenizer, [name, "dog"], rep_dim=16, rep_layers=[3, 4])
    texts = naive_features(clip, tokenizer, tuner, golden("mmrl")["images"][:1])[0]
    close(tuner.text_features(), texts)
    with pytest.raises(FVGError, match="78 tokens, but the text tower holds 77"):
        tuner.set_classes([name + " cat"])


def test_text_features_are_not_reused_after_a_step(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = MMRL(small_clip, tokenizer, ["cat", "dog"], rep_layers=[1, 2], rep_dim=8)
    labels = torch.tensor([0, 1, 0, 1])
    before = tuner.eval()(pixels).logits.detach()
    optimizer = torch.optim.AdamW(tuner.trainable_parameters(), lr=0.1)
    tuner.train()(pixels, labels).loss.backward()
    optimizer.step()
    after = tuner.eval()
    fresh = after._text(tuner.classes)
    close(after.text_features(), fresh, 1e-6)
    assert float((after(pixels).logits - before).detach().abs().max()) > 1e-2
    tuner.requires_grad_(False)
    cached = tuner.text_features()
    assert tuner.text_features() is cached
    with torch.no_grad():
        tuner.rep_tokens.add_(1.0)
    assert float((tuner.text_features() - cached).abs().max()) > 1e-4


# -- FVG-PT behind it (METHOD section 5) -----------------------------------------------------------------------------


def test_fvg_starts_at_both_of_its_scores(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    model = wrap(tuner, config=FVGConfig(init_std=0.0)).eval()
    with torch.no_grad():
        model.backbone_gate.out.weight.zero_()
        model.backbone_gate.out.bias.fill_(-60.0)  # b = 0: the prior is not asked
        close(model(case["images"]).logits, case["eval_base/prediction_scores"])
        with model.use_classes(case.config["new_classnames"]):
            close(model(case["images"]).logits, case["eval_new/prediction_scores"])


def test_the_two_scores_enter_the_heads(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    model = wrap(tuner, config=FVGConfig(init_std=0.0))
    mask = torch.zeros(4, 64, 64)
    mask[:, 16:48, 16:48] = 1
    views = model.views(case["images"], mask)
    text = tuner.text_features()
    close(100 * views.base @ text.T, case["logits_fusion"])  # f = α v + (1 − α) r in FRG and FDC
    close(100 * views.new @ text.T, case["logits"])  # f = v in PC
    inside = case["images"] * mask[:, None]
    close(views.foreground, tuner.image_features(inside))
    plain = ZeroShot(CLIPModel.from_pretrained(GOLDEN / "model"), tokenizer, case.config["classnames"])
    close(views.prior, plain.image_features(case["images"]))
    output = model.train()(case["images"], case["labels"], mask)
    close(output.logits_base, case["logits_fusion"], 1e-3)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.trainable_parameters())


def test_where_the_patches_lie(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    """The map of a layer behind the insertion is the CLS row of its attention without CLS and the five tokens."""
    case = golden("mmrl")
    tuner = make(case, golden_clip, tokenizer)
    assert [tuner.first_patch(k) for k in (0, 4, 5, 11)] == [1, 1, 6, 6]
    rows: dict[int, Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any, k: int) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        q, keys = (p(hidden).unflatten(-1, (4, 16)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        rows[k] = (q @ keys.transpose(2, 3) / 4).softmax(-1)[:, :, 0]  # (B, heads, N)

    for k in (4, 5, 11):
        attention = golden_clip.vision_model.encoder.layers[k].self_attn
        attention.register_forward_pre_hook(partial(keep, k=k), with_kwargs=True)
    model = wrap(tuner, config=FVGConfig(attention_layers=(4, 5, 11)))
    seen = model.eval()(case["images"], return_attention=True).foreground_attention
    expected = [rows[k][..., first:].unflatten(-1, (4, 4)) for k, first in ((4, 1), (5, 6), (11, 6))]
    close(seen, torch.stack(expected, 1).mean((1, 2)), 1e-5)


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rep_layers": [1, 3]}, r"rep_layers \[1, 3\] go beyond layers 1 … 2 of the text tower"),
        ({"rep_layers": [0, 1]}, r"rep_layers \[0, 1\] go beyond layers 1 … 2"),
        ({"rep_layers": []}, "increasing numbers"),
        ({"rep_layers": [2, 1]}, "increasing numbers"),
        ({"rep_layers": [1, 1]}, "increasing numbers"),
        ({"n_rep_tokens": 0}, "n_rep_tokens is 0"),
        ({"rep_dim": 0}, "rep_dim 0"),
        ({"alpha": 1.5}, "alpha must lie"),
        ({"reg_weight": -1}, "reg_weight not below 0"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str, small_clip: CLIPModel, tokenizer: Any) -> None:
    with pytest.raises(FVGError, match=message):
        MMRL(small_clip, tokenizer, ["cat"], **{"rep_layers": [1, 2], "rep_dim": 8, **options})
    assert all(p.requires_grad for p in small_clip.parameters())


def test_inputs_that_do_not_fit(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = MMRL(small_clip, tokenizer, ["cat"], rep_layers=[1, 2], rep_dim=8)
    with pytest.raises(FVGError, match="give pixel_values or features; neither"):
        tuner()
    with pytest.raises(FVGError, match="give pixel_values or features; both"):
        tuner(pixels, features={"image": torch.ones(4, 16)})
    with pytest.raises(FVGError, match="MMRL changes the image tower"):
        tuner(features={"image": torch.ones(4, 16)})
    with pytest.raises(FVGError, match="branch 'old' is unknown"):
        tuner.image_features(pixels, branch="old")
    with pytest.raises(FVGError, match="label 3 is out of range for 1"):
        tuner(pixels, torch.tensor([0, 0, 3, 0]))
