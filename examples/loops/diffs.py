"""What changes in each of the six loops, as the README and docs/ show it.

`python -m examples.loops.diffs` writes it there. A page asks for a diff by `<!-- diff: NAME, CONTEXT lines around -->`
above a fence; what stands in the fence is made from NAME_before.py and NAME_after.py.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LOOPS = ("plain", "trainer", "accelerate", "lightning", "dassl", "compile")
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "howto" / "loops.md")
MOST = 4
"""Lines that may change in a loop; one that takes the place of another counts once."""
SHOWN = re.compile(r"(<!-- diff: (\w+), (\d+) lines? around -->\n```diff\n)(.*?)(```)", re.DOTALL)


def opcodes(name: str) -> tuple[list[str], list[str], difflib.SequenceMatcher[str]]:
    """The lines before, those after, and how they were matched."""
    before, after = ((HERE / f"{name}_{when}.py").read_text("utf-8").splitlines() for when in ("before", "after"))
    return before, after, difflib.SequenceMatcher(None, before, after, autojunk=False)


def changed_lines(name: str) -> int:
    """Lines added, taken away or put in the place of another (which counts once)."""
    _, _, matcher = opcodes(name)
    return sum(max(b - a, d - c) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal")


def diff(name: str, context: int) -> str:
    """The changed lines with `context` lines around them; what is left out between them shows as an ellipsis."""
    before, after, matcher = opcodes(name)
    groups = []
    for group in matcher.get_grouped_opcodes(context):
        shown: list[str] = []
        for kind, a, b, c, d in group:
            if kind == "equal":
                shown += [f"  {line}" for line in before[a:b]]
            else:
                shown += [f"- {line}" for line in before[a:b]] + [f"+ {line}" for line in after[c:d]]
        groups.append("\n".join(line.rstrip() for line in shown).strip("\n"))
    return "\n  ...\n".join(groups) + "\n"


def refreshed(page: str) -> str:
    """A page's text with every diff in it made anew."""
    return SHOWN.sub(lambda found: found[1] + diff(found[2], int(found[3])) + found[5], page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text("utf-8")), "utf-8")
