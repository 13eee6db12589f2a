"""`fvg-adapter audit`: does a model look at the object, or at what is around it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Base,
    Debug,
    Device,
    Threads,
    load_adapter,
    load_base,
    mistakes_told,
    prepare,
    say_progress,
    show,
    show_json,
)

SHORT = {
    "pictures": "n",
    "whole %": "whole",
    "object alone %": "object",
    "background alone %": "backgr.",
    "lean, nats": "lean",
    "evidence, t": "t",
    "D_fg, nats": "D_fg",
    "attention in mask": "att.",
    "relevance in mask": "rel.",
    "mask area": "area",
}
"""Headings that fit a terminal; the words of the report are longer."""


@mistakes_told
def audit_model(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter, or of a plain CLIP (--plain).")],
    data: Annotated[str, typer.Argument(help="Folder with <split>/<class>/<pictures> and mask/, or a Hub data set.")],
    model: Base = None,
    plain: Annotated[bool, typer.Option("--plain", help="ADAPTER is a CLIP without any adapter.")] = False,
    template: Annotated[str, typer.Option(help="Hand-written prompt for --plain.")] = "a photo of a {}.",
    split: Annotated[str, typer.Option(help="The pictures to audit.")] = "test",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for audit.json and report.html with overlays.")
    ] = None,
    relevance: Annotated[bool, typer.Option(help="Class relevance too; it costs a backward pass.")] = True,
    top: Annotated[int, typer.Option(min=1, help="Classes and pictures that are listed.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 32,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find out whether a model leans on backgrounds: which classes, and which pictures.

    Every picture is scored whole, with its background taken away, and with
    the box around its object taken away. A class whose background alone says its name is a
    shortcut, whatever its accuracy. Masks are needed: white where the object
    is, in a mask/ folder that mirrors the pictures'. Pictures without one, or
    that cannot be read, are counted and left out.

    Examples:

    \b
    fvg-adapter audit out/adapter pets --output report
    fvg-adapter audit openai/clip-vit-base-patch16 pets --plain --split val
    """
    place = prepare(device, threads)
    from fvg_adapter.audit import audit
    from fvg_adapter.data import PairedTransform, open_dataset
    from fvg_adapter.reports import COLUMNS, in_words, write_report

    loaded = _plain(adapter, template, place) if plain else load_adapter(adapter, model, place)
    encoder = getattr(loaded, "tuner", loaded).encoder
    config = getattr(loaded, "config", None)
    normal = () if config is None else (config.image_mean, config.image_std)
    transform = PairedTransform(encoder.image_size, *normal, train=False)
    pictures = open_dataset(data, split, masks="optional", transform=transform).drop_unreadable()
    tell = say_progress()
    if tell is not None:
        tell(f"auditing {len(pictures)} pictures of {len(pictures.classes)} classes")
    found = audit(loaded, pictures, relevance=relevance, batch_size=batch)
    record = {"adapter": adapter, "data": data, "split": split, **found.to_json()}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (output / "audit.json").write_text(text + "\n", encoding="utf-8")
        write_report(output / "report.html", found, loaded, pictures, title=f"{adapter} on {data}, split {split}")
    if as_json:
        show_json(record)
        return
    show(in_words(found))
    from rich.table import Table

    table = Table()
    for number, (head, _, _) in enumerate(COLUMNS):
        table.add_column(SHORT.get(head, head), justify="left" if number == 0 else "right", overflow="fold")
    for row in [*found.classes[:top], found.summary]:
        table.add_row(*(form.format(getattr(row, name)) for _, name, form in COLUMNS))
    show(table)
    show("whole, object, backgr.: percent right on each alone; att., rel.: attention and relevance inside the mask")
    for picture in found.leaning(top):
        show(f"{picture.name}: {picture.label}; background alone says {picture.answer_background}")


def _plain(name: str, template: str, place: str) -> Any:
    from fvg_adapter.tuners import ZeroShot

    clip, tokenizer = load_base(name, place)
    return ZeroShot(clip, tokenizer, ["object"], template=template)
