"""Coverage-guided fuzzing of every loader with atheris (libFuzzer): `make fuzz`, or from the root of the repository

    python tests/fuzz/loaders.py tests/fuzz/corpus -max_total_time=300

The first byte of an input chooses a file of hostile.TARGETS, the rest is put in its place. An exception other than
FVGError, code that ran, hooks left behind, or more than a second ends the run and leaves the input in crash-*.
`--seeds` writes the corpus anew from whole files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["fvg_adapter"]):
    from hostile import TARGETS, World, attempt

FILES = [(name, file) for name, target in sorted(TARGETS.items()) for file in target.files]
_PLACE = Path(tempfile.mkdtemp(prefix="fvg-fuzz-"))
_WORLD: list[World] = []


def world() -> World:
    if not _WORLD:
        _WORLD.append(World(_PLACE / "whole"))
    return _WORLD[0]


def one(data: bytes) -> None:
    """Reads one input."""
    if data:
        name, file = FILES[data[0] % len(FILES)]
        attempt(world(), TARGETS[name], {file: data[1:]}, _PLACE / "case")


def write_seeds(corpus: Path) -> None:
    """One whole file for every place."""
    corpus.mkdir(exist_ok=True)
    for number, (name, file) in enumerate(FILES):
        content = (world().root / TARGETS[name].folder / file).read_bytes()
        (corpus / f"{name}-{file.rpartition('/')[2]}".replace(" ", "-")).write_bytes(bytes([number]) + content)


if __name__ == "__main__":
    if "--seeds" in sys.argv:
        write_seeds(HERE / "corpus")
    else:
        world()
        atheris.Setup([*sys.argv, "-max_len=32768", "-rss_limit_mb=4096", "-timeout=30"], one)
        atheris.Fuzz()
