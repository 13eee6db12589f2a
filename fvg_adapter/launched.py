"""The processes of a launcher (`accelerate launch`), or the one process without. Imports accelerate under one only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """Who we are among the processes that share a work.

    Attributes:
        rank: from 0. world: how many there are.
        wait: returns once all have called it.
        gather: the lists that the processes give, one behind the other in the order of ranks, for each of them.
        leave: ends the group; nothing above may be called again.
    """

    rank: int
    world: int
    wait: Callable[[], None]
    gather: Callable[[list[Any]], list[Any]]
    leave: Callable[[], None]

    @classmethod
    def launched(cls) -> Processes:
        """The launcher's processes; ourselves alone without one."""
        if "LOCAL_RANK" not in os.environ:
            return cls(0, 1, _nothing, list, _nothing)
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather_object

        # Without cpu=True, processes on a machine that has nothing else would each take themselves for the only one.
        state = PartialState(cpu=not torch.accelerator.is_available())

        def gather(own: list[Any]) -> list[Any]:
            return list(gather_object(own)) if state.num_processes > 1 else list(own)

        return cls(state.process_index, state.num_processes, state.wait_for_everyone, gather, _leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # its threads must have ended before the interpreter does


def _nothing() -> None:
    """Nobody to wait for."""
