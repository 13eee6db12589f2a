"""KgCoOp against numbers that the authors' code produced (golden/README.md), and its traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from conftest import Golden
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp, KgCoOp

CASES = ["kgcoop_w2", "kgcoop_w8"]


def close(actual: Any, expected: Tensor, atol: float = 1e-4) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0)


def make(case: Golden, clip: CLIPModel, tokenizer: Any, **changed: Any) -> KgCoOp:
    config = case.config
    arguments = {
        "n_ctx": config["n_ctx"],
        "ctx_init": config["ctx_init"],
        "teacher_template": config["teacher_template"],
        "weight": config["W"],
        **changed,
    }
    tuner = KgCoOp(clip, tokenizer, config["classnames"], **arguments)
    close(tuner.ctx, case["init/ctx"], 0)
    tuner.load_state_dict(case.under("param"), strict=False)
    return tuner


@pytest.mark.parametrize("name", CASES)
def test_kgcoop(name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden(name)
    tuner = make(case, golden_clip, tokenizer)
    output = tuner(case["images"], case["labels"])
    close(tuner.text_features(), case["text_features"])
    close(tuner.teacher_features(), case["fixed_text_features"])
    close(output.logits, case["logits"])
    close(output.losses["ce"], case["loss_ce"])
    close(output.losses["kg"] / case.config["W"], case["score"])
    close(output.loss, case["loss"])
    output.loss.backward()
    close(tuner.ctx.grad, case["grad/ctx"], 1e-4 * float(case["grad/ctx"].abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_one_sgd_step(name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden(name)
    tuner = make(case, golden_clip, tokenizer)
    settings = {k: v for k, v in case.config["optimizer"].items() if k != "name"}
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), **settings)
    tuner(case["images"], case["labels"]).loss.backward()
    optimizer.step()
    close(tuner.ctx, case["step1/ctx"], 1e-5)


def test_other_classes(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("kgcoop_w8")
    tuner = make(case, golden_clip, tokenizer)
    with tuner.use_classes(case.config["new_classnames"]), torch.no_grad():
        close(tuner.text_features(), case["new/text_features"])
        close(tuner(case["images"]).logits, case["new/logits"])


def test_the_teachers_template_is_not_the_students(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden("kgcoop_w2")
    tuner = make(case, golden_clip, tokenizer, teacher_template="a photo of a {}.")
    output = tuner(case["images"], case["labels"])
    assert abs(float(output.losses["kg"].detach()) / 2 - float(case["score"])) > 5e-3


def test_only_the_context_learns(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = make(golden("kgcoop_w2"), golden_clip, tokenizer)
    assert [n for n, p in tuner.named_parameters() if p.requires_grad] == ["ctx"]
    assert list(tuner.state_dict()) == ["ctx"]
    assert not tuner.teacher_features().requires_grad


def test_the_teacher_follows_the_class_list(small_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = KgCoOp(small_clip, tokenizer, ["cat", "dog"])
    first = tuner.teacher_features()
    with tuner.use_classes(["dog", "cat"]):
        close(tuner.teacher_features(), first.flip(0), 1e-6)
    tuner.set_classes(["cat", "dog", "bird"])
    assert tuner.teacher_features().shape == (3, 16)


def test_without_weight_it_is_coop(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    plain = CoOp(small_clip, tokenizer, ["cat", "dog"])(pixels, labels)
    held = KgCoOp(small_clip, tokenizer, ["cat", "dog"], weight=0.0)(pixels, labels)
    close(held.loss, plain.loss.detach(), 1e-6)
    close(held.logits, plain.logits.detach(), 1e-6)


def test_what_does_not_fit(small_clip: CLIPModel, tokenizer: Any) -> None:
    with pytest.raises(FVGError, match="exactly one"):
        KgCoOp(small_clip, tokenizer, ["cat"], teacher_template="a photo.")
    with pytest.raises(FVGError, match="weight must not be negative, but is -1"):
        KgCoOp(small_clip, tokenizer, ["cat"], weight=-1)
    long = "cat " * 70
    with pytest.raises(FVGError, match="tokens, but the text tower holds 77"):
        KgCoOp(small_clip, tokenizer, [long], teacher_template="a rather long template for a photo of a {}.")


def test_saved_and_loaded(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any) -> None:
    tuner = KgCoOp(small_clip, tokenizer, ["cat", "dog"], teacher_template="one {}.", weight=3.0, csc=True, ctx_init="")
    expected = tuner(pixels).logits
    folder = tuner.save_pretrained(tmp_path / "saved")
    again = KgCoOp.from_pretrained(folder, clip=tuner.detach(), tokenizer=tokenizer)
    assert again.arguments() == tuner.arguments()
    close(again(pixels).logits, expected.detach(), 0)
