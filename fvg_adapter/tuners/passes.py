"""Whose pass through a CLIP it is: what a tuner's hooks ask before they act. Imports torch only.

Several tuners may hang on one CLIP, and its owner may call it directly. Rules: inside `untouched()` no hook acts;
inside a tuner's own pass only its hooks act; in a direct call image hooks act and text hooks do not, for the CLIP would
not be told which class list is meant. Gradient checkpointing runs hooks of encoder layers again during backward, on
another thread on a GPU: the layer's input carries the mark of the pass that it was made in.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_THREAD = threading.local()
_MARK = "_fvg_pass"


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Suspends every tuner's hooks in this thread: inside, a CLIP is the CLIP that it was. Gradients are off."""
    before = getattr(_THREAD, "untouched", 0)
    _THREAD.untouched = before + 1
    try:
        with torch.no_grad():
            yield
    finally:
        _THREAD.untouched = before


def is_untouched() -> bool:
    """Whether this thread is inside `untouched()`; hooks ask before they act."""
    return getattr(_THREAD, "untouched", 0) > 0


@contextlib.contextmanager
def own_pass(tuner: nn.Module) -> Iterator[None]:
    """Marks a pass of this thread as a tuner's own: other tuners' hooks on the same CLIP do not act in it."""
    before = getattr(_THREAD, "owner", None)
    _THREAD.owner = tuner
    try:
        yield
    finally:
        _THREAD.owner = before


def acts(tuner: nn.Module, *, in_direct_calls: bool, hidden: Tensor | None = None) -> bool:
    """Whether a hook of this tuner acts now.

    Args:
        tuner: whose hook asks.
        in_direct_calls: what holds when the CLIP's owner calls it directly: True for image hooks, False for text hooks.
        hidden: the hidden states that enter an encoder layer, for hooks that checkpointing may run again.
    """
    if is_untouched():
        return False
    owner = getattr(_THREAD, "owner", None)
    if owner is None and _in_backward():  # a checkpointed layer is computed again
        owner = getattr(hidden, _MARK, tuner)  # a reentrant checkpoint loses the mark; such passes are a tuner's own
    elif hidden is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(hidden, _MARK, owner)
    return in_direct_calls if owner is None else owner is tuner


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
