"""Kills every operation at random moments; prints a table, and fails at the first file that is not whole."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .harness import Record, kill_at_every_step, kill_at_random
from .operations import OPERATIONS, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in total, spread over the operations")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--random-only", action="store_true", help="without the kills before each call")
    options = parser.parse_args()
    warm_up()
    chosen = [operation for operation in OPERATIONS if options.only in operation.name]
    share = options.kills / sum(operation.kills for operation in chosen)
    random, steps, begun = 0, 0, time.monotonic()
    print("| operation | random kills | kills before each call | an unbroken run | found after a kill |")
    print("|---|---:|---:|---:|---|")
    for operation in chosen:
        with tempfile.TemporaryDirectory() as space:
            kills = max(1, round(operation.kills * share))
            record = kill_at_random(operation, kills, Path(space, "random"), seed=options.seed)
            every = Record(operation.name)
            if operation.every_step and not options.random_only:
                every = kill_at_every_step(operation, Path(space, "steps"))
        random, steps = random + record.kills, steps + every.steps
        found = ", ".join(f"{what} {count}" for what, count in sorted((record.found + every.found).items()))
        cells = (record.name, record.kills, every.steps or "–", f"{1000 * record.seconds:.0f} ms", found)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    seconds = time.monotonic() - begun
    print(f"\n{random} random kills and {steps} before each call: nothing lost, no file half-written; {seconds:.0f} s")


if __name__ == "__main__":
    main()
