"""Small state keepers: what a model looked like before we froze it, and which tensors stay in full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LOW = (torch.float16, torch.bfloat16)


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
