"""One run of a protocol: a tuner and FVG-PT behind it over some seeds, with every control, from banks or in the loop.

What `fvg_adapter.protocols` puts together. Imports data, tuners, features, train and evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvg_adapter import costs
from fvg_adapter.config import FVGConfig
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.data.files import HubFiles
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.evaluation import evaluate, score
from fvg_adapter.features import FeatureBank
from fvg_adapter.foreground import ForegroundSource, source_name
from fvg_adapter.hub import update_card
from fvg_adapter.model import FVGModel
from fvg_adapter.pictures import Drawing, Source, Split
from fvg_adapter.results import Results, write_json
from fvg_adapter.towers import DualEncoder
from fvg_adapter.train import FitResult, fit
from fvg_adapter.tuners import Tuner, ZeroShot
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.tuners.recipes import Stage, recipe_for
from fvg_adapter.tuners.registry import tuner_to_train
from fvg_adapter.wrapping import wrap

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
Done = Callable[[int, Results], None]
Tests = dict[str, tuple[FeatureBank, ...]]

CONTROLS = ("x_fg=x", "lambda_d=0", "shuffled masks")
"""Rows beside `tuner+fvg`: the same heads without the foreground, without distillation, with other images' masks."""

ABLATION = {
    "FDC only": ("one", ("base", "base")),
    "FRG+FDC": ("gate", ("base", "base")),
    "PC only": ("gate", ("tuner", "new")),
    "FDC+PC": ("one", ("base", "new")),
}
"""The paper's ablation: the trust r that the heads were trained with, and what scores base and new classes."""


def start_run(
    clip: nn.Module,
    tokenizer: Any,
    tuner: str,
    seeds: Sequence[int],
    *,
    tuner_options: dict[str, Any] | None = None,
    shots: int = 16,
    views: int = 4,
    controls: bool = True,
    ablation: bool = False,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    foreground: str | ForegroundSource = "given",
    template: str = DEFAULT_TEMPLATE,
    config: FVGConfig | None = None,
    tune: Stage | None = None,
    heads: Stage | None = None,
    precision: str = "no",
    bank: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
    cost: bool = False,
) -> Run:
    """What stays the same over the seeds; see `base_to_new`."""
    kind = tuner_to_train(tuner)
    _check_options(kind, tuner_options or {})
    recipe = recipe_for(kind.kind)
    if not seeds:
        raise FVGError("seeds is empty; give at least one, such as seeds=(1, 2, 3).")
    if bank is not None and not views:
        raise FVGError("a bank needs views: give views=4, or leave bank out to encode in the loop.")
    return Run(
        clip=clip,
        tokenizer=tokenizer,
        tuner=kind,
        options={**recipe.arguments, "template": template, **(tuner_options or {})},
        config=config or FVGConfig(),
        tune=tune or recipe.tune,
        heads=heads or recipe.fvg,
        views=views,
        foreground=foreground,
        controls=controls,
        ablation=ablation,
        precision=precision,
        bank=None if bank is None else Path(bank),
        say=_logged(progress),
        shots=shots,
        seeds=tuple(seeds),
        variants=variants or {},
        cost=cost,
    )


def _check_options(tuner: type[Tuner], options: Mapping[str, Any]) -> None:
    """Raises FVGError where a tuner has no such option; the message gives the nearest."""
    known = inspect.signature(tuner).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for name in sorted(set(options) - set(known)):
            raise FVGError(f"a {tuner.kind!r} tuner has no option {name!r}. {nearest(name, list(known)[3:])}")


def over_seeds(
    run: Run,
    settings: dict[str, Any],
    pictures: Callable[[Drawing], Split],
    output: str | os.PathLike[str] | None,
    after_seed: Done | None,
) -> Results:
    """Every seed in turn; results.json is whole after each, so that a later failure loses none."""
    start = time.monotonic()
    results = Results(settings=settings)
    folder = None if output is None else Path(output)
    for number, seed in enumerate(run.seeds):
        run.say(f"seed {seed}: reading pictures")
        split = pictures(run.drawing(seed))
        if (digest := getattr(split.train, "digest", None)) is not None:
            settings.setdefault("pictures", {})[str(seed)] = digest
        _one_seed(run, split, seed, results, folder if number == 0 else None)
        results.seconds = time.monotonic() - start
        if folder is not None:
            write_json(folder / "results.json", results.to_json())
            new = None if number else results.picture
            update_card(folder / "adapter", results=results.so_far(number + 1), picture=new)
        if after_seed is not None:
            after_seed(seed, results)
    return results


