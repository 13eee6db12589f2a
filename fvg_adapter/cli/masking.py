"""`fvg-adapter masks`: foreground masks of a whole folder of pictures, once and for all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Debug,
    Device,
    Threads,
    check_folder,
    load_base,
    mistakes_told,
    normalisation,
    prepare,
    say,
    show,
    show_json,
)
from fvg_adapter.errors import FVGError, closest

if TYPE_CHECKING:
    from fvg_adapter.mask_files import MaskSummary
    from fvg_adapter.mask_makers import Maker

_ATTENTION, _SEGMENTER, _RUN = "Source: attention", "Source: a segmenter", "Running"


@mistakes_told
def write_mask_files(
    data: Annotated[str, typer.Argument(help="Folder with <split>/<class>/<pictures>.")],
    source: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="attention, a segmenter's id or folder (DETECTOR+SAM for two), or package.module:callable.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The mirrored tree.", show_default="DATA/mask")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Splits, separated by commas; '.' if class folders lie in DATA.", show_default="all"),
    ] = None,
    format: Annotated[str, typer.Option(help="png (exact), or jpg (the authors').")] = "png",
    model: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR", help="The CLIP that looks.", rich_help_panel=_ATTENTION, show_default=False),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Its layers, separated by commas; -1 is the last.", rich_help_panel=_ATTENTION)
    ] = "-1",
    attention_threshold: Annotated[
        float, typer.Option(help="Foreground from this multiple of the mean weight on.", rich_help_panel=_ATTENTION)
    ] = 1.0,
    prompt: Annotated[
        str, typer.Option(help="Made of the class name, with one {}.", rich_help_panel=_SEGMENTER)
    ] = "{}",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Foreground labels, separated by commas.",
            rich_help_panel=_SEGMENTER,
            show_default="all but surroundings",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Foreground from this probability on.", rich_help_panel=_SEGMENTER)
    ] = 0.5,
    score: Annotated[
        float | None,
        typer.Option(help="From which an object counts.", rich_help_panel=_SEGMENTER, show_default="the family's"),
    ] = None,
    size: Annotated[
        int, typer.Option(min=1, help="Pixels a side that a callable gets.", rich_help_panel=_SEGMENTER)
    ] = 224,
    largest: Annotated[bool, typer.Option(help="Keep the largest connected part alone.")] = False,
    fill_holes: Annotated[
        bool | None, typer.Option(help="Fill what the foreground encloses.", show_default="for segmenters")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The contact sheet.", rich_help_panel=_RUN, show_default="DIR_contact_sheet.png"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.", rich_help_panel=_RUN)] = 16,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a foreground mask for every picture, where training, evaluation and audit find it.

    DATA/train/cat/a.jpg gets DIR/train/cat/a.png: white where the object
    is. A run that was killed goes on where it was; "accelerate launch -m
    fvg_adapter.cli masks …" shares the work between processes, with the same
    files. Look at the contact sheet before you train.

    Examples:

    \b
    # ask a segmenter with the class names
    fvg-adapter masks pets --source CIDAS/clipseg-rd64-refined
    # boxes of a detector, masks of a SAM
    fvg-adapter masks pets \\
        --source IDEA-Research/grounding-dino-tiny+facebook/sam2.1-hiera-tiny
    # the attention of the CLIP itself, second layer from the end
    fvg-adapter masks pets --source attention --layers -2 \\
        --model openai/clip-vit-base-patch16
    """
    from fvg_adapter.launched import Processes

    check_folder(output)
    shared = Processes.launched()
    place = prepare(device, threads)
    from fvg_adapter.data import MaskedImageFolder
    from fvg_adapter.mask_files import write_masks
    from fvg_adapter.mask_sheet import contact_sheet

    root = Path(data).expanduser()
    names = _splits(root, split)
    datasets = [MaskedImageFolder(root, name, masks="none") for name in names]
    sys.path.insert(0, str(Path.cwd()))  # where a callable of one's own lies
    make, settings = _maker(
        source, place, model=model, layers=layers, attention_threshold=attention_threshold, prompt=prompt,
        labels=labels, threshold=threshold, score=score, size=size, largest=largest, fill_holes=fill_holes, batch=batch,
    )  # fmt: skip
    target = root / "mask" if output is None else output
    with _bar(shared.rank == 0) as tick:
        summary = write_masks(
            datasets, target, make, settings, format=format, batch_size=batch, processes=shared, progress=tick
        )
    if shared.rank == 0:
        page = Path(f"{target}_contact_sheet.png") if sheet is None else sheet
        opened = [MaskedImageFolder(root, name, masks="optional", mask_root=target) for name in names]
        contact_sheet(opened, summary.areas, page)
        _report(summary, {"source": source, "data": data, "output": str(target), "sheet": str(page)}, as_json)
    shared.wait()
    shared.leave()


