"""The paper's experiments over data sets × tuners × seeds: resumable, over processes, into one tidy file and tables.

```python
plan = Plan("base-to-new", paper_suite("data"), ["OxfordPets"], ["coop"], model="openai/clip-vit-base-patch16",
            output=Path("out"))
run(plan, load, processes=2)                # out/results.csv, out/tables.md
```
"""

from fvg_adapter.reproduce.running import Outcome, run, summarise
from fvg_adapter.reproduce.suites import Setting, Suite, paper_suite, read_suite
from fvg_adapter.reproduce.tidy import FORMAT, Figure, read_tidy, write_tidy
from fvg_adapter.reproduce.units import PROTOCOLS, Plan, Unit

__all__ = [
    "FORMAT",
    "PROTOCOLS",
    "Figure",
    "Outcome",
    "Plan",
    "Setting",
    "Suite",
    "Unit",
    "paper_suite",
    "read_suite",
    "read_tidy",
    "run",
    "summarise",
    "write_tidy",
]
