"""Random augmentation that depends on a key alone, whatever was drawn before and whoever draws."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*parts: object) -> int:
    """A seed of 56 bits made of anything that can be written down."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextlib.contextmanager
def randomness_kept(cuda: bool = True) -> Iterator[None]:
    """Puts the global generators of Python, numpy and torch back behind the block."""
    on_gpu = torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_available() else []
    found = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(found[0])
        np.random.set_state(found[1])
        torch.set_rng_state(found[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


@contextlib.contextmanager
def drawn_under(seed: int) -> Iterator[None]:
    """All three generators of the CPU start from a seed inside the block, and go on as before behind it."""
    with randomness_kept(cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
