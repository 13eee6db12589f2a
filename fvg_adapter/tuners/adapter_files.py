"""PEFT's two files in lora/, read without trust: which of the config's fields PEFT gets to see, and which tensors.

PEFT imports what `megatron_core` names, matches regular expressions from the file, changes the base model's weights
(PiSSA, `layer_replication`) and allocates what the rank asks for. Here a config says only how large an adapter is and
where it lies: patterns become lists of names, and the adapter is injected without memory until the tensors fit.
Imports PEFT lazily.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import regex
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.untrusted import TensorFile, read_json, shapes_of

FOLDER = "lora"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METHODS: tuple[str, ...] = ("LORA", "IA3", "LOHA", "LOKR", "ADALORA", "OFT", "BOFT", "HRA", "LN_TUNING")
"""PEFT methods that are read from files: made of named layers, without memory of their own until the weights fit."""
_MAX_CONFIG_BYTES = 2**20
_LARGEST = 8192
"""A rank, a block: PEFT makes each matrix once before it drops its memory."""
_SEEDS = ("seed", "key")
_MOST = 4096
_MATCHING_SECONDS = 0.25
_PATTERN = 1000
_NOTED = ("peft_type", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision")
_NAMED = ("target_modules", "feedforward_modules", "exclude_modules")
_PLAIN_LISTS = ("modules_to_save", "layers_pattern")
_PATTERNED = ("rank_pattern", "alpha_pattern")
_WORDS = {"bias": ("none", "all", "lora_only"), "init_lora_weights": ("gaussian", "orthogonal")}


def read_adapter(folder: Path, model: nn.Module) -> tuple[Any, TensorFile]:
    """PEFT's config for a model, and the weights' file, whose tensors are not read yet.

    Args:
        folder: the saved tuner's; PEFT's files lie in its lora/. model: the base model.

    Raises:
        FVGError: a file is missing, no JSON or no safetensors file; a method that is not read from files; a field that
            names code, other models or other files, changes the base model, or is of another type than expected.
    """
    place = folder / FOLDER / CONFIG
    record = read_json(place, "PEFT's config", _MAX_CONFIG_BYTES)
    method = record.get("peft_type")
    if method not in METHODS:
        raise FVGError(f"{place} is of the method {method!r:.80}; read from files are {', '.join(METHODS)}.")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = next(cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if getattr(name, "value", name) == method)
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(kind) if f.init
    }
    unknown = sorted(name[:80] for name, value in record.items() if name not in defaults and value)
    unknown = [name for name in unknown if name not in _NOTED]
    if unknown:
        warnings.warn(f"{place}: {unknown[:8]} are unknown to this PEFT and ignored.", stacklevel=2)
    names = [name for name, _ in model.named_modules() if name]
    taken: dict[str, Any] = {}
    for name, value in record.items():
        if name in defaults and name not in _NOTED:
            taken[name] = _field(name, value, defaults[name], names, place)
    if isinstance(taken.get("target_modules"), list):
        left_out = set(taken.pop("exclude_modules", None) or ())
        taken["target_modules"] = [t for t in taken["target_modules"] if not any(_ends(t, other) for other in left_out)]
    try:
        config = kind(inference_mode=True, **taken)
    except (TypeError, ValueError) as error:
        raise FVGError(f"PEFT refused {place}: {error}.") from error
    return config, TensorFile(folder / FOLDER / WEIGHTS)


def _field(name: str, value: Any, default: Any, names: list[str], place: Path) -> Any:
    """What PEFT gets of a field."""
    if name in _NAMED:
        return _matched(name, value, names, place)
    if name in _PLAIN_LISTS:
        return _plain_list(name, value, place)
    if name in _PATTERNED and isinstance(value, dict) and len(value) <= _MOST:
        return {_plain(name, key, place): _number(name, number, place) for key, number in value.items()}
    if name == "layers_to_transform":
        many = value if isinstance(value, list) else [] if value is None else [value]
        return value if value is None else [_number(name, number, place) for number in many[:_MOST]]
    if name in _WORDS and value in _WORDS[name]:
        return value
    if (type(value) is type(default) and value == default) or (value is None and not default):
        return default
    if isinstance(value, bool) and (default is None or isinstance(default, bool)):
        return value
    if isinstance(value, (int, float)) and (default is None or isinstance(default, (int, float))):
        return _number(name, value, place)
    raise FVGError(
        f"{place} sets {name!r} to {value!r:.120}, which is not taken from a file: it could name code, files or other "
        "models, or change the base model. Load such an adapter with PEFT yourself, and give LoRA(peft_model, …)."
    )


def _number(name: str, value: Any, place: Path) -> Any:
    largest = 2**32 if name.endswith(_SEEDS) else _LARGEST
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > largest:
        raise FVGError(f"{place} has {name} {value!r:.80}; a number up to {largest} is expected.")
    return value


def _plain(name: str, value: Any, place: Path) -> str:
    """A name of a module or its end: PEFT puts some into a regular expression."""
    if not isinstance(value, str) or not regex.fullmatch(r"[\w.]{1,300}", value):
        raise FVGError(f"{place} has {value!r:.80} in {name}; the name of a module is expected.")
    return value


def _plain_list(name: str, value: Any, place: Path) -> list[str] | None:
    if value is None:
        return None
    many = [value] if isinstance(value, str) else value
    if not isinstance(many, list) or len(many) > _MOST:
        raise FVGError(f"{place} has {name} {value!r:.80}; a list of names of modules is expected.")
    return [_plain(name, one, place) for one in many]


def _matched(name: str, value: Any, names: list[str], place: Path) -> list[str] | str | None:
    """Names of modules in place of a regular expression, which is matched here within a time."""
    if not isinstance(value, str) or value == "all-linear":
        return value if value == "all-linear" else _plain_list(name, value, place)
    end = time.monotonic() + _MATCHING_SECONDS
    try:
        if len(value) > _PATTERN or "{" in value:  # counted repeats are written out when a pattern is compiled
            raise ValueError(f"it is longer than {_PATTERN} characters, or counts with {{}}")
        pattern = regex.compile(value)
        return [n for n in names if pattern.fullmatch(n, timeout=max(end - time.monotonic(), 1e-3))]
    except (regex.error, ValueError, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        raise FVGError(f"the pattern {value!r:.80} of {name} in {place} cannot be used: {error}.") from error


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def fitting(saved: Mapping[str, Tensor], own: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The saved tensors by PEFT's names, once each has the name and shape of one of the injected adapter's own.

    Raises:
        FVGError: missing, unexpected or misshapen tensors, values that are NaN or infinite.
    """
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes_of(saved).items()}
    problems = [f"missing {k}" for k in own if k not in shapes]
    problems += [f"unexpected {k[:80]}" for k in shapes if k not in own]
    problems += [
        f"{k} is {shapes[k]}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in shapes and shapes[k] != tuple(v.shape)
    ]
    if problems or len(shapes) < len(saved):
        raise FVGError(
            f"the adapter in {FOLDER}/ does not fit: {'; '.join(problems[:6]) or 'two tensors have one name'}."
        )
    return {name.removeprefix(prefix): saved[name] for name in saved}
