"""PEFT adapters inside a CLIP: found, suspended for the plain CLIP's passes, read and taken out. PEFT is imported
lazily.

`peft_model.disable_adapter()` would do for one thread, but it flips requires_grad on the way; a hook on each adapted
layer that gives the base layer's output is stateless. Whether a model is adapted is known without importing PEFT, which
whoever adapted it has done.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.passes import is_untouched


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT put in the place of others, outermost ones only."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inner = {id(m) for layer in model.modules() if isinstance(layer, kinds) for m in list(layer.modules())[1:]}
    found = [m for m in model.modules() if isinstance(m, kinds) and id(m) not in inner]
    return [m for m in found if _replaced(m) is not None]


def _replaced(layer: nn.Module) -> nn.Module | None:
    """The module that an adapted layer stands for."""
    for name in ("base_layer", "original_module"):
        module = layer._modules.get(name)
        if module is not None:
            return _replaced(module) or module
    return None


def base_of(layer: nn.Module) -> nn.Module:
    """The untouched module inside an adapted layer."""
    base = _replaced(layer)
    assert base is not None
    return base


def without_adapter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: in a pass of the plain CLIP, what the module gave before it was adapted."""
    return plain_output(layer, args, kwargs) if is_untouched() else None


def plain_output(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base layer's output.

    Raises:
        FVGError: the adapter was merged into the weights, so that the plain CLIP is gone.
    """
    if getattr(layer, "merged", False):
        raise FVGError(
            "the adapters were merged into the CLIP's weights, so the plain CLIP (the prior) cannot be asked; call "
            "unmerge_adapter() first."
        )
    return base_of(layer)(*args, **kwargs)


def adapts_images(encoder: DualEncoder, layers: Sequence[nn.Module]) -> bool:
    """Whether any of the adapted layers lies outside the text tower and its projection."""
    text = {id(m) for m in encoder.text.modules()} if encoder.has_text else set()
    projection = encoder.text_projection
    text |= set() if projection is None else {id(m) for m in projection.modules()}
    return any(id(layer) not in text for layer in layers)


def adapter_state(layers: Sequence[nn.Module]) -> Hashable:
    """What decides which adapters act beside their weights: active ones, switched off or on, merged."""
    names = ("active_adapters", "disable_adapters", "merged_adapters")
    return tuple({str([getattr(layer, name, None) for name in names]): None for layer in layers})


def own_parameters(layer: nn.Module, active_only: bool = False) -> Iterator[nn.Parameter]:
    """The parameters that an adapter brought into a layer."""
    base = {id(p) for p in base_of(layer).parameters()}
    active = set(getattr(layer, "active_adapters", ()))
    for name, parameter in layer.named_parameters():
        if id(parameter) not in base and (not active_only or active & set(name.split("."))):
            yield parameter


def take_out(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Puts the untouched modules back where adapted ones are, and takes PEFT's config off."""
    ids = {id(layer) for layer in layers}
    for name, module in list(model.named_modules()):
        if id(module) in ids:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base_of(module))
    model.__dict__.pop("peft_config", None)
