"""Banks of features on disk: safetensors shards beside an index, written whole or not at all, mapped when read.

    BANK/plan.json               what is being encoded; written first, so that an unfinished bank can go on
    BANK/00000.safetensors …     ROWS_PER_SHARD images each, all views: name -> (rows, K, …)
    BANK/index.json              the plan again, written last: with it the bank is whole

Imports replacing, untrusted and errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fvg_adapter.errors import FVGError
from fvg_adapter.replacing import others_in, replacing, replacing_file, settle, sweep
from fvg_adapter.untrusted import Header, read_header, read_json

FORMAT, VERSION = "fvg_bank", 2
PLAN, INDEX = "plan.json", "index.json"
_MAX_INDEX_BYTES = 32 * 2**20  # 8 million images
TENSORS: dict[str, int] = {
    **dict.fromkeys(("image", "foreground", "prior", "image_new", "foreground_prior", "foreground_new"), 3),
    **dict.fromkeys(("attended", "attended_new", "attended_prior"), 3),
    **dict.fromkeys(("mask_area", "usable", "attention_in_mask"), 2),
}
"""What a shard may hold, each with its dimensions: (rows, K, D) or (rows, K)."""
ROWS_PER_SHARD = 4096
"""Images in a shard: 100 MB for four views of whole and foreground at width 512."""


@dataclass(frozen=True)
class Plan:
    """What a bank holds and what its features depend on.

    Attributes:
        fingerprint: of the CLIP, and of the tuner where it changes the images.
        settings: how foreground views were made.
        transform: of the pictures, in words. seed: of the views. views: K.
        classes, labels: names, and an index for each image.
        dtype: of the stored features. rows: images in a shard.
    """

    fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    transform: str = ""
    seed: int = 0
    views: int = 1
    classes: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    dtype: str = "float32"
    rows: int = ROWS_PER_SHARD

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        starts = range(0, len(self.labels), self.rows)
        return [range(start, min(start + self.rows, len(self.labels))) for start in starts]

    def differs(self, other: Plan) -> list[str]:
        """What is not the same, in words."""
        said = []
        for name in (f.name for f in fields(self)):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                long = name in ("labels", "classes")
                said.append(f"{name} ({len(mine)} and {len(its)} of them)" if long else f"{name} ({mine!r}, {its!r})")
        return said


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"{number:05d}.safetensors"


def write_shards(
    folder: Path,
    plan: Plan,
    encode: Callable[[range], Mapping[str, Tensor]],
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Encodes and writes this process's shards (every `world`th), passing over those that are there; then the index.

    Raises:
        FVGError: the folder holds another bank, or cannot be written; whole shards stay.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            sweep(folder)
            settle(folder)
            _begin(folder, plan)
        wait()
        for number, rows in enumerate(plan.shards):
            target = shard_file(folder, number)
            if number % world == rank and not _whole(target, len(rows)):
                save_whole({k: _stored(v, plan.dtype) for k, v in encode(rows).items()}, target)
        wait()
        if rank == 0:
            _write_json(folder / INDEX, plan)
    except (OSError, SafetensorError) as error:
        raise FVGError(
            f"could not write the bank {folder}: {error}. Whole shards stay; the same call goes on."
        ) from error


def _begin(folder: Path, plan: Plan) -> None:
    if (folder / PLAN).exists():
        differs = read_plan(folder, PLAN).differs(plan)
        if differs:
            raise FVGError(
                f"{folder} holds another bank: it differs in {'; '.join(differs[:4])}. Delete it or choose another."
            )
        return
    if others_in(folder):
        raise FVGError(f"{folder} is not empty and holds no bank; give a folder of its own.")
    _write_json(folder / PLAN, plan)


def _stored(tensor: Tensor, dtype: str) -> Tensor:
    keep = tensor.dim() < 3 or not tensor.is_floating_point()  # areas and flags stay as they are
    return (tensor if keep else tensor.to(getattr(torch, dtype))).contiguous()


def _whole(file: Path, rows: int) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return all(opened.get_slice(name).get_shape()[0] == rows for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def save_whole(tensors: dict[str, Tensor], target: Path) -> None:
    """One safetensors file, which replaces the target when it is complete."""
    with replacing_file(target) as path:
        save_file(tensors, path)


def _write_json(target: Path, plan: Plan) -> None:
    record = {"format": FORMAT, "version": VERSION, **asdict(plan)}
    with replacing_file(target) as path:
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")


def write_bank(folder: Path, plan: Plan, features: Mapping[str, Tensor]) -> Path:
    """Writes features in memory as a bank of one shard, which takes the place of a bank that is there.

    Raises:
        FVGError: the folder holds something else, or cannot be written; what is there stays.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / PLAN).is_file() or not others_in(folder))):
        raise FVGError(f"{folder} is not empty and holds no bank; give a folder of its own.")
    try:
        with replacing(folder) as new:
            save_whole({k: _stored(v, plan.dtype) for k, v in features.items()}, shard_file(new, 0))
            _write_json(new / PLAN, plan)
            _write_json(new / INDEX, plan)
        shards = {shard_file(folder, number) for number in range(len(plan.shards))}
        for left in set(folder.glob("[0-9][0-9][0-9][0-9][0-9].safetensors")) - shards:  # of a larger bank
            left.unlink()
    except (OSError, SafetensorError) as error:
        raise FVGError(f"could not write the bank {folder}: {error}. What was there before is unchanged.") from error
    return folder


