"""Measures every figure and writes benchmarks/results.json and docs/benchmarks.md after each group.

    python -m benchmarks [--only GROUP …] [--pairs 5] [--threads 2]

Groups that an earlier run measured stay in the page, so that one can be measured again alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import (
    banks,
    growth,
    inference,
    many_classes,
    peers,
    recording,
    report,
    scale,
    startup,
    steps,
    tuner_memory,
)
from benchmarks.harness import Result, Row, machine
from benchmarks.setting import ROOT, SIZES, Setting

Found = list[Row] | Result
GROUPS: dict[str, tuple[str, Callable[[Setting, Path], Found]]] = {
    "fvg_steps": ("FVG-PT's step", lambda s, f: steps.fvg_steps(s)),
    "reference_fvg": ("FVG-PT's step in the reference style", lambda s, f: steps.reference_fvg(s)),
    "prompt_steps": ("CoOp's step in the reference style", lambda s, f: steps.prompt_steps(s)),
    "heads_from_bank": ("Heads from a bank", lambda s, f: banks.heads_from_bank(s)),
    "whole_run": ("A whole run from a bank", lambda s, f: banks.whole_run(s)),
    "inference": ("Inference", lambda s, f: inference.inference(s)),
    "text_features": ("Text features", lambda s, f: inference.text_features(s)),
    "many_classes": ("Many classes", lambda s, f: many_classes.many_classes(s)),
    "tuner_memory": ("One CLIP in memory", lambda s, f: tuner_memory.tuner_memory(s)),
    "heads_file": ("The heads' file", lambda s, f: inference.heads_file(s)),
    "heads_by_classes": ("The heads' cost by the number of classes", growth.heads_by_classes),
    "lora_step": ("LoRA", lambda s, f: peers.lora_step(s)),
    "attention": ("Attention maps", lambda s, f: peers.attention(s)),
    "recording": ("What recording attention costs", lambda s, f: recording.recording(s)),
    "startup": ("Starting", lambda s, f: startup.startup(s)),
    "at_scale": ("What it takes at scale", lambda s, f: scale.at_scale(s)),
}
"""Groups of figures by name: title, and what measures them (given the setting and the folder for pictures)."""


def run(only: Sequence[str], setting: Setting, results: Path, page: Path) -> list[str]:
    """Measures the groups and writes both files after each; returns the names of those that failed."""
    failed = []
    page.parent.mkdir(parents=True, exist_ok=True)
    for name in only:
        title, measure = GROUPS[name]
        start, about = time.perf_counter(), machine()
        try:
            found = measure(setting, page.parent)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        result = found if isinstance(found, Result) else Result(found)
        taken = round(time.perf_counter() - start, 1)
        everything = report.add(results, name, result, title=title, machine=about, seconds=taken)
        page.write_text(report.page(everything, list(GROUPS)), "utf-8")
        for row in result.rows:
            spread = f"{row.low:.3g} to {row.high:.3g}"
            print(f"{row.figure}: {row.ratio:.3g} ({spread}) {row.bound} {row.holds}", flush=True)
        print(f"  {name}: {taken} s", flush=True)
        gc.collect()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a group failed. A bound that is missed is a result, not a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="vit_b16")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    failed = run(options.only, Setting(options.size, options.pairs), options.results, options.page)
    if failed:
        print(f"failed: {', '.join(failed)}; measure again with --only {' '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
