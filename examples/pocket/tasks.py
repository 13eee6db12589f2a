"""Stage 4: nine few-shot tasks, composed on demand from the committed glyphs: true masks and a background shortcut.

    python -m examples.pocket.tasks mammals OUT

In the training pictures each class stands, nine times in ten, on one of three backgrounds of its own (two of its
first home family, one of its second). `test` has random backgrounds; `test_swapped` puts every object on a training
background of another class of the same half (base or new); `test_home` has the training backgrounds again, as the
test sets of ordinary benchmarks do. A quarter of the training masks is a random box (`spoiled.json`); test masks are
true.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import backgrounds, compose, concepts, glyphs

PER_CLASS = {"train": 24, "test": 20, "test_swapped": 20, "test_home": 20}
WRITTEN = ("train", "test", "test_swapped", "test_home")
OWN_SHARE = 0.9  # training pictures on one of their class's own backgrounds
OWN_FIRST = 1000  # variant numbers of the classes' own backgrounds
RANDOM_FIRST, RANDOM_COUNT = 2000, 12  # variant numbers of random backgrounds, for each family
SPOILED_SHARE = 0.25
Ints = NDArray[np.int64]
#: Two more tasks, of concepts that are classes of no task in `concepts.json` (docs/plus.md); in them the others alone
#: are distractors. In label order, as `concepts.json` has them.
MORE: dict[str, tuple[str, ...]] = {
    "plants_drinks": (
        "maple leaf", "blossom", "rose", "christmas tree", "herb", "bottle with popping cork", "tumbler glass",
        "evergreen tree", "beer mug", "fallen leaf", "cherry blossom", "wine glass", "tropical drink", "hot beverage",
        "cactus", "four leaf clover", "mushroom", "deciduous tree", "leaf fluttering in wind", "tanabata tree",
        "sunflower", "glass of milk", "baby bottle", "bouquet", "sake", "cocktail glass", "sheaf of rice",
        "white flower", "wilted flower", "pine decoration", "clinking glasses", "tulip", "teacup without handle",
        "palm tree", "seedling", "shamrock", "hibiscus",
    ),
    "leisure": (
        "volleyball", "fishing pole", "wind chime", "rosette", "moon viewing ceremony", "tennis", "badminton",
        "japanese dolls", "admission tickets", "fireworks", "ticket", "balloon", "running shirt", "soccer ball",
        "basketball", "ice hockey", "ping pong", "ribbon", "sparkler", "american football", "trumpet", "jack o lantern",
        "guitar", "violin", "boxing glove", "wrapped gift", "rugby football", "ice skate", "saxophone", "bowling",
        "drum", "flag in hole", "reminder ribbon", "musical keyboard", "martial arts uniform", "goal net", "baseball",
        "party popper", "carp streamer", "field hockey", "cricket game", "skis", "sparkles",
    ),
}  # fmt: skip
EVERY = (*concepts.TASKS, *MORE)
COMMITTED = "fruit_vegetables"  # the task whose pictures lie in data/
HASHES = concepts.HERE / "tasks.json"


@dataclass
class Split:
    """Pictures of one split, class by class."""

    pictures: NDArray[np.uint8]  # (N, 64, 64, 3)
    masks: NDArray[np.bool_]  # (N, 64, 64)
    labels: NDArray[np.int64]  # (N,) position in the task's class list
    families: NDArray[np.int64]  # (N,) background family
    spoiled: NDArray[np.bool_]  # (N,) the mask is a random box


def members(task: str) -> list[int]:
    """Rows of `concepts.json` that are the task's classes, in label order."""
    if task in MORE:
        rows = {c.name: i for i, c in enumerate(concepts.load()) if not c.task}
        return [rows[name] for name in MORE[task]]
    if task not in concepts.TASKS:
        raise ValueError(f"no task named {task!r}; there are {', '.join(EVERY)}")
    return [i for i, c in enumerate(concepts.load()) if c.task == task]


def class_names(task: str) -> list[str]:
    """The task's class names in label order: base = the first ceil(half), new = the rest."""
    everyone = concepts.load()
    return [everyone[i].name for i in members(task)]


@cache
def _levels() -> list[compose.Floats]:
    return compose.pyramid(glyphs.read_atlas(len(concepts.load())))


@cache
def _random_bank() -> compose.Bytes:
    return backgrounds.bank(RANDOM_FIRST, RANDOM_COUNT).reshape(-1, backgrounds.SIZE, backgrounds.SIZE, 3)


def _own_families(task: str) -> Ints:
    """(classes, 3) family numbers of each class's own backgrounds."""
    everyone = concepts.load()
    homes = [[backgrounds.NAMES.index(h) for h in everyone[i].homes] for i in members(task)]
    return np.array([[a, a, b] for a, b in homes])


