"""Writers that are killed, full disks, folders that are read-only: what was there is whole, and the work goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes.harness import Operation, in_child, kill_at_every_step, kill_at_random, tree, was_killed
from crashes.operations import OPERATIONS, warm_up

from fvg_adapter.errors import FVGError
from fvg_adapter.replacing import SCRATCH, WHOLE, read_whole, replacing, replacing_file, scratch

QUICK = [operation for operation in OPERATIONS if operation.every_step]


def named(part: str) -> Operation:
    return next(operation for operation in OPERATIONS if part in operation.name)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    warm_up()


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["over an earlier save", "checkpoints, heads"])
def test_killed_at_a_random_moment(name: str, tmp_path: Path) -> None:
    record = kill_at_random(named(name), 1, tmp_path)
    assert record.kills == 1 and record.runs >= 1


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_killed_twice_at_random_moments(operation: Operation, tmp_path: Path) -> None:
    assert kill_at_random(operation, 2, tmp_path, seed=1).kills == 2


@pytest.mark.slow
@pytest.mark.parametrize("operation", QUICK, ids=lambda operation: operation.name)
def test_killed_before_each_call_to_the_file_system(operation: Operation, tmp_path: Path) -> None:
    record = kill_at_every_step(operation, tmp_path)
    assert record.steps > 8
    assert set(record.found) <= {"nothing", "old", "new", "unfinished", "whole"} and len(record.found) == 2


@pytest.mark.parametrize("there", [False, True])
def test_a_replaced_folder_is_old_or_new_at_every_step(there: bool, tmp_path: Path) -> None:
    """`replacing` alone, with files of its own, so that every step is tried in little time."""

    def write(version: int, folder: Path) -> None:
        with replacing(folder / "target") as new:
            (new / "lora").mkdir()
            for name in ("config.json", "lora/a", f"only-in-{version}"):
                (new / name).write_text(str(version))

    def prepare(folder: Path) -> None:
        if there:
            write(1, folder)
            (folder / "target" / "README.md").write_text("mine")

    def look(folder: Path) -> str:
        if not (folder / "target").exists():
            return "nothing"
        return read_whole(
            folder / "target", lambda at: "".join({(at / n).read_text() for n in ("config.json", "lora/a")})
        )

    operation = Operation("replacing", lambda folder: write(2, folder), look, tree, prepare)
    record = kill_at_every_step(operation, tmp_path)
    assert record.steps > 8 and set(record.found) == ({"1", "2"} if there else {"nothing", "2"})
    final = tmp_path / "trial" / "target"
    names = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert names == {"config.json", "lora/a", "only-in-2"} | ({"README.md", "only-in-1"} if there else set())


def test_leftovers_of_killed_writers_do_not_pile_up(tmp_path: Path) -> None:
    def write() -> None:
        with replacing_file(tmp_path / "file") as path:
            path.write_text("half")
            os.kill(os.getpid(), 9)

    for _ in range(3):
        assert was_killed(write, 60)
        assert len(list(tmp_path.glob(f"{SCRATCH}*"))) == 1
    with scratch(tmp_path) as held:  # a living writer's is left alone
        with replacing_file(tmp_path / "file") as path:
            path.write_text("whole")
        assert list(tmp_path.glob(f"{SCRATCH}*")) == [held]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_readers_see_one_version_while_a_writer_replaces_it(tmp_path: Path) -> None:
    """Another process saves a hundred times; every read finds files of one save."""

    def save(number: int) -> None:
        with replacing(tmp_path / "target") as new:
            for name in ("config.json", "a.safetensors", "b.safetensors"):
                (new / name).write_text(str(number))

    save(0)
    child = os.fork()
    if not child:
        for number in range(1, 101):
            save(number)
        os._exit(0)
    seen = set()
    while not os.waitpid(child, os.WNOHANG)[0]:

        def read(at: Path) -> frozenset[str]:
            try:
                return frozenset((at / n).read_text() for n in ("config.json", "a.safetensors", "b.safetensors"))
            except OSError as error:
                raise FVGError(str(error)) from error

        seen.add(read_whole(tmp_path / "target", read))
    assert all(len(found) == 1 for found in seen) and len(seen) > 1


# -- full disks and folders that cannot be written ---------------------------------------------------------------------

ERROR = "could not (save|write)|could not be written"


@pytest.fixture(params=["file size limit", "small file system"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A folder, and a function that leaves so many bytes to what this process writes there.

    A file system of its own where this user may mount one; a limit for each file where not.
    """
    mounted = (
        request.param == "small file system"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    )

    def leave(size: int) -> None:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return
        free = shutil.disk_usage(tmp_path).free
        (tmp_path / "filler").write_bytes(bytes(max(0, free - size)))

    try:
        yield tmp_path, leave
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)


