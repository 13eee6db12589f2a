"""Which base model a saved file belongs to: how a config names it, finds it again and refuses another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder


def base_model_record(clip: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """How a config names its base model: Hub id and revision, or "local"; and a fingerprint."""
    encoder = DualEncoder(clip) if not isinstance(clip, DualEncoder) else clip
    name = str(getattr(encoder.model, "name_or_path", "") or "")
    record: dict[str, Any] = {"id": name, "revision": getattr(encoder.model.config, "_commit_hash", None)}
    if not name or Path(name).exists():
        record = {"id": "local", "revision": None, "path": name or None}
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    if source and source != name and not Path(source).exists():
        record["tokenizer"] = source
    return {**record, "class": type(encoder.model).__name__, "fingerprint": encoder.fingerprint()}


def check_base_model(clip: nn.Module, record: Mapping[str, Any]) -> None:
    """Refuses a base model that the saved heads were not made for.

    Raises:
        FVGError: naming the first value that differs, in both models.
    """
    expected, found = record.get("fingerprint"), DualEncoder(clip).fingerprint()
    if not isinstance(expected, Mapping):
        raise FVGError("the config's base_model has no fingerprint; the file was edited or is incomplete.")
    for key, value in found.items():
        if expected.get(key) != value:
            raise FVGError(
                f"this adapter was made for base model {record.get('id')!r} with {key} {expected.get(key)!r}, but the "
                "model "
                f"given has {key} {value!r}; load the base model that it was tuned on."
            )


def load_base_model(record: Mapping[str, Any]) -> nn.Module:
    """The base model that a config names, through transformers' AutoModel (safetensors or a weights-only load)."""
    from transformers import AutoModel

    source = record.get("path") if record.get("id") == "local" else record.get("id")
    if not source:
        raise FVGError("this adapter was made for a local base model; give it as clip=… (and its tokenizer=…).")
    if record.get("id") == "local" and not (Path(source) / "config.json").is_file():
        raise FVGError(f"the base model could not be loaded: {source} is no model folder any more; give it as clip=….")
    try:
        model: nn.Module = AutoModel.from_pretrained(source, revision=record.get("revision") or "main")
    except (OSError, ValueError) as error:
        raise FVGError(f"the base model {source!r} could not be loaded ({error}); give it as clip=….") from error
    return model


def load_tokenizer(clip: nn.Module, record: Mapping[str, Any]) -> Any:
    """The tokenizer that belongs to a base model, or None for a model without a text tower."""
    encoder = DualEncoder(clip)
    if not encoder.has_text:
        return None
    from transformers import AutoTokenizer

    name = record.get("tokenizer") or getattr(encoder.model, "name_or_path", None) or record.get("path")
    if not name:
        raise FVGError("the base model does not say where its tokenizer is; give tokenizer=….")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FVGError(f"no tokenizer could be loaded from {name!r} ({error}); give tokenizer=….") from error
