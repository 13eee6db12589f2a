"""Progress of long work: a bar on stderr where that is a terminal, and silence elsewhere. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None] | bool | None
"""What is called with (done, in all); True for a bar, False for silence, None for a bar on a terminal."""


def wanted(progress: bool | None) -> bool:
    """Whether to show a bar: as asked, else on a terminal; of several processes one shows it."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return first and (sys.stderr.isatty() if progress is None else progress)


@contextlib.contextmanager
def step_bar(steps: int, what: str) -> Iterator[Callable[..., None]]:
    """A bar that is gone when the work is; gives what changes it: `show(completed=…, description=…)`."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda **changes: bar.update(task, **changes)


@contextlib.contextmanager
def counting(progress: Progress, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """What a long loop calls with how much is done."""
    if callable(progress):
        tell = progress
        yield lambda done: tell(done, total)
    elif wanted(progress):
        with step_bar(total, what) as show:
            yield lambda done: show(completed=done)
    else:
        yield lambda done: None
