"""fit: trains a tuner, or the heads of an FVGModel; a thin layer on transformers.Trainer.

Processes, autocast, checkpoints and logging are the Trainer's; checks, Dassl's recipe and repeatable batches are ours.
Imports model, features, tuners and the rest of this package; the Trainer only when `fit` is called.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fvg_adapter.data.randomness import randomness_kept
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.features import FeatureBank
from fvg_adapter.model import FVGModel
from fvg_adapter.progress import step_bar, wanted
from fvg_adapter.replacing import scratch
from fvg_adapter.train.banked import train_from_bank
from fvg_adapter.train.batches import Batches, Collate, Drawn, Loader
from fvg_adapter.train.checkpoints import checkpoint_for, last_checkpoint, load_average
from fvg_adapter.tuners.averaging import GaussianAverage
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.recipes import Stage, recipe_for

Model = FVGModel | Tuner
_log = logging.getLogger(__name__)

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class FitResult:
    """What a training did; after a resume, the epochs before it are included.

    Attributes:
        losses: mean loss of each epoch. terms: means of its terms by name (`output.losses`) in each epoch.
        learning_rates: the rate of each epoch.
        steps: optimiser steps in all epochs. seconds: wall time of this call.
        checkpoint: the last one, or None without an output folder.
    """

    losses: list[float]
    terms: list[dict[str, float]]
    learning_rates: list[float]
    steps: int
    seconds: float
    checkpoint: Path | None = None


def fit(
    model: Model,
    dataset: Any,
    *,
    recipe: Stage | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    seed: int = 1,
    resume: bool | str | os.PathLike[str] = False,
    precision: str = "no",
    accumulate: int = 1,
    save_every_epochs: int | None = None,
    workers: int = 0,
    on_epoch: Callable[[int, Any], None] | None = None,
    report_to: Sequence[str] = (),
    progress: bool | None = None,
    device: str | torch.device | None = None,
) -> FitResult:
    """Trains `model.trainable_parameters()` on a data set, in place, and leaves the model in evaluation mode.

    An optimiser step sees `batch_size × accumulate × processes` pictures; see `Batches`. The same seed gives the same
    result, bit for bit after a resume, and but for rounding on any number of processes that together see as many
    pictures a step. A tuner that averages its weights over epochs (`weight_average`, PromptSRC) ends as the average.
    The global generators of Python, numpy and torch are given back as found.

    Args:
        model: an FVGModel (its heads learn) or a tuner.
        dataset: items {"pixel_values", "labels"[, "foreground_mask"]}, or a FeatureBank.
        recipe: optimiser, schedule, epochs and batch; the published one for this tuner when None.
        output_dir: folder for checkpoints, which hold our tensors only; without one nothing is written.
        seed: of order, augmentation and dropout.
        resume: True for the last whole checkpoint in `output_dir`; "auto" for that or, where there is none, the start
            (a script that is started again after a crash goes on with it); or the folder of one.
        precision: "no", "bf16" or "fp16" autocast; parameters and losses stay float32.
        accumulate: batches in an optimiser step.
        save_every_epochs: between checkpoints, 1 when None; the last epoch is always saved.
        workers: of the DataLoader.
        on_epoch: called after each epoch with the number of epochs done (1, 2, …) and the model, before the
            checkpoint is written; what it remembers itself is in no checkpoint.
        report_to: the Trainer's loggers, such as ("tensorboard",).
        progress: a bar on stderr; when None, only on a terminal.
        device: where to train; where the model is when None. A launcher's processes take a GPU each.

    Raises:
        FVGError: nothing to train, data or a checkpoint that do not fit the model, a loss that is not finite, a
            checkpoint that cannot be written.

    Example:
        >>> fit(tuner, shots, recipe=RECIPES["coop"].tune)                          # doctest: +SKIP
        >>> fit(wrap(tuner), shots).losses[-1]                                      # doctest: +SKIP
    """
    _check_model(model)
    recipe = recipe or _published(model)
    _check_settings(recipe, precision, accumulate, seed)
    place = _place(model, device, precision)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(randomness_kept())
        keys = _check_data(model, dataset)
        found = checkpoint_for(resume, output_dir, model)
        if output_dir is not None:
            _check_output(Path(output_dir))
        learning = sum(p.numel() for p in model.trainable_parameters())
        what = type(model).__name__ if isinstance(model, Tuner) else f"the heads behind {type(model.tuner).__name__}"
        _log.info("training %s: %d parameters, %d items, %s", what, learning, len(dataset), recipe)
        if found is not None:
            _log.info("going on from %s", found)
        simple = isinstance(dataset, FeatureBank) and output_dir is None and not report_to
        if simple and precision == "no" and accumulate == 1 and "LOCAL_RANK" not in os.environ:
            bank: FeatureBank = dataset
            return _fit_from_bank(model, bank, recipe, seed, place, on_epoch, start, progress)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(_left_as_found(model, precision))
        from fvg_adapter.train import trainer as machinery

        args = machinery.arguments(
            folder,
            recipe,
            on_cpu=place.type == "cpu",
            seed=seed,
            precision=precision,
            accumulate=accumulate,
            report_to=report_to,
        )
        batches = Batches(
            len(dataset),
            recipe.batch_size,
            accumulate=accumulate,
            world=args.world_size,
            rank=args.process_index,
            seed=seed,
        )
        loader = Loader(
            Drawn(dataset, seed),
            batch_sampler=batches,
            collate_fn=Collate(keys),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=place.type == "cuda",
        )
        every = None if output_dir is None else save_every_epochs or 1
        average = _average(model, recipe.epochs, found)
        at_epoch_end = machinery.AtEpochEnd(model, recipe.epochs, every, on_epoch, average)
        trainer = machinery.HeadTrainer(model, args, recipe, loader, at_epoch_end)
        if wanted(progress):
            trainer.add_callback(stack.enter_context(machinery.bar(recipe.epochs * batches.steps)))
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    term = machinery.TERM
    return FitResult(
        losses=[row["loss"] for row in rows],
        terms=[{k.removeprefix(term): v for k, v in row.items() if k.startswith(term)} for row in rows],
        learning_rates=[row["learning_rate"] for row in rows],
        steps=int(trainer.state.global_step),
        seconds=time.monotonic() - start,
        checkpoint=None if output_dir is None else last_checkpoint(folder),
    )


def _fit_from_bank(
    model: Model,
    bank: FeatureBank,
    recipe: Stage,
    seed: int,
    place: torch.device,
    on_epoch: Callable[[int, Any], None] | None,
    start: float,
    progress: bool | None,
) -> FitResult:
    """The plain loop of `banked`: what the Trainer would do, bit for bit."""
    batches = Batches(len(bank), recipe.batch_size, accumulate=1, world=1, rank=0, seed=seed)
    average = _average(model, recipe.epochs, None)

    def each_epoch(done: int) -> None:
        if average is not None:
            average.update(model, done)
            if done == recipe.epochs:
                average.apply(model)
        if on_epoch is not None:
            on_epoch(done, model)

    model.to(place)
    with contextlib.ExitStack() as stack:
        stack.callback(model.eval)
        show = None
        if wanted(progress):
            show = stack.enter_context(step_bar(recipe.epochs * batches.steps, "epoch 0"))
        torch.manual_seed(seed)
        rows = train_from_bank(
            model,
            bank,
            recipe,
            batches,
            seed,
            place,
            each_epoch=each_epoch,
            each_step=show and (lambda n: show(completed=n)),
        )
    return FitResult(
        losses=[row["loss"] for row in rows],
        terms=[{k: v for k, v in row.items() if k not in ("", "loss", "learning_rate")} for row in rows],
        learning_rates=[row["learning_rate"] for row in rows],
        steps=recipe.epochs * batches.steps,
        seconds=time.monotonic() - start,
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, (FVGModel, Tuner)):
        raise FVGError(f"fit trains an FVGModel or a tuner, but a {type(model).__name__} was given; wrap it first.")
    if not model.trainable_parameters():
        raise FVGError(f"this {type(model).__name__} has nothing to train; wrap(…) gives it heads that learn.")


def _published(model: Model) -> Stage:
    kind = _tuner(model).kind
    stage = recipe_for(kind).fvg if isinstance(model, FVGModel) else recipe_for(kind).tune
    if stage is None:
        raise FVGError(f"nothing is published about tuning a {kind!r}; give recipe=….")
    return stage


def _check_settings(recipe: Stage, precision: str, accumulate: int, seed: int) -> None:
    numbers = {"lr": recipe.lr, "epochs": recipe.epochs, "batch_size": recipe.batch_size, "accumulate": accumulate}
    for name, value in numbers.items():
        if not value > 0:
            raise FVGError(f"{name} must be above 0, but is {value}.")
    if not 0 <= seed < 2**32:
        raise FVGError(f"seed must be a whole number from 0 to {2**32 - 1}, but is {seed}.")
    if precision not in PRECISIONS:
        raise FVGError(f"precision {precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    if importlib.util.find_spec("accelerate") is None:
        raise FVGError("fit needs accelerate: pip install 'fvg-adapter[train]'.")


def _place(model: Model, device: str | torch.device | None, precision: str) -> torch.device:
    place = _tuner(model).encoder.device if device is None else torch.device(device)
    if place.index and "LOCAL_RANK" not in os.environ:
        raise FVGError(f"fit trains on the first GPU that it sees; make that {place} with CUDA_VISIBLE_DEVICES.")
    if precision == "fp16" and place.type == "cpu":
        raise FVGError("precision 'fp16' needs a GPU; use 'bf16' or 'no' on a CPU.")
    return place


def _check_data(model: Model, dataset: Any) -> frozenset[str]:
    """What of an item the model takes; looks at the first one."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise FVGError(f"fit needs a data set with a length and indices, but a {type(dataset).__name__} was given.")
    if len(dataset) == 0:
        raise FVGError("the data set is empty; there is nothing to train on.")
    names, labels = getattr(dataset, "classes", None), getattr(dataset, "labels", None)
    if names is not None and set(names) == set(model.classes) and tuple(names) != model.classes:
        raise FVGError(
            "data set and model have the same classes in another order; make the model with dataset.classes."
        )
    if isinstance(labels, Sequence) and max(labels) >= len(model.classes):
        raise FVGError(
            f"the data set has labels up to {max(labels)}, but the model has {len(model.classes)} classes; number them "
            "as the model does: dataset.subset(indices, new_labels, classes)."
        )
    if isinstance(dataset, FeatureBank):
        dataset.check(model, training=True)
    item = dataset[0]
    keys = set(item) if isinstance(item, Mapping) else set()
    if "labels" not in keys or not keys & {"pixel_values", "features"}:
        given = f"has {sorted(keys)}" if keys else f"is a {type(item).__name__}"
        raise FVGError(f"an item needs 'labels', and 'pixel_values' or a bank's 'features', but the first one {given}.")
    return frozenset(inspect.signature(type(model).forward).parameters)


