"""CoOp's step with a thousand classes: memory and time in chunks against at once.

Each way has a process of its own, whose peak resident memory is asked of the system; the two take turns.
"""

from __future__ import annotations

import multiprocessing
import resource
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, row, seconds
from benchmarks.setting import Setting
from fvg_adapter.tuners import CoOp

PAIRS = 3
MEGABYTE = 10**6
TINY_LIMIT = 100_000
"""Bytes of the tiny model's graph, so that it is chunked too."""


def many_classes(setting: Setting) -> list[Row]:
    """Peak memory and seconds of a step: chunked (what happens by itself) ÷ at once (text_memory = None)."""
    tiny = setting.size.name == "tiny"  # in threads, which start at once; their memory means nothing
    limit = TINY_LIMIT if tiny else CoOp.text_memory
    start = threading.Thread if tiny else multiprocessing.get_context("spawn").Process
    lines = []
    for memory in (limit, None):
        ours, theirs = multiprocessing.Pipe()
        worker: Any = start(
            target=_work, args=(theirs, setting.size.name, memory, torch.get_num_threads()), daemon=True
        )
        worker.start()
        lines.append((ours, worker))
    loaded = [line.recv() for line, _ in lines]
    found: list[list[tuple[float, float]]] = []
    for turn in range(1 + min(PAIRS, setting.pairs)):
        this: dict[int, tuple[float, float]] = {}
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            lines[index][0].send("step")
            this[index] = lines[index][0].recv()
        found.append([this[0], this[1]])
    for line, worker in lines:
        line.send("stop")
        worker.join()
    timed = found[1:]  # the first is a warm-up
    peaks = [found[-1][index][1] for index in (0, 1)]
    grown = [max(peaks[index] - loaded[index], 1e-3) for index in (0, 1)]
    note = f"peak resident memory of one process each, less the {loaded[1]:.0f} MB of the loaded model"
    figure = f"CoOp step with {setting.size.many} classes, in chunks ÷ at once:"
    return [
        row(f"{figure} memory", grown[:1], grown[1:], "≤ 0.35", unit="MB", note=note),
        row(f"{figure} time", [t[0][0] for t in timed], [t[1][0] for t in timed], "≤ 1.4"),
    ]


def _work(line: Any, size: str, memory: int | None, threads: int) -> None:
    """Sends the memory of the loaded model; then, for every "step", its seconds and the peak memory so far."""
    torch.set_num_threads(threads)
    setting = Setting(size)
    tuner = CoOp(setting.clip(), setting.tokenizer, setting.names(setting.size.many))
    tuner.text_memory = memory
    pixels = setting.pixels()
    line.send(_peak())

    def step() -> None:
        tuner(pixels, setting.labels).loss.backward()

    while line.recv() == "step":
        line.send((seconds(step), _peak()))


def _peak() -> float:
    """Highest resident memory of this process so far, in MB.

    Where Linux tells it for the program alone: getrusage also counts the process that it was started from.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE  # macOS: bytes
