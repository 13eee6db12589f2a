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
from fvg_adapter.model import FVGModel, answer_score
from fvg_adapter.replacing import written
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.visualize import overlay

COLUMNS = (
    ("class", "name", "{}", ""),
    ("pictures", "pictures", "{}", "scored, with a usable mask"),
    ("whole %", "whole", "{:.1f}", "right on whole pictures"),
    ("object alone %", "foreground", "{:.1f}", "right with the background taken away"),
    ("background alone %", "background", "{:.1f}", "right with the box around the object taken away"),
    (
        "lean, nats",
        "lean",
        "{:+.2f}",
        "how much the class's log-probability rises on its own pictures' backgrounds above other classes', with the "
        "same holes cut into both",
    ),
    ("evidence, t", "evidence", "{:+.1f}", "the lean in standard errors; above 3 it is no accident"),
    ("D_fg, nats", "d_fg", "{:.2f}", "KL(p of the whole picture ‖ p of the object alone)"),
    ("entropy, nats", "entropy", "{:.2f}", "of the whole picture's prediction: a flatter one lowers D_fg for nothing"),
    ("attention in mask", "attention_in_mask", "{:.2f}", "share of the attention that lies on the object"),
    ("relevance in mask", "relevance_in_mask", "{:.2f}", "share of what spoke for the answer that lies on the object"),
    ("mask area", "area", "{:.2f}", "share of the picture; an even map would have as much inside the mask"),
)
"""Heading, field of `ClassAudit`, format, and what it means."""
SIDE, EACH = 160, 3
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:74rem;margin:2rem auto;padding:0 1rem;color:#1d1d1f}
h1{margin-bottom:0}.of{color:#666;margin-top:0}.finding{font-size:17px;max-width:60rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid #ddd}th{vertical-align:bottom;position:sticky;top:0;background:#fff}
td:first-child,th:first-child{text-align:left;white-space:nowrap}tr.lean td{background:#fdeee9}
tr.all td{font-weight:600;border-top:2px solid #888}dl{columns:2;column-gap:3rem;font-size:13px;color:#444}
dt{font-weight:600;margin-top:.3rem;break-after:avoid}dd{margin:0}
figure{display:inline-block;margin:.6rem 1.2rem .6rem 0;width:500px;vertical-align:top}
figcaption{font-size:13px;color:#444}img{border-radius:4px}"""


def write_report(
    path: str | os.PathLike[str],
    found: Audit,
    model: FVGModel | Tuner,
    dataset: Any,
    *,
    title: str,
    pictures: int = 12,
) -> Path:
    """Writes the report: a table of classes, and the pictures that lean most with mask, attention and relevance.

    Args:
        path: the HTML file; it needs no other file. found: of `audit(model, dataset)`.
        title: what was audited. pictures: how many are shown, at most 3 of a class.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    meanings = "".join(
        f"<dt>{html.escape(head)}</dt><dd>{html.escape(text)}</dd>" for head, _, _, text in COLUMNS if text
    )
    body = [
        "<h1>Does it look at the object?</h1>",
        f"<p class=of>{html.escape(title)}; scored by: {html.escape(found.branch)}</p>",
        f"<p class=finding>{html.escape(in_words(found))}</p>",
        _table(found.classes, found.summary),
        f"<dl>{meanings}</dl>",
        "<h2>Pictures that lean on the background most</h2>",
        f"<p>The picture, its attention, and the class relevance of the answer; the object is outlined. At most {EACH} "
        "of a class.</p>",
        *(
            _figure(row, model, dataset, bool(found.settings.get("relevance", True)))
            for row in varied(found.leaning(len(found.pictures)), pictures)
        ),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
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
        parts.append(
            f"{len(suspects)} classes lean on their backgrounds with evidence above 3 standard errors, most evident "
            f"first: {names}."
        )
    else:
        parts.append("No class leans on its background with evidence above 3 standard errors.")
    return " ".join(parts)


def varied(pictures: Sequence[PictureAudit], count: int, each: int = EACH) -> list[PictureAudit]:
    """The first `count` pictures, with at most `each` of a class."""
    taken: dict[str, int] = {}
    kept: list[PictureAudit] = []
    for picture in pictures:
        taken[picture.label] = taken.get(picture.label, 0) + 1
        if taken[picture.label] <= each and len(kept) < count:
            kept.append(picture)
    return kept


def suspicious(classes: Iterable[ClassAudit]) -> list[ClassAudit]:
    """Classes whose evidence is above 3 standard errors."""
    return [c for c in classes if c.evidence > 3]


def _table(rows: Sequence[ClassAudit], summary: ClassAudit) -> str:
    heads = "".join(f'<th title="{html.escape(text)}">{html.escape(head)}</th>' for head, _, _, text in COLUMNS)
    lines = []
    for row in [*rows, summary]:
        cells = "".join(f"<td>{html.escape(form.format(getattr(row, name)))}</td>" for _, name, form, _ in COLUMNS)
        style = " class=all" if row is summary else " class=lean" if row.evidence > 3 else ""
        lines.append(f"<tr{style}>{cells}</tr>")
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def _figure(row: PictureAudit, model: FVGModel | Tuner, dataset: Any, relevance: bool) -> str:
    item = dataset[row.index]
    tuner = model.tuner if isinstance(model, FVGModel) else model
    pixels = item["pixel_values"].unsqueeze(0).to(tuner.encoder.device)
    with (
        model.use_classes(list(dataset.classes)),
        torch.set_grad_enabled(relevance),
        record_attention(model, relevance=relevance) as record,
    ):
        output = model(pixels.clone().requires_grad_(relevance))
        relevant = [record.relevance(answer_score(model, output))[0]] if relevance else []
    attention = record.attention().mean((1, 2))[0]
    config = getattr(model, "config", None)
    normal = {} if config is None else {"mean": config.image_mean, "std": config.image_std}
    images = "".join(
        _image(overlay(item["pixel_values"], shown, item["foreground_mask"], side=2 * SIDE, **normal))
        for shown in (None, attention, *relevant)
    )
    lines = [
        f"<b>{html.escape(row.label)}</b> ({html.escape(Path(row.name).name)}), lean {row.lean:+.2f} nats, D_fg "
        f"{row.d_fg:.2f}",
        *(
            f"{html.escape(view)}: “{html.escape(answer)}”; {html.escape(row.label)} {100 * chance:.0f} %"
            for view, answer, chance in (
                ("whole", row.answer, row.p_whole),
                ("object alone", row.answer_foreground, row.p_foreground),
                ("background alone", row.answer_background, row.p_background),
            )
        ),
    ]
    return f"<figure>{images}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _image(picture: Any) -> str:
    stream = io.BytesIO()
    picture.resize((2 * max(1, round(SIDE * picture.width / picture.height)), 2 * SIDE)).save(
        stream, "WEBP", quality=85
    )
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img height={SIDE} alt="" src="data:image/webp;base64,{data}"> '
