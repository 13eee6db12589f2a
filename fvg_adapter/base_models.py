"""Which base model a saved file belongs to: how a config names it, finds it again and refuses another."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import errors
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, not declared so
from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import layout_of
from fvg_adapter.towers import DualEncoder

_HASHES = ("hash", "hash_by_half")


def base_model_record(clip: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """How a config names its base model: Hub id and revision, or "local"; and a fingerprint."""
    encoder = DualEncoder(clip) if not isinstance(clip, DualEncoder) else clip
    name = str(getattr(encoder.model, "name_or_path", "") or "")
    record: dict[str, Any] = {"id": "local", "revision": None, "path": str(Path(name).resolve()) if name else None}
    if is_hub_id(name):
        record = {"id": name, "revision": _commit(encoder.model, name)}
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    if source != name and is_hub_id(source):
        record["tokenizer"] = source
    return {**record, "class": type(encoder.model).__name__, "fingerprint": encoder.fingerprint()}


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the Hub's: no folder here, nor the path of one that is gone."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _commit(model: nn.Module, name: str) -> str | None:
    """The commit that a model came from, or None when that is not certain.

    transformers 4 notes it in the model's config. 5 does not; then it is the one that the cache holds, if only one.
    """
    noted = getattr(model.config, "_commit_hash", None)
    if noted:
        return str(noted)
    snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    held = [path.parent.name for path in snapshots.glob("*/config.json")]
    return held[0] if len(held) == 1 else None


def check_base_model(clip: nn.Module, record: Mapping[str, Any]) -> None:
    """Refuses a base model that the saved heads were not made for.

    Raises:
        FVGError: naming the first value that differs, in both models.
    """
    expected, found = record.get("fingerprint"), DualEncoder(clip).fingerprint()
    if not isinstance(expected, Mapping):
        raise FVGError("the config's base_model has no fingerprint; the file was edited or is incomplete.")
    same = any(expected.get(key) in [found[other] for other in _HASHES] for key in _HASHES)
    for key, value in found.items():
        if not isinstance(expected.get(key), (str, int, float, list, type(None))):
            raise FVGError(f"the config's base_model has {key} {expected[key]!r:.80}; the file was edited.")
        if expected.get(key) != value and not (key in _HASHES and same):
            raise FVGError(
                f"this adapter was made for base model {record.get('id')!r} with {key} {expected.get(key)!r}, but the "
                "model "
                f"given has {key} {value!r}; load the base model that it was tuned on."
            )


def load_base_model(record: Mapping[str, Any], **hub: Any) -> nn.Module:
    """The base model that a config names, through transformers' AutoModel (safetensors or a weights-only load).

    Args:
        record: the config's base_model.
        **hub: token, cache_dir and local_files_only; what else `snapshot_download` takes is left alone.

    Raises:
        FVGError: no such model, no dual encoder, code of its own, or a local one that this machine does not have.
    """
    from transformers import AutoConfig, AutoModel

    source = record.get("path") if record.get("id") == "local" else record.get("id")
    if not source:
        raise FVGError("this adapter was made for a local base model; give it as clip=… (and its tokenizer=…).")
    if record.get("id") != "local":
        _refuse_no_hub_id(source, "base model", "clip")
    elif not (Path(source) / "config.json").is_file():
        raise FVGError(f"the base model could not be loaded: {source} is no model folder any more; give it as clip=….")
    revision = record.get("revision")
    try:
        found = _cached_first(AutoConfig, source, revision, ("config.json",), hub)
        if layout_of(found) is None:
            raise FVGError(
                f"the base model {source!r} is a {getattr(found, 'model_type', None)!r}, which is no dual encoder that "
                "this library knows; nothing more of it was loaded."
            )
        weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        model: nn.Module = _cached_first(AutoModel, source, revision, weights, hub)
    except hub_errors() as error:
        if isinstance(error, FVGError):
            raise
        raise FVGError(f"the base model {source!r} could not be loaded ({error}); give it as clip=….") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise FVGError(f"the base model {source!r} brings an adapter of its own; give the model as clip=….")
    return model


def refuse_path(record: Mapping[str, Any], source: str) -> None:
    """Refuses a config from the Hub that names a folder of this machine: it could name any.

    Raises:
        FVGError: the record has a path; `push_to_hub` never writes one.
    """
    if record.get("path"):
        raise FVGError(
            f"the config of {source} names {record['path']!r} as its base model, a folder on the machine that reads "
            "it; a config from the Hub may only name a Hub id. Give the base model as clip=…, from a copy of the files "
            "on this disk."
        )


def _refuse_no_hub_id(name: str, what: str, argument: str) -> None:
    if not is_hub_id(name):
        raise FVGError(
            f"the config names {name!r} as its {what}, which is no Hub id, or is a folder here that transformers would "
            f"read instead; give it as {argument}=…."
        )


def load_tokenizer(clip: nn.Module, record: Mapping[str, Any], **hub: Any) -> Any:
    """The tokenizer that belongs to a base model, or None for a model without a text tower."""
    encoder = DualEncoder(clip)
    if not encoder.has_text:
        return None
    from transformers import AutoTokenizer

    if record.get("tokenizer"):
        _refuse_no_hub_id(record["tokenizer"], "tokenizer", "tokenizer")
    name = record.get("tokenizer") or getattr(encoder.model, "name_or_path", None) or record.get("path")
    if not name:
        raise FVGError("the base model does not say where its tokenizer is; give tokenizer=….")
    revision = record.get("revision") if name == record.get("id") else None  # of the same commit as the model
    try:
        return _cached_first(AutoTokenizer, name, revision, ("tokenizer.json", "vocab.json", "spiece.model"), hub)
    except hub_errors() as error:
        raise FVGError(f"no tokenizer could be loaded from {name!r} ({error}); give tokenizer=….") from error


def _cached_first(kind: Any, name: str, revision: str | None, telling: tuple[str, ...], hub: Mapping[str, Any]) -> Any:
    """`from_pretrained` of a commit without the network where the cache holds it: a commit never changes.

    transformers asks the Hub each time for files that a repository may not have, and waits for long where nothing
    answers. `telling` are files of which one must be there for the cache to be trusted.
    """
    from huggingface_hub import try_to_load_from_cache

    shared = {**_shared(hub), "trust_remote_code": False}
    at = {"revision": revision, "cache_dir": shared.get("cache_dir")}
    known = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    if known and any(isinstance(try_to_load_from_cache(name, file, **at), str) for file in telling):
        here = {**shared, "revision": revision, "local_files_only": True}
        # transformers 5 looks for PEFT's file without the flag, 4 takes it no second time
        for more in ({"adapter_kwargs": {"local_files_only": True}}, {}) if hasattr(kind, "_model_mapping") else ({},):
            with contextlib.suppress(*hub_errors(), TypeError):  # of half a repository, too
                return kind.from_pretrained(name, **here, **more)
    return kind.from_pretrained(name, revision=revision or "main", **shared)


def hub_errors() -> tuple[type[Exception], ...]:
    """What talking to the Hub raises: OSErrors, ValueErrors for names, and those of requests or httpx by version."""
    return OSError, ValueError, getattr(errors, "HTTPError", OSError)


def _shared(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hub.items() if k in ("token", "cache_dir", "local_files_only")}
