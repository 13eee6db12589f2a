"""Do the tests notice small changes to the code? Mutation testing by mutmut, room by room (`make mutation`).

The rooms where a silent mistake would cost most are gone through whole: losses, heads, config and attention. Of the
model, the tuners, the files and what goes to the Hub a sample is drawn by a seed. A change that no test notices is a
survivor; `mutmut show NAME` prints it, in the copy of the project under output/mutation where all of this happens. One
that never ends counts as noticed, and is counted once more on its own. What torch.compile traces cannot go through
mutmut's trampolines, nor can tests that start other processes; they are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "output" / "mutation"
COPIED = ("fvg_adapter", "tests", "examples", "docs", "README.md", "pyproject.toml")
NOTICED, SURVIVED, ENDLESS = "noticed", "survived", "never ended"
_VERDICTS = {0: SURVIVED, 5: SURVIVED, 33: SURVIVED, None: "not run", 34: "left out"}  # 33: no test runs the function
_VERDICTS |= dict.fromkeys((36, 24, -24, 152, 255), ENDLESS)


@dataclass(frozen=True)
class Rooms:
    """Modules that the same tests look after.

    Attributes:
        name: of the copy. mutants: {room: how the names of its mutants begin}.
        files: patterns of the files that are changed. tests: files of tests, quick ones first.
        whole: whether every mutant is run, or a sample of each room.
        first: a pattern of a few mutants; running it makes those of every room, of which the samples are drawn.
    """

    name: str
    mutants: dict[str, str]
    files: Sequence[str]
    tests: Sequence[str]
    whole: bool
    first: str = ""

    def prepare(self) -> Path:
        """A copy of the project with mutmut's settings."""
        place = PLACE / self.name
        shutil.rmtree(place, ignore_errors=True)
        for name in COPIED:
            source, target = ROOT / name, place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        lines = {
            "source_paths": ["fvg_adapter"],
            "only_mutate": self.files,
            "also_copy": ["examples", "docs", "README.md"],
            "pytest_add_cli_args": ["-x", "-q", "-p", "no:cacheprovider", "-k", "not compile"],
            "pytest_add_cli_args_test_selection": [f"tests/{name}.py" for name in self.tests],
        }
        text = "".join(f"{name} =\n    " + "\n    ".join(values) + "\n" for name, values in lines.items())
        (place / "setup.cfg").write_text(f"[mutmut]\n{text}timeout_multiplier = 30\nuse_git_change_detection = false\n")
        return place


ALL = (
    Rooms(
        "equations",
        {"losses": "fvg_adapter.losses.", "heads": "fvg_adapter.heads.", "config": "fvg_adapter.config."},
        ("fvg_adapter/losses.py", "fvg_adapter/heads.py", "fvg_adapter/config.py"),
        ("test_losses", "test_config", "test_numbers"),
        whole=True,
    ),
    Rooms(
        "attention",
        {"attention": "fvg_adapter.attention"},
        ("fvg_adapter/attention*.py",),
        ("test_attention_kernels", "test_attention_flow", "test_attention", "test_families"),
        whole=True,
    ),
    Rooms(
        "models",
        {"model": "fvg_adapter.model.", "tuners": "fvg_adapter.tuners.", "files": "fvg_adapter.storage."},
        ("fvg_adapter/model.py", "fvg_adapter/tuners/*", "fvg_adapter/storage.py"),
        (
            "test_model",
            "test_external",
            "test_wrapping",
            "test_storage",
            "test_golden_coop",
            "test_golden_kgcoop",
            "test_golden_promptsrc",
            "test_golden_mmrl",
            "test_lora",
            "test_text_memory",
            "test_tuner_life",
            "test_features",
            "test_foreground",
            "test_families",
            "test_hub_in_process",
        ),
        whole=False,
        first="fvg_adapter.model.*__init____mutmut_1",
    ),
    Rooms(
        "hub",
        {"hub": "fvg_adapter.hub.", "publishing": "fvg_adapter.publishing.", "card": "fvg_adapter.card."},
        ("fvg_adapter/hub.py", "fvg_adapter/publishing.py", "fvg_adapter/card/*"),
        ("test_card_text", "test_card", "test_hub_in_process"),
        whole=False,
        first="fvg_adapter.hub.x_load__mutmut_1",
    ),
)


def mutmut(place: Path, at_once: int, *names: str) -> None:
    """Runs these mutants (names or patterns)."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(at_once), *names]
    subprocess.run(command, cwd=place, check=True, stdout=sys.stderr)


def verdicts(place: Path) -> dict[str, str]:
    """What became of every mutant that there is, by name."""
    found = {}
    for file in (place / "mutants").rglob("*.meta"):
        codes = json.loads(file.read_text("utf-8"))["exit_code_by_key"]
        found.update({name: _VERDICTS.get(code, NOTICED) for name, code in codes.items()})
    return found


def main() -> None:
    """Runs the mutants and prints a row a room; exits with 1 when too many survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="*", default=[rooms.name for rooms in ALL])
    parser.add_argument("--sample", type=int, default=60, help="mutants drawn of each sampled room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=85.0, help="percent noticed in the whole rooms")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    total, left, draw = Counter[str](), [], random.Random(options.seed)
    print("| room | changes | noticed | of them never ended | survived | share |\n|---|---:|---:|---:|---:|---:|")
    for rooms in (rooms for rooms in ALL if rooms.name in options.rooms):
        place = rooms.prepare()
        if rooms.whole:
            mutmut(place, options.at_once)
        else:
            mutmut(place, options.at_once, rooms.first)
        for room, start in rooms.mutants.items():
            chosen = sorted(name for name in verdicts(place) if name.startswith(start))
            if not rooms.whole:
                chosen = draw.sample(chosen, min(options.sample, len(chosen)))
                mutmut(place, options.at_once, *chosen)
            after = verdicts(place)
            count = Counter(after[name] for name in chosen)
            noticed = count[NOTICED] + count[ENDLESS]
            tried = noticed + count[SURVIVED]
            share = f"{100 * noticed / max(tried, 1):.1f} %"
            kind = "" if rooms.whole else " (a sample)"
            print(
                f"| {room}{kind} | {tried} | {noticed} | {count[ENDLESS]} | {count[SURVIVED]} | {share} |", flush=True
            )
            total.update(count if rooms.whole else {})
            left += [name for name in chosen if after[name] == SURVIVED]
    whole = 100 - 100 * total[SURVIVED] / max(total[NOTICED] + total[ENDLESS] + total[SURVIVED], 1)
    print(f"\n{whole:.1f} % noticed in the rooms that were gone through whole")
    print("\n".join(f"survived: {name}" for name in left))
    sys.exit(whole < options.at_least)


if __name__ == "__main__":
    main()
