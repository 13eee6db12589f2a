"""Running the units of a plan: data set by data set, over processes, every unit's file written when it is done."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from fvg_adapter.data import Files, open_release
from fvg_adapter.errors import FVGError
from fvg_adapter.protocols import base_to_new, cross_dataset, few_shot
from fvg_adapter.reproduce.suites import HUB
from fvg_adapter.reproduce.tables import write_tables
from fvg_adapter.reproduce.tidy import read_tidy, write_tidy
from fvg_adapter.reproduce.units import Plan, Unit, dataset_of, unit_record
from fvg_adapter.results import Results, write_json
from fvg_adapter.tuners import tuner_named

Load = Callable[[], tuple[Any, Any]]
"""Gives the base model and its tokenizer; a function that another process can import."""

TEXT_ONLY = ("zero_shot", "coop", "kgcoop")
"""Tuners whose image features are plain CLIP's."""

RESULTS, TABLES = "results.csv", "tables.md"


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        done: units that were run now. there: that had been run before. failed: why, by the unit's name.
    """

    done: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, load: Load, *, processes: int = 1, progress: Callable[[str], None] | None = None) -> Outcome:
    """Runs the units that are missing, and writes OUTPUT/results.csv and OUTPUT/tables.md from all that are there.

    Args:
        plan: what to run. load: gives the base model; called once a data set.
        processes: data sets at once, each in a process of one thread; 1 runs here.
        progress: called with a line for every unit.

    Returns:
        What was done; a unit that fails does not stop the others, and is named in `failed`.

    Raises:
        FVGError: results of another format or another plan in OUTPUT; nothing is run then.
    """
    say = progress or (lambda line: None)
    if (plan.output / RESULTS).exists():
        figures = read_tidy(plan.output / RESULTS)
        for name, wanted in (("protocol", plan.protocol), ("preset", plan.config.preset)):
            there = {getattr(figure, name) for figure in figures} - {wanted}
            if there:
                raise FVGError(
                    f"{plan.output / RESULTS} has figures of the {name} {min(there)!r}, but {wanted!r} is wanted. "
                    "Give another --output."
                )
    outcome = Outcome()
    jobs: dict[str, list[Unit]] = {}
    for unit in plan.units():
        if plan.is_done(unit):
            outcome.there.append(unit.name)
        else:
            jobs.setdefault(unit.dataset, []).append(unit)
    if outcome.there:
        say(f"{len(outcome.there)} of {len(plan.units())} units are there already")
    for dataset, units in list(jobs.items()):
        try:
            for name in (dataset, *plan.targets):
                plan.suite.folder(name)  # prepared here, before two processes could
        except (FVGError, OSError) as error:
            outcome.failed |= {unit.name: str(error) for unit in jobs.pop(dataset)}
            say(f"{dataset}: {len(units)} units failed: {error}")
    for names, failed in _finished(plan, load, jobs, processes):
        outcome.done += names
        outcome.failed |= failed
        for name in names:
            say(f"{name}: done")
        for name, why in failed.items():
            say(f"{name}: failed: {why}")
        summarise(plan)
    summarise(plan)
    return outcome


def summarise(plan: Plan) -> None:
    """Writes the tidy file and the tables from the units that are there."""
    figures = plan.figures()
    write_tidy(plan.output / RESULTS, figures)
    write_tables(plan.output / TABLES, plan, figures)


Finished = tuple[list[str], dict[str, str]]


def _finished(plan: Plan, load: Load, jobs: Mapping[str, list[Unit]], processes: int) -> Any:
    """(units done, {unit that failed: why}) of each data set as it ends."""
    if processes <= 1 or len(jobs) <= 1:
        for units in jobs.values():
            yield run_units(plan, load, units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
        futures: dict[Future[Finished], list[Unit]] = {
            pool.submit(run_units, plan, load, units): units for units in jobs.values()
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                left = [unit for unit in futures[future] if not plan.file(unit).exists()]
                done = [unit.name for unit in futures[future] if plan.file(unit).exists()]
                yield done, {unit.name: "its process was killed (out of memory?)" for unit in left}


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_units(plan: Plan, load: Load, units: Sequence[Unit]) -> Finished:
    """Runs units of one data set, one after another; one encoding of the test pictures serves tuners of the text."""
    done: list[str] = []
    failed: dict[str, str] = {}
    groups: dict[tuple[str, int], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.tuner, unit.shots), []).append(unit)
    model: tuple[Any, Any] | None = None
    for name in plan.imports:
        tuner_named(name)
    for group in groups.values():
        try:
            model = model or load()
            _run_seeds(plan, model, group, done)
        except (FVGError, OSError) as error:
            failed |= {unit.name: str(error) for unit in group if unit.name not in done}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"unexpected {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            failed |= {unit.name: why for unit in group if unit.name not in done}
    return done, failed


def _run_seeds(plan: Plan, model: tuple[Any, Any], units: Sequence[Unit], done: list[str]) -> None:
    """The seeds of one tuner and number of shots; writes each unit as it is done."""
    first, by_seed = units[0], {unit.seed: unit for unit in units}
    recipe = plan.recipe(first)
    source, opened = _places(plan, [first.dataset, *plan.targets])

    def after_seed(seed: int, results: Results) -> None:
        unit = by_seed[seed]
        settings = {"pictures": results.settings.get("pictures", {}).get(str(seed)), "torch": torch.__version__}
        write_json(plan.file(unit), unit_record(plan, unit, results.last(), settings))
        done.append(unit.name)

    arguments = {name: value for name, value in recipe.arguments.items() if name != "template"}
    options: dict[str, Any] = {
        "tuner": first.tuner,
        "tuner_options": arguments,
        "template": recipe.arguments["template"],
        "tune": recipe.tune,
        "heads": recipe.fvg,
        "shots": first.shots,
        "seeds": list(by_seed),
        "views": plan.views,
        "config": plan.config,
        "precision": plan.precision,
        "foreground": plan.foreground,
        "dataset": dataset_of(plan, first.dataset),
        "bank": _bank(plan, first),
        "after_seed": after_seed,
        "cost": True,
        **plan.rows(first.tuner),
    }
    if plan.protocol == "cross-dataset":
        targets = {name: opened[name] for name in plan.targets}
        cross_dataset(*model, source, targets, templates=plan.templates(), **options)
    else:
        function = few_shot if plan.protocol == "few-shot" else base_to_new
        function(*model, source, also_test=tuple(plan.suite.also_test), **options)


def _places(plan: Plan, names: Sequence[str]) -> tuple[str | Files, dict[str, str | Files]]:
    """Where the data sets lie: folders, or one listing of the release for all of them."""
    folders = {name: plan.suite.folder(name) for name in names}
    release = open_release() if HUB in folders.values() else None
    opened: dict[str, str | Files] = {}
    for name, folder in folders.items():
        opened[name] = release if folder == HUB and release is not None else folder
    return opened[names[0]], opened


def _bank(plan: Plan, unit: Unit) -> Any:
    """The folder of a data set's features; the protocols that cut it otherwise have others.

    Only for tuners that leave images alone: what the others make of an image is one unit's own.
    """
    if not plan.banks or not plan.views or unit.tuner not in TEXT_ONLY:
        return None
    kind = "halves" if plan.protocol in ("base-to-new", "ablation") else plan.protocol
    return plan.output / "banks" / kind / unit.dataset
