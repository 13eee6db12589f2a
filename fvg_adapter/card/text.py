"""The text of a card, section by section: from what the adapter's config.json says, and from nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fvg_adapter.card.citations import references, tuner_name
from fvg_adapter.card.figures import FURTHER, THIS, difference, metrics_of, shown
from fvg_adapter.card.metadata import dataset_of, title_of
from fvg_adapter.files import PICTURE_FILE

_MANY = 24
_PAPER = "[FVG-PT](https://arxiv.org/abs/2603.08708)"
_CALLED = {"d_fg": "D_fg, nats", "entropy": "entropy, nats", "attention_in_mask": "attention in mask", "ece": "ECE, %"}
_CONTROLS = {
    "x_fg=x": "the whole picture as foreground (x_fg = x)",
    "lambda_d=0": "no distillation (λ_d = 0)",
    "shuffled masks": "masks of other pictures",
}


def sections(config: Mapping[str, Any], repo_id: str | None, revision: str | None) -> list[str]:
    """The body of a card; `repo_id` is None for a folder."""
    about = config.get("about") or {}
    return [
        f"# {html.escape(repo_id or title_of(config))}",
        _what(config),
        *([_picture()] if about.get("picture") else []),
        "## Use\n\n" + _use(config, repo_id, revision),
        "## Results\n\n" + _results(config, about),
        "## Classes\n\n" + _classes(config),
        "## Data\n\n" + _data(about),
        "## Settings\n\n" + _settings(config, about),
        "## Licence\n\n" + _licence(about),
        "## Citation\n\n" + _citation(config),
    ]


def _what(config: Mapping[str, Any]) -> str:
    kind, base = str(config["tuner"].get("kind")), config["base_model"]
    heads = config.get("kind") == "fvg"
    on_hub = base.get("id") not in (None, "local")
    model = f"[{base['id']}](https://huggingface.co/{base['id']})" if on_hub else "a model that is not on the Hub"
    at = f" at revision {_code(base['revision'])}" if on_hub and base.get("revision") else ""
    before = (
        f"{_PAPER} adapters and gates behind a frozen {_name(kind)}: they score the classes tuned on with "
        "foreground-guided adapters, other classes with a calibration by the untouched CLIP, and both together."
        if heads
        else f"A CLIP tuned by {_name(kind)}, without FVG-PT behind it."
    )
    lines = [
        before,
        f"- **Base model:** {model}{at} ({_code(base.get('class', 'unknown class'))}). It is not in these files.",
        f"- **Tuner:** {_name(kind)}",
        f"- **Made with:** [fvg-adapter](https://pypi.org/project/fvg-adapter/) {_version(config, 'fvg-adapter')}",
    ]
    return f"{lines[0]}\n\n" + "\n".join(lines[1:])


def _picture() -> str:
    return (
        f"![Attention of the model over test pictures]({PICTURE_FILE})\n\n"
        "*Where the model looks: test pictures, the attention over each, and the answers.*"
    )


def _use(config: Mapping[str, Any], repo_id: str | None, revision: str | None) -> str:
    if config["tuner"].get("kind") == "external":
        return "The tuner is made of functions that no file holds: see `fvg_adapter.tuners.External`."
    return (
        "```bash\npip install fvg-adapter\n```\n\n```python\n"
        + "\n".join(_snippet(config, repo_id, revision))
        + "\n```"
    )


def _snippet(config: Mapping[str, Any], repo_id: str | None, revision: str | None) -> list[str]:
    where = _quoted(repo_id or ".") + (f", revision={_quoted(revision)}" if revision else "")
    note = "" if repo_id else "  # run in this folder"
    heads = config.get("kind") == "fvg"
    gone = repo_id is not None and config["base_model"].get("id") == "local"
    adapted = bool(config["tuner"].get("adapted")) and config["tuner"].get("kind") != "lora"
    names = ", ".join(_quoted(str(name)) for name in [*list(config["classes"])[:2], "something else"])
    imports = ["from PIL import Image"]
    loading = [f"model = load({where}){note}"]
    if gone or adapted:
        imports.append("from transformers import AutoModel, AutoTokenizer")
        what = "with the PEFT adapters that it was tuned with" if adapted else "which is not on the Hub"
        loading = [
            f'base = "path/to/the/base-model"  # {what}',
            "clip, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)",
            f"model = load({where}, clip=clip, tokenizer=tokenizer){note}",
        ]
    picture = 'picture = Image.new("RGB", (224, 224), "orange")  # yours: Image.open("picture.jpg").convert("RGB")'
    if heads:
        return [
            *imports,
            "",
            "from fvg_adapter import load",
            "",
            *loading,
            picture,
            "print(model.predict(picture, top_k=3))",
            f"print(model.predict(picture, classes=[{names}]))  # any names",
        ]
    return [
        "import torch",
        *imports,
        "",
        "from fvg_adapter import load",
        "from fvg_adapter.data import transform_for",
        "",
        *loading,
        picture,
        'pixels = transform_for(model.encoder.image_size, train=False)(picture)["pixel_values"]',
        "with torch.no_grad():",
        "    scores = model(pixels[None]).logits  # (1, classes)",
        "print(model.classes[int(scores.argmax())])",
    ]


# -- results -----------------------------------------------------------------------------------------------------------


def _results(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    figures = about.get("results")
    if not figures:
        return "No figures came with this adapter. `model.save_pretrained(folder, results=evaluate(…))` puts them here."
    name = dataset_of(about).get("name", "unnamed data")
    split = f", split {_code(figures['test_split'])}" if figures.get("test_split") else ""
    seeds = figures.get("seeds") or []
    parts = [f"Accuracy in percent on {_code(name)}{split}, {_over(seeds)}."]
    metrics = metrics_of(figures)
    if "accuracy" in metrics:
        parts.append("accuracy: classes tuned on, among themselves.")
    if "base" in metrics:
        parts.append("base: classes tuned on, among themselves. new: unseen ones, likewise. HM: their harmonic mean.")
        parts.append("joint: all classes at once.")
    if len(seeds) > 1:
        parts.append(f"The files here are of seed {seeds[0]}.")
    table = _table(
        ["model", *metrics.values()],
        [[_row(n, figures["ours"]), *(shown(r.get(m)) for m in metrics)] for n, r in figures["rows"].items()],
    )
    return "\n\n".join([" ".join(parts), table, *_further(figures), *_worth(config, figures)])


def _over(seeds: Sequence[Any]) -> str:
    if len(seeds) > 1:
        return f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"
    return f"seed {seeds[0]}" if seeds else "one run"


def _row(name: str, ours: str) -> str:
    return f"**{_cell(name)}**" if name == ours else _cell(name)


def _further(figures: Mapping[str, Any]) -> list[str]:
    row = figures["rows"][figures["ours"]]
    known = [(m, shown(row[m], digits=3 if m != "ece" else 1)) for m in FURTHER if m in row]
    known = [(m, text) for m, text in known if text != "–"]
    return ["Of this adapter: " + "; ".join(f"{_CALLED[m]} {text}" for m, text in known) + "."] if known else []


def _worth(config: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """What FVG-PT, and what the foreground in it, is worth: paired differences, whatever their sign."""
    ours, kind = figures["ours"], str(config["tuner"].get("kind"))
    if config.get("kind") != "fvg":
        return []
    before = "clip" if kind == "zero_shot" else kind
    compared = [(before, f"{tuner_name(kind)} alone")] if ours != THIS else []
    compared += [(f"{ours} [{name}]", said) for name, said in _CONTROLS.items()]
    rows, metrics = [], metrics_of(figures)
    for other, said in compared:
        pairs = [difference(figures, ours, other, metric) for metric in metrics]
        if any(pairs):
            rows.append([f"this adapter − {_cell(said)}", *(shown(p, sign="+") for p in pairs)])
    table = [_table(["difference, points", *metrics.values()], rows)] if rows else []
    if any(f"{ours} [{name}]" in figures["rows"] for name in _CONTROLS):
        text = (
            "A gain over the tuner alone proves nothing about the foreground, because the adapters gain without it "
            "too. What the foreground itself is worth is the difference from x_fg = x, whatever its sign."
        )
        metric = "hm" if "hm" in metrics else "accuracy"
        worth = difference(figures, ours, f"{ours} [x_fg=x]", metric)
        told = f" **Here: {metrics[metric]} {shown(worth, sign='+')} points.**" if worth else ""
        return [*table, text + told]
    return [*table, "No controls came with these figures, so that nothing says what the foreground itself is worth."]


# -- the rest ----------------------------------------------------------------------------------------------------------


def _classes(config: Mapping[str, Any]) -> str:
    tuned, scored = list(config["base_classes"]), list(config["classes"])
    parts = [f"Tuned on {_folded(tuned)}"]
    if scored != tuned:
        parts.append(f"Set to score {_folded(scored)}")
    parts.append("Any other names can be given: `load(…, classes=[…])`.")
    return "\n\n".join(parts)


def _folded(names: Sequence[Any]) -> str:
    listed = ", ".join(_cell(name).replace("*", "\\*") for name in names)
    count = f"{len(names)} class{'es' if len(names) != 1 else ''}"
    if len(names) <= _MANY:
        return f"{count}: {listed}."
    return f"{count}.\n\n<details><summary>The {count}</summary>\n\n{listed}\n\n</details>"


def _data(about: Mapping[str, Any]) -> str:
    found, figures = dataset_of(about), about.get("results") or {}
    if not found:
        return 'Not named. `save_pretrained(folder, dataset="…")` puts the name, or a Hub id, here.'
    name = found["name"]
    link = f"[{html.escape(name)}](https://huggingface.co/datasets/{name})" if found.get("id") else _code(name)
    said = [f"{link}."]
    if figures.get("shots"):
        halves = "base" in metrics_of(figures)
        said.append(
            f"Tuned on {figures['shots']} training pictures a class"
            + (" of the first half of the classes; the other half is only scored." if halves else ".")
        )
    masks = {
        "given": "Foreground masks came from the data, where it has them.",
        "attention": "Foreground masks of pictures without a file came from the model's own attention.",
        "whole": "Pictures without a mask file trained with the whole picture as foreground.",
    }
    said += [masks[figures["foreground"]]] if figures.get("foreground") in masks else []
    return " ".join(said)


def _settings(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    figures = about.get("results") or {}
    rows: list[tuple[str, Any]] = [(f"tuner: {k}", v) for k, v in config["tuner"].get("arguments", {}).items()]
    for stage, said in (("tune", "stage one"), ("heads", "stage two")):
        given = figures.get(stage)
        if isinstance(given, Mapping):
            rows += [(f"{said}: {k}", v) for k, v in given.items() if k != "source"]
    rows += [("views encoded once", figures["views"])] if figures.get("views") else []
    rows += [(f"FVG-PT: {k}", v) for k, v in (config.get("fvg") or {}).items()]
    size = (config.get("preprocessing") or {}).get("image_size")
    rows += [("picture size", size)] if size else []
    table = _table(["setting", "value"], [[_cell(k), _code(_short(v))] for k, v in rows])
    versions = ", ".join(f"{_cell(k)} {_cell(v)}" for k, v in (config.get("versions") or {}).items())
    return f"<details><summary>All settings</summary>\n\n{table}\n\n</details>\n\nVersions: {versions}."


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _licence(about: Mapping[str, Any]) -> str:
    chosen = about.get("license")
    ours = "The library is Apache-2.0; the base model and the data have licences of their own."
    if chosen:
        return f"{_code(chosen)}. {ours}"
    return f'Not chosen yet; `save_pretrained(folder, license="…")` and `push_to_hub(…, license="…")` set it. {ours}'


def _citation(config: Mapping[str, Any]) -> str:
    kind = str(config["tuner"].get("kind"))
    return f"```bibtex\n{references(kind, config.get('kind') == 'fvg')}\n```"


def _version(config: Mapping[str, Any], name: str) -> str:
    return _cell((config.get("versions") or {}).get(name, ""))


def _name(kind: str) -> str:
    return _cell(tuner_name(kind))


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quoted(text: str) -> str:
    """A Python string, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _cell(value: Any) -> str:
    """Text on one line that is no HTML, no cell of its own, and no link or picture of Markdown."""
    return html.escape(" ".join(str(value).split())).replace("|", "\\|").replace("](", "]&#40;")


def _code(value: Any) -> str:
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"
