"""What is not computed twice: towers' calls counted by hooks, graphs weighed, and the numbers of the slow way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_text_memory import graph_of
from torch import Tensor
from transformers import CLIPModel

from fvg_adapter import FVGModel, wrap
from fvg_adapter.tuners import MMRL, CoOp, LoRA, PromptSRC, Tuner, ZeroShot

NAMES = ["cat", "dog", "hot_air_balloon"]
LABELS = torch.tensor([0, 1, 2, 0])
DEPTHS = {"prompt_depth_text": 2, "prompt_depth_vision": 2, "teacher_templates": ("a {}.", "the plastic {}.")}
MAKERS: dict[str, Callable[[CLIPModel, Any], Tuner]] = {
    "zero_shot": lambda clip, tok: ZeroShot(clip, tok, NAMES),
    "coop": lambda clip, tok: CoOp(clip, tok, NAMES),
    "promptsrc": lambda clip, tok: PromptSRC(clip, tok, NAMES, **DEPTHS),
    "mmrl": lambda clip, tok: MMRL(clip, tok, NAMES, rep_layers=[1, 2], rep_dim=8),
}
MASKS = torch.zeros(4, 32, 32)
MASKS[:, 8:24, 4:20] = 1


class Counted:
    """Sizes of the batches that went through each tower."""

    def __init__(self, clip: CLIPModel) -> None:
        self.images: list[int] = []
        self.texts: list[int] = []
        vision: Any = clip.vision_model
        vision.embeddings.register_forward_pre_hook(
            lambda m, a, k: self.images.append(len((*a, *k.values())[0])), with_kwargs=True
        )
        clip.text_model.embeddings.register_forward_hook(lambda m, a, output: self.texts.append(len(output)))

    def of(self, work: Callable[[], Any]) -> tuple[list[int], list[int]]:
        self.images.clear()
        self.texts.clear()
        work()
        return list(self.images), list(self.texts)


@pytest.fixture(params=MAKERS)
def tuner(request: Any, small_clip: CLIPModel, tokenizer: Any) -> Tuner:
    torch.manual_seed(0)
    made = MAKERS[request.param](small_clip, tokenizer)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def training(model: FVGModel, pixels: Tensor, **given: Any) -> Callable[[], Any]:
    return lambda: model.train()(pixels, LABELS, **given).loss.backward()


def test_forwards_of_a_step(tuner: Tuner, small_clip: CLIPModel, pixels: Tensor) -> None:
    counted, model = Counted(small_clip), wrap(tuner)
    prior = [4] if tuner.changes_images else []
    texts = [3] if tuner.kind == "zero_shot" else [3, 3]
    given = training(model, pixels, foreground_mask=MASKS)
    assert counted.of(given) == ([8, *prior], texts)  # both views in one batch; the class list once
    assert counted.of(given) == ([8, *prior], [])
    assert counted.of(training(model, pixels)) == ([4, 4, *prior], [])  # attention makes the mask of the second pass
    model.foreground = "whole"
    assert counted.of(given) == ([4, *prior], [])


def test_forwards_of_an_inference(tuner: Tuner, small_clip: CLIPModel, pixels: Tensor) -> None:
    counted, model = Counted(small_clip), wrap(tuner).eval()
    prior = [4] if tuner.changes_images else []
    with torch.no_grad():
        for branch in ("base", "new", "joint"):
            model(pixels, branch=branch)
            expected = [4] if branch == "base" else [4, *prior]
            assert counted.of(lambda b=branch: model(pixels, branch=b)) == (expected, [])  # type: ignore[misc]
        with model.use_classes([*NAMES, "zebra"]):
            model(pixels)
        assert counted.of(lambda: model(pixels)) == ([4], [])  # back in a class list that was seen


def test_shared_forwards_give_the_numbers_of_separate_ones(tuner: Tuner, pixels: Tensor) -> None:
    model = wrap(tuner).train()
    output = model(pixels, LABELS, foreground_mask=MASKS)
    with torch.no_grad():
        view = pixels * MASKS.unsqueeze(1)
        each = [[tuner.branch_image_features(x[i : i + 1]) for i in range(4)] for x in (pixels, view)]
        (base, new), (view_base, _) = [[torch.cat(parts) for parts in zip(*rows, strict=True)] for rows in each]
        plain = F.normalize(torch.cat([tuner.prior_image_features(x.unsqueeze(0)) for x in pixels]), dim=-1)
        text = torch.cat([tuner._text([name]) for name in NAMES])
        stored = {"image": base, "image_new": new, "foreground": view_base, "prior": plain}
        stored |= {"mask_area": MASKS.mean((1, 2)), "usable": torch.ones(4, dtype=torch.bool)}
    slow = model(features=stored, labels=LABELS)
    torch.testing.assert_close(tuner.text_features(), text, rtol=0, atol=1e-5)
    for name in ("loss", "logits_base", "logits_new", "foreground_trust", "prior_trust"):
        torch.testing.assert_close(output[name], slow[name], rtol=1e-4, atol=1e-4)


def test_no_graph_through_frozen_towers(tuner: Tuner, pixels: Tensor) -> None:
    """The heads' graph alone, a few numbers a picture and class; one tower would keep some hundred kilobytes."""
    model = wrap(tuner).train()
    model(pixels, LABELS, foreground_mask=MASKS)
    for mask in (MASKS, None):
        output, graph = graph_of(lambda m=mask: model(pixels, LABELS, foreground_mask=m), model)  # type: ignore[misc]
        assert output.loss.requires_grad and 0 < graph < 25_000


def test_tuning_text_keeps_no_graph_of_the_images(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    lora = LoRA(small_clip, tokenizer, NAMES, towers="text")
    _, few = graph_of(lambda: lora(pixels[:1], LABELS[:1]), small_clip)
    _, many = graph_of(lambda: lora(pixels.repeat(8, 1, 1, 1), LABELS.repeat(8)), small_clip)
    assert 0 < many - few < 32 * 1000
    lora.detach()
    tuner = CoOp(small_clip, tokenizer, NAMES)
    _, few = graph_of(lambda: tuner(pixels[:1], LABELS[:1]), small_clip)
    _, many = graph_of(lambda: tuner(pixels.repeat(8, 1, 1, 1), LABELS.repeat(8)), small_clip)
    assert 0 < many - few < 32 * 1000


def test_tuning_images_keeps_no_graph_below_the_first_learned_layer(
    small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    graphs = []
    for layers in ([1, 2], [2]):
        tuner = MMRL(small_clip, tokenizer, NAMES, rep_layers=layers, rep_dim=8)
        graphs.append(graph_of(lambda t=tuner: t(pixels, LABELS), tuner)[1])  # type: ignore[misc]
        tuner.detach()
    assert graphs[1] < 0.6 * graphs[0]
