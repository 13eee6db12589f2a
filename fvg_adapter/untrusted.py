"""Reading files that somebody else wrote: how much of them is read, and what a header may claim, before anything is
allocated.

JSON is bounded in bytes and depth and holds no name twice; a safetensors header is read on its own, and names, dtypes
and shapes are known before a tensor is. Links are followed (the Hub's cache consists of them); what they lead to is
read under the same bounds. Imports errors only, and safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fvg_adapter.errors import FVGError

MAX_JSON_BYTES = 8 * 2**20
"""Of a config: 20,000 class names, twice, are 1 MB."""
MAX_HEADER_BYTES = 4 * 2**20
"""Of a safetensors file: a tensor takes some 100 bytes of it."""
MAX_TENSOR_BYTES = 2**29
"""Of the tensors in one file that is read into memory: the heads of a ViT-B/16 are 0.5 MB, MMRL's tuner 22 MB."""
SMALL_BYTES = 2**24
"""A tensor up to this size is made on a config's word, so that all that does not fit can be named together."""
MAX_DEPTH = 32
_KEEPS_REPLACED = os.name == "posix"
"""Whether an open file outlives its replacement; Windows would refuse to replace it."""
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
FLOATS: tuple[str, ...] = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds.

    Attributes:
        shapes: of the tensors, by name. dtypes: "F32", "BOOL", …
        metadata: text by name.
        bytes: of all tensors together.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int, what: str) -> bytes:
    """A whole file, if it is no larger than `limit` bytes.

    Raises:
        FVGError: no regular file, too large, or unreadable.
    """
    if not path.is_file():
        raise FVGError(f"{path} is no file; {what} is expected there.")
    try:
        with path.open("rb") as file:
            content = file.read(min(limit, path.stat().st_size) + 1)  # takes what it is asked for at once
    except OSError as error:
        raise FVGError(f"{path} cannot be read: {error}.") from error
    if len(content) > limit:
        raise FVGError(f"{path} has more than {limit} bytes; {what} of ours is never that large.")
    return content