def read_plan(folder: Path, name: str = INDEX) -> Plan:
    """What a bank says of itself.

    Raises:
        FVGError: no bank, an unfinished one, a newer format, or an index that was edited.
    """
    file = folder / name
    if not file.is_file():
        if (folder / PLAN).is_file():
            raise FVGError(f"the bank {folder} is not finished; run the same encoding again, it goes on where it was.")
        raise FVGError(f"{folder} is no bank written by FeatureBank; it has no {INDEX}.")
    record = read_json(file, "the index of a bank", _MAX_INDEX_BYTES)
    if record.pop("format", None) != FORMAT:
        raise FVGError(f"{file} is no index of a bank written by FeatureBank.")
    version = record.pop("version", None)
    if type(version) is int and version > VERSION:
        raise FVGError(
            f"the bank {folder} has format version {version}, but this fvg_adapter reads {VERSION}; upgrade with "
            "pip install -U fvg-adapter, or encode the bank again."
        )
    if version != VERSION:
        raise FVGError(f"the bank {folder} has format version {version!r:.80}, not {VERSION}; encode it again.")
    try:
        plan = Plan(**record)
    except TypeError as error:
        raise FVGError(f"{file} does not hold what an index holds ({error}); encode the bank again.") from error
    wrong = _wrong(plan)
    if wrong:
        raise FVGError(f"{file} has {wrong} of the wrong type, or out of range; encode the bank again.")
    return plan


def _wrong(plan: Plan) -> str | None:
    """The first field that no bank of ours can have, or None."""
    for item in fields(Plan):
        kind = _KINDS[str(item.type).partition("[")[0]]
        if type(getattr(plan, item.name)) is not kind:
            return item.name
    if set(map(type, plan.labels)) - {int} or (
        plan.labels and not 0 <= min(plan.labels) <= max(plan.labels) < max(len(plan.classes), 1)
    ):
        return "labels"
    if set(map(type, plan.classes)) - {str}:
        return "classes"
    if not 1 <= plan.rows < 2**31:
        return "rows"
    if not 1 <= plan.views < 2**31:
        return "views"
    return None if plan.dtype in ("float32", "float16", "float64") else "dtype"


_KINDS: dict[str, type] = {"str": str, "int": int, "list": list, "dict": dict}


def read_shards(folder: Path, plan: Plan) -> list[dict[str, Tensor]]:
    """The shards' tensors, mapped: rows come from the disk when they are asked for.

    Raises:
        FVGError: a shard that is missing, truncated, or of another size.
    """
    count, there = -(-len(plan.labels) // plan.rows), len(list(folder.glob("*.safetensors")))
    if count > there:
        raise FVGError(f"{folder} has {there} shards, but its index says {count}; copy or encode the whole bank again.")
    parts: list[dict[str, Tensor]] = []
    for number, rows in enumerate(plan.shards):
        file = shard_file(folder, number)
        header = read_header(file)
        _check_shard(header, file, len(rows), plan.views)
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FVGError(f"{file} is no whole safetensors file: {error}; encode the bank again.") from error
        if parts and {n: t.shape[2:] for n, t in tensors.items()} != {n: t.shape[2:] for n, t in parts[0].items()}:
            raise FVGError(f"{file} holds other features than the shards before it; encode the bank again.")
        parts.append(tensors)
    return parts


def _check_shard(header: Header, file: Path, rows: int, views: int) -> None:
    """Refuses a shard by its header: other names, dtypes or shapes than a shard of so many images has."""
    shapes = header.shapes
    if "image" not in shapes or {shape[:2] for shape in shapes.values()} != {(rows, views)}:
        raise FVGError(f"{file} holds {shapes}, but the index says {rows} images in {views} views.")
    for name, shape in shapes.items():
        kind = "BOOL" if name == "usable" else header.dtypes[name]
        if name not in TENSORS or header.dtypes[name] != kind or (kind == "BOOL") != (name == "usable"):
            raise FVGError(
                f"{file} holds {name[:80]!r} of type {header.dtypes[name]}; a shard has {', '.join(TENSORS)}, all of "
                "them floating point but 'usable'."
            )
        if len(shape) != TENSORS[name]:
            raise FVGError(f"{file} holds {name} of shape {shape}; {TENSORS[name]} dimensions are expected.")


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Shards as one; a single one stays mapped."""
    if len(parts) == 1:
        return dict(parts[0])
    names = set.intersection(*(set(part) for part in parts))
    return {name: torch.cat([part[name] for part in parts]) for name in sorted(names)}
