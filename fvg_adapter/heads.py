"""The trainable heads of FVG-PT: two bottleneck adapters and two reliability gates (METHOD.md sections 3 to 5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

N_CUES = 3


class BottleneckAdapter(nn.Module):
    """A: D → bottleneck → D with ReLU; the residual adapter of FDC (section 4).

    Args:
        dim: feature width D.
        bottleneck: hidden width (64).
        init_std: standard deviation of the up-projection, whose bias is 0 (1e-3: starts at the tuned model).
    """

    def __init__(self, dim: int, bottleneck: int = 64, init_std: float = 1e-3) -> None:
        super().__init__()
        self.down: nn.Linear = nn.Linear(dim, bottleneck)
        self.up: nn.Linear = nn.Linear(bottleneck, dim)
        nn.init.normal_(self.up.weight, std=init_std)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:
        """f~ = ‖f‖ · normalise(f + A(f)) for features (N, D); unit features stay unit."""
        moved = features + self.up(F.relu(self.down(features)))
        norm: Tensor = features.norm(dim=-1, keepdim=True)
        return norm * F.normalize(moved, dim=-1)


class ReliabilityGate(nn.Module):
    """MLP 3 → hidden → 1 with ReLU on statistics of two predictions; sigmoid(output) is a trust in [0, 1].

    It never sees a class, so it works for any label set.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.hidden: nn.Linear = nn.Linear(N_CUES, hidden)
        self.out: nn.Linear = nn.Linear(hidden, 1)

    def forward(self, cues: Tensor) -> Tensor:
        """Gate logits (B,) of cues (B, 3)."""
        logits: Tensor = self.out(F.relu(self.hidden(cues))).squeeze(-1)
        return logits