def read_json(path: Path, what: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FVGError: too large, no UTF-8, no JSON, a name twice, nested deeper than `MAX_DEPTH`, a number that is not
            finite, or no object.
    """
    return parse_json(read_bytes(path, limit, what), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes; see `read_json`."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
        )
        if content.count(b"[") + content.count(b"{") > MAX_DEPTH or re.search(rb"\\u[dD][89a-fA-F]", content):
            _check(value, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise FVGError(f"{where} is not valid JSON for a file of ours: {error}.") from error
    if not isinstance(value, dict):
        raise FVGError(f"{where} must hold one JSON object, but holds a {type(value).__name__}.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return made


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check(value: Any, depth: int) -> None:
    """Refuses deep nesting and text that is no text (lone surrogates), neither of which JSON itself excludes."""
    if depth < 0:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for name, inner in value.items():
            name.encode("utf-8")
            _check(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, (str, dict, list)):
                _check(inner, depth - 1)


# -- safetensors -------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Names, dtypes and shapes in a safetensors file; its tensors are not read.

    Raises:
        FVGError: no regular file, a header that is too large, is no JSON, holds a name twice, or claims tensors that
            the file has no room for.
    """
    if not path.is_file():
        raise FVGError(f"{path} is no file; a safetensors file is expected there.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= size - 8:
                raise _broken(path, f"{size} bytes cannot hold the header that it announces")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"its header has {length} bytes, of ours it never has more than {MAX_HEADER_BYTES}")
            content = file.read(length)
    except OSError as error:
        raise FVGError(f"{path} cannot be read: {error}.") from error
    return _header(parse_json(content, f"the header of {path}"), size - 8 - length, path)


def _header(record: dict[str, Any], room: int, path: Path) -> Header:
    metadata = record.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its metadata is no text")
    header = Header(metadata=metadata, bytes=room)
    spans = []
    for name, about in record.items():
        given: list[Any] = [about.get(k) if isinstance(about, dict) else None for k in _FIELDS]
        dtype, shape, span = given
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise _broken(path, f"the tensor {name[:80]!r} is of type {dtype!r:.40}; expected is {', '.join(_SIZES)}")
        if not _wholes(shape) or len(shape) > 8 or not _wholes(span) or len(span) != 2:
            raise _broken(path, f"the tensor {name[:80]!r} has the shape {shape!r:.80} and the place {span!r:.80}")
        if span[1] - span[0] != math.prod(shape) * _SIZES[dtype]:
            raise _broken(path, f"the tensor {name[:80]!r} of shape {tuple(shape)} does not fill its place {span}")
        spans.append(span)
        header.shapes[name], header.dtypes[name] = tuple(shape), dtype
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != room:
        raise _broken(path, f"its tensors leave gaps, overlap, or do not end where its {room} bytes of data end")
    return header


_FIELDS = ("dtype", "shape", "data_offsets")


def _wholes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _broken(path: Path, why: str) -> FVGError:
    return FVGError(
        f"{path} is no whole safetensors file: {why}; copy it again, or download it again with force_download=True."
    )


def check_header(
    header: Header, path: Path, names: Collection[str] | None = None, dtypes: Iterable[str] = FLOATS
) -> None:
    """Refuses tensors that do not belong into a file, before any is read.

    Args:
        names: the names that it may hold; None: any. dtypes: of all of them.

    Raises:
        FVGError: another name, another dtype, or more than `MAX_TENSOR_BYTES`.
    """
    if header.bytes > MAX_TENSOR_BYTES:
        raise FVGError(f"{path} has {header.bytes} bytes of tensors; more than {MAX_TENSOR_BYTES} are not read.")
    other = [name for name in header.shapes if names is not None and name not in names]
    if other:
        raise FVGError(
            f"the tensors of {path.name} do not fit: unexpected {', '.join(n[:80] for n in other[:6])}; it may hold "
            f"{', '.join(sorted(names or ()))}."
        )
    wrong = [f"{name[:80]} ({dtype})" for name, dtype in header.dtypes.items() if dtype not in dtypes]
    if wrong:
        raise FVGError(f"the tensors of {path} must be {' or '.join(dtypes)}, but are not: {', '.join(wrong[:6])}.")


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name: the header is read at once, the tensors when the first is asked for.

    Args:
        path: the file. digest: sha256 of it, or None where no config says it.
        names: the names that it may hold; None: any.

    Attributes:
        header: names, dtypes and shapes.

    Raises:
        FVGError: no whole safetensors file, other names, not floating point, not the file of this digest; on access,
            NaN or infinite values.
    """

    def __init__(self, path: Path, digest: str | None = None, names: Collection[str] | None = None) -> None:
        self.header: Header = read_header(path)
        check_header(self.header, path, names)
        self._path, self._digest = path, digest
        self._tensors: dict[str, Tensor] | None = None
        self._content: bytes | None = None
        self._file: BinaryIO | None = None
        if self.header.bytes <= SMALL_BYTES:  # kept, so that a writer may replace the file meanwhile
            self._content = read_bytes(path, SMALL_BYTES + MAX_HEADER_BYTES + 8, "a safetensors file")
            self._compare(hashlib.sha256(self._content).hexdigest())
        else:
            if _KEEPS_REPLACED:
                self._file = path.open("rb")
                weakref.finalize(self, self._file.close)
            if digest is not None:
                self._compare(sha256_of(path))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.header.shapes:
            raise KeyError(name)
        if self._tensors is None:
            content, self._content = self._content, None
            if content is None:
                content = self._read()
                self._compare(hashlib.sha256(content).hexdigest())
            self._tensors = parse_tensors(content, self._path)
        return self._tensors[name]

    def _read(self) -> bytes:
        """A large file, also where a writer has put another in its place: the open one is still the one of then."""
        limit = MAX_TENSOR_BYTES + MAX_HEADER_BYTES + 8
        if self._file is None or self._file.closed:
            return read_bytes(self._path, limit, "a safetensors file")
        with self._file as file:
            return file.read(min(limit, os.fstat(file.fileno()).st_size))

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.shapes)

    def __len__(self) -> int:
        return len(self.header.shapes)

    def _compare(self, found: str) -> None:
        if self._digest is not None and found != self._digest:
            raise FVGError(OTHER_FILE.format(self._path))


OTHER_FILE = (
    "{} is not the file that was saved with this config.json (its sha256 differs): an interrupted save or a mixed "
    "copy. Save again, or take both files from the same revision."
)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal digits; read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; of a file without reading its tensors."""
    if isinstance(tensors, TensorFile):
        return dict(tensors.header.shapes)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


_SAVED: ContextVar[dict[str, tuple[int, ...]] | None] = ContextVar("shapes of the file that is loaded", default=None)


@contextlib.contextmanager
def made_for(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `room_for` refuses what is not in these tensors: the sizes in a config cost no memory."""
    token = _SAVED.set(shapes_of(tensors))
    try:
        yield
    finally:
        _SAVED.reset(token)


def room_for(name: str, *shape: int) -> None:
    """Called before a tensor of one's own is made; inside `made_for` the file must hold it, unless it is small.

    Raises:
        FVGError: the file has no such tensor, or one of another shape, and it would take more than `SMALL_BYTES`.
    """
    saved = _SAVED.get()
    if saved is not None and saved.get(name) != shape and 4 * math.prod(shape) > SMALL_BYTES:
        found = f"{name} is {saved[name]}, expected {shape}" if name in saved else f"missing {name} {shape}"
        raise FVGError(f"the tensors of the file do not fit its config: {found}.")


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in a file whose header was checked, whole.

    Raises:
        FVGError: damaged, or a value that is NaN or infinite; the tensor is named.
    """
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _broken(path, str(error)) from error
    refuse_not_finite(tensors, str(path))
    return tensors


DIVERGED = (
    "The training that wrote it diverged, or the file was edited: train again with a smaller learning rate, or take an "
    "earlier file."
)


def refuse_not_finite(tensors: Mapping[str, Tensor], where: str, way_out: str = DIVERGED) -> None:
    """Raises FVGError where a tensor holds NaN or an infinite value; names it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FVGError(f"the tensor {name[:80]!r} of {where} holds values that are NaN or infinite. {way_out}")
