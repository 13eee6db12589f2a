"""The paper's base-to-new protocol as a function: tune, add FVG-PT, score CLIP, the tuner and FVG-PT beside the
controls.

METHOD.md sections 6 to 8. A gain over the tuner alone proves nothing about the foreground, because the adapters gain
too; so every run scores the controls: the whole image as foreground (x_fg = x), no distillation (λ_d = 0), and
other images' masks. Imports data, tuners, features, train and evaluation.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvg_adapter.config import FVGConfig
from fvg_adapter.data import PairedTransform, base_new_split, few_shot_indices, open_dataset, select_classes
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.evaluation import evaluate
from fvg_adapter.features import FeatureBank
from fvg_adapter.model import FVGModel
from fvg_adapter.towers import DualEncoder
from fvg_adapter.train import fit
from fvg_adapter.tuners import Tuner, ZeroShot, tuner_named
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.tuners.recipes import Stage, recipe_for
from fvg_adapter.wrapping import wrap

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
Rows = dict[str, dict[str, list[float]]]
Tests = dict[str, tuple[FeatureBank, FeatureBank]]

CONTROLS = ("x_fg=x", "lambda_d=0", "shuffled masks")
"""Rows beside `tuner+fvg`: the same heads without the foreground, without distillation, with other images' masks."""

ABLATION = {
    "FDC only": ("one", ("base", "base")),
    "FRG+FDC": ("gate", ("base", "base")),
    "PC only": ("gate", ("tuner", "new")),
    "FDC+PC": ("one", ("base", "new")),
}
"""The paper's ablation: the trust r that the heads were trained with, and what scores base and new classes."""


