"""transformers' Trainer with Dassl's optimiser and schedule, our batches, and loss terms that are checked and averaged.

Importing it takes seconds, so `fit` does it when called. Imports tuners.recipes and transformers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fvg_adapter.errors import FVGError
from fvg_adapter.progress import step_bar
from fvg_adapter.train.banked import not_finite
from fvg_adapter.train.batches import Batches, Loader
from fvg_adapter.train.checkpoints import Staging, checkpoint_folder, save_average
from fvg_adapter.tuners.averaging import GaussianAverage
from fvg_adapter.tuners.recipes import Stage

_log = logging.getLogger(__name__)

TERM = "loss_"
"""Before the name of a loss term in the logs."""


def arguments(
    folder: Path, recipe: Stage, *, on_cpu: bool, seed: int, precision: str, accumulate: int, report_to: Sequence[str]
) -> TrainingArguments:
    """Dassl's training as TrainingArguments; starts the processes' group under a launcher.

    Raises:
        FVGError: what transformers refuses, such as bf16 on hardware without it.
    """
    try:
        args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=recipe.epochs,
            max_grad_norm=0.0,  # Dassl does not clip
            seed=seed,
            use_cpu=on_cpu,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            ddp_backend="gloo" if on_cpu and "LOCAL_RANK" in os.environ else None,
            ddp_find_unused_parameters=False,  # every loss term is always in the graph (METHOD section 3)
            remove_unused_columns=False,
            save_strategy="no",  # AtEpochEnd decides
            logging_strategy="epoch",
            logging_nan_inf_filter=False,  # such a loss is an error here
            disable_tqdm=True,
            report_to=list(report_to) or "none",
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would copy the hooks; a launcher gives each GPU a process
    except (ValueError, OSError, ImportError) as error:
        raise FVGError(f"this training cannot be set up: {error}") from error
    return args


class AtEpochEnd(TrainerCallback):  # type: ignore[misc]
    """Averages weights where the tuner asks for it, calls the user's function, then asks for a checkpoint.

    Args:
        model: what is trained. epochs: of the whole training. every: epochs between checkpoints, None for none.
        then: called with the epochs done and the model.
        average: an epoch average (PromptSRC's) that takes the place of the weights after the last epoch, or None.
    """

    def __init__(
        self,
        model: Any,
        epochs: int,
        every: int | None,
        then: Callable[[int, Any], None] | None,
        average: GaussianAverage | None,
    ) -> None:
        self.model: Any = model
        self.epochs: int = epochs
        self.every: int | None = every
        self.then: Callable[[int, Any], None] | None = then
        self.average: GaussianAverage | None = average

    def on_epoch_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """The Trainer calls it; saving comes after."""
        done = round(state.epoch)
        if self.average is not None:
            self.average.update(self.model, done)
            if done == self.epochs:
                self.average.apply(self.model)
        if self.then is not None:
            self.then(done, self.model)
        if self.every and (done % self.every == 0 or done == self.epochs):
            control.should_save = True


class HeadTrainer(Trainer):  # type: ignore[misc]
    """The Trainer that `fit` uses."""

    def __init__(self, model: Any, args: Any, recipe: Stage, loader: Loader, at_epoch_end: AtEpochEnd) -> None:
        super().__init__(model=model, args=args, train_dataset=loader.dataset, callbacks=[at_epoch_end])
        self.remove_callback(PrinterCallback)  # a library does not print
        self.recipe: Stage = recipe
        self.loader: Loader = loader
        self.at_epoch_end: AtEpochEnd = at_epoch_end
        self.staging: Staging = Staging(Path(args.output_dir), mine=args.should_save)
        self._saving = False
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def get_train_dataloader(self) -> Loader:
        """Our loader as it is: accelerate would cut it up once more."""
        return self.loader

    def create_optimizer(self, *unused: Any) -> torch.optim.Optimizer:
        """The recipe's, over the parameters that learn."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = self.recipe.make_optimizer(self.model.trainable_parameters())
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Dassl's rate, constant within an epoch; the Trainer steps it once per optimiser step."""
        batches = self.loader.batch_sampler
        assert isinstance(batches, Batches)

        def factor(step: int) -> float:
            return self.recipe.learning_rate(step // batches.steps) / self.recipe.lr

        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **unused: Any) -> Any:
        """The model's own loss; one that is not finite is an error before it can reach the parameters."""
        output = model(**inputs)
        if not bool(torch.isfinite(output.loss)):
            raise FVGError(not_finite(output, self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]))
        for name, value in {"": output.loss, **(output.losses or {})}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._batches += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the loss and its terms over the batches of all processes since the last time."""
        if "loss" in logs and self._batches:
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())), "mean") / self._batches
            names = (TERM + name if name else "loss" for name in self._sums)
            logs.update(zip(names, means.tolist(), strict=True))
            self._sums, self._batches = {}, 0
            if self.is_world_process_zero():
                _log.info("epoch %d of %d: loss %.4f", round(self.state.epoch or 0), self.recipe.epochs, logs["loss"])
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, *unused: Any, **also_unused: Any) -> None:
        """Not measured: transformers 5 would walk through the frozen CLIP's parameters in every step."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, written apart and moved to its place when every process has done its part."""
        step = self.state.global_step
        self._saving = True
        try:
            if self.args.should_save and self.at_epoch_end.average is not None:
                save_average(self.at_epoch_end.average, checkpoint_folder(self.staging.folder, step))
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            self.staging.put_in_place(step)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            self.staging.clear()
            folder = checkpoint_folder(self.staging.output, step)
            why = str(error).rstrip(". ")
            if "inline_container" in why:  # torch.save speaks of positions alone
                why = f"the disk is full, or files may not be so large ({why})"
            raise FVGError(
                f"the checkpoint {folder} could not be written: {why}. Earlier checkpoints are whole; make room and go "
                "on with resume=True."
            ) from error
        finally:
            self._saving = False

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        return str(self.staging.folder) if self._saving else super()._get_output_dir(*args, **kwargs)


class Bar(TrainerCallback):  # type: ignore[misc]
    """Moves a bar on."""

    def __init__(self, show: Callable[..., None]) -> None:
        self.show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """After every optimiser step."""
        self.show(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **unused: Any) -> None:
        """After every epoch."""
        if logs and "loss" in logs:
            self.show(description=f"epoch {round(state.epoch)}, loss {logs['loss']:.4f}")


@contextlib.contextmanager
def bar(steps: int) -> Iterator[Bar]:
    """A bar on stderr that is gone when the training is."""
    with step_bar(steps, "epoch 0") as show:
        yield Bar(show)