@dataclass
class Run:
    """What stays the same over the seeds of one run."""

    clip: nn.Module
    tokenizer: Any
    tuner: type[Tuner]
    options: dict[str, Any]
    config: FVGConfig
    tune: Stage | None
    heads: Stage
    views: int
    foreground: str | ForegroundSource
    controls: bool
    ablation: bool
    precision: str
    bank: Path | None
    say: Say
    shots: int
    seeds: tuple[int, ...]
    variants: Mapping[str, Mapping[str, Any]]
    cost: bool
    test_banks: Tests = field(default_factory=dict)
    fitted: FitResult | None = None  # of the heads trained last
    last: tuple[Any, FeatureBank] | None = None  # the pictures encoded last, and their bank

    def drawing(self, seed: int) -> Drawing:
        """What is drawn for a seed."""
        return Drawing(
            shots=self.shots,
            seed=seed,
            size=DualEncoder(self.clip).image_size,
            mean=self.config.image_mean,
            std=self.config.image_std,
            crop_scale=self.heads.crop_scale,
            tune_crop_scale=None if self.tune is None else self.tune.crop_scale,
        )

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
            return FeatureBank.encode(wrapped, pictures, measure=True, output=self.folder(f"{prefix}{name}"))

        halves = {1: ("",), 2: ("-base", "-new")}
        wrapped = FVGModel(model, dataclasses.replace(self.config), foreground="given")
        try:
            return {
                name: tuple(encoded(p, f"{name}{half}") for p, half in zip(parts, halves[len(parts)], strict=True))
                for name, parts in split.tests.items()
            }
        finally:
            wrapped.release()

    def folder(self, name: str) -> Path | None:
        """Where a bank is kept, if it is."""
        return None if self.bank is None else self.bank / name


def _score(
    results: Results,
    row: str,
    model: FVGModel | Tuner,
    tests: Tests,
    split: Split,
    branches: tuple[str, str] = ("base", "new"),
) -> None:
    """One row for every test split; the first is the main one, and has the worst class of any of them too."""
    figures = {}
    for name, sets in tests.items():
        with _template(model, split.templates.get(name)):
            if len(sets) == 2:
                figures[name] = evaluate(model, *sets, branches=branches)
            else:
                branch = branches[("base", "new").index(split.branches.get(name, "base"))]
                figures[name] = score(model, sets[0], branch=branch)
    same = [found["worst_class"] for name, found in figures.items() if name not in split.branches]
    for number, (name, found) in enumerate(figures.items()):
        groups = {"worst_group": min(same)} if number == 0 and len(same) > 1 else {}
        results.add(row, {**found, **groups}, name if number else None)


@contextlib.contextmanager
def _template(model: FVGModel | Tuner, template: str | None) -> Iterator[None]:
    """The prior asks with another hand-written prompt inside the block."""
    tuner = model.tuner if isinstance(model, FVGModel) else model
    found = tuner.template
    tuner.template = found if template is None else template
    try:
        yield
    finally:
        tuner.template = found


def _one_seed(run: Run, split: Split, seed: int, results: Results, folder: Path | None) -> None:
    plain = ZeroShot(run.clip, run.tokenizer, split.base_classes, template=run.options["template"])
    try:
        _score(results, "clip", plain, run.banks(plain, split, seed), split)
        _time_inference(run, plain, "clip", split, results)
    finally:
        plain.detach()

    torch.manual_seed(seed)
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
            costs.reset_memory()
            fitted = fit(tuner, shown, recipe=run.tune, seed=seed, precision=run.precision)
            results.add_cost(kind, costs.of_training(tuner, fitted, run.tune.epochs * len(shown)))
        tests = run.banks(tuner, split, seed)
        if run.tune is not None:
            _score(results, kind, tuner, tests, split)
            _time_inference(run, tuner, kind, split, results)

        data = _train_bank(run, tuner, split.train, seed, "train") if run.views else split.train
        costs.reset_memory()
        model = train_heads(run, tuner, data, seed, run.config, run.foreground)
        assert run.fitted is not None
        results.add_cost(f"{kind}+fvg", costs.of_training(model, run.fitted, run.heads.epochs * len(data)))
        _score(results, f"{kind}+fvg", model, tests, split)
        _time_inference(run, model, f"{kind}+fvg", split, results)
        if folder is not None:
            _keep(run, model, split, results, folder)
        if run.ablation:
            _ablation(run, tuner, model, data, seed, results, tests, split)
        model.release()
        for name, changes in run.variants.items():
            model = train_heads(run, tuner, data, seed, dataclasses.replace(run.config, **changes), run.foreground)
            _score(results, f"{kind}+fvg [{name}]", model, tests, split)
            model.release()
        if run.controls:
            _controls(run, tuner, split, data, seed, results, tests)
    finally:
        tuner.detach()


