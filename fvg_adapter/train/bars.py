"""Progress on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def step_bar(steps: int) -> Iterator[Callable[..., None]]:
    """A bar that is gone when the training is; gives what changes it: `show(completed=…, description=…)`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("epoch 0", total=steps)
        yield lambda **changes: progress.update(task, **changes)
