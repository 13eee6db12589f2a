"""Hostile files: refused with a message, without running code, hanging, or taking memory (SECURITY.md).

`make hostile` draws 12,000 cases; the default run some hundreds, always the same.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import EVIL, TARGETS, World, attempt, header_of, parts_of, paths_in, replaced, safetensors_file, zip_of
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FVG_HOSTILE_CASES", "400"))
SEED = int(os.environ.get("FVG_HOSTILE_SEED", "0"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole"))


# -- drawn cases -------------------------------------------------------------------------------------------------------

SURPRISES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e300, float("nan"), float("inf"), 2**31, 2**40, 2**63, 10**30, "", "x", "{}",
    "../../../../etc/passwd", "/etc/passwd", "/proc/self/environ", "evil_of_fvg:Evil", "evil_of_fvg", "os.system",
    "__reduce__", "F32", "I64", "BOOL", "F8_E4M3", "x" * 100_000, "(a|a|a)*" * 8 + "b", "(.*.*)*x", "\ud800", "\x00",
    "local", "coop", "mmrl", "external", "fvg", "pissa", "PROMPT_TUNING", "XLORA", "LORA", "VERA", [], [0], [-1],
    [1, 2, 3], [2**40, 2**40], ["a"] * 5000, [[[[[[[[]]]]]]]], {}, {"a": 1}, {"": {}}, {"model_type": "clip"},
    {"layers": [[0, 1]]}, "/", ".", "~", "C:\\Windows", "\\\\server\\share", "a photo of a {}.", "{}" * 50,
]  # fmt: skip
KEYS = [
    "format", "kind", "path", "id", "tokenizer", "auto_map", "auto_mapping", "trust_remote_code", "megatron_config",
    "megatron_core", "layer_replication", "r", "rank_pattern", "modules_to_save", "init_lora_weights", "loftq_config",
    "projection", "peft_config", "model", "classes", "template", "n_ctx", "../x", "__class__", "__metadata__", "ctx",
    "class_features", "visual_adapter.down.weight", "exclude_modules", "layers_pattern", "trainable_token_indices",
]  # fmt: skip
surprise = st.one_of(
    st.sampled_from(SURPRISES),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


@st.composite
def spoiled_json(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document with some of its places changed, or its text."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_in(document)))
        inner = document
        for key in path:
            inner = inner[key]
        how = draw(st.sampled_from(("replace", "replace", "remove", "add", "swap")))
        if how == "remove" and path:
            document = replaced(document, path, ...)
        elif how == "add" and isinstance(inner, dict):
            document = replaced(document, path, {**inner, draw(st.sampled_from(KEYS)): draw(surprise)})
        elif how == "swap":
            other = draw(st.sampled_from(paths_in(document)))
            value = document
            for key in other:
                value = value[key]
            document = replaced(document, path, value)
        else:
            document = replaced(document, path, draw(surprise))
    text = json.dumps(document)
    how = draw(st.sampled_from(("",) * 8 + ("twice", "latin", "bom", "deep")))
    if how == "twice" and text.startswith("{") and len(text) > 2:
        text = f"{text[:-1]}, {text[1:]}"
    if how == "deep":
        text = text[:-1] + ', "deep": ' + "[" * 5000 + "]" * 5000 + "}"
    return text.encode("utf-16" if how == "latin" else "utf-8-sig" if how == "bom" else "utf-8")


@st.composite
def spoiled_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes changed, removed or added, or another file altogether."""
    data = bytearray(content)
    how = draw(st.sampled_from(("flip", "flip", "cut", "add", "other")))
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if how == "add":
        place = draw(st.integers(0, len(content)))
        return content[:place] + draw(st.binary(max_size=40)) + content[place:]
    if how == "other":
        return draw(st.sampled_from((b"", b"\0" * 4096, code_pickle(), b"PK\x03\x04", b"[" * 4096)) | st.binary())
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, min(len(data) - 1, 600)))] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def spoiled_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A header that lies, values that are no numbers, or bytes at random."""
    header, data = header_of(content)
    how = draw(st.sampled_from(("header", "header", "header", "length", "values", "bytes")))
    if how == "bytes":
        return draw(spoiled_bytes(content))
    if how == "length":
        size = draw(st.sampled_from((0, 1, 2**31, 2**63, 2**64 - 1, len(content), 100_000_001)))
        return safetensors_file(header, data, size)
    if how == "values":
        value = draw(st.sampled_from((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff")))
        place = 4 * draw(st.integers(0, max(len(data) // 4 - 1, 0)))
        return safetensors_file(header, data[:place] + value + data[place + 4 :])
    return safetensors_file(draw(spoiled_json(header)), data)


OPCODES = [
    b"]", b"}", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"b", b"R", b"Q", b"0", b"2",
    b"1", b"N", b"\x88", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"h\x00", b"h\x01", b"q\x00", b"q\x01",
    b"q\x02", b".", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
    b"cbuiltins\nexec\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"X\x03\x00\x00\x00ctx",
    b"X\x07\x00\x00\x00storage", b"\x8a\x01\x01", b"ctorch.optim.sgd\nSGD\n",
    b"cdassl.optim.lr_scheduler\nConstantWarmupScheduler\n", b"c_codecs\nencode\n", b"\x81", b"ctorch\nSize\n",
    b"cnumpy.core.multiarray\nscalar\n", b"ctorch.serialization\nload\n", b"X\x01\x00\x00\x000",
]  # fmt: skip


@st.composite
def spoiled_checkpoint(draw: st.DrawFn, content: bytes) -> bytes:
    """Another pickle in a torch zip file, or a raw one; sizes that lie; bytes at random."""
    structure, storages = parts_of(content)
    how = draw(st.sampled_from(("opcodes", "structure", "insert", "code", "compressed", "bytes")))
    if how == "opcodes":
        made = b"\x80\x02" + b"".join(draw(st.lists(st.sampled_from(OPCODES), max_size=30))) + b"."
        return draw(st.sampled_from((zip_of(made, storages), made)))
    if how == "structure":
        changed = bytearray(structure)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        return zip_of(bytes(changed), storages)
    if how == "insert":
        place = draw(st.integers(2, len(structure) - 1))
        extra = b"".join(draw(st.lists(st.sampled_from(OPCODES), min_size=1, max_size=6)))
        return zip_of(structure[:place] + extra + structure[place:], storages)
    if how == "code":
        return zip_of(code_pickle(), storages)
    if how == "compressed":
        return zip_of(structure, dict.fromkeys(storages, b"\x00" * 10000000), zipfile.ZIP_DEFLATED)
    return draw(spoiled_bytes(content))


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EVIL}",)


def code_pickle() -> bytes:
    return pickle.dumps({"state_dict": _Code()}, protocol=2)


@st.composite
def case(draw: st.DrawFn, world: World) -> tuple[str, dict[str, bytes]]:
    name = draw(st.sampled_from(sorted(TARGETS)))
    file = draw(st.sampled_from(TARGETS[name].files))
    content = (world.root / TARGETS[name].folder / file).read_bytes()
    if file.endswith(".safetensors"):
        spoiled = draw(spoiled_safetensors(content))
    elif file.endswith(".json"):
        spoiled = draw(st.one_of(spoiled_json(json.loads(content)), spoiled_bytes(content)))
    elif ".pth.tar" in file:
        spoiled = draw(spoiled_checkpoint(content))
    else:
        spoiled = draw(spoiled_bytes(content))
    return name, {file: spoiled}


def test_drawn_cases(world: World, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    evil_on_the_path(tmp_path)
    for target in TARGETS.values():  # what reading whole files takes is not what hostile ones take
        attempt(world, target, {}, tmp_path / "case")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @seed(SEED)
    @settings(
        max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    @given(case=case(world))
    def run(case: tuple[str, dict[str, bytes]]) -> None:
        name, spoiled = case
        outcomes[f"{name} {attempt(world, TARGETS[name], spoiled, tmp_path / 'case')}"] += 1

    try:
        run()
    finally:
        sys.path.remove(str(tmp_path))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{sum(outcomes.values())} cases, {grown:.0f} MB more:", dict(sorted(outcomes.items())))  # noqa: T201
    assert "evil_of_fvg" not in sys.modules
    assert grown < hostile.MEGABYTES
    refused = sum(count for key, count in outcomes.items() if key.endswith("refused"))
    assert refused > sum(outcomes.values()) / 2  # the cases are hostile, not harmless


def evil_on_the_path(folder: Path) -> None:
    """A module that leaves a trace when something imports it."""
    (folder / "evil_of_fvg.py").write_text(f"import pathlib\npathlib.Path({str(EVIL)!r}).touch()\nclass Evil: pass\n")
    sys.path.insert(0, str(folder))


def test_whole_files_are_read(world: World, tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        expected = "refused" if name == "hub alone" else "read"  # no base model is in that cache
        assert attempt(world, target, {}, tmp_path / "case") == expected, name
