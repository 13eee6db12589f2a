"""Checkpoints of the Dassl family (`prompt_learner/model.pth.tar-N` and its relatives) as tuners of this package.

`checkpoints` reads the file, this module knows what each trainer puts into it. Imports tuners and checkpoints.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.checkpoints import checkpoint_file, read_checkpoint
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.coop import CoOp
from fvg_adapter.tuners.kgcoop import KgCoOp
from fvg_adapter.tuners.mmrl import MMRL
from fvg_adapter.tuners.promptsrc import WORDS_UP_TO, PromptSRC

KINDS: dict[str, type[Tuner]] = {"coop": CoOp, "kgcoop": KgCoOp, "promptsrc": PromptSRC, "mmrl": MMRL}

_DROPPED = (
    (r"(?:.*\.)?token_(?:prefix|suffix|midfix)|(?:.*\.)?prompt_embeddings", "depends on the class names, made anew"),
    (r"(?:prompt_learner\.)?(?:bias_vectors|meta_net\..*)|meta_net\..*|adapter\..*", "never used by its trainer"),
    (r"prompt_learner\.ZS_image_encoder\..*", "a copy of the frozen CLIP"),
    (r"(?:image_encoder|text_encoder)\..*|logit_scale", "the frozen CLIP's"),
)


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        tuner: the tuner around the CLIP that was given, in evaluation mode; `save_pretrained` writes our files.
        kind: which tuner. epoch: the epoch that the checkpoint names, or None.
        kept: our parameter names, each with the names in the checkpoint that it was made of.
        dropped: the names that were left out, each with the reason.
        notes: what could not be confirmed, for a person to read.
    """

    tuner: Tuner
    kind: str
    epoch: int | None
    kept: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass
class _Parts:
    """What a converter found: parameters, constructor arguments, and where each parameter came from."""

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)


def convert(
    path: str | os.PathLike[str],
    clip: nn.Module,
    tokenizer: Any,
    classes: Sequence[str],
    *,
    kind: str | None = None,
    **arguments: Any,
) -> Converted:
    """Reads a checkpoint into a tuner around `clip`.

    Args:
        path: the file, or the folder that holds it (the highest epoch is taken).
        clip, tokenizer: the CLIP that was tuned on, as a Hugging Face model.
        classes: the class names that it was tuned on, in the order of the labels; checkpoints do not hold them.
        kind: "coop", "kgcoop", "promptsrc" or "mmrl"; found out from the names in the checkpoint when None.
        **arguments: what the file does not tell, as for the tuner's constructor: `template`, CoOp's
            class_token_position, KgCoOp's weight and teacher_template, PromptSRC's ctx_init where words stay beyond the
            context, MMRL's rep_layers (the last ones by default) and alpha.

    Raises:
        FVGError: code in the file, no checkpoint of these tuners, of another tuner than `kind`, or of a CLIP of other
            sizes or weights; the message names both values.

    Example:
        >>> result = convert("output/CoOp/seed1/prompt_learner", clip, tokenizer, names)      # doctest: +SKIP
        >>> result.tuner.save_pretrained("pets-coop")                                       # doctest: +SKIP
    """
    file = checkpoint_file(path)
    state, epoch = read_checkpoint(file)
    found = kind_of(state, file)
    if kind is None:
        kind = found
    elif kind not in KINDS:
        raise FVGError(f"kind {kind!r} is unknown. {nearest(kind, KINDS)}")
    elif {kind, found} not in ({kind}, {"coop", "kgcoop"}):
        raise FVGError(f"{file} is a checkpoint of {found!r}, but kind {kind!r} was asked for.")
    encoder = DualEncoder(clip)
    _check_clip(state, encoder, file)
    parts = _PARTS[kind](state, encoder, file)
    dropped = _dropped(state, parts, file)
    if kind == "promptsrc" and "ctx_init" not in arguments:
        parts.arguments["ctx_init"] = _promptsrc_words(state, parts, clip, tokenizer, classes)
    if parts.arguments.get("csc") and len(parts.tensors["ctx"]) != len(tuple(classes)):
        raise FVGError(
            f"{file} has class-specific contexts of {len(parts.tensors['ctx'])} classes, but {len(tuple(classes))} "
            f"class "
            "names were given."
        )
    try:
        tuner = KINDS[kind](clip, tokenizer, classes, **{**parts.arguments, **arguments})
    except TypeError as error:
        raise FVGError(f"the arguments do not fit {KINDS[kind].__name__}: {error}.") from error
    try:
        _load(tuner, parts.tensors, file)
    except BaseException:
        tuner.detach()
        raise
    tuner.eval()
    notes = _notes(state, tuner)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Converted(tuner, kind, epoch, parts.kept, dropped, notes)