def _controls(
    run: Run,
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
        _score(results, f"{tuner.kind}+fvg [{name}]", model, tests, split)
        model.release()


def _ablation(
    run: Run,
    tuner: Tuner,
    gated: FVGModel,
    data: Any,
    seed: int,
    results: Results,
    tests: Tests,
    split: Split,
) -> None:
    """FDC and PC never touch each other, so one training with the gate and one without serve all four rows."""
    ungated = train_heads(run, tuner, data, seed, dataclasses.replace(run.config, trust="one"), run.foreground)
    models = {"gate": gated, "one": ungated}
    for name, (trust, branches) in ABLATION.items():
        _score(results, f"{tuner.kind}+fvg [{name}]", models[trust], tests, split, branches)
    ungated.release()


def train_heads(
    run: Run, tuner: Tuner, data: Any, seed: int, config: FVGConfig, foreground: str | ForegroundSource
) -> FVGModel:
    """FVG-PT's heads on a tuned, frozen tuner; one seed gives every configuration the same start and batches."""
    torch.manual_seed(seed)
    model = wrap(tuner, config=dataclasses.replace(config), foreground=foreground)
    run.say(f"seed {seed}: training the heads")
    run.fitted = fit(model, data, recipe=run.heads, seed=seed, precision=run.precision)
    return model


def _time_inference(run: Run, model: FVGModel | Tuner, row: str, split: Split, results: Results) -> None:
    if run.cost:
        results.add_cost(row, costs.of_inference(model, next(iter(split.tests.values()))[0]))


def _train_bank(run: Run, tuner: Tuner, pictures: Any, seed: int, name: str) -> FeatureBank:
    """K augmented views of the training pictures, with their foreground; encoded once for both stages."""
    if run.last is not None and pictures is run.last[0] and not tuner.changes_images:
        return run.last[1]
    run.say(f"seed {seed}: encoding {run.views} views of {len(pictures)} pictures")
    model = FVGModel(tuner, dataclasses.replace(run.config), foreground=run.foreground)
    try:
        kind = f"{tuner.kind}-" if tuner.changes_images else ""
        output = run.folder(f"{kind}{name}-{run.shots}shots-seed{seed}")
        run.last = pictures, FeatureBank.encode(model, pictures, views=run.views, seed=seed, output=output)
        return run.last[1]
    finally:
        model.release()


def _keep(run: Run, model: FVGModel, split: Split, results: Results, folder: Path) -> None:
    """The first seed's adapter and picture."""
    model.eval()
    results.adapter = str(model.save_pretrained(folder / "adapter"))
    try:
        from fvg_adapter.visualize import before_after
    except ImportError:
        run.say("no picture: pip install 'fvg-adapter[viz]'")
        return
    base, *new = next(iter(split.tests.values()))
    results.picture = str(before_after(model, base, folder / "picture.png", new_set=new[0] if new else None))


def settings_of(run: Run, data: Source, shots: int, seeds: Sequence[int], test_split: str) -> dict[str, Any]:
    """What was run, for `Results.settings`."""
    return {
        "data": data.repo if isinstance(data, HubFiles) else getattr(data, "name", str(data)),
        "from_hub": not Path(data).expanduser().exists()
        if isinstance(data, (str, os.PathLike))
        else isinstance(data, HubFiles),
        "tuner": run.tuner.kind,
        "tuner_options": run.options,
        "shots": shots,
        "seeds": list(seeds),
        "views": run.views,
        "test_split": test_split,
        "foreground": source_name(run.foreground),
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
