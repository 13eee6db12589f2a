"""Stage 1: pictographs of objects in seven drawing styles, from npm packages to 64-pixel RGBA.

Writes `glyphs.npz` (all styles, for pretraining; stays in the work folder) and, into the repository, `concepts.json`
and `atlas.webp` (the tasks' style only). Needs `npm` and the Python package `resvg_py`.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import backgrounds, concepts

EMOJIBASE = "emojibase-data@17.0.0"
PACKAGES = {  # style -> package@version; licences in NOTICE
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent-emoji": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
TASK_STYLE = "twemoji"  # never seen in pretraining
SIDE = 64
COLUMNS = 24  # glyphs a row in the atlas
ATLAS = concepts.HERE / "atlas.webp"


def fetch(package: str, work: Path) -> Path:
    """Download one npm package into `work/npm` unless it is there, and return its unpacked folder."""
    target = work / "npm" / re.sub(r"[@/]", "_", package)
    if not (target / "package.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", package, "--silent", "--pack-destination", str(target)],
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(target / done.stdout.split()[-1]) as tar:
            tar.extractall(target, filter="data")
        for file in (target / "package").iterdir():
            file.rename(target / file.name)
    return target


class IconSet:
    """One style: SVG texts by icon name."""

    def __init__(self, folder: Path) -> None:
        self.data: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.chars: dict[str, str] = json.loads((folder / "chars.json").read_text(encoding="utf-8"))

    def find(self, names: set[str]) -> str | None:
        """The name of the first icon or alias among `names` that this style draws."""
        aliases = self.data.get("aliases", {})
        for name in sorted(names):
            if name in self.data["icons"]:
                return name
            if name in aliases and not set(aliases[name]) - {"parent"}:
                parent: str = aliases[name]["parent"]
                if parent in self.data["icons"]:
                    return parent
        return None

    def svg(self, name: str) -> str:
        """A standalone SVG document."""
        icon = self.data["icons"][name]
        width, height = (icon.get(k, self.data.get(k, 16)) for k in ("width", "height"))
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def rasterise(svg: str) -> NDArray[np.uint8]:
    """(64, 64, 4) uint8: the drawing, cropped to what is visible and centred with a one-pixel border."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    picture = picture.crop(box).convert("RGBa")  # premultiplied while resizing: no dark fringes
    scale = (SIDE - 2) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BOX if scale < 0.6 else Image.Resampling.BILINEAR).convert("RGBA")
    out = Image.new("RGBA", (SIDE, SIDE))
    out.paste(picture, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(out)


def registry_rows(work: Path, sets: dict[str, IconSet]) -> list[dict[str, Any]]:
    """Concepts that enough styles draw: label, hexcode, subgroup and, per style, the icon's name."""
    folder = fetch(EMOJIBASE, work)
    subgroups = json.loads((folder / "meta/groups.json").read_text(encoding="utf-8"))["subgroups"]
    rows = []
    for entry in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        subgroup = subgroups.get(str(entry.get("subgroup")))
        hexcode = entry["hexcode"].lower().replace("-fe0f", "")
        names = {s.chars[hexcode] for s in sets.values() if hexcode in s.chars}
        names.add(re.sub(r"[^a-z0-9]+", "-", entry["label"].lower()).strip("-"))
        icons = {style: icon for style, s in sets.items() if (icon := s.find(names)) is not None}
        if TASK_STYLE in icons and len(icons) >= concepts.MIN_STYLES:
            rows.append({"label": entry["label"], "hexcode": hexcode, "subgroup": subgroup, "icons": icons})
    return rows


def write_atlas(glyphs: NDArray[np.uint8], path: Path = ATLAS) -> None:
    """One lossless picture of (N, 64, 64, 4) glyphs, `COLUMNS` a row, in the order of `concepts.json`."""
    rows = -(-len(glyphs) // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), np.uint8)
    for i, glyph in enumerate(glyphs):
        y, x = i // COLUMNS * SIDE, i % COLUMNS * SIDE
        sheet[y : y + SIDE, x : x + SIDE] = glyph
    Image.fromarray(sheet).save(path, lossless=True, quality=100, method=6, exact=False)


def read_atlas(count: int, path: Path = ATLAS) -> NDArray[np.uint8]:
    """The glyphs that `write_atlas` wrote: (count, 64, 64, 4) uint8."""
    sheet = np.asarray(Image.open(path).convert("RGBA"))
    cells = sheet.reshape(sheet.shape[0] // SIDE, SIDE, COLUMNS, SIDE, 4).transpose(
        0, 2, 1, 3, 4
    )  # (rows, columns, 64, 64, 4)
    return cells.reshape(-1, SIDE, SIDE, 4)[:count]


def run(work: Path) -> None:
    """Fetch, choose, rasterise, write."""
    sets = {style: IconSet(fetch(package, work)) for style, package in PACKAGES.items()}
    rows = registry_rows(work, sets)
    chosen = concepts.choose(rows, backgrounds.HOMES)
    icons = {r["hexcode"]: r["icons"] for r in rows}
    glyphs = np.zeros((len(chosen), len(PACKAGES), SIDE, SIDE, 4), np.uint8)  # (concepts, styles, 64, 64, rgba)
    for i, concept in enumerate(chosen):
        for j, (style, icon_set) in enumerate(sets.items()):
            if style in icons[concept.hexcode]:
                glyphs[i, j] = rasterise(icon_set.svg(icons[concept.hexcode][style]))
    concepts.save(chosen)
    write_atlas(glyphs[:, list(PACKAGES).index(TASK_STYLE)])
    np.savez_compressed(work / "glyphs.npz", glyphs=glyphs, styles=list(PACKAGES))
