"""Gaussian weight averaging over epochs (PromptSRC's GPA), for any training loop. Imports torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError


class GaussianAverage:
    """θ = Σ_i g_i θ_i over the parameters at the end of epochs i = 1 … N, g_i ∝ exp(−(i − mean)² / (2 std²)), Σ g_i =
    1.

    Only what learns is averaged: frozen weights are the same at every epoch.

    Args:
        epochs: N, the length of the whole training.
        mean, std: of the Gaussian over epochs; with 15, 1 and N = 10 the last epoch gets 0.996.

    Raises:
        FVGError: no epochs, or a deviation that is not above 0.

    Example:
        >>> average = tuner.weight_average(epochs=10)                                       # doctest: +SKIP
        >>> for epoch in range(1, 11):                                                      # doctest: +SKIP
        ...     train_one_epoch(tuner); average.update(tuner, epoch)
        >>> average.apply(tuner)                                                            # doctest: +SKIP
    """

    def __init__(self, epochs: int, mean: float = 15, std: float = 1) -> None:
        if epochs < 1 or std <= 0:
            raise FVGError(f"a Gaussian average needs at least 1 epoch and std above 0, but got {epochs} and {std}.")
        self.epochs: int = epochs
        self.mean: float = mean
        self.std: float = std
        self.weights: Tensor = gaussian_weights(epochs, mean, std)
        self._sums: dict[str, Tensor] = {}
        self._seen = 0

    def update(self, tuner: nn.Module, epoch: int) -> None:
        """Takes the parameters at the end of epoch `epoch` = 1, 2, …, N, each once and in order.

        Raises:
            FVGError: another epoch than the next one.
        """
        if epoch != self._seen + 1 or epoch > self.epochs:
            raise FVGError(f"epoch {self._seen + 1} of {self.epochs} is to be averaged next, but {epoch} was given.")
        weight = float(self.weights[epoch - 1])
        for name, parameter in tuner.named_parameters():
            if parameter.requires_grad:
                value = weight * parameter.detach().double()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._seen = epoch

    @torch.no_grad()
    def apply(self, tuner: nn.Module) -> None:
        """Puts the average into the tuner.

        Raises:
            FVGError: not all epochs were taken.
        """
        if self._seen != self.epochs:
            raise FVGError(f"{self._seen} of {self.epochs} epochs were averaged; call update after every epoch first.")
        for name, parameter in tuner.named_parameters():
            if name in self._sums:
                parameter.copy_(self._sums[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, to go on after an interruption."""
        return {"seen": self._seen, "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self._seen, self._sums = int(state["seen"]), dict(state["sums"])


def gaussian_weights(epochs: int, mean: float, std: float) -> Tensor:
    """g (N,) float64, sum 1; in logarithms, so that a mean far outside 1 … N does not underflow.

    >>> gaussian_weights(3, 3, 1)
    tensor([0.0777, 0.3480, 0.5743], dtype=torch.float64)
    """
    i = torch.arange(1, epochs + 1, dtype=torch.float64)
    return torch.softmax(-((i - mean) ** 2) / (2 * std**2), dim=0)
