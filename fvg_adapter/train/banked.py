"""Training from a bank without the Trainer: the same steps, bit for bit, at a third of the cost.

A step of the heads takes a millisecond or two, and transformers' Trainer takes as much again (it walks through all the
modules of the frozen CLIP in every step, and fetches items one by one). So where nothing of the Trainer is asked for
(checkpoints, autocast, further processes, accumulation), `fit` runs this loop instead. Imports features and batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fvg_adapter.errors import FVGError
from fvg_adapter.features import FeatureBank
from fvg_adapter.train.batches import Batches, drawn_view
from fvg_adapter.tuners.recipes import Stage

_log = logging.getLogger(__name__)

Rows = list[dict[str, float]]


def train_from_bank(
    model: Any,
    bank: FeatureBank,
    recipe: Stage,
    batches: Batches,
    seed: int,
    device: torch.device,
    *,
    each_epoch: Callable[[int], None],
    each_step: Callable[[int], None] | None = None,
) -> Rows:
    """Runs the recipe; returns for each epoch {"loss", "learning_rate", terms by name}, as the Trainer's log has them.

    Args:
        model: an FVGModel or a tuner, on `device`. bank: its features. batches: of one process.
        each_epoch, each_step: called with the epochs, or steps, done.

    Raises:
        FVGError: a loss that is not finite; the parameters are those of the step before.
    """
    optimizer = recipe.make_optimizer(model.trainable_parameters())
    model.train()
    rows: Rows = []
    step = 0
    for epoch in range(recipe.epochs):
        factor = recipe.learning_rate(epoch) / recipe.lr  # as LambdaLR has it, to the last bit
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * factor
        batches.set_epoch(epoch)
        sums: dict[str, Tensor] = {}
        for keys in batches:
            indices = [index for _, index in keys]
            views = [drawn_view(seed, epoch, index, bank.views) for index in indices]
            output = model(**_moved(bank.batch(indices, views), device))
            step += 1
            if not bool(torch.isfinite(output.loss)):
                raise FVGError(not_finite(output, step, optimizer.param_groups[0]["lr"]))
            for name, value in {"": output.loss, **(output.losses or {})}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if each_step is not None:
                each_step(step)
        means = {name: float(total / len(batches)) for name, total in sums.items()}
        rows.append({**means, "loss": means[""], "learning_rate": optimizer.param_groups[0]["lr"]})
        _log.info("epoch %d of %d: loss %.4f", epoch + 1, recipe.epochs, means[""])
        each_epoch(epoch + 1)
    return rows


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return batch
    features = {name: tensor.to(device, non_blocking=True) for name, tensor in batch["features"].items()}
    return {"features": features, "labels": batch["labels"].to(device)}


def not_finite(output: Any, step: int, rate: float) -> str:
    """What is said of a loss that is not finite."""
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in (output.losses or {}).items())
    return (
        f"the loss is {float(output.loss.detach())} at step {step} ({terms or 'no terms'}; learning rate {rate:.3g}). "
        "Lower the learning rate, check that the images are finite and normalised, or train without fp16. The "
        "parameters are those of the step before."
    )
