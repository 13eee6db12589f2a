"""Files and folders that are found whole, the old version or the new one, at whatever moment their writer is killed.

New files are made in a scratch folder `.fvg-new-…`. A single file is then renamed over the old one (`replacing_file`).
For several files that belong together (`replacing`) the scratch folder itself is renamed to TARGET/.fvg-new once all of
them are on the disk: from that moment on the new version counts, and readers go there (`read_whole`). Then every file
is linked into its place and .fvg-new is taken away; a writer that was killed in between is finished by the next one.

A scratch folder is locked by its writer. The next writer in the same folder removes those that nobody holds, so that
killed writers leave no more than one behind each place. Imports errors only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fvg_adapter.errors import FVGError

WHOLE = ".fvg-new"
"""In a folder that is being replaced: the new version, complete; it counts from the moment it is there."""
SCRATCH = f"{WHOLE}-"
"""Begins the name of a folder that is being filled."""
_ATTEMPTS = 50
_HAS_LOCKS = importlib.util.find_spec("fcntl") is not None
"""Windows has no such locks: nothing is swept there."""
_OURS = (WHOLE, f"{WHOLE}/*", "*.safetensors", "lora/*", "config.json", "index.json", "plan.json")

Found = TypeVar("Found")


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder of one's own in `parent`, gone behind the block; those that killed writers left go first."""
    sweep(parent)
    folder, lock = _made(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def sweep(parent: Path) -> None:
    """Removes scratch folders in `parent` that no living process holds."""
    for left in parent.glob(f"{SCRATCH}*"):
        lock = _lock(left, wait=False)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            _unlock(lock)


def others_in(folder: Path) -> list[Path]:
    """What lies in a folder beside scratch."""
    return [path for path in folder.iterdir() if not path.name.startswith(SCRATCH)]


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path of the same name to write to; behind the block it takes the target's place.

    Raises:
        OSError: it cannot be written; the target is what it was.
    """
    with scratch(target.parent) as folder:
        path = folder / target.name
        yield path
        to_disk(path)
        path.replace(target)


@contextlib.contextmanager
def written(target: Path) -> Iterator[Path]:
    """`replacing_file` for a file of its own.

    Raises:
        FVGError: it cannot be written (a full disk, a folder that is read-only); the target is what it was.
    """
    try:
        with replacing_file(target) as path:
            yield path
    except OSError as error:
        raise FVGError(f"could not write {target}: {error}. What was there before is unchanged.") from error


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to fill; behind the block its files take the place of the target's, all of them or none.

    Other files of the target stay. Under an exception, and at any kill, a reader finds the old files or the new ones.

    Raises:
        OSError: they cannot be written; the target is what it was.
    """
    inside = target.is_dir()
    if inside:
        sweep(target.parent)  # what was left by one who was killed right after the target had come to be
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(target if inside else target.parent) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        for path in (*_files(new), new):
            to_disk(path)
        if not inside and not target.exists():
            new.rename(target)
            to_disk(target.parent)
            return
        lock = _lock(target, wait=True)  # of two writers one comes after the other
        try:
            _commit(new, target, folder)
        finally:
            _unlock(lock)


def settle(target: Path) -> None:
    """Finishes what a killed writer of this folder left, before its files are added to.

    Raises:
        OSError: the folder cannot be written; the version that counts stays the same.
    """
    if version_of(target) != target:
        with scratch(target) as space:
            lock = _lock(target, wait=True)
            try:
                _finish(target, space / "earlier")
            finally:
                _unlock(lock)


def read_whole(folder: Path, read: Callable[[Path], Found]) -> Found:
    """What `read` finds in the version of a folder that counts; again when a writer replaced it meanwhile.

    Raises:
        FVGError: what `read` raises of a folder that stays as it is, or a folder that does not come to rest.
    """
    for _ in range(_ATTEMPTS):
        before = _version(folder)
        try:
            found = read(version_of(folder))
        except FVGError:
            if _version(folder) == before:
                raise
            continue
        if _version(folder) == before:
            return found
    raise FVGError(f"{folder} is written to again and again while it is read; read it when its writer is done.")


def version_of(folder: Path) -> Path:
    """Where the files lie that count: the folder, or the new version in it that a killed writer left."""
    new = folder / WHOLE
    return new if new.is_dir() else folder


def to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk; a crash of the system cannot empty it then."""
    try:
        file = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except OSError:
        if path.is_file():
            raise
        return  # Windows opens no folders
    try:
        os.fsync(file)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(file)


def _commit(new: Path, target: Path, space: Path) -> None:
    """Renames the new files to the version that counts, and puts them in place; taken back where that fails."""
    _finish(target, space / "earlier")
    names = [path.relative_to(new) for path in _files(new)]
    kept = space / "kept"
    for name in names:
        to = target / name
        if to.exists():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            _link(to, kept / name)
    new.rename(target / WHOLE)
    to_disk(target)
    try:
        _finish(target, space / "now")
    except BaseException:
        for number, name in enumerate(names):
            if (kept / name).exists():
                _link_over(kept / name, target / name, space / f"back-{number}")
            else:
                (target / name).unlink(missing_ok=True)
        if (target / WHOLE).exists():
            (target / WHOLE).rename(space / "taken-back")
        raise


def _finish(target: Path, space: Path) -> None:
    """Puts the files of the version that counts in their places, whoever left it; may be begun any number of times."""
    new = target / WHOLE
    if not new.is_dir():
        return
    space.mkdir()
    for number, path in enumerate(_files(new)):
        to = target / path.relative_to(new)
        to.parent.mkdir(parents=True, exist_ok=True)
        _link_over(path, to, space / str(number))
    to_disk(target)
    new.rename(space / "done")


def _link_over(path: Path, to: Path, by: Path) -> None:
    _link(path, by)
    by.replace(to)


def _link(path: Path, to: Path) -> None:
    """A second name for a file; a copy on file systems without such."""
    try:
        os.link(path, to)
    except (OSError, AttributeError):
        shutil.copy2(path, to)
        to_disk(to)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _version(folder: Path) -> object:
    """Changes with every file of ours that is replaced; not with what others write beside them."""

    def seen(path: Path) -> tuple[str, int, int]:
        try:
            stat = path.stat()
        except OSError:
            return str(path), 0, 0
        return str(path), stat.st_ino, 0 if path.is_dir() else stat.st_mtime_ns

    try:
        return sorted(seen(path) for pattern in _OURS for path in folder.glob(pattern))
    except OSError:
        return None


def _made(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        lock = _lock(folder, wait=True)
        if folder.is_dir():
            return folder, lock
        _unlock(lock)  # swept between its making and its locking


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A lock on a folder that ends with the process; None where there is none to be had."""
    if not _HAS_LOCKS:
        return None
    import fcntl

    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a file system without locks
        os.close(file)
        return None
    return file


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
