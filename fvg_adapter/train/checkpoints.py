"""Which checkpoint a training goes on from; the Trainer writes and reads them. Imports tuners.averaging."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.replacing import to_disk
from fvg_adapter.tuners.averaging import GaussianAverage
from fvg_adapter.untrusted import read_header

_STATE, _WEIGHTS, _AVERAGE = "trainer_state.json", "model.safetensors", "average.safetensors"
_PREFIX = "checkpoint-"
AUTO = "auto"
"""For `resume`: from the last whole checkpoint, or from the start where there is none."""
_STAGING = ".fvg-checkpoint"


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the Trainer writes the checkpoint after an optimiser step."""
    return output / f"{_PREFIX}{step}"


class Staging:
    """Where a checkpoint is written before it takes its place; what a killed training left there goes first.

    Args:
        output: the training's folder. mine: whether this process is the one that moves folders.
    """

    def __init__(self, output: Path, *, mine: bool) -> None:
        self.output: Path = output
        self.folder: Path = output / _STAGING
        self.mine: bool = mine
        self.clear()

    def put_in_place(self, step: int) -> None:
        """Moves the checkpoint of a step, which every process has written to its end, to where it belongs."""
        if not self.mine:
            return
        new, target = checkpoint_folder(self.folder, step), checkpoint_folder(self.output, step)
        for path in (*(p for p in new.rglob("*") if p.is_file()), new):
            to_disk(path)
        if target.exists():  # of a training before this one
            target.rename(self.folder / "earlier")
        new.rename(target)
        to_disk(self.output)
        self.clear()

    def clear(self) -> None:
        """Leaves nothing half-written behind."""
        if self.mine:
            shutil.rmtree(self.folder, ignore_errors=True)


def last_checkpoint(output: Path) -> Path | None:
    """The checkpoint in a folder that was written last, of those that are whole.

    The one of the highest step may be of an earlier, longer training in the same folder.
    """
    found = [p for p in output.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal() and _is_whole(p)]

    def written(path: Path) -> tuple[int, int]:
        return (path / _STATE).stat().st_mtime_ns, int(path.name.removeprefix(_PREFIX))

    return max(found, key=written, default=None)


def checkpoint_for(
    resume: bool | str | os.PathLike[str], output: str | os.PathLike[str] | None, model: nn.Module
) -> Path | None:
    """The checkpoint to go on from: of this model, and whole.

    Raises:
        FVGError: there is none, it is incomplete, or it holds other tensors (the Trainer would only warn).
    """
    if resume is False:
        return None
    if resume is True or resume == AUTO:
        found = None if output is None else last_checkpoint(Path(output))
        if found is None:
            if resume == AUTO and output is not None:
                return None
            raise FVGError(
                f"there is no whole checkpoint in {output} to resume from; train without resume first, "
                "or give resume='auto' with an output_dir."
            )
    else:
        found = Path(resume)
        if not _is_whole(found):
            raise FVGError(f"{found} is no whole checkpoint of fit: a folder with {_WEIGHTS} and {_STATE}.")
    try:
        saved = read_header(found / _WEIGHTS).shapes
    except OSError as error:
        raise FVGError(f"{found / _WEIGHTS} is no whole safetensors file: {error}.") from error
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if saved != own:
        different = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        raise FVGError(f"{found} belongs to another model: {different[:4]} are missing there, or of another shape.")
    return found


def save_average(average: GaussianAverage, folder: Path) -> None:
    """Writes an epoch average into a checkpoint."""
    state = average.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state["sums"].items()}, folder / _AVERAGE, {"seen": str(state["seen"])})


def load_average(average: GaussianAverage, folder: Path) -> None:
    """Goes on with the epoch average of a checkpoint.

    Raises:
        FVGError: the checkpoint has none.
    """
    try:
        with safe_open(folder / _AVERAGE, "pt") as file:
            seen = int((file.metadata() or {})["seen"])
        average.load_state_dict({"seen": seen, "sums": load_file(folder / _AVERAGE)})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FVGError(f"{folder} has no whole {_AVERAGE}, which this tuner needs to go on: {error}.") from error


def _is_whole(folder: Path) -> bool:
    """Whether the Trainer finished this checkpoint: it writes the state last."""
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and (folder / _WEIGHTS).is_file()