@dataclass
class Results:
    """One row a model, one list a metric, one value a seed.

    Attributes:
        rows: {"clip": {"base": [41.9, …], "new": …, "hm": …, "joint_hm": …, …}, "coop": …, "coop+fvg": …, controls}.
        settings: what was run: data, shots, seeds, recipes, FVGConfig, versions.
        seconds: wall time of the run.
        also: rows of further test splits, by name.
        adapter: folder of the first seed's saved model, where an output folder was given. picture: file, likewise.
    """

    rows: Rows = field(default_factory=dict)
    also: dict[str, Rows] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    adapter: str | None = None
    picture: str | None = None

    def add(self, row: str, figures: dict[str, float], split: str | None = None) -> None:
        """Appends one seed's figures to a row, of the main test split or of another."""
        rows = self.rows if split is None else self.also.setdefault(split, {})
        into = rows.setdefault(row, {})
        for metric, value in figures.items():
            into.setdefault(metric, []).append(round(value, 4))

    def mean(self, row: str, metric: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.rows[row][metric])

    def spread(self, row: str, metric: str) -> float:
        """Standard deviation over seeds (n − 1), 0 for one seed."""
        values = self.rows[row][metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def difference(self, row: str, other: str, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of the paired difference row − other."""
        pairs = zip(self.rows[row][metric], self.rows[other][metric], strict=True)
        values = [a - b for a, b in pairs]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Rows at the top level, what was run under "settings", other test splits under "also"; NaN becomes None."""
        also = {"also": {name: _jsonable(rows) for name, rows in self.also.items()}} if self.also else {}
        return {**_jsonable(self.rows), **also, "settings": {**self.settings, "seconds": round(self.seconds, 1)}}


def _jsonable(rows: Rows) -> dict[str, dict[str, list[float | None]]]:
    return {
        row: {metric: [None if v != v else v for v in values] for metric, values in metrics.items()}
        for row, metrics in rows.items()
    }


@dataclass(frozen=True)
class Split:
    """One seed's pictures.

    Attributes:
        train: the few-shot pictures of the base classes, as the heads see them.
        tests: (base, new) test sets by the name of the test split.
        tune: the same pictures as the tuner sees them: cropped otherwise, where its recipe says so.
    """

    train: Any
    tests: dict[str, tuple[Any, Any]]
    tune: Any

    @property
    def base_classes(self) -> list[str]:
        """The classes tuned on."""
        return list(self.train.classes)


def base_to_new_split(
    data: str | os.PathLike[str],
    *,
    shots: int,
    seed: int,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: tuple[float, float] = (0.08, 1.0),
    tune_crop_scale: tuple[float, float] | None = None,
    test_splits: Sequence[str] = ("test",),
    masks: str = "optional",
) -> Split:
    """The pictures of one seed: draw over all classes first, then cut into base and new (METHOD section 10).

    Raises:
        FVGError: splits with different class lists, or fewer than two classes.
    """
    augmented = PairedTransform(size, mean, std, train=True, scale=crop_scale)
    plain = PairedTransform(size, mean, std, train=False)
    pool = open_dataset(data, "train", masks=masks, transform=augmented)
    classes = list(pool.classes)
    base, new = base_new_split(classes)
    if not new:
        raise FVGError(
            f"{data} has {len(classes)} class; base-to-new needs at least two, one half to tune on, one to transfer to."
        )
    tests = {}
    for name in test_splits:
        test = open_dataset(data, name, masks=masks, transform=plain)
        if list(test.classes) != classes:
            raise FVGError(f"the splits 'train' and {name!r} of {data} differ in classes; give both a classes.txt.")
        tests[name] = (_only(test, base).drop_unreadable(), _only(test, new).drop_unreadable())
    shown = few_shot_indices(pool.labels, shots, seed=seed)[0]
    train = tune = _only(pool.subset(shown), base).drop_unreadable()
    if tune_crop_scale not in (None, crop_scale):
        cropped = dataclasses.replace(augmented, scale=tune_crop_scale)
        tune = _only(open_dataset(data, "train", masks=masks, transform=cropped).subset(shown), base).drop_unreadable()
    return Split(train, tests, tune)


def _only(dataset: Any, wanted: Sequence[int]) -> Any:
    indices, labels = select_classes(dataset.labels, wanted)
    return dataset.subset(indices, labels, [dataset.classes[i] for i in wanted])


def base_to_new(
    clip: nn.Module,
    tokenizer: Any,
    data: str | os.PathLike[str],
    *,
    tuner: str = "coop",
    tuner_options: dict[str, Any] | None = None,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    views: int = 4,
    test_split: str = "test",
    also_test: Sequence[str] = (),
    controls: bool = True,
    ablation: bool = False,
    foreground: str = "given",
    template: str = DEFAULT_TEMPLATE,
    config: FVGConfig | None = None,
    tune: Stage | None = None,
    heads: Stage | None = None,
    precision: str = "no",
    output: str | os.PathLike[str] | None = None,
    bank: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> Results:
    """Tunes prompts, adds FVG-PT, scores everything on base, new and joint classes, for several seeds.

    Args:
        clip, tokenizer: the base model; given back as it was found.
        data: a folder (train/, a test split, mask/) or a Hub data set with image, label and mask.
        tuner: kind of the tuner, or "package.module:Class" for one of your own.
        tuner_options: keyword arguments beside the recipe's.
        shots: pictures a class. seeds: one run each.
        views: augmented views in a FeatureBank; 0 trains in the loop, with a new augmentation every time.
        test_split: which pictures to score. also_test: further splits, into `Results.also`.
        controls: score the controls too.
        ablation: score the rows of `ABLATION` too.
        foreground: where masks come from in training when the data set has none: "given" (nowhere) or "attention". In a
            data set that has masks, a picture without one trains with r = 0.
        template: the prior's hand-written prompt. config: FVG-PT's hyperparameters.
        tune, heads: recipes of the two stages; the published ones of this tuner by default.
        precision: "no", "bf16" or "fp16" autocast in training.
        output: a folder for results.json, the first seed's adapter and a picture.
        bank: a folder that keeps the FeatureBanks; what is there and fits is not encoded again.
        progress: called with a line of text now and then.

    Raises:
        FVGError: `bank` without views, or with a bank that does not fit; an unknown tuner, one without a recipe, data
            that cannot be split; nothing is written then.
    """
    kind = tuner_named(tuner)
    recipe = recipe_for(kind.kind)
    if not seeds:
        raise FVGError("seeds is empty; give at least one, such as seeds=(1, 2, 3).")
    if bank is not None and not views:
        raise FVGError("a bank needs views: give views=4, or leave bank out to encode in the loop.")
    config = config or FVGConfig()
    run = _Run(
        clip=clip,
        tokenizer=tokenizer,
        tuner=kind,
        options={**recipe.arguments, "template": template, **(tuner_options or {})},
        config=config,
        tune=tune or recipe.tune,
        heads=heads or recipe.fvg,
        views=views,
        foreground=foreground,
        controls=controls,
        ablation=ablation,
        precision=precision,
        bank=None if bank is None else Path(bank),
        say=_logged(progress),
    )
    start = time.monotonic()
    encoder = DualEncoder(clip)
    results = Results(settings=_settings(run, data, shots, seeds, test_split, kind.kind))
    folder = None if output is None else Path(output)
    for number, seed in enumerate(seeds):
        run.say(f"seed {seed}: reading pictures")
        split = base_to_new_split(
            data,
            shots=shots,
            seed=seed,
            size=encoder.image_size,
            mean=config.image_mean,
            std=config.image_std,
            crop_scale=run.heads.crop_scale,
            tune_crop_scale=None if run.tune is None else run.tune.crop_scale,
            test_splits=(test_split, *also_test),
        )
        keep = folder if number == 0 else None
        _one_seed(run, split, seed, results, keep)
        results.seconds = time.monotonic() - start
        if folder is not None:
            _write(results, folder)
    return results


def _write(results: Results, folder: Path) -> None:
    """results.json, whole; after every seed, so that a later failure loses none."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".results.json"
    temporary.write_text(json.dumps(results.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(folder / "results.json")


@dataclass
class _Run:
    """What stays the same over the seeds of one run."""

    clip: nn.Module
    tokenizer: Any
    tuner: type[Tuner]
    options: dict[str, Any]
    config: FVGConfig
    tune: Stage | None
    heads: Stage
    views: int
    foreground: str
    controls: bool
    ablation: bool
    precision: str
    bank: Path | None
    say: Say
    test_banks: Tests = field(default_factory=dict)
    last: tuple[Any, FeatureBank] | None = None  # the pictures encoded last, and their bank

    def banks(self, model: Tuner, split: Split, seed: int) -> Tests:
        """Test banks by split; plain CLIP's serve every tuner that leaves the images alone, for all seeds."""
        if model.changes_images:
            return self._measured(model, split, f"{model.kind}-seed{seed}-")
        if not self.test_banks:
            self.say("encoding test pictures")
            self.test_banks = self._measured(model, split, "")
        return self.test_banks

    def _measured(self, model: Tuner, split: Split, prefix: str) -> Tests:
        def encoded(pictures: Any, name: str) -> FeatureBank:
            return FeatureBank.encode(model, pictures, measure=True, output=self.folder(f"{prefix}{name}"))

        return {
            name: (encoded(base, f"{name}-base"), encoded(new, f"{name}-new"))
            for name, (base, new) in split.tests.items()
        }

    def folder(self, name: str) -> Path | None:
        """Where a bank is kept, if it is."""
        return None if self.bank is None else self.bank / name


def _score(
    results: Results, row: str, model: FVGModel | Tuner, tests: Tests, branches: tuple[str, str] = ("base", "new")
) -> None:
    """One row for every test split; the first is the main one."""
    for number, (name, sets) in enumerate(tests.items()):
        results.add(row, evaluate(model, *sets, branches=branches), name if number else None)


def _one_seed(run: _Run, split: Split, seed: int, results: Results, folder: Path | None) -> None:
    plain = ZeroShot(run.clip, run.tokenizer, split.base_classes, template=run.options["template"])
    try:
        _score(results, "clip", plain, run.banks(plain, split, seed))
    finally:
        plain.detach()

    torch.manual_seed(seed)
    known = inspect.signature(run.tuner).parameters
    if "template" in known and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for name in set(run.options) - set(known):
            raise FVGError(f"a {run.tuner.kind!r} tuner has no option {name!r}. {nearest(name, list(known)[3:])}")
    try:
        tuner = run.tuner(run.clip, run.tokenizer, split.base_classes, **run.options)
    except TypeError as error:
        raise FVGError(
            f"a {run.tuner.kind!r} tuner cannot be made with the options {run.options}: {error}. Tuners with other "
            "arguments (functions, say) are made and trained from Python."
        ) from error
    kind = tuner.kind
    try:
        if run.tune is not None:
            run.say(f"seed {seed}: tuning {kind}")
            stored = run.views and not tuner.changes_images
            shown = _train_bank(run, tuner, split.tune, seed, "tune") if stored else split.tune
            fit(tuner, shown, recipe=run.tune, seed=seed, precision=run.precision)
        tests = run.banks(tuner, split, seed)
        if run.tune is not None:
            _score(results, kind, tuner, tests)

        data = _train_bank(run, tuner, split.train, seed, "train") if run.views else split.train
        model = train_heads(run, tuner, data, seed, run.config, run.foreground)
        _score(results, f"{kind}+fvg", model, tests)
        if folder is not None:
            _keep(run, model, split, results, folder)
        if run.ablation:
            _ablation(run, tuner, model, data, seed, results, tests)
        model.release()
        if run.controls:
            _controls(run, tuner, split, data, seed, results, tests)
    finally:
        tuner.detach()


def _controls(
    run: _Run,
    tuner: Tuner,
    split: Split,
    data: Any,
    seed: int,
    results: Results,
    tests: Tests,
) -> None:
    no_distillation = dataclasses.replace(run.config, lambda_distill=0.0)
    settings = [("x_fg=x", data, run.config, "whole"), ("lambda_d=0", data, no_distillation, run.foreground)]
    if "foreground_mask" in split.train[0]:
        others = OtherMasks(split.train, seed)
        shuffled = _train_bank(run, tuner, others, seed, "shuffled") if isinstance(data, FeatureBank) else others
        settings.append(("shuffled masks", shuffled, run.config, "given"))
    for name, source, config, foreground in settings:
        model = train_heads(run, tuner, source, seed, config, foreground)
        _score(results, f"{tuner.kind}+fvg [{name}]", model, tests)
        model.release()


def _ablation(
    run: _Run,
    tuner: Tuner,
    gated: FVGModel,
    data: Any,
    seed: int,
    results: Results,
    tests: Tests,
) -> None:
    """FDC and PC never touch each other, so one training with the gate and one without serve all four rows."""
    ungated = train_heads(run, tuner, data, seed, dataclasses.replace(run.config, trust="one"), run.foreground)
    models = {"gate": gated, "one": ungated}
    for name, (trust, branches) in ABLATION.items():
        _score(results, f"{tuner.kind}+fvg [{name}]", models[trust], tests, branches)
    ungated.release()


def train_heads(run: _Run, tuner: Tuner, data: Any, seed: int, config: FVGConfig, foreground: str) -> FVGModel:
    """FVG-PT's heads on a tuned, frozen tuner; one seed gives every configuration the same start and batches."""
    torch.manual_seed(seed)
    model = wrap(tuner, config=dataclasses.replace(config), foreground=foreground)
    run.say(f"seed {seed}: training the heads")
    fit(model, data, recipe=run.heads, seed=seed, precision=run.precision)
    return model


def _train_bank(run: _Run, tuner: Tuner, pictures: Any, seed: int, name: str) -> FeatureBank:
    """K augmented views of the training pictures, with their foreground; encoded once for both stages."""
    if run.last is not None and pictures is run.last[0] and not tuner.changes_images:
        return run.last[1]
    run.say(f"seed {seed}: encoding {run.views} views of {len(pictures)} pictures")
    model = FVGModel(tuner, dataclasses.replace(run.config), foreground=run.foreground)
    try:
        kind = f"{tuner.kind}-" if tuner.changes_images else ""
        output = run.folder(f"{kind}{name}-seed{seed}")
        run.last = pictures, FeatureBank.encode(model, pictures, views=run.views, seed=seed, output=output)
        return run.last[1]
    finally:
        model.release()


def _keep(run: _Run, model: FVGModel, split: Split, results: Results, folder: Path) -> None:
    """The first seed's adapter and picture."""
    model.eval()
    results.adapter = str(model.save_pretrained(folder / "adapter"))
    try:
        from fvg_adapter.visualize import before_after
    except ImportError:
        run.say("no picture: pip install 'fvg-adapter[viz]'")
        return
    base, new = next(iter(split.tests.values()))
    results.picture = str(before_after(model, base, folder / "picture.png", new_set=new))


def _settings(
    run: _Run, data: str | os.PathLike[str], shots: int, seeds: Sequence[int], test_split: str, tuner: str
) -> dict[str, Any]:
    return {
        "data": str(data),
        "tuner": tuner,
        "tuner_options": run.options,
        "shots": shots,
        "seeds": list(seeds),
        "views": run.views,
        "test_split": test_split,
        "foreground": run.foreground,
        "tune": run.tune and dataclasses.asdict(run.tune),
        "heads": dataclasses.asdict(run.heads),
        "config": run.config.to_dict(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _logged(progress: Say | None) -> Say:
    """A line of progress goes to the log, and to who asked for it."""

    def say(line: str) -> None:
        _log.info(line)
        if progress is not None:
            progress(line)

    return say
