"""`fvg-adapter info`: explain a saved adapter without loading its base model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fvg_adapter.cli.console import AsJson, Debug, mistakes_told, printable, show, show_json
from fvg_adapter.cli.recognising import recognised
from fvg_adapter.errors import FVGError

_MANY = 12


@mistakes_told
def describe_adapter(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a saved adapter; or another file or folder.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain a saved adapter: kind, classes, base model, sizes, versions, unusual settings.

    Only the adapter's own files are read; the base model is not loaded. What
    is no adapter of ours (a base model, a Dassl checkpoint, a PEFT adapter, a
    training's checkpoint, a bank) is named, with what to do with it.

    Examples:

    \b
    fvg-adapter info out/adapter
    fvg-adapter info me/pets-fvg --json
    fvg-adapter info old/prompt_learner/model.pth.tar-50
    """
    other = recognised(Path(adapter))
    about = other or describe(adapter)
    if as_json:
        show_json(about)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    lines = [("kind", about["kind"]), ("what", about["what"]), ("next", about["next"])] if other else _lines(about)
    for name, value in lines:
        table.add_row(name, Text(printable(value)))
    show(table)


def describe(adapter: str) -> dict[str, Any]:
    """What the files of an adapter say.

    Raises:
        FVGError: not one of our files, or an incomplete one.
    """
    from fvg_adapter.config import FVGConfig
    from fvg_adapter.replacing import read_whole
    from fvg_adapter.storage import fetch, read

    folder, config, tensors = read_whole(fetch(adapter), read)  # also checks that the files belong together
    defaults = FVGConfig().to_dict()
    given = config.get("fvg") or {}
    if not isinstance(given, dict):
        raise FVGError(f"{folder} has an 'fvg' entry that is no object; the file was edited or is incomplete.")
    base = config["base_model"]
    return {
        "adapter": adapter,
        "kind": config.get("kind"),
        "tuner": config["tuner"].get("kind"),
        "tuner_arguments": config["tuner"].get("arguments", {}),
        "foreground": config.get("foreground"),
        "base_classes": config["base_classes"],
        "classes": config["classes"],
        "base_model": {key: base.get(key) for key in ("id", "revision", "path", "class", "tokenizer") if base.get(key)},
        "fingerprint": base.get("fingerprint"),
        "files": {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
        },
        "parameters": {
            name: sum(math.prod(tensor.shape) for tensor in held.values()) for name, held in tensors.items()
        },
        "different_from_defaults": {key: value for key, value in given.items() if value != defaults.get(key)},
        "card": _card_facts(config),
        "format_version": config["format_version"],
        "versions": config.get("versions", {}),
    }


def _card_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Data, licence and figures, where the files tell of them."""
    from fvg_adapter.card import sound_about
    from fvg_adapter.card.figures import METRICS, shown
    from fvg_adapter.card.metadata import dataset_of

    about = sound_about(config.get("about"))
    facts: dict[str, Any] = {"data": dataset_of(about).get("name"), "licence": about.get("license")}
    if "results" in about:
        row, seeds = about["results"]["rows"][about["results"]["ours"]], about["results"].get("seeds")
        over = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
        facts["figures"] = ", ".join(f"{name} {shown(row[m])}" for m, name in METRICS.items() if m in row) + over
    return {name: value for name, value in facts.items() if value is not None}


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    kind = "FVG-PT behind a tuner" if about["kind"] == "fvg" else "a tuner alone"
    base = about["base_model"]
    where = base.get("id", "unknown")
    revision = f" at revision {base['revision']}" if base.get("revision") else ""
    path = f" ({base['path']})" if base.get("path") else ""
    tuned, scored = about["base_classes"], about["classes"]
    lines = [
        ("kind", kind),
        ("tuner", f"{about['tuner']} {_pairs(about['tuner_arguments'])}".strip()),
        ("base model", f"{where}{revision}{path}, {base.get('class', 'unknown class')}"),
        ("tuned on", _listed(tuned)),
        ("scores", "the same classes" if scored == tuned else _listed(scored)),
    ]
    if about["kind"] == "fvg":
        unusual = _pairs(about["different_from_defaults"]) or "none"
        lines += [("foreground", str(about["foreground"])), ("not default", unusual)]
    lines += list(about["card"].items())
    lines += [
        ("parameters", ", ".join(f"{count:,} in {name}" for name, count in about["parameters"].items())),
        ("files", ", ".join(f"{name} {_size(count)}" for name, count in about["files"].items())),
        ("written by", _pairs(about["versions"]) + f" (format {about['format_version']})"),
    ]
    return lines


def _pairs(values: Any) -> str:
    return ", ".join(f"{k}={_short(v)}" for k, v in values.items()) if isinstance(values, dict) else str(values)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)} values]"
    return str(value)


def _listed(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:_MANY]))
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return f"{len(names)} classes: {shown}{more}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count / 1e3:.1f} kB"
