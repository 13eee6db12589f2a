"""Writes docs/licences.md: what an installation brings, with versions and licences as the packages themselves say.

`make licences`; the environment of `make test` is looked at, whose versions the lock file names.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).parent.parent / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

fvg-adapter is under Apache-2.0. These are the packages that an installation brings, with the licences that their own
metadata names; `make licences` writes this page from an environment, `make sbom` writes all of it as CycloneDX JSON.
"""
SECTIONS = (
    ("pip install fvg-adapter", ()),
    ("the extras train and viz", ("train", "viz")),
    ("the extra space", ("space",)),
)


def closure(extras: tuple[str, ...]) -> set[str]:
    """Names of everything that the package asks for, directly or not."""
    found: set[str] = set()
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [("fvg-adapter", extras)]
    while waiting:
        item = waiting.pop()
        if item in seen or not installed(item[0]):  # some are for other platforms
            continue
        seen.add(item)
        found.add(item[0])
        for requirement in map(Requirement, distribution(item[0]).requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *item[1])):
                name = re.sub(r"[-_.]+", "-", requirement.name).lower()
                waiting.append((name, tuple(sorted(requirement.extras))))
    return found - {"fvg-adapter"}


def licence(name: str) -> str:
    """What a package's metadata says, in few words."""
    about = distribution(name).metadata
    said = about.get("License-Expression")
    classified = [c.split(" :: ")[-1] for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    free = (about.get("License") or "").strip().splitlines()
    return said or ", ".join(classified) or (free[0][:60] if free else "not named")


def main() -> None:
    """Writes the page."""
    text, before = [HEAD], set()
    for title, extras in SECTIONS:
        names = closure(extras) - before
        before |= names
        text.append(f"## {title[0].upper() + title[1:] if not title.startswith('pip') else f'`{title}`'}\n")
        text.append("| package | version | licence |\n|---|---|---|")
        text += [f"| {n} | {distribution(n).version.partition('+')[0]} | {licence(n)} |" for n in sorted(names)]
        text.append("")
    PAGE.write_text("\n".join(text), "utf-8")
    unnamed = sorted(n for n in before if licence(n) == "not named")
    print(f"{len(before)} packages; without a licence in their metadata: {unnamed or 'none'}", file=sys.stderr)  # noqa: T201


def installed(name: str) -> bool:
    """Whether a package is here."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
