"""ZeroShot and CoOp against numbers that the authors' code produced (golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from conftest import Golden
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import CoOp, ZeroShot

CASES = ["init_end", "init_front", "init_middle", "random_end", "csc_end", "csc_front", "csc_middle"]


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0)


def gradient_close(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None
    close(actual, expected, 1e-4 * float(expected.abs().max()))


def make(case: Golden, clip: CLIPModel, tokenizer: Any) -> CoOp:
    config = case.config
    tuner = CoOp(
        clip,
        tokenizer,
        config["classnames"],
        n_ctx=config["n_ctx"],
        ctx_init=config["ctx_init"],
        csc=config["csc"],
        class_token_position=config["class_token_position"],
    )
    if "init/ctx" in case.tensors:
        close(tuner.ctx, case["init/ctx"], 0)
    tuner.load_state_dict(case.under("param"), strict=False)
    return tuner


def test_zero_shot(golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden("clip_zeroshot")
    names = case.config["classnames"] + case.config["new_classnames"]
    tuner = ZeroShot(golden_clip, tokenizer, names)
    normalise = torch.nn.functional.normalize
    close(tuner.text_features(), normalise(case["text_features_raw"], dim=-1))
    close(tuner.image_features(case["images"]), normalise(case["image_features_raw"], dim=-1))
    close(tuner(case["images"]).logits, case["logits_per_image"])
    close(tuner.logit_scale, case["logit_scale"].exp())


@pytest.mark.parametrize("name", CASES)
def test_coop(name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden(f"coop_{name}")
    tuner = make(case, golden_clip, tokenizer)
    output = tuner(case["images"], case["labels"])
    close(tuner.text_features(), case["text_features"])
    close(tuner.image_features(case["images"]), case["image_features"])
    close(output.logits, case["logits"])
    close(output.loss, case["loss"])
    output.loss.backward()
    gradient_close(tuner.ctx.grad, case["grad/ctx"])


@pytest.mark.parametrize("name", CASES)
def test_coop_sgd_steps(name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any) -> None:
    case = golden(f"coop_{name}")
    tuner = make(case, golden_clip, tokenizer)
    settings = {k: v for k, v in case.config["optimizer"].items() if k != "name"}
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), **settings)
    for step in ("step1", "step2"):
        loss = tuner(case["images"], case["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        if step == "step2":
            close(loss, case["step2/loss"])
            gradient_close(tuner.ctx.grad, case["step2/grad/ctx"])
        optimizer.step()
        close(tuner.ctx, case[f"{step}/ctx"], 1e-5)


@pytest.mark.parametrize("name", ["init_end", "random_end"])
def test_coop_scores_other_classes(
    name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden(f"coop_{name}")
    tuner = make(case, golden_clip, tokenizer)
    with tuner.use_classes(case.config["new_classnames"]), torch.no_grad():
        close(tuner.text_features(), case["new/text_features"])
        close(tuner(case["images"]).logits, case["new/logits"])
    assert tuner.classes == tuple(case.config["classnames"])


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_the_authors_tokens(
    name: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any
) -> None:
    case = golden(f"coop_{name}")
    tuner = make(case, golden_clip, tokenizer)
    prompts = tuner.prompts(case.config["classnames"])
    ends = prompts.attention_mask.sum(1) - 1
    assert torch.equal(ends, case["eot_index"])


def test_contexts_of_classes_score_no_others(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = CoOp(small_clip, tokenizer, ["snow_leopard", "cat", "dog"], csc=True, ctx_init="")
    expected = tuner(pixels).logits
    with pytest.raises(FVGError, match=r"tuned for 3 classes and cannot score others, such as \['cats'\].*'cat'"):
        tuner.set_classes(["cat", "cats"])
    assert tuner.classes == ("snow_leopard", "cat", "dog")
    tuner.set_classes(["dog", "snow leopard"])  # each with its own context
    torch.testing.assert_close(tuner(pixels).logits, expected[:, [2, 0]])
