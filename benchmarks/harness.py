"""Interleaved pairs, rows of results, the machine. A figure is a ratio of two works that take turns in one run."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        figure: what is divided by what. ratio: the median over the pairs; low, high: its least and greatest.
        first, second: medians of numerator and denominator. unit: theirs. pairs: how many took turns.
        bound: what the ratio must keep to, "≤ 1.05" or "≥ 3"; "" where nothing is promised.
        note: what has to be known to read it.
    """

    figure: str
    ratio: float
    low: float
    high: float
    first: float
    second: float
    bound: str = ""
    unit: str = "s"
    pairs: int = 1
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if not self.bound:
            return None
        relation, limit = self.bound.split()
        return self.ratio <= float(limit) if relation == "≤" else self.ratio >= float(limit)

    def to_json(self) -> dict[str, Any]:
        """For results.json; numbers that are none become null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {**values, "holds": self.holds}


@dataclass(frozen=True)
class Result:
    """What a group of figures found.

    Attributes:
        rows: figures. caption, table: of what is no ratio; the table's first line is its header.
        picture: file name beside the page.
    """

    rows: list[Row]
    caption: str = ""
    table: list[list[str]] | None = None
    picture: str = ""


def seconds(work: Work, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run, of the wall unless another clock is given."""
    start = clock()
    work()
    return clock() - start


def in_turns(
    works: Sequence[Work], rounds: int, warm_up: bool = True, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each work in each of the rounds (rounds, works); every other round runs them backwards.

    `clock`: time.process_time where a short work stands beside a long one, which others' load would slow more.
    """
    if warm_up:
        for work in works:
            work()
    times = []
    for turn in range(rounds):
        order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
        found = {index: seconds(works[index], clock) for index in order}
        times.append([found[index] for index in range(len(works))])
    return times


def row(figure: str, first: Sequence[float], second: Sequence[float], bound: str = "", **others: Any) -> Row:
    """The row of two lists of numbers that were measured in turns."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    middle = [statistics.median(numbers) for numbers in (ratios, first, second)]
    return Row(
        figure, middle[0], min(ratios), max(ratios), middle[1], middle[2], bound=bound, pairs=len(ratios), **others
    )


def compared(figure: str, first: Work, second: Work, bound: str = "", *, pairs: int, **others: Any) -> Row:
    """The ratio of two works that take turns, both warmed up once."""
    times = in_turns([first, second], pairs)
    return row(figure, [t[0] for t in times], [t[1] for t in times], bound, **others)


def machine() -> dict[str, Any]:
    """What this was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
