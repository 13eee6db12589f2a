"""Suites: which data sets a protocol runs on, and how each tuner is run there; the paper's own, or one from a file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvg_adapter.data import ELEVEN, VARIANTS, paper_set
from fvg_adapter.data.layout import split_names
from fvg_adapter.data.paper_sets import HUB_REPO
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.untrusted import read_json

HUB = "hub"
"""What stands for the authors' release in place of a folder."""


@dataclass(frozen=True)
class Setting:
    """How a tuner is run in a suite, where it is not as published.

    Attributes:
        name: as people write it. said: the settings in words.
        options: keyword arguments of the tuner. tune, heads: fields of its recipes.
        tasks: where it runs; everywhere when empty. ablation: the ablation's rows too, in base-to-new.
        gain: what FVG-PT adds to its HM in the paper, None where the paper has no figure.
    """

    name: str
    said: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    ablation: bool = False
    gain: float | None = None


@dataclass(frozen=True)
class Suite:
    """Data sets and settings.

    Attributes:
        name: of the suite. data: {data set: its folder, or "hub"}, in the order of the tables.
        settings: by `Tuner.kind`; a tuner without one runs as published.
        also_test: {further test split: what it is}, scored beside "test".
        crop: share of the picture that training crops keep, in both stages; the recipes' own when None.
        model: the base model, where the suite brings one. prepare: "package.module:function" that is called with a data
            set's name before it is read, and returns its folder.
        variants: data sets that are only scored, by folder, as targets of cross-dataset.
    """

    name: str
    data: Mapping[str, str]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    also_test: Mapping[str, str] = field(default_factory=dict)
    crop: tuple[float, float] | None = None
    model: str | None = None
    prepare: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict)

    def title(self, tuner: str) -> str:
        """A tuner as people write it."""
        names = {"coop": "CoOp", "kgcoop": "KgCoOp", "promptsrc": "PromptSRC", "mmrl": "MMRL", "lora": "LoRA"}
        return self.settings[tuner].name if tuner in self.settings else names.get(tuner, tuner)

    def folder(self, task: str) -> str:
        """Where a data set lies, prepared if the suite prepares it.

        Raises:
            FVGError: no such data set, or what prepares it cannot be imported.
        """
        everything = {**self.data, **self.variants}
        if task not in everything:
            raise FVGError(f"the suite {self.name!r} has no data set {task!r}. {nearest(task, everything)}")
        if self.prepare is None:
            return everything[task]
        return str(_function(self.prepare)(task))


def paper_suite(root: str | os.PathLike[str]) -> Suite:
    """The paper's eleven data sets and ImageNet's variants below a folder, or on the Hub (root "hub").

    Raises:
        FVGError: no such folder, or one data set of a user's own (train/<class>/…).
    """
    place = os.fspath(root)
    if place not in (HUB, HUB_REPO):
        if not Path(place).expanduser().is_dir():
            raise FVGError(f"--data {place!r} is no folder. Give the one that holds the data sets, or {HUB!r}.")
        place = str(Path(place).expanduser().absolute())
        if "train" in split_names(Path(place)):  # else each of the eleven would be read from the same pictures
            raise FVGError(
                f"--data {os.fspath(root)!r} is one data set, with its classes in train/. Give the folder that holds "
                "the paper's data sets, or name data sets of your own in a --suite FILE."
            )
    return Suite("paper", dict.fromkeys(ELEVEN, place), variants=dict.fromkeys(VARIANTS, place))


def read_suite(file: str | os.PathLike[str]) -> Suite:
    """A suite from a JSON file with the fields of `Suite`; relative folders are relative to the file.

    Raises:
        FVGError: unreadable, unknown fields, or no data sets.
    """
    path = Path(file)
    try:
        record = read_json(path, "a suite")
        settings = {kind: Setting(**fields) for kind, fields in record.pop("settings", {}).items()}
        suite = Suite(**{**record, "settings": settings})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FVGError(f"the suite {os.fspath(file)!r} cannot be read: {error}") from error
    if not suite.data:
        raise FVGError(f"the suite {os.fspath(file)!r} names no data sets.")
    here = path.parent

    def absolute(place: str | None) -> Any:
        return str((here / place).absolute()) if place is not None and (here / place).exists() else place

    return Suite(
        **{
            **suite.__dict__,
            "data": {name: absolute(place) for name, place in suite.data.items()},
            "variants": {name: absolute(place) for name, place in suite.variants.items()},
            "model": absolute(suite.model),
            "crop": None if suite.crop is None else (float(suite.crop[0]), float(suite.crop[1])),
        }
    )


def chosen(suite: Suite, names: Sequence[str] | None) -> list[str]:
    """Data sets of a suite by name or by a folder's name of the paper's; all that are tuned on without names.

    Raises:
        FVGError: one that the suite does not have.
    """
    if names is None:
        return list(suite.data)
    known = {**suite.data, **suite.variants}
    found = []
    for name in names:
        paper = paper_set(name)
        wanted = name if name in known or paper is None else paper.name
        if wanted not in known:
            raise FVGError(f"the suite {suite.name!r} has no data set {name!r}. {nearest(name, known)}")
        found.append(wanted)
    return list(dict.fromkeys(found))


def _function(name: str) -> Callable[[str], Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[str], Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FVGError(f"what prepares the suite, {name!r}, could not be imported: {error}.") from error
    return found
