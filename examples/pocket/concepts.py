"""Which pictographs are classes of which task, what they are called, and on which backgrounds they are at home.

The names are Unicode CLDR short names. This module needs no network: `glyphs` calls `choose` on the registry's data
and writes `concepts.json`, which every other stage reads through `load`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SEED = 2603

#: Task name -> CLDR subgroups whose pictographs are its classes.
TASKS: dict[str, tuple[str, ...]] = {
    "fruit_vegetables": ("food-fruit", "food-vegetable"),
    "mammals": ("animal-mammal",),
    "other_animals": ("animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"),
    "transport": ("transport-ground", "transport-water", "transport-air"),
    "clothing": ("clothing",),
    "prepared_food": ("food-prepared", "food-asian", "food-sweet"),
    "tools_household": ("tool", "household", "science", "medical", "lock", "dishware"),
    "places": ("place-geographic", "place-building", "place-religious", "place-other"),
    "office_music": ("office", "light-video", "computer", "music"),
}
#: Subgroups that take part in pretraining and, as small distractors, in every picture, but are classes of no task.
EXTRAS = ("plant-flower", "plant-other", "drink", "sport", "event", "musical-instrument")

#: Left out: told apart only by direction or by a letter, which turning and mirroring destroy.
LEFT_OUT = {
    "magnifying glass tilted right",
    "oncoming bus",
    "oncoming police car",
    "oncoming taxi",
    "airplane arrival",
    "pig nose",
    "seat",
    "linked paperclips",
    "dvd",
    "front-facing baby chick",
    "musical notes",
    "clinking beer mugs",
    "snowman without snow",
    "camera with flash",
    "cityscape at dusk",
    "house with garden",
    "unlocked",
    "tiger face",
    "sunrise over mountains",
    "oncoming automobile",
    "railway track",
    "tear-off calendar",
    "confetti ball",
    "motorway",
    "construction",
    "foggy",
    "police car light",
}
RENAMED = {"magnifying glass tilted left": "magnifying glass", "t-rex": "dinosaur"}
MIN_STYLES = 5  # a concept needs this many of the seven drawing styles, the tasks' style among them


@dataclass(frozen=True)
class Concept:
    """One pictograph: its class name, code point, task ("" for extras) and two home background families."""

    name: str
    hexcode: str
    task: str
    homes: tuple[str, str]


def class_name(label: str) -> str:
    """The CLDR label as a class name: lower case, no possessives, no hyphens or slashes.

    >>> class_name("woman’s sandal"), class_name("jack-o-lantern")
    ('woman sandal', 'jack o lantern')
    """
    label = label.lower()
    label = RENAMED.get(label, label)
    return label.replace("’s", "").replace("-", " ").replace("/", " ")


def home_families(names: list[str], families: list[str], group: int) -> list[tuple[str, str]]:
    """Two home families a concept: the group's seeded order, walked so that neighbours within a group differ."""
    rng = np.random.Generator(np.random.PCG64([SEED, 1, group]))
    first, second = rng.permutation(len(families)), rng.permutation(len(families))
    homes = []
    for i in range(len(names)):
        a, b = int(first[i % len(families)]), int(second[i % len(families)])
        if a == b:
            b = (b + 1) % len(families)
        homes.append((families[a], families[b]))
    return homes


def choose(found: list[dict[str, str]], families: list[str]) -> list[Concept]:
    """Concepts from registry rows `{"label", "hexcode", "subgroup"}`, in task order, tasks in seeded class order."""
    out: list[Concept] = []
    groups = [*TASKS.items(), ("", EXTRAS)]
    for number, (task, subgroups) in enumerate(groups):
        rows = [r for r in found if r["subgroup"] in subgroups and r["label"].lower() not in LEFT_OUT]
        order = np.random.Generator(np.random.PCG64([SEED, 0, number])).permutation(len(rows))
        rows = [rows[i] for i in order]
        names = [class_name(r["label"]) for r in rows]
        homes = home_families(names, families, number)
        out += [Concept(n, r["hexcode"], task, h) for n, r, h in zip(names, rows, homes, strict=True)]
    return out


def save(concepts: list[Concept], path: Path = HERE / "concepts.json") -> None:
    """Write the concepts, one a line."""
    lines = ",\n".join(json.dumps(asdict(c)) for c in concepts)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load(path: Path = HERE / "concepts.json") -> list[Concept]:
    """Read what `save` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Concept(r["name"], r["hexcode"], r["task"], tuple(r["homes"])) for r in rows]