def _other_class(rng: np.random.Generator, families: Ints, label: int) -> int:
    """Another class of the same half, with no background family in common where there is one."""
    half = -(-len(families) // 2)
    same = [c for c in range(len(families)) if (c < half) == (label < half) and c != label]
    apart = [c for c in same if not set(families[c]) & set(families[label])]
    pool = apart or same
    return pool[int(rng.integers(len(pool)))]


def _places(rng: np.random.Generator, split: str, labels: Ints, own: Ints) -> Ints:
    """(N,) background rows: the first 3·classes rows are the classes' own, the random ones follow."""
    randoms = own.size + rng.integers(0, len(backgrounds.NAMES) * RANDOM_COUNT, len(labels))
    if split == "test":
        return randoms
    owners = np.array([_other_class(rng, own, int(c)) for c in labels]) if split == "test_swapped" else labels
    mine = owners * 3 + rng.integers(0, 3, len(labels))
    share = 1.0 if split == "test_swapped" else OWN_SHARE
    return np.where(rng.random(len(labels)) < share, mine, randoms)


def spoil(rng: np.random.Generator, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Replace a quarter of the masks, in place, by random boxes; returns which."""
    spoiled = rng.random(len(masks)) < SPOILED_SHARE
    for i in np.flatnonzero(spoiled):
        height, width = (int(v) for v in rng.integers(12, 41, 2))
        top, left = int(rng.integers(0, 65 - height)), int(rng.integers(0, 65 - width))
        masks[i] = False
        masks[i, top : top + height, left : left + width] = True
    return spoiled


def compose_split(task: str, split: str, *, true_masks: bool = False) -> Split:
    """Compose one split: the same bytes on every machine.

    Args:
        task: one of `EVERY`.
        split: `train`, `test`, `test_swapped` or `test_home`.
        true_masks: leave the training masks whole too; the pictures are the same.

    Raises:
        ValueError: an unknown task or split.
    """
    if split not in PER_CLASS:
        raise ValueError(f"no split named {split!r}; there are {', '.join(PER_CLASS)}")
    rows, own = np.array(members(task)), _own_families(task)
    number = [EVERY.index(task), list(PER_CLASS).index(split)]
    rng = np.random.Generator(np.random.PCG64([concepts.SEED, 4, *number]))
    labels = np.repeat(np.arange(len(rows)), PER_CLASS[split])
    mine = np.stack([backgrounds.variant(int(f), OWN_FIRST + i) for i, f in enumerate(own.ravel())])
    bank = np.concatenate([mine, _random_bank()])
    places = _places(rng, split, labels, own)
    extras = np.array([i for i, c in enumerate(concepts.load()) if not c.task and i not in set(rows.tolist())])
    pictures, masks = compose.render(compose.draw(rng, rows[labels], extras, places), _levels(), bank)
    kept = true_masks or split != "train"
    spoiled = np.zeros(len(labels), np.bool_) if kept else spoil(rng, masks)
    families = np.concatenate([own.ravel(), np.repeat(np.arange(len(backgrounds.NAMES)), RANDOM_COUNT)])[places]
    return Split(pictures, masks, labels, families, spoiled)


def digest(task: str) -> str:
    """SHA-256 of all pixels and masks of the task's four splits."""
    state = hashlib.sha256()
    for split in PER_CLASS:
        done = compose_split(task, split)
        state.update(done.pictures.tobytes())
        state.update(done.masks.tobytes())
    return state.hexdigest()


def write_task(name: str, out: Path | str, quality: int | None = None, *, true_masks: bool = False) -> Path:
    """Compose a task into an image folder with mirrored masks.

    `out/<split>/<class>/<n>.webp`, masks at `out/mask/<same path>` (lossless, white foreground), splits `WRITTEN`;
    `out/classes.txt` in label order, `out/spoiled.json` with the training pictures whose mask is a random box.

    Args:
        name: the task.
        out: the folder to write.
        quality: WebP quality of the pictures; None (the default) writes them lossless.
        true_masks: leave the training masks whole too.
    """
    out, names = Path(out), class_names(name)
    spoiled: list[str] = []
    for split in WRITTEN:
        done = compose_split(name, split, true_masks=true_masks)
        for i, label in enumerate(done.labels):
            file = f"{split}/{names[label].replace(' ', '_')}/{i % PER_CLASS[split]:02d}.webp"
            for path in (out / file, out / "mask" / file):
                path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(done.pictures[i])
            if quality is None:
                picture.save(out / file, lossless=True, quality=50, method=2)
            else:
                picture.save(out / file, quality=quality, method=4)
            mask = np.repeat(done.masks[i, :, :, None], 3, axis=2) * np.uint8(255)
            Image.fromarray(mask).save(out / "mask" / file, lossless=True, quality=75, method=4)
            if done.spoiled[i]:
                spoiled.append(file)
    (out / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (out / "spoiled.json").write_text(json.dumps(spoiled, indent=0) + "\n", encoding="utf-8")
    return out


def check() -> dict[str, bool]:
    """Compose every task and compare its pixels with the committed hashes."""
    known = json.loads(HASHES.read_text(encoding="utf-8"))
    return {task: digest(task) == known[task]["sha256"] for task in EVERY}


def freeze() -> None:
    """Write the hashes that `check` compares with. Only when the generator changes on purpose."""
    rows = {task: {"classes": len(members(task)), "sha256": digest(task)} for task in EVERY}
    HASHES.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """`python -m examples.pocket.tasks NAME OUT [--quality 90]`."""
    parser = argparse.ArgumentParser(description="Compose a pocket task into an image folder.")
    parser.add_argument("name", choices=[*EVERY])
    parser.add_argument("out", type=Path)
    parser.add_argument("--quality", type=int, default=None, help="WebP quality of the pictures (default: lossless)")
    arguments = parser.parse_args()
    known = json.loads(HASHES.read_text(encoding="utf-8"))[arguments.name]["sha256"]
    if digest(arguments.name) != known:
        raise SystemExit(
            f"{arguments.name}: these pixels are not the ones recorded in {HASHES.name}; numbers will differ"
        )
    print(write_task(arguments.name, arguments.out, arguments.quality))


if __name__ == "__main__":
    main()
