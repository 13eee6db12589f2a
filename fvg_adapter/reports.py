"""An audit as one HTML file: what leans on the background, with pictures. Needs matplotlib's colours and PIL."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fvg_adapter.attention import record_attention
from fvg_adapter.audit import Audit, ClassAudit, PictureAudit
from fvg_adapter.model import FVGModel
from fvg_adapter.replacing import written
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.visualize import overlay

COLUMNS = (
    ("class", "name", "{}"),
    ("pictures", "pictures", "{}"),
    ("whole %", "whole", "{:.1f}"),
    ("object alone %", "foreground", "{:.1f}"),
    ("background alone %", "background", "{:.1f}"),
    ("lean, nats", "lean", "{:+.2f}"),
    ("evidence, t", "evidence", "{:+.1f}"),
    ("D_fg, nats", "d_fg", "{:.3f}"),
    ("attention in mask", "attention_in_mask", "{:.2f}"),
    ("relevance in mask", "relevance_in_mask", "{:.2f}"),
    ("mask area", "area", "{:.2f}"),
)
"""Heading, field of `ClassAudit`, format."""
SIDE = 160
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1d1d1f}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .7rem;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}tr.lean td{background:#fdeee9}
figure{display:inline-block;margin:.6rem;width:340px;vertical-align:top}figcaption{font-size:13px;color:#444}
img{image-rendering:pixelated;border-radius:4px}"""


def write_report(
    path: str | os.PathLike[str], found: Audit, model: FVGModel | Tuner, dataset: Any, *, title: str, pictures: int = 12
) -> Path:
    """Writes the report: a table of classes, and the pictures that lean most with mask, attention and relevance.

    Args:
        path: the HTML file; it needs no other file. found: of `audit(model, dataset)`.
        title: what was audited. pictures: how many are shown.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = found.leaning(pictures)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(in_words(found))}</p>",
        "<p>Lean: how much more the background alone says a class's name than backgrounds of other classes do. "
        "Evidence: the same in standard errors. An even map would have the mask's area inside the mask.</p>",
        _table([*found.classes, found.summary]),
        "<h2>Pictures that lean on the background most</h2>",
        "<p>Left attention, right class relevance of the answer; the object is outlined.</p>",
        *(_figure(row, model, dataset, str(found.settings.get("outside", "mean"))) for row in shown),
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    with written(target) as file:
        file.write_text(page + "\n".join(body) + "\n", encoding="utf-8")
    return target


def in_words(found: Audit) -> str:
    """The finding in a few sentences."""
    total, suspects = found.summary, suspicious(found.classes)
    parts = [
        f"{total.pictures} pictures of {len(found.classes)} classes: {total.whole:.1f} % right on whole pictures, "
        f"{total.foreground:.1f} % on the object alone, {total.background:.1f} % on the background alone "
        f"(guessing: {100 / max(1, len(found.classes)):.1f} %)."
    ]
    if found.left_out:
        parts.append(f"{found.left_out} pictures without a usable mask were left out.")
    if suspects:
        names = ", ".join(c.name for c in suspects[:8]) + (", …" if len(suspects) > 8 else "")
        parts.append(f"Classes whose background says their name: {names}.")
    else:
        parts.append("No class leans on its background with evidence above 3 standard errors.")
    return " ".join(parts)


def suspicious(classes: Iterable[ClassAudit]) -> list[ClassAudit]:
    """Classes whose evidence is above 3 standard errors."""
    return [c for c in classes if c.evidence > 3]


def _table(rows: Sequence[ClassAudit]) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head, _, _ in COLUMNS)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(f.format(getattr(row, name)))}</td>" for _, name, f in COLUMNS)
        lines.append(f"<tr{' class=lean' if row.evidence > 3 else ''}>{cells}</tr>")
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def _figure(row: PictureAudit, model: FVGModel | Tuner, dataset: Any, outside: str) -> str:
    item = dataset[row.index]
    tuner = model.tuner if isinstance(model, FVGModel) else model
    pixels = item["pixel_values"].unsqueeze(0).to(tuner.encoder.device)
    with (
        model.use_classes(list(dataset.classes)),
        torch.enable_grad(),
        record_attention(model, relevance=True) as record,
    ):
        logits = model(pixels.clone().requires_grad_()).logits
        relevance = record.relevance(logits.max(-1).values)[0]
    attention = record.attention().mean((1, 2))[0]
    config = getattr(model, "config", None)
    normal = {} if config is None else {"mean": config.image_mean, "std": config.image_std}
    maps = (attention, relevance)
    images = "".join(_image(overlay(item["pixel_values"], shown, item["foreground_mask"], **normal)) for shown in maps)
    text = (
        f"{row.label}: whole “{row.answer}”, object “{row.answer_foreground}”, background “{row.answer_background}”; "
        f"lean {row.lean:+.2f}, D_fg {row.d_fg:.2f}, {Path(row.name).name}"
    )
    return f"<figure>{images}<figcaption>{html.escape(text)}</figcaption></figure>"


def _image(picture: Any) -> str:
    stream = io.BytesIO()
    picture.resize((SIDE, SIDE)).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img width={SIDE} height={SIDE} alt="" src="data:image/png;base64,{data}"> '
