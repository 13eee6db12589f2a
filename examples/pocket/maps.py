"""Where models look, against the true masks: attention, rollout and class relevance of CLIP, tuners and FVG-PT.

    python -m examples.pocket.maps [--tuners NAME …] [--tasks NAME …] [--seeds 1,2,3] [--output DIR]

On base-class test pictures with random backgrounds. A map's mask is its patches above the mean, as
`foreground="attention"` makes it (IoU with the true mask); pointing asks whether its largest value, enlarged to pixels,
lies on the object; the share is the map's mass inside the mask. Beside them D_fg with the entropy that it comes with,
and D_fg once more at plain CLIP's entropy, since a flatter softmax lowers it for nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from examples.pocket.causes import split_of
from examples.pocket.results import MEASURED
from examples.pocket.suite import SETTINGS, THREE, data_of, pocket_clip, stages, write_json
from fvg_adapter import FeatureBank, FVGConfig, record_attention, wrap
from fvg_adapter import losses as L
from fvg_adapter.data import collate
from fvg_adapter.features import attention_in_mask
from fvg_adapter.foreground import attention_mask_from_map, foreground_view
from fvg_adapter.train import fit
from fvg_adapter.tuners import MMRL, CoOp, KgCoOp, LoRA, PromptSRC, ZeroShot

TUNERS = {"coop": CoOp, "kgcoop": KgCoOp, "promptsrc": PromptSRC, "mmrl": MMRL, "lora": LoRA}
Figures = dict[str, dict[str, float]]


def pointing(maps: Tensor, mask: Tensor) -> Tensor:
    """(B,) whether the largest value of maps (B, h, w), enlarged, lies inside masks (B, 1, H, W)."""
    size = (mask.shape[-2], mask.shape[-1])
    large = F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).flatten(1)
    return mask.flatten(1).gather(1, large.argmax(1, keepdim=True))[:, 0]


def overlap(maps: Tensor, mask: Tensor) -> Tensor:
    """(B,) IoU of the masks made of maps with the true ones."""
    found = attention_mask_from_map(maps, (mask.shape[-2], mask.shape[-1]))
    return (found * mask).flatten(1).sum(1) / (found + mask).clamp_max(1).flatten(1).sum(1)


def looks(model: Any, items: Any) -> tuple[dict[str, Tensor], Tensor]:
    """{map: (B, h, w)} of a batch, and the logits (B, C)."""
    pixels = items["pixel_values"].clone().requires_grad_()
    with record_attention(model, "all", rollout=True) as record, torch.no_grad():
        model(items["pixel_values"])
    layers = record.attention().mean(2)  # (B, layers, h, w)
    maps = {f"attention, layer −{layers.shape[1] - i}": layers[:, i] for i in range(layers.shape[1])}
    maps["rollout"] = record.rollout()
    for name, which in (("relevance, last layer", [-1]), ("relevance, all layers", "all")):
        with record_attention(model, which, relevance=True) as record:
            logits = model(pixels).logits
            maps[name] = record.relevance(logits.max(-1).values)
            if which == [-1]:
                maps["relevance of log p, last layer"] = record.relevance(logits.log_softmax(-1).max(-1).values)
    return maps, logits.detach()


def measure(model: Any, tests: Any) -> tuple[Figures, Tensor, Tensor]:
    """{map: {IoU, pointing, share}}, and the logits of whole pictures and of foreground views."""
    rows: dict[str, list[Tensor]] = {}
    whole, view = [], []
    with model.use_classes(tests.classes):
        model.eval()
        for items in DataLoader(tests, 32, collate_fn=collate):
            mask = (items["foreground_mask"] > 0.5).float()
            maps, logits = looks(model, items)
            whole.append(logits)
            with torch.no_grad():
                view.append(model(foreground_view(items["pixel_values"], mask)).logits)
            maps["an even map"] = torch.ones_like(maps["rollout"])
            for name, found in maps.items():
                figures = torch.stack([overlap(found, mask), pointing(found, mask), attention_in_mask(found, mask)])
                rows.setdefault(name, []).append(figures)
    means = {name: torch.cat(parts, 1).mean(1).tolist() for name, parts in rows.items()}
    return (
        {n: dict(zip(("IoU", "pointing", "share"), v, strict=True)) for n, v in means.items()},
        torch.cat(whole),
        torch.cat(view),
    )


def divergences(whole: Tensor, view: Tensor, wanted: float | None) -> dict[str, float]:
    """D_fg and entropy, and D_fg at the temperature that gives the wanted entropy."""
    found = {
        "D_fg": float(L.kl_divergence(L.log_probs(whole), L.log_probs(view)).mean()),
        "entropy": float(L.entropy(L.log_probs(whole)).mean()),
    }
    if wanted is not None:
        t = L.temperature_of_entropy(whole, wanted)
        found["D_fg at CLIP's entropy"] = float(L.kl_divergence(L.log_probs(whole, t), L.log_probs(view, t)).mean())
        found["T"] = t
    return found


def run_task(task: str, seeds: Sequence[int], tuners: Sequence[str] = tuple(TUNERS)) -> dict[str, Any]:
    """{"maps": {model: {map: {figure: [a value a seed]}}}, "shift": {model: {figure: [a value a seed]}}}."""
    record: dict[str, Any] = {"maps": {}, "shift": {}}
    clip, tokenizer = pocket_clip()
    for seed in seeds:
        split = split_of(data_of(task), seed)
        tests = split.tests["test"][0]
        plain = ZeroShot(clip, tokenizer, split.base_classes)
        _keep(record, "CLIP", plain, tests, None)
        wanted = record["shift"]["CLIP"]["entropy"][-1]
        plain.detach()
        for kind in tuners:
            torch.manual_seed(seed)
            tuner = TUNERS[kind](clip, tokenizer, split.base_classes, **SETTINGS[kind].options)  # type: ignore[operator]
            bank = FeatureBank.encode(tuner, split.train, views=4, seed=seed) if "coop" in kind else split.train
            fit(tuner, bank, recipe=stages(kind)["tune"], seed=seed)
            name = SETTINGS[kind].name
            _keep(record, name, tuner, tests, wanted)
            heads = FeatureBank.encode(tuner, split.train, views=4, seed=seed)
            for row, source in (("+ FVG-PT", "given"), ("+ FVG-PT, x_fg = x", "whole")):
                torch.manual_seed(seed)
                model = wrap(tuner, config=FVGConfig(), foreground=source)
                fit(model, heads, recipe=stages(kind)["heads"], seed=seed)
                _keep(record, f"{name} {row}", model, tests, wanted)
                model.release()
            tuner.detach()
    return record


def _keep(record: dict[str, Any], name: str, model: Any, tests: Any, wanted: float | None) -> None:
    figures, whole, view = measure(model, tests)
    for kind, values in figures.items():
        for figure, value in values.items():
            record["maps"].setdefault(name, {}).setdefault(kind, {}).setdefault(figure, []).append(round(value, 5))
    for figure, value in divergences(whole, view, wanted).items():
        record["shift"].setdefault(name, {}).setdefault(figure, []).append(round(value, 5))


def main() -> None:
    """Runs the tasks and writes maps.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuners", nargs="*", default=list(TUNERS), choices=list(TUNERS))
    parser.add_argument("--tasks", nargs="*", default=list(THREE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    target = options.output / "maps.json"
    record = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for task in options.tasks:
        found = run_task(task, [int(s) for s in options.seeds.split(",")], options.tuners)
        kept = record.setdefault(task, {"maps": {}, "shift": {}})
        for part in kept:  # rows of other tuners stay
            kept[part] |= found[part]
        for name, maps in found["maps"].items():
            means = {k: {f: round(statistics.fmean(v), 2) for f, v in m.items()} for k, m in maps.items()}
            shift = {f: round(statistics.fmean(v), 3) for f, v in found["shift"][name].items()}
            print(task, name, means, shift, flush=True)
        write_json(target, record)


if __name__ == "__main__":
    main()
