"""What a model costs, in the columns of the paper's table: parameters, speed of tuning and of inference, memory.

Speeds are of this machine and of the way that was run: from a FeatureBank tuning does not include the image encoder.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from fvg_adapter.model import FVGModel
from fvg_adapter.train import FitResult
from fvg_adapter.tuners.base import Tuner

PICTURES = 16
"""In a timed batch, at most."""
_REPEATS = 3


def of_training(model: FVGModel | Tuner, fitted: FitResult, images: int) -> dict[str, float]:
    """Trainable parameters, wall seconds, images a second and peak memory (MB) of a training.

    Args:
        model: what was trained. fitted: what `fit` said. images: how many it saw in all epochs.

    Returns:
        parameters, train_seconds, train_images_per_second, memory_mb: the GPU's peak since `reset_memory` where there
        is one, else the process's peak since it began.
    """
    return {
        "parameters": float(sum(p.numel() for p in model.trainable_parameters())),
        "train_seconds": fitted.seconds,
        "train_images_per_second": images / max(fitted.seconds, 1e-9),
        "memory_mb": peak_memory(),
    }


@torch.no_grad()
def of_inference(model: FVGModel | Tuner, pictures: Any) -> dict[str, float]:
    """Images a second from pixels to logits, the best of three after one to warm up, in batches of 16."""
    tuner = model.tuner if isinstance(model, FVGModel) else model
    rows = [pictures[i]["pixel_values"] for i in range(min(PICTURES, len(pictures)))]
    pixels = torch.stack(rows).to(tuner.encoder.device)
    best = float("inf")
    with model.use_classes(pictures.classes):
        for _ in range(1 + _REPEATS):
            _wait(pixels)
            start = time.perf_counter()
            _wait(model(pixels).logits)
            best = min(best, time.perf_counter() - start)
    return {"inference_images_per_second": len(rows) / best}


def reset_memory() -> None:
    """Forgets the GPU's peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Peak memory in MB; see `of_training`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows has none
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
