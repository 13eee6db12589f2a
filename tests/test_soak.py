"""Two thousand steps: no NaN, frozen weights bit-equal, no growth of memory.

python -m pytest -m soak tests/test_soak.py -s      # prints the figures of docs/reliability.md
"""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tuner_life import LABELS, MAKERS, made
from torch import Tensor
from torch.nn import Parameter
from transformers import CLIPModel

from conftest import NEW_CLASSES
from fvg_adapter import wrap

STEPS, EVERY, WARM = 2000, 100, 500


@dataclass
class Memory:
    """What a process holds, every EVERY steps: bytes and number of tensors, objects, resident bytes."""

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    types: list[Counter[str]] = field(default_factory=list)  # up to the warmed-up state, and the last

    def look(self) -> None:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # isinstance wakes up deprecated attributes
            objects = gc.get_objects()
            # torch.compile leaves fake tensors of symbolic sizes: to add those up makes new objects at every look
            tensors = [o for o in objects if type(o) in (Tensor, Parameter)]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes = sum(t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided)
        self.types = [
            *self.types[: WARM // EVERY + 1],
            Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in objects),
        ]
        self.rows.append((sizes, len(tensors), len(objects), pages * os.sysconf("SC_PAGE_SIZE")))

    def growth(self) -> dict[str, float]:
        """From the warmed-up state to the end; resident bytes as the slope of a line in bytes a step."""
        warm = self.rows[WARM // EVERY :]
        first, last = warm[0], warm[-1]
        slope = np.polyfit(np.arange(len(warm)) * EVERY, [row[3] for row in warm], 1)[0]
        return {
            "tensor_bytes": last[0] - first[0],
            "tensors": last[1] - first[1],
            "objects": last[2] - first[2],
            "rss_bytes_a_step": round(float(slope), 1),
        }

    def grown(self) -> dict[str, int]:
        """The types of objects of which there are more at the end, and how many; the most first."""
        return dict((self.types[-1] - self.types[WARM // EVERY]).most_common(12))


def soak(step: Callable[[int], float]) -> tuple[list[float], Memory]:
    memory, losses = Memory(), []
    for number in range(STEPS + 1):
        if number % EVERY == 0:
            memory.look()
        losses.append(step(number))
    return losses, memory


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def check(what: str, losses: list[float], memory: Memory) -> None:
    growth = memory.growth()
    print(f"\n{what}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, growth {growth}")  # noqa: T201 (asked for with -s)
    assert np.isfinite(losses).all()
    assert growth["tensor_bytes"] == 0 and growth["tensors"] == 0
    assert abs(growth["objects"]) <= 50, (
        memory.grown()
    )  # of some 500,000; a leak of one an hour of training would be more
    assert growth["rss_bytes_a_step"] < 2048  # the allocator's own noise; a leaked batch of features would be 16 KiB


@pytest.mark.soak
@pytest.mark.parametrize("kind", MAKERS)
def test_heads(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    """Masks given, made of attention, and none usable, in turn; scored over other classes between steps."""
    model = wrap(made(kind, small_clip, tokenizer)).train()
    frozen = bits(model.tuner.full_state_dict())
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
    mask = torch.zeros(4, 32, 32)
    mask[:, 8:24, 8:24] = 1
    masks = (mask, None, torch.zeros(4, 32, 32))

    def step(number: int) -> float:
        loss = model(pixels, LABELS, masks[number % 3]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            model.eval()
            with torch.no_grad(), model.use_classes([f"{NEW_CLASSES[0]} {number:05d}", *NEW_CLASSES]):
                assert bool(model(pixels[:1]).logits.isfinite().all())
            model.train()
        return float(loss.detach())

    losses, memory = soak(step)
    check(f"heads behind {kind}", losses, memory)
    assert bits(model.tuner.full_state_dict()) == frozen
    assert all(bool(p.isfinite().all()) for p in model.trainable_parameters())
    assert losses[-1] < losses[0]


@pytest.mark.soak
@pytest.mark.parametrize("kind", MAKERS)
def test_prompts(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = made(kind, small_clip, tokenizer).train()
    own = {id(p) for p in tuner.trainable_parameters()}
    frozen = bits({n: p for n, p in tuner.clip.named_parameters() if id(p) not in own})
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)

    def step(number: int) -> float:
        loss = tuner(pixels, LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses, memory = soak(step)
    check(f"{kind} itself", losses, memory)
    assert bits({n: p for n, p in tuner.clip.named_parameters() if id(p) not in own}) == frozen
    assert all(bool(p.isfinite().all()) for p in tuner.trainable_parameters())
    assert losses[-1] < losses[0]
