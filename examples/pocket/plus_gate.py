"""A learnt gate for the joint label set, for `plus_ideas`: P(base | x) from cues, fitted without a new class.

Half of the base classes play the new ones (`pseudo`); a logistic regression on a few cues takes the place of plain
CLIP's group mass in METHOD's joint rule (`gated`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.pocket.plus import SHOTS
from examples.pocket.plus_cells import VIEWS, Cell, Figures, Logits, Pictures, Rows, figures, logits, trust
from examples.pocket.plus_variants import Variant
from fvg_adapter import FeatureBank
from fvg_adapter import losses as L

HELD_SHOTS = 4
"""Shots of each base class that the gate is fitted on, and the prompts and heads are not."""
PENALTY = 0.01
"""Of the squared weights, the cues being standardised."""
Learn = Callable[[Cell, FeatureBank], Variant]
"""Trains a model on a bank's classes from the start."""

CUES = ("prior's odds", "FDC's odds", "PC's odds", "entropy of FDC", "entropy of PC", "r")
BEST_GATE = "learnt gate: log-odds of CLIP and both branches"
GATES: Mapping[str, tuple[int, ...]] = {
    "learnt gate: plain CLIP's log-odds alone (a temperature, an offset)": (0,),
    BEST_GATE: (0, 1, 2),
    "learnt gate: entropies of both branches alone": (3, 4),
    "learnt gate: log-odds and entropies": (0, 1, 2, 3, 4),
    "learnt gate: log-odds, entropies and r": (0, 1, 2, 3, 4, 5),
}
"""Which cues a gate sees."""
POOLED: Mapping[str, tuple[int, ...]] = {
    "one learnt gate for all tasks and seeds: log-odds of CLIP and both branches": (0, 1, 2),
    "one learnt gate for all tasks and seeds: log-odds, entropies and r": (0, 1, 2, 3, 4, 5),
}
"""The same, fitted on the held-out base classes of all tasks and seeds together."""


def cues(z: Logits, is_base: Tensor, r: Tensor) -> Tensor:
    """(N, 6) the cues of `CUES`: log-odds of base against new at T = 2, entropies within a group over log C, r."""
    odds = [(s / 2)[:, is_base].logsumexp(-1) - (s / 2)[:, ~is_base].logsumexp(-1) for s in z]
    inside = [z[1][:, is_base], z[2][:, ~is_base]]
    spread = [L.entropy(L.log_probs(s)) / math.log(s.shape[1]) for s in inside]
    return torch.stack([*odds, *spread, r], 1)


class JointGate:
    """log P(base | x) / P(new | x) as a logistic regression on standardised cues, fitted by its penalised likelihood.

    Args:
        seen: (N, 6) cues. is_base: (N,) 1 for pictures of tuned classes. columns: the cues that it uses.
    """

    def __init__(self, seen: Tensor, is_base: Tensor, columns: Sequence[int]) -> None:
        self.columns = list(columns)
        chosen = seen[:, self.columns].double()
        self.mean, self.std = chosen.mean(0), chosen.std(0).clamp_min(1e-6)
        x, y = (chosen - self.mean) / self.std, is_base.double()
        share = y.mean()
        weight = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))  # both groups count the same
        self.parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.parameters], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            z = x @ self.parameters[:-1] + self.parameters[-1]
            loss = F.binary_cross_entropy_with_logits(z, y, weight) + PENALTY * self.parameters[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    @torch.no_grad()
    def __call__(self, seen: Tensor) -> Tensor:
        """(N,) log-odds."""
        x = (seen[:, self.columns].double() - self.mean) / self.std
        odds: Tensor = x @ self.parameters[:-1] + self.parameters[-1]
        return odds.float()


def pseudo(cell: Cell, learn: Learn) -> tuple[Tensor, Tensor]:
    """Cues (N, 6) and groups (N,) without a picture of a new class: each half of the base classes held out in turn.

    The model learns on one half of the base classes, less `HELD_SHOTS` shots; the cues are those of the shots left
    out and of as many of the other half, which plays the new classes, over both halves' names.
    """
    labels, half = cell.train.bank.labels, len(cell.base) // 2
    number = [labels[:i].count(y) for i, y in enumerate(labels)]  # which shot of its class
    found, groups = [], []
    for known in (range(half), range(half, len(cell.base))):
        order = [*known, *(c for c in range(len(cell.base)) if c not in known)]
        names = [cell.base[c] for c in order]
        rows = [i for i, y in enumerate(labels) if y in known and number[i] < SHOTS - HELD_SHOTS]
        part = cell.train.subset(rows, [order.index(labels[i]) for i in rows], names[: len(known)]).bank
        model = learn(cell, part)
        rest = [i for i, n in enumerate(number) if n >= SHOTS - HELD_SHOTS]
        pictures = cell.train.subset(rest, [order.index(labels[i]) for i in rest], names)
        is_base = torch.arange(len(names)) < len(known)
        for k in range(VIEWS):
            one = pictures.view(k)
            found.append(cues(logits(model, one.bank, names), is_base, trust(model, one, names)))
            groups.append(is_base[torch.tensor(one.bank.labels)])
        model.release().detach()
    return torch.cat(found), torch.cat(groups)


def gated(cell: Cell, gate: JointGate, model: Variant) -> Figures:
    """A model with a gate's groups instead of plain CLIP's."""
    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)

    def joint(pictures: Pictures, z: Logits) -> Tensor:
        odds = gate(cues(z, is_base, trust(model, pictures, both))).unsqueeze(1)
        base = F.logsigmoid(odds) + L.log_probs(z[1][:, is_base])
        return torch.cat([base, F.logsigmoid(-odds) + L.log_probs(z[2][:, ~is_base])], 1)

    return figures(cell, model, joint=joint)


def test_cues(cell: Cell) -> tuple[Tensor, Tensor]:
    """The same of the test pictures: what no gate may be fitted on."""
    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)
    found = [cues(logits(cell.plus, p.bank, both), is_base, trust(cell.plus, p, both)) for p in cell.tests]
    return torch.cat(found), torch.cat([torch.full((len(f),), i == 0) for i, f in enumerate(found)])


def gates(cell: Cell, ready: tuple[Tensor, Tensor]) -> Rows:
    """A gate of every kind fitted on this cell's held-out base classes; one fitted on the test pictures beside them."""
    rows = {name: gated(cell, JointGate(*ready, columns), cell.plus) for name, columns in GATES.items()}
    bound = JointGate(*test_cues(cell), range(len(CUES)))
    return {
        **rows,
        "all cues, fitted on the test pictures (no setting: needs their groups)": gated(cell, bound, cell.plus),
    }