def _splits(root: Path, given: str | None) -> list[str | None]:
    """The splits to do: those named, else all, else none where class folders lie in the root."""
    from fvg_adapter.data.layout import split_folder, split_names

    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        if not names:
            raise FVGError(f"--split {given!r} names no split; give them like train,test.")
        return [None if name == "." else name for name in names]
    split_folder(root, None)  # says what is wrong with the folder itself
    return [*split_names(root)] or [None]


def _maker(source: str, place: str, **given: Any) -> tuple[Maker, dict[str, Any]]:
    """What makes the masks, and what is recorded of it."""
    from fvg_adapter.foreground import source_name
    from fvg_adapter.mask_makers import attention_masks, source_masks
    from fvg_adapter.segmenters import Segmenter, clean, source_named

    largest, fill = given["largest"], given["fill_holes"]
    if source in ("given", "whole"):
        raise FVGError(f"--source {source!r} makes no masks; give attention, a segmenter, or package.module:callable.")
    if source == "attention":
        from fvg_adapter.attention import record_attention
        from fvg_adapter.config import FVGConfig
        from fvg_adapter.towers import DualEncoder

        if given["model"] is None:
            raise FVGError("--source attention needs --model: the CLIP that looks at the pictures.")
        config = FVGConfig(
            attention_layers=_layers(given["layers"]),
            attention_threshold=given["attention_threshold"],
            **normalisation(given["model"]),
        )
        config.validate()
        clip, _ = load_base(given["model"], place)
        with record_attention(clip, config.attention_layers):
            pass  # a layer that does not exist is told before anything is written
        make = attention_masks(clip, config, DualEncoder(clip).image_size)
        settings = {"source": source, "model": given["model"], "layers": list(config.attention_layers)}
        settings |= {"attention_threshold": config.attention_threshold}
    else:
        if given["model"] is not None:
            near = closest(source, ["attention"])
            raise FVGError(
                f"--source is {source!r}. {near}--model is the CLIP of --source attention; else leave it out."
            )
        options: dict[str, Any] = {name: given[name] for name in ("prompt", "threshold", "score")}
        options |= {"labels": _labels(given["labels"]), "batch_size": given["batch"]}
        named = source_named(source, device=place, **options, largest=largest, fill_holes=fill is not False)
        if isinstance(named, Segmenter):
            return source_masks(named, given["size"]), {"source": source, "identity": named.identity}
        make, settings = source_masks(named, given["size"], place), {"source": source, "size": given["size"]}
        settings["identity"] = source_name(named)
    if not largest and not fill:
        return make, settings
    clean_too = {"largest": largest, "fill_holes": bool(fill)}
    return (
        lambda pictures, classes: [clean(mask, **clean_too) for mask in make(pictures, classes)],
        {**settings, **clean_too},
    )


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FVGError(f"--layers {text!r} is no list of whole numbers; give them like -2,-1.") from None


def _labels(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


@contextlib.contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr with pictures a second; none where nobody looks."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} images/s")

    columns = ("masks", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("masks", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _report(summary: MaskSummary, record: dict[str, Any], as_json: bool) -> None:
    from collections import Counter

    from fvg_adapter.data.watch import odd_masks

    if summary.unreadable:
        say(f"warning: {len(summary.unreadable)} pictures cannot be read and have no mask: {summary.unreadable[:5]}")
    masks = summary.pictures - len(summary.unreadable)
    for message in odd_masks(Counter(inverted=summary.inverted), masks, "of all"):
        say(f"warning: {message}")
    if as_json:
        show_json({**record, **summary.to_json()})
        return
    show(
        f"{masks} masks in {record['output']}: {summary.written} written, {summary.kept} were there\n"
        f"usable {summary.usable}, empty {summary.empty}, tiny {summary.tiny}, full {summary.full}; "
        f"mean area {100 * summary.mean_area:.1f} %"
    )
    if summary.written:
        show(f"{summary.images_per_second:.1f} images/s")
    show(f"look at {record['sheet']}")