def kind_of(state: Mapping[str, Tensor], file: Path) -> str:
    """Which tuner's checkpoint it is, by its names.

    Raises:
        FVGError: none that is known; the message lists some of its names.
    """
    names = set(state)
    if any(name.endswith("compound_rep_tokens") for name in names):
        return "mmrl"
    if "prompt_learner.ctx" in names and any(name.startswith("image_encoder.") for name in names):
        return "promptsrc"
    if names & {"ctx", "prompt_learner.ctx"} and not any(
        "compound_prompts" in n or "meta_net.linear2" in n for n in names
    ):
        return "kgcoop" if any("bias_vectors" in name for name in names) else "coop"
    raise FVGError(
        f"{file} is no checkpoint of {', '.join(KINDS)}; it holds {sorted(names)[:5]}… Use tuners.External for a "
        f"model of "
        "another kind."
    )


# -- what each tuner's checkpoint holds ------------------------------------------------------------------------------


def _coop(state: Mapping[str, Tensor], encoder: DualEncoder, file: Path) -> _Parts:
    name = "ctx" if "ctx" in state else "prompt_learner.ctx"
    ctx = state[name]
    _width(file, name, ctx.shape[-1], encoder.text_width, "text")
    arguments: dict[str, Any] = {"n_ctx": ctx.shape[-2], "ctx_init": ""}  # every word is replaced, so none is needed
    if ctx.dim() == 3:
        arguments["csc"] = True
    return _Parts({"ctx": ctx}, arguments, {"ctx": (name,)})


def _promptsrc(state: Mapping[str, Tensor], encoder: DualEncoder, file: Path) -> _Parts:
    parts = _Parts({"text_ctx": state["prompt_learner.ctx"]}, {}, {"text_ctx": ("prompt_learner.ctx",)})
    if "image_encoder.VPT" in state:
        parts.tensors["vision_ctx"] = state["image_encoder.VPT"]
        parts.kept["vision_ctx"] = ("image_encoder.VPT",)
    for ours, theirs in (("text_deep", "text_encoder"), ("vision_deep", "image_encoder")):
        pattern = re.compile(rf"{theirs}\.transformer\.resblocks\.(\d+)\.VPT_shallow")
        blocks = {int(m[1]): m[0] for name in state if (m := pattern.fullmatch(name))}
        if sorted(blocks) != list(range(1, len(blocks) + 1)):
            raise FVGError(
                f"{file} has deep prompts in blocks {sorted(blocks)} of {theirs}; expected 1, 2, … without gaps."
            )
        if blocks:
            parts.kept[ours] = tuple(blocks[i] for i in sorted(blocks))
            parts.tensors[ours] = torch.stack([state[name] for name in parts.kept[ours]])
    _width(file, "prompt_learner.ctx", parts.tensors["text_ctx"].shape[-1], encoder.text_width, "text")
    vision = parts.tensors.get("vision_ctx")
    if vision is not None:
        _width(file, "image_encoder.VPT", vision.shape[-1], encoder.vision_width, "vision")
    parts.arguments = {
        "n_ctx_text": parts.tensors["text_ctx"].shape[0],
        "n_ctx_vision": 0 if vision is None else vision.shape[0],
        "prompt_depth_text": 1 + len(parts.kept.get("text_deep", ())),
        "prompt_depth_vision": 0 if vision is None else 1 + len(parts.kept.get("vision_deep", ())),
    }
    return parts


def _mmrl(state: Mapping[str, Tensor], encoder: DualEncoder, file: Path) -> _Parts:
    learner = next(n for n in state if n.endswith("compound_rep_tokens")).removesuffix("compound_rep_tokens")
    tokens = f"{learner}compound_rep_tokens"
    parts = _Parts({"rep_tokens": state[tokens]}, {}, {"rep_tokens": (tokens,)})
    for ours, theirs in (("r2t", "r2tproj"), ("r2v", "r2vproj")):
        for part in ("weight", "bias"):
            pattern = re.compile(rf"{re.escape(tokens)}_{theirs}\.(\d+)\.{part}")
            maps = {int(m[1]): m[0] for name in state if (m := pattern.fullmatch(name))}
            if not maps or sorted(maps) != list(range(len(maps))):
                raise FVGError(f"{file} lacks MMRL's linear maps {tokens}_{theirs}.N.{part}; is it another method's?")
            parts.kept[f"{ours}_{part}"] = tuple(maps[i] for i in sorted(maps))
            parts.tensors[f"{ours}_{part}"] = torch.stack([state[maps[i]] for i in sorted(maps)])
    if "image_encoder.proj_rep" not in state:
        raise FVGError(
            f"{file} lacks image_encoder.proj_rep, MMRL's projection; only a part of the model was saved in it."
        )
    parts.kept["proj_rep"] = ("image_encoder.proj_rep",)
    parts.tensors["proj_rep"] = state["image_encoder.proj_rep"]
    count = len(parts.tensors["r2t_weight"])
    _width(file, parts.kept["r2t_weight"][0], parts.tensors["r2t_weight"].shape[1], encoder.text_width, "text")
    _width(file, parts.kept["r2v_weight"][0], parts.tensors["r2v_weight"].shape[1], encoder.vision_width, "vision")
    depth = min(len(encoder.text_layers), len(encoder.vision_layers))
    rep = parts.tensors["rep_tokens"]
    layers = range(depth - count + 1, depth + 1)
    parts.arguments = {"n_rep_tokens": rep.shape[0], "rep_dim": rep.shape[1], "rep_layers": layers}
    return parts


