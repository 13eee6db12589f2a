"""The documentation site: built strictly, no dead link, and every public name in its reference."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fvg_adapter", "fvg_adapter.tuners", "fvg_adapter.data", "fvg_adapter.train")


def public_names() -> list[str]:
    return [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    shown = [line.removeprefix("::: ") for line in pages.splitlines() if line.startswith("::: ")]
    missing = set(public_names()) - set(shown)
    assert not missing, f"put ::: NAME into a page of docs/api: {sorted(missing)}"
    assert len(shown) == len(set(shown))


def test_equations_become_mathml() -> None:
    from docs_hooks import on_page_content

    made = on_page_content(r'<p><span class="arithmatex">\(a &lt; b_1\)</span></p>')
    assert "<math" in made and "<mi>a</mi><mo>&#x0003C;</mo>" in made and "arithmatex" not in made and "\\(" not in made


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: dead links, anchors and cross references, and pages outside the navigation, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stderr[-4000:]
    inventory = (tmp_path / "api" / "index.html").read_text("utf-8")
    assert 'id="fvg_adapter.wrap"' in inventory
    anchors = "".join(page.read_text("utf-8") for page in (tmp_path / "api").rglob("*.html"))
    assert not [name for name in public_names() if f'id="{name}"' not in anchors]
    assert "<math" in (tmp_path / "equations" / "index.html").read_text("utf-8")


def test_relative_links_outside_the_site_lead_somewhere() -> None:
    """mkdocs checks those of docs/; these are the other pages that readers open."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").glob("*/README.md"))]
    links = [
        (page, link.partition("#")[0])
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
        if "://" not in link and not link.startswith("#")
    ]
    assert len(links) >= 8
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]
