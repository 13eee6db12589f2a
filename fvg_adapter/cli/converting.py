"""`fvg-adapter convert`: a checkpoint of the Dassl family as files of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Debug,
    check_folder,
    class_names,
    json_object,
    load_base,
    mistakes_told,
    printable,
    show,
    show_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from fvg_adapter.convert import Converted


@mistakes_told
def convert_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="A model.pth.tar-N, or the folder that holds it (the last epoch is taken).")
    ],
    model: Annotated[str, typer.Option(metavar="ID_OR_DIR", help="The CLIP that was tuned: a Hub id or a folder.")],
    classes: Annotated[
        str,
        typer.Option(help="The names tuned on, in the order of the labels: separated by commas, or @FILE, one a line."),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for our files.")],
    tuner: Annotated[
        str | None,
        typer.Option(help="coop, kgcoop, promptsrc or mmrl.", show_default="found out from the checkpoint"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Hand-written prompt of plain CLIP, with one {}.", show_default="a photo of a {}."),
    ] = None,
    tuner_options: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='What the checkpoint does not tell: \'{"class_token_position": "middle"}\'.'),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of CoOp, KgCoOp, PromptSRC or MMRL (Dassl's format) into files of ours.

    The file is read weights-only: code in it is refused, never run. Class names
    are not in such files and must be given; buffers that depend on them are
    made anew, and the result scores any other names too. What was kept and
    what was dropped is listed.

    Examples:

    \b
    fvg-adapter convert output/CoOp/seed1/prompt_learner --output pets-coop \\
        --model openai/clip-vit-base-patch16 --classes @pets.txt
    fvg-adapter convert VLPromptLearner/model.pth.tar-10 --output pets-src \\
        --model openai/clip-vit-base-patch16 --classes "tabby cat,beagle"
    """
    names = class_names(classes)
    arguments = json_object(tuner_options)
    if template is not None:
        arguments["template"] = template
    check_folder(output)
    from fvg_adapter.convert import convert

    clip, tokenizer = load_base(model, "cpu")
    result = convert(checkpoint, clip, tokenizer, names, kind=tuner, **arguments)
    try:
        result.tuner.save_pretrained(output)
    finally:
        result.tuner.detach()
    if as_json:
        show_json({"checkpoint": str(checkpoint), "output": str(output), **_record(result)})
        return
    epoch = "" if result.epoch is None else f" of epoch {result.epoch}"
    show(f"{checkpoint}: {result.kind}{epoch}, tuned on {len(names)} classes -> {output}")
    show(_table(result))


def _record(result: Converted) -> dict[str, Any]:
    return {
        "tuner": result.kind,
        "epoch": result.epoch,
        "kept": {ours: list(theirs) for ours, theirs in result.kept.items()},
        "dropped": dict(result.dropped),
        "notes": list(result.notes),
    }


def _table(result: Converted) -> Table:
    """Every tensor of the checkpoint: what became of it."""
    from rich.table import Table
    from rich.text import Text

    table = Table("in the checkpoint", "here")
    for ours, theirs in result.kept.items():
        first, last = printable(theirs[0]), printable(theirs[-1])
        table.add_row(Text(first if len(theirs) == 1 else f"{first} … {last} ({len(theirs)})"), Text(ours))
    by_reason: dict[str, list[str]] = {}
    for name, reason in result.dropped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        table.add_row(Text(printable(shown)), Text(f"dropped: {reason}"))
    return table
