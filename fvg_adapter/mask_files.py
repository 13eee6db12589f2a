"""Masks of a whole data set as files in the authors' mirrored layout (METHOD.md section 10): made once, read often.

`ROOT/a/b/img.jpg` gets `OUTPUT/a/b/img.png`. Files appear whole or not at all; what is there is kept, so a run that was
killed goes on; under a launcher the processes share the pictures, and what comes out does not depend on how many they
are, since pictures always go through a model in the same blocks. Imports data; `mask_makers` makes the masks.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Image as PILImage
from torch import Tensor

from fvg_adapter.data import MaskedImageFolder, UnreadableImageError
from fvg_adapter.data.images import DecodedMask, Picture, as_stored, read_mask, read_picture
from fvg_adapter.data.watch import looks_inverted
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.launched import Processes
from fvg_adapter.mask_makers import Maker
from fvg_adapter.replacing import others_in, sweep, written
from fvg_adapter.untrusted import read_json

FORMATS = ("png", "jpg")
PLAN = "masks.json"


@dataclass(frozen=True)
class MaskSummary:
    """What a run did, and what the masks are like; those that were there already are counted in.

    Attributes:
        pictures: all. written, kept: masks made in this run, and found. unreadable: pictures without a mask.
        empty: masks without foreground. tiny, full: others that cover too little or too much to be used.
        usable: the rest. mean_area: mean share of the picture, over all masks.
        inverted: masks that cover the border of their picture and not its centre.
        seconds, images_per_second: of this run, over what it wrote.
        areas: share of each picture's mask, by its path below the root.
    """

    pictures: int
    written: int
    kept: int
    unreadable: list[str]
    empty: int
    tiny: int
    full: int
    usable: int
    mean_area: float
    inverted: int
    seconds: float
    images_per_second: float
    areas: dict[str, float] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single areas."""
        return {key: value for key, value in asdict(self).items() if key != "areas"}


