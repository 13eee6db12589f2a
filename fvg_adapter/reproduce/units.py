"""What is run: a unit is one protocol, data set, tuner, number of shots and seed, with a file of its own.

A unit's file is whole or not there, so a run that was killed goes on with the units that are missing. What is there is
not run again; a unit that was run otherwise (another model, recipe, config) is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvg_adapter.config import FVGConfig
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.foreground import resolve_source
from fvg_adapter.reproduce.suites import Setting, Suite
from fvg_adapter.reproduce.tidy import FORMAT, Figure, check_format, figures_of
from fvg_adapter.tuners.recipes import Recipe, Stage, recipe_on
from fvg_adapter.tuners.templates import dataset_name, template_for
from fvg_adapter.untrusted import read_json

PROTOCOLS = ("base-to-new", "cross-dataset", "few-shot", "ablation")

SWEEPS: Mapping[str, Mapping[str, Any]] = {
    "lambda_d=1": {"lambda_distill": 1.0},
    "lambda_d=50": {"lambda_distill": 50.0},
    "width=16": {"bottleneck": 16},
    "width=32": {"bottleneck": 32},
    "width=128": {"bottleneck": 128},
}
"""The paper's further settings of λ_d and of the adapters' width, as rows of the ablation."""


@dataclass(frozen=True)
class Unit:
    """One seed of one tuner on one data set."""

    protocol: str
    dataset: str
    tuner: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Its file below OUTPUT/units, without the ending."""
        return f"{self.protocol}/{self.dataset}/{self.tuner}-{self.shots}shots-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Everything that a run of a protocol does.

    Attributes:
        protocol: one of PROTOCOLS. suite: where the data sets lie and how tuners are run there.
        datasets, tuners, shots, seeds: every combination is a unit. targets: of cross-dataset.
        views: in a FeatureBank; 0 trains in the loop. controls: score them too.
        config: FVG-PT's. precision: autocast. foreground: where masks come from where there are none.
        model: what messages and files call the base model. output: the folder.
        banks: keep encoded features in OUTPUT/banks. imports: tuners of one's own, "package.module:Class", which every
            process must know.
    """

    protocol: str
    suite: Suite
    datasets: Sequence[str]
    tuners: Sequence[str]
    model: str
    output: Path
    seeds: Sequence[int] = (1, 2, 3)
    shots: Sequence[int] = (16,)
    targets: Sequence[str] = ()
    views: int = 4
    controls: bool = True
    config: FVGConfig = field(default_factory=FVGConfig)
    precision: str = "no"
    foreground: str = "given"
    banks: bool = True
    imports: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise FVGError(f"the protocol {self.protocol!r} is unknown. {nearest(self.protocol, PROTOCOLS)}")
        for name in ("datasets", "tuners", "seeds", "shots"):
            given = list(getattr(self, name))
            if not given or len(set(given)) < len(given):
                raise FVGError(f"{name} must be at least one, each once, but is {given}.")
        resolve_source(self.foreground)
        if self.protocol == "cross-dataset" and not self.targets:
            raise FVGError("cross-dataset needs at least one target beside the source.")

    def units(self) -> list[Unit]:
        """All units, data set by data set."""
        return [
            Unit(self.protocol, dataset, tuner, shots, seed)
            for dataset in self.datasets
            for tuner in self.tuners
            if self.runs(dataset, tuner)
            for shots in self.shots
            for seed in self.seeds
        ]

    def runs(self, dataset: str, tuner: str) -> bool:
        """Whether a tuner runs on a data set of the suite."""
        tasks = self.setting(tuner).tasks
        return not tasks or dataset in tasks

    def setting(self, tuner: str) -> Setting:
        """How the suite runs a tuner."""
        return self.suite.settings.get(tuner) or Setting(self.suite.title(tuner))

    def recipe(self, unit: Unit) -> Recipe:
        """The published recipe on the data set, with the suite's changes."""
        recipe, setting = recipe_on(unit.tuner, unit.dataset), self.setting(unit.tuner)
        crop = {} if self.suite.crop is None else {"crop_scale": self.suite.crop}
        tune = recipe.tune and dataclasses.replace(recipe.tune, **{**setting.tune, **crop})
        heads = dataclasses.replace(recipe.fvg, **{**setting.heads, **crop})
        arguments = {**recipe.arguments, **setting.options}
        return dataclasses.replace(recipe, tune=tune, fvg=heads, arguments=arguments)

    def rows(self, tuner: str) -> dict[str, Any]:
        """Which rows are scored beside CLIP, the tuner and FVG-PT."""
        whole = self.protocol == "ablation"
        halves = self.protocol in ("base-to-new", "ablation")
        return {
            "controls": self.controls,
            "ablation": halves and (whole or self.setting(tuner).ablation),
            "variants": dict(SWEEPS) if whole else {},
        }

    def templates(self) -> dict[str, str]:
        """The prior's prompt for each target that is a data set of the paper."""
        recipe = recipe_on("coop", "")
        default = recipe.arguments["template"]
        return {target: template_for(target, default=default) for target in self.targets}

    def identity(self, unit: Unit) -> dict[str, Any]:
        """What decides the unit's figures, as JSON has it."""
        recipe = self.recipe(unit)
        record = {
            "model": self.model,
            "suite": self.suite.name,
            "options": recipe.arguments,
            "tune": _stage(recipe.tune),
            "heads": _stage(recipe.fvg),
            "views": self.views,
            "config": self.config.to_dict(),
            "precision": self.precision,
            "foreground": self.foreground,
            "also_test": list(self.suite.also_test) if self.protocol != "cross-dataset" else [],
            "targets": list(self.targets) if self.protocol == "cross-dataset" else [],
            **self.rows(unit.tuner),
        }
        found: dict[str, Any] = json.loads(json.dumps(record))
        return found

    def file(self, unit: Unit) -> Path:
        """Where a unit's figures are."""
        return self.output / "units" / f"{unit.name}.json"

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has been run as this plan runs it.

        Raises:
            FVGError: its file is of another format, damaged, or of a unit that was run otherwise.
        """
        file = self.file(unit)
        if not file.exists():
            return False
        record = read_unit(file)
        wanted = self.identity(unit)
        there, wanted = _flat(record["identity"]), _flat(wanted)
        other = [name for name, value in wanted.items() if there.get(name) != value]
        if other:
            first, more = other[0], f" ({', '.join(other[1:])} differ too)" if other[1:] else ""
            raise FVGError(
                f"{file} was run with {first} {there.get(first)!r}, but {wanted[first]!r} is wanted{more}."
                " Give another --output, or delete the file to run it again."
            )
        return True

    def figures(self) -> list[Figure]:
        """The figures of all units that are there."""
        found: list[Figure] = []
        for unit in self.units():
            if self.file(unit).exists():
                found += figures_of(read_unit(self.file(unit)))
        return found


def read_unit(file: Path) -> dict[str, Any]:
    """The record of a unit.

    Raises:
        FVGError: of another format, or damaged.
    """
    try:
        record = read_json(file, "a unit")
        given = record["format"]
    except (FVGError, KeyError) as error:
        raise FVGError(f"{file} is no unit of results ({error}); delete it to run that unit again.") from error
    check_format(given, str(file))
    missing = [name for name in ("unit", "identity", "rows", "cost", "targets") if name not in record]
    if missing:
        raise FVGError(f"{file} is no unit of results (it lacks {missing}); delete it to run that unit again.")
    return record


def unit_record(plan: Plan, unit: Unit, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a unit's file holds."""
    identity = plan.identity(unit)
    return {
        "format": FORMAT,
        "unit": dataclasses.asdict(unit),
        "identity": identity,
        "targets": identity["targets"],
        "settings": dict(settings),
        **figures,
    }


def dataset_of(plan: Plan, dataset: str) -> str | None:
    """The paper's name of a data set, for its layout; None where the suite's data sets are not the paper's."""
    return dataset_name(dataset) if plan.suite.name == "paper" else None


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """With the config's fields by name, the preset before those that it sets."""
    config = identity.get("config")
    fields = {f"config.{name}": value for name, value in config.items()} if isinstance(config, dict) else {}
    preset = {name: value for name, value in fields.items() if name == "config.preset"}
    return {**preset, **{name: value for name, value in identity.items() if name != "config"}, **fields}


def _stage(stage: Stage | None) -> dict[str, Any] | None:
    """A recipe without where its numbers come from."""
    if stage is None:
        return None
    return {name: value for name, value in dataclasses.asdict(stage).items() if name != "source"}
