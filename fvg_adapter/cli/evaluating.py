"""`fvg-adapter eval`: score a saved adapter on a data set."""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Base,
    Debug,
    Device,
    Threads,
    load_adapter,
    mistakes_told,
    normal_of,
    prepare,
    say_progress,
    show,
    show_json,
    split_given,
)

MEANINGS = {
    "accuracy": "accuracy, percent",
    "base": "base: accuracy among tuned classes, percent",
    "new": "new: accuracy among unseen classes, percent",
    "hm": "HM: harmonic mean of base and new",
    "joint_base": "joint base: among all classes, percent",
    "joint_new": "joint new",
    "joint_hm": "joint HM",
    "d_fg": "D_fg: KL(whole image || foreground), nats",
    "entropy": "entropy on the same pictures, nats",
    "attention_in_mask": "attention inside the mask, share",
    "ece": "expected calibration error, percent",
    "joint_ece": "calibration error among all classes, percent",
    "worst_class": "worst class, accuracy among its own half, percent",
    "joint_worst_class": "worst class among all classes, percent",
    "worst_group": "worst class within a group, percent",
}


@mistakes_told
def evaluate_adapter(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter.")],
    data: Annotated[str, typer.Argument(help="Folder with <split>/<class>/<pictures>, or a Hub data set.")],
    model: Base = None,
    split: Annotated[str, typer.Option(help="The pictures to score; '.' if class folders lie in DATA.")] = "test",
    batch: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 64,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a saved adapter on a data set: tuned classes, unseen ones, and all together.

    The classes that the adapter was tuned on are known by name. Masks are
    only used to measure (D_fg, attention inside the mask); without them these
    figures are left out. Where all classes are of one group, there is one
    accuracy. Pictures that cannot be read are named, counted and left out.

    Examples:

    \b
    fvg-adapter eval out/adapter pets
    # from the Hub, around a base model of your choice, for a script
    fvg-adapter eval me/pets-fvg pets --split val --json \\
        --model openai/clip-vit-base-patch16
    """
    place = prepare(device, threads)
    from fvg_adapter.data import PairedTransform, open_dataset

    loaded = load_adapter(adapter, model, place)
    encoder = getattr(loaded, "tuner", loaded).encoder
    transform = PairedTransform(encoder.image_size, *normal_of(loaded), train=False)
    pictures = open_dataset(data, split_given(split), masks="optional", transform=transform).drop_unreadable()
    known = set(loaded.base_classes)
    groups = [[i for i, name in enumerate(pictures.classes) if (name in known) is seen] for seen in (True, False)]
    sets = [pictures.keep_classes(group) if group else None for group in groups]
    tell = say_progress()
    if tell is not None:
        tell(f"scoring {len(pictures)} pictures of {len(groups[0])} tuned and {len(groups[1])} unseen classes")
    figures = _figures(loaded, sets, batch)
    counts = {
        "pictures": len(pictures),
        "unreadable": len(pictures.unreadable),
        "base_classes": len(groups[0]),
        "new_classes": len(groups[1]),
    }
    if as_json:
        show_json({"adapter": adapter, "data": data, "split": split, **counts, **figures})
        return
    show(f"{adapter} on {data}, split {split}")
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if math.isfinite(value):
            table.add_row(MEANINGS.get(name, name), f"{value:.3f}" if name in ("d_fg", "entropy") else f"{value:.2f}")
    show(table)


def _figures(model: Any, sets: list[Any], batch: int) -> dict[str, float]:
    from fvg_adapter.evaluation import evaluate

    if all(part is not None and len(part) for part in sets):
        return evaluate(model, *sets, batch_size=batch)
    only = next(part for part in sets if part is not None and len(part))
    return {"accuracy": _accuracy(model, only, batch)}


def _accuracy(model: Any, pictures: Any, batch: int) -> float:
    """Percent of right answers among the classes of one data set."""
    import torch
    from torch.utils.data import DataLoader

    from fvg_adapter.data import collate

    device = getattr(model, "tuner", model).encoder.device
    right = 0
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(model.use_classes(pictures.classes))
        for items in DataLoader(pictures, batch, collate_fn=collate):
            logits = model(items["pixel_values"].to(device)).logits
            right += int((logits.argmax(-1).cpu() == items["labels"]).sum())
    return 100 * right / len(pictures)