def _check_output(folder: Path) -> None:
    """Makes the folder for checkpoints; what cannot be written is told before the first epoch and not behind it."""
    if folder.exists() and not folder.is_dir():
        raise FVGError(f"{folder} is a file; give a folder for the checkpoints.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch(folder):
            pass
    except OSError as error:
        raise FVGError(f"checkpoints could not be written to {folder}: {error}; give another folder.") from error


def _average(model: Model, epochs: int, found: Path | None) -> GaussianAverage | None:
    """The epoch average of a tuner that has one (PromptSRC), as the checkpoint left it."""
    begin = getattr(model, "weight_average", None)
    if begin is None:
        return None
    average: GaussianAverage = begin(epochs)
    if found is not None:
        load_average(average, found)
    return average


def _tuner(model: Model) -> Tuner:
    return model.tuner if isinstance(model, FVGModel) else model


@contextlib.contextmanager
def _left_as_found(model: Model, precision: str) -> Iterator[None]:
    """Takes off what accelerate leaves: an autocast forward and a mark on the model, a variable in the environment.

    With its mark, accelerate would not prepare the model for a second training: no autocast then.
    """
    variable, marks = "ACCELERATE_MIXED_PRECISION", ("forward", "_original_forward", "_is_accelerate_prepared")
    attributes = {name: model.__dict__[name] for name in marks if name in model.__dict__}
    environment = os.environ.get(variable)
    os.environ[variable] = precision
    try:
        yield
    finally:
        for name in marks:
            model.__dict__.pop(name, None)
        model.__dict__.update(attributes)
        os.environ.pop(variable)
        if environment is not None:
            os.environ[variable] = environment
        for parameter in model.trainable_parameters():
            parameter.grad = None
        model.eval()
