"""A cache of frozen text features that cannot go stale unnoticed.

An entry is valid for one class list, template, dtype, device, autocast state and set of parameters (their identities
and versions). While any parameter needs a gradient nothing is cached, because edits through `p.data` leave no trace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

ENTRIES = 8
"""Class lists kept; the oldest goes first."""
_CHANGING = threading.Lock()

Value = TypeVar("Value")


class TextCache:
    """Text features (C, D) by everything that they depend on."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}

    def get(self, context: Hashable, parameters: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The cached features, or computed ones; the result is outside any graph when it comes from the cache."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if learns or torch.compiler.is_compiling():
            return compute()
        if any(p.requires_grad for p in parameters):  # between steps of a training: an optimiser may use p.data
            with torch.no_grad():
                return compute()
        key = (context, _state(parameters))
        entry = self._entries.get(key)
        if entry is None:
            with torch.inference_mode(False), torch.no_grad():
                found = compute()
            # parameters are kept alive, so that no identity is used again
            entry = remembered(self._entries, key, lambda: (found, list(parameters)))
        return entry[0]

    def clear(self) -> None:
        """Forgets everything."""
        with _CHANGING:
            self._entries.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_entries": {}}  # copies and pickles start empty: identities of parameters mean nothing there


def remembered(entries: dict[Hashable, Value], key: Hashable, make: Callable[[], Value]) -> Value:
    """The entry, made where it is missing; of more than ENTRIES the oldest goes."""
    value = entries.get(key)
    if value is None:
        value = make()
        with _CHANGING:  # other threads may be adding theirs
            while len(entries) >= ENTRIES:
                entries.pop(next(iter(entries)), None)
            entries[key] = value
    return value


def parameters_of(tower: nn.Module) -> list[Tensor]:
    """`list(tower.parameters())` without its names: asked for in every forward, so a tenth of the time matters."""
    found: list[Tensor] = []
    waiting = [tower]
    while waiting:
        module = waiting.pop()
        found += [p for p in module._parameters.values() if p is not None]
        waiting += [m for m in module._modules.values() if m is not None]
    return found


def _state(parameters: Sequence[Tensor]) -> Hashable:
    if not parameters:
        return ()
    kind = parameters[-1].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, tuple((id(p), _version(p), p.data_ptr(), p.dtype, p.device) for p in parameters)


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version
