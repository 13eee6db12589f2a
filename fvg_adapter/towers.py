"""The one place that knows how each Hugging Face dual encoder is laid out.

A `Layout` is a row of data: where the towers lie, what their attention modules are called, how the image token is
pooled and whether text may be trimmed. `DualEncoder` reads a model through its row, so that nothing else in the package
names `vision_model`, `q_proj` or an output class. A new model is a new row of `LAYOUTS`. Imports torch only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.modes import full_precision


@dataclass(frozen=True)
class Layout:
    """How one family of dual encoders is put together (FACTS: measured on transformers 4.57 to 5.23).

    Attributes:
        name: the family, as in `config.model_type`.
        attention: attribute path from an encoder layer to its attention module.
        query, key: names of the query and key projections inside the attention module; "qkv[1]" is the second
            third of a fused one.
        embeddings: attribute path from the vision tower to the module that turns pixels into tokens.
        leading_tokens: tokens before the first patch; the pooling token is number 0.
        trims_text: True where cutting the padding behind the longest end-of-text token is exact (causal text towers
            that pool at the end-of-text token).
        text_length: attribute path (from the text config) to the longest text in tokens.
    """

    name: str
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    embeddings: str = "embeddings"
    leading_tokens: int = 1
    trims_text: bool = True
    text_length: str = "max_position_embeddings"


LAYOUTS: dict[str, Layout] = {
    "clip": Layout("clip"),
    "clip_vision_model": Layout("clip"),
}
"""Supported `config.model_type` values; the vision-only classes share their family's row."""


