"""FVGConfig: the published defaults, every bound from both sides, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from fvg_adapter.config import FVGConfig
from fvg_adapter.errors import FVGError

PUBLISHED = {
    "bottleneck": 64,
    "gate_hidden": 32,
    "init_std": 1e-3,
    "temperature": 2.0,
    "lambda_gate": 1.0,
    "lambda_distill": 10.0,
    "lambda_new": 1.0,
    "lambda_new_kl": 1.0,
    "reliability_margin": 0.0,
    "mask_threshold": 0.5,
    "usable_area": (0.02, 0.98),
    "trust": "gate",
    "gate_learns_from_distillation": False,
    "outside_mask": "mean",
    "unusable_mask": "skip",
    "squared_temperature": False,
    "freeze_tuner": True,
    "attention_layers": (-1,),
    "attention_threshold": 1.0,
    "attended_view": 0.0,
    "group_temperature": 1.0,
    "preset": "paper",
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
"""METHOD.md section 7, written down a second time: a default that changes by accident is noticed here."""

POSITIVE = ("bottleneck", "gate_hidden", "temperature", "group_temperature", "attention_threshold")
NOT_NEGATIVE = ("init_std", "lambda_gate", "lambda_distill", "lambda_new", "lambda_new_kl", "reliability_margin")


def test_defaults_are_the_published_ones() -> None:
    found = dataclasses.asdict(FVGConfig())
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_zero_is_the_smallest_weight(name: str) -> None:
    assert getattr(FVGConfig(**{name: 0.0}), name) == 0.0
    with pytest.raises(FVGError, match=rf"^{name} must not be negative, but is -1e-09\.$"):
        FVGConfig(**{name: -1e-9})


@pytest.mark.parametrize("name", POSITIVE)
def test_zero_is_too_small(name: str) -> None:
    assert getattr(FVGConfig(**{name: 1}), name) == 1
    for bad in (0, -1):
        with pytest.raises(FVGError, match=rf"^{name} must be above 0, but is {bad}\.$"):
            FVGConfig(**{name: bad})


NUMBERS = (*POSITIVE, *NOT_NEGATIVE, "mask_threshold", "attended_view", "attended_margin")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("bad", [True, "1", None, math.nan, math.inf, [1.0]])
def test_what_is_no_number(name: str, bad: Any) -> None:
    with pytest.raises(FVGError, match=rf"^{name} must be a finite number, but is "):
        FVGConfig(**{name: bad})


@pytest.mark.parametrize("name", ["bottleneck", "gate_hidden"])
def test_widths_are_whole(name: str) -> None:
    with pytest.raises(FVGError, match=rf"^{name} must be a whole number, but is 3\.5\.$"):
        FVGConfig(**{name: 3.5})


@pytest.mark.parametrize("name", ["gate_learns_from_distillation", "squared_temperature", "freeze_tuner"])
def test_switches_are_booleans(name: str) -> None:
    for good in (True, False):
        assert getattr(FVGConfig(**{name: good}), name) is good
    for bad in (1, 0, "yes", None):
        with pytest.raises(FVGError, match=rf"^{name} must be True or False, but is "):
            FVGConfig(**{name: bad})


@pytest.mark.parametrize(
    ("name", "choices", "near", "given"),
    [
        ("trust", ("gate", "one", "half"), "gate", "gates"),
        ("outside_mask", ("mean", "black"), "black", "blac"),
        ("unusable_mask", ("skip", "error"), "error", "eror"),
    ],
)
def test_choices(name: str, choices: tuple[str, ...], near: str, given: str) -> None:
    for choice in choices:
        assert getattr(FVGConfig(**{name: choice}), name) == choice
    with pytest.raises(FVGError, match=rf"^{name} is '{given}'\. Did you mean '{near}'\?"):
        FVGConfig(**{name: given})


@pytest.mark.parametrize(("good", "bad"), [(1e-9, 0.0), (1.0, 1.0 + 1e-9), (0.5, -0.5)])
def test_mask_threshold(good: float, bad: float) -> None:
    assert FVGConfig(mask_threshold=good).mask_threshold == good
    with pytest.raises(FVGError, match=r"^mask_threshold must lie in \(0, 1\], but is "):
        FVGConfig(mask_threshold=bad)


@pytest.mark.parametrize("good", [(0, 1), (0.5, 0.5), (0.02, 0.98)])
@pytest.mark.parametrize("bad", [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1), (0.5,), (0.1, 0.2, 0.3)])
def test_usable_area(good: Any, bad: Any) -> None:
    assert FVGConfig(usable_area=good).usable_area == good
    with pytest.raises(FVGError, match=r"^usable_area must be two shares 0 ≤ low ≤ high ≤ 1, but is "):
        FVGConfig(usable_area=bad)


@pytest.mark.parametrize("name", ["usable_area", "image_mean", "image_std"])
@pytest.mark.parametrize("value", [math.nan, "0.5", True, 2e9])
def test_what_holds_no_numbers(name: str, value: Any) -> None:
    values = (value,) * (2 if name == "usable_area" else 3)
    with pytest.raises(FVGError, match=rf"^{name} must hold finite numbers, but is \({value!r}, "):
        FVGConfig(**{name: values})


def test_the_largest_values() -> None:
    assert FVGConfig(lambda_new=1e9).lambda_new == 1e9
    assert len(FVGConfig(attention_layers=(-1,) * 256).attention_layers) == 256
    for bad in ({"lambda_new": 1.0001e9}, {"attention_layers": (-1,) * 257}):
        with pytest.raises(FVGError, match="must"):
            FVGConfig(**bad)


def test_attended_view() -> None:
    assert FVGConfig(attended_view=0.0).attended_view == 0.0
    assert FVGConfig(attended_view=0.999).attended_view == 0.999
    for bad in (1.0, -1e-9, 1.5):
        with pytest.raises(FVGError, match=rf"^attended_view must be a weight in \[0, 1\), but is {bad}\.$"):
            FVGConfig(attended_view=bad)
    for good in (0, 1, 1.0, 3.5):
        assert FVGConfig(attended_margin=good).attended_margin == good
    for bad in (0.999, -1.0, 1e-9):
        with pytest.raises(FVGError, match=rf"^attended_margin must be 0 \(no zoom\) or at least 1, but is {bad}\.$"):
            FVGConfig(attended_margin=bad)


PLUS = {
    "lambda_distill": 1.0,
    "lambda_new_kl": 10.0,
    "group_temperature": 2.0,
    "attended_view": 0.4,
    "attention_layers": (-2,),
    "attention_threshold": 1.2,
}
"""docs/plus.md, written down a second time."""


def test_the_plus_preset_and_what_is_given_beside_it() -> None:
    paper, plus = dataclasses.asdict(FVGConfig()), dataclasses.asdict(FVGConfig(preset="plus"))
    assert {name: value for name, value in plus.items() if paper[name] != value} == {**PLUS, "preset": "plus"}
    assert FVGConfig(preset="paper") == FVGConfig()
    own = FVGConfig(preset="plus", lambda_distill=10.0, attention_layers=(-1,))
    assert (own.lambda_distill, own.attention_layers, own.lambda_new_kl) == (10.0, (-1,), 10.0)
    assert FVGConfig(128, preset="plus").bottleneck == 128
    assert (
        FVGConfig.from_dict(own.to_dict()) == own
    )  # a saved config says every field, and is not changed by its preset
    assert "_given" not in own.__dict__
    for bad in ("pluss", None, 3, ["plus"]):
        with pytest.raises(FVGError, match="^preset is "):
            FVGConfig(preset=bad)


def test_a_field_that_does_not_exist() -> None:
    with pytest.raises(FVGError, match=r"^FVGConfig has no field 'lambda_distil'\. Did you mean 'lambda_distill'\?"):
        FVGConfig(lambda_distil=1.0)


@pytest.mark.parametrize("bad", [(), (1.0,), (True,), ("a",), (1, 2.0)])
def test_attention_layers(bad: Any) -> None:
    assert FVGConfig(attention_layers=[-2, 3]).attention_layers == (-2, 3)  # type: ignore[arg-type]
    with pytest.raises(FVGError, match="^attention_layers must name at least one layer by number, but is "):
        FVGConfig(attention_layers=bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"image_mean": (0.5, 0.5)},
        {"image_std": (0.5, 0.5)},
        {"image_std": (0.5, 0.5, 0.0)},
        {"image_std": (-0.5, 0.5, 0.5)},
        {"image_mean": (0.5,) * 4},
    ],
)
def test_normalisation(bad: dict[str, Any]) -> None:
    assert FVGConfig(image_mean=(0.0, -1.0, 2.0), image_std=(1e-9, 1.0, 1.0)).image_mean == (0.0, -1.0, 2.0)
    with pytest.raises(FVGError, match="^image_mean and image_std must have 3 values each, and the deviations"):
        FVGConfig(**bad)


@pytest.mark.parametrize("name", ["usable_area", "attention_layers", "image_mean", "image_std"])
def test_what_is_no_sequence(name: str) -> None:
    with pytest.raises(FVGError, match=rf"^{name} must be a sequence of numbers, but is 7\.$"):
        FVGConfig(**{name: 7})


def test_a_changed_config_is_checked_again() -> None:
    config = FVGConfig()
    config.temperature = -1.0
    with pytest.raises(FVGError, match="temperature must be above 0"):
        config.validate()


def test_through_json_and_back() -> None:
    config = FVGConfig(lambda_distill=3.0, usable_area=(0.1, 0.5), attention_layers=(-1, -2), trust="half")
    text = config.to_json_string()
    assert text.endswith("}\n") and text.startswith('{\n  "bottleneck": 64,\n')
    values = json.loads(text)
    assert values == config.to_dict()
    assert values["usable_area"] == [0.1, 0.5] and values["attention_layers"] == [-1, -2]
    assert FVGConfig.from_dict(values) == config


def test_fields_of_a_newer_version_are_named_and_left_out(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match=r"unknown fields \['alpha', 'zeta'\] ignored"):
        config = FVGConfig.from_dict({"zeta": 1, "alpha": 2, "lambda_distill": 4.0})
    assert config == FVGConfig(lambda_distill=4.0)
    FVGConfig.from_dict({})
    assert not recwarn.list


@pytest.mark.parametrize("bad", [None, [("trust", "gate")], "trust"])
def test_from_something_else_than_a_mapping(bad: Any) -> None:
    with pytest.raises(FVGError, match=f"^an FVGConfig is made from a mapping, but {type(bad).__name__} was given"):
        FVGConfig.from_dict(bad)
