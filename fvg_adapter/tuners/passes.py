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
from typing import Any

import torch
from torch import Tensor, nn

_THREAD = threading.local()
_MARK = "_fvg_pass"


@contextlib.contextmanager
def untouched(*, gradients: bool = False) -> Iterator[None]:
    """Suspends every tuner's hooks in this thread: inside, a CLIP is the CLIP that it was.

    Args:
        gradients: whether a graph is kept. Only where no layer is checkpointed: it may be computed again on another
            thread, where nothing is suspended.
    """
    before = getattr(_THREAD, "untouched", 0)
    _THREAD.untouched = before + 1
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        _THREAD.untouched = before


def is_untouched() -> bool:
    """Whether this thread is inside `untouched()`; hooks ask before they act."""
    return getattr(_THREAD, "untouched", 0) > 0


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Marks passes of this thread that look at other pictures than those that a model was given: cut-outs of them."""
    before = getattr(_THREAD, "beside", 0)
    _THREAD.beside = before + 1
    try:
        yield
    finally:
        _THREAD.beside = before


def is_unrecorded() -> bool:
    """Whether `record_attention` leaves out what this thread runs: the untouched CLIP, or a pass `beside`."""
    return is_untouched() or getattr(_THREAD, "beside", 0) > 0


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


def marked(new: Tensor, hidden: Tensor) -> Tensor:
    """`new` with the mark of the hidden states that it takes the place of, for the next tuner's hook on the layer."""
    if hasattr(hidden, _MARK):
        setattr(new, _MARK, getattr(hidden, _MARK))
    return new


def let_gradients_in(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on a tower's encoder, for tuners that learn inside layers: in a tuner's own pass, with reentrant
    checkpointing (the default before transformers 5), hidden states ask for a gradient.

    Such a checkpoint gives no gradient to what is inside when nothing that enters it asks for one, which is so in a
    frozen tower.
    """
    hidden = args[0] if args else kwargs.get("inputs_embeds")
    if getattr(_THREAD, "owner", None) is None or not torch.is_grad_enabled() or not isinstance(hidden, Tensor):
        return
    if not hidden.requires_grad and any(_reentrant(module) for module in encoder.modules()):
        hidden.requires_grad_(True)


def _reentrant(module: nn.Module) -> bool:
    function = module.__dict__.get("_gradient_checkpointing_func")
    if function is None or not getattr(module, "gradient_checkpointing", False) or not module.training:
        return False
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