def pooled(output: Any) -> Tensor:
    """The pooled tensor of a tower or feature call, whichever transformers version made it."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
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


def _path(root: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        root = getattr(root, part)
    return root


def _tower(model: nn.Module, kind: str) -> nn.Module | None:
    """The vision or text transformer; nested one level deeper before transformers 5.6."""
    found = getattr(model, f"{kind}_model", None)
    if found is None:
        own = f"{kind}_" in getattr(getattr(model, "config", None), "model_type", "")
        return model if own and hasattr(model, "encoder") else None
    tower: nn.Module = getattr(found, f"{kind}_model", found)
    return tower


class DualEncoder:
    """A read-only view of a user's model: towers, projections, features, logit scale. Owns and changes nothing.

    Args:
        model: a CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection, or a PeftModel around one.
        projection: for a vision tower without one, the module that maps pooled states (B, width) to features (B, D).

    Raises:
        TypeError: the model is no supported dual encoder; the message names its class and what is supported.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(_unsupported(model))
        base = unwrap_peft(model)
        layout = LAYOUTS.get(getattr(getattr(base, "config", None), "model_type", ""))
        if layout is None or _tower(base, "vision") is None:
            raise TypeError(_unsupported(base))
        self.model = base
        self.layout = layout
        self.projection = projection

    # -- towers ----------------------------------------------------------------------------------------------------

    @property
    def vision(self) -> nn.Module:
        """The vision transformer."""
        tower = _tower(self.model, "vision")
        assert tower is not None  # checked on construction
        return tower

    @property
    def text(self) -> nn.Module:
        """The text transformer.

        Raises:
            TypeError: the model has none.
        """
        tower = _tower(self.model, "text")
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
        """Whether there is a text tower."""
        return _tower(self.model, "text") is not None

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the vision tower, first to last."""
        return _layers(self.vision)

    @property
    def vision_embeddings(self) -> nn.Module:
        """What turns pixels (B, 3, H, W) into tokens.

        Hooks that need the pixels belong here: a tower that is also the user's model may run without its own hooks
        (PEFT 0.17 calls `model.forward`).
        """
        module: nn.Module = _path(self.vision, self.layout.embeddings)
        return module

    @property
    def vision_encoder(self) -> nn.Module:
        """The module whose forward runs all vision layers, outside any gradient checkpointing of single layers."""
        return _encoder(self.vision)

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        """The encoder layers of the text tower, first to last."""
        return _layers(self.text)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The text tower's token table; a forward hook here sees every prompt before positions are added."""
        get = getattr(self.text, "get_input_embeddings", None)  # the inner tower of transformers 4.57 has none
        embedding = get() if callable(get) else next(m for m in self.text.modules() if isinstance(m, nn.Embedding))
        return embedding

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """The attention module of an encoder layer."""
        module: nn.Module = _path(layer, self.layout.attention)
        return module

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def vision_config(self) -> Any:
        """The configuration of the vision tower."""
        return getattr(self.model.config, "vision_config", self.model.config)

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
        size = self.vision_config.image_size
        return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def text_length(self) -> int:
        """Longest text in tokens, start and end included (77 for released CLIPs)."""
        return int(_path(self.text_config, self.layout.text_length))

    @property
    def feature_dim(self) -> int:
        """Width D of the joint embedding."""
        if self.projection is not None:
            with torch.no_grad():
                probe = torch.zeros(1, self.vision_width, device=self.device, dtype=self.dtype)
                return int(self.projection(probe).shape[-1])
        return int(self.model.config.projection_dim)  # type: ignore[union-attr,arg-type]

    @property
    def projects(self) -> bool:
        """Whether the model, or the projection given beside it, maps pooled states to features."""
        return self.projection is not None or hasattr(self.model, "visual_projection")

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
        patch = int(self.vision_config.patch_size)
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    # -- features --------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features (B, D), not normalised, of images (B, 3, H, W) already normalised for the model.

        Another size than the model's interpolates the position embeddings, as `interpolate_pos_encoding=True` does.
        """
        options = {} if tuple(pixel_values.shape[-2:]) == self.image_size else {"interpolate_pos_encoding": True}
        if hasattr(self.model, "get_image_features"):
            encode: Callable[..., Any] = self.model.get_image_features  # type: ignore[assignment]
            return pooled(encode(pixel_values=pixel_values, **options))
        features = pooled(self.model(pixel_values=pixel_values, **options))
        return features if self.projection is None else self.projection(features)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features (N, D), not normalised, of token ids (N, L)."""
        encode: Callable[..., Any] = self.model.get_text_features  # type: ignore[assignment]
        if self.layout.trims_text:  # causal and pooled at the end of text: what lies behind it cannot matter
            return pooled(encode(input_ids=input_ids))
        return pooled(encode(input_ids=input_ids, attention_mask=attention_mask))

    @property
    def logit_scale(self) -> Tensor:
        """exp(logit_scale), the factor s between cosines and logits; 100 where a vision-only model has none."""
        scale = getattr(self.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            return full_precision(scale).exp()
        return torch.tensor(100.0, device=self.device)

    def fingerprint(self) -> dict[str, Any]:
        """What tells two base models apart: sizes, and a hash of the projections and the logit scale.

        Two ViT-B/16 from different makers share every shape, but not these values. The values are hashed once as they
        are rounded to bfloat16 and once by way of float16; a single precision checkpoint shares the one hash with its
        bfloat16 copy and the other with its float16 copy.
        """
        direct, by_half = hashlib.sha256(), hashlib.sha256()
        for name in ("visual_projection", "text_projection", "logit_scale"):
            value = getattr(self.model, name, None)
            value = getattr(value, "weight", value)
            value = getattr(value, "base_layer", value)
            if isinstance(value, Tensor):
                exact = value.detach().cpu()
                direct.update(name.encode() + _bfloat16_bytes(exact))
                by_half.update(name.encode() + _bfloat16_bytes(exact.to(torch.float16)))
        config = self.vision_config
        shapes = {
            "vision_width": self.vision_width,
            "vision_layers": len(self.vision_layers),
            "patch_size": int(config.patch_size),
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


def _encoder(tower: nn.Module) -> nn.Module:
    encoder: nn.Module = getattr(tower, "encoder", tower)
    return encoder


def _bfloat16_bytes(values: Tensor) -> bytes:
    data: bytes = values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    return data


def _layers(tower: nn.Module) -> Sequence[nn.Module]:
    encoder = _encoder(tower)
    layers = getattr(encoder, "layers", None)
    return layers if layers is not None else encoder.layer  # type: ignore[return-value]


def _unsupported(model: Any) -> str:
    names = sorted({layout.name for layout in LAYOUTS.values()})
    return (
        f"{type(model).__name__} is not a dual encoder that fvg_adapter knows. Give a transformers CLIPModel, "
        f"CLIPVisionModelWithProjection, a PeftModel around one, or a tuner (supported families: {', '.join(names)})."
    )


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
    output: Tensor = getattr(attention, name)(hidden)
    return output.chunk(3, dim=-1)[int(part)] if part else output
