"""The YAML header of a card: what the Hub's search, its list of adapters and its leaderboards read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fvg_adapter.card.citations import tuner_name
from fvg_adapter.card.figures import METRICS, deviation, mean

TASK = "zero-shot-image-classification"
UNKNOWN_LICENCE = "unknown"
"""The Hub's word for a licence that nobody has chosen."""
PROMPT_TUNERS = ("coop", "kgcoop", "promptsrc", "mmrl")


def metadata_of(config: Mapping[str, Any], name: str) -> ModelCardData:
    """The header of a card.

    Args:
        config: of the saved adapter. name: what the figures' model is called, such as a Hub id.
    """
    about = config.get("about") or {}
    base, kind = config["base_model"], str(config["tuner"].get("kind"))
    on_hub = base.get("id") not in (None, "local")
    dataset = dataset_of(about)
    heads = config.get("kind") == "fvg"
    prompts = ["prompt-tuning"] if kind in PROMPT_TUNERS else []
    results = _eval_results(about, dataset)
    return ModelCardData(
        license=about.get("license") or UNKNOWN_LICENCE,
        library_name="fvg-adapter",
        pipeline_tag=TASK,
        base_model=base["id"] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[dataset["id"]] if dataset.get("id") else None,
        tags=[*(["fvg-pt", "arxiv:2603.08708"] if heads else []), kind, "clip", *prompts, "few-shot"],
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def title_of(config: Mapping[str, Any]) -> str:
    """What an adapter is, in a few words."""
    tuner = tuner_name(str(config["tuner"].get("kind")))
    return f"FVG-PT behind {tuner}" if config.get("kind") == "fvg" else f"{tuner}, tuned"


def dataset_of(about: Mapping[str, Any]) -> dict[str, str]:
    """{"name": …, "id": … where it is on the Hub}; empty where nothing is known."""
    given = about.get("dataset")
    figures = about.get("results") or {}
    if given:
        return {"name": given, **({"id": given} if "/" in given else {})}
    if figures.get("data"):
        name = str(figures["data"])
        return {"name": name, **({"id": name} if figures.get("from_hub") else {})}
    return {}


def _eval_results(about: Mapping[str, Any], dataset: Mapping[str, str]) -> list[EvalResult]:
    figures = about.get("results")
    if not figures:
        return []
    name = dataset.get("name", "unnamed data")
    found = []
    for metric, label in METRICS.items():
        values = figures["rows"][figures["ours"]].get(metric)
        centre = mean(values) if values else None
        if centre is None:
            continue
        spread, seeds = deviation(values), figures.get("seeds")
        several = {"seeds": list(seeds)} if seeds else {}
        spread_too = {} if spread is None else {"standard_deviation": round(spread, 2)}
        found.append(
            EvalResult(
                task_type=TASK,
                task_name="Zero-shot image classification",
                dataset_type=dataset.get("id") or re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unnamed",
                dataset_name=name,
                dataset_split=figures.get("test_split"),
                metric_type="accuracy",
                metric_name=f"{label if metric == 'accuracy' else f'{label} accuracy'}, percent",
                metric_value=round(centre, 2),
                metric_args={**several, **spread_too} or None,
            )
        )
    return found
