"""Peak memory of the tuners that change both towers: they work in the user's own CLIP, so there is one copy of it.

Each way has a process of its own, which scores a batch of images among the classes; the system says its peak.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, row
from benchmarks.setting import Setting
from fvg_adapter.tuners import TUNERS

MEGABYTE = 10**6
OPTIONS: dict[str, dict[str, Any]] = {"promptsrc": {}, "mmrl": {}}
TINY: dict[str, dict[str, Any]] = {
    "promptsrc": {"prompt_depth_text": 2, "prompt_depth_vision": 2},
    "mmrl": {"rep_layers": [1, 2], "rep_dim": 8},
}


def tuner_memory(setting: Setting) -> list[Row]:
    """Peak resident memory in evaluation: PromptSRC and MMRL ÷ plain CLIP, the loaded model included."""
    rounds = min(3, setting.pairs)
    size = setting.size.name
    found = {kind: [_in_a_process(size, kind) for _ in range(rounds)] for kind in ("zero_shot", *OPTIONS)}
    note = f"whole processes, {setting.size.classes} classes, batch {setting.size.batch}, evaluation"
    return [
        row(
            f"peak memory in evaluation, {kind} ÷ plain CLIP",
            found[kind],
            found["zero_shot"],
            "≤ 1.15",
            unit="MB",
            note=note,
        )
        for kind in OPTIONS
    ]


def _in_a_process(size: str, kind: str) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, size, kind, torch.get_num_threads()).result()


@torch.no_grad()
def _peak(size: str, kind: str, threads: int) -> float:
    """Megabytes that a process needed at most for one evaluation batch with the tuner."""
    torch.set_num_threads(threads)
    setting = Setting(size)
    options = (TINY if size == "tiny" else OPTIONS).get(kind, {})
    tuner = TUNERS[kind](setting.clip(), setting.tokenizer, setting.names(), **options).eval()
    forget_the_peak()
    tuner(setting.pixels())
    return peak_memory() / MEGABYTE


def forget_the_peak() -> None:
    """The system counts the peak anew from here: making random weights takes more than using them (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
