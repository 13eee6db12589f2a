"""Hostile files for every loader: what each loads when it is whole, and ways to spoil it.

Used by test_hostile.py (drawn by hypothesis) and fuzz/loaders.py (guided by coverage).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from conftest import CLASSES, GOLDEN, small_config
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, load, wrap
from fvg_adapter.cli.console import class_names, json_object, read_json
from fvg_adapter.cli.informing import describe
from fvg_adapter.convert import convert
from fvg_adapter.data import MaskedImageFolder
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import MMRL, CoOp, KgCoOp, LoRA, PromptSRC, Tuner, ZeroShot
from fvg_adapter.untrusted import sha256_of

SECONDS = 1.0
MEGABYTES = 300
"""What all cases together may add to the memory of the process."""

Mutation = Callable[[bytes], bytes]


@dataclass
class World:
    """Whole files of every kind, and one small CLIP that all of them belong to."""

    root: Path
    clip: CLIPModel = field(init=False)
    tokenizer: Any = field(init=False)
    hooks: int = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.clip = CLIPModel(small_config()).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")
        self.hooks = self.count_hooks()
        for name, make in TUNERS.items():
            tuner = make(self.clip, self.tokenizer)
            tuner.save_pretrained(self.root / name)
            tuner.detach()
        self._model_files()
        self._other_files()
        assert self.count_hooks() == self.hooks

    def count_hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.clip.modules())

    def _model_files(self) -> None:
        model = wrap(CoOp(self.clip, self.tokenizer, CLASSES, ctx_init=""), foreground="given")
        model.save_pretrained(self.root / "fvg")
        FeatureBank.encode(model, _Pictures(), views=2, output=self.root / "bank", rows_per_shard=3)
        tuner = model.release()
        tuner.detach()
        revision = "0" * 40
        repo = self.root / "hub" / "models--me--fvg"
        shutil.copytree(self.root / "fvg", repo / "snapshots" / revision)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(revision)

    def _other_files(self) -> None:
        (self.root / "checkpoint").mkdir()
        torch.save(
            {"state_dict": {"ctx": torch.zeros(4, 24), "token_prefix": torch.zeros(6, 1, 24)}, "epoch": 3},
            self.root / "checkpoint" / "model.pth.tar-3",
        )
        (self.root / "settings").mkdir()
        (self.root / "settings" / "config.json").write_text(FVGConfig().to_json_string())
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                folder = self.root / "pictures" / split / name
                folder.mkdir(parents=True)
                (folder / "a.png").write_bytes(b"")
        (self.root / "pictures" / "classes.txt").write_text("dog\ncat\n")


class _Pictures:
    classes = CLASSES
    labels = (0, 1, 2, 3, 4)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < 5:
            raise IndexError(index)
        return {"pixel_values": torch.full((3, 32, 32), index / 5), "labels": self.labels[index]}


TUNERS: dict[str, Callable[[CLIPModel, Any], Tuner]] = {
    "zero_shot": lambda clip, tokenizer: ZeroShot(clip, tokenizer, CLASSES),
    "coop": lambda clip, tokenizer: CoOp(clip, tokenizer, CLASSES, n_ctx=2, ctx_init="", csc=True),
    "kgcoop": lambda clip, tokenizer: KgCoOp(clip, tokenizer, CLASSES),
    "promptsrc": lambda clip, tokenizer: PromptSRC(
        clip, tokenizer, CLASSES, prompt_depth_text=2, prompt_depth_vision=2, teacher_templates=["a {}."]
    ),
    "mmrl": lambda clip, tokenizer: MMRL(clip, tokenizer, CLASSES, rep_layers=[1, 2], rep_dim=8),
    "lora": lambda clip, tokenizer: LoRA(clip, tokenizer, CLASSES),
}


def _loaded(world: World, folder: Path) -> None:
    thing = load(folder, clip=world.clip, tokenizer=world.tokenizer)
    _detached(thing)


def _detached(thing: FVGModel | Tuner) -> None:
    (thing.release() if isinstance(thing, FVGModel) else thing).detach()


def _described(world: World, folder: Path) -> None:
    describe(str(folder))


def _from_hub(world: World, folder: Path) -> None:
    """As after a download."""
    thing = load("me/fvg", world.clip, tokenizer=world.tokenizer, cache_dir=folder, local_files_only=True)
    _detached(thing)


def _from_hub_alone(world: World, folder: Path) -> None:
    """The base model is not given: nothing but a Hub id may be looked for."""
    load("me/fvg", cache_dir=folder, local_files_only=True)


def _bank(world: World, folder: Path) -> None:
    bank = FeatureBank.load(folder)
    for index in range(min(len(bank), 8)):
        _ = bank[index]
    bank.batches()


def _checkpoint(world: World, folder: Path) -> None:
    with _no_warnings():
        _detached(convert(folder, world.clip, world.tokenizer, CLASSES).tuner)


def _settings(world: World, folder: Path) -> None:
    FVGConfig.from_dict(read_json(folder / "config.json", "--config"))
    json_object((folder / "config.json").read_bytes().decode("utf-8", "replace"))


def _pictures(world: World, folder: Path) -> None:
    MaskedImageFolder(folder, "train", masks="optional")
    class_names(f"@{folder / 'classes.txt'}")


@dataclass(frozen=True)
class Target:
    """A folder of whole files, which of them are spoiled, and what reads it."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[World, Path], None]