def write_masks(
    datasets: Sequence[MaskedImageFolder],
    output: str | os.PathLike[str],
    make: Maker,
    settings: Mapping[str, Any],
    *,
    format: str = "png",
    batch_size: int = 16,
    usable_area: tuple[float, float] = (0.02, 0.98),
    processes: Processes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MaskSummary:
    """Writes a mask for every picture of some splits of one root.

    Args:
        datasets: opened without masks, all below the same root.
        output: the folder that mirrors the root; `ROOT/mask` is where MaskedImageFolder looks by itself.
        make: see `mask_makers.Maker`. settings: what decides its masks, a JSON object; kept in OUTPUT/masks.json.
        format: "png" is read back bit for bit; "jpg" is the authors' own (RGB), which keeps the name of .jpg pictures
            and changes a few pixels at outlines.
        batch_size: pictures in a block. A block is made again as a whole where any of its files is missing.
        usable_area: what counts as tiny and full.
        processes: who shares the work; the launcher's when None.
        progress: called with (done, total) pictures of this process.

    Returns:
        The summary, the same in every process.

    Raises:
        FVGError: OUTPUT holds pictures that this function did not write, or masks made with other settings; a mask
            would be written through a link that leaves OUTPUT; an unknown format.
    """
    if format not in FORMATS:
        raise FVGError(f"format {format!r} is unknown. {nearest(format, FORMATS)}")
    if batch_size < 1 or not datasets:
        raise FVGError(f"at least one split and pictures in blocks of at least 1 are expected, not of {batch_size}.")
    shared = Processes.launched() if processes is None else processes
    folder, root = Path(os.path.abspath(Path(output).expanduser())), datasets[0].root  # noqa: PTH100
    plan = {"format_version": 1, **settings, "format": format, "batch_size": batch_size}
    if shared.rank == 0:
        _begin(folder, plan)
    shared.wait()
    if shared.rank != 0:
        _begin(folder, plan)
    jobs = _jobs(datasets, root, folder, format)
    every = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    blocks = every[shared.rank :: shared.world]
    total, done, start = sum(map(len, blocks)), 0, time.monotonic()
    rows: list[_Row] = []
    with ThreadPoolExecutor(max_workers=4) as decoders:
        for block in blocks:
            rows += _block(block, make, decoders)
            done += len(block)
            if progress is not None:
                progress(done, total)
    seconds = time.monotonic() - start
    rows = sorted(shared.gather(rows), key=lambda row: row.name)
    slowest = max(shared.gather([seconds]))
    return _summary(rows, slowest, usable_area)


@dataclass(frozen=True)
class _Job:
    picture: Path
    name: str  # the path below the root
    class_name: str
    target: Path


@dataclass(frozen=True)
class _Row:
    """What is known of a picture's mask."""

    name: str
    area: float | None  # None for an unreadable picture
    inverted: bool = False
    written: bool = False
    reason: str = ""


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or finds that it is ours and goes on."""
    file = folder / PLAN
    sweep(folder)  # of a run that was killed right after the plan was in its place
    if file.exists():
        try:
            found = read_json(file, "what the masks were made with")
        except FVGError as error:
            raise FVGError(f"{file} cannot be read ({error}); remove it and the masks beside it.") from error
        if found != plan:
            names = sorted(n for n in {*found, *plan} if found.get(n) != plan.get(n))
            said = ", ".join(f"{n} {found.get(n)!r} (now: {plan.get(n)!r})" for n in names)
            raise FVGError(
                f"{folder} holds masks that were made with {said}; give another --output, or remove the folder."
            )
        return
    if folder.exists() and others_in(folder):
        raise FVGError(
            f"{folder} is not empty and holds no {PLAN} of an earlier run, so its files are somebody else's; give "
            "another --output (MaskedImageFolder reads it with mask_root=…), or move them away."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written(file) as part:
        part.write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _jobs(datasets: Sequence[MaskedImageFolder], root: Path, folder: Path, format: str) -> list[_Job]:
    """Every picture once, with its target: names that differ in their extension only keep the whole name."""
    found = [(sample.image, data.classes[sample.label]) for data in datasets for sample in data.samples]
    stems = Counter((picture.parent, picture.stem) for picture, _ in found)
    inside = os.path.realpath(folder)
    checked: set[Path] = set()
    jobs = []
    for picture, class_name in found:
        name = picture.relative_to(root)
        place = folder / name.parent
        if place not in checked:
            checked.add(place)
            if os.path.commonpath([inside, os.path.realpath(place)]) != inside:
                raise FVGError(f"{place} is a link that leaves {folder}; masks are not written through it.")
        if stems[picture.parent, picture.stem] > 1:
            target = place / f"{name.name}.png"
        elif format == "jpg":
            target = place / (name.name if name.suffix.lower() in (".jpg", ".jpeg") else f"{name.stem}.jpg")
        else:
            target = place / f"{name.stem}.png"
        jobs.append(_Job(picture, name.as_posix(), class_name, target))
    return jobs


def _block(block: Sequence[_Job], make: Maker, decoders: ThreadPoolExecutor) -> list[_Row]:
    """The masks of a block: read where all are there, else made together, and the missing ones written."""
    missing = [job for job in block if not (job.target.is_file() and job.target.stat().st_size)]
    pictures = list(decoders.map(_read, block)) if missing else []
    readable = [(job, found) for job, found in zip(block, pictures, strict=False) if isinstance(found, Picture)]
    bad = {job.name: found for job, found in zip(block, pictures, strict=False) if isinstance(found, str)}
    masks: dict[str, Tensor] = {}
    if any(job in missing for job, _ in readable):
        made = make([picture.image for _, picture in readable], [job.class_name for job, _ in readable])
        masks = {job.name: mask for (job, _), mask in zip(readable, made, strict=True)}
    by_name = {job.name: picture for job, picture in readable}
    rows = []
    for job in block:
        if job.name in bad:
            rows.append(_Row(job.name, None, reason=bad[job.name]))
        elif job in missing:
            mask = Image.fromarray(masks[job.name].numpy().astype(np.uint8) * np.uint8(255))
            _write(job.target, mask, by_name[job.name].orientation)
            rows.append(_row(job.name, mask, written=True))
        else:
            with Image.open(job.target) as stored:
                rows.append(_row(job.name, read_mask(stored, str(job.target), Picture(stored.convert("L")))))
    return rows


def _read(job: _Job) -> Picture | str:
    """The picture, or why it cannot be read."""
    try:
        return read_picture(job.picture, str(job.picture))
    except UnreadableImageError as error:
        return str(error)


def _row(name: str, mask: PILImage, written: bool = False) -> _Row:
    area = float((np.asarray(mask) > 127).mean())
    return _Row(name, area, looks_inverted(DecodedMask(mask)), written)


def _write(target: Path, mask: PILImage, orientation: int) -> None:
    """The mask in the geometry of the stored picture, with the same EXIF orientation: both turn together."""
    target.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    turned = as_stored(mask, orientation)
    if target.suffix.lower() == ".png":
        _whole(target, lambda part: turned.save(part, "PNG", **options))
    else:
        _whole(target, lambda part: turned.convert("RGB").save(part, "JPEG", quality=95, subsampling=0, **options))


def _whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its target and puts it there at once; what a killed run left is written over."""
    part = target.with_name(f".{target.name}.part")
    write(part)
    part.replace(target)


def _summary(rows: Sequence[_Row], seconds: float, usable: tuple[float, float]) -> MaskSummary:
    areas = {row.name: row.area for row in rows if row.area is not None}
    values = np.array(list(areas.values()))
    written = sum(row.written for row in rows)
    empty = int((values == 0).sum())
    tiny = int((values < usable[0]).sum()) - empty
    full = int((values > usable[1]).sum())
    return MaskSummary(
        pictures=len(rows),
        written=written,
        kept=len(areas) - written,
        unreadable=[row.name for row in rows if row.area is None],
        empty=empty,
        tiny=tiny,
        full=full,
        usable=len(areas) - empty - tiny - full,
        mean_area=float(values.mean()) if len(values) else float("nan"),
        inverted=sum(row.inverted for row in rows),
        seconds=seconds,
        images_per_second=written / seconds if seconds > 0 else float("nan"),
        areas=areas,
    )
