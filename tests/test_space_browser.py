"""The Space's page in a real browser: upload, type, click, read. Needs Chromium: make test-browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from space_fixtures import PICTURE, POCKET, ROOT, save_adapter

pytestmark = pytest.mark.browser
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served by the command of its README."""
    folder = tmp_path_factory.mktemp("space")
    adapter = os.environ.get("FVG_ADAPTER") or save_adapter(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", adapter, "--base", str(POCKET / "model"), "--port", str(port)]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(
            command, cwd=ROOT / "examples" / "space", env={**os.environ, **settings}, stdout=log, stderr=log
        )
        try:
            for _ in range(240):
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.25)
            yield url
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "Chromium is missing; apt-get install chromium"
    with sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=browser, args=FLAGS)
        tab = running.new_page(viewport={"width": 1360, "height": 900})
        tab.set_default_timeout(60_000)
        tab.goto(address, wait_until="domcontentloaded")
        tab.wait_for_selector("#look")
        yield tab
        running.close()


def ask(page: Any, picture: Path, classes: str) -> None:
    page.set_input_files("#picture input[type=file]", str(picture))
    page.wait_for_selector(f"#picture :text('{picture.stem}')")
    page.fill("#classes textarea", classes)
    page.click("#look")


def test_a_picture_is_answered(page: Any, tmp_path: Path) -> None:
    ask(page, PICTURE, "banana, lemon, purple turnip")
    page.wait_for_selector("#gates:has-text('trust in the foreground')")
    for number, kind in enumerate(("CLIP", "coop", "FVG-PT")):
        answer = page.inner_text(f"#answer-{number}")
        assert kind in answer and "banana" in answer and "%" in answer
    assert "joint branch" in page.inner_text("#gates")
    page.wait_for_function(
        "[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth > 100).length >= 4"
    )
    shot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "space.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000


@pytest.mark.parametrize(
    ("name", "content", "said"), [("notes.txt", b"only words", "no picture"), ("none.png", b"", "empty")]
)
def test_a_bad_upload_is_told(page: Any, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    upload = tmp_path / name
    upload.write_bytes(content)
    ask(page, upload, "banana, lemon")
    page.wait_for_selector(f"#problem:has-text('{said}')")


def test_an_unknown_adapter_is_told_and_the_page_goes_on(page: Any) -> None:
    page.fill("#adapter textarea, #adapter input", "/no/such/folder")
    ask(page, PICTURE, "banana, lemon")
    page.wait_for_selector("#problem:has-text('/no/such/folder')")
    assert page.inner_text("#gates").strip() == ""
