"""Reading `.pth.tar` files without running anything that is in them (DESIGN decision 6).

Such a file is a pickle, and genuine ones hold a scheduler object beside the tensors. torch's weights-only loader
reads it; the scheduler and optimiser classes that Dassl's files name are replaced by stand-ins that keep nothing, and
anything else is refused before it can run. Imports torch, and pickles,
which looks at the file before torch does.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvg_adapter.errors import FVGError
from fvg_adapter.pickles import inspect_checkpoint
from fvg_adapter.untrusted import refuse_not_finite

_DAMAGED = (
    RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, IndexError,
    OverflowError, OSError, AssertionError, MemoryError, RecursionError, struct.error, NotImplementedError,
)  # fmt: skip
"""What torch's loader raises on damaged files."""
STAND_INS = (
    "dassl.optim.lr_scheduler.ConstantWarmupScheduler",
    "dassl.optim.lr_scheduler.LinearWarmupScheduler",
    "dassl.optim.radam.RAdam",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.optim.lr_scheduler.MultiStepLR",
    "torch.optim.lr_scheduler.StepLR",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.radam.RAdam",
    "torch.optim.rmsprop.RMSprop",
    "torch.optim.sgd.SGD",
)
"""The classes that Dassl's warm-up scheduler and what it refers to bring into a checkpoint; none of them is run."""


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint itself: the file, or in a folder the one of the highest epoch, else model-best."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FVGError(f"there is no checkpoint {path}; give a model.pth.tar-N, or the folder that holds it.")
        return path
    numbered = {int(f.name.rpartition("-")[2]): f for f in path.glob("model*.pth.tar-*") if f.name[-1].isdigit()}
    if numbered:
        return numbered[max(numbered)]
    best = path / "model-best.pth.tar"
    if not best.is_file():
        inside = sorted(f.name for f in path.iterdir())[:6]
        raise FVGError(f"{path} holds no model.pth.tar-N and no model-best.pth.tar, but {inside}.")
    return best


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of a checkpoint by name, without DataParallel's "module.", in full precision; and its epoch.

    Raises:
        FVGError: the file names code (which is not run), is damaged, or holds no tensors.
    """
    allowed: list[Any] = [(_Nothing, name) for name in STAND_INS]
    allowed += [(_plain_dict, "collections.defaultdict"), (_Nothing, "builtins.dict")]
    try:
        inspect_checkpoint(file)
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FVGError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {named[1]}" if named else str(error).splitlines()[0]
        raise FVGError(
            f"{file} is refused: {what}, and only tensors and Dassl's schedulers are read. Nothing in it was run."
        ) from error
    except _DAMAGED as error:
        raise FVGError(f"{file} is no whole checkpoint: {error}".splitlines()[0]) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise FVGError(f"{file} holds no state dict of tensors; it is no checkpoint of the Dassl family.")
    names = [str(k)[:1000] for k in state]
    if len(set(names)) < len(names):
        raise FVGError(f"{file} holds two tensors of one name; it is no checkpoint of the Dassl family.")
    _check_tensors(dict(zip(names, state.values(), strict=True)), file)
    start = "module." if all(name.startswith("module.") for name in names) else ""
    tensors = {k.removeprefix(start): _full(v) for k, v in zip(names, state.values(), strict=True)}
    epoch = content.get("epoch") if state is not content else None
    return tensors, int(epoch) if isinstance(epoch, int) else None


def _check_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Refuses tensors that are larger than the file, or no plain numbers (a stride of 0 makes terabytes of 4 bytes)."""
    room = file.stat().st_size
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise FVGError(f"{file} is refused: {name[:80]!r} is no plain tensor on the CPU.")
        if tensor.numel() * tensor.element_size() > room:
            raise FVGError(
                f"{file} is refused: {name[:80]!r} claims the shape {tuple(tensor.shape)}, more than the file holds."
            )
    floats = {k: v for k, v in tensors.items() if v.is_floating_point()}
    refuse_not_finite({k: v.float() for k, v in floats.items()}, str(file))


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


class _Nothing:
    """Stands in for a class of `STAND_INS`: takes whatever it is made of and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*args: Any) -> dict[Any, Any]:
    return {}
