"""Forks a process that writes, kills it at a random moment, looks at what it left, and starts it again.

Processes are forked from one that has torch and transformers loaded, so that a kill costs no start of Python.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import select
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 300
"""After which a process counts as hung."""
_CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile")
"""Audit events of Python beside "open" that change a file system."""


@dataclass(frozen=True)
class Operation:
    """Something that writes files.

    Attributes:
        name: what it is, in words.
        run: writes into a folder; called again after a kill, it goes on.
        inspect: looks at the folder of a killed run and says what a reader finds ("old", "new", …); raises where that
            is no whole version.
        result: what an unbroken run leaves, to compare: any value with ==.
        prepare: what lies in the folder before.
        kills: of 200. every_step: short enough to be killed before each of its calls to the file system, too.
    """

    name: str
    run: Callable[[Path], None]
    inspect: Callable[[Path], str]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda folder: None
    kills: int = 20
    every_step: bool = False


@dataclass
class Record:
    """What happened to one operation.

    Attributes:
        kills: processes killed at random while they ran. runs: times the work was started again and came to its end.
        steps: processes killed before a call to the file system, one for each call of an unbroken run.
        found: what a reader found after each kill. seconds: an unbroken run.
    """

    name: str
    kills: int = 0
    steps: int = 0
    runs: int = 0
    seconds: float = 0.0
    found: Counter[str] = field(default_factory=Counter)


def kill_at_random(operation: Operation, kills: int, space: Path, *, seed: int = 0) -> Record:
    """Kills the operation so many times, each time at another moment; after a kill it is killed again or ends.

    Raises:
        AssertionError: a version that is not whole, another result than that of unbroken runs, or leftovers.
    """
    chance = random.Random(f"{operation.name}/{seed}")
    record, expected = _unbroken(operation, space)
    trial = space / "trial"
    while record.kills < kills:
        _begin(space)
        while record.kills < kills and was_killed(
            lambda: operation.run(trial), chance.uniform(0, record.seconds), cpu=not operation.every_step
        ):
            record.kills += 1
            record.found[in_child(lambda: operation.inspect(trial))] += 1
            if chance.random() < 0.5:
                break
        _go_on(operation, trial, expected)
        record.runs += 1
    return record


def kill_at_every_step(operation: Operation, space: Path) -> Record:
    """Kills the operation before the first, second, … call that changes the file system, until it has no more of them.

    Raises:
        AssertionError: as `kill_at_random`.
    """
    record, expected = _unbroken(operation, space)
    trial = space / "trial"
    while True:
        _begin(space)
        if not was_killed(lambda: _killed_before(record.steps + 1, operation.run, trial), SECONDS):
            return record
        record.steps += 1
        record.found[in_child(lambda: operation.inspect(trial))] += 1
        _go_on(operation, trial, expected)
        record.runs += 1


def _unbroken(operation: Operation, space: Path) -> tuple[Record, Any]:
    """How long it takes, and what it leaves."""
    record, durations = Record(operation.name), []
    start, whole = space / "start", space / "whole"
    start.mkdir(parents=True)
    in_child(lambda: operation.prepare(start))
    for _ in range(3):
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(start, whole)
        durations.append(in_child(lambda: _timed(operation.run, whole, cpu=not operation.every_step)))
    record.seconds = statistics.median(durations)
    return record, in_child(lambda: operation.result(whole))


def _begin(space: Path) -> None:
    shutil.rmtree(space / "trial", ignore_errors=True)
    shutil.copytree(space / "start", space / "trial")


def _go_on(operation: Operation, trial: Path, expected: Any) -> None:
    """Starts a killed operation again; what it leaves is what it would have left."""
    in_child(lambda: operation.run(trial))
    found = in_child(lambda: operation.result(trial))
    assert found == expected, f"{operation.name}: another result than unbroken\n{found}\n{expected}"
    left = sorted(str(p.relative_to(trial)) for p in trial.rglob(".fvg-*"))
    assert not left, f"{operation.name}: left behind: {left}"


def _killed_before(step: int, run: Callable[[Path], None], folder: Path) -> None:
    """In a fork: runs, and is killed before the call with this number (from 1)."""
    seen = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(folder)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def in_child(work: Callable[[], Any]) -> Any:
    """The result of a function that runs in a fork of this process.

    Raises:
        AssertionError: it raised, or was killed by a signal; with its traceback.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(lambda: (True, work()), writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert answer, f"the process died of signal {os.WTERMSIG(status)} without an answer"
    good, value = pickle.loads(answer)
    assert good, value
    return value


def was_killed(work: Callable[[], Any], delay: float, *, cpu: bool = False) -> bool:
    """Runs a function in a fork and kills it after so many seconds, if it does not kill itself; False where it ended.

    With `cpu` the seconds are those of the fork's processor time: a long run on a busy machine is killed at its end as
    often as at its beginning then.

    Raises:
        AssertionError: it raised.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, b".")

        def run() -> tuple[bool, None]:
            work()
            return True, None

        _work(run, writing)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        pipe.read(1)
        over = _over_before(pipe, child, delay) if cpu else select.select([pipe], [], [], delay)[0]
        if not over:
            os.kill(child, signal.SIGKILL)
        answer = b"".join(iter(lambda: pipe.read(65536), b""))
    status = os.waitpid(child, 0)[1]
    if answer:
        good, value = pickle.loads(answer)
        assert good, value
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not answer


def _over_before(pipe: Any, child: int, seconds: float) -> bool:
    """Waits until a process has used so much processor time; True where it answered before."""
    clock = (~child << 3) | 2  # clock_getcpuclockid(3) of Linux
    begun = time.clock_gettime(clock)
    while time.clock_gettime(clock) - begun < seconds:
        if select.select([pipe], [], [], 0.001)[0]:
            return True
    return False


def _work(run: Callable[[], tuple[bool, Any]], pipe: int) -> NoReturn:
    """In the fork: never comes back."""
    signal.alarm(SECONDS)
    try:
        answer = run()
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(pipe, "wb") as file:
        pickle.dump(answer, file)
    os._exit(0)


def _timed(run: Callable[[Path], None], folder: Path, *, cpu: bool) -> float:
    clock = time.process_time if cpu else time.monotonic
    begun = clock()
    run(folder)
    return clock() - begun
