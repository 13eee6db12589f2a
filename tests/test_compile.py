"""torch.compile around a wrapped model: the numbers of eager mode, no record left behind, and few compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import attention, wrap
from fvg_adapter.tuners import MMRL, CoOp, PromptSRC, Tuner, ZeroShot

TUNERS: dict[str, Callable[[Any, Any], Tuner]] = {
    "zero_shot": lambda clip, tokenizer: ZeroShot(clip, tokenizer, CLASSES),
    "coop": lambda clip, tokenizer: CoOp(clip, tokenizer, CLASSES),
    "promptsrc": lambda clip, tokenizer: PromptSRC(
        clip, tokenizer, CLASSES, prompt_depth_text=2, prompt_depth_vision=2
    ),
    "mmrl": lambda clip, tokenizer: MMRL(clip, tokenizer, CLASSES, rep_layers=[1, 2], rep_dim=8),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SOME = [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("coop", "promptsrc") else []) for kind in TUNERS]


@pytest.mark.parametrize("kind", SOME)
def test_a_compiled_model_trains_and_answers_as_ever(
    kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    model = wrap(TUNERS[kind](small_clip, tokenizer))
    compiled = torch.compile(model, backend="eager")
    labels = torch.tensor([0, 1, 2, 3])

    def step(run: Any) -> list[Tensor]:
        model.zero_grad()
        output = run(pixels, labels)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad.clone() for p in model.trainable_parameters())]

    for one, other in zip(step(compiled), step(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not attention._THREAD.recordings  # its attention was recorded, and the record is closed
    model.eval()
    for classes in (CLASSES, [*CLASSES, *NEW_CLASSES], CLASSES[:3]):
        with torch.no_grad(), model.use_classes(classes):
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)


def test_neither_steps_nor_class_lists_compile_the_towers_anew(
    small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    sizes: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    model = wrap(small_clip, tokenizer, CLASSES)
    compiled = torch.compile(model, backend=counting)
    labels = torch.tensor([0, 1, 2, 3])
    compiled(pixels, labels).loss.backward()
    towers = max(sizes)
    assert towers > 100
    sizes.clear()
    compiled(pixels, labels).loss.backward()
    assert sizes == []
    model.eval()
    with torch.no_grad():
        for classes in (CLASSES, CLASSES[:2], CLASSES[2:5]):
            with model.use_classes(classes):
                compiled(pixels)
    assert sum(size > 50 for size in sizes) == 1  # the image tower, once


@pytest.mark.parametrize("kind", TUNERS)
def test_the_towers_are_one_graph(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = wrap(TUNERS[kind](small_clip, tokenizer)).eval()
    with torch.no_grad():
        expected = small_clip.vision_model(pixel_values=pixels).pooler_output
        compiled = torch.compile(small_clip.vision_model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=pixels).pooler_output, expected, atol=1e-5, rtol=1e-5)
    assert model.status().hooks > 0
