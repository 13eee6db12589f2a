"""Muon: momentum whose matrix updates are orthogonalised by Newton-Schulz steps (Jordan et al. 2024), in float32.

For the hidden matrices of small transformers it needs fewer steps than AdamW; torch's own version works in bfloat16,
which CPUs without it emulate slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ of each matrix (N, rows, columns) with rows ≤ columns, by Jordan's quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, rows)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalised updates; matrices of one shape are updated together.

    Args:
        params: two-dimensional parameters.
        lr: factor of the orthogonal update, times sqrt(max(1, rows / columns)).
        momentum: of the gradient average.
        weight_decay: decoupled, times lr.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: defaultdict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[min(p.shape), max(p.shape)].append(p)
            for params in shapes.values():
                self._update(params, group)

    def _update(self, params: list[nn.Parameter], group: dict[str, float]) -> None:
        directions = []
        for p in params:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            direction = p.grad.lerp(average, group["momentum"])
            directions.append(direction if p.shape[0] <= p.shape[1] else direction.mT)
        for p, update in zip(params, orthogonalised(torch.stack(directions)), strict=True):
            size = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update if p.shape[0] <= p.shape[1] else update.mT, alpha=-group["lr"] * size)
