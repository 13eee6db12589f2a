"""Small state keepers: what a model looked like before we froze it, and which tensors stay in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_LOW = (torch.float16, torch.bfloat16)
Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """The function, run as it is where torch.compile meets it: for look-ups that no graph should hold."""
    return cast(Function, torch.compiler.disable(function))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; behind it every module has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Found:
    """requires_grad of every parameter and the mode of every module, as found.

    Attributes:
        trainable: names of the parameters that asked for gradients.
        training: names of the modules in training mode.
    """

    trainable: frozenset[str]
    training: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Found:
        """Reads a model; changes nothing."""
        return cls(
            frozenset(n for n, p in model.named_parameters() if p.requires_grad),
            frozenset(n for n, m in model.named_modules() if m.training),
        )

    def restore(self, model: nn.Module) -> None:
        """Gives the model its flags and modes back."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trainable)
        for name, module in model.named_modules():
            module.training = name in self.training


@dataclass
class _Shared:
    """How a module was found by its first holder, and how many hold it."""

    found: Found
    holders: int


_HELD: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


class Hold:
    """A module that is frozen by one or several owners: the first notes how it was found, the last one restores that.

    A copy (deepcopy, pickle) of an owner restores its own copy of the module to what was found.
    """

    def __init__(self, module: nn.Module) -> None:
        shared = _HELD.get(module)
        if shared is None:
            shared = _HELD[module] = _Shared(Found.of(module), 0)
        shared.holders += 1
        self.found: Found = shared.found
        self.released: bool = False

    def release(self, module: nn.Module) -> None:
        """Gives the module back; a second call does nothing."""
        if self.released:
            return
        self.released = True
        shared = _HELD.get(module)
        if shared is not None and shared.found is self.found:
            shared.holders -= 1
            if shared.holders:
                return
            del _HELD[module]
        self.found.restore(module)


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype in _LOW else tensor


def keep_full_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A tensor function for `Module._apply` that moves a tensor but never lowers it to half precision."""

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype in _LOW and tensor.dtype not in _LOW:
            return tensor.to(result.device)
        return result

    return apply
