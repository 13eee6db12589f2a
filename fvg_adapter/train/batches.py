"""What a training step sees, whoever loads it: order and augmentation depend on (seed, epoch, picture) alone.

Not on the number of processes or workers, nor on a resume. Imports data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fvg_adapter.data import collate
from fvg_adapter.data.randomness import drawn_under, seed_of
from fvg_adapter.errors import FVGError

Key = tuple[int, int]
"""Epoch and index of a picture."""


class Batches(Sampler[list[Key]]):
    """This process's batches: equal parts of one seeded order that all processes share.

    An optimiser step takes `batch × accumulate × world` pictures in a row from the order of its epoch, and what is left
    over is dropped (Dassl). Equal parts keep the mean of the processes' mean losses the mean over all pictures; so
    fewer pictures than a step takes are shared out evenly as one step.

    Args:
        size: pictures. batch: pictures in a batch. accumulate: batches in an optimiser step.
        world, rank: processes, and which one this is. seed: of the order.

    Raises:
        FVGError: fewer pictures than parts.

    >>> [list(Batches(5, 2, accumulate=1, world=2, rank=r, seed=1)) for r in range(2)]
    [[[(0, 0), (0, 1)]], [[(0, 2), (0, 4)]]]
    """

    def __init__(self, size: int, batch: int, *, accumulate: int, world: int, rank: int, seed: int) -> None:
        parts = accumulate * world
        if size < parts:
            raise FVGError(
                f"{size} pictures cannot be shared out to {world} processes × {accumulate} accumulated batches; "
                "use fewer of either."
            )
        self.batch_size: int = min(batch, size // parts)
        self.steps: int = size // (self.batch_size * parts)
        self.size: int = size
        self.accumulate: int = accumulate
        self.world: int = world
        self.rank: int = rank
        self.seed: int = seed
        self.epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def drawn_view(seed: int, epoch: int, index: int, views: int) -> int:
    """Which of a bank's K views of a picture an epoch sees: what the bank draws under the picture's own seed."""
    if views < 2:
        return 0
    generator = torch.Generator().manual_seed(seed_of(seed, "picture", epoch, index))
    return int(torch.randint(views, (), generator=generator))


class Drawn(Dataset[dict[str, Any]]):
    """A data set in which a picture's random augmentation depends on (seed, epoch, index) alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset: Any = dataset
        self.seed: int = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        with drawn_under(seed_of(self.seed, "picture", epoch, index)):
            item: dict[str, Any] = self.dataset[index]
            return item


class Collate:
    """Puts items together to a batch of what the model takes: a tuner has no use for masks."""

    def __init__(self, accepted: frozenset[str]) -> None:
        self.accepted = accepted

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch: stacked by `data.collate`, or by default_collate where the items are a bank's."""
        kept = [{name: value for name, value in item.items() if name in self.accepted} for item in items]
        together: dict[str, Any] = default_collate(kept) if "features" in kept[0] else collate(kept)
        return together


class Loader(DataLoader[dict[str, Any]]):
    """A DataLoader of Batches that the Trainer tells the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        assert isinstance(self.batch_sampler, Batches)
        self.batch_sampler.set_epoch(epoch)