def refused(work: Callable[[], None]) -> str:
    try:
        work()
    except FVGError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize(
    "part", ["over an earlier save", "PEFT", "over another bank", "encode into", "checkpoints, heads"]
)
def test_a_full_disk(part: str, share: float, small_disk: tuple[Path, Callable[[int], None]]) -> None:
    space, leave = small_disk
    operation, folder = named(part), space / "trial"
    folder.mkdir()
    in_child(lambda: operation.run(folder))
    size = int(share * max(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    shutil.rmtree(folder)
    folder.mkdir()
    in_child(lambda: operation.prepare(folder))
    before = tree(folder)

    def full() -> str:
        leave(size)
        return refused(lambda: operation.run(folder))

    message = in_child(full)
    assert "No space left" in message or "File too large" in message or "disk is full" in message, message
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before  # all that was there, as it was
    assert not list(folder.rglob(".fvg-*"))
    if before or (folder / "bank").exists():
        assert in_child(lambda: operation.inspect(folder)) in ("old", "unfinished")
    (space / "filler").unlink(missing_ok=True)
    in_child(lambda: operation.run(folder))  # room again: the work goes on
    in_child(lambda: operation.inspect(folder))


def as_nobody() -> None:
    """In a fork: without root's right to write anywhere."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


@contextlib.contextmanager
def open_to_all() -> Iterator[Path]:
    """A folder that other users reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as space:
        Path(space).chmod(0o755)
        yield Path(space)


@pytest.mark.parametrize(
    "part", ["over an earlier save", "a new folder", "over another bank", "encode into", "checkpoints, heads"]
)
def test_a_folder_that_is_read_only(part: str) -> None:
    operation = named(part)
    with open_to_all() as space:
        folder = space / "trial"
        folder.mkdir(mode=0o755)
        in_child(lambda: operation.prepare(folder))
        if os.geteuid() != 0:
            for path in (*folder.rglob("*"), folder):
                path.chmod(0o555 if path.is_dir() else 0o444)
        before = tree(folder)

        def refused_to_nobody() -> str:
            as_nobody()
            return refused(lambda: operation.run(folder))

        message = in_child(refused_to_nobody)
        assert "Permission denied" in message, message
        assert tree(folder) == before
        if before:
            assert in_child(lambda: operation.inspect(folder)) == "old"
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_what_killed_savers_left_can_be_read_in_a_read_only_folder(tmp_path: Path) -> None:
    """The version that counts lies in .fvg-new of such a folder; no reader has to write."""
    with replacing(tmp_path / "a") as new:
        (new / "config.json").write_text("old")
    (tmp_path / "a" / WHOLE).mkdir()
    (tmp_path / "a" / WHOLE / "config.json").write_text("new")
    (tmp_path / "a").chmod(0o555)
    assert read_whole(tmp_path / "a", lambda at: (at / "config.json").read_text()) == "new"
    assert (tmp_path / "a" / WHOLE).is_dir()
    (tmp_path / "a").chmod(0o755)
    with replacing(tmp_path / "a") as new:
        (new / "other").write_text("newest")
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {
        "config.json": "new",
        "other": "newest",
    }


def test_a_replacement_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(version: str) -> None:
        with replacing(tmp_path / "a") as new:
            for name in ("a", "b", "c"):
                (new / name).write_text(version)

    write("old")
    (tmp_path / "a" / "c").unlink()
    before = tree(tmp_path)
    replace, calls = Path.replace, []

    def fails(self: Path, to: Any) -> Path:
        calls.append(to)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        write("new")
    assert tree(tmp_path) == before and not list(tmp_path.rglob(".fvg-*"))
