"""What `fvg-adapter info` says of files that are not ours: what they are, and what to do with them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fvg_adapter.errors import FVGError


def recognised(path: Path) -> dict[str, Any] | None:
    """{"kind", "what", "next", …} of a file or folder that is no saved adapter; None where nothing is recognised.

    Raises:
        FVGError: a `.pth.tar` that is damaged, or that names code; a checkpoint's weights that are damaged.
    """
    if path.is_file():
        return _dassl(path) if ".pth" in path.name or path.suffix in (".pt", ".tar") else None
    if not path.is_dir():
        return None
    config = _json(path / "config.json")
    if config.get("format") == "fvg_adapter":
        return None
    if (path / "trainer_state.json").is_file() and (path / "model.safetensors").is_file():
        return _checkpoint(path)
    if "model_type" in config:
        return _base_model(path, config)
    if (path / "adapter_config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        return {
            "kind": "PEFT adapter",
            "what": f"an adapter written by PEFT for {base or 'a base model that it does not name'}",
            "next": "load it with PeftModel.from_pretrained(clip, …), and give that to wrap",
        }
    if (path / "index.json").is_file() and not config:
        return _bank(path)
    if any(path.glob("model*.pth.tar*")):
        return _dassl(path)
    if any(path.glob("*/model*.pth.tar*")):
        inside = sorted({found.parent.name for found in path.glob("*/model*.pth.tar*")})
        return {
            "kind": "Dassl run",
            "what": f"a run of the Dassl family with the learners {', '.join(inside)}",
            "next": f"fvg-adapter info {path / inside[0]}",
        }
    return None


def _base_model(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    from fvg_adapter.layouts import COMPOSED, LAYOUTS

    kind = str(config["model_type"])
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    advice = f"fvg-adapter train DATA --model {path} --output out, or wrap(model, tokenizer, classes) in Python"
    size, patch = vision.get("image_size"), vision.get("patch_size")
    tower = f", {size} pixels in patches of {patch}" if size and patch else ""
    return {
        "kind": "base model",
        "model_type": kind,
        "what": f"a {kind} model of transformers{tower}: a base model, not an adapter",
        "next": advice if kind in {*LAYOUTS, COMPOSED} else f"wrap takes dual encoders: {', '.join(LAYOUTS)}",
    }


def _dassl(path: Path) -> dict[str, Any]:
    from fvg_adapter.checkpoints import checkpoint_file, read_checkpoint
    from fvg_adapter.convert import kind_of

    file = checkpoint_file(path)
    state, epoch = read_checkpoint(file)
    advice = f"fvg-adapter convert {path} --classes @classes.txt --model openai/clip-vit-base-patch16 --output out"
    try:
        kind = kind_of(state, file)
    except FVGError:
        kind, advice = "unknown", "it is of a method that is not converted; tuners.External takes any model's features"
    numbers = sum(tensor.numel() for tensor in state.values())
    when = "" if epoch is None else f", epoch {epoch}"
    return {
        "kind": "Dassl checkpoint",
        "tuner": kind,
        "epoch": epoch,
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(state.items())},
        "what": f"a checkpoint of the Dassl family, tuner {kind}{when}: {numbers:,} numbers in {len(state)} tensors; "
        "class names are not in it",
        "next": advice,
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / "model.safetensors", "pt") as file:
            names = sorted(file.keys())
    except SafetensorError as error:
        raise FVGError(f"{path / 'model.safetensors'} is no whole safetensors file: {error}; copy it again.") from error
    heads = any(name.startswith("visual_adapter.") for name in names)
    state = _json(path / "trainer_state.json")
    return {
        "kind": "training checkpoint",
        "what": f"a checkpoint of {'fit or the Trainer with FVG-PT' if heads else 'a training'} at step "
        f"{state.get('global_step')}, {len(names)} tensors",
        "next": "go on with fit(…, resume=True) or resume_from_checkpoint; save_pretrained writes what load reads",
    }


def _bank(path: Path) -> dict[str, Any]:
    from fvg_adapter.bank_files import read_plan

    plan = read_plan(path)
    return {
        "kind": "feature bank",
        "what": f"features of {len(plan.labels)} pictures of {len(plan.classes)} classes, {plan.views} views each",
        "next": f"FeatureBank.load({str(path)!r}, model)",
    }


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing."""
    from fvg_adapter.untrusted import read_json

    with contextlib.suppress(FVGError):
        return read_json(path, "JSON")
    return {}
