"""`fvg-adapter predict`: name what is in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvg_adapter.cli.console import (
    MISTAKEN,
    AsJson,
    Base,
    Debug,
    Device,
    Threads,
    class_names,
    load_adapter,
    mistakes_told,
    normal_of,
    picture_files,
    prepare,
    printable,
    say,
    show,
    show_json,
)

if TYPE_CHECKING:
    from rich.table import Table


AT_ONCE = 32


@mistakes_told
def predict_images(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    classes: Annotated[
        str | None,
        typer.Option(help="Names separated by commas, or @FILE with one a line.", show_default="the adapter's own"),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many names for each picture.")] = 3,
    model: Base = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Name what is in pictures, among any classes, most probable first.

    No mask is needed. Classes that the adapter was tuned on are scored by its
    base branch, others by its new branch, a mixture by both. A folder stands
    for every picture below it. Pictures that cannot be read are named on
    stderr, the others are scored, and the exit code is 2.

    Examples:

    \b
    fvg-adapter predict out/adapter cat.jpg dog.jpg
    # any classes at all, from the Hub, around a base model of your choice
    fvg-adapter predict me/pets-fvg *.jpg --classes "tabby cat,beagle" \\
        --model openai/clip-vit-base-patch16
    fvg-adapter predict me/pets-fvg a.jpg --classes @names.txt --json
    """
    from fvg_adapter.progress import counting

    names = None if classes is None else class_names(classes)
    images = picture_files(images)
    place = prepare(device, threads)
    loaded = load_adapter(adapter, model, place)
    if names is not None:
        loaded.set_classes(names)
    rows = []
    with counting(None, "predicting", len(images)) as tell:
        for start in range(0, len(images), AT_ONCE):
            rows += _predicted(loaded, images[start : start + AT_ONCE], top_k)
            tell(len(rows))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        say(f"warning: {row['error']}")
    if as_json:
        show_json(rows)
    elif len(failed) < len(rows):
        show(_table([row for row in rows if "error" not in row]))
    if failed:
        say(f"error: {len(failed)} of {len(rows)} pictures could not be read.")
        raise typer.Exit(MISTAKEN)


def _predicted(model: Any, paths: list[Path], top_k: int) -> list[dict[str, Any]]:
    """A row for each path: its predictions, or the error."""
    import torch

    from fvg_adapter.data import PairedTransform, UnreadableImageError
    from fvg_adapter.data.images import read_picture

    encoder = getattr(model, "tuner", model).encoder
    transform = PairedTransform(encoder.image_size, *normal_of(model), train=False)
    rows: list[dict[str, Any]] = []
    pixels = []
    for path in paths:
        row: dict[str, Any] = {"image": str(path)}
        rows.append(row)
        try:
            pixels.append(transform(read_picture(path, str(path)).image)["pixel_values"])
        except UnreadableImageError as error:
            row["error"] = str(error).split(". Replace or remove", 1)[0] + "."
    if pixels:
        with torch.no_grad():
            chances = model(torch.stack(pixels).to(encoder.device)).logits.softmax(-1).cpu()  # (B, C)
        best = chances.topk(min(top_k, len(model.classes)), dim=-1)
        readable = [row for row in rows if "error" not in row]
        for row, values, indices in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
            row["predictions"] = [
                {"class": model.classes[i], "probability": p} for i, p in zip(indices, values, strict=True)
            ]
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for row in rows:
        for number, answer in enumerate(row["predictions"]):
            picture = "" if number else row["image"]
            chance = f"{100 * answer['probability']:.1f} %"
            table.add_row(Text(printable(picture)), Text(printable(answer["class"])), chance)
    return table