_SNAPSHOT = f"models--me--fvg/snapshots/{'0' * 40}/"
TARGETS = {
    **{
        name: Target(name, ("config.json", "tuner.safetensors"), _loaded)
        for name in TUNERS
        if name not in ("lora", "zero_shot")
    },
    "zero_shot": Target("zero_shot", ("config.json",), _loaded),
    "lora": Target(
        "lora", ("config.json", "lora/adapter_config.json", "lora/adapter_model.safetensors"), _loaded
    ),
    "fvg": Target("fvg", ("config.json", "tuner.safetensors", "fvg_heads.safetensors"), _loaded),
    "info": Target("fvg", ("config.json", "fvg_heads.safetensors"), _described),
    "hub": Target("hub", (f"{_SNAPSHOT}config.json", f"{_SNAPSHOT}fvg_heads.safetensors"), _from_hub),
    "hub alone": Target("hub", (f"{_SNAPSHOT}config.json",), _from_hub_alone),
    "bank": Target("bank", ("index.json", "plan.json", "00000.safetensors", "00001.safetensors"), _bank),
    "checkpoint": Target("checkpoint", ("model.pth.tar-3",), _checkpoint),
    "settings": Target("settings", ("config.json",), _settings),
    "pictures": Target("pictures", ("classes.txt",), _pictures),
}  # fmt: skip


class HostileError(AssertionError):
    """A loader did what it must not do."""


def attempt(world: World, target: Target, spoiled: dict[str, bytes], place: Path, rehash: bool = True) -> str:
    """Reads a folder with some files replaced; what came of it in a word, "read" or "refused".

    Raises:
        HostileError: another exception than FVGError, an error without words, or more than a second.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world.root / target.folder, place)
    for name, content in spoiled.items():
        (place / name).write_bytes(content)
        config = place / "config.json"
        if rehash and name != "config.json" and config.is_file():  # whoever edits a file can edit its hash too
            record = json.loads(config.read_bytes())
            if name in record.get("sha256", {}):
                record["sha256"][name] = sha256_of(place / name)
                config.write_text(json.dumps(record))
    start = time.thread_time()
    try:
        with _no_warnings():
            target.read(world, place)
        outcome = "read"
    except FVGError as error:
        outcome = "refused"
        if not 20 <= len(str(error)) <= 2100:
            raise HostileError(f"the message is no help: {error!s:.300}") from error
    except Exception as error:
        raise HostileError(f"{type(error).__name__}: {error!s:.300}") from error
    finally:
        took = time.thread_time() - start
    if took > SECONDS:
        raise HostileError(f"took {took:.2f} s")
    if world.count_hooks() != world.hooks:
        raise HostileError("left hooks on the user's model")
    if EVIL.exists():
        raise HostileError("code was run")
    return outcome


EVIL = Path(f"/tmp/fvg-hostile-{os.getpid()}") if os.name == "posix" else Path(f"fvg-hostile-{os.getpid()}")
"""What code in a hostile file would make."""


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- ways to spoil a file ----------------------------------------------------------------------------------------------


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a JSON document."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in paths_in(part, (*at, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value in a place; `...` removes it."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    if value is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a whole safetensors file, and its data."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def zip_of(structure: bytes, storages: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, of any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in storages.items():
            archive.writestr(f"archive/data/{name}", content)
    return out.getvalue()


def parts_of(checkpoint: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of a whole checkpoint."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        names = archive.namelist()
        structure = next(archive.read(n) for n in names if n.endswith("data.pkl"))
        return structure, {n.rpartition("/")[2]: archive.read(n) for n in names if "/data/" in n}


def spoiled_values(content: bytes, tensors: Callable[[Tensor], Tensor]) -> bytes:
    """A safetensors file with its first tensor changed."""
    from safetensors.torch import load as parse
    from safetensors.torch import save

    held = parse(content)
    first = next(iter(held))
    return bytes(save({**held, first: tensors(held[first])}))
