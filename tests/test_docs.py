"""The Python of the README runs as it stands there, and the public names exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fvg_adapter
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import Tuner, register, tuner_named

ROOT = Path(__file__).parent.parent
HERE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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


def blocks_of(page: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, text) of a page's fenced blocks."""
    return re.findall(rf"```{language}(.*?)\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_the_tutorial_of_a_tuner_of_ones_own_runs(tmp_path: Path) -> None:
    (_, tuner), (_, use) = blocks_of("docs/own_tuner.md", "python")
    assert len(tuner.strip().splitlines()) < 60
    (tmp_path / "residual.py").write_text(tuner, "utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    quick = ["--shots", "1", "--views", "1", "--tune-epochs", "1", "--epochs", "1", "--no-controls", "--json"]
    script = f"{use}\nassert logits.shape == (6, 2) and type(again.tuner) is TextResidual\n"
    script += "assert again.tuner.up.any()\n"
    command = blocks_of("docs/own_tuner.md", "bash")[0][1].split()
    for call in ([sys.executable, "-c", script], [sys.executable, "-m", "fvg_adapter.cli", *command[1:], *quick]):
        found = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **HERE})
        assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)
    assert 0 < rows["text_residual"]["hm"][0] <= 100 and "text_residual+fvg" in rows


def test_own_tuners_that_do_not_fit_are_named() -> None:
    with pytest.raises(FVGError, match="could not be imported"):
        tuner_named("no_such_module:Tuner")
    with pytest.raises(FVGError, match="is no tuner"):
        tuner_named("torch.nn:Linear")
    with pytest.raises(FVGError, match="unknown"):
        tuner_named("co-op")

    class Nameless(Tuner):
        pass

    with pytest.raises(FVGError, match="no kind of its own"):
        register(Nameless)
