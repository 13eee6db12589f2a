"""The files of a saved folder: their names, and how they are replaced, all of them or none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
TUNER_FILE = "tuner.safetensors"
HEADS_FILE = "fvg_heads.safetensors"
CARD_FILE = "README.md"
PICTURE_FILE = "attention.png"


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json into a folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder beside the target; on success its files move into the target, on failure it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if not target.exists():
            folder.chmod(0o755)
            folder.rename(target)
            return
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == CONFIG_FILE)
        aside: list[tuple[Path, Path | None]] = []
        try:
            for number, path in enumerate(files):  # the config last: until then its hashes tell of a killed save
                to = target / path.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                kept = folder / f".old-{number}" if to.exists() else None
                if kept is not None:
                    os.link(to, kept) if hasattr(os, "link") else shutil.copy2(to, kept)
                path.replace(to)
                aside.append((to, kept))
        except BaseException:
            for to, kept in aside:
                kept.replace(to) if kept is not None else to.unlink()
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
