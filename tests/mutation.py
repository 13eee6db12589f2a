"""Do the tests notice small changes to the code? Mutation testing by mutmut, room by room (`make mutation`).

The rooms where a silent mistake would cost most are gone through whole: losses, heads, config and attention. Of the
model, the tuners, the files and the Hub a sample is drawn by a seed. A change that no test notices is a survivor;
`mutmut show NAME` prints it. One that never ends counts as noticed, and is counted once more on its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHOLE = {
    "losses": "fvg_adapter.losses.",
    "heads": "fvg_adapter.heads.",
    "config": "fvg_adapter.config.",
    "attention": "fvg_adapter.attention",
}
SAMPLED = {
    "model": "fvg_adapter.model.",
    "tuners": "fvg_adapter.tuners.",
    "files and Hub": ("fvg_adapter.storage.", "fvg_adapter.hub."),
}
NOTICED, SURVIVED, ENDLESS = "noticed", "survived", "never ended"
_VERDICTS = {0: SURVIVED, 5: SURVIVED, 33: SURVIVED, None: "not run", 34: "left out"}  # 33: no test runs the function
_VERDICTS |= dict.fromkeys((36, 24, -24, 152, 255), ENDLESS)


def mutmut(*names: str) -> None:
    """Runs these mutants (names or patterns); mutmut's own output is kept beside them."""
    subprocess.run([sys.executable, "-m", "mutmut", "run", *names], cwd=ROOT, check=True, stdout=sys.stderr)


def verdicts() -> dict[str, str]:
    """What became of every mutant that there is, by name."""
    found = {}
    for file in (ROOT / "mutants").rglob("*.meta"):
        codes = json.loads(file.read_text("utf-8"))["exit_code_by_key"]
        found.update({name: _VERDICTS.get(code, NOTICED) for name, code in codes.items()})
    return found


def main() -> None:
    """Runs the mutants and prints a row a room; exits with 1 when too many survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=80, help="mutants drawn of each sampled room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=85.0, help="percent noticed in the whole rooms")
    options = parser.parse_args()
    mutmut("fvg_adapter.heads.*")  # makes the mutants of every room
    names, draw = sorted(verdicts()), random.Random(options.seed)
    rooms = {room: [n for n in names if n.startswith(start)] for room, start in {**WHOLE, **SAMPLED}.items()}
    for room in SAMPLED:
        rooms[room] = draw.sample(rooms[room], min(options.sample, len(rooms[room])))
    mutmut(*(name for chosen in rooms.values() for name in chosen))
    after, total = verdicts(), Counter[str]()
    print("| room | changes | noticed | of them never ended | survived | share |\n|---|---:|---:|---:|---:|---:|")
    for room, chosen in rooms.items():
        count = Counter(after[name] for name in chosen)
        noticed = count[NOTICED] + count[ENDLESS]
        tried = noticed + count[SURVIVED]
        share = f"{100 * noticed / max(tried, 1):.1f} %"
        kind = "" if room in WHOLE else " (a sample)"
        print(f"| {room}{kind} | {tried} | {noticed} | {count[ENDLESS]} | {count[SURVIVED]} | {share} |")
        if room in WHOLE:
            total.update(count)
    whole = 100 - 100 * total[SURVIVED] / (total[NOTICED] + total[ENDLESS] + total[SURVIVED])
    print(f"\n{whole:.1f} % noticed in {', '.join(WHOLE)}")
    print("\n".join(f"survived: {name}" for chosen in rooms.values() for name in chosen if after[name] == SURVIVED))
    sys.exit(whole < options.at_least)


if __name__ == "__main__":
    main()
