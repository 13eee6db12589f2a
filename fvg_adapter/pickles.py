"""What a `.pth.tar` file would do to its reader, seen without unpickling it: sizes, compression, and endless work.

torch's weights-only loader runs no code, but it believes sizes, inflates what is compressed, and hashes keys: sixty
nested tuples that share their halves are two hundred bytes and a thousand years. Imports errors only.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvg_adapter.errors import FVGError

MAX_PICKLE_BYTES = 16 * 2**20
"""Of the structure beside the tensors; a whole CLIP's is 0.1 MB."""
MAX_OPCODES = 100_000
MAX_ENTRIES = 16_384
MAX_TUPLE = 1000
"""Values in a tuple, those of tuples inside it counted as often as they are reached."""
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How files of torch before 1.6 begin: protocol 2 and a magic number."""
_GETS, _PUTS = ("BINGET", "LONG_BINGET", "GET"), ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")


def inspect_checkpoint(file: Path) -> None:
    """Refuses a file that torch's loader should not be given.

    Raises:
        FVGError: neither a zip file of torch nor one of its older form; compressed or oversized entries; a structure
            that is too large or nested too deeply.
    """
    with file.open("rb") as opened:
        start = opened.read(len(_LEGACY))
    if zipfile.is_zipfile(file):
        for content in _structures(file):
            _inspect(content, file)
    elif start == _LEGACY:
        with file.open("rb") as opened:
            content = opened.read(MAX_PICKLE_BYTES)
        for _ in range(5):  # magic number, version, system, object, keys; the tensors come behind
            used = _inspect(content, file)
            content = content[used:]
    else:
        raise FVGError(f"{file} is no whole checkpoint: it begins neither as a zip file nor as an older one of torch.")


def _structures(file: Path) -> Iterator[bytes]:
    room = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES or sum(entry.file_size for entry in entries) > room:
            raise FVGError(f"{file} is refused: its {len(entries)} entries claim more than its {room} bytes hold.")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise FVGError(f"{file} is refused: it is compressed or encrypted, which torch.save never does.")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if not pickles or any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
            raise FVGError(f"{file} is no whole checkpoint: it is a zip file, but none that torch.save writes.")
        for entry in pickles:
            if entry.file_size > MAX_PICKLE_BYTES:
                raise FVGError(f"{file} is refused: {entry.filename[:80]} has {entry.file_size} bytes of structure.")
            yield archive.read(entry)


def _inspect(content: bytes, file: Path) -> int:
    """Refuses a pickle of too many operations or too deep tuples; its length in bytes."""
    stack = _Stack()
    try:
        for count, (opcode, argument, place) in enumerate(pickletools.genops(content)):
            if count > MAX_OPCODES or stack.follow(opcode, argument) > MAX_TUPLE:
                raise FVGError(f"{file} is refused: its structure is larger, or nested deeper, than that of tensors.")
            if opcode.name == "STOP":
                return int(place or 0) + 1
    except FVGError:
        raise
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise FVGError(f"{file} is no whole checkpoint: {error}".splitlines()[0]) from error
    raise FVGError(f"{file} is no whole checkpoint: its structure ends too early.")


class _Stack:
    """A pickle's stack with, in place of each value, how many values it is made of if it is a tuple, else 1."""

    def __init__(self) -> None:
        self.values: list[int | None] = []
        self.memo: dict[int, int] = {}

    def follow(self, opcode: Any, argument: Any) -> int:
        """Follows one operation; the size of the tuple that it made."""
        name = opcode.name
        if name in _PUTS:
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = (self.values or [1])[-1] or 1
            return 0
        if name in _GETS:
            self.values.append(self.memo.get(int(argument), 1))
            return 0
        if name == "MARK":
            self.values.append(None)
            return 0
        taken = self._taken([item.name for item in opcode.stack_before])
        size = 1 + sum(taken) if name.startswith("TUPLE") or name in ("REDUCE", "NEWOBJ", "FROZENSET") else 1
        if opcode.stack_after:
            self.values.append(size)
        return size

    def _taken(self, before: list[str]) -> list[int]:
        taken: list[int] = []
        if "mark" in before:
            while self.values and (value := self.values.pop()) is not None:
                taken.append(value)
            before = before[: before.index("mark")]
        for _ in before:
            taken.append((self.values.pop() if self.values else 1) or 1)
        return taken
