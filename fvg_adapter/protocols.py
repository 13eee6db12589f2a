"""The paper's protocols as functions: tune, add FVG-PT, score CLIP, the tuner and FVG-PT beside the controls.

METHOD.md sections 6 to 8 and 10. A gain over the tuner alone proves nothing about the foreground, because the adapters
gain too; so every run scores the controls: the whole image as foreground (x_fg = x), no distillation (λ_d = 0), and
other images' masks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fvg_adapter.config import FVGConfig
from fvg_adapter.data import paper_set
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import ForegroundSource
from fvg_adapter.pictures import Drawing, Source, Split, base_to_new_split, whole_split
from fvg_adapter.results import Results
from fvg_adapter.runs import ABLATION, CONTROLS, Done, Say, over_seeds, settings_of, start_run, train_heads
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE
from fvg_adapter.tuners.recipes import Stage

__all__ = [
    "ABLATION",
    "CONTROLS",
    "Results",
    "Split",
    "base_to_new",
    "base_to_new_split",
    "cross_dataset",
    "few_shot",
    "train_heads",
]


def base_to_new(
    clip: nn.Module,
    tokenizer: Any,
    data: Source,
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
    foreground: str | ForegroundSource = "given",
    template: str = DEFAULT_TEMPLATE,
    config: FVGConfig | None = None,
    tune: Stage | None = None,
    heads: Stage | None = None,
    precision: str = "no",
    output: str | os.PathLike[str] | None = None,
    bank: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: str | None = None,
    cost: bool = False,
    after_seed: Done | None = None,
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
        foreground: where masks come from in training when the data set has none: "given" (nowhere), "attention",
            "whole", or a callable such as a `Segmenter`. In a data set that has masks, a picture without one trains
            with r = 0.
        template: the prior's hand-written prompt. config: FVG-PT's hyperparameters.
        tune, heads: recipes of the two stages; the published ones of this tuner by default.
        precision: "no", "bf16" or "fp16" autocast in training.
        output: a folder for results.json, the first seed's adapter and a picture.
        bank: a folder that keeps the FeatureBanks; what is there and fits is not encoded again.
        progress: called with a line of text now and then.
        variants: further rows, {"lambda_d=1": {"lambda_distill": 1.0}}: the same heads with other fields of the config.
        dataset: which data set of the paper it is, as in "oxford_pets"; by the folder's name if it is not given.
        cost: time inference too, into `Results.cost`; the cost of training is there in any case.
        after_seed: called with each seed and the results so far.

    Raises:
        FVGError: `bank` without views, or with a bank that does not fit; an unknown tuner, one without a recipe, data
            that cannot be split; nothing is written then.
    """
    run = start_run(
        clip,
        tokenizer,
        tuner,
        seeds,
        tuner_options=tuner_options,
        shots=shots,
        views=views,
        controls=controls,
        ablation=ablation,
        variants=variants,
        foreground=foreground,
        template=template,
        config=config,
        tune=tune,
        heads=heads,
        precision=precision,
        bank=bank,
        progress=progress,
        cost=cost,
    )

    def pictures(drawing: Drawing) -> Split:
        given = {field.name: getattr(drawing, field.name) for field in dataclasses.fields(drawing)}
        return base_to_new_split(data, test_splits=(test_split, *also_test), **{**given, "dataset": dataset})

    return over_seeds(run, settings_of(run, data, shots, seeds, test_split), pictures, output, after_seed)


def few_shot(
    clip: nn.Module,
    tokenizer: Any,
    data: Source,
    *,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    test_split: str = "test",
    also_test: Sequence[str] = (),
    dataset: str | None = None,
    output: str | os.PathLike[str] | None = None,
    after_seed: Done | None = None,
    tuner: str = "coop",
    **options: Any,
) -> Results:
    """Tunes on all classes and scores all of them by the base branch: CoOp's few-shot protocol.

    The rows and controls are those of `base_to_new`, the metrics those of `fvg_adapter.evaluation.score`. The other
    arguments (tuner_options, views, controls, foreground, template, config, tune, heads, precision, bank, progress,
    cost, variants) are those of `base_to_new`.

    Raises:
        FVGError: what `base_to_new` raises.
    """
    run = start_run(clip, tokenizer, tuner, seeds, shots=shots, **options)

    def pictures(drawing: Drawing) -> Split:
        return whole_split(data, dataclasses.replace(drawing, dataset=dataset), (test_split, *also_test))

    return over_seeds(run, settings_of(run, data, shots, seeds, test_split), pictures, output, after_seed)


def cross_dataset(
    clip: nn.Module,
    tokenizer: Any,
    data: Source,
    targets: Mapping[str, Source],
    *,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    test_split: str = "test",
    dataset: str | None = None,
    templates: Mapping[str, str] | None = None,
    output: str | os.PathLike[str] | None = None,
    after_seed: Done | None = None,
    tuner: str = "coop",
    **options: Any,
) -> Results:
    """Tunes on all classes of one data set and scores others by the new branch throughout (METHOD.md section 10).

    `Results.rows` has the source's own test pictures (base branch), `Results.also` a target each (new branch, whatever
    class names it shares with the source). Rows, controls and the other arguments are those of `base_to_new`.

    Args:
        data: the source. targets: the others, by name; a name of the paper's sets says how a folder is laid out.
        templates: the prior's hand-written prompt for each target; the source's where none is given.

    Raises:
        FVGError: no targets, and what `base_to_new` raises.
    """
    if not targets:
        raise FVGError("cross_dataset needs at least one target, such as {'dtd': 'data/dtd'}.")
    run = start_run(clip, tokenizer, tuner, seeds, shots=shots, **options)

    def pictures(drawing: Drawing) -> Split:
        whole = whole_split(data, dataclasses.replace(drawing, dataset=dataset), (test_split,))
        known = {name: name if paper_set(name) is not None else None for name in targets}
        others = {
            name: (drawing.test(place, "test", known[name]).drop_unreadable(),) for name, place in targets.items()
        }
        return dataclasses.replace(
            whole, tests={**whole.tests, **others}, branches=dict.fromkeys(others, "new"), templates=templates or {}
        )

    return over_seeds(run, settings_of(run, data, shots, seeds, test_split), pictures, output, after_seed)
