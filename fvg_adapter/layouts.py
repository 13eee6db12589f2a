"""How each Hugging Face dual encoder is laid out, as rows of data: a new model is a new row.

`towers.DualEncoder` reads a model through its row, so that nothing else in the package names `vision_model`, `q_proj`
or an output class. A path such as "attention.attention|attention" names alternatives of different transformers
versions; the first one that a module has is meant. Measured on transformers 4.57 and 5.23 (docs/FACTS.md section 2).
Imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

Text = Literal["causal", "masked", "last"]
"""How a text tower reads: "causal", pooled at the end of text (padding cannot matter); "masked", bidirectional (padding
is masked); "last", pooled at the last position of a text padded to the full window."""
Head = Literal["probe", "learned query"]
"""What pools a tower without class token: attention from a learned probe (nn.MultiheadAttention), or from a learned
query that is not projected."""


@dataclass(frozen=True)
class Layout:
    """How one family of dual encoders is put together.

    Attributes:
        name: the family, as in `config.model_type`.
        vision: attribute path from the model to its vision tower.
        attention: path from an encoder layer to its attention module.
        query, key, value: names of the projections inside the attention module; "qkv[1]" is the second third of a fused
            one.
        out: name of the projection behind the attention inside its module; "" where another module does it.
        embeddings: path from the vision tower to the module that turns pixels into tokens.
        leading_tokens: tokens before the first patch; where a class token pools, it is number 0.
        registers: attribute of the vision config that counts register tokens between class token and patches.
        head: what pools where no class token does; head_path: the way from the vision tower to it.
        averaged: whether nothing pools, since the pooling head was left out (as in those of PaliGemma and Gemma 3):
            what the patches look at on average stands for what a pooling token looks at.
        packed: whether the tower takes patches (B, N, 3·p²) with their grids instead of pixels.
        video: whether images are only frames of what the model encodes; it then gives attention and no features.
        interpolates: whether images of any size are taken without being asked for.
        image_projection, text_projection: modules from pooled states to features; None where those are features.
        text: how texts are read; None where the text tower cannot be relied on.
        first_text_token: whether a text's features are made here, of its first token: transformers 4.57 fails to.
        text_encoder: path from the text tower to the module that holds its layers.
        text_length: path (from the text config) to the number of positions.
        text_reserved: positions that are never a token's.
        identity: what tells two models of the same sizes apart: paths from the model, or from its vision tower.
    """

    name: str
    vision: str = "vision_model"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "out_proj"
    embeddings: str = "embeddings"
    leading_tokens: int = 1
    registers: str | None = None
    head: Head | None = None
    head_path: str = ""
    averaged: bool = False
    packed: bool = False
    video: bool = False
    interpolates: bool = False
    image_projection: str | None = "visual_projection"
    text_projection: str | None = "text_projection"
    text: Text | None = "causal"
    first_text_token: bool = False
    text_encoder: str = "encoder"
    text_length: str = "max_position_embeddings"
    text_reserved: int = 0
    identity: tuple[str, ...] = ("visual_projection", "text_projection", "logit_scale")

    @property
    def trims_text(self) -> bool:
        """Whether cutting the padding behind the longest text is exact."""
        return self.text != "last"


_CLIP = Layout("clip")
_SIGLIP = Layout(
    "siglip",
    leading_tokens=0,
    head="probe",
    head_path="head.attention",
    image_projection=None,
    text_projection=None,
    text="last",
    identity=("head.probe", "text_model.head", "logit_scale", "logit_bias"),
)
_VIT = Layout(
    "vit",
    attention="attention.attention|attention",  # nested before 5.20
    query="q_proj|query",
    key="k_proj|key",
    value="v_proj|value",
    out="o_proj|",
)
_DINO = replace(_VIT, name="dinov2", interpolates=True)

LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        _CLIP,
        replace(_CLIP, name="metaclip_2"),
        replace(_CLIP, name="clipseg", interpolates=True),
        replace(_CLIP, name="owlvit"),
        replace(_CLIP, name="owlv2"),
        replace(_CLIP, name="xclip", video=True),
        replace(_CLIP, name="altclip", text="masked", text_encoder="roberta.encoder", text_reserved=2),
        replace(_CLIP, name="chinese_clip", text="masked", first_text_token=True),
        replace(_CLIP, name="blip", query="qkv[0]", key="qkv[1]", value="qkv[2]", out="projection", text="masked"),
        Layout(
            "flava",
            vision="image_model",
            attention="attention.attention",
            query="query",
            key="key",
            value="value",
            out="",
            image_projection="image_projection",
            text="masked",
            identity=("image_projection", "text_projection", "logit_scale"),
        ),
        _SIGLIP,
        replace(_SIGLIP, name="siglip2", packed=True),
        replace(
            _CLIP,
            name="aimv2",
            attention="attention",
            leading_tokens=0,
            head="learned query",
            head_path="head",
            text=None,  # bidirectional under sdpa, causal under eager: another answer for the same text
        ),
        replace(
            _DINO,
            name="tipsv2",
            registers="num_register_tokens",
            image_projection=None,
            text_projection=None,
            text="masked",
            identity=("embeddings.position_embeddings", "text_model.final_layer_norm", "temperature"),
        ),
        _VIT,
        _DINO,
        replace(_DINO, name="dinov2_with_registers", registers="num_register_tokens"),
    )
}
"""Supported families by `config.model_type`."""

VISION_TYPES: dict[str, str] = {
    **{f"{name}_vision_model": name for name in LAYOUTS},
    "flava_image_model": "flava",
    **{name: name for name in ("vit", "dinov2", "dinov2_with_registers")},
}
"""`config.model_type` of vision towers alone, and the family whose row they share."""

TEXT_TYPES: dict[str, Layout] = {
    "clip_text_model": _CLIP,
    "bert": replace(_CLIP, text="masked"),
    "roberta": replace(_CLIP, text="masked", text_reserved=2),
    "xlm-roberta": replace(_CLIP, text="masked", text_reserved=2),
}
"""Text towers that a `VisionTextDualEncoderModel` may hold."""

COMPOSED = "vision-text-dual-encoder"


def layout_of(config: Any) -> Layout | None:
    """The row of a model's config, or None: a family, a vision tower alone, or one composed of two towers."""
    kind = getattr(config, "model_type", "")
    if kind != COMPOSED:
        return LAYOUTS.get(VISION_TYPES.get(kind, kind))
    vision = VISION_TYPES.get(getattr(config.vision_config, "model_type", ""))
    text = TEXT_TYPES.get(getattr(config.text_config, "model_type", ""))
    if vision is None:
        return None
    parts = ("text", "text_encoder", "text_length", "text_reserved")
    own = {part: getattr(text, part) for part in parts} if text is not None else {"text": None}
    return replace(LAYOUTS[vision], name=COMPOSED, **own)


def at(root: Any, path: str) -> Any:
    """What an attribute path leads to; of alternatives ("a.b|a") the first that is there.

    Raises:
        AttributeError: none is.
    """
    for way in path.split("|"):
        found = root
        for part in way.split(".") if way else ():
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AttributeError(f"{type(root).__name__} has no {path.replace('|', ' or ')}")


def has(root: Any, path: str) -> bool:
    """Whether an attribute path leads to something."""
    try:
        return at(root, path) is not None
    except AttributeError:
        return False


def vision_tower(model: nn.Module, layout: Layout) -> nn.Module | None:
    """The vision transformer of a model; nested one level deeper in some classes before transformers 5.6."""
    found = getattr(model, layout.vision, None)
    if found is None:
        alone = getattr(getattr(model, "config", None), "model_type", "") in VISION_TYPES
        return model if alone and (hasattr(model, "encoder") or hasattr(model, "layers")) else None
    tower: nn.Module = getattr(found, layout.vision, found)
    return tower


def text_tower(model: nn.Module) -> nn.Module | None:
    """The text transformer of a model, or None."""
    found = getattr(model, "text_model", None)
    tower: nn.Module | None = getattr(found, "text_model", found)
    return tower
