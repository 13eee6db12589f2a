"""One training step and one inference at ViT-B/16 size with random weights: shapes, seconds, peak memory.

    python benchmarks/vit_b16.py [--classes 50] [--batch 8]

Weights are random, so accuracies would mean nothing; sizes, shapes and costs are the real ones. Times are of one run on
whatever machine this is: read them as ratios of each other.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fvg_adapter import load, wrap
from fvg_adapter.tuners import CoOp

TOKENIZER = Path(__file__).parent.parent / "tests" / "golden" / "tokenizer"


def peak_mb() -> float:
    """Highest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """The last result and the median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, sorted(seconds)[len(seconds) // 2]


def measure(classes: int, batch: int) -> dict[str, Any]:
    """All figures."""
    torch.manual_seed(0)
    text = {"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 16}, projection_dim=512)
    clip = CLIPModel(config).eval()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    names = [f"class number {i}" for i in range(classes)]
    figures: dict[str, Any] = {"classes": classes, "batch": batch, "mb_loaded": round(peak_mb())}

    pixels = torch.randn(batch, 3, 224, 224)
    labels = torch.arange(batch) % classes
    masks = torch.zeros(batch, 224, 224)
    masks[:, 60:180, 50:170] = 1
    with torch.no_grad():
        _, figures["s_clip_image_forward"] = timed(lambda: clip.get_image_features(pixel_values=pixels))
    figures["mb_after_clip_forward"] = round(peak_mb())

    model = wrap(CoOp(clip, tokenizer, names))
    figures["trainable"] = model.status().trainable
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)

    def step(**masked: Any) -> Any:
        output = model(pixels, labels, **masked)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        return output

    model.train()
    step(foreground_mask=masks)  # fills the text cache
    output, figures["s_training_step_given_masks"] = timed(lambda: step(foreground_mask=masks))
    attended, figures["s_training_step_attention"] = timed(step)
    figures["shapes"] = {
        "logits_base": list(output.logits_base.shape),
        "logits_new": list(output.logits_new.shape),
        "foreground_trust": list(output.foreground_trust.shape),
        "foreground_attention": list(attended.foreground_attention.shape),
    }
    figures["mb_after_training"] = round(peak_mb())
    model.eval()
    with torch.no_grad():
        result, figures["s_inference"] = timed(lambda: model(pixels))
        figures["shapes"]["inference_logits"] = list(result.logits.shape)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder) / "a")
            figures["bytes_heads"] = (Path(folder) / "a" / "fvg_heads.safetensors").stat().st_size
            again = load(Path(folder) / "a", clip=clip, tokenizer=tokenizer)
            figures["loaded_logits_bit_equal"] = torch.equal(again(pixels).logits, result.logits)
    figures["mb_peak"] = round(peak_mb())
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    print(json.dumps(measure(options.classes, options.batch), indent=1))
