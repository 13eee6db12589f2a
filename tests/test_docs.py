"""The Python of the README runs as it stands there, and the public names exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fvg_adapter

ROOT = Path(__file__).parent.parent


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["maps"].shape[1:] == (1, 4, 8, 8)  # type: ignore[attr-defined]
        assert names["logits"].shape[1] == len(names["pictures"].classes) + 2  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "output")


def test_public_names() -> None:
    assert len(fvg_adapter.__all__) <= 12
    for name in fvg_adapter.__all__:
        value = getattr(fvg_adapter, name)
        assert callable(value) and value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'rap'"):
        fvg_adapter.rap  # noqa: B018


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, fvg_adapter; print(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
