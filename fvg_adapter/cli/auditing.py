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
    check_folder,
    load_adapter,
    load_base,
    mistakes_told,
    normal_of,
    prepare,
    printable,
    say_progress,
    show,
    show_json,
    split_given,
)

SHORT = {
    "name": ("class", "{}"),
    "pictures": ("n", "{}"),
    "whole": ("whole", "{:.0f}"),
    "foreground": ("object", "{:.0f}"),
    "background": ("backgr.", "{:.0f}"),
    "lean": ("lean", "{:+.1f}"),
    "evidence": ("t", "{:+.1f}"),
    "d_fg": ("D_fg", "{:.2f}"),
    "attention_in_mask": ("att.", "{:.2f}"),
    "relevance_in_mask": ("rel.", "{:.2f}"),
    "area": ("area", "{:.2f}"),
}
"""Fields of `ClassAudit`, with headings and formats that fit 80 columns; the words of the report are longer."""


@mistakes_told
def audit_model(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter, or of a plain CLIP (--plain).")],
    data: Annotated[str, typer.Argument(help="Folder with <split>/<class>/<pictures> and mask/, or a Hub data set.")],
    model: Base = None,
    plain: Annotated[bool, typer.Option("--plain", help="ADAPTER is a CLIP without any adapter.")] = False,
    template: Annotated[str, typer.Option(help="Hand-written prompt for --plain.")] = "a photo of a {}.",
    split: Annotated[str, typer.Option(help="The pictures to audit; '.' if class folders lie in DATA.")] = "test",
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
    the box around its object taken away. A class whose background alone
    says its name is a shortcut, whatever its accuracy. Masks are needed:
    white where the object is, in a mask/ folder that mirrors the
    pictures'. Pictures without one, or that cannot be read, are counted
    and left out.

    Examples:

    \b
    fvg-adapter audit out/adapter pets --output report
    fvg-adapter audit openai/clip-vit-base-patch16 pets --plain --split val
    """
    check_folder(output)
    place = prepare(device, threads)
    from fvg_adapter.audit import audit
    from fvg_adapter.data import PairedTransform, open_dataset
    from fvg_adapter.replacing import written
    from fvg_adapter.reports import in_words, write_report

    loaded = _plain(adapter, template, place) if plain else load_adapter(adapter, model, place)
    encoder = getattr(loaded, "tuner", loaded).encoder
    transform = PairedTransform(encoder.image_size, *normal_of(loaded), train=False)
    pictures = open_dataset(data, split_given(split), masks="optional", transform=transform).drop_unreadable()
    tell = say_progress()
    if tell is not None:
        tell(f"auditing {len(pictures)} pictures of {len(pictures.classes)} classes")
    found = audit(loaded, pictures, relevance=relevance, batch_size=batch)
    record = {"adapter": adapter, "data": data, "split": split, **found.to_json()}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        with written(output / "audit.json") as file:
            file.write_text(text + "\n", encoding="utf-8")
        write_report(output / "report.html", found, loaded, pictures, title=f"{adapter} on {data}, split {split}")
    if as_json:
        show_json(record)
        return
    show(in_words(found))
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name, (head, _) in SHORT.items():
        first = name == "name"
        table.add_column(head, justify="left" if first else "right", no_wrap=True, overflow="ellipsis")
    for row in [*found.classes[:top], found.summary]:
        table.add_row(*(Text(printable(form.format(getattr(row, name)))) for name, (_, form) in SHORT.items()))
    show(table)
    show(
        "\nwhole, object, backgr.: percent right on each alone. lean: nats that a class gains on its own backgrounds; "
        "t: in standard errors. att., rel.: shares of attention and relevance inside the mask, beside its area.\n"
    )
    for picture in found.leaning(top):
        alone = f"background alone says {picture.answer_background}"
        show(f"{_short(picture.name, data)}: {picture.label} ({picture.lean:+.1f}); {alone}")
    if output is not None:
        show(f"\n{output / 'report.html'}")


def _short(name: str, data: str) -> str:
    """A picture's name below its data set's folder, where it lies there."""
    path, root = Path(name), Path(data).resolve()
    return str(path.relative_to(root)) if root in path.parents else name


def _plain(name: str, template: str, place: str) -> Any:
    from fvg_adapter.tuners import ZeroShot

    clip, tokenizer = load_base(name, place)
    return ZeroShot(clip, tokenizer, ["object"], template=template)
