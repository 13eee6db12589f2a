"""The one place that knows how each Hugging Face dual encoder is laid out.

A `DualEncoder` reads a model through its row of `layouts`: towers, features, logit scale, and where the token that
pools looks. Imports layouts and modes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import LAYOUTS, Layout, at, has, layout_of, text_tower, vision_tower
from fvg_adapter.modes import full_precision


def pooled(output: Any) -> Tensor:
    """The pooled tensor of a tower or feature call, whichever transformers version made it."""
    found = output
    if not isinstance(output, Tensor):
        found = next(
            (v for n in ("image_embeds", "pooler_output") if isinstance(v := getattr(output, n, None), Tensor)), None
        )
    if isinstance(found, Tensor):
        return found[:, 0] if found.dim() == 3 else found  # FLAVA projects every token, the pooling one first
    raise TypeError(f"no pooled features in an output of type {type(output).__name__}")


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Puts new hidden states into the arguments of an encoder layer, positional or by keyword."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": new}


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of an encoder layer or attention module."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a `PeftModel`, or the model itself; injected adapters stay active either way."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) and hasattr(model, "peft_config") else model


class DualEncoder:
    """A read-only view of a user's model: towers, projections, features, logit scale. Owns and changes nothing.

    Args:
        model: a CLIPModel or another dual encoder of `layouts.LAYOUTS`, its vision tower alone, or a PeftModel around
            one.
        projection: for a vision tower without one, the module that maps pooled states (B, width) to features (B, D).

    Raises:
        TypeError: the model is no supported dual encoder; the message names its class and what is supported.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(_unsupported(model))
        base = unwrap_peft(model)
        layout = layout_of(getattr(base, "config", None))
        if layout is None or vision_tower(base, layout) is None:
            raise TypeError(_unsupported(base))
        self.model = base
        self.layout: Layout = layout
        if layout.head is not None and not has(self.vision, layout.head_path):
            self.layout = replace(layout, head=None, averaged=True)
        self.projection = projection

    # -- towers ----------------------------------------------------------------------------------------------------

    @property
    def vision(self) -> nn.Module:
        """The vision transformer."""
        tower = vision_tower(self.model, self.layout)
        assert tower is not None  # checked on construction
        return tower

    @property
    def text(self) -> nn.Module:
        """The text transformer.

        Raises:
            TypeError: the model has none that can be relied on.
        """
        tower = text_tower(self.model)
        if tower is not None and self.layout.text is None:
            raise TypeError(
                f"the text tower of a {type(self.model).__name__} is not supported: it reads the same text in another "
                "way under another attention implementation. Give text features instead, classes={name: feature}."
            )
        if tower is None:
            raise TypeError(
                f"{type(self.model).__name__} has no text tower: give text features instead, classes={{name: feature}}."
            )
        return tower

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision tower whose attention can be read."""
        return True

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower that can be relied on."""
        return self.layout.text is not None and text_tower(self.model) is not None

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the vision tower, first to last."""
        return _layers(_encoder(self.vision))

    @property
    def vision_embeddings(self) -> nn.Module:
        """What turns pixels (B, 3, H, W) into tokens.

        Hooks that need the pixels belong here: a tower that is also the user's model may run without its own hooks
        (PEFT 0.17 calls `model.forward`).
        """
        module: nn.Module = at(self.vision, self.layout.embeddings)
        return module

    @property
    def vision_encoder(self) -> nn.Module:
        """The module whose forward runs all vision layers, outside any gradient checkpointing of single layers."""
        return _encoder(self.vision)

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the text tower, first to last."""
        return _layers(self.text_encoder)

    @property
    def text_encoder(self) -> nn.Module:
        """The module whose forward runs all text layers."""
        encoder: nn.Module = at(self.text, self.layout.text_encoder)
        return encoder

    @property
    def token_embedding(self) -> nn.Embedding:
        """The text tower's token table; a forward hook here sees every prompt before positions are added."""
        try:
            embedding: nn.Embedding = self.text.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # inner towers of transformers 4.57 have none, OWL-ViT's raises
            embedding = next(m for m in self.text.modules() if isinstance(m, nn.Embedding))
        return embedding

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """The attention module of an encoder layer."""
        module: nn.Module = at(layer, self.layout.attention)
        return module

    @property
    def pooling_attention(self) -> Sequence[nn.Module]:
        """The attention modules in which a token that pools looks at the patches, first to last.

        Those of all layers where a class token pools, the pooling head alone where there is one. Those of all layers
        too where nothing pools: there all patches look.
        """
        if self.layout.head is None:
            return [self.attention_of(layer) for layer in self.vision_layers]
        return [at(self.vision, self.layout.head_path)]

    @property
    def pooling_end(self) -> nn.Module:
        """The module behind whose forward all of `pooling_attention` have run."""
        return self.vision_encoder if self.layout.head is None else self.pooling_attention[-1]

    @property
    def leading_tokens(self) -> int:
        """Tokens before the first patch, among those that enter a layer or the pooling head."""
        registers = getattr(self.vision_config, self.layout.registers) if self.layout.registers else 0
        return self.layout.leading_tokens + int(registers)

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def vision_config(self) -> Any:
        """The configuration of the vision tower."""
        config = self.model.config
        return getattr(config, "vision_config", getattr(config, "image_config", config))

    @property
    def text_config(self) -> Any:
        """The configuration of the text tower."""
        return self.model.config.text_config  # type: ignore[union-attr]

    @property
    def vision_width(self) -> int:
        """Hidden size of the vision tower."""
        return int(self.vision_config.hidden_size)

    @property
    def text_width(self) -> int:
        """Hidden size of the text tower, which is also the width of a prompt token."""
        return int(self.text_config.hidden_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixel height and width that the position embeddings were made for."""
        size = getattr(self.vision_config, "image_size", None)
        if size is None:  # a packed tower has a number of patches instead
            size = math.isqrt(int(self.vision_config.num_patches)) * int(self.vision_config.patch_size)
        return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def text_length(self) -> int:
        """Longest text in tokens, start and end included (77 for released CLIPs)."""
        return int(at(self.text_config, self.layout.text_length)) - self.layout.text_reserved

    @property
    def feature_dim(self) -> int:
        """Width D of the joint embedding."""
        if self.projection is not None:
            with torch.no_grad():
                probe = torch.zeros(1, self.vision_width, device=self.device, dtype=self.dtype)
                return int(self.projection(probe).shape[-1])
        projection = self.layout.image_projection
        if projection is None:
            return self.vision_width
        width = getattr(self.model.config, "projection_dim", None)
        return int(width if width is not None else self.vision_config.projection_dim)

    @property
    def projects(self) -> bool:
        """Whether the model, or the projection given beside it, maps pooled states to features."""
        name = self.layout.image_projection
        return self.projection is not None or name is None or hasattr(self.model, name)

    @property
    def text_projection(self) -> nn.Module | None:
        """The module from the text tower's pooled states to features, or None where the tower gives them."""
        name = self.layout.text_projection
        found = getattr(self.model, name, None) if name else None
        return found if isinstance(found, nn.Module) else None

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the vision tower's weights."""
        return next(p.dtype for p in self.vision.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the vision tower's weights are."""
        return next(self.vision.parameters()).device

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of a batch of images (B, 3, H, W)."""
        patch = self.patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.vision_config.patch_size
        return int(size if isinstance(size, int) else size[0])

    def grid_of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of patches, from the arguments of the tower's embeddings.

        Raises:
            FVGError: packed images of several grids in one batch.
        """
        pixels = args[0] if args else kwargs["pixel_values"]
        if not self.layout.packed:
            return self.grid(pixels)
        shapes: Any = args[1] if len(args) > 1 else kwargs["spatial_shapes"]
        grids = {(int(h), int(w)) for h, w in shapes}
        if len(grids) > 1:
            raise FVGError(
                f"the images of this batch have {len(grids)} grids of patches, such as {sorted(grids)[:2]}; attention "
                "maps are recorded of images of one grid: give those together that have the same."
            )
        return grids.pop()

    # -- features --------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features (B, D), not normalised, of images (B, 3, H, W) already normalised for the model.

        Another size than the model's interpolates the position embeddings, as `interpolate_pos_encoding=True` does.
        """
        inputs: dict[str, Any] = {"pixel_values": pixel_values}
        if self.layout.packed:
            inputs = packed(pixel_values, self.patch_size)
        elif tuple(pixel_values.shape[-2:]) != self.image_size and not self.layout.interpolates:
            inputs["interpolate_pos_encoding"] = True
        if hasattr(self.model, "get_image_features"):
            encode: Callable[..., Any] = self.model.get_image_features  # type: ignore[assignment]
            return pooled(encode(**inputs))
        features = pooled(self.model(**inputs))
        return features if self.projection is None else self.projection(features)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features (N, D), not normalised, of token ids (N, L)."""
        encode: Callable[..., Any] = self.model.get_text_features  # type: ignore[assignment]
        if self.layout.text != "masked":  # padding cannot matter, or is read as the tower learned it: without a mask
            return pooled(encode(input_ids=input_ids))
        if self.layout.first_text_token:
            states = self.text(input_ids=input_ids, attention_mask=attention_mask)[0]  # (N, L, width)
            projection = self.text_projection
            features: Tensor = states[:, 0] if projection is None else projection(states[:, 0])
            return features
        return pooled(encode(input_ids=input_ids, attention_mask=attention_mask))

    @property
    def logit_scale(self) -> Tensor:
        """The factor s between cosines and logits: exp(logit_scale), or 1 / temperature; 100 where a model has none."""
        scale = getattr(self.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            return full_precision(scale).exp()
        temperature = getattr(self.model, "temperature", None)
        if isinstance(temperature, Tensor):
            return 1 / full_precision(temperature)
        return torch.tensor(100.0, device=self.device)

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the scaled cosines, () or (1,); None where nothing is. No softmax sees it."""
        bias = getattr(self.model, "logit_bias", None)
        return full_precision(bias) if isinstance(bias, Tensor) else None

    def fingerprint(self) -> dict[str, Any]:
        """What tells two base models apart: sizes, and a hash of the projections and the logit scale.

        Two ViT-B/16 from different makers share every shape, but not these values. The values are hashed once as they
        are rounded to bfloat16 and once by way of float16; a single precision checkpoint shares the one hash with its
        bfloat16 copy and the other with its float16 copy.
        """
        direct, by_half = hashlib.sha256(), hashlib.sha256()
        for name in self.layout.identity:
            value = self._named(name)
            value = getattr(value, "original_module", value)  # PEFT's copy of a whole module is not the base model's
            value = getattr(value, "weight", value)
            value = getattr(value, "base_layer", value)
            if isinstance(value, Tensor):
                exact = value.detach().cpu()
                direct.update(name.encode() + _bfloat16_bytes(exact))
                by_half.update(name.encode() + _bfloat16_bytes(exact.to(torch.float16)))
        shapes = {
            "vision_width": self.vision_width,
            "vision_layers": len(self.vision_layers),
            "patch_size": self.patch_size,
            "image_size": self.image_size[0],
            "text_width": self.text_width if self.has_text else 0,
            "text_layers": len(self.text_layers) if self.has_text else 0,
            "feature_dim": self.feature_dim,
        }
        return {
            "model_type": self.layout.name,
            **shapes,
            "hash": direct.hexdigest()[:16],
            "hash_by_half": by_half.hexdigest()[:16],
        }

    def _named(self, path: str) -> Any:
        for root in (self.model, self.vision):
            try:
                return at(root, path)
            except AttributeError:
                continue
        return None


def _encoder(tower: nn.Module) -> nn.Module:
    encoder: nn.Module = getattr(tower, "encoder", tower)
    return encoder


def _bfloat16_bytes(values: Tensor) -> bytes:
    data: bytes = values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    return data


def _layers(encoder: nn.Module) -> Sequence[nn.Module]:
    layers = getattr(encoder, "layers", None)
    return layers if layers is not None else encoder.layer  # type: ignore[return-value]


def _unsupported(model: Any) -> str:
    return (
        f"{type(model).__name__} is not a dual encoder that fvg_adapter knows. Give a transformers CLIPModel, "
        f"CLIPVisionModelWithProjection, a PeftModel around one, or a tuner (supported families: {', '.join(LAYOUTS)}, "
        "and a VisionTextDualEncoderModel of such towers)."
    )


def packed(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """Images (B, 3, H, W) as a packed tower takes them: patches (B, N, p·p·3) row by row, and their grids.

    No padding mask, since there is no padding: tokens that a tuner appends would not fit it.

    Example:
        >>> {name: tuple(value.shape) for name, value in packed(torch.zeros(2, 3, 32, 48), 16).items()}
        {'pixel_values': (2, 6, 768), 'spatial_shapes': (2, 2)}
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    cut = pixel_values[..., : rows * patch, : columns * patch]
    tiles = cut.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, 3)
    return {
        "pixel_values": tiles.reshape(batch, rows * columns, -1),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
    }


def head_dim(attention: nn.Module, width: int) -> int:
    """Width of one attention head; the attribute names differ between families."""
    size = getattr(attention, "head_dim", None)
    if size is None:
        heads: Any = getattr(attention, "num_heads", None) or attention.num_attention_heads
        size = width // int(heads)
    return int(size)


def attention_scale(attention: nn.Module, width: int) -> float:
    """The factor on query times key before the softmax."""
    return 1.0 / math.sqrt(head_dim(attention, width))


def projected(attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """What a query or key projection of an attention module makes of hidden states (B, N, D), as it is there now.

    Args:
        attention: the attention module.
        name: `Layout.query` or `Layout.key`; "qkv[1]" takes the second third of a fused projection's output.
        hidden: (B, N, D) what enters the attention module.
    """
    name, _, part = name.rstrip("]").partition("[")
    output: Tensor = at(attention, name)(hidden)
    return output.chunk(3, dim=-1)[int(part)] if part else output


def linear_weight(attention: nn.Module, name: str) -> Tensor | None:
    """The weight (D, width) of a projection that is a plain linear map now, or None.

    LoRA, quantised layers, weights that are elsewhere until the layer runs, and hooks of others make it another map.
    """
    name, _, part = name.rstrip("]").partition("[")
    module = at(attention, name)
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return None
    if module._forward_hooks or module._forward_pre_hooks or module.weight.is_meta:
        return None
    weight: Tensor = module.weight
    return weight.chunk(3)[int(part)] if part else weight
