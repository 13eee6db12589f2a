"""Whole cards, word for word: what a reader gets for six kinds of adapters lies in fixtures/cards.

After a wording is changed on purpose: `python tests/test_card_text.py` writes them anew; read the difference.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import card_problems

from fvg_adapter.card import make_card, sound_about
from fvg_adapter.card.figures import difference, figures_of
from fvg_adapter.card.saving import add_card
from fvg_adapter.errors import FVGError

CARDS = Path(__file__).parent / "fixtures/cards"
COMMON: dict[str, Any] = {
    "kind": "fvg",
    "base_model": {"id": "openai/clip-vit-base-patch16", "revision": "a" * 40, "class": "CLIPModel"},
    "tuner": {"kind": "coop", "arguments": {"n_ctx": 4, "ctx_init": "a photo of a", "csc": False}},
    "base_classes": ["cat", "dog", "* odd [name](x) <b> | `c` *"],
    "classes": ["cat", "dog", "* odd [name](x) <b> | `c` *"],
    "fvg": {"bottleneck": 64, "attention_layers": [-1], "trust": "gate"},
    "preprocessing": {"image_size": [224, 224], "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "versions": {"fvg-adapter": "0.1.0", "torch": "2.5.0"},
}
SETTINGS = {
    "data": "/home/somebody/secret/pets",
    "from_hub": False,
    "shots": 16,
    "seeds": [1, 2],
    "test_split": "test",
    "foreground": "given",
    "views": 4,
    "tune": {"optimizer": "sgd", "lr": 0.0035, "note": "n" * 200, "source": "somewhere"},
    "heads": {"optimizer": "adam", "lr": 0.5, "source": "somewhere"},
    "config": {},
}
ROWS = {
    "clip": {"base": [70.0, 70.0], "new": [60.0, 60.0], "hm": [64.6, 64.6]},
    "coop": {"base": [80.0, 82.0], "new": [60.0, 61.0], "hm": [68.6, 69.9]},
    "coop+fvg": {
        "base": [81.0, 84.0], "new": [62.0, 62.0], "hm": [70.2, 71.3], "joint_base": [55.0, 56.0],
        "joint_new": [45.0, 46.0], "joint_hm": [49.5, 50.5], "d_fg": [0.2, 0.3], "entropy": [1.0, 1.5],
        "attention_in_mask": [0.25, 0.5], "ece": [5.0, 6.0],
    },
    "coop+fvg [x_fg=x]": {"base": [81.5, 84.5], "new": [62.0, 62.0], "hm": [70.4, 71.5]},
    "coop+fvg [lambda_d=0]": {"base": [80.0, 83.0], "new": [62.0, 62.0], "hm": [69.9, 71.0]},
    "coop+fvg [shuffled masks]": {"base": [80.0], "new": [62.0], "hm": [69.9]},
    "also": {"base": [1.0]},
    "cost": {"base": [1.0]},
    "settings": SETTINGS,
}  # fmt: skip
ACCURACY = {"lora": {"accuracy": [50.0], "ece": [float("nan")]}, "clip": {"accuracy": [40.0]}}
LOCAL = {"id": "local", "revision": None, "class": "SiglipModel"}


def everything() -> tuple[dict[str, Any], str | None, str | None]:
    about = {"results": figures_of(ROWS, "coop", "fvg"), "dataset": "me/pets", "license": "mit", "picture": "0" * 64}
    return {**COMMON, "about": about, "classes": ["fox", *COMMON["classes"]]}, "me/pets-fvg", "warm"


def in_a_folder() -> tuple[dict[str, Any], str | None, str | None]:
    return {**COMMON, "base_model": LOCAL, "tuner": {"kind": "zero_shot"}}, None, None


def without_a_base_on_the_hub() -> tuple[dict[str, Any], str | None, str | None]:
    figures = figures_of({"base": 80.0, "new": 60.0, "hm": 68.5714}, "mmrl", "tuner")
    config = {k: v for k, v in COMMON.items() if k not in ("fvg", "preprocessing")}
    about = {"results": figures, "dataset": "my pets"}
    return {**config, "kind": "tuner", "base_model": LOCAL, "tuner": {"kind": "mmrl"}, "about": about}, "me/mmrl", None


def on_an_adapted_base() -> tuple[dict[str, Any], str | None, str | None]:
    settings = {**SETTINGS, "foreground": "attention", "seeds": [3], "data": "me/pets", "from_hub": True, "views": None}
    rows = {"coop+fvg": {metric: values[:1] for metric, values in ROWS["coop+fvg"].items()}, "settings": settings}
    about = {"results": figures_of(rows, "coop", "fvg")}
    names = [f"class {i}" for i in range(30)]
    tuner = {**COMMON["tuner"], "adapted": True}
    return {**COMMON, "tuner": tuner, "about": about, "base_classes": names, "classes": names}, "me/adapted", None


def lora() -> tuple[dict[str, Any], str | None, str | None]:
    settings = {**SETTINGS, "foreground": "whole", "seeds": [], "test_split": None, "heads": None}
    about = {"results": figures_of({**ACCURACY, "settings": settings}, "lora", "tuner"), "license": "apache-2.0"}
    tuner = {"kind": "lora", "adapted": True, "arguments": {"towers": "both"}}
    one = {"base_classes": ["cat"], "classes": ["cat"]}
    return {**COMMON, **one, "kind": "tuner", "tuner": tuner, "about": about, "fvg": None}, None, None


def external() -> tuple[dict[str, Any], str | None, str | None]:
    return {**COMMON, "tuner": {"kind": "external"}, "about": {"dataset": "pets"}}, "me/external", None


CASES = (everything, in_a_folder, without_a_base_on_the_hub, on_an_adapted_base, lora, external)


def parts(card: str) -> tuple[Any, str]:
    """The header as the Hub reads it, and the text without the line that tells whether it was edited."""
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text.partition("\n<!-- fvg_adapter")[0]


@pytest.mark.parametrize("case", CASES)
def test_cards_read_as_agreed(case: Any) -> None:
    config, repo_id, revision = case()
    before = copy.deepcopy(config)
    card = make_card(config, repo_id, revision)
    assert config == before and card_problems(card) == []
    assert parts(card) == parts((CARDS / f"{case.__name__}.md").read_text("utf-8"))


def test_figures_without_paths_and_foreign_rows() -> None:
    figures = figures_of(ROWS, "coop", "fvg")
    assert figures["data"] == "pets" and set(figures["rows"]) == {*ROWS} - {"also", "cost", "settings"}
    hub = figures_of({**ROWS, "settings": {**SETTINGS, "data": "me/pets", "from_hub": True}}, "coop", "fvg")
    assert hub["data"] == "me/pets"
    assert difference(figures, "coop+fvg", "coop", "base") == [1.0, 2.0]
    assert difference(figures, "coop+fvg", "coop+fvg [shuffled masks]", "base") is None  # another number of seeds
    for name, value in [
        ("data", "x" * 301), ("ours", "nobody"), ("test_split", 3), ("foreground", 3), ("seeds", [1.5]),
        ("seeds", 1), ("shots", "16"), ("data", "/home/somebody"), ("rows", {**figures["rows"], "x": {"base": 1.0}}),
        ("rows", {**figures["rows"], "x": {"base": [1e13]}}), ("rows", {**figures["rows"], "x" * 301: {}}),
    ]:  # fmt: skip
        assert "results" in sound_about({"results": figures})
        assert "results" not in sound_about({"results": {**figures, name: value}}), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": " "}, "dataset is ' '; give a name, such as 'eurosat'."),
        ({"license": ""}, "license is ''; give a name, such as 'mit'."),
        ({"dataset": "/home/pets"}, "dataset '/home/pets' is a path here; give a name for the card, or a Hub id"),
    ],
)
def test_names_for_a_card(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FVGError) as raised:
        add_card(tmp_path, copy.deepcopy(COMMON), tmp_path, **given)
    assert str(raised.value).startswith(said) and not list(tmp_path.iterdir())


if __name__ == "__main__":
    CARDS.mkdir(exist_ok=True)
    for case in CASES:
        (CARDS / f"{case.__name__}.md").write_text(make_card(*case()), "utf-8")
