"""One model in many threads: tuned and prior passes at once give the single-threaded answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import record_attention, wrap
from fvg_adapter.tuners import CoOp


def test_threads_give_the_single_threaded_answers(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    torch.manual_seed(0)
    model = wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init="")).eval()

    def tuned(i: int) -> Tensor:
        model.tuner.invalidate()
        return model(pixels[i % 4 : i % 4 + 1], branch="new").logits

    def prior(i: int) -> Tensor:
        return model.tuner.prior_text_features()

    def attention(i: int) -> Tensor:
        with record_attention(small_clip) as record:
            small_clip.get_image_features(pixel_values=pixels[i % 4 : i % 4 + 1])
        return record.attention()

    jobs = [(work, i) for i in range(12) for work in (tuned, prior, attention)]
    with torch.no_grad():
        expected = [work(i) for work, i in jobs]

    def run(job: Any) -> Tensor:
        with torch.no_grad():
            return job[0](job[1])

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(run, jobs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_torch_compile_gives_the_same_logits(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = wrap(CoOp(small_clip, tokenizer, CLASSES)).eval()
    with torch.no_grad(), model.use_classes([*CLASSES, *NEW_CLASSES]):
        expected = model(pixels).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(pixels).logits, expected, atol=1e-5, rtol=1e-5)
