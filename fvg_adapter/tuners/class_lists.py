"""Which classes a thread scores: the tuner's list, or inside a `use_classes` block of that thread the block's.

Imports the standard library only.
"""

from __future__ import annotations

import threading


class Block(threading.local):
    """The class list of a thread's innermost `use_classes` block, or None outside. Copies and pickles start outside."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None

    def __reduce__(self) -> tuple[type[Block], tuple[()]]:
        return Block, ()
