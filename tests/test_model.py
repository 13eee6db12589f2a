"""FVGModel: identity at the start, branches, invariances, bad input, precision, copies."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import FVGConfig, FVGModel, wrap
from fvg_adapter.errors import ForegroundWarning, FVGError
from fvg_adapter.model import answer_score
from fvg_adapter.tuners import CoOp

LABELS = torch.tensor([0, 5, 2, 2])


def boxes(n: int = 4, size: int = 32) -> Tensor:
    """Masks of different boxes (n, H, W), all of usable area."""
    mask = torch.zeros(n, size, size)
    for i in range(n):
        mask[i, 4 : 16 + 2 * i, 6:28] = 1
    return mask


@pytest.fixture
def tuner(small_clip: CLIPModel, tokenizer: Any) -> CoOp:
    torch.manual_seed(3)
    tuner = CoOp(small_clip, tokenizer, CLASSES, ctx_init="")
    with torch.no_grad():
        tuner.ctx.normal_(std=0.5)
    return tuner


@pytest.fixture
def model(tuner: CoOp) -> FVGModel:
    torch.manual_seed(4)
    model = wrap(tuner, foreground="given")
    with torch.no_grad():  # away from the identity, so that equalities below say something
        for head in (model.visual_adapter, model.text_adapter):
            head.up.weight.normal_(std=0.05)
    return model


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def test_vit_b16_setting_has_132546_parameters(tokenizer: Any) -> None:
    slim = {"num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1}
    text = CLIPTextConfig(hidden_size=8, eos_token_id=49407, bos_token_id=49406, **slim)
    vision = CLIPVisionConfig(hidden_size=8, image_size=32, patch_size=16, **slim)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512))
    model = wrap(clip, tokenizer, CLASSES)
    assert sum(p.numel() for p in model.trainable_parameters()) == 132_546 == model.status().heads
    assert model.status().trainable == 132_546


def test_starts_at_the_tuner(tuner: CoOp, pixels: Tensor) -> None:
    tuner.clip.logit_scale.data.fill_(100.0).log_()  # s = 100
    with torch.no_grad():
        expected = tuner(pixels).logits
    exact = wrap(tuner, config=FVGConfig(init_std=0.0), foreground="given").eval()
    torch.testing.assert_close(exact(pixels, branch="base").logits, expected, atol=1e-4, rtol=0)
    exact.release()
    near = wrap(tuner, foreground="given").eval()
    moved = (near(pixels, branch="base").logits - expected).abs().max()
    assert 0 < moved < 1.0


def test_training_computes_both_branches_and_l(model: FVGModel, pixels: Tensor) -> None:
    output = model(pixels, LABELS, boxes())
    terms = output.losses
    expected = terms["base_ce"] + terms["frg"] + 10 * terms["distill"] + terms["new_ce"] + terms["new_kl"]
    close(output.loss, expected)
    assert list(terms) == ["base_ce", "frg", "distill", "new_ce", "new_kl"]
    assert output.logits_base.shape == output.logits_new.shape == (4, 6)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads.values())
    assert all(p.grad is None for p in model.tuner.parameters())


def test_training_gives_the_logits_of_the_branch_asked_for(model: FVGModel, pixels: Tensor) -> None:
    found = {branch: model(pixels, LABELS, boxes(), branch=branch) for branch in ("auto", "base", "new", "joint")}
    assert all(torch.equal(found["auto"].loss, output.loss) for output in found.values())
    assert torch.equal(found["base"].logits, found["base"].logits_base)
    assert torch.equal(found["auto"].logits, found["base"].logits)
    assert torch.equal(found["new"].logits, found["new"].logits_new)
    assert not torch.allclose(found["new"].logits, found["base"].logits)
    joint = found["joint"].logits
    with torch.no_grad():
        close(joint, model.eval()(pixels, branch="joint").logits)
    assert torch.allclose(joint.logsumexp(-1), torch.zeros(4), atol=1e-5)  # log-probabilities


def test_class_relevance_asks_each_class_in_its_own_branch(model: FVGModel, pixels: Tensor) -> None:
    names = [*NEW_CLASSES[:2], *CLASSES[:3], NEW_CLASSES[2]]
    model.eval().set_classes(names)
    for branch in ("base", "new"):
        output = model(pixels, branch=branch)
        assert torch.equal(model.class_logits(output), output.logits)
    output = model(pixels, branch="joint")
    asked = model.class_logits(output)
    for column, name in enumerate(names):
        expected = output.logits_base if name in CLASSES else output.logits_new
        assert torch.equal(asked[:, column], expected[:, column]), name
    answers = output.logits.argmax(-1).tolist()
    expected = torch.stack([asked[row, answer] for row, answer in enumerate(answers)])
    assert torch.equal(answer_score(model, output), expected)
    tuned = model.tuner(pixels)
    assert torch.equal(answer_score(model.tuner, tuned), tuned.logits.max(-1).values)


def test_the_constructor_alone_looks_at_the_attention(tuner: CoOp) -> None:
    model = FVGModel(tuner)
    assert model.foreground == model.status().foreground == "attention" and model.config == FVGConfig()
    assert model.training and not tuner.training


def test_a_callable_is_asked_with_the_classes_of_a_batch_in_training_alone(tuner: CoOp, pixels: Tensor) -> None:
    asked: list[Any] = []

    def masks(images: Tensor, classes: Any = None) -> Tensor:
        asked.append(classes)
        return boxes(len(images))

    model = wrap(tuner, foreground=masks)
    model(pixels, LABELS)
    assert asked == [[CLASSES[label] for label in LABELS]]
    model(pixels, LABELS, boxes())  # a given mask is taken
    model.eval()(pixels, LABELS)
    assert len(asked) == 1


def test_features_need_the_attended_view_at_inference_alone(tuner: CoOp, pixels: Tensor) -> None:
    model = wrap(tuner, foreground="whole", config=FVGConfig(attended_view=0.3))
    features = {"image": tuner.image_features(pixels).detach()}
    assert bool(model(features=features, labels=LABELS).loss.isfinite())
    with pytest.raises(FVGError, match="these features lack 'attended'"):
        model.eval()(features=features)


def test_evaluation_computes_the_branch_asked_for_alone(model: FVGModel, pixels: Tensor) -> None:
    model.eval()
    base = model(pixels, LABELS)
    assert base.logits_new is None and base.prior_trust is None and base.foreground_trust is None
    assert base.foreground_attention is None
    close(base.loss, torch.nn.functional.cross_entropy(base.logits, LABELS))
    new = model(pixels, branch="new")
    assert new.logits_base is None and new.prior_trust.shape == (4,)
    with_mask = model(pixels, foreground_mask=boxes(), return_attention=True)
    assert with_mask.foreground_trust.shape == (4,)
    assert with_mask.foreground_attention.shape == (4, 4, 4)
    close(with_mask.logits, base.logits)
    assert set(base.keys()) == {"loss", "logits", "logits_base"}


def test_auto_branch_follows_the_class_list(model: FVGModel, pixels: Tensor) -> None:
    model.eval()
    assert model.branch_for() == "base"
    with model.use_classes(NEW_CLASSES):
        assert model.branch_for() == "new"
        new = model(pixels).logits
    with model.use_classes([*CLASSES, *NEW_CLASSES]):
        assert model.branch_for() == "joint"
        joint = model(pixels)
        close(joint.logits.exp().sum(-1), torch.ones(4))
        assert joint.logits_base.shape == joint.logits_new.shape == (4, 11)
        assert model.branch_for("new") == "new"
    assert model.classes == tuple(CLASSES)
    close(joint.logits[:, 6:].softmax(-1).argmax(-1).float(), new.argmax(-1).float())


def test_permuting_classes_permutes_logits(model: FVGModel, pixels: Tensor) -> None:
    model.eval()
    order = [3, 0, 5, 1, 4, 2]
    for names in (CLASSES, [*CLASSES[:3], *NEW_CLASSES[:3]]):
        with model.use_classes(names):
            expected = model(pixels).logits
        with model.use_classes([names[i] for i in order]):
            close(model(pixels).logits, expected[:, order])


@pytest.mark.parametrize("usable", ["all", "none in one half"])
def test_halves_of_a_batch_average_to_the_whole(model: FVGModel, pixels: Tensor, usable: str) -> None:
    masks = boxes()
    if usable != "all":
        masks[2:] = 0

    def gradients(*parts: slice) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        losses = [model(pixels[p], LABELS[p], masks[p]).loss / len(parts) for p in parts]
        sum(losses).backward()  # type: ignore[union-attr]
        return float(sum(losses).detach()), [p.grad.clone() for p in model.trainable_parameters()]

    whole, halves = gradients(slice(0, 4)), gradients(slice(0, 2), slice(2, 4))
    assert whole[0] == pytest.approx(halves[0], abs=1e-5)
    for a, b in zip(whole[1], halves[1], strict=True):
        close(a, b)


def test_given_masks_in_one_batch_equal_two_passes(model: FVGModel, pixels: Tensor) -> None:
    together = model.views(pixels, boxes())
    model.tuner.encoder_needs_separate_passes = True
    apart = model.views(pixels, boxes())
    close(together.base, apart.base)
    close(together.foreground, apart.foreground)


def test_attention_supplies_a_missing_mask(tuner: CoOp, pixels: Tensor) -> None:
    model = wrap(tuner)
    output = model(pixels, LABELS)
    assert output.foreground_attention.shape == (4, 4, 4)
    assert bool(output.foreground_trust.any())
    again = model(pixels, LABELS)
    assert torch.equal(output.loss, again.loss)


def test_a_callable_supplies_a_missing_mask(tuner: CoOp, pixels: Tensor) -> None:
    model = wrap(tuner, foreground=lambda images: boxes(len(images)))
    given = model(pixels, LABELS, boxes()).loss
    assert torch.equal(model(pixels, LABELS).loss, given)


def test_whole_image_control_ignores_the_view(tuner: CoOp, pixels: Tensor) -> None:
    model = wrap(tuner, foreground="whole")
    output = model(pixels, LABELS, boxes())
    views = model.views(pixels, boxes())
    assert torch.equal(views.foreground, views.base)
    assert bool(views.usable.all()) and float(views.area[0]) < 1
    assert output.losses["frg"] > 0


def test_unusable_masks_train_with_r_0(model: FVGModel, pixels: Tensor) -> None:
    masks = boxes()
    masks[1] = 0
    masks[2] = 1
    output = model(pixels, LABELS, masks)
    assert [bool(r) for r in output.foreground_trust] == [True, False, False, True]
    with pytest.warns(ForegroundWarning, match="none of a batch's masks is usable"):
        empty = model(pixels, LABELS, torch.zeros(4, 32, 32))
    assert not bool(empty.foreground_trust.any())
    empty.loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    model.config.unusable_mask = "error"
    with pytest.raises(FVGError, match="2 of 4 masks"):
        model(pixels, LABELS, masks)


@pytest.mark.parametrize(("trust", "value"), [("one", 1.0), ("half", 0.5)])
def test_without_frg(tuner: CoOp, pixels: Tensor, trust: Any, value: float) -> None:
    model = wrap(tuner, config=FVGConfig(trust=trust), foreground="given")
    masks = boxes()
    masks[0] = 0
    assert model(pixels, LABELS, masks).foreground_trust.tolist() == [0.0, value, value, value]


def test_distillation_reaches_the_gate_only_when_asked(tuner: CoOp, pixels: Tensor) -> None:
    def gate_gradient(**fields: Any) -> Tensor:
        torch.manual_seed(0)
        model = wrap(tuner, config=FVGConfig(lambda_gate=0.0, init_std=0.1, **fields), foreground="given")
        model(pixels, LABELS, boxes()).loss.backward()
        model.release()
        return model.foreground_gate.out.weight.grad

    assert not bool(gate_gradient().any())
    assert bool(gate_gradient(gate_learns_from_distillation=True).any())


def test_black_pixels_outside_the_mask(tuner: CoOp, pixels: Tensor) -> None:
    seen = []
    for outside in ("mean", "black"):
        model = wrap(tuner, config=FVGConfig(outside_mask=outside), foreground="given")
        seen.append(model.views(pixels, boxes()).foreground)
        model.release()
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_tuner_can_learn_too(tuner: CoOp, pixels: Tensor) -> None:
    model = wrap(tuner, config=FVGConfig(freeze_tuner=False), foreground="given")
    model(pixels, LABELS, boxes()).loss.backward()
    assert tuner.ctx.grad is not None and bool(tuner.ctx.grad.any())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 6])}, "label 6 is out of range for 6 classes"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "label -1 is out of range"),
        ({"labels": torch.tensor([0, 1])}, r"labels must be 4 integers"),
        ({"labels": torch.tensor([0.0, 1, 2, 3])}, r"labels must be 4 integers"),
        ({"branch": "bse"}, "Did you mean 'base'"),
        ({"labels": LABELS, "foreground_mask": torch.ones(3, 32, 32)}, "3"),
        ({"features": {"image": torch.randn(4, 16)}}, "both was given"),
        ({"pixel_values": None}, "neither was given"),
        ({"pixel_values": None, "features": {"image": torch.randn(4, 9)}}, r"\(4, 9\)"),
    ],
)
def test_bad_calls_say_what_was_given(model: FVGModel, pixels: Tensor, call: dict[str, Any], message: str) -> None:
    with pytest.raises(FVGError, match=message):
        model(**{"pixel_values": pixels, **call})


def test_training_on_unseen_classes_is_refused(model: FVGModel, pixels: Tensor) -> None:
    with model.use_classes([*CLASSES, *NEW_CLASSES]), pytest.raises(FVGError, match="snow_leopard"):
        model(pixels, LABELS, boxes())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "empty"),
        (["cat", "cat"], "stands twice"),
        (["snow leopard", "snow_leopard"], "stands twice"),
        (["cat", "  "], "non-empty"),
        ("cat", "one string"),
        (["a " * 80], "tokens, but the text tower holds 77"),
    ],
)
def test_bad_class_lists_change_nothing(model: FVGModel, pixels: Tensor, classes: Any, message: str) -> None:
    with pytest.raises(FVGError, match=message):
        model.set_classes(classes)
    assert model.classes == tuple(CLASSES)


# -- precision, copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_stay_in_full_precision(model: FVGModel, pixels: Tensor, dtype: torch.dtype) -> None:
    model.to(dtype)
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert model.tuner.ctx.dtype == torch.float32
    assert model.tuner.clip.logit_scale.dtype == dtype
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035)
    for _ in range(3):
        output = model(pixels, LABELS, boxes())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert bool(output.loss.isfinite()) and output.logits.dtype == torch.float32


def test_half_equals_half(model: FVGModel, pixels: Tensor) -> None:
    model.half()
    assert model.eval()(pixels).logits.dtype == torch.float32


def test_autocast_keeps_heads_and_losses_in_float32(model: FVGModel, pixels: Tensor) -> None:
    plain = model(pixels, LABELS, boxes())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(pixels, LABELS, boxes())
    assert cast.logits_base.dtype == cast.loss.dtype == torch.float32
    assert (cast.logits_base - plain.logits_base).abs().max() < 0.3
    cast.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.trainable_parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(model: FVGModel, pixels: Tensor, clone: Any) -> None:
    expected = model.eval()(pixels).logits
    other = clone(model)
    close(other(pixels).logits, expected)
    with torch.no_grad():
        other.tuner.ctx.add_(1.0)
        other.visual_adapter.up.weight.add_(0.1)
    assert (other(pixels).logits - expected).abs().max() > 1e-3
    assert torch.equal(model(pixels).logits, expected)
    other.release()
    other.tuner.detach()
    assert torch.equal(model(pixels).logits, expected)


def test_state_dict_holds_our_tensors_only(model: FVGModel) -> None:
    names = set(model.state_dict())
    assert "tuner.ctx" in names and not any("clip" in n for n in names)
    assert {n.split(".")[0] for n in names} == {
        "tuner", "visual_adapter", "text_adapter", "foreground_gate", "backbone_gate",
    }  # fmt: skip
    assert any(n.startswith("tuner.clip.") for n in model.full_state_dict())
    model.load_state_dict(model.state_dict(), strict=True)
    nested = nn.ModuleDict({"m": model})
    nested.load_state_dict(nested.state_dict(), strict=True)
    lacking = {k: v for k, v in model.state_dict().items() if k != "tuner.ctx"}
    with pytest.raises(RuntimeError, match=r"tuner\.ctx"):
        model.load_state_dict(lacking, strict=True)


def test_text_features_are_cached_and_never_stale(model: FVGModel, pixels: Tensor) -> None:
    model.eval()
    first = model.tuner.text_features()
    assert model.tuner.text_features() is first
    with torch.no_grad():
        model.tuner.ctx.add_(0.3)
    second = model.tuner.text_features()
    assert not torch.equal(first, second)
    model.tuner.ctx.data.add_(0.3)
    model.tuner.invalidate()
    assert not torch.equal(second, model.tuner.text_features())
    with torch.no_grad():
        next(model.tuner.clip.text_model.parameters()).mul_(1.5)
    with torch.inference_mode():
        third = model.tuner.text_features()
    assert not third.is_inference()


def test_predict_names_and_probabilities(model: FVGModel, pixels: Tensor) -> None:
    from PIL import Image

    model.train()
    picture = Image.new("RGB", (50, 40), (200, 30, 30))
    found = model.predict(picture, top_k=3)
    assert len(found) == 3 and found[0].probability >= found[1].probability and found[0].name in CLASSES
    rows = model.predict([picture, picture], classes=[*CLASSES, *NEW_CLASSES], top_k=50)
    assert len(rows) == 2 and len(rows[0]) == 11
    assert sum(p.probability for p in rows[0]) == pytest.approx(1, abs=1e-4)
    assert len(model.predict(pixels)) == 4
    assert model.training and model.classes == tuple(CLASSES)


def test_config_is_validated() -> None:
    for field, value, message in [
        ("trust", "gates", "Did you mean 'gate'"),
        ("temperature", 0, "above 0"),
        ("lambda_distill", -1, "not be negative"),
        ("lambda_distill", float("nan"), "finite"),
        ("usable_area", (0.9, 0.1), "low ≤ high"),
        ("bottleneck", 6.5, "whole number"),
        ("attention_layers", (), "at least one layer"),
        ("freeze_tuner", "yes", "True or False"),
    ]:
        with pytest.raises(FVGError, match=message):
            FVGConfig(**{field: value})
    config = FVGConfig(lambda_distill=1.0)
    assert FVGConfig.from_dict(config.to_dict()) == config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FVGConfig.from_dict({**config.to_dict(), "from_the_future": 1})
    assert "from_the_future" in str(caught[0].message)