_PARTS = {"coop": _coop, "kgcoop": _coop, "promptsrc": _promptsrc, "mmrl": _mmrl}


def _dropped(state: Mapping[str, Tensor], parts: _Parts, file: Path) -> dict[str, str]:
    used = {name for names in parts.kept.values() for name in names}
    dropped, unknown = {}, []
    for name in state:
        reason = next((why for pattern, why in _DROPPED if re.fullmatch(pattern, name)), None)
        if name in used:
            continue
        if reason is None:
            unknown.append(name)
        else:
            dropped[name] = reason
    if unknown:
        raise FVGError(f"{file} holds tensors that these tuners do not have: {unknown[:5]}; it is another method's.")
    return dropped


def _load(tuner: Tuner, tensors: Mapping[str, Tensor], file: Path) -> None:
    own = dict(tuner.named_parameters())
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            ours = tuple(own[name].shape) if name in own else "absent"
            raise FVGError(f"{file} has {name} of shape {tuple(tensor.shape)}, but the tuner's is {ours}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    tuner.invalidate()


# -- whether it is this CLIP and these classes -----------------------------------------------------------------------


def _width(file: Path, name: str, given: int, expected: int, tower: str) -> None:
    if given != expected:
        raise FVGError(f"{name} in {file} has width {given}, but this CLIP's {tower} tower has width {expected}.")


def _check_clip(state: Mapping[str, Tensor], encoder: DualEncoder, file: Path) -> None:
    """Whole-model dumps hold the CLIP they were tuned on: its projections must be this one's."""
    pairs = (("text_encoder.text_projection", "text_projection"), ("image_encoder.proj", "visual_projection"))
    for theirs, ours in pairs:
        module = getattr(encoder.model, ours, None)
        if theirs not in state or not isinstance(module, nn.Linear):
            continue
        given, own = state[theirs], module.weight.detach().float().cpu().T  # OpenAI keeps (width, D)
        if given.shape != own.shape:
            raise FVGError(f"{theirs} in {file} is {tuple(given.shape)}, but this CLIP's is {tuple(own.shape)}.")
        if float((given.float() - own).norm()) > 0.05 * float(own.norm()):
            raise FVGError(f"{file} was tuned on another CLIP: its {theirs} differs from this model's {ours}.")


def _promptsrc_words(
    state: Mapping[str, Tensor], parts: _Parts, clip: nn.Module, tokenizer: Any, classes: Sequence[str]
) -> str:
    """The init words matter where they are more than the context: those that give the saved buffer, if one does."""
    n_ctx, default = parts.arguments["n_ctx_text"], "a photo of a"
    if n_ctx >= len(default.split()) or n_ctx > WORDS_UP_TO:
        return ""
    for words in (default, ""):
        tuner = PromptSRC(clip, tokenizer, classes, **{**parts.arguments, "ctx_init": words})
        try:
            if _same_words(state, tuner) is not False:
                return words
        finally:
            tuner.detach()
    return default


def _same_words(state: Mapping[str, Tensor], tuner: Tuner) -> bool | None:
    """Whether the saved embeddings behind the context are those of our prompts; None: nothing to compare."""
    suffix = next((v for k, v in state.items() if k.endswith("token_suffix")), None)
    if suffix is None or not isinstance(tuner, (CoOp, PromptSRC)) or suffix.dim() != 3:
        return None
    prompts = tuner.prompts(tuner.base_classes)
    first = 1 + (prompts.context.shape[1] if prompts.context is not None else 0)
    if getattr(tuner, "_position", "end") != "end":
        return None  # the buffer is in another order
    if len(suffix) != len(prompts):
        return False
    table = tuner.encoder.token_embedding.weight.detach().float().cpu()
    ours = table[prompts.input_ids][:, first:]
    seen = prompts.attention_mask[:, first:].unsqueeze(-1)  # behind the end of text, padding differs
    theirs = suffix[:, : ours.shape[1]]
    return theirs.shape == ours.shape and bool(((theirs - ours) * seen).abs().max() < 1e-2)


def _notes(state: Mapping[str, Tensor], tuner: Tuner) -> tuple[str, ...]:
    if _same_words(state, tuner) is False:
        return (
            f"the checkpoint's class buffer does not belong to the {len(tuner.base_classes)} class names given; "
            f"give the names "
            "that it was tuned on, in the order of the labels, or base and new classes will be mixed up.",
        )
    return ()
