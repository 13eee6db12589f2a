"""Every code block of the README and of docs/ runs as it stands there, page by page, in order.

A page's Python blocks share their names; a block with a title is saved as that file; `fvg-adapter` commands run on the
pocket data, with one shot and one epoch where they train. What cannot run here says why in the line above it:
`<!-- not run: REASON -->`, with one of REASONS.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from fvg_adapter.cli import app

ROOT = Path(__file__).parent.parent
REASONS = ("needs the network", "sets up an environment", "starts several processes", "starts a server")
AT_MOST = 9  # blocks that are not run
FRAGMENT, NOTES = "a fragment", ("docs/DESIGN.md", "docs/FACTS.md")  # of signatures and of others' code
ELSEWHERE = {
    "docs/own_tuner.md": "tests/test_docs.py",
    "docs/howto/sharing.md": "tests/test_hub_sharing.py",
}  # pages with a test of their own
QUICK = ["--shots", "1", "--views", "1", "--tune-epochs", "1", "--epochs", "1", "--no-controls"]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (.*?) -->\n *$")


class Block(NamedTuple):
    language: str
    title: str
    text: str
    reason: str | None


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text("utf-8")
    for found in FENCE.finditer(text):
        mark = MARK.search(text[: found.start()])
        language, _, rest = found[2].strip().partition(" ")
        title = re.search(r'title="(.*?)"', rest)
        yield Block(language, title[1] if title else "", found[3], mark[1] if mark else None)


def pages() -> list[str]:
    return ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def runnable(page: str) -> list[Block]:
    """README's Python is test_docs.py's."""
    languages = ("bash",) if page == "README.md" else ("python", "bash")
    return [block for block in blocks(page) if block.language in languages and block.reason is None]


RUN = [page for page in pages() if page not in ELSEWHERE and runnable(page)]


def test_what_is_not_run_says_why_and_is_little() -> None:
    marked = [(page, block) for page in pages() for block in blocks(page) if block.reason]
    whole = [(page, block) for page, block in marked if block.reason != FRAGMENT]
    assert {block.reason for _, block in whole} <= set(REASONS)
    assert len(whole) <= AT_MOST
    assert {page for page, block in marked if block.reason == FRAGMENT} <= set(NOTES)
    comments = sum((ROOT / page).read_text("utf-8").count("<!-- not run") for page in pages())
    assert comments == len(marked), "a mark stands in the line right above its block"


def test_languages_are_known() -> None:
    found = {(page, block.language) for page in pages() for block in blocks(page)}
    unknown = {pair for pair in found if pair[1] not in ("python", "bash", "diff", "", "text", "json")}
    assert not unknown
    assert len(RUN) >= 5


@pytest.fixture
def log_as_found() -> Iterator[None]:
    """A page may turn the log on."""
    yield
    logging.getLogger("fvg_adapter").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("log_as_found")
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "docs"}
    for block in runnable(page):
        if block.title:
            compile(block.text, block.title, "exec")
            Path(block.title).write_text(block.text, "utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        else:
            for command in commands(block.text):
                run(command, page)
    shutil.rmtree(tmp_path / "output", ignore_errors=True)


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run(command: list[str], page: str) -> None:
    """One command of a page; ours runs in this process."""
    assert command[0] == "fvg-adapter", f"{page}: mark blocks with other commands, such as {command[0]!r}, as not run."
    quick = QUICK if command[1] == "train" else []
    done = CliRunner().invoke(app, [*command[1:], *quick])
    assert done.exit_code == 0, f"{page}: {shlex.join(command)}\n{done.output}\n{done.stderr}"


def test_titled_scripts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of the page on several GPUs, as one process."""
    import runpy

    (script,) = [block for block in blocks("docs/howto/several_gpus.md") if block.title]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    quick = script.text.replace("resume=False", "recipe=Stage('sgd', 0.0035, 32, 'here', epochs=1)")
    quick = "from fvg_adapter.tuners import Stage\n" + quick
    Path(script.title).write_text(quick, "utf-8")
    monkeypatch.setattr(sys, "argv", [script.title])
    runpy.run_path(script.title, run_name="__main__")
    assert (tmp_path / "output/gpus/adapter/fvg_heads.safetensors").is_file()
