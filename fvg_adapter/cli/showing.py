"""`fvg-adapter show`: where plain CLIP, the tuner and FVG-PT look in pictures, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Base,
    Debug,
    Device,
    Threads,
    check_folder,
    class_names,
    load_adapter,
    load_base,
    mistakes_told,
    normal_of,
    prepare,
    refuse_folders,
    show,
    show_json,
)
from fvg_adapter.errors import FVGError


@mistakes_told
def show_pictures(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter, or of a plain CLIP (--plain).")],
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The drawing: .png, .jpg or .webp.")] = Path(
        "before_after.png"
    ),
    mask: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A picture's mask, white where the object is; once a picture, in order."),
    ] = None,
    attention_mask: Annotated[
        bool, typer.Option("--attention-mask", help="Masks from the model's own attention instead.")
    ] = False,
    maps: Annotated[str, typer.Option("--map", help="relevance, attention or rollout.")] = "relevance",
    layers: Annotated[str, typer.Option(help='Vision layers of the maps: "-1", "-3,-2" or "all".')] = "-1",
    classes: Annotated[
        str | None,
        typer.Option(help="Names separated by commas, or @FILE with one a line.", show_default="the adapter's own"),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A picture's true class, once a picture: answers become green or red.")
    ] = None,
    model: Base = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="ADAPTER is a CLIP without any adapter; needs --classes.")
    ] = False,
    template: Annotated[str, typer.Option(help="Hand-written prompt for --plain.")] = "a photo of a {}.",
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw where CLIP, the tuner and FVG-PT look in pictures, and what they answer.

    A row a picture: its mask outlined, then a map and the answer of each
    model. With masks: the share of each map that lies inside, and the trust
    r; b comes without. The heads leave the tuner's attention as it is, so
    that relevance alone tells FVG-PT from its tuner.

    Examples:

    \b
    fvg-adapter show out/adapter cat.jpg dog.jpg --output before_after.png
    fvg-adapter show out/adapter cat.jpg --mask mask/cat.jpg --label cat
    fvg-adapter show openai/clip-vit-base-patch16 cat.jpg --plain \\
        --classes "cat,dog" --map rollout
    """
    names = None if classes is None else class_names(classes)
    if plain and names is None:
        raise FVGError('a plain CLIP has no classes of its own: give --classes "cat,dog" or --classes @FILE.')
    check_folder(output.absolute().parent)
    refuse_folders([*images, *(mask or [])])
    place = prepare(device, threads)
    from fvg_adapter.data.images import read_mask, read_picture
    from fvg_adapter.panels import check_labels, draw, look

    pictures = [read_picture(path, str(path)) for path in images]
    for given, option in ((mask, "--mask"), (label, "--label")):
        if given and len(given) != len(images):
            raise FVGError(f"{len(given)} {option} were given for {len(images)} pictures; give one for each, in order.")
    masks: Any = "attention" if attention_mask else None
    if mask:
        masks = [read_mask(path, str(path), picture) for path, picture in zip(mask, pictures, strict=True)]
    loaded = _plain(adapter, names, template, place) if plain else load_adapter(adapter, model, place)
    normal = normal_of(loaded)
    check_labels(label or [], names or loaded.classes)
    found = look(
        loaded,
        [p.image for p in pictures],
        masks,
        classes=names,
        maps=maps,
        layers=_layers(layers),
        normal=normal,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    titles = [f"{path.name}: {name}" for path, name in zip(images, label, strict=True)] if label else None
    drawing = draw(found, maps, normal, labels=label or None, titles=titles or [path.name for path in images])
    try:
        drawing.save(output)
    except ValueError as error:
        raise FVGError(f"{output}: {error}; give a file that ends in .png, .jpg or .webp.") from error
    rows = [_row(path, panel) for path, panel in zip(images, found, strict=True)]
    if as_json:
        show_json({"picture": str(output), "map": maps, "images": rows})
        return
    for row in rows:
        answers = "; ".join(f"{v['name']}: {v['answer']} {100 * v['probability']:.0f} %" for v in row["views"])
        gates = ", ".join(f"{k} = {row[k]:.2f}" for k in ("r", "b") if row[k] is not None)
        show(f"{row['image']}: {answers}" + (f"; {gates}" if gates else ""))
    show(str(output))


def _row(path: Path, panel: Any) -> dict[str, Any]:
    views = [
        {"name": v.name, "answer": v.answer, "probability": v.probability, "inside_mask": v.inside} for v in panel.views
    ]
    gates = {"r": panel.foreground_trust, "b": panel.prior_trust}
    return {"image": str(path), "views": views, **gates, "mask_area": panel.area}


def _layers(text: str) -> Any:
    if text == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise FVGError(f'--layers is {text!r}; give numbers such as "-1" or "-3,-2", or "all".') from None


def _plain(name: str, classes: Any, template: str, place: str) -> Any:
    from fvg_adapter.tuners import ZeroShot

    clip, tokenizer = load_base(name, place)
    return ZeroShot(clip, tokenizer, classes, template=template)
