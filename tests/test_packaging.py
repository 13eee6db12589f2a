"""What is shipped: a wheel and an sdist that build, hold the package alone, and work in a fresh environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from fvg_adapter import __version__

ROOT = Path(__file__).parent.parent


def test_help_imports_nothing_heavy() -> None:
    """What the benchmark of start-up time measures stays true: modules that must not be imported."""
    code = """
import sys
from typer.testing import CliRunner
from fvg_adapter.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
heavy = {"torch", "transformers", "peft", "numpy", "PIL", "huggingface_hub", "datasets", "accelerate", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names_import_nothing_beyond_torch_and_transformers() -> None:
    code = """
import sys, torch
from transformers import CLIPModel
before = set(sys.modules)
from fvg_adapter import FVGConfig, FVGModel, FVGOutput, load, record_attention, unwrap, wrap
heavy = {"peft", "datasets", "accelerate", "matplotlib", "torchmetrics", "rich", "typer", "pandas", "sklearn", "scipy"}
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not heavy & new, heavy & new
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    said = [line for line in (built.stdout + built.stderr).splitlines() if "warning" in line.lower()]
    assert [line for line in said if "byte-compiling is disabled" not in line] == []
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"fvg_adapter-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"fvg_adapter", info}
    here = {
        str(p.relative_to(ROOT)) for p in (ROOT / "fvg_adapter").rglob("*") if p.suffix in (".py", ".json", ".typed")
    }
    assert {name for name in names if name.startswith("fvg_adapter/")} == here
    assert f"{info}/licenses/LICENSE" in names
    with tarfile.open(sdist) as archive:
        held = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"fvg_adapter", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= held
    assert not held & {"output", ".venv", ".venv-low", "site"}

    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    # The dependencies are those of this environment; what is new is the package itself.
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(packages), "utf-8")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel], check=True, env=clean
    )
    code = "import fvg_adapter; print(fvg_adapter.__file__); from fvg_adapter import wrap"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=clean)
    assert found.stdout.startswith(str(tmp_path / "fresh"))
    script = tmp_path / "fresh" / "bin" / "fvg-adapter"
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path, env=clean)
    assert "audit" in told.stdout
