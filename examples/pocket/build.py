"""Rebuild the whole pocket suite from the package registries.

    python -m examples.pocket.build                  # everything: about 75 minutes on two cores
    python -m examples.pocket.build tasks            # one stage; each can be run again by itself

Stages: glyphs (needs npm and `pip install resvg_py`), backgrounds (a contact sheet to look at), pretrain, tasks,
preconditions (needs fvg_adapter).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from . import backgrounds, concepts, encode, glyphs

STAGES = ("glyphs", "backgrounds", "pretrain", "tasks", "preconditions")


def contact_sheet(work: Path) -> None:
    """`work/backgrounds.png`: one row a family."""
    bank = backgrounds.bank(0, 8)  # (families, 8, 96, 96, 3)
    sheet = bank.transpose(0, 2, 1, 3, 4).reshape(len(backgrounds.NAMES) * backgrounds.SIZE, -1, 3)
    Image.fromarray(np.ascontiguousarray(sheet)).save(work / "backgrounds.png")


def run_stage(stage: str, work: Path, minutes: float) -> None:
    """Run one stage, reading and writing `work` and this folder."""
    if stage == "glyphs":
        glyphs.run(work)
    elif stage == "backgrounds":
        contact_sheet(work)
    elif stage == "pretrain":
        from . import pretrain

        pretrain.run(work, minutes)
        shutil.rmtree(encode.MODEL, ignore_errors=True)
        shutil.copytree(work / "model", encode.MODEL)
    elif stage == "tasks":
        from . import tasks

        shutil.rmtree(concepts.HERE / "data", ignore_errors=True)
        tasks.write_task(tasks.COMMITTED, concepts.HERE / "data", quality=90)
        tasks.freeze()
    else:
        from . import preconditions

        numbers = preconditions.run()
        preconditions.OUT.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the named stages, or all of them in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stages", nargs="*", help=f"any of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path("build/pocket"), help="folder for downloads and checkpoints")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time of the pretraining")
    arguments = parser.parse_args()
    unknown = [s for s in arguments.stages if s not in STAGES]
    if unknown:
        parser.error(f"no stage named {', '.join(unknown)}; there are {', '.join(STAGES)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages or STAGES:
        print(f"stage {stage}", flush=True)
        run_stage(stage, arguments.work, arguments.minutes)


if __name__ == "__main__":
    main()
