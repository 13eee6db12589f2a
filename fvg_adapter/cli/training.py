"""`fvg-adapter train`: tune prompts, add FVG-PT, and score both beside plain CLIP and the controls."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Debug,
    Device,
    Threads,
    check_folder,
    json_object,
    load_base,
    mistakes_told,
    normalisation,
    prepare,
    read_json,
    say_progress,
    show,
    show_json,
)
from fvg_adapter.cli.results import remarks_on, table_of, title_of
from fvg_adapter.errors import FVGError, nearest

if TYPE_CHECKING:
    from fvg_adapter.config import FVGConfig
    from fvg_adapter.tuners.recipes import Stage

_PROMPTS, _HEADS, _RUN = "Stage one: prompts", "Stage two: FVG-PT's heads", "Running"
_PUBLISHED = "the published one"


@mistakes_told
def train_and_compare(
    data: Annotated[str, typer.Argument(help="Folder with train/, a test split and mask/; or a Hub data set.")],
    model: Annotated[str, typer.Option(metavar="ID_OR_DIR", help="The base CLIP: a Hub id or a folder.")],
    tuner: Annotated[
        str,
        typer.Option(
            help="What is tuned first: coop, kgcoop, promptsrc, mmrl, lora, zero_shot, or package.module:Class."
        ),
    ] = "coop",
    shots: Annotated[int, typer.Option(min=1, help="Training pictures a class.")] = 16,
    seeds: Annotated[str, typer.Option(help="One run each, separated by commas.")] = "1,2,3",
    views: Annotated[
        int, typer.Option(min=0, help="Augmented views that are encoded once; 0 encodes in the loop, anew each time.")
    ] = 4,
    test_split: Annotated[str, typer.Option(help="The pictures to score.")] = "test",
    foreground: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Masks where the data has none: given (none), attention, whole (x_fg = x), a segmenter's id or folder "
            "(DETECTOR+SAM for two), or package.module:callable.",
        ),
    ] = "given",
    template: Annotated[
        str | None,
        typer.Option(help="Hand-written prompt of plain CLIP, with one {}.", show_default="by the data set's name"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Its name in the literature: eurosat, dtd, …", show_default="the last part of DATA"),
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Also train without the foreground, with x_fg = x, and shuffled masks.")
    ] = True,
    tune_lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=_PROMPTS, show_default=_PUBLISHED)
    ] = None,
    tune_epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs.", rich_help_panel=_PROMPTS, show_default=_PUBLISHED)
    ] = None,
    tune_batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size.", rich_help_panel=_PROMPTS, show_default=_PUBLISHED)
    ] = None,
    tuner_options: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Arguments of the tuner: '{\"n_ctx\": 8}'.", rich_help_panel=_PROMPTS),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=_HEADS, show_default=_PUBLISHED)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs.", rich_help_panel=_HEADS, show_default=_PUBLISHED)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size.", rich_help_panel=_HEADS, show_default=_PUBLISHED)
    ] = None,
    lambda_distill: Annotated[
        float | None, typer.Option(help="Weight of the distillation.", rich_help_panel=_HEADS, show_default="10")
    ] = None,
    lambda_gate: Annotated[
        float | None, typer.Option(help="Weight of the reliability gate.", rich_help_panel=_HEADS, show_default="1")
    ] = None,
    lambda_new: Annotated[
        float | None, typer.Option(help="Weight of the new branch.", rich_help_panel=_HEADS, show_default="1")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper, or plus: other values of FVGConfig, with an attended view at inference (docs/plus.md).",
            rich_help_panel=_HEADS,
            show_default="paper",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file with fields of FVGConfig.", rich_help_panel=_HEADS)
    ] = None,
    min_crop: Annotated[
        float | None,
        typer.Option(
            help="Share of a training picture that a random crop keeps at least, in both stages.",
            rich_help_panel=_RUN,
            show_default=_PUBLISHED,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for results.json, the adapter and a picture.", rich_help_panel=_RUN),
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that keeps encoded features; the next run starts from them.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16 autocast.", rich_help_panel=_RUN)] = "no",
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune prompts on half of the classes, add FVG-PT, and score base and new classes beside plain CLIP.

    The first half of the classes (in label order) is tuned on, the second
    half is only ever scored: the base-to-new protocol of CoOp. HM is the
    harmonic mean of both accuracies; "joint HM" asks for all classes at once.
    The controls show what a gain owes to the foreground. With --output, the
    adapter of the first seed is kept. A data set of the paper (by its folder's
    name, or --dataset) brings its own hand-written prompt and epochs, and may
    lie as CoOp or the authors' release have it (split_zhou_OxfordPets.json).

    \b
    DATA/train/<class>/a.jpg         16 of these a class are drawn
    DATA/test/<class>/b.jpg          these are scored
    DATA/mask/train/<class>/a.jpg    white where the object is
    DATA/classes.txt                 optional: class names, one a line

    Examples:

    \b
    # what the paper does, on a folder of your own
    fvg-adapter train pets --model openai/clip-vit-base-patch16 --output out
    # another tuner, one seed, fresh augmentation in every epoch
    fvg-adapter train pets --model openai/clip-vit-base-patch16 \\
        --tuner kgcoop --seeds 1 --views 0
    # no masks at hand: take the model's own attention
    fvg-adapter train pets --model openai/clip-vit-base-patch16 \\
        --foreground attention --json > results.json
    # or a segmenter that is asked with the class names
    fvg-adapter train pets --model openai/clip-vit-base-patch16 \\
        --foreground CIDAS/clipseg-rd64-refined
    """
    numbers = seed_numbers(seeds)
    arguments = json_object(tuner_options)
    weights = {"lambda_distill": lambda_distill, "lambda_gate": lambda_gate, "lambda_new": lambda_new}
    check_folder(output)
    place = prepare(device, threads)
    from fvg_adapter.protocols import base_to_new
    from fvg_adapter.segmenters import source_named
    from fvg_adapter.train import PRECISIONS
    from fvg_adapter.tuners.arguments import check_arguments
    from fvg_adapter.tuners.recipes import recipe_on
    from fvg_adapter.tuners.registry import tuner_to_train
    from fvg_adapter.tuners.templates import dataset_name

    if precision not in PRECISIONS:
        raise FVGError(f"--precision {precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    sys.path.insert(0, str(Path.cwd()))  # where a tuner or a source of one's own lies
    source = source_named(foreground, device=place)
    made = tuner_to_train(tuner)
    kind = made.kind
    check_arguments(made, arguments, "--tuner-options", "an option")
    recipe = recipe_on(kind, dataset or Path(data).name)
    if template is None:
        template = recipe.arguments["template"]
    elif "teacher_template" in recipe.arguments:  # KgCoOp's teacher is the hand-written prompt too
        arguments = {"teacher_template": template, **arguments}
    tune = _override(
        recipe.tune, f"tuning a {kind!r}", "--tune-", lr=tune_lr, epochs=tune_epochs, batch_size=tune_batch
    )
    heads = _override(recipe.fvg, "the heads", "--", lr=lr, epochs=epochs, batch_size=batch)
    if min_crop is not None:
        if not 0 < min_crop <= 1:
            raise FVGError(f"--min-crop must lie above 0 and not above 1, but is {min_crop}.")
        tune, heads = _cropped(tune, min_crop), _cropped(heads, min_crop)
    settings = fvg_config(config, weights, model, preset)
    tell = say_progress()
    if tell is not None:
        tell(f"tuner {kind}, prompt {template!r}, data set {dataset_name(dataset or Path(data).name)}")
    clip, tokenizer = load_base(model, place)
    results = base_to_new(
        clip,
        tokenizer,
        data,
        dataset=dataset,
        tuner=kind,
        tuner_options={**recipe.arguments, "template": template, **arguments},
        shots=shots,
        seeds=numbers,
        views=views,
        test_split=test_split,
        controls=controls,
        foreground=source,
        config=settings,
        tune=tune,
        heads=heads,
        precision=precision,
        output=output,
        bank=bank,
        progress=tell,
    )
    if as_json:
        show_json(results.to_json())
    else:
        show(title_of(data, numbers))
        show(table_of(results))
        show("\n".join(remarks_on(results, kind, output)))


# -- options -----------------------------------------------------------------------------------------------------------


def seed_numbers(text: str, option: str = "--seeds", least: int = 0) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        FVGError: no numbers, one below `least`, or one given twice.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise FVGError(f"{option} {text!r} is no list of whole numbers; give them like 1,2,3.") from None
    if max(numbers) >= 2**32:
        raise FVGError(f"{option} {text!r}: whole numbers from {least} to {2**32 - 1} are expected.")
    if min(numbers) < least or len(set(numbers)) < len(numbers):
        what = option.removeprefix("--").removesuffix("s")
        raise FVGError(f"{option} {text!r}: every {what} must be {least} or more, and differ from the others.")
    return numbers


def _override(stage: Stage | None, what: str, prefix: str, **given: float | None) -> Stage | None:
    """A recipe with the numbers that were given."""
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if not 0 < value < math.inf:
            raise FVGError(f"{prefix}{name.removesuffix('_size')} must be a finite number above 0, but is {value}.")
    if not changes:
        return stage
    if stage is None:
        raise FVGError(f"{what} learns nothing in stage one; leave {prefix}lr, {prefix}epochs and {prefix}batch out.")
    stage = dataclasses.replace(stage, **changes)  # type: ignore[arg-type]
    if "lr" in changes and stage.epochs <= stage.warmup_epochs:
        epochs = "the only epoch is" if stage.epochs == 1 else f"all {stage.epochs} epochs are"
        warnings.warn(
            f"{prefix}lr {stage.lr} is never used: {epochs} the warm-up, at {stage.warmup_lr}; give more "
            f"{prefix}epochs.",
            stacklevel=2,
        )
    return stage


def _cropped(stage: Stage | None, smallest: float) -> Stage | None:
    return stage and dataclasses.replace(stage, crop_scale=(smallest, 1.0))


def fvg_config(path: Path | None, weights: dict[str, float | None], model: str, preset: str | None = None) -> FVGConfig:
    """FVGConfig from the preset, the file, the options (which win), and the model's own normalisation."""
    from fvg_adapter.config import FVGConfig

    fields = {} if path is None else read_json(path, "--config")
    known = [field.name for field in dataclasses.fields(FVGConfig)]
    for name in fields:
        if name not in known:
            raise FVGError(f"--config {path} has the unknown field {name!r}. {nearest(name, known)}")
    given: dict[str, Any] = {name: value for name, value in weights.items() if value is not None}
    if preset is not None:
        given["preset"] = preset
    try:
        return FVGConfig(**{**normalisation(model), **fields, **given})
    except TypeError as error:
        raise FVGError(f"the configuration does not fit: {error}") from error
